"""Two processes against one: completions under DDP and FSDP2, all at once, in batches, with prompts by segments."""

from __future__ import annotations

import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from refine import branch_logprobs, generate_group
from refine.training.parallel import join_world, unwrap, wrap
from tests.numerics import assert_gradients_close
from tests.refine.test_completions import make_group
from tests.refine.tiny import tiny_model

FAMILIES = ("delta_net", "lact")
OPTIONS = ({}, {"max_branches": 2, "segment_length": 64})
CASES = list(itertools.product(FAMILIES, ("ddp", "fsdp2"), range(len(OPTIONS))))
STOPS = (1, 2, 3, 4, 5, 6, 7, 8)


def loss_of(model, rows: list[int], options: dict) -> torch.Tensor:
    """A mixture of log-probs: a mean over the rows' prompts."""
    group = [x[rows] for x in make_group((100, 70, 41, 64), 3, 9)]
    logprobs = branch_logprobs(model, *group, **options).logprobs
    weight = torch.linspace(-1, 2, logprobs[0].numel()).view(logprobs[0].shape)
    return (logprobs * weight).sum((1, 2)).mean()


def process(rank: int, port: int, path: str) -> None:
    """One of the two processes: two prompts here, two in the other."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    rows, found = [2 * rank, 2 * rank + 1], {}
    for case in CASES:
        family, mode, option = case
        world = join_world(mode, torch.device("cpu"))
        model = wrap(tiny_model(family, torch.float32, initializer_range=0.15).train(), world)
        loss = loss_of(model, rows, OPTIONS[option])
        loss.backward()
        gradients = {
            n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
            for n, p in unwrap(model).named_parameters()
        }
        if not option:
            ids, mask, *_ = (x[rows] for x in make_group((100, 70, 41, 64), 3, 9))
            seeds = torch.tensor(rows)
            drawn = generate_group(
                model, ids, 3, prompt_mask=mask, max_new_tokens=30, stop_ids=STOPS, seeds=seeds
            )
            both = [None, None]
            dist.all_gather_object(
                both, [c[m.bool()] for c, m in zip(drawn[0].flatten(0, 1), drawn[1].flatten(0, 1))]
            )
            gradients = gradients, both[0] + both[1]
        found[case] = world.mean({"loss": loss.item()})["loss"], gradients
    if rank == 0:
        torch.save(found, path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("completions") / "found.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, args=(port, str(path)), nprocs=2)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_equal_one(results, case):
    """Losses, gradients, and samples, of which one process has its last before the other."""
    loss, gradients = results[case]
    model = tiny_model(case[0], torch.float32, initializer_range=0.15)
    expected = loss_of(model, [0, 1, 2, 3], {})
    expected.backward()
    if not case[2]:
        gradients, drawn = gradients
        ids, mask, *_ = make_group((100, 70, 41, 64), 3, 9)
        group = generate_group(
            model, ids, 3, prompt_mask=mask, max_new_tokens=30, stop_ids=STOPS, seeds=torch.arange(4)
        )
        alone = [c[m.bool()] for c, m in zip(group[0].flatten(0, 1), group[1].flatten(0, 1))]
        assert all(torch.equal(a, b) for a, b in zip(drawn, alone)) and len(drawn) == len(alone)
        longest = group.completion_mask.sum(-1).amax(1)
        assert longest[:2].max() != longest[2:].max()
    assert abs(loss / expected.item() - 1) < 1e-5
    assert_gradients_close(gradients, {n: p.grad for n, p in model.named_parameters()}, 1e-5)
