"""Expectation-Maximization attention (Li et al., ICCV 2019) for any PyTorch model."""

from ema_attention.functional import EMAttention, em_attention
from ema_attention.maps import collect_attention_maps
from ema_attention.modules import EMAUnit
from ema_attention.pictures import plot_attention_maps

__all__ = ["EMAUnit", "EMAttention", "collect_attention_maps", "em_attention", "plot_attention_maps"]
__version__ = "0.1.0"
