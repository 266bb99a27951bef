"""Evaluations of the teacher during a run, and the loggers."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MONITOR = "fastdino/training/monitor.py"
LOOP = "fastdino/training/loop.py"
STRIPS = "fastdino/training/attention_strips.py"
LOGGERS = "fastdino/training/loggers.py"
TABLE = "fastdino/training/csv_logger.py"

_MONITORED = "tests/test_monitor.py::test_"
UNCHANGED = (f"{_MONITORED}monitoring_does_not_change_the_training[vit_nano]",)
MODES = (f"{_MONITORED}modes_of_the_teacher_are_restored",)
REPORTED = (f"{_MONITORED}results_are_in_the_log_the_curves_and_the_progress",)
KILLED = (f"{_MONITORED}resumed_run_matches_an_uninterrupted_one[extraction]",)
PICTURES = (f"{_MONITORED}pictures_show_the_first_image_of_each_class",)
_LOGGED = "tests/test_loggers.py::test_"
RESUMED = (f"{_LOGGED}resumed_table_has_no_row_twice",)
RENAMED = (f"{_LOGGED}table_of_another_run_is_renamed",)
FAILING = (f"{_LOGGED}failing_logger_warns_once_and_is_tried_again_after_a_save",)

MUTANTS = (
    Mutant(
        MONITOR,
        "fork_rng(devices=devices)",
        "fork_rng(devices=devices, enabled=False)",
        UNCHANGED,
    ),
    Mutant(MONITOR, "        backbone.eval()\n", "", MODES),
    Mutant(MONITOR, "module.training = mode", "module.training = True", MODES),
    Mutant(MONITOR, "(epoch + 1) % every", "epoch % every", REPORTED),
    Mutant(MONITOR, "or epoch + 1 == epochs", "", REPORTED),
    Mutant(
        LOOP,
        "self._save(whole=False)\n            self._finish_save()  # a run that is killed",
        "# a run",
        KILLED,
    ),
    Mutant(STRIPS, "return [*first, *np.", "return [*np.", PICTURES),
    Mutant(LOGGERS, "self._failed.add(name)", "pass", FAILING),
    Mutant(LOGGERS, "self._warned.add(name)", "pass", FAILING),
    Mutant(TABLE, "int(row[0]) < iteration", "int(row[0]) <= iteration", RESUMED),
    Mutant(TABLE, "if len(row) == len(HEADER)", "", RESUMED),
    Mutant(TABLE, "if new and self._path", "if not new and self._path", RENAMED),
)
