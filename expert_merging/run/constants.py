"""Constants: lines you see at the top of a script, each also an option of its command line under its own name.

A script calls `run(main, globals())` last. Constants are the script's own and those of global_config.py: every public
name bound to a bool, int, float, str, tuple, `by_scale(...)` or a `Constant` of the library. The comment behind a constant
is its help text.
Imports neither torch nor transformers, so that `--help` and a mistyped name answer at once.
"""

import argparse
import ast
import io
import os
import shlex
import sys
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from expert_merging.core import interrupts
from expert_merging.core.errors import UserError
from expert_merging.core.host_memory import keep_freed_memory
from expert_merging.core.scales import SCALES, ByScale
from expert_merging.core.threads import share_cores
from expert_merging.run import ranges
from expert_merging.run.deviations import deviates
from expert_merging.run.devices import become_several


@dataclass(frozen=True)
class Constant:
    """A constant that several scripts take from the library, with the comment that its line would have."""

    name: str
    default: Any
    comment: str


def read_constants(
    script: dict[str, Any], arguments: list[str] | None = None, positional: tuple[str, ...] = ()
) -> SimpleNamespace:
    """The script's constants, after the command line, the scale and `{name}` references have had their say.

    Args:
        script: the script's `globals()`. `_instead` there, {shared constant: the script's own}, names those of global_config.py
            that have no say in it.
        arguments: the command line without the program's name; None reads `sys.argv`.
        positional: constants that may be given without their name, in this order.

    Raises:
        SystemExit(2): an unknown name or a value of the wrong type, said in one line; SystemExit(0) after `--help`.
        UserError: a `{name}` inside a string constant that no constant has, a constant of `_instead`, a value that a shared
            constant cannot have.
    """
    import global_config

    lines = {**_constants(vars(global_config)), **_constants(script)}
    comments = {**_comments(vars(global_config)), **_comments(script)}
    for name, value in lines.items():
        if isinstance(value, Constant):
            lines[name], comments[name] = value.default, value.comment
    parser = _Parser(
        prog=Path(script["__file__"]).name, usage="%(prog)s [--constant value ...]", description=script.get("__doc__"),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    instead: dict[str, str] = script.get("_instead", {})
    for name, value in lines.items():
        kind, said = _kind(value), f"{comments.get(name, '')} [{_shown(value)}]"
        parser.add_argument(
            f"--{name}", default=argparse.SUPPRESS, metavar=kind.__name__, type=_boolean if kind is bool else kind,
            nargs="+" if isinstance(_sample(value), tuple) else "?" if kind is bool else None,
            const=True if kind is bool else None,  # `--merge_only` alone means true
            choices=SCALES if name == "scale" else None,
            help=argparse.SUPPRESS if name in instead else said.replace("%", "%%").strip(),
        )  # fmt: skip
    for name in positional:
        parser.add_argument(name, default=argparse.SUPPRESS, nargs="?", help=argparse.SUPPRESS)
    given = vars(parser.parse_intermixed_args(arguments))
    if vain := [name for name in given if name in instead]:
        raise UserError(f"{vain[0]} has no say in this script; what has: {instead[vain[0]]}")
    scale = given.get("scale", lines["scale"])
    if scale not in SCALES:
        raise UserError(f"scale is {scale!r} in global_config.py; it must be one of {', '.join(SCALES)}")
    deviates(given.get("reading", lines["reading"]), "counts")  # raises when there is no such reading
    values = {name: getattr(value, scale) if isinstance(value, ByScale) else value for name, value in lines.items()}
    for name, value in given.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    constants = SimpleNamespace(**_filled(values))
    ranges.check(constants)
    return constants


def shared_arguments(constants: SimpleNamespace) -> list[str]:
    """Command-line words that give another script the same values of global_config.py's constants; as few as do."""
    import global_config

    script = {"__file__": global_config.__file__}
    words = ["--scale", constants.scale]
    defaults = vars(read_constants(script, words))
    for name in list(defaults):
        if (value := getattr(constants, name)) != defaults[name]:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
            defaults = vars(read_constants(script, words))  # paths may follow from it
    return words


def command(script: str, constants: SimpleNamespace, **own: Any) -> str:
    """The command that runs `script` with the same values of global_config.py's constants and its `own`."""
    words = ["python", script, *shared_arguments(constants)]
    return shlex.join([*words, *(word for name, value in own.items() for word in (f"--{name}", str(value)))])


def run(main: Callable[[SimpleNamespace], None], script: dict[str, Any], positional: tuple[str, ...] = ()) -> NoReturn:
    """Read the constants (`read_constants`), call `main` with them, and leave with 0, with 2 and one line for a user's
    mistake, or with 130 and one line after Ctrl-C or SIGTERM; with 1 and one line where another process of the run has
    died."""
    try:
        interrupts.watch()
        share_cores()
        constants = read_constants(script, positional=positional)
        become_several()
        keep_freed_memory()
        main(constants)
    except (Exception, KeyboardInterrupt) as error:
        status, line = _ending(Path(script["__file__"]).name, error)
        if not status:
            raise
        interrupts.ignore()
        _close_bars()
        print(line, file=sys.stderr)
        sys.exit(status)
    sys.exit(0)


def _ending(name: str, error: BaseException) -> tuple[int, str]:
    """The exit status of the script `name` after `error`, and its last line; 0 for what is a bug of ours.

    Whatever surfaces after an interrupt comes of it: what was being read then looks damaged.
    """
    if isinstance(error, KeyboardInterrupt) or interrupts.came():
        return 130, f"\n{name}: interrupted; the same command goes on from the last checkpoint"
    if isinstance(error, UserError):
        return 2, f"{name}: {error}"
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if isinstance(error, RuntimeError) and several and any(words in str(error) for words in _OF_A_LOST_PEER):
        return 1, f"{name}: another process of this run has ended; the same command goes on from the last checkpoint"
    return 0, ""


_OF_A_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def _close_bars() -> None:
    """Bars that stand open would be drawn once more when the process ends, after our line."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, and an unknown name is answered with those that exist."""

    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments" in message:
            names = sorted({a.dest for a in self._actions if a.dest != "help"}, key=str.lower)
            message = f"{message.replace('unrecognized arguments', 'no such constant')}; there are: {', '.join(names)}"
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def _constants(names: dict[str, Any]) -> dict[str, Any]:
    kinds = (bool, int, float, str, tuple, ByScale, Constant)
    return {name: value for name, value in names.items() if not name.startswith("_") and isinstance(value, kinds)}


def _sample(value: Any) -> Any:
    return value.paper if isinstance(value, ByScale) else value


def _kind(value: Any) -> type:
    sample = _sample(value)
    return type(sample[0]) if isinstance(sample, tuple) else type(sample)


def _shown(value: Any) -> str:
    if isinstance(value, ByScale):
        return ", ".join(f"{scale} {_shown(getattr(value, scale))}" for scale in SCALES)
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


_boolean.__name__ = "bool"  # argparse names the type in its message


def _comments(script: dict[str, Any]) -> dict[str, str]:
    """The comment on the line of each top-level assignment of the file with these globals: {name: comment}."""
    text = Path(script["__file__"]).read_text(encoding="utf-8")
    at_line = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and "fmt:" not in token.string
    }
    return {
        node.targets[0].id: at_line[node.end_lineno]
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.end_lineno in at_line
    }


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    """Replace `{name}` in string constants by the constant of that name; `{experts}` is left for the script."""
    for _ in range(6):  # how deep references may go; a circle would grow without end
        known = {**values, "experts": "{experts}"}
        filled = {}
        for name, value in values.items():
            try:
                filled[name] = value.format_map(known) if isinstance(value, str) else value
            except (KeyError, ValueError, IndexError) as error:
                raise UserError(f"constant {name} = {value!r} refers to {error}, which is no constant") from error
        if filled == values:
            return filled
        values = filled
    raise UserError("the constants refer to each other in a circle")
