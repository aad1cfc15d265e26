"""Real launchers and real signals: `accelerate launch`, torchrun on one node and on two, SIGTERM, SIGKILL, SIGSTOP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from sdnet.train import imagenet
from tests.train import kills

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]

PROGRAM = kills.PROGRAM
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SETTINGS = ("--recipe=demo", "--batch=8", "--width=4", "--image-size=32", "--eval-resize=36", "--threads=1")
ENDLESS = (*SETTINGS, "--epochs=1000", "--log-every=1000000")
Process = subprocess.Popen[str]
TORCHRUN = ("-m", "torch.distributed.run")


@pytest.fixture
def data(make_tree: MakeTree) -> Path:
    """19 pictures to train on, 7 to evaluate: uneven for two processes."""
    return make_tree([10, 9], [4, 3])


@contextlib.contextmanager
def started(*command: str | Path) -> Iterator[Process]:
    """A program that ends with the block, as do the processes that it has started."""
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            kills.kill_all(process.pid)


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)


def epochs(run: Path) -> list[int]:
    return [line["epoch"] for line in kills.metrics(run)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_sigterm_to_accelerate_launch_reaches_the_training(data: Path, tmp_path: Path) -> None:
    """For one process that launcher forwards nothing and ends at once; the training sees that and ends too."""
    run = tmp_path / "run"
    launch = ("-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no")
    with started(*launch, "--dynamo_backend=no", PROGRAM, "--data", data, "--out", run, *ENDLESS) as launcher:
        wait_for((run / "last.pt").exists)
        launcher.send_signal(signal.SIGTERM)
        said, _ = launcher.communicate(timeout=180)  # until the training closes the output
    assert launcher.returncode == -signal.SIGTERM
    assert f"go on with --resume {run}" in said
    assert not (run / "run.lock").exists()


def test_ranks_agree_to_stop_long_before_a_report_and_bear_repeated_signals(data: Path, tmp_path: Path) -> None:
    """One rank gets SIGTERM first; a moment later a scheduler sends it to everything, while torchrun forwards it."""
    run = tmp_path / "run"
    with started(*TORCHRUN, "--standalone", "--nproc_per_node=2", PROGRAM, "--data", data, "--out", run, *ENDLESS) as (
        agent
    ):
        wait_for((run / "last.pt").exists)
        ranks = kills.children(agent.pid)
        for target in (ranks[1], agent.pid, *ranks, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, signal.SIGTERM)
            time.sleep(0.05)
        said, _ = agent.communicate(timeout=180)
    assert said.count("go on with --resume") == 1, said
    assert "Traceback" not in said.partition("go on with")[0]
    assert not (run / "run.lock").exists()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_three_kills_at_random_moments_change_nothing(data: Path, tmp_path: Path, ranks: int) -> None:
    """`python tests/train/kills.py` does it 20 times, on one rank and on two; RESULTS.md has what came out."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    if ranks == 1:
        imagenet.main(kills.command(data, whole, 1)[2:])  # in this process, which takes half the time
    else:
        kills.run_killed(data, whole, ranks, 0, 0)
    assert len(kills.run_killed(data, killed, ranks, 3, seed=3)) == 3
    assert kills.differences(killed, whole) == []
    assert epochs(killed) == [1, 2, 3, 4]
    assert (killed / "last_ema.safetensors").exists()


@pytest.mark.slow
def test_ranks_stop_when_their_agent_was_killed(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(*TORCHRUN, "--standalone", "--nproc_per_node=2", PROGRAM, "--data", data, "--out", run, *ENDLESS) as (
        agent
    ):
        wait_for((run / "last.pt").exists)
        agent.kill()
        said, _ = agent.communicate(timeout=180)
    assert said.count("go on with --resume") == 1, said
    assert not (run / "run.lock").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_one_sentence(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(*TORCHRUN, "--standalone", "--nproc_per_node=2", PROGRAM, "--data", data, "--out", run, *ENDLESS) as (
        agent
    ):
        wait_for((run / "last.pt").exists)
        os.kill(kills.children(agent.pid)[1], signal.SIGKILL)
        said, _ = agent.communicate(timeout=180)
    assert agent.returncode != 0
    sentence = f"error: Process 0 cannot go on: another process of the run has ended; the last checkpoint is {run}"
    assert said.count(sentence) == 1, said
    assert not (run / "run.lock").exists()


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_after_the_timeout(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--data", data, "--out", run, "--timeout=5", *ENDLESS)
    with started(*TORCHRUN, "--standalone", "--nproc_per_node=2", PROGRAM, *options) as agent:
        wait_for((run / "last.pt").exists)
        stopped = kills.children(agent.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        said, _ = agent.communicate(timeout=240)  # the agent kills the stopped rank after 30 s
    assert "another process of the run did not answer within 5 seconds (--timeout)" in said, said


def node(rank: int, port: int, data: Path, run: Path, *options: str) -> contextlib.AbstractContextManager[Process]:
    """One of two torchrun agents on the loopback device, as on two machines with a common file system."""
    where = ("--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}", f"--master_port={port}")
    program = (PROGRAM, "--data", data, "--out", run, "--resume", "auto", *SETTINGS)
    return started(*TORCHRUN, *where, "--master_addr=127.0.0.1", *program, *options)


@pytest.mark.slow
def test_two_nodes_count_exactly_and_go_on_after_one_was_killed(data: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    many = ("--epochs=12", "--checkpoint-every=1")
    with node(0, port, data, run, *many) as first, node(1, port, data, run, *many) as second:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(epochs(run)) >= 2)
        kills.kill_all(second.pid)
        said, _ = first.communicate(timeout=180)
    assert first.returncode != 0
    assert "cannot go on: another process of the run has ended" in said, said
    assert len(epochs(run)) < 12

    port = free_port()
    with node(0, port, data, run, *many) as first, node(1, port, data, run, *many) as second:
        said, _ = first.communicate(timeout=600)
        assert (first.wait(), second.wait()) == (0, 0), said
    lines = kills.metrics(run)
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert all(round(line["val_top1"] * 7 / 100, 6).is_integer() for line in lines)
    starts = json.loads((run / "environment.json").read_text())
    assert [start["processes"] for start in starts] == [2, 2]
    assert starts[1]["step"] >= 2


@pytest.mark.slow
def test_nodes_that_differ_are_refused_with_one_sentence(data: Path, tmp_path: Path) -> None:
    run, absent = tmp_path / "run", tmp_path / "absent"
    differs = "The processes of the run differ: the setting lr is 0.02 in process 0 and 0.5 in process 1."
    missing = f"In process 1: The data folder {absent} does not exist."
    for folder, options, sentence in ((data, ["--lr=0.5"], differs), (absent, [], missing)):
        port = free_port()
        with node(0, port, data, run) as first, node(1, port, folder, run, *options) as second:
            said, _ = first.communicate(timeout=180)
            second.wait()
        assert said.count(f"error: {sentence}") == 1, said
        assert not run.exists()


SLURM = {
    # srun passes signals of scancel on to all processes of the step, torchrun and the ranks.
    "srun": 'shift 2\necho $$ > "$STEP"\nexec "$@"',
    "scancel": '[ "$*" = "--signal=TERM 7.0" ] && step=$(cat "$STEP") && '
    "kill -TERM $step $(cat /proc/$step/task/$step/children)",
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> "$STEP.requeued"; fi',
}
"""Stand-ins for the commands of Slurm, for one node."""


@pytest.mark.slow
def test_the_slurm_script_stops_with_a_checkpoint_and_requeues_the_job(data: Path, tmp_path: Path) -> None:
    """The script of docs/training.md, with two processes in place of eight."""
    root, run, step = PROGRAM.parents[1], tmp_path / "run", tmp_path / "step"
    script = (root / "docs" / "training.md").read_text().partition("#!/bin/bash\n")[2].partition("```")[0]
    for ours, theirs in (("2", "8"), (str(free_port()), "29500")):
        script = script.replace(f"--nproc_per_node {theirs}", f"--nproc_per_node {ours}").replace(
            f":{theirs}", f":{ours}"
        )
    script = script.replace("--resume auto", " ".join(["--resume auto", *ENDLESS]))
    (tmp_path / "job.sh").write_text(script)
    for name, content in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / name).chmod(0o755)
    environment = ENVIRONMENT | {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "STEP": str(step),
    }
    environment |= {"SLURM_JOB_NODELIST": "node", "DATA": str(data), "RUN": str(run)}
    environment["PATH"] = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    with subprocess.Popen(
        ["bash", tmp_path / "job.sh"],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        try:
            wait_for((run / "last.pt").exists)
            job.send_signal(signal.SIGUSR1)
            said, _ = job.communicate(timeout=180)
        finally:
            kills.kill_all(job.pid)
    assert said.count("go on with --resume") == 1, said
    assert job.returncode == 1
    assert Path(f"{step}.requeued").read_text() == "requeue 7\n"
    assert not (run / "run.lock").exists()
