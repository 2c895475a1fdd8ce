"""The paper's claims with a verdict each, from the records of the seeds that were run."""

from collections.abc import Callable
from statistics import fmean

from expert_merging.report import claims
from expert_merging.report.caem_contrasts import seeds_of
from expert_merging.report.caem_usage import task_distance
from expert_merging.report.evidence import Evidence, entropy, kept_share
from expert_merging.report.tables import Stat, Table


def claimed(e: Evidence) -> Table:
    """The paper's claims with a verdict each; differences of Overall as far as no record has each example's score."""
    n, m = e.n, e.m
    table = Table("claims", "The paper's claims at this scale", claims.RULE)

    def add(claim: str, verdict: str, numbers: str, *names: str) -> None:
        table.rows.append({"claim": claim, "verdict": verdict, "numbers": numbers, "from": e.source(*names)})

    def overall_above(better: str, worse: str, claim: str) -> None:
        if seeds_of(e, better, worse):
            return  # it stands in contrasts or secondary, and better judged
        differences = [a["overall"]["test"] - b["overall"]["test"] for a, b in e.get(better, worse)]
        if differences:
            add(claim, claims.above(differences), f"{better} - {worse}: {claims.shown(differences)}", better, worse)

    overall_above(f"CAEM-{n}", f"Baseline-{n}", "CAEM above Baseline on Overall")
    overall_above(f"CAEM-{n}-to-{m}", f"Baseline-{m}", "CAEM above Baseline on Overall")
    overall_above(f"CAEM-{m}", f"Baseline-{m}", "CAEM above Baseline on Overall")
    overall_above(f"CAEM-{n}", f"CAEM-{n}-Avg", "CAEM above CAEM-Avg")
    overall_above(f"CAEM-{m}", f"CAEM-{m}-Avg", "CAEM above CAEM-Avg")
    overall_above(f"CAEM-{n}", f"CAEM-{n}-to-{m}", f"{n} above {n}-to-{m}")
    overall_above(f"CAEM-{n}-to-{m}", f"CAEM-{m}", f"{n}-to-{m} above {m}")
    for experts in (n, m):
        names = [f"single-task-{experts} {task}" for task in e.tasks]
        found = e.get(*names)
        for stack in e.stacks if found else ():
            rises, verdicts = [], []
            for i in range(len(names) - 1):
                low, high = e.tasks[i], e.tasks[i + 1]
                rise = [entropy(one[i + 1], stack, high) - entropy(one[i], stack, low) for one in found]
                rises.append(f"{high} - {low}: {claims.shown(rise)}")
                verdicts.append(claims.above(rise))
            claim = f"entropy {' < '.join(e.tasks)}: {stack}, {experts} experts"
            add(claim, claims.all_of(verdicts), "; ".join(rises), *names)
    pairs = [pair for pair in e.pairs() if any("soup" in one for (one,) in e.get(pair))]
    across = [pair for pair in pairs if pair.startswith(f"CAEM-{n}-to-{m} ")]
    within = [pair for pair in pairs if pair not in across]
    for group, claim, judge in (
        (
            within,
            "soups within a capacity survive (half or more of their parents' Overall is kept)",
            lambda kept: kept >= 0.5,
        ),
        (across, f"soups with {n}-to-{m} collapse (less than a tenth is kept)", lambda kept: kept < 0.1),
    ):
        shares = {pair: [kept_share(*one) for one in e.get(pair, *pair.split(" + "))] for pair in group}
        kept = {pair: [share for share in of_pair if share is not None] for pair, of_pair in shares.items()}
        if any(kept.values()):
            answers = [judge(value) for values in kept.values() for value in values]
            verdict = claims.HELD if all(answers) else claims.NOT if not any(answers) else claims.UNKNOWN
            numbers = "; ".join(f"{pair}: {Stat(tuple(v), 3)}" for pair, v in kept.items() if v)
            add(claim, verdict, f"kept of the parents' Overall: {numbers}", *kept)
    pair = f"CAEM-{n}-to-{m} + CAEM-{n}"
    similar = [one["cka"] for (one,) in e.get(pair) if "cka" in one]
    if similar and "encoder" in e.stacks:
        lowest = [min(v for task in e.tasks for v in one["after"][task]["encoder"]) for one in similar]
        verdict = claims.HELD if min(lowest) > 0.999 else claims.NOT if max(lowest) <= 0.999 else claims.UNKNOWN
        numbers = f"lowest over tasks and layers after fine-tuning: {Stat(tuple(lowest), 4)}"
        add(f"the encoder of {n}-to-{m} equals that of CAEM-{n} (CKA > 0.999 in every layer)", verdict, numbers, pair)
    _of_similarity(e, add)
    _of_usage(e, add)
    overall_above(
        f"CAEM-{n}", f"Baseline-{n}-same-compute", "not in the paper: CAEM above Baseline at the same compute"
    )
    overall_above(f"CAEM-{n}", f"Average-{n}", "not in the paper: CAEM above the plain average")
    return table


def _of_similarity(e: Evidence, add: Callable[..., None]) -> None:
    """What the paper reads off figures 2 and 4."""
    n, m = e.n, e.m

    def similarity(record, stack: str, when: str = "after", tasks: tuple[str, ...] = e.tasks) -> float:
        return fmean(value for task in tasks for value in record["cka"][when][task][stack])

    pairs = {name: [one for (one,) in e.get(name) if "cka" in one] for name in e.pairs()}
    for name, found in pairs.items():
        if found and f"CAEM-{n}-to-{m}" not in name and "encoder" in e.stacks:
            rises = [similarity(one, "encoder") - similarity(one, "encoder", "before") for one in found]
            claim = f"fine-tuning makes the encoders of {name.replace(' + ', ' and ')} more alike (CKA)"
            add(claim, claims.above(rises), f"after - before: {claims.shown(rises)}", name)
    name = f"CAEM-{m} + Baseline-{m}"
    if found := pairs.get(name, []):
        first, *others = e.tasks
        apart = [
            similarity(one, "decoder", tasks=tuple(others)) - similarity(one, "decoder", tasks=(first,))
            for one in found
        ]
        claim = f"the decoders of CAEM-{m} and Baseline-{m} part most on {first} (CKA)"
        add(claim, claims.above(apart), f"other tasks - {first}: {claims.shown(apart)}", name)
    near, far = f"CAEM-{n}-to-{m} + Baseline-{m}", f"CAEM-{n}-to-{m} + CAEM-{m}"
    both = [pair for pair in e.get(near, far) if all("cka" in one for one in pair)]
    for stack in e.stacks if both else ():
        nearer = [similarity(a, stack) - similarity(b, stack) for a, b in both]
        claim = f"CAEM-{n}-to-{m} is nearer to Baseline-{m} than to CAEM-{m} (CKA): {stack}"
        add(claim, claims.above(nearer), f"CKA with one - with the other: {claims.shown(nearer)}", near, far)


def _of_usage(e: Evidence, add: Callable[..., None]) -> None:
    """What the paper reads off table 3, and that the experts of a joint model serve all tasks alike."""
    from scipy.stats import spearmanr

    runs = e.multi_task()
    for stack in e.stacks:
        trends = []
        for of_seed in e.records.values():
            of_runs = [of_seed[name] for name in runs if name in of_seed]
            entropies = [fmean(entropy(one, stack, task) for task in e.tasks) for one in of_runs]
            if len(set(entropies)) > 3:
                trends.append(float(spearmanr(entropies, [one["overall"]["test"] for one in of_runs]).statistic))
        if trends:
            numbers = f"rank correlation over the configurations: {claims.shown(trends, 2)}"
            add(
                f"Overall rises with the entropy of expert use (table 3): {stack}", claims.above(trends), numbers, *runs
            )
    joint, singles = f"CAEM-{e.n}", [f"single-task-{e.n} {task}" for task in e.tasks]
    found = e.get(joint, *singles)
    for stack in e.stacks if found else ():
        closer = [
            task_distance([single["usage"][stack] for single in apart]) - task_distance([one["usage"][stack]])
            for one, *apart in found
        ]
        claim = f"tasks use the experts of {joint} more alike than those of their own models: {stack}"
        numbers = f"Jensen-Shannon distance between tasks, own models - {joint}: {claims.shown(closer, 3)}"
        add(claim, claims.above(closer), numbers, joint, *singles)
