"""Policies that start exactly at a given backup controller.

Action mean = backup(obs) + scale(obs) residual(obs), with residual = 0 at the start. The scale is
1, except for a backup that acts alone near its target (:class:`TargetBackup`).
"""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import Tensor, nn

from scpo_bench.contract import BatchedTask


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


class TargetBackup(AffineBackup):
    """An affine backup that acts alone near its target, where V(x) = x'Px is at most ``level``.

    What a policy adds to its action is multiplied by ``residual_scale``. P: [obs_dim, obs_dim];
    level: > 0. Both are buffers: never trained.
    """

    P: torch.Tensor
    level: torch.Tensor

    def __init__(self, gain: Any, offset: Any, P: Any, level: float) -> None:
        super().__init__(gain, offset)
        self.register_buffer("P", torch.as_tensor(P, dtype=torch.float32))
        self.register_buffer("level", torch.as_tensor(level, dtype=torch.float32))

    def residual_scale(self, observations: Tensor) -> Tensor:
        """s(x) [..., 1], the factor in [0, 1] on what is added to the backup's action.

        0 for V <= level, 1 for V >= 2 level, and 3 t^2 - 2 t^3 with t = V / level - 1 in between,
        which is continuously differentiable.
        """
        value = ((observations @ self.P) * observations).sum(dim=-1, keepdim=True)
        t = (value / self.level - 1.0).clamp(0.0, 1.0)
        return t * t * (3.0 - 2.0 * t)


def residual_scale(backup: nn.Module | None, observations: Tensor) -> Tensor | None:
    """The factor [..., 1] on what is added to the backup's action; None: 1 everywhere."""
    scale = getattr(backup, "residual_scale", None)
    return None if scale is None else scale(observations)


def backup_of(task: BatchedTask) -> AffineBackup:
    """The task's backup controller, as the policy that training starts from."""
    gain, offset = task.backup_gain()
    target = task.backup_target()
    return AffineBackup(gain, offset) if target is None else TargetBackup(gain, offset, *target)


class _WithBackup(nn.Module):
    """The policy's feature network.

    The backup's action is appended to the latent features, and its residual scale, if it has one.
    """

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
            scale = residual_scale(self.backup, features)
        parts = [self.extractor.forward_actor(features), action]
        return torch.cat(parts if scale is None else [*parts, scale], dim=-1)

    def forward_critic(self, features: torch.Tensor) -> torch.Tensor:
        return self.extractor.forward_critic(features)


class ResidualHead(nn.Module):
    """Last layer: backup action + scale * linear(latent), from all three side by side.

    Without a scale it is 1. The linear layer starts at zero.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.linear = linear

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        n, end = self.linear.in_features, self.linear.in_features + self.linear.out_features
        residual = self.linear(latent[..., :n])
        if latent.shape[-1] > end:
            residual = latent[..., end:] * residual
        return latent[..., n:end] + residual


class BackupActorCriticPolicy(ActorCriticPolicy):
    """SB3's actor-critic policy whose mean action starts exactly at ``backup``.

    backup: module mapping observations [B, obs_dim] to actions [B, action_dim] in the environment's
    own units, with ``residual_scale`` if it has one. The sum is not squashed: SB3 clips actions to
    the action space where they are applied, so the mean is linear in the last layer. Use it with
    raw observations (no ``VecNormalize`` on observations): the backup is a function of the true
    state.
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
