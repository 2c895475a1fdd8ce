"""Model folders written as the tensors come."""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from expert_merging.core import safetensors_stream
from expert_merging.core.safetensors_folder import Kind, SafetensorsFolder
from expert_merging.core.safetensors_stream import DTYPES, shards, size, write_stream

kinds_of_models = st.dictionaries(
    st.text("abc.é", min_size=1, max_size=5),
    st.builds(Kind, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    min_size=1,
    max_size=8,
)


def tensor_of(kind: Kind, seed: int) -> torch.Tensor:
    return torch.randint(0, 2, kind.shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[kind.dtype])


@given(kinds_of_models, st.integers(1, 300), st.randoms(use_true_random=False))
def test_what_is_written_in_any_order_is_read_back(kinds, most, dice):
    import tempfile
    from pathlib import Path

    tensors = [(name, tensor_of(kind, i)) for i, (name, kind) in enumerate(kinds.items())]
    dice.shuffle(tensors)
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_stream, "SHARD_BYTES", most)
        write_stream(iter(tensors), kinds, Path(place))
        folder = SafetensorsFolder(place)
        assert folder.kinds() == kinds
        assert all(folder[name].dtype == tensor.dtype and torch.equal(folder[name], tensor) for name, tensor in tensors)
        for file in folder.files:
            held = load_file(file)
            content = file.read_bytes()
            length = int.from_bytes(content[:8], "little")
            for name, entry in json.loads(content[8 : 8 + length]).items():  # where readers that map files want them
                assert (
                    name == "__metadata__" or (8 + length + entry["data_offsets"][0]) % held[name].element_size() == 0
                )
            assert len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= most


@given(kinds_of_models, st.integers(1, 300))
def test_shards_hold_every_tensor_once_and_no_file_could_take_the_next(kinds, most):
    files = shards(kinds, most)
    assert [name for held in files for name in held] == list(kinds)
    for held, after in zip(files, files[1:], strict=False):
        assert sum(map(size, held.values())) + size(next(iter(after.values()))) > most


def test_no_more_than_one_tensor_is_held(tmp_path):
    kinds = {f"t{i}": Kind("F32", (10,)) for i in range(4)}
    alive = []

    def come():
        import weakref

        for name in random.Random(0).sample(sorted(kinds), 4):
            tensor = torch.zeros(10)
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            assert sum(one() is not None for one in alive) <= 1

    write_stream(come(), kinds, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([("a", torch.zeros(3)), ("b", torch.zeros(2))], "a came as torch.float32"),
        ([("a", torch.zeros(2).half()), ("b", torch.zeros(2))], "a came as torch.float16"),
        ([("a", torch.zeros(2)), ("a", torch.zeros(2))], "a came"),
        ([("c", torch.zeros(2))], "c came"),
        ([("a", torch.zeros(2))], "b did not come"),
    ],
)
def test_what_was_not_to_come(tmp_path, tensors, said):
    with pytest.raises(ValueError, match=said):
        write_stream(tensors, {"a": Kind("F32", (2,)), "b": Kind("F32", (2,))}, tmp_path)
