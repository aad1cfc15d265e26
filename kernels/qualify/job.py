"""The table that this process uses, and what it decides: which implementation and path a call takes under "auto".

A table comes from the user's cache folder when it is first needed, or is set for the whole job by `use_table`, so that
all processes of the job decide alike.

A verdict is one for a batch class. A smaller batch, such as the last one of a data set, takes the verdict of the least
larger class that this process has worked with: one that was looked up before, or that `use_table` set.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import distributed

from sdnet.kernels.qualify import key, quarantine
from sdnet.kernels.qualify.key import Call, Flags, Machine, Update
from sdnet.kernels.qualify.verdicts import PLAIN, TORCH, UPDATE, Store, Table, Verdict
from sdnet.kernels.reference import codes_size
from sdnet.kernels.step_sizes import DictionaryState
from sdnet.kernels.triton_path.paths import Entry
from sdnet.kernels.triton_path.tiles import Shape

NO_VERDICT = "no verdict of this machine"

MOST_DECISIONS = 4096
"""The most decisions that are kept, so that images of ever new sizes do not fill the memory."""


class Decision(NamedTuple):
    """What a call takes.

    Attributes:
        impl: the implementation.
        path: what `choose_path` is asked for.
        reason: why, a clause.
    """

    impl: Literal["torch", "triton"]
    path: str
    reason: str


class State:
    """The verdicts of this process; a module-level object, so that tests can replace it.

    Attributes:
        tables: the tables by digest of their machine.
        of_job: whether all processes of the job have these tables.
        why_none: why no table may be used; "" if one may.
        classes: the batch classes that this process has worked with, by layer, flags and machine.
        decisions: what was decided, by call, flags and device.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self.tables: dict[str, Table] = {}
        self.of_job = False
        self.why_none = ""
        self.classes: dict[tuple[str, Flags, str], set[int]] = {}
        self.decisions: dict[tuple[Call, Flags, torch.device], Decision] = {}

    @property
    def store(self) -> Store:
        """Where tables are read from and added to; the user's cache folder unless another one was given."""
        self._store = self._store or Store()
        return self._store

    def table(self, device: torch.device) -> Table:
        """Return the table of a device."""
        digest = key.digest_of(device)
        if digest not in self.tables:
            self.tables[digest] = {} if self.of_job else self.store.load(key.machine_of(device))
        return self.tables[digest]


STATE = State()


def use_table(
    table: Table,
    machine: Machine,
    calls: Sequence[Call] = (),
    flags: Flags | None = None,
    why_none: str = "",
    of_job: bool = True,
) -> None:
    """Use verdicts from now on.

    Args:
        table: the verdicts; none to decide as without a qualification.
        machine: the machine they are of.
        calls: the calls that the process works with. Smaller batches of the same layers take their verdicts.
        flags: the flags of these calls; None for those of this process.
        why_none: why there are no verdicts, a clause for `explain`.
        of_job: whether all processes of the job have this table. It then takes the place of the one in the cache
            folder; otherwise its verdicts are added to that one's.
    """
    digest = key.digest(machine)
    if of_job:
        STATE.of_job, STATE.why_none, STATE.tables = True, why_none, {digest: dict(table)}
    else:
        STATE.tables[digest] = STATE.tables.get(digest, STATE.store.load(machine)) | table
    for call in calls:
        noted = STATE.classes.setdefault((call.layer, flags or Flags.now(), digest), set())
        noted.add(key.batch_class(call.batch))
    STATE.decisions.clear()


def decide(call: Call, device: torch.device) -> Decision:
    """Return what a call takes under "auto": what its verdict says, else cuDNN with pointwise Triton kernels."""
    flags = Flags.now()
    known = STATE.decisions.get((call, flags, device))
    if known is None:
        if len(STATE.decisions) >= MOST_DECISIONS:
            STATE.decisions.clear()
        known = STATE.decisions[call, flags, device] = decision_of(call, flags, device)
    return known


def decision_of(call: Call, flags: Flags, device: torch.device) -> Decision:
    """Return what `decide` returns, without its memory."""
    if reason := quarantine.reason_of(call.key(flags), device):
        return Decision("torch", TORCH, reason)
    verdict = verdict_of(call, flags, device)
    if verdict is None:
        reason = STATE.why_none or NO_VERDICT
        if not STATE.of_job:
            say_that_none_is_there()
        return Decision("triton", PLAIN, f"{reason}, so cuDNN's convolutions with pointwise Triton kernels between")
    if verdict.path == TORCH:
        return Decision("torch", TORCH, str(verdict))
    if verdict.path != PLAIN and not fits(verdict.path, call, flags, device):
        reason = f"the tiles of the verdict for a batch of {verdict.batch} do not fit this batch"
        return Decision("triton", PLAIN, f"{reason}, so cuDNN's convolutions with pointwise Triton kernels between")
    return Decision("triton", verdict.path, str(verdict))


def verdict_of(call: Call, flags: Flags, device: torch.device) -> Verdict | None:
    """Return the verdict for a call, or for the least larger batch class that this process has worked with."""
    table, own = STATE.table(device), key.batch_class(call.batch)
    noted = STATE.classes.setdefault((call.layer, flags, key.digest_of(device)), set())
    verdict = table.get(call.key(flags))
    if verdict is not None:
        if own not in noted:
            noted.add(own)
            STATE.decisions.clear()  # smaller batches may have been decided without this class
        return verdict
    larger = (table.get(call.key(flags, batch)) for batch in sorted(noted) if batch > own)
    return next((verdict for verdict in larger if verdict is not None), None)


def shape_of(call: Call, flags: Flags, arch: int) -> Shape:
    """Return a call as the rules for tiles see it, on a GPU of a compute capability such as 90."""
    return Shape(
        batch=call.batch,
        channels=call.channels,
        atoms=call.atoms,
        image_size=call.image_size,
        codes_size=codes_size(call.image_size, call.kernel_size, call.stride, call.padding),
        kernel_size=call.kernel_size,
        stride=call.stride,
        itemsize=getattr(torch, call.dtype).itemsize,
        precision="tf32" if call.dtype == "float32" and flags.convolutions == "tf32" else "ieee",
        channels_last=call.channels_last,
        arch=arch,
    )


def fits(path: str, call: Call, flags: Flags, device: torch.device) -> bool:
    """Return whether the call can run with exactly the tiles of an encoded entry."""
    arch = int(key.machine_of(device)["capability"].replace(".", ""))
    entry = Entry.decoded(path)
    return entry.fitted(shape_of(call, flags, arch)) == entry.tiles


def decide_update(dictionaries: Sequence[DictionaryState], device: torch.device) -> tuple[bool, str, str]:
    """Return whether the Triton kernels update these dictionaries under "auto", the reason, and the verdict's key.

    Several processes use a verdict only if all have it: step sizes that differ would let the replicas of a model drift
    apart.
    """
    flags = Flags.now()
    name = Update.of(dictionaries).key(flags)
    if reason := quarantine.reason_of(name, device):
        return False, reason, name
    if not STATE.of_job and ranks() > 1:
        return False, f"the {ranks()} processes of the job have not agreed on a table of verdicts", name
    verdict = STATE.table(device).get(name)
    if verdict is None:
        return False, STATE.why_none or NO_VERDICT, name
    return verdict.path == UPDATE, str(verdict), name


def rescue(error: Exception, name: str, device: torch.device, what: str, several_ranks: bool = False) -> None:
    """Return if PyTorch may compute what failed under "auto", after a warning; else raise the error.

    Args:
        error: the error.
        name: the key of the verdict.
        device: the device that the kernels ran on.
        what: what failed, for the warning.
        several_ranks: whether other processes would go on with the Triton kernels and get other results.
    """
    if quarantine.kind_of(error) == "broken":
        reason = f"its kernels may have broken the GPU's context in a user's process ({quarantine.one_line(error)})"
        STATE.store.add(key.machine_of(device), {name: Verdict(TORCH, reason)})
    quarantine.handle(error, name, device, what, several_ranks)
    STATE.decisions.clear()


def ranks() -> int:
    """Return the number of processes of the job under torch.distributed; 1 without it."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


@cache
def say_that_none_is_there() -> None:
    """Warn, once in a process, that calls run without a verdict."""
    warnings.warn(
        "The fused kernels of SDNet have not been qualified on this GPU for some layers, which run on cuDNN's "
        "convolutions: sdnet.qualify(model, example_batch) or `python -m sdnet.kernels.qualify` compares and times "
        "them once.",
        stacklevel=2,
    )
