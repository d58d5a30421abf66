"""The kernels in a model and a loop of your own: a delta-rule layer and a head without logits.

    python examples/kernels_in_a_loop.py

The model learns to repeat: the second half of every sequence is its first half. Only what lies in the state can
tell it how to go on. ``refine_kernels`` depends on torch, triton and einops alone.
"""

import torch
import torch.nn.functional as F
from torch import nn

from refine_kernels import chunk_delta_rule, linear_cross_entropy, linear_logprob

VOCABULARY, WIDTH, HEADS = 32, 64, 2


class Layer(nn.Module):
    """A delta-rule layer: every token writes its value under its predecessor's key."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.beta = nn.Linear(WIDTH, HEADS)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, D]
        z = self.norm(x)
        q, k, v = self.qkv(z).unflatten(-1, (3, HEADS, -1)).unbind(2)  # [B, T, H, D / H] each
        k = F.pad(k, (0, 0, 0, 0, 1, 0))[:, :-1]  # the key of the token before
        o, _ = chunk_delta_rule(q, k, v, self.beta(z).sigmoid(), use_qk_l2norm_in_kernel=True)
        return x + self.out(o.flatten(2))


class Model(nn.Module):
    def __init__(self, layers: int = 2):
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(layers)), nn.RMSNorm(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embeddings(ids))


def repeated(batch: int, half: int) -> torch.Tensor:
    """[batch, 2 half] random tokens, then the same again."""
    return torch.randint(VOCABULARY, (batch, half)).repeat(1, 2)


def main(steps: int = 150, half: int = 24) -> float:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        ids = repeated(32, half).to(device)
        hidden = model(ids)[:, half - 1 : -1]  # [B, half, D], what predicts the second half
        loss = linear_cross_entropy(hidden, model.head.weight, ids[:, half:])  # no [B, T, vocabulary] tensor
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 30 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    with torch.no_grad():
        ids = repeated(64, half).to(device)
        out = linear_logprob(
            model(ids)[:, half - 1 : -1], model.head.weight, temperature=0.0, sample=True, seed=0
        )
        accuracy = (out.token == ids[:, half:]).float().mean().item()
    print(f"{accuracy:.0%} of the repeated tokens right, chance is {1 / VOCABULARY:.0%}")
    return accuracy


if __name__ == "__main__":
    main()
