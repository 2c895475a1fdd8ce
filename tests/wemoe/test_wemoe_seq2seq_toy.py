"""Adaptation of models that write text, on really trained ones: tiny T5s for three tasks in the image of the paper's.

`classify`: which of three groups of letters is the most frequent; `copy`: the two letters behind a mark; `reverse`: four
letters backwards.
"""

import copy

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from expert_merging.merging.task_arithmetic import task_arithmetic
from expert_merging.wemoe import seq2seq
from expert_merging.wemoe.adaptation import adapt
from expert_merging.wemoe.ffn import routers
from expert_merging.wemoe.seq2seq_losses import AnswerLoss

TASKS = ("classify", "copy", "reverse")
END, LETTERS, GROUPS, MARK = 1, range(5, 13), range(13, 16), 16  # 2, 3 and 4 say which task it is


def example(task, generator):
    """(input, answer), each with its end."""
    length = 4 if task == "reverse" else 8
    letters = [LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator)]
    if task == "classify":
        groups = [(letter - 5) * 3 // 8 for letter in letters]
        answer = [GROUPS[max(range(3), key=groups.count)]]
    elif task == "copy":
        at = int(torch.randint(length - 2, (1,), generator=generator))
        letters[at] = MARK
        answer = letters[at + 1 : at + 3]
    else:
        answer = letters[::-1]
    return [2 + TASKS.index(task), *letters, END], [*answer, END]


def examples(task, number, seed):
    generator = torch.Generator().manual_seed(10 * seed + TASKS.index(task))
    inputs, labels = zip(*(example(task, generator) for _ in range(number)), strict=True)
    return {"input_ids": list(inputs), "labels": list(labels)}


def train(model, data, steps, lr, seed):
    """Adam, 32 examples a step, the tasks in turn."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        own = data[list(data)[step % len(data)]]
        rows = torch.randint(len(own["labels"]), (32,), generator=generator).tolist()
        inputs, labels = (torch.tensor([own[key][row] for row in rows]) for key in ("input_ids", "labels"))
        optimizer.zero_grad()
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def errors(model, tests):
    """{task: percent of answers that are not right to the letter}."""
    found = {}
    for task, own in tests.items():
        inputs, labels = (torch.tensor(own[key]) for key in ("input_ids", "labels"))
        mask = torch.ones_like(inputs)
        made = model.generate(input_ids=inputs, attention_mask=mask, max_new_tokens=labels.shape[1], do_sample=False)
        made = torch.nn.functional.pad(made[:, 1:], (0, 1 + labels.shape[1] - made.shape[1]))
        found[task] = 100 * (made != labels).any(dim=1).float().mean().item()
    return found


@pytest.fixture(scope="module")
def toy():
    """(pre-trained on all tasks, one fine-tuned on each, task arithmetic of them, tests)."""
    training, tests = ({task: examples(task, n, seed) for task in TASKS} for n, seed in ((3000, 1), (300, 2)))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=17, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=END,
    )  # fmt: skip
    base = train(T5ForConditionalGeneration(config), training, 500, 5e-3, 0)
    tuned = [train(copy.deepcopy(base).train(), {task: training[task]}, 80, 2e-3, 7) for task in TASKS]
    merged = copy.deepcopy(base)
    state = dict(task_arithmetic(base.state_dict(), [model.state_dict() for model in tuned], 0.3))
    merged.load_state_dict(seq2seq.with_tied_names(state, merged))
    return base, tuned, merged, tests


@pytest.mark.parametrize("kind", ["self_generated", "exact_em"])
def test_adaptation_raises_no_tasks_error_by_more_than_two_points(toy, kind):
    base, tuned, merged, tests = toy
    arithmetic = errors(merged, tests)
    alone = {task: errors(model, {task: tests[task]})[task] for task, model in zip(TASKS, tuned, strict=True)}
    # The models can do their tasks, and merging has cost something that adaptation could win back.
    assert max(alone.values()) < 20 and max(arithmetic.values()) > 1.5 * max(alone.values())

    model = seq2seq.upscale(base, tuned).eval()
    inputs = {task: {**own, "labels": [[END]] * len(own["labels"])} for task, own in tests.items()}  # no answers
    loss = AnswerLoss(model, model, lambda: model, dict.fromkeys(TASKS, kind), inputs, {}, 16, 0, tokens=5)
    parameters = [parameter for router in routers(model) for parameter in router.parameters()]
    record = adapt(parameters, TASKS, loss, 40, 1e-3, guard="off")
    adapted = errors(model, tests)
    assert all(adapted[task] <= arithmetic[task] + 2 for task in TASKS), (arithmetic, adapted)
    total = [sum(step) for step in zip(*record["loss"].values(), strict=True)]
    assert sum(total[-15:]) < sum(total[:15])
