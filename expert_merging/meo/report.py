"""Tables and figures of neighbours/MEO_finetune.py and neighbours/MEO_densify.py, from their records.

python -m expert_merging.meo.report results/meo                  # again, from the records there
python -m expert_merging.meo.report results/meo runs/tiny        # after publishing the records of a run there
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder
from expert_merging.meo import several_tasks
from expert_merging.meo.densify_report import densify_figure, densify_tables
from expert_merging.meo.finetuning_report import finetuning_figures, finetuning_tables
from expert_merging.meo.run_records import listed, name_of, records_in, records_of
from expert_merging.report import folders, publish
from expert_merging.report.folders import Wing
from expert_merging.report.records import Groups, every, read, refuse_unlike, write
from expert_merging.report.tables import Table
from expert_merging.run.provenance import ROOT

# In what densified models may differ that one table shows: k, gate, aligned and refitted say which of the variants is kept.
_DENSIFY_APART = ("seed", "densify", "data", "weights", "k", "gate", "aligned", "refitted")


def collect(run: Path) -> dict[str, Groups]:
    """{name of an experiment: its records} of what has been run below `run`. Raises UserError where there is nothing, or
    Switch models of different runs were made dense, whose records would pass for seeds."""
    found = {folder.name: of for folder in sorted(run.glob("meo/*_*")) if (of := records_of(folder))}
    if densified := records_in(run, "seed*/histories/densify/*.json", -4):
        refuse_unlike(densified, "RUN_DIR", but=_DENSIFY_APART)
        found["densify"] = densified
    if not found:
        raise UserError(f"{run} has no records of neighbours/MEO_finetune.py or neighbours/MEO_densify.py")
    return found


def write_finetuning(groups: Groups, folder: Path) -> str:
    """Write records, tables and figures of one family and task into `folder`; returns the tables as text."""
    write(folder, groups)
    return "\n".join(table.markdown() for table in publish.write(folder, WING))


def check_publishing(c: SimpleNamespace) -> None:
    """Raises UserError where what the constants ask for could not be published."""
    if len(set(c.tasks)) < 2:
        raise UserError(
            "publish is for several tasks together; of one: python -m expert_merging.meo.report results/meo RUN_DIR"
        )
    publish.require_commit()


def write_together(c: SimpleNamespace, tasks: dict[str, Groups]) -> str:
    """Write records, tables and figures of several tasks together, {task: its records}; returns the tables as text. With
    `c.publish` also to results/meo/{scale}."""
    groups = several_tasks.together(tasks)
    with new_folder(Path(c.MEO_DIR) / f"{c.family}_{'+'.join(tasks)}") as place:
        write(place, groups)
        shown = folders.write(place, WING, c.scale)
    if c.publish:
        publish.publish({ROOT / "results" / "meo" / c.scale: groups}, WING)
    return "\n".join(table.markdown() for table in shown)


def tables(groups: Groups) -> list[Table]:
    """All tables of an experiment: of merged Switch models, or of fine-tuning on one task or several."""
    if _is_densify(groups):
        return densify_tables(groups)
    return several_tasks.tables(groups) if several_tasks.are_several(groups) else finetuning_tables(groups)


def draw(groups: Groups, folder: Path) -> dict[str, str]:
    """Draw all figures of an experiment into `folder`; returns {name of a figure: caption}."""
    if _is_densify(groups):
        return densify_figure(listed(groups), folder)
    if several_tasks.are_several(groups):
        return several_tasks.draw(groups, folder)
    return finetuning_figures(name_of(listed(groups)), listed(groups), folder)


def _is_densify(groups: Groups) -> bool:
    return any("variants" in record for _, _, record in every(groups))


WING = Wing("MEO", read, tables, draw)

if __name__ == "__main__":
    publish.command(WING, collect, sys.argv[1:])
