"""A task whose reward tempts to what costs; used by the tests of wrapped algorithms."""

from __future__ import annotations

import functools

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env


class Push(gym.Env):
    """20 steps; the reward is the action, and each step with an action above ``threshold`` costs 1.

    signed: also report ``info["constraint_values"]`` = [action - threshold].
    """

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, threshold=0.5, signed=False):
        self.threshold, self.signed = threshold, signed

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 20
        return self._observation(), {}

    def _observation(self):
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def step(self, action):
        self.left -= 1
        excess = float(action[0]) - self.threshold
        info = {"cost": float(excess > 0)}
        if self.signed:
            info["constraint_values"] = np.array([excess])
        return self._observation(), float(action[0]), False, self.left == 0, info


def pushing(n=2, **kwargs):
    """n of them as an SB3 vector environment."""
    return make_vec_env(functools.partial(Push, **kwargs), n, seed=0)


def small_net():
    """Keyword arguments for a small policy; a new dictionary each time: SB3 writes into it."""
    return {"policy_kwargs": {"net_arch": [8]}}
