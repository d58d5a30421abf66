"""The weights that count, where a module may be wrapped: adapters (peft), parametrizations, hooks, quantisation.

A fused operation reads a module's weight instead of calling the module. Whatever else the module does would be
lost without a word; so either the weight is found that makes the operation equal to the call, or it is refused.
"""

from __future__ import annotations

import torch
from torch import nn


def plain_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a small module (a norm, a convolution) that a fused operation reads directly.

    Raises:
        ValueError: the module has been wrapped or has hooks, so that its weight is not all it does.
    """
    while (chosen := _chosen_copy(module)) is not None:
        module = chosen
    if _has_own_call(module) or not type(module).forward.__module__.startswith("refine."):
        raise ValueError(
            f"a {type(module).__name__} with hooks or of another package stands where a fused operation reads a "
            "weight: take it out of the modules to adapt"
        )
    return module.weight


def head_operands(head: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(x, weight)`` with ``head(hidden) == x @ weight.T``, for the fused head.

    Mostly ``hidden`` [..., D] and the head's weight [V, D] themselves. A bias and LoRA adapters add columns: with a
    rank of r, ``x`` is [..., D + r] and the weight [V, D + r]; so dropout in front of an adapter is as in the
    head's own call, and every adapter gets its gradient. Any other wrapper is called once, on the unit vectors.

    Raises:
        ValueError: the head is quantised, or no linear map.
    """
    if (chosen := _chosen_copy(head)) is not None:
        return head_operands(chosen, hidden)
    if hasattr(head, "base_layer") and hasattr(head, "lora_A") and not _has_own_call(head):
        if head.disable_adapters:
            if head.merged:
                head.unmerge()
            return head_operands(head.base_layer, hidden)
        active = [name for name in head.active_adapters if name in head.lora_A]
        if head.merged or not active:
            return head_operands(head.base_layer, hidden)
        if not any(name in head.lora_variant for name in active):
            return _with_lora(head, active, hidden)
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not _has_own_call(head):
        if not head.weight.is_floating_point():
            raise _quantised(head)
        return _with_columns(hidden, head.weight, [], [], head.bias)
    return _probe(head, hidden)


def _chosen_copy(module: nn.Module) -> nn.Module | None:
    """The module that peft's ``modules_to_save`` puts in the place of the original one."""
    if not (hasattr(module, "modules_to_save") and hasattr(module, "original_module")):
        return None
    active = [] if module.disable_adapters else module.active_adapters
    return module.modules_to_save[active[0]] if active else module.original_module


def _has_own_call(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)


def _with_lora(head: nn.Module, active: list[str], hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = head_operands(head.base_layer, hidden)
    narrow, wide, bias = [], [], None
    for name in active:
        a, b, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        narrow.append(a(head.lora_dropout[name](hidden.to(a.weight.dtype))))
        wide.append(b.weight * scaling)
        if b.bias is not None:
            bias = b.bias * scaling if bias is None else bias + b.bias * scaling
    return _with_columns(x, weight, narrow, wide, bias)


def _with_columns(x, weight, narrow: list, wide: list, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """Further columns of both operands; a bias is one on a column of ones."""
    if bias is not None:
        narrow, wide = [*narrow, x.new_ones(*x.shape[:-1], 1)], [*wide, bias[:, None]]
    if not narrow:
        return x, weight
    x = torch.cat([x, *(part.to(x.dtype) for part in narrow)], dim=-1)
    return x, torch.cat([weight, *(part.to(weight.dtype) for part in wide)], dim=-1)


def _probe(head: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias of any linear map, from its values at zero and the unit vectors."""
    inner = getattr(head, "base_layer", head)
    if not all(p.is_floating_point() for p in inner.parameters()):
        raise _quantised(head)
    size = hidden.shape[-1]
    eye = torch.eye(size, dtype=hidden.dtype, device=hidden.device)
    bias = head(torch.zeros_like(eye[:1]))[0]  # [V]
    weight = (head(eye) - bias).T  # [V, D]
    with torch.no_grad():
        x = torch.randn(4, size, device=hidden.device).to(hidden.dtype)
        expected, actual = head(x).double(), x.double() @ weight.double().T + bias.double()
        scale = (x.double().norm(dim=1) * weight.double().norm(dim=1).max()).max() + bias.double().abs().max()
        if float((expected - actual).abs().max()) > 16 * torch.finfo(hidden.dtype).eps * float(scale):
            raise ValueError(
                f"lm_head is a {type(head).__name__} that is no linear map of the hidden states (dropout, a "
                "hook?): its log-probabilities cannot be computed without logits"
            )
    return _with_columns(hidden, weight, [], [], bias if bool(bias.detach().any()) else None)


def _quantised(head: nn.Module) -> ValueError:
    return ValueError(
        f"lm_head is a quantised {type(head).__name__}: leave it in floating point (for bitsandbytes "
        "llm_int8_skip_modules=['lm_head']), or ask for logits, which call the module"
    )
