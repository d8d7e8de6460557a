"""Tokens and labels: the text equals the template's, and exactly the tokens of the responses are trained."""

from pathlib import Path

import pytest
import tiny

from align_cli.data import chat
from align_cli.data.groups import Group

SMOLLM = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
ASK = [{"role": "user", "content": "How do I boil an egg?"}]
ANSWER = [{"role": "assistant", "content": "Nine minutes in boiling water."}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye."},
]
# Llama-3's shape: BOS once, headers between markers, a turn ends with its own token, no newline after it
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim"
    " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
# a base model's: no token closes a turn
OPEN_ENDED = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module", params=["chatml", "llama3", "smollm2"])
def tok(request):
    if request.param == "smollm2":
        if not SMOLLM.is_dir():
            pytest.skip("`make model` puts the real tokenizer there")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(SMOLLM)
    if request.param == "llama3":
        return tiny.tokenizer(LLAMA3, bos_token="<|endoftext|>")
    return tiny.tokenizer()


def applied(tok, messages, **kwargs):
    return tok.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)


def trained_text(tok, turns):
    return tok.decode([token for token, on in zip(turns.ids, turns.trained, strict=True) if on])


def test_ids_are_the_templates_up_to_the_end_of_the_turn(tok):
    turns = chat.conversation(tok, ASK, ANSWER)
    whole = applied(tok, ASK + ANSWER)
    assert turns.ids == whole[: len(turns.ids)]
    assert not tok.decode(whole[len(turns.ids) :]).strip()


def test_the_response_and_its_end_token_are_trained_and_the_prompt_is_not(tok):
    turns = chat.conversation(tok, ASK, ANSWER)
    prompt = applied(tok, ASK, add_generation_prompt=True)
    assert turns.labels[: len(prompt)] == [chat.IGNORED] * len(prompt)
    assert turns.labels[len(prompt) :] == turns.ids[len(prompt) :]
    assert turns.ids[-1] == tok.eos_token_id and turns.trained[-1]


def test_every_assistant_turn_of_a_conversation_is_trained(tok):
    turns = chat.conversation(tok, TALK[:2], TALK[2:])
    end = tok.eos_token
    assert trained_text(tok, turns) == f"Hello!{end}Goodbye.{end}"


def test_only_the_last_turn_when_asked(tok):
    turns = chat.conversation(tok, TALK[:2], TALK[2:], last_turn_only=True)
    assert trained_text(tok, turns) == f"Goodbye.{tok.eos_token}"


def test_labels_of_chosen_and_rejected_equal_apply_chat_template(tok):
    other = [{"role": "assistant", "content": "No."}]
    prompt, answers = chat.responses(tok, Group(prompt=ASK, responses=[ANSWER, other]))
    assert prompt == applied(tok, ASK, add_generation_prompt=True)
    for ids, response in zip(answers, (ANSWER, other), strict=True):
        whole = applied(tok, ASK + response)
        assert prompt + ids == whole[: len(prompt) + len(ids)]
        assert ids[-1] == tok.eos_token_id


def test_bos_stands_once():
    tok = tiny.tokenizer(LLAMA3, bos_token="<|endoftext|>")
    ids = chat.conversation(tok, ASK, ANSWER).ids
    assert ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id


def test_eos_is_added_where_the_template_ends_no_turn():
    tok = tiny.tokenizer(OPEN_ENDED)
    turns = chat.conversation(tok, ASK, ANSWER)
    assert turns.ids[-1] == tok.eos_token_id and turns.trained[-1]
    assert trained_text(tok, turns).startswith("Nine minutes")
    assert turns.ids.count(tok.eos_token_id) == 1


def test_eos_is_trained_though_it_pads():
    tok = tiny.tokenizer(pad_token="<|im_end|>")
    assert tok.pad_token_id == tok.eos_token_id
    turns = chat.conversation(tok, ASK, ANSWER)
    assert turns.labels[-1] == tok.eos_token_id


def test_generation_stops_where_turns_end(tok):
    assert tok.eos_token_id in chat.generation_ends(tok)


def test_a_template_that_closes_turns_with_another_token_stops_generation_too():
    tok = tiny.tokenizer(tiny.CHATML, eos_token="<|endoftext|>")
    both = {tok.convert_tokens_to_ids("<|im_end|>"), tok.convert_tokens_to_ids("<|endoftext|>")}
    assert set(chat.generation_ends(tok)) == both


def test_what_a_template_refuses_is_counted_not_raised():
    tok = tiny.tokenizer("{{ raise_exception('no system role') }}")
    tally = chat.Tally()
    group = Group(prompt=ASK, responses=[ANSWER], place="x.jsonl:3")
    assert list(chat.sft_rows(tok, [group], max_length=99, last_turn_only=False, tally=tally)) == []
    (reason,) = tally.dropped
    assert "no system role" in reason and tally.first[reason] == "x.jsonl:3"


def test_a_row_cut_to_nothing_trained_is_dropped_and_one_cut_short_is_counted():
    tok, tally = tiny.tokenizer(), chat.Tally()
    prompt = len(applied(tok, ASK, add_generation_prompt=True))
    groups = [Group(prompt=ASK, responses=[ANSWER], place="x.jsonl:1")]
    assert list(chat.sft_rows(tok, groups, max_length=prompt, last_turn_only=False, tally=tally)) == []
    assert tally.dropped == {f"no response token within {prompt} tokens": 1}
    (row,) = chat.sft_rows(tok, groups, max_length=prompt + 3, last_turn_only=False, tally=tally)
    assert len(row["input_ids"]) == prompt + 3 and tally.truncated == 1


def test_dpo_rows_share_the_prompt_and_keep_the_order():
    tok, tally = tiny.tokenizer(), chat.Tally()
    answers = [[{"role": "assistant", "content": text}] for text in ("best", "middle", "worst")]
    group = Group(prompt=ASK, responses=answers, place="x.jsonl:1")
    rows = list(chat.dpo_rows(tok, [group], how="all", max_length=200, max_prompt_length=None, tally=tally))
    said = [tuple(tok.decode(row[key]) for key in ("chosen_ids", "rejected_ids")) for row in rows]
    assert [tuple(text.removesuffix("<|im_end|>") for text in pair) for pair in said] == [
        ("best", "middle"),
        ("best", "worst"),
        ("middle", "worst"),
    ]


def test_a_prompt_over_its_limit_and_responses_alike_after_the_cut_are_dropped():
    tok, tally = tiny.tokenizer(), chat.Tally()
    prompt = len(applied(tok, ASK, add_generation_prompt=True))
    alike = Group(
        prompt=ASK,
        responses=[[{"role": "assistant", "content": f"the same beginning, {word}"}] for word in ("yes", "no")],
        place="x.jsonl:1",
    )
    for limit, length, reason in (
        (prompt - 1, 999, f"prompt over {prompt - 1} tokens"),
        (None, prompt + 5, f"responses alike within {prompt + 5} tokens"),
    ):
        rows = chat.dpo_rows(tok, [alike], how="best-worst", max_length=length, max_prompt_length=limit, tally=tally)
        assert list(rows) == []
        assert tally.dropped[reason] == 1


def test_a_template_that_is_not_jinja_is_said_to_be_so():
    with pytest.raises(chat.Unrenderable, match=r"is not valid Jinja \(.+, line 2\)"):
        chat.prompt_ids(tiny.tokenizer("\n{% for m in messages %}{{ m.content }"), ASK)


def test_a_token_that_reaches_into_the_response_is_cut_where_the_response_begins():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE({"<e>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, [("a", "b")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>")
    tok.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    # `ca` asks, `bc` answers: as one text they are c, ab, c, but a model is asked from c, a
    turns = chat.conversation(tok, [{"role": "user", "content": "ca"}], [{"role": "assistant", "content": "bc"}])
    assert turns.ids == [3, 1, 2, 3, 0] and turns.trained == [False, False, True, True, True]
    assert chat.prompt_ids(tok, [{"role": "user", "content": "ca"}]) == [3, 1]
