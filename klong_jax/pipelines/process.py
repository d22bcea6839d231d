"""How a process that computes is set up, before its first program is compiled."""

import ctypes
import platform
from pathlib import Path

import jax

# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def prepare_process(folder: Path) -> None:
    """Sets up compilation and memory of a process that works on one run.

    Args:
        folder: The run's folder. Compiled programs are kept there, so that resuming it starts at
            once; not elsewhere, because a program compiled for one machine may not suit another.
    """
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Lets the allocator reuse large buffers instead of handing them back to the kernel.

    On CPU every program allocates its temporaries anew; mapping and zeroing their pages again and
    again takes a fifth of a training step's time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 << 20)
    # Only the main arena holds buffers of any size.
    mallopt(_M_ARENA_MAX, 1)
