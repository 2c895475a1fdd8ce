"""Use of the experts of a causal mixture of experts on texts: what each router chooses (causal/routers.py)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expert_merging.core.errors import UserError
from expert_merging.core.files import sha256
from expert_merging.core.hub import first_line
from expert_merging.data.raw_files import not_text, read_jsonl
from expert_merging.merging.model_folders import Source
from expert_merging.merging.moe_layouts import sparse_layers

FAMILIES = ("mixtral", "qwen2_moe", "olmoe")  # softmax, then the k largest; transformers 4.46 has them


def routers_of(source: Source) -> list[str]:
    """The names of the router modules, by layer.

    Raises UserError for another family, a folder without a sparse layer, or one with all experts in one tensor.
    """
    family = source.config.get("model_type")
    if family not in FAMILIES:
        more = "; of a Switch model, tools/count_expert_usage.py counts" if family == "switch_transformers" else ""
        raise UserError(f"{source.folder}: model_type is {family}; usage is counted of {', '.join(FAMILIES)}{more}")
    try:
        layers = sparse_layers(source.config, source.kinds)
    except UserError as error:
        raise UserError(f"{source.folder}: {error}") from error
    if fused := next((layer.fused[0] for layer in layers.values() if layer.fused), None):
        raise UserError(f"{source.folder}: {fused} holds all experts in one, which transformers 4.46 does not load")
    return [layer.routers[0].removesuffix(".weight") for layer in layers.values()]


def read_texts(path: Path, field: str) -> list[str]:
    """The texts in a field of a file of JSON lines.

    Raises UserError where the file is missing or empty, or a line is no JSON object with a text in that field.
    """
    texts = []
    for where, row in read_jsonl(path):
        if complaint := row if isinstance(row, str) else not_text(row, field):
            raise UserError(f"{path}, {where}: {complaint}")
        assert not isinstance(row, str)  # which is a complaint
        texts.append(row[field])
    return texts


def made_of(source: Source, texts: Path) -> dict[str, dict[str, str]]:
    """What the counts follow from, {file: SHA-256}: weights, configuration and tokenizer, texts."""
    beside = [source.folder / "config.json", *sorted(source.folder.glob("tokenizer*"))]
    return {
        "weights": source.sha256(),
        "model": {path.name: sha256(path) for path in beside if path.is_file()},
        "texts": {texts.name: sha256(texts)},
    }


def token_ids(source: Source, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Each text's tokens by the folder's tokenizer, with the special tokens it adds, the first `max_tokens`; texts without a
    token are left out.

    Raises UserError where there is no whole tokenizer, it has tokens that the model has not, or the texts have no token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    except Exception as error:  # whatever its reader raises
        raise UserError(f"{source.folder} holds no whole tokenizer ({first_line(error)})") from error
    found = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    found = [ids for ids in found if ids]
    if not found:
        raise UserError("the texts hold no token")
    if (most := max(map(max, found))) >= (source.vocabulary or 0):
        raise UserError(f"{source.folder}: its tokenizer gives token {most}; the model has {source.vocabulary}")
    return found


@torch.no_grad()
def count(model: Any, texts: Iterable[Sequence[int]], batch_size: int, moved: Callable[[int], object]) -> torch.Tensor:
    """Times each expert was chosen: int64 [sparse layers, n].

    Args:
        model: as causal.models.load_model gives it, in evaluation mode; its output matrix is not used.
        texts: token ids of each, at least one; padded on the right within a batch. Padding is not counted.
        moved: called with numbers of texts that are counted.
    """
    routers, device = model.routers, model.device
    routers.counting = True
    routers.reset()
    texts = list(texts)
    for start in range(0, len(texts), batch_size):
        batch = [torch.tensor(ids) for ids in texts[start : start + batch_size]]
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
        lengths = torch.tensor([len(one) for one in batch], device=device)
        real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        model.base_model(input_ids=ids, attention_mask=real.long(), use_cache=False)
        moved(len(batch))
    return routers.counts()


def record(counts: torch.Tensor, tokens: int, routers: Sequence[str]) -> dict[str, Any]:
    """What tools/merge.py reads (`layers`), and what helps to read it, as JSON values.

    The entropy of a layer is 1 where all n experts are chosen equally often, and log k / log n, the least that there can be,
    where all tokens choose the same k.

    Args:
        counts: [layers, n], of `tokens` tokens.
    """
    from transformers.models.switch_transformers.caem import normalized_entropy

    entropies = [round(entropy, 6) for entropy in normalized_entropy(counts).tolist()]
    k = int(counts[0].sum()) // tokens
    return {"layers": counts.tolist(), "entropies": entropies, "tokens": tokens, "k": k, "routers": list(routers)}
