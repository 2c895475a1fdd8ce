"""What neighbours/WEMoE_text.py runs: the parts of the experiment, each a list of runs, and whether its constants can be."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from expert_merging.core.errors import UserError, at_least
from expert_merging.merging.registry import Method
from expert_merging.wemoe.classification import STATIC, check_method

PARTS = (
    "main", "defaults", "validation", "guard", "mixed", "generalization", "robustness", "number", "modules", "depth",
)  # fmt: skip
ABLATIONS = ("number", "modules", "depth")  # only of the first ablation_seeds
NOT_MERGED = ("individual", "pretrained", "multi_task")
# What is compared where comparing everything would take too long.
FEW = (
    "individual",
    "pretrained",
    "multi_task",
    "average",
    "task_arithmetic",
    "ties",
    "adamerging_layer",
    "wemoe",
    "ewemoe_90",
)


@dataclass(frozen=True)
class Run:
    """A record: `method` with the coefficient `chosen` on validation or with its own default, merging the models of `tasks`.

    `adapt_to`: whose inputs what adapts is shown, "test" or "validation"; `guard`: None is the constant's.
    """

    part: str
    method: str
    tasks: tuple[str, ...]
    chosen: bool = True
    adapt_to: str = "test"
    guard: str | None = None

    @property
    def name(self) -> str:
        """In files and records."""
        return f"{self.part}.{self.method}"


def runs_of(part: str, methods: Sequence[str], tasks: tuple[str, ...], general_tasks: int) -> list[Run]:
    """The runs of a part, its methods as far as they are among `methods` and have a say there.

    What adapts is dear: the parts validation, generalization, robustness and number have of it those of FEW.
    """
    few = [method for method in FEW if method in methods]
    adapting = [method for method in methods if adapts(method)]
    if part == "main":
        return [Run(part, method, tasks) for method in methods]
    if part == "defaults":
        return [Run(part, m, tasks, chosen=False) for m in methods if coefficient(m) or adapts(m)]
    if part == "validation":
        return [Run(part, method, tasks, adapt_to="validation") for method in few if adapts(method)]
    if part == "guard":
        return [Run(part, method, tasks, guard="rollback") for method in adapting]
    if part in ("mixed", "modules", "depth") and "wemoe" not in methods:
        return []  # they are variants of it
    if part == "mixed":
        return [Run(part, "wemoe_batch", tasks)]
    if part == "generalization":
        return [Run(part, m, tasks[:general_tasks]) for m in few if m not in ("individual", "multi_task")]
    if part == "robustness":
        return [Run(part, method, tasks) for method in few]
    if part == "number":
        merging = [m for m in few if m not in NOT_MERGED]
        return [Run(f"{part}{n}", m, tasks[:n]) for n in range(2, len(tasks)) for m in merging]
    if part == "modules":
        return [Run(part, method, tasks) for method in ("wemoe_attention", "wemoe_both")]
    return [Run(part, method, tasks) for method in ("wemoe_depth0", "wemoe_depth1")]


def adapts(method: str) -> bool:
    """Whether it learns from inputs."""
    return method not in (*NOT_MERGED, *STATIC)


def coefficient(method: str) -> str | None:
    """The constant that is the factor on what a method that merges once and for all adds to the pre-trained model, if it has
    one: `scale` in its row."""
    row: Method | None = STATIC.get(method)
    scale = row.settings.get("scale") if row is not None else None
    return getattr(scale, "name", None)


def check(c: SimpleNamespace) -> None:
    """Raises UserError for constants that cannot be, before anything is read."""
    from expert_merging.wemoe.adaptation import check_guard

    for part in c.parts:
        if part not in PARTS:
            raise UserError(f"parts: there is no {part!r}; there are {', '.join(PARTS)}")
    for method in c.methods:
        if method != "multi_task":
            check_method(method)
    if "individual" not in c.methods:
        raise UserError("methods lacks individual, by whose scores the others' are divided; add it")
    if "robustness" in c.parts and "main" not in c.parts:
        raise UserError("the part robustness tests the models of the part main; add it to parts")
    if "guard" in c.parts and "main" not in c.parts:
        raise UserError("the part guard goes by what happened in the part main; add it to parts")
    if "guard" in c.parts and c.guard == "off":
        raise UserError(
            "the part guard asks where the guard of main spoke up, and guard is off; give warn, or take it out of parts"
        )
    at_least(
        c, 1, "finetune_epochs", "finetune_batch", "adapt_steps", "adapt_batch_size", "guard_window", "statistics_examples",
        "scoring_batch", "select_texts",
    )  # fmt: skip
    at_least(c, 0, "ablation_seeds", "train_texts", "validation_texts", "test_texts", "robust_texts")
    at_least(c, 2, "general_tasks")
    if c.max_tokens < 4:
        raise UserError(f"max_tokens is {c.max_tokens}; a pair of texts with its marks needs 4 or more")
    if not c.grid or min(c.grid) <= 0 or len(set(c.grid)) < len(c.grid):
        raise UserError(f"grid is {' '.join(map(str, c.grid))}; give different coefficients above 0")
    if not 0 <= c.warmup < 1:
        raise UserError(f"warmup is {c.warmup}; it is a share of the steps, from 0 to below 1")
    if not c.finetune_lr > 0 or not c.head_c > 0:
        raise UserError("finetune_lr and head_c must be above 0")
    check_guard(c.guard, c.guard_floor)
