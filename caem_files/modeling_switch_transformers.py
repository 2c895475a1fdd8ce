# Licensed under the Apache License, Version 2.0: see the LICENSE file, or http://www.apache.org/licenses/LICENSE-2.0
"""
Switch Transformers, a drop-in for the file of the same name in transformers 4.46.3.

The same classes, checkpoint keys and numbers as the stock file, built from T5's blocks. What is Switch is here: a router
that sends each token to one expert, up to a capacity; the expert layer; the stacks; the two router losses. The routers
can count how often each expert is used.

CAEM (complexity-aware expert merging) is in caem.py, faster arithmetic for CPUs in cpu_kernels.py; both are optional.
"""

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...cache_utils import Cache, DynamicCache, EncoderDecoderCache
from ...generation import GenerationMixin
from ...modeling_outputs import (
    MoEModelOutput,
    MoEModelOutputWithPastAndCrossAttentions,
    Seq2SeqMoEModelOutput,
    Seq2SeqMoEOutput,
)
from ...modeling_utils import PreTrainedModel
from ...utils import add_start_docstrings, add_start_docstrings_to_model_forward, logging
from ..t5.modeling_t5 import (
    T5Attention,
    T5DenseActDense,
    T5LayerCrossAttention,
    T5LayerNorm,
    T5LayerSelfAttention,
    T5PreTrainedModel,
    T5Stack,
)
from .configuration_switch_transformers import SwitchTransformersConfig

try:
    from . import cpu_kernels
except ImportError:  # this file was copied alone
    cpu_kernels = None

logger = logging.get_logger(__name__)

CAEM_PATCH = "3"  # read as text by install.py, to tell this file from the stock one

_UNASKED = "released, in evaluation"  # how usage is counted until `set_usage_counting` says how

# Layers that Switch shares with T5, weight for weight and number for number.
SwitchTransformersLayerNorm = T5LayerNorm

_Linear = nn.Linear if cpu_kernels is None else cpu_kernels.Linear


def _with_our_products(module: nn.Module) -> None:
    """Make the linear layers in `module` compute as `_Linear` does."""
    if cpu_kernels is not None:
        cpu_kernels.use_in(module)


class SwitchTransformersDenseActDense(T5DenseActDense):
    """The dense feed-forward layer, and each expert: T5's."""

    def __init__(self, config: SwitchTransformersConfig):
        super().__init__(config)
        _with_our_products(self)


# ------------------------------------------------------------------------------------------------------------------
# Attention


class SwitchTransformersAttention(T5Attention):
    """T5's attention: to the states themselves with a bias by distance, or, in a decoder, to the encoder's states."""

    def __init__(self, config, has_relative_attention_bias=False, layer_idx: int | None = None):
        super().__init__(config, has_relative_attention_bias, layer_idx)
        _with_our_products(self)

    def forward(
        self,
        hidden_states,
        mask=None,
        key_value_states=None,
        position_bias=None,
        past_key_value=None,
        layer_head_mask=None,
        query_length=None,
        use_cache=False,
        output_attentions=False,
        cache_position=None,
    ):
        """
        Args:
            hidden_states: [batch, tokens, d_model].
            mask: added to the scores, [batch, 1, 1 or tokens, keys].
            key_value_states: [batch, keys, d_model], or fewer rows where several rows in a row attend to the same states,
                as the beams of an example do; these then count as more tokens of one row.
            position_bias: what an earlier layer of the stack gave; computed here if there is none.

        Returns:
            New states of the same shape; the cache; the bias by distance [1, heads, tokens, keys] or None, on GPUs with
            the mask in it; with `output_attentions` the weights [batch, heads, tokens, keys] (batch and tokens as in the
            keys where rows share them).
        """
        batch, length = hidden_states.shape[:2]
        key, value = self._keys_and_values(hidden_states, key_value_states, past_key_value, cache_position)
        rows = len(key)
        tokens = length * batch // rows if rows else length
        query = self._heads(self.q(hidden_states).view(rows, tokens, self.inner_dim))

        if mask is not None:
            mask = mask[..., : key.shape[2]]
        shown = output_attentions or layer_head_mask is not None
        on_gpu = query.is_cuda and not shown
        if position_bias is None:
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(
                    query_length or key.shape[2], key.shape[2], device=query.device, cache_position=cache_position
                )[:, :, -length:]
            if on_gpu:
                position_bias = _bias_with_mask(position_bias, mask, query.dtype)
        bias = position_bias
        if bias is not None and self.pruned_heads and bias.shape[1] > 1:
            bias = bias[:, [head for head in range(bias.shape[1]) if head not in self.pruned_heads]]

        dropout = self.dropout if self.training else 0.0
        if on_gpu:
            if bias is not None:
                bias = bias.expand(rows, self.n_heads, tokens, key.shape[2])
            made = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=1.0)
        elif batch and not shown and _by_head(query, tokens * key.shape[2] * self.key_value_proj_dim):
            contiguous = (states.contiguous() for states in (query, key, value))
            made = cpu_kernels.Attend.apply(*contiguous, bias, mask, dropout)
        else:
            weights = F.dropout(_attention_weights(query, key, bias, mask), dropout)
            if layer_head_mask is not None:
                weights = weights * layer_head_mask
            made = weights @ value
        made = self.o(made.transpose(1, 2).reshape(batch, length, self.inner_dim))
        return (made, past_key_value, position_bias, *((weights,) if output_attentions else ()))

    def _heads(self, states):
        """[batch, tokens, heads * d_kv] to [batch, heads, tokens, d_kv]."""
        return states.view(len(states), -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)

    def _keys_and_values(self, hidden_states, key_value_states, cache, cache_position):
        """Those of the states, or of the encoder's where they are given; with a cache, after the earlier ones."""
        crossing = key_value_states is not None
        if cache is not None and crossing and cache.is_updated.get(self.layer_idx):
            earlier = cache.cross_attention_cache  # the encoder's states do not change while decoding
            return earlier.key_cache[self.layer_idx], earlier.value_cache[self.layer_idx]
        states = key_value_states if crossing else hidden_states
        key, value = self._heads(self.k(states)), self._heads(self.v(states))
        if cache is not None:
            earlier = cache.cross_attention_cache if crossing else cache.self_attention_cache
            positions = {"cache_position": None if crossing else cache_position}
            if crossing:  # read at every step: products would each time copy what is not contiguous
                key, value = key.contiguous(), value.contiguous()
            key, value = earlier.update(key, value, self.layer_idx, positions)
            if crossing:
                cache.is_updated[self.layer_idx] = True
        return key, value


def _by_head(query, multiplications: int) -> bool:
    """Whether attention of so many multiplications a head goes by cpu_kernels."""
    return cpu_kernels is not None and cpu_kernels.attends_by_head(query, multiplications)


def _attention_weights(query, key, bias, mask):
    """Attention weights, [batch, heads, queries, keys]; rounded where stock rounds."""
    scores = query @ key.transpose(-1, -2)
    added = mask if bias is None else bias if mask is None else bias + mask
    if added is not None:
        scores += added
    return scores.float().softmax(dim=-1).type_as(scores)


def _bias_with_mask(bias, mask, dtype: torch.dtype):
    """
    Bias and mask in one, for torch's kernels on GPUs; all layers of a stack share it. The scores' `dtype` is that of
    autocast, say, in which the mask's lowest number would otherwise become infinite.
    """
    both = mask if bias is None else bias if mask is None else bias + mask
    return both if both is None else both.clamp(min=torch.finfo(dtype).min).to(dtype)


class SwitchTransformersLayerSelfAttention(T5LayerSelfAttention):
    """Norm, attention to the states themselves, dropout, residual."""

    def __init__(self, config, has_relative_attention_bias=False, layer_idx: int | None = None):
        nn.Module.__init__(self)  # with our attention in place of T5's
        self.SelfAttention = SwitchTransformersAttention(config, has_relative_attention_bias, layer_idx)
        self.layer_norm = SwitchTransformersLayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)


class SwitchTransformersLayerCrossAttention(T5LayerCrossAttention):
    """Norm, attention to the encoder's states, dropout, residual."""

    def __init__(self, config, layer_idx: int | None = None):
        nn.Module.__init__(self)
        self.EncDecAttention = SwitchTransformersAttention(config, layer_idx=layer_idx)
        self.layer_norm = SwitchTransformersLayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)


# ------------------------------------------------------------------------------------------------------------------
# Router losses


def router_z_loss_func(router_logits: torch.Tensor) -> torch.Tensor:
    """
    Router z-loss (ST-MoE, Zoph et al., 2022, equation 5): mean over tokens of the squared log-sum-exp of the logits.

    Args:
        router_logits: [batch, tokens, experts].

    Returns:
        A scalar.
    """
    return router_logits.logsumexp(dim=-1).square().mean()


def load_balancing_loss_func(router_probs: torch.Tensor, expert_indices: torch.Tensor) -> torch.Tensor:
    """
    Load-balancing loss (Switch Transformer, equations 4 to 6), computed in each sequence and averaged over sequences.

    Args:
        router_probs: [batch, tokens, experts].
        expert_indices: the expert of each token, [batch, tokens] (or [batch, tokens, k] for k experts a token).

    Returns:
        A scalar; 1 when the load is perfectly even.
    """
    num_experts = router_probs.shape[-1]
    share = _chosen(expert_indices, num_experts).mean(dim=-2)
    return (share * router_probs.mean(dim=-2)).mean() * num_experts**2


def _chosen(expert_indices: torch.Tensor, num_experts: int) -> torch.Tensor:
    """1.0 at the experts that a token chose: [batch, tokens] or [batch, tokens, k] to [batch, tokens, experts]."""
    expert_indices = expert_indices.long()
    if expert_indices.dim() == 2:
        expert_indices = expert_indices.unsqueeze(-1)
    return F.one_hot(expert_indices, num_experts).amax(dim=-2).float()


def router_losses(
    router_outputs: Sequence[tuple[torch.Tensor, ...]], token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Z-loss and balance loss of one stack, over all its sparse layers together.

    Args:
        router_outputs: `encoder_router_logits` or `decoder_router_logits` of an output: a block each, either
            (logits [batch, tokens, experts], expert index [batch, tokens]) or, for a dense block, a placeholder.
        token_mask: [batch, tokens], non-zero at real tokens. `None` counts every position, padding included, which is
            what `forward` adds to the cross-entropy. With a mask the value does not depend on the padding.

    Returns:
        Two scalars, unweighted.

    Raises:
        ValueError: no block is sparse.
    """
    sparse = [output for output in router_outputs if output[0].dim() > 1]
    if not sparse:
        raise ValueError("router_losses: no sparse layer among the router outputs; this stack is dense")
    # One after the other along the token axis, as in stock: the balance is that of all layers of a stack pooled.
    logits = torch.cat([output[0] for output in sparse], dim=1)
    indices = torch.cat([output[1] for output in sparse], dim=1)
    probs = logits.softmax(dim=-1)
    if token_mask is None:
        return router_z_loss_func(logits), load_balancing_loss_func(probs, indices)

    real = token_mask.to(probs.device).ne(0).to(probs.dtype).repeat(1, len(sparse)).unsqueeze(-1)
    z_loss = (logits.logsumexp(dim=-1, keepdim=True).square() * real).sum() / real.sum().clamp(min=1)

    num_experts, tokens = probs.shape[-1], real.sum(dim=-2).clamp(min=1)
    share = (_chosen(indices, num_experts) * real).sum(dim=-2) / tokens
    prob = (probs * real).sum(dim=-2) / tokens
    sequences = real.amax(dim=-2).sum().clamp(min=1)  # a sequence without real tokens has no balance
    return z_loss, (share * prob).sum() * num_experts / sequences


# ------------------------------------------------------------------------------------------------------------------
# The sparse feed-forward layer


def _without_autocast(device_type: str):
    """Where autocast would put the router in bf16: `router_dtype` holds (Switch Transformer, section 2.4)."""
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()


class SwitchTransformersTop1Router(nn.Module):
    """
    Sends each token to its most probable expert, first come first served up to `expert_capacity` tokens of a sequence.

    It can count the tokens it sends to each expert (see `SwitchTransformersPreTrainedModel.set_usage_counting`). The
    counts are a buffer of int64 that moves with the model and is no part of its state dict.
    """

    def __init__(self, config: SwitchTransformersConfig):
        super().__init__()
        self.num_experts, self.expert_capacity = config.num_experts, config.expert_capacity
        self.jitter_noise, self.dtype = config.router_jitter_noise, getattr(torch, config.router_dtype)
        self.classifier = nn.Linear(config.d_model, config.num_experts, bias=config.router_bias)

        self.usage_counting: str | None = _UNASKED
        self.tokens_to_count: torch.Tensor | None = None  # bool [batch, tokens], there during a counted forward
        self.register_buffer("usage_counts", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False)

    def _cast_classifier(self):
        """Put the classifier in the router's precision, unless it is quantised (its weight is then of integers)."""
        weight = self.classifier.weight
        if weight.is_floating_point() and weight.dtype != self.dtype:
            self.classifier.to(self.dtype)

    def _compute_router_probabilities(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities (in the dtype of the input) and logits (in `router_dtype`), both [batch, tokens, experts]."""
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(self.dtype)
        if self.training and self.jitter_noise > 0:
            # In place, as in stock: where no cast made a copy above, the experts see the jittered input as well.
            noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
            hidden_states.mul_(noise)
        self._cast_classifier()
        with _without_autocast(hidden_states.device.type):
            router_logits = self.classifier(hidden_states)
        router_probs = router_logits.softmax(dim=-1, dtype=self.dtype).to(input_dtype)
        return router_probs, router_logits

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: [batch, tokens, d_model].

        Returns:
            One-hot expert of each token, all zero where the expert was full, int64 [batch, tokens, experts];
            probability of the chosen expert [batch, tokens, 1]; logits [batch, tokens, experts].
        """
        router_probs, router_logits = self._compute_router_probabilities(hidden_states)
        top_prob, top_expert = router_probs.max(dim=-1, keepdim=True)
        wanted = F.one_hot(top_expert.squeeze(-1), self.num_experts)
        assigned = wanted
        if wanted.shape[-2] > self.expert_capacity:  # a shorter sequence cannot overflow
            assigned = wanted * (wanted.cumsum(dim=-2) <= self.expert_capacity)
        if self.tokens_to_count is not None:
            counted = wanted if self.usage_counting == "paper" else assigned
            self.usage_counts += (counted * self.tokens_to_count.unsqueeze(-1)).sum(dim=(0, 1))
        return assigned, top_prob, router_logits

    def get_expert_usage_counts(self) -> torch.Tensor:
        """Tokens counted for each expert since the last reset, int64 [experts]; a copy. Says so where there are none:
        shares of them would be no numbers."""
        if not self.usage_counts.any():
            logger.warning("get_expert_usage_counts: no token was counted since the last reset; shares of 0 are NaN")
        return self.usage_counts.clone()

    def reset_expert_usage_counts(self) -> None:
        self.usage_counts.zero_()


@functools.cache
def _has_grouped_products(device: torch.device) -> bool:
    """Whether torch has kernels of its own for them on this GPU; elsewhere it runs them one by one, and waits for each."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


class SwitchTransformersSparseMLP(nn.Module):
    """Experts behind a router. A token leaves as its router probability times what its expert makes of it."""

    def __init__(self, config: SwitchTransformersConfig, expert_class: nn.Module = SwitchTransformersDenseActDense):
        super().__init__()
        self.router = SwitchTransformersTop1Router(config)
        self.experts = nn.ModuleDict({f"expert_{i}": expert_class(config) for i in range(config.num_experts)})
        self.served: list[torch.Tensor] | None = None  # where a list, training notes there the tokens of each expert

    def forward(self, hidden_states: torch.Tensor):
        """
        Args:
            hidden_states: [batch, tokens, d_model].

        Returns:
            New states of that shape, and (router logits [batch, tokens, experts], expert index [batch, tokens]), where
            tokens beyond capacity, which pass by the experts unchanged, have index 0.
        """
        assigned, top_prob, router_logits = self.router(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        choice = assigned.reshape(-1, assigned.shape[-1])
        # Bring the tokens of each expert together: sorted by expert, with those beyond capacity last.
        overflowed_last = torch.where(choice.any(dim=-1), choice.argmax(dim=-1), choice.shape[-1])
        order, sizes = overflowed_last.argsort(stable=True), choice.sum(dim=0)
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else tokens.dtype
        if tokens.is_cuda and dtype == torch.bfloat16 and _has_grouped_products(tokens.device) and self._alike():
            if self.served is not None and torch.is_grad_enabled():
                self.served.append(sizes)
            made = self._run_experts_at_once(tokens.to(dtype), order, sizes)
            made = torch.where(choice.any(dim=-1, keepdim=True), made.to(tokens.dtype), tokens)
        else:
            sizes = sizes.tolist()  # on a GPU the one moment of the layer that waits for it
            order = order[: sum(sizes)]
            made = tokens
            if sizes and len(order):
                new = self._run_experts(tokens[order], sizes)
                made = tokens.index_copy(0, order, new.to(tokens.dtype))  # autocast may have changed the dtype
        return top_prob * made.view_as(hidden_states), (router_logits, assigned.argmax(dim=-1))

    def _run_experts(self, tokens: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Tokens sorted by expert, `sizes[i]` of them for expert i: [sum(sizes), d_model] to the same shape."""
        pairs = zip(self.experts.values(), tokens.split(sizes), strict=True)
        return torch.cat([expert(part) for expert, part in pairs if len(part)])

    def _alike(self) -> bool:
        """Whether the experts can be stacked: none quantised or wrapped by an adapter, and of sizes the kernels take."""
        return all(
            type(expert) is SwitchTransformersDenseActDense
            and type(expert.wi) is type(expert.wo) is _Linear
            and all(size % 8 == 0 for size in expert.wi.weight.shape)
            for expert in self.experts.values()
        )

    def _run_experts_at_once(self, tokens: torch.Tensor, order: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """
        All experts by two grouped products, with all numbers of tokens known to the device only: nothing waits for it.

        Args:
            tokens: [tokens, d_model].
            order: of the tokens by expert, those without one last, [tokens].
            sizes: tokens of each expert, [experts].

        Returns:
            [tokens, d_model] in the order of `tokens`; anything where a token has no expert.
        """
        number, device = len(tokens), tokens.device
        room = (sizes + 7) // 8 * 8  # the kernels want the 16 bytes' alignment of eight bfloat16
        last, last_with_room = sizes.cumsum(0), room.cumsum(0)
        rank = torch.arange(number, device=device)
        expert = torch.searchsorted(last, rank, right=True).clamp(max=len(sizes) - 1)
        place = rank + (last_with_room - room - last + sizes)[expert]  # of the tokens in `order`, among rows with room

        # Rows are filled from `tokens`, those between two experts from a row of zeros. The grouped products give rows
        # after the last expert no value and no gradient; they come from the zeros as well, and go nowhere.
        rows = number + 8 * len(sizes)
        origin = torch.full((rows,), number, device=device).index_copy(0, place.clamp(max=rows - 1), order)
        origin = torch.where(torch.arange(rows, device=device) < last_with_room[-1], origin, number)
        grouped = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])]).index_select(0, origin)

        first, ends = next(iter(self.experts.values())), last_with_room.int()
        for part in ("wi", "wo"):
            weights = torch.stack([getattr(one, part).weight.to(tokens.dtype) for one in self.experts.values()])
            grouped = F.grouped_mm(grouped, weights.transpose(-1, -2), offs=ends)
            grouped = first.dropout(first.act(grouped)) if part == "wi" else grouped
        where = torch.empty_like(place).index_copy(0, order, place.clamp(max=rows - 1))
        return grouped.index_select(0, where)


class SwitchTransformersLayerFF(nn.Module):
    """Feed-forward sublayer: norm, dense or sparse feed-forward, dropout, residual."""

    def __init__(self, config: SwitchTransformersConfig, is_sparse=False):
        super().__init__()
        self.is_sparse = is_sparse
        self.mlp = SwitchTransformersSparseMLP(config) if is_sparse else SwitchTransformersDenseActDense(config)
        self.layer_norm = SwitchTransformersLayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states, output_router_logits):
        """States of the same shape; with `output_router_logits`, a sparse layer gives (states, router outputs)."""
        normed = self.layer_norm(hidden_states)
        if not self.is_sparse:
            return hidden_states + self.dropout(self.mlp(normed))
        update, router_outputs = self.mlp(normed)
        hidden_states = hidden_states + self.dropout(update)
        return (hidden_states, router_outputs) if output_router_logits else hidden_states


def _clamp_fp16(hidden_states: torch.Tensor) -> torch.Tensor:
    """Infinities to a little under fp16's largest number, so that training in fp16 goes on; else unchanged."""
    if hidden_states.dtype == torch.float16 and torch.isinf(hidden_states).any():
        limit = torch.finfo(torch.float16).max - 1000
        hidden_states = hidden_states.clamp(min=-limit, max=limit)
    return hidden_states


class SwitchTransformersBlock(nn.Module):
    """Self-attention, cross-attention in a decoder, dense or sparse feed-forward."""

    def __init__(self, config, has_relative_attention_bias=False, is_sparse=False, layer_idx: int | None = None):
        super().__init__()
        self.is_decoder, self.is_sparse = config.is_decoder, is_sparse
        sublayers = [SwitchTransformersLayerSelfAttention(config, has_relative_attention_bias, layer_idx)]
        if config.is_decoder:
            sublayers.append(SwitchTransformersLayerCrossAttention(config, layer_idx))
        self.layer = nn.ModuleList([*sublayers, SwitchTransformersLayerFF(config, is_sparse)])

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_bias=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        encoder_decoder_position_bias=None,
        layer_head_mask=None,
        cross_attn_layer_head_mask=None,
        past_key_value=None,
        use_cache=False,
        output_attentions=False,
        output_router_logits=True,
        return_dict=True,
        cache_position=None,
    ):
        """
        Returns:
            A tuple: states; the cache, if `use_cache`; self-attention bias and, if asked for, weights; the same of the
            cross-attention, if there was one; last the router outputs, of a dense block a tuple of one zero.
        """
        asked = {"use_cache": use_cache, "output_attentions": output_attentions, "cache_position": cache_position}
        hidden_states, cache, *attention_outputs = self.layer[0](
            hidden_states, attention_mask, position_bias, layer_head_mask, past_key_value, **asked
        )
        hidden_states = _clamp_fp16(hidden_states)

        if self.is_decoder and encoder_hidden_states is not None:
            seen = (encoder_hidden_states, encoder_attention_mask, encoder_decoder_position_bias)
            asked["query_length"] = cache_position[-1] + 1
            hidden_states, cache, *cross_outputs = self.layer[1](
                hidden_states, *seen, cross_attn_layer_head_mask, cache, **asked
            )
            hidden_states = _clamp_fp16(hidden_states)
            attention_outputs += cross_outputs

        hidden_states = self.layer[-1](hidden_states, output_router_logits)
        if isinstance(hidden_states, tuple):
            hidden_states, router_outputs = hidden_states
        else:
            router_outputs = (torch.zeros(1, device=hidden_states.device, dtype=torch.int64),)
        hidden_states = _clamp_fp16(hidden_states)

        return (hidden_states, *([cache] if use_cache else []), *attention_outputs, router_outputs)


# ------------------------------------------------------------------------------------------------------------------
# Stacks and models


class SwitchTransformersPreTrainedModel(PreTrainedModel):
    """What all Switch models share: initial weights, shifting of labels, counting of expert usage."""

    config_class = SwitchTransformersConfig
    base_model_prefix = "switch_transformers"
    supports_gradient_checkpointing = True
    _supports_cache_class = True
    _supports_static_cache = False
    _no_split_modules = ["SwitchTransformersBlock"]

    dummy_inputs = T5PreTrainedModel.dummy_inputs
    _shift_right = T5PreTrainedModel._shift_right

    def _init_weights(self, module):
        """Normal weights of Mesh TensorFlow's scales, in stock's order, so that a seed gives stock's weights."""
        factor, d_model = self.config.initializer_factor, self.config.d_model
        d_kv, num_heads = self.config.d_kv, self.config.num_heads

        def normal(layer, std):
            layer.weight.data.normal_(mean=0.0, std=factor * std)

        if isinstance(module, SwitchTransformersLayerNorm):
            module.weight.data.fill_(factor)
        elif isinstance(module, (_SwitchTransformersSeq2Seq, SwitchTransformersEncoderModel)):
            normal(module.shared, 1.0)
            if hasattr(module, "lm_head") and not self.config.tie_word_embeddings:
                normal(module.lm_head, 1.0)
        elif isinstance(module, SwitchTransformersDenseActDense):
            normal(module.wi, d_model**-0.5)
            normal(module.wo, self.config.d_ff**-0.5)
        elif isinstance(module, SwitchTransformersAttention):
            normal(module.q, (d_model * d_kv) ** -0.5)
            normal(module.k, d_model**-0.5)
            normal(module.v, d_model**-0.5)
            normal(module.o, (num_heads * d_kv) ** -0.5)
            if module.has_relative_attention_bias:
                normal(module.relative_attention_bias, d_model**-0.5)
        elif isinstance(module, SwitchTransformersSparseMLP):
            normal(module.router.classifier, 1.0)
            if module.router.classifier.bias is not None:
                module.router.classifier.bias.data.zero_()
            for expert in module.experts.values():
                normal(expert.wi, d_model**-0.5)
                normal(expert.wo, d_model**-0.5)

    def _stacks(self) -> dict:
        """The stacks of this model by name, "encoder" and, if it has one, "decoder"."""
        if isinstance(self, SwitchTransformersStack):
            return {"decoder" if self.is_decoder else "encoder": self}
        return {name: getattr(self, name) for name in ("encoder", "decoder") if hasattr(self, name)}

    def set_usage_counting(self, reading: str | None) -> None:
        """
        Start or stop counting the tokens that each router sends to each expert, during forward and generate.

        Args:
            reading: `"paper"` counts real tokens only, before the capacity cut. Real are, in the encoder, the positions
                of the attention mask (without one, those that are not padding). In the decoder with labels: where
                `decoder_attention_mask` says so, or, if there is none or it is all ones, where the label is not -100.
                In the decoder without labels: position 0 and every token that is neither padding nor end of sequence,
                within the mask if there is one; so finished beams, and what is fed after the end of a shorter example
                of a batch, do not count, and examples count the same in a batch as one by one.
                `"released"` counts every position that an expert accepted, padding included, as the authors' code does.
                `None` counts nothing and costs nothing. Before the first call "released" counts in evaluation, since the
                authors' scripts ask for counts without having asked for counting.

        Counts add up until `reset_expert_usage`. What assisted or contrastive decoding computes in vain counts too.

        Raises:
            ValueError: another reading.
        """
        if reading not in (None, "paper", "released"):
            raise ValueError(f'set_usage_counting: reading must be "paper", "released" or None, not {reading!r}')
        for stack in self._stacks().values():
            stack.usage_counting = reading
            for router in stack.routers():
                router.usage_counting = reading

    def expert_usage(self) -> dict:
        """Counts of each stack by name: `{"encoder": int64 [sparse layers, experts], "decoder": ...}`."""
        usage = {}
        for name, stack in self._stacks().items():
            counts = [router.usage_counts.clone() for router in stack.routers()]
            empty = torch.zeros(0, self.config.num_experts, dtype=torch.int64)
            usage[name] = torch.stack([count.to(counts[0].device) for count in counts]) if counts else empty
        return usage

    def reset_expert_usage(self) -> None:
        """Set all counts to zero."""
        for stack in self._stacks().values():
            for router in stack.routers():
                router.reset_expert_usage_counts()


def _flat_outputs(block: SwitchTransformersBlock, *arguments) -> tuple:
    """
    A block's outputs with its router's unpacked at the end, then their number.

    A re-entrant checkpoint sees no tensors inside a tuple; the router losses would lose their gradients.
    """
    *outputs, router_outputs = block(*arguments)
    return (*outputs, *router_outputs, len(router_outputs))


class SwitchTransformersStack(SwitchTransformersPreTrainedModel):
    """The encoder, or with `config.is_decoder` the decoder."""

    def __init__(self, config, embed_tokens=None):
        super().__init__(config)
        self.is_decoder = config.is_decoder
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if embed_tokens is not None and not _separate_embeddings(config):
            self.embed_tokens.weight = embed_tokens.weight

        if self.is_decoder:
            config.num_layers = config.num_decoder_layers
        step = config.decoder_sparse_step if self.is_decoder else config.encoder_sparse_step
        self.block = nn.ModuleList(
            SwitchTransformersBlock(
                config,
                has_relative_attention_bias=i == 0,
                is_sparse=step == 1 or (step > 1 and i % step == 1),
                layer_idx=i,
            )
            for i in range(config.num_layers)
        )
        self.final_layer_norm = SwitchTransformersLayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.device_map = None
        self.gradient_checkpointing = False

        self.usage_counting: str | None = _UNASKED
        self.real_tokens: torch.Tensor | None = None  # bool [batch, tokens]: what labels tell of the next forward
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, new_embeddings):
        self.embed_tokens = new_embeddings

    _update_causal_mask = T5Stack._update_causal_mask
    _prepare_4d_causal_attention_mask_with_cache_position = staticmethod(
        T5Stack._prepare_4d_causal_attention_mask_with_cache_position
    )

    def _prune_heads(self, heads_to_prune):
        """Prune heads of the self-attention, given as {layer: [heads]}; of encoders only, a decoder stays whole."""
        if not self.is_decoder:
            for layer, heads in heads_to_prune.items():
                self.block[layer].layer[0].SelfAttention.prune_heads(heads)

    def routers(self) -> list:
        """The routers of the sparse blocks, in order."""
        return [block.layer[-1].mlp.router for block in self.block if block.is_sparse]

    def _find_real_tokens(self, input_ids, attention_mask, cache_position, shape) -> torch.Tensor:
        """Where the tokens that "paper" counts are, bool [batch, tokens]; see `set_usage_counting`."""
        real = torch.ones(shape, dtype=torch.bool, device=cache_position.device)
        masked = attention_mask is not None and attention_mask.dim() == 2
        if masked:
            real = real & attention_mask[:, -shape[1] :].to(real.device).ne(0)
        if input_ids is not None and (self.is_decoder or not masked):
            eos = self.config.eos_token_id if self.is_decoder else None
            silent = [self.config.pad_token_id, *(eos if isinstance(eos, (list, tuple)) else [eos])]
            speaks = torch.ones_like(input_ids, dtype=torch.bool)
            for token in silent:
                if token is not None:
                    speaks &= input_ids.ne(token)
            if self.is_decoder:
                speaks = speaks | (cache_position == 0)  # the start token is the padding token
            real = real & speaks
        return real

    @contextlib.contextmanager
    def _counting(self, real_tokens: torch.Tensor) -> Iterator[None]:
        """Counts inside only: what gradient checkpointing computes again in the backward pass is not counted twice."""
        for router in self.routers():
            router.tokens_to_count = real_tokens
        try:
            yield
        finally:
            for router in self.routers():
                router.tokens_to_count = None

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        inputs_embeds=None,
        head_mask=None,
        cross_attn_head_mask=None,
        past_key_values=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        output_router_logits=True,
        return_dict=None,
        cache_position=None,
    ):
        """
        Run the stack; arguments as in the models below, `attention_mask` being the stack's own.

        Returns:
            `MoEModelOutputWithPastAndCrossAttentions`, or without `return_dict` the tuple of its fields that are there.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; `use_cache` in an encoder.
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.use_return_dict if return_dict is None else return_dict
        checkpointing = self.gradient_checkpointing and self.training

        if (input_ids is None) == (inputs_embeds is None):
            prefix = "decoder_" if self.is_decoder else ""
            raise ValueError(f"give one of {prefix}input_ids and {prefix}inputs_embeds, not both and not neither")
        if input_ids is not None:
            input_ids = input_ids.view(-1, input_ids.shape[-1])
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, seq_length = inputs_embeds.shape[:2]
        device = inputs_embeds.device

        if checkpointing and use_cache:
            logger.warning_once("use_cache=True does not go with gradient checkpointing and is set to False")
            use_cache = False
        if use_cache and not self.is_decoder:
            raise ValueError("use_cache=True is for decoders; this stack is an encoder")

        # Callers may hand in a cache of both attentions, one of the self-attention, a tuple, or none: they get back
        # their own kind. Blocks always see a cache of both attentions.
        cache, give_back = None, None
        if self.is_decoder and (use_cache or past_key_values is not None):
            if isinstance(past_key_values, EncoderDecoderCache):
                cache, give_back = past_key_values, (lambda c: c) if use_cache else None
            elif isinstance(past_key_values, Cache):
                cache = EncoderDecoderCache(past_key_values, DynamicCache())
                give_back = lambda c: c.self_attention_cache  # noqa: E731
            else:
                cache = EncoderDecoderCache.from_legacy_cache(past_key_values)
                give_back = EncoderDecoderCache.to_legacy_cache
        past_length = cache.get_seq_length() if cache is not None else 0
        if cache_position is None:
            cache_position = torch.arange(past_length, past_length + seq_length, device=device)

        counting, reading = contextlib.nullcontext(), self.usage_counting
        if reading == _UNASKED:
            reading = None if self.training else "released"
        if reading is not None:
            real_tokens, self.real_tokens = self.real_tokens, None
            if reading == "released":
                real_tokens = torch.ones(batch_size, seq_length, dtype=torch.bool, device=device)
            elif real_tokens is None:
                shape = (batch_size, seq_length)
                real_tokens = self._find_real_tokens(input_ids, attention_mask, cache_position, shape)
            counting = self._counting(real_tokens)

        if attention_mask is None:
            attention_mask = torch.ones(batch_size, past_length + seq_length, device=device)
        if self.is_decoder:
            self_cache = cache.self_attention_cache if cache is not None else None
            attention_mask = self._update_causal_mask(
                attention_mask, inputs_embeds, cache_position, self_cache, output_attentions
            )
        else:
            attention_mask = self.invert_attention_mask(attention_mask)
        crossing = self.is_decoder and encoder_hidden_states is not None
        if crossing:
            if encoder_attention_mask is None:
                encoder_attention_mask = torch.ones(encoder_hidden_states.shape[:2], device=device)
            encoder_attention_mask = self.invert_attention_mask(encoder_attention_mask)
        else:
            encoder_attention_mask = None

        head_mask = self.get_head_mask(head_mask, config.num_layers)
        cross_attn_head_mask = self.get_head_mask(cross_attn_head_mask, config.num_layers)
        all_hidden_states = () if output_hidden_states else None
        all_attentions = () if output_attentions else None
        all_cross_attentions = () if output_attentions and self.is_decoder else None
        all_router_outputs = () if output_router_logits else None

        hidden_states = self.dropout(inputs_embeds)
        position_bias = cross_position_bias = None
        with counting:
            for block, mask, cross_mask in zip(self.block, head_mask, cross_attn_head_mask, strict=False):
                if output_hidden_states:
                    all_hidden_states += (hidden_states,)
                arguments = (
                    hidden_states,
                    attention_mask,
                    position_bias,
                    encoder_hidden_states,
                    encoder_attention_mask,
                    cross_position_bias,
                    mask,
                    cross_mask,
                    None if checkpointing else cache,
                    use_cache,
                    output_attentions,
                    output_router_logits,
                    return_dict,
                    cache_position,
                )
                if checkpointing:
                    *outputs, size = self._gradient_checkpointing_func(_flat_outputs, block, *arguments)
                    outputs, router_outputs = outputs[:-size], tuple(outputs[-size:])
                else:
                    *outputs, router_outputs = block(*arguments)
                hidden_states = outputs.pop(0)

                if use_cache:
                    outputs.pop(0)
                # Only the first block has a bias (and the mask within it): the others take it from there.
                position_bias = outputs.pop(0)
                if output_attentions:
                    all_attentions += (outputs.pop(0),)
                if crossing:
                    cross_position_bias = outputs.pop(0)
                    if output_attentions:
                        all_cross_attentions += (outputs.pop(0),)
                if output_router_logits:
                    all_router_outputs += (router_outputs,)

        hidden_states = self.dropout(self.final_layer_norm(hidden_states))
        if output_hidden_states:
            all_hidden_states += (hidden_states,)

        output = MoEModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            past_key_values=give_back(cache) if give_back is not None else None,
            hidden_states=all_hidden_states,
            attentions=all_attentions,
            cross_attentions=all_cross_attentions,
            router_probs=all_router_outputs,
        )
        return output if return_dict else output.to_tuple()


def _separate_embeddings(config: SwitchTransformersConfig) -> bool:
    """
    Whether each stack has an embedding of its own, and the output projection is scaled although it is untied.

    This is how the authors' code leaves a merged model (`merge(reading="released")`); no hub checkpoint has the field.
    """
    return getattr(config, "separate_embeddings", False)


SWITCH_TRANSFORMERS_START_DOCSTRING = """

    Save and load it with `save_pretrained` and `from_pretrained`; it is otherwise an ordinary `torch.nn.Module`.

    Args:
        config: a `SwitchTransformersConfig`.
"""

_STACK_ARGUMENTS = """
    Args:
        input_ids: token ids, [batch, tokens].
        attention_mask: 1 at real tokens, 0 at padding, [batch, tokens].
        inputs_embeds: embedded tokens [batch, tokens, d_model], in place of `input_ids`.
        head_mask: 1 keeps and 0 silences an attention head, [heads] or [layers, heads].
        output_attentions, output_hidden_states: whether to return these of every layer.
        output_router_logits: whether to return, a block each, the router's logits and choices.
        return_dict: whether to return an output object rather than a tuple.
"""

SWITCH_TRANSFORMERS_ENCODER_INPUTS_DOCSTRING = _STACK_ARGUMENTS

SWITCH_TRANSFORMERS_INPUTS_DOCSTRING = (
    _STACK_ARGUMENTS
    + """
        decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, decoder_head_mask: the same for the decoder.
        cross_attn_head_mask: like `head_mask`, for the decoder's attention to the encoder.
        encoder_outputs: what the encoder returned, to not run it again.
        past_key_values: a cache of earlier positions; then only the new tokens are fed.
        use_cache: whether to return such a cache.
        cache_position: positions of the tokens fed, [tokens].
"""
)


class _SharedEmbedding:
    """What a model does that has its embedding as `shared` and hands it to its stacks."""

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, new_embeddings):
        if _separate_embeddings(self.config):
            raise ValueError("a model with separate_embeddings has no single input embedding to replace or resize")
        self.shared = new_embeddings
        for stack in self._stacks().values():
            stack.set_input_embeddings(new_embeddings)

    def _tie_weights(self):
        # Also where the output projection is untied: only `shared` is saved, so it must reach the stacks when loaded.
        if not _separate_embeddings(self.config):
            for stack in self._stacks().values():
                self._tie_or_clone_weights(stack.embed_tokens, self.shared)

    def get_encoder(self):
        return self.encoder

    def _prune_heads(self, heads_to_prune):
        self.encoder._prune_heads(heads_to_prune)


def _new_stack(config: SwitchTransformersConfig, shared: nn.Embedding, decoder: bool) -> SwitchTransformersStack:
    """One stack of a model with this configuration; an encoder keeps no cache."""
    config = copy.deepcopy(config)
    config.is_decoder, config.is_encoder_decoder = decoder, False
    config.use_cache = config.use_cache and decoder
    return SwitchTransformersStack(config, shared)


class _SwitchTransformersSeq2Seq(_SharedEmbedding, SwitchTransformersPreTrainedModel):
    """Encoder and decoder over one embedding: what the bare model and the one with a head share."""

    def __init__(self, config: SwitchTransformersConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)

        self.encoder = _new_stack(config, self.shared, decoder=False)
        self.decoder = _new_stack(config, self.shared, decoder=True)
        self.device_map = None

    def get_decoder(self):
        return self.decoder

    def _encode_and_decode(
        self,
        input_ids,
        attention_mask,
        decoder_input_ids,
        decoder_attention_mask,
        head_mask,
        decoder_head_mask,
        cross_attn_head_mask,
        encoder_outputs,
        past_key_values,
        inputs_embeds,
        decoder_inputs_embeds,
        use_cache,
        output_attentions,
        output_hidden_states,
        output_router_logits,
        return_dict,
        cache_position,
    ):
        """Outputs of the encoder (run here unless given) and of the decoder."""
        if head_mask is not None and decoder_head_mask is None:
            if self.config.num_layers == self.config.num_decoder_layers:
                warnings.warn(
                    "head_mask is taken for the decoder as well; to mask heads of the encoder only, give a "
                    "decoder_head_mask of ones",
                    FutureWarning,
                    stacklevel=3,
                )
                decoder_head_mask = head_mask

        asked = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "output_router_logits": output_router_logits,
            "return_dict": return_dict,
        }
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                head_mask=head_mask,
                **asked,
            )
        elif return_dict and not isinstance(encoder_outputs, MoEModelOutput):
            encoder_outputs = MoEModelOutput(
                **dict(
                    zip(
                        ("last_hidden_state", "hidden_states", "attentions", "router_probs"),
                        tuple(encoder_outputs[i] for i in range(len(encoder_outputs))),
                        strict=False,
                    )
                )
            )
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            head_mask=decoder_head_mask,
            cross_attn_head_mask=cross_attn_head_mask,
            use_cache=use_cache,
            cache_position=cache_position,
            **asked,
        )
        return encoder_outputs, decoder_outputs


def _stack_fields(encoder_outputs, decoder_outputs) -> dict:
    """The fields that the two seq2seq output classes have in common."""
    return {
        "past_key_values": decoder_outputs.past_key_values,
        "decoder_hidden_states": decoder_outputs.hidden_states,
        "decoder_attentions": decoder_outputs.attentions,
        "cross_attentions": decoder_outputs.cross_attentions,
        "decoder_router_logits": decoder_outputs.router_probs,
        "encoder_last_hidden_state": encoder_outputs.last_hidden_state,
        "encoder_hidden_states": encoder_outputs.hidden_states,
        "encoder_attentions": encoder_outputs.attentions,
        "encoder_router_logits": encoder_outputs.router_probs,
    }


@add_start_docstrings("Encoder and decoder without a head.", SWITCH_TRANSFORMERS_START_DOCSTRING)
class SwitchTransformersModel(_SwitchTransformersSeq2Seq):
    _tied_weights_keys = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]

    def __init__(self, config: SwitchTransformersConfig):
        super().__init__(config)
        self.post_init()

    @add_start_docstrings_to_model_forward(SWITCH_TRANSFORMERS_INPUTS_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.FloatTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.BoolTensor | None = None,
        head_mask: torch.FloatTensor | None = None,
        decoder_head_mask: torch.FloatTensor | None = None,
        cross_attn_head_mask: torch.Tensor | None = None,
        encoder_outputs: tuple[tuple[torch.FloatTensor]] | None = None,
        past_key_values: tuple[tuple[torch.FloatTensor]] | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.LongTensor | None = None,
    ) -> tuple[torch.FloatTensor] | Seq2SeqMoEModelOutput:
        """
        Returns:
            `Seq2SeqMoEModelOutput`, whose `last_hidden_state` is the decoder's; as a tuple, decoder before encoder.
        """
        config = self.config
        if output_router_logits and config.num_sparse_encoder_layers == 0 and config.num_sparse_decoder_layers == 0:
            raise ValueError("output_router_logits=True, but this model is dense: it has no router to show")
        return_dict = config.use_return_dict if return_dict is None else return_dict
        encoder_outputs, decoder_outputs = self._encode_and_decode(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            head_mask,
            decoder_head_mask,
            cross_attn_head_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            config.use_cache if use_cache is None else use_cache,
            output_attentions,
            output_hidden_states,
            output_router_logits,
            return_dict,
            cache_position,
        )
        if not return_dict:
            return decoder_outputs + encoder_outputs
        return Seq2SeqMoEModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state, **_stack_fields(encoder_outputs, decoder_outputs)
        )


@add_start_docstrings("Encoder and decoder with a language-modelling head.", SWITCH_TRANSFORMERS_START_DOCSTRING)
class SwitchTransformersForConditionalGeneration(_SwitchTransformersSeq2Seq, GenerationMixin):
    _tied_weights_keys = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]

    def __init__(self, config: SwitchTransformersConfig):
        super().__init__(config)
        self.model_dim = config.d_model
        self.lm_head = _Linear(config.d_model, config.vocab_size, bias=False)
        self.router_z_loss_coef = config.router_z_loss_coef
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.post_init()

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_output_embeddings(self):
        return self.lm_head

    @add_start_docstrings_to_model_forward(SWITCH_TRANSFORMERS_INPUTS_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.FloatTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.BoolTensor | None = None,
        head_mask: torch.FloatTensor | None = None,
        decoder_head_mask: torch.FloatTensor | None = None,
        cross_attn_head_mask: torch.Tensor | None = None,
        encoder_outputs: tuple[tuple[torch.Tensor]] | None = None,
        past_key_values: tuple[tuple[torch.Tensor]] | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = True,
        return_dict: bool | None = None,
        cache_position: torch.LongTensor | None = None,
    ) -> tuple[torch.FloatTensor] | Seq2SeqMoEOutput:
        """
            labels: target ids [batch, tokens], -100 where there is none. Without decoder inputs, these are the labels
                shifted right.

        Returns:
            `Seq2SeqMoEOutput`. With labels its `loss` is the mean cross-entropy plus, if `output_router_logits`, the
            router losses of both stacks over all positions; see `router_losses` for those over real tokens only.
        """
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels)
        self.decoder.real_tokens = None
        if labels is not None and self.decoder.usage_counting == "paper":
            partial = decoder_attention_mask is not None and not bool(decoder_attention_mask.all())
            self.decoder.real_tokens = decoder_attention_mask.ne(0) if partial else labels.ne(-100)

        encoder_outputs, decoder_outputs = self._encode_and_decode(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            head_mask,
            decoder_head_mask,
            cross_attn_head_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            self.config.use_cache if use_cache is None else use_cache,
            output_attentions,
            output_hidden_states,
            output_router_logits,
            return_dict,
            cache_position,
        )
        decoded = decoder_outputs[0]
        if self.config.tie_word_embeddings or _separate_embeddings(self.config):
            decoded = decoded * self.model_dim**-0.5
        logits = self.lm_head(decoded)

        z_and_aux = (None,) * 4  # encoder z, encoder balance, decoder z, decoder balance
        if output_router_logits:
            z_and_aux = (
                *self._router_losses("encoder", encoder_outputs[-1]),
                *self._router_losses("decoder", decoder_outputs[-1]),
            )

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.to(logits.device).view(-1))
            if output_router_logits:
                encoder_z, encoder_aux, decoder_z, decoder_aux = z_and_aux
                z_loss = self.router_z_loss_coef * (encoder_z + decoder_z)
                aux_loss = self.router_aux_loss_coef * (encoder_aux + decoder_aux)
                loss = loss + z_loss + aux_loss

        if not return_dict:
            head = (logits, *z_and_aux) if output_router_logits else (logits,)
            output = (*head, *decoder_outputs[1:], *encoder_outputs)
            return output if loss is None else (loss, *output)
        return Seq2SeqMoEOutput(
            loss=loss,
            logits=logits,
            encoder_z_loss=z_and_aux[0],
            encoder_aux_loss=z_and_aux[1],
            decoder_z_loss=z_and_aux[2],
            decoder_aux_loss=z_and_aux[3],
            **_stack_fields(encoder_outputs, decoder_outputs),
        )

    def _router_losses(self, stack: str, router_outputs, token_mask=None) -> tuple:
        """Z and balance loss of a stack; zeros as in stock where all blocks or none are sparse, or no outputs came."""
        if getattr(self.config, f"{stack}_sparse_step") <= 1 or not isinstance(router_outputs, tuple):
            return 0, 0
        return router_losses(router_outputs, token_mask)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate looks at the names of its arguments
    def prepare_inputs_for_generation(self, *args, **kwargs):
        # Decoding has no use for router outputs, and the losses over the encoder's would be computed at every step.
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.setdefault("output_router_logits", False)
        return inputs

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor):
        return self._shift_right(labels)

    @staticmethod
    def caem(models, STmodel, en_num_experts, de_num_experts, num_layers, alpha=1.0, reading="paper"):
        """Fill `STmodel` with the merge of `models`, under the signature of the authors' code; see `caem.fill`."""
        try:
            from .caem import fill
        except ModuleNotFoundError as error:
            raise ImportError(
                f"the method is in another file: copy caem_files/caem.py to {Path(__file__).parent}"
            ) from error
        return fill(models, STmodel, en_num_experts, de_num_experts, num_layers, alpha, reading)


@add_start_docstrings("The encoder alone.", SWITCH_TRANSFORMERS_START_DOCSTRING)
class SwitchTransformersEncoderModel(_SharedEmbedding, SwitchTransformersPreTrainedModel):
    _tied_weights_keys = ["encoder.embed_tokens.weight"]

    def __init__(self, config: SwitchTransformersConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _new_stack(config, self.shared, decoder=False)
        self.device_map = None
        self.post_init()

    @add_start_docstrings_to_model_forward(SWITCH_TRANSFORMERS_ENCODER_INPUTS_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.FloatTensor | None = None,
        head_mask: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = True,
        return_dict: bool | None = None,
    ) -> tuple[torch.FloatTensor] | MoEModelOutput:
        """
        Returns:
            The encoder's output, or without `return_dict` a tuple of its fields that are there.
        """
        return self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_dict=self.config.use_return_dict if return_dict is None else return_dict,
        )
