"""PPO-Lagrangian: clipped policy gradient on reward minus multiplier times cost.

Sources: Schulman et al. 2017 (PPO, arXiv 1707.06347); Ray, Achiam, Amodei 2019 (Benchmarking Safe
Exploration in Deep Reinforcement Learning). Defaults as in OmniSafe 0.5.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from scpo_bench.baselines.actors import actor_of
from scpo_bench.baselines.multipliers import (
    Multipliers,
    lagrangian_advantages,
    projected_adam_ascent,
)
from scpo_bench.baselines.networks import Array
from scpo_bench.baselines.on_policy import ConstrainedOnPolicy, OnPolicyConfig
from scpo_bench.configuration import Range, SearchSpace, require


@dataclass(frozen=True, kw_only=True)
class PPOLagrangianConfig(OnPolicyConfig):
    """``critic_passes`` counts the actor's passes as well; ``target_kl`` ends them early."""

    search_space: ClassVar[SearchSpace] = {
        **OnPolicyConfig.search_space,
        "actor_lr": Range(1e-4, 3e-3, log=True),
        "multiplier_init": Range(0.01, 300.0, log=True),
        "multiplier_lr": Range(0.01, 10.0, log=True),
    }

    actor_lr: float = 3e-4
    """Adam step size of the actor, > 0."""
    actor_lr_decay: bool = True
    """Whether ``actor_lr`` falls linearly to 0 over the run."""
    clip_range: float = 0.2
    """The ratio new/old likelihood is clipped to 1 +- this, > 0."""
    standardise_rewards: bool = True
    """Whether reward advantages are divided by their standard deviation; cost advantages never are.

    The reference does; the multiplier that balances the two then grows as the policy's noise, and
    with it that deviation, shrinks. False: both keep their units, and the multiplier settles at the
    price of cost, d return / d cost.
    """
    multiplier_init: float = 0.001
    """Multiplier of every constraint at the start, >= 0."""
    multiplier_lr: float = 0.035
    """Adam step size of the multipliers, >= 0.

    It is close to the largest change per update, whatever the cost's unit.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("actor_lr", "clip_range"):
            require(self, name, above=0)
        for name in ("multiplier_init", "multiplier_lr"):
            require(self, name, low=0)


class PPOLagrangian(ConstrainedOnPolicy):
    """PPO on the Lagrangian, with one multiplier per entry of ``cost_keys``.

    With an infinite limit the multiplier is exactly 0 and the update is PPO's. See
    ``ConstrainedOnPolicy`` for the arguments and errors.
    """

    Config: ClassVar[type[OnPolicyConfig]] = PPOLagrangianConfig
    config: PPOLagrangianConfig
    multipliers: Multipliers

    def _setup_model(self) -> None:
        super()._setup_model()
        if not hasattr(self, "multipliers"):
            unlimited = np.isinf(self.config.limits())
            self.multipliers = Multipliers.start(
                np.where(unlimited, 0.0, self.config.multiplier_init)
            )

    def train(self) -> None:
        """One update: multipliers, then actor and critics on minibatches.

        It ends after ``critic_passes`` passes, or after the first that exceeds the KL bound.
        """
        config = self.config
        actor, critics = actor_of(self.policy), self._critics()
        batch = self._batch(actor, critics)

        episodic_costs, _ = self.episode_costs.estimate()
        excess = episodic_costs - config.limits()
        self.multipliers = projected_adam_ascent(self.multipliers, excess, config.multiplier_lr)

        centred = batch.advantages - batch.advantages.mean(axis=1, keepdims=True)
        if config.standardise_rewards:
            centred[0] /= centred[0].std() + 1e-8
        multipliers = self.multipliers.value
        advantages = lagrangian_advantages(centred[0], centred[1:], multipliers).astype(np.float32)

        old_head, old_extra = actor.head(batch.observations, batch.offset), actor.dist_extra()
        old_log_prob = actor.log_prob(old_head, batch.actions)
        # SB3 sets the progress after the collection; the decay starts from the full step size.
        collected = len(advantages) / max(self._total_timesteps, 1)
        remaining = self._current_progress_remaining + collected
        lr = config.actor_lr * (min(remaining, 1.0) if config.actor_lr_decay else 1.0)
        offset = np.broadcast_to(batch.offset, old_head.shape)
        critic_errors = np.zeros(len(critics))
        passes = kl = 0.0
        while passes < config.critic_passes and kl <= config.target_kl:
            for index in self._minibatches(len(advantages)):
                observations, actions = batch.observations[index], batch.actions[index]
                head = actor.head(observations, offset[index])
                ratio = np.exp(actor.log_prob(head, actions) - old_log_prob[index])
                weights = clipped_surrogate_weights(ratio, advantages[index], config.clip_range)
                actor.backward(head, actions, weights)
                self.optimizers["actor"].update(
                    actor.mlp.theta, actor.mlp.grad, lr, config.max_grad_norm
                )
                critic_errors = np.array(
                    self._critic_step(critics, observations, batch.returns[:, index])
                )
            passes += 1
            kl = actor.kl(old_head, old_extra, actor.head(batch.observations, batch.offset))

        diagnostics = {"kl": kl, "passes": passes, "actor_lr": lr}
        diagnostics["entropy"] = actor.entropy(old_head)
        diagnostics["reward_critic_error"] = critic_errors[0]
        for i, key in enumerate(config.cost_keys):
            suffix = "" if len(config.cost_keys) == 1 else f"_{key}"
            diagnostics[f"multiplier{suffix}"] = multipliers[i]
            diagnostics[f"episodic_cost{suffix}"] = episodic_costs[i]
            diagnostics[f"cost_critic_error{suffix}"] = critic_errors[1 + i]
        diagnostics["episodes"] = len(self.episode_costs.finished)
        self._finish(actor, critics, diagnostics)


def clipped_surrogate_weights(ratio: Array, advantages: Array, clip_range: float) -> Array:
    """dL/d(log pi) per step [b] of PPO's clipped loss L = -mean min(ratio A, clip(ratio) A).

    It is -ratio A / b, and zero where the clip is active. ratio, advantages: [b].
    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7.
    """
    too_high = (advantages > 0) & (ratio > 1 + clip_range)
    clipped = too_high | ((advantages < 0) & (ratio < 1 - clip_range))
    return np.where(clipped, 0.0, -ratio * advantages / len(ratio)).astype(ratio.dtype)
