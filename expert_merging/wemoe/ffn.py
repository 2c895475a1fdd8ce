"""WEMoE: a feed-forward layer whose weights are base + sum_t w_t (task vector t), with w from a router (arXiv 2402.00433).

E-WEMoE (arXiv 2410.21804) is the same with pruned task vectors, held sparse, and one router for all layers.
"""

import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from expert_merging.wemoe.linear import EnsembledLinear, LostSamples, ensemble, merged
from expert_merging.wemoe.router import Router
from expert_merging.wemoe.vectors import DenseVectors, SparseVectors, prune_magnitude

FFN = r"(^|\.)(mlp|DenseReluDense)$"  # names of feed-forward layers in CLIP, ViT, Switch Transformers and T5
ROUTING = ("sample", "batch", "static")


class WeightEnsemblingFFN(nn.Module):
    """A feed-forward layer in the place of `base_ffn`, which takes and gives what that does.

    Args:
        base_ffn: any module that takes [batch, tokens, hidden]; copied. It may give a tensor or a tuple or dict of them.
        task_vectors: of each expert: {name of a parameter of base_ffn: theta_i - theta_0}; copied.
        router: see `Router`; may be the same object in several layers.
        routing: "sample": weights of its own for every sample; "batch": one vector, the mean over the batch, which lets
            a batch of one task give the task away; "static": the router's constants (depth 0).
        sparse: hold only those elements of the task vectors that are not zero.

    Attributes to set before a forward pass, all None at first:
        token_mask: [batch, tokens], 0 for padding, which has no say in the routing.
        given_weights: [batch, T], used in the place of the router's; [T] for the whole batch.
        form: how sample-wise routing is computed: "merge", "product" or "loop"; None chooses.
    `last_weights` [batch, T] holds the weights of the last pass, detached.

    Raises ValueError for an unknown routing, and "static" with a router that looks at its input.
    """

    def __init__(
        self,
        base_ffn: nn.Module,
        task_vectors: Sequence[Mapping[str, torch.Tensor]],
        router: Router,
        routing: str = "sample",
        sparse: bool = False,
    ):
        super().__init__()
        if routing not in ROUTING:
            raise ValueError(f"routing is {routing!r}; it must be one of {', '.join(ROUTING)}")
        if routing == "static" and router.depth > 0:
            raise ValueError(f"static routing needs a router of depth 0, not {router.depth}")
        self.base = copy.deepcopy(base_ffn).requires_grad_(False)
        # Not named `router`: that name is the Switch layer's own, which other code asks for.
        self.gate = router
        self.routing = routing
        self.form: str | None = None
        self.token_mask: torch.Tensor | None = None
        self.given_weights: torch.Tensor | None = None
        self.last_weights: torch.Tensor | None = None
        self.names = [name for name, _ in self.base.named_parameters()]
        kind = SparseVectors if sparse else DenseVectors
        self.vectors = nn.ModuleList(kind([vector[name] for vector in task_vectors]) for name in self.names)
        self._ensemble()

    def _ensemble(self) -> None:
        """Let the linear layers inside compute with weights of each sample, where they hold all the parameters."""
        of_linear = {f"{name}.": one for name, one in self.base.named_modules() if isinstance(one, nn.Linear)}
        owners = {name: next((p for p in of_linear if re.fullmatch(re.escape(p) + r"\w+", name)), None)
                  for name in self.names}  # fmt: skip
        self.linear_only = None not in owners.values()
        if not self.linear_only:
            return
        for prefix, module in of_linear.items():
            deltas = {n[len(prefix) :]: v for n, v in zip(self.names, self.vectors, strict=True) if owners[n] == prefix}
            ensemble(module, deltas)

    def __getattr__(self, name: str) -> Any:
        """What is not here is the base layer's, such as the `router` and `experts` of a Switch layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def weights(self, states: torch.Tensor) -> torch.Tensor:
        """The weights of the task vectors for this input: [batch, T], or [1, T] when the whole batch has the same."""
        if self.given_weights is not None:
            given = self.given_weights
            return given.unsqueeze(0) if given.dim() == 1 else given
        weights = self.gate.of_sequences(states, self.token_mask)
        return weights.mean(dim=0, keepdim=True) if self.routing == "batch" else weights

    def merged_parameters(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """{name: base + sum_t weights[t] tau_t} for weights [T]."""
        base = dict(self.base.named_parameters())
        return {n: merged(base[n], weights, vectors) for n, vectors in zip(self.names, self.vectors, strict=True)}

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """hidden_states [batch, tokens, hidden]; the rest goes to the base layer as it is."""
        if hidden_states.dim() != 3:
            raise ValueError(f"states must be [batch, tokens, hidden], not {tuple(hidden_states.shape)}")
        weights = self.weights(hidden_states)
        if len(weights) not in (1, len(hidden_states)):
            raise ValueError(f"{len(weights)} rows of routing weights for {len(hidden_states)} samples")
        self.last_weights = weights.detach()
        if len(weights) == 1:
            return functional_call(self.base, self.merged_parameters(weights[0]), (hidden_states, *args), kwargs)
        if self.linear_only and self.form != "loop":
            if hasattr(self.base, "experts") and hasattr(self.base, "router"):
                return self._switch(hidden_states, weights)
            try:
                with _Routed(self.base, weights, self.form):
                    return self.base(hidden_states, *args, **kwargs)
            except LostSamples:
                self.form = "loop"
        return _join([
            functional_call(self.base, self.merged_parameters(w), (hidden_states[i : i + 1], *args), kwargs)
            for i, w in enumerate(weights)
        ])  # fmt: skip

    def _switch(self, states: torch.Tensor, weights: torch.Tensor):
        """A sparse Switch layer, (states, (router logits, expert index)): each expert gets rows of several samples."""
        with _Routed(self.base.router, weights, self.form):
            assigned, top_prob, logits = self.base.router(states)
        made = states
        for number, expert in enumerate(self.base.experts.values()):
            rows = assigned[..., number].nonzero(as_tuple=True)
            if len(rows[0]):
                with _Routed(expert, weights[rows[0]], None):
                    made = made.index_put(rows, expert(states[rows]).to(made.dtype))
        return top_prob * made, (logits, assigned.argmax(dim=-1))


class _Routed:
    """While entered, the linear layers in a module compute with the given weights of each sample."""

    def __init__(self, module: nn.Module, weights: torch.Tensor, form: str | None):
        self.layers = [layer for layer in module.modules() if isinstance(layer, EnsembledLinear)]
        self.weights, self.product = weights, None if form is None else form == "product"

    def __enter__(self):
        for layer in self.layers:
            layer.routing, layer.product = self.weights, self.product

    def __exit__(self, *error):
        for layer in self.layers:
            layer.routing = layer.product = None


def _join(outputs: list):
    """Outputs of single samples, as one: tensors put together along the batch, tuples and dicts item by item."""
    first = outputs[0]
    kind = type(first)
    if torch.is_tensor(first):
        return torch.cat(outputs)
    if isinstance(first, Mapping):
        return kind({key: _join([output[key] for output in outputs]) for key in first})
    if isinstance(first, (tuple, list)):
        return kind(_join(list(items)) for items in zip(*outputs, strict=True))
    return first


def ensembles(model: nn.Module) -> Iterator[tuple[str, WeightEnsemblingFFN]]:
    """(name, layer) of the weight-ensembling layers of a model, in order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, WeightEnsemblingFFN))


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, a shared one once."""
    return list(dict.fromkeys(layer.gate for _, layer in ensembles(model)))


def upscale(
    model: nn.Module,
    experts: Sequence[nn.Module | Mapping[str, torch.Tensor]],
    select: str = FFN,
    layers: Sequence[int] | None = None,
    lam: float = 0.3,
    depth: int = 2,
    share_router: bool = False,
    prune: float = 0.0,
    routing: str = "sample",
    compat: str = "",
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` with weight-ensembling layers; all other weights by task arithmetic with `lam`. Only its routers
    have gradients. `model` and `experts` stay as they are.

    Args:
        model: the pre-trained model, theta_0.
        experts: the fine-tuned ones, theta_1..theta_T: models, or mappings from names to tensors, read tensor by tensor.
        select: regular expression, searched in the names of modules: the feed-forward layers.
        layers: which of those, counted from 0 in order; None takes all.
        share_router: one router for all layers (E-WEMoE).
        prune, routing, compat: see `WeightEnsemblingFFN` and `prune_magnitude`.
        seed: of the routers' weights.

    Raises ValueError when no module, or not the wanted number, fits `select` and `layers`, or an expert is of another
    shape.
    """
    states = [expert.state_dict() if isinstance(expert, nn.Module) else expert for expert in experts]
    base = model.state_dict()
    _check_alike(base, states)
    found = [name for name, _ in model.named_modules() if re.search(select, name)]
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if layers is not None and found and (beyond := [i for i in layers if not -len(found) <= i < len(found)]):
        raise ValueError(f"layer {beyond[0]} is beyond the {len(found)} that {select!r} finds")
    chosen = found if layers is None else sorted({found[i] for i in layers}, key=found.index) if found else []
    if not chosen:
        raise ValueError(f"no module's name fits {select!r}")
    inside = {name for name in base if any(name.startswith(f"{ffn}.") for ffn in chosen)}
    made = copy.deepcopy(model)
    with torch.no_grad():
        own = made.state_dict()
        for name, tensor in base.items():
            if name not in inside and tensor.is_floating_point():
                wide = torch.promote_types(tensor.dtype, torch.float32)
                total = sum(state[name].to(tensor.device, wide) - tensor.to(wide) for state in states)
                own[name].copy_(tensor.to(wide) + lam * total)
    made.requires_grad_(False)
    made.wemoe = {
        "lam": lam, "depth": depth, "share_router": share_router, "prune": prune, "routing": routing, "compat": compat,
        "seed": seed, "layers": chosen, "base_sha256": state_sha256(base),
        "experts_sha256": [state_sha256(state) for state in states],
    }  # fmt: skip

    def task_vectors(name: str, number: int) -> dict[str, torch.Tensor]:
        ffn, state = model.get_submodule(name), states[number]
        vectors = {n: state[f"{name}.{n}"].to(p) - p.detach() for n, p in ffn.named_parameters()}
        if not _sparse(made.wemoe):
            return vectors
        return {n: prune_magnitude(vector, prune, compat) for n, vector in vectors.items()}

    put_layers(made, task_vectors)
    return made


def put_layers(model: nn.Module, task_vectors: Callable[[str, int], dict[str, torch.Tensor]]) -> None:
    """Put weight-ensembling layers with new routers, as `model.wemoe` describes them, in the place of feed-forward layers
    that still have theta_0's weights. `task_vectors` (layer's name, expert) gives {name: tensor}."""
    record = model.wemoe
    generator = torch.Generator().manual_seed(record["seed"])
    experts, router = len(record["experts_sha256"]), None
    for name in record["layers"]:
        ffn = model.get_submodule(name)
        if router is None or not record["share_router"]:
            router = Router(_hidden_size(ffn), experts, record["depth"], record["lam"], generator)
            router.to(next(ffn.parameters()).device)
        vectors = [task_vectors(name, number) for number in range(experts)]
        layer = WeightEnsemblingFFN(ffn, vectors, router, record["routing"], _sparse(record))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _sparse(record: Mapping[str, Any]) -> bool:
    return record["prune"] > 0 or record["compat"] == "reference"


def _hidden_size(ffn: nn.Module) -> int:
    """What enters the layer's first matrix."""
    return next(parameter.shape[1] for parameter in ffn.parameters() if parameter.dim() == 2)


def _check_alike(base: Mapping[str, torch.Tensor], states: Sequence[Mapping[str, torch.Tensor]]) -> None:
    if not states:
        raise ValueError("there is no expert to merge")
    for number, state in enumerate(states):
        if missing := [name for name in base if name not in state]:
            raise ValueError(f"expert {number} has no tensor {missing[0]}")
        for name, tensor in base.items():
            if (shape := tuple(state[name].shape)) != tuple(tensor.shape):
                raise ValueError(f"{name} is {tuple(tensor.shape)} in the base and {shape} in expert {number}")


def state_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all tensors, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.numel() and not tensor.is_meta:
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
