"""One rank: reads the run's recipe, runs the stage, and on rank 0 writes the manifest."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from align_cli.compat import chat_date
from align_cli.errors import AlignError
from align_cli.model import function
from align_cli.model.zero import deepspeed_config
from align_cli.recipe.check import from_tree, to_tree
from align_cli.run import batch, footprint, heap, launch, manifest, preflight, prepare, rewards
from align_cli.run.directory import RunDirectory


def as_rank(stage: str, arguments: list[str], say: Callable[[str], None]) -> int:
    """One of several ranks that a launcher started with the user's own command line.

    Rank 0 composes, checks and prepares; the others wait for its word.
    """
    _join()
    rank = int(os.environ["RANK"])
    message: dict[str, Any] = {}
    if rank != 0:
        message = _share(None)
        return message["code"] if "code" in message else _stage(stage, message["run"], message["recipe"])
    try:
        plan = preflight.load(stage, arguments, starting=True)
        run = prepare.begin(plan, say)
    except AlignError as error:
        _share({"code": error.exit_code})
        raise
    if run is None:
        _share({"code": 0})
        return 0
    text = run.recipe.read_text(encoding="utf-8")
    _share({"run": str(run.path), "recipe": text})
    return _stage(stage, str(run.path), text)


def run(stage: str, path: Path) -> int:
    """A prepared run in this process, alone or as one of the ranks that `align` started."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _stage(stage, str(path), (path / "recipe.yaml").read_text(encoding="utf-8"))
    _end_with_parent()
    _join()
    # hosts need not share a file system for the recipe: rank 0's goes to all
    mine = (path / "recipe.yaml").read_text(encoding="utf-8") if os.environ["RANK"] == "0" else None
    return _stage(stage, str(path), _share(mine))


def _stage(stage: str, path: str, text: str) -> int:
    """Run the stage; 0, or 128 + the signal that stopped it. Raises AlignError."""
    import torch
    import yaml
    from rich.console import Console

    from align_cli.stages.job import Job

    recipe, run_directory = from_tree(stage, yaml.safe_load(text)), RunDirectory(path)
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if ranks == 1 and deepspeed_config(recipe.zero) is not None:
        # DeepSpeed wants a process group even alone, and would ask MPI for one
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(launch.free_port())
        _join()
    if rank != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one voice: libraries print on every rank
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif ranks > 1:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not torch.cuda.is_available():
        from align_cli.model import attention, head

        head.put_in_place()
        attention.put_in_place()
        heap.keep_freed()
    chat_date.use(recipe.data.date)
    started, made = manifest.now(), batch.arithmetic(stage, recipe, ranks)
    job = Job(
        recipe=recipe,
        run=run_directory,
        dtype=footprint.resolve_dtype(recipe),
        per_device=made.per_device,
        accumulation=made.accumulation,
        rank=rank,
        ranks=ranks,
        console=Console(stderr=False),
        cache=prepare.CACHE,
        base=recipe.model.path,
    )
    _merge_adapter_parents(job)
    outcome = importlib.import_module(f"align_cli.stages.{stage}").run(job)
    if outcome.stopped_by is not None:
        job.say(f"stopped; {path} resumes with the same command")
        _leave(ranks)
        return 128 + outcome.stopped_by
    if rank == 0:
        for merged in _merged_parents(job, recipe):
            shutil.rmtree(merged, ignore_errors=True)
        manifest.write(
            run_directory,
            stage=stage,
            name=recipe.name,
            seed=recipe.seed,
            parents=_parents(recipe) + outcome.parents,
            data=[count.as_manifest() for count in outcome.counts],
            metrics=outcome.metrics,
            world_size=ranks,
            zero_stage=recipe.zero.stage,
            started=started,
            extra=outcome.extra | _code(recipe) | ({"template_date": date} if (date := recipe.data.date) else {}),
        )
        job.say(f"finished: {path}")
    _leave(ranks)
    return 0


def _leave(ranks: int) -> None:
    """End together: the launcher kills the ranks that are left when one has gone with a code other than 0."""
    import torch

    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _merge_adapter_parents(job: Any) -> None:
    """An adapter as parent is merged into this run's `base/`, so that policy, reference and any new adapter start
    from the model it stands for; a reference taken from its base would give loss 0 and accuracy 1."""
    from align_cli.model import kind, lora

    recipe = job.recipe
    wanted = {"base": recipe.model.path}
    if getattr(recipe, "reference", None) is not None:
        job.reference = recipe.reference.path
        wanted["reference"] = recipe.reference.path
    for role, path in wanted.items():
        if kind.look(path).kind != "adapter":
            continue
        merged = job.run.path / role
        if job.main and not merged.is_dir():
            job.say(f"merging the adapter {path} into its base")
            lora.merge(path, merged, trust_remote_code=recipe.model.trust_remote_code)
        setattr(job, role, str(merged))
    if job.ranks > 1:
        import torch

        torch.distributed.barrier()


def _merged_parents(job: Any, recipe: Any) -> list[Path]:
    """Merged parents that the finished run does not need: all but the base of an adapter that was trained on it."""
    needed = {job.base} if recipe.lora else set()
    return [job.run.path / role for role in ("base", "reference") if str(job.run.path / role) not in needed]


def _parents(recipe: Any) -> list[dict[str, Any]]:
    entries = [manifest.parent("policy", recipe.model.path)]
    for role in preflight.OTHERS:
        if getattr(recipe, role, None) is not None:
            entries.append(manifest.parent(role, getattr(recipe, role).path))
    for key, path in rewards.reward_models(to_tree(recipe)):
        entries.append(manifest.parent(key.split("[")[0].split(".")[0], path))
    for role in ("writer", "feedback"):
        if (speaker := getattr(recipe, role, None)) is not None and speaker.path:
            entries.append(manifest.parent(role, speaker.path))
    judges = [source.judge.path for _, source in rewards.judges(to_tree(recipe)) if source.judge.path]
    entries += [manifest.parent("judge", path) for path in judges]
    sources = recipe.data.train + (recipe.data.eval if isinstance(recipe.data.eval, list) else [])
    for more in ("harmless", "helpful"):
        sources = sources + (getattr(recipe.method, more, None) or [])
    rows = getattr(recipe.method, "rows", None)
    runs = dict.fromkeys(run for source in sources if (run := manifest.run_of(source.path)))
    runs |= {run: None for run in [rows and manifest.run_of(f"{rows}/answers.jsonl")] if run}
    return entries + [manifest.parent("data", run) for run in runs]


def _code(recipe: Any) -> dict[str, Any]:
    """The Python functions that were rewards, by the hash of their files."""
    entries = [function.fingerprint(entry) for _, entry in rewards.functions(to_tree(recipe))]
    return {"code": entries} if entries else {}


def _join() -> None:
    """Form the process group that all later libraries find and use."""
    import torch

    if not torch.distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))


def _share(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    import torch

    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def _end_with_parent() -> None:
    """End this rank when the command that started it is gone."""
    host, _, pid = os.environ.get(launch.PARENT, "").rpartition(":")
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
    launch.quiet_environment()
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
    # the run is over and written; threads that libraries left behind would abort the interpreter's own way out
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
