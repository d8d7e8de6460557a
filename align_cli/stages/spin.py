"""align spin: self-play fine-tuning, -log σ(β·[(log π/π_t)(human) - (log π/π_t)(own reply)]), π_t the previous iterate.

    align spin recipe=demo.yaml

arXiv 2401.01335, eq. 4.7. Iteration t answers the demonstrations' prompts with the model as it then is and learns to
tell the human replies from its own, on the generations of t and t-1. Departs from the authors' code in two ways: human
replies are cut where the model's are, at generation.max_new_tokens, and neither gets an EOS where it was cut, or length
alone would tell them apart for ever; and the loop ends by itself when held-out replies can no longer be told apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from align_cli.data import chat
from align_cli.data.groups import Count, Group, read_groups
from align_cli.data.split import hashed
from align_cli.data.turns import Dropped
from align_cli.errors import DataError
from align_cli.methods.sampling import row_seed
from align_cli.recipe.schema import SpinRecipe
from align_cli.stages import online, pairs
from align_cli.stages.answers import Answerer, Row, collect, let_go
from align_cli.stages.job import Job, Outcome, fold_in
from align_cli.stages.rounds import Rounds, Sampled

HELD_OUT = 1 << 20
"""Row numbers of held-out prompts start here, so that they are drawn by other seeds."""


def run(job: Job) -> Outcome:
    """All iterations. Returns the last one's metrics and the row counts."""
    return Spin(job).run()


@dataclass
class Demonstration:
    """A prompt and the human reply to it, as tokens."""

    group: Group
    prompt: list[int]
    human: list[int]


class Spin(Rounds):
    """Iterations of replying and telling apart."""

    stage, word = "spin", "iteration"

    def __init__(self, job: Job):
        super().__init__(job)
        recipe: SpinRecipe = job.recipe
        self.numbers = range(recipe.method.iterations)
        read, tally = read_groups(recipe.data, "demonstrations", recipe.seed), chat.Tally()
        if read.leaked:
            job.say(f"{read.leaked} prompts of data.eval are in data.train too: their replies are learnt by heart")
        train = sorted(read.train, key=lambda group: hashed(recipe.seed, "round", group.prompt))
        self.train = self._tokenized(train[: recipe.method.prompts or len(train)], tally)
        self.eval = self._tokenized(read.eval, chat.Tally())
        for line in fold_in(read.counts, tally, recipe.data.max_dropped):
            job.say(line)
        self.counts, self.held_out = read.counts, 0
        for key, made in (("train", self.train), *([("eval", self.eval)] if read.eval else [])):
            if not made:
                raise DataError(
                    f"data.{key}: no prompt of it leaves room for {recipe.generation.max_new_tokens} new tokens; raise "
                    "data.max_length or set generation.max_new_tokens lower"
                )

    def _tokenized(self, groups: list[Group], tally: chat.Tally) -> list[Demonstration]:
        """The first reply of each conversation, cut where the model's own would be."""
        found = []
        for group in online.leaving_room(self.job, self.tokenizer, groups, tally):
            try:
                _, (human,) = chat.responses(self.tokenizer, replace(group, responses=[group.responses[0][:1]]))
            except chat.Unrenderable as error:
                tally.drop(group, str(error))
                continue
            limit = self.job.recipe.generation.max_new_tokens
            prompt = chat.prompt_ids(self.tokenizer, group.prompt, group.tools)
            found.append(Demonstration(group, prompt, human[:limit]))
        return found

    # -- one iteration

    def settings(self, number: int) -> SpinRecipe:
        recipe = self.job.recipe
        beta, rate = recipe.method.at(number)
        given = {"learning_rate": rate} if rate is not None else {}
        return replace(
            recipe,
            method=replace(recipe.method, beta=beta, learning_rate=None, iterations=1),
            trainer=recipe.trainer | given,
        )

    def arguments(self, part: Job) -> Any:
        # batches of one size, so that the mean of their accuracies is the accuracy
        even = next(n for n in range(part.per_device, 0, -1) if self.held_out % (n * part.ranks) == 0)
        return pairs.arguments(
            part, loss_type=["sigmoid"], beta=part.recipe.method.beta, per_device_eval_batch_size=even
        )

    def sample(self, part: Job, number: int) -> Sampled | int | None:
        folder, per_rank = part.run.path, part.recipe.generation.batch
        replying = Replying(self, part, number)
        found: dict[str, list[Row]] = {}
        for name, asked, first in (("pairs", self.train, 0), ("held_out", self.eval, HELD_OUT)):
            if not asked:
                continue
            rows, stopped = collect(
                part,
                folder / f"{name}.jsonl",
                len(asked),
                per_rank,
                replying.maker(asked, first),
                f"iteration {number}{', held out' if first else ''}",
            )
            if stopped is not None:
                return stopped
            found[name] = rows
        replying.close()
        count = Count(str(folder / "pairs.jsonl"), rows_read=len(self.train), rows_used=len(self.train))
        rows = self._rows(self.train, found["pairs"], count)
        if number and part.recipe.method.mix_previous:
            before, _ = collect(
                part, self.folder(number - 1) / "pairs.jsonl", len(self.train), per_rank, _refuse, "replies"
            )
            rows += self._rows(self.train, before, Count(""))
        held_out = self._rows(self.eval, found.get("held_out", []), Count(""))
        held_out = held_out[: len(held_out) // part.ranks * part.ranks]
        self.held_out = len(held_out)
        if not rows and not number:
            raise DataError(f"{folder / 'pairs.jsonl'}: the model repeats every human reply; there is nothing to learn")
        if not rows:
            self.reason = {"stopped_when_alike": f"iteration {number}: the model repeats every human reply"}
            part.say(f"iteration {number}: the model repeats every human reply, and SPIN ends here")
            return None
        lengths = [len(row["rejected_ids"]) for row in found["pairs"]]
        figures = {
            "pairs": len(rows),
            "held_out": len(held_out),
            "response_length": sum(lengths) / len(lengths),
            "human_length": sum(len(one.human) for one in self.train) / len(self.train),
            "eos_rate": sum(row["ended"] for row in found["pairs"]) / len(lengths),
        }
        part.say(
            f"iteration {number}: {len(rows)} pairs; replies of {figures['response_length']:.1f} tokens, human ones of "
            f"{figures['human_length']:.1f}; {figures['eos_rate']:.0%} end"
        )
        return Sampled(rows, figures, count, held_out)

    def _rows(self, asked: list[Demonstration], found: list[Row], count: Count) -> list[dict[str, list[int]]]:
        rows = []
        for one, row in zip(asked, found, strict=bool(found)):
            if row["rejected_ids"] == one.human:
                count.lose(one.group.place, Dropped("the model's reply is the human one", row["rejected"]))
                continue
            rows.append({"prompt_ids": one.prompt, "chosen_ids": one.human, "rejected_ids": row["rejected_ids"]})
        return rows

    def after(self, number: int, made: dict[str, Any]) -> bool:
        """Whether the trained model still tells held-out human replies from those of the iteration's start."""
        if not self.job.recipe.method.stop_when_alike or not made["sampled"]["held_out"]:
            return True
        accuracy, error = made["metrics"]["eval_rewards/accuracies"], 0.5 / math.sqrt(made["sampled"]["held_out"])
        said = f"accuracy {accuracy:.3f} in telling held-out human replies from its own, chance 0.5 ± {error:.3f}"
        if accuracy > 0.5 + error:
            self.job.say(f"iteration {number}: {said}")
            return True
        self.reason = {"stopped_when_alike": f"iteration {number}: {said}"}
        self.job.say(f"iteration {number}: {said}: they can no longer be told apart, and SPIN ends here")
        return False


class Replying:
    """The model's own replies. It is loaded when the first is asked for."""

    def __init__(self, rounds: Spin, part: Job, number: int):
        self.rounds, self.part, self.number = rounds, part, number
        self.policy: Answerer | None = None

    def maker(self, asked: list[Demonstration], first: int) -> Any:
        """A function from indices into `asked` to their rows."""

        def make(at: list[int]) -> list[Row]:
            if self.policy is None:
                self.policy = Answerer(self.part, self.rounds.tokenizer, self.rounds.arguments(self.part))
            policy, seed = self.policy, self.part.recipe.seed
            seeds = [row_seed(seed, self.number, first + row) for row in at]
            found = policy.respond([asked[row].prompt for row in at], seeds)
            return [
                {
                    "row": row,
                    "prompt": asked[row].group.prompt,
                    "chosen": policy.text(asked[row].human),
                    "rejected": policy.text(ids),
                    "ended": policy.ended(ids),
                    "rejected_ids": ids,
                }
                for row, ids in zip(at, found, strict=True)
            ]

        return make

    def close(self) -> None:
        """Let go of the model."""
        self.policy = None
        let_go()


def _refuse(at: list[int]) -> list[Row]:
    raise RuntimeError("the replies of the iteration before are gone")
