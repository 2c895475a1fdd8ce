"""Merging fine-tuned models of one pre-trained ancestor, a module a method.

Every method has the same call, `method(base, models, **settings)`: `base` and `models` map names to tensors (a state dict,
or `SafetensorsFolder`, which reads from disk), and what comes back yields (name, tensor) one after another, so
that no more than a few tensors are in memory. Nothing that is given is changed. Arithmetic is at least in float32 and
results have the dtype of `base`; tensors that are not of floating point are those of `base`; tied tensors count once.
`dict(method(...))` is a state dict, `write_tensors(method(...), folder)` a file.
"""

from expert_merging.merging.adamerging import adamerging, adamerging_plus
from expert_merging.merging.average import simple_average
from expert_merging.merging.dare import dare_task_arithmetic, dare_ties
from expert_merging.merging.fisher import fisher
from expert_merging.merging.regmean import regmean
from expert_merging.merging.task_arithmetic import task_arithmetic
from expert_merging.merging.ties import ties

__all__ = [
    "adamerging", "adamerging_plus", "dare_task_arithmetic", "dare_ties", "fisher", "regmean", "simple_average",
    "task_arithmetic", "ties",
]  # fmt: skip
