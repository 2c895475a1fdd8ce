"""Where a LLaMA-style model keeps its FFNs: W_down (silu(W_gate x) * (W_up x)), without biases.

Goes along with saved mixtures, so it imports nothing of ours.
"""

CHECKED = ("llama", "mistral", "qwen2")  # config.model_type


def gated_ffns(model) -> list:
    """The modules gate_proj, up_proj and down_proj hang on, by layer, of a Llama, Mistral or Qwen2 for causal LM.

    Raises ValueError for another kind of model, and for biases in the FFN, which experts cannot share.
    """
    kind = model.config.model_type
    if kind not in CHECKED or not hasattr(model, "lm_head"):
        raise ValueError(f"{type(model).__name__} ({kind}) is none of the decoders HEMoE knows: {', '.join(CHECKED)}")
    ffns = [layer.mlp for layer in model.model.layers]
    if any(part.bias is not None for ffn in ffns for part in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)):
        raise ValueError(f"the FFNs of this {kind} have biases (mlp_bias), which experts cannot share")
    return ffns
