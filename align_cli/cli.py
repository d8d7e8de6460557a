"""The commands. Heavy imports are deferred, so that `align --help` is fast and torch is loaded only when needed."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from align_cli.errors import AlignError, RecipeError, did_you_mean
from align_cli.recipe.stages import STAGES

# `--beta=3` is passed on to the command, so that its error can say "write beta=3"
PASS_ON = {"ignore_unknown_options": True}
Settings = Annotated[list[str] | None, typer.Argument(metavar="recipe=NAME.yaml [KEY=VALUE …]", show_default=False)]
Stage = Annotated[str, typer.Argument(metavar="STAGE", help=", ".join(STAGES))]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Allow Python functions as rewards, which run with your permissions."),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, such as runs/demo/dpo.")]


class Commands(typer.core.TyperGroup):
    """A group that prints command-line errors in one line, with the closest command for an unknown one."""

    def make_context(self, *args, **kwargs):
        with _in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx):
        with _in_one_line():
            return super().invoke(ctx)

    def resolve_command(self, ctx, args):
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            near = did_you_mean(args[0], list(self.commands)) or f"; known: {', '.join(self.commands)}"
            typer.echo(f"command line: unknown command '{args[0]}'{near}", err=True)
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)


@contextlib.contextmanager
def _in_one_line():
    """Print usage errors in one line; typer would print the usage text, too."""
    usage_error = typer.BadParameter.__base__
    try:
        yield
    except usage_error as error:
        text = error.format_message().rstrip(".")
        if "\n" in text or error.ctx is None:  # `align` alone, which prints the help
            raise
        typer.echo(f"command line: {text[0].lower()}{text[1:]}; see `{error.ctx.command_path} --help`", err=True)
        raise typer.Exit(2) from None


def _version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(version("align-cli"))
        raise typer.Exit(0)


app = typer.Typer(
    cls=Commands,
    help="Align a language model. Each run is one recipe; stages use each other's run directories.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(
    cls=Commands, help="List, print or copy recipes.", invoke_without_command=True, rich_markup_mode=None
)
app.add_typer(recipes_app, name="recipes")


def _answers(command: Callable) -> Callable:
    """Wrap a command: an AlignError is printed as one line per problem, with exit code 2."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            code = command(*args, **kwargs)
        except AlignError as error:
            colour = sys.stderr.isatty()
            for line in error.lines:
                typer.secho(line, err=True, fg="red" if colour else None)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        raise typer.Exit(code or 0)

    return wrapped


def _console(**kwargs):
    from rich.console import Console

    console = Console(soft_wrap=True, **kwargs)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width, and wrapped lines are hard to grep
    return console


def _stage(name: str) -> str:
    if name not in STAGES:
        near = did_you_mean(name, list(STAGES)) or f"; known: {', '.join(STAGES)}"
        raise RecipeError(f"command line: unknown stage '{name}'{near}")
    return name


def _allow(code: bool) -> None:
    if code:
        from align_cli.rewards import function

        function.allow()


@app.callback()
def root(
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    # DeepSpeed's launcher inserts --local_rank=N before the command; it is ignored, since LOCAL_RANK has the value
    pass


def _add_stage(name: str, text: str) -> None:
    def command(settings: Settings = None, allow_code: AllowCode = False) -> int:
        from align_cli.run import launch

        _allow(allow_code)
        return launch.start(name, settings or [], typer.echo)

    app.command(name, help=text, context_settings=PASS_ON)(_answers(command))


for _spec in STAGES.values():
    _add_stage(_spec.name, _spec.help)


@app.command(context_settings=PASS_ON)
@_answers
def check(stage: Stage, settings: Settings = None, allow_code: AllowCode = False) -> None:
    """Validate a recipe and everything it names, and print the plan without starting a run."""
    from align_cli.report import plan as report
    from align_cli.run import preflight

    _allow(allow_code)
    report.show(preflight.load(_stage(stage), settings or [], starting=False), _console())


@app.command(context_settings=PASS_ON)
@_answers
def show(
    stage: Stage,
    settings: Settings = None,
    rows: Annotated[int, typer.Option("--rows", "-n", help="Number of rows.")] = 3,
    allow_code: AllowCode = False,
) -> None:
    """Print rows as the model sees them, with trained tokens marked."""
    from align_cli.run import environment, preflight

    _allow(allow_code)
    environment.quiet()
    plan = preflight.load(_stage(stage), settings or [], starting=False, render=False)
    from align_cli.report import rows as report

    report.show(plan, rows, _console())


@app.command()
@_answers
def lineage(runs: Annotated[list[str], typer.Argument(metavar="RUN…")]) -> None:
    """Print the inputs of a run as a tree, with the parents that have changed since."""
    from align_cli.report import lineage as report

    for run in runs:
        report.show(run, _console())


@app.command()
@_answers
def report(runs: Annotated[list[str], typer.Argument(metavar="RUN…")]) -> None:
    """Rewrite the HTML report of a Constitutional AI run: all chains from initial answer to label."""
    from pathlib import Path

    from align_cli.constitutional import audit
    from align_cli.run import manifest

    for run in runs:
        made = manifest.read(run) or {}
        if made.get("stage") != "cai" or not (Path(run) / audit.CONSTITUTION).is_file():
            raise AlignError(f"{run}: is not a finished `align cai` run; name one such as runs/demo/cai")
        typer.echo(f"{audit.write(Path(run), made)}: written")


@app.command()
@_answers
def merge(
    run: Run,
    to: Annotated[str | None, typer.Option("--to", metavar="DIR", help="Default: RUN-merged.")] = None,
) -> None:
    """Merge the adapter of a LoRA run into its base and write the resulting model."""
    from pathlib import Path

    from align_cli.model import kind
    from align_cli.run import environment, manifest

    contents = kind.look(run)
    if contents.kind != "adapter":
        whole = {"causal-lm": "holds a whole model", "reward-model": "holds a whole reward model"}
        finding = whole.get(contents.kind) or contents.finding or "no such directory"
        unfinished = contents.kind == "unfinished"
        remedy = "finish it first" if unfinished else contents.remedy or "only a run trained with lora: needs merging"
        raise AlignError(f"{run}: {finding}; {remedy}")
    destination = Path(to or f"{run.rstrip('/')}-merged")
    if destination.exists():
        raise AlignError(f"{destination}: exists already; remove it, or set --to to another directory")
    environment.quiet()
    environment.one_gpu()
    from align_cli.model import lora

    lora.merge(run, destination)
    manifest.merged(run, destination)
    typer.echo(f"{destination}: {run} merged into {contents.base}")


@app.command(context_settings=PASS_ON)
@_answers
def score(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished reward model, such as runs/demo/rm.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="data=FILE [out=FILE]", show_default=False)] = None,
) -> None:
    """Write a reward model's score for every response of a file."""
    from align_cli.run import environment

    environment.quiet()
    environment.one_gpu()
    from align_cli.evaluate import score as evaluate

    evaluate.run(run, settings or [], typer.echo)


@app.command()
@_answers
def schema(stage: Stage) -> None:
    """Print the JSON schema of a stage's recipes: its keys, and completion and checks in editors."""
    import json

    from align_cli.recipe.check import json_schema

    typer.echo(json.dumps(json_schema(_stage(stage)), indent=2, ensure_ascii=False))


@recipes_app.callback()
def recipes_root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
@_answers
def recipes_list() -> None:
    """List the available recipes, with the command that runs each."""
    from align_cli.recipe import catalog

    for line in catalog.listed():
        typer.echo(line)


@recipes_app.command("show")
@_answers
def recipes_show(name: Annotated[str, typer.Argument(metavar="STAGE/NAME")]) -> None:
    """Print a recipe."""
    from align_cli.recipe import catalog

    typer.echo(catalog.find(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
@_answers
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="STAGE/NAME")],
    destination: Annotated[str, typer.Argument(metavar="DEST")],
) -> None:
    """Copy a recipe for editing. The groups it names are still found in the package."""
    from align_cli.recipe import catalog

    typer.echo(catalog.copy(name, destination))


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="align")
    except SystemExit as end:
        if "RANK" not in os.environ:
            raise
        # one of several ranks: threads left by libraries would make a normal interpreter exit abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1 if end.code else 0)
