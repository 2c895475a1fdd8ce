"""Pre-training the stand-in for google/switch-base-{8,16} on span corruption (Raffel et al. 2020, 3.1.4)."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder, read_json, write_json
from expert_merging.data import docstring_reader, docstring_splits, documentation
from expert_merging.run import results
from expert_merging.switch.base_model import new_tokenizer
from expert_merging.switch.idle_experts import pass_over_idle
from expert_merging.switch.span_corruption import corrupt_spans
from expert_merging.switch.usage import STACKS, layer_entropies, read_usage
from expert_merging.training import checkpoints, loop

DECAY = 0.3  # share of the steps at the end in which the rate falls to 0, in a line


class Corpus:
    """The text as tokens: `docstrings`, `extra` and `heldout` are lists of documents, arrays of ids that end with </s>.

    `facts` are what to note of it: hashes of the text, and texts and tokens of each source.
    """

    def __init__(self, tokenizer, parts: dict[str, list[np.ndarray]], facts: dict[str, Any]):
        self.tokenizer, self.facts = tokenizer, facts
        self.docstrings, self.extra, self.heldout = (parts[name] for name in ("docstrings", "extra", "heldout"))


def is_done(base: Path, wanted: dict[str, Any], work: Path) -> bool:
    """Whether the folder `base` holds what pre-training with these constants gives; then the working folder goes.

    Raises UserError where it holds something else.
    """
    record = base / "pretraining.json"
    if base.exists() and not record.exists():
        raise UserError(f"BASE_MODEL_PATH: {base} is there, and was not pre-trained here; name another folder")
    if not record.exists():
        return False
    noted = results.without(results.made_with(read_json(record)), ("scale",))  # which says no more than its constants
    results.refuse(base, *results.shared(noted, wanted), "restore them, or choose another BASE_MODEL_PATH")
    print(f"{base} is there already; remove it to pre-train again")
    checkpoints.release(work)
    return True


def corpus(c: SimpleNamespace, folder: Path) -> Corpus:
    """Read and tokenise the text once; it is kept in `folder` for when the run goes on.

    The tokenizer is learnt from the docstrings; `c.heldout_texts` of them are kept out. Text of `c.extra_text`, a folder of
    unpacked packages (or empty), comes without any sentence of those and of validation and test docstrings. Raises
    UserError where that folder holds no package.
    """
    from transformers import AutoTokenizer

    place = str(Path(c.extra_text).absolute()) if c.extra_text else ""
    if (folder / "facts.json").exists():
        noted = folder / "extra_text.json"  # which earlier versions did not write
        if noted.exists() and (was := read_json(noted)) != place:
            raise UserError(
                f"extra_text: this run was begun with {was or 'none'}; restore that, or remove {folder.parent}"
            )
    else:
        docs = docstring_reader.read_docstrings()
        texts = docstring_splits.pretraining_texts(docs)
        order = np.random.default_rng(c.seed).permutation(len(texts))
        heldout, kept = [texts[i] for i in order[: c.heldout_texts]], [texts[i] for i in order[c.heldout_texts :]]
        extra = documentation.read(Path(c.extra_text), documentation.held_back(docs, heldout)) if c.extra_text else {}
        tokenizer = new_tokenizer(kept, c.vocab_size)
        facts: dict[str, Any] = {"text_sha256": docstring_reader.corpus_hash(texts), "sources": {}}
        if extra:
            facts["extra_text_sha256"] = docstring_reader.corpus_hash(extra)
        with new_folder(folder) as temporary:
            tokenizer.save_pretrained(temporary)
            parts: dict[str, list[np.ndarray]] = {"heldout": _encoded(heldout, tokenizer), "extra": []}
            parts["docstrings"] = _encoded(kept, tokenizer)
            for name, of_source in {"docstrings": kept, **extra}.items():
                documents = parts["docstrings"] if name == "docstrings" else _encoded(of_source, tokenizer)
                facts["sources"][name] = {"texts": len(documents), "tokens": sum(map(len, documents))}
                if name != "docstrings":
                    parts["extra"] += documents
            for name, documents in parts.items():
                np.save(temporary / f"{name}.npy", np.concatenate([*documents, np.array([], dtype=np.int32)]))
                np.save(
                    temporary / f"{name}_ends.npy", np.cumsum([len(document) for document in documents], dtype=np.int64)
                )
            write_json(temporary / "extra_text.json", place)
            write_json(temporary / "facts.json", facts)
    saved = {}
    for name in ("docstrings", "extra", "heldout"):
        tokens, ends = np.load(folder / f"{name}.npy", mmap_mode="r"), np.load(folder / f"{name}_ends.npy")
        saved[name] = [tokens[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)] if len(ends) else []
    return Corpus(AutoTokenizer.from_pretrained(folder), saved, read_json(folder / "facts.json"))


def _encoded(texts: list[str], tokenizer) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.int32) for ids in tokenizer(texts, truncation=False)["input_ids"]]


def batches(
    documents: list[np.ndarray], number: int, c: SimpleNamespace, tokenizer, rng
) -> Iterator[dict[str, np.ndarray]]:
    """`number` batches of `c.batch_chunks` corrupted chunks of `c.chunk_tokens`, {"input_ids", "labels"}: [chunks, tokens].

    Documents come in random order, end to end, cut without regard to their ends.
    """
    end = tokenizer.eos_token_id
    sentinels = np.array(tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)]))
    chunks: list[np.ndarray] = []
    while len(chunks) < number * c.batch_chunks:
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))]).astype(np.int64)
        cut = stream[: len(stream) // c.chunk_tokens * c.chunk_tokens].reshape(-1, c.chunk_tokens)
        chunks.extend(cut[rng.permutation(len(cut))])
    for start in range(0, number * c.batch_chunks, c.batch_chunks):
        pairs = [corrupt_spans(chunk, sentinels, end, rng) for chunk in chunks[start : start + c.batch_chunks]]
        yield {"input_ids": np.stack([p[0] for p in pairs]), "labels": np.stack([p[1] for p in pairs])}


def steps_of_round(number: int, text: Corpus, c: SimpleNamespace) -> list[list[dict[str, np.ndarray]]]:
    """The steps of a round, a batch each: the share `c.docstring_share` of docstrings, spread out among the others."""
    rng = np.random.default_rng([c.seed, number])
    if not text.extra:
        return [[batch] for batch in batches(text.docstrings, c.steps_per_round, c, text.tokenizer, rng)]
    of_docstrings = round(c.docstring_share * c.steps_per_round)
    steps = [[batch] for batch in batches(text.docstrings, of_docstrings, c, text.tokenizer, rng)]
    steps += [[batch] for batch in batches(text.extra, c.steps_per_round - of_docstrings, c, text.tokenizer, rng)]
    return [steps[i] for i in rng.permutation(len(steps))]


def rate(done: float, rounds: int) -> float:
    """The factor on the learning rate when the share `done` of all steps is done: up within half a round, then 1, then
    down to 0 over the last DECAY."""
    return min(1.0, 2 * done * rounds, (1 - done) / DECAY)


def pretrain(c: SimpleNamespace, accelerator, model, text: Corpus, work: Path) -> list[dict[str, Any]]:
    """Pre-train `model` in place for `c.num_rounds` rounds; returns the history, a record a round.

    Each has the cross-entropy on held-out text in nats a target token, and the normalised entropy of the experts' usage
    there, {stack: [sparse layer]}.
    """
    heldout = list(batches(text.heldout, 8, c, text.tokenizer, np.random.default_rng(0)))

    def on_device(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(ids, device=accelerator.device) for name, ids in batch.items()}

    def loss_of(model, batch) -> tuple[torch.Tensor, int]:
        return model(**on_device(batch)).loss, len(batch["labels"])  # with the router losses: nothing is padded here

    def after_round(number: int) -> dict[str, Any]:
        model.eval()
        model.reset_expert_usage()
        model.set_usage_counting("paper")
        losses = []
        with torch.inference_mode():
            for batch in map(on_device, heldout):
                logits = model(**batch).logits
                losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item())
        usage = read_usage(model, accelerator)
        model.set_usage_counting(None)
        loss = sum(losses) / len(losses)
        entropy = {stack: layer_entropies(usage[stack]) for stack in STACKS}
        accelerator.print(
            f"round {number + 1}: held-out cross-entropy {loss:.4f} nats a target token; entropy {entropy}"
        )
        return {"selection": -loss, "heldout_loss": loss, "entropy": entropy}

    # T5's initial weights differ in size by a factor of 60; one rate for all would be too slow for the embedding and too
    # fast for the queries. So a tensor's rate follows its size, as Adafactor has it (Shazeer and Stern, 2018, section 8).
    groups = [{"params": [p], "lr": c.pretraining_lr * math.sqrt(p.square().mean().item())} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    pass_over_idle(model, optimizer)
    return loop.train(
        accelerator, model, optimizer, num_epochs=c.num_rounds, steps_of=lambda number: steps_of_round(number, text, c),
        loss_of=loss_of, after_epoch=after_round, folder=work, checkpoint_minutes=c.checkpoint_minutes, max_grad_norm=1.0,
        schedule=lambda number, step: rate((number + step / c.steps_per_round) / c.num_rounds, c.num_rounds),
        label="pre-training",
    )  # fmt: skip


def said(text: Corpus) -> str:
    """The size of the text, for people."""
    tokens = {name: source["tokens"] for name, source in text.facts["sources"].items()}
    return (
        f"{tokens['docstrings'] / 1e6:.2f}M tokens of docstrings, {sum(map(len, text.extra)) / 1e6:.2f}M of other texts"
    )


def save_best(c: SimpleNamespace, best: Path, tokenizer, folder: Path) -> None:
    """The weights in `best` as a Hugging Face folder in float16, set for fine-tuning."""
    from transformers import SwitchTransformersForConditionalGeneration

    model = SwitchTransformersForConditionalGeneration.from_pretrained(best)
    model.config.router_aux_loss_coef = 0.001  # as in Switch-Base
    if c.scale == "paper":  # at the others epochs are few and random numbers cost a third of the time
        model.config.dropout_rate = 0.1
    model.config._name_or_path = ""  # not where the checkpoint lay
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
