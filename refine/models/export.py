"""``python -m refine.models.export``: a checkpoint as weights of another precision, with its tokenizer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from refine.models.loading import load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Load, round, save; refuses to write into a folder that holds a model already."""
    parser = argparse.ArgumentParser(prog="python -m refine.models.export", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    options = parser.parse_args(arguments)
    folder = Path(options.output_dir)
    if (folder / "config.json").exists():
        print(f"export: output_dir {options.output_dir!r} holds a model already", file=sys.stderr)
        return 2
    try:
        model = load_model(options.model, dtype=DTYPES[options.dtype])
    except (ValueError, FileNotFoundError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size:.1f} MB in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
