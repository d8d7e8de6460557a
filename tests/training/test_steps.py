"""What `layout: auto` stands for: outputs of both layouts, and on a GPU their times, told by a clock of the test."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from align_cli.model.log_probs import scoring
from align_cli.preferences.trainer import PreferenceTrainer
from align_cli.training import layout as layouts
from align_cli.training import steps

ROWS = [
    {"prompt_ids": [5, 6, 7, 8 + at], "responses": [[8 + at, 9, 20, 1], [8 + at, 11, 12]]}
    for at in range(6)
]  # fmt: skip


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Makes a trainer on a GPU that takes these seconds for a forward pass of each layout."""
    tiny.model(tmp_path / "tiny")
    now = 0.0

    def packing(make, seconds):
        def packed(*args):
            nonlocal now
            now += seconds
            return make(*args)

        return packed

    def build(shared=1.0, rows=1.0, attention="sdpa", **more):
        timed = {"shared": packing(layouts.shared, shared), "rows": packing(layouts.separate, rows)}
        monkeypatch.setattr(layouts, "LAYOUTS", timed)
        monkeypatch.setattr(steps, "clock", lambda: now)
        model = scoring(AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", attn_implementation=attention))
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, save_strategy="no")
        said = []
        trainer = PreferenceTrainer(
            model=model,
            args=args,
            train_dataset=ROWS,
            processing_class=tiny.tokenizer(),
            terms=[],
            compares=False,
            batch_tokens=64,
            say=said.append,
            **{"layout": "auto"} | more,
        )
        assert not trainer.measures  # on this machine
        trainer.measures = True
        return trainer, said

    return build


@pytest.mark.parametrize(
    ("shared", "rows", "chosen", "line"),
    [
        (1.0, 2.0, "shared", "layout: shared, 2.00 times as fast as the other one on the first groups"),
        (3.0, 2.0, "rows", "layout: rows, 1.50 times as fast as the other one on the first groups"),
    ],
)
def test_the_faster_of_two_layouts_that_agree(build, shared, rows, chosen, line):
    trainer, said = build(shared, rows)
    trainer.model.train()
    before = torch.random.get_rng_state()
    assert trainer.settled(trainer.model, ROWS) == chosen and said == [line]
    # nothing but the choice is left of it
    assert torch.equal(torch.random.get_rng_state(), before) and trainer.model.training
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert not trainer._sums
    assert trainer.settled(trainer.model, ROWS) == chosen and len(said) == 1


def test_a_layout_that_does_not_agree_is_never_the_faster_one(build, monkeypatch):
    trainer, said = build(1.0, 2.0)
    probe = trainer.probe

    def other(model, packed, rows):
        # as a model that ignores the mask
        return probe(model, packed, rows) * (2 if packed.inputs["attention_mask"].dim() == 4 else 1)

    monkeypatch.setattr(trainer, "probe", other)
    assert trainer.settled(trainer.model, ROWS) == "rows" and "does not support 4-D masks" in said[0]


def test_flash_attention_takes_no_4d_masks(build, monkeypatch):
    trainer, said = build(1.0, 2.0)
    monkeypatch.setattr(trainer.model.config, "_attn_implementation", "flash_attention_2")
    assert trainer.settled(trainer.model, ROWS) == "rows" and "does not support 4-D masks" in said[0]


def test_on_a_cpu_the_choice_does_not_depend_on_time(build):
    trainer, said = build(3.0, 2.0)
    trainer.measures = False
    assert trainer.settled(trainer.model, ROWS) == "shared" and not said


def test_a_resumed_run_keeps_the_choice_though_the_times_differ(build, tmp_path):
    record = tmp_path / ".layout"
    trainer, _ = build(3.0, 2.0, record=record)
    assert trainer.settled(trainer.model, ROWS) == "rows" == record.read_text()
    again, said = build(1.0, 2.0, record=record)
    assert again.settled(again.model, ROWS) == "rows" and not said
    record.write_text("shared")
    flash, said = build(1.0, 2.0, record=record)
    flash.model.config._attn_implementation = "flash_attention_2"
    assert flash.settled(flash.model, ROWS) == "rows" and said
