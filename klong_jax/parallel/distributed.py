"""Starting one program on many hosts: every process runs the same code on the same plan.

Nothing in the control flow may depend on the host. What a step trains on follows from seed and step
alone, so every host lays out the same batch and gives its devices their parts of it; denominators,
logs and decisions come out the same everywhere. What only one process may do, such as holding a
lock, the first does and tells the others.
"""

import os
import pickle
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import multihost

from klong_jax.core.errors import UserError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Set by what starts processes on many hosts; JAX finds the rest by itself.
_CLUSTERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")

_LONGEST = 2000  # bytes of an error's sentence
_PATIENCE_MS = 30 * 24 * 3600 * 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Which of a run's processes this is.

    Attributes:
        coordinator: HOST:PORT of the first process.
        count: How many there are.
        index: Which one this is, from 0.
    """

    coordinator: str
    count: int
    index: int


def start_processes(
    place: Place | None = None,
    *,
    cluster: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the processes of a run, if there are several; call it before anything else of JAX.

    Slurm, Open MPI and Kubernetes TPU pods are recognised by the environment; elsewhere set
    JAX_COORDINATOR_ADDRESS (HOST:PORT of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    A process that has joined already stays where it is.

    Args:
        place: Which process this is, if that was said.
        cluster: Let JAX find the others: the hosts of a Cloud TPU pod know of each other from a
            metadata server only.
        environment: The environment.

    Raises:
        UserError: The three variables are not all there or are no numbers, or there is no cluster.
    """
    if jax.distributed.is_initialized():
        return
    # It would swallow SIGTERM and have Orbax wait for a step that training may never save.
    jax.config.update("jax_enable_preemption_service", False)
    if place is None and _ADDRESS in environment:
        count, index = _number(environment, _COUNT), _number(environment, _INDEX)
        if not 0 <= index < count:
            raise UserError(f"{_INDEX}={index}: must be below {_COUNT}={count}.")
        place = Place(environment[_ADDRESS], count, index)
    if place is not None:
        jax.distributed.initialize(place.coordinator, place.count, place.index)
    elif cluster or _several(environment):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise UserError(
                f"processes: JAX finds no cluster here ({error}); give processes.coordinator, "
                "processes.count and processes.index, or leave out processes.cluster."
            ) from None


def is_first() -> bool:
    """Whether this process prints, locks and writes for all."""
    return jax.process_index() == 0


def from_first(action: Callable[[], T]) -> T:
    """What an action gives on the first process, which alone runs it; must be picklable.

    Raises:
        UserError: The action did; every process raises the same.
    """
    if jax.process_count() == 1:
        return action()
    given = together(lambda: pickle.dumps(action()) if is_first() else b"")
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(given))))
    held = np.zeros(size, np.uint8)
    if is_first():
        held[:] = np.frombuffer(given, np.uint8)
    told: T = pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(held)).tobytes())
    return told


def together(action: Callable[[], T]) -> T:
    """Runs an action on every process; if one cannot, no process goes on without it.

    However long it takes on one, the others wait.

    Raises:
        UserError: The action did on some process; every process raises what the first of these
            said.
    """
    if jax.process_count() == 1:
        return action()
    try:
        done, said = action(), b""
    except UserError as error:
        said = str(error).encode()[:_LONGEST]
    # Waiting in a collective would run into its timeout, which is made for seconds, not hours.
    multihost.get_barrier_sync_fn()(key="klong", timeout_ms=_PATIENCE_MS)
    row = np.frombuffer(said.ljust(_LONGEST), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    for row in rows:
        if failed := row.tobytes().decode(errors="replace").strip():
            raise UserError(failed)
    return done


def any_process(said: bool) -> bool:
    """Whether it is so on any process; a collective of a byte, which all take part in."""
    if jax.process_count() == 1:
        return said
    return bool(np.any(multihost_utils.process_allgather(np.bool_(said))))


async def settled(work: Awaitable[T]) -> Callable[[], T]:
    """Waits for work; what it gives, or its UserError, comes when all can hear of it."""
    try:
        value = await work
    except UserError as error:
        return partial(_raise, error)
    return lambda: value


def _raise(error: UserError) -> NoReturn:
    raise error


def own_part(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Arrays of a mesh as arrays of the part of it that is this process's; all processes call it.

    Args:
        tree: The arrays.
        mesh: The mesh.
        specs: A PartitionSpec for each, which must leave what this process holds whole.
    """
    if jax.process_count() == 1:
        return tree
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    moved = jax.jit(lambda tree: tree, out_shardings=shardings)(tree)
    return multihost_utils.global_array_to_host_local_array(moved, mesh, specs)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise UserError(
            f"{name}={text or '(nothing)'}: {_ADDRESS} is set, so give {name} as a number too."
        )
    return int(text)


def _several(environment: Mapping[str, str]) -> bool:
    counts = [environment.get(name, "") for name in _CLUSTERS]
    if any(text.isdecimal() and int(text) > 1 for text in counts):
        return True
    return any("," in environment.get(name, "") for name in _HOSTS)
