"""Requests, results and a private Redis server for the queue tests."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import NoReturn

import pytest

from klong_jax.core.message import Message, ToolCall
from klong_jax.core.rollout import Judgement, RolloutRequest, Verdict
from klong_jax.core.trajectory import Status, Trajectory, Turn, WindowSpan
from klong_jax.rollout.queue import RolloutQueue


def unavailable(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


MAX_ATTEMPTS = 3


def request(name: str, group: str = "g", priority: int = 0, slot: int = 0) -> RolloutRequest:
    return RolloutRequest(name, group, slot, "task", 60.0, seed=7, priority=priority)


def trajectory_of(asked: RolloutRequest, status: Status = Status.DONE) -> Trajectory:
    call = ToolCall("bash", {"command": "echo 'ünï' \udc80"})
    return Trajectory(
        trajectory_id=asked.trajectory_id,
        task_id=asked.task_id,
        messages=(
            Message("user", "build"),
            Message("assistant", f"{asked.trajectory_id}", tool_calls=(call,)),
        ),
        turns=(Turn((1, 2), (3, 4), (-0.5, -0.25), ((0, 1), (1, 2)), tool_calls=(call,)),),
        spans=(WindowSpan(1, 1, 0, 4),),
        status=status,
        active_s=12.5,
        failures={"malformed": 1},
    )


def judgement_of(asked: RolloutRequest, score: float = 0.5) -> Judgement:
    return Judgement(asked.trajectory_id, "a", "r", "exec", {"0.1": score}, score, Verdict.VALID)


def finish(queue: RolloutQueue, asked: RolloutRequest) -> bool:
    return queue.finish(trajectory_of(asked), asked, judgement_of(asked))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def redis_server() -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        unavailable("no redis-server on this machine: apt-get install redis-server")
    port = free_port()
    with (
        TemporaryDirectory() as folder,
        subprocess.Popen(
            [binary, "--port", str(port), "--save", "", "--dir", folder],
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if "Ready to accept connections" in line:
                    break
            yield f"redis://127.0.0.1:{port}/15"
        finally:
            server.terminate()
