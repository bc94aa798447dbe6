"""To and from Megatron-core's `torch_dist` checkpoints: those of torch.distributed, with other names for the tensors.

Where all layers are of one kind a tensor there is that of all of them, stacked along dim 0; else layers are numbered.
The norm before a MoE layer's experts has two names, by the spec of the layer: of torch's own modules (`local`) or of
the Transformer Engine (`te`).

Shapes: L layers, G groups of heads, Q queries of a group, H channels of a head, D model width, F feed-forward width.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_moe.checkpoint import resolve_checkpoint
from titan_moe.checkpoint.folder import run_on_all_ranks
from titan_moe.checkpoint.lazy import (
    Lazy,
    LazyTensors,
    check_sums,
    joined,
    narrowed,
    read_lazily,
    sharded,
    unstacked,
    write_lazily,
)
from titan_moe.checkpoint.store import read_config
from titan_moe.config import Config, load_config, load_saved, to_toml
from titan_moe.convert.fold import check_without_factors, fold_tensors, without_factors
from titan_moe.convert.hf.architectures import moe_layers, shared_width
from titan_moe.convert.hf.convert import OUR_CONFIG, model_tensors, shapes_of
from titan_moe.convert.new_folder import new_checkpoint, new_folder
from titan_moe.convert.verify import check_against_megatron, warn_of_mask

logger = logging.getLogger(__name__)
MOE_NORM = {"local": "mlp.linear_fc1.layer_norm_weight", "te": "pre_mlp_layernorm.weight"}
OTHER_STATE = ("optimizer.", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")  # not the model's


class Part(NamedTuple):
    """One tensor of a layer there and those of ours that it holds; `join` makes it of ours, `split` ours of it."""

    theirs: str
    ours: tuple[str, ...]
    join: Callable[[list[Lazy]], Lazy] = lambda parts: parts[0]
    split: Callable[[Lazy], list[Lazy]] = lambda whole: [whole]


def to_megatron(
    checkpoint: Path | str, out: Path, *, spec: str = "te", verify: bool = True, trust_components: Sequence[str] = ()
) -> None:
    """Write the model of a checkpoint as the `torch_dist` folder `out`; `spec` of MOE_NORM.

    transformer_config.json has the arguments of Megatron's TransformerConfig that make it compute the same. Raises
    ValueError where none do, and when the check finds other logits; then nothing is left. What was written is read
    back and compared bit for bit. `trust_components` as in `load_model`.
    """
    # What Megatron can't compute is refused before the folder is made.
    step_folder = resolve_checkpoint(checkpoint)
    config = read_config(step_folder, trust_components)
    warn_of_mask(config)
    arguments = transformer_config(config)

    # Without sigmoid Megatron has no bias, and it never has a temperature: a bias of 0 may go, and the temperature is
    # divided into the router's weight.
    ours = fold_tensors(config, model_tensors(step_folder))
    if config.router.name != "sigmoid":
        for name in [name for name in ours if name.endswith("expert_bias")]:
            if bool(ours.pop(name).load().any()):
                raise ValueError(f"{name} is not 0: Megatron-core has a selection bias only with router.name 'sigmoid'")
    temperature = config.router.arguments.get("temperature", 1.0)
    if config.moe.num_experts and temperature != 1:
        routers = {name: t.map(lambda w: w / temperature) for name, t in ours.items() if ".router." in name}
        ours |= routers

    # All checks are inside of the block: where one fails the folder never gets its name. The first reads every tensor
    # back, and needs no Megatron-core.
    with new_folder(out) as folder:
        run_on_all_ranks(lambda: write_lazily(folder, _theirs(config, ours, spec)))  # one line for a full disk
        write_backend(folder)
        _write_json(folder / "transformer_config.json", arguments)
        (folder / OUR_CONFIG).write_text(to_toml(without_factors(config)), encoding="utf-8")
        for name, written in _ours(config, read_lazily(folder), folder).items():
            if _digest(written) != _digest(ours[name]):  # by digests, so that one of the two is in memory at a time
                raise ValueError(f"the check of the conversion failed: {name} is not what was written")
        if verify:
            check_against_megatron(step_folder, folder, config, arguments)
    logger.info("wrote %s; every tensor reads back with the same bits", out)


def write_backend(folder: Path) -> None:
    """Write what Megatron's loader wants in a `torch_dist` folder beside the tensors."""
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    _write_json(folder / "metadata.json", {**backends, "common_backend": "torch", "common_backend_version": 1})


def from_megatron(
    source: Path, out: Path, *, config_file: str = "", verify: bool = True, trust_components: Sequence[str] = ()
) -> None:
    """Write the model of a `torch_dist` folder as a checkpoint of weights, `out` a dump folder or `.../step-N`.

    Megatron's folders don't say which model they hold: `config_file` does, or the file that `to_megatron` left there.
    Both names of the MoE layers' norm are read; optimizer states and the like are left out. `trust_components` as in
    `load_model`; a `config_file` of one's own needs none.
    """
    run_config = source / OUR_CONFIG
    if not config_file and not run_config.exists():
        raise ValueError(f"{source} does not say which model it holds: give --job.config_file FILE, in our format")
    theirs = read_lazily(source)
    if verify:
        check_sums(source)

    # The file that `to_megatron` left may be a stranger's, and is read as one; that of the user is not.
    words: list[str] = []

    def configuration() -> Config:
        if config_file:
            return load_config(["--job.config_file", config_file, *words])
        return load_saved(run_config, words, trust_components=trust_components, with_data=False)

    # The vocabulary's size may be left to the tokenizer, which is not there; the embedding says it.
    if not configuration().model.vocab_size and "embedding.word_embeddings.weight" in theirs:
        words += ["--model.vocab_size", str(theirs["embedding.word_embeddings.weight"].shape[0])]
    if not config_file and configuration().moe.num_experts:
        words += ["--router.temperature", "1.0"]  # it was divided into the router's weight
    config = configuration()
    check_without_factors(config)

    # A model that Megatron can't compute is refused here: the tensors may fit all the same.
    arguments = transformer_config(config)
    ours = _ours(config, theirs, source)
    tensors = {f"model.{name}": tensor for name, tensor in ours.items()}
    with new_checkpoint(out, 0, tensors, files={"config.toml": to_toml(config)}) as step_folder:
        if verify:
            check_against_megatron(step_folder, source, config, arguments)
    logger.info("wrote %s", out)


def transformer_config(config: Config) -> dict[str, Any]:
    """Arguments of megatron.core's TransformerConfig for this model; ValueError where it has no such router."""
    model, moe = config.model, config.moe
    _check_attention(config)
    arguments: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.dim,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads or model.num_heads,
        "ffn_hidden_size": model.ffn_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "kv_channels": config.model.channels,
        "add_qkv_bias": model.attention_bias,
        "qk_layernorm": model.qk_norm == "head",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if not moe.num_experts:
        return arguments

    if moe.num_identity_experts:
        raise ValueError(
            f"moe.num_identity_experts = {moe.num_identity_experts} has no counterpart in Megatron-core: only a model "
            "without them can be converted"
        )

    # Balancing acts in training only. Without a layer_freq Megatron has experts in every layer.
    arguments |= {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.expert_dim,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        **_router(config),
    }
    if moe.num_shared_experts:
        arguments["moe_shared_expert_intermediate_size"] = shared_width(config)
    if not _is_uniform(config):
        arguments["moe_layer_freq"] = [int(layer in moe_layers(config)) for layer in range(model.num_layers)]
    return arguments


def _check_attention(config: Config) -> None:
    """Raise ValueError for what Megatron-core computes otherwise, or not by its TransformerConfig alone."""
    model = config.model
    refused = {
        "model.qk_norm": model.qk_norm if model.qk_norm == "full" else "",
        "model.partial_rotary_factor": model.partial_rotary_factor if model.partial_rotary_factor != 1 else "",
        "model.rope_scaling": next(iter(model.rope_scaling), ""),
        "moe.shared_expert_gate": "true" if config.moe.shared_expert_gate else "",
    }
    for key, value in refused.items():
        if value:
            raise ValueError(f"{key} = {value} can't be converted to Megatron-core: only a model without it can be")


def _router(config: Config) -> dict[str, Any]:
    """The arguments on the router; ValueError where Megatron has no such one."""
    # Megatron refuses softmax after the choice of a single expert, whose gradient would be 0. It divides sigmoid scores
    # by their sum if several experts are chosen, and only then.
    name, arguments, top_k = config.router.name, config.router.arguments, config.moe.top_k
    router: dict[str, Any]
    if name in ("softmax_topk", "switch"):
        router = {"moe_router_pre_softmax": True}
    elif name == "topk_softmax" and top_k > 1:
        router = {"moe_router_pre_softmax": False}
    elif name == "sigmoid" and arguments["norm_topk"] == (top_k > 1):
        router = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
        if arguments["score_scale"] != 1:
            router["moe_router_topk_scaling_factor"] = arguments["score_scale"]
    else:
        why = f", norm_topk = {arguments['norm_topk']}" if name == "sigmoid" else ""
        raise ValueError(f"router.name = {name!r} with moe.top_k = {top_k}{why} has no counterpart in Megatron-core")

    # Groups limit the choice whatever the scores are, and so go with each of these.
    if (groups := arguments.get("num_groups", 1)) > 1:
        router |= {"moe_router_num_groups": groups, "moe_router_group_topk": arguments["topk_groups"]}
    return router


def _is_uniform(config: Config) -> bool:
    """Whether all layers are of one kind, with experts or dense: Megatron then stacks them."""
    return len(moe_layers(config)) in (0, config.model.num_layers)


def _parts(config: Config, layer: int, norm: str, has_bias: bool) -> list[Part]:
    """The tensors of a layer there; `norm` is the name of the norm before a MoE layer's experts."""
    # Both specs save a norm under the name of the linear layer after it, because the Transformer Engine fuses the two.
    ours = f"layers.{layer}."
    heads, groups = config.model.num_heads, config.model.num_kv_heads or config.model.num_heads
    qkv = tuple(f"{ours}attention.{w}.weight" for w in ("wq", "wk", "wv"))
    join, split = _qkv(config.model.channels, heads // groups, groups)
    parts = [
        Part("self_attention.linear_qkv.layer_norm_weight", (f"{ours}attention_norm.weight",)),
        Part("self_attention.linear_proj.weight", (f"{ours}attention.wo.weight",)),
        Part("self_attention.linear_qkv.weight", qkv, join, split),
    ]
    if config.model.attention_bias:
        biases = tuple(name.replace(".weight", ".bias") for name in qkv)
        parts.append(Part("self_attention.linear_qkv.bias", biases, join, split))
    if config.model.qk_norm != "none":
        parts += [Part(f"self_attention.{n}_layernorm.weight", (f"{ours}attention.{n}_norm.weight",)) for n in "qk"]

    # Before experts there is no linear layer to fuse with: there the specs differ.
    if layer not in moe_layers(config):
        norm_part = Part("mlp.linear_fc1.layer_norm_weight", (f"{ours}ffn_norm.weight",))
        return [*parts, norm_part, *_swiglu("mlp.", f"{ours}feed_forward.", ".weight")]
    parts += [
        Part(norm, (f"{ours}ffn_norm.weight",)),
        Part("mlp.router.weight", (f"{ours}moe.router.weight",)),
        *_swiglu("mlp.experts.experts.", f"{ours}moe.experts.", ""),
    ]
    if has_bias:
        parts.append(Part("mlp.router.expert_bias", (f"{ours}moe.expert_bias",)))
    if config.moe.num_shared_experts:
        parts += _swiglu("mlp.shared_experts.", f"{ours}moe.shared_experts.", ".weight")
    return parts


def _swiglu(theirs: str, ours: str, suffix: str) -> list[Part]:
    """The parts of a SwiGLU: gate (F, D) and up projection (F, D) are one matrix (2 F, D) there, the gate first.

    Of stacked experts each matrix has a leading dimension.
    """

    def split(whole: Lazy) -> list[Lazy]:
        half = whole.shape[-2] // 2
        return [narrowed(whole, len(whole.shape) - 2, start, half) for start in (0, half)]

    gate_up = Part(
        f"{theirs}linear_fc1.weight",
        (f"{ours}w1{suffix}", f"{ours}w3{suffix}"),
        lambda parts: joined(parts, len(parts[0].shape) - 2),
        split,
    )
    return [gate_up, Part(f"{theirs}linear_fc2.weight", (f"{ours}w2{suffix}",))]


def _qkv(head_dim: int, queries: int, groups: int) -> tuple[Callable[[list[Lazy]], Lazy], Callable[[Lazy], list[Lazy]]]:
    """The functions between wq (G Q H, D), wk (G H, D), wv (G H, D) and the one matrix there, (G (Q + 2) H, D).

    And between biases, without the D.
    """
    # Its rows go by groups of heads: the queries of the group, then its key, then its value.
    sizes = [queries * head_dim, head_dim, head_dim]

    def join(parts: list[Lazy]) -> Lazy:
        def load() -> Tensor:
            grouped = [part.load().unflatten(0, (groups, -1)) for part in parts]  # (G Q H, D) -> (G, Q H, D)
            return torch.cat(grouped, 1).flatten(0, 1)  # (G, (Q + 2) H, D) -> (G (Q + 2) H, D)

        return Lazy((groups * sum(sizes), *parts[0].shape[1:]), parts[0].dtype, load)

    def split(whole: Lazy) -> list[Lazy]:
        def loader(index: int) -> Callable[[], Tensor]:
            def load() -> Tensor:
                grouped = whole.load().unflatten(0, (groups, -1))  # (G, (Q + 2) H, D)
                return grouped.split(sizes, 1)[index].flatten(0, 1).contiguous()

            return load

        return [Lazy((groups * size, *whole.shape[1:]), whole.dtype, loader(i)) for i, size in enumerate(sizes)]

    return join, split


def _outer(config: Config) -> dict[str, str]:
    """The tensors outside of layers: theirs -> ours."""
    names = {
        "embedding.word_embeddings.weight": "tok_embeddings.weight",
        "decoder.final_layernorm.weight": "norm.weight",
    }
    return names if config.model.tie_embeddings else {**names, "output_layer.weight": "output.weight"}


def _theirs(config: Config, ours: LazyTensors, spec: str) -> LazyTensors:
    """Our tensors under their names, joined as they are there."""
    tensors = {theirs: ours[name] for theirs, name in _outer(config).items()}
    has_bias = any(name.endswith("expert_bias") for name in ours)
    layers = [
        {
            part.theirs: part.join([ours[name] for name in part.ours])
            for part in _parts(config, i, MOE_NORM[spec], has_bias)
        }
        for i in range(config.model.num_layers)
    ]

    # With sigmoid Megatron's router always has a bias, and its loader wants it.
    if config.router.name == "sigmoid" and not has_bias:
        for i in moe_layers(config):
            layers[i]["mlp.router.expert_bias"] = _zeros((config.moe.num_experts,))

    # One shard for each layer: so that a tensor of all layers is never in memory as a whole.
    if _is_uniform(config):
        return tensors | {f"decoder.layers.{name}": sharded([layer[name] for layer in layers]) for name in layers[0]}
    return tensors | {f"decoder.layers.{i}.{name}": t for i, layer in enumerate(layers) for name, t in layer.items()}


def _ours(config: Config, theirs: LazyTensors, source: Path) -> LazyTensors:
    """Their tensors under our names; ValueError for what is missing, left over or of another shape."""
    # Each tensor that is found leaves `unused`: what stays there is a part of a model that ours lacks.
    shapes = shapes_of(config)
    has_bias = any(name.endswith("expert_bias") for name in shapes)
    unused = {name: tensor for name, tensor in theirs.items() if not name.startswith(OTHER_STATE)}
    is_stacked = not any(name.startswith("decoder.layers.0.") for name in unused)
    layers: dict[str, list[Lazy]] = {}

    def find(name: str, layer: int | None = None) -> Lazy:
        key = name if layer is None else f"decoder.layers.{name}" if is_stacked else f"decoder.layers.{layer}.{name}"
        if key not in theirs:
            raise ValueError(f"{source} lacks {key}")
        unused.pop(key, None)
        if layer is None or not is_stacked:
            return theirs[key]
        if theirs[key].shape[0] != config.model.num_layers:
            raise ValueError(
                f"{source}: {key} is of {theirs[key].shape[0]} layers, model.num_layers is {config.model.num_layers}"
            )

        # Made once for all layers, because the rows share the reading of the whole.
        return layers.setdefault(key, unstacked(theirs[key]))[layer]

    # The norm before experts may have either name. A bias is expected only if the router has one on both sides.
    ours = {name: find(their_name) for their_name, name in _outer(config).items()}
    for layer in range(config.model.num_layers):
        prefix = "decoder.layers." if is_stacked else f"decoder.layers.{layer}."
        norm = next((norm for norm in MOE_NORM.values() if prefix + norm in theirs), MOE_NORM["te"])
        for part in _parts(config, layer, norm, has_bias and config.router.name == "sigmoid"):
            ours |= dict(zip(part.ours, part.split(find(part.theirs, layer)), strict=True))

    # A bias that only one side has must be 0: made so here, checked to be so there.
    ours |= {name: _zeros(shapes[name]) for name in shapes if name.endswith("expert_bias") and name not in ours}
    if not has_bias:
        for name in [name for name in unused if name.endswith("mlp.router.expert_bias")]:
            if bool(unused.pop(name).load().any()):
                raise ValueError(f"{source}: {name} is not 0: the configuration needs [balancer.loss_free]")
    if unused:
        raise ValueError(f"{source} holds tensors that the model has no place for: {', '.join(sorted(unused)[:3])}")

    # The configuration may be that of another model with the same names.
    for name, shape in shapes.items():
        if ours[name].shape != shape:
            raise ValueError(f"{source}: {name} is of shape {ours[name].shape} there, {shape} in the configuration")
    return {name: ours[name] for name in shapes}


def _digest(tensor: Lazy) -> bytes:
    """A hash of a tensor's bits."""
    data: Any = tensor.load().contiguous().flatten().view(torch.uint8).numpy()
    buffer: Any = memoryview(data)
    return hashlib.blake2b(buffer).digest()


def _zeros(shape: tuple[int, ...]) -> Lazy:
    return Lazy(shape, torch.float32, lambda: torch.zeros(shape))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
