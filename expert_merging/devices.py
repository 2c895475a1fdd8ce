"""Where a run computes: one process or several, CPU or CUDA, bf16 where the GPU has it."""

import logging
import os
import sys
from types import SimpleNamespace

from expert_merging.errors import UserError


def make_accelerator(constants: SimpleNamespace):
    """The `accelerate.Accelerator` that `constants.device` asks for, with every random generator seeded.

    Raises UserError for an unknown device or precision, for "cuda" where there is none, and for a launch with FSDP or
    DeepSpeed: every process holds the whole model here, and decodes its own share of the examples, which sharded weights
    do not allow.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import set_seed

    if constants.device not in ("cuda", "cpu", "auto"):
        raise UserError(f"device is {constants.device!r}; it must be cuda, cpu or auto")
    if constants.precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision is {constants.precision!r}; it must be auto, bf16 or fp32")
    if constants.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"scale {constants.scale} needs a CUDA device and torch sees none; "
            "run on a machine with a GPU, or give --device cpu for a trial"
        )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(f"{name} is not supported: launch several processes without it (README, Several GPUs)")
    # At every checkpoint it would say that tied weights are written once, which is meant.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    on_cpu = constants.device == "cpu" or not torch.cuda.is_available()
    bf16 = {"auto": not on_cpu and torch.cuda.is_bf16_supported(), "bf16": True, "fp32": False}[constants.precision]
    set_seed(constants.seed)
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if bf16 else "no",
        # An expert that received no token in any process has no gradient; the others must not wait for it.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def become_several() -> None:
    """Where `accelerate launch --cpu --num_processes N` has started this process, start the N in its place, by torchrun.

    accelerate itself starts one process on a CPU and leaves the others to MPI; what was asked for stands in its command
    line. Raises UserError where that cannot be read.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if not asked or any(n in os.environ for n in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")):
        return
    import psutil
    from accelerate.commands.launch import launch_command_parser

    words = psutil.Process().parent().cmdline()
    start = next((i for i, word in enumerate(words) if word.endswith(("launch", "launch.py"))), len(words))
    try:
        given = launch_command_parser().parse_args(words[start + 1 :])
        machines, processes = given.num_machines or 1, int(given.num_processes)
    except (SystemExit, TypeError) as error:
        raise UserError(
            "accelerate starts one process on a CPU; for several give: torchrun --standalone --nproc_per_node 2 SCRIPT"
        ) from error
    place = ["--standalone"]
    if machines > 1:
        place = ["--nnodes", machines, "--node_rank", given.machine_rank, "--master_addr", given.main_process_ip]
        place += ["--master_port", given.main_process_port]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes // machines, *place]
    os.execv(sys.executable, [str(word) for word in [*torchrun, *sys.argv]])
