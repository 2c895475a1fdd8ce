"""CLIP models, image data sets and zero-shot heads, from the hub or from local folders in the same formats."""

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from expert_merging.core import interrupts
from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.core.hub import first_line, local_folder, weights_folder
from expert_merging.core.safetensors_folder import SafetensorsFolder
from expert_merging.wemoe.scoring import Task

# CLIP's own prompts (Radford et al. 2021, its repository's prompts notebook), {} standing for the class.
TEMPLATES = {
    "sun397": ("a photo of a {}.", "a photo of the {}."),
    "stanford-cars": (
        "a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!", "a photo of my dirty {}.",
        "a photo of my clean {}.", "a photo of my new {}.", "a photo of my old {}.",
    ),
    "resisc45": tuple(
        f"{kind} {what} of {article}{{}}."
        for kind in ("satellite", "aerial") for what in ("imagery", "photo", "view") for article in ("", "a ", "the ")
    ),
    "eurosat": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "svhn": ('a photo of the number: "{}".',),
    "gtsrb": tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")),
    "mnist": ('a photo of the number: "{}".',),
    "dtd": tuple(
        f"a photo of {article} {{}} {what}." for article in ("a", "the") for what in ("texture", "pattern", "thing", "object")
    ),
}  # fmt: skip
CLASS_NAMES = Path(__file__).with_name("class_names")  # {task}.json, CLIP's class names
PLAIN = ("a photo of a {}.",)  # for any other task

# The published sizes: (width of the vision model, side of a patch).
SIZES = {"base-patch32": (768, 32), "base-patch16": (768, 16), "large-patch14": (1024, 14)}

# Where the eight data sets are on the hub: (name, configuration).
ON_HUB = {
    "sun397": ("tanganke/sun397", ""), "stanford-cars": ("tanganke/stanford_cars", ""),
    "resisc45": ("tanganke/resisc45", ""), "eurosat": ("tanganke/eurosat", ""),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"), "gtsrb": ("tanganke/gtsrb", ""), "mnist": ("ylecun/mnist", ""),
    "dtd": ("tanganke/dtd", ""),
}  # fmt: skip


def data_of(task: str, path: str) -> tuple[str, str]:
    """(name or folder, configuration) of a task's data set: `path` with the task in the place of its *, or, where that is
    empty, the published one. Raises UserError for a task that has none."""
    if path:
        return path.replace("*", task), ""
    if task not in ON_HUB:
        raise UserError(
            f"there is no published data set of {task!r}; there are {', '.join(ON_HUB)}; give --DATASET_PATH"
        )
    return ON_HUB[task]


def load_clip(path: str, constant: str) -> tuple[nn.Module, nn.Module, Any, Any]:
    """(vision model with projection, whole CLIP for its text tower, tokenizer, image processor), frozen, in float32.

    Raises UserError where there is no CLIP.
    """
    folder = local_folder(path, constant)
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast, CLIPVisionModelWithProjection

    try:
        text = CLIPModel.from_pretrained(folder or path).eval().requires_grad_(False)
        tokenizer = CLIPTokenizerFast.from_pretrained(folder or path)
        processor = CLIPImageProcessor.from_pretrained(folder or path)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{constant}: {path} is no whole CLIP model here and cannot be had from the hub ({first_line(error)}); "
            f"bring the model's folder and give --{constant} FOLDER"
        ) from error
    config = copy.deepcopy(text.config.vision_config)
    config.projection_dim = text.config.projection_dim  # the vision model's own entry need not be right
    vision = CLIPVisionModelWithProjection(config)
    vision.load_state_dict({name: tensor for name, tensor in text.state_dict().items() if name in vision.state_dict()})
    return vision.eval().requires_grad_(False), text, tokenizer, processor


def check_size(size: str, vision: nn.Module, path: str) -> None:
    """Raises UserError where the model is of another published size than the one named, among whose results its would lie."""
    own = vision.config.hidden_size, vision.config.patch_size
    published = next((name for name, numbers in SIZES.items() if numbers == own), size)
    if published != size:
        raise UserError(f"clip_size is {size!r}, but {path} is CLIP {published}; give --clip_size {published}")


class Expert(Mapping[str, torch.Tensor]):
    """The vision tower of a fine-tuned CLIP, read tensor by tensor from its folder; what its folder lacks (a projection that
    was never trained) is the pre-trained model's."""

    def __init__(self, path: str, constant: str, base: Mapping[str, torch.Tensor]):
        folder = weights_folder(path, constant)
        self.tensors, self.base, self.folder = SafetensorsFolder(folder), base, folder
        if not any(name in self.tensors for name in base):
            raise UserError(f"{constant}: {path} holds no vision model of CLIP")
        for name, kind in self.tensors.kinds().items():
            if name in base and tuple(kind.shape) != (own := tuple(base[name].shape)):
                raise UserError(
                    f"{constant}: {path} is not of CLIP_PATH's size: {name} is {tuple(kind.shape)}, there {own}"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name] if name in self.tensors else self.base[name]

    def __iter__(self):
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


class Images:
    """A split of a data set of labelled images: `labels`, `names` of the classes, `load(index)` -> PIL image."""

    def __init__(self, path: str, name: str, split: str, constant: str, limit: int = 0):
        """`path`: on the hub, or a folder of parquet files {split}-*.parquet or of datasets.save_to_disk."""
        import datasets

        folder = local_folder(path, constant)
        try:
            self.data = _open(datasets, path, folder, name, split)
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
            raise UserError(
                f"{constant}: cannot read the split {split} of {path} ({first_line(error)}); bring the data set's folder"
            ) from error
        columns = self.data.column_names
        self._image = next((c for c in ("image", "img") if c in columns), None)
        self._label = next((c for c in ("label", "labels", "fine_label") if c in columns), None)
        if self._image is None or self._label is None:
            raise UserError(f"{constant}: {path} has the columns {', '.join(columns)}; it needs image and label")
        if limit and limit < len(self.data):
            order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))[:limit]
            self.data = self.data.select(sorted(order.tolist()))
        self.labels = [int(label) for label in self.data[self._label]]
        feature = self.data.features[self._label]
        self.names = [name.replace("_", " ") for name in getattr(feature, "names", [])]

    def load(self, index: int):
        return self.data[index][self._image].convert("RGB")


def _open(datasets, path: str, folder: Path | None, name: str, split: str):
    if folder is None:
        return datasets.load_dataset(path, name or None, split=split)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        found = datasets.load_from_disk(str(folder))
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    files = sorted(str(file) for file in folder.rglob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"it has no {split}-*.parquet")
    return datasets.load_dataset("parquet", data_files={split: files}, split=split)


def has_split(path: str, name: str, split: str) -> bool:
    """Whether a data set comes with a split of that name."""
    import datasets

    folder = local_folder(path, "DATASET_PATH")
    if folder is None:
        return split in datasets.get_dataset_split_names(path, name or None)
    try:
        _open(datasets, path, folder, name, split)
    except (OSError, ValueError, KeyError):
        interrupts.check()
        return False
    return True


def _clips_names(task: str, images: Images) -> list[str]:
    """The names by which CLIP was measured, in the order of the data set's labels; none where the task has none or the data set
    another number of classes. They lie in the order of the published data sets. A data set whose own names are numbers is read
    by these; where most of its names are CLIP's but for case and punctuation, each goes with its own."""
    path = CLASS_NAMES / f"{task}.json"
    names = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if len(names) != (len(images.names) or max(images.labels) + 1):
        return []
    if all(name.isdecimal() for name in images.names) and sorted(map(int, images.names)) == list(range(len(names))):
        return [names[int(name)] for name in images.names]
    by_words = {_words(name): name for name in names}
    if 2 * sum(_words(own) in by_words for own in images.names) > len(names):
        return [by_words.get(_words(own), own) for own in images.names]
    return names


def _words(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", name.casefold()))


def class_names(task: str, images: Images, folder: str) -> list[str]:
    """`folder`/{task}.json, a list, where there is one; else CLIP's names where they fit; else the data set's own.

    Raises UserError where there are none, or too few for the labels.
    """
    path = Path(folder) / f"{task}.json" if folder else None
    if path is not None and path.exists():
        names = read_json(path)
    else:
        names = _clips_names(task, images) or images.names
    if len(names) <= max(images.labels):
        raise UserError(
            f"{task} has labels up to {max(images.labels)} and {len(names)} class names; "
            f"write a list of them to {task}.json in a folder and give --CLASS_NAMES_PATH FOLDER"
        )
    return names


@torch.no_grad()
def zero_shot_head(text: nn.Module, tokenizer, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Unit embeddings of classes [classes, D]: of each template the unit text embedding, their mean made a unit again."""
    rows = []
    for name in names:
        prompts = [template.format(name) for template in templates]
        tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(text.device)
        embedded = F.normalize(text.get_text_features(**tokens).float(), dim=-1)
        rows.append(F.normalize(embedded.mean(dim=0), dim=-1))
    return torch.stack(rows)


def make_task(
    task: str, images: Images, head: torch.Tensor, processor, corrupt: Callable | None = None, workers: int = 8
) -> Task:
    """Pixels are decoded when they are asked for, `workers` images at a time. `corrupt(image, index)` comes before the
    processor, on the image in the size it will have."""
    pool = ThreadPoolExecutor(workers)
    side = min(processor.size.values())

    def pixel(index: int) -> torch.Tensor:
        image = images.load(index)
        if corrupt is not None:
            share = side / min(image.size)
            image = corrupt(image.resize([max(side, round(share * length)) for length in image.size]), index)
        return processor(image, return_tensors="pt")["pixel_values"][0]

    return Task(task, images.labels, head, lambda indices: torch.stack(list(pool.map(pixel, indices))))


def test_task(
    task: str, images: Images, head: torch.Tensor, processor, c: SimpleNamespace, group: str,
    corrupting: Callable[[str, int], Callable],
) -> Task:  # fmt: skip
    """A task with its images as they are ("clean", or a seed's name), or corrupted: by the data set's own split of that
    name, else made here."""
    if group == "clean" or group.startswith("seed"):
        return make_task(task, images, head, processor)
    where = data_of(task, c.DATASET_PATH)
    if has_split(*where, group):
        return make_task(task, Images(*where, group, "DATASET_PATH", c.images_per_task), head, processor)
    return make_task(task, images, head, processor, corrupting(group, c.seed))


def heads_of(
    text: nn.Module, tokenizer, images: Mapping[str, Images], folder: str
) -> dict[str, torch.Tensor]:  # fmt: skip
    """{task: zero-shot head}. Raises UserError where class names are missing."""
    names = {task: class_names(task, own, folder) for task, own in images.items()}
    return {
        task: zero_shot_head(text, tokenizer, own, TEMPLATES.get(task, PLAIN))
        for task, own in progress_bar(names.items(), "zero-shot heads", leave=False)
    }
