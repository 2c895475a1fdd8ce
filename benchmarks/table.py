"""What the benchmarks found, as one Markdown table in benchmarks/results/table.md, and from there in docs/speed.md.

python benchmarks/table.py
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    from expert_merging.core.files import read_json, write_atomic
    from expert_merging.report.publish import filled
    from expert_merging.report.tables import Table

    note = "Medians of interleaved pairs. The ratio is the gain over theirs or, where less is better, ours as a share."
    table = Table("table", "Benchmarks", note)
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        for row in (row for row in read_json(path).get("rows", []) if "ratio" in row):
            target, lower = row["target"], row.get("better") == "lower"
            reached = (
                ""
                if target is None
                else "yes"
                if (row["ratio"] <= target if lower else row["ratio"] >= target)
                else "no"
            )
            table.rows.append({
                "what": row["name"], "ours": f"{row['ours']:.4g}", "theirs": f"{row['theirs']:.4g}", "unit": row["unit"],
                "ratio": f"{row['ratio']:.3g}", "target": "" if target is None else f"{'<=' if lower else '>='} {target:.3g}",
                "reached": reached, "from": f"benchmarks/results/{path.name}",
            })  # fmt: skip
    write_atomic(ROOT / "benchmarks" / "results" / "table.md", table.markdown())
    page = ROOT / "docs" / "speed.md"
    write_atomic(page, filled(page.read_text(encoding="utf-8"), ROOT))
    print(table.markdown())


if __name__ == "__main__":
    main()
