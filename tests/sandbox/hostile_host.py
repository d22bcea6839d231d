"""Hostile programs that try for rights, the host and its network, and to use up what there is."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import threading
import time

from hostile import FACTS, attack, call, each, opened

# Rights.


@attack("become root, or of its group", "EINVAL, EPERM", "no capabilities", docker="EPERM")
def _() -> str:
    return each(
        [
            lambda: str(os.setuid(0)),
            lambda: str(os.setgid(0)),
            lambda: str(os.setgroups([0])),
            lambda: str(os.chown("/tmp", 0, 0)),
        ]
    )


@attack("gain by a set-uid program", "same user", "no-new-privileges; nosuid")
def _() -> str:
    own = os.path.expanduser("~/sleep")
    with open("/bin/sleep", "rb") as source, open(own, "wb") as copy:
        copy.write(source.read())
    os.chmod(own, 0o6755)
    users = set()
    for program in ([own, "9"], ["/bin/su"], ["/usr/bin/passwd"], ["/usr/bin/newgrp", "root"]):
        if os.path.exists(program[0]):
            child = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(0.05)
            with open(f"/proc/{child.pid}/status") as file:
                line = next(text for text in file if text.startswith("Uid:"))
            users.update(line.split()[1:])
            child.kill()
    return "same user" if users == {str(os.getuid())} else f"users {users}"


@attack("raise a limit that was set", "refused", "hard limits; no capabilities")
def _() -> str:
    said = set()
    for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        try:
            resource.setrlimit(which, (1 << 30, 1 << 30))
            said.add("raised")
        except (ValueError, OSError):
            said.add("refused")
    return ", ".join(said)


# The host's files and network.


@attack("read the host's secrets, state and daemon's socket", "EACCES, ENOENT", "a root of its own")
def _() -> str:
    return opened(
        "/etc/shadow",
        "/root/.ssh",
        "/var/run/docker.sock",
        "/run/docker.sock",
        FACTS["state_dir"],
        "/proc/1/root/etc/passwd",
        "/proc/kcore",
    )


@attack("write outside of its own places", "none", "read-only root")
def _() -> str:
    own = ("/workspace", "/home/agent", "/tmp", "/dev/shm", "/dev/mqueue", "/proc", "/sys")
    found = []
    for directory, below, _names in os.walk("/"):
        below[:] = [name for name in below if f"{directory}/{name}".replace("//", "/") not in own]
        with contextlib.suppress(OSError):
            os.close(os.open(f"{directory}/made", os.O_CREAT | os.O_WRONLY))
            found.append(directory)
    return ", ".join(found) or "none"


def connect(address: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(2)
        sock.connect((address, port))
    return "connected"


@attack("reach the sandbox service on the host's loopback", "ECONNREFUSED", "a network namespace")
def _() -> str:
    return connect("127.0.0.1", FACTS["port"])


@attack("reach the host by its own or Docker's addresses", "ENETUNREACH", "no network device")
def _() -> str:
    hosts = [*FACTS["addresses"], "172.17.0.1"]
    return each([lambda host=host: connect(host, FACTS["port"]) for host in hosts])


@attack(
    "reach the cloud's metadata address",
    "ENETUNREACH",
    "no network device",
    docker="EADDRNOTAVAIL, ENETUNREACH",
)
def _() -> str:
    return each([lambda: connect("169.254.169.254", 80), lambda: connect("fd00:ec2::254", 80)])


@attack(
    "reach the internet, by address or by name",
    "ENETUNREACH, gaierror",
    "no network device",
    docker="EADDRNOTAVAIL, ENETUNREACH, gaierror",
)
def _() -> str:
    return each(
        [
            lambda: connect("1.1.1.1", 443),
            lambda: connect("2606:4700:4700::1111", 443),
            lambda: str(socket.getaddrinfo("example.org", 443)),
        ]
    )


@attack("reach an abstract Unix socket of the host", "ECONNREFUSED", "a network namespace")
def _() -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + FACTS["abstract"])
    return "connected"


@attack("set up a network device", "EPERM", "no capabilities in its network namespace")
def _() -> str:
    import fcntl

    with socket.socket() as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh", b"lo", 0) + bytes(22))
    return "set"


# Exhaustion that one process can see the end of.


@attack("open files without end", "EMFILE", "limits.open_files")
def _() -> str:
    while True:
        os.dup(0)


@attack("fill the disk: workspace, home and /tmp", "ENOSPC", "limits.disk_mb: an ext4 of its own")
def _() -> str:
    def fill(place: str) -> str:
        made = []
        try:
            for number in range(100):
                made.append(f"{place}/fill{number}")
                with open(made[-1], "wb") as file:
                    for _ in range(8):
                        file.write(bytes(1 << 20))
            return "filled"
        finally:
            for path in made:
                os.unlink(path)

    return each([lambda p=p: fill(p) for p in (".", os.path.expanduser("~"), "/tmp")])


@attack("make files without end", "ENOSPC", "limits.inodes")
def _() -> str:
    made = []
    try:
        for number in range(10_000):
            made.append(f"i{number}")
            os.close(os.open(made[-1], os.O_CREAT | os.O_WRONLY))
        return "made"
    finally:
        for path in made:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@attack("write one file without end, or a sparse one", "EFBIG", "limits.files_mb")
def _() -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def grow() -> str:
        with open("big", "wb", buffering=0) as file:
            file.truncate(FACTS["file_bytes"])
            file.seek(0, os.SEEK_END)
            file.write(b"x")
        return "grown"

    def sparse() -> str:
        os.truncate("big", 1 << 42)
        return "grown"

    try:
        return each([grow, sparse])
    finally:
        os.unlink("big")


@attack("start threads without end", "RuntimeError", "limits.pids")
def _() -> str:
    over = threading.Event()
    try:
        for _ in range(10_000):
            threading.Thread(target=over.wait, daemon=True).start()
    finally:
        over.set()
    return "started"


@attack("take memory without end", "SIGKILL", "limits.memory_mb: the kernel kills it first")
def _() -> str:
    blocks = []
    while True:
        blocks.append(b"x" * (1 << 22))


@attack("take memory by files in /dev/shm", "ENOSPC", "half of limits.memory_mb")
def _() -> str:
    try:
        for number in range(1000):
            with open(f"/dev/shm/{number}", "wb") as file:
                file.write(bytes(8 << 20))
        return "filled"
    finally:
        for name in os.listdir("/dev/shm"):
            os.unlink(f"/dev/shm/{name}")


# What must go on: no attacks, but a list that refuses everything would pass above.


@attack("debug a program that one starts", "works", "TRACEME is let pass")
def _() -> str:
    child = os.fork()
    if not child:
        call("ptrace", 0, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(3)
    os.waitpid(child, 0)
    call("ptrace", 7, child, 0, 0)
    return "works" if os.waitpid(child, 0)[1] >> 8 == 3 else "fails"


@attack("serve on one's own loopback", "works", "a network namespace of one's own")
def _() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return "works" if connect(*server.getsockname()) == "connected" else "fails"
