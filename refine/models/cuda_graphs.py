"""Rollouts as CUDA graphs: a run of model calls captured once and replayed.

Decoding is many small kernels: one token through 24 layers is some 650 of them, and a processor needs longer to
launch each than the GPU to run it. A graph launches all of them at once. It replays what was recorded on the
same memory, so the inputs are copied into buffers first, and what is launched must depend on shapes alone.

Used without a gradient, on CUDA, for bare models (not wrapped by DDP, FSDP or ``torch.compile``) whose states
allow it (``graph_capturable``). The first call of a kind runs as it is and lets every kernel compile and tune
itself, the second records, later ones replay. What cannot be recorded after all, because it waits for the device
in between, runs as it is, after one warning. A graph keeps its working memory, about three times the size of the
states.
``REFINE_CUDA_GRAPHS=0`` turns graphs off.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from refine.models.state import FastWeightState

ENVIRONMENT_VARIABLE = "REFINE_CUDA_GRAPHS"
_MOST = 4  # kinds of calls remembered for a model; the one not used for longest is forgotten first


def run_captured(function: Callable[..., torch.Tensor], model: nn.Module, inputs: tuple, constants: tuple):
    """``function(model, *inputs, *constants)``, as a CUDA graph where it has been captured.

    Args:
        function: calls the model and returns a tensor. It must not write its inputs, nor anything else that
            lives on, and what it does must depend on shapes alone.
        inputs: tensors, lists and dataclasses of tensors (a model's state); they may differ in every call.
        constants: hashable; together with the inputs' shapes and dtypes they tell one recording from another.
    """
    graph_class = GRAPHS.get(next(model.parameters()).device.type)
    if graph_class is None or not _is_recordable(model, inputs):
        return function(model, *inputs, *constants)
    tensors: list[torch.Tensor] = []
    key = (function, constants, _flatten(inputs, tensors), _surroundings(model))
    recordings = _recordings.setdefault(model, {})
    known = key in recordings
    recording = recordings.pop(key, None)
    if known and recording is None:
        buffers = [x.clone(memory_format=torch.contiguous_format) for x in tensors]
        on_buffers = _rebuild(inputs, iter(buffers))
        try:
            recording = _Recording(buffers, graph_class(lambda: function(model, *on_buffers, *constants)))
        except Exception as error:  # whatever stands in the way, the call itself can still be made
            _unrecordable[model] = True
            _recordings.pop(model)
            warnings.warn(
                f"{function.__name__} cannot be a CUDA graph and runs call by call ({ENVIRONMENT_VARIABLE}=0 "
                f"silences this): {type(error).__name__}: {error}",
                stacklevel=3,
            )
            return function(model, *inputs, *constants)
    if len(recordings) == _MOST:
        del recordings[next(iter(recordings))]
    recordings[key] = recording
    return function(model, *inputs, *constants) if recording is None else recording.run(tensors)


class Graph(Protocol):
    """A function recorded; made from the function alone."""

    def replay(self) -> torch.Tensor:
        """Do it again; the result lies where it lay before."""


class CudaGraph:
    """A function as a CUDA graph, in memory of its own."""

    def __init__(self, function: Callable[[], torch.Tensor]):
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        torch.clear_autocast_cache()  # or the graph would read today's casts of the weights for ever
        try:
            # thread_local: what another thread does (a data loader pinning memory) does not matter here
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = function()
        finally:
            torch.clear_autocast_cache()  # or others would read casts that lie in the graph's memory
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own stream behind

    def replay(self) -> torch.Tensor:
        """Launch it on the current stream."""
        self._graph.replay()
        return self._output


GRAPHS: dict[str, type[Graph]] = {"cuda": CudaGraph}  # device type -> how to record there


@dataclass
class _Recording:
    buffers: list[torch.Tensor]
    graph: Graph

    def run(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        for buffer, tensor in zip(self.buffers, tensors):
            buffer.copy_(tensor)
        return self.graph.replay().clone()


# None stands for a call that was seen once
_recordings: WeakKeyDictionary[nn.Module, dict[Hashable, _Recording | None]] = WeakKeyDictionary()
_unrecordable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _is_recordable(model: nn.Module, inputs: tuple) -> bool:
    if os.environ.get(ENVIRONMENT_VARIABLE, "1") == "0" or torch.is_grad_enabled() or model in _unrecordable:
        return False
    states = (x for x in inputs if isinstance(x, FastWeightState))
    if not isinstance(model, PreTrainedModel) or not all(state.graph_capturable for state in states):
        return False
    return all(type(p) is nn.Parameter for p in model.parameters())  # those of FSDP2 are DTensors


def _surroundings(model: nn.Module) -> Hashable:
    """What else a recording depends on: where the weights lie, and the modes that choose kernels."""
    device = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return tuple(p.data_ptr() for p in model.parameters()), model.training, autocast


def _flatten(tree: Any, tensors: list[torch.Tensor]) -> Hashable:
    """Collect the tensors of a tree; return all that is to know of it but their values."""
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return tree.shape, tree.dtype, tree.device
    if isinstance(tree, list | tuple):
        return type(tree), *(_flatten(x, tensors) for x in tree)
    if is_dataclass(tree):
        return type(tree), *(_flatten(getattr(tree, f.name), tensors) for f in fields(tree))
    return tree


def _rebuild(tree: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same tree of other tensors, in the order in which :func:`_flatten` collects them."""
    if isinstance(tree, torch.Tensor):
        return next(tensors)
    if isinstance(tree, list | tuple):
        return type(tree)(_rebuild(x, tensors) for x in tree)
    if is_dataclass(tree):
        return replace(tree, **{f.name: _rebuild(getattr(tree, f.name), tensors) for f in fields(tree)})
    return tree
