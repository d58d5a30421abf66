"""The streaming forward: log-prob, entropy, lse and a drawn token of every row, and no logit leaves the chip.

`forward_kernel`. One program owns a tile of rows and a contiguous range of vocabulary tiles. For each vocabulary
tile it multiplies x [BR, D] by W [BV, D]^T in steps of BD, and folds the tile of logits, still in registers and
never rounded, into what it keeps of each row. x is read once a vocabulary tile (from L2), W once a tile of rows;
three to six numbers a row are written. Wide tiles are folded in two halves, so that the arithmetic of a logit
needs registers for half a tile only.

    m' = max(m, max q)        d = q - m'        a = exp(m - m')
    t  = a (t + (m - m') s) + sum e^d d         s = a s + sum e^d

so that H = ln s - t / s at the end, both terms non-negative and free of m. m starts at -1e30 and columns beyond V
have q = -1e30: finite, so 0 * d is 0 and not nan. Every split begins with a column that exists.

The noise of a draw is a function of (row seed, column of the whole vocabulary): no tile shape, split or rank
changes it. The bits are `tl.rand`'s, and log1p is Kahan's: large Gumbel numbers come from small uniforms.

`combine_kernel`. One program joins the S splits of a few rows, in one load: S numbers a field and row. For a whole
vocabulary it writes what the caller wants to know, for a rank's slice what the ranks exchange.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refine_kernels.chips import Chip, chip_of
from refine_kernels.linear_logprob import reference
from refine_kernels.linear_logprob.chunked import Head
from refine_kernels.linear_logprob.partials import Partials
from refine_kernels.sizes import ceil_div, power_of_two

INTERPRETED = Chip("sm_90", 132)  # whose tiles are taken where kernels are interpreted
NO_TOKEN: tl.constexpr = tl.constexpr(reference.NO_TOKEN)
_COMBINE_ELEMENTS = 1024  # splits x rows that a program of `combine_kernel` holds


class Tile(NamedTuple):
    """``rows x columns`` of logits a program, ``depth`` of D a step."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As `forward_kernel` takes them; wide tiles of logits are folded in halves."""
        halves = 2 if self.columns > 128 else 1
        return {"BR": self.rows, "BV": self.columns, "BD": self.depth, "HALVES": halves}


def choose_tile(N: int, D: int, dtype: torch.dtype, noise: bool, chip: Chip) -> Tile:
    """The tile for N rows of ``D`` numbers of ``dtype``; ``noise``: a token is drawn.

    Few rows are bound by reading W: a tile no taller than the rows, and many bytes of W on their way. Philox needs
    registers of its own beside the logits: smaller tiles. Where logits come from tensor memory, so do the masks of
    a last step over D that is not whole.
    """
    if dtype == torch.float32:  # no tensor cores at full precision
        return Tile(16, 32, 32, 4, 2) if N <= 16 else Tile(64, 64, 32, 8, 2)
    amd, large = chip.name.startswith("gfx"), chip.has_large_shared_memory
    if N <= 16:
        return Tile(16, 64, 128, 4, 2) if amd else Tile(16, 128, 128, 4, 4 if large else 3)
    if noise or (amd and N <= 64):
        return Tile(64, 64, 64, 8, 2 if amd else 3)
    if N <= 64:
        return Tile(64, 128, 64, 4, 4)
    if large and not (chip.has_tensor_memory and D % 64):
        return Tile(128, 256, 64, 8, 3)
    return Tile(128, 128, 64, 8, 2 if amd else 3)


@lru_cache(4096)
def choose_splits(row_tiles: int, vocab_tiles: int, programs: int) -> int:
    """Into how many ranges the vocabulary is cut: the fewest that keep ``programs`` multiprocessors busiest."""

    def steps(splits: int) -> int:
        return -(-row_tiles * splits // programs) * -(-vocab_tiles // splits)

    most = min(vocab_tiles, max(1, 2 * programs // row_tiles), _COMBINE_ELEMENTS)
    best = min(range(1, most + 1), key=lambda splits: (steps(splits), splits))
    return -(-vocab_tiles // -(-vocab_tiles // best))  # none is empty


def combine_tile(splits: int) -> tuple[int, int]:
    """Splits and rows that a program of `combine_kernel` holds."""
    BS = power_of_two(splits)
    return BS, min(_COMBINE_ELEMENTS // BS, 128)


def outputs(
    x: torch.Tensor,  # [N, D]
    head: Head,  # of the whole vocabulary
    target: torch.Tensor | None,  # [N]
    seed: torch.Tensor | None,  # [N]
    *,
    ignore_index: int,
    need_logprob: bool,
    need_entropy: bool,
    need_lse: bool,
    sample: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob, entropy, lse and token of every row, each ``[N]``, or ``[0]`` where not needed.

    A target that is neither a column nor ``ignore_index`` has log-prob nan.
    """
    N = len(x)
    asked = [(need_logprob, torch.float32), (need_entropy, torch.float32), (need_lse, torch.float32)]
    asked.append((sample, torch.int64))
    found = tuple(torch.empty(N if need else 0, dtype=dtype, device=x.device) for need, dtype in asked)
    logprob, entropy, lse, token = (x if need else None for x, (need, _) in zip(found, asked))
    parts, splits = _parts(x, head, target, seed, 0, need_logprob, need_entropy, sample)
    joined = Partials(lse, None, entropy, logprob, None, token)
    _combine(parts, joined, N, splits, target, ignore_index, head.weight.shape[0])
    return found


def partials(
    x: torch.Tensor,  # [N, D]
    head: Head,
    target: torch.Tensor | None,  # [N], columns of the whole vocabulary
    seed: torch.Tensor | None,  # [N]
    *,
    first_column: int,
    need_logprob: bool,
    need_entropy: bool,
    sample: bool,
) -> Partials:
    """What this slice of the vocabulary, from ``first_column`` on, says of every row."""
    asked = (need_logprob, need_entropy, sample)
    parts, splits = _parts(x, head, target, seed, first_column, *asked)
    joined = _fields((len(x),), x.device, *asked)
    _combine(parts, joined, len(x), splits, target)
    return joined


def _fields(
    shape: tuple[int, ...], device: torch.device, need_logprob: bool, need_entropy: bool, sample: bool
) -> Partials:
    def new(need: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return torch.empty(shape, dtype=dtype, device=device) if need else None

    return Partials(
        new(True), new(True), new(need_entropy), new(need_logprob), new(sample), new(sample, torch.int64)
    )


def _parts(
    x: torch.Tensor,  # [N, D]
    head: Head,
    target: torch.Tensor | None,  # [N]
    seed: torch.Tensor | None,  # [N]
    first_column: int,
    need_logprob: bool,
    need_entropy: bool,
    sample: bool,
) -> tuple[Partials, int]:  # [S, N] each, and S
    """What `forward_kernel` keeps of every row: ``log_s`` and ``e`` are sums yet."""
    (N, D), V = x.shape, head.weight.shape[0]
    chip = chip_of(x.device) or INTERPRETED
    tile = choose_tile(N, D, x.dtype, seed is not None, chip)
    row_tiles, vocab_tiles = ceil_div(N, tile.rows), ceil_div(V, tile.columns)
    splits = choose_splits(row_tiles, vocab_tiles, chip.multiprocessors)
    parts = _fields((splits, N), x.device, need_logprob, need_entropy, sample)
    with torch.cuda.device_of(x):
        forward_kernel[(row_tiles * splits,)](
            x, head.weight, head.bias, target, seed, *parts,
            N, V, first_column, row_tiles, ceil_div(vocab_tiles, splits),
            1.0 / head.temperature, head.softcap or 1.0,
            D=D, HAS_SOFTCAP=head.softcap is not None, **tile.constants,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return parts, splits


def _combine(
    parts: Partials,  # [S, N] each
    joined: Partials,  # [N] each, out
    N: int,
    splits: int,
    target: torch.Tensor | None,  # [N]
    ignore_index: int = 0,
    V: int = 0,  # of the whole vocabulary, whose outputs are written; 0: a slice's partials are
) -> None:
    BS, BR = combine_tile(splits)
    with torch.cuda.device_of(parts.m):
        combine_kernel[(ceil_div(N, BR),)](
            *parts, *joined, target, N, splits, V, ignore_index,
            DRAWN=target is None, WHOLE=V > 0, BS=BS, BR=BR, num_warps=4,
        )  # fmt: skip


@triton.jit
def soft_capped(b_z, cap):
    """``cap tanh(z / cap)``: a series where 1 - exp(-2 |z| / cap) would cancel."""
    b_u = b_z / cap
    b_a = tl.abs(b_u)
    b_e = tl.exp(-2.0 * b_a)
    b_far = (1.0 - b_e) / (1.0 + b_e)
    b_s = b_u * b_u
    b_near = b_a * (1.0 + b_s * (-1 / 3 + b_s * (2 / 15 + b_s * (-17 / 315 + b_s * (62 / 2835)))))
    b_tanh = tl.where(b_a < 0.25, b_near, b_far)
    return cap * tl.where(b_u < 0, -b_tanh, b_tanh)


@triton.jit
def gumbel(b_seed, b_column):
    """Of blocks of row seeds (int64) and columns (int32) of one shape: ``-log(-log1p(-u))``."""
    b_u = tl.maximum(tl.rand(b_seed, b_column), 2.3283064365386963e-10)  # 2^-32
    b_w = 1.0 - b_u
    b_log = tl.where(b_w == 1.0, -b_u, tl.log(b_w) * (-b_u / tl.where(b_w == 1.0, -1.0, b_w - 1.0)))
    return -tl.log(-b_log)


@triton.jit
def _absorb(
    b_acc,  # [BR, BV] x W^T
    o_v,  # [BV] columns of the slice
    bias,  # [V]
    b_y,  # [BR] the target's column of the slice
    b_seed,  # [BR]
    b_m,  # [BR]
    b_s,  # [BR]
    b_t,  # [BR]
    b_qy,  # [BR]
    b_best,  # [BR]
    b_token,  # [BR]
    V,
    first_column,
    inv_temperature,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TARGET: tl.constexpr,
    SAMPLE: tl.constexpr,
    NOISE: tl.constexpr,
    DRAWN: tl.constexpr,
):
    """What is kept of the rows after one more tile of logits."""
    b_q = b_acc
    if bias is not None:
        b_q += tl.load(bias + tl.minimum(o_v, V - 1))[None, :]
    if HAS_SOFTCAP:
        b_q = soft_capped(b_q, softcap)
    b_q = tl.where((o_v < V)[None, :], b_q * inv_temperature, -1e30)
    b_top = tl.max(b_q, 1)
    b_mn = tl.maximum(b_m, b_top)
    b_d = b_q - b_mn[:, None]
    b_e = tl.exp(b_d)
    b_step = b_m - b_mn
    b_a = tl.exp(b_step)
    if ENTROPY:
        b_t = b_a * (b_t + b_step * b_s) + tl.sum(b_e * b_d, 1)
    b_s = b_a * b_s + tl.sum(b_e, 1)
    if TARGET:
        b_qy += tl.sum(tl.where(o_v[None, :] == b_y[:, None], b_q, 0.0), 1)
    if SAMPLE:
        # neither a column beyond V nor nan is ever drawn: a row of nan keeps token 0 and a best of -inf
        b_score, b_new = b_q, b_top
        if NOISE:
            b_zero = tl.zeros(b_q.shape, tl.int32)
            b_score += gumbel(b_seed[:, None] + b_zero.to(tl.int64), (o_v + first_column)[None, :] + b_zero)
            b_score = tl.where(b_score > -1e30, b_score, float("-inf"))
            b_new = tl.max(b_score, 1)
        # the first column that has the maximum: one reduction of columns; an argmax carries scores beside them
        i_new = tl.min(tl.where(b_score == b_new[:, None], o_v[None, :], 2147483647), 1)
        better = (b_new > b_best) & (b_new > -1e30)
        b_token = tl.where(better, i_new.to(tl.int64) + first_column, b_token)
        if DRAWN:
            b_hit = tl.sum(tl.where(o_v[None, :] == i_new[:, None], b_q, 0.0), 1)
            b_qy = tl.where(better, b_hit, b_qy)
        b_best = tl.where(better, b_new, b_best)
    return b_mn, b_s, b_t, b_qy, b_best, b_token


@triton.jit(do_not_specialize=["N", "first_column", "row_tiles", "tiles_per_split"])
def forward_kernel(
    x,  # [N, D]
    w,  # [V, D]
    bias,  # [V] or None
    target,  # [N] or None
    seed,  # [N] or None
    m,  # [S, N] out
    s,  # [S, N] out
    t,  # [S, N] out, or None: no entropy
    q_y,  # [S, N] out, or None: no log-prob
    best,  # [S, N] out, or None: no token
    token,  # [S, N] out, or None
    N,
    V,
    first_column,
    row_tiles,
    tiles_per_split,
    inv_temperature,
    softcap,
    D: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    ENTROPY: tl.constexpr = t is not None
    SAMPLE: tl.constexpr = best is not None
    NOISE: tl.constexpr = seed is not None
    TARGET: tl.constexpr = q_y is not None and target is not None
    DRAWN: tl.constexpr = q_y is not None and target is None
    # Programs that run together share a vocabulary range: its tiles of W are read from L2.
    i_r, i_s = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    o_r = i_r * BR + tl.arange(0, BR)
    o_in = tl.minimum(o_r, N - 1)
    o_d = tl.arange(0, BD)
    o_c = tl.arange(0, BV)
    p_x = x + o_in[:, None].to(tl.int64) * D + o_d[None, :]

    b_m = tl.full([BR], -1e30, tl.float32)
    b_s = tl.zeros([BR], tl.float32)
    b_t = tl.zeros([BR], tl.float32)
    b_qy = tl.zeros([BR], tl.float32)
    b_best = tl.full([BR], float("-inf"), tl.float32)
    b_token = tl.zeros([BR], tl.int64)
    b_y = tl.zeros([BR], tl.int64)
    b_seed = tl.zeros([BR], tl.int64)
    if TARGET:
        b_y = tl.load(target + o_in) - first_column
    if NOISE:
        b_seed = tl.load(seed + o_in)

    i_first = i_s * tiles_per_split
    for i_v in range(i_first, tl.minimum(i_first + tiles_per_split, tl.cdiv(V, BV))):
        o_v = i_v * BV + o_c
        p_w = w + tl.minimum(o_v, V - 1)[None, :].to(tl.int64) * D + o_d[:, None]
        b_acc = tl.zeros([BR, BV], tl.float32)
        for i_d in range(0, D, BD):
            if D % BD == 0:
                b_x, b_w = tl.load(p_x + i_d), tl.load(p_w + i_d)
            else:
                b_x = tl.load(p_x + i_d, mask=(o_d < D - i_d)[None, :], other=0.0)
                b_w = tl.load(p_w + i_d, mask=(o_d < D - i_d)[:, None], other=0.0)
            b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
        if HALVES == 2:
            b_lo, b_hi = tl.split(tl.permute(tl.reshape(b_acc, [BR, 2, BV // 2]), (0, 2, 1)))
            o_h = i_v * BV + tl.arange(0, BV // 2)
            b_m, b_s, b_t, b_qy, b_best, b_token = _absorb(
                b_lo, o_h, bias, b_y, b_seed, b_m, b_s, b_t, b_qy, b_best, b_token, V, first_column,
                inv_temperature, softcap, HAS_SOFTCAP, ENTROPY, TARGET, SAMPLE, NOISE, DRAWN,
            )  # fmt: skip
            b_m, b_s, b_t, b_qy, b_best, b_token = _absorb(
                b_hi, o_h + BV // 2, bias, b_y, b_seed, b_m, b_s, b_t, b_qy, b_best, b_token, V, first_column,
                inv_temperature, softcap, HAS_SOFTCAP, ENTROPY, TARGET, SAMPLE, NOISE, DRAWN,
            )  # fmt: skip
        else:
            b_m, b_s, b_t, b_qy, b_best, b_token = _absorb(
                b_acc, o_v, bias, b_y, b_seed, b_m, b_s, b_t, b_qy, b_best, b_token, V, first_column,
                inv_temperature, softcap, HAS_SOFTCAP, ENTROPY, TARGET, SAMPLE, NOISE, DRAWN,
            )  # fmt: skip

    p_o = i_s.to(tl.int64) * N + o_r
    inside = o_r < N
    tl.store(m + p_o, b_m, mask=inside)
    tl.store(s + p_o, b_s, mask=inside)
    if ENTROPY:
        tl.store(t + p_o, b_t, mask=inside)
    if TARGET:
        # within this split, or another one writes it
        i_last = tl.minimum(i_first + tiles_per_split, tl.cdiv(V, BV)) * BV
        held = (b_y >= i_first * BV) & (b_y < tl.minimum(i_last, V))
        tl.store(q_y + p_o, tl.where(held, b_qy, float("-inf")), mask=inside)
    if DRAWN:
        tl.store(q_y + p_o, b_qy, mask=inside)
    if SAMPLE:
        tl.store(best + p_o, b_best, mask=inside)
        tl.store(token + p_o, b_token, mask=inside)


@triton.jit(do_not_specialize=["N", "S", "V", "ignore_index"])
def combine_kernel(
    m,  # [S, N]
    s,  # [S, N]
    t,  # [S, N] or None
    q_y,  # [S, N] or None
    best,  # [S, N] or None
    token,  # [S, N] or None
    m_out,  # [N] out; WHOLE: lse, or None
    log_s_out,  # [N] out; WHOLE: None
    e_out,  # [N] out, or None; WHOLE: entropy
    q_y_out,  # [N] out, or None; WHOLE: log-prob
    best_out,  # [N] out, or None; WHOLE: None
    token_out,  # [N] out, or None
    target,  # [N] or None
    N,
    S,
    V,
    ignore_index,
    DRAWN: tl.constexpr,
    WHOLE: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_s = tl.arange(0, BS)
    p_i = o_s[:, None].to(tl.int64) * N + o_r[None, :]
    inside = o_r < N
    there = (o_s < S)[:, None] & inside[None, :]
    b_m = tl.load(m + p_i, mask=there, other=-1e30)
    b_s = tl.load(s + p_i, mask=there, other=0.0)
    b_top = tl.max(b_m, 0)
    b_step = b_m - b_top[None, :]
    b_a = tl.exp(b_step)
    b_sum = tl.sum(b_a * b_s, 0)
    b_log_s = tl.log(b_sum)
    b_lse = b_top + b_log_s
    if m_out is not None:
        tl.store(m_out + o_r, b_lse if WHOLE else b_top, mask=inside)
    if log_s_out is not None:
        tl.store(log_s_out + o_r, b_log_s, mask=inside)
    if t is not None:
        b_t = tl.load(t + p_i, mask=there, other=0.0)
        b_e = tl.sum(b_a * (b_t + b_step * b_s), 0) / b_sum
        tl.store(e_out + o_r, b_log_s - b_e if WHOLE else b_e, mask=inside)
    if best is not None:
        b_best, i_best = tl.max(tl.load(best + p_i, mask=there, other=float("-inf")), 0, return_indices=True)
        won = o_s[:, None] == i_best[None, :]
        b_token = tl.sum(tl.where(won, tl.load(token + p_i, mask=there, other=0), 0), 0)
        if WHOLE:
            b_token = tl.where(tl.abs(b_lse) < float("inf"), b_token, NO_TOKEN)  # nan is not less either
        else:
            tl.store(best_out + o_r, b_best, mask=inside)
        tl.store(token_out + o_r, b_token, mask=inside)
    if q_y is not None:
        b_qy = tl.load(q_y + p_i, mask=there, other=float("-inf"))
        if DRAWN:
            b_qy = tl.sum(tl.where(won, b_qy, 0.0), 0)
        else:
            b_qy = tl.max(b_qy, 0)
        if WHOLE:
            b_qy = b_qy - b_top - b_log_s
            if not DRAWN:
                b_y = tl.load(target + o_r, mask=inside, other=0)
                b_qy = tl.where((b_y >= 0) & (b_y < V), b_qy, float("nan"))
                b_qy = tl.where(b_y == ignore_index, 0.0, b_qy)
        tl.store(q_y_out + o_r, b_qy, mask=inside)
