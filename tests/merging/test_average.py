"""Averages of models."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.core.errors import UserError
from expert_merging.merging.average import average
from expert_merging.run.deviations import DEVIATIONS, deviates


def models(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)} for _ in range(number)
    ]


@given(st.integers(1, 5), st.integers(0, 100))
def test_average_is_the_mean(number, seed):
    ones = models(number, seed)
    result = average(ones)
    for name in ones[0]:
        torch.testing.assert_close(result[name], torch.stack([one[name] for one in ones]).mean(0))


@given(st.floats(0, 1), st.integers(0, 100))
def test_points_on_a_line(t, seed):
    a, b = models(2, seed)
    result = average([a, b], [1 - t, t])
    for name in a:
        torch.testing.assert_close(result[name], torch.lerp(a[name], b[name], t))


def test_half_precision_is_added_up_in_single():
    ones = [{"a": torch.full((1,), 1.0, dtype=torch.float16)} for _ in range(3)]
    assert average(ones)["a"].dtype == torch.float16 and average(ones)["a"].item() == 1.0


@pytest.mark.parametrize(
    ("spoil", "weights", "said"),
    [
        (lambda m: m.clear(), None, "no model"),
        (lambda m: m[1].pop("b"), None, "only one of them has b"),
        (lambda m: m[1].update(b=torch.zeros(5)), None, r"b is \(4,\) in one model and \(5,\) in another"),
        (lambda m: None, [0.5, 0.6], "weights adding up"),
    ],
)
def test_what_cannot_be_averaged(spoil, weights, said):
    ones = models(2)
    spoil(ones)
    with pytest.raises(ValueError, match=said):
        average(ones, weights)


def test_readings():
    assert not any(deviates("paper", what) for what in DEVIATIONS)
    assert all(deviates("released", what) for what in DEVIATIONS)
    assert [what for what in DEVIATIONS if deviates("paper+counts", what)] == ["counts"]
    for wrong in ("authors", "paper+beams", "released+counts", ""):
        with pytest.raises(UserError, match="must be paper, released, or paper"):
            deviates(wrong, "counts")
