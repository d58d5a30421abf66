"""Other libraries' kernels under the counted clock: what they launch for the same call, compiled the same way.

fla (``pip install flash-linear-attention``) asks for a GPU when it is imported; :func:`a_gpu` is a stand-in that
answers its questions. Its autotuners are let choose the configuration that the clock likes best.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from refine_kernels.inspect import Arch

# Outermost loops of fla 0.6.0's kernels: turns, by the arguments of the launch; the serial ones last.
_FLA_TURNS: dict[str, Callable[[dict[str, Any]], list]] = {
    "l2norm_fwd_kernel": lambda a: [],
    "l2norm_bwd_kernel": lambda a: [],
    "chunk_local_cumsum_scalar": lambda a: [],
    "chunk_scaled_dot_kkt_fwd": lambda a: [-(-a["K"] // a["BK"])],
    "merge_16x16_to_64x64_inverse": lambda a: [14] * 4,
    "chunk_gated_delta_rule_fwd_kkt_solve": lambda a: [-(-a["K"] // a["BK"]), *[14] * 4],
    "recompute_w_u_fwd": lambda a: [-(-a["V"] // a["BV"]), -(-a["K"] // a["BK"])],
    "chunk_fwd_kernel_o": lambda a: [-(-a["K"] // a["BK"])],
    "chunk_bwd_kernel_dv_local": lambda a: [-(-a["K"] // a["BK"])],
    "chunk_bwd_kernel_dqkwg": lambda a: [-(-a["V"] // a["BV"])],
    "prepare_wy_repr_bwd": lambda a: [-(-a["V"] // a["BV"]), *[-(-a["K"] // a["BK"])] * 2],
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": lambda a: [-(-a["T"] // a["BT"])],
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": lambda a: [-(-a["T"] // a["BT"])],
}


def fla_turns(kernel: str, given: dict[str, Any]) -> tuple[list, bool, float]:
    """As ``delta_rule.variants.turns``, of fla's kernels; one without an entry is taken to have no loop."""
    turns = _FLA_TURNS.get(kernel, lambda a: [])
    return turns(given), "blockdim64" in kernel, 1.0


@contextlib.contextmanager
def a_gpu(arch: Arch) -> Iterator[None]:
    """What libraries ask of a GPU's driver is answered for a chip that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    facts = {"multiprocessor_count": arch.multiprocessors, "max_shared_mem": arch.shared_limit}
    stand_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget(arch.backend, arch.version, arch.warp_size),
        get_current_device=lambda: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: facts),
    )
    capability = divmod(int(arch.version), 10)
    properties = SimpleNamespace(
        shared_memory_per_block_optin=arch.shared_limit, multi_processor_count=arch.multiprocessors
    )
    before = getattr(driver, "_active", None)
    driver.set_active(stand_in)
    try:
        with (
            mock.patch("torch.cuda.get_device_capability", lambda device=None: capability),
            mock.patch("torch.cuda.get_device_name", lambda device=None: f"NVIDIA {arch.name}"),
            mock.patch("torch.cuda.get_device_properties", lambda device=None: properties),
            mock.patch("torch.cuda.device_count", lambda: 1),
        ):
            yield
    finally:
        driver._active = before


class _Context(SimpleNamespace):
    """What an autograd function is given to keep tensors in."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


def fla_call(
    rows: int, tokens: int, heads: int, value_heads: int, kd: int, vd: int, dtype: torch.dtype, gated: bool
) -> tuple[Callable, Callable, Callable]:
    """As ``delta_rule.variants.clock_call``: its forward for training is its forward. To be called, and to be run,
    inside :func:`a_gpu`."""
    from fla.ops.delta_rule.chunk import ChunkDeltaRuleFunction
    from fla.ops.gated_delta_rule.chunk import ChunkGatedDeltaRuleFunction

    new = partial(torch.empty, device="meta")
    q, k = (new(rows, tokens, heads, kd, dtype=dtype) for _ in range(2))
    v = new(rows, tokens, value_heads, vd, dtype=dtype)
    beta = new(rows, tokens, value_heads, dtype=dtype)
    g = new(rows, tokens, value_heads)
    context, d_o = _Context(), new(v.shape, dtype=dtype)
    if value_heads != heads and not gated:
        raise ValueError("fla's plain delta rule has no value heads of their own")

    def forward() -> None:
        if gated:
            given = (q, k, v, g, beta, kd**-0.5, None, False)
            ChunkGatedDeltaRuleFunction.forward(context, *given, use_qk_l2norm_in_kernel=True)
        else:
            ChunkDeltaRuleFunction.forward(context, q, k, v, beta, kd**-0.5, None, False, True)

    def backward() -> None:
        function = ChunkGatedDeltaRuleFunction if gated else ChunkDeltaRuleFunction
        function.backward(context, d_o, None)

    return forward, forward, backward
