"""The steps conversion and tuning: the dense model cut up into experts, and its routers and attention tuned."""

from pathlib import Path
from types import SimpleNamespace

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder
from expert_merging.hemoe import pipeline
from expert_merging.hemoe.dense_model import load_dense, tokenizer_of
from expert_merging.hemoe.examples import Examples
from expert_merging.hemoe.pipeline import seed_folder
from expert_merging.hemoe.splitting import split_of


def conversion(c: SimpleNamespace) -> None:
    """The dense model cut up by each split, as a folder that loads alone."""
    for method in c.methods:
        folder, wanted = seed_folder(c) / method / "model", pipeline.identity(c, "model", method=method)
        if pipeline.is_done(folder / "hemoe.json", wanted, claim=folder):
            continue
        import torch

        from expert_merging.hemoe.modeling import HEMoEConfig, HEMoEForCausalLM
        from expert_merging.hemoe.router_start import start_from_domains

        split, (dense, tokenizer), (_, _, router) = split_of(c, method), load_dense(c), pipeline.METHODS[method]
        config = HEMoEConfig(
            dense=dense.config.to_dict(), moe_layers=split.layers, experts=split.experts, k=c.router_k or c.num_experts,
            router="fixed" if router == "fixed" else "learned", router_std=c.router_std, balance_coef=c.balance_coef,
            balance_scale=c.balance_scale, balance_padding=c.balance_padding, domains=split.domains, serves=split.serves,
        )  # fmt: skip
        torch.manual_seed(c.seed)  # of the routers
        model = HEMoEForCausalLM(config, dense)
        if router == "domains":
            start_from_domains(model, Examples(c, tokenizer).batches("scored"))
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            pipeline.save(c, temporary / "hemoe.json", wanted, {"parameters": model.num_parameters()})


def tuning(c: SimpleNamespace) -> None:
    """LoRA on attention and the routers in full, experts frozen; the dense model with the same LoRA as a reference."""
    for method in (*c.methods, "dense_tuned"):
        folder, wanted = seed_folder(c) / method, pipeline.identity(c, "tuning", method=method)
        work = folder / "tuning.run"
        if pipeline.is_done(folder / "tuning.json", wanted, work):
            continue
        import torch

        from expert_merging.hemoe import tuning as lora
        from expert_merging.run.devices import make_accelerator
        from expert_merging.training import checkpoints

        device = make_accelerator(c).device
        dense = method == "dense_tuned"
        model, tokenizer = load_dense(c) if dense else (load_mixture(folder / "model"), tokenizer_of(c))
        torch.manual_seed(c.seed)
        model = lora.add_lora(model, c.lora_rank, c.lora_alpha, c.lora_dropout)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        checkpoints.claim(work, wanted)
        rows = Examples(c, tokenizer).rows(c.tune_steps * c.tune_batch * c.tune_accumulation, c.tune_tasks)
        fitted = lora.fit(
            model, rows, tokenizer.pad_token_id, work, steps=c.tune_steps, batch_size=c.tune_batch,
            accumulation=c.tune_accumulation, lr=c.tune_lr, last_lr=c.tune_last_lr, warmup=c.tune_warmup, seed=c.seed,
            on_cpu=device.type == "cpu", bf16=wanted["precision"] == "bf16", any_k=c.router_k == 0 and not dense,
            label=f"tuning {method}",
        )  # fmt: skip
        model = model.merge_and_unload()
        with new_folder(folder / "tuned") as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        pipeline.save(c, folder / "tuning.json", wanted, {"training": fitted, "trained_parameters": trained})
        checkpoints.release(work)
        print(f"{method}: loss {fitted['loss']:.3f} after {fitted['steps']} steps, {fitted['seconds']:.0f} s")


def load_mixture(folder: Path):
    """The mixture in a folder of the steps conversion or tuning. Raises UserError where there is none, or it is damaged."""
    from caem_files import cpu_kernels
    from expert_merging.core.hub import first_line
    from expert_merging.hemoe.modeling import HEMoEForCausalLM

    if not folder.exists():
        raise UserError(
            f"{folder} does not exist; run the step {'tuning' if folder.name == 'tuned' else 'conversion'} first"
        )
    try:
        return cpu_kernels.use_in(HEMoEForCausalLM.from_pretrained(folder))
    except Exception as error:  # a file cut short surfaces as whatever its reader raises
        raise UserError(f"{folder} is damaged ({first_line(error)}); remove it and run its step again") from error
