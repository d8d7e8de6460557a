"""Figures of a step are read once per log: a host that reads one waits for its device."""

import importlib
from pathlib import Path

import project
import pytest
import torch

RECIPE = """name: t
model: { path: models/tiny }
data: { train: dpo.jsonl, max_length: 128, batch_size: 8 }
trainer: { max_steps: 1, per_device_train_batch_size: 8 }
method: { batch_tokens: 64 }
"""


@pytest.mark.parametrize(
    ("stage", "place", "end"), [("orpo", "preferences.run", "run_to_end"), ("rm", "stages.rm", "loop")]
)
def test_a_micro_batch_notes_its_figures_without_reading_them(here, monkeypatch, stage, place, end):
    project.build(here, rows=8)
    project.recipe(Path(), stage, "t", RECIPE)
    made, reads, logged = [], [], {}
    # "stopped", so that nothing more is done with the trainer
    monkeypatch.setattr(
        importlib.import_module(f"align_cli.{place}"), end, lambda trainer, *rest: made.append(trainer) or ({}, 15)
    )
    importlib.import_module(f"align_cli.stages.{stage}").run(project.job(stage))
    (trainer,), notes, inside = made, [], []
    note = trainer.note

    def noted(*given):
        notes.append(given)
        inside.append(True)
        note(*given)
        inside.clear()

    def counted(plain):
        return lambda self, *args, **kwargs: reads.extend(inside) or plain(self, *args, **kwargs)

    trainer.note = noted
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
        trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert len(notes) > 1 and not reads
    monkeypatch.setattr("transformers.Trainer.log", lambda self, logs, *rest: logged.update(logs))
    trainer.log({"loss": 1.0})
    pairs = sum(len(rows) for _, rows in notes)
    if stage == "orpo":
        expected = sum(columns["logps/chosen"].sum().item() for (columns, _), _ in notes) / pairs
        assert logged["logps/chosen"] == pytest.approx(expected)
    else:
        right = sum((scores[:, 0] > scores[:, 1]).sum().item() for (scores, _), _ in notes)
        assert logged["accuracy"] == pytest.approx(right / pairs)
