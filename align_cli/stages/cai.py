"""align cai: Constitutional AI, from red-team prompts to a preference set, every step on record.

    align cai recipe=demo.yaml

arXiv 2212.08073. First answers, then critique and revision under a principle drawn anew each time (answers.jsonl,
revisions.jsonl); training on the revisions mixed with helpful data (SL-CAI, the model at the run's root); two answers
a prompt from it (pairs.jsonl); labels from AI feedback, both orders averaged (preferences.jsonl). What follows is
`align rm` and `align ppo`, or `align dpo`, on those labels (RL-CAI).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from align_cli.data.count import of_constitution
from align_cli.data.groups import Count
from align_cli.data.load import fingerprint
from align_cli.errors import DataError
from align_cli.evaluate.refusals import is_refusal
from align_cli.methods import weakness
from align_cli.methods.critiques import usable
from align_cli.recipe import constitution
from align_cli.recipe.sections import Source
from align_cli.report import audit
from align_cli.run.directory import write_atomically
from align_cli.stages import labelling, revising, supervised
from align_cli.stages.job import Job, Outcome
from align_cli.stages.kept import Kept, Row, Stopped
from align_cli.stages.speakers import Speakers


def run(job: Job) -> Outcome:
    """Run the phases that the recipe names, in order. Returns metrics, row counts and what each phase came to."""
    kept = Kept(job)
    try:
        return _phases(job, kept)
    except Stopped as stopped:
        return Outcome({}, [], stopped.number)


def _phases(job: Job, kept: Kept) -> Outcome:
    method = job.recipe.method
    law, speakers = constitution.load(method.constitution), Speakers(job, kept)
    speakers.probe()
    _begin(job, kept, law)
    prompts, counts = revising.prompts(job)
    found, outcome, chains = {}, Outcome({}), None
    with kept.listening():
        if "answers" in method.phases:
            revising.answers(job, kept, speakers, prompts)
        if "revisions" in method.phases:
            revising.revisions(job, kept, speakers, law)
        speakers.rest()
        if (chains := kept.read("revisions")) is not None:
            found |= weakness.of_chains(chains, is_refusal)
            # before the model is trained on them
            _warn(job, weakness.warnings(found, method.warn_above))
    if "train" in method.phases:
        outcome = _train(job, kept, chains)
        if outcome.stopped_by is not None:
            return outcome
    with kept.listening():
        if "pairs" in method.phases:
            labelling.pairs(job, kept, speakers, prompts)
        if "preferences" in method.phases:
            labels, left_out = labelling.preferences(job, kept, speakers, law)
            found["labels"] = weakness.of_labels(labels, left_out)
            _warn(job, weakness.warnings({"labels": found["labels"]}, method.warn_above))
    speakers.rest()
    found["warnings"] = weakness.warnings(found, method.warn_above)
    record = {"path": law.path, "sha256": law.sha256, "principles": len(law.principles)}
    extra = {"constitution": record, "cai": found, "usage": speakers.usage()}
    if job.main:
        audit.write(job.run.path, extra)
        job.say(f"every chain and label can be read in {job.run.path / audit.FILE}")
    return Outcome(outcome.metrics, [*counts, *outcome.counts, of_constitution(law)], extra=extra)


def _warn(job: Job, lines: list[str]) -> None:
    for line in lines:
        job.say(f"weak: {line}")


def _begin(job: Job, kept: Kept, law: constitution.Constitution) -> None:
    """Refuse to go on with rows that were made from other prompts or principles; take the rows of phases left out."""
    recipe, file = job.recipe, job.run.path / ".began.json"
    sources = [*recipe.data.train, *(recipe.method.harmless or [])]
    today = {law.path: law.sha256} | {source.path: fingerprint(source) for source in sources}
    before = kept.share(json.loads(file.read_text()) if job.main and file.is_file() else None)
    changed = [path for path in today if before is not None and before.get(path) != today[path]]
    if changed:
        raise DataError(
            f"{changed[0]}: has changed since {job.run.path} began; put it back to finish that run, or start anew with "
            "force=true"
        )
    if job.main:
        write_atomically(file, json.dumps(today))
        shutil.copyfile(law.path, job.run.path / audit.LAW)
        for phase in ("answers", "revisions", "pairs") if recipe.method.rows else ():
            given = Path(recipe.method.rows) / f"{phase}.jsonl"
            if phase not in recipe.method.phases and given.is_file() and not kept.file(phase).is_file():
                shutil.copyfile(given, kept.file(f".{phase}"))
                kept.file(f".{phase}").replace(kept.file(phase))
    kept.share(None)


def _train(job: Job, kept: Kept, chains: list[Row]) -> Outcome:
    """SL-CAI: supervised training on the revisions, mixed with helpful data. Done once, however often it is resumed."""
    method, mark = job.recipe.method, job.run.path / ".trained.json"
    done = kept.share(json.loads(mark.read_text()) if job.main and mark.is_file() else None)
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
            f"{kept.file('revisions')}: no revision can be trained on; every one is empty or unparsable, so name a "
            "larger writer"
        )
    kept.write("demonstrations", rows)
    sources = [Source(path=str(kept.file("demonstrations")), format="prompt-completion"), *(method.helpful or [])]
    recipe = replace(job.recipe, data=replace(job.recipe.data, train=sources))
    outcome = supervised.run(replace(job, recipe=recipe))
    if outcome.stopped_by is None and job.main:
        kept_counts = [asdict(count) for count in outcome.counts]
        write_atomically(mark, json.dumps({"metrics": outcome.metrics, "counts": kept_counts}))
    kept.share(None)
    return outcome
