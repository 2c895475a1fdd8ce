"""What the released scripts do with the patched model, in our words: wrap it, load their .pt files, decode, read the routers'
counts without having asked for counting, merge by `caem`, train jointly, save."""

import math
import warnings

import pytest
import torch
from stock_switch import PLAIN, batch, build, ours
from torch import nn

DECODING = {
    "max_length": 12,
    "num_beams": 3,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
}


class Wrapped(nn.Module):
    """A model as theirs is: one attribute, a task, the loss of a batch."""

    def __init__(self, seed: int, experts: int = 4):
        super().__init__()
        self.task_type = "ag_news"
        self.STmodel = build(ours, PLAIN | {"num_experts": experts}, seed)

    def forward(self, input_ids, attention_mask, labels):
        return self.STmodel(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def routers(model):
    """By their indices: every `encoder_sparse_step`-th block from 1 on, of both stacks."""
    config = model.STmodel.encoder.config
    for layer in range(1, config.num_layers, config.encoder_sparse_step):
        yield (
            model.STmodel.encoder.block[layer].layer[1].mlp.router,
            model.STmodel.decoder.block[layer].layer[2].mlp.router,
        )


def decode(model, data, reset: bool):
    """Clear the counts, decode, and take each router's shares."""
    model.eval()
    for pair in routers(model) if reset else ():
        for router in pair:
            router.reset_expert_usage_counts()
    with torch.no_grad():
        model.STmodel.generate(input_ids=data["input_ids"], attention_mask=data["attention_mask"], **DECODING)
    counts = [[router.get_expert_usage_counts() for router in pair] for pair in routers(model)]
    return [[(one / one.sum().tolist()).tolist() for one in pair] for pair in counts]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three single-task models, as their script has them before it merges: loaded from .pt files, and decoded."""
    folder, models = tmp_path_factory.mktemp("released"), []
    for seed in range(3):
        torch.save(Wrapped(seed).state_dict(), folder / f"{seed}.pt")
        model = Wrapped(9)
        model.load_state_dict(torch.load(folder / f"{seed}.pt", map_location="cpu", weights_only=True))
        shares = decode(model, batch(seed), reset=True)
        assert all(sum(one) == pytest.approx(1) for pair in shares for one in pair)
        models.append(model)
    return models


def test_counts_are_there_and_add_up_over_tasks(sources):
    model = sources[0]
    decode(model, batch(0), reset=True)
    once = next(routers(model))[0].get_expert_usage_counts().sum()
    decode(model, batch(0), reset=False)
    assert next(routers(model))[0].get_expert_usage_counts().sum() == 2 * once > 0


def test_merging_and_joint_training(sources, tmp_path):
    merged = Wrapped(8, experts=8)
    for source in sources:
        decode(source, batch(3), reset=True)
    merged.STmodel, encoder, decoder = merged.STmodel.caem(
        sources, STmodel=merged.STmodel, en_num_experts=8, de_num_experts=8,
        num_layers=merged.STmodel.encoder.config.num_layers, alpha=1,
    )  # fmt: skip
    for record in (encoder, decoder):
        assert len(record) == 2 and all(len(layer) == 3 and sum(layer) == 8 for layer in record)
    optimizer = torch.optim.AdamW(merged.parameters(), lr=3e-4, eps=1e-6, betas=(0.9, 0.98), weight_decay=0.005)
    merged.train()
    for number in range(3):
        loss = merged(**batch(number)).loss / 9
        loss.backward()
        assert math.isfinite(loss.item())
    optimizer.step()
    torch.save(merged.state_dict(), tmp_path / "CAEM_[4|8]_ep1.pt")
    again = Wrapped(5, experts=8)
    again.load_state_dict(torch.load(tmp_path / "CAEM_[4|8]_ep1.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), again.parameters(), strict=True))


def test_a_layer_without_tokens_is_said(sources, monkeypatch):
    """Its shares would be no numbers; its entropy is 0, and it gives one expert."""
    said = []  # asked of the logger itself: level and propagation of transformers' loggers are other tests' to change
    monkeypatch.setattr(ours.logger, "warning", said.append)
    for source in sources:
        decode(source, batch(1), reset=True)
    silent = next(routers(sources[2]))[0]
    silent.reset_expert_usage_counts()
    assert not silent.get_expert_usage_counts().any() and "no token was counted" in said[0]
    target = Wrapped(8, experts=8)
    with pytest.warns(UserWarning, match="source 2: no token reached encoder sparse layer 1; its entropy counts as 0"):
        _, encoder, _ = target.STmodel.caem(sources, target.STmodel, 8, 8, 4, 1)
    assert encoder[0][2] == 1
    assert all(tensor.isfinite().all() for tensor in target.STmodel.state_dict().values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(sources[2], batch(1), reset=True)
        target.STmodel.caem(sources, target.STmodel, 8, 8, 4, 1)
