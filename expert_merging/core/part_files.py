"""The files `{layer}.part.{experts}` of EMoE's and HEMoE's code: which experts each neuron of a feed-forward layer goes to."""

from pathlib import Path

from expert_merging.core.errors import UserError


def read_part_file(path: Path, experts: int) -> tuple[list[list[int]], int]:
    """The neurons of each expert, ascending, each once, and how many neurons the layer has.

    Line i names the experts of neuron i, with commas between several; a neuron may stand in none.

    Raises UserError where the file cannot be read, or names an expert that is not below `experts`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        layer = path.name.partition(".")[0]
        there = ", ".join(sorted(one.name for one in path.parent.glob(f"{layer}.part.*"))) or "none"
        raise UserError(f"cannot read {path}; of layer {layer} there is {there}") from error
    groups: list[list[int]] = [[] for _ in range(experts)]
    for neuron, line in enumerate(lines):
        words = [word.strip() for word in line.split(",") if word.strip()]
        for word in words:
            if not (word.isascii() and word.isdigit() and int(word) < experts):
                raise UserError(f"{path}, line {neuron + 1}: {word!r} is not an expert of 0 to {experts - 1}")
        for expert in set(map(int, words)):
            groups[expert].append(neuron)
    return groups, len(lines)
