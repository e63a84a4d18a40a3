"""Expectation-Maximization attention (Li et al., ICCV 2019) for any PyTorch model."""

from ema_attention.functional import EMAttention, em_attention
from ema_attention.maps import collect_attention_maps
from ema_attention.modules import EMAUnit
from ema_attention.pictures import plot_attention_maps
from ema_attention.sharded import sharded_em_attention
from ema_attention.tiled import TiledEMAttention

__all__ = [
    "EMAUnit",
    "EMAttention",
    "TiledEMAttention",
    "collect_attention_maps",
    "em_attention",
    "plot_attention_maps",
    "sharded_em_attention",
]
__version__ = "0.1.0"
