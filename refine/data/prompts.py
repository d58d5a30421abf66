"""Prompts to complete, with whatever else stands in their rows, for training by reward.

All prompts are read and tokenised once, when the stream is made, and come in an order that a seed decides. Nothing
is known here of models or of what is done with a prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np
import torch

from refine.data.document import BadRow, DataError, cut_middle, is_held_out, stable_hash
from refine.data.pairs import GENERATED, PairStream, encoder, generated_pairs
from refine.data.rows import all_rows, first_line
from refine.data.stream import NAME_HELD_OUT, DataConfig, DataCounts, Example, collate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

__all__ = ["PromptBatch", "held_out_prompts", "training_prompts"]


class Prompt(NamedTuple):
    """A prompt and its row."""

    key: int  # int64: a hash of the source's name and the row's number
    ids: np.ndarray  # [P] int32
    text: str
    given: str | list[dict[str, str]]  # as its row has it: a text, or the messages of a chat
    columns: dict[str, Any]  # the row without its prompt


class PromptBatch(NamedTuple):
    """Prompts padded on the right, their text and their rows' other columns."""

    input_ids: torch.Tensor  # [B, P] int64
    attention_mask: torch.Tensor  # [B, P] int64
    keys: torch.Tensor  # [B] int64
    texts: list[str]
    columns: dict[str, list[Any]]  # a list of B values each; None where a row has no such column
    given: list[str | list[dict[str, str]]] | None = None  # texts, or chats that became texts

    @property
    def prompts(self) -> list[str | list[dict[str, str]]]:
        """The prompts as rewards get them: texts, or the messages of a chat."""
        return self.texts if self.given is None else self.given

    def to(self, device: torch.device | str) -> PromptBatch:
        return PromptBatch(*(tensor.to(device) for tensor in self[:3]), *self[3:])


def training_prompts(
    config: DataConfig, column: str, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world_size: int = 1
) -> PairStream:
    """The endless stream of prompts to train on. Raises ``DataError`` when anything is wrong with the file."""
    prompts, counts, pad_id = _read(config, column, tokenizer, "train")
    if not prompts:
        raise DataError(
            f"{config.dataset_name_or_path} holds no prompt to train on: {counts.bad_rows} bad rows"
        )
    return PairStream(
        prompts, config, pad_id, counts, endless=True, rank=rank, world_size=world_size, collate=_collate
    )


def held_out_prompts(
    config: DataConfig, column: str, tokenizer: PreTrainedTokenizerBase
) -> PairStream | None:
    """The prompts to measure on: of the evaluation file, else held out of the training file; None: none are."""
    config = replace(config, seed=0)
    prompts, counts, pad_id = _read(config, column, tokenizer, "held_out")
    if prompts:
        return PairStream(prompts, config, pad_id, counts, endless=False, collate=_collate)
    if config.eval_dataset_name_or_path is not None:
        raise DataError(f"{config.eval_dataset_name_or_path} holds no prompt: {counts.bad_rows} bad rows")
    logger.warning("nothing is held out to measure on; %s", NAME_HELD_OUT)
    return None


def _read(config: DataConfig, column: str, tokenizer, split: str) -> tuple[list[Prompt], DataCounts, int]:
    encode, _, pad_id = encoder(tokenizer, config.add_bos_token)
    counts = DataCounts()
    given = config.eval_dataset_name_or_path if split == "held_out" else None
    name = given or config.dataset_name_or_path
    if name in GENERATED:
        source, rows = "the generated pairs", _generated(config, encode, split)
    else:
        source, rows = str(name), _from_file(Path(name).expanduser(), column, counts)
    divided = given is None and config.eval_dataset_name_or_path is None and name not in GENERATED
    prompts: list[Prompt] = []
    for number, given_prompt, columns in rows:
        key = stable_hash(f"{Path(source).name}:{number}")
        if divided and is_held_out(key, number == 1, config.eval_fraction) != (split == "held_out"):
            continue
        try:
            text, is_chat = _as_text(given_prompt, tokenizer)
            ids = encode(text, False) if is_chat else encode(text)
        except DataError:
            raise
        except (TypeError, ValueError, OverflowError) as error:  # lone surrogates, say
            _leave_out(counts, number, source, f"the tokenizer refuses it ({first_line(error)})")
            continue
        if len(ids) < config.min_length:
            counts.short_documents += 1
            continue
        counts.cut_prompts += len(ids) > config.max_length
        ids = cut_middle(ids, config.max_length)
        prompts.append(Prompt(key - 2**63, np.asarray(ids, np.int32), text, given_prompt, columns))
    counts.documents = len(prompts)
    return prompts, counts, pad_id


def _generated(config: DataConfig, encode: Callable, split: str) -> Iterator[tuple[int, str, dict]]:
    """Recall questions over the project's default text, each with its ``answer``."""
    for number, (prompt, answer) in enumerate(generated_pairs(config, encode, split), 1):
        yield number, prompt, {"answer": answer}


def _from_file(path: Path, column: str, counts: DataCounts) -> Iterator[tuple[int, str, dict]]:
    """(row number from 1, prompt, other columns) of the good rows."""
    if not path.is_file():
        raise DataError(f"dataset_name_or_path: there is no file {str(path)!r}")
    names: set[str] = set()
    good = []
    for number, row in enumerate(all_rows(path), 1):
        if isinstance(row, BadRow):
            fault = row.reason
        else:
            names |= row.keys()
            text = row.get(column)
            fault = None if _is_prompt(text) else f"no text and no messages in column {column!r}"
        if fault is None:
            good.append((number, text, {name: value for name, value in row.items() if name != column}))
        else:
            _leave_out(counts, number, path, fault)
    if names and column not in names:
        raise DataError(f"{path} has no column {column!r}; it has {', '.join(sorted(names))}")
    yield from good


def _is_prompt(given: Any) -> bool:
    """Whether it is a text, or the messages of a chat."""
    if isinstance(given, str):
        return bool(given.strip())
    return (
        isinstance(given, list)
        and bool(given)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in given
        )
    )


def _as_text(given: str | list[dict[str, str]], tokenizer) -> tuple[str, bool]:
    """The text of a prompt; messages by the tokenizer's chat template, up to where the answer begins."""
    if isinstance(given, str):
        return given, False
    if tokenizer.chat_template is None:
        raise DataError("prompts are messages, but the tokenizer has no chat template: give them as texts")
    try:
        return tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True), True
    except jinja2.TemplateError as error:  # roles in an order that the template refuses
        raise ValueError(f"chat template: {first_line(error)}") from error


def _leave_out(counts: DataCounts, number: int, source: str | Path, fault: str) -> None:
    counts.note(BadRow(lambda: f"row {number} of {source}: {fault}"))


def _collate(prompts: list[Prompt], pad_id: int) -> PromptBatch:
    padded = collate([Example(prompt.key, prompt.ids) for prompt in prompts], pad_id)
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    texts = [prompt.text for prompt in prompts]
    given = [prompt.given for prompt in prompts]
    return PromptBatch(padded.input_ids, padded.attention_mask, padded.keys, texts, columns, given)
