"""Whole numbers that launchers cut tensors by.

``triton.cdiv`` and ``triton.next_power_of_2`` may be called in a kernel too, for which they take 2 us a call on the
host: a fifth of a launch, and every launch needs a few of them.
"""

from __future__ import annotations


def ceil_div(size: int, unit: int) -> int:
    """As many units as hold it."""
    return -(-size // unit)


def power_of_two(size: int) -> int:
    """The smallest power of two that holds it, of a size of at least 1."""
    return 1 << (size - 1).bit_length()
