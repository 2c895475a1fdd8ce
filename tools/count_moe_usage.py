"""Use of each expert of a causal mixture of experts: python tools/count_moe_usage.py FOLDER --text FILE.jsonl

Reads   folder: a Hugging Face folder of a Mixtral, Qwen2-MoE or OLMoE, with its tokenizer. text: JSON lines, best of
        validation data of the task that the model was fine-tuned for.
Writes  out: {"layers": [[times each expert was chosen], ..]} over real tokens, as tools/merge.py --method caem --usage reads
        it, the normalised entropies, and beside it the shares as a heat map, .png.
Takes   one pass over the texts. Memory: the model in the dtype of its files, and a batch.
"""

from expert_merging.run.constants import run

folder = ""  # the model
text = ""  # file of JSON lines
field = "text"  # of each line
max_tokens = 512  # of a text; the rest is cut
batch_texts = 8  # texts in one pass
out = "usage.json"
device = "auto"  # cuda | cpu | auto


def main(c):
    from pathlib import Path

    import torch

    from expert_merging.analysis import moe_usage
    from expert_merging.causal.models import load_model
    from expert_merging.core.bars import bar
    from expert_merging.core.errors import UserError
    from expert_merging.merging.model_folders import open_source
    from expert_merging.report.figures import shares_of_experts
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.switch.models import require_patch

    require_patch()
    if not c.folder or not c.text or Path(c.out).is_dir() or min(c.max_tokens, c.batch_texts) < 1:
        raise UserError("give a model's folder, --text FILE, --out FILE, max_tokens and batch_texts of at least 1")
    device = make_accelerator(c).device
    source, out = open_source(Path(c.folder)), Path(c.out)
    routers = moe_usage.routers_of(source)
    texts = moe_usage.token_ids(source, moe_usage.read_texts(Path(c.text), c.field), c.max_tokens)
    identity = results.identity(c, ("field", "max_tokens"), **moe_usage.made_of(source, Path(c.text)))
    if results.is_done(out, identity, elsewhere="out", again="count"):
        return

    try:
        model = load_model(source.folder, "folder", dtype="auto").eval().to(device)
        with bar(desc="texts", total=len(texts)) as moving:
            counts = moe_usage.count(model, texts, c.batch_texts, moving.update)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory counting {c.folder}, {c.batch_texts} texts together; give --batch_texts a smaller value, or "
            "--device cpu"
        ) from error
    usage = moe_usage.record(counts, sum(map(len, texts)), routers)
    shares_of_experts(source.folder.name, usage["layers"], usage["entropies"], out.with_suffix(".png"))
    results.save(out, identity, usage)
    mean = sum(usage["entropies"]) / len(routers)
    print(f"{out}: {usage['tokens']} tokens, {usage['k']} experts each; mean entropy {mean:.3f}")


if __name__ == "__main__":
    run(main, globals(), positional=("folder",))
