"""Client for a model behind an OpenAI-compatible API: retries transient failures and counts tokens.

The key is read from the environment and sent in one header. It never appears in messages or files.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import zlib
from collections.abc import Callable
from typing import Any

import httpx2

from align_cli import signals
from align_cli.errors import EndpointError
from align_cli.recipe.generation import GeneratorSource

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Status codes after which the same request may succeed later."""
LONGEST_PAUSE = 60.0
"""Maximum number of seconds between two attempts."""
SAID_PAUSE = 10.0
"""Seconds from which on a pause is announced."""
LARGEST_BODY = 64 << 20
"""Maximum number of bytes read from a response body."""
FILTERS = ("content_filter", "content filter", "content_policy", "content management policy", "responsibleaipolicy")
"""Words by which servers say that their content filter refused a request."""
TOKENS = ("prompt_tokens", "completion_tokens")


class Endpoint:
    """Client for one generator source of a recipe. `key` is its recipe key, for error messages."""

    def __init__(
        self,
        source: GeneratorSource,
        key: str,
        spend: Callable[[dict[str, int]], None] = lambda used: None,
        pause: Callable[[float], None] = signals.pause,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.source, self.key, self.spend, self.pause, self.say = source, key, spend, pause, say
        self.base = source.endpoint.rstrip("/")
        # a proxy cannot reach this machine's own servers
        self.direct = httpx2.URL(self.base).host in ("localhost", "127.0.0.1", "::1")
        self.secret = os.environ.get(source.key_env, "") if source.key_env else ""
        self.tls = httpx2.create_ssl_context()

    def probe(self) -> None:
        """Raises EndpointError if the server cannot be reached or refuses the key. It need not list its models."""
        try:
            self._send("/models", None)
        except _Failure as failure:
            if failure.code in (401, 403) or failure.reason in ("connection", "timeout"):
                raise EndpointError(self._complaint(failure), failure.code) from None

    def complete(self, messages: list[dict[str, str]], **settings: Any) -> dict[str, Any]:
        """The first choice of a chat completion, retried as often as the recipe allows.

        A request that the server's content filter refuses gets an empty answer, and is counted. Raises EndpointError,
        in one line, if retrying cannot help or the last attempt failed.
        """
        body = {"model": self.source.model, "messages": messages, **settings}
        for attempt in range(self.source.retries + 1):
            try:
                answer = self._send("/chat/completions", body)
                choice = answer["choices"][0]
                if not isinstance(choice["message"].get("content") or "", str):
                    raise TypeError("content")
            except _Failure as error:
                if error.filtered:
                    self.spend({"requests": 1, "filtered": 1})
                    return {"message": {"content": ""}, "finish_reason": "content_filter"}
                failure = error
            except (KeyError, IndexError, TypeError, AttributeError):
                failure = _Failure("answered with something other than a chat completion", "truncated")
            else:
                self.spend({"requests": 1} | _usage(answer.get("usage")))
                return choice
            if not failure.reason or attempt == self.source.retries:
                raise EndpointError(self._complaint(failure, attempt), failure.code)
            self.spend({f"retries_{failure.reason}": 1})
            wait = min(2.0**attempt, LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            seconds = failure.after if failure.after is not None else wait
            if seconds >= SAID_PAUSE:
                self.say(f"{self.key}: {self.base} {failure.text}; asking again in {seconds:.0f} seconds")
            self.pause(seconds)
        raise AssertionError

    def _send(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON object of the server's response. Raises _Failure."""
        timeout = self.source.timeout
        response = None
        try:
            response, text = asyncio.run(self._exchange(path, body))
            if not response.is_success:
                raise self._refusal(response, text)
            text = _unpacked(text)
            if text.lstrip()[:1] == b"<":
                raise _Failure("answered with a web page, not with JSON", "")
            return _without_surrogates(json.loads(text))
        except (TimeoutError, httpx2.TimeoutException):
            raise _Failure(f"did not respond within {timeout:g} seconds", "timeout") from None
        except (ValueError, RecursionError, httpx2.DecodingError, _CutOff):
            raise _Failure("sent an incomplete response", "truncated") from None
        except (OSError, httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Failure(f"cannot be reached ({self._without_key(_cause(error))})", "connection") from None

    async def _exchange(self, path: str, body: dict[str, Any] | None) -> tuple[httpx2.Response, bytes]:
        """The response and its body. `timeout` limits the whole exchange, even if the server keeps sending data."""
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {self.secret}"} if self.secret else {})
        method = "GET" if body is None else "POST"
        async with (
            asyncio.timeout(self.source.timeout),
            # the key must not follow a redirect to another host
            httpx2.AsyncClient(
                verify=self.tls, timeout=None, headers=headers, follow_redirects=False, trust_env=not self.direct
            ) as client,
            client.stream(method, self.base + path, json=body) as response,
        ):
            text = bytearray()
            try:
                async for part in response.aiter_bytes():
                    text += part
                    if len(text) > LARGEST_BODY:
                        raise _Failure(f"answered with more than {LARGEST_BODY >> 20} MiB", "truncated")
            except (httpx2.RemoteProtocolError, httpx2.ReadError):
                raise _CutOff from None
            return response, bytes(text)

    def _refusal(self, response: httpx2.Response, text: bytes) -> _Failure:
        """The failure that an error response stands for."""
        code = response.status_code
        reason = "rate_limit" if code == 429 else "server" if code in RETRIED else ""
        after = _seconds(response.headers.get("Retry-After"))
        if code in (401, 403):
            return _Failure(f"refused the key ({code})", reason, code=code)
        try:
            body = json.loads(text[:10_000])
            body = body.get("error", body) if isinstance(body, dict) else body
            message = body.get("message", "") if isinstance(body, dict) else body
        except (ValueError, RecursionError):
            message = ""
        filtered = code == 400 and any(word in str(body if message else "").lower() for word in FILTERS)
        message = self._without_key(" ".join(str(_without_surrogates(message)).split()))[:200]
        text = f"answered {code}{f' ({message})' if message else ''}"
        return _Failure(text, reason, code=code, after=after, filtered=filtered)

    def _without_key(self, text: str) -> str:
        """Remove the key from a text, since some servers echo it."""
        return text.replace(self.secret, "…") if self.secret else text

    def _complaint(self, failure: _Failure, attempt: int = 0) -> str:
        name = self.source.key_env
        if failure.code in (401, 403):
            remedy = (
                f"set {name} to a valid key"
                if name
                else f"name the environment variable that holds its key in {self.key}.key_env"
            )
        elif failure.code == 404:
            remedy = f"correct {self.key}.endpoint or {self.key}.model"
        elif failure.reason == "rate_limit":
            remedy = f"lower {self.key}.concurrency or wait; the same command continues with the missing rows"
        elif failure.reason:
            remedy = "start or repair the server; the same command continues with the missing rows"
        else:
            remedy = f"correct {self.key} in the recipe"
        tried = f" {attempt + 1} times" if attempt else ""
        return f"{self.key}.endpoint: {self.base} {failure.text}{tried}; {remedy}"


class _Failure(Exception):
    """A request without a usable response; `reason` is empty if retrying cannot help."""

    def __init__(self, text: str, reason: str, *, code: int = 0, after: float | None = None, filtered: bool = False):
        super().__init__(text)
        self.text, self.reason, self.code, self.after, self.filtered = text, reason, code, after, filtered


def _unpacked(body: bytes) -> bytes:
    """The body without gzip, for servers that compress it and do not say so. Raises ValueError if it is broken."""
    if body[:2] != b"\x1f\x8b":
        return body
    unpack = zlib.decompressobj(31)
    try:
        return unpack.decompress(body, LARGEST_BODY)
    except zlib.error as error:
        raise ValueError(str(error)) from None


class _CutOff(Exception):
    """The response body ended early."""


def _usage(usage: Any) -> dict[str, int]:
    """Token counts reported by the server; 0 for anything that is not a number."""
    values = usage if isinstance(usage, dict) else {}
    return {name: _natural(values.get(name)) for name in TOKENS}


def _natural(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) and value > 0 else 0


def _without_surrogates(value: Any) -> Any:
    """The value with strings that can be encoded as UTF-8: JSON may contain lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _without_surrogates(entry) for key, entry in value.items()}
    return value


def _cause(error: BaseException) -> str:
    """The operating system's error message, unwrapped from the client's exceptions."""
    inner: BaseException | None = error
    text = str(error)
    while inner is not None:
        if isinstance(inner, ConnectionError) and inner.errno:
            # asyncio puts its own text, with the address, into strerror
            text = os.strerror(inner.errno)
        else:
            text = getattr(inner, "strerror", None) or text
        if isinstance(inner, BaseExceptionGroup):
            inner = inner.exceptions[0]
        else:
            inner = inner.__cause__ or inner.__context__
    return text


def _seconds(header: str | None) -> float | None:
    """Seconds from a Retry-After header, at most LONGEST_PAUSE; None if it is a date or invalid."""
    try:
        seconds = float(header) if header else math.nan
    except ValueError:
        return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_PAUSE)
