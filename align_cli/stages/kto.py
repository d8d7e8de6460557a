"""align kto: Kahneman-Tversky optimization on single responses labelled good or bad.

    align kto recipe=demo.yaml

arXiv 2402.01306, eq. 7, 8, on TRL's trainer: λ_y - v(x, y), where v is λ_D·σ(β(r - z)) for a good response and
λ_U·σ(β(z - r)) for a bad one, r = log π/π_ref, and z, the KL to the reference, is estimated from mismatched responses
of a micro-batch over all ranks. Rankings can be used, too: their best response counts as good.
"""

from __future__ import annotations

import pyarrow.compute
from trl import KTOConfig

from align_cli.data import labels
from align_cli.model import load
from align_cli.model.lora import peft_config
from align_cli.preferences.kto import KtoTrainer, balance
from align_cli.recipe.preferences import KtoRecipe
from align_cli.training.arguments import arguments
from align_cli.training.datasets import datasets
from align_cli.training.job import Job, Outcome
from align_cli.training.loop import run_to_end
from align_cli.training.placement import policy, separate_reference

LOSSES = {"kto": "kto", "apo-zero": "apo_zero_unpaired"}
"""Our name of a loss -> TRL's."""


def run(job: Job[KtoRecipe]) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    recipe, data, method = job.recipe, job.recipe.data, job.recipe.method
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = arguments(
        KTOConfig,
        job,
        loss_type=LOSSES[method.loss],
        beta=method.beta,
        desirable_weight=method.desirable_weight,
        undesirable_weight=method.undesirable_weight,
        # TRL insists on it, since it pairs neighbouring rows once; ours are paired again in each epoch's order
        train_sampling_strategy="sequential",
    )

    def tokenized(groups, tally):
        limits = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
        return labels.kto_rows(tokenizer, groups, split=method.split, **limits, tally=tally)

    rows = datasets(job, "labels", tokenizer, {"split": method.split}, tokenized)
    good = pyarrow.compute.sum(rows.train.with_format("arrow")[:]["label"]).as_py()
    if advice := balance(good, len(rows.train) - good, method.desirable_weight, method.undesirable_weight):
        job.say(advice)
    trainer = KtoTrainer(
        model=policy(job, tokenizer),
        ref_model=separate_reference(job, tokenizer),
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.eval,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.lora, load.new_tokens(tokenizer)),
        block=job.per_device * job.accumulation * job.ranks,
    )
    return run_to_end(trainer, tokenizer, job, rows.counts)
