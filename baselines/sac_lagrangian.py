"""SAC-Lagrangian: soft actor-critic on reward minus multiplier times cost.

Sources: Haarnoja et al. 2018, arXiv 1801.01290 and 1812.05905 (SAC and its learned temperature);
the multiplier and its use in the actor's loss as in the baseline SAC-Lag of Liu et al. 2022, arXiv
2201.11927; reference for details: FSRL 0.1.0, fsrl/policy/sac_lag.py. Of FSRL's PID controller it
has the integral term alone, which is projected ascent, and unlike FSRL it adds the entropy to the
reward's values only, not to the cost's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from scpo_bench.baselines.multipliers import projected_ascent
from scpo_bench.baselines.off_policy import ConstrainedOffPolicy, OffPolicyConfig
from scpo_bench.configuration import Range, SearchSpace, require


@dataclass(frozen=True, kw_only=True)
class SACLagrangianConfig(OffPolicyConfig):
    """See ``OffPolicyConfig`` for the source of the common defaults."""

    search_space: ClassVar[SearchSpace] = {
        **OffPolicyConfig.search_space,
        "multiplier_init": Range(0.0, 5.0),
        "multiplier_lr": Range(1e-3, 1.0, log=True),
        "target_entropy": Range(-4.0, 0.0),
    }

    multiplier_init: float = 0.0
    """Multiplier at the start, in units of reward per unit of cost, >= 0.

    FSRL 0.1.0, fsrl/utils/optim_util.py.
    """
    multiplier_lr: float = 0.001
    """Ascent step of the multiplier per update, on the episodic cost minus its limit, > 0.

    Ours: FSRL 0.1.0 has 0.0005 per two to five episodes, with terms for the cost itself (0.05) and
    its change (0.1) beside it.
    """
    temperature_init: float = 1.0
    """Weight of the entropy at the start, in units of ``return_scale`` times reward, > 0.

    FSRL 0.1.0, fsrl/agent/sac_lag_agent.py, where it is learned.
    """
    temperature_lr: float = 3e-4
    """Adam step size of the temperature's logarithm, >= 0; 0 keeps it constant.

    FSRL 0.1.0, fsrl/config/sacl_cfg.py.
    """
    target_entropy: float = -1.0
    """Entropy that the temperature is adapted to, in nats per action dimension, actions in half
    ranges. Haarnoja et al. 2018, arXiv 1812.05905, appendix D, for actions squashed into (-1, 1).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("multiplier_lr", "temperature_init"):
            require(self, name, above=0)
        for name in ("multiplier_init", "temperature_lr"):
            require(self, name, low=0)
        require(self, "target_entropy", low=-20, high=20)


class SACLagrangian(ConstrainedOffPolicy):
    """SAC on the Lagrangian of one constraint.

    Actions are the Gaussian's, clipped to the action space as for CVPO, not squashed into it: a
    policy can start at a backup's actions. The entropy is the Gaussian's before clipping, in closed
    form. With an infinite limit the multiplier is exactly 0. See ``ConstrainedOffPolicy`` for the
    arguments and errors.
    """

    Config: ClassVar[type[SACLagrangianConfig]] = SACLagrangianConfig
    config: SACLagrangianConfig
    multiplier: float
    log_temperature: Tensor

    def _setup_model(self) -> None:
        super()._setup_model()
        config = self.config
        if not hasattr(self, "multiplier"):
            self.multiplier = 0.0 if np.isinf(config.cost_limit) else config.multiplier_init
        self.log_temperature = torch.full((1,), np.log(config.temperature_init), device=self.device)
        self.log_temperature.requires_grad_()
        self.temperature_optimizer = torch.optim.Adam(
            [self.log_temperature], lr=config.temperature_lr
        )

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """One update: the multiplier, then critics, actor, temperature and targets in turn."""
        config = self.config
        episodic_cost = float(self.episode_costs.estimate()[0][0])
        self.multiplier = projected_ascent(
            self.multiplier, episodic_cost - config.cost_limit, config.multiplier_lr, np.inf
        )
        sums: Counter[str] = Counter()
        for _ in range(gradient_steps):
            temperature = self.log_temperature.exp().item()
            observations, numbers = self._critic_step(batch_size, temperature)
            numbers |= self._policy_step(observations, temperature)
            self.policy.follow(config.tau)
            sums.update(numbers)
        self._n_updates += gradient_steps
        diagnostics = {name: total / gradient_steps for name, total in sums.items()} | {
            "multiplier": self.multiplier,
            "temperature": self.log_temperature.exp().item(),
            "episodic_cost": episodic_cost,
            "episodes": len(self.episode_costs.finished),
            "gradient_updates": self._n_updates,
        }
        self._publish(diagnostics)

    def _policy_step(self, observations: Tensor, temperature: float) -> dict[str, float]:
        """One step of the actor on -(Q_r + temperature H - multiplier Q_c), and one of temperature.

        The loss is divided by 1 + multiplier (Stooke et al. 2020, arXiv 2007.03964, algorithm 1, as
        in FSRL). The temperature is the multiplier of mean H >= target (arXiv 1812.05905, eq. 18).
        """
        actor = self.policy.actor
        mean, std = actor(observations)
        samples = self._samples(mean, std, 1)[:, 0]
        actions = self._clipped(samples).detach().requires_grad_()
        reward, cost = self._combined(self.policy.critics.of_actions(observations, actions))
        gain = reward.mean() - self.multiplier * cost.mean()
        (slope,) = torch.autograd.grad(gain, actions)
        # A clipped sample passes on a gradient that points back inside, and no other: with none at
        # all, a mean outside the action space would stay there.
        outwards = (samples - actions) * slope > 0
        along = (torch.where(outwards, 0.0, slope) * samples).sum()
        entropy = actor.entropy(std).mean()
        self._actor_step(-(along + temperature * entropy) / (1.0 + self.multiplier))

        target = self.config.target_entropy * std.shape[1]
        self.temperature_optimizer.zero_grad()
        self.log_temperature.grad = (entropy.detach() - target).reshape(1)
        self.temperature_optimizer.step()
        return {
            "std": std.mean().item(),
            "entropy": entropy.item(),
            "reward_value": reward.mean().item() / self.config.return_scale,
            "cost_value": cost.mean().item() / self.config.return_scale,
        }

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        networks, tensors = super()._get_torch_save_params()
        return [*networks, "temperature_optimizer"], [*tensors, "log_temperature"]
