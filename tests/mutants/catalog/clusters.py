"""Launchers, Slurm jobs, and the signals that stop a run."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LAUNCH = "fastdino/launch.py"
SUBMIT = "fastdino/submit.py"
REQUEUE = "fastdino/requeue.py"
SIGNALS = "fastdino/signals.py"
IMAGES = "fastdino/data/image_dataset.py"
LOOP = "fastdino/training/loop.py"
WRITER = "fastdino/training/checkpoint_writer.py"
COPY = "fastdino/training/host_copy.py"
SHARDS = "fastdino/training/shard_files.py"
WORLD = "fastdino/training/world_size.py"
SPLIT = "fastdino/batch_split.py"
WAITING = "fastdino/waiting.py"
FOLDER = "fastdino/training/output_folder.py"

_ENVIRONMENT = "tests/test_launch_environment.py::test_"
PLACE = (f"{_ENVIRONMENT}the_environment_states_the_place_of_this_process",)
CONTRADICTION = (f"{_ENVIRONMENT}contradictory_variables_are_one_line",)
HOSTS = (f"{_ENVIRONMENT}the_first_host_of_a_node_list",)
PRESENT = ("tests/test_image_dataset.py::test_a_machine_needs_some_files_of_the_dataset",)
_WRITES = "tests/test_checkpoint_writer.py::test_"
BUFFERS = (f"{_WRITES}buffers_are_used_again_and_follow_the_state",)
LATER = (f"{_WRITES}later_changes_do_not_reach_the_file",)
REPEATED = (f"{_WRITES}failed_write_keeps_the_old_file_and_is_repeated_once",)
FREED = (f"{_WRITES}without_memory_for_a_later_copy_the_former_is_freed",)
ENDED = (f"{_WRITES}a_run_that_ended_leaves_no_thread_and_no_state_in_memory",)
FINISHED = ("tests/test_waiting.py::test_a_finished_task_keeps_nothing_in_memory",)
ELSEWHERE = ("tests/test_loop.py::test_a_node_without_the_data_is_one_line",)

MUTANTS = (
    Mutant(LAUNCH, "job += _NEXT_STEP *", "job += 0 *", PLACE),
    Mutant(LAUNCH, 'visible and "," not in visible', "visible", PLACE),
    Mutant(LAUNCH, '("SLURM_GPUS_PER_TASK" in environ or of_step > 1)', "True", PLACE),
    Mutant(LAUNCH, " or of_step > 1", "", PLACE),
    Mutant(LAUNCH, "tasks not in (1, world_size) and", "tasks != 1 and", PLACE),
    Mutant(LAUNCH, ' and "TORCHELASTIC_RUN_ID" not in environ', "", PLACE),
    Mutant(LAUNCH, "        _check_tasks(environ)\n", "", CONTRADICTION),
    Mutant(LAUNCH, "_NODE_LIST.fullmatch(nodes)", "_NODE_LIST.match(nodes)", CONTRADICTION),
    Mutant(LAUNCH, 'r"\\1", match[1]', 'r"\\1", nodes', HOSTS),
    Mutant(SIGNALS, "self.received in (None, signal.SIGUSR1.name)", "self.received is None"),
    Mutant(SIGNALS, "elif number != signal.SIGUSR1 and now", "elif now"),
    Mutant(SIGNALS, "now - self._received_at > SAME", "now > SAME"),
    Mutant(
        SIGNALS,
        ", signal.SIGHUP, signal.SIGUSR1)",
        ", signal.SIGHUP)",
        crash="a SIGUSR1 that is not caught ends the process",
    ),
    Mutant(IMAGES, "if not any(map(os.path.exists", "if not all(map(os.path.exists", PRESENT),
    Mutant(LOOP, "            dataset.check_present()\n", "            pass\n", ELSEWHERE),
    Mutant(SUBMIT, "argument.replace(JOB, job)", "argument"),
    Mutant(SUBMIT, "            signal.signal(number, signal.SIG_DFL)\n", "            pass\n"),
    Mutant(SUBMIT, "if args.requeue else None", "if True else None"),
    Mutant(SUBMIT, "part and shlex.quote(part)", "part"),
    Mutant(SUBMIT, "if 60 * args.timeout < least:", "if 60 * args.timeout < 0:"),
    Mutant(SUBMIT, "text.splitlines() != [text]", "len(text.splitlines()) > 1"),
    Mutant(SUBMIT, "log_folder(config.output_dir).absolute()", "log_folder(config.output_dir)"),
    Mutant(SUBMIT, "if parameters[parameter] is not None and", "if"),
    Mutant(SUBMIT, "os.path.realpath(config.output_dir) ==", "config.output_dir =="),
    Mutant(SUBMIT, '        _check_encoding(f"--{name}", text or "")\n', ""),
    Mutant(SUBMIT, '"timeout", "dist_timeout_minutes")', '"timeout")'),
    Mutant(SUBMIT, "        os.environ.update(removed)\n", "        pass\n"),
    Mutant(SUBMIT, "    config.check_world_size(args.nodes * args.ngpus)\n", ""),
    Mutant(REQUEUE, "    if status > 128:\n", "    if status > 143:\n"),
    Mutant(REQUEUE, 'if states != {"RUNNING"}:', 'if "COMPLETING" in states:'),
    Mutant(REQUEUE, "        _check_running(job)  # scontrol", "        # scontrol"),
    Mutant(REQUEUE, "if counts.empty >= MAX_EMPTY:", "if counts.empty > MAX_EMPTY:"),
    Mutant(REQUEUE, "if epochs <= before.epochs else 0", "if epochs < before.epochs else 0"),
    Mutant(REQUEUE, "if path.name.isdecimal()]", "]"),
    Mutant(REQUEUE, "    if before.job != job:\n", "    if not job:\n"),
    Mutant(REQUEUE, 'bool(environ.get("SLURM_ARRAY_JOB_ID"))', "False"),
    Mutant(REQUEUE, "type(number) is int and ", ""),
    Mutant(REQUEUE, 'if not name.startswith("SQUEUE_")', 'if name != "SQUEUE_"'),
    Mutant(REQUEUE, "permanent in done.stderr", "permanent == done.stderr"),
    Mutant(REQUEUE, "restart_count() + 1", "1"),
    Mutant(SUBMIT, 'None if config.device == "cpu" else args.ngpus', "args.ngpus"),
    Mutant(SUBMIT, "numbered[-1].parent", "numbered[0].parent"),
    Mutant(SUBMIT, "filter(None, lines)", "lines[-1:]"),
    Mutant(WRITER, "            self._error = error\n", "            pass\n", REPEATED),
    Mutant(WRITER, "        self._last = None  # it refers to the former copy\n", "", FREED),
    Mutant(WRITER, "            self._thread.shutdown()\n", "            pass\n", ENDED),
    Mutant(
        COPY,
        "                self._buffers[place] = buffer\n",
        "                missing.append((place, tensor))\n",
        BUFFERS,
    ),
    Mutant(
        COPY,
        "return type(value)(self._copy(item",
        "return value or type(value)(self._copy(item",
        LATER,
    ),
    Mutant(COPY, "            self.clear()\n", "            pass\n", FREED),
    Mutant(SHARDS, "max(_saves(folder)", "min(_saves(folder)"),
    Mutant(SHARDS, "if path.name.isdecimal() and path.is_dir()", "if path.is_dir()"),
    Mutant(
        SHARDS,
        "            os.replace(save, part)  # it counts only with all of its files\n",
        "            part = save\n",
    ),
    Mutant(SHARDS, "if not is_dtype and (module, name) not in SAFE_NAMES", "if not name"),
    Mutant(WORLD, "before in (0, world_size)", "before == world_size"),
    Mutant(WORLD, "if old_batch != new_batch:", "if old_batch > 2 * new_batch:"),
    Mutant(WORLD, "theirs.images * before != ours", "theirs.images != ours"),
    Mutant(SPLIT, "if images <= k * largest)", "if images < k * largest)"),
    Mutant(SPLIT, "if k < 2 * world_size", "if k <= world_size"),
    Mutant(FOLDER, "if not restart_count():", "if restart_count() < 2:"),
    Mutant(FOLDER, "if time.monotonic() > end:", "if time.monotonic() > 0:"),
    Mutant(WAITING, "            del run  # with", "            # with", FINISHED),
)
