"""Merges Hugging Face folders of one architecture: python tools/merge.py --method ties --base B --models A1 A2 --out F

Reads   the base and the models: folders with safetensors files, or LoRA adapters of the base (peft's).
Writes  out: a Hugging Face folder with the base's configuration and tokenizer, and a card, README.md.
Takes   a few times reading the sources. Memory: a few tensors of each source at once; TIES, trimming over the whole model,
        reads the sources five times; Iso-C and TSV-M need room for a matrix's singular vectors in float64.
"""

from expert_merging.run.constants import run

method = "ties"  # those of expert_merging/merging/registry.py that need no data, or caem, for mixtures of experts
base = ""  # the model that all were fine-tuned from; average does without
models = ("",)  # folders
out = ""  # the folder to be made
set = ("",)  # constants of the method, name=value, by their names in its function or in the registry
usage = ("",)  # caem: a file a model, {"layers": [[tokens sent to each expert], ..]}, counted on validation data
experts = 0  # caem: experts a sparse layer of the result
common_rows = False  # where vocabularies differ: merge the rows of the tokens that all have, keep the base's others
allow_unchanged = False  # go on where a tensor comes out as the base's although the sources differ
push_to = ""  # owner/name on the hub


def main(c):
    import functools
    import sys
    from pathlib import Path

    from caem_files import install
    from expert_merging.core.errors import UserError
    from expert_merging.core.host_memory import give_back_freed_memory
    from expert_merging.merging import folder_card, from_folders, moe_caem
    from expert_merging.merging.registry import METHODS

    if found := install.problem():
        raise UserError(found)
    give_back_freed_memory()
    # What is asked for, checked as far as it goes without reading a tensor.
    from_folders.check_request(c.method, c.base, c.models, c.out, also=("caem",))
    moe_caem.check_request(c.method, c.usage, c.experts, c.common_rows)
    method, out = moe_caem.CAEM if c.method == "caem" else METHODS[c.method], Path(c.out)
    arguments = from_folders.arguments_of(method, c.set, c.seed)
    base, models, notes = from_folders.open_sources(c.base, c.models)
    if c.push_to:
        folder_card.check_hub(c.push_to)

    command = ["python", "tools/merge.py", *sys.argv[1:]]
    card = functools.partial(folder_card.card, out, base, models, method.label, arguments, command, c.usage)

    # Merged and written a tensor at a time.
    if not from_folders.is_done(out, card):
        with from_folders.reading_bar(method, models) as bar:
            if method is moe_caem.CAEM:
                merged = moe_caem.merge(base, models, c.usage, c.experts, **arguments, moved=bar.update)
            else:
                merged = from_folders.merge(method, base, models, arguments, c.common_rows, bar.update)
            from_folders.write(merged, base or models[0], out, c.allow_unchanged, card)
        print(*notes, *from_folders.lines(merged, out), sep="\n")
    if c.push_to:
        folder_card.push(out, c.push_to)


if __name__ == "__main__":
    run(main, globals())
