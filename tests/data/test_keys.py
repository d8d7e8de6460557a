"""Keys that change the meaning of a row are used, refused or listed, for rows of published shapes."""

import json

import pytest

from align_cli.data.format import normalised, recognise, to_group
from align_cli.data.groups import check_sources, read_groups
from align_cli.data.messages import parsed
from align_cli.data.turns import Broken, Dropped
from align_cli.recipe.sections import Data, Source

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


def group(row, need, columns=None, named=None):
    """(format, group) of a row, as reading a file of it would give."""
    source = Source(path="x.jsonl", columns=columns or {}, format=named)
    if columns:
        from align_cli.data.columns import renamed

        ((_, row),) = renamed(iter([("x.jsonl:1", row)]), source, lambda line: pytest.fail(line))
    row = normalised(row, source)
    name = recognise([row], source, need)
    return name, to_group(row, "x.jsonl:1", name, need)


def pairs(row, **how):
    """(prompt, best answer, worst answer) as text, of a row of two."""
    made = group(row, "preferences", **how)[1]
    assert len(made.responses) == 2
    return [[turn["content"] for turn in made.prompt], *(answer[-1]["content"] for answer in made.responses)]


# -- turns that are seen and not trained


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"train_on_turn": False}, {"weight": 0.0}])
def test_a_turn_may_be_marked_as_not_to_be_trained(flag):
    row = {"messages": [user("a"), bot("no", **flag), user("b"), bot("yes", weight=1, train=True)]}
    made = group(row, "demonstrations")[1]
    assert made.responses == [[bot("no", train=False), user("b"), bot("yes")]]


def test_a_weight_between_is_refused_and_a_row_of_none_is_dropped():
    with pytest.raises(Broken, match="weight: 0.5; it may be 0 or false"):
        group({"messages": [user("a"), bot("b", weight=0.5)]}, "demonstrations")
    with pytest.raises(Dropped, match="no turn is to be trained"):
        group({"messages": [user("a"), bot("b", weight=0)]}, "demonstrations")


# -- tools


def test_tools_and_calls_are_kept():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    openai = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    talk = [
        user("?"),
        {"role": "assistant", "content": None, "tool_calls": [openai]},
        {"role": "tool", "content": "3 C", "tool_call_id": "c1"},
        bot("3."),
    ]
    for tools in ([tool], json.dumps([tool]), [tool["function"]]):
        made = group({"messages": talk, "tools": tools}, "demonstrations")[1]
        assert made.tools == [tool]
        assert made.responses[0][0] == bot("", tool_calls=[{**CALL, "id": "c1"}])
        assert made.responses[0][1] == {"role": "tool", "content": "3 C", "tool_call_id": "c1"}


def test_the_old_function_call_and_sharegpt_calls_are_calls():
    old = {"role": "assistant", "content": None, "function_call": CALL["function"] | {"arguments": '{"city": "Oslo"}'}}
    made = group(
        {"messages": [user("?"), old, {"role": "function", "name": "weather", "content": "3"}, bot("3.")]},
        "demonstrations",
    )
    assert made[1].responses[0][:2] == [
        bot("", tool_calls=[CALL]),
        {"role": "tool", "content": "3", "name": "weather"},
    ]
    spoken = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3."},
    ]
    made = group({"conversations": spoken, "tools": '[{"name": "weather"}]'}, "demonstrations")[1]
    assert made.responses[0][0] == bot("", tool_calls=[CALL]) and made.tools[0]["function"] == {"name": "weather"}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"function": {"name": "f", "arguments": "{no"}}, "not valid JSON"),
        ({"function": {"name": "f", "arguments": [1]}}, "arguments that are"),
        ({"function": {}}, "a tool call without a name"),
    ],
)
def test_a_broken_call_is_refused(call, said):
    with pytest.raises(Broken, match=said):
        group({"messages": [user("?"), bot("", tool_calls=[call])]}, "demonstrations")


# -- thoughts, parts, pictures


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_in_a_field_of_its_own_has_one_name(name):
    made = group({"messages": [user("2+2?"), bot("4", **{name: "Two and two."})]}, "demonstrations")[1]
    assert made.responses == [[bot("4", reasoning_content="Two and two.")]]


def test_parts_of_text_are_joined_and_pictures_refused_by_name():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert group({"messages": [{"role": "user", "content": parts}, bot("c")]}, "demonstrations")[1].prompt == [
        user("ab")
    ]
    picture = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(Broken, match="a part of type 'image_url'"):
        group({"messages": [{"role": "user", "content": picture}, bot("c")]}, "demonstrations")
    with pytest.raises(Broken, match="'images' is not used"):
        group({"messages": [user("<image>?"), bot("c")], "images": ["cat.jpg"]}, "demonstrations")
    assert group({"messages": [user("?"), bot("c")], "images": []}, "demonstrations")[0] == "messages"


# -- system columns


SYSTEM = "You answer like a pirate."
BEHIND_SYSTEM = [
    ("demonstrations", {"prompt": "q", "completion": "a"}),
    ("demonstrations", {"messages": [user("q"), bot("a")]}),
    ("demonstrations", {"instruction": "q", "output": "a"}),
    ("demonstrations", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    ("preferences", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("preferences", {"prompt": "q", "responses": ["a", "b"]}),
    ("preferences", {"prompt": "q", "responses": ["a", "b"], "scores": [2, 1]}),
    ("preferences", {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}),
    ("preferences", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}),
    ("labels", {"prompt": "q", "completion": "a", "label": True}),
    ("prompts", {"prompt": "q"}),
    ("prompts", {"instruction": "q"}),
]


@pytest.mark.parametrize(("need", "row"), BEHIND_SYSTEM)
def test_a_system_column_is_a_system_turn_in_every_format(need, row):
    for column in ("system", "system_prompt"):
        made = group(row | {column: SYSTEM}, need)[1]
        assert made.prompt == [{"role": "system", "content": SYSTEM}, user("q")]
    assert group(row | {"system": " "}, need)[1].prompt == [user("q")]


def test_two_system_turns_are_refused_unless_they_say_the_same():
    row = {"messages": [{"role": "system", "content": "A"}, user("q"), bot("a")]}
    assert len(group(row | {"system": "A"}, "demonstrations")[1].prompt) == 2
    with pytest.raises(Broken, match="remove one of the two"):
        group(row | {"system": "B"}, "demonstrations")


# -- prompts under other names


def test_an_instruction_with_its_input_is_a_prompt_everywhere():
    asked = {"instruction": "Translate.", "input": "good morning"}
    for row in (asked | {"chosen": "bonjour", "rejected": "hola"}, asked | {"responses": ["bonjour", "hola"]}):
        assert pairs(row) == [["Translate.\n\ngood morning"], "bonjour", "hola"]
    made = group(asked | {"completion": "bonjour", "label": 1.0}, "labels")[1]
    assert made.prompt[0]["content"] == "Translate.\n\ngood morning" and made.label is True
    row = asked | {"chosen": "bonjour", "rejected": "hola"}
    assert pairs(row, columns={"prompt": "instruction"})[0] == ["Translate.\n\ngood morning"]


def test_messages_up_to_the_question_beside_two_answers():
    talk = {"messages": [{"role": "system", "content": "Kind."}, user("Hi")]}
    for chosen, rejected in (("Hello!", "What?"), (bot("Hello!"), bot("What?")), ([bot("Hello!")], [bot("What?")])):
        assert pairs(talk | {"chosen": chosen, "rejected": rejected}) == [["Kind.", "Hi"], "Hello!", "What?"]


@pytest.mark.parametrize(
    ("need", "row"),
    [
        ("preferences", {"responses": ["Blue.", "Loud."]}),
        ("preferences", {"responses": ["Blue.", "Loud."], "scores": [1, 0]}),
        ("preferences", {"chosen": "Blue.", "rejected": "Loud."}),
        ("labels", {"completion": "Blue.", "label": "yes"}),
        ("demonstrations", {"completion": "Blue."}),
        ("prompts", {}),
    ],
)
def test_an_hh_prompt_is_read_alike_in_every_format(need, row):
    hh = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a colour.\n\nAssistant:"
    assert group({"prompt": hh, **row}, need)[1].prompt == [user("Hi"), bot("Hello"), user("Name a colour.")]


# -- labels and numbers


@pytest.mark.parametrize(
    ("said", "good"),
    [
        *[(word, True) for word in (1, 1.0, "1.0", "True", "yes", "good", "👍", "thumbs_up", "positive", " chosen ")],
        *[(word, False) for word in (0, 0.0, "0.0", -1, "-1", "FALSE", "no", "bad", "👎", "rejected", "undesirable")],
    ],
)
def test_a_label_is_said_in_many_ways(said, good):
    assert group({"prompt": "q", "completion": "a", "label": said}, "labels")[1].label is good


def test_numbers_may_stand_as_text():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "probability": "0.2"}
    made = group(row, "preferences")[1]
    assert made.probability == pytest.approx(0.8) and made.responses[0] == [bot("b")]
    scored = {"prompt": "q", "responses": '["a", "b"]', "scores": "[0.5, 2]"}
    assert group(scored, "preferences")[1].scores == [2.0, 0.5]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "1", "score_rejected": "2.5"}
    assert group(pair, "preferences", named="scored")[1].scores == [2.5, 1.0]
    with pytest.raises(Broken, match="'probability' is 'likely'"):
        group(row | {"probability": "likely"}, "preferences")


# -- messages as text


@pytest.mark.parametrize("write", [json.dumps, str, lambda talk: json.dumps(talk, indent=1)])
def test_messages_in_cells_are_messages_not_text(write):
    chosen, rejected = [user("Hi"), bot("Hello!")], [user("Hi"), bot("It's what?")]
    row = {"prompt": "Hi", "chosen": write(chosen), "rejected": write(rejected)}
    assert pairs(row) == [["Hi"], "Hello!", "It's what?"]
    assert group({"messages": write(chosen)}, "demonstrations")[1].responses == [[bot("Hello!")]]
    assert group({"prompt": "Hi", "responses": [write(chosen), write(rejected)]}, "preferences")[1].responses[0] == [
        bot("Hello!")
    ]


@pytest.mark.parametrize("text", ["[1, 2]", "[{no json", "[{}]", '{"a": 1}', "[" * 5000, "[x for x in y]"])
def test_text_that_is_no_list_of_messages_stays_text(text):
    assert parsed({"prompt": text, "chosen": text}) == {"prompt": text, "chosen": text}


# -- which answer is better


TWO = {"prompt": "q", "response_0": "a", "response_1": "b"}


@pytest.mark.parametrize(
    ("row", "column", "best"),
    [
        (TWO | {"better_response_id": 0}, None, "a"),  # PKU-SafeRLHF
        (TWO | {"better_response_id": 1}, "better_response_id", "b"),
        (TWO | {"choice": "1"}, "choice", "b"),
        (TWO | {"choice": "response_0"}, "choice", "a"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "model_b"}, None, "b"),  # arenas
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "A"}, None, "a"),
        ({"prompt": "q", "answer_1": "a", "answer_2": "b", "preferred": 2}, "preferred", "b"),
        ({"prompt": "q", "output_1": "a", "output_2": "b", "preferred": "output_1"}, "preferred", "a"),
        ({"prompt": "q", "responses": ["a", "b"], "choice": 1}, "choice", "b"),  # TL;DR comparisons
        ({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2}, "preference_strength", "a"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1}, "preference_strength", "b"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "by": -0.25}, "by", "a"),
    ],
)
def test_the_better_answer_is_named_by_a_column(row, column, best):
    name, made = group(row, "preferences", columns={"better": column} if column else None, named=None)
    assert name in ("winner", "ranking") and made.responses[0] == [bot(best)]
    if column == "preference_strength":
        assert made.scores == [abs(row[column]), 0.0]


def test_ties_are_dropped_and_other_words_refused():
    arena = {"prompt": "q", "response_a": "a", "response_b": "b"}
    for word in ("tie", "tie (bothbad)"):
        with pytest.raises(Dropped, match="a tie"):
            group(arena | {"winner": word}, "preferences")
    strength = {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0}
    with pytest.raises(Dropped, match="a tie"):
        group(strength, "preferences", columns={"better": "preference_strength"})
    with pytest.raises(Broken, match="'better' is 'nobody'; it may be 0 or 1, a or b"):
        group(arena | {"winner": "nobody"}, "preferences")
    with pytest.raises(Broken, match="the answers are response_0 and response_1; give 0 or 1"):
        group(TWO | {"winner": 2}, "preferences")


def test_a_column_that_may_name_the_winner_is_named_with_what_to_write():
    with pytest.raises(Broken, match=r"`columns: \{ better: preference \}`"):
        group(TWO | {"preference": 1}, "preferences")


# -- ranks


def test_the_first_rank_is_the_best():
    row = {"prompt": "q", "responses": ["c", "a", "b"], "ranks": [3, 1, 2]}
    name, made = group(row, "preferences")
    assert name == "ranked" and [answer[0]["content"] for answer in made.responses] == ["a", "b", "c"]
    nectar = {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "answers": [{"answer": "b", "rank": 2}, {"answer": "a", "rank": 1}],
    }
    columns = {"responses": "answers[].answer", "ranks": "answers[].rank"}
    made = group(nectar, "preferences", columns=columns)[1]
    assert made.prompt == [user("q")] and made.responses == [[bot("a")], [bot("b")]]


def test_scores_that_look_like_ranks_are_warned_of(here):
    rows = [{"prompt": f"{n}", "responses": ["a", "b", "c"], "scores": [2, 1, 3]} for n in range(3)]
    write(rows)
    (lines,) = [count.lines() for count in check_sources(Data(train="x.jsonl"), "preferences")[1]]
    assert any("scores are 1…K in every row" in line for line in lines)
    write([*rows, rows[0] | {"scores": [5, 1, 3]}])
    (lines,) = [count.lines() for count in check_sources(Data(train="x.jsonl"), "preferences")[1]]
    assert not any("1…K" in line for line in lines)


# -- columns that are not read


def write(rows):
    with open("x.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("need", "row", "unread"),
    [
        ("demonstrations", {"messages": [user("q"), bot("a")], "id": 7, "source": "x"}, ["id", "source"]),
        (
            "demonstrations",
            {"messages": [user("q"), bot("a", id="m1", lang="en")], "tools": None},
            ["id of turns", "lang of turns"],
        ),
        ("preferences", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}, ["margin"]),
        ("preferences", {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s", "probability": 1}, []),
        ("preferences", {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, []),
        ("preferences", TWO | {"better_response_id": 0, "safer_response_id": 1}, ["safer_response_id"]),
        ("labels", {"prompt": "q", "completion": "a", "label": True, "score": 1}, ["score"]),
        ("prompts", {"prompt": "q", "answer": "a"}, ["answer"]),
        ("demonstrations", {"instruction": "q", "input": "i", "output": "a", "text": "q i a"}, ["text"]),
    ],
)
def test_columns_that_are_not_read_are_listed(here, need, row, unread):
    write([row, row | {"prompt": "p"} if "prompt" in row else row])
    _, (count,) = check_sources(Data(train="x.jsonl"), need)
    assert count.unread == unread
    listed = [line for line in count.lines() if "not read" in line]
    assert listed == ([f"  columns that are not read: {', '.join(unread)}"] if unread else [])
    assert read_groups(Data(train="x.jsonl"), need, 0).counts[0].unread == unread
