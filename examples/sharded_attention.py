"""One sample spread over processes: exact attention that exchanges K·(C + 1) numbers a stage.

    torchrun --nproc-per-node 2 -m examples.sharded_attention
    torchrun --nproc-per-node 4 -m examples.sharded_attention --height 512

Every process holds a slice of the rows of one feature map. The result and the gradient are compared with
the unsharded ones. The bytes sent are compared with those of ring attention (Liu, Zaharia, Abbeel, 2023,
arXiv 2310.01889), which moves the keys and values of all other ranks through every rank.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ema_attention import em_attention, sharded_em_attention


@contextlib.contextmanager
def counted_all_reduces() -> Iterator[list[int]]:
    """Collects the size in bytes of every all-reduce in the context."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = all_reduce


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of all ranks, relative to the largest value."""
    worst = (a - b).abs().max() / b.abs().max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def run(channels: int, height: int, width: int, bases: int, stages: int) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)  # the same whole sample on every rank, only to compare with
    whole = torch.randn(1, channels, height, width, generator=generator)
    cotangent = torch.randn(1, channels, height, width, generator=generator)
    mu = F.normalize(torch.randn(channels, bases, generator=generator), dim=0)

    mine = whole.tensor_split(ranks, dim=2)[rank].clone().requires_grad_()
    with counted_all_reduces() as forward:
        result = sharded_em_attention(mine, mu, stages)
    with counted_all_reduces() as backward:
        (result.out * cotangent.tensor_split(ranks, dim=2)[rank]).sum().backward()

    whole.requires_grad_()
    expected = em_attention(whole, mu, stages)
    (expected.out * cotangent).sum().backward()
    out_difference = largest_difference(result.out, expected.out.tensor_split(ranks, dim=2)[rank])
    gradient_difference = largest_difference(mine.grad, whole.grad.tensor_split(ranks, dim=2)[rank])
    if rank:
        return

    # A ring all-reduce sends 2·(R − 1)/R of its buffer from every rank, a ring of keys and values
    # (R − 1)/R of both, N·C each: once forward, and again backward together with their gradients.
    of_a_reduce, of_a_ring = 2 * (ranks - 1) / ranks, (ranks - 1) / ranks
    keys_and_values = 2 * height * width * channels * whole.element_size()
    print(f"{ranks} processes, x (1, {channels}, {height}, {width}), K = {bases}, {stages} stages, float32")
    print(
        f"largest relative difference from the unsharded: out {out_difference:.1e}, gradient {gradient_difference:.1e}"
    )
    print(f"{'sent by each process':28}{'EM attention':>16}{'ring attention':>18}{'ratio':>10}")
    for name, ours, ring in (
        ("forward", of_a_reduce * sum(forward), of_a_ring * keys_and_values),
        ("forward and backward", of_a_reduce * sum(forward + backward), of_a_ring * 3 * keys_and_values),
    ):
        print(f"{name:28}{ours / 2**20:12.3f} MiB{ring / 2**20:14.1f} MiB{ring / ours:9.0f}x")
    print(f"all-reduces: {len(forward)} forward, {len(backward)} backward, of {forward[0]} bytes: K·(C + 1) numbers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--bases", type=int, default=64)
    parser.add_argument("--stages", type=int, default=3)
    args = parser.parse_args()
    if any(value < 1 for value in vars(args).values()):
        parser.error("every size must be at least 1")
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
    if not 2 <= ranks <= args.height:
        parser.error(f"torchrun must start from 2 processes to one for each row, {args.height}; got {ranks}")
    dist.init_process_group("gloo")
    try:
        run(args.channels, args.height, args.width, args.bases, args.stages)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
