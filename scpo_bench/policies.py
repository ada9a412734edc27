"""Policies that start exactly at a given backup controller.

Action mean = backup(obs) + residual(obs), with residual = 0 at the start.
"""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn


class AffineBackup(nn.Module):
    """``u = gain @ x + offset``: the LQR of the double integrator, or a constant predictor.

    gain: [action_dim, obs_dim]; offset: [action_dim]. Both are buffers: never trained.
    """

    gain: torch.Tensor
    offset: torch.Tensor

    def __init__(self, gain: Any, offset: Any = 0.0) -> None:
        super().__init__()
        self.register_buffer("gain", torch.as_tensor(gain, dtype=torch.float32))
        constant = torch.as_tensor(offset, dtype=torch.float32)
        self.register_buffer("offset", constant.expand(len(self.gain)).clone())

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return observations @ self.gain.T + self.offset


class _WithBackup(nn.Module):
    """The policy's feature network; the backup's action is appended to the latent features."""

    def __init__(self, extractor: nn.Module, backup: nn.Module) -> None:
        super().__init__()
        self.extractor: Any = extractor
        self.backup = backup
        self.latent_dim_pi, self.latent_dim_vf = extractor.latent_dim_pi, extractor.latent_dim_vf

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            action = self.backup(features)
        return torch.cat([self.extractor.forward_actor(features), action], dim=-1)

    def forward_critic(self, features: torch.Tensor) -> torch.Tensor:
        return self.extractor.forward_critic(features)


class ResidualHead(nn.Module):
    """Last layer: backup action + linear(latent), from both side by side.

    The linear layer starts at zero.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.linear = linear

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        n = self.linear.in_features
        return latent[..., n:] + self.linear(latent[..., :n])


class BackupActorCriticPolicy(ActorCriticPolicy):
    """SB3's actor-critic policy whose mean action starts exactly at ``backup``.

    backup: module mapping observations [B, obs_dim] to actions [B, action_dim] in the environment's
    own units. The sum is not squashed: SB3 clips actions to the action space where they are
    applied, so the mean is linear in the last layer. Use it with raw observations (no
    ``VecNormalize`` on observations): the backup is a function of the true state.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        lr_schedule: Any,
        *,
        backup: nn.Module,
        **kwargs: Any,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        if not isinstance(self.features_extractor, FlattenExtractor):
            raise ValueError("policy_kwargs.backup: needs flat observations (FlattenExtractor)")
        assert isinstance(self.action_net, nn.Linear)
        # Both modules are wrapped around the ones that the optimiser already holds, so its
        # parameter list stays valid.
        self.action_net = ResidualHead(self.action_net)
        self.mlp_extractor = _WithBackup(self.mlp_extractor, backup)  # type: ignore[assignment]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # What ``save`` keeps beside the weights, and ``load`` constructs the policy from.
        return {**super()._get_constructor_parameters(), "backup": self.mlp_extractor.backup}
