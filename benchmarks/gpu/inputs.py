"""Inputs of the three ops, as models make them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.gpu.measuring import CUDA, DEVICE, peer

KEYS = ("unit", "SiLU", "nearly parallel", "beta 2")


def delta_inputs(
    b: int, t: int, h: int, k: int, v: int, dtype: torch.dtype, *, gated: bool = False, states: int = 0,
    value_heads: int | None = None, keys: str = "unit",
) -> dict[str, torch.Tensor | None]:  # fmt: skip
    """Queries and keys of one of ``KEYS``, rates in (0, 1), or up to 1.9, decays of some per cent; ``states``
    initial states."""
    make = functools.partial(torch.randn, device=DEVICE)
    hv = value_heads or h
    q, k_ = make(b, t, h, k), make(b, t, h, k)
    if keys == "SiLU":
        q, k_ = F.silu(q), F.silu(k_)
    elif keys == "nearly parallel":
        k_ = make(1, 1, h, k) + 0.05 * k_
    beta = make(b, t, hv).sigmoid()
    if keys == "beta 2":
        beta = 1.9 * beta
    elif keys == "nearly parallel":
        beta = 0.8 + 0.19 * beta
    inputs = {
        "q": q.to(dtype), "k": F.normalize(k_, dim=-1).to(dtype), "v": make(b, t, hv, v).to(dtype),
        "beta": beta.to(dtype), "g": F.logsigmoid(make(b, t, hv) + 3) if gated else None,
        "initial_state": make(states, hv, k, v) if states else None,
    }  # fmt: skip
    return {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}


def lact_inputs(n: int, length: int, size: int, dtype: torch.dtype, use_momentum: bool = True):
    """N rows of a layer: tensors and the momentum's rates."""
    make = functools.partial(torch.randn, device=DEVICE)
    tensors = [make(n, size, size) * size**-0.5 for _ in range(3)]
    tensors += [F.normalize(make(n, length, size), dim=-1).to(dtype) for _ in range(2)]
    tensors += [make(n, length, size).to(dtype)]
    tensors += [F.softplus(make(n, length, 1) - 5) for _ in range(3)]
    momentum = make(n, length, 1).sigmoid() if use_momentum else None
    return [x.requires_grad_() for x in tensors], None if momentum is None else momentum.requires_grad_()


def delta_peers(gated: bool) -> dict:
    """What others call for the same rule, with our arguments; those that are here."""
    if not CUDA:
        return {}

    def ordered(function):
        return lambda q, k, v, beta, g, **options: function(q, k, v, g, beta, **options)

    if not gated:
        fla = peer("fla.ops.delta_rule")
        return {} if fla is None else {"fla": lambda *x, g=None, **o: fla.chunk_delta_rule(*x, **o)}
    fla, qla = peer("fla.ops.gated_delta_rule"), peer("flash_qla")
    found = {"fla": fla, "FlashQLA": qla}
    return {name: ordered(x.chunk_gated_delta_rule) for name, x in found.items() if x is not None}


@contextlib.contextmanager
def share_of_configurations(part: int, parts: int) -> Iterator[None]:
    """Autotuners (fla's; ours has none) try every ``parts``-th configuration only: several processes that each take
    another part compile all of them, one that takes ``parts`` of a large number just the first."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def some(tuner, *arguments):
        found = prune(tuner, *arguments)
        return found[part::parts] or found[:1]

    with mock.patch.object(Autotuner, "prune_configs", some):
        yield
