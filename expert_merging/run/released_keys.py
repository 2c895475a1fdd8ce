"""The released code's keys in records of before, which had them in place of ours."""

from typing import Any

# our name -> the released keys of the encoder's and the decoder's part
_KEYS = {
    "usage": ("expert_usage_grid", "expert_usage_grid_de"),
    "entropy": ("entropy", "entropy_de"),
    "allocation": ("record_stay_num_experts_en", "record_stay_num_experts_de"),
}


def from_released(record: dict[str, Any]) -> dict[str, Any]:
    """The record with our names; what has the released keys, as histories had, is put together to {stack: ...}."""
    together = {
        name: {stack: record[key] for stack, key in zip(("encoder", "decoder"), keys, strict=True)}
        for name, keys in _KEYS.items()
        if keys[1] in record
    }
    old = {key for name in together for key in _KEYS[name]}
    return {name: value for name, value in record.items() if name not in old} | together
