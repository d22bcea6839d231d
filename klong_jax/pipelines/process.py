"""How a process that computes is set up, before its first program is compiled."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from klong_jax.kernels.backend import use_kernels
from klong_jax.parallel.distributed import is_first
from klong_jax.parallel.mesh import make_mesh
from klong_jax.parallel.rules import TRAINING, ShardingRules, use_mesh
from klong_jax.pipelines.config.pods import KernelsSection, MeshSection

# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def device_mesh(section: MeshSection) -> Mesh:
    """The mesh of the settings, over all devices of all processes.

    Raises:
        UserError: It takes another number of devices.
    """
    return make_mesh(section.shape(jax.device_count()))


@contextmanager
def computing(
    mesh: Mesh, kernels: KernelsSection, rules: ShardingRules = TRAINING
) -> Iterator[None]:
    """Makes mesh and kernels those of the programs that this thread traces inside."""
    with use_mesh(mesh, rules), use_kernels(**kernels.chosen()):
        yield


def open_console() -> Console:
    """Where the first process talks to a person; the others keep quiet."""
    return Console(quiet=not is_first())


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
