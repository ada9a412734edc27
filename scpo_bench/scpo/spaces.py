"""Parameter spaces: which weights of the policy a step may change, as coordinates w in R^d with w =
0 at the start policy.

Every space is affine in the policy's weights, so smoothness in the weights is smoothness in w.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from scpo_bench.policies import BackupActorCriticPolicy

SpaceName = Literal["last_layer", "low_rank", "all"]

# Feature directions whose share of the features' energy is below this are left out of a whitened
# last layer.
WHITENING_CUTOFF = 1e-6


class ParameterSpace(Protocol):
    """dimension: d.

    Everything is computed in float64, so that difference quotients of constraints mean something.
    """

    dimension: int

    def actions(self, w: Tensor, observations: Tensor) -> Tensor:
        """Mean actions, unclipped, of M policies. w:

        [M, d]; observations: [M, N, obs_dim]. Returns [M, N, action_dim].
        """
        ...

    def write(self, w: Tensor) -> None:
        """Set the policy's weights to those of w [d]."""
        ...


def make_space(
    name: SpaceName, policy: BackupActorCriticPolicy, reference: Tensor, rank: int
) -> ParameterSpace:
    """The space called ``name``. reference: observations [n, obs_dim] that say what actions a
    whitened last layer measures.
    """
    if name == "last_layer":
        return LastLayer(policy, reference)
    return ActorWeights(policy, rank if name == "low_rank" else None)


def _backup_of(policy: BackupActorCriticPolicy) -> Any:
    """The backup controller, in float64."""
    backup: Any = policy.mlp_extractor.backup
    return copy.deepcopy(backup).double()


class _FastTanh(nn.Module):
    """tanh x = 2 sigmoid(2 x) - 1: in float64, torch's sigmoid takes a quarter of the time of its
    tanh, and features are most of it.

    In place, hence for fixed features only (no gradient passes through).
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid_(x * 2).mul_(2).sub_(1)


class LastLayer:
    """The last layer alone, whitened: the policy is linear in w and |w| is the root mean square
    change of its action.

    With features phi(x) [h + 1] (bias included) and their second moment G over the reference
    observations, w multiplies phi @ C where C'GC = I. A step then has the same meaning in every
    direction, which makes one scalar L_i a good bound.
    """

    def __init__(self, policy: BackupActorCriticPolicy, reference: Tensor) -> None:
        head: Any = policy.action_net
        self._head: Any = head.linear
        # The features are fixed from here on: a copy in float64 serves every evaluation.
        extractor: Any = policy.mlp_extractor.extractor
        layers = copy.deepcopy(extractor.policy_net).double().requires_grad_(False)
        self._features: Any = nn.Sequential(
            *(_FastTanh() if isinstance(part, nn.Tanh) else part for part in layers)
        )
        self._backup: Any = _backup_of(policy)
        self._action_dim = int(self._head.out_features)
        with torch.no_grad():
            phi = self._with_bias(self._features(reference.double()))
            energy, directions = torch.linalg.eigh(phi.T @ phi / len(phi))
            kept = energy > WHITENING_CUTOFF * energy.max()
            self._whitening = directions[:, kept] / energy[kept].sqrt()  # C: [h + 1, r]
        self.dimension = self._whitening.shape[1] * self._action_dim

    @staticmethod
    def _with_bias(phi: Tensor) -> Tensor:
        return torch.cat([phi, phi.new_ones(*phi.shape[:-1], 1)], dim=-1)

    def _weights(self, w: Tensor) -> Tensor:
        """[M, h + 1, action_dim] from w [M, d]."""
        return self._whitening @ w.reshape(len(w), -1, self._action_dim)

    def actions(self, w: Tensor, observations: Tensor) -> Tensor:
        weights = self._weights(w)
        phi = self._features(observations)
        return self._backup(observations) + torch.baddbmm(weights[:, -1:], phi, weights[:, :-1])

    def write(self, w: Tensor) -> None:
        with torch.no_grad():
            weights = self._weights(w[None])[0]
            self._head.weight.copy_(weights[:-1].T)
            self._head.bias.copy_(weights[-1])


class _Actor(nn.Module):
    """observations -> mean action: the part of the policy that acts, as one module."""

    def __init__(self, policy: BackupActorCriticPolicy) -> None:
        super().__init__()
        extractor: Any = policy.mlp_extractor.extractor
        head: Any = policy.action_net
        self.features, self.head = extractor.policy_net, head.linear

    def forward(self, observations: Tensor) -> Tensor:
        return self.head(self.features(observations))


class ActorWeights:
    """All weights of the actor, or low-rank adapters of its matrices.

    rank None: w is every weight and bias, as a change from the start. rank r: each matrix W [out,
    in] becomes W + A B with B [r, in] fixed and orthonormal and A [out, r] the coordinates (zero at
    the start); biases are coordinates as they are.
    """

    def __init__(self, policy: BackupActorCriticPolicy, rank: int | None) -> None:
        self._live = _Actor(policy)
        self._actor = copy.deepcopy(self._live).double().requires_grad_(False)
        self._backup: Any = _backup_of(policy)
        self._start = {name: p.detach().clone() for name, p in self._actor.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        self._bases: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, p in self._start.items():
            if rank is not None and p.ndim == 2 and rank < p.shape[1]:
                rows = torch.linalg.qr(
                    torch.randn(p.shape[1], rank, generator=generator, dtype=torch.float64)
                )[0].T
                self._bases[name], self._shapes[name] = rows, (p.shape[0], rank)
            else:
                self._shapes[name] = tuple(p.shape)
        self.dimension = sum(torch.Size(s).numel() for s in self._shapes.values())

    def _weights(self, w: Tensor) -> dict[str, Tensor]:
        """name -> [M, *shape] from w [M, d]."""
        weights, offset = {}, 0
        for name, shape in self._shapes.items():
            size = torch.Size(shape).numel()
            change = w[:, offset : offset + size].reshape(len(w), *shape)
            offset += size
            weights[name] = self._start[name] + (
                change @ self._bases[name] if name in self._bases else change
            )
        return weights

    def actions(self, w: Tensor, observations: Tensor) -> Tensor:
        def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self._actor, weights, (x,))

        return self._backup(observations) + torch.func.vmap(one)(self._weights(w), observations)

    def write(self, w: Tensor) -> None:
        weights = self._weights(w[None])
        with torch.no_grad():
            for name, p in self._live.named_parameters():
                p.copy_(weights[name][0])
