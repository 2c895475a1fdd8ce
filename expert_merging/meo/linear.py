"""A linear layer of n experts that runs as dense, as vanilla MoE or as MEO, on the same parameters."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expert_merging.core.errors import UserError
from expert_merging.meo.gate import Routing, balance_loss, noisy_top_k
from expert_merging.meo.mixing import merge, mix_outputs, mix_weights
from expert_merging.meo.stacks import KEPT_BYTES, Stack, masked_mean

MODES = ("dense", "moe", "meo")
LEVELS = ("task", "sequence", "token")
REDUCTION = 64  # of the token block's width


class TokenBlock(nn.Module):
    """A(x) = U relu(D x + c_D) + c_U, each token by itself; at first 0. The paper calls it token-level attention block."""

    def __init__(self, size: int):
        super().__init__()
        width = max(1, size // REDUCTION)
        self.down_proj = nn.Linear(size, width)
        self.up_proj = nn.Linear(width, size)
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(torch.relu(self.down_proj(x)))


class StackedLinear(nn.Module):
    """n linear experts [n, d_out, d_in], at first n copies of `linear`, and a gate, at first 0.

    dense: the first expert. moe: the gate's k experts, outputs mixed; at token level the gate reads each token. meo: the k
    experts' weights mixed; at token level the gate is the sequence's, and the token block goes before (dense has it too).
    """

    def __init__(
        self, linear: nn.Module, n: int, k: int, level: str, mode: str, stack: Stack, name: str, read_size: int,
        description_size: int | None = None,
    ):  # fmt: skip
        """
        Args:
            linear: nn.Linear, or transformers' Conv1D, whose weight is transposed.
            read_size: d of what the gate reads; at task level the descriptions are projected to it.
        """
        super().__init__()
        self.n, self.k, self.level, self.mode, self.stack, self.name = n, k, level, mode, stack, name
        self.transposed = not isinstance(linear, nn.Linear)
        weight = linear.weight.detach().mT if self.transposed else linear.weight.detach()
        self.d_out, self.d_in = weight.shape
        new = {"dtype": weight.dtype, "device": weight.device}
        self.weight = nn.Parameter(weight.expand(n, -1, -1).clone(memory_format=torch.contiguous_format))
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().expand(n, -1).clone())
        self.w_gate = nn.Parameter(torch.zeros(read_size, n, **new))
        self.w_noise = nn.Parameter(torch.zeros(read_size, n, **new))
        if level == "token":
            self.tokenatt = TokenBlock(self.d_in).to(**new)
        if level == "task":
            self.task_proj = nn.Linear(description_size, read_size, **new)

    def extra_repr(self) -> str:
        return f"n={self.n}, k={self.k}, {self.d_in} -> {self.d_out}, level={self.level}, mode={self.mode}"

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, d_in] -> [B, S, d_out]."""
        if self.level == "token" and self.mode != "moe":
            x = x + self.tokenatt(x)
        if self.mode == "dense":
            return F.linear(x, self.weight[0], None if self.bias is None else self.bias[0])
        if self.level == "token" and self.mode == "moe":
            return self._by_token(x)
        if x.dim() != 3:
            raise UserError(f"{self.name}: a gate over sequences needs [batch, tokens, features], got {tuple(x.shape)}")
        kept = self._kept()
        if kept is not None:
            return kept(x)
        if self.level == "task":
            return self._by_task(x)
        return self._by_sequence(x)

    def route(self, u: Tensor, count: Tensor | None = None) -> Routing:
        """The gate's decision for rows u [R, read_size]; in training the balance loss is noted."""
        routing = noisy_top_k(u, self.w_gate, self.w_noise, self.k, self.training)
        if self.training:
            self.stack.balances[self.name] = balance_loss(routing, count)
        return routing

    def task_gates(self) -> Tensor:
        """The gates of every task, [tasks, n], without noise."""
        assert self.stack.tasks is not None  # at task level
        described = self.task_proj(self.stack.tasks())
        return noisy_top_k(described, self.w_gate, self.w_noise, self.k, training=False).gates

    def _by_token(self, x: Tensor) -> Tensor:
        mask = self.stack.mask
        count = mask.flatten() if mask is not None and mask.shape == x.shape[:-1] else None
        flat = x.reshape(-1, self.d_in)
        y = mix_outputs(flat, self.weight, self.bias, self.route(flat, count))
        return y.view(*x.shape[:-1], self.d_out)

    def _by_task(self, x: Tensor) -> Tensor:
        described = self.task_proj(self.stack.pooled)
        task = self.stack.task
        if isinstance(task, int):
            routing = self.route(described[task : task + 1])
            if self._may_keep():
                kept = self._keep(routing)
                assert kept is not None  # one row is never too much
                return kept(x)
            return self._mix(x.reshape(1, -1, self.d_in), routing).view(*x.shape[:-1], self.d_out)
        if task.shape != x.shape[:1]:
            raise UserError(f"set_task gave {tuple(task.shape)} tasks for {len(x)} sequences")
        present, number, count = task.to(x.device).unique(return_inverse=True, return_counts=True)
        routing = self.route(described[present], count)
        if self.mode == "moe":
            return self._mix(x, routing.at(number))
        y = None
        for row in range(len(present)):
            rows = (number == row).nonzero()[:, 0]
            part = self._mix(x[rows].reshape(1, -1, self.d_in), routing.at(torch.tensor([row], device=x.device)))
            y = part.new_zeros(*x.shape[:-1], self.d_out) if y is None else y
            y = y.index_copy(0, rows, part.view(len(rows), -1, self.d_out))
        return y

    def _by_sequence(self, x: Tensor) -> Tensor:
        stack = self.stack
        if stack.kind == "causal" and stack.decoding:
            routing: Routing | None = stack.kept.get(f"{self.name}: routing")
            if routing is None or len(routing.weights) != len(x):
                raise UserError(f"{self.name}: a step of decoding without its prompt; decode by generate()")
        else:
            routing = self.route(stack.pooled if stack.kind == "decoder" else masked_mean(x, stack.mask))
            if stack.kind == "causal" and not self.training:
                stack.kept[f"{self.name}: routing"] = routing
        constant = stack.kind == "decoder" or stack.decoding
        if constant and self._merging_is_dearer(x.shape[1]) and self._may_keep():
            kept = self._keep(routing)
            if kept is not None:
                return kept(x)
        return self._mix(x, routing)

    def _mix(self, x: Tensor, routing: Routing) -> Tensor:
        mix = mix_outputs if self.mode == "moe" or self._merging_is_dearer(x.shape[1]) else mix_weights
        return mix(x, self.weight, self.bias, routing)

    def _merging_is_dearer(self, tokens: int) -> bool:
        """Whether merging once and applying once, (S + k) P, does not save on k S P."""
        return tokens * (self.k - 1) <= self.k

    def _may_keep(self) -> bool:
        return self.mode == "meo" and self.k > 1 and not self.training and not torch.is_grad_enabled()

    def _stamp(self) -> tuple:
        return tuple((p.data_ptr(), p._version) for p in (self.weight, self.bias, self.w_gate) if p is not None)

    def _kept(self) -> "KeptMerge | None":
        kept: KeptMerge | None = self.stack.kept.get(self.name) if self._may_keep() else None
        return kept if kept is not None and kept.of == (self._stamp(), self._task()) else None

    def _task(self) -> int | None:
        return self.stack.task if isinstance(self.stack.task, int) else None

    def _keep(self, routing: Routing) -> "KeptMerge | None":
        """Merge for the steps to come: once for rows with equal gates. None where that is too much memory."""
        gates, number = routing.gates.unique(dim=0, return_inverse=True)
        size = len(gates) * self.d_out * self.d_in * self.weight.element_size()
        if self.stack.kept_bytes + size > KEPT_BYTES and len(gates) > 1:
            return None
        bias = None if self.bias is None else merge(self.bias, gates)
        kept = KeptMerge(merge(self.weight, gates), bias, number, (self._stamp(), self._task()))
        if self.name not in self.stack.kept:
            self.stack.kept_bytes += size
        self.stack.kept[self.name] = kept
        return kept


class KeptMerge(NamedTuple):
    """Merged weights [U, d_out, d_in] and biases [U, d_out]; number [B] says whose is whose; `of`: what they were made of."""

    weight: Tensor
    bias: Tensor | None
    number: Tensor
    of: tuple

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, S, d_in] -> [B, S, d_out]."""
        biases = [None] * len(self.weight) if self.bias is None else self.bias
        if len(self.weight) == 1:
            return F.linear(x, self.weight[0], biases[0])
        y = None
        for one, (weight, bias) in enumerate(zip(self.weight, biases, strict=True)):
            rows = (self.number == one).nonzero()[:, 0]
            part = F.linear(x[rows], weight, bias)
            y = part.new_zeros(*x.shape[:-1], part.shape[-1]) if y is None else y
            y[rows] = part
        return y
