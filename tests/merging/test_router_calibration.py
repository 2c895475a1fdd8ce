"""Routers fitted to the sources' choices: cases worked by hand, the slots' origins, properties of the fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.switch_transformers.caem import merge

from expert_merging.merging import router_calibration
from expert_merging.merging.registry import CALIBRATIONS
from expert_merging.merging.router_calibration import calibrated, slots_of_average, slots_of_chosen, targets

LAYER = "encoder.block.1.layer.1.mlp"


def random_case(seed, tokens=60, size=5, slots=3):
    random = torch.Generator().manual_seed(seed)
    states, router = (torch.randn(shape, generator=random) for shape in ((tokens, size), (slots, size)))
    wanted = torch.randn(tokens, slots, generator=random).softmax(-1) * torch.rand(tokens, 1, generator=random)
    return states, wanted, torch.rand(tokens, generator=random), router


def loss(states, wanted, weights, router, change, ridge):
    """The docstring's sum, token by token."""
    apart = sum(
        a * q.sum() * torch.nn.functional.kl_div(((router + change) @ h).log_softmax(-1), q / q.sum(), reduction="sum")
        for h, q, a in zip(states, wanted, weights, strict=True)
    )
    size = (weights[:, None] * states.square()).sum() / weights.sum() / states.shape[1]
    return apart + ridge / 2 * size * change.square().sum()


def test_two_experts_and_separable_inputs():
    """Source 0 has slot 0, source 1 slot 1; the router as merged sends all the wrong way."""
    states = torch.tensor([[2.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 3.0]])
    wanted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    fitted, near = calibrated(states, wanted, torch.full((4,), 0.25), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1e-3)
    assert (states @ fitted.T).argmax(-1).tolist() == [0, 0, 1, 1]
    assert near.agreement == (0.0, 1.0) and near.divergence[1] < 0.1 < near.divergence[0] and near.kept == 1


def test_two_sources_of_one_token_by_hand():
    """Sources with logits (2, 0) and (0, 1) for the same token: the fit has the mean of their gates, (.8808 + .2689) / 2, and
    keeps the mean row of the average, 0.75. (HARC's expansion gives a difference of rows of 0.0443, here it is 0.3016.)"""
    gates = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).softmax(-1)
    fitted, near = calibrated(torch.ones(2, 1), gates, torch.full((2,), 0.5), torch.tensor([[1.0], [0.5]]), 1e-9)
    assert fitted.softmax(0)[0].item() == pytest.approx((0.880797 + 0.268941) / 2, abs=1e-5)
    assert fitted.flatten().tolist() == pytest.approx([0.9008, 0.5992], abs=1e-4)
    assert near.agreement == pytest.approx((0.5, 0.5))


def test_experts_that_did_not_come_along_have_no_say():
    """CAEM took experts 2 and 0 of source 0 and expert 1 of source 1, of four each."""
    slots = slots_of_chosen([[2, 0], [1]], 4)
    assert slots == [[2], [0], [5]]
    gates = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert torch.equal(targets(gates, 0, slots), torch.tensor([[0.3, 0.1, 0.0]]))
    assert torch.equal(targets(gates, 1, slots), torch.tensor([[0.0, 0.0, 0.2]]))
    # the third token's expert is gone, and with it the token; the others count by what is left of their gates
    states, wanted = torch.eye(3), torch.tensor([[0.3, 0.1, 0.0], [0.0, 0.0, 0.2], [0.0, 0.0, 0.0]])
    router = torch.zeros(3, 3)
    fitted, near = calibrated(states, wanted, torch.full((3,), 1 / 3), router, 1e-3)
    assert near.kept == pytest.approx((0.4 + 0.2) / 3) and torch.equal(fitted[:, 2], router[:, 2])
    assert (states @ fitted.T).argmax(-1)[:2].tolist() == [0, 2]


def test_slots_hold_what_the_merges_put_there():
    random = torch.Generator().manual_seed(0)
    sources = []
    for _ in range(2):
        one = {"shared.weight": torch.randn(3, 4, generator=random)}
        for stack in ("encoder", "decoder"):
            layer = f"{stack}.block.1.layer.{1 if stack == 'encoder' else 2}.mlp"
            one[f"{layer}.router.classifier.weight"] = torch.randn(3, 4, generator=random)
            one |= {f"{layer}.experts.expert_{e}.wi.weight": torch.randn(5, 4, generator=random) for e in range(3)}
        sources.append(one)
    usage = [{stack: torch.tensor([counts]) for stack in ("encoder", "decoder")} for counts in ([5, 1, 9], [1, 8, 7])]
    made, record = merge(sources, usage, 4)
    for slot, (member,) in enumerate(slots_of_chosen(record["encoder"]["experts"][0], 3)):
        source, expert = divmod(member, 3)
        name = "{}.experts.expert_{}.wi.weight"
        assert torch.equal(made[name.format(LAYER, slot)], sources[source][name.format(LAYER, expert)])
        row = sources[source][f"{LAYER}.router.classifier.weight"][expert]
        assert torch.equal(made[f"{LAYER}.router.classifier.weight"][slot], row)
    assert slots_of_average(2, 3) == [[0, 3], [1, 4], [2, 5]]
    gates = torch.rand(7, 3, generator=random)
    assert all(torch.equal(targets(gates, source, slots_of_average(2, 3)), gates) for source in (0, 1))


def test_several_members_of_a_source_in_one_slot_add_up():
    gates = torch.tensor([[0.5, 0.3, 0.2]])
    assert torch.allclose(targets(gates, 1, [[0, 3, 5], [4]]), torch.tensor([[0.7, 0.3]]))


@settings(max_examples=12)
@given(seed=st.integers(0, 50), ridge=st.sampled_from([1e-4, 1e-3, 1e-1, 10.0]))
def test_no_router_near_by_has_a_smaller_loss(seed, ridge):
    states, wanted, weights, router = (one.double() for one in random_case(seed))
    fitted, near = calibrated(states, wanted, weights, router, ridge)
    least = loss(states, wanted, weights, router, fitted - router, ridge)
    random = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1):
        step = size * torch.randn(router.shape, generator=random, dtype=torch.float64)
        assert loss(states, wanted, weights, router, fitted - router + step, ridge) > least
    kept = (weights * wanted.sum(-1)).sum()
    for found, change in zip(near.divergence, (torch.zeros_like(router), fitted - router), strict=True):
        assert found == pytest.approx((loss(states, wanted, weights, router, change, 0.0) / kept).item(), abs=1e-9)


def test_a_router_that_is_right_stays():
    states, _, weights, router = (one.double() for one in random_case(0))
    bias = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
    for offset in (None, bias):
        wanted = 0.3 * (states @ router.T + (0 if offset is None else offset)).softmax(-1)
        fitted, near = calibrated(states, wanted, weights, router, 1e-3, offset)
        assert torch.allclose(fitted, router, atol=1e-6) and near.divergence[0] == pytest.approx(0, abs=1e-12)


def test_the_same_bits_again_and_the_inputs_stay():
    case = random_case(3)
    copies = [one.clone() for one in case]
    first, second = (calibrated(*case, 1e-3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[1] == second[1] and first[0].dtype == torch.float32
    assert all(torch.equal(one, copy) for one, copy in zip(case, copies, strict=True))


def test_a_strong_ridge_holds_the_router():
    states, wanted, weights, router = random_case(4)
    changes = [(calibrated(states, wanted, weights, router, ridge)[0] - router).norm() for ridge in (1e-3, 1e-1, 1e3)]
    assert changes[0] > changes[1] > changes[2] and changes[2] < 1e-2


def test_states_of_zeros_leave_the_router():
    _, wanted, weights, router = random_case(5)
    assert torch.equal(calibrated(torch.zeros(60, 5), wanted, weights, router, 1e-3)[0], router)


def test_no_token_to_follow_is_refused():
    states, wanted, weights, router = random_case(6)
    with pytest.raises(ValueError, match="no token that a source sends"):
        calibrated(states, torch.zeros_like(wanted), weights, router, 1e-3)


def test_the_row_in_the_registry_fits_the_function():
    (row,) = CALIBRATIONS.values()
    assert row.load() is router_calibration.calibrated and row.arguments({}) == {"ridge": 1e-3}
