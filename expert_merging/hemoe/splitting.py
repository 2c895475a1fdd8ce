"""The steps scores and partition: how much each neuron matters to each domain, and which neurons make an expert."""

import functools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.hemoe import pipeline
from expert_merging.hemoe.dense_model import load_dense
from expert_merging.hemoe.examples import Examples
from expert_merging.hemoe.pipeline import seed_folder


def scores(c: SimpleNamespace) -> None:
    """Importance of every FFN neuron to every domain: one backward pass a batch."""
    for which, constants in pipeline.by_domains(c).items():
        _scores(constants, which)


def _scores(c: SimpleNamespace, domains: str) -> None:
    folder, wanted, end = seed_folder(c), pipeline.identity(c, "scores"), pipeline.ending(domains)
    if pipeline.is_done(folder / f"scores{end}.json", wanted):
        return
    from expert_merging.hemoe.importance import score
    from expert_merging.run.devices import make_accelerator

    started = time.perf_counter()
    model, tokenizer = load_dense(c)
    found = score(
        model.to(make_accelerator(c).device), Examples(c, tokenizer, domains).batches("scored"), accumulate=c.score_sums
    )
    found.save(folder / f"scores{end}.npz")
    correlation = _correlations(found.values)
    record = {
        "domains": found.domains, "sequences": found.sequences, "correlation": correlation,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    pipeline.save(c, folder / f"scores{end}.json", wanted, record)


def _correlations(values) -> list[float]:
    """Of each layer the mean correlation between two domains' log scores: how little there is to tell them apart by."""
    import numpy as np

    result = []
    for layer in np.log1p(values):
        matrix = np.corrcoef(layer.T)
        result.append(float(matrix[~np.eye(len(matrix), dtype=bool)].mean()))
    return result


def check(c: SimpleNamespace, neurons: int | None) -> None:
    """Raises UserError for a partition that cannot be, as far as constants and the `neurons` of an FFN, if known, tell it."""
    from expert_merging.hemoe.partition import program

    if "MoEBERT_domains" in c.methods and c.num_experts != c.num_domains:
        raise UserError(
            f"MoEBERT_domains makes an expert a domain: num_experts is {c.num_experts} and num_domains {c.num_domains}; "
            "make them equal or leave that method out"
        )
    if "parts" in c.methods and not any(Path(c.PARTS_PATH or "/nowhere").expanduser().glob("*.part.*")):
        raise UserError(
            f"PARTS_PATH: {c.PARTS_PATH!r} holds no LAYER.part.EXPERTS file, of which the method parts is made"
        )
    if "random_heterogeneous" in c.methods and "HEMoE" not in c.methods and not _there(c, "HEMoE"):
        raise UserError("random_heterogeneous takes HEMoE's sizes; name HEMoE among the methods too")
    for method in c.methods:
        made_as, settings = pipeline.METHODS[method], _settings(c, method)
        settings.check()
        if made_as.partition == "HEMoE" and not made_as.domains and neurons:
            program(settings, neurons, c.num_domains)


def _settings(c: SimpleNamespace, method: str):
    from expert_merging.hemoe.partition import Settings

    own = pipeline.METHODS[method].settings
    return Settings(**{
        "experts": c.num_experts, "ratio": c.size_ratio, "experts_per_domain": c.experts_per_domain, "seed": c.seed,
        "starts": c.solver_starts, "seconds": c.solver_seconds, "solver": c.solver, "rounding": c.rounding,
        **{key: getattr(c, value) if isinstance(value, str) else value for key, value in own.items()},
    })  # fmt: skip


def partition(c: SimpleNamespace) -> None:
    """Split the neurons of every layer in `moe_layers` by each method; only those by importance need the step scores."""
    from expert_merging.hemoe.importance import Scores
    from expert_merging.hemoe.partition import METHODS
    from expert_merging.hemoe.partition import partition as split_by

    @functools.cache
    def scores_of(domains: str) -> Scores:
        place, constants = seed_folder(c) / f"scores{pipeline.ending(domains)}", pipeline.by_domains(c)[domains]
        pipeline.load(place.with_suffix(".json"), "scores", pipeline.identity(constants, "scores"))
        return Scores.load(place.with_suffix(".npz"))

    gates = None
    # random_heterogeneous copies HEMoE's sizes, and all are compared with HEMoE.
    order = sorted(c.methods, key=lambda method: (method != "HEMoE", method == "random_heterogeneous"))
    for method in order:
        folder, wanted = seed_folder(c) / method, pipeline.identity(c, "split", method=method)
        if pipeline.is_done(folder / "split.json", wanted):
            continue
        made_as = pipeline.METHODS[method]
        name = made_as.partition
        hemoe = split_of(c, "HEMoE") if method != "HEMoE" and _there(c, "HEMoE") else None
        found = None
        if name in METHODS and "scores" in METHODS[name][1]:
            found = scores_of(made_as.domains)
        if gates is None:
            model, _ = load_dense(c)
            layers = list(c.moe_layers)
            gates = [model.model.layers[layer].mlp.gate_proj.weight.detach().float().numpy() for layer in layers]
        started = time.perf_counter()
        if name == "parts":
            split = _imported(c, gates[0].shape[0])
        else:
            like = hemoe if name == "random_heterogeneous" else None
            scored: dict[str, Any] = {} if found is None else {
                "scores": found.values[layers], "domains": found.domains, "among": found.values,
            }  # fmt: skip
            split = split_by(name, _settings(c, method), gates=gates, like=like, layers=layers, **scored)
        split.save(folder / "split.npz")
        split.export_parts(folder / "parts")
        seconds = time.perf_counter() - started
        record = {"split": split.record(), "left_out": split.left_out().tolist(), "seconds": seconds}
        record["agreement"] = None if hemoe is None else _agreement(split, hemoe)
        pipeline.save(c, folder / "split.json", wanted, record)
        print(f"{method}: sizes {[sorted(sizes) for sizes in split.sizes.tolist()]}")


def _agreement(one, other) -> float | None:
    """How alike two partitions are: the adjusted Rand index (1 the same, 0 as by chance), mean over layers; None where
    one of them has a neuron twice or not at all."""
    import numpy as np
    from sklearn.metrics import adjusted_rand_score

    if any(split.left_out().any() or split.repeated().any() for split in (one, other)):
        return None

    def labels(experts) -> np.ndarray:
        return np.repeat(np.arange(len(experts)), [len(of) for of in experts])[np.argsort(np.concatenate(experts))]

    found = [adjusted_rand_score(*map(labels, pair)) for pair in zip(one.experts, other.experts, strict=True)]
    return float(np.mean(found))


def _there(c: SimpleNamespace, method: str) -> bool:
    return (seed_folder(c) / method / "split.npz").exists()


def _imported(c: SimpleNamespace, neurons: int):
    """The split that PARTS_PATH holds."""
    from expert_merging.hemoe.split import Split

    split = Split.import_parts(c.PARTS_PATH, "parts", c.moe_layers)
    if (split.neurons, split.expert_count) != (neurons, c.num_experts):
        raise UserError(
            f"PARTS_PATH: {c.PARTS_PATH} splits {split.neurons} neurons into {split.expert_count} experts; base_model has "
            f"{neurons} and num_experts is {c.num_experts}"
        )
    return split


def split_of(c: SimpleNamespace, method: str):
    """The split that `partition` left for a method. Raises UserError where there is none, or it was made otherwise."""
    from expert_merging.hemoe.split import Split

    path = seed_folder(c) / method / "split.npz"
    if not path.exists():
        raise UserError(f"{path} does not exist; run the step partition with {method} among the methods first")
    pipeline.load(path.with_suffix(".json"), "partition", pipeline.identity(c, "split", method=method))
    return Split.load(path)
