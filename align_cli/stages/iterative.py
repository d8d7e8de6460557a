"""Iterative DPO: per round, K answers to fresh prompts from the current policy, scored, and the best against the worst
trained with the round's start as reference.

    align dpo recipe=online-demo.yaml

RLHF Workflow, arXiv 2405.07863, §3. Departs from it in that pairs are trained as they were sampled, token by token: an
answer that was cut off gets no EOS, which as the worse one it would teach the policy to avoid.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from align_cli.data import chat
from align_cli.data.count import of_constitution
from align_cli.data.groups import Count, Group, read_groups
from align_cli.data.split import canonical, hashed
from align_cli.data.turns import Dropped
from align_cli.errors import AlignError, DataError
from align_cli.methods.dpo import trl_loss
from align_cli.methods.guards import STEP_UP, Guards
from align_cli.methods.picking import picked
from align_cli.methods.rollouts import correlation, distinct
from align_cli.methods.sampling import row_seed
from align_cli.recipe.schema import DpoRecipe
from align_cli.run.directory import write_atomically
from align_cli.stages import judging, online, pairs
from align_cli.stages.answers import Answerer, Row, collect, let_go
from align_cli.stages.job import Job, Outcome, fold_in
from align_cli.stages.judging import Judging
from align_cli.stages.rounds import Rounds, Sampled


def run(job: Job) -> Outcome:
    """All rounds. Returns the last one's metrics and the row counts."""
    return IterativeDpo(job).run()


class IterativeDpo(Rounds):
    """Rounds of answering, scoring and training."""

    stage, word = "dpo", "round"

    def __init__(self, job: Job):
        super().__init__(job)
        recipe: DpoRecipe = job.recipe
        judging.probe_judges(job)
        self.counts += map(of_constitution, judging.laws(recipe))
        self.numbers = range(1, recipe.method.rounds + 1)
        self.prompts = self._prompts()
        self.held_out = self._held_out()
        self.beta, self.best = recipe.method.beta, (-float("inf"), None)
        self.guards = Guards(recipe.guards, SimpleNamespace(), job.say)

    # -- data

    def _prompts(self) -> list[list[Group]]:
        """Each round's prompts, none of which is in two rounds."""
        recipe: DpoRecipe = self.job.recipe
        method, data = recipe.method, replace(recipe.data, eval=None)
        parts = [[source] for source in data.train] if method.fresh == "sources" else [data.train]
        found, seen = [], set()
        for sources in parts:
            groups, counts = online.prompt_groups(self.job, self.tokenizer, replace(data, train=sources))
            self.counts += counts
            groups.sort(key=lambda group: hashed(recipe.seed, "round", group.prompt))
            fresh = []
            for group in groups:
                if (key := canonical(group.prompt)) not in seen:
                    seen.add(key)
                    fresh.append(group)
            found.append(fresh)
        rounds, parted = method.rounds, method.fresh == "sources"
        size = method.prompts or min(map(len, found)) // (1 if parted else rounds)
        slices = [groups[:size] for groups in found] if parted else [found[0][n * size :][:size] for n in range(rounds)]
        if size == 0 or any(len(part) < size for part in slices):
            raise DataError(
                f"data.train: holds {sum(map(len, found))} different prompts, and {rounds} rounds want {size or 1} "
                "fresh ones each; add prompts, or set method.prompts or method.rounds lower"
            )
        return slices

    def _held_out(self) -> list[dict[str, list[int]]]:
        """Pairs of data.eval, which every round is watched on."""
        data = self.job.recipe.data
        if data.eval is None:
            return []
        read, tally = read_groups(replace(data, train=data.eval, eval=None), "preferences", 0), chat.Tally()
        limits = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
        rows = list(chat.dpo_rows(self.tokenizer, read.train, how="best-worst", **limits, tally=tally))
        for line in fold_in(read.counts, tally, data.max_dropped):
            self.job.say(line)
        self.counts += read.counts
        return rows

    # -- one round

    def settings(self, number: int) -> DpoRecipe:
        recipe = self.job.recipe
        return replace(recipe, method=replace(recipe.method, beta=self.beta))

    def arguments(self, part: Job) -> Any:
        method = part.recipe.method
        losses, smoothing = trl_loss(method.loss, method.label_smoothing)
        weights = method.loss_weights
        return pairs.arguments(
            part, loss_type=losses, loss_weights=weights, beta=method.beta, label_smoothing=smoothing
        )

    def sample(self, part: Job, number: int) -> Sampled | int:
        groups, method, file = self.prompts[number - 1], part.recipe.method, part.run.path / "responses.jsonl"
        answering = Answering(self, part, number)
        per_rank = max(part.recipe.generation.batch // method.k, 1)
        found, stopped = collect(part, file, len(groups), per_rank, answering.make, f"round {number}")
        answering.close()
        if stopped is not None:
            return stopped
        count = Count(str(part.run.path / "pairs.jsonl"), rows_read=len(groups), rows_used=len(groups))
        rows, kept = [], []
        for group, row in zip(groups, found, strict=True):
            chosen, why = self._chosen(row, number)
            if not chosen:
                count.lose(group.place, Dropped(why, group.prompt[-1]["content"]))
            ids = chat.prompt_ids(self.tokenizer, group.prompt, group.tools)
            for w, l in chosen:  # noqa: E741
                rows.append({"prompt_ids": ids, "chosen_ids": row["ids"][w], "rejected_ids": row["ids"][l]})
                texts = {"prompt": row["prompt"], "chosen": row["responses"][w], "rejected": row["responses"][l]}
                scores = {"score_chosen": row["scores"][w], "score_rejected": row["scores"][l]}
                principles = {"principles": row["principles"]} if "principles" in row else {}
                kept.append(texts | scores | principles)
        if not rows:
            raise DataError(
                f"{file}: none of its {len(groups)} prompts gives a pair ({', '.join(count.dropped)}); "
                "raise generation.temperature, generation.max_new_tokens or method.k, or lower method.min_gap"
            )
        if part.main:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            write_atomically(part.run.path / "pairs.jsonl", text)
        figures = _figures(found) | {"pairs": len(rows)}
        shown = ", ".join(f"{name} {figures[name]:.4g}" for name in ("reward", "kl", "response_length", "eos_rate"))
        part.say(f"round {number}: {len(rows)} pairs of {len(groups)} prompts; {shown}")
        return Sampled(rows, figures, count, self.held_out, judging.usage(part))

    def _chosen(self, row: Row, number: int) -> tuple[list[tuple[int, int]], str]:
        """(better, worse) answers of a prompt, and why there are none. An answer that says nothing is in no pair, which
        other stages would refuse."""
        method, draw = self.job.recipe.method, row_seed(self.job.recipe.seed, number, row["row"])
        said = [at for at, text in enumerate(row["responses"]) if text.strip()]
        ids, scores, ended = ([row[name][at] for at in said] for name in ("ids", "scores", "ended"))
        may_win = ended if method.missing_eos is not None else [True] * len(said)
        chosen = picked(ids, scores, may_win, how=method.pairs, min_gap=method.min_gap, draw=draw)
        if len(said) < 2:
            why = "answers that are empty"
        else:
            why = "no answer ended" if not any(may_win) else "scores that differ too little"
        return [(said[w], said[l]) for w, l in chosen], why  # noqa: E741

    def before(self, number: int, figures: dict[str, float]) -> bool:
        """The guards, on answers of the policy as the round found it."""
        figure = figures.get("gold_reward", figures["reward"])
        if number > 1 and figure > self.best[0]:
            self.best = (figure, self.folder(number - 1))
        due = self.guards.look(figures)
        self.beta = self.job.recipe.method.beta if not any(g.act == "raise_kl" for g, _ in due) else self.beta
        for guard, finding in due:
            if guard.act == "warn":
                self.job.say(f"guard: round {number}: {finding}")
            elif guard.act == "raise_kl":
                self.beta *= STEP_UP
                self.job.say(f"guard: round {number}: {finding}; β is now {self.beta:.4g}")
            elif number == 1:
                raise AlignError(
                    f"guards: the policy that the rounds start from shows it already: {finding}; move the threshold, "
                    "or start from another policy"
                )
            elif not self.reason:
                self.reason = {"stopped_by_guard": f"round {number}: {finding}"}
                self.final = self.best[1] if guard.act == "rollback" else None
                back = f", with the model of {self.final.name}" if self.final else ""
                self.job.say(f"guard: round {number}: {finding}; the run ends before this round trains{back}")
        return not self.reason


class Answering:
    """A round's answers with their scores. Models are loaded when the first is asked for."""

    def __init__(self, rounds: IterativeDpo, part: Job, number: int):
        self.rounds, self.part, self.number = rounds, part, number
        self.policy: Answerer | None = None
        self.first: Any = None
        self.engines: list[Any] = []

    def _load(self) -> None:
        part, rounds = self.part, self.rounds
        self.policy = Answerer(part, rounds.tokenizer, rounds.arguments(part))
        place = online.placing(self.policy.trainer)

        def placed(model: Any) -> Any:
            self.engines.append(place(model))
            return self.engines[-1]

        self.rewards, self.gold = online.rewards(part, placed)
        if self.number > 1:
            # KL is to the policy that the first round started from
            start = replace(part, base=rounds.job.base, reference=None)
            temperature = part.recipe.generation.temperature
            self.first = online.reference(start, rounds.tokenizer, self.policy.trainer, temperature)
            self.engines.append(self.first)

    def close(self) -> None:
        """Let go of the models."""
        self.policy = self.first = self.rewards = self.gold = None
        while self.engines:
            let_go(self.engines.pop())

    def make(self, at: list[int]) -> list[Row]:
        """The rows of these prompts: K answers each, and what is known of every one."""
        if self.policy is None:
            self._load()
        part, policy, groups = self.part, self.policy, self.rounds.prompts[self.number - 1]
        method, seed = part.recipe.method, part.recipe.seed
        k = method.k
        asked = [groups[row].prompt for row in at for _ in range(k)]
        cells = [online.cells(part, groups[row]) for row in at for _ in range(k)]
        once = [chat.prompt_ids(policy.tokenizer, groups[row].prompt, groups[row].tools) for row in at]
        prompts = [ids for ids in once for _ in range(k)]
        ids = policy.respond(prompts, [row_seed(seed, self.number, row, answer) for row in at for answer in range(k)])
        texts, ended = [policy.text(one) for one in ids], [policy.ended(one) for one in ids]
        total, spread = torch.zeros(len(ids)), torch.zeros(len(ids))
        for reward in self.rewards:
            score, apart = reward(asked, texts, cells)
            total, spread = total + score, spread + apart
        own = policy.log_probs(policy.model, prompts, ids)
        other = policy.log_probs(self.first, prompts, ids) if self.first is not None else own
        columns = {
            "responses": texts,
            "scores": [
                reward if end or method.missing_eos is None else method.missing_eos
                for reward, end in zip(total.tolist(), ended, strict=True)
            ],
            "ended": ended,
            "rewards": total.tolist(),
            "spread": spread.tolist(),
            "kl": [mine - theirs for (mine, _), (theirs, _) in zip(own, other, strict=True)],
            "entropy": [entropy for _, entropy in own],
            "ids": ids,
        }
        if self.gold is not None:
            columns["gold"] = self.gold(asked, texts)[0].tolist()
        judges = [reward.score for reward in self.rewards if isinstance(reward.score, Judging)]
        return [
            {"row": row, "prompt": groups[row].prompt}
            | ({"principles": [one.principle(groups[row].prompt).id for one in judges]} if judges else {})
            | {name: column[n * k : (n + 1) * k] for name, column in columns.items()}
            for n, row in enumerate(at)
        ]


def _figures(rows: list[Row]) -> dict[str, float]:
    """What PPO writes of a rollout, of a round's answers."""

    def flat(name: str) -> torch.Tensor:
        return torch.tensor([float(value) for row in rows for value in row[name]], dtype=torch.float64)

    reward, lengths = flat("rewards"), torch.tensor([float(len(ids)) for row in rows for ids in row["ids"]]).double()
    repeated = torch.tensor([distinct(text) for row in rows for text in row["responses"]])
    gap = torch.tensor([max(row["scores"]) - min(row["scores"]) for row in rows])
    figures = {
        "reward": reward.mean(),
        "score_std": reward.std(unbiased=False),
        "score_gap": gap.mean(),
        "reward_spread": flat("spread").mean(),
        "response_length": lengths.mean(),
        "eos_rate": flat("ended").mean(),
        "distinct_2": repeated.mean(),
        "kl": flat("kl").mean(),
        "entropy": flat("entropy").mean(),
    }
    if "gold" in rows[0]:
        figures["gold_reward"] = flat("gold").mean()
    figures = {name: value.item() for name, value in figures.items()}
    return figures | {"reward_length_correlation": correlation(reward, lengths)}
