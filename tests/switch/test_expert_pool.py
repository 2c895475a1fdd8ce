"""What the sources' inputs say of their experts, against loops over tokens and experts."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny_models import tiny_switch

from expert_merging.merging.pooled import layers_of
from expert_merging.switch import expert_pool

C = SimpleNamespace(eval_batch_size=2, max_decoder_length=6)
TOKENIZER = SimpleNamespace(pad_token_id=0)
EOS = 1


def inputs(seed):
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 40, (size,), generator=random).tolist() + [EOS] for size in (3, 7, 5)]
    return datasets.Dataset.from_dict({"input_ids": rows})


@pytest.fixture(scope="module")
def models():
    return [tiny_switch(seed) for seed in (0, 1)]


def states_of(model, rows):
    """{layer: [tokens, d_model]} that the sparse layers are given, one example at a time, without padding."""
    found = {}
    for ids in rows["input_ids"]:
        given = torch.tensor([ids])
        written = model.generate(given, max_length=C.max_decoder_length, num_beams=1, do_sample=False)[0, :-1].tolist()
        if EOS in written:
            written = written[: written.index(EOS)]
        hooks = [
            model.get_submodule(layer).register_forward_pre_hook(
                lambda _, states, layer=layer: found.setdefault(layer, []).append(states[0][0])
            )
            for layer in layers_of(model.state_dict())
        ]
        model(input_ids=given, decoder_input_ids=torch.tensor([written]), use_cache=False)
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@torch.no_grad()
def test_sums_are_those_of_single_tokens(models):
    data = [inputs(0), inputs(1)]
    seen = expert_pool.observe(
        [model.state_dict() for model in models],
        [lambda m=m: m for m in models],
        data,
        TOKENIZER,
        C,
        torch.device("cpu"),
    )
    states = [states_of(model, rows) for model, rows in zip(models, data, strict=True)]
    assert set(seen) == set(states[0]) and len(seen) == 4
    for layer, found in seen.items():
        mlps = [model.get_submodule(layer) for model in models]
        experts = [list(mlp.experts.values()) for mlp in mlps]
        number = len(experts[0])
        frequency, outputs = torch.zeros(2 * number), torch.zeros(2 * number, states[0][layer].shape[1])
        gates, logits, weights = [[] for _ in range(2 * number)], [], []
        for source in range(2):
            tokens = states[source][layer]
            for token in tokens:
                share = 0.5 / len(tokens)
                own = (mlps[source].router.classifier.weight @ token).softmax(-1)
                chosen = source * number + own.argmax().item()
                frequency[chosen] += share
                gates[chosen].append(own.max() * experts[source][own.argmax()](token).norm())
                centred = [mlp.router.classifier.weight @ token for mlp in mlps]
                logits.append(torch.cat([one - one.mean() for one in centred]))
                weights.append(share)
                for s in range(2):
                    for e, expert in enumerate(experts[s]):
                        outputs[s * number + e] += share * expert(token)
        weighted = torch.stack(logits) * torch.tensor(weights).sqrt()[:, None]
        cosines = torch.nn.functional.cosine_similarity(weighted[:, :, None], weighted[:, None], dim=0)
        saliency = torch.tensor([sum(one) / len(one) if one else 0.0 for one in gates])
        for mine, plain in (
            (found.frequency, frequency), (found.outputs, outputs), (found.saliency, saliency), (found.similarity, cosines),
        ):  # fmt: skip
            assert torch.allclose(mine.float(), plain, atol=1e-4), layer
        assert found.frequency.sum().item() == pytest.approx(1)
