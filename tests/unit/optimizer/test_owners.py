"""Which rank owns which matrix."""

import itertools
import random

import pytest
import torch

from titan_moe.optimizer.owners import assign, cost


def loads_of(costs: list[int], owners: list[tuple[int, int]], num_ranks: int) -> list[int]:
    loads = [0] * num_ranks
    for of_matrix, (owner, _) in zip(costs, owners, strict=True):
        loads[owner] += of_matrix
    return loads


def test_a_matrix_costs_its_product_with_the_smaller_gram_matrix():
    assert cost(torch.empty(6, 4)) == 6 * 4 * 4
    assert cost(torch.empty(4, 6)) == 6 * 4 * 4


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 64])
def test_no_rank_has_much_more_than_the_best_assignment_gives(num_ranks):
    draw = random.Random(num_ranks)
    for _ in range(20):
        costs = [draw.randint(1, 1000) for _ in range(draw.randint(1, 40))]
        owners = assign(costs, num_ranks)
        loads = loads_of(costs, owners, num_ranks)

        # whoever got a matrix last had at most the mean of what the others had; one a rank is the best of all
        last = min(costs) if len(costs) <= num_ranks else sorted(costs)[-num_ranks - 1]
        assert max(loads) <= max(*costs, (sum(costs) - last) / num_ranks + last)
        assert loads == sorted(loads, reverse=True)  # rank 0 is the one that is waited for


def test_the_longest_time_is_within_a_third_of_the_best_of_all_assignments():
    for costs in ([5, 5, 4, 4, 3, 3, 3], [9, 7, 6, 5, 4, 2], [1, 1, 1, 10]):
        best = min(
            max(loads_of(costs, [(owner, 0) for owner in chosen], 3))
            for chosen in itertools.product(range(3), repeat=len(costs))
        )
        assert 9 * max(loads_of(costs, assign(costs, 3), 3)) <= (12 - 1) * best  # 4 / 3 - 1 / (3 * 3 ranks)


@pytest.mark.parametrize(("count", "num_ranks"), [(12, 4), (3, 8), (0, 2), (13, 5)])
def test_a_rank_owns_one_matrix_a_round_the_dearest_first(count, num_ranks):
    costs = [1 + index % 5 for index in range(count)]
    owners = assign(costs, num_ranks)
    assert len(set(owners)) == count
    for rank in range(num_ranks):
        mine = sorted((number, costs[index]) for index, (owner, number) in enumerate(owners) if owner == rank)
        assert [number for number, _ in mine] == list(range(len(mine)))
        assert [of_matrix for _, of_matrix in mine] == sorted((of_matrix for _, of_matrix in mine), reverse=True)


def test_equal_matrices_are_dealt_out_evenly():
    owners = assign([7] * 12, 4)
    assert sorted(owners) == [(rank, number) for rank in range(4) for number in range(3)]
