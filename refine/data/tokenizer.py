"""How the tiny model's tokenizer was made: a byte-level BPE of the default text and of recall and needle
documents.

    python -m refine.data.tokenizer --output_dir DIR [--vocab_size 5120]

A number is cut into groups of three digits from its left, and every group of one to three digits is one token:
a number of seven digits is three tokens, of which hardly two are alike, so that each tells what comes next.
One special token, ``<|endoftext|>``, begins, ends and pads. The same Python release gives the same file. Any
other model brings a tokenizer of its own, and this module knows nothing of it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from refine.data.default_text import default_documents
from refine.data.needles import needle_document
from refine.data.recall_documents import recall_document

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_RECALL_DOCUMENTS, _NEEDLE_DOCUMENTS = 600, 200
_CHARACTERS = 4_000  # of a needle document, at the most
_DIGIT_GROUPS = [f"{number:0{digits}}" for digits in (2, 3) for number in range(10**digits)]
_SMALLEST_VOCABULARY = 257 + len(_DIGIT_GROUPS)  # every byte, the special token, and groups of digits

# A word with the space or sign before it; up to three digits; signs; line ends and blank lines; an indent.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(vocab_size: int = 5120) -> PreTrainedTokenizerFast:
    """The tokenizer of ``vocab_size`` entries (at least 1,357), trained now: a few seconds."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}; allowed: {_SMALLEST_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))  # a piece that is an entry is that token
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_DIGIT_GROUPS),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((re.sub(r"\d+", "", text) for text in _training_text()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_entries(tokenizer, _DIGIT_GROUPS),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _with_entries(tokenizer: Tokenizer, pieces: list[str]) -> Tokenizer:
    """The tokenizer with these ASCII pieces as further entries, to which no merge leads."""
    description = json.loads(tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary.update({piece: number for number, piece in enumerate(pieces, len(vocabulary))})
    return type(tokenizer).from_str(json.dumps(description))


def _training_text() -> Iterator[str]:
    yield from (document.text for document in default_documents("train"))
    yield from (recall_document(0, index).text for index in range(_RECALL_DOCUMENTS))
    for index in range(_NEEDLE_DOCUMENTS):
        yield needle_document(0, index, _CHARACTERS, count=len, most_questions=8).text


def main() -> None:
    """Train the tokenizer and write it into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m refine.data.tokenizer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where tokenizer.json is written")
    parser.add_argument("--vocab_size", type=int, default=5120)
    arguments = parser.parse_args()

    tokenizer = train_tokenizer(arguments.vocab_size)
    tokenizer.save_pretrained(arguments.output_dir)
    held_out = [document.text for document in default_documents("held_out")]
    tokens = sum(len(tokenizer(text, verbose=False)["input_ids"]) for text in held_out)
    size = sum(len(text.encode()) for text in held_out)
    print(f"{len(tokenizer)} entries; {size / tokens:.2f} bytes a token on {size:,} bytes of held-out text")


if __name__ == "__main__":
    main()
