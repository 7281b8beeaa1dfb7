from __future__ import annotations

import os
import signal
import time
from collections import Counter
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import count_collectives, run_ranks
from torch import Tensor

from dtrain.trainer.metrics.reduce import LocalState, reduce_states


def reduced(rank, world_size, states):
    return reduce_states(states[rank])


def by_rank(*values, reduction, **options):
    """The states of each rank, one for each value."""
    return [[LocalState(value, reduction, **options)] for value in values]


def only(results):
    """Rank 0's only value, after a check that the others have none."""
    assert results[1:] == [None] * (len(results) - 1)
    (value,) = results[0]
    return value


def same(actual, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_alone_every_value_comes_back_as_it_is():
    values = [torch.tensor([1.0, 2.0]), torch.tensor(3), [torch.ones(2)], []]
    states = [LocalState(v, r) for v, r in zip(values, ("stack", "sum", "stack", "stack"), strict=True)]
    assert all(a is b for a, b in zip(reduce_states(states), values, strict=True))


def beside_gpus(rank, world_size, states):
    """With a group as a GPU's ranks have it, as far as can be without one."""
    made = patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl")
    with made, patch.object(dist, "get_backend", return_value="cpu:gloo,cuda:nccl"):
        return reduce_states(states[rank])


def test_all_ranks_samples_meet_in_the_cpus_memory_beside_gpus_too():
    states = [
        [LocalState([torch.full((rank + 1,), rank)], "stack"), LocalState(torch.ones(2), "sum")] for rank in range(2)
    ]
    samples, total = run_ranks(2, beside_gpus, states)[0]
    assert [piece.tolist() for piece in samples] == [[0], [1, 1]]
    assert total.tolist() == [2, 2]


def test_sums_keep_dtype_and_shape():
    dtypes = torch.int32, torch.int64, torch.uint8, torch.float16, torch.float32, torch.float64
    values = [[torch.arange(6).reshape(2, 3).to(dtype) + rank for dtype in dtypes] for rank in range(3)]
    states = [[LocalState(value, "sum") for value in own] for own in values]
    for actual, parts in zip(run_ranks(3, reduced, states)[0], zip(*values, strict=True), strict=True):
        same(actual, sum(parts))


def test_a_sum_of_bools_is_their_or_as_in_one_process():
    values = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    same(only(run_ranks(2, reduced, by_rank(*values, reduction="sum"))), torch.tensor([True, True, False]))


def test_int64_sums_are_exact_beyond_float64():
    values = torch.tensor(2**60), torch.tensor(1)
    same(only(run_ranks(2, reduced, by_rank(*values, reduction="sum"))), torch.tensor(2**60 + 1))


def test_float32_sums_are_rounded_once():
    values = (
        torch.tensor(1e8),
        torch.tensor(3.0),
        torch.tensor(3.0),
    )  # float32 steps by 8 here: 3.0 alone is lost
    assert only(run_ranks(3, reduced, by_rank(*values, reduction="sum"))) == 1e8 + 8


def test_a_rank_without_samples_may_not_know_dtype_or_shape_of_a_sum():
    value = torch.tensor([1.5, 2.5, 3.5], dtype=torch.float64)
    states = [[LocalState(torch.tensor(0.0), "sum", updated=False)], [LocalState(value, "sum")]]
    same(only(run_ranks(2, reduced, states)), value)


def test_extremes_keep_nan_and_integers():
    nan = float("nan")
    states = [
        [LocalState(torch.tensor([1.0, nan]), "max"), LocalState(torch.tensor([2**60, 1]), "min")],
        [LocalState(torch.tensor([3.0, 0.0]), "max"), LocalState(torch.tensor([2**60 + 1, 0]), "min")],
    ]
    largest, smallest = run_ranks(2, reduced, states)[0]
    assert torch.equal(largest.nan_to_num(-1), torch.tensor([3.0, -1]))
    same(smallest, torch.tensor([2**60, 0]))


def test_a_stack_holds_the_updated_ranks_in_order():
    one, unseen, two = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])
    states = [
        [LocalState(one, "stack"), LocalState(unseen, "stack", False), LocalState(one, "stack", True, torch.sum)],
        [
            LocalState(unseen, "stack", False),
            LocalState(unseen, "stack", False),
            LocalState(unseen, "stack", False, torch.sum),
        ],
        [LocalState(two, "stack"), LocalState(two, "stack"), LocalState(two, "stack", True, torch.sum)],
    ]
    stacked, single, combined = run_ranks(3, reduced, states)[0]
    same(stacked, torch.stack([one, two]))
    same(single, two)
    same(combined, torch.tensor(10.0))


def test_a_stack_of_no_updated_rank_is_the_default():
    same(
        only(run_ranks(2, reduced, by_rank(torch.ones(2), torch.ones(2), reduction="stack", updated=False))),
        torch.ones(2),
    )


def test_lists_of_uneven_lengths_and_an_empty_one():
    lists = [[torch.ones(2, 3)], [], [torch.zeros(1, 3), torch.full((4, 3), 7.0)]]
    pieces = only(run_ranks(3, reduced, by_rank(*lists, reduction="stack")))
    same(torch.cat(pieces), torch.cat([*lists[0], *lists[2]]))


def test_lists_empty_on_all_ranks():
    assert only(run_ranks(2, reduced, by_rank([], [], reduction="stack"))) == []


def test_lists_keep_their_elements_of_any_dtype_and_shape():
    first = [torch.tensor(True), torch.ones(0, 4), torch.tensor([1.5, 2.5], dtype=torch.float64)]
    second = [torch.tensor([[3]]), torch.tensor([1.0], dtype=torch.bfloat16), torch.arange(6).reshape(2, 3).T]
    pieces = only(run_ranks(2, reduced, by_rank(first, second, reduction="stack")))
    for piece, expected in zip(pieces, first + second, strict=True):
        same(piece, expected)


def in_batches(rank, world_size, lists, batches):
    return reduce_states([LocalState(lists[rank], "stack", batches=batches[rank])])


def test_lists_hold_anything_and_come_batch_by_batch():
    lists = ["a", {"x": torch.ones(2), "y": ("b", None)}, "c"], [], [torch.zeros(1), ["d", torch.tensor(7)]]
    first, second, third, fourth, fifth = only(run_ranks(3, in_batches, lists, ([0, 2, 2], [], [0, 1])))
    assert [first, fifth] == ["a", "c"]
    assert [second.tolist(), third[0], third[1].item()] == [[0.0], "d", 7]
    assert [fourth["x"].tolist(), fourth["y"]] == [[1.0, 1.0], ("b", None)]


def reduced_in_a_group(rank, world_size):
    group = dist.new_group([1, 2])
    return (
        reduce_states([LocalState(torch.tensor(rank), "sum"), LocalState([torch.tensor([rank])], "stack")], group)
        if rank
        else 0
    )


def test_a_group_ends_on_its_own_first_rank():
    outsider, (total, pieces), last = run_ranks(3, reduced_in_a_group)
    assert (outsider, last) == (0, None)
    assert total == 3
    assert torch.cat(pieces).tolist() == [1, 2]


def count_for_many(rank, world_size):
    states = [LocalState(torch.ones(3, dtype=dtype), "sum") for dtype in (torch.int32, torch.int64, torch.float32) * 9]
    states += [LocalState(torch.ones(2), reduction) for reduction in ("max", "min", "stack") * 9]
    states += [LocalState([torch.ones(2, dtype=dtype)], "stack") for dtype in (torch.float32, torch.bool) * 9]
    with count_collectives() as counter:
        reduce_states(states)
    return counter


def test_any_number_of_states_takes_four_collectives():
    expected = Counter(all_gather_object=1, reduce=2, gather=1)  # the exchange; int64 and float64; all else
    assert run_ranks(2, count_for_many) == [expected, expected]


def count_for_sums(rank, world_size):
    with count_collectives() as counter:
        reduce_states([LocalState(torch.ones(3), "sum"), LocalState([], "stack")])
    return counter


def test_nothing_to_gather_is_not_gathered():
    assert run_ranks(2, count_for_sums)[0] == Counter(all_gather_object=1, reduce=1)


def fail_on_rank_1(rank, world_size):
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def die_on_rank_1(rank, world_size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_rank_1(rank, world_size):
    time.sleep(60 * rank)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (fail_on_rank_1, RuntimeError, "(?s)rank 1 failed.*ValueError: only here"),
        (die_on_rank_1, RuntimeError, "rank 1 ended with exit code -9"),
        (hang_on_rank_1, TimeoutError, r"ranks \[1\]"),
    ],
)
def test_run_ranks_names_the_rank_that_failed(function, error, message):
    with pytest.raises(error, match=message):
        run_ranks(2, function, timeout=3 if error is TimeoutError else 120)
