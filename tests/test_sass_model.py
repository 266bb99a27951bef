"""The static model of a kernel's time, on listings written by hand."""

from __future__ import annotations

import pytest

from benchmarks.gpu.predict import limit, resident_programs
from benchmarks.gpu.sass_model import H200, LANES, Gpu, estimate, loops, parse

STEADY = Gpu("steady", bytes_per_second=1e18)


def word(stall=1, writes=7, wait=0) -> str:
    """Return the upper word of an instruction with these control fields."""
    return f"{stall << 41 | writes << 46 | 7 << 49 | wait << 52:016x}"


def listing(*lines: tuple[str, str] | str) -> str:
    """Format instructions (text, upper word) and labels as nvdisasm does."""
    text = []
    for line in lines:
        if isinstance(line, str):
            text.append(f".{line}:")
        else:
            text.append(f"        /*0000*/   {line[0]} ;   /* 0x{0:016x} */")
            text.append(f"                                   /* 0x{line[1]} */")
    return "\n".join(text)


def cycles(*lines, resident=1, warps=1, trips=(), gpu=STEADY, warp_bytes=1.0) -> float:
    return estimate(parse(listing(*lines)), resident, warps, trips, gpu, warp_bytes).cycles


EXIT = ("EXIT", word())


def test_parser_reads_control_fields_and_targets():
    code = parse(
        listing(
            "L_x_0",
            ("LDG.E.128 R4, desc[UR4][R2.64]", word(stall=4, writes=2)),
            ("@!P0 BRA `(.L_x_0)", word(wait=0b100)),
            EXIT,
        )
    )
    load, branch, _ = code
    assert (load.name, load.lane_bytes, load.stall, load.write_scoreboard) == ("LDG", 16, 4, 2)
    assert (branch.predicated, branch.target, branch.wait) == (True, 0, 0b100)
    assert loops(code) == [0]


def test_stall_cycles_delay_the_next_instruction():
    assert cycles(("FADD R0, R0, R1", word(stall=9)), EXIT) == 9


def test_waiting_for_a_load_takes_its_latency():
    load = ("LDG.E.128 R4, desc[UR4][R2.64]", word(writes=0))
    assert cycles(load, ("FADD R0, R4, R4", word(wait=1)), EXIT) == H200.load_cycles + 1
    assert cycles(load, ("FADD R0, R4, R4", word()), EXIT) == 2


def test_memory_serves_the_given_bytes_at_its_rate():
    slow = Gpu("slow", bytes_per_second=H200.hertz * 132 * 4)  # 1 byte per cycle
    load = ("LDG.E.128 R4, desc[UR4][R2.64]", word(writes=0))
    lines = (load, load, load, ("FADD R0, R4, R4", word(wait=1)), EXIT)
    times = [cycles(*lines, gpu=slow, warp_bytes=b) for b in (3 * 512, 3 * 256)]
    assert times[0] - times[1] == pytest.approx(2 * 256, abs=3)  # the last of three loads


def test_loops_run_their_trips_also_when_nested():
    lines = (
        "L_x_0",
        "L_x_1",
        ("FADD R0, R0, R1", word()),
        ("@P0 BRA `(.L_x_1)", word()),
        ("@P1 BRA `(.L_x_0)", word()),
        EXIT,
    )
    outer = ("NOP", word())
    nested = (lines[0], outer, *lines[1:])
    result = estimate(parse(listing(*nested)), 1, 1, (2, 5), STEADY, 1.0)
    assert result.issued["fma"] == 2 * 5


def test_the_longer_of_two_branches_is_taken():
    lines = (
        ("@P0 BRA `(.L_x_0)", word()),
        ("FADD R0, R0, R1", word()),
        ("BRA `(.L_x_1)", word()),
        "L_x_0",
        *[("MUFU.EX2 R0, R0", word())] * 9,
        "L_x_1",
        EXIT,
    )
    result = estimate(parse(listing(*lines)), 1, 1, (), STEADY, 1.0)
    assert (result.issued["special"], result.issued["fma"]) == (9, 0)


def test_slow_pipe_limits_many_warps():
    lines = (*[("MUFU.EX2 R0, R0", word())] * 32, EXIT)
    assert cycles(*lines, resident=4, warps=4) == pytest.approx(4 * 32 * 8, rel=0.1)


def test_warps_beyond_the_resident_ones_start_when_others_end():
    lines = (("FADD R0, R0, R1", word(stall=15)), EXIT)
    assert cycles(*lines, resident=1, warps=3) > 2 * cycles(*lines, resident=3, warps=3)


def test_copies_to_shared_memory_are_awaited_by_group():
    copy = ("LDGSTS.E.128 [R4], desc[UR4][R2.64]", word())
    close = ("LDGDEPBAR", word())
    for allowed, waits in ((0, True), (1, False)):
        wait = (f"DEPBAR.LE SB0, 0x{allowed:x}", word())
        assert (cycles(copy, close, wait, EXIT) > H200.load_cycles) == waits


def test_bytes_in_flight_are_those_of_little():
    load = ("LDG.E.128 R4, desc[UR4][R2.64]", word(writes=0))
    wait = ("FADD R0, R4, R4", word(wait=1))
    code = parse(listing(load, wait, EXIT))
    result = estimate(code, 1, 1, (), STEADY, LANES * 16.0)
    assert result.bytes_in_flight == pytest.approx(4 * LANES * 16, rel=0.01)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [(128, 1, 0, 16), (132, 1, 0, 12), (40, 4, 0, 12), (16, 1, 0, 32), (32, 4, 114 * 1024, 1)],
)
def test_programs_of_an_sm(registers, warps, shared, programs):
    assert resident_programs(registers, warps, shared, H200) == programs


def test_limit_names_memory_issue_or_latency():
    assert [limit(10, 9, 2), limit(10, 2, 9), limit(10, 5, 5)] == ["memory", "issue", "latency"]
