"""results/: all of it follows from its records; publishing needs a commit; what the index, marks and pages say."""

import json
import shutil
import subprocess

import pytest
from conftest import ROOT, call_main

from expert_merging.core.errors import UserError
from expert_merging.report import index, publish, records
from expert_merging.report.folders import Wing, check
from expert_merging.report.tables import Table

CLEAN, DIRTY = "0123456789ab", "0123456789ab-dirty"


def tables(groups):
    rows = [
        {"run": run, "score": of["score"], "from": records.source(groups, run)} for run, of in groups["seed0"].items()
    ]
    return [Table("scores", "Scores", "Points.", rows)]


def draw(groups, folder):
    for name in ("shown", "other"):
        (folder / f"{name}.png").write_bytes(b"png")
    return {"shown": "a figure", "other": "another"}


WING = Wing("a wing", records.read, tables, draw)


def groups(commit=CLEAN, score=1.5):
    record = {"score": score, "command": "python a.py --seed 0 --lr 1", "versions": {"commit": commit}}
    return {"seed0": {"b": record, "a[8|8]": record}, "seed10": {"b": record}, "seed9": {"b": record}}


def git(folder, *words):
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@y", *words], cwd=folder, check=True, capture_output=True
    )


@pytest.fixture
def root(tmp_path):
    """A repository with a page that shows a table and a figure, all committed."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- table: results/caem/x/tables/scores.md -->\n<!-- end -->\n")
    (tmp_path / "docs" / "page.md").write_text("![a figure](../results/caem/x/figures/shown.png)\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_all_of_results_and_every_page_follow_from_the_records(capsys):
    call_main("reproduce_tables.py", ["--check"])
    assert "every table in results/{caem,wemoe,meo,hemoe}, README.md and docs/ follows" in capsys.readouterr().out


def test_results_is_small_and_says_which_commit_made_each_record():
    places = index.folders(ROOT / "results")
    assert {place.relative_to(ROOT / "results").parts[0] for place in places} == {"caem", "wemoe", "meo", "hemoe"}
    for place in places:
        for group, run, record in records.every(records.read(place)):
            assert records.commit(record) != "unknown" and record["command"], (place, group, run)
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True, check=True)
        names = listed.stdout.splitlines()
        assert len(names) <= 150 and not [name for name in names if name.endswith((".csv", ".tex", ".svg", ".html"))]


def test_publish_writes_records_tables_the_figures_shown_the_index_and_the_pages(root):
    place = root / "results" / "caem" / "x"
    publish.publish({place: groups(), root / "results" / "caem" / "y": groups(score=2.5)}, WING, root=root)
    assert records.read(root / "results" / "caem" / "y") == groups(score=2.5)
    assert records.read(place) == groups() and list(records.read(place)) == ["seed0", "seed9", "seed10"]
    assert [path.name for path in (place / "figures").iterdir()] == ["shown.png"]
    page = (root / "README.md").read_text()
    assert "| b | 1.50 |\n" in page and "| a[8\\|8] | 1.50 |\n" in page and "seed0" not in page
    assert "| a[8\\|8] | `python a.py --lr 1` | 0 | 0123456789ab |" in (root / "results" / "README.md").read_text()
    assert publish.check(root, {"caem": WING}) == [] and check(place, WING) == []
    git(root, "add", "-A")
    publish.remake(root, {"caem": WING})
    assert subprocess.run(["git", "diff", "--quiet"], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--A /home/me/data/squad ../shared/x --b 1/2 --lr 1", "--A squad x --b 1/2 --lr 1"),
        ("--A '/home/me/my data/x' 'a b' --B=~/y/ --C models/z ..", "--A x 'a b' --B=y/ --C models/z .."),
        ("--A /x runs/a/b /tmp/r/", "--A x runs/a/b r/"),
    ],
)
def test_published_commands_do_not_say_where_folders_lie_on_somebodys_disk(root, words, shown):
    made = groups()
    made["seed0"]["b"] = {**made["seed0"]["b"], "command": f"python a.py {words}"}
    publish.publish({root / "results" / "caem" / "x": made}, WING, root=root)
    assert records.read(root / "results" / "caem" / "x")["seed0"]["b"]["command"] == f"python a.py {shown}"


def test_publish_refuses_a_tree_with_changes(root):
    (root / "README.md").write_text("changed")
    with pytest.raises(UserError, match="has changes that no commit holds .*-dirty.*; commit them") as error:
        publish.publish({root / "results" / "caem" / "x": groups()}, WING, root=root)
    assert "\n" not in str(error.value) and not (root / "results").exists()


@pytest.mark.parametrize("script", ["reproduce_tables.py", "neighbours/HEMoE_moe_construction.py"])
def test_scripts_refuse_before_any_work(script, tmp_path, monkeypatch):
    monkeypatch.setattr("expert_merging.run.provenance.commit", lambda root: DIRTY)
    with pytest.raises(UserError, match="0123456789ab-dirty.*commit them before you publish"):
        call_main(script, ["--scale", "tiny", "--publish", "--RUN_DIR", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_publish_refuses_what_git_does_not_know(tmp_path):
    with pytest.raises(UserError, match="git knows no commit of it"):
        publish.publish({tmp_path / "results" / "caem" / "x": groups()}, WING, root=tmp_path)


def test_publish_refuses_records_of_a_tree_with_changes(root):
    with pytest.raises(UserError, match="b of seed0 and 3 other records came from a working tree with") as error:
        publish.publish({root / "results" / "caem" / "x": groups(DIRTY)}, WING, root=root)
    assert "\n" not in str(error.value) and not (root / "results").exists()


def test_old_records_of_a_tree_with_changes_are_marked(root):
    mixed = groups() | {"seed9": groups(DIRTY)["seed9"]}
    assert (
        records.source(mixed, "b") == "seed{0,10,9†}.json: b"
        and records.source(mixed, "a[8|8]") == "seed0.json: a[8|8]"
    )
    assert records.source({"clean": mixed["seed0"]}, "b", "a[8|8]") == "clean.json: b; a[8|8]"
    place = root / "results" / "caem" / "x"
    records.write(place, mixed)
    publish.remake(root, {"caem": WING})
    assert records.MARKED in (place / "tables" / "scores.md").read_text()
    text = (root / "results" / "README.md").read_text()
    assert "**1 of the 4 records were made from a working tree" in text and "| 9 | 0123456789ab-dirty † |" in text


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "results/caem/x/tables/scores.md").unlink(), "scores.md is missing"),
        (lambda root: (root / "results/caem/x/tables/other.md").write_text("| a |"), "other.md is no table"),
        (lambda root: (root / "results/caem/x/figures/shown.png").unlink(), "shown.png, which is not there"),
        (lambda root: (root / "results/README.md").write_text("# Results"), "results/README.md does not say"),
        (
            lambda root: (root / "README.md").write_text((root / "README.md").read_text().replace("1.50", "2")),
            "other tables",
        ),
        (lambda root: records.write(root / "results/caem/x", groups(score=2.5)), "scores.md differs"),
        (lambda root: shutil.copytree(root / "results/caem", root / "results/poems"), "poems/x is below none of"),
    ],
)
def test_check_sees(root, spoil, said):
    publish.publish({root / "results" / "caem" / "x": groups()}, WING, root=root)
    spoil(root)
    try:
        wrong = publish.check(root, {"caem": WING})
    except UserError as error:
        wrong = [str(error)]
    assert any(said in line for line in wrong), wrong


def test_the_neighbours_way_makes_tables_again_and_publishes(tmp_path, capsys):
    records.write(tmp_path / "x", groups())
    publish.command(WING, lambda run: {}, [str(tmp_path / "x")])
    assert "| b | 1.50 | seed{0,9,10}.json: b |" in capsys.readouterr().out
    for words, said in (([], "give the folder"), ([str(tmp_path / "nothing")], "has no records")):
        with pytest.raises(SystemExit) as ended:
            publish.command(WING, lambda run: {}, words)
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_record_is_a_line_of_its_own(tmp_path):
    records.write(tmp_path, groups())
    lines = (tmp_path / "seed0.json").read_text().splitlines()
    assert (
        len(lines) == 4
        and lines[1].startswith('"a[8|8]": ')
        and json.loads("{" + lines[2] + "}") == {"b": groups()["seed0"]["b"]}
    )
