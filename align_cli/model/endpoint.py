"""A model behind an OpenAI-compatible API: sent again where that may help, tokens counted.

The key comes from the environment and goes into one header; no message, file or count holds it.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from align_cli.errors import AlignError
from align_cli.recipe.speaker import Speaker

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Answers of a server that may be other ones a little later."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts, unless the server asks for more."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key must not follow to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_NoRedirects)


class Endpoint:
    """One speaker of a recipe; `key` is where the recipe names it, for messages."""

    def __init__(
        self,
        speaker: Speaker,
        key: str,
        spend: Callable[[dict[str, int]], None] = lambda used: None,
        pause: Callable[[float], None] = time.sleep,
    ):
        self.speaker, self.key, self.spend, self.pause = speaker, key, spend, pause
        self.base = speaker.endpoint.rstrip("/")
        self.secret = os.environ.get(speaker.key_env, "") if speaker.key_env else ""

    def probe(self) -> None:
        """Raise AlignError if the server cannot be reached or refuses the key. Servers need not list their models."""
        try:
            self._send("/models", None)
        except _Refused as error:
            if error.code in (401, 403) or error.reason in ("connection", "timeout"):
                raise AlignError(self._complaint(error)) from None

    def complete(self, messages: list[dict[str, str]], **settings: Any) -> dict[str, Any]:
        """The first choice of a chat completion, after as many attempts as the recipe allows.

        Raises AlignError, in one line, where no attempt may help, or the last one did not.
        """
        body = {"model": self.speaker.model, "messages": messages, **settings}
        for attempt in range(self.speaker.retries + 1):
            try:
                answer = self._send("/chat/completions", body)
                choice = answer["choices"][0]
                if not isinstance(choice["message"].get("content") or "", str):
                    raise TypeError("content")
            except _Refused as error:
                found = error
            except (KeyError, IndexError, TypeError, AttributeError):
                found = _Refused("answered with something that is no chat completion", "truncated")
            else:
                usage = answer.get("usage") or {}
                self.spend({"requests": 1} | {name: int(usage.get(name) or 0) for name in TOKENS})
                return choice
            if not found.reason or attempt == self.speaker.retries:
                raise AlignError(self._complaint(found, attempt))
            self.spend({f"retries_{found.reason}": 1})
            wait = min(2.0**attempt, LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            self.pause(found.after if found.after is not None else wait)
        raise AssertionError

    def _send(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.secret:
            headers["Authorization"] = f"Bearer {self.secret}"
        data = json.dumps(body).encode() if body is not None else None
        asked = urllib.request.Request(self.base + path, data=data, headers=headers)
        try:
            with OPENER.open(asked, timeout=self.speaker.timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            said = self._said(error)
            reason = "rate_limit" if error.code == 429 else "server" if error.code in AGAIN else ""
            raise _Refused(said, reason, code=error.code, after=_seconds(error.headers.get("Retry-After"))) from None
        except TimeoutError:
            raise _Refused(f"gave no answer within {self.speaker.timeout:g} seconds", "timeout") from None
        except (http.client.IncompleteRead, json.JSONDecodeError, UnicodeDecodeError):
            raise _Refused("cut its answer off", "truncated") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Refused(f"gave no answer within {self.speaker.timeout:g} seconds", "timeout") from None
            raise _Refused(f"cannot be reached ({self._hidden(_reason(error.reason))})", "connection") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Refused(f"cannot be reached ({self._hidden(_reason(error))})", "connection") from None

    def _said(self, error: urllib.error.HTTPError) -> str:
        """What a server says of a request that it did not take."""
        if error.code in (401, 403):
            return f"refused the key ({error.code})"
        try:
            held = json.loads(error.read(10_000))
            held = held.get("error", held) if isinstance(held, dict) else held
            text = held.get("message", "") if isinstance(held, dict) else held
        except (OSError, ValueError, http.client.HTTPException):
            text = ""
        text = self._hidden(" ".join(str(text).split()))[:200]
        return f"answered {error.code}{f' ({text})' if text else ''}"

    def _hidden(self, text: str) -> str:
        """Without the key, which some servers repeat."""
        return text.replace(self.secret, "…") if self.secret else text

    def _complaint(self, error: _Refused, attempt: int = 0) -> str:
        name = self.speaker.key_env
        if error.code in (401, 403):
            mend = (
                f"set {name} to a key that it takes"
                if name
                else f"name the environment variable that holds its key in {self.key}.key_env"
            )
        elif error.code == 404:
            mend = f"mend {self.key}.endpoint or {self.key}.model"
        elif error.reason == "rate_limit":
            mend = f"lower {self.key}.concurrency or wait; the same command goes on with the rows that are missing"
        elif error.reason:
            mend = "start or mend the server; the same command goes on with the rows that are missing"
        else:
            mend = f"mend {self.key} in the recipe"
        tried = f" {attempt + 1} times" if attempt else ""
        return f"{self.key}.endpoint: {self.base} {error.text}{tried}; {mend}"


TOKENS = ("prompt_tokens", "completion_tokens")


class _Refused(Exception):
    """A request without a usable answer; `reason` is empty where no further attempt may help."""

    def __init__(self, text: str, reason: str, *, code: int = 0, after: float | None = None):
        super().__init__(text)
        self.text, self.reason, self.code, self.after = text, reason, code, after


def _reason(error: Any) -> str:
    return str(getattr(error, "strerror", None) or error)


def _seconds(header: str | None) -> float | None:
    try:
        return max(float(header), 0.0) if header else None
    except ValueError:
        return None


def key_problems(speaker: Speaker, key: str) -> list[str]:
    """A line if the environment lacks the key that a speaker needs."""
    # what is no name is perhaps the key, and is told so elsewhere without being shown
    if re.fullmatch(r"\w+", speaker.key_env or "") and not os.environ.get(speaker.key_env):
        return [f"{key}.key_env: {speaker.key_env} is not set; put the endpoint's key into that environment variable"]
    return []


def cost(counts: dict[str, int], speaker: Speaker) -> float | None:
    """What the counted tokens cost at the recipe's price; None without one."""
    if speaker.price is None:
        return None
    paid = counts.get("prompt_tokens", 0) * speaker.price.prompt
    return round((paid + counts.get("completion_tokens", 0) * speaker.price.completion) / 1e6, 6)
