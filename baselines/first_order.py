"""What PPO-Lagrangian, PPO-PID, FOCOPS and P3O share: minibatch passes over actor and critics.

Source: Schulman et al. 2017 (PPO), arXiv 1707.06347. Defaults as in OmniSafe 0.5.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from scpo_bench.baselines.actors import Actor, actor_of
from scpo_bench.baselines.networks import Array
from scpo_bench.baselines.on_policy import ConstrainedOnPolicy, OnPolicyConfig
from scpo_bench.configuration import Range, SearchSpace, require


@dataclass(frozen=True, kw_only=True)
class FirstOrderConfig(OnPolicyConfig):
    """``critic_passes`` counts the actor's passes as well; ``target_kl`` ends them early.

    Defaults as in OmniSafe 0.5.0, configs/on-policy/PPOLag.yaml, but for those marked "ours".
    """

    search_space: ClassVar[SearchSpace] = {
        **OnPolicyConfig.search_space,
        "actor_lr": Range(1e-4, 3e-3, log=True),
    }

    actor_lr: float = 3e-4
    """Adam step size of the actor, > 0."""
    actor_lr_decay: bool = True
    """Whether ``actor_lr`` falls linearly to 0 over the run."""
    standardise_rewards: bool = True
    """Whether reward advantages are divided by their standard deviation; cost advantages never are.

    The reference does; the price of cost that balances the two then grows as the policy's noise,
    and with it that deviation, shrinks. False (ours): both keep their units, and a multiplier
    settles at the price of cost, d return / d cost.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "actor_lr", above=0)


@dataclass(frozen=True, kw_only=True)
class ClippedConfig(FirstOrderConfig):
    """Fields of the agents that clip the likelihood ratio."""

    clip_range: float = 0.2
    """The ratio new/old likelihood is clipped to 1 +- this, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "clip_range", above=0)


@dataclass(frozen=True)
class Surrogate:
    """The data of an update's loss over B steps, at the policy that collected them."""

    actions: NDArray[Any]
    """[B, ...]."""
    advantages: Array
    """What ``_weighted_advantages`` returned, [..., B]."""
    old_head: Array
    """[B, A]."""
    old_extra: Array
    """``Actor.dist_extra``."""
    old_log_prob: Array
    """[B]."""

    def ratio(self, actor: Actor, head: Array, index: NDArray[np.int64]) -> Array:
        """New / old likelihood [b] of the actions at ``index`` [b], where the head is ``head``."""
        return np.exp(actor.log_prob(head, self.actions[index]) - self.old_log_prob[index])


class FirstOrder(ConstrainedOnPolicy):
    """Adam steps on minibatches; a subclass adds ``Config`` and the three methods below.

    See ``ConstrainedOnPolicy`` for the arguments and errors.
    """

    config: FirstOrderConfig

    def _weighted_advantages(
        self, advantages: Array, episodic_costs: NDArray[np.float64], episode_length: float
    ) -> Array:
        """What ``_actor_gradient`` needs of the advantages, [..., B], once per update.

        advantages: centred, [1 + C, B], the reward's in units of its standard deviation if
        ``standardise_rewards``; episodic_costs: J_C of this update's episodes [C], which the agent
        may respond to first; episode_length: their mean length in steps.
        """
        raise NotImplementedError

    def _actor_gradient(
        self, actor: Actor, head: Array, surrogate: Surrogate, index: NDArray[np.int64]
    ) -> None:
        """The gradient of the loss over the steps ``index`` [b] into ``actor.mlp.grad``.

        head: the actor's at these steps, its last call: [b, A].
        """
        raise NotImplementedError

    def _prices(self) -> Sequence[float] | NDArray[np.floating]:
        """The price of each constraint's cost in the last update, [C]; reported as multiplier."""
        raise NotImplementedError

    def train(self) -> None:
        """One update: the agent's response to the costs, then minibatches of actor and critics.

        It ends after ``critic_passes`` passes, or after the first that exceeds the KL bound.
        """
        config = self.config
        actor, critics = actor_of(self.policy), self._critics()
        batch = self._batch(actor, critics)
        episodic_costs, episode_length = self.episode_costs.estimate()

        centred = batch.advantages - batch.advantages.mean(axis=1, keepdims=True)
        if config.standardise_rewards:
            centred[0] /= centred[0].std() + 1e-8
        advantages = self._weighted_advantages(centred, episodic_costs, episode_length)

        old_head, old_extra = actor.head(batch.observations, batch.offset), actor.dist_extra()
        old_log_prob = actor.log_prob(old_head, batch.actions)
        surrogate = Surrogate(batch.actions, advantages, old_head, old_extra, old_log_prob)
        size, lr = len(old_head), self._actor_lr(len(old_head))
        offset = np.broadcast_to(batch.offset, old_head.shape)
        critic_errors = [0.0] * len(critics)
        passes = kl = 0.0
        while passes < config.critic_passes and kl <= config.target_kl:
            for index in self._minibatches(size):
                observations = batch.observations[index]
                head = actor.head(observations, offset[index])
                self._actor_gradient(actor, head, surrogate, index)
                self.optimizers["actor"].update(
                    actor.mlp.theta, actor.mlp.grad, lr, config.max_grad_norm
                )
                critic_errors = self._critic_step(critics, observations, batch.returns[:, index])
            passes += 1
            new_head = actor.head(batch.observations, batch.offset)
            kl = actor.kl(old_head, old_extra, new_head)

        diagnostics = {"kl": kl, "passes": passes, "actor_lr": lr}
        diagnostics["entropy"] = actor.entropy(new_head)
        diagnostics["reward_critic_error"] = critic_errors[0]
        prices = self._prices()
        for i, suffix in enumerate(config.key_suffixes()):
            diagnostics[f"multiplier{suffix}"] = prices[i]
            diagnostics[f"episodic_cost{suffix}"] = episodic_costs[i]
            diagnostics[f"cost_critic_error{suffix}"] = critic_errors[1 + i]
        diagnostics["episodes"] = len(self.episode_costs.finished)
        self._finish(actor, critics, diagnostics)

    def _actor_lr(self, collected: int) -> float:
        """The actor's step size in an update on ``collected`` steps."""
        # SB3 sets the progress after the collection; the decay starts from the full step size.
        remaining = self._current_progress_remaining + collected / max(self._total_timesteps, 1)
        return self.config.actor_lr * (min(remaining, 1.0) if self.config.actor_lr_decay else 1.0)


def clipped_surrogate_weights(ratio: Array, advantages: Array, clip_range: float) -> Array:
    """dL/d(log pi) per step [b] of PPO's clipped loss L = -mean min(ratio A, clip(ratio) A).

    It is -ratio A / b, and zero where the clip is active. ratio, advantages: [b].
    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7.
    """
    too_high = (advantages > 0) & (ratio > 1 + clip_range)
    clipped = too_high | ((advantages < 0) & (ratio < 1 - clip_range))
    return np.where(clipped, 0.0, -ratio * advantages / len(ratio)).astype(ratio.dtype)
