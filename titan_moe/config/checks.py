"""What must hold between keys, checked before any process group or data exists, and what to tell of sound ones."""

import dataclasses

import torch

from titan_moe.balancer import BALANCERS, SEEN
from titan_moe.config.schema import find_component
from titan_moe.config.sections import BalancerTable, Config, Data, ValidationTask, balancer_tables
from titan_moe.model.attention import checked_head_dim
from titan_moe.model.experts_backend import EXPERTS_BACKENDS, check_signature
from titan_moe.model.routing import ROUTERS, Places
from titan_moe.model.routing.common import OFFERED, asked_for, parametric
from titan_moe.model.transformer import moe_layer_ids
from titan_moe.optimizer.build import BY_ELEMENT, OPTIMIZERS
from titan_moe.optimizer.groups import NO_MATRICES, table_of
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.schedule import SCHEDULES
from titan_moe.parametrization import PARAMETRIZATIONS, Parametrization, Shapes
from titan_moe.runtime.remote import is_url


def check_config(config: Config) -> None:
    """Check every constraint between keys that needs no process group, no data and no model."""
    # Sizes first: a router is tried on small tensors further down, and even these grow with moe.num_experts.
    _check_size(config)
    _check_places(config)
    model = config.model
    num_kv_heads = model.num_kv_heads or model.num_heads
    checked_head_dim(model.dim, model.num_heads, num_kv_heads, model.head_dim, model.partial_rotary_factor)
    _check_rope_scaling(config)
    if config.moe.num_experts:
        _check_experts(config)
        check_combinations(config)
    else:
        _check_dense(config)

    # The rest goes for dense models too.
    _check_qk_clip(config)
    _check_batches(config)
    _check_parts(config)
    _check_optimizer(config)
    _check_parametrization(config)


def _check_places(config: Config) -> None:
    """Refuse URLs where files are appended to, locked or mapped, which takes a disk."""
    places = {
        "job.dump_folder": (config.job.dump_folder, "checkpoint.folder may be a URL"),
        "data.cache_folder": (config.data.cache_folder, "data.path may be a URL"),
    }
    for key, (folder, mend) in places.items():
        if is_url(folder):
            raise ValueError(f"{key} ({folder}): must be a folder on a disk: {mend}")


LARGEST = 2**44  # elements of a tensor: 64 TiB in fp32, above any machine and far below where sizes overflow


def _check_size(config: Config) -> None:
    """Refuse a tensor that no machine holds, by the keys that make it: torch would say that some number overflows."""
    # The product is what overflows: any of its keys may be the one with too many digits, so all are named.
    model, moe, training = config.model, config.moe, config.training
    sizes = {
        "model.vocab_size x model.dim": model.vocab_size * model.dim,
        "model.dim x model.dim": model.dim**2,
        "model.dim x model.num_heads x model.head_dim": model.dim * model.num_heads * model.head_dim,
        "model.dim x model.ffn_dim": model.dim * model.ffn_dim,
        "moe.num_experts x model.dim x moe.expert_dim": moe.num_experts * model.dim * moe.expert_dim,
        "moe.num_identity_experts x model.dim": moe.num_identity_experts * model.dim,
        "moe.num_shared_experts x model.dim x moe.expert_dim": moe.num_shared_experts * model.dim * moe.expert_dim,
        "moe.num_shared_experts x model.dim x moe.shared_expert_dim": (
            moe.num_shared_experts * model.dim * moe.shared_expert_dim
        ),
    }
    if training.local_batch_size > 0:  # -1 follows from the number of ranks, which is not known yet
        sizes["training.local_batch_size x training.seq_len x model.dim"] = (
            training.local_batch_size * training.seq_len * model.dim
        )

    # One message is enough: with the largest lowered, the next one has its turn.
    keys, size = max(sizes.items(), key=lambda item: item[1])
    if size > LARGEST:
        raise ValueError(f"a tensor would have {keys} = {size:.3g} elements: no machine holds that, lower these keys")


SCALING_KEYS = {  # of [model.rope_scaling.NAME], those that NAME goes by
    "linear": ("factor",),
    "llama3": ("factor", "original_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_seq_len", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}


def _check_rope_scaling(config: Config) -> None:
    """Refuse a scaling that there is not, two of them, and keys that the one does not look at."""
    tables = config.model.rope_scaling
    if len(tables) > 1:
        raise ValueError(f"model.rope_scaling has {' and '.join(tables)}: leave one, and set others to false")
    for name, table in tables.items():
        key = f"model.rope_scaling.{name}"
        if name not in SCALING_KEYS:
            raise ValueError(f"{key}: unknown scaling (valid: {', '.join(SCALING_KEYS)})")
        for field in dataclasses.fields(table):
            if field.name not in SCALING_KEYS[name] and getattr(table, field.name) != field.default:
                valid = ", ".join(SCALING_KEYS[name])
                raise ValueError(f"{key}.{field.name} has no use: {name} goes by {valid}")

        # What lies between two ends has to have some room.
        for lower, upper in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            low, high = getattr(table, lower), getattr(table, upper)
            if low >= high:
                raise ValueError(f"{key}.{lower} ({low:g}) must be below {upper} ({high:g})")


def _check_dense(config: Config) -> None:
    """Refuse what is set for experts where there are none: it would do nothing."""
    # A base file may have turned these on, so the message says which line takes them back.
    moe = config.moe
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

    # Keys that only MoE layers, and measures of them, look at.
    if config.debug.force_balanced_routing:
        raise ValueError("debug.force_balanced_routing = true needs experts, but moe.num_experts is 0")
    if "quantize.grouped_mm.float8" in config.quantize.converters:
        raise ValueError(
            "quantize.converters has quantize.grouped_mm.float8, which needs experts, but moe.num_experts is 0: "
            "leave it out"
        )
    for key in ("num_identity_experts", "expert_dropout", "shared_expert_dim", "shared_expert_gate"):
        if value := getattr(moe, key):
            raise ValueError(f"moe.{key} = {value} needs experts, but moe.num_experts is 0: leave it out")
    if moe.experts_backend != "grouped_mm":
        raise ValueError(
            f"moe.experts_backend = {moe.experts_backend!r} needs experts, but moe.num_experts is 0: leave it out"
        )
    for key in ("expert_stats_freq", "balance_tax_freq"):
        if freq := getattr(config.metrics, key):
            raise ValueError(f"metrics.{key} = {freq} needs experts, but moe.num_experts is 0: set it to 0")


def _check_experts(config: Config) -> None:
    """What the MoE layers need, but for what `check_combinations` knows of the router and the balancers."""
    moe = config.moe
    _check_experts_backend(config)
    _check_balance_tax(config)
    _check_identity_experts(config)
    for key in ("shared_expert_dim", "shared_expert_gate"):
        if (value := getattr(moe, key)) and not moe.num_shared_experts:
            raise ValueError(f"moe.{key} = {value} needs shared experts: set moe.num_shared_experts, or leave it out")
    if moe.top_k > moe.num_experts:
        raise ValueError(f"moe.top_k ({moe.top_k}) must be at most moe.num_experts ({moe.num_experts})")
    if moe.first_dense_layers >= config.model.num_layers:
        raise ValueError(
            f"moe.first_dense_layers ({moe.first_dense_layers}) must be less than model.num_layers "
            f"({config.model.num_layers}); for a dense model set moe.num_experts = 0"
        )


def _check_experts_backend(config: Config) -> None:
    """Refuse a backend that is not there now, and not when each rank builds its model."""
    name = config.moe.experts_backend
    check_signature(name, find_component(EXPERTS_BACKENDS, name, "configuration", "moe.experts_backend"))
    if name != "grouped_mm" and "quantize.grouped_mm.float8" in config.quantize.converters:
        raise ValueError(
            f"moe.experts_backend = {name!r} does not go with quantize.converters = "
            "['quantize.grouped_mm.float8']: experts in float8 are computed by 'grouped_mm' alone"
        )
    if name != "grouped_mm" and config.moe.expert_dropout:
        raise ValueError(
            f"moe.expert_dropout = {config.moe.expert_dropout} is inside the experts, and moe.experts_backend = "
            f"{name!r} computes these without it: set it to 0, or take 'grouped_mm'"
        )


def _check_identity_experts(config: Config) -> None:
    """Refuse with identity experts what counts or limits the rows of experts, and would take them for such."""
    number, router, arguments = config.moe.num_identity_experts, config.router.name, config.router.arguments
    if number == 0:
        return
    key = f"moe.num_identity_experts = {number}"

    # Routers from outside may mean something else by these names.
    counts_rows = router in ("expert_choice", "token_rounding")
    if counts_rows or (router in ROUTERS and arguments.get("capacity_factor")):
        what = f"router.name = {router!r}" if counts_rows else "router.capacity_factor"
        raise ValueError(f"{key} does not go with {what}: an identity expert has room for all; take another router")
    if router in ROUTERS and arguments.get("num_groups", 1) > 1:
        raise ValueError(
            f"{key} does not go with router.num_groups = {arguments['num_groups']}: groups are of experts that sit "
            "side by side on a node, identity experts sit nowhere: set num_groups = 1"
        )

    # Of both the other side is the number of experts of a token, which differs from token to token.
    for group, table in config.optimizer.groups.items():
        if table.get("load_lr") == "batch_fraction":
            raise ValueError(
                f"{key} does not go with {table_of(group)}.load_lr = 'batch_fraction', which counts moe.top_k "
                "experts of a token: take 'ideal_normalized'"
            )
    if freq := config.metrics.balance_tax_freq:
        raise ValueError(
            f"{key} does not go with metrics.balance_tax_freq = {freq}: balanced routing would compute another number "
            "of rows: set it to 0"
        )


def _check_balance_tax(config: Config) -> None:
    """The tax is the time of learned routing over that of balanced routing: the two must differ."""
    # With a load that is even anyway it would measure nothing but noise around 1.
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


def _check_qk_clip(config: Config) -> None:
    """Refuse QK-clip where a norm comes after the weights that it scales."""
    qk_clip = config.training.qk_clip
    if qk_clip and config.model.qk_norm != "none":
        raise ValueError(
            f"training.qk_clip = {qk_clip:g} scales wq and wk, which model.qk_norm = {config.model.qk_norm!r} undoes "
            "(and the norm limits the logits itself): set training.qk_clip to 0, or model.qk_norm to 'none'"
        )


def _check_batches(config: Config) -> None:
    """Batches come out even, and there is data to take them from."""
    # Each -1 follows from the other number, so one of them has to be there. Ranks count too, but these are not known
    # yet: `resolve_batch_sizes` checks the rest.
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

    # Said now and not by an empty validation after many steps, or by a reader without files.
    if config.validation.enable and data.validation_fraction == 0 and not data.validation_path:
        raise ValueError(
            "validation.enable = true needs data to validate on: set data.validation_fraction above 0 or "
            "data.validation_path, or turn it off with validation.enable = false"
        )
    _check_sources(data)
    if ":" in data.dataset and data.path:
        raise ValueError(f"data.path ({data.path[0]}) has no use: {data.dataset} takes no argument path")
    if ":" in data.dataset and data.sources:
        raise ValueError(f"data.dataset ({data.dataset}) has no use beside data.sources: make it one of them")
    if data.restart_positions and not data.document_mask:
        raise ValueError(
            "data.restart_positions = true needs data.document_mask = true: tokens that see other documents would take "
            "these to be near: turn it off, or the mask on"
        )
    if data.dataset in ("text", "hf") and not data.path and not data.sources:
        raise ValueError(f"data.dataset = {data.dataset!r} needs data.path: the files to read or the name on the hub")
    _check_validation_sets(config)
    _check_validation_tasks(config)


def _check_validation_sets(config: Config) -> None:
    """Refuse a set that says nothing of where its documents are, or too much."""
    for name, held_out in config.validation.sets.items():
        key = f"validation.sets.{name}"
        if name in config.data.sources:
            raise ValueError(f"{key}: what is held out of data.sources.{name} is called so: take another name")
        if held_out.dataset in ("text", "hf") and not held_out.path:
            raise ValueError(
                f"{key} has no data: set {key}.path to the files to validate on (or to a name on the hub, with "
                f"{key}.dataset = 'hf'), or {key}.dataset to 'stdlib' or 'fineweb_edu'"
            )
        if held_out.dataset not in ("text", "hf") and held_out.path:
            raise ValueError(
                f"{key}.path ({held_out.path[0]}) has no use with {key}.dataset = {held_out.dataset!r}: leave one out"
            )


# What a task of a kind does not look at.
UNUSED_OF_TASKS = {
    "multiple_choice": ("target",),
    "cloze": ("choices", "answer", "labels"),
    "last_word": ("choices", "answer", "labels", "target"),
}


def _check_validation_tasks(config: Config) -> None:
    """Refuse a task without questions, with another's name, or due at steps that have no validation."""
    validation = config.validation
    for name, task in validation.tasks.items():
        key = f"validation.tasks.{name}"
        for other in ("validation.sets", "data.sources"):
            if name in (validation.sets if other == "validation.sets" else config.data.sources):
                raise ValueError(f"{key}: {other}.{name} has its numbers under the same name: take another one")
        if not task.path:
            raise ValueError(f"{key} has no questions: set {key}.path to files of JSON lines")
        if task.freq % validation.freq:
            raise ValueError(
                f"{key}.freq ({task.freq}) must be a multiple of validation.freq ({validation.freq}): tasks are a part "
                "of validations"
            )
        for unused in UNUSED_OF_TASKS[task.kind]:
            if getattr(task, unused) != getattr(ValidationTask(), unused):
                raise ValueError(f"{key}.{unused} has no use with {key}.kind = {task.kind!r}: leave one out")
        if task.fewshot_path and not task.num_fewshot:
            raise ValueError(f"{key}.fewshot_path has no use with {key}.num_fewshot = 0: set that, or leave it out")


def _check_parts(config: Config) -> None:
    """What tensor and context parallelism cut has to divide evenly."""
    model, moe, training = config.model, config.moe, config.training
    tensor, context = config.parallelism.tensor_parallel_degree, config.parallelism.context_parallel_degree

    # The widths of the layers that there are: a model without dense layers does not use model.ffn_dim.
    widths = {"model.num_heads": model.num_heads, "model.num_kv_heads": model.num_kv_heads or model.num_heads}
    if not moe.num_experts or moe.first_dense_layers or moe.layer_freq > 1:
        widths["model.ffn_dim"] = model.ffn_dim
    if moe.num_experts and moe.num_shared_experts:
        key = "moe.shared_expert_dim" if moe.shared_expert_dim else "moe.expert_dim"
        widths[f"moe.num_shared_experts x {key}"] = moe.num_shared_experts * (moe.shared_expert_dim or moe.expert_dim)
    for name, width in widths.items():
        if width % tensor:
            raise ValueError(f"parallelism.tensor_parallel_degree ({tensor}) must divide {name} ({width})")
    if "quantize.linear.float8" in config.quantize.converters and tensor > 1:
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {tensor} does not go with quantize.linear.float8, whose scales are "
            "of whole matrices: leave the converter out (quantize.grouped_mm.float8 goes), or take degree 1"
        )

    # Context parallelism first: its multiple includes that of tensor parallelism, and says more.
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
    """Refuse settings of the optimizer that would be taken and do nothing."""
    # An optimizer of matrices leaves the embedding and the norms to AdamW: the user would think that it does not.
    if config.optimizer.arguments.get("lr") == 0:
        raise ValueError("optimizer.lr = 0 trains nothing: it must be greater than 0 (a group's own lr may be 0)")
    for group in NO_MATRICES:
        name = config.optimizer.groups.get(group, {}).get("name")
        if name in OPTIMIZERS and name not in BY_ELEMENT:
            raise ValueError(
                f"optimizer.{group}.name = {name!r}: it updates matrices, but the {group} group is always updated by "
                f"element: leave the name out for AdamW, or set it to one of {', '.join(BY_ELEMENT)}"
            )

    # The options alone may be the rest of a `load_lr` that somebody forgot; 'none' says that it is meant.
    for group, table in config.optimizer.groups.items():
        key = table_of(group)
        options = [option for option in table if option.startswith("load_lr_")]
        if options and "load_lr" not in table:
            raise ValueError(
                f"{key}.{options[0]} is set, but {key}.load_lr is not: "
                "set load_lr to 'batch_fraction' or 'ideal_normalized', or to 'none' to leave its options aside"
            )
        expand_load_lr(table, top_k=config.moe.top_k, key=key)


def parametrization_of(config: Config) -> Parametrization:
    """Build the parametrization of [parametrization] for the model's sizes."""
    # Whether a router has parameters of its own shows only in what its builder gives; "standard" need not know.
    model, moe, router = config.model, config.moe, config.router
    own_router = False
    if moe.num_experts and config.parametrization.name != "standard":
        route = find_component(ROUTERS, router.name)(top_k=moe.top_k, **router.arguments)
        own_router = parametric(route).init is not None

    # A builder gets numbers, not the configuration.
    builder = find_component(PARAMETRIZATIONS, config.parametrization.name, "configuration", "parametrization.name")
    shapes = Shapes(
        dim=model.dim,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.channels,
        ffn_dim=model.ffn_dim,
        init_std=model.init_std,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        expert_dim=moe.expert_dim,
        num_shared_experts=moe.num_shared_experts,
        shared_expert_dim=moe.shared_expert_dim or moe.expert_dim,
        router=router.name,
        router_arguments=router.arguments,
        own_router=own_router,
    )
    built = builder(shapes=shapes, **config.parametrization.arguments)
    if not isinstance(built, Parametrization):
        raise ValueError(
            f"parametrization.name = {config.parametrization.name!r} must give a Parametrization, gave a "
            f"{type(built).__name__}"
        )
    return built


def _check_parametrization(config: Config) -> None:
    """Refuse a base that does not fit the model, and optimizers that the parametrization has no rule for."""
    parametrization, optimizer = parametrization_of(config), config.optimizer
    for table in ({}, *optimizer.groups.values()):
        settings = {**optimizer.arguments, **table}
        parametrization.scale_of("layers.0.attention.wq.weight", table.get("name", optimizer.name), settings)


ROUTERS_WITH_EVEN_LOAD = ("expert_choice", "base")  # the load of a forward pass is even whatever the logits


def check_combinations(config: Config) -> None:
    """Refuse what would fail later or do nothing; each error says what to change."""
    router = config.router.name
    known = [table for table in balancer_tables(config) if table.component in BALANCERS]
    biased = any(BALANCERS[component](**options).moves_bias for _, component, options in known)
    if router in ROUTERS:
        _try_router(config, biased)

    # What each of the two takes, but not together.
    for label, component, options in known:
        if "routings" in asked_for(BALANCERS[component](**options).loss, SEEN, 3) and num_moe_layers(config) < 2:
            raise ValueError(
                f"balancer.{label} goes from one MoE layer to the next, but this model has 1: set {label} = false "
                "under [balancer]"
            )
    for table in known:
        _check_balancer(config, table)
    if config.debug.force_balanced_routing and router in ROUTERS_WITH_EVEN_LOAD:
        raise ValueError(
            f"debug.force_balanced_routing = true deals experts out in turn, but router.name = {router!r} is even by "
            "construction: switch one of them off"
        )


def _try_router(config: Config, biased: bool) -> None:
    """Two tokens through a router of the registry, which itself refuses what does not fit it."""
    # Not for one from outside: it may need more than zeros. Random numbers that it draws are not to change the run's.
    width = config.moe.router_width
    route = parametric(ROUTERS[config.router.name](top_k=config.moe.top_k, **config.router.arguments)).route
    places = Places(positions=torch.arange(2).unsqueeze(0), document_ids=torch.zeros(1, 2, dtype=torch.int64))
    asked = {name: place for name, place in places._asdict().items() if name in asked_for(route, OFFERED)}
    with torch.random.fork_rng(devices=[]):
        route(torch.zeros(2, width), torch.zeros(width) if biased else None, **asked)


def _check_balancer(config: Config, table: BalancerTable) -> None:
    """Refuse a balancer of the registry that does not go with the router or would do nothing."""
    (label, component, options), router, arguments = table, config.router.name, config.router.arguments
    if component == "aux_loss" and router in ROUTERS_WITH_EVEN_LOAD:
        raise ValueError(
            f"balancer.{label} has no effect with router.name = {router!r}, whose load is even by construction: "
            f"set {label} = false under [balancer]"
        )
    if component == "aux_loss" and options.get("scope") == "global_batch_exact":
        if arguments.get("jitter") or arguments.get("noise_std") or config.moe.expert_dropout:
            raise ValueError(
                f'balancer.{label}.scope = "global_batch_exact" routes every token twice, but with router.jitter, '
                "router.noise_std or moe.expert_dropout the second time differs: switch the noise off, or take "
                'scope = "global_batch"'
            )
        if router in ("token_rounding", "emo"):
            raise ValueError(
                f'balancer.{label}.scope = "global_batch_exact" routes every token twice, but with router.name = '
                f'{router!r} the second time differs: take scope = "global_batch"'
            )

    # The rules even the load that there is, or compare with a token's K-th score of all experts.
    is_quantile = options.get("rule") == "quantile"
    if component == "loss_free" and is_quantile and arguments.get("num_groups", 1) > 1:
        raise ValueError(
            f'balancer.{label}.rule = "quantile" compares each expert with the top_k of all experts, but '
            f'router.num_groups ({arguments["num_groups"]}) limits the choice: take rule = "sign" or num_groups = 1'
        )
    if component == "loss_free" and is_quantile and router in ("token_rounding", "emo"):
        raise ValueError(
            f'balancer.{label}.rule = "quantile" compares each expert with the top_k of all experts, but router.name = '
            f'{router!r} takes others, too, or not all of these: take rule = "sign"'
        )
    if router == "threshold" and not is_quantile and BALANCERS[component](**options).moves_bias:
        raise ValueError(
            f"balancer.{label} evens the load whatever its sum, but router.name = 'threshold' is to have moe.top_k "
            'experts a token on average: take balancer.loss_free with rule = "quantile"'
        )


def num_moe_layers(config: Config) -> int:
    """How many layers of the model have experts."""
    moe = config.moe
    return len(moe_layer_ids(config.model.num_layers, moe.num_experts, moe.first_dense_layers, moe.layer_freq))


def cautions(config: Config) -> list[str]:
    """What to say once at the start of a run: choices that are sound only for some uses."""
    # A schedule from outside may mean something else by `warmup_steps`, so it is not judged.
    said = []
    steps, warmup = config.training.steps, config.lr_scheduler.arguments.get("warmup_steps", 0)
    if config.lr_scheduler.name in SCHEDULES and warmup >= steps:
        said.append(
            f"lr_scheduler.warmup_steps ({warmup}) is not below training.steps ({steps}): learning rates rise until "
            f"the run ends, to {steps / warmup:.2g} of what is set, and do not fall again: lower warmup_steps"
        )

    # A rate that falls takes from the average what it is for, but a study may want to see that.
    names = [config.optimizer.name, *(table.get("name") for table in config.optimizer.groups.values())]
    if "schedule_free_adamw" in names and config.lr_scheduler.name in SCHEDULES.keys() - {"constant"}:
        said.append(
            f"schedule_free_adamw averages weights in place of a rate that falls, and lr_scheduler.name = "
            f"{config.lr_scheduler.name!r} lets it fall as well: set it to 'constant'"
        )
    if config.moe.num_experts == 0:
        return said

    return said + _cautions_of_router(config)


def _cautions_of_router(config: Config) -> list[str]:
    """Routers that look at more tokens than one, whose order tells what is to be predicted; thresholds nobody moves."""
    # Those whose evaluation sees the future too are told apart: their losses can't be compared with others'.
    said, name, arguments = [], config.router.name, config.router.arguments
    if name == "expert_choice":
        said.append(
            "router.name = 'expert_choice' compares each token with later ones: a causal model sees the future, in "
            "training and in evaluation, so its losses are too good and it cannot generate as it was trained"
        )
    if name == "emo":
        said.append(
            "router.name = 'emo' chooses the experts of a token by all tokens of its document: a causal model sees the "
            "future, in training and in evaluation, so its losses are too good and it cannot generate as it was trained"
        )

    # Of these the losses of training alone are too good: what a validation says can be believed.
    if name in ("base", "sinkhorn"):
        said.append(
            f"router.name = {name!r} assigns tokens with an eye on later ones in training: a causal model sees the "
            "future there; evaluation takes each token's best experts"
        )
    if name == "token_rounding":
        said.append(
            "router.name = 'token_rounding' drops and adds tokens with an eye on later ones in training: a causal "
            "model sees the future there; evaluation takes each token's best experts"
        )
    if arguments.get("capacity_factor") and arguments.get("drop_policy") == "score":
        said.append(
            "router.drop_policy = 'score' drops a token in favour of later ones in training: a causal model sees the "
            "future there; drop_policy = 'position' does not"
        )

    # A mask of attention does not hide tokens from a router.
    seen = {"causal_bias": "those before in their sequence", "expert_choice": "all of a forward pass"}
    seen |= dict.fromkeys(("base", "sinkhorn", "token_rounding"), "all of a forward pass in training")
    has_capacity = arguments.get("capacity_factor") and name in ROUTERS
    if config.data.document_mask and (name in seen or has_capacity):
        key = f"router.name = {name!r}" if name in seen else "router.capacity_factor"
        said.append(
            f"data.document_mask = true hides other documents from attention alone: {key} chooses the experts of "
            f"tokens by {seen.get(name, seen['base'])}, whatever documents they are of"
        )

    # Nothing of a threshold router is wrong alone, but the model would cost what nobody has chosen.
    components = [table.component for table in balancer_tables(config)]
    if name == "threshold" and not any(c == "loss_free" or ":" in c for c in components):
        said.append(
            "router.name = 'threshold' has moe.top_k experts a token on average only where something moves its "
            'thresholds: set balancer.loss_free.rule = "quantile"'
        )
    return said


def _check_sources(data: Data) -> None:
    """Check [data.sources.NAME] by itself and beside [data]."""
    if data.sources and data.path:
        raise ValueError(f"data.path ({data.path}) has no use beside data.sources: make it one of them")
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if source.dataset == "text" and not source.path:
            raise ValueError(f"{key}.path is missing: give the files to read, or dataset = 'stdlib'")
        if source.dataset == "hf" and not source.path:
            raise ValueError(f"{key}.path is missing: give the name of the data set on the hub")
        if source.dataset not in ("text", "hf") and source.path:
            raise ValueError(f"{key}.path ({source.path}) has no use with dataset = {source.dataset!r}: leave one out")
        if 0 < source.until_step < source.from_step:
            raise ValueError(
                f"{key}.until_step ({source.until_step}) is before its from_step ({source.from_step}): no step has it"
            )
