"""The script ``refine``: one word chooses the command, and only what that command needs is imported."""

from __future__ import annotations

import importlib
import sys

import refine
from refine.mistakes import nearest

# command -> its module, the module with the function parse_settings that answers --help, and what it does
COMMANDS = {
    "train": (
        "refine.train",
        "refine.training.settings",
        "train a model with REFINE, or with the next-token loss",
    ),
    "eval": (
        "refine.eval",
        "refine.evaluation.settings",
        "evaluate a model: needles, LongBench, recall, held-out text",
    ),
    "reproduce": (
        "refine.reproduce",
        None,
        "run rows of the paper's tables and print them beside its numbers",
    ),
    "report": ("refine.report", None, "make one page of one or several runs, to look at in a browser"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status, 2 where there is no such command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    word, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if word in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if word in ("-V", "--version"):
        print(f"refine {refine.__version__}")
        return 0
    if word not in COMMANDS:
        print(f"refine: there is no command {word!r}{_meant(word)}", file=sys.stderr)
        return 2
    answer_help(word, rest)
    return importlib.import_module(COMMANDS[word][0]).main(rest)


def answer_help(command: str, arguments: list[str]) -> None:
    """Answer ``--help`` of a command, where it is asked for, without what a run imports.

    Raises:
        SystemExit: it was asked for.
    """
    settings = COMMANDS[command][1]
    if settings is not None and {"-h", "--help"} & set(arguments):
        importlib.import_module(settings).parse_settings(["--help"])


def _usage() -> str:
    lines = [f"  {name:<11} {about}" for name, (_, _, about) in COMMANDS.items()]
    return "\n".join(
        (
            f"refine {refine.__version__}: reinforced fast weights (arXiv 2602.16704)",
            "",
            "usage: refine COMMAND [--config FILE] [--NAME VALUE ...]",
            "",
            *lines,
            "",
            "refine COMMAND --help shows a command's settings. A first run, in under two minutes: refine train",
        )
    )


def _meant(word: str) -> str:
    if word.startswith("-"):
        return f": a command stands first, as in refine train {word}"
    synonyms = {"evaluate": "eval", "evaluation": "eval", "finetune": "train", "fit": "train", "run": "train"}
    if word in synonyms:
        return f": did you mean {synonyms[word]!r}?"
    return nearest(word, COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
