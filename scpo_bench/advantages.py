"""Discounted sums and generalised advantage estimates as reverse scans over (..., T, N) arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def discounted_sums(
    rewards_TN: NDArray[np.floating], ends_TN: NDArray[np.bool_], gamma: float
) -> NDArray[np.float64]:
    """y_t = r_t + gamma y_{t+1}, restarted after each episode end.

    All [..., T, N]; nothing is bootstrapped.
    """
    sums = np.array(rewards_TN, dtype=np.float64)
    discount_TN = gamma * ~ends_TN
    for t in range(sums.shape[-2] - 2, -1, -1):
        sums[..., t, :] += discount_TN[t] * sums[..., t + 1, :]
    return sums


def next_values(
    values_TN: NDArray[np.floating],
    last_values_N: NDArray[np.floating],
    ends_TN: NDArray[np.bool_],
    end_values_TN: NDArray[np.floating],
) -> NDArray[np.float64]:
    """V(s_{t+1}) for every step: the next row inside an episode, ``end_values`` where one ends.

    values: [..., T, N]; last_values: [..., N], the observation after the last step; ends: [T, N].
    end_values: [..., T, N], read where ``ends``: 0 after a termination, V(terminal observation)
    after a truncation.
    """
    following = np.concatenate([values_TN[..., 1:, :], last_values_N[..., None, :]], axis=-2)
    return np.where(ends_TN, end_values_TN, following)


def generalised_advantages(
    rewards_TN: NDArray[np.floating],
    values_TN: NDArray[np.floating],
    next_values_TN: NDArray[np.floating],
    ends_TN: NDArray[np.bool_],
    gamma: ArrayLike,
    lam: ArrayLike,
) -> NDArray[np.float64]:
    """Generalised advantage estimates A_t = delta_t + gamma lam (1 - end_t) A_{t+1}.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t). rewards, values, next_values: [..., T, N] (leading
    axes: several signals at once); ends: [T, N], True at an episode's last step, terminated or
    truncated alike: the difference is in ``next_values`` (see there). gamma, lam: scalars, or
    arrays that broadcast against [...].
    Source: Schulman et al. 2016, arXiv 1506.02438, eq. 16.
    """
    gamma, lam = np.asarray(gamma)[..., None], np.asarray(lam)[..., None]
    advantages = rewards_TN + gamma[..., None] * next_values_TN - values_TN
    carry = gamma * lam
    inside_TN = ~ends_TN
    for t in range(advantages.shape[-2] - 2, -1, -1):
        advantages[..., t, :] += carry * inside_TN[t] * advantages[..., t + 1, :]
    return advantages
