"""Compiling a program for chips that are not here, and what the compiler says of its memory.

The compiler writes a report of every buffer whether the program fits or not, so one that is refused
is explained as well as one that is accepted.
"""

import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from klong_jax.parallel.hlo import Collective, collectives

_ASSIGNMENT = "after_optimizations-buffer-assignment.txt"
_REPORT = "after_optimizations-memory-usage-report.txt"
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Buffer:
    """A piece of memory.

    Attributes:
        size: Bytes.
        holds: Shapes of what lives there, one after the other.
        made_by: The operation in the model's code that fills it, where the compiler tells.
    """

    size: int
    holds: str
    made_by: str


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        arguments: What is there before.
        outputs: What is there after and was not before.
        temporaries: What is there meanwhile.
        code: The program itself.
        total: All of it, as the compiler lays it out.
        largest: The largest buffers.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    total: int
    largest: tuple[Buffer, ...]


@dataclass(frozen=True)
class Program:
    """A program that was compiled, or refused because its memory does not suffice.

    Attributes:
        memory: Of one device.
        collectives: What it sends between devices.
        refused: What the compiler said; empty if it compiled.
        seconds: How long compilation took.
        output_shardings: Where its results live; None if it was refused.
    """

    memory: Memory
    collectives: tuple[Collective, ...]
    refused: str
    seconds: float
    output_shardings: Any


def compile_ahead(lowered: Any, mesh: Mapping[str, int]) -> Program:
    """Compiles a lowered program and reads what the compiler says.

    Args:
        lowered: What `jax.jit(f).lower(...)` gives for arguments on a mesh of absent devices.
        mesh: Names and sizes of the mesh's axes.

    Raises:
        jax.errors.JaxRuntimeError: It cannot be compiled for a reason other than memory.
    """
    started = time.monotonic()
    refused, code, places = "", 0, None
    with tempfile.TemporaryDirectory(prefix="klong-aot-") as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
            code = compiled.memory_analysis().generated_code_size_in_bytes
            places = compiled.output_shardings
        except jax.errors.JaxRuntimeError as error:
            # Without a report it was refused before memory was laid out, for something else.
            if not exhausted(error) or not _files(folder, _REPORT):
                raise
            refused = str(error).splitlines()[0].partition(": ")[2]
        text = _read(folder, "after_optimizations.txt")
        memory = _memory(_read(folder, _ASSIGNMENT), _read(folder, _REPORT), text, code)
    seconds = time.monotonic() - started
    return Program(memory, tuple(collectives(text, mesh)), refused, seconds, places)


def exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether it says that memory does not suffice."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _files(folder: str, ending: str) -> list[Path]:
    return sorted(Path(folder).glob(f"*.{ending}"), key=lambda path: path.stat().st_size)


def _read(folder: str, ending: str) -> str:
    # A program may hold others, such as constants that are folded; the largest is the program.
    files = _files(folder, ending)
    if not files:
        raise ValueError(f"the compiler wrote no {ending}")
    return files[-1].read_text()


def _memory(assignment: str, report: str, text: str, code: int) -> Memory:
    arguments = outputs = 0
    for line in re.findall(r"^allocation \d+: .*$", assignment, re.MULTILINE):
        found = re.search(r"size (\d+)", line)
        size = int(found[1]) if found else 0
        # Memory spaces other than the default one are on the chip or on the host.
        if re.search(r"color [1-9]", line):
            continue
        if "parameter " in line:
            arguments += size
        elif "maybe-live-out" in line:
            outputs += size
    default = re.search(r"Memory Space: default.*?(?=^Memory Space|\Z)", report, re.M | re.S)
    section = default[0] if default else ""
    stated = re.search(r"Total bytes: (\d+)", section)
    total = int(stated[1]) if stated else 0
    return Memory(
        arguments=arguments,
        outputs=outputs,
        temporaries=max(0, total - arguments - outputs),
        code=code,
        total=total + code,
        largest=_largest(section, text),
    )


def _largest(section: str, text: str, count: int = 8) -> tuple[Buffer, ...]:
    makers = _makers(text)
    rows = re.findall(r"%\);\s+([\d.]+)(\w+);\s+\d+;\s+\d+; (.*)$", section, re.MULTILINE)
    buffers = []
    for number, unit, shapes in rows:
        size = int(float(number) * _UNITS[unit])
        arrays = re.findall(r"\w+\[[\d,]*\]", shapes)
        made_by = next((makers[array] for array in arrays if array in makers), "")
        buffers.append(Buffer(size, shapes.strip(), made_by))
    return tuple(sorted(buffers, key=lambda buffer: -buffer.size)[:count])


def _makers(text: str) -> dict[str, str]:
    """For each shape, an operation of the model's code that makes an array of it."""
    makers: dict[str, str] = {}
    line = r"= (\w+\[[\d,]*\])[^=]*?\(.*op_name=\"([^\"]+)\""
    for shape, name in re.findall(line, text):
        makers.setdefault(shape, name.replace("\\'", "'"))
    return makers
