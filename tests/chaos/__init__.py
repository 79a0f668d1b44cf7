"""Random graphs under random faults, and a judge who was not there.

    seed ─► graphs  (what is submitted where, and what it must give)     pure
         ─► nemesis (what is broken when)                                pure
    run: sites (real endpoints, links through proxies) ─► history (JSON lines)
    checker: graph, history ─► violations of the laws                    pure

`python -m tests.chaos --seconds 600 --seed 1` tries one seed after another; a run that finds something keeps its folder.
"""
