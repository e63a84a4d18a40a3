"""What FLOP counters say of EMAUnit: python -m benchmarks.counters (after pip install fvcore ptflops thop)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ema_attention import EMAUnit

SHAPE = (1, 512, 65, 65)


def count_with_torch(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


def count_with_fvcore(model: nn.Module, x: Tensor) -> float:
    from fvcore.nn import FlopCountAnalysis

    return FlopCountAnalysis(model, x).total()


def count_with_ptflops(model: nn.Module, x: Tensor, backend: str) -> float:
    from ptflops import get_model_complexity_info

    options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    return get_model_complexity_info(model, tuple(x.shape[1:]), backend=backend, **options)[0]


def count_with_thop(model: nn.Module, x: Tensor) -> float:
    from thop import profile

    return profile(model, (x,), verbose=False)[0]


COUNTERS: dict[str, tuple[str, Callable[[nn.Module, Tensor], float]]] = {
    "`torch.utils.flop_counter`": ("torch", count_with_torch),
    "fvcore": ("fvcore", count_with_fvcore),
    "ptflops, `aten` backend": ("ptflops", lambda model, x: count_with_ptflops(model, x, "aten")),
    "ptflops, `pytorch` backend": ("ptflops", lambda model, x: count_with_ptflops(model, x, "pytorch")),
    "thop": ("thop", count_with_thop),
}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    print("| counter | version | the unit alone, GMAC | inside a model, GMAC |\n| --- | --- | ---: | ---: |")
    for name, (package, count) in COUNTERS.items():
        models = EMAUnit(SHAPE[1]), nn.Sequential(EMAUnit(SHAPE[1]))
        alone, inside = (count(model.eval(), torch.randn(SHAPE)) / 1e9 for model in models)
        print(f"| {name} | {version(package)} | {alone:.2f} | {inside:.2f} |")


if __name__ == "__main__":
    main()
