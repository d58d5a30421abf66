"""Two processes against one: DDP and FSDP2 give the same loss and gradients, in one pass and by segments.

The processes are real (gloo); what they find is written to a file and checked here, a test a setting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from refine import RefineConfig, refine_step
from refine.method import Sequences, next_token_loss
from refine.models.body import checkpoint_activations
from refine.training.parallel import clip_gradients, full_weights, join_world, unwrap, wrap
from tests.clients.families import HYBRIDS, tiny_model
from tests.numerics import assert_gradients_close, relative_error
from tests.refine.tiny import FAMILIES, VOCABULARY, ragged_batch

CONFIG = RefineConfig(num_chunks=5, rollout_length=4, reward="hybrid", lambda_rl=1.0)
POSITIONS = torch.tensor([[20, 60, 64, 125, 185], [28, 31, 96, 127, 140]] * 2)
POSITIONS[2, 4] = 165

# family, mode, kind of step, accumulation, checkpointing, segment length, bf16 parameters
FAST = [
    *(
        (f, m, k, 2, True, None, False)
        for f, m, k in itertools.product(FAMILIES, ("ddp", "fsdp2"), ("sft", "refine"))
    ),
    *(
        (f, m, k, 1, False, 64, False)
        for f, m, k in itertools.product(FAMILIES, ("ddp", "fsdp2"), ("sft", "refine"))
    ),
    *((f, m, "refine", 1, False, 64, False) for f, m in itertools.product(HYBRIDS, ("ddp", "fsdp2"))),
    *((f, "fsdp2", "refine", 1, False, None, True) for f in (*FAMILIES, *HYBRIDS)),
]
SLOW = [
    (f, m, k, a, c, None, False)
    for f, m, k, a, c in itertools.product(
        (*FAMILIES, *HYBRIDS), ("ddp", "fsdp2"), ("sft", "refine"), (1, 2), (False, True)
    )
    if (a, c) != (2, True) or f in HYBRIDS
]


def name(case) -> str:
    """What pytest calls a case."""
    family, mode, kind, accumulation, checkpointing, segment, bf16 = case
    marks = [
        f"x{accumulation}",
        "checkpointing" * checkpointing,
        f"segments-{segment}" * bool(segment),
        "bf16" * bf16,
    ]
    return "-".join([family, mode, kind, *filter(None, marks)])


def loss_of(model, kind: str, rows: list[int], segment: int | None) -> torch.Tensor:
    """The loss of some rows of the common batch."""
    torch.manual_seed(11)
    ids, mask = ragged_batch(205, 160, 190, 170)
    rollouts = torch.randint(VOCABULARY, (4, 5, 1, 4))[rows]
    ids, mask = ids[rows], mask[rows]
    if kind == "sft":
        return next_token_loss(model, Sequences.of(ids, mask).labelled(), segment)
    config = dataclasses.replace(CONFIG, segment_length=segment)
    given = {"attention_mask": mask, "positions": POSITIONS[rows], "rollouts": rollouts}
    return refine_step(model, ids, config, **given).loss


def one_process(
    family: str, kind: str, segment: int | None, bf16: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the whole batch in one process."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = tiny_model(family, torch.float32, initializer_range=0.15).to(dtype)
    loss = loss_of(model, kind, [0, 1, 2, 3], segment)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


def one_of_two(world, case) -> tuple[float, dict[str, torch.Tensor]]:
    """Half of the batch here, half in the other process; the mean loss, the gathered gradients."""
    family, _, kind, accumulation, checkpointing, segment, bf16 = case
    model = tiny_model(family, torch.float32, initializer_range=0.15).train()
    if checkpointing:
        checkpoint_activations(model)
    model = wrap(model, world, torch.bfloat16 if bf16 else None)
    rows = [0, 1] if world.rank == 0 else [2, 3]
    parts = [rows] if accumulation == 1 else [[row] for row in rows]
    total = 0.0
    for part in parts:
        last = part is parts[-1]
        if world.mode == "fsdp2":
            model.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or world.mode == "fsdp2" else model.no_sync():
            loss = loss_of(model, kind, part, segment) / len(parts)
            loss.backward()
        total += loss.item()
    gradients = {
        n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for n, p in unwrap(model).named_parameters()
    }
    return world.mean({"loss": total})["loss"], gradients


def process(rank: int, port: int, cases: list, path: str) -> None:
    """One of the two processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = {}
    for case in cases:
        world = join_world(case[1], torch.device("cpu"))
        found[case] = one_of_two(world, case)
    if ("fsdp2" in {case[1] for case in cases}) and dist.is_initialized():
        found["weights"] = _weights_and_clipping(join_world("fsdp2", torch.device("cpu")))
    if rank == 0:
        torch.save(found, path)
    dist.barrier()
    dist.destroy_process_group()


def _weights_and_clipping(world) -> tuple:
    """Gathered weights, and the gradient norm before and after clipping, under FSDP2."""
    model = wrap(tiny_model("delta_net", torch.float32), world)
    rows = [0, 1] if world.rank == 0 else [2, 3]
    loss_of(model, "sft", rows, None).backward()
    before = clip_gradients(model, 1e-3)
    return full_weights(model), before, clip_gradients(model, 1e9)


def run_two(cases: list, path) -> dict:
    """Start the processes, wait, read what they found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, args=(port, cases, str(path)), nprocs=2)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def fast_results(tmp_path_factory):
    return run_two(FAST, tmp_path_factory.mktemp("parallel") / "fast.pt")


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory):
    return run_two(SLOW, tmp_path_factory.mktemp("parallel") / "slow.pt")


@pytest.fixture(scope="module")
def expected():
    """One process's results, computed once a kind."""
    known: dict = {}

    def find(family: str, kind: str, segment: int | None, bf16: bool):
        key = family, kind, segment if kind == "refine" else None, bf16
        if key not in known:
            known[key] = one_process(*key)
        return known[key]

    return find


def check(found, expected, case) -> None:
    """Loss and every gradient to 1e-5; with bf16 parameters in both, the loss and the whole gradient to 2e-2."""
    family, _, kind, _, _, segment, bf16 = case
    loss, gradients = found[case]
    right_loss, right = expected(family, kind, segment, bf16)
    assert abs(loss / right_loss - 1) < (2e-2 if bf16 else 1e-5)
    if bf16:
        whole = [torch.cat([g[n].flatten() for n in right]) for g in (gradients, right)]
        assert 0 < relative_error(*whole) < 2e-2
        return
    assert_gradients_close(gradients, right, 1e-5)


@pytest.mark.parametrize("case", FAST, ids=name)
def test_two_processes_give_the_gradient_of_one(fast_results, expected, case):
    check(fast_results, expected, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=name)
def test_every_combination_gives_the_gradient_of_one(slow_results, expected, case):
    check(slow_results, expected, case)


def test_sharded_weights_are_gathered_whole_and_norms_are_of_all_shards(fast_results, expected):
    weights, before, after = fast_results["weights"]
    model = tiny_model("delta_net", torch.float32)
    for n, parameter in model.named_parameters():
        assert torch.equal(weights[n], parameter)
    loss_of(model, "sft", [0, 1, 2, 3], None).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert before == pytest.approx(float(norm), rel=1e-5)
    assert after == pytest.approx(1e-3, rel=1e-3)


def test_parallel_needs_torchrun_and_torchrun_needs_parallel(monkeypatch):
    with pytest.raises(ValueError, match="torchrun has not started this process"):
        join_world("ddp", torch.device("cpu"))
    with pytest.raises(ValueError, match="parallel must be one of none, ddp, fsdp2, context, got 'dp'"):
        join_world("dp", torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes, but parallel is none"):
        join_world("none", torch.device("cpu"))
