"""What a run uses of things that no kernel limit bounds as a whole: memory of several processes, files in a folder."""

from __future__ import annotations

import contextlib
import os
import threading
import time

from recipes.sandbox import launch, levels

LOOK_S = 0.1
"""How often a run's memory, files and cancellation are looked at."""
MAX_FILES = 5000
"""Files of a run, looked at every `LOOK_S`: an empty file, too, takes a kilobyte of the kernel's memory."""

_table_lock = threading.Lock()
_table: tuple[float, list[tuple[int, int, int, int]]] = (0.0, [])


def process_table() -> list[tuple[int, int, int, int]]:
    """(pid, parent, user, threads) of all processes, at most `LOOK_S` old: all runs look at one copy."""
    global _table
    with _table_lock:
        if time.monotonic() - _table[0] > LOOK_S * 0.9:
            _table = (time.monotonic(), list(launch.processes()))
        return _table[1]


def resident(pid: int) -> int:
    """Bytes of memory a process has in RAM; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def many_files(pid: int, size: int) -> bool:
    """Whether the folder in memory, of `size` bytes, that a process inside bubblewrap sees holds more than `MAX_FILES`."""
    with contextlib.suppress(OSError):
        seen = os.statvfs(f"/proc/{pid}/root{levels.WORK}")
        ours = seen.f_blocks * seen.f_frsize == size  # until bubblewrap has moved in, the path leads into the machine's own files
        return ours and seen.f_files - seen.f_ffree > MAX_FILES
    return False


def larger(folder: str, size: int) -> bool:
    """Whether the files under `folder` take more than `size` bytes on disk or are more than `MAX_FILES`."""
    count = 0
    for root, folders, files in os.walk(folder):
        count += len(folders) + len(files)
        for name in files:
            with contextlib.suppress(OSError):
                size -= os.lstat(os.path.join(root, name)).st_blocks * 512
        if size < 0 or count > MAX_FILES:
            return True
    return False
