"""Renders conversations with a tokenizer's chat template, and caches properties of the template.

transformers does the rendering; this file prepares its input. Messages may hold keys of ours (`train`), templates of
multimodal models take content as a list of parts, and some take the arguments of a tool call as text.
"""

from __future__ import annotations

import json
import re
import weakref
from functools import cached_property
from typing import Any, Protocol

from align_cli.compat import chat_date
from align_cli.errors import DataError

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

OURS = ("train", "tools")
"""Message keys that are not passed to templates. `tools` is in the first message of a prompt that goes through a
dataset (`packed`)."""
THOUGHT = "reasoning_content"
"""The key of a thought (reasoning); templates may read it under other names, too."""
OPEN, CLOSE = "<think>", "</think>"
HALF = "it holds half of a surrogate pair (a cut emoji), which cannot be tokenized; correct or remove the row"


class ChatTokenizer(Protocol):
    """What rendering needs of a tokenizer; `model.saved_tokenizer` has it without transformers."""

    chat_template: str | dict[str, str] | None
    eos_token: str | None
    special_tokens_map: dict[str, Any]
    added_tokens_decoder: dict[int, Any]

    def apply_chat_template(self, conversation: list[Message], **kwargs: Any) -> str:
        """The conversation as text."""


class Unrenderable(DataError):
    """The template refuses a conversation, or renders it so that its turns cannot be distinguished."""


class Template:
    """The chat template of one tokenizer. Get it from `of`, which caches it."""

    def __init__(self, tokenizer: ChatTokenizer):
        # the tokenizer keeps this object alive, not the other way round
        self._tokenizer = weakref.ref(tokenizer)
        self.source = tokenizer.chat_template
        self.cache: dict[Any, Any] = {}
        self.arguments_as_text = False
        self.parts = False
        # templates take content as a string or as a list of parts: a test rendering shows which
        if not self._shows("Zq"):
            self.parts = True
            self.parts = self._shows("Zq")

    def _shows(self, word: str) -> bool:
        try:
            return word in self.render([{"role": "user", "content": word}], prompt=True)
        except Unrenderable:
            # the template requires other turns, so the test is inconclusive; most templates take strings
            return not self.parts

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self._tokenizer()

    def render(self, messages: list[Message], *, prompt: bool = False, tools: Tools = None) -> str:
        """The rendered conversation; with `prompt`, it ends with the generation prompt.

        Raises Unrenderable with the template's own error message.
        """
        messages, tools = opened(messages, tools)
        shown = [self._shown(message) for message in messages]
        try:
            return self._apply(shown, prompt, tools)
        except Exception as error:  # jinja's TemplateError, and any error that a template raises itself
            called = any("tool_calls" in message for message in shown)
            if not self.arguments_as_text and called and isinstance(error, TypeError):
                # DeepSeek's templates concatenate the arguments with a string
                self.arguments_as_text = True
                return self.render(messages, prompt=prompt, tools=tools)
            reason = [*str(error).splitlines(), type(error).__name__][0]
            if type(error).__name__ == "TemplateSyntaxError":
                raise Unrenderable(f"the chat template is not valid Jinja ({reason}, line {error.lineno})") from None
            raise Unrenderable(f"the chat template refuses it ({reason})") from None

    def _apply(self, shown: list[Message], prompt: bool, tools: Tools) -> str:
        return self.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=prompt, tools=tools)

    def _shown(self, message: Message) -> Message:
        """The message in the form that the template expects."""
        shown = {key: value for key, value in message.items() if key not in OURS and value is not None}
        if CLOSE in (shown.get("content") or "") and shown["role"] == "assistant" and not shown.get(THOUGHT):
            self._move_thought(shown)
        if shown.get(THOUGHT):
            self._show_thought(shown)
        if self.parts and isinstance(shown.get("content"), str):
            shown["content"] = [{"type": "text", "text": shown["content"]}]
        if self.arguments_as_text and "tool_calls" in shown:
            shown["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _text(call["function"]["arguments"])}}
                for call in shown["tool_calls"]
            ]
        return shown

    def _show_thought(self, shown: Message) -> None:
        """Move a thought to where the template reads it. Raises Unrenderable if it reads no thoughts."""
        if self.reads_thoughts:
            # transformers fills in the other two names
            shown.setdefault("reasoning", shown[THOUGHT])
        elif self._mentions(re.escape(CLOSE)):
            # the template searches answers for thoughts, in some cases to remove them
            thought = shown.pop(THOUGHT).strip("\n")
            if self.keeps_inline:
                shown["content"] = f"{OPEN}\n{thought}\n{CLOSE}\n\n{shown['content']}"
        else:
            raise Unrenderable(
                f"the chat template does not write `{THOUGHT}`; name one that does in model.chat_template, or set "
                "data.reasoning=drop"
            )

    def _move_thought(self, shown: Message) -> None:
        """Move a thought inside an answer to the key that the template reads, unless it reads it from the answer."""
        if not self.wants_key:
            return
        thought, _, answer = shown["content"].rpartition(CLOSE)
        shown[THOUGHT] = thought.replace(OPEN, "").strip("\n")
        shown["content"] = answer.lstrip("\n")

    @cached_property
    def wants_key(self) -> bool:
        """Whether the template writes the last turn's thought from a key, and leaves a thought in the answer as is."""
        if not self.reads_thoughts:
            return False
        inline = self._answered({"content": f"{OPEN}Za{CLOSE}Zb"})
        return "Za" in self._answered({"content": "Zb", THOUGHT: "Za"}) and f"{OPEN}Za{CLOSE}Zb" in inline

    @cached_property
    def keeps_inline(self) -> bool:
        """Whether the template writes a thought that is inside the last answer."""
        return "Za" in self._answered({"content": f"{OPEN}Za{CLOSE}Zb"})

    def _answered(self, answer: Message) -> str:
        """The rendering of a conversation with this answer; empty if the template refuses it."""
        try:
            return self._apply([{"role": "user", "content": "q"}, {"role": "assistant", **answer}], False, None)
        except Exception:  # a template may raise errors of any type
            return ""

    @cached_property
    def reads_thoughts(self) -> bool:
        """Whether the template reads a thought from a separate key."""
        return self._mentions(r"\b(reasoning_content|thinking|reasoning)\b")

    def _mentions(self, pattern: str) -> bool:
        texts = [self.source] if isinstance(self.source, str) else list((self.source or {}).values())
        return any(re.search(pattern, text) for text in texts)

    def marked(self, messages: list[Message], tools: Tools = None) -> tuple[str, list[tuple[int, int]]] | None:
        """The rendered conversation and the character spans between its `{% generation %}` marks, if the template has
        marks or TRL has a template with marks for it. None for others, and if that template raises an error."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.with_marks is None:
            return None
        try:
            (text,), (spans,) = render_jinja_template(
                conversations=[[self._shown(message) for message in messages]],
                tools=tools,
                chat_template=self.with_marks,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception:  # errors of any type; rendering without marks reports what is wrong
            return None
        return text, [(start, stop) for start, stop in spans if stop > start]

    @cached_property
    def own_marks(self) -> bool:
        """Whether the template itself has generation marks."""
        return isinstance(self.source, str) and _has_marks(self.source)

    @cached_property
    def with_marks(self) -> str | None:
        """The template with generation marks: itself, or TRL's training template for its family."""
        if self.own_marks:
            return self.source
        if not hasattr(self.tokenizer, "is_fast"):
            # a stand-in made from the tokenizer's files, for which TRL's checks would import torch
            return None
        from trl.chat_template_utils import get_training_chat_template

        try:
            known = get_training_chat_template(self.tokenizer)
        except Exception:  # TRL does not know the family, or its own checks fail
            return None
        chat_date.fix(known)
        return known if known and _has_marks(known) else None

    @cached_property
    def literals(self) -> re.Pattern[str]:
        """The strings that the template may search a content for: its string constants that are not words."""
        import jinja2

        texts = [self.source] if isinstance(self.source, str) else list((self.source or {}).values())
        literals = {OPEN, CLOSE}
        # only lexed: a plain environment cannot parse transformers' own blocks (`generation`, loop controls)
        lexer = jinja2.Environment()
        for text in texts:
            for constant in (value for _, kind, value in lexer.lex(text) if kind == "string"):
                # unescaped as jinja does it
                constant = constant[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape").strip()
                if len(constant) > 2 and not constant.replace("_", "").isalnum():
                    literals.add(constant)
        return re.compile("|".join(re.escape(each) for each in sorted(literals, key=len, reverse=True)))

    @cached_property
    def specials(self) -> re.Pattern[str]:
        """Pattern of the special tokens as text, each of which can end a turn."""
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        if self.tokenizer.eos_token:
            tokens.add(self.tokenizer.eos_token)
        tokens.discard("")
        if not tokens:
            return re.compile(r"(?!)")
        return re.compile("|".join(re.escape(each) for each in sorted(tokens, key=len, reverse=True)))

    def shape(self, text: str) -> str:
        """A content with its words replaced by a dot, so that contents which the template treats alike are equal."""
        core = "".join(f"{x.strip() and '.'}{y}" for x, y in _between(self.literals, text))
        return f"{lead(text)!r}{core}{tail(text)!r}"


_KEPT: weakref.WeakKeyDictionary[Any, Template] = weakref.WeakKeyDictionary()


def of(tokenizer: ChatTokenizer) -> Template:
    """The Template of a tokenizer, cached until its chat template changes."""
    kept = _KEPT.get(tokenizer)
    if kept is None or kept.source != tokenizer.chat_template:
        kept = _KEPT[tokenizer] = Template(tokenizer)
    return kept


def packed(messages: list[Message], tools: Tools = None) -> list[Message]:
    """Messages with nested values as JSON, since all entries of a dataset's column must have one type."""
    nested = [
        {**message, "tool_calls": json.dumps(message["tool_calls"])} if message.get("tool_calls") else message
        for message in messages
    ]
    return [{**nested[0], "tools": json.dumps(tools)}, *nested[1:]] if tools else nested


def opened(messages: list[Message], tools: Tools = None) -> tuple[list[Message], Tools]:
    """The messages and the tools, unpacked if they are `packed`."""
    if not any(isinstance(message.get(key), str) for message in messages for key in ("tool_calls", "tools")):
        return messages, tools
    turns = [
        {**message, "tool_calls": json.loads(message["tool_calls"])}
        if isinstance(message.get("tool_calls"), str)
        else message
        for message in messages
    ]
    return turns, tools or json.loads(messages[0].get("tools") or "null")


def lead(text: str) -> str:
    """The white space a text begins with."""
    return text[: len(text) - len(text.lstrip())]


def tail(text: str) -> str:
    """The white space a text ends with."""
    return text[len(text.rstrip()) :]


def without_thoughts(messages: list[Message]) -> list[Message]:
    """The messages without the assistant's thoughts, whether in their own key or between <think> marks."""
    turns = []
    for message in messages:
        if message["role"] == "assistant":
            message = {key: value for key, value in message.items() if key != THOUGHT}
            if CLOSE in message["content"]:
                message["content"] = message["content"].split(CLOSE)[-1].lstrip()
        turns.append(message)
    return turns


def _between(pattern: re.Pattern[str], text: str) -> list[tuple[str, str]]:
    """(text, match) pairs that give the text when joined; the last match is empty."""
    parts, at = [], 0
    for match in pattern.finditer(text):
        parts.append((text[at : match.start()], match[0]))
        at = match.end()
    return [*parts, (text[at:], "")]


def _has_marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
