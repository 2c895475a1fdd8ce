"""Data sets with damaged files: each must be refused in one line, or read without a change to the rows that are whole."""

import random
from pathlib import Path
from types import SimpleNamespace

import raw_data

from expert_merging.core.errors import UserError
from expert_merging.data.tasks import get_task

_WRITERS = {"ag_news": raw_data.write_ag_news, "squad": raw_data.write_squad, "xsum": raw_data.write_xsum}


def damaged(content: bytes, dice: random.Random) -> bytes:
    """`content` with bytes changed, removed, doubled or put in, at one to three places."""
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(content) + 1)
        end = min(len(content), start + dice.choice((1, 1, 1, 4, 50, 5000)))
        kind = dice.randrange(5)
        put = {
            0: bytes(dice.randrange(256) for _ in range(end - start)),
            1: b"",
            2: content[start:end] * 2,
            3: dice.choice((b"\xff\xfe", b"\x00", b'"', b"\n", b"}", b"\xed\xa0\x80", b"\\u0000", b"null", b"1e999")),
            4: content[start:end][::-1],
        }[kind]
        content = content[:start] + put + content[end:]
    return content


def try_damaged(name: str, folder: Path, number: int, seed: int) -> tuple[int, int]:
    """Damage one file of a task's data `number` times in its published format and `number` times in parquet, and load.

    Returns (tried, refused). Raises AssertionError where a row comes out that no writer could have meant (an example of
    another kind than the task's), a message has two lines, and whatever else than a UserError the loader raises.
    """
    task, dice = get_task(name), random.Random(f"{name} {seed}")
    raw, parquet = folder / "raw", folder / "parquet"
    _WRITERS[name](raw)
    parquet.mkdir(parents=True)
    constants = SimpleNamespace(**{f"{name.upper()}_PATH": str(raw)})
    from expert_merging.data.raw_files import load_splits

    for split, rows in load_splits(str(raw), task._published).items():
        rows.to_parquet(parquet / f"{split}-00000-of-00001.parquet")
    tried = refused = 0
    for place in (raw, parquet):
        constants = SimpleNamespace(**{f"{name.upper()}_PATH": str(place)})
        contents = {path: path.read_bytes() for path in sorted(place.iterdir())}
        for _ in range(number):
            path = dice.choice(list(contents))
            path.write_bytes(damaged(contents[path], dice))
            tried += 1
            try:
                for examples in task.load(constants).values():
                    for example in examples:
                        assert isinstance(task.prompt(example), str) and isinstance(task.target(example), str)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
            path.write_bytes(contents[path])
    return tried, refused
