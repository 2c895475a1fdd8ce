"""Telling a folder from a name on the Hugging Face hub, and what to do where the hub is out of reach."""

import os
import urllib.error
import urllib.request
from pathlib import Path

from expert_merging.core import interrupts
from expert_merging.core.errors import UserError
from expert_merging.core.files import sha256


def local_folder(path: str, constant: str) -> Path | None:
    """The existing folder that `path` names, or None where it reads like a name on the hub, owner/name.

    Raises UserError for a file, and for what can only be a path (it starts with . / or ~, ends with /, or has more or
    fewer slashes than a hub name) where no such folder exists. `constant` is the name of what held `path`.
    """
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if path and folder.exists():
        raise UserError(f"{constant}: {path} is a file; give the folder it lies in")
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or path.endswith("/"):
        raise UserError(f"{constant}: there is no folder {path!r} (and a name on the hub would read owner/name)")
    return None


def offline_if_unreachable(seconds: float = 5.0) -> None:
    """Ask the hub for a sign of life; without one, tell Hugging Face's libraries to use only what they have cached.

    They would otherwise try again for most of a minute, a line on standard error each time. They read the variable
    when they are imported: call this before. Does nothing where the user has decided (HF_HUB_OFFLINE is set).
    """
    if "HF_HUB_OFFLINE" in os.environ:
        return
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError):
        interrupts.check()
        os.environ["HF_HUB_OFFLINE"] = "1"


def weights_folder(path: str, constant: str) -> Path:
    """The folder that `path` names, or a copy of the hub's safetensors and JSON files. Raises UserError where there is none."""
    folder = local_folder(path, constant)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{constant}: {path} is no folder here and cannot be had from the hub ({first_line(error)}); "
            f"bring the model's folder and give --{constant} FOLDER"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for a message of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def load_tokenizer(path: str, constant: str = "BASE_MODEL_PATH"):
    """The fast tokenizer in a local model folder or of a model on the hub.

    One without a padding token, as Mixtral's, pads with </s>: padding is told from its mask, never from its token.

    Raises UserError where there is none, or it is no fast one, or without </s>.
    """
    folder = local_folder(path, constant)
    if folder is None:
        offline_if_unreachable()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder or path)
    except Exception as error:  # a file cut short, or none that is fast, surfaces as whatever its reader raises
        interrupts.check()
        if folder:
            raise UserError(f"{constant}: the folder {path} holds no whole tokenizer ({first_line(error)})") from error
        raise UserError(
            f"{constant}: {path} is no folder here and its tokenizer cannot be had from the hub; "
            f"bring the model's folder and give --{constant} FOLDER"
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(f"{constant}: the tokenizer of {path} is not a fast one with </s>, as T5's is")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def weights_sha256(path: str) -> list[str]:
    """SHA-256 of each file of weights in a local folder; of a model on the hub its name."""
    folder = Path(path).expanduser()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [sha256(file) for file in files] or [path]
