"""Expert usage of a fine-tuned model on validation, counted both ways and with inputs cut (tools/count_expert_usage.py)."""

from types import SimpleNamespace
from typing import Any

from expert_merging.data.tasks import get_task
from expert_merging.switch import decoding, usage


def rows(
    c: SimpleNamespace, accelerator, model, task: str, examples, tokenizer, lengths: list[int]
) -> list[dict[str, Any]]:
    """For each of `lengths` (tokens) and way of counting: the tokens that every expert got, entropies and scores.

    An input that is longer than a length keeps its first tokens and the end token, as if the limit had been lower.
    """
    found = []
    for length in lengths:
        ids = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in examples["input_ids"]]
        cut = examples.remove_columns("input_ids").add_column("input_ids", ids)
        for counting in ("paper", "released"):
            reading = SimpleNamespace(**vars(c) | {"reading": "paper+counts" if counting == "released" else "paper"})
            model.set_usage_counting(counting)
            model.reset_expert_usage()
            label = f"{task}, {length} tokens, {counting}"
            scores, _ = decoding.evaluate_task(model, cut, get_task(task), tokenizer, reading, accelerator, label)
            counted = usage.read_usage(model, accelerator)
            entropy = {stack: usage.layer_entropies(grid) for stack, grid in counted.items()}
            found.append({
                "input_length": length, "mean_length": round(sum(map(len, ids)) / len(ids), 3),
                "counting": counting, "usage": counted, "scores": scores, "entropy": entropy,
            })  # fmt: skip
            means = ", ".join(f"{stack} {sum(h) / len(h):.4f}" for stack, h in entropy.items())
            accelerator.print(f"{label}: mean entropy {means}")
    return found
