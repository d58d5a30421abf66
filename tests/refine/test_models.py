"""The models: published numbers, incremental decoding, padding, loading, generation."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import refine
from refine.models import (
    DeltaNetConfig,
    DeltaNetForCausalLM,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    export,
    new_model,
)
from refine.models.body import checkpoint_activations
from refine.models.head import HiddenOnly, NextTokenLoss, SampleToken, TokenLogprob
from refine.prepare import packaged_model
from tests.numerics import assert_close
from tests.refine.tiny import DELTA_RULE, FAMILIES, VOCABULARY, ragged_batch, tiny_model

LARGE = {  # published sizes: model type -> (settings, tensors, parameters)
    "delta_net": ({"hidden_size": 2048, "num_heads": 16, "intermediate_size": 5632}, 339, 1_365_677_056),
}


def test_logits_and_states_match_the_public_implementation(golden_dir):
    golden = torch.load(golden_dir / "deltanet_model.pt", weights_only=True)["tiny"]
    model = DeltaNetForCausalLM(DeltaNetConfig(**json.loads(golden["config_json"]))).eval()
    model.load_state_dict(golden["state_dict"])
    output = model(golden["in/input_ids"], use_cache=True)
    assert_close(output.logits, golden["fp32/logits"], 1e-5, "logits")
    states = torch.stack([layer.fast_weight for layer in output.past_key_values.layers])
    assert_close(states, golden["fp32/recurrent_state"], 1e-5, "states")


def test_published_checkpoint_has_these_tensors():
    settings, tensors, parameters = LARGE["delta_net"]
    with torch.device("meta"):
        model = DeltaNetForCausalLM(DeltaNetConfig(**settings))
    names = dict(model.named_parameters())
    assert len(names) == tensors
    assert sum(p.numel() for p in names.values()) == parameters
    assert names["model.layers.23.attn.q_conv1d.weight"].shape == (2048, 1, 4)
    assert names["model.layers.0.attn.b_proj.weight"].shape == (16, 2048)
    assert names["model.layers.0.attn.o_norm.weight"].shape == (128,)


@pytest.mark.parametrize("family", DELTA_RULE)
@pytest.mark.parametrize("settings", [{}, {"use_gate": True}, {"use_gate": False, "allow_neg_eigval": True}])
@pytest.mark.parametrize("cut", [1, 2, 63, 64, 99])
def test_any_cut_of_the_sequence_gives_the_full_forward(family, settings, cut):
    model = tiny_model(family, **settings).eval()
    ids, _ = ragged_batch(100, 100)
    full = model(ids, use_cache=True)
    first = model(ids[:, :cut], use_cache=True)
    second = model(ids[:, cut:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, second.logits], 1), full.logits, 1e-11, "logits")
    assert second.past_key_values.position.tolist() == [100, 100]
    for a, b in zip(second.past_key_values.layers, full.past_key_values.layers):
        assert_close(a.fast_weight, b.fast_weight, 1e-11, "fast weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_single_tokens_without_a_gradient_give_the_full_forward(family):
    model = tiny_model(family).eval()
    ids, _ = ragged_batch(30, 30)
    full, state, logits = model(ids).logits, None, []
    with torch.no_grad():
        for t in range(30):
            output = model(ids[:, t : t + 1], past_key_values=state, use_cache=True)
            state = output.past_key_values
            logits.append(output.logits)
    assert_close(torch.cat(logits, 1), full, 1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_nothing(family, side):
    model = tiny_model(family).eval()
    ids, mask = ragged_batch(70, 41)
    if side == "left":
        ids[1], mask[1] = ids[1].roll(29), mask[1].roll(29)
    alone = model(ids[1:][:, mask[1].bool()], use_cache=True)
    together = model(ids, attention_mask=mask, use_cache=True)
    assert_close(together.logits[1][mask[1].bool()], alone.logits[0], 1e-11, "logits")
    assert together.past_key_values.position.tolist() == [70, 41]
    more = ragged_batch(5, 5)[0]
    go_on = model(more, past_key_values=together.past_key_values).logits
    assert_close(go_on[1:], model(more[1:], past_key_values=alone.past_key_values).logits, 1e-11, "after")
    if family not in DELTA_RULE:
        return
    for a, b in zip(together.past_key_values.layers, alone.past_key_values.layers):
        assert_close(a.fast_weight[1], b.fast_weight[0], 1e-11, "fast weight")
        for x, y in zip(a.tails, b.tails):
            assert_close(x[1], y[0], 1e-11, "convolution inputs")


def test_values_wider_than_one_call_of_the_rule():
    """The default Gated DeltaNet has heads of 256 x 512: trace, chunks and single tokens agree."""
    torch.manual_seed(3)
    config = GatedDeltaNetConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_heads=1,
        head_dim=131,
        vocab_size=VOCABULARY,
        intermediate_size=16,
    )
    model = GatedDeltaNetForCausalLM(config).double().eval()
    assert model.model.layers[0].attn.head_v_dim == 262
    ids, _ = ragged_batch(70)
    full = model(ids).logits
    with torch.no_grad():
        output = model(ids[:, :66], use_cache=True)
        logits, state = [output.logits], output.past_key_values
        for t in range(66, 70):
            output = model(ids[:, t : t + 1], past_key_values=state, use_cache=True)
            state = output.past_key_values
            logits.append(output.logits)
    assert_close(torch.cat(logits, 1), full, 1e-11)
    trace = model(ids, state_stride=64).trace
    branch = trace.gather(torch.tensor([0]), torch.tensor([67]))
    assert_close(model(ids[:, 67:], past_key_values=branch).logits, full[:, 67:], 1e-11)


def test_a_mask_with_a_hole_is_refused():
    ids, mask = ragged_batch(10, 10)
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="hole in row 1"):
        tiny_model()(ids, attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_gives_the_state_at_any_position_with_its_gradient(family):
    model = tiny_model(family)
    ids, _ = ragged_batch(150, 150)
    positions = torch.tensor([1, 2, 3, 63, 64, 65, 127, 128, 150])
    rows = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0])
    trace = model(ids, state_stride=64, head=HiddenOnly()).trace
    state = trace.gather(rows, positions)
    assert state.position.tolist() == positions.tolist()
    next_ids = torch.randint(VOCABULARY, (9, 4))
    hidden = model(next_ids, past_key_values=state, head=HiddenOnly()).last_hidden_state
    cotangent = torch.randn_like(hidden)
    parameters = list(model.parameters())
    got = torch.autograd.grad((hidden * cotangent).sum(), parameters, allow_unused=True)
    loss = 0.0
    for m in range(9):
        text = torch.cat([ids[rows[m], : positions[m]], next_ids[m]])[None]
        alone = model(text, head=HiddenOnly()).last_hidden_state[:, -4:]
        assert_close(hidden[m : m + 1], alone, 1e-10, f"hidden states after {positions[m]}")
        loss = loss + (alone * cotangent[m]).sum()
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), got, expected):
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(a, b, 1e-9, name)


def test_trace_of_a_continued_pass_reaches_into_the_state_before():
    model = tiny_model().eval()
    ids, _ = ragged_batch(80)
    first = model(ids[:, :70], use_cache=True).past_key_values
    trace = model(ids[:, 70:], past_key_values=first, state_stride=64).trace
    for read in (1, 2, 5):
        state = trace.gather(torch.tensor([0]), torch.tensor([read]))
        whole = model(ids[:, : 70 + read], use_cache=True).past_key_values
        assert state.position.tolist() == [70 + read]
        for a, b in zip(state.layers, whole.layers):
            assert_close(a.own_fast_weight(), b.fast_weight, 1e-11)
            for x, y in zip(a.own_tails(), b.tails):
                assert_close(x, y, 1e-11)


def test_selected_states_share_their_parent_and_never_write_it():
    model = tiny_model().eval()
    ids, _ = ragged_batch(20, 20)
    parent = model(ids, use_cache=True).past_key_values
    before = [layer.fast_weight.clone() for layer in parent.layers]
    branches = parent.select(torch.tensor([1, 1, 0, 1]))
    assert len(branches) == 4
    assert branches.layers[0].fast_weight is parent.layers[0].fast_weight
    with torch.no_grad():
        tokens = torch.randint(VOCABULARY, (4, 1))
        output = model(tokens, past_key_values=branches.select(torch.tensor([0, 2, 3, 1])), use_cache=True)
    for layer, old in zip(parent.layers, before):
        assert torch.equal(layer.fast_weight, old)
    alone = model(tokens[1:2], past_key_values=parent.select(torch.tensor([0])), use_cache=True)
    assert_close(output.logits[1:2], alone.logits, 1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family):
    ids, _ = ragged_batch(90)
    results = []
    for checkpointing in (False, True):
        model = tiny_model(family).train()
        if checkpointing:
            checkpoint_activations(model)
        config = refine.RefineConfig(num_chunks=2)
        output = refine.refine_step(model, ids, config, seeds=torch.tensor([5]))
        output.loss.backward()
        results.append([output.loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert_close(a, b, 1e-11)


def test_head_requests_agree_with_logits():
    model = tiny_model().eval()
    ids, _ = ragged_batch(12, 12)
    logits = model(ids).logits
    logprobs = logits.log_softmax(-1)
    targets = ids.roll(-1, 1)
    weight = torch.rand(2, 12)
    loss = model(ids, head=NextTokenLoss(targets, weight))
    picked = logprobs.gather(2, targets[..., None])[..., 0]
    assert_close(loss.loss, -(picked * weight).sum(), 1e-6, "loss")
    assert_close(loss.entropy, -(logprobs.exp() * logprobs).sum(-1), 1e-6, "entropy")
    assert_close(model(ids, head=TokenLogprob(targets)).logprob, picked, 1e-6, "log-probs")
    greedy = model(ids, head=SampleToken(temperature=0.0, targets=targets))
    assert torch.equal(greedy.token, logits.argmax(-1))
    assert_close(greedy.logprob, picked, 1e-6, "log-probs beside greedy tokens")
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(model(ids, labels=ids).loss, expected, 1e-6, "labels")
    assert_close(model(ids, labels=ids, num_items_in_batch=11).loss, expected * 2, 1e-6, "num_items_in_batch")


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_continues_exactly_also_with_left_padding(family):
    model = tiny_model(family, dtype=torch.float32, eos_token_id=None).eval()
    ids, mask = ragged_batch(17, 9)
    ids, mask = ids.flip(1), mask.flip(1)  # padding on the left, as generate() has it
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row in range(2):
        text = ids[row][mask[row].bool()][None]
        for _ in range(8):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        assert greedy[row, 17:].tolist() == text[0, -8:].tolist()
    beams = model.generate(
        ids[:1], attention_mask=mask[:1], max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0
    )
    assert beams.shape == (1, 23)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_load_again(family, tmp_path):
    model = tiny_model(family, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    ids, _ = ragged_batch(20)
    for loaded in (refine.load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)


def test_load_model_reads_configs_of_older_versions(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"qk_norm": "l2", "qk_activation": "silu", "use_beta": True, "norm_first": False}
    config |= {"use_short_conv": True, "attn_mode": "chunk", "fuse_cross_entropy": True, "attn": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refine.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"qk_norm": "sum"}))
    with pytest.raises(ValueError, match=r"qk_norm='sum' is not implemented, only 'l2'"):
        refine.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"model_type is 'mamba'; supported are delta_net"):
        refine.load_model(tmp_path)


def test_load_model_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a local folder nor a hub name"):
        refine.load_model("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        refine.load_model(tmp_path)
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'hiden_size' is no setting"):
        refine.load_model(tmp_path, hiden_size=3)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights["model.extra.weight"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys.*model\.norm\.weight"):
        refine.load_model(tmp_path)
    with pytest.raises(ValueError, match="model_type must be one of"):
        new_model("transformer")


def test_configs_refuse_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match=r"num_heads.*got 30 \* 1.0 with num_heads=4"):
        DeltaNetConfig(hidden_size=30, num_heads=4)
    with pytest.raises(ValueError, match="num_v_heads must equal num_heads"):
        GatedDeltaNetConfig(num_heads=4, num_v_heads=8)


def test_inputs_are_one_of_three():
    with pytest.raises(ValueError, match="exactly one of"):
        tiny_model()()


def test_export_rounds_and_refuses_to_overwrite(tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(source)
    for path in packaged_model().glob("tokenizer*"):
        shutil.copy(path, source)
    arguments = ["--model", str(source), "--output_dir", str(target)]
    assert export.main(arguments) == 0
    rounded = refine.load_model(target)
    assert rounded.dtype == torch.float16
    assert torch.equal(rounded.model.norm.weight, model.model.norm.weight.half())
    assert export.main(arguments) == 2
    assert "holds a model already" in capsys.readouterr().err
