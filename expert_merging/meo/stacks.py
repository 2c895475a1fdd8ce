"""What the stacked linears of one encoder or decoder share: where their gates look, and what is kept while decoding.

Filled by hooks on unmodified models. A gate at sequence level reads the masked mean of its own input in an encoder; in the
decoder of an encoder-decoder that of the encoder's output, in a decoder alone that of its input over the prompt: never a
token that is to be predicted.
"""

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from expert_merging.core.errors import UserError
from expert_merging.meo.gate import without_autocast

KEPT_BYTES = 4 << 30  # of merged weights kept while decoding, in all linears of a stack


class Stack:
    """State of one encoder ("encoder"), decoder of an encoder-decoder ("decoder") or decoder alone ("causal")."""

    def __init__(self, kind: str, tasks: nn.Module | None = None):
        self.kind = kind
        self.tasks = tasks
        self.task: int | Tensor = 0  # at task level: whose gate; or one number a sequence
        self.prompt: Tensor | str | None = None  # [B, S], 1 for the prompt's tokens; "input": all that is given
        self.needs_prompt = False
        self._clear()

    def _clear(self) -> None:
        self.mask: Tensor | None = None  # [B, S] of the present pass, 1 for real tokens
        self.pooled: Tensor | None = None  # [B, d_model]: encoder's masked mean, or [tasks, size]: the descriptions'
        self.decoding = False  # a step that continues kept keys and values
        self.labels: Tensor | None = None
        self.balances: dict[str, Tensor] = {}
        self.forget()
        # The encoder's output and mask that `pooled` was made of.
        self._source: tuple[weakref.ref[Tensor] | None, weakref.ref[Tensor] | None] = (None, None)

    def forget(self) -> None:
        """Drop what is kept from step to step."""
        self.kept: dict[str, Any] = {}  # of each linear a KeptMerge, and under "{name}: routing" a Routing
        self.kept_bytes = 0

    def __getstate__(self) -> dict:
        """For copies: without tensors of a pass."""
        return {name: getattr(self, name) for name in ("kind", "tasks", "task", "needs_prompt")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.prompt = None
        self._clear()

    def before_pass(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the encoder or decoder."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        self.balances = {}
        mask = given.get("attention_mask")
        self.mask = mask if mask is not None and mask.dim() == 2 else None
        past = given.get("past_key_values")
        self.decoding = past is not None and _length(past) > 0
        if module.training or torch.is_grad_enabled():
            self.forget()
        if self.tasks is not None:
            self.pooled = self.tasks()
        elif self.kind == "decoder":
            self._look_at_encoder(given.get("encoder_hidden_states"), given.get("encoder_attention_mask"))
        elif self.needs_prompt and not self.decoding:
            self.forget()
            self.mask = self._prompt_mask(given)

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of a whole causal language model: its labels tell prompt from answer."""
        self.labels = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("labels")

    def _look_at_encoder(self, states: Tensor | None, mask: Tensor | None) -> None:
        if states is None:
            raise UserError("a decoder's gate at sequence level needs the encoder's output, and there is none")
        seen_states, seen_mask = (None if seen is None else seen() for seen in self._source)
        same = states is seen_states and mask is seen_mask
        if not same or torch.is_grad_enabled():
            self.forget()
            self.pooled = masked_mean(states, mask)
            self._source = (weakref.ref(states), None if mask is None else weakref.ref(mask))

    def _prompt_mask(self, given: dict) -> Tensor:
        labels, self.labels = self.labels, None
        inputs = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        size, device = inputs.shape[:2], inputs.device
        if isinstance(self.prompt, Tensor):
            prompt = self.prompt.to(device)
        elif self.prompt == "input":
            prompt = torch.ones(size, device=device)
        elif labels is not None:
            prompt = ((labels != -100).cumsum(1) == 0).to(device)
        else:
            raise UserError(
                "this causal decoder's gate reads the prompt only: say what is prompt by `with meo.prompt(model, mask)`, by"
                " labels that are -100 there, or use generate(), task level, or token level with mode moe"
            )
        if prompt.shape != size:
            raise UserError(f"the prompt's mask is {tuple(prompt.shape)}, the input {tuple(size)}")
        if self.mask is not None:
            prompt = prompt * self.mask
        if not prompt.is_meta and not prompt.any(1).all():
            raise UserError("a sequence without a prompt has nothing for the gate to read; use task level instead")
        return prompt


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that count: x [B, S, d], mask [B, S] -> [B, d], in float32."""
    if mask is None:
        return x.float().mean(1)
    if mask.shape != x.shape[:2]:
        raise UserError(f"the attention mask is {tuple(mask.shape)}, the linear's input {tuple(x.shape)}")
    mask = mask.to(x.device, torch.float32)
    with without_autocast(x):
        total = torch.einsum("bs,bsd->bd", mask, x.float())
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def _length(past) -> int:
    """Tokens in kept keys and values, of any of transformers' forms."""
    if hasattr(past, "get_seq_length"):
        return past.get_seq_length()
    return past[0][0].shape[-2] if len(past) and past[0] is not None else 0
