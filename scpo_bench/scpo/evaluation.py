"""The constraints that rollouts evaluate: exact, pointwise, or expected."""

from __future__ import annotations

from scpo_bench.errors import UserError
from scpo_bench.scpo.constraints import Constraints, Exact, RolloutConfig
from scpo_bench.scpo.estimation import Evidence, Expected
from scpo_bench.scpo.guard_config import GuardConfig
from scpo_bench.scpo.pointwise import Pointwise
from scpo_bench.scpo.rollouts import BatchedRollouts, Rollouts


def constraints_from(
    rollouts: Rollouts,
    config: RolloutConfig,
    guard: GuardConfig,
    seed: int,
    evidence: Evidence | None = None,
) -> Constraints:
    """The constraints that ``rollouts`` evaluate.

    seed: of pointwise constraints' fresh start states. evidence: what earlier rollouts of this
    training run have shown, where they are noisy. Raises UserError if pointwise constraints are
    asked for where there are none.
    """
    if config.pointwise:
        if not (isinstance(rollouts, BatchedRollouts) and rollouts.exact):
            raise UserError(
                "pointwise: constraints are evaluated pointwise on tasks whose dynamics are pure "
                "functions, without constraint noise; set pointwise to False"
            )
        return Pointwise(
            rollouts,
            active=config.active_starts,
            kept=config.kept_starts,
            fresh=config.fresh_starts,
            alarming=-guard.recheck * guard.margin,
            seed=seed,
        )
    if rollouts.exact:
        return Exact(rollouts.names, lambda w: rollouts(w, (0,))[:, 0])
    return Expected(rollouts, config, guard.retries, Evidence() if evidence is None else evidence)
