"""Kill every script again and again, and see that nothing is lost; feed the readers broken files.

    python tests/faults.py [--kills 30] [--inputs 400] [--scripts single_task_finetune.py ...] [--workers 2]

Each script runs at `tiny` with small constants. It is killed with SIGKILL at random moments, or right before or after a
random one of its writes, renames and removals (so also while a checkpoint or a data set is saved), and started again until
it ends by itself; then every file must be as after an undisturbed run, and none besides. This goes on in fresh folders
until `--kills` kills were dealt. Once it gets a Ctrl-C, which must end it within 10 seconds and with one line. What a kill
cannot show, loss of what the disk had not yet written, is not tested here.

Prints kills survived / tried for each script, the broken inputs tried and lost or half-written files; ends with status 1
unless all were survived. A script's process is forked from one that has torch imported, which saves seconds a start.
"""

import argparse
import builtins
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bad_inputs import try_damaged
from conftest import ROOT, World, build_world
from tqdm import tqdm

PATIENCE = 600  # seconds after which a script that was left alone counts as hung

# What may differ between two runs with the same result.
VOLATILE = {"command", "started", "date", "seconds", "epoch_seconds", "joules", "versions", "_name_or_path"}
VOLATILE |= {"seconds_to_merge", "seconds_to_test", "step_seconds", "latency"}


@dataclass(frozen=True)
class Case:
    """A script with its own constants; `ignored` are files that tell of the run, not of its result."""

    script: str
    words: list[str] = field(default_factory=list)
    needs: tuple[str, ...] = ()  # cases whose results it reads
    ignored: tuple[str, ...] = ()
    preparation: bool = False  # of others; not killed itself
    few_texts: bool = False  # reading all docstrings takes most of a minute: a few stand for them
    children: bool = False  # it starts others, which take seconds to import torch


FEATURES = ("features",)
SINGLE = (*FEATURES, "single task", "ag_news", "xsum")
CAUSAL = ("--BASE_MODEL_PATH", "{world}/olmoe", "--RUN_DIR", "{runs}/causal", "--task_types", "squad", "ag_news")
CASES = {
    "features": Case("datasets_preprocessing.py", ["--num_expert", "4"]),
    "single task": Case("single_task_finetune.py", ["--task_type", "squad", "--num_expert", "4"], needs=FEATURES),
    "ag_news": Case("single_task_finetune.py", ["--task_type", "ag_news", "--num_expert", "4"], FEATURES, preparation=True),
    "xsum": Case("single_task_finetune.py", ["--task_type", "xsum", "--num_expert", "4"], FEATURES, preparation=True),
    "baseline": Case("Baseline_multi_task_finetune.py", ["--experts_num", "4"], needs=SINGLE),
    "caem": Case("CAEM_multi_task_finetune.py", ["--source_experts_num", "4", "--target_experts_num", "4"], needs=SINGLE),
    "usage": Case(
        "tools/count_expert_usage.py", ["--task_type", "squad", "--num_expert", "4", "--input_lengths", "6", "12", "18"],
        needs=("features", "single task"),
    ),
    "import": Case(
        "tools/import_released.py",
        ["--task_type", "squad", "--num_expert", "4", "--RUN_DIR", "{runs}/imported",
         "--DATA_DIR", "{runs}/data", "--released_folder", "{world}/released"],
        needs=FEATURES,
    ),
    "references": Case("tools/reference_scores.py", ["--num_expert", "4"], needs=SINGLE),
    "pair": Case(
        "tools/compare_models.py", ["--first", "Baseline_[4]", "--second", "CAEM_[4|4]", "--line_points", "3"],
        needs=(*SINGLE, "baseline", "caem"),
    ),
    "merging": Case(
        "neighbours/WEMoE_multi_task_merging.py",
        ["--experts_num", "4", "--methods", "average", "dare", "fisher", "regmean", "adamerging_layer", "wemoe",
         "--adapt_steps", "3", "--adapt_batch_size", "2", "--adapt_tokens", "3", "--statistics_examples", "3",
         "--adapt_losses", "verbalizer", "self_generated", "first_token"],
        needs=SINGLE,
    ),
    "folders": Case(
        "tools/merge.py",
        ["--method", "ties", "--base", "{world}/base-4", "--models", *(
            f"{{runs}}/seed0/models/single_task_[4]/single_task_{task}" for task in ("squad", "ag_news", "xsum")
        ), "--out", "{runs}/merged", "--allow_unchanged"],
        needs=SINGLE, ignored=("merged/README.md",),  # which shows the command
    ),
    "upcycling": Case(  # so many experts that it can be killed on its way
        "tools/upcycle.py", ["--dense", "{world}/llama", "--out", "{runs}/mixtral", "--experts", "600", "--noise", "0.1"]
    ),
    "moe usage": Case(  # likewise so many passes
        "tools/count_moe_usage.py",
        ["--folder", "{world}/olmoe", "--text", "{world}/texts.jsonl", "--out", "{runs}/usage/olmoe.json",
         "--batch_texts", "1"],
    ),
    "causal features": Case("datasets_preprocessing.py", [*CAUSAL, "--num_expert", "4"], preparation=True),
    "causal task": Case(
        "single_task_finetune.py", [*CAUSAL, "--task_type", "squad", "--num_expert", "4"], needs=("causal features",)
    ),
    "causal ag_news": Case(
        "single_task_finetune.py", [*CAUSAL, "--task_type", "ag_news", "--num_expert", "4"], ("causal features",),
        preparation=True,
    ),
    "causal caem": Case(
        "CAEM_multi_task_finetune.py", [*CAUSAL, "--source_experts_num", "4", "--target_experts_num", "4"],
        needs=("causal features", "causal task", "causal ag_news"),
    ),
    "digits": Case(
        "neighbours/WEMoE_digits.py",
        ["--seeds", "0", "--methods", "pretrained", "average", "adamerging_layer", "wemoe", "ewemoe_90",
         "--pretrain_examples", "40", "--pretrain_steps", "6", "--finetune_steps", "5", "--adapt_steps", "4",
         "--images_per_task", "20"],
        ignored=("tables/cost.",),
    ),
    "clip": Case(
        "neighbours/WEMoE_clip.py",
        ["--CLIP_PATH", "{world}/clip/base", "--EXPERT_PATH", "{world}/clip/tower_*",
         "--DATASET_PATH", "{world}/clip/data/*", "--clip_tasks", "mnist", "eurosat", "dtd", "--adapt_steps", "4",
         "--adapt_batch_size", "4", "--images_per_batch", "8", "--save_models", "true",
         "--methods", "average", "adamerging_task", "wemoe", "ewemoe_90"],
        ignored=("tables/cost.",),
    ),
    "text": Case(
        "neighbours/WEMoE_text.py",
        ["--ENCODER", "{world}/text/bert", "--TASKS_PATH", "{world}/text/tasks", "--text_tasks", "who", "where",
         "--unseen_tasks", "pairs", "--seeds", "0", "--general_tasks", "2", "--max_tokens", "16", "--train_texts", "40",
         "--validation_texts", "12", "--test_texts", "16", "--select_texts", "8", "--robust_texts", "6",
         "--grid", "0.3", "1", "--adapt_steps", "3", "--adapt_batch_size", "4", "--statistics_examples", "3",
         "--finetune_lr", "0.01", "--methods", "individual", "multi_task", "task_arithmetic", "adamerging_layer", "wemoe",
         "--parts", "main", "guard", "generalization", "robustness"],
        ignored=("tables/cost.",),
    ),
    "movement": Case(
        "tools/module_movement.py",
        ["--base_model", "{world}/clip/base", "--tuned_models", "{world}/clip/tower_mnist", "{world}/clip/tower_dtd"],
    ),
    "densify": Case(
        "neighbours/MEO_densify.py",
        ["--source", "CAEM_[4|4]", "--densify", "squad", "--k", "2", "--ks", "1", "2", "--calibration_examples", "8",
         "--compare_examples", "4", "--latency_runs", "1", "--latency_batches", "1"],
        needs=(*SINGLE, "caem"),
    ),
    "meo": Case(
        "neighbours/MEO_finetune.py",
        ["--MODEL_PATH", "{world}/bert", "--family", "bert", "--tasks", "rte", "mrpc", "--GLUE_PATH", "{world}/glue",
         "--seeds", "0", "--n", "3", "--ks", "2", "--levels", "sequence", "--epochs", "2", "--train_batch", "4",
         "--input_length", "24", "--learning_rate", "0.01"],
        ignored=("meo/bert_rte/report", "meo/bert_mrpc/report", "meo/bert_rte+mrpc"),  # they show times
    ),
    "hemoe": Case(
        "neighbours/HEMoE_moe_construction.py",
        ["--scale", "paper", "--base_model", "{world}/llama", "--INSTRUCTIONS_PATH", "{world}/instructions",
         "--EVAL_TASKS_PATH", "{world}/eval", "--domains_from", "tasks", "--num_domains", "2", "--num_experts", "2",
         "--moe_layers", "0", "2", "--max_tokens", "32", "--held_out", "4", "--score_sequences", "8", "--num_modules", "6",
         "--solver_starts", "2", "--router_k", "1", "--tune_steps", "3", "--tune_batch", "4", "--tune_accumulation", "1",
         "--methods", "HEMoE", "EMoE", "--eval_tasks", "doc_copy", "doc_turn", "--eval_batch_size", "8"],
        ignored=("hemoe/report",),
    ),
    "pre-training": Case(
        "tools/pretrain_base_model.py",
        ["--BASE_MODEL_PATH", "{runs}/base-{experts}", "--num_expert", "4", "--vocab_size", "300", "--d_model", "16",
         "--d_ff", "16", "--num_layers", "2", "--num_heads", "2", "--d_kv", "8", "--chunk_tokens", "24",
         "--batch_chunks", "4", "--num_rounds", "3", "--steps_per_round", "5", "--heldout_texts", "20"],
        few_texts=True,
    ),
    "reproduction": Case(
        "reproduce_tables.py",
        ["--experts_num", "4", "--larger_experts_num", "6", "--parts", "comparison"],
        ignored=("logs/", "times.json", "tables/cost."), children=True,
    ),
}  # fmt: skip


# It unpacks a package of 90 MB that is not here; tests/core/test_packaged_models.py interrupts it with a small one.
WITHOUT_CASE = {"tools/packaged_model.py"}


@dataclass
class Outcome:
    """What became of one script's kills."""

    name: str
    tried: int = 0
    survived: int = 0
    at_a_write: int = 0
    ctrl_c: float | None = None  # seconds until it had ended
    rounds: int = 0
    seconds: float = 0.0
    complaints: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- running a script


def words_of(case: Case, world: World, runs: Path) -> list[str]:
    """The command line of a case whose results go below `runs`; a checkpoint after every step."""
    words = world.words(runs, checkpoint_minutes=0)
    for name in runpy.run_path(str(ROOT / case.script)).get("_instead", {}):  # which it refuses
        if f"--{name}" in words:
            at = words.index(f"--{name}")
            del words[at : at + 2]
    return [*words, *(word.replace("{runs}", str(runs)).replace("{world}", str(world.folder)) for word in case.words)]


def fork_script(case: Case, words: list[str], log: Path, kill_at: int = 0, events: Path | None = None) -> int:
    """Start the script as a child of this process, whose imports it has; returns the process id.

    Args:
        kill_at: kill it at this one of its changes to the file system, counted from 1; 0: never.
        events: file that gets the number of those changes when it ends.
    """
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a harness in the background has it ignored
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks: one killed with it would hold up the others
        counted = count_changes(kill_at)
        if case.few_texts:
            read_few_texts()
        sys.argv = [case.script, *words]
        try:
            runpy.run_path(str(ROOT / case.script), run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        if events:
            events.write_text(str(counted()))
        from expert_merging.core import files

        files._let_go()  # what is registered to run at exit would do the parent's clearing up as well
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status or 0)


def count_changes(kill_at: int):
    """Count calls that change the file system, and kill this process at one of them: before it, or after it."""
    count, own = 0, os.getpid()

    def watched(original, after: bool):
        def call(*arguments, **keywords):
            nonlocal count
            if os.getpid() != own:
                return original(*arguments, **keywords)
            count += 1
            if count == kill_at and not after:
                os.kill(own, signal.SIGKILL)
            result = original(*arguments, **keywords)
            if count == kill_at:
                os.kill(own, signal.SIGKILL)
            return result

        return call

    after = kill_at % 2 == 1
    for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync"):
        setattr(os, name, watched(getattr(os, name), after))
    plain_open = builtins.open

    def opened(file, mode="r", *arguments, **keywords):
        opening = watched(plain_open, True) if set(mode) & set("wax+") else plain_open
        return opening(file, mode, *arguments, **keywords)

    builtins.open = opened
    return lambda: count


def read_few_texts() -> None:
    """Three hundred short docstrings in the place of all."""
    from expert_merging.data import docstring_reader, docstring_splits

    few = tuple(
        docstring_reader.Docstring(
            "p", f"p/f{i}.py", f"p.f{i}", "", f"Return the {w} of item {i}.\n\nMore about the {w}."
        )
        for i, w in ((i, ("sum", "mean", "name", "size", "place")[i % 5]) for i in range(300))
    )
    docstring_reader.read_docstrings = lambda *_: list(few)
    docstring_splits.pretraining_texts = lambda docs: [doc.text for doc in docs]


# ---------------------------------------------------------------- comparing


def snapshot(folder: Path, ignored: tuple[str, ...] = ()) -> dict[str, str]:
    """{relative path: the content that counts, or its hash} of every file; lock files aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_lock = path.name.startswith(".") and path.name.endswith(".lock")
        if path.is_file() and not is_lock and not any(part in name for part in ignored):
            readable = path.suffix in (".json", ".csv", ".md", ".npz")
            found[name] = content(path).decode() if readable else hashlib.sha256(content(path)).hexdigest()
        elif path.is_dir() and not any(path.iterdir()) and path.name.startswith("."):
            found[name] = "a left-over folder"
    return found


def content(path: Path) -> bytes:
    """A file's bytes; of JSON and of our own pickles what does not tell of time or place."""
    if path.suffix == ".json":
        return json.dumps(lasting(json.loads(path.read_text()))).encode()
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):  # a checkpoint's are archives of torch
        return json.dumps(lasting(pickle.loads(path.read_bytes()))).encode()
    if path.suffix == ".npz":  # arrays, and a record of how they were found
        with np.load(path) as arrays:
            plain = {name: arrays[name].tolist() for name in arrays.files}
        return json.dumps({**plain, "record": lasting(json.loads(plain["record"]))}).encode()
    if path.suffix == ".html":
        return b"made of the records, which are compared"
    return path.read_bytes()


def lasting(value: Any) -> Any:
    """`value` without the entries that differ from run to run."""
    if isinstance(value, dict):
        return {key: lasting(one) for key, one in value.items() if key not in VOLATILE}
    return [lasting(one) for one in value] if isinstance(value, list | tuple) else value


def differences(calm: dict[str, str], other: dict[str, str]) -> list[str]:
    """How the files of a disturbed run differ from those of the undisturbed one, in words."""
    lost = [f"{name} is lost" for name in calm.keys() - other.keys()]
    extra = [f"{name} is left over" for name in other.keys() - calm.keys()]
    changed = [n for n in calm.keys() & other.keys() if calm[n] != other[n]]
    return sorted(lost + extra + [f"{n} differs: {first_difference(calm[n], other[n])}" for n in changed])


def first_difference(calm: str, other: str) -> str:
    """Where two texts part, with a little around it."""
    place = next((i for i, (a, b) in enumerate(zip(calm, other, strict=False)) if a != b), 0)
    return f"{calm[max(0, place - 60) : place + 40]!r} was, {other[place : place + 40]!r} is"


# ---------------------------------------------------------------- the harness


def undisturbed(world: World, names: list[str], folder: Path) -> dict[str, tuple[Path, dict[str, str]]]:
    """Run the cases one after another: name -> (copy of what was there before, files afterwards)."""
    runs, results = folder / "calm", {}
    runs.mkdir(parents=True)
    for name in names:
        case = CASES[name]
        before = folder / "before" / name
        if case.children:  # it makes everything itself
            results[name] = (None, snapshot_of_run(case, world, folder / "calm-children", folder))
            continue
        shutil.copytree(runs, before)
        results[name] = (before, snapshot_of_run(case, world, runs, folder))
    return results


def snapshot_of_run(case: Case, world: World, runs: Path, folder: Path) -> dict[str, str]:
    """Run the case undisturbed in `runs` and look at its files."""
    log = folder / "calm.log"
    _, status = wait(fork_script(case, words_of(case, world, runs), log), None)
    if status != 0:
        raise SystemExit(f"{case.script} fails undisturbed, with status {status}:\n{log.read_text()[-3000:]}")
    return snapshot(runs, case.ignored)


def disturb(name: str, world: World, before: Path | None, calm: dict[str, str], folder: Path, kills: int) -> Outcome:
    """Kill the case `kills` times, in as many fresh folders as that takes, and compare each one's end with `calm`."""
    case, outcome, dice = CASES[name], Outcome(name), random.Random(name)
    began = time.monotonic()
    length, changes = 6.0, 40
    while outcome.rounds == 0 or outcome.tried < kills:
        outcome.rounds += 1
        runs = folder / f"{name.replace(' ', '-')}-{outcome.rounds}"
        if before is not None:
            shutil.copytree(before, runs)
        else:
            runs.mkdir(parents=True)
        log, events, dealt = Path(f"{runs}.log"), Path(f"{runs}.events"), 0
        # Not in every round: a quick script is done before Ctrl-C comes, and what is done cannot be killed.
        if (outcome.rounds % 2 == 0 or case.children) and outcome.ctrl_c is None:
            process = fork_script(case, words_of(case, world, runs), log)
            press_ctrl_c(process, dice.uniform(0.3, max(0.3, length / 2)), log, outcome)
        while True:
            quiet = outcome.rounds == 1 and not case.children  # the first round is undisturbed, but forked
            deal = not quiet and outcome.tried + dealt < kills
            at_write = deal and not case.children and dice.random() < 0.5
            started = time.monotonic()
            kill_at = dice.randint(1, max(2, changes)) if at_write else 0
            process = fork_script(case, words_of(case, world, runs), log, kill_at, events)
            killed, status = wait(process, dice.uniform(0, length) if deal and not at_write else None)
            if killed:
                dealt += 1
                outcome.at_a_write += at_write
                continue
            break
        if status != 0:
            outcome.complaints.append(f"round {outcome.rounds}: status {status}: {log.read_text()[-2000:]}")
        if quiet:
            length, changes = time.monotonic() - started, int(events.read_text())
        elif case.children:
            length = 15.0
        found = differences(calm, snapshot(runs, case.ignored))
        outcome.complaints += [f"round {outcome.rounds}: {line}" for line in found]
        outcome.tried += dealt
        outcome.survived += dealt * (status == 0 and not found)
        shutil.rmtree(runs)
        if outcome.rounds > 1 and dealt == 0 and outcome.tried < kills and outcome.rounds > 3 * kills + 10:
            outcome.complaints.append("it always ended before it could be killed")
            break
    outcome.seconds = time.monotonic() - began
    return outcome


def press_ctrl_c(process: int, seconds: float, log: Path, outcome: Outcome) -> None:
    """Interrupt the process after so many seconds, as a terminal would, and note how it ends."""
    time.sleep(seconds)
    began = time.monotonic()
    if os.waitpid(process, os.WNOHANG)[0]:
        return  # it was done before
    os.kill(process, signal.SIGINT)
    _, status = wait(process, None)
    took = time.monotonic() - began
    said = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-1]
    if status == 0 and "interrupted" not in said:
        return  # it was about to end
    outcome.ctrl_c = took
    if status != 130 or "the same command goes on" not in said or took > 10:
        outcome.complaints.append(f"Ctrl-C: status {status} after {took:.1f} s, and it said: {said[:300]}")


def wait(process: int, seconds: float | None) -> tuple[bool, int]:
    """Wait for the process, and kill it after `seconds`. Returns (whether it was killed, else its status).

    Without `seconds`, one that does not end is killed as well, and its status is 124.
    """
    end = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            hung = seconds is None and time.monotonic() >= end
            return code == -signal.SIGKILL and not hung, 124 if hung else code
        if time.monotonic() >= end:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def add_other_models(folder: Path) -> None:
    """What MEO, HEMoE, WEMoE and the tools for mixtures start from: a BERT, a Llama, CLIPs and an OLMoE with random weights,
    and data for them; and a file as the released code leaves it."""
    from types import SimpleNamespace

    import torch
    from raw_data import sentences, tiny_tokenizer
    from tiny_models import write_clip_place, write_text_place
    from transformers import AutoModelForCausalLM, OlmoeConfig, SwitchTransformersForConditionalGeneration

    from expert_merging.hemoe import questions, small_llama
    from expert_merging.meo import bases

    torch.manual_seed(0)
    tokenizer = bases.new_tokenizer(tiny_tokenizer())
    bases.new_model("bert", tokenizer, SimpleNamespace(d_model=16, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(
        folder / "bert"
    )
    tokenizer.save_pretrained(folder / "bert")
    texts = sentences(40)
    for task in ("rte", "mrpc"):
        (folder / "glue" / task).mkdir(parents=True)
    for split, part in (("train", texts[:24]), ("validation", texts[24:])):
        rows = [{"sentence1": text, "sentence2": text[::-1], "label": i % 2} for i, text in enumerate(part)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        for task in ("rte", "mrpc"):
            (folder / "glue" / task / f"{split}.jsonl").write_text(lines)

    write_clip_place(folder / "clip")
    write_text_place(folder / "text")

    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder / "base-4")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.1 * tensor.abs().mean() * torch.randn_like(tensor)
    (folder / "released").mkdir()
    state = {f"STmodel.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "released" / "single_task_squad.pt")

    dice, found = random.Random(0), {}
    for task in ("copy", "turn"):
        rows = []
        for _ in range(60):
            four = dice.sample("red green blue one two three four five cat dog bird fish".split(), 4)
            answer, other = " ".join(four), " ".join(four[::-1])
            if task == "turn":
                answer, other = other, answer
            rows.append({"instruction": f"{task} {' '.join(four)}:", "output": answer, "task": task, "other": other})
        test = [{**row, "choices": [row["output"], row["other"]], "label": 0} for row in rows[:6]]
        found[task] = {"train": rows[6:], "test": test}
    questions.write_doc_choice(found, folder / "instructions", folder / "eval")
    tokenizer = small_llama.new_tokenizer([row["output"] for row in found["copy"]["train"]], 300)
    shape = SimpleNamespace(base_hidden_size=16, base_intermediate_size=24, base_layers=3, base_heads=2)
    small_llama.new_llama(shape, tokenizer).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    olmoe = OlmoeConfig(vocab_size=len(tokenizer), num_experts=4, num_experts_per_tok=2, **sizes)
    AutoModelForCausalLM.from_config(olmoe).save_pretrained(folder / "olmoe")
    tokenizer.save_pretrained(folder / "olmoe")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in 8 * texts))


def import_all() -> None:
    """What the scripts import, so that their forks need not."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import accelerate  # noqa: F401
    import datasets
    import evaluate  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import global_config  # noqa: F401
    from expert_merging.analysis import soups_and_lines  # noqa: F401
    from expert_merging.data import docstring_splits, features  # noqa: F401
    from expert_merging.report import caem_tables  # noqa: F401
    from expert_merging.switch import decoding  # noqa: F401
    from expert_merging.training import caem_sources, finetuning  # noqa: F401

    torch.set_num_threads(1)
    datasets.disable_progress_bars()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of each script [30]")
    parser.add_argument("--inputs", type=int, default=400, help="damaged files of each task and format [400]")
    parser.add_argument("--workers", type=int, default=2, help="scripts at a time [2]")
    parser.add_argument("--scripts", nargs="+", default=None, help="only these")
    chosen = parser.parse_args()
    import_all()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        folder = Path(place)
        world = build_world(folder / "world")
        names = [name for name, case in CASES.items() if (ROOT / case.script).exists()]
        if chosen.scripts:
            wanted = [n for n in names if CASES[n].script in chosen.scripts and not CASES[n].preparation]
            names = [n for n in names if n in wanted or any(n in CASES[one].needs for one in wanted)]
        if any("{world}" in word for name in names for word in CASES[name].words):
            add_other_models(world.folder)
        calm = undisturbed(world, names, folder)
        print(f"undisturbed, once: {len(names)} runs, {time.monotonic() - began:.0f} s", flush=True)
        jobs = [
            (name, world, *calm[name], folder / "disturbed", chosen.kills)
            for name in names
            if not CASES[name].preparation and (not chosen.scripts or CASES[name].script in chosen.scripts)
        ]
        jobs.sort(key=lambda job: not CASES[job[0]].children)  # the longest first
        (folder / "disturbed").mkdir()
        outcomes = []
        with multiprocessing.get_context("fork").Pool(chosen.workers) as pool:
            for outcome in pool.imap_unordered(disturb_one, jobs):
                outcomes.append(outcome)
                case = CASES[outcome.name]
                print(
                    f"{case.script}: {outcome.survived} / {outcome.tried} kills survived ({outcome.at_a_write} at a "
                    f"write, {outcome.rounds} rounds, {outcome.seconds:.0f} s), "
                    + ("no time for Ctrl-C" if outcome.ctrl_c is None else f"Ctrl-C ended it in {outcome.ctrl_c:.1f} s"),
                    *outcome.complaints[:5], sep="\n    ", flush=True,
                )  # fmt: skip
            inputs = [(task, folder / f"damaged-{task}", chosen.inputs, 0) for task in ("ag_news", "squad", "xsum")]
            bad, refused = map(sum, zip(*pool.starmap(try_damaged, inputs), strict=True))  # raises what is no UserError
        lost = sum(len(outcome.complaints) for outcome in outcomes)
    tried = sum(outcome.tried for outcome in outcomes)
    survived = sum(outcome.survived for outcome in outcomes)
    print(
        f"bad inputs tried: {bad}, of which refused in one line {refused} and read with all their rows {bad - refused}"
    )
    print(f"kills survived: {survived} / {tried}; lost, left-over, half-written or changed files: {lost}")
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(0 if survived == tried and not lost else 1)


def disturb_one(job: tuple) -> Outcome:
    """One job of the pool."""
    return disturb(*job)


if __name__ == "__main__":
    main()
