"""The sections of `align cai`: writer, judge, sampling and phases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.generation import GeneratorSource, OptionalGenerator
from align_cli.recipe.sections import Count, Fraction, Recipe, Source, Sources, section
from align_cli.recipe.stages import RowKind

PHASES = ("answers", "revisions", "train", "pairs", "preferences")
"""The phases in the order in which they run."""
NEEDS_PHASE = {"revisions": "answers", "train": "revisions", "preferences": "pairs"}
"""Phase -> the phase whose rows it reads."""

LOST = ("empty", "unparsable", "copied", "too_long")
"""Flags of an unusable revision: the previous answer is kept, and the revision is not trained on."""


@section
class CaiGeneration:
    """How answers, critiques, revisions and the two answers of a pair are sampled."""

    max_new_tokens: Count = 256
    """Maximum length of an answer or a revision, in tokens."""
    max_critique_tokens: Count | None = None
    """Maximum length of a critique and of a judge's reasoning, in tokens; null: same as max_new_tokens."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits; 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens whose total probability reaches top_p; 1.0 uses all tokens."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the top_k most probable tokens; 0 uses all tokens. Local models only."""
    batch: Count = 32
    """Prompts per batch of a local model on each device, grouped by length; rows are saved after each batch."""

    def critique_limit(self) -> int:
        """Maximum tokens of a critique or of a judge's reasoning."""
        return self.max_critique_tokens or self.max_new_tokens


def _as_phases(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Phase = Literal["answers", "revisions", "train", "pairs", "preferences"]


@section
class CaiMethod:
    """Constitutional AI (arXiv 2212.08073): critiques and revisions (SL-CAI), then labels from AI feedback."""

    constitution: str = "default"
    """A YAML file of principles, or the name of a file in recipes/constitution."""
    phases: Annotated[list[Phase], BeforeValidator(_as_phases, json_schema_input_type=Phase | list[Phase])] = Field(
        default_factory=lambda: list(PHASES), min_length=1
    )
    """Phases to run, in this order: answers (initial answers), revisions (alternating critiques and revisions), train
    (the SL-CAI model), pairs (two answers per prompt), preferences (labels from the judge)."""
    rows: str | None = None
    """A directory, such as a finished cai run, whose answers.jsonl, revisions.jsonl and pairs.jsonl replace the phases
    that are not run. The files may have been edited by hand."""
    revisions: Count = 4
    """Number of critique and revision steps per answer, each with a newly drawn principle."""
    examples: Annotated[int, Field(ge=0)] | None = None
    """Number of the constitution's example dialogues in the prompt of a critique or a revision; null: all."""
    harmless: Sources | None = None
    """Prompts that look harmful but are harmless. They go through every phase, with the principles for harmless
    prompts, and refusals among their answers are counted."""
    helpful: Sources | None = None
    """Helpful demonstrations that are added to the revisions for training."""
    train_on: Literal["all", "last"] = "all"
    """Which revisions of an answer to train on."""
    drop_refusals: bool = False
    """Do not train on revisions that refuse a harmless prompt; otherwise a writer that over-refuses teaches it."""
    pairs: Literal["sampled", "revised"] = "sampled"
    """sampled: two answers of the SL-CAI model; revised: the initial answer and its last revision."""
    judge: bool = True
    """Whether a judge labels the pairs. false: the revision is labelled better, which requires pairs=revised."""
    chain_of_thought: bool = False
    """Let the judge reason before it answers."""
    clamp: Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None = None
    """[low, high] bounds on the judge's probability for each order. null: [0.4, 0.6] with chain_of_thought, because
    probabilities after reasoning are near 0 or 1, and no bounds otherwise."""
    warn_above: Fraction = 0.1
    """Fraction of weak rows above which the run warns: empty, unparsable, copied or unchanged revisions, refusals of
    harmless prompts, and judgements that choose the same letter in both orders."""

    def rules(self) -> Iterator[tuple[str, str]]:
        wanted = list(self.phases)
        if wanted != [phase for phase in PHASES if phase in wanted]:
            yield "method.phases", f"is out of order or has duplicates; the order is {', '.join(PHASES)}"
        for phase in wanted:
            before = NEEDS_PHASE.get(phase)
            if before and before not in wanted and self.rows is None:
                yield "method.phases", f"{phase} reads the output of {before}; add {before}, or set method.rows"
        if "pairs" in wanted and self.pairs == "revised" and "revisions" not in wanted and self.rows is None:
            yield "method.phases", "pairs=revised reads the output of revisions; add revisions, or set method.rows"
        if not self.judge and self.pairs != "revised":
            yield "method.judge", "false labels the revision as better; set method.pairs=revised"
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            yield "method.clamp", f"is {self.clamp}; give the lower bound first, such as [0.4, 0.6]"


@section
class CaiRecipe(Recipe):
    """align cai"""

    stage: ClassVar[str] = "cai"
    method: CaiMethod = Field(default_factory=CaiMethod)
    generation: CaiGeneration = Field(default_factory=CaiGeneration)
    writer: OptionalGenerator = None
    """Generates initial answers, critiques and revisions. Default: the initial model."""
    feedback: OptionalGenerator = None
    """Judges pairs. Default: the trained model, or the initial model if the train phase is not run."""

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
                "is 0, but two greedy answers are the same; set it above 0, or method.pairs=revised",
            )
        if generation.max_new_tokens >= data.max_length:
            yield (
                "generation.max_new_tokens",
                f"is {generation.max_new_tokens} and leaves no room for a prompt in data.max_length="
                f"{data.max_length}; raise data.max_length or lower it",
            )
        if isinstance(data.eval, list):
            yield "data.eval", "must be a fraction in cai; set the fraction of prompts whose revisions are held out"
        if data.streaming:
            yield "data.streaming", "does not work in cai, which saves rows one by one; remove it"
