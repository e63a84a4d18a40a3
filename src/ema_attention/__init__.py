"""Expectation-Maximization attention (Li et al., ICCV 2019) for any PyTorch model."""

from ema_attention._forms import plain_form
from ema_attention.functional import EMAttention, GradientMode, em_attention
from ema_attention.look.explorer import explore_attention, explore_features, explore_stages
from ema_attention.look.maps import collect_attention_maps
from ema_attention.look.pictures import plot_attention_maps, plot_em_stages
from ema_attention.look.stages import EMStages, em_stages, model_stages
from ema_attention.modules import EMAUnit
from ema_attention.sharded import sharded_em_attention
from ema_attention.tiled import TiledEMAttention

__all__ = [
    "EMAUnit",
    "EMAttention",
    "EMStages",
    "GradientMode",
    "TiledEMAttention",
    "collect_attention_maps",
    "em_attention",
    "em_stages",
    "explore_attention",
    "explore_features",
    "explore_stages",
    "model_stages",
    "plain_form",
    "plot_attention_maps",
    "plot_em_stages",
    "sharded_em_attention",
]
__version__ = "0.1.0"
