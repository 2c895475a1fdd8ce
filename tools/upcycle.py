"""A dense Llama as a mixture of experts: python tools/upcycle.py DENSE_FOLDER OUT --experts 8

Reads   dense: a Hugging Face folder of a Llama without biases. parts: files {layer}.part.{experts}, as
        HEMoE_moe_construction.py leaves them, one for every sparse layer.
Writes  out: a Mixtral folder with the dense model's tokenizer; a Qwen2-MoE where some layers stay dense. Each expert is the
        whole FFN, and the logits are the dense model's; with noise, near them. With parts each expert is its share of the
        neurons, all of one size, and the outputs are other than the dense model's: the mixture averages the chosen experts
        where the dense FFN adds all neurons up.
Takes   reading the dense model and writing the other. Memory: a tensor and its copy.
"""

from expert_merging.run.constants import run

dense = ""  # folder of a Llama
out = ""  # the folder to be made
experts = 8  # in each sparse layer
chosen = 2  # experts that a token is sent to
every = 1  # the last of so many layers gets experts, the others stay dense; 1: all
noise = 0.0  # standard deviation of what is added to each expert's tensors, over that of the tensor itself
parts = ""  # folder of a split into experts of one size; "" copies all neurons into each


def main(c):
    from pathlib import Path

    from expert_merging.core.bars import bar
    from expert_merging.core.errors import UserError
    from expert_merging.merging import upcycling
    from expert_merging.merging.model_folders import open_source

    if not c.dense or not c.out:
        raise UserError("give the folder of a Llama and the one to be made: python tools/upcycle.py DENSE_FOLDER OUT")
    if not 0 <= c.noise < float("inf"):
        raise UserError(f"noise is {c.noise}; it must be 0 or more")
    source, out, folder = open_source(Path(c.dense)), Path(c.out), Path(c.parts) if c.parts else None
    config, split = upcycling.sparse_config(source, c.experts, c.chosen, c.every), None
    if folder:
        split = upcycling.read_parts(folder, upcycling.sparse_layers(config), config.intermediate_size, c.experts)
    made = upcycling.record(source, c.experts, c.chosen, c.every, c.noise, folder, c.seed)
    if upcycling.is_done(out, made):
        return

    with bar(desc="upcycling", total=len(source.kinds), unit=" tensors") as moving:
        kinds, stream = upcycling.tensors(source, config, split, c.noise, c.seed, moving.update)
        upcycling.write(source, config, kinds, stream, made, out)
    layers = len(upcycling.sparse_layers(config))
    print(f"{out}: {c.experts} experts of {upcycling.neurons(config)} neurons in {layers} layers, {c.chosen} chosen")
    if c.chosen == 1:
        print(
            "note: with chosen 1 that expert's weight is 1 whatever the router says; no task will ever train the routers"
        )


if __name__ == "__main__":
    run(main, globals(), positional=("dense", "out"))
