"""Each agent on two constrained MDPs whose optima are known: within 5 % of the optimum, cost within
the limit plus 5 %.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from constrained_mdps import MdpVecEnv, Speed, TwoState, episode_means

from scpo_bench.baselines.cpo import CPO
from scpo_bench.baselines.cvpo import CVPO
from scpo_bench.baselines.ppo_lagrangian import PPOLagrangian

torch.set_num_threads(1)  # tiny networks: more threads only get in each other's way

SEEDS = range(5)
DISCOUNTS = {"gamma": 0.9, "gae_lambda": 0.9, "cost_gamma": 0.9, "cost_gae_lambda": 0.9}
ON_POLICY = DISCOUNTS | {
    "critic_lr": 3e-3,
    "critic_l2": 0.0,
    "critic_passes": 8,
    "initial_log_std": -1.0,
}
# A fast actor and slow multipliers: the other way round the two go in circles.
PPO = ON_POLICY | {"steps_per_update": 800, "batch_size": 100, "actor_lr": 3e-3, "target_kl": 0.03}
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
    "net_arch": (32, 32),
    "actor_lr": 2e-3,
    "critic_lr": 2e-3,
    "initial_std": 0.3,
    "kl_bound": 0.1,
    "mean_kl_bound": 0.02,
    "covariance_kl_bound": 0.005,
}
CASES = {
    # The reference's standardised rewards, started near the multiplier's equilibrium (about 4).
    "ppo-lagrangian, two states": (
        PPOLagrangian,
        TwoState(),
        PPO | {"multiplier_init": 4.3, "multiplier_lr": 0.05},
        64_000,
    ),
    # Unstandardised: the multiplier must find the price of cost, d return / d cost = sqrt(T / C) /
    # 2 = 1.
    "ppo-lagrangian, speed": (
        PPOLagrangian,
        Speed(),
        PPO
        | {
            "standardise_rewards": False,
            "multiplier_init": 1.0,
            "multiplier_lr": 0.05,
            "batch_size": 200,
        },
        64_000,
    ),
    "cpo, two states": (CPO, TwoState(), CPO_CONFIG, 36_000),
    "cpo, two states, discrete actions": (
        CPO,
        TwoState(discrete=True),
        CPO_CONFIG | {"target_kl": 0.005},
        48_000,
    ),
    "cpo, speed": (CPO, Speed(), CPO_CONFIG, 36_000),
    "cvpo, two states": (CVPO, TwoState(), CVPO_CONFIG | {"pessimistic_cost": False}, 12_000),
    "cvpo, speed": (CVPO, Speed(), CVPO_CONFIG, 14_000),
}


@pytest.mark.parametrize("case", CASES)
def test_ends_at_the_known_optimum(case):
    """The whole algorithm, end to end: a sign, a scale or a threshold that is off ends elsewhere on
    the trade-off.

    The constraint is one on the policy that acts, so it is the stochastic policy that is measured:
    median of five seeds.
    """
    agent_class, mdp, config, steps = CASES[case]
    policy_kwargs = {} if agent_class is CVPO else {"net_arch": [32, 32]}
    results = []
    for seed in SEEDS:
        agent = agent_class(
            "MlpPolicy",
            MdpVecEnv(mdp),
            seed=seed,
            cost_limit=mdp.cost_limit,
            policy_kwargs=policy_kwargs,
            **config,
        )
        results.append(episode_means(agent.learn(steps), mdp))
    reached, cost = np.median(np.array(results), axis=0)
    assert reached >= 0.95 * mdp.optimal_return, results
    assert cost <= 1.05 * mdp.cost_limit, results
