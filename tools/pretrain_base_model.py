"""0 (only for the scales tiny and small): make the base model that stands in for google/switch-base-{8,16}.

Reads   the docstrings of the installed packages (training split only; expert_merging/data/docstring_reader.py).
Writes  BASE_MODEL_PATH: a Switch Transformer pre-trained on span corruption, with its own tokenizer, as an ordinary
        Hugging Face folder (weights in float16), and beside the weights pretraining.json and pretraining.png.
Takes   at tiny about twenty minutes on 2 CPU cores. The tiny bases come with the repository: you need not run this.
"""

from expert_merging.core.scales import by_scale
from expert_merging.run.constants import run

num_expert = 8  # experts in each sparse layer
vocab_size = by_scale(paper=32000, small=16000, tiny=8192)  # without T5's 100 sentinels
d_model = by_scale(paper=768, small=512, tiny=128)
d_ff = by_scale(paper=3072, small=1024, tiny=320)
num_layers = by_scale(paper=12, small=6, tiny=4)  # in the encoder and in the decoder; every second one is sparse
num_heads = by_scale(paper=12, small=8, tiny=4)
d_kv = by_scale(paper=64, small=64, tiny=32)
chunk_tokens = by_scale(paper=512, small=256, tiny=160)  # length of a text before corruption
batch_chunks = by_scale(paper=64, small=128, tiny=32)  # chunks a step
num_rounds = by_scale(paper=100, small=40, tiny=4)  # the held-out loss is measured after each
steps_per_round = by_scale(paper=1000, small=500, tiny=500)
pretraining_lr = 0.02  # peak, times the size of a tensor; linear warm-up over the first half round, then cosine
heldout_texts = 400  # kept out of pre-training, for the curve


def main(c):
    import math
    import time
    from pathlib import Path

    import numpy as np
    import torch

    from expert_merging.core.files import new_folder, write_json
    from expert_merging.data import docstring_reader, docstring_splits
    from expert_merging.report import figures
    from expert_merging.run import provenance
    from expert_merging.run.devices import make_accelerator
    from expert_merging.switch.base_model import new_switch, new_tokenizer
    from expert_merging.switch.span_corruption import corrupt_spans
    from expert_merging.training import checkpoints, loop

    base = Path(c.BASE_MODEL_PATH.format(experts=c.num_expert))
    work = Path(f"{base}.run")
    if (base / "pretraining.json").exists():
        print(f"{base} is there already; remove it to pre-train again")
        checkpoints.release(work)
        return
    accelerator = make_accelerator(c)
    identity = {name: value for name, value in vars(c).items() if name in globals() or name in ("seed", "scale")}

    texts = docstring_splits.pretraining_texts(docstring_reader.read_docstrings())
    order = np.random.default_rng(c.seed).permutation(len(texts))
    heldout, kept = [texts[i] for i in order[: c.heldout_texts]], [texts[i] for i in order[c.heldout_texts :]]
    identity["text_sha256"] = docstring_reader.corpus_hash(texts)
    checkpoints.claim(work, identity)

    tokenizer = new_tokenizer(kept, c.vocab_size)
    end, sentinels = (
        tokenizer.eos_token_id,
        np.array(tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])),
    )

    def encode(some):
        return [np.array(ids) for ids in tokenizer(some, truncation=False)["input_ids"]]  # each ends with </s>

    def batches(documents, number, rng):
        """`number` batches of corrupted chunks; documents in random order, end to end, cut without regard to their ends."""
        stream, chunks = [], []
        while len(chunks) < number * c.batch_chunks:
            stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
            cut = stream[: len(stream) // c.chunk_tokens * c.chunk_tokens].reshape(-1, c.chunk_tokens)
            chunks.extend(cut[rng.permutation(len(cut))])
        for start in range(0, number * c.batch_chunks, c.batch_chunks):
            pairs = [corrupt_spans(chunk, sentinels, end, rng) for chunk in chunks[start : start + c.batch_chunks]]
            yield {"input_ids": np.stack([p[0] for p in pairs]), "labels": np.stack([p[1] for p in pairs])}

    train_documents, heldout_documents = encode(kept), encode(heldout)
    tokens = sum(map(len, train_documents))
    heldout_batches = list(batches(heldout_documents, 8, np.random.default_rng(0)))
    model = new_switch(c, tokenizer)
    accelerator.print(f"{len(kept)} texts, {tokens / 1e6:.2f}M tokens; {model.num_parameters() / 1e6:.2f}M parameters")

    def steps_of(number):
        return [
            [batch] for batch in batches(train_documents, c.steps_per_round, np.random.default_rng([c.seed, number]))
        ]

    def loss_of(model, batch):
        batch = {name: torch.tensor(ids, device=accelerator.device) for name, ids in batch.items()}
        return model(**batch).loss, len(batch["labels"])  # with the router losses: nothing is padded here

    def after_round(number):
        model.eval()
        with torch.inference_mode():
            losses = []
            for batch in heldout_batches:
                batch = {name: torch.tensor(ids, device=accelerator.device) for name, ids in batch.items()}
                logits = model(**batch).logits
                losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item())
        loss = sum(losses) / len(losses)
        accelerator.print(f"round {number + 1}: held-out cross-entropy {loss:.4f} nats a target token")
        return {"selection": -loss, "heldout_loss": loss}

    def schedule(number, step):
        done = (number * c.steps_per_round + step + 1) / (c.num_rounds * c.steps_per_round)
        return min(1.0, 2 * done * c.num_rounds) * 0.5 * (1 + math.cos(math.pi * done))

    started = time.strftime("%Y-%m-%d")
    # T5's initial weights differ in size by a factor of 60; one rate for all would be too slow for the embedding and too
    # fast for the queries. So a tensor's rate follows its size, as Adafactor has it (Shazeer and Stern, 2018, section 8).
    groups = [{"params": [p], "lr": c.pretraining_lr * p.square().mean().sqrt().item()} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    history = loop.train(
        accelerator, model, optimizer, num_epochs=c.num_rounds, steps_of=steps_of, loss_of=loss_of, after_epoch=after_round,
        folder=work, checkpoint_minutes=c.checkpoint_minutes, max_grad_norm=1.0, schedule=schedule, label="pre-training",
    )  # fmt: skip

    if accelerator.is_main_process:
        record = {
            "command": provenance.command(), "date": started, "constants": identity, "versions": provenance.versions(),
            "texts": len(kept), "tokens": tokens, "parameters": model.num_parameters(), "history": history,
        }  # fmt: skip
        with new_folder(base) as folder:
            best = type(model).from_pretrained(checkpoints.best_folder(work, history))
            best.config.router_aux_loss_coef = 0.001  # of fine-tuning, as in Switch-Base
            if c.scale != "tiny":  # where epochs are few and random numbers cost a third of the time
                best.config.dropout_rate = 0.1
            best.half().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            figures.pretraining_curve(history, folder / "pretraining.png", c.steps_per_round)
            write_json(folder / "pretraining.json", record)
        checkpoints.release(work)
        print(f"wrote {base}")


if __name__ == "__main__":
    run(main, globals())
