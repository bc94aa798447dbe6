"""When a run has diverged: found from the numbers of a step or of a validation, and before a save from the weights."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from titan_moe.model.moe import MoE
from titan_moe.model.transformer import Transformer
from titan_moe.model.wrappers import plain_name
from titan_moe.parallelize.grad import param_norm
from titan_moe.records import GRADIENTS, NONFINITE, SKIPPED, Record
from titan_moe.runtime.command import logger


class DivergedError(ValueError):
    """The run has to end, because of numbers that are NaN or infinite; `step` is where they were."""

    def __init__(self, step: int, text: str) -> None:
        super().__init__(f"step {step}: {text}")
        self.step = step


class SkippedSteps(NamedTuple):
    """How many steps of a run changed nothing, because one of their numbers was NaN or infinite."""

    total: int = 0
    in_a_row: int = 0  # up to the latest step; 0 where that one was not skipped

    def count(self, record: Record) -> "SkippedSteps":
        """Take the next step's record into account, once its numbers are on the host."""
        skipped = bool(record.get(SKIPPED))
        return SkippedSteps(self.total + skipped, self.in_a_row + 1 if skipped else 0)


def stop_if_diverged(
    record: Record, skipped: SkippedSteps, *, allowed: int = 0, moe_layers: Sequence[str] = ()
) -> None:
    """Raise DivergedError where the numbers of a step or a validation, on the host, say that the run can't go on.

    A step that was skipped ends the run if more than `allowed` in a row were, this one, which `skipped` has counted,
    included. A loss that is NaN or infinite ends it at once. `moe_layers` are the names of the MoE layers. The numbers
    are those of all ranks, so every rank comes to the same end.
    """
    if record.get(SKIPPED):
        routers = [name for name, flag in zip(moe_layers, record[NONFINITE], strict=True) if flag] if moe_layers else []
        gradients = record[GRADIENTS]() if GRADIENTS in record else []
        _judge_skip(record, routers, gradients, skipped, allowed)
    elif not math.isfinite(record["loss"]):
        text = f"{record['kind']} loss {record['loss']}: the run has diverged and stops"
        raise DivergedError(record["step"], f"{text}: lower optimizer.lr, warm up longer")


def stop_if_weights_diverged(model: Transformer, step: int) -> None:
    """Raise DivergedError, on every rank alike, where what a save holds of the model is NaN or infinite after `step`.

    That are its parameters, the selection biases and what balancers keep. Waits for a GPU.
    """
    if not param_norm(model.parameters()).isfinite():
        raise DivergedError(
            step,
            "a parameter is NaN or infinite: the run has diverged and stops, and this step is not saved: lower "
            "optimizer.lr, warm up longer",
        )

    # Neither has a gradient: a post step has given them, and a bias that is NaN sends all tokens to the same experts.
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not buffer.isfinite().all():
            raise DivergedError(
                step,
                f"{plain_name(name)} is NaN or infinite, which the post step of a balancer has given: the run stops, "
                "and this step is not saved: mend the balancer (a load may be 0), or turn it off under [balancer]",
            )


def _judge_skip(
    record: Record, routers: Sequence[str], gradients: Sequence[str], skipped: SkippedSteps, allowed: int
) -> None:
    """Tell the user why a step was skipped; raise DivergedError where it is one too many.

    `routers` are the layers whose router logits were NaN or infinite, which shows where it began in the forward pass.
    `gradients` are the parameters whose gradients were: the last of them is the first on the way back from the loss.
    """
    # The nearest to the cause comes first: a router's logits, then the losses, then the gradients.
    causes = [f"NaN or infinite router logits in {', '.join(routers)}"] if routers else []
    causes += [
        f"{name} {record[name]}" for name in ("loss", "total_loss", "grad_norm") if not math.isfinite(record[name])
    ]
    if gradients:
        others = f" and of {len(gradients) - 1} before it" if len(gradients) > 1 else ""
        causes.append(f"NaN or infinite gradient of {plain_name(gradients[-1])}{others}")
    text = f"{', '.join(causes)}: the step was skipped and changed nothing"

    # A few are allowed, for a bad batch is no divergence.
    if skipped.in_a_row <= allowed:
        logger.info("step %d: %s (%d in a row)", record["step"], text, skipped.in_a_row)
        return
    if allowed:
        text += f", as {skipped.in_a_row} in a row were, and training.skip_nonfinite_steps allows {allowed}"

    # Only what may help here is advised: a z-loss keeps a router's logits small, and no other number.
    remedies = ["lower optimizer.lr" + (" (or optimizer.router.lr)" if routers else ""), "warm up longer"]
    remedies += ["turn balancer.z_loss on"] if routers else []
    remedies += ["raise training.skip_nonfinite_steps to go on after a few such steps"]
    raise DivergedError(record["step"], f"{text}; the run has diverged and stops: {', '.join(remedies)}")


def moe_layer_names(model: Transformer) -> list[str]:
    """The model's names of its MoE layers, in order, without those of wrappers."""
    return [plain_name(name) for name, module in model.named_modules() if isinstance(module, MoE)]
