"""The paper's claims against the numbers of the seeds that were run: held, did not hold, or cannot tell."""

from collections.abc import Sequence

from expert_merging.analysis.crossed_bootstrap import HELD, NOT, SAME, UNKNOWN

RULE = (
    "A difference is taken within each seed. It holds, or does not, when the 95% t-interval of its mean over seeds lies "
    "on one side of 0; with one seed there is none. Shown: the mean [the interval] (the difference of each seed). The "
    "interval knows nothing of the chance in the test examples, which all seeds share, nor of how many claims there are."
)


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95% t-interval of the mean; None for fewer than two."""
    import statistics

    from scipy.stats import t

    if len(differences) < 2:
        return None
    mean = statistics.fmean(differences)
    half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return mean - half, mean + half


def above(differences: Sequence[float]) -> str:
    """Whether the mean difference is above 0."""
    bounds = interval(differences)
    if bounds is None:
        return UNKNOWN
    if not any(differences):
        return SAME
    return HELD if bounds[0] > 0 else NOT if bounds[1] < 0 else UNKNOWN


def all_of(verdicts: Sequence[str]) -> str:
    """A claim of several parts holds when all do, and does not when one does not."""
    return NOT if NOT in verdicts else HELD if verdicts and set(verdicts) == {HELD} else UNKNOWN


def shown(differences: Sequence[float], decimals: int = 4) -> str:
    """Mean, interval and each seed's difference, in words."""
    if not differences:
        return "not run"
    text = f"{sum(differences) / len(differences):+.{decimals}f}"
    if bounds := interval(differences):
        text += f" [{bounds[0]:+.{decimals}f}, {bounds[1]:+.{decimals}f}]"
    return f"{text} ({', '.join(f'{one:+.{decimals}f}' for one in differences)})"
