"""How much each FFN neuron matters to each domain: the first-order Taylor score, from one backward pass for many
sequences.

For a sequence s with loss L_s (mean over its target tokens), neuron i of a layer scores |t_i(s)|, where t_i sums w dL_s/dw
over the neuron's three rows and columns: W_up, W_gate and W_down (MoEBERT, section 3.2, for gated FFNs). With
g = W_gate x, a = silu(g) * W_up x, and sums over tokens, t_i(s) = sum 2 a_i dL_s/da_i + g_i dL_s/dg_i: the terms of
W_up and W_down are equal, since a is linear in u and the output linear in a. No weight gradient is needed, and the
sequences of a batch stay apart along the batch axis. The score of a domain sums over its sequences.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expert_merging.core.errors import UserError
from expert_merging.core.files import replacing
from expert_merging.hemoe.gated_ffn import gated_ffns

_TOGETHER = 64  # sequences in a pass: more do not fit a processor's cache
_TOKENS = 4096  # and tokens: a pass keeps 0.33 MB for each in a layer of LLaMA-3.2-1B, 0.09 MB of SmolLM2-135M


@dataclass
class Scores:
    """`values` float64 [L, N, D]: sum over a domain's sequences of |t|; `sequences` how many there were, a domain."""

    values: np.ndarray
    domains: tuple[str, ...]
    sequences: tuple[int, ...]

    def save(self, path: str | Path) -> None:
        """Write one .npz."""
        record = json.dumps({"domains": list(self.domains), "sequences": list(self.sequences)})
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, values=self.values, record=np.array(record))

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read what `save` wrote. Raises UserError when it is absent or something else."""
        try:
            with np.load(path) as file:
                values, record = file["values"], json.loads(str(file["record"]))
            return cls(values, tuple(record["domains"]), tuple(record["sequences"]))
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; score the neurons first") from error
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} does not hold scores ({error}); remove it and score again") from error


def score(model, batches: Mapping[str, Iterable[dict]], accumulate: str = "float64") -> Scores:
    """The scores of every FFN neuron of `model` for each domain of `batches`.

    A batch holds "input_ids", "attention_mask" and "labels" [batch, length], labels -100 where no loss is taken (prompt
    and padding). Runs on the model's device, in evaluation mode, without touching its weights. `accumulate` is
    "float64", or "bfloat16" for the released code's sums, which stop growing at some 256 times a sequence's score.
    Raises UserError for a model without gated FFNs, a sequence without a target token and a domain without sequences.
    """
    import torch

    from expert_merging.core.bars import bar as progress_bar

    dtype = getattr(torch, accumulate)
    values, sequences = [], []
    for domain, its_batches in batches.items():
        total: Any = 0  # a tensor from the first batch on
        count = 0
        bar = progress_bar(its_batches, desc=f"importance, {domain}", unit="batch", leave=False)
        for batch in bar:
            of_each = sequence_scores(model, batch).abs()  # [batch, L, N]
            if dtype == torch.bfloat16:  # one sequence after another, as there
                for one in of_each.to(dtype):
                    total = total + one
            else:
                total = total + of_each.sum(0, dtype=dtype)
            count += len(of_each)
        if not count:
            raise UserError(f"domain {domain} has no sequence to score; give it some, or ask for fewer domains")
        values.append(total.double().cpu().numpy())
        sequences.append(count)
    if not values:
        raise UserError("no domain to score")
    return Scores(np.stack(values, axis=-1), tuple(batches), tuple(sequences))


def sequence_scores(model, batch: dict):
    """t [batch, L, N], float32 and signed, of each sequence of a batch, by one forward and one backward pass for every 64
    of them, of similar length together.

    Tokens with an attention mask of 0 add nothing. A sequence whose loss is exactly 0 scores 0.
    """
    import torch

    device = next(model.parameters()).device
    ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
    targets = (labels[:, 1:] != -100).sum(1)
    if (targets == 0).any():
        raise UserError(
            f"sequence {int((targets == 0).nonzero()[0])} of a batch has no target token; "
            "longer sequences are cut: raise the length, or leave it out"
        )
    scores = []
    lengths = mask.sum(1)
    order = lengths.argsort(stable=True)
    for part in order.split(_passes(lengths[order].tolist())):
        columns = mask[part].any(0)  # without the padding that all have
        scores.append(_scores_together(model, *(values[part][:, columns] for values in (ids, mask, labels))))
    return torch.cat(scores)[order.argsort()]


def _passes(lengths: Sequence[int]) -> list[int]:
    """How many sequences, of rising length, each pass takes: at most `_TOGETHER`, and `_TOKENS` with padding; one at least."""
    sizes = [0]
    for length in lengths:
        if sizes[-1] and (sizes[-1] == _TOGETHER or (sizes[-1] + 1) * length > _TOKENS):
            sizes.append(0)
        sizes[-1] += 1
    return sizes


def _scores_together(model, ids, mask, labels):
    import torch
    from torch.nn.functional import cross_entropy

    from expert_merging.hemoe.output_matrix import before_targets

    lengths = (labels[:, 1:] != -100).sum(1)
    with _activations(model) as kept, torch.enable_grad():
        states = model.get_input_embeddings()(ids).detach().requires_grad_()
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # also where the padding is on the left
        last = model.model(inputs_embeds=states, attention_mask=mask, position_ids=positions, use_cache=False)[0][
            :, :-1
        ]
        rows, columns, wanted = before_targets(labels)
        logits = model.lm_head(last[rows, columns]).float()
        loss = cross_entropy(logits, wanted, reduction="none") / lengths[rows]
        gradients = torch.autograd.grad(loss.sum(), [tensor for pair in kept for tensor in pair])
    keep = mask[:, None].to(torch.float32)
    scores = []
    for number, (gate, activation) in enumerate(kept):
        for_gate, for_activation = (gradients[2 * number + i].float() for i in (0, 1))
        per_token = (activation.detach().float() * for_activation).mul_(2).addcmul_(gate.detach().float(), for_gate)
        scores.append((keep @ per_token).squeeze(1))
    return torch.stack(scores, 1)


@contextmanager
def _activations(model) -> Iterator[list[list]]:
    """While it lasts, the model is in evaluation mode, its weights want no gradient, and a forward pass leaves
    (W_gate x, input of W_down) [batch, length, N] of each layer in the list given."""
    ffns = gated_ffns(model)
    kept = [[None, None] for _ in ffns]
    was_training = model.training
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = []
    for pair, ffn in zip(kept, ffns, strict=True):

        def keep_gate(module, inputs, output, pair=pair):
            pair[0] = output

        def keep_activation(module, inputs, pair=pair):
            pair[1] = inputs[0]

        hooks += [ffn.gate_proj.register_forward_hook(keep_gate)]
        hooks += [ffn.down_proj.register_forward_pre_hook(keep_activation)]
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, want in wanted:
            parameter.requires_grad_(want)
        model.train(was_training)


def processed(values: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """What the partition weighs: log(1 + I), each domain divided by its norm over all layers and neurons [L, N, D].

    `among`: the scores of all the model's layers, where `values` are those of some. Raises UserError where a score is negative
    or not finite, or a domain's are all 0.
    """
    logs = _logs(values if among is None else among)
    norms = np.sqrt((logs**2).sum((0, 1)))
    if (norms == 0).any():
        raise UserError(
            f"domain {int((norms == 0).argmax())} scores 0 at every neuron: it says nothing about the model"
        )
    return (logs if among is None else _logs(values)) / norms


def _logs(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all() or (values < 0).any():
        raise UserError("importance scores must be finite and not negative; score the neurons again")
    return np.log1p(values.astype(np.float64))
