"""What the benchmarks found, a column for each machine that has figures, as one Markdown table in benchmarks/results/table.md,
and from there in docs/speed.md.

python benchmarks/table.py
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    from expert_merging.core.files import read_json, write_atomic
    from expert_merging.report.publish import filled
    from expert_merging.report.tables import Table

    note = (
        "Medians of interleaved pairs. The ratio is the gain over theirs or, where less is better, ours as a share; then ours "
        "and theirs. `!`: the target is not reached."
    )
    table, rows, machines = Table("table", "Benchmarks", note), {}, []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        found = [read_json(path) for path in sorted(folder.glob("*.json"))]
        about = found[0]["machine"]
        machines.append(f"{about['processor']}, {about['instructions']}")
        for row in (row for record in found for row in record.get("rows", []) if "ratio" in row):
            shown = rows.setdefault(row["name"], {"what": row["name"], "unit": row["unit"], "target": _target(row)})
            mark = "" if _is_reached(row) else "! "
            shown[machines[-1]] = f"{mark}**{row['ratio']:.3g}** ({row['ours']:.3g}, {row['theirs']:.3g})"
    table.rows += [{**dict.fromkeys(["what", "unit", "target", *machines], ""), **row} for row in rows.values()]
    write_atomic(RESULTS / "table.md", table.markdown())
    page = ROOT / "docs" / "speed.md"
    write_atomic(page, filled(page.read_text(encoding="utf-8"), ROOT))
    print(table.markdown())


def _target(row: dict) -> str:
    if row["target"] is None:
        return ""
    return f"{'<=' if row.get('better') == 'lower' else '>='} {row['target']:.3g}"


def _is_reached(row: dict) -> bool:
    if row["target"] is None:
        return True
    return row["ratio"] <= row["target"] if row.get("better") == "lower" else row["ratio"] >= row["target"]


if __name__ == "__main__":
    main()
