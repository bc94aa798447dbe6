"""Overrides that a CPU needs; `python -m tests.torchtitan.train` adds them."""

from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention


@override(target=FlexAttention.Config, description="causal attention on a CPU")
def attention(config: FlexAttention.Config) -> ScaledDotProductAttention.Config:
    """Causal attention over whole sequences, without borders of documents."""
    return derive(config, ScaledDotProductAttention.Config)
