"""Private names of libraries that `compat/` stands on: that they exist, and do what their public names here say.

When one of these fails after an upgrade, the library has changed below us: read what took the name's place, and mind
the docstring in `compat/` that says what it stands in for.
"""

import inspect
import re
from types import SimpleNamespace

import pytest
import tiny
import torch

from align_cli.compat import libraries, trl_private

ONLINE_HOOKS = [name for name in vars(trl_private.OnlineHooks) if name.startswith("_") and not name.startswith("__")]
ROW_HOOKS = [name for name in vars(trl_private.PreparedRows) if name.startswith("_") and not name.startswith("__")]


def source(cls) -> str:
    return "".join(
        inspect.getsource(one) for one in cls.__mro__ if one.__module__.startswith(("trl.", "transformers."))
    )


@pytest.mark.parametrize("name", ONLINE_HOOKS)
@pytest.mark.parametrize("trainer", ["GRPOTrainer", "RLOOTrainer"])
def test_online_trainers_call_the_hooks_that_ours_override(trainer, name):
    import trl

    cls = getattr(trl, trainer)
    assert callable(getattr(cls, name)), "the override would be dead code"
    # the sampler is handed on as a function
    assert re.search(rf"self\.{name}[(,]", source(cls))


@pytest.mark.parametrize("trainer", ["GRPOTrainer", "RLOOTrainer"])
def test_what_online_trainers_keep(trainer):
    import trl

    text = source(getattr(trl, trainer))
    for name in ("self._metrics", "self._tokenizer =", "self._step += 1", "self._total_train_tokens"):
        assert name in text, name
    assert 'self._metrics[mode]["reward"]' in text, "Rollouts takes TRL's own figure of this name out"


def test_only_rloos_single_turn_gives_ids_alone():
    import trl

    from align_cli.rl.grpo import GrpoTrainer
    from align_cli.rl.rloo import RlooTrainer

    assert "completion_ids, logprobs = self._generate_single_turn(" in source(trl.GRPOTrainer)
    assert "completion_ids = self._generate_single_turn(" in source(trl.RLOOTrainer)
    assert GrpoTrainer.gives_log_probs and not RlooTrainer.gives_log_probs


def test_grpo_gives_log_probabilities_first():
    import trl

    code = inspect.getsource(trl.GRPOTrainer._get_per_token_logps_and_entropies)
    assert {"model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"} <= set(
        inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters
    )
    assert "return logps, entropies" in code


@pytest.mark.parametrize("trainer", ["KTOTrainer"])
def test_trainers_ask_for_the_order_of_their_rows(trainer):
    import trl

    assert "sampler_fn=self._get_train_sampler" in source(getattr(trl, trainer))


@pytest.mark.parametrize("name", ROW_HOOKS)
@pytest.mark.parametrize("trainer", ["DPOTrainer", "KTOTrainer"])
def test_preference_trainers_call_the_hooks_that_ours_override(trainer, name):
    import trl

    assert f"self.{name}(" in source(getattr(trl, trainer))


def test_what_preference_trainers_keep():
    import trl

    for cls in (trl.DPOTrainer, trl.KTOTrainer):
        assert "self._metrics[" in source(cls) and "self._precompute_engine = None" in source(cls)


@pytest.mark.parametrize("trainer", ["SFTTrainer", "DPOTrainer", "KTOTrainer"])
def test_trl_counts_trained_tokens(trainer):
    import trl

    assert "self._total_train_tokens +=" in source(getattr(trl, trainer))
    counted = SimpleNamespace()
    trl_private.set_trained_tokens(counted, 7)
    assert trl_private.trained_tokens(counted) == 7


def test_the_fused_head_is_looked_up_where_it_is_replaced(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    utils.add_fused_lm_head(model)
    calls, original = [], utils._ChunkedLogProbFunction

    class Head(torch.autograd.Function):
        @staticmethod
        def apply(hidden, *given):
            calls.append(len(hidden))
            return original.apply(hidden, *given)

    trl_private.replace_fused_head(Head)
    ids = torch.arange(12).view(2, 6)
    labels = ids.clone()
    labels[:, :4] = -100
    model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert calls == [4], "the head sees the positions with a label, and no others"


def test_the_best_model_is_loaded(tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    path = tiny.model(tmp_path / "best", seed=1)
    model = AutoModelForCausalLM.from_pretrained(tiny.model(tmp_path / "last", seed=2))
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=args)
    trainer.state.best_model_checkpoint = str(path)
    libraries.load_best_model(trainer)
    best = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(model.lm_head.weight, best.lm_head.weight)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_the_attention_in_use(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model(tmp_path), attn_implementation=kind)
    assert libraries.attention(model.config) == kind


def test_tied_weights_are_those_that_are_not_saved(tmp_path):
    from safetensors import safe_open
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        missing = {name for name in model.state_dict() if name not in saved.keys()}  # noqa: SIM118
    assert missing == {"lm_head.weight"} and missing <= libraries.tied_weights(model)


def test_a_generation_config_that_was_made_up_says_so(tmp_path):
    from transformers import AutoModelForCausalLM, GenerationConfig

    tiny.model(tmp_path)
    GenerationConfig(eos_token_id=2).save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    (tmp_path / "generation_config.json").unlink()
    made_up = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert libraries.made_from_config(made_up) and not libraries.made_from_config(own)


def test_zero3_is_unknown_within_and_known_again_after():
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    announced = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    with libraries.no_zero3_loading():
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()
    del announced
    assert not is_deepspeed_zero3_enabled()


def test_accelerate_takes_the_end_of_a_step_from_us():
    from accelerate.state import GradientState

    state = GradientState()
    before = state.sync_gradients
    for now in (False, True):
        libraries.exchange_gradients(state, now)
        assert state.sync_gradients is now
    libraries.exchange_gradients(state, before)


def test_torch_builds_extensions_below_a_folder_of_their_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = libraries.extension_folder("of_ours")
    assert folder == tmp_path / "of_ours" and folder.is_dir()


def test_deepspeed_says_what_it_runs_on(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import real_accelerator

    monkeypatch.setattr(real_accelerator, "ds_accelerator", None)
    assert libraries.deepspeed_accelerator() == "cpu"


def test_deepspeed_counts_free_memory_where_devices_are_named_by_id(monkeypatch):
    """With NVML's bindings installed, DeepSpeed converts CUDA_VISIBLE_DEVICES to int."""
    from deepspeed.accelerator import cuda_accelerator

    accelerator = cuda_accelerator.CUDA_Accelerator()
    monkeypatch.setattr(cuda_accelerator, "pynvml", SimpleNamespace(nvmlDeviceGetHandleByIndex=None))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0aa1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 40)
    with pytest.raises(ValueError, match="MIG-0aa1"):
        accelerator.available_memory(0)
    libraries.deepspeed_without_nvml()
    assert accelerator.available_memory(0) == 60
