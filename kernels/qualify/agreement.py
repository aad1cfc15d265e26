"""One table for all processes of a job.

Rank 0 qualifies and sends its table through a store of torch.distributed. Every other rank waits for it, with a limit,
and answers with the facts of its own machine and its flags. Rank 0 then decides: all use the table if all are alike,
and none if one differs or did not wait long enough. Verdicts that differ between ranks would let the replicas of a
model drift apart, because each rank updates its own dictionaries.
"""

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from sdnet.kernels.qualify.key import Flags, Machine
from sdnet.kernels.qualify.parent import Outcome
from sdnet.kernels.qualify.verdicts import decoded_table, encoded_table

GRACE = 60.0
"""Seconds beside the budget that ranks wait for each other, as they do not start at the same moment."""


def agreed(
    store: Any,
    rank: int,
    ranks: int,
    qualify: Callable[[], Outcome],
    own: Callable[[], Machine],
    budget: float,
    flags: Flags | None = None,
) -> Outcome:
    """Return the outcome that all processes of a job use; its table is empty if they differ.

    Args:
        store: a store of torch.distributed that all processes share; used once.
        rank: the number of this process.
        ranks: the number of processes.
        qualify: qualifies; called by rank 0 alone.
        own: returns the facts of this process's machine.
        budget: the seconds that `qualify` takes at most.
        flags: the flags of PyTorch that verdicts depend on; None for those of this process.
    """

    def facts(machine: Machine) -> dict[str, Any]:
        return {**machine, "flags": list(flags or Flags.now())}

    if rank == 0:
        return decided(store, ranks, qualify, own, facts)
    limit = timedelta(seconds=budget + GRACE)
    try:
        store.wait(["table"], limit)
        store.set(f"facts{rank}", json.dumps(facts(own())))
        store.wait(["decision"], limit)
    except RuntimeError:
        store.set(f"facts{rank}", json.dumps({"late": True}))
        note = f"Rank {rank} waited {budget + GRACE:.0f} seconds for the verdicts of rank 0 and goes on without them."
        return Outcome(None, {}, (note,))
    sent, decision = json.loads(store.get("table")), json.loads(store.get("decision"))
    if decision:
        return Outcome(sent["machine"], {}, (decision,))
    return Outcome(sent["machine"], decoded_table(sent["table"]), ())


def decided(
    store: Any,
    ranks: int,
    qualify: Callable[[], Outcome],
    own: Callable[[], Machine],
    facts: Callable[[Machine], dict[str, Any]],
) -> Outcome:
    """Return what `agreed` returns on rank 0, and send it to the others."""
    try:
        outcome = qualify()
    except BaseException as error:
        store.set("table", json.dumps({"machine": None, "table": {}}))
        store.set("decision", json.dumps(f"Rank 0 could not qualify the kernels ({type(error).__name__})."))
        raise
    sent = {"machine": outcome.machine, "table": encoded_table(outcome.table)}
    store.set("table", json.dumps(sent))
    mine, decision = facts(outcome.machine or own()), ""
    for rank in range(1, ranks):
        try:
            store.wait([f"facts{rank}"], timedelta(seconds=GRACE))
            differences = different(mine, json.loads(store.get(f"facts{rank}")))
        except RuntimeError:
            differences = "it did not answer"
        if differences:
            decision = (
                f"Rank {rank} does not share the verdicts of rank 0 ({differences}): all ranks run cuDNN's "
                "convolutions, and PyTorch updates the dictionaries."
            )
            break
    store.set("decision", json.dumps(decision))
    if decision:
        return Outcome(outcome.machine, {}, (*outcome.notes, decision))
    return outcome


def different(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return in which facts two processes differ, a clause; "" if they are alike."""
    if "late" in other:
        return "it did not wait long enough"
    names = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
    return ", ".join(f"{name}: {mine.get(name)} and {other.get(name)}" for name in names)


USES = [0]
"""How many stores this process has asked for: all processes do so in the same order."""


def next_store(store: Any) -> Any:
    """Return a part of a store that no earlier agreement has used."""
    from torch.distributed.distributed_c10d import PrefixStore

    USES[0] += 1
    return PrefixStore(f"sdnet-qualify-{USES[0]}", store)
