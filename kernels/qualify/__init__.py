"""Qualification: tests, before kernels are used, which of them are right and faster on this machine.

`python -m sdnet.kernels.qualify` and `sdnet.qualify` start it, and the training programs do before their first step.
A call of the operator never starts it; it only reads verdicts.

    key.py         what a verdict depends on: the call, the flags of PyTorch, the machine
    verdicts.py    verdicts, and the tables that keep them: the user's cache folder, and tables shipped with the package
    job.py         the table that this process uses, and the decision for a call
    quarantine.py  what happens when a kernel does not compile, or breaks the GPU's context, in the user's process
    parent.py      starts child processes, waits for them and keeps their verdicts
    child.py       compares and times the candidates of a key
    candidates.py  the candidates; compare.py checks them with the memory of guards.py, timing.py times them
    agreement.py   one table for all processes of a job
"""
