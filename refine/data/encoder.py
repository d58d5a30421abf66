"""From a document to its tokens, with its end, and to which of them belong to answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from refine.data.document import DataError, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """Turns documents into tokens.

    Args:
        tokenizer: of the model.
        add_special_tokens: begin with what the tokenizer puts at a beginning.

    Raises:
        DataError: the tokenizer has nothing to pad with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = True):
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad_id is None:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} has neither a pad_token nor an eos_token; "
                f"name one of them in its tokenizer_config.json"
            )
        self.pad_id = pad_id
        self._tokenizer, self._special = tokenizer, add_special_tokens

    def __call__(self, text: str) -> np.ndarray:
        """The tokens of a whole document, with its end: [T] int32."""
        return self._with_end(self._tokens(text)["input_ids"])

    def count(self, text: str) -> int:
        """Tokens of a piece of a document."""
        return len(self._tokens(text, special=False)["input_ids"])

    def with_answers(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [T] int32, whether each has a character of an answer [T] bool).

        Raises:
            DataError: the tokenizer does not say which characters a token has.
        """
        if not self._tokenizer.is_fast:
            raise DataError(
                f"answer_weight needs a fast tokenizer, which knows the characters of its tokens; "
                f"{self._tokenizer.name_or_path!r} is none"
            )
        found = self._tokens(document.text, return_offsets_mapping=True)
        marked = np.zeros(len(document.text) + 1, np.int64)
        for first, behind in document.answers or ():
            marked[first:behind] = 1
        before = np.concatenate([[0], marked.cumsum()])  # marked characters before each
        first, behind = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2).T
        ids = self._with_end(found["input_ids"])
        answers = np.zeros(len(ids), bool)
        answers[: len(first)] = before[behind] > before[first]
        return ids, answers

    def _tokens(self, text: str, special: bool | None = None, **options):
        special = self._special if special is None else special
        return self._tokenizer(
            text, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False,
            verbose=False, **options,
        )  # fmt: skip

    def _with_end(self, ids: list[int]) -> np.ndarray:
        end = self._tokenizer.eos_token_id
        return np.asarray(ids if end is None or ids[-1:] == [end] else [*ids, end], dtype=np.int32)
