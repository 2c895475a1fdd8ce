"""The steps conversion and tuning: the dense model cut up into experts, and its routers and attention tuned."""

import time
from pathlib import Path
from types import SimpleNamespace

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder
from expert_merging.core.hub import first_line
from expert_merging.hemoe import pipeline
from expert_merging.hemoe.dense_model import load_dense, tokenizer_of
from expert_merging.hemoe.examples import Examples
from expert_merging.hemoe.pipeline import seed_folder
from expert_merging.hemoe.splitting import split_of

_ROUTERS = "routers.safetensors"


def conversion(c: SimpleNamespace) -> None:
    """The dense model cut up by each split: configuration and routers, since all else is the dense model's."""
    for method in c.methods:
        folder, wanted = seed_folder(c) / method / "model", pipeline.identity(c, "model", method=method)
        if pipeline.is_done(folder / "hemoe.json", wanted, claim=folder):
            continue
        import torch
        from safetensors.torch import save_file

        from expert_merging.hemoe.modeling import HEMoEConfig, HEMoEForCausalLM
        from expert_merging.hemoe.router_start import start_from_domains, start_from_gates

        started = time.perf_counter()
        split, (dense, tokenizer), router = (
            split_of(c, method),
            load_dense(c),
            pipeline.METHODS[method].router or c.router_start,
        )
        torch.manual_seed(c.seed)  # of the routers
        try:
            config = HEMoEConfig(
                dense=dense.config.to_dict(), moe_layers=split.layers, experts=split.experts, k=c.router_k or c.num_experts,
                router="fixed" if router == "fixed" else "learned", router_std=c.router_std, balance_coef=c.balance_coef,
                balance_scale=c.balance_scale, balance_padding=c.balance_padding, domains=split.domains, serves=split.serves,
            )  # fmt: skip
            model = HEMoEForCausalLM(config, dense)
        except ValueError as error:
            raise UserError(f"{seed_folder(c) / method / 'split.npz'} and {c.base_model}: {error}") from error
        if router == "domains":
            start_from_domains(model, Examples(c, tokenizer).batches("scored"))
        elif router == "gate":
            start_from_gates(model)
        with new_folder(folder) as temporary:
            config.save_pretrained(temporary)
            save_file(_routers(model), temporary / _ROUTERS)
            record = {"parameters": model.num_parameters(), "seconds": time.perf_counter() - started}
            pipeline.save(c, temporary / "hemoe.json", wanted, record)


def load_converted(c: SimpleNamespace, method: str):
    """The mixture as the step conversion left it. Raises UserError where it did not, or its folder is damaged."""
    folder = seed_folder(c) / method / "model"
    if not folder.exists():
        raise UserError(f"{folder} does not exist; run the step conversion first")
    pipeline.load(folder / "hemoe.json", "conversion", pipeline.identity(c, "model", method=method))
    from safetensors.torch import load_file

    from expert_merging.hemoe.modeling import HEMoEConfig, HEMoEForCausalLM

    dense, _ = load_dense(c)
    try:
        model = HEMoEForCausalLM(HEMoEConfig.from_pretrained(folder), dense)
        routers = load_file(folder / _ROUTERS)
        for name, router in _routers(model).items():
            router.copy_(routers[name])
    except Exception as error:  # a file cut short surfaces as whatever its reader raises
        raise UserError(f"{folder} is damaged ({first_line(error)}); remove it and run its step again") from error
    return model


def _routers(model) -> dict:
    """{name: weight [n, d]} of a mixture's routers."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".router.weight")}


def tuning(c: SimpleNamespace) -> None:
    """LoRA on attention and the routers in full, experts frozen; the dense model with the same LoRA as a reference."""
    pipeline.refuse_beside(c)
    for method in (*c.methods, "dense_tuned"):
        for end, tasks in pipeline.tunings(c).items():
            _tune(c, method, end, tasks)


def _tune(c: SimpleNamespace, method: str, end: str, tasks: tuple[str, ...]) -> None:
    folder, wanted = seed_folder(c) / method, pipeline.identity(c, "tuning", method=method, tune_tasks=tasks)
    work = folder / f"tuning{end}.run"
    if pipeline.is_done(folder / f"tuning{end}.json", wanted, work):
        return
    import torch

    from expert_merging.hemoe import tuning as lora
    from expert_merging.run.devices import make_accelerator
    from expert_merging.training import checkpoints

    device = make_accelerator(c).device
    dense = method == "dense_tuned"
    model, tokenizer = load_dense(c) if dense else (load_converted(c, method), tokenizer_of(c))
    torch.manual_seed(c.seed)
    model = lora.add_lora(model, c.lora_rank, c.lora_alpha, c.lora_dropout)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpoints.claim(work, wanted)
    rows = Examples(c, tokenizer).rows(c.tune_steps * c.tune_batch * c.tune_accumulation, tasks)
    fitted = lora.fit(
        model, rows, tokenizer.pad_token_id, work, steps=c.tune_steps, batch_size=c.tune_batch,
        accumulation=c.tune_accumulation, lr=c.tune_lr, last_lr=c.tune_last_lr, warmup=c.tune_warmup, seed=c.seed,
        on_cpu=device.type == "cpu", bf16=wanted["precision"] == "bf16", any_k=c.router_k == 0 and not dense,
        label=f"tuning {method}{end.replace('_', ' for ', 1)}",
    )  # fmt: skip
    model = model.merge_and_unload()
    with new_folder(folder / f"tuned{end}") as temporary:
        model.to(getattr(torch, c.save_dtype)).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    pipeline.save(c, folder / f"tuning{end}.json", wanted, {"training": fitted, "trained_parameters": trained})
    checkpoints.release(work)
    print(f"{method}{end}: loss {fitted['loss']:.3f} after {fitted['steps']} steps, {fitted['seconds']:.0f} s")


def load_tuned(folder: Path):
    """The mixture in a folder of the step tuning, in float32. Raises UserError where there is none, or it is damaged."""
    import torch

    from caem_files import cpu_kernels
    from expert_merging.core.host_memory import begin_anew
    from expert_merging.hemoe.modeling import HEMoEForCausalLM

    begin_anew()
    if not folder.exists():
        raise UserError(f"{folder} does not exist; run the step tuning first")
    try:
        return cpu_kernels.use_in(HEMoEForCausalLM.from_pretrained(folder, torch_dtype=torch.float32))
    except Exception as error:  # a file cut short surfaces as whatever its reader raises
        raise UserError(f"{folder} is damaged ({first_line(error)}); remove it and run its step again") from error
