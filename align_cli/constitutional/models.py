"""The models of `align cai`: writer, policy and judge. Only one is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from align_cli.generation.generators import Generator, LocalGenerator, Spend, check_endpoints, from_source
from align_cli.model.zero import load_whole_from_now_on
from align_cli.recipe.constitutional import CaiRecipe
from align_cli.recipe.generation import GeneratorSource
from align_cli.recipe.sections import Model
from align_cli.training.job import Job
from align_cli.training.journal import RowJournal
from align_cli.training.placement import release


class Models:
    """The writer, the policy that answers the pairs, and the judge. Each is loaded on first use."""

    def __init__(self, job: Job[CaiRecipe], journal: RowJournal):
        self.job, self.journal = job, journal
        self.loaded: dict[str, Generator] = {}

    def check_endpoints(self) -> None:
        """As `generators.check_endpoints`, for writer and judge."""
        check_endpoints(self.job.recipe.generators())

    @property
    def writer(self) -> Generator:
        """Writes first answers, critiques and revisions."""
        return self._generator("writer", self.job.recipe.writer, lambda: self._start)

    @property
    def policy(self) -> Generator:
        """Samples the two answers of a pair: the trained model, or the initial model without a train phase."""
        return self._trained if "train" in self.job.recipe.method.phases else self._start

    @property
    def judge(self) -> Generator:
        """Compares the two answers of a pair."""
        return self._generator("feedback", self.job.recipe.feedback, lambda: self.policy)

    @property
    def _start(self) -> Generator:
        return self._once("model", lambda spend: self._local(self.job.recipe.model, self.job.base, spend))

    @property
    def _trained(self) -> Generator:
        path = str(self.job.run.path)
        # the saved tokenizer already has the chat template
        model = replace(self.job.recipe.model, path=path, chat_template=None)
        return self._once("trained", lambda spend: self._local(model, path, spend))

    def _generator(self, key: str, source: GeneratorSource | None, default: Callable[[], Generator]) -> Generator:
        if source is None:
            return default()
        settings, dtype = self.job.recipe.generation, self.job.precision.generator
        return self._once(key, lambda spend: from_source(source, key, settings, spend, dtype=dtype, say=self.job.say))

    def _local(self, model: Model, path: str, spend: Spend) -> Generator:
        return LocalGenerator(model, path, self.job.recipe.generation, spend, dtype=self.job.precision.generator)

    def _once(self, name: str, make: Callable[[Spend], Generator]) -> Generator:
        if name not in self.loaded:
            self.unload()
            load_whole_from_now_on()
            self.loaded[name] = make(lambda used: self.journal.spend(name, used))
        return self.loaded[name]

    def unload(self) -> None:
        """Free the memory of the models that are loaded."""
        self.loaded.clear()
        release()

    def usage(self) -> dict[str, Any]:
        """Usage of each model over all attempts of this run, and its cost at the recipe's price."""
        totals: dict[str, Any] = self.journal.spent()
        for key, source in self.job.recipe.generators():
            if key not in totals:
                continue
            where = {"endpoint": source.endpoint, "model": source.model} if source.endpoint else {"path": source.path}
            cost = source.cost(totals[key])
            totals[key] |= where | ({} if cost is None else {"cost": cost})
        return totals
