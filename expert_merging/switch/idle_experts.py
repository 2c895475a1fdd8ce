"""Experts without a token in a step stay as they are, also where the kernels give them gradients of zeros."""

import torch
from torch import distributed


def pass_over_idle(model, optimizer: torch.optim.Optimizer) -> None:
    """Let the steps of `optimizer` leave experts of `model` as they are that had no token in any process.

    Grouped products (in bf16 on GPUs) give these a gradient of zeros, by which AdamW would move and decay them; one by
    one, as elsewhere, they have none. Waits once a step for the device, and only where products are grouped.
    """
    layers = [module for module in model.modules() if hasattr(module, "served")]
    for layer in layers:
        layer.served = []

    def drop_idle(*_) -> None:
        if grouped := [layer for layer in layers if layer.served]:
            tokens = torch.stack([torch.stack(layer.served).sum(dim=0) for layer in grouped])
            if distributed.is_initialized():
                distributed.all_reduce(tokens)
            for layer, of_experts in zip(grouped, tokens.tolist(), strict=True):
                layer.served.clear()
                for expert, number in zip(layer.experts.children(), of_experts, strict=True):
                    for parameter in expert.parameters() if number == 0 else ():
                        parameter.grad = None

    optimizer.register_step_pre_hook(drop_idle)
