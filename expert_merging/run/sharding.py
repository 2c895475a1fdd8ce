"""A model shared out over the processes, for one that fits on none of their devices: torch's fully sharded data parallel
(FSDP2), block by block.

A process keeps its part of every weight, with the gradient and the optimizer's states of that part, and has a block whole
only while it computes with it. The processes therefore make the same forward passes at the same time: each trains on its
share of the examples, as without sharding, but evaluates all of them.

torch's own functions are called, on CPUs and GPUs alike: accelerate (1.15) has no FSDP for processes on CPUs, and in
bfloat16 it would put what goes from block to block in that precision too.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import distributed
from torch.utils._pytree import tree_map
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersBlock,
    SwitchTransformersForConditionalGeneration,
)

from expert_merging.core.errors import UserError

# What `accelerate launch` hands on of its configuration, where it decides something; sharding is one way only.
_SETTINGS = {
    "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}  # fmt: skip


def asked() -> bool:
    """Whether this process was launched with FSDP, as `accelerate launch --config_file fsdp.yaml` does.

    Raises UserError where a setting is another than in fsdp.yaml.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for name, value in _SETTINGS.items():
        if (given := os.environ.get(name, value).lower()) != value:
            raise UserError(f"{name.lower()} is {given}; only {value} is supported (see fsdp.yaml)")
    return True


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `place` has shared `model` out."""
    return hasattr(model, "unshard")  # torch's FSDPModule has; importing that takes seconds


def place(accelerator, model):
    """`model` on the accelerator's device; a Switch Transformer whole in memory becomes a sharded one, in place, where
    the launch asks for it and there are several processes. Raises UserError there for another model."""
    if is_sharded(model):
        return model
    if not getattr(accelerator, "shards", False) or accelerator.num_processes == 1:
        return model.to(accelerator.device)
    if not isinstance(model, SwitchTransformersForConditionalGeneration):
        raise UserError(
            f"fsdp.yaml shares out Switch Transformers only, not {model.config.model_type}: launch without it"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        # Under autocast alone the backward pass would keep a bfloat16 copy of every block.
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [module for module in model.modules() if isinstance(module, SwitchTransformersBlock)]:
        if block.is_sparse:
            fully_shard(block.layer[-1].mlp.router.classifier, mesh=mesh)  # the router has a precision of its own
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # the rest: embedding and last norms
    # An expert without tokens in one process may have some in another, which would wait for its gradient.
    model.set_reduce_scatter_unused_params(True)
    if accelerator.mixed_precision != "no":
        model.forward = convert_outputs_to_fp32(_autocast(accelerator, model.forward))
    model.register_forward_hook(_decode_alike)
    # A block's outputs are no place for changes in place, and the model makes none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # The first pass tells FSDP which module is the root; an encoder called by itself would mislead it.
    was_training, token = model.training, torch.zeros(1, 1, dtype=torch.long, device=accelerator.device)
    model.eval()
    with evaluation(model):
        model(input_ids=token, decoder_input_ids=token, use_cache=False)
    return model.train(was_training)


def _autocast(accelerator, forward):
    @functools.wraps(forward)
    def in_precision(*arguments, **named):
        with accelerator.autocast():
            return forward(*arguments, **named)

    return in_precision


def _decode_alike(model, arguments, output) -> None:
    """While decoding all go by the first process's logits: rounding must not let one of them stop before the others."""
    if not model.training and output.past_key_values is not None:
        distributed.broadcast(output.logits, 0)


@contextlib.contextmanager
def evaluation(model) -> Iterator[None]:
    """Without gradients; parts of a sharded model (its encoder) may be called by themselves."""
    if not is_sharded(model):
        with torch.inference_mode():
            yield
        return
    with torch.no_grad():  # what inference mode gathers could not be trained with later
        model.unshard()  # what is in no block
        yield
        model.reshard()


def share(accelerator, model) -> tuple[int, int]:
    """(i, n): this process evaluates every n-th batch of examples, from the i-th on; of a sharded model all."""
    return (0, 1) if is_sharded(model) else (accelerator.process_index, accelerator.num_processes)


def pass_over_unused(model, optimizer: torch.optim.Optimizer) -> None:
    """Let the steps of `optimizer` leave experts as they are that had no token in any process, as where weights are whole.

    FSDP gives these a gradient of zeros, by which AdamW would move and decay them.
    """
    names, used = {name: number for number, (name, _) in enumerate(model.named_parameters())}, set()

    def note(name: str, parameter: torch.Tensor) -> None:
        used.add(names[name])

    for prefix, module in model.named_modules():
        if is_sharded(module):
            with torch.no_grad():
                module.unshard()
            for name, parameter in module.named_parameters(prefix):
                if not hasattr(parameter, "to_local"):  # this module's own, and whole for now
                    parameter.register_post_accumulate_grad_hook(functools.partial(note, name))
            module.reshard()

    def drop_others(*_) -> None:
        parameters = list(model.parameters())
        times = torch.zeros(len(names), device=parameters[0].device)
        times[sorted(used)] = 1
        distributed.all_reduce(times)
        for parameter, number in zip(parameters, times.tolist(), strict=True):
            if not number:
                parameter.grad = None
        used.clear()

    optimizer.register_step_pre_hook(drop_others)


def all_finite(accelerator, model) -> bool:
    """Whether every weight is a number, in all processes."""
    bad = sum(not bool(_local(tensor).isfinite().all()) for tensor in model.parameters())
    return accelerator.reduce(torch.tensor(bad, device=accelerator.device), "sum").item() == 0


def whole(accelerator, model):
    """The model without wrapping and with all its weights: of a sharded one on the main process a copy on the CPU, on the
    others None. All processes take part."""
    if not is_sharded(model):
        return accelerator.unwrap_model(model)
    gathered: dict[torch.Tensor, torch.Tensor | None] = {}  # tied weights once
    state = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if tensor not in gathered:
            full = tensor.detach().full_tensor()
            gathered[tensor] = full.to("cpu", copy=True) if accelerator.is_main_process else None
        state[name] = gathered[tensor]
    if not accelerator.is_main_process:
        return None
    with torch.device("meta"):
        result = SwitchTransformersForConditionalGeneration(model.config)
    result.load_state_dict(state, assign=True)
    result.tie_weights()
    result.generation_config = model.generation_config
    return result.eval()


def save(accelerator, model, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write this process's part of the weights and of the optimizer's states into `folder`, as plain tensors."""
    state = {"model": dict(model.named_parameters()), "optimizer": optimizer.state_dict()}
    torch.save(tree_map(_local, state), folder / _file(accelerator))


def load(accelerator, model, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take back what `save` wrote, with the same number of processes."""
    state = torch.load(folder / _file(accelerator), map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _local(parameter).copy_(state["model"][name])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["optimizer"]["state"].items():
        values.update({key: _part_of(parameters[number], value) for key, value in values.items() if value.dim() > 0})
    optimizer.load_state_dict(state["optimizer"])


def _file(accelerator) -> str:
    return f"shard_{accelerator.process_index}.bin"


def _local(value: Any) -> Any:
    """This process's part, where `value` is a sharded tensor."""
    return value.detach().to_local() if hasattr(value, "to_local") else value


def _part_of(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A tensor shared out as `parameter` is, from this process's part."""
    from torch.distributed.tensor import DTensor

    local = local.to(_local(parameter).device)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
