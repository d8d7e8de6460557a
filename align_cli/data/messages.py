"""Converts the chat messages of published data sets to ours: `role`, `content`, and optional keys.

A message has `role` (system, user, assistant or tool) and `content` (text). Optional are `reasoning_content` (the
thought of an assistant turn) and `tool_calls`, `name` and `tool_call_id` of a tool turn, and `train: False` for a turn
that the model sees but is not trained on.
"""

from __future__ import annotations

import ast
import json
from typing import Any

from align_cli.data.template import THOUGHT, Message
from align_cli.data.trouble import Broken, kind

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
SPOKEN_ROLES = ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "function_call": "assistant",
}
"""Roles in ShareGPT files -> ours."""
THOUGHTS = (THOUGHT, "thinking", "reasoning")
"""Keys that may hold the thought (reasoning) of an assistant turn."""
KNOWN = {"role", "content", "from", "value", *THOUGHTS, "tool_calls", "function_call", "tool_call_id", "name"}
FLAGS = ("weight", "train", "train_on_turn", "training")
"""Keys that say whether a turn is trained (OpenAI, axolotl)."""
TEXT_PARTS = ("text", "input_text", "output_text")
PICTURES = ("images", "image", "image_url", "videos", "video", "audios", "audio", "input_audio")
"""Columns, keys and part types of images, video and audio, which no stage uses."""
LISTS = ("messages", "conversations", "prompt", "chosen", "rejected", "completion", "responses", "scores", "ranks")
"""Columns whose lists may be stored as text, as CSV files and pandas write them."""
NESTED = ("tools", "functions", "history", *LISTS)


def parsed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with lists parsed from JSON or Python text; text that is not a list of messages stays text."""
    changed = {}
    for name in NESTED:
        value = row.get(name)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            parsed_list = _list(value, any_list=name not in ("prompt", "chosen", "rejected", "completion"))
            if parsed_list is not None:
                changed[name] = parsed_list
        elif name == "responses" and isinstance(value, list) and any(isinstance(one, str) for one in value):
            read = [one if not isinstance(one, str) else (_list(one) or one) for one in value]
            if read != value:
                changed[name] = read
    return row | changed if changed else row


def _list(text: str, any_list: bool = False) -> Any:
    """The list in a text; None if it is not a list or, without `any_list`, not a list of messages."""
    stripped = text.strip()
    if not (any_list or stripped.startswith(("[{", "{")) or stripped[1:2].isspace()):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            items = read(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(items, dict) and is_message(items):
            return [items]
        if isinstance(items, list) and (any_list or (items and all(is_message(turn) for turn in items))):
            return items
        return None
    return None


def is_message(turn: Any) -> bool:
    """Whether a value has the keys of a chat message."""
    return isinstance(turn, dict) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))


def messages(value: Any, name: str, *, sharegpt: bool = False) -> list[Message]:
    """The messages of a list of {role, content}, or of {from, value} for ShareGPT. Raises Broken."""
    if is_message(value):
        value = [value]
    if not isinstance(value, list):
        raise Broken(f"{name} is {kind(value)}; it must be a list of {{role, content}}")
    return [_message(turn, f"turn {number} of {name}", sharegpt) for number, turn in enumerate(value, 1)]


def _message(turn: Any, where: str, sharegpt: bool) -> Message:
    if not isinstance(turn, dict):
        raise Broken(f"{where} is {kind(turn)}; it must be an object {{role, content}}")
    sharegpt = sharegpt or ("from" in turn and "role" not in turn)
    role_key, text_key = ("from", "value") if sharegpt and "from" in turn else ("role", "content")
    calls = _calls(turn, where)
    text = turn.get(text_key)
    if isinstance(text, list) and text_key == "content":
        text = _parts(text, where)
    elif text is None and (calls or any(turn.get(key) for key in THOUGHTS)):
        text = ""
    for key, value in ((role_key, turn.get(role_key)), (text_key, text)):
        if not isinstance(value, str):
            finding = f"a {key} that is {kind(turn[key])}" if key in turn else f"no {key} (only {', '.join(turn)})"
            raise Broken(f"{where} has {finding}; each turn is {{{role_key}, {text_key}}}, both strings")
    roles = SPOKEN_ROLES if sharegpt else ROLES | {"function": "tool"}
    if turn[role_key] not in roles:
        known = "human, gpt, system, observation, function_call" if sharegpt else "system, user, assistant, tool"
        raise Broken(f"{where} has the unknown {role_key} '{turn[role_key]}'; known are {known}")
    for key in PICTURES:
        if turn.get(key):
            raise Broken(f"{where} holds '{key}', which no stage uses; remove the row, or the key and its placeholders")
    if sharegpt and turn[role_key] == "function_call":
        calls, text = [_call(text, where)], ""
    made: Message = {"role": roles[turn[role_key]], "content": text}
    if made["role"] == "assistant":
        thought = next((turn[key] for key in THOUGHTS if isinstance(turn.get(key), str) and turn[key].strip()), None)
        made |= {THOUGHT: thought} if thought else {}
        made |= {"tool_calls": calls} if calls else {}
    elif made["role"] == "tool":
        made |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
    return made if _trained(turn, where) else made | {"train": False}


def _parts(parts: list[Any], where: str) -> str:
    """The text of a content that is a list of parts. Raises Broken for pictures."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and part.get("type") in TEXT_PARTS:
            raise Broken(f"{where} has a part of type '{part['type']}' without a text; correct or remove the row")
        else:
            what = f"of type '{part.get('type')}'" if isinstance(part, dict) else f"that is {kind(part)}"
            raise Broken(f"{where} has a part {what} in its content, but only text parts are used; remove the row")
    return "".join(texts)


def _trained(turn: dict[str, Any], where: str) -> bool:
    for key in FLAGS:
        flag = turn.get(key)
        if flag is None:
            continue
        if flag not in (0, 1):
            raise Broken(f"{where} has {key}: {flag!r:.20}; it may be 0 or false (seen, not trained), or 1 or true")
        if not flag:
            return False
    return True


def _calls(turn: dict[str, Any], where: str) -> list[dict[str, Any]]:
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if not isinstance(calls, list):
        raise Broken(f"{where} has tool_calls that are {kind(calls)}; they must be a list of objects")
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A function call with its arguments as an object. Raises Broken."""
    if isinstance(call, str):
        call = _json(call, where)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise Broken(f"{where} has a tool call without a name; write {{function: {{name, arguments}}}}")
    given = function.get("arguments", function.get("parameters")) or {}
    arguments = _json(given, where) if isinstance(given, str) else given
    if not isinstance(arguments, dict):
        raise Broken(f"{where} calls '{function['name']}' with arguments that are {kind(arguments)}, not an object")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": call["id"]} if call.get("id") else {})


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Broken(
            f"{where} has a tool call that is not valid JSON ({text[:40]!r}); correct or remove the row"
        ) from None


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The functions that the assistant may call, as JSON schemas. Raises Broken."""
    tools = row.get("tools") or row.get("functions")
    if not tools:
        return None
    if isinstance(tools, str):
        tools = _json(tools, "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Broken(f"'tools' is {kind(tools)}; it must be a list of objects, one per function")
    return [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in tools]


def unread_keys(row: dict[str, Any]) -> set[str]:
    """Keys of the row's turns that have a value but are not read."""
    unread: set[str] = set()
    for name in ("messages", "conversations", "prompt", "chosen", "rejected", "completion"):
        for turn in row[name] if isinstance(row.get(name), list) else ():
            if isinstance(turn, dict):
                unread |= {key for key in turn.keys() - KNOWN - set(FLAGS) if turn[key] not in (None, "", [], {})}
    return unread
