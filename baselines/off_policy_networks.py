"""What off-policy agents learn: a Gaussian actor, two critics of the reward and two of the cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from scpo_bench.policies import residual_scale

N_REWARD_CRITICS = N_COST_CRITICS = 2
SLICE_ROWS = 512  # state-action pairs per slice in Critics.forward


class GaussianActor(nn.Module):
    """Mean and standard deviation [B, A] of a diagonal Gaussian, for observations [B, O].

    In the environment's action units, not squashed. Without a backup: mean = centre + half_range
    tanh(.). With one: mean = backup(observations) + residual, whose last layer starts at zero. The
    residual is multiplied by the backup's residual scale, if it has one.
    std = half_range (0.001 + softplus(.)), at the start ``initial_std`` half ranges everywhere.
    """

    centre: Tensor
    half_range: Tensor

    def __init__(
        self,
        obs_dim: int,
        action_space: spaces.Box,
        net_arch: list[int],
        initial_std: float,
        backup: nn.Module | None,
    ) -> None:
        super().__init__()
        _register_range(self, action_space)
        self.floor = 1e-3
        # softplus(std_shift) = initial_std - floor
        self.std_shift = float(np.log(np.expm1(initial_std - self.floor)))
        self.backup = backup
        widths = [obs_dim, *net_arch]
        layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        self.trunk = nn.Sequential(*layers)
        self.mean = nn.Linear(widths[-1], self.centre.numel())
        self.raw_std = nn.Linear(widths[-1], self.centre.numel())
        nn.init.zeros_(self.raw_std.weight)
        nn.init.zeros_(self.raw_std.bias)
        if backup is not None:
            nn.init.zeros_(self.mean.weight)
            nn.init.zeros_(self.mean.bias)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.trunk(observations)
        mean = self.mean(latent)
        if self.backup is None:
            mean = self.centre + self.half_range * torch.tanh(mean)
        else:
            with torch.no_grad():
                action = self.backup(observations)
                scale = residual_scale(self.backup, observations)
            mean = action + (mean if scale is None else scale * mean)
        spread = nn.functional.softplus(self.raw_std(latent) + self.std_shift)
        return mean, self.half_range * (self.floor + spread)

    def entropy(self, std: Tensor) -> Tensor:
        """Entropy [B] of the Gaussian in half ranges, before clipping, in nats. std: [B, A]."""
        half_log = 0.5 * float(np.log(2 * np.pi * np.e))
        return ((std / self.half_range).log() + half_log).sum(dim=-1)

    def trained(self) -> list[nn.Parameter]:
        """All parameters but the backup's."""
        return [p for name, p in self.named_parameters() if not name.startswith("backup.")]


class Critics(nn.Module):
    """``n`` action-value networks with ReLU layers, evaluated in cache-sized slices.

    The first layer is split, W_s s + W_a a, so that K actions in one state share the state's part.
    Derivatives are written out: through autograd the four networks' regression takes twice as long.
    """

    centre: Tensor
    half_range: Tensor

    def __init__(self, n: int, obs_dim: int, action_space: spaces.Box, net_arch: list[int]) -> None:
        super().__init__()
        _register_range(self, action_space)
        self.n = n

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            """torch's default for Linear."""
            return nn.Parameter((2 * torch.rand(*shape) - 1) / np.sqrt(fan_in))

        actions = self.centre.numel()
        fan_in = obs_dim + actions
        self.state_weight = uniform(n, obs_dim, net_arch[0], fan_in=fan_in)
        self.action_weight = uniform(n, actions, net_arch[0], fan_in=fan_in)
        self.first_bias = uniform(n, 1, net_arch[0], fan_in=fan_in)
        widths = [*net_arch, 1]
        self.weights = nn.ParameterList(uniform(n, i, o, fan_in=i) for i, o in pairwise(widths))
        self.biases = nn.ParameterList(uniform(n, 1, o, fan_in=i) for i, o in pairwise(widths))

    @torch.no_grad()
    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Values [n, B, K], without gradients.

        observations: [B, O]; actions: [B, K, A] inside the action space.
        """
        B, K, A = actions.shape
        scaled = (actions - self.centre) / self.half_range
        values = observations.new_empty(self.n, B * K)
        weights, biases = list(self.weights), list(self.biases)
        inner = list(zip(weights, biases))[:-1]
        states = max(SLICE_ROWS // K, 1)
        for n in range(self.n):
            state_part = torch.addmm(self.first_bias[n], observations, self.state_weight[n])
            for start in range(0, B, states):
                chunk, part = scaled[start : start + states], state_part[start : start + states]
                hidden = torch.mm(chunk.reshape(-1, A), self.action_weight[n])
                hidden.view(len(chunk), K, -1).add_(part.unsqueeze(1)).relu_()
                for weight, bias in inner:
                    hidden = torch.addmm(bias[n], hidden, weight[n]).relu_()
                rows = slice(start * K, start * K + len(hidden))
                torch.mv(hidden, weights[-1][n, :, 0], out=values[n, rows])
        return (values + biases[-1].squeeze(2)).view(self.n, B, K)

    def of_actions(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Values [n, B], differentiable in the actions alone.

        observations: [B, O]; actions: [B, A] inside the action space.
        """
        scaled = (actions - self.centre) / self.half_range
        state_part = observations @ self.state_weight.detach() + self.first_bias.detach()
        hidden = (state_part + scaled @ self.action_weight.detach()).relu()
        *inner, (weight, bias) = zip(self.weights, self.biases)
        for inner_weight, inner_bias in inner:
            hidden = torch.baddbmm(inner_bias.detach(), hidden, inner_weight.detach()).relu()
        return torch.baddbmm(bias.detach(), hidden, weight.detach()).squeeze(2)

    @torch.no_grad()
    def regression(self, observations: Tensor, actions: Tensor, targets: Tensor) -> Tensor:
        """Mean squared errors [n]; overwrites ``.grad`` with the gradient of their sum.

        observations: [B, O]; actions: [B, A] inside the action space; targets: [n, B].
        """
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        weights, biases = list(self.weights), list(self.biases)
        scaled = (actions - self.centre) / self.half_range
        errors = torch.empty_like(targets)
        for n in range(self.n):
            first = torch.addmm(self.first_bias[n], observations, self.state_weight[n])
            hidden = [first.addmm_(scaled, self.action_weight[n]).relu_()]
            for weight, bias in zip(weights[:-1], biases[:-1]):
                hidden.append(torch.addmm(bias[n], hidden[-1], weight[n]).relu_())
            last_weight = weights[-1][n, :, 0]
            errors[n] = torch.mv(hidden[-1], last_weight) + biases[-1][n, 0] - targets[n]

            d_value = errors[n] * (2.0 / len(targets[n]))
            _grad(weights[-1])[n, :, 0] = torch.mv(hidden[-1].T, d_value)
            _grad(biases[-1])[n] = d_value.sum()
            delta = torch.outer(d_value, last_weight)
            for layer in range(len(hidden) - 1, -1, -1):
                delta.mul_(hidden[layer] > 0)
                bias = biases[layer - 1] if layer else self.first_bias
                torch.sum(delta, dim=0, keepdim=True, out=_grad(bias)[n])
                if layer:
                    torch.mm(hidden[layer - 1].T, delta, out=_grad(weights[layer - 1])[n])
                    delta = torch.mm(delta, weights[layer - 1][n].T)
            torch.mm(observations.T, delta, out=_grad(self.state_weight)[n])
            torch.mm(scaled.T, delta, out=_grad(self.action_weight)[n])
        return errors.square_().mean(dim=1)


def _register_range(module: nn.Module, action_space: spaces.Box) -> None:
    """Give ``module`` the action space's ``centre`` and ``half_range`` [A] as buffers."""
    low, high = (
        torch.as_tensor(bound, dtype=torch.float32)
        for bound in (action_space.low, action_space.high)
    )
    module.register_buffer("centre", (high + low) / 2)
    module.register_buffer("half_range", (high - low) / 2)


def _grad(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, which ``regression`` has allocated."""
    assert parameter.grad is not None
    return parameter.grad


class GaussianPolicy(BasePolicy):
    """Actor, critics (2 of the reward, then 2 of the cost), the critics' targets, and optimisers.

    net_arch: hidden widths of every network; backup: module, observations [B, O] -> actions [B, A],
    environment units.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Any,
        *,
        net_arch: list[int],
        initial_std: float,
        actor_lr: float,
        critic_lr: float,
        backup: nn.Module | None = None,
    ) -> None:
        super().__init__(observation_space, action_space)
        obs_dim = int(np.prod(observation_space.shape))

        def new_critics() -> Critics:
            return Critics(N_REWARD_CRITICS + N_COST_CRITICS, obs_dim, action_space, net_arch)

        self.actor = GaussianActor(obs_dim, action_space, net_arch, initial_std, backup)
        self.critics, self.critics_target = new_critics(), new_critics()
        self.critics_target.load_state_dict(self.critics.state_dict())
        self.critics_target.requires_grad_(False)
        self.actor_optimizer = torch.optim.Adam(self.actor.trained(), lr=actor_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(
            self.critics.parameters(), lr=critic_lr, fused=True
        )

    def follow(self, tau: float) -> None:
        """The critics' targets += tau (critics - targets)."""
        with torch.no_grad():
            for p, q in zip(self.critics.parameters(), self.critics_target.parameters()):
                q.lerp_(p, tau)

    def forward(self, observations: Tensor, deterministic: bool = False) -> Tensor:
        return self._predict(observations, deterministic)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        mean, std = self.actor(observation.reshape(len(observation), -1).float())
        return mean if deterministic else mean + std * torch.randn_like(mean)
