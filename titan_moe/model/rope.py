"""Rotary positions: by what angle each pair of channels turns from one position to the next.

Shapes: R channels of a head that are rotated.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RopeScaling(NamedTuple):
    """How angles are made smaller, for sequences longer than those that a model has been trained on.

    `linear` divides all by `factor`. `llama3` divides those that turn less than `low_freq_factor` times within
    `original_seq_len` positions, leaves those that turn more than `high_freq_factor` times, and passes from one to the
    other between them. `yarn` does so between `beta_slow` and `beta_fast` turns, over the number of the channel, whole
    numbers of channels where `truncate`, and multiplies queries and keys by `attention_factor` (0: 0.1 ln(factor) + 1).
    Sources: Chen et al. (2023, arXiv 2306.15595); Grattafiori et al. (2024, Llama 3.1's code); Peng et al. (2023, YaRN,
    arXiv 2309.00071), section 3.
    """

    name: str
    factor: float = 1.0
    original_seq_len: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True


class Rotation(NamedTuple):
    """What the angles of all positions follow from."""

    channels: int  # of a head, R: the first ones, in two halves
    theta: float
    scaling: RopeScaling | None = None

    @property
    def factor(self) -> float:
        """What queries and keys are multiplied by, beside being rotated."""
        if self.scaling is None or self.scaling.name != "yarn":
            return 1.0
        return self.scaling.attention_factor or 0.1 * math.log(max(self.scaling.factor, 1.0)) + 1.0


def frequencies(rotation: Rotation, device: torch.device) -> Tensor:
    """The angle from one position to the next of each pair of channels, (R / 2,) fp32.

    Without scaling theta^(-2i / R), from Su et al. (2021), equation 15.
    """
    R, theta, scaling = rotation
    angle = theta ** (-torch.arange(0, R, 2, dtype=torch.float32, device=device) / R)
    if scaling is None:
        return angle
    slow = angle / scaling.factor
    if scaling.name == "linear":
        return slow

    # What share of the unscaled angle each pair keeps: 1 where it turns often, so that neighbours are told apart.
    if scaling.name == "llama3":
        turns = angle * scaling.original_seq_len / (2 * math.pi)
        width = scaling.high_freq_factor - scaling.low_freq_factor
        share = ((turns - scaling.low_freq_factor) / width).clamp(0, 1)
    else:
        first, last = _yarn_ramp(rotation, scaling)
        share = 1 - ((torch.arange(R // 2, dtype=torch.float32, device=device) - first) / (last - first)).clamp(0, 1)
    return slow * (1 - share) + angle * share


def _yarn_ramp(rotation: Rotation, scaling: RopeScaling) -> tuple[float, float]:
    """The pairs between which YaRN goes from the unscaled angle to the scaled one."""

    # The pair, as a fraction, that turns so often within the original length.
    def pair_of(turns: float) -> float:
        per_turn = scaling.original_seq_len / (turns * 2 * math.pi)
        return rotation.channels * math.log(per_turn) / (2 * math.log(rotation.theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotation.channels - 1)
    return first, last + (0.001 if first == last else 0.0)  # one step, not a division by 0
