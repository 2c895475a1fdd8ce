"""The dense model that becomes a mixture: the user's, or at the scales tiny and night a Llama trained here on docstrings."""

import random
from pathlib import Path
from types import SimpleNamespace

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder, read_json
from expert_merging.hemoe import pipeline
from expert_merging.hemoe.examples import read_examples
from expert_merging.hemoe.pipeline import seed_folder


def base(c: SimpleNamespace) -> None:
    """A small Llama trained on the instruction data and on the docstrings' text."""
    if not pipeline.makes_base(c):
        return
    from expert_merging.hemoe import small_llama, tuning

    data, folder = Path(c.HEMOE_DIR) / "data", seed_folder(c) / "base"
    wanted, work = pipeline.identity(c, "base"), folder.with_suffix(".run")
    if pipeline.is_done(folder / "base.json", wanted, work, claim=folder):
        return

    from expert_merging.run.devices import make_accelerator
    from expert_merging.training import checkpoints

    device = make_accelerator(c).device
    texts, tasks = read_json(data / "texts.json"), read_examples(data / "train")
    answers = [f"{one['instruction']} {one['output']}" for one in tasks]
    tokenizer = small_llama.new_tokenizer([*texts, *answers], c.base_vocab_size)
    # Half of what training sees is running text, half are the tasks' examples, instruction and output.
    rng, half, stream = random.Random(c.seed), c.base_steps * c.base_batch // 2, []
    for text in rng.sample(texts, len(texts)):
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(stream) >= half * c.base_tokens:
            break
    rows = [stream[i : i + c.base_tokens] for i in range(0, len(stream) - c.base_tokens + 1, c.base_tokens)]
    seen = rng.sample(tasks, min(half, len(tasks)))
    rows += [tuning.encode(tokenizer, one, c.base_tokens)["input_ids"] for one in seen]
    model = small_llama.new_llama(c, tokenizer)
    checkpoints.claim(work, wanted)
    fitted = tuning.fit(
        model, [{"input_ids": row, "labels": row} for row in rows], tokenizer.pad_token_id, work, steps=c.base_steps,
        batch_size=c.base_batch, lr=c.base_lr, seed=c.seed, on_cpu=device.type == "cpu", label="base model",
    )  # fmt: skip
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        record = {"training": fitted, "parameters": model.num_parameters()}
        pipeline.save(c, temporary / "base.json", wanted, record)
    checkpoints.release(work)
    print(f"base model: {model.num_parameters():,} parameters, loss {fitted['loss']:.3f} nats a token")


def load_dense(c: SimpleNamespace):
    """(dense model in float32, tokenizer)."""
    from expert_merging.core.host_memory import begin_anew
    from expert_merging.core.hub import first_line, local_folder, offline_if_unreachable

    begin_anew()
    folder = local_folder(c.base_model, "base_model")
    if folder is None:
        offline_if_unreachable()
    import torch
    from transformers import AutoModelForCausalLM

    from caem_files import cpu_kernels
    from expert_merging.hemoe.gated_ffn import gated_ffns

    try:
        tokenizer = tokenizer_of(c)
        model = AutoModelForCausalLM.from_pretrained(folder or c.base_model, torch_dtype=torch.float32)
    except Exception as error:  # a file cut short surfaces as whatever its reader raises
        raise UserError(
            f"base_model: {c.base_model} holds no whole model and tokenizer ({first_line(error)})"
        ) from error
    try:
        gated_ffns(model)  # refuses another kind of model
    except ValueError as error:
        raise UserError(f"base_model: {error}") from error
    if c.prompts == "chat" and not tokenizer.chat_template:
        raise UserError(f"prompts is chat, but the tokenizer of {c.base_model} has no chat template; make it plain")
    pipeline.check_layers(c, model.config.num_hidden_layers)
    return cpu_kernels.use_in(model), tokenizer


def tokenizer_of(c: SimpleNamespace):
    """The dense model's tokenizer, with something to pad with."""
    from transformers import AutoTokenizer

    from expert_merging.core.hub import local_folder

    tokenizer = AutoTokenizer.from_pretrained(local_folder(c.base_model, "base_model") or c.base_model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
