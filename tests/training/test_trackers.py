"""TensorBoard shows what the file of metrics says, also after a restart."""

import struct
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from klong_jax.core.errors import UserError
from klong_jax.training.metrics import MetricsLog, read_metrics


def shown(folder: Path) -> dict[tuple[int, str], list[float]]:
    """What is in all event files: length, checksum, event, checksum, and so on."""
    found: dict[tuple[int, str], list[float]] = {}
    for path in (folder / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                found.setdefault((event.step, value.tag), []).append(value.simple_value)
    return found


def test_no_step_is_shown_twice_and_none_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "sft" / "metrics.jsonl"
    first = MetricsLog(path, 0, ["tensorboard"])
    for step in (1, 2, 3):
        first.write({"step": step, "phase": "drills", "loss": 1 / step, "windows": step})
    first.close()
    resumed = MetricsLog(path, 2, ["tensorboard"])
    for step in (3, 4):
        resumed.write({"step": step, "phase": "drills", "loss": 1 / step, "windows": step})
    resumed.close()
    expected = {
        (row["step"], name): [pytest.approx(row[name])]
        for row in read_metrics(path)
        for name in ("loss", "windows")
    }
    assert len(expected) == 8
    assert shown(path.parent) == expected


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"log_to={name}: {module} .*klong-jax\[{name}\]"):
        MetricsLog(tmp_path / "metrics.jsonl", 0, [name])
