"""Converted models to and from disk, and the released code's checkpoints."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder, read_json, write_json
from expert_merging.meo.conversion import convert, linears, set_mode


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a folder with config.json, model.safetensors and meo.json, whole or not at all."""
    from safetensors.torch import save_model

    linears(model)
    with new_folder(folder) as temporary:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(temporary)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        how = {"dtype": dtype, "attention": model.config._attn_implementation}
        write_json(temporary / "meo.json", {**how, **model.meo_settings})
        save_model(model, str(temporary / "model.safetensors"), metadata={"format": "pt"})


def load(folder: str | Path) -> nn.Module:
    """The model that `save` wrote, in evaluation mode. Raises UserError where there is none."""
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    folder = Path(folder)
    settings = read_json(folder / "meo.json")
    settings.pop("drop_bias", None)  # of an earlier version, which could emulate the released code's loss of biases
    dtype, attention = getattr(torch, settings.pop("dtype")), settings.pop("attention")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])._from_config(config, attn_implementation=attention)
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    mode = settings["mode"]
    model = convert(model.to(dtype), **settings | {"mode": settings.pop("converted", mode)})
    set_mode(model, mode)
    try:
        load_model(model, folder / "model.safetensors")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the weights do not fit meo.json and config.json ({error})".splitlines()[0]
        ) from error
    return model.eval()


def import_released(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Load a state dict of the released code (github Shwai-He/MEO) into a converted model of the same n and level.

    Its MEO linears hold weight [n, out, in], its MoE linears experts.{i}.dense.weight. Biases, which it drops from BERT and
    BART, become 0 where the state has none. Decoders' gates read another input there and are left as they are.

    Returns the names of the state's tensors that have no place here. Raises UserError where weights are missing or do not fit,
    as at task level, where the released code's descriptions lie in the model's embeddings and are averaged with padding.
    """
    state = dict(state)
    for name in {
        match[1] for key in state if (match := re.fullmatch(r"(.+)\.experts\.\d+\.dense\.(?:weight|bias)", key))
    }:
        for part in ("weight", "bias"):
            experts: list[Tensor] = []
            while (key := f"{name}.experts.{len(experts)}.dense.{part}") in state:
                experts.append(state.pop(key))
            if experts:
                state[f"{name}.{part}"] = torch.stack(experts)
    for name, module in linears(model).items():
        for key in (f"{name}.mean", f"{name}.std"):
            state.pop(key, None)
        if f"{name}.weight" not in state:
            raise UserError(f"the checkpoint has no {name}.weight; is it of the same kind of model?")
        if module.bias is not None and f"{name}.bias" not in state:
            state[f"{name}.bias"] = torch.zeros_like(module.bias)
    own = model.state_dict()
    gates = [
        key for key in state if key in own and key.endswith((".w_gate", ".w_noise")) and _reads_encoder(model, key)
    ]
    for key in state:
        if key in own and key not in gates and state[key].shape != own[key].shape:
            raise UserError(
                f"{key} is {tuple(state[key].shape)} in the checkpoint, {tuple(own[key].shape)} in the model"
            )
    left = [key for key in state if key not in own] + gates
    done = model.load_state_dict({key: value for key, value in state.items() if key not in left}, strict=False)
    tied = {
        key
        for key, value in own.items()
        if any(value is not o and value.data_ptr() == o.data_ptr() for o in own.values())
    }
    ours = ("meo_tasks.ids", "meo_tasks.mask")  # the descriptions as they were given to convert
    missing = [key for key in done.missing_keys if key not in gates and key not in tied and key not in ours]
    if missing:
        raise UserError(f"the checkpoint has no {missing[0]} (and {len(missing) - 1} more)")
    return left


def _reads_encoder(model: nn.Module, key: str) -> bool:
    module = model.get_submodule(key.rpartition(".")[0])
    return module.stack.kind == "decoder" and module.level != "task"
