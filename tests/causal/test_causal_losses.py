"""The loss on the target only, usage and balance of causal mixtures: against plain loops, one example at a time."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from causal_models import FAMILIES, write_model
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from expert_merging.causal import family as causal
from expert_merging.causal.sequences import join, positions, shifted
from expert_merging.data.batches import Size
from expert_merging.training import families

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13], "labels": [20, 21, 0]},
    {"input_ids": [14], "labels": [0]},
    {"input_ids": [15, 16, 17], "labels": [30, 31, 32, 33, 34, 0]},
]
STEP = Size(len(ROWS), sum(len(row["input_ids"]) for row in ROWS), sum(len(row["labels"]) for row in ROWS))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("causal") / request.param, request.param)
    return families.load_model(folder, "BASE_MODEL_PATH").train()


def by_hand(model, row) -> list[float]:
    """Minus the log-probability of each target token, from the logits of the whole unpadded sequence."""
    ids = torch.tensor([row["input_ids"] + row["labels"]])
    logits = AutoModelForCausalLM.from_pretrained(model.name_or_path)(ids).logits[0].log_softmax(-1)
    start = len(row["input_ids"])
    return [-logits[start + i - 1, token].item() for i, token in enumerate(row["labels"])]


def test_loss_is_that_of_the_target_tokens_alone(model):
    model.config.router_aux_loss_coef, before = 0.0, model.config.router_aux_loss_coef
    found = causal.token_loss(model, model, join(ROWS, 0), STEP, "paper").item()
    model.config.router_aux_loss_coef = before
    losses = [loss for row in ROWS for loss in by_hand(model, row)]
    assert len(losses) == STEP.target_tokens and found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    dataset = Dataset.from_list(ROWS)
    c, tokenizer = SimpleNamespace(eval_batch_size=2), SimpleNamespace(pad_token_id=3)
    assert causal.task_loss(model, dataset, tokenizer, c, Accelerator(cpu=True)) == pytest.approx(found, rel=1e-5)


def test_balance_is_that_of_transformers_for_a_sequence(model):
    found = causal.token_loss(model, model, join(ROWS[:1], 0), Size(1, 9, 3), "paper").item()
    ids = torch.tensor([ROWS[0]["input_ids"] + ROWS[0]["labels"]])
    logits = model(ids, output_router_logits=True).router_logits
    balance = load_balancing_loss_func(logits, 4, 2).item()
    plain = sum(by_hand(model, ROWS[0])) / 3
    assert balance > 1 and found == pytest.approx(plain + model.config.router_aux_loss_coef * balance, rel=1e-5)


@pytest.mark.parametrize("cut", [[[0], [1], [2]], [[0, 1], [2]], [[2, 0], [1]]])
def test_a_step_is_the_same_however_it_is_cut(model, cut):
    whole = causal.token_loss(model, model, join(ROWS, 0), STEP, "paper").item()
    parts = [causal.token_loss(model, model, join([ROWS[i] for i in part], 3), STEP, "paper") for part in cut]
    assert sum(part.item() for part in parts) == pytest.approx(whole, rel=1e-5)
    assert model.routers.logits == []


def test_padding_side_changes_no_gradient(model):
    """Padded on the right by hand, with transformers' own positions and all logits."""

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.config.router_aux_loss_coef, before = 0.0, model.config.router_aux_loss_coef
    ours = gradients(causal.token_loss(model, model, join(ROWS, 3), STEP, "paper"))
    model.config.router_aux_loss_coef = before
    both = [torch.tensor(row["input_ids"] + row["labels"]) for row in ROWS]
    ids = torch.nn.utils.rnn.pad_sequence(both, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in both], batch_first=True)
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(ROWS):
        start = len(row["input_ids"])
        labels[number, start : start + len(row["labels"])] = torch.tensor(row["labels"])
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    theirs = gradients(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    )
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("how", ["checkpointing", "bf16"])
def test_less_memory_gives_the_same_gradients(model, how):
    """Activations computed again give the same bits, with the balance loss; under autocast they are near."""

    def gradients(autocast=False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = causal.token_loss(model, model, join(ROWS, 3), STEP, "paper")
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    if how == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.routers.layers:
            layer.served = []
        again = gradients()
        # What the backward pass computes again would be kept with its graph, and its tokens counted twice.
        assert model.routers.logits == [] and all(len(layer.served) == 1 for layer in model.routers.layers)
        for layer in model.routers.layers:
            layer.served = None
        model.gradient_checkpointing_disable()
        assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)
    else:
        a, b = (torch.cat([one[name].flatten() for name in plain]) for one in (plain, gradients(autocast=True)))
        assert not torch.equal(a, b) and torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_an_expert_without_a_real_token_stays_as_it_is(model):
    """AdamW would move it by its moments and decay; padding, which goes to some experts too, counts as none."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    causal.pass_over_idle(model, optimizer)
    for row in (ROWS[0], ROWS[1]):
        model.zero_grad()
        experts = [expert for layer in model.routers.layers for expert in layer.experts]
        before = [[p.detach().clone() for p in expert.parameters()] for expert in experts]
        batch = join([row, {"input_ids": [14], "labels": [0]}], 7)
        causal.token_loss(model, model, batch, STEP, "paper").backward()
        served = torch.cat([torch.stack(layer.served).sum(0) for layer in model.routers.layers]).tolist()
        optimizer.step()
        changed = [
            any(not torch.equal(a, b) for a, b in zip(old, expert.parameters(), strict=True))
            for old, expert in zip(before, experts, strict=True)
        ]
        assert changed == [tokens > 0 for tokens in served]
    assert not all(changed)
    for layer in model.routers.layers:
        layer.served = None
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(model.name_or_path).state_dict())


def test_shifting_to_the_left():
    ids, mask = torch.tensor([[5, 6, 0], [7, 8, 9], [4, 0, 0]]), torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    moved, real = shifted(ids, mask)
    assert moved.tolist() == [[0, 5, 6], [7, 8, 9], [0, 0, 4]] and real.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert positions(real).tolist() == [[0, 0, 1], [0, 1, 2], [0, 0, 0]]
