"""Embeddings of a base model whose vocabulary a chat template extends."""

import project
import pytest
import tiny
import torch

from align_cli.generation.sampling import Sampler, respond
from align_cli.model import load, reward_head
from align_cli.recipe.sections import Model

ROWS, TOKENS = 320, 262
"""Rows after widening: the multiple of 64 for 259 tokens, two markers and one for padding."""


@pytest.fixture
def base(tmp_path):
    return tiny.without_markers(tmp_path / "base")


def widened(path, template="chatml", **how):
    named = Model(path=str(path), chat_template=template)
    tok = load.tokenizer(named)
    return load.policy(named, tok, dtype="float32", **how), tok


def test_rows_are_a_multiple_of_64_and_the_same_in_every_load(base):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model, tok = widened(base)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, _ = widened(base)
    assert len(tok) == TOKENS and model.config.vocab_size == ROWS
    old = project.weights(base)
    for name, tensor in (
        ("model.embed_tokens.weight", model.model.embed_tokens.weight),
        ("lm_head.weight", model.lm_head.weight),
    ):
        assert len(tensor) == ROWS and torch.equal(tensor[:259], old[name])
        assert tensor[259:].std() > 0 and torch.equal(tensor, again.state_dict()[name])
    head = reward_head.load(Model(path=str(base)), tok, dtype="float32", path=str(base), heads=1)
    assert torch.equal(head.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_vocabulary_that_is_large_enough_stays(base):
    model, _ = widened(tiny.model(base.parent / "tiny"), template=None)
    assert model.config.vocab_size == 259 and model.generation_config.suppress_tokens is None


def test_no_row_without_a_token_is_ever_generated(base):
    from transformers import AutoModelForCausalLM

    model, tok = widened(base)
    with torch.no_grad():
        # the rows of no token and of padding would win always
        model.lm_head.weight[TOKENS:] = 5 * model.lm_head.weight[:8].repeat(8, 1)[: ROWS - TOKENS]
        model.lm_head.weight[TOKENS:] *= 20
    prompts = [tok.encode("name colours"), tok.encode("red")]
    with torch.no_grad():
        logits = model(torch.tensor([prompts[1]])).logits[0, -1]
    assert logits.argmax() >= TOKENS, "the test's own setting"
    for greedy in (False, True):
        sampler = Sampler(24, greedy=greedy, temperature=3.0)
        made = respond(model, prompts, [1, 2], sampler=sampler, ends=[tok.eos_token_id], pad=tok.pad_token_id)
        assert made and all(token < TOKENS and token != tok.pad_token_id for row in made for token in row)
    model.save_pretrained(base.parent / "saved")
    served = AutoModelForCausalLM.from_pretrained(base.parent / "saved")
    given = torch.tensor([prompts[1]])
    for how in ({"do_sample": False}, {"do_sample": True, "temperature": 3.0}):
        made = served.generate(given, max_new_tokens=24, eos_token_id=tok.eos_token_id, **how)
        assert made[:, given.shape[1] :].max() < TOKENS


def test_a_row_that_becomes_a_token_later_may_be_generated(base):
    folder = base.parent / "first"
    model, tok = widened(base, template="zephyr")
    assert len(tok) == 260 and model.config.vocab_size == ROWS
    assert model.generation_config.suppress_tokens == list(range(259, ROWS))
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    later, tok = widened(folder)
    assert len(tok) == TOKENS and later.config.vocab_size == ROWS
    assert later.generation_config.suppress_tokens == [259, *range(TOKENS, ROWS)]


def test_an_adapters_base_has_one_row_per_token(base):
    model, tok = widened(base, template="zephyr", adapter=True)
    assert model.config.vocab_size == len(tok) == 260
