"""The gate, the two orders of mixing, the token block and their counted operations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import perturb, tiny_batch, tiny_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from expert_merging import meo
from expert_merging.meo import mixing
from expert_merging.meo.gate import balance_loss, cv_squared, noisy_top_k
from expert_merging.meo.stacks import Stack, masked_mean


def stacked(d_in=6, d_out=10, n=4, k=2, level="sequence", mode="meo", bias=True, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(d_in, d_out, bias=bias)
    module = meo.StackedLinear(linear, n, k, level, mode, Stack("encoder"), "linear", d_in).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module


def counted(function, *arguments):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops()


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_gates(rows, n, k, seed, training):
    """T3: rows sum to 1 with k of n, the softmax of the chosen logits; without training always the same."""
    k = min(k, n)
    generator = torch.Generator().manual_seed(seed)
    u, w_gate, w_noise = (torch.randn(*shape, generator=generator) for shape in ((rows, 3), (3, n), (3, n)))
    torch.manual_seed(seed)
    routing = noisy_top_k(u, w_gate, w_noise, k, training)
    torch.testing.assert_close(routing.gates.sum(1), torch.ones(rows))
    assert (routing.gates > 0).sum(1).tolist() == [k] * rows
    assert routing.gates.gather(1, routing.experts).equal(routing.weights)
    assert ((routing.chosen >= 0) & (routing.chosen <= 1)).all()
    if not training:
        logits = u @ w_gate
        out = torch.ones_like(logits, dtype=torch.bool).scatter(1, logits.topk(k).indices, False)
        torch.testing.assert_close(routing.gates, logits.masked_fill(out, -math.inf).softmax(1))
        assert all(a.equal(b) for a, b in zip(routing, noisy_top_k(u, w_gate, w_noise, k, training), strict=True))
        torch.manual_seed(seed + 1)
        assert routing.gates.equal(noisy_top_k(u, w_gate, w_noise, k, training).gates)


def test_zero_gates_share_equally():
    routing = noisy_top_k(torch.randn(3, 5), torch.zeros(5, 8), torch.zeros(5, 8), 4, training=False)
    assert set(routing.gates.flatten().tolist()) == {0.0, 0.25}


def test_load_is_the_chance_to_be_chosen():
    """T10: `chosen` is how often noise drawn anew, the other experts' as it is, brings an expert into the top k."""
    torch.manual_seed(0)
    u, w_gate, w_noise, k = torch.randn(1, 3), torch.randn(3, 5), torch.randn(3, 5), 2
    torch.manual_seed(1)
    routing = noisy_top_k(u, w_gate, w_noise, k, training=True)
    torch.manual_seed(1)
    clean, sd = u @ w_gate, F.softplus(u @ w_noise) + 0.01
    noisy = clean + torch.randn(1, 5) * sd
    draws = clean[0] + torch.randn(200_000, 5) * sd[0]
    for expert in range(5):
        others = noisy[0, [i for i in range(5) if i != expert]]
        often = (draws[:, expert] > others.topk(k).values[-1]).float().mean().item()
        assert routing.chosen[0, expert].item() == pytest.approx(often, abs=0.005)


def test_balance_loss_by_hand():
    """T10."""
    assert cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(2 / 4)
    assert cv_squared(torch.tensor([5.0])).item() == 0
    routing = noisy_top_k(torch.eye(4), 3 * torch.eye(4), torch.zeros(4, 4), 1, training=False)
    assert balance_loss(routing).item() == pytest.approx(0)
    # Rows 0 and 1 only: importance and load are both (1, 1, 0, 0), of mean 1/2 and variance 1/3.
    assert balance_loss(routing, torch.tensor([1, 1, 0, 0])).item() == pytest.approx(2 * (1 / 3) / (1 / 4), rel=1e-4)


def test_gradient_of_the_gate():
    """T10: from the balance loss always, from the task's loss only once experts differ."""
    model = meo.convert(tiny_model("bert"), n=4, k=2).eval()
    modules = meo.linears(model).values()

    def gate_gradient(training):
        model.zero_grad()
        model.train(training)
        torch.manual_seed(2)
        model(**tiny_batch()).loss.backward()
        return max(module.w_gate.grad.abs().max().item() for module in modules)

    assert gate_gradient(training=False) < 1e-7
    assert gate_gradient(training=True) > 1e-4
    model.meo_settings["balance"] = 0.0
    assert gate_gradient(training=True) < 1e-7
    perturb(model)
    assert gate_gradient(training=False) > 1e-4


def test_the_balance_loss_is_added_in_training_only():
    model = meo.convert(tiny_model("bert"), n=4, k=2, balance=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = tiny_batch()

    def cross_entropy(out):
        return F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten())

    out = model.train()(**batch)
    added = meo.balance_loss(model)
    assert added.item() > 0.01
    torch.testing.assert_close(out.loss, cross_entropy(out) + added)
    torch.testing.assert_close(model(**batch, return_dict=False)[0], cross_entropy(out) + meo.balance_loss(model))
    out = model.eval()(**batch)
    torch.testing.assert_close(out.loss, cross_entropy(out))


@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 20), st.integers(1, 6),
    st.integers(0, 99), st.sampled_from([1, 300, 1500, 10**6]),
)  # fmt: skip
def test_mixing_weights_is_mixing_outputs(rows, tokens, n, k, d_out, d_in, seed, room):
    """T2 for a layer, in float64 and however small the tiles; values and gradients of all four inputs."""
    torch.manual_seed(seed)
    k = min(k, n)
    x, weight, bias = torch.randn(rows, tokens, d_in), torch.randn(n, d_out, d_in), torch.randn(n, d_out)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias, torch.randn(rows, n))]
    given_y = torch.randn(rows, tokens, d_out).double()
    results = []
    before = dict(mixing.TILE_BYTES)
    mixing.TILE_BYTES["cpu"] = room
    try:
        for mix in (mixing.mix_weights, mixing.mix_outputs):
            x, weight, bias, logits = leaves
            best, experts = logits.topk(k)
            shares = best.softmax(-1)
            gates = torch.zeros_like(logits).scatter(-1, experts, shares)
            y = mix(x, weight, bias, mixing.Routing(shares, experts, gates, gates))
            results.append((y, *torch.autograd.grad(y, leaves, given_y)))
    finally:
        mixing.TILE_BYTES.update(before)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("k", [2, 6])
def test_merging_memory_is_bounded(monkeypatch, k):
    """However many sequences: no more than a tile of merged weights at a time, in the forward and the backward pass."""
    room, rows, n, d_out, d_in = 64 * 1024, 64, 8, 96, 64
    monkeypatch.setitem(mixing.TILE_BYTES, "cpu", room)
    module, x = stacked(d_in, d_out, n, k), torch.randn(rows, 4, d_in, requires_grad=True)

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.bytes = max(self.bytes, made.numel() * made.element_size())
            return made

    with Largest() as largest:
        module(x).sum().backward()
    everything = 4 * max(
        n * d_out * d_in, rows * 4 * d_out, rows * (1 + k) * d_in
    )  # experts, output, one row of a tile
    assert largest.bytes <= max(room, everything) < 4 * rows * d_out * d_in / 4


@pytest.mark.parametrize("activation", [None, F.relu, F.gelu])
def test_merging_whole_ffns_is_no_mixture(activation):
    """T4: one gate for both matrices of an FFN gives the mixture of outputs for one expert or equal ones only."""
    torch.manual_seed(0)
    x, up, down = torch.randn(5, 6), torch.randn(4, 8, 6), torch.randn(4, 6, 8)

    def ffn(one, two):
        hidden = x @ one.mT
        return (hidden if activation is None else activation(hidden)) @ two.mT

    def error(up, down, gates):
        mixed = sum(g * ffn(one, two) for g, one, two in zip(gates, up, down, strict=True))
        merged = ffn(*(meo.merge(stack, gates[None])[0] for stack in (up, down)))
        return ((mixed - merged).norm() / mixed.norm()).item()

    half = torch.tensor([0.5, 0.0, 0.5, 0.0])
    assert error(up, down, torch.tensor([0.0, 1.0, 0.0, 0.0])) < 1e-6
    assert error(up[:1].expand(4, -1, -1), down[:1].expand(4, -1, -1), half) < 1e-6
    assert error(up, down, half) > 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 8, 4), (1, 4, 4), (1, 8, 2), (3, 17, 2), (3, 4, 4), (5, 35, 4)])
def test_counted_operations(bias, rows, n, k):
    """T5: exact. With all experts in one product (8k >= n, several rows) the merge counts n for k."""
    tokens, d_in, d_out = 5, 6, 10
    x, product = torch.randn(rows, tokens, d_in), d_in * d_out
    gate = 2 * rows * d_in * n
    merged = 2 * rows * product * (tokens + k) + gate + bias * 2 * rows * d_out * n
    assert counted(stacked(d_in, d_out, n, k, bias=bias), x) == merged
    mixed = 2 * rows * tokens * k * product + gate
    assert counted(stacked(d_in, d_out, n, k, mode="moe", bias=bias), x) == mixed
    assert counted(stacked(d_in, d_out, n, k, mode="dense", bias=bias), x) == 2 * rows * tokens * product


def test_counted_operations_with_all_experts_in_one_product():
    module, x = stacked(6, 10, n=6, k=4, bias=False), torch.randn(3, 5, 6)
    assert counted(module, x) == 2 * 3 * 60 * (5 + 6) + 2 * 3 * 6 * 6


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_cheaper_way_is_taken(k):
    """T7: merging costs more up to S = k/(k-1) tokens, and is not done there."""
    for tokens in range(1, 6):
        module, x = stacked(k=k, n=9, bias=False), torch.randn(1, tokens, 6)
        gate = 2 * 6 * 9
        merging, mixing_ = 120 * (tokens + k), 120 * k * tokens
        assert counted(module, x) - gate == min(merging, mixing_)
        assert (merging < mixing_) == (k > 1 and tokens > k / (k - 1))


def test_the_meta_device_counts_the_same():
    for mode in meo.MODES:
        for rows in (1, 3):
            module, x = stacked(mode=mode, n=8, k=3), torch.randn(rows, 7, 6)
            on_cpu = counted(module, x)
            assert counted(module.to("meta"), x.to("meta")) == on_cpu


@pytest.mark.parametrize(("size", "width"), [(16, 1), (64, 1), (130, 2), (768, 12)])
def test_token_block(size, width):
    """T12: nothing at first; its cost; a width of at least one."""
    block, x = meo.TokenBlock(size), torch.randn(3, 5, size)
    assert block(x).count_nonzero() == 0
    assert block.down_proj.weight.count_nonzero() == width * size
    assert counted(block, x) == 4 * 15 * size * width


def test_token_level_is_the_block_and_the_sequences_gate():
    module = stacked(level="token")
    x = torch.randn(3, 5, 6)
    moved = x + module.tokenatt(x)
    routing = noisy_top_k(masked_mean(moved, None), module.w_gate, module.w_noise, 2, training=False)
    want = torch.einsum("bn,noi,bsi->bso", routing.gates, module.weight, moved) + (routing.gates @ module.bias)[:, None]
    torch.testing.assert_close(module(x), want)
    module.mode = "dense"
    torch.testing.assert_close(module(x), F.linear(moved, module.weight[0], module.bias[0]))
    module.mode = "moe"
    routing = noisy_top_k(x.flatten(0, 1), module.w_gate, module.w_noise, 2, training=False)
    gates = routing.gates.view(3, 5, 4)
    want = torch.einsum("bsn,noi,bsi->bso", gates, module.weight, x) + gates @ module.bias
    torch.testing.assert_close(module(x), want)


def test_bert_base_counts():
    """T6: at 128 tokens with the vocabulary's head, in units of 1e9; the paper has 72.0 and 28.6."""
    import benchmarks.meo_flops as benchmark

    base = benchmark.SHAPES["Base"]
    assert benchmark.gflops(base, "dense", 1) == pytest.approx(28.50, abs=0.01)
    assert benchmark.gflops(base, "moe", 2) == pytest.approx(42.99, abs=0.01)
    assert benchmark.gflops(base, "moe", 4) == pytest.approx(71.99, abs=0.01)
    assert benchmark.gflops(base, "meo", 4) == pytest.approx(28.95, abs=0.01)


@pytest.mark.parametrize(
    ("name", "k"), [("Small", 4), ("Small", 32), ("Base", 1), ("Base", 16), ("Base", 32), ("Large", 2), ("Large", 32)]
)
def test_the_papers_figure(name, k):
    """Within 1% of what the figure shows, where it counts a merge's multiply-adds as one operation each."""
    import benchmarks.meo_flops as benchmark

    shape = benchmark.SHAPES[name]
    _, moe, merged = next(point for point in benchmark.FIGURE[name] if point[0] == k)
    assert benchmark.gflops(shape, "moe", k) == pytest.approx(moe, rel=0.01)
    counted = benchmark.merge_once(shape, k, benchmark.gflops(shape, "meo", k))
    assert counted == pytest.approx(merged, rel=0.01)


def test_both_ways_of_merging_agree(monkeypatch):
    """Each row's own k gathered, or one product with all n: the same outputs and gradients."""
    results = []
    for above in (0, 8):
        monkeypatch.setattr(mixing, "GATHER_ABOVE", above)
        module = stacked(n=6, k=2).double()
        x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in (module.weight, module.bias, module.w_gate))])
    for gathered, whole in zip(*results, strict=True):
        torch.testing.assert_close(gathered, whole)
