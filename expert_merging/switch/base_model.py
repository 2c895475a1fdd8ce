"""The stand-in for google/switch-base-{8,16} at the small scales: a T5 tokenizer and a Switch Transformer, both new."""

from types import SimpleNamespace


def new_tokenizer(texts: list[str], vocab_size: int):
    """A T5TokenizerFast over a BPE vocabulary of `vocab_size` pieces learnt from `texts`, plus 100 sentinels.

    <pad> is 0, </s> 1 and <unk> 2, and text keeps its spaces as T5's does (NFKC, runs of white space are one). BPE where
    T5 has Unigram: on this text it makes 3.7 characters a token with 8,192 pieces, Unigram 3.3.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import T5TokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    raw.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", raw.token_to_id("</s>"))]
    )
    return T5TokenizerFast(
        tokenizer_object=raw, extra_ids=100, model_max_length=int(1e9), clean_up_tokenization_spaces=False
    )


def new_switch(constants: SimpleNamespace, tokenizer):
    """A SwitchTransformersForConditionalGeneration with random weights (seeded before), set for pre-training."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=len(tokenizer),
            d_model=constants.d_model,
            d_kv=constants.d_kv,
            d_ff=constants.d_ff,
            num_heads=constants.num_heads,
            num_layers=constants.num_layers,
            num_decoder_layers=constants.num_layers,
            num_sparse_encoder_layers=constants.num_layers // 2,
            num_sparse_decoder_layers=constants.num_layers // 2,
            num_experts=constants.num_expert,
            dropout_rate=0.0,
            router_aux_loss_coef=0.01,  # Switch Transformer, section 2.2; with less, so small a router collapses
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    )
