"""When a run writes checkpoints if its recipe does not say."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from align_cli.training.callbacks import DefaultSaves


class Training:
    """A run whose steps take `seconds`, and its checkpoints `writing` seconds and `size` bytes, by a clock of its own.
    The steps at which transformers asks for a checkpoint are given."""

    def __init__(self, tmp_path, monkeypatch, steps, seconds, writing, size):
        self.now, self.saved = 0.0, []
        monkeypatch.setattr(DefaultSaves, "LARGE", 100)
        saves = DefaultSaves(clock=lambda: self.now)
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        state, control = TrainerState(max_steps=steps, is_world_process_zero=True), TrainerControl()
        saves.on_train_begin(args, state, control)
        for step in range(1, steps + 1):
            self.now += seconds
            state.global_step = step
            control.should_save = step % (steps // 5) == 0
            saves.on_step_end(args, state, control)
            if control.should_save:
                self.now += writing
                self.saved.append(step)
                (tmp_path / f"checkpoint-{step}").mkdir()
                (tmp_path / f"checkpoint-{step}" / "model").write_bytes(b"\0" * size)
                saves.on_save(args, state, control)


@pytest.mark.parametrize(
    ("seconds", "writing", "size", "saved"),
    [
        # small: every 20 %, whatever it costs
        (1, 50, 10, [20, 40, 60, 80, 100]),
        (1, 0, 10, [20, 40, 60, 80, 100]),
        # large: every 20 % that takes 20 times as long as writing it does
        (1, 1, 1000, [20, 40, 60, 80, 100]),
        (1, 2, 1000, [20, 60, 100]),
        (1, 50, 1000, [20]),
        # long: every hour too, asked after every 2 %
        (1800, 0, 10, list(range(2, 101, 2))),
        (600, 60, 1000, [6, 12, 18, 20, 26, 32, 38, 40, 46, 52, 58, 60, 66, 72, 78, 80, 86, 92, 98, 100]),
    ],
)
def test_steps_at_which_a_checkpoint_is_written(tmp_path, monkeypatch, seconds, writing, size, saved):
    assert Training(tmp_path, monkeypatch, 100, seconds, writing, size).saved == saved
