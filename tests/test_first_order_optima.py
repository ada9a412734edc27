"""PPO-Lagrangian, PPO-PID, FOCOPS and P3O on two constrained MDPs whose optima are known.

Rewards are not standardised: the multiplier must find the price of cost, which is 1 on ``Speed``
and 11/9 on ``TwoState``. It starts at the reference's 0.001 unless a test says otherwise.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from constrained_mdps import Speed, TwoState
from test_baselines_optima import CRITICS, DISCOUNTS, make

from scpo_bench.baselines.focops import FOCOPS
from scpo_bench.baselines.p3o import P3O
from scpo_bench.baselines.ppo_lagrangian import PPOLagrangian
from scpo_bench.baselines.ppo_pid import PPOPID

torch.set_num_threads(1)  # the networks are too small for more threads to help

COMMON = {
    **DISCOUNTS,
    **CRITICS,
    "standardise_rewards": False,
    "initial_log_std": -1.0,
    "steps_per_update": 400,
    "batch_size": 100,
    "actor_lr": 3e-3,
    "target_kl": 0.03,
}
LAGRANGIAN = COMMON | {"multiplier_lr": 0.05, "actor_lr_decay": False}
SLOW_LAGRANGIAN = COMMON | {"multiplier_lr": 0.02}
PID = COMMON | {"smoothing": 0.5}
# Advantages are of the order of 0.1 here, of the order of 1 where rewards are standardised.
FOCOPS_CONFIG = COMMON | {"multiplier_lr": 0.05, "temperature": 0.015}
# Greedier, it runs off far beyond a = 1, where actions are clipped and nothing leads back.
FOCOPS_OUTSIDE = FOCOPS_CONFIG | {"temperature": 0.03}
P3O_CONFIG = COMMON | {"penalty": 5.0}


class Slack(TwoState):
    """The limit is beyond every policy's cost: the multiplier must be 0, and nothing below it.

    A negative price would buy cost; here, unlike on ``Speed``, that is not what the reward wants.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cost_limit, self.optimal_return = 2.0 * self.steps, self.unconstrained_return


def case(agent_class, mdp, config, steps, name, full_speed=False):
    return pytest.param(agent_class, mdp, config, steps, full_speed, id=name)


@pytest.mark.parametrize(
    ("agent_class", "mdp", "config", "steps", "full_speed"),
    [
        # Any longer, and a multiplier that answers ten updates late would get there as well.
        case(PPOLagrangian, Speed(), LAGRANGIAN, 52_000, "ppo-lagrangian, speed"),
        case(
            PPOLagrangian,
            Speed(),
            LAGRANGIAN | {"multiplier_init": 4.0},
            64_000,
            "ppo-lagrangian, speed, multiplier from above",
        ),
        case(PPOLagrangian, Speed(), LAGRANGIAN, 64_000, "ppo-lagrangian, speed, outside", True),
        case(PPOLagrangian, TwoState(), SLOW_LAGRANGIAN, 96_000, "ppo-lagrangian, two states"),
        case(
            PPOLagrangian,
            Slack(),
            LAGRANGIAN | {"multiplier_init": 1.0},
            64_000,
            "ppo-lagrangian, slack limit",
        ),
        case(PPOPID, Speed(), PID, 64_000, "ppo-pid, speed"),
        case(PPOPID, Speed(), PID, 64_000, "ppo-pid, speed, outside", True),
        case(PPOPID, TwoState(), PID, 96_000, "ppo-pid, two states, outside", True),
        case(FOCOPS, Speed(), FOCOPS_CONFIG, 96_000, "focops, speed"),
        case(FOCOPS, Speed(), FOCOPS_OUTSIDE, 96_000, "focops, speed, outside", True),
        case(FOCOPS, TwoState(), FOCOPS_CONFIG, 96_000, "focops, two states, outside", True),
        case(P3O, Speed(), P3O_CONFIG, 64_000, "p3o, speed"),
        case(P3O, Speed(), P3O_CONFIG, 64_000, "p3o, speed, outside", True),
        case(P3O, TwoState(), P3O_CONFIG, 64_000, "p3o, two states, outside", True),
    ],
)
def test_first_order_agents_end_at_the_known_optimum(agent_class, mdp, config, steps, full_speed):
    """Within 5 % of the optimal return, and a cost of at most the limit plus 5 %, from any start.

    A multiplier that moves the wrong way, is not projected at 0 or answers to old episodes ends
    elsewhere on the trade-off, or circles around it. Measured is the policy in training, over the
    last 60 sets of episodes of three runs. ``full_speed`` starts at a = 1, where both MDPs cost two
    and a half to four times the limit.
    """
    runs = [make(agent_class, mdp, config, seed, full_speed=full_speed) for seed in range(3)]
    results = [np.mean(env.finished[-60:], axis=0) for agent, env in runs if agent.learn(steps)]
    starts = [env.finished[0][1] for _, env in runs]
    reached, cost = np.mean(results, axis=0)
    assert not full_speed or min(starts) > 2.5 * mdp.cost_limit, starts
    assert reached >= 0.95 * mdp.optimal_return, results
    assert cost <= 1.05 * mdp.cost_limit, results
