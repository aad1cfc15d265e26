"""A program for test_agreement: `agreeing_ranks.py FOLDER RANK` lets two ranks qualify a model over gloo, twice.

What the child process would find out is scripted: PyTorch for the layer, and Triton for the update. In the second
agreement the driver of rank 1 is another one.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sdnet
from sdnet.kernels.qualify import job, key, parent
from sdnet.kernels.qualify.key import Call, Flags, machine_of
from sdnet.kernels.qualify.parent import Outcome
from sdnet.kernels.qualify.verdicts import TORCH, UPDATE, Verdict

CPU = torch.device("cpu")


def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = sdnet.CSCConv2d(3, 8, 3, input_size=8), torch.randn(2, 3, 8, 8)
    qualified = 0

    def scripted(items: Any, device: str, **_: object) -> Outcome:
        nonlocal qualified
        qualified += 1
        paths = [(item, TORCH if isinstance(item, Call) else UPDATE) for item in items]
        return Outcome(machine_of(CPU), {item.key(Flags.now()): Verdict(path, "scripted") for item, path in paths})

    parent.qualify = scripted  # pyright: ignore[reportAttributeAccessIssue]
    found: dict[str, Any] = {}
    for name in ("alike", "different"):
        if name == "different" and rank == 1:
            facts = machine_of(CPU) | {"driver": "another"}
            key.machine_of = sdnet.qualify.__globals__["machine_of"] = lambda _, facts=facts: facts  # pyright: ignore
            key.digest_of = lambda _, facts=facts: key.digest(facts)  # pyright: ignore[reportAttributeAccessIssue]
        qualified = 0
        sdnet.qualify(model, x, say=lambda _: None)
        (calls,) = [Call.decoded(call.encoded()) for call in sdnet.qualify.__globals__["recorded_calls"](model, x)[""]]
        decision = job.decide(calls, CPU)
        update, _, _ = job.decide_update([model.dictionary], CPU)
        found[name] = {"path": decision.path, "reason": decision.reason.partition(", ")[0], "update": update}
    found["qualified"] = qualified
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
