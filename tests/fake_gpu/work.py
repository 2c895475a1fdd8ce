"""Run by test_fake_gpu.py in a process of its own: `python work.py no_gpu.so` trains and decodes with a small Switch
Transformer on a GPU that is not there, with tensors that have a shape and a device but no content. An operation between
devices raises. Prints, as JSON, how often the host waited for the device in each case."""

import contextlib
import ctypes
import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so"):
    ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers.models.switch_transformers import modeling_switch_transformers as switch  # noqa: E402

from expert_merging.switch.idle_experts import pass_over_idle  # noqa: E402

ROWS, INPUTS, TARGETS, EXPERTS, LAYERS = 4, 12, 6, 4, 2  # LAYERS: sparse ones, of both stacks together


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device, and copies from the host to it."""

    def __init__(self):
        super().__init__()
        self.waits, self.copies = 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_gpu = any(isinstance(a, torch.Tensor) and a.is_cuda for a in args)
        name = operation.overloadpacket.__name__
        target = kwargs.get("device")
        if name in ("_local_scalar_dense", "nonzero", "equal") and on_gpu:
            self.waits += 1
        if name in ("_to_copy", "copy_") and target is not None:
            self.waits += on_gpu and torch.device(target).type == "cpu"
            self.copies += not on_gpu and torch.device(target).type == "cuda"
        return operation(*args, **kwargs)

    @contextlib.contextmanager
    def numbers(self):
        """`tolist` waits, too, and gives numbers that could be: here the same for all experts."""

        def tolist(tensor):
            self.waits += 1
            rows = [1] * tensor.shape[-1]  # of as many tokens as there are at least
            return rows if tensor.dim() == 1 else [rows] * len(tensor)

        make = torch.tensor

        def tensor(data, **given):
            self.copies += torch.device(given.get("device") or "cpu").type == "cuda"
            return make(data, **given)

        with self, mock.patch.object(FakeTensor, "tolist", tolist), mock.patch.object(torch, "tensor", tensor):
            yield self


def new_model(**settings):
    config = switch.SwitchTransformersConfig(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=EXPERTS, expert_capacity=64,
        decoder_start_token_id=0, **settings,
    )  # fmt: skip
    with torch.device("cuda"):
        return switch.SwitchTransformersForConditionalGeneration(config)


def batch(targets=True):
    ids = torch.ones(ROWS, INPUTS, dtype=torch.long, device="cuda")
    labels = {"labels": torch.ones(ROWS, TARGETS, dtype=torch.long, device="cuda")} if targets else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **labels}


def training(bf16: bool, checkpointing: str | None = None, counting: str | None = None) -> dict[str, int]:
    """A step: forward, loss, backward, AdamW."""
    model = new_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    model.set_usage_counting(counting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pass_over_idle(model, optimizer)
    data = batch()
    with Waits().numbers() as forward, torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss = model(**data, use_cache=False).loss
    with Waits().numbers() as backward:
        loss.backward()
    with Waits().numbers() as step:
        optimizer.step()
    assert loss.is_cuda and all(p.grad is None or p.grad.is_cuda for p in model.parameters())
    return {"forward": forward.waits, "backward": backward.waits, "step": step.waits, "copies": forward.copies}


def decoding(bf16: bool, counting: str | None = None) -> dict[str, int]:
    """The encoder and three steps of the decoder with a cache."""
    model = new_model().eval()
    model.set_usage_counting(counting)
    data = batch(targets=False)
    tokens, cache = torch.zeros(ROWS, 1, dtype=torch.long, device="cuda"), None
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        with Waits().numbers() as encoder:
            encoded = model.get_encoder()(**data, output_router_logits=False)
        with Waits().numbers() as decoder:
            for _ in range(3):
                output = model(
                    encoder_outputs=encoded, attention_mask=data["attention_mask"], decoder_input_ids=tokens,
                    past_key_values=cache, use_cache=True, output_router_logits=False,
                )  # fmt: skip
                cache = output.past_key_values
    usage = model.expert_usage()
    assert output.logits.is_cuda and all(counts.is_cuda for counts in usage.values())
    return {"encoder": encoder.waits, "decoder": decoder.waits, "copies": decoder.copies}


def main() -> None:
    results = {}
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_, **__: True  # or autocast stays off
    for grouped in (False, True):
        switch._has_grouped_products = lambda device, grouped=grouped: grouped
        for bf16 in (False, True):
            gpu = f"{'with' if grouped else 'without'} grouped products, {'bf16' if bf16 else 'fp32'}"
            with FakeTensorMode():
                for way in (None, "reentrant", "not reentrant"):
                    results[f"training, checkpointing {way}, {gpu}"] = training(bf16, checkpointing=way)
                for counting in ("paper", "released"):
                    results[f"training, counting {counting}, {gpu}"] = training(bf16, counting=counting)
                for counting in (None, "paper", "released"):
                    results[f"decoding, counting {counting}, {gpu}"] = decoding(bf16, counting)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
