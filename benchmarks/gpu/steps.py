"""Training steps of published sizes with random weights: SFT beside REFINE, rollouts, prompts read once."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from benchmarks.cost_model import PUBLISHED
from benchmarks.full_size import ROPE, SIZES
from benchmarks.gpu.measuring import CUDA, DEVICE, HALF, Row, milliseconds, peak_gb, row
from benchmarks.gpu.pool import Task
from benchmarks.prompt_once import make_batch, once, separately
from refine import RefineConfig, refine_step
from refine.method import next_token_targets
from refine.method.sampling import sample_rollouts
from refine.models import MODELS, new_model
from refine.models.body import checkpoint_activations
from refine.models.head import HiddenOnly, NextTokenLoss

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "intermediate_size": 32}
# type; settings of a toy for a CPU, which has none for the last
SIZED = {
    "DeltaNet-1.3B": ("delta_net", {"num_heads": 2}),
    "LaCT-760M": (
        "lact", {"num_attn_heads": 4, "num_lact_heads": 2, "lact_chunk_size": 64, "window_size": 64}
    ),
    "Qwen3.5-0.8B": (
        "qwen3_5",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "linear_num_value_heads": 2,
         "linear_num_key_heads": 2, "num_hidden_layers": 4},
    ),
    "Qwen3.5-2B": ("qwen3_5", None),
}  # fmt: skip


def build(name: str, layers: int | None = None) -> torch.nn.Module:
    """A published size in bfloat16 (a toy on a CPU), random weights; ``layers`` of it."""
    kind, small = SIZED[name]
    with torch.device(DEVICE):
        if not CUDA:
            model = new_model(kind, **_SMALL | small)
        else:
            if name in PUBLISHED:
                config = copy.deepcopy(PUBLISHED[name])
            else:
                size = SIZES[name.removeprefix("Qwen3.5-")]
                config = MODELS[kind].config_class(rope_parameters=ROPE, **size)
            config.num_hidden_layers = layers or config.num_hidden_layers
            model = MODELS[config.model_type](config)
    return model.to(HALF).train()


def compiling() -> list[Task]:
    """Every model once with four layers, so that what is timed finds its kernels compiled."""
    if not CUDA:
        return []
    found = []
    for name in SIZED:
        arguments = {"name": name, "lengths": ((1024, False), (2048, True)), "layers": 4}
        found.append(Task("compiling", name, "benchmarks.gpu.steps:steps", arguments, compiling=True))
    prompt = {"layers": 2, "sizes": ((1024, 256, 8),)}
    return [*found, Task("compiling", "prompts", "benchmarks.gpu.steps:prompt_once", prompt, compiling=True)]


def steps(
    name: str, lengths: tuple = ((4096, False), (16384, True)) if CUDA else ((256, False),),
    layers: int | None = None, largest: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """One training step, forward and backward: SFT beside REFINE, time and memory; rollouts. ``lengths``: tokens,
    and whether with gradient checkpointing."""
    if not CUDA and SIZED[name][1] is None:
        return
    model = build(name, layers)
    vocabulary = model.config.vocab_size
    count = sum(p.numel() for p in model.parameters()) / 1e9
    for tokens, checkpointing in lengths:
        if checkpointing:
            checkpoint_activations(model)
        ids = torch.randint(vocabulary, (1, tokens), device=DEVICE)
        lengths = torch.tensor([tokens], device=DEVICE)
        seeds = torch.tensor([1], device=DEVICE)

        def sft(ids=ids, lengths=lengths):
            model.zero_grad()
            head = NextTokenLoss(*next_token_targets(ids, lengths), entropy=False)
            model(ids, use_cache=False, head=head).loss.backward()

        def refine(step="shared_prefix", ids=ids, seeds=seeds):
            model.zero_grad()
            refine_step(model, ids, RefineConfig(step=step), seeds=seeds).loss.backward()

        ways = {"sft": sft, "refine": refine}
        times = {way: milliseconds(f, repeats=5) for way, f in ways.items()}
        memory = {way: peak_gb(f) for way, f in ways.items()}
        text = f"{times['sft']:.0f}, {times['refine']:.0f} ms ({times['refine'] / times['sft']:.3f}x)"
        if not checkpointing:
            try:
                times["per_prefix"] = milliseconds(lambda: refine("per_prefix"), repeats=1)
                memory["per_prefix"] = peak_gb(lambda: refine("per_prefix"))
                text += f", full prefixes {times['per_prefix']:.0f} ms ({times['per_prefix'] / times['sft']:.1f}x)"
            except torch.OutOfMemoryError:
                text += ", full prefixes do not fit"
        yield row(
            f"{name} ({count:.2f} B), T = {tokens}{', checkpointing' * checkpointing}: SFT, REFINE",
            f"{text}; {', '.join(f'{gb:.1f}' for gb in memory.values())} GB",
            **times, gb=memory,
        )  # fmt: skip
    if checkpointing:
        model.gradient_checkpointing_disable()
    yield from rollouts(name, model)
    model.train()
    if largest and CUDA:
        yield row(
            f"{name}: largest batch of 4,096 tokens that fits a REFINE step", str(_largest(model, vocabulary))
        )


def rollouts(name: str, model) -> Iterator[Row]:
    """64 rollouts of 5 tokens from the states of one prefix; as a CUDA graph and call by call, whose tokens must
    be the same."""
    prefix, branches = (4096, 64) if CUDA else (128, 4)
    ids = torch.randint(model.config.vocab_size, (1, prefix), device=DEVICE)
    model.eval()
    with torch.no_grad():
        output = model(ids, use_cache=False, head=HiddenOnly(), state_stride=64)
        positions = prefix - torch.arange(branches, device=DEVICE) % 64
        state = output.trace.gather(torch.zeros_like(positions), positions)
        context = output.last_hidden_state[0, positions - 1]
        draws = torch.arange(branches * 5, device=DEVICE).view(branches, 5)
        sample = lambda: sample_rollouts(model, state, context, draws, 1.0)  # noqa: E731
        first = sample()
        ms = milliseconds(sample, repeats=5)
        again = sample()
        once = milliseconds(lambda: model(ids, use_cache=True, head=HiddenOnly()), repeats=3)
    same = torch.equal(first, again)
    yield row(
        f"{name}: {branches} rollouts of 5 at {prefix}",
        f"{ms:.1f} ms; reading {branches} prefixes: {branches * once:.0f} ms ({branches * once / ms:.0f}x); "
        f"replayed tokens {'are' if same else 'ARE NOT'} those of the first call",
        ms=ms, same=same,
    )  # fmt: skip


def _largest(model, vocabulary: int) -> int:
    fits = 0
    for batch in (1, 2, 4, 8, 16, 32):
        try:
            ids = torch.randint(vocabulary, (batch, 4096), device=DEVICE)
            refine_step(model, ids, RefineConfig(), seeds=torch.arange(batch, device=DEVICE)).loss.backward()
            fits = batch
        except torch.OutOfMemoryError:
            break
        finally:
            model.zero_grad()
            torch.cuda.empty_cache()
    return fits


def prompt_once(
    name: str = "DeltaNet-1.3B", layers: int | None = None,
    sizes: tuple = ((16384, 256, 8), (4096, 256, 8), (1024, 512, 8)) if CUDA else ((64, 8, 2),),
) -> Iterator[Row]:  # fmt: skip
    """An update on n completions of one prompt: read once, and n times."""
    model = build(name, layers)
    checkpoint_activations(model)
    for prompt, tokens, n in sizes:
        batch = {k: x.to(DEVICE) for k, x in make_batch(prompt, tokens, n, model.config.vocab_size).items()}
        times, memory = {}, {}
        for way, loss_of in (("once", once), ("separately", separately)):

            def update(loss_of=loss_of, batch=batch):
                model.zero_grad()
                loss_of(model, batch).backward()

            try:
                times[way], memory[way] = milliseconds(update, repeats=2), peak_gb(update)
            except torch.OutOfMemoryError:
                model.zero_grad()
                torch.cuda.empty_cache()
        ratio = f" ({times['separately'] / times['once']:.2f}x)" if "separately" in times else ""
        counted = n * (prompt + tokens) / (prompt + n * tokens)
        yield row(
            f"{name}: {n} completions of {tokens} after {prompt}: once, separately",
            f"{', '.join(f'{ms:.0f}' for ms in times.values())} ms{ratio}, counted {counted:.2f}x; "
            f"{', '.join(f'{gb:.1f}' for gb in memory.values())} GB",
            **times, gb=memory, counted=counted,
        )  # fmt: skip
