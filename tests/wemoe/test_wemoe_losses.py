"""What adaptation minimises on unlabelled inputs of models that write text."""

import copy
import math

import pytest
import torch
from test_wemoe_seq2seq import new, upscaled

from expert_merging.core.errors import UserError
from expert_merging.merging.adamerging import AdaMerged
from expert_merging.wemoe.adaptation import adapt, batch_at
from expert_merging.wemoe.ffn import routers
from expert_merging.wemoe.seq2seq_losses import KINDS, AnswerLoss, first_tokens

ROWS = 6


def features(shift=0):
    """Inputs of different lengths; `shift` changes the labels only."""
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randint(2, 32, (n,), generator=generator).tolist() + [1] for n in (4, 7, 3, 9, 5, 6)]
    return {"input_ids": inputs, "labels": [[2 + (row + shift) % 5, 9, 1] for row in range(ROWS)]}


def loss_of(kind, model, data=None, batch_size=ROWS, **more):
    data = {"task": features() if data is None else data}
    return AnswerLoss(
        model, model, lambda: model, {"task": kind}, data, {"task": [2, 3, 4, 5, 6]}, batch_size, 0, **more
    )


def entropy_of(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("name", ["t5", "switch"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "exact_em"])  # which samples anew
def test_a_batch_is_the_mean_of_its_examples(name, kind):
    """So neither padding nor what shares a batch has a say."""
    *_, model = upscaled(name)
    whole, prediction = loss_of(kind, model)("task", 0)
    data = features()
    rows = batch_at(0, ROWS, ROWS, 0)
    singles = [
        loss_of(kind, model, {key: [values[row]] for key, values in data.items()}, 1)("task", 0) for row in rows
    ]  # fmt: skip
    torch.testing.assert_close(whole, torch.stack([one for one, _ in singles]).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction, torch.stack([p for _, p in singles]).mean(0), rtol=1e-5, atol=1e-6)
    assert 0 < whole.item() < (1 + 1e-6 if kind != "teacher_forced_gold" else 10)
    assert prediction.sum().item() == pytest.approx(1, abs=1e-5) and len(prediction) == (
        5 if kind == "verbalizer" else 32
    )


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_oracle_looks_at_labels(kind):
    *_, model = upscaled("t5")
    values = [loss_of(kind, model, features(shift))("task", 0)[0].item() for shift in (0, 1)]
    assert (values[0] != values[1]) == (kind == "teacher_forced_gold")


def test_the_formulas():
    *_, model = upscaled("switch")
    data = {key: values[:1] for key, values in features().items()}
    ids = torch.tensor(data["input_ids"])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
        written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=written[:, :-1]).logits[0]
    end = (written[0, 1:] == 1).nonzero()
    length = int(end[0]) + 1 if len(end) else 4
    wanted = {
        "first_token": entropy_of(first) / math.log(32),
        "verbalizer": entropy_of(first[2:7]) / math.log(5),
        "self_generated": entropy_of(logits[:length]).mean() / math.log(32),
    }
    for kind, value in wanted.items():
        found = loss_of(kind, model, data, 1, tokens=4)("task", 0)[0]
        torch.testing.assert_close(found.detach(), value, rtol=1e-5, atol=1e-6)


def test_exact_em_is_the_entropy_of_the_answer_and_its_gradient_in_expectation():
    """Against the sum over all answers of two tokens: H_1 + sum_y p(y) H_2(y) over the first tokens y but the end."""
    *_, model = upscaled("t5")
    ids = torch.tensor([features()["input_ids"][1]])
    parameters = [p for router in routers(model) for p in router.parameters()]
    first_token = torch.arange(32)
    written = torch.stack([torch.zeros(32, dtype=torch.long), first_token, torch.where(first_token == 1, 0, 7)], dim=1)
    batch = {"input_ids": ids.expand(32, -1), "attention_mask": torch.ones(32, ids.shape[1], dtype=torch.long)}

    logits = model(**batch, decoder_input_ids=written[:, :-1]).logits
    p = logits[0, 0].softmax(-1)
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    behind = (first_token != 1) * entropies[:, 1]
    exact, along = ((entropies[0, 0] + (q * behind).sum()) / (2 * math.log(32)) for q in (p, p.detach()))
    wanted = torch.autograd.grad(exact, parameters, retain_graph=True)
    without = torch.autograd.grad(along, parameters)  # the policy gradient, as self_generated leaves it

    loss = loss_of("exact_em", model, tokens=2)
    value, found = 0.0, [torch.zeros_like(gradient) for gradient in wanted]
    for y, share in enumerate(p.tolist()):  # every answer as if it had been sampled, by its probability
        one = loss._entropy_of_answer({key: tensor[:1] for key, tensor in batch.items()}, written[y : y + 1])[0]
        value += share * one.item()
        for total, gradient in zip(found, torch.autograd.grad(one, parameters), strict=True):
            total += share * gradient
    assert value == pytest.approx(exact.item(), abs=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert any((a - b).abs().max() > 0.01 * b.abs().max() for a, b in zip(without, wanted, strict=True))


def test_exact_em_samples_the_same_answers_each_time_and_leaves_the_random_numbers_alone():
    *_, model = upscaled("t5")
    loss = loss_of("exact_em", model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    values = [loss("task", step)[0].item() for step in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    assert values[0] == values[1] != values[2]


def test_nothing_after_the_end_counts():
    """A model that always ends at once has an answer of one token."""
    model = new("t5", 0)
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(16, 32, bias=True)
        model.lm_head.weight.mul_(0.05)
        model.lm_head.bias.zero_()
        model.lm_head.bias[1] = 5.0
    ended, _ = loss_of("self_generated", model)("task", 0)
    first, _ = loss_of("first_token", model)("task", 0)
    torch.testing.assert_close(ended, first)


@pytest.mark.parametrize("name", ["t5", "switch"])
def test_adaptation_lowers_it_and_moves_nothing_but_routers(name):
    *_, model = upscaled(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    parameters = [p for router in routers(model) for p in router.parameters()]
    record = adapt(parameters, ["task"], loss_of("self_generated", model), 12, 3e-3, guard="off")
    assert sum(record["loss"]["task"][-3:]) < sum(record["loss"]["task"][:3])
    for n, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[n]) == (".gate." not in n), n


def test_adamerging_adapts_its_coefficients_by_the_same_loss():
    base = new("t5", 0)
    tuned = [new("t5", seed).state_dict() for seed in (1, 2)]
    results = []
    for _ in range(2):
        learning, writing = AdaMerged(copy.deepcopy(base), tuned).eval(), copy.deepcopy(base)
        loss = AnswerLoss(
            learning, base, lambda merged=learning, into=writing: merged.merged(into), {"task": "self_generated"},
            {"task": features()}, {}, 4, 0,
        )  # fmt: skip
        record = adapt([learning.coefficients], ["task"], loss, 10, 3e-2, guard="off")
        assert sum(record["loss"]["task"][-3:]) < sum(record["loss"]["task"][:3])
        results.append(learning.coefficients.detach().clone())
    assert torch.equal(*results) and results[0].unique().numel() > 2


def test_what_is_no_loss_or_no_classification():
    with pytest.raises(UserError, match="must be one of first_token"):
        loss_of("entropy", new("t5", 0))
    assert first_tokens([[7, 1], [3, 1], [7, 2]], "x") == [3, 7]
    with pytest.raises(UserError, match="begin with 1 different"):
        first_tokens([[7, 1], [7, 2]], "x")
    with pytest.raises(UserError, match="begin with 101 different"):
        first_tokens([[n] for n in range(101)], "x")
