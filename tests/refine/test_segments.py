"""Segments: the gradient of one pass, in one process or along a chain of them; memory that does not grow."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from refine import RefineConfig, refine_step
from refine.method.relay import Relay
from refine.method.segments import read_next_tokens, read_with_rollouts, segment_borders
from refine.method.step import _shared_prefix, next_token_targets
from refine.models.head import NextTokenLoss
from tests.numerics import assert_close
from tests.refine.tiny import FAMILIES, ragged_batch, tiny_model

CONFIG = RefineConfig(num_chunks=5, rollout_length=4, num_rollouts=2)
POSITIONS = torch.tensor([[20, 63, 64, 128, 310], [65, 126, 127, 129, 270]])
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def make_batch():
    """Two sequences over several segments of 64, with targets and weights."""
    torch.manual_seed(4)
    ids, mask = ragged_batch(330, 290)
    lengths = mask.sum(1)
    return ids, lengths, *next_token_targets(ids, lengths)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Of every parameter."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def weigh(logprobs: torch.Tensor) -> torch.Tensor:
    """A fixed mixture of the rollout's log-probs."""
    return (logprobs.flatten() * torch.linspace(-1, 2, logprobs.numel())).sum()


def in_one_pass(model, kind: str, positions):
    """The loss, and what a step found, without segments."""
    ids, lengths, targets, weight = make_batch()
    if kind == "sft":
        return model(ids, use_cache=False, head=NextTokenLoss(targets, weight)).loss, None
    found = _shared_prefix(model, ids, lengths, CONFIG, torch.tensor([5, 6]), positions, None)
    return found.ntp_loss + weigh(found.logprobs), found


def in_segments(model, kind: str, positions, length: int, relay: Relay | None = None):
    """The same by segments."""
    ids, lengths, targets, weight = make_batch()
    if kind == "sft":
        return read_next_tokens(model, ids, targets, weight, length, relay).ntp_loss, None
    seeds = torch.tensor([5, 6])
    found = read_with_rollouts(
        model, ids, lengths, targets, weight, CONFIG, length, seeds, positions, None, relay
    )
    return found.ntp_loss + weigh(found.logprobs), found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("length", [64, 100, 128, 400])
@pytest.mark.parametrize("kind", ["sft", "at given positions", "drawn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_give_the_gradient_of_one_pass(family, kind, length, dtype):
    """Positions beside, on and behind borders; rollouts that reach over one; the end of a row in the middle."""
    model = tiny_model(family, dtype, initializer_range=0.15)
    positions = POSITIONS if kind == "at given positions" else None
    loss, found = in_one_pass(model, kind, positions)
    expected = gradients(model, loss)
    segmented, also = in_segments(model, kind, positions, length)
    assert_close(segmented, loss, TOLERANCE[dtype], "loss")
    got = gradients(model, segmented)
    for name, grad in expected.items():
        assert_close(got[name], grad, TOLERANCE[dtype], name)
    if found is not None:
        assert torch.equal(also.positions, found.positions)
        assert torch.equal(also.tokens, found.rollouts.flatten(0, 2))
        assert_close(also.entropy, found.entropy, 1e-6, "entropy")
        assert_close(also.predicted, found.predicted.flatten(0, 2), 1e-6, "hidden states of the rollouts")
        assert_close(also.true, found.true.flatten(0, 1), 1e-6, "true hidden states")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_by_segments_is_the_step(family):
    """Rewards, advantages, off-policy arguments: everything that a step returns, and its gradient."""
    model = tiny_model(family, initializer_range=0.15)
    torch.manual_seed(4)
    ids, mask = ragged_batch(330, 290)
    config = RefineConfig(num_chunks=4, num_rollouts=2, reward="hybrid")
    drawn = {"attention_mask": mask, "seeds": torch.tensor([1, 2])}
    whole = refine_step(model, ids, config, **drawn)
    expected = gradients(model, whole.loss)
    parts = refine_step(model, ids, dataclasses.replace(config, segment_length=96), **drawn)
    for field in dataclasses.fields(whole):
        assert_close(getattr(parts, field.name), getattr(whole, field.name), 1e-6, field.name)
    for name, grad in gradients(model, parts.loss).items():
        assert_close(grad, expected[name], 1e-10, name)


def test_segments_work_with_gradient_checkpointing_and_autocast():
    ids, _, targets, weight = make_batch()
    model = tiny_model("delta_net", torch.float32, initializer_range=0.15).train()
    expected = gradients(model, in_segments(model, "sft", None, 128)[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(model, in_segments(model, "sft", None, 128)[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss = read_next_tokens(model, ids, targets, weight, 128).ntp_loss
    rounded = gradients(model, loss)  # outside autocast, as a trainer calls it
    for name, grad in expected.items():
        assert_close(got[name], grad, 1e-6, name)
        assert_close(rounded[name], grad, 0.2, name)


def test_without_a_gradient_nothing_is_attached():
    model = tiny_model()
    with torch.no_grad():
        assert not in_segments(model, "drawn", None, 64)[0].requires_grad


def test_a_second_backward_is_refused():
    loss, _ = in_segments(tiny_model(), "sft", None, 128)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward"):
        loss.backward()


@pytest.mark.parametrize(
    ("tokens", "length", "borders"),
    [(100, 64, [0, 100]), (128, 64, [0, 64, 128]), (200, 64, [0, 64, 128, 200]), (256, 100, [0, 100, 256])],
)
def test_a_short_rest_goes_to_the_segment_before(tokens, length, borders):
    assert segment_borders(tokens, length) == borders


def test_segments_of_fewer_than_64_tokens_are_refused():
    with pytest.raises(ValueError, match="segment_length must be at least 64, got 63"):
        in_segments(tiny_model(), "sft", None, 63)


# ---- one document over several processes --------------------------------------------------------------------


def process(rank: int, size: int, port: int, cases: list, path: str) -> None:
    """One process of a chain."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    found = {}
    for family, kind in cases:
        model = tiny_model(family, torch.float32, initializer_range=0.15)
        loss, _ = in_segments(model, kind, None, 64, Relay.of_all())
        model.zero_grad()
        loss.backward()
        Relay.of_all().sum_gradients(model)
        found[family, kind] = loss.item(), {name: p.grad for name, p in model.named_parameters()}
    torch.save(found, f"{path}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def check_chain(size: int, cases: list, tmp_path) -> None:
    """Every process has the loss and the gradient of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, args=(size, port, cases, str(tmp_path / "found")), nprocs=size)
    for rank in range(size):
        found = torch.load(tmp_path / f"found.{rank}", weights_only=True)
        for (family, kind), (loss, got) in found.items():
            model = tiny_model(family, torch.float32, initializer_range=0.15)
            right, _ = in_one_pass(model, kind, None)
            assert loss == pytest.approx(right.item(), rel=1e-5)
            for name, grad in gradients(model, right).items():
                assert_close(got[name], grad, 1e-5, f"{family}, {kind}, {name}")


def test_two_processes_share_a_document(tmp_path):
    check_chain(2, [(family, kind) for family in FAMILIES for kind in ("sft", "drawn")], tmp_path)


@pytest.mark.slow
def test_four_processes_share_a_document(tmp_path):
    check_chain(4, [(family, kind) for family in FAMILIES for kind in ("sft", "drawn")], tmp_path)


# ---- memory -------------------------------------------------------------------------------------------------

MEMORY = """
import sys, torch
from pathlib import Path
from refine import RefineConfig
from refine.method.segments import read_with_rollouts
from refine.method.step import next_token_targets
from refine.models import DeltaNetConfig, DeltaNetForCausalLM

torch.manual_seed(0)
model = DeltaNetForCausalLM(
    DeltaNetConfig(hidden_size=128, num_hidden_layers=3, num_heads=2, vocab_size=512, intermediate_size=256)
).train()

def step(tokens):
    ids = torch.randint(512, (1, tokens))
    lengths = torch.tensor([tokens])
    found = read_with_rollouts(
        model, ids, lengths, *next_token_targets(ids, lengths), RefineConfig(), 4096, torch.tensor([1]), None, None
    )
    (found.ntp_loss + found.logprobs.mean()).backward()

step(8192)
Path("/proc/self/clear_refs").write_text("5")
step(int(sys.argv[1]))
for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
        print(int(line.split()[1]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_document():
    """Peak memory of a REFINE step by segments of 4,096: at 65,536 tokens within 15 % of that at 8,192."""
    peaks = []
    for tokens in (8192, 65536):
        output = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tokens)], capture_output=True, text=True, check=True
        )
        peaks.append(int(output.stdout))
    assert peaks[1] < 1.15 * peaks[0], (
        f"{peaks[0] / 1024:.0f} MB at 8,192, {peaks[1] / 1024:.0f} MB at 65,536"
    )
    print(f"{peaks[0] / 1024:.0f} MB at 8,192, {peaks[1] / 1024:.0f} MB at 65,536")
