"""Five Newton-Schulz steps towards the nearest orthogonal matrix (Muon), and their gradient.

``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, from ``X = G / (||G||_F + 1e-7)``, on the wide one of G and G^T.
The coefficients change from step to step so that five suffice (as in the LaCT authors' code).
"""

from __future__ import annotations

import torch

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
EPS = 1e-7


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    """``[..., r, c] -> [..., r, c]``: all singular values pushed towards 1."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    for a, b, c in COEFFICIENTS:
        x = _step(x, a, b, c)
    return x.mT if tall else x


def newton_schulz_backward(g: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to ``g``, given that of the result; the steps are run again."""
    tall = g.shape[-2] > g.shape[-1]
    if tall:
        g, grad = g.mT, grad.mT
    norm = torch.linalg.matrix_norm(g, keepdim=True)
    scaled = g / (norm + EPS)
    xs = [scaled]
    for a, b, c in COEFFICIENTS[:-1]:
        xs.append(_step(xs[-1], a, b, c))
    for x, (a, b, c) in zip(reversed(xs), reversed(COEFFICIENTS)):
        gram = x @ x.mT
        polynomial = b * gram + c * gram @ gram
        # d(polynomial), then through gram = x x^T; gram and polynomial are symmetric
        d_polynomial = grad @ x.mT
        d_gram = b * d_polynomial + c * (d_polynomial @ gram + gram @ d_polynomial)
        grad = a * grad + polynomial @ grad + (d_gram + d_gram.mT) @ x
    inner = (grad * scaled).sum((-2, -1), keepdim=True)
    grad = (grad - scaled * inner * ((norm + EPS) / norm.clamp_min(1e-30))) / (norm + EPS)
    return grad.mT if tall else grad


def _step(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    gram = x @ x.mT
    return a * x + (b * gram + c * gram @ gram) @ x
