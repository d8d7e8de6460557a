"""Chat templates for base models that lack one, and checks that a recipe's template exists. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from align_cli.errors import did_you_mean
from align_cli.model import kind

BUILT_IN = {
    # every turn opens and closes with a marker; the model learns the end marker only if it is a single token
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
        "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Zephyr's: plain-text role markers, each turn closed by the tokenizer's own EOS (alignment-handbook)
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    # for models without role markers: hh-rlhf's dialogue format, responses closed by EOS; the space belongs to the
    # response, since most tokenizers merge it with the following word
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ '\n\nAssistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'user' %}"
        "{{ '\n\nHuman: ' + message['content'] }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
    ),
    # no markers at all: the contents of all turns concatenated, responses closed by EOS
    "raw": (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
END_TOKENS = {"chatml": ["<|im_start|>", "<|im_end|>"]}
"""Markers that a built-in template needs as single tokens. They are added if the vocabulary lacks them."""


def text(named: str) -> str:
    """The Jinja text of a `model.chat_template`, which is the name of a built-in or the path of a file."""
    return BUILT_IN[named] if named in BUILT_IN else Path(named).read_text(encoding="utf-8")


def source(path: str, named: str | None) -> str | dict[str, str] | None:
    """The recipe's template: the one it names, or the model directory's; None if the directory has none."""
    if named is not None:
        return text(named)
    folder = Path(path)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = kind.small_json(folder / name).get("chat_template")
        if isinstance(template, list):
            return {each["name"]: each["template"] for each in template}
        if template:
            return template
    return None


def endless(path: str) -> str:
    """Error message for a tokenizer that has no token to end an answer."""
    return (
        f"model.path: {path}: its tokenizer has no EOS token, and its chat template ends answers without a special "
        "token; set eos_token in tokenizer_config.json"
    )


def frozen(tokens: list[str]) -> str:
    """Error message for tokens that a template adds to the vocabulary, which LoRA does not train."""
    return (
        f"model.chat_template: adds {' and '.join(tokens)} to the vocabulary, and LoRA trains no row of the embedding "
        "or of the head; set model.chat_template=zephyr or plain, which close answers with EOS, or lora=null"
    )


def problems(path: str, named: str | None) -> list[str]:
    """An error line if the named template does not exist, or if neither recipe nor model directory has one."""
    if named is not None:
        if named in BUILT_IN or Path(named).is_file():
            return []
        near = did_you_mean(named, list(BUILT_IN)) or f"; known: {', '.join(BUILT_IN)}, or the path of a Jinja file"
        return [f"model.chat_template: {named}: no such template{near}"]
    contents = kind.look(path)
    if contents.kind in ("causal-lm", "adapter") and not kind.has_chat_template(path):
        return [
            f"model.path: {path}: its tokenizer has no chat template; set model.chat_template= to "
            f"{', '.join(BUILT_IN)} or a Jinja file"
        ]
    return []
