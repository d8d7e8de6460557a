"""Trains on pairs with any mixture of preference losses: one forward pass per pair, and a reference only for losses
that need one.

Differs from TRL's DPO, CPO and ORPO trainers: the prompt is computed once for both responses if the model supports 4-D
masks, a step is split by tokens, and logits are computed for response tokens only.

Shapes: b pairs, m response tokens of a micro-batch. The first of two responses is the chosen one.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import Module

from align_cli.compat.trl_private import set_trained_tokens, trained_tokens
from align_cli.preferences.losses import Side, Term, preference_loss
from align_cli.training.layout import Packed, Row
from align_cli.training.steps import StepTrainer


def pair_row(row: dict[str, list[int]]) -> Row:
    """A group for the layouts from `prompt_ids`, `chosen_ids`, `rejected_ids`.

    The prompt's last token is added to each response, since it predicts that response's first token.
    """
    shared, last = row["prompt_ids"][:-1], row["prompt_ids"][-1:]
    return {"prompt_ids": shared, "responses": [last + row["chosen_ids"], last + row["rejected_ids"]]}


Noted = tuple[dict[str, Tensor], int]
"""(b,) metrics of every pair, by name; and the number of tokens computed."""


class PreferenceTrainer(StepTrainer[Noted]):
    """Trains a model patched by `model.log_probs.scoring` on pairs. `reference`, set after the trainer is built, is a
    prepared frozen model of the same kind; if None, the policy with its adapters disabled is the reference."""

    def __init__(self, *args: Any, terms: list[Term], compares: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.terms = [term for term in terms if term.weight]
        self.compares = compares
        self.reference: Module | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()

    # -- log-probabilities

    def probe(self, model: Module, packed: Packed, rows: list[Row]) -> Tensor:
        """(m,) log-probabilities of the responses' tokens."""
        return self._tokens(model, packed, rows)

    def _tokens(self, model: Module, packed: Packed, rows: list[Row]) -> Tensor:
        inputs = {key: value for key, value in packed.inputs.items() if key != "ends"}
        return model(**inputs, positions=packed.predicting(rows))

    def log_probs(self, model: Module, packed: Packed, rows: list[Row]) -> Tensor:
        """(b, 2) summed log-probabilities of the responses."""
        lengths = self.lengths(rows)
        owner = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths.flatten())
        tokens = self._tokens(model, packed, rows)
        return tokens.new_zeros(lengths.numel()).index_add(0, owner, tokens).view(lengths.shape)

    def lengths(self, rows: list[Row]) -> Tensor:
        """(b, 2) tokens of the responses."""
        counts = [[len(response) - 1 for response in row["responses"]] for row in rows]
        return torch.tensor(counts, device=self.args.device)

    def _reference_log_probs(self, packed: Packed, rows: list[Row]) -> Tensor:
        with torch.no_grad():
            if self.reference is not None:
                return self.log_probs(self.reference, packed, rows)
            policy = self.accelerator.unwrap_model(self.model)
            if not hasattr(policy, "disable_adapter"):
                raise ValueError("a loss compares with a reference, but the trainer has none")
            with policy.disable_adapter():
                return self.log_probs(self.model, packed, rows)

    def sides(self, model: Module, rows: list[Row]) -> tuple[Side, Side, int]:
        """The chosen and the rejected responses of these pairs, and the number of tokens computed."""
        packed, lengths = self.packed(model, rows), self.lengths(rows)
        # before the policy's own pass, whose checkpointed blocks are recomputed with the adapters enabled
        reference = self._reference_log_probs(packed, rows) if self.compares else None
        sums = self.log_probs(model, packed, rows)
        chosen, rejected = (
            Side(sums[:, at], lengths[:, at], None if reference is None else reference[:, at]) for at in (0, 1)
        )
        return chosen, rejected, packed.tokens

    # -- training

    def losses(self, model: Module, rows: list[Row]) -> tuple[Tensor, Noted]:
        """(b,) losses of the mixture; its metrics and the number of tokens computed."""
        chosen, rejected, tokens = self.sides(model, rows)
        with torch.autocast(chosen.sums.device.type, enabled=False):
            total, margin, each = preference_loss(self.terms, chosen, rejected)
        return total, (figures(chosen, rejected, margin, each), tokens)

    def note(self, figures: Noted, rows: list[Row]) -> None:
        """Accumulate the metrics of a micro-batch, on the device: reading them would make the host wait for it."""
        columns, tokens = figures
        for name, values in columns.items():
            self._sums[name] = self._sums.get(name, 0) + values.detach().double().sum()
        self._counts.update(pairs=len(rows), tokens=tokens)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics of the training pairs since the last log."""
        if "loss" in logs and "train_runtime" not in logs and self._sums:
            names = sorted(self._sums)
            counts = torch.tensor([float(self._counts[name]) for name in ("pairs", "tokens")], device=self.args.device)
            sums = torch.cat([counts.double(), torch.stack([self._sums[name] for name in names])])
            pairs, tokens, *total = self.accelerator.reduce(sums, "sum").tolist()
            set_trained_tokens(self, trained_tokens(self) + int(tokens))
            logs |= {name: value / pairs for name, value in zip(names, total, strict=True)}
            self._sums.clear()
            self._counts.clear()
        super().log(logs, *args, **kwargs)

    # -- held-out pairs

    def evaluate(
        self,
        eval_dataset: Dataset | list[Row] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss, accuracy by the method's own margin and log-probabilities of held-out pairs, and how often the longer
        response is the chosen one."""
        rows = list(eval_dataset if eval_dataset is not None else self.eval_dataset)

        def measure(model: Module, picked: list[Row]) -> list[dict[str, float]]:
            total, (figures, _) = self.losses(model, picked)
            figures = {"loss": total} | figures
            columns = torch.stack([values.float() for values in figures.values()], 1).cpu().tolist()
            return [dict(zip(figures, column, strict=True)) for column in columns]

        each = self.measured(rows, measure)
        means = {name: sum(pair[name] for pair in each) / len(each) for name in each[0]}
        longer = [len(row["responses"][0]) - len(row["responses"][1]) for row in rows]
        means["longer_wins"] = sum(0.5 if not more else float(more > 0) for more in longer) / len(longer)
        return self.report(means, metric_key_prefix)


def figures(chosen: Side, rejected: Side, margin: Tensor, each: dict[str, Tensor]) -> dict[str, Tensor]:
    """(b,) metrics of every pair, by name; `logps/…` are means per token."""
    columns = {
        "rewards/accuracies": (margin > 0).float() + 0.5 * (margin == 0).float(),
        "rewards/margins": margin,
        "logps/chosen": chosen.mean,
        "logps/rejected": rejected.mean,
        "logps/margins": chosen.mean - rejected.mean,
    }
    if len(each) > 1:
        columns |= {f"loss/{name}": values for name, values in each.items()}
    return columns
