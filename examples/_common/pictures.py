"""Pictures of a segmentation: the image, its label, the prediction and the attention maps, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from torchvision import tv_tensors

from ema_attention import EMAUnit, collect_attention_maps
from ema_attention.look.pictures import as_photo, draw_assignment
from examples._common.evaluation import evaluation_mode
from examples._common.samples import IGNORE, Colours, normalisation


def colour_classes(mask: Tensor, colours: Colours) -> Tensor:
    """The colours (H, W, 3), uint8, of classes (H, W); black where there is none."""
    palette = torch.zeros(256, 3, dtype=torch.uint8)
    palette[: len(colours)] = torch.tensor(colours, dtype=torch.uint8)
    return palette[mask]


@torch.no_grad()
def plot_segmentation(model: nn.Module, image: Tensor, mask: Tensor, names: Sequence[str], colours: Colours) -> Figure:
    """An image (3, H, W), uint8, its label (H, W), what ``model`` predicts, and the maps of its EM attention.

    Of each :class:`EMAUnit` the hard assignment is shown, as :func:`ema_attention.plot_attention_maps` draws it.
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
    figure = Figure(figsize=(3.2 * count, 3.2 * min(height / width, 4) + 1), layout="constrained")
    axes = figure.subplots(1, count)
    for ax, (title, panel) in zip(axes, panels.items(), strict=False):
        ax.imshow(panel.numpy())
        ax.set_title(title)
    photo = as_photo(image)
    for ax, (name, z) in zip(axes[len(panels) :], maps.items(), strict=True):
        draw_assignment(ax, photo, F.interpolate(z[:1].float().cpu(), photo.shape[:2], mode="bilinear")[0])
        ax.set_title(f"{name}: largest of {z.shape[1]} bases")
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    draw_class_legend(figure, names, colours, columns=3 * count)
    return figure


def draw_class_legend(figure: Figure, labels: Sequence[str], colours: Colours, columns: int) -> None:
    """A legend below a figure of so many columns at most: the label of each class, as it is written, and its colour."""
    patches = [
        Patch(facecolor=[channel / 255 for channel in colour], edgecolor="#808080", label=label)
        for label, colour in zip(labels, colours, strict=True)
    ]
    legend = figure.legend(
        handles=patches, loc="outside lower center", ncols=min(len(patches), columns), fontsize="small"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name starts no formula
