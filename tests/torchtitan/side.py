"""torchtitan on the CPU in processes of its own: `python -m tests.torchtitan.side CASES RESULT`, once for each rank.

CASES and RESULT are files of torch.save: {name: arguments of `train`, or of what `do` names}, and {name: what it gave}.
"""

import copy
import faulthandler
import itertools
import os
import sys
import time
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.torchtitan import cpu

if __name__ == "__main__":
    cpu.prepare()

import torchtitan.trainer
from torchtitan.components.metrics import BaseLogger
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config.override import derive
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.moe import GroupedExperts, MoE, TokenChoiceTopKRouter

from titan_moe.model.wrappers import plain_name
from titan_moe.runtime.command import end_process
from titan_moe.runtime.dtensor import gathered
from torchtitan_patches import enable
from torchtitan_patches.debug import LibraryText, debug_moe, small_model
from torchtitan_patches.moe import DroppedExperts

SIZES = {"dim": 32, "num_layers": 2, "num_experts": 8, "top_k": 2, "expert_dim": 32}


class Float32Experts(GroupedExperts):
    """torchtitan's experts without their casts to bf16, so that round-off does not hide differences."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x: Tensor, num_tokens: Tensor) -> Tensor:
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        offs = num_tokens.cumsum(0, dtype=torch.int32)
        h = F.silu(F.grouped_mm(x, w1.transpose(1, 2), offs=offs)) * F.grouped_mm(x, w3.transpose(1, 2), offs=offs)
        return F.grouped_mm(h, w2.transpose(1, 2), offs=offs)


class Float32DroppedExperts(DroppedExperts):
    """The same of the experts with dropout."""

    @dataclass(kw_only=True, slots=True)
    class Config(DroppedExperts.Config):
        pass

    dtype = torch.float32

    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        return F.grouped_mm(A, B_t, offs=offs)


FLOAT32 = {GroupedExperts.Config: Float32Experts.Config, DroppedExperts.Config: Float32DroppedExperts.Config}
NEWLINE = 10


class Lines(LibraryText):
    """The text with positions as torchtitan's packed data sets have them: each line is a document."""

    @dataclass(kw_only=True, slots=True)
    class Config(LibraryText.Config):
        pass

    def __iter__(self) -> Any:
        for inputs, labels in super().__iter__():
            tokens = inputs["input"]
            place = torch.arange(tokens.numel())
            follows_end = torch.cat([torch.zeros(1, dtype=torch.bool), tokens.flatten()[:-1] == NEWLINE])
            starts = torch.where(follows_end, place, 0).cummax(0).values
            yield {**inputs, "positions": (place - starts + ~follows_end.cumsum(0).bool()).view_as(tokens)}, labels


class Records(BaseLogger):
    """Keeps what torchtitan logs, by step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Any]] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.steps.setdefault(step, {}).update(metrics)


def recipe(
    *,
    pieces: dict[str, Any],
    steps: int = 4,
    score_func: str = "sigmoid",
    local_batch_size: int = 4,
    global_batch_size: int = 8,
    ep: int = 1,
    cp: int = 1,
    checkpointing: str = "none",
    folder: str = "",
    interval: int = 0,
    load_step: int = -1,
    start: str = "",
    bias: bool = True,
    overrides: tuple[Any, ...] = (),
    validate: bool = False,
    compiled: str = "",
    documents: bool = False,
) -> Any:
    """debug_moe at a constant rate, in fp32, with the pieces that a case asks for."""
    config = debug_moe()
    config.model_spec = small_model(**SIZES)
    for _, router, _, _ in config.model_spec.model.traverse(TokenChoiceTopKRouter.Config):
        router.score_func = score_func
    for _, moe, _, _ in config.model_spec.model.traverse(MoE.Config):
        moe.load_balance_coeff = moe.load_balance_coeff if bias else None
    if documents:
        config.dataloader = derive(config.dataloader, Lines.Config)
        config.validator.dataloader = derive(config.validator.dataloader, Lines.Config)
    config.optimizer = default_adamw(lr=1e-2)
    config.lr_scheduler = LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0)
    training = config.training
    training.steps, training.seq_len = steps, 32
    training.local_batch_size, training.global_batch_size = local_batch_size, global_batch_size
    config.parallelism.expert_parallel_degree, config.parallelism.context_parallel_degree = ep, cp
    config.activation_checkpoint = {"none": None, "full": FullAC.Config(), "selective": SelectiveAC.Config()}[
        checkpointing
    ]
    config.validator.enable, config.validator.freq, config.validator.steps = validate, steps, 2
    config.metrics.log_freq = 1
    config.debug.seed = 7
    if interval:
        config.dump_folder = folder
        config.checkpoint.enable, config.checkpoint.interval = True, interval
        config.checkpoint.load_step = load_step
        config.checkpoint.initial_load_path = str((Path(folder) / start).resolve()) if start else None
    if compiled:
        config.compile.enable, config.compile.backend = True, compiled
    config.override.imports = ["tests.torchtitan.cpu_overrides.attention", *overrides]
    if pieces:
        enable(config, **copy.deepcopy(pieces))
    for _, experts, parent, name in config.model_spec.model.traverse(GroupedExperts.Config):
        if not compiled:  # torch's grouped product in fp32 cannot be compiled
            setattr(parent, name, derive(experts, FLOAT32[type(experts)]))
    return config


@torch.no_grad()
def set_state(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Give a model the full weights `state`, whatever its layout."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        value = state.get(plain_name(name))
        if value is not None and isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        if value is not None:
            tensor.copy_(value)


def full(tensor: Tensor) -> Tensor:
    return gathered(tensor).detach().clone()


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """All weights and biases, full, on every rank."""
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("expert_bias_E"))]
    return {plain_name(name): full(tensor) for name, tensor in tensors}


def build(weights: dict[str, Tensor] | None, **arguments: Any) -> Any:
    trainer = recipe(**arguments).build()
    if weights:
        set_state(trainer.model_parts[0], weights)

    # Attention is to be as without documents, for on a CPU it has no borders and titan_moe's angles go on over them.
    if arguments.get("documents"):
        for block in trainer.model_parts[0].layers.values():
            block.register_forward_pre_hook(lambda _, args: (*args[:2], None))
    return trainer


def close(trainer: Any) -> None:
    trainer.close()
    dist.destroy_process_group()
    torch._dynamo.reset()  # graphs count by the code of the layers, which all cases have
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1)  # a fresh store


def train(weights: dict[str, Tensor] | None = None, **arguments: Any) -> dict[str, Any]:
    """A whole run: what it logged by step, and its first and last weights."""
    trainer = build(weights, **arguments)
    trainer.metrics_processor.logger = records = Records()
    generate, batches = trainer.batch_generator, []

    def remembered(loader: Any) -> Any:
        for inputs, labels in generate(loader):
            batches.append((inputs["input"].clone(), labels.clone()))
            yield inputs, labels

    trainer.batch_generator = remembered
    first = state_of(trainer.model_parts[0])
    trainer.train()
    result = {"records": records.steps, "first": first, "last": state_of(trainer.model_parts[0]), "batches": batches}
    if hasattr(trainer.optimizers, "monitor"):
        kept = trainer.optimizers.monitor.states()
        result["states"] = {name: {key: torch.stack(t) for key, t in of.items()} for name, of in kept.items()}
    if arguments.get("validate"):
        validator = trainer.validator
        loader = validator.dl_config.build(
            dp_world_size=1, dp_rank=0, tokenizer=None, seq_len=validator.seq_len, local_batch_size=4
        )
        result["validation"] = [inputs["input"] for inputs, _ in itertools.islice(loader, 2)]
    close(trainer)
    return result


def gradients(weights: dict[str, Tensor] | None = None, **arguments: Any) -> dict[str, Any]:
    """The gradients of one step's micro-batches, before the optimizer's step."""
    trainer = build(weights, **arguments)
    first = state_of(trainer.model_parts[0])
    batches = trainer.batch_generator(trainer.dataloader)
    micro_batches = [next(batches) for _ in range(trainer.gradient_accumulation_steps)]
    tokens = torch.tensor(sum(labels.numel() for _, labels in micro_batches))
    if dist.get_world_size() > 1:
        dist.all_reduce(tokens)
    for inputs, labels in micro_batches:
        trainer.forward_backward_step(input_dict=dict(inputs), labels=labels, global_valid_tokens=tokens)
    grads = {plain_name(name): full(parameter.grad) for name, parameter in trainer.model_parts[0].named_parameters()}
    close(trainer)
    return {
        "first": first,
        "gradients": grads,
        "batches": [(inputs["input"], labels) for inputs, labels in micro_batches],
    }


def refused(weights: dict[str, Tensor] | None = None, **arguments: Any) -> str:
    """What a job says that does not start, before it has data."""
    try:
        build(weights, **arguments)
    except ValueError as error:
        return str(error)
    raise AssertionError("the job started")


def main(cases: str, result: str) -> None:
    warnings.simplefilter("ignore")
    torchtitan.trainer.time = types.SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: None)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(500, exit=True)  # a hang says where
    results = {}
    for name, arguments in torch.load(cases, weights_only=False).items():
        function = {"train": train, "gradients": gradients, "refused": refused}[arguments.pop("do", "train")]
        weights = arguments.get("weights")
        if isinstance(weights, str):
            name_of, _, which = weights.partition("/")
            arguments["weights"] = results[name_of][which or "first"]
        results[name] = function(**arguments)
    if os.environ["RANK"] == "0":
        torch.save(results, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process(0)
