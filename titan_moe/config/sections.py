"""What keys there are: the sections of the configuration.

Most are frozen dataclasses. A field's annotation is `Annotated[type with its range, "what it means"]`; the loader
checks values against it and `--help` prints it. Where torchtitan 0.1-0.2 has a key for the same thing, this one has its
name. Sections that name a component have the keys of its builder instead: KINDS has the registries.
"""

import difflib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt

from titan_moe.balancer import BALANCERS
from titan_moe.config.schema import REQUIRED, Kind, Parameter, parameters_of
from titan_moe.model.routing import ROUTERS
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.load_lr import load_lr
from titan_moe.optimizer.schedule import SCHEDULES
from titan_moe.parametrization import PARAMETRIZATIONS


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def positive_or_minus_one(value: int) -> int:
    """Check a count that may be left open by -1."""
    if value != -1 and value < 1:
        raise ValueError("must be -1 or greater than 0")
    return value


_POSITIVE, _NOT_NEGATIVE = Field(gt=0, allow_inf_nan=False), Field(ge=0, allow_inf_nan=False)
_FACTOR, _BETA, _COUNT = Field(ge=0, le=1), Field(ge=0, lt=1), Field(ge=1)
Positive = Annotated[float, _POSITIVE]
NonNegative = Annotated[float, _NOT_NEGATIVE]
Fraction = Annotated[float, _BETA]
PositiveOrMinusOne = Annotated[int, AfterValidator(positive_or_minus_one)]
Seconds = Annotated[int, Field(gt=0, le=10**8)]  # more, with what is added to it, is no time for a socket
Texts = Annotated[list[str], BeforeValidator(_as_list)]  # one string stands for a list of one
DATASETS = ("stdlib", "text", "fineweb_edu", "hf")


def known_dataset(value: str) -> str:
    """Check the name of a data set: one of ours, or a function outside."""
    if value not in DATASETS and ":" not in value:
        near = difflib.get_close_matches(value, DATASETS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"must be {', '.join(map(repr, DATASETS))} or 'my_pkg.my_mod:fn'{hint}")
    return value


Dataset = Annotated[str, AfterValidator(known_dataset)]


def _as_qk_norm(value: object) -> object:
    # A flag once, for what is `head` now; `--model.qk_norm false` comes as a word.
    return {"true": "head", "false": "none"}.get(str(value).lower(), value)


TaskKind = Literal["multiple_choice", "cloze", "last_word"]


@dataclass(frozen=True)
class Job:
    """Where a run reads its configuration and leaves its results."""

    config_file: Annotated[str, "TOML file to run (command line only; a file inherits with base)"] = field(
        default="", compare=False
    )
    dump_folder: Annotated[str, "folder of everything that the run writes"] = "./outputs"
    description: Annotated[str, "a sentence on the run, for the reader"] = ""
    allow_config_change: Annotated[
        bool, "go on in a dump folder whose run had another configuration (for one start; run.json notes the changes)"
    ] = field(default=False, compare=False)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions turned less, for sequences longer than those of the training: one of linear, llama3, yarn."""

    factor: Annotated[float, Field(ge=1, allow_inf_nan=False), "how many times less, where it is most"] = 1.0
    original_seq_len: Annotated[PositiveInt, "llama3, yarn: the longest sequence of the training"] = 8192
    low_freq_factor: Annotated[Positive, "llama3: what turns less often than this within it is scaled"] = 1.0
    high_freq_factor: Annotated[Positive, "llama3: and what turns more often is not"] = 4.0
    beta_fast: Annotated[Positive, "yarn: what turns more often than this within it is not scaled"] = 32.0
    beta_slow: Annotated[Positive, "yarn: what turns less often is"] = 1.0
    attention_factor: Annotated[NonNegative, "yarn: factor of queries and keys (0: 0.1 ln(factor) + 1)"] = 0.0
    truncate: Annotated[bool, "yarn: the scaling begins and ends at a whole channel"] = True


@dataclass(frozen=True)
class Model:
    """The decoder; the defaults are the paper's Table 1."""

    dim: Annotated[PositiveInt, "width of the residual stream"] = 768
    num_layers: Annotated[int, Field(gt=0, le=10_000), "decoder layers"] = 24
    num_heads: Annotated[PositiveInt, "attention heads; divides dim"] = 12
    num_kv_heads: Annotated[NonNegativeInt, "key and value heads; divides num_heads (0: num_heads)"] = 0
    head_dim: Annotated[NonNegativeInt, "channels of a head (0: dim / num_heads)"] = 0
    ffn_dim: Annotated[PositiveInt, "hidden width of the dense feed-forward layers"] = 2048
    vocab_size: Annotated[NonNegativeInt, "0: the tokenizer's, padded to a multiple of 64"] = 0
    rope_theta: Annotated[Positive, "base of the rotary position frequencies"] = 10000.0
    partial_rotary_factor: Annotated[
        float, Field(gt=0, le=1), "the share of a head's channels that rotary positions turn"
    ] = 1.0
    rope_scaling: Annotated[dict[str, RopeScaling], "how positions are turned less for longer sequences"] = field(
        default_factory=dict
    )
    norm_eps: Annotated[Positive, "epsilon of RMSNorm"] = 1e-5
    qk_norm: Annotated[
        Literal["none", "head", "full"] | bool,
        BeforeValidator(_as_qk_norm),
        "RMSNorm on queries and keys: of each head, or of all heads together (true: head)",
    ] = "none"
    attention_bias: Annotated[bool, "queries, keys and values have a bias"] = False
    tie_embeddings: Annotated[bool, "the output head shares the embedding's weight"] = True
    init_std: Annotated[Positive, "standard deviation of the initial weights"] = 0.02

    @property
    def channels(self) -> int:
        """Those of a head."""
        return self.head_dim or self.dim // self.num_heads


@dataclass(frozen=True)
class Moe:
    """The Mixture-of-Experts layers; the defaults are the paper's Table 1."""

    num_experts: Annotated[NonNegativeInt, "routed experts of a layer (0: dense model)"] = 8
    num_identity_experts: Annotated[
        NonNegativeInt, "more experts to choose among, which give the token back as it is and cost nothing"
    ] = 0
    top_k: Annotated[PositiveInt, "experts of a token"] = 2
    expert_dim: Annotated[PositiveInt, "hidden width of an expert"] = 2048
    num_shared_experts: Annotated[NonNegativeInt, "experts that every token passes, beside its top_k"] = 0
    shared_expert_dim: Annotated[NonNegativeInt, "hidden width of a shared expert (0: expert_dim)"] = 0
    shared_expert_gate: Annotated[bool, "what shared experts give is weighed by a learned function of the token"] = (
        False
    )
    first_dense_layers: Annotated[NonNegativeInt, "layers at the bottom without experts"] = 0
    layer_freq: Annotated[PositiveInt, "from there on, every layer_freq-th layer has experts (1: all)"] = 1
    expert_dropout: Annotated[Fraction, "dropout of the experts' hidden activations in training (0: none)"] = 0.0
    experts_backend: Annotated[
        str, "who computes the experts: grouped_mm (torch), liger (liger-kernel's Triton kernels), or my_pkg.my_mod:fn"
    ] = "grouped_mm"

    @property
    def router_width(self) -> int:
        """How many experts a router chooses among."""
        return self.num_experts + self.num_identity_experts


@dataclass(frozen=True)
class Component:
    """A component from a registry, or `my_pkg.my_mod:fn`, and the arguments of its builder."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, and what parameter groups have of their own.

    Those are expert, router, embedding, norm and dense, and before them groups by pattern, which have a `match`: in
    their order the first that matches a parameter has it.
    """

    name: str = "adamw"
    arguments: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=lambda: {"norm": {"weight_decay": 0.0}})


@dataclass(frozen=True)
class Training:
    """Length, batches, precision and seed; the defaults are the paper's Table 1."""

    steps: Annotated[PositiveInt, "optimizer steps of the run"] = 50000
    local_batch_size: Annotated[
        PositiveOrMinusOne, "sequences of a rank in one forward pass (-1: all that it has of global_batch_size)"
    ] = 5
    global_batch_size: Annotated[PositiveOrMinusOne, "sequences of an optimizer step (-1: no accumulation)"] = 40
    seq_len: Annotated[PositiveInt, "tokens of a sequence"] = 512
    loss_chunk_tokens: Annotated[
        int,
        Field(ge=-1),
        "tokens of a rank whose logits are in memory at once, in training and evaluation "
        "(0: all; -1: 4096 on a GPU, 256 on a CPU)",
    ] = -1
    max_norm: Annotated[NonNegative, "gradients are clipped to this global norm (0: no clipping)"] = 1.0
    qk_clip: Annotated[
        NonNegative, "heads with an attention logit above this have their wq and wk scaled down (0: none; K2 has 100)"
    ] = 0.0
    skip_nonfinite_steps: Annotated[
        NonNegativeInt, "steps in a row that may be skipped for a NaN or an infinity before the run ends (0: none)"
    ] = 0
    mixed_precision_param: Annotated[Literal["bfloat16", "float32"], "type in forward and backward"] = "bfloat16"
    mixed_precision_reduce: Annotated[Literal["float32", "bfloat16"], "type of gradient reductions"] = "float32"
    dtype: Annotated[Literal["float32", "bfloat16"], "type of parameters and optimizer state"] = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**32), "seed of initial weights and of the order of the data"] = 42
    deterministic: Annotated[bool, "deterministic algorithms only: repeatable, slower"] = False


@dataclass(frozen=True)
class Source:
    """A part of the training data, [data.sources.NAME]: its share of the tokens is its weight over all weights.

    Sources of the same files share their sequences: a second one, from another step on, changes their weight.
    """

    path: Annotated[Texts, "files, globs or folders, as data.path"] = field(default_factory=list)
    dataset: Annotated[Dataset, "where its documents come from, as data.dataset"] = "text"
    weight: Annotated[Positive, "its share, relative to those of the other sources"] = 1.0
    from_step: Annotated[PositiveInt, "the first step that has it"] = 1
    until_step: Annotated[NonNegativeInt, "the last step that has it (0: the run's last)"] = 0
    arguments: dict[str, Any] = field(default_factory=dict)  # of a data set of one's own


@dataclass(frozen=True)
class Data:
    """What the model reads."""

    dataset: Annotated[
        Dataset,
        "where documents come from: stdlib, text (files), fineweb_edu, hf (the hub), or my_pkg.my_mod:fn, whose "
        "arguments are keys beside it",
    ] = "stdlib"
    path: Annotated[
        Texts, "files, globs, folders (txt, jsonl, parquet ..., token ids of Megatron or numpy), or a hub name"
    ] = field(default_factory=list)
    tokenizer: Annotated[str, "bytes, bpe:SIZE (trained on the data), a tokenizer.json, a folder or a hub name"] = (
        "bpe:4096"
    )
    eot_token: Annotated[str, "token that ends every document (empty: as the tokenizer's own files say)"] = ""
    document_mask: Annotated[bool, "attention stays inside documents, which end with that token"] = False
    restart_positions: Annotated[bool, "with document_mask: positions begin at 0 in each document"] = False
    packing: Annotated[
        Literal["concat", "best_fit"], "documents end to end in windows, or in sequences that cut as few as can be"
    ] = "concat"
    num_workers: Annotated[int, Field(ge=0, le=256), "processes that prepare batches (0: none beside the trainer)"] = 0
    validation_fraction: Annotated[Fraction, "part of the documents that is held out of training"] = 0.01
    validation_path: Annotated[Texts, "files to validate on instead of a held-out part"] = field(default_factory=list)
    cache_folder: Annotated[str, "folder of tokenized data (empty: the user's cache folder)"] = ""
    sources: Annotated[dict[str, Source], "tables [data.sources.NAME] instead of path: several sources by weight"] = (
        field(default_factory=dict)
    )
    arguments: dict[str, Any] = field(default_factory=dict)  # of a data set of one's own


@dataclass(frozen=True)
class ValidationSet:
    """A data set of its own to validate on, beside the run's: its numbers are validation/NAME/... of each validation.

    Any number of them, each of validation.steps batches. NAME is of letters, digits and _; NAME = false takes back what
    a base file set.
    """

    path: Annotated[Texts, "files, globs, folders, or a hub name, as data.path"] = field(default_factory=list)
    dataset: Annotated[Dataset, "where documents come from, as data.dataset"] = "text"
    arguments: dict[str, Any] = field(default_factory=dict)  # of a data set of one's own


@dataclass(frozen=True)
class ValidationTask:
    """Questions to ask the model at validations, as lm-evaluation-harness asks them: validation/NAME/acc and the like.

    In context, choices, answer, labels and target {field} stands for what a line has there, {field.key} for a key in
    it. NAME is of letters, digits and _, and no validation set has it; NAME = false takes back what a base file set.
    """

    path: Annotated[Texts, "files, globs or folders of JSON lines, a question a line"] = field(default_factory=list)
    kind: Annotated[
        TaskKind,
        "multiple_choice: which choice is likeliest; cloze: whether the target comes next; last_word: the same, the "
        "target being the last word of context",
    ] = "multiple_choice"
    context: Annotated[str, "what comes before the answer"] = "{context}"
    choices: Annotated[Texts, "the choices: a field that has a list, or a text for each"] = field(
        default_factory=lambda: ["{choices}"]
    )
    answer: Annotated[str, "the right choice: its number, from 0, its text, or its label"] = "{answer}"
    labels: Annotated[str, "labels of the choices, a field that has a list, where the answer is one of them"] = ""
    target: Annotated[str, "what comes next, of a cloze"] = "{target}"
    delimiter: Annotated[str, "between context and choice or target"] = " "
    num_fewshot: Annotated[NonNegativeInt, "examples with their answers before each question"] = 0
    fewshot_path: Annotated[Texts, "files whose first lines are the examples (empty: the first other ones of path)"] = (
        field(default_factory=list)
    )
    limit: Annotated[NonNegativeInt, "questions, the first ones of path (0: all)"] = 0
    freq: Annotated[NonNegativeInt, "optimizer steps between them, a multiple of validation.freq (0: that)"] = 0


@dataclass(frozen=True)
class Validation:
    """Evaluation on held-out data during training."""

    enable: Annotated[bool, "validate during training and at its end"] = True
    freq: Annotated[PositiveInt, "optimizer steps between validations"] = 500
    steps: Annotated[PositiveOrMinusOne, "batches of a validation (-1: the whole set)"] = -1
    local_batch_size: Annotated[PositiveInt, "sequences of a rank in one forward pass; results do not depend on it"] = 8
    sets: Annotated[dict[str, ValidationSet], "tables [validation.sets.NAME]: data sets beside the run's own"] = field(
        default_factory=dict
    )
    tasks: Annotated[dict[str, ValidationTask], "tables [validation.tasks.NAME]: questions to ask"] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class Parallelism:
    """How ranks share the work; the product of the degrees is the number of ranks."""

    data_parallel_replicate_degree: Annotated[PositiveInt, "replicas of the sharded model"] = 1
    data_parallel_shard_degree: Annotated[PositiveOrMinusOne, "ranks that shard a model, FSDP2 (-1: the rest)"] = -1
    expert_parallel_degree: Annotated[PositiveInt, "ranks that share the experts of a layer"] = 1
    tensor_parallel_degree: Annotated[PositiveInt, "ranks that share heads, dense widths and tokens"] = 1
    context_parallel_degree: Annotated[PositiveInt, "ranks that share each sequence"] = 1
    fsdp_reshard_after_forward: Annotated[
        Literal["default", "always", "never"],
        "gathered parameters that FSDP2 frees until backward: of blocks, all, or none (and gradients are reduced once)",
    ] = "default"


@dataclass(frozen=True)
class ActivationCheckpoint:
    """Recomputing activations in backward: less memory, more time."""

    mode: Annotated[Literal["none", "selective", "full"], "which activations are recomputed"] = "none"


@dataclass(frozen=True)
class Compile:
    """torch.compile, and CUDA graphs."""

    enable: Annotated[Literal["auto"] | bool, "compile the decoder layers (auto: on a GPU)"] = "auto"
    cuda_graph: Annotated[
        Literal["auto"] | bool,
        "replay forward and backward as a CUDA graph (auto: on one GPU, in bfloat16, without own routers or balancers)",
    ] = "auto"


@dataclass(frozen=True)
class Quantize:
    """Matrix products in float8, on GPUs that have them."""

    converters: Annotated[
        list[Literal["quantize.linear.float8", "quantize.grouped_mm.float8"]],
        BeforeValidator(_as_list),
        "what is in float8: linear layers, experts (empty: nothing)",
    ] = field(default_factory=list)
    recipe_name: Annotated[
        Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"], "scales of linear layers, torchao's names"
    ] = "rowwise"
    emulate: Annotated[bool, "round to float8, multiply in the precision that is there: to try out, any device"] = False


@dataclass(frozen=True)
class Checkpoint:
    """Saving and resuming."""

    enable: Annotated[bool, "save checkpoints, and resume from them"] = True
    folder: Annotated[str, "folder of checkpoints in job.dump_folder, or a URL"] = "checkpoint"
    interval: Annotated[PositiveInt, "optimizer steps between checkpoints"] = 500
    keep_latest_k: Annotated[NonNegativeInt, "checkpoints to keep (0: all)"] = 2
    async_mode: Annotated[Literal["disabled", "async"], "whether training goes on during a save"] = "disabled"
    load_step: Annotated[int, Field(ge=-1), "step to resume from (-1: the latest); later ones are set aside"] = -1
    initial_load_path: Annotated[str, "checkpoint that a new run takes its weights from"] = ""
    exclude: Annotated[
        list[Literal["optimizer"]], "what resuming leaves out: the optimizer's state, which then starts anew"
    ] = field(default_factory=list)
    initial_load_strict: Annotated[bool, "it must be of the same model; if not, what fits is taken"] = True
    export_dtype: Annotated[Literal["float32", "bfloat16", "float16"], "type of weights in export/"] = "float32"


@dataclass(frozen=True)
class Metrics:
    """Where numbers go beside metrics.jsonl, and how often."""

    log_freq: Annotated[PositiveInt, "optimizer steps between lines on the console"] = 10
    enable_tensorboard: Annotated[bool, "write tensorboard/ in job.dump_folder"] = True
    enable_wandb: Annotated[bool, "log to Weights & Biases (the wandb extra)"] = False
    expert_stats_freq: Annotated[
        NonNegativeInt, "optimizer steps between measures of each expert's gradient_snr and update_ratio (0: never)"
    ] = 0
    balance_tax_freq: Annotated[
        NonNegativeInt, "optimizer steps between timings of learned against balanced routing (0: never)"
    ] = 0


@dataclass(frozen=True)
class Profiling:
    """torch.profiler traces."""

    enable_profiling: Annotated[bool, "write traces of some steps"] = False
    save_traces_folder: Annotated[str, "folder of traces in job.dump_folder"] = "profile_traces"
    profile_freq: Annotated[PositiveInt, "optimizer steps between traces"] = 10


@dataclass(frozen=True)
class Comm:
    """Time limits of collective operations."""

    init_timeout_seconds: Annotated[Seconds, "limit until the first step is done"] = 300
    train_timeout_seconds: Annotated[Seconds, "limit afterwards"] = 600


@dataclass(frozen=True)
class Debug:
    """Switches for measurements and tests."""

    force_balanced_routing: Annotated[bool, "tokens go to experts in turn, whatever the router says"] = False


@dataclass(frozen=True)
class Config:
    """Everything about a run: one field per section of the TOML file."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    moe: Moe = field(default_factory=Moe)
    parametrization: Component = field(default_factory=lambda: Component("standard"))
    router: Component = field(default_factory=lambda: Component("topk_softmax"))
    balancer: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> arguments
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: Component = field(default_factory=lambda: Component("cosine"))
    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    validation: Validation = field(default_factory=Validation)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
    debug: Debug = field(default_factory=Debug)


def is_component(label: str) -> bool:
    """Whether a table [balancer.LABEL] is called as the component that it is for; others say so by `name`."""
    return label in BALANCERS or ":" in label


class BalancerTable(NamedTuple):
    """A table [balancer.LABEL]: the component that it is for, and that one's arguments."""

    label: str
    component: str
    arguments: dict[str, Any]


def balancer_tables(config: Config) -> list[BalancerTable]:
    """The balancers that are on; several may be instances of one component, each with a label of its own."""
    tables = []
    for label, table in config.balancer.items():
        if is_component(label):
            tables.append(BalancerTable(label, label, table))
        else:
            arguments = {key: value for key, value in table.items() if key != "name"}
            tables.append(BalancerTable(label, table["name"], arguments))
    return tables


# What a line of metrics.jsonl has beside balancers' losses: an instance of a balancer can't be called so.
METRIC_NAMES = (
    *("kind", "step", "num_tokens", "loss", "total_loss", "grad_norm", "param_norm", "skipped", "skipped_steps"),
    *("maxvio_batch", "minvio_batch", "avgvio_batch", "load", "load_cv", "load_entropy", "dead_experts"),
    *("expert_batch_mean", "expert_batch_min", "router_logit_norm", "router_confidence", "dropped_fraction"),
    *("max_attention_logit", "clipped_heads"),
    *("unrouted_fraction", "identity_fraction", "experts_per_token"),
    *("tokens_per_second", "step_seconds", "data_seconds", "peak_memory_gib", "mfu"),
    *("balance_tax", "gradient_snr", "update_ratio", "nonfinite", "nonfinite_gradients"),
)

SECTIONS = get_type_hints(Config)

# Tables of one kind within a section, [SECTION.KEY.NAME].
NAMED_TABLES = {
    "model.rope_scaling": RopeScaling,
    "data.sources": Source,
    "validation.sets": ValidationSet,
    "validation.tasks": ValidationTask,
}

# What a data set of one's own is: a function outside, whose arguments are keys of the table that names it.
OWN_DATASET = Kind({}, {}, {})
ARGUMENTS = "arguments"  # the field that holds them
DATA_TABLES = ("data.sources", "validation.sets")  # that may name one, as [data] may

# The sections whose keys are the arguments of builders. The ranges are for builders of the registries alone: what is
# from outside may mean something else by `momentum`.
KINDS = {
    "router": Kind(
        ROUTERS,
        {"top_k": "moe.top_k"},
        {
            "temperature": _POSITIVE,
            "score_scale": _POSITIVE,
            "num_groups": _COUNT,
            "topk_groups": _COUNT,
            "jitter": _BETA,
            "noise_std": _NOT_NEGATIVE,
            "capacity_factor": _NOT_NEGATIVE,
            "iterations": _COUNT,
            **dict.fromkeys(("latent_dim", "tile"), _COUNT),
            "rate": _POSITIVE,
            **dict.fromkeys(("max_k", "min_pool", "max_pool", "eval_pool"), _NOT_NEGATIVE),
        },
    ),
    "parametrization": Kind(
        PARAMETRIZATIONS,
        {"shapes": "[model] and [moe]"},
        {
            "base_dim": _COUNT,
            **dict.fromkeys(("base_num_layers", "base_num_heads", "base_ffn_dim", "base_expert_dim"), _NOT_NEGATIVE),
            **dict.fromkeys(("base_num_experts", "base_top_k"), _NOT_NEGATIVE),
            "router_init_power": Field(ge=0.5, allow_inf_nan=False),
        },
    ),
    "balancer": Kind(
        BALANCERS,
        {},
        {
            **dict.fromkeys(("coeff", "rate", "integral", "derivative"), _NOT_NEGATIVE),
            **dict.fromkeys(("decay_ratio", "alpha"), _FACTOR),
            **dict.fromkeys(("kappa", "norm"), _POSITIVE),
            "momentum": _BETA,
            "real_share": Field(gt=0, le=1),
        },
    ),
    "optimizer": Kind(
        OPTIMIZERS,
        {"param_groups": "the model", "params": "the model"},  # `params` in torch.optim's own classes
        {
            **dict.fromkeys(("lr", "weight_decay"), _NOT_NEGATIVE),
            **dict.fromkeys(("beta1", "beta2", "beta3", "momentum"), _BETA),
            **dict.fromkeys(("alpha", "alpha_warmup", "beta3_warmup", "weight_lr_power", "r"), _NOT_NEGATIVE),
            **dict.fromkeys(("eps", "epsilon"), _POSITIVE),
            **dict.fromkeys(("precondition_frequency", "statistics_every"), _COUNT),
            **dict.fromkeys(("max_preconditioner_dim", "adamw_above"), _COUNT),
            "start_preconditioning_step": AfterValidator(positive_or_minus_one),
            "exponent": _FACTOR,
            "ns_steps": Field(ge=1, le=20),
        },
    ),
    "lr_scheduler": Kind(
        SCHEDULES,
        {"steps": "training.steps"},
        {"warmup_steps": _NOT_NEGATIVE, **dict.fromkeys(("min_lr_factor", "decay_ratio", "factor"), _FACTOR)},
    ),
}

# What [optimizer.expert], and a group by pattern of experts, takes besides, whatever the optimizer.
_LOAD_LR_RANGES = {
    "load_lr_power": Field(allow_inf_nan=False),
    "load_lr_ema": _BETA,
    "load_lr_floor": _NOT_NEGATIVE,
    "load_lr_ceiling": Field(gt=0),
}
LOAD_LR = parameters_of(Kind({"load_lr": load_lr}, {}, _LOAD_LR_RANGES), "load_lr", "configuration", "optimizer.expert")

# What [optimizer.groups.NAME] takes besides, whatever the optimizer.
GROUP_KEYS = {
    "match": Parameter(
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            BeforeValidator(_as_list),
            Field(min_length=1),
            "globs on names of parameters: `*` stands for any characters, `?` for one",
        ],
        REQUIRED,
    ),
    "per_head": Parameter(
        Annotated[bool, "each head of a matrix of attention (wq, wk, wv: rows; wo: columns) is a matrix by itself"],
        False,
    ),
}

# Keys that there were, each with the reason why nothing is lost without it. `titan_moe.config.saved` reads over them.
REMOVED = {"moe.dispatcher": "parallelism.expert_parallel_degree says how tokens reach their experts"}
