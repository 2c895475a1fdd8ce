"""Turn the FFN linears of a loaded Hugging Face model into stacked experts, and back."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from expert_merging.core.errors import UserError
from expert_merging.meo.linear import LEVELS, MODES, StackedLinear
from expert_merging.meo.mixing import merge
from expert_merging.meo.stacks import Stack

# The FFN linears by model family: the end of a module's name, as a regular expression.
PATTERNS = {
    "bert": r"encoder\.layer\.\d+\.(intermediate|output)\.dense",
    "gpt2": r"h\.\d+\.mlp\.(c_fc|c_proj)",
    "t5": r"DenseReluDense\.(wi|wi_0|wi_1|wo)",
    "bart": r"layers\.\d+\.fc[12]",
}


class TaskDescriptions(nn.Module):
    """The mean embedding of each task's description: the tokens' own table, not the model's. Padding does not count."""

    def __init__(self, descriptions: Sequence[Sequence[int]], size: int):
        super().__init__()
        longest = max(map(len, descriptions))
        ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in descriptions])
        mask = torch.tensor([[1.0] * len(tokens) + [0.0] * (longest - len(tokens)) for tokens in descriptions])
        self.register_buffer("ids", ids)
        self.register_buffer("mask", mask)
        self.table = nn.Embedding(int(ids.max()) + 1, size)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self) -> Tensor:
        """[tasks, size]."""
        mask = self.mask.to(self.table.weight.dtype)[..., None]
        return (self.table(self.ids) * mask).sum(1) / mask.sum(1)


def convert(
    model: nn.Module, *, n: int, k: int, level: str = "sequence", mode: str = "meo", pattern: str | None = None,
    prompt_gate: bool = False, descriptions: Sequence[Sequence[int]] | None = None, description_size: int = 128,
    gate_size: int = 8, balance: float = 0.01,
) -> nn.Module:  # fmt: skip
    """Replace, in place, each FFN linear of a transformers model by n copies of it and a gate (MEO, section 3).

    While the model is in training the balance loss, `balance` * CV^2 summed over linears, is added to the loss it returns.

    Args:
        k: experts that are active for a task, sequence or token.
        level: "task", "sequence" or "token"; what each mode makes of it: see StackedLinear.
        pattern: regular expression for the end of the linears' names; by default that of bert, gpt2, t5, bart.
        prompt_gate: let the gate of a decoder alone (GPT-2) read the prompt; without it such a gate is refused.
        descriptions: for level "task": the token ids of each task's description; set_task says whose turn it is.
        gate_size: for level "task": the size that descriptions are projected to for the gate.
    Raises UserError for what cannot be.
    """
    _check(model, n, k, level, mode, descriptions)
    kind = model.config.model_type
    if pattern is None and kind not in PATTERNS:
        raise UserError(
            f"no pattern known for the linears of a {kind} model; give one: pattern=r'mlp\\.(up|down)_proj'"
        )
    finds = re.compile(rf"(?:^|\.)(?:{pattern or PATTERNS[kind]})$").search
    names = [name for name, module in model.named_modules() if finds(name) and _is_linear(module)]
    if not names:
        raise UserError(f"no linear layer of this {kind} model has a name that ends like {pattern or PATTERNS[kind]}")
    settings = dict(
        n=n, k=k, level=level, mode=mode, pattern=pattern, prompt_gate=prompt_gate, descriptions=descriptions,
        description_size=description_size, gate_size=gate_size, balance=balance,
    )  # fmt: skip
    tasks = None
    if level == "task":
        first = model.get_submodule(names[0]).weight
        assert descriptions is not None  # else refused above
        tasks = TaskDescriptions(descriptions, description_size).to(first.device, first.dtype)
        model.meo_tasks = tasks
    stacks = _stacks(model, tasks)
    for name in names:
        parent, _, own = name.rpartition(".")
        linear = model.get_submodule(name)
        stack = next(stack for root, stack in stacks if any(module is linear for module in root.modules()))
        own_input = linear.weight.shape[1] if isinstance(linear, nn.Linear) else linear.weight.shape[0]
        by_encoder = stack.kind == "decoder" and (level, mode) != ("token", "moe")
        read_size = gate_size if level == "task" else _encoder_size(model) if by_encoder else own_input
        stacked = StackedLinear(linear, n, k, level, mode, stack, name, read_size, description_size)
        stacked.train(linear.training)
        setattr(model.get_submodule(parent), own, stacked)
    model.meo_settings = settings | {"converted": mode}  # which the gates' sizes follow, whatever set_mode says later
    model.register_forward_hook(_add_balance, with_kwargs=True)
    for root, stack in stacks:
        root.register_forward_pre_hook(stack.before_pass, with_kwargs=True)
        if stack.kind == "causal":
            model.register_forward_pre_hook(stack.before_model, with_kwargs=True, prepend=True)
            if hasattr(model, "generate"):
                model.generate = MethodType(_generate, model)
    set_mode(model, mode)
    return model


def linears(model: nn.Module) -> dict[str, StackedLinear]:
    """The stacked linears by name. Raises UserError where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, StackedLinear)}
    if not found:
        raise UserError("this model has no stacked linears; meo.convert makes them")
    return found


def set_mode(model: nn.Module, mode: str) -> None:
    """Run the same parameters as "dense" (the first expert), "moe" or "meo". Raises UserError where the gates do not fit."""
    if mode not in MODES:
        raise UserError(f"mode is one of {', '.join(MODES)}, not {mode}")
    modules, settings = linears(model), model.meo_settings
    for name, module in modules.items():
        by_token = module.level == "token" and mode == "moe"
        reads_sequence = mode != "dense" and module.level != "task" and not by_token
        if by_token and len(module.w_gate) != module.d_in:
            raise UserError(
                f"the gate of {name} reads the encoder's output, not tokens; convert with mode='moe' for that"
            )
        if reads_sequence and module.stack.kind == "decoder" and len(module.w_gate) != _encoder_size(model):
            raise UserError(
                f"the gate of {name} reads tokens, not the encoder's output; convert with mode='meo' for that"
            )
        if reads_sequence and module.stack.kind == "causal" and not settings["prompt_gate"]:
            raise UserError(
                "a sequence's gate inside a causal decoder would read the tokens to be predicted: use level='task',"
                " level='token' with mode='moe', or prompt_gate=True, where the gate reads the prompt only"
            )
        module.stack.needs_prompt = reads_sequence and module.stack.kind == "causal"
    for module in modules.values():
        module.mode = mode
        module.stack.forget()
    settings["mode"] = mode


def set_task(model: nn.Module, task: int | Tensor) -> None:
    """At task level: the number of the task's description for the passes to come, one for all or one a sequence [B]."""
    if not hasattr(model, "meo_tasks"):
        raise UserError("set_task is for models converted with level='task'")
    known = len(model.meo_tasks.ids)
    numbers = [task] if isinstance(task, int) else task.tolist()
    if not all(0 <= number < known for number in numbers):
        raise UserError(f"tasks are numbered 0 to {known - 1}, got {numbers}")
    for module in linears(model).values():
        module.stack.task = task


@contextlib.contextmanager
def prompt(model: nn.Module, mask: Tensor | str) -> Iterator[None]:
    """For causal decoders with prompt_gate: mask [B, S] is 1 on the prompt's tokens, or "input": all that is given is."""
    stacks = {module.stack for module in linears(model).values() if module.stack.kind == "causal"}
    before = {stack: stack.prompt for stack in stacks}
    for stack in stacks:
        stack.prompt = mask
    try:
        yield
    finally:
        for stack, value in before.items():
            stack.prompt = value


def balance_loss(model: nn.Module) -> Tensor:
    """The balance loss of the last pass in training, factor included: what was added to the model's loss."""
    stacks = {module.stack for module in linears(model).values()}
    losses = [loss for stack in stacks for loss in stack.balances.values()]
    if not losses:
        return torch.zeros(())
    total = model.meo_settings["balance"] * torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
    if torch.is_grad_enabled() and not total.requires_grad and next(iter(linears(model).values())).w_gate.requires_grad:
        raise UserError(
            "reentrant gradient checkpointing loses the balance loss's gradient; use"
            " model.gradient_checkpointing_enable({'use_reentrant': False})"
        )
    return total


def densify(model: nn.Module, gates: dict[str, Tensor] | None = None, task: int | None = None) -> nn.Module:
    """Put, in place, one merged linear of the original class where each stack was: a stock model again.

    Args:
        gates: gates [n] by name of linear, for any level; else those of task level are used.
        task: the description's number at task level; by default the one that set_task set.
    Raises UserError where the level has no one set of gates, or a token block stands before the linears.
    """
    modules = linears(model)
    mode = model.meo_settings["mode"]
    if any(module.level == "token" and mode != "moe" for module in modules.values()):
        raise UserError("a token block is not linear and cannot be merged into the layer; densify needs another level")
    for name, module in modules.items():
        given = _gates(module, mode, None if gates is None else gates[name], task).to(module.weight.device)
        with torch.no_grad():
            weight = merge(module.weight, given[None])[0]
            bias = None if module.bias is None else merge(module.bias, given[None])[0]
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _plain_linear(module, weight, bias))
    if hasattr(model, "meo_tasks"):
        del model.meo_tasks
    if "generate" in vars(model):
        del model.generate
    del model.meo_settings
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if hook is _add_balance or isinstance(getattr(hook, "__self__", None), Stack):
                    hooks.pop(number)
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
                    module._forward_hooks_with_kwargs.pop(number, None)
    return model


def _gates(module: StackedLinear, mode: str, given: Tensor | None, task: int | None) -> Tensor:
    if given is not None:
        return given
    if mode == "dense":
        return torch.eye(module.n)[0]
    if module.level != "task":
        raise UserError(f"at {module.level} level gates differ from input to input: give densify those to merge by")
    task = module.stack.task if task is None else task
    if not isinstance(task, int):
        raise UserError("densify makes a model of one task: say which")
    with torch.no_grad():
        return module.task_gates()[task]


def _plain_linear(module: StackedLinear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    if module.transposed:
        from transformers.pytorch_utils import Conv1D

        plain = Conv1D(1, 1)
        plain.nf, plain.nx = module.d_out, module.d_in
        weight = weight.mT.contiguous()
        bias = weight.new_zeros(module.d_out) if bias is None else bias
    else:
        plain = nn.Linear(module.d_in, module.d_out, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight)
    plain.bias = None if bias is None else nn.Parameter(bias)
    return plain.train(module.training)


def _check(model, n: int, k: int, level: str, mode: str, descriptions) -> None:
    if not 1 <= k <= n:
        raise UserError(f"k, the active experts, is from 1 to n: got k={k}, n={n}")
    if level not in LEVELS:
        raise UserError(f"level is one of {', '.join(LEVELS)}, not {level}")
    if mode not in MODES:
        raise UserError(f"mode is one of {', '.join(MODES)}, not {mode}")
    if level == "task" and not (descriptions and all(len(tokens) for tokens in descriptions)):
        raise UserError("level='task' needs descriptions: the token ids of at least one task's description")
    if any(isinstance(module, StackedLinear) for module in model.modules()):
        raise UserError("this model is converted already; meo.set_mode changes how it runs")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _stacks(model: nn.Module, tasks: nn.Module | None) -> list[tuple[nn.Module, Stack]]:
    """(module, state) of the encoder and decoder; whichever comes first holds a linear."""
    if model.config.is_encoder_decoder:
        inner = model if hasattr(model, "get_encoder") else model.base_model
        found = [(inner.get_encoder(), Stack("encoder", tasks))]
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
        return [*found, (decoder, Stack("decoder", tasks))] if decoder is not None else found
    return [(model.base_model, Stack("causal" if _is_causal(model) else "encoder", tasks))]


def _is_causal(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = model.config.model_type
    return getattr(model.config, "is_decoder", False) or (kind in CAUSAL and kind not in MASKED)


def _encoder_size(model: nn.Module) -> int:
    return model.config.hidden_size


def _add_balance(model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook: in training the loss that the model returns has the balance loss in it."""
    if model.training and torch.is_grad_enabled():
        if isinstance(output, tuple):
            return (output[0] + balance_loss(model), *output[1:]) if kwargs.get("labels") is not None else output
        if getattr(output, "loss", None) is not None:
            output.loss = output.loss + balance_loss(model).to(output.loss.device)
    return output


def _generate(model: nn.Module, *args, **kwargs):
    """generate() of a causal model: all that it is given is prompt."""
    with prompt(model, "input"):
        return type(model).generate(model, *args, **kwargs)
