"""Shampoo against a plain loop over experts and blocks, written from its definition, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titan_moe.optimizer.build import OPTIMIZERS

LR, STEPS = 0.02, 20
DEFAULTS: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "epsilon": 1e-6,
    "exponent": 0.0,
    "grafting": "adamw",
    "precondition_frequency": 5,
    "start_preconditioning_step": 5,
    "statistics_every": 1,
    "max_preconditioner_dim": 64,
    "adamw_above": 8192,
    "share_factors": False,
    "one_sided": False,
}


class Block:
    """One block of one matrix, step by step."""

    def __init__(self, shape: tuple[int, int], o: dict[str, Any]) -> None:
        self.o, self.t, self.seen = o, 0, 0
        rows, cols = shape
        kept = {"left": rows, "right": cols}
        if o["one_sided"]:
            kept.pop("right" if rows <= cols else "left")
        self.factor = {side: torch.zeros(n, n, dtype=torch.float64) for side, n in kept.items()}
        self.root = {side: torch.eye(n, dtype=torch.float64) for side, n in kept.items()}
        self.m = torch.zeros(rows, cols, dtype=torch.float64)
        self.v = torch.zeros(rows, cols, dtype=torch.float64)

    def new_roots(self) -> None:
        power = self.o["exponent"] or 1 / (2 * len(self.factor))
        for side, factor in self.factor.items():
            a = factor / (1 - self.o["beta2"] ** self.seen)
            lam, q = torch.linalg.eigh(a + self.o["epsilon"] * torch.eye(len(a), dtype=torch.float64))
            if lam.min() < self.o["epsilon"]:
                lam = lam - lam.min() + self.o["epsilon"]
            self.root[side] = q @ torch.diag(lam**-power) @ q.T

    def direction(self, g: Tensor) -> Tensor:
        o, self.t = self.o, self.t + 1
        b1, b2 = o["beta1"], o["beta2"]
        if (self.t - 1) % o["statistics_every"] == 0:
            self.seen += 1
            for side, outer in (("left", g @ g.T), ("right", g.T @ g)):
                if side in self.factor:
                    self.factor[side] = b2 * self.factor[side] + (1 - b2) * outer
        start, every = o["start_preconditioning_step"], o["precondition_frequency"]
        if self.t == start or (self.t > start and self.t % every == 0):
            self.new_roots()
        self.v = b2 * self.v + (1 - b2) * g * g
        self.m = b1 * self.m + (1 - b1) * g
        mean = self.m / (1 - b1**self.t)
        adam = mean / ((self.v / (1 - b2**self.t)).sqrt() + o["eps"])
        shampoo = mean
        if "left" in self.root:
            shampoo = self.root["left"] @ shampoo
        if "right" in self.root:
            shampoo = shampoo @ self.root["right"]
        if o["grafting"] == "none":
            return shampoo
        return adam if self.t < start else self.graft(shampoo, adam)

    def graft(self, shampoo: Tensor, adam: Tensor) -> Tensor:
        return shampoo * adam.norm() / shampoo.norm()


class Matrix:
    """One matrix cut into blocks."""

    def __init__(self, weight: Tensor, o: dict[str, Any]) -> None:
        self.weight, self.o = weight.double().clone(), o
        size = o["max_preconditioner_dim"]
        self.blocks = [[Block(tuple(b.shape), o) for b in row.split(size, 1)] for row in weight.split(size, 0)]

    def step(self, gradient: Tensor) -> None:
        size = self.o["max_preconditioner_dim"]
        rows = []
        for row, blocks in zip(gradient.double().split(size, 0), self.blocks, strict=True):
            rows.append(torch.cat([b.direction(g) for b, g in zip(blocks, row.split(size, 1), strict=True)], 1))
        direction = torch.cat(rows, 0)
        self.weight -= LR * (direction + self.o["weight_decay"] * self.weight)


class SharedMatrix(Block):
    """One matrix whose two factors have blocks on their diagonal and nothing beside them."""

    def __init__(self, weight: Tensor, o: dict[str, Any]) -> None:
        super().__init__(tuple(weight.shape), o)
        self.weight = weight.double().clone()

    def new_roots(self) -> None:
        size = self.o["max_preconditioner_dim"]
        whole = dict(self.factor)
        roots = {}
        for side, factor in whole.items():
            starts = range(0, len(factor), size)
            pieces = []
            for i in starts:
                self.factor = {**whole, side: factor[i : i + size, i : i + size]}
                super().new_roots()
                pieces.append(self.root[side])
            roots[side] = torch.block_diag(*pieces)
        self.factor, self.root = whole, roots

    def graft(self, shampoo: Tensor, adam: Tensor) -> Tensor:
        size, graft = self.o["max_preconditioner_dim"], super().graft
        strips = zip(shampoo.split(size, 0), adam.split(size, 0), strict=True)
        return torch.cat(
            [
                torch.cat([graft(*pair) for pair in zip(p.split(size, 1), a.split(size, 1), strict=True)], 1)
                for p, a in strips
            ]
        )

    def step(self, gradient: Tensor) -> None:
        self.weight -= LR * (self.direction(gradient.double()) + self.o["weight_decay"] * self.weight)


def gradients(shape: tuple[int, ...], rank: int | None, scale: float = 1.0) -> list[Tensor]:
    """One gradient a step, of full or of low rank, with directions that matter unequally."""
    generator = torch.Generator().manual_seed(3)
    if len(shape) == 1:
        return [scale * torch.randn(shape, generator=generator) for _ in range(STEPS)]
    strength = torch.logspace(0, -1, shape[-1])
    if rank is None:
        return [scale * torch.randn(shape, generator=generator) * strength for _ in range(STEPS)]
    inside = torch.randn((*shape[:-2], rank, shape[-1]), generator=generator)
    outside = [torch.randn((*shape[:-1], rank), generator=generator) for _ in range(STEPS)]
    return [scale * o @ inside * strength for o in outside]


CASES: dict[str, tuple[tuple[int, ...], int | None, dict[str, Any]]] = {
    "stacked experts": ((3, 12, 20), None, {}),
    "one matrix": ((16, 10), None, {}),
    "starts at the first step": ((2, 8, 6), None, {"start_preconditioning_step": 1, "epsilon": 1e-3}),
    "starts between two roots": ((2, 8, 6), None, {"start_preconditioning_step": 7}),
    "blocks": ((2, 12, 20), None, {"max_preconditioner_dim": 8}),
    "blocks that divide it": ((2, 12, 16), None, {"max_preconditioner_dim": 4}),
    # its block of one row has seen five directions of six by the first root: rank-deficient as well
    "blocks of one matrix": ((13, 7), None, {"max_preconditioner_dim": 6, "epsilon": 1e-4}),
    "rank-deficient": ((2, 12, 10), 3, {"epsilon": 1e-4}),
    "exponent 1/2": ((2, 8, 12), None, {"exponent": 0.5}),
    "exponent 1/8": ((2, 8, 12), None, {"exponent": 0.125}),
    "no grafting": ((2, 8, 12), None, {"grafting": "none"}),
    "no grafting, blocks": ((2, 8, 12), None, {"grafting": "none", "max_preconditioner_dim": 5}),
    "one side, wide": ((2, 8, 12), None, {"one_sided": True}),
    "one side, tall": ((2, 12, 8), None, {"one_sided": True, "max_preconditioner_dim": 7}),
    "shared": ((2, 12, 20), None, {"max_preconditioner_dim": 8, "share_factors": True}),
    "shared, of one matrix": ((13, 7), None, {"max_preconditioner_dim": 6, "share_factors": True}),
    "shared, rank-deficient": ((2, 12, 8), 3, {"max_preconditioner_dim": 4, "share_factors": True, "epsilon": 1e-4}),
    "shared, one side": ((2, 12, 8), None, {"max_preconditioner_dim": 5, "share_factors": True, "one_sided": True}),
    "shared, no grafting": ((8, 12), None, {"max_preconditioner_dim": 5, "share_factors": True, "grafting": "none"}),
    "statistics every 3 steps": ((2, 8, 12), None, {"statistics_every": 3}),
    "other betas": ((2, 8, 12), None, {"beta1": 0.5, "beta2": 0.99, "weight_decay": 0.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_loop(name: str) -> None:
    shape, rank, changes = CASES[name]
    arguments = {**DEFAULTS, **changes}
    weight = nn.Parameter(torch.randn(shape))
    make = SharedMatrix if arguments["share_factors"] else Matrix
    matrices = [make(w, arguments) for w in (weight.detach() if weight.dim() == 3 else weight.detach()[None])]
    optimizer = OPTIMIZERS["shampoo"]([{"name": "expert", "params": [weight]}], lr=LR, **arguments)
    for gradient in gradients(shape, rank):
        weight.grad = gradient
        optimizer.step()
        for matrix, g in zip(matrices, gradient.view(-1, *shape[-2:]), strict=True):
            matrix.step(g)
        expected = torch.stack([matrix.weight for matrix in matrices]).view(shape)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)
