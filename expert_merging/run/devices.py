"""Where a run computes: one process or several, CPU or CUDA, bf16 where the GPU has it, weights whole or shared out."""

import logging
import os
import sys
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError


def make_accelerator(constants: SimpleNamespace, can_shard: bool = False):
    """The `accelerate.Accelerator` that `constants.device` asks for, with every random generator seeded.

    Launched with FSDP (fsdp.yaml), it has `shards`, by which `sharding.place` shares out models; accelerate's own FSDP,
    which knows no processes on CPUs, stays off. Raises UserError for an unknown device or precision, for "cuda" where
    there is none, for FSDP unless the script `can_shard`, and for DeepSpeed.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import set_seed

    from expert_merging.run import sharding

    if constants.device not in ("cuda", "cpu", "auto"):
        raise UserError(f"device is {constants.device!r}; it must be cuda, cpu or auto")
    precision = precision_of(constants)
    if constants.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"scale {constants.scale} needs a CUDA device and torch sees none; "
            "run on a machine with a GPU, or give --device cpu for a trial"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError("DeepSpeed is not supported: launch without it, or with fsdp.yaml (docs/paper_scale.md)")
    shards = sharding.asked()
    if shards and not can_shard:
        raise UserError("FSDP is for the fine-tuning of Switch Transformers only: launch this script without it")
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # or accelerate would shard by itself, and transformers load in parts
    # At every checkpoint it would say that tied weights are written once, which is meant.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    set_seed(constants.seed)
    accelerator = Accelerator(
        cpu=constants.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        # An expert that received no token in any process has no gradient; the others must not wait for it.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    accelerator.shards = shards
    return accelerator


def precision_of(constants: SimpleNamespace) -> str:
    """In what a run with these constants computes on this machine: bf16 or fp32. Raises UserError for neither nor auto."""
    if constants.precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision is {constants.precision!r}; it must be auto, bf16 or fp32")
    if constants.precision != "auto" or constants.device == "cpu":
        return constants.precision.replace("auto", "fp32")
    import torch

    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def become_several() -> None:
    """Where `accelerate launch --cpu --num_processes N` has started this process, start the N in its place, by torchrun.

    accelerate itself starts one process on a CPU, leaves the others to MPI, and forgets FSDP; what was asked for stands in
    its command line and in the configuration that this names. Raises UserError where the line cannot be read.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if not asked or any(n in os.environ for n in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")):
        return
    import psutil
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    words = psutil.Process().parent().cmdline()
    start = next((i for i, word in enumerate(words) if word.endswith(("launch", "launch.py"))), len(words))
    try:
        given = launch_command_parser().parse_args(words[start + 1 :])
        # Where there is none, asking None for its number of processes is the AttributeError below.
        config: Any = load_config_from_file(given.config_file) if given.config_file else None
        machines, processes = given.num_machines or 1, int(given.num_processes or config.num_processes)
    except (SystemExit, TypeError, AttributeError) as error:
        raise UserError(
            "accelerate starts one process on a CPU; for several give: torchrun --standalone --nproc_per_node 2 SCRIPT"
        ) from error
    if config and config.distributed_type == "FSDP":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ.update({name.upper(): str(value) for name, value in config.fsdp_config.items()})
    place: list[str | int] = ["--standalone"]
    if machines > 1:
        place = ["--nnodes", machines, "--node_rank", given.machine_rank, "--master_addr", given.main_process_ip]
        place += ["--master_port", given.main_process_port]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes // machines, *place]
    os.execv(sys.executable, [str(word) for word in [*torchrun, *sys.argv]])
