"""A random two-layer Llama with a byte-level tokenizer, written as a model directory: enough for plumbing.

What a model learns is tested on data that can be learned, what it says on the real one.
"""

import json
from pathlib import Path

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(template: str | None = CHATML, **special: str):
    """A byte-level tokenizer: any text is tokens, no token is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([], trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>"} | special
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    made.chat_template = template
    return made


def model(path: Path, *, seed: int = 0, hidden: int = 32, template: str | None = CHATML, **special: str) -> Path:
    """Write the model directory; float32, 2 layers. Returns the path."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tok = tokenizer(template, **special)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tok.save_pretrained(path)
    return path


def without_markers(path: Path, **how) -> Path:
    """Write a base model, whose vocabulary has no chat markers and no token of its own for padding."""
    model(path, template=None, **how)
    saved = path / "tokenizer.json"
    text = json.loads(saved.read_text())
    names = {"<|im_start|>": "<|old_a|>", "<|im_end|>": "<|old_b|>"}
    for entry in text["added_tokens"]:
        entry["content"] = names.get(entry["content"], entry["content"])
    text["model"]["vocab"] = {names.get(word, word): id for word, id in text["model"]["vocab"].items()}
    saved.write_text(json.dumps(text))
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
