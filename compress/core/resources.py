"""What this machine has left: memory and disk space."""

import shutil
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that this process may still use without swapping: the system's, or its cgroup's."""
    return min([psutil.virtual_memory().available, *_free_in_cgroups()])


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _free_in_cgroups() -> list[int]:
    """What each limited cgroup (version 2) around this process has left; page cache is free."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
    except OSError:
        return []
    free = []
    group = CGROUPS / own.lstrip("/")
    for folder in (group, *group.parents):
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            counts = dict(
                line.split() for line in (folder / "memory.stat").read_text().splitlines()
            )
            if limit != "max":
                free.append(max(0, int(limit) - used + int(counts["file"])))
        except (OSError, ValueError, KeyError):
            continue  # not limited, or not a version 2 group
    return free


def in_words(count: float) -> str:
    """Bytes for people: `1.5 GB`, `37 MB`."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"
