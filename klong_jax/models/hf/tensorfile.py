"""The safetensors format, a tensor at a time: lazy slices when reading, a stream when writing.

The safetensors library writes what is all in memory, and reads into NumPy only the dtypes that
NumPy has. Here a file may be larger than the host, and tensors that are passed on untouched may be
of any kind, since bytes are enough for them.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from klong_jax.core.errors import UserError

Index = tuple[slice, ...]
Bytes = bytes | memoryview

_LARGEST_HEADER = 100 << 20  # what the safetensors library accepts
_CHUNK = 16 << 20
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""How safetensors spells the dtypes that are computed with."""


class Writable(Protocol):
    """A tensor that can be written: its header entry, and its bytes when they are asked for."""

    @property
    def name(self) -> str:
        """Its name in the file."""
        ...

    @property
    def kind(self) -> str:
        """Its dtype as safetensors spells it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        ...

    @property
    def size(self) -> int:
        """How many bytes."""
        ...

    def chunks(self) -> Iterable[Bytes]:
        """All its bytes in order."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: Its name in the file.
        file: The file.
        kind: Its dtype as safetensors spells it.
        shape: Its dimensions.
        offset: Where its bytes begin in the file.
        size: How many bytes.
    """

    name: str
    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype to compute with.

        Raises:
            UserError: It is no floating-point number of 16 bits or more.
        """
        if self.kind not in DTYPES:
            raise UserError(
                f"{self.file}: {self.name} is stored as {self.kind}; give weights that are not "
                f"quantised ({', '.join(DTYPES)})."
            )
        return DTYPES[self.kind]

    def read(self, index: Index) -> np.ndarray:
        """A copy of a slice; nothing else of the file is read, nothing stays mapped."""
        mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        return np.array(mapped[index])

    def chunks(self) -> Iterable[Bytes]:
        """All its bytes, whatever they mean."""
        with self.file.open("rb") as handle:
            handle.seek(self.offset)
            for start in range(0, self.size, _CHUNK):
                yield handle.read(min(_CHUNK, self.size - start))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a file holds, by name; no tensor is read.

    Raises:
        UserError: The file is cut short, or is no safetensors file.
    """
    length = path.stat().st_size
    with path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        if not 2 <= size <= min(_LARGEST_HEADER, length - 8):
            raise UserError(
                f"{path}: is cut short within its header, or no safetensors file; fetch it again."
            )
        text = handle.read(size)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {name: _entry(path, 8 + size, name, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: its safetensors header is garbled; fetch it again.") from None
    for tensor in found.values():
        if tensor.offset + tensor.size > length:
            raise UserError(
                f"{path}: is cut short: {tensor.name} ends at byte {tensor.offset + tensor.size} "
                f"of {length}; fetch the file again."
            )
    return found


def _entry(path: Path, base: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    tensor = StoredTensor(name, path, entry["dtype"], shape, base + start, end - start)
    if not all(isinstance(number, int) and number >= 0 for number in (start, end, *shape)):
        raise ValueError
    if tensor.kind in DTYPES and tensor.size != prod(shape) * tensor.dtype.itemsize:
        raise ValueError
    return tensor


def write_tensors(
    path: Path, tensors: Sequence[Writable], on_tensor: Callable[[Writable], None]
) -> None:
    """Writes one file, holding one tensor at a time.

    Args:
        path: The file.
        tensors: What it is to hold.
        on_tensor: Called with each tensor once it is written.

    Raises:
        UserError: The disk refuses; names the file and the tensor.
    """
    # Wide elements first, so that each tensor lies at a multiple of its element's size.
    ordered = sorted(tensors, key=lambda one: (-(one.size // max(prod(one.shape), 1)), one.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.size
        entry = {"dtype": tensor.kind, "shape": tensor.shape, "data_offsets": (start, end)}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    name = "the header"
    try:
        with path.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for tensor in ordered:
                name = tensor.name
                for chunk in tensor.chunks():
                    handle.write(chunk)
                on_tensor(tensor)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: {name} cannot be written ({error.strerror}); free space or choose another "
            "output."
        ) from None
