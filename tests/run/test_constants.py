"""Constants from scripts, scales and the command line."""

import importlib
import re

import pytest
from conftest import ROOT

import global_config
from expert_merging.core.errors import UserError
from expert_merging.core.scales import by_scale
from expert_merging.run.constants import Constant, command, read_constants, run, shared_arguments

SCRIPTS = (
    "datasets_preprocessing.py", "single_task_finetune.py", "Baseline_multi_task_finetune.py", "CAEM_multi_task_finetune.py",
    "tools/pretrain_base_model.py", "tools/reference_scores.py", "reproduce_tables.py",
    "neighbours/WEMoE_multi_task_merging.py", "neighbours/WEMoE_digits.py", "neighbours/WEMoE_clip.py",
    "neighbours/WEMoE_text.py",
)  # fmt: skip


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "a_script.py"
    path.write_text('task_type = "squad"  # which task\nnum_expert = 8\nmerge_only = False\n')
    return {
        "__file__": str(path), "__doc__": "A script.", "task_type": "squad", "num_expert": 8, "merge_only": False,
        "steps": by_scale(paper=3, night=2, tiny=1), "NAME": "{task_type}-{num_expert}-{experts}", "_private": 1,
    }  # fmt: skip


def test_defaults_are_the_papers(script):
    c = read_constants(script, [])
    assert (c.scale, c.lr, c.num_epochs, c.batch_size * c.gradient_accumulation_steps) == ("paper", 3e-4, 10, 24)
    assert c.task_types == ("ag_news", "squad", "xsum") and c.steps == 3
    assert (c.num_beams, c.repetition_penalty, c.no_repeat_ngram_size, c.adam_betas) == (3, 1.2, 3, (0.9, 0.98))
    assert (c.max_input_length, c.max_decoder_length, c.weight_decay) == (1000, 200, 0.005)


def test_a_shared_constant_that_has_no_say_is_refused_and_not_in_the_help(script, capsys):
    script["_instead"] = {"lr": "tune_lr"}
    with pytest.raises(UserError, match="lr has no say in this script; what has: tune_lr"):
        read_constants(script, ["--lr", "1"])
    assert read_constants(script, ["--num_expert", "4"]).lr == 3e-4
    with pytest.raises(SystemExit):
        read_constants(script, ["--help"])
    assert "--lr " not in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("neighbours/*.py")))
def test_what_has_a_say_in_place_of_a_shared_constant_is_there(path):
    script = vars(importlib.import_module(path.removesuffix(".py").replace("/", ".")))
    named = script.get("_instead", {})
    assert named.keys() <= vars(global_config).keys()
    assert {own for own in named.values() if " " not in own} <= script.keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num_beams", "0"), "num_beams is 0; it must be 1 or more"),
        (("--eval_batch_size", "0"), "eval_batch_size is 0; it must be 1 or more"),
        (("--batch_size", "-4"), "batch_size is -4; it must be 1 or more"),
        (("--num_epochs", "0"), "num_epochs is 0; it must be 1 or more"),
        (("--train_sample", "-5"), "train_sample is -5; it must be 0 or more"),
        (("--weight_decay", "nan"), "weight_decay is nan; it must be 0 or more"),
        (("--checkpoint_minutes", "inf"), "checkpoint_minutes is inf"),
        (("--lr", "0"), "lr is 0.0; it must be above 0"),
        (("--repetition_penalty", "-1"), "repetition_penalty is -1.0; it must be above 0"),
        (("--length_penalty", "nan"), "length_penalty is nan; it must be a number"),
        (("--adam_betas", "0.9", "1.5"), "adam_betas is 0.9 1.5; its numbers must be from 0 to below 1"),
        (("--adam_betas", "0.9"), "adam_betas is 0.9; it must be two numbers"),
        (("--seed", "-1"), "seed is -1; a seed is from 0 to 4294967295"),
        (("--seed", "99999999999"), "seed is 99999999999; a seed"),
        (("--task_types", "squad", "xsum", "squad"), "task_types has squad twice"),
    ],
)
def test_a_shared_constant_that_no_run_can_take_is_refused_at_once(script, words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        read_constants(script, list(words))


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".."])
def test_a_case_names_files_and_no_folders(script, name):
    with pytest.raises(UserError, match="current_case_name is .*; it names files"):
        read_constants(script | {"current_case_name": "CAEM"}, ["--current_case_name", name])


def test_no_seed_of_several_is_wrong(script):
    with pytest.raises(UserError, match="seeds is 0 -1; a seed is from 0"):
        read_constants(script | {"seeds": (0,)}, ["--seeds", "0", "-1"])


def test_a_command_names_what_is_not_the_default(script):
    c = read_constants(script, ["--scale", "tiny", "--RUN_DIR", "a b", "--seed", "3"])
    assert (
        command("x.py", c, task_type="squad") == "python x.py --scale tiny --seed 3 --RUN_DIR 'a b' --task_type squad"
    )


@pytest.mark.parametrize("path", SCRIPTS)
def test_help_is_about_constants_not_about_layout(path, capsys):
    with pytest.raises(SystemExit):
        read_constants(vars(importlib.import_module(path.removesuffix(".py").replace("/", "."))), ["--help"])
    assert "fmt:" not in capsys.readouterr().out


def test_command_line_beats_scale_beats_line(script):
    assert read_constants(script, ["--scale", "tiny"]).steps == 1
    c = read_constants(script, ["--scale", "tiny", "--steps", "7", "--lr", "1e-4", "--merge_only", "true"])
    assert (c.steps, c.lr, c.merge_only) == (7, 1e-4, True)


def test_a_constant_of_the_library_is_an_option_with_its_comment(script, capsys):
    script["depth"] = Constant("depth", by_scale(paper=3, night=2, tiny=1), "how deep")
    assert (
        read_constants(script, ["--scale", "tiny"]).depth == 1 and read_constants(script, ["--depth", "7"]).depth == 7
    )
    with pytest.raises(SystemExit):
        read_constants(script, ["--help"])
    assert "how deep [paper 3, night 2, tiny 1, real 2]" in capsys.readouterr().out


def test_references_follow_overrides(script):
    c = read_constants(script, ["--task_type", "xsum", "--RUN_DIR", "elsewhere"])
    assert c.NAME == "xsum-8-{experts}" and c.DATA_DIR == "elsewhere/data"


def test_tuples_take_several_words(script):
    assert read_constants(script, ["--task_types", "a", "b"]).task_types == ("a", "b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task_typ", "squad"], "no such constant: --task_typ squad; there are: "),
        (["--num_expert", "8.5"], "--num_expert"),
        (["--merge_only", "maybe"], "neither true nor false"),
        (["--scale", "huge"], "huge"),
        (["--lr"], "--lr"),
    ],
)
def test_mistakes_are_one_line_and_status_2(script, capsys, words, said):
    with pytest.raises(SystemExit) as exit:
        read_constants(script, words)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and said in error and error.startswith("a_script.py: ")


def test_unknown_reference_is_refused(script):
    with pytest.raises(UserError, match="NAME.*nowhere"):
        read_constants(script, ["--NAME", "{nowhere}"])


def test_circle_is_refused(script):
    with pytest.raises(UserError, match="circle"):
        read_constants({**script, "A": "{B}x", "B": "{A}x"}, [])


def test_help_shows_values_and_comments(script, capsys):
    with pytest.raises(SystemExit) as exit:
        read_constants(script, ["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "which task [squad]" in out and "paper 3, night 2, tiny 1" in out


@pytest.mark.parametrize(
    "words", ["A --num_expert 4 B", "A B --num_expert 4", "--num_expert 4 A B", "A --NAME B --num_expert 4"]
)
def test_folders_may_stand_apart(script, words):
    c = read_constants(script, words.split(), positional=("task_type", "NAME"))
    assert (c.task_type, c.num_expert, c.NAME) == ("A", 4, "B")


def test_shared_arguments_round_trip(script):
    c = read_constants(script, ["--scale", "tiny", "--task_types", "a", "b", "--RUN_DIR", "r", "--seed", "3"])
    again = read_constants(script, shared_arguments(c))
    assert vars(again) == vars(c)


def test_run_says_user_errors_in_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["a_script.py"])

    def main(c):
        raise UserError("it is missing")

    with pytest.raises(SystemExit) as exit:
        run(main, script)
    assert exit.value.code == 2 and capsys.readouterr().err == "a_script.py: it is missing\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_repeats_a_shared_constant(name):
    import importlib

    import global_config
    from expert_merging.run.constants import _constants

    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    assert not _constants(vars(module)).keys() & _constants(vars(global_config)).keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_imports_no_torch(name):
    import subprocess
    import sys

    from conftest import ROOT

    code = (
        "import sys, runpy; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--task_types" in done.stdout, done.stderr
