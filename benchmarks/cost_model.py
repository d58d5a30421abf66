"""A step counted: FLOPs, bytes and GPU hours of SFT and of REFINE, with a shared prefix and with full prefixes.

``python -m benchmarks.cost_model`` prints the tables; ``--check`` sets the counted ratios beside the measured ones
in ``benchmarks/results/``. Everything here is counted, nothing is timed: a multiply-add is two FLOPs, a backward
twice its forward, and a GPU is assumed to reach ``UTILISATION`` of its rated matrix speed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from refine import RefineConfig, refine_step
from refine.method import next_token_targets
from refine.models import MODELS, DeltaNetConfig, LaCTConfig
from refine.models.body import checkpoint_activations
from refine.models.head import HiddenOnly, NextTokenLoss
from refine.models.state import map_state

PUBLISHED = {
    "DeltaNet-1.3B": DeltaNetConfig(hidden_size=2048, num_heads=16, intermediate_size=5632),
    "LaCT-760M": LaCTConfig(w0_w2_low_rank=32, rope_theta=1e6),
}
RATED = 989e12  # FLOP/s of an H100 SXM in bf16 without sparsity, by its data sheet
UTILISATION = 0.4
CHUNK = 64  # tokens of one block of the delta rule


@dataclass(frozen=True)
class Step:
    """Shape of a step: T tokens, c positions, n rollouts of k tokens, states kept every ``stride`` tokens."""

    tokens: int
    chunks: int = 8
    rollouts: int = 1
    length: int = 5
    stride: int = 64


def token_flops(config) -> float:
    """Forward FLOPs of one token: every matrix product of the model, at a full window."""
    with torch.device("meta"):
        model = MODELS[config.model_type](config)
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in name
    )
    return 2 * matrices + config.num_hidden_layers * mixer_flops(config)


def mixer_flops(config) -> float:
    """Forward FLOPs of one token in one layer's fast weights (and window)."""
    if config.model_type == "lact_swiglu":
        widths = config.widths
        apply = 2 * widths.size * config.num_lact_heads
        return 3 * apply + 4 * config.window_size * config.hidden_size  # the update is twice the application
    k, v = config.head_k_dim, config.head_v_dim
    return config.num_heads * (6 * k * v + 4 * CHUNK * (k + v))


def replay_flops(config, stride: int) -> float:
    """Forward FLOPs of bringing one layer stack's states to a position: the delta rule over half a stride."""
    if config.model_type == "lact_swiglu":
        return 0.0  # a branch applies the weights of its chunk
    return (
        config.num_hidden_layers * stride / 2 * config.num_heads * 6 * config.head_k_dim * config.head_v_dim
    )


def step_flops(config, step: Step, way: str) -> float:
    """FLOPs of one step on one sequence.

    ``sft``: 3 T tokens. ``shared_prefix``: and, for each of c n branches, k - 1 tokens to sample, k tokens with
    a gradient, a state. ``paper``: the prefix padded to T four times over, ``4 + 5 c n`` forwards of T tokens.
    """
    token, branches = token_flops(config), step.chunks * step.rollouts
    sft = 3 * step.tokens * token
    if way == "sft":
        return sft
    if way == "paper":
        return (4 + 5 * branches) * step.tokens * token
    if way == "shared_prefix":
        branch = (step.length - 1 + 3 * step.length) * token + 3 * replay_flops(config, step.stride)
        return sft + branches * branch
    raise ValueError(f"way must be sft, shared_prefix or paper, got {way!r}")


def gathered_bytes(config, step: Step, way: str) -> float:
    """Bytes of parameters (bf16) that FSDP2 gathers on each GPU in one step, all layers resharded after use.

    SFT gathers twice (forward, backward). A REFINE step also for each of k - 1 single-token calls and for the
    branches' pass, forward and backward.
    """
    parameters = sum(p.numel() for p in _meta(config).parameters())
    return 2 * parameters * (2 if way == "sft" else 2 + (step.length - 1) + 2)


def kept_bytes(config, tokens: int, way: str, checkpointing: bool) -> int:
    """Bytes that one sequence's forward keeps for the backward in bf16, parameters apart.

    Counted, not measured: the forward runs on PyTorch's fake tensors, which have shapes and no numbers, and
    every distinct storage that autograd saves is added up once. ``shared_prefix`` counts the true sequence's pass
    with its kept states; the branches' own is c n k tokens and does not matter beside T. Without the head, whose
    loss keeps the gradient of the hidden states and of its weight, taken in the forward.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, torch.UntypedStorage] = {}
    before = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        model = MODELS[config.model_type](config).train()
        torch.set_default_dtype(before)
        if checkpointing:
            checkpoint_activations(model)
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def note(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return x

        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            output = model(ids, use_cache=False, head=HiddenOnly(), state_stride=64 if way != "sft" else None)
        if output.trace is not None:  # alive for the branches, whether a backward needs it or not
            map_state(output.trace, note)
    return sum(storage.nbytes() for storage in kept.values())


def _meta(config) -> torch.nn.Module:
    with torch.device("meta"):
        return MODELS[config.model_type](config)


def gpu_hours(config, step: Step, way: str, total_tokens: float) -> float:
    """Hours of one GPU for so many training tokens, at ``UTILISATION`` of its rated speed."""
    return step_flops(config, step, way) / step.tokens * total_tokens / (RATED * UTILISATION) / 3600


def tables() -> str:
    """All tables, as markdown."""
    lines = []
    for name, config in PUBLISHED.items():
        lines += [f"**{name}**, c = 8, k = 5, n = 1: FLOPs of a step over those of an SFT step (counted)", ""]
        sizes = (4096, 8192, 16384, 32768, 65536, 131072)
        lines += [
            "| T | " + " | ".join(f"{t // 1024}K" for t in sizes) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for way, title in (
            ("shared_prefix", "REFINE, shared prefix"),
            ("paper", "full-prefix recomputation"),
        ):
            ratios = (step_flops(config, Step(t), way) / step_flops(config, Step(t), "sft") for t in sizes)
            lines.append(
                f"| {title} | " + " | ".join(f"{r:.3f}" if r < 2 else f"{r:.1f}" for r in ratios) + " |"
            )
        pflop = step_flops(config, Step(16384), "sft") / 1e15
        lines += ["", f"One SFT step on 16K tokens is {pflop:.2f} PFLOP.", ""]
        lines += [
            f"Hours by number of GPUs at T = 16K ({RATED / 1e12:.0f} TFLOP/s rated, {UTILISATION:.0%} reached)",
            "",
            "| tokens, way | 8 | 64 | 256 | 1,024 |",
            "|---|---|---|---|---|",
        ]
        for total, label in ((200e6, "200M"), (10e9, "10B")):
            for way in ("sft", "shared_prefix", "paper"):
                hours = gpu_hours(config, Step(16384), way, total)
                cells = " | ".join(f"{hours / gpus:,.2f}" for gpus in (8, 64, 256, 1024))
                lines.append(f"| {label}, {way.replace('_', ' ')} | {cells} |")
        lines += ["", "| FSDP2: bytes gathered a GPU and step, k = 5 | SFT | REFINE |", "|---|---|---|"]
        gathered = [gathered_bytes(config, Step(16384), way) / 1e9 for way in ("sft", "shared_prefix")]
        lines += [f"| bf16 parameters, GB | {gathered[0]:.1f} | {gathered[1]:.1f} |", ""]
    return "\n".join(lines)


def memory_table(tokens: int = 16384) -> str:
    """Parameters, optimizer and kept activations of one GPU, as markdown."""
    lines = [
        f"| GB, one sequence of {tokens:,} tokens | parameters bf16 | AdamW float32 (copy, two moments, gradient) "
        "| kept, SFT | kept, REFINE | with gradient checkpointing, SFT | REFINE |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, config in PUBLISHED.items():
        count = sum(p.numel() for p in _meta(config).parameters())
        kept = [
            kept_bytes(config, tokens, way, checkpointing) / 1e9
            for checkpointing in (False, True)
            for way in ("sft", "shared_prefix")
        ]
        cells = " | ".join(f"{value:.1f}" for value in (2 * count / 1e9, 16 * count / 1e9, *kept))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def check() -> str:
    """Counted ratios beside the measured ones of the newest results file of each small model."""
    from benchmarks.results import read
    from benchmarks.step_cost import MODELS as SMALL

    lines = ["| model, T | counted | measured |", "|---|---|---|"]
    newest = {contents.get("name", "delta_net"): contents for _, contents in read("step_cost", "cpu")}
    for model, contents in newest.items():
        kind = {"lact": "lact_swiglu"}.get(model, model)
        config = MODELS[kind].config_class(
            hidden_size=256, num_hidden_layers=4, vocab_size=4096, **SMALL[model][1]
        )
        for row in contents["table"]["tokens"]:
            at = Step(row["tokens"])
            counted = step_flops(config, at, "shared_prefix") / step_flops(config, at, "sft")
            lines.append(f"| {model}, {row['tokens']:,} | {counted:.3f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def counted_ratio_of_calls(model: torch.nn.Module, tokens: int) -> float:
    """The same ratio from the products that really run (PyTorch's own counter): what the formulas are tested by."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.randint(model.config.vocab_size, (1, tokens))
    lengths = torch.tensor([tokens])

    def count(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function().backward()
        return counter.get_total_flops()

    head = NextTokenLoss(*next_token_targets(ids, lengths), entropy=False)
    sft = count(lambda: model(ids, use_cache=False, head=head).loss)
    refine = count(lambda: refine_step(model, ids, RefineConfig(), seeds=torch.tensor([1])).loss)
    return refine / sft


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="counted beside measured")
    parser.add_argument("--memory", action="store_true", help="also count what a forward keeps (a minute)")
    options = parser.parse_args()
    print(check() if options.check else tables())
    if options.memory:
        print(memory_table())


if __name__ == "__main__":
    main()
