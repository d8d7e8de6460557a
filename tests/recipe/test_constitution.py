"""Constitutions, and the rules of an `align cai` recipe."""

import pytest

from align_cli.errors import RecipeError
from align_cli.recipe import constitution
from align_cli.recipe.check import load

BARE = "model: { path: models/x }\ndata: { train: a.jsonl, max_length: 512 }\n"


def problems(here, *words, text=BARE):
    (here / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load("cai", ["recipe=mine.yaml", *words])
    return list(caught.value.lines)


def test_the_shipped_one_is_for_harmlessness_and_against_over_refusal(here):
    law = constitution.load("default")
    assert len(law.principles) >= 16 and len(law.sha256) == 64
    assert len(law.drawn_for("red-team")) >= 12 and len(law.drawn_for("harmless")) >= 6
    assert len({one.comparison for one in law.principles}) == len(law.principles)
    assert {one.prompts for one in law.shown_before("harmless", 1)} == {"harmless"}
    assert law.shown_before("red-team", 0) == [] and len(law.shown_before("red-team", None)) == 2


def test_every_problem_of_a_file_comes_at_once_with_its_line(here):
    (here / "law.yaml").write_text(
        "principles:\n  - id: a\n    critique_request: x\n    revision_request: ''\n    comparison: 3\n"
        "  - id: b\n    critique_requst: x\n    prompts: some\nexmples: []\n"
    )
    assert constitution.problems("law.yaml", ["red-team"]) == [
        "law.yaml:4: principles[0].revision_request: is empty; write it, or remove the entry",
        "law.yaml:5: principles[0].comparison: expected a string, found int 3",
        "law.yaml:6: principles[1].critique_request: is missing; write it",
        "law.yaml:6: principles[1].revision_request: is missing; write it",
        "law.yaml:6: principles[1].comparison: is missing; write it",
        "law.yaml:8: principles[1].prompts: expected 'all', 'red-team' or 'harmless', found str 'some'",
        "law.yaml:7: principles[1].critique_requst: unknown key. Did you mean 'critique_request'?",
        "law.yaml:9: exmples: unknown key. Did you mean 'examples'?",
    ]


def test_twice_the_same_name_none_for_a_kind_and_no_file(here):
    one = "{ id: a, critique_request: c, revision_request: r, comparison: q, prompts: red-team }"
    (here / "law.yaml").write_text(f"principles: [{one}, {one}]\n")
    assert constitution.problems("law.yaml", ["red-team"]) == ["law.yaml: the principle 'a' occurs twice; rename one"]
    (here / "law.yaml").write_text(f"principles: [{one}]\n")
    (line,) = constitution.problems("law.yaml", ["red-team", "harmless"])
    assert "has no principle for harmless prompts" in line
    (line,) = constitution.problems("defalt", ["red-team"])
    assert "Did you mean 'default'?" in line
    (here / "law.yaml").write_text("principles: [\n")
    assert "not valid YAML" in constitution.problems("law.yaml", ["red-team"])[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.phases=[revisions,answers]"], "is out of order"),
        (["method.phases=[train]"], "train reads the output of revisions; add revisions, or set method.rows"),
        (["method.judge=false"], "set method.pairs=revised"),
        (["method.clamp=[0.6,0.4]"], "give the lower bound first"),
        (["generation.temperature=0"], "two greedy answers are the same"),
        (["generation.max_new_tokens=512"], "leaves no room for a prompt"),
        (["feedback={path: a, endpoint: 'http://x', model: m}"], "exactly one of a local model and an endpoint"),
        (["feedback={endpoint: 'localhost:8000', model: m}"], "write it with its scheme"),
        (["feedback={endpoint: 'http://x/v1'}"], "name the model that the endpoint serves"),
        (["feedback={endpoint: 'http://u:secret@x/v1', model: m}"], "contains a secret"),
        (["feedback={endpoint: 'http://x/v1', model: m, key_env: sk-live-1234}"], "never the key"),
        (["data.eval=b.jsonl"], "must be a fraction in cai"),
    ],
)
def test_rules(here, words, said):
    lines = problems(here, *words)
    assert len(lines) == 1 and said in lines[0]
    assert "sk-live" not in lines[0] and "secret@" not in lines[0]


def test_mistral_carries_the_replications_settings():
    _, cai = load("cai", ["recipe=mistral-7b"])
    _, dpo = load("dpo", ["recipe=mistral-7b-cai"])
    assert cai.method.revisions == 1 and cai.generation.temperature == 1.0
    assert (cai.method.pairs, cai.method.judge) == ("revised", False)
    assert cai.trainer["learning_rate"] == 2e-5 and cai.trainer["num_train_epochs"] == 1
    assert dpo.method.beta == 0.1 and dpo.trainer["learning_rate"] == 5e-7 and dpo.trainer["num_train_epochs"] == 3
    assert dpo.model.path == "runs/mistral-7b/cai" and dpo.data.train[0].path == "runs/mistral-7b/cai/preferences.jsonl"
