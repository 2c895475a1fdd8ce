"""Hugging Face folders of one architecture, opened to be merged: what they hold is checked before a tensor is read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, sha256
from expert_merging.core.safetensors_folder import INDEX, Kind, SafetensorsFolder
from expert_merging.core.safetensors_stream import DTYPES
from expert_merging.merging import lora, vocabulary
from expert_merging.merging.named import Tensors

# Lines of config.json that make another architecture even where all shapes agree.
_ARCHITECTURE = (
    "model_type", "architectures", "num_attention_heads", "num_key_value_heads", "head_dim", "num_heads", "d_kv",
)  # fmt: skip
SAYS_NOTHING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "vocab_size")


@dataclass
class Source:
    """A model to merge: its tensors and what they are, its configuration and the tokens of its vocabulary, its files."""

    folder: Path
    tensors: Tensors
    kinds: dict[str, Kind]
    config: dict[str, Any]
    words: dict[int, str]
    files: list[Path]
    _digests: dict[str, str] = field(default_factory=dict, init=False, repr=False)  # read once

    def sha256(self) -> dict[str, str]:
        """{file: SHA-256} of its weights; of an adapter also of its configuration, which says by what they are scaled."""
        if not self._digests:
            self._digests.update({path.name: sha256(path) for path in self.files})
        return self._digests

    @property
    def vocabulary(self) -> int | None:
        """Rows of its embedding, by its configuration."""
        return (self.config.get("text_config") or self.config).get("vocab_size")


def open_source(folder: Path, base: Source | None = None) -> Source:
    """The model in `folder`; an adapter's as it is on top of `base`.

    Raises UserError where the folder or one of its files is missing or damaged, where its weights are quantised, or it is
    an adapter that `lora.on_base` refuses or without `base`.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if (folder / lora.CONFIG).exists():
        if base is None:
            raise UserError(f"{folder} is an adapter; give the model it belongs to as the base")
        words = vocabulary.words(folder) or base.words
        tensors = lora.on_base(base.tensors, folder, _tied(base))
        return Source(folder, tensors, base.kinds, base.config, words, [folder / lora.WEIGHTS, folder / lora.CONFIG])
    weights = SafetensorsFolder(folder)
    kinds, config = weights.kinds(), read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is no configuration of a model")
    if "quantization_config" in config:
        raise UserError(f"{folder} holds quantised weights; merge the models that these were made from")
    for name, kind in kinds.items():
        if kind.dtype not in DTYPES:
            raise UserError(f"{name} in {folder} is {kind.dtype}; there are {', '.join(DTYPES)}")
    index = folder / INDEX
    for name in read_json(index)["weight_map"] if index.exists() else ():
        if name not in kinds:
            raise UserError(f"{folder} lacks {name}, which its index has in {read_json(index)['weight_map'][name]}")
    return Source(folder, weights, kinds, config, vocabulary.words(folder), weights.files)


def _tied(source: Source) -> list[str]:
    """The tensor that is both input embedding and output matrix, where there is one: the only one with a row a token, in a
    model that writes tokens."""
    text = source.config.get("text_config") or source.config
    heads = source.config.get("architectures") or ["LM"]
    writes = any(name.endswith(("LM", "LMHeadModel", "ForConditionalGeneration", "ForPreTraining")) for name in heads)
    names = [n for n in vocabulary.row_names(source.kinds, source.vocabulary) if len(source.kinds[n].shape) == 2]
    return names if len(names) == 1 and writes and text.get("tie_word_embeddings", True) else []


def check_architecture(sources: Sequence[Source]) -> list[str]:
    """Lines on what differs in the configurations but can be merged; the first source's stands.

    Raises UserError where another source is of another architecture, or has other tensors.
    """
    first, said = sources[0], []
    for source in sources[1:]:
        for key in sorted(first.config.keys() | source.config.keys()):
            ours, theirs = first.config.get(key), source.config.get(key)
            if ours == theirs or key in SAYS_NOTHING:
                continue
            if key in _ARCHITECTURE:
                raise UserError(
                    f"{source.folder} is of another architecture than {first.folder}: {key} {theirs}, not {ours}"
                )
            said.append(f"config.json: {key} is {theirs} in {source.folder}; {ours} stands")
        if differing := sorted(first.kinds.keys() ^ source.kinds.keys()):
            having, lacking = (first, source) if differing[0] in first.kinds else (source, first)
            raise UserError(f"{lacking.folder} lacks {differing[0]}, which {having.folder} has")
    return said


def check_shapes(sources: Sequence[Source], common_rows: bool | None) -> None:
    """Raises UserError where a tensor has another shape, or, without `common_rows`, a vocabulary other tokens, than the
    first source's; with it the rows of embeddings may have any number. None: the method knows no common rows."""
    first = sources[0]
    for source in sources[1:]:
        if not common_rows:
            _check_vocabulary(first, source, offered=common_rows is not None)
        by_row = set(vocabulary.row_names(source.kinds, source.vocabulary)) if common_rows else set()
        by_row &= set(vocabulary.row_names(first.kinds, first.vocabulary))
        for name, kind in source.kinds.items():
            ours, theirs = first.kinds[name].shape, kind.shape
            if name in by_row:
                ours, theirs = ours[1:], theirs[1:]
            if ours != theirs:
                raise UserError(
                    f"{name} is {first.kinds[name].shape} in {first.folder} and {kind.shape} in {source.folder}"
                )


def _check_vocabulary(first: Source, source: Source, offered: bool) -> None:
    mend = "; give --common_rows to merge the rows that agree and keep the first model's others" if offered else ""
    if first.vocabulary != source.vocabulary:
        rows = f"{source.vocabulary} rows, not {first.vocabulary}"
        raise UserError(f"{source.folder} has another vocabulary than {first.folder}: {rows}{mend}")
    if first.words and source.words and first.words != source.words:
        number = next(i for i in sorted(first.words | source.words) if first.words.get(i) != source.words.get(i))
        token = f"token {number} is {source.words.get(number)!r}, not {first.words.get(number)!r}"
        raise UserError(f"{source.folder} has another vocabulary than {first.folder}: {token}{mend}")
