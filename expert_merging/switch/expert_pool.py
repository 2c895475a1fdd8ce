"""What the sources' own inputs say of all their experts (merging/pooled.py): one pass of each source over its task.

Every method that pools experts gets the same numbers, from the passes that CAEM's usage comes from: unlabelled validation
inputs of each task through the source that was fine-tuned on it. The decoder sees what the source itself writes, greedily.
"""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from expert_merging.core.bars import bar
from expert_merging.data.features import collate
from expert_merging.merging.named import Tensors, wide
from expert_merging.merging.pooled import Observed, layers_of, pool_of


@torch.no_grad()
def observe(
    tensors: Sequence[Tensors], models: Sequence[Any], inputs: Sequence[Any], tokenizer, c: SimpleNamespace, device
) -> dict[str, Observed]:
    """{layer: what was observed}.

    Args:
        tensors: of each source, its weights by name.
        models: of each source, a function that loads the model; one is in memory at a time.
        inputs: of each source, features of its task (input_ids).
        c: eval_batch_size, max_decoder_length.
    """
    layers = layers_of(tensors[0])
    sums = {layer: _Sums(tensors, layer, device) for layer in layers}
    for source, (load, rows) in enumerate(zip(models, inputs, strict=True)):
        model = load().to(device).eval()
        given = list(batches(model, rows, tokenizer, c, device, f"source {source + 1} writes"))
        real: dict[str, torch.Tensor] = {}  # of the batch at hand: which positions of each stack count
        hooks = [_watch(model, layer, sums[layer], source, real) for layer in layers]
        for batch, written in bar(given, desc=f"experts on the inputs of source {source + 1}"):
            real |= real_positions(batch, written, model.config.eos_token_id)
            model(**batch, decoder_input_ids=written, use_cache=False)
        for hook in hooks:
            hook.remove()
        del model
    return {layer: one.observed() for layer, one in sums.items()}


def batches(model, rows, tokenizer, c: SimpleNamespace, device, label: str) -> Iterator[tuple[dict, torch.Tensor]]:
    """(inputs, what the model writes to them greedily, as the decoder's inputs: start token first, without the last one)."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for start in bar(range(0, len(order), c.eval_batch_size), desc=label):
        examples = [
            {"input_ids": rows[i]["input_ids"], "labels": [0]} for i in order[start : start + c.eval_batch_size]
        ]
        whole = collate(examples, tokenizer.pad_token_id)
        batch = {key: whole[key].to(device) for key in ("input_ids", "attention_mask")}
        yield batch, model.generate(**batch, max_length=c.max_decoder_length, num_beams=1, do_sample=False)[:, :-1]


def real_positions(batch: dict[str, torch.Tensor], written: torch.Tensor, end: int) -> dict[str, torch.Tensor]:
    """{stack: bool [examples, positions]}: no padding, and of what was written nothing from the end token `end` on."""
    return {"encoder": batch["attention_mask"].bool(), "decoder": (written == end).cumsum(-1) == 0}


def _watch(model, layer: str, sums: "_Sums", source: int, real: dict[str, torch.Tensor]):
    """A hook that adds what the sparse layer is given at real positions."""
    stack = layer.split(".")[0]
    return model.get_submodule(layer).register_forward_pre_hook(
        lambda _, given: sums.add(source, given[0][real[stack]])
    )


class _Sums:
    """Running sums over the tokens of a layer."""

    def __init__(self, tensors: Sequence[Tensors], layer: str, device):
        pool = pool_of(tensors, layer)
        self.wi, self.wo = pool.wi.to(device), pool.wo.to(device)
        self.routers = [wide(one[f"{layer}.router.classifier.weight"]).to(device) for one in tensors]
        # A router is defined up to one vector added to all its rows: without its mean row, logits can be compared.
        self.centred = torch.cat([rows - rows.mean(0) for rows in self.routers])
        sources, experts = len(tensors), len(self.wi)
        self.tokens = torch.zeros(sources, dtype=torch.float64)
        self.gram = torch.zeros(sources, experts, experts, dtype=torch.float64)
        self.outputs = torch.zeros(sources, experts, self.wi.shape[-1], dtype=torch.float64)
        self.counts, self.saliency = (torch.zeros(experts, dtype=torch.float64) for _ in range(2))

    def add(self, source: int, states: torch.Tensor) -> None:
        """states: [tokens, d_model], what the layer of this source is given."""
        states = states.float()
        self.tokens[source] += len(states)
        logits = states @ self.centred.T
        self.gram[source] += (logits.T @ logits).double().cpu()
        gates, chosen = (states @ self.routers[source].T).softmax(-1).max(-1)
        first = sum(len(rows) for rows in self.routers[:source])
        for e in range(len(self.wi)):
            output = torch.relu(states @ self.wi[e].T) @ self.wo[e].T
            self.outputs[source, e] += output.sum(0).double().cpu()
            if first <= e < first + len(self.routers[source]):
                sent = chosen == e - first
                self.counts[e] += sent.sum().item()
                self.saliency[e] += (gates[sent] * output[sent].norm(dim=-1)).sum().item()

    def observed(self) -> Observed:
        share = 1 / (len(self.tokens) * self.tokens)  # the weight of a token of each source
        of_expert = torch.cat([share[i].expand(len(rows)) for i, rows in enumerate(self.routers)])
        gram = (self.gram * share[:, None, None]).sum(0)
        norms = gram.diagonal().sqrt()
        return Observed(
            frequency=self.counts * of_expert,
            similarity=gram / (norms[:, None] * norms).clamp_min(1e-12),
            outputs=(self.outputs * share[:, None, None]).sum(0),
            saliency=self.saliency / self.counts.clamp_min(1),
        )
