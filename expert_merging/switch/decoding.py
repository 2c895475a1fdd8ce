"""Writing out what a model answers, with the paper's settings (4.1): beam search, and no three words twice."""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers.models.switch_transformers.modeling_switch_transformers import CAEM_PATCH

from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError
from expert_merging.data.features import collate, padded_lengths
from expert_merging.run import sharding
from expert_merging.run.deviations import deviates
from expert_merging.switch.beam_search import beam_search

Search = Callable[
    [torch.Tensor, torch.Tensor], Any
]  # (input_ids, attention_mask), padded on the right -> ids of each text


def generate(
    model, dataset, tokenizer, constants: SimpleNamespace, device: torch.device | str, batch_size: int,
    progress_label: str = "", process_index: int = 0, num_processes: int = 1, show_progress: bool = True,
    search: Search | None = None,
) -> dict[int, str]:  # fmt: skip
    """Decode examples of features (column input_ids) in batches of similar length, the longest first.

    The order of batches makes the first one the hungriest, so that too little memory shows at once. An example's text
    does not depend on what shares its batch, but for rounding.

    Args:
        constants: num_beams, max_decoder_length (tokens, the start token counted), repetition_penalty,
            no_repeat_ngram_size, length_penalty.
        process_index, num_processes: of several processes, each decodes every num_processes-th batch.
        search: how the model writes, where it is no Switch or T5.

    Returns:
        {row of `dataset`: text} of this process's part; `in_order` puts parts together.

    Raises:
        UserError: out of GPU memory.
    """
    search = search or _search(model, constants)
    input_ids = dataset["input_ids"]
    lengths = [len(ids) for ids in input_ids]
    rows = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches = batches[process_index::num_processes]

    texts: dict[int, str] = {}
    was_training = model.training
    model.eval()
    try:
        with sharding.evaluation(model), progress_bar(
            total=sum(map(len, batches)), desc=progress_label, unit="example", leave=False,
            disable=not show_progress,
        ) as bar:  # fmt: skip
            for batch in batches:
                examples = [{"input_ids": input_ids[row], "labels": []} for row in batch]
                inputs = collate(examples, tokenizer.pad_token_id, padded_lengths(constants, "counts")[0])
                output = search(inputs["input_ids"].to(device), inputs["attention_mask"].to(device))
                # Tidying up spaces would change answers that have one before a comma or an apostrophe.
                decoded = tokenizer.batch_decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                texts.update(zip(batch, decoded, strict=True))
                bar.update(len(batch))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory decoding {len(batch)} examples of {lengths[batch[0]]} tokens together; "
            f"give --eval_batch_size a value below {batch_size}"
        ) from error
    finally:
        model.train(was_training)
    return texts


def in_order(parts: list[dict[int, str]]) -> list[str]:
    """The texts of all rows, from the parts that the processes decoded."""
    texts = {row: text for part in parts for row, text in part.items()}
    return [texts[row] for row in range(len(texts))]


def evaluate_task(
    model, dataset, task: ModuleType, tokenizer, constants: SimpleNamespace, accelerator, label: str = "",
    search: Search | None = None,
) -> tuple[dict[str, float], list[str]]:  # fmt: skip
    """(scores, predictions) of `model` (unwrapped) on features of one task; all processes take part and get the
    same."""
    from accelerate.utils import gather_object

    with accelerator.autocast():  # the encoder too, which the search calls by itself
        part = generate(
            model, dataset, tokenizer, constants, accelerator.device, constants.eval_batch_size, label,
            *sharding.share(accelerator, model), accelerator.is_main_process, search,
        )  # fmt: skip
    predictions = in_order(gather_object([part]))
    return task.score(predictions, dataset["references"]), predictions


def _search(model, constants: SimpleNamespace) -> Search:
    """How a Switch Transformer or a T5 writes."""
    settings = _settings(model, constants)

    def search(input_ids: torch.Tensor, attention_mask: torch.Tensor):
        # Three cases for transformers' own search: one beam, a model that is no Switch (T5), and counting expert usage as
        # the released code does, which includes what finished beams are fed. (So does a patched model from before the
        # beams could share states.)
        own = settings.num_beams > 1 and hasattr(model.config, "num_experts") and CAEM_PATCH != "1"
        if not own or deviates(constants.reading, "counts"):
            return model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=settings)
        return beam_search(model, input_ids, attention_mask, settings)

    return search


def _settings(model, constants: SimpleNamespace) -> Any:
    from transformers import GenerationConfig

    config = model.config
    beams = {"early_stopping": True, "length_penalty": constants.length_penalty} if constants.num_beams > 1 else {}
    return GenerationConfig(
        num_beams=constants.num_beams, max_length=constants.max_decoder_length, do_sample=False,
        repetition_penalty=constants.repetition_penalty, no_repeat_ngram_size=constants.no_repeat_ngram_size, **beams,
        decoder_start_token_id=config.decoder_start_token_id, eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )  # fmt: skip
