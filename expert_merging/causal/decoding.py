"""Writing out what a causal mixture answers to an input: the search of switch/beam_search.py over one stack, cached.

An input is read once, and shared by its beams from there on. Penalties look at what is written, not at the input: a model
that answers out of a text must be free to repeat it.
"""

import functools
from types import ModuleType, SimpleNamespace

import torch
from transformers import DynamicCache, GenerationConfig

from expert_merging.causal.sequences import positions, shifted
from expert_merging.switch import decoding
from expert_merging.switch.beam_search import search


def evaluate_task(
    model, dataset, task: ModuleType, tokenizer, constants: SimpleNamespace, accelerator, label: str = ""
) -> tuple[dict[str, float], list[str]]:
    """(scores, predictions) of `model` (unwrapped) on features of one task; all processes take part and get the same."""
    writes = functools.partial(answers, model, settings_of(constants, tokenizer.eos_token_id))
    return decoding.evaluate_task(model, dataset, task, tokenizer, constants, accelerator, label, writes)


def settings_of(c: SimpleNamespace, end: int) -> GenerationConfig:
    """At most `max_decoder_length` tokens are written; `end` is the token that ends a text."""
    beams = {"early_stopping": True, "length_penalty": c.length_penalty} if c.num_beams > 1 else {}
    return GenerationConfig(
        num_beams=c.num_beams, max_length=c.max_decoder_length, repetition_penalty=c.repetition_penalty,
        no_repeat_ngram_size=c.no_repeat_ngram_size, **beams, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip


def answers(
    model, settings: GenerationConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> list[list[int]]:
    """The token ids that `model` writes after each input, without the end token.

    Args:
        settings: see `settings_of`; one beam is greedy.
        input_ids, attention_mask: [examples, tokens], padded on the right.
    """
    writer = _Writer(model, *shifted(input_ids, attention_mask), settings)
    return search(writer, input_ids.new_empty(len(input_ids) * settings.num_beams, 0), settings)


class _Writer:
    """A causal model with its keys and values, as `search` drives it."""

    def __init__(self, model, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: GenerationConfig):
        self.model, self.end, self.cache = model, settings.eos_token_id, DynamicCache()
        first = self._last_logits(input_ids, attention_mask, positions(attention_mask))
        if settings.num_beams > 1:
            self.cache.batch_repeat_interleave(settings.num_beams)
        self.first = first.repeat_interleave(settings.num_beams, dim=0)
        self.mask = attention_mask.repeat_interleave(settings.num_beams, dim=0)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] == 0:
            return self.first
        fed = tokens[:, -1:]
        # What has ended is fed the end token, which is no real one, until it leaves the batch.
        self.mask = torch.cat([self.mask, (fed != self.end).long()], dim=1)
        return self._last_logits(fed, self.mask, positions(self.mask)[:, -1:])

    def take(self, origin: torch.Tensor, kept: torch.Tensor | None) -> None:
        if kept is None and torch.equal(origin, torch.arange(len(origin), device=origin.device)):
            return
        self.mask = self.mask[origin]
        self.cache.reorder_cache(origin)

    def _last_logits(self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=self.cache, use_cache=True,
            num_logits_to_keep=1, output_router_logits=False,
        )  # fmt: skip
        return output.logits[:, -1]
