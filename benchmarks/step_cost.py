"""What a REFINE step costs beside an SFT step: time and memory, one machine, one run, pair by pair.

``python -m benchmarks.step_cost [--model lact]`` measures the tables of the README and appends them to
``benchmarks/results/``; ``--model delta_net-110m`` one length of a larger model. On a shared machine only ratios of
neighbours count, so the two steps of a ratio are timed in turn and the median of the pairs' ratios is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.results import record
from benchmarks.timing import keep_pages, paired_ratio, release_pages
from refine import RefineConfig, refine_step
from refine.method import next_token_targets
from refine.models import new_model
from refine.models.body import checkpoint_activations
from refine.models.head import HiddenOnly, NextTokenLoss

WAYS = ("sft", "shared_prefix", "per_prefix")
LENGTHS = (1024, 2048, 4096, 8192, 16384)

# Small models of one width; the settings are those of the table's caption.
MODELS = {
    "delta_net": ("DeltaNet, hidden 256, 4 layers, 4 heads of 64", {"num_heads": 4}),
    "gated_deltanet": (
        "Gated DeltaNet, hidden 256, 4 layers, 4 heads of 64 x 128",
        {"num_heads": 4, "head_dim": 64},
    ),
    "lact": (
        "LaCT, hidden 256, 4 layers, 2 fast heads of 128, chunk 512, window 512",
        {
            "num_attn_heads": 4,
            "num_lact_heads": 2,
            "lact_chunk_size": 512,
            "window_size": 512,
            "w0_w2_low_rank": 32,
        },
    ),
    "qwen3_5": (
        "Qwen3.5, hidden 256, 8 layers, 2 of them attention (4 heads of 64), 4 value and 2 key heads of 64",
        {
            "num_hidden_layers": 8,
            "intermediate_size": 768,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
}
# One length, with gradient checkpointing, and full-prefix recomputation beside it: without it, the activations of
# 16K tokens are 19 GB in float32 for the smaller one.
LARGE = {
    "delta_net-110m": (
        "DeltaNet, hidden 768, 12 layers, 6 heads of 128",
        {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 32000, "num_heads": 6},
    ),
    "delta_net-370m": (
        "DeltaNet, hidden 1024, 24 layers, 8 heads of 128",
        {"hidden_size": 1024, "num_hidden_layers": 24, "vocab_size": 32000, "num_heads": 8},
    ),
}


def model_of_the_table(model: str = "delta_net") -> torch.nn.Module:
    """One of ``MODELS`` (hidden 256, 4 layers, vocabulary 4096) or ``LARGE``: random weights, float32."""
    settings = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 4096} | (MODELS | LARGE)[model][1]
    net = new_model(model.split("-")[0], **settings).train()
    if model in LARGE:
        checkpoint_activations(net)
    return net


def steps(
    tokens: int, chunks: int = 8, length: int = 5, model: str = "delta_net"
) -> dict[str, Callable[[], torch.Tensor]]:
    """One function a way; each does forward and backward (no optimizer) and returns the loss."""
    model = model_of_the_table(model)
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    lengths = torch.tensor([tokens])
    seeds = torch.tensor([1])

    def sft() -> torch.Tensor:
        model.zero_grad()
        head = NextTokenLoss(*next_token_targets(ids, lengths), entropy=False)
        loss = model(ids, use_cache=False, head=head).loss
        loss.backward()
        return loss

    def refine(way: str) -> torch.Tensor:
        model.zero_grad()
        config = RefineConfig(num_chunks=chunks, rollout_length=length, step=way)
        loss = refine_step(model, ids, config, seeds=seeds).loss
        loss.backward()
        return loss

    return {
        "sft": sft,
        "shared_prefix": lambda: refine("shared_prefix"),
        "per_prefix": lambda: refine("per_prefix"),
    }


def over_sft(way: Callable, sft: Callable, pairs: int) -> dict[str, float]:
    """A row of the table: the ratio with its quartiles, and both times."""
    found = paired_ratio(way, sft, least=pairs, most=pairs)
    return {
        "ratio": found.ratio,
        "ratio_low": found.low,
        "ratio_high": found.high,
        "seconds": found.seconds_a,
        "sft_seconds": found.seconds_b,
        "pairs": found.rounds,
    }


def peak_memory(way: str, tokens: int, model: str = "delta_net") -> float:
    """MB that one step takes beyond the process before it, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.step_cost", "--memory_of", way, "--tokens", str(tokens)]
    command += ["--model", model]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def _memory_here(way: str, tokens: int, model: str) -> float:
    """Peak beyond what was resident before the step; a short step first, so that one-time costs do not count."""
    steps(512, model=model)[way]()
    function = steps(tokens, model=model)[way]
    Path("/proc/self/clear_refs").write_text("5")  # the kernel starts its high-water mark anew
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def uncached_generation(tokens: int, model: str, chunks: int = 8, length: int = 5) -> Callable[[], None]:
    """What sampling costs without a cache: the whole prefix again for each of c x k tokens (no gradient).

    The public code generates so with LaCT, whose state it cannot keep: it pays this in addition to what
    ``per_prefix`` does here.
    """
    net = model_of_the_table(model)
    ids = torch.randint(4096, (1, tokens))
    positions = [tokens * (2 * j + 1) // (2 * chunks) for j in range(chunks)]

    @torch.no_grad()
    def generate() -> None:
        for p in positions:
            for j in range(length):
                net(ids[:, : p + j], use_cache=False, head=HiddenOnly())

    return generate


def measure(pairs: int, model: str = "delta_net") -> dict:
    """The whole table."""
    table: dict[str, list] = {"tokens": [], "chunks": [], "length": []}
    sizes = {
        "tokens": LENGTHS,
        "chunks": (2, 4, 8, 16, 32, 64),
        "length": (1, 3, 5, 7),
    }
    for name, values in sizes.items():
        for value in values:
            at = steps(**({"tokens": 8192, "model": model} | {name: value}))
            row = {name: value} | over_sft(at["shared_prefix"], at["sft"], pairs)
            table[name].append(row)
            print(row, flush=True)
    at = steps(8192, model=model)
    table["per_prefix"] = over_sft(at["per_prefix"], at["sft"], 1)
    print(table["per_prefix"], flush=True)
    if model == "lact":
        generate = uncached_generation(8192, model)
        table["uncached_generation"] = over_sft(generate, at["sft"], 1)
        print(table["uncached_generation"], flush=True)
    for tokens in LENGTHS:  # full-prefix recomputation at one of them: it takes minutes
        ways = WAYS if tokens == 8192 else WAYS[:2]
        memory = {way: peak_memory(way, tokens, model) for way in ways}
        table.setdefault("memory", []).append({"tokens": tokens} | memory)
        print(table["memory"][-1], flush=True)
        if tokens == 8192:
            table["memory_mb"] = memory
    return table


def measure_large(pairs: int, model: str, tokens: int, per_prefix: bool) -> dict:
    """The ratio at one length; full prefixes once, if asked for; memory of each. Warm-up at 512 tokens."""
    for way in steps(512, model=model).values():
        way()
    at = steps(tokens, model=model)
    limits = {"least": pairs, "most": pairs, "warm_up": False}
    table = {
        "tokens": tokens,
        "shared_prefix": asdict(paired_ratio(at["shared_prefix"], at["sft"], **limits)),
    }
    print(table, flush=True)
    del at
    release_pages()
    if per_prefix:  # in a process of its own: it may need more memory than there is
        command = [sys.executable, "-m", "benchmarks.step_cost", "--per_prefix_of", model]
        apart = subprocess.run([*command, "--tokens", str(tokens)], stdout=subprocess.PIPE, text=True)
        if apart.returncode == 0:
            table["per_prefix"] = json.loads(apart.stdout.splitlines()[-1])
        else:
            table["per_prefix"] = {"failed": f"ended with {apart.returncode} (-9: killed, out of memory)"}
        print(table["per_prefix"], flush=True)
    table["memory_mb"] = {way: peak_memory(way, tokens, model) for way in WAYS[:2]}
    print(table["memory_mb"], flush=True)
    return table


def markdown(record: dict) -> str:
    """The table as the README shows it."""
    table = record["table"]
    lines = ["| T (c = 8, k = 5) | " + " | ".join(f"{row['tokens']:,}" for row in table["tokens"]) + " |"]
    lines.append("|---" * (len(table["tokens"]) + 1) + "|")
    lines.append("| REFINE / SFT | " + " | ".join(f"{row['ratio']:.2f}" for row in table["tokens"]) + " |")
    lines.append("")
    for name, symbol, rest in (("chunks", "c", "T = 8,192, k = 5"), ("length", "k", "T = 8,192, c = 8")):
        lines.append(f"| {symbol} ({rest}) | " + " | ".join(str(row[name]) for row in table[name]) + " |")
        lines.append("|---" * (len(table[name]) + 1) + "|")
        lines.append("| REFINE / SFT | " + " | ".join(f"{row['ratio']:.2f}" for row in table[name]) + " |")
        lines.append("")
    memory = table["memory_mb"]
    lines += [
        "| T = 8,192, c = 8, k = 5 | SFT | REFINE, shared prefix | REFINE, full-prefix recomputation |",
        "|---|---|---|---|",
        f"| time / SFT | 1 | {next(r for r in table['tokens'] if r['tokens'] == 8192)['ratio']:.2f} "
        f"| {table['per_prefix']['ratio']:.1f} |",
        f"| peak memory of the step, MB | {memory['sft']:.0f} | {memory['shared_prefix']:.0f} "
        f"| {memory['per_prefix']:.0f} |",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, append a results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", choices=[*MODELS, *LARGE], default="delta_net")
    parser.add_argument(
        "--no_per_prefix", action="store_true", help="large models: leave out full-prefix recomputation"
    )
    parser.add_argument("--per_prefix_of", choices=LARGE, help=argparse.SUPPRESS)
    parser.add_argument("--memory_of", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=16384, help="of a large model's sequence")
    options = parser.parse_args()
    if options.memory_of:
        print(_memory_here(options.memory_of, options.tokens, options.model))
        return
    keep_pages()
    if options.per_prefix_of:
        at = steps(options.tokens, model=options.per_prefix_of)
        once = {"least": 1, "most": 1, "warm_up": False}
        print(json.dumps(asdict(paired_ratio(at["per_prefix"], at["sft"], **once))))
        return
    if options.model in LARGE:
        table = measure_large(options.pairs, options.model, options.tokens, not options.no_per_prefix)
        about = {"name": options.model, "model": LARGE[options.model][0]}
        print(f"written to {record('large_step', table, **about)}")
        return
    table = measure(options.pairs, options.model)
    about = {"name": options.model, "model": MODELS[options.model][0]}
    path = record("step_cost", table, **about)
    print(f"written to {path}\n\n{markdown({'table': table})}")


if __name__ == "__main__":
    main()
