"""Generators: models that reply to conversations and choose between two answers, in memory or behind an endpoint.

The writer and judge of Constitutional AI and the judges used as rewards are generators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align_cli import distributed
from align_cli.data import chat
from align_cli.errors import AlignError, EndpointError, raise_all
from align_cli.generation import choice
from align_cli.generation.choice import LogProbs
from align_cli.generation.engine import TransformersEngine
from align_cli.generation.sampling import Sampler
from align_cli.model import kind, load
from align_cli.model.endpoint import Endpoint
from align_cli.recipe.constitutional import CaiGeneration
from align_cli.recipe.generation import Generation, GeneratorSource
from align_cli.recipe.sections import Model

REFUSALS = (400, 403, 404, 405, 415, 422, 501)
"""Status codes with which servers refuse to give log-probabilities."""
Message = dict[str, str]
Sampling = Generation | CaiGeneration
"""The `generation:` section of a recipe."""
Spend = Callable[[dict[str, int]], None]
"""Takes a generator's usage: prompt_tokens, completion_tokens, requests, retries by reason."""


class Generator(Protocol):
    """Replies to conversations and chooses between two answers."""

    workers: int
    """Number of calls that may run concurrently."""

    def units(self, conversations: Sequence[list[Message]], orders: int = 1) -> list[list[int]]:
        """Batches of indices that one call should answer together; each conversation is asked in `orders` orders."""

    def reply(self, conversations: Sequence[list[Message]], seeds: Sequence[int], limit: int) -> list[Reply]:
        """A reply of at most `limit` tokens to each conversation; row i is sampled with seeds[i]."""

    def choose(self, questions: Sequence[str], reasoned: Sequence[str | None]) -> list[LogProbs | None]:
        """(log p(A), log p(B)) for each question, given its reasoning if any; None if the model made no choice."""


@dataclass(frozen=True)
class Reply:
    """A generator's reply."""

    text: str
    flag: str = ""
    """cut: the reply reached the token limit. too_long: the conversation leaves no room for a reply."""


class LocalGenerator:
    """A model in this process."""

    workers = 1

    def __init__(self, model: Model, path: str, settings: Sampling, spend: Spend, *, dtype: str):
        """`dtype` is the type of the weights unless the model's own settings name one."""
        dtype = dtype if model.dtype == "auto" else model.dtype
        self.tokenizer = load.tokenizer(model, path)
        self.model = _loaded(model, self.tokenizer, dtype, path).to(distributed.device()).eval()
        self.context_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        self.ends = load.set_ends(self.model, chat.generation_ends(self.tokenizer))
        self.settings, self.spend = settings, spend

    def units(self, conversations: Sequence[list[Message]], orders: int = 1) -> list[list[int]]:
        """Batches of conversations of similar length, `generation.batch` sequences each."""
        order = sorted(range(len(conversations)), key=lambda at: (len(self._ids(conversations[at])), at))
        size = max(self.settings.batch // orders, 1)
        return [sorted(order[start : start + size]) for start in range(0, len(order), size)]

    def reply(self, conversations: Sequence[list[Message]], seeds: Sequence[int], limit: int) -> list[Reply]:
        """A reply of at most `limit` tokens to each conversation; row i is sampled with seeds[i]."""
        prompts = [self._ids(conversation) for conversation in conversations]
        fits = [at for at, ids in enumerate(prompts) if len(ids) + limit <= self.context_length]
        replies = [Reply("", "too_long")] * len(prompts)
        if not fits:
            return replies
        made = self._engine(limit).respond([prompts[at] for at in fits], [seeds[at] for at in fits]).ids
        for at, ids in zip(fits, made, strict=True):
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            replies[at] = Reply(text, "" if ids and ids[-1] in self.ends else "cut")
        used = sum(len(prompts[at]) for at in fits)
        self.spend({"prompt_tokens": used, "completion_tokens": sum(map(len, made))})
        return replies

    def _engine(self, limit: int) -> TransformersEngine:
        sampler = Sampler.of(self.settings, limit)
        return TransformersEngine(
            lambda: contextlib.nullcontext(self.model), sampler, self.ends, self.tokenizer.pad_token_id
        )

    def choose(self, questions: Sequence[str], reasoned: Sequence[str | None]) -> list[LogProbs | None]:
        """(log p(A), log p(B)) for each question, given its reasoning if any; None if it exceeds the context length."""
        encoded = []
        for question, reason in zip(questions, reasoned, strict=True):
            tail = f"\n\n{choice.REASON}" if reason is not None else ""
            text = chat.render(self.tokenizer, [{"role": "user", "content": question + tail}], prompt=True)
            text += f"{reason}\n\n{choice.LEAD}" if reason is not None else choice.LEAD
            encoded.append(choice.letters(self._encode, text))
        fits = [at for at, (ids, _, _) in enumerate(encoded) if len(ids) < self.context_length]
        choices: list[LogProbs | None] = [None] * len(encoded)
        if fits:
            chosen = choice.choose(self.model, [encoded[at] for at in fits], self.tokenizer.pad_token_id)
            for at, pair in zip(fits, chosen, strict=True):
                choices[at] = pair
        self.spend({"prompt_tokens": sum(len(encoded[at][0]) for at in fits)})
        return choices

    def _ids(self, conversation: list[Message]) -> list[int]:
        try:
            return chat.prompt_ids(self.tokenizer, conversation)
        except chat.Unrenderable as error:
            raise AlignError(f"model.path: {self.tokenizer.name_or_path}: {error}; set chat_template") from None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class EndpointGenerator:
    """A model behind an OpenAI-compatible API."""

    def __init__(self, source: GeneratorSource, key: str, settings: Sampling, spend: Spend, say: Callable[[str], None]):
        self.endpoint, self.settings = Endpoint(source, key, spend, say=say), settings
        self.workers = max(source.concurrency // distributed.world_size(), 1)
        self.log_probabilities = True

    def units(self, conversations: Sequence[list[Message]], orders: int = 1) -> list[list[int]]:
        """One conversation per call, so that each paid reply is recorded at once."""
        return [[at] for at in range(len(conversations))]

    def reply(self, conversations: Sequence[list[Message]], seeds: Sequence[int], limit: int) -> list[Reply]:
        """As LocalGenerator.reply."""
        settings = {"temperature": self.settings.temperature, "top_p": self.settings.top_p, "max_tokens": limit}
        replies = []
        for conversation, seed in zip(conversations, seeds, strict=True):
            reply = self.endpoint.complete(conversation, seed=seed >> 1, **settings)
            text = (reply["message"].get("content") or "").strip()
            replies.append(Reply(text, "cut" if reply.get("finish_reason") == "length" else ""))
        return replies

    def choose(self, questions: Sequence[str], reasoned: Sequence[str | None]) -> list[LogProbs | None]:
        """As LocalGenerator.choose. Without log-probabilities from the server, the letters get 0 (chosen) and -1e4."""
        return [self._choice(question, reason) for question, reason in zip(questions, reasoned, strict=True)]

    def _choice(self, question: str, reason: str | None) -> LogProbs | None:
        if reason is None:
            turns = [{"role": "user", "content": f"{question}\n\n{choice.LETTER_ONLY}"}]
        else:
            turns = [{"role": "user", "content": f"{question}\n\n{choice.REASON}"}]
            turns += [
                {"role": "assistant", "content": reason},
                {"role": "user", "content": f"Which is it? {choice.LETTER_ONLY}"},
            ]
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
        if self.log_probabilities:
            try:
                return self._read(self.endpoint.complete(turns, logprobs=True, top_logprobs=20, **settings))
            except EndpointError as error:
                # some servers or keys are not allowed to give log-probabilities, each refuses in its own way
                if error.code not in REFUSALS:
                    raise
        reply = self.endpoint.complete(turns, **settings)
        # that it answers without them shows that they were what it refused
        self.log_probabilities = False
        return self._read(reply)

    @staticmethod
    def _read(reply: dict[str, Any]) -> LogProbs | None:
        """The choice that a reply makes, by its log-probabilities if it has them."""
        log_probs = reply.get("logprobs")
        tokens = log_probs.get("content") if isinstance(log_probs, dict) else None
        if tokens and (read := choice.read_log_probabilities(tokens)):
            return read
        letter = choice.read_choice(reply["message"].get("content") or "")
        return None if letter is None else (0.0, -1e4) if letter == "A" else (-1e4, 0.0)


def from_source(
    source: GeneratorSource, key: str, settings: Sampling, spend: Spend, *, dtype: str, say: Callable[[str], None]
) -> Generator:
    """The generator that a recipe names under `key`: behind its endpoint, or loaded from its path. `say` prints what it
    waits for."""
    if source.endpoint:
        return EndpointGenerator(source, key, settings, spend, say)
    model = Model(path=source.path, chat_template=source.chat_template)
    return LocalGenerator(model, source.path, settings, spend, dtype=dtype)


def check_endpoints(sources: Sequence[tuple[str, GeneratorSource]]) -> None:
    """Raise AlignError on every rank if an endpoint cannot be reached or refuses its key. Called before any weights are
    loaded. `sources` are (recipe key, source) pairs."""
    lines: list[str] = []
    for key, source in sources if distributed.rank() == 0 else ():
        if source.endpoint:
            try:
                Endpoint(source, key).probe()
            except AlignError as error:
                lines += error.lines
    raise_all(AlignError, distributed.broadcast(lines))


def _loaded(model: Model, tokenizer: PreTrainedTokenizerBase, dtype: str, path: str) -> PreTrainedModel | PeftModel:
    """The model at a path; an adapter is loaded on its base."""
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file():
        return load.policy(model, tokenizer, dtype=dtype, path=path)
    contents = kind.look(path)
    if contents.kind != "adapter":
        raise AlignError(f"{path}: {contents.problem}")
    base = contents.base
    return PeftModel.from_pretrained(load.policy(model, tokenizer, dtype=dtype, path=base, adapter=True), path)
