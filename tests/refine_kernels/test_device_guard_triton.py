"""Every kernel starts on the device of its tensors: Triton launches on the current one, which may be another.

No second GPU is needed to see it: launches made outside of a ``torch.cuda.device_of`` are counted.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton

from refine_kernels import (
    chunk_delta_rule,
    chunk_lact,
    linear_cross_entropy,
    linear_logprob,
    recurrent_delta_rule,
)
from refine_kernels.delta_rule import triton_chunk
from refine_kernels.delta_rule.decode import delta_net_decode
from refine_kernels.lact import lact_finish, lact_prepare
from tests.refine_kernels import test_delta_rule, test_lact
from tests.refine_kernels.test_delta_rule_recurrent_triton import DEVICE, make_layer
from tests.refine_kernels.test_linear_logprob import make_head

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of masked lanes
]
TRITON = {"backend": "triton"}


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that started inside of a guard and outside of one."""
    found, depth, guard = {"inside": set(), "outside": set()}, [0], torch.cuda.device_of

    @contextlib.contextmanager
    def counted(x):
        assert isinstance(x, torch.Tensor)
        with guard(x):
            depth[0] += 1
            yield
            depth[0] -= 1

    kind = type(triton_chunk.scan_kernel)  # compiled or interpreted
    run = kind.run

    def watched(self, *arguments, **options):
        found["inside" if depth[0] else "outside"].add(self.fn.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", counted)
    monkeypatch.setattr(kind, "run", watched)
    return found


def differentiate(outputs, leaves):
    wanted = [x for x in leaves if x is not None]
    torch.autograd.grad(sum(x.float().sum() for x in outputs if x is not None), wanted, allow_unused=True)


def delta_rule(monkeypatch):
    monkeypatch.setattr(triton_chunk, "GROUP_TOKENS", 64)
    monkeypatch.setattr(triton_chunk, "span_tokens", lambda *_: 128)
    inputs = test_delta_rule.make_inputs(1, 260, 1, 16, 16)
    leaves = [inputs[name].to(DEVICE).requires_grad_() for name in test_delta_rule.NAMES]
    *positional, g, state = leaves
    differentiate(
        chunk_delta_rule(*positional, g=g, initial_state=state, output_final_state=True, **TRITON), leaves
    )
    with torch.no_grad():
        recurrent_delta_rule(*(x[:, :2] for x in positional), g=g[:, :2], initial_state=state, **TRITON)
        delta_net_decode(**make_layer(1, 1, 1, 16, 16, 4, parents=1), **TRITON)
    return {"inverse", "scan", "join", "reverse", "gradient", "states", "recurrent", "decode"}


def linear(monkeypatch):
    x, weight, bias, target = (a.to(DEVICE) for a in make_head(5, 16, 20))
    leaves = [a.detach().requires_grad_() for a in (x, weight)]
    ask = {"return_entropy": True, "sample": True, "seed": 1}
    differentiate(linear_logprob(*leaves, target, bias=bias, **ask, **TRITON)[:2], leaves)
    differentiate([linear_cross_entropy(*leaves, target, **TRITON)], leaves)
    return {"forward", "combine", "gradient"}


def lact(monkeypatch):
    for muon in (False, True):
        inputs = test_lact.make_inputs(1, 10, (16, 16, 16))
        leaves = {n: None if x is None else x.to(DEVICE).requires_grad_() for n, x in inputs.items()}
        *positional, momentum = (leaves[n] for n in test_lact.NAMES)
        o = chunk_lact(*positional, momentum=momentum, chunk_size=4, use_muon=muon, **TRITON)
        differentiate([o], leaves.values())
    new = lambda *shape: torch.randn(*shape, device=DEVICE, requires_grad=True)  # noqa: E731
    q, k, v, scale, offset = new(1, 3, 16), new(1, 3, 16), new(1, 3, 16), new(16, 2), new(16, 2)
    differentiate(lact_prepare(q, k, v, scale, offset, None, num_heads=2, **TRITON), (q, k, v, scale, offset))
    o, attended, weight = new(1, 2, 3, 8), new(1, 3, 16), new(8)
    differentiate([lact_finish(o, attended, weight, None, **TRITON)], (o, attended, weight))
    ends = {"prepare", "prepare_backward", "finish", "finish_backward"}
    return {"hidden", "outer", "output", "step", "step_backward", "hidden_backward"} | ends


@pytest.mark.parametrize("op", [delta_rule, linear, lact], ids=lambda op: op.__name__)
def test_every_launch_is_guarded(op, launches, monkeypatch):
    expected = op(monkeypatch)
    assert launches["outside"] == set()
    assert launches["inside"] == {f"{name}_kernel" for name in expected}


def test_an_unguarded_launch_is_counted(launches):
    x = torch.zeros(4, device=DEVICE)

    @triton.jit
    def bare_kernel(x):
        pass

    bare_kernel[(1,)](x)
    assert launches == {"inside": set(), "outside": {"bare_kernel"}}
