"""The CLIP experiments end to end on a tiny CLIP and tiny image data sets, in local folders of the hub's formats."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_main
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import CLIP_TASKS as TASKS
from tiny_models import write_clip_place, write_images

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.wemoe import clip, report
from expert_merging.wemoe.corruptions import CORRUPTIONS, corrupting


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_clip_place(tmp_path_factory.mktemp("clip"))


def words(place, results, **more) -> list[str]:
    values = {
        "device": "cpu", "CLIP_PATH": place / "base", "EXPERT_PATH": f"{place}/tower_*", "DATASET_PATH": f"{place}/data/*",
        "clip_tasks": " ".join(TASKS), "robust_tasks": "mnist eurosat", "unseen_tasks": "dtd", "adapt_steps": 2,
        "adapt_batch_size": 4, "images_per_batch": 8, "WEMOE_CLIP_DIR": results, "methods": "task_arithmetic wemoe", **more,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", *str(value).split(" "))]


def test_multi_task_with_every_kind_of_method(place, tmp_path):
    methods = (
        "pretrained individual average ties_sum dare iso_c tsv_m fisher regmean adamerging_task wemoe ewemoe_90_batch"
    )
    call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "r", methods=methods, save_models="true"))
    records = report.read(tmp_path / "r")
    assert set(records) == set(methods.split())
    for of_method in records.values():
        record = of_method["seed0"]
        assert {"model_info", *TASKS, "average_accuracy"} <= set(record)
        assert {"trainable_params", "all_params", "trainable_percentage"} <= set(record["model_info"])
        assert all(
            record[task]["accuracy"] * 14 == pytest.approx(round(record[task]["accuracy"] * 14)) for task in TASKS
        )
    wemoe, pruned = records["wemoe"]["seed0"], records["ewemoe_90_batch"]["seed0"]
    assert wemoe["mixed"].keys() >= {*TASKS, "average_accuracy"} and "sample_wise" in pruned
    assert list(wemoe["routing_weights"]) == [f"vision_model.encoder.layers.{i}.mlp" for i in range(2)]
    assert wemoe["model_info"]["trainable_params"] == 2 * (16 * 16 + 16 + 16 * 3 + 3)
    assert (tmp_path / "r" / "models" / "seed0_wemoe.routers.safetensors").exists()
    assert pruned["files"]["task_vectors.safetensors"] < 0.4 * wemoe["files"]["task_vectors.safetensors"]
    # Nothing to do the second time; another constant is refused, by name, and makes its records in another folder.
    before = (tmp_path / "r" / "records" / "seed0" / "wemoe.json").read_bytes()
    call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "r", methods="wemoe"))
    assert (tmp_path / "r" / "records" / "seed0" / "wemoe.json").read_bytes() == before
    for methods in ("wemoe", "average", "ewemoe_50"):  # there, there, and new
        with pytest.raises(UserError, match="first_layer was 0, is now 1.*choose another WEMOE_CLIP_DIR"):
            call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "r", methods=methods, first_layer=1))
    assert (tmp_path / "r" / "records" / "seed0" / "wemoe.json").read_bytes() == before
    call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "s", methods="wemoe", first_layer=1))
    again = read_json(tmp_path / "s" / "records" / "seed0" / "wemoe.json")
    assert list(again["routing_weights"]) == ["vision_model.encoder.layers.1.mlp"]
    call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "s", methods="wemoe_both", first_layer=1))
    both = read_json(tmp_path / "s" / "records" / "seed0" / "wemoe_both.json")
    assert set(both["routing_weights"]) == {f"vision_model.encoder.layers.1.{part}" for part in ("mlp", "self_attn")}


def test_a_clip_as_the_hub_has_it_without_safetensors(place, tmp_path):
    import shutil

    shutil.copytree(place / "base", tmp_path / "base")
    torch.save(load_file(tmp_path / "base" / "model.safetensors"), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "r", methods="average", CLIP_PATH=tmp_path / "base"))
    assert "CLIP_PATH" in read_json(tmp_path / "r" / "records" / "seed0" / "average.json")["identity"]


def test_each_ewemoe_keeps_its_own_routers(place, tmp_path):
    call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "r", methods="ewemoe", prune_ratios="0.99 0.999"))
    kept = {path.name for path in (tmp_path / "r" / "models").iterdir()}
    assert kept == {f"seed0_ewemoe_{percent}.routers.safetensors" for percent in ("99", "99.9")}


def test_a_tower_of_another_size_is_named_before_anything_is_tested(place, tmp_path):
    import shutil

    for task in TASKS:
        shutil.copytree(place / f"tower_{task}", tmp_path / f"tower_{task}")
    path = tmp_path / f"tower_{TASKS[1]}" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("patch_embedding.weight"))
    save_file(tensors | {name: tensors[name][:, :, :2].contiguous()}, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"tower_{TASKS[1]} is not of CLIP_PATH's size: .*patch_embedding.weight is "):
        call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "r", EXPERT_PATH=f"{tmp_path}/tower_*"))
    assert not list((tmp_path / "r").rglob("*.json"))


def test_generalization_keeps_unseen_tasks_out_of_the_merge(place, tmp_path):
    call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "r", experiment="generalization"))
    record = report.read(tmp_path / "r")["wemoe"]["seed0"]
    assert record["model_info"]["trainable_params"] == 2 * (16 * 16 + 16 + 16 * 2 + 2)
    assert record["adaptation"]["loss"].keys() == {"mnist", "eurosat"}
    assert record["unseen_accuracy"] == record["dtd"]["accuracy"]
    assert record["seen_accuracy"] == pytest.approx((record["mnist"]["accuracy"] + record["eurosat"]["accuracy"]) / 2)
    assert "| unseen |" in (tmp_path / "r" / "tables" / "accuracy.md").read_text()


def test_robustness_takes_the_data_sets_own_corruption_or_makes_it(place, tmp_path):
    more = {
        "experiment": "robustness",
        "corruptions": "clean contrast pixelate",
        "methods": "task_arithmetic ewemoe_90",
    }
    call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "r", **more))
    records = report.read(tmp_path / "r")["task_arithmetic"]
    losses = {group: record["mnist"]["loss"] for group, record in records.items()}
    assert len(set(losses.values())) == 3 and set(records) == {"clean", "contrast", "pixelate"}
    # The split named contrast holds other images, so what is measured on it is what is measured on them.
    base, text, tokenizer, processor = clip.load_clip(str(place / "base"), "CLIP_PATH")
    own = clip.Images(f"{place}/data/mnist", "", "contrast", "DATASET_PATH")
    assert own.load(0).tobytes() != clip.Images(f"{place}/data/mnist", "", "test", "DATASET_PATH").load(0).tobytes()


def test_another_seed_is_another_row_of_the_table_but_another_clip_is_not(place, tmp_path):
    import shutil

    small = {"methods": "average", "clip_tasks": "mnist"}
    for seed in (0, 1):
        call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "r", seed=seed, **small))
    assert set(report.read(tmp_path / "r")["average"]) == {"seed0", "seed1"}
    shutil.copytree(place / "base", tmp_path / "copy")
    given = words(place, tmp_path / "r", seed=2, CLIP_PATH=tmp_path / "copy", **small)
    call_main("neighbours/WEMoE_clip.py", given)  # the same model, elsewhere
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors["vision_model.embeddings.class_embedding"] += 1
    save_file(tensors, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="CLIP_PATH was .*choose another WEMOE_CLIP_DIR"):
        call_main("neighbours/WEMoE_clip.py", given)


def test_the_size_of_clip_names_its_models_and_the_folder_of_its_results():
    from expert_merging.run.constants import read_constants
    from neighbours import WEMoE_clip

    c = read_constants(vars(WEMoE_clip), ["--clip_size", "large-patch14", "--RUN_DIR", "r"])
    assert c.WEMOE_CLIP_DIR == "r/wemoe_clip/large-patch14/multi_task"
    assert c.CLIP_PATH == "openai/clip-vit-large-patch14"
    assert c.EXPERT_PATH == "tanganke/clip-vit-large-patch14_*"


def test_a_model_of_another_size_than_its_folder_says_is_refused():
    from transformers import CLIPVisionConfig

    def model(width, patch):
        return SimpleNamespace(config=CLIPVisionConfig(hidden_size=width, patch_size=patch))

    clip.check_size("base-patch16", model(768, 16), "clip")
    clip.check_size("my-own", model(48, 2), "clip")
    with pytest.raises(
        UserError, match="clip_size is 'base-patch32', but clip is CLIP large-patch14; give --clip_size"
    ):
        clip.check_size("base-patch32", model(1024, 14), "clip")


def test_a_head_is_the_mean_of_unit_text_embeddings(place):
    base, text, tokenizer, processor = clip.load_clip(str(place / "base"), "CLIP_PATH")
    head = clip.zero_shot_head(text, tokenizer, ["cat", "dog"], ("a {}.", "the {}."))
    torch.testing.assert_close(head.norm(dim=-1), torch.ones(2))
    with torch.no_grad():
        own = [text.get_text_features(**tokenizer([f"{a} dog."], return_tensors="pt"))[0] for a in ("a", "the")]
    expected = sum(row / row.norm() for row in own)
    torch.testing.assert_close(head[1], expected / expected.norm(), atol=1e-5, rtol=0)
    # The vision model is CLIP's: same embeddings as by the whole model.
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(base(pixel_values=pixels).image_embeds, text.get_image_features(pixel_values=pixels))


def test_templates_are_as_many_as_published():
    counts = {task: len(templates) for task, templates in clip.TEMPLATES.items()}
    assert counts == {
        "sun397": 2, "stanford-cars": 8, "resisc45": 18, "eurosat": 3, "svhn": 1, "gtsrb": 3, "mnist": 1, "dtd": 8,
    }  # fmt: skip
    for templates in clip.TEMPLATES.values():
        assert len(set(templates)) == len(templates) and all(template.count("{}") == 1 for template in templates)


def test_class_names_come_from_the_data_or_a_file(place, tmp_path):
    images = clip.Images(f"{place}/data/mnist", "", "test", "DATASET_PATH")
    assert clip.class_names("mnist", images, "") == ["one", "two three", "four"]
    (tmp_path / "mnist.json").write_text('["1", "2 3", "4"]')
    assert clip.class_names("mnist", images, str(tmp_path)) == ["1", "2 3", "4"]
    write_images(tmp_path / "nameless", "x", parquet=True, names=False)
    images = clip.Images(str(tmp_path / "nameless"), "", "test", "DATASET_PATH")
    with pytest.raises(UserError, match="labels up to 2 and 0 class names"):
        clip.class_names("x", images, "")


def test_clips_class_names_are_as_many_as_the_data_sets_classes():
    lists = {path.stem: read_json(path) for path in clip.CLASS_NAMES.glob("*.json")}
    counts = {
        "eurosat": 10,
        "svhn": 10,
        "gtsrb": 43,
        "mnist": 10,
        "dtd": 47,
        "resisc45": 45,
        "sun397": 397,
        "stanford-cars": 196,
    }
    assert {task: len(names) for task, names in lists.items()} == counts
    for names in lists.values():
        assert len(set(names)) == len(names) and all(name == name.strip() and "_" not in name for name in names)
    for task in ("dtd", "resisc45", "sun397"):  # whose folders are in this order
        assert lists[task] == sorted(lists[task])


def test_clips_class_names_stand_in_the_order_of_the_labels():
    def names(task, own, classes):
        return clip.class_names(task, SimpleNamespace(names=own, labels=list(range(classes))), "")

    folders = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop"]
    assert names("eurosat", [*folders, "Residential", "River", "SeaLake"], 10)[2] == "brushland or shrubland"
    assert names("gtsrb", [], 43)[14] == "stop"
    by_text = sorted(str(number) for number in range(43))  # 0, 1, 10, 11 .. as folders are listed
    assert names("gtsrb", by_text, 43)[by_text.index("14")] == "stop"
    shuffled = read_json(clip.CLASS_NAMES / "dtd.json")[::-1]
    assert names("dtd", shuffled, 47) == shuffled
    assert names("mnist", ["a", "b", "c"], 3) == ["a", "b", "c"]  # not those ten
    assert names("sun397", ["abbey", "alley"], 2) == ["abbey", "alley"]
    cars = read_json(clip.CLASS_NAMES / "stanford-cars.json")
    assert names("stanford-cars", [], 196) == cars
    own = ["RAM C-V Cargo Van Minivan, 2012", "another car"] + [
        car for car in cars if "Ram C/V" not in car and "Audi TT RS" not in car
    ]
    assert names("stanford-cars", own, 196) == [
        "Ram C/V Cargo Van Minivan 2012",
        *own[1:],
    ]  # each by its name, in its order


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_spoil_an_image_a_little_and_the_same_way_each_time(name):
    y, x = np.mgrid[0:64, 0:80]
    smooth = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), 2 * x + y], axis=-1)
    image = Image.fromarray(smooth.clip(0, 255).astype(np.uint8))
    spoiled, again = (corrupting(name, 3)(image, 5) for _ in range(2))
    assert spoiled.size == image.size and spoiled.tobytes() == again.tobytes()
    a, b = (np.asarray(one, dtype=float).ravel() for one in (image, spoiled))
    assert 0.5 < np.abs(a - b).mean() < 90
    assert np.corrcoef(a, b)[0, 1] > 0.6
    if name.endswith("noise"):
        assert corrupting(name, 3)(image, 6).tobytes() != spoiled.tobytes()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"experiment": "all"}, "no experiment 'all'"),
        ({"methods": "wemoe magic"}, "no merging method 'magic'"),
        ({"methods": "ewemoe_200"}, "should read ewemoe_90"),
        ({"prune_ratios": "0.9 1.5", "methods": "ewemoe"}, "prune_ratios has 1.5"),
        ({"CLIP_PATH": "/nowhere/clip"}, "CLIP_PATH: there is no folder"),
        ({"EXPERT_PATH": "/nowhere/*"}, "EXPERT_PATH: there is no folder '/nowhere/mnist'"),
        ({"DATASET_PATH": "/nowhere/*"}, "DATASET_PATH: there is no folder"),
        ({"experiment": "robustness", "corruptions": "rain"}, "no corruption 'rain'"),
        ({"first_layer": 9}, "first_layer is 9; .*/base has layers 0 to 1"),
        ({"first_layer": -1}, "first_layer is -1"),
        ({"adapt_steps": 0}, "adapt_steps is 0; it must be 1 or more"),
        ({"adapt_batch_size": 0}, "adapt_batch_size is 0"),
        ({"images_per_batch": 0}, "images_per_batch is 0"),
        ({"statistics_examples": 0}, "statistics_examples is 0"),
        ({"guard": "hope"}, "the guard is 'hope'"),
        ({"adapt_lr": -1}, "adapt_lr is -1.0; a rate is 0 or more"),
        ({"ties_keep": 0}, "ties_keep is 0.0; it is the share that is kept"),
        ({"dare_drop": 1}, "dare_drop is 1.0; it is the share that is dropped"),
        ({"lam": "nan"}, "lam is nan; it must be a number"),
        ({"lr": 1}, "lr has no say in this script; what has: adapt_lr and adamerging_lr"),
        (
            {"experiment": "generalization", "unseen_tasks": " ".join(TASKS)},
            "unseen_tasks leaves none of mnist, .* to merge",
        ),
        ({"tables_only": "true"}, "has no records"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, wrong, said):
    with pytest.raises(UserError, match=said) as error:
        call_main("neighbours/WEMoE_clip.py", words(place, tmp_path / "r", **wrong))
    assert "\n" not in str(error.value)
