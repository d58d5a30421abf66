"""fla's delta rules for CPU tensors.

flash-linear-attention computes with Triton alone, so on a CPU its ops end in ``0 active drivers``, and with them
every model that calls them: transformers' Qwen3-Next, Qwen3.5 and OLMo-hybrid do as soon as fla is installed. After
:func:`register_with_fla` those calls are ours where the tensors are on a CPU, forward and backward; tensors
elsewhere go to fla's kernels as before.

fla's registry of backends serves ``chunk_gated_delta_rule``. The other three ops have no entry there in 0.6; their
autograd functions are replaced, which reaches callers that imported the ops earlier, too.
"""

from __future__ import annotations

import inspect
from types import ModuleType

import torch

from refine_kernels.delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
)

RELEASE = "0.6."


def register_with_fla() -> None:
    """Let fla's four delta-rule ops run and train on a CPU. Calling it again changes nothing.

    ``fla.ops.delta_rule.chunk_delta_rule`` still refuses float32 itself, as on a GPU.

    Raises:
        ValueError: the installed fla is not of the release that this was written for.
    """
    import fla
    from fla.backends import BaseBackend, register
    from fla.ops.delta_rule import chunk as plain_chunk
    from fla.ops.delta_rule import fused_recurrent as plain_recurrent
    from fla.ops.gated_delta_rule import fused_recurrent as gated_recurrent

    if not fla.__version__.startswith(RELEASE):
        raise ValueError(f"register_with_fla needs flash-linear-attention {RELEASE}x, got {fla.__version__}")

    @register("gated_delta_rule")
    class CpuBackend(BaseBackend):
        """Asked before all others, and declines what is not on a CPU."""

        backend_type = "refine_kernels"
        priority = -1

        def chunk_gated_delta_rule(self, *args, **kwargs):
            return chunk_gated_delta_rule(*args, **kwargs)

        def chunk_gated_delta_rule_verifier(
            self, q: torch.Tensor, *args, **kwargs
        ) -> tuple[bool, str | None]:
            return q.device.type == "cpu", f"q is on {q.device}"

    _replace(plain_chunk, "ChunkDeltaRuleFunction", chunk_delta_rule)
    _replace(plain_recurrent, "FusedRecurrentFunction", fused_recurrent_delta_rule)
    _replace(gated_recurrent, "FusedRecurrentFunction", _gated_recurrent)


def _gated_recurrent(A_log: torch.Tensor | None, **arguments):
    """fla passes ``A_log`` on exactly when the gate is computed inside."""
    return fused_recurrent_gated_delta_rule(A_log=A_log, use_gate_in_kernel=A_log is not None, **arguments)


class _OnCpu:
    """Stands in the place of one of fla's autograd functions."""

    def __init__(self, function: type[torch.autograd.Function], ours) -> None:
        self.function, self.ours = function, ours
        self.names = list(inspect.signature(function.forward).parameters)[1:]  # without ctx

    def apply(self, *arguments):
        if arguments[0].device.type != "cpu":
            return self.function.apply(*arguments)
        return self.ours(**dict(zip(self.names, arguments)))


def _replace(module: ModuleType, name: str, ours) -> None:
    function = getattr(module, name)
    if not isinstance(function, _OnCpu):
        setattr(module, name, _OnCpu(function, ours))
