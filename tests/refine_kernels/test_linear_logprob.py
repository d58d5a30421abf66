"""The fused LM head against float64, its sampler against the exact softmax, and its memory against [N, V]."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from refine_kernels.linear_logprob import (
    chunked,
    linear_cross_entropy,
    linear_logprob,
    mix_seeds,
    philox,
    reference,
    row_seeds,
)
from tests.numerics import assert_close, relative_error

IGNORE = -100
QUANTITIES = ("logprob", "entropy", "lse", "dx", "dW", "db")


@pytest.fixture(autouse=True)
def _one_thread():
    """The problems are small; on a busy machine two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_head(N, D, V, std=3.0, shift=0.0, dtype=torch.float32, requires_grad=True):
    """x [N, D], weight [V, D], bias [V], target [N]: logits of this standard deviation around this mean."""
    x = torch.randn(N, D).to(dtype).requires_grad_(requires_grad)
    weight = (torch.randn(V, D) * std / D**0.5).to(dtype).requires_grad_(requires_grad)
    bias = (torch.randn(V) + shift).to(dtype).requires_grad_(requires_grad)
    return x, weight, bias, torch.randint(V, (N,))


def with_gradients(function, inputs, target, upstream, **settings):
    """The ``QUANTITIES``: three outputs, and the gradients of their sum weighted by ``upstream``."""
    x, weight, bias = inputs
    out = function(x, weight, target, bias=bias, return_entropy=True, return_lse=True, **settings)
    total = sum((value * g.to(value.dtype)).sum() for value, g in zip(out[:3], upstream))
    return *(value.detach() for value in out[:3]), *torch.autograd.grad(total, inputs)


def as_float64(*tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def entropy_rounding(x, weight, bias):
    """What rounding every logit to float32 may do to the entropies, as a norm: ``dH = -p (log p + H) dz``, where dz
    is up to half of z's last place. Where rows are next to certain, few roundings decide."""
    z = x.detach().double() @ weight.detach().double().T + bias.detach().double()
    log_p = z.log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1, keepdim=True)
    return 2**-24 * (p * (log_p + entropy) * z).norm().item()


def summed_in_db(upstream):
    """The size of what is added up in db, ``g (1_y - p)``, before anything cancels."""
    return torch.stack(upstream).double().abs().sum(0).norm().item()


# ---- parity ----------------------------------------------------------------------------------------------

SHAPES = [(5, 60, 1), (1, 60, 7), (1000, 60, 7), (1000, 60, 1000), (5, 256, 1000), (5, 256, 32000)]


@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
@pytest.mark.parametrize(("std", "shift"), [(3.0, 0.0), (15.0, 100.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_materialised_logits(N, D, V, std, shift, dtype):
    """Every value and gradient within 1.5 times the error of a plain float32-accumulating computation."""
    x, weight, bias, target = make_head(N, D, V, std, shift, dtype)
    target[::3] = IGNORE if N > 1 else target[0]
    upstream = [torch.randn(N) for _ in range(3)]
    inputs = (x, weight, bias)
    truths = with_gradients(reference.linear_logprob, as_float64(*inputs), target, upstream)
    plains = with_gradients(reference.linear_logprob, inputs, target, upstream)
    results = with_gradients(linear_logprob, inputs, target, upstream)

    for name, value, plain, truth in zip(QUANTITIES, results, plains, truths):
        summed = summed_in_db(upstream) if name == "db" else 0.0
        floor = 1e-7 * max(1.0, truth.norm().item(), summed)  # where the plain computation is exact by luck
        floor += entropy_rounding(*inputs) if name == "entropy" else 0.0
        error, allowed = (value.double() - truth).norm(), 1.5 * (plain.double() - truth).norm() + floor
        assert error <= allowed, f"{name}: {error:.2e} against {allowed:.2e}"
    assert (results[1] >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("V", [1, 7, 1000, 32000, 50257, 128256])
@pytest.mark.parametrize("D", [60, 256, 1536, 2048])
@pytest.mark.parametrize("N", [1, 5, 1000])
@pytest.mark.parametrize("std", [3.0, 15.0])
def test_whole_grid(N, D, V, std):
    """As above around +100 in float32, against the same path in float64 (which is the definition's to 1e-12)."""
    if N * D * V > 1000 * 256 * 32000:
        pytest.skip("float64 products of minutes")
    x, weight, bias, target = make_head(N, D, V, std, 100.0)
    for ignored in (False, True):
        if ignored:
            target[:] = IGNORE
        upstream = [torch.randn(N) for _ in range(3)]
        inputs = (x, weight, bias)
        truths = with_gradients(linear_logprob, as_float64(*inputs), target, upstream)
        plains = with_gradients(reference.linear_logprob, inputs, target, upstream)
        results = with_gradients(linear_logprob, inputs, target, upstream)
        for name, value, plain, truth in zip(QUANTITIES, results, plains, truths):
            floor = 1e-7 * max(1.0, truth.norm().item())
            if N <= 5:  # half a last place of a logit near 100: with few rows one rounding decides
                floor += 4e-6 * max(1.0, truth.norm().item())
            error, allowed = (value.double() - truth).norm(), 1.5 * (plain.double() - truth).norm() + floor
            assert error <= allowed, f"{name}: {error:.2e} against {allowed:.2e}"
        assert (results[1] >= 0).all()


@pytest.mark.parametrize("V", [1, 7, 1000])
@pytest.mark.parametrize(("std", "shift"), [(3.0, 0.0), (15.0, 100.0), (1e-3, -1e4)])
def test_entropy_of_given_logits(V, std, shift):
    """An identity head, so that the product is exact: what is left is the row arithmetic's own error."""
    z = torch.randn(500, V) * std + shift
    p, log_p = z.double().softmax(1), z.double().log_softmax(1)
    target = torch.zeros(500, dtype=torch.int64)
    for entropy in (
        linear_logprob(z, torch.eye(V), return_entropy=True).entropy,
        linear_cross_entropy(z, torch.eye(V), target, return_entropy=True)[1],
    ):
        assert (entropy >= 0).all()
        assert (entropy + (p * log_p).sum(1)).abs().max() < 2e-6


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"logit_softcap": 4.0, "temperature": 1.7}])
@pytest.mark.parametrize("asked", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)])
def test_any_mix_of_gradients(asked, settings):
    x, weight, bias, target = make_head(50, 20, 37, dtype=torch.float64)
    target[5:9] = IGNORE
    upstream = [torch.randn(50) * (i in asked) * (torch.rand(50) < 0.5) for i in range(3)]
    results = with_gradients(linear_logprob, (x, weight, bias), target, upstream, **settings)
    truths = with_gradients(reference.linear_logprob, (x, weight, bias), target, upstream, **settings)
    for name, value, expected in zip(QUANTITIES, results, truths):
        assert_close(value, expected, 1e-12, name)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap):
    x, weight, bias, target = make_head(4, 3, 6, dtype=torch.float64)
    target[2] = IGNORE

    def values(x, weight, bias):
        ask = {"return_entropy": True, "return_lse": True}
        return linear_logprob(x, weight, target, temperature=0.8, bias=bias, logit_softcap=softcap, **ask)[:3]

    def loss(x, weight, bias):
        return linear_cross_entropy(x, weight, target, bias=bias, logit_softcap=softcap)

    torch.autograd.gradcheck(values, (x, weight, bias))
    torch.autograd.gradcheck(loss, (x, weight, bias))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cross_entropy(reduction, weighted, dtype):
    x, weight, bias, target = make_head(300, 40, 101, dtype=dtype)
    target[::4] = IGNORE
    row_weight = torch.rand(300) * (torch.rand(300) < 0.7) if weighted else None
    upstream = torch.randn(300) if reduction == "none" else torch.tensor(0.37)

    def run(function, x, weight, bias):
        loss, entropy = function(
            x, weight, target, reduction=reduction, row_weight=row_weight, return_entropy=True, bias=bias
        )
        assert not entropy.requires_grad
        return loss, entropy, *torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), (x, weight, bias))

    truth = run(reference.linear_cross_entropy, *as_float64(x, weight, bias))
    plain = run(reference.linear_cross_entropy, x, weight, bias)
    for name, value, expected, p in zip(
        ("loss", "entropy", "dx", "dW", "db"), run(linear_cross_entropy, x, weight, bias), truth, plain
    ):
        assert_close(value, expected, 1.5 * relative_error(p, expected) + 1e-6, name)
    assert_close(truth[1], run(linear_cross_entropy, *as_float64(x, weight, bias))[1], 1e-12)


def test_cross_entropy_is_torchs():
    x, weight, _, target = make_head(64, 24, 50)
    target[3] = IGNORE
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(x @ weight.t(), target, reduction=reduction)
        assert_close(linear_cross_entropy(x, weight, target, reduction=reduction), expected, 1e-6)


def test_all_rows_ignored():
    x, weight, _, target = make_head(5, 8, 11)
    target[:] = IGNORE
    for reduction in ("mean", "sum", "none"):
        loss, entropy = linear_cross_entropy(x, weight, target, reduction=reduction, return_entropy=True)
        dx, dw = torch.autograd.grad(loss.sum(), (x, weight))
        assert (loss == 0).all() and (dx == 0).all() and (dw == 0).all()
        assert (entropy > 0).all()


def test_only_the_gradients_that_are_needed():
    x, weight, bias, target = make_head(7, 8, 11)
    frozen = weight.detach()
    for loss in (
        linear_cross_entropy(x, frozen, target, bias=bias),
        linear_logprob(x, frozen, target, bias=bias).logprob.mean().neg(),
    ):
        dx, db = torch.autograd.grad(loss, (x, bias))
        expected = torch.autograd.grad(F.cross_entropy(x @ frozen.t() + bias, target), (x, bias))
        assert_close(dx, expected[0], 1e-5)
        assert_close(db, expected[1], 1e-5)


def test_lse_and_entropy_without_target():
    x, weight, _, _ = make_head(7, 8, 11)
    out = linear_logprob(x, weight, return_entropy=True, return_lse=True)
    expected = reference.linear_logprob(x, weight, return_entropy=True, return_lse=True)
    assert out.logprob is None and out.token is None
    for g, e in zip(torch.autograd.grad((out.lse * out.entropy).sum(), (x, weight)),
                    torch.autograd.grad((expected.lse * expected.entropy).sum(), (x, weight))):  # fmt: skip
        assert_close(g, e, 1e-5)


def test_leading_shapes_and_strides():
    x, weight, _, target = make_head(24, 8, 11, requires_grad=False)
    expected = linear_logprob(x, weight, target, return_entropy=True)
    transposed = x.view(4, 6, 8).transpose(0, 1)  # [6, 4, 8], not contiguous
    out = linear_logprob(transposed, weight.t().contiguous().t(), target.view(4, 6).t(), return_entropy=True)
    assert out.logprob.shape == (6, 4)
    assert_close(out.logprob.t().reshape(-1), expected.logprob, 1e-6)
    assert linear_logprob(x[0], weight, target[0]).logprob.shape == ()
    assert linear_logprob(x[:0], weight, target[:0], sample=True).token.shape == (0,)
    assert linear_cross_entropy(x[:0], weight, target[:0]) == 0


def test_autocast_takes_its_dtype_and_keeps_the_arithmetic():
    x, weight, _, target = make_head(20, 16, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprob(x, weight, target)
        loss = linear_cross_entropy(x, weight, target)
    expected = linear_logprob(x.bfloat16(), weight.bfloat16(), target)
    assert out.logprob.dtype == torch.float32
    assert torch.equal(out.logprob, expected.logprob)
    assert_close(loss, -expected.logprob.mean(), 1e-6)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, (x, weight)))


def test_nan_stays_in_its_row():
    x, weight, _, target = make_head(9, 8, 11)
    with torch.no_grad():
        x[4] = float("nan")
    out = linear_logprob(x, weight, target, return_entropy=True, return_lse=True, sample=True, seed=1)
    dx = torch.autograd.grad(out.logprob.sum() + out.entropy.sum() + out.lse.sum(), x)[0]
    dx_dense = torch.autograd.grad(linear_cross_entropy(x, weight, target), x)[0]
    for value in (*out[:3], dx, dx_dense):
        bad = value.isnan().flatten(1).any(1) if value.ndim > 1 else value.isnan()
        assert bad.nonzero().flatten().tolist() == [4]
    target[4] = IGNORE  # a padded row, whatever is in it, reaches nothing else
    loss, entropy = linear_cross_entropy(x, weight, target, return_entropy=True)
    dx, dw = torch.autograd.grad(loss, (x, weight))
    assert loss.isfinite() and dw.isfinite().all() and dx.isfinite().all() and entropy.isnan().sum() == 1


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_row_without_a_distribution_draws_no_token(backend, temperature):
    x, weight, _, _ = make_head(5, 8, 11, requires_grad=False)
    clean = linear_logprob(x, weight, sample=True, seed=3, temperature=temperature, backend=backend)
    x[1], x[3, 2] = float("nan"), float("inf")
    out = linear_logprob(x, weight, sample=True, seed=3, temperature=temperature, backend=backend)
    assert out.token[[1, 3]].tolist() == [-1, -1] and out.logprob[[1, 3]].isnan().all()
    assert torch.equal(out.token[[0, 2, 4]], clean.token[[0, 2, 4]]) and (clean.token >= 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_permuting_rows_permutes_outputs(N, V, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(N, 6, generator=generator), torch.randn(V, 6, generator=generator)
    target, seeds = torch.randint(V, (N,), generator=generator), row_seeds(seed, (N,))
    order = torch.randperm(N, generator=generator)
    ask = {"return_entropy": True, "return_lse": True, "sample": True}
    out = linear_logprob(x, weight, target, seed=seeds, **ask)
    permuted = linear_logprob(x[order], weight, target[order], seed=seeds[order], **ask)
    for value, value_permuted in zip(out[:3], permuted[:3]):
        torch.testing.assert_close(value[order], value_permuted, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.token[order], permuted.token)
    assert (out.entropy >= 0).all() and (out.logprob <= 0).all()


# ---- sampling --------------------------------------------------------------------------------------------


def chi_square_z(counts, expected):
    """Standardised chi-square statistic: about a standard normal when counts follow ``expected``."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1
    return ((statistic - freedom) / (2 * freedom) ** 0.5).item()


@pytest.mark.parametrize(
    ("V", "temperature", "draws"), [(50, 1.0, 200_000), (20, 0.7, 200_000), (997, 1.5, 20_000)]
)
def test_draws_follow_the_softmax(V, temperature, draws):
    x, weight, _, _ = make_head(1, 16, V, std=1.0, requires_grad=False)
    token = linear_logprob(x.expand(draws, 16), weight, sample=True, seed=7, temperature=temperature).token
    p = ((x @ weight.t()).double()[0] / temperature).softmax(0)
    likely = p * draws > 5
    counts = torch.bincount(token, minlength=V).double()
    counts, expected = (torch.cat([v[likely], v[~likely].sum()[None]]) for v in (counts, p * draws))
    assert abs(chi_square_z(counts[expected > 5], expected[expected > 5])) < 4


@pytest.mark.parametrize("pair", ["rows", "seeds"])
def test_draws_are_independent(pair):
    """Joint counts of neighbours against the product of their marginals."""
    draws, V = 100_000, 8
    x, weight, _, _ = make_head(1, 4, V, std=0.5, requires_grad=False)
    x = x.expand(draws, 4)
    first = linear_logprob(x, weight, sample=True, seed=torch.arange(draws)).token
    if pair == "rows":
        first = linear_logprob(x, weight, sample=True, seed=11).token
        second = first.roll(1)
    else:
        second = linear_logprob(x, weight, sample=True, seed=torch.arange(draws) + draws).token
    p = (x[0] @ weight.t()).double().softmax(0)
    joint = torch.bincount(first * V + second, minlength=V * V).double()
    assert abs(chi_square_z(joint, (p[:, None] * p * draws).flatten())) < 4


def test_a_draw_depends_on_its_own_row_alone(monkeypatch):
    x, weight, _, _ = make_head(300, 32, 500, requires_grad=False)
    seeds = row_seeds(5, (300,))
    token = linear_logprob(x, weight, sample=True, seed=seeds).token
    assert torch.equal(token, linear_logprob(x, weight, sample=True, seed=5).token)
    for place in (slice(0, 1), slice(17, 90), slice(299, None), torch.randperm(300)):
        elsewhere = linear_logprob(x[place], weight, sample=True, seed=seeds[place]).token
        assert torch.equal(token[place], elsewhere)
    row = 4 * 500  # bytes; now chunks of 7 rows, blocks of 3, noise for 2
    monkeypatch.setattr(chunked, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 7 * row)
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 3 * row)
    monkeypatch.setattr(chunked, "NOISE_ELEMENTS", 2 * 500)
    assert torch.equal(token, linear_logprob(x, weight, sample=True, seed=seeds).token)
    assert torch.equal(token, reference.linear_logprob(x, weight, sample=True, seed=seeds).token)


def test_draws_log_prob_and_its_gradient():
    x, weight, _, target = make_head(30, 16, 40)
    out = linear_logprob(x, weight, sample=True, seed=3, temperature=0.5)
    expected = linear_logprob(x, weight, out.token, temperature=0.5).logprob
    assert torch.equal(out.logprob, expected)
    assert_close(
        torch.autograd.grad(out.logprob.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0], 1e-6
    )
    beside = linear_logprob(x, weight, target, sample=True, seed=3, temperature=0.5)
    assert torch.equal(beside.token, out.token)
    assert torch.equal(beside.logprob, linear_logprob(x, weight, target, temperature=0.5).logprob)


def test_a_drawn_token_is_never_ignored():
    x, weight, _, _ = make_head(30, 8, 2, std=0.1)
    for function in (linear_logprob, reference.linear_logprob):
        out = function(x, weight, sample=True, seed=0, ignore_index=1)
        assert (out.token == 1).any() and (out.logprob < 0).all()
        assert (torch.autograd.grad(out.logprob.sum(), x)[0] != 0).any(1).all()


def test_greedy_takes_the_lowest_index_on_ties():
    x = torch.randint(-3, 4, (200, 4)).float()
    weight = torch.randint(-2, 3, (64, 4)).float().repeat(3, 1)  # every logit at least three times
    logits = x @ weight.t()
    lowest = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    out = linear_logprob(x, weight, sample=True, temperature=0, return_entropy=True)
    assert torch.equal(out.token, lowest)
    at_one = linear_logprob(x, weight, lowest, return_entropy=True)
    assert torch.equal(out.logprob, at_one.logprob) and torch.equal(out.entropy, at_one.entropy)


def test_no_seed_follows_torchs_generator():
    x, weight, _, _ = make_head(50, 8, 100, std=0.5)
    first, second = (linear_logprob(x, weight, sample=True).token for _ in range(2))
    torch.manual_seed(9)
    third = linear_logprob(x, weight, sample=True).token
    torch.manual_seed(9)
    assert torch.equal(third, linear_logprob(x, weight, sample=True).token)
    assert not torch.equal(first, second)


# ---- the generator ---------------------------------------------------------------------------------------

TRITON_RAND = """
import torch, triton, triton.language as tl

@triton.jit
def draw(seed, out, V: tl.constexpr):
    columns = tl.arange(0, V)
    tl.store(out + tl.program_id(0) * V + columns, tl.rand(tl.load(seed + tl.program_id(0)), columns))

seed = torch.tensor({seeds})
out = torch.empty(len(seed), 2048)
draw[(len(seed),)](seed, out, 2048)
torch.save(out, "{path}")
"""


def test_philox_is_tritons_bit_for_bit(tmp_path):
    seeds, path = [0, 1, -1, 2**40 + 17, -(2**63), 2**63 - 1], tmp_path / "rand.pt"
    script = tmp_path / "rand.py"
    script.write_text(TRITON_RAND.format(seeds=seeds, path=path))
    subprocess.run([sys.executable, script], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    uniform = philox.uniform(torch.tensor(seeds)[:, None], torch.arange(2048))
    assert torch.equal(uniform, torch.load(path))


def test_mix_seeds_is_splitmix64():
    def splitmix64(x):
        mask = 2**64 - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's first published output for state 0
    values = [0, 1, -7, 2**62, -(2**63)]
    expected = [splitmix64(splitmix64(9) ^ (v % 2**64)) for v in values]
    mixed = mix_seeds(9, torch.tensor(values))
    assert [m % 2**64 for m in mixed.tolist()] == expected
    assert mix_seeds(9, -7).item() == mixed[2].item() != mix_seeds(-7, 9).item()
    assert mix_seeds(1, torch.arange(3)[:, None], torch.arange(4)).unique().numel() == 12


def test_gumbel_is_finite_at_both_ends(monkeypatch):
    for end in (0.0, 1 - 2**-24):
        monkeypatch.setattr(philox, "uniform", lambda seed, offset, end=end: torch.full(offset.shape, end))
        assert philox.gumbel(torch.tensor(0), torch.arange(4)).isfinite().all()


# ---- the operators ---------------------------------------------------------------------------------------


def test_opcheck():
    x, weight, bias, target = make_head(9, 8, 11)
    target[3] = IGNORE
    seed = torch.arange(9)
    for arguments in (
        (x, weight, bias, target, seed, 0.7, 5.0, IGNORE, True, True, True),
        (x, weight, None, None, None, 1.0, None, IGNORE, True, False, False),
    ):
        torch.library.opcheck(torch.ops.refine_kernels.linear_logprob.default, arguments)
    arguments = (x, weight, bias, target, torch.ones(9), 5.0, IGNORE, True, True, True, True)
    torch.library.opcheck(torch.ops.refine_kernels.dense_cross_entropy.default, arguments)


def test_compile():
    x, weight, _, target = make_head(9, 8, 11)

    def run(x, weight):
        loss, entropy = linear_cross_entropy(x, weight, target, return_entropy=True)
        out = linear_logprob(x, weight, return_entropy=True, sample=True, seed=4)
        return loss + (out.logprob * out.entropy).sum(), entropy, out.token

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(run(x, weight), compiled(x, weight)):
        assert torch.equal(eager, traced)
    gradients = (torch.autograd.grad(f(x, weight)[0], (x, weight)) for f in (run, compiled))
    for eager, traced in zip(*gradients):
        assert torch.equal(eager, traced)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor made, but for bytes, as which Triton's interpreter moves
    a kernel's arguments. What is inside of a custom op it does not see."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.uint8:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_at_most_one_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(chunked, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)
    N, D, V = 500, 16, 300
    x, weight, _, target = make_head(N, D, V, requires_grad=False)
    head, ones = chunked.head_of(x, weight, None, None), torch.ones(N)
    ask = {"need_logprob": True, "need_entropy": True, "need_lse": True, "sample": True, "greedy": False}
    with LargestTensor() as largest:
        chunked.forward(x, head, target, torch.arange(N), ignore_index=IGNORE, **ask)
        upstream = chunked.Upstream(ones, ones, ones, ones)
        chunked.backward(x, head, target, upstream, ignore_index=IGNORE, needs=(True, True, True))
        chunked.loss_and_gradients(
            x, head, target, ones, ignore_index=IGNORE, need_entropy=True, needs=(True, True, True)
        )
    assert largest.numel == max(16 * V, N * D, V * D)


# ---- bad input -------------------------------------------------------------------------------------------

BAD_INPUT = {
    "x": [{"x": torch.ones(4, 8, dtype=torch.int64)}, {"x": torch.ones(4, 7)}, {"x": torch.tensor(1.0)}],
    "weight": [{"weight": torch.ones(8)}, {"weight": torch.ones(11, 8, device="meta")}],
    "target": [
        {"target": torch.tensor([0, 1, 11, 2])},
        {"target": torch.tensor([0, -1, 1, 2])},
        {"target": torch.zeros(4)},
        {"target": torch.zeros(3, dtype=torch.int64)},
    ],
    "bias": [{"bias": torch.ones(8)}],
    "logit_softcap": [{"logit_softcap": 0.0}],
    "backend": [{"backend": "cuda"}],
}
BAD_SAMPLING = {
    "temperature": [{"temperature": -1.0}, {"temperature": 0.0}, {"temperature": float("nan")}],
    "seed": [
        {"sample": True, "seed": torch.zeros(3, dtype=torch.int64)},
        {"sample": True, "seed": torch.zeros(4)},
        {"sample": True, "seed": 0.5},
    ],
    "target": [{"target": None}],
}
BAD_LOSS = {
    "reduction": [{"reduction": "average"}],
    "row_weight": [{"row_weight": torch.ones(3)}, {"row_weight": torch.ones(4, requires_grad=True)}],
}


@pytest.mark.parametrize(
    ("function", "table"),
    [
        (linear_logprob, BAD_INPUT),
        (linear_logprob, BAD_SAMPLING),
        (linear_cross_entropy, BAD_INPUT),
        (linear_cross_entropy, BAD_LOSS),
    ],
)
def test_bad_input_is_named(function, table):
    good = {"x": torch.ones(4, 8), "weight": torch.ones(11, 8), "target": torch.zeros(4, dtype=torch.int64)}
    function(**good)
    for name, cases in table.items():
        for case in cases:
            with pytest.raises(ValueError, match=rf"^{name} (must|is).*(got|give)"):
                function(**{**good, **case})


def test_bad_seeds_are_named():
    for bad in ([], [0.5], [torch.zeros(2)]):
        with pytest.raises(ValueError, match=r"^parts"):
            mix_seeds(*bad)
