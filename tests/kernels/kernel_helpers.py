"""What the tests of kernels share: float64 truth, errors, memory, several devices."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from simulated import devices

Arrays = Sequence[np.ndarray]


def value_and_gradients(
    function: Callable[..., Any], arguments: Arrays, cotangent: np.ndarray, *, dtype: str
) -> list[np.ndarray]:
    """The output and the gradients of all arguments, computed in a dtype."""
    with jax.enable_x64(dtype == "float64"):
        inputs = [jnp.asarray(each, dtype) for each in arguments]

        @jax.jit
        def run(inputs: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
            out, pull = jax.vjp(function, *inputs)
            return out, *pull(cotangent.astype(out.dtype))

        return [np.asarray(each) for each in run(inputs, jnp.asarray(cotangent, dtype))]


def assert_close(got: Arrays, want: Arrays, tolerance: float) -> None:
    """Equal up to a fraction of the greatest entry, and finite."""
    for one, other in zip(got, want, strict=True):
        assert np.isfinite(one).all()
        scale = max(1.0, float(np.abs(other).max(initial=0)))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def temporaries(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> int:
    """Bytes that the compiled function needs beside its arguments and results."""
    analysis = jax.jit(function).lower(*shapes).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def on_eight_devices(script: str) -> str:
    """What a script beside this file prints in a process with eight simulated devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": devices(8),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
