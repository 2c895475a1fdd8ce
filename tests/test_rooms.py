"""The order of the library's rooms: a folder imports only folders above it, and no neighbour imports another; no module
and no script's main is long."""

import ast

import pytest
from conftest import ROOT

LIBRARY = ROOT / "expert_merging"
ROOMS = ("core", "run", "data", "merging", "switch", "causal", "training", "analysis", "experiment", "report")
NEIGHBOURS = ("wemoe", "meo", "hemoe")


def imported_rooms(source: str) -> set[str]:
    """The rooms whose modules a file imports, at its top or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "expert_merging":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("expert_merging."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("expert_merging.")}
    return rooms


def test_all_forms_of_an_import_are_seen():
    source = "import expert_merging.core.files\nfrom expert_merging import meo\n"
    source += "def f():\n    from expert_merging.run import results"
    assert imported_rooms(source) == {"core", "run", "meo"}


def test_the_library_holds_only_rooms():
    there = {path.name for path in LIBRARY.iterdir() if path.name != "__pycache__"}
    assert there == {*ROOMS, *NEIGHBOURS, "__init__.py"}


@pytest.mark.parametrize("room", [*ROOMS, *NEIGHBOURS])
def test_a_room_imports_only_rooms_above_it(room):
    allowed = {*ROOMS, room} if room in NEIGHBOURS else set(ROOMS[: ROOMS.index(room) + 1])
    for path in (LIBRARY / room).rglob("*.py"):
        below = imported_rooms(path.read_text(encoding="utf-8")) - allowed
        assert not below, f"{path.relative_to(ROOT)} imports {', '.join(sorted(below))}"


def test_no_file_changes_the_import_path():
    needle = "sys" + ".path"
    folders = ("*.py", "neighbours/*.py", "tools/*.py", "benchmarks/*.py", "tests/**/*.py", "expert_merging/**/*.py")
    guilty = [path for folder in folders for path in ROOT.glob(folder) if needle in path.read_text(encoding="utf-8")]
    assert guilty == []


def test_global_config_imports_no_room_that_reads_it():
    assert imported_rooms((ROOT / "global_config.py").read_text(encoding="utf-8")) == {"core"}


def test_no_module_of_the_library_is_long():
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in LIBRARY.rglob("*.py")}
    assert {path: lines for path, lines in lengths.items() if lines > 400} == {}


@pytest.mark.parametrize(
    "script", sorted(str(p.relative_to(ROOT)) for f in ("", "neighbours/", "tools/") for p in ROOT.glob(f"{f}*.py"))
)
def test_a_main_is_a_screenful(script):
    for node in ast.parse((ROOT / script).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            assert node.end_lineno - node.lineno < 40
