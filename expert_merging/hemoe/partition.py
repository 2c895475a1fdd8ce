"""Every way to split the neurons of an FFN into experts, behind one call: `partition`."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from expert_merging.core.errors import UserError
from expert_merging.hemoe import solver
from expert_merging.hemoe.clusters import balanced_clusters
from expert_merging.hemoe.importance import processed
from expert_merging.hemoe.split import Split, experts_from_labels


@dataclass(frozen=True)
class Settings:
    """What a partition is asked for. Defaults are the authors', but for `modules` (theirs: 128)."""

    experts: int = 8  # n
    ratio: float = 4.0  # R: the largest expert may be R times as large as the smallest
    experts_per_domain: float = 2.0  # l, in units of n / D
    modules: int = 0  # pre-clustered groups of neurons that stay together; 0 places neurons one by one
    seed: int = 42
    starts: int = 8  # of the alternating solver
    seconds: float = 60.0  # a layer, for the solver
    solver: str = "alternating"  # alternating | highs | gurobi
    rounding: str = "exact"  # exact: sizes never differ by more than R | released: the authors' roundings

    def sizes(self, items: int) -> tuple[int, int]:
        """(least, most) items of an expert."""
        root = math.sqrt(self.ratio)
        if self.rounding == "released":
            average = items // self.experts
            return max(round(average / root), 1), round(average * root)
        share = items / self.experts
        low, high = math.ceil(share / root - 1e-9), math.floor(share * root + 1e-9)
        return max(1, min(low, items // self.experts)), max(high, -(-items // self.experts))

    def per_domain(self, domains: int) -> int:
        """q: how many experts may serve a domain."""
        if self.rounding == "released":
            return round(self.experts // domains * self.experts_per_domain)
        return max(1, math.floor(self.experts / domains * self.experts_per_domain + 0.5))

    def check(self) -> None:
        """Raises UserError for values that no partition can have."""
        if self.ratio < 1:
            raise UserError(f"the size ratio is {self.ratio}; it must be 1 (equal sizes) or more")
        if self.experts < 1:
            raise UserError(f"{self.experts} experts cannot be made; ask for 1 or more")
        for name, known in (("solver", solver.SOLVERS), ("rounding", ("exact", "released"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")


@dataclass(frozen=True)
class Given:
    """What a method works on: `scores` [L, N, D] raw, `among` those of all layers, `gates` L times [N, d], `like` a split.
    What METHODS says that the method needs is there; of the rest some may be None."""

    settings: Settings
    depth: int  # L
    neurons: int  # N
    scores: np.ndarray | None
    gates: Sequence[np.ndarray] | None
    like: Split | None
    among: np.ndarray | None = None


def partition(
    method: str,
    settings: Settings,
    scores: np.ndarray | None = None,
    gates: Sequence[np.ndarray] | None = None,
    like: Split | None = None,
    layers: Sequence[int] | None = None,
    domains: Sequence[str] = (),
    among: np.ndarray | None = None,
) -> Split:
    """Split every layer by `method`, one of METHODS, which says what each needs of the following.

    `scores` [L, N, D] are raw importance scores (importance.score), `gates` the L weights W_gate [N, d], `like` the split
    whose sizes are copied. `layers` are the numbers of the L layers in the model (0..L-1 unless given), `domains` the D
    names, `among` the scores of all of the model's layers, of which those are some (importance.processed).
    Deterministic, unless `settings.seconds` cuts the search short. Raises UserError for what is missing or cannot be, before
    anything long begins.
    """
    if method not in METHODS:
        raise UserError(f"no partition is called {method!r}; there are {', '.join(METHODS)}")
    settings.check()
    make, needs = METHODS[method]
    if method == "HEMoE" and settings.modules:
        needs = (*needs, "gates")
    given = {"scores": scores, "gates": gates, "like": like}
    for name in needs:
        if given[name] is None:
            raise UserError(f"the partition {method} needs {_MEANING[name]}")
    shapes = {
        "scores": None if scores is None else scores.shape[:2],
        "gates": None if gates is None else (len(gates), len(gates[0])),
        "like": None if like is None else (len(like.layers), like.neurons),
    }
    known = {shape for shape in shapes.values() if shape is not None}
    if not known:
        raise UserError(f"the partition {method} needs scores or gates, to know how many neurons there are")
    if len(known) != 1:
        raise UserError(f"the layers and neurons to split must be the same everywhere; given: {shapes}")
    depth, neurons = known.pop()
    if settings.experts > neurons:
        raise UserError(f"{settings.experts} experts cannot be made of {neurons} neurons; ask for fewer experts")
    found = make(Given(settings, depth, neurons, scores, gates, like, among))
    return Split(
        method=method, neurons=neurons, layers=tuple(range(depth) if layers is None else layers),
        domains=tuple(domains), seed=settings.seed, settings=asdict(settings), **found,
    )  # fmt: skip


# ---------------------------------------------------------------- the methods: each gives the fields of a Split it fills


def program(settings: Settings, neurons: int, domains: int) -> tuple[int, int, int, int]:
    """Of the integer program: items, the least and the most that an expert has of them, and the experts that may serve a
    domain. Raises UserError where it cannot be solved."""
    items = settings.modules or neurons
    if neurons % items:
        raise UserError(f"{neurons} neurons do not make {items} modules of equal size; choose a divisor")
    low, high, per_domain = *settings.sizes(items), settings.per_domain(domains)
    solver.check_feasible(items, domains, settings.experts, low, high, per_domain)
    return items, low, high, per_domain


def hemoe(given: Given) -> dict:
    """HEMoE: sizes and domains chosen by the integer program, over single neurons or over `modules` of equal size.

    With modules the objective and the bound are those of the modules' problem.
    """
    assert given.scores is not None
    settings, weights = given.settings, processed(given.scores, given.among)
    domains = weights.shape[2]
    items, low, high, per_domain = program(settings, given.neurons, domains)
    found: dict[str, list] = {"experts": []}
    found |= {name: [] for name in ("serves", "objective", "bound", "gap", "seconds", "status")}
    for layer in _progress(given.depth, "HEMoE"):
        member = np.arange(given.neurons)
        if settings.modules:
            assert given.gates is not None
            member = balanced_clusters(given.gates[layer], items, settings.seed)
        grouped = np.zeros((items, domains))
        np.add.at(grouped, member, weights[layer])
        problem = solver.Problem(grouped, settings.experts, low, high, per_domain)
        solution = solver.solve(
            problem, solver=settings.solver, count=settings.starts, seed=settings.seed, seconds=settings.seconds
        )
        found["experts"].append(experts_from_labels(solution.labels[member], settings.experts))
        for name in ("serves", "objective", "bound", "gap", "seconds", "status"):
            found[name].append(getattr(solution, name))
    return {**found, "serves": np.stack(found["serves"])}


def moefication(given: Given) -> dict:
    """MoEfication and EMoE: n clusters of equal size of the rows of W_gate, each of length 1. (EMoE differs in its
    router: the mean of W_gate's rows in an expert, not trained.)"""
    assert given.gates is not None
    settings = given.settings
    return {
        "experts": [
            experts_from_labels(balanced_clusters(gate, settings.experts, settings.seed), settings.experts)
            for gate, _ in zip(given.gates, _progress(given.depth, "clusters"), strict=True)
        ]
    }


def moebert(given: Given) -> dict:
    """MoEBERT: the (N / n) / 2 neurons most important to all domains together in every expert; of the others, taken in
    turn, a random (N / n) / 2 each. What does not fit is left out."""
    assert given.scores is not None
    n, size = given.settings.experts, given.neurons // given.settings.experts
    shared, experts = size // 2, []
    for number, total in enumerate(given.scores.sum(2)):
        random = np.random.default_rng([given.settings.seed, number])
        order = np.argsort(-total, kind="stable")
        common, rest = order[:shared], np.sort(order[shared:])
        own = [random.permutation(rest[expert::n])[: size - shared] for expert in range(n)]
        experts.append([np.sort(np.concatenate([common, one])) for one in own])
    return {"experts": experts}


def moebert_domains(given: Given) -> dict:
    """MoEBERT for several domains: expert c is the N / n neurons most important to domain c. Needs n = D."""
    assert given.scores is not None
    n, domains = given.settings.experts, given.scores.shape[2]
    if n != domains:
        raise UserError(f"MoEBERT_domains makes an expert a domain: {n} experts do not fit {domains} domains")
    size = given.neurons // n
    ranked = np.argsort(-given.scores, axis=1, kind="stable")[:, :size]
    experts = [[np.sort(layer[:, domain]) for domain in range(domains)] for layer in ranked]
    return {"experts": experts, "serves": np.repeat(np.eye(n, dtype=bool)[None], given.depth, 0)}


def random_homogeneous(given: Given) -> dict:
    """Random experts of equal size (to one neuron, where n does not divide N)."""
    n, extra = given.settings.experts, given.neurons % given.settings.experts
    sizes = [given.neurons // n + (expert < extra) for expert in range(n)]
    return _at_random(given, [sizes] * given.depth)


def random_heterogeneous(given: Given) -> dict:
    """Random experts of the sizes of another split, in its order."""
    assert given.like is not None
    if not given.like.is_partition() or given.like.expert_count != given.settings.experts:
        raise UserError(
            f"random_heterogeneous copies the sizes of a partition into {given.settings.experts} experts; "
            f"{given.like.method} is one into {given.like.expert_count}, or none"
        )
    return _at_random(given, given.like.sizes.tolist())


def _at_random(given: Given, sizes: Sequence[Sequence[int]]) -> dict:
    experts = []
    for number, of_layer in enumerate(sizes):
        order = np.random.default_rng([given.settings.seed, number]).permutation(given.neurons)
        experts.append([np.sort(part) for part in np.split(order, np.cumsum(of_layer)[:-1])])
    return {"experts": experts}


def _progress(depth: int, name: str) -> Iterator[int]:
    from expert_merging.core.bars import bar as progress_bar

    return progress_bar(range(depth), desc=f"partition, {name}", unit="layer", leave=False)


# name: (how, what of `partition`'s arguments it needs)
METHODS: dict[str, tuple[Callable[[Given], dict], tuple[str, ...]]] = {
    "HEMoE": (hemoe, ("scores",)),
    "MoEfication": (moefication, ("gates",)),
    "EMoE": (moefication, ("gates",)),
    "MoEBERT": (moebert, ("scores",)),
    "MoEBERT_domains": (moebert_domains, ("scores",)),
    "random": (random_homogeneous, ()),
    "random_heterogeneous": (random_heterogeneous, ("like",)),
}
_MEANING = {
    "scores": "importance scores: score the neurons first",
    "gates": "the weights W_gate of every layer",
    "like": "another split, whose sizes it copies",
}
