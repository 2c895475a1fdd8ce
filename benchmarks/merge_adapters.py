"""tools/merge.py on three LoRA fine-tunes of a chat model: does one folder do what the three do?

    python benchmarks/merge_adapters.py MODEL INSTRUCTIONS FOLDER [--tasks sst2 qqp arc_easy] [--steps 40] [--seed 0]

MODEL is a folder of a causal model with a chat template (tools/packaged_model.py smollm2-135m), INSTRUCTIONS holds
{task}.jsonl, lines {"instruction", "output"}. Of each task 100 lines are held out, and an adapter is tuned by peft on others
(rank 16 on every linear, AdamW, batches of 8), into FOLDER; the command then merges the three in several ways. Each merged
folder is loaded by `from_pretrained` and answers the held-out instructions greedily: how many answers are the right ones to the
letter, and nats a token of the answer. Writes benchmarks/results/merge_adapters.json. A folder that is there is not made again.
"""

import argparse
import random
import subprocess
import sys
from pathlib import Path

import machine

from expert_merging.core.bars import bar
from expert_merging.core.files import new_folder, write_json
from expert_merging.data.raw_files import read_jsonl
from expert_merging.hemoe.tuning import collate, encode
from expert_merging.run.provenance import versions

HELD_OUT, BATCH, MAX_TOKENS = 100, 8, 192
CASES = {
    "average": ["--method", "average"],
    "task arithmetic, 0.4": ["--method", "task_arithmetic", "--set", "lam=0.4"],
    "TIES": ["--method", "ties"],
}
QUESTION = "What is the capital of France?"


def loss(model, tokenizer, examples):
    """(nats a token of the answers, their tokens)."""
    batch = collate([encode(tokenizer, one, MAX_TOKENS, "chat") for one in examples], tokenizer.eos_token_id)
    return model(**batch).loss, int((batch["labels"][:, 1:] >= 0).sum())


def tune(base: Path, examples: list[dict[str, str]], out: Path, steps: int, seed: int) -> None:
    """An adapter in `out`."""
    import torch
    import torch.distributed.tensor  # peft looks there, and does not import it
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    order = random.Random(seed).sample(examples, steps * BATCH)
    moving = bar(range(steps), out.name)
    for step in moving:
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * (1 - step / steps)
        value, _ = loss(model, tokenizer, order[step * BATCH : (step + 1) * BATCH])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        moving.set_postfix(loss=round(float(value.detach()), 3))
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def score(folder: Path, base: Path, held_out: dict[str, list[dict[str, str]]]) -> dict:
    """What the model in `folder`, a whole one or an adapter of `base`, answers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def answer(instruction: str, tokens: int) -> str:
        row = encode(tokenizer, {"instruction": instruction, "output": ""}, MAX_TOKENS, "chat")
        asked = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0]
        written = model.generate(
            torch.tensor([asked]), attention_mask=torch.ones(1, len(asked)), max_new_tokens=tokens, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return tokenizer.decode(written[0, len(asked) :], skip_special_tokens=True).strip()

    found: dict = {"answer": answer(QUESTION, 20), "tasks": {}}
    with torch.no_grad():
        for task, examples in held_out.items():
            right = [
                answer(one["instruction"], 24) == one["output"].strip()
                for one in bar(examples, f"{folder.name}, {task}")
            ]
            parts = [loss(model, tokenizer, examples[i : i + BATCH]) for i in range(0, len(examples), BATCH)]
            nats = sum(float(value) * tokens for value, tokens in parts) / sum(tokens for _, tokens in parts)
            found["tasks"][task] = {
                "exact": 100 * sum(right) / len(right),
                "nats": round(nats, 4),
                "right": list(map(int, right)),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "instructions", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "qqp", "arc_easy"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    c = parser.parse_args()
    began = versions()  # hours pass until the end
    held_out, adapters = {}, {}
    for task in c.tasks:
        lines = [row for _, row in read_jsonl(c.instructions / f"{task}.jsonl")]
        random.Random(0).shuffle(lines)
        held_out[task], adapters[task] = lines[:HELD_OUT], c.folder / task
        if not adapters[task].exists():
            tune(c.model, lines[HELD_OUT:], adapters[task], c.steps, c.seed)
    models = {"the model": c.model, **{f"adapter of {task}": folder for task, folder in adapters.items()}}
    for name, words in CASES.items():
        models[name] = c.folder / words[1]
        if not models[name].exists():
            places = ["--base", c.model, "--models", *adapters.values(), "--out", models[name]]
            subprocess.run([sys.executable, "tools/merge.py", *words, *map(str, places)], cwd=machine.ROOT, check=True)
    rows = []
    for name, folder in models.items():
        rows.append({"name": name, **score(folder, c.model, held_out)})
        told = ", ".join(
            f"{task} {row['exact']:.0f}% ({row['nats']:.2f} nats)" for task, row in rows[-1]["tasks"].items()
        )
        print(f"{name}: {told}; {QUESTION} {rows[-1]['answer']!r}", flush=True)
    settings = {"tasks": c.tasks, "steps": c.steps, "seed": c.seed, "batch": BATCH, "held_out": HELD_OUT}
    write_json(machine.RESULTS / "merge_adapters.json", {"versions": began, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
