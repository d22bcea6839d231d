"""The Python environment of the egress engine; also a program: `python install.py`.

mitmproxy asks for exact versions of packages that others need newer, so it shares none with them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

# 11 is the last for Python 3.11; both are tested.
_REQUIREMENT = "mitmproxy>=11.0.2,<13"

REMEDY = "run `python -m sandbox install-egress` once"


def directory() -> Path:
    """Where the environment is."""
    return Path(os.environ.get("KLONG_CACHE") or Path.home() / ".cache/klong") / "egress"


def python() -> Path:
    """Its interpreter, which need not be there."""
    return directory() / "bin/python"


def is_complete() -> bool:
    """Whether the environment is there and whole."""
    # Another user's cannot be looked at, and is none.
    return os.path.exists(directory() / "complete") and os.access(python(), os.X_OK)


def install() -> Path:
    """Makes the environment unless it is there; returns its interpreter.

    Raises:
        subprocess.CalledProcessError: pip fails; it has said why.
    """
    if not is_complete():
        venv.create(directory(), clear=True, with_pip=True)
        pip = [str(python()), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        # Constraints are meant for other environments.
        env = {name: to for name, to in os.environ.items() if name != "PIP_CONSTRAINT"}
        subprocess.run([*pip, _REQUIREMENT], check=True, env=env, stdout=sys.stderr)
        (directory() / "complete").touch()
    return python()


if __name__ == "__main__":
    print(install())
