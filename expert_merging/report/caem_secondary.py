"""What else the paper says of pairs of its models, over seeds and test examples, by the interval alone."""

from expert_merging.analysis import crossed_bootstrap as bootstrap
from expert_merging.report.caem_contrasts import by_interval, compared, seeds_of
from expert_merging.report.evidence import Evidence
from expert_merging.report.tables import Table

_NOTE = (
    "Differences within seeds: mean [95% interval, bootstrap crossed over seeds and test examples], and as a share of the "
    "second's score. Overall: always by the single-task models with few experts. By the interval alone, uncorrected for their "
    "number (docs/protocol.md, Secondary). The paper's figures are of AG News, SQuAD and XSum, for which the tasks here stand "
    "in that order."
)


def secondary(e: Evidence) -> Table:
    """A row for each of the paper's further orders and measure, as far as the runs are there with each example's score."""
    table = Table("secondary", "Secondary contrasts", _NOTE)
    said = _said(e)
    pairs = [pair for pair in said if seeds_of(e, *pair)]
    for measure, of_pairs in compared(e, pairs, ("Overall", *e.tasks)).items():
        for (first, second), (found, arms) in zip(pairs, of_pairs, strict=True):
            difference, verdict = by_interval(found, 4 if measure == "Overall" else 2)
            table.rows.append({
                "contrast": f"{first} - {second}", "measure": measure, "seeds": len(found.by_seed), "difference": difference,
                "share": _share(measure, found, arms), "paper": said[first, second].get(measure, ""), "verdict": verdict,
                "from": e.source(first, second),
            })  # fmt: skip
    return table


def _said(e: Evidence) -> dict[tuple[str, str], dict[str, str]]:
    """{(first, second): {measure: what the paper says}}."""
    n, m = e.n, e.m
    topic, _, summary = e.tasks if len(e.tasks) == 3 else ("", "", "")
    between = dict(zip(e.tasks, ("above", "below", "above"), strict=False))
    return {
        (f"CAEM-{n}", f"Baseline-{n}"): {"Overall": "above", topic: "-0.16%", summary: "+6.47%"},
        (f"CAEM-{n}-Avg", f"CAEM-{n}"): {"Overall": "below", summary: "-1.9%"},
        (f"CAEM-{m}", f"Baseline-{m}"): {"Overall": "above"},
        (f"CAEM-{n}-to-{m}", f"Baseline-{m}"): {"Overall": "above"},
        (f"CAEM-{m}-Avg", f"CAEM-{m}"): {"Overall": "below"},
        (f"CAEM-{n}", f"CAEM-{n}-to-{m}"): {"Overall": "above", **between},
        (f"CAEM-{n}-to-{m}", f"CAEM-{m}"): {"Overall": "above", **between},
    }  # fmt: skip


def _share(measure: str, found: bootstrap.Contrast, arms: list[bootstrap.Means]) -> str:
    """The difference over the second's score."""
    if measure == "Overall":
        return ""
    of_second = float(arms[1].found[measure].mean())
    return f"{found.mean / of_second:+.1%}" if of_second else ""
