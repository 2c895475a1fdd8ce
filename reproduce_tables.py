"""The paper's evidence: runs what is missing of the experiment, then writes every table and figure and one report.

Reads   what the other scripts read; runs them, one after another, with this script's constants, for each seed.
Writes  what they write, and REPORT_DIR: report.html, tables (.md, .csv, .tex), figures (.png, .svg), and the records that
        they are made of, each naming its command.
Takes   at tiny some 40 minutes a seed on 2 CPU cores (`--parts comparison`: 10), and seconds when all is there.
        Interrupted, it goes on. `--check` says whether the tables under results/ still follow from their records.
"""

from expert_merging.run.constants import run

seeds = (0,)
parts = ("table2", "controls", "pairs", "audit")  # also: comparison (Baseline-8, CAEM-8), merging, or the name of a run
experts_num = 8
larger_experts_num = 16
plan_only = False  # say what would run, and stop
check = False  # recompute the tables under results/ and compare, and stop
publish = False  # copy REPORT_DIR to results/{scale} and put its tables into the README
REPORT_DIR = "{RUN_DIR}/report"


def main(c):
    import sys
    from pathlib import Path

    from expert_merging.core.errors import UserError
    from expert_merging.report import page, publish
    from expert_merging.run.constants import read_constants
    from expert_merging.run.provenance import ROOT

    if c.check:
        found = sorted(path.parent.parent for path in ROOT.glob("results/*/records/experiment.json"))
        wrong = [line for folder in found for line in publish.check(folder)]
        pages = [path for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")) if path.exists()]
        wrong += [f"{page} shows other tables than results/" for page in pages if not _is_filled(page)]
        if wrong:
            raise UserError("; ".join(wrong))
        print(f"the tables of {', '.join(str(folder.relative_to(ROOT)) for folder in found)} follow from their records")
        return

    from expert_merging.core import files
    from expert_merging.data.tasks import get_task
    from expert_merging.experiment import grid, steps
    from expert_merging.switch.models import require_patch

    for task in c.task_types:
        get_task(task)
    require_patch()
    if c.seed != 0:
        raise UserError(f"seed is {c.seed}; this script takes --seeds {c.seed}, one or several")

    # What there is to run: for each seed the runs of the chosen parts and what they need.
    shared = {seed: read_constants(globals(), [*sys.argv[1:], "--seed", str(seed)]) for seed in c.seeds}
    grids = {seed: grid.grid(constants) for seed, constants in shared.items()}
    jobs = []
    for seed, of_seed in grids.items():
        names = [name for part in c.parts for name in grid.names_of(part, c, of_seed)]
        jobs += [
            steps.Job(f"{name}, seed {seed}", name, step, shared[seed]) for name, step in of_seed.chosen(names).items()
        ]
    missing = steps.missing(jobs)
    times, guesses = Path(c.RUN_DIR) / "times.json", ROOT / "results" / c.scale / "times.json"
    print(steps.plan(jobs, missing, times, guesses))
    if c.plan_only:
        return
    files.hold(c.RUN_DIR)
    if missing:
        steps.run_missing(missing, times, Path(c.RUN_DIR) / "logs", guesses)

    # Every result that is there, whatever part it belongs to, becomes a record; tables and figures follow from those.
    folder = Path(c.REPORT_DIR)
    results = {
        seed: {
            name: step.result
            for name, step in of_seed.steps.items()
            if not name.startswith("features") and step.is_done(shared[seed])
        }
        for seed, of_seed in grids.items()
    }
    publish.collect(folder, c.scale, (c.experts_num, c.larger_experts_num), c.task_types, results)
    if times.exists():
        files.write_atomic(folder / "times.json", times.read_bytes())
    tables = page.write(folder)
    for table in tables:
        if table.name in ("scores", "claims"):
            print(table.markdown())
    print(f"report, tables and figures: {folder / 'report.html'}")
    if c.publish:
        publish.publish(folder, ROOT / "results" / c.scale)


def _is_filled(page) -> bool:
    from expert_merging.report import page, publish
    from expert_merging.run.provenance import ROOT

    text = page.read_text(encoding="utf-8")
    return publish.filled(text, ROOT) == text


if __name__ == "__main__":
    run(main, globals())
