"""A run's folder: its name, its lock, and the stages it has been through.

The name follows from the settings, so the same command resumes its run and changed settings never
mix with it; on what it computes may change. Whatever a stage leaves behind is complete once its
marker exists.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from klong_jax.core.errors import Preempted, UserError
from klong_jax.core.jsonio import Json, content_hash, read_json, write_json
from klong_jax.parallel.distributed import from_first, together
from klong_jax.pipelines.config.acting import RunSection
from klong_jax.pipelines.config.section import Section

_LOCK = ".lock"
_CIRCUMSTANCES: dict[str, bool | set[str]] = {
    **dict.fromkeys(("run", "processes", "mesh", "kernels"), True),
    "sft": {"save_every", "keep_last", "keep_best", "log_to"},
    "rl": {"log_to"},
}
"""What says where a run computes and what it shows and keeps: it may change between starts."""


@dataclass(frozen=True)
class RunDir:
    """A run's folder, held by this process or, if there are several, by the first.

    Attributes:
        path: The folder.
        run_id: Its name.
    """

    path: Path
    run_id: str

    def done(self, stage: str) -> Json | None:
        """What `mark` was given for a stage, or None if the stage is not complete."""
        marker = self._marker(stage)
        return read_json(marker) if marker.exists() else None

    def mark(self, stage: str, payload: dict[str, Json]) -> None:
        """Records that a stage is complete; the last thing that a stage does."""
        write_json(self._marker(stage), payload)

    def _marker(self, stage: str) -> Path:
        if not re.fullmatch(r"[\w.-]+", stage):
            raise ValueError(f"a stage's name is a file's name, not {stage!r}")
        return self.path / "stages" / f"{stage}.json"


@contextmanager
def open_run(command: str, settings: Section, run: RunSection) -> Iterator[RunDir]:
    """Opens or resumes a run's folder and holds its lock while the context is open.

    Of several processes the first holds it for all.

    Args:
        command: The command's name.
        settings: All its settings; `seed` and, where there is one, `profile` appear in the name.
        run: Their section `run`.

    Raises:
        UserError: The folder cannot be used, is in use, or holds a run of other settings.
    """
    values = settings.model_dump(mode="json", exclude=_CIRCUMSTANCES)
    with ExitStack() as held:
        path = from_first(lambda: held.enter_context(_held(command, values, run)))
        together(lambda: _check_shared(path))
        try:
            yield RunDir(path, path.name)
        except (KeyboardInterrupt, Preempted) as stopped:
            # The same command would start yet another run.
            raise type(stopped)(
                f"run.id={path.name} instead of run.fresh=true" if run.fresh else ""
            ) from None


@contextmanager
def _held(command: str, values: dict[str, Json], run: RunSection) -> Iterator[Path]:
    named = [command, values.get("profile"), f"seed{values.get('seed', 0)}"]
    base = run.id or "-".join(filter(None, (*named, content_hash(values)[:8])))
    path = _place(run.root, base, fresh=run.fresh)
    with _locked(path):
        config = path / "config.json"
        recorded = {"command": command, **values}
        # A run that was refused before it did anything takes corrected settings.
        begun = any(entry.name not in (config.name, _LOCK) for entry in path.iterdir())
        if not begun or not config.exists():
            write_json(config, recorded)
        elif (found := read_json(config)) != recorded:
            changed = sorted(k for k in {*found, *recorded} if found.get(k) != recorded.get(k))
            raise UserError(
                f"{path}: holds a run of other settings ({', '.join(changed)}); choose another "
                "run.id or leave it out."
            )
        yield path


def _check_shared(path: Path) -> None:
    if not (path / "config.json").exists():
        raise UserError(
            f"{path}: another process does not see what the first wrote there; choose a folder "
            "that all hosts share with run.root."
        )


def _place(root: Path, base: str, *, fresh: bool) -> Path:
    names = (base if n == 1 else f"{base}-{n}" for n in count(1))
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                (root / name).mkdir()
            except FileExistsError:
                if fresh and (root / name).is_dir():
                    continue
            return root / name
    except OSError as error:
        raise UserError(
            f"{root}: cannot hold runs ({error.strerror}); choose another folder with run.root."
        ) from None
    raise AssertionError("count() does not end")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the folder's lock; the kernel lets go of it however the process ends."""
    try:
        # Not a file object: closing one writes again what a full disk refused.
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be used for a run ({error.strerror}); choose another with run.id."
        ) from None
    try:
        _take(lock, path)
        yield
    finally:
        os.close(lock)


def _take(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode().strip() or "unknown"
        raise UserError(
            f"{path}: is in use by process {holder}; wait for it, end it, or start another run "
            "with run.fresh=true."
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another folder "
            "with run.root."
        ) from None
