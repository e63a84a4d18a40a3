"""EM attention in float64 NumPy, slow, one position and one basis at a time, from the paper's section 3.2.

It imports nothing from src and is the truth the other tests compare with.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def em_attention(
    x: Array,
    mu: Array,
    stages: int,
    scale: float = 1.0,
    mask: NDArray[np.bool_] | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
) -> tuple[Array, Array, Array]:
    """For x (B, C, N) and mu (C', K): out (B, C', N), mu (B, C', K), z (B, K, N)."""
    samples = [
        _one_sample(
            x[b],
            mu if mu.ndim == 2 else mu[b % len(mu)],
            stages,
            scale,
            None if mask is None else mask[b],
            weight,
            bias,
        )
        for b in range(len(x))
    ]
    return tuple(np.stack(parts) for parts in zip(*samples, strict=True))  # type: ignore[return-value]


def _one_sample(x, mu, stages, scale, mask, weight, bias):
    if weight is not None:  # the projection is formed here: that is what folding has to equal
        x = weight @ np.where(True if mask is None else mask, x, 0.0)
        x = x if bias is None else x + bias[:, None]
    positions = [n for n in range(x.shape[1]) if mask is None or mask[n]]
    bases = mu.shape[1]
    mu = mu.copy()
    for _ in range(stages):
        z = np.zeros((bases, x.shape[1]))
        for n in positions:
            logits = np.array([scale * (x[:, n] @ mu[:, k]) for k in range(bases)])
            kernel = np.exp(logits - logits.max())
            z[:, n] = kernel / kernel.sum()
        for k in range(bases):
            column_sum = sum(z[k, n] for n in positions)
            # the paper's equation divides by the column sum; the L2 norm then takes it away again
            mean = sum((z[k, n] / column_sum * x[:, n] for n in positions), np.zeros(len(x)))
            norm = np.sqrt((mean**2).sum())
            mu[:, k] = mean / norm if norm > 0 else mu[:, k] / np.sqrt((mu[:, k] ** 2).sum())
    return mu @ z, mu, z


def objective(x: Array, mu: Array, scale: float) -> float:
    """J(mu) = Σ_n logsumexp_k(scale · x_nᵀ mu_k), which EM climbs, for x (C, N) and mu (C, K)."""
    logits = scale * (x.T @ mu)
    peak = logits.max(1, keepdims=True)
    return float((peak[:, 0] + np.log(np.exp(logits - peak).sum(1))).sum())
