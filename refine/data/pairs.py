"""(prompt, answer) pairs for post-training: from files, or generated; in an order that a seed decides.

All pairs are read and tokenised once, when the stream is made, so whatever is wrong with a row is said before
any training. Nothing is known here of models or of what is done with a pair.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from refine.data.document import BadRow, DataError, cut_middle, is_held_out, stable_hash
from refine.data.recall_documents import recall_items
from refine.data.rows import ROW_KINDS, all_rows, first_line, is_file_of_rows, split_of
from refine.data.stream import (
    NAME_HELD_OUT,
    DataConfig,
    DataCounts,
    Example,
    collate,
    compare_position,
    recall_chars,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

__all__ = ["PairBatch", "PairColumns", "PairStream", "held_out_pairs", "training_pairs"]

GENERATED = (None, "default", "recall", "default+recall")
_ITEMS = {"train": 256, "held_out": 64}  # of the generated set
_QUESTION = (
    "Answer the question based on the given passages. "
    "Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class PairColumns:
    """Where a file keeps its pairs; with ``passages`` the prompt is made of passages and a question."""

    prompt: str = "prompt"
    answer: str = "answer"
    question: str = "question"
    passages: str | None = None
    lengths: tuple[int, ...] = ()  # only rows whose max_seq_length is one of these; (): all

    @property
    def needed(self) -> tuple[str, ...]:
        first = (self.prompt,) if self.passages is None else (self.passages, self.question)
        return (*first, self.answer)


class Pair(NamedTuple):
    """A prompt and the answer to learn, with end-of-text behind it unless ``answer_eos`` is off."""

    key: int  # int64: a hash of the source's name and the row's number
    prompt: np.ndarray  # [P] int32
    answer: np.ndarray  # [A] int32


class PairBatch(NamedTuple):
    """Pairs padded on the right: the prompts alone, and the prompts with their answers."""

    input_ids: torch.Tensor  # [B, P] int64, prompts
    attention_mask: torch.Tensor  # [B, P] int64
    keys: torch.Tensor  # [B] int64
    full_ids: torch.Tensor  # [B, P + A] int64, prompts with answers
    full_targets: torch.Tensor  # [B, P + A] int64, the answer token that each position predicts, else -100

    def to(self, device: torch.device | str) -> PairBatch:
        return PairBatch(*(tensor.to(device) for tensor in self))


class PairStream:
    """Batches of pairs, without end or once through; rank r of w takes every w-th, beginning with the r-th."""

    def __init__(
        self,
        pairs: list[Pair],
        config: DataConfig,
        pad_id: int,
        counts: DataCounts,
        *,
        endless: bool,
        rank: int = 0,
        world_size: int = 1,
        collate: Callable[[list, int], Any] | None = None,
    ):
        self.pad_id, self.counts, self._collate = pad_id, counts, collate or _collate
        self._pairs, self._config, self._endless = pairs, config, endless
        arrays = (part for pair in pairs for part in pair if isinstance(part, np.ndarray))
        parts = b"".join(part.tobytes() for part in arrays)
        self._tokens = f"{zlib.crc32(parts):08x}"
        self._rank, self._world_size = rank, world_size
        self._rounds = 0  # pairs that every rank has taken

    def batches(self, batch_size: int) -> Iterator[PairBatch]:
        """Batches of ``batch_size`` pairs of this rank; held-out pairs begin anew."""
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; allowed: 1 or more")
        if not self._endless:
            self._rounds = 0
        rounds = -(-len(self._pairs) // self._world_size)
        while self._endless or self._rounds < rounds:
            count = batch_size if self._endless else min(batch_size, rounds - self._rounds)
            chosen = [self._at((self._rounds + i) * self._world_size + self._rank) for i in range(count)]
            self._rounds += count
            self.counts.windows += count * self._world_size
            yield self._collate(chosen, self.pad_id)

    def state_dict(self) -> dict[str, Any]:
        """The position, for JSON, on any number of ranks."""
        return {"settings": self._settings(), "taken": self._rounds * self._world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that ``state_dict`` gave, of a stream with the same pairs and settings."""
        compare_position(self._settings(), state["settings"])
        if not isinstance(state["taken"], int) or state["taken"] < 0:
            raise ValueError(f"{state['taken']!r} pairs taken")
        self._rounds = -(-state["taken"] // self._world_size)
        self.counts = replace(self.counts, windows=state["taken"])

    def _settings(self) -> dict[str, Any]:
        config = self._config
        return {
            "dataset_name_or_path": Path(config.dataset_name_or_path or "default").name,
            "number of pairs": len(self._pairs),
            "fingerprint of the pairs": stable_hash(repr([pair.key for pair in self._pairs])),
            "tokens of the pairs": self._tokens,
            "max_length": config.max_length,
            "shuffle": config.shuffle_buffer > 1,
            "seed": config.seed,
        }

    def _at(self, number: int) -> Pair:
        """Pair ``number`` of the endless sequence: every epoch in its own order."""
        epoch, place = divmod(number, len(self._pairs))
        order = list(range(len(self._pairs)))
        if self._endless and self._config.shuffle_buffer > 1:
            random.Random(f"pairs/{self._config.seed}/{epoch}").shuffle(order)
        return self._pairs[order[place]]


def training_pairs(
    config: DataConfig,
    columns: PairColumns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> PairStream:
    """The endless stream to train on. Raises ``DataError`` when anything is wrong with the file."""
    pairs, counts, pad_id = _read(config, columns, tokenizer, "train")
    return PairStream(pairs, config, pad_id, counts, endless=True, rank=rank, world_size=world_size)


def held_out_pairs(
    config: DataConfig, columns: PairColumns, tokenizer: PreTrainedTokenizerBase
) -> PairStream | None:
    """The pairs to measure on: of the evaluation file, else held out of the training file; None: none are."""
    config = replace(config, seed=0)
    try:
        pairs, counts, pad_id = _read(config, columns, tokenizer, "held_out")
    except _NoPairs as error:
        if config.eval_dataset_name_or_path is not None:
            raise
        logger.warning("nothing is held out to measure on: %s; %s", error, NAME_HELD_OUT)
        return None
    return PairStream(pairs, config, pad_id, counts, endless=False)


def encoder(
    tokenizer: PreTrainedTokenizerBase, add_bos_token: bool = True
) -> tuple[Callable[..., list[int]], int, int]:
    """``encode(text, special=add_bos_token)`` without an end, the end's id, and the id to pad with."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(f"the tokenizer {tokenizer.name_or_path!r} has no eos_token to end an answer with")

    def encode(text: str, special: bool = add_bos_token) -> list[int]:
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids[:-1] if ids[-1:] == [end] else ids

    return encode, end, end if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class _NoPairs(DataError):
    """The file holds no pair for this split."""


def _read(config, columns, tokenizer, split: str) -> tuple[list[Pair], DataCounts, int]:
    """All pairs of a split, what was left out, and the id to pad with."""
    encode, end, pad_id = encoder(tokenizer, config.add_bos_token)
    counts = DataCounts()
    given = config.eval_dataset_name_or_path if split == "held_out" else None
    name = given or config.dataset_name_or_path
    if name in GENERATED:
        source, texts = "the generated pairs", enumerate(generated_pairs(config, encode, split), 1)
    else:
        source, texts = str(name), _from_file(Path(name).expanduser(), config, columns, encode, counts)
    divided = given is None and config.eval_dataset_name_or_path is None and name not in GENERATED
    pairs = []
    for number, (prompt, answer) in texts:
        key = stable_hash(f"{Path(source).name}:{number}")
        if divided and is_held_out(key, number == 1, config.eval_fraction) != (split == "held_out"):
            continue
        try:
            ids, reply = encode(prompt), encode(answer_after(prompt, answer), special=False)
        except (TypeError, ValueError, OverflowError) as error:  # lone surrogates, say
            where = f"row {number} of {source}: the tokenizer refuses it ({first_line(error)})"
            counts.note(BadRow(lambda where=where: where))
            continue
        if len(ids) < config.min_length:
            counts.short_documents += 1
            counts.longest_short = max(counts.longest_short, len(ids))
            continue
        counts.cut_prompts += len(ids) > config.max_length
        ids = cut_middle(ids, config.max_length)
        reply = [*reply, end] if config.answer_eos else reply
        pairs.append(Pair(key - 2**63, np.asarray(ids, np.int32), np.asarray(reply, np.int32)))
    counts.documents = len(pairs)
    if not pairs:
        short = f"; {counts.short_documents} prompts are shorter than min_length={config.min_length}"
        raise _NoPairs(
            f"{source} holds no pair to {'train on' if split == 'train' else 'measure on'}: "
            f"{counts.bad_rows} bad rows" + (short if counts.short_documents else "")
        )
    return pairs, counts, pad_id


def answer_after(prompt: str, answer: str) -> str:
    """The answer with a space before it where neither text has one."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def generated_pairs(config: DataConfig, encode: Callable, split: str) -> Iterator[tuple[str, str]]:
    """Recall questions over the project's default text, of most of ``max_length`` tokens."""
    seed = config.seed if split == "train" else 0
    chars = recall_chars(encode, config.max_length)
    for item in recall_items(seed, _ITEMS[split], chars, split=split):
        yield item.prompt, item.answer


def _from_file(
    path: Path, config: DataConfig, columns: PairColumns, encode: Callable, counts: DataCounts
) -> Iterator[tuple[int, tuple[str, str]]]:
    """(row number from 1, (prompt, first answer)) of the good rows."""
    good = []

    def leave_out(number: int, reason: str) -> None:
        counts.note(BadRow(lambda: f"row {number} of {path}: {reason}"))

    rows = [row for file in _files_of(path) for row in all_rows(file)]
    present = {name for row in rows if isinstance(row, dict) for name in row}
    missing = [name for name in columns.needed if name not in present]
    if missing and present:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(sorted(present))}")
    for number, row in enumerate(rows, 1):
        if isinstance(row, BadRow):
            leave_out(number, row.reason)
            continue
        if columns.lengths and row.get("max_seq_length") not in columns.lengths:
            continue
        value = row.get(columns.answer)
        answers = value if isinstance(value, list) else [value]
        answer = next((text for text in answers if isinstance(text, str) and text.strip()), None)
        asked = row.get(columns.prompt if columns.passages is None else columns.question)
        if answer is None:
            leave_out(number, f"no answer in column {columns.answer!r}")
        elif not isinstance(asked, str) or not asked.strip():
            leave_out(number, "no prompt" if columns.passages is None else "no question")
        elif columns.passages is None:
            good.append((number, asked, answer, ()))
        elif passages := _texts(row.get(columns.passages)):
            good.append((number, asked, answer, passages))
        else:
            leave_out(number, f"no passage in column {columns.passages!r}")
    if columns.passages is None:
        yield from ((number, (prompt, answer)) for number, prompt, answer, _ in good)
        return
    pool = list(dict.fromkeys(text for *_, passages in good for text in passages))
    cost = {text: len(encode(f"Document 1000:\n{text}\n\n")) for text in pool}
    for number, question, answer, passages in good:
        rng = random.Random(f"qa/{config.seed}/{number}")
        yield number, (_question_over(question, passages, pool, cost, encode, config.max_length, rng), answer)


def _files_of(path: Path) -> list[Path]:
    """A file, or those of a folder whose names do not say that they are to test on."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if is_file_of_rows(file))
        if not (chosen := [file for file in files if split_of(file) != "test"]):
            raise DataError(
                f"the folder {str(path)!r} holds no file of rows to train on ({', '.join(ROW_KINDS)})"
            )
        return chosen
    if not path.is_file():
        raise DataError(f"dataset_name_or_path: there is no file {str(path)!r}")
    if not is_file_of_rows(path):
        raise DataError(f"pairs are read from {', '.join(ROW_KINDS)} files, got {str(path)!r}")
    return [path]


def _question_over(question, passages, pool, cost, encode, budget: int, rng: random.Random) -> str:
    """RULER's QA prompt: the passages of the question among those of others, shuffled, within the budget."""
    chosen = list(dict.fromkeys(passages))
    room = budget - len(encode(_qa_prompt(question, []))) - sum(cost[text] for text in chosen)
    own = set(chosen)
    for text in rng.sample(pool, len(pool)):
        if text not in own and cost[text] <= room:
            room -= cost[text]
            chosen.append(text)
    rng.shuffle(chosen)
    return _qa_prompt(question, chosen)


def _qa_prompt(question: str, documents: list[str]) -> str:
    """As in the public RULER QA files, which say passages where RULER itself says documents."""
    context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
    return (
        f"{_QUESTION}\n\nThe following are given passages.\n{context}\n\n{_QUESTION}\n\n"
        f"Question: {question}\nAnswer:"
    )


def _texts(value: Any) -> list[str]:
    return [
        text
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str) and text.strip()
    ]


def _collate(pairs: list[Pair], pad_id: int) -> PairBatch:
    """Pad the prompts, and the prompts with answers, on the right."""
    prompts = collate([Example(pair.key, pair.prompt) for pair in pairs], pad_id)
    full = collate([Example(pair.key, np.concatenate([pair.prompt, pair.answer])) for pair in pairs], pad_id)
    targets = torch.full_like(full.input_ids, -100)
    for row, pair in enumerate(pairs):
        first = len(pair.prompt) - 1  # the prompt's last position predicts the answer's first token
        targets[row, first : first + len(pair.answer)] = torch.from_numpy(pair.answer).long()
    return PairBatch(*prompts[:3], full.input_ids, targets)
