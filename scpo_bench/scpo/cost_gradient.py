"""The gradient of an episode's cost, as a direction worth probing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from scpo_bench.advantages import discounted_sums, generalised_advantages, next_values
from scpo_bench.contract import Floats
from scpo_bench.scpo.spaces import PolicyWeights

RIDGE = 1e-3  # of the cost critic's fit, relative to its features' mean square
LAMBDA = 0.95


def cost_gradient(
    policy: ActorCriticPolicy,
    weights: PolicyWeights,
    buffer: RolloutBuffer,
    costs_TN: Floats,
    gamma: float,
    last_starts_N: NDArray[Any],
) -> Floats:
    """[d]: the policy gradient of the discounted cost, mean over steps of A_C grad log pi(a | s).

    The critic is a ridge regression of the cost to go on the value network's last hidden layer: one
    linear solve, and nothing to train.
    Source of the estimator: Schulman et al. 2016, arXiv 1506.02438 (generalised advantages).
    """
    T, N = costs_TN.shape
    observations = torch.as_tensor(buffer.observations.reshape(T * N, *buffer.obs_shape))
    actions = torch.as_tensor(buffer.actions.reshape(T * N, -1))
    starts_TN = buffer.episode_starts.astype(bool)
    ends_TN = np.concatenate([starts_TN[1:], np.asarray(last_starts_N, dtype=bool)[None]])
    with torch.no_grad():
        features: Any = policy.extract_features(observations, policy.vf_features_extractor)
        phi = policy.mlp_extractor.forward_critic(features).double().numpy()
    phi = np.concatenate([phi, np.ones((len(phi), 1))], axis=1)
    to_go = discounted_sums(costs_TN, ends_TN, gamma).ravel()
    gram = phi.T @ phi
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    critic = np.linalg.solve(gram + ridge, phi.T @ to_go)
    values_TN = (phi @ critic).reshape(T, N)
    following_TN = next_values(values_TN, values_TN[-1], ends_TN, np.zeros((T, N)))
    advantages_TN = generalised_advantages(
        costs_TN, values_TN, following_TN, ends_TN, gamma, LAMBDA
    )
    _, log_prob, _ = policy.evaluate_actions(observations, actions)
    advantages = torch.as_tensor(advantages_TN.ravel(), dtype=log_prob.dtype)
    return weights.gradient((advantages * log_prob).mean())
