"""The formats that rows come in: the columns that each requires, and which stages it can serve.

To add a format, add its line here, and its case to `draft` in `data/turns.py`, which converts a row of it.
"""

from __future__ import annotations

from align_cli.recipe.stages import RowKind

COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "preference": ("prompt", "chosen", "rejected"),
    "implicit-prompt": ("chosen", "rejected"),
    "hh": ("chosen", "rejected"),
    "ranking": ("prompt", "responses"),
    "scored": ("prompt", "responses", "scores"),
    "ranked": ("prompt", "responses", "ranks"),
    "winner": ("prompt", "better"),
    "kto": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
}
"""Format -> the columns it requires."""
SERVES: dict[RowKind, tuple[str, ...]] = {
    "demonstrations": (
        *("messages", "sharegpt", "prompt-completion", "alpaca", "ranked", "scored", "ranking"),
        *("hh", "preference", "implicit-prompt", "winner"),
    ),
    "preferences": ("winner", "ranked", "scored", "ranking", "sharegpt", "hh", "preference", "implicit-prompt"),
    "labels": ("kto", "winner", "ranked", "scored", "ranking", "sharegpt", "hh", "preference", "implicit-prompt"),
    "prompts": ("hh", "alpaca", "prompt", "sharegpt", "messages", "implicit-prompt"),
}
"""Kind of rows -> the formats that serve it, in the order in which they are tried. Files often fit several: with
ultrafeedback's prompt, chosen, rejected and messages, SFT takes messages and DPO the pair."""
NEEDS: dict[RowKind, str] = {
    "demonstrations": "messages, conversations, prompt and completion, or instruction and output",
    "preferences": "chosen and rejected, or responses",
    "labels": "prompt, completion and label, or the columns of preferences",
    "prompts": "prompt, messages or instruction",
}
"""Kind of rows -> the columns it needs, for messages."""
