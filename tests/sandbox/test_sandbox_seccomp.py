"""The system-call filter, by what it answers: on this machine's kernel see the attacks."""

from __future__ import annotations

import errno
import json
import struct

import pytest

from sandbox.backends import seccomp

ALLOW = 0
_AUDIT = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}


def answer(machine: str, number: int, *args: int, arch: int | None = None) -> int:
    """The errno that the filter gives a call, 0 if it lets it pass."""
    audit = _AUDIT[machine] if arch is None else arch
    call = struct.pack("<iIQ6Q", number, audit, 0, *args, *[0] * (6 - len(args)))
    code = list(struct.iter_unpack("<HBBI", seccomp.bpf(machine)))
    place, value = 0, 0
    while True:
        op, then, otherwise, operand = code[place]
        place += 1
        if op == 0x20:
            (value,) = struct.unpack_from("<I", call, operand)
        elif op == 0x54:
            value &= operand
        elif op == 0x15:
            place += then if value == operand else otherwise
        elif op == 0x25:
            place += then if value > operand else otherwise
        else:
            assert op == 0x06
            return 0 if operand == 0x7FFF_0000 else operand & 0xFFFF


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_the_filter_answers_by_its_list(machine: str, column: int) -> None:
    numbers = {name: pair[column] for name, pair in seccomp.DENIED.items()}
    for name, number in numbers.items():
        if number is not None:
            assert answer(machine, number) == errno.EPERM, name
    refused = {*numbers.values(), seccomp.ABSENT["clone3"]}
    conditional = {pair[column] for pair, _ in seccomp.CONDITIONAL.values()}
    assert len({*refused, *conditional} - {None}) > 55
    for number in set(range(470)) - refused - conditional:
        assert answer(machine, number) == ALLOW, number
    for unknown in (470, 600, 0x4000_0000, 0x4000_0000 + 41, 0x7FFF_FFFF):
        assert answer(machine, unknown) == errno.ENOSYS
    assert answer(machine, 435) == errno.ENOSYS
    assert answer(machine, 1, arch=0x4000_0003) == errno.EPERM

    socket, clone, ptrace = (
        seccomp.CONDITIONAL[name][0][column] for name in ("socket", "clone", "ptrace")
    )
    stream, dgram, raw, cloexec = 1, 2, 3, 0x80000
    for args in ((1, stream, 0), (2, stream | cloexec, 6), (10, dgram, 17), (16, raw, 0)):
        assert answer(machine, socket, *args) == ALLOW, args
    for args in ((2, raw, 1), (10, raw | cloexec, 58), (17, raw, 3), (40, stream, 0), (38, 5, 0)):
        assert answer(machine, socket, *args) == errno.EPERM, args
        high = tuple(value | 1 << 32 for value in args)
        assert answer(machine, socket, *high) == errno.EPERM, high
    assert answer(machine, socket, 16, raw, 12) == errno.EPERM
    assert answer(machine, clone, 17) == answer(machine, clone, 0x3D0F00) == ALLOW
    for bit in (17, 25, 26, 27, 28, 29, 30):
        assert answer(machine, clone, 1 << bit | 17) == errno.EPERM, bit
    assert answer(machine, ptrace, 0) == answer(machine, ptrace, 0x4200) == ALLOW
    assert answer(machine, ptrace, 16) == answer(machine, ptrace, 0x4206) == errno.EPERM


def test_both_backends_have_one_list() -> None:
    profile = json.loads(seccomp.docker_profile())
    named = [name for rule in profile["syscalls"] for name in rule["names"]]
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert set(named) == {*seccomp.ALLOWED.split(), *seccomp.CONDITIONAL, *seccomp.ABSENT}
    assert not set(named) & set(seccomp.DENIED)
