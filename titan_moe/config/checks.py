"""What must hold between keys, checked before any process group or data exists."""

from titan_moe.config.combinations import check_combinations
from titan_moe.config.schema import find_builder
from titan_moe.config.sections import Config
from titan_moe.model.attention import check_attention
from titan_moe.model.experts_backend import EXPERTS_BACKENDS, check_signature
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.matrix import NO_MATRICES
from titan_moe.optimizer.matrix_builders import DIRECTIONS


def check_config(config: Config) -> None:
    """Check every constraint between keys that needs no process group, no data and no model."""
    _check_size(config)
    model = config.model
    check_attention(model.dim, model.num_heads, model.num_kv_heads or model.num_heads)
    _check_experts(config)
    _check_batches(config)
    _check_parts(config)
    _check_optimizer(config)


LARGEST = 2**44  # elements of a tensor: 64 TiB in fp32, above any machine and far below where sizes overflow


def _check_size(config: Config) -> None:
    """Refuse a tensor that no machine holds, by the keys that make it: torch would say that some number overflows."""
    model, moe, training = config.model, config.moe, config.training
    sizes = {
        "model.vocab_size x model.dim": model.vocab_size * model.dim,
        "model.dim x model.dim": model.dim**2,
        "model.dim x model.ffn_dim": model.dim * model.ffn_dim,
        "moe.num_experts x model.dim x moe.expert_dim": moe.num_experts * model.dim * moe.expert_dim,
        "moe.num_shared_experts x model.dim x moe.expert_dim": moe.num_shared_experts * model.dim * moe.expert_dim,
    }
    if training.local_batch_size > 0:
        sizes["training.local_batch_size x training.seq_len x model.dim"] = (
            training.local_batch_size * training.seq_len * model.dim
        )
    keys, size = max(sizes.items(), key=lambda item: item[1])
    if size > LARGEST:
        raise ValueError(f"a tensor would have {keys} = {size:.3g} elements: no machine holds that, lower these keys")


def _check_experts(config: Config) -> None:
    moe = config.moe
    if moe.num_experts == 0:
        if config.balancer:
            off = ", ".join(f"{name} = false" for name in config.balancer)
            raise ValueError(
                f"moe.num_experts = 0 is a dense model, which has no load to balance, but a balancer is on: "
                f"set {off} under [balancer]"
            )
        for group in ("expert", "router"):
            if group in config.optimizer.groups:
                raise ValueError(
                    f"moe.num_experts = 0 is a dense model, but [optimizer.{group}] is set: remove that table, "
                    f"or set {group} = false under [optimizer]"
                )
        if config.debug.force_balanced_routing:
            raise ValueError("debug.force_balanced_routing = true needs experts, but moe.num_experts is 0")
        if "quantize.grouped_mm.float8" in config.quantize.converters:
            raise ValueError(
                "quantize.converters has quantize.grouped_mm.float8, which needs experts, but moe.num_experts is 0: "
                "leave it out"
            )
        if moe.experts_backend != "grouped_mm":
            raise ValueError(
                f"moe.experts_backend = {moe.experts_backend!r} needs experts, but moe.num_experts is 0: leave it out"
            )
        for key in ("expert_stats_freq", "balance_tax_freq"):
            if freq := getattr(config.metrics, key):
                raise ValueError(f"metrics.{key} = {freq} needs experts, but moe.num_experts is 0: set it to 0")
        return
    _check_experts_backend(config)
    _check_balance_tax(config)
    if moe.top_k > moe.num_experts:
        raise ValueError(f"moe.top_k ({moe.top_k}) must be at most moe.num_experts ({moe.num_experts})")
    if moe.first_dense_layers >= config.model.num_layers:
        raise ValueError(
            f"moe.first_dense_layers ({moe.first_dense_layers}) must be less than model.num_layers "
            f"({config.model.num_layers}); for a dense model set moe.num_experts = 0"
        )
    check_combinations(config)


def _check_experts_backend(config: Config) -> None:
    name = config.moe.experts_backend
    check_signature(name, find_builder(EXPERTS_BACKENDS, name, "configuration", "moe.experts_backend"))
    if name != "grouped_mm" and "quantize.grouped_mm.float8" in config.quantize.converters:
        raise ValueError(
            f"moe.experts_backend = {name!r} does not go with quantize.converters = "
            "['quantize.grouped_mm.float8']: experts in float8 are computed by 'grouped_mm' alone"
        )


def _check_balance_tax(config: Config) -> None:
    freq = config.metrics.balance_tax_freq
    if freq and config.debug.force_balanced_routing:
        raise ValueError(
            f"metrics.balance_tax_freq = {freq} compares learned with balanced routing, but "
            "debug.force_balanced_routing = true: turn one of them off"
        )
    if freq and config.router.name == "expert_choice":
        raise ValueError(
            f"metrics.balance_tax_freq = {freq} has nothing to compare with router.name = 'expert_choice', whose load "
            "is always even: set it to 0"
        )


def _check_batches(config: Config) -> None:
    training, data = config.training, config.data
    if training.global_batch_size == training.local_batch_size == -1:
        raise ValueError(
            "training.local_batch_size and training.global_batch_size are both -1, and nothing says how many sequences "
            "a step has: give one of them a number"
        )
    if training.global_batch_size != -1 and training.global_batch_size % training.local_batch_size:
        raise ValueError(
            f"training.local_batch_size ({training.local_batch_size}) must divide training.global_batch_size "
            f"({training.global_batch_size})"
        )
    if config.validation.enable and data.validation_fraction == 0 and not data.validation_path:
        raise ValueError(
            "validation.enable = true needs data to validate on: set data.validation_fraction above 0 or "
            "data.validation_path, or turn it off with validation.enable = false"
        )
    if data.dataset in ("text", "hf") and not data.path:
        raise ValueError(f"data.dataset = {data.dataset!r} needs data.path: the files to read or the name on the hub")


def _check_parts(config: Config) -> None:
    """What tensor and context parallelism cut has to divide evenly."""
    model, moe, training = config.model, config.moe, config.training
    tensor, context = config.parallelism.tensor_parallel_degree, config.parallelism.context_parallel_degree
    widths = {"model.num_heads": model.num_heads, "model.num_kv_heads": model.num_kv_heads or model.num_heads}
    if not moe.num_experts or moe.first_dense_layers or moe.layer_freq > 1:
        widths["model.ffn_dim"] = model.ffn_dim
    if moe.num_experts and moe.num_shared_experts:
        widths["moe.num_shared_experts x moe.expert_dim"] = moe.num_shared_experts * moe.expert_dim
    for name, width in widths.items():
        if width % tensor:
            raise ValueError(f"parallelism.tensor_parallel_degree ({tensor}) must divide {name} ({width})")
    if "quantize.linear.float8" in config.quantize.converters and tensor > 1:
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {tensor} does not go with quantize.linear.float8, whose scales are "
            "of whole matrices: leave the converter out (quantize.grouped_mm.float8 goes), or take degree 1"
        )
    if context > 1 and training.seq_len % (2 * context * tensor):
        raise ValueError(
            f"training.seq_len ({training.seq_len}) must be a multiple of 2 x context_parallel_degree ({context}) x "
            f"tensor_parallel_degree ({tensor}): each rank has two chunks of a sequence, shared out over tensor ranks"
        )
    if training.seq_len % tensor:
        raise ValueError(
            f"parallelism.tensor_parallel_degree ({tensor}) must divide training.seq_len ({training.seq_len}): between "
            "attention and dense layers each rank has a part of every sequence"
        )


def _check_optimizer(config: Config) -> None:
    if config.optimizer.arguments.get("lr") == 0:
        raise ValueError("optimizer.lr = 0 trains nothing: it must be greater than 0 (a group's own lr may be 0)")
    for group in NO_MATRICES:
        name = config.optimizer.groups.get(group, {}).get("name")
        if name in DIRECTIONS:
            raise ValueError(
                f"optimizer.{group}.name = {name!r}: it updates matrices, but the {group} group is always updated by "
                "AdamW: leave the name out, or set it to 'adamw'"
            )
    expert = config.optimizer.groups.get("expert", {})
    options = [key for key in expert if key.startswith("load_lr_")]
    if options and "load_lr" not in expert:
        raise ValueError(
            f"optimizer.expert.{options[0]} is set, but optimizer.expert.load_lr is not: "
            "set load_lr to 'batch_fraction' or 'ideal_normalized', or to 'none' to leave its options aside"
        )
    expand_load_lr(expert, top_k=config.moe.top_k)
