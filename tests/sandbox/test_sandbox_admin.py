"""What one who runs a service asks it: ps, exec, logs, rm, doctor, metrics."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sandbox_helpers import Service, in_box, require

from sandbox.__main__ import main
from sandbox.client import Sandbox, SandboxClient, SandboxRefused, SandboxSpec
from sandbox.service import embedded


def test_sandboxes_are_listed_used_told_of_and_removed(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*words: str) -> tuple[int, str, str]:
        status = main([*words, "--url", service.url])
        return status, *capsys.readouterr()

    async def body(box: Sandbox) -> None:
        def administrate() -> None:
            status, out, _ = ask("ps")
            assert status == 0
            row = next(line for line in out.splitlines() if line.startswith(box.id)).split()
            assert row[1] == "idle" and int(row[2]) < 60 and row[3] == "s"
            assert row[4:6] == ["24", "h"] and int(row[6]) >= 1
            assert 1 < float(row[7]) < 60 and row[8] == "MB" and row[-1] == "task=t"

            status, out, err = ask("exec", box.id, "echo out; echo err >&2; exit 3")
            assert (status, out, err) == (3, "out\n", "err\n")
            status, _, err = ask("exec", box.id, "sleep 9", "--timeout", "0.1")
            assert status == 124 and "killed at its limit of 0.1 seconds" in err

            assert ask("rm", box.id) == (0, f"{box.id}\n", "")
            status, _, err = ask("rm", box.id)
            assert status == 1 and re.fullmatch(f"error: there is no sandbox {box.id}.*\n", err)

            status, out, _ = ask("logs", box.id)
            assert status == 0
            kinds = [line.split()[2] for line in out.splitlines()]
            assert kinds == ["create", "ready", "exec", "exit", "exec", "exit", "close"]
            assert "command='sleep 9'" in out and "timed_out=True" in out and "why='asked'" in out

        await asyncio.to_thread(administrate)

    in_box(service.url, body, SandboxSpec(labels={"task": "t"}))
    assert ask("logs", "sb-unknown00")[0] == 1


def test_no_service_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--url", "http://127.0.0.1:9"]) == 1
    assert re.fullmatch(
        r"error: the sandbox service at http://127.0.0.1:9 does not answer .*\n",
        capsys.readouterr().err,
    )


def test_doctor_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require("local-bubblewrap")
    assert main(["doctor"]) == 0
    assert re.search(r"^bubblewrap +works ", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    monkeypatch.setenv("KLONG_CACHE", str(tmp_path))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^bubblewrap +missing .*apt install bubblewrap", out, re.MULTILINE)
    assert re.search(r"^docker daemon +missing", out, re.MULTILINE)
    assert re.search(r"^egress engine +missing .*install-egress", out, re.MULTILINE)


def test_metrics_count_what_happened(state_dir: Path) -> None:
    require("local-bubblewrap")

    async def work(url: str) -> dict[tuple[str, ...], float]:
        async with SandboxClient(url, "sesame") as client:
            first = await client.create()
            while (await client.health())["waiting"] == 0:
                await asyncio.sleep(0.01)
            async with await client.create(), first, await first.session() as session:
                await session.run("true")
                await first.exec("true")
                await first.exec("sleep 0.2")
                with pytest.raises(SandboxRefused):
                    await first.exec("true", output_bytes=1 << 30)
                bearer = {"Authorization": "Bearer sesame"}
                async with aiohttp.ClientSession() as web:
                    assert (await web.get(f"{url}/metrics")).status == 401
                    answer = await web.get(f"{url}/metrics", headers=bearer)
                    text = await answer.text()
        return {
            (sample.name.removeprefix("klong_sandbox_"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    with embedded("local", state_dir=state_dir, token="sesame", pool=1) as url:
        values = asyncio.run(work(url))
    assert values["creation_seconds_count", "new"] == 1
    assert values["creation_seconds_count", "pool"] == 1
    assert values["command_seconds_count", "exec"] == 2
    assert values["command_seconds_count", "run"] == 1
    in_all, around = (values[f"command{what}_seconds_sum", "exec"] for what in ("", "_overhead"))
    assert in_all - around >= 0.2 and around > 0
    assert values["rejections_total", "refused"] == 1
    assert values["rejections_total", "unauthorised"] == 1
    assert values["living",] == 2
