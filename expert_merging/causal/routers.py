"""What the routers of a causal mixture choose, by hooks on an unpatched model: for usage, the balance loss, idle experts.

None of these families cuts tokens off at a capacity, so what is chosen is what is computed. Each of a token's k choices
counts: a layer's counts add up to k times the tokens.
"""

from typing import Any

import torch

from expert_merging.merging.moe_layouts import layout_of


class Routers:
    """Watches the sparse layers of a model from when it is made. Real tokens are those of the attention mask.

    In training each layer's `served`, where it is a list, gets the tokens of each expert (idle_experts.py), and `logits` the
    routers' [batch * positions, n], by layer, of the forward passes since it was last emptied. What gradient checkpointing
    computes again in the backward pass is no forward pass of the model, and leaves nothing.
    """

    def __init__(self, model: Any):
        config = model.config.to_dict()
        layout = layout_of(config)
        self.k, self.experts = config[layout.chosen], config[layout.number]
        self.layers = [one for one in model.modules() if hasattr(one, "gate") and hasattr(one, "experts")]
        self.counting = False
        self.logits: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []  # of each layer since the last reset
        self._real = torch.empty(0, dtype=torch.bool)  # [batch * positions], of the pass in hand
        self._passing = False
        self.reset()
        model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.base_model.register_forward_hook(self._end, always_call=True)
        for number, layer in enumerate(self.layers):
            layer.served = None
            layer.gate.register_forward_hook(self._hook_of(number))

    def reset(self) -> None:
        """Count anew."""
        self._counts = [torch.zeros(self.experts, dtype=torch.int64) for _ in self.layers]

    def counts(self) -> torch.Tensor:
        """Times each expert was chosen in evaluation while `counting`, since the last reset: int64 [sparse layers, n]."""
        return torch.stack([one.cpu() for one in self._counts])

    def chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """The experts of each token, [tokens, k], as the models choose them."""
        return logits.softmax(dim=-1, dtype=torch.float).topk(self.k, dim=-1).indices

    def _begin(self, _model, _inputs, given: dict[str, Any]) -> None:
        ids, mask = given["input_ids"], given.get("attention_mask")
        real = torch.ones_like(ids) if mask is None else mask[:, mask.shape[1] - ids.shape[1] :]
        self._real = real.flatten().bool()
        self._passing = True

    def _end(self, *_) -> None:
        self._passing = False

    def _hook_of(self, number: int):
        layer = self.layers[number]

        def hook(_gate, _inputs, logits: torch.Tensor) -> None:
            if not self._passing:
                return
            if torch.is_grad_enabled() and layer.training:
                self.logits.append(logits)
                if layer.served is not None:
                    layer.served.append(self._tokens_of_each(logits))
            elif self.counting and not layer.training:
                self._counts[number] = self._counts[number].to(logits.device) + self._tokens_of_each(logits)

        return hook

    def _tokens_of_each(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.bincount(self.chosen(logits.detach())[self._real].flatten(), minlength=self.experts)


def balance_loss(logits: list[torch.Tensor], mask: torch.Tensor, chosen: list[torch.Tensor]) -> torch.Tensor:
    """How unevenly experts are used, mean over sequences: n times the sum over experts and choices of the share of tokens that
    chose the expert, times its mean probability; k where all are used alike.

    Of a sequence by itself it is the load balancing loss of transformers' causal mixtures, over all sparse layers together.

    Args:
        logits: [batch * positions, n] of each layer; `chosen`: the experts, [batch * positions, k].
        mask: [batch, positions], non-zero at real tokens.
    """
    rows, experts = len(mask), logits[0].shape[-1]
    real = mask.to(torch.float).unsqueeze(-1)
    tokens = len(logits) * real.sum(dim=1)
    share, probability = torch.zeros(2, rows, experts, device=mask.device)
    for of_layer, picked in zip(logits, chosen, strict=True):
        once = torch.nn.functional.one_hot(picked, experts).sum(dim=1).view(rows, -1, experts)
        share = share + (once * real).sum(dim=1)
        probability = probability + (of_layer.float().softmax(dim=-1).view(rows, -1, experts) * real).sum(dim=1)
    return experts * (share / tokens * probability / tokens).sum() / rows
