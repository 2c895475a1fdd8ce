"""Every table and figure of the evidence for CAEM, in the order of the report."""

from collections.abc import Callable

from expert_merging.report import caem_figures
from expert_merging.report.caem_audit import best_on_test, deviations
from expert_merging.report.caem_calibration import calibration
from expert_merging.report.caem_claims import claimed
from expert_merging.report.caem_contrasts import contrasts
from expert_merging.report.caem_intervals import intervals
from expert_merging.report.caem_pairs import similarity, soups
from expert_merging.report.caem_response import response
from expert_merging.report.caem_scores import cost, merged_only, merging, scores
from expert_merging.report.caem_secondary import secondary
from expert_merging.report.caem_usage import allocation, entropies, entropy_by_length
from expert_merging.report.evidence import Evidence, read
from expert_merging.report.folders import Wing
from expert_merging.report.tables import Table


def all_tables(e: Evidence) -> list[Table]:
    """Every table that the records allow."""
    makers: list[Callable[[Evidence], Table]] = [
        scores, intervals, contrasts, secondary, response, claimed, merging, entropies, allocation,
        soups, similarity, merged_only, calibration, deviations, best_on_test, entropy_by_length, cost,
    ]  # fmt: skip
    return [table for table in (make(e) for make in makers) if table.rows]


WING = Wing("CAEM-MoE", read, all_tables, caem_figures.draw)
