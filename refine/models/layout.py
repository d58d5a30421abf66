"""Which tokens of a batch are read, and which of them belong together.

A caller's batch may be padded (a mask), packed (several documents in one row), or both. The layers never see
that: they get rows that begin with their first token, and a :class:`BatchLayout` that says how many tokens of a
row are read, or where the documents of one packed row begin. So padding never reaches a fast weight, a
convolution, a chunk count or a position, and nothing of one document reaches the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch


@dataclass(frozen=True)
class BatchLayout:
    """How the rows lie that the layers see: N sequences, padded on the right or packed into one row.

    Attributes:
        lengths: [N] int64 tokens read of each row, the rest is padding; None: all. Always None when packed.
        cu_seqlens: [N + 1] int64, where the documents of the one row begin and end; None: not packed.
        longest: tokens of the longest document, when packed.
    """

    lengths: torch.Tensor | None = None  # [N]
    cu_seqlens: torch.Tensor | None = None  # [N + 1]
    longest: int = 0

    @property
    def packed(self) -> bool:
        """Whether one row holds several documents."""
        return self.cu_seqlens is not None

    @property
    def plain(self) -> bool:
        """Whether every token of every row is read, one sequence a row."""
        return self.lengths is None and self.cu_seqlens is None

    def tokens_read(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, ...] -> [N]
        """Tokens that this pass reads of each sequence."""
        if self.packed:
            return self.document_lengths
        if self.lengths is not None:
            return self.lengths
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)

    def is_read(self, x: torch.Tensor) -> torch.Tensor | None:  # [B, T, ...] -> [B, T] bool
        """True for a token, False for padding; None where there is no padding."""
        if self.lengths is None:
            return None
        return torch.arange(x.shape[1], device=x.device) < self.lengths[:, None]

    def positions(self, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:  # [B, T, ...], [N] -> [B, T]
        """The position of each token in its sequence, of which ``start`` tokens had been read before."""
        if self.packed:
            return (self.token + start[self.document])[None]
        return start[:, None] + torch.arange(x.shape[1], device=x.device)

    # ---- packed rows ------------------------------------------------------------------------------------

    @cached_property
    def document_lengths(self) -> torch.Tensor:
        """[N] tokens of each document."""
        return self.cu_seqlens.diff()

    @cached_property
    def document(self) -> torch.Tensor:
        """[T] the document of each token."""
        numbers = torch.arange(len(self.document_lengths), device=self.cu_seqlens.device)
        return numbers.repeat_interleave(self.document_lengths)

    @cached_property
    def token(self) -> torch.Tensor:
        """[T] the place of each token in its document."""
        total = torch.arange(len(self.document), device=self.cu_seqlens.device)
        return total - self.cu_seqlens[self.document]

    def as_rows(self) -> BatchLayout:
        """The layout of :meth:`to_rows`' result."""
        return BatchLayout(lengths=self.document_lengths) if self.packed else self

    def to_rows(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Packed documents as rows padded with zeros: [1, ..., T, ...] -> [N, ..., longest, ...] along ``dim``."""
        x = x.movedim(dim, 1)[0]  # [T, ...]
        rows = x.new_zeros(len(self.document_lengths) * self.longest, *x.shape[1:])
        rows = rows.index_copy(0, self.document * self.longest + self.token, x)
        return rows.unflatten(0, (-1, self.longest)).movedim(1, dim)

    def to_packed(self, rows: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The inverse of :meth:`to_rows`: [N, ..., longest, ...] -> [1, ..., T, ...]."""
        table = rows.movedim(dim, 1).flatten(0, 1)
        return table.index_select(0, self.document * self.longest + self.token)[None].movedim(1, dim)


PLAIN = BatchLayout()  # one sequence a row, all of it read


@dataclass(frozen=True)
class Placement:
    """Where the layers' rows lie in the caller's batch, there and back.

    Attributes:
        layout: of the layers' rows.
        shift: [B] places that a row is moved to the left (its padding on the left), or None.
        source: [T'] flat index into the caller's [B, T] of each packed token, or None.
        ends: [B, T] bool, True for the last token of a document, in the caller's batch; None unless packed.
    """

    layout: BatchLayout
    shift: torch.Tensor | None = None
    source: torch.Tensor | None = None
    ends: torch.Tensor | None = None

    def take_in(self, x: torch.Tensor) -> torch.Tensor:
        """The caller's [B, T, D] as the layers' rows."""
        if self.shift is not None:
            return _roll_rows(x, self.shift)
        if self.source is not None:
            return x.flatten(0, 1).index_select(0, self.source)[None]
        return x

    def put_back(self, y: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
        """The layers' rows as the caller's [batch, tokens, D]; zeros where nothing was read of a packed batch."""
        if self.shift is not None:
            return _roll_rows(y, -self.shift)
        if self.source is None:
            return y
        if y.shape[1] == batch * tokens:
            return y.view(batch, tokens, -1)
        return (
            y.new_zeros(batch * tokens, y.shape[2]).index_copy(0, self.source, y[0]).view(batch, tokens, -1)
        )


@dataclass(frozen=True)
class Packing:
    """What callers say of the documents in their rows, by whichever of the names in use; see :func:`place`."""

    position_ids: torch.Tensor | None = None  # [B, T] or [1, T]
    cu_seqlens: torch.Tensor | Sequence[int] | None = None  # [N + 1]
    cu_seq_lens_q: torch.Tensor | None = None  # [N + 1]
    cu_seq_lens_k: torch.Tensor | None = None  # [N + 1]
    max_length_q: int | None = None
    max_length_k: int | None = None
    seq_idx: torch.Tensor | None = None  # [B, T]


def place(
    shape: tuple[int, int],
    mask: torch.Tensor | None,  # [B, >= T]
    packing: Packing,
    start: torch.Tensor | None,  # [N] tokens that each sequence has read before; None: nothing
    device: torch.device,
) -> Placement:
    """Read mask, positions and document bounds, and check that they agree.

    Raises:
        ValueError: names the argument, what was given, and what is allowed.
    """
    batch, tokens = shape
    read = _read_mask(mask, batch, tokens, device)  # [B, T] or None
    begins = _document_starts(batch, tokens, packing, read, start, device)  # [B, T] or None
    if begins is None:
        return _place_rows(tokens, read)
    source = torch.arange(batch * tokens, device=device)
    if read is not None:
        source = source[read.flatten()]
    first = begins.flatten()[source].nonzero()[:, 0]
    bounds = torch.cat([first, first.new_tensor([len(source)])])
    longest = int(bounds.diff().max())
    if start is not None and len(start) != len(first):
        raise ValueError(
            f"past_key_values holds {len(start)} sequences, but the batch is packed with {len(first)} documents"
        )
    ends = torch.zeros(batch * tokens, dtype=torch.bool, device=device)
    ends[source[bounds[1:] - 1]] = True
    return Placement(BatchLayout(None, bounds, longest), source=source, ends=ends.view(batch, tokens))


def _read_mask(mask, batch: int, tokens: int, device: torch.device) -> torch.Tensor | None:
    """[B, T] bool where anything is padding, else None."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        given = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be [batch, tokens] of 0 and 1, got {given}")
    if mask.shape[0] != batch or mask.shape[1] < tokens:
        raise ValueError(f"attention_mask must be [{batch}, at least {tokens}], got {list(mask.shape)}")
    mask = mask[:, -tokens:].to(device).bool()
    return None if bool(mask.all()) else mask


def _place_rows(tokens: int, read: torch.Tensor | None) -> Placement:
    """One sequence a row: padding on the left is moved to the right."""
    if read is None:
        return Placement(PLAIN)
    lengths = read.sum(1)
    left = read.int().argmax(1)  # 0 in a row without a token
    column = torch.arange(tokens, device=read.device)
    one_run = (column >= left[:, None]) & (column < (left + lengths)[:, None])
    if not torch.equal(one_run, read):
        row = int((one_run != read).any(1).nonzero()[0])
        raise ValueError(
            f"attention_mask has a hole in row {row}: the tokens of a row must be one run of ones"
        )
    return Placement(BatchLayout(lengths), shift=left if bool(left.any()) else None)


def _document_starts(batch, tokens, packing: Packing, read, start, device) -> torch.Tensor | None:
    """[B, T] bool, True where a document begins; None: one sequence a row, nothing is packed."""
    begins = _starts_of_bounds(batch, tokens, packing, device)
    if packing.seq_idx is not None:
        index = _tensor_of("seq_idx", packing.seq_idx, batch, tokens, device)
        changes = torch.ones_like(index, dtype=torch.bool)
        changes[:, 1:] = index[:, 1:] != index[:, :-1]
        if begins is not None and not torch.equal(begins, changes):
            raise ValueError("seq_idx does not change where the documents of cu_seqlens begin")
        begins = changes if begins is not None or bool(changes[:, 1:].any()) else None
    if packing.position_ids is not None:
        begins = _starts_of_positions(batch, tokens, packing.position_ids, begins, read, start, device)
    if begins is None or read is None:
        return begins
    after_padding = read.clone()  # a document may begin with padding: what follows it is its first token
    after_padding[:, 1:] &= ~read[:, :-1]
    tokens_begin = (begins | after_padding) & read
    if packing.position_ids is None and int(tokens_begin.sum()) != int(begins.sum()):
        raise ValueError("attention_mask must leave one run of ones in each of the packed documents")
    return tokens_begin


def _starts_of_bounds(batch, tokens, packing: Packing, device) -> torch.Tensor | None:
    given = {
        name: value
        for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
        if (value := getattr(packing, name)) is not None
    }
    bounds = None
    for name, value in given.items():
        value = value.tolist() if isinstance(value, torch.Tensor) else list(value)
        if batch != 1:
            raise ValueError(f"{name} packs one row: input_ids must be [1, T], got [{batch}, {tokens}]")
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in value)
        if not whole or len(value) < 2 or value[0] != 0 or value[-1] != tokens:
            raise ValueError(f"{name} must be whole numbers from 0 to T = {tokens}, got {value}")
        for n, (a, b) in enumerate(pairwise(value)):
            if a >= b:
                raise ValueError(f"{name} must increase, got {a} then {b} at entry {n + 1}")
        if bounds is not None and value != bounds:
            raise ValueError(f"{name} must be {next(iter(given))}, {bounds}, got {value}")
        bounds = value
    longest = None if bounds is None else max(b - a for a, b in pairwise(bounds))
    for name in ("max_length_q", "max_length_k"):
        length = getattr(packing, name)
        if length is not None and (longest is None or int(length) < longest):
            fits = (
                "come with cu_seq_lens_q"
                if longest is None
                else f"be at least the longest document, {longest}"
            )
            raise ValueError(f"{name} must {fits}, got {length}")
    if bounds is None:
        return None
    begins = torch.zeros(1, tokens, dtype=torch.bool, device=device)
    begins[0, torch.tensor(bounds[:-1], device=device)] = True
    return begins


def _tensor_of(name: str, value, batch: int, tokens: int, device) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.dim() != 2:
        given = (
            f"{list(value.shape)} of {value.dtype}"
            if isinstance(value, torch.Tensor)
            else type(value).__name__
        )
        raise ValueError(f"{name} must be whole numbers [{batch}, {tokens}], got {given}")
    if value.shape[0] not in (1, batch) or value.shape[1] != tokens:
        raise ValueError(f"{name} must be [{batch}, {tokens}] (or [1, {tokens}]), got {list(value.shape)}")
    return value.to(device).expand(batch, tokens)


def _starts_of_positions(batch, tokens, position_ids, begins, read, start, device) -> torch.Tensor | None:
    """Where positions begin anew; they must continue everywhere else, and agree with ``begins`` where given."""
    position = _tensor_of("position_ids", position_ids, batch, tokens, device)
    if (
        begins is None and read is None and (start is None or len(start) == batch)
    ):  # as in every step of decoding
        counted = torch.arange(tokens, device=device) + (0 if start is None else start[:, None])
        if torch.equal(position, counted.expand(batch, tokens)):
            return None
    first = torch.ones(batch, tokens, dtype=torch.bool, device=device)  # the first token of a row
    if read is None:
        first[:, 1:] = False
        read = torch.ones_like(first)
    else:
        first = read.clone()
        first[:, 1:] &= ~read[:, :-1]
    continues = torch.zeros_like(first)
    continues[:, 1:] = read[:, :-1] & (position[:, 1:] == position[:, :-1] + 1)
    if begins is not None:  # the documents are known; each has to count from where it stands
        restart = (begins | first) & read
        expected = torch.zeros((), dtype=torch.int64, device=device) if start is None else start
        if start is not None and len(start) == int(restart.sum()):
            at_start = position[restart] == expected
        else:
            at_start = position[restart] == 0
        wrong = read & ~restart & ~continues
        wrong[restart] |= ~at_start
    else:
        expected = torch.zeros(batch, dtype=torch.int64, device=device)
        if start is not None:
            expected = start if len(start) == batch else expected
        at_start = first & (position == expected[:, None])
        restart = read & (position == 0) & ~at_start if start is None else torch.zeros_like(first)
        wrong = read & ~continues & ~at_start & ~restart
        if start is None:
            restart = restart | first & read
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            "position_ids must count the tokens of a document from 0 (or go on from past_key_values): "
            f"row {row} has {int(position[row, column])} at column {column}, after "
            f"{'nothing' if column == 0 else int(position[row, column - 1])}"
        )
    if begins is not None:
        return begins
    return restart if bool((restart.sum(1) > 1).any()) else None


def _roll_rows(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Row b moved ``shift[b]`` places to the left, around the end: [B, T, D], [B] -> [B, T, D]."""
    index = (torch.arange(x.shape[1], device=x.device) + shift[:, None]) % x.shape[1]
    return x.gather(1, index[..., None].expand_as(x))
