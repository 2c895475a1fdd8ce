"""Where a run computes: one process or several, CPU or CUDA, bf16 where the GPU has it."""

import logging
from types import SimpleNamespace

from expert_merging.errors import UserError


def make_accelerator(constants: SimpleNamespace):
    """The `accelerate.Accelerator` that `constants.device` asks for, with every random generator seeded.

    Raises UserError for an unknown device, and for "cuda" where there is none.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import set_seed

    if constants.device not in ("cuda", "cpu", "auto"):
        raise UserError(f"device is {constants.device!r}; it must be cuda, cpu or auto")
    if constants.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"scale {constants.scale} needs a CUDA device and torch sees none; "
            "run on a machine with a GPU, or give --device cpu for a trial"
        )
    # At every checkpoint it would say that tied weights are written once, which is meant.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    on_cpu = constants.device == "cpu" or not torch.cuda.is_available()
    set_seed(constants.seed)
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if on_cpu or not torch.cuda.is_bf16_supported() else "bf16",
        # An expert that received no token in any process has no gradient; the others must not wait for it.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
