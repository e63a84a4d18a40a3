"""EMANet's published weights: from the official checkpoint and from mmsegmentation's EMAHead, to ours and back.

python -m examples.emanet.published IN OUT --to {official,mmsegmentation,ema-attention}

Keys are renamed, and no number changes. The weights do not tell the network's multi-grid, nor how it upsamples.
An official checkpoint is read as the published network, with output stride 8 and multi-grid 1, 2, 4. A checkpoint of
mmsegmentation is read without a multi-grid, as in its configurations. Who converts an official one to it has to set
the multi-grid there. The official code has one network, so a network with another stem or multi-grid is not written
in its format. The auxiliary head, which only training uses, is dropped.

Here bases have exact unit norm. The official code adds 1e-6 to the norm and to the sums of the maps, which differs by
rounding alone. The bases in the file may be shorter than 1, and EM starts from them unchanged.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples._common.files import first_not_finite, load_checkpoint, save_checkpoint
from examples._common.samples import Colours
from examples.emanet.data import VOC_NAMES, voc_colour
from examples.emanet.model import EMANet, emanet

NAMES = {
    "official": {
        "backbone.conv1.": "extractor.0.",
        "backbone.bn1.": "extractor.1.",
        **{f"backbone.layer{stage}.": f"extractor.{stage + 3}." for stage in (1, 2, 3, 4)},
        **{name: name for name in ("fc0.", "emau.", "fc1.", "fc2.")},
    },
    "mmsegmentation": {
        "backbone.": "backbone.",
        "backbone.conv1.": "backbone.stem.",
        "backbone.bn1.": "backbone.stem.7.",
        "fc0.": "decode_head.ema_in_conv.",
        "emau.mu": "decode_head.ema_module.bases",
        "emau.conv1.": "decode_head.ema_mid_conv.conv.",
        "emau.conv2.0.": "decode_head.ema_out_conv.conv.",
        "emau.conv2.1.": "decode_head.ema_out_conv.bn.",
        "fc1.0.": "decode_head.bottleneck.",
        "conv_cat.": "decode_head.conv_cat.",
        "fc2.": "decode_head.conv_seg.",
    },
    "ema-attention": {name: name for name in ("backbone.", "fc0.", "emau.", "fc1.", "conv_cat.", "fc2.")},
}
"""What the keys of :class:`EMANet` start with, and what they start with in each format."""
WEIGHTS = {"official": "net", "mmsegmentation": "state_dict", "ema-attention": "model"}
"""The entry of a checkpoint that holds the weights."""
MEANT = {
    "official": {"output_stride": 8, "stages": 3, "stem_channels": 128, "multi_grid": (1, 2, 4)},
    "mmsegmentation": {"output_stride": 8, "stages": 3},
    "ema-attention": {},
}
"""What a network of each format is, whatever its weights tell."""
BACKBONES = {6: "resnet50", 23: "resnet101"}
"""By the number of layer3's blocks."""


class Loaded(NamedTuple):
    """What a checkpoint holds."""

    model: EMANet
    """In eval mode."""
    network: dict[str, Any]
    """The arguments with which :func:`emanet` builds it."""
    names: tuple[str, ...]
    """Of the classes: the checkpoint's own, or VOC's if there are as many."""
    colours: Colours
    """Of the classes in pictures, RGB from 0 to 255."""


def load_network(path: Path | str) -> Loaded:
    """The network of a checkpoint: official, of mmsegmentation, or one that ``examples.emanet.train`` wrote.

    Backbone, channels, bases, classes and mmsegmentation's ``concat_input`` are found in the weights.

    Raises:
        ValueError: with the file's name, for one that is missing, broken or not an EMANet's, or whose classes have
            other names than strings or other colours than RGB.
    """
    entries = load_checkpoint(Path(path))
    format = next((format for format, entry in WEIGHTS.items() if entry in entries), None)
    if format is None:
        raise ValueError(f"{path} must be a checkpoint with an entry of {', '.join(WEIGHTS.values())}; it has none")
    weights = entries[WEIGHTS[format]]
    if not is_state_dict(weights):
        raise ValueError(f"{path} must have a state_dict under {WEIGHTS[format]!r}; it has something else")
    try:
        weights = rename(weights, {theirs: ours for ours, theirs in NAMES[format].items()})
        network = entries.get("network") or describe(weights)
        if format == "official":
            network["multi_grid"] = MEANT[format]["multi_grid"]
        with torch.device("meta"):
            model = emanet(**network)
        model.load_state_dict(weights, assign=True)
        model.float()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n\t")[:2][-1]  # the first, where load_state_dict has many
        raise ValueError(f"{path} must hold the weights of an EMANet: {shorten(reason, 200)}") from error
    if name := first_not_finite(weights):
        raise ValueError(f"{path} must hold a network of finite numbers; {name} has others")
    classes = range(model.fc2.out_channels)
    names = VOC_NAMES if len(classes) == len(VOC_NAMES) else tuple(f"class {label}" for label in classes)
    names = of_classes(entries.get("names", ()), names, is_name, f"{path} must have names")
    colours = of_classes(
        entries.get("colours", ()), tuple(map(voc_colour, classes)), is_colour, f"{path} must have colours"
    )
    return Loaded(model.eval(), network, names, tuple(map(tuple, colours)))


def of_classes(own: Any, defaults: tuple[Any, ...], is_one: Callable[[Any], bool], needs: str) -> tuple[Any, ...]:
    """What a checkpoint has of its first classes, and the defaults of the rest."""
    if not (isinstance(own, list | tuple) and len(own) <= len(defaults) and all(map(is_one, own))):
        raise ValueError(f"{needs} of its {len(defaults)} classes; got {shorten(repr(own), 200)}")
    return *own, *defaults[len(own) :]


def is_name(value: object) -> bool:
    return isinstance(value, str)


def is_colour(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(part in range(256) for part in value)


def is_state_dict(weights: object) -> bool:
    return isinstance(weights, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    )


def rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Weights whose keys start with what ``names`` has for their old start, the longest that it knows."""
    renamed, strangers = {}, []
    for key, value in weights.items():
        start = max(filter(key.startswith, names), key=len, default=None)
        if start is not None:
            renamed[names[start] + key.removeprefix(start)] = value
        elif not key.startswith("auxiliary_head."):
            strangers.append(key)
    if strangers:
        raise ValueError(f"no place for {len(strangers)} of its tensors, {strangers[0]} the first")
    return renamed


def describe(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of :func:`emanet` that the weights' shapes tell."""
    blocks = len({key.split(".")[2] for key in weights if key.startswith("backbone.layer3.")})
    if blocks not in BACKBONES:
        raise ValueError(f"layer3 must have one of {tuple(BACKBONES)} blocks; got {blocks}")
    for key, dim in (("emau.mu", 3), ("fc2.weight", 4)):
        if key not in weights or weights[key].dim() != dim:
            got = tuple(weights[key].shape) if key in weights else "no such tensor"
            raise ValueError(f"{key} must have {dim} dimensions; got {got}")
    stem = weights.get("backbone.conv1.6.weight")
    return {
        "backbone": BACKBONES[blocks],
        "num_classes": len(weights["fc2.weight"]),
        "channels": weights["emau.mu"].shape[1],
        "num_bases": weights["emau.mu"].shape[2],
        "stem_channels": None if stem is None else len(stem),
        "concat_input": "conv_cat.conv.weight" in weights,
    }


def write_checkpoint(loaded: Loaded, path: Path, format: str) -> None:
    """Writes a network in a format. Class names and colours are kept in ours alone.

    Raises:
        ValueError: for weights that the format has no key for, such as ``conv_cat`` in the official one; for a
            network that the format's readers would build otherwise: another backbone, stem or multi-grid, other
            stages.
    """
    model, network, *_ = loaded
    names = NAMES[format]
    defaults = signature(emanet).parameters
    backbone = network.get("backbone", defaults["backbone"].default)
    if format != "ema-attention" and backbone not in BACKBONES.values():
        known = " or ".join(BACKBONES.values())
        raise ValueError(f"cannot write the checkpoint {path}: {format} means {known}; got {backbone}")
    for name, value in MEANT[format].items():
        own = network.get(name, defaults[name].default)
        if own != value:
            raise ValueError(f"cannot write the checkpoint {path}: {format} means {name} = {value}; got {own}")
    if network.get("stem_channels") is None and format == "mmsegmentation":  # torchvision's stem has its names there
        names = {ours: theirs for ours, theirs in names.items() if not theirs.startswith("backbone.stem.")}
    try:
        weights = rename(model.state_dict(), names)
    except ValueError as error:
        raise ValueError(f"cannot write the checkpoint {path}: {format} has {error}") from error
    ours = {"network": network, "names": loaded.names, "colours": loaded.colours}
    rest = {"official": {"step": 0}, "mmsegmentation": {"meta": {}}, "ema-attention": ours}
    save_checkpoint({WEIGHTS[format]: weights, **rest[format]}, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.emanet.published", description=__doc__.splitlines()[0])
    parser.add_argument("input", metavar="IN", type=Path, help="a checkpoint in any of the formats")
    parser.add_argument("output", metavar="OUT", type=Path)
    parser.add_argument("--to", required=True, choices=NAMES, help="the format of OUT")
    options = parser.parse_args(arguments)
    try:
        loaded = load_network(options.input)
        write_checkpoint(loaded, options.output, options.to)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print(f"{options.output}: {options.to}, {', '.join(f'{name}={value}' for name, value in loaded.network.items())}")


if __name__ == "__main__":
    main()
