"""SCPO: project every first-order update into a locally certified safe region.

Source: Cao, Borrelli, Joa, arXiv 2512.13788. Read in this order: ``projection`` (the certificate
and the convex problem), ``smoothness`` (L), ``directions`` (what is probed), ``guard`` (one
update), ``constraints`` and ``rollouts`` (g), ``spaces`` (the parameters that a step changes), then
what uses them: ``agent`` with the proposals of ``gradient_descent``, and ``wrap``.
"""
