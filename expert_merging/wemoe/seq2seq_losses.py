"""What test-time adaptation of a model that writes text minimises, on inputs alone: the uncertainty of its own answers.

    first_token          entropy of the first token of the answer
    verbalizer           the same among the first tokens of the task's possible answers only (classification)
    self_generated       mean entropy of the tokens of the model's own greedy answer, its end included
    exact_em             entropy of the whole answer, estimated from one sampled answer; experimental
    teacher_forced_gold  cross-entropy of the true answer: an oracle, not test-time adaptation; to be named so wherever shown

Each is a mean over examples, divided by the logarithm of the number of choices, so that a task with six answers does not
vanish beside one with a vocabulary (`exact_em`: so many to the power of the answer's longest length). The answer of
`self_generated` is a constant to the gradient: what is minimised is the entropy of the tokens along it, not of the answer as
a whole. That is the expected sum of token entropies H_t along sampled answers y, and its gradient the expectation of
grad sum_t H_t + sum_t (sum_{s>t} H_s) grad log p(y_t): the second term, a policy gradient, is what `exact_em` adds
(arXiv 2605.08186).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from expert_merging.core.errors import UserError
from expert_merging.data.features import collate
from expert_merging.wemoe.adaptation import batch_at, entropy

KINDS = ("first_token", "verbalizer", "self_generated", "exact_em", "teacher_forced_gold")


class AnswerLoss:
    """A loss for `adaptation.adapt`: (task, step) -> (scalar, mean prediction at the answer's first token).

    Args:
        call: the model, or what stands for it, as `model(input_ids=..., attention_mask=..., decoder_input_ids=...)`.
        model: for its config; and `writing()` gives the model that `generate` can be called on, with the current weights.
        kinds: of each task, one of KINDS.
        data: of each task features (input_ids, labels); labels are looked at by teacher_forced_gold only.
        answers: of each task with `verbalizer` the first tokens of its answers, see `first_tokens`.
        tokens: of the model's own answer, at most.
    """

    def __init__(
        self, call: Callable[..., Any], model: nn.Module, writing: Callable[[], nn.Module], kinds: Mapping[str, str],
        data: Mapping[str, Any], answers: Mapping[str, Sequence[int]], batch_size: int, seed: int, tokens: int = 16,
    ):  # fmt: skip
        for task, kind in kinds.items():
            if kind not in KINDS:
                raise UserError(f"the loss of {task} is {kind!r}; it must be one of {', '.join(KINDS)}")
        self.call, self.model, self.writing, self.kinds, self.data = call, model, writing, kinds, data
        self.answers, self.batch_size, self.seed, self.tokens = answers, batch_size, seed, tokens
        self.columns = {task: (data[task]["input_ids"], data[task]["labels"]) for task in kinds}

    def __call__(self, task: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = self.columns[task]
        rows = batch_at(step, len(inputs), self.batch_size, self.seed)
        examples = [{"input_ids": inputs[row], "labels": labels[row]} for row in rows]
        batch = collate(examples, self.model.config.pad_token_id)
        batch = {key: tensor.to(self.model.device) for key, tensor in batch.items()}
        gold = batch.pop("labels")
        kind = self.kinds[task]
        if kind == "self_generated":
            return self._entropy_of_tokens(batch, self._written(batch, do_sample=False))
        if kind == "exact_em":
            with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
                torch.manual_seed(1_000_003 * self.seed + step)  # a step sees the same, also in a run that goes on
                written = self._written(batch, do_sample=True, top_k=0)
            return self._entropy_of_answer(batch, written)
        if kind == "teacher_forced_gold":
            logits = self._logits(batch, self.model.prepare_decoder_input_ids_from_labels(gold))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), gold.flatten(), ignore_index=-100)
            return loss / math.log(logits.shape[-1]), _mean_prediction(logits[:, 0])
        start = torch.full((len(rows), 1), self.model.config.decoder_start_token_id, device=self.model.device)
        first = self._logits(batch, start)[:, 0]
        if kind == "verbalizer":
            first = first[:, list(self.answers[task])]
        return entropy(first).mean() / math.log(first.shape[-1]), _mean_prediction(first)

    def _written(self, batch: dict[str, torch.Tensor], **sampling) -> torch.Tensor:
        """The model's own answers, [batch, 1 + tokens] with the decoder's start."""
        from transformers import GenerationConfig

        config = self.model.config
        settings = GenerationConfig(
            max_new_tokens=self.tokens, num_beams=1, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
            decoder_start_token_id=config.decoder_start_token_id, **sampling,
        )  # fmt: skip
        with torch.no_grad():
            return self.writing().generate(**batch, generation_config=settings)

    def _entropy_of_tokens(self, batch: dict[str, torch.Tensor], written: torch.Tensor):
        """Mean over the tokens of each answer; a loss as `__call__` gives it."""
        logits, real = self._logits(batch, written[:, :-1]), self._real(written)
        of_answers = (entropy(logits) * real).sum(dim=1) / real.sum(dim=1)
        return of_answers.mean() / math.log(logits.shape[-1]), _mean_prediction(logits[:, 0])

    def _entropy_of_answer(self, batch: dict[str, torch.Tensor], written: torch.Tensor):
        """For sampled answers; a loss as `__call__` gives it, whose value and gradient are right in expectation."""
        logits = self._logits(batch, written[:, :-1])
        of_tokens = entropy(logits) * self._real(written)
        behind = (of_tokens.sum(dim=1, keepdim=True) - of_tokens.cumsum(dim=1)).detach()
        sampled = logits.log_softmax(dim=-1).gather(-1, written[:, 1:, None]).squeeze(-1)
        policy = (sampled * behind).sum(dim=1)  # behind an end there is nothing, so that it needs no mask
        of_answers = of_tokens.sum(dim=1) + policy - policy.detach()
        return of_answers.mean() / (self.tokens * math.log(logits.shape[-1])), _mean_prediction(logits[:, 0])

    def _real(self, written: torch.Tensor) -> torch.Tensor:
        """1 for the tokens of answers up to their first end and with it: [batch, tokens]."""
        ends = written[:, 1:] == self.model.config.eos_token_id
        return (ends.cumsum(dim=1) - ends.long() == 0).float()

    def _logits(self, batch: dict[str, torch.Tensor], decoder_input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, vocabulary] in float32."""
        more = {"output_router_logits": False} if hasattr(self.model.config, "num_experts") else {}
        return self.call(**batch, decoder_input_ids=decoder_input_ids, use_cache=False, **more).logits.float()


def first_tokens(labels: Sequence[Sequence[int]], task: str, most: int = 100) -> list[int]:
    """The different first tokens of a task's answers. Raises UserError where there are too few, or too many for classes."""
    found = sorted({int(ids[0]) for ids in labels})
    if not 2 <= len(found) <= most:
        raise UserError(
            f"the answers of {task} begin with {len(found)} different tokens; the loss verbalizer is for classification, "
            f"with 2 to {most}: give it another of {', '.join(KINDS)}"
        )
    return found


def _mean_prediction(logits: torch.Tensor) -> torch.Tensor:
    return logits.detach().float().softmax(dim=-1).mean(dim=0)
