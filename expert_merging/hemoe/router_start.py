"""Starting a router from the gates of its experts, or from the integer program's map of domains to experts, in the place of
noise."""

from collections.abc import Iterable, Mapping

import torch

from expert_merging.core.errors import UserError
from expert_merging.hemoe.modeling import HEMoEForCausalLM


def start_from_gates(model: HEMoEForCausalLM) -> None:
    """Set every router to EMoE's: an expert's score is the mean of its gate pre-activations. It can be trained from there."""
    for ffn in model.ffns:
        ffn.router.weight.data.copy_(ffn.mean_gate_rows())


def start_from_domains(
    model: HEMoEForCausalLM, batches_of: Mapping[str, Iterable[dict[str, torch.Tensor]]], ridge: float = 1e-2
) -> None:
    """Set every router to the ridge regression from the FFN's input x to y, the map's row of the domain a token is from.

    W_r = Y' X (X' X + ridge mean(diag X' X) I)^-1, over the real tokens of `batches_of` ({domain: batches}). Inputs are
    taken with all experts firing, that is, from the dense model. Raises UserError where the split has no map.
    """
    config = model.config
    if config.serves is None:
        raise UserError("router_start is domains, but this partition maps no domains to experts")
    serves = torch.tensor(config.serves, dtype=torch.float64)  # [layers, n, D]
    inputs: list[torch.Tensor] = [torch.empty(0)] * len(model.ffns)

    def keep(number: int):
        def hook(module, arguments):
            inputs[number] = arguments[0]

        return hook

    hooks = [ffn.register_forward_pre_hook(keep(number)) for number, ffn in enumerate(model.ffns)]
    k, config.k = config.k, config.num_experts
    width = model.ffns[0].gate.shape[1]
    gram = torch.zeros(len(inputs), width, width, dtype=torch.float64)
    cross = torch.zeros(len(inputs), config.num_experts, width, dtype=torch.float64)
    try:
        with torch.inference_mode():
            for domain, batches in batches_of.items():
                column = config.domains.index(domain)
                for batch in batches:
                    device = model.ffns[0].gate.device
                    mask = batch["attention_mask"].to(device)
                    model(input_ids=batch["input_ids"].to(device), attention_mask=mask)
                    for number, x in enumerate(inputs):
                        real = x[mask.bool()].double().cpu()
                        gram[number] += real.T @ real
                        cross[number] += serves[number, :, column, None] * real.sum(0)
    finally:
        config.k = k
        for hook in hooks:
            hook.remove()
    for number, ffn in enumerate(model.ffns):
        penalty = ridge * gram[number].diagonal().mean() * torch.eye(width, dtype=torch.float64)
        weight = torch.linalg.solve(gram[number] + penalty, cross[number].T).T
        ffn.router.weight.data.copy_(weight)
