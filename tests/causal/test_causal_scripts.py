"""The four scripts on Mixtral, OLMoE and Qwen2-MoE: from raw data to a merged, fine-tuned and tested model."""

import json
import math
import pickle
import shutil
import time

import pytest
import torch
from causal_models import FAMILIES, byte_tokenizer, write_dense, write_model
from conftest import World, call_main, run_script, start
from raw_data import write_ag_news, write_squad, write_xsum
from safetensors.torch import load_file

from expert_merging.core.errors import UserError
from expert_merging.core.files import sha256
from expert_merging.data import features

TASKS = ("ag_news", "squad")
SOURCES = ("--source_experts_num", "4")
CAEM = "CAEM_multi_task_finetune.py"


class Place(World):
    """A world whose base is a causal mixture; `family` names it."""

    def __init__(self, folder, family):
        super().__init__(folder)
        self.family = family
        write_ag_news(folder / "ag_news", train=36, test=6)
        write_squad(folder / "squad", train=20, dev=6)
        write_xsum(folder / "xsum", train=10, validation=4, test=4)
        write_model(folder / "base-4", family)

    def words(self, runs="runs", **constants):
        changed = {"task_types": "ag_news squad", "num_beams": 1, "batch_size": 3, "lr": 2e-3} | constants
        words = super().words(runs, **changed)
        at = words.index("--BASE_MODEL_PATH") + 1
        return [*words[:at], str(self.folder / "base-4"), *words[at + 1 :]]


def go(place, run, runs="runs"):
    run("datasets_preprocessing.py", [*place.words(runs), "--num_expert", "4"])
    for task in TASKS:
        run("single_task_finetune.py", [*place.words(runs), "--task_type", task, "--num_expert", "4"])
    run("Baseline_multi_task_finetune.py", [*place.words(runs), "--experts_num", "4"])
    run(CAEM, [*place.words(runs, num_beams=1), *SOURCES, "--target_experts_num", "4"])


def as_processes(script, words):
    result = run_script(script, words)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module", params=FAMILIES)
def done(request, tmp_path_factory):
    """(place, folder of the seed); OLMoE's scripts as processes, the others' in this one."""
    place = Place(tmp_path_factory.mktemp("causal") / request.param, request.param)
    go(place, as_processes if request.param == "olmoe" else call_main)
    return place, place.folder / "runs" / "seed0"


def history(folder, name):
    return json.loads((folder / "histories" / f"{name}.json").read_text())


def test_features_hold_input_separator_and_target(done):
    from datasets import DatasetDict

    place, _ = done
    tokenizer = byte_tokenizer()
    data = DatasetDict.load_from_disk(str(place.folder / "runs" / "data" / "ag_news"))
    separator, end, begin = tokenizer("\n")["input_ids"], 0, [1] if place.family == "mixtral" else []
    cut = 0
    for row in data["train"]:
        assert row["input_ids"][: len(begin)] == begin and row["input_ids"][-len(separator) :] == separator
        assert len(row["input_ids"]) <= 24 and 1 < len(row["labels"]) <= 6 and row["labels"][-1] == end
        assert tokenizer.decode(row["input_ids"]).removeprefix("<|begin|>").startswith("Classify: ")
        assert row["references"][0].startswith(tokenizer.decode(row["labels"][:-1]))
        cut += len(row["input_ids"]) == 24
    assert cut > 0


@pytest.mark.parametrize("name", ["single_task_[4]/single_task_squad", "Baseline_[4]", "CAEM_[4|4]"])
def test_histories_are_whole(done, name):
    place, folder = done
    content = history(folder, name)
    layers, tasks = 2, content["tasks"]
    assert content["experts_num"] == 4 and len(content["train_loss"]) == 2
    assert all(map(math.isfinite, content["train_loss"])) and content["train_loss"][1] < content["train_loss"][0]
    assert set(content["usage"]) == set(content["entropy"]) == {"decoder"}
    for task in tasks:
        usage = torch.tensor(content["usage"]["decoder"][task])
        assert usage.shape == (layers, 4) and len(set(usage.sum(1).tolist())) == 1
        assert all(math.log(2) / math.log(4) - 1e-6 <= value <= 1 for value in content["entropy"]["decoder"][task])
    pickled = pickle.loads((folder / "histories" / f"{name}.pkl").read_bytes())
    assert pickled["entropy_de"] == content["entropy"]["decoder"] and "expert_usage_grid" not in pickled
    assert ("record_stay_num_experts_de" in pickled) == name.startswith("CAEM")
    assert not list((folder / "models").rglob("*.run"))


def test_the_merge_is_algorithm_1(done):
    """Experts and their router rows are the most used of each source, by hand; all else is averaged."""
    place, folder = done
    record = json.loads((folder / "models" / "CAEM_[4|4]_merged" / "merging.json").read_text())
    merged = load_file(folder / "models" / "CAEM_[4|4]_merged" / "model.safetensors")
    sources = [
        load_file(folder / "models" / "single_task_[4]" / f"single_task_{t}" / "model.safetensors") for t in TASKS
    ]
    usage = [history(folder, f"single_task_[4]/single_task_{t}")["usage"]["decoder"][t] for t in TASKS]
    gates = sorted(name for name in merged if name.endswith(".gate.weight"))
    assert len(gates) == 2
    for layer, gate in enumerate(gates):
        slot = 0
        for source, counts, number in zip(sources, usage, record["allocation"]["decoder"][layer], strict=True):
            for expert in sorted(range(4), key=lambda e: (-counts[layer][e], e))[:number]:
                assert torch.equal(merged[gate][slot], source[gate][expert])
                prefix = gate.removesuffix("gate.weight") + "experts."
                parts = [n for n in source if n.startswith(f"{prefix}{expert}.")]
                assert len(parts) == 3
                for name in parts:
                    assert torch.equal(merged[name.replace(f"{prefix}{expert}.", f"{prefix}{slot}.")], source[name])
                slot += 1
        assert slot == 4
    w = record["weights"]["decoder"]
    rest = [name for name in merged if ".experts." not in name and name not in gates]
    assert "model.embed_tokens.weight" in rest
    for name in rest:
        torch.testing.assert_close(merged[name], w[0] * sources[0][name] + w[1] * sources[1][name])


def test_tables_and_figures_by_the_same_command(done):
    """What is there is not made again; the references, the soup, the line and the CKA come to it."""
    place, folder = done
    if place.family != "qwen2_moe":
        pytest.skip("one family is enough")
    words = [*place.words(), "--experts_num", "4", "--larger_experts_num", "6", "--parts"]
    before = sha256(folder / "histories" / "CAEM_[4|4].json")
    result = run_script("reproduce_tables.py", [*words, "comparison", "CAEM-4 + Baseline-4"])
    assert result.returncode == 0, result.stderr
    for row in ("base model, not fine-tuned", "single-task models", "Baseline-4", "CAEM-4 "):
        assert f"| {row}" in result.stdout
    report = place.folder / "runs" / "report"
    figures = {path.stem for path in (report / "figures").glob("*.png")}
    assert {"cka", "lines_between", "allocation_CAEM-4", "expert_use_CAEM-4", "scores_over_epochs"} <= figures
    table = (report / "tables" / "allocation.csv").read_text()
    assert "decoder" in table and "encoder" not in table
    pair = json.loads((folder / "histories" / "pairs" / "CAEM_[4|4]__Baseline_[4].json").read_text())
    assert [len(layers) for layers in pair["cka"]["after"]["squad"].values()] == [3]
    assert before == sha256(folder / "histories" / "CAEM_[4|4].json")


def test_weights_load_in_transformers_and_as_released(done):
    from transformers import AutoModelForCausalLM

    _, folder = done
    model = AutoModelForCausalLM.from_pretrained(folder / "models" / "CAEM_[4|4]")
    epoch = history(folder, "CAEM_[4|4]")["best_epoch"]
    released = torch.load(folder / "models" / f"CAEM_[4|4]_ep{epoch}.pt", weights_only=True)
    assert all(torch.equal(tensor, released[f"STmodel.{name}"]) for name, tensor in model.state_dict().items())


def merge_only(place, *words, **constants):
    call_main(CAEM, [*place.words(**constants), *SOURCES, "--merge_only", *words])


def test_more_and_fewer_experts(done):
    from transformers import AutoModelForCausalLM

    place, folder = done
    for target in (2, 7):
        merge_only(place, "--target_experts_num", str(target))
        model = AutoModelForCausalLM.from_pretrained(folder / "models" / f"CAEM_[4|{target}]_merged")
        gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
        assert [len(gate.weight) for gate in gates] == [target] * 2 and model.config.num_experts_per_tok == 2
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_equal_sources_give_themselves_back(done, tmp_path):
    """Two of one model with all their experts: every expert stands twice, in order of usage, and all else is as it was."""
    place, folder = done
    models, _ = copied_sources(folder, tmp_path)
    shutil.rmtree(models / "single_task_squad")
    shutil.copytree(models / "single_task_ag_news", models / "single_task_squad")
    words = [*place.words(tmp_path), *SOURCES, "--target_experts_num", "8", "--merge_only"]
    call_main(CAEM, words)
    merged = load_file(tmp_path / "seed0" / "models" / "CAEM_[4|8]_merged" / "model.safetensors")
    source = load_file(models / "single_task_squad" / "model.safetensors")
    record = json.loads((tmp_path / "seed0/models/CAEM_[4|8]_merged/merging.json").read_text())
    for name, tensor in merged.items():
        if name.endswith(".gate.weight"):
            of_layers = record["experts"]["decoder"][
                sorted(n for n in source if n.endswith(".gate.weight")).index(name)
            ]
            assert torch.equal(tensor, torch.cat([source[name][experts] for experts in of_layers]))
        elif ".experts." not in name:
            torch.testing.assert_close(tensor, source[name])


@pytest.mark.parametrize(("name", "words"), [("CAEM-Avg", ["--alpha", "0"]), ("Average", ["--merging", "average"]),
                                             ("tokens", ["--shares", "tokens"])])  # fmt: skip
def test_controls(done, name, words):
    place, folder = done
    merge_only(place, *words, "--target_experts_num", "4", current_case_name=name)
    merged = load_file(folder / "models" / f"{name}_[4|4]_merged" / "model.safetensors")
    record = json.loads((folder / "models" / f"{name}_[4|4]_merged" / "merging.json").read_text())
    if name == "CAEM-Avg":
        assert record["allocation"]["decoder"] == [[2, 2], [2, 2]]
    if name == "Average":
        paths = [folder / "models" / "single_task_[4]" / f"single_task_{t}" / "model.safetensors" for t in TASKS]
        first, second = map(load_file, paths)
        for key, tensor in merged.items():
            torch.testing.assert_close(tensor, (first[key] + second[key]) / 2)


@pytest.mark.parametrize(
    ("words", "constants", "said"),
    [
        (["--target_experts_num", "9"], {}, "must be between 2 and 8"),
        (["--target_experts_num", "4", "--merging", "reap"], {}, "merging reap is not for .*; there are caem, average"),
        (["--target_experts_num", "4"], {"reading": "released"}, "reading released is of Switch Transformers"),
    ],
)
def test_bad_input_to_the_merge(done, words, constants, said):
    with pytest.raises(UserError, match=said):
        merge_only(done[0], *words, current_case_name="bad", **constants)
    assert not list((done[1] / "models").glob("bad*"))


def single(place, *words, **constants):
    call_main("single_task_finetune.py", [*place.words("elsewhere", **constants), "--task_type", "squad", *words])


def test_bad_input_to_training(done, tmp_path):
    place, _ = done
    if not (place.folder / "elsewhere").exists():
        (place.folder / "elsewhere").mkdir()
        (place.folder / "elsewhere" / "data").symlink_to(place.folder / "runs" / "data")
    with pytest.raises(UserError, match="has 4 experts a sparse layer, not 8"):
        single(place, "--num_expert", "8")
    with pytest.raises(UserError, match="reading released is of Switch Transformers"):
        single(place, "--num_expert", "4", reading="released")
    config = json.loads((place.folder / "base-4" / "config.json").read_text())
    spoilt = tmp_path / "base"
    shutil.copytree(place.folder / "base-4", spoilt)
    for change, said in (
        ({"max_position_embeddings": 20}, "are more than the 20 positions"),
        ({"num_hidden_layers": 4}, "lacks model.layers.*, which .*ForCausalLM has"),
        ({"vocab_size": 319}, "did not find a whole model"),
        ({"model_type": "granitemoe"}, "model_type is granitemoe; there are switch_transformers, mixtral"),
    ):
        (spoilt / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said):
            single(place, "--num_expert", "4", "--BASE_MODEL_PATH", str(spoilt))
    write_model(tmp_path / "small", place.family, vocabulary=300)
    with pytest.raises(UserError, match="the tokenizer has 320 tokens, the model only 300"):
        single(place, "--num_expert", "4", "--BASE_MODEL_PATH", str(tmp_path / "small"))
    assert not (place.folder / "elsewhere" / "seed0" / "models").exists()


def changed_config(folder, **lines):
    """In place."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | lines))
    return folder


def test_a_base_of_the_same_weights_that_chooses_more_experts_is_another(done, tmp_path):
    place, folder = done
    base = shutil.copytree(place.folder / "base-4", tmp_path / "base")
    words = [*place.words(), "--task_type", "squad", "--num_expert", "4", "--BASE_MODEL_PATH", str(base)]
    changed_config(base, transformers_version="4.0.0", use_cache=False)
    call_main("single_task_finetune.py", words)  # there already
    changed_config(base, num_experts_per_tok=3)
    with pytest.raises(UserError, match="was made with other constants .ancestor was"):
        call_main("single_task_finetune.py", words)


def copied_sources(folder, to):
    """Single-task models and histories, in a place of their own; returns the folders of both."""
    for part in ("models", "histories"):
        shutil.copytree(folder / part / "single_task_[4]", to / "seed0" / part / "single_task_[4]")
    return [to / "seed0" / part / "single_task_[4]" for part in ("models", "histories")]


def test_sources_that_choose_other_numbers_of_experts_are_refused(done, tmp_path):
    models, _ = copied_sources(done[1], tmp_path)
    changed_config(models / "single_task_squad", num_experts_per_tok=3)
    words = [*done[0].words(tmp_path), *SOURCES, "--target_experts_num", "4", "--merge_only"]
    with pytest.raises(
        UserError, match="num_experts_per_tok is 3 in .*single_task_squad and 2 in .*single_task_ag_news"
    ):
        call_main(CAEM, words)


def test_other_usage_of_the_same_sources_is_another_merge(done, tmp_path):
    models, histories = copied_sources(done[1], tmp_path)
    words = [*done[0].words(tmp_path), *SOURCES, "--target_experts_num", "4", "--merge_only"]
    merged = models.parent / "CAEM_[4|4]_merged"
    call_main(CAEM, words)
    before = (merged / "merging.json").stat().st_mtime_ns
    call_main(CAEM, words)
    assert (merged / "merging.json").stat().st_mtime_ns == before
    path = histories / "single_task_squad.json"
    history = json.loads(path.read_text())
    history["usage"]["decoder"]["squad"] = [[0, 0, 5, 5]] * 2
    path.write_text(json.dumps(history))
    call_main(CAEM, words)
    record = json.loads((merged / "merging.json").read_text())
    assert all(set(experts[1]) <= {2, 3} for experts in record["experts"]["decoder"])


def test_fewer_experts_than_a_token_is_sent_to(tmp_path):
    """k = 3 of 4: a target of 2 is refused before anything is written."""
    place = Place(tmp_path / "place", "mixtral")
    write_model(place.folder / "base-4", "mixtral", k=3)
    for script, words in (
        ("datasets_preprocessing.py", []),
        *(("single_task_finetune.py", ["--task_type", t]) for t in TASKS),
    ):
        call_main(script, [*place.words(num_epochs=1), "--num_expert", "4", *words])
    with pytest.raises(UserError, match="a token is sent to 3 experts .num_experts_per_tok.; target_experts_num is 2"):
        merge_only(place, "--target_experts_num", "2")
    merge_only(place, "--target_experts_num", "3")


@pytest.mark.parametrize("base", ["olmoe", "upcycled"])
def test_killed_and_taken_up_it_ends_with_the_same_weights(tmp_path, base):
    """Upcycled with --every: a Qwen2-MoE with tensors of no element, which safetensors files of accelerate lack."""
    place = Place(tmp_path / "place", "olmoe")
    if base == "upcycled":
        made = place.folder / "base-4"
        shutil.rmtree(made)
        dense = str(write_dense(place.folder / "dense"))
        call_main("tools/upcycle.py", ["--dense", dense, "--out", str(made), "--experts", "4", "--every", "2"])
    call_main("datasets_preprocessing.py", [*place.words(), "--num_expert", "4"])
    words = ["--task_type", "ag_news", "--num_expert", "4", "--checkpoint_minutes", "0"]
    as_processes("single_task_finetune.py", [*place.words(), *words])
    (place.folder / "again").mkdir()
    shutil.copytree(place.folder / "runs" / "data", place.folder / "again" / "data")
    process = start("single_task_finetune.py", [*place.words("again"), *words])
    model = place.folder / "again" / "seed0" / "models" / "single_task_[4]"
    while process.poll() is None and not list((model / "single_task_ag_news.run").glob("checkpoint-*")):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert (model / "single_task_ag_news.run").exists()
    as_processes("single_task_finetune.py", [*place.words("again"), *words])
    weights = "seed0/models/single_task_[4]/single_task_ag_news/model.safetensors"
    assert sha256(place.folder / "runs" / weights) == sha256(place.folder / "again" / weights)


def test_a_frame_of_other_ids_is_other_features(done, tmp_path):
    """A tokenizer that begins texts with a token wants features made for it."""
    from raw_data import constants

    place, _ = done
    c = constants(place.folder, place.folder / "runs" / "data", max_input_length=24, max_decoder_length=6)
    other = byte_tokenizer(begins=place.family != "mixtral", pads=place.family != "mixtral")
    if other.pad_token is None:
        other.pad_token = other.eos_token
    with pytest.raises(UserError, match="was made with another frame; run: python datasets_preprocessing.py"):
        features.load("squad", c, other)


@pytest.mark.parametrize("begins", [False, True])
def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path, begins):
    place = Place(tmp_path / "place", "olmoe")
    byte_tokenizer(begins, ends=True).save_pretrained(place.folder / "base-4")
    call_main("datasets_preprocessing.py", [*place.words(), "--num_expert", "4"])
    words = [*place.words(), "--task_type", "ag_news", "--num_expert", "4"]
    with pytest.raises(
        UserError, match=r"the tokenizer ends every text with <\|end\|>, where the answer is to follow; save it"
    ):
        call_main("single_task_finetune.py", words)
    assert not list((place.folder / "runs" / "seed0").rglob("*.run"))
