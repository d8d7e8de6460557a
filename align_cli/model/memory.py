"""Estimates the memory of a stage on each rank, in bytes, before anything is loaded.

Model states follow the ZeRO paper's accounting (arXiv 1910.02054, §3): weights, gradients, Adam's two moments and,
in mixed precision, a float32 master copy. Activations are an estimate and are marked as such.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 1 << 30


@dataclass(frozen=True)
class Sizes:
    """A model's dimensions; None if unknown."""

    parameters: int
    hidden: int | None = None
    layers: int | None = None
    vocabulary: int | None = None


@dataclass(frozen=True)
class Part:
    """One line of the memory plan."""

    name: str
    bytes: int
    estimated: bool = False


def sizes(parameters: int | None, config: dict | None) -> Sizes | None:
    """Dimensions from a parameter count and a config.json; None if the count is unknown."""
    if not parameters:
        return None
    config = config or {}
    return Sizes(int(parameters), config.get("hidden_size"), config.get("num_hidden_layers"), config.get("vocab_size"))


def batch_tokens(gpu: bool) -> int:
    """Default number of tokens per micro-batch. It is lower on a CPU, where caches set the limit."""
    return 16384 if gpu else 2048


def lora_parameters(size: Sizes, rank: int) -> int:
    """Parameters of rank-r adapters on every linear layer of a Llama-like block.

    Seven projections of about hidden × hidden to hidden × 4·hidden add up to about 22·hidden·r per layer.
    """
    if not size.hidden or not size.layers:
        return int(0.0025 * rank * size.parameters**0.5 * 1000)
    return 22 * size.hidden * rank * size.layers


def checkpoint(trainable: int, *, dtype: str, zero_stage: int) -> int:
    """Bytes of a resumable checkpoint on disk, over all ranks: the trained weights and Adam's two moments of their
    type. DeepSpeed writes the weights a second time, and its moments and master copy in float32."""
    width = BYTES[dtype]
    return trainable * (2 * width + 12 if zero_stage else 3 * width)


def plan(
    size: Sizes,
    *,
    dtype: str,
    mixed: bool,
    trainable: int,
    zero_stage: int,
    world_size: int,
    offload_optimizer: bool,
    offload_param: bool,
    frozen: dict[str, tuple[int, str]],
    trained_copies: int = 1,
    rows: int,
    tokens: int,
    checkpointing: bool,
) -> list[Part]:
    """Bytes on one rank's device, one Part each: weights, gradients, optimizer, frozen models, activations.

    `frozen` maps a role to the number of its frozen models of this size, and their type. `trained_copies` is the number
    of trained models, 2 with a value function. One micro-step processes `rows` × `tokens` tokens. A part is divided by
    `world_size` if ZeRO shards it at this stage.
    """

    def shard(amount: float, from_stage: int, offloaded: bool = False) -> int:
        return 0 if offloaded else int(amount / (world_size if zero_stage >= from_stage else 1))

    width = BYTES[dtype]
    trainable *= trained_copies
    master = 4 * trainable if mixed and width == 2 else 0
    parts = [
        Part("weights", trained_copies * shard(size.parameters * width, 3, offload_param)),
        Part("gradients", shard(trainable * width, 2)),
        Part("optimizer", shard(8 * trainable + master, 1, offload_optimizer)),
    ]
    for name, (copies, kind) in frozen.items():
        if copies:
            parts.append(Part(name, copies * shard(size.parameters * BYTES[kind], 3)))
    if size.hidden and size.layers:
        # Korthikanti et al. (arXiv 2205.05198): 34 bytes per token, hidden unit and layer in half precision; with
        # checkpointing, the inputs of all layers and the activations of one layer remain.
        half = 2 if mixed or width == 2 else 4
        per_layer = rows * tokens * size.hidden * half
        kept = per_layer * size.layers + 17 * per_layer if checkpointing else 17 * per_layer * size.layers
        parts.append(Part("activations", kept, estimated=True))
    return parts
