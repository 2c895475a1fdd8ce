"""Rotation and length grouping."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.data.batches import MicroBatches, epoch_examples, length_grouped

SIZES = st.integers(1, 40)


@given(SIZES, SIZES, st.integers(0, 99))
def test_rotation_uses_every_example_equally(size, per_epoch, seed):
    row = np.concatenate([epoch_examples(size, per_epoch, epoch, seed) for epoch in range(size)])
    assert len(row) == size * per_epoch
    assert Counter(row.tolist()) == dict.fromkeys(range(size), per_epoch)
    # Not only in the end: at any time no example is more than one use ahead of another.
    for stop in range(size, len(row) + 1, size):
        assert set(Counter(row[:stop].tolist()).values()) == {stop // size}


@given(SIZES, SIZES, st.integers(0, 5))
def test_rotation_repeats_and_depends_on_the_seed(size, per_epoch, epoch):
    assert np.array_equal(epoch_examples(size, per_epoch, epoch, 1), epoch_examples(size, per_epoch, epoch, 1))
    first, second = (epoch_examples(1000, 1000, epoch, seed) for seed in (1, 2))
    assert not np.array_equal(first, second)


@given(st.integers(1, 700), st.integers(1, 9), st.integers(0, 99))
def test_grouping_loses_and_adds_nothing(count, batch_size, seed):
    rng = np.random.default_rng(seed)
    examples, lengths = rng.permutation(count), rng.integers(1, 100, count)
    batches = length_grouped(examples, lengths, batch_size, seed)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)
    assert all((np.diff(lengths[batch]) <= 0).all() for batch in batches if len(batch) > 1) or count > 50 * batch_size


def test_grouping_saves_padding():
    rng = np.random.default_rng(0)
    examples, lengths = rng.permutation(4000), rng.integers(1, 500, 4000)

    def padded(batches):
        return sum(lengths[batch].max() * len(batch) for batch in batches)

    plain = [examples[i : i + 24] for i in range(0, 4000, 24)]
    grouped = length_grouped(examples, lengths, 24, 0)
    assert padded(grouped) < 0.6 * padded(plain)
    assert padded(grouped) < 1.05 * lengths.sum()


@dataclass(frozen=True)
class Pass:
    task: str
    rows: np.ndarray


@given(st.integers(1, 30), st.integers(0, 6))
def test_micro_batches_share_out_the_rows(rows, times):
    one, other, cutting = (
        Pass(
            "a",
            np.arange(rows) * 3,
        ),
        Pass("b", np.arange(rows)),
        MicroBatches(),
    )
    for _ in range(times):
        largest = cutting.cut(one)[0]
        assert cutting.halve(largest) == (len(largest.rows) > 1)
    parts = cutting.cut(one)
    assert np.concatenate([part.rows for part in parts]).tolist() == one.rows.tolist()
    sizes = [len(part.rows) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and {part.task for part in parts} == {"a"}
    assert len(parts) == min(rows, 2**times) or sizes == [1] * rows
    assert cutting.cut(other) == [other]
