"""The released code's keys at the border, our names inside."""

import json

from hypothesis import given
from hypothesis import strategies as st

from expert_merging.run import results
from expert_merging.run.released_keys import from_released

stacks = st.fixed_dictionaries({"encoder": st.integers(), "decoder": st.integers()})
ours = st.fixed_dictionaries(
    {}, optional={"usage": stacks, "entropy": stacks, "allocation": stacks, "seconds": st.integers()}
)


@given(ours)
def test_our_names_stay(record):
    assert from_released(record) == record


def test_the_released_keys_become_ours():
    released = {
        "expert_usage_grid": 1, "expert_usage_grid_de": 2, "entropy": 1, "entropy_de": 2,
        "record_stay_num_experts_en": 1, "record_stay_num_experts_de": 2, "seconds": 3,
    }  # fmt: skip
    of_stacks = {name: {"encoder": 1, "decoder": 2} for name in ("usage", "entropy", "allocation")}
    assert from_released(released) == of_stacks | {"seconds": 3}


def test_a_history_of_before_is_read_with_our_names(tmp_path):
    path = tmp_path / "Baseline_[8].json"
    path.write_text(json.dumps({"identity": {}, "entropy": {"squad": [0.5]}, "entropy_de": {"squad": [0.25]}}))
    for read in (results.load(path, "train it"), results.part(path, {})):
        assert read["entropy"] == {"encoder": {"squad": [0.5]}, "decoder": {"squad": [0.25]}}
        assert "entropy_de" not in read
