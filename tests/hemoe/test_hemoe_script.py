"""neighbours/HEMoE_moe_construction.py from end to end on a model of some thousand weights, and what it says about mistakes."""

import json
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import call_main, constants_of, run_script

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.data.scores import unpack

SCRIPT = "neighbours/HEMoE_moe_construction.py"
METHODS = ("HEMoE", "HEMoE_start", "random_heterogeneous", "EMoE")
WORDS = "red green blue one two three four five cat dog bird fish".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model, instruction data of two tasks and two lm_eval tasks; nothing run yet."""

    from expert_merging.hemoe import questions, small_llama

    folder = tmp_path_factory.mktemp("hemoe")
    rng = random.Random(0)
    found = {}
    for task in ("copy", "turn"):
        rows = []
        for _ in range(60):
            words = rng.sample(WORDS, 4)
            output = " ".join(words if task == "copy" else words[::-1])
            rows.append({"instruction": f"{task} {' '.join(words)}:", "output": output, "task": task})
        test = [
            {**row, "choices": [row["output"], " ".join(row["output"].split()[::-1])], "label": 0} for row in rows[:6]
        ]
        found[task] = {"train": rows[6:], "test": test}
    questions.write_doc_choice(found, folder / "train", folder / "eval")
    tokenizer = small_llama.new_tokenizer([row["output"] for row in found["copy"]["train"]], 300)
    torch.manual_seed(0)
    shape = SimpleNamespace(base_hidden_size=16, base_intermediate_size=24, base_layers=3, base_heads=2)
    small_llama.new_llama(shape, tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def words(place, runs: str = "runs", **constants) -> list[str]:
    """Words for the script that make it quick; at scale paper the model and the data are the user's."""
    values = {
        "scale": "paper", "device": "cpu", "RUN_DIR": place / runs, "base_model": place / "base",
        "INSTRUCTIONS_PATH": place / "train", "EVAL_TASKS_PATH": place / "eval", "domains_from": "tasks", "num_domains": 2,
        "num_experts": 2, "moe_layers": (0, 2), "max_tokens": 32, "held_out": 4, "score_sequences": 8, "num_modules": 6,
        "solver_starts": 2, "router_k": 1, "tune_steps": 3, "tune_batch": 4, "tune_accumulation": 1, "methods": METHODS,
        "eval_tasks": ("doc_copy", "doc_turn"), "eval_batch_size": 8, **constants,
    }  # fmt: skip
    return [
        word for name, value in values.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(place):
    """What the script printed when it ran all steps."""
    result = run_script(SCRIPT, words(place))  # every step, as a process of its own
    assert result.returncode == 0, result.stderr[-2000:]
    return result


def test_from_dense_model_to_report(place, done):
    seed = place / "runs/hemoe/seed0"
    assert read_json(seed / "domains.json")["names"] == ["copy", "turn"]
    for method in METHODS:
        measured, accuracy = (read_json(seed / method / f"{name}.json")["k"] for name in ("measure", "evaluation"))
        assert list(measured) == list(accuracy) == ["1", "2"]
        assert all(0 <= of_task["main"] <= 1 for found in accuracy.values() for of_task in found.values())
        shares = [measured[k]["share"]["copy"] for k in ("1", "2")]
        assert shares[0] < shares[1]
        assert shares[1] == pytest.approx(1.0)
        assert (seed / method / "tuned" / "model.safetensors").exists()
        assert not (seed / method / "tuning.run").exists()
    report = place / "runs/hemoe/report"
    table = (report / "tables/accuracy_at_share.md").read_text()
    assert all(name in table for name in ("dense, as it is", "dense, tuned alike", "routers from the map"))
    assert (report / "figures/accuracy_by_share.png").stat().st_size > 10_000
    assert len(read_json(report / "seed0.json")) == len(METHODS) + 2
    assert "Accuracy at equal activated share" in done.stdout


def test_before_tuning_all_experts_are_the_dense_model(place, done):
    """Group 10 of the specification ends with a comparison; what can be asserted of it is where it begins."""
    from transformers import AutoModelForCausalLM

    from expert_merging.hemoe.mixtures import load_converted

    ids = torch.tensor([[1, 70, 80, 90, 100]])
    dense = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    c = constants_of(SCRIPT, words(place))
    for method in ("HEMoE", "random_heterogeneous", "EMoE"):
        moe = load_converted(c, method).eval()
        moe.config.k = 2
        assert torch.allclose(moe(ids).logits, dense(ids).logits, atol=1e-5, rtol=0)


def test_random_experts_have_the_sizes_of_hemoe_and_the_map_is_kept(place, done):
    configs = {
        m: read_json(place / f"runs/hemoe/seed0/{m}/model/config.json") for m in ("HEMoE", "random_heterogeneous")
    }
    sizes = {method: [[len(e) for e in layer] for layer in config["experts"]] for method, config in configs.items()}
    assert sizes["HEMoE"] == sizes["random_heterogeneous"]
    assert configs["HEMoE"]["experts"] != configs["random_heterogeneous"]["experts"]
    assert configs["random_heterogeneous"]["serves"] is None
    for layer in configs["HEMoE"]["serves"]:
        assert len(layer) == 2
        assert all(sum(row) >= 1 for row in layer)


def test_what_is_there_is_not_done_again(place, done):
    files = {path: path.stat().st_mtime_ns for path in (place / "runs/hemoe/seed0").rglob("*") if path.is_file()}
    call_main(SCRIPT, words(place))
    assert files == {
        path: path.stat().st_mtime_ns for path in (place / "runs/hemoe/seed0").rglob("*") if path.is_file()
    }


def test_a_step_alone_takes_up_where_the_files_are(place, done):
    target = place / "again/hemoe/seed0"
    shutil.copytree(place / "runs/hemoe/seed0", target)
    was = {
        name: (target / f"HEMoE/{name}").read_bytes()
        for name in ("model/routers.safetensors", "tuned/model.safetensors")
    }
    shutil.rmtree(target / "HEMoE")
    for path in [target / "random_heterogeneous/measure.json", target / "random_heterogeneous/evaluation.json"]:
        record = read_json(path)
        kept = record["k"].pop("2")
        path.write_text(json.dumps(record))
    for step in ("partition", "conversion", "tuning", "measure", "evaluation"):
        call_main(SCRIPT, words(place, "again", steps=(step,), methods=("HEMoE", "random_heterogeneous")))
    assert read_json(path)["k"]["2"] == kept  # the last one: accuracies
    assert was == {name: (target / f"HEMoE/{name}").read_bytes() for name in was}  # bit for bit


def test_released_files_go_out_and_come_in(place, done):
    out = place / "runs/hemoe/seed0/HEMoE/parts"
    assert sorted(path.name for path in out.iterdir()) == ["0.part.2", "2.part.2"]
    other = {"steps": ("domains", "scores", "partition", "conversion"), "methods": ("parts",), "PARTS_PATH": out}
    call_main(SCRIPT, words(place, "imported", **other))
    experts = [
        read_json(place / f"{runs}/hemoe/seed0/{method}/model/config.json")["experts"]
        for runs, method in (("runs", "HEMoE"), ("imported", "parts"))
    ]
    assert experts[0] == experts[1]
    with pytest.raises(UserError, match="splits 24 neurons into 2 experts; .* num_experts is 3"):
        call_main(SCRIPT, words(place, "imported3", num_experts=3, **other))


def test_tables_follow_from_the_records(place, done, tmp_path, monkeypatch):
    from expert_merging.hemoe import report

    shutil.copytree(place / "runs/hemoe/report", tmp_path / "report")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "report")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.check()
    path = tmp_path / "report/seed0.json"
    record = read_json(path)
    record["HEMoE"]["k"]["1"]["loss"]["copy"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="does not follow"):
        report.check()


def test_publishing_adds_to_what_was_published_from_elsewhere(place, done, tmp_path, monkeypatch):
    from expert_merging.hemoe import report

    earlier = tmp_path / "results" / "paper" / "seed7.json"
    earlier.parent.mkdir(parents=True)
    record = read_json(place / "runs/hemoe/report/seed0.json")
    earlier.write_text(json.dumps({"dense": record["dense"]}))
    published = {}
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report.publish, "publish", lambda groups, wing: published.update(groups))
    c = SimpleNamespace(HEMOE_DIR=str(place / "runs/hemoe"), scale="paper", publish=True)
    report.make(c)
    assert published == {earlier.parent: {"seed7": {"dense": record["dense"]}, "seed0": record}}
    record["dense"]["identity"]["eval_examples"] = 5
    earlier.write_text(json.dumps({"dense": record["dense"]}))
    with pytest.raises(UserError, match="was made with eval_examples"):
        report.make(c)
    report.make(SimpleNamespace(**{**vars(c), "publish": False}))  # its own report does without


def test_curves_are_compared_at_equal_shares():
    from expert_merging.hemoe import report

    def record(points):
        return {
            "k": {
                str(k): {"share": {"a": s}, "accuracy": {"a": a / 100}, "loss": {"a": 1 - a / 100}}
                for k, (s, a) in enumerate(points)
            }
        }

    low, high = record([(0.2, 20), (1.0, 60)]), record([(0.1, 30), (0.6, 50), (1.0, 70)])
    assert report.at(low, "accuracy", 0.6) == pytest.approx(40)
    assert report.at(low, "accuracy", 0.1) is None
    assert report.mean_difference(high, low, "accuracy") == pytest.approx((12 + 10) / 2, abs=0.05)
    assert report.mean_difference(high, low, "loss") == pytest.approx(-0.11, abs=0.0005)


@pytest.mark.parametrize(
    ("constants", "said"),
    [
        ({"steps": ("scoring",)}, "steps: there is no 'scoring'; there are data, base, domains"),
        ({"methods": ("moe",)}, "methods: there is no 'moe'; there are HEMoE"),
        ({"router_k": 3}, "router_k is 3; give 1 to 2"),
        ({"eval_ks": (1, 9)}, "eval_ks or before_k holds 9"),
        ({"balance_scale": "n"}, "balance_scale: there is no 'n'"),
        ({"tune_steps": 0}, "tune_steps is 0"),
        ({"solver_starts": 0}, "solver_starts is 0"),
        (
            {"domains_from": "clusters", "num_experts": 3, "methods": ("MoEBERT_domains",)},
            "MoEBERT_domains makes an expert a domain",
        ),
        ({"INSTRUCTIONS_PATH": "/nowhere"}, "INSTRUCTIONS_PATH: there is no folder /nowhere"),
        ({"num_domains": 3}, "num_domains is 3, but .* has 2 tasks"),
        ({"held_out": 54}, "has no examples beside the 54 held out"),
        ({"base_model": "/nowhere"}, "base_model: there is no folder '/nowhere'"),
        ({"moe_layers": (0, 3), "steps": ("domains",)}, "moe_layers names layer 3; .* has layers 0 to 2"),
        (
            {"scale": "tiny", "moe_layers": (0, 4), "steps": ("data",), "base_model": "{HEMOE_DIR}/seed{seed}/base"},
            "moe_layers names layer 4; .*/base has layers 0 to 3",
        ),
        ({"score_sums": "float16"}, "score_sums: there is no 'float16'; there are float64, bfloat16"),
        ({"solver": "cplex"}, "solver is 'cplex'"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"num_modules": 7, "methods": ("HEMoE_modules",)}, "24 neurons do not make 7 modules of equal size"),
        ({"experts_per_domain": 9.0}, "a domain is served by up to 9 experts; that must be 1 to 2"),
        ({"methods": ("parts",)}, "PARTS_PATH: '' holds no LAYER.part.EXPERTS file"),
        ({"num_experts": 3, "methods": ("MoEBERT_domains",)}, "MoEBERT_domains makes an expert a domain"),
        ({"QUESTIONS_PATH": "/nowhere"}, "QUESTIONS_PATH: .*scale real"),
        ({"tune_tasks": ("copy", "fly")}, "tune_tasks: .* has no examples of fly; there are copy, turn"),
        ({"steps": ("measure",)}, "domains.json does not exist; run the step domains first"),
        ({"steps": ("report",)}, "has no records: run the steps measure and evaluation first"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, constants, said):
    shared = {"steps": ("domains", "scores", "partition")} | constants
    with pytest.raises(UserError, match=said) as error:
        call_main(SCRIPT, [*words(place, **shared), "--RUN_DIR", str(tmp_path / "runs")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("step", "constants", "said"),
    [
        (
            "evaluation",
            {"eval_tasks": ("doc_copy", "nothing"), "tune_steps": 3},
            "made with other constants .asked_sha256.*eval_tasks",
        ),
        ("scores", {"max_tokens": 16}, "scores.json was made with other constants .max_tokens was 32, is now 16"),
        ("tuning", {"tune_lr": 1.0}, "tuning.json was made with other constants .tune_lr was 0.0003, is now 1.0"),
    ],
)
def test_other_constants_are_refused(place, done, step, constants, said):
    with pytest.raises(UserError, match=said):
        call_main(SCRIPT, words(place, steps=(step,), **constants))


def test_another_base_of_the_same_shape_is_refused_at_the_small_scales_too(place, tmp_path):
    from transformers import AutoModelForCausalLM

    steps = ("domains", "scores", "partition")
    at_tiny = words(place, scale="tiny", steps=steps, methods=("HEMoE",), HEMOE_DIR=tmp_path / "hemoe")
    call_main(SCRIPT, at_tiny)
    call_main(SCRIPT, at_tiny)
    shutil.copytree(place / "base", tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    split = tmp_path / "hemoe/seed0/HEMoE/split.json"
    before = split.read_bytes()
    for step in steps:
        with pytest.raises(UserError, match="made with other constants .base_model was .*another HEMOE_DIR") as error:
            call_main(SCRIPT, [*at_tiny, "--steps", step, "--base_model", str(tmp_path / "other")])
        assert "\n" not in str(error.value)
    assert split.read_bytes() == before
    # Where a model lies does not matter: moved, it is the same; and our own is told by the constants that make it.
    shutil.copytree(place / "base", tmp_path / "moved")
    call_main(SCRIPT, [*at_tiny, "--base_model", str(tmp_path / "moved")])


def test_our_own_base_is_told_by_the_constants_that_make_it(place):
    from expert_merging.hemoe import pipeline
    from expert_merging.run.constants import read_constants
    from neighbours import HEMoE_moe_construction as script

    own = read_constants(vars(script), ["--scale", "tiny", "--device", "cpu", "--HEMOE_DIR", str(place / "runs")])
    assert "base_model" not in pipeline.identity(own, "split") and "base_steps" in pipeline.identity(own, "split")
    assert (
        "precision" not in pipeline.identity(own, "split") and pipeline.identity(own, "tuning")["precision"] == "fp32"
    )


def test_damaged_files_are_one_line(place, done, tmp_path):
    target = tmp_path / "runs/hemoe/seed0"
    shutil.copytree(place / "runs/hemoe/seed0", target)
    (target / "scores.npz").write_bytes(b"no")
    (target / "HEMoE/model/routers.safetensors").write_bytes(b"no")
    shutil.rmtree(target / "HEMoE_start")
    (target / "HEMoE/tuning.json").unlink()
    for step, said in (("partition", "scores.npz does not hold scores"), ("tuning", "HEMoE/model is damaged")):
        with pytest.raises(UserError, match=said) as error:
            call_main(SCRIPT, [*words(place, steps=(step,)), "--RUN_DIR", str(tmp_path / "runs")])
        assert "\n" not in str(error.value)


def test_a_partition_by_the_gates_alone_needs_no_scores(place, done, tmp_path):
    target = tmp_path / "runs/hemoe/seed0"
    shutil.copytree(place / "runs/hemoe/seed0", target)
    (target / "scores.npz").unlink()
    shutil.rmtree(target / "EMoE")
    again = [*words(place, steps=("partition",), methods=("EMoE",)), "--RUN_DIR", str(tmp_path / "runs")]
    call_main(SCRIPT, again)
    for file in (place / "runs/hemoe/seed0/EMoE/parts").iterdir():
        assert (target / "EMoE/parts" / file.name).read_bytes() == file.read_bytes()


def test_evaluation_tasks_that_cannot_be_had_are_one_line(place, tmp_path):
    from expert_merging.hemoe.evaluation import load_tasks

    with pytest.raises(UserError, match="no folder"):
        load_tasks(("doc_copy",), str(place / "nowhere"))
    shutil.copytree(place / "eval", tmp_path / "eval")
    path = tmp_path / "eval/doc_copy.yaml"
    path.write_text(path.read_text().replace("doc_copy.jsonl", "gone.jsonl"))
    with pytest.raises(UserError, match="the data of doc_copy cannot be had .*gone.jsonl"):
        load_tasks(("doc_copy",), str(tmp_path / "eval"))


def test_lm_eval_scores_are_those_of_the_likeliest_choice(place):
    """Accuracy by lm_eval against a loop over choices: log-likelihood over the number of bytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from expert_merging.hemoe import evaluation

    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tasks = evaluation.load_tasks(("doc_copy", "doc_turn"), str(place / "eval"))
    found = evaluation.accuracy(model, tokenizer, tasks, 4)
    for task, accuracy in found.items():
        right, rows = 0, [json.loads(line) for line in (place / f"eval/{task}.jsonl").read_text().splitlines()]
        for row in rows:
            values = []
            for choice in row["choices"]:
                prompt = tokenizer(row["instruction"])["input_ids"]
                ids = torch.tensor([tokenizer(f"{row['instruction']} {choice}")["input_ids"]])
                with torch.inference_mode():
                    logs = model(ids).logits[0, :-1].log_softmax(-1)
                of_choice = logs[torch.arange(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum().item()
                values.append(of_choice / len(choice.encode()))
            right += values.index(max(values)) == row["label"]
        assert accuracy["main"] == accuracy["acc_norm"] == pytest.approx(right / len(rows))
        assert unpack(accuracy["each"]).mean() == pytest.approx(100 * right / len(rows), abs=0.01)


# ---------------------------------------------------------------- the tasks made of docstrings


def test_tasks_made_of_docstrings():
    from expert_merging.data import doc_choice, docstring_reader

    docs = docstring_reader.read_docstrings(("joblib", "numpy"))
    found = doc_choice.examples(docs, train=40, test=8)
    again = doc_choice.examples(docs, train=40, test=8)
    assert found == again
    assert tuple(found) == doc_choice.TASKS
    for task, splits in found.items():
        seen = {docstring_reader.normalized(row["instruction"] + row["output"]) for row in splits["train"]}
        assert splits["train"] and splits["test"], task
        for row in splits["test"]:
            assert row["choices"][row["label"]] == row["output"]
            assert len(set(row["choices"])) == len(row["choices"]) == (6 if task == "topic" else 4)
            assert docstring_reader.normalized(row["instruction"] + row["output"]) not in seen
            if task == "order":
                assert len({tuple(sorted(choice.split())) for choice in row["choices"]}) == 1


def test_a_model_for_each_task(place, done, tmp_path):
    """The paper tunes one model a task: domains, scores and partition are shared, each is asked its own task, and the
    table has the mean."""
    shutil.copytree(place / "runs/hemoe", tmp_path / "runs/hemoe")
    seed = tmp_path / "runs/hemoe/seed0"
    early = {name: (seed / name).stat().st_mtime_ns for name in ("domains.json", "scores.json", "HEMoE/split.json")}
    given = words(place, methods=("HEMoE", "random_heterogeneous"), tune_tasks=("copy", "turn"), before_k=1)
    call_main(SCRIPT, [*given, "--RUN_DIR", str(tmp_path / "runs")])
    assert early == {name: (seed / name).stat().st_mtime_ns for name in early}
    for task in ("copy", "turn"):
        found, held = (read_json(seed / f"HEMoE/{name}_{task}.json")["k"] for name in ("evaluation", "measure"))
        assert list(found["1"]) == [f"doc_{task}"]
        assert list(held["1"]["loss"]) == [task]
    weights = [(seed / f"HEMoE/tuned{end}/model.safetensors").read_bytes() for end in ("", "_copy", "_turn")]
    assert len(set(weights)) == 3
    records = read_json(tmp_path / "runs/hemoe/report/seed0.json")
    own = records["HEMoE_per_task"]["k"]["2"]["accuracy"]
    assert own == {
        f"doc_{t}": read_json(seed / f"HEMoE/evaluation_{t}.json")["k"]["2"][f"doc_{t}"]["main"] for t in ("copy", "turn")
    }  # fmt: skip
    before = records["HEMoE_before"]["k"]
    assert list(before) == ["1"]
    assert before["1"]["accuracy"].keys() == own.keys()
    table = (tmp_path / "runs/hemoe/report/tables/by_task.md").read_text()
    assert all(row in table for row in ("HEMoE, neurons, before tuning", "HEMoE, neurons, tuned for each task"))
    assert records["HEMoE"]["seconds"].keys() >= {"domains", "scores", "partition", "conversion", "tuning"}


def test_a_tuned_mixture_loads_without_this_package(place, done, tmp_path):
    """In a process that cannot import expert_merging, from the folder alone, with the same logits."""
    folder = place / "runs/hemoe/seed0/HEMoE/tuned"
    program = f"""
import sys, torch
sys.modules["expert_merging"] = None  # an import of it fails
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
torch.save(model(torch.tensor([[1, 70, 80]])).logits, {str(tmp_path / "logits.pt")!r})
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    from expert_merging.hemoe.modeling import HEMoEForCausalLM

    own = HEMoEForCausalLM.from_pretrained(folder).eval()(torch.tensor([[1, 70, 80]])).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), own)


@pytest.mark.parametrize(
    ("step", "constants", "said"),
    [
        (
            "scores",
            {"held_out": 5},
            "domains.json was made with other constants .held_out was 4, is now 5.*step domains",
        ),
        (
            "partition",
            {"max_tokens": 16},
            "scores.json was made with other .*max_tokens was 32, is now 16.*step scores",
        ),
        ("conversion", {"size_ratio": 1.0}, "HEMoE/split.json was made with other .*size_ratio was 4.0, is now 1.0"),
        ("tuning", {"router_k": 2}, "tuning.*router_k was 1, is now 2"),
        ("measure", {"tune_lr": 1.0}, "tuning.json was made with other constants .*tune_lr was 0.0003, is now 1.0"),
    ],
)
def test_a_step_goes_by_nothing_that_was_made_otherwise(place, done, tmp_path, step, constants, said):
    """A record would say that it was made with constants with which it was not."""
    shutil.copytree(place / "runs/hemoe", tmp_path / "runs/hemoe")
    seed = tmp_path / "runs/hemoe/seed0"
    for name in {
        "scores": ["scores.json"],
        "partition": ["*/split.json"],
        "conversion": ["*/model"],
        "measure": ["*/measure*"],
    }.get(step, []):
        for path in seed.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    given = words(place, steps=(step,), methods=("HEMoE",), **constants)
    with pytest.raises(UserError, match=said):
        call_main(SCRIPT, [*given, "--RUN_DIR", str(tmp_path / "runs")])


def test_other_released_parts_are_another_split(place, done, tmp_path):
    shutil.copytree(place / "runs/hemoe", tmp_path / "runs/hemoe")
    seed, given = tmp_path / "runs/hemoe/seed0", ["--RUN_DIR", str(tmp_path / "runs")]
    made = {
        name: words(place, steps=("partition",), methods=("parts",), PARTS_PATH=seed / name / "parts")
        for name in ("EMoE", "HEMoE")
    }
    call_main(SCRIPT, [*made["EMoE"], *given])
    call_main(SCRIPT, [*made["EMoE"], *given])
    with pytest.raises(UserError, match="parts/split.json was made with other constants .parts_sha256"):
        call_main(SCRIPT, [*made["HEMoE"], *given])


def test_half_the_bytes_in_bfloat16(place, done, tmp_path):
    shutil.copytree(place / "runs/hemoe", tmp_path / "runs/hemoe")
    seed = tmp_path / "runs/hemoe/seed0/HEMoE"
    whole = (seed / "tuned/model.safetensors").stat().st_size
    given = [
        *words(place, methods=("HEMoE",), save_dtype="bfloat16", steps=("tuning", "measure")),
        "--RUN_DIR",
        tmp_path / "runs",
    ]
    with pytest.raises(UserError, match="save_dtype was 'float32', is now 'bfloat16'.*another HEMOE_DIR"):
        call_main(SCRIPT, list(map(str, given)))
    for name in ("tuning.json", "measure.json", "evaluation.json"):
        for path in seed.parent.glob(f"*/{name}"):
            path.unlink()
    shutil.rmtree(seed / "tuned")
    call_main(SCRIPT, list(map(str, given)))
    assert (seed / "tuned/model.safetensors").stat().st_size < 0.6 * whole


def test_other_domains_beside_the_script_s_own(place, done, tmp_path):
    """HEMoE_tfidf: domains, scores and partition of its own; what is held out and trained on is the same."""
    shutil.copytree(place / "runs/hemoe", tmp_path / "runs/hemoe")
    seed = tmp_path / "runs/hemoe/seed0"
    before = (seed / "domains.json").stat().st_mtime_ns, (seed / "scores.npz").stat().st_mtime_ns
    steps = ("domains", "scores", "partition", "conversion")
    given = words(place, methods=("HEMoE", "HEMoE_tasks", "HEMoE_tfidf"), steps=steps)
    call_main(SCRIPT, [*given, "--RUN_DIR", str(tmp_path / "runs")])
    assert before == ((seed / "domains.json").stat().st_mtime_ns, (seed / "scores.npz").stat().st_mtime_ns)
    own, tasks, tfidf = (read_json(seed / f"domains{end}.json") for end in ("", "_tasks", "_tfidf"))
    assert own["held"] == tasks["held"] == tfidf["held"]
    assert own["used"] == tasks["used"] == tfidf["used"]
    assert (tasks["names"], tfidf["names"]) == (["copy", "turn"], ["cluster0", "cluster1"])
    # Domains are the tasks here, so that these two are the same partition, and the third agrees as far as it does.
    splits = {m: read_json(seed / m / "split.json") for m in ("HEMoE", "HEMoE_tasks", "HEMoE_tfidf")}
    assert splits["HEMoE"]["agreement"] is None
    assert splits["HEMoE_tasks"]["agreement"] == pytest.approx(1.0)
    assert -0.5 < splits["HEMoE_tfidf"]["agreement"] <= 1.0
    # What scoring took is that of a method's own domains.
    from expert_merging.hemoe.report import _collected

    for name in ("measure", "evaluation"):
        shutil.copy(seed / f"HEMoE/{name}.json", seed / "HEMoE_tasks")
    spent = _collected(seed, "HEMoE_tasks")["seconds"]["scores"]
    assert spent == read_json(seed / "scores_tasks.json")["seconds"] != read_json(seed / "scores.json")["seconds"]


def test_agreement_of_partitions():
    """The adjusted Rand index knows nothing of the experts' numbers; none where neurons are in several experts or none."""
    import numpy as np

    from expert_merging.hemoe.split import Split
    from expert_merging.hemoe.splitting import _agreement

    def split(*experts):
        return Split("random", 6, (0,), [[np.array(sorted(neurons)) for neurons in experts]])

    assert _agreement(split([0, 1, 2], [3, 4, 5]), split([3, 5, 4], [2, 0, 1])) == 1.0
    # Pairs together in both: 01 and 45 of 6 in each; by chance 6 * 6 / 15 = 2.4; (2 - 2.4) / (6 - 2.4).
    assert _agreement(split([0, 1, 2], [3, 4, 5]), split([0, 1, 3], [2, 4, 5])) == pytest.approx(-0.4 / 3.6)
    assert _agreement(split([0, 1, 2], [2, 3, 4]), split([0, 1, 3], [2, 4, 5])) is None


def test_routers_that_start_from_gates(place, done, tmp_path):
    """Learned routers begin as EMoE's, which are not trained; HEMoE_noise's begin as noise all the same."""
    from safetensors.torch import load_file

    shutil.copytree(place / "runs/hemoe", tmp_path / "runs/hemoe")
    seed = tmp_path / "runs/hemoe/seed0"
    shutil.rmtree(seed / "HEMoE/model")
    given = words(
        place, methods=("HEMoE", "HEMoE_gate", "HEMoE_noise"), router_start="gate", steps=("partition", "conversion")
    )
    call_main(SCRIPT, [*given, "--RUN_DIR", str(tmp_path / "runs")])
    found = {m: load_file(seed / m / "model/routers.safetensors") for m in ("HEMoE", "HEMoE_gate", "HEMoE_noise")}
    kinds = {m: read_json(seed / m / "model/config.json")["router"] for m in found}
    assert kinds == {"HEMoE": "learned", "HEMoE_gate": "fixed", "HEMoE_noise": "learned"}
    for name, weight in found["HEMoE"].items():
        assert torch.equal(weight, found["HEMoE_gate"][name])
        assert not torch.allclose(weight, found["HEMoE_noise"][name], atol=1e-4)


def test_nothing_to_evaluate_is_said(place, done, tmp_path):
    (tmp_path / "eval").mkdir()
    given = words(place, steps=("evaluation",), eval_tasks=("all",), EVAL_TASKS_PATH=tmp_path / "eval")
    with pytest.raises(UserError, match="EVAL_TASKS_PATH: .* holds no task"):
        call_main(SCRIPT, given)


def test_a_split_that_is_none_of_this_model_is_one_line(place, done, tmp_path):
    """An expert without a neuron, in a file that was written otherwise."""
    import numpy as np

    from expert_merging.hemoe.split import Split

    shutil.copytree(place / "runs/hemoe", tmp_path / "runs/hemoe")
    folder = tmp_path / "runs/hemoe/seed0/EMoE"
    shutil.rmtree(folder / "model")
    split = Split.load(folder / "split.npz")
    split.experts[0] = [np.arange(split.neurons), np.arange(0)]
    split.save(folder / "split.npz")
    with pytest.raises(UserError, match="EMoE/split.npz and .*: an expert is empty") as error:
        call_main(
            SCRIPT, [*words(place, steps=("conversion",), methods=("EMoE",)), "--RUN_DIR", str(tmp_path / "runs")]
        )
    assert "\n" not in str(error.value)
