"""The card of a merged model (README.md): what it was made of and how, and its sources' licences; and its way to the hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import sha256
from expert_merging.core.hub import first_line
from expert_merging.merging.model_folders import Source


def shown(folders: Sequence[Path]) -> list[str]:
    """Folders by their names, or with what they lie in where two have one name; nothing about the rest of the path."""
    names = [folder.resolve().name for folder in folders]
    return names if len({*names}) == len(names) else ["/".join(folder.resolve().parts[-2:]) for folder in folders]


def card(
    out: Path,
    base: Source | None,
    models: Sequence[Source],
    label: str,
    constants: Mapping[str, Any],
    command: Sequence[str],
    usage: Sequence[str] = (),
) -> str:
    """The card's text, with the metadata that the hub reads at its head.

    Args:
        out: where the model goes, for its name.
        label: the method's name, `constants` its arguments.
        command: the words that made it; in them too folders stand by their names.
        usage: files that the merge read beside the models.
    """
    from huggingface_hub import ModelCardData

    sources = [*([base] if base else []), *models]
    names = shown([source.folder for source in sources])
    licences = [licence(source.folder) for source in sources]
    known = sorted({one for one in licences if one})
    agreed = known[0] if len(known) == 1 and all(licences) else None
    data = ModelCardData(base_model=names, library_name="transformers", license=agreed, tags=["merge"])
    table = [
        f"| {'base' if source is base else 'model'} | {name} | {_hashes(source)} | {one or 'not named'} |"
        for source, name, one in zip(sources, names, licences, strict=True)
    ]
    table += [f"| usage | {Path(path).name} | {sha256(path)} | |" for path in usage if path]
    # Folders stand by their names, and so do other files, but for the script.
    short = (
        {word: word for word in command[:2]}
        | {str(source.folder): name for source, name in zip(sources, names, strict=True)}
        | {str(out): out.name}
    )
    command = _that_make_it(command)
    words = " ".join(short.get(str(Path(word)), Path(word).name if Path(word).is_file() else word) for word in command)
    said = {0: "No card of a source names a licence.", 1: f"The sources' cards name the licence {', '.join(known)}."}
    lines = [
        f"# {out.name}", "", f"Merged by {label}" + _list(constants) + ":", "", "```", words, "```", "",
        "| | source | SHA-256 | licence |", "|---|---|---|---|", *table, "",
        said.get(len(known), f"The sources' cards name different licences, {', '.join(known)}: each binds.")
        + ("" if all(licences) or not known else " Not every source names one."),
    ]  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def _that_make_it(command: Sequence[str]) -> list[str]:
    """Without what says only where the model goes besides, and what may pass: the folder is the same."""
    words = list(command)
    if "--push_to" in words:
        del words[words.index("--push_to") :][:2]
    return [word for word in words if word != "--allow_unchanged"]


def licence(folder: Path) -> str:
    """What the folder's card names, "" where there is none or it cannot be read."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
    except Exception:  # a card that somebody wrote by hand may be anything, and no merge fails of it
        return ""
    named = getattr(found, "license_name", None) or getattr(found, "license", None) or ""
    return ", ".join(named) if isinstance(named, list) else str(named)


def _hashes(source: Source) -> str:
    return "<br>".join(f"{name} {digest}" for name, digest in source.sha256().items())


def _list(constants: Mapping[str, Any]) -> str:
    return " with " + ", ".join(f"{name} {value}" for name, value in constants.items()) if constants else ""


def check_hub(name: str) -> None:
    """Raises UserError where nobody is logged in, the hub cannot be reached, or `name` is no owner/name."""
    from huggingface_hub import HfApi

    if name.count("/") != 1:
        raise UserError(f"push_to is {name!r}; a name on the hub reads owner/name")
    try:
        HfApi().whoami()
    except (OSError, ValueError) as error:
        raise UserError(f"push_to {name}: the hub lets nobody in ({first_line(error)}); log in first") from error


def push(folder: Path, name: str) -> None:
    """Upload `folder` as the model `name` (owner/name), made where it does not exist. Raises UserError where that fails."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Merged model")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is whole, but {name} did not take it ({first_line(error)})") from error
