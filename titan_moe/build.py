"""From a Config to its parts: the one place that turns sections into arguments."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from titan_moe.balancer import BALANCERS, Balancer
from titan_moe.config import Config, find_component
from titan_moe.config.checks import parametrization_of
from titan_moe.config.sections import Optimizer as OptimizerTables
from titan_moe.config.sections import ValidationTask, balancer_tables
from titan_moe.data.build import (
    Data,
    SourceFiles,
    ValidationSet,
    build_data,
    build_validation,
    dataset_files,
    is_streamed,
    trained_on,
)
from titan_moe.data.own import check_own, is_own, own_data
from titan_moe.data.tasks import Question, Task, Templates, make_task, read_questions
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.model.attention import attention_heads
from titan_moe.model.experts_backend import EXPERTS_BACKENDS, use_experts_backend
from titan_moe.model.moe import MEASURED, WEIGHTS, InitState, Measure
from titan_moe.model.rope import RopeScaling
from titan_moe.model.routing import ROUTERS, ParametricRouter, force_balanced
from titan_moe.model.routing.common import asked_for, parametric
from titan_moe.model.transformer import Transformer
from titan_moe.model.wrappers import plain_name
from titan_moe.optimizer.build import BY_ELEMENT, OPTIMIZERS
from titan_moe.optimizer.groups import GROUP_PATTERNS, NO_MATRICES, Scale, parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import Optimizer, check_scalable, check_served, combine
from titan_moe.optimizer.schedule import SCHEDULES, Schedule
from titan_moe.parallelize.context_parallel import own_positions
from titan_moe.parallelize.float8 import quantize
from titan_moe.parallelize.mesh import Degrees, Meshes, resolve_degrees
from titan_moe.parallelize.parallelize import cast_parameters, parallelize
from titan_moe.runtime import machine, world
from titan_moe.runtime.command import logger
from titan_moe.runtime.compat import MESH_BY_PARAMETER, check_tensor_parallel
from titan_moe.runtime.dtypes import DTYPES
from titan_moe.runtime.world import Runtime

CLIPPED = (".wq.weight", ".wk.weight")  # what QK-clip scales after a step


def build_model(config: Config) -> Transformer:
    """Build the model of a config whose vocab_size is known, on the current default device (`meta`: no memory)."""
    model, moe, parametrization = config.model, config.moe, parametrization_of(config)

    # A selection bias that nothing moves would be zeros in every checkpoint, so it is there only for a balancer.
    return Transformer(
        vocab_size=model.vocab_size,
        dim=model.dim,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.head_dim,
        ffn_dim=model.ffn_dim,
        rope_theta=model.rope_theta,
        partial_rotary_factor=model.partial_rotary_factor,
        rope_scaling=rope_scaling(config),
        norm_eps=model.norm_eps,
        qk_norm=model.qk_norm,
        attention_bias=model.attention_bias,
        tie_embeddings=model.tie_embeddings,
        init_std=model.init_std,
        num_experts=moe.num_experts,
        num_identity_experts=moe.num_identity_experts,
        expert_dim=moe.expert_dim,
        num_shared_experts=moe.num_shared_experts,
        shared_expert_dim=moe.shared_expert_dim,
        shared_expert_gate=moe.shared_expert_gate,
        first_dense_layers=moe.first_dense_layers,
        layer_freq=moe.layer_freq,
        expert_dropout=moe.expert_dropout,
        router=build_router(config) if moe.num_experts else None,
        loss_chunk_tokens=config.training.loss_chunk_tokens,
        document_mask=config.data.document_mask,
        restart_positions=config.data.restart_positions,
        expert_bias=has_expert_bias(config),
        balancer_inits=balancer_inits(config),
        measures=measures(config),
        multipliers=parametrization.multipliers,
        std_of=parametrization.std_of,
    )


def rope_scaling(config: Config) -> RopeScaling | None:
    """The scaling of rotary positions that [model.rope_scaling.NAME] asks for."""
    for name, table in config.model.rope_scaling.items():
        return RopeScaling(name, **dataclasses.asdict(table))
    return None


def build_router(config: Config) -> ParametricRouter:
    """Build the router of [router]; ValueError where what it names gives none."""
    builder = find_component(ROUTERS, config.router.name)
    router = parametric(builder(top_k=config.moe.top_k, **config.router.arguments))
    if not callable(router.route):
        raise ValueError(f"router {config.router.name}: must give a function, gave {type(router.route).__name__}")

    # The debug switch wraps the router here, so that no layer has to know of it.
    return router._replace(route=force_balanced(router.route)) if config.debug.force_balanced_routing else router


def build_sharded(config: Config, mesh: Meshes | None, *, compile_blocks: bool) -> Transformer:
    """Build the model on the meta device and parallelize it over `mesh` (None: one process)."""
    # Without memory: a model may be larger than a process, which will have its shards alone.
    training = config.training
    with torch.device("meta"):
        model = build_model(config)

    # What changes parameters and their products comes first: `parallelize` cuts and compiles what it is given.
    cast_parameters(model, DTYPES[training.dtype])
    quantize(model, **dataclasses.asdict(config.quantize))
    use_experts_backend(model, find_component(EXPERTS_BACKENDS, config.moe.experts_backend))
    parallelize(
        model,
        mesh=mesh,
        param_dtype=DTYPES[training.mixed_precision_param],
        reduce_dtype=DTYPES[training.mixed_precision_reduce],
        checkpoint_mode=config.activation_checkpoint.mode,
        compile_blocks=compile_blocks,
        seq_len=training.seq_len,
        reshard_after_forward=config.parallelism.fsdp_reshard_after_forward,
    )
    return model


def degrees_of(config: Config, world_size: int) -> Degrees:
    """The sizes of the axes in a world of that many processes; ValueError for degrees that do not fit it or torch."""
    # torchtitan's names for the keys, the short ones of meshes from here on.
    parallel = config.parallelism
    degrees = resolve_degrees(
        world_size=world_size,
        replicate=parallel.data_parallel_replicate_degree,
        shard=parallel.data_parallel_shard_degree,
        expert=parallel.expert_parallel_degree,
        context=parallel.context_parallel_degree,
        tensor=parallel.tensor_parallel_degree,
        num_experts=config.moe.num_experts,
    )
    check_tensor_parallel(degrees.tensor)
    check_measures(config, degrees.expert)
    check_whole_sequences(config, degrees)
    return degrees


def check_measures(config: Config, expert_degree: int) -> None:
    """Raise ValueError where a balancer wants to see the experts' weights and a layer's forward has but shards."""
    if expert_degree == 1 or MESH_BY_PARAMETER:
        return
    for name, measure in measures(config).items():
        if set(asked_for(measure, MEASURED, 0)) & set(WEIGHTS):
            raise ValueError(
                f"balancer.{name} looks at the experts' weights, which with parallelism.expert_parallel_degree = "
                f"{expert_degree} needs torch 2.13 or newer, this is {torch.__version__}: set it to 1"
            )


def check_whole_sequences(config: Config, degrees: Degrees) -> None:
    """Raise ValueError where a router needs whole sequences and ranks have parts of them."""
    if degrees.per_sequence == 1 or not config.moe.num_experts or not build_router(config).whole_sequences:
        return
    axis = "context" if degrees.context > 1 else "tensor"
    raise ValueError(
        f"router.name = {config.router.name!r} looks at whole sequences, of which ranks have parts with "
        f"parallelism.{axis}_parallel_degree = {getattr(degrees, axis)}: set it to 1"
    )


def has_expert_bias(config: Config) -> bool:
    """Whether a balancer moves a selection bias, which is then a part of the model."""
    return any(balancer.moves_bias for _, balancer in build_balancers(config).values())


def balancer_inits(config: Config) -> dict[str, InitState]:
    """What makes the tensors that balancers keep of a MoE layer, by the balancers' names."""
    balancers = {name: balancer for name, (_, balancer) in build_balancers(config).items()}
    return {name: balancer.init for name, balancer in balancers.items() if balancer.init is not None}


def measures(config: Config) -> dict[str, Measure]:
    """What balancers measure in the forward of a MoE layer, by the balancers' names."""
    balancers = {name: balancer for name, (_, balancer) in build_balancers(config).items()}
    return {name: balancer.measure for name, balancer in balancers.items() if balancer.measure is not None}


def build_balancers(config: Config) -> dict[str, tuple[float, Balancer]]:
    """Each balancer at coefficient 1 with its coefficient beside it, so that steps report values before coefficients.

    A balancer that takes no `coeff` is as it is, with coefficient 1.
    """
    balancers = {}
    for name, component, arguments in balancer_tables(config):
        # One that takes a coefficient is built with 1; the step multiplies by what is set.
        builder = find_component(BALANCERS, component)
        default = inspect.signature(builder).parameters.get("coeff")
        if default is None:
            balancers[name] = (1.0, builder(**arguments))
        else:
            balancers[name] = (arguments.get("coeff", default.default), builder(**{**arguments, "coeff": 1.0}))
        if not isinstance(balancers[name][1], Balancer):
            raise ValueError(f"balancer {name}: must give a Balancer, gave {type(balancers[name][1]).__name__}")
    return balancers


def build_optimizer(config: Config, model: nn.Module, patterns: Mapping[str, str] = GROUP_PATTERNS) -> Optimizer:
    """Build the optimizer of [optimizer] over the model's parameter groups, with load-based rates if asked for.

    A group that names another optimizer gets from [optimizer] those arguments that this one takes. `patterns` tell
    the five groups of a model whose parameters have other names than ours. ValueError for a group that is set and has
    no parameter, and for an optimizer of matrices whose group has none.
    """
    # A group's name says who updates it; all else are settings of the group, among them the rates by load, which every
    # optimizer takes.
    arguments = {group: dict(table) for group, table in config.optimizer.groups.items()}
    names = {group: table.pop("name") for group, table in arguments.items() if "name" in table}
    matches = {group: table.pop("match") for group, table in arguments.items() if "match" in table}
    arguments = {group: expand_load_lr(table, top_k=config.moe.top_k) for group, table in arguments.items()}

    # a default that groups by pattern leave no parameter for was not set by the user, who need not take it back
    groups: list[dict[str, Any]] = parameter_groups(
        model.named_parameters(),
        arguments,
        patterns,
        matches=matches,
        heads=attention_heads(model),
        optional=[group for group, table in OptimizerTables().groups.items() if arguments.get(group) == table],
    )

    def build(name: str, members: list[dict[str, Any]]) -> torch.optim.Optimizer:
        # What [optimizer] sets is meant for the optimizer named there. One that a group names takes what it knows of
        # it, such as `lr`.
        builder, given = find_component(OPTIMIZERS, name), config.optimizer.arguments
        taken = inspect.signature(builder).parameters
        if name != config.optimizer.name:
            given = {key: value for key, value in given.items() if key in taken}

        # Settings that all of its groups have alike are its arguments too: an own optimizer for [optimizer.expert] may
        # read them there, and need not know of torch's groups.
        tables = [arguments.get(group["name"], {}) for group in members]
        alike = {k: v for k, v in tables[0].items() if k in taken and all(table.get(k) == v for table in tables)}
        return builder(members, **{**given, **alike})

    used = {group["name"]: names.get(group["name"], config.optimizer.name) for group in groups}
    set_scales(config, model, groups, used, arguments)
    optimizer = combine(groups, used, build)
    by_head = {group["name"] for group in groups if group.get("per_head")}
    check_served(optimizer, by_head | (matches.keys() & names.keys()))
    if config.training.qk_clip:
        check_scalable(optimizer, [p for name, p in model.named_parameters() if plain_name(name).endswith(CLIPPED)])
    return optimizer


def set_scales(
    config: Config,
    model: nn.Module,
    groups: list[dict[str, Any]],
    used: Mapping[str, str],
    arguments: Mapping[str, dict[str, Any]],
) -> None:
    """Give groups the `scales` of [parametrization], which may give each parameter a rate of its own.

    `used` is the optimizer of each group, `arguments` what a group has of its own.
    """
    # an optimizer of matrices leaves some groups to AdamW
    by_adamw = [group for group in NO_MATRICES if used.get(group) in OPTIMIZERS.keys() - BY_ELEMENT]
    used = {**used, **dict.fromkeys(by_adamw, "adamw")}
    scale_of = parametrization_of(config).scale_of
    name_of = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    for group in groups:
        settings = {**config.optimizer.arguments, **arguments.get(group["name"], {})}
        scales = [scale_of(name_of[parameter], used[group["name"]], settings) for parameter in group["params"]]
        if any(scale != Scale() for scale in scales):
            group["scales"] = scales


def build_schedule(config: Config) -> Schedule:
    """Build the schedule of [lr_scheduler] for training.steps steps."""
    builder = find_component(SCHEDULES, config.lr_scheduler.name)
    return builder(steps=config.training.steps, **config.lr_scheduler.arguments)


def load_data(config: Config, rt: Runtime, degrees: Degrees) -> Data:
    """Prepare the tokenizer and this rank's batches, of each sequence its part."""
    # A validation set or a task that is not there is told now, and not when the training data have been tokenized.
    data, training = config.data, config.training
    sets = config.validation.sets if config.validation.enable else {}
    questions = read_tasks(config) if config.validation.enable else {}
    for name, of_set in sets.items():
        key = f"validation.sets.{name}"
        if is_own(of_set.dataset):
            check_own(own_data(of_set.dataset, of_set.arguments, f"{key}.dataset"))
        elif not is_streamed(of_set.dataset):
            dataset_files(of_set.dataset, of_set.path, f"{key}.path")

    # Ranks that share sequences are neighbours, and read the same ones at different positions. One process of each node
    # fills the cache, for nodes need not have a disk in common.
    share = {
        "dp_rank": rt.rank // degrees.per_sequence,
        "dp_degree": degrees.data,
        "positions": own_positions(training.seq_len, rt.rank, degrees),
        "device": rt.device,
        "is_main": rt.local_rank == 0,
        "barrier": world.barrier,
    }
    prepared = build_data(
        **data_arguments(config),
        **share,
        tokenizer=data.tokenizer,
        eot_token=data.eot_token,
        global_batch_size=training.global_batch_size,
        local_batch_size=training.local_batch_size,
        num_workers=data.num_workers,
    )
    prepared = prepared._replace(tasks=make_tasks(config, questions, prepared.tokenizer, is_main=rt.is_main))
    if sets:
        by_name = {**prepared.validation_sets, **load_validation_sets(config, prepared.tokenizer, **share)}
        prepared = prepared._replace(validation_sets=by_name)
    if any(is_own(part.dataset) for part in (data, *data.sources.values(), *sets.values())):
        _check_alike(prepared)

    # It may be meant, and the run goes on: but the numbers of such a set look better than they are.
    train = [(one.dataset, one.path, one.arguments) for one in data.sources.values() or [data]]
    for name, of_set in sets.items() if rt.is_main else ():
        if both := trained_on((of_set.dataset, of_set.path, of_set.arguments), train, cache_folder(config)):
            shown = both[0] + (f" and {len(both) - 1} more" if both[1:] else "")
            logger.warning(
                "validation.sets.%s has text that is trained on, too: %s: its numbers are not those of text that is "
                "new to the model",
                *(name, shown),
            )
    return prepared


def _check_alike(data: Data) -> None:
    """Raise ValueError, on every rank, where ranks read different documents, as a function outside may give them."""
    fingerprints = {**data.fingerprints, **{name: one.fingerprint for name, one in data.validation_sets.items()}}
    if any(others != fingerprints for others in world.all_gather(fingerprints)):
        raise ValueError(
            "data: the functions that give documents gave other ones to some processes: they must give the same ones "
            "each time and everywhere (random numbers from a seed, files in a fixed order)"
        )


def load_validation_sets(config: Config, tokenizer: str | Tokenizer, **share: Any) -> dict[str, ValidationSet]:
    """Prepare the sets of [validation.sets] by name; `share` are the arguments of `build_validation` that say whose."""
    validation = config.validation
    return {
        name: build_validation(
            dataset=of_set.dataset,
            path=of_set.path,
            arguments=of_set.arguments,
            key=f"validation.sets.{name}.path",
            tokenizer=tokenizer,
            seq_len=config.training.seq_len,
            packing=config.data.packing,
            steps=validation.steps,
            local_batch_size=validation.local_batch_size,
            cache_folder=cache_folder(config),
            document_mask=config.data.document_mask,
            **share,
        )
        for name, of_set in validation.sets.items()
    }


def read_tasks(config: Config) -> dict[str, list[Question]]:
    """Read the questions of [validation.tasks] by name."""
    return {
        name: read_questions(
            task.path,
            templates_of(task),
            num_fewshot=task.num_fewshot,
            fewshot_path=task.fewshot_path,
            limit=task.limit,
            key=f"validation.tasks.{name}",
        )
        for name, task in config.validation.tasks.items()
    }


def make_tasks(
    config: Config, questions: Mapping[str, Sequence[Question]], tokenizer: Tokenizer, *, is_main: bool = True
) -> dict[str, Task]:
    """Tokenize what `read_tasks` has read; the main rank tells what it costs."""
    tasks = {}
    for name, of_task in questions.items():
        key = f"validation.tasks.{name}"
        templates = templates_of(config.validation.tasks[name])
        tasks[name] = task = make_task(of_task, templates, tokenizer, seq_len=config.training.seq_len, key=key)
        if is_main:
            counts = (key, len(task.questions), len(task.items), task.num_tokens)
            logger.info("%s: %d questions, %d sequences of %d tokens together", *counts)
    return tasks


def templates_of(task: ValidationTask) -> Templates:
    """How lines become questions."""
    return Templates(**{name: getattr(task, name) for name in Templates._fields})


def data_arguments(config: Config) -> dict[str, Any]:
    """What of [data], [training] and [validation] says which tokens there are, as arguments of `build_data`."""
    # Nothing of ranks is among them, so an evaluation by one process reads the same tokens as the run did.
    data, training, validation = config.data, config.training, config.validation
    return {
        "dataset": data.dataset,
        "path": data.path,
        "arguments": data.arguments,
        "sources": [SourceFiles(name, **dataclasses.asdict(source)) for name, source in data.sources.items()],
        "steps": training.steps,
        "seq_len": training.seq_len,
        "packing": data.packing,
        "seed": training.seed,
        "validation_fraction": data.validation_fraction,
        "validation_path": data.validation_path,
        "validation_steps": validation.steps,
        "validation_local_batch_size": validation.local_batch_size,
        "cache_folder": cache_folder(config),
        "document_mask": data.document_mask,
    }


def cache_folder(config: Config) -> str:
    """The folder of tokenized data."""
    return config.data.cache_folder or str(machine.user_cache_folder())


def with_vocab_size(config: Config, tokens: int) -> Config:
    """Fill in model.vocab_size: the tokenizer's size padded to a multiple of 64, or the configured one if it fits."""
    size = config.model.vocab_size or -(-tokens // 64) * 64
    if tokens > size:
        raise ValueError(
            f"model.vocab_size ({size}) is smaller than the tokenizer's vocabulary ({tokens}): "
            "raise it, or set it to 0 to take the tokenizer's"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
