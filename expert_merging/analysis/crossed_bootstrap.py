"""Differences between models over seeds and test examples: their intervals, tests and verdicts.

Seeds and examples are crossed: every seed's model is scored on the same examples. A difference is therefore uncertain
twice, and a bootstrap that draws only one of the two is too sure of itself (Owen, "The pigeonhole bootstrap", 2007).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Scores = Mapping[str, np.ndarray]  # task: the main score of each test example, [seeds, examples]
Statistic = Callable[..., np.ndarray]  # of the mean scores by task, each [draws, seeds]: its value, [draws, seeds]
Key = TypeVar("Key")  # of a contrast in its family
_AT_ONCE = 500  # draws whose weights are in memory together
HELD, NOT, EQUIVALENT, UNKNOWN = "held", "did not hold", "equivalent within the margin", "cannot tell"
SAME = f"{UNKNOWN} (the same in every seed)"  # of a difference that is exactly 0 wherever it was taken
ONE_SEED = f"{UNKNOWN}: one seed"
METHOD = "10,000 draws, widened to t's quantiles for so few seeds"  # of `interval`, for the notes of tables


@dataclass(frozen=True)
class Contrast:
    """A difference as it was found, and as the bootstrap drew it."""

    by_seed: np.ndarray  # [seeds]
    draws: np.ndarray  # [draws]: seeds and examples drawn anew, averaged over the seeds
    example_draws: np.ndarray  # [draws, seeds]: only the examples drawn anew

    @property
    def mean(self) -> float:
        return float(self.by_seed.mean())


@dataclass(frozen=True)
class Means:
    """Mean scores of a model's seeds by task: as they are, [seeds], and with the test examples drawn anew, [draws, seeds]."""

    found: Mapping[str, np.ndarray]
    drawn: Mapping[str, np.ndarray]

    def of(self, seeds: Sequence[int]) -> "Means":
        """Of some seeds, by their places."""
        return Means(
            *({task: one[..., list(seeds)] for task, one in part.items()} for part in (self.found, self.drawn))
        )


def resample(models: Mapping[str, Scores], number: int = 10_000, seed: int = 0) -> dict[str, Means]:
    """
    Draw the test examples with replacement, `number` times, the same ones for all models and seeds.

    Args:
        models: of each model, the scores [seeds, examples] of each task.

    Raises:
        ValueError: models that differ in tasks, or in the number of a task's examples.
    """
    tasks = list(next(iter(models.values())))
    if any(list(scores) != tasks for scores in models.values()):
        named = {name: list(scores) for name, scores in models.items()}
        raise ValueError(f"the models differ in tasks: {named}")
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
    drawn: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
    for place, task in enumerate(tasks):
        sizes = {name: scores[task].shape[1] for name, scores in models.items()}
        examples = next(iter(sizes.values()))
        if set(sizes.values()) != {examples}:
            raise ValueError(f"the models differ in the number of examples of {task}: {sizes}")
        together = np.concatenate([scores[task] for scores in models.values()])
        random, parts = np.random.default_rng([seed, place]), []
        for first in range(0, number, _AT_ONCE):
            weights = random.multinomial(examples, np.full(examples, 1 / examples), size=min(_AT_ONCE, number - first))
            parts.append(weights @ together.T / examples)
        ends = np.cumsum([len(scores[task]) for scores in models.values()])[:-1]
        for name, mean, draws in zip(
            models, np.split(together.mean(1), ends), np.split(np.concatenate(parts), ends, axis=1), strict=True
        ):
            found[name][task], drawn[name][task] = mean, draws
    return {name: Means(found[name], drawn[name]) for name in models}


def contrast(statistic: Statistic, arms: Sequence[Means], seed: int = 0) -> Contrast:
    """
    Draw seeds too, with replacement, the same ones for all arms.

    Args:
        statistic: what is compared, such as `overall_difference`; it takes the mean scores of each arm.
        arms: models as one call of `resample` gave them, with the same seeds.

    Raises:
        ValueError: arms with different seeds, or fewer than two seeds, of which no spread can be seen.
    """
    sizes = {one.shape[0] for arm in arms for one in arm.found.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"the arms have {sorted(sizes)} seeds; two are the least, and the same for each")
    (seeds,) = sizes
    found = statistic(*[{task: mean[None] for task, mean in arm.found.items()} for arm in arms])[0]
    by_examples = statistic(*[arm.drawn for arm in arms])
    number = len(by_examples)
    weights = np.random.default_rng(seed).multinomial(seeds, np.full(seeds, 1 / seeds), size=number) / seeds
    return Contrast(found, (weights * by_examples).sum(1), by_examples)


def estimate(statistic: Statistic, arms: Sequence[Means]) -> tuple[float, float, float]:
    """(mean, lower and upper end of its 95% interval) as of `contrast` and `interval`; of one seed over examples alone."""
    if len(next(iter(arms[0].found.values()))) > 1:
        found = contrast(statistic, arms)
        return (found.mean, *interval(found))
    mean = statistic(*[{task: value[None] for task, value in arm.found.items()} for arm in arms])
    low, high = np.quantile(statistic(*[arm.drawn for arm in arms])[:, 0], (0.025, 0.975))
    return float(mean[0, 0]), float(low), float(high)


def overall_difference(first: Scores, second: Scores, single: Scores) -> np.ndarray:
    """Overall of the first less that of the second (paper, 4.1): the mean over tasks of score / single-task score. Where the
    latter is 0, the task counts as no difference."""
    return np.mean([_ratio(first[task] - second[task], single[task]) for task in first], axis=0)


def overall_difference_pooled(first: Scores, second: Scores, single: Scores) -> np.ndarray:
    """As `overall_difference`, divided by the single-task scores' mean over seeds, so that one weak single-task model
    does not decide."""
    pooled = {task: scores.mean(-1, keepdims=True) for task, scores in single.items()}
    return np.mean([_ratio(first[task] - second[task], pooled[task]) for task in first], axis=0)


def _ratio(difference: np.ndarray, single: np.ndarray) -> np.ndarray:
    return np.divide(difference, single, out=np.zeros_like(difference), where=single > 0)


def task_difference(task: str) -> Statistic:
    """The difference between two models' scores on one task."""
    return lambda first, second, *_: first[task] - second[task]


def interval(found: Contrast, level: float = 0.95) -> tuple[float, float]:
    """
    The percentiles of the draws, drawn apart about the mean until they are as wide as so few seeds call for.

    Percentiles of a bootstrap over n seeds are too narrow by (n - 1) / n in variance and by the normal's tails in place of
    t's (Hesterberg, "What teachers should know about the bootstrap", 2015, section 3.3), and drawing both ways counts the
    noise of single scores three times (Owen, 2007, theorem 2). So they are scaled by the root of (the variance estimated by
    parts / the variance of the draws) and by t's quantile over the normal's, with Satterthwaite's degrees of freedom
    between those of the seeds and those of the examples. The shape of the draws stays. In simulations the interval of level
    0.95 covers in 0.93 to 0.97 of cases with eight seeds, 0.91 to 0.98 with three.
    """
    from scipy.stats import norm, t

    drawn = float(found.draws.var())
    if drawn == 0:
        return found.mean, found.mean
    variance, freedom = _spread(found)
    wider = t.ppf((1 + level) / 2, freedom) / norm.ppf((1 + level) / 2) * (variance / drawn) ** 0.5
    low, high = found.mean + wider * (np.quantile(found.draws, [(1 - level) / 2, (1 + level) / 2]) - found.mean)
    return float(low), float(high)


def _spread(found: Contrast) -> tuple[float, float]:
    """Of the mean difference: its variance, and the degrees of freedom that this is known with (Satterthwaite)."""
    of_seeds, of_examples, noise = _variances(found)
    freedom = (of_seeds + of_examples) ** 2 / (of_seeds**2 / (len(found.by_seed) - 1)) if of_seeds else np.inf
    return max(of_seeds + of_examples - noise, of_seeds, of_examples), freedom


def _variances(found: Contrast) -> tuple[float, float, float]:
    """Of the mean difference: the variance between seeds, that of the examples, and the noise that both contain."""
    seeds = len(found.by_seed)
    of_seeds = float(found.by_seed.var(ddof=1)) / seeds
    of_examples = float(found.example_draws.mean(1).var())
    return of_seeds, of_examples, max(0.0, (float(found.example_draws.var(0).mean()) - of_examples) / (seeds - 1))


def side(low: float, high: float, seeds: int) -> str:
    """What the interval of a difference says by itself, for contrasts that no test of a family is made of."""
    if seeds < 2:
        return ONE_SEED
    if low == high == 0:
        return SAME
    return "above" if low > 0 else "below" if high < 0 else UNKNOWN


def difference_p(found: Contrast) -> float:
    """Two-sided p of no difference, for so few seeds that no flips of signs could tell: the larger of that by the t
    distribution behind `interval` and that of the paired t test over seeds.

    The first alone is too small where seeds differ: three that by luck are alike have a small variance and, by Satterthwaite,
    many degrees of freedom. The second alone passes over the examples, which the seeds share. The tests simulate how often the
    larger comes below a small level where there is no difference.
    """
    return min(1.0, 2 * _beyond(found, abs(found.mean)))


def equivalence_p(found: Contrast, margin: float) -> float:
    """The larger p of two one-sided tests of a difference of `margin` or more, up or down (Schuirmann, 1987), each the larger
    of two as in `difference_p`."""
    return _beyond(found, margin - abs(found.mean))


def _beyond(found: Contrast, distance: float) -> float:
    """The chance of an estimate that lies `distance` or more, in one direction, from the truth."""
    of_seeds, freedom = _variances(found)[0], len(found.by_seed) - 1
    return max(_tail(distance, *_spread(found)), _tail(distance, of_seeds, freedom))


def _tail(distance: float, variance: float, freedom: float) -> float:
    from scipy.special import stdtr

    if variance == 0:
        return 0.0 if distance > 0 else 0.5 if distance == 0 else 1.0
    return float(stdtr(freedom, -distance / variance**0.5))


def sign_flip_p(by_seed: np.ndarray) -> float:
    """Two-sided p of no difference, by all flips of the seeds' signs (of 2^n, n seeds; the least p is 2 / 2^n)."""
    from scipy.stats import permutation_test

    if len(by_seed) < 2 or not by_seed.any():
        return 1.0
    flips = permutation_test((by_seed,), np.mean, permutation_type="samples", n_resamples=20_000, rng=0)
    return float(min(1.0, flips.pvalue))


def detectable(found: Contrast, family: int = 1, alpha: float = 0.05, power: float = 0.8, number: int = 4000) -> float:
    """
    The smallest true difference that such an experiment tells with this power, were its spread as in `found`.

    By simulation of `verdict` with normal differences: sign flips at alpha / family (Holm's first step, the hardest), and
    the interval on one side of 0. Infinite where so few seeds cannot reach that p at all.
    """
    seeds, (of_seeds, of_examples, noise) = len(found.by_seed), _variances(found)
    if 2 / 2**seeds >= alpha / family:
        return float("inf")
    random = np.random.default_rng(0)
    noises = random.normal(scale=(of_seeds * seeds) ** 0.5, size=(number, seeds))
    # The examples are the same for all seeds.
    noises += random.normal(scale=max(0.0, of_examples - noise) ** 0.5, size=(number, 1))
    low, high = interval(found, 1 - alpha)
    signs = _signs(seeds, random)

    def told(difference: float) -> float:
        by_seed = noises + difference
        means = by_seed.mean(1)
        p = (np.abs(by_seed @ signs.T / seeds) >= np.abs(means)[:, None] * (1 - 1e-12)).mean(1)
        return float(((p < alpha / family) & (means > (high - low) / 2)).mean())

    below, above = 0.0, max(high - low, 1e-12)
    while told(above) < power:
        above *= 2
    for _ in range(30):
        middle = (below + above) / 2
        below, above = (below, middle) if told(middle) >= power else (middle, above)
    return above


def _signs(seeds: int, random: np.random.Generator) -> np.ndarray:
    """All flips of so many signs, [flips, seeds]; of more than 4,096 a draw."""
    if seeds > 12:
        return np.concatenate([np.ones((1, seeds)), random.choice([-1.0, 1.0], size=(4095, seeds))])
    return 1.0 - 2 * (np.arange(2**seeds)[:, None] >> np.arange(seeds) & 1)


def seeds_needed(
    found: Contrast, family: int = 1, alpha: float = 0.05, power: float = 0.8, *, distance: float | None = None,
    flips: bool = True,
) -> int | None:  # fmt: skip
    """
    About how many seeds would tell the difference that was found with this power; None where no number would, since the test
    examples alone leave more doubt.

    Args:
        distance: what is to be told in place of the difference: for equivalence the margin less its size.
        flips: whether by `sign_flip_p`, which so many seeds must be able to bring below alpha / family, with normal quantiles;
            else by `difference_p`, with t's quantiles for so many seeds.
    """
    from scipy.stats import norm, t

    of_seeds, of_examples, noise = _variances(found)
    distance = abs(found.mean) if distance is None else max(0.0, distance)
    told = (distance / (norm.ppf(1 - alpha / family / 2) + norm.ppf(power))) ** 2 - max(0.0, of_examples - noise)
    if told <= 0:
        return None
    least = int(np.floor(np.log2(2 * family / alpha))) + 1 if flips else 2
    number = max(least, int(np.ceil(of_seeds * len(found.by_seed) / told)))
    while not flips and number < 1000:  # of more seeds t's quantiles are the normal's
        error = (of_seeds * len(found.by_seed) / number + max(0.0, of_examples - noise)) ** 0.5
        if distance >= (t.ppf(1 - alpha / family / 2, number - 1) + norm.ppf(power)) * error:
            break
        number += 1
    return number


def undecided(needed: int | None, seeds: int) -> str:
    """The verdict that nothing can be told, with what would (`seeds_needed`) where there are `seeds`."""
    if needed is None:
        would = "more seeds would not, more examples might"
    else:
        would = f"some {needed} seeds would" if needed > seeds else "as many seeds would, four times out of five"
    return f"{UNKNOWN} ({would})"


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down p values, in the order given: below alpha, the family's chance of one false find is below alpha."""
    order = np.argsort(ps, kind="stable")
    steps = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1)).clip(max=1.0)
    adjusted = np.empty(len(ps))
    adjusted[order] = steps
    return adjusted.tolist()


def adjusted(ps: Mapping[Key, float]) -> dict[Key, float]:
    """`holm` of a family of p values under their names."""
    return dict(zip(ps, holm(list(ps.values())), strict=True))


def verdict(found: Contrast, p: float, margin: float, alpha: float = 0.05, alike: float | None = None) -> str:
    """
    What the test says of "the first is above the second".

    Held or not: p (adjusted for its family) below alpha and the interval on one side of 0. Equivalent: two one-sided tests
    at alpha, by their p `alike` (adjusted) or, without it, by the interval of level 1 - 2 alpha within the margin; a
    difference that is told keeps its verdict.
    """
    low, high = interval(found, 1 - alpha)
    if p < alpha and (low > 0 or high < 0):
        return HELD if low > 0 else NOT
    if alike is not None:
        return EQUIVALENT if alike < alpha else UNKNOWN
    low, high = interval(found, 1 - 2 * alpha)
    return EQUIVALENT if -margin < low and high < margin else UNKNOWN
