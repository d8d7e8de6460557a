"""Groups that are read once and kept on disk: the same choice as from lists, in any size."""

import json
from pathlib import Path

import pytest

from align_cli.data import spool
from align_cli.data.groups import read_groups
from align_cli.data.split import canonical, content, hashed
from align_cli.recipe.sections import Data


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, numbers):
    rows = [{"prompt": f"ask {n % 40}", "chosen": f"good {n}", "rejected": "bad \ud83d"} for n in numbers]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def chosen(groups, weight):
    """The groups by weight, as lists of them were repeated and sorted."""
    whole, part = int(weight), weight - int(weight)
    if not part:
        return groups * whole
    first = sorted(groups, key=lambda group: hashed(5, "weight", content(group)))
    first = first[: max(round(part * len(groups)), 0 if whole else 1)]
    return groups * whole + [group for group in groups if any(group is one for one in first)]


def in_lists(weights, fraction):
    """Training and held-out groups, and the number of leaked prompts, worked out on lists of whole sources."""
    a, b, c = (list(read_groups(Data(train=f"{name}.jsonl"), "preferences", 0).train) for name in "abc")
    held_out = []
    if fraction:
        keys = sorted({hashed(5, "split", group.prompt) for group in a + b})
        keys = set(keys[: round(fraction * len(keys))])
        held_out = [group for group in a + b if hashed(5, "split", group.prompt) in keys]
        a, b = ([group for group in part if hashed(5, "split", group.prompt) not in keys] for part in (a, b))
    train = chosen(a, weights[0]) + chosen(b, weights[1])
    evals = [] if fraction else chosen(c, weights[2])
    prompts = {canonical(group.prompt) for group in train}
    return train, held_out + evals, sum(canonical(group.prompt) in prompts for group in evals)


@pytest.mark.parametrize("in_memory", [1 << 30, 1])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
@pytest.mark.parametrize("weights", [(1, 1, 1), (2.5, 0.3, 1.5)])
def test_split_weights_and_leaks_are_those_of_lists(in_memory, fraction, weights, monkeypatch, tmp_path):
    monkeypatch.setattr(spool, "IN_MEMORY", in_memory)
    for name, numbers in (("a", range(70)), ("b", range(30, 50)), ("c", range(25, 60, 5))):
        write(f"{name}.jsonl", numbers)
    a, b, c = ({"path": f"{name}.jsonl", "weight": weight} for name, weight in zip("abc", weights, strict=False))
    read = read_groups(Data(train=[a, b], eval=fraction or [c]), "preferences", 5, folder=tmp_path)
    train, held_out, leaked = in_lists(weights, fraction)
    assert (list(read.train), list(read.eval), read.leaked) == (train, held_out, leaked)
    assert leaked or fraction
    assert [read.train[7], read.train[-1], *read.train[3:9:2]] == [train[7], train[-1], *train[3:9:2]]
    assert all(group.count in read.counts for group in read.train)
    assert read.train[0].count is read.counts[0] and read.train[-1].count is read.counts[1]
    assert {file.suffix for file in tmp_path.iterdir()} == {".jsonl"}, "the file has no name"
