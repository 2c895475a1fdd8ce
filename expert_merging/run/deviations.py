"""The readings of the method: what the paper prints, what the authors' code does, and the steps from one to the other.

`paper` and `released` are the two ends; `paper+counts` is the paper's reading but for that one deviation, so that each
can be measured by itself. No other module compares the name of a reading.
"""

from expert_merging.core.errors import UserError

DEVIATIONS = {
    "counts": "usage counts every position, padding too, after the capacity cut",
    "allocation": "AdjustAlloc takes remainders after clamping",
    "projection": "the output projection is the sum of the stacks' embeddings, untied: the first logits double",
    "padding": "training batches are padded to the limits, and the router losses see the padding",
    "selection": "the best epoch is chosen on test",
}


def deviates(reading: str, what: str) -> bool:
    """Whether `reading` follows the authors' code in `what`, one of `DEVIATIONS`. Raises UserError for no reading."""
    first, *more = reading.split("+")
    if first not in ("paper", "released") or (first == "released" and more) or not set(more) <= DEVIATIONS.keys():
        raise UserError(f"reading is {reading!r}; it must be paper, released, or paper+ one of {', '.join(DEVIATIONS)}")
    return first == "released" or what in more


def of_method(reading: str, what: str) -> str:
    """The same as the model file knows it: "released" where `reading` deviates in `what`, else "paper"."""
    return "released" if deviates(reading, what) else "paper"
