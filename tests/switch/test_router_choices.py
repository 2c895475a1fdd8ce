"""A merged model's routers are fitted to what its sources choose: against a plain reading, one example at a time."""

import copy
import functools
from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny_models import tiny_switch

from expert_merging.merging.average import average
from expert_merging.merging.pooled import layers_of
from expert_merging.merging.router_calibration import calibrated, slots_of_average
from expert_merging.switch import router_choices

C = SimpleNamespace(eval_batch_size=2, max_decoder_length=6)
TOKENIZER = SimpleNamespace(pad_token_id=0)
EOS, EXPERTS, RIDGE = 1, 3, 1e-3
FIT = functools.partial(calibrated, ridge=RIDGE)
CPU = torch.device("cpu")


def inputs(seed, sizes):
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 40, (size,), generator=random).tolist() + [EOS] for size in sizes]
    return datasets.Dataset.from_dict({"input_ids": rows})


@pytest.fixture(scope="module")
def case():
    """(sources, inputs of their tasks, their average, {layer: slots})."""
    sources = [tiny_switch(seed, EXPERTS) for seed in (0, 1)]
    merged = copy.deepcopy(sources[0])
    merged.load_state_dict(average([source.state_dict() for source in sources]))
    slots = dict.fromkeys(layers_of(merged.state_dict()), slots_of_average(2, EXPERTS))
    return sources, [inputs(0, (3, 7, 5)), inputs(1, (6, 4))], merged, slots


def calibrate(case):
    sources, rows, merged, slots = case
    model = copy.deepcopy(merged)
    found = router_choices.calibrate(model, FIT, [lambda s=s: s for s in sources], rows, slots, TOKENIZER, C, CPU)
    return model, found


@torch.no_grad()
def seen(model, rows, writer):
    """{layer: (states, gates)} of the tokens of each example and of what `writer` answers, without padding."""
    model, found = copy.deepcopy(model), {layer: ([], []) for layer in layers_of(model.state_dict())}

    def note(_, given, made, layer):
        found[layer][0].append(given[0][0].double())
        found[layer][1].append(made[2][0].double().softmax(-1))

    for layer in found:
        model.get_submodule(f"{layer}.router").register_forward_hook(functools.partial(note, layer=layer))
    for ids in rows["input_ids"]:
        given = torch.tensor([ids])
        written = writer.generate(given, max_length=C.max_decoder_length, num_beams=1, do_sample=False)[0, :-1].tolist()
        written = written[: written.index(EOS)] if EOS in written else written
        model(input_ids=given, decoder_input_ids=torch.tensor([written]), use_cache=False)
    return {layer: tuple(map(torch.cat, parts)) for layer, parts in found.items()}


def test_every_router_is_the_best_one_for_the_model_that_comes_out(case):
    """At the end no router can be moved to lessen its loss, given the states that the finished model itself makes: layers
    were fitted in order, to real tokens only, with sources counting alike."""
    sources, rows, merged, slots = case
    model, found = calibrate(case)
    assert list(found) == [f"{stack}.mlp" for stack in (
        "encoder.block.1.layer.1", "encoder.block.3.layer.1", "decoder.block.1.layer.2", "decoder.block.3.layer.2"
    )]  # fmt: skip
    choices = [seen(source, of, source) for source, of in zip(sources, rows, strict=True)]
    states = [seen(model, of, source) for source, of in zip(sources, rows, strict=True)]
    for layer in slots:
        name = f"{layer}.router.classifier.weight"
        now, was = model.state_dict()[name].double(), merged.state_dict()[name].double()

        def slope(router, layer=layer, was=was):
            total, square = torch.zeros_like(router), 0.0
            for one, other in zip(states, choices, strict=True):
                h, q = one[layer][0], other[layer][1]
                total += ((h @ router.T).softmax(-1) - q).T @ h / (2 * len(h))
                square += h.square().mean() / 2
            return (total + RIDGE * square * (router - was)).norm().item()

        assert slope(now) < 2e-3 * slope(was)
        assert found[layer].divergence[1] < found[layer].divergence[0] and found[layer].kept == pytest.approx(1)


def test_only_routers_change_and_bits_repeat(case):
    (first, one), (second, other) = calibrate(case), calibrate(case)
    merged = case[2].state_dict()
    changed = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, merged[name])}
    assert changed == {f"{layer}.router.classifier.weight" for layer in case[3]} and one == other
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_sources_that_are_the_merged_model_leave_it_alone(case):
    source, rows = case[0][0], case[1]
    model, found = calibrate(([source, source], rows, source, case[3]))
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, source.state_dict()[name], atol=1e-4), name
    assert all(near.agreement == pytest.approx((1, 1)) for near in found.values())


def test_layers_come_in_the_order_of_their_depth():
    """Files name them by the alphabet."""
    names = [f"{stack}.block.{block}.layer.1.mlp" for stack in ("decoder", "encoder") for block in (1, 11, 3)]
    ordered = [f"{stack}.block.{block}.layer.1.mlp" for stack in ("encoder", "decoder") for block in (1, 3, 11)]
    assert router_choices.by_depth(names) == ordered
