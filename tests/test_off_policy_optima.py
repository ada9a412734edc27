"""CVPO and SAC-Lagrangian on two constrained MDPs whose optima are known, from both sides.

Within 5 % of the optimal return, with a cost of at most the limit plus 5 %.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from constrained_mdps import MdpVecEnv, Speed, TwoState

from scpo_bench.baselines.cvpo import CVPO
from scpo_bench.baselines.sac_lagrangian import SACLagrangian
from scpo_bench.policies import AffineBackup

torch.set_num_threads(1)  # the networks are too small for more threads to help

OFF_POLICY = {
    "steps_per_update": 400,
    "learning_starts": 400,
    "updates_per_step": 0.1,
    "buffer_size": 8000,
    "gamma": 0.9,
    "n_step": 1,
    "batch_size": 64,
    "net_arch": (64,),
    "critic_lr": 2e-3,
    "initial_std": 0.3,
}
CVPO_CONFIG = OFF_POLICY | {
    "batch_size": 128,
    "actor_lr": 2e-3,
    "kl_bound": 0.1,
    "mean_kl_bound": 0.02,
}
# The actor slower and the multiplier faster, or the other way round: the two oscillate.
SAC_CONFIG = OFF_POLICY | {"actor_lr": 1e-3, "temperature_init": 0.003, "multiplier_lr": 0.03}


@pytest.mark.parametrize(
    ("agent_class", "mdp", "start", "config", "steps"),
    [
        pytest.param(
            CVPO, TwoState(), 0.0, {"covariance_kl_bound": 0.02}, 16_000, id="cvpo, two states"
        ),
        pytest.param(
            CVPO,
            TwoState(),
            -0.8,
            {"covariance_kl_bound": 0.02},
            16_000,
            id="cvpo, two states, from a feasible start",
        ),
        pytest.param(CVPO, Speed(), 0.0, {"covariance_kl_bound": 0.002}, 16_000, id="cvpo, speed"),
        pytest.param(
            CVPO,
            Speed(),
            0.9,
            {"covariance_kl_bound": 0.002},
            16_000,
            id="cvpo, speed, from an infeasible start",
        ),
        pytest.param(SACLagrangian, TwoState(), 0.0, {}, 12_000, id="sac, two states"),
        pytest.param(
            SACLagrangian, TwoState(), -0.8, {}, 12_000, id="sac, two states, from a feasible start"
        ),
        pytest.param(SACLagrangian, Speed(), 0.0, {}, 12_000, id="sac, speed"),
        pytest.param(
            SACLagrangian, Speed(), 0.9, {}, 12_000, id="sac, speed, from an infeasible start"
        ),
    ],
)
def test_off_policy_agents_end_at_the_known_optimum(agent_class, mdp, start, config, steps):
    """A wrong sign, scale or threshold anywhere ends elsewhere on the trade-off.

    start: the action everywhere at first; 0 breaks the limit of the two states by half of it or
    more and is well inside that of the speed. A policy moves around the optimum from one update to
    the next: the mean over the last 100 episodes of two runs takes that out.
    """
    base = CVPO_CONFIG if agent_class is CVPO else SAC_CONFIG
    backup = AffineBackup(np.zeros((1, mdp.observation_space.shape[0])), [start])
    config = base | config | {"cost_limit": mdp.cost_limit, "policy_kwargs": {"backup": backup}}
    results = []
    for seed in range(2):
        env = MdpVecEnv(mdp, 20)
        agent_class("MlpPolicy", env, seed=seed, **config).learn(steps)
        results.append(np.mean(env.finished[-5:], axis=0))
        breaks = start == 0.9 or (start == 0.0 and isinstance(mdp, TwoState))
        assert (env.finished[0][1] > mdp.cost_limit) == breaks
    reached, cost = np.mean(results, axis=0)
    assert reached >= 0.95 * mdp.optimal_return, results
    assert cost <= 1.05 * mdp.cost_limit, results
