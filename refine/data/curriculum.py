"""A curriculum of lengths: streams of the same data cut longer and longer, one after the other.

Recall is learned first where it is near: a needle among 128 tokens is found after a few hundred updates, and what
was learned there carries over to lengths at which nothing would have been learned. Every batch has about as many
tokens: shorter sequences come in larger batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from refine.data.document import DataError
from refine.data.stream import Batch, DataConfig, DataCounts, DataStream, training_stream


def check_lengths(lengths: Mapping[Any, Any], max_length: int, min_length: int = 2) -> dict[int, int]:
    """A schedule of lengths as {first update: tokens}.

    Raises:
        DataError: it does not begin at update 0, does not rise, or has a length that is not from ``min_length`` to
            ``max_length``.
    """
    try:
        found = {int(str(update)): int(str(tokens)) for update, tokens in lengths.items()}
    except ValueError:
        raise DataError(f"length_schedule must be update=tokens,update=tokens, got {dict(lengths)}") from None
    updates, tokens = list(found), list(found.values())
    if updates[0] != 0:
        raise DataError(f"length_schedule must begin with update 0, got {updates[0]}")
    for (before, shorter), (after, longer) in zip(list(found.items()), list(found.items())[1:]):
        if after <= before or longer <= shorter:
            raise DataError(
                f"length_schedule must rise in updates and in tokens; {shorter} tokens from update {before} are "
                f"followed by {longer} from update {after}"
            )
    if not min_length <= tokens[0] or tokens[-1] > max_length:
        raise DataError(
            f"length_schedule must have lengths from {min_length} (min_length) to {max_length} (max_length), "
            f"got {tokens[0]} to {tokens[-1]}"
        )
    return found


class Curriculum:
    """A stream to train on like :class:`~refine.data.stream.DataStream`, whose sequences grow.

    Args:
        config: of the data; its ``max_length`` is that of the longest sequences that ``batch_size`` rows are meant
            for.
        lengths: {first batch: tokens}, as :func:`check_lengths` gives it, in batches of this rank.
        tokenizer, rank, world_size: see :func:`~refine.data.stream.training_stream`.

    Raises:
        DataError: something is wrong with the data at one of the lengths.
    """

    def __init__(
        self, config: DataConfig, lengths: Mapping[int, int], tokenizer, *, rank: int = 0, world_size: int = 1
    ):
        self._config, self._starts, self._lengths = config, list(lengths), list(lengths.values())
        self._streams: list[DataStream] = [
            training_stream(
                replace(config, max_length=tokens, seed=config.seed + 1_000_003 * stage), tokenizer, rank=rank,
                world_size=world_size,
            )
            for stage, tokens in enumerate(self._lengths)
        ]  # fmt: skip
        self._taken = 0  # batches

    @property
    def counts(self) -> DataCounts:
        """What was read, over all lengths."""
        total = DataCounts()
        for stream in self._streams:
            for field in fields(DataCounts):
                setattr(total, field.name, getattr(total, field.name) + getattr(stream.counts, field.name))
        return total

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches without end: ``batch_size`` rows of ``max_length`` tokens, or more rows of fewer."""
        while True:
            stage = bisect_right(self._starts, self._taken) - 1
            end = self._starts[stage + 1] if stage + 1 < len(self._starts) else None
            rows = batch_size * max(1, self._config.max_length // self._lengths[stage])
            for batch in self._streams[stage].batches(rows):
                self._taken += 1
                yield batch
                if self._taken == end:
                    break

    def state_dict(self) -> dict[str, Any]:
        """The position, for JSON."""
        stage = bisect_right(self._starts, self._taken) - 1
        return {
            "lengths": [[start, tokens] for start, tokens in zip(self._starts, self._lengths)],
            "taken": self._taken,
            "streams": [stream.state_dict() for stream in self._streams[: stage + 1]],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that ``state_dict`` gave."""
        lengths = [[start, tokens] for start, tokens in zip(self._starts, self._lengths)]
        if state.get("lengths") != lengths:
            raise DataError(
                f"the lengths are {lengths}, but the position to resume from was saved with {state.get('lengths')}"
            )
        self._taken = state["taken"]
        for stream, own in zip(self._streams, state["streams"]):
            stream.load_state_dict(own)
