"""T5's pre-training objective: spans of a text are replaced by sentinels, and the target spells them out (Raffel et al.
2020, 3.1.4; noise density 0.15, mean span 3)."""

import numpy as np


def corrupt_spans(
    tokens: np.ndarray,
    sentinels: np.ndarray,
    end: int,
    rng: np.random.Generator,
    density: float = 0.15,
    mean_span: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask random spans of `tokens` (1-D, at least 2 of them).

    Args:
        sentinels: ids of <extra_id_0>, <extra_id_1>, ..., in that order.
        end: id of `</s>`, appended to both results.

    Returns:
        (input, target): the text with each span replaced by its sentinel; each sentinel followed by its span. Spans
        never touch and the text starts unmasked, so the two together give the text back.
    """
    masked = int(np.clip(round(len(tokens) * density), 1, len(tokens) - 1))
    spans = int(np.clip(round(masked / mean_span), 1, min(masked, len(tokens) - masked, len(sentinels))))
    # Alternating runs: unmasked, masked, unmasked, ..., each at least one token long.
    runs = np.empty(2 * spans, dtype=np.int64)
    runs[0::2] = _random_parts(len(tokens) - masked, spans, rng)
    runs[1::2] = _random_parts(masked, spans, rng)
    pieces = np.split(tokens, np.cumsum(runs)[:-1])
    kept, hidden = pieces[0::2], pieces[1::2]
    source = [part for i in range(spans) for part in (kept[i], sentinels[i : i + 1])]
    target = [part for i in range(spans) for part in (sentinels[i : i + 1], hidden[i])]
    return np.concatenate([*source, [end]]), np.concatenate([*target, [end]])


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` positive whole numbers that add up to `total`, every way equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
