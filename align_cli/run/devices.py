"""Ranks and their devices, determined without torch."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from align_cli import driver, hardware
from align_cli.errors import LaunchError
from align_cli.hardware import Machine
from align_cli.recipe.sections import Launch


def gpus() -> int:
    """Number of GPUs visible to processes started here."""
    return len(driver.visible())


def used(launch: Launch) -> tuple[driver.Gpu, ...]:
    """The GPUs of the ranks on this machine; empty if they run on the CPU."""
    seen = driver.visible()
    return seen if launch.hostfile or outer_ranks() else seen[: resolved(launch).num_gpus]


def resolved(launch: Launch) -> Launch:
    """The launch with a number of ranks on this machine; with a hostfile, None stands for all slots of each host."""
    number = launch.num_gpus
    if launch.hostfile is not None:
        number = None if number == "auto" else number
    elif number == "auto":
        number = max(gpus(), 1)
    return replace(launch, num_gpus=number if launch.hostfile else number or 1)


def number(variable: str) -> int | None:
    """The number in an environment variable, or None if it is unset or empty. Raises LaunchError."""
    text = os.environ.get(variable, "").strip()
    if text and not text.isdecimal():
        raise LaunchError(f"{variable}: is '{text}', not a number; unset this variable, which launchers set")
    return int(text) if text else None


def outer_ranks() -> int | None:
    """Number of ranks that an external launcher started; None if this process is not one of them.

    Raises LaunchError for variables that contradict each other.
    """
    ranks, rank = number("WORLD_SIZE"), number("RANK")
    if ranks is None or rank is None:
        return None
    if rank >= ranks:
        raise LaunchError(f"RANK: is {rank}, but WORLD_SIZE is {ranks}; unset both, or start all ranks by a launcher")
    return ranks


def machine(launch: Launch) -> Machine:
    """What ranks started here compute on."""
    if found := used(launch):
        return Machine(gpu=True, bf16=driver.bf16(found))
    return Machine(False, hardware.cpu_units())


def hosts(hostfile: str) -> dict[str, int]:
    """Host -> slots of a DeepSpeed hostfile, in order.

    Raises LaunchError with every line that is not `host slots=N`.
    """
    file, slots, lines = Path(hostfile), {}, []
    if not file.is_file():
        raise LaunchError(f"launch.hostfile: {hostfile}: no such file; its lines read `host slots=8`")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise LaunchError(f"launch.hostfile: {hostfile}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise LaunchError(
            f"launch.hostfile: {hostfile}: cannot be read ({error.strerror}); correct its permissions"
        ) from None
    for number, text in enumerate(content.splitlines(), 1):
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


def slots(launch: Launch) -> dict[str, int]:
    """Host -> ranks, for the hosts of the hostfile that are used. Raises LaunchError."""
    known = list(hosts(launch.hostfile).items())[: launch.num_nodes]
    return {host: min(slots, launch.num_gpus or slots) for host, slots in known}


def world_size(launch: Launch) -> int:
    """Ranks over all hosts. `launch` is resolved. Raises LaunchError for a hostfile that cannot be read."""
    if outer := outer_ranks():
        return outer
    return launch.num_gpus if launch.hostfile is None else sum(slots(launch).values())


def problems(launch: Launch) -> list[str]:
    """A line for every reason why these ranks cannot start here. `launch` is resolved."""
    lines = []
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
        if not outer_ranks():
            lines += _too_many(launch.num_gpus)
        for key in ("node_rank", "num_nodes"):
            if getattr(launch, key) is not None:
                lines.append(f"launch.{key}: needs launch.hostfile; add it or remove {key}")
    return lines


def _too_many(ranks: int) -> list[str]:
    """A line if there are fewer visible GPUs than ranks. Without any, ranks run on the CPU."""
    seen, remedy = driver.visible(), f"set launch.num_gpus={gpus()}"
    if not seen or ranks <= len(seen):
        return []
    if seen[0].mig:
        return [f"launch.num_gpus: is {ranks}, but a MIG device ({seen[0].name}) runs one rank; {remedy}"]
    if limit := driver.limited_by():
        shown = f"{limit} shows {len(seen)} of {driver.described(driver.present())}"
        return [f"launch.num_gpus: is {ranks}, but {shown}; {remedy}, or let this variable name more"]
    return [f"launch.num_gpus: is {ranks}, but this machine has {driver.described(seen)}; {remedy}"]
