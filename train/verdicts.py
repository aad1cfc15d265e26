"""The kernels of a run: which ones are right and faster on this machine, determined before the first step.

It happens before this process uses the GPU, for a GPU may take only one process at a time. All processes of a run use
one table of verdicts, that of rank 0; the table is a part of the checkpoint, and a resumed run uses it again.
"""

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from sdnet.kernels.dispatch import ENVIRONMENT_VARIABLE, obstacle_of
from sdnet.kernels.qualify import agreement, job, parent
from sdnet.kernels.qualify.key import Call, Flags, Machine, Update, machine_of
from sdnet.kernels.qualify.parent import Outcome
from sdnet.kernels.qualify.verdicts import PLAIN, TORCH, UPDATE, Store, Table, decoded_table, encoded_table
from sdnet.kernels.triton_path import paths
from sdnet.qualify import planned_calls, update_of
from sdnet.step_size import csc_layers
from sdnet.train import build
from sdnet.train.checkpoint import State
from sdnet.train.errors import UserError
from sdnet.train.execution import execution
from sdnet.train.job import Job

TYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables of a launcher with which processes find each other."""


class Verdicts:
    """The verdicts of a run, as a part of its checkpoint.

    Attributes:
        machine: the machine that they are of; None if there are none.
        table: the verdicts by key.
        notes: sentences for the user.
    """

    def __init__(self) -> None:
        self.machine: Machine | None = None
        self.table: Table = {}
        self.notes: tuple[str, ...] = ()

    def state_dict(self) -> State:
        """Return the machine and the table."""
        return {"machine": json.dumps(self.machine), "table": json.dumps(encoded_table(self.table))}

    def load_state_dict(self, state_dict: State, /) -> None:
        """Keep the table in use: `find` has read the stored one, and replaced it only with an announcement.

        A table of a version with other tiles is not an error: `find` has left it out.
        """
        json.loads(state_dict["table"])

    def find(self, request: Job) -> None:
        """Find out the verdicts of a run, or take the stored ones, and use them in this process.

        Raises:
            UserError: `--qualify always` is asked for where nothing can be qualified.
        """
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
        if reason := self._obstacle(request, device):
            if request.qualify == "always":
                raise UserError(f"--qualify always cannot be done: {reason}.")
            return
        assert device is not None
        with execution(request.recipe):
            flags = Flags.now()
        calls, update = plan(request)
        items = [*calls, *([update] if update else [])]
        ranks, rank = build.launched_processes(), int(os.environ.get("RANK", 0))

        def run() -> Outcome:
            return self._qualified(request, items, device, flags)

        if ranks == 1:
            outcome = run()
        elif all(name in os.environ for name in RENDEZVOUS):
            limit = timedelta(seconds=request.qualify_seconds + agreement.GRACE)
            self._store, *_ = next(iter(rendezvous("env://", timeout=limit)))
            shared = agreement.next_store(self._store)
            seconds = request.qualify_seconds
            outcome = agreement.agreed(shared, rank, ranks, run, lambda: machine_of(device), seconds, flags)
        else:
            note = f"The launcher does not set {', '.join(RENDEZVOUS)}, so the kernels are not qualified."
            outcome = Outcome(None, {}, (note,))
        self.machine, self.table = outcome.machine, outcome.table
        why_none = " ".join(note.rstrip(".") for note in outcome.notes)
        job.use_table(outcome.table, outcome.machine or machine_of(device), calls, flags, why_none)
        self.notes = (*outcome.notes, *([summary(self.machine, self.table)] if self.machine else []))

    @staticmethod
    def _obstacle(request: Job, device: torch.device | None) -> str:
        """Return why there is nothing to qualify, a clause; "" if there is."""
        for name in (ENVIRONMENT_VARIABLE, paths.ENVIRONMENT_VARIABLE):
            if name in os.environ:
                return f"the environment variable {name} decides which kernels run"
        if request.recipe.impl != "auto":
            return f"--impl {request.recipe.impl} decides which kernels run"
        if device is None:
            return "torch finds no GPU"
        return obstacle_of(device, TYPES[request.recipe.mixed_precision]) or ""

    @staticmethod
    def _qualified(request: Job, items: list[Call | Update], device: torch.device, flags: Flags) -> Outcome:
        """Return the verdicts of this process: stored, known or found out, with notes of what changed."""
        store, stored = Store(), stored_table(request)
        names = list(dict.fromkeys(item.key(flags) for item in items))
        if stored and request.qualify != "always" and all(name in stored[1] for name in names):
            machine, table = stored
            if machine == machine_of(device):
                return Outcome(machine, {name: table[name] for name in names})
        if request.qualify == "never":
            outcome = parent.known(items, machine_of(device), flags, store)
        else:
            fresh, budget = request.qualify == "always", request.qualify_seconds
            outcome = parent.qualify(items, str(device), flags=flags, store=store, fresh=fresh, budget=budget)
        return outcome._replace(notes=(*outcome.notes, *(changes(stored[1], outcome.table) if stored else ())))


def plan(request: Job) -> tuple[list[Call], Update | None]:
    """Return the calls of a run, and the update of its dictionaries."""
    recipe = request.recipe
    with torch.device("meta"):
        model: Any = build.create_model(recipe, num_classes=2)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    batch = recipe.local_batch(build.launched_processes())
    found = planned_calls(model, batch, TYPES[recipe.mixed_precision], recipe.channels_last)
    return [call for calls in found.values() for call in calls], update_of(csc_layers(model).values())


def stored_table(request: Job) -> tuple[Machine, Table] | None:
    """Return the machine and the verdicts of the checkpoint that a run continues from."""
    if not request.resume:
        return None
    try:
        checkpoint, _ = request.run.load_checkpoint()
        state: Mapping[str, Any] = checkpoint.shared.get("verdicts", {})
        machine, table = json.loads(state["machine"]), decoded_table(json.loads(state["table"]))
    except (KeyError, TypeError, ValueError, UserError):
        return None  # a checkpoint of an older version, or a damaged one, which the trainer refuses
    return (machine, table) if isinstance(machine, dict) else None


def changes(before: Table, after: Table) -> tuple[str, ...]:
    """Return a sentence for each key whose path is another one than in the checkpoint."""
    names = [name for name in {**before, **after} if path_of(before, name) != path_of(after, name)]
    return tuple(
        f"Changed on resume: {name} runs on {path_of(after, name)}, not on {path_of(before, name)} as before."
        for name in names
    )


def path_of(table: Table, name: str) -> str:
    """Return in words what a table takes for a key."""
    if name not in table:
        return "cuDNN without a verdict" if not name.startswith("update") else "PyTorch without a verdict"
    path = table[name].path
    if path in (TORCH, PLAIN, UPDATE):
        return {TORCH: "PyTorch", PLAIN: "cuDNN with pointwise Triton kernels", UPDATE: "the Triton kernels"}[path]
    entry = paths.Entry.decoded(path)
    return f"the {entry.path} path in tiles {', '.join(map(str, entry.tiles))}"


def summary(machine: Machine, table: Table) -> str:
    """Return what was found, in one sentence."""
    layers = [verdict.path for name, verdict in table.items() if not name.startswith("update")]
    fused = sum(path.startswith(('["fused"', '["padded"')) for path in layers)
    update = any(verdict.path == UPDATE for name, verdict in table.items() if name.startswith("update"))
    return (
        f"Kernels on {machine['gpu']}: {fused} of {len(layers)} kinds of CSC layers run on fused kernels, the others "
        f"on cuDNN; {'Triton' if update else 'PyTorch'} updates the dictionaries."
    )
