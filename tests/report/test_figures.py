"""Figures where something is missing."""

from expert_merging.report import figures


def test_curves_of_runs_whose_start_was_not_measured_are_left_out(tmp_path):
    """Of a baseline that is what tools/reference_scores.py measures, which not every part of the evidence runs."""
    groups = {"8 experts": {"Overall": {"Baseline-8": [], "CAEM-8": [[0.1, 0.8, 0.9], [0.2, 0.7, 0.8]]}}}
    figures.over_epochs(groups, {"Overall": "score"}, tmp_path / "curves.png", goal="Overall")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    figures.over_epochs({"8 experts": {"Overall": {"Baseline-8": []}}}, {"Overall": "score"}, tmp_path / "none.png")
    assert (tmp_path / "none.png").exists()
