"""Start of an `align cai` run, and SL-CAI: supervised training on the revisions (arXiv 2212.08073, §3)."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from align_cli import distributed
from align_cli.constitutional import audit
from align_cli.constitutional.critiques import usable
from align_cli.constitutional.refusals import is_refusal
from align_cli.data.groups import Count
from align_cli.data.load import fingerprint
from align_cli.errors import DataError
from align_cli.recipe.constitution import Constitution
from align_cli.recipe.constitutional import CaiRecipe
from align_cli.recipe.sections import Source
from align_cli.run.directory import write_atomically
from align_cli.training import supervised
from align_cli.training.job import Job, Outcome
from align_cli.training.journal import Row, RowJournal


def begin(job: Job[CaiRecipe], journal: RowJournal, constitution: Constitution) -> None:
    """Copy the constitution, and the given rows of skipped phases, into the run directory.

    Raises DataError if prompts or principles have changed since the existing rows were made.
    """
    distributed.from_rank_0(lambda: _begin(job, journal, constitution))


def _begin(job: Job[CaiRecipe], journal: RowJournal, constitution: Constitution) -> None:
    recipe, file = job.recipe, job.run.path / ".began.json"
    sources = [*recipe.data.train, *(recipe.method.harmless or [])]
    today = {constitution.path: constitution.sha256} | {source.path: fingerprint(source) for source in sources}
    before = json.loads(file.read_text()) if file.is_file() else today
    changed = [path for path in today if before.get(path) != today[path]]
    if changed:
        raise DataError(
            f"{changed[0]}: has changed since {job.run.path} began; put it back to finish that run, or start anew with "
            "force=true"
        )
    write_atomically(file, json.dumps(today))
    shutil.copyfile(constitution.path, job.run.path / audit.CONSTITUTION)
    for phase in ("answers", "revisions", "pairs") if recipe.method.rows else ():
        given = Path(recipe.method.rows) / f"{phase}.jsonl"
        if phase not in recipe.method.phases and given.is_file() and not journal.file(phase).is_file():
            shutil.copyfile(given, journal.file(f".{phase}"))
            journal.file(f".{phase}").replace(journal.file(phase))


def on_revisions(job: Job[CaiRecipe], journal: RowJournal, chains: list[Row]) -> Outcome:
    """Train on the revisions, mixed with helpful data. A resumed run skips this once it is done."""
    method, mark = job.recipe.method, job.run.path / ".trained.json"
    done = distributed.broadcast(json.loads(mark.read_text()) if job.main and mark.is_file() else None)
    if done is not None:
        return Outcome(done["metrics"], [Count(**count) for count in done["counts"]])
    steps = [
        (row, step["revision"])
        for row in chains
        for step in (row["chain"] if method.train_on == "all" else row["chain"][-1:])
        if usable(step["revision_flag"])
    ]
    rows, refused = [], 0
    for row, text in steps:
        if method.drop_refusals and row["kind"] == "harmless" and is_refusal(text):
            refused += 1
        else:
            rows.append({"row": row["row"], "prompt": row["prompt"], "completion": text})
    if refused:
        job.say(f"{refused} revisions refuse a harmless prompt and are not trained on (method.drop_refusals)")
    if not rows:
        raise DataError(
            f"{journal.file('revisions')}: no revision can be trained on, since all are empty or unparsable; use a "
            "larger writer"
        )
    journal.write("demonstrations", rows)
    sources = [Source(path=str(journal.file("demonstrations")), format="prompt-completion"), *(method.helpful or [])]
    recipe = replace(job.recipe, data=replace(job.recipe.data, train=sources))
    outcome = supervised.run(replace(job, recipe=recipe))
    if outcome.stopped_by is None and job.main:
        counts = [asdict(count) for count in outcome.counts]
        write_atomically(mark, json.dumps({"metrics": outcome.metrics, "counts": counts}))
    distributed.barrier()
    return outcome
