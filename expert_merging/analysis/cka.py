"""How alike two models represent the same inputs, layer by layer: linear CKA (paper, figures 2 and 4)."""

from types import SimpleNamespace

import torch

from expert_merging.core.bars import bar as progress_bar
from expert_merging.training.families import family_of


class LinearCKA:
    """Linear centred kernel alignment (Kornblith et al. 2019) of features that come in batches.

    With centred X [n, p] and Y [n, q] it is ||Y'X||^2 / (||X'X|| ||Y'Y||), in Frobenius norms: in [0, 1], and blind to
    rotation, isotropic scaling and translation of either. Only sums and cross-products are kept, in float64: memory is
    O(p^2 + q^2) however many rows come, and the value is that of all rows at once, however they are cut into batches.
    """

    def __init__(self) -> None:
        self.rows = 0

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in features [rows, p] and [rows, q] of the same inputs. Raises ValueError where the rows do not match."""
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(f"features must be [rows, p] and [rows, q], not {tuple(x.shape)} and {tuple(y.shape)}")
        if not len(x):
            return
        x, y = x.double(), y.double()
        if not self.rows:
            # Measured from the first row, large means cancel no digits, and what is constant is exactly 0.
            self._origins = x[0].clone(), y[0].clone()
            (p, q), like = (x.shape[1], y.shape[1]), {"dtype": x.dtype, "device": x.device}
            self._sums = torch.zeros(p, **like), torch.zeros(q, **like)
            self._products = torch.zeros(p, p, **like), torch.zeros(q, q, **like), torch.zeros(p, q, **like)
        x, y = x - self._origins[0], y - self._origins[1]
        for total, features in zip(self._sums, (x, y), strict=True):
            total += features.sum(0)
        for total, (a, b) in zip(self._products, ((x, x), (y, y), (x, y)), strict=True):
            total.addmm_(a.T, b)
        self.rows += len(x)

    def value(self) -> float:
        """The CKA of all rows so far.

        Raises ValueError where it is not defined (0 / 0: no rows, or features that are the same in every row) or the
        features are not finite.
        """
        if not self.rows:
            raise ValueError("CKA of no rows is not defined")
        x, y = self._sums
        xx, yy, xy = (
            torch.linalg.matrix_norm(product - torch.outer(a, b) / self.rows).item()
            for product, (a, b) in zip(self._products, ((x, x), (y, y), (x, y)), strict=True)
        )
        if xx == 0 or yy == 0:
            which = "first" if xx == 0 else "second"
            raise ValueError(f"CKA is not defined: the {which} features are the same in all {self.rows} rows")
        result = (xy / xx) * (xy / yy)
        if not 0 <= result < float("inf"):
            raise ValueError("CKA is not defined: some features are not finite")
        return result


def layerwise_cka(
    first, second, dataset, tokenizer, constants: SimpleNamespace, device: torch.device | str, label: str = ""
) -> dict[str, list[float]]:
    """Linear CKA between two models after each block, on real tokens, with the targets given (teacher forcing).

    The features of block l are transformers' hidden_states[l]; hidden_states[0], the embedding, is left out. So the last
    value of a stack is taken behind its final layer norm, as transformers gives it. Padding does not count. The models may
    differ in experts and in width.

    Args:
        first, second: models of one family on `device`, with the same tokenizer and numbers of layers.
        dataset: features with the columns input_ids and labels.
        constants: eval_batch_size; it does not change the values, but for rounding in the models.

    Returns:
        {stack: [one value a layer]}.

    Raises:
        ValueError: stacks of different depth; a layer whose features are constant or not finite.
    """
    layers: dict[str, list[LinearCKA]] = {}
    family = family_of(first)
    was_training = first.training, second.training
    first.eval()
    second.eval()
    bar = progress_bar(
        total=len(dataset), desc=label, unit="example", leave=False,
        disable=not label,
    )  # fmt: skip
    with torch.inference_mode(), bar:
        for batch in family.teacher_forced(dataset, tokenizer, constants):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            theirs = family.layer_states(second, batch)
            for stack, (ours, real) in family.layer_states(first, batch).items():
                if len(ours) != len(theirs[stack][0]):
                    raise ValueError(f"the {stack}s have {len(ours)} and {len(theirs[stack][0])} layers")
                layers.setdefault(stack, [LinearCKA() for _ in ours])
                for layer, x, y in zip(layers[stack], ours, theirs[stack][0], strict=True):
                    layer.update(x[real], y[real])
            bar.update(len(batch["labels"]))
    first.train(was_training[0])
    second.train(was_training[1])
    return {stack: [_named(layer, stack, i) for i, layer in enumerate(of_stack)] for stack, of_stack in layers.items()}


def _named(layer: LinearCKA, stack: str, number: int) -> float:
    try:
        return layer.value()
    except ValueError as error:
        raise ValueError(f"{stack}, layer {number + 1}: {error}") from error
