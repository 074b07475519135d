"""Where a result was measured, and with which sources."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

from cosattn import bench

ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device) -> dict[str, object]:
    """``cosattn.bench.environment`` and the commit."""
    return bench.environment(device) | {"commit": commit()}


def commit() -> str:
    """The checked-out commit, "-dirty" when files differ from it; COSATTN_COMMIT where there is no repository."""
    if "COSATTN_COMMIT" in os.environ:
        return os.environ["COSATTN_COMMIT"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
