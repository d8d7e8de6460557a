"""An exponential moving average of the policy's weights, which a run saves instead of the final weights.

InstructGPT uses a decay of 0.992 per update (arXiv 2203.02155, appendix C.4). Under ZeRO-3 each rank averages its own
shard of every weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers import TrainerCallback, TrainerState, TrainingArguments

from align_cli import distributed

if TYPE_CHECKING:
    from align_cli.rl.rollouts import Rollouts


class WeightAverage(TrainerCallback):
    """Averages the trainer's `policy_parameters()` after every update, and saves the average in checkpoints."""

    def __init__(self, decay: float, trainer: Rollouts):
        self.decay, self.trainer = decay, trainer
        self.averages: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        parameters = self.trainer.policy_parameters()
        self.averages = {name: _part(parameter).float().clone() for name, parameter in parameters.items()}
        file = self._file(args, state, parameters)
        if state.global_step and distributed.from_rank_0(file.is_file):
            self.averages = {name: tensor.to(self.averages[name].device) for name, tensor in load_file(file).items()}

    def on_step_end(self, args, state, control, **kwargs):
        for name, parameter in self.trainer.policy_parameters().items():
            self.averages[name].lerp_(_part(parameter).float(), 1 - self.decay)

    def on_save(self, args, state, control, **kwargs):
        parameters = self.trainer.policy_parameters()
        sharded = _sharded(parameters)
        if sharded or state.is_world_process_zero:
            save_file(self.averages, self._file(args, state, parameters))
        if sharded:
            # rank 0 marks the checkpoint as complete next
            distributed.barrier()

    def put_in_place(self) -> None:
        """Replace the policy's weights by their average."""
        for name, parameter in self.trainer.policy_parameters().items():
            if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":
                # ZeRO keeps small weights unsharded on every rank; partition them, or the old values would be saved
                parameter.partition(param_list=[parameter], has_been_updated=False)
            _part(parameter).copy_(self.averages[name])

    def _file(self, args: TrainingArguments, state: TrainerState, parameters: dict[str, Parameter]) -> Path:
        rank = args.process_index if _sharded(parameters) else 0
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"average-{rank}.safetensors"


def _part(parameter: Parameter) -> Tensor:
    """This rank's part of a parameter: its shard under ZeRO-3, else all of it."""
    return (parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter).detach()


def _sharded(parameters: dict[str, Parameter]) -> bool:
    return any(hasattr(parameter, "ds_tensor") for parameter in parameters.values())
