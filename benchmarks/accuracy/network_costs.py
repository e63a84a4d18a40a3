"""The costs of the networks that are compared: parameters, multiply-accumulates, times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.accuracy.tasks import TASKS, Task
from benchmarks.environment import environment
from benchmarks.measure import interleaved, macs, parameters, summary
from examples._common.recipe import PRECISIONS


def measure_networks(device: str, seconds: float = 40) -> dict[str, Any]:
    """Parameters, MACs and time of the networks of every task: a forward of one image, and a training step.

    The step has the recipe's batch, crops and precision, and no optimizer.
    """
    results: dict[str, Any] = {"environment": environment(device), "networks": {}}
    for name, task in tqdm(TASKS.items(), "measuring", unit="task"):
        networks = {block: task.network(task.blocks[block]).to(device) for block in task.compared()}
        image = torch.randn(1, 3, *task.size, device=device).contiguous(memory_format=torch.channels_last)
        rows = {
            block: {"parameters": parameters(network), "macs": macs(network.eval(), image)}
            for block, network in networks.items()
        }
        for kind, call_of, share in (("forward", forward_of, 0.2), ("training step", step_of, 1)):
            calls = {block: call_of(network, task) for block, network in networks.items()}
            for block, samples in interleaved(calls, seconds=share * seconds, device=device).items():
                rows[block][kind] = summary(samples)
        results["networks"][name] = {"batch": task.recipe.batch, "size": task.size, "crop": task.crop, "blocks": rows}
    return results


def forward_of(network: nn.Module, task: Task) -> Callable[[], object]:
    """A forward of one image in eval mode, as in an evaluation."""
    device = next(network.parameters()).device
    image = torch.randn(1, 3, *task.size, device=device)

    @torch.no_grad()
    def forward() -> Tensor:
        return network.eval()(image)

    return forward


def step_of(network: nn.Module, task: Task) -> Callable[[], object]:
    """A forward and a backward of a batch in training mode."""
    device = next(network.parameters()).device
    batch = torch.randn(task.recipe.batch, 3, *task.crop, device=device).contiguous(memory_format=torch.channels_last)
    dtype = PRECISIONS[task.recipe.precision]

    def step() -> None:
        network.train().zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = network(batch)
        logits.float().square().mean().backward()

    return step
