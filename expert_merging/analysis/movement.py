"""How far fine-tuning moves each kind of module: distance and cosine between two models' weights, by layer.

E-WEMoE (arXiv 2410.21804, section 3) finds its critical modules so: feed-forward parts end farther from the pre-trained model
than attention does. That is the distance as it is; a feed-forward part also has twice the parameters, so the distance a
parameter stands beside it. Sums are in float64: in float32 cosines come out above 1.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from expert_merging.core.errors import UserError

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
_FEED_FORWARD = re.compile(r"mlp|ffn|fc\d|intermediate|output\.dense|densereludense")
_EMBEDDING = re.compile(r"embed|shared|wte|wpe")


@dataclass(frozen=True)
class Part:
    """Modules of one kind in one layer; `stack` is what the layer belongs to ("" where a model has but one), `layer` None for
    what is in none."""

    stack: str
    layer: int | None
    kind: str


@dataclass
class Moved:
    """Sums over the weights of a part, a before and b after: of (b - a)², a², b² and ab."""

    parameters: int = 0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        a, b = before.double().flatten(), after.double().flatten()
        self.parameters += len(a)
        self.sums += torch.stack([(b - a).square().sum(), a.square().sum(), b.square().sum(), (a * b).sum()]).cpu()

    @property
    def distance(self) -> float:
        return self.sums[0].sqrt().item()

    @property
    def per_parameter(self) -> float:
        """Root mean square of what the parameters moved by."""
        return self.distance / self.parameters**0.5

    @property
    def cosine(self) -> float:
        """Between -1 and 1; 1 where both are zero, 0 where one is."""
        _, a, b, product = self.sums.tolist()
        if a == 0 or b == 0:
            return float(a == b)
        return max(-1.0, min(1.0, product / (a * b) ** 0.5))


def part_of(name: str) -> Part:
    """Where a tensor belongs, by its name: attention | feed-forward | norm | embeddings | other."""
    found = _LAYER.search(name)
    stack, inside = (name[: found.start()], name[found.end() :]) if found else ("", name)
    inside = inside.lower()
    module = inside.split(".")[-2] if "." in inside else inside
    if "norm" in module or module.startswith("ln"):
        kind = "norm"
    elif "att" in inside:
        kind = "attention"
    elif _FEED_FORWARD.search(inside):
        kind = "feed-forward"
    else:
        kind = "embeddings" if not found and _EMBEDDING.search(inside) else "other"
    return Part(stack, int(found[1]) if found else None, kind)


def movement(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor]
) -> tuple[dict[Part, Moved], list[str]]:
    """({part: how far it moved}, names of the tuned model that the base has not, or has in another shape, such as a head's).

    A model may be the other's without its prefix, as BertModel is BertForSequenceClassification's without "bert.".
    Raises UserError where they have nothing in common.
    """
    pairs = _aligned(base, tuned)
    found: dict[Part, Moved] = {}
    left = [name for name in tuned if name not in pairs.values()]
    for old, new in pairs.items():
        before, after = base[old], tuned[new]
        if not before.is_floating_point():
            continue
        if before.shape != after.shape:
            left.append(new)
            continue
        found.setdefault(part_of(old), Moved()).add(before, after)
    if not found:
        raise UserError(
            f"the models have no weights in common: one has {next(iter(base))}, the other {next(iter(tuned))}"
        )
    return found, left


def _aligned(base: Iterable[str], tuned: Iterable[str]) -> dict[str, str]:
    """{name in base: name in tuned} of what both have, by whichever reading of the names has most in common."""
    olds, news = _plain(base), _plain(tuned)
    readings = ((olds, news), (_without_prefix(olds), news), (olds, _without_prefix(news)))
    old, new = max(readings, key=lambda reading: len(reading[0].keys() & reading[1].keys()))
    return {old[name]: new[name] for name in old if name in new}


def _plain(names: Iterable[str]) -> dict[str, str]:
    """{name in today's spelling: name}; the first BERTs' norms have a gamma and a beta."""
    return {re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name)): name for name in names}


def _without_prefix(names: Mapping[str, str]) -> dict[str, str]:
    """The same without the first part that most have."""
    first = Counter(name.split(".")[0] for name in names).most_common(1)[0][0]
    return {name.removeprefix(f"{first}."): own for name, own in names.items()}
