"""Mixed precision on one process: parameters that the optimizer updates, and copies in another type to compute with.

On several processes FSDP2 does this while it gathers. One process has nothing to gather: it needs one pass over the
parameters before a step's first forward, and one over each gradient as it comes, while it is still in the cache.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable


class Slot(NamedTuple):
    """A place in a module where a parameter hangs; one that is shared (a tied head) has several."""

    module: nn.Module
    name: str
    number: int  # of the parameter, among all


class LowPrecision:
    """The copies of a model's parameters in a lower precision, which stand in for them in forward and backward.

    Gradients are added up in the parameters' own type. Outside of a step, and of a forward without gradients, the model
    has its parameters, as the optimizer and checkpoints want them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.masters: list[nn.Parameter] = []
        self.copies: list[nn.Parameter] = []
        self.slots: list[Slot] = []
        self.are_in = False  # the copies stand in for the parameters
        self.are_current = False  # and hold what these do
        self.is_last = True  # the micro-batch is the step's last
        self.is_queued = False  # `_after_backward` will be called
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward, always_call=True)

    @torch.no_grad()
    def _before_forward(self, *_: Any) -> None:
        """Bring the copies up to date, unless an earlier micro-batch of the step has, and put them into the model."""
        if not self.are_in:
            self._find_parameters()
            self._put(self.copies)
        if not self.are_current:
            torch._foreach_copy_(cast(list[Tensor], self.copies), cast(list[Tensor], self.masters))

    def _find_parameters(self) -> None:
        """See which parameters the model has: those it is built with may be replaced before its first step."""
        slots = [(m, name, p) for m in self.model.modules() for name, p in m._parameters.items() if p is not None]
        number_of = {parameter: number for number, parameter in enumerate(dict.fromkeys(p for _, _, p in slots))}
        if len(number_of) == len(self.masters) and all(map(number_of.__contains__, self.masters)):
            return
        self.masters = list(number_of)
        self.slots = [Slot(module, name, number_of[parameter]) for module, name, parameter in slots]
        self.copies = []
        for number, master in enumerate(self.masters):
            copy = nn.Parameter(torch.empty_like(master, dtype=self.dtype), requires_grad=master.requires_grad)
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(self._gradient_taker(number))
            self.copies.append(copy)

    def _gradient_taker(self, number: int) -> Callable[[Tensor], None]:
        """Make what takes the gradient of a copy, once it is there."""

        def take(copy: Tensor) -> None:
            # the parameter's own type first: bf16 would lose most of what later micro-batches add
            master, gradient = self.masters[number], cast(Tensor, copy.grad)
            if master.grad is None:
                master.grad = torch.empty_like(master)
                torch._foreach_copy_([master.grad], [gradient])  # on a GPU at twice the speed of `gradient.to`
            else:
                master.grad.add_(gradient)
            copy.grad = None

            # checkpointed layers run forward again within backward, with what the model has then
            if not self.is_queued:
                self.is_queued = True
                cast(Any, Variable)._execution_engine.queue_callback(self._after_backward)

        return take

    def _after_forward(self, _module: nn.Module, _args: Any, output: Any) -> None:
        # no backward follows, which would give the model its parameters again, or the forward has failed
        if output is None or not (torch.is_grad_enabled() or self.are_current):
            self.take_out()

    def _after_backward(self) -> None:
        self.is_queued, self.are_current = False, not self.is_last
        if self.is_last:
            self.take_out()

    def take_out(self) -> None:
        """Give the model its parameters again."""
        if self.are_in:
            self._put(self.masters)

    def _put(self, parameters: Sequence[nn.Parameter]) -> None:
        for module, name, number in self.slots:
            module._parameters[name] = parameters[number]
        self.are_in = parameters is self.copies
