"""Processes join when the environment says that there are several, and misfits are named."""

import asyncio
import subprocess
import sys
from collections.abc import Callable

import pytest

from klong_jax.core.errors import UserError
from klong_jax.parallel.distributed import from_first, settled, start_processes, together


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_NTASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}],
)
def test_one_process_starts_alone(environment: dict[str, str]) -> None:
    start_processes(environment=environment)


def test_a_coordinator_without_number_or_count_of_processes_is_refused() -> None:
    address = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
    with pytest.raises(UserError, match=r"JAX_NUM_PROCESSES=\(nothing\)"):
        start_processes(environment=address)
    with pytest.raises(UserError, match="JAX_PROCESS_ID=first"):
        start_processes(environment=address | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "first"})
    with pytest.raises(UserError, match="JAX_PROCESS_ID=2: must be below JAX_NUM_PROCESSES=2"):
        start_processes(environment=address | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"})


def test_a_cluster_that_is_not_there_is_one_sentence() -> None:
    # In a process that has computed nothing yet, as JAX insists.
    program = (
        "from klong_jax.parallel.distributed import start_processes\n"
        "start_processes(cluster=True, environment={})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "UserError: processes: JAX finds no cluster here" in done.stderr


def test_one_process_keeps_what_it_makes_and_hears_its_own_errors() -> None:
    def fail() -> int:
        raise UserError("no")

    async def work(action: Callable[[], int]) -> int:
        return action()

    for share in (from_first, together):
        assert share(lambda: 3) == 3
        assert share(asyncio.run(settled(work(lambda: 3)))) == 3
        with pytest.raises(UserError, match="no"):
            share(asyncio.run(settled(work(fail))))
