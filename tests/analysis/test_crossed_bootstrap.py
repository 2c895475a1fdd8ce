"""Intervals over seeds and examples cover what they say; tests agree with closed cases."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from expert_merging.analysis import crossed_bootstrap as bootstrap


def simulated(random, seeds, examples, by_seed, by_example, noise, mean=1.0):
    """The differences of two arms: [seeds, examples]."""
    return (
        mean
        + by_seed * random.standard_normal((seeds, 1))
        + by_example * random.standard_normal((1, examples))
        + noise * random.standard_normal((seeds, examples))
    )


def contrast_of(difference, number=10_000):
    return contrast(bootstrap.task_difference("t"), [{"t": difference}, {"t": np.zeros_like(difference)}], number)


def contrast(statistic, arms, number=10_000):
    means = bootstrap.resample({str(place): arm for place, arm in enumerate(arms)}, number)
    return bootstrap.contrast(statistic, list(means.values()))


@pytest.mark.parametrize(
    ("by_seed", "by_example", "noise"),
    [(1.0, 0.0, 1.0), (0.0, 8.0, 1.0), (0.3, 3.0, 3.0), (0.05, 0.5, 8.0)],
    ids=["seeds", "examples", "both", "noise"],
)
@pytest.mark.parametrize("seeds", [3, 8])
def test_interval_covers_as_often_as_it_says(seeds, by_seed, by_example, noise):
    random, runs = np.random.default_rng(5), 700
    covered = 0
    for _ in range(runs):
        low, high = bootstrap.interval(contrast_of(simulated(random, seeds, 100, by_seed, by_example, noise), 500))
        covered += low <= 1.0 <= high
    low, high = (0.93, 0.97) if seeds == 8 else (0.90, 0.985)  # three are few to see a spread by
    assert low <= covered / runs <= high


def test_example_draws_have_the_closed_variance():
    difference = np.random.default_rng(0).standard_normal((4, 200))
    found = contrast_of(difference, 20_000)
    assert np.allclose(found.by_seed, difference.mean(1))
    assert np.allclose(found.example_draws.var(0), difference.var(1) / 200, rtol=0.05)
    # both ways: variance of (seed weight x example weight) sums, for independent multinomial weights (Owen, 2007)
    rows, columns, total = difference.mean(1), difference.mean(0), difference.mean()
    parts = rows.var() / 4, columns.var() / 200, (difference - rows[:, None] - columns + total).var() / 800
    assert np.isclose(found.draws.var(), sum(parts), rtol=0.05)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mean_and_interval_are_those_of_a_mixed_model(seed):
    """A contrast over eight seeds and the same 60 examples, as a linear mixed model with crossed random effects (REML): its
    mean, and its standard error times t's quantile with the degrees of freedom between those of the parts."""
    import statsmodels.formula.api as models
    from pandas import DataFrame
    from scipy.stats import t

    seeds, examples = 8, 60
    difference = simulated(np.random.default_rng(seed), seeds, examples, by_seed=1.0, by_example=5.0, noise=4.0)
    of_seed, of_example = (place.ravel() for place in np.indices((seeds, examples)))
    table = DataFrame({"y": difference.ravel(), "seed": of_seed, "example": of_example})
    parts = {"seed": "0 + C(seed)", "example": "0 + C(example)"}
    fitted = models.mixedlm("y ~ 1", table, groups=np.ones(len(table)), re_formula="0", vc_formula=parts).fit(reml=True)
    found = contrast_of(difference)
    assert found.mean == pytest.approx(fitted.fe_params.iloc[0], rel=1e-6)
    variance = dict(zip(fitted.model.exog_vc.names, fitted.vcomp, strict=True))
    between = variance["seed"] / seeds + fitted.scale / (seeds * examples)
    within = variance["example"] / examples + fitted.scale / (seeds * examples)
    quantile = t.ppf(0.975, (between + within) ** 2 / (between**2 / (seeds - 1)))
    low, high = bootstrap.interval(found)
    assert (high - low) / 2 == pytest.approx(quantile * fitted.bse_fe.iloc[0], rel=0.05)


def test_same_draws_for_both_arms():
    scores = np.random.default_rng(0).uniform(0, 100, (3, 50))
    found = contrast(bootstrap.task_difference("t"), [{"t": scores + 2.0}, {"t": scores}], 600)
    assert np.allclose(found.draws, 2.0) and bootstrap.interval(found) == pytest.approx((2.0, 2.0))


def test_without_spread_the_interval_is_a_point():
    found = contrast_of(np.zeros((3, 20)), 100)
    assert bootstrap.interval(found) == (0.0, 0.0) and bootstrap.sign_flip_p(found.by_seed) == 1.0
    assert bootstrap.verdict(found, 1.0, margin=0.02) == bootstrap.EQUIVALENT


def test_overall_difference_is_overall_of_one_less_that_of_the_other():
    random = np.random.default_rng(1)
    first, second, single = ({task: random.uniform(20, 80, (2, 30)) for task in "ab"} for _ in range(3))
    found = contrast(bootstrap.overall_difference, [first, second, single], 50)
    for seed in range(2):
        ratios = [[arm[t][seed].mean() / single[t][seed].mean() for t in "ab"] for arm in (first, second)]
        assert found.by_seed[seed] == pytest.approx(np.mean(ratios[0]) - np.mean(ratios[1]))
    pooled = contrast(bootstrap.overall_difference_pooled, [first, second, single], 50)
    by_hand = np.mean([(first[t].mean(1) - second[t].mean(1)) / single[t].mean() for t in "ab"], axis=0)
    assert np.allclose(pooled.by_seed, by_hand)


def test_repeats_bit_for_bit():
    difference = np.random.default_rng(2).standard_normal((3, 40))
    assert np.array_equal(contrast_of(difference, 1200).draws, contrast_of(difference, 1200).draws)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=9))
def test_sign_flips_against_all_of_them(values):
    by_seed = np.array(values)
    flipped = [abs(np.mean(by_seed * signs)) for signs in itertools.product((-1, 1), repeat=len(values))]
    exact = np.mean(np.array(flipped) >= abs(by_seed.mean()) * (1 - 1e-9))
    assert bootstrap.sign_flip_p(by_seed) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("mean", [0.4, -0.4])
def test_p_is_where_the_interval_meets_0(mean):
    """Where the seeds' t test says no more; as far as the drawn means' quantiles are a normal distribution's."""
    found = contrast_of(simulated(np.random.default_rng(8), 8, 60, 0.3, 1.0, 1.0, mean), 4000)
    p = bootstrap.difference_p(found)
    assert 0.001 < p < 0.999 and p > stats.ttest_1samp(found.by_seed, 0).pvalue
    (inner_low, inner_high), (low, high) = (
        bootstrap.interval(found, 1 - 1.4 * p),
        bootstrap.interval(found, 1 - p / 1.4),
    )
    assert (inner_low > 0 or inner_high < 0) and low <= 0 <= high


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1, 2, 4, 10], ids=lambda ratio: f"seeds by {ratio:g}")
def test_p_of_three_seeds_is_below_a_small_level_no_oftener_than_it_says(ratio):
    """Experiments without a difference, the variance of the examples known; `ratio`: the standard error that seeds give the
    mean by that which examples give. By Satterthwaite's degrees of freedom alone 0.01 came up to 3.5 times too often."""
    random, runs, level = np.random.default_rng(7), 6000, 0.01
    by_seed = ratio * 3**0.5 * random.standard_normal((runs, 3)) + random.standard_normal((runs, 1))
    examples = np.array([[1.0] * 3, [-1.0] * 3])  # of variance 1, the same for all seeds
    ps = [bootstrap.difference_p(bootstrap.Contrast(own, examples[:, 0], examples)) for own in by_seed]
    assert 0.3 * level < np.mean(np.array(ps) < level) < 1.5 * level
    # Two one-sided tests where the truth is at the margin.
    ps = [bootstrap.equivalence_p(bootstrap.Contrast(own + 50, examples[:, 0], examples), 50) for own in by_seed]
    assert 0.3 * level < np.mean(np.array(ps) < level) < 1.5 * level


def test_p_of_what_has_no_spread():
    assert bootstrap.difference_p(contrast_of(np.zeros((3, 10)))) == 1
    assert bootstrap.difference_p(contrast_of(np.ones((3, 10)))) == 0


def test_least_p_of_eight_seeds():
    assert bootstrap.sign_flip_p(np.arange(1.0, 9.0)) == pytest.approx(2 / 2**8)


@pytest.mark.parametrize(
    ("ps", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([0.04, 0.01], [0.04, 0.02]),
    ],
)
def test_holm_by_hand(ps, adjusted):
    assert bootstrap.holm(ps) == pytest.approx(adjusted)


@pytest.mark.parametrize(
    ("mean", "spread", "said"),
    [(3.0, 0.1, "HELD"), (-3.0, 0.1, "NOT"), (0.0, 0.1, "EQUIVALENT"), (0.0, 9.0, "UNKNOWN"), (0.4, 0.1, "HELD")],
)
def test_verdicts(mean, spread, said):
    difference = simulated(np.random.default_rng(3), 8, 200, spread, spread, spread, mean)
    difference += mean - difference.mean()
    found = contrast_of(difference, 2000)
    p = bootstrap.sign_flip_p(found.by_seed)
    assert bootstrap.verdict(found, p, margin=0.5) == getattr(bootstrap, said)


@pytest.mark.parametrize(
    ("arms", "problem"),
    [
        ([{"t": np.zeros((2, 5))}, {"t": np.zeros((2, 6))}], "number of examples of t: {'0': 5, '1': 6}"),
        ([{"t": np.zeros((2, 5))}, {"u": np.zeros((2, 5))}], "differ in tasks"),
        ([{"t": np.zeros((1, 5))}] * 2, r"\[1\] seeds; two"),
        ([{"t": np.zeros((2, 5)), "u": np.zeros((3, 5))}] * 2, r"\[2, 3\] seeds"),
    ],
)
def test_what_cannot_be_compared(arms, problem):
    with pytest.raises(ValueError, match=problem):
        contrast(bootstrap.task_difference("t"), arms)


def test_a_difference_of_the_detectable_size_is_told_in_four_of_five_experiments():
    random, spread = np.random.default_rng(2), {"by_seed": 1.0, "by_example": 4.0, "noise": 4.0}
    sizes = [bootstrap.detectable(contrast_of(simulated(random, 8, 150, **spread), 400), family=5) for _ in range(25)]
    told = 0
    for _ in range(300):
        found = contrast_of(simulated(random, 8, 150, **spread, mean=np.median(sizes)), 400)
        p = bootstrap.holm([bootstrap.sign_flip_p(found.by_seed), 1.0, 1.0, 1.0, 1.0])[0]
        told += bootstrap.verdict(found, p, margin=0.0) == bootstrap.HELD
    assert 0.7 <= told / 300 <= 0.9


@pytest.mark.parametrize(
    ("seeds", "family", "enough"), [(5, 1, False), (6, 1, True), (7, 5, False), (8, 5, True), (14, 5, True)]
)
def test_too_few_seeds_tell_nothing(seeds, family, enough):
    found = contrast_of(simulated(np.random.default_rng(3), seeds, 50, 1.0, 1.0, 1.0), 200)
    size = bootstrap.detectable(found, family)
    assert np.isfinite(size) == enough and size > 0


def test_seeds_needed_follow_the_closed_form():
    by_seed = np.array([1.0, 3.0, 2.0, 2.0])[:, None] * np.ones((1, 40))  # no doubt from the examples
    found = contrast_of(by_seed, 200)
    z = 1.959964 + 0.841621
    assert bootstrap.seeds_needed(found) == max(6, int(np.ceil(z**2 * (2 / 3) / 2.0**2)))
    small = contrast_of(by_seed - 1.9, 200)
    assert bootstrap.seeds_needed(small) == int(np.ceil(z**2 * (2 / 3) / 0.1**2))
    assert bootstrap.seeds_needed(small, family=5) > bootstrap.seeds_needed(small)


def test_seeds_needed_where_three_could_not_tell_are_more_than_three():
    """By the t test over seeds, as `difference_p` has it: by the normal's quantiles two would do."""
    by_seed = np.array([-3.2, -3.9, -4.6])
    found = bootstrap.Contrast(by_seed, np.zeros(2), np.tile(by_seed, (2, 1)))
    assert bootstrap.difference_p(found) > 0.05 / 14
    needed = bootstrap.seeds_needed(found, 14, flips=False)
    error, freedom = (by_seed.var(ddof=1) / needed) ** 0.5, needed - 1
    assert needed > 3 and stats.t.sf(3.9 / error, freedom) * 2 < 0.05 / 14


@pytest.mark.parametrize(
    ("needed", "seeds", "said"), [(9, 8, "some 9 seeds"), (8, 8, "as many"), (None, 8, "more seeds")]
)
def test_what_would_tell_is_not_what_did_not(needed, seeds, said):
    assert bootstrap.undecided(needed, seeds).startswith(f"{bootstrap.UNKNOWN} ({said}")


def test_no_number_of_seeds_makes_up_for_few_examples():
    by_example = np.random.default_rng(4).standard_normal((1, 30)) * np.ones((6, 1))
    found = contrast_of(by_example - by_example.mean() + 0.01, 400)
    assert bootstrap.seeds_needed(found) is None
