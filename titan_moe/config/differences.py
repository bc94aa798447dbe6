"""What differs between two configurations, and what of it a run may change on its way."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from titan_moe.config.layers import tomllib
from titan_moe.config.load import to_toml
from titan_moe.config.sections import Config

Changes = dict[str, tuple[Any, Any]]  # dotted key -> its value before and now, None where it has none
MOST_SHOWN = 80  # characters of a value in a message

# Sections that say what is trained, on what and how.
COUNTED = (
    *("model", "moe", "parametrization", "router", "balancer"),
    *("optimizer", "lr_scheduler", "training", "data", "debug"),
)

# Their keys that a run may change nevertheless, each with the reason. Other sections are free as a whole: a layout
# ([parallelism], [activation_checkpoint], [compile], [comm]) computes the same, [validation], [checkpoint], [metrics]
# and [profiling] look on, [quantize] may be switched at any step (docs/precision.md), [job] says where.
FREE = {
    "training.steps": "a run may become longer; the schedule is then that of the new length",
    "training.local_batch_size": "memory and speed: a step's loss is over the global batch",
    "training.loss_chunk_tokens": "memory: the same loss",
    "training.deterministic": "speed: which kernels compute, not what",
    "training.skip_nonfinite_steps": "it acts where the run would end, and counts what it skips",
    "moe.experts_backend": "speed: the same experts",
    "data.num_workers": "speed: the same batches",
    "data.cache_folder": "where copies of the data lie",
}

# Weights of one mean nothing in the other, or do not fit. Not so model.rope_theta, model.norm_eps, moe.top_k or the
# router, which runs do change on purpose.
ANOTHER_MODEL = (
    *(f"model.{name}" for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")),
    *(f"model.{name}" for name in ("head_dim", "qk_norm", "attention_bias", "partial_rotary_factor", "tie_embeddings")),
    *(f"moe.{name}" for name in ("num_experts", "num_identity_experts", "expert_dim", "num_shared_experts")),
    *(f"moe.{name}" for name in ("shared_expert_dim", "shared_expert_gate")),
    "moe.first_dense_layers",
    "moe.layer_freq",
)


def is_of_another_model(key: str) -> bool:
    """Whether weights of a model with another value of this key mean nothing, or something else."""
    return key in ANOTHER_MODEL or key.startswith("parametrization.")  # its factors are in the forward


def counts(key: str) -> bool:
    """Whether a run with another value of this key is another run."""
    return key.partition(".")[0] in COUNTED and key not in FREE


def changed_keys(before: Config, after: Config) -> Changes:
    """The keys that differ between two configurations, in their order."""
    old, new = flat(before), flat(after)
    keys = [*old, *(key for key in new if key not in old)]
    changes = {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}

    # of groups by pattern the first that matches has a parameter: the same tables in another order are other groups
    first, second = _own_groups(before), _own_groups(after)
    return changes if first == second or {*first} != {*second} else {**changes, "optimizer.groups": (first, second)}


def changed_meaning(before: Config, after: Config) -> Changes:
    """`changed_keys` without those that say the same in other words, and without [job]."""
    changes = changed_keys(_plain(before), _plain(after))
    return {key: values for key, values in changes.items() if not key.startswith("job.")}


def differences(before: Config, after: Config) -> list[str]:
    """The keys that differ between two configurations, with both values."""
    return texts(changed_keys(before, after))


def texts(changes: Changes) -> list[str]:
    """Changes for people: `training.steps: 300, now 400`."""
    return [f"{key}: {_text(old)}, now {_text(new)}" for key, (old, new) in changes.items()]


def flat(config: Config) -> dict[str, Any]:
    """Every key of a configuration by its dotted name, as it stands in a file."""
    return flatten(tomllib.loads(to_toml(config)))


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        values |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return values


def _own_groups(config: Config) -> list[str]:
    """The groups by pattern in their order."""
    return [group for group, table in config.optimizer.groups.items() if "match" in table]


def _plain(config: Config) -> Config:
    """The same configuration with one way of saying it, where there are several."""
    model, moe, optimizer = config.model, config.moe, config.optimizer
    groups = {group: _of_group_alone(table, optimizer.arguments) for group, table in optimizer.groups.items()}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, num_kv_heads=model.num_kv_heads or model.num_heads, head_dim=model.channels),
        moe=dataclasses.replace(moe, shared_expert_dim=moe.shared_expert_dim or moe.expert_dim),
        optimizer=dataclasses.replace(optimizer, groups={group: table for group, table in groups.items() if table}),
    )


def _of_group_alone(group: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """What a parameter group's table adds: not what [optimizer] says too, nor options of a load_lr that is off."""
    off = group.get("load_lr", "none") == "none"
    names: Iterable[str] = (key for key in group if not (off and key.startswith("load_lr")))
    return {key: group[key] for key in names if key == "name" or shared.get(key) != group[key]}


def _text(value: Any) -> str:
    text = "unset" if value is None else repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN // 2]}...{text[-MOST_SHOWN // 2 :]}"
