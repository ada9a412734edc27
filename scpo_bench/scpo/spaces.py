"""Parameter spaces: which weights of a policy a step may change, as coordinates w in R^d.

w = 0 is the start policy. Every space is affine in the policy's weights, so smoothness in the
weights is smoothness in w.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import Tensor, nn

from scpo_bench.contract import Floats
from scpo_bench.errors import UserError
from scpo_bench.policies import BackupActorCriticPolicy, residual_scale

SpaceName = Literal["last_layer", "low_rank", "all"]
# Observations [M, N, ...] of M policies -> their actions [M, N, action_dim].
Policies = Callable[[Tensor], Tensor]

# Feature directions whose share of the features' energy is below this are left out of a whitened
# last layer.
WHITENING_CUTOFF = 1e-6


class ParameterSpace(Protocol):
    """What constraint evaluation needs to know of a policy.

    dimension: d. vectorized: ``policies`` takes any number of parameter vectors, not just one.
    """

    dimension: int
    vectorized: bool

    def policies(self, w: Tensor) -> Policies:
        """The deterministic policies with parameters w [M, d], valid until the next call."""
        ...

    def write(self, w: Floats) -> None:
        """Give the deployed policy the parameters w [d]."""
        ...


def make_space(
    name: SpaceName, policy: BackupActorCriticPolicy, reference: Tensor, rank: int
) -> LastLayer | ActorWeights:
    """The space called ``name``.

    reference: observations [n, obs_dim] over which a whitened last layer measures actions.
    """
    if name == "last_layer":
        return LastLayer(policy, reference)
    return ActorWeights(policy, rank if name == "low_rank" else None)


# ---- spaces in float64, differentiable in w


def _backup_of(policy: BackupActorCriticPolicy) -> nn.Module:
    """The backup controller, in float64."""
    backup: Any = policy.mlp_extractor.backup
    return copy.deepcopy(backup).double()


def _scaled(backup: nn.Module, observations: Tensor, residual: Tensor) -> Tensor:
    """``residual`` [..., n] as it is added to the backup's action at ``observations`` [..., O]."""
    scale = residual_scale(backup, observations)
    return residual if scale is None else scale * residual


class _FastTanh(nn.Module):
    """tanh x = 2 sigmoid(2 x) - 1, in place.

    In float64, torch's sigmoid takes a quarter of the time of its tanh, and features are most of
    it. Where a gradient has to pass through, nothing is overwritten.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return torch.sigmoid(x * 2) * 2 - 1
        return torch.sigmoid_(x * 2).mul_(2).sub_(1)


class LastLayer:
    """The last layer alone, whitened: |w| is the root mean square change of the action.

    With features phi(x) [h + 1] (bias included, times the backup's residual scale) and their second
    moment G over the reference
    observations, w multiplies phi @ C where C'GC = I. The policy is linear in w, and a step has the
    same meaning in every direction, which makes one scalar L_i a good bound. Actions are unclipped
    and in float64, so that difference quotients of constraints mean something.
    """

    vectorized = True

    def __init__(self, policy: BackupActorCriticPolicy, reference: Tensor) -> None:
        head: Any = policy.action_net
        extractor: Any = policy.mlp_extractor.extractor
        self._head: nn.Linear = head.linear
        # The features are fixed from here on: a copy in float64 serves every evaluation.
        layers = copy.deepcopy(extractor.policy_net).double().requires_grad_(False)
        self._features = nn.Sequential(
            *(_FastTanh() if isinstance(layer, nn.Tanh) else layer for layer in layers)
        )
        self._backup = _backup_of(policy)
        with torch.no_grad():
            phi = self._features(reference.double())
            phi = torch.cat([phi, phi.new_ones(len(phi), 1)], dim=-1)
            phi = _scaled(self._backup, reference.double(), phi)
            energy, directions = torch.linalg.eigh(phi.T @ phi / len(phi))
            kept = energy > WHITENING_CUTOFF * energy.max()
            self._whitening = directions[:, kept] / energy[kept].sqrt()  # C: [h + 1, r]
        self.dimension = self._whitening.shape[1] * self._head.out_features

    def _weights(self, w: Tensor) -> Tensor:
        """[M, h + 1, action_dim] from w [M, d]."""
        return self._whitening @ w.reshape(len(w), -1, self._head.out_features)

    def whitening(self) -> Floats:
        """C [h + 1, r]: the last layer's weights and bias are C w (of one action)."""
        return self._whitening.numpy()

    def policies(self, w: Tensor) -> Policies:
        weights = self._weights(w)

        def act(observations: Tensor) -> Tensor:
            residual = torch.baddbmm(weights[:, -1:], self._features(observations), weights[:, :-1])
            return self._backup(observations) + _scaled(self._backup, observations, residual)

        return act

    def write(self, w: Floats) -> None:
        weights = self._weights(torch.as_tensor(w)[None])[0]
        with torch.no_grad():
            self._head.weight.copy_(weights[:-1].T)
            self._head.bias.copy_(weights[-1])


class ActorWeights:
    """All weights of the actor, or low-rank adapters of its matrices.

    rank None: w is every weight and bias, as a change from the start. rank r: each matrix W [out,
    in] becomes W + A B with B [r, in] fixed and orthonormal and A [out, r] the coordinates (zero at
    the start); biases are coordinates themselves. Actions as in :class:`LastLayer`.
    """

    vectorized = True

    def __init__(self, policy: BackupActorCriticPolicy, rank: int | None) -> None:
        head: Any = policy.action_net
        extractor: Any = policy.mlp_extractor.extractor
        self._live = nn.Sequential(extractor.policy_net, head.linear)
        self._actor = copy.deepcopy(self._live).double().requires_grad_(False)
        self._backup = _backup_of(policy)
        self._start = {name: p.detach().clone() for name, p in self._actor.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        self._bases: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, p in self._start.items():
            self._shapes[name] = tuple(p.shape)
            if rank is not None and p.ndim == 2 and rank < p.shape[1]:
                columns = torch.randn(p.shape[1], rank, generator=generator, dtype=torch.float64)
                self._bases[name] = torch.linalg.qr(columns)[0].T
                self._shapes[name] = (p.shape[0], rank)
        self._sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
        self.dimension = sum(self._sizes)

    def _weights(self, w: Tensor) -> dict[str, Tensor]:
        """name -> [M, *shape] from w [M, d]."""
        weights = {}
        for (name, shape), part in zip(self._shapes.items(), w.split(self._sizes, dim=1)):
            change = part.reshape(len(w), *shape)
            if name in self._bases:
                change = change @ self._bases[name]
            weights[name] = self._start[name] + change
        return weights

    def policies(self, w: Tensor) -> Policies:
        weights = self._weights(w)

        def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self._actor, weights, (x,))

        def act(observations: Tensor) -> Tensor:
            residual = torch.func.vmap(one)(weights, observations)
            return self._backup(observations) + _scaled(self._backup, observations, residual)

        return act

    def write(self, w: Floats) -> None:
        weights = self._weights(torch.as_tensor(w)[None])
        with torch.no_grad():
            for name, p in self._live.named_parameters():
                p.copy_(weights[name][0])


# ---- weights as they are deployed, in their own precision


class Weights:
    """Tensors as one vector w [d] of float64, zero at the start.

    start: [d], the vector that is w = 0; by default the tensors as they are now.
    """

    def __init__(self, tensors: Sequence[Tensor], start: Floats | None = None) -> None:
        self.tensors = list(tensors)
        self.start = self._flat() if start is None else start
        self.dimension = len(self.start)

    def _flat(self) -> Floats:
        return torch.cat([p.detach().reshape(-1) for p in self.tensors]).double().numpy()

    def read(self) -> Floats:
        """The present w."""
        return self._flat() - self.start

    def write(self, w: Floats) -> None:
        """Set the tensors, in their own precision."""
        flat = torch.as_tensor(self.start + w)
        parts = flat.split([p.numel() for p in self.tensors])
        self.restore([part.reshape(p.shape) for p, part in zip(self.tensors, parts)])

    def nudge(self, rng: np.random.Generator) -> None:
        """Move every weight to the next number of its precision, up or down at random."""
        with torch.no_grad():
            for p in self.tensors:
                up = torch.as_tensor(rng.random(tuple(p.shape)) < 0.5)
                limit = torch.where(up, torch.inf, -torch.inf).to(p.dtype)
                p.copy_(torch.nextafter(p, limit))

    def copy(self) -> list[Tensor]:
        """The tensors as they are, for :meth:`restore`: exact, which reading and writing is not."""
        return [p.detach().clone() for p in self.tensors]

    def restore(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.tensors, values):
                p.copy_(value)


class PolicyWeights(Weights):
    """The weights of any Stable-Baselines3 policy that shape its deterministic action.

    Which they are is found by differentiating an action: value functions and exploration noise have
    no part in it. Actions are those of ``policy.predict``, of one policy at a time, computed by a
    copy of the policy in evaluation mode. Raises UserError if actions cannot be differentiated
    (discrete actions).
    """

    vectorized = False

    def __init__(self, policy: Any, start: Floats | None = None) -> None:
        space = policy.observation_space
        observation = policy.obs_to_tensor(np.zeros(space.shape, space.dtype))[0]
        # As it acts when deployed: in training mode, batch norm would use and move its statistics.
        policy.set_training_mode(False)
        action = policy._predict(observation, deterministic=True)
        if not action.requires_grad:
            raise UserError(
                f"SCPO: the actions of {type(policy).__name__} cannot be differentiated; it needs "
                "a Box action space"
            )
        named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(action.sum(), list(named.values()), allow_unused=True)
        names = [name for name, gradient in zip(named, gradients) if gradient is not None]
        super().__init__([named[name] for name in names], start)
        with torch.no_grad():
            # SB3's policies keep their last distribution, and a tensor with a gradient graph cannot
            # be copied.
            policy._predict(observation, deterministic=True)
        self._policy = copy.deepcopy(policy)
        copied = dict(self._policy.named_parameters())
        self._copy = Weights([copied[name] for name in names], self.start)
        self._buffers = dict(policy.named_buffers())

    def check_buffers(self) -> None:
        """Raise UserError if the policy acts by more than its weights: by statistics that moved.

        Rollouts evaluate weights. Running statistics (batch norm, CrossQ) change in training, and
        the deployed policy would not be the one that was evaluated.
        """
        for name, evaluated in self._policy.named_buffers():
            if not torch.equal(evaluated, self._buffers[name]):
                raise UserError(
                    f"SCPO: policy buffer '{name}' has moved in training; policies with running "
                    "statistics (batch norm) cannot be certified by their weights"
                )

    def policies(self, w: Tensor) -> Policies:
        self._copy.write(w.numpy()[0])
        act = acting(self._policy)
        return lambda observations: act(observations[0])[None]

    def gradient(self, loss: Tensor) -> Floats:
        """[d]: the gradient of a scalar that was computed with the policy."""
        parts = torch.autograd.grad(loss, self.tensors, allow_unused=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts]).double().numpy()


def acting(policy: Any) -> Callable[[Tensor], Tensor]:
    """observations [n, ...] -> the actions [n, ...] of ``policy.predict(deterministic=True)``.

    ``predict`` also checks, converts and builds a distribution. A Gaussian's most likely action is
    its mean and needs none of that, which halves the cost.
    """
    policy.set_training_mode(False)
    if not (
        isinstance(policy, ActorCriticPolicy)
        and type(policy.action_dist) is DiagGaussianDistribution
        and type(policy.features_extractor) is FlattenExtractor
    ):
        dtype = policy.observation_space.dtype
        return lambda observations: torch.as_tensor(
            policy.predict(observations.numpy().astype(dtype), deterministic=True)[0]
        )
    box: Any = policy.action_space
    low, high = torch.as_tensor(box.low), torch.as_tensor(box.high)

    @torch.inference_mode()
    def act(observations: Tensor) -> Tensor:
        latent = policy.mlp_extractor.forward_actor(observations.float().flatten(1))
        return policy.action_net(latent).reshape(-1, *low.shape).clamp(low, high)

    return act
