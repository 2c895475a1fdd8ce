"""
Training throughput over the three tasks at Switch-Base's shape on the CPU: what `finetuning` does with an example
(forward and backward, no padding beyond a batch's longest) against the released recipe (stock, all padded to 1,000
input and 200 target tokens, float32). Same weights, the two in turn, dropout and jitter off. Of every batch stock gets half:
padded, its examples all cost the same.

    python benchmarks/training.py [--threads N] [--pairs N]

Checks on a batch of each task that every example's cross-entropy is the same to 1e-4, and stops with status 1 if not.
The optimizer's step, which costs both the same, is left out. Token ids are random, of lengths like the tasks'.
Writes training.json; see layer.py for ratios and clocks. Needs 12 GB of memory.
"""

import sys

import torch
import torch.nn.functional as F
from layer import LAYERS, SHAPE, arguments, models, report, row
from transformers.models.switch_transformers.cpu_kernels import ONEDNN

from expert_merging.data.batches import Size
from expert_merging.data.features import collate
from expert_merging.switch.cross_entropy import token_loss

LENGTHS = {"AG News": (55, 3), "SQuAD": (150, 5), "XSum": (480, 25)}  # mean tokens of inputs and targets
PADDED = (1000, 200)
BATCH = 8  # examples of a task in a pass, as batch_size at scale paper
OF_STOCK = 4  # of these, how many stock gets in a pass: padded they all cost the same


def examples(task: str, rng: torch.Generator) -> list[dict]:
    """A batch of examples of about the task's lengths, similar to one another as `length_grouped` makes them."""
    made = []
    for _ in range(BATCH):
        sizes = [round(mean * (0.95 + 0.1 * torch.rand((), generator=rng).item())) for mean in LENGTHS[task]]
        ids = [torch.randint(2, SHAPE["vocab_size"], (size - 1,), generator=rng).tolist() + [1] for size in sizes]
        made.append({"input_ids": ids[0], "labels": ids[1]})
    return made


def short(batch: list[dict]) -> dict[str, torch.Tensor]:
    return collate(batch, SHAPE["pad_token_id"])


def padded(batch: list[dict]) -> dict[str, torch.Tensor]:
    return collate(batch, SHAPE["pad_token_id"], *PADDED)


def cross_entropies(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of each example, a target token, [batch]."""
    labels = batch["labels"]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(dim=-1) / (labels != -100).sum(dim=-1)


def main() -> None:
    chosen = arguments(__doc__)
    mine, stock = models()
    rng, rows, difference = torch.Generator().manual_seed(1), [], 0.0
    for task in LENGTHS:
        # Of fresh lengths each time, as in training: oneDNN has to prepare itself for every new size.
        batches = [examples(task, rng) for _ in range(chosen.pairs + 1)]
        a, b = (
            cross_entropies(mine, short(batches[0]))[:OF_STOCK],
            cross_entropies(stock, padded(batches[0][:OF_STOCK])),
        )
        difference = max(difference, ((a - b).abs() / b).max().item())
        for_ours, for_stock = iter(batches), iter(batches)

        def ours(made=for_ours) -> None:
            batch = next(made)
            size = Size(BATCH, *(sum(len(one[side]) for one in batch) for side in ("input_ids", "labels")))
            mine.zero_grad(set_to_none=True)
            token_loss(mine, mine, short(batch), size, "paper").backward()

        def theirs(made=for_stock) -> None:
            stock.zero_grad(set_to_none=True)
            stock(**padded(next(made)[:OF_STOCK]), use_cache=False).loss.backward()

        rows.append(row(f"{task}, an example", ours, theirs, chosen.pairs, None, (BATCH, OF_STOCK)))
    sums = {side: sum(one[side] for one in rows) / len(rows) for side in ("ours", "theirs")}
    rows.append(
        {
            "name": "three tasks in equal parts, an example", "ratio": round(sums["theirs"] / sums["ours"], 3),
            "target": 8.0 if ONEDNN else 6.0, "ours": round(sums["ours"], 4), "theirs": round(sums["theirs"], 4), "unit": "s",
            "pairs": chosen.pairs,
        }
    )  # fmt: skip
    report(
        rows, "training", shape=SHAPE, layers=[LAYERS, LAYERS], batch=[BATCH, OF_STOCK], padded=PADDED,
        largest_relative_difference_of_cross_entropy=difference,
    )  # fmt: skip
    print(f"largest relative difference of an example's cross-entropy: {difference:.1e}")
    if not difference <= 1e-4:
        sys.exit("an example's cross-entropy is not that of the released recipe")


if __name__ == "__main__":
    main()
