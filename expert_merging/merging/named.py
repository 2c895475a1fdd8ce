"""Named tensors that are computed when they are asked for, and rebuilding a model from them, tensor by tensor."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

Tensors = Mapping[str, torch.Tensor]


class Computed(Mapping[str, torch.Tensor]):
    """The tensors `compute(name)` for `names`; each is computed at every access and not kept."""

    def __init__(self, names: Sequence[str], compute: Callable[[str], torch.Tensor]):
        self.names, self.compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def tied_names(tensors: Tensors) -> dict[str, list[str]]:
    """{name: further names of the same tensor}, in order. Files hold a tied tensor once, state dicts under every name."""
    found: dict[str, list[str]] = {}
    first: dict[tuple, str] = {}
    for name in tensors:
        # What is read from disk has no lasting address, and what is on the meta device none at all.
        if isinstance(tensors, dict) and tensors[name].numel() and tensors[name].data_ptr():
            tensor = tensors[name]
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if (owner := first.setdefault(place, name)) != name:
                found[owner].append(name)
                continue
        found[name] = []
    return found


def float_names(tensors: Tensors) -> list[str]:
    """Names of the tensors of floating point, a tied one once."""
    return [name for name in tied_names(tensors) if tensors[name].is_floating_point()]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, without gradient, in float32, or in float64 if it is."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def check_alike(base: Tensors, models: Sequence[Tensors]) -> None:
    """Raises ValueError without models, or where a model's names are not those of `base`."""
    if not models:
        raise ValueError("there is no model to merge")
    names = set(tied_names(base))
    for i, model in enumerate(models):
        if differing := sorted(names ^ set(tied_names(model))):
            raise ValueError(f"model {i} and the base model are not of one shape: only one of them has {differing[0]}")


def same_shape(name: str, base: torch.Tensor, tensor: torch.Tensor, i: int) -> torch.Tensor:
    """`tensor` of model `i`. Raises ValueError where its shape is not that of `base`."""
    if tensor.shape != base.shape:
        raise ValueError(f"{name} is {tuple(base.shape)} in the base model and {tuple(tensor.shape)} in model {i}")
    return tensor


def task_vectors(base: Tensors, models: Sequence[Tensors]) -> list[Computed]:
    """What fine-tuning added, model - base, for each model and tensor of floating point (task arithmetic, section 2).

    Raises ValueError where names (here) or shapes (on access) differ.
    """
    check_alike(base, models)
    names = float_names(base)

    def of(i: int) -> Callable[[str], torch.Tensor]:
        def difference(name: str) -> torch.Tensor:
            origin = wide(base[name])
            return wide(same_shape(name, origin, models[i][name], i)).to(origin.device) - origin

        return difference

    return [Computed(names, of(i)) for i in range(len(models))]


def rebuilt(base: Tensors, make: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) for all names of `base`: `make(name)` in base's dtype, or base's own where that is not floating point.

    A tied tensor is made once and follows at once under its other names, the same object.
    """
    for name, others in tied_names(base).items():
        tensor = base[name]
        if tensor.is_floating_point():
            dtype = tensor.dtype
            del tensor  # before another is made
            made = make(name).to(dtype)
        else:
            made = tensor.clone()
        for one in (name, *others):
            yield one, made


def added(base: Tensors, change: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """As `rebuilt`: base + change(name)."""
    return rebuilt(base, lambda name: change(name) + wide(base[name]))
