"""neighbours/WEMoE_multi_task_merging.py on small models: any Switch or T5 folders, what it leaves, and what it refuses."""

import contextlib
import json
import shutil

import pytest
import torch
from conftest import call_main
from datasets import Dataset

from expert_merging.core.errors import UserError
from expert_merging.core.safetensors_folder import SafetensorsFolder
from expert_merging.wemoe.seq2seq_losses import AnswerLoss
from expert_merging.wemoe.sources import Sources, open_sources

SCRIPT = "neighbours/WEMoE_multi_task_merging.py"
TASKS = ("ag_news", "squad", "xsum")
SMALL = {
    "experts_num": 4, "adapt_steps": 2, "adapt_batch_size": 2, "statistics_examples": 3, "adapt_tokens": 3, "test_examples": 5,
    "num_beams": 2, "adapt_losses": "verbalizer self_generated first_token",
}  # fmt: skip


def models_of(folder, base, seed=0):
    """Stand-ins for single-task models: the base with other weights, in the script's places."""
    for number, task in enumerate(TASKS):
        model = type(base).from_pretrained(base.name_or_path)
        generator = torch.Generator().manual_seed(seed + number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        target = folder / "seed0" / "models" / "single_task_[4]" / f"single_task_{task}"
        model.save_pretrained(target)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(f"{base.name_or_path}/{file}", target / file)


@pytest.fixture(scope="module")
def merged(world):
    """A folder of runs with all methods done on Switch models, and T5 models beside."""
    from raw_data import tiny_tokenizer
    from transformers import SwitchTransformersForConditionalGeneration, T5Config, T5ForConditionalGeneration

    features = {key: value for key, value in SMALL.items() if key == "test_examples"}
    call_main("datasets_preprocessing.py", [*world.words("merged", **features), "--num_expert", "4"])
    models_of(
        world.folder / "merged", SwitchTransformersForConditionalGeneration.from_pretrained(world.folder / "base-4")
    )
    call_main(SCRIPT, world.words("merged", **SMALL))

    torch.manual_seed(1)
    config = T5Config(
        vocab_size=len(tiny_tokenizer()), d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=2, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(world.folder / "t5")
    tiny_tokenizer().save_pretrained(world.folder / "t5")
    models_of(world.folder / "t5-runs", T5ForConditionalGeneration.from_pretrained(world.folder / "t5"))
    return world.folder / "merged"


def histories(folder):
    found = {}
    for path in sorted((folder / "seed0" / "histories").glob("Merging-*.json")):
        record = json.loads(path.read_text())
        found[record["method"]] = record
    return found


def test_every_method_leaves_a_history_and_a_model(merged):
    from neighbours import WEMoE_multi_task_merging as script

    records = histories(merged)
    assert set(records) == set(script.methods)
    plain = sum(tensor.numel() for tensor in SafetensorsFolder(merged.parent / "base-4").values())
    for method, record in records.items():
        folder = merged / "seed0" / "models" / record["name"]
        routed = "wemoe" in method
        assert record["overall"] == {} and (folder / "wemoe").is_dir() == routed  # no histories, nothing to divide by
        assert all(record[f"{task}_data"]["test"]["loss"] > 0 for task in TASKS)
        assert all(("mixed" in record[f"{task}_data"]) == routed for task in TASKS)
        assert record["parameters"] > plain if routed else record["parameters"] == plain
        assert ("adaptation" in record) == (record["trainable"] > 0) == (routed or method.startswith("ada"))
        assert record["bytes"] < 4 * record["parameters"] + 100_000  # names and shapes; at this size no small part
        if routed:
            assert list(record["routing"])[0] == "encoder.block.0.layer.1.mlp" and len(record["routing"]) == 8
            assert (merged / "seed0" / "histories" / f"{record['name']}_routing.png").stat().st_size > 5000
    assert records["ewemoe"]["bytes"] < records["wemoe"]["bytes"]
    assert records["wemoe_oracle"]["adaptation"]["losses"] == dict.fromkeys(TASKS, "teacher_forced_gold")
    coefficients = records["adamerging_layer"]["coefficients"]
    assert len(coefficients["xsum"]) == len(coefficients["tensors"])
    assert len(records["adamerging_task"]["coefficients"]["xsum"]) == 1


def test_mixed_batches_hold_all_tasks_and_are_nothing_to_sample_wise_routing(world, merged, monkeypatch):
    from types import SimpleNamespace

    from expert_merging.data import features
    from expert_merging.run.constants import read_constants
    from expert_merging.switch import decoding
    from expert_merging.wemoe import experiment
    from neighbours import WEMoE_multi_task_merging as script

    c = read_constants(vars(script), world.words("merged", **SMALL, eval_batch_size=6))
    sources = open_sources(c)
    sources.data = {task: features.load(task, c, sources.tokenizer) for task in TASKS}
    written, batches = {}, []

    def task(name):
        def score(predictions, references):
            written[name] = predictions
            return {}

        return SimpleNamespace(score=score)

    generate = decoding.generate

    def noted(model, dataset, *arguments):
        batches.append([ids[:3] for ids in dataset["input_ids"]])
        return generate(model, dataset, *arguments)

    monkeypatch.setattr(experiment, "get_task", task)
    model = experiment.load_made(sources, merged / "seed0" / "models" / "Merging-wemoe_[4]")
    alone = {t: generate(model, sources.data[t]["test"], sources.tokenizer, c, "cpu", 6) for t in TASKS}
    monkeypatch.setattr(decoding, "generate", noted)
    experiment.mixed_scores(sources, SimpleNamespace(device="cpu", autocast=contextlib.nullcontext), model)
    assert [len(batch) for batch in batches] == [6, 6, 3]
    starts = {tuple(sources.data[t]["test"][0]["input_ids"][:1]): t for t in TASKS}  # the first word of the prompt
    assert all(len({starts[tuple(ids[:1])] for ids in batch}) == 3 for batch in batches)
    assert {t: dict(enumerate(texts)) for t, texts in written.items()} == alone
    assert any(text for texts in written.values() for text in texts)


def test_statistics_are_of_training_examples_and_what_adapts_sees_test_inputs(world):
    from expert_merging.run.constants import read_constants
    from neighbours import WEMoE_multi_task_merging as script

    sources = open_sources(read_constants(vars(script), world.words("merged", **SMALL)))
    sources.data = {
        task: {
            split: Dataset.from_dict({"input_ids": [[number, 1]] * 4, "labels": [[number, 1], [number + 10, 1]] * 2})
            for number, split in enumerate(("train", "validation", "test"), 5)
        }
        for task in TASKS
    }
    assert next(sources._batches("squad", 1))["input_ids"].tolist() == [[5, 1]]
    loss = sources._loss(sources.model, lambda: sources.model, ("verbalizer",) * 3)
    assert {tuple(ids) for task in TASKS for ids in loss.data[task]["input_ids"]} == {(7, 1)}
    assert all(list(words) == [5, 15] for words in loss.answers.values())


def test_only_what_routes_by_batch_follows_from_how_many_are_decoded_together(world, merged):
    from expert_merging.data import features
    from expert_merging.merging.registry import METHODS
    from expert_merging.run import results
    from expert_merging.run.constants import read_constants
    from expert_merging.wemoe import experiment
    from neighbours import WEMoE_multi_task_merging as script

    identities = {}
    for size in (32, 6):
        c = read_constants(vars(script), world.words("merged", **SMALL, eval_batch_size=size))
        sources = open_sources(c)
        sources.data = {task: features.load(task, c, sources.tokenizer) for task in TASKS}
        identities[size] = {m: experiment.identity_of(sources, METHODS[m]) for m in ("wemoe", "wemoe_batch", "ties")}
    changed = {m: results.changes(identities[32][m], identities[6][m]) for m in identities[32]}
    assert changed == {"wemoe": "", "ties": "", "wemoe_batch": "eval_batch_size was 32, is now 6"}
    before = {name: value for name, value in identities[32]["wemoe_batch"].items() if name != "eval_batch_size"}
    assert results.changes(before, identities[32]["wemoe_batch"]) == ""  # records from before it was noted


def test_models_are_what_the_methods_say(merged):
    base = SafetensorsFolder(merged.parent / "base-4")
    tuned = [
        SafetensorsFolder(merged / "seed0" / "models" / "single_task_[4]" / f"single_task_{task}") for task in TASKS
    ]
    made = {
        m: SafetensorsFolder(merged / "seed0" / "models" / f"Merging-{m}_[4]") for m in ("average", "task_arithmetic")
    }
    for name in base:
        torch.testing.assert_close(made["average"][name], sum(one[name] for one in tuned) / 3)
        wanted = base[name] + 0.3 * sum(one[name] - base[name] for one in tuned)
        torch.testing.assert_close(made["task_arithmetic"][name], wanted)


def test_iso_c_and_tsv_m_average_the_routers_and_leave_one_weight_embedding(merged):
    models = merged / "seed0" / "models"
    average = SafetensorsFolder(models / "Merging-average_[4]")
    for method in ("iso_c", "tsv_m"):
        made = SafetensorsFolder(models / f"Merging-{method}_[4]")
        routers = [name for name in made if "router" in name]
        for name in ("shared.weight", *routers):
            torch.testing.assert_close(made[name], average[name])
        assert routers and all(
            not torch.allclose(made[n], average[n]) for n in made if ".wi." in n or ".SelfAttention.q" in n
        )


def test_a_second_call_does_nothing_and_other_constants_are_refused(world, merged, capsys):
    before = {path: path.stat().st_mtime_ns for path in merged.rglob("*") if path.is_file()}
    call_main(SCRIPT, world.words("merged", **SMALL))
    assert capsys.readouterr().out.count("is there already") == 17
    assert before == {path: path.stat().st_mtime_ns for path in merged.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"Merging-ties_\[4\].json was made with other constants .*ties_keep was 0.2"):
        call_main(SCRIPT, world.words("merged", **SMALL, methods="average ties", ties_keep=0.5))


def test_it_goes_on_where_it_was_and_ends_the_same(world, merged, monkeypatch):
    """Interrupted between merging and testing, and with another place for its results: the same numbers."""
    from expert_merging.wemoe import experiment

    def interrupted(*arguments):
        raise KeyboardInterrupt

    words = world.words("merged", **SMALL, methods="wemoe", current_case_name="Again")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "test_once", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call_main(SCRIPT, words)
    monkeypatch.setattr(Sources, "wemoe", interrupted)  # it is not made anew
    call_main(SCRIPT, words)
    again = json.loads((merged / "seed0" / "histories" / "Again-wemoe_[4].json").read_text())
    first = histories(merged)["wemoe"]
    for key in ("routing", "xsum_data", "parameters", "identity"):
        assert again[key] == first[key]
    assert again["adaptation"]["loss"] == first["adaptation"]["loss"]


def test_scores_of_a_merged_model_are_not_those_of_another_decoding(world, merged):
    """As the refusal advises: the history is removed, and the same command given with another constant."""
    words = {**SMALL, "methods": "average", "current_case_name": "Beams"}
    call_main(SCRIPT, world.words("merged", **words))
    history = merged / "seed0" / "histories" / "Beams-average_[4].json"
    tested = merged / "seed0" / "models" / "Beams-average_[4]" / "test.json"
    spoilt = json.loads(tested.read_text())
    spoilt["test"]["squad"]["exact_match"] = 77.0
    tested.write_text(json.dumps(spoilt))
    history.unlink()
    call_main(SCRIPT, world.words("merged", **words))  # the same constants: taken up
    assert json.loads(history.read_text())["squad_data"]["test"]["exact_match"] == 77.0
    history.unlink()
    call_main(SCRIPT, world.words("merged", **{**words, "num_beams": 1}))
    again = json.loads(history.read_text())
    assert again["squad_data"]["test"]["exact_match"] != 77.0 and again["identity"]["num_beams"] == 1
    assert json.loads(tested.read_text())["identity"]["num_beams"] == 1


def test_an_adaptation_begun_with_other_constants_is_refused(world, merged, monkeypatch):
    from expert_merging.wemoe import adaptation

    monkeypatch.setattr(adaptation, "SAVE_EVERY", 1)
    words = {**SMALL, "methods": "wemoe", "current_case_name": "Begun"}
    call = AnswerLoss.__call__

    def interrupted(loss, task, step):
        if step == 1:
            raise KeyboardInterrupt
        return call(loss, task, step)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerLoss, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call_main(SCRIPT, world.words("merged", **words))
    with pytest.raises(
        UserError, match=r"Begun-wemoe_\[4\].adapting was made with other constants .lam was 0.3, is now 0.9"
    ):
        call_main(SCRIPT, world.words("merged", **words, lam=0.9))
    call_main(SCRIPT, world.words("merged", **words))
    assert not list((merged / "seed0" / "models").glob("*.adapting"))


def test_t5_folders(world, merged):
    folder = world.folder / "t5-runs"
    words = world.words(
        "t5-runs", **SMALL, methods="ties regmean adamerging_plus wemoe", BASE_MODEL_PATH=world.folder / "t5",
        DATA_DIR=merged / "data",
    )  # fmt: skip
    call_main(SCRIPT, words)
    records = histories(folder)
    assert set(records) == {"ties", "regmean", "adamerging_plus", "wemoe"}
    assert len(records["wemoe"]["routing"]) == 4 and records["wemoe"]["trainable"] == 4 * (16 * 16 + 16 + 16 * 3 + 3)


@pytest.mark.parametrize(
    ("constants", "said"),
    [
        ({"methods": "average sum"}, "there is no method 'sum'; there are: average, "),
        ({"adapt_losses": "verbalizer"}, "adapt_losses names 1 losses for 3 tasks"),
        ({"task_types": "xsum", "adapt_losses": "first_token"}, "merging needs two or more"),
        (
            {"methods": "wemoe", "adapt_losses": "entropy first_token first_token"},
            "adapt_losses names 'entropy'; there are first_token",
        ),
        ({"methods": "ties", "ties_keep": 0.0}, "keep is 0.0"),
        ({"methods": "wemoe", "router_depth": 3}, "router_depth is 3; a router has 0, 1 or 2"),
        ({"BASE_MODEL_PATH": "nowhere/at/all"}, "BASE_MODEL_PATH: there is no folder"),
        ({"experts_num": 6}, "holds no model.safetensors"),
        ({"experts_num": 6, "methods": "average sum"}, "there is no method 'sum'"),  # before any model is looked for
        ({"experts_num": 6, "adapt_steps": 0}, "adapt_steps is 0; it must be 1 or more"),
        ({"experts_num": 6, "adapt_batch_size": 0}, "adapt_batch_size is 0"),
        ({"experts_num": 6, "adapt_window": 0}, "adapt_window is 0"),
        ({"experts_num": 6, "statistics_examples": 0}, "statistics_examples is 0"),
        ({"experts_num": 6, "adapt_guard": "hope"}, "the guard is 'hope'"),
    ],
)
def test_mistakes_are_said_in_a_line(world, merged, constants, said):
    with pytest.raises(UserError, match=said) as error:
        call_main(SCRIPT, world.words("merged", **{**SMALL, "current_case_name": "Wrong", **constants}))
    assert "\n" not in str(error.value)


def test_models_of_another_shape_or_ancestor(world, merged, tmp_path):
    words = world.words("merged", **SMALL, current_case_name="Wrong", BASE_MODEL_PATH=world.folder / "base-6")
    with pytest.raises(UserError, match="is not of BASE_MODEL_PATH's shape|only one of them has"):
        call_main(SCRIPT, words)
    folder = tmp_path / "single_task_[4]"
    folder.mkdir()
    for task, score in zip(TASKS, ("accuracy", "exact_match", "rougeL"), strict=True):
        scores = {"validation": [{score: 50.0}], "test": {score: 50.0}, "main_score": score}
        record = {"best_epoch": 1, f"{task}_data": scores, "identity": {"ancestor": "another"}}
        (folder / f"single_task_{task}.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="was not fine-tuned from BASE_MODEL_PATH"):
        call_main(SCRIPT, world.words("merged", **SMALL, current_case_name="Wrong", SOURCE_PICKLE_PATH=folder))
