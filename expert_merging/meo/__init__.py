"""MEO, "Merging Experts into One" (He et al., EMNLP 2023): several active experts at the price of one.

model = meo.convert(BertForMaskedLM.from_pretrained(folder), n=8, k=4)   # in place; train and use it as before
meo.set_mode(model, "moe")                                              # the same parameters as a vanilla MoE
meo.save(model, folder); model = meo.load(folder)
"""

from expert_merging.meo.conversion import balance_loss, convert, densify, linears, prompt, set_mode, set_task
from expert_merging.meo.linear import LEVELS, MODES, StackedLinear, TokenBlock
from expert_merging.meo.mixing import merge
from expert_merging.meo.storage import import_released, load, save

__all__ = [
    "LEVELS", "MODES", "StackedLinear", "TokenBlock", "balance_loss", "convert", "densify", "import_released", "linears",
    "load", "merge", "prompt", "save", "set_mode", "set_task",
]  # fmt: skip
