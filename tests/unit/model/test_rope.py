"""Rotary positions: scalings against transformers' own, heads that are rotated in part, and keys that mean nothing."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from titan_moe.config import load_config, to_toml
from titan_moe.model.attention import apply_rope, rope_cos_sin
from titan_moe.model.rope import RopeScaling, Rotation, frequencies

CPU = torch.device("cpu")
SCALINGS = {
    "linear": (RopeScaling("linear", factor=2.5), {"factor": 2.5}),
    "llama3": (
        RopeScaling("llama3", factor=8.0, original_seq_len=256, low_freq_factor=1.0, high_freq_factor=4.0),
        {"factor": 8.0, "original_max_position_embeddings": 256, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "yarn": (
        RopeScaling("yarn", factor=4.0, original_seq_len=512),
        {"factor": 4.0, "original_max_position_embeddings": 512},
    ),
    "yarn, not whole": (
        RopeScaling("yarn", factor=40.0, original_seq_len=4096, beta_fast=24.0, attention_factor=0.9, truncate=False),
        {
            **{"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 24.0, "attention_factor": 0.9},
            "truncate": False,
        },
    ),
    "yarn, one step": (
        RopeScaling("yarn", factor=4.0, original_seq_len=2),
        {"factor": 4.0, "original_max_position_embeddings": 2},
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_scalings_are_those_of_transformers(name: str, theta: float) -> None:
    transformers: Any = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, theirs = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": scaling.name, "rope_theta": theta, **theirs},
    )
    wanted, factor = ROPE_INIT_FUNCTIONS[scaling.name](config, CPU)
    rotation = Rotation(64, theta, scaling)
    assert_close(frequencies(rotation, CPU), wanted, rtol=1e-6, atol=0)
    assert rotation.factor == pytest.approx(factor)
    cos, sin = rope_cos_sin(5, rotation, CPU)
    assert_close(cos.square() + sin.square(), torch.full_like(cos, factor**2))


def test_channels_beyond_the_rotated_ones_stay() -> None:
    """And those before are rotated as a head of that width is."""
    x = torch.randn(2, 7, 3, 12, generator=torch.Generator().manual_seed(0))
    rope = rope_cos_sin(7, Rotation(8, 1e4), CPU)
    rotated = apply_rope(x, rope)
    assert torch.equal(rotated[..., 8:], x[..., 8:])
    assert torch.equal(rotated[..., :8], apply_rope(x[..., :8].contiguous(), rope))
    assert not torch.equal(rotated[:, 1:, :, :8], x[:, 1:, :, :8])


WRONG = {
    "two": (["linear.factor=2", "yarn.factor=2"], "model.rope_scaling has linear and yarn: leave one"),
    "unknown": (["dynamic.factor=2"], r"model.rope_scaling.dynamic: unknown scaling \(valid: linear, llama3, yarn\)"),
    "unused": (["linear.beta_fast=2"], "model.rope_scaling.linear.beta_fast has no use: linear goes by factor"),
    "factor": (["linear.factor=0.5"], "model.rope_scaling.linear.factor = 0.5: must be greater than or equal to 1"),
    "turned": (["yarn.beta_slow=33"], r"model.rope_scaling.yarn.beta_slow \(33\) must be below beta_fast \(32\)"),
    "nan": (["yarn.factor=nan"], "model.rope_scaling.yarn.factor = nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_scaling_that_means_nothing_is_refused(case: str) -> None:
    words, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        load_config([f"--model.rope_scaling.{word}" for word in words])
    assert "\n" not in str(error.value)


SIZES = {
    "odd": (["model.head_dim=7"], r"model.head_dim \(7\) must be even"),
    "no divisor": (["model.num_heads=7"], r"model.num_heads \(7\) must divide model.dim \(768\), or model.head_dim be"),
    "none rotated": (
        ["model.partial_rotary_factor=0.01"],
        r"partial_rotary_factor \(0.01\) of 64 channels .* is 0: it",
    ),
    "odd rotated": (
        ["model.partial_rotary_factor=0.18"],
        r"partial_rotary_factor \(0.18\) of 64 channels .* is 11: it",
    ),
    "beyond": (["model.partial_rotary_factor=1.5"], "must be less than or equal to 1"),
    "a norm of what": (["model.qk_norm=all"], r"model.qk_norm = all: must be 'none', 'head' or 'full'"),
    "no shared": (["moe.shared_expert_gate=true"], "moe.shared_expert_gate = True needs shared experts"),
    "no shared width": (["moe.shared_expert_dim=8"], "moe.shared_expert_dim = 8 needs shared experts"),
    "cut": (
        ["moe.num_shared_experts=1", "moe.shared_expert_dim=15", "parallelism.tensor_parallel_degree=2"],
        r"tensor_parallel_degree \(2\) must divide moe.num_shared_experts x moe.shared_expert_dim \(15\)",
    ),
    "vast": (["model.head_dim=1000000000000"], "model.dim x model.num_heads x model.head_dim = .* elements"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_do_not_fit_are_refused(case: str) -> None:
    words, message = SIZES[case]
    with pytest.raises(ValueError, match=message) as error:
        load_config([f"--{word}" for word in words])
    assert "\n" not in str(error.value)


def test_a_flag_is_still_read_as_the_norm_of_each_head(tmp_path: Any) -> None:
    """In files and on the command line; a configuration comes back from its file."""
    for words, kind in (
        (["--model.qk_norm"], "head"),
        (["--model.qk_norm", "true"], "head"),
        (["--model.qk_norm=false"], "none"),
        (["--model.qk_norm", "full"], "full"),
    ):
        assert load_config(words).model.qk_norm == kind
    for written, kind in (("true", "head"), ("false", "none"), ('"full"', "full")):
        file = tmp_path / "run.toml"
        file.write_text(f"[model]\nqk_norm = {written}\n[model.rope_scaling.yarn]\nfactor = 4.0\n")
        config = load_config(["--job.config_file", str(file)])
        assert config.model.qk_norm == kind
        file.write_text(to_toml(config))
        assert load_config(["--job.config_file", str(file)]) == config
