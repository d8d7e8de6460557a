"""A model that speaks beside the one that is trained: a writer or a judge, in memory or behind an endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from align_cli.recipe.sections import Count, Positive, section


@section
class Price:
    """What an endpoint's tokens cost, for the sum in the manifest."""

    prompt: Annotated[float, Field(ge=0)] = 0.0
    """A million prompt tokens, in the currency you like."""
    completion: Annotated[float, Field(ge=0)] = 0.0
    """A million generated tokens."""


@section
class Speaker:
    """A model beside the one that is trained: a local one (`path`), or one behind an OpenAI-compatible API."""

    path: str | None = None
    """A directory, a finished run or a hub id, held in memory while it speaks."""
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
            yield f"{key}.endpoint", "is no address; write it with its scheme, such as http://localhost:8000/v1"
        if self.endpoint is not None and self.model is None:
            yield f"{key}.model", "is missing; name the model that the endpoint serves"
        if self.endpoint is not None and re.search(r"//[^/]*@|[?&]\w*key=", self.endpoint):
            yield f"{key}.endpoint", "holds a secret; put the key into an environment variable and name it in key_env"
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            # not shown: people paste the key itself
            yield f"{key}.key_env", "is no name of an environment variable; write the variable's name, never the key"
        if self.endpoint is None:
            for name in ("model", "key_env", "price"):
                if getattr(self, name) is not None:
                    yield f"{key}.{name}", "is for an endpoint; remove it, or set endpoint"


def _as_speaker(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


OptionalSpeaker = Annotated[Speaker | None, BeforeValidator(_as_speaker, json_schema_input_type=str | Speaker | None)]
