"""The keyed permutation behind an epoch's order: exactly the published cipher, and as fair as a real shuffle.

The statistics run on fixed seeds, so they give the same numbers each time. With 7 rounds or fewer they fail.
"""

from __future__ import annotations

import functools
import hashlib
import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from dtrain.trainer.data.permutation import BLOCK, Permutation, split_mix
from dtrain.trainer.distributed.seeds import derive_seed

HUGE = [10**12, 2**61 - 1, 3 * 2**60 + 1, 2**62 - 1, 2**62]


def whole(num_samples, seed):
    return Permutation(num_samples, seed)(np.arange(num_samples))


def some(num_samples, count):
    """Positions, int64 [count]: the first, the last and some between."""
    between = np.random.default_rng(1).integers(0, num_samples, count)
    between[:2] = 0, num_samples - 1
    return between


# -- it is what it says --------------------------------------------------------------------------


class Reference:
    """The cipher on Python's integers, one at a time, and its inverse."""

    def __init__(self, num_samples, seed):
        self.num_samples = num_samples
        root = math.isqrt(num_samples)
        root = root if root % 2 == 0 else root + 1
        domains = []  # the size of the domain, the size of the low half
        for low in range(root, root + min(root // 2, 100) + 1, 2):
            domains.append(((num_samples + low - 1) // low * low, low))
        domain, self.low = min(domains)
        self.high = domain // self.low
        rounds = max(8, 32 // int(math.log2(root)))
        stream = hashlib.shake_256(seed.to_bytes(8, "little")).digest(8 * rounds)
        self.keys = [int.from_bytes(stream[i : i + 8], "little") for i in range(0, len(stream), 8)]

    def value(self, number, half):
        """What round `number` adds, given the other half."""
        state = (half + self.keys[number]) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
        return state // 2**32 * (self.low if number % 2 else self.high) // 2**32

    def encipher(self, value):
        high, low = divmod(value, self.low)
        for number in range(0, len(self.keys), 2):
            high = (high + self.value(number, low)) % self.high
            low = (low + self.value(number + 1, high)) % self.low
        return high * self.low + low

    def decipher(self, value):
        high, low = divmod(value, self.low)
        for number in reversed(range(0, len(self.keys), 2)):
            low = (low - self.value(number + 1, high)) % self.low
            high = (high - self.value(number, low)) % self.high
        return high * self.low + low

    def index(self, position):
        index = self.encipher(position)
        while index >= self.num_samples:
            index = self.encipher(index)
        return index

    def position(self, index):
        position = self.decipher(index)
        while position >= self.num_samples:
            position = self.decipher(position)
        return position


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 11, 33, 60, 97, 129, 1000, 10**7, 2**32, 10**9 + 7, *HUGE])
def test_equals_the_cipher_written_on_integers_and_is_undone_by_its_inverse(num_samples, seed):
    positions = some(num_samples, 300)
    indices = Permutation(num_samples, seed)(positions)
    reference = Reference(num_samples, seed)
    assert indices.dtype == np.int64
    assert indices.tolist() == [reference.index(position) for position in positions.tolist()]
    assert [reference.position(index) for index in indices.tolist()] == positions.tolist()


def test_the_round_function_is_split_mix():
    """The first numbers of the published generator at seed 0."""
    mixed = np.empty(3, dtype=np.uint64)
    gamma = np.uint64(0x9E3779B97F4A7C15)
    split_mix(np.arange(3, dtype=np.uint64) * gamma, gamma, mixed, np.empty_like(mixed))
    assert mixed.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_is_a_permutation():
    sizes = [*range(1, 301), 1023, 1024, 1025, 9973, 99**2 - 1, 99**2, 99**2 + 1, 2**16, 99991, 316**2 + 1]
    for num_samples in sizes:
        order = whole(num_samples, num_samples)
        assert np.array_equal(np.sort(order), np.arange(num_samples)), num_samples


# A user's run has these orders. If one of these numbers changes, on some platform or by some change of the code,
# then old runs can't be repeated, and a run that is continued takes samples twice or never.
PINNED = [
    (4, 0, [1, 0, 3, 2]),
    (10, 1, [9, 6, 7, 0]),
    (1000, 0, [265, 690, 933, 501]),
    (10**7, 7, [8280623, 5217247, 5326603, 3592177]),
    (10**12, 2**63 - 1, [826912972757, 173726735591, 183381692757, 424832293906]),
    (2**62, 0, [2828657989747150990, 260277148252826771, 1680225132394080026, 1608445121814035272]),
]


@pytest.mark.parametrize(("num_samples", "seed", "first"), PINNED)
def test_the_order_stays_what_it_is(num_samples, seed, first):
    assert Permutation(num_samples, seed)(np.arange(4)).tolist() == first


def test_an_index_depends_on_its_position_alone():
    num_samples = 3 * BLOCK + 5
    permutation = Permutation(num_samples, 3)
    order = whole(num_samples, 3)
    cuts = [0, 1, 2, 66, 67, BLOCK - 1, BLOCK + 1, 2 * BLOCK + 1, num_samples]
    parts = [permutation(np.arange(begin, end)) for begin, end in pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), order)
    positions = some(num_samples, num_samples)
    before = positions.copy()
    assert np.array_equal(permutation(positions), order[positions])
    assert np.array_equal(positions, before)
    assert permutation(positions[:0]).tolist() == []


def test_what_is_out_of_range_is_refused():
    for position in (-1, 10, 2**62):
        with pytest.raises(IndexError, match="from 0 to 9"):
            Permutation(10, 0)(np.array([3, position]))
    for num_samples in (0, 2**62 + 1):
        with pytest.raises(ValueError, match="num_samples"):
            Permutation(num_samples, 0)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed"):
            Permutation(10, seed)


# -- it is fair ----------------------------------------------------------------------------------


@functools.cache
def epochs(num_samples, count):
    """The orders of many epochs, int64 [count, num_samples]."""
    return np.stack([whole(num_samples, derive_seed("order", 0, epoch)) for epoch in range(count)])


def is_chi_square(statistic, freedom):
    """Whether it is neither too large nor too small, each at a level of 1e-4."""
    print(f"chi-square {statistic:.1f} of {freedom} degrees of freedom: p = {stats.chi2.sf(statistic, freedom):.2g}")
    return stats.chi2.ppf(1e-4, freedom) < statistic < stats.chi2.isf(1e-4, freedom)


def is_as_expected(observed, expected):
    """Pearson's test."""
    observed, expected = np.broadcast_arrays(observed, expected)
    assert np.isclose(observed.sum(), expected.sum())
    return is_chi_square(((observed - expected) ** 2 / expected).sum(), observed.size - 1)


def is_standard_normal(values):
    """Whether the mean of the values is 0 within 4 sigma, and their variance 1."""
    print(f"mean {values.mean() * math.sqrt(values.size):.2f} sigma")
    return abs(values.mean()) * math.sqrt(values.size) < 4 and is_chi_square((values**2).sum(), values.size)


def is_poisson(counts):
    """Whether the counts are distributed like the fixed points of a random permutation: Poisson's law of mean 1."""
    expected = stats.poisson.pmf(np.arange(6), 1)
    return is_as_expected(
        np.bincount(counts.clip(max=6), minlength=7), counts.size * np.append(expected, 1 - expected.sum())
    )


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 6])
def test_all_permutations_of_a_few_are_equally_likely(num_samples):
    possible = math.factorial(num_samples)
    counts = np.zeros(possible)
    _, counts_of_seen = np.unique(epochs(num_samples, 2000), axis=0, return_counts=True)
    counts[: counts_of_seen.size] = counts_of_seen
    assert is_as_expected(counts, 2000 / possible)


# 8 by 8, and a prime: 7 by 14, of which one is left over.
@pytest.mark.parametrize("num_samples", [64, 97])
class TestManyEpochs:
    @pytest.fixture
    def orders(self, num_samples):
        return epochs(num_samples, 8000)

    def test_each_index_is_equally_likely_at_each_position(self, orders, num_samples):
        counts = np.stack([np.bincount(at_position, minlength=num_samples) for at_position in orders.T])
        # Rows and columns have fixed sums, so Pearson's statistic has (n - 1)^2 degrees of freedom, times n / (n - 1).
        expected = len(orders) / num_samples
        statistic = ((counts - expected) ** 2 / expected).sum() * (num_samples - 1) / num_samples
        assert is_chi_square(statistic, (num_samples - 1) ** 2)

    @pytest.mark.parametrize("distance", [1, 2, 4, 8, 16])
    def test_each_difference_is_equally_likely(self, orders, num_samples, distance):
        differences = (orders[:, distance:] - orders[:, :-distance]) % num_samples
        assert is_as_expected(np.bincount(differences.ravel())[1:], differences.size / (num_samples - 1))

    def test_each_ordering_of_five_neighbours_is_equally_likely(self, orders, num_samples):
        fives = orders[:, : num_samples // 5 * 5].reshape(-1, 5)
        _, counts = np.unique(np.argsort(fives, axis=1), axis=0, return_counts=True)
        assert is_as_expected(counts, len(fives) / math.factorial(5))

    def test_as_many_descents_and_inversions_as_expected(self, orders, num_samples):
        n = num_samples
        descents = (orders[:, 1:] < orders[:, :-1]).sum(axis=1)
        assert is_standard_normal((descents - (n - 1) / 2) / math.sqrt((n + 1) / 12))
        inversions = sum((orders[:, :-i] > orders[:, i:]).sum(axis=1) for i in range(1, n))
        assert is_standard_normal((inversions - n * (n - 1) / 4) / math.sqrt(n * (n - 1) * (2 * n + 5) / 72))
        assert is_as_expected(np.bincount(inversions % 2), len(orders) / 2)

    def test_epochs_are_independent_of_each_other_and_of_no_shuffle(self, orders, num_samples):
        for other in (np.arange(num_samples), orders[:-1]):
            mine = orders[-len(other) :] if other.ndim == 2 else orders
            assert is_poisson((mine == other).sum(axis=1))
            centre = (num_samples - 1) / 2
            products = ((mine - centre) * (other - centre)).sum(axis=1)
            correlation = products / (num_samples * (num_samples**2 - 1) / 12)  # Spearman's
            assert is_standard_normal(correlation * math.sqrt(num_samples - 1))


# Its halves are of 10 bits: a difference that survives the rounds in one of them shows.
@pytest.fixture(scope="module")
def large():
    return whole(2**20, derive_seed("order", 0, 1))


@pytest.mark.parametrize("distance", [2**i for i in range(20)])
def test_each_difference_is_equally_likely_in_a_large_set(large, distance):
    differences = (large[distance:] - large[:-distance]) % large.size
    width = np.full(2**10, 2**10)
    width[0] -= 1  # the difference is never 0
    expected = differences.size * width / width.sum()
    assert is_as_expected(np.bincount(differences >> 10), expected)
    assert is_as_expected(np.bincount(differences & (2**10 - 1)), expected)


def test_parts_of_a_large_set_are_evenly_spread():
    order = whole(10**6, derive_seed("order", 0, 1))
    tenth = order // 10**5
    for rows, columns in ((np.arange(10**6) // 10**5, tenth), (tenth[:-1], tenth[1:])):
        counts = np.bincount(rows * 10 + columns, minlength=100)
        assert is_chi_square(((counts - 10**4) ** 2 / 10**4).sum(), 81)  # rows and columns have fixed sums
