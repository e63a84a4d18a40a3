"""A second, slow form of every block, from the papers: loops over positions and bases, in float64.

It shares no code with ``blocks.py``. Each function takes the block's parameters and buffers by name, x (B, C, H, W)
and whether the block trains. The gradient of x comes from autograd through these loops.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def emau(state: State, x: Tensor, training: bool, gradient: str = "none", stages: int = 3) -> Tensor:
    outs = []
    for sample in linear(state, "conv1", columns(x)):  # (C, N)
        bases = state["mu"][0]
        for stage in range(stages):
            constant = gradient == "none" or (gradient == "last" and stage < stages - 1)
            y, bases = (sample.detach(), bases.detach()) if constant else (sample, bases)
            maps = softmax([basis @ y for basis in bases.T])  # (K, N)
            totals = [y @ z for z in maps]
            bases = torch.stack([total / total.pow(2).sum().sqrt() for total in totals], 1)
        outs.append(sum(torch.outer(basis, z) for basis, z in zip(bases.T, maps, strict=True)).clamp_min(0))
    out = norm(state, "conv2.1", linear(state, "conv2.0", torch.stack(outs)), training)
    return (columns(x) + out).clamp_min(0).view_as(x)


def non_local(state: State, x: Tensor, training: bool, subsample: bool = False) -> Tensor:
    keys = x
    if subsample:
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        corners = [x[:, :, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
        keys = torch.stack(corners).max(0).values
    theta = linear(state, "theta", columns(x))
    phi, g = (linear(state, name, columns(keys)) for name in ("phi", "g"))
    out = attend(theta, phi, g)
    return x + norm(state, "w.1", linear(state, "w.0", out), training).view_as(x)


def position_attention(state: State, x: Tensor, training: bool) -> Tensor:
    query, key, value = (linear(state, name, columns(x)) for name in ("query", "key", "value"))
    return state["gamma"] * attend(query, key, value).view_as(x) + x


def channel_attention(state: State, x: Tensor, training: bool) -> Tensor:
    samples = []
    for features in columns(x):
        rows = []
        for channel in features:
            energy = torch.stack([torch.dot(channel, other) for other in features])
            weights = softmax(energy.max() - energy)
            rows.append(sum(weight * other for weight, other in zip(weights, features, strict=True)))
        samples.append(torch.stack(rows))
    return state["gamma"] * torch.stack(samples).view_as(x) + x


def dual_attention(state: State, x: Tensor, training: bool) -> Tensor:
    parts = [{k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in ("position.", "channel.")]
    return position_attention(parts[0], x, training) + channel_attention(parts[1], x, training)


def hamburger(state: State, x: Tensor, training: bool, rank: int = 64) -> Tensor:
    y = linear(state, "lower", columns(x)).clamp_min(0)
    drawn = torch.rand(len(x), x.shape[1], rank, dtype=torch.float32, device=x.device).double()
    outs = []
    for v, d in zip(y, drawn, strict=True):
        d = d / d.pow(2).sum(0).sqrt()
        h = torch.stack([softmax(d.T @ position) for position in v.T], 1)  # (R, N), v ≈ d h
        updates = 6 if training else 7
        for update in range(updates):
            if update == updates - 1:  # one-step gradient: what enters the last update is constant
                d, h = d.detach(), h.detach()
            h = h * torch.einsum("cr,cn->rn", d, v) / (torch.einsum("cr,cs,sn->rn", d, d, h) + 1e-6)
            d = d * torch.einsum("cn,rn->cr", v, h) / (torch.einsum("cs,sn,rn->cr", d, h, h) + 1e-6)
        outs.append(torch.einsum("cr,rn->cn", d, h))
    out = norm(state, "upper.1", linear(state, "upper.0", torch.stack(outs)), training)
    return (columns(x) + out).clamp_min(0).view_as(x)


def double_attention(state: State, x: Tensor, training: bool) -> Tensor:
    a, b, v = (linear(state, name, columns(x)) for name in "abv")
    outs = []
    for features, gates, vectors in zip(a, b, v, strict=True):
        gathered = [sum(p * f for p, f in zip(softmax(gate), features.T, strict=True)) for gate in gates]
        out = [sum(p * f for p, f in zip(softmax(vector), gathered, strict=True)) for vector in vectors.T]
        outs.append(torch.stack(out, 1))
    return x + linear(state, "w", torch.stack(outs)).view_as(x)


def criss_cross(state: State, x: Tensor, training: bool) -> Tensor:
    for _ in range(2):
        query, key, value = (linear(state, n, columns(x)).unflatten(2, x.shape[2:]) for n in ("query", "key", "value"))
        out = torch.zeros_like(x)
        for b, i, j in torch.cartesian_prod(*(torch.arange(x.shape[d]) for d in (0, 2, 3))).tolist():
            path = [(i, w) for w in range(x.shape[3])] + [(h, j) for h in range(x.shape[2]) if h != i]
            weights = softmax([torch.dot(query[b, :, i, j], key[b, :, h, w]) for h, w in path])
            out[b, :, i, j] = sum(p * value[b, :, h, w] for p, (h, w) in zip(weights, path, strict=True))
        x = state["gamma"] * out + x
    return x


def columns(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], -1)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """A 1×1 convolution of x (B, C, N)."""
    out = torch.einsum("oc,bcn->bon", state[f"{name}.weight"][:, :, 0, 0], x)
    return out if f"{name}.bias" not in state else out + state[f"{name}.bias"][:, None]


def norm(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    """BatchNorm of x (B, C, N): by its own statistics in training, by the running ones otherwise."""
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        mean = x.mean((0, 2))
        variance = (x - mean[:, None]).pow(2).mean((0, 2))
    x = (x - mean[:, None]) / (variance + 1e-5).sqrt()[:, None]
    return x * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]


def softmax(logits: list[Tensor] | Tensor) -> Tensor:
    """Over the first dimension, or over the list."""
    logits = torch.stack(logits) if isinstance(logits, list) else logits
    exponentials = (logits - logits.amax(0)).exp()
    return exponentials / exponentials.sum(0)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dot-product attention of (B, C, N), one query at a time."""
    samples = []
    for q, k, v in zip(query, key, value, strict=True):
        out = [sum(p * f for p, f in zip(softmax(k.T @ position), v.T, strict=True)) for position in q.T]
        samples.append(torch.stack(out, 1))
    return torch.stack(samples)
