"""English documentation as text to pre-train on: docstrings of unpacked wheels, and what Debian's packages carry.

A folder holds one folder a package, unpacked (`unzip`, `dpkg -x`), nothing of it is run. Read are Python files (their
docstrings), HTML, Perl's pod, manual pages and dictionaries in the DICT format; markup, code, tables and navigation go.
"""

import gzip
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from expert_merging.core.errors import UserError
from expert_merging.data.docstring_reader import Docstring, ended, normalized, pieces_of_text, read_folder
from expert_merging.data.docstring_splits import one_line_texts, sentences, split_of

LONGEST = 1500  # characters of a text; a page is cut into such at the ends of paragraphs
_COMMON = frozenset("the of and to a in is for that it with as on be are this by or from an can if which not".split())
_OF_A_REFERENCE = ("generated", "reference", "modules", "api", "_sources", "whatsnew")  # docstrings once more; changes


def read(folder: Path, known: set[str]) -> dict[str, list[str]]:
    """The texts of each package in `folder`, {name: texts}, without sentences that are among the `known` letters.

    Paragraphs come once over all packages. Raises UserError where `folder` holds no package.
    """
    packages = sorted(path for path in Path(folder).iterdir() if path.is_dir()) if Path(folder).is_dir() else []
    if not packages:
        raise UserError(
            f"{folder} holds no folder of a package; unpack wheels and Debian packages there, a folder each"
        )
    seen: set[str] = set()
    texts = {}
    for package in packages:
        pages = [[text] for text in one_line_texts(read_folder(package))] + list(_pages(package))
        kept = [text for page in pages for text in _cut(_fresh(page, known, seen))]
        if kept:
            texts[package.name] = kept
    return texts


def held_back(docs: Iterable[Docstring], texts: Iterable[str]) -> set[str]:
    """Letters of every sentence in validation and test docstrings and in `texts`: what must not be pre-trained on."""
    held = {piece for doc in docs if split_of(doc.file) != "train" for piece in doc.pieces}
    return held | {piece for text in texts for piece in pieces_of_text(text)}


def _fresh(paragraphs: Iterable[str], known: set[str], seen: set[str]) -> Iterator[str]:
    """The paragraphs not `seen` before, without `known` sentences; one that loses half its letters goes."""
    for paragraph in paragraphs:
        letters = normalized(paragraph)
        if len(letters) < 25 or letters in seen:
            continue
        seen.add(letters)
        told = [part for part in sentences([paragraph]) if not known.intersection(pieces_of_text(part))]
        text = " ".join(told)
        if 2 * len(normalized(text)) > len(letters):
            yield text


def _cut(paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs joined into texts of at most LONGEST characters, where no paragraph is longer."""
    text = ""
    for paragraph in paragraphs:
        if text and len(text) + len(paragraph) > LONGEST:
            yield text
            text = ""
        text = f"{text} {paragraph}".strip()
    if text:
        yield text


def is_english(paragraphs: list[str]) -> bool:
    """Whether one word in twelve is a common English one."""
    words = re.findall(r"[^\W\d_]+", " ".join(paragraphs).lower())
    return 12 * sum(word in _COMMON for word in words) >= max(1, len(words))


# ---------------------------------------------------------------- files


def _pages(folder: Path) -> Iterator[list[str]]:
    """The paragraphs of each page, article or manual below `folder`, in English."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink() and _reader(path)]
    with ProcessPoolExecutor(2) as pool:
        for pages in pool.map(_read_file, files, chunksize=20):
            yield from pages


def _reader(path: Path) -> Callable[[str], list[list[str]]] | None:
    name = path.name.removesuffix(".gz")
    if any(re.fullmatch("[a-z]{2}-[A-Z]{2}", part) and part != "en-US" for part in path.parts):  # a translation
        return None
    if name.endswith((".html", ".htm")) and not set(path.parts).intersection(_OF_A_REFERENCE):
        return lambda text: [html_paragraphs(text)]
    if name.endswith(".pod"):
        return lambda text: [pod_paragraphs(text)]
    if re.search(r"/man\d/", str(path)):
        return lambda text: [manual_paragraphs(text)]
    return dictionary_articles if name.endswith(".dict.dz") else None


def _read_file(path: Path) -> list[list[str]]:
    raw = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    reader = _reader(path)
    assert reader is not None
    return [page for page in reader(raw.decode("utf-8", errors="replace")) if page and is_english(page)]


_BLOCKS = ("p", "li", "dd", "dt", "blockquote", "h1", "h2", "h3", "h4")
_NAVIGATION = {"sphinxsidebar", "sidebar", "related", "navheader", "navfooter", "wy-menu", "wy-breadcrumbs", "toc"}
_NOT_PROSE = ("script", "style", "nav", "pre", "table", "header", "footer", "form", "svg", "math", "aside")


def html_paragraphs(text: str) -> list[str]:
    """Paragraphs, list items and headings of a page, without code, tables and navigation."""
    from lxml import etree, html

    try:
        root = html.fromstring(text.encode(), parser=html.HTMLParser(encoding="utf-8"))
    except (etree.ParserError, ValueError):  # an empty page
        return []
    if not (root.get("lang") or "en").startswith("en"):
        return []
    etree.strip_elements(root, *_NOT_PROSE, with_tail=False)
    for div in [div for div in root.iter("div") if _NAVIGATION.intersection((div.get("class") or "").split())]:
        div.drop_tree()
    innermost = (element for element in root.iter(*_BLOCKS) if element.find(".//p") is None)
    innermost = (
        element for element in innermost if not any(child.tag in _BLOCKS for child in element.iterdescendants())
    )
    return _paragraphs(element.text_content().replace("¶", "") for element in innermost)


def pod_paragraphs(text: str) -> list[str]:
    """Perl's documentation: paragraphs that are not indented, commands and formatting codes gone."""
    lines = (part for part in re.split(r"\n\s*\n", text) if part and not part[0].isspace())
    prose = (
        re.sub(r"^=\w+[ \t]*", "", part) for part in lines if not part.startswith(("=cut", "=over", "=back", "=for"))
    )
    return _paragraphs(_formatted(part) for part in prose)


def _formatted(text: str) -> str:
    """Without pod's codes: B<bold>, C<< code >>, L<text|link>."""
    text = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", text)
    for _ in range(3):  # they may stand in one another
        text = re.sub(r"[A-Z]<(?:([^<>|]*)\|)?([^<>]*)>", lambda code: code[1] or code[2], text)
    return text


def manual_paragraphs(text: str) -> list[str]:
    """A manual page's paragraphs: macros end them, fonts and examples go."""
    parts, current, example = [], [], False
    for line in text.splitlines():
        macro = re.match(r"[.'](\w*) ?(.*)", line)
        if macro and macro[1] in ("EX", "nf", "EE", "fi"):
            example = macro[1] in ("EX", "nf")
        elif macro and macro[1] in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB"):
            current.append(macro[2].replace('"', "") if macro[1] in "BI" else re.sub(r'"([^"]*)"| ', r"\1", macro[2]))
        elif macro or line.startswith('\\"'):
            parts.append(" ".join(current))
            current = []
        elif not example:
            current.append(line)
    plain = (re.sub(r"\\f(?:\[\w*\]|\(\w\w|.)|\\&|\\\|", "", part) for part in [*parts, " ".join(current)])
    return _paragraphs(re.sub(r"\\\((?:aq|cq|oq)", "'", part).replace("\\-", "-").replace("\\", "") for part in plain)


def dictionary_articles(text: str) -> list[list[str]]:
    """The articles of a dictionary, whose first lines are not indented; the pronunciation between backslashes goes."""
    articles = re.split(r"\n(?=\S)", text)
    return [_paragraphs([re.sub(r"\\[^\\]*\\|\{|\}|\[[^\]]*\]", "", article)]) for article in articles]


def _paragraphs(texts: Iterable[str]) -> list[str]:
    """White space made plain; what has too few letters to be prose left out."""
    plain = (" ".join(text.split()) for text in texts)
    return [ended(text) for text in plain if len(text) >= 30 and sum(map(str.isalpha, text)) > 0.65 * len(text)]
