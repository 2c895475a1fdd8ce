"""The embedded text: the docstrings of what the requirements install, read with `ast` alone.

Nothing is imported or run, nothing is downloaded or redistributed. Every docstring is cleaned of code, tables, links
and markup, and belongs to the split of its source file. The text depends on the installed versions (and, for the
standard library, on the version of Python): `corpus_hash` tells one corpus from another.
"""

import ast
import functools
import gc
import hashlib
import importlib.util
import inspect
import json
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from expert_merging.core.errors import UserError
from expert_merging.core.threads import cores

STANDARD_LIBRARY = "python"  # the name that stands for the standard library among the packages
PACKAGES = (
    "accelerate", "datasets", "fsspec", "huggingface_hub", "joblib", "matplotlib", "mpmath", "narwhals", "networkx",
    "nltk", "numpy", "pandas", STANDARD_LIBRARY, "scipy", "sklearn", "sympy", "torch", "transformers",
)  # fmt: skip

# Tests, copies of other packages, and generated or foreign code.
_SKIPPED_FOLDERS = {
    "__pycache__", "_vendor", "array_api_compat", "array_api_extra", "conftest.py", "dist-packages", "ensurepip",
    "external", "externals", "extern", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "test_utils",
    "testing", "tests", "turtledemo",
}  # fmt: skip
_SKIPPED_FILES = (
    "transformers/models/switch_transformers",  # patched by this repository: its text must not change the data
    "transformers/models/deprecated/",
    "python/config-",  # the platform's own
    "torch/_numpy/",  # NumPy's documentation once more
    "pandas/_testing/",
)


@dataclass(frozen=True, order=True)
class Docstring:
    """One docstring. `file` is relative to the folder that holds the packages, posix; `name` is dotted."""

    package: str
    file: str
    name: str
    signature: str  # "f(x, y=1)"; empty for modules and classes
    text: str  # cleaned; lines and indentation are kept

    @functools.cached_property
    def blocks(self) -> list[str]:
        return blocks(self.text)

    @functools.cached_property
    def pieces(self) -> list[str]:
        return [piece for block in self.blocks for piece in pieces_of_text(block)]


# ---------------------------------------------------------------- reading


def source_files(package: str) -> Iterator[tuple[str, Path]]:
    """Yield (relative posix name, path) of a package's Python files, sorted. Raises UserError when it is not there."""
    if package == STANDARD_LIBRARY:
        top = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"the docstring tasks need the package {package}, which is not installed: run make setup")
        top = Path(list(spec.submodule_search_locations)[0])
    yield from _python_files(top, package)


def _python_files(top: Path, package: str) -> Iterator[tuple[str, Path]]:
    found = []
    for path in top.rglob("*.py"):
        parts = path.relative_to(top).parts
        relative = "/".join((package, *parts))
        skipped = _SKIPPED_FOLDERS.intersection(parts) or relative.startswith(_SKIPPED_FILES)
        if not skipped and path.is_file():
            found.append((relative, path))
    yield from sorted(found)


@functools.lru_cache(maxsize=1)
def read_docstrings(packages: tuple[str, ...] = PACKAGES) -> list[Docstring]:
    """Read and clean every docstring of `packages`, sorted by file, then in the order of the source.

    Takes 45 s on one core, less on more; the last answer is kept in memory. Raises UserError when a package is missing.
    """
    return _read((package, *found) for package in sorted(packages) for found in source_files(package))


def read_folder(folder: Path) -> list[Docstring]:
    """The docstrings of all Python files below `folder`, installed or not; the package is its name."""
    return _read((folder.name, *found) for found in _python_files(folder, folder.name))


def _read(files: Iterable[tuple[str, str, Path]]) -> list[Docstring]:
    with ProcessPoolExecutor(min(4, cores())) as pool:
        return [doc for docs in pool.map(_docstrings_of, list(files), chunksize=50) for doc in docs]


def _docstrings_of(package_file: tuple[str, str, Path]) -> list[Docstring]:
    package, relative, path = package_file
    source = path.read_bytes().decode("utf-8", errors="replace")
    if '"""' not in source and "'''" not in source:
        return []
    gc.disable()  # a worker makes syntax trees, which hold no cycles: a quarter of the time is saved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates and files for another version of Python
            return []
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    docs = [Docstring(package, relative, name, sig, clean(raw)) for name, sig, raw in _walk(tree, module)]
    return [doc for doc in docs if len(re.findall("[A-Za-z]", doc.text)) >= 20]


def _walk(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted name, signature, raw docstring) of a module, class or function and of what it holds, in order."""
    documented = ast.get_docstring(node, clean=False)
    if documented:
        signature = _signature(node) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
        yield name, signature, documented
    for statement in _statements(node):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(statement, f"{name}.{statement.name}")
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            yield from _added(statement.value, name)
        elif isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
            yield from _added(statement.value, name)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a body, those under `if`, `try`, `with` and loops included."""
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, None) or ():
            yield child
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _statements(child)


def _added(call: ast.Call, module: str) -> Iterator[tuple[str, str, str]]:
    """Docstrings that compiled objects get by a call: add_docstr(torch.abs, ...), add_newdoc("numpy", "abs", ...)."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function not in ("add_docstr", "_add_docstr", "add_docstr_all", "add_newdoc") or len(call.args) < 2:
        return
    if isinstance(call.args[0], ast.Constant):  # strings name it; the last may be a pair (attribute, text)
        *names, last = call.args
        if isinstance(last, ast.Tuple) and len(last.elts) == 2:
            names, last = [*names, last.elts[0]], last.elts[1]
        owner = ".".join(str(n.value) for n in names if isinstance(n, ast.Constant))
    else:
        owner, last = ast.unparse(call.args[0]), call.args[1]
    pieces = [n.value for n in ast.walk(last) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    if pieces:
        text = max(pieces, key=len)
        head = re.match(r"\s*(\w[\w.]*\([^()\n]*\))(?: *->.*)?\n", text)
        if head:
            yield f"{module}.{owner}", head[1], text[head.end() :]
        else:
            yield f"{module}.{owner}", "", text


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """`f(x, y=1, *, z=None)`, without types and without self."""
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    shown = [(p.arg, d) for p, d in zip(positional, defaults, strict=True) if p.arg not in ("self", "cls")]
    if a.vararg:
        shown.append(("*" + a.vararg.arg, None))
    shown += [(p.arg, d) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    if a.kwarg:
        shown.append(("**" + a.kwarg.arg, None))
    return f"{node.name}({', '.join(n if d is None else f'{n}={ast.unparse(d)}' for n, d in shown)})"


# ---------------------------------------------------------------- cleaning

_KEPT_DIRECTIVES = {"note", "warning", "tip", "important", "caution", "hint", "attention", "admonition"}
_DROPPED_SECTIONS = {"examples", "example", "references", "reference", "see also", "methods", "doctest", "usage"}
_UNDERLINE = re.compile(r"([-=~^]){3,}$")
_GOOGLE_CODE = re.compile(r"(?:examples?|usage|example usage|references?|see also)\s*:{1,2}$", re.I)
_MATH = re.compile(r":math:`([^`]*)`|\$([^$\n]+)\$")
_INLINE = [
    (re.compile(r"!?\[([^\]]+)\]\((?:https?:|\.|/|#)[^)\s]*\)"), r"\1"),  # [text](link)
    (re.compile(r":[a-zA-Z][\w:+.-]*:`[~!]?\s*([^`<]*?)\s*(?:<[^`>]*>)?`", re.S), r"\1"),  # :role:`text <target>`
    (re.compile(r"`([^`<]+?)\s*<[^`>]+>`_{0,2}", re.S), r"\1"),  # `text <link>`_
    (re.compile(r"<?\b(?:https?|ftp)://[^\s>]+>?"), ""),
    (re.compile(r"\s*\[(?:#?\w*\d\w*|\*|#)\]_"), ""),  # footnotes
    (re.compile(r"\[?(`{1,2})[~!.]{0,2}([^`]*?)\1_{0,2}\]?", re.S), r"\2"),  # ``code``, [`Name`]
    (re.compile(r"(?<![\w*])\*\*(?=\S)([^*\n]*\w[^*\n]*?)\*\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\w*])\*(\w[^*\n]*?)\*(?![\w*])"), r"\1"),
    (re.compile(r"</?(?:Tip|br|p|code|pre|b|i|em|u|hfoptions?)\b[^<>\n]*>", re.I), ""),
    (re.compile(r"%\(\w+\)s|\\[ \n]|\\(?=[*_`|])"), ""),  # templates, reST escapes
    (re.compile(r"\(\s*\)(?=\s*[.,]?$)|<>", re.M), ""),
]


def clean(raw: str) -> str:
    """A docstring as plain English: code, tables, links, directives and markup go; lines and indentation stay."""
    raw = unicodedata.normalize("NFKC", raw.replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(_prose_lines(inspect.cleandoc(raw).split("\n")))
    text = "\n".join(line for line in map(_short_math, text.split("\n")) if line is not None)
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<=\S)[ ]{2,}", " ", text)
    text = re.sub(r"[ ]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _short_math(line: str) -> str | None:
    """The line with its short formulas spelt out and its long ones gone; None when too little is left to read."""
    plain = _MATH.sub(lambda match: _plain_formula(match[1] or match[2] or ""), line)
    lost = any(not _plain_formula(a or b) for a, b in _MATH.findall(line))
    return None if lost and len(re.findall(r"[A-Za-z]{2,}", plain)) < 5 else plain


def _plain_formula(formula: str) -> str:
    return formula if len(formula) <= 30 and not re.search(r"[\\{}]", formula) else ""


def _prose_lines(lines: list[str]) -> Iterator[str]:
    deeper_than = None  # an indented block is being dropped: lines deeper than this
    until_blank = in_fence = in_dropped_section = False
    for i, line in enumerate(lines):
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if bare.startswith("```"):
            in_fence = not in_fence
            continue
        if in_fence:
            continue
        following = lines[i + 1].strip() if i + 1 < len(lines) else ""
        if bare and _UNDERLINE.fullmatch(following) and not _UNDERLINE.fullmatch(bare):  # a section begins
            in_dropped_section = bare.rstrip(":").lower() in _DROPPED_SECTIONS
            deeper_than, until_blank = None, False
        if in_dropped_section:
            continue
        if not bare:
            until_blank = False
            yield ""
            continue
        if until_blank or (deeper_than is not None and indent > deeper_than):
            continue
        deeper_than = None
        if bare.startswith((">>>", "In [", "$ ", "%%")) or re.fullmatch(r"[=-]+(?: +[=-]+)+", bare):  # doctest, table
            until_blank = True
            continue
        if bare[0] in "|+" and bare[-1] in "|+":
            continue
        directive = re.match(r"\.\.(?:$|\s+(?:([\w:-]+)::)?\s*(.*))", bare)
        if directive:
            if (directive[1] or "").lower() not in _KEPT_DIRECTIVES:
                deeper_than = indent
            elif directive[2]:
                yield " " * indent + directive[2]
            continue
        if re.match(r":(?!param|type|return|rtype|raise|arg|kwarg|keyword|key|ivar|var|cvar)[\w-]+:(?!`)", bare):
            continue  # options of a directive
        if _GOOGLE_CODE.fullmatch(bare):
            deeper_than = indent
            continue
        if bare.endswith("::"):
            line = line.rstrip()[:-1]
            if not re.fullmatch(r"(?:args|arguments|parameters|params|returns?|yields?|shape|notes?)\s*::", bare, re.I):
                deeper_than = indent
            if bare == "::":
                continue
        if re.fullmatch(r"[{%]\(?\w+[})]s?", bare):  # a template to be filled at import
            continue
        yield line


# A bullet, a number, a field, `name (type):`, `name : `
_ITEM = re.compile(r"[-*•] |\d+[.)] |:\w+|\*{0,2}[\w.]+ ?\([^()]*(?:\([^()]*\)[^()]*)*\) ?:|[\w*, ]+ : ")


def blocks(text: str) -> list[str]:
    """Cut a cleaned text into paragraphs, one line each, which end with a punctuation mark; headings are kept.

    A change of indentation or an empty line ends a paragraph, but not inside `name (type): description`.
    """
    result: list[str] = []
    current, current_indent = "", 0
    lines = text.split("\n")
    for i, line in enumerate(lines):
        bare = line.strip()
        if _UNDERLINE.fullmatch(bare) and i and lines[i - 1].strip():
            continue
        indent = len(line) - len(line.lstrip())
        same_paragraph = indent == current_indent or (indent > current_indent and not _heads(current))
        continues = current and bare and same_paragraph and not _ITEM.match(bare)
        heading = bool(bare) and i + 1 < len(lines) and bool(_UNDERLINE.fullmatch(lines[i + 1].strip()))
        if continues and not heading:
            current += " " + bare
            current_indent = indent
            continue
        if current:
            result.append(ended(current))
        current, current_indent = bare, indent
        if heading:
            result.append(ended(bare))
            current = ""
    if current:
        result.append(ended(current))
    return result


def _heads(line: str) -> bool:
    """Whether what follows, indented, is not the same sentence: `x : type`, `Args:`, a full sentence."""
    return bool(re.match(r"\*{0,2}\w[\w*, ]* : |.*[.:]$", line)) and not re.match(r"[\w*]+ ?\([^)]*\) ?:.*[^.]$", line)


def ended(block: str) -> str:
    """The block with a full stop, unless it ends with a punctuation mark."""
    return block if block[-1] in ".:!?;," else block + "."


_ASCII_LETTERS = {i: chr(i).lower() if chr(i).isalpha() else None for i in range(128)}


def normalized(text: str) -> str:
    """What two near-duplicates share: the letters, in lower case."""
    if text.isascii():  # nearly always, and many times faster
        return text.translate(_ASCII_LETTERS)
    return re.sub(r"[\W\d_]+", "", text.lower())


def pieces_of_text(text: str) -> list[str]:
    """The letters of what stands between two punctuation marks; what is too short to tell texts apart is left out."""
    return [letters for piece in re.split(r"[.!?:;]\s", text) if len(letters := normalized(piece)) >= 20]


def corpus_hash(examples) -> str:
    """SHA-256 of anything JSON can hold, in hexadecimal: the name of one exact corpus."""
    return hashlib.sha256(json.dumps(examples, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
