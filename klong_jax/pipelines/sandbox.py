"""`klong sandbox`: serves sandboxes until it is interrupted."""

import os

from klong_jax.core.errors import UserError
from klong_jax.pipelines.config.commands import SandboxConfig
from sandbox.errors import SandboxError
from sandbox.service import serve


def run(settings: SandboxConfig) -> None:
    """Serves in the foreground; SIGINT or SIGTERM removes every sandbox and ends it."""
    token = None
    if settings.token_env is not None:
        token = os.environ.get(settings.token_env)
        if not token:
            raise UserError(f"token_env: the variable {settings.token_env} is not set; set it.")
    try:
        serve(
            backend=settings.backend,
            isolation=settings.isolation,
            host=settings.host,
            port=settings.port,
            token=token,
            state_dir=settings.state_dir,
            announce=lambda sentence: print(sentence, flush=True),
        )
    except SandboxError as error:
        raise UserError(str(error)) from None
