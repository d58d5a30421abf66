"""The counter-based generator of the fused sampler: seeds, Philox4x32-10, uniform and Gumbel numbers.

A draw is a pure function of (row seed, column index). No state is kept, so a row's noise is the same
whatever the batch, the row's place in it, the tile shape or the device; the bits are those of
``triton.language.rand(seed, offset)`` with the column as a 32-bit offset.

PyTorch has no unsigned 64-bit arithmetic, so unsigned integers live in int64 here: sums and products wrap
modulo 2^64 by themselves, and a logical shift to the right is an arithmetic one followed by a mask.
"""

from __future__ import annotations

import math

import torch

_LOW_32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57  # multipliers of Philox4x32
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85  # what each round adds to the key
_ROUNDS = 10

# The largest float32 factor that keeps 2147483647 * factor below one (the constant of `tl.rand`).
_INT31_TO_UNIT = 4.6566127342e-10
# `tl.rand` is exactly 0 for two of its 2^32 values; the Gumbel transform gives those half the next value.
_SMALLEST_UNIFORM = 2.0**-32


def mix_seeds(*parts: int | torch.Tensor) -> torch.Tensor:
    """Hash integers into one 64-bit seed, elementwise: ``h = 0``, then ``h = splitmix64(h ^ part)`` for each.

    The order of the parts matters. With all but one part fixed, distinct values of that part give distinct
    seeds (each step is a bijection of 64-bit words), and neighbouring values give unrelated ones.

    Args:
        parts: Python ints (taken modulo 2^64) or int64 tensors of shapes that broadcast, on one device.

    Returns:
        int64, the broadcast shape (a 0-d CPU tensor when every part is a Python int).

    Raises:
        ValueError: no part is given, or one is neither an int nor an int64 tensor.
    """
    if not parts:
        raise ValueError("parts must hold at least one int or int64 tensor, got none")
    h = 0
    for i, part in enumerate(parts):
        if isinstance(part, torch.Tensor):
            if part.dtype != torch.int64:
                raise ValueError(f"parts[{i}] must be an int or an int64 tensor, got a {part.dtype} tensor")
        elif isinstance(part, bool) or not isinstance(part, int):
            raise ValueError(f"parts[{i}] must be an int or an int64 tensor, got {type(part).__name__}")
        else:
            part = _signed(part)
        h = _splitmix64(h ^ part)
    return h if isinstance(h, torch.Tensor) else torch.tensor(h, dtype=torch.int64)


def row_seeds(
    seed: int | torch.Tensor, shape: tuple[int, ...], device: torch.device | str | None = None
) -> torch.Tensor:
    """One seed per row from one seed for all: row ``r`` (in row-major order) gets ``mix_seeds(seed, r)``.

    Args:
        seed: a Python int, or a 0-d int64 tensor.
        shape: the leading shape of the rows.
        device: where the seeds go.

    Returns:
        int64, ``shape``.
    """
    rows = torch.arange(math.prod(shape), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        seed = seed.to(rows.device)
    return mix_seeds(seed, rows).view(shape)


def uniform(seed: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """``tl.rand(seed, offset)``: float32 uniform numbers in ``[0, 1)``.

    Args:
        seed: int64, any shape.
        offset: int64 below 2^32, any shape that broadcasts with ``seed``.

    Returns:
        float32, the broadcast shape.
    """
    # An unsigned 32-bit word becomes a signed one; its non-negative half and the mirror image of its
    # negative half (-x - 1, the bitwise complement) are the same 31 bits.
    word = philox4x32(seed, offset)
    word = torch.minimum(word, word ^ _LOW_32)
    return word.to(torch.float32).mul_(_INT31_TO_UNIT)


def gumbel(seed: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel numbers ``-log(-log(1 - u))`` from ``u = uniform(seed, offset)``; always finite.

    ``1 - u`` and not ``u``, with ``log1p``: large Gumbel numbers, the ones that win a race, then come from
    small ``u``, where ``u`` has its finest resolution (2^-31, where near one it would be 2^-24).
    The range is -2.81 to 22.18.
    """
    u = uniform(seed, offset).clamp_min_(_SMALLEST_UNIFORM)
    return u.neg_().log1p_().neg_().log_().neg_()


def philox4x32(seed: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The first of the four output words of Philox4x32-10 for key ``seed`` and counter ``(offset, 0, 0, 0)``.

    Args:
        seed: int64, any shape.
        offset: int64 below 2^32, any shape that broadcasts with ``seed``.

    Returns:
        int64 in ``[0, 2^32)``, the broadcast shape.
    """
    shape = torch.broadcast_shapes(seed.shape, offset.shape)
    k0, k1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    # The first round, from the counter (offset, 0, 0, 0).
    product = offset * _ROUND_A
    c0 = k0.expand(shape).clone()
    c1 = torch.zeros_like(c0)
    c2 = (((product >> 32) ^ k1) & _LOW_32).expand(shape).clone()
    c3 = product.expand(shape).clone()
    # Nine more, in place. c1 and c3 are the low halves of the last products; their high halves stay where
    # they are, and only fall to the mask after the exclusive or.
    for _ in range(1, _ROUNDS):
        k0, k1 = (k0 + _KEY_A) & _LOW_32, (k1 + _KEY_B) & _LOW_32
        product_a, product_b = c0.mul_(_ROUND_A), c2.mul_(_ROUND_B)
        c0 = c1.bitwise_xor_(product_b >> 32).bitwise_xor_(k0).bitwise_and_(_LOW_32)
        c2 = c3.bitwise_xor_(product_a >> 32).bitwise_xor_(k1).bitwise_and_(_LOW_32)
        c1, c3 = product_b, product_a
    return c0


def _splitmix64(x: int | torch.Tensor) -> int | torch.Tensor:
    """The output function of the splitmix64 generator at state ``x``."""
    x = _wrapped(x + _signed(0x9E3779B97F4A7C15))
    x = _wrapped((x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9))
    x = _wrapped((x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB))
    return x ^ _shift_right(x, 31)


def _shift_right(x: int | torch.Tensor, bits: int) -> int | torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(x: int | torch.Tensor) -> int | torch.Tensor:
    return x if isinstance(x, torch.Tensor) else _signed(x)


def _signed(x: int) -> int:
    """``x`` modulo 2^64 as a signed 64-bit number."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x
