"""Cross-entropy of an output head, a chunk of tokens at a time, so that the logits of all tokens are never in memory.

The gradients are computed in forward, where a chunk's logits are in memory, and backward only scales them: three
products with the head, as many as with whole logits (Liger Kernel: Hsu et al., 2024). Computing the logits again in
backward (Cut Cross-Entropy: Wijmans et al., 2025) would take a fourth and save nothing: the peak of memory is at the
start of backward, when all activations are there, and the head's gradient has to be there in either case.

Shapes: T tokens, C tokens of a chunk, D dim, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

IGNORE = -100  # a label that does not count, torch's convention
# A GPU wants large products, and each chunk is a pass over the head's gradient; a CPU is as fast with small chunks.
CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 256, 4096

Softmax = Callable[[Tensor, Tensor], Tensor]


class Score(NamedTuple):
    """The sums of a batch over the tokens whose label counts."""

    ce_sum: Tensor  # () fp32: their cross-entropy in nats
    num_correct: Tensor  # () int64: how many of them have their largest logit at the label


class TokenScores(NamedTuple):
    """What `Score` sums up, of each of T tokens; of one whose label does not count 0 and false."""

    ce: Tensor  # (T,) fp32: cross-entropy in nats
    is_correct: Tensor  # (T,) bool: whether the largest logit is at the label


def softmax_(logits_CV: Tensor, label_C1: Tensor) -> Tensor:
    """Replace each row of the logits by its softmax; return the log-probability of each row's label, (C, 1) fp32.

    All is computed in fp32. No other tensor is as large as the logits, except a copy where they are not fp32.
    """
    # The label's logit is read first: what follows overwrites fp32 logits.
    z_CV = logits_CV.float()
    max_C1 = z_CV.amax(dim=-1, keepdim=True)
    label_z_C1 = z_CV.gather(1, label_C1) - max_C1  # (C, V) -> (C, 1)

    # Less the largest, so that exp does not overflow.
    p_CV = z_CV.sub_(max_C1).exp_()
    sum_C1 = p_CV.sum(dim=-1, keepdim=True)
    logits_CV.copy_(p_CV.div_(sum_C1))
    return label_z_C1 - sum_C1.log()


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, chunk_tokens: int = 0, softmax_: Softmax = softmax_
) -> Tensor:
    """Cross-entropy of the logits x weight^T, summed over the labels that are not IGNORE; nats, a fp32 scalar.

    Differentiable once by `x` and `weight`, whose gradients have their types; that of `weight` is added up in fp32
    over chunks of `chunk_tokens` tokens (0: one chunk, -1: as suits the device) and rounded at the end. `softmax_` is
    the function of this file, plain or compiled.
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, chunk_tokens, softmax_)
    return score(x_TD, weight_VD, labels_T, chunk_tokens=chunk_tokens, softmax_=softmax_).ce_sum


@torch.no_grad()
def score(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, chunk_tokens: int = 0, softmax_: Softmax = softmax_
) -> Score:
    """`linear_cross_entropy` without gradients, and the number of tokens that are predicted."""
    ce_sum = torch.zeros((), device=x_TD.device)
    num_correct = torch.zeros((), dtype=torch.int64, device=x_TD.device)
    for x_CD, labels_C in _chunks(chunk_tokens, x_TD, labels_T):
        logits_CV = F.linear(x_CD, weight_VD)  # (C, D) -> (C, V)
        num_correct += (logits_CV.argmax(-1) == labels_C).sum()  # no argmax is IGNORE
        ce_sum += _cross_entropy_(logits_CV, labels_C, softmax_)
        del logits_CV  # before the next chunk has any
    return Score(ce_sum, num_correct)


@torch.no_grad()
def token_scores(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, chunk_tokens: int = 0, softmax_: Softmax = softmax_
) -> TokenScores:
    """The cross-entropy of each token, without gradients, and whether it is predicted; the host waits for the device.

    Logits are computed of the tokens alone whose labels count, which may be few.
    """
    counted_N = (labels_T != IGNORE).nonzero().squeeze(1)  # (T,) -> (N,)
    ce_T = torch.zeros(labels_T.shape, dtype=torch.float32, device=x_TD.device)
    is_correct_T = torch.zeros(labels_T.shape, dtype=torch.bool, device=x_TD.device)
    for (place_C,) in _chunks(chunk_tokens, counted_N) if len(counted_N) else ():
        logits_CV = F.linear(x_TD[place_C], weight_VD)  # (C, D) -> (C, V)
        label_C = labels_T[place_C]
        is_correct_T[place_C] = logits_CV.argmax(-1) == label_C
        ce_T[place_C] = -softmax_(logits_CV, label_C.unsqueeze(1)).squeeze(1)  # (C, 1) -> (C,)
    return TokenScores(ce_T, is_correct_T)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int, softmax_: Softmax
    ) -> Tensor:
        ce_sum = torch.zeros((), device=x_TD.device)
        grad_x_TD, grad_weight_VD = torch.empty_like(x_TD), None
        for x_CD, labels_C, grad_x_CD in _chunks(chunk_tokens, x_TD, labels_T, grad_x_TD):
            # One buffer of (C, V): it has the logits, and after the next line their gradient.
            grad_CV = F.linear(x_CD, weight_VD)  # (C, D) -> (C, V)
            ce_sum += _cross_entropy_(grad_CV, labels_C, softmax_)

            # Tokens that do not count are left out here, in rows of D numbers, where zeros in their gradient would be
            # one more pass over V.
            counts_C1 = (labels_C != IGNORE).unsqueeze(1)
            torch.mm(grad_CV, weight_VD, out=grad_x_CD).mul_(counts_C1)  # (C, V) -> (C, D)
            grad_weight_VD = _add_product(grad_weight_VD, grad_CV.t(), x_CD * counts_C1)
            del grad_CV  # before the next chunk has any
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return ce_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyrefly: ignore
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        return grad_x_TD * grad_ce, (grad_weight_VD * grad_ce).to(ctx.weight_dtype), None, None, None


def _cross_entropy_(logits_CV: Tensor, labels_C: Tensor, softmax_: Softmax) -> Tensor:
    """Return the cross-entropy summed over the tokens that count, () fp32, and replace the logits by their gradient.

    The gradient is softmax - one_hot. Tokens that don't count get one, too, of label 0: the caller leaves it out.
    """
    label_C1 = labels_C.clamp(min=0).unsqueeze(1)
    log_p_C1 = softmax_(logits_CV, label_C1)

    # At the label it is p - 1, taken from log p: where p is near 1 the difference would have no digits left.
    logits_CV.scatter_(1, label_C1, log_p_C1.expm1().to(logits_CV.dtype))
    return -torch.where(labels_C == IGNORE, 0.0, log_p_C1.squeeze(1)).sum()


def _chunks(chunk_tokens: int, *tensors_T: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if chunk_tokens == -1:
        chunk_tokens = CPU_CHUNK_TOKENS if tensors_T[0].device.type == "cpu" else GPU_CHUNK_TOKENS
    size = chunk_tokens or max(1, len(tensors_T[0]))
    return zip(*(tensor.split(size) for tensor in tensors_T), strict=True)


def _add_product(sum_VD: Tensor | None, a_VC: Tensor, b_CD: Tensor) -> Tensor:
    """Return sum + a b in fp32, for bf16 or fp32 matrices; in place unless the sum is None, which stands for 0.

    The product is not rounded to bf16 before it is added.
    """
    if a_VC.is_cuda and a_VC.dtype != torch.float32:
        product_VD = torch.mm(a_VC, b_CD, out_dtype=torch.float32)
        return product_VD if sum_VD is None else sum_VD.add_(product_VD)
    a_VC, b_CD = a_VC.float(), b_CD.float()  # a CPU has no product of bf16 matrices with a fp32 result
    return torch.mm(a_VC, b_CD) if sum_VD is None else torch.addmm(sum_VD, a_VC, b_CD, out=sum_VD)
