"""A rank: reads the run's recipe, runs the stage, and writes the manifest on rank 0."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_cli.compat import chat_date
from align_cli.errors import AlignError, RecipeError
from align_cli.model import kind, precision
from align_cli.model.zero import deepspeed_config
from align_cli.recipe import trainer_rules
from align_cli.recipe.check import from_tree
from align_cli.recipe.sections import Recipe
from align_cli.rewards import function
from align_cli.run import batch, environment, manifest, preflight, prepare, shared
from align_cli.run.directory import RunDirectory

if TYPE_CHECKING:
    from align_cli.training.job import Job


def as_rank(stage: str, arguments: list[str], say: Callable[[str], None]) -> int:
    """One of several ranks that an external launcher started with the user's command line.

    Rank 0 composes, checks and prepares the run, and broadcasts the recipe or an exit code to the others.
    """
    from align_cli import distributed
    from align_cli.run import watch

    environment.use_interface_to(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    distributed.join()
    try:
        with watch.watched():
            return _as_rank(stage, arguments, say)
    except AlignError as error:
        if distributed.rank() == 0:  # the command line prints it once
            raise
        return error.exit_code


def _as_rank(stage: str, arguments: list[str], say: Callable[[str], None]) -> int:
    from align_cli import distributed

    message: dict[str, Any] = {}
    if distributed.rank() != 0:
        message = distributed.broadcast(None)
        return message["code"] if "code" in message else _stage(stage, message["run"], message["recipe"])
    try:
        plan = preflight.load(stage, arguments, starting=True)
        run = prepare.begin(plan, say)
    except AlignError as error:
        distributed.broadcast({"code": error.exit_code})
        raise
    if run is None:
        distributed.broadcast({"code": 0})
        return 0
    text = run.recipe.read_text(encoding="utf-8")
    distributed.broadcast({"run": str(run.path), "recipe": text})
    return _stage(stage, str(run.path), text)


def run(stage: str, path: Path) -> int:
    """Run a prepared run in this process, alone or as one of the ranks that `align` started."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _stage(stage, str(path), (path / "recipe.yaml").read_text(encoding="utf-8"))
    from align_cli import distributed
    from align_cli.run import watch

    _end_with_parent()
    environment.use_interface_to(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    distributed.join()
    with watch.watched():
        # rank 0 sends the recipe: whether all hosts see the run directory is checked next
        recipe = distributed.from_rank_0(lambda: (path / "recipe.yaml").read_text(encoding="utf-8"))
        return _stage(stage, str(path), recipe)


def _stage(stage: str, path: str, text: str) -> int:
    """Run the stage. Returns 0, or 128 + the signal that stopped it. Raises AlignError."""
    import yaml
    from rich.console import Console

    from align_cli import cpu, distributed
    from align_cli.training.job import Job

    recipe, run_directory = from_tree(stage, yaml.safe_load(text)), RunDirectory(path)
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), distributed.rank()
    if ranks == 1 and deepspeed_config(recipe.zero) is not None:
        # DeepSpeed needs a process group even for a single process, and would otherwise try MPI
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(environment.free_port())
        distributed.join()
    if ranks > 1:
        shared.check(run_directory.path, prepare.CACHE)
    if rank != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  libraries print on every rank
    distributed.use_local_device()
    cpu.install(ranks)
    chat_date.use(recipe.data.date)
    started = manifest.now()
    rows = batch.resumed(recipe, ranks, distributed.from_rank_0(run_directory.batch))
    job = Job(
        recipe=recipe,
        run=run_directory,
        # all ranks compute in the types of rank 0's machine
        precision=distributed.broadcast(precision.choose(recipe, distributed.machine())),
        per_device=rows.per_device,
        accumulation=rows.accumulation,
        rank=rank,
        ranks=ranks,
        console=Console(stderr=False),
        cache=prepare.CACHE,
        base=recipe.model.path,
    )
    inputs = _inputs(job) if rank == 0 else {}
    _merge_adapter_parents(job)
    if recipe.lora and rank == 0:
        job.base_fingerprint = kind.fingerprint(job.base)
    try:
        outcome = importlib.import_module(f"align_cli.stages.{stage}").run(job)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        # `check` asks the libraries first, but some judge a setting only beside the real model and data
        key = trainer_rules.blamed(str(error), trainer_rules.unsure(recipe.trainer))
        if key is None:
            raise
        raise RecipeError(trainer_rules.refused(key, recipe.trainer[key], error)) from error
    if outcome.stopped_by is not None:
        job.say(f"stopped; {path} resumes with the same command")
        distributed.leave()
        return 128 + outcome.stopped_by
    if rank == 0:
        for merged in _merged_parents(job):
            shutil.rmtree(merged, ignore_errors=True)
        manifest.write(
            run_directory,
            stage=stage,
            name=recipe.name,
            seed=recipe.seed,
            parents=inputs["parents"] + outcome.parents,
            data=[count.as_manifest() for count in outcome.counts],
            metrics=outcome.metrics,
            world_size=ranks,
            zero_stage=recipe.zero.stage,
            started=started,
            extra={
                "precision": job.precision_entry(),
                **outcome.extra,
                **({"code": code} if (code := inputs["code"]) else {}),
                **({"template_date": date} if (date := recipe.data.date) else {}),
            },
        )
        job.say(f"finished: {path}")
    distributed.leave()
    return 0


def _merge_adapter_parents(job: Job) -> None:
    """Merge parents that are adapters into this run's `base/` and `reference/`, so that policy, reference and any new
    adapter start from the merged model. The adapter's base as reference would give loss 0 and accuracy 1."""
    from align_cli import distributed

    reference = job.recipe.reference_path()
    job.base = distributed.from_rank_0(lambda: _merged(job, "base", job.recipe.model.path))
    job.reference = reference and distributed.from_rank_0(lambda: _merged(job, "reference", reference))


def _merged(job: Job, name: str, path: str) -> str:
    """The path itself, or, for an adapter, where in the run the model is that it stands for. On rank 0."""
    from align_cli.model import lora

    if kind.look(path).kind != "adapter":
        return path
    folder = job.run.path / name
    if not folder.is_dir():
        job.say(f"merging the adapter {path} into its base")
        lora.merge(path, folder, trust_remote_code=job.recipe.model.trust_remote_code)
    return str(folder)


def _merged_parents(job: Job) -> list[Path]:
    """Merged parents that the finished run does not need: all except the base of an adapter trained by this run."""
    needed = {job.base} if job.recipe.lora else set()
    return [job.run.path / role for role in ("base", "reference") if str(job.run.path / role) not in needed]


def _inputs(job: Job) -> dict[str, Any]:
    """The manifest's entries for parents and for Python reward functions, hashed before the run reads them."""
    code = [function.fingerprint(entry) for _, entry in job.recipe.reward_functions()]
    entries = {"parents": _parents(job.recipe), "code": code}
    if manifest.inputs(job.run) is None:
        # merged by an attempt that ended before it began, perhaps from another adapter
        for role in ("base", "reference"):
            shutil.rmtree(job.run.path / role, ignore_errors=True)
    return manifest.keep_inputs(job.run, entries)


def _parents(recipe: Recipe) -> list[dict[str, Any]]:
    """The manifest's entries for all models and runs that this run used."""
    models = [("policy", recipe.model.path)]
    if (reference := recipe.reference_path()) is not None:
        models.append(("reference", reference))
    models += [(key.split("[")[0].split(".")[0], path) for key, path in recipe.reward_models()]
    models += [(key, source.path) for key, source in recipe.generators() if source.path]
    models += [("judge", source.judge.path) for _, source in recipe.judges() if source.judge.path]
    sources = recipe.data.train + (recipe.data.eval if isinstance(recipe.data.eval, list) else [])
    sources = sources + [source for _, more, _ in recipe.method_sources() for source in more]
    runs = dict.fromkeys(run for source in sources if (run := manifest.run_of(source.path)))
    rows = recipe.earlier_rows()
    if rows and (run := manifest.run_of(f"{rows}/answers.jsonl")):
        runs[run] = None
    return [manifest.parent(role, path) for role, path in [*models, *(("data", run) for run in runs)]]


def _end_with_parent() -> None:
    """Exit when the command that started this rank has ended."""
    host, _, pid = os.environ.get(environment.PARENT, "").rpartition(":")
    if not pid or host != socket.gethostname():
        return

    def watch() -> None:
        while True:
            time.sleep(0.5)
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """`python -m align_cli.run.worker STAGE RUN_DIR`, as the launcher calls it on every rank."""
    environment.quiet()
    if "--allow-code" in sys.argv:
        function.allow()
    try:
        return run(sys.argv[1], Path(sys.argv[2]))
    except AlignError as error:
        if os.environ.get("RANK", "0") == "0":
            for line in error.lines:
                print(line, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    code = main()
    # the run is complete and saved; threads left by libraries would make a normal interpreter exit abort
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
