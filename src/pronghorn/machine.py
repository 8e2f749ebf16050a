"""What this process may use of the machine: memory and processors, as its control groups leave them."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
MOST_THREADS = 256


def usable_processors() -> int:
    """How many threads are worth having: those of the affinity mask, and a control group's quota, rounded up."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min((processors_of(group) for group in groups("cpu")), default=math.inf)
    return max(1, math.ceil(min(there, quota, MOST_THREADS)))


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group where one sets a limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free: float = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = physical_memory() // 2
    free = min(free, *(room_of(group) for group in groups("memory")), math.inf)
    room = resource.getrlimit(resource.RLIMIT_AS)[0]
    if room != resource.RLIM_INFINITY and (statm := Path("/proc/self/statm")).exists():
        free = min(free, room - int(statm.read_text().split()[0]) * resource.getpagesize())
    return max(int(free), 0)


def groups(controller: str) -> list[Path]:
    """The folders of the control groups, of either version, that this process is in, from within outwards."""
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:
        return []  # there are none here
    found: list[Path] = []
    for _, controllers, name in lines:
        if controller in controllers.split(","):  # version 1
            root = GROUPS / controller
        elif not controllers:
            root = GROUPS
        else:
            continue
        parts = name.strip("/").split("/")
        found += [root.joinpath(*parts[:n]) for n in range(len(parts), 0, -1) if parts[0]]
        found.append(root)  # in a container, what is seen as the root may be the group itself
    return found


def processors_of(group: Path) -> float:
    """Processors' worth of time that a control group may take."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # the latter are of version 1
        files = [group / name for name in names]
        if not os.path.exists(files[0]):  # noqa: PTH110 (a start waits for this: it is quicker than an error)
            continue
        try:
            quota, period = (int(word) for file in files for word in file.read_text().split())
            if quota > 0 and period > 0:  # version 1 has -1 for no limit
                return quota / period
        except (OSError, ValueError):  # the root has no limit, nor has "max"
            pass
    return math.inf


def room_of(group: Path) -> float:
    """Bytes that a control group may still take: what it holds of files can be read again, and counts as free."""
    for limit, usage, names in (
        ("memory.max", "memory.current", ("active_file", "inactive_file")),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),  # version 1
    ):
        try:
            room, held = (int((group / name).read_text()) for name in (limit, usage))
            lines = map(str.split, (group / "memory.stat").read_text().splitlines())
            return room - held + sum(int(size) for name, size in lines if name in names)
        except (OSError, ValueError):  # the root has no limit, nor has "max"
            pass
    return math.inf
