"""`[parametrization]`: the rules of each parameter against their formulas, the forward's factors, and refusals."""

import math
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from titan_moe.build import build_model, build_optimizer
from titan_moe.config import load_config
from titan_moe.config.checks import parametrization_of
from titan_moe.model.kv_cache import empty_cache, extend
from titan_moe.model.multipliers import Multipliers, folded
from titan_moe.model.routing import ROUTERS
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import Scale
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.parametrization import AS_ADAMW, ORTHOGONAL, Parametrization, Shapes

# A model that is 4 times as wide as its base, 3 times as deep, with experts 2 times as wide and 2 times as many.
SIZES = (
    "--model.dim 128 --model.num_heads 8 --model.num_kv_heads 2 --model.ffn_dim 192 --model.num_layers 6 "
    "--model.vocab_size 64 --moe.num_experts 8 --moe.top_k 4 --moe.expert_dim 48 --moe.num_shared_experts 1 "
    "--moe.first_dense_layers 1 --data.tokenizer bytes --training.mixed_precision_param float32 "
)
BASE = {
    **{"base_dim": 32, "base_num_layers": 2, "base_num_heads": 4, "base_ffn_dim": 64, "base_expert_dim": 24},
    **{"base_num_experts": 4, "base_top_k": 2},
}


def words_of(base: dict[str, int] = BASE) -> str:
    return "--parametrization.name mup " + " ".join(f"--parametrization.{key} {n}" for key, n in base.items())


def config_of(words: str = ""):
    return load_config((SIZES + words).split())


def optimizer_of(words: str) -> Optimizer:
    config = config_of(words)
    return build_optimizer(config, build_model(config))


# n = 4, L = 3, k = 2; the hidden width of dense layers is 3 times the base's, that of experts 2 times. std is over
# init_std, of w2 and wo over init_std / sqrt(2 * 2 layers of the base).
N, L, K, DENSE, EXPERT = 4.0, 3.0, 2.0, 3.0, 2.0
TABLE = {  # name: (std, rate, eps)
    "tok_embeddings.weight": (1, 1, 1 / N),
    "norm.weight": (1, 1, 1 / N),
    "layers.2.attention_norm.weight": (1, 1, 1 / (N * L)),
    "layers.2.attention.wq.weight": (N**-0.5, 1 / N, 1 / (N * L)),
    "layers.2.attention.wk.weight": (N**-0.5, 1 / N, 1 / (N * L)),
    "layers.2.attention.wo.weight": (N**-0.5 / 2, 1 / N, 1 / (N * L)),
    "layers.0.feed_forward.w1.weight": (N**-0.5, 1 / N, 1 / (DENSE * L)),
    "layers.0.feed_forward.w2.weight": (N**0.5 / DENSE / 2, 1 / DENSE, N / (DENSE**2 * L)),
    "layers.2.moe.experts.w1": (N**-0.5, 1 / N, 1 / (EXPERT * L * K)),
    "layers.2.moe.experts.w3": (N**-0.5, 1 / N, 1 / (EXPERT * L * K)),
    "layers.2.moe.experts.w2": (N**0.5 / EXPERT / 2, 1 / EXPERT, N / (EXPERT**2 * L * K)),
    "layers.2.moe.shared_experts.w1.weight": (N**-0.5, 1 / N, 1 / (EXPERT * L)),
    "layers.2.moe.shared_experts.w2.weight": (N**0.5 / EXPERT / 2, 1 / EXPERT, N / (EXPERT**2 * L)),
    "layers.2.moe.router.weight": (1 / N, 1 / N, 1 / (N * L * K)),
}


@pytest.mark.parametrize("name", TABLE)
def test_rules_are_those_of_the_table(name: str) -> None:
    std, lr, eps = TABLE[name]
    mup = parametrization_of(config_of(words_of()))
    scale = mup.scale_of(name, "adamw", {})
    assert mup.std_of(name) == pytest.approx(0.02 * std, rel=1e-12)
    assert scale.lr == pytest.approx(lr, rel=1e-12)
    assert scale.eps == pytest.approx(eps, rel=1e-12)
    assert scale.lr * scale.weight_decay == pytest.approx(1.0, rel=1e-12)


def test_factors_of_the_forward() -> None:
    # heads are 16 wide, the base's 8: logits over 16 instead of 1 / sqrt(16), times sqrt(8), so that the base's are as
    # they were
    m = parametrization_of(config_of(words_of())).multipliers
    expected = Multipliers(logits=1 / 4, residual=1 / 3, attention=math.sqrt(8) / 16 * math.sqrt(16))
    assert m == pytest.approx(expected, rel=1e-12)
    words = words_of() + " --router.name sigmoid --router.norm_topk "
    assert parametrization_of(config_of(words + "false")).multipliers.expert_output == 0.5
    assert parametrization_of(config_of(words + "true")).multipliers.expert_output == 1.0


def test_every_parameter_has_a_rule() -> None:
    config = config_of(words_of() + " --model.tie_embeddings false --model.qk_norm true")
    model = build_model(config)
    model.init_weights(0)
    groups = {}
    for optimizer in (build_optimizer(config, model),):
        groups = {p: optimizer._scales.get(p, Scale()) for g in optimizer.param_groups for p in g["params"]}
    mup = parametrization_of(config)
    for name, parameter in model.named_parameters():
        assert groups[parameter] == mup.scale_of(name, "adamw", {}), name
        if parameter.dim() > 1 and parameter.numel() > 2000:
            assert parameter.std().item() == pytest.approx(mup.std_of(name), rel=0.06), name


def test_at_the_base_mup_is_standard_to_the_bit() -> None:
    """Weights, factors and rates: there is nothing that differs."""
    base = {"base_dim": 128, "base_num_layers": 6, "base_num_heads": 8, "base_num_experts": 8, "base_top_k": 4}
    tokens = torch.randint(64, (2, 16))
    configs = [config_of(), config_of(words_of(base))]
    models = [build_model(config) for config in configs]
    losses: list[list[float]] = []
    for config, model in zip(configs, models, strict=True):
        model.init_weights(3)
        optimizer = build_optimizer(config, model)
        assert not optimizer._scales
        losses.append([])
        for _ in range(3):
            loss = model(tokens[:, :-1], tokens[:, 1:])[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_step_is_that_of_adamw_with_each_parameters_rate() -> None:
    """Against torch.optim.AdamW with a group for each parameter."""
    config = config_of(words_of() + " --optimizer.lr 0.01 --optimizer.weight_decay 0.2 --optimizer.eps 1e-4")
    model, other = build_model(config), build_model(config)
    model.init_weights(0)
    other.load_state_dict(model.state_dict())
    optimizer, mup = build_optimizer(config, model), parametrization_of(config)
    decays = {name: 0.0 if "norm" in name else 0.2 for name, _ in other.named_parameters()}
    groups = []
    for name, parameter in other.named_parameters():
        scale = mup.scale_of(name, "adamw", {})
        decay = decays[name] * scale.weight_decay
        groups.append({"params": [parameter], "lr": 0.01 * scale.lr, "weight_decay": decay, "eps": 1e-4 * scale.eps})
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    tokens = torch.randint(64, (2, 16))
    for _ in range(3):
        for m, o in ((model, optimizer), (other, theirs)):
            m(tokens[:, :-1], tokens[:, 1:])[0].backward()
            o.step()
            o.zero_grad()
    for (name, ours), their in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("settings", [{"adjust_lr": "match_rms_adamw"}, {"adjust_lr": "original"}])
@pytest.mark.parametrize("name", [n for n in TABLE if "norm" not in n and "tok" not in n])
def test_steps_of_muon_grow_as_the_spectral_norm_should(name: str, settings: dict[str, str]) -> None:
    """The largest singular value of real updates, over sqrt(rows / columns), is the same as at the base."""
    config = config_of(words_of())
    mup, shape = parametrization_of(config), build_model(config).get_parameter(name).shape[-2:]
    n, width = 4, 3 if ".feed_forward." in name else 2
    base_rows, base_columns = shape
    if ".w1" in name or ".w3" in name:
        base_rows, base_columns = shape[0] // width, shape[1] // n
    elif ".w2" in name:
        base_rows, base_columns = shape[0] // n, shape[1] // width
    elif "router" in name:
        base_rows, base_columns = shape[0] // 2, shape[1] // n
    else:
        base_rows, base_columns = shape[0] // n, shape[1] // n

    def largest(rows: int, columns: int) -> float:
        parameter = torch.nn.Parameter(torch.zeros(1, rows, columns))
        parameter.grad = torch.randn(1, rows, columns)
        options = {"matmul_dtype": "float32", "ns_steps": 20, **settings}
        groups = [{"name": "expert", "params": [parameter]}]
        OPTIMIZERS["muon"](groups, lr=1.0, weight_decay=0.0, **options).step()
        return torch.linalg.matrix_norm(parameter.detach()[0], 2).item() / math.sqrt(rows / columns)

    lr = mup.scale_of(name, "muon", settings).lr
    assert largest(*shape) * lr == pytest.approx(largest(base_rows, base_columns), rel=0.25)  # Newton-Schulz is rough


def random_model(multipliers: Multipliers, **changes: object) -> Transformer:
    sizes = {"vocab_size": 64, "dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48}
    experts = {"num_experts": 4, "expert_dim": 24, "num_shared_experts": 1, "first_dense_layers": 1}
    model = Transformer(
        **{**sizes, **experts, "router": ROUTERS["topk_softmax"](top_k=2), "init_std": 0.3, **changes},  # pyrefly: ignore
        multipliers=multipliers,
    )
    model.init_weights(0)
    return model


FACTORS = Multipliers(0.7, 1.3, 0.6, 1.7, 1.9, 0.8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_factors_are_where_they_are_said_to_be(tied: bool, qk_norm: bool) -> None:
    """A model without factors, whose weights have them, computes the same; each factor by itself changes something."""
    changes = {"tie_embeddings": tied, "qk_norm": qk_norm}
    model, plain = random_model(FACTORS, **changes), random_model(Multipliers(), **changes)
    tokens = torch.randint(64, (2, 16))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.mul_(folded(name, FACTORS, tied=tied, qk_norm=qk_norm))
        logits, routings = model(tokens)
        torch.testing.assert_close(plain(tokens)[0], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain(tokens)[1][0].router_logits, routings[0].router_logits)
        for field in Multipliers._fields:
            without = random_model(FACTORS._replace(**{field: 1.0}), **changes)(tokens)[0]
            assert (without - logits).abs().max() > 1e-3, field


def test_factors_by_a_formula_without_the_model() -> None:
    """One dense layer in float64, worked with plain products."""
    changes = {"num_layers": 1, "num_experts": 0, "num_kv_heads": 4}
    model = random_model(FACTORS, **changes).double()
    w = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tokens = torch.randint(64, (1, 1))  # one position: attention gives its value, whatever the logits

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x = 0.7 * w["tok_embeddings.weight"][tokens[0, 0]]
    h = norm(x, w["layers.0.attention_norm.weight"])
    x = x + 0.6 * (w["layers.0.attention.wo.weight"] @ (w["layers.0.attention.wv.weight"] @ h))
    h = norm(x, w["layers.0.ffn_norm.weight"])
    gate, up, down = (w[f"layers.0.feed_forward.{name}.weight"] for name in ("w1", "w3", "w2"))
    x = x + 0.6 * (down @ (torch.nn.functional.silu(gate @ h) * (up @ h)))
    logits = 1.3 * (w["tok_embeddings.weight"] @ norm(x, w["norm.weight"]))
    torch.testing.assert_close(model(tokens)[0][0, 0], logits)


@torch.no_grad()
def test_token_by_token_is_the_same() -> None:
    model = random_model(FACTORS)
    tokens = torch.randint(64, (2, 8))
    cache = empty_cache(model, 2, 8)
    extend(model, cache, tokens[:, :5], torch.tensor([0, 0]), torch.tensor([0, 1]))
    last = extend(model, cache, tokens[:, 5:6], torch.tensor([5, 5]), torch.tensor([0, 1]))
    torch.testing.assert_close(last, model(tokens[:, :6])[0][:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in dynamo
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # as well
def test_layers_with_factors_compile_without_a_break() -> None:
    torch.compiler.reset()
    model, compiled = random_model(FACTORS), random_model(FACTORS)
    for name, block in compiled.layers.named_children():
        compiled.layers.register_module(name, torch.compile(block, fullgraph=True, backend="aot_eager"))
    tokens = torch.randint(64, (2, 8))
    for one in (model, compiled):
        one(tokens[:, :-1], tokens[:, 1:])[0].backward()
    for (name, ours), theirs in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


REFUSED = {
    "--parametrization.name mup": "parametrization.base_dim",
    "--parametrization.name mup --parametrization.base_dim 0": "parametrization.base_dim",
    "--parametrization.name mu --parametrization.base_dim 32": "did you mean 'mup'",
    "--parametrization.base_dim 32": "it belongs to mup",
    "--parametrization.name mup --parametrization.base_dim 40": "multiple of model.dim / model.num_heads (16)",
    "--parametrization.name mup --parametrization.base_dim 32 --parametrization.base_num_heads 5": "must divide",
    "--parametrization.name mup --parametrization.base_dim 32 --parametrization.base_num_experts 4": "same share",
    words_of() + " --router.name cosine": "router.name = 'cosine'",
    words_of() + " --router.name sinkhorn": "parametrization.base_top_k",
    words_of() + " --optimizer.name shampoo --optimizer.grafting none": "grafting",
    words_of() + " --optimizer.expert.name torch.optim:Adagrad": "torch.optim:Adagrad",
    words_of() + " --parametrization.router_init_power 0.4": "greater than or equal to 0.5",
    "--parametrization.name tests.unit.test_parametrization:gives_nothing": "must give a Parametrization",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(REFUSED[words])) as error:
        config_of(words)
    assert "\n" not in str(error.value)


def test_a_base_of_experts_for_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"base_num_experts = 4, but moe\.num_experts = 0"):
        config_of("--moe.num_experts 0 " + words_of())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_rule_or_is_refused_by_name(name: str) -> None:
    mup = parametrization_of(config_of(words_of()))
    if name in AS_ADAMW + ORTHOGONAL:
        assert mup.scale_of("layers.2.moe.experts.w1", name, {}).lr < 1
    else:
        with pytest.raises(ValueError, match=f"'{name}'"):
            mup.scale_of("layers.2.moe.experts.w1", name, {})


@pytest.mark.parametrize(
    ("match", "more", "part"),
    [
        ("tok_embeddings.weight", "", "no rule for tok_embeddings.weight with optimizer 'muon'"),
        ("*.wq.weight", " --optimizer.groups.own.per_head", "no rule for per_head = true with optimizer 'muon'"),
    ],
)
def test_muon_has_no_rule_for_an_embedding_or_for_heads(match: str, more: str, part: str) -> None:
    """Groups by pattern may have it; with [optimizer] name = "muon" the embedding is AdamW's, whose rule it has."""
    group = f" --optimizer.groups.own.match {match} --optimizer.groups.own.name muon"
    with pytest.raises(ValueError, match=re.escape(part)) as error:
        optimizer_of(words_of() + group + more)
    assert "\n" not in str(error.value)

    # standard takes it, and mup takes heads by an optimizer whose steps have AdamW's size
    optimizer_of(group + more)
    optimizer_of(words_of() + group.replace("muon", "shampoo") + more)
    optimizer = optimizer_of(words_of() + " --optimizer.name muon")
    embedding = next(group for group in optimizer.param_groups if group["name"] == "embedding")
    assert [optimizer._scales[parameter] for parameter in embedding["params"]] == [Scale(eps=1 / N)]


def halved(*, shapes: Shapes, power: float = 1.0) -> Parametrization:
    """One of somebody's own: rates by the width, and logits halved."""
    scale = Scale(lr=shapes.dim**-power)
    return Parametrization(Multipliers(logits=0.5), lambda name: 0.1, lambda name, optimizer, settings: scale)


def gives_nothing(*, shapes: Shapes) -> None:
    """No parametrization."""


def test_one_of_ones_own() -> None:
    config = config_of(
        "--parametrization.name tests.unit.test_parametrization:halved --parametrization.power 0.5 "
        "--model.tie_embeddings false"
    )
    model = build_model(config)
    model.init_weights(0)
    assert model.multipliers.logits == 0.5
    assert model.get_parameter("output.weight").std().item() == pytest.approx(0.1, rel=0.05)
    scales: Sequence[Scale] = list(build_optimizer(config, model)._scales.values())
    assert len(scales) == len(list(model.parameters()))
    assert all(scale == Scale(lr=128**-0.5) for scale in scales)
