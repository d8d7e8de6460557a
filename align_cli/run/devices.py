"""Ranks and their devices, determined without torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from align_cli import hardware
from align_cli.errors import LaunchError
from align_cli.hardware import Machine
from align_cli.recipe.sections import Launch


def gpus() -> int:
    """Number of GPUs visible to processes started here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([node for node in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name)])
    if visible is None:
        return present
    chosen = [entry for entry in visible.split(",") if entry.strip() and entry.strip() != "-1"]
    return min(present, len(chosen))


def bf16() -> bool:
    """Whether every visible GPU multiplies bfloat16."""
    return gpus() > 0


def machine() -> Machine:
    """What ranks started here compute on."""
    return Machine(gpu=True, bf16=bf16()) if gpus() else Machine(False, hardware.cpu_units())


def hosts(hostfile: str) -> dict[str, int]:
    """Host -> slots of a DeepSpeed hostfile, in order.

    Raises LaunchError with every line that is not `host slots=N`.
    """
    file, slots, lines = Path(hostfile), {}, []
    if not file.is_file():
        raise LaunchError(f"launch.hostfile: {hostfile}: no such file; its lines read `host slots=8`")
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text = text.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if not match:
            lines.append(f"{hostfile}:{number}: '{text}' is not `host slots=N`; correct this line")
        elif int(match[2]) < 1:
            lines.append(f"{hostfile}:{number}: host {match[1]} has no slots; give it 1 or more, or remove the line")
        elif match[1] in slots:
            lines.append(f"{hostfile}:{number}: host {match[1]} is named twice; write one line with all its slots")
        else:
            slots[match[1]] = int(match[2])
    if not slots and not lines:
        lines.append(f"{hostfile}: names no host; add lines such as `host slots=8`")
    if lines:
        raise LaunchError(*lines)
    return slots


def world_size(launch: Launch) -> int:
    """Ranks over all hosts. Raises LaunchError for a hostfile that cannot be read."""
    if outer := os.environ.get("WORLD_SIZE"):
        return int(outer)
    if launch.hostfile is None:
        return launch.num_gpus
    slots = list(hosts(launch.hostfile).values())[: launch.num_nodes]
    return sum(min(slot, launch.num_gpus) if launch.num_gpus > 1 else slot for slot in slots)


def problems(launch: Launch) -> list[str]:
    """A line for every reason why these ranks cannot start here."""
    lines = []
    here = gpus()
    if launch.hostfile is not None:
        try:
            known = hosts(launch.hostfile)
        except LaunchError as error:
            return list(error.lines)
        if launch.num_nodes is not None and launch.num_nodes > len(known):
            lines.append(
                f"launch.num_nodes: is {launch.num_nodes}, but {launch.hostfile} names {len(known)} hosts; "
                "add hosts or lower it"
            )
        used = min(launch.num_nodes or len(known), len(known))
        if launch.node_rank is not None and launch.node_rank >= used:
            lines.append(
                f"launch.node_rank: is {launch.node_rank}, but {launch.hostfile} names {len(known)} hosts"
                f"{f', of which num_nodes takes {used}' if used < len(known) else ''}; give 0 to {used - 1}"
            )
        if launch.node_rank is not None and launch.master_addr is None:
            lines.append("launch.master_addr: is missing; with node_rank every host needs rank 0's address")
    else:
        if here and launch.num_gpus > here:
            lines.append(
                f"launch.num_gpus: is {launch.num_gpus}, but this machine has {here}; set launch.num_gpus={here}"
            )
        for key in ("node_rank", "num_nodes"):
            if getattr(launch, key) is not None:
                lines.append(f"launch.{key}: needs launch.hostfile; add it or remove {key}")
    return lines
