"""What an update on n completions of one prompt costs: read once, n times, and by TRL's own trainer.

``python -m benchmarks.prompt_once`` measures the table of docs/prompt_once.md and appends it to
``benchmarks/results/``. Forward and backward of GRPO's loss, without generation and optimizer. The ways take turns
on one thread, each in a process of its own for its memory; times are the processor time of the process, which other
work on the machine changes least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from benchmarks.results import record
from benchmarks.step_cost import MODELS, _status, model_of_the_table
from refine import RefineConfig, branch_logprobs
from refine.method.objective import policy_objective
from refine.models.head import HiddenOnly, TokenLogprob

# P, R, n
SIZES = (
    (4096, 64, 8),
    (1024, 64, 8),
    (4096, 64, 4),
    (2048, 64, 16),
    (4096, 256, 8),
    (512, 512, 8),
)
WAYS = ("once", "separately", "trl", "trl_once")
CONFIG = RefineConfig()


def make_batch(prompt: int, tokens: int, n: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens and advantages."""
    torch.manual_seed(1)
    return {
        "prompt": torch.randint(2, vocabulary, (1, prompt)),
        "completions": torch.randint(2, vocabulary, (1, n, tokens)),
        "advantages": torch.randn(n),
    }


def policy_loss(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """GRPO's, on-policy; logprobs [n, R]."""
    rows = logprobs[:, None, None]
    return policy_objective(rows, rows.detach(), advantages[:, None, None], CONFIG)[0]


def once(model, batch: dict) -> torch.Tensor:
    """The prompt is read once."""
    found = branch_logprobs(model, batch["prompt"], None, batch["completions"], entropy=True)
    return policy_loss(found.logprobs[0], batch["advantages"])


def separately(model, batch: dict) -> torch.Tensor:
    """n rows of prompt and completion, with this package's own fused head on the completions alone."""
    completions = batch["completions"][0]
    n, tokens = completions.shape
    text = torch.cat([batch["prompt"].expand(n, -1), completions], dim=1)
    hidden = model(text[:, :-1], use_cache=False, head=HiddenOnly()).last_hidden_state[:, -tokens:]
    scored = model(hidden_states=hidden, head=TokenLogprob(completions, 1.0, entropy=True))
    return policy_loss(scored.logprob, batch["advantages"])


def of_trl(model, kind: str) -> Callable:
    """The loss of TRL's trainer, its own or the one that reads prompts once, on the same batch."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from refine.integrations.trl_grpo import PromptOnceGRPOTrainer

    core = Tokenizer(WordLevel({f"t{i}": i for i in range(model.config.vocab_size)}, unk_token="t0"))
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none",
        loss_type="grpo", per_device_train_batch_size=8, num_generations=8,
    )  # fmt: skip
    trainer = (GRPOTrainer if kind == "trl" else PromptOnceGRPOTrainer)(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["t1"] * 8}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0", eos_token="t1"),
    )
    trainer.current_gradient_accumulation_steps = 1

    def loss(model, batch: dict) -> torch.Tensor:
        completions = batch["completions"][0]
        prompts = batch["prompt"].expand(len(completions), -1)
        given = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts)}
        given |= {"completion_ids": completions, "completion_mask": torch.ones_like(completions)}
        given |= {"advantages": batch["advantages"], "num_items_in_batch": torch.tensor(completions.numel())}
        return trainer._compute_loss(model, given)

    return loss


def measure_here(way: str, size: tuple[int, int, int], model_name: str, repeats: int) -> dict[str, float]:
    """Median processor seconds of an update, the peak of memory beyond what was resident before, and the loss."""
    model = model_of_the_table(model_name)
    loss_of = {"once": once, "separately": separately}.get(way) or of_trl(model, way)

    def update(batch: dict) -> float:
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss.item()

    update(make_batch(128, 8, size[2], model.config.vocab_size))  # one-time costs do not count
    batch = make_batch(*size, model.config.vocab_size)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the kernel starts its high-water mark anew
    before, seconds = _status("VmRSS"), []
    for _ in range(repeats):
        started = time.process_time()
        update(batch)
        seconds.append(time.process_time() - started)
    norm = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt().item()
    return {
        "seconds": statistics.median(seconds), "mb": (_status("VmHWM") - before) / 1024, "gradient_norm": norm
    }  # fmt: skip


def measure(way: str, size: tuple[int, int, int], model_name: str, repeats: int) -> dict[str, float]:
    """In a fresh process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.prompt_once",
        "--model",
        model_name,
        "--repeats",
        str(repeats),
    ]
    command += ["--way", way, "--size", ",".join(map(str, size))]
    return json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )


def main() -> None:
    """All sizes, all ways; rows as they come, then a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="delta_net", choices=MODELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--size", help="P,R,n; default: all of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = arguments.size and tuple(int(x) for x in arguments.size.split(","))
    if arguments.way:
        print(json.dumps(measure_here(arguments.way, size, arguments.model, arguments.repeats)))
        return
    table = []
    for prompt, tokens, n in [size] if size else SIZES:
        row = {
            "prompt": prompt,
            "tokens": tokens,
            "n": n,
            "counted": n * (prompt + tokens) / (prompt + n * tokens),
        }
        row |= {way: measure(way, (prompt, tokens, n), arguments.model, arguments.repeats) for way in WAYS}
        table.append(row)
        print(row, flush=True)
    print(record("prompt_once", table, name=arguments.model, model=MODELS[arguments.model][0]))


if __name__ == "__main__":
    main()
