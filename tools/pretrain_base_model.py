"""0 (only for the scales tiny and night, which share it): make the base model in place of google/switch-base-{8,16}.

Reads   the docstrings of the installed packages (training split only; expert_merging/data/docstring_reader.py) and, where
        extra_text names a folder, the documentation in it (expert_merging/data/documentation.py).
Writes  BASE_MODEL_PATH: a Switch Transformer pre-trained on span corruption, with its own tokenizer, as an ordinary
        Hugging Face folder (weights in float16), and beside the weights pretraining.json and pretraining.png.
Takes   at tiny about twenty minutes on 2 CPU cores. The tiny bases come with the repository: you need not run this.
"""

from expert_merging.core.scales import by_scale
from expert_merging.run.constants import run

num_expert = 8  # experts in each sparse layer
vocab_size = by_scale(paper=32000, night=8192, tiny=8192)  # without T5's 100 sentinels
d_model = by_scale(paper=768, night=128, tiny=128)
d_ff = by_scale(paper=3072, night=320, tiny=320)
num_layers = by_scale(paper=12, night=4, tiny=4)  # in the encoder and in the decoder; every second one is sparse
num_heads = by_scale(paper=12, night=4, tiny=4)
d_kv = by_scale(paper=64, night=32, tiny=32)
chunk_tokens = by_scale(paper=512, night=160, tiny=160)  # length of a text before corruption
batch_chunks = by_scale(paper=64, night=32, tiny=32)  # chunks a step
num_rounds = by_scale(paper=100, night=60, tiny=60)  # the held-out loss is measured after each
steps_per_round = by_scale(paper=1000, night=200, tiny=200)
pretraining_lr = 0.02  # peak, times the size of a tensor; warm-up over half a round; down to 0 over the last 30%
heldout_texts = 400  # kept out of pre-training, for the curve
extra_text = ""  # a folder of unpacked wheels and Debian packages, each in a folder of its own; empty: docstrings alone
docstring_share = 0.3  # of the batches, where there is extra text


def main(c):
    import time
    from pathlib import Path

    from expert_merging.core.files import new_folder
    from expert_merging.report import figures
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.switch.base_model import new_switch
    from expert_merging.switch.models import require_patch
    from expert_merging.training import checkpoints, pretraining

    require_patch()
    base = Path(c.BASE_MODEL_PATH.format(experts=c.num_expert))
    work = Path(f"{base}.run")
    own = [name for name in globals() if hasattr(c, name) and name[0] != "_" and name != "extra_text"]
    identity = results.identity(c, (*own, "seed", "scale", "precision"))
    if pretraining.is_done(base, identity, work):
        return
    accelerator = make_accelerator(c)

    # Text, tokenizer, and a model with random weights.
    text = pretraining.corpus(c, work / "text")
    checkpoints.claim(work, identity | text.facts)
    model = new_switch(c, text.tokenizer)
    accelerator.print(f"{pretraining.said(text)}; {model.num_parameters() / 1e6:.2f}M parameters")

    # Span corruption; the round with the lowest held-out loss is kept.
    started = time.strftime("%Y-%m-%d")
    history = pretraining.pretrain(c, accelerator, model, text, work)

    if accelerator.is_main_process:
        with new_folder(base) as folder:
            pretraining.save_best(c, checkpoints.best_folder(work, history), text.tokenizer, folder)
            tokens = c.steps_per_round * c.batch_chunks * c.chunk_tokens  # a round
            figures.pretraining_curve(history, folder / "pretraining.png", tokens)
            record = {"date": started, "parameters": model.num_parameters(), "history": history}
            results.save(folder / "pretraining.json", identity | text.facts, record)
        checkpoints.release(work)
        print(f"wrote {base}")


if __name__ == "__main__":
    run(main, globals())
