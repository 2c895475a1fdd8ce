"""Importance scores from activations, against weights times their gradients; and the domains they are measured on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

from expert_merging.core.errors import UserError
from expert_merging.hemoe import domains, importance
from expert_merging.hemoe.importance import Scores, processed, score, sequence_scores

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig), "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}  # fmt: skip


def make_model(kind="llama"):
    torch.manual_seed(0)
    model_class, config_class = KINDS[kind]
    return model_class(config_class(**SIZES, initializer_range=0.3))


@pytest.fixture(scope="module")
def model():
    return make_model()


def batch_of(lengths, seed=0, padded_to=0, left=False):
    """Random sequences; the first two tokens of each are the prompt."""
    random = torch.Generator().manual_seed(seed)
    width = max(*lengths, padded_to, 1)
    batch = {"input_ids": torch.zeros(len(lengths), width, dtype=torch.long)}
    batch["attention_mask"], batch["labels"] = batch["input_ids"].clone(), batch["input_ids"].clone() - 100
    for row, length in enumerate(lengths):
        ids = torch.randint(1, 40, (length,), generator=random)
        place = slice(width - length, width) if left else slice(length)
        batch["input_ids"][row, place] = ids
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = torch.where(torch.arange(length) < 2, -100, ids)
    return batch


def row_of(batch, row):
    length = int(batch["attention_mask"][row].sum())
    return {name: values[row : row + 1, :length] for name, values in batch.items()}


def by_weights(model, batch):
    """(up-, gate- and down-term) [layers, neurons] of one sequence: weights times their gradients, summed over a neuron's."""
    model.eval()
    loss = model(**batch).loss
    terms = []
    for layer in model.model.layers:
        weights = [layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight, layer.mlp.down_proj.weight]
        up, gate, down = torch.autograd.grad(loss, weights, retain_graph=True)
        terms.append([(weights[0] * up).sum(1), (weights[1] * gate).sum(1), (weights[2] * down).sum(0)])
    return [torch.stack(term).detach() for term in zip(*terms, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_weights_times_gradients(kind):
    model, batch = make_model(kind), batch_of([9, 5, 12])
    found = sequence_scores(model, batch)
    assert found.shape == (3, 3, 24) and found.dtype == torch.float32
    for row in range(3):
        up, gate, down = by_weights(model, row_of(batch, row))
        torch.testing.assert_close(up, down, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[row], up + gate + down, rtol=1e-4, atol=1e-7)


@given(st.lists(st.integers(4, 12), min_size=1, max_size=4), st.integers(0, 8), st.booleans(), st.integers(0, 99))
@settings(max_examples=15)
def test_batches_and_padding_change_nothing(model, lengths, padding, left, seed):
    together = sequence_scores(model, batch_of(lengths, seed, max(lengths) + padding, left))
    apart = batch_of(lengths, seed)
    for row in range(len(lengths)):
        torch.testing.assert_close(together[row], sequence_scores(model, row_of(apart, row))[0], rtol=1e-4, atol=1e-5)


def test_domains_sum_over_sequences(model):
    batches = [batch_of([5, 7], seed=1), batch_of([6], seed=2)]
    scores = score(model, {"a": batches, "b": batches[:1]})
    assert scores.values.shape == (3, 24, 2) and scores.values.dtype == np.float64
    assert scores.domains == ("a", "b") and scores.sequences == (3, 2)
    summed = sum(sequence_scores(model, batch).abs().sum(0) for batch in batches)
    np.testing.assert_allclose(scores.values[..., 0], summed.numpy(), rtol=1e-5)
    assert (scores.values[..., 0] > scores.values[..., 1]).all(), "a sequence more must add something"


def test_sums_in_bfloat16_stand_still(model):
    one_batch = batch_of([8], seed=3)
    batches = [{name: values.repeat(100, 1) for name, values in one_batch.items()}] * 6
    exact, released = (score(model, {"a": batches}, accumulate=dtype).values for dtype in ("float64", "bfloat16"))
    one = score(model, {"a": [one_batch]}).values
    np.testing.assert_allclose(exact, 600 * one, rtol=1e-4)
    assert released.max() / one.max() < 520, "bfloat16 holds 8 bits: adding 1 to 256 or 512 changes nothing"


def test_model_is_left_as_it_was(model):
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    score(model, {"a": [batch_of([6])]})
    assert model.training and not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.lm_head.weight.requires_grad_(True)


def test_what_cannot_be_scored(model):
    with pytest.raises(ValueError, match="gpt2.*llama, mistral, qwen2"):
        score(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)), {"a": [batch_of([5])]})
    with pytest.raises(ValueError, match="have biases"):
        score(LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True)), {"a": [batch_of([5])]})
    with pytest.raises(UserError, match="sequence 1 of a batch has no target token"):
        score(model, {"a": [batch_of([5, 2])]})
    with pytest.raises(UserError, match="domain b has no sequence"):
        score(model, {"a": [batch_of([5])], "b": []})


def test_scores_file(tmp_path):
    scores = Scores(np.random.default_rng(0).random((2, 5, 3)), ("a", "b", "c"), (4, 5, 6))
    scores.save(tmp_path / "scores.npz")
    loaded = Scores.load(tmp_path / "scores.npz")
    assert (loaded.values == scores.values).all()
    assert (loaded.domains, loaded.sequences) == (scores.domains, scores.sequences)
    with pytest.raises(UserError, match="score the neurons first"):
        Scores.load(tmp_path / "other.npz")


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 20), st.integers(1, 4))
def test_processing(seed, depth, neurons, count):
    raw = np.random.default_rng(seed).gamma(0.3, 5, (depth, neurons, count)) + 1e-6
    found = processed(raw)
    np.testing.assert_allclose((found**2).sum((0, 1)), 1)
    assert (found >= 0).all()
    for domain in range(count):
        order = np.argsort(raw[..., domain], axis=None)
        assert (np.diff(found[..., domain].ravel()[order]) >= 0).all()


def test_scores_that_say_nothing_are_refused():
    with pytest.raises(UserError, match="domain 1 scores 0 at every neuron"):
        processed(np.stack([np.ones((2, 3)), np.zeros((2, 3))], axis=-1))
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(UserError, match="finite and not negative"):
            processed(np.full((1, 1, 1), wrong))


# ---------------------------------------------------------------- domains

SUBJECTS = {
    "cooking": "boil rice pan onion garlic oven flour butter sugar salt".split(),
    "sailing": "mast anchor wind harbour keel rudder deck sail tide hull".split(),
    "algebra": "ring field group matrix vector kernel ideal module basis tensor".split(),
}


def make_examples(each=30, seed=0):
    """Texts of three subjects in two tasks: the tasks cut across the subjects."""
    random = np.random.default_rng(seed)
    rows = []
    for subject, words in SUBJECTS.items():
        for number in range(each):
            said = " ".join(random.choice(words, 12))
            rows.append(
                {"instruction": f"say {said}", "output": str(number), "task": "ab"[number % 2], "subject": subject}
            )
    return [rows[i] for i in random.permutation(len(rows))]


def test_clusters_find_the_subjects():
    examples = make_examples()
    found = domains.by_cluster(examples, 3)
    pairs = {(example["subject"], int(label)) for example, label in zip(examples, found.labels, strict=True)}
    assert len(pairs) == 3 and found.names == ("cluster0", "cluster1", "cluster2")
    assert [row["examples"] for row in found.table(examples)] == [30, 30, 30]
    assert all(row["a"] == row["b"] == 15 for row in found.table(examples))


def test_order_of_the_examples_does_not_matter():
    examples = make_examples()
    turned = examples[::-1]
    first, second = domains.by_cluster(examples, 3), domains.by_cluster(turned, 3)
    assert (first.labels == second.labels[::-1]).all()
    few = domains.by_cluster(examples, 3, fitted_per_task=9)
    assert (few.labels == domains.by_cluster(turned, 3, fitted_per_task=9).labels[::-1]).all()


def test_tasks_as_domains():
    examples = make_examples()
    found = domains.by_task(examples)
    assert found.names == ("a", "b")
    assert all(examples[i]["task"] == "b" for i in found.members(1)) and len(found.members(1)) == 45


def test_embeddings_of_a_local_encoder(tmp_path):
    """Right padding must not enter a text's mean."""
    from raw_data import tiny_tokenizer
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["the cat", "a much longer text than the other one about the sea"]
    both = domains.embed(texts, str(tmp_path))
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(both[:1], domains.embed(texts[:1], str(tmp_path)), atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 0.01


def test_domains_that_cannot_be_made(tmp_path):
    with pytest.raises(UserError, match="91 domains cannot be made of 90"):
        domains.by_cluster(make_examples(), 91)
    with pytest.raises(UserError, match="no examples"):
        domains.by_task([])
    with pytest.raises(UserError, match="no config.json"):
        domains.by_cluster(make_examples(), 2, embedder=str(tmp_path))


def test_passes_are_no_larger_than_their_sequences_and_tokens(monkeypatch):
    monkeypatch.setattr(importance, "_TOGETHER", 3)
    monkeypatch.setattr(importance, "_TOKENS", 20)
    assert importance._passes([1, 2, 3, 4, 5, 9, 11, 30]) == [3, 2, 1, 1, 1]
    assert importance._passes([5, 5, 5, 5]) == [3, 1]
