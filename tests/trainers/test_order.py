"""Orders of sets of any size, and of mixtures: every row once in each pass, shares as asked for, nothing kept."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.core import order
from trainers.core.order import BatchOrder, Mixture, Part, shuffled


@pytest.mark.parametrize("count", [2, 3, 5, 17, 64, 65, 1000, 4097])
def test_the_cipher_is_an_order_of_all(count, monkeypatch):
    monkeypatch.setattr(order, "LARGEST_TABLE", 1)
    whole = shuffled(count, (3, 0), np.arange(count))
    assert sorted(whole.tolist()) == list(range(count))
    some = np.random.default_rng(0).integers(0, count, 20)
    assert shuffled(count, (3, 0), some).tolist() == whole[some].tolist()
    assert count < 17 or shuffled(count, (3, 1), np.arange(count)).tolist() != whole.tolist()


def test_the_ciphers_orders_look_like_random_ones(monkeypatch):
    """Where a row comes, and what comes behind it, tells nothing: chi-squared over cells, 5 standard deviations."""
    monkeypatch.setattr(order, "LARGEST_TABLE", 1)
    count, cells = 1 << 14, 16
    found = np.concatenate([shuffled(count, (seed, 0), np.arange(count)) for seed in range(8)]) * cells // count
    places = np.tile(np.arange(count) * cells // count, 8)
    steps = (found[1:] - found[:-1]) % cells
    for pairs in (places * cells + found, steps):
        counts = np.bincount(pairs)
        expected = len(pairs) / len(counts)
        chi = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi - len(counts)) < 5 * np.sqrt(2 * len(counts))


def test_ten_million_rows_need_no_table():
    large = BatchOrder(10_000_000, 32, 1, None, 0)
    order._table.cache_clear()
    seen = [i for step in range(1000) for i in large.indices(step)]
    assert len(set(seen)) == 32_000 and max(seen) < 10_000_000
    assert order._table.cache_info().currsize == 0


def examples(mixture, passes):
    """(source, row) of every place of so many passes, pass by pass."""
    whole = BatchOrder(mixture.size, 7, passes, None, mixture.seed)
    found = zip(*(part.tolist() for part in mixture.at(*whole.at(np.arange(passes * mixture.size)))[:2]), strict=True)
    places = list(found)
    return [places[n * mixture.size : (n + 1) * mixture.size] for n in range(passes)]


sizes = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@given(sizes, st.integers(0, 3))
def test_without_settings_sources_are_concatenated(sizes, seed):
    mixture = Mixture(tuple(map(Part, sizes)), seed)
    rows = [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    for number, one in enumerate(examples(mixture, 2)):
        assert sorted(one) == rows
        assert one == [rows[i] for i in np.random.default_rng([seed, number]).permutation(len(rows))]


@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0])), min_size=1, max_size=4))
def test_a_source_gives_its_rows_as_often_as_it_should_and_evenly(parts):
    mixture = Mixture(tuple(Part(size, epochs) for size, epochs in parts), 1)
    seen = Counter()
    for number, one in enumerate(examples(mixture, 4), 1):
        seen.update(one)
        for source, (size, epochs) in enumerate(parts):
            times = [seen[source, row] for row in range(size)]
            assert sum(times) == number * max(1, round(epochs * size))
            assert max(times) - min(times) <= 1


@given(st.lists(st.tuples(st.integers(20, 60), st.integers(1, 5), st.integers(1, 3)), min_size=2, max_size=4))
def test_shares_are_those_of_the_weights_and_no_row_comes_too_often(parts):
    mixture = Mixture(tuple(Part(size, epochs, weight) for size, weight, epochs in parts), 1)
    (one,) = examples(mixture, 1)
    counts = Counter(source for source, _ in one)
    total = sum(weight for _, weight, _ in parts)
    for source, (_, weight, epochs) in enumerate(parts):
        assert abs(counts[source] - len(one) * weight / total) < 2
        assert max(Counter(row for s, row in one if s == source).values()) <= epochs
    assert any(counts[source] >= size * epochs - 1 for source, (size, _, epochs) in enumerate(parts))


@given(sizes, st.integers(1, 9), st.integers(0, 40))
def test_a_step_needs_no_step_before_it(sizes, batch_size, step):
    mixture = Mixture(tuple(Part(size, 1.5) for size in sizes), 2)
    places = BatchOrder(mixture.size, batch_size, 1, 50, 2)
    alone = mixture.at(*places.at(np.arange(*places.places(step))))
    whole = mixture.at(*places.at(np.arange(0, 50 * batch_size)))
    for found, wanted in zip(alone, whole, strict=True):
        assert found.tolist() == wanted[step * batch_size : (step + 1) * batch_size].tolist()
