"""T5's objective."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.switch.span_corruption import corrupt_spans

SENTINELS = np.arange(1000, 1100)


@given(st.lists(st.integers(2, 999), min_size=2, max_size=300), st.integers(0, 999))
def test_input_and_target_give_the_text_back(tokens, seed):
    tokens = np.array(tokens)
    source, target = corrupt_spans(tokens, SENTINELS, end=1, rng=np.random.default_rng(seed))
    assert source[-1] == target[-1] == 1
    hidden, current = {}, None
    for token in target[:-1]:
        if token >= 1000:
            current = hidden.setdefault(token, [])
        else:
            current.append(token)
    rebuilt = [t for token in source[:-1] for t in (hidden[token] if token >= 1000 else [token])]
    assert rebuilt == tokens.tolist()
    assert list(hidden) == SENTINELS[: len(hidden)].tolist()
    masked = sum(map(len, hidden.values()))
    assert masked == np.clip(round(0.15 * len(tokens)), 1, len(tokens) - 1)


def test_density_and_mean_span():
    source, target = corrupt_spans(np.arange(2, 162), SENTINELS, 1, np.random.default_rng(0))
    assert (target >= 1000).sum() == 8 and len(source) == 160 - 24 + 8 + 1 and len(target) == 24 + 8 + 1
