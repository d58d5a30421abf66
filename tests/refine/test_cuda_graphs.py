"""Recording and replaying, with a stand-in for the CUDA graph: it runs the same function again on the same
buffers, as a graph does, and its result lies where it lay before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from refine import RefineConfig, refine_step
from refine.method.sampling import _sample, sample_rollouts
from refine.models import cuda_graphs
from refine.models.head import HiddenOnly
from tests.refine.tiny import DELTA_RULE, VOCABULARY, ragged_batch, tiny_model


class Rerun:
    """Counts how often it records and replays. Recording leaves no result behind, as on a GPU."""

    recorded = replayed = 0

    def __init__(self, function):
        Rerun.recorded += 1
        self.function = function
        self.output = torch.full_like(function(), -1)

    def replay(self):
        Rerun.replayed += 1
        return self.output.copy_(self.function())


class Refuses:
    tried = 0

    def __init__(self, function):
        Refuses.tried += 1
        function()
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setitem(cuda_graphs.GRAPHS, "cpu", Rerun)
    monkeypatch.delenv(cuda_graphs.ENVIRONMENT_VARIABLE, raising=False)
    Rerun.recorded = Rerun.replayed = 0


@torch.no_grad()
def draw(model, seed, branches=3, tokens=4):
    """A state shared by branches, the hidden state before them, and seeds: as a step hands them over."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (2, 9), generator=random)
    read = model(ids, use_cache=True, head=HiddenOnly())
    rows = torch.randint(2, (branches,), generator=random)
    seeds = torch.randint(2**62, (branches, tokens), generator=random)
    return read.past_key_values.select(rows), read.last_hidden_state[rows, -1], seeds


@torch.no_grad()
def directly(model, state, context, seeds, temperature=1.0):
    return _sample(model, state, context, seeds, temperature)


@pytest.mark.parametrize("family", DELTA_RULE)
def test_replays_give_what_direct_calls_give(family, graphs):
    model = tiny_model(family)
    results = []
    for seed in range(5):
        inputs = draw(model, seed)
        expected = directly(model, *inputs)
        before = [x.clone() for x in _tensors(inputs)]
        results.append((sample_rollouts(model, *inputs, 1.0), expected))
        assert all(torch.equal(a, b) for a, b in zip(before, _tensors(inputs)))
    for actual, expected in results:  # nor has a later replay changed an earlier result
        assert torch.equal(actual, expected)
    assert len({tuple(expected.flatten().tolist()) for _, expected in results}) == 5
    assert (Rerun.recorded, Rerun.replayed) == (1, 4)


def _tensors(inputs):
    tensors = []
    cuda_graphs._flatten(inputs, tensors)
    return tensors


def test_a_whole_step_is_the_same(graphs, monkeypatch):
    model = tiny_model()
    config = RefineConfig(num_chunks=3, num_rollouts=2, temperature=0.7)
    for i in range(3):
        ids, _ = ragged_batch(90, 90)
        seeds = torch.tensor([i, 7])
        model.zero_grad()
        replayed = refine_step(model, ids, config, seeds=seeds)
        replayed.loss.backward()
        gradient = model.lm_head.weight.grad.clone()
        with monkeypatch.context() as context:
            context.setenv(cuda_graphs.ENVIRONMENT_VARIABLE, "0")
            model.zero_grad()
            direct = refine_step(model, ids, config, seeds=seeds)
            direct.loss.backward()
        for name in ("rollouts", "logprobs", "rewards", "loss"):
            assert torch.equal(getattr(replayed, name), getattr(direct, name)), name
        assert torch.equal(gradient, model.lm_head.weight.grad)
    assert (Rerun.recorded, Rerun.replayed) == (1, 2)


def test_weights_changed_in_place_are_seen_and_moved_weights_recorded_anew(graphs):
    model = tiny_model()
    for step in range(6):
        with torch.no_grad():
            if step == 4:
                model.lm_head.weight.data = model.lm_head.weight.data.clone()
            for p in model.parameters():
                p.mul_(1.01)
        inputs = draw(model, step)
        assert torch.equal(sample_rollouts(model, *inputs, 1.0), directly(model, *inputs))
    assert (Rerun.recorded, Rerun.replayed) == (2, 4)


@pytest.mark.parametrize("what", ["temperature", "branches", "tokens", "training", "own_state"])
def test_calls_of_another_kind_are_recorded_apart(what, graphs):
    model = tiny_model()
    for i in range(6):
        odd = bool(i % 2)
        model.train(what == "training" and odd)
        sizes = {
            "branches": 5 if what == "branches" and odd else 3,
            "tokens": 6 if what == "tokens" and odd else 4,
        }
        state, context, seeds = draw(model, i, **sizes)
        if what == "own_state" and odd:
            state = state.select(torch.arange(3))
            for layer in state.layers:
                layer.fast_weight, layer.tails, layer.rows = layer.own_fast_weight(), layer.own_tails(), None
        temperature = 0.3 if what == "temperature" and odd else 1.0
        expected = directly(model, state, context, seeds, temperature)
        assert torch.equal(sample_rollouts(model, state, context, seeds, temperature), expected)
    assert (Rerun.recorded, Rerun.replayed) == (2, 4)


def test_only_a_few_recordings_are_kept(graphs):
    model = tiny_model()
    for tokens in [2, 3, 4, 5, 6, 7] * 2:
        inputs = draw(model, tokens, tokens=tokens)
        assert torch.equal(sample_rollouts(model, *inputs, 1.0), directly(model, *inputs))
    assert Rerun.recorded == 0  # each was forgotten before it came again
    assert len(cuda_graphs._recordings[model]) == cuda_graphs._MOST
    sample_rollouts(model, *draw(model, 0, tokens=7), 1.0)
    assert Rerun.recorded == 1


def test_what_cannot_be_recorded_runs_directly_after_one_warning(graphs, monkeypatch, recwarn):
    monkeypatch.setitem(cuda_graphs.GRAPHS, "cpu", Refuses)
    Refuses.tried = 0
    model = tiny_model()
    for seed in range(4):
        inputs = draw(model, seed)
        assert torch.equal(sample_rollouts(model, *inputs, 1.0), directly(model, *inputs))
    messages = [str(w.message) for w in recwarn if cuda_graphs.ENVIRONMENT_VARIABLE in str(w.message)]
    assert len(messages) == 1 and "not permitted when stream is capturing" in messages[0]
    assert Refuses.tried == 1


class Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("why", ["turned off", "wrapped", "sharded", "looks at data", "gradient", "no GPU"])
def test_is_left_alone_where_it_does_not_belong(why, graphs, monkeypatch):
    model = tiny_model("lact" if why == "looks at data" else "delta_net")
    called = Wrapper(model) if why == "wrapped" else model
    if why == "turned off":
        monkeypatch.setenv(cuda_graphs.ENVIRONMENT_VARIABLE, "0")
    if why == "no GPU":
        monkeypatch.delitem(cuda_graphs.GRAPHS, "cpu")
    if why == "sharded":

        class Shard(torch.nn.Parameter):
            pass

        model.lm_head.weight = Shard(model.lm_head.weight.data)
    for seed in range(3):
        inputs = draw(model, seed)
        with torch.set_grad_enabled(why == "gradient"):
            tokens = cuda_graphs.run_captured(_sample, called, inputs, (1.0,))
        assert torch.equal(tokens, directly(model, *inputs))
    assert Rerun.recorded == 0


def test_a_model_and_its_recordings_go_together(monkeypatch):
    class Token:
        """As a CUDA graph, it knows the memory and not the model."""

        def __init__(self, function):
            self.output = function()

        def replay(self):
            return self.output

    monkeypatch.setitem(cuda_graphs.GRAPHS, "cpu", Token)
    model = tiny_model()
    for seed in range(3):
        sample_rollouts(model, *draw(model, seed), 1.0)
    assert model in cuda_graphs._recordings
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
