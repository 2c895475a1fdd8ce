"""Decoding: batches give what one by one gives, in order, whoever does which part."""

from types import SimpleNamespace

import pytest
import raw_data
import torch
from datasets import Dataset

from expert_merging.core.errors import UserError
from expert_merging.switch import decoding


@pytest.fixture(scope="module")
def tokenizer():
    return raw_data.tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(1)
    config = SwitchTransformersConfig(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, expert_capacity=6, dropout_rate=0.3,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id, initializer_factor=3.0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config)


@pytest.fixture(scope="module")
def dataset(tokenizer):
    texts = raw_data.sentences(17)
    return Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"], "references": [[text] for text in texts]})


@pytest.fixture
def c(tmp_path):
    return raw_data.constants(tmp_path, tmp_path, max_decoder_length=12)


def one_by_one(model, dataset, tokenizer, c) -> list[str]:
    """The paper's settings, written out for one example at a time."""
    model.eval()
    texts = []
    for ids in dataset["input_ids"]:
        output = model.generate(
            torch.tensor([ids]), num_beams=3, max_length=12, repetition_penalty=1.2, no_repeat_ngram_size=3,
            length_penalty=1.0, early_stopping=True,
        )  # fmt: skip
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_give_what_one_by_one_gives(batch_size, model, dataset, tokenizer, c):
    expected = one_by_one(model, dataset, tokenizer, c)
    assert len(set(expected)) > 5  # else the order could not be told
    found = decoding.generate(model, dataset, tokenizer, c, "cpu", batch_size)
    assert decoding.in_order([found]) == expected


@pytest.mark.parametrize("num_processes", [2, 3, 7])
def test_parts_make_the_whole(num_processes, model, dataset, tokenizer, c):
    whole = decoding.generate(model, dataset, tokenizer, c, "cpu", 4)
    parts = [
        decoding.generate(model, dataset, tokenizer, c, "cpu", 4, "", p, num_processes) for p in range(num_processes)
    ]
    assert sum(map(len, parts)) == len(dataset)
    assert decoding.in_order(parts) == decoding.in_order([whole])


def test_the_released_reading_is_decoded_by_transformers(searched, model, dataset, tokenizer, c):
    """Whose finished beams are fed on, and counted by the released code; its inputs are padded to the limit."""
    c.reading = "paper+counts"
    recording = Recording(model)
    decoding.generate(recording, dataset, tokenizer, c, "cpu", 4)
    assert recording.shapes[0] == (4, c.max_input_length) and recording.by_keywords


def test_greedy_too(model, dataset, tokenizer, c, recwarn):
    c.num_beams = 1
    texts = decoding.in_order([decoding.generate(model, dataset, tokenizer, c, "cpu", 4)])
    assert len(texts) == len(dataset)
    assert not [w for w in recwarn if "beam" in str(w.message)]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_given_back_and_dropout_is_off(training, model, dataset, tokenizer, c):
    model.train(training)
    first = decoding.generate(model, dataset, tokenizer, c, "cpu", 8)
    assert model.training is training
    assert first == decoding.generate(model, dataset, tokenizer, c, "cpu", 8)
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())


class Recording(torch.nn.Module):
    """Stands for a model: notes the batches and gives back what it was given."""

    def __init__(self, model, error_at=None):
        super().__init__()
        self.config, self.shapes, self.error_at = model.config, [], error_at

    def generate(self, *positional, **named):
        input_ids, _, self.settings = (*positional, *named.values())
        self.by_keywords = bool(named)  # as transformers' own search is called
        self.shapes.append(tuple(input_ids.shape))
        assert torch.is_inference_mode_enabled() and not self.training
        if self.error_at == len(self.shapes):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return input_ids


@pytest.fixture
def searched(monkeypatch):
    """The search by what stands for a model."""
    monkeypatch.setattr(decoding, "beam_search", lambda model, *given: model.generate(*given))


def test_longest_first_in_batches_of_similar_length(searched, model, dataset, tokenizer, c):
    recording = Recording(model)
    texts = decoding.in_order([decoding.generate(recording, dataset, tokenizer, c, "cpu", 4)])
    assert texts == [text for [text] in dataset["references"]]  # the tokenizer gives a text back as it was
    assert [rows for rows, _ in recording.shapes] == [4, 4, 4, 4, 1]
    widths = [width for _, width in recording.shapes]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == max(map(len, dataset["input_ids"]))
    settings = recording.settings
    assert (settings.num_beams, settings.max_length, settings.early_stopping, settings.no_repeat_ngram_size) == (
        3,
        12,
        True,
        3,
    )
    assert (settings.repetition_penalty, settings.length_penalty, settings.do_sample) == (1.2, 1.0, False)


def test_out_of_memory_is_one_line_that_says_what_to_do(searched, model, dataset, tokenizer, c):
    recording = Recording(model, error_at=1)
    recording.train()
    longest = max(map(len, dataset["input_ids"]))
    with pytest.raises(
        UserError, match=f"4 examples of {longest} tokens together; give --eval_batch_size a value below 4"
    ):
        decoding.generate(recording, dataset, tokenizer, c, "cpu", 4)
    assert recording.training


def test_evaluate_task(searched, model, dataset, tokenizer, c):
    from accelerate import Accelerator

    from expert_merging.data.scores import accuracy

    accelerator = Accelerator(cpu=True)
    task = SimpleNamespace(score=accuracy)
    scores, predictions = decoding.evaluate_task(Recording(model), dataset, task, tokenizer, c, accelerator)
    assert scores == {"accuracy": 100} and predictions == [text for [text] in dataset["references"]]
