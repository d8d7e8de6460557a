"""Recipe sections shared by all stages: one frozen dataclass each, with a docstring under every field.

Cross-field rules are next to the fields they concern (`rules`), and their messages name the fix. Rules that read the
disk (an upstream run, a data file) are in `run/preflight.py`.
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
    """The model to train."""

    path: str
    """A directory, a finished run (`${stage:sft}`) or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in memory. auto: float32 for full fine-tuning; with LoRA the type of the matrix products
    (`trainer.bf16`)."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Attention implementation; auto leaves the choice to transformers."""
    chat_template: str | None = None
    """`chatml`, `zephyr`, `plain`, or a path to a Jinja file; null keeps the tokenizer's own."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    parameters: Positive | None = None
    """Number of parameters, for the memory estimate when the weights are not available locally."""


@section
class OtherModel:
    """A model other than the trained one."""

    path: str
    """A directory, a finished run or a hub id."""


@section
class Source:
    """A data source."""

    path: str
    """A .json, .jsonl, .csv, .tsv or .parquet file, optionally compressed (.gz, .bz2, .xz, .zst); a glob; a
    directory of such files or one written by `save_to_disk`; or a hub id."""
    split: str = "train"
    """Split to read from a hub dataset or a `datasets` directory with several splits."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset that has several, such as `main` of openai/gsm8k."""
    data_dir: str | None = None
    """Read only this folder of a hub dataset or a directory, such as `harmless-base` of Anthropic/hh-rlhf."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset. null: its main branch."""
    weight: Positive = 1.0
    """Fraction of the source's rows used per epoch: 0.5 uses a seeded half, 2 uses every row twice."""
    format: Literal[*COLUMNS] | None = None
    """Row format; null detects it from the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column mapping {align's name: name in the file}. `completions[].response` reads a key of each object in a list.
    `better` maps to the column that tells which of two answers is better."""


def as_source(value: Any) -> Any:
    """A path becomes a mapping."""
    return {"path": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    """A path, a mapping or a list of them becomes a list of mappings."""
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
    """Training and evaluation data."""

    train: Sources
    """A source or a list of sources."""
    eval: EvalSources = None
    """Sources, or a fraction of the training prompts to hold out, chosen by a seeded hash of their content."""
    max_length: Count = 1024
    """Maximum tokens of prompt plus response; longer rows are truncated at the end and counted."""
    max_prompt_length: Count | None = None
    """Maximum tokens of the prompt; rows with longer prompts are dropped and counted. null: keep every prompt that
    leaves room for a response."""
    drop_empty: bool | None = None
    """Drop rows with an empty response instead of rejecting the file. null: only for hh-rlhf dialogues, whose
    published files contain some."""
    max_dropped: Fraction = 0.1
    """Fraction of rows that may be dropped; above it the run stops with an error."""
    batch_size: Count | None = None
    """Rows per optimizer step over all ranks (ppo, rloo, grpo: episodes per rollout), from which gradient accumulation
    is computed. null: the product of trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps and the
    number of ranks."""
    reasoning: Literal["keep", "drop"] = "keep"
    """How to treat the reasoning of assistant turns, in its own field or between <think> tags. keep: train on it as the
    chat template renders it. drop: remove it first."""
    date: str | None = None
    """Date (such as 2026-01-31) for chat templates that insert today's date. null: the day the run started, which is
    saved in its recipe.yaml."""
    streaming: bool = False
    """Read rows on demand, for sources larger than memory. Requires trainer.max_steps."""

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
                "includes lm_head, but log-probabilities would be computed without its adapter; remove it",
            )


@section
class Zero:
    """DeepSpeed ZeRO sharding (arXiv 1910.02054)."""

    stage: Literal[0, 1, 2, 3] = 0
    """What is sharded over the ranks. 0: nothing; 1: optimizer state; 2: also gradients; 3: also parameters."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory."""
    offload_param: bool = False
    """Keep parameters in host memory; stage 3 only."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Further keys of the DeepSpeed JSON config; they override the generated ones."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.offload_param and self.stage != 3:
            yield "zero.offload_param", "needs stage 3; set zero.stage=3 or zero.offload_param=false"


@section
class Launch:
    """Processes and hosts."""

    num_gpus: Count | Literal["auto"] | None = None
    """Ranks on this machine, or on each host of the hostfile. auto: one for each visible GPU, or for each slot of the
    hostfile. Default: 1, or one for each slot. Without a GPU, ranks run on the CPU and communicate over gloo."""
    hostfile: str | None = None
    """DeepSpeed hostfile, with lines such as `host slots=8`."""
    num_nodes: Count | None = None
    """Use only the first num_nodes hosts of the hostfile."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """Start only this host's ranks, without ssh; run one `align` command on each host."""
    ssh: str = "ssh"
    """Command that reaches another host, such as `ssh -p 2222`. It must not ask for a password."""
    master_addr: str | None = None
    """Address of rank 0. Default: the first host."""
    master_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of rank 0. Default: a free port, or 29500 with several hosts."""


@section
class Samples:
    """Prompts that the model answers before and after training; the answers go to samples.jsonl."""

    prompts: str | list[str]
    """A file with a `prompt` column, or the prompts themselves."""
    max_new_tokens: Count = 64
    """Maximum answer length in tokens. Decoding is greedy, so that answers before and after training are comparable."""


def as_samples(value: Any) -> Any:
    return {"prompts": value} if isinstance(value, (str, list)) else value


@plain_dataclass(frozen=True)
class Rollout:
    """How an online stage uses the episodes of a rollout."""

    k: int
    """Samples per prompt."""
    minibatches: int
    """Optimizer steps per pass."""
    epochs: int
    """Passes over a rollout."""


@section
class Recipe:
    """A stage's settings after composition: the keys that all stages share, and values derived from them.

    The methods return what depends on the settings and differs between stages; stage constants are in
    `stages.STAGES`.
    """

    stage: ClassVar[str]
    """Its name in `stages.STAGES`."""

    name: str
    """Run name. Default: the name of the recipe file."""
    model: Model
    data: Data
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the data order, splits, adapter initialization and sampling."""
    run_dir: str
    """Output directory of the run. Default: runs/<name>/<stage>."""
    force: bool = False
    """Run again even if a finished, unchanged run exists; the old run is renamed, not deleted."""
    lora: Lora | None = None
    zero: Zero = Field(default_factory=Zero)
    launch: Launch = Field(default_factory=Launch)
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Fields of the stage's TRL config; unknown fields are errors."""
    samples: Annotated[
        Samples | None, BeforeValidator(as_samples, json_schema_input_type=str | list[str] | Samples | None)
    ] = None

    @property
    def spec(self) -> StageSpec:
        """The constants of its stage."""
        return STAGES[self.stage]

    def row_kind(self) -> RowKind:
        """The kind of rows in data.train."""
        return self.spec.rows

    def pairing(self) -> str:
        """Which pairs or labelled responses a ranking yields: a value of method.pairs or method.split."""
        return "best-worst"

    def packs(self) -> bool:
        """Whether several rows share one sequence, so that the number of steps is unknown before tokenization."""
        return False

    def rollout(self) -> Rollout | None:
        """How episodes are used, for online stages; None for the others."""
        return None

    def micro_step(self, per_device: int) -> tuple[int, int | None]:
        """(rows, tokens per row) of one forward pass; None for the device's default number of tokens."""
        return per_device, self.data.max_length

    def unused_keys(self) -> frozenset[str]:
        """Keys of `method` that have no effect with this recipe's other settings."""
        return frozenset()

    def batch_problems(self, per_device: int, ranks: int) -> Iterator[tuple[str, str]]:
        """(key, problem) of a batch with `per_device` rows on each of `ranks` ranks."""
        return iter(())

    def alternative(self) -> Recipe | None:
        """The same recipe with another placement of its models, whose memory the plan also shows."""
        return None

    def earlier_rows(self) -> str | None:
        """The directory of an earlier run whose rows are reused."""
        return None

    # -- models other than the trained one

    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return False

    def reference_path(self) -> str | None:
        """Path of the reference named by the recipe; None for the initial policy."""
        return None

    def copies(self, role: str) -> int:
        """How many models of a role (`stages.Role`) have their own weights in memory."""
        if role == "reference":
            # with LoRA the reference is the policy with its adapter disabled
            return int(self.needs_reference() and (self.lora is None or self.reference_path() is not None))
        return int(role == "policy")

    def adapters(self) -> int:
        """Number of LoRA adapters that are trained."""
        return 1 if self.lora else 0

    def reward_sources(self) -> list[tuple[str, RewardSource]]:
        """(key, source) of every reward that is optimised."""
        return []

    def reward_models(self) -> list[tuple[str, str]]:
        """(key, path) of every reward model in the recipe: rewards, initial value model, gold model."""
        return [(f"{key}.path", source.path) for key, source in self.reward_sources() if source.path is not None]

    def backbone_models(self) -> list[tuple[str, str]]:
        """(key, path) of reward models that must be adapters on the policy's backbone."""
        return []

    def reward_functions(self) -> list[tuple[str, str]]:
        """(key, module:function) of every Python function that is a reward."""
        return [(f"{key}.python", source.python) for key, source in self.reward_sources() if source.python is not None]

    def compared_columns(self) -> list[str]:
        """Data columns that rewards compare responses with."""
        return list(dict.fromkeys(source.verify.column for _, source in self.reward_sources() if source.verify))

    def secrets(self) -> list[str]:
        """Names of the environment variables that hold keys of endpoints."""
        judges = [source.judge for _, source in self.judges()]
        return [source.key_env for source in [*judges, *(one for _, one in self.generators())] if source.key_env]

    def judges(self) -> list[tuple[str, RewardSource]]:
        """(key, source) of every reward computed by a judge."""
        return [(key, source) for key, source in self.reward_sources() if source.judge is not None]

    def generators(self) -> list[tuple[str, GeneratorSource]]:
        """(key, source) of every model that generates or judges text, except the judges of rewards."""
        return []

    def method_sources(self) -> list[tuple[str, list[Source], RowKind]]:
        """(key, sources, row kind) of data that `method` names in addition to `data`."""
        return []
