"""Seq2seq features on disk: token ids of inputs and targets, unpadded, one folder a task, whole or not there.

`DATA_DIR/{task}` is a DatasetDict (train, validation, test) with the columns input_ids, labels (which ends with </s>)
and references (list of str); what stands around an input says `frame`. `complete.json` in it says what it was made from and
with, and what it must hold.
"""

import hashlib
import importlib.metadata
import json
import platform
import shlex
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from expert_merging.core import interrupts
from expert_merging.core.errors import UserError, at_least
from expert_merging.core.files import new_folder, read_json, sha256
from expert_merging.core.hub import first_line, local_folder
from expert_merging.data.docstring_reader import PACKAGES
from expert_merging.data.tasks import get_task
from expert_merging.data.word_cache import WordCache, ranges
from expert_merging.run import results
from expert_merging.run.constants import read_constants
from expert_merging.run.deviations import deviates

SPLITS = ("train", "validation", "test")
_MANIFEST = "complete.json"
_BATCH = 4000  # examples tokenised together
SEPARATOR = "\n"  # between input and target, where both stand in one sequence
_SHUFFLE_SEED = 42  # of the order in which examples are stored, so that a limit takes a random part


def prepare(task_name: str, constants: SimpleNamespace, tokenizer, raw: dict[str, Any] | None = None) -> dict[str, Any]:
    """Tokenise a task's examples into `DATA_DIR/{task_name}`, in place of what an earlier run made there.

    Inputs are cut to `max_input_length` tokens with their `frame`, and targets to `max_decoder_length` with </s>. The
    examples of each split are shuffled (seed 42), then the first `{split}_examples` taken; 0 takes all.

    Args:
        raw: what the task's `load(constants)` gives, where it has been loaded already.

    Returns:
        The manifest: what it depends on, and for each split the number of examples, how many are odd (an empty
        text or target; they are kept, as published), the shares cut, and quantiles of the lengths before cutting.

    Raises:
        UserError: broken source, no room to write, or a folder in the way that was not made here.
    """
    from datasets import DatasetDict

    folder = folder_of(task_name, constants)
    _refuse_foreign(folder)
    task = get_task(task_name)
    raw = task.load(constants) if raw is None else raw
    with new_folder(folder) as temporary:
        words = WordCache(tokenizer)
        made = {split: _tokenized(raw[split], split, task_name, constants, tokenizer, words) for split in SPLITS}
        features = DatasetDict({split: dataset for split, (dataset, _) in made.items()})
        features.save_to_disk(str(temporary))
        manifest = {
            "identity": _identity(task_name, constants, tokenizer) | {"content": _content(task_name, constants)},
            "splits": {split: report for split, (_, report) in made.items()},
            "sha256": content_hash(features),
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def load(task_name: str, constants: SimpleNamespace, tokenizer):
    """The DatasetDict that `prepare` wrote, after checking that it is whole and what this run asks for.

    A smaller limit than the one it was made with takes the first examples of each split. Of the training examples,
    `constants.train_sample` are drawn by the seed, a draw for each task.

    Raises UserError for a folder that is absent, not whole, or made with another tokenizer, lengths or limits, and for a
    sample that is larger than what it is drawn from.
    """
    folder = folder_of(task_name, constants)
    wanted = _identity(task_name, constants, tokenizer)
    manifest, features = _read_whole(folder, command(task_name, constants))
    made = results.made_with(manifest)
    for name in ("task", "split", "tokenizer", "frame", "max_input_length", "max_decoder_length"):
        if made.get(name) != wanted.get(name):
            short = name in ("split", "tokenizer", "frame")
            difference = f"another {name}" if short else f"{name} {made[name]}, not {wanted[name]}"
            raise UserError(f"{folder} was made with {difference}; run: {command(task_name, constants)}")
    for split in SPLITS:
        limit, count = wanted[f"{split}_examples"], len(features[split])
        if 0 < limit <= count:
            features[split] = features[split].select(range(limit))
        elif count == made[f"{split}_examples"]:  # cut by a limit then, so there may be more
            raise UserError(
                f"{folder} holds {count} {split} examples and {limit or 'all'} are asked for; "
                f"run: {command(task_name, constants)}"
            )
    if sample := constants.train_sample:
        if sample > len(features["train"]):
            raise UserError(
                f"train_sample is {sample}, but {task_name} has {len(features['train'])} training examples; lower it"
            )
        rng = np.random.default_rng([constants.seed, zlib.crc32(task_name.encode())])
        features["train"] = features["train"].select(rng.permutation(len(features["train"]))[:sample])
    return features


def noted_sha256(task_name: str, constants: SimpleNamespace) -> str:
    """SHA-256 of all features of a task, as `prepare` noted it. Raises UserError where there are none."""
    return results.load(folder_of(task_name, constants) / _MANIFEST, lambda: command(task_name, constants))["sha256"]


def is_complete(task_name: str, constants: SimpleNamespace, tokenizer) -> dict[str, Any] | None:
    """The manifest, where `prepare` with the same arguments would write what is there already; else None.

    Raises UserError for a folder in the way that was not made here, and where the frame leaves no room for an input.
    """
    folder = folder_of(task_name, constants)
    _refuse_foreign(folder)
    _check_room(constants, tokenizer)
    try:
        manifest, _ = _read_whole(folder, "")
    except UserError:
        interrupts.check()
        return None
    made = results.made_with(manifest)
    wanted = _identity(task_name, constants, tokenizer)
    if "content" in made:  # which older ones lack
        wanted["content"] = _content(task_name, constants)
    return None if results.changes(made, wanted) else manifest


def folder_of(task_name: str, constants: SimpleNamespace) -> Path:
    """Where a task's features lie."""
    return Path(constants.DATA_DIR) / task_name


def command(task_name: str, constants: SimpleNamespace) -> str:
    """The command that makes the features this run asks for, naming the constants that are not global_config.py's."""
    import global_config

    defaults = read_constants({"__file__": global_config.__file__}, ["--scale", constants.scale])
    words = ["python", "datasets_preprocessing.py", "--scale", constants.scale]
    if task_name not in defaults.task_types:
        words += ["--task_types", task_name]
    names = ["DATA_DIR", "BASE_MODEL_PATH", source_constant(task_name), "max_input_length", "max_decoder_length"]
    for name in [*names, *(f"{split}_examples" for split in SPLITS)]:
        value = getattr(constants, name, None)
        if value != getattr(defaults, name, None):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def check_constants(constants: SimpleNamespace) -> None:
    """Raises UserError for lengths without room for a token and </s>, for negative limits, and for a DATA_DIR that
    cannot be written; leaves nothing there."""
    for name in ("max_input_length", "max_decoder_length"):
        if getattr(constants, name) < 2:
            raise UserError(f"{name} is {getattr(constants, name)}; it must be at least 2, for one token and </s>")
    at_least(constants, 0, *(f"{split}_examples" for split in SPLITS))
    folder = Path(constants.DATA_DIR).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise UserError(f"DATA_DIR: cannot write in {existing} ({error.strerror}); choose another folder") from error


def frame(tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after an input's own.

    A tokenizer that closes every text with </s>, as T5's, is that of an encoder, whose inputs are so closed. Any other is that
    of a decoder, in whose one sequence the target follows the input: before the input stands what the tokenizer begins a
    text with, and after it SEPARATOR.
    """
    ids = tokenizer("a")["input_ids"]
    if ids[-1] == tokenizer.eos_token_id:
        return [], [tokenizer.eos_token_id]
    before = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return before, tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]


def _check_room(constants: SimpleNamespace, tokenizer) -> None:
    around = sum(map(len, frame(tokenizer)))
    if constants.max_input_length <= around:
        raise UserError(
            f"max_input_length is {constants.max_input_length}; {around} tokens stand around each input, give more"
        )


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of all that decides which ids a text gets: vocabulary, normalisation, splitting, added tokens.

    The same before saving and after loading, and whatever truncation or padding was in use last.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: backend[name] for name in ("normalizer", "pre_tokenizer", "model")}
    parts["added"] = sorted((token["id"], token["content"]) for token in backend["added_tokens"])
    parts["special"] = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def content_hash(features) -> str:
    """SHA-256 over every token id and reference of a DatasetDict of features, in order."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split} {len(features[split])}\n".encode())
        for batch in features[split].with_format("arrow").iter(batch_size=10_000):
            for name in ("input_ids", "labels"):
                column = batch[name].combine_chunks()
                digest.update(column.value_lengths().to_numpy(zero_copy_only=False).astype("<i4").tobytes())
                digest.update(column.flatten().to_numpy(zero_copy_only=False).astype("<i4").tobytes())
            digest.update(json.dumps(batch["references"].to_pylist()).encode())
    return digest.hexdigest()


def padded_lengths(constants: SimpleNamespace, deviation: str) -> tuple[int, int]:
    """To how many tokens inputs and targets are padded at least: the released code fills every example up to the limits.

    `deviation` says what for: "padding" in training, "counts" where validation is decoded and usage counted.
    """
    filled = deviates(constants.reading, deviation)
    return (constants.max_input_length, constants.max_decoder_length) if filled else (0, 0)


def collate(
    features: list[dict[str, Any]], pad_token_id: int, input_length: int = 0, target_length: int = 0
) -> dict[str, Any]:
    """A batch of tensors from examples with input_ids and labels, padded on the right.

    Padded to the longest of the batch, but at least to `input_length` and `target_length` tokens. Returns {"input_ids"
    [batch, input], "attention_mask" [batch, input], "labels" [batch, target], -100 where padded}.
    """
    import torch

    def padded(rows: list[torch.Tensor], value: int, least: int) -> torch.Tensor:
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(batch, (0, max(0, least - batch.shape[1])), value=value)

    inputs = [torch.as_tensor(feature["input_ids"], dtype=torch.long) for feature in features]
    labels = [torch.as_tensor(feature["labels"], dtype=torch.long) for feature in features]
    # Lengths, not ids, tell what is padding: <pad> may stand inside an input.
    masks = [torch.ones_like(ids) for ids in inputs]
    return {
        "input_ids": padded(inputs, pad_token_id, input_length),
        "attention_mask": padded(masks, 0, input_length),
        "labels": padded(labels, -100, target_length),
    }


def _tokenized(examples, split: str, task_name: str, constants: SimpleNamespace, tokenizer, ids_of: WordCache):
    """(features, report) of one split."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    from expert_merging.core.bars import bar as progress_bar

    task = get_task(task_name)
    limit = getattr(constants, f"{split}_examples") or len(examples)
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(examples))[:limit].tolist()
    token_id = pa.uint16() if len(tokenizer) <= 2**16 else pa.int32()
    before, after = frame(tokenizer)
    tables, odd = [], 0
    lengths: dict[str, list[np.ndarray]] = {"input": [], "target": []}
    bar = progress_bar(total=len(order), desc=f"{task_name} {split}", unit="example", leave=False)
    for start in range(0, len(order), _BATCH):
        batch = [examples[i] for i in order[start : start + _BATCH]]
        prompts, targets = [task.prompt(e) for e in batch], [task.target(e) for e in batch]
        columns = {}
        for name, side, texts, most, around in (
            ("input_ids", "input", prompts, constants.max_input_length, (before, after)),
            ("labels", "target", targets, constants.max_decoder_length, ([], [tokenizer.eos_token_id])),
        ):
            ids, counts = ids_of(texts)
            columns[name] = _cut(ids, counts, around, most, token_id)
            lengths[side].append(counts + sum(map(len, around)))
        columns["references"] = pa.array([task.references(e) for e in batch], pa.list_(pa.string()))
        tables.append(pa.table(columns))
        odd += sum(map(_is_odd, prompts, targets))
        bar.update(len(batch))
    bar.close()
    report: dict[str, Any] = {"examples": len(order), "odd": odd}
    for side, limit in (("input", constants.max_input_length), ("target", constants.max_decoder_length)):
        values = np.concatenate(lengths[side])
        at = {q: np.quantile(values, q / 100, method="higher") for q in (50, 90, 99, 100)}
        report[f"{side}_length"] = {str(q): int(length) for q, length in at.items()}
        report[f"{side}_cut"] = float((values > limit).mean())
    return Dataset(pa.concat_tables(tables)), report


def _is_odd(prompt: str, target: str) -> bool:
    """Nothing to write, or nothing to read: a prompt of its own words only, as "Summarize: "."""
    return not target.strip() or all(word.endswith(":") for word in prompt.split())


def _cut(ids, lengths, around: tuple[list[int], list[int]], limit: int, kind):
    """An arrow column of lists of `kind`: of each text the first ids, at most `limit` with what stands before and after."""
    import numpy as np
    import pyarrow as pa

    before, after = around
    kept = np.minimum(lengths, limit - len(before) - len(after))
    ends = np.cumsum(kept + len(before) + len(after))
    made = np.empty(ends[-1], dtype=np.int32)
    for place, token in enumerate(before):
        made[ends - kept - len(after) - len(before) + place] = token
    made[ranges(ends - kept - len(after), kept)] = ids[ranges(np.cumsum(lengths) - lengths, kept)]
    for place, token in enumerate(after):
        made[ends - len(after) + place] = token
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(made).cast(kind))


def source_constant(task_name: str) -> str:
    """The constant that says where a task's raw examples lie; the embedded tasks have none."""
    return f"{task_name.upper()}_PATH"


def source_paths(constants: SimpleNamespace, tasks: Iterable[str]) -> dict[str, str]:
    """{constant: where the raw examples of a task lie}; none for the embedded tasks."""
    names = map(source_constant, tasks)
    return {name: getattr(constants, name) for name in names if hasattr(constants, name)}


def _identity(task_name: str, constants: SimpleNamespace, tokenizer) -> dict[str, Any]:
    task = get_task(task_name)
    return {
        "task": task_name,
        **({"split": task.split} if hasattr(task, "split") else {}),
        "source": getattr(constants, source_constant(task_name), "docstrings of the installed packages"),
        "tokenizer": tokenizer_hash(tokenizer),
        **({"frame": list(around)} if (around := frame(tokenizer)) != ([], [tokenizer.eos_token_id]) else {}),
        "max_input_length": constants.max_input_length,
        "max_decoder_length": constants.max_decoder_length,
        **{f"{split}_examples": getattr(constants, f"{split}_examples") for split in SPLITS},
    }


def _content(task_name: str, constants: SimpleNamespace) -> dict[str, str] | None:
    """Of the raw examples in a local folder the SHA-256 of its files, of docstrings the versions of the packages that have
    them; None of what is on the hub."""
    if (path := getattr(constants, source_constant(task_name), None)) is None:
        owners = importlib.metadata.packages_distributions()
        versions = {name: importlib.metadata.version(owners[name][0]) for name in PACKAGES if name in owners}
        return {"python": platform.python_version(), **versions}
    if (folder := local_folder(path, source_constant(task_name))) is None:
        return None
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def _refuse_foreign(folder: Path) -> None:
    """A folder of ours gets its name when it is whole: one without a manifest is somebody else's, or was damaged."""
    if folder.exists() and not (folder / _MANIFEST).exists():
        raise UserError(f"{folder} is in the way: it has no {_MANIFEST}, so it is not features; move or remove it")


def _read_whole(folder: Path, remedy: str) -> tuple[dict[str, Any], Any]:
    """(manifest, features). Raises UserError where the folder is absent or differs from its manifest."""
    import pyarrow
    from datasets import DatasetDict

    if not folder.exists():
        raise UserError(f"{folder} does not exist; run: {remedy}")
    _refuse_foreign(folder)
    manifest = read_json(folder / _MANIFEST)
    try:
        features = DatasetDict.load_from_disk(str(folder))
        counts = {split: len(features[split]) for split in SPLITS}
        promised = {split: manifest["splits"][split]["examples"] for split in SPLITS}
        whole = counts == promised and content_hash(features) == manifest["sha256"]
        problem = "its content has changed" if counts == promised else f"it holds {counts}, not {promised}"
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        whole, problem = False, first_line(error)
    if not whole:
        raise UserError(f"{folder} is damaged ({problem}); run: {remedy}")
    return manifest, features
