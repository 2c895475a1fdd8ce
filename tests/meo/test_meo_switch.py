"""A Switch with merged experts: what must be equal, what alignment recovers, the dense folder, the script."""

import json
import shutil

import pytest
import torch
from conftest import call_main, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5ForConditionalGeneration,
)

from expert_merging.core.errors import UserError
from expert_merging.core.files import write_json
from expert_merging.meo import report, switch


def new_switch(experts=4, same=False, flat_router=False, **changed):
    """Random weights; `same`: all experts of a layer equal; `flat_router`: every probability 1/n."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2, num_experts=experts,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, **changed,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).eval()
    with torch.no_grad():
        for layer in switch.sparse_layers(model).values():
            if flat_router:
                layer.router.classifier.weight.zero_()
            for expert in layer.experts.values():
                if same:
                    expert.load_state_dict(layer.experts["expert_0"].state_dict())
    return model


def batch_of(lengths=(9, 5, 7), targets=(4, 2, 3), seed=1):
    generator = torch.Generator().manual_seed(seed)

    def padded(sizes, value):
        rows = [torch.randint(2, 50, (size,), generator=generator) for size in sizes]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    mask = torch.tensor([[1] * size + [0] * (max(lengths) - size) for size in lengths])
    return {"input_ids": padded(lengths, 0), "attention_mask": mask, "labels": padded(targets, -100)}


def logits(model, batch):
    return switch.teacher_forced(model, batch).logits[batch["labels"] != -100]


def written(model, batch, **more):
    return model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, num_beams=3, **more
    )


def ways(model, k, aligned=True):
    """(name, context) of A with the router, B, C."""
    uses = switch.measure_use(model, [batch_of()])
    at = {name: use.favourite for name, use in uses.items()} if aligned else None
    gates = {name: use.gates("probability", k) for name, use in uses.items()}
    yield "A", switch.merged_experts(model, k, gates, at)
    yield "B", switch.merged_experts(model, k, None, at)
    yield "C", switch.merged_experts(model, 1, None, at)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_identical_experts_give_the_switch(k):
    model, batch = new_switch(same=True), batch_of()
    before, text = logits(model, batch), written(model, batch)
    for name, context in ways(model, k):
        with context:
            assert torch.allclose(logits(model, batch), before, atol=1e-5), name
            assert torch.equal(written(model, batch), text), name
    assert torch.equal(logits(model, batch), before)  # and the model is itself again


def test_different_experts_do_not():
    model, batch = new_switch(), batch_of()
    before = logits(model, batch)
    for name, context in ways(model, 4):
        with context:
            assert (logits(model, batch) - before).norm() > 0.01 * before.norm(), name


@pytest.mark.parametrize(
    ("k", "gate", "aligned"), [(1, "usage", False), (2, "probability", True), (4, "uniform", True)]
)
def test_dense_folder_is_a_stock_t5_and_equal(tmp_path, k, gate, aligned):
    model, batch = new_switch(same=True, flat_router=True), batch_of()
    uses = switch.measure_use(model, [batch])
    dense = switch.as_t5(model, switch.dense_weights(model, uses, k, gate, aligned))
    dense.save_pretrained(tmp_path)
    loaded, about = T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__module__ == "transformers.models.t5.modeling_t5"
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(logits(loaded, batch), logits(model, batch), atol=1e-5)
    assert torch.equal(written(loaded, batch), written(model, batch))
    for part in (loaded.encoder, loaded.decoder):
        assert len(part.block) == 2
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "t5"
    experts = sum(p.numel() for layer in switch.sparse_layers(model).values() for p in layer.experts.parameters())
    routers = sum(p.numel() for layer in switch.sparse_layers(model).values() for p in layer.router.parameters())
    assert loaded.num_parameters() == model.num_parameters() - experts * 3 // 4 - routers


def test_k_1_takes_the_most_used_expert_itself():
    model = new_switch()
    uses = switch.measure_use(model, [batch_of()])
    for name, (wi, wo) in switch.dense_weights(model, uses, 1).items():
        expert = switch.sparse_layers(model)[name].experts[f"expert_{uses[name].favourite}"]
        assert torch.equal(wi, expert.wi.weight)
        assert torch.allclose(wo, expert.wo.weight * uses[name].scale)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(0, 4))
def test_alignment_undoes_permutations(seed, n, reference):
    generator, reference = torch.Generator().manual_seed(seed), reference % n
    wi, wo = (torch.randn(1, *shape, generator=generator).repeat(n, 1, 1) for shape in ((12, 5), (5, 12)))
    for expert in range(n):
        order = torch.randperm(12, generator=generator)
        wi[expert], wo[expert] = wi[expert][order], wo[expert][:, order]
    aligned_wi, aligned_wo = switch.align(wi, wo, reference)
    for expert in range(n):
        assert torch.equal(aligned_wi[expert], wi[reference]) and torch.equal(aligned_wo[expert], wo[reference])


def test_alignment_leaves_functions_and_brings_weights_nearer():
    generator = torch.Generator().manual_seed(0)
    wi, wo = torch.randn(3, 24, 8, generator=generator), torch.randn(3, 8, 24, generator=generator)
    x = torch.randn(10, 8, generator=generator)
    aligned_wi, aligned_wo = switch.align(wi, wo, 1)
    for old, new in (((wi, wo), (aligned_wi, aligned_wo)),):
        made = [torch.relu(x @ i.mT) @ o.mT for i, o in (old, new)]
        assert torch.allclose(*made, atol=1e-4)
    for expert in (0, 2):
        near = (aligned_wi[expert] * aligned_wi[1]).sum() + (aligned_wo[expert] * aligned_wo[1]).sum()
        assert near > (wi[expert] * wi[1]).sum() + (wo[expert] * wo[1]).sum() + 1


def test_use_is_the_routers_and_blind_to_padding():
    model, batch = new_switch(), batch_of()
    model.set_usage_counting("paper")
    uses = switch.measure_use(model, [batch])
    ones = [{key: rows[i : i + 1] for key, rows in batch.items()} for i in range(3)]
    for one, length, target in zip(ones, (9, 5, 7), (4, 2, 3), strict=True):
        one["input_ids"], one["attention_mask"] = one["input_ids"][:, :length], one["attention_mask"][:, :length]
        one["labels"] = one["labels"][:, :target]
    alone = switch.measure_use(model, ones)
    model.reset_expert_usage()
    model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    counts = [count for stack in model.expert_usage().values() for count in stack]
    for (name, use), count in zip(uses.items(), counts, strict=True):
        assert torch.allclose(use.probability, alone[name].probability, atol=1e-6)
        assert use.scale == pytest.approx(alone[name].scale, abs=1e-6)
        assert use.probability.sum() == pytest.approx(1) and 0.25 <= use.scale <= 1
        assert torch.allclose(use.usage, count / count.sum().double())
        for kind in switch.GATES:
            gates = use.gates(kind, 2)
            assert gates.count_nonzero() == 2 and gates.sum() == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 2])
def test_sequences_do_not_see_each_other_nor_the_future(k):
    model, batch = new_switch(), batch_of()
    with switch.merged_experts(model, k):
        together = switch.teacher_forced(model, batch).logits
        alone = switch.teacher_forced(model, {
            "input_ids": batch["input_ids"][1:2, :5], "attention_mask": batch["attention_mask"][1:2, :5],
            "labels": batch["labels"][1:2, :2],
        }).logits  # fmt: skip
        assert torch.allclose(together[1, :2], alone[0], atol=1e-5)
        changed = {**batch, "labels": batch["labels"].clone()}
        changed["labels"][0, 2] = 7
        later = switch.teacher_forced(model, changed).logits
        assert torch.allclose(later[0, :3], together[0, :3], atol=1e-6)
        assert not torch.allclose(later[0, 3], together[0, 3], atol=1e-6)
        # A token at a time, with kept keys and merged weights, as all at once.
        texts = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=5)
        kept = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=5, use_cache=False
        )
        assert torch.equal(texts, kept)


def test_refit_brings_layers_nearer_and_leaves_what_is_exact():
    from expert_merging.meo.fidelity import Reference

    model = new_switch()
    batches = [batch_of(seed=seed) for seed in range(12)]
    uses = switch.measure_use(model, batches)
    merged = switch.dense_weights(model, uses, 4)
    fitted = switch.refit(model, merged, batches)

    reference = Reference.__new__(Reference)
    reference.model, reference.batches, reference.states = model, batches, {}
    for name, layer in switch.sparse_layers(model).items():
        kept = reference.states.setdefault(name, [])
        layer.register_forward_hook(lambda _, x, y, kept=kept: kept.append((x[0].clone(), y[0].clone())))
    reference.logits, reference.targets = reference._answers(model)
    errors = [reference.compare(switch.as_t5(model, weights))["layers"] for weights in (merged, fitted)]
    for name in merged:
        assert errors[1][name] < 0.95 * errors[0][name]
        assert torch.equal(fitted[name][0], merged[name][0])

    exact = new_switch(same=True, flat_router=True)
    weights = switch.dense_weights(exact, switch.measure_use(exact, batches), 2)
    for name, (_, wo) in switch.refit(exact, weights, batches).items():
        assert torch.allclose(wo, weights[name][1], atol=1e-5)


def test_embeddings_of_their_own_are_refused():
    model = new_switch(tie_word_embeddings=False)
    uses = switch.measure_use(model, [batch_of()])
    with pytest.raises(UserError, match="T5 has one"):
        switch.as_t5(model, switch.dense_weights(model, uses, 1))


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """Features of one task and a finished model with 4 experts; returns the words that name them."""
    folder = tmp_path_factory.mktemp("densify")
    words = world.words(folder, task_types="ag_news", train_examples=12, eval_batch_size=4)
    call_main("datasets_preprocessing.py", [*words, "--num_expert", "4"])
    shutil.copytree(world.folder / "base-4", folder / "seed0" / "models" / "Any_[4]")
    more = "--source Any_[4] --densify ag_news --k 2 --ks 1 2 --compare_examples 4 --latency_runs 1 --latency_batches 1"
    return folder, [*words, *more.split()]


def test_script_writes_a_dense_folder_and_its_fidelity(place):
    folder, words = place
    result = run_script("neighbours/MEO_densify.py", words)
    assert result.returncode == 0, result.stderr
    dense = T5ForConditionalGeneration.from_pretrained(folder / "seed0/models/Any_[4]_ag_news")
    assert f"{dense.num_parameters():,} parameters" in result.stdout
    record = json.loads((folder / "seed0/histories/densify/Any_[4]_ag_news.json").read_text())
    found = record["variants"]
    assert {"no layer", "A k=1", "C k=1", "A k=2, aligned, refitted", "B k=2, aligned"} <= found.keys()
    assert all(error == pytest.approx(1) for error in found["no layer"]["layers"].values())
    for name in ("A k=1", "A k=2, aligned"):  # on so few tokens the fit is not tested on others
        assert 0 < found[name]["logits"] < 2 and 0 <= found[name]["agreement"] <= 1
    assert record["sizes"]["dense"]["parameters"] == dense.num_parameters() < record["sizes"]["Switch"]["parameters"]
    assert record["latency"]["dense"]["1"]["seconds"] > 0
    call_main("neighbours/MEO_densify.py", words)  # is there already


def test_one_table_and_figure_whatever_ks_were_asked_for(place, tmp_path):
    """ks 1 2 of 4 experts: all four, uniformly weighted, is a variant too, and has no line of its own."""
    folder, _ = place
    groups = report.collect(folder)["densify"]
    assert "densify" in report.draw(groups, tmp_path) and (tmp_path / "densify.png").exists()
    record = next(iter(groups["seed0"].values()))
    other = {**record, "identity": record["identity"] | {"source": "Other_[4]"}}
    write_json(folder / "seed0" / "histories" / "densify" / "Other_[4]_ag_news.json", other)
    try:
        with pytest.raises(UserError, match=r"was made with source Other_\[4\].* one table would show both"):
            report.collect(folder)
    finally:
        (folder / "seed0" / "histories" / "densify" / "Other_[4]_ag_news.json").unlink()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--densify", "poems"), "no task 'poems'"),
        (("--source", "CAEM_[9|9]"), "run CAEM_multi_task_finetune.py"),
        (("--k", "5"), "k is 5; Any_[4] has 4 experts"),
        (("--ks", "1", "9"), "ks is 9"),
        (("--gate", "loud"), "gate is 'loud'"),
        (("--ridge", "0"), "ridge is 0.0"),
        (("--calibration_examples", "0"), "calibration_examples is 0"),
    ],
)
def test_script_says_what_is_wrong(place, more, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[").replace("]", r"\]")) as error:
        call_main("neighbours/MEO_densify.py", [*place[1], *more])
    assert "\n" not in str(error.value)
