"""SCPO: project every first-order update into a locally certified safe region.

Source: Cao, Borrelli, Joa, arXiv 2512.13788. Read in this order: ``bank`` (the candidate updates
D), ``projection`` (the certificate, Eq. 29, and the convex problem), ``smoothness`` (L),
``local_model`` (what probes say), ``certified_step`` (projection, backtracking, re-check),
``guard`` (one update, line by line) with ``guard_config`` and ``recovery``; ``constraints`` and how
they are evaluated: ``rollouts``, ``pointwise``, ``estimation`` with its ``bounds``; ``spaces`` (the
parameters that a step changes); then what uses them: ``agent`` with the proposals of
``gradient_descent``, and ``wrap``.
"""
