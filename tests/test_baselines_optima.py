"""Each agent on two constrained MDPs whose optima are known, whole algorithms end to end.

Within 5 % of the optimal return, with a cost of at most the limit plus 5 %.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from constrained_mdps import MdpVecEnv, Speed, TwoState, episode_means

from scpo_bench.baselines.cpo import CPO
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


def learn(agent_class, mdp, config, steps, seed, num_envs=10):
    """(agent, environment) after ``steps`` steps."""
    env = MdpVecEnv(mdp, num_envs)
    config = config | {"cost_limit": mdp.cost_limit, "policy_kwargs": {"net_arch": [32, 32]}}
    return agent_class("MlpPolicy", env, seed=seed, **config).learn(steps), env


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
