"""How the tiny model's tokenizer was made: a byte-level BPE of the default text and of recall documents.

    python -m refine.data.tokenizer --output_dir DIR [--vocab_size 4096]

Digits stand alone, so that a number's tokens do not depend on its neighbours; one special token,
``<|endoftext|>``, begins, ends and pads. The same Python release gives the same file. Any other model brings
a tokenizer of its own, and this module knows nothing of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from refine.data.default_text import default_documents
from refine.data.recall_documents import recall_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_RECALL_DOCUMENTS = 600
_SMALLEST_VOCABULARY = 257  # every byte, and the special token

# A word with the space or sign before it; one digit; signs; line ends and blank lines; an indent.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """The tokenizer of ``vocab_size`` entries (at least 257), trained now: a few seconds."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}; allowed: {_SMALLEST_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _training_text() -> Iterator[str]:
    yield from (document.text for document in default_documents("train"))
    yield from (recall_document(0, index).text for index in range(_RECALL_DOCUMENTS))


def main() -> None:
    """Train the tokenizer and write it into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m refine.data.tokenizer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where tokenizer.json is written")
    parser.add_argument("--vocab_size", type=int, default=4096)
    arguments = parser.parse_args()

    tokenizer = train_tokenizer(arguments.vocab_size)
    tokenizer.save_pretrained(arguments.output_dir)
    held_out = [document.text for document in default_documents("held_out")]
    tokens = sum(len(tokenizer(text, verbose=False)["input_ids"]) for text in held_out)
    size = sum(len(text.encode()) for text in held_out)
    print(f"{len(tokenizer)} entries; {size / tokens:.2f} bytes a token on {size:,} bytes of held-out text")


if __name__ == "__main__":
    main()
