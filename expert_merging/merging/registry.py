"""The merging methods, a row each: scripts, the grid of runs and the tables read what there is from here.

A method that needs nothing but weights is a module beside this one, its test and its row; its constants become constants of
the scripts, and it has its line in every table. Methods that adapt coefficients or routers have rows for their names and
settings; `wemoe` makes them. Imports no torch, so that scripts answer `--help` at once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from expert_merging.run.constants import Constant

TRAINING_EXAMPLES, VALIDATION_INPUTS = "training examples", "validation inputs"
TEST_INPUTS, TEST_ANSWERS = "test inputs", "test answers"


@dataclass(frozen=True)
class Method:
    """A row.

    `name` stands in commands, files and records, `label` in tables. `settings` are the arguments of the method, each a value
    or the `Constant` that gives it; `sees` is what the method looks at besides the models.

    `function` is "module.function" in this folder. One that wants statistics of the models has the name of that argument
    under `statistics`. What adapts has no function here: `adapts` says what, "coefficients" or "routers". `passes` is how
    often it reads the models' tensors: once, but where it looks at whole models first.
    """

    name: str
    label: str
    function: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    sees: str = ""
    statistics: str = ""
    adapts: str = ""
    passes: int = 1

    @property
    def constants(self) -> list[Constant]:
        """Those among its settings."""
        return [value for value in self.settings.values() if isinstance(value, Constant)]

    def arguments(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """Its settings, with the values that `constants` has under the names of its constants."""
        return {
            argument: constants[value.name] if isinstance(value, Constant) else value
            for argument, value in self.settings.items()
        }

    def load(self) -> Callable[..., Any]:
        """Its function, `method(base, models, **arguments)`, which gives (name, tensor); of POOLED a `pooled.Bring`,
        of CALIBRATIONS a `router_choices.Fit`."""
        module, name = self.function.split(".")
        return getattr(import_module(f"expert_merging.merging.{module}"), name)


SEED = Constant("seed", None, "")  # global_config.py's
LAM = Constant(
    "lam", 0.3,
    "weight of the task vectors in sums (task arithmetic, DARE, TIES; of WEMoE outside its feed-forward layers), and at first "
    "of what AdaMerging and WEMoE adapt",
)  # fmt: skip
TIES_LAM = Constant("ties_lam", 1.0, "weight of TIES' disjoint mean: its paper's, for want of validation data")
TIES_KEEP = Constant("ties_keep", 0.2, "share of each task vector that TIES and AdaMerging++ keep")
DARE_DROP = Constant("dare_drop", 0.5, "share of each task vector that DARE drops")
PRUNE_RATIO = Constant("prune_ratio", 0.9, "share of each task vector that E-WEMoE drops")
ISO_LAM = Constant("iso_lam", 1.0, "weight of what Iso-C adds; its authors search it on validation data")
TSV_LAM = Constant("tsv_lam", 1.0, "weight of what TSV-M adds; its authors search it on validation data")
AVERAGED = Constant(
    "averaged_matrices", ("shared", "embed_tokens", "lm_head", "relative_attention_bias", "router"),
    "parts of the names of matrices that Iso-C and TSV-M average, as they do all that is no matrix",
)  # fmt: skip

METHODS = {method.name: method for method in (
    Method("average", "average", "average.simple_average"),
    Method("task_arithmetic", "task arithmetic", "task_arithmetic.task_arithmetic", {"scale": LAM}),
    Method("ties", "TIES", "ties.ties", {"scale": TIES_LAM, "keep": TIES_KEEP, "merge": "mean"}, passes=5),
    Method("ties_sum", "TIES, sum", "ties.ties", {"scale": LAM, "keep": TIES_KEEP, "merge": "sum"}, passes=5),
    Method("dare", "DARE", "dare.dare_task_arithmetic", {"scale": LAM, "drop": DARE_DROP, "seed": SEED}),
    Method(
        "dare_ties", "DARE, TIES", "dare.dare_ties",
        {"scale": TIES_LAM, "drop": DARE_DROP, "seed": SEED, "keep": TIES_KEEP}, passes=5,
    ),
    Method("iso_c", "Iso-C", "iso_c.iso_c", {"scale": ISO_LAM, "averaged": AVERAGED}),
    Method("tsv_m", "TSV-M", "tsv_m.tsv_m", {"scale": TSV_LAM, "averaged": AVERAGED}),
    Method("fisher", "Fisher", "fisher.fisher", sees=TRAINING_EXAMPLES, statistics="information"),
    Method("regmean", "RegMean", "regmean.regmean", sees=TRAINING_EXAMPLES, statistics="grams"),
    Method(
        "adamerging_task", "AdaMerging, task-wise", settings={"layer_wise": False}, sees=TEST_INPUTS, adapts="coefficients"
    ),
    Method("adamerging_layer", "AdaMerging", settings={"layer_wise": True}, sees=TEST_INPUTS, adapts="coefficients"),
    Method(
        "adamerging_plus", "AdaMerging++", settings={"layer_wise": True, "keep": TIES_KEEP}, sees=TEST_INPUTS,
        adapts="coefficients",
    ),
    Method("wemoe", "WEMoE", sees=TEST_INPUTS, adapts="routers"),
    Method(
        "ewemoe", "E-WEMoE", settings={"share_router": True, "prune": PRUNE_RATIO}, sees=TEST_INPUTS, adapts="routers"
    ),
    Method("wemoe_batch", "WEMoE, routed by batch", settings={"routing": "batch"}, sees=TEST_INPUTS, adapts="routers"),
    Method("wemoe_oracle", "WEMoE, oracle", settings={"loss": "teacher_forced_gold"}, sees=TEST_ANSWERS, adapts="routers"),
)}  # fmt: skip

# Methods that bring the pool of all models' experts to as many as the target has; CAEM_multi_task_finetune.py's `merging`.
POOLED = {method.name: method for method in (
    Method("m_smoe", "M-SMoE", "m_smoe.m_smoe", sees=VALIDATION_INPUTS),
    Method("hc_smoe", "HC-SMoE", "hc_smoe.hc_smoe", sees=VALIDATION_INPUTS),
    Method("reap", "REAP", "reap.reap", sees=VALIDATION_INPUTS),
    Method("most_used", "most used experts", "floors.most_used", sees=VALIDATION_INPUTS),
    Method("at_random", "experts at random", "floors.at_random", {"seed": SEED}),
)}  # fmt: skip
# What can be done to any of these merges before it is tested; CAEM_multi_task_finetune.py's `calibration`.
CALIBRATIONS = {method.name: method for method in (
    Method(
        "routers", "routers calibrated", "router_calibration.calibrated", {"ridge": 1e-3}, sees=VALIDATION_INPUTS
    ),
)}  # fmt: skip
# What CAEM can share experts out by, and what tables call it; beside these, all but the least to one task.
SHARES = {
    "entropy": "by entropy (CAEM)", "inverse": "by inverse entropy", "tokens": "by tokens", "random": "at random",
}  # fmt: skip
FROM_WEIGHTS = {name: method for name, method in METHODS.items() if not method.sees}


def once() -> tuple[str, ...]:
    """The methods that merge once and for all, from weights alone or with statistics of each model."""
    return tuple(name for name, method in METHODS.items() if name in FROM_WEIGHTS or method.statistics)


def constants(methods: Iterable[Method]) -> dict[str, Constant]:
    """{name: constant} of the methods, but for those of global_config.py; what a script adds to its own."""
    return {c.name: c for method in methods for c in method.constants if c.default is not None}
