"""The EMA unit as published, in plain PyTorch and from the paper alone: what the library's unit is held against.

Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019, sections
3.2 and 3.3, with the constants the released weights were trained with. Nothing here comes from ``src``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublishedEMAU(nn.Module):
    """The unit on (B, C, H, W): 1×1 convolution, EM, ReLU, 1×1 convolution, BN, + x, ReLU.

    The convolution is run, both normalisations add 1e-6, EM has no gradient, and the bases are not moved.
    Its parameters have the published names, so weights go to and from ``EMAUnit`` as they are.
    """

    mu: Tensor

    def __init__(self, channels: int, num_bases: int = 64, stages: int = 3) -> None:
        super().__init__()
        self.stages = stages
        self.register_buffer("mu", F.normalize(torch.randn(1, channels, num_bases), dim=1))
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x).flatten(2)  # (B, C, N)
        with torch.no_grad():
            mu = self.mu.expand(len(x), -1, -1)  # (B, C, K)
            for _ in range(self.stages):
                z = (y.mT @ mu).softmax(dim=2)  # (B, N, K)
                mu = y @ (z / (1e-6 + z.sum(dim=1, keepdim=True)))
                mu = mu / (1e-6 + mu.norm(dim=1, keepdim=True))
        out = F.relu(mu @ z.mT).view_as(x)
        return F.relu(x + self.conv2(out))
