"""What TPU chips can do, and slices of them that need not be here.

Peak rates and memory are Google Cloud's (cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e). The rate
of an inter-chip link is one direction of one link, from the table of "How to Scale Your Model"
(jax-ml.github.io/scaling-book/tpus). Usable memory is what libtpu's compiler names when a program
asks for too much: the chip's, less what the runtime keeps.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any

from jax.experimental import topologies

from klong_jax.core.errors import UserError

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One generation.

    Attributes:
        name: As in "v5p".
        hbm_bytes: Memory that a program can use.
        flops: bf16 operations a second.
        hbm_rate: Bytes a second of memory.
        link_rate: Bytes a second of one inter-chip link in one direction.
        dimensions: Of the torus.
        wrap: A dimension whose size is a multiple of this is a ring; a shorter one is a line.
        largest: Chips of the largest slice that is offered.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_rate: float
    link_rate: float
    dimensions: int
    wrap: int
    largest: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * _GIB), 275e12, 1228e9, 45e9, 3, 4, 4096),
        Chip("v5e", int(15.75 * _GIB), 197e12, 819e9, 45e9, 2, 16, 256),
        Chip("v5p", int(95.74 * _GIB), 459e12, 2765e9, 90e9, 3, 4, 6144),
        Chip("v6e", int(31.25 * _GIB), 918e12, 1638e9, 90e9, 2, 16, 256),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice, such as v5p:4x8x8.

    Attributes:
        chip: The generation.
        shape: Chips along each dimension of the torus.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list[Any]:
        """Stand-ins for its chips: programs can be compiled for them but not run.

        Raises:
            UserError: libtpu is missing, or knows no such slice.
        """
        # Without these libtpu asks the cloud's metadata server which machine it is on.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # Nothing runs on a TPU here, so several processes may compile at once.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # A v4 chip's two cores act as one.
        extra = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
        if find_spec("libtpu") is None:
            raise UserError("topology: compiling for TPUs needs libtpu; install klong-jax[tpu].")
        try:
            found = topologies.get_topology_desc(str(self), platform="tpu", **extra)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"topology={self}: libtpu refuses it ({reason}).") from None
        return list(found.devices)


def parse_topology(text: str) -> Topology:
    """Reads "v5p:4x8x8".

    Raises:
        UserError: It is none.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    chip = CHIPS.get(found[1]) if found else None
    shape = tuple(int(size) for size in found[2].split("x")) if found else ()
    if chip is None or len(shape) != chip.dimensions or min(shape) < 1:
        raise UserError(
            f"topology={text}: write a generation and the chips along each dimension, as in "
            f"v5p:4x8x8 or v5e:8x8; generations are {', '.join(CHIPS)}."
        )
    return Topology(chip, shape)


def family(chip: Chip) -> Iterator[Topology]:
    """The slices of a generation whose sizes are powers of two, from the smallest up."""
    shape = [2] * chip.dimensions
    while prod(shape) <= chip.largest:
        yield Topology(chip, tuple(shape))
        # The last of the smallest dimensions doubles: 2x2x2, 2x2x4, 2x4x4, 4x4x4.
        place = max(index for index, size in enumerate(shape) if size == min(shape))
        shape[place] *= 2
