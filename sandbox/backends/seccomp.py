"""Which system calls a sandbox may make: one list, as BPF for bubblewrap and a profile for Docker.

A call that is refused fails with EPERM, so that a program can go on without it; one that this list
does not know fails with ENOSYS, as on an older kernel. Nobody is killed for asking. Calls of
another architecture than the machine's own, with numbers of their own, are all refused: by EPERM
in the BPF, while Docker's library kills the caller.
"""

from __future__ import annotations

import errno
import json
import platform
import struct
from typing import Any, NamedTuple

# Refused whatever their arguments, with their numbers on x86-64 and on arm64.
DENIED: dict[str, tuple[int, int | None]] = {
    # Rings that work past this filter.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # Programs in the kernel, and what watches it.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "lookup_dcookie": (212, 18),
    "syslog": (103, 116),
    "acct": (163, 89),
    # Keys, which belong to no namespace.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # The kernel itself.
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    # Its clocks, names, swap and quotas.
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # Mounts and roots.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    # Namespaces; `clone` is below.
    "setns": (308, 268),
    "unshare": (272, 97),
    # Files without their path.
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # Other processes' memory, descriptors and places.
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "mbind": (237, 235),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    # Old machinery that has had its holes.
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    "vhangup": (153, 58),
}


class Arg(NamedTuple):
    """A condition on an argument: `argument & mask == value`; the mask is of 32 bits."""

    number: int
    mask: int
    value: int


def _is(number: int, value: int) -> Arg:
    # The kernel takes these arguments as an int: what is above it must not make a difference.
    return Arg(number, 0xFFFF_FFFF, value)


_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _DGRAM = 1, 2
_NEW_NAMESPACES = 0x7E02_0000
# Whatever acts on a tracee, but not ATTACH (16) and SEIZE (0x4206): a debugger may run a program,
# which asks to be traced, and not take over one that runs.
_PTRACE = (*range(16), 17, 18, 19, 24, 31, *(n for n in range(0x4200, 0x4210) if n != 0x4206))

# Allowed where all conditions of a line hold, else refused; numbers as above.
CONDITIONAL: dict[str, tuple[tuple[int, int], tuple[tuple[Arg, ...], ...]]] = {
    "socket": (
        (41, 198),
        (
            (_is(0, _UNIX),),
            # The type's upper bits are flags. No raw sockets, and no vsock, packet, alg, xdp ...
            *(
                (_is(0, family), Arg(1, 0xF, kind))
                for family in (_INET, _INET6)
                for kind in (_STREAM, _DGRAM)
            ),
            (_is(0, _NETLINK), _is(2, 0)),  # Routes: the C library lists addresses by it.
        ),
    ),
    "socketpair": ((53, 199), ((_is(0, _UNIX),),)),
    "clone": ((56, 220), ((Arg(0, _NEW_NAMESPACES, 0),),)),
    "ptrace": ((101, 117), tuple((_is(0, request),) for request in _PTRACE)),
}

# Answered as by a kernel that has it not: its flags are in memory, where no filter can look, and
# the C library then takes `clone`.
ABSENT: dict[str, int] = {"clone3": 435}

# Docker's profile names what is allowed. Calls that Linux gave up long ago are not here.
ALLOWED = """
    accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chmod chown
    clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat
    dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait
    eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate
    fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr
    file_getattr file_setattr flistxattr flock fork fremovexattr fsetxattr fstat fstatfs fsync
    ftruncate futex futex_requeue futex_wait futex_waitv futex_wake futimesat get_mempolicy
    get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid
    getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom
    getresgid getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday
    getuid getxattr getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch
    io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit ioctl ioprio_get
    ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown
    lgetxattr link linkat listen listmount listxattr listxattrat llistxattr lremovexattr lseek
    lsetxattr lsm_get_self_attr lsm_list_modules lsm_set_self_attr lstat madvise
    map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat
    mlock mlock2 mlockall mmap mprotect mq_getsetattr mq_notify mq_open mq_timedreceive
    mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall
    munmap nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe
    pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2 prlimit64
    pselect6 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recvfrom
    recvmmsg recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
    rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max
    sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
    sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler
    sched_yield seccomp select semctl semget semop semtimedop sendfile sendmmsg sendmsg sendto
    set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer
    setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid
    setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 splice
    stat statfs statmount statx symlink symlinkat sync sync_file_range sync_file_range2 syncfs
    sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime
    timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask
    uname unlink unlinkat utime utimensat utimes vfork vmsplice wait4 waitid write writev
"""

# The last number that this list knows: file_setattr, of Linux 6.17.
_HIGHEST = 469

# From <linux/bpf_common.h>, <linux/seccomp.h> and <linux/audit.h>.
_LOAD, _AND, _JUMP_EQ, _JUMP_GT, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000
_NUMBER, _ARCH, _ARGS = 0, 4, 16
_MACHINES = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}


def problem() -> str | None:
    """Why there is no filter for this machine, or None."""
    machine = platform.machine()
    return None if machine in _MACHINES else f"no system-call filter is known for {machine}"


def bpf(machine: str) -> bytes:
    """The filter as an array of `struct sock_filter`.

    Args:
        machine: "x86_64" or "aarch64".
    """
    column, arch = _MACHINES[machine]
    refuse, absent = (_RETURN, _ERRNO | errno.EPERM), (_RETURN, _ERRNO | errno.ENOSYS)
    allow = (_RETURN, _ALLOW)
    code = [
        *_unless(arch, _ARCH, refuse),
        _step(_LOAD, _NUMBER),
        # Also the numbers of the x32 calls, which begin at 2^30.
        _step(_JUMP_GT, _HIGHEST, otherwise=1),
        _step(*absent),
    ]
    for number in ABSENT.values():
        code += [_step(_JUMP_EQ, number, otherwise=1), _step(*absent)]
    for numbers in DENIED.values():
        if (known := numbers[column]) is not None:
            code += [_step(_JUMP_EQ, known, otherwise=1), _step(*refuse)]
    for numbers, lines in CONDITIONAL.values():
        body = []
        for line in lines:
            checks = [_step(*allow)]
            for arg in reversed(line):
                checks = [
                    _step(_LOAD, _ARGS + 8 * arg.number),
                    _step(_AND, arg.mask),
                    _step(_JUMP_EQ, arg.value, otherwise=len(checks)),
                    *checks,
                ]
            body += checks
        body.append(_step(*refuse))
        code += [_step(_JUMP_EQ, numbers[column], otherwise=len(body)), *body]
    return b"".join([*code, _step(*allow)])


def _unless(value: int, offset: int, then: tuple[int, int]) -> list[bytes]:
    return [_step(_LOAD, offset), _step(_JUMP_EQ, value, then=1), _step(*then)]


def _step(code: int, operand: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction; a jump skips `then` or `otherwise` further ones."""
    return struct.pack("<HBBI", code, then, otherwise, operand)


def docker_profile() -> str:
    """The same as a profile for Docker, to follow `seccomp=` in a security option.

    What it does not name fails with EPERM, or with ENOSYS where runc finds it newer than the list.
    """
    rules: list[dict[str, Any]] = [
        {"names": ALLOWED.split(), "action": "SCMP_ACT_ALLOW"},
        {"names": list(ABSENT), "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
    ]
    for name, (_, lines) in CONDITIONAL.items():
        for line in lines:
            args = [
                {
                    "index": a.number,
                    "op": "SCMP_CMP_MASKED_EQ",
                    "value": a.mask,
                    "valueTwo": a.value,
                }
                for a in line
            ]
            rules.append({"names": [name], "action": "SCMP_ACT_ALLOW", "args": args})
    # No architectures: the machine's own alone.
    return json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})
