"""How long `--help` of every script takes, and that a mistyped constant is refused before torch is imported.

    python benchmarks/startup.py [--pairs 5]

Writes startup.json in the machine's folder of benchmarks/results.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parent.parent
TARGET = 1.5  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each script [5]")
    chosen = parser.parse_args()

    paths = [path for folder in ("*.py", "neighbours/*.py", "tools/*.py") for path in sorted(ROOT.glob(folder))]
    scripts = [str(path.relative_to(ROOT)) for path in paths if path.name != "global_config.py"]
    rows = []
    for script in scripts:
        seconds = []
        for _ in range(chosen.pairs):
            started = time.monotonic()
            subprocess.run([sys.executable, script, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
            seconds.append(round(time.monotonic() - started, 3))
        wrong = [sys.executable, "-X", "importtime", script, "--no_such_constant", "1"]
        imported = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True).stderr
        middle = statistics.median(seconds)
        row = {"name": f"{script} --help", "ratio": round(middle / TARGET, 3), "target": 1.0, "better": "lower"}
        row |= {"ours": middle, "theirs": TARGET, "unit": "s", "pairs": [[one, TARGET] for one in seconds]}
        rows.append(row | {"imports torch for a mistyped constant": " torch\n" in imported})
        print(f"{row['name']}: {middle} s, target {TARGET}; torch imported: {' torch' + chr(10) in imported}")
    machine.write("startup", {"rows": rows})


if __name__ == "__main__":
    main()
