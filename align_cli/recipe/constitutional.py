"""The sections of `align cai`: who writes, who judges, how answers are sampled, and what each phase does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.generation import GeneratorSource, OptionalGenerator
from align_cli.recipe.sections import Count, Fraction, Recipe, Source, Sources, section
from align_cli.recipe.stages import RowKind

PHASES = ("answers", "revisions", "train", "pairs", "preferences")
"""In the order in which they run."""
NEEDS_PHASE = {"revisions": "answers", "train": "revisions", "preferences": "pairs"}
"""Phase -> the one whose rows it reads."""

LOST = ("empty", "unparsable", "copied", "too_long")
"""Flags of a revision that says nothing of its own: the answer before stands then, and nothing is trained on."""


@section
class CaiGeneration:
    """How answers, critiques, revisions and the two answers of a pair are sampled."""

    max_new_tokens: Count = 256
    """Longest answer or revision, in tokens."""
    max_critique_tokens: Count | None = None
    """Longest critique, and longest reasoning of a judge; null: as max_new_tokens."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits; 0 takes the most probable token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that holds so much probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from so many most probable tokens; 0 from all. Local models only."""
    batch: Count = 32
    """Prompts of like length that a local model answers at a time on a device; rows are kept as their batch is done."""

    def critique_limit(self) -> int:
        """Tokens of a critique, or of a judge's reasoning, at most."""
        return self.max_critique_tokens or self.max_new_tokens


def _as_phases(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Phase = Literal["answers", "revisions", "train", "pairs", "preferences"]


@section
class CaiMethod:
    """Constitutional AI (arXiv 2212.08073): critiques and revisions (SL-CAI), then labels from AI feedback."""

    constitution: str = "default"
    """A YAML file of principles, or the name of one in recipes/constitution."""
    phases: Annotated[list[Phase], BeforeValidator(_as_phases, json_schema_input_type=Phase | list[Phase])] = Field(
        default_factory=lambda: list(PHASES), min_length=1
    )
    """What is done, in this order: answers (first answers), revisions (critique and revision, in turn), train (the
    SL-CAI model), pairs (two answers a prompt), preferences (the judge's labels)."""
    rows: str | None = None
    """A directory, such as a finished cai run, whose files stand for the phases left out: its answers.jsonl,
    revisions.jsonl and pairs.jsonl, which may have been edited by hand."""
    revisions: Count = 4
    """How often each answer is criticised and revised, a principle drawn anew each time."""
    examples: Annotated[int, Field(ge=0)] | None = None
    """How many of the constitution's dialogues are shown before a critique or a revision; null: all."""
    harmless: Sources | None = None
    """Prompts that look alarming and are not. They go through every phase, under principles of their own, and refusals
    among their answers are counted."""
    helpful: Sources | None = None
    """Helpful demonstrations that the revisions are mixed with in training."""
    train_on: Literal["all", "last"] = "all"
    """Which revisions of a chain are trained on."""
    drop_refusals: bool = False
    """Do not train on revisions that refuse a harmless prompt: a writer that refuses too much teaches it otherwise."""
    pairs: Literal["sampled", "revised"] = "sampled"
    """sampled: two answers of the SL-CAI model; revised: the first answer and its last revision."""
    judge: bool = True
    """Whether pairs are judged. false: the revision is the better one, which needs pairs=revised."""
    chain_of_thought: bool = False
    """Let the judge reason before it chooses."""
    clamp: Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None = None
    """Bounds for the probability that each order gives; null: 0.4 to 0.6 after reasoning, since what is reasoned
    comes out near 0 or 1, and none otherwise."""
    warn_above: Fraction = 0.1
    """Share of weak rows (empty, unparsable, copied or unchanged revisions, refusals of harmless prompts, judges that
    always choose the same letter) above which the run warns."""

    def rules(self) -> Iterator[tuple[str, str]]:
        wanted = list(self.phases)
        if wanted != [phase for phase in PHASES if phase in wanted]:
            yield "method.phases", f"is out of order or repeats itself; the order is {', '.join(PHASES)}"
        for phase in wanted:
            before = NEEDS_PHASE.get(phase)
            if before and before not in wanted and self.rows is None:
                yield "method.phases", f"{phase} reads what {before} writes; add {before}, or set method.rows"
        if "pairs" in wanted and self.pairs == "revised" and "revisions" not in wanted and self.rows is None:
            yield "method.phases", "pairs=revised reads what revisions writes; add revisions, or set method.rows"
        if not self.judge and self.pairs != "revised":
            yield "method.judge", "false takes the revision as the better answer; set method.pairs=revised"
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            yield "method.clamp", f"is {self.clamp}; give the lower bound first, such as [0.4, 0.6]"


@section
class CaiRecipe(Recipe):
    """align cai"""

    stage: ClassVar[str] = "cai"
    method: CaiMethod = Field(default_factory=CaiMethod)
    generation: CaiGeneration = Field(default_factory=CaiGeneration)
    writer: OptionalGenerator = None
    """Writes first answers, critiques and revisions; default: the model as it starts."""
    feedback: OptionalGenerator = None
    """Judges pairs; default: the trained model, or the starting one if nothing was trained."""

    def earlier_rows(self) -> str | None:
        return self.method.rows

    def generators(self) -> list[tuple[str, GeneratorSource]]:
        named = (("writer", self.writer), ("feedback", self.feedback))
        return [(key, source) for key, source in named if source is not None]

    def method_sources(self) -> list[tuple[str, list[Source], RowKind]]:
        method = self.method
        prompts = [("method.harmless", method.harmless, "prompts")] if method.harmless else []
        return prompts + ([("method.helpful", method.helpful, "demonstrations")] if method.helpful else [])

    def rules(self) -> Iterator[tuple[str, str]]:
        for key, source in self.generators():
            yield from source.problems(key)
        method, data, generation = self.method, self.data, self.generation
        if generation.temperature == 0 and "pairs" in method.phases and method.pairs == "sampled":
            yield (
                "generation.temperature",
                "is 0, and two greedy answers are the same; set it above 0, or method.pairs=revised",
            )
        if generation.max_new_tokens >= data.max_length:
            yield (
                "generation.max_new_tokens",
                f"is {generation.max_new_tokens} and leaves no room for a prompt in data.max_length="
                f"{data.max_length}; raise data.max_length or lower it",
            )
        if isinstance(data.eval, list):
            yield "data.eval", "must be a fraction in cai: the share of prompts whose revisions are held out"
        if data.streaming:
            yield "data.streaming", "does not work in cai, whose rows are kept one by one; remove it"
