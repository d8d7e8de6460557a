"""Every supported format gives the same groups, and every broken row gives one error line."""

import pytest

from align_cli.data.format import Group, recognise, to_group
from align_cli.data.kinds import note_kinds, text_columns
from align_cli.data.turns import Broken, Dropped, dialogue, is_hh
from align_cli.recipe.sections import Source


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}
HH = "\n\nHuman: hi \n\nAssistant: yes?\n\nHuman: Say: Human: x\n\nAssistant: {}"
HH_PROMPT = [user("hi"), bot("yes?"), user("Say: Human: x")]


def group(row, need, named=None, drop_empty=False):
    name = recognise([row], Source(path="x.jsonl", format=named), need)
    return name, to_group(row, "x.jsonl:1", name, need, drop_empty)


def broken(row, need, named=None):
    with pytest.raises(Broken) as raised:
        name = recognise([row], Source(path="x.jsonl", format=named), need)
        note_kinds(row, "x.jsonl:1", text_columns(name, need), {})
        to_group(row, "x.jsonl:1", name, need)
    return str(raised.value)


def dropped(row, need, named=None):
    with pytest.raises(Dropped) as raised:
        group(row, need, named)
    return raised.value.reason


PAIR = ([user("q")], [[bot("good")], [bot("bad")]])

CASES = [
    # need, row, format, prompt, responses
    ("demonstrations", {"messages": [SYSTEM, user("q"), bot("a")]}, "messages", [SYSTEM, user("q")], [[bot("a")]]),
    (
        "demonstrations",  # the response runs from the first assistant turn to the last
        {"messages": [user("q"), bot("a"), user("r"), bot("b")]},
        "messages",
        [user("q")],
        [[bot("a"), user("r"), bot("b")]],
    ),
    ("demonstrations", {"prompt": " q\n", "completion": " a "}, "prompt-completion", [user(" q\n")], [[bot(" a ")]]),
    (
        "demonstrations",
        {"prompt": [SYSTEM, user("q")], "completion": [bot("a")]},
        "prompt-completion",
        [SYSTEM, user("q")],
        [[bot("a")]],
    ),
    (
        "demonstrations",
        {"prompt": [user("q")], "completion": [user("q"), bot("a")]},
        "prompt-completion",
        [user("q")],
        [[bot("a")]],
    ),
    ("demonstrations", {"instruction": "q", "output": "a"}, "alpaca", [user("q")], [[bot("a")]]),
    (
        "demonstrations",
        {"instruction": "q", "input": "x", "output": "a", "system": "be brief", "history": [["o", "p"]]},
        "alpaca",
        [SYSTEM, user("o"), bot("p"), user("q\n\nx")],
        [[bot("a")]],
    ),
    (
        "demonstrations",
        {"instruction": "q", "input": "", "output": "a", "system": ""},
        "alpaca",
        [user("q")],
        [[bot("a")]],
    ),
    (
        "demonstrations",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "be brief"},
        "sharegpt",
        [SYSTEM, user("q")],
        [[bot("a")]],
    ),
    ("demonstrations", {"conversations": [user("q"), bot("a")]}, "sharegpt", [user("q")], [[bot("a")]]),
    ("demonstrations", {"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference", *PAIR),
    ("preferences", {"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference", *PAIR),
    ("preferences", {"prompt": [user("q")], "chosen": [bot("good")], "rejected": [bot("bad")]}, "preference", *PAIR),
    (
        "preferences",  # ultrafeedback_binarized
        {"prompt": "q", "chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")], "score_chosen": 1.0},
        "preference",
        *PAIR,
    ),
    (
        "preferences",
        {
            "prompt": "q",
            "chosen": [SYSTEM, user("q"), bot("a"), user("r"), bot("good")],
            "rejected": [SYSTEM, user("q"), bot("a"), user("r"), bot("bad")],
        },
        "preference",
        [SYSTEM, user("q"), bot("a"), user("r")],
        PAIR[1],
    ),
    (
        "preferences",
        {"prompt": [user("q")], "chosen": [user("q"), bot("good")], "rejected": [bot("bad")]},
        "preference",
        *PAIR,
    ),
    (
        "preferences",
        {"chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]},
        "implicit-prompt",
        *PAIR,
    ),
    (
        "preferences",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "sharegpt",
        *PAIR,
    ),
    ("preferences", {"chosen": HH.format("good "), "rejected": HH.format(" bad")}, "hh", HH_PROMPT, PAIR[1]),
    ("preferences", {"prompt": HH.format(""), "chosen": " good", "rejected": "bad\n"}, "hh", HH_PROMPT, PAIR[1]),
    (
        "preferences",
        {"prompt": HH.format(""), "chosen": HH.format("good"), "rejected": HH.format("bad")},
        "hh",
        HH_PROMPT,
        PAIR[1],
    ),
    (
        "preferences",  # a reply that begins with a mark of its own is still a reply
        {"prompt": HH.format(""), "chosen": "Human: x", "rejected": "Human: y"},
        "hh",
        HH_PROMPT,
        [[bot("Human: x")], [bot("Human: y")]],
    ),
    ("preferences", {"prompt": "q", "responses": ["good", "bad"]}, "ranking", *PAIR),
    ("preferences", {"prompt": [user("q")], "responses": [[bot("good")], [bot("bad")]]}, "ranking", *PAIR),
    ("preferences", {"prompt": "q", "responses": ["bad", "good"], "scores": [-1, 2.5]}, "scored", *PAIR),
    ("labels", {"prompt": "q", "completion": "a", "label": False}, "kto", [user("q")], [[bot("a")]]),
    ("prompts", {"prompt": "q"}, "prompt", [user("q")], []),
    ("prompts", {"question": "q", "answer": ""}, "prompt", [user("q")], []),
    ("prompts", {"instruction": "q"}, "alpaca", [user("q")], []),
    ("prompts", {"instruction": "q", "input": "x"}, "alpaca", [user("q\n\nx")], []),
    ("prompts", {"prompt": "q", "chosen": "", "rejected": "b"}, "prompt", [user("q")], []),
    ("prompts", {"messages": [user("q"), bot("a"), user("r")]}, "messages", [user("q"), bot("a"), user("r")], []),
    ("prompts", {"messages": [user("q"), bot("a")]}, "messages", [user("q")], []),
    ("prompts", {"conversations": [{"from": "human", "value": "q"}]}, "sharegpt", [user("q")], []),
    ("prompts", {"chosen": HH.format("good"), "rejected": ""}, "hh", HH_PROMPT, []),
    ("prompts", {"prompt": HH.format("")}, "hh", HH_PROMPT, []),
    ("prompts", {"chosen": [user("q"), bot("a")], "rejected": []}, "implicit-prompt", [user("q")], []),
]


@pytest.mark.parametrize(("need", "row", "name", "prompt", "responses"), CASES)
def test_formats_are_recognised_and_read(need, row, name, prompt, responses):
    found, made = group(row, need)
    assert found == name
    assert (made.prompt, made.responses, made.place) == (prompt, responses, "x.jsonl:1")


@pytest.mark.parametrize(("need", "row", "name", "prompt", "responses"), CASES)
def test_naming_the_recognised_format_changes_nothing(need, row, name, prompt, responses):
    assert group(row, need, named=name) == group(row, need)


def test_a_file_that_fits_several_formats_serves_the_need():
    row = {"prompt": "q", "messages": [user("q"), bot("good")]}
    row |= {"chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]}
    assert group(row, "demonstrations")[0] == "messages"
    assert group(row, "preferences")[0] == "preference"
    assert group(row, "prompts")[0] == "prompt"


def test_columns_of_nulls_and_blanks_do_not_mislead():
    rows = [{"messages": None, "chosen": "", "rejected": ""}, {"chosen": HH.format("a"), "rejected": HH.format("b")}]
    assert recognise(rows, Source(path="x"), "preferences") == "hh"


def test_scores_sort_stably_and_stay_with_their_responses():
    row = {"prompt": "q", "responses": ["c", "a", "d", "b"], "scores": [1, 2, 0.5, 2]}
    made = group(row, "demonstrations")[1]
    assert [r[0]["content"] for r in made.responses] == ["a", "b", "c", "d"]
    assert made.scores == [2.0, 2.0, 1.0, 0.5]


def test_pair_scores_count_only_where_the_format_is_named():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 3}
    assert group(row, "preferences") == ("preference", Group([user("q")], [[bot("a")], [bot("b")]], place="x.jsonl:1"))
    made = group(row, "preferences", named="scored")[1]
    assert (made.scores, made.responses) == ([3.0, 1.0], [[bot("b")], [bot("a")]])


def test_repeated_responses_leave_the_ranking_but_not_the_demonstrations():
    row = {"prompt": "q", "responses": ["a", "b", "a"]}
    assert group(row, "preferences")[1].responses == [[bot("a")], [bot("b")]]
    assert len(group(row, "demonstrations")[1].responses) == 3


@pytest.mark.parametrize(
    ("label", "means"), [(True, True), (1, True), ("False", False), ("0", False), (0, False), ("true", True)]
)
def test_labels(label, means):
    row = {"prompt": "q", "completion": "a", "label": label}
    assert group(row, "labels")[1].label is means


def test_a_topic_label_does_not_make_a_kto_file_but_a_truth_does():
    assert group({"prompt": "q", "completion": "a", "label": "sport"}, "demonstrations")[0] == "prompt-completion"
    row = {"prompt": "q", "completion": "a", "label": False}
    assert "must all be good" in broken(row, "demonstrations")
    assert group(row, "demonstrations", named="prompt-completion")[1].responses == [[bot("a")]]


@pytest.mark.parametrize(
    ("need", "row", "reason"),
    [
        ("preferences", {"chosen": HH.format("a"), "rejected": HH.format("a")}, "chosen equals rejected"),
        (
            "preferences",
            {"chosen": HH.format("a"), "rejected": HH.format("b").replace("yes?", "no?")},
            "chosen and rejected differ before the last turn",
        ),
        (
            "preferences",
            {"chosen": [user("q"), bot("a")], "rejected": [user("r"), bot("b")]},
            "chosen and rejected differ before the last turn",
        ),
        (
            "preferences",
            {"prompt": "z", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
            "chosen and rejected do not hold the prompt",
        ),
        (
            "preferences",
            {"prompt": [user("z")], "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
            "the conversation does not begin with the prompt",
        ),
        ("preferences", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ("preferences", {"prompt": "q", "responses": ["a"]}, "a single response"),
        ("preferences", {"prompt": "q", "responses": []}, "no response"),
        ("preferences", {"prompt": "q", "responses": ["a", "a"]}, "fewer than two distinct responses"),
        ("preferences", {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}, "all scores are equal"),
        ("preferences", {"prompt": "q", "responses": ["a", "b"], "scores": [1, float("nan")]}, "a score is NaN"),
        ("demonstrations", {"prompt": " \n", "completion": "a"}, "empty prompt"),
        ("demonstrations", {"messages": [bot("a")]}, "an assistant turn without a question before it"),
        ("demonstrations", {"messages": []}, "no assistant turn"),
        ("demonstrations", {"messages": [user("q")]}, "no assistant turn"),
        ("demonstrations", {"messages": [SYSTEM, bot("a")]}, "an assistant turn without a question before it"),
        (
            "demonstrations",
            {"prompt": [user("q")], "completion": [user("q"), SYSTEM, bot("a")]},
            "the response does not begin with an assistant turn",
        ),
        (
            "preferences",
            {"chosen": HH.format("a") + "\n\nHuman: more", "rejected": HH.format("a") + "\n\nHuman: more"},
            "the response does not end with an assistant turn",
        ),
        (
            "preferences",
            {"chosen": [user("q"), bot("a")], "rejected": [user("q")]},
            "the response does not end with an assistant turn",
        ),
        ("demonstrations", {"prompt": [user("q")], "completion": [user("q")]}, "no assistant turn"),
        ("prompts", {"prompt": ""}, "empty prompt"),
    ],
)
def test_what_is_dropped(need, row, reason):
    assert dropped(row, need) == reason


@pytest.mark.parametrize("blank", ["", " \n\t"])
@pytest.mark.parametrize(
    ("need", "make", "name"),
    [
        ("preferences", lambda blank: {"prompt": "q", "chosen": "a", "rejected": blank}, "'rejected'"),
        ("preferences", lambda blank: {"chosen": HH.format(blank), "rejected": HH.format("a")}, "'chosen'"),
        ("preferences", lambda blank: {"chosen": HH.format("a"), "rejected": blank}, "'rejected'"),
        ("demonstrations", lambda blank: {"prompt": "q", "completion": blank}, "'completion'"),
        ("demonstrations", lambda blank: {"instruction": "q", "output": blank}, "'output'"),
        (
            "demonstrations",
            lambda blank: {"messages": [user("q"), bot(blank), user("r"), bot("b")]},
            "an assistant turn of 'messages'",
        ),
        ("preferences", lambda blank: {"prompt": "q", "responses": ["a", "b", blank]}, "response 3 of 'responses'"),
        ("preferences", lambda blank: {"prompt": [user("q")], "chosen": [bot("a")], "rejected": []}, "'rejected'"),
        ("preferences", lambda blank: {"chosen": [user("q"), bot("a")], "rejected": []}, "'rejected'"),
    ],
)
def test_empty_responses_are_broken_or_dropped(need, make, name, blank):
    row = make(blank)
    assert broken(row, need) == f"{name} is empty; remove the row or set data.drop_empty=true"
    with pytest.raises(Dropped, match="^empty response$"):
        group(row, need, drop_empty=True)


@pytest.mark.parametrize(
    ("need", "row", "said"),
    [
        ("demonstrations", {"messages": "hi"}, "'messages' is a string; it must be a list of {role, content}"),
        (
            "demonstrations",
            {"messages": ["hi"]},
            "turn 1 of 'messages' is a string; it must be an object {role, content}",
        ),
        (
            "demonstrations",
            {"messages": [user("q"), {"role": "assistant", "text": "a"}]},
            "turn 2 of 'messages' has no content (only role, text); each turn is {role, content}, both strings",
        ),
        (
            "demonstrations",
            {"messages": [user("q"), {"role": "assistant", "content": [{"type": "text"}]}]},
            "turn 2 of 'messages' has a part of type 'text' without a text; correct or remove the row",
        ),
        (
            "demonstrations",
            {"messages": [user("q"), {"role": "narrator", "content": "a"}]},
            "turn 2 of 'messages' has the unknown role 'narrator'; known are system, user, assistant, tool",
        ),
        (
            "demonstrations",
            {"conversations": [{"from": "cat", "value": "miaow"}]},
            "turn 1 of 'conversations' has the unknown from 'cat'; known are human, gpt, system, observation,"
            " function_call",
        ),
        (
            "preferences",
            {"prompt": "q", "chosen": "a", "rejected": [bot("b")]},
            "'chosen' is a string, 'rejected' a list of messages; write both in one way",
        ),
        (
            "preferences",
            {"prompt": "q", "responses": ["a", [bot("b")]]},
            "'responses' mixes strings and lists of messages; write all of them in one way",
        ),
        ("preferences", {"prompt": "q", "responses": "a"}, "'responses' is a string; it must be a list"),
        (
            "preferences",
            {"prompt": "q", "chosen": 3, "rejected": "b"},
            "'chosen' is a number; it must be a string or a list of {role, content}",
        ),
        (
            "preferences",
            {"prompt": "q", "responses": ["a", "b"], "scores": [1]},
            "2 responses, but 1 scores; give one per response",
        ),
        (
            "preferences",
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, "two"]},
            "score 2 of 'scores' is 'two'; it must be a number",
        ),
        (
            "preferences",
            {"prompt": "q", "responses": ["a", "b"], "scores": [True, None]},
            "score 1 of 'scores' is a boolean; it must be a number",
        ),
        (
            "preferences",
            {"prompt": "q", "responses": ["a", "b"], "scores": 1.0},
            "'scores' is a number; it must be a list of numbers",
        ),
        (
            "demonstrations",
            {"instruction": "q", "output": "a", "history": [["only"]]},
            "'history' must be a list of [question, answer] pairs of strings; correct or remove it",
        ),
    ],
)
def test_what_is_broken(need, row, said):
    assert broken(row, need) == said


def test_a_label_or_a_column_may_be_missing_from_a_single_row():
    row = {"prompt": "q", "completion": "a", "label": "maybe"}
    with pytest.raises(Broken, match="^'label' is 'maybe'; it may be true or false, 1 or 0, yes or no"):
        to_group(row, "x:1", "kto", "labels")
    with pytest.raises(
        Broken, match=r"^'rejected' is missing or null \(has prompt, chosen\); add it or remove the row$"
    ):
        to_group({"prompt": "q", "chosen": "a"}, "x:1", "preference", "preferences")
    with pytest.raises(Broken, match="^'rejected' is missing or null"):
        to_group({"prompt": "q", "chosen": "a", "rejected": None}, "x:1", "preference", "preferences")
    with pytest.raises(Broken, match="^'rejected' is not a dialogue of"):
        to_group({"chosen": HH.format("a"), "rejected": "b"}, "x:1", "hh", "preferences")


def test_a_column_keeps_its_kind_over_the_rows():
    columns, seen = text_columns("preference", "preferences"), {}
    note_kinds({"prompt": "q", "chosen": "a", "rejected": "b"}, "x:1", columns, seen)
    note_kinds({"prompt": "q", "chosen": "a", "rejected": "b", "messages": []}, "x:2", columns, seen)
    with pytest.raises(Broken, match="^'prompt' holds a list of messages here, but a string at x:1; write all rows"):
        note_kinds({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, "x:3", columns, seen)
    seen = {}
    note_kinds({"prompt": "q", "responses": ["a"]}, "x:1", text_columns("ranking", "preferences"), seen)
    with pytest.raises(Broken, match="^'responses' holds a list of messages here, but a string at x:1"):
        note_kinds({"prompt": "q", "responses": [[bot("a")]]}, "x:2", text_columns("ranking", "preferences"), seen)
    # responses are nobody's concern where only prompts are taken
    note_kinds({"prompt": "q", "chosen": "a", "rejected": [bot("b")]}, "x:1", text_columns("preference", "prompts"), {})


@pytest.mark.parametrize(
    ("need", "row", "named", "parts"),
    [
        (
            "preferences",
            {"messages": []},
            None,
            ["has messages, but preferences need chosen and rejected, or responses;"],
        ),
        ("demonstrations", {"prompt": "q"}, None, ["has prompt, but demonstrations need messages,"]),
        (
            "labels",
            {"prompt": "q", "completion": "a"},
            None,
            ["but labels need prompt, completion and label, or the columns of preferences;"],
        ),
        (
            "demonstrations",
            {"prompts": "q", "completion": "a"},
            None,
            ["no format has the columns prompts, completion;", "nearest, prompt-completion, lacks prompt. Did you mean"]
            + ["Did you mean 'prompts'", "`columns: {prompt: their_name}`"],
        ),
        (
            "preferences",
            {"chosen": "a", "rejected": "b"},
            None,
            ["has no prompt beside chosen and rejected, which are not conversations; add a column 'prompt'"],
        ),
        ("demonstrations", {}, None, ["no format has the columns (none);"]),
        (
            "preferences",
            {"question": "q", "good": "a"},
            None,
            ["no format has the columns question, good; preferences need chosen and rejected, or responses;"]
            + ["rename with `columns: {chosen: their_name}`"],
        ),
        ("preferences", {"id": 1, "prompt": "q", "good": "a"}, None, ["has id, prompt, good, but preferences need"]),
        (
            "preferences",
            {"chosen": "a", "worse": "b"},
            "hh",
            ["format=hh wants chosen, rejected, but rejected is missing (has chosen, worse)", "{rejected: their_name}"],
        ),
        ("preferences", {"messages": []}, "messages", ["format=messages gives no preferences; they need chosen"]),
        ("preferences", {"prompt": "q", "chosen": "", "rejected": ""}, "scored", ["score_chosen is missing"]),
        ("prompts", {"text": "q"}, "messages", ["format=messages wants messages, but messages is missing (has text)"]),
    ],
)
def test_files_that_fit_no_format_or_not_the_need(need, row, named, parts):
    with pytest.raises(Broken) as raised:
        recognise([row], Source(path="x", format=named), need)
    said = str(raised.value)
    assert "\n" not in said and all(part in said for part in parts), said


def test_hh_marks_are_marks_only_at_the_beginning_of_a_paragraph():
    spoken = dialogue("\n\nHuman: a Human: b\nAssistant: c\n\nAssistant: Human: d\n\ne\n\nAssistant:f")
    assert spoken == [user("a Human: b\nAssistant: c"), bot("Human: d\n\ne"), bot("f")]
    assert is_hh("Human: x") and is_hh("\n\nAssistant:") and not is_hh("x\n\nHuman: y") and not is_hh([user("x")])
