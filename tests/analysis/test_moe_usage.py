"""Use of the experts of causal mixtures: equal to a plain loop, padding apart; what is refused; on to the merge."""

import json
import math

import pytest
import torch
from conftest import call_main
from hf_folders import llama, tune, words
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedTokenizerFast, Qwen2MoeConfig

from expert_merging.analysis import moe_usage
from expert_merging.causal.models import load_model
from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.merging.model_folders import open_source

TOOL = "tools/count_moe_usage.py"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_hidden_layers=2, num_local_experts=5, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, num_hidden_layers=3, moe_intermediate_size=6, shared_expert_intermediate_size=10, num_experts=6,
        num_experts_per_tok=3, mlp_only_layers=[1],
    ),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_hidden_layers=2, num_experts=4, num_experts_per_tok=1),
}  # fmt: skip
TEXTS = ["w1 w2 w3", "w9", "w4 w4 w30 w5 w6 w7 w8 w9 w10 w11", "", "w39 w38 w2", "w12 w13 w14 w15 w16 w17"]


def model_folder(place, family, seed=0):
    torch.manual_seed(0)
    tune(AutoModelForCausalLM.from_config(CONFIGS[family]()), seed, by=0.3).save_pretrained(place)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(place)
    return place


def text_file(path, texts=TEXTS, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def count(folder, texts, out, *more):
    call_main(TOOL, ["--folder", str(folder), "--text", str(texts), "--out", str(out), *map(str, more)])
    return read_json(out)


def plain_loop(folder, most=512):
    """Counts token by token, a text at a time, from the logits that the model hands out."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    k, counts, tokens = model.config.num_experts_per_tok, None, 0
    for text in TEXTS:
        ids = [int(word[1:]) for word in text.split()][:most]
        if not ids:
            continue
        tokens += len(ids)
        with torch.no_grad():
            layers = model(torch.tensor([ids]), output_router_logits=True).router_logits
        counts = counts or [[0] * layers[0].shape[-1] for _ in layers]
        for layer, logits in enumerate(layers):
            for token in logits.tolist():
                for expert in sorted(range(len(token)), key=token.__getitem__)[-k:]:
                    counts[layer][expert] += 1
    return counts, tokens, k


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_counts_are_those_of_a_plain_loop(tmp_path, family, batch):
    folder, texts = model_folder(tmp_path / "model", family), text_file(tmp_path / "texts.jsonl")
    found = count(folder, texts, tmp_path / "usage.json", "--batch_texts", batch)
    counts, tokens, k = plain_loop(folder)
    assert found["layers"] == counts and found["tokens"] == tokens == 23 and found["k"] == k
    assert all(sum(layer) == k * tokens for layer in counts)
    for layer, entropy in zip(counts, found["entropies"], strict=True):
        shares = [one / sum(layer) for one in layer if one]
        assert entropy == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(len(layer)), abs=1e-6)
        assert entropy >= math.log(k) / math.log(len(layer)) - 1e-6
    assert (tmp_path / "usage.png").read_bytes()[:4] == b"\x89PNG"


def test_no_more_tokens_of_a_text_than_asked_for(tmp_path):
    folder, texts = model_folder(tmp_path / "model", "olmoe"), text_file(tmp_path / "texts.jsonl", field="said")
    found = count(folder, texts, tmp_path / "usage.json", "--max_tokens", 2, "--field", "said")
    assert (found["layers"], found["tokens"]) == plain_loop(folder, most=2)[:2] and found["tokens"] == 9


def test_padding_is_not_counted(tmp_path):
    """Beside a long text a short one is mostly padding, which would otherwise all choose the same experts."""
    source = open_source(model_folder(tmp_path / "model", "mixtral"))
    model = load_model(source.folder, "folder").eval()
    short, long = [5], list(range(1, 31))
    one, other, both = (moe_usage.count(model, texts, 2, lambda _: None) for texts in ([short], [long], [short, long]))
    assert torch.equal(both, one + other) and one.sum(dim=1).tolist() == [2, 2]


def test_the_merge_reads_what_is_counted(tmp_path, capsys):
    texts = text_file(tmp_path / "texts.jsonl")
    folders = [model_folder(tmp_path / name, "olmoe", seed) for seed, name in enumerate(("one", "two", "three"))]
    usage = [tmp_path / f"u{i}.json" for i in range(3)]
    for folder, out in zip(folders, usage, strict=True):
        count(folder, texts, out)
    words = ["--method", "caem", "--models", *map(str, folders), "--experts", "6", "--out", str(tmp_path / "merged")]
    with pytest.raises(UserError, match="u1.json was counted of other weights than those in .*one: give that model's"):
        call_main("tools/merge.py", [*words, "--usage", *(str(usage[i]) for i in (1, 0, 2))])
    assert not (tmp_path / "merged").exists()
    call_main("tools/merge.py", [*words, "--usage", *map(str, usage)])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.num_experts == 6
    found = count(tmp_path / "merged", texts, tmp_path / "merged.json")  # and the merged model can be counted
    assert len(found["layers"][0]) == 6 and sum(found["layers"][0]) == 23


def test_done_is_done_and_another_is_refused(tmp_path, capsys):
    folder, texts, out = model_folder(tmp_path / "m", "olmoe"), text_file(tmp_path / "t.jsonl"), tmp_path / "usage.json"
    count(folder, texts, out)
    before = out.read_bytes()
    count(folder, texts, out, "--batch_texts", 3)  # which changes no count
    assert "there already" in capsys.readouterr().out and out.read_bytes() == before
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 2}))
    with pytest.raises(UserError, match="was made with other constants .model.config.json was .*choose another out"):
        count(folder, texts, out)


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr("expert_merging.analysis.moe_usage.count", hungry)
    folder, texts = model_folder(tmp_path / "m", "olmoe"), text_file(tmp_path / "t.jsonl")
    refused(
        "out of GPU memory .*give --batch_texts a smaller value, or --device cpu", folder, texts, tmp_path / "u.json"
    )


def refused(said, folder, texts, out, *more):
    with pytest.raises(UserError, match=said) as found:
        count(folder, texts, out, *more)
    assert "\n" not in str(found.value) and not out.exists()


def test_texts_that_cannot_be_counted(tmp_path):
    folder, out = model_folder(tmp_path / "model", "olmoe"), tmp_path / "usage.json"
    texts = text_file(tmp_path / "texts.jsonl")
    refused(r"texts.jsonl, line 1: no field 'body'", folder, texts, out, "--field", "body")
    refused("cannot read .*absent.jsonl", folder, tmp_path / "absent.jsonl", out)
    for content, said in (
        ("", "bad.jsonl is empty"),
        ('{"text": "w1"}\n{"text": 3}\n', "bad.jsonl, line 2: the field 'text' is no text but 3"),
        ('{"text": "w1"}\n{"te', "bad.jsonl, line 2: not whole JSON"),
        ('{"text": ""}\n', "the texts hold no token"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        refused(said, folder, tmp_path / "bad.jsonl", out)
    refused("at least 1", folder, texts, out, "--max_tokens", "0")
    with pytest.raises(UserError, match="--out FILE"):
        count(folder, texts, folder)


def test_folders_that_cannot_be_counted(tmp_path):
    out, texts = tmp_path / "usage.json", text_file(tmp_path / "texts.jsonl")
    llama().save_pretrained(tmp_path / "llama")
    refused("model_type is llama; usage is counted of mixtral, qwen2_moe, olmoe$", tmp_path / "llama", texts, out)
    config = read_json(tmp_path / "llama" / "config.json")
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"model_type": "olmoe", "num_experts": 4}))
    refused("llama: there are no experts under the names that olmoe models have", tmp_path / "llama", texts, out)
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"model_type": "switch_transformers"}))
    refused("of a Switch model, tools/count_expert_usage.py counts", tmp_path / "llama", texts, out)
    refused("there is no folder", tmp_path / "nowhere", texts, out)
    folder = model_folder(tmp_path / "model", "olmoe")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 30}))
    refused("its tokenizer gives token 39; the model has 30", folder, texts, out)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused("lacks model.layers.2.*, which OlmoeForCausalLM has", folder, texts, out)
    (folder / "tokenizer.json").unlink()
    refused("holds no whole tokenizer", folder, texts, out)


def test_the_entropies_of_even_use_and_of_the_same_k_experts():
    even, same = [6, 6, 6, 6, 6, 6, 6, 6], [24, 24, 0, 0, 0, 0, 0, 0]
    found = moe_usage.record(torch.tensor([even, same]), 24, ["a", "b"])
    assert found["k"] == 2 and found["entropies"] == pytest.approx([1, math.log(2) / math.log(8)], abs=1e-6)
