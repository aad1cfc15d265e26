"""The order of barriers in the machine code of kernels with several warpgroups.

A wait for wgmma (`WARPGROUP.DEPBAR`) waits for the products of the warpgroup that executes it, not for those of
another. Before a program writes a buffer of shared memory again, all of its warpgroups must therefore have met at a
barrier (`BAR.SYNC`) after their waits. Triton places this barrier; `unguarded_refills` checks that it is there.
"""

import re
import subprocess
import tempfile
from pathlib import Path

WAIT, BARRIER = "WARPGROUP.DEPBAR", "BAR.SYNC"

WRITES = re.compile(r"^(@!?U?P\d+ )?(STS|STSM|LDGSTS|UTMALDG|UBLKCP)\b")
"""Instructions that write shared memory, from registers or by a copy."""

LABEL, BRANCH = re.compile(r"^(\.L\S+):"), re.compile(r"\b(BRA|BRX|JMP)\b.*`\((\.L\S+)\)")


def disassembled(cubin: bytes) -> str:
    """Return the machine code of a cubin as text, by the disassembler that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout


def instructions_of(code: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions of a listing, and the index of the instruction after each label."""
    instructions, labels = [], {}
    for line in code.splitlines():
        text = re.sub(r"/\*.*?\*/", "", line).strip()
        if label := LABEL.match(text):
            labels[label[1]] = len(instructions)
        elif text.endswith(";"):
            instructions.append(text.rstrip("; "))
    return instructions, labels


def unguarded_refills(code: str) -> list[str]:
    """Return each write into shared memory that a path of the program reaches after a wait without a barrier between.

    Args:
        code: the listing of `disassembled`.

    Returns:
        The instructions in the order of the program; none if every refill is guarded.
    """
    instructions, labels = instructions_of(code)
    found: set[int] = set()
    seen: set[int] = set()
    pending = [index + 1 for index, text in enumerate(instructions) if WAIT in text]
    while pending:
        index = pending.pop()
        if index in seen or index >= len(instructions):
            continue
        seen.add(index)
        text = instructions[index]
        if BARRIER in text:
            continue
        if WRITES.match(text):
            found.add(index)
            continue
        branch, conditional = BRANCH.search(text), text.startswith("@")
        if branch and branch[2] in labels:
            pending.append(labels[branch[2]])
        if conditional or not (branch or text.startswith(("EXIT", "RET"))):
            pending.append(index + 1)
    return [instructions[index] for index in sorted(found)]
