"""A unit in the state of a trained one, and the equation that it computes."""

import torch.nn.functional as F
from torch import Tensor, nn

from ema_attention import EMAUnit, em_attention


def trained_like(unit: EMAUnit) -> EMAUnit:
    """The unit with a norm whose every tensor matters."""
    norm = unit.conv2[1]
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return unit


def formula(unit: EMAUnit, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The unit's equation, module by module, on x (B, C, H, W)."""
    y = unit.conv1(x if mask is None else x.masked_fill(~mask[:, None], 0.0))
    out = em_attention(y, unit.mu, unit.stages, scale=unit.scale, gradient=unit.gradient, mask=mask).out
    y = x + unit.conv2(F.relu(out))
    return F.relu(y) if unit.final_relu else y
