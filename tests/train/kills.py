"""Kill a training run at random moments, resume it each time, and compare it with one that was left alone.

    python tests/train/kills.py --data DIR --out FOLDER --kills 20 --ranks 2

The processes get SIGKILL, so no code of theirs runs afterwards. The run has averaged weights (EMA), accumulated batches
and a checkpoint every three steps. Everything that it leaves has to be equal to the bit: the checkpoint with weights,
optimizer, EMA, random numbers and the position of the loader, the exported weights, and the metrics but for speeds.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sdnet.train.checkpoint import Checkpoint
from sdnet.train.environment import commit_of_checkout, device_name
from sdnet.train.run_folder import RunFolder

PROGRAM = Path(__file__).parents[2] / "train" / "imagenet.py"
SETTINGS = ("--recipe=demo", "--epochs=4", "--batch=8", "--accumulate=2", "--ema=0.99", "--width=4", "--image-size=32")
SETTINGS += ("--eval-resize=36", "--threads=1", "--log-every=1", "--checkpoint-every=3", "--seed=5")
SPEEDS = ("images_per_second", "data_wait", "memory_gb", "seconds")
START = 10.0
"""Seconds within which a kill without a step to wait for comes: while the program starts, checks images or builds."""


def command(data: Path, run: Path, ranks: int) -> list[str]:
    """Return the one command that starts the run and goes on with it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    where = ["--data", str(data), "--out", str(run), "--resume", "auto"]
    return [sys.executable, *launcher, str(PROGRAM), *where, *SETTINGS]


def run_killed(data: Path, run: Path, ranks: int, kills: int, seed: int) -> list[str]:
    """Run to the end in spite of `kills` kills, and return where each of them came."""
    chance, moments = random.Random(seed), []
    while True:
        process = subprocess.Popen(
            command(data, run, ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if len(moments) < kills:
            moments.append(kill_somewhere(process, chance))
            continue
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"The run ended with status {process.returncode}:\n{said}")
        return moments


def kill_somewhere(process: subprocess.Popen[str], chance: random.Random) -> str:
    """Kill all processes of a launch after some of its steps, or while it starts; return a description."""
    if chance.random() < 0.2:
        moment = chance.uniform(0, START)
        time.sleep(moment)
        said = f"{moment:.1f} s after the start"
    else:
        assert process.stdout
        steps, seen, said = chance.randint(1, 5), 0, "at the end"
        for line in process.stdout:
            seen += line.startswith("step ")
            if seen == steps:
                time.sleep(chance.uniform(0, 0.3))  # a step takes about 0.1 s, a checkpoint too
                said = f"after {line.split('  ')[0]}"
                break
    kill_all(process.pid)
    process.communicate()
    return said


def kill_all(pid: int) -> None:
    """Kill a program and the processes that it has started; torchrun starts each rank in a session of its own."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, signal.SIGSTOP)  # it cannot tell its children that one of them has died
        ranks = children(pid)
        for each in (*ranks, pid):
            os.kill(each, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the processes that another one has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def differences(run: Path, expected: Path) -> list[str]:
    """Return what differs between two runs, to the bit."""
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    found = [name for name in names if (run / name).read_bytes() != (expected / name).read_bytes()]
    one, two = (flat(vars(Checkpoint.load(folder / "last.pt"))) for folder in (run, expected))
    found += sorted(one.keys() ^ two.keys())
    found += [name for name in one.keys() & two.keys() if not same(one[name], two[name])]
    if metrics(run) != metrics(expected):
        found.append("metrics.jsonl")
    return found


def same(one: Any, two: Any) -> bool:
    """Return whether two leaves of a checkpoint are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    return one == two


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries and lists, by their path."""
    if not isinstance(value, dict | list):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for key, inner in pairs for path, leaf in flat(inner, f"{name}/{key}").items()}


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without what depends on the machine's speed."""
    return [{key: line[key] for key in line if key not in SPEEDS} for line in RunFolder(run).metrics()]


def main() -> None:
    """Run both runs, print the result and exit with status 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="an image folder of about 100 images")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    began = time.monotonic()
    run_killed(options.data, options.out / "whole", options.ranks, 0, options.seed)
    moments = run_killed(options.data, options.out / "killed", options.ranks, options.kills, options.seed)
    found = differences(options.out / "killed", options.out / "whole")
    result = {
        "kills": len(moments),
        "ranks": options.ranks,
        "moments": moments,
        "starts": len(RunFolder(options.out / "killed").environments()),
        "differences": found,
        "seconds": round(time.monotonic() - began),
        "settings": list(SETTINGS),
        "torch": torch.__version__,
        "processor": device_name(torch.device("cpu")),
        "commit": commit_of_checkout(),
    }
    print(json.dumps(result, indent=2))
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
