"""How far modules move: worked examples, the parts of models by name, and the tool on CLIP and BERT folders."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import call_main
from tiny_models import tiny_model, write_clip

from expert_merging.analysis.movement import Moved, Part, movement, part_of
from expert_merging.core.errors import UserError
from expert_merging.report import movement as report


def test_distance_and_cosine_of_a_worked_example():
    before = {"h.0.attn.c.weight": torch.tensor([3.0, 0.0]), "h.0.attn.c.bias": torch.tensor([4.0])}
    after = {"h.0.attn.c.weight": torch.tensor([3.0, 1.0]), "h.0.attn.c.bias": torch.tensor([2.0])}
    moved, left = movement(before, after)
    one = moved[Part("", 0, "attention")]
    assert left == [] and one.parameters == 3
    assert one.distance == pytest.approx(5**0.5) and one.per_parameter == pytest.approx((5 / 3) ** 0.5)
    assert one.cosine == pytest.approx((9 + 8) / (5 * 14**0.5))


def test_cosines_stay_within_one_and_zeros_have_one():
    weights = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    same, zero, gone = Moved(), Moved(), Moved()
    same.add(weights, weights * 1.0001)
    zero.add(torch.zeros(2), torch.zeros(2))
    gone.add(torch.ones(2), torch.zeros(2))
    assert 1 - 1e-9 < same.cosine <= 1 and zero.cosine == 1 and gone.cosine == 0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vision_model.encoder.layers.11.self_attn.q_proj.weight", Part("vision_model.encoder", 11, "attention")),
        ("vision_model.encoder.layers.0.mlp.fc1.bias", Part("vision_model.encoder", 0, "feed-forward")),
        ("vision_model.encoder.layers.0.layer_norm1.bias", Part("vision_model.encoder", 0, "norm")),
        ("vision_model.embeddings.class_embedding", Part("", None, "embeddings")),
        ("vision_model.post_layernorm.weight", Part("", None, "norm")),
        ("bert.encoder.layer.3.attention.output.dense.weight", Part("bert.encoder", 3, "attention")),
        ("bert.encoder.layer.3.output.dense.weight", Part("bert.encoder", 3, "feed-forward")),
        ("bert.encoder.layer.3.intermediate.dense.weight", Part("bert.encoder", 3, "feed-forward")),
        ("bert.encoder.layer.3.attention.output.LayerNorm.weight", Part("bert.encoder", 3, "norm")),
        ("bert.pooler.dense.weight", Part("", None, "other")),
        ("decoder.block.2.layer.1.EncDecAttention.q.weight", Part("decoder", 2, "attention")),
        ("decoder.block.2.layer.2.DenseReluDense.wi.weight", Part("decoder", 2, "feed-forward")),
        ("transformer.h.5.ln_1.weight", Part("transformer", 5, "norm")),
        ("transformer.h.5.mlp.c_fc.weight", Part("transformer", 5, "feed-forward")),
        ("shared.weight", Part("", None, "embeddings")),
    ],
)
def test_where_a_tensor_belongs(name, part):
    assert part_of(name) == part


def test_names_with_and_without_a_models_prefix_and_of_the_first_berts_meet():
    model = tiny_model("bert").state_dict()
    bare = {name.removeprefix("bert."): tensor for name, tensor in model.items() if name.startswith("bert.")}
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor + 1 for name, tensor in bare.items()}
    for first, second in ((old, model), (model, old)):
        moved, left = movement(first, second)
        layers = {part: one for part, one in moved.items() if part.layer is not None}
        assert {part.kind for part in layers} == {"attention", "feed-forward", "norm"} and len(layers) == 6
        for one in moved.values():
            assert one.per_parameter == pytest.approx(1, abs=1e-6)
        assert all(name.startswith("cls.") for name in left)  # the head, which only one has
    with pytest.raises(UserError, match="no weights in common"):
        movement({"a.b": torch.ones(1)}, {"c.d": torch.ones(1)})


def words(base, tuned, folder) -> list[str]:
    return ["--base_model", str(base), "--tuned_models", *map(str, tuned), "--MOVEMENT_DIR", str(folder)]


def test_the_tool_on_clip_finds_what_was_moved(tmp_path):
    """Feed-forward parts of layer 1 moved by 0.01 a parameter, all else by nothing; of CLIP only the tower is compared."""
    from transformers import CLIPVisionModel

    write_clip(tmp_path / "base")
    towers = []
    for number in (1, 2):
        tower = CLIPVisionModel.from_pretrained(tmp_path / "base")
        for name, parameter in tower.named_parameters():
            parameter.data += 0.01 * number * ("layers.1.mlp" in name)
        tower.save_pretrained(tmp_path / f"tower{number}")
        towers.append(tmp_path / f"tower{number}")
    call_main("tools/module_movement.py", words(tmp_path / "base", towers, tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "movement.json").read_text())
    for number, rows in enumerate(record["models"].values(), start=1):
        for row in rows:
            hit = row["layer"] == 1 and row["kind"] == "feed-forward"
            assert row["per_parameter"] == pytest.approx(0.01 * number * hit, abs=1e-6)
            assert (row["cosine"] == 1) != hit and not row["stack"].startswith("text")
    table = (tmp_path / "out" / "movement.md").read_text()
    assert "| vision_model.encoder | 1 | feed-forward | 1,072 |" in table and "0.0150000 ± 0.0070711" in table
    assert (tmp_path / "out" / "movement.png").stat().st_size > 10_000


def test_the_tool_on_bert_leaves_heads_out_and_says_so(tmp_path, capsys):
    from transformers import BertForSequenceClassification

    tiny_model("bert").save_pretrained(tmp_path / "base")
    tuned = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    tuned.bert.encoder.layer[0].attention.self.query.weight.data *= 2
    tuned.save_pretrained(tmp_path / "tuned")
    call_main("tools/module_movement.py", words(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out"))
    assert "left out" in capsys.readouterr().out
    rows = next(iter(json.loads((tmp_path / "out" / "movement.json").read_text())["models"].values()))
    moved = [(row["layer"], row["kind"]) for row in rows if row["distance"] > 0]
    assert moved == [(0, "attention")]
    # The same again is not made again; other models are refused in one line.
    call_main("tools/module_movement.py", words(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out"))
    with pytest.raises(UserError, match="choose another MOVEMENT_DIR"):
        call_main("tools/module_movement.py", words(tmp_path / "base", [tmp_path / "base"], tmp_path / "out"))
    with pytest.raises(UserError, match="tuned_models: there is no folder"):
        call_main("tools/module_movement.py", words(tmp_path / "base", [tmp_path / "x"], tmp_path / "out"))


def test_rows_go_layer_by_layer_and_what_is_in_none_comes_last():
    moved = {
        Part("e", layer, kind): SimpleNamespace(parameters=1, distance=0, per_parameter=0, cosine=1)
        for layer, kind in ((None, "other"), (1, "norm"), (0, "norm"), (0, "attention"))
    }
    order = [(row["layer"], row["kind"]) for row in report.rows_of(moved)]
    assert order == [(0, "attention"), (0, "norm"), (1, "norm"), (None, "other")]
