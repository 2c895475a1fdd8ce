"""What a pass costs, without a clock: operations, and what training keeps for its backward pass."""

import math
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _product(states, weight, *_, **__) -> int:
    """Of shapes [..., m] and [n, m]."""
    return 2 * math.prod(states) * weight[0]


def _attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


# What torch's counter passes over: the products of caem_files/cpu_kernels.py, and attention on a CPU.
_UNCOUNTED = {
    torch.ops.mkldnn._linear_pointwise: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


@torch.no_grad()
def flops(model, batch: dict[str, Any]) -> int:
    """Of a forward pass in evaluation, 2 a multiplication and addition, by torch.utils.flop_counter and `_UNCOUNTED`."""
    model.eval()
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        model(**batch)
    return counter.get_total_flops()


def kept_bytes(model, batch: dict[str, Any]) -> int:
    """What a training pass keeps for its backward pass, weights aside."""
    with _kept_for_backward(model) as kept:
        model.train()(**batch)
    return sum(kept.values())


@contextmanager
def _kept_for_backward(model):
    """{address: bytes} of the storages that autograd keeps inside the block, but for the model's own."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []  # an address must not be given out again meanwhile

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # the tensor itself would hold the graph that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept
    alive.clear()
