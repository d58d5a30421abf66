"""Train a fast-weight model on a text of your own with next-sequence prediction, and look at what it learnt.

    python examples/own_text.py my_book.txt                 # the small model of this package, on a CPU
    python examples/own_text.py my_book.txt --steps 200 --length 1024

Every step reads some windows of the text once. Where the model is least certain, it writes a few tokens of its own;
they are rewarded by how close they come to what the text says there.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import refine

PACKAGED = Path(refine.__file__).parent / "assets" / "tiny-delta-net"


def windows(ids: list[int], length: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """[batch, length]: places of the text at random."""
    starts = torch.randint(len(ids) - length + 1, (batch,), generator=generator).tolist()
    return torch.tensor([ids[start : start + length] for start in starts])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default=PACKAGED, help="a folder or a hub name")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--output_dir", type=Path, help="save the model here")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < options.length:
        sys.exit(f"{options.text} has {len(ids)} tokens: give a longer text, or --length at most that")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = refine.load_model(options.model, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    config = refine.RefineConfig(num_chunks=4, num_rollouts=2, reward="cosine")
    generator = torch.Generator().manual_seed(0)

    for step in range(1, options.steps + 1):
        batch = windows(ids, options.length, options.batch, generator).to(device)
        output = refine.refine_step(model, batch, config, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"step {step}: next-token loss {output.ntp_loss:.3f}, reward {output.rewards.mean():.3f}")

    best = output.rewards.flatten().argmax().item()
    row, chunk, rollout = torch.unravel_index(torch.tensor(best), output.rewards.shape)
    place = int(output.positions[row, chunk])
    print(f"\nthe text  : {tokenizer.decode(batch[row, place - 20 : place + config.rollout_length])!r}")
    print(f"the model : ...{tokenizer.decode(output.rollouts[row, chunk, rollout])!r}")
    if options.output_dir is not None:
        model.save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
