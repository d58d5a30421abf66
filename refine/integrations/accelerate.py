"""transformers' own hybrid models on this project's operations.

transformers runs the gated delta rule of Qwen3-Next, Qwen3.5 and OLMo-hybrid through flash-linear-attention where
that is installed, which needs a GPU, and through a plain PyTorch reference where it is not. Both are module-level
functions that the layers' ``forward`` looks up by name. Here a layer gets a class of its own whose ``forward`` is
the same code with other functions under those names: no code is repeated, other models in the process stay as they
are, and taking the class away again undoes it.
"""

from __future__ import annotations

import functools
from types import CellType, FunctionType
from typing import TypeVar

import torch
from torch import nn

from refine.models.blocks import causal_convolution
from refine_kernels import chunk_delta_rule, recurrent_delta_rule

Model = TypeVar("Model", bound=nn.Module)

_RULE = "torch_chunk_gated_delta_rule"  # a layer whose forward looks this up is one that we know
_ORIGINAL = "_refine_original_class"


def accelerate_transformers(model: Model, *, undo: bool = False) -> Model:
    """Put this project's delta rule in the place of transformers' own, in place.

    Works on transformers' own Qwen3-Next, Qwen3.5, Qwen3.5-MoE and OLMo-hybrid models, bare or inside a wrapper
    (PEFT, a multimodal model), on a CPU (with flash-linear-attention installed or not) and on a GPU, in training
    and in generation. Parameters, their names, hooks and what is saved stay as they are. On a CPU the short
    convolution is replaced too.

    Args:
        model: the model; it is changed and returned.
        undo: give the layers their own class back.

    Raises:
        ValueError: no layer of ``model`` is one that this function knows.
    """
    found = False
    for module in model.modules():
        original = getattr(type(module), _ORIGINAL, None)
        if original is not None:
            found = True
            if undo:
                module.__class__ = original
        elif (faster := _accelerated(type(module))) is not None:
            found = True
            if not undo:
                module.__class__ = faster
    if not found:
        raise ValueError(
            f"accelerate_transformers: {type(model).__name__} has no gated-delta layer of transformers' "
            "Qwen3-Next, Qwen3.5, Qwen3.5-MoE or OLMo-hybrid models"
        )
    return model


@functools.cache
def _accelerated(layer_class: type[nn.Module]) -> type[nn.Module] | None:
    """The layer's class with our functions in its forward; None where it has no use for them."""
    if not layer_class.__module__.startswith("transformers."):
        return None
    names = {
        _RULE: lambda theirs: _chunk_rule,
        "torch_recurrent_gated_delta_rule": lambda theirs: _recurrent_rule,
        "causal_conv1d_fn": lambda theirs: functools.partial(_convolution, theirs),
    }
    forward = _rebound(layer_class.forward, names)
    if forward is None:
        return None
    return type(layer_class.__name__, (layer_class,), {"forward": forward, _ORIGINAL: layer_class})


def _rebound(function: FunctionType, names: dict) -> FunctionType | None:
    """``function``, or the one that its decorators wrap, with other globals under ``names``; None where neither
    looks up the first of them.
    """
    outer, closure = function.__globals__, function.__closure__
    if _RULE in function.__code__.co_names:
        outer = outer | {name: make(outer[name]) for name, make in names.items() if name in outer}
    else:
        wrapped = getattr(function, "__wrapped__", None)
        inner = _rebound(wrapped, names) if isinstance(wrapped, FunctionType) else None
        if inner is None:
            return None
        closure = tuple(CellType(inner) if cell.cell_contents is wrapped else cell for cell in closure)
    new = FunctionType(function.__code__, outer, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(new, function)


# ---- with transformers' names and arguments; those that choose a kernel of another package have no effect


def _chunk_rule(
    query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, **_,
):  # fmt: skip
    return chunk_delta_rule(
        query, key, value, beta, g=g,
        initial_state=_exact(initial_state, value), output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _recurrent_rule(
    query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, **_,
):  # fmt: skip
    if cu_seqlens is not None or torch.is_grad_enabled():
        return _chunk_rule(
            query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
        )
    return recurrent_delta_rule(
        query, key, value, beta, g=g,
        initial_state=_exact(initial_state, value), output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def _exact(state: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if state is None else state.to(torch.promote_types(like.dtype, torch.float32))


def _convolution(theirs, hidden_states, weight, bias=None, activation=None, **kwargs):
    """[B, D, T], [D, W] -> [B, D, T]."""
    packed = any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seqlens", "cu_seq_lens_q"))
    if (
        bias is not None
        or activation not in ("silu", "swish")
        or packed
        or hidden_states.device.type != "cpu"
    ):
        return theirs(hidden_states, weight, bias, activation=activation, **kwargs)
    return causal_convolution(hidden_states.transpose(1, 2), weight).transpose(1, 2)
