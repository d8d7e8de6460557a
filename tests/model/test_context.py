"""The length that a model can take is part of the plan."""

import json

import project
import pytest
import torch
from project import align, ok

from align_cli.model import context

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "d_model": 32, "num_hidden_layers": 2, "n_layer": 2,
    "n_layers": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64, "n_inner": 64, "ffn_dim": 64, "max_position_embeddings": 16, "n_positions": 16,
    "max_seq_len": 16, "n_ctx": 16, "word_embed_proj_dim": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64, "head_dim": 8, "rotary_dim": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "opt",
        "gptj",
        "codegen",
        "gpt_bigcode",
        "biogpt",
        "llama",
        "qwen2",
        "mistral",
        "gpt_neox",
        "bloom",
        "phi",
    ],
)
def test_models_fail_beyond_their_positions_or_go_on(name):
    """The oracle: the model of transformers itself, with 16 positions, reads 40 tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(name)
    config = AutoConfig.for_model(name, **{key: value for key, value in SMALL.items() if hasattr(known, key)})
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 60, (1, 40))
    try:
        with torch.no_grad():
            model(ids)
        fails = False
    except (IndexError, RuntimeError, ValueError):
        fails = True
    found = context.of(json.loads(config.to_json_string(use_diff=False)))
    assert found.hard == fails
    assert found.limit == (None if name == "bloom" else 16)


@pytest.mark.parametrize(
    "config, limit, window, scaling",
    [
        ({"max_position_embeddings": 2048}, 2048, None, ""),
        # Qwen2.5 with YaRN, as its model card writes it
        (
            {
                "max_position_embeddings": 32768, "sliding_window": 131072, "use_sliding_window": False,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
            },
            131072, None, "yarn × 4",
        ),
        # Llama 3.1
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            },
            131072, None, "llama3 × 8",
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2}}, 8192, None, "linear × 2"),
        ({"max_position_embeddings": 32768, "sliding_window": 4096}, 32768, 4096, ""),
        ({"text_config": {"max_position_embeddings": 512}}, 512, None, ""),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "n_positions": 100}, 100, None, ""),
        ({}, None, None, ""),
    ],
)  # fmt: skip
def test_lengths_of_published_configs(config, limit, window, scaling):
    found = context.of(config)
    assert (found.limit, found.window, found.scaling) == (limit, window, scaling)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A GPT-2 with 128 positions."""
    import tiny
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = project.build(tmp_path_factory.mktemp("context"))
    tok = tiny.tokenizer()
    config = GPT2Config(
        vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4, n_positions=128,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "models/short")
    tok.save_pretrained(folder / "models/short")
    project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(8)])
    for stage in ("rm", "kto", "orpo"):
        project.recipe(folder, stage, text=(folder / "recipes/dpo/t.yaml").read_text())
    return folder


@pytest.mark.parametrize("stage", ["sft", "dpo", "rm", "kto", "orpo"])
def test_a_length_beyond_the_positions_is_refused_if_it_was_asked_for(home, stage):
    done = align("check", stage, "recipe=t", "model.path=models/short", "data.max_length=512", cwd=home)
    assert done.returncode == 2, done.stdout
    assert "data.max_length: is 512, but models/short has 128 positions" in done.stderr
    assert "data.max_length=128" in done.stderr and "Traceback" not in done.stderr


def test_the_default_is_lowered_and_said(home):
    recipe = (home / "recipes/sft/t.yaml").read_text().replace(" max_length: 128,", "")
    project.recipe(home, "sft", name="plain", text=recipe.replace("name: t", "name: plain"))
    assert "data.max_length: 128 instead of 1024" in ok(
        "check", "sft", "recipe=plain", "model.path=models/short", cwd=home
    )
    long = {"messages": [{"role": "user", "content": "name colours"}, {"role": "assistant", "content": "red " * 200}]}
    project.write_rows(home / "long.jsonl", [long] * 8)
    words = ("model.path=models/short", "data.train=long.jsonl", "trainer.max_steps=1")
    said = ok("sft", "recipe=plain", *words, cwd=home)
    assert "8 rows truncated to data.max_length" in said
    assert "nothing to do" in ok("sft", "recipe=plain", *words, cwd=home)


def test_rotary_positions_are_only_warned_about(home):
    said = ok("check", "sft", "recipe=t", "data.max_length=4096", cwd=home)
    assert "is 4096, but models/tiny has 1024 positions: it was not trained on longer text" in " ".join(said.split())


def test_answers_to_samples_fit_too(home):
    words = ("model.path=models/short", "samples.prompts=[name colours]")
    done = align("check", "sft", "recipe=t", *words, "samples.max_new_tokens=120", cwd=home)
    (line,) = done.stderr.splitlines()
    room = int(line.rpartition("samples.max_new_tokens=")[2].split()[0])
    # one token more than fits is refused, what fits is answered
    assert align("check", "sft", "recipe=t", *words, f"samples.max_new_tokens={room + 1}", cwd=home).returncode == 2
    ok(
        "sft",
        "recipe=t",
        *words,
        f"samples.max_new_tokens={room}",
        "trainer.max_steps=1",
        "run_dir=runs/fits",
        cwd=home,
    )


def test_a_reward_model_with_fewer_positions_is_named(home):
    from transformers import AutoModelForSequenceClassification

    if not (home / "models/judge").exists():
        model = AutoModelForSequenceClassification.from_pretrained(home / "models/short", num_labels=1)
        model.save_pretrained(home / "models/judge")
        import tiny

        tiny.tokenizer().save_pretrained(home / "models/judge")
    text = (
        "name: t\nmodel: { path: models/tiny }\nreward: { path: models/judge }\n"
        "data: { train: prompts.jsonl, max_length: 512, batch_size: 4 }\ngeneration: { max_new_tokens: 8 }\n"
        "method: { k: 2 }\ntrainer: { max_steps: 1, per_device_train_batch_size: 4 }\n"
    )
    project.recipe(home, "rloo", text=text)
    done = align("check", "rloo", "recipe=t", cwd=home)
    assert done.returncode == 2 and "models/judge has 128 positions" in done.stderr and "(reward.path)" in done.stderr
