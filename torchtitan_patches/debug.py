"""A small recipe that needs no download: torchtitan's Qwen3 MoE on the source text of Python.

    torchrun -m torchtitan.train --module torchtitan_patches.debug --config debug_moe

On a CPU, from a checkout: `python -m tests.torchtitan.train` with the same arguments. The recipe is stock torchtitan;
`debug_moe_balanced` is the same with pieces of titan_moe, an example of `enable`.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import Validator
from torchtitan.config.configs import ParallelismConfig, TrainingConfig
from torchtitan.models import qwen3
from torchtitan.trainer import Trainer

from torchtitan_patches.recipes import enable


@cache
def text() -> Tensor:
    """The bytes of Python's own library, some megabytes, int64."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


class Bytes(BaseTokenizer):
    """A tokenizer whose tokens are bytes."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Nothing to choose."""

    def __init__(self, config: Config, *, tokenizer_path: str = "") -> None:
        super().__init__()

    def encode(self, text: str, **_: Any) -> list[int]:
        """UTF-8."""
        return list(text.encode())

    def decode(self, tokens: list[int], **_: Any) -> str:
        """The text; bytes that are no UTF-8 are replaced."""
        return bytes(tokens).decode(errors="replace")

    def get_vocab_size(self) -> int:
        """All bytes."""
        return 256


class LibraryText(BaseDataLoader):
    """Batches of the text in order: batch n goes to rank n modulo the number of ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Where to begin, in batches, and whether there is an end (torchtitan's validator asks)."""

        first: int = 0
        infinite: bool = True

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        self.size, self.seq_len = local_batch_size, seq_len
        self.stride, self.next = dp_world_size, config.first + dp_rank

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Inputs and labels, (B, S) each."""
        tokens = text()
        while True:
            length = self.size * self.seq_len
            places = (self.next * length + torch.arange(length + 1)) % len(tokens)
            self.next += self.stride
            yield (
                {"input": tokens[places[:-1]].view(self.size, -1)},
                tokens[places[1:]].view(self.size, -1).clone(),
            )

    def state_dict(self) -> dict[str, Any]:
        """The next batch of the first rank."""
        return {"next": self.next // self.stride * self.stride}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.next = state_dict["next"] + self.next % self.stride


def small_model(*, dim: int, num_layers: int, num_experts: int, top_k: int, expert_dim: int) -> Any:
    """torchtitan's debug model of Qwen3 MoE cut down to these sizes; heads of 16 channels, bytes for tokens."""
    # Sizes stand in several nodes of torchtitan's configuration, and each has to be changed.
    spec = qwen3.model_registry("debugmodel_moe")
    model = spec.model
    model.dim, model.vocab_size = dim, 256
    model.norm = qwen3._qwen3_norm(dim)
    model.tok_embeddings = replace(model.tok_embeddings, num_embeddings=256, embedding_dim=dim)
    model.lm_head = replace(model.lm_head, in_features=dim, out_features=256)
    model.layers = qwen3._build_qwen3_moe_layers(
        n_layers=num_layers,
        dim=dim,
        n_heads=dim // 16,
        n_kv_heads=dim // 16,
        head_dim=16,
        moe_hidden_dim=expert_dim,
        num_experts=num_experts,
        top_k=top_k,
        fuse_qkv=False,
        attn_backend="flex",
        moe_comm_backend="standard",
        rope=qwen3.CosSinRoPE.Config(dim=16, max_seq_len=1024, theta=10000.0),
    )
    return spec


def debug_moe() -> Trainer.Config:
    """Stock torchtitan: 2 layers of 8 experts, top-2, AdamW, its own loss-free balancing, a validation at the end."""
    # `partial_dtensor`, as torchtitan's default backend fails on several ranks with torch 2.13. CUDA graphs are off for
    # expert parallelism, and the model is in fp32, as it has to run on a CPU.
    return Trainer.Config(
        model_spec=small_model(dim=64, num_layers=2, num_experts=8, top_k=2, expert_dim=64),
        loss=CrossEntropyLoss.Config(),
        metrics=MetricsProcessor.Config(log_freq=10),
        tokenizer=Bytes.Config(),
        dataloader=LibraryText.Config(),
        optimizer=default_adamw(lr=3e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=10),
        training=TrainingConfig(
            local_batch_size=4, seq_len=64, steps=50, mixed_precision_param="float32", disable_cuda_graphs=True
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        activation_checkpoint=None,
        checkpoint=CheckpointManager.Config(enable=False, last_save_model_only=False),
        validator=Validator.Config(enable=True, freq=50, steps=4, dataloader=LibraryText.Config(first=2000)),
    )


def debug_moe_balanced() -> Trainer.Config:
    """The same with titan_moe's sequence-wise loss, loss-free bias, rates by load, Shampoo for experts, and MaxVio."""
    return enable(
        debug_moe(),
        balancers={"aux_loss": {"coeff": 0.01, "scope": "sequence"}, "loss_free": {"rate": 1e-3}},
        optimizer={"expert": {"name": "shampoo", "precondition_frequency": 10, "load_lr": "ideal_normalized"}},
        metrics=True,
    )
