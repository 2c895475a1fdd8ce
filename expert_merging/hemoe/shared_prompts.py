"""lm_eval's way to read a causal language model, but a prompt is read once for all the answers that may follow it.

Prompt and answers lie in one row; an answer's tokens see the prompt and themselves, and count their places from the prompt's
end. The numbers are those of a row an answer, but for rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from expert_merging.hemoe.output_matrix import logits_at

TOKENS = 2048  # of a forward pass, padding counted
FAMILIES = ("llama",)  # whose attention takes a mask for each pair of tokens, and no window


@dataclass
class Row:
    """A prompt with the answers that follow it, each with the number of its request."""

    prompt: list[int]
    answers: list[tuple[int, list[int]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(answer) for _, answer in self.answers)

    def foretold(self) -> Iterator[int]:
        """Where the tokens of its answers are foretold, one answer after another."""
        start = len(self.prompt)
        for _, answer in self.answers:
            yield from (len(self.prompt) - 1, *range(start, start + len(answer) - 1))
            start += len(answer)


class SharedPrompts(HFLM):
    """`HFLM` for the requests of multiple-choice tasks; `bar` counts answers."""

    def __init__(self, bar: Any, **settings: Any):
        super().__init__(**settings)
        self.bar = bar

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the likeliest at every token) of each ((texts), prompt's ids, answer's ids)."""
        found: list[tuple[float, bool] | None] = [None] * len(requests)
        rows = rows_of(requests, self.max_length)
        self.bar.reset(total=len(requests))
        for batch in batches(rows):
            for number, result in self._read(batch):
                found[number] = result
                self.bar.update()
        return found  # type: ignore[return-value]  # every request is in a row

    @torch.inference_mode()
    def _read(self, rows: Sequence[Row]) -> Iterator[tuple[int, tuple[float, bool]]]:
        ids, positions, seen = inputs_of(rows)
        dtype = next(self.model.parameters()).dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        places = [(at, column) for at, row in enumerate(rows) for column in row.foretold()]
        with logits_at(self.model, *torch.tensor(places, device=self.device).T):
            (logits,) = self.model(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False,
                position_ids=positions.to(self.device),
            ).logits  # fmt: skip
        answers = [of for row in rows for of in row.answers]
        for (number, answer), own in zip(answers, logits.split([len(answer) for _, answer in answers]), strict=True):
            wanted = torch.tensor(answer, device=logits.device)
            told = own.float().log_softmax(-1)
            likelihood = told.gather(-1, wanted[:, None]).sum().item()
            yield number, (likelihood, bool((told.argmax(-1) == wanted).all()))


def rows_of(requests: Sequence[tuple], longest: int) -> list[Row]:
    """The requests by prompt. A prompt that leaves no room for its longest answer in `longest` tokens loses its start."""
    rows: dict[tuple[int, ...], Row] = {}
    for number, (_, prompt, answer) in enumerate(requests):
        rows.setdefault(tuple(prompt), Row(list(prompt))).answers.append((number, list(answer)))
    for row in rows.values():
        room = longest - max(len(answer) for _, answer in row.answers)
        row.prompt = row.prompt[-max(room, 1) :]
    return list(rows.values())


def batches(rows: Sequence[Row], tokens: int = TOKENS) -> Iterator[list[Row]]:
    """Rows of like length together, the longest first, at most `tokens` a batch; a longer row is alone."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row)):
        if batch and len(batch[0]) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def inputs_of(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, places of the tokens [rows, tokens]; which token sees which, bool [rows, tokens, tokens]), padded to the
    longest; padding sees itself alone."""
    length = max(map(len, rows))
    ids, positions = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
    part = torch.full((len(rows), length), -1)  # 0 the prompt, 1, 2, ... its answers
    for number, row in enumerate(rows):
        of_row = [row.prompt, *(answer for _, answer in row.answers)]
        filled = slice(0, len(row))
        ids[number, filled] = torch.tensor([token for tokens in of_row for token in tokens])
        part[number, filled] = torch.tensor([p for p, tokens in enumerate(of_row) for _ in tokens])
        first = [0, *([len(row.prompt)] * len(row.answers))]
        places = [start + place for start, tokens in zip(first, of_row, strict=True) for place in range(len(tokens))]
        positions[number, filled] = torch.tensor(places)
    before = torch.ones(length, length, dtype=torch.bool).tril()
    alike = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    return ids, positions, before & alike & (part[:, :, None] >= 0) | torch.eye(length, dtype=torch.bool)
