"""Who speaks in `align cai`: a model in memory, or one behind an endpoint. Both reply to conversations, and choose."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from align_cli.data import chat
from align_cli.errors import AlignError, raise_all
from align_cli.methods import feedback
from align_cli.methods.sampling import Sampler, respond
from align_cli.model import load
from align_cli.model.endpoint import Endpoint, cost
from align_cli.model.zero import load_whole_from_now_on
from align_cli.recipe.cai import CaiGeneration
from align_cli.recipe.sections import Model
from align_cli.recipe.speaker import Speaker
from align_cli.stages.job import Job
from align_cli.stages.kept import Kept

Message = dict[str, str]
Spend = Callable[[dict[str, int]], None]
"""Takes what a speaker used: prompt_tokens, completion_tokens, requests, retries by reason."""
ONLY = "Answer with (A) or (B) only."


@dataclass(frozen=True)
class Reply:
    """What a speaker said."""

    text: str
    flag: str = ""
    """cut, where it did not come to its end; too_long, where the conversation leaves no room for a reply."""


class Local:
    """A model in this process."""

    workers = 1

    def __init__(self, job: Job, model: Model, path: str, spend: Spend):
        cuda, recipe = torch.cuda.is_available(), job.recipe
        half = cuda or recipe.trainer.get("bf16", False)
        dtype = model.dtype if model.dtype != "auto" else "bfloat16" if half else "float32"
        self.tokenizer = load.tokenizer(model, path)
        self.model = _loaded(model, self.tokenizer, dtype, path).to("cuda" if cuda else "cpu").eval()
        self.room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        self.ends, self.asked = load.set_ends(self.model, chat.generation_ends(self.tokenizer)), recipe.generation
        self.spend = spend

    def units(self, conversations: Sequence[list[Message]], orders: int = 1) -> list[list[int]]:
        """Conversations of like length together, `generation.batch` at a time."""
        order = sorted(range(len(conversations)), key=lambda at: (len(self._ids(conversations[at])), at))
        size = max(self.asked.batch // orders, 1)
        return [sorted(order[start : start + size]) for start in range(0, len(order), size)]

    def reply(self, conversations: Sequence[list[Message]], seeds: Sequence[int], limit: int) -> list[Reply]:
        """A reply to each conversation, row i drawn by seeds[i]; at most `limit` tokens."""
        prompts = [self._ids(conversation) for conversation in conversations]
        fits = [at for at, ids in enumerate(prompts) if len(ids) + limit <= self.room]
        replies = [Reply("", "too_long")] * len(prompts)
        if not fits:
            return replies
        asked = self.asked
        sampler = Sampler(limit, asked.temperature or 1.0, asked.top_p, asked.top_k, asked.batch, not asked.temperature)
        made = respond(
            self.model,
            [prompts[at] for at in fits],
            [seeds[at] for at in fits],
            sampler=sampler,
            ends=self.ends,
            pad=self.tokenizer.pad_token_id,
        )
        for at, ids in zip(fits, made, strict=True):
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            replies[at] = Reply(text, "" if ids and ids[-1] in self.ends else "cut")
        used = sum(len(prompts[at]) for at in fits)
        self.spend({"prompt_tokens": used, "completion_tokens": sum(map(len, made))})
        return replies

    def choose(self, questions: Sequence[str], reasoned: Sequence[str | None]) -> list[tuple[float, float] | None]:
        """(log p(A), log p(B)) for each question, after what was reasoned; None where there is no room."""
        asked = []
        for question, reason in zip(questions, reasoned, strict=True):
            tail = f"\n\n{feedback.REASON}" if reason is not None else ""
            text = chat.render(self.tokenizer, [{"role": "user", "content": question + tail}], prompt=True)
            text += f"{reason}\n\n{feedback.LEAD}" if reason is not None else feedback.LEAD
            asked.append(feedback.letters(self._encode, text))
        fits = [at for at, (ids, _, _) in enumerate(asked) if len(ids) < self.room]
        found: list[tuple[float, float] | None] = [None] * len(asked)
        if fits:
            chosen = feedback.choose(self.model, [asked[at] for at in fits], self.tokenizer.pad_token_id)
            for at, pair in zip(fits, chosen, strict=True):
                found[at] = pair
        self.spend({"prompt_tokens": sum(len(asked[at][0]) for at in fits)})
        return found

    def _ids(self, conversation: list[Message]) -> list[int]:
        try:
            return chat.prompt_ids(self.tokenizer, conversation)
        except chat.Unrenderable as error:
            raise AlignError(f"model.path: {self.tokenizer.name_or_path}: {error}; set chat_template") from None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Remote:
    """A model behind an OpenAI-compatible API."""

    def __init__(self, job: Job, speaker: Speaker, key: str, spend: Spend):
        self.endpoint, self.asked = Endpoint(speaker, key, spend), job.recipe.generation
        self.workers = max(speaker.concurrency // job.ranks, 1)
        self.log_probabilities = True

    def units(self, conversations: Sequence[list[Message]], orders: int = 1) -> list[list[int]]:
        """Each by itself, so that none that is paid for is lost."""
        return [[at] for at in range(len(conversations))]

    def reply(self, conversations: Sequence[list[Message]], seeds: Sequence[int], limit: int) -> list[Reply]:
        """As Local.reply."""
        settings = {"temperature": self.asked.temperature, "top_p": self.asked.top_p, "max_tokens": limit}
        replies = []
        for conversation, seed in zip(conversations, seeds, strict=True):
            choice = self.endpoint.complete(conversation, seed=seed >> 1, **settings)
            text = (choice["message"].get("content") or "").strip()
            replies.append(Reply(text, "cut" if choice.get("finish_reason") == "length" else ""))
        return replies

    def choose(self, questions: Sequence[str], reasoned: Sequence[str | None]) -> list[tuple[float, float] | None]:
        """As Local.choose. A server that gives no log-probabilities is taken by its word: 0 and -∞."""
        return [self._choice(question, reason) for question, reason in zip(questions, reasoned, strict=True)]

    def _choice(self, question: str, reason: str | None) -> tuple[float, float] | None:
        if reason is None:
            turns = [{"role": "user", "content": f"{question}\n\n{ONLY}"}]
        else:
            turns = [{"role": "user", "content": f"{question}\n\n{feedback.REASON}"}]
            turns += [{"role": "assistant", "content": reason}, {"role": "user", "content": f"Which is it? {ONLY}"}]
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
        if self.log_probabilities:
            try:
                choice = self.endpoint.complete(turns, logprobs=True, top_logprobs=20, **settings)
            except AlignError as error:
                if "answered 400" not in str(error) and "answered 422" not in str(error):
                    raise
                self.log_probabilities = False
        if not self.log_probabilities:
            choice = self.endpoint.complete(turns, **settings)
        tokens = (choice.get("logprobs") or {}).get("content") or []
        if tokens and (found := feedback.read_log_probabilities(tokens)):
            return found
        letter = feedback.read_choice(choice["message"].get("content") or "")
        return None if letter is None else (0.0, -1e4) if letter == "A" else (-1e4, 0.0)


def probe(kept: Kept, named: Sequence[tuple[str, Speaker]]) -> None:
    """Raise AlignError on every rank if an endpoint cannot be reached or refuses its key, before any weights are read.
    `named` are speakers with the keys of the recipe that name them."""
    lines: list[str] = []
    for key, speaker in named if kept.job.main else ():
        if speaker.endpoint:
            try:
                Endpoint(speaker, key).probe()
            except AlignError as error:
                lines += error.lines
    raise_all(AlignError, kept.share(lines))


class Speakers:
    """Who writes, who answers the pairs and who judges, each loaded when it is first needed."""

    def __init__(self, job: Job, kept: Kept):
        self.job, self.kept = job, kept
        self.held: dict[str, Local | Remote] = {}

    def probe(self) -> None:
        """As `probe`, for writer and judge."""
        named = [(key, getattr(self.job.recipe, key)) for key in ("writer", "feedback")]
        probe(self.kept, [(key, speaker) for key, speaker in named if speaker is not None])

    @property
    def writer(self) -> Local | Remote:
        """Gives first answers, critiques and revisions."""
        return self._speaker("writer", lambda: self._start)

    @property
    def policy(self) -> Local | Remote:
        """Gives the two answers of a pair: the model that was trained, or as it starts where it was not."""
        return self._trained if "train" in self.job.recipe.method.phases else self._start

    @property
    def judge(self) -> Local | Remote:
        """Chooses between them."""
        return self._speaker("feedback", lambda: self.policy)

    @property
    def _start(self) -> Local:
        return self._once("model", lambda spend: Local(self.job, self.job.recipe.model, self.job.base, spend))

    @property
    def _trained(self) -> Local:
        path = str(self.job.run.path)
        # the tokenizer that was saved there has its template
        model = replace(self.job.recipe.model, path=path, chat_template=None)
        return self._once("trained", lambda spend: Local(self.job, model, path, spend))

    def _speaker(self, key: str, default: Callable[[], Local | Remote]) -> Local | Remote:
        speaker: Speaker | None = getattr(self.job.recipe, key)
        if speaker is None:
            return default()
        if speaker.endpoint:
            return self._once(key, lambda spend: Remote(self.job, speaker, key, spend))
        model = Model(path=speaker.path, chat_template=speaker.chat_template)
        return self._once(key, lambda spend: Local(self.job, model, speaker.path, spend))

    def _once(self, name: str, make: Callable[[Spend], Any]) -> Any:
        if name not in self.held:
            self.rest()
            load_whole_from_now_on()
            self.held[name] = make(lambda used: self.kept.spend(name, used))
        return self.held[name]

    def rest(self) -> None:
        """Free the memory of models that are loaded."""
        self.held.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def usage(self) -> dict[str, Any]:
        """What each speaker used in this run, from its beginning, and what it cost at the recipe's price."""
        found: dict[str, Any] = self.kept.spent()
        for key in ("writer", "feedback"):
            speaker: Speaker | None = getattr(self.job.recipe, key)
            if speaker is None or key not in found:
                continue
            where = {"endpoint": speaker.endpoint, "model": speaker.model} if speaker.endpoint else {}
            paid = cost(found[key], speaker)
            found[key] |= (where or {"path": speaker.path}) | ({} if paid is None else {"cost": paid})
        return found


def critique_limit(asked: CaiGeneration) -> int:
    """Tokens of a critique or of a judge's reasoning."""
    return asked.max_critique_tokens or asked.max_new_tokens


def _loaded(model: Model, tokenizer: Any, dtype: str, path: str) -> Any:
    """The model at a path, or the one that an adapter there stands for."""
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file():
        return load.policy(model, tokenizer, dtype=dtype, path=path)
    base = json.loads(adapter.read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(load.policy(model, tokenizer, dtype=dtype, path=base), path)
