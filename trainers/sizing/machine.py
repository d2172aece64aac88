"""How much memory a process may have of its machine."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def machine_memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process's control group, or one around it, allows; the machine's where none says."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *_limits(cgroups, own)])


def _limits(cgroups: Path, own: Path) -> Iterator[int]:
    """Version 2 has a file in every group, version 1 one in a container's."""
    line = next((line for line in _read(own).splitlines() if line.startswith("0::")), "0::/")
    group = Path(line.removeprefix("0::").strip("/"))
    files = [cgroups / part / "memory.max" for part in (group, *group.parents)]
    for file in (*files, cgroups / "memory" / "memory.limit_in_bytes"):
        text = _read(file).strip()
        if text.isdecimal():
            yield int(text)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
