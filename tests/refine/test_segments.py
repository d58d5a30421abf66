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
from refine.method import ContextParallel, Sequences, next_token_loss
from refine.method.one_pass import OnePass
from refine.method.segmented_pass import SegmentedPass, segment_borders
from refine.method.selection import select_positions
from refine.models.body import checkpoint_activations
from tests.clients.families import HYBRIDS, tiny_model
from tests.numerics import assert_close, assert_gradients_close
from tests.refine.tiny import FAMILIES, ragged_batch

CONFIG = RefineConfig(num_chunks=5, rollout_length=4, num_rollouts=2)
POSITIONS = torch.tensor([[20, 63, 64, 128, 310], [65, 126, 127, 129, 270]])
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def make_batch() -> Sequences:
    """Two sequences over several segments of 64."""
    torch.manual_seed(4)
    return Sequences.of(*ragged_batch(330, 290))


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Of every parameter."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def weigh(logprobs: torch.Tensor) -> torch.Tensor:
    """A fixed mixture of the rollout's log-probs."""
    return (logprobs.flatten() * torch.linspace(-1, 2, logprobs.numel())).sum()


def rolled_out(reading, positions):
    """The loss, and what a reading found, at given or at drawn positions."""
    seeds = torch.tensor([5, 6])
    if positions is None:
        positions = select_positions(reading.entropy, make_batch().lengths, CONFIG, seeds)
    branches = reading.branch(positions, None, seeds)
    return reading.ntp_loss + weigh(branches.logprobs), (reading.entropy, positions, branches)


def in_one_pass(model, kind: str, positions):
    """The loss, and what the reading found, without segments."""
    sequences = make_batch()
    if kind == "sft":
        return next_token_loss(model, sequences.labelled()), None
    return rolled_out(OnePass(model, sequences, CONFIG), positions)


def in_segments(model, kind: str, positions, length: int, context: ContextParallel | None = None):
    """The same by segments."""
    labelled = make_batch().labelled()
    if kind == "sft":
        return next_token_loss(model, labelled, length, context), None
    return rolled_out(SegmentedPass(model, labelled, length, CONFIG, context), positions)


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
    assert_gradients_close(gradients(model, segmented), expected, TOLERANCE[dtype])
    if found is not None:
        for (entropy, drawn_at, branches), right in [(also, found)]:
            assert torch.equal(drawn_at, right[1])
            assert torch.equal(branches.tokens, right[2].tokens)
            assert_close(entropy, right[0], 1e-6, "entropy")
            assert_close(branches.predicted, right[2].predicted, 1e-6, "hidden states of the rollouts")
            assert_close(branches.true, right[2].true, 1e-6, "true hidden states")


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
        if field.name != "drawn":
            assert_close(getattr(parts, field.name), getattr(whole, field.name), 1e-6, field.name)
    for name, grad in gradients(model, parts.loss).items():
        assert_close(grad, expected[name], 1e-10, name)


def test_segments_work_with_gradient_checkpointing_and_autocast():
    model = tiny_model("delta_net", torch.float32, initializer_range=0.15).train()
    expected = gradients(model, in_segments(model, "sft", None, 128)[0])
    checkpoint_activations(model)
    got = gradients(model, in_segments(model, "sft", None, 128)[0])
    assert_gradients_close(got, expected, 1e-6)
    rounded = []  # weights may magnify bfloat16's rounding to anything, but the same in both
    for read, given in ((in_one_pass, ()), (in_segments, (128,))):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = read(model, "sft", None, *given)
        rounded.append(gradients(model, loss))  # outside autocast, as a trainer calls it
    assert_gradients_close(rounded[1], rounded[0], 2e-2)


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
        loss, _ = in_segments(model, kind, None, 64, ContextParallel.of_all())
        model.zero_grad()
        loss.backward()
        ContextParallel.of_all().sum_gradients(model)
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
            assert_gradients_close(got, gradients(model, right), 1e-5, f"{family}, {kind}")


def test_two_processes_share_a_document(tmp_path):
    cases = [(family, kind) for family in FAMILIES for kind in ("sft", "drawn")]
    check_chain(2, cases + [(family, "drawn") for family in HYBRIDS], tmp_path)


@pytest.mark.slow
def test_four_processes_share_a_document(tmp_path):
    check_chain(4, [(family, kind) for family in FAMILIES for kind in ("sft", "drawn")], tmp_path)


# ---- memory -------------------------------------------------------------------------------------------------

MEMORY = """
import sys, torch
from pathlib import Path
from refine import RefineConfig
from refine.method import Sequences
from refine.method.segmented_pass import SegmentedPass
from refine.models import DeltaNetConfig, DeltaNetForCausalLM

torch.manual_seed(0)
model = DeltaNetForCausalLM(
    DeltaNetConfig(hidden_size=128, num_hidden_layers=3, num_heads=2, vocab_size=512, intermediate_size=256)
).train()

def step(tokens):
    sequences = Sequences.of(torch.randint(512, (1, tokens)))
    reading = SegmentedPass(model, sequences.labelled(), 4096, RefineConfig())
    branches = reading.branch(torch.arange(1, 9)[None] * (tokens // 9), None, torch.tensor([1]))
    (reading.ntp_loss + branches.logprobs.mean()).backward()

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
