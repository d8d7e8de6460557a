"""align cai: Constitutional AI, from red-team prompts to a preference set; every step is recorded.

    align cai recipe=demo.yaml

arXiv 2212.08073. The phases are: first answers (answers.jsonl); critiques and revisions, each with a randomly drawn
principle (revisions.jsonl); training on the revisions mixed with helpful data (SL-CAI, the model in the run directory);
two answers per prompt from that model (pairs.jsonl); labels from AI feedback, averaged over both orders of the answers
(preferences.jsonl). Continue with `align rm` and `align ppo`, or `align dpo`, on those labels (RL-CAI).
"""

from __future__ import annotations

from align_cli.constitutional import audit, labels, revisions, summary, training
from align_cli.constitutional.models import Models
from align_cli.constitutional.refusals import is_refusal
from align_cli.data.count import of_constitution
from align_cli.recipe import constitution
from align_cli.recipe.constitutional import CaiRecipe
from align_cli.training.job import Job, Outcome
from align_cli.training.journal import RowJournal
from align_cli.training.stop import Stopped


def run(job: Job[CaiRecipe]) -> Outcome:
    """Run the phases that the recipe names, in order. Returns metrics, row counts and a summary of each phase."""
    try:
        return _phases(job, RowJournal(job))
    except Stopped as stopped:
        return Outcome({}, [], stopped.number)


def _phases(job: Job[CaiRecipe], journal: RowJournal) -> Outcome:
    method = job.recipe.method
    principles, models = constitution.load(method.constitution), Models(job, journal)
    models.check_endpoints()
    training.begin(job, journal, principles)
    prompts, counts = revisions.prompts(job)
    figures, outcome = {}, Outcome({})
    with journal.listening():
        if "answers" in method.phases:
            revisions.answers(job, journal, models, prompts)
        if "revisions" in method.phases:
            revisions.revisions(job, journal, models, principles)
        models.unload()
        if (chains := journal.read("revisions")) is not None:
            figures |= summary.of_chains(chains, is_refusal)
            # warn before the model is trained on them
            _warn(job, summary.warnings(figures, method.warn_above))
    if "train" in method.phases:
        outcome = training.on_revisions(job, journal, chains)
        if outcome.stopped_by is not None:
            return outcome
    with journal.listening():
        if "pairs" in method.phases:
            labels.pairs(job, journal, models, prompts)
        if "preferences" in method.phases:
            kept, left_out = labels.preferences(job, journal, models, principles)
            figures["labels"] = summary.of_labels(kept, left_out)
            _warn(job, summary.warnings({"labels": figures["labels"]}, method.warn_above))
    models.unload()
    figures["warnings"] = summary.warnings(figures, method.warn_above)
    record = {"path": principles.path, "sha256": principles.sha256, "principles": len(principles.principles)}
    extra = {"constitution": record, "cai": figures, "usage": models.usage()}
    if job.main:
        audit.write(job.run.path, extra)
        job.say(f"report of chains and labels: {job.run.path / audit.FILE}")
    return Outcome(outcome.metrics, [*counts, *outcome.counts, of_constitution(principles)], extra=extra)


def _warn(job: Job[CaiRecipe], lines: list[str]) -> None:
    for line in lines:
        job.say(f"weak: {line}")
