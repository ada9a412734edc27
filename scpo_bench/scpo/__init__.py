"""SCPO: project every first-order update into a locally certified safe region (Cao, Borrelli, Joa,
arXiv 2512.13788).

Read in this order: ``projection`` (the certificate and the convex problem), ``smoothness`` (L),
``probes`` (directions), ``parameters`` (the space that a step lives in), ``rollouts`` (g by
rollouts), ``gradient_descent`` (the proposal), ``agent``.
"""
