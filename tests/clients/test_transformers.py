"""transformers' conventions: caches, generation, arguments, outputs; the right values under every release."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig

import refine
from refine.models import (
    MODELS,
    DeltaNetConfig,
    FastWeightState,
    new_model,
    output,
    register_auto_classes,
    register_model,
    registered_class,
)
from refine.models.body import FastWeightModel
from refine.models.causal_lm import FastWeightForCausalLM
from refine.models.delta_net import DeltaNetAttention
from refine.models.registry import ENTRIES
from refine.models.state import float_tensors
from tests.clients.families import FAMILIES, tiny_model
from tests.numerics import assert_close
from tests.refine import tiny
from tests.refine.tiny import VOCABULARY, ragged_batch

GREEDY = {"do_sample": False, "pad_token_id": 0}


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape)


def continued(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy tokens by the full forward."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


# ---- caches and generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_state_goes_by_either_name(family, name):
    model = tiny_model(family).eval()
    ids = ids_of(2, 40)
    state = getattr(model(ids[:, :20], use_cache=True), name)
    assert isinstance(state, FastWeightState) and state.get_seq_length() == 20
    assert_close(model(ids[:, 20:], **{name: state}).logits, model(ids).logits[:, 20:], 1e-11)


def test_a_state_is_a_cache_that_is_never_written():
    model = tiny_model().eval()
    ids = ids_of(2, 10)
    empty = FastWeightState()
    assert (len(empty), empty.get_seq_length(), empty.batch_size) == (0, 0, -1)
    for nothing_read in (empty, DynamicCache()):
        assert torch.equal(model(ids, past_key_values=nothing_read).logits, model(ids).logits)
    state = model(ids, use_cache=True).past_key_values
    before = [layer.fast_weight.clone() for layer in state.layers]
    model(ids, past_key_values=state)
    assert all(torch.equal(a, b.fast_weight) for a, b in zip(before, state.layers))
    twice = state.select(torch.arange(2))
    twice.batch_repeat_interleave(2)
    assert (len(state), len(twice), twice.batch_size) == (2, 4, 4)
    state.reset()
    assert not state.started
    with pytest.raises(ValueError, match="tokens_to_remove must be 0"):
        twice.crop(1)
    twice.crop(0)
    used = DynamicCache()
    used.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(TypeError, match=r"must be a FastWeightState, .* got a DynamicCache"):
        model(ids, past_key_values=used)
    with pytest.raises(ValueError, match="past_key_values holds 4 sequences, but 2 are to go on from it"):
        model(ids, past_key_values=twice)
    with pytest.raises(ValueError, match="not both"):
        model(ids, past_key_values=twice, cache=empty.select(torch.arange(0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_says_whether_it_grows(family):
    """Those of fixed size take the same memory after 40 tokens and after 200; keys and values grow."""
    model, sizes = tiny_model(family).eval(), []
    for tokens in (40, 200):
        with torch.no_grad():
            state = model(ids_of(1, tokens), use_cache=True).past_key_values
            state = model(ids_of(1, 40), past_key_values=state, use_cache=True).past_key_values
        sizes.append(sum(x.numel() for x in float_tensors(state)))
    # LaCT's open chunk holds up to 32 tokens
    assert (sizes[1] <= sizes[0] * 1.3) == state.fixed_size
    assert state.fixed_size == (family in tiny.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_goes_on_from_what_it_returned(family):
    """A chat: each turn hands over the state of the turn before and the whole text, padded on the left."""
    model = tiny_model(family, eos_token_id=None).eval()
    ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :2], mask[1, :5] = 0, 0  # every row begins with padding
    first = model.generate(ids, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, ids_of(2, 4)], 1)
    mask = torch.cat([mask, torch.ones(2, 10, dtype=torch.int64)], 1)
    second = model.generate(
        text, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=7, **GREEDY
    )
    for row in range(2):
        alone = text[row : row + 1, mask[row].bool()]
        assert second[row, -7:].tolist() == continued(model, alone, 7)[0, -7:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generation_with_a_state_is_generation_without(family, how):
    model = tiny_model(family, eos_token_id=None).eval()
    ids, mask = ids_of(2, 14), torch.ones(2, 14, dtype=torch.int64)
    mask[1, :6] = 0
    settings = GREEDY | {"attention_mask": mask, "max_new_tokens": 8} | how
    torch.manual_seed(4)
    cached = model.generate(ids, **settings)
    torch.manual_seed(4)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    torch.manual_seed(4)
    assert torch.equal(cached, model.generate(ids, prefill_chunk_size=5, **settings))
    torch.manual_seed(4)
    config = GenerationConfig(prefill_chunk_size=64, eos_token_id=None)
    assert torch.equal(cached, model.generate(ids, generation_config=config, **settings))


def test_generation_from_a_state_without_its_text_says_so():
    model = tiny_model(eos_token_id=None).eval()
    state = model(ids_of(1, 20), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="needs input_ids that begin with the tokens it has read"):
        model.generate(ids_of(1, 5), past_key_values=state, max_new_tokens=2, **GREEDY)


# ---- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_both_sides_changes_nothing(family):
    model = tiny_model(family).eval()
    ids, mask = ids_of(4, 90), torch.zeros(4, 90, dtype=torch.int64)
    for row, (start, end) in enumerate([(7, 80), (0, 90), (30, 90), (0, 41)]):
        mask[row, start:end] = 1
    output = model(ids, attention_mask=mask, use_cache=True, state_stride=64)
    more = ids_of(4, 3)
    after = model(more, past_key_values=output.past_key_values).logits
    for row in range(4):
        used = ids[row : row + 1, mask[row].bool()]
        alone = model(used, use_cache=True)
        assert_close(output.logits[row, mask[row].bool()], alone.logits[0], 1e-11, "logits")
        follows = model(more[row : row + 1], past_key_values=alone.past_key_values).logits
        assert_close(after[row : row + 1], follows, 1e-11, "after")
        branch = output.trace.gather(torch.tensor([row]), torch.tensor([40]))
        want = model(torch.cat([used[:, :40], more[row : row + 1]], 1)).logits[:, -3:]
        assert_close(model(more[row : row + 1], past_key_values=branch).logits, want, 1e-11, "branch")


def test_masks_that_do_not_fit_are_refused():
    model, ids = tiny_model(), ids_of(2, 10)
    for mask, message in [
        (torch.ones(2, 9), r"attention_mask must be \[2, at least 10\], got \[2, 9\]"),
        (
            torch.ones(2, 1, 10, 10),
            r"attention_mask must be \[batch, tokens\] of 0 and 1, got \[2, 1, 10, 10\]",
        ),
        ({"full_attention": None}, "attention_mask must be .* got dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(ids, attention_mask=mask)


# ---- arguments and outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "name"), [("atention_mask", "attention_mask"), ("labls", "labels"), ("cu_seqlen", "cu_seqlens")]
)
def test_an_unknown_keyword_is_a_type_error_with_the_nearest_name(typo, name):
    model = tiny_model()
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{typo}': did you mean '{name}'"):
        model(ids_of(1, 4), **{typo: None})
    if name != "labels":
        with pytest.raises(TypeError, match=f"did you mean '{name}'"):
            model.model(ids_of(1, 4), **{typo: None})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_body_alone(family):
    model = tiny_model(family).eval()
    ids, mask = ragged_batch(33, 20)
    full = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=True)
    body = model.model(ids, attention_mask=mask, position_ids=torch.arange(33)[None], use_cache=True)
    assert torch.equal(body.last_hidden_state, full.last_hidden_state)
    assert_close(model.lm_head(body.last_hidden_state), full.logits, 1e-12)
    embedded = model.model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    assert torch.equal(embedded.last_hidden_state, full.last_hidden_state)
    assert len(full.hidden_states) == 3 and torch.equal(
        full.hidden_states[0][:, 0], embedded_first(model, ids)
    )
    assert torch.equal(full.hidden_states[-1], full.last_hidden_state)
    assert body.past_key_values.position.tolist() == [33, 20]


def embedded_first(model, ids):
    return model.get_input_embeddings()(ids[:, 0])


def test_outputs_as_asked_for():
    model, ids = tiny_model().eval(), ids_of(2, 9)
    logits = model(ids).logits
    assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:], 1e-12)
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]], 1e-12)
    loss, again, *_ = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert loss.shape == ()
    assert_close(again, logits, 1e-12)
    assert model(ids, labels=ids, return_logits=False).logits is None
    model.train()
    assert model(ids, labels=ids).logits is None
    assert_close(model(ids, labels=ids, return_logits=True).logits, logits, 1e-12)
    assert model(ids, labels=ids).past_key_values is None


TOKENS = torch.zeros(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"input_ids": torch.zeros(2, 0, dtype=torch.int64)},
            r"input_ids must be \[batch, tokens\]",
        ),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, "input_ids must be"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids must be"),
        ({"inputs_embeds": torch.zeros(2, 24)}, r"inputs_embeds must be \[batch, tokens, hidden\]"),
        (
            {"input_ids": TOKENS, "state_stride": 64.0},
            "state_stride must be .* got 64.0",
        ),
        (
            {"input_ids": TOKENS, "state_stride": 32},
            "state_stride must be .* got 32",
        ),
        (
            {"input_ids": TOKENS, "output_attentions": True},
            "output_attentions must be",
        ),
        (
            {"input_ids": TOKENS, "labels": torch.zeros(1, 3)},
            r"labels must be \[1, 4\]",
        ),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_that_cannot_be_are_named(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(family)(**arguments)


# ---- configurations and loading ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet", "lact_swiglu"])
def test_settings_that_are_none_are_refused_with_the_nearest(family):
    with pytest.raises(ValueError, match=r"'hiden_size' is no setting of .*: did you mean 'hidden_size'"):
        new_model(family, hiden_size=64)


@pytest.mark.parametrize("key", ["use_l2warp", "residual_in_fp32", "conv_bias"])
def test_keys_that_change_the_mathematics_are_refused_by_name(key):
    for family in tiny.FAMILIES:
        with pytest.raises(ValueError, match=f"{key}=True is not implemented"):
            tiny_model(family, **{key: True})
        tiny_model(family, **{key: False})


def test_what_is_not_implemented_is_refused_with_what_to_do_instead():
    with pytest.raises(TypeError, match=r"output_router_logits: .* router_aux_loss_coef=0.0"):
        tiny_model()(TOKENS, output_router_logits=True)


def test_an_unknown_key_of_a_file_is_said():
    with pytest.warns(UserWarning, match="'new_mathematics' is unknown"):
        tiny_model(new_mathematics=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_model(new_mathematics=None, attn_mode="chunk", fuse_norm=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_by_either_name(family, tmp_path):
    tiny_model(family, dtype=torch.float32).save_pretrained(tmp_path)
    for name in ("dtype", "torch_dtype"):
        for dtype in (torch.bfloat16, "bfloat16"):
            assert refine.load_model(tmp_path, **{name: dtype}).dtype == torch.bfloat16
            made = new_model("delta_net", hidden_size=16, num_heads=2, num_hidden_layers=1, **{name: dtype})
            assert made.lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="or its name, got 'bfloat61'"):
        refine.load_model(tmp_path, dtype="bfloat61")
    with pytest.raises(ValueError, match=r"'torch_dtyp' is no setting of .*: did you mean 'torch_dtype'"):
        refine.load_model(tmp_path, torch_dtyp=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype or torch_dtype"):
        refine.load_model(tmp_path, torch_dtype=torch.bfloat16, dtype=torch.float32)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_auto_classes_load_ours_and_say_which(family, tmp_path):
    model = tiny_model(family, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert registered_class(model.config.model_type).endswith(type(model).__name__)
    body = AutoModel.from_pretrained(tmp_path).eval()
    ids = ids_of(1, 5)
    assert torch.equal(body(ids).last_hidden_state, model(ids).last_hidden_state)


def test_with_fla_ours_load_and_it_is_said_which(tmp_path):
    """flash-linear-attention registers classes of its own for two of our types when its models are imported."""
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    code = f"""
import warnings
import refine.models, fla.models
from transformers import AutoModelForCausalLM
assert refine.models.registered_class("delta_net").startswith("fla.")
assert type(refine.models.load_model({str(tmp_path)!r})).__module__ == "refine.models.delta_net"
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    refine.models.register_auto_classes()  # as an import of refine after fla does
assert len(told) == 2 and "in the place of fla.models.delta_net" in str(told[0].message), told
assert refine.models.registered_class("delta_net") == "refine.models.delta_net.DeltaNetForCausalLM"
assert type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__module__ == "refine.models.delta_net"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("version", ["5.16.4", "6.0.0"])
def test_releases_outside_the_range_are_refused_at_import(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=f"transformers 5.17 or newer and older than 6, found {version}"):
        exec(Path(output.__file__).read_text(), {"__name__": "refine.models.output"})


def test_a_model_of_ones_own_is_one_file_and_its_registration(tmp_path):
    class OwnConfig(DeltaNetConfig):
        model_type = "own_delta_net"
        layer_type = "own"

    class OwnModel(FastWeightModel):
        config_class = OwnConfig
        mixers = {"own": DeltaNetAttention, "linear_attention": DeltaNetAttention}  # noqa: RUF012

    @register_model("own", tiny={"hidden_size": 8})
    class OwnForCausalLM(FastWeightForCausalLM):
        config_class = OwnConfig
        body_class = OwnModel

    try:
        settings = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 30}
        model = new_model("own", **settings).eval()
        model.save_pretrained(tmp_path)
        ids = torch.randint(30, (1, 90))
        for loaded in (refine.load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
            assert type(loaded) is OwnForCausalLM
            assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
        refine.refine_step(model, ids, refine.RefineConfig(num_chunks=2)).loss.backward()
        config = OwnConfig(**settings)
        config.layer_types = ["own", "mamba"]
        with pytest.raises(
            ValueError, match=r"layer_types\[1\] must be one of linear_attention, own, got 'mamba'"
        ):
            OwnForCausalLM(config)
    finally:
        for table in (ENTRIES, MODELS):
            table.pop("own_delta_net")


def test_ours_load_after_another_package_has_taken_their_types(tmp_path):
    from transformers import AutoConfig

    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)

    class Foreign(type(model.config)):
        pass

    class ForeignModel(type(model)):
        config_class = Foreign

    try:
        AutoConfig.register("delta_net", Foreign, exist_ok=True)
        AutoModelForCausalLM.register(Foreign, ForeignModel, exist_ok=True)
        assert registered_class("delta_net").endswith("ForeignModel")
        assert type(refine.load_model(tmp_path)) is type(model)
        assert type(type(model).from_pretrained(tmp_path)) is type(model)
    finally:
        register_auto_classes()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
