"""Records of merged classifiers: one a method and group (a seed, or what a corruption is called), all of one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expert_merging.run import results


def missing(
    folder: Path, group: str, methods: Sequence[str], identity: dict[str, Any], place: str, but: tuple[str, ...] = ()
) -> list[str]:
    """The methods without a record in `folder`/records/`group`; this process is now the only one that may make them.

    Args:
        place: the constant that names `folder`.
        but: entries of the identity in which groups differ.

    Raises UserError where a record there, which would stand in the same table, was made with another identity, or another
    process is at it.
    """
    results.refuse_others(sorted(Path(folder).glob("records/*/*.json")), identity, place, but)
    paths = {method: path_of(folder, group, method) for method in methods}
    return [method for method, path in paths.items() if not results.is_done(path, identity, elsewhere=place)]


def add(folder: Path, group: str, method: str, found: dict[str, Any], seed: int, identity: dict[str, Any]) -> None:
    """Write a record, with where it comes from."""
    results.save(path_of(folder, group, method), identity, found | {"method": method, "group": group, "seed": seed})


def path_of(folder: Path, group: str, method: str) -> Path:
    return Path(folder) / "records" / group / f"{method}.json"
