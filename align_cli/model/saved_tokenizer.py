"""A tokenizer's chat template and special tokens, read from its small files without torch.

`align check` renders rows with it, so that rows which the template rejects are found before anything is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_cli.model import kind, templates
from align_cli.recipe.sections import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Token:
    """An added token, as transformers' AddedToken."""

    content: str
    special: bool


@dataclass(eq=False)
class SavedTokenizer:
    """The parts of a tokenizer that a chat template needs. `apply_chat_template` returns text only."""

    chat_template: Any
    special_tokens_map: dict[str, str]
    added_tokens_decoder: dict[int, Token]
    vocabulary: frozenset[str] = field(default_factory=frozenset)

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    def apply_chat_template(
        self, messages: list[dict[str, Any]], tokenize: bool = False, add_generation_prompt: bool = False, tools=None
    ) -> str:
        """As the tokenizer's own method, for one conversation. Propagates the template's exceptions."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.chat_template
        if isinstance(template, dict):
            template = template["tool_use"] if tools and "tool_use" in template else template["default"]
        (text,), _ = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens_map,
        )
        return text

    def length(self, prompt: list[dict[str, Any]], folder: str) -> int:
        """Number of tokens of a prompt, with the tokenizer.json of the model directory."""
        from tokenizers import Tokenizer

        text = self.apply_chat_template(prompt, add_generation_prompt=True)
        return len(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


def read(model: Model, path: str) -> SavedTokenizer | None:
    """The tokenizer of a model directory with the recipe's settings; None without a template or tokenizer.json."""
    folder = Path(path)
    template = templates.source(path, model.chat_template)
    try:
        saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = {entry["id"]: Token(entry["content"], entry["special"]) for entry in saved["added_tokens"]}
        words = saved["model"].get("vocab") or []
        vocabulary = frozenset(words if isinstance(words, dict) else (word for word, _ in words))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if template is None:
        return None
    config = kind.small_json(folder / "special_tokens_map.json") | kind.small_json(folder / "tokenizer_config.json")
    named = {name: _text(config[name]) for name in NAMES if config.get(name)}
    vocabulary |= {token.content for token in added.values()}
    for token in templates.END_TOKENS.get(model.chat_template or "", []):
        if token not in vocabulary:
            added[max(added, default=-1) + 1] = Token(token, True)
    return SavedTokenizer(template, named, added, vocabulary)


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def missing(model: Model, tokenizer: SavedTokenizer) -> list[str]:
    """The markers of the named built-in template that the vocabulary lacks."""
    return [
        token for token in templates.END_TOKENS.get(model.chat_template or "", []) if token not in tokenizer.vocabulary
    ]


def closing(tokenizer: PreTrainedTokenizerBase | SavedTokenizer) -> str | None:
    """The special token that the chat template writes after an answer, or None. Takes saved and loaded tokenizers."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Zend"}]
    for opening in ([], [{"role": "system", "content": "s"}]):
        try:
            behind = tokenizer.apply_chat_template([*opening, *talk], tokenize=False).rpartition("Zend")[2]
        except Exception:  # templates may raise any exception
            continue
        if closings := sorted((behind.find(token), token) for token in special if token and token in behind):
            return closings[0][1]
    return None
