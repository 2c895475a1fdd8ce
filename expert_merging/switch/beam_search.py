"""Beam search with the results of transformers' own (`generate` with early_stopping=True), for less work.

What is saved: the beams of an example share the encoder's states, so their keys and values are computed, kept and read
once an example in place of once a beam, and are not copied at every step; examples that are done leave the batch; and the
host looks at the device once a step, not once a beam.
"""

from typing import Protocol

import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig
from transformers.generation import RepetitionPenaltyLogitsProcessor
from transformers.generation.beam_search import BeamHypotheses

_LEAVE_AT = 0.75  # share of rows in use at which the others are dropped, which copies the cache


class Writer(Protocol):
    """A model with what it keeps of the rows that it writes: `num_beams` of each example, one after the other."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary]: what follows the rows' `tokens` [rows, written]."""
        ...

    def take(self, origin: torch.Tensor, kept: torch.Tensor | None) -> None:
        """Row i goes on as what was row `origin[i]`; where examples leave the batch, `kept` are those that stay."""
        ...


def beam_search(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: GenerationConfig
) -> list[list[int]]:
    """The best hypothesis of each example: token ids from the start token on, </s> left out.

    Args:
        model: a patched SwitchTransformersForConditionalGeneration in evaluation mode. Where modules in its decoder keep
            something of each row from step to step, their `take_rows(rows)` is called when rows leave the batch.
        input_ids, attention_mask: [examples, tokens].
        settings: num_beams (2 or more), max_length, length_penalty, repetition_penalty, no_repeat_ngram_size, and the
            ids decoder_start_token_id, eos_token_id (one) and pad_token_id.
    """
    tokens = input_ids.new_full((len(input_ids) * settings.num_beams, 1), settings.decoder_start_token_id)
    return search(_Switch(model, input_ids, attention_mask), tokens, settings)


class _Switch:
    def __init__(self, model, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        self.model, self.mask = model, attention_mask
        encoder = model.get_encoder()
        self.encoded = (encoder(input_ids, attention_mask, output_router_logits=False).last_hidden_state,)
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.keepers = [module for module in model.get_decoder().modules() if hasattr(module, "take_rows")]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self.model(
            encoder_outputs=self.encoded, attention_mask=self.mask, decoder_input_ids=tokens[:, -1:],
            past_key_values=self.cache, use_cache=True, output_router_logits=False,
        )  # fmt: skip
        return output.logits[:, -1]

    def take(self, origin: torch.Tensor, kept: torch.Tensor | None) -> None:
        if kept is not None:
            self.mask, self.encoded = self.mask[kept], (self.encoded[0][kept],)
            self.cache.cross_attention_cache.reorder_cache(kept)
        self.cache.self_attention_cache.reorder_cache(origin)
        for module in self.keepers if kept is not None else ():
            module.take_rows(origin)


def search(writer: Writer, tokens: torch.Tensor, settings: GenerationConfig) -> list[list[int]]:
    """The best hypothesis of each example: token ids from the first of `tokens` on, </s> left out.

    Args:
        tokens: [rows, start], what every row begins with; may be of no token. Penalties look at these, too.
        settings: as of `beam_search`; num_beams may be 1, which is greedy.
    """
    beams, device, start = settings.num_beams, tokens.device, tokens.shape[1]
    penalise = RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty))
    examples = list(range(len(tokens) // beams))  # whose beams the batch holds, `beams` rows each
    hypotheses = [
        BeamHypotheses(beams, settings.length_penalty, early_stopping=True, max_length=settings.max_length)
        for _ in examples
    ]
    totals = torch.zeros(len(examples), beams, device=device)  # log-probabilities of what is written
    totals[:, 1:] = -1e9  # all beams begin alike: go on from the first only

    while (length := tokens.shape[1]) < settings.max_length:
        scores = penalise(tokens, writer.logits(tokens).float().log_softmax(dim=-1))
        scores = forbid_repeated_ngrams(scores, tokens, settings.no_repeat_ngram_size)
        scores = scores.view(len(examples), beams, -1) + totals.unsqueeze(-1)
        # At most every second one ends its sentence, so that as many as there are beams go on.
        best, places = scores.flatten(1).topk(2 * beams)

        went_on = []  # (total, row it continues, token) of every row
        ranked = torch.stack([best.double(), places.double()], dim=-1).tolist()  # the step's one wait for the device
        for number, example in enumerate(examples):
            went_on += _continue(ranked[number], number, hypotheses[example], tokens, start, scores.shape[-1], settings)
        in_use = [number for number, example in enumerate(examples) if len(hypotheses[example]) < beams]
        if not in_use:
            return [_best(one) for one in hypotheses]
        kept = None
        if len(in_use) <= _LEAVE_AT * len(examples):
            went_on = [went_on[row] for number in in_use for row in range(number * beams, (number + 1) * beams)]
            examples = [examples[number] for number in in_use]
            kept = torch.tensor(in_use, device=device)
        total, origin, token = torch.tensor(went_on, dtype=torch.float64).T.to(device)
        origin = origin.long()
        tokens = torch.cat([tokens[origin], token.long().unsqueeze(1)], dim=1)
        totals = total.float().view(-1, beams)
        writer.take(origin, kept)

    # No room for more: what is unfinished counts as it is.
    for number, (example, unfinished) in enumerate(zip(examples, totals.tolist(), strict=True)):
        if len(hypotheses[example]) < beams:
            for beam, total in enumerate(unfinished):
                hypotheses[example].add(tokens[number * beams + beam], total, generated_len=length - start)
    return [_best(one) for one in hypotheses]


def forbid_repeated_ngrams(scores: torch.Tensor, tokens: torch.Tensor, size: int) -> torch.Tensor:
    """`scores` [rows, vocabulary], minus infinity where a token would complete `size` tokens that its row `tokens`
    [rows, length] has in this order already. 0 forbids nothing."""
    length = tokens.shape[1]
    if size == 0 or length < size:
        return scores
    ngrams = tokens.unfold(1, size, 1)  # [rows, length - size + 1, size]
    repeated = (ngrams[..., :-1] == tokens[:, None, length - size + 1 :]).all(dim=-1)
    # Added, since a token may stand at the end of several, of which one is repeated.
    return scores.scatter_add(
        1, ngrams[..., -1], torch.zeros_like(repeated, dtype=scores.dtype).masked_fill(repeated, -torch.inf)
    )


def _continue(ranked, number: int, found: BeamHypotheses, tokens, start: int, vocabulary: int, settings) -> list[tuple]:
    """How the beams of the `number`-th example in the batch go on: `num_beams` of (total, row, token).

    Args:
        ranked: (total, place among the example's beams times vocabulary), the best first; sentences that end among the
            first `num_beams` go to `found`, worse ones are dropped.
    """
    beams, went_on, was_done = settings.num_beams, [], len(found) == settings.num_beams
    for rank, (total, place) in enumerate(ranked):
        row, token = number * beams + int(place) // vocabulary, int(place) % vocabulary
        if token != settings.eos_token_id:
            went_on.append((total, row, token))
        elif rank < beams and not was_done:
            found.add(tokens[row], total, generated_len=tokens.shape[1] + 1 - start)
        if len(went_on) == beams:
            break
    if len(found) < beams:
        return went_on
    # Done: fed with padding, which no router counts, until it leaves the batch.
    return [(0.0, number * beams + beam, settings.pad_token_id) for beam in range(beams)]


def _best(found: BeamHypotheses) -> list[int]:
    return sorted(found.beams, key=lambda hypothesis: hypothesis[0])[-1][1].tolist()
