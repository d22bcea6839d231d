"""`klong doctor` against what is and what is not there."""

import socket
from pathlib import Path

import pytest

from klong_jax.pipelines import doctor
from klong_jax.pipelines.config.commands import DoctorConfig


def settings(tmp_path: Path, redis: str) -> DoctorConfig:
    return DoctorConfig(root=tmp_path, image="klong/no-such-image:none", redis=redis)


@pytest.fixture
def nobody() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"redis://127.0.0.1:{probe.getsockname()[1]}"


def test_what_is_missing_is_said_and_is_no_failure(
    tmp_path: Path, nobody: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {f.name: f for f in doctor.findings(settings(tmp_path, nobody))}
    for name in ("docker daemon", "redis", "bubblewrap"):
        assert found[name].found == "" and not found[name].required
    for name in ("python", "jax", "devices", "cores", "memory", "disk"):
        assert found[name].found
    assert all(f.allows for f in found.values())
    doctor.run(settings(tmp_path, nobody))
    assert "everything required is here" in capsys.readouterr().out


def test_a_missing_package_ends_in_exit_1(
    tmp_path: Path, nobody: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("jax", "klong-no-such-package"))
    with pytest.raises(SystemExit) as ended:
        doctor.run(settings(tmp_path, nobody))
    assert ended.value.code == 1
    assert "required but missing: klong-no-such-package" in capsys.readouterr().out


def test_wrong_urls_and_folders_are_findings(tmp_path: Path) -> None:
    asked = settings(tmp_path / "missing", "nonsense://x")
    found = {f.name: f for f in doctor.findings(asked)}
    assert "not a Redis URL" in found["redis"].allows
    assert "missing" in found["disk"].allows
