"""The chunk kernels against the definition, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F

from refine_kernels.delta_rule import chunk_delta_rule, op, recurrent_delta_rule, triton_chunk
from refine_kernels.delta_rule.op import _chunk_op, _recurrent_op
from tests.numerics import assert_close, relative_error
from tests.refine_kernels import test_delta_rule as shared
from tests.refine_kernels.test_delta_rule import (
    LENGTHS,
    NAMES,
    assert_same,
    make_inputs,
    run,
    sizes_before_norm,
    to_double,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter", "_short_groups", "_one_thread")
_one_thread = shared._one_thread
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else list(TOLERANCE)


@pytest.fixture
def _short_groups(monkeypatch):
    """Two chunks a group: a short sequence has several."""
    monkeypatch.setattr(triton_chunk, "GROUP_TOKENS", 128)


def to_device(x):
    return {n: a if a is None else a.to(DEVICE) for n, a in x.items()}


def check(inputs, tolerance=1e-5, **options):
    inputs = to_device(inputs)
    expected = run(to_double(inputs), backend="reference", **options)
    actual = run(inputs, backend="triton", **options)
    assert_same(actual, expected, tolerance, sizes_before_norm(inputs, **options))
    return actual


# --- parity with the definition ---------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 100, 300])
def test_lengths(tokens, gated):
    check(make_inputs(2, tokens, 1, 16, 24, gated=gated), state_stride=64)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kd", "vd"), [(60, 64), (64, 60), (96, 100), (100, 96), (128, 128), (128, 256), (256, 256), (3, 1)]
)
def test_head_sizes(kd, vd, dtype, gated):
    """Chunks of 64 tokens up to head sizes of 128, and of 32 beyond.

    A state of three numbers may be next to nothing, not eight of them.
    """
    inputs = make_inputs(1, 70, 8 if kd * vd < 8 else 1, kd, vd, gated=gated, dtype=dtype)
    check(inputs, TOLERANCE[dtype], state_stride=64, use_qk_l2norm_in_kernel=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", ["many", "few", "Blackwell"])
def test_tiles_of_every_kind(tiles, dtype, monkeypatch):
    monkeypatch.setattr(triton_chunk, "FEW", 0 if tiles == "many" else 64)
    monkeypatch.setattr(triton_chunk, "has_tensor_memory", lambda device: tiles == "Blackwell")
    check(make_inputs(1, 150, 1, 64, 60, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("through", [("o",), ("final_state",), ("states",)], ids="+".join)
@pytest.mark.parametrize("stride", [64, 256])
def test_gradients_from_any_output(stride, through):
    check(make_inputs(1, 300, 1, 16, 8), state_stride=stride, through=through)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_options_left_out(gated):
    inputs = make_inputs(1, 70, 2, 16, 16, gated=gated) | {"initial_state": None}
    check(inputs, scale=0.3, output_final_state=False)
    without = {n: x.to(DEVICE) for n, x in inputs.items() if x is not None}
    with torch.no_grad():
        o, final_state = chunk_delta_rule(**without, scale=0.3, backend="triton")
    assert final_state is None
    expected = chunk_delta_rule(**without, scale=0.3, backend="reference")[0]
    assert_close(o, expected, 1e-5)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kd", [16, 100])
def test_packed_parity(kd, gated):
    inputs = make_inputs(1, sum(LENGTHS), 1, kd, 8, states=len(LENGTHS), gated=gated)
    cu_seqlens = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0)
    actual = check(inputs, cu_seqlens=cu_seqlens, state_stride=64, use_qk_l2norm_in_kernel=True)
    for n, length in enumerate(LENGTHS):
        assert actual["states"][n, -(-length // 64) :].count_nonzero() == 0


@pytest.mark.parametrize("kd", [16, 100])
def test_packed_sequences_do_not_see_one_another(kd):
    lengths = (40, 65, 7)
    inputs = to_device(make_inputs(1, sum(lengths), 1, kd, 8, states=3))
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    options = {"cu_seqlens": cu_seqlens, "state_stride": 64, "backend": "triton"}
    clean = run(inputs, **options)
    for name, x in inputs.items():
        x[1 if name == "initial_state" else (slice(None), slice(40, 105))] = torch.nan
    for name, x in run(inputs, **options).items():
        for n in range(3):
            if "state" in name:
                ours, theirs = x[n], clean[name][n]
            else:
                ours, theirs = (a[:, cu_seqlens[n] : cu_seqlens[n + 1]] for a in (x, clean[name]))
            if n == 1:
                assert not ours.isfinite().all(), name
            else:
                assert torch.equal(ours, theirs), name


def test_no_rows():
    outputs = run(to_device(make_inputs(0, 5, 2, 8, 4)), state_stride=64, backend="triton")
    assert outputs["states"].shape == (0, 1, 2, 8, 4) and outputs["dq"].shape == (0, 5, 2, 8)


def test_any_strides():
    inputs = to_device(make_inputs(2, 70, 2, 16, 8))
    strided = {n: x.transpose(0, 1).contiguous().transpose(0, 1) for n, x in inputs.items()}
    strided["k"] = torch.cat([inputs["k"], inputs["k"]], -1)[..., :16]
    assert not any(x.is_contiguous() for x in strided.values())
    options = {"state_stride": 64, "backend": "triton"}
    assert_same(run(strided, **options), run(inputs, **options), 1e-6)


def test_gates_of_another_dtype():
    inputs = make_inputs(1, 70, 1, 16, 16)
    mixed = {n: x.half() if n in ("q", "k", "v") else x for n, x in inputs.items()}
    actual = check(mixed, 2e-3)
    assert actual["dbeta"].dtype == actual["dg"].dtype == torch.float32 and actual["dq"].dtype == torch.half


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strong", [-90.0, -500.0, -float("inf")])
def test_weak_decays_behind_a_strong_one(dtype, strong):
    """Inside a chunk, where their sum in one float32 would no longer resolve them."""
    inputs = make_inputs(1, 100, 1, 16, 16, dtype=dtype)
    inputs["g"] = torch.full((1, 100, 1), -3e-3)
    inputs["g"][:, [7, 8, 9, 70]] = strong
    check(inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decays_multiply_up_over_many_chunks(dtype):
    """Nothing is written: what is left of a state is the product of all chunks' decays."""
    tokens, decay = 2048, -3e-6
    zeros = torch.zeros(1, tokens, 1, 16, dtype=dtype, device=DEVICE)
    g = torch.full((1, tokens, 1), decay, device=DEVICE)
    state = torch.ones(1, 1, 16, 16, device=DEVICE)
    given = {"g": g, "initial_state": state, "output_final_state": True, "backend": "triton"}
    _, final = chunk_delta_rule(zeros, zeros, zeros, zeros[..., 0], **given)
    left = torch.tensor(tokens * g[0, 0, 0].double().item()).exp()
    assert_close(final.double(), left.expand_as(final), 1e-6, "what is left")


def test_growth_is_not_cut_off():
    """A gate that grows by e^82 within a chunk, forward and backward."""
    inputs = make_inputs(1, 64, 1, 16, 16)
    inputs["g"] = torch.full((1, 64, 1), 82 / 63)
    inputs["k"] *= 1e-3  # states that stay small beside what they grow by
    check(inputs, 1e-5)


# --- sequences split over programs ------------------------------------------------------------------------


@pytest.fixture
def _split(monkeypatch):
    """Spans of two groups, whatever the chip: sequences of several spans, of one, of none."""
    monkeypatch.setattr(triton_chunk, "span_tokens", lambda *_: 2 * triton_chunk.GROUP_TOKENS)


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("rows", "kd", "vd"), [(2, 16, 24), (1, 60, 40), (1, 100, 20)])
def test_split_parity(rows, kd, vd, gated):
    """Two spans and a rest, with every option; K = 100 takes chunks of 32 tokens in float32."""
    inputs = make_inputs(rows, 520, 1, kd, vd, gated=gated)
    check(inputs, state_stride=64, use_qk_l2norm_in_kernel=True)


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize("through", [("o",), ("final_state",), ("states",)], ids="+".join)
@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 769])
def test_split_gradients_from_any_output(tokens, through):
    heads = 4 if tokens == 1 else 1  # one dbeta alone may nearly cancel
    check(make_inputs(1, tokens, heads, 16, 8), state_stride=256, through=through)


@pytest.mark.usefixtures("_split")
def test_split_options_left_out():
    inputs = make_inputs(1, 600, 2, 16, 16, gated=False) | {"initial_state": None}
    check(inputs, scale=0.3, output_final_state=False)


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_split_packed_parity(gated):
    """Empty sequences, some that end with a span, and places between sequences that nobody takes."""
    lengths = (300, 0, 256, 1, 0, 770, 64, 0)
    inputs = make_inputs(1, sum(lengths), 1, 16, 8, states=len(lengths), gated=gated)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    check(inputs, cu_seqlens=cu_seqlens, state_stride=64)


@pytest.mark.usefixtures("_split")
def test_split_half_precision():
    check(make_inputs(1, 520, 1, 64, 64, dtype=torch.float16), TOLERANCE[torch.float16], state_stride=64)


@pytest.mark.usefixtures("_split")
def test_split_keys_that_never_forget():
    """beta = 2 turns states about without an end: what a span does to its state stays of norm 1."""
    inputs = make_inputs(1, 800, 1, 16, 16, gated=False)
    inputs["k"] = F.normalize(inputs["k"], dim=-1)
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    check(inputs)


@pytest.mark.usefixtures("_split")
def test_a_nan_in_one_packed_sequence_stays_there_when_split():
    lengths = (300, 520, 65)
    inputs = to_device(make_inputs(1, sum(lengths), 1, 16, 8, states=3))
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    clean = run(inputs, cu_seqlens=cu_seqlens, backend="triton")
    inputs["k"][:, 400] = torch.nan
    for name, x in run(inputs, cu_seqlens=cu_seqlens, backend="triton").items():
        if name == "o":  # nor does it reach the chunks before its own
            assert torch.equal(x[:, :364], clean["o"][:, :364])
        if "state" in name:
            assert torch.equal(x[0], clean[name][0]) and torch.equal(x[2], clean[name][2]), name
        else:
            assert torch.equal(x[:, :300], clean[name][:, :300]), name
            assert torch.equal(x[:, 820:], clean[name][:, 820:]), name


def test_where_sequences_are_split():
    """By what a chip holds: never on a CPU, not where programs are many already, not where sequences are short."""
    h100 = 2 * 132
    assert triton_chunk.program_slots(torch.device("cpu")) == 0
    assert triton_chunk.span_tokens(16384, 64, 0, 64) == 0
    assert triton_chunk.span_tokens(16384, 64, h100, 64) == 4096
    assert triton_chunk.span_tokens(16384, 128, h100, 64) == 0
    assert triton_chunk.span_tokens(1536, 1, h100, 64) == 0 < triton_chunk.span_tokens(1537, 1, h100, 64)
    for tokens, programs in itertools.product((1, 700, 4096, 65536, 10**6), (1, 3, 20, 66)):
        span = triton_chunk.span_tokens(tokens, programs, h100, 64)
        assert span == 0 or (span % 512 == 0 and 3 * span < tokens and programs * -(-tokens // span) <= h100)


# --- edges of stability -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("beta=0", "beta=1e-6", "beta=1", "beta=2", "parallel keys=1", "parallel keys=1.9"),
        *("decay=-20", "decay=-1000", "decay now and then=-5000", "decay now and then=-inf"),
    ],
)
def test_stability_edges(name):
    """At most a few times what the sequential rule itself loses in float32."""
    inputs = to_device(shared.edge(name))
    expected = run(to_double(inputs), backend="reference", state_stride=64)
    plain = run(inputs, backend="reference", state_stride=64)
    actual = run(inputs, backend="triton", state_stride=64)
    for key, x in expected.items():
        if x.norm() < 1e-6 * expected["dv"].norm():  # a gradient that the decay has put out: small, not exact
            assert actual[key].norm() < 1e-6 * expected["dv"].norm(), key
        else:
            allowed = max(1e-5, 1e-6 * shared.growth(name)) + 4 * relative_error(plain[key], x)
            assert_close(actual[key], x, allowed, key)


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after another: an hour")
def test_more_programs_than_an_axis_y_holds():
    inputs = to_device(make_inputs(1, 1, 65537, 1, 1))
    check(inputs)


def test_places_hold_every_chunk_of_every_sequence_once():
    for lengths in (LENGTHS, (64,) * 3, (0, 0, 3), (63, 65, 1, 1, 1, 200), (700,)):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        places, owners = triton_chunk._places(sum(lengths), 1, 64, cu_seqlens)
        taken = []
        for n, length in enumerate(lengths):
            first = int(cu_seqlens[n]) // 64 + n
            for place in range(first, first + -(-length // 64)):
                assert owners[place] == n
                taken.append(place)
        assert len(taken) == len(set(taken)) and max(taken) < places == len(owners)


@pytest.mark.parametrize(("kd", "vd"), [(3, 1), (64, 128), (128, 128), (128, 256), (256, 256)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_cover_the_values(kd, vd, itemsize):
    for few in (False, True):
        tiles = triton_chunk.choose_tiles(kd, vd, itemsize, few=few)
        assert tiles.chunk in (32, 64) and triton_chunk.GROUP_TOKENS % tiles.chunk == 0
        assert all(tile.bv >= 16 for tile in tiles[1:]) and tiles.gradient.bk >= max(16, kd / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 6, 7])
def test_what_is_kept_lies_where_kernels_load_it_whole(dtype, gated, tokens):
    q, v = torch.empty(1, tokens, 1, 64, dtype=dtype), torch.empty(1, tokens, 1, 32, dtype=dtype)
    kept = q.new_empty(triton_chunk.kept_count(q, v, q[..., 0] if gated else None))
    plan = triton_chunk._plan(q, v, True, None)
    parts = triton_chunk._kept(kept, q, v, plan, gated)
    assert [None if x is None else tuple(x.shape) for x in parts] == [
        (2, 1, tokens, 1) if gated else None, (2, 1, tokens, 1), (1, tokens, 1, 32), (1, tokens, 1, 64)
    ]  # fmt: skip
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in parts if x is not None]
    assert all(start % 16 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= kept.data_ptr() + kept.nbytes


# --- the op -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "plain", "packed"])
def test_opcheck(kind):
    cu_seqlens = None
    if kind == "packed":
        inputs, cu_seqlens = shared.packed((3, 0, 70))
        cu_seqlens = cu_seqlens.to(DEVICE)
    else:
        inputs = make_inputs(1, 70, 1, 8, 4, gated=kind != "plain")
    inputs = to_device(inputs)
    if kind == "plain":
        inputs["initial_state"] = None
    leaves = [None if inputs[n] is None else inputs[n].requires_grad_() for n in NAMES]
    whole = kind != "plain"
    torch.library.opcheck(_chunk_op, (*leaves, cu_seqlens, 0.3, True, whole, 64 * whole, True, "triton"))


def test_opcheck_recurrent():
    inputs = to_device(make_inputs(2, 3, 1, 8, 4))
    for final in (True, False):
        leaves = [inputs[n] for n in NAMES]
        torch.library.opcheck(_recurrent_op, (*leaves, torch.tensor([1, 1], device=DEVICE), 0.3, True, final))


def test_compiles_to_one_graph():
    def loss(q, k, v, beta, g, initial_state):
        o, final_state, states = chunk_delta_rule(
            q, k, v, beta, g=g, initial_state=initial_state, output_final_state=True, state_stride=64,
            backend="triton",
        )  # fmt: skip
        return o.square().sum() + final_state.sum() + states.square().sum()

    leaves = [x.requires_grad_() for x in to_device(make_inputs(1, 70, 1, 8, 4)).values()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for name, a, b in zip(NAMES, torch.autograd.grad(compiled(*leaves), leaves), expected):
        assert_close(a, b, 1e-6, name)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_recurrent(grad):
    inputs = to_device(make_inputs(3, 3, 1, 16, 8, states=2))
    options = {"state_indices": torch.tensor([1, 0, 1], device=DEVICE), "use_qk_l2norm_in_kernel": True}
    with torch.set_grad_enabled(grad):
        actual = run(inputs, recurrent_delta_rule, with_gradients=grad, backend="triton", **options)
    expected = run(
        to_double(inputs), recurrent_delta_rule, with_gradients=grad, backend="reference", **options
    )
    assert_same(actual, expected, 1e-5)


def test_float64_takes_the_pytorch_path():
    inputs = to_device(make_inputs(1, 5, 1, 8, 4, dtype=torch.float64))
    expected = run(inputs, backend="torch")
    for backend in ("triton", None):
        assert_same(run(inputs, backend=backend), expected, 1e-12)
        assert_same(run(inputs, recurrent_delta_rule, backend=backend), expected, 1e-12)


def test_arguments_of_fla():
    """Positional arguments mean what they mean there: q, k, v, beta, scale, initial_state, ..."""
    names = list(inspect.signature(chunk_delta_rule).parameters)
    assert names[:10] == [
        *("q", "k", "v", "beta", "scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"),
        *("cu_seqlens", "cu_seqlens_cpu"),
    ]
    inputs = to_device(make_inputs(1, 20, 1, 8, 4, gated=False, states=2))
    positional = [inputs[n] for n in NAMES[:4]]
    cu_seqlens = torch.tensor([0, 7, 20])
    o, final_state = chunk_delta_rule(
        *positional, 0.4, inputs["initial_state"], True, True, cu_seqlens.to(DEVICE), cu_seqlens
    )
    expected = op.reference.chunk_delta_rule(
        *positional, scale=0.4, initial_state=inputs["initial_state"], output_final_state=True,
        use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    assert_close(o, expected[0], 1e-5)
    assert_close(final_state, expected[1], 1e-5)
    with pytest.raises(ValueError, match="cu_seqlens_cpu must be"):
        chunk_delta_rule(*positional, cu_seqlens=cu_seqlens.to(DEVICE), cu_seqlens_cpu=cu_seqlens[:2])
    with pytest.raises(ValueError, match="cu_seqlens_cpu needs cu_seqlens"):
        chunk_delta_rule(*positional, cu_seqlens_cpu=cu_seqlens)


def test_keys_of_one_direction_in_half_precision():
    """Where 64 x 64 inverses are worst: short of float32, but bounded."""
    inputs = make_inputs(1, 130, 1, 32, 16, dtype=torch.float64)
    inputs["k"] = F.normalize(inputs["k"][:, :1] + 1e-2 * inputs["k"], dim=-1)
    inputs["beta"] = torch.ones_like(inputs["beta"])
    half = {n: x.float() if n == "initial_state" else x.half() for n, x in inputs.items()}
    check(half, 5e-3)
