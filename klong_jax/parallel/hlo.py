"""What a compiled program sends between devices, read from its text.

The text is XLA's HLO after optimisation: computations that call one another, in which loops appear
once. A collective counts as often as the loops around it run.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

_BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
# A kernel's configuration may span lines, some of which begin with a brace too.
_END = re.compile(r"^\}(?:, execution_thread=.*)?$")
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS}|ragged-all-to-all)(-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
        kind: As in "all-gather".
        axes: Mesh axes over which it goes, joined with "+".
        sent_bytes: Bytes that each device sends each time.
        times: How often it runs in one run of the program.
    """

    kind: str
    axes: str
    sent_bytes: float
    times: int


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """All exchanges of a program.

    Args:
        text: HLO after optimisation.
        mesh: Axis names and sizes; devices are numbered along them, the last axis fastest.
    """
    computations = dict(_computations(text))
    times = _times(computations, _entry(text))
    found: dict[tuple[str, Collective], Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None or not times[name]:
                continue
            group = _first_group(line, int(np.prod(list(mesh.values()))))
            each = _sent(match[2], _bytes(match[1], bool(match[3])), len(group))
            one = Collective(match[2], _axes(group, mesh), each, times[name])
            # XLA clones an exchange into what it overlaps with; the copies share a channel.
            channel = re.search(r"channel_id=(\d+)", line)
            found[(channel[1] if channel else f"{name}/{line}", one)] = one
    return [one for one in found.values() if one.sent_bytes]


def sent_by_axes(found: Iterable[Collective]) -> dict[str, float]:
    """Bytes that each device sends in one run, by mesh axes."""
    total: dict[str, float] = defaultdict(float)
    for one in found:
        total[one.axes] += one.sent_bytes * one.times
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, lines = head[1], []
        elif name and _END.match(line):
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _entry(text: str) -> str:
    found = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if found is None:
        raise ValueError("the program has no entry computation")
    return found[1]


def _times(computations: Mapping[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in computations.get(name, ()):
            loop = _WHILE.search(line)
            inner = count * _trips(line, computations.get(loop[1], [])) if loop else count
            for called, branches in _CALLED.findall(line):
                for callee in [called] if called else re.findall(r"[\w.\-]+", branches):
                    visit(callee, inner)

    visit(entry, 1)
    return times


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop runs: what XLA knows, else the bound its counter is compared with."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return max(map(int, bounds), default=1)


def _bytes(shapes: str, start: bool) -> int:
    """Bytes of the result; the start of an asynchronous exchange names its operand too."""
    sizes = [0]
    for kind, dimensions in _SHAPE.findall(shapes):
        digits = re.search(r"\d+", kind)
        bits = _BITS.get(kind) or (int(digits[0]) if digits else 0)
        sizes.append(int(np.prod([int(d) for d in dimensions.split(",") if d])) * bits // 8)
    return max(sizes) if start else sum(sizes)


def _sent(kind: str, size: int, group: int) -> float:
    """Bytes a device sends in a ring, by the size of its result."""
    if kind == "collective-permute":
        # Where every device sends to itself, nothing is sent.
        return float(size) if group > 1 else 0.0
    if kind == "reduce-scatter":
        return float(size * (group - 1))
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _first_group(line: str, devices: int) -> list[int]:
    """The devices of the first group that exchanges."""
    if "source_target_pairs=" in line:
        listed = line.partition("source_target_pairs={")[2].partition("}}")[0]
        pairs = re.findall(r"(\d+),(\d+)", listed)
        # Some devices send to themselves; where the others send to says which axis it is.
        return next(([int(a), int(b)] for a, b in pairs if a != b), [0])
    if first := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(device) for device in first[1].split(",")]
    iota = r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(iota, line):
        order = np.arange(devices).reshape([int(n) for n in found[3].split(",")])
        if found[4]:
            order = order.transpose([int(n) for n in found[4].split(",")])
        return [int(device) for device in order.reshape(int(found[1]), int(found[2]))[0]]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        grid = np.arange(devices).reshape([int(n) for n in sizes.values()])
        chosen = re.findall(r"'(\w+)'", found[2])
        index = tuple(slice(None) if axis in chosen else 0 for axis in sizes)
        return [int(device) for device in grid[index].ravel()]
    return list(range(devices))


def _axes(group: list[int], mesh: Mapping[str, int]) -> str:
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    moving = (places != places[:, :1]).any(axis=1)
    return "+".join(axis for axis, moves in zip(mesh, moving, strict=True) if moves) or "none"
