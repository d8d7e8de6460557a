"""What `align check` prints: models, data, batch, steps, devices and memory of a run. Imports no torch."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align_cli import driver
from align_cli.data.groups import PARTS
from align_cli.model import kind, precision
from align_cli.model.memory import GIB, Part
from align_cli.preferences import plan as rounds
from align_cli.recipe.preferences import SpinRecipe
from align_cli.recipe.sections import Recipe, Source
from align_cli.recipe.stages import REFERENCE
from align_cli.run import devices
from align_cli.run.plan import Plan


def show(plan: Plan, console: Console) -> None:
    """Print a plan, one line per subject."""
    recipe = plan.recipe
    rows: list[tuple[str, str]] = []
    console.print(f"align {recipe.stage} recipe={plan.composed.file}", style="bold", highlight=False, markup=False)
    size = f"{plan.size.parameters / 1e9:.3g} B parameters" if plan.size else "size unknown until it is loaded"
    pending = "  (not created yet)" if kind.look(recipe.model.path).kind == "missing" else ""
    rows.append(("model", f"{recipe.model.path}{pending} · {size}"))
    machine = devices.machine(recipe.launch)
    rows.append(("precision", f"{precision.choose(recipe, machine)} ({machine})"))
    if recipe.lora:
        rows.append(("lora", f"r {recipe.lora.r}, alpha {recipe.lora.alpha:g}, targets {recipe.lora.targets}"))
    if (reference := _reference(recipe)) is not None:
        rows.append(("reference", reference))
    rows += [("reward", source.described()) for _, source in recipe.reward_sources()]
    rows += [("gold", path) for key, path in recipe.reward_models() if key == "gold.path"]
    for key in ("train", "eval"):
        value = getattr(recipe.data, key)
        if isinstance(value, list):
            for source in value:
                pending = "  (not created yet)" if source.path in plan.pending else ""
                weight = f" × {source.weight:g}" if source.weight != 1 else ""
                rows.append((f"data.{key}", f"{_named(source)}{weight}{pending}"))
        elif value is not None:
            rows.append((f"data.{key}", f"{value:.0%} of the prompts"))
    rows += [(key, source.described()) for key, source in recipe.generators()]
    for line in plan.notes:
        rows.append(("", line))
    rows.append(("method", _settings(recipe.method, recipe.unused_keys())))
    batch = plan.batch
    rows.append(
        (
            "batch",
            f"{batch.total} {recipe.spec.unit} per step = {batch.per_device} per device × {batch.accumulation} "
            f"accumulated × {plan.ranks} ranks",
        )
    )
    about = "about " if plan.roughly() else ""
    loop = rounds.plan(recipe, plan.counts, batch.total)
    rows += loop
    if not loop:
        rows.append(("steps", f"{about}{steps}" if (steps := plan.steps()) else "unknown until the rows are read"))
    rows.append(("ranks", f"{_ranks(plan)}, ZeRO stage {recipe.zero.stage}"))
    if plan.memory:
        rows.append(("memory", f"≈ {_total(plan.memory)}"))
    if plan.storage is not None:
        rows.append(("disk", plan.storage.described()))
    if plan.other_memory:
        other = "four models, without lora" if recipe.lora else "one backbone for the four models, with lora"
        rows.append(("", f"≈ {_total(plan.other_memory)} as {other}"))
    rows.append(("run", f"{recipe.run_dir} ({plan.state})"))
    for command in plan.todo:
        rows.append(("needs", f"`{command}`"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, text in rows:
        # file names and excerpts of rows may contain brackets, which must not be read as markup
        grid.add_row(name, Text(text))
    console.print(grid, highlight=False)


def _reference(recipe: Recipe) -> str | None:
    """The plan's entry for the reference; None for stages without one."""
    if REFERENCE not in recipe.spec.models or isinstance(recipe, SpinRecipe):
        return None
    if not recipe.needs_reference():
        return "none: no loss needs one"
    own = "the policy at the start of each round" if rounds.in_rounds(recipe) else "the initial policy"
    return recipe.reference_path() or own


def _ranks(plan: Plan) -> str:
    """The plan's entry for ranks and their devices: `8 ranks on 8 × NVIDIA H100 80GB HBM3`."""
    launch, used, seen = plan.recipe.launch, devices.used(plan.recipe.launch), driver.visible()
    ranks = f"{plan.ranks} rank{'s' if plan.ranks > 1 else ''}"
    if launch.hostfile is not None:
        return f"{ranks} over {launch.hostfile}"
    if not used:
        idle = driver.unsupported()
        return f"{ranks} on the CPU" + (f"; torch is not built for {driver.described(idle)}" if idle else "")
    if plan.ranks == 1:
        more = f", 1 of {len(seen)} GPUs (launch.num_gpus=auto uses all)" if len(seen) > 1 else ""
        return f"{ranks} on {used[0].name}{more}"
    return f"{ranks} on {driver.described(used)}"


def _named(source: Source) -> str:
    """A source's path, with the part of it that is read."""
    parts = [f"{key} {value}" for key in PARTS if (value := getattr(source, key)) is not None]
    return f"{source.path} ({', '.join(parts)})" if parts else source.path


def _total(memory: list[Part]) -> str:
    parts = [f"{part.name} {'≈ ' if part.estimated else ''}{part.bytes / GIB:.2f}" for part in memory]
    return f"{sum(part.bytes for part in memory) / GIB:.1f} GiB per rank ({', '.join(parts)})"


def _settings(section: object, unused: frozenset[str] = frozenset()) -> str:
    shown = [(field.name, getattr(section, field.name)) for field in fields(section) if field.name not in unused]
    return ", ".join(f"{name} {_plain(value)}" for name, value in shown if value not in (None, []))


def _plain(value: object) -> str:
    if isinstance(value, list):
        return "+".join(map(_plain, value))
    if isinstance(value, Source):
        return _named(value)
    if is_dataclass(value):
        return f"({_settings(value)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
