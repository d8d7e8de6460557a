"""What is trained under every chat template in the wheels of TRL and transformers, compared with two oracles: the masks
of TRL's training templates, and the positions of contents in the text of plain `apply_chat_template`."""

import re
from collections import Counter
from os.path import commonprefix

import pytest
import templates

from align_cli.data import chat
from align_cli.data.groups import Group

TEXTS = templates.texts()
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather now",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "a city"}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


ONE = [user("Alpha question?"), assistant("Bravo answer.")]
THREE = [
    *ONE,
    user("Charlie question?"),
    assistant("Delta answer."),
    user("Echo question?"),
    assistant("Foxtrot it is."),
]
SYSTEM = {"role": "system", "content": "Zulu rule."}
KINDS = {
    "one turn": ONE,
    "three turns": THREE,
    "system": [SYSTEM, *ONE],
    "system, three turns": [SYSTEM, *THREE],
    "thought in the answer": [user("Alpha question?"), assistant("<think>\nKilo thought.\n</think>\n\nBravo answer.")],
    "thoughts in the answers": [
        user("Alpha question?"),
        assistant("<think>\nKilo thought.\n</think>\n\nBravo answer."),
        user("Charlie question?"),
        assistant("<think>Lima thought.</think>Delta answer."),
    ],
    "thought in its own field": [
        user("Alpha question?"),
        assistant("Bravo answer.", reasoning_content="Kilo thought."),
    ],
    "tool call": [
        user("Alpha question?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "Mike result", "tool_call_id": "call12345", "name": "weather"},
        assistant("Bravo answer."),
    ],
    "empty system": [{"role": "system", "content": ""}, *ONE],
    "looks like a marker": [
        user("Zx7q0Z Alpha? <|im_end|>\n<|im_start|>assistant\nNo. [INST] Zq7x {{ messages }}"),
        assistant("Bravo Zx7q1Z Zq7x <|im_end|> </s> <|user|> Zend answer."),
        user("Charlie <|end|>?"),
        assistant("Delta Zx7q0Z."),
    ],
    "spaces round it": [user("  Alpha question?\n\n"), assistant("\n Bravo answer. \n"), user("\tCharlie? "), ONE[1]],
    "CJK": [user("你好吗？"), assistant("我很好，谢谢。"), user("こんにちは"), assistant("元気です。")],
    "emoji": [user("👩‍👩‍👧 how?"), assistant("🎉 Bravo 🇳🇴 answer 👍🏽"), user("🙂"), assistant("🙃.")],
    "only spaces": [user("Alpha question?"), assistant("Bravo answer."), user("   "), assistant("Delta answer.")],
}
WORDS = {"gptoss": {"final"}, "muse_glimmer": {"to=user"}}
"""What the model itself writes in front of an answer, by the beginning of a template's name."""
LOST = re.compile(r"does not write|leaves out|refuses it")


@pytest.fixture(scope="module", params=sorted(TEXTS))
def tok(request):
    made = templates.tokenizer(request.param, TEXTS[request.param])
    made.known_as = request.param
    return made


def split(messages):
    first = next(at for at, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:first], messages[first:]


def plain(tok, messages, tools=None, **more):
    """transformers' own rendering; None where the template refuses the conversation."""
    tools = [TOOL] if any("tool_calls" in message for message in messages) else tools
    for shown in (messages, [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]):
        try:
            text = tok.apply_chat_template(shown, tools=tools, **more, tokenize=False)
        except Exception:
            continue
        if all(message["content"].strip()[-9:] in text for message in messages):
            return text
    return None


def shown_to(tok, messages):
    """The messages as transformers renders the same thoughts from: their own key, where the template reads it alone."""
    moved = []
    for message in messages:
        if chat.template.of(tok).wants_key and "</think>" in message["content"]:
            thought, _, answer = message["content"].rpartition("</think>")
            message = assistant(answer.lstrip("\n"), reasoning_content=thought.replace("<think>", "").strip("\n"))
        moved.append(message)
    return moved


def turns_of(tok, messages, notes=None, **how):
    prompt, response = split(messages)
    tools = [TOOL] if any("tool_calls" in message for message in messages) else None
    return chat.conversation(tok, prompt, response, tools=tools, notes=notes, **how)


def runs(turns):
    """(first, last + 1) of every stretch of trained tokens."""
    found, start = [], None
    for at, on in enumerate([*turns.trained, False]):
        if on and start is None:
            start = at
        elif not on and start is not None:
            found.append((start, at))
            start = None
    return found


@pytest.mark.parametrize("last_only", [False, True], ids=["all turns", "last turn"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_the_answers_and_their_ends(tok, kind, last_only):
    messages = KINDS[kind]
    try:
        turns = turns_of(tok, messages, last_turn_only=last_only)
    except chat.Unrenderable as error:
        assert LOST.search(str(error)), error  # the template's doing; that a row cannot be proved does not happen here
        text = plain(tok, messages)
        thoughts = [m.get("reasoning_content") or m["content"].partition("</think>")[0][-14:] for m in messages]
        assert (
            text is None
            or any(t and t.strip() not in text for t in thoughts)
            or "Oslo" not in text
            or "Weather now" not in text
        )
        return
    answers = [m["content"].split("</think>")[-1].strip() for m in messages if m["role"] == "assistant"]
    others = [m["content"].strip() for m in messages if m["role"] != "assistant" and m["content"].strip()]
    said = [tok.decode(turns.ids[start:stop]) for start, stop in runs(turns)]
    if last_only:
        answers = answers[-1:]
    assert len(said) == len(answers)
    for answer, text in zip(answers, said, strict=True):
        assert answer in text
        rest = chat.template.of(tok).specials.sub("", text.replace(answer, "", 1))
        # of what others said nothing, of headers nothing
        assert not any(other in rest for other in others)
        assert not re.search(r"\b(user|system|tool)\b(?!\w)", rest.replace("to=user", "")) or "tool_call" in rest, rest
        if kind in ("one turn", "three turns", "system", "system, three turns", "CJK", "emoji", "only spaces"):
            words = re.sub(r"</?think>", "", rest).split()
            assert set(words) <= templates.of_prefix(WORDS, tok.known_as, set()), rest
        # it ends with the end of the turn
        assert not text[-1].isspace()
        assert tok.convert_tokens_to_ids(tok.eos_token) in turns.ids[-1:] or turns.ids[-1] in chat.end_tokens(tok)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_apply_chat_template(tok, kind):
    messages = shown_to(tok, KINDS[kind])
    text = plain(tok, messages)
    if text is None:
        return
    try:
        turns = turns_of(tok, KINDS[kind])
    except chat.Unrenderable:
        return
    whole = tok(text, add_special_tokens=False)["input_ids"]
    added = turns.ids != whole[: len(turns.ids)]
    # where the template closes the last turn with no token, one more is trained (a model of GLM's kind opens the next)
    assert turns.ids[: -1 if added else None] == whole[: len(turns.ids) - added]


@pytest.mark.parametrize("kind", KINDS)
def test_trl_trains_the_same_tokens(tok, kind):
    from trl.chat_template_utils import get_training_chat_template

    try:
        known = get_training_chat_template(tok)
    except ValueError:
        pytest.skip("TRL has no training template for it")
    known = known or tok.chat_template
    messages, parts = shown_to(tok, KINDS[kind]), chat.template.of(tok).parts
    text = plain(tok, messages)
    shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages] if parts else messages
    tools = [TOOL] if any("tool_calls" in message for message in messages) else None
    try:
        turns = turns_of(tok, KINDS[kind])
        theirs = tok.apply_chat_template(
            shown, chat_template=known, tools=tools, return_assistant_tokens_mask=True, return_dict=True
        )
    except Exception:
        return  # the other tests say why ours may refuse it
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    if text is None or tok.decode(ids)[: len(text)] != text:
        return  # TRL trains another text than the model is used with
    asked, places = asked_for(tok, messages, text), tok(text, add_special_tokens=False, return_offsets_mapping=True)
    places = places["offset_mapping"] + [(0, 0)] * len(ids)
    for at, (ours, token) in enumerate(zip(turns.trained, turns.ids, strict=True)):
        if at >= len(ids) or ids[at] != token or ours == bool(mask[at]):
            continue
        start, stop = places[at]
        blank = not ours and not text[start:stop].strip()  # white space behind an end
        header = not ours and any(left <= start and stop <= right for left, right in asked)
        # their marks leave out what ends a turn, though the model has to write it, or stop inside of a character
        same = [index for index in range(max(at - 4, 0), at) if places[index] == places[at]]
        late = ours and (any(mask[index] for index in same) or mask[at - 1] and token in chat.end_tokens(tok))
        empty = not ours and kind == "thoughts in the answers" and re.fullmatch(r"[<>/think\s]*", text[start:stop])
        assert blank or header or late or empty, (text[:start], text[start:stop], ours)


def asked_for(tok, messages, text):
    """Where the generation prompt of each assistant turn stands in the text, as far as it does."""
    found, tools = [], [TOOL] if any("tool_calls" in message for message in messages) else None
    for at, message in enumerate(messages):
        asks = message["role"] == "assistant"
        prompt = plain(tok, messages[:at], tools, add_generation_prompt=True) if asks else None
        if prompt:
            said = messages[at - 1]["content"].strip()
            found.append((prompt.rfind(said) + len(said) if said else 0, len(commonprefix([prompt, text]))))
    return found


def test_pairs_rankings_and_labels_ask_as_generation_does(tok):
    other = assistant("Golf, no.")
    for messages in (ONE, THREE, [SYSTEM, *ONE]):
        prompt, response = messages[:-1], messages[-1:]
        notes = Counter()
        try:
            ids, answers = chat.responses(tok, Group(prompt, [response, [other]]), notes)
        except chat.Unrenderable as error:
            assert "refuses" in str(error)
            continue
        asked = chat.prompt_ids(tok, prompt)
        if not notes:
            assert ids == asked
        else:
            # a prompt that no answer follows is said, and what is trained begins where the two part
            assert ids != asked or "header" in next(iter(notes))
            assert ids == asked[: len(ids)] or "header" in next(iter(notes))
        for answer, said in zip(answers, (response[0], other), strict=True):
            assert said["content"] in tok.decode(answer) and answer[-1] in chat.end_tokens(tok)


def test_prompts_are_those_of_apply_chat_template(tok):
    for kind, messages in KINDS.items():
        prompt = shown_to(tok, split(messages)[0])
        text = plain(tok, prompt, add_generation_prompt=True)
        if text is not None and kind not in ("empty system",):
            assert chat.prompt_ids(tok, prompt) == tok(text, add_special_tokens=False)["input_ids"]


def test_generation_ends_where_turns_do(tok):
    ends = chat.generation_ends(tok)
    turns = turns_of(tok, ONE)
    assert turns.ids[-1] in ends and tok.eos_token_id in ends


def test_an_answer_that_says_nothing_still_ends(tok):
    try:
        ids, (answer,) = chat.responses(tok, Group(ONE[:1], [[assistant(" ")]]))
    except chat.Unrenderable as error:
        assert "refuses" in str(error)
        return
    full, (other,) = chat.responses(tok, Group(ONE[:1], [ONE[1:]]))
    assert ids == full and len(answer) < len(other) and answer[-1] == other[-1]
