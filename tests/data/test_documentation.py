"""Documentation as text: each format cleaned, nothing twice, and nothing of what is held back."""

import gzip

import pytest

from expert_merging.core.errors import UserError
from expert_merging.data import documentation
from expert_merging.data.docstring_reader import Docstring, normalized
from expert_merging.data.docstring_splits import split_of

PROSE = "The function returns the value of the option that was given to it by the caller in the first place"
OTHER = "It is an error to call this method before the connection to the server has been opened by the user"


def page(body: str, lang: str = "en") -> str:
    return f'<html lang="{lang}"><body><nav><p>{PROSE} and back.</p></nav>{body}</body></html>'


def test_html_keeps_prose_only():
    body = f"<h2>A heading that is long enough to stay</h2><p>{PROSE}, <code>x</code>.</p><pre>x = {PROSE}</pre>"
    body += f"<ul><li><p>{OTHER}.</p></li></ul><table><tr><td><p>{PROSE} in a table.</p></td></tr></table>"
    kept = documentation.html_paragraphs(page(body))
    assert kept == ["A heading that is long enough to stay.", f"{PROSE}, x.", f"{OTHER}."]
    assert documentation.html_paragraphs(page(f"<p>{PROSE}</p>", "de")) == []
    assert documentation.html_paragraphs("") == []


def test_pod_loses_code_and_commands():
    text = f"=head1 NAME\n\n{PROSE} of B<bold C<code>> and L<the page|perlfunc>.\n\n    my $x = 1;\n\n"
    text += f"=over 4\n\n=item * {OTHER}\n\n=cut\n"
    assert documentation.pod_paragraphs(text) == [f"{PROSE} of bold code and the page.", f"* {OTHER}."]


def test_manual_pages_lose_macros():
    text = f".TH OPEN 2\n.SH NAME\n{PROSE}\n.BR open (2)\nas \\fBbold\\fR.\n.PP\n.nf\nint x = {PROSE};\n.fi\n{OTHER}.\n"
    assert documentation.manual_paragraphs(text) == [f"{PROSE} open(2) as bold.", f"{OTHER}."]


def test_dictionary_articles_are_apart():
    text = f"Chink \\Chink\\, n. [OE. chin.]\n   {PROSE}. {{Money}}\nCrack\n   {OTHER}.\n"
    assert documentation.dictionary_articles(text) == [[f"Chink , n. {PROSE}. Money."], [f"Crack {OTHER}."]]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.html").write_text(
        page(f"<p>{PROSE}.</p><p>{OTHER}. This is the secret of the whole test.</p>")
    )
    (tmp_path / "b" / "man" / "man2").mkdir(parents=True)
    (tmp_path / "b" / "man" / "man2" / "x.2.gz").write_bytes(gzip.compress(f".SH X\n{PROSE}.\n".encode()))
    (tmp_path / "b" / "module.py").write_text(
        f'def f(x):\n    """{PROSE} and it is not run.\n    """\n    raise SystemExit\n'
    )
    return tmp_path


def test_a_paragraph_comes_once_and_nothing_held_back(folder):
    known = {normalized("This is the secret of the whole test")}
    texts = documentation.read(folder, known)
    assert texts == {"a": [f"{PROSE}. {OTHER}."], "b": [f"f(x): {PROSE} and it is not run."]}


def test_what_mostly_stands_elsewhere_goes_whole(folder):
    known = {normalized(OTHER)}
    assert documentation.read(folder, known)["a"] == [f"{PROSE}."]  # of the second paragraph too little is left


def test_long_pages_are_cut_at_paragraphs():
    texts = list(documentation._cut([f"{i} {PROSE}." for i in range(60)]))
    assert all(len(text) <= documentation.LONGEST for text in texts) and len(texts) > 3
    assert " ".join(texts) == " ".join(f"{i} {PROSE}." for i in range(60))


def test_validation_and_test_docstrings_are_held_back():
    files = [f"scipy/f{i}.py" for i in range(60)]
    docs = [Docstring("scipy", file, "scipy.f", "f()", f"{PROSE}, in {file}.") for file in files]
    held = documentation.held_back(docs, ["A text that is kept out of it all."])
    told = {normalized(f"{PROSE}, in {file}") for file in files if split_of(file) != "train"}
    assert {piece for piece in held if piece.startswith("thefunction")} >= {
        t[: -len("py")] for t in told
    } or told <= held
    assert normalized("A text that is kept out of it all") in held


def test_no_folder_is_said_in_a_line(tmp_path):
    with pytest.raises(UserError, match="holds no folder of a package"):
        documentation.read(tmp_path / "nowhere", set())
