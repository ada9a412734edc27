"""What CPO, TRPO-Lagrangian and CRPO share: natural-gradient steps within a bound on the KL.

Source: Schulman, Levine, Moritz, Jordan, Abbeel 2015 (TRPO), arXiv 1502.05477, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scpo_bench.baselines.actors import Actor, actor_of
from scpo_bench.baselines.networks import Array
from scpo_bench.baselines.on_policy import ConstrainedOnPolicy, OnPolicyConfig
from scpo_bench.baselines.rollout import Batch
from scpo_bench.configuration import require


@dataclass(frozen=True, kw_only=True)
class TrustRegionConfig(OnPolicyConfig):
    """Defaults as in OmniSafe 0.5.0, configs/on-policy/{CPO,TRPOLag,OnCRPO}.yaml."""

    critic_lr: float = 1e-3
    """Adam step size of reward and cost critics, > 0; constant."""
    critic_passes: int = 10
    """Passes over an update's data when fitting the critics, >= 1."""
    batch_size: int = 128
    """Steps per critic minibatch, >= 1."""
    target_kl: float = 0.01
    """Trust region: KL(old || new), mean over states and action dimensions, > 0.

    The mean over dimensions is OmniSafe's. The KL itself, which is summed over them and reported as
    ``kl``, is at most ``kl_bound``: this times the number of dimensions (``Discrete``: one).
    """
    cg_iterations: int = 15
    """Conjugate gradient iterations per linear system, >= 1."""
    cg_damping: float = 0.1
    """Added to the diagonal of that mean KL's Hessian, >= 0."""
    fisher_stride: int = 1
    """The Fisher matrix uses every n-th collected state, >= 1."""
    line_search_steps: int = 15
    """Step lengths tried, >= 1; if all fail the policy stays as it was, exactly.

    The default is that of OmniSafe 0.5.0, algorithms/on_policy/base/trpo.py.
    """
    line_search_shrink: float = 0.8
    """Ratio of one tried step length to the one before, in (0, 1); OmniSafe's, same file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cg_iterations", "fisher_stride", "line_search_steps"):
            require(self, name, low=1)
        require(self, "cg_damping", low=0)
        require(self, "line_search_shrink", above=0, high=0.999)


@dataclass(frozen=True)
class Surrogates:
    """Changes at a tried policy, relative to the old one."""

    gains: NDArray[np.float64]
    """Importance-weighted mean advantages of the reward and each cost, per step: [1 + C]."""
    kl: float
    """KL(old || tried), mean over states, summed over action dimensions."""

    def finite(self) -> bool:
        return bool(np.isfinite(self.gains).all() and np.isfinite(self.kl))


@dataclass(frozen=True)
class Step:
    """A step from the policy's parameters, before the line search."""

    direction: Array
    """[P]."""
    accepts: Callable[[Surrogates], bool]
    """Whether a tried length may be taken; the KL bound is checked in any case."""
    diagnostics: dict[str, float]


class TrustRegion(ConstrainedOnPolicy):
    """Line search along a step, then the critics; a subclass adds ``Config`` and ``_step``.

    See ``ConstrainedOnPolicy`` for the arguments and errors.
    """

    config: TrustRegionConfig

    def _step(
        self,
        actor: Actor,
        batch: Batch,
        head: Array,
        advantages: Array,
        excess: NDArray[np.float64],
        episode_length: float,
    ) -> Step:
        """The step at this policy.

        head: the actor's at ``batch``, its last call; advantages: centred, [1 + C, B], the reward's
        in units of its standard deviation if ``_standardise``; excess: J_C - limit per episode [C].
        """
        raise NotImplementedError

    def _standardise(self) -> bool:
        """Whether reward advantages are divided by their standard deviation (costs never are)."""
        return True

    def train(self) -> None:
        """One update: the step, the line search along it, the critics."""
        config = self.config
        actor, critics = actor_of(self.policy), self._critics()
        batch = self._batch(actor, critics)
        advantages = batch.advantages - batch.advantages.mean(axis=1, keepdims=True)
        if self._standardise():
            advantages[0] /= advantages[0].std() + 1e-8
        episodic_costs, episode_length = self.episode_costs.estimate()

        head = actor.head(batch.observations, batch.offset)
        entropy = actor.entropy(head)
        excess = episodic_costs - config.limits()
        step = self._step(actor, batch, head, advantages, excess, episode_length)
        accepted, fraction, tried = self._line_search(actor, batch, head, advantages, step)

        errors = [0.0] * len(critics)
        for _ in range(config.critic_passes):
            for index in self._minibatches(len(batch.observations)):
                observations, returns = batch.observations[index], batch.returns[:, index]
                errors = self._critic_step(critics, observations, returns)

        diagnostics = {
            "episodes": len(self.episode_costs.finished),
            "kl": accepted.kl,
            "kl_bound": self._kl_bound(actor),
            "reward_gain": accepted.gains[0],
            "step_fraction": fraction,
            "line_search_tried": tried,
            "entropy": entropy,
            "reward_critic_error": errors[0],
        }
        for i, suffix in enumerate(config.key_suffixes()):
            diagnostics[f"episodic_cost{suffix}"] = episodic_costs[i]
            diagnostics[f"cost_gain{suffix}"] = accepted.gains[1 + i]
            diagnostics[f"cost_critic_error{suffix}"] = errors[1 + i]
        self._finish(actor, critics, diagnostics | step.diagnostics)

    def _kl_bound(self, actor: Actor) -> float:
        """The bound on the KL that is summed over action dimensions."""
        return self.config.target_kl * actor.action_dims

    def _inverse_curvature(self, actor: Actor, batch: Batch) -> Callable[[Array], Array]:
        """v -> H^-1 v [P]; H: the damped Hessian of the summed KL at the collected states."""
        config, stride = self.config, self.config.fisher_stride
        offset = batch.offset[::stride] if isinstance(batch.offset, np.ndarray) else batch.offset
        head = actor.head(batch.observations[::stride], offset)
        # The damping is given for the mean over action dimensions.
        damping = np.float32(config.cg_damping * actor.action_dims)

        def product(v: Array) -> Array:
            return actor.fisher_product(head, v) + damping * v

        return lambda rhs: conjugate_gradient(product, rhs, config.cg_iterations)

    def _line_search(
        self, actor: Actor, batch: Batch, old_head: Array, advantages: Array, step: Step
    ) -> tuple[Surrogates, float, int]:
        """Take the longest step that keeps the KL bound and that ``step.accepts``.

        Returns (surrogates, step fraction, lengths tried). On failure theta is restored exactly,
        and the fraction is 0.
        """
        config, theta, bound = self.config, actor.mlp.theta, self._kl_bound(actor)
        old_theta, old_extra = theta.copy(), actor.dist_extra()
        old_log_prob = actor.log_prob(old_head, batch.actions)
        fraction = 1.0
        for tried in range(1, config.line_search_steps + 1):
            theta[:] = old_theta + np.float32(fraction) * step.direction
            # A non-finite trial counts as too long a step.
            with np.errstate(over="ignore", invalid="ignore"):
                head = actor.head(batch.observations, batch.offset)
                change = np.exp(actor.log_prob(head, batch.actions) - old_log_prob) - 1.0
                gains = np.asarray(np.mean(change * advantages, axis=1, dtype=np.float64))
                at = Surrogates(gains, actor.kl(old_head, old_extra, head))
            if at.finite() and at.kl <= bound and step.accepts(at):
                return at, fraction, tried
            fraction *= config.line_search_shrink
        theta[:] = old_theta
        return Surrogates(np.zeros(len(advantages)), 0.0), 0.0, config.line_search_steps


class WeightedTRPO(TrustRegion):
    """TRPO on a weighted sum of the advantages; a subclass gives the weights.

    The step is sqrt(2 delta / (g'H^-1 g)) H^-1 g, with g the gradient of the weighted surrogate and
    delta the KL bound. It is taken if that surrogate does not fall.
    """

    Config: ClassVar[type[OnPolicyConfig]] = TrustRegionConfig

    def _weights(self, excess: NDArray[np.float64]) -> tuple[NDArray[np.float64], dict[str, float]]:
        """(weights of reward and costs [1 + C], diagnostics), once per update.

        excess: J_C - limit per episode [C].
        """
        raise NotImplementedError

    def _step(
        self,
        actor: Actor,
        batch: Batch,
        head: Array,
        advantages: Array,
        excess: NDArray[np.float64],
        episode_length: float,
    ) -> Step:
        weights, diagnostics = self._weights(excess)
        objective = (weights @ advantages / advantages.shape[1]).astype(np.float32)
        g = actor.gradient(head, batch.actions, objective)
        on_g = self._inverse_curvature(actor, batch)(g)
        q = float(g @ on_g)
        length = np.float32(np.sqrt(2 * self._kl_bound(actor) / q) if q > 0 else 0.0)
        return Step(length * on_g, lambda at: bool(weights @ at.gains >= 0), diagnostics | {"q": q})


def conjugate_gradient(
    product: Callable[[NDArray[np.floating]], NDArray[np.floating]],
    rhs: NDArray[np.floating],
    iterations: int,
    tolerance: float = 1e-10,
) -> NDArray[np.floating]:
    """Approximate A^-1 rhs [P] for symmetric positive definite A given as ``product``: v -> A v.

    Stops after ``iterations`` or when the squared residual falls to tolerance * |rhs|^2.
    Source: Hestenes & Stiefel 1952; Nocedal & Wright 2006, algorithm 5.2.
    """
    x = np.zeros_like(rhs)
    residual, direction = rhs.copy(), rhs.copy()
    norm = start = float(residual @ residual)
    for _ in range(iterations):
        if norm <= tolerance * start:
            break
        curved = product(direction)
        step = norm / float(direction @ curved)
        x += step * direction
        residual -= step * curved
        previous, norm = norm, float(residual @ residual)
        direction = residual + (norm / previous) * direction
    return x
