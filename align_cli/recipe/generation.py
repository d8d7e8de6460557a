"""Sampling settings, and generator models other than the trained one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.sections import Count, Data, Positive, section


@section
class Generation:
    """How responses are sampled. Log-probabilities use the same temperature."""

    max_new_tokens: Count = 128
    """Maximum response length in tokens."""
    temperature: Positive = 1.0
    """Divides the logits, both when sampling and when computing log-probabilities."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens whose total probability reaches top_p; 1.0 uses all tokens."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the top_k most probable tokens; 0 uses all tokens."""
    engine: Literal["auto", "hf", "batched", "vllm"] = "auto"
    """hf: `generate` with a seed per row, so that samples do not depend on the number of ranks or on resuming; batched:
    transformers' continuous batching; vllm: colocated, or a server set by trainer.vllm_mode. auto: hf."""
    batch: Count = 64
    """Prompts per generation batch on each device (hf only)."""


def room_rules(generation: Generation, data: Data) -> Iterator[tuple[str, str]]:
    """Problems of a data.max_length that cannot fit a prompt and a response."""
    room = data.max_length - generation.max_new_tokens
    if room < 1:
        yield (
            "generation.max_new_tokens",
            f"is {generation.max_new_tokens} and leaves no room for a prompt in data.max_length={data.max_length}; "
            f"raise data.max_length or set generation.max_new_tokens below {data.max_length}",
        )
    if data.max_prompt_length is not None and data.max_prompt_length > room >= 1:
        yield (
            "data.max_prompt_length",
            f"is {data.max_prompt_length}, but {generation.max_new_tokens} new tokens of data.max_length="
            f"{data.max_length} leave {room}; set data.max_prompt_length={room}",
        )


@section
class Price:
    """Token prices of an endpoint, for the cost reported in the manifest."""

    prompt: Annotated[float, Field(ge=0)] = 0.0
    """Price per million prompt tokens, in any currency."""
    completion: Annotated[float, Field(ge=0)] = 0.0
    """Price per million generated tokens, in the same currency."""


@section
class GeneratorSource:
    """A model that generates or judges text: local (`path`), or behind an OpenAI-compatible API (`endpoint`)."""

    path: str | None = None
    """A directory, a finished run or a hub id; the model is loaded only while it is used."""
    chat_template: str | None = None
    """Same as model.chat_template, for a local model whose tokenizer has no template."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible API, such as http://localhost:8000/v1."""
    model: str | None = None
    """The model's name at the endpoint."""
    key_env: str | None = None
    """Environment variable that holds the API key. The key itself is never written to disk."""
    concurrency: Count = 8
    """Maximum concurrent requests over all ranks."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Maximum retries of a request after a rate limit (429), server error, timeout or truncated HTTP response. The
    delays are 1, 2, 4, … seconds, or as long as the server asks for."""
    timeout: Positive = 120.0
    """Seconds to wait for a response."""
    price: Price | None = None
    """Token prices; null: the manifest reports no cost."""

    def problems(self, key: str) -> Iterator[tuple[str, str]]:
        if (self.path is None) == (self.endpoint is None):
            yield key, "needs exactly one of a local model and an endpoint; set path or endpoint"
        if self.endpoint is not None and not re.match(r"https?://[^\s/]+", self.endpoint):
            yield f"{key}.endpoint", "is not a URL; write it with its scheme, such as http://localhost:8000/v1"
        if self.endpoint is not None and self.model is None:
            yield f"{key}.model", "is missing; name the model that the endpoint serves"
        if self.endpoint is not None and re.search(r"//[^/]*@|[?&]\w*key=", self.endpoint):
            yield f"{key}.endpoint", "contains a secret; put the key in an environment variable and name it in key_env"
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            # the value is not shown, since users paste the key itself
            yield (
                f"{key}.key_env",
                "is not the name of an environment variable; write the variable's name, never the key",
            )
        if self.endpoint is None:
            for name in ("model", "key_env", "price"):
                if getattr(self, name) is not None:
                    yield f"{key}.{name}", "applies only to an endpoint; remove it, or set endpoint"

    def environment_problems(self, key: str) -> list[str]:
        """A line if the endpoint's API key is missing from the environment. `key` is the recipe key of the source."""
        # key_env may contain the key itself by mistake; `problems` reports that without showing it
        if re.fullmatch(r"\w+", self.key_env or "") and not os.environ.get(self.key_env):
            return [f"{key}.key_env: {self.key_env} is not set; put the endpoint's key into that environment variable"]
        return []

    def described(self) -> str:
        """What the plan says of it."""
        return self.path or f"{self.model} at {self.endpoint}, {self.concurrency} requests at a time"

    def cost(self, used: dict[str, int]) -> float | None:
        """Cost of the counted tokens at the recipe's price; None without a price."""
        if self.price is None:
            return None
        paid = used.get("prompt_tokens", 0) * self.price.prompt
        return round((paid + used.get("completion_tokens", 0) * self.price.completion) / 1e6, 6)


def _as_generator(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


OptionalGenerator = Annotated[
    GeneratorSource | None,
    BeforeValidator(_as_generator, json_schema_input_type=str | GeneratorSource | None),
]
