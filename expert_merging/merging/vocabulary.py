"""Models whose vocabularies differ: which rows of their embeddings stand for the same token, and merging only those."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.core.safetensors_folder import Kind
from expert_merging.merging.named import Computed, Tensors

_OF_TOKENS = ("embed", "shared", "lm_head", "wte", "word", "predictions")  # in names of tensors with a row a token


def words(folder: Path) -> dict[int, str]:
    """{number: token} of the folder's tokenizer.json; empty without one. Raises UserError where it cannot be read."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    content = read_json(path)
    try:
        listed = content["model"].get("vocab", {})
        pairs = listed.items() if isinstance(listed, dict) else ((row[0], i) for i, row in enumerate(listed))
        added = ((token["content"], token["id"]) for token in content.get("added_tokens", ()))
        return {int(number): token for token, number in (*pairs, *added)}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no tokenizer that can be read ({error})") from error


def row_names(kinds: Mapping[str, Kind], vocabulary: int | None) -> list[str]:
    """The tensors with a row a token: [vocabulary, ...], with a name that says so."""
    return [
        name
        for name, kind in kinds.items()
        if vocabulary and kind.shape[:1] == (vocabulary,) and any(part in name for part in _OF_TOKENS)
    ]


def common_rows(vocabularies: Sequence[tuple[int, Mapping[int, str]]]) -> torch.Tensor:
    """Numbers of the rows, int64, that stand for one token in all of `vocabularies`, each (rows, {number: token}).

    A vocabulary without tokens is taken to have the others'; rows beyond everybody's tokens (padding) are common.
    """
    fewest = min(rows for rows, _ in vocabularies)
    known = [tokens for _, tokens in vocabularies if tokens]
    return torch.tensor([i for i in range(fewest) if len({tokens.get(i) for tokens in known}) < 2], dtype=torch.int64)


def rows_of(tensors: Tensors, names: Sequence[str], rows: torch.Tensor) -> Computed:
    """The tensors, but only `rows` of those in `names`."""
    return Computed(list(tensors), lambda name: tensors[name][rows] if name in names else tensors[name])


def put_back(
    merged: Iterator[tuple[str, torch.Tensor]], base: Tensors, names: Sequence[str], rows: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's tensors of `names` with the merged `rows` in their places; all others as they come."""
    for name, tensor in merged:
        yield name, base[name].clone().index_copy_(0, rows, tensor.to(base[name].dtype)) if name in names else tensor
