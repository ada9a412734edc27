"""How a proposal is probed, certified and projected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from scpo_bench.configuration import require, require_choice
from scpo_bench.scpo.bank import Candidate
from scpo_bench.scpo.smoothness import Rule

Mode = Literal["certified", "verified", "proven"]
Differences = Literal["central", "forward"]


@dataclass(frozen=True)
class GuardConfig:
    """How a proposal is probed, certified and projected. The defaults are the paper's algorithm."""

    mode: Mode = "verified"
    """certified: deploy on the strength of the certificate. verified: evaluate the step first and,
    if it is unsafe, tighten the certificate and project again (the paper's re-check). proven:
    deploy only what is proved safe from every state, where the plant is known
    (:mod:`scpo_bench.scpo.closed_form`); most other fields then have no meaning.
    """
    smoothness: Rule = "adaptive"
    """apriori: L as declared. sampled: second differences times ``safety_factor``. adaptive:
    sampled once, then adapted.
    """
    L: float = 10.0
    """The declared smoothness constant of every constraint (per squared unit of w), for
    ``apriori``.
    """
    largest_L: float = 1e9
    """adaptive: the largest L that is carried to the next update. Where the constraint jumps (costs
    are counts), what one breached step shows is no curvature, and would stop learning for long.
    """
    safety_factor: float = 2.0
    """Factor on sampled second differences, and on the slopes of first-order bounds."""
    directions: int = 2
    """Columns m of the bank. At least the space's dimension means a complete basis."""
    candidates: tuple[Candidate, ...] = ("previous",)
    """What the bank holds beside the raw step, best first. previous: the last accepted step;
    normals: running estimates of the constraints' gradients; momentum: of the steps taken; start:
    the way back to the start policy; cost: the gradient of a cost critic's advantages, where the
    algorithm offers one. With a ``probe_radius``, random ones fill up.
    """
    probe_radius: float = 0.0
    """0 (the paper): candidates are evaluated where they are, at theta + d_j. rho > 0: they are
    made orthonormal and evaluated at distance rho, in units of w.
    """
    differences: Differences = "forward"
    """Difference quotients: forward needs m + 1 evaluations, central 2 m.

    ``sampled`` smoothness always takes central ones.
    """
    safe_probes: bool = False
    """Shrink rho where the last certificate does not cover it, so that probes stay inside what is
    certified.
    """
    follow_steps: bool = False
    """Shrink rho to the length of the last step: kinks that a step can reach are then within the
    reach of the probes, and others are not. The trust region shrinks while updates are held.
    """
    smallest_probe: float = 1e-3
    """The share of ``probe_radius`` that the two go down to: difference quotients over less mean
    nothing where values are counts or noisy.
    """
    reuse: float = 0.0
    """Complete banks: probes serve further updates until what the certificate adds to the linear
    prediction exceeds this, in units of the constraint values. 0: every update probes.
    """
    trust_radius: float = 0.5
    """The raw step is scaled down to this length, in units of w."""
    margin: float = 0.0
    """How far below zero the certificate is asked to stay."""
    recheck: float = 0.5
    """verified: the share of the margin that a step has to keep when it is evaluated (or as much as
    the policy had before it).
    """
    retries: int = 8
    """Projections per update before it is given up and the policy stays."""

    recovery: bool = False
    """Where the start policy is unsafe: lower the largest constraint value until it is safe,
    instead of refusing to start. Policies deployed until then violate.
    """

    def __post_init__(self) -> None:
        require_choice(self, "mode", get_args(Mode))
        require_choice(self, "smoothness", get_args(Rule))
        require_choice(self, "differences", get_args(Differences))
        for candidate in self.candidates:
            require_choice(self, "candidates", get_args(Candidate), candidate)
        for name in ("L", "largest_L", "trust_radius", "smallest_probe"):
            require(self, name, above=0)
        require(self, "safety_factor", low=1)
        require(self, "recheck", low=0, high=1)
        for name in ("margin", "probe_radius", "reuse"):
            require(self, name, low=0)
        for name in ("directions", "retries"):
            require(self, name, low=1)
