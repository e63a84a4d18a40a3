"""Checkpoints that are right or refused, whatever happens to their files; and one writer at a time."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples._common import locks
from examples._common.files import load_checkpoint, remove_parts, save_checkpoint, written_whole
from examples._common.locks import held
from examples._common.weights import read_weights
from tests.trouble import file_size_limit, held_elsewhere

CHECKPOINT = {"model": {"weight": torch.arange(20.0), "bias": torch.ones(4)}, "step": 3, "names": ("a", "b")}
FLIPS = None if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 400
"""How many bits are flipped, one at a time; None for all."""


def is_right(checkpoint: object) -> bool:
    return str(checkpoint) == str(CHECKPOINT)


@pytest.mark.parametrize("save", [save_checkpoint, torch.save])  # torch.save: of earlier versions, and published ones
def test_no_flipped_bit_is_loaded_as_other_weights(save, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save(CHECKPOINT, path)
    content = path.read_bytes()
    assert is_right(load_checkpoint(path))
    bits = random.Random(0).sample(range(8 * len(content)), 8 * len(content))[:FLIPS]
    folder_flags = [8 * (at + 38) + 4 for at in range(len(content)) if content.startswith(b"PK\x01\x02", at)]
    refused = 0
    for bit in bits + folder_flags:  # a record that is marked as a folder leaves its tensor's memory as it was
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            checkpoint = load_checkpoint(path)
        except ValueError:
            refused += 1
        else:
            assert is_right(checkpoint), f"bit {bit}"
    # a digest is of every byte; without one, bits that mean nothing may be any
    assert refused >= (0.98 if save is save_checkpoint else 0.4) * len(bits)


def test_weights_of_backbones_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(100)}, path)
    content = bytearray(path.read_bytes())
    content[content.find(bytes(400)) + 203] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the checkpoint {path}"):
        read_weights(path)


def test_a_checkpoint_is_read_by_torch_load_and_one_without_a_zip_file_by_us(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(CHECKPOINT, path)
    assert is_right(torch.load(path, weights_only=True))
    torch.save(CHECKPOINT, path, _use_new_zipfile_serialization=False)  # PyTorch before 1.6
    assert is_right(load_checkpoint(path))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.9, 0.99])
def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, part: float) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(CHECKPOINT, path)
    larger = {"small": torch.randn(2000), "large": torch.randn(4000)}  # PyTorch's writer says other things in the large
    save_checkpoint(larger, tmp_path / "larger.pt")
    size = (tmp_path / "larger.pt").stat().st_size
    with (
        pytest.raises(ValueError, match=rf"^cannot write {path}: File too large$"),
        file_size_limit(int(part * size)),
    ):
        save_checkpoint(larger, path)
    assert is_right(load_checkpoint(path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "larger.pt"]


def test_an_error_that_has_no_number_is_said_too(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=rf"^cannot write {tmp_path}/a.gif: encoder error -2$"),
        written_whole(tmp_path / "a.gif"),
    ):
        raise OSError("encoder error -2")  # as Pillow does


def test_two_that_write_one_file_do_not_write_into_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as one, written_whole(path) as other:
        one.write(b"one " * 1000)
        other.write(b"other")
    assert path.read_bytes() == b"one " * 1000
    with pytest.raises(KeyError), written_whole(path) as file:
        file.write(str({}["missing"]).encode())
    assert path.read_bytes() == b"one " * 1000
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(ValueError, match=f"^cannot write {path}: it is there, and no file$"), written_whole(path):
            pass
    assert pipe.is_fifo()


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    with written_whole(tmp_path / "link") as file:
        file.write(b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_lock_is_one_process_s_and_dies_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    with held_elsewhere(lock):
        (tmp_path / "link").symlink_to("run")
        for path in (lock, tmp_path / "link" / ".lock"):
            with pytest.raises(ValueError, match=r"^another process is writing a run: one at a time$"):
                held(path, "a run").__enter__()
    assert lock.exists()
    with held(lock, "a run") as is_held:
        assert is_held()
        lock.with_name(".last.pt.00ff.part").touch()
        remove_parts(lock.with_name("last.pt"))
        assert [path.name for path in lock.parent.iterdir()] == [".lock"]
        lock.unlink()
        assert not is_held()
        lock.touch()
        assert not is_held()
    assert lock.exists()  # it may be another's
    with held(lock, "a run"):
        pass
    assert not lock.exists()
    with (
        pytest.raises(ValueError, match=r"^cannot write .*test_checkpoints.py/.lock: "),
        held(Path(__file__, ".lock"), "a run"),
    ):
        pass


def test_a_drive_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_lock", fail)
    message = rf"^cannot lock {tmp_path}/.lock \(No locks available\): start nothing else that writes a run$"
    with pytest.warns(UserWarning, match=message), held(tmp_path / ".lock", "a run") as is_held:
        assert is_held()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_its_holder_has_just_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, real = tmp_path / ".lock", locks._lock

    def late(file: object) -> None:
        monkeypatch.setattr(locks, "_lock", real)
        lock.unlink()
        real(file)

    monkeypatch.setattr(locks, "_lock", late)
    with held(lock, "a run") as is_held:
        assert is_held()


KILLED = """
import os, signal, sys
from pathlib import Path
from examples._common.files import written_whole
with written_whole(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_a_file_is_written_leaves_the_old_one_and_what_is_removed_later(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(CHECKPOINT, path)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(path)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(link)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert is_right(load_checkpoint(path))
    assert len(list(tmp_path.iterdir())) == 3
    remove_parts(link)
    assert sorted(tmp_path.iterdir()) == [link.parent, path]
