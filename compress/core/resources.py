"""What this machine has left: memory and disk space."""

import re
import shutil
from pathlib import Path

import psutil

from compress.core.errors import InputError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
CGROUPS = Path("/sys/fs/cgroup")
MOST_FILES = 65536  # a connection is an open file


def free_memory() -> int:
    """Bytes that this process may still use without swapping: the system's, or its cgroup's."""
    return min([psutil.virtual_memory().available, *_free_in_cgroups()])


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def raise_file_limit() -> None:
    """Let the process have as many files open as it is allowed to, within reason."""
    import resource  # not on every system, and only servers and their clients need it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


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


def parse_size(value: int | str) -> int:
    """Bytes from a number with or without a unit: `500MB`, `2GB`, `1.5GiB`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", str(value).lower())
    if not found:
        raise InputError(f"'{value}' is no size; give a number and a unit, such as 500MB or 2GiB")
    return int(float(found[1]) * UNITS[found[2]])


def in_words(count: float) -> str:
    """Bytes for people: `1.5 GB`, `37 MB`."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"
