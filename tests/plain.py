"""The plain forms: EM attention and the unit as published, in nothing but PyTorch, from the paper alone.

Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019, sections 3.2 and
3.3. Tests hold the library against them, benchmarks measure beside them; nothing here comes from ``src``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gradient = Literal["none", "last", "all"]


class PublishedEMAU(nn.Module):
    """The unit on (B, C, H, W), with the constants that the released weights were trained with.

    The convolution is run, both normalisations are there and add 1e-6, nothing is recomputed. Its state has the
    names and shapes of ``EMAUnit``'s, so weights go to and from it as they are. ``gradient`` is the published
    ``"none"``, or what autograd does with the same loop left open for its last stage or for all of them.
    """

    mu: Tensor

    def __init__(self, channels: int, num_bases: int = 64, stages: int = 3, gradient: Gradient = "none") -> None:
        super().__init__()
        self.stages = stages
        self.open_stages = {"none": 0, "last": 1, "all": stages}[gradient]
        mu = torch.randn(1, channels, num_bases) * math.sqrt(2 / num_bases)
        self.register_buffer("mu", mu / (1e-6 + mu.norm(dim=1, keepdim=True)))
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        for conv in (self.conv1, self.conv2[0]):
            nn.init.normal_(conv.weight, 0, math.sqrt(2 / channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x).flatten(2)  # (B, C, N)
        mu = self.mu.expand(len(x), -1, -1)
        for stage in range(self.stages):
            with torch.set_grad_enabled(torch.is_grad_enabled() and stage >= self.stages - self.open_stages):
                z = (y.mT @ mu).softmax(-1)  # (B, N, K)
                mu = y @ (z / (1e-6 + z.sum(1, keepdim=True)))
                mu = mu / (1e-6 + mu.norm(dim=1, keepdim=True))
        if self.training:
            with torch.no_grad():
                self.mu = 0.9 * self.mu + 0.1 * mu.mean(0, keepdim=True)  # its norm is left as it comes
        y = F.relu(mu @ z.mT, inplace=True).view_as(x)  # the projection's name again, so that its memory is free
        y = self.conv2(y)
        return F.relu(y + x, inplace=True)


def em_attention(
    x: Tensor,
    mu: Tensor,
    stages: int,
    gradient: Gradient = "all",
    scale: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """EM attention of x (B, C, *spatial), with the projection formed and nothing but autograd.

    Each column of z is divided by its sum, as the paper writes it. A basis that nothing moves is not seen to.
    """
    spatial = x.shape[2:]
    y = x.flatten(2) if weight is None else weight @ x.flatten(2)
    y = y if bias is None else y + bias[:, None]
    mu = mu.expand(len(y), -1, -1)
    for stage in range(stages):
        is_constant = gradient == "none" or (gradient == "last" and stage < stages - 1)
        source = y.detach() if is_constant else y
        mu = mu if gradient == "all" else mu.detach()
        z = (source.mT @ (scale * mu)).softmax(-1)  # (B, N, K)
        z = z if mask is None else z * mask.flatten(1)[..., None]
        mu = F.normalize(source @ (z / (1e-6 + z.sum(1, keepdim=True))), dim=1, eps=1e-300)
    return (mu @ z.mT).unflatten(2, spatial), mu, z.mT.unflatten(2, spatial)
