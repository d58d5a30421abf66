"""One published size with random weights: load, read, one REFINE step, generate; time and memory of each.

``python -m benchmarks.full_size [--size 0.8B | 2B | LaCT-760M] [--tokens 1024] [--lora]``. Weights
are float32, gradient checkpointing is on, and the update is plain SGD, so memory is the weights, their gradients
and one layer's activations; with ``--lora`` adapters alone have gradients.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.cost_model import PUBLISHED
from refine import RefineConfig, load_model, refine_step
from refine.models import LaCTForCausalLM, new_model
from refine.models.adapters import add_adapters
from refine.models.body import checkpoint_activations

# Qwen3.5, dense: what its sizes differ in. All have heads of 256 with 64 rotated and 16 key heads of 128.
SIZES = {
    "0.8B": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 3584, "num_attention_heads": 8,
             "num_key_value_heads": 2, "linear_num_value_heads": 16, "tie_word_embeddings": True},
    "2B": {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 6144, "num_attention_heads": 8,
           "num_key_value_heads": 2, "linear_num_value_heads": 16, "tie_word_embeddings": True},
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}


def memory(name: str) -> float:
    """GB of VmRSS (now) or VmHWM (the most so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"/proc/self/status has no {name}")


def main() -> None:
    """Each stage prints its seconds and the most memory that the process has had."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("--size", default="0.8B", choices=[*SIZES, "LaCT-760M"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--lora", action="store_true", help="train LoRA adapters of rank 16 alone")
    options = parser.parse_args()
    began = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal began
        now = time.perf_counter()
        print(f"{stage:28s} {now - began:7.1f} s   at most {memory('VmHWM'):.1f} GB", flush=True)
        began = now

    with tempfile.TemporaryDirectory() as folder:
        if options.size in SIZES:
            model = new_model("qwen3_5", rope_parameters=ROPE, **SIZES[options.size])
        else:
            model = LaCTForCausalLM(PUBLISHED[options.size])
        tensors = [name for name, _ in model.named_parameters()]
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tensors)} tensors")
        model.to(torch.bfloat16).save_pretrained(folder)
        del model
        done("made and saved in bfloat16")
        model = load_model(folder, dtype=torch.float32)
        done("loaded in float32")
    ids = torch.randint(model.config.vocab_size, (1, options.tokens))
    with torch.no_grad():
        model.eval()(ids[:, :512])
    done("512 tokens read")
    if options.lora:
        model = add_adapters(model, options.size)
    checkpoint_activations(model.train())
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in trained):,} parameters are trained")
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    output = refine_step(model, ids, RefineConfig(), generator=torch.Generator().manual_seed(0))
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    done(f"a REFINE step of {options.tokens} tokens")
    model.eval().generate(ids[:, :64], max_new_tokens=5, do_sample=False)
    done("5 tokens generated")


if __name__ == "__main__":
    main()
