"""How much memory programs may take here."""

import os
from pathlib import Path

import jax

# What a control group may take, by its two versions; more than the machine has stands for no limit.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory() -> int:
    """Bytes that the processes of this host may take: the machine's, or its control group's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in map(Path, _LIMITS):
        limit = path.read_text().strip() if path.exists() else ""
        if limit.isdecimal():
            total = min(total, int(limit))
    return total


def free_memory() -> int | None:
    """Bytes that are free on the fullest device of this process; None if devices do not tell.

    CPU devices share the host's memory; there only what arrays hold is taken.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        shards = [shard for array in jax.live_arrays() for shard in array.addressable_shards]
        return (host_memory() - sum(shard.data.nbytes for shard in shards)) // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in one for one in stats):
        return None
    return min(int(one["bytes_limit"] - one["bytes_in_use"]) for one in stats)
