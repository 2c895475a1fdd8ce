"""MEO on whole models: against the dense model it is made of, and against the vanilla MoE with the same parameters."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, SIZE, VOCABULARY, perturb, tiny_batch, tiny_model
from torch import nn

from expert_merging import meo
from expert_merging.core.errors import UserError

DESCRIPTIONS = [[1, 2, 3], [4], [5, 6]]
MODES = [(level, mode) for level in meo.LEVELS for mode in meo.MODES]


def converted(family, seed=0, **more):
    settings = {"n": 4, "k": 2, "prompt_gate": True, "descriptions": DESCRIPTIONS} | more
    return meo.convert(tiny_model(family, seed), **settings).eval()


def logits(model, **batch):
    with torch.no_grad():
        return model(**(tiny_batch() | batch)).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("level", "mode"), MODES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 2), (5, 2), (3, 3)])
def test_copies_equal_the_dense_model(family, level, mode, n, k):
    """T1: also with gates that are not uniform, as the experts are the same."""
    model = converted(family, level=level, mode=mode, n=n, k=k)
    with torch.no_grad():
        for module in meo.linears(model).values():
            module.w_gate.normal_()
    torch.testing.assert_close(logits(model), logits(tiny_model(family)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", ["task", "sequence"])
@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (5, 2), (6, 2), (3, 3)])
def test_meo_equals_the_vanilla_mixture(family, level, n, k):
    """T2: outputs, and every gradient, noise included."""
    model = perturb(converted(family, level=level, n=n, k=k))
    results = []
    for mode in ("meo", "moe"):
        meo.set_mode(model, mode)
        out = logits(model)
        model.train()
        model.zero_grad()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(3)
        loss = model(**tiny_batch()).loss
        loss.backward()
        model.eval()
        results.append((out, loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (a, loss_a, grads_a), (b, loss_b, grads_b) = results
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss_a, loss_b, atol=1e-5, rtol=0)
    for name, grad in grads_a.items():
        torch.testing.assert_close(
            grad, grads_b[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_perturbed_experts_are_not_the_dense_model(family):
    """What T1 and T2 compare is not the same for any parameters."""
    model = perturb(converted(family))
    out = logits(model)
    assert (out - logits(tiny_model(family))).abs().max() > 0.01
    meo.set_mode(model, "dense")
    assert (out - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["moe", "meo"])
def test_tasks_differ_and_mix_in_a_batch(mode):
    model = perturb(converted("bert", level="task", mode=mode))
    with torch.no_grad():
        for module in meo.linears(model).values():
            module.w_gate.mul_(50)
    alone = []
    for task in range(len(DESCRIPTIONS)):
        meo.set_task(model, task)
        alone.append(logits(model))
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    for tasks in ([2, 0, 2], [1, 1, 1], [0, 1, 2]):
        meo.set_task(model, torch.tensor(tasks))
        want = torch.stack([alone[task][row] for row, task in enumerate(tasks)])
        torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="tasks are numbered 0 to 2"):
        meo.set_task(model, 3)


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("mode", ["moe", "meo"])
def test_padding_changes_nothing(level, mode):
    """T8: with more padding, and other tokens in it, logits of real tokens stay."""
    for family in ("bert", "t5", "bart"):
        model = perturb(converted(family, level=level, mode=mode))
        batch = tiny_batch()
        ids, mask = batch["input_ids"], batch["attention_mask"]
        more = {"labels": None} if family == "bert" else {"decoder_input_ids": ids[:, :4], "labels": None}
        a = logits(model, **more)
        ids = torch.where(mask == 1, ids, 9)
        ids, mask = (nn.functional.pad(part, (0, 5), value=value) for part, value in ((ids, 11), (mask, 0)))
        b = logits(model, input_ids=ids, attention_mask=mask, **more)
        if family == "bert":
            real = batch["attention_mask"] == 1
            a, b = a[real], b[:, : real.shape[1]][real]
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
@pytest.mark.parametrize(("level", "mode"), [(level, mode) for level, mode in MODES if mode != "dense"])
def test_no_gate_sees_the_future(family, level, mode):
    """T9: another token t in the decoder leaves the logits before t as they are."""
    model = perturb(converted(family, level=level, mode=mode))
    batch, prompt = tiny_batch(), 3
    if family == "gpt2":
        mask = torch.zeros_like(batch["input_ids"])
        mask[:, :prompt] = 1

        def run(ids):
            with meo.prompt(model, mask):
                return logits(model, input_ids=ids, labels=None)

        first, ids = prompt, batch["input_ids"]
    else:

        def run(ids):
            return logits(model, decoder_input_ids=ids, labels=None)

        first, ids = 1, batch["input_ids"]
    before = run(ids)
    for t in range(first, ids.shape[1]):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 5) % VOCABULARY
        after = run(changed)
        torch.testing.assert_close(before[:, :t], after[:, :t], atol=1e-6, rtol=0)
        assert (before[1:, t] - after[1:, t]).abs().max() > 1e-4


@pytest.mark.parametrize(("level", "mode"), [("sequence", "moe"), ("sequence", "meo"), ("token", "meo")])
def test_a_causal_decoder_refuses_the_sequences_gate(level, mode):
    """T9: without prompt_gate; and with it where nothing says what is prompt."""
    with pytest.raises(UserError, match="inside a causal decoder"):
        meo.convert(tiny_model("gpt2"), n=4, k=2, level=level, mode=mode)
    model = meo.convert(tiny_model("gpt2"), n=4, k=2, level=level, mode=mode, prompt_gate=True)
    with pytest.raises(UserError, match="reads the prompt only"):
        logits(model, labels=None)
    with pytest.raises(UserError, match="without a prompt"):
        logits(model, labels=tiny_batch()["input_ids"])


@pytest.mark.parametrize("level", ["task", "sequence", "token"])
@pytest.mark.parametrize("kind", ["moe", "meo", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_the_same_model(tmp_path, family, level, kind):
    """T11: bit for bit, tied weights and the way of attention included; experts are not expanded again."""
    model = perturb(converted(family, level=level, mode=kind))
    if level == "task":
        meo.set_task(model, 0)
    meo.save(model, tmp_path / "model")
    loaded = meo.load(tmp_path / "model")
    assert logits(model).equal(logits(loaded))
    state = loaded.state_dict()
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


def test_what_is_no_saved_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="meo.json does not exist"):
        meo.load(tmp_path)
    with pytest.raises(UserError, match="no stacked linears"):
        meo.save(tiny_model("bert"), tmp_path / "dense")
    model = converted("bert")
    meo.save(model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="do not fit"):
        meo.load(tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_densified_is_a_stock_model(tmp_path, family):
    """T11: the merged model has the stock model's parameters, and transformers loads it."""
    model = perturb(converted(family, level="task"))
    meo.set_task(model, 1)
    want = logits(model)
    dense = meo.densify(copy.deepcopy(model))
    assert {n: p.shape for n, p in dense.named_parameters()} == {
        n: p.shape for n, p in tiny_model(family).named_parameters()
    }
    torch.testing.assert_close(logits(dense), want, atol=1e-6, rtol=0)
    dense.save_pretrained(tmp_path / "dense")
    loaded = type(dense).from_pretrained(tmp_path / "dense", attn_implementation=dense.config._attn_implementation)
    assert logits(loaded).equal(logits(dense))
    assert not any(hooks for m in dense.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks))
    other = meo.densify(model, task=2)
    assert (logits(other) - want).abs().max() > 1e-3


def test_densify_takes_gates_and_refuses_guesses():
    model = perturb(converted("bert"))
    with pytest.raises(UserError, match="give densify those to merge by"):
        meo.densify(copy.deepcopy(model))
    with pytest.raises(UserError, match="token block"):
        meo.densify(converted("bert", level="token"))
    gates = {name: torch.tensor([0.25, 0.75, 0.0, 0.0]) for name in meo.linears(model)}
    name, module = next(iter(meo.linears(model).items()))
    want = 0.25 * module.weight[0] + 0.75 * module.weight[1]
    torch.testing.assert_close(meo.densify(model, gates).get_submodule(name).weight, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "t5-gated", "bart"])
@pytest.mark.parametrize(("level", "mode"), MODES)
def test_bf16(family, level, mode):
    """T13: runs in bfloat16, near what float32 gives."""
    model = perturb(converted(family, level=level, mode=mode))
    for module in meo.linears(model).values():
        module.k = module.n  # no choice that rounding could turn
    want = logits(model)
    out = logits(model.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert (out.float() - want).norm() < 0.05 * want.norm()
    model.train()
    model(**tiny_batch()).loss.backward()
    assert all(m.weight.grad.isfinite().all() for m in meo.linears(model).values())


@pytest.mark.parametrize("mode", ["moe", "meo"])
def test_autocast(mode):
    model = perturb(converted("bert", mode=mode, k=4))
    want = logits(model)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = logits(model.eval())
        loss = model.train()(**tiny_batch()).loss
    assert (out.float() - want).norm() < 0.05 * want.norm()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
@pytest.mark.parametrize(("level", "mode"), MODES)
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(family, level, mode, beams):
    """T13: step by step as if each step computed everything again from the start."""
    model = perturb(converted(family, level=level, mode=mode))
    batch = tiny_batch(prompt=7)
    ids, mask = batch["input_ids"][1:], batch["attention_mask"][1:]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "pad_token_id": 0, "do_sample": False}
    a = model.generate(input_ids=ids, attention_mask=mask, output_scores=True, return_dict_in_generate=True, **how)
    if beams == 1:
        prompt = torch.zeros_like(a.sequences)
        prompt[:, : ids.shape[1]] = 1
        if family == "gpt2":
            with meo.prompt(model, prompt):
                again = logits(model, input_ids=a.sequences, attention_mask=torch.ones_like(prompt), labels=None)
        else:
            again = logits(model, input_ids=ids, attention_mask=mask, decoder_input_ids=a.sequences, labels=None)
        again = again[:, -6:-1]
        scores = torch.stack(a.scores, 1)
        seen = scores.isfinite()  # the end is forbidden before its time
        torch.testing.assert_close(scores[seen], again[seen], atol=1e-5, rtol=0)
    else:
        # Two sequences together as each alone: what is kept for one is not used for another.
        for row in range(2):
            alone = model.generate(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **how)
            assert a.sequences[row].tolist() == alone[0].tolist()


def test_decoding_keeps_merged_weights_within_a_budget(monkeypatch):
    from expert_merging.meo import linear, mixing

    calls = []
    monkeypatch.setattr(linear, "merge", lambda *given: calls.append(1) or mixing.merge(*given))
    model = perturb(converted("t5", mode="meo"))
    ids = tiny_batch()["input_ids"]

    def decode():
        calls.clear()
        result = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return result, len(calls)

    sequences, merges = decode()
    assert merges == 2 * 2  # decoder's linears, once each, not once a step
    stack = next(m.stack for m in meo.linears(model).values() if m.stack.kind == "decoder")
    assert stack.kept_bytes == 4 * 3 * 16 * 32 * 4
    monkeypatch.setattr(linear, "KEPT_BYTES", 2 * 3 * 16 * 32 * 4)
    again, merges = decode()
    assert merges == 2
    assert again.equal(sequences)
    with torch.no_grad():  # weights that change are merged again
        for module in meo.linears(model).values():
            module.weight.mul_(1.5)
    changed, merges = decode()
    fresh = copy.deepcopy(model)
    assert fresh.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).equal(changed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", meo.LEVELS)
@pytest.mark.parametrize("mode", ["moe", "meo"])
def test_gradient_checkpointing(family, level, mode):
    """T13: the same loss and gradients, noise and balance loss included."""
    model = perturb(converted(family, level=level, mode=mode)).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(5)
        model(**tiny_batch()).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any("w_gate" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused():
    model = converted("t5").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UserError, match="use_reentrant"):
        model(**tiny_batch(), use_cache=False)


def test_without_biases_it_is_the_dense_model_without_ffn_biases():
    """T14: what the released code makes of BERT and BART."""
    for family in ("bert", "bart"):
        model, dense = converted(family), tiny_model(family)
        with torch.no_grad():
            for name, linear in meo.linears(model).items():
                linear.bias = None
                dense.get_submodule(name).bias.zero_()
        assert logits(model).equal(logits(dense))
        assert (logits(tiny_model(family)) - logits(dense)).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["meo", "moe"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_released_checkpoints(family, form):
    """Keys as in the released code: stacked, or experts by number; buffers mean and std; the encoder's gates."""
    level = "task" if family == "gpt2" else "sequence"
    model = perturb(converted(family, level=level), seed=5)
    state = {}
    for name, value in model.state_dict().items():
        own = name.rpartition(".")[0]
        stacked = own in meo.linears(model)
        if stacked and form == "moe" and name.endswith((".weight", ".bias")):
            state |= {f"{own}.experts.{i}.dense.{name.rpartition('.')[2]}": value[i].clone() for i in range(4)}
        elif stacked and name.endswith(("w_gate", "w_noise")) and "decoder." in name:
            state[name] = torch.zeros(model.get_submodule(own).d_in, 4)
        else:
            state[name] = value.clone()
        if stacked:
            state |= {f"{own}.mean": torch.zeros(1), f"{own}.std": torch.ones(1)}
    state["something.else"] = torch.zeros(3)
    target = converted(family, level=level, seed=9)
    left = meo.import_released(target, state)
    decoders = [
        f"{n}.{p}" for n, m in meo.linears(model).items() if m.stack.kind == "decoder" for p in ("w_gate", "w_noise")
    ]
    assert sorted(left) == sorted(["something.else", *decoders])
    with torch.no_grad():
        for key in decoders:
            target.state_dict()[key].copy_(model.state_dict()[key])
    assert logits(target).equal(logits(model))


def test_released_checkpoints_that_do_not_fit():
    state = converted("bert").state_dict()
    name = next(iter(meo.linears(converted("bert"))))
    without_bias = {key: value for key, value in state.items() if key != f"{name}.bias"}
    model = converted("bert", seed=3)
    assert meo.import_released(model, without_bias) == []
    assert not model.get_submodule(name).bias.any()
    with pytest.raises(UserError, match="has no bert.encoder.layer.0.intermediate.dense.weight"):
        meo.import_released(model, {key: value for key, value in state.items() if key != f"{name}.weight"})
    with pytest.raises(UserError, match=r"is \(4, 32, 16\) in the checkpoint, \(5, 32, 16\)"):
        meo.import_released(converted("bert", n=5), state)
    by_task = converted("bert", level="task").state_dict()
    with pytest.raises(UserError, match="has no meo_tasks.table.weight"):  # the released code has it elsewhere
        meo.import_released(
            converted("bert", level="task"), {key: value for key, value in by_task.items() if "meo_tasks" not in key}
        )
    with pytest.raises(UserError, match="has no .*LayerNorm"):
        meo.import_released(model, {key: value for key, value in state.items() if "embeddings.LayerNorm" not in key})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"k": 5}, "k=5, n=4"),
        ({"level": "context"}, "level is one of task, sequence, token"),
        ({"mode": "MoE"}, "mode is one of dense, moe, meo"),
        ({"level": "task", "descriptions": None}, "needs descriptions"),
        ({"pattern": r"no\.such"}, "no linear layer"),
    ],
)
def test_what_convert_refuses(settings, says):
    with pytest.raises(UserError, match=says):
        converted("bert", **settings)


def test_other_models_by_pattern():
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=VOCABULARY, dim=SIZE, n_heads=2, n_layers=2, hidden_dim=24)
    dense = DistilBertForMaskedLM(config).eval()
    with pytest.raises(UserError, match="no pattern known for the linears of a distilbert"):
        meo.convert(copy.deepcopy(dense), n=4, k=2)
    model = meo.convert(copy.deepcopy(dense), n=4, k=2, pattern=r"ffn\.lin[12]")
    assert len(meo.linears(model)) == 4
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=0)
    out = logits(perturb(model))
    meo.set_mode(model, "moe")
    torch.testing.assert_close(logits(model), out, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="converted already"):
        meo.convert(model, n=4, k=2, pattern=r"ffn\.lin[12]")


def test_the_linears_that_are_replaced():
    counts = {"bert": 4, "gpt2": 4, "t5": 8, "t5-gated": 12, "bart": 8}
    for family, count in counts.items():
        names = list(meo.linears(converted(family)))
        assert len(names) == count
        assert not any("attn" in name or "attention" in name or "pooler" in name or "cls" in name for name in names)


def test_token_level_gates_of_decoders_are_of_one_mode():
    """A decoder's MEO gate reads the encoder's output, its vanilla gate the tokens: sizes differ."""
    model = converted("t5", level="token", mode="moe")
    with pytest.raises(UserError, match="convert with mode='meo'"):
        meo.set_mode(model, "meo")
    model = converted("t5", level="token", mode="meo")
    with pytest.raises(UserError, match="convert with mode='moe'"):
        meo.set_mode(model, "moe")
    assert {m.mode for m in meo.linears(model).values()} == {"meo"}


def test_a_model_saved_in_another_mode_than_it_was_converted_in_comes_back(tmp_path):
    model = perturb(converted("t5", level="token", mode="moe"))
    expected = logits(model)
    meo.set_mode(model, "dense")
    meo.save(model, tmp_path / "m")
    again = meo.load(tmp_path / "m")
    assert logits(again).equal(logits(model)) and {m.mode for m in meo.linears(again).values()} == {"dense"}
    meo.set_mode(again, "moe")
    assert logits(again).equal(expected)


@pytest.mark.parametrize("head", ["BartForSequenceClassification", "T5ForSequenceClassification", "T5EncoderModel"])
def test_other_heads(head):
    """Models that hold their encoder and decoder elsewhere: MoE and MEO agree, the balance loss is in the loss."""
    import transformers

    config = tiny_model("bart" if head.startswith("Bart") else "t5").config
    config.num_labels, config.eos_token_id, config.pad_token_id = 2, 1, 0
    torch.manual_seed(0)
    model = perturb(meo.convert(getattr(transformers, head)(config), n=4, k=3)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 1], [9, 8, 7, 6, 1]])
    outs = []
    for mode in ("meo", "moe"):
        meo.set_mode(model, mode)
        with torch.no_grad():
            outs.append(model(input_ids=ids)[0])
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    if head != "T5EncoderModel":
        model.train()(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        assert meo.balance_loss(model) > 0
        assert all(module.w_noise.grad.any() for module in meo.linears(model).values())
