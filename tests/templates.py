"""Every chat template in the wheels of TRL and transformers, each with a byte-level tokenizer that has its tokens."""

import re
from importlib.resources import files
from pathlib import Path

ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "mistral": "</s>",
    "llama2": "</s>",
    "vicuna": "</s>",
    "granite": "<|end_of_text|>",
    "command-r": "<|END_OF_TURN_TOKEN|>",
    "muse_glimmer": "<|eot|>",
    "phi3": "<|endoftext|>",
}
"""Beginning of a template's name -> the EOS token of its models; <|im_end|> for the others."""
BEGINS = {
    "llama3": "<|begin_of_text|>",
    "llama2": "<s>",
    "mistral": "<s>",
    "deepseek": "<｜begin▁of▁sentence｜>",
    "gemma": "<bos>",
    "cohere": "<BOS_TOKEN>",
}
MARKER = re.compile(
    r"<\|[^|<>\s'\"{}]+\|>|<｜[^｜<>]+｜>|</?s>|\[/?[A-Z_]{3,}\]|<\|?(?:start|end)_of_\w+\|?>|<(?:\|[a-z_]+|[a-z_]+\|)>"
)


KINDS = {
    # Mistral 7B v0.3 and Nemo: the system turn is written only in front of a user turn that comes last
    "mistral": (
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{{ bos_token }}"
        "{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
    ),
    # Llama 2: the system turn inside of the first user turn, every pair opened by BOS
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set said = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set said = false %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and said != false %}"
        "{% set content = '<<SYS>>\n' + said + '\n<</SYS>>\n\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # Granite 3: a header between two markers, EOS behind every turn
    "granite": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>Help.<|end_of_text|>\n' }}"
        "{% endif %}{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] "
        "+ '<|end_of_text|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    ),
    # Command-R7B: answers between markers of their own, inside of the turn's
    "command-r": (
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}{% if m['role'] == 'assistant' %}"
        "{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m['content'] + '<|END_RESPONSE|>' }}{% else %}"
        "{{ '<|' + m['role'] | upper + '_TOKEN|>' + m['content'] }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
    ),
    # Vicuna: words for headers, EOS behind answers
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
        "{{ 'USER: ' + m.content + '\n' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token + '\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    # a base model's, in words alone: nothing closes a turn
    "words": (
        "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    ),
}
"""Templates of further families, written for these tests after what the families' own do."""


def texts() -> dict[str, str]:
    """Name -> Jinja text."""
    import transformers
    import trl

    found = dict(KINDS)
    for package in (trl, transformers):
        for file in sorted(Path(str(files(package))).rglob("*.jinja")):
            found[file.stem] = file.read_text(encoding="utf-8")
    return found


def of_prefix(table: dict[str, str], name: str, default: str) -> str:
    return next((token for start, token in table.items() if name.startswith(start)), default)


def tokenizer(name: str, text: str):
    """A byte-level tokenizer in which the template's markers are special tokens."""
    from tiny import tokenizer as plain
    from tokenizers import AddedToken

    eos, bos = of_prefix(ENDS, name, "<|im_end|>"), of_prefix(BEGINS, name, "<|endoftext|>")
    made = plain(text)
    markers = sorted({*MARKER.findall(text), eos, bos})
    made.add_special_tokens({"additional_special_tokens": [AddedToken(each, special=True) for each in markers]})
    made.eos_token, made.bos_token = eos, bos
    return made
