"""Lost ranks, errors of a rank, and the rendezvous."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LIVENESS = "fastdino/liveness.py"
RENDEZVOUS = "fastdino/rendezvous.py"
DISTRIBUTED = "fastdino/distributed.py"
_ALIVE = "tests/test_liveness.py::test_"
SILENT = (
    f"{_ALIVE}a_silent_rank_ends_the_waits_of_the_others_and_one_of_them_prints_it",
    f"{_ALIVE}a_rank_that_gives_signs_of_life_is_waited_for",
)
EXPLAINED = (
    f"{_ALIVE}a_failed_collective_is_explained_by_the_silent_ranks",
    f"{_ALIVE}a_late_rank_is_named_and_a_closed_connection_is_no_timeout",
    f"{_ALIVE}a_failure_of_nobody_has_its_reason",
)
OWN = (
    f"{_ALIVE}an_error_of_a_rank_names_it_and_ends_the_others_silently",
    f"{_ALIVE}an_error_that_all_ranks_raise_is_unchanged",
)
INTERRUPTED = (f"{_ALIVE}a_rank_that_ends_without_a_line_is_named_by_one_of_the_others",)
ENDED = (f"{_ALIVE}an_error_of_one_rank_ends_one_that_does_not_return_from_a_collective",)
WORKED = (f"{_ALIVE}a_rank_may_work_longer_than_the_timeout",)

MUTANTS = (
    Mutant(LIVENESS, "silent + 1 if count == last else 0", "silent + 1", SILENT,
           equivalent="a rank is observed again before it counts as lost"),
    Mutant(LIVENESS, "silent * self._period > self._limit and", "False and", SILENT),
    Mutant(LIVENESS, "(self._rank + 1) % self._world_size", "self._rank", SILENT),
    Mutant(LIVENESS, "error.reported = fault.by != self._rank", "error.reported = False", SILENT),
    Mutant(LIVENESS, "if count == first[rank]]", "]", EXPLAINED),
    Mutant(LIVENESS, 'self._store.set(f"failed{self._rank}", "")', "pass", EXPLAINED),
    Mutant(LIVENESS, "if is_failed_collective(error):", "if False:", EXPLAINED),
    Mutant(LIVENESS, "and not error.agreed:", ":", OWN),
    Mutant(LIVENESS, "isinstance(error, BrokenPipeError) or", "", INTERRUPTED),
    Mutant(LIVENESS, "(self._rank - 1) % self._world_size, 1", "self._rank, 1", INTERRUPTED),
    Mutant(LIVENESS, "self._in_time(lambda: self._post(own), own)", "own", OWN),
    Mutant(LIVENESS, "RankLostError(fault.text) if fault.lost else", "", OWN + SILENT),
    Mutant(LIVENESS, "self._end_process(self.fault or self._unreachable())", "pass", ENDED),
    Mutant(DISTRIBUTED, "        gather(None)  # leave", "        # leave", WORKED),
    Mutant(DISTRIBUTED, "value, group=group)", "value)", WORKED),
    Mutant(RENDEZVOUS, "if number and here[rank][1] != launch.world_size:", "if False:"),
    Mutant(RENDEZVOUS, "        error.reported = True\n", ""),
    Mutant(RENDEZVOUS, "if number and here", "if here"),
    Mutant(RENDEZVOUS, "if number > 1:", "if number > 2:"),
    Mutant(RENDEZVOUS, "roll.hosts[1 : launch.rank]", "roll.hosts[: launch.rank]"),
    Mutant(RENDEZVOUS, "if here[rank] != known:", "if known is None:"),
    Mutant(RENDEZVOUS, "problem or not missing", "problem or missing != [*others]"),
)  # fmt: skip
