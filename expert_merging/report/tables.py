"""Tables: rows of named cells, written as Markdown, CSV, LaTeX and HTML. A number over seeds is a `Stat`."""

import csv
import html
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expert_merging.core.files import write_atomic

_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "<": "$<$", ">": "$>$", "±": r"$\pm$", "–": "--"}


@dataclass(frozen=True)
class Stat:
    """One number a seed; shown as mean ± standard deviation (of a sample), without the latter for one seed."""

    values: tuple[float, ...]
    decimals: int = 2

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        mean = f"{self.mean:.{self.decimals}f}"
        mean = mean.lstrip("-") if float(mean) == 0 else mean
        return mean if self.sd is None else f"{mean} ± {self.sd:.{self.decimals}f}"


def stat(values: Sequence[float | None], decimals: int = 2) -> Stat | None:
    """A Stat of those that are numbers; None when there is none."""
    numbers = tuple(value for value in values if value is not None and math.isfinite(value))
    return Stat(numbers, decimals) if numbers else None


@dataclass
class Table:
    """`rows` have the same keys; the last, "from", names the records that a row is made of."""

    name: str
    title: str
    note: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """Header and rows as text."""
        return [list(self.rows[0]), *([_text(value) for value in row.values()] for row in self.rows)]

    def markdown(self) -> str:
        """With title and note, for a page or a terminal."""
        head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in self.cells()]
        lines = [f"### {self.title}", "", self.note, "", "| " + " | ".join(head) + " |"]
        lines.append("|" + "|".join("---" if self._is_text(name) else "---:" for name in self.rows[0]) + "|")
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"

    def csv(self) -> str:
        """Unrounded: of a Stat the mean, the standard deviation and the value of each seed."""
        buffer = io.StringIO()
        rows = [_flat(row) for row in self.rows]
        names = list(dict.fromkeys(name for name in self.rows[0] for row in rows for name in _parts(row, name)))
        writer = csv.DictWriter(buffer, names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    def latex(self) -> str:
        """A booktabs table, without the column that says where it is from."""
        kept = [i for i, name in enumerate(self.rows[0]) if name != "from"]
        align = "".join("l" if self._is_text(list(self.rows[0])[i]) else "r" for i in kept)
        head, *rows = [" & ".join(_escaped(row[i]) for i in kept) + r" \\" for row in self.cells()]
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escaped(self.title + '. ' + self.note)}}}"]
        lines += [
            rf"\label{{tab:{self.name}}}",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
        ]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"

    def html(self) -> str:
        """A <table>; where a row is from shows when the pointer rests on its first cell."""
        names = [name for name in self.rows[0] if name != "from"]
        side = {name: "" if self._is_text(name) else ' class="n"' for name in names}
        lines = ["<table><thead><tr>", *(f"<th{side[name]}>{html.escape(name)}</th>" for name in names)]
        lines.append("</tr></thead><tbody>")
        for row in self.rows:
            source = f' title="{html.escape(str(row["from"]))}"' if "from" in row else ""
            cells = [
                f"<td{side[name]}{source if i == 0 else ''}>{html.escape(_text(row[name]))}</td>"
                for i, name in enumerate(names)
            ]
            lines.append("<tr>" + "".join(cells) + "</tr>")
        return "\n".join([*lines, "</tbody></table>"])

    def _is_text(self, name: str) -> bool:
        return any(isinstance(row[name], str) for row in self.rows)


def texts(table: Table) -> dict[str, str]:
    """A table in each format, {file name: content}; `{name}.md` is what results/ keeps."""
    return {f"{table.name}.md": table.markdown(), f"{table.name}.csv": table.csv(), f"{table.name}.tex": table.latex()}


def save(tables: Sequence[Table], folder: Path) -> None:
    """Write each table in each format into `folder`."""
    for table in tables:
        for name, text in texts(table).items():
            write_atomic(folder / name, text)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Stat):
            flat[name], flat[f"{name} sd"] = value.mean, value.sd
            flat[f"{name} by seed"] = " ".join(map(repr, value.values))
        else:
            flat[name] = value
    return flat


def _parts(row: dict[str, Any], name: str) -> list[str]:
    return [part for part in (name, f"{name} sd", f"{name} by seed") if part in row]


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
