"""Decoding with the paper's beams: ours against the released recipe, examples a second, and whether the strings agree.

    python benchmarks/evaluation.py [--layers 4] [--examples 64] [--pairs 5] [--threads N]

Theirs is stock transformers with every input padded to 1,000 tokens, in the order of the data; ours the patched model with
inputs padded to their batch's longest, of similar length together. Same weights (random, of Switch-Base's widths), same
beams, batches of 8 for theirs and of eval_batch_size at scale `paper` for ours. A random model would never stop, so both stop
at a length like that of the task's answers: 4, 8 and 32 tokens. Inputs are as long as those of AG News, SQuAD and XSum. Padded
to the limit an example costs stock the same however many there are, so it gets the first 8 of each task; ours gets
all, as the more there are the more alike in length a batch is. With one thread the time is the processor's, which other
programs disturb less. Needs the stock files that caem_files/install.py keeps. Writes evaluation.json in the machine's
folder of benchmarks/results.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import machine

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = {"ag_news": (55, 4), "squad": (150, 8), "xsum": (480, 32)}  # tokens of inputs (mean) and of answers
TARGET = 6.0
OF_STOCK = 8  # examples of each task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of encoder and decoder each; Switch-Base has 12 [4]")
    parser.add_argument("--examples", type=int, default=64, help="of each task [64]")
    parser.add_argument("--pairs", type=int, default=5, help="measurements [5]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="[all cores]")
    chosen = parser.parse_args()
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, GenerationConfig, SwitchTransformersConfig
    from transformers import SwitchTransformersForConditionalGeneration as Ours
    from transformers.models.switch_transformers_stock.modeling_switch_transformers import (
        SwitchTransformersForConditionalGeneration as Stock,
    )

    import global_config
    from expert_merging.core.host_memory import keep_freed_memory
    from expert_merging.switch import decoding

    keep_freed_memory()  # as the scripts do
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base_models" / "tiny-8")
    sparse = {"num_sparse_encoder_layers": chosen.layers // 2, "num_sparse_decoder_layers": chosen.layers // 2}
    sizes = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_experts": 8}
    layers = {"num_layers": chosen.layers, "num_decoder_layers": chosen.layers, "decoder_start_token_id": 0}
    config = SwitchTransformersConfig(**sizes, **sparse, **layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(chosen.threads)
    clock = time.process_time if chosen.threads == 1 and device == "cpu" else time.perf_counter
    torch.manual_seed(0)
    ours = Ours(config).eval().to(device)
    theirs = Stock(config).eval().to(device)
    theirs.load_state_dict(ours.state_dict())

    random = np.random.default_rng(0)
    data = {}
    for task, (mean, _) in LENGTHS.items():
        lengths = np.clip(random.normal(mean, mean / 4, chosen.examples), 8, 1000).astype(int)
        rows = [[*random.integers(10, len(tokenizer), length - 1).tolist(), 1] for length in lengths]
        data[task] = Dataset.from_dict({"input_ids": rows})
    beams = {"num_beams": 3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "length_penalty": 1.0}

    batch = global_config.eval_batch_size.paper

    def by_ours() -> list[list[str]]:
        texts = []
        for task, (_, answer) in LENGTHS.items():
            constants = SimpleNamespace(**beams, max_decoder_length=answer, max_input_length=1000, reading="paper")
            texts.append(decoding.in_order([decoding.generate(ours, data[task], tokenizer, constants, device, batch)]))
        return texts

    def by_theirs() -> list[list[str]]:
        texts = []
        for task, (_, answer) in LENGTHS.items():
            settings = GenerationConfig(
                **beams,
                max_length=answer,
                early_stopping=True,
                decoder_start_token_id=0,
                eos_token_id=1,
                pad_token_id=0,
            )
            rows = data[task]["input_ids"][:OF_STOCK]
            ids = torch.tensor([row + [0] * (1000 - len(row)) for row in rows], device=device)
            with torch.inference_mode():
                output = theirs.generate(input_ids=ids, attention_mask=(ids != 0).long(), generation_config=settings)
            texts.append(tokenizer.batch_decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return texts

    pairs, same = [], 0
    for number in range(chosen.pairs + 1):  # the first warms up
        seconds, texts = [], []
        for decode in (by_ours, by_theirs):
            started = clock()
            texts.append(decode())
            seconds.append(clock() - started)
        same = sum(a == b for mine, its in zip(*texts, strict=True) for a, b in zip(mine, its, strict=False))
        if number:
            numbers = [sum(map(len, of_one)) for of_one in texts]
            pairs.append([round(count / one, 3) for count, one in zip(numbers, seconds, strict=True)])
    row = {"name": f"evaluation on {device}", "ratio": round(statistics.median(a / b for a, b in pairs), 3)}
    row |= {"target": TARGET, "better": "higher", "unit": "examples/s", "identical": f"{same} of {numbers[1]}"}
    row |= {"ours": statistics.median(a for a, _ in pairs), "theirs": statistics.median(b for _, b in pairs)}
    rows = [row | {"pairs": pairs}]
    print(
        "{name}: {ours} {unit} against {theirs}: ratio {ratio}, target {target}; {identical} strings identical".format(
            **row
        )
    )
    machine.write("evaluation", {"layers": chosen.layers, "rows": rows})


if __name__ == "__main__":
    main()
