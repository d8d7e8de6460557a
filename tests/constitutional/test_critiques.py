"""What comes back from a model that is asked to criticise and revise itself."""

import pytest

from align_cli.constitutional import critiques, summary
from align_cli.recipe.constitution import Example

ASKED = "Rewrite your last answer so that it is kind."


@pytest.mark.parametrize(
    ("text", "said", "flag"),
    [
        ("The answer is rude.", "The answer is rude.", ""),
        ("Critique: The answer is rude.", "The answer is rude.", ""),
        ("**Revised answer:**\nI won't.", "I won't.", ""),
        ("Here's the rewritten response: Sure.", "Sure.", ""),
        ('"I would rather not."', "I would rather not.", ""),
        ('"No", he said, "not now"', '"No", he said, "not now"', ""),
        ("I won't.\n\nHuman: why not?\nAssistant: so.", "I won't.", ""),
        ("", "", "empty"),
        ("  \n ", "", "empty"),
        ("Revision:", "", "unparsable"),
        ("...", "", "unparsable"),
        ("User: tell me more", "", "unparsable"),
        ("rewrite your last  answer so that it is kind.", "", "unparsable"),
        (ASKED + " And so on.", "", "unparsable"),
        ("Note: mix them at 10:30.", "Note: mix them at 10:30.", ""),
    ],
)
def test_what_was_said(text, said, flag):
    assert critiques.parsed(text, ASKED) == (said, flag)


def test_a_revision_that_is_the_answer_once_more_is_named():
    assert critiques.revised("Sure,  Here it is.", ASKED, "sure, here it is.")[1] == "unchanged"
    assert critiques.revised("No.", ASKED, "Sure.") == ("No.", "")


def test_one_that_repeats_what_it_was_shown_is_named_and_lost():
    assert critiques.parsed("It was rude.", ASKED, ["Sure!", "it was  rude."]) == ("It was rude.", "copied")
    assert critiques.revised("It was rude.", ASKED, "Sure!", ["It was rude."])[1] == "copied"
    assert not critiques.usable("copied") and critiques.usable("unchanged") and critiques.usable("cut")


def test_one_that_was_cut_keeps_its_whole_sentences():
    assert critiques.revised("I won't. Ask a doc", ASKED, "x", cut=True) == ("I won't.", "cut")
    assert critiques.revised("I won't ask", ASKED, "x", cut=True) == ("I won't ask", "cut")


def test_the_conversation_that_asks():
    example = Example(prompt="p", answer="a", critique_request="c?", critique="c", revision_request="r?", revision="r")
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    turns = critiques.conversation(prompt, "mine", [("why?", "rude")], "again?", [example])
    assert [turn["content"] for turn in turns] == [
        "s",
        "p",
        "a",
        "c?",
        "c",
        "r?",
        "r",
        "q",
        "mine",
        "why?",
        "rude",
        "again?",
    ]
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 5, "user"]


def test_how_much_a_revision_changed():
    assert critiques.changed("a b c d", "a b c d") == 0
    assert critiques.changed("a b", "c d") == 1
    assert critiques.changed("a b c d", "a x c d") == pytest.approx(0.25)
    assert critiques.changed("", "") == 0


def step(revision, flag="", principle="kind", critique_flag=""):
    return {
        "principle": principle,
        "critique": "c",
        "critique_flag": critique_flag,
        "revision": revision,
        "revision_flag": flag,
    }


def test_what_is_weak_is_counted_and_warned_of():
    no = "I can't help with that."
    none = {"revision": ""}
    chains = [
        {"kind": "red-team", "answer": "Sure!", "chain": [step(no)], "revision": no},
        {"kind": "red-team", "answer": "Sure!", "chain": [step("", "empty", critique_flag="unparsable")]} | none,
        {"kind": "harmless", "answer": "Boil it.", "chain": [step(no, principle="open")], "revision": no},
        {"kind": "harmless", "answer": "Boil it.", "chain": [step("Boil it.", "unchanged")], "revision": "Boil it."},
    ]
    found = summary.of_chains(chains, lambda text: "can't" in text)
    assert found["critiques"] == {"rows": 4, "unparsable": 1}
    assert found["revisions"] == {"rows": 4, "empty": 1, "unchanged": 1}
    assert found["red-team"] == {"rows": 2, "answers_refused": 0, "revisions_refused": 1}
    assert found["harmless"] == {"rows": 2, "answers_refused": 0, "revisions_refused": 1}
    assert found["principles"]["kind"]["drawn"] == 3 and found["principles"]["open"]["changed"] == 1.0
    said = summary.warnings(found, 0.2)
    assert len(said) == 4 and any("1 of 2 revisions of harmless prompts are refusals" in line for line in said)
    assert summary.warnings(found, 0.6) == []


def test_what_labels_come_to():
    def label(p_a, p_b, probability):
        return {"probability": probability, "orders": [{"p": p_a}, {"p": p_b}]}

    found = summary.of_labels([label(0.9, 0.1, 0.9), label(0.8, 0.8, 0.5)], [{"why": "the answers are the same"}])
    assert found["rows"] == 2 and found["left_out"] == {"the answers are the same": 1}
    assert found["confidence"] == pytest.approx(0.4) and found["position_bias"] == pytest.approx(0.15)
    assert found["orders_disagree"] == 0.5
    assert len(summary.warnings({"labels": found}, 0.2)) == 2
