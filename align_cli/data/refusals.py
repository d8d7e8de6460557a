"""Finds rows that a chat template refuses or leaves parts out of, before a model is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align_cli.data import spans, template
from align_cli.data.format import Group
from align_cli.data.template import ChatTokenizer, Unrenderable
from align_cli.recipe.stages import RowKind

RENDERED = 1000
"""Number of first rows of a source that `align check` renders."""


def checker(tokenizer: ChatTokenizer, need: RowKind) -> Callable[[Group], str | None]:
    """A function that returns the reason why a group would be dropped, or None. Of `tokenizer`, only the chat template
    and the special tokens are needed."""
    rendering = template.of(tokenizer)

    def refused(group: Group, kept: Any = tokenizer) -> str | None:  # keeps it alive: a Template holds a weak reference
        try:
            if need == "prompts":
                rendering.render(group.prompt, prompt=True, tools=group.tools).encode()
            for response in group.responses:
                messages = [*group.prompt, *response]
                turns = [at for at in range(len(group.prompt), len(messages)) if messages[at]["role"] == "assistant"]
                turns = [at for at in turns if messages[at].get("train", True)] or turns
                trained = spans.find(
                    rendering,
                    messages,
                    turns if need == "demonstrations" else turns[-1:],
                    group.tools,
                )
                trained.text.encode()
        except Unrenderable as error:
            return str(error)
        except UnicodeEncodeError:
            return template.HALF
        return None

    return refused
