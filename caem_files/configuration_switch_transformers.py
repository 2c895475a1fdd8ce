# Licensed under the Apache License, Version 2.0: see the LICENSE file, or http://www.apache.org/licenses/LICENSE-2.0
"""Configuration of Switch Transformers, a drop-in for the file of the same name in transformers 4.46.3."""

from ...configuration_utils import PretrainedConfig

CAEM_PATCH = "1"  # read as text by install.py, to tell this file from the stock one


def _sparse_step(num_layers: int, num_sparse_layers: int) -> int:
    """Distance between sparse blocks; without sparse layers the depth, which (as in stock) leaves block 1 sparse."""
    return num_layers // num_sparse_layers if num_sparse_layers > 0 else num_layers


class SwitchTransformersConfig(PretrainedConfig):
    """
    Shape and settings of a Switch Transformer (Fedus et al., 2021, https://arxiv.org/abs/2101.03961).

    The fields and defaults are those of google/switch-base-8 in transformers 4.46.3, so that a `config.json` from the
    hub loads unchanged. Fields given besides (for instance `encoder_sparse_step`, which hub files carry) override what
    is computed here.

    Args:
        vocab_size: rows of the embedding and of the output projection.
        d_model, d_kv, d_ff, num_heads: widths of the stream, of one head, of the feed-forward layers; heads a layer.
        num_layers, num_decoder_layers: blocks of the encoder and of the decoder (`None`: as many as the encoder).
        num_sparse_encoder_layers, num_sparse_decoder_layers: how many of these have experts. Blocks i with
            `i % step == 1` are sparse, where `step` (`encoder_sparse_step`, `decoder_sparse_step`) is the quotient.
        num_experts: experts of every sparse layer.
        expert_capacity: most tokens that an expert takes from one sequence; later ones bypass it.
        router_bias, router_jitter_noise, router_dtype: bias of the router's classifier; half-width of the uniform
            factor on its input in training; its precision ("float32", "float16" or "bfloat16").
        router_ignore_padding_tokens, add_router_probs: kept for compatibility; no code reads them.
        router_z_loss_coef, router_aux_loss_coef: weights of the two router losses.
        relative_attention_num_buckets, relative_attention_max_distance: T5's relative position bias.
        dropout_rate, layer_norm_epsilon, initializer_factor, dense_act_fn, use_cache: as in T5.

    Raises:
        ValueError: `router_dtype` is none of the three.
    """

    model_type = "switch_transformers"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}

    def __init__(
        self,
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=2048,
        expert_capacity=64,
        num_layers=12,
        num_sparse_encoder_layers=3,
        num_decoder_layers=12,
        num_sparse_decoder_layers=3,
        num_heads=12,
        num_experts=8,
        router_bias=False,
        router_jitter_noise=0.01,
        router_dtype="float32",
        router_ignore_padding_tokens=False,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.1,
        layer_norm_epsilon=1e-6,
        router_z_loss_coef=0.001,
        router_aux_loss_coef=0.001,
        initializer_factor=1.0,
        dense_act_fn="relu",
        is_encoder_decoder=True,
        add_router_probs=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=1,
        **kwargs,
    ):
        if router_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"router_dtype must be one of float32, float16, bfloat16, not {router_dtype!r}")

        self.vocab_size = vocab_size
        self.d_model = d_model
        self.d_kv = d_kv
        self.d_ff = d_ff
        self.num_heads = num_heads

        self.num_layers = num_layers
        self.num_decoder_layers = num_layers if num_decoder_layers is None else num_decoder_layers
        self.num_sparse_encoder_layers = num_sparse_encoder_layers
        self.num_sparse_decoder_layers = num_sparse_decoder_layers
        self.encoder_sparse_step = _sparse_step(self.num_layers, num_sparse_encoder_layers)
        self.decoder_sparse_step = _sparse_step(self.num_decoder_layers, num_sparse_decoder_layers)

        self.num_experts = num_experts
        self.expert_capacity = expert_capacity
        self.router_bias = router_bias
        self.router_jitter_noise = router_jitter_noise
        self.router_dtype = router_dtype
        self.router_ignore_padding_tokens = router_ignore_padding_tokens
        self.router_z_loss_coef = router_z_loss_coef
        self.router_aux_loss_coef = router_aux_loss_coef
        self.add_router_probs = add_router_probs

        self.relative_attention_num_buckets = relative_attention_num_buckets
        self.relative_attention_max_distance = relative_attention_max_distance
        self.dropout_rate = dropout_rate
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_factor = initializer_factor
        self.dense_act_fn = dense_act_fn
        self.use_cache = use_cache

        super().__init__(
            pad_token_id=pad_token_id, eos_token_id=eos_token_id, is_encoder_decoder=is_encoder_decoder, **kwargs
        )
