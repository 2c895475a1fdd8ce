"""MEO for a trained Switch Transformer: the experts of a layer merged into one feed-forward layer.

An expert of a Switch is two matrices with a ReLU between, so the merged expert is not the mixture of the experts'
outputs: an approximation, exact where the whole gate falls on one expert or the experts are equal. Three ways:
A  task level: gates from the router on a task's own text, merged once. The model becomes a dense one (`as_t5`).
B  sequence level: gates from the mean router probabilities of each sequence, k experts merged for each of them.
C  B with k = 1: each sequence to one expert. Nothing is merged, all that is lost is the choice a token had.

Switch is top-1: none of these saves multiplications. What A saves is memory, dispatch and dropped tokens.
Hidden units have no order of their own, so experts can be aligned before averaging (`align`: weight matching, Ainsworth
et al., 2023, "Git Re-Basin", section 3.2, which for one hidden layer is one linear assignment). And since averaging
keeps little of what a layer does, the second matrix can be fitted again to the sparse layer's outputs (`refit`; ours).
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from expert_merging.core.errors import UserError
from expert_merging.meo import mixing

GATES = ("probability", "usage", "uniform")
Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]  # of each sparse layer wi [d_ff, d_model], wo [d_model, d_ff]


@dataclass(frozen=True)
class Use:
    """How a task's real tokens use the experts of one layer."""

    probability: torch.Tensor  # [n], mean router probability
    usage: torch.Tensor  # [n], share of the tokens for which the expert is the most probable
    scale: float  # mean probability of a token's own expert, by which Switch multiplies the expert's output

    @property
    def favourite(self) -> int:
        """The expert that the task uses most."""
        return int(self.probability.argmax())

    def gates(self, kind: str, k: int) -> torch.Tensor:
        """`kind` of GATES, the k largest kept and made to add up to 1: [n]."""
        if kind == "uniform":  # among those the task uses most
            return top_k(self.probability, k).ne(0) / k
        return top_k(getattr(self, kind), k)


def sparse_layers(model) -> dict[str, SwitchTransformersSparseMLP]:
    """The sparse layers of a Switch Transformer by name, encoder first."""
    return {name: one for name, one in model.named_modules() if isinstance(one, SwitchTransformersSparseMLP)}


def measure_use(model, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, Use]:
    """Use of every sparse layer by a task's examples, teacher-forced, padding left out.

    Args:
        batches: input_ids, attention_mask [batch, input], labels [batch, target] with -100 where padded; at least one.
    """
    names = list(sparse_layers(model))
    totals: dict[str, Any] = dict.fromkeys(names, 0)  # tensors from the first batch on
    for batch in batches:
        outputs = teacher_forced(model, batch)
        logits = [
            one[0] for one in (*outputs.encoder_router_logits, *outputs.decoder_router_logits) if len(one) == 2
        ]  # of a dense layer there is one number
        for name, of_layer in zip(names, logits, strict=True):
            probabilities = of_layer.float().softmax(dim=-1)[real_tokens(name, batch)].double()  # [tokens, n]
            best = probabilities.max(dim=-1)
            chosen = torch.bincount(best.indices, minlength=of_layer.shape[-1]).double()
            sums = torch.cat([probabilities.sum(dim=0), chosen, best.values.sum()[None]]).cpu()
            totals[name] = totals[name] + sums
    uses = {}
    for name, sums in totals.items():
        n = len(sums) // 2
        tokens = sums[n : 2 * n].sum()
        uses[name] = Use(sums[:n] / tokens, sums[n : 2 * n] / tokens, (sums[-1] / tokens).item())
    return uses


@torch.no_grad()
def teacher_forced(model, batch: dict[str, torch.Tensor]):
    """Outputs of a Switch or T5 model on a batch with labels, in evaluation mode; no loss is computed."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    more = {"output_router_logits": True} if sparse_layers(model) else {}
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels)
    return model.eval()(**batch, decoder_input_ids=decoder_input_ids, use_cache=False, **more)


def real_tokens(layer: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which positions of a layer's input are not padding: bool [batch, tokens]."""
    return batch["attention_mask"].bool() if layer.startswith("encoder") else batch["labels"] != -100


# ---------------------------------------------------------------- weights


def top_k(weights: torch.Tensor, k: int) -> torch.Tensor:
    """`weights` [..., n] without all but the k largest of each row, divided by their sum."""
    best = weights.topk(k, dim=-1)
    kept = torch.zeros_like(weights).scatter(-1, best.indices, best.values)
    return kept / kept.sum(dim=-1, keepdim=True)


def stacked(layer: SwitchTransformersSparseMLP) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts' weights: wi [n, d_ff, d_model] and wo [n, d_model, d_ff]; copies."""
    experts = layer.experts.values()
    wi, wo = (torch.stack([getattr(one, part).weight.detach() for one in experts]) for part in ("wi", "wo"))
    return wi, wo


def align(wi: torch.Tensor, wo: torch.Tensor, reference: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same experts with the hidden units of each in the order that fits expert `reference` best.

    Units are matched so that the sum of their inner products, of rows of wi and columns of wo, is as large as can be.
    Shapes as of `stacked`; each expert computes what it did.
    """
    wi, wo = wi.clone(), wo.clone()
    likeness = wi[reference] @ wi.transpose(1, 2) + wo[reference].t() @ wo  # [n, d_ff of the reference, d_ff]
    for expert, scores in enumerate(likeness.double().cpu().numpy()):
        if expert != reference:
            _, order = linear_sum_assignment(scores, maximize=True)
            order = torch.from_numpy(np.asarray(order)).to(wi.device)
            wi[expert], wo[expert] = wi[expert][order], wo[expert][:, order]
    return wi, wo


def merge(wi: torch.Tensor, wo: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the experts' weights times `gates` [R, n]: wi [R, d_ff, d_model], wo [R, d_model, d_ff]."""
    return mixing.merge(wi, gates), mixing.merge(wo, gates)


def dense_weights(model, uses: dict[str, Use], k: int, gate: str = "probability", aligned: bool = True) -> Weights:
    """Way A: of each sparse layer the merged wi, and the merged wo times the task's mean p.

    Args:
        uses: of each sparse layer (`measure_use`).
        k: experts merged.
        gate: one of GATES, by which they are weighted.
        aligned: whether hidden units are aligned to the expert that the task uses most.
    """
    weights = {}
    for name, layer in sparse_layers(model).items():
        use = uses[name]
        wi, wo = stacked(layer)
        if aligned:
            wi, wo = align(wi, wo, use.favourite)
        wi, wo = merge(wi, wo, use.gates(gate, k)[None])
        weights[name] = wi[0], use.scale * wo[0]
    return weights


@torch.no_grad()
def refit(model, weights: Weights, batches: Iterable[dict[str, torch.Tensor]], ridge: float = 0.1) -> Weights:
    """The same with every wo moved to where wo relu(wi x) is nearest to what the sparse layer makes of x.

    Least squares over a task's real tokens, each layer by itself on the Switch's own states: with H the hidden units,
    Y the outputs and W what was merged, W + (Y - H W^T)^T H (H^T H + c I)^-1, where c is `ridge` times the mean of the
    diagonal of H^T H: where the text says little, wo stays as merged.

    Args:
        batches: as for `measure_use`.
    """
    layers = sparse_layers(model)
    squares: dict[str, Any] = dict.fromkeys(layers, 0.0)  # tensors from the first batch on
    products: dict[str, Any] = dict.fromkeys(layers, 0.0)
    batch: dict[str, torch.Tensor] = {}

    def count(layer, arguments, output):
        name = next(one for one, module in layers.items() if module is layer)
        wi, wo = weights[name]
        real = real_tokens(name, batch).to(wi.device)
        hidden = layer.experts["expert_0"].act(arguments[0][real] @ wi.t())
        squares[name] += (hidden.t() @ hidden).double()
        products[name] += ((output[0][real] - hidden @ wo.t()).t() @ hidden).double()

    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.callback(layer.register_forward_hook(count).remove)
        for batch in batches:  # noqa: B007, `count` reads it
            teacher_forced(model, batch)
    fitted = {}
    for name, (wi, wo) in weights.items():
        square = squares[name]
        square.diagonal().add_(ridge * square.diagonal().mean().clamp(min=1e-12))
        fitted[name] = wi, wo + torch.linalg.solve(square, products[name].t()).t().to(wo.dtype)
    return fitted


# ---------------------------------------------------------------- layers


class MergedExperts(nn.Module):
    """In place of a sparse layer: y = p * wo relu(wi x), p a token's largest router probability, wi and wo merged.

    With `gates` the same weights for all tokens (A). Without, each sequence has its own (B, C): from the mean router
    probabilities of its real tokens in the encoder, in the decoder from those of the first position, which is all of a
    sequence that every later token may know; the merged weights are kept until the next sequence begins.

    Args:
        layer: the sparse layer, which is left as it is.
        k: experts merged.
        gates: [n], of which k are not 0, or None.
        aligned_to: the expert that the others' hidden units are aligned to; None leaves them.
    """

    def __init__(self, layer: SwitchTransformersSparseMLP, k: int, gates: torch.Tensor | None, aligned_to: int | None):
        super().__init__()
        self.router, self.act, self.k = layer.router, layer.experts["expert_0"].act, k
        wi, wo = stacked(layer)
        if aligned_to is not None:
            wi, wo = align(wi, wo, aligned_to)
        self.by_sequence = gates is None
        self.wi, self.wo = (wi, wo) if gates is None else merge(wi, wo, gates[None])
        self.real: torch.Tensor | None = None  # [batch, tokens]: set before each forward of the encoder
        self.merged: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor):
        """[batch, tokens, d_model] to the same shape, with the router's logits as a sparse layer gives them."""
        probabilities, logits = self.router._compute_router_probabilities(hidden_states)
        scale, expert = probabilities.max(dim=-1, keepdim=True)
        wi, wo = self._weights(probabilities) if self.by_sequence else (self.wi, self.wo)
        hidden = self.act(hidden_states @ wi.transpose(-1, -2))
        return scale * (hidden @ wo.transpose(-1, -2)), (logits, expert.squeeze(-1))

    def _weights(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.merged is None:
            real = self.real if self.real is not None else torch.zeros_like(probabilities[..., 0])
            if self.real is None:
                real[:, 0] = 1  # the first position of a decoder
            real = real.to(probabilities).unsqueeze(-1)
            mean = (probabilities * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
            self.merged = merge(self.wi, self.wo, top_k(mean, self.k))
        return self.merged

    def take_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the batch only; beam_search calls it."""
        if self.by_sequence and self.merged is not None:
            self.merged = self.merged[0][rows], self.merged[1][rows]


@contextlib.contextmanager
def merged_experts(
    model, k: int, gates: dict[str, torch.Tensor] | None = None, aligned_to: dict[str, int] | None = None
) -> Iterator[None]:
    """Let `model` run with merged experts: forward and generate, teacher-forced or a token at a time.

    Args:
        gates: of each sparse layer for way A, None for ways B and C.
        aligned_to: expert of each sparse layer; see `MergedExperts`.
    """
    layers = sparse_layers(model)
    merged = {}
    for name, one in layers.items():
        favourite = aligned_to[name] if aligned_to is not None else None
        merged[name] = MergedExperts(one, k, gates[name] if gates is not None else None, favourite)

    def begin_encoder(_, arguments, named):
        for name, one in merged.items():
            if name.startswith("encoder"):
                one.merged, one.real = None, named.get("attention_mask")
                if one.real is None:
                    one.real = torch.ones_like(arguments[0] if arguments else named["input_ids"])

    def begin_decoder(_, arguments, named):
        past = named.get("past_key_values")
        if past is None or past.get_seq_length() == 0:
            for name, one in merged.items():
                if name.startswith("decoder"):
                    one.merged = None

    hooks = [
        stack.register_forward_pre_hook(begin, with_kwargs=True)
        for stack, begin in ((model.encoder, begin_encoder), (model.decoder, begin_decoder))
    ]
    try:
        for name, one in merged.items():
            model.set_submodule(name, one)
        yield
    finally:
        for name, one in layers.items():
            model.set_submodule(name, one)
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- a dense model


def as_t5(model, weights: Weights) -> T5ForConditionalGeneration:
    """A plain T5, without router: the Switch's weights, and in place of each sparse layer `weights` (`dense_weights`).

    Raises UserError for embeddings of encoder, decoder and output projection that differ: a T5 has one.
    """
    config = model.config
    if getattr(config, "separate_embeddings", False) or not config.tie_word_embeddings:
        raise UserError(
            "the model has an embedding of its own for a stack or the output (reading released); T5 has one for all"
        )
    state = {
        name.replace(".mlp.", ".DenseReluDense."): tensor
        for name, tensor in model.state_dict().items()
        if ".router." not in name and ".experts." not in name
    }
    for name, (wi, wo) in weights.items():
        dense = name.replace(".mlp", ".DenseReluDense")
        state[f"{dense}.wi.weight"], state[f"{dense}.wo.weight"] = wi, wo
    dense = T5ForConditionalGeneration(t5_config(config))
    dense.load_state_dict(state)
    return dense.to(model.device).eval()


def t5_config(config) -> T5Config:
    """The configuration of a T5 with a Switch Transformer's shapes."""
    kept = (
        "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "dropout_rate",
        "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "initializer_factor",
        "pad_token_id", "eos_token_id", "decoder_start_token_id", "tie_word_embeddings",
    )  # fmt: skip
    return T5Config(**{name: getattr(config, name) for name in kept}, feed_forward_proj=config.dense_act_fn)
