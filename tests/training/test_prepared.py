"""Rows that are prepared once: the same as if every rank held all of them in lists, and read again instead of made."""

import json
import multiprocessing
import os
import random
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import project
import pytest
import tiny
from datasets import Dataset
from trl import pack_dataset

from align_cli import distributed
from align_cli.data import chat, labels, rankings
from align_cli.data.groups import read_groups
from align_cli.errors import DataError
from align_cli.recipe.sections import Data
from align_cli.reward_model import ensemble
from align_cli.training import datasets as training
from align_cli.training import prepared

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
LIMITS = {"max_length": 140, "max_prompt_length": 90}


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)

    def words():
        return " ".join(draw.choices(["red", "green", "blue", "teal", "navy"], k=draw.randint(1, 12)))

    asks = [f"say {at} {words()}" for at in range(250)]
    for name, number in (("a", 300), ("b", 90)):
        pairs = [{"prompt": asks[at % 250], "chosen": words(), "rejected": words()} for at in range(number)]
        project.write_rows(Path(f"{name}.jsonl"), pairs)
        rankings = [{"prompt": row["prompt"], "responses": [words() for _ in range(4)]} for row in pairs]
        project.write_rows(Path(f"{name}-ranked.jsonl"), rankings)
        talks = [[row["prompt"], row["chosen"], words(), row["rejected"]] for row in pairs]
        turns = [[{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(t)] for t in talks]
        project.write_rows(Path(f"{name}-talks.jsonl"), [{"messages": talk} for talk in turns])
    return tmp_path


def sources(kind=""):
    """Two sources, one repeated and one in part, and held-out prompts."""
    train = [{"path": f"a{kind}.jsonl", "weight": 1.5}, {"path": f"b{kind}.jsonl", "weight": 0.5}]
    return Data(train=train, eval=0.2, max_length=140, max_prompt_length=90, max_dropped=1.0)


def job(data, said=None, seed=3):
    """A job as far as its rows are concerned."""
    said = [] if said is None else said
    return SimpleNamespace(recipe=SimpleNamespace(data=data, seed=seed), say=said.append, cache=Path("cache"), rank=0)


def demonstrations(tok):
    return lambda groups, tally: chat.sft_rows(tok, groups, max_length=140, last_turn_only=False, tally=tally)


def pairs(tok):
    return lambda groups, tally: chat.dpo_rows(tok, groups, how="all", **LIMITS, tally=tally)


def ranked(tok):
    def rows(groups, tally):
        for row in rankings.rm_rows(tok, groups, **LIMITS, tally=tally):
            yield row | {"heads": ensemble.drawn(row, [1, 2])}

    return rows


def labelled(tok):
    return lambda groups, tally: labels.kto_rows(tok, groups, split="best-rest", **LIMITS, tally=tally)


KINDS = {
    "sft": ("demonstrations", demonstrations, "-talks", "oasst_sft.jsonl"),
    "dpo": ("preferences", pairs, "", "hh_harmless_pairs.jsonl"),
    "rm": ("preferences", ranked, "-ranked", "oasst_rankings.jsonl"),
    "kto": ("labels", labelled, "-ranked", "oasst_rankings.jsonl"),
}


def in_lists(data, need, rows, seed=3):
    """(train, eval) rows as every rank made them before: all in lists, shuffled there."""
    groups, made = read_groups(data, need, seed), []
    for part in (groups.train, groups.eval):
        listed = list(rows(part, chat.Tally()))
        random.Random(seed).shuffle(listed)
        made.append(listed)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_those_of_lists(kind, here, tok):
    need, rows, suffix, _ = KINDS[kind]
    data = sources(suffix)
    made = training.datasets(job(data), need, tok, {}, rows(tok))
    train, held_out = in_lists(data, need, rows(tok))
    assert len(train) > 100 and list(made.train) == train and list(made.eval) == held_out
    assert made.train.cache_files and Path(made.train.cache_files[0]["filename"]).parent.parent == here / "cache/rows"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs published data")
def test_the_rows_of_published_data_are_those_of_lists(kind, here, tok):
    need, rows, _, file = KINDS[kind]
    data = Data(train=str(SHARED / file), eval=0.1, max_length=140, max_dropped=1.0, drop_empty=True)
    made = training.datasets(job(data), need, tok, {}, rows(tok))
    assert [list(made.train), list(made.eval)] == in_lists(data, need, rows(tok))


def test_packed_rows_are_those_of_lists(here, tok):
    data, rows = sources("-talks"), demonstrations(tok)
    made = training.datasets(
        job(data),
        "demonstrations",
        tok,
        {},
        rows,
        lambda name, rows: pack_dataset(rows, 140) if name == "train" else rows,
    )
    train, held_out = in_lists(data, "demonstrations", rows)
    assert list(made.train) == list(pack_dataset(Dataset.from_list(train), 140)) and list(made.eval) == held_out
    (folder,) = Path("cache/rows").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["eval.arrow", "report.json", "train.arrow"]


# read again


def never(groups, tally):
    raise AssertionError("the rows exist")


def test_a_second_run_reads_what_the_first_prepared(here, tok):
    first, second = [], []
    data = Data(train="a.jsonl", eval=["b.jsonl"], max_length=140, max_dropped=1.0)
    rows = lambda groups, tally: tally.add("seen", len(groups)) or pairs(tok)(groups, tally)  # noqa: E731
    made = training.datasets(job(data, first), "preferences", tok, {}, rows)
    again = training.datasets(job(data, second), "preferences", tok, {}, never)
    assert list(again.train) == list(made.train) and list(again.eval) == list(made.eval)
    assert again.counts == made.counts and made.counted == again.counted == {"seen": 390}
    assert first == second and len(first) > 3
    assert any("are in data.train too" in line for line in first) and any("truncated" in line for line in first)


def test_the_key_covers_all_that_rows_depend_on(here, tok, monkeypatch):
    def keys():
        return {folder.name for folder in Path("cache/rows").iterdir()}

    def made(data, tokenizer=tok, seed=3, need="preferences", **settings):
        before = keys() if Path("cache/rows").is_dir() else set()
        training.datasets(job(data, seed=seed), need, tokenizer, settings, pairs(tokenizer))
        return bool(keys() - before)

    data = Data(train="a.jsonl", max_length=140, max_dropped=1.0)
    assert made(data)
    assert not made(data)
    assert not made(Data(train="a.jsonl", max_length=140, max_dropped=1.0, batch_size=4))
    assert made(Data(train="a.jsonl", max_length=141, max_dropped=1.0))
    assert made(Data(train={"path": "a.jsonl", "weight": 0.5}, max_length=140, max_dropped=1.0))
    assert made(Data(train="a.jsonl", max_length=140, max_dropped=1.0, date="2026-01-31"))
    assert made(data, seed=4)
    assert made(data, how="all")
    other = tiny.tokenizer()
    assert not made(data, other)
    other.chat_template = other.chat_template + " "
    assert made(data, other)
    other = tiny.tokenizer()
    other.add_tokens(["navy"])
    assert made(data, other)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_code", lambda: "other code")
        assert made(data)
    with monkeypatch.context() as patch:
        patch.setattr(prepared.manifest, "version_of", lambda name: "99")
        assert made(data)
    lines = Path("a.jsonl").read_text().splitlines(keepends=True)
    Path("a.jsonl").write_text("".join(lines[1:]))
    assert made(data)
    Path("a.jsonl").write_text("".join(lines))
    assert not made(data)


def test_a_hub_id_without_a_known_commit_is_prepared_anew(here, tok, monkeypatch):
    for module in ("align_cli.data.groups", "align_cli.training.prepared"):
        monkeypatch.setattr(f"{module}.fingerprint", lambda source: f"hub:{source.path}@unknown:train")
    data = Data(train="a.jsonl", max_length=140, max_dropped=1.0)
    training.datasets(job(data), "preferences", tok, {}, pairs(tok))
    project.write_rows(Path("a.jsonl"), [{"prompt": "new", "chosen": "yes", "rejected": "no"}])
    assert len(training.datasets(job(data), "preferences", tok, {}, pairs(tok)).train) == 1


def test_errors_are_raised_each_time(here, tok):
    for _ in range(2):
        with pytest.raises(DataError, match=r"^missing\.jsonl: no such file"):
            training.datasets(job(Data(train="missing.jsonl")), "preferences", tok, {}, pairs(tok))
        with pytest.raises(DataError, match="rows dropped"):
            data = Data(train="a.jsonl", max_prompt_length=1, max_dropped=0.1)
            rows = lambda g, t: chat.dpo_rows(tok, g, how="all", max_length=60, max_prompt_length=1, tally=t)  # noqa: E731
            training.datasets(job(data), "preferences", tok, {}, rows)
    assert list(Path("cache/rows").iterdir()) == []


# nothing half-written


def test_a_killed_run_leaves_nothing_that_is_read(here, tok):
    data = Data(train="a.jsonl", max_length=140, max_dropped=1.0)

    def dying(groups, tally):
        for number, row in enumerate(pairs(tok)(groups, tally)):
            if number == 270:
                os._exit(9)
            yield row

    child = multiprocessing.get_context("fork").Process(
        target=training.datasets, args=(job(data), "preferences", tok, {}, dying)
    )
    child.start()
    child.join()
    (left,) = Path("cache/rows").iterdir()
    assert child.exitcode == 9 and (left / "train.before").stat().st_size
    made = training.datasets(job(data), "preferences", tok, {}, pairs(tok))
    assert list(made.train) == in_lists(data, "preferences", pairs(tok))[0]


def test_two_runs_at_once_end_with_one_entry(here, tok):
    data, inner = Data(train="a.jsonl", max_length=140, max_dropped=1.0), []

    def overtaken(groups, tally):
        if not inner:
            inner.append(None)
            inner[0] = training.datasets(job(data), "preferences", tok, {}, pairs(tok))
        return pairs(tok)(groups, tally)

    outer = training.datasets(job(data), "preferences", tok, {}, overtaken)
    assert list(outer.train) == list(inner[0].train)
    assert len(list(Path("cache/rows").iterdir())) == 1


def test_old_entries_go_when_there_are_too_many(tmp_path, monkeypatch):
    now = 1_000 * 86400
    monkeypatch.setattr(prepared.time, "time", lambda: now)
    monkeypatch.setattr(prepared, "KEPT", 250)
    for name, days in (("new", 0), ("week", 6), ("older", 8), ("oldest", 9), (".new-left", 8), (".new-now", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.arrow").write_bytes(b"x" * 80)
        os.utime(tmp_path / name, (now - days * 86400,) * 2)
    prepared.prune(tmp_path)
    assert {folder.name for folder in tmp_path.iterdir()} == {"new", "week", ".new-now"}
    shutil.rmtree(tmp_path / ".new-now")
    monkeypatch.setattr(prepared, "KEPT", 1)
    prepared.prune(tmp_path)
    assert {folder.name for folder in tmp_path.iterdir()} == {"new", "week"}, "runs of the last days may read them"


# ranks


def _rank(rank, port, folder):
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.join()
    tok, data = tiny.tokenizer(), Data(train="a.jsonl", eval=0.1, max_length=140, max_dropped=1.0)
    rows = pairs(tok) if rank == 0 else never
    made = training.datasets(job(data), "preferences", tok, {}, rows)
    try:
        training.datasets(job(Data(train="missing.jsonl")), "preferences", tok, {}, rows)
    except DataError as error:
        refused = error.lines
    distributed.leave()
    seen = [list(made.train), list(made.eval), [count.rows_used for count in made.counts], refused]
    Path(f"rank-{rank}.json").write_text(json.dumps(seen))


def test_only_rank_0_prepares_and_its_errors_are_those_of_all(here):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, port, here)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    one, other = (json.loads(Path(f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert one == other and len(one[0]) > 200 and "no such file" in one[3][0]


# runs


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_run_on_prepared_rows_repeats_itself_and_leaves_nothing_beside_the_data(packing, tmp_path):
    folder = project.build(tmp_path / "project")
    words = ("sft", "recipe=t", f"method.packing={packing}", "data.eval=0.2")
    first = project.ok(*words, cwd=folder)
    losses = project.losses(folder / "runs/t/sft")
    second = project.ok(*words, "force=true", cwd=folder)
    lines = [[line for line in text.splitlines() if "rows read" in line] for text in (first, second)]
    assert lines[0] == lines[1] != []
    assert project.losses(folder / "runs/t/sft") == losses
    (entry,) = (folder / "runs/.cache/rows").iterdir()
    assert sorted(file.name for file in entry.iterdir()) == ["eval.arrow", "report.json", "train.arrow"]
    assert {file.name for file in folder.iterdir()} == {"models", "recipes", "runs", "sft.jsonl", "dpo.jsonl"}
    assert json.loads((folder / "runs/t/sft/manifest.json").read_text())["data"][0]["rows_used"] == 32
