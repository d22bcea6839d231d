"""`klong sandbox ACTION`: words beside settings, and the status of a command as its own."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from klong_jax.cli import _words
from klong_jax.core.errors import UserError
from klong_jax.pipelines import sandbox
from klong_jax.pipelines.config.commands import SandboxConfig
from sandbox.client import SandboxClient
from sandbox.service import embedded

ROOT = Path(__file__).resolve().parents[2]


def settings(**fields: object) -> SandboxConfig:
    given = {"backend": "local", "isolation": "auto", "host": "127.0.0.1", "port": 9}
    given |= {"token_env": None, "state_dir": None, "pool": 0, "pool_idle_s": 1.0, "url": None}
    given |= {"egress": None}
    given |= {"task": None, "requirements": None, "base": None, "source": "auto", "without": []}
    given |= {"force": False, "disk_mb": None}
    return SandboxConfig.model_validate({**given, "timeout_s": 9.0, "image": "i", **fields})


def test_a_command_keeps_its_dollars_and_its_status() -> None:
    async def make(url: str) -> str:
        async with SandboxClient(url) as client:
            return (await client.create()).id

    with embedded("local") as url:
        box = asyncio.run(make(url))
        command = [sys.executable, "-m", "klong_jax.cli", "sandbox", "exec", f"url={url}", box]
        done = subprocess.run(
            [*command, "A=1; echo ${A}, $A; exit 3"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert (done.returncode, done.stdout, done.stderr) == (3, "1, 1\n", "")


@pytest.mark.parametrize(
    ("words", "fields", "said"),
    [
        (["stop"], {}, "there is no klong sandbox stop; choose one of serve, ps, "),
        (["exec", "sb-1"], {}, "write klong sandbox exec ID 'COMMAND'"),
        (["ps", "sb-1"], {}, "write klong sandbox ps"),
        (["rm"], {}, "write klong sandbox rm ID ..."),
        (["image"], {}, "write klong sandbox image build "),
        (["image", "grow"], {}, "write image build "),
        (["image", "build", "slim"], {"without": ["numpy"]}, "only the research image has a list"),
        (["serve"], {"url": "http://x"}, "leave url out"),
        (["ps"], {}, "the sandbox service at http://127.0.0.1:9 does not answer"),
        (["ps"], {"host": "::1"}, r"at http://\[::1\]:9 does not answer"),
        (["ps"], {"token_env": "KLONG_NO_SUCH"}, "KLONG_NO_SUCH is not set"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], fields: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sandbox.run(settings(**fields), *words)


def test_words_are_what_is_neither_setting_nor_option() -> None:
    given = ["exec", "port=8701", "--cfg", "job", "sb-1", "A=1 make", "+x.y=", "-m"]
    assert _words(given) == ["exec", "sb-1", "A=1 make"]
