"""Where a number was measured: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

import ema_attention


def environment(device: str = "cpu") -> dict[str, object]:
    """What a reader has to know to repeat a measurement or to doubt it."""
    return {
        "machine": machine(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ema_attention": ema_attention.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def machine(device: str = "cpu") -> str:
    """The GPU's name, or the CPU's and its number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)| Processor\b", "", name).strip()
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit that the code is at, and whether it has changed since; "unknown" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" and uncommitted changes" if changed.stdout.strip() else "")
