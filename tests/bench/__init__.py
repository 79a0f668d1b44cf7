"""How fast is it, next to what? `python -m tests.bench` answers with one table.

Each system is measured in a process of its own, and the systems take turns: ours, pool, ours, pool … A
machine that grows noisy or quiet in between is then the same for all. Figures are medians of several turns,
with the smallest and the largest beside them, and what counts is their ratio.

    __main__     arguments, the order of the work, exit code
    workloads    what is measured: one list, and the measuring functions that run in a system's process
    turns        a system's process as seen from here, and the taking of turns
    child        the same process from inside
    systems/     one adapter per system, all with the interface of `system.System`
    tasks        the functions that the systems' workers run
    peers        virtual environments for the systems that are not ours
    proc         what Linux tells about memory and wake-ups
    report       medians, tables, targets

Every workload checks its results; a wrong answer fails the run.
"""
