"""Small constrained MDPs with known optima, as scalar and vectorised environments."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv


class TwoState:
    """States 0 and 1; the action p is the probability that the next state is 1.

    Reward: p (2 - p) in state 0, 0.4 p (2 - p) in state 1. Cost: 1 whenever the next state is 1.
    The share of steps with cost is p0 / (1 + p0 - p1); at the limit of 1/4 per step, 3 p0 + p1 = 1,
    and the reward per step 3/4 p0 (2 - p0) + 1/10 p1 (2 - p1) falls in p1 along that line, so p =
    (1/3, 0) is optimal with 3/4 * 5/9 = 5/12 per step. (The first steps, from state 0, change an
    episode of 40 by less than one percent.)

    Observation: one-hot state. Action: Box(-1, 1), p = (a + 1) / 2; or, ``discrete``, p itself in
    {0, 1}. There the reward is 1 for a move 0 -> 1 and 0.4 for staying in 1, spending the whole
    limit on the former is best, and the optimum is 1/4 per step.
    """

    steps = 40
    observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)

    def __init__(self, discrete: bool = False) -> None:
        self.discrete = discrete
        self.action_space = (
            spaces.Discrete(2) if discrete else spaces.Box(-1.0, 1.0, (1,), np.float32)
        )
        self.cost_limit = self.steps / 4
        self.optimal_return = self.steps * (1 / 4 if discrete else 5 / 12)

    @property
    def unconstrained_return(self) -> float:
        """By enumeration of stationary policies."""
        p0, p1 = np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 1, 201))
        share = p0 / np.maximum(1 + p0 - p1, 1e-9)
        return float(self.steps * np.max((1 - share) * p0 * (2 - p0) + share * 0.4 * p1 * (2 - p1)))

    def start(self, n: int, rng: np.random.Generator) -> Any:
        return np.zeros(n, np.int64)

    def observe(self, state: Any) -> Any:
        return np.eye(2, dtype=np.float32)[state]

    def step(self, state: Any, actions: Any, rng: np.random.Generator) -> Any:
        p = (
            np.asarray(actions, np.float64)
            if self.discrete
            else (actions[:, 0].astype(np.float64) + 1) / 2
        )
        following = (rng.random(len(state)) < p).astype(np.int64)
        return following, np.where(state == 0, 1.0, 0.4) * p * (2 - p), following.astype(np.float64)


class Speed:
    """Speed v' = 0.8 v + 0.2 a, reward v', cost v'^2: go far on a budget of energy.

    By Cauchy-Schwarz, the sum of T speeds is at most sqrt(T C) when their squares sum to C, with
    equality for constant speed. Episodes start at that speed, v0 = sqrt(C/T), so a = v is optimal
    and the bound is attained: optimal return sqrt(T C). Unconstrained, a = 1. Observation: v.
    Action: Box(-1, 1).
    """

    steps = 40
    discrete = False
    observation_space = spaces.Box(-2.0, 2.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, cost_limit: float = 10.0) -> None:
        self.cost_limit = cost_limit
        self.optimal_return = float(np.sqrt(self.steps * cost_limit))
        # v_t = 1 - (1 - v0) 0.8^t, summed
        deficit = 1 - np.sqrt(cost_limit / self.steps)
        self.unconstrained_return = float(
            self.steps - deficit * np.sum(0.8 ** np.arange(1, self.steps + 1))
        )

    def start(self, n: int, rng: np.random.Generator) -> Any:
        return np.full(n, np.sqrt(self.cost_limit / self.steps))

    def observe(self, state: Any) -> Any:
        return state[:, None].astype(np.float32)

    def step(self, state: Any, actions: Any, rng: np.random.Generator) -> Any:
        following = 0.8 * state + 0.2 * actions[:, 0]
        return following, following.copy(), following**2


class SharedSpeed(Speed):
    """Speed with a = (a1 + a2) / 2: the same optimum, with two action dimensions."""

    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def step(self, state: Any, actions: Any, rng: np.random.Generator) -> Any:
        return super().step(state, actions.mean(axis=1, keepdims=True), rng)


class MdpEnv(gym.Env):
    """One of the above, one environment."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(self, mdp: Any) -> None:
        self.mdp = mdp
        self.observation_space, self.action_space = mdp.observation_space, mdp.action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state, self.elapsed = self.mdp.start(1, self.np_random), 0
        return self.mdp.observe(self.state)[0], {}

    def step(self, action: Any) -> Any:
        self.state, rewards, costs = self.mdp.step(
            self.state, np.asarray(action)[None], self.np_random
        )
        self.elapsed += 1
        truncated = self.elapsed >= self.mdp.steps
        return (
            self.mdp.observe(self.state)[0],
            float(rewards[0]),
            False,
            truncated,
            {"cost": float(costs[0])},
        )


class MdpVecEnv(VecEnv):
    """``num_envs`` copies in one array: quick, and copyable in mid-episode (``copy.deepcopy``).

    ``finished`` holds the mean (return, cost) of each set of ``num_envs`` episodes so far.
    """

    def __init__(self, mdp: Any, num_envs: int = 10) -> None:
        self.mdp = mdp
        self.finished: list[NDArray[np.float64]] = []
        super().__init__(num_envs, mdp.observation_space, mdp.action_space)
        self.rng = np.random.default_rng(0)

    def reset(self) -> Any:
        if self._seeds[0] is not None:  # SB3's rule: a seed takes effect at the next reset, once
            self.rng = np.random.default_rng(self._seeds[0])
        self._reset_seeds()
        return self._start()

    def _start(self) -> Any:
        self.state, self.elapsed = self.mdp.start(self.num_envs, self.rng), 0
        self.sums = np.zeros(2)
        return self.mdp.observe(self.state)

    def step_async(self, actions: Any) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        self.state, rewards, costs = self.mdp.step(self.state, self.actions, self.rng)
        self.elapsed += 1
        self.sums += rewards.mean(), costs.mean()
        infos: list[dict[str, Any]] = [{"cost": float(cost)} for cost in costs]
        done = self.elapsed >= self.mdp.steps
        observations = self.mdp.observe(self.state)
        if done:
            for info, observation in zip(infos, observations):
                info |= {"TimeLimit.truncated": True, "terminal_observation": observation}
            self.finished.append(self.sums)
            observations = self._start()
        return observations, rewards.astype(np.float32), np.full(self.num_envs, done), infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        return [getattr(self, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Any:
        return [False] * self.num_envs


def episode_means(
    agent: Any, mdp: Any, episodes: int = 200, deterministic: bool = False, seed: int = 1
) -> Any:
    """(mean return, mean cost) of a policy over whole episodes."""
    rng = np.random.default_rng(seed)
    state, returns, costs = mdp.start(episodes, rng), np.zeros(episodes), np.zeros(episodes)
    for _ in range(mdp.steps):
        actions, _ = agent.predict(mdp.observe(state), deterministic=deterministic)
        state, rewards, step_costs = mdp.step(state, actions, rng)
        returns += rewards
        costs += step_costs
    return float(returns.mean()), float(costs.mean())
