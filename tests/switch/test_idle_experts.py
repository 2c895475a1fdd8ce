"""Experts without a token are moved neither one by one nor in grouped products, as on GPUs in bf16."""

import contextlib
from unittest import mock

import pytest
import torch
from stock_switch import PLAIN, ours

from expert_merging.switch.idle_experts import pass_over_idle


def moved(grouped: bool, passing_over: bool) -> set[str]:
    """The tensors of experts that a step with weight decay changes."""
    torch.manual_seed(0)
    config = ours.SwitchTransformersConfig(**PLAIN | {"d_model": 16, "num_experts": 12, "router_jitter_noise": 0.0})
    model = ours.SwitchTransformersSparseMLP(config).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.9)
    if passing_over:
        pass_over_idle(model, optimizer)
    before = {name: tensor.clone() for name, tensor in model.experts.state_dict().items()}
    with contextlib.ExitStack() as stack:
        if grouped:
            stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
            stack.enter_context(mock.patch.object(ours, "_has_grouped_products", bool))
        model(torch.randn(2, 4, 16).bfloat16())[0].square().sum().backward()
    optimizer.step()
    return {name for name, tensor in before.items() if not torch.equal(tensor, model.experts.state_dict()[name])}


def test_idle_experts_stay_as_they_are():
    one_by_one = moved(grouped=False, passing_over=False)
    assert 0 < len(one_by_one) < 12 * 2  # tensors
    assert moved(grouped=True, passing_over=True) == one_by_one == moved(grouped=False, passing_over=True)
    assert moved(grouped=True, passing_over=False) > one_by_one  # so there is something to mend


@pytest.mark.parametrize("training", [True, False])
def test_tokens_are_noted_where_gradients_are(training):
    layer = ours.SwitchTransformersSparseMLP(ours.SwitchTransformersConfig(**PLAIN | {"d_model": 16})).bfloat16()
    layer.served = []
    with mock.patch.object(torch.Tensor, "is_cuda", True), mock.patch.object(ours, "_has_grouped_products", bool):
        with contextlib.nullcontext() if training else torch.inference_mode():
            layer(torch.randn(2, 3, 16).bfloat16())
    assert [int(sizes.sum()) for sizes in layer.served] == ([6] if training else [])
