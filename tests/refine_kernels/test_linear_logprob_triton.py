"""The Triton path of the fused LM head: against float64, against the PyTorch path, and tile by tile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from refine_kernels.linear_logprob import linear_cross_entropy, linear_logprob, reference, row_seeds
from tests.numerics import assert_close, relative_error
from tests.refine_kernels.test_linear_logprob import (
    IGNORE,
    QUANTITIES,
    LargestTensor,
    _one_thread,  # noqa: F401
    as_float64,
    chi_square_z,
    entropy_rounding,
    make_head,
    with_gradients,
)

triton_forward = pytest.importorskip("refine_kernels.linear_logprob.triton_forward")
from refine_kernels.linear_logprob import fused, op, triton_rows  # noqa: E402
from refine_kernels.linear_logprob.chunked import Upstream  # noqa: E402

Tile = triton_forward.Tile

pytestmark = [
    pytest.mark.usefixtures("interpreter", "default_device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of masked lanes
]
TRITON = {"backend": "triton"}


@pytest.fixture
def small_panels(monkeypatch):
    """Panels of 6 rows and chunks of 4, whatever V."""
    monkeypatch.setattr(fused, "chunk_and_panel", lambda *_: (4, 6))


def use_tile(monkeypatch, tile, splits):
    monkeypatch.setattr(triton_forward, "choose_tile", lambda *_: tile)
    monkeypatch.setattr(triton_forward, "choose_splits", lambda rows, tiles, programs: min(splits, tiles))


# ---- parity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "D", "V"), [(5, 60, 1), (33, 60, 7), (17, 60, 1000), (70, 100, 129), (65, 16, 1025)]
)
@pytest.mark.parametrize(("std", "shift"), [(3.0, 0.0), (15.0, 100.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_exact_as_materialised_logits(N, D, V, std, shift, dtype):
    """Values within 1.5 times the error of a plain computation; float32 gradients too, float16 ones within its
    rounding of dz and of the result."""
    x, weight, bias, target = make_head(N, D, V, std, shift, dtype)
    target[::3] = IGNORE if N > 1 else target[0]
    upstream = [torch.randn(N) for _ in range(3)]
    inputs = (x, weight, bias)
    truths = with_gradients(reference.linear_logprob, as_float64(*inputs), target, upstream)
    plains = with_gradients(reference.linear_logprob, inputs, target, upstream)
    results = with_gradients(linear_logprob, inputs, target, upstream, **TRITON)
    for name, value, plain, truth in zip(QUANTITIES, results, plains, truths):
        floor = 2e-7 * max(1.0, truth.norm().item())
        floor += entropy_rounding(*inputs) if name == "entropy" else 0.0
        if dtype == torch.float16 and name.startswith("d"):
            floor = 1e-3 * max(1.0, truth.norm().item())
        error, allowed = (value.double() - truth).norm(), 1.5 * (plain.double() - truth).norm() + floor
        assert error <= allowed, f"{name}: {error:.2e} against {allowed:.2e}"
    assert (results[1] >= 0).all() and (results[1] - truths[1]).abs().max() < 1e-5 * (1 if shift == 0 else 10)


@pytest.mark.parametrize("V", [1, 7, 700])
@pytest.mark.parametrize(("std", "shift"), [(3.0, 0.0), (15.0, 100.0), (1e-3, -1e4)])
def test_entropy_of_given_logits(V, std, shift):
    """An identity head, so that the product is exact: what is left is the row arithmetic's own error."""
    z = torch.randn(30, V) * std + shift
    p, log_p = z.double().softmax(1), z.double().log_softmax(1)
    target = torch.zeros(30, dtype=torch.int64)
    x = z.clone().requires_grad_()
    for entropy in (
        linear_logprob(z, torch.eye(V), return_entropy=True, **TRITON).entropy,
        linear_cross_entropy(x, torch.eye(V), target, return_entropy=True, **TRITON)[1],
    ):
        assert (entropy >= 0).all()
        assert (entropy + (p * log_p).sum(1)).abs().max() < 5e-6


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"logit_softcap": 4.0, "temperature": 1.7}])
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 1, 2)])
def test_any_mix_of_gradients(asked, settings, small_panels):
    x, weight, bias, target = make_head(21, 20, 37)
    target[5:9] = IGNORE
    upstream = [torch.randn(21) * (i in asked) * (torch.rand(21) < 0.5) for i in range(3)]
    results = with_gradients(linear_logprob, (x, weight, bias), target, upstream, **settings, **TRITON)
    truths = with_gradients(
        reference.linear_logprob, as_float64(x, weight, bias), target, upstream, **settings
    )
    for name, value, expected in zip(QUANTITIES, results, truths):
        assert_close(value, expected, 1e-5, name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
def test_cross_entropy(reduction, weighted, dtype, tolerance, small_panels):
    x, weight, bias, target = make_head(23, 40, 101, dtype=dtype)
    target[::4] = IGNORE
    row_weight = torch.rand(23) * (torch.rand(23) < 0.7) if weighted else None
    upstream = torch.randn(23) if reduction == "none" else torch.tensor(0.37)

    def run(function, inputs, **backend):
        loss, entropy = function(
            inputs[0], inputs[1], target, reduction=reduction, row_weight=row_weight, return_entropy=True,
            bias=inputs[2], logit_softcap=6.0, **backend,
        )  # fmt: skip
        return loss, entropy, *torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), inputs)

    truth = run(reference.linear_cross_entropy, as_float64(x, weight, bias))
    results = run(linear_cross_entropy, (x, weight, bias), **TRITON)
    for name, value, expected in zip(("loss", "entropy", "dx", "dW", "db"), results, truth):
        assert_close(value, expected, 1e-5 if name in ("loss", "entropy") else tolerance, name)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_float16_keeps_small_gradients(reduction):
    """Rows of weight 1e-5, as in a mean over many: their dz has no digits in float16. Then a loss scale."""
    x, weight, bias, target = make_head(20, 16, 300, std=1.0, dtype=torch.float16)
    row_weight = 1e-5 * (1 + torch.rand(20))

    def run(function, inputs, **backend):
        ask = {"reduction": reduction, "row_weight": row_weight, "bias": inputs[2], **backend}
        loss = function(inputs[0], inputs[1], target, **ask).sum()
        return torch.autograd.grad(loss * 2**14, inputs)

    truth = run(reference.linear_cross_entropy, as_float64(x, weight, bias))
    for name, value, expected in zip(
        ("dx", "dW", "db"), run(linear_cross_entropy, (x, weight, bias), **TRITON), truth
    ):
        assert_close(value, expected, 1e-3, name)


def test_losses_alone():
    """No gradient wanted: the streaming forward, over rows with a loss only unless entropies are asked for."""
    x, weight, _, target = make_head(20, 12, 50, requires_grad=False)
    target[::3] = IGNORE
    expected, entropies = reference.linear_cross_entropy(x, weight, target, return_entropy=True)
    loss, entropy = linear_cross_entropy(x, weight, target, return_entropy=True, **TRITON)
    assert_close(loss, expected, 1e-6)
    assert_close(entropy, entropies, 1e-6)
    assert_close(linear_cross_entropy(x, weight, target, **TRITON), expected, 1e-6)


def test_all_rows_ignored():
    x, weight, _, target = make_head(5, 8, 11)
    target[:] = IGNORE
    for reduction in ("mean", "sum", "none"):
        loss, entropy = linear_cross_entropy(
            x, weight, target, reduction=reduction, return_entropy=True, **TRITON
        )
        dx, dw = torch.autograd.grad(loss.sum(), (x, weight))
        assert (loss == 0).all() and (dx == 0).all() and (dw == 0).all()
        assert (entropy > 0).all()


def test_shapes_strides_dtypes_and_no_rows():
    x, weight, _, target = make_head(24, 8, 11, requires_grad=False)
    expected = linear_logprob(x, weight, target, return_entropy=True, **TRITON)
    transposed = x.view(4, 6, 8).transpose(0, 1)
    ask = {"return_entropy": True, **TRITON}
    out = linear_logprob(transposed, weight.t().contiguous().t(), target.view(4, 6).t().int(), **ask)
    assert_close(out.logprob.t().reshape(-1), expected.logprob, 1e-6)
    assert linear_logprob(x[0], weight, target[0], **TRITON).logprob.shape == ()
    assert linear_logprob(x[:0], weight, target[:0], sample=True, **TRITON).token.shape == (0,)
    assert linear_cross_entropy(x[:0], weight, target[:0], **TRITON) == 0
    mixed = linear_logprob(x.half(), weight, target, **TRITON)  # promoted to float32
    assert_close(mixed.logprob, linear_logprob(x.half().float(), weight, target, **TRITON).logprob, 1e-6)


def test_float64_takes_the_pytorch_path():
    x, weight, bias, target = make_head(4, 3, 6, dtype=torch.float64)

    def values(x, weight, bias):
        return linear_logprob(x, weight, target, bias=bias, return_entropy=True, return_lse=True, **TRITON)[
            :3
        ]

    torch.autograd.gradcheck(values, (x, weight, bias))


def test_nan_stays_in_its_row():
    x, weight, _, target = make_head(9, 8, 11)
    with torch.no_grad():
        x[4] = float("nan")
    ask = {"return_entropy": True, "return_lse": True, "sample": True, "seed": 1}
    out = linear_logprob(x, weight, target, **ask, **TRITON)
    dx = torch.autograd.grad(out.logprob.sum() + out.entropy.sum() + out.lse.sum(), x)[0]
    dx_dense = torch.autograd.grad(linear_cross_entropy(x, weight, target, **TRITON), x)[0]
    for value in (*out[:3], dx, dx_dense):
        bad = value.isnan().flatten(1).any(1) if value.ndim > 1 else value.isnan()
        assert bad.nonzero().flatten().tolist() == [4]
    assert out.token[4] == -1 and ((out.token >= 0) & (out.token < 11)).sum() == 8
    target[4] = IGNORE
    loss, entropy = linear_cross_entropy(x, weight, target, return_entropy=True, **TRITON)
    dx, dw = torch.autograd.grad(loss, (x, weight))
    assert loss.isfinite() and dw.isfinite().all() and dx.isfinite().all() and entropy.isnan().sum() == 1


# ---- tiles, splits and draws -----------------------------------------------------------------------------

TILES = [Tile(16, 16, 16, 4, 1), Tile(16, 128, 128, 4, 1), Tile(64, 64, 32, 4, 1), Tile(128, 256, 64, 8, 1)]


def test_no_tile_and_no_split_changes_a_row(monkeypatch):
    x, weight, bias, target = make_head(40, 48, 600, requires_grad=False)
    seeds = row_seeds(5, (40,))
    ask = {"sample": True, "seed": seeds, "return_entropy": True, "return_lse": True, "bias": bias}
    expected = linear_logprob(x, weight, target, backend="torch", **ask)
    for tile, splits in [*zip(TILES, (40, 3, 1, 2)), (TILES[1], 1)]:
        use_tile(monkeypatch, tile, splits)
        out = linear_logprob(x, weight, target, **ask, **TRITON)
        assert torch.equal(out.token, expected.token)
        for value, e in zip(out[:3], expected[:3]):
            assert_close(value, e, 1e-6)


def test_a_draw_depends_on_its_own_row_alone():
    x, weight, _, _ = make_head(80, 32, 300, requires_grad=False)
    seeds = row_seeds(5, (80,))
    out = linear_logprob(x, weight, sample=True, seed=seeds, temperature=0.7, **TRITON)
    expected = linear_logprob(x, weight, sample=True, seed=seeds, temperature=0.7, backend="torch")
    assert torch.equal(out.token, expected.token)
    assert_close(out.logprob, expected.logprob, 1e-6)
    for place in (slice(0, 1), slice(17, 50), slice(79, None)):  # other tiles, other splits
        elsewhere = linear_logprob(
            x[place], weight, sample=True, seed=seeds[place], temperature=0.7, **TRITON
        )
        assert torch.equal(out.token[place], elsewhere.token)


def test_draws_follow_the_softmax():
    draws, V = 6_000, 20
    x, weight, _, _ = make_head(1, 16, V, std=1.0, requires_grad=False)
    x = x / 2  # no token so rare that its count is not near a normal distribution
    token = linear_logprob(x.expand(draws, 16), weight, sample=True, seed=7, temperature=0.8, **TRITON).token
    p = ((x @ weight.t()).double()[0] / 0.8).softmax(0)
    assert (p * draws > 5).all()
    assert abs(chi_square_z(torch.bincount(token, minlength=V).double(), p * draws)) < 4


def test_noise_is_philoxs(monkeypatch):
    """Equal logits: the token is where the noise is largest, for many columns and seeds of both signs."""
    x, weight = torch.zeros(6, 16), torch.zeros(2000, 16)
    seeds = torch.tensor([0, 1, -1, 2**40 + 17, -(2**63), 2**63 - 1])
    token = linear_logprob(x, weight, sample=True, seed=seeds, **TRITON).token
    assert torch.equal(token, linear_logprob(x, weight, sample=True, seed=seeds, backend="torch").token)
    assert token.unique().numel() == 6


@pytest.mark.parametrize(("tile", "splits"), [(TILES[0], 1), (TILES[0], 2), (TILES[0], 12), (TILES[3], 1)])
def test_greedy_takes_the_lowest_index_on_ties(monkeypatch, tile, splits):
    use_tile(monkeypatch, tile, splits)
    x = torch.randint(-3, 4, (20, 4)).float()
    weight = torch.randint(-2, 3, (64, 4)).float().repeat(3, 1)  # every logit at least three times
    bias = torch.full((192,), -100.0)  # nothing in a tile beyond V = 192 may win, were it 0
    logits = x @ weight.t()
    lowest = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    out = linear_logprob(x, weight, bias=bias, sample=True, temperature=0, return_entropy=True, **TRITON)
    assert torch.equal(out.token, lowest)
    at_one = linear_logprob(x, weight, lowest, bias=bias, return_entropy=True, **TRITON)
    assert_close(out.logprob, at_one.logprob, 1e-6)
    assert torch.equal(out.entropy, at_one.entropy)


def test_gradient_of_a_drawn_log_prob():
    x, weight, _, _ = make_head(10, 16, 40)
    out = linear_logprob(x, weight, sample=True, seed=3, temperature=0.5, ignore_index=1, **TRITON)
    expected = linear_logprob(x, weight, out.token, temperature=0.5, backend="torch").logprob
    assert_close(out.logprob, expected, 1e-6)
    for g, e in zip(*(torch.autograd.grad(v.sum(), (x, weight)) for v in (out.logprob, expected))):
        assert_close(g, e, 1e-5)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 2100), st.sampled_from([108, 132, 148, 304]))
def test_splits_are_whole_and_busy(row_tiles, vocab_tiles, programs):
    splits = triton_forward.choose_splits(row_tiles, vocab_tiles, programs)
    per_split = -(-vocab_tiles // splits)
    assert (splits - 1) * per_split < vocab_tiles <= splits * per_split
    if row_tiles == 1 and vocab_tiles >= programs:  # decoding: a multiprocessor each
        assert splits > programs // 2
    # no more steps than without splits
    assert -(-row_tiles * splits // programs) * per_split <= -(-row_tiles // programs) * vocab_tiles


# ---- memory and the operators ----------------------------------------------------------------------------


def test_memory_at_the_shape_of_the_goal():
    """Scratch of a bfloat16 step with gradients at N = 16384, D = 2048, V = 32000, in bytes."""
    N, D, V = 16384, 2048, 32000
    chunk, rows = fused.chunk_and_panel(V, D, torch.bfloat16)
    logits, panel = chunk * V * 4, rows * (V * 2 + D * 2)  # dz and its rows of x
    assert logits >= rows * D * 4  # of dx before they are put in place: where the logits were
    sums, cublas, row_numbers = 4 * V * D + 4 * N * D, 32 << 20, 20 * N * 8
    assert logits + panel + sums + cublas + row_numbers < 600e6


@pytest.mark.parametrize(("D", "V"), [(60, 997), (2048, 32000), (4096, 131072), (1024, 151936)])
def test_products_of_whole_tiles_that_do_not_wait_for_the_weight(D, V):
    for dtype in (torch.bfloat16, torch.float32):
        chunk, panel = fused.chunk_and_panel(V, D, dtype)
        assert chunk >= 512 and panel >= chunk and chunk % 128 == panel % 128 == 0
        assert chunk == 512 or chunk * V * 4 <= fused.CHUNK_BYTES
        assert panel == chunk or panel * V * dtype.itemsize <= max(fused.PANEL_BYTES, V * D)


def test_no_logits_beyond_a_panel(small_panels):
    N, D, V = 60, 8, 300
    x, weight, _, target = make_head(N, D, V, requires_grad=False)
    head, ones = fused.head_of(x, weight, None, None), torch.ones(N)
    ask = {"need_logprob": True, "need_entropy": True, "need_lse": True, "sample": True, "greedy": False}
    needs = {"ignore_index": IGNORE, "needs": (True, True, True)}
    for ignored in (0, 20):
        target[:ignored] = IGNORE
        with LargestTensor() as largest:
            fused.forward(x, head, target, torch.arange(N), ignore_index=IGNORE, **ask)
            fused.backward(x, head, target, Upstream(ones, None, None, None), **needs)
            fused.loss_and_gradients(x, head, target, ones, need_entropy=True, **needs)
        assert largest.numel == V * D  # dW; a panel has 6 V


@pytest.fixture
def rows_worked_on(monkeypatch):
    """For each chunk of logits its rows."""
    seen, gradient = [], triton_rows.gradient

    def recorded(q, dz, head, *, first, rows, **others):
        place = torch.arange(first, first + len(q), device=q.device)
        seen.append((place if rows is None else rows[place]).tolist())
        return gradient(q, dz, head, first=first, rows=rows, **others)

    monkeypatch.setattr(triton_rows, "gradient", recorded)
    return seen


def test_rows_without_a_gradient_cost_nothing(rows_worked_on, small_panels):
    x, weight, _, target = make_head(20, 8, 11)
    logprob = linear_logprob(x, weight, target, **TRITON).logprob
    logprob[torch.tensor([3, 17])].sum().backward()
    assert rows_worked_on == [[3, 17]]
    rows_worked_on.clear()
    target[1:14] = IGNORE
    linear_cross_entropy(x, weight, target, **TRITON)
    assert rows_worked_on == [[0, 14, 15, 16, 17, 18], [19]]
    rows_worked_on.clear()
    target[:] = IGNORE
    linear_cross_entropy(x, weight, target, return_entropy=True, **TRITON)
    assert rows_worked_on == []


@pytest.mark.parametrize("ignored", [[], [20]])
def test_nothing_is_gathered_where_nearly_all_rows_have_a_gradient(rows_worked_on, small_panels, ignored):
    x, weight, _, target = make_head(34, 8, 11, requires_grad=False)
    target[ignored] = IGNORE
    head, ones = fused.head_of(x, weight, None, None), torch.ones(34)
    needs = {"ignore_index": IGNORE, "needs": (True, True, True)}
    with Indexed() as indexed:
        fused.loss_and_gradients(x, head, target, ones, need_entropy=True, **needs)
        fused.backward(x, head, target, Upstream(ones, ones, ones, ones), **needs)
    assert indexed.found == []
    assert [row for chunk in rows_worked_on for row in chunk] == 2 * list(range(34))
    target[:10] = IGNORE
    with Indexed() as indexed:
        fused.loss_and_gradients(x, head, target, ones, need_entropy=True, **needs)
    assert "sort" in indexed.found and "index" in indexed.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_ignored_row_of_nan_among_many_reaches_nothing(small_panels, dtype):
    """It is worked on like the others, and neither it nor a sum has anything of it."""
    x, weight, bias, target = make_head(34, 8, 11, dtype=dtype)
    exact = as_float64(x, weight, bias)
    target[20] = IGNORE
    expected = reference.linear_cross_entropy(*exact[:2], target, bias=exact[2], return_entropy=True)
    truth = torch.autograd.grad(expected[0], exact)
    with torch.no_grad():
        x[20] = float("nan")
    loss, entropy = linear_cross_entropy(x, weight, target, bias=bias, return_entropy=True, **TRITON)
    out = linear_logprob(x, weight, target, bias=bias, return_entropy=True, **TRITON)
    assert_close(loss, expected[0], 1e-6)
    assert out.logprob[20] == 0 and out.logprob.isfinite().all()
    for values in (entropy, out.entropy):
        assert values.isnan().nonzero().flatten().tolist() == [20]
        assert_close(values[target >= 0], expected[1][target >= 0], 1e-6)
    for total in (loss, -out.logprob.sum() / 33):
        for g, e in zip(torch.autograd.grad(total, (x, weight, bias)), truth):
            assert_close(g, e, 1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("wrong", [-1, 11, 2**40])
def test_a_target_that_is_no_column_gives_nan(wrong, monkeypatch):
    """What the kernels do where values are not looked at beforehand."""
    monkeypatch.setattr(op, "_check_target_values", lambda *_: None)
    x, weight, _, target = make_head(20, 8, 11)
    target[3] = wrong
    out = linear_logprob(x, weight, target, return_entropy=True, **TRITON)
    dx = torch.autograd.grad(out.logprob.sum(), x)[0]
    loss, entropy = linear_cross_entropy(x, weight, target, return_entropy=True, **TRITON)
    dx_dense = torch.autograd.grad(loss, x)[0]
    for value in (out.logprob, dx, dx_dense):
        assert value.isnan().reshape(20, -1).any(1).nonzero().flatten().tolist() == [3]
    assert loss.isnan() and entropy.isfinite().all() and out.entropy.isfinite().all()
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, target, **TRITON).isnan()
        assert linear_cross_entropy(x, weight, target, return_entropy=True, **TRITON)[0].isnan()


class Indexed(TorchDispatchMode):
    """Notes operations that gather, scatter, sort or read a tensor back."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if any(part in name for part in ("index", "nonzero", "sort", "gather", "scatter", "is_all_true")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_opcheck():
    x, weight, bias, target = make_head(9, 8, 11)
    target[3] = IGNORE
    for arguments in (
        (x, weight, bias, target, torch.arange(9), 0.7, 5.0, IGNORE, True, True, True, "triton"),
        (x, weight, None, None, None, 1.0, None, IGNORE, True, False, False, "triton"),
    ):
        torch.library.opcheck(torch.ops.refine_kernels.linear_logprob.default, arguments)
    arguments = (x, weight, bias, target, torch.ones(9), 5.0, IGNORE, True, True, True, True, "triton")
    torch.library.opcheck(torch.ops.refine_kernels.dense_cross_entropy.default, arguments)


def test_compile():
    x, weight, _, target = make_head(9, 8, 11)

    def run(x, weight):
        loss, entropy = linear_cross_entropy(x, weight, target, return_entropy=True, **TRITON)
        out = linear_logprob(x, weight, return_entropy=True, sample=True, seed=4, **TRITON)
        return loss + (out.logprob * out.entropy).sum(), entropy, out.token

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(run(x, weight), compiled(x, weight)):
        assert torch.equal(eager, traced)
    for eager, traced in zip(*(torch.autograd.grad(f(x, weight)[0], (x, weight)) for f in (run, compiled))):
        assert relative_error(traced, eager) == 0
