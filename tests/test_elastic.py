"""Runs whose number of processes changes: --global_batch_size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from fastdino import TrainConfig, signals
from fastdino.errors import CheckpointError
from fastdino.training.loop import train
from tests.elastic_runs import PAUSE, RECORDS, last_attempts, record_steps, steps_of
from tests.processes import run_two
from tests.runs import STEPS, interrupt
from tests.small_networks import shrink_networks


def train_recorded(settings, records, stop_at):
    """Train in one rank, recording its steps, until a signal during the step `stop_at`."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_networks(patch)
        record_steps(patch, records)
        patch.setattr(signals, "AGREE_SECONDS", 0.0)  # the ranks exchange signals after each step
        if os.environ.get("RANK", "0") == "0":
            interrupt(patch, stop_at)
        status = train(TrainConfig.from_dict(settings))
    assert status == ("finished" if stop_at < 0 else "interrupted")


def logged(run: Path):
    """Return the values of log.txt that do not depend on the time."""
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_training(records, run, expected_records, expected_run):
    """Check images and losses of every step, and the log, against the uninterrupted run's."""
    ours, theirs = last_attempts(steps_of(records)), last_attempts(steps_of(expected_records))
    assert list(ours) == list(theirs)
    for iteration, (images, loss) in theirs.items():
        assert ours[iteration][0] == images
        assert ours[iteration][1] == pytest.approx(loss, rel=2e-4), iteration
    for line, expected in zip(logged(run), logged(expected_run), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)


def test_a_run_continues_on_other_numbers_of_processes(config, tmp_path, capsys):
    """Two sharded, one, and two again, stopped within epochs, against one to the end."""
    settings = config(batch_size_per_gpu=2, global_batch_size=4, epochs=3).to_dict()
    assert settings["drop_path_rate"] > 0
    whole, records = tmp_path / "whole", tmp_path / "records"
    train_recorded(settings | {"output_dir": str(whole)}, tmp_path / "whole_records", -1)
    assert "| 1 process(es) x 2 pass(es) of 2 images: global batch 4 |" in capsys.readouterr().out

    run_two(train_recorded, settings | {"fsdp": True}, records, STEPS + 1)
    with pytest.raises(
        CheckpointError, match=r"global batch of 4 .* this one has 2 on 1: use --gl"
    ):
        train(TrainConfig.from_dict(settings | {"global_batch_size": 0}))
    train_recorded(settings, records, 2 * STEPS)
    assert "resuming on 1 process(es) a run of 2: images, their" in capsys.readouterr().out
    run_two(train_recorded, settings, records, -1)

    assert_same_training(records, tmp_path / "run", tmp_path / "whole_records", whole)
    steps = last_attempts(steps_of(records))
    ranks = {line["iteration"]: line["ranks"] for line in steps_of(records)}
    assert [ranks[i] for i in steps] == [2] * (STEPS + 2) + [1] * (STEPS - 1) + [2] * (STEPS - 1)
    for epoch in range(3):
        images = [i for step in range(STEPS) for i in steps[epoch * STEPS + step][0]]
        assert len(set(images)) == len(images) == 16, "none is lost or repeated"


@pytest.mark.parametrize(("shared", "batch", "warned"), [
    ("True", 4, True), ("False", 4, False), ("True", 0, False),
])  # fmt: skip
def test_a_store_that_outlives_its_group_is_warned_of(
    config, small_networks, monkeypatch, capsys, shared, batch, warned
):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    train(config(global_batch_size=batch, epochs=1))
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err) == warned


class Agents:
    """Agents of torchrun with one worker each; their rendezvous is in this process."""

    def __init__(self, folder: Path, settings):
        self.folder, self.settings = folder, settings
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1",
            "--max_restarts=3", "--rdzv_backend=c10d", "--rdzv_id=elastic",
            f"--rdzv_endpoint=127.0.0.1:{self.store.port}", "--local_addr=127.0.0.1",
            "--rdzv_conf=is_host=false,last_call_timeout=1,keep_alive_interval=1",
        ]  # fmt: skip
        flags = []
        for name, value in self.settings.items():
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        environment = {
            RECORDS: str(self.folder), PAUSE: str(self.folder / "pause"),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        with open(self.folder / f"agent{len(self.processes)}.log", "wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [*launcher, "-m", "tests.elastic_runs", "train", *flags],
                    stdout=log,
                    stderr=log,
                    env=os.environ | environment,
                    start_new_session=True,
                )
            )
        return self.processes[-1]

    def pause(self, seconds: float) -> None:
        """Set the time that the workers wait after each step."""
        (self.folder / "pause").write_text(str(seconds))

    def wait_for_steps(self, ranks: int, after: int) -> list[dict[str, int]]:
        """Wait until this number of ranks has made two steps after an iteration."""

        def made():
            return [
                line for line in steps_of(self.folder)
                if line["ranks"] == ranks and line["iteration"] > after + 1
            ]  # fmt: skip

        self.wait(lambda: len({line["rank"] for line in made()}) == ranks)
        return made()

    def wait(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < until, self.output()
            assert any(agent.poll() is None for agent in self.processes), self.output()
            time.sleep(0.2)

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("agent*.log")))

    def kill(self, agent: subprocess.Popen[bytes]) -> None:
        """Kill an agent and its worker with SIGKILL, the agent first."""
        workers = {line["pid"] for line in steps_of(self.folder)}
        own = [pid for pid in workers if parent_of(pid) == agent.pid]
        for pid in [agent.pid, *own]:
            os.kill(pid, signal.SIGKILL)
        agent.wait()


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_goes_on_without_an_agent_and_takes_one_back(config, tmp_path):
    """An agent and its worker are killed within an epoch; later another one joins."""
    settings = config(
        batch_size_per_gpu=2, global_batch_size=4, epochs=8, saveckp_every_steps=3
    ).to_dict()
    whole, records = tmp_path / "whole", tmp_path / "records"
    train_recorded(settings | {"output_dir": str(whole)}, tmp_path / "whole_records", -1)
    records.mkdir()
    agents = Agents(records, settings)
    agents.pause(1.0)
    try:
        first, killed = agents.start(), agents.start()
        agents.wait_for_steps(2, STEPS - 1)
        agents.kill(killed)
        reached = max(line["iteration"] for line in steps_of(records))
        agents.pause(4.0)
        repeated = agents.wait_for_steps(1, reached - 3)
        second = agents.start()
        agents.wait_for_steps(2, max(line["iteration"] for line in repeated))
        agents.pause(0.0)
        assert [agent.wait(300) for agent in (first, second)] == [0, 0], agents.output()
    finally:
        for agent in agents.processes:
            if agent.poll() is None:
                agents.kill(agent)
    assert_same_training(records, tmp_path / "run", tmp_path / "whole_records", whole)
    steps = last_attempts(steps_of(records))
    for epoch in range(8):
        images = [i for step in range(STEPS) for i in steps[epoch * STEPS + step][0]]
        assert len(set(images)) == len(images) == 16, "none is lost or repeated"
    output = agents.output()
    assert "resuming on 1 process(es) a run of 2: images, their order" in output
    assert "resuming on 2 process(es) a run of 1: images, their order" in output
