"""DPO's losses as the trainer computes them, against the papers' numbers."""

import math
from types import SimpleNamespace

import project
import pytest
import tiny
import torch

from align_cli.preferences.dpo import DpoTrainer, trl_loss

# outputs of the reference implementation (eric-mitchell/direct-preference-optimization) on these inputs
POLICY_CHOSEN, POLICY_REJECTED = [-10.0, -5.0, -20.0], [-12.0, -4.0, -20.0]
REF_CHOSEN, REF_REJECTED = [-11.0, -5.0, -18.0], [-11.0, -5.0, -21.0]


class Scripted(torch.nn.Module):
    """Stands in for the policy: gives each response the summed log-probability it is told, in its first token."""

    def __init__(self, sums: list[float], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.sums = sums
        self.anchor = torch.nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, input_ids, labels, **kwargs):
        log_probs = torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1, dtype=self.anchor.dtype)
        log_probs[:, 0] = torch.tensor(self.sums)
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs + self.anchor, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), loss=None
        )


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig

    path = tiny.model(tmp_path_factory.mktemp("tiny"))
    rows = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}] * 3)

    def make(losses, smoothing=0.0, **given):
        losses, smoothing = trl_loss(losses, smoothing)
        args = DPOConfig(
            output_dir=str(path / "out"),
            bf16=False,
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=False,
            loss_type=losses,
            label_smoothing=smoothing,
            **given,
        )
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return DpoTrainer(
            model=model, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(path)
        )

    return make


def per_pair(trainer, tokens=1, dtype=torch.float32):
    """The loss of each golden pair by itself; every response has `tokens` tokens."""
    found = []
    for pair in zip(POLICY_CHOSEN, POLICY_REJECTED, REF_CHOSEN, REF_REJECTED, strict=True):
        ids = torch.full((2, 1 + tokens), 5)
        mask = torch.ones_like(ids)
        mask[:, 0] = 0
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
        inputs |= {"ref_chosen_logps": torch.tensor([pair[2]]), "ref_rejected_logps": torch.tensor([pair[3]])}
        trainer.precompute_ref_logps = True
        loss = trainer._compute_loss(Scripted(list(pair[:2]), dtype), inputs, return_outputs=False)
        found.append(loss.item())
    return found


def close(found, wanted):
    assert found == pytest.approx(wanted, abs=1e-5)


def test_sigmoid_is_equation_7(build):
    trainer = build(["sigmoid"])
    found = per_pair(trainer)
    close(found, [0.598139, 0.744397, 0.854355])
    close([sum(found) / 3], [0.732297])
    rewards = trainer._metrics["eval"]
    close(rewards["rewards/chosen"], [0.1, 0.0, -0.2])
    close(rewards["rewards/rejected"], [-0.1, 0.1, 0.1])


def test_spin_is_the_logistic_loss_of_the_human_reply_against_the_models_own(build, here):
    """arXiv 2401.01335, eq. 4.7, on its reference function's numbers, through the arguments that an iteration gives."""
    from align_cli.preferences.spin import Spin

    project.build(here)
    text = (
        here / "recipes/sft/t.yaml"
    ).read_text() + "method: { beta: 0.1, stop_when_alike: false }\ngeneration: { max_new_tokens: 16 }\n"
    project.recipe(here, "spin", "t", text)
    job = project.job("spin")
    args = Spin(job).arguments(job)
    trainer = build(args.loss_type, beta=args.beta)
    for kind in (torch.float32, torch.bfloat16):
        close(per_pair(trainer, dtype=kind), [0.598139, 0.744397, 0.854355])


def test_conservative_dpo_through_the_robust_loss(build):
    close(per_pair(build(["cdpo"], 0.1)), [0.618139, 0.734397, 0.824355])


def test_conservative_dpo_without_smoothing_is_dpo(build):
    close(per_pair(build(["cdpo"], 0.0)), [0.598139, 0.744397, 0.854355])


def test_ipo_on_single_token_responses(build):
    close(per_pair(build(["ipo"])), [9.0, 36.0, 64.0])


def test_hinge(build):
    # relu(1 - β·Δ) with Δ = 2, -1, -3 and β = 0.1
    close(per_pair(build(["hinge"])), [0.8, 1.1, 1.3])


@pytest.mark.parametrize("loss", ["sigmoid", "cdpo", "robust", "sigmoid_norm"])
def test_the_loss_before_any_step_is_ln_2_and_the_margin_0(build, loss):
    trainer = build([loss])
    batch = trainer.data_collator([trainer.train_dataset[0]])
    found = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    assert found.item() == pytest.approx(math.log(2), abs=1e-6)
    assert trainer._metrics["eval"]["rewards/margins"] == [pytest.approx(0.0, abs=1e-6)]


def test_every_loss_of_the_recipe_is_one_of_trls(build):
    from typing import get_args

    from align_cli.recipe.preferences import DPO_LOSSES

    for loss in get_args(DPO_LOSSES):
        found = per_pair(build([loss], 0.1 if loss in ("exo_pair", "robust", "cdpo") else 0.0))
        assert all(math.isfinite(value) for value in found), loss
