"""Guards: what counts as a sign, for how long, and what is done."""

import json
from types import SimpleNamespace

import pytest

from align_cli.recipe.rewards import Guard
from align_cli.rl.guards import STATE, GuardCallback, Guards


class Watched:
    """A trainer, as far as a guard sees one: a rollout every two updates."""

    updates_per_rollout = 2

    def __init__(self):
        self.kl_coefficient, self.latest, self.loaded = 0.1, {}, []
        self.state = SimpleNamespace(best_model_checkpoint=None)

    def settle(self):
        """All figures are numbers already."""

    def _load_best_model(self):
        self.loaded.append(self.state.best_model_checkpoint)


def play(guards, trainer, rollouts):
    """Show the rollouts' figures one after the other; returns the control of the last."""
    for number, figures in enumerate(rollouts, 1):
        trainer.latest = figures
        control = SimpleNamespace(should_training_stop=False, should_save=False)
        guards.on_step_end(None, SimpleNamespace(global_step=2 * number), control)
    return control


def made(trainer, *guards):
    said = []
    return GuardCallback(Guards([Guard(**guard) for guard in guards], said.append), trainer), said


def test_patience_is_in_rollouts_in_a_row():
    trainer = Watched()
    guards, said = made(trainer, {"metric": "kl", "above": 5.0, "act": "stop", "patience": 2})
    assert not play(guards, trainer, [{"kl": 6}, {"kl": 4}, {"kl": 6}]).should_training_stop
    assert play(guards, trainer, [{"kl": 6}]).should_training_stop
    assert "kl 6 is above 5" in guards.guards.reason and len(said) == 1


def test_between_rollouts_nothing_is_looked_at():
    trainer = Watched()
    guards, _ = made(trainer, {"metric": "kl", "above": 5.0, "act": "stop", "patience": 1})
    trainer.latest = {"kl": 9.0}
    control = SimpleNamespace(should_training_stop=False)
    guards.on_step_end(None, SimpleNamespace(global_step=3), control)
    assert not control.should_training_stop


def test_beta_rises_until_the_sign_is_gone_and_goes_back():
    trainer = Watched()
    guards, _ = made(trainer, {"metric": "kl", "above": 5.0, "act": "raise_kl", "patience": 1})
    play(guards, trainer, [{"kl": 6}, {"kl": 7}])
    assert trainer.kl_coefficient == pytest.approx(0.1 * 1.5**2)
    play(guards, trainer, [{"kl": 3}])
    assert trainer.kl_coefficient == pytest.approx(0.15)
    play(guards, trainer, [{"kl": 3}, {"kl": 3}, {"kl": 3}])
    assert trainer.kl_coefficient == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("last", "stops"),
    [
        ({"reward": 3.0, "gold_reward": 0.4}, True),  # the proxy is at its best, gold fell
        ({"reward": 1.0, "gold_reward": 0.4}, False),  # both fell: not over-optimised
        ({"reward": 3.0, "gold_reward": 0.9}, False),  # gold fell by less than it may
    ],
)
def test_over_optimisation_is_gold_falling_while_the_proxy_rises(last, stops):
    trainer = Watched()
    guards, _ = made(trainer, {"metric": "gold_reward", "drop": 0.5, "act": "stop", "patience": 1})
    first = [{"reward": 1.0, "gold_reward": 0.5}, {"reward": 2.0, "gold_reward": 1.0}]
    assert play(guards, trainer, [*first, last]).should_training_stop is stops


def test_nan_is_a_sign_whatever_the_threshold():
    trainer = Watched()
    guards, _ = made(trainer, {"metric": "entropy", "below": 0.01, "act": "stop", "patience": 1})
    assert play(guards, trainer, [{"entropy": float("nan")}]).should_training_stop
    assert "NaN" in guards.guards.reason


def test_a_warning_leaves_the_run_alone():
    trainer = Watched()
    guards, said = made(trainer, {"metric": "eos_rate", "below": 0.5, "patience": 1})
    assert not play(guards, trainer, [{"eos_rate": 0.1}]).should_training_stop
    assert said == ["guard: step 2: eos_rate 0.1 is below 0.5"] and guards.guards.reason is None


def test_a_checkpoint_remembers_the_guards_and_the_best_is_spared(tmp_path):
    trainer, args = Watched(), SimpleNamespace(output_dir=str(tmp_path))
    guards, _ = made(trainer, {"metric": "kl", "above": 5.0, "act": "raise_kl", "patience": 2})
    states = []
    for step, reward in ((2, 1.0), (4, 3.0), (6, 2.0)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        play(guards, trainer, [{"kl": 6.0, "reward": reward}])
        state = SimpleNamespace(global_step=step, best_model_checkpoint=None, is_world_process_zero=True)
        if states:
            state.best_model_checkpoint = states[-1].best_model_checkpoint
        guards.on_save(args, state, None)
        states.append(state)
    assert states[-1].best_model_checkpoint == str(tmp_path / "checkpoint-4")
    again, _ = made(Watched(), {"metric": "kl", "above": 5.0, "act": "raise_kl", "patience": 2})
    state = SimpleNamespace(global_step=6, best_model_checkpoint=None)
    again.on_train_begin(args, state, None)
    ours, theirs = guards.guards, again.guards
    assert (theirs.seen, theirs.raised, theirs.best) == (ours.seen, ours.raised, ours.best)
    assert again.trainer.kl_coefficient == pytest.approx(trainer.kl_coefficient)
    assert state.best_model_checkpoint == states[-1].best_model_checkpoint
    assert json.loads((tmp_path / "checkpoint-6" / STATE).read_text())["saved_best"] == 3.0


def test_rollback_loads_the_best_checkpoint_and_stop_does_not(tmp_path):
    for act, loaded in (("rollback", [str(tmp_path)]), ("stop", [])):
        trainer = Watched()
        trainer.state.best_model_checkpoint = str(tmp_path)
        guards, _ = made(trainer, {"metric": "kl", "above": 5.0, "act": act, "patience": 1})
        play(guards, trainer, [{"kl": 6.0}])
        guards.roll_back()
        assert trainer.loaded == loaded


def test_a_nan_or_infinite_figure_is_seen_at_once():
    trainer = Watched()
    guards, _ = made(trainer, {"metric": "nan", "act": "stop"})
    assert not play(guards, trainer, [{"kl": 1.0, "loss": 0.1}]).should_training_stop
    assert play(guards, trainer, [{"kl": float("nan"), "loss": float("inf"), "reward": 1.0}]).should_training_stop
    assert "kl and loss are NaN or infinite" in guards.guards.reason
