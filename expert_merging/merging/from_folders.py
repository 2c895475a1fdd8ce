"""Merging Hugging Face folders of any architecture into one, a tensor at a time (tools/merge.py)."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expert_merging.core.bars import bar
from expert_merging.core.errors import UserError
from expert_merging.core.files import is_there, new_folder, write_json
from expert_merging.core.safetensors_folder import Kind
from expert_merging.core.safetensors_stream import DTYPES, write_stream
from expert_merging.merging import vocabulary
from expert_merging.merging.model_folders import Source, check_architecture, check_shapes, open_source
from expert_merging.merging.named import Computed, Tensors, wide
from expert_merging.merging.registry import FROM_WEIGHTS, Method

WITHOUT_BASE = ("average",)
COPIED = (  # of the base, beside its weights
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "spiece.model", "sentencepiece*.model", "chat_template*", "preprocessor_config.json",
    "processor_config.json", "*.py",
)  # fmt: skip


@dataclass
class Merged:
    """What is to be written: the tensors as they come and what they will be, and what differs from the template's config."""

    kinds: dict[str, Kind]
    tensors: Iterator[tuple[str, torch.Tensor]]
    counts: dict[str, int] = field(default_factory=dict)  # merged, copied, left out; full when the last tensor has come
    unchanged: list[str] = field(default_factory=list)  # likewise: equal to the base's, although the sources differ
    said: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)  # of CAEM: what share_out gave


def arguments_of(method: Method, given: Iterable[str], seed: int) -> dict[str, Any]:
    """The method's arguments: its row's values, with those `given` as "name=value" under the argument's or constant's name.

    Raises UserError for a name that it does not have, or a value of another type.
    """
    values = dict(method.arguments({constant.name: constant.default for constant in method.constants} | {"seed": seed}))
    names = {getattr(value, "name", name): name for name, value in method.settings.items()} | {n: n for n in values}
    for word in filter(None, given):
        name, _, text = word.partition("=")
        if name not in names or not text:
            there = ", ".join(f"{n}={_shown(value)}" for n, value in values.items()) or "no constants"
            raise UserError(f"--set {word}: {method.name} has {there}")
        kind = type(values[names[name]])
        try:
            value: Any = tuple(text.split(",")) if kind is tuple else kind(text)
            if kind is float and not math.isfinite(value):
                raise ValueError(f"{value} is not finite")
        except ValueError as error:
            raise UserError(f"--set {word}: {name} is a number, like {values[names[name]]}") from error
        values[names[name]] = value
    return values


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def check_request(method: str, base: str, models: Sequence[str], out: str, also: Sequence[str] = ()) -> None:
    """Raises UserError where the command does not say what to merge and how."""
    if method not in (*FROM_WEIGHTS, *also):
        raise UserError(f"method is {method!r}; from weights alone there are {', '.join((*FROM_WEIGHTS, *also))}")
    if not base and method not in (*WITHOUT_BASE, *also):
        raise UserError(f"{method} needs the model that all were fine-tuned from; give it as --base")
    if not all(models) or not out:
        raise UserError("give the folders to merge (--models A1 A2 ..) and the one to be made (--out F)")


def open_sources(base: str, models: Sequence[str]) -> tuple[Source | None, list[Source], list[str]]:
    """The base if there is one, the models, and lines on what differs in their configurations.

    Raises UserError as `open_source` does, and where they are not of one architecture.
    """
    opened = open_source(Path(base)) if base else None
    sources = [open_source(Path(model), opened) for model in models]
    return opened, sources, check_architecture([*([opened] if opened else []), *sources])


def merge(
    method: Method, base: Source | None, models: Sequence[Source], arguments: Mapping[str, Any], common_rows: bool,
    moved: Callable[[], object] = lambda: None,
) -> Merged:  # fmt: skip
    """The models merged by `method`, in the dtypes of the base (or of the first model where there is none).

    Args:
        common_rows: where vocabularies differ, merge the rows of the tokens that all have, and keep the base's others.
        moved: called whenever a tensor of a model has been read.

    Raises UserError where shapes or vocabularies do not fit, and for arguments that the method refuses. Methods that look
    at the whole task vectors first do so here.
    """
    template = base or models[0]
    sources = [*([base] if base else []), *models]
    check_shapes(sources, common_rows)
    names: list[str] = []
    rows = torch.arange(0)
    if common_rows:
        names = vocabulary.row_names(template.kinds, template.vocabulary)
        rows = vocabulary.common_rows([(source.vocabulary or 0, source.words) for source in sources])
    views = [vocabulary.rows_of(source.tensors, names, rows) for source in sources]

    def noted(view: Tensors) -> Computed:
        def read(name: str) -> torch.Tensor:
            moved()
            return view[name]

        return Computed(list(view), read)

    of_base, of_models = (views[0] if base else None), views[-len(models) :]
    found = Merged(dict(template.kinds), iter(()))
    if names and (kept := (template.vocabulary or 0) - len(rows)):
        found.said.append(f"{kept} of {template.vocabulary} rows of {', '.join(names)} are {template.folder}'s")
    try:
        stream = method.load()(of_base, [noted(view) for view in of_models], **arguments)
    except ValueError as error:
        raise UserError(f"{method.name}: {error}") from error

    def checked() -> Iterator[tuple[str, torch.Tensor]]:
        found.counts |= {"merged": 0, "copied": 0, "left out": 0}
        for name, tensor in stream:
            tensor = tensor.to(DTYPES[template.kinds[name].dtype])
            found.counts["merged" if tensor.is_floating_point() else "copied"] += 1
            if of_base and tensor.is_floating_point() and torch.equal(tensor, of_base[name]):
                origin = wide(tensor)
                if any(not torch.equal(wide(view[name]), origin) for view in of_models):
                    found.unchanged.append(name)
            yield name, tensor

    found.tensors = vocabulary.put_back(checked(), template.tensors, names, rows)
    return found


def write(merged: Merged, template: Source, out: Path, allow_unchanged: bool, card: Callable[[], str]) -> None:
    """Write the folder `out`: weights, the template's configuration and tokenizer, the card; all of it or nothing.

    Raises UserError where tensors do not fit together after all, or, unless `allow_unchanged`, where one that the sources
    have changed came out as the base's.
    """
    with new_folder(out) as temporary:
        try:
            write_stream(merged.tensors, merged.kinds, temporary)
        except ValueError as error:
            raise UserError(f"these models cannot be merged: {error}") from error
        if merged.unchanged and not allow_unchanged:
            more = f" and {len(merged.unchanged) - 1} more" if len(merged.unchanged) > 1 else ""
            raise UserError(
                f"{merged.unchanged[0]}{more} came out equal to the base's although the sources differ; nothing is written "
                "(give --allow_unchanged where that is what you want)"
            )
        copy_beside_weights(template.folder, temporary)
        if merged.config:
            write_json(temporary / "config.json", template.config | merged.config)
        (temporary / "README.md").write_text(card(), encoding="utf-8")


def copy_beside_weights(folder: Path, to: Path) -> None:
    """Copy what belongs to a model beside its weights: configuration, tokenizer, code of its own."""
    for pattern in COPIED:
        for path in folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, to / path.name)


def is_done(out: Path, card: Callable[[], str]) -> bool:
    """Whether `out` is there, made by this command of these files, as its card says. Raises UserError where it is another."""
    found = out / "README.md"
    return is_there(out, lambda: found.is_file() and found.read_text(encoding="utf-8") == card())


def reading_bar(method: Method, models: Sequence[Source]):
    """A bar over the tensors that `method` will read of the models."""
    return bar(desc=method.label, total=method.passes * sum(len(model.kinds) for model in models), unit=" tensors")


def lines(merged: Merged, out: Path) -> list[str]:
    """What was done, for people to read."""
    counts = ", ".join(f"{number} {what}" for what, number in merged.counts.items())
    unchanged = (
        [f"equal to the base's although the sources differ: {', '.join(merged.unchanged)}"] if merged.unchanged else []
    )
    return [*merged.said, *unchanged, f"{out}: tensors {counts}"]
