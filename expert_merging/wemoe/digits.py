"""Four tasks out of scikit-learn's digits, and a CLIP of some 80,000 weights pre-trained and fine-tuned on them.

Everything CLIP has is there in small: a vision transformer whose projection is frozen after pre-training, and for each task
frozen "text" embeddings of its classes, here random. So merging goes by the same code, offline, in minutes on a CPU.
"""

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError, at_least
from expert_merging.core.files import replacing
from expert_merging.wemoe.classification import check_adaptation
from expert_merging.wemoe.scoring import Task, embed

IMAGES, TRAIN, EMBEDDING, LOGIT_SCALE = 1797, 1200, 24, 20.0
DEPENDS_ON = (
    "lam",
    "adapt_lr",
    "adapt_steps",
    "adapt_batch_size",
    "adamerging_lr",
    "guard",
    "guard_floor",
    "pretrain_examples",
    "pretrain_steps",
    "finetune_steps",
    "training_lr",
    "images_per_task",
)  # the constants that a record follows from
TRANSFORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda x: x,
    "rotated": lambda x: x.rot90(1, (2, 3)),
    "mirrored_negative": lambda x: 1 - x.flip(3),
    "permuted": lambda x: x.flatten(2)[..., torch.randperm(64, generator=torch.Generator().manual_seed(7))].view_as(x),
}


def check_constants(c: SimpleNamespace) -> None:
    """Raises UserError for constants that cannot be."""
    check_adaptation(c)
    at_least(c, 0, "pretrain_steps", "finetune_steps")
    if not 1 <= c.pretrain_examples <= TRAIN:
        raise UserError(
            f"pretrain_examples is {c.pretrain_examples}; give 1 to {TRAIN}: the other {IMAGES - TRAIN} of the {IMAGES} images "
            "are the test's"
        )


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1797 digits in a fixed random order: pixels [n, 1, 8, 8] in 0..1, labels [n]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order], torch.tensor(data.target)[order]


def heads(seed: int) -> dict[str, torch.Tensor]:
    """{task: random unit embeddings of the ten digits [10, D]}."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {task: F.normalize(torch.randn(10, EMBEDDING, generator=generator), dim=-1) for task in TRANSFORMS}


def test_tasks(seed: int, examples: int = 0) -> list[Task]:
    """The four tasks with their test images (597; or the first `examples` of them)."""
    pixels, labels = images()
    pixels, labels = pixels[TRAIN:], labels[TRAIN:]
    if examples:
        pixels, labels = pixels[:examples], labels[:examples]
    made, head = [], heads(seed)
    for name, transform in TRANSFORMS.items():
        own = transform(pixels)
        made.append(Task(name, labels.tolist(), head[name], functools.partial(operator.getitem, own)))
    return made


def new_model(seed: int) -> nn.Module:
    """A CLIP vision model with random weights for 8 x 8 images: 16 patches and a class token, 4 layers of width 48."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=8, patch_size=2,
        num_channels=1, hidden_act="gelu", projection_dim=EMBEDDING, attn_implementation="sdpa",
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)


def train(
    model: nn.Module, head: dict[str, torch.Tensor], tasks: list[str], examples: int, steps: int, lr: float, seed: int
) -> None:
    """Adam on labelled images, 64 a step, the tasks in turn; only what has gradients is trained, in place."""
    pixels, labels = (tensor[:examples] for tensor in images())
    inputs = {task: TRANSFORMS[task](pixels) for task in tasks}
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in progress_bar(range(steps), f"training: {', '.join(tasks)}", leave=False):
        task = tasks[step % len(tasks)]
        chosen = torch.randint(examples, (64,), generator=generator)
        logits = LOGIT_SCALE * embed(model, inputs[task][chosen]) @ head[task].t()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()
    model.eval()


def pool(
    seed: int, pretrain_examples: int, pretrain_steps: int, finetune_steps: int, lr: float, cache: Path
) -> tuple[nn.Module, dict[str, dict[str, torch.Tensor]]]:
    """(pre-trained model, {task: tensors of the model fine-tuned on all 1200 training images of that task}).

    Each model is kept in the folder `cache` under a name that says how it was made, and read from there the next time.
    """
    head = heads(seed)

    def trained(name: str, start: nn.Module, tasks: list[str], examples: int, steps: int, own_seed: int) -> nn.Module:
        path = cache / f"{name}_seed{seed}_{pretrain_examples}_{pretrain_steps}_{finetune_steps}_{lr}.safetensors"
        if path.exists():
            start.load_state_dict(load_file(path))
        else:
            train(start, head, tasks, examples, steps, lr, own_seed)
            with replacing(path) as temporary:
                save_file(start.state_dict(), temporary)
        return start.eval()

    base = trained("base", new_model(seed), list(TRANSFORMS), pretrain_examples, pretrain_steps, seed)
    experts = {}
    for number, task in enumerate(TRANSFORMS):
        model = new_model(seed)
        model.load_state_dict(base.state_dict())
        model.visual_projection.requires_grad_(False)
        experts[task] = trained(task, model, [task], TRAIN, finetune_steps, 100 + 10 * seed + number).state_dict()
    return base.requires_grad_(False), experts
