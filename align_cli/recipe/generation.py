"""How responses are sampled, and models that generate text beside the one that is trained."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.sections import Count, Data, Positive, section


@section
class Generation:
    """How responses are sampled. Scoring uses the same temperature."""

    max_new_tokens: Count = 128
    """Longest response, in tokens."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in scoring alike."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that holds so much probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from so many most probable tokens; 0 from all."""
    engine: Literal["auto", "hf", "batched", "vllm"] = "auto"
    """hf: `generate`, every row sampled by a seed of its own, so that ranks and resumed runs agree; batched:
    transformers' continuous batching; vllm: colocated, or a server with trainer.vllm_mode. auto is hf."""
    batch: Count = 64
    """Prompts that are answered at a time on a device (hf)."""


def room_rules(generation: Generation, data: Data) -> Iterator[tuple[str, str]]:
    """What is wrong where prompt and response do not fit into data.max_length."""
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
    """What an endpoint's tokens cost, for the sum in the manifest."""

    prompt: Annotated[float, Field(ge=0)] = 0.0
    """A million prompt tokens, in the currency you like."""
    completion: Annotated[float, Field(ge=0)] = 0.0
    """A million generated tokens."""


@section
class GeneratorSource:
    """A model beside the one that is trained: a local one (`path`), or one behind an OpenAI-compatible API."""

    path: str | None = None
    """A directory, a finished run or a hub id; in memory while it is used."""
    chat_template: str | None = None
    """As model.chat_template, for a local model whose tokenizer has none."""
    endpoint: str | None = None
    """Base address of an OpenAI-compatible API, such as http://localhost:8000/v1."""
    model: str | None = None
    """The model's name at the endpoint."""
    key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is written nowhere."""
    concurrency: Count = 8
    """Requests under way at a time, over all ranks."""
    retries: Annotated[int, Field(ge=0)] = 6
    """How often a request is sent again after a rate limit (429), an error of the server, a time-out or an answer that
    was cut off, after 1, 2, 4, … seconds or as long as the server asks for."""
    timeout: Positive = 120.0
    """Seconds to wait for an answer."""
    price: Price | None = None
    """For the cost in the manifest."""

    def problems(self, key: str) -> Iterator[tuple[str, str]]:
        if (self.path is None) == (self.endpoint is None):
            yield key, "names a local model or an endpoint, not both and not neither; set path or endpoint"
        if self.endpoint is not None and not re.match(r"https?://[^\s/]+", self.endpoint):
            yield f"{key}.endpoint", "is not an address; write it with its scheme, such as http://localhost:8000/v1"
        if self.endpoint is not None and self.model is None:
            yield f"{key}.model", "is missing; name the model that the endpoint serves"
        if self.endpoint is not None and re.search(r"//[^/]*@|[?&]\w*key=", self.endpoint):
            yield f"{key}.endpoint", "holds a secret; put the key into an environment variable and name it in key_env"
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            # not shown: people paste the key itself
            yield (
                f"{key}.key_env",
                "is not the name of an environment variable; write the variable's name, never the key",
            )
        if self.endpoint is None:
            for name in ("model", "key_env", "price"):
                if getattr(self, name) is not None:
                    yield f"{key}.{name}", "is for an endpoint; remove it, or set endpoint"

    def environment_problems(self, key: str) -> list[str]:
        """A line if the environment lacks the key that the endpoint needs; `key` is where the recipe has the source."""
        # key_env may hold the key itself by mistake; `problems` says so without showing it
        if re.fullmatch(r"\w+", self.key_env or "") and not os.environ.get(self.key_env):
            return [f"{key}.key_env: {self.key_env} is not set; put the endpoint's key into that environment variable"]
        return []

    def cost(self, used: dict[str, int]) -> float | None:
        """What counted tokens cost at the recipe's price; None without one."""
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
