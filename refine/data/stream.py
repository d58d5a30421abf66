"""From documents to batches of token sequences, in an order that a seed decides and a position resumes.

A stream visits the units of its source in a drawn order, tokenises document by document, cuts windows of at
most ``max_length`` tokens, and shuffles them in blocks. Its position is where a block begins and how much of
the block was taken, so that resuming reads one block again and nothing else.

What is wrong with the data is said when a stream is made, before any training. Where documents come from
stands in ``sources.py``. Nothing is known here of models, or of what a window is good for.
"""

from __future__ import annotations

import functools
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from refine.data.document import BadRow, DataError, Document, contents_of, is_held_out, stable_hash
from refine.data.encoder import Encoder
from refine.data.recall_documents import recall_document
from refine.data.rows import first_line
from refine.data.sources import DefaultText, NeedleText, RecallText, Source, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

__all__ = [
    "Batch",
    "DataConfig",
    "DataCounts",
    "DataError",
    "DataStream",
    "held_out_stream",
    "training_stream",
]

_DEFAULT = "default"
NAME_HELD_OUT = "name some with eval_dataset_name_or_path, or raise eval_fraction"
GENERATED = ("recall", "needles")
BUILT_IN = (_DEFAULT, *GENERATED, *(f"{_DEFAULT}+{name}" for name in GENERATED))


@dataclass(frozen=True)
class DataConfig:
    """What to read and how to cut it. Lengths are in tokens."""

    dataset_name_or_path: str | None = None  # one of BUILT_IN (None: "default"), a path, a hub name
    dataset_config: str | None = None  # the configuration of a hub dataset
    dataset_split: str = "train"  # the split of a hub dataset
    text_column: str | None = None  # None: "text", else the only text column, else the longest
    answers_column: str | None = None  # None: no answers are marked
    eval_dataset_name_or_path: str | None = None  # None: documents held out of the training source
    eval_fraction: float = 0.05  # of a user's documents, held out where no evaluation source is given
    max_length: int = 2048
    min_length: int = 2  # shorter documents, and shorter last windows, are left out and counted
    shuffle_buffer: int = 128  # windows shuffled together; 1 keeps the order of the source
    recall_weight: float = 0.5  # of the windows of "default+recall" and "default+needles"
    answer_weight: float = 1.0  # of an answer's tokens, where a document marks its answers; others count 1
    context_weight: float = 1.0  # of the other tokens of such a document
    add_bos_token: bool = True  # texts and prompts begin with what the tokenizer puts there
    answer_eos: bool = True  # the answer of a pair ends with end-of-text
    seed: int = 0

    def __post_init__(self) -> None:
        def check(setting: str, right: Callable[[Any], bool], allowed: str) -> None:
            value = getattr(self, setting)
            if not right(value):
                raise DataError(f"{setting} is {value!r}; allowed: {allowed}")

        check("max_length", lambda x: x >= 2, "2 or more")
        check(
            "min_length", lambda x: 1 <= x <= self.max_length, f"1 to {self.max_length}, which is max_length"
        )
        check("shuffle_buffer", lambda x: x >= 1, "1 (keep the order) or more")
        check("eval_fraction", lambda x: 0 <= x < 1, "from 0 (hold nothing out) to below 1")
        check("recall_weight", lambda x: 0 < x < 1, "above 0 and below 1")
        check("answer_weight", lambda x: x > 0, "above 0")
        check("context_weight", lambda x: x >= 0, "0 (answers alone) or more")

    @property
    def weighs_answers(self) -> bool:
        """Whether tokens count differently."""
        return (self.answer_weight, self.context_weight) != (1, 1)


class Example(NamedTuple):
    """One window of one document; ``key`` is the same wherever and whenever the window is read."""

    key: int  # int64: a hash of the document's name in its source and of where the window begins
    input_ids: np.ndarray  # [T] int32
    weight: np.ndarray | None = None  # [T] float32: what the prediction of each token counts; None: 1


class Batch(NamedTuple):
    """Examples, padded on the right to the longest of them."""

    input_ids: torch.Tensor  # [B, T] int64
    attention_mask: torch.Tensor  # [B, T] int64: 1 for a token, 0 for padding
    keys: torch.Tensor  # [B] int64
    weight: torch.Tensor | None = None  # [B, T] float32: what the prediction of each token counts; None: 1

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))


@dataclass
class DataCounts:
    """What was read and what was left out, each document counted in the first pass alone."""

    documents: int = 0  # used
    windows: int = 0
    short_documents: int = 0  # of fewer than min_length tokens
    short_windows: int = 0  # last windows of longer documents
    bad_rows: int = 0
    cut_prompts: int = 0  # longer than max_length, cut in the middle
    longest_short: int = field(default=0, repr=False)  # tokens of the longest short document

    def note(self, row: BadRow) -> None:
        """Count a row that is left out, and name the first."""
        if not self.bad_rows:
            _warn_once(f"a row is left out, and any other like it: {row.describe()}")
        self.bad_rows += 1


@functools.cache
def _warn_once(text: str) -> None:
    """Say it, once a process: a source is read several times, for checks and for each split."""
    logger.warning("%s", text)


_LOOKED_AT = 64  # windows, for answers


class _NothingLeft(DataError):
    """The source holds no window for this split."""


# --- One source: its windows, document by document, from any place on


class _Place(NamedTuple):
    """Where reading goes on."""

    epoch: int = 0
    unit: int = 0  # in the order of the epoch
    row: int = 0
    window: int = 0


class _Reader:
    """The windows of a source; ``keep`` (a document, is it the source's first?) tells those of the split."""

    def __init__(
        self,
        source: Source,
        encode: Encoder,
        config: DataConfig,
        keep: Callable[[Document, bool], bool],
    ):
        self.source = source
        self._encode = encode
        self._config = config
        self._keep = keep

    def read(
        self, start: _Place, counts: DataCounts, *, endless: bool
    ) -> Iterator[tuple[Example | None, _Place]]:
        """Windows from ``start`` on, each with the place behind it; None where an epoch ends."""
        first_epoch, first_unit, first_row, first_window = start
        for epoch in itertools.count(first_epoch) if endless else range(first_epoch, 1):
            counted = counts if epoch == 0 else DataCounts()
            for place, unit in self._order(epoch, first_unit):
                for row, document in enumerate(self.source.rows(unit, first_row), first_row):
                    examples = self._windows(document, unit == row == 0, first_window, counted)
                    for window, example in enumerate(examples, first_window):
                        yield example, _Place(epoch, place, row, window + 1)
                    first_window = 0
                first_row = first_window = 0
            first_unit = first_row = first_window = 0
            yield None, _Place(epoch + 1)

    def check(self) -> None:
        """Fail unless there is at least one window."""
        counts = DataCounts()
        example, _ = next(self.read(_Place(), counts, endless=False))
        if example is not None:
            return
        if counts.short_documents:
            raise _NothingLeft(
                f"no document of {self.source.name} is long enough: the longest of {counts.short_documents} "
                f"has {counts.longest_short} tokens, and min_length is {self._config.min_length}"
            )
        if counts.bad_rows:
            raise _NothingLeft(f"none of the {counts.bad_rows} rows of {self.source.name} holds a text")
        raise _NothingLeft(f"no document of {self.source.name} belongs to this split")

    def has_answers(self, windows: int) -> bool:
        """Whether one of the first windows has a token of an answer."""
        found = itertools.islice(self.read(_Place(), DataCounts(), endless=False), windows)
        answer = np.float32(self._config.answer_weight)
        weights = (
            example.weight for example, _ in found if example is not None and example.weight is not None
        )
        return any((weight == answer).any() for weight in weights)

    def _order(self, epoch: int, first: int) -> Iterator[tuple[int, int]]:
        """(place in the order, unit) from place ``first`` on."""
        if self.source.units is None:
            return ((unit, unit) for unit in itertools.count(first))
        order = list(range(self.source.units))
        if self._config.shuffle_buffer > 1:
            random.Random(f"units/{self._config.seed}/{epoch}").shuffle(order)
        return itertools.islice(enumerate(order), first, None)

    def _windows(
        self, document: Document | BadRow, is_first: bool, first: int, counts: DataCounts
    ) -> Iterator[Example]:
        """The windows of one row from number ``first`` on."""
        if isinstance(document, BadRow):
            counts.note(document)
            return
        if not self._keep(document, is_first):
            return
        weight = None
        try:
            if document.answers and self._config.weighs_answers:
                ids, answers = self._encode.with_answers(document)
                weight = np.where(answers, self._config.answer_weight, self._config.context_weight)
                weight = weight.astype(np.float32)
            else:
                ids = self._encode(document.text)
        except DataError:
            raise
        except (TypeError, ValueError, OverflowError) as error:  # lone surrogates, say
            why = f"{document.name}: the tokenizer refuses it ({first_line(error)})"
            counts.note(BadRow(lambda: why))
            return
        length, shortest = self._config.max_length, self._config.min_length
        if len(ids) < shortest:
            counts.short_documents += 1
            counts.longest_short = max(counts.longest_short, len(ids))
            return
        counts.documents += first == 0
        for begin in range(first * length, len(ids), length):
            if len(ids) - begin < shortest:
                counts.short_windows += 1
                return
            counts.windows += 1
            key = stable_hash(f"{document.name}:{begin}") - 2**63
            part = slice(begin, begin + length)
            yield Example(key, ids[part], None if weight is None else weight[part])


# --- The stream: one or two sources, shuffled, shared among ranks, batched


class DataStream:
    """Batches of windows: without end in training, once through for held-out text.

    All ranks read the same sequence of windows and each takes every ``world_size``-th, so the sequence does
    not depend on their number, and a position saved by one rank serves any number of them. The price is that
    each rank tokenises everything. Where the held-out windows do not fill the last round, the first ones
    are given again, so that every rank gets the same number of batches; equal ``keys`` tell.
    """

    def __init__(
        self,
        readers: list[_Reader],
        config: DataConfig,
        pad_id: int,
        *,
        endless: bool,
        rank: int,
        world_size: int,
    ):
        if not 0 <= rank < world_size:
            raise DataError(
                f"rank is {rank}; allowed: 0 to {world_size - 1}, below world_size = {world_size}"
            )
        for reader in readers:
            reader.check()
        self.pad_id = pad_id
        files = [path for reader in readers for path in reader.source.files]
        self._contents = contents_of(files) if endless else {}
        self._readers = readers
        self._config = config
        self._endless = endless
        self._rank, self._world_size = rank, world_size
        self._go_to([_Place()] * len(readers))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches of ``batch_size`` windows of this rank. Training goes on from the position; held-out text
        begins anew, and its last batch may be smaller."""
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; allowed: 1 or more")
        examples = self.examples()
        while chosen := list(itertools.islice(examples, batch_size)):
            yield collate(chosen, self.pad_id)

    def examples(self) -> Iterator[Example]:
        """The windows of this rank, one by one; see ``batches``."""
        if not self._endless:
            self._go_to([_Place()] * len(self._readers))
        refill: list[Example] = []
        while block := self._current_block():
            if not self._endless:
                refill += block[: self._world_size - len(refill)]
            while self._taken < len(block):
                example, number = block[self._taken], self._before + self._taken
                self._taken += 1
                if number % self._world_size == self._rank:
                    yield example
            self._finish_block()
        last_round = -(-self._before // self._world_size) * self._world_size
        for number in range(self._before, last_round):
            if number % self._world_size == self._rank:
                yield refill[(number - self._before) % len(refill)]

    def state_dict(self) -> dict[str, Any]:
        """The position, for JSON: what ``batches`` would give next, on every rank."""
        # a round that this rank has taken from is taken by all
        rounds = -(-(self._before + self._taken) // self._world_size)
        return {
            "settings": self._settings(),
            "places": [list(place) for place in self._block_start],
            "before": self._before,
            "taken": rounds * self._world_size - self._before,
            "counts": asdict(self._counts_at_start),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that ``state_dict`` gave, of a stream with the same source and settings."""
        compare_position(self._settings(), state["settings"])
        places = [_Place(*place) for place in state["places"]]
        numbers = [*(number for place in places for number in place), state["before"], state["taken"]]
        if len(places) != len(self._readers) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError(f"{state['places']} is no place in {len(self._readers)} sources")
        for place, reader in zip(places, self._readers):
            if reader.source.units is not None and place.unit > reader.source.units:
                raise ValueError(
                    f"unit {place.unit} of {reader.source.name}, which has {reader.source.units}"
                )
        self._go_to(places, state["before"], state["taken"], DataCounts(**state["counts"]))

    def _settings(self) -> dict[str, Any]:
        """What the sequence of windows depends on."""
        config = self._config
        return {
            "dataset_name_or_path": Path(config.dataset_name_or_path or _DEFAULT).name,
            "number of units in the dataset": [reader.source.units for reader in self._readers],
            "content of the dataset": self._contents,
            "text_column": config.text_column,
            "max_length": config.max_length,
            "min_length": config.min_length,
            "shuffle_buffer": config.shuffle_buffer,
            "eval_fraction": config.eval_fraction if config.eval_dataset_name_or_path is None else 0,
            "recall_weight": config.recall_weight,
            "answers_column": config.answers_column,
            "add_bos_token": config.add_bos_token,
            "seed": config.seed,
        }

    def _go_to(
        self, places: list[_Place], before: int = 0, taken: int = 0, counts: DataCounts | None = None
    ) -> None:
        self.counts = counts = counts or DataCounts()  # up to one block ahead of what was taken
        self._places = places  # behind the last window that was read
        self._block_start, self._counts_at_start = list(places), replace(counts)
        self._before = before  # windows in the blocks before this one
        self._taken = taken  # windows of this block that were taken, by any rank
        self._block: list[Example] | None = None
        self._streams = [
            reader.read(place, counts, endless=self._endless) for reader, place in zip(self._readers, places)
        ]

    def _current_block(self) -> list[Example]:
        """The shuffled block, read now if it has not been; empty at the end. It ends where an epoch does, so
        that no window comes twice before all have come once."""
        if self._block is None:
            self._block = []
            ends = 0
            while len(self._block) < self._config.shuffle_buffer:
                example = self._read_one(self._before + len(self._block))
                if example is not None:
                    self._block.append(example)
                elif self._block or not self._endless:
                    break
                elif (ends := ends + 1) > 1:
                    raise DataError(
                        f"nothing is left of {self._readers[0].source.name}: it changed meanwhile"
                    )
            if self._config.shuffle_buffer > 1:
                random.Random(f"block/{self._config.seed}/{self._before}").shuffle(self._block)
        return self._block

    def _read_one(self, number: int) -> Example | None:
        """Window ``number`` of the stream; in a mixture, the second source's are spread evenly."""
        weight = self._config.recall_weight if len(self._readers) == 2 else 0
        which = int((number + 1) * weight) - int(number * weight)
        example, self._places[which] = next(self._streams[which], (None, self._places[which]))
        return example

    def _finish_block(self) -> None:
        self._before += len(self._block)
        self._taken -= len(self._block)
        self._block = None
        self._block_start, self._counts_at_start = list(self._places), replace(self.counts)


def compare_position(now: dict[str, Any], saved: dict[str, Any]) -> None:
    """Whether a saved position is one in what is read now; earlier versions noted less.

    Raises:
        DataError: it is not; the first difference is named.
    """
    for name, value in now.items():
        then = saved.get(name, value)
        if then == value:
            continue
        if isinstance(value, dict) and isinstance(then, dict):
            file = next(key for key in [*value, *then] if value.get(key) != then.get(key))
            raise DataError(
                f"{file} has changed since the position to resume from was saved: it is "
                f"{value.get(file, 'not there')}, and was {then.get(file, 'not there')}"
            )
        raise DataError(f"{name} is {value!r}, but the position to resume from was saved with {then!r}")


def collate(examples: list[Example], pad_id: int) -> Batch:
    """Pad on the right to the longest."""
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(examples), width, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.from_numpy(example.input_ids)
        attention_mask[row, :length] = 1
    keys = torch.tensor([example.key for example in examples])
    if all(example.weight is None for example in examples):
        return Batch(input_ids, attention_mask, keys)
    weight = attention_mask.float()
    for row, example in enumerate(examples):
        if example.weight is not None:
            weight[row, : len(example.weight)] = torch.from_numpy(example.weight)
    return Batch(input_ids, attention_mask, keys, weight)


# --- The two streams of a run


def training_stream(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world_size: int = 1
) -> DataStream:
    """The endless stream to train on. Raises ``DataError`` when anything is wrong with the data."""
    encode = Encoder(tokenizer, config.add_bos_token)
    name = config.dataset_name_or_path or _DEFAULT
    split_by_hash = config.eval_dataset_name_or_path is None

    def keep(document: Document, is_first: bool) -> bool:
        return not (split_by_hash and _belongs_to_held_out(document, is_first, config))

    if name in BUILT_IN:
        sources = [_built_in(part, config, "train", encode) for part in name.split("+")]
        readers = [_Reader(source, encode, config, _keep_all) for source in sources]
    else:
        readers = [_Reader(_open(config, "dataset_name_or_path"), encode, config, keep)]
    if config.weighs_answers:
        _check_answers(readers, config)
    return DataStream(readers, config, encode.pad_id, endless=True, rank=rank, world_size=world_size)


def held_out_stream(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world_size: int = 1
) -> DataStream | None:
    """The text to measure on, never trained on: ``eval_dataset_name_or_path``; else what is held out of the
    training source. None where nothing is: ``eval_fraction`` is 0, or no document's hash falls below it.

    The default text has its own held-out documents, which serve its mixtures too; "recall" and "needles" have 64
    each of their own. All tokens count alike. The windows and their order do not depend on ``seed``.
    """
    encode = Encoder(tokenizer, config.add_bos_token)
    config = replace(config, seed=0, answer_weight=1.0, context_weight=1.0)
    given = config.eval_dataset_name_or_path
    name = given or config.dataset_name_or_path or _DEFAULT

    def keep(document: Document, is_first: bool) -> bool:
        return given is not None or _belongs_to_held_out(document, is_first, config)

    if name in BUILT_IN:
        reader = _Reader(_built_in(name.split("+")[0], config, "held_out", encode), encode, config, _keep_all)
    elif given is None and config.eval_fraction == 0:
        return None
    else:
        setting = "dataset_name_or_path" if given is None else "eval_dataset_name_or_path"
        reader = _Reader(_open(config, setting), encode, config, keep)
    try:
        return DataStream([reader], config, encode.pad_id, endless=False, rank=rank, world_size=world_size)
    except _NothingLeft as error:
        if given is not None:
            raise
        logger.warning("nothing is held out to measure on: %s; %s", error, NAME_HELD_OUT)
        return None


def _open(config: DataConfig, setting: str) -> Source:
    return open_source(
        getattr(config, setting),
        setting=setting,
        text_column=config.text_column,
        answers_column=config.answers_column,
        dataset_config=config.dataset_config,
        dataset_split=config.dataset_split,
    )


def _keep_all(document: Document, is_first: bool) -> bool:
    return True


def _belongs_to_held_out(document: Document, is_first: bool, config: DataConfig) -> bool:
    return is_held_out(stable_hash(f"split/{document.name}"), is_first, config.eval_fraction)


def _built_in(name: str, config: DataConfig, split: str, encode: Encoder) -> Source:
    """The source of that name in this package."""
    if name == "recall":
        return RecallText(config.seed, split, recall_chars(encode, config.max_length))
    if name == "needles":
        return NeedleText(config.seed, split, config.max_length - 1, encode.count)  # one is the end of text
    return DefaultText(split)


def _check_answers(readers: list[_Reader], config: DataConfig) -> None:
    """Whether there is anything that answer_weight and context_weight are about."""
    if any(reader.has_answers(_LOOKED_AT) for reader in readers):
        return
    raise DataError(
        f"answer_weight is {config.answer_weight:g} and context_weight {config.context_weight:g}, but the first "
        f"documents of {readers[-1].source.name} mark no answers: name their answers_column, or train on needles "
        "or recall"
    )


def recall_chars(encode: Callable[[str], np.ndarray], max_length: int) -> int:
    """Characters of a recall document that fills most of a window, so that its questions are in it.

    Formats and passages differ by half in characters a token: of eight documents the mean may be a sixth off.
    """
    sample = [recall_document(0, index).text for index in range(64)]
    return int(0.85 * max_length * sum(map(len, sample)) / sum(len(encode(text)) for text in sample))
