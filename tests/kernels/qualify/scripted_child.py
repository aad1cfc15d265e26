"""A child process that follows a script, for the tests of its parent: `scripted_child.py MACHINE SCRIPT`.

MACHINE is what it says of the machine. SCRIPT gives for each atom count of a call what happens there: "fused", "torch",
"killed", "hangs", "broken", "exits", or "slow".
"""

import json
import os
import signal
import sys
import time


def say(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def main(machine: str, script: str) -> None:
    job, actions = json.loads(sys.stdin.readline()), json.loads(script)
    say("machine", facts=json.loads(machine))
    for number in json.loads(sys.stdin.readline() or "[]"):
        item = job["items"][number]
        action = actions[str(item["Call"][1])] if "Call" in item else "torch"
        say("started", candidate="fused")
        if action == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "hangs":
            sys.stdin.read()  # until the parent is gone
            sys.exit(1)
        if action == "broken":
            say("broken", item=number, reason="AcceleratorError: an illegal memory access was encountered")
            sys.exit(3)
        if action == "exits":
            sys.exit("the driver is too old")
        if action == "slow":
            time.sleep(1)
        verdict = {"path": "torch", "reason": f"scripted {os.getpid()}", "batch": 2, "trials": []}
        say("verdict", item=number, verdict=verdict | {"date": "2026-11-29T08:00:00+00:00"})
    say("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
