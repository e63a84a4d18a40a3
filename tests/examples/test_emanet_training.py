"""EMANet's training: the recipe, resuming, several processes, checkpoints, and the commands."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models import WeightsEnum

from examples._common.evaluation import evaluate, mean_iou, segment
from examples._common.files import load_checkpoint, save_checkpoint
from examples._common.pictures import plot_segmentation
from examples._common.processes import failing_together, first_process_ahead
from examples._common.recipe import Recipe, parameter_groups
from examples._common.runs import describe_modules
from examples._common.samples import Batches, Drawn, seed_everything
from examples._common.training import fit
from examples.emanet import evaluate as evaluate_command
from examples.emanet import predict, train
from examples.emanet.data import CAMVID_NAMES, Segmentation, augmentation, camvid
from examples.emanet.evaluate import iou_table
from examples.emanet.model import EMANet
from examples.emanet.predict import plot_overlay
from examples.emanet.published import load_network
from tests.ranks import run_on_ranks
from tests.trouble import file_size_limit, held_elsewhere

RECIPE = Recipe(steps=6, batch=4, evaluate_every=3)
SIZE = (24, 32)


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in CamVid's layout in which the brightness tells the class."""
    root = tmp_path_factory.mktemp("camvid")
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3), ("test", 2)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir()
        for i in range(count):
            mask = np.kron(random.integers(0, 12, (3, 4)), np.ones((8, 8))).astype(np.uint8)
            noise = random.integers(0, 10, (*SIZE, 3))
            Image.fromarray((20 * mask[..., None] + noise).astype(np.uint8)).save(root / split / f"{i}.jpg", quality=95)
            Image.fromarray(mask).save(root / f"{split}annot" / f"{i}.png")
    return root


def tiny_emanet() -> EMANet:
    seed_everything(0)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.BatchNorm2d(16), nn.ReLU())
    return EMANet(backbone, 16, len(CAMVID_NAMES), channels=8, num_bases=4)


class InterruptedAt(Dataset[Any]):
    """Gives a signal to its own process when a sample is asked for the n-th time."""

    def __init__(self, dataset: Any, n: int) -> None:
        self.dataset, self.n = dataset, n
        self.names, self.colours, self.fingerprint = dataset.names, dataset.colours, dataset.fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.n -= 1
        if self.n == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return self.dataset[index]


def train_tiny(
    root: Path, folder: Path, resume: bool = False, interrupt_at: int | None = None
) -> dict[int, list[float]]:
    train_set = camvid(root, "train")
    if interrupt_at is not None:
        train_set = InterruptedAt(train_set, interrupt_at)
    return fit(tiny_emanet(), train_set, camvid(root, "val"), augmentation((16, 24)), RECIPE, folder, resume=resume)


def assert_same(actual: Any, expected: Any) -> None:
    """The same values bit for bit, in tensors inside of dicts and lists."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected or (actual != actual and expected != expected)  # NaN: a class that is nowhere


@pytest.mark.parametrize("interrupted_step", [2, 3, 4, 6])  # 3 and 6: before an evaluation
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    streets: Path, tmp_path: Path, interrupted_step: int
) -> None:
    whole = train_tiny(streets, tmp_path / "whole")
    part = train_tiny(streets, tmp_path / "resumed", interrupt_at=RECIPE.batch * interrupted_step)
    assert load_checkpoint(tmp_path / "resumed" / "last.pt")["step"] == interrupted_step
    assert RECIPE.steps not in part
    resumed = train_tiny(streets, tmp_path / "resumed", resume=True)
    assert_same(resumed, whole)
    for name in ("last.pt", "best.pt"):
        assert_same(load_checkpoint(tmp_path / "resumed" / name), load_checkpoint(tmp_path / "whole" / name))


def test_a_run_is_neither_overwritten_nor_resumed_as_another(streets: Path, tmp_path: Path) -> None:
    train_set, val_set, crop = camvid(streets, "train"), camvid(streets, "val"), augmentation((16, 24))

    def go_on(transform: Any = crop, network: Any = None, resume: bool = True, **changes: Any) -> None:
        recipe = replace(Recipe(steps=1, batch=4), **changes)
        fit(tiny_emanet(), train_set, val_set, transform, recipe, tmp_path, resume=resume, network=network)

    network = {"stages": 3}
    go_on(network=network)
    go_on(network=network, workers=1)
    with pytest.raises(ValueError, match=r"holds a run already: go on with --resume,"):
        go_on(network=network, resume=False)
    with pytest.raises(ValueError, match=r"with lr = 0.009; got lr = 1.0$"):
        go_on(network=network, lr=1.0)
    with pytest.raises(ValueError, match=r"with stages = 3; got stages = 5$"):
        go_on(network={"stages": 5})
    val_set.size = (12, 16)
    with pytest.raises(ValueError, match=r"with size = \(24, 32\); got size = \(12, 16\)$"):
        go_on(network=network)
    val_set.size = None
    with pytest.raises(ValueError, match=r"with transform = .*size=\(16, 24\).*; got transform = .*\(9, 9\)"):
        go_on(augmentation((9, 9)), network)
    save_checkpoint({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last.pt must be a run's last checkpoint; it has only model"):
        go_on(network=network)


def test_a_loss_that_is_not_finite_ends_the_run(streets: Path, tmp_path: Path) -> None:
    recipe = Recipe(steps=30, batch=4, lr=1e6)
    with pytest.raises(ValueError, match=r"the loss of step \d0 is nan: try a smaller lr than 1000000.0"):
        fit(tiny_emanet(), camvid(streets, "train"), camvid(streets, "val"), augmentation((16, 24)), recipe, tmp_path)


def test_samples_without_a_label_teach_nothing(streets: Path, tmp_path: Path) -> None:
    train_set = camvid(streets, "train")
    train_set.ignore = 0  # a class that is nowhere
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "unlabelled.png")
    train_set.pairs = [(image, tmp_path / "unlabelled.png") for image, _ in train_set.pairs]
    recipe = Recipe(steps=10, batch=10, weight_decay=0)
    model = tiny_emanet()
    before = [parameter.clone() for parameter in model.parameters()]
    fit(model, train_set, camvid(streets, "val"), augmentation((16, 24)), recipe, tmp_path / "run")
    assert all(torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))


def test_weights_that_are_not_finite_are_not_saved(streets: Path, tmp_path: Path) -> None:
    recipe = Recipe(steps=4, batch=4, lr=1e30, evaluate_every=2)
    with pytest.raises(ValueError, match=r"backbone.0.weight is not finite at step \d: try a smaller lr than 1e\+30$"):
        fit(tiny_emanet(), camvid(streets, "train"), camvid(streets, "val"), augmentation((16, 24)), recipe, tmp_path)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the step of the overflow is left out
def test_a_batch_that_overflows_float16_is_neither_saved_nor_evaluated(streets: Path, tmp_path: Path) -> None:
    recipe = Recipe(steps=2, batch=4, evaluate_every=2, precision="float16")
    model = tiny_emanet()
    with torch.no_grad():
        model.backbone[0].weight.fill_(1e5)  # more than float16 has
    with pytest.raises(ValueError, match=r"^backbone.1.running_mean is not finite at step 2: try .*, or bfloat16$"):
        fit(model, camvid(streets, "train"), camvid(streets, "val"), augmentation((16, 24)), recipe, tmp_path)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("change", ["exchanged", "edited", "fewer", "val_fewer", "ignore", "stages", "dropout"])
def test_a_run_goes_on_with_what_it_was_made_from(streets: Path, tmp_path: Path, change: str) -> None:
    root = tmp_path / "camvid"
    shutil.copytree(streets, root)

    def go_on(model: EMANet, train_set: Segmentation, val_set: Segmentation) -> dict[int, list[float]]:
        return fit(model, train_set, val_set, augmentation((16, 24)), RECIPE, tmp_path / "run", resume=True)

    go_on(tiny_emanet(), InterruptedAt(camvid(root, "train"), RECIPE.batch), camvid(root, "val"))
    model = tiny_emanet()
    if change == "exchanged":
        a, b, c = (root / "train" / name for name in ("0.jpg", "1.jpg", "c"))
        for source, target in ((a, c), (b, a), (c, b)):
            source.rename(target)
    elif change == "edited":
        with Image.open(root / "valannot" / "1.png") as mask:
            changed = np.array(mask)
        changed[-1, -1] = (changed[-1, -1] + 1) % 11
        Image.fromarray(changed).save(root / "valannot" / "1.png")
    train_set, val_set = camvid(root, "train"), camvid(root, "val")
    if change == "fewer":
        train_set.pairs[0] = train_set.pairs[1]
    elif change == "val_fewer":
        del val_set.pairs[1:]
    elif change == "ignore":
        train_set.ignore = 255
    elif change == "stages":
        model.emau.stages = 5
    elif change == "dropout":
        next(module for module in model.modules() if isinstance(module, nn.Dropout2d | nn.Dropout)).p = 0.5
    digest = r"\d+ samples, SHA-256 [0-9a-f]{16}"
    train, val = (rf"a run with {name}_set = {digest}; got {name}_set = {digest}$" for name in ("train", "val"))
    message = {
        "edited": val,
        "val_fewer": val,
        "stages": "a network with emau.stages = 3; got emau.stages = 5$",
        "dropout": r"a network with .*\.p = 0.1; got .*\.p = 0.5$",
    }
    with pytest.raises(ValueError, match=f"last.pt is of {message.get(change, train)}"):
        go_on(model, train_set, val_set)


def test_what_is_told_of_a_network_is_more_than_its_shapes() -> None:
    model = tiny_emanet()
    facts = describe_modules(model)
    assert facts == describe_modules(tiny_emanet().eval())
    expected = {"emau": "EMAUnit", "emau.stages": 3, "backbone.0.stride": (4, 4), "backbone.1.eps": 1e-5}
    assert expected.items() <= facts.items()
    model.emau.gradient = "all"
    assert describe_modules(model) == facts | {"emau.gradient": "all"}


def test_what_is_told_of_a_network_is_not_how_it_runs() -> None:
    model = tiny_emanet()
    facts = describe_modules(model)
    model.emau.compile(backend="eager")
    model.emau(torch.zeros(2, 8, 3, 3))
    model.register_full_backward_hook(lambda *_: None)
    assert describe_modules(model) == facts


def test_a_run_goes_on_from_another_folder_of_the_same_data(streets: Path, tmp_path: Path) -> None:
    train_tiny(streets, tmp_path / "run", interrupt_at=RECIPE.batch)
    shutil.copytree(streets, tmp_path / "moved")
    assert 6 in train_tiny(tmp_path / "moved", tmp_path / "run", resume=True)


def test_a_checkpoint_that_does_not_fit_is_named(streets: Path, tmp_path: Path) -> None:
    train_tiny(streets, tmp_path, interrupt_at=RECIPE.batch)
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    groups = checkpoint["optimizer"]["param_groups"]
    for name, other in (
        ("model", {name: value for name, value in checkpoint["model"].items() if name != "fc2.bias"}),
        ("optimizer", {**checkpoint["optimizer"], "param_groups": groups[:2]}),
        ("optimizer", {}),
    ):
        save_checkpoint(checkpoint | {name: other}, tmp_path / "last.pt")
        with pytest.raises(ValueError, match=rf"^{tmp_path}/last.pt does not fit the {name}: "):
            train_tiny(streets, tmp_path, resume=True)
    poisoned = checkpoint["model"] | {"fc0.bn.running_var": torch.full((8,), torch.inf)}
    save_checkpoint(checkpoint | {"model": poisoned}, tmp_path / "last.pt")  # an earlier version saved such
    with pytest.raises(ValueError, match=r"last.pt must hold a network of finite numbers; fc0.bn.running_var has"):
        train_tiny(streets, tmp_path, resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_a_sentence_also_of_a_worker(streets: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(streets, tmp_path / "data")
    (tmp_path / "data" / "train" / "3.jpg").write_text("no picture")
    dataset, recipe = camvid(tmp_path / "data", "train"), Recipe(steps=9, batch=10, workers=workers)
    with pytest.raises(ValueError, match=rf"^cannot read the image {tmp_path}/data/train/3.jpg: .*[^\n]$") as mistake:
        fit(tiny_emanet(), dataset, camvid(streets, "val"), augmentation((16, 24)), recipe, tmp_path / "run")
    assert "\n" not in str(mistake.value)
    assert not multiprocessing.active_children()


def test_two_trainings_do_not_share_a_folder(streets: Path, tmp_path: Path) -> None:
    train_tiny(streets, tmp_path, interrupt_at=RECIPE.batch)
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / ".best.pt.00ff.part").write_text("of one that was killed")
    with held_elsewhere(tmp_path / ".lock"):
        with pytest.raises(ValueError, match=rf"^another process is writing a run in {tmp_path}: one at a time$"):
            train_tiny(streets, tmp_path, resume=True)
        assert (tmp_path / "last.pt").read_bytes() == before
    assert 6 in train_tiny(streets, tmp_path, resume=True)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


class Disturbed(InterruptedAt):
    """Calls a function when a sample is asked for the n-th time."""

    def __init__(self, dataset: Any, n: int, disturb: Callable[[], object]) -> None:
        super().__init__(dataset, -1)
        self.left, self.disturb = n, disturb

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left == 0:
            self.disturb()
        return self.dataset[index]


@pytest.mark.parametrize("disturbance", ["removed", "replaced", "a file"])
def test_a_folder_that_goes_away_ends_the_run_with_a_sentence(streets: Path, tmp_path: Path, disturbance: str) -> None:
    folder = tmp_path / "run"

    def disturb() -> None:
        shutil.rmtree(folder)
        if disturbance == "replaced":
            folder.mkdir()
        elif disturbance == "a file":
            folder.touch()

    train_set = Disturbed(camvid(streets, "train"), RECIPE.batch, disturb)
    with pytest.raises(ValueError, match=rf"^cannot write .*{folder}"):
        fit(tiny_emanet(), train_set, camvid(streets, "val"), augmentation((16, 24)), RECIPE, folder)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_full_disk_ends_the_run_with_a_sentence_and_leaves_the_old_checkpoint(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tiny(streets, tmp_path / "old", interrupt_at=RECIPE.batch)
    size = (tmp_path / "old" / "last.pt").stat().st_size
    for i, limit in enumerate([0, 50, 300, *(size * part // 10 for part in range(1, 10, 2)), size - 1]):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "old", folder)
        with pytest.raises(ValueError, match=r"^cannot write .*: File too large$"), file_size_limit(limit):
            train_tiny(streets, folder, resume=True)
        assert load_checkpoint(folder / "last.pt")["step"] == 1
    assert "Traceback" not in capsys.readouterr().err


def test_training_learns(streets: Path, tmp_path: Path) -> None:
    recipe = Recipe(steps=60, batch=4, lr=0.1, norm_momentum=0.1, evaluate_every=30)
    fitted = tiny_emanet()
    untrained = mean_iou(evaluate(fitted, camvid(streets, "val")))
    history = fit(
        fitted, camvid(streets, "train"), camvid(streets, "val"), augmentation(SIZE, (1, 1)), recipe, tmp_path
    )
    assert mean_iou(history[60]) > untrained + 0.1


def test_the_groups_are_the_published_ones() -> None:
    model = tiny_emanet()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain, biases = (
        ({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in parameter_groups(model, Recipe())
    )
    assert decayed == (
        {"backbone.0.weight", "fc0.conv.weight", "emau.conv2.0.weight", "fc1.0.conv.weight", "fc2.weight"},
        9e-3,
        1e-4,
    )
    norms = ("backbone.1", "fc0.bn", "emau.conv2.1", "fc1.0.bn")
    assert plain == ({f"{norm}.weight" for norm in norms}, 9e-3, 0)
    assert biases == ({f"{norm}.bias" for norm in (*norms, "backbone.0", "fc2")}, 18e-3, 0)


def test_the_learning_rate_is_poly(streets: Path, tmp_path: Path) -> None:
    train_tiny(streets, tmp_path, interrupt_at=4 * RECIPE.batch)
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    rates = [group["lr"] for group in checkpoint["optimizer"]["param_groups"]]
    assert rates == pytest.approx([factor * 9e-3 * (1 - 4 / 6) ** 0.9 for factor in (1, 1, 2)])


def test_a_sample_depends_on_seed_epoch_and_index_alone(streets: Path) -> None:
    drawn = Drawn(camvid(streets, "train"), augmentation((16, 24)), seed=3)
    image, mask = drawn[1, 4]
    torch.manual_seed(7)
    again, mask_again = drawn[1, 4]
    assert torch.equal(image, again)
    assert torch.equal(mask, mask_again)
    for other in (drawn[2, 4], Drawn(camvid(streets, "train"), augmentation((16, 24)), seed=4)[1, 4]):
        assert not torch.equal(image, other[0])


def test_the_processes_share_each_batch_and_resuming_goes_on() -> None:
    whole = list(Batches(10, 4, 0, 6, seed=1))
    assert len(whole) == 6
    assert all(
        sorted(i for _, i in a + b) == sorted({i for _, i in a + b})
        for a, b in zip(whole[::2], whole[1::2], strict=True)
    )
    assert [{epoch for epoch, _ in batch} for batch in whole] == [{0}, {0}, {1}, {1}, {2}, {2}]
    assert list(Batches(10, 4, 3, 6, seed=1)) == whole[3:]
    shares = [list(Batches(10, 4, 0, 6, seed=1, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]
    with pytest.raises(ValueError, match="from 1 to 10, the number of samples; got 11"):
        Batches(10, 11, 0, 1, seed=0)
    with pytest.raises(ValueError, match="multiple of the 2 processes"):
        Batches(10, 5, 0, 1, seed=0, ranks=2)


def fail_on_the_first_rank() -> None:
    with failing_together():
        if dist.get_rank() == 0:
            raise ValueError("on purpose")


def train_on_a_rank(root: Path, folder: Path) -> dict[str, Any]:
    """A whole run, and one that is interrupted in the first process alone and resumed in both."""
    states = {}
    for name, interrupt_at in (("whole", None), ("resumed", 2 * RECIPE.batch)):
        torch.manual_seed(os.getpid())  # nothing may depend on a process's own generator
        model = tiny_emanet()
        train_set = camvid(root, "train")
        runs = [train_set]
        if interrupt_at is not None:
            runs = [InterruptedAt(train_set, interrupt_at) if dist.get_rank() == 0 else train_set, train_set]
        for samples in runs:
            dist.barrier()  # the checkpoint is the first process's
            history = fit(
                model, samples, camvid(root, "val"), augmentation((16, 24)), RECIPE, folder / name, resume=True
            )
        states[name] = {"state": dict(model.state_dict()), "history": history}
    with pytest.raises(ValueError, match=r"^on purpose$"):
        fail_on_the_first_rank()
    elsewhere = folder / ("whole" if dist.get_rank() == 0 else "another machine's")
    with pytest.raises(ValueError, match=r"a folder that all processes share; they are at the steps \[6, 0\]$"):
        fit(model, train_set, camvid(root, "val"), augmentation((16, 24)), RECIPE, elsewhere, resume=True)
    return states


def test_two_processes_hold_the_same_weights_and_bases_also_when_resumed(streets: Path, tmp_path: Path) -> None:
    first, second = run_on_ranks(partial(train_on_a_rank, streets, tmp_path), 2, tmp_path)
    assert_same(first, second)
    assert_same(first["resumed"], first["whole"])
    before = tiny_emanet().state_dict()
    assert not torch.equal(first["whole"]["state"]["emau.mu"], before["emau.mu"])
    assert_same(dict(load_checkpoint(tmp_path / "whole" / "last.pt")["model"]), first["whole"]["state"])


def look_for_a_download(folder: Path) -> bool:
    """Whether the file was there when this process came; the first one is slow to make it, and then fails."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    with suppress(ValueError), first_process_ahead() as is_first:
        assert is_first == (dist.get_rank() == 0)
        found = (folder / "download").exists()
        if not found:
            time.sleep(0.5)
            (folder / "download").touch()
            raise ValueError("on purpose")
    return found


def test_only_the_first_process_downloads_and_nobody_waits_for_one_that_failed(tmp_path: Path) -> None:
    assert run_on_ranks(partial(look_for_a_download, tmp_path), 2, tmp_path) == [False, True]


def confusion_iou(predictions: list[Tensor], masks: list[Tensor], classes: int) -> list[float]:
    """IoU from 0 to 1, by counting pixels one class after another."""
    prediction, mask = (torch.cat([t.flatten() for t in tensors]) for tensors in (predictions, masks))
    prediction, mask = prediction[mask != 255], mask[mask != 255]
    both = [((prediction == c) & (mask == c)).sum().item() for c in range(classes)]
    either = [((prediction == c) | (mask == c)).sum().item() for c in range(classes)]
    return [b / e if e else float("nan") for b, e in zip(both, either, strict=True)]


def test_iou_is_that_of_counted_pixels(streets: Path) -> None:
    model, dataset = tiny_emanet().train(), camvid(streets, "val")
    iou = evaluate(model, dataset)
    assert model.training
    model.backbone.eval()  # frozen norms stay frozen, also when an image cannot be read
    evaluate(model, dataset)
    dataset.pairs.append((streets / "missing.jpg", streets / "missing.png"))
    with pytest.raises(ValueError, match=r"missing.jpg"):
        evaluate(model, dataset)
    dataset.pairs.pop()
    assert (model.training, model.backbone.training, model.backbone[1].training) == (True, False, False)
    model.eval()
    with torch.no_grad():
        normalised = [train.augmentation(SIZE, (1, 1)).transforms[-1](*sample) for sample in dataset]
        predictions = [model(image[None]).argmax(1)[0] for image, _ in normalised]
    expected = confusion_iou(predictions, [mask for _, mask in dataset], len(CAMVID_NAMES))
    torch.testing.assert_close(iou, torch.tensor(expected), equal_nan=True)
    assert iou_table(("a", "road"), torch.tensor([0.5, float("nan")])) == "a     50.00\nroad    nan\nmean  50.00"


def test_scales_and_flips_are_averaged() -> None:
    model = tiny_emanet().eval()
    image = torch.randn(1, 3, 24, 32)

    def probabilities(x: Tensor) -> Tensor:
        return model(x).softmax(1)

    with torch.no_grad():
        mirrored = probabilities(image.flip(3)).flip(3)
        torch.testing.assert_close(segment(model, image, flip=True), (probabilities(image) + mirrored) / 2)
        half = probabilities(nn.functional.interpolate(image, (12, 16), mode="bilinear", antialias=True))
        half = nn.functional.interpolate(half, (24, 32), mode="bilinear", antialias=True)
        torch.testing.assert_close(segment(model, image, (0.5, 1.0)), (half + probabilities(image)) / 2)


COMMAND = [
    *("--data", "camvid", "--backbone", "resnet18", "--weights-backbone", "none", "--output-stride", "16"),
    *("--stem-channels", "64", "--multi-grid", "1", "2", "--channels", "8", "--num-bases", "4"),
    *("--crop", "33", "33", "--batch", "4", "--evaluate-every", "2"),
]


def test_torchrun_trains_and_evaluate_and_predict_read_what_it_wrote(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = ["--gradient", "all", "--layer-scale", "0.25", "--steps", "2"]
    arguments = [str(folder), "--root", str(streets), *settings, *COMMAND]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, "-m", "examples.emanet.train", *arguments], check=True, env=environment, timeout=120)
    assert load_checkpoint(folder / "last.pt")["step"] == 2
    model, _, names, _ = load_network(folder / "best.pt")
    assert names == CAMVID_NAMES
    assert model.backbone.conv1[6].out_channels == 64
    assert (model.emau.gradient, model.emau.layer_scale) == ("all", 0.25)
    assert [block.conv2.dilation for block in model.backbone.layer4] == [(2, 2), (4, 4)]
    evaluate_command.main([str(folder / "best.pt"), "--data", "camvid", "--root", str(streets), "--split", "test"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("mean")
    with pytest.raises(SystemExit):
        predict.main([str(folder / "best.pt"), str(streets / "test" / "0.jpg"), str(streets / "val" / "0.jpg")])
    assert "images must have names of their own; got 2 called '0'" in capsys.readouterr().err
    predict.main([str(folder / "best.pt"), str(streets / "test" / "0.jpg"), "--output", str(tmp_path / "pictures")])
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["0_attention.png", "0_classes.png"]
    mine = tmp_path / "pictures" / "0_classes.png"
    before = mine.read_bytes()
    images = [str(streets / "test" / "0.jpg"), str(mine)]
    with pytest.raises(SystemExit):
        predict.main([str(folder / "best.pt"), *images, "--output", str(mine.parent)])
    assert f"{mine} is one of the images, and would be written over" in capsys.readouterr().err
    assert mine.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "nowhere"], "nowhere/train, which does not exist"),
        (["--root", "{streets}", "--batch", "11"], "from 1 to 10, the number of samples; got 11"),
        (["--root", "{streets}", "--weights-backbone", "none.pt"], "none.pt"),
        (["--root", "{streets}", "--data", "folder"], "only with it; got --data folder and --classes None"),
        (["--root", "{streets}", "--classes", "FILE"], "only with it; got --data camvid and --classes FILE"),
        (
            ["--root", "{streets}", "--data", "voc", "--size", "9", "9"],
            "--size must not be given with --data voc; got --size 9 9",
        ),
        (["--root", "{streets}", "--steps", "0"], "steps must be at least 1; got 0"),
        (["--root", "{streets}", "--lr", "nan"], "lr must be at least 0; got nan"),
        (["--root", "{streets}", "--norm-momentum", "2"], "norm_momentum must be at most 1; got 2.0"),
        (["--root", "{streets}", "--size", "0", "9"], "size must be a height and a width of at least 1; got (0, 9)"),
        (["--root", "{streets}", "--crop", "9", "0"], "crop must be a height and a width of at least 1; got (9, 0)"),
        (["--root", "{streets}", "--num-bases", "0"], "num_bases must be at least 1; got 0"),
        (["--root", "{streets}", "--channels", "-5"], "channels must be at least 1; got 11 and -5"),
        (
            ["--root", "{streets}", "--multi-grid", "1"],
            "a factor of at least 1 for each of layer4's 2 blocks; got (1,)",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    streets: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(streets=streets) for argument in arguments]
    with pytest.raises(SystemExit) as error:
        train.main([str(tmp_path / "run"), *COMMAND, *filled])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_ones_own_folder_is_trained_on_and_scored_without_writing_python(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, source in (("images", "train"), ("masks", "trainannot")):
        shutil.copytree(streets / source, tmp_path / folder)
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(12))))
    data = ["--data", "folder", "--root", str(tmp_path), "--classes", str(tmp_path / "classes.txt")]
    train.main([str(tmp_path / "run"), *COMMAND, *data, "--steps", "1"])
    assert "8 images to train on, 2 for validation" in capsys.readouterr().out
    evaluate_command.main([str(tmp_path / "run" / "best.pt"), *data])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*map(str, range(12)), "mean"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_mask_is_named_before_the_training(
    split: str, streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(streets, tmp_path / "streets")
    mask = max((tmp_path / "streets" / f"{split}annot").iterdir())
    Image.fromarray(np.full_like(np.array(Image.open(mask)), 77)).save(mask)
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "run"), *COMMAND, "--root", str(tmp_path / "streets")])
    assert f"{mask} must have labels from 0 to 10, or 11 where there is none; got 77" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_validation_without_labels_is_said_to_be_one(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(streets, tmp_path / "streets")
    for mask in (tmp_path / "streets" / "valannot").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(mask)), 11)).save(mask)
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "run"), *COMMAND, "--root", str(tmp_path / "streets"), "--steps", "1"])
    assert "the images for validation must have labels of classes; they have none" in capsys.readouterr().err


def test_a_download_that_fails_names_the_option_that_needs_none(
    streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no connection")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    command = [argument for argument in COMMAND if argument not in ("--weights-backbone", "none")]
    command = [argument for argument in command if argument not in ("--stem-channels", "64")]
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "run"), *command, "--root", str(streets)])
    printed = capsys.readouterr().err
    assert "cannot download the weights of resnet18 (<urlopen error no connection>)" in printed
    assert "--weights-backbone FILE" in printed


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*broken.pt"):
        load_network(broken)
    torch.save([1], broken)
    with pytest.raises(ValueError, match=r"broken.pt must be a checkpoint, a dict; got a list"):
        load_network(broken)
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*missing.pt"):
        load_network(tmp_path / "missing.pt")


def test_pictures_show_image_label_prediction_and_maps(streets: Path) -> None:
    dataset, model = camvid(streets, "val"), tiny_emanet().train()
    image, mask = dataset[0]
    figure = plot_segmentation(model, image, mask, dataset.names, dataset.colours)
    assert model.training
    assert [ax.get_title() for ax in figure.axes] == ["image", "label", "prediction", "emau: largest of 4 bases"]
    label = int(mask[mask != 255][0])
    colour = torch.tensor(dataset.colours[label])
    shown = torch.from_numpy(np.array(figure.axes[1].images[0].get_array()))
    assert (shown[mask == label] == colour).all()
    assert not shown[mask == 255].any()
    overlay = plot_overlay(image, mask.where(mask != 255, 0), dataset.names, dataset.colours)
    shown = torch.from_numpy(np.array(overlay.axes[0].images[0].get_array()))
    expected = ((image[:, mask == label].float() + colour[:, None]) / 2).to(torch.uint8)
    assert torch.equal(shown[mask == label], expected.T)
    shares = [float(text.get_text().split()[-1][:-1]) for text in overlay.legends[0].get_texts()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=1)


def test_a_legend_shows_names_as_they_are_written() -> None:
    names = ("$x^$", "a_b")  # matplotlib takes what is between two $ for a formula, and this is none
    overlay = plot_overlay(
        torch.zeros(3, 8, 8, dtype=torch.uint8), torch.arange(64).reshape(8, 8) % 2, names, ((255, 0, 0), (0, 0, 255))
    )
    overlay.draw_without_rendering()
    assert [text.get_text().split()[0] for text in overlay.legends[0].get_texts()] == list(names)
