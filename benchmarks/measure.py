"""How every number is taken: correctness first, then MACs, memory and time. README.md explains it."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.blocks import Block

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages would break the progress bars

Mode = Literal["forward", "training step"]
MODES: tuple[Mode, ...] = ("forward", "training step")
"""A forward in eval mode without gradients; a forward and backward in training mode, to x and the parameters."""


@cache
def failure(block: Block, device: str = "cpu") -> str | None:
    """Why ``block`` must not be measured: its first difference from its slow form or its formulas, or None.

    Outputs in eval and training mode and the gradient of x, for random parameters and running statistics,
    float32 against float64, to 1e-4 of the largest value, at each of the block's ``sizes``.
    """
    reasons = (_failure_at(block, height, width, device) for height, width in block.sizes)
    return next((reason for reason in reasons if reason), None)


def _failure_at(block: Block, height: int, width: int, device: str) -> str | None:
    channels = 16
    generator = torch.Generator().manual_seed(0)
    module = block.make(channels).to(device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    x = torch.randn(2, channels, height, width, generator=generator).to(device).requires_grad_()
    probe = torch.randn(x.shape, generator=generator).to(device)

    for training in (False, True):
        module.train(training)
        state = {k: v.detach().clone().double() for k, v in module.state_dict().items()}
        torch.manual_seed(0)  # for Hamburger's bases
        out = module(x)
        (grad,) = torch.autograd.grad(out, x, probe)
        torch.manual_seed(0)
        slow_x = x.detach().double().requires_grad_()
        slow_out = block.slow(state, slow_x, training)
        (slow_grad,) = torch.autograd.grad(slow_out, slow_x, probe.double())
        for name, value, slow in (("output", out, slow_out), ("gradient of x", grad, slow_grad)):
            error = ((value - slow).abs().max() / slow.abs().max()).item()
            if not error <= 1e-4:  # NaN fails too
                mode = "training" if training else "eval"
                return f"its {name} in {mode} mode is off its slow form's by {error:.1e}"
    counts = {
        "parameters": (parameters(module), block.parameters(channels)),
        "MACs": (macs(module.eval(), x[:1]), block.macs_on(device, channels, height, width)),
    }
    for name, (counted, formula) in counts.items():
        if counted != formula:
            return f"its {name} are {counted:,}, its formula's {formula:,}"
    return None


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def macs(module: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of a forward: half the FLOPs that torch.utils.flop_counter finds."""
    # Not every PyTorch counts the fused attention of a CPU; its products are counted one by one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(x.detach())  # PyTorch 2.14 cannot count a module whose input is a view of what it differentiates
    return counter.get_total_flops() // 2


def prepare(
    module: nn.Module, shape: Sequence[int], mode: Mode, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Callable[[], Tensor]:
    """One run of ``module`` on random input as a function without arguments, which returns the output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tuple(shape), generator=generator).to(device, dtype)
    module = module.to(device, dtype)
    if mode == "forward":
        module.eval()
        return torch.no_grad()(lambda: module(x))
    probe = torch.randn(tuple(shape), generator=generator).to(device, dtype)
    wanted = [x.requires_grad_(), *(p for p in module.train().parameters() if p.requires_grad)]

    def step() -> Tensor:
        out: Tensor = module(x)
        torch.autograd.grad(out, wanted, probe, allow_unused=True)  # conv1 of the published unit gets none
        return out

    return step


class Memory(NamedTuple):
    """Bytes allocated during a call, not counting what was there before it."""

    peak: int
    held: int
    """What was still allocated at its end, without its result."""


def memory(call: Callable[[], Tensor], device: str = "cpu") -> Memory:
    """The allocations of one call: PyTorch's CUDA allocator's own count, or the profiler's events on a CPU.

    Both see every tensor, and what an operator allocates through PyTorch while it runs. On a CPU nothing depends on
    timing, so the numbers are the same in every run.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        out = call()
        torch.cuda.synchronize(device)
        peak, after = (
            count(device) - before for count in (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated)
        )
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            out = call()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
        peak = after = 0
        alive = set()  # what the call allocated itself: memory of older tensors that it frees does not count
        for event in sorted(events, key=lambda event: event["ts"]):
            address, size = event["args"]["Addr"], event["args"]["Bytes"]
            if size > 0 or address in alive:
                (alive.add if size > 0 else alive.remove)(address)
                after += size
                peak = max(peak, after)
    return Memory(peak, after - out.untyped_storage().nbytes())


def held_for_backward(
    module: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> int:
    """Bytes that a training forward keeps for its backward, without its input and output."""
    x = torch.randn(tuple(shape), dtype=dtype, device=device, requires_grad=True)
    module = module.to(device, dtype).train()
    return memory(lambda: module(x), device).held


def synchronize(device: str) -> None:
    """Waits for what was launched on a GPU; does nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    least: int = 3,
    warm: bool = False,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each call, measured in turns, so that a disturbance reaches all of them.

    Unless they are ``warm``, each call first runs unmeasured: once on a CPU, three times on a GPU. Then rounds follow
    until ``seconds`` have passed, and ``least`` rounds in any case. Each round starts with another call.
    """
    for _ in range(0 if warm else 3 if torch.device(device).type == "cuda" else 1):
        for call in calls.values():
            call()
    synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    order = list(calls)
    while time.perf_counter() < end or len(samples[order[0]]) < least:
        for name in order:
            start = time.perf_counter()
            calls[name]()
            synchronize(device)
            samples[name].append(time.perf_counter() - start)
        order = order[1:] + order[:1]
    return samples


def summary(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles and number of samples."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"median": middle, "quartiles": [low, high], "samples": len(samples)}


def extrapolate(points: Sequence[tuple[int, float]], n: int) -> float:
    """The value at ``n`` of a·n² + b·n through the last two of ``points`` (n, value); of b·n through a single one.

    Time and memory of every block here are such sums, or less (criss-cross: n√n).
    """
    (n2, v2) = points[-1]
    if len(points) == 1:
        return v2 * n / n2
    (n1, v1) = points[-2]
    a = max(0.0, (v2 / n2 - v1 / n1) / (n2 - n1))
    b = v2 / n2 - a * n2
    return a * n**2 + b * n


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """The p of the least-squares fit value ∝ nᵖ through ``points`` (n, value)."""
    logs = [(torch.tensor(n).double().log().item(), torch.tensor(v).double().log().item()) for n, v in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope
