"""Hostile programs that try the kernel, its switches and other processes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import socket
import stat
import struct
import time

from hostile import FACTS, attack, call, call_number, each, opened

# Calls and sockets.


@attack("call what only a kernel's owner needs, each of the refused calls", "EPERM", "seccomp")
def _() -> str:
    zeros = (0, 0, 0, 0, 0, 0)
    return each([lambda name=name: str(call(name, *zeros)) for name in FACTS["denied"]])


@attack("make an io_uring, whose requests no filter sees", "EPERM", "seccomp")
def _() -> str:
    return str(call("io_uring_setup", 8, 0))


@attack("open a socket of a family other than unix, inet, inet6, netlink", "EPERM", "seccomp")
def _() -> str:
    families = set(range(1, 64)) - {1, 2, 10, 16}
    return each([lambda f=f: str(socket.socket(f, 1, 0)) for f in families])


@attack("open a vsock to the hypervisor", "EPERM", "seccomp")
def _() -> str:
    return str(socket.socket(40, socket.SOCK_STREAM))


@attack("open a packet socket, a raw one of IPv4 or of IPv6", "EPERM", "seccomp")
def _() -> str:
    kinds = ((17, 3, 0x300), (2, 3, 1), (10, 3, 58), (2, 3, 255))
    return each([lambda kind=kind: str(socket.socket(*kind)) for kind in kinds])


@attack("talk to the packet filter, audit, crypto by netlink", "EPERM", "seccomp")
def _() -> str:
    return each([lambda p=p: str(socket.socket(16, 3, p)) for p in (4, 6, 9, 12, 15, 21)])


@attack("hide a family in the upper half of the argument", "EPERM", "seccomp, as the kernel reads")
def _() -> str:
    high = 1 << 32
    tries = ((40 | high, 1, 0), (2 | high, 3 | high, 1), (17, 3, 0))
    return each([lambda t=t: str(call("socket", *t)) for t in tries])


@attack("call by the numbers of x32", "ENOSYS", "seccomp", docker="SIGSYS")
def _() -> str:
    return f"called, {call_number(0x4000_0000 + 39)}"


@attack("call by the numbers of 32-bit x86", "EPERM", "seccomp", docker="SIGSYS")
def _() -> str:
    # mov eax, 20 (getpid); int 0x80; ret
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    place = ctypes.addressof(ctypes.c_char.from_buffer(code))
    result = ctypes.CFUNCTYPE(ctypes.c_int)(place)()
    return errno.errorcode[-result] if result < 0 else "called"


# Namespaces, mounts, the kernel's switches.


@attack("make a namespace by unshare, clone or clone3", "ENOSYS, EPERM", "seccomp")
def _() -> str:
    user = 0x1000_0000
    many = [lambda b=b: str(call("unshare", 1 << b)) for b in (17, 25, 26, 27, 28, 29, 30)]
    many += [
        lambda: str(call("clone", user | signal.SIGCHLD, 0, 0, 0, 0)),
        lambda: str(call("clone3", 0, 0)),
    ]
    return each(many)


@attack("enter the namespaces of process 1", "EACCES, EPERM", "no dumping of the agent; seccomp")
def _() -> str:
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    return each(
        [
            lambda: str(os.open("/proc/1/ns/mnt", os.O_RDONLY)),
            lambda: str(call("setns", own, 0)),
        ]
    )


@attack("mount by the old calls or by the new", "EPERM", "seccomp; no capabilities")
def _() -> str:
    text = ctypes.create_string_buffer(b"tmpfs")
    place = ctypes.create_string_buffer(b"/tmp")
    at = ctypes.addressof
    return each(
        [
            lambda: str(call("mount", at(text), at(place), at(text), 0, 0)),
            lambda: str(call("umount2", at(place), 2)),
            lambda: str(call("fsopen", at(text), 0)),
            lambda: str(call("open_tree", 0, at(place), 1)),
        ]
    )


@attack(
    "set core_pattern or another switch of the kernel",
    "EACCES, EROFS",
    "not root; read-only",
    "EACCES",
)
def _() -> str:
    names = ("core_pattern", "hostname", "shmmax")
    return opened(*(f"/proc/sys/kernel/{name}" for name in names), flags=os.O_WRONLY)


@attack("write any switch of /proc/sys, /proc or /sys", "none", "read-only mounts; not root")
def _() -> str:
    found = []
    for top, depth in (("/proc/sys", 9), ("/sys", 5)):
        for directory, below, names in os.walk(top):
            if directory.count("/") >= depth:
                below.clear()
            for path in (f"{directory}/{name}" for name in names):
                with contextlib.suppress(OSError):
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                    found.append(path)
    for name in os.listdir("/proc"):
        path = f"/proc/{name}"
        if stat.S_ISREG(os.stat(path).st_mode):
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                found.append(path)
    return ", ".join(found) or "none"


@attack("find a device other than the harmless", "none", "a /dev of its own")
def _() -> str:
    harmless = {"console", "full", "null", "ptmx", "random", "tty", "urandom", "zero"}
    found = []
    for directory, _below, names in os.walk("/dev"):
        for path in (f"{directory}/{name}" for name in names):
            mode = os.stat(path).st_mode if os.path.exists(path) else 0
            device = stat.S_ISBLK(mode) or stat.S_ISCHR(mode)
            if device and os.path.basename(path) not in harmless and "/pts/" not in path:
                found.append(path)
    return ", ".join(found) or "none"


@attack("make the disk's device and open it", "EPERM", "no capabilities; nodev")
def _() -> str:
    os.mknod("disk", stat.S_IFBLK | 0o600, os.makedev(254, 0))
    return "made"


# Other processes.


@attack("trace, read or take descriptors of another process", "EPERM", "seccomp")
def _() -> str:
    victim = os.fork()
    if not victim:
        time.sleep(30)
        os._exit(0)
    data = ctypes.create_string_buffer(8)
    vector = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(data), 8))
    handle = os.pidfd_open(victim) if hasattr(os, "pidfd_open") else 0
    at = ctypes.addressof(vector)
    try:
        return each(
            [
                lambda: str(call("ptrace", 16, victim, 0, 0)),
                lambda: str(call("ptrace", 0x4206, victim, 0, 0)),
                lambda: str(call("process_vm_readv", victim, at, 1, at, 1, 0)),
                lambda: str(call("pidfd_getfd", handle, 0, 0)),
            ]
        )
    finally:
        os.kill(victim, signal.SIGKILL)


@attack(
    "read process 1's memory, environment, descriptors, root", "EACCES", "agent cannot be dumped"
)
def _() -> str:
    reads = [lambda: str(os.listdir("/proc/1/fd")), lambda: os.readlink("/proc/1/root")]
    return f"{opened('/proc/1/mem', '/proc/1/environ', '/proc/1/maps')}; {each(reads)}".replace(
        "EACCES; EACCES", "EACCES"
    )


@attack("send every signal to process 1", "ignored", "a namespace's first process, no handlers")
def _() -> str:
    for number in range(1, 65):
        with contextlib.suppress(OSError):
            os.kill(1, number)
    time.sleep(0.05)
    os.kill(1, 0)
    with open("/proc/1/stat") as file:
        state = file.read().rpartition(")")[2].split()[0]
    return "ignored" if state in "SR" else f"state {state}"


@attack("see a process of the host", "none", "a process namespace")
def _() -> str:
    seen = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                if FACTS["host_word"].encode() in file.read():
                    seen.append(name)
    return ", ".join(seen) or "none"


@attack(
    "pose as the agent on the service's socket", "cut off", "the peer's process id, by the kernel"
)
def _() -> str:
    line = socket.socket(socket.AF_UNIX)
    line.connect("/run/klong/line/agent.sock")
    hello = b'{"hello": 1, "pid": 1}'
    try:
        line.sendall(struct.pack(">II", len(hello), 0) + hello)
        return "answered" if line.recv(100) else "cut off"
    except (BrokenPipeError, ConnectionResetError):
        return "cut off"


@attack("change the agent's code or its socket", "EACCES, EROFS", "read-only mounts")
def _() -> str:
    return each(
        [
            lambda: opened("/run/klong/agent/__main__.py", flags=os.O_WRONLY),
            lambda: str(os.unlink("/run/klong/line/agent.sock")),
            lambda: opened("/run/klong/line/x", flags=os.O_WRONLY | os.O_CREAT),
        ]
    )


@attack("outlive others when memory ends (oom_score_adj)", "EACCES", "no capabilities")
def _() -> str:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    return "written"


@attack("take a real-time priority, or another's turn", "EACCES, EPERM", "no capabilities")
def _() -> str:
    return each(
        [
            lambda: str(os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
            lambda: str(os.setpriority(os.PRIO_PROCESS, 0, -5)),
        ]
    )
