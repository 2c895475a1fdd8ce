"""The MoE of HEMoE: a LLaMA-style language model whose FFNs are cut into experts of different sizes.

An expert is a set of the dense FFN's neurons: E_e(x) = W_down[:, I_e] (act(W_gate[I_e] x) * (W_up[I_e] x)). A linear router
scores the experts of each token, the k best fire, and their outputs are added as they are (forward weight exactly 1),
so that with k = n a partition is the dense FFN. `HEMoEForCausalLM` saves and loads alone: its configuration holds the
dense model's configuration and the neurons of every expert, and this file lies beside it, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it without this package.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .gated_ffn import gated_ffns  # relative: the two files go along with saved mixtures, where we are not installed

# What others (generation, lm_eval) look for at the top of a configuration.
_OF_THE_DENSE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


class HEMoEConfig(PretrainedConfig):
    """
    Args:
        dense: the dense model's configuration, as `to_dict` gives it.
        moe_layers: the layers (from 0) whose FFN is a mixture; the others stay dense.
        experts: for each of these layers the neurons of each expert; n experts everywhere, of any sizes.
        k: experts that fire a token; may be changed on a finished model (`model.config.k = 3`).
        router: "learned" (trained through the straight-through weights) or "fixed" (its scores are EMoE's: the mean of
            the expert's gate pre-activations; nothing to train, no balance loss).
        router_std: standard deviation of a learned router's initial weights.
        balance_coef: lambda of the size-weighted balance loss; balance_scale: times n ("experts"), or times the number of
            tokens as in the released code ("tokens"); balance_padding: whether padding counts, as it does there.
        domains, serves: names, and which expert of a MoE layer serves which domain (the integer program's y, 0 or 1, [MoE
            layers, n, domains]), or None.
    """

    model_type = "hemoe"
    keys_to_ignore_at_inference = ["past_key_values", "routing", "balance_loss"]

    def __init__(
        self, dense=None, moe_layers=(), experts=(), k=1, router="learned", router_std=1e-3, balance_coef=0.0,
        balance_scale="experts", balance_padding=False, domains=(), serves=None, **kwargs,
    ):  # fmt: skip
        self.dense = {name: value for name, value in (dense or {}).items() if name != "_name_or_path"}
        self.moe_layers = [int(layer) for layer in moe_layers]
        self.experts = [[[int(i) for i in neurons] for neurons in layer] for layer in experts]
        self.k, self.router, self.router_std = k, router, router_std
        self.balance_coef, self.balance_scale, self.balance_padding = balance_coef, balance_scale, balance_padding
        self.domains = list(domains)
        self.serves = None if serves is None else [[[int(y) for y in row] for row in layer] for layer in serves]
        super().__init__(**{**kwargs, **{name: self.dense[name] for name in _OF_THE_DENSE if name in self.dense}})
        if self.dense:
            self._check()

    @property
    def num_experts(self) -> int:
        return len(self.experts[0]) if self.experts else 0

    def sizes(self) -> torch.Tensor:
        """Neurons of each expert: int64 [MoE layers, n]."""
        return torch.tensor([[len(neurons) for neurons in layer] for layer in self.experts])

    def dense_config(self) -> PretrainedConfig:
        return AutoConfig.for_model(**self.dense)

    def _check(self) -> None:
        neurons, layers = self.dense["intermediate_size"], self.dense["num_hidden_layers"]
        if len(self.moe_layers) != len(self.experts) or not self.experts:
            raise ValueError(
                f"{len(self.moe_layers)} MoE layers and experts of {len(self.experts)}: give one set a layer"
            )
        if bad := [layer for layer in self.moe_layers if not 0 <= layer < layers]:
            raise ValueError(f"moe_layers names layer {bad[0]}; the model's layers are 0 to {layers - 1}")
        if {len(layer) for layer in self.experts} != {self.num_experts}:
            raise ValueError("the number of experts differs between layers")
        if any(not ids or min(ids) < 0 or max(ids) >= neurons for layer in self.experts for ids in layer):
            raise ValueError(f"an expert is empty or names a neuron that is not one of 0 to {neurons - 1}")
        if not 1 <= self.k <= self.num_experts:
            raise ValueError(f"k is {self.k}; of {self.num_experts} experts 1 to {self.num_experts} can fire")
        if self.router not in ("learned", "fixed"):
            raise ValueError(f"router is {self.router!r}; it must be learned or fixed")
        if self.balance_scale not in ("experts", "tokens"):
            raise ValueError(f"balance_scale is {self.balance_scale!r}; it must be experts or tokens")


@dataclass
class HEMoEOutput(CausalLMOutputWithPast):
    """
    Args:
        loss: cross-entropy a target token plus `balance_loss`, where labels were given.
        balance_loss: summed over MoE layers.
        routing: for each MoE layer which experts fired, bool [batch, tokens, n].
    """

    balance_loss: torch.FloatTensor | None = None
    routing: tuple[torch.BoolTensor, ...] | None = None


class ExpertFFN(nn.Module):
    """A gated FFN cut into experts. The experts' rows lie one behind the other in `gate`, `up` [rows, d] and `down`
    [d, rows]; a neuron in two experts is there twice, one in none is not there."""

    def __init__(self, ffn: nn.Module, experts: list[list[int]], config: HEMoEConfig):
        super().__init__()
        self.config = config
        self.sizes = [len(neurons) for neurons in experts]
        rows = torch.tensor([neuron for neurons in experts for neuron in neurons], device=ffn.gate_proj.weight.device)
        with torch.no_grad():
            self.gate = nn.Parameter(ffn.gate_proj.weight.index_select(0, rows))
            self.up = nn.Parameter(ffn.up_proj.weight.index_select(0, rows))
            self.down = nn.Parameter(ffn.down_proj.weight.index_select(1, rows))
        self.act_fn = ffn.act_fn
        self.router = nn.Linear(
            self.gate.shape[1], len(experts), bias=False, device=self.gate.device, dtype=self.gate.dtype
        )
        self.probabilities: torch.Tensor | None = None  # [..., n] of the last call
        self.weights: torch.Tensor | None = None  # [..., n] of the last call: 0 or 1, with the router's gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]. Computes the selected experts alone."""
        with torch.autocast(x.device.type, enabled=False):  # which expert fires is not left to rounding
            scores = self.router(x.to(self.router.weight.dtype)).float()
        self.probabilities = scores.softmax(-1)
        fires = torch.zeros_like(scores).scatter(-1, scores.topk(self.config.k, dim=-1).indices, 1.0)
        # Straight-through: p - p is 0 before 1 is added, so the weight is 1 to the last bit.
        learned = self.config.router == "learned"
        self.weights = fires * (1 + (self.probabilities - self.probabilities.detach())) if learned else fires

        tokens, weights = x.flatten(0, -2), self.weights.flatten(0, -2)
        output = torch.zeros_like(tokens)
        parts = zip(self.gate.split(self.sizes), self.up.split(self.sizes), self.down.split(self.sizes, 1), strict=True)
        for expert, (gate, up, down) in enumerate(parts):
            at = weights[:, expert].nonzero().squeeze(1)
            if len(at):
                its = tokens[at]
                hidden = self.act_fn(its @ gate.T) * (its @ up.T)  # of another size each time: not for oneDNN
                output = output.index_add(0, at, (hidden @ down.T * weights[at, expert, None]).to(x.dtype))
        return output.reshape(x.shape)

    def mean_gate_rows(self) -> torch.Tensor:
        """Router weights with which an expert's score is the mean of its gate pre-activations (EMoE): [n, d]."""
        return torch.stack([gate.mean(0) for gate in self.gate.detach().split(self.sizes)])


class HEMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The dense causal language model with the FFNs of `config.moe_layers` replaced.

    Args:
        dense: the model to cut up; it is taken apart. Without one the weights are random, to be loaded.
    """

    config_class = HEMoEConfig
    base_model_prefix = "lm"
    _tied_weights_keys = ["lm.lm_head.weight"]
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(self, config: HEMoEConfig, dense: PreTrainedModel | None = None):
        super().__init__(config)
        self.lm = dense if dense is not None else AutoModelForCausalLM.from_config(config.dense_config())
        gated_ffns(self.lm)  # refuses what it cannot cut
        for layer, experts in zip(config.moe_layers, config.experts, strict=True):
            block = self.lm.model.layers[layer]
            block.mlp = ExpertFFN(block.mlp, experts, config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ExpertFFN):
            if self.config.router == "fixed":
                module.router.weight.data.copy_(module.mean_gate_rows())
            else:
                module.router.weight.data.normal_(std=self.config.router_std)

    @property
    def ffns(self) -> list[ExpertFFN]:
        """The FFNs that are mixtures, by layer."""
        return [self.lm.model.layers[layer].mlp for layer in self.config.moe_layers]

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm.set_output_embeddings(value)

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None, **kwargs,
    ) -> HEMoEOutput:  # fmt: skip
        """As the dense model's; always returns a `HEMoEOutput`."""
        kwargs["return_dict"] = True
        output = self.lm(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        balance, routing = None, []
        for ffn in self.ffns:
            if labels is not None and self.config.balance_coef and self.config.router == "learned":
                mask = None if self.config.balance_padding else attention_mask
                of_layer = balance_loss(ffn.probabilities, ffn.weights, mask, ffn.sizes, self.config)
                balance = of_layer if balance is None else balance + of_layer
            assert ffn.weights is not None  # its forward has just left them
            routing.append(ffn.weights.detach().bool())
            ffn.probabilities = ffn.weights = None  # they would keep the graph alive
        loss = output.loss if balance is None else output.loss + balance
        return HEMoEOutput(**{**output, "loss": loss, "balance_loss": balance, "routing": tuple(routing)})


# A saved mixture's own copy of this file may be imported beside ours.
AutoConfig.register("hemoe", HEMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(HEMoEConfig, HEMoEForCausalLM, exist_ok=True)
HEMoEConfig.register_for_auto_class()  # `save_pretrained` puts this file and gated_ffn.py beside the weights
HEMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def balance_loss(
    probabilities: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor | None, sizes: list[int], config: HEMoEConfig
) -> torch.Tensor:
    """lambda * scale * sum_e f_e rho_e P_e of one layer: f the share of tokens an expert fires for (they add up to k), P its
    mean probability, rho = |I_e| / N its size; scale is n, or the number of tokens (released code).

    Args:
        probabilities, weights: [batch, tokens, n].
        mask: [batch, tokens]; None counts all.
    """
    real = torch.ones_like(weights[..., 0], dtype=torch.bool) if mask is None else mask.bool()
    probabilities, weights = probabilities[real], weights[real]
    share = torch.tensor(sizes, device=weights.device) / config.dense["intermediate_size"]
    scale = len(weights) if config.balance_scale == "tokens" else len(sizes)
    return config.balance_coef * scale * (weights.mean(0) * share * probabilities.mean(0)).sum()


def activated_share(routing: tuple[torch.Tensor, ...], config: HEMoEConfig) -> torch.Tensor:
    """The share of an FFN's neurons that each token used: [batch, tokens, MoE layers], from a `HEMoEOutput.routing`."""
    sizes = config.sizes().to(routing[0].device) / config.dense["intermediate_size"]
    return torch.stack([fired.float() @ share for fired, share in zip(routing, sizes, strict=True)], dim=-1)
