"""normalized_entropy and allocate_experts against the rules of the paper's appendix, written out the slow way."""

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from stock_switch import caem

allocate_experts, normalized_entropy = caem.allocate_experts, caem.normalized_entropy


def ideal_shares(entropies, target, alpha):
    total = sum(entropies)
    shares = [Fraction(target) * h / total if total else Fraction(target, len(entropies)) for h in entropies]
    return [alpha * q + (1 - alpha) * Fraction(target, len(entropies)) for q in shares]


def paper_rule_for_three(entropies, limit, target, alpha):
    """Appendix A.2 as printed, in exact fractions, case by case."""
    q = ideal_shares(entropies, target, alpha)
    a = [math.floor(x) for x in q]
    r = [x - math.floor(x) for x in q]
    for i in range(3):
        if a[i] == 0:
            a[i] = 1
        if a[i] > limit:
            a[i] = limit
    while sum(a) > target:
        largest = [i for i in range(3) if a[i] == max(a)]
        a[min(largest, key=lambda i: r[i])] -= 1
    left = target - sum(a)
    room = [i for i in range(3) if a[i] < limit]
    if left and len(room) == 1:
        a[room[0]] += left
    elif left and len(room) == 2:
        first, second = sorted(room, key=lambda i: -r[i])
        halves = {first: (left + 1) // 2, second: left // 2}
        for one, other in ((first, second), (second, first)):
            if a[one] + halves[one] > limit:  # what does not fit goes to the other
                halves[other] += a[one] + halves[one] - limit
                halves[one] = limit - a[one]
        for i in room:
            a[i] += halves[i]
    elif left:
        for _ in range(left):
            taker = max(range(3), key=lambda i: r[i])
            a[taker] += 1
            r[taker] = Fraction(0)
    return a


GRID = 12


@pytest.mark.parametrize("alpha", [Fraction(1), Fraction(1, 2), Fraction(1, 100)], ids=str)
@pytest.mark.parametrize("target", [8, 16])
@pytest.mark.parametrize("limit", [8, 16])
def test_every_grid_point_of_three_sources_follows_the_paper(limit, target, alpha):
    for steps in product(range(GRID + 1), repeat=3):
        expected = paper_rule_for_three([Fraction(k, GRID) for k in steps], limit, target, alpha)
        assert allocate_experts([k / GRID for k in steps], limit, target, float(alpha)) == expected, steps


def test_worked_examples():
    assert allocate_experts([0.5, 0.5, 0.5], 8, 8) == [3, 3, 2]
    assert allocate_experts([0.9, 0.3, 0.3], 8, 16) == [8, 4, 4]  # 9.6 is cut to 8; one of the two left each
    assert allocate_experts([1.0, 0.0, 0.0], 8, 16) == [8, 4, 4]
    assert allocate_experts([0.0, 0.0, 0.0], 8, 16) == [6, 5, 5]
    assert allocate_experts([0.9, 0.05, 0.05], 8, 8) == [6, 1, 1]  # 7.2, 0.4, 0.4: two raised, one too many
    assert allocate_experts([1, 1], [2, 8], 10) == [2, 8]


@pytest.mark.parametrize("reading", ["paper", "released"])
@pytest.mark.parametrize("alpha", [0.0, 0.005, 0.0099])
def test_alpha_zero_shares_evenly_and_entropy_breaks_ties(alpha, reading):
    for entropies in ([0.2, 0.5, 0.4], [0.9, 0.1, 0.8], [0.3, 0.31, 0.1]):
        low, high = entropies.index(min(entropies)), entropies.index(max(entropies))
        assert allocate_experts(entropies, 8, 8, alpha, reading) == [2 if i == low else 3 for i in range(3)]
        assert allocate_experts(entropies, 16, 16, alpha, reading) == [6 if i == high else 5 for i in range(3)]


def test_rounding_noise_does_not_move_a_floor():
    for target in range(2, 200):
        entropies = [0.1] * target  # target * 0.1 / sum is a hair from 1
        assert allocate_experts(entropies, 4, target) == [1] * target
    assert allocate_experts([0.1 + 0.2, 0.3, 0.3], 16, 9) == [3, 3, 3]


def test_released_reading_takes_remainders_after_the_bounds():
    # 8.5, 4.75, 2.75: the first is cut to 8, and 2 are left for the others; nothing differs.
    assert allocate_experts([8.5, 4.75, 2.75], 8, 16, reading="released") == [8, 5, 3]
    # 2.4, 2.4, 2.6, 0.6: the last is raised to 1 and then has the smallest remainder instead of the joint largest.
    shares = [2.4, 2.4, 2.6, 0.6]
    assert allocate_experts(shares, 8, 8) == [2, 2, 3, 1]
    assert allocate_experts([0.9, 2.5, 2.3, 2.3], 8, 8) == [2, 2, 2, 2]
    assert allocate_experts([0.9, 2.5, 2.3, 2.3], 8, 8, reading="released") == [1, 3, 2, 2]


def test_released_reading_may_take_from_one_that_is_not_largest():
    # 2.25, 5.25, 0.25, 0.25 become 2, 5, 1, 1: one too many, and 2.25 has the remainder of 5.25.
    shares = [2.25, 5.25, 0.25, 0.25]
    assert allocate_experts(shares, 8, 8) == [2, 4, 1, 1]
    assert allocate_experts(shares, 8, 8, reading="released") == [1, 5, 1, 1]


@st.composite
def problems(draw):
    limits = draw(st.lists(st.integers(1, 20), min_size=2, max_size=8))
    entropies = draw(st.lists(st.floats(0, 1), min_size=len(limits), max_size=len(limits)))
    return entropies, limits, draw(st.integers(len(limits), sum(limits)))


readings = st.sampled_from(["paper", "released"])
alphas = st.sampled_from([0.0, 0.3, 1.0])


@given(problems(), alphas, readings)
def test_bounds_and_sum(problem, alpha, reading):
    entropies, limits, target = problem
    given_experts = allocate_experts(entropies, limits, target, alpha, reading)
    assert sum(given_experts) == target
    assert all(1 <= a <= n for a, n in zip(given_experts, limits, strict=True))


@given(problems(), alphas, st.sampled_from([0.5, 2.0, 4.0]))
def test_scale_of_the_entropies_does_not_matter(problem, alpha, factor):
    entropies, limits, target = problem
    assume(all(h == 0 or h > 1e-3 for h in entropies))
    scaled = [h * factor for h in entropies]
    assert allocate_experts(scaled, limits, target, alpha) == allocate_experts(entropies, limits, target, alpha)


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=8, unique=True), st.data())
def test_order_of_the_sources_does_not_matter_without_ties(weights, data):
    limit = data.draw(st.integers(2, 16))
    target = data.draw(st.integers(len(weights), limit * len(weights)))
    remainders = [Fraction(target * w, sum(weights)) % 1 for w in weights]
    assume(min(abs(x - y) for i, x in enumerate(remainders) for y in remainders[:i]) > Fraction(1, 10**8))
    order = data.draw(st.permutations(range(len(weights))))
    plain = allocate_experts(weights, limit, target)
    assert allocate_experts([weights[i] for i in order], limit, target) == [plain[i] for i in order]


@given(problems(), st.integers(1, 20))
def test_more_entropy_is_never_worth_two_experts_less(problem, limit):
    entropies = problem[0]
    target = min(max(problem[2], len(entropies)), limit * len(entropies))
    given_experts = allocate_experts(entropies, limit, target)
    for h, a in zip(entropies, given_experts, strict=True):
        for other_h, other_a in zip(entropies, given_experts, strict=True):
            assert h < other_h or a >= other_a - 1


@pytest.mark.parametrize(
    "arguments",
    [
        ([0.5, 0.5, 0.5], 8, 2),
        ([0.5, 0.5, 0.5], 8, 25),
        ([0.5], 8, 4),
        ([], 8, 4),
        ([0.5, 0.5], [8], 4),
        ([0.5, 0.5], [8, 0], 4),
        ([0.5, -0.1], 8, 4),
        ([0.5, float("nan")], 8, 4),
        ([0.5, 0.5], 8, 4, 1.5),
        ([0.5, 0.5], 8, 4, -0.1),
        ([0.5, 0.5], 8, 4, 1.0, "authors"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_line(arguments):
    with pytest.raises(ValueError) as refusal:
        allocate_experts(*arguments)
    assert "\n" not in str(refusal.value)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=20))
def test_entropy(counts):
    total, n = sum(counts), len(counts)
    expected = -sum(c / total * math.log(c / total) for c in counts if c) / math.log(n) if total and n > 1 else 0.0
    value = normalized_entropy(torch.tensor(counts))
    assert value.shape == () and 0 <= value <= 1
    assert float(value) == pytest.approx(expected, abs=1e-12)


def test_entropy_of_known_usage():
    grid = torch.tensor([[5, 5, 5, 5], [7, 0, 0, 0], [0, 0, 0, 0], [3, 3, 0, 0]])
    assert normalized_entropy(grid).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.5])
    assert normalized_entropy(grid.reshape(2, 2, 4)).shape == (2, 2)
    assert normalized_entropy(torch.tensor([[9]])).tolist() == [0.0]
    for bad in ([1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="counts"):
            normalized_entropy(torch.tensor(bad))
