"""LaCT: published numbers, decoding across chunk borders, branches that share, the step at chunk borders."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import refine
from refine.models import LaCTConfig, LaCTForCausalLM, new_model
from refine.models import lact as lact_module
from refine.models.lact import LaCTAttention
from refine.models.window_attention import branch_attention, window_attention
from tests.numerics import assert_close, assert_gradients_close, relative_error
from tests.refine.tiny import VOCABULARY, ragged_batch, tiny_model

VARIANTS = {
    "momentum": {},
    "muon": {"use_muon": True},
    "pre-norm": {"ttt_prenorm": True},
    "no momentum, full rank, wide": {"use_momentum": False, "w0_w2_low_rank": -1, "inter_multi": 1.5},
    "no silu on v, no position": {"no_v_silu": True, "ttt_nope": True, "fp32_states": True},
    "norm, bias, no scale": {"attn_qk_norm": True, "qkv_bias": True, "learnable_ttt_scale": False},
    "chunk 1": {"lact_chunk_size": 1},
    "window 1": {"window_size": 1, "lact_chunk_size": 100},
}


def test_layer_matches_the_public_implementation(golden_dir):
    golden = torch.load(golden_dir / "lact_model.pt", weights_only=True)["layer/760M_momentum"]
    settings = json.loads(golden["config_json"])
    del settings["layer_idx"]
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        layer = LaCTAttention(LaCTConfig(**settings))
        layer.load_state_dict(golden["state_dict"])
        layer.to(dtype)
        leaf = golden["in/hidden_states"].detach().to(dtype).clone().requires_grad_()
        out, _, _ = layer(leaf)
        assert_close(out, golden["fp64/out"], tolerance, "output")
        (out * golden["in/cot"].to(dtype)).sum().backward()
        assert_close(leaf.grad, golden["fp64/grad_hidden_states"], tolerance, "gradient of the input")
        for name, parameter in layer.named_parameters():
            assert_close(parameter.grad, golden["fp64/param_grads"][name], tolerance, name)


def test_language_model_matches_the_public_implementation(golden_dir):
    golden = torch.load(golden_dir / "lact_model.pt", weights_only=True)["lm/760M_momentum"]
    model = LaCTForCausalLM(LaCTConfig(**json.loads(golden["config_json"])))
    model.load_state_dict(golden["state_dict"])
    ids = golden["in/input_ids"]
    assert_close(model(ids).logits, golden["fp64/logits"], 1e-5, "logits")
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert_close(loss, golden["fp32/loss_shifted_ce"], 1e-5, "loss")
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, golden["fp32/param_grads"][name], 1e-5, name)


PUBLISHED = {
    "w0_w2_low_rank": 32,
    "rope_theta": 1e6,
}  # what the 760M's config.json sets apart from the defaults


def test_a_hand_written_configuration_means_the_public_classs_model(tmp_path):
    """Defaults are those of the public class; a saved configuration holds its values, whatever the defaults are."""
    config = LaCTConfig()
    assert (config.w0_w2_low_rank, config.rope_theta) == (-1, 1e4)
    for given in ({}, PUBLISHED):
        LaCTConfig(**given).save_pretrained(tmp_path)
        kept = json.loads((tmp_path / "config.json").read_text())
        wanted = (given.get("w0_w2_low_rank", -1), given.get("rope_theta", 1e4))
        assert (kept["w0_w2_low_rank"], kept["rope_theta"]) == wanted
        loaded = LaCTConfig.from_pretrained(tmp_path)
        assert (loaded.w0_w2_low_rank, loaded.rope_theta) == wanted


def test_published_checkpoint_has_these_tensors():
    with torch.device("meta"):
        model = LaCTForCausalLM(LaCTConfig(**PUBLISHED))
    names = dict(model.named_parameters())
    assert len(names) == 507
    assert sum(p.numel() for p in names.values()) == 797_625_312
    layer = "model.layers.23.attn."
    assert names[layer + "qkv.weight"].shape == (4608, 1536)
    assert names[layer + "w0.w_left"].shape == (4, 384, 32)
    assert names[layer + "w1"].shape == (4, 384, 384)
    assert names[layer + "qk_scale"].shape == (1536, 2)
    assert names[layer + "lr_proj.bias"].shape == (12,)
    assert names[layer + "momentum_proj.0.weight"].shape == (4, 1536)
    assert names[layer + "ttt_norm.weight"].shape == (384,)


def continue_in_parts(model, ids, cuts):
    """Logits of the parts between the cuts, each read from the state that the one before left."""
    state, logits = None, []
    for a, b in zip([0, *cuts], [*cuts, ids.shape[1]]):
        output = model(ids[:, a:b], past_key_values=state, use_cache=True)
        state = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    "cuts",
    [[1], [31], [32], [33], [64, 65, 66], [80], [30, 31, 32, 34, 67], list(range(1, 150))],
    ids=lambda cuts: "every token" if len(cuts) > 100 else str(cuts),
)
def test_any_cut_gives_the_full_forward(settings, cuts):
    model = tiny_model("lact", **settings).eval()
    ids, _ = ragged_batch(150, 150)
    full = model(ids).logits
    with torch.no_grad():
        parts, state = continue_in_parts(model, ids, cuts)
    assert_close(parts, full, 1e-11, "logits")
    assert state.position.tolist() == [150, 150]


def test_a_cut_changes_no_gradient():
    model = tiny_model("lact")
    ids, _ = ragged_batch(100)
    cotangent = torch.randn(1, 100, VOCABULARY, dtype=torch.float64)
    gradients = []
    for cuts in ([], [20, 33], [32, 64], [70, 75, 96, 97]):
        model.zero_grad()
        (continue_in_parts(model, ids, cuts)[0] * cotangent).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, grad in gradients[0].items():
            assert_close(other[name], grad, 1e-10, name)


@pytest.mark.parametrize("more", [1, 5, 40, 90])
def test_rows_that_have_read_differently_many_tokens_go_on_together(more):
    model = tiny_model("lact").eval()
    ids, mask = ragged_batch(70, 41, 32, 3)
    tokens, following = torch.randint(VOCABULARY, (4, more)), torch.randint(VOCABULARY, (4, 3))
    with torch.no_grad():
        state = model(ids, attention_mask=mask, use_cache=True).past_key_values
        together = model(tokens, past_key_values=state, use_cache=True)
        after = model(following, past_key_values=together.past_key_values)
    for row, length in enumerate((70, 41, 32, 3)):
        text = torch.cat([ids[row, :length], tokens[row], following[row]])[None]
        alone = model(text).logits
        assert_close(together.logits[row : row + 1], alone[:, length : length + more], 1e-11)
        assert_close(after.logits[row : row + 1], alone[:, -3:], 1e-11)


def test_right_padded_continuation_stops_where_a_row_ends():
    model = tiny_model("lact").eval()
    ids, _ = ragged_batch(40, 40)
    more, more_mask = ragged_batch(50, 7)
    with torch.no_grad():
        state = model(ids, use_cache=True).past_key_values
        state = model(more, attention_mask=more_mask, past_key_values=state, use_cache=True).past_key_values
        assert state.position.tolist() == [90, 47]
        logits = model(ids[:, :4], past_key_values=state).logits
        alone = model(torch.cat([ids[1], more[1, :7], ids[1, :4]])[None]).logits[:, -4:]
    assert_close(logits[1:], alone, 1e-11)


def test_branches_share_their_parent_and_own_little():
    model = tiny_model("lact").eval()
    ids, _ = ragged_batch(100, 100)
    trace = model(ids, state_stride=64).trace
    rows, positions = torch.tensor([0, 1, 1, 0]), torch.tensor([31, 64, 99, 62])
    state = trace.gather(rows, positions)
    memory = state.layers[0].memory
    assert memory is trace.layers[0].memory
    before = memory.weights.applied.clone()
    with torch.no_grad():
        branch, tokens = state, torch.randint(VOCABULARY, (4, 5))
        for t in range(5):
            output = model(tokens[:, t : t + 1], past_key_values=branch, use_cache=True)
            branch = output.past_key_values
    assert branch.layers[0].memory is memory
    assert torch.equal(memory.weights.applied, before)
    assert state.layers[0].own is None
    crossed = branch.layers[0].crossed
    assert crossed.applied.shape[0] == 2, (
        "rows 0 (31 + 5 > 32) and 3 (62 + 5 > 64) alone have weights of their own"
    )
    for row in range(4):
        text = torch.cat([ids[rows[row], : positions[row]], tokens[row]])[None]
        assert_close(output.logits[row, -1], model(text).logits[0, -1], 1e-11)


def test_bytes_of_a_branch_at_the_published_size():
    """Five tokens cost a branch under 5 MB over 24 layers, in float32 too; here one layer is run."""
    config = LaCTConfig(**PUBLISHED, num_hidden_layers=1, vocab_size=64, intermediate_size=64)
    model = LaCTForCausalLM(config).eval()
    with torch.no_grad():
        trace = model(torch.zeros(1, 30, dtype=torch.int64), state_stride=64).trace
        state = trace.gather(torch.zeros(2, dtype=torch.int64), torch.tensor([10, 20]))
        state = model(
            torch.zeros(2, 5, dtype=torch.int64), past_key_values=state, use_cache=True
        ).past_key_values
    per_branch = 24 * state.layers[0].bytes_owned / 2
    assert per_branch == 24 * 5 * (4 * 1536 + 4 * 4) * 4
    assert per_branch < 5e6


def test_memory_does_not_grow_with_what_is_generated():
    model = tiny_model("lact").eval()
    ids, _ = ragged_batch(40)

    def kept(state) -> int:
        layer = state.layers[0]
        tokens = layer.memory.tokens
        return (
            sum(x.numel() for x in (tokens.keys, tokens.fast_k, layer.memory.weights.applied))
            + layer.own_tokens
        )

    with torch.no_grad():
        state, largest = model(ids, use_cache=True).past_key_values, []
        for _ in range(200):
            state = model(ids[:, :1], past_key_values=state, use_cache=True).past_key_values
            largest.append(kept(state))
    assert max(largest[100:]) <= max(largest[:100])


@pytest.mark.parametrize("num_rollouts", [1, 2])
@pytest.mark.parametrize("settings", list(VARIANTS.values())[:5], ids=list(VARIANTS)[:5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_both_ways_give_the_same_gradient_at_chunk_borders(num_rollouts, settings, dtype, tolerance):
    """Rollouts of 4 inside a chunk of 32, ending on its border, beginning on it, crossing it; window 24."""
    if dtype == torch.float32 and settings.get("use_muon"):
        tolerance = 1e-4  # as for the op: five Newton-Schulz steps magnify rounding
    model = tiny_model("lact", dtype, initializer_range=0.15, **settings)
    ids, mask = ragged_batch(205, 160)
    positions = torch.tensor([[20, 60, 64, 125, 185], [28, 31, 96, 127, 140]])
    rollouts = torch.randint(VOCABULARY, (2, 5, num_rollouts, 4))
    rollouts[0, 1, 0] = ids[0, 60:64]
    config = refine.RefineConfig(
        num_chunks=5, rollout_length=4, num_rollouts=num_rollouts, reward="hybrid", lambda_rl=1.0
    )
    results = []
    for step in ("shared_prefix", "per_prefix"):
        model.zero_grad()
        output = refine.refine_step(
            model, ids, dataclasses.replace(config, step=step), attention_mask=mask, positions=positions,
            rollouts=rollouts,
        )  # fmt: skip
        output.loss.backward()
        results.append((output, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (shared, got), (slow, expected) = results
    assert_close(shared.loss, slow.loss, tolerance, "loss")
    assert_close(shared.rewards, slow.rewards, max(tolerance, 1e-6), "rewards")
    assert shared.advantages.abs().sum() > 0
    if dtype == torch.float32:  # rounding comes from the whole backward, and Muon's steps magnify it
        assert_gradients_close(got, expected, tolerance)
        return
    # a projection's weight and bias together: what a bias sums up over tokens can cancel to almost nothing
    layers = {name.rsplit(".", 1)[0] if name.endswith((".weight", ".bias")) else name for name in expected}
    for layer in layers:
        parts = [name for name in expected if name == layer or name.rsplit(".", 1)[0] == layer]
        whole = [torch.cat([g[name].flatten() for name in parts]) for g in (got, expected)]
        assert_close(*whole, tolerance, layer)


def test_momentum_and_rates_have_gradients_from_rollouts_alone():
    """A rollout that crosses a border trains what its chunk wrote: cutting the state out changes the gradient."""
    model = tiny_model("lact")
    ids, _ = ragged_batch(100)
    config = refine.RefineConfig(num_chunks=2, rollout_length=4, lambda_sft=0.0, lambda_rl=1.0)
    given = {"positions": torch.tensor([[30, 62]]), "rollouts": torch.randint(VOCABULARY, (1, 2, 1, 4))}
    refine.refine_step(model, ids, config, **given).loss.backward()
    for name in ("lr_proj.bias", "momentum_proj.0.weight", "w1"):
        assert model.get_parameter(f"model.layers.0.attn.{name}").grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("tokens", "length", "window"),
    [
        (1, 1, 5),
        (10, 10, 10),
        (10, 10, 11),
        (300, 300, 7),
        (300, 305, 7),
        (300, 400, 130),
        (200, 200, 1),
        (5, 80, 24),
    ],
)
def test_window_attention_is_dense_attention_with_a_mask(tokens, length, window):
    q, k, v = (
        torch.randn(2, n, 3, 8, dtype=torch.float64, requires_grad=True) for n in (tokens, length, length)
    )
    out = window_attention(q, k, v, window)
    ahead = torch.arange(length) - torch.arange(length - tokens, length)[:, None]
    scores = torch.einsum("bthd,blhd->bhtl", q, k) * 8**-0.5
    scores = scores.masked_fill((ahead > 0) | (ahead <= -window), float("-inf"))
    expected = torch.einsum("bhtl,blhd->bthd", scores.softmax(-1), v)
    assert_close(out, expected, 1e-12)
    cotangent = torch.randn_like(out)
    got = torch.autograd.grad((out * cotangent).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad((expected * cotangent).sum(), (q, k, v))):
        assert (a - b).abs().max() < 1e-11


def test_branch_attention_has_the_gradient_of_attention():
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    tensors = new(4, 3, 2, 4), new(2, 20, 2, 4), new(2, 20, 2, 4), new(4, 5, 2, 4), new(4, 5, 2, 4)
    rows, left = torch.tensor([1, 0, 1, 1]), torch.tensor([3, 20, 11, 8])

    def attend(q, parent_k, parent_v, own_k, own_v):
        return branch_attention(
            q, parent_k, parent_v, torch.zeros(2, dtype=torch.int64), rows, left, own_k, own_v, 7
        )

    assert torch.autograd.gradcheck(attend, tensors)
    q, parent_k, parent_v, own_k, own_v = tensors
    for n in range(4):
        k = torch.cat([parent_k[rows[n], : left[n]], own_k[n]])[None]
        v = torch.cat([parent_v[rows[n], : left[n]], own_v[n]])[None]
        assert_close(attend(*tensors)[n : n + 1], window_attention(q[n : n + 1], k, v, 7), 1e-12)


def test_bfloat16_costs_what_bfloat16_costs():
    ids, _ = ragged_batch(100, 100)
    exact = tiny_model("lact", torch.float64, initializer_range=0.1)(ids).logits
    rounded = tiny_model("lact", torch.bfloat16, initializer_range=0.1)
    assert relative_error(rounded(ids).logits, exact) < 0.05
    state = rounded(ids, use_cache=True).past_key_values
    assert state.layers[0].memory.weights.applied.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 30, "num_attn_heads": 4}, "multiple of num_attn_heads: got 30 and 4"),
        ({"hidden_size": 24, "num_attn_heads": 4, "num_lact_heads": 5}, "multiple of num_lact_heads"),
        ({"hidden_size": 24, "num_attn_heads": 8, "num_lact_heads": 2}, "must be even"),
        ({"lact_chunk_size": 0}, "lact_chunk_size must be a whole number of at least 1, got 0"),
        ({"window_size": -1}, "window_size must be a whole number of at least 1"),
        ({"lr_dim": 2}, "lr_dim=2 is not implemented, only 1 is"),
    ],
)
def test_configs_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LaCTConfig(**settings)


def test_loading_lists_missing_momentum(tmp_path):
    model = tiny_model("lact", torch.float32, use_momentum=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_momentum": True}))
    with pytest.raises(ValueError, match=r"missing keys for lact_swiglu: .*momentum_proj\.0\.bias"):
        refine.load_model(tmp_path)


def test_a_subfolder_is_loaded(tmp_path):
    model = tiny_model("lact", torch.float32).eval()
    model.save_pretrained(tmp_path / "760m")
    ids, _ = ragged_batch(20)
    loaded = refine.load_model(tmp_path, subfolder="760m").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_short_name_makes_a_new_model():
    settings = {"hidden_size": 24, "num_attn_heads": 4, "num_lact_heads": 2, "num_hidden_layers": 1}
    model = new_model("lact", seed=1, vocab_size=20, intermediate_size=16, **settings)
    again = new_model("lact_swiglu", seed=1, vocab_size=20, intermediate_size=16, **settings)
    assert model.config.model_type == "lact_swiglu"
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a, b) and torch.isfinite(a).all()
    assert model.model.layers[0].attn.lr_proj.bias.abs().sum() == 0


def test_packed_documents_of_very_different_lengths_are_hardly_padded(monkeypatch):
    """One long and many short documents: what the window and the chunks read is at most twice the tokens."""
    model, read = tiny_model("lact").eval(), []
    attend = lact_module.window_attention
    monkeypatch.setattr(
        lact_module, "window_attention", lambda q, *rest: read.append(q.shape[:2].numel()) or attend(q, *rest)
    )
    lengths = [200, *range(1, 30)]
    texts = [torch.randint(53, (1, n)) for n in lengths]
    packed = model(torch.cat(texts, 1), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0)).logits
    assert sum(read) <= 2 * 2 * sum(lengths)  # two layers
    monkeypatch.undo()
    assert_close(packed, torch.cat([model(text).logits for text in texts], 1), 1e-11)
