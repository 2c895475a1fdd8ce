"""The dense model of the embedded run: a small Llama with its own tokenizer, both new, trained on docstrings."""

from types import SimpleNamespace


def new_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer, as Llama's: <pad> 0, <s> 1 before every text, </s> 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def new_llama(c: SimpleNamespace, tokenizer):
    """A LlamaForCausalLM with random weights (seeded before), sized by the constants `base_*`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=c.base_hidden_size, intermediate_size=c.base_intermediate_size,
            num_hidden_layers=c.base_layers, num_attention_heads=c.base_heads, num_key_value_heads=c.base_heads // 2,
            max_position_embeddings=256, tie_word_embeddings=True, initializer_range=c.base_hidden_size**-0.5 / 2,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
