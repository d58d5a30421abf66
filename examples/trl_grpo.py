"""GRPO with TRL on a fast-weight model: whole completions, any reward function.

    pip install trl
    python examples/trl_grpo.py

Here a completion is rewarded for closing the brackets that its prompt has opened. Prompts of different lengths are
padded on the left and completions on the right; neither reaches a fast weight. For rewards of a few tokens against
the true continuation, from a prefix that all rollouts share, use ``refine.refine_step`` or ``RefineTrainer``.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import refine

PACKAGED = Path(refine.__file__).parent / "assets" / "tiny-delta-net"
PROMPTS = [
    "print(len(",
    "x = sum([1, 2, ",
    "def area(width, height):\n    return (width * (height",
    "for name in sorted(set(names",
]


def closed_brackets(prompts: list[str], completions: list[str], **_) -> list[float]:
    """1 when a completion closes all that its prompt has opened, else the share it closes."""
    rewards = []
    for prompt, completion in zip(prompts, completions):
        opened = sum(prompt.count(o) - prompt.count(c) for o, c in ("()", "[]"))
        closed = sum(completion.count(c) - completion.count(o) for o, c in ("()", "[]"))
        rewards.append(max(0.0, 1.0 - abs(opened - closed) / opened))
    return rewards


def main(arguments: list[str] | None = None) -> GRPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(PACKAGED), help="a folder or a hub name")
    parser.add_argument("--output_dir", default="runs/trl-grpo")
    parser.add_argument("--max_steps", type=int, default=20)
    options = parser.parse_args(arguments)

    trainer = GRPOTrainer(
        refine.load_model(options.model, dtype="float32"),
        reward_funcs=closed_brackets,
        args=GRPOConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=8,
            learning_rate=3e-4,
            beta=0.01,  # the reference model is loaded from the same place
            logging_steps=2,
            save_strategy="no",
            report_to=[],
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    print("reward:", " -> ".join(f"{reward:.2f}" for reward in rewards))
    return trainer


if __name__ == "__main__":
    main()
