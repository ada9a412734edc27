"""The actor of an SB3 actor-critic policy in NumPy: samples, log-likelihoods, KL, Fisher.

``head`` is what the network outputs per state, [B, A]: the Gaussian's mean (the backup's action
included) or logits. KL divergences and log-likelihoods are summed over action dimensions and, where
stated, averaged over states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from scpo_bench.baselines.networks import Array, Mlp, sequential_layers
from scpo_bench.errors import UserError
from scpo_bench.policies import ResidualHead, residual_scale

LOG_2PI = float(np.log(2 * np.pi))


class Actor:
    """The network and, where the policy has one, the backup whose action is added to its output.

    The output is first multiplied by the backup's residual scale, if it has one.
    """

    action_dims: int = 1
    """Dimensions that log-likelihoods and KL divergences are summed over."""

    def __init__(self, policy: ActorCriticPolicy, extra: list[nn.Parameter]) -> None:
        self.backup: nn.Module | None = None
        extractor: Any = policy.mlp_extractor
        last: Any = policy.action_net
        if isinstance(last, ResidualHead):
            self.backup, extractor, last = extractor.backup, extractor.extractor, last.linear
        self.mlp = Mlp(*sequential_layers(extractor.policy_net, last), extra=extra)
        self._scale: Array | None = None  # [B, 1], at the states of the last ``head`` call

    def offset(self, observations: Array) -> Array | float:
        """The backup's action [B, A], or 0. It is not trained: compute it once per update."""
        if self.backup is None:
            return 0.0
        with torch.inference_mode():
            return self.backup(torch.from_numpy(observations)).numpy()

    def _scale_at(self, observations: Array) -> Array | None:
        """The backup's residual scale [B, 1]; None: 1."""
        if self.backup is None:
            return None
        with torch.inference_mode():
            scale = residual_scale(self.backup, torch.from_numpy(observations))
        return None if scale is None else scale.numpy()

    def head(self, observations: Array, offset: Array | float | None = None) -> Array:
        """observations: [B, O] -> [B, A]."""
        head = self.mlp.forward(observations)
        self._scale = self._scale_at(observations)
        if self._scale is not None:
            head *= self._scale
        head += self.offset(observations) if offset is None else offset
        return head

    def _backward(self, d_head: Array) -> None:
        """Gradient of L into ``mlp.grad``, from dL/d(head) [B, A] at the last ``head`` call."""
        self.mlp.backward(d_head if self._scale is None else d_head * self._scale)

    def _tangent(self, direction: Array) -> Array:
        """d(head)/d(theta) @ direction at the last ``head`` call: [B, A], a new array."""
        tangent = self.mlp.jvp(direction)
        return tangent if self._scale is None else tangent * self._scale

    def dist_extra(self) -> Array:
        """A copy of the distribution's parameters that do not depend on the state."""
        return np.concatenate([np.zeros(0, np.float32), *(e.ravel() for e in self.mlp.extra)])

    def sample(self, head: Array, rng: np.random.Generator) -> NDArray[Any]:
        """One action per state: [B, A], not clipped, or integers [B]."""
        raise NotImplementedError

    def log_prob(self, head: Array, actions: NDArray[Any]) -> Array:
        """log pi(a_b | s_b): [B]."""
        raise NotImplementedError

    def backward(self, head: Array, actions: NDArray[Any], weights: Array) -> None:
        """Gradient of sum_b weights_b log pi(a_b | s_b) into ``mlp.grad``. weights: [B]."""
        self.backpropagate(*self.log_prob_gradient(head, actions, weights))

    def backpropagate(self, d_head: Array, d_extra: Array) -> None:
        """Gradient of L into ``mlp.grad``, from its derivatives at the last ``head`` call.

        d_head: in the head [B, A]; d_extra: in the parameters of ``dist_extra``.
        """
        for grad, d in zip(self.mlp.extra_grads, [d_extra]):
            grad[:] = d
        self._backward(d_head)

    def log_prob_gradient(
        self, head: Array, actions: NDArray[Any], weights: Array
    ) -> tuple[Array, Array]:
        """Derivatives of sum_b weights_b log pi(a_b | s_b), as ``backpropagate`` takes them."""
        raise NotImplementedError

    def gradient(self, head: Array, actions: NDArray[Any], weights: Array) -> Array:
        """sum_b weights_b grad log pi(a_b | s_b), a copy [P]. weights: [B]."""
        self.backward(head, actions, weights)
        return self.mlp.grad.copy()

    def kl(self, old_head: Array, old_extra: Array, head: Array) -> float:
        """Mean over states of KL(old || this)."""
        raise NotImplementedError

    def kl_to(self, old_head: Array, old_extra: Array, head: Array) -> Array:
        """KL(this || old) at each state: [B]."""
        raise NotImplementedError

    def kl_to_gradient(
        self, old_head: Array, old_extra: Array, head: Array, weights: Array
    ) -> tuple[Array, Array]:
        """Derivatives of sum_b weights_b KL_b(this || old), as ``backpropagate`` takes them."""
        raise NotImplementedError

    def fisher_product(self, head: Array, direction: Array) -> Array:
        """F v: the Hessian of ``kl`` in theta at this policy, times v. [P] -> [P].

        The states are those of the last ``head`` call.
        """
        raise NotImplementedError

    def entropy(self, head: Array) -> float:
        """Mean over states, nats."""
        raise NotImplementedError


class GaussianActor(Actor):
    """Diagonal Gaussian with a standard deviation that does not depend on the state."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__(policy, [policy.log_std])
        self.action_dims = policy.log_std.numel()

    def sample(self, head: Array, rng: np.random.Generator) -> NDArray[Any]:
        return head + np.exp(self.mlp.extra[0]) * rng.standard_normal(head.shape, dtype=head.dtype)

    def log_prob(self, head: Array, actions: NDArray[Any]) -> Array:
        log_std = self.mlp.extra[0]
        z = (actions - head) * np.exp(-log_std)
        return -0.5 * np.einsum("ba,ba->b", z, z) - (log_std.sum() + 0.5 * log_std.size * LOG_2PI)

    def log_prob_gradient(
        self, head: Array, actions: NDArray[Any], weights: Array
    ) -> tuple[Array, Array]:
        inverse_std = np.exp(-self.mlp.extra[0])
        z = (actions - head) * inverse_std
        weighted = z * weights[:, None]
        # d log p / d log_std = z^2 - 1 and d log p / d mean = z / std.
        d_extra = np.einsum("ba,ba->a", weighted, z) - weights.sum()
        weighted *= inverse_std
        return weighted, d_extra

    def kl(self, old_head: Array, old_extra: Array, head: Array) -> float:
        log_std = self.mlp.extra[0].astype(np.float64)
        variance, old_variance = np.exp(2 * log_std), np.exp(2 * old_extra.astype(np.float64))
        shift = np.mean((head - old_head) ** 2, axis=0, dtype=np.float64)
        return float(np.sum(log_std - old_extra + (old_variance + shift) / (2 * variance) - 0.5))

    def kl_to(self, old_head: Array, old_extra: Array, head: Array) -> Array:
        log_std = self.mlp.extra[0]
        shift = (head - old_head) * np.exp(-old_extra)
        of_std = old_extra - log_std + 0.5 * np.exp(2 * (log_std - old_extra)) - 0.5
        return 0.5 * np.einsum("ba,ba->b", shift, shift) + of_std.sum()

    def kl_to_gradient(
        self, old_head: Array, old_extra: Array, head: Array, weights: Array
    ) -> tuple[Array, Array]:
        d_head = (head - old_head) * np.exp(-2 * old_extra) * weights[:, None]
        # d KL / d log_std = (std / old std)^2 - 1, at every state.
        return d_head, weights.sum() * np.expm1(2 * (self.mlp.extra[0] - old_extra))

    def fisher_product(self, head: Array, direction: Array) -> Array:
        tangent = self._tangent(direction)
        tangent *= np.exp(-2 * self.mlp.extra[0]) / len(tangent)
        self._backward(tangent)
        self.mlp.extra_grads[0][:] = 2.0 * direction[-self.mlp.extra[0].size :]
        return self.mlp.grad.copy()

    def entropy(self, head: Array) -> float:
        return float(np.sum(self.mlp.extra[0]) + 0.5 * self.mlp.extra[0].size * (1 + LOG_2PI))


class CategoricalActor(Actor):
    """Softmax over the actions of a ``Discrete`` space. actions: integers [B]."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__(policy, [])

    @staticmethod
    def _log_softmax(head: Array) -> Array:
        shifted = head - head.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    def sample(self, head: Array, rng: np.random.Generator) -> NDArray[Any]:
        gumbel = rng.gumbel(size=head.shape)  # argmax of logits + Gumbel noise is a softmax sample
        return np.argmax(head + gumbel, axis=1)

    def log_prob(self, head: Array, actions: NDArray[Any]) -> Array:
        return self._log_softmax(head)[np.arange(len(head)), actions]

    def log_prob_gradient(
        self, head: Array, actions: NDArray[Any], weights: Array
    ) -> tuple[Array, Array]:
        d_head = -np.exp(self._log_softmax(head))
        d_head[np.arange(len(head)), actions] += 1.0
        d_head *= weights[:, None]
        return d_head, self.dist_extra()

    def kl(self, old_head: Array, old_extra: Array, head: Array) -> float:
        old, new = self._log_softmax(old_head), self._log_softmax(head)
        return float(np.mean(np.sum(np.exp(old) * (old - new), axis=1), dtype=np.float64))

    def kl_to(self, old_head: Array, old_extra: Array, head: Array) -> Array:
        old, new = self._log_softmax(old_head), self._log_softmax(head)
        return np.sum(np.exp(new) * (new - old), axis=1)

    def kl_to_gradient(
        self, old_head: Array, old_extra: Array, head: Array, weights: Array
    ) -> tuple[Array, Array]:
        old, new = self._log_softmax(old_head), self._log_softmax(head)
        p, log_ratio = np.exp(new), new - old
        # d KL / d logit_j = p_j (log p_j - log old_j - KL)
        d_head = p * (log_ratio - (p * log_ratio).sum(axis=1, keepdims=True))
        return d_head * weights[:, None], self.dist_extra()

    def fisher_product(self, head: Array, direction: Array) -> Array:
        tangent = self._tangent(direction)
        p = np.exp(self._log_softmax(head))
        # The Fisher matrix of logits is diag p - p p'.
        tangent = p * (tangent - (p * tangent).sum(axis=1, keepdims=True))
        tangent /= len(tangent)
        self._backward(tangent)
        return self.mlp.grad.copy()

    def entropy(self, head: Array) -> float:
        log_p = self._log_softmax(head)
        return float(-np.mean(np.sum(np.exp(log_p) * log_p, axis=1)))


def actor_of(policy: ActorCriticPolicy) -> Actor:
    """The NumPy actor of a policy.

    Raises UserError for policies or action spaces that it does not cover.
    """
    observed, acted = policy.observation_space, policy.action_space
    extractor = policy.features_extractor
    if not isinstance(extractor, FlattenExtractor) or not isinstance(observed, spaces.Box):
        raise UserError(f"policy: needs flat Box observations, got {observed}")
    if isinstance(acted, spaces.Discrete):
        return CategoricalActor(policy)
    if isinstance(acted, spaces.Box) and not policy.use_sde and len(acted.shape) == 1:
        return GaussianActor(policy)
    raise UserError(f"env.action_space: expected Discrete or a one-dimensional Box, got {acted}")
