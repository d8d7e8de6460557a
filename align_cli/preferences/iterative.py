"""Iterative DPO: each round samples K answers to new prompts from the current policy, scores them, and trains on pairs
of better and worse answers with the round's initial policy as reference.

    align dpo recipe=online-demo.yaml

RLHF Workflow, arXiv 2405.07863, §3. One difference: pairs are trained on exactly the sampled tokens. A truncated answer
gets no EOS, since as the worse answer it would teach the policy to avoid EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import Module
from trl import DPOConfig

from align_cli import distributed
from align_cli.data import chat
from align_cli.data.count import of_constitution
from align_cli.data.groups import Count, Group
from align_cli.data.turns import Dropped
from align_cli.errors import AlignError, DataError
from align_cli.generation.sampling import row_seed
from align_cli.preferences import dpo
from align_cli.preferences.pairing import picked
from align_cli.preferences.responses import FrozenPolicy, units
from align_cli.preferences.rounds import Rounds, Sampled
from align_cli.recipe.preferences import DpoRecipe
from align_cli.rewards import judge, prompts
from align_cli.rewards.build import build, build_all
from align_cli.rewards.judge import Judge
from align_cli.rewards.reward import Reward
from align_cli.rl.guards import Guards
from align_cli.rl.rollouts import correlation, distinct_2
from align_cli.training.datasets import further
from align_cli.training.job import Job, Outcome
from align_cli.training.journal import Row, RowJournal, Unit
from align_cli.training.placement import placing, release, scoring_reference


def run(job: Job[DpoRecipe]) -> Outcome:
    """Run all rounds. Returns the last one's metrics and the row counts."""
    return IterativeDpo(job).run()


class IterativeDpo(Rounds[DpoRecipe]):
    """Rounds of sampling, scoring and training."""

    word = "round"

    def __init__(self, job: Job[DpoRecipe]):
        super().__init__(job)
        recipe = job.recipe
        judge.check_judges(recipe)
        self.counts += map(of_constitution, judge.constitutions(recipe))
        self.numbers = range(1, recipe.method.rounds + 1)
        self.prompts = self._prompts()
        self.held_out = self._held_out()
        self.beta = recipe.method.beta
        self.best = (-float("inf"), None)
        self.guards = Guards(recipe.guards, job.say)

    # -- data

    def _prompts(self) -> list[Sequence[Group]]:
        """Each round's prompts; no prompt occurs in two rounds."""
        recipe = self.job.recipe
        method, data = recipe.method, replace(recipe.data, eval=None)
        by_source = method.fresh == "sources"
        pools, seen = [], set()
        for sources in [[source] for source in data.train] if by_source else [data.train]:
            section = replace(data, train=sources)
            groups, counts = prompts.groups(self.job, self.tokenizer, section)
            self.counts += counts
            numbers = []
            for number, same in groups.fresh:
                if same not in seen:
                    seen.add(same)
                    numbers.append(number)
            pools.append(prompts.Prompts(groups.rows, numbers))
        rounds = method.rounds
        size = method.prompts or min(map(len, pools)) // (1 if by_source else rounds)
        if by_source:
            slices = [pool[:size] for pool in pools]
        else:
            slices = [pools[0][number * size :][:size] for number in range(rounds)]
        if size == 0 or any(len(part) < size for part in slices):
            raise DataError(
                f"data.train: holds {sum(map(len, pools))} different prompts, but {rounds} rounds need {size or 1} "
                "new ones each; add prompts, or lower method.prompts or method.rounds"
            )
        return slices

    def _held_out(self) -> list[dict[str, list[int]]]:
        """Pairs of data.eval, on which every round is evaluated."""
        data = self.job.recipe.data
        if data.eval is None:
            return []
        limits = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}

        def tokenized(groups, tally):
            return chat.dpo_rows(self.tokenizer, groups, how="best-worst", **limits, tally=tally)

        settings = {"pairs": "best-worst"}
        section = replace(data, train=data.eval)
        rows, counts = further(self.job, section, "preferences", self.tokenizer, settings, tokenized)
        self.counts += counts
        return list(rows or [])

    # -- one round

    def settings(self, number: int) -> DpoRecipe:
        """The recipe with the round's β."""
        recipe = self.job.recipe
        return replace(recipe, method=replace(recipe.method, beta=self.beta))

    def arguments(self, part: Job[DpoRecipe]) -> DPOConfig:
        """Training arguments of a round."""
        return dpo.arguments(part, **dpo.losses(part.recipe.method))

    def sample(self, part: Job[DpoRecipe], number: int) -> Sampled:
        """Sample K answers per prompt, score and pair them: responses.jsonl and pairs.jsonl."""
        groups, method, journal = self.prompts[number - 1], part.recipe.method, RowJournal(part)
        answers = Answers(self, part, number)
        per_unit = max(part.recipe.generation.batch // method.k, 1)
        with journal.listening():
            answered = journal.fill(
                "responses", units(len(groups), per_unit), answers.rows, together=True, label=f"round {number}"
            )
        answers.release()
        count = Count(str(journal.file("pairs")), rows_read=len(groups), rows_used=len(groups))
        rows, pairs = [], []
        for group, row in zip(groups, answered, strict=True):
            chosen, why = self._chosen(row, number)
            if not chosen:
                count.lose(group.place, Dropped(why, group.prompt[-1]["content"]))
            ids = chat.prompt_ids(self.tokenizer, group.prompt, group.tools)
            for w, l in chosen:  # noqa: E741
                rows.append({"prompt_ids": ids, "chosen_ids": row["ids"][w], "rejected_ids": row["ids"][l]})
                texts = {"prompt": row["prompt"], "chosen": row["responses"][w], "rejected": row["responses"][l]}
                scores = {"score_chosen": row["scores"][w], "score_rejected": row["scores"][l]}
                principles = {"principles": row["principles"]} if "principles" in row else {}
                pairs.append(texts | scores | principles)
        if not rows:
            raise DataError(
                f"{journal.file('responses')}: none of its {len(groups)} prompts gives a pair "
                f"({', '.join(count.dropped)}); raise generation.temperature, generation.max_new_tokens or method.k, "
                "or lower method.min_gap"
            )
        journal.write("pairs", pairs)
        figures = _figures(answered) | {"pairs": len(rows)}
        shown = ", ".join(f"{name} {figures[name]:.4g}" for name in ("reward", "kl", "response_length", "eos_rate"))
        part.say(f"round {number}: {len(rows)} pairs of {len(groups)} prompts; {shown}")
        return Sampled(rows, figures, count, self.held_out, judge.usage(part))

    def _chosen(self, row: Row, number: int) -> tuple[list[tuple[int, int]], str]:
        """(better, worse) answers of a prompt, and the reason if there are none. Empty answers are left out, since
        other stages would reject such pairs."""
        method, draw = self.job.recipe.method, row_seed(self.job.recipe.seed, number, row["row"])
        full = [at for at, text in enumerate(row["responses"]) if text.strip()]
        ids, scores, ended = ([row[name][at] for at in full] for name in ("ids", "scores", "ended"))
        may_win = ended if method.missing_eos is not None else [True] * len(full)
        chosen = picked(ids, scores, may_win, how=method.pairs, min_gap=method.min_gap, draw=draw)
        if len(full) < 2:
            why = "too few answers that are not empty"
        else:
            why = "no answer ended" if not any(may_win) else "scores differ too little"
        return [(full[w], full[l]) for w, l in chosen], why  # noqa: E741

    def before(self, number: int, figures: dict[str, float]) -> bool:
        """Apply the guards to the answers of the round's initial policy."""
        figure = figures.get("gold_reward", figures["reward"])
        if number > 1 and figure > self.best[0]:
            self.best = (figure, self.folder(number - 1))
        guards = self.guards
        self.beta = guards.act(figures, f"round {number}", self.beta)
        if guards.reason is None:
            return True
        if number == 1:
            raise AlignError(
                f"guards: the initial policy already fails one: {guards.finding}; change the threshold, or start "
                "from another policy"
            )
        self.reason = {"stopped_by_guard": guards.reason}
        self.final = self.best[1] if guards.rollback else None
        back = f", with the model of {self.final.name}" if self.final else ""
        self.job.say(f"guard: {guards.reason}; the run ends before this round trains{back}")
        return False


class Answers:
    """Samples and scores a round's answers. Models are loaded on first use."""

    def __init__(self, rounds: IterativeDpo, part: Job[DpoRecipe], number: int):
        self.rounds, self.part, self.number = rounds, part, number
        self.policy: FrozenPolicy | None = None
        self.first: Module | None = None
        """The initial policy of the first round; None in the first round itself."""
        self.rewards: list[Reward] = []
        self.gold: Reward | None = None
        self.engines: list[Module] = []

    def _load(self) -> FrozenPolicy:
        part, rounds = self.part, self.rounds
        self.policy = FrozenPolicy(part, rounds.tokenizer, rounds.arguments(part))
        place = placing(self.policy.trainer)

        def placed(model: Module) -> Module:
            self.engines.append(place(model))
            return self.engines[-1]

        self.rewards = build_all(part, placed)
        self.gold = build(part, part.recipe.gold, "gold", placed) if part.recipe.gold else None
        if self.number > 1:
            # the KL is to the initial policy of the first round
            start = replace(part, recipe=rounds.job.recipe, reference=rounds.job.base)
            temperature = part.recipe.generation.temperature
            self.first = scoring_reference(start, rounds.tokenizer, self.policy.trainer, temperature)
            self.engines.append(self.first)
        return self.policy

    def release(self) -> None:
        """Free the models."""
        self.policy = self.first = self.gold = None
        self.rewards = []
        while self.engines:
            release(self.engines.pop())

    def rows(self, unit: Unit) -> list[Row]:
        """The rows of these prompts: K answers each, with scores, KL and entropy."""
        part, policy, groups = self.part, self.policy or self._load(), self.rounds.prompts[self.number - 1]
        method, seed = part.recipe.method, part.recipe.seed
        k = method.k
        conversations = [groups[at].prompt for at in unit for _ in range(k)]
        cells = [prompts.cells(part, groups[at]) for at in unit for _ in range(k)]
        once = [chat.prompt_ids(policy.tokenizer, groups[at].prompt, groups[at].tools) for at in unit]
        prompt_ids = [ids for ids in once for _ in range(k)]
        seeds = [row_seed(seed, self.number, at, answer) for at in unit for answer in range(k)]
        ids = policy.respond(prompt_ids, seeds)
        texts, ended = [policy.text(one) for one in ids], [policy.ended(one) for one in ids]
        total, spread = torch.zeros(len(ids)), torch.zeros(len(ids))
        for reward in self.rewards:
            score, std = reward(conversations, texts, cells)
            total, spread = total + score, spread + std
        # a judge may take much longer on one rank; the forward passes below are collective under ZeRO-3
        distributed.barrier()
        own = policy.log_probs(policy.model, prompt_ids, ids)
        other = policy.log_probs(self.first, prompt_ids, ids) if self.first is not None else own
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
            columns["gold"] = self.gold(conversations, texts)[0].tolist()
            distributed.barrier()
        judges = [reward.score for reward in self.rewards if isinstance(reward.score, Judge)]
        return [
            {"row": at, "prompt": groups[at].prompt}
            | ({"principles": [one.principle(groups[at].prompt).id for one in judges]} if judges else {})
            | {name: column[n * k : (n + 1) * k] for name, column in columns.items()}
            for n, at in enumerate(unit)
        ]


def _figures(rows: list[Row]) -> dict[str, float]:
    """Metrics of a round's answers, under the names that PPO logs for a rollout."""

    def flat(name: str) -> torch.Tensor:
        return torch.tensor([float(value) for row in rows for value in row[name]], dtype=torch.float64)

    reward, lengths = flat("rewards"), torch.tensor([float(len(ids)) for row in rows for ids in row["ids"]]).double()
    distinct = torch.tensor([distinct_2(text) for row in rows for text in row["responses"]])
    gap = torch.tensor([max(row["scores"]) - min(row["scores"]) for row in rows])
    figures = {
        "reward": reward.mean(),
        "score_std": reward.std(unbiased=False),
        "score_gap": gap.mean(),
        "reward_spread": flat("spread").mean(),
        "response_length": lengths.mean(),
        "eos_rate": flat("ended").mean(),
        "distinct_2": distinct.mean(),
        "kl": flat("kl").mean(),
        "entropy": flat("entropy").mean(),
    }
    if "gold" in rows[0]:
        figures["gold_reward"] = flat("gold").mean()
    figures = {name: value.item() for name, value in figures.items()}
    return figures | {"reward_length_correlation": correlation(reward, lengths)}
