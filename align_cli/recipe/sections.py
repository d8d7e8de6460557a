"""The sections that every stage's recipe may have: one frozen dataclass each, a docstring under every field.

Cross-field rules stand beside the fields they concern (`rules`), and their messages name the fix. Rules that need
the disk (an upstream run, a data file) are in `run/preflight.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from align_cli.recipe.formats import COLUMNS
from align_cli.recipe.stages import STAGES, RowKind, StageSpec

if TYPE_CHECKING:
    from align_cli.recipe.generation import GeneratorSource
    from align_cli.recipe.rewards import RewardSource

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
section = dataclass(config=STRICT, frozen=True, kw_only=True)

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


@section
class Model:
    """What is trained."""

    path: str
    """A directory, a finished run (`${stage:sft}`) or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory. auto: float32 where they are trained in full, bfloat16 under LoRA."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Attention implementation; auto leaves the choice to transformers."""
    chat_template: str | None = None
    """`chatml`, `zephyr`, `plain`, or a path to a Jinja file; null keeps the tokenizer's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless the recipe says so."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    parameters: Positive | None = None
    """Number of parameters, for planning where the weights are not at hand."""


@section
class OtherModel:
    """A model beside the one that is trained."""

    path: str
    """A directory, a finished run or a hub id."""


@section
class Source:
    """Where rows come from."""

    path: str
    """A .json, .jsonl, .csv, .tsv or .parquet file, also compressed (.gz, .bz2, .xz, .zst); a glob of them; a directory
    that holds them, or that `save_to_disk` wrote; or a hub id."""
    split: str = "train"
    """Split of a hub id or of a `datasets` directory that holds several."""
    weight: Positive = 1.0
    """Share of the source's rows in an epoch: 0.5 takes a seeded half, 2 takes every row twice."""
    format: Literal[*COLUMNS] | None = None
    """Row format; null recognises it from the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: {our column: their column}, for files whose columns have other names; `completions[].response` reaches
    into a list of objects. `better` names the column that says which of two answers is the better one."""


def as_source(value: Any) -> Any:
    """A path becomes a mapping."""
    return {"path": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    """A path or a mapping or a list of them becomes a list of mappings."""
    if isinstance(value, (str, dict)):
        value = [value]
    if isinstance(value, list):
        return [{"path": entry} if isinstance(entry, str) else entry for entry in value]
    return value


def _as_sources_or_fraction(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else _as_sources(value)


Sources = Annotated[
    list[Source],
    Field(min_length=1),
    BeforeValidator(_as_sources, json_schema_input_type=str | Source | list[str | Source]),
]
EvalSources = Annotated[
    float | list[Source] | None,
    BeforeValidator(_as_sources_or_fraction, json_schema_input_type=float | str | Source | list[str | Source] | None),
]


@section
class Data:
    """What it is trained on."""

    train: Sources
    """A source or a list of sources."""
    eval: EvalSources = None
    """Sources, or a fraction of the training prompts that is held out by a seeded hash of their content."""
    max_length: Count = 1024
    """Tokens of prompt and response together; what is longer is cut at the end and counted."""
    max_prompt_length: Count | None = None
    """Tokens of the prompt; rows with a longer one are dropped and counted. null: any that leaves room to respond."""
    drop_empty: bool | None = None
    """Drop rows with an empty response instead of refusing the file. null: only in hh-rlhf dialogues, whose
    published files hold some."""
    max_dropped: Fraction = 0.1
    """Share of rows that may be dropped before it is an error."""
    batch_size: Count | None = None
    """Rows an optimizer step, over all ranks; gradient accumulation follows from it. null: whatever
    trainer.per_device_train_batch_size and trainer.gradient_accumulation_steps give."""
    reasoning: Literal["keep", "drop"] = "keep"
    """What becomes of the thoughts of assistant turns, in a field of their own or between <think> marks. keep: they are
    trained as the chat template writes them. drop: they are taken out first."""
    date: str | None = None
    """The date, as 2026-01-31, that a chat template which asks for today's is given. null: the day on which the run
    began, kept in its recipe.yaml."""
    streaming: bool = False
    """Read rows as they are needed, for sources larger than memory. Needs trainer.max_steps."""

    def rules(self) -> Iterator[tuple[str, str]]:
        try:
            date.fromisoformat(self.date or "2026-01-31")
        except ValueError:
            yield "data.date", f"{self.date!r} is not a date; write it as 2026-01-31"


@section
class Lora:
    """Low-rank adapters on a frozen base (arXiv 2106.09685)."""

    r: Count = 16
    """Rank."""
    alpha: Positive = 16
    """Scale; the update is multiplied by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: str | list[str] = "all-linear"
    """Module names, or all-linear."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if "lm_head" in ([self.targets] if isinstance(self.targets, str) else self.targets):
            yield (
                "lora.targets",
                "names lm_head, whose adapter the log-probabilities would pass by; leave it out",
            )


@section
class Zero:
    """DeepSpeed ZeRO: what is sharded over the ranks (arXiv 1910.02054)."""

    stage: Literal[0, 1, 2, 3] = 0
    """0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory."""
    offload_param: bool = False
    """Keep parameters in host memory; stage 3 only."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed keys, as in its JSON config; they win over ours."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.offload_param and self.stage != 3:
            yield "zero.offload_param", "needs stage 3; set zero.stage=3 or zero.offload_param=false"


@section
class Launch:
    """Processes and hosts."""

    num_gpus: Count = 1
    """Ranks on this machine; CPU ranks over gloo without a GPU."""
    hostfile: str | None = None
    """DeepSpeed hostfile: `host slots=8` a line."""
    num_nodes: Count | None = None
    """Use only the first so many hosts of the hostfile."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """Start only this host's ranks, without ssh: one `align` command on each host."""
    master_addr: str | None = None
    """Address of rank 0; default the first host."""
    master_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of rank 0; default a free one, or 29500 over several hosts."""


@section
class Samples:
    """Prompts answered before and after, into samples.jsonl."""

    prompts: str | list[str]
    """A file with a `prompt` column, or the prompts themselves."""
    max_new_tokens: Count = 64
    """Longest answer, in tokens. Answers are greedy, so that before and after can be compared."""


def as_samples(value: Any) -> Any:
    return {"prompts": value} if isinstance(value, (str, list)) else value


@plain_dataclass(frozen=True)
class Rollout:
    """How a stage that samples uses its episodes."""

    k: int
    """Samples a prompt."""
    minibatches: int
    """Optimizer steps a pass."""
    epochs: int
    """Passes over a rollout."""


@section
class Recipe:
    """A stage's settings after composition: the keys every stage has, and what follows from them.

    The methods answer what differs by stage and depends on the settings; what is fixed stands in `stages.STAGES`.
    """

    stage: ClassVar[str]
    """Its name in `stages.STAGES`."""

    name: str
    """Run name; default the recipe file's."""
    model: Model
    data: Data
    seed: Annotated[int, Field(ge=0)] = 42
    """Seeds data order, splits, adapters and sampling."""
    run_dir: str
    """Where the run's files go; default runs/<name>/<stage>."""
    force: bool = False
    """Run again even if a finished, unchanged run exists."""
    lora: Lora | None = None
    zero: Zero = Field(default_factory=Zero)
    launch: Launch = Field(default_factory=Launch)
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Any field of the stage's TRL config, checked against it."""
    samples: Annotated[
        Samples | None, BeforeValidator(as_samples, json_schema_input_type=str | list[str] | Samples | None)
    ] = None

    @property
    def spec(self) -> StageSpec:
        """What is fixed about its stage."""
        return STAGES[self.stage]

    def row_kind(self) -> RowKind:
        """What the rows of data.train hold."""
        return self.spec.rows

    def pairing(self) -> str:
        """How many pairs, or labelled responses, a ranking gives: a value of method.pairs or method.split."""
        return "best-worst"

    def packs(self) -> bool:
        """Whether several rows share one sequence, so that steps are unknown before the rows are tokens."""
        return False

    def rollout(self) -> Rollout | None:
        """How episodes are used, for stages that sample while they train."""
        return None

    def micro_step(self, per_device: int) -> tuple[int, int | None]:
        """(rows, tokens a row) that go through the model at a time; None for the device's default."""
        return per_device, self.data.max_length

    def unused_keys(self) -> frozenset[str]:
        """Keys of `method` that this recipe's other settings leave without effect."""
        return frozenset()

    def batch_problems(self, per_device: int, ranks: int) -> Iterator[tuple[str, str]]:
        """(key, problem) of a batch that gives each of so many ranks so many rows at a time."""
        return iter(())

    def alternative(self) -> Recipe | None:
        """The same recipe with its models placed otherwise, whose memory the plan shows, too."""
        return None

    def earlier_rows(self) -> str | None:
        """A directory of an earlier run whose rows are used again."""
        return None

    # -- models beside the one that is trained

    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return False

    def reference_path(self) -> str | None:
        """The reference that the recipe names; None for the policy as it starts."""
        return None

    def copies(self, role: str) -> int:
        """How many models of a role (`stages.Role`) have weights of their own in memory."""
        if role == "reference":
            # under LoRA the reference is the policy with its adapter off
            return int(self.needs_reference() and (self.lora is None or self.reference_path() is not None))
        return int(role == "policy")

    def adapters(self) -> int:
        """LoRA adapters that are trained."""
        return 1 if self.lora else 0

    def reward_sources(self) -> list[tuple[str, RewardSource]]:
        """(key, source) of every reward that is optimised."""
        return []

    def reward_models(self) -> list[tuple[str, str]]:
        """(key, path) of every reward model that is named: rewards, the value function's start, the gold model."""
        return [(f"{key}.path", source.path) for key, source in self.reward_sources() if source.path is not None]

    def backbone_models(self) -> list[tuple[str, str]]:
        """(key, path) of reward models that must be adapters on the policy's own backbone."""
        return []

    def reward_functions(self) -> list[tuple[str, str]]:
        """(key, module:function) of every Python function that is a reward."""
        return [(f"{key}.python", source.python) for key, source in self.reward_sources() if source.python is not None]

    def compared_columns(self) -> list[str]:
        """Columns of the data that rewards compare responses with."""
        return list(dict.fromkeys(source.verify.column for _, source in self.reward_sources() if source.verify))

    def judges(self) -> list[tuple[str, RewardSource]]:
        """(key, source) of every reward that is a judge's."""
        return [(key, source) for key, source in self.reward_sources() if source.judge is not None]

    def generators(self) -> list[tuple[str, GeneratorSource]]:
        """(key, source) of every model that writes or judges, the judges of rewards aside."""
        return []

    def method_sources(self) -> list[tuple[str, list[Source], RowKind]]:
        """(key, sources, row kind) of data that `method` names beside `data`."""
        return []
