"""SPIN: in each iteration, the model replies to the demonstrations' prompts and is trained to prefer human replies.

arXiv 2401.01335, eq. 4.7. Differs from the authors' code in two ways. Human replies are truncated like the model's, at
generation.max_new_tokens, and truncated replies get no EOS; otherwise length alone would always distinguish them. And
the loop ends when the model can no longer distinguish held-out human replies from its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow
from datasets import Dataset
from trl import DPOConfig

from align_cli import distributed
from align_cli.data import chat
from align_cli.data.groups import Count, read_groups
from align_cli.data.split import hashed
from align_cli.data.spool import Spooled
from align_cli.data.turns import Dropped, Message
from align_cli.errors import DataError
from align_cli.generation.sampling import row_seed
from align_cli.preferences import dpo
from align_cli.preferences.responses import FrozenPolicy, units
from align_cli.preferences.rounds import Rounds, Sampled
from align_cli.recipe.preferences import SpinRecipe
from align_cli.rewards.prompts import leaving_room, limit
from align_cli.training.job import Job, Outcome, fold_in
from align_cli.training.journal import Row, RowJournal, Unit, read_rows
from align_cli.training.placement import release
from align_cli.training.prepared import INTS, Report, Writer, prepare

HELD_OUT = 1 << 20
"""Offset of row numbers of held-out prompts, so that they use different seeds."""
SCHEMA = pyarrow.schema(
    [("messages", pyarrow.string()), ("prompt_ids", INTS), ("human_ids", INTS), ("place", pyarrow.string())]
)
"""Prepared demonstrations; messages are JSON."""


def run(job: Job[SpinRecipe]) -> Outcome:
    """Run all iterations. Returns the last one's metrics and the row counts."""
    return Spin(job).run()


@dataclass
class Demonstration:
    """A prompt and the human reply to it."""

    messages: list[Message]
    """The prompt."""
    prompt: list[int]
    human: list[int]
    place: str


class Demonstrations(Sequence[Demonstration]):
    """Demonstrations that are mapped from a file."""

    def __init__(self, rows: Dataset | None):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows or ())

    def __getitem__(self, at: int) -> Demonstration:
        row = self.rows[at]
        return Demonstration(json.loads(row["messages"]), row["prompt_ids"], row["human_ids"], row["place"])

    def __iter__(self) -> Iterator[Demonstration]:
        return (self[at] for at in range(len(self)))


class Spin(Rounds[SpinRecipe]):
    """Iterations of sampling replies and training on pairs."""

    word = "iteration"

    def __init__(self, job: Job[SpinRecipe]):
        super().__init__(job)
        recipe = job.recipe
        self.numbers = range(recipe.method.iterations)
        settings = {"rows": "demonstrations of spin", "prompts": recipe.method.prompts, "limit": limit(job)}
        settings["max_new_tokens"] = recipe.generation.max_new_tokens
        entry = prepare(job, self.tokenizer, recipe.data, settings, self._write)
        self.train, self.eval = (Demonstrations(entry.table(name)) for name in ("train", "eval"))
        self.counts = entry.report.counts

    def _write(self, writer: Writer) -> Report:
        """Prepare the demonstrations, in the order in which they are taken."""
        recipe = self.job.recipe
        read, tally = read_groups(recipe.data, "demonstrations", recipe.seed, folder=writer.folder), chat.Tally()
        if read.leaked:
            writer.say(
                f"{read.leaked} prompts of data.eval are in data.train too: their held-out replies are trained on"
            )
        order = [hashed(recipe.seed, "round", group.prompt) for group in read.train]
        train = read.train.picked(sorted(range(len(order)), key=order.__getitem__)[: recipe.method.prompts])
        trained = writer.write("train", self._tokenized(train, tally), schema=SCHEMA)
        evaluated = writer.write("eval", self._tokenized(read.eval, chat.Tally()), schema=SCHEMA)
        for line in fold_in(read.counts, tally, recipe.data.max_dropped):
            writer.say(line)
        for key, rows in (("train", trained), *([("eval", evaluated)] if read.eval else [])):
            if not rows:
                raise DataError(
                    f"data.{key}: no prompt leaves room for {recipe.generation.max_new_tokens} new tokens; raise "
                    "data.max_length or lower generation.max_new_tokens"
                )
        return Report(read.counts)

    def _tokenized(self, groups: Spooled, tally: chat.Tally) -> Iterator[Row]:
        """The first reply of each conversation, truncated like the model's own."""
        for group in leaving_room(self.job, self.tokenizer, groups, tally):
            try:
                _, (human,) = chat.responses(self.tokenizer, replace(group, responses=[group.responses[0][:1]]))
            except chat.Unrenderable as error:
                tally.drop(group, str(error))
                continue
            prompt = chat.prompt_ids(self.tokenizer, group.prompt, group.tools)
            human = human[: self.job.recipe.generation.max_new_tokens]
            row = {"messages": json.dumps(group.prompt), "prompt_ids": prompt, "human_ids": human}
            yield row | {"place": group.place}

    # -- one iteration

    def settings(self, number: int) -> SpinRecipe:
        """The recipe with the iteration's β and learning rate."""
        recipe = self.job.recipe
        beta, rate = recipe.method.at(number)
        given = {"learning_rate": rate} if rate is not None else {}
        return replace(
            recipe,
            method=replace(recipe.method, beta=beta, learning_rate=None, iterations=1),
            trainer=recipe.trainer | given,
        )

    def arguments(self, part: Job[SpinRecipe]) -> DPOConfig:
        """Training arguments of an iteration."""
        return dpo.arguments(part, loss_type=["sigmoid"], beta=part.recipe.method.beta)

    def sample(self, part: Job[SpinRecipe], number: int) -> Sampled | None:
        """Sample the model's reply to every prompt: pairs.jsonl and, for held-out prompts, held_out.jsonl."""
        journal, size = RowJournal(part), part.recipe.generation.batch
        replies = Replies(self, part, number)
        with journal.listening():
            own = journal.fill(
                "pairs",
                units(len(self.train), size),
                replies.maker(self.train, 0),
                together=True,
                label=f"iteration {number}",
            )
            watched = (
                journal.fill(
                    "held_out",
                    units(len(self.eval), size),
                    replies.maker(self.eval, HELD_OUT),
                    together=True,
                    label=f"iteration {number}, held out",
                )
                if self.eval
                else []
            )
        replies.release()
        file = journal.file("pairs")
        count = Count(str(file), rows_read=len(self.train), rows_used=len(self.train))
        rows = self._rows(self.train, own, count)
        if number and part.recipe.method.mix_previous:
            previous = self.folder(number - 1) / file.name
            before = distributed.broadcast(read_rows(previous) if part.main else None)
            rows += self._rows(self.train, before, Count(""))
        held_out = self._rows(self.eval, watched, Count(""))
        if not rows and not number:
            raise DataError(f"{file}: the model reproduces every human reply; there is nothing to learn")
        if not rows:
            self.reason = {"stopped_when_alike": f"iteration {number}: the model reproduces every human reply"}
            part.say(f"iteration {number}: the model reproduces every human reply; SPIN ends here")
            return None
        lengths = [len(row["rejected_ids"]) for row in own]
        figures = {
            "pairs": len(rows),
            "held_out": len(held_out),
            "response_length": sum(lengths) / len(lengths),
            "human_length": sum(len(one.human) for one in self.train) / len(self.train),
            "eos_rate": sum(row["ended"] for row in own) / len(lengths),
        }
        part.say(
            f"iteration {number}: {len(rows)} pairs; replies of {figures['response_length']:.1f} tokens, human ones of "
            f"{figures['human_length']:.1f}; {figures['eos_rate']:.0%} end"
        )
        return Sampled(rows, figures, count, held_out)

    def _rows(self, demonstrations: Demonstrations, replies: list[Row], count: Count) -> list[dict[str, list[int]]]:
        """Pairs of human reply and model reply that differ."""
        rows = []
        for one, row in zip(demonstrations, replies, strict=True):
            if row["rejected_ids"] == one.human:
                count.lose(one.place, Dropped("the model's reply equals the human one", row["rejected"]))
                continue
            rows.append({"prompt_ids": one.prompt, "chosen_ids": one.human, "rejected_ids": row["rejected_ids"]})
        return rows

    def after(self, number: int, made: dict[str, Any]) -> bool:
        """Whether the trained model still tells held-out human replies from those of the iteration's initial model."""
        if not self.job.recipe.method.stop_when_alike or not made["sampled"]["held_out"]:
            return True
        accuracy, error = made["metrics"]["eval_rewards/accuracies"], 0.5 / math.sqrt(made["sampled"]["held_out"])
        figure = f"accuracy {accuracy:.3f} on held-out pairs of human and own reply, chance is 0.5 ± {error:.3f}"
        if accuracy > 0.5 + error:
            self.job.say(f"iteration {number}: {figure}")
            return True
        self.reason = {"stopped_when_alike": f"iteration {number}: {figure}"}
        self.job.say(f"iteration {number}: {figure}; they can no longer be told apart, so SPIN ends here")
        return False


class Replies:
    """Samples the model's replies. The model is loaded on first use."""

    def __init__(self, rounds: Spin, part: Job[SpinRecipe], number: int):
        self.rounds, self.part, self.number = rounds, part, number
        self.policy: FrozenPolicy | None = None

    def maker(self, demonstrations: Demonstrations, first: int) -> Callable[[Unit], list[Row]]:
        """A function from indices of demonstrations to their rows; `first` is the offset of their seeds."""

        def make(unit: Unit) -> list[Row]:
            if self.policy is None:
                self.policy = FrozenPolicy(self.part, self.rounds.tokenizer, self.rounds.arguments(self.part))
            policy, seed = self.policy, self.part.recipe.seed
            seeds = [row_seed(seed, self.number, first + at) for at in unit]
            replies = policy.respond([demonstrations[at].prompt for at in unit], seeds)
            return [
                {
                    "row": at,
                    "prompt": demonstrations[at].messages,
                    "chosen": policy.text(demonstrations[at].human),
                    "rejected": policy.text(ids),
                    "ended": policy.ended(ids),
                    "rejected_ids": ids,
                }
                for at, ids in zip(unit, replies, strict=True)
            ]

        return make

    def release(self) -> None:
        """Free the model."""
        self.policy = None
        release()
