"""MEO_finetune.py on small models and local data: the records, repeating and going on, and what it says to bad input."""

import csv
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_main, run_script
from raw_data import sentences, tiny_tokenizer, write_squad

from expert_merging.core.errors import UserError
from expert_merging.meo import finetuning, recipes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small random models of all families with a tokenizer, and data in local folders."""
    from expert_merging.meo import bases

    place = tmp_path_factory.mktemp("meo")
    tokenizer = bases.new_tokenizer(tiny_tokenizer())
    sizes = SimpleNamespace(d_model=16, d_ff=32, num_layers=1, num_heads=2)
    for family in ("bert", "gpt2", "t5", "bart"):
        torch.manual_seed(0)
        bases.new_model(family, tokenizer, sizes).save_pretrained(place / family)
        tokenizer.save_pretrained(place / family)
    assert finetuning.load_tokenizer(str(place / "bert"))("the river").input_ids == tokenizer("the river").input_ids

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    texts = sentences(40)
    for split, part in (("train", texts[:24]), ("validation", texts[24:])):
        rows = [{"sentence1": t, "sentence2": t[::-1], "label": i % 2} for i, t in enumerate(part)]
        write(place / "glue" / "rte" / f"{split}.jsonl", rows)
        write(
            place / "glue" / "mrpc" / f"{split}.jsonl",
            [{**row, "label": int(i % 4 == 0)} for i, row in enumerate(rows)],
        )
        write(place / "wikitext" / "wikitext-2-raw-v1" / f"{split}.jsonl", [{"text": t} for t in part])
    write_squad(place / "squad", train=12, dev=4)
    return place


def words(folder, run, family, task, **changed):
    values = {
        "scale": "tiny", "device": "cpu", "RUN_DIR": folder / run, "MODEL_PATH": folder / family, "family": family,
        "tasks": task, "GLUE_PATH": folder / "glue", "WIKITEXT_PATH": folder / "wikitext", "SQUAD_PATH": folder / "squad",
        "seeds": 0, "n": 3, "ks": 2, "epochs": 2, "train_batch": 4, "input_length": 24, "learning_rate": 0.01,
        "train_examples": 0, **changed,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", *str(value).split(" "))]


def records(folder, run, which):
    return {file.stem: json.loads(file.read_text()) for file in (folder / run / "meo" / which / "seed0").glob("*.json")}


@pytest.fixture(scope="module")
def done(folder):
    """BERT on a GLUE task, as a process."""
    result = run_script("neighbours/MEO_finetune.py", words(folder, "one", "bert", "rte"))
    assert result.returncode == 0, result.stderr
    return records(folder, "one", "bert_rte"), result.stdout


def test_records_of_all_variants(done, folder):
    found, printed = done
    assert set(found) == {"dense", "block", "moe_sequence_k2", "meo_sequence_k2", "moe_token_k2", "meo_token_k2"}
    for record in found.values():
        assert len(record["step_losses"]) == 12 and all(map(math.isfinite, record["step_losses"]))
        assert 0 <= record["scores"]["test"]["accuracy"] <= 100
        assert record["identity"]["recipe"]["epochs"] == 2 and {"command", "versions"} <= record.keys()
        assert f"| {record['variant']['name']} |" in printed
    report = folder / "one" / "meo" / "bert_rte" / "report"
    assert {"bert_rte.md", "bert_rte.csv", "bert_rte.tex", "bert_rte.png", "bert_rte_equal.png"} <= {
        file.name for file in report.rglob("*")
    }


@pytest.mark.parametrize(("family", "task"), [("bert", "rte"), ("gpt2", "wikitext"), ("t5", "squad"), ("bart", "xsum")])
def test_experts_decay_as_the_dense_model_does(folder, family, task):
    """Of experts the biases are stacked, two-dimensional, and yet biases."""
    from expert_merging.meo import finetuning, recipes

    decaying, level = {}, "task" if family == "gpt2" else "sequence"
    for how in ("dense", "moe"):
        model = finetuning.load_model(str(folder / family), family, recipes.RECIPES[task], ["a", "b"])
        model = finetuning.convert(model, finetuning.Variant(how, level, 3, 2), [5, 6]) if how == "moe" else model
        groups = finetuning.parameter_groups(model, 0.1)
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        own = {id(p) for p in groups[0]["params"]}
        assert len(own) + len(groups[1]["params"]) == len(list(model.parameters()))
        named = {name: id(p) in own for name, p in model.named_parameters()}
        decaying[how] = {name: named[name] for name in (decaying["dense"] if how == "moe" else named)}
    assert decaying["moe"] == decaying["dense"] and set(named) > set(decaying["dense"])
    assert not [name for name, decays in named.items() if decays and name.endswith("bias")]


def test_costs_are_the_formulas(done):
    """FFN linears of 16 x 32, one layer, 24 tokens, n = 3, k = 2; biases merge, gates read a mean or every token."""
    found, _ = done
    ffn, tokens, n, k, d, d_ff = 2 * 16 * 32, 24, 3, 2, 16, 32
    dense = found["dense"]["flops"]
    gates = 2 * n * (d + d_ff) + 2 * tokens * (d + d_ff)  # with the mean that each reads
    assert found["moe_sequence_k2"]["flops"] - dense == (k - 1) * 2 * tokens * ffn + gates
    assert found["meo_sequence_k2"]["flops"] - dense == 2 * k * ffn + gates + 2 * n * (d + d_ff)  # biases merge too
    assert found["block"]["flops"] - dense == 2 * 2 * tokens * (d + d_ff)  # one unit wide
    gates = 2 * n * (d + d_ff)  # with the noise's
    added = found["moe_sequence_k2"]["parameters"] - found["dense"]["parameters"]
    assert added == (n - 1) * (ffn + d + d_ff) + gates
    assert found["meo_sequence_k2"]["parameters"] == found["moe_sequence_k2"]["parameters"]
    assert all(record["kept_bytes"] > 0 for record in found.values())


def test_products_by_onednn_and_attention_are_counted(folder):
    """What torch's own counter passes over: without it the dense model would cost nothing on some processors."""
    from transformers import AutoModel

    from caem_files import cpu_kernels
    from expert_merging.meo import cost

    x, weight = torch.randn(3, 5, 8), torch.randn(7, 8)

    class Product(torch.nn.Module):
        def forward(self, x):
            return cpu_kernels.product(x, weight)

    assert cost.flops(Product(), {"x": x}) == 2 * 3 * 5 * 8 * 7
    batch = {"input_ids": torch.arange(5, 17)[None], "attention_mask": torch.ones(1, 12)}
    counts = {
        way: cost.flops(AutoModel.from_pretrained(folder / "bert", attn_implementation=way), batch)
        for way in ("eager", "sdpa")
    }
    assert counts["eager"] == counts["sdpa"] > 8 * 12 * 16**2 + 4 * 12 * 16 * 32


def test_measuring_leaves_no_tensor_behind(folder):
    """Of each measured model nothing may stay alive, or a comparison of many fills the memory."""
    import gc

    from expert_merging.meo import finetuning, recipes

    recipe = replace(recipes.RECIPES["doc_topic"], length=12, batch_size=4)
    tokenizer = finetuning.load_tokenizer(str(folder / "bert"))
    rows = [{"input_ids": np.arange(5, 15), "label": i % 2} for i in range(4)]

    def alive():
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    counts, kept = [], []
    for _ in range(4):
        model = finetuning.load_model(str(folder / "bert"), "bert", recipe, ["a", "b"])
        kept.append(finetuning.measure(model, rows, tokenizer, "bert", recipe, torch.device("cpu"))["kept_bytes"])
        del model
        counts.append(alive())
    assert len(set(counts[1:])) == 1, counts
    assert kept[0] > 4 * 10 * 32 * 4 and len(set(kept)) == 1  # the FFN's states of 4 rows at least


def test_moe_and_meo_have_equal_curves(done):
    found, _ = done
    moe, meo, dense = (np.array(found[name]["step_losses"]) for name in ("moe_sequence_k2", "meo_sequence_k2", "dense"))
    assert np.abs(moe - meo).max() < 1e-4 < np.abs(moe - dense).max()


def test_it_repeats_and_goes_on(done, folder):
    found, _ = done
    path = folder / "one" / "meo" / "bert_rte" / "seed0" / "meo_token_k2.json"
    times = {file: file.stat().st_mtime_ns for file in path.parent.glob("*.json")}
    path.unlink()
    call_main("neighbours/MEO_finetune.py", words(folder, "one", "bert", "rte"))
    again = json.loads(path.read_text())
    for name in ("step_losses", "scores", "history", "flops", "kept_bytes"):
        assert again[name] == found["meo_token_k2"][name]
    assert {file for file in times if file.stat().st_mtime_ns != times[file]} == {path}
    with pytest.raises(UserError, match="other constants"):
        call_main("neighbours/MEO_finetune.py", words(folder, "one", "bert", "rte", learning_rate=0.02))


@pytest.mark.parametrize(
    ("family", "task", "levels", "score"),
    [
        ("gpt2", "wikitext", "task token", "perplexity"),
        ("bert", "wikitext", "task", "perplexity"),
        ("t5", "squad", "sequence", "exact_match"),
        ("bart", "squad", "token", "exact_match"),
    ],
)
def test_other_families_and_tasks(folder, family, task, levels, score):
    call_main(
        "neighbours/MEO_finetune.py", words(folder, "others", family, task, levels=levels, epochs=1, input_length=12)
    )
    found = records(folder, "others", f"{family}_{task}")
    assert {"dense", "block"} < set(found) and len(found) == 2 + 2 * len(levels.split()) - (family == "gpt2")
    for record in found.values():
        assert math.isfinite(record["scores"]["test"][score]) and math.isfinite(record["scores"]["test"]["loss"])
        assert record["step_losses"][-1] < record["step_losses"][0] + 1


def constants(words_):
    from expert_merging.run.constants import read_constants
    from neighbours import MEO_finetune

    return read_constants(vars(MEO_finetune), words_)


def test_the_epoch_is_chosen_on_training_examples_held_out_and_the_published_validation_is_the_test(folder):
    from expert_merging.meo import recipes

    c = constants(words(folder, "held", "bert", "rte", test_examples=0, validation_examples=0))
    raw, again = (recipes.load_raw("rte", c) for _ in range(2))
    train, held, test = ([row["sentence1"] for row in raw[split]] for split in recipes.SPLITS)
    assert (len(train), len(held), len(test)) == (22, 2, 16)
    assert sorted(train + held) == sorted(sentences(40)[:24]) and test == sentences(40)[24:]
    assert [row["sentence1"] for row in again["validation"]] == held


def test_of_squad_whole_passages_are_held_out(folder, tmp_path):
    from datasets import Dataset

    from expert_merging.meo import recipes

    train = Dataset.from_list([{"context": f"passage {i // 5}", "question": str(i)} for i in range(100)])
    raw = recipes._with_held_out({"train": train, "validation": train.select(range(3))}, "X", together="context")
    sides = [set(raw[split]["context"]) for split in ("train", "validation")]
    assert len(sides[1]) == 2 and not sides[0] & sides[1]
    assert len(raw["train"]) + len(raw["validation"]) == 100 and len(raw["test"]) == 3
    with pytest.raises(UserError, match="X: 1 training examples are too few"):
        recipes._with_held_out({"train": train.select([0]), "validation": train}, "X")


def test_experts_that_are_left_to_the_task_are_the_released_scripts(folder):
    from expert_merging.meo import comparison

    own = {"n": 0, "ks": "0", "levels": "own"}
    glue, squad = (
        comparison.jobs_of(constants(words(folder, "own", family, task, **own)))[0]
        for family, task in (("bert", "rte"), ("t5", "squad"))
    )
    assert (glue.n, glue.ks, glue.levels) == (16, (12,), ("task",))
    assert (squad.n, squad.ks, squad.levels) == (8, (8,), ("sequence",))
    mixed = comparison.jobs_of(
        constants(words(folder, "own", "bert", "rte", n=16, ks="1 0 12", levels="own task token"))
    )
    assert (mixed[0].n, mixed[0].ks, mixed[0].levels) == (16, (1, 12), ("task", "token"))


@pytest.mark.parametrize(
    ("validation", "mismatched"),
    [
        ("validation_matched.jsonl", "validation_mismatched.jsonl"),
        ("validation.jsonl", ""),
    ],
)
def test_mnli_is_validated_on_the_matched_part(folder, tmp_path, validation, mismatched):
    def write(name, rows):
        lines = [{"premise": "a", "hypothesis": f"{name} {i}", "label": i % 3} for i in range(rows)]
        (tmp_path / "mnli" / name).write_text("".join(json.dumps(row) + "\n" for row in lines))

    (tmp_path / "mnli").mkdir()
    for name, rows in (("train.jsonl", 30), (validation, 6), (mismatched, 9)):
        if name:
            write(name, rows)
    raw = recipes.load_raw("mnli", constants(words(folder, "mnli", "bert", "mnli", GLUE_PATH=tmp_path)))
    assert [e["hypothesis"].split()[0] for e in raw["test"]] == [validation] * 6
    assert len(raw["train"]) + len(raw["validation"]) == 30


@pytest.mark.parametrize("size", [3, 8])
def test_masks_of_a_test_do_not_depend_on_the_size_of_its_batches(folder, size):
    recipe = replace(recipes.RECIPES["doc_lm"], length=12)
    tokenizer = finetuning.load_tokenizer(str(folder / "bert"))
    blocks = recipes.blocks_of(sentences(40), tokenizer, recipe.length)[:8]
    rows = [{"input_ids": block} for block in blocks]
    model = finetuning.load_model(str(folder / "bert"), "bert", recipe, None)
    found = [
        finetuning.evaluate(model, rows, tokenizer, "bert", recipe, SimpleNamespace(eval_batch_size=n), "cpu")[0][
            "loss"
        ]
        for n in (1, size)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_line_of_losses_that_was_cut_short_is_left_out(tmp_path):
    main = SimpleNamespace(is_main_process=True, device=torch.device("cpu"))
    log = finetuning._Log(tmp_path / "steps.jsonl", main)
    log.add(0, torch.tensor(1.0))
    with open(log.path, "a") as file:
        file.write("[1, 2.0")  # a full disk
    again = finetuning._Log(log.path, main)
    again.add(1, torch.tensor(3.0))
    assert again.read() == ([1.0, 3.0], [])


def test_several_tasks_are_one_command_with_their_average(folder, capsys):
    command = words(folder, "several", "bert", "rte mrpc", levels="sequence", epochs=1, seeds="0 1")
    call_main("neighbours/MEO_finetune.py", command)
    found = {task: records(folder, "several", f"bert_{task}") for task in ("rte", "mrpc")}
    assert all(set(own) == {"dense", "block", "moe_sequence_k2", "meo_sequence_k2"} for own in found.values())
    place = folder / "several" / "meo"
    with (place / "bert_rte+mrpc" / "tables" / "bert_average.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    averages = []
    for seed in (0, 1):
        files = [place / f"bert_{task}" / f"seed{seed}" / "meo_sequence_k2.json" for task in found]
        scores = [json.loads(file.read_text())["scores"]["test"]["accuracy"] for file in files]
        assert scores[0] != scores[1]
        averages.append(sum(scores) / 2)
    assert [float(v) for v in rows["MEO sequence k=2"]["average by seed"].split()] == pytest.approx(averages)
    assert "MEO: bert on mrpc, rte" in capsys.readouterr().out
    with pytest.raises(UserError, match="squad is seq2seq, which bert does not do"):
        call_main("neighbours/MEO_finetune.py", words(folder, "several", "bert", "rte squad"))


def test_a_long_context_loses_its_end_and_is_counted(folder):
    """The question stays; an answer behind the cut is not in what the model reads."""
    from expert_merging.meo import finetuning, recipes

    tokenizer = finetuning.load_tokenizer(str(folder / "t5"))
    long = " ".join(["the river rose in London"] * 20 + ["a striker"])
    examples = [
        {"question": "the bank", "context": context, "answers": {"text": ["a striker"]}}
        for context in (long, "a striker won")
    ]
    recipe = replace(recipes.RECIPES["squad"], length=24)
    rows, facts = recipes.rows_of("squad", recipe, dict.fromkeys(recipes.SPLITS, examples), tokenizer)
    assert facts["cut"] == dict.fromkeys(recipes.SPLITS, 1)
    cut, whole = (tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows["test"])
    assert len(rows["test"][0]["input_ids"]) == 24 and rows["test"][0]["input_ids"][-1] == tokenizer.eos_token_id
    assert "the bank" in cut and "striker" not in cut and "striker" in whole
    assert rows["test"][0]["references"] == ["a striker"]  # it counts as not found


@pytest.mark.parametrize("minutes", [0, 5])
def test_an_interrupted_run_ends_as_an_undisturbed_one(done, folder, monkeypatch, minutes):
    """Stopped in the middle of the second epoch, after a checkpoint or before there is any."""
    from expert_merging.meo import finetuning

    found, _ = done
    add, calls = finetuning._Log.add, []

    def stop(self, step, loss):
        add(self, step, loss)
        calls.append(step)
        if len(calls) == 9:
            raise KeyboardInterrupt

    run = f"stopped{minutes}"
    same = words(folder, run, "bert", "rte", levels="sequence", checkpoint_minutes=minutes)
    monkeypatch.setattr(finetuning._Log, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        call_main("neighbours/MEO_finetune.py", same)
    assert any((folder / run).rglob("checkpoint-*")) == (minutes == 0)
    monkeypatch.setattr(finetuning._Log, "add", add)
    call_main("neighbours/MEO_finetune.py", same)
    for name, record in records(folder, run, "bert_rte").items():
        assert record["step_losses"] == found[name]["step_losses"] and record["scores"] == found[name]["scores"]


def test_pretraining_learns(tmp_path):
    """The small base models of the docstring tasks, on made-up text."""
    from types import SimpleNamespace

    from expert_merging.meo import bases, recipes
    from expert_merging.run.devices import make_accelerator

    tokenizer = bases.new_tokenizer(tiny_tokenizer())
    blocks = recipes.blocks_of(sentences(400), tokenizer, 16)
    c = SimpleNamespace(
        seed=0, device="cpu", precision="auto", scale="tiny", d_model=16, d_ff=32, num_layers=1, num_heads=2,
        pretraining_steps=40, pretraining_batch=8, pretraining_lr=0.01, pretraining_length=16, checkpoint_minutes=5,
    )  # fmt: skip
    for family in ("bert", "t5", "bart"):
        bases.pretrain(c, make_accelerator(c), family, tokenizer, blocks, tmp_path / family)
        record = json.loads((tmp_path / family / "pretraining.json").read_text())
        assert record["history"][0]["heldout_loss"] < 0.85 * math.log(len(tokenizer))
        assert not (tmp_path / f"{family}.run").exists()
        c.family = family
        assert bases.pretrain_once(c, None, tmp_path / family) == str(tmp_path / family)  # is there already
    other = SimpleNamespace(**vars(c) | {"d_model": 32})
    with pytest.raises(
        UserError, match="bart was made with other constants .d_model was 16, is now 32.*another MEO_DIR"
    ):
        bases.pretrain_once(other, None, tmp_path / "bart")


def test_masking():
    from expert_merging.meo.bases import mask_tokens, new_tokenizer

    tokenizer = new_tokenizer(tiny_tokenizer())
    ids = np.random.default_rng(0).integers(3, 200, (200, 50))
    ids[:, 0] = tokenizer.cls_token_id
    inputs, labels = mask_tokens(ids, tokenizer, np.random.default_rng(1))
    asked = labels != -100
    assert not asked[:, 0].any() and (labels[asked] == ids[asked]).all() and (inputs[~asked] == ids[~asked]).all()
    assert 0.13 < asked.mean() < 0.16 and 0.77 < (inputs[asked] == tokenizer.mask_token_id).mean() < 0.83
    assert 0.08 < (inputs[asked] == ids[asked]).mean() < 0.13


def test_scores_of_glue():
    from expert_merging.meo.recipes import classification_scores

    logits = np.array([[2, 1], [0, 1], [0, 3], [1, 0.0]])
    scores = classification_scores(logits, np.array([0, 1, 0, 0]), "matthews")
    assert list(scores)[0] == "matthews" and scores["accuracy"] == 75
    assert scores["f1"] == pytest.approx(200 / 3) and scores["matthews"] == pytest.approx(57.735, abs=1e-3)
    numbers = classification_scores(np.array([[1.0], [2.0], [4.0]]), np.array([1, 2, 3.0]), "pearson")
    assert numbers["spearman"] == pytest.approx(100) and 98 < numbers["pearson"] < 99


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tasks": "poems"}, "no task 'poems'; there are: cola"),
        ({"family": "roberta"}, "family is 'roberta'"),
        ({"family": "t5"}, "rte is classification, which t5 does not do"),
        ({"ks": "1 4"}, "ks has 4; k, the active experts, is from 1 to n = 3"),
        ({"levels": "paragraph"}, "levels has 'paragraph'"),
        ({"family": "gpt2", "tasks": "wikitext", "levels": "sequence"}, "would look at the words to be predicted"),
        ({"MODEL_PATH": "./nowhere"}, "MODEL_PATH: there is no folder './nowhere'"),
        ({"GLUE_PATH": "./nowhere"}, "GLUE_PATH: there is no folder './nowhere'"),
        ({"tasks": "cola"}, "there is no folder .*cola"),
        ({"epochs": -1}, "epochs given is -1"),
        (
            {"input_length": 4000},
            "inputs of 4000 tokens are asked for, and .* has [0-9]+ positions; lower input_length",
        ),
        ({"lr": 0.1}, "lr has no say in this script; what has: learning_rate"),
    ],
)
def test_what_is_wrong_is_said(folder, changed, said):
    with pytest.raises(UserError, match=said) as error:
        call_main("neighbours/MEO_finetune.py", words(folder, "bad", **{"family": "bert", "task": "rte", **changed}))
    assert "\n" not in str(error.value)


def test_a_model_of_another_family_is_refused(folder):
    with pytest.raises(UserError, match="holds a bert model, not t5"):
        call_main("neighbours/MEO_finetune.py", words(folder, "bad", "t5", "squad", MODEL_PATH=folder / "bert"))
