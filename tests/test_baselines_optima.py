"""Each agent on two constrained MDPs whose optima are known, whole algorithms end to end.

Within 5 % of the optimal return, with a cost of at most the limit plus 5 %.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from constrained_mdps import MdpVecEnv, Speed, TwoState, episode_means
from stable_baselines3.common.callbacks import BaseCallback

from scpo_bench.baselines.cpo import CPO
from scpo_bench.baselines.cvpo import CVPO
from scpo_bench.baselines.ppo_lagrangian import PPOLagrangian

torch.set_num_threads(1)  # the networks are too small for more threads to help

DISCOUNTS = {"gamma": 0.9, "gae_lambda": 0.9, "cost_gamma": 0.9, "cost_gae_lambda": 0.9}
CRITICS = {"critic_lr": 3e-3, "critic_l2": 0.0, "critic_passes": 8}
ON_POLICY = DISCOUNTS | CRITICS | {"initial_log_std": -1.0}
# A fast actor and slow multipliers: the other way round the two oscillate.
PPO = ON_POLICY | {"steps_per_update": 800, "batch_size": 100, "actor_lr": 3e-3, "target_kl": 0.03}
# The reference's standardised rewards, started near the multiplier's equilibrium (about 4).
STANDARDISED = PPO | {"multiplier_init": 4.3, "multiplier_lr": 0.05}
# Unstandardised: the multiplier must find the price of cost, d return / d cost = sqrt(T/C) / 2 = 1.
UNSTANDARDISED = PPO | {
    "standardise_rewards": False,
    "multiplier_init": 1.0,
    "multiplier_lr": 0.05,
    "batch_size": 200,
}
CPO_CONFIG = ON_POLICY | {
    "steps_per_update": 1200,
    "batch_size": 250,
    "target_kl": 0.02,
    "cg_damping": 0.01,
}
CVPO_CONFIG = {
    "steps_per_update": 400,
    "learning_starts": 400,
    "updates_per_step": 0.1,
    "buffer_size": 8000,
    "gamma": 0.9,
    "n_step": 1,
    "batch_size": 64,
    "action_samples": 16,
    "net_arch": (64,),
    "actor_lr": 2e-3,
    "critic_lr": 2e-3,
    "initial_std": 0.3,
    "kl_bound": 0.1,
    "mean_kl_bound": 0.02,
    "covariance_kl_bound": 0.005,
}


def make(agent_class, mdp, config, seed, num_envs=10):
    """(agent, environment) before any step."""
    env = MdpVecEnv(mdp, num_envs)
    policy_kwargs = {} if agent_class is CVPO else {"net_arch": [32, 32]}
    config = config | {"cost_limit": mdp.cost_limit, "policy_kwargs": policy_kwargs}
    return agent_class("MlpPolicy", env, seed=seed, **config), env


def learn(agent_class, mdp, config, steps, seed, num_envs=10):
    """(agent, environment) after ``steps`` steps."""
    agent, env = make(agent_class, mdp, config, seed, num_envs)
    return agent.learn(steps), env


class TrainingCosts(BaseCallback):
    """``costs``: the mean cost of each update's finished episodes."""

    def __init__(self):
        super().__init__()
        self.costs = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.costs.append(float(np.mean(self.model.episode_costs.finished)))


def costs_from_full_speed(agent_class, config, updates, seed):
    """Training costs [updates] on Speed (limit 10) of a policy that starts near a = 1 (cost 27)."""
    agent, _ = make(agent_class, Speed(), config, seed)
    with torch.no_grad():
        agent.policy.action_net.bias.fill_(1.0)
    recorder = TrainingCosts()
    agent.learn(updates * config["steps_per_update"], recorder)
    return np.array(recorder.costs)


@pytest.mark.parametrize(
    ("agent_class", "mdp", "config", "steps", "seeds"),
    [
        pytest.param(PPOLagrangian, TwoState(), STANDARDISED, 64_000, 3, id="ppo, two states"),
        pytest.param(PPOLagrangian, Speed(), UNSTANDARDISED, 64_000, 3, id="ppo, speed"),
        pytest.param(CPO, TwoState(), CPO_CONFIG, 30_000, 5, id="cpo, two states"),
        pytest.param(
            CPO,
            TwoState(discrete=True),
            CPO_CONFIG | {"target_kl": 0.005},
            48_000,
            5,
            id="cpo, two states, discrete actions",
        ),
        pytest.param(CPO, Speed(), CPO_CONFIG, 18_000, 5, id="cpo, speed"),
    ],
)
def test_on_policy_agents_end_at_the_known_optimum(agent_class, mdp, config, steps, seeds):
    """A wrong sign, scale or threshold anywhere ends elsewhere on the trade-off.

    The constraint is one on the policy that acts, so the stochastic policy is measured: the median
    over seeds of the final policies.
    """
    results = [
        episode_means(learn(agent_class, mdp, config, steps, seed)[0], mdp) for seed in range(seeds)
    ]
    reached, cost = np.median(np.array(results), axis=0)
    assert reached >= 0.95 * mdp.optimal_return, results
    assert cost <= 1.05 * mdp.cost_limit, results


def test_cpo_comes_back_from_outside_and_stays_at_the_limit():
    """A line search that insists on reward freezes the policy above the limit, for good.

    The way back costs reward, in recovery steps and in steps whose trust region reaches the limit.
    At the limit, where the optimum lies, half of the updates are above it by chance.
    """
    runs = [costs_from_full_speed(CPO, CPO_CONFIG, 40, seed) for seed in range(5)]
    costs_SU = np.array(runs)
    assert costs_SU[:, 0].min() > 20.0  # far outside
    np.testing.assert_allclose(costs_SU[:, -20:].mean(axis=1), 10.0, rtol=0.01)
    assert np.median((costs_SU[:, -20:] > 10.0).sum(axis=1)) <= 10


@pytest.mark.parametrize(
    ("mdp", "config"),
    [
        pytest.param(TwoState(), CVPO_CONFIG | {"pessimistic_cost": False}, id="two states"),
        pytest.param(Speed(), CVPO_CONFIG, id="speed"),
    ],
)
def test_cvpo_ends_at_the_known_optimum(mdp, config):
    """As above, for CVPO.

    Its policy moves around the optimum from one gradient step to the next. The mean over the last
    60 episodes of two runs takes that out, where single final policies would need many runs.
    """
    runs = [learn(CVPO, mdp, config, 12_000, seed, num_envs=20)[1] for seed in range(2)]
    results = [np.mean(env.finished[-3:], axis=0) for env in runs]
    reached, cost = np.mean(results, axis=0)
    assert reached >= 0.95 * mdp.optimal_return, results
    assert cost <= 1.05 * mdp.cost_limit, results
