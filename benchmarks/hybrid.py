"""Hybrid models beside transformers' own on a CPU: one SFT step, one delta layer, and accelerate_transformers.

``python -m benchmarks.hybrid`` prints a table: transformers' forward and backward over ours on the same weights,
and over its own model after ``refine.accelerate_transformers``, timed in turns. flash-linear-attention does not run
on a CPU, so transformers' plain PyTorch delta rule is what ours is compared with.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import timing
from benchmarks.timing import in_turns, keep_pages, quartiles
from refine import accelerate_transformers
from refine.models import MODELS, new_model

FAMILIES = ("qwen3_5_text", "qwen3_next", "qwen3_5_moe_text", "olmo_hybrid")
# Qwen3.5-0.8B with every width divided by four (heads keep their sizes) and a third of its layers.
SIZES = {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 896,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256, "linear_num_key_heads": 4,
    "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256, "pad_token_id": None,
}  # fmt: skip


def settings_of(family: str) -> dict:
    """Sizes of the table's models, as far as the family has them."""
    known = MODELS[family].config_class.settings() - {"head_dim" if family == "olmo_hybrid" else ""}
    return {key: value for key, value in SIZES.items() if key in known}


def transformers_model(family: str) -> PreTrainedModel:
    """transformers' own model on its plain PyTorch delta rule."""
    config = MODELS[family].config_class(**settings_of(family))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config.__class__.__mro__[2](**config.to_dict())).train()
    module = sys.modules[type(theirs).__module__]
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        function = getattr(module, name)
        setattr(module, name, getattr(function, "__wrapped__", function))
    return theirs


def measure(family: str, tokens: int, budget: float) -> dict[str, tuple[float, float, float]]:
    """Quartiles of transformers' time over ours: of a step, of a step after acceleration, of a delta layer."""
    theirs = transformers_model(family)
    ours = new_model(family, **settings_of(family)).train()
    ours.load_state_dict(theirs.state_dict())
    faster = accelerate_transformers(copy.deepcopy(theirs))
    ids = torch.randint(SIZES["vocab_size"], (1, tokens))
    x = torch.randn(1, tokens, SIZES["hidden_size"], requires_grad=True)

    def step(model) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()

        return run

    def layer(model) -> Callable[[], None]:
        mixer = model.model.layers[0].linear_attn

        def run() -> None:
            y = mixer(x)
            F.mse_loss(y[0] if isinstance(y, tuple) else y, x).backward()

        return run

    results = {}
    for name, make in (("step", step), ("layer", layer)):
        models = {"theirs": make(theirs), "faster": make(faster), "ours": make(ours)}
        times = in_turns(models, "ours", budget=budget)
        results[name] = quartiles([a / b for a, b in zip(times["theirs"], times["ours"])])
        results[f"{name}, accelerated"] = quartiles([a / b for a, b in zip(times["theirs"], times["faster"])])
        print(family, name, {key: f"{min(value):.3f} s" for key, value in times.items()}, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hybrid", description=__doc__)
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each comparison")
    parser.add_argument(
        "--processor_time", action="store_true", help="for a machine that does other things too"
    )
    options = parser.parse_args()
    if options.processor_time:
        timing.time = SimpleNamespace(perf_counter=time.process_time)
    torch.set_num_threads(1)
    keep_pages()
    for family in options.families:
        for name, (low, middle, high) in measure(family, options.tokens, options.budget).items():
            print(f"{family:18s} {name:20s} {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
