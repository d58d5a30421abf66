"""Which chip launchers cut their kernels for: the one of their tensors, or an assumed one where there is none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """What launchers look at."""

    name: str  # "sm_90", "gfx942"
    multiprocessors: int

    @property
    def has_tensor_memory(self) -> bool:
        """A data-centre Blackwell, whose tensor cores keep their results in a memory of their own."""
        return self.name in ("sm_100", "sm_103")

    @property
    def has_large_shared_memory(self) -> bool:
        """227 KB a program. sm_80 has 163; sm_86, sm_89 and sm_120 have 99; AMD's have 64."""
        return self.name == "sm_90" or self.has_tensor_memory


_assumed: Chip | None = None


def chip_of(device: torch.device) -> Chip | None:
    """The chip that ``device`` is; elsewhere the assumed one; ``None`` where kernels are interpreted."""
    return _assumed if device.type != "cuda" else _chip_of_gpu(device.index)


@functools.cache
def _chip_of_gpu(index: int | None) -> Chip:
    """Asked once: it stays what it is, and asking takes microseconds at every launch."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return Chip(name, properties.multi_processor_count)


@contextlib.contextmanager
def assume(chip: Chip) -> Iterator[None]:
    """Tensors that are on no GPU are taken to be on ``chip``: launches can be recorded for it."""
    global _assumed
    before, _assumed = _assumed, chip
    try:
        yield
    finally:
        _assumed = before
