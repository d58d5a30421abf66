"""GRPO without TRL: the package's tiny model learns to close brackets in the right order, by reward alone.

A verifiable task: a prompt opens two to four brackets; a completion is rewarded for closing them, innermost first.
``python -m refine.train --phase grpo`` reads each prompt once for all its completions; see OUTPUT_DIR/reward.png.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from refine import train

PAIRS = {"(": ")", "[": "]", "{": "}"}
NAMES = [
    "a",
    "data",
    "index",
    "items",
    "key",
    "left",
    "name",
    "path",
    "result",
    "size",
    "text",
    "value",
    "x",
    "y",
]


def closed(prompts: list[str], completions: list[str], **_) -> list[float]:
    """The share of the prompt's open brackets that the completion closes in order, up to its first fault."""
    rewards = []
    for prompt, completion in zip(prompts, completions):
        wanted = [PAIRS[c] for c in prompt if c in PAIRS][::-1]
        done = 0
        for c in completion:
            if done == len(wanted) or c in PAIRS or (c in PAIRS.values() and c != wanted[done]):
                break
            done += c in PAIRS.values()
        rewards.append(done / len(wanted))
    return rewards


def make_prompts(count: int, seed: int) -> list[dict[str, str]]:
    """``size = (width, [x, {key`` and the like."""
    rng = random.Random(seed)

    def one() -> str:
        opened = (f"{rng.choice('([{')}{rng.choice(NAMES)}" for _ in range(rng.randint(2, 4)))
        return f"{rng.choice(NAMES)} = {', '.join(opened)}"

    return [{"prompt": one()} for _ in range(count)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default="runs/close-brackets")
    parser.add_argument("--max_steps", type=int, default=60)
    options = parser.parse_args(arguments)
    data = options.output_dir.with_name(f"{options.output_dir.name}-prompts")
    data.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", 256, 1), ("held_out", 32, 2)):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, make_prompts(count, seed))))
    sys.path.insert(0, str(Path(__file__).parent))  # where the reward is imported from
    settings = {
        "phase": "grpo", "reward_funcs": "close_brackets:closed", "num_generations": 16,
        "dataset_name_or_path": data / "train.jsonl", "eval_dataset_name_or_path": data / "held_out.jsonl",
        "max_completion_length": 6, "per_device_train_batch_size": 8, "learning_rate": 3e-4, "max_grad_norm": 1.0,
        "max_length": 64, "max_steps": options.max_steps, "eval_steps": 20, "eval_samples": 32, "save_steps": 0,
        "output_dir": options.output_dir, "overwrite_output_dir": True,
    }  # fmt: skip
    return train.main([part for name, value in settings.items() for part in (f"--{name}", str(value))])


if __name__ == "__main__":
    sys.exit(main())
