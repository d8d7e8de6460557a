"""How many tokens a model can take, from its config.json: a table of positions ends, rotary positions do not.

Beyond a table of learned or stored positions, a model fails with an IndexError or reads another row of it. Rotary
positions (RoPE) and ALiBi go on, but beyond the length that they were trained with, text falls apart. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
"""Keys of the number of positions, the first that is there."""
TABLES = frozenset(
    {
        "biogpt",
        "codegen",
        "ctrl",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gptj",
        "mpt",
        "openai-gpt",
        "opt",
        "xglm",
    }
)
"""Types of models that hold a table of positions (tests/model/test_context.py runs them)."""


@dataclass(frozen=True)
class Context:
    """The lengths of a model, in tokens of prompt and response."""

    limit: int | None
    """Positions that it was made for, with its RoPE scaling; None if its config names none."""
    hard: bool = False
    """Whether it fails beyond them."""
    window: int | None = None
    """Tokens that an attention layer looks back at, if it has a sliding window."""
    scaling: str = ""
    """Its RoPE scaling: `yarn × 4`."""


def of(config: dict[str, Any]) -> Context:
    """The lengths that a config.json names; those of the language model if it has several parts."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    limit = next((text[key] for key in LENGTHS if isinstance(text.get(key), int) and text[key] > 0), None)
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind, factor = scaling.get("rope_type", scaling.get("type", "default")), scaling.get("factor")
    scaled = kind not in ("default", None) and isinstance(factor, (int, float))
    if limit is not None and scaled:
        first = scaling.get("original_max_position_embeddings")
        # some configs name the length after scaling, some the one before
        limit = max(limit, int((first if isinstance(first, int) else limit) * factor))
    return Context(
        limit=limit,
        hard=text.get("model_type") in TABLES,
        window=window if isinstance(window, int) else None,
        scaling=f"{kind} × {factor:g}" if scaled else "",
    )


def described(context: Context) -> str:
    """The plan's entry: `32768 positions (yarn × 4), sliding window of 4096`."""
    parts = []
    if context.limit is not None:
        parts.append(f"{context.limit} positions" + (f" ({context.scaling})" if context.scaling else ""))
    if context.window is not None:
        parts.append(f"sliding window of {context.window}")
    return ", ".join(parts)
