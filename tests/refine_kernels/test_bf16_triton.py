"""Every configuration of the three ops' kernels in bfloat16, against float64 and beside plain bfloat16.

Without a GPU, in the interpreter with the arithmetic of :mod:`tests.refine_kernels.interpreter_bf16`. It shows what
rounding does to outputs and gradients; what a compiler does only a GPU shows.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    pytest.importorskip("ml_dtypes")
    from tests.refine_kernels.interpreter_bf16 import exact_bf16
else:
    exact_bf16 = contextlib.nullcontext

from refine_kernels.delta_rule import triton_chunk
from refine_kernels.lact import reference as lact_reference
from refine_kernels.linear_logprob import linear_cross_entropy, linear_logprob, reference
from tests.numerics import relative_error
from tests.refine_kernels import test_delta_rule as shared
from tests.refine_kernels import test_delta_rule_recurrent_triton as recurrent
from tests.refine_kernels import test_lact as lact
from tests.refine_kernels.test_linear_logprob import (
    QUANTITIES,
    as_float64,
    make_head,
    summed_in_db,
    with_gradients,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.usefixtures("interpreter", "_one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of masked lanes
]
_one_thread = shared._one_thread
HALF = ("q", "k", "v")


@pytest.fixture(autouse=True)
def _bf16():
    with exact_bf16():
        yield


# ---- the delta rule --------------------------------------------------------------------------------------


def plain_delta_rule(q, k, v, beta, *, g, initial_state, state_stride, **_):
    """Token after token, every product and the state rounded to bfloat16, as eager PyTorch does."""
    q, k = (F.normalize(x.float(), dim=-1, eps=1e-6).bfloat16() for x in (q, k))
    s, beta = initial_state.bfloat16(), beta.bfloat16()
    outputs, states = [], []
    for t in range(q.shape[1]):
        if t % state_stride == 0:
            states.append(s.float())
        if g is not None:
            s = s * g[:, t, :, None, None].exp().bfloat16()
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], s))
        s = s + k[:, t, :, :, None] * u[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), s.float(), torch.stack(states, 1)


def measure_delta_rule(inputs, **options):
    """name -> (error of the kernels, error of the plain computation)."""
    inputs = {
        n: None if x is None else x.to(DEVICE, torch.bfloat16 if n in HALF else torch.float32)
        for n, x in inputs.items()
    }
    options = {"state_stride": 64, "use_qk_l2norm_in_kernel": True} | options
    truth = shared.run(shared.to_double(inputs), backend="reference", **options)
    found = shared.run(inputs, backend="triton", **options)
    plain = shared.run(inputs, plain_delta_rule, **options)
    return {n: (relative_error(found[n], x), relative_error(plain[n], x)) for n, x in truth.items()}


def check(errors, bound=1.0, absolute=1.5e-2):
    """At most ``bound`` of what the plain computation loses, and never more than ``absolute``."""
    bad = {n: e for n, e in errors.items() if not e[0] <= min(bound * e[1], absolute)}
    assert not bad, "kernel, plain: " + ", ".join(f"{n} {a:.1e}, {b:.1e}" for n, (a, b) in bad.items())


GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@GATED
@pytest.mark.parametrize(("kd", "vd", "tokens"), [(60, 100, 140), (128, 128, 70), (144, 24, 70)])
def test_delta_rule(kd, vd, tokens, gated, monkeypatch):
    """Every tile: chunks of 64 tokens up to head sizes of 128, and of 32 beyond.

    With decay, the gradients of beta and g (one number a token) come from the few tokens before a state that is
    asked for: four heads, so that the plain computation's luck evens out.
    """
    monkeypatch.setattr(triton_chunk, "GROUP_TOKENS", 128)
    check(measure_delta_rule(shared.make_inputs(1, tokens, 4 if gated else 1, kd, vd, gated=gated)))


@pytest.mark.slow
@GATED
@pytest.mark.parametrize("tiles", ["many", "few", "Blackwell", "split"])
@pytest.mark.parametrize("kind", ["unit", "silu", "nearly parallel", "beta 2"])
@pytest.mark.parametrize(("kd", "vd"), [(64, 64), (128, 128), (256, 256)])
def test_delta_rule_grid(kd, vd, kind, tiles, gated, monkeypatch):
    monkeypatch.setattr(triton_chunk, "GROUP_TOKENS", 128)
    monkeypatch.setattr(triton_chunk, "FEW", 0 if tiles == "many" else 64)
    monkeypatch.setattr(triton_chunk, "has_tensor_memory", lambda device: tiles == "Blackwell")
    if tiles == "split":
        monkeypatch.setattr(triton_chunk, "span_tokens", lambda *_: 128)
    inputs = shared.make_inputs(1, 450 if tiles == "split" else 150, 1, kd, vd, gated=gated)
    k = inputs["k"]
    if kind == "silu":
        inputs |= {"q": F.silu(inputs["q"]), "k": F.silu(k * k.shape[-1] ** 0.5)}
    elif kind == "nearly parallel":
        inputs["k"] = k[:, :1] + 0.2 * k
    elif kind == "beta 2":
        inputs["beta"] = 1 + inputs["beta"]
    check(measure_delta_rule(inputs))


@GATED
def test_recurrent_and_layer(gated):
    """State and arithmetic are float32: what is lost is the rounding of o."""
    inputs, state = recurrent.make_inputs(2, 3, 1, 128, 100, gated=gated, dtype=torch.bfloat16)
    recurrent.check(inputs, state, tolerance=3e-3)
    layer = recurrent.make_layer(2, 2, 1, 60, 64, 4, parents=3, gated=gated, dtype=torch.bfloat16)
    recurrent.check_layer(layer, 3e-3, backend="triton")


# ---- LaCT ------------------------------------------------------------------------------------------------


def plain_lact(*positional, **options):
    with torch.autocast(DEVICE, torch.bfloat16):
        return lact_reference.chunk_lact(*positional, **options)


def momentum_gradient_size(inputs, *, chunk_size, **options):
    """Norm of the momentum's gradient, of each chunk the sum over weights or, if that cancels, the size of its
    terms (the root of their squares' sum).

    A step is ``M' = G + m M``, so that ``dm = <dM', M>``: the reference goes chunk by chunk through its states,
    whose momentum is the step before.
    """
    leaves = {n: x.requires_grad_() for n, x in lact.to_double(inputs).items()}
    state, outputs, steps = None, [], []
    for start in range(0, leaves["q"].shape[1], chunk_size):
        tokens = {
            n: x if n in ("w0", "w1", "w2") else x[:, start:][:, :chunk_size] for n, x in leaves.items()
        }
        momentum = tokens.pop("momentum")
        ask = {"chunk_size": chunk_size, "initial_state": state, "output_final_state": True, **options}
        o, state = lact_reference.chunk_lact(*tokens.values(), momentum=momentum, **ask)
        outputs.append(o)
        steps.append(state.weights.momentum)
    named = {"o": torch.cat(outputs, 1)} | lact.state_tensors(state)
    gradients = lact.gradients(named, {str(i): step for i, step in enumerate(steps) if i})
    total = 0.0
    for before, gradient in zip(steps, gradients.values()):
        terms = gradient * before.detach()
        size = torch.maximum(terms.sum(-1).abs(), terms.square().sum(-1).sqrt())
        total += (
            size.square().sum().item() / chunk_size
        )  # a mean over the tokens of a chunk, each given as much
    return total**0.5


@pytest.mark.parametrize("muon", [False, True], ids=["no Muon", "Muon"])
@pytest.mark.parametrize("prenorm", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize(
    ("widths", "tokens", "chunk"),
    [
        ((48, 33, 20), 70, 16),
        pytest.param((384, 96, 60), 70, 32, marks=pytest.mark.slow),
        ((64, 64, 64), 150, 70),
    ],
)
def test_lact(widths, tokens, chunk, prenorm, muon):
    """Tiles of chunks up to 16 tokens and beyond, of widths that a vector divides and that none does.

    The gradient of the momentum is one number a chunk, a sum over all weights that nearly cancels where Muon takes
    the size out of a step: it is measured against its terms.
    """
    inputs = lact.make_inputs(2, tokens, widths, use_momentum=True)
    inputs = {n: x.to(DEVICE, torch.bfloat16 if n in HALF else torch.float32) for n, x in inputs.items()}
    options = {"chunk_size": chunk, "use_muon": muon, "prenorm": prenorm}
    truth = lact.run(lact.to_double(inputs), backend="reference", **options)
    found, plain = lact.run(inputs, backend="triton", **options), lact.run(inputs, op=plain_lact, **options)
    errors = {n: (relative_error(found[n], x), relative_error(plain[n], x)) for n, x in truth.items()}
    errors = {n: e for n, e in errors.items() if not n.startswith("open")}
    del errors["dmomentum"]
    error = (found["dmomentum"].double() - truth["dmomentum"]).norm()
    assert error < (2e-2 if muon else 1.5e-2) * momentum_gradient_size(inputs, **options)
    check(errors, 0.5 if muon else 1.0, 0.2 if muon else 1.5e-2)


# ---- the LM head -----------------------------------------------------------------------------------------


ON_DEVICE = pytest.mark.usefixtures("default_device")


@ON_DEVICE
@pytest.mark.parametrize(("N", "D", "V"), [(5, 60, 300), (33, 60, 7), (70, 100, 300)])
def test_linear_logprob(N, D, V):
    """A tile for few rows, for more and for many; values in float32, gradients rounded once."""
    x, weight, bias, target = make_head(N, D, V, dtype=torch.bfloat16)
    upstream = [torch.randn(N) for _ in range(3)]
    inputs = (x, weight, bias)
    truths = with_gradients(reference.linear_logprob, as_float64(*inputs), target, upstream)
    results = with_gradients(linear_logprob, inputs, target, upstream, backend="triton")

    def rounded(x, weight, target, **options):
        """Logits in bfloat16, as ``x @ weight.T`` leaves them."""
        logits = (x @ weight.T + options.pop("bias")).float()
        log_p = logits.log_softmax(-1)
        entropy, lse = -(log_p.exp() * log_p).sum(-1), logits.logsumexp(-1)
        return log_p.gather(-1, target[:, None])[:, 0], entropy, lse

    plains = with_gradients(rounded, inputs, target, upstream)
    for name, value, plain, truth in zip(QUANTITIES, results, plains, truths):
        error, plain_error = relative_error(value, truth), relative_error(plain, truth)
        if name == "db":
            # few numbers, where plain ones may be right by luck: terms and sums are rounded once each
            terms = 2**-9 * summed_in_db(upstream) / truth.norm().item()
            plain_error = max(plain_error, relative_error(truth.bfloat16(), truth) + terms)
        allowed = min(plain_error, 5e-3 if name.startswith("d") else 1e-5)
        assert error <= allowed, f"{name} {error:.1e} against {allowed:.1e}"


@ON_DEVICE
@pytest.mark.parametrize("N", [5, 70])
def test_draws(N):
    """The logits are the same numbers as the PyTorch path's, so are the tokens."""
    x, weight, bias, target = make_head(N, 60, 300, dtype=torch.bfloat16, requires_grad=False)
    ask = {"sample": True, "seed": 3, "bias": bias}
    found = linear_logprob(x, weight, target, backend="triton", **ask)
    assert torch.equal(found.token, linear_logprob(x, weight, target, backend="torch", **ask).token)


@ON_DEVICE
def test_cross_entropy():
    x, weight, _, target = make_head(40, 60, 300, dtype=torch.bfloat16)
    loss = linear_cross_entropy(x, weight, target, backend="triton")
    found = torch.autograd.grad(loss, (x, weight))
    wide = as_float64(x, weight)
    truth = F.cross_entropy(wide[0] @ wide[1].T, target)
    assert relative_error(loss, truth) < 1e-5
    for d, e in zip(found, torch.autograd.grad(truth, wide)):
        assert relative_error(d, e) < 3e-3
