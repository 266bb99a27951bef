"""A static model of a kernel's time, from its machine code: one quarter of an SM of sm_90.

The code's own control fields (stall cycles, scoreboards) say when a warp may issue its next
instruction. The model adds the throughput of the execution pipes and a memory that serves bytes at
a fixed rate after a fixed latency. It has no caches, bank conflicts or instruction fetch, barriers
between warps cost nothing, and of two branches the longer is always taken. So it compares versions
of a streaming kernel and names what limits them; its times are predictions, not measurements.

Instruction encoding: Jia et al., "Dissecting the NVIDIA Volta GPU architecture", 2018, section 2.1.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

LANES = 32
QUARTERS = 4  # of an SM; each issues one instruction per cycle
SCOREBOARDS = 6
NONE = 7  # an instruction that sets no scoreboard


@dataclass(frozen=True)
class Gpu:
    """The limits that a GPU sets to a streaming kernel."""

    name: str
    bytes_per_second: float  # of a device-to-device copy, read and written
    multiprocessors: int = 132
    hertz: float = 1.83e9
    registers: int = 65536
    shared_bytes: int = 227 * 1024
    warps: int = 64
    programs: int = 32
    load_cycles: int = 700  # latency of a load from memory; 600 to 800 were measured by others

    @property
    def bytes_per_cycle(self) -> float:
        """Return the rate of one quarter of an SM."""
        return self.bytes_per_second / self.hertz / self.multiprocessors / QUARTERS


H200, H100 = Gpu("H200", 4.3e12), Gpu("H100", 3.0e12)


@dataclass(frozen=True)
class Instruction:
    """One instruction with its control fields; `target` is the index that a branch jumps to."""

    opcode: str
    predicated: bool
    operands: str
    stall: int
    write_scoreboard: int
    read_scoreboard: int
    wait: int  # bit mask of scoreboards
    target: int | None = None

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def lane_bytes(self) -> int:
        """Return the bytes per lane of a memory access."""
        for part in self.opcode.split(".")[1:]:
            if part in _WIDTHS:
                return _WIDTHS[part]
        return 4


_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_LABEL = re.compile(r"^\.(L_x_\d+):")
_LINE = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)"
    r"(?P<operands>[^;]*);\s*/\* 0x[0-9a-f]+ \*/"
)
_UPPER_WORD = re.compile(r"/\* 0x([0-9a-f]+) \*/")
_TARGET = re.compile(r"\.(L_x_\d+)")


def parse(listing: str) -> list[Instruction]:
    """Return the instructions of `nvdisasm -c -ndf -hex`, each printed as two 64-bit words."""
    labels: dict[str, int] = {}
    parsed: list[tuple[re.Match[str], int]] = []
    lines = iter(listing.splitlines())
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(parsed)
        elif match := _LINE.match(line):
            upper = _UPPER_WORD.search(next(lines))
            parsed.append((match, int(upper[1], 16) if upper else 0))
    return [_instruction(match, word, labels) for match, word in parsed]


def _instruction(match: re.Match[str], word: int, labels: dict[str, int]) -> Instruction:
    target = _TARGET.search(match["operands"]) if match["opcode"].startswith("BRA") else None
    never = (match["predicate"] or "").strip() == "@!PT"
    return Instruction(
        "NOP" if never else match["opcode"],
        bool(match["predicate"]),
        match["operands"].strip(),
        stall=word >> 41 & 15,
        write_scoreboard=word >> 46 & 7,
        read_scoreboard=word >> 49 & 7,
        wait=word >> 52 & 63,
        target=labels.get(target[1]) if target else None,
    )


# Pipe, cycles per instruction of a warp, and latency where a scoreboard reports the result.
_ALU, _FMA, _FMA_HEAVY = ("alu", 2, 14), ("fma", 1, 14), ("fma heavy", 2, 14)
_SPECIAL, _SHUFFLE = ("special", 8, 24), ("shuffle", 4, 24)
_ISSUE_ONLY = ("other", 0, 14)
_PIPES: dict[str, tuple[str, int, int]] = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2"), _FMA),
    "IMAD": _FMA_HEAVY,
    "MUFU": _SPECIAL,
    **dict.fromkeys(("F2I", "I2F", "F2F"), ("special", 8, 26)),
    "SHFL": _SHUFFLE,
    "REDUX": ("shuffle", 8, 30),
    "LDS": ("shared", 4, 30),  # per 4 bytes and lane
    "STS": ("shared", 4, 20),
    **dict.fromkeys(("LDG", "LDGSTS", "STG", "ATOMG", "RED", "REDG"), ("memory", 4, 20)),
    **dict.fromkeys(("LDC", "S2R", "S2UR", "ULDC"), ("other", 0, 40)),
    **dict.fromkeys(("DADD", "DMUL", "DFMA"), ("fp64", 2, 20)),
    **dict.fromkeys(("FMNMX", "FMNMX3", "FSEL", "FSETP", "F2FP", "I2FP"), _ALU),
    **dict.fromkeys(("SHF", "PRMT", "SEL", "ISETP", "LOP3", "IADD3", "LEA", "SGXT"), _ALU),
    **dict.fromkeys(("PLOP3", "VIMNMX", "VIADD", "IABS"), _ALU),
}
_QUEUE = 8  # instructions that a slow pipe accepts before it stops the issue
_QUEUED = {"special", "shuffle", "shared", "memory"}
_LOADS, _STORES = {"LDG", "LDGSTS"}, {"STG"}
_ATOMIC_CYCLES, _CACHED_CYCLES = 700, 250


@dataclass
class Estimate:
    """Cycles of one quarter of an SM, and what it issued in them, by pipe."""

    cycles: float
    issued: Counter[str]
    bytes_in_flight: float  # of loads, averaged over the time, in the whole SM


@dataclass
class _Warp:
    ready: float
    trips: dict[int, int]
    position: int = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * SCOREBOARDS)
    copies: float = 0.0  # completion of asynchronous copies that belong to no group yet
    groups: deque[float] = field(default_factory=deque)


def loops(code: Sequence[Instruction]) -> list[int]:
    """Return the first instructions of all loops, outer loops first."""
    heads = {
        instruction.target
        for index, instruction in enumerate(code)
        if instruction.target is not None and instruction.target < index
    }
    return sorted(heads)


def estimate(
    code: Sequence[Instruction],
    resident: int,
    warps: int,
    trips: Sequence[int],
    gpu: Gpu,
    warp_bytes: float,
) -> Estimate:
    """Simulate the warps of one quarter of an SM.

    Accesses as wide as the widest load stream through memory, the others hit a cache. Predicates
    are not evaluated, so a pipelined loop seems to load beyond its end; therefore each access
    counts only as many bytes as make the known total.

    Args:
        code: the kernel.
        resident: warps that fit at a time.
        warps: warps to run; one starts when another ends.
        trips: iterations of each loop, in the order of loops(); 1 for those that are missing.
        gpu: the memory's rate and latency.
        warp_bytes: bytes that one warp reads and writes.
    """
    alone = _Quarter(code, trips, gpu, 1.0)
    alone.run(1, 1)
    share = warp_bytes / alone.accessed if alone.accessed else 1.0
    return _Quarter(code, trips, gpu, share).run(resident, warps)


class _Quarter:
    def __init__(
        self, code: Sequence[Instruction], trips: Sequence[int], gpu: Gpu, share: float
    ) -> None:
        self.code, self.gpu, self.share = code, gpu, share
        heads = loops(code)
        self.trips = dict(zip(heads, [*trips, *[1] * len(heads)], strict=False))
        widths = [i.lane_bytes for i in code if i.name in _LOADS]
        self.stream_width = max(widths, default=0)  # narrower loads are of a few cached values
        self.pipes: dict[str, float] = defaultdict(float)  # when each pipe is free again
        self.memory_free = 0.0
        self.issued: Counter[str] = Counter()
        self.byte_cycles = 0.0  # of loads, from their issue to their arrival
        self.accessed = 0.0  # bytes

    def run(self, resident: int, warps: int) -> Estimate:
        running = [self._start(37.0 * n) for n in range(min(resident, warps))]
        waiting = warps - len(running)
        now = -1.0
        while running:
            warp = min(running, key=self._earliest)
            now = max(now + 1, self._earliest(warp))
            if self._issue(warp, now):
                running.remove(warp)
                if waiting:
                    waiting -= 1
                    running.append(self._start(now + 200))
        in_flight = QUARTERS * self.byte_cycles / max(now, 1)
        return Estimate(now, self.issued, in_flight)

    def _start(self, time: float) -> _Warp:
        return _Warp(time, dict(self.trips))

    def _earliest(self, warp: _Warp) -> float:
        instruction = self.code[warp.position]
        ready = warp.ready
        if instruction.wait:
            for bit in range(SCOREBOARDS):
                if instruction.wait >> bit & 1:
                    ready = max(ready, warp.scoreboards[bit])
        if instruction.name == "DEPBAR" and warp.groups:
            allowed = int(instruction.operands.split(",")[-1], 16)
            if len(warp.groups) > allowed:
                ready = max(ready, warp.groups[len(warp.groups) - 1 - allowed])
        pipe, cycles, _ = _PIPES.get(instruction.name, _ISSUE_ONLY)
        slack = _QUEUE * cycles if pipe in _QUEUED else 0
        return max(ready, self.pipes[pipe] - slack) if cycles else ready

    def _issue(self, warp: _Warp, now: float) -> bool:
        """Issue the warp's next instruction; return True if it was the last."""
        instruction = self.code[warp.position]
        pipe, cycles, latency = _PIPES.get(instruction.name, _ISSUE_ONLY)
        start = max(now, self.pipes[pipe]) if cycles else now
        self.pipes[pipe] = start + cycles * (instruction.lane_bytes / 4 if pipe == "shared" else 1)
        self.issued[pipe] += 1
        done = start + latency
        if instruction.name in _LOADS | _STORES:
            done = self._access(instruction, warp, start)
        elif instruction.name.startswith(("ATOM", "RED")) and instruction.name != "REDUX":
            done = start + _ATOMIC_CYCLES
        elif instruction.name == "LDGDEPBAR":
            warp.groups.append(warp.copies)
        if instruction.write_scoreboard != NONE:
            board = instruction.write_scoreboard
            warp.scoreboards[board] = max(warp.scoreboards[board], done)
        if instruction.read_scoreboard != NONE:
            board = instruction.read_scoreboard
            warp.scoreboards[board] = max(warp.scoreboards[board], start + 20)
        warp.ready = now + max(1, instruction.stall)
        return self._advance(warp, instruction)

    def _access(self, instruction: Instruction, warp: _Warp, start: float) -> float:
        """Return when a load's data arrive, or a store has left."""
        if instruction.lane_bytes < self.stream_width:
            return start + (_CACHED_CYCLES if instruction.name in _LOADS else 20)
        size = LANES * instruction.lane_bytes * self.share
        self.accessed += size
        served = max(start, self.memory_free)
        self.memory_free = served + size / self.gpu.bytes_per_cycle
        if instruction.name in _STORES:
            return start + 20
        done = served + self.gpu.load_cycles
        self.byte_cycles += size * (done - start)
        if instruction.name == "LDGSTS":
            warp.copies = max(warp.copies, done)
            return start + 20
        return done

    def _advance(self, warp: _Warp, instruction: Instruction) -> bool:
        """Move to the following instruction; return True if there is none."""
        target, here = instruction.target, warp.position
        warp.position += 1
        if target is not None and target < here:
            warp.trips[target] -= 1
            if warp.trips[target] > 0:
                warp.position = target
            else:
                warp.trips[target] = self.trips[target]  # for the next time around
        elif target is not None and (not instruction.predicated or self._longer(here, target)):
            warp.position = target
        ended = instruction.name == "EXIT" and not instruction.predicated
        return ended or target == here or warp.position >= len(self.code)

    def _longer(self, branch: int, target: int) -> bool:
        """Return True if a conditional branch skips a block that has a longer alternative."""
        last = self.code[target - 1]
        if last.target is None or last.predicated or last.target <= target:
            return False
        return last.target - target > target - branch
