"""The parts that every fast-weight model is built of: norm, short convolution, gated MLP.

On a GPU they call flash-linear-attention's fused functions. On a CPU they are plain PyTorch, except for two
element-wise pieces whose own backward recomputes instead of storing: measured at [1, 8192, 256] in float32 on
two cores, the convolution takes 16 ms forward and backward where ``conv1d`` takes 65.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from refine.models.layout import BatchLayout
from refine.models.registry import register_auto_classes
from refine_kernels.precision import accumulation_dtype

PIECE = 2**18  # numbers of a short convolution's input that are worked on at a time


@torch.no_grad()
def draw_decay_(
    A_log: torch.Tensor,  # [heads]
    dt_bias: torch.Tensor,  # [heads]
    rates: tuple[float, float],
    steps: tuple[float, float],
    least_step: float = 0.0,
) -> None:
    """Draw a decay's parameters anew, as Mamba-2 does: A uniform between ``rates``, ``softplus(dt_bias)``
    log-uniform between ``steps`` and at least ``least_step``."""
    A_log.uniform_(*rates).log_()
    step = torch.empty_like(dt_bias).uniform_(*map(math.log, steps)).exp_().clamp_(min=least_step)
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))


@functools.cache
def _fla(module: str, name: str) -> Callable:
    """A function of flash-linear-attention, imported where it is first needed.

    Its import registers its own models for our model types; ours are put back.
    """
    function = getattr(importlib.import_module(f"fla.modules.{module}"), name)
    register_auto_classes(quiet=True)
    return function


def is_loaded(parameter: nn.Parameter) -> bool:
    """Whether ``from_pretrained`` has given this parameter its values, so that it must not be drawn anew."""
    return getattr(parameter, "_is_hf_initialized", False)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, statistics in float32."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def reset_own_parameters(self) -> None:
        """Weight 1, unless it has been loaded."""
        if not is_loaded(self.weight):
            nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cuda":
            return _fla("layernorm", "rms_norm")(x, self.weight, None, eps=self.eps)
        return _norm(x, self.weight, self.eps)


class ZeroCentredRMSNorm(RMSNorm):
    """``x / rms(x) * (1 + weight)`` over the last dimension, in float32 at least."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__(size, eps)
        self.reset_own_parameters()

    def reset_own_parameters(self) -> None:
        """Weight 0, unless it has been loaded."""
        if not is_loaded(self.weight):
            nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = 1.0 + self.weight.to(torch.promote_types(x.dtype, torch.float32))
        if x.device.type == "cuda":
            return _fla("layernorm", "rms_norm")(x, weight, None, eps=self.eps)
        return _norm(x, weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """``RMSNorm(x) * silu(gate)``."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cuda":
            rms_norm_gated = _fla("fused_norm_gate", "rms_norm_gated")
            return rms_norm_gated(x, gate, self.weight, None, activation="swish", eps=self.eps)
        return _norm(x, self.weight, self.eps, gate)


def _norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, gate: torch.Tensor | None = None
) -> torch.Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    gate = None if gate is None else gate.to(exact)
    return _RMSNorm.apply(x.to(exact), weight.to(exact), eps, gate).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """``x / rms(x) * weight``, times ``silu(gate)`` where there is one. Keeps its inputs and one number per row."""

    @staticmethod
    def forward(ctx, x, weight, eps, gate):  # [..., D], [D], [..., D]
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale, gate)
        y = (x * scale).mul_(weight)
        return y if gate is None else y.mul_(F.silu(gate))

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale, gate = ctx.saved_tensors
        normed = x * scale
        grad_gate = None
        if gate is not None:
            grad_gate = torch.ops.aten.silu_backward(grad * normed * weight, gate)
            grad = grad * F.silu(gate)
        product = (grad * normed).flatten(0, -2)  # [N, D]
        grad_weight = product.sum(0)
        with torch.autocast(x.device.type, enabled=False):
            along = (product @ weight).view(scale.shape) / x.shape[-1]  # <grad weight, normed> of each row
        grad_x = (grad * weight).addcmul_(normed, along, value=-1.0).mul_(scale)
        return grad_x, grad_weight, None, grad_gate


class ShortConvolution(nn.Module):
    """Causal depthwise convolution without bias, then SiLU.

    ``y_t = silu(sum_w weight[:, w] * x_{t - (W-1) + w})``. What came before the first token is the *tail*: the
    last W - 1 inputs, zeros at the start of a sequence.
    """

    def __init__(self, channels: int, width: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.width = width
        self.reset_own_parameters()

    def reset_own_parameters(self) -> None:
        """As a convolution of PyTorch begins, unless the weight has been loaded."""
        if not is_loaded(self.weight):
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(
        self,
        x: torch.Tensor,  # [B, T, D]
        tail: torch.Tensor | None = None,  # [N, W-1, D]
        layout: BatchLayout | None = None,
    ) -> torch.Tensor:  # [B, T, D]
        return causal_convolution(x, self.weight.squeeze(1), tail, layout)


def causal_convolution(
    x: torch.Tensor,  # [B, T, D]
    weight: torch.Tensor,  # [D, W]
    tail: torch.Tensor | None = None,  # [N, W-1, D], what came before the first token of a sequence
    layout: BatchLayout | None = None,
) -> torch.Tensor:  # [B, T, D]
    """The function of :class:`ShortConvolution`."""
    count = weight.shape[1] - 1
    if layout is not None and layout.packed:
        joined, token, _ = join_tails(x, tail, layout, count)
        return causal_convolution(joined, weight).index_select(1, token)
    if tail is not None:
        return causal_convolution(torch.cat([tail.to(x.dtype), x], dim=1), weight)[:, count:]
    weight = weight.to(x.dtype)
    if x.device.type == "cuda":
        return _fla("convolution", "causal_conv1d")(x, weight, activation="silu")[0]
    return _ConvolutionSiLU.apply(x, weight)


def join_tails(
    x: torch.Tensor,  # [1, T, D], N packed documents
    tail: torch.Tensor | None,  # [N, count, D]; None: zeros
    layout: BatchLayout,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each document behind its tail, all in one row: a convolution of it sees nothing of another document.

    Returns:
        the row [1, T + N count, D]; where in it each token lies [T]; where the last ``count`` inputs of each
        document lie [N, count].
    """
    documents = torch.arange(len(layout.document_lengths), device=x.device)
    token = torch.arange(x.shape[1], device=x.device) + (layout.document + 1) * count
    steps = torch.arange(count, device=x.device)
    last = (layout.cu_seqlens[1:] + documents * count)[:, None] + steps
    joined = x.new_zeros(x.shape[1] + len(documents) * count, x.shape[2]).index_copy(0, token, x[0])
    if tail is not None:
        first = (layout.cu_seqlens[:-1] + documents * count)[:, None] + steps
        joined = joined.index_copy(0, first.flatten(), tail.to(x.dtype).flatten(0, 1))
    return joined[None], token, last


def last_inputs(
    x: torch.Tensor,  # [B, T, D]
    tail: torch.Tensor | None,  # [N, count, D], what came before; zeros when None
    layout: BatchLayout,
    count: int,
) -> torch.Tensor:  # [N, count, D]
    """The last ``count`` inputs that each sequence has read, its tail included."""
    if layout.packed:
        joined, _, last = join_tails(x, tail, layout, count)
        return joined[0][last]
    tail = x.new_zeros(x.shape[0], count, x.shape[2]) if tail is None else tail
    if layout.lengths is None:
        return torch.cat([tail, x[:, -count:]], dim=1)[:, -count:]
    everything = torch.cat([tail, x], dim=1)
    index = layout.lengths[:, None] + torch.arange(count, device=x.device)
    return everything.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class _ConvolutionSiLU(torch.autograd.Function):
    """W shifted multiply-adds over whole rows; only the input is kept for the backward.

    What is larger than a cache is worked on piece by piece, so that the W multiply-adds, SiLU and what the backward
    does with them meet their tokens there. Half precision is computed in float32, which is more than twice as fast
    on a CPU.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # [B, T, D], [D, W]
        ctx.save_for_backward(x, weight)
        taps = _taps(weight, accumulation_dtype(x))
        y = x.new_empty(x.shape, dtype=taps.dtype)
        for rows, begin, end in _pieces(x):
            piece = y[rows, begin:end]
            _sum_of_shifts(x[rows], taps, begin, piece)
            F.silu(piece, inplace=True)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        wide = accumulation_dtype(x)
        taps = _taps(weight, wide)
        grad_x = x.new_empty(x.shape, dtype=wide)
        grad_taps = torch.zeros_like(taps)
        for rows, begin, end in _pieces(x):
            y = torch.empty_like(grad_x[rows, begin:end])
            read = _sum_of_shifts(x[rows], taps, begin, y)
            grad_y = torch.ops.aten.silu_backward(grad[rows, begin:end].to(wide), y)
            torch.mul(grad_y, taps[-1], out=grad_x[rows, begin:end])
            for shift, x_read in enumerate(read):
                skip = max(shift - begin, 0)
                if shift:  # tokens before this one, some of them of the piece before
                    part = grad_x[rows, begin + skip - shift : end - shift]
                    part.addcmul_(grad_y[:, skip:], taps[-1 - shift])
                grad_taps[-1 - shift] += (grad_y[:, skip:] * x_read).sum((0, 1))
        return grad_x.to(x.dtype), grad_taps.t().to(weight.dtype)


def _pieces(x: torch.Tensor) -> Iterator[tuple[slice, int, int]]:  # [B, T, D]
    """``(rows, first token, end)`` of pieces that fit a cache, the tokens of a row in order. One piece of tensors
    without data, and for a compiler, which unrolls the pieces."""
    b, t, d = x.shape
    if x.numel() <= 4 * PIECE or x.is_meta or isinstance(x, FakeTensor) or torch.compiler.is_compiling():
        yield slice(None), 0, t
        return
    rows = max(1, min(b, PIECE // (t * d)))
    tokens = max(1, PIECE // d)
    for row in range(0, b, rows):
        for begin in range(0, t, tokens):
            yield slice(row, row + rows), begin, min(begin + tokens, t)


def _sum_of_shifts(
    x: torch.Tensor,  # [B, T, D]
    taps: torch.Tensor,  # [W, D]
    begin: int,
    out: torch.Tensor,  # [B, n, D] in the dtype of taps
) -> list[torch.Tensor]:
    """The convolution at n tokens from ``begin`` on. Returns what each shift of 0, 1, ... reads of x, shorter where
    that would be before the first token."""
    count = out.shape[1]
    first, end = max(begin - len(taps) + 1, 0), begin + count
    x = x[:, first:end].to(taps.dtype)
    read = [
        x[:, max(begin - shift, 0) - first : end - shift - first]
        for shift in range(max(min(len(taps), end), 1))
    ]
    torch.mul(read[0], taps[-1], out=out)
    for shift, x_read in enumerate(read[1:], start=1):
        out[:, count - x_read.shape[1] :].addcmul_(x_read, taps[-1 - shift])
    return read


def _taps(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[D, W] -> [W, D], each tap's weights side by side."""
    return weight.t().to(dtype).contiguous()


class GatedMLP(nn.Module):
    """``W_down(silu(W_gate x) * (W_up x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if x.device.type == "cuda":
            return self.down_proj(_fla("activations", "swiglu")(gate, up))
        return self.down_proj(_SwiGLU.apply(gate, up))


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` that keeps its two inputs and nothing else."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
