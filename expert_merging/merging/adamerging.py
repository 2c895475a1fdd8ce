"""AdaMerging (Yang et al. 2024, section 3): task arithmetic whose coefficients are learnt from unlabelled test inputs."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call

from expert_merging.merging.named import Tensors, rebuilt, task_vectors, tied_names, wide
from expert_merging.merging.ties import elected_task_vectors


class AdaMerged(nn.Module):
    """A model whose weights are theta_0 + sum_i c_i tau_i at every call, and whose only parameters are the coefficients.

    `coefficients` is [T], or layer-wise [T, tensors] in the order of `names`. Calls go to `model`, which holds theta_0 and
    is itself not changed by them; `merged()` is for what cannot be called with other weights, such as `generate`.

    Args:
        model: the pre-trained model; it is taken over and gets no gradients.
        models: the fine-tuned ones as named tensors; names of tied tensors may be missing, as they are in files.
        layer_wise: a coefficient for each task and tensor in place of one a task.
        keep: None is AdaMerging; a share is AdaMerging++, which trims to it.
        initial: every coefficient at first.

    Raises ValueError where the models do not fit together.
    """

    def __init__(
        self, model: nn.Module, models: Sequence[Tensors], layer_wise: bool = True, keep: float | None = None,
        initial: float = 0.3,
    ):  # fmt: skip
        super().__init__()
        self.model = model.requires_grad_(False)
        base = dict(model.state_dict())
        ties = tied_names(base)
        own = {name: base[name] for name in ties}
        vectors = task_vectors(own, [{name: tensor[name] for name in ties} for tensor in models])
        if keep is not None:
            vectors = elected_task_vectors(vectors, keep)
        self.names = list(vectors[0])
        # Every place a tensor is held, once: torch's own tying of weights leaves a module that stands under two names,
        # such as T5's embedding, with the merged weights.
        first = {name: owner for owner, others in ties.items() for name in (owner, *others)}
        held = [f"{path}.{own}" if path else own for path, part in model.named_modules() for own in _own_names(part)]
        self.places = {name: first[name] for name in held if first.get(name) in vectors[0]}
        for i, name in enumerate(self.names):
            self.register_buffer(f"vectors_{i}", torch.stack([vector[name] for vector in vectors]), persistent=False)
        shape = (len(models), len(self.names)) if layer_wise else (len(models),)
        self.coefficients = nn.Parameter(torch.full(shape, float(initial), device=next(iter(own.values())).device))

    def weights(self) -> dict[str, torch.Tensor]:
        """{name: merged tensor}, differentiable in the coefficients."""
        base = self.model.state_dict()
        made = {}
        for i, name in enumerate(self.names):
            own = self.coefficients[:, i] if self.coefficients.dim() == 2 else self.coefficients
            change = torch.tensordot(own, getattr(self, f"vectors_{i}"), dims=1)
            made[name] = (wide(base[name]) + change).to(base[name].dtype)
        return made

    def forward(self, *args, **kwargs):
        """As the model's own, with the merged weights."""
        made = self.weights()
        made = {name: made[owner] for name, owner in self.places.items()}
        return functional_call(self.model, made, args, kwargs, tie_weights=False)

    def learnt(self) -> dict[str, torch.Tensor]:
        """{name: coefficients [T]} of every tensor."""
        found = self.coefficients.detach()
        return {name: found[:, i] if found.dim() == 2 else found for i, name in enumerate(self.names)}

    @torch.no_grad()
    def merged(self, into: nn.Module) -> nn.Module:
        """Put the merged weights into `into`, a model of the same class, and return it."""
        made, places = self.weights(), into.state_dict()
        for name, tensor in rebuilt(dict(self.model.state_dict()), made.__getitem__):
            places[name].copy_(tensor)
        return into


def _own_names(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers directly in a module."""
    return [*module._parameters, *module._buffers]
