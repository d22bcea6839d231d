"""Images: the list, what is built of it, what the daemon has, what can go."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import docker
import pytest
from docker.client import DockerClient
from docker.errors import ImageNotFound
from sandbox_helpers import ROOT, require

from sandbox.__main__ import main
from sandbox.backends.docker import DEFAULT_IMAGE
from sandbox.errors import SandboxRefused
from sandbox.images import recipe, stock

IMAGES = ROOT / "sandbox/images"

# Named by who asked for the research image.
WANTED = (
    "numpy scipy pandas scikit-learn torch transformers datasets einops matplotlib jupyter pytest"
)

# A version that no other run of the tests has, so that no layer is there already.
GOOD = f"1.{secrets.randbelow(10**9)}"


def test_every_package_of_research_is_pinned_once() -> None:
    text = (IMAGES / "research/requirements.txt").read_text()
    lines = recipe.lines(text)
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+]*", line) for line in lines)
    assert len(recipe.pins(text)) == len(lines)
    assert len(recipe.asked(text)) >= 80
    assert set(WANTED.split()) <= recipe.asked(text)
    assert {"torch", "torchvision"} == {n for n, v in recipe.pins(text).items() if "+cpu" in v}
    debian = recipe.lines((IMAGES / "research/debian.txt").read_text())
    assert {"git", "build-essential", "cmake"} <= set(debian)


@pytest.mark.parametrize("kind", ["slim", "research", "layer"])
def test_dockerfiles_install_what_the_lists_name_and_nothing_else(kind: str) -> None:
    text = re.sub(r"(^|\n)\s*#.*", "", (IMAGES / kind / "Dockerfile").read_text())
    text = text.replace("\\\n", " ")
    assert re.findall(r"apt-get install (.*?) +&&", text) == ["-y --no-install-recommends"]
    installs = re.findall(r"pip install (.*?)(?: &&|;)", text)
    listed = {"slim": 0, "layer": 1, "research": 2}[kind]
    assert len(installs) == listed and all("requirements.txt" in one for one in installs)
    # What is copied is in the recipe, or comes from the host that builds.
    copied = {name for line in re.findall(r"COPY (.*) /", text) for name in line.split()}
    given = set(recipe.files(kind)) if kind != "layer" else {"debian.txt", "requirements.txt"}
    assert copied - {"ca.pe[m]", "pip.zi[p]", "probes.txt"} <= given
    assert {
        "debian.txt"
    } <= copied and f"LABEL klong.image={kind} klong.recipe=unfinished\n" in text


def test_packages_can_be_left_out_of_the_list() -> None:
    text = "# All\nA.b==1\nc==2  # why\n"
    assert recipe.pins(recipe.leave_out(text, ("a_B",))) == {"c": "2"}
    with pytest.raises(SandboxRefused, match="without: d is not in the list"):
        recipe.leave_out(text, ("d",))


@pytest.fixture(scope="module")
def daemon() -> Iterator[DockerClient]:
    require("docker")
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, daemon: DockerClient) -> Iterator[Path]:
    """A task's directory, whose packages lie in a directory that pip is told of."""
    directory = tmp_path / f"task-{secrets.token_hex(4)}"
    directory.mkdir()
    shelf = tmp_path / "wheels"
    shelf.mkdir()
    _wheel(shelf, "klong-good", GOOD, "x = 1\n")
    _wheel(shelf, "klong-bad", "1.0", "import nothing_of_that_name\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    yield directory
    for image in stock.images(daemon):
        if image.task == directory.name:
            daemon.api.remove_image(image.id, force=True)


def _wheel(shelf: Path, name: str, version: str, code: str) -> None:
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}/__init__.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(shelf / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def _build(task: Path, *words: str) -> int:
    return main(["image", "build", "--task", str(task), "--base", DEFAULT_IMAGE, *words])


@pytest.mark.docker
def test_a_layer_is_built_once_checked_and_named_by_what_it_holds(
    task: Path, daemon: DockerClient, capsys: pytest.CaptureFixture[str]
) -> None:
    (task / "requirements.txt").write_text(f"klong-good=={GOOD}\nklong-bad  # by any version\n")
    (task / "probes.txt").write_text("good: echo fine\nnot: echo so bad; exit 3\n")
    assert _build(task) == 0
    name = capsys.readouterr().out.strip()
    assert re.fullmatch(r"klong/layer:[0-9a-f]{16}", name)
    built = daemon.images.get(name)
    assert _build(task) == 0
    out, err = capsys.readouterr()
    assert out.strip() == name and err == f"{name} is there already.\n"
    assert daemon.images.get(name).id == built.id

    # Nothing of the host that built it stays: no certificates, no place of packages.
    inside = "ls /usr/share/klong/layer; env"
    said = daemon.containers.run(name, ["sh", "-c", inside], network_mode="none", remove=True)
    assert said.decode().split()[:3] == ["debian.txt", "probes.txt", "requirements.txt"]
    assert b"PIP_" not in said

    assert main(["image", "check", name]) == 1
    *rows, last = capsys.readouterr().out.splitlines()
    told = [row.split() for row in rows]
    assert [row[:2] for row in told] == [
        ["package", "klong-good"],
        ["package", "klong-bad"],
        ["program", "good"],
        ["program", "not"],
    ]
    assert rows[0].endswith("works") and rows[2].endswith("works")
    assert "No module named 'nothing_of_that_name'" in rows[1]
    assert rows[3].endswith("status 3: so bad")
    assert last == "2 packages, 2 programs: 2 without success"

    (task / "requirements.txt").write_text(f"klong-good=={GOOD}\n")
    (task / "probes.txt").unlink()
    assert _build(task) == 0
    newer = capsys.readouterr().out.strip()
    assert newer != name
    assert main(["image", "check", newer]) == 0
    assert main(["image", "list"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^{name} +layer +{task.name} .* MB +\+2 .* 0 +goes$", out, re.MULTILINE)
    assert re.search(rf"^{newer} +layer +{task.name} .* MB +\+1 .* 0 +stays$", out, re.MULTILINE)


@pytest.mark.docker
def test_a_build_that_fails_says_why_and_leaves_no_name(
    task: Path, daemon: DockerClient, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name for image in stock.images(daemon) for name in image.names}
    (task / "requirements.txt").write_text("klong-good==9.9\n")
    assert _build(task) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a Python package is not there in the version asked for" in error
    assert "klong-good==9.9" in error
    assert {name for image in stock.images(daemon) for name in image.names} == before


@pytest.mark.docker
@pytest.mark.parametrize(
    ("files", "words", "sentence"),
    [
        ({}, [], "has no requirements.txt and no debian.txt"),
        ({"requirements.txt": "# none\n"}, [], "no package is named there"),
        ({"requirements.txt": "-e .\n"}, [], "'-e .' is no package by name"),
        ({"debian.txt": "git; reboot\n"}, [], "'git; reboot' is no Debian package's name"),
        ({"debian.txt": "git\n"}, ["--base", "klong/none:1"], "image klong/none:1 is not here"),
        ({"debian.txt": "git\n"}, ["research"], "leave research out"),
        ({"debian.txt": "git\n"}, ["--without", "a"], "only the research image has a list"),
    ],
)
def test_what_cannot_be_built_is_refused(
    task: Path,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, str],
    words: list[str],
    sentence: str,
) -> None:
    for name, text in files.items():
        (task / name).write_text(text)
    assert _build(task, *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error


def test_no_daemon_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    for words in (["list"], ["prune"], ["build", "slim"], ["check", "klong/none:1"]):
        assert main(["image", *words]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: no Docker daemon answers") and error.count("\n") == 1


def test_debootstrap_says_what_it_lacks(state_dir: Path) -> None:
    script = IMAGES / "slim/debootstrap.sh"

    def run(path: Path, *before: str) -> str:
        environment = {
            "PATH": str(path),
            "KLONG_IMAGE": "klong/none:1",
            "KLONG_CACHE": str(state_dir),
        }
        words = [*before, "/bin/sh", str(script)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        return done.stderr

    tools = state_dir / "bin"
    tools.mkdir(mode=0o755)
    for name in ("readlink", "dirname", "id"):
        (tools / name).symlink_to(shutil.which(name) or "")
    assert "debootstrap is not installed; apt install debootstrap." in run(tools)
    (tools / "debootstrap").symlink_to("/bin/true")
    nobody = [shutil.which("setpriv") or "", "--reuid", "65534", "--clear-groups"]
    assert "debootstrap needs root" in run(tools, *(nobody if os.geteuid() == 0 else ()))


def _import(daemon: DockerClient, name: str, content: str, task: str) -> str:
    """An image of one file, as if a build of ours had made it; returns its digest."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("content")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content.encode()))
    repository, _, tag = name.rpartition(":")
    labels = f"LABEL klong.image=layer klong.layer={task} klong.recipe={tag}"
    answer = daemon.api.import_image_from_data(
        packed.getvalue(), repository=repository, tag=tag, changes=[labels]
    )
    return str(json.loads(answer.splitlines()[-1])["status"])


@pytest.mark.docker
def test_pruning_takes_what_is_old_ours_and_unused(daemon: DockerClient) -> None:
    task = f"task-{secrets.token_hex(4)}"
    in_use, old, new = (f"klong/layer:{task}-{number}" for number in range(3))
    somebody = f"klong-test/{task}:1"
    made = [_import(daemon, in_use, "0", task)]
    container = daemon.api.create_container(in_use, ["/none"])["Id"]

    def ours() -> dict[str, stock.Image]:
        return {image.id: image for image in stock.images(daemon) if image.task == task}

    try:
        # What others make of ours has our labels.
        made.append(daemon.api.commit(container)["Id"])
        made.append(daemon.api.commit(container, somebody.rpartition(":")[0], "1")["Id"])
        others = set(made[1:])
        # The second takes the name of the first.
        made += [_import(daemon, old, "1", task), _import(daemon, old, "2", task)]
        time.sleep(1.1)
        made.append(_import(daemon, new, "3", task))
        found = ours()
        assert found.keys() == set(made) - others
        assert found[made[0]].containers == 1 and found[made[3]].names == ()

        going = stock.dispensable(found.values())
        assert {image.id for image in going} == set(made[3:5])
        gone, kept = stock.remove(daemon, going)
        assert gone == going and kept == []
        assert ours().keys() == {made[0], made[5]}
        assert all(daemon.images.get(image) for image in others)

        # One that gets a container, or an image on top, between the look and the removal stays.
        assert stock.remove(daemon, [found[made[0]]]) == ([], [found[made[0]]])
        assert ours().keys() == {made[0], made[5]} and ours()[made[0]].names == (in_use,)
    finally:
        daemon.api.remove_container(container)
        for image in reversed(made):
            with suppress(ImageNotFound):
                daemon.api.remove_image(image, force=True)


def _image(name: str, created: int, containers: int = 0, **facts: object) -> stock.Image:
    said = {"kind": "research", "task": "", "ours": True, **facts}
    names = (name,) if name else ()
    return stock.Image(
        id=f"sha256:{created:064x}",
        names=names,
        size=1,
        packages="1",
        created=created,
        containers=containers,
        **said,  # type: ignore[arg-type]
    )


def test_what_can_go_is_neither_newest_nor_used_nor_another_s() -> None:
    newest, used = _image("a:3", 3), _image("a:1", 1, containers=1)
    unnamed, old = _image("", 4), _image("a:2", 2)
    other = _image("klong/base:bookworm", 1, kind="slim", ours=False)
    layers = [_image(f"l:{n}", n, kind="layer", task=t) for n, t in ((5, "x"), (6, "y"), (7, "x"))]
    going = stock.dispensable([used, old, other, unnamed, newest, *layers])
    assert going == [layers[0], unnamed, old]
