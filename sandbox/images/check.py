"""Whether an image works where it is used: in a hardened sandbox without network."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sandbox.client import Limits, SandboxClient, SandboxSpec
from sandbox.errors import SandboxError
from sandbox.images import recipe
from sandbox.service import embedded

_PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Checked:
    """One thing that was tried.

    Attributes:
        what: "package", which was imported, or "program", a command of the image's probes.
        name: Its name.
        version: The package's version in the image.
        seconds: What it took.
        problem: What went wrong; empty if it works.
    """

    what: str
    name: str
    version: str
    seconds: float
    problem: str


async def check(image: str, tell: Callable[[Checked], None]) -> None:
    """Imports each package of the image's lists and runs its probes, with the usual limits.

    Args:
        image: Its name.
        tell: Hears of each as soon as it is known.

    Raises:
        SandboxError: no sandbox can be made of it, or it ended before all was tried.
    """
    unfinished = ""

    def hear(stream: str, text: str) -> None:
        nonlocal unfinished
        if stream == "stdout":
            *whole, unfinished = (unfinished + text).split("\n")
            for line in whole:
                tell(Checked(**json.loads(line)))

    with ExitStack() as stack:
        state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="klong-check-")))
        # Sandboxes have users of their own, who must pass.
        state_dir.chmod(0o711)
        url = stack.enter_context(embedded("docker", state_dir=state_dir))
        # The usual limits, for whoever uses the image has them; only what is heard is more.
        limits = Limits(output_bytes=1 << 22)
        spec = SandboxSpec(image=image, limits=limits, lifetime_s=2 * _PATIENCE_S)
        async with SandboxClient(url) as client, await client.create(spec) as box:
            await box.write("inside.py", recipe.read("inside.py"))
            result = await box.exec("python3 inside.py", timeout_s=_PATIENCE_S, on_output=hear)
    if result.timed_out or result.exit_code != 0:
        last = (result.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise SandboxError(f"the check of {image} has not come to its end: {last}")
