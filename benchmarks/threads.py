"""
Training beside other jobs: steps/s of the tiny base on an idle machine and beside busy processes, as libgomp waits by
itself ("spinning") and as the library has it wait (expert_merging/core/threads.py), both with the same threads.

    python benchmarks/threads.py [--rounds 5] [--seconds 8] [--threads 2] [--busy 2] [--also NAME=VALUE[,NAME=VALUE] ...]

A step is forward, backward and AdamW on 8 examples of 60 to 120 tokens with targets of 20. Each variant is a process of
its own, asleep but for its turn; they take turns within every round, so that what else the machine does meets all alike.
The busy processes are empty loops, each in a session of its own: the scheduler shares the cores out among sessions.
`--also` times further settings of the environment. Wants a quiet machine. Writes threads.json and .md.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "base_models" / "tiny-8"
SPINNING = {"GOMP_SPINCOUNT": "300000"}  # libgomp's own default
EXAMPLES, INPUTS, TARGETS = 8, (60, 120), 20
OF_IDLE, LOST = 0.4, 0.95  # what is to be reached: beside the busy processes, and idle against spinning


def serve() -> None:
    """A variant's process: for every line with a number, train that many seconds and answer with the steps/s."""
    from expert_merging.core.host_memory import keep_freed_memory
    from expert_merging.core.threads import share_cores

    share_cores()
    keep_freed_memory()
    import torch
    from transformers import SwitchTransformersForConditionalGeneration

    from expert_merging.data.features import collate

    rng = random.Random(0)
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(BASE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        examples = [
            {
                name: [rng.randrange(2, 8000) for _ in range(count)]
                for name, count in (("input_ids", rng.randint(*INPUTS)), ("labels", TARGETS))
            }
            for _ in range(EXAMPLES)
        ]
        model(**collate(examples, 0), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(5):
        step()
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        steps, started = 0, time.monotonic()
        while time.monotonic() - started < float(line) or steps < 2:
            step()
            steps += 1
        print(steps / (time.monotonic() - started), flush=True)


class Variant:
    """A process that trains when asked to, under its own settings of the environment."""

    def __init__(self, settings: dict[str, str], threads: int):
        ours = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
        clean = {name: value for name, value in os.environ.items() if name not in ours}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], env={**clean, "OMP_NUM_THREADS": str(threads), **settings},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.threads = int(self.process.stdout.readline())

    def steps_per_second(self, seconds: float) -> float:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    parser.add_argument("--seconds", type=float, default=8, help="of training in a turn [8]")
    parser.add_argument("--threads", type=int, default=2, help="of each variant [2]")
    parser.add_argument("--busy", type=int, default=2, help="busy processes [2]")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=VALUE", help="further variants")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # of a process that main started
    chosen = parser.parse_args()
    if chosen.serve:
        serve()
        return

    settings = {"spinning": SPINNING, "ours": {}}
    settings |= {words: dict(word.split("=") for word in words.split(",")) for words in chosen.also}
    variants = {name: Variant(given, chosen.threads) for name, given in settings.items()}
    speeds = {name: {"idle": [], "beside": []} for name in variants}
    load = os.getloadavg()[0]
    for number in range(chosen.rounds):
        for where in ("idle", "beside"):
            loop = [sys.executable, "-c", "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"]
            others = [subprocess.Popen(loop, start_new_session=True) for _ in range(chosen.busy * (where == "beside"))]
            try:
                for name in list(variants) if number % 2 else reversed(variants):
                    speeds[name][where].append(round(variants[name].steps_per_second(chosen.seconds), 3))
            finally:
                for other in others:
                    other.kill()
        print(
            f"round {number + 1}: { ({name: [speed[where][-1] for where in speed] for name, speed in speeds.items()}) }"
        )
    for variant in variants.values():
        variant.process.stdin.close()
        variant.process.wait()
    write(chosen, speeds, {name: variant.threads for name, variant in variants.items()}, load)


def write(chosen: argparse.Namespace, speeds: dict, threads: dict[str, int], load: float) -> None:
    """The rows (as benchmarks/table.py reads them) and a table of all variants."""
    import machine

    from expert_merging.core.files import write_atomic

    middle = {name: {where: statistics.median(of) for where, of in speed.items()} for name, speed in speeds.items()}
    ours, spinning = middle["ours"], middle["spinning"]
    beside = f"beside {chosen.busy} busy processes"
    pairs = {"unit": "steps/s", "pairs": chosen.rounds}
    rows = [
        {
            "name": f"training steps, {beside}, against idle", "ratio": round(ours["beside"] / ours["idle"], 3),
            "target": OF_IDLE, "ours": ours["beside"], "theirs": ours["idle"], **pairs,
        },
        {
            "name": "training steps, idle, against spinning", "ratio": round(ours["idle"] / spinning["idle"], 3),
            "target": LOST, "ours": ours["idle"], "theirs": spinning["idle"], **pairs,
        },
        {
            "name": f"training steps, {beside}, against spinning", "target": None,
            "ratio": round(ours["beside"] / spinning["beside"], 3),
            "ours": ours["beside"], "theirs": spinning["beside"], **pairs,
        },
    ]  # fmt: skip
    lines = [f"| waiting | threads | idle, steps/s | {beside} | of idle |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {name} | {threads[name]} | {of['idle']:.2f} | {of['beside']:.2f} | {of['beside'] / of['idle']:.2f} |"
        for name, of in middle.items()
    ]
    path = machine.write("threads", {"threads": threads, "load_before": load, "speeds": speeds, "rows": rows})
    write_atomic(path.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
