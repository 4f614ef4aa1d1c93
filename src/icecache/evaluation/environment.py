"""The stamp of a run: on what its figures were made."""

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import icecache

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Return versions, commit, processor and time."""
    return {
        "icecache": icecache.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Return the checkout's commit, with + for changes; "unknown" outside of one."""
    folder = Path(__file__).parent
    found = [
        subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "."])
    ]
    if found[0].returncode:
        return "unknown"
    return found[0].stdout.strip() + ("+" if found[1].stdout.strip() else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
