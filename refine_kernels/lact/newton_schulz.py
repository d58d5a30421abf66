"""Five Newton-Schulz steps towards the nearest orthogonal matrix (Muon), and their gradient.

``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, from ``X = G / (||G||_F + 1e-7)``, on the wide one of G and G^T.
The coefficients change from step to step so that five suffice (as in the LaCT authors' code).
"""

from __future__ import annotations

import itertools
import math

import torch

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
EPS = 1e-7


def newton_schulz(g: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``[..., r, c] -> [..., r, c]`` in g's dtype: all singular values pushed towards 1.

    Args:
        dtype: of the products; g's own if left out. The scaling before them is in g's.
    """
    x, tall = _wide(g)
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)).to(dtype or g.dtype)
    for a, b, c in COEFFICIENTS:
        x = torch.baddbmm(x, _polynomial(x, b, c)[1], x, beta=a)
    return (x.mT if tall else x).reshape(g.shape).to(g.dtype)


def newton_schulz_backward(
    g: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The gradient with respect to ``g``, given that of the result; the steps are run again.

    With ``S = grad X^T + X grad^T`` a step passes back ``a grad + (b A + c A^2) grad + (b S + c (S A + A S)) X``;
    S and A are symmetric, so ``A S`` is the transpose of ``S A``: four products, beside the three run again.
    """
    shape, dtype = g.shape, dtype or g.dtype
    (g, tall), (grad, _) = _wide(g), _wide(grad)
    norm = torch.linalg.matrix_norm(g, keepdim=True)
    scaled = g / (norm + EPS)
    x = scaled.to(dtype)
    steps = [(x, *_polynomial(x, *COEFFICIENTS[0][1:]))]
    for (a, _, _), (_, b, c) in itertools.pairwise(COEFFICIENTS):
        x, _, polynomial = steps[-1]
        x = torch.baddbmm(x, polynomial, x, beta=a)
        steps.append((x, *_polynomial(x, b, c)))
    # the gradient may be of any size, so it enters low-precision products with norm 1
    size = torch.linalg.matrix_norm(grad, keepdim=True).clamp_min(1e-30)
    grad = (grad / size).to(dtype)
    for (x, gram, polynomial), (a, b, c) in zip(reversed(steps), reversed(COEFFICIENTS)):
        d_polynomial = grad @ x.mT
        d_polynomial = d_polynomial + d_polynomial.mT
        product = d_polynomial @ gram
        d_gram = torch.add(product, product.mT).mul_(c).add_(d_polynomial, alpha=b)
        grad = torch.baddbmm(torch.baddbmm(grad, polynomial, grad, beta=a), d_gram, x)
    grad = grad.to(g.dtype)
    inner = (grad * scaled).sum((-2, -1), keepdim=True)
    grad = (grad - scaled * inner * ((norm + EPS) / norm.clamp_min(1e-30))) * (size / (norm + EPS))
    return (grad.mT if tall else grad).reshape(shape)


def _wide(g: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """``[..., r, c] -> [n, r, c]``, or transposed where there are more rows than columns, and whether it was."""
    tall = g.shape[-2] > g.shape[-1]
    return (g.mT if tall else g).reshape(math.prod(g.shape[:-2]), *sorted(g.shape[-2:])), tall


def _polynomial(x: torch.Tensor, b: float, c: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``A = X X^T`` and ``b A + c A^2`` of ``x [n, r, c]``."""
    gram = x @ x.mT
    return gram, torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
