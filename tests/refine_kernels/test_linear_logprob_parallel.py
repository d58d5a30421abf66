"""A vocabulary that is cut over two processes: all outputs and gradients are those of the whole weight."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from refine_kernels.linear_logprob import linear_cross_entropy, linear_logprob, row_seeds
from refine_kernels.linear_logprob.integrations import verl_linear_cross_entropy
from refine_kernels.linear_logprob.partials import Partials, combine, finish
from tests.numerics import assert_close

N, D, V, IGNORE = 20, 24, 70, -100
CUTS = (35, 17)  # equal slices, unequal ones


def head():
    """x [N, D], weight [V, D], bias [V], target [N], seeds [N]: the same in every process."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    bias, target = torch.randn(V, generator=generator) + 20, torch.randint(V, (N,), generator=generator)
    target[::6] = IGNORE
    return x, weight, bias, target, row_seeds(9, (N,))


def work(rank: int, port: int, backends: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for backend in backends:
            for cut in CUTS:
                check_logprob(rank, cut, backend)
                check_draws(rank, cut, backend)
                check_cross_entropy(rank, cut, backend)
        check_bad_input(rank)
        check_verl(rank)
    finally:
        dist.destroy_process_group()


def slices(rank: int, cut: int):
    """x, this rank's weight and bias, all of them requiring gradients; and where the slice is."""
    x, weight, bias, *_ = head()
    place = slice(0, cut) if rank == 0 else slice(cut, V)
    local = [t.clone().requires_grad_() for t in (x, weight[place], bias[place])]
    whole = [t.clone().requires_grad_() for t in (x, weight, bias)]
    return local, whole, place


def assert_gradients(total_local, total_whole, local, whole, place):
    dx, dw, db = torch.autograd.grad(total_local, local)
    ex, ew, eb = torch.autograd.grad(total_whole, whole)
    for name, value, expected in (("dx", dx, ex), ("dW", dw, ew[place]), ("db", db, eb[place])):
        assert_close(value, expected, 1e-5, name)


def check_logprob(rank, cut, backend):
    (x, w, b), whole, place = slices(rank, cut)
    *_, target, _ = head()
    ask = {"return_entropy": True, "return_lse": True, "temperature": 0.8, "logit_softcap": 30.0}
    group = {"process_group": dist.group.WORLD, "backend": backend}
    out = linear_logprob(x, w, target, bias=b, **ask, **group)
    expected = linear_logprob(whole[0], whole[1], target, bias=whole[2], backend="torch", **ask)
    for name in ("logprob", "entropy", "lse"):
        assert_close(getattr(out, name), getattr(expected, name), 2e-6, name)
    upstream = torch.randn(3, N, generator=torch.Generator().manual_seed(2)) * (torch.arange(N) % 3 > 0)
    totals = (sum((v * g).sum() for v, g in zip(values, upstream)) for values in (out[:3], expected[:3]))
    assert_gradients(*totals, (x, w, b), whole, place)
    assert linear_logprob(x, w, target, bias=b, **group).lse is None


def check_draws(rank, cut, backend):
    (x, w, b), whole, place = slices(rank, cut)
    seeds = head()[-1]
    for settings in ({"seed": seeds, "temperature": 1.3}, {"temperature": 0}):
        ask = {"sample": True, "return_entropy": True, **settings}
        out = linear_logprob(x, w, bias=b, process_group=dist.group.WORLD, backend=backend, **ask)
        expected = linear_logprob(whole[0], whole[1], bias=whole[2], backend="torch", **ask)
        assert torch.equal(out.token, expected.token)
        assert len({(t < cut).item() for t in out.token}) == 2  # both ranks win
        assert_close(out.logprob, expected.logprob, 2e-6)
        assert_gradients(out.logprob.sum(), expected.logprob.sum(), (x, w, b), whole, place)


def check_cross_entropy(rank, cut, backend):
    *_, target, _ = head()
    row_weight = torch.arange(N) / N
    for reduction in ("mean", "none"):
        (x, w, b), whole, place = slices(rank, cut)
        ask = {"reduction": reduction, "row_weight": row_weight, "return_entropy": True}
        group = {"process_group": dist.group.WORLD, "backend": backend}
        loss, entropy = linear_cross_entropy(x, w, target, bias=b, **ask, **group)
        expected, entropies = linear_cross_entropy(
            whole[0], whole[1], target, bias=whole[2], backend="torch", **ask
        )
        assert not entropy.requires_grad
        assert_close(loss, expected, 2e-6)
        assert_close(entropy, entropies, 2e-6)
        assert_gradients(loss.sum(), expected.sum(), (x, w, b), whole, place)


def check_bad_input(rank):
    (x, w, b), _, _ = slices(rank, CUTS[0])
    group = {"process_group": dist.group.WORLD}
    with pytest.raises(ValueError, match=r"^target must be in \[0, 70\).*got 70$"):
        linear_logprob(x, w, torch.full((N,), V), bias=b, **group)
    with pytest.raises(ValueError, match=r"^backend must be.*got 'reference'"):
        linear_logprob(x, w, return_entropy=True, backend="reference", **group)


def check_verl(rank):
    (x, w, _), whole, _ = slices(rank, CUTS[1])
    labels = head()[3].clamp_min(0)
    results = verl_linear_cross_entropy(x, w, labels, 0.7, "none", dist.group.WORLD)
    expected = verl_linear_cross_entropy(whole[0], whole[1], labels, 0.7)
    for value, e in zip(results, expected):
        assert_close(value, e, 2e-6)


def test_two_processes(monkeypatch):
    backends = ("torch",)
    try:
        import triton  # noqa: F401

        backends += ("triton",)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    except ImportError:
        pass
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    port = 20000 + os.getpid() % 20000
    mp.spawn(work, (port, backends), nprocs=2)


def test_a_slice_without_its_group_is_noticed_by_its_targets():
    x, weight, _, target, _ = head()
    target[3] = V - 1
    with pytest.raises(ValueError, match=r"^target must be in \[0, 35\).*got \d+ .*process_group"):
        linear_logprob(x, weight[:35], target)

    class DTensor(torch.Tensor):
        placements = ("Shard(0)",)

    with pytest.raises(ValueError, match=r"^weight must be a plain tensor, got a DTensor.*process_group"):
        linear_logprob(x, weight.as_subclass(DTensor), return_entropy=True)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_joining_parts(parts, shift):
    """Slices of given logits, among them one that weighs nothing beside the rest."""
    q = (torch.randn(50, 60) * 5 + shift).double()
    q[:, -12:] -= 1e3
    target = torch.randint(60, (50,))
    pieces = []
    for start in range(0, 60, 60 // parts):
        z = q[:, start : start + 60 // parts]
        y = target - start
        held = (y >= 0) & (y < z.shape[1])
        q_y = z.gather(1, torch.where(held, y, 0)[:, None])[:, 0]
        m, best = z.amax(1), z.max(1)
        d = z - m[:, None]
        e = (d.softmax(1) * d).sum(1)
        q_y = torch.where(held, q_y, -torch.inf)
        pieces.append(Partials(m, d.logsumexp(1), e, q_y, best.values, best.indices + start))
    stacked = Partials(*(torch.stack(field) for field in zip(*pieces)))
    logprob, entropy, lse, token = finish(combine(stacked, drawn=False), target, IGNORE, need_lse=True)
    log_p = q.log_softmax(1)
    assert (entropy >= 0).all()
    assert (logprob - log_p.gather(1, target[:, None])[:, 0]).abs().max() < 1e-9 * max(1, shift)
    assert (entropy + (log_p.exp() * log_p).sum(1)).abs().max() < 1e-9
    assert_close(lse, q.logsumexp(1), 1e-12)
    assert torch.equal(token, q.argmax(1))
