"""Pictures of a segmentation: classes as colours over the image, beside the label and the attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from torchvision import tv_tensors

from ema_attention import EMAUnit, collect_attention_maps
from examples.emanet.data import IGNORE, normalisation
from examples.emanet.evaluate import evaluation_mode

Colours = Sequence[Sequence[int]]


def colour_classes(mask: Tensor, colours: Colours) -> Tensor:
    """The colours (H, W, 3), uint8, of classes (H, W); black where there is none."""
    palette = torch.zeros(256, 3, dtype=torch.uint8)
    palette[: len(colours)] = torch.tensor(colours, dtype=torch.uint8)
    return palette[mask]


@torch.no_grad()
def plot_segmentation(model: nn.Module, image: Tensor, mask: Tensor, names: Sequence[str], colours: Colours) -> Figure:
    """An image (3, H, W), uint8, beside its label (H, W), what ``model`` predicts, and the maps of its EM attention.

    Of each :class:`EMAUnit` the hard assignment is shown: every position in the shade of the basis that explains
    most of it.
    """
    device = next(model.parameters()).device
    has_units = any(isinstance(module, EMAUnit) for module in model.modules())
    with evaluation_mode(model), collect_attention_maps(model) if has_units else nullcontext({}) as maps:
        prediction = model(normalisation(tv_tensors.Image(image))[None].to(device)).argmax(1)[0].cpu()
    prediction[mask == IGNORE] = IGNORE
    panels = {
        "image": image.permute(1, 2, 0),
        "label": colour_classes(mask, colours),
        "prediction": colour_classes(prediction, colours),
    }
    height, width = mask.shape
    count = len(panels) + len(maps)
    figure = Figure(figsize=(3.2 * count, 3.2 * height / width + 1), layout="constrained")
    axes = figure.subplots(1, count)
    for ax, (title, panel) in zip(axes, panels.items(), strict=False):
        ax.imshow(panel.numpy())
        ax.set_title(title)
    for ax, (name, z) in zip(axes[len(panels) :], maps.items(), strict=True):
        ax.imshow(z[0].argmax(0).cpu().numpy(), cmap="viridis", vmin=0, vmax=z.shape[1] - 1, interpolation="nearest")
        ax.set_title(f"{name}: largest of {z.shape[1]} bases")
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    patches = [_patch(colour, name) for name, colour in zip(names, colours, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(names), 3 * count), fontsize="small")
    return figure


def plot_overlay(image: Tensor, classes: Tensor, names: Sequence[str], colours: Colours) -> Figure:
    """Predicted classes (H, W) over their image (3, H, W), uint8, with the share of each."""
    height, width = classes.shape
    blend = (image.permute(1, 2, 0).float() + colour_classes(classes, colours).float()) / 2
    figure = Figure(figsize=(8, 8 * height / width + 0.8), layout="constrained")
    ax = figure.subplots()
    ax.imshow(blend.to(torch.uint8).numpy())
    ax.set(xticks=[], yticks=[])
    shares = {
        int(label): int(count) / classes.numel()
        for label, count in zip(*classes.unique(return_counts=True), strict=True)
    }
    patches = [
        _patch(colours[label], f"{names[label]} {share:.1%}")
        for label, share in sorted(shares.items(), key=lambda item: -item[1])
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 6), fontsize="small")
    return figure


def _patch(colour: Sequence[int], label: str) -> Patch:
    return Patch(facecolor=[channel / 255 for channel in colour], edgecolor="#808080", label=label)
