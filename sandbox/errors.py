"""The errors of the sandbox, the same on both sides of the wire.

The service answers `{"error": sentence, "kind": kind}`; the client raises the class of that kind.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar


class SandboxError(Exception):
    """A sandbox operation failed; `str(error)` is one sentence for a person."""

    kind: ClassVar[str] = "failed"
    status: ClassVar[int] = 500
    infra: ClassVar[bool] = True
    """Whether service or host failed, and not who asked: no reason to grade an agent by it."""

    def __init__(self, sentence: str = "", **facts: Any) -> None:
        """Says it in one sentence; `facts` are what a program may want of it, in JSON."""
        super().__init__(sentence)
        self.facts = facts


class SandboxRefused(SandboxError):
    """The request is malformed or not allowed; sending it again will not help."""

    kind = "refused"
    status = 400
    infra = False


class SandboxTooLarge(SandboxRefused):
    """A file or a tree is over the sandbox's size limit."""

    kind = "too_large"
    status = 413


class SandboxUnauthorised(SandboxRefused):
    """The bearer token is missing or wrong."""

    kind = "unauthorised"
    status = 401
    infra = True


class SandboxGated(SandboxRefused):
    """The sandbox's gates do not let it through yet: something must be read, or done, first."""

    kind = "gated"
    status = 409


class SandboxUnfinished(SandboxGated):
    """The finish check fails; `facts["check"]` has the fields of its `ExecResult`."""

    kind = "unfinished"


class SandboxEnded(SandboxRefused):
    """The sandbox's work has ended: its files can be read, and nothing else."""

    kind = "ended"
    status = 409


class SandboxFileMissing(SandboxError):
    """The sandbox exists and has no such file."""

    kind = "file_missing"
    status = 404
    infra = False


class SandboxGone(SandboxError):
    """The sandbox does not exist: never created, closed, expired, or lost with its service."""

    kind = "gone"
    status = 410


class SandboxLost(SandboxGone):
    """The sandbox ended by a fault, its own or the host's, not because anyone closed it."""

    kind = "lost"


class SandboxSessionEnded(SandboxError):
    """The sandbox exists and has no such session, or its shell has ended."""

    kind = "session_ended"
    status = 404
    infra = False


class SandboxPaused(SandboxError):
    """The sandbox is paused; resume it first."""

    kind = "paused"
    status = 409


class SandboxSnapshotMissing(SandboxRefused):
    """There is no snapshot of that digest."""

    kind = "snapshot_missing"
    status = 404


class SandboxSnapshotDamaged(SandboxError):
    """What is stored of a snapshot is not what was stored; the host's fault, not the sandbox's."""

    kind = "snapshot_damaged"


class SandboxUnavailable(SandboxError):
    """The service or its backend cannot be reached now; trying again later may help."""

    kind = "unavailable"
    status = 503


class SandboxEgressDown(SandboxUnavailable):
    """The proxy through which sandboxes reach the network is not there now."""

    kind = "egress_down"


_CLASSES: tuple[type[SandboxError], ...] = (
    SandboxError,
    SandboxRefused,
    SandboxTooLarge,
    SandboxUnauthorised,
    SandboxGated,
    SandboxUnfinished,
    SandboxEnded,
    SandboxFileMissing,
    SandboxGone,
    SandboxLost,
    SandboxSessionEnded,
    SandboxUnavailable,
    SandboxEgressDown,
    SandboxPaused,
    SandboxSnapshotMissing,
    SandboxSnapshotDamaged,
)
BY_KIND: dict[str, type[SandboxError]] = {cls.kind: cls for cls in _CLASSES}

_REMEDIES = {
    errno.ENOSPC: "free space on the disk of its state and temporary directories",
    errno.EDQUOT: "raise the disk quota of the service's user",
    errno.EAGAIN: "close sandboxes, or raise the limit of processes of the service",
    errno.ENOMEM: "close sandboxes, or give the service more memory",
    errno.EMFILE: "raise the limit of open files of the service (ulimit -n)",
    errno.ENFILE: "raise the host's limit of open files (fs.file-max)",
}


def host_fault(error: OSError | RuntimeError) -> SandboxError:
    """What an error of the operating system means for who uses a sandbox."""
    if isinstance(error, OSError):
        number, said = error.errno, error.strerror or str(error)
    else:
        # All that Python says when there is no room for another thread.
        number, said = errno.EAGAIN if "new thread" in str(error) else None, str(error)
    if number in _REMEDIES:
        return SandboxUnavailable(f"the sandbox host fails: {said}; {_REMEDIES[number]}.")
    return SandboxError(f"the sandbox host fails: {said}; the service's log says more.")
