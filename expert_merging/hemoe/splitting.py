"""The steps scores and partition: how much each neuron matters to each domain, and which neurons make an expert."""

import time
from types import SimpleNamespace

from expert_merging.core.errors import UserError
from expert_merging.hemoe import pipeline
from expert_merging.hemoe.dense_model import load_dense
from expert_merging.hemoe.examples import Examples
from expert_merging.hemoe.pipeline import seed_folder


def scores(c: SimpleNamespace) -> None:
    """Importance of every FFN neuron to every domain: one backward pass a batch."""
    from expert_merging.hemoe.importance import score

    folder, wanted = seed_folder(c), pipeline.identity(c, "scores")
    if pipeline.is_done(folder / "scores.json", wanted):
        return
    from expert_merging.run.devices import make_accelerator

    started = time.perf_counter()
    model, tokenizer = load_dense(c)
    found = score(
        model.to(make_accelerator(c).device), Examples(c, tokenizer).batches("scored"), accumulate=c.score_sums
    )
    found.save(folder / "scores.npz")
    correlation = _correlations(found.values)
    record = {
        "domains": found.domains, "sequences": found.sequences, "correlation": correlation,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    pipeline.save(c, folder / "scores.json", wanted, record)


def _correlations(values) -> list[float]:
    """Of each layer the mean correlation between two domains' log scores: how little there is to tell them apart by."""
    import numpy as np

    result = []
    for layer in np.log1p(values):
        matrix = np.corrcoef(layer.T)
        result.append(float(matrix[~np.eye(len(matrix), dtype=bool)].mean()))
    return result


def partition(c: SimpleNamespace) -> None:
    """Split the neurons of every layer in `moe_layers` by each method."""
    from expert_merging.hemoe.importance import Scores
    from expert_merging.hemoe.partition import Settings
    from expert_merging.hemoe.partition import partition as split_by

    found, gates = None, None
    order = sorted(c.methods, key=lambda method: method == "random_heterogeneous")  # it copies HEMoE's sizes
    for method in order:
        folder, wanted = seed_folder(c) / method, pipeline.identity(c, "split", method=method)
        if pipeline.is_done(folder / "split.json", wanted):
            continue
        if found is None or gates is None:
            found = Scores.load(seed_folder(c) / "scores.npz")
            model, _ = load_dense(c)
            layers = list(c.moe_layers)
            gates = [model.model.layers[layer].mlp.gate_proj.weight.detach().float().numpy() for layer in layers]
        started = time.perf_counter()
        name, other, _ = pipeline.METHODS[method]
        settings = {
            "experts": c.num_experts, "ratio": c.size_ratio, "experts_per_domain": c.experts_per_domain, "seed": c.seed,
            "starts": c.solver_starts, "seconds": c.solver_seconds, "solver": c.solver, "rounding": c.rounding,
            **{key: getattr(c, value) if isinstance(value, str) else value for key, value in other.items()},
        }  # fmt: skip
        if name == "parts":
            split = _imported(c, gates[0].shape[0])
        else:
            like = split_of(c, "HEMoE") if name == "random_heterogeneous" else None
            split = split_by(
                name, Settings(**settings), scores=found.values[layers], gates=gates, like=like, layers=layers,
                domains=found.domains,
            )  # fmt: skip
        split.save(folder / "split.npz")
        split.export_parts(folder / "parts")
        seconds = time.perf_counter() - started
        record = {"split": split.record(), "left_out": split.left_out().tolist(), "seconds": seconds}
        pipeline.save(c, folder / "split.json", wanted, record)
        print(f"{method}: sizes {[sorted(sizes) for sizes in split.sizes.tolist()]}")


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
    """The split that `partition` left for a method. Raises UserError where there is none."""
    from expert_merging.hemoe.split import Split

    path = seed_folder(c) / method / "split.npz"
    if not path.exists():
        raise UserError(f"{path} does not exist; run the step partition with {method} among the methods first")
    return Split.load(path)
