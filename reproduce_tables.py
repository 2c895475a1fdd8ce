"""The paper's evidence: runs what is missing of the experiment, then writes every table and figure and one report.

Reads   what the other scripts read; runs them, one after another, with this script's constants, for each seed.
Writes  what they write, and REPORT_DIR: report.html, tables (.md, .csv, .tex), figures (.png, .svg), and the records that
        they are made of, each naming its command.
Takes   at tiny some 40 minutes a seed on 2 CPU cores (`--parts comparison`: 10), and seconds when all is there.
        Interrupted, it goes on. `--check` says whether all tables in results/ and in the pages still follow from the
        records, the neighbours' too; `--report` makes them again, with figures, report.html, CSV and LaTeX.
"""

from expert_merging.core.scales import by_scale
from expert_merging.run.constants import run

seeds = (0,)
_paper = ("table2", "controls", "pairs", "audit")
parts = by_scale(
    paper=_paper, night=("primary",), tiny=_paper, real=("comparison", "CAEM-8-Avg", "Average-8")
)  # table2, controls, pairs, audit, comparison, primary, response, floors, calibration, merging, or the name of a run
experts_num = 8
larger_experts_num = 16
runs_at_once = by_scale(paper=1, night=2, tiny=2)  # each with its share of the cores: two of one beat one of two
plan_only = False  # say what would run, and stop
check = False  # compare all tables in results/ and the pages with the records, and stop
report = False  # make all tables, figures and pages in results/ again from the records, and stop
publish = False  # copy REPORT_DIR to results/caem/{scale} and put its tables into the README
REPORT_DIR = "{RUN_DIR}/report"


def main(c):
    from pathlib import Path

    if c.check or c.report:
        return results_again(c.report)

    from expert_merging.core import files
    from expert_merging.data.tasks import get_task
    from expert_merging.experiment import steps
    from expert_merging.report import caem_tables, evidence, publish
    from expert_merging.run.provenance import ROOT
    from expert_merging.switch.models import require_patch

    for task in c.task_types:
        get_task(task)
    require_patch()
    if c.publish:
        publish.require_commit()

    # What there is to run: for each seed the runs of the chosen parts and what they need.
    jobs, results = jobs_and_results(c)
    missing = steps.missing(jobs)
    times, published = Path(c.RUN_DIR) / "times.json", ROOT / "results" / "caem" / c.scale
    print(steps.plan(jobs, missing, times, published / "times.json"))
    if c.plan_only:
        return
    files.hold(c.RUN_DIR)
    if missing:
        steps.run_missing(missing, times, Path(c.RUN_DIR) / "logs", published / "times.json", c.runs_at_once)

    # Every result that is there, whatever part it belongs to, becomes a record; tables and figures follow from those.
    folder, sizes = Path(c.REPORT_DIR), (c.experts_num, c.larger_experts_num)
    evidence.collect(folder, c.scale, sizes, c.task_types, results(), times, published if c.publish else None)
    for table in publish.write(folder, caem_tables.WING):
        if table.name in ("scores", "contrasts"):
            print(table.markdown())
    print(f"report, tables and figures: {folder / 'report.html'}")
    if c.publish:
        publish.publish({published: evidence.read(folder).groups()}, caem_tables.WING, beside=folder)


def jobs_and_results(c):
    """The jobs of the chosen parts for every seed; and a function: {seed: {name: file}} of the results that are there."""
    import sys

    from expert_merging.core.errors import UserError
    from expert_merging.experiment import grid, steps
    from expert_merging.run.constants import read_constants

    if c.seed != 0:
        raise UserError(f"seed is {c.seed}; this script takes --seeds {c.seed}, one or several")
    steps.check_start(c.runs_at_once, c.RUN_DIR)
    shared = {seed: read_constants(globals(), [*sys.argv[1:], "--seed", str(seed)]) for seed in c.seeds}
    grids = {seed: grid.grid(constants) for seed, constants in shared.items()}
    jobs = []
    for seed, of_seed in grids.items():
        names = [name for part in c.parts for name in grid.names_of(part, c, of_seed)]
        jobs += [
            steps.Job(f"{name}, seed {seed}", name, step, shared[seed], of_seed.results_for(name))
            for name, step in of_seed.chosen(names).items()
        ]

    def results():
        return {
            seed: {
                name: step.result
                for name, step in of_seed.steps.items()
                if not name.startswith("features") and step.is_done(shared[seed])
            }
            for seed, of_seed in grids.items()
        }

    return jobs, results


def results_again(make):
    """Check every table in results/, README and docs against the records or, with `make`, write all of them again."""
    from expert_merging.core.errors import UserError
    from expert_merging.hemoe.report import WING as hemoe
    from expert_merging.meo.report import WING as meo
    from expert_merging.report import publish
    from expert_merging.report.caem_tables import WING as caem
    from expert_merging.run.provenance import ROOT
    from expert_merging.wemoe.report import WING as wemoe

    wings = {"caem": caem, "wemoe": wemoe, "meo": meo, "hemoe": hemoe}
    if make:
        for folder in publish.remake(ROOT, wings):
            print(f"{folder.relative_to(ROOT)}: tables, figures and report.html")
    elif wrong := publish.check(ROOT, wings):
        raise UserError("; ".join(wrong))
    else:
        print(f"every table in results/{{{','.join(wings)}}}, README.md and docs/ follows from its records")


if __name__ == "__main__":
    run(main, globals())
