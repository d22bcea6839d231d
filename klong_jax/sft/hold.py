"""Who uses a corpus: those that make or read it share a hold on it, what removes it holds it alone.

The kernel lets go of a hold however a process ends.
"""

import errno
import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path

from klong_jax.core.errors import UserError

IN_USE = ".use"
"""A file in a corpus's folder, touched whenever the corpus is opened."""


class Hold:
    """A lock on a corpus's folder, until it is let go of or nobody refers to it any more."""

    def __init__(self, lock: int) -> None:
        """Takes over an open lock file."""
        self.release = weakref.finalize(self, os.close, lock)


def hold(folder: Path) -> Hold:
    """Keeps a corpus from being removed; its folder is made if it is not there.

    Raises:
        UserError: The disk refuses.
    """
    while True:
        try:
            lock = _open(folder)
            with suppress(PermissionError):  # another user's, that may only be read
                os.utime(lock)
        except FileNotFoundError:  # it was removed while it was opened
            continue
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); free space or choose another "
                "folder."
            ) from None
        held = Hold(lock)
        fcntl.flock(lock, fcntl.LOCK_SH)
        # Whoever removed the folder meanwhile removed this lock, which then keeps nobody out.
        if _stands(folder, lock):
            return held
        held.release()


def hold_alone(folder: Path) -> Hold | None:
    """Keeps everybody out of a corpus; None if somebody uses it, or it is not there or not ours."""
    try:
        lock = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None
    held = Hold(lock)
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _stands(folder, lock):
            return held
    held.release()
    return None


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS):
            raise
    # What lies where nothing can be written can be read.
    return os.open(folder / IN_USE, os.O_RDONLY)


def _stands(folder: Path, lock: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder / IN_USE), os.fstat(lock))
    except OSError:
        return False
