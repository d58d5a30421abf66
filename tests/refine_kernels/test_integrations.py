"""Beside the installed fla: the same arguments, and transformers' hybrids on a CPU through fla's own ops.

fla cannot be imported where Triton's interpreter is on, so one process of its own tries everything.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys

import pytest

import refine_kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None or importlib.util.find_spec("transformers") is None,
    reason="flash-linear-attention or transformers is not installed",
)

SCRIPT = """
import inspect, json
import torch, transformers
import fla
from fla.ops import delta_rule, gated_delta_rule
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling
from refine_kernels.integrations import register_with_fla

result = {}
ops = [delta_rule.chunk_delta_rule, delta_rule.fused_recurrent_delta_rule,
       gated_delta_rule.chunk_gated_delta_rule, gated_delta_rule.fused_recurrent_gated_delta_rule]
result["signatures"] = {op.__name__: [
    (p.name, "required" if p.default is p.empty else p.default)
    for p in inspect.signature(op).parameters.values() if p.kind != p.VAR_KEYWORD
] for op in ops}

torch.manual_seed(0)
config = transformers.Qwen3_5TextConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=8)
model = modeling.Qwen3_5ForCausalLM(config)
ids = torch.randint(97, (2, 40))

def run():
    out = model(ids, labels=ids)
    gradients = torch.autograd.grad(out.loss, list(model.parameters()))
    read = model.generate(ids[:, :10], max_new_tokens=8, do_sample=False, use_cache=True)
    return out.logits, torch.cat([g.flatten() for g in gradients]), read

if not torch.cuda.is_available():
    try:
        model(ids)
    except RuntimeError as error:
        result["before"] = str(error)
register_with_fla()
register_with_fla()
logits, gradients, read = run()
for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
    setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))
expected = run()
result["errors"] = [((a - b).norm() / b.norm()).item() for a, b in zip((logits, gradients), expected)]
result["same tokens"] = torch.equal(read, expected[2])

q, k, v = (torch.randn(1, 9, 2, 8).bfloat16().requires_grad_() for _ in range(3))
beta = torch.rand(1, 9, 2).bfloat16()
for op in ops[:2]:
    o, _ = op(q, k, v, beta, use_qk_l2norm_in_kernel=True)
    assert torch.autograd.grad(o.float().sum(), q)[0].isfinite().all()
fla.__version__ = "0.7.0"
try:
    register_with_fla()
except ValueError as error:
    result["another release"] = str(error)
print("RESULT " + json.dumps(result))
"""


@pytest.fixture(scope="module")
def result():
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.partition("RESULT ")[2])


def test_every_argument_of_the_installed_fla_is_taken(result):
    assert len(result["signatures"]) == 4
    for name, theirs in result["signatures"].items():
        ours = inspect.signature(getattr(refine_kernels, name)).parameters
        assert list(ours)[: len(theirs)] == [argument for argument, _ in theirs]
        for argument, default in theirs:
            assert default == "required" or ours[argument].default == default, argument


def test_a_hybrid_of_transformers_runs_and_trains_on_a_cpu(result):
    assert "active drivers" in result.get("before", "active drivers")
    assert max(result["errors"]) <= 1e-5 and result["same tokens"]
    assert result["another release"] == "register_with_fla needs flash-linear-attention 0.6.x, got 0.7.0"
