"""Test-time adaptation: the loss, its gradients, the guard, going on; and the digits experiment at its smallest."""

import contextlib
import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call_main
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_post_hook

from expert_merging.core.errors import UserError
from expert_merging.report import folders
from expert_merging.wemoe import classification, digits, report
from expert_merging.wemoe.adaptation import adapt, batch_at, entropy, entropy_loss, neighbours_at
from expert_merging.wemoe.classification import Settings, build, merged_model, run_method, statistics_of
from expert_merging.wemoe.ffn import ensembles, routers, upscale
from expert_merging.wemoe.scoring import Task, embed


@given(st.integers(2, 50), st.integers(0, 100))
def test_entropy_of_uniform_certain_and_other_predictions(classes, seed):
    """Invariant 13, with the next."""
    logits = torch.stack([torch.zeros(classes), 1000 * torch.eye(classes)[0]])
    high, low = entropy(logits).tolist()
    assert abs(high - math.log(classes)) < 1e-4 and abs(low) < 1e-4
    logits = 3 * torch.randn(7, classes, generator=torch.Generator().manual_seed(seed))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), expected, atol=1e-4, rtol=1e-4)


def test_entropy_equals_fusion_bench():
    reference = pytest.importorskip(
        "fusion_bench.method.adamerging.entropy_loss", reason="fusion-bench is not installed"
    )
    logits = 3 * torch.randn(9, 11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(entropy_loss(logits)[0], reference.entropy_loss(logits), atol=1e-6, rtol=0)


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 5))
def test_an_epoch_of_batches_has_every_example_once(examples, size, seed):
    number = math.ceil(examples / size)
    for epoch in range(2):
        batches = [batch_at(epoch * number + i, examples, size, seed) for i in range(number)]
        assert sorted(i for batch in batches for i in batch) == list(range(examples))
        assert all(len(batch) == size for batch in batches[:-1])
    assert batch_at(3, examples, size, seed) == batch_at(3, examples, size, seed)


@pytest.fixture(scope="module")
def small():
    """(pre-trained CLIP, experts, inputs of two tasks, heads)."""
    import copy

    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=8,
    )  # fmt: skip
    base = CLIPVisionModelWithProjection(config).eval()
    experts = [copy.deepcopy(base) for _ in range(2)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return base, experts, {"a": torch.randn(40, 3, 8, 8), "b": torch.randn(40, 3, 8, 8)}, torch.randn(2, 5, 8)


def loss_of(model, inputs, heads):
    def loss(task, step):
        pixels = inputs[task][batch_at(step, 40, 8, 0)]
        return entropy_loss(model(pixel_values=pixels).image_embeds @ heads["ab".index(task)].t())

    return loss


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_adaptation_lowers_entropy_and_repeats_bit_for_bit(small):
    """Invariants 12 and 15."""
    base, experts, inputs, heads = small
    found = []
    for _ in range(2):
        model = upscale(base, experts, seed=3)
        frozen = {n: t.clone() for n, t in model.state_dict().items() if ".gate." not in n}
        record = adapt(trained(model), ["a", "b"], loss_of(model, inputs, heads), steps=40, lr=5e-2, guard="off")
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in frozen.items())
        assert all(parameter.grad is None for parameter in model.parameters())
        found.append((record["loss"], [p.clone() for p in trained(model)]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    for losses in found[0][0].values():
        assert sum(losses[-10:]) < sum(losses[:10])
    other = upscale(base, experts, seed=4)
    assert not torch.equal(trained(other)[1], trained(upscale(base, experts, seed=3))[1])


def test_gradients_task_by_task_are_those_of_the_sum(small):
    """Invariant 14."""
    base, experts, inputs, heads = small
    joint, apart = (upscale(base, experts) for _ in range(2))
    sum(loss_of(joint, inputs, heads)(task, 0)[0] for task in "ab").backward()
    grads = {}

    def keep(*_):
        grads.update({name: p.grad.clone() for name, p in apart.named_parameters() if p.requires_grad})

    hook = register_optimizer_step_post_hook(keep)
    adapt(trained(apart), ["a", "b"], loss_of(apart, inputs, heads), steps=1)
    hook.remove()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, joint.get_parameter(name).grad, atol=1e-6, rtol=1e-5)
    assert len(grads) == len(trained(joint))


def test_an_interrupted_adaptation_goes_on_as_if_it_had_not_been(small, tmp_path, monkeypatch):
    base, experts, inputs, heads = small
    monkeypatch.setattr("expert_merging.wemoe.adaptation.SAVE_EVERY", 5)
    whole = upscale(base, experts)
    expected = adapt(trained(whole), ["a", "b"], loss_of(whole, inputs, heads), steps=24, lr=1e-2, window=6)

    def stops(model):
        inner = loss_of(model, inputs, heads)

        def loss(task, step):
            if step == 13:
                raise KeyboardInterrupt
            return inner(task, step)

        return loss

    first = upscale(base, experts)
    more = {"steps": 24, "lr": 1e-2, "window": 6, "checkpoint": tmp_path / "adapting"}
    with pytest.raises(KeyboardInterrupt):
        adapt(trained(first), ["a", "b"], stops(first), **more)
    second = upscale(base, experts)
    record = adapt(trained(second), ["a", "b"], loss_of(second, inputs, heads), **more)
    assert {**record, "seconds": 0} == {**expected, "seconds": 0}
    assert all(torch.equal(a, b) for a, b in zip(trained(second), trained(whole), strict=True))
    assert not (tmp_path / "adapting").exists()


@pytest.mark.parametrize("changed", [{"lr": 1e-3}, {"steps": 30}, {"identity": {"lam": 0.9}}])
def test_an_adaptation_with_other_constants_does_not_go_on_from_it(tmp_path, monkeypatch, changed):
    monkeypatch.setattr("expert_merging.wemoe.adaptation.SAVE_EVERY", 5)
    parameter, checkpoint = torch.nn.Parameter(torch.tensor(1.0)), tmp_path / "wemoe.adapting"

    def loss(task, step):
        if step == 13:
            raise KeyboardInterrupt
        return parameter.square(), None

    settings = {"steps": 24, "lr": 1e-2, "checkpoint": checkpoint, "identity": {"lam": 0.3}}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            adapt([parameter], ["a"], loss, **settings)
    name = next(iter(changed.get("identity", changed)))
    before = checkpoint.read_bytes()
    with pytest.raises(
        UserError, match=f"wemoe.adapting was made with other constants .{name} was .*remove it"
    ) as error:
        adapt([parameter], ["a"], loss, **settings | changed)
    assert "\n" not in str(error.value) and checkpoint.read_bytes() == before


ANSWERS = 2 * torch.eye(4)


def collapsing(parameter):
    """Two tasks of four inputs: the entropy of "b" falls as the parameter leads all of them to the first answer."""

    def loss(task, step):
        lean = parameter * torch.eye(4)[0] if task == "b" else 0 * parameter
        return entropy_loss(ANSWERS + lean)

    return loss


@pytest.mark.parametrize("guard", ["warn", "rollback", "off"])
def test_the_guard_sees_a_task_collapse(guard):
    parameter = torch.nn.Parameter(torch.tensor(3.0))
    expected = contextlib.nullcontext() if guard == "off" else pytest.warns(UserWarning, match="b: by step")
    with expected:
        record = adapt([parameter], ["a", "b"], collapsing(parameter), steps=60, lr=0.1, guard=guard, window=5)
    share = entropy(((ANSWERS + parameter.detach() * torch.eye(4)[0]).softmax(-1).mean(0)).log()) / math.log(4)
    if guard == "off":
        assert record["collapsed"] == [] and record["steps_done"] == 60
        return
    assert [one["task"] for one in record["collapsed"]] == ["b"]
    of_a, of_b = record["marginal_entropy"].values()
    assert min(of_a) > 0.99 and of_b[-1] < 0.5 * of_b[0]
    if guard == "warn":
        assert record["steps_done"] == 60 and "rolled_back_to" not in record and share < 0.1
    else:
        assert 10 <= record["steps_done"] < 60 and record["rolled_back_to"] == record["steps_done"] - 5
        assert share > of_b[-1]


def test_a_guard_that_warns_changes_nothing():
    parameters = [torch.nn.Parameter(torch.tensor(3.0)) for _ in range(2)]
    adapt([parameters[0]], ["a", "b"], collapsing(parameters[0]), 60, 0.1, "off", window=5)
    with pytest.warns(UserWarning, match="b: by step"):
        adapt([parameters[1]], ["a", "b"], collapsing(parameters[1]), 60, 0.1, "warn", window=5)
    assert torch.equal(*parameters)


def test_a_higher_floor_lets_the_guard_see_it_earlier():
    found = {}
    for floor in (0.5, 0.9):
        parameter = torch.nn.Parameter(torch.tensor(3.0))
        with pytest.warns(UserWarning, match="b: by step"):
            record = adapt([parameter], ["b"], collapsing(parameter), 60, 0.1, "rollback", floor, window=5)
        found[floor] = record["rolled_back_to"], parameter.item()
    assert found[0.9][0] < found[0.5][0] and 3 <= found[0.9][1] < found[0.5][1]


def test_bad_adaptations_are_refused():
    parameter = torch.nn.Parameter(torch.tensor(0.0))
    with pytest.raises(UserError, match="floor is 50"):
        adapt([parameter], ["a"], lambda task, step: (parameter, None), floor=50)
    with pytest.raises(UserError, match="the guard is"):
        adapt([parameter], ["a"], lambda task, step: (parameter, None), guard="hope")
    with pytest.raises(ValueError, match="no parameter"):
        adapt([], ["a"], lambda task, step: (parameter, None))
    with pytest.raises(UserError, match="loss of a is nan at step 0; lower the rate"):
        adapt([parameter], ["a"], lambda task, step: (parameter * float("nan"), None))


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 3))
def test_batches_of_neighbours_are_an_epoch_of_runs(examples, size, seed):
    steps = -(-examples // size)
    for epoch in range(2):
        batches = [neighbours_at(epoch * steps + step, examples, size, seed) for step in range(steps)]
        assert sorted(i for batch in batches for i in batch) == list(range(examples))
        assert all(batch == list(range(batch[0], batch[-1] + 1)) and len(batch) <= size for batch in batches)
        assert batches == [neighbours_at(epoch * steps + step, examples, size, seed) for step in range(steps)]


# -- digits

SMALLEST = [
    "--device", "cpu", "--seeds", "0", "--pretrain_steps", "8", "--finetune_steps", "3", "--adapt_steps", "4",
    "--adapt_batch_size", "8", "--images_per_task", "40",
]  # fmt: skip


def test_digits_at_its_smallest(tmp_path):
    methods = "pretrained individual average iso_c tsv_m adamerging_layer wemoe wemoe_batch ewemoe_90".split()
    words = [*SMALLEST, "--WEMOE_DIR", str(tmp_path / "digits"), "--methods", *methods]
    call_main("neighbours/WEMoE_digits.py", words)
    records = report.read(tmp_path / "digits")
    assert sorted(records) == sorted(methods) and list(records)[2:5] == ["average", "iso_c", "tsv_m"]
    for of_method in records.values():
        record = of_method["seed0"]
        tasks = report.tasks_of(records)
        mean = sum(record[task]["accuracy"] for task in tasks) / 4
        assert record["average_accuracy"] == pytest.approx(mean) and len(tasks) == 4
        assert record["versions"]["torch"] and record["seed"] == 0 and record["identity"]["adapt_steps"] == 4
        assert all(0 <= record[task]["accuracy"] <= 1 and record[task]["loss"] > 0 for task in tasks)
    wemoe, pruned, batch = (records[name]["seed0"] for name in ("wemoe", "ewemoe_90", "wemoe_batch"))
    # Four layers, four task vectors; routed sample by sample, so that it does not matter how batches are mixed.
    assert [len(w) for of_task in wemoe["routing_weights"].values() for w in of_task.values()] == [4] * 16
    assert wemoe["mixed"]["average_accuracy"] == pytest.approx(wemoe["average_accuracy"], abs=0.013)
    assert "sample_wise" in batch and "sample_wise" not in wemoe
    info = wemoe["model_info"]
    assert info["trainable_params"] == 4 * (48 * 48 + 48 + 48 * 4 + 4) == 4 * pruned["model_info"]["trainable_params"]
    assert info["all_params"] == 78240 + info["trainable_params"] + 4 * 4 * (2 * 48 * 96 + 48 + 96)
    assert pruned["model_info"]["bytes"] < 0.6 * info["bytes"]
    assert wemoe["adaptation"]["steps_done"] == 4 and wemoe["seconds"].keys() == {"merge", "adapt", "evaluate"}
    figures = {path.name for path in (tmp_path / "digits" / "figures").iterdir()}
    assert {"accuracy.png", "routing_wemoe.png", "adaptation_wemoe.png"} <= figures
    with (tmp_path / "digits" / "tables" / "accuracy.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["wemoe"]["average"]) == pytest.approx(100 * wemoe["average_accuracy"])

    # Again: nothing to do, and records are not touched; the tables follow from them.
    path = tmp_path / "digits" / "records" / "seed0" / "wemoe.json"
    before = path.read_bytes()
    table = (tmp_path / "digits" / "tables" / "accuracy.md").read_text()
    call_main("neighbours/WEMoE_digits.py", [*words, "--tables_only"])
    call_main("neighbours/WEMoE_digits.py", words)
    assert path.read_bytes() == before
    assert (tmp_path / "digits" / "tables" / "accuracy.md").read_text() == table

    # And from nothing, the same numbers.
    words[words.index("--WEMOE_DIR") + 1] = str(tmp_path / "again")
    call_main("neighbours/WEMoE_digits.py", [*words[: words.index("--methods") + 1], "wemoe"])
    again = json.loads((tmp_path / "again" / "records" / "seed0" / "wemoe.json").read_text())
    for key in ("plain", "permuted", "routing_weights", "mixed"):
        assert again[key] == wemoe[key]


def test_digits_of_other_constants_stand_in_no_table_together(tmp_path):
    folder = tmp_path / "digits"
    words = [*SMALLEST, "--WEMOE_DIR", str(folder), "--methods"]
    call_main("neighbours/WEMoE_digits.py", [*words, "task_arithmetic", "average"])
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    for methods in (["task_arithmetic"], ["wemoe"]):  # one that is there, and one that is not
        with pytest.raises(UserError, match="lam was 0.3, is now 0.9.*choose another WEMOE_DIR") as error:
            call_main("neighbours/WEMoE_digits.py", [*words, *methods, "--lam", "0.9"])
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="ties_keep was None, is now 0.5.*choose another WEMOE_DIR"):
            call_main("neighbours/WEMoE_digits.py", [*words, *methods, "--ties_keep", "0.5"])
    with pytest.raises(UserError, match="ties_keep is 0.0; it is the share that is kept"):
        wrong = ["--ties_keep", "0.0", "--WEMOE_DIR", str(tmp_path / "other")]
        call_main("neighbours/WEMoE_digits.py", [*words, "ties_sum", *wrong])
    assert before == {path: path.read_bytes() for path in folder.rglob("*.json")}
    assert [path.name for path in (folder / "pools").glob("base*")] == ["base_seed0_500_8_3_0.001.safetensors"]


def test_a_record_that_notes_its_constants_as_they_once_stood_is_taken_up(tmp_path):
    words = [*SMALLEST, "--WEMOE_DIR", str(tmp_path), "--methods", "average"]
    call_main("neighbours/WEMoE_digits.py", words)
    path = tmp_path / "records" / "seed0" / "average.json"
    record = json.loads(path.read_text())
    record["constants"] = record.pop("identity")
    path.write_text(json.dumps(record))
    before = path.read_bytes()
    call_main("neighbours/WEMoE_digits.py", words)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--adapt_steps", "0"], "adapt_steps is 0; it must be 1 or more"),
        (["--adapt_batch_size", "0"], "adapt_batch_size is 0"),
        (["--pretrain_examples", "5000"], "pretrain_examples is 5000; give 1 to 1200"),
        (["--pretrain_examples", "1201"], "give 1 to 1200: the other 597 of the 1797 images are the test's"),
        (["--pretrain_examples", "1797"], "pretrain_examples is 1797; give 1 to 1200"),
        (["--pretrain_examples", "0"], "pretrain_examples is 0"),
        (["--guard", "hope"], "the guard is 'hope'"),
        (["--guard_floor", "50"], "floor is 50"),
        (["--images_per_task", "-1"], "images_per_task is -1"),
        (["--tables_only"], "has no records"),
    ],
)
def test_mistakes_about_digits_are_one_line(tmp_path, wrong, said):
    with pytest.raises(UserError, match=said) as error:
        call_main("neighbours/WEMoE_digits.py", [*SMALLEST, "--WEMOE_DIR", str(tmp_path / "digits"), *wrong])
    assert "\n" not in str(error.value) and not (tmp_path / "digits").exists()


def test_the_most_that_training_may_be_given_holds_no_test_image():
    """1200 images, which are those before the test's first."""
    everything = SMALLEST[SMALLEST.index("--pretrain_steps") :]
    c = SimpleNamespace(**{name[2:]: 1 for name in everything[::2]}, seeds=(0,), guard="warn", guard_floor=0.5)
    c.statistics_examples, c.images_per_task = 1, 0
    for c.pretrain_examples in (1, digits.TRAIN):
        digits.check_constants(c)
    pixels, _ = digits.images()
    tested = digits.test_tasks(0)[0]
    assert len(pixels) == digits.IMAGES and len(tested.labels) == digits.IMAGES - digits.TRAIN
    torch.testing.assert_close(tested.inputs([0]), pixels[digits.TRAIN :][:1])


@pytest.fixture(scope="module")
def trained_digits(tmp_path_factory):
    """(pre-trained, {task: tensors of the fine-tuned model}, tasks) of models that can do something."""
    base, experts = digits.pool(0, 500, 200, 10, 1e-3, tmp_path_factory.mktemp("pools"))
    return base, experts, digits.test_tasks(0)


@pytest.mark.parametrize("method", ["wemoe", "wemoe_batch", "ewemoe_0"])
def test_before_adapting_accuracy_is_that_of_task_arithmetic(trained_digits, method):
    """Invariant 4: within 0.2 points, that is 4 of the 2388 test images."""
    base, experts, tasks = trained_digits
    accuracy = {}
    for name in ("task_arithmetic", method):
        settings = classification.Settings(logit_scale=digits.LOGIT_SCALE, seed=1)
        model = classification.build(name, base, list(experts.values()), settings).eval()
        found = classification.evaluate(model, tasks, settings)
        accuracy[name] = 25 * sum(found[task.name]["accuracy"] for task in tasks)
    assert accuracy["task_arithmetic"] > 40
    assert abs(accuracy[method] - accuracy["task_arithmetic"]) <= 0.2


def test_what_adapts_constants_learns_at_their_rate(trained_digits):
    """A router of depth 0 is constants; at the rate of routers 50 steps would move them by 0.005."""
    base, experts, tasks = trained_digits
    s = Settings(steps=1, adapt_batch_size=2, logit_scale=digits.LOGIT_SCALE, mixed=False, lr=1e-4, adamerging_lr=1e-2)
    for method, lr in (
        ("wemoe_depth0", 1e-2),
        ("ewemoe_90_depth0_batch", 1e-2),
        ("adamerging_task", 1e-2),
        ("wemoe", 1e-4),
    ):
        assert merged_model(method, base, experts, tasks, s)[1]["adaptation"]["lr"] == lr, method


def test_adamerging_plus_keeps_what_the_constant_says(trained_digits):
    base, experts, _ = trained_digits
    shares = {}
    for keep in (0.2, 0.5):
        s = Settings(constants={**Settings().constants, "ties_keep": keep})
        model = build("adamerging_layer++", base, list(experts.values()), s)
        vectors = [getattr(model, f"vectors_{i}") for i in range(len(model.names))]
        shares[keep] = sum((v != 0).sum().item() for v in vectors) / sum(v.numel() for v in vectors)
        assert 0.4 * keep < shares[keep] <= 1.001 * keep  # what is against the elected sign is gone, too
    assert shares[0.5] > 1.5 * shares[0.2]


def test_fisher_and_regmean_look_at_each_experts_own_images_and_at_no_label(trained_digits):
    base, experts, tasks = trained_digits
    s = Settings(eval_batch_size=8, logit_scale=digits.LOGIT_SCALE, statistics_examples=12)
    unlabelled = [Task(task.name, [0] * len(task.labels), task.head, task.inputs) for task in tasks]
    order = torch.randperm(597, generator=torch.Generator().manual_seed(0))[:12].tolist()
    layer = "vision_model.encoder.layers.0.mlp.fc1"

    # Gram matrices: of what enters the layer of the second expert, over its images' tokens.
    grams = statistics_of("grams", base, experts, unlabelled, s)[1]
    model = digits.new_model(0)
    model.load_state_dict(experts["rotated"])
    seen = []
    model.get_submodule(layer).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, -2)))
    pixels = next(task for task in tasks if task.name == "rotated").inputs(order)
    logits = s.logit_scale * embed(model, pixels) @ tasks[1].head.t()
    expected = seen[0].T @ seen[0] / len(seen[0])
    torch.testing.assert_close(grams[layer], expected, atol=1e-4, rtol=1e-4)

    # Fisher: the squares of each image's gradient, averaged.
    information = statistics_of("information", base, experts, unlabelled, s)[1]
    weight, squares = model.get_parameter(f"{layer}.weight"), 0
    for row in logits.log_softmax(dim=-1):
        loss = (row.detach().exp().sqrt() * row).sum()
        squares = squares + torch.autograd.grad(loss, weight, retain_graph=True)[0].square() / 12
    torch.testing.assert_close(information[f"{layer}.weight"], squares, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_what_is_merged_with_statistics_is_not_the_average(trained_digits, method):
    """And experts that are all the same are merged into that one."""
    base, experts, tasks = trained_digits
    s = Settings(eval_batch_size=64, logit_scale=digits.LOGIT_SCALE, statistics_examples=20)
    average, merged = (run_method(name, base, experts, tasks[:4], tasks, s)[1] for name in ("average", method))
    layer = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert (merged.get_parameter(layer) - average.get_parameter(layer)).abs().max() > 1e-5
    same = dict.fromkeys(experts, experts["plain"])
    merged = run_method(method, base, same, tasks[:1], tasks, s)[1]
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, experts["plain"][name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--methods", "wemoe", "ewemo"], "no merging method 'ewemo'"),
        (["--methods", "ewemoe_101"], "ewemoe_90"),
        (["--methods", "ewemoe", "--prune_ratios", "0.9", "90"], "prune_ratios has 90; it is the share"),
    ],
)
def test_an_unknown_method_is_one_line(wrong, said):
    with pytest.raises(UserError, match=said) as error:
        call_main("neighbours/WEMoE_digits.py", [*SMALLEST, *wrong])
    assert "\n" not in str(error.value)


def test_an_ewemoe_that_names_no_percent_stands_for_one_at_each_ratio():
    methods = ("average", "ewemoe", "wemoe", "ewemoe_90", "ewemoe_depth1_batch")
    expected = ("average", "ewemoe_90", "ewemoe_99.9", "wemoe", "ewemoe_90_depth1_batch", "ewemoe_99.9_depth1_batch")
    assert classification.expanded(methods, (0.9, 0.999)) == expected
    assert classification.sweep_of(expected) == {
        "": {"ewemoe_90": 90.0, "ewemoe_99.9": 99.9},
        "_depth1_batch": {"ewemoe_90_depth1_batch": 90.0, "ewemoe_99.9_depth1_batch": 99.9},
    }


def test_a_sweep_over_prune_ratios_is_one_command_with_its_figure(tmp_path):
    words = [*SMALLEST, "--WEMOE_DIR", str(tmp_path), "--methods", "task_arithmetic", "ewemoe"]
    call_main("neighbours/WEMoE_digits.py", [*words, "--prune_ratios", "0.9", "0.5"])
    assert not (tmp_path / "figures" / "pruning.png").exists()  # two points are no curve
    call_main("neighbours/WEMoE_digits.py", [*words, "--prune_ratios", "0.29", "0.5", "0.9"])
    records = report.read(tmp_path)
    percents = {name: records[name]["seed0"]["model_info"]["effective_params"] for name in records if "ewemoe" in name}
    assert sorted(percents, key=percents.get) == ["ewemoe_90", "ewemoe_50", "ewemoe_29"]
    assert (tmp_path / "figures" / "pruning.png").stat().st_size > 10_000


def test_committed_tables_follow_from_their_records():
    places = [path.parent for path in (ROOT / "results" / "wemoe").glob("**/seed0.json")]
    if not places:
        pytest.skip("no results of WEMoE are committed")
    for folder in places:
        assert folders.check(folder, report.WING) == []


def test_what_the_page_says_of_digits_holds_in_the_committed_records():
    folder = ROOT / "results" / "wemoe" / "digits"
    if not folder.is_dir():
        pytest.skip("the results of the digits experiment are not committed")
    records = report.read(folder)
    seeds = sorted(records["wemoe"])
    assert len(seeds) == 3

    def mean(method: str, *path: str) -> float:
        total = 0.0
        for seed in seeds:
            found = records[method][seed]
            for key in path:
                found = found[key]
            total += 100 * found["average_accuracy"] / len(seeds)
        return total

    arithmetic, batch = mean("task_arithmetic"), mean("wemoe_batch")
    assert mean("wemoe") >= arithmetic + 2
    assert mean("ewemoe_90") >= max(arithmetic, mean("ewemoe_100")) + 1
    assert abs(mean("wemoe_batch", "mixed") - arithmetic) <= 1.5
    assert batch - mean("wemoe_batch", "mixed") >= 3
    for method in ("wemoe", "wemoe_batch", "ewemoe_90"):
        for seed in seeds:
            losses = [sum(step) for step in zip(*records[method][seed]["adaptation"]["loss"].values(), strict=True)]
            assert sum(losses[-20:]) < sum(losses[:20])


def test_what_the_page_says_of_weak_pretraining_holds_in_the_committed_records():
    place = ROOT / "results" / "wemoe" / "digits_weak"
    if not place.is_dir():
        pytest.skip("the results after weak pre-training are not committed")
    warn, *others = (report.read(place / name) for name in ("warn", "rollback", "rollback_0.9"))
    seeds, tasks = sorted(warn["wemoe"]), report.tasks_of(warn)
    assert len(seeds) == 6

    def changes(records, method) -> list[list[float]]:
        """Of each seed, each task's points over task arithmetic."""
        arithmetic = warn["task_arithmetic"]
        return [
            [100 * (records[method][s][task]["accuracy"] - arithmetic[s][task]["accuracy"]) for task in tasks]
            for s in seeds
        ]

    worst, lost, stopped = [], [], []
    for records in (warn, *others):
        both = [changes(records, method) for method in ("wemoe", "ewemoe_90")]
        worst.append([round(sum(map(min, one)) / 6, 1) for one in both])
        lost.append(sum(change < -2 for one in both for seed in one for change in seed))
        runs = [records[method][s]["adaptation"] for method in ("wemoe", "ewemoe_90") for s in seeds]
        stopped.append(sum("rolled_back_to" in run for run in runs))
    assert worst[0] == [-13.3, -10.9] and worst[2] == [-6.9, -6.7]
    assert lost[0] == 15 and lost[2] == 16 and stopped == [0, 1, 7]
    means = [
        [100 * sum(r[m][s]["average_accuracy"] for s in seeds) / 6 for m in ("wemoe", "ewemoe_90")]
        for r in (warn, others[1])
    ]
    assert [[round(mean, 1) for mean in one] for one in means] == [[68.5, 66.8], [68.2, 66.9]]


def test_routing_of_a_fresh_model_counts_what_it_holds(small):
    base, experts, _, _ = small
    model = upscale(base, experts, share_router=True)
    assert len(routers(model)) == 1 and len(list(ensembles(model))) == 2
