"""A tokenizer's chat template: what it writes for a conversation, and facts about it that are asked for often.

transformers renders; here stands what it is given. Messages may hold keys of ours (`train`), templates of multimodal
models take content as a list of parts, and some take the arguments of a tool call as text.
"""

from __future__ import annotations

import json
import re
import weakref
from functools import cached_property
from typing import Any

from align_cli.compat import chat_date
from align_cli.errors import DataError

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

OURS = ("train", "tools")
"""Keys of a message that no template is shown as they are: tools may stand in the first message of a prompt that goes
through a dataset (`packed`)."""
THOUGHT = "reasoning_content"
"""The key of a thought; transformers gives templates the other names that they may read."""
OPEN, CLOSE = "<think>", "</think>"
HALF = "it holds half of a surrogate pair (a cut emoji), which no tokenizer reads; correct or remove the row"


class Unrenderable(DataError):
    """A conversation that the template refuses, or renders so that its turns cannot be told apart."""


class Template:
    """The chat template of one tokenizer. Get it from `of`, which keeps it."""

    def __init__(self, tokenizer: Any):
        # the tokenizer keeps this object alive, not the other way round
        self._tokenizer = weakref.ref(tokenizer)
        self.source = tokenizer.chat_template
        self.cache: dict[Any, Any] = {}
        self.arguments_as_text = False
        self.parts = False
        # one of the two ways in which templates want content shows in the first conversation
        if not self._shows("Zq"):
            self.parts = True
            self.parts = self._shows("Zq")

    def _shows(self, word: str) -> bool:
        try:
            return word in self.render([{"role": "user", "content": word}], prompt=True)
        except Unrenderable:
            # it wants other turns: nothing can be said, and strings are what most templates take
            return not self.parts

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer()

    def render(self, messages: list[Message], *, prompt: bool = False, tools: Tools = None) -> str:
        """The conversation as the template writes it; with `prompt`, up to where the assistant is to answer.

        Raises Unrenderable with the template's own complaint.
        """
        messages, tools = opened(messages, tools)
        shown = [self._shown(message) for message in messages]
        try:
            return self._apply(shown, prompt, tools)
        except Exception as error:  # jinja's TemplateError and whatever a template raises by itself
            called = any("tool_calls" in message for message in shown)
            if not self.arguments_as_text and called and isinstance(error, TypeError):
                # DeepSeek's kind adds the arguments to a string
                self.arguments_as_text = True
                return self.render(messages, prompt=prompt, tools=tools)
            reason = [*str(error).splitlines(), type(error).__name__][0]
            if type(error).__name__ == "TemplateSyntaxError":
                raise Unrenderable(f"the chat template is not valid Jinja ({reason}, line {error.lineno})") from None
            raise Unrenderable(f"the chat template refuses it ({reason})") from None

    def _apply(self, shown: list[Message], prompt: bool, tools: Tools) -> str:
        return self.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=prompt, tools=tools)

    def _shown(self, message: Message) -> Message:
        """A message as the template is to see it."""
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
        """Put a thought where the template reads it. Raises Unrenderable where it reads none."""
        if self.reads_thoughts:
            # transformers fills in the other two names
            shown.setdefault("reasoning", shown[THOUGHT])
        elif self._mentions(re.escape(CLOSE)):
            # a template that looks for thoughts in answers; some do so to leave them out
            thought = shown.pop(THOUGHT).strip("\n")
            if self.keeps_inline:
                shown["content"] = f"{OPEN}\n{thought}\n{CLOSE}\n\n{shown['content']}"
        else:
            raise Unrenderable(
                f"the chat template does not write `{THOUGHT}`; name one that does in model.chat_template, or set "
                "data.reasoning=drop"
            )

    def _move_thought(self, shown: Message) -> None:
        """Put a thought that stands in an answer into the key that the template reads, unless it looks for it there."""
        if not self.wants_key:
            return
        thought, _, answer = shown["content"].rpartition(CLOSE)
        shown[THOUGHT] = thought.replace(OPEN, "").strip("\n")
        shown["content"] = answer.lstrip("\n")

    @cached_property
    def wants_key(self) -> bool:
        """Whether the template writes a thought of the last turn from a key, and leaves one in the answer as it is."""
        if not self.reads_thoughts:
            return False
        inline = self._answered({"content": f"{OPEN}Za{CLOSE}Zb"})
        return "Za" in self._answered({"content": "Zb", THOUGHT: "Za"}) and f"{OPEN}Za{CLOSE}Zb" in inline

    @cached_property
    def keeps_inline(self) -> bool:
        """Whether the template writes a thought that stands in the last answer."""
        return "Za" in self._answered({"content": f"{OPEN}Za{CLOSE}Zb"})

    def _answered(self, answer: Message) -> str:
        """What is written of such an answer; nothing where the template refuses it."""
        try:
            return self._apply([{"role": "user", "content": "q"}, {"role": "assistant", **answer}], False, None)
        except Exception:  # whatever a template raises by itself
            return ""

    @cached_property
    def reads_thoughts(self) -> bool:
        """Whether the template reads a thought from a key of its own."""
        return self._mentions(r"\b(reasoning_content|thinking|reasoning)\b")

    def _mentions(self, pattern: str) -> bool:
        texts = [self.source] if isinstance(self.source, str) else list((self.source or {}).values())
        return any(re.search(pattern, text) for text in texts)

    def marked(self, messages: list[Message], tools: Tools = None) -> tuple[str, list[tuple[int, int]]] | None:
        """The rendered conversation and the character spans between its `{% generation %}` marks, if the template has
        marks or TRL knows a template with marks for it; None for others. Raises Unrenderable."""
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
        except Exception:  # what a template raises by itself; the unmarked one says what is wrong
            return None
        return text, [(start, stop) for start, stop in spans if stop > start]

    @cached_property
    def own_marks(self) -> bool:
        """Whether the template itself has generation marks."""
        return isinstance(self.source, str) and _has_marks(self.source)

    @cached_property
    def with_marks(self) -> str | None:
        """The template with generation marks: itself, or the one that TRL trains its family with."""
        if self.own_marks:
            return self.source
        if not hasattr(self.tokenizer, "is_fast"):
            # a tokenizer described by its files, where TRL's questions would load torch
            return None
        from trl.chat_template_utils import get_training_chat_template

        try:
            known = get_training_chat_template(self.tokenizer)
        except Exception:  # no family that TRL knows, or one that its own questions break
            return None
        chat_date.fix(known)
        return known if known and _has_marks(known) else None

    @cached_property
    def literals(self) -> re.Pattern[str]:
        """What the template may look for in a content: its string constants that are not words."""
        import jinja2

        texts = [self.source] if isinstance(self.source, str) else list((self.source or {}).values())
        literals = {OPEN, CLOSE}
        # transformers' own blocks (`generation`, loop controls) mean nothing to a plain environment
        lexer = jinja2.Environment()
        for text in texts:
            for constant in (value for _, kind, value in lexer.lex(text) if kind == "string"):
                # as jinja reads it
                constant = constant[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape").strip()
                if len(constant) > 2 and not constant.replace("_", "").isalnum():
                    literals.add(constant)
        return re.compile("|".join(re.escape(each) for each in sorted(literals, key=len, reverse=True)))

    @cached_property
    def specials(self) -> re.Pattern[str]:
        """Special tokens as text: what can end a turn."""
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        if self.tokenizer.eos_token:
            tokens.add(self.tokenizer.eos_token)
        tokens.discard("")
        if not tokens:
            return re.compile(r"(?!)")
        return re.compile("|".join(re.escape(each) for each in sorted(tokens, key=len, reverse=True)))

    def shape(self, text: str) -> str:
        """A content with all its words made one: the same for contents that the template treats alike."""
        core = "".join(f"{x.strip() and '.'}{y}" for x, y in _between(self.literals, text))
        return f"{lead(text)!r}{core}{tail(text)!r}"


_KEPT: weakref.WeakKeyDictionary[Any, Template] = weakref.WeakKeyDictionary()


def of(tokenizer: Any) -> Template:
    """The template of a tokenizer, made once as long as the template stays the same."""
    kept = _KEPT.get(tokenizer)
    if kept is None or kept.source != tokenizer.chat_template:
        kept = _KEPT[tokenizer] = Template(tokenizer)
    return kept


def packed(messages: list[Message], tools: Tools = None) -> list[Message]:
    """Messages as a dataset's column can hold them, whose entries have one type: what is nested, as JSON."""
    nested = [
        {**message, "tool_calls": json.dumps(message["tool_calls"])} if message.get("tool_calls") else message
        for message in messages
    ]
    return [{**nested[0], "tools": json.dumps(tools)}, *nested[1:]] if tools else nested


def opened(messages: list[Message], tools: Tools = None) -> tuple[list[Message], Tools]:
    """The messages, and the tools, of what may have been `packed`."""
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
    """The messages with the assistant's thoughts taken out, from their own key and from between <think> marks."""
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
