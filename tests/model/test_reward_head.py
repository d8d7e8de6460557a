"""The scalar head keeps its precision where the rest of the model is bfloat16."""

import numpy
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from align_cli.model import load, reward_head
from align_cli.model.lora import adapted, peft_config
from align_cli.recipe.sections import Lora, Model
from align_cli.rl.backbone import SharedBackbone


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A reward model of random weights, in float32."""
    folder = tmp_path_factory.mktemp("reward")
    base = tiny.model(folder / "base")
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.save_pretrained(folder / "reward")
    tiny.tokenizer().save_pretrained(folder / "reward")
    return str(folder / "reward")


def loaded(path, **how):
    return reward_head.load_run(path, load.tokenizer(Model(path=path)), **how)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_product_is_float32_even_of_bfloat16_weights(autocast):
    torch.manual_seed(0)
    head = reward_head.Head(512, 1, bias=False).to(torch.bfloat16)
    hidden = 30 * torch.randn(200, 512, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        scores = head(hidden)
    exact = hidden.double().numpy() @ head.weight.detach().double().numpy().T
    assert scores.dtype == torch.float32
    numpy.testing.assert_allclose(scores.numpy(), exact, atol=1e-4)


def test_a_head_that_only_scores_stays_as_it_was_saved(saved):
    """In bfloat16 it would lose 16 of its 24 bits."""
    model = loaded(saved, dtype="bfloat16")
    wanted = load_file(f"{saved}/model.safetensors")["score.weight"]
    assert model.score.weight.dtype == torch.float32 and torch.equal(model.score.weight, wanted)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert all("score" not in name for name, _ in model.named_parameters())


def test_a_head_that_is_trained_is_a_parameter(saved):
    model = loaded(saved, trainable=True)
    assert dict(model.named_parameters())["score.weight"].requires_grad


def test_scores_in_bfloat16_differ_by_the_trunk_alone(saved):
    """Of hidden states that are bfloat16, the frozen head makes what float32 makes of them."""
    model, ids = loaded(saved, dtype="bfloat16"), torch.tensor([[5, 9, 30, 40]])
    ends = torch.tensor([[1, 3]])
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids), ends=ends, hidden=True)
        scores = model(input_ids=ids, attention_mask=torch.ones_like(ids), ends=ends)
    wanted = hidden.double() @ load_file(f"{saved}/model.safetensors")["score.weight"].double().T
    numpy.testing.assert_allclose(scores.numpy(), wanted.numpy(), atol=1e-6)


def test_adapters_on_bfloat16_weights_are_float32(tmp_path):
    """bfloat16 would round their updates away."""
    named = Model(path=str(tiny.model(tmp_path / "base")))
    tok, config = load.tokenizer(named), peft_config(Lora(r=4))
    policy = load.policy(named, tok, dtype="bfloat16", path=named.path)
    backbone = SharedBackbone(policy, config, reward=None, value=None)
    trained = {name: p.dtype for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trained} >= {"default", "value"}
    assert set(trained.values()) == {torch.float32}


def test_under_zero3_everything_trained_has_the_dtype_of_the_frozen_weights(tmp_path, monkeypatch):
    """DeepSpeed gathers small parameters into a buffer of one dtype (deepspeedai/DeepSpeed#8072)."""
    named = Model(path=str(tiny.model(tmp_path / "base")))
    policy = load.policy(named, load.tokenizer(named), dtype="bfloat16", path=named.path)
    monkeypatch.setattr("align_cli.model.zero.sharding", lambda: True)
    backbone = SharedBackbone(policy, peft_config(Lora(r=4)), reward=None, value=None)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}


def test_a_reward_models_head_is_trained_in_float32(saved):
    named = Model(path=saved)
    model = reward_head.load(named, load.tokenizer(named), dtype="bfloat16", path=saved)
    model = adapted(model, peft_config(Lora(r=4), task="SEQ_CLS"), checkpointing=False)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trained) and set(trained.values()) == {torch.float32}
