"""The agents as Stable-Baselines3 algorithms: interface, saving, errors, unconstrained parents."""

from __future__ import annotations

import copy
import io

import gymnasium as gym
import numpy as np
import pytest
import torch
from constrained_mdps import MdpEnv, MdpVecEnv, Speed, TwoState, episode_means
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from scpo_bench.baselines.cpo import CPO
from scpo_bench.baselines.cpo_dual import Case
from scpo_bench.baselines.cvpo import CVPO
from scpo_bench.baselines.on_policy import ConstrainedOnPolicy
from scpo_bench.baselines.ppo_lagrangian import PPOLagrangian
from scpo_bench.baselines.sac_lagrangian import SACLagrangian
from scpo_bench.policies import AffineBackup, BackupActorCriticPolicy

torch.set_num_threads(1)  # tiny networks: more threads only get in each other's way

OFF_POLICY = {
    "steps_per_update": 100,
    "learning_starts": 100,
    "updates_per_step": 0.05,
    "batch_size": 32,
    "net_arch": (16, 16),
    "buffer_size": 2000,
}
SMALL = {
    PPOLagrangian: {
        "steps_per_update": 400,
        "critic_passes": 3,
        "batch_size": 100,
        "actor_lr_decay": False,
    },
    CPO: {"steps_per_update": 400, "critic_passes": 3, "batch_size": 100},
    CVPO: OFF_POLICY | {"episode_steps": 40},
    SACLagrangian: OFF_POLICY,
}
AGENTS = list(SMALL)
STEPS = {PPOLagrangian: 1600, CPO: 1600, CVPO: 600, SACLagrangian: 600}


def make(agent_class, env=None, seed=0, **config):
    env = MdpVecEnv(Speed(), 5) if env is None else env
    return agent_class(
        "MlpPolicy", env, seed=seed, **({"cost_limit": 10.0} | SMALL[agent_class] | config)
    )


def parameters(agent):
    modules = [agent.policy] + (
        [agent.cost_critics] if isinstance(agent, ConstrainedOnPolicy) else []
    )
    return np.concatenate([p.detach().numpy().ravel() for m in modules for p in m.parameters()])


class Recorder(BaseCallback):
    """Collects callback events and the diagnostics at each rollout start.

    at: functions to call at the n-th rollout start, by n.
    """

    def __init__(self, at=None):
        super().__init__()
        self.events, self.diagnostics, self.at = [], [], at or {}

    def _on_rollout_start(self):
        self.events.append("start")
        self.diagnostics.append(dict(self.model.diagnostics))
        self.at.get(self.events.count("start"), lambda: None)()

    def _on_step(self):
        if self.events[-1] != "step":
            self.events.append("step")
        return True

    def _on_rollout_end(self):
        self.events.append("end")


# ---- reproducibility and saving ----


@pytest.mark.parametrize("agent_class", AGENTS)
def test_same_seed_same_parameters(agent_class):
    """A benchmark cell is reproducible bit for bit; another seed gives another run."""
    first, second, other = (make(agent_class, seed=s).learn(STEPS[agent_class]) for s in (3, 3, 4))
    np.testing.assert_array_equal(parameters(first), parameters(second))
    assert first.diagnostics == second.diagnostics
    assert not np.array_equal(parameters(first), parameters(other))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("agent_class", AGENTS)
def test_continuing_after_load_equals_never_having_stopped(agent_class, normalised):
    """A saved file holds the whole training state.

    Anything missing (an optimiser's moments, a generator, a multiplier, the replay) shows up here.
    The agent is saved at the third rollout start inside ``learn``, and the environments are copied
    in their state at that moment.
    """
    env = MdpVecEnv(Speed(), 5)
    env = VecNormalize(env, gamma=0.9) if normalised else env
    agent, file, kept = make(agent_class, env), io.BytesIO(), {}

    def save():
        agent.save(file)
        kept["env"], kept["steps"] = (
            copy.deepcopy(env.unwrapped if normalised else env),
            agent.num_timesteps,
        )

    total = STEPS[agent_class]
    agent.learn(total, Recorder({3: save}))
    file.seek(0)
    inner = kept["env"]
    loaded = agent_class.load(
        file, VecNormalize(inner, gamma=0.9) if normalised else inner, force_reset=False
    )
    torch.manual_seed(123)  # neither torch's nor numpy's global generator may matter
    np.random.seed(123)  # noqa: NPY002
    loaded.learn(total - kept["steps"], reset_num_timesteps=False)
    assert 0 < kept["steps"] < total
    assert loaded.num_timesteps == agent.num_timesteps
    np.testing.assert_array_equal(parameters(loaded), parameters(agent))
    assert loaded.diagnostics == agent.diagnostics


@pytest.mark.parametrize("agent_class", AGENTS)
def test_predictions_survive_saving_without_an_environment(agent_class, tmp_path):
    """A published policy is loaded only to predict."""
    agent = make(agent_class)
    agent.learn(STEPS[agent_class] // 2)
    agent.save(tmp_path / "agent")
    observations = np.linspace(-1, 1, 7, dtype=np.float32)[:, None]
    loaded = agent_class.load(tmp_path / "agent")
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0],
        agent.predict(observations, deterministic=True)[0],
    )


# ---- interface ----


@pytest.mark.parametrize("agent_class", AGENTS)
def test_updates_lie_between_rollouts_and_publish_diagnostics(agent_class):
    """Updates happen between rollouts, and publish plain finite floats.

    The harness counts an update from a rollout's end to the next one's start, and reads diagnostics
    there.
    """
    recorder = Recorder()
    agent = make(agent_class)
    agent.learn(STEPS[agent_class], recorder)
    n = recorder.events.count("end")
    assert recorder.events == ["start", "step", "end"] * n
    assert n >= 3
    needed = {"multiplier", "episodic_cost"}
    needed |= {
        PPOLagrangian: {"kl", "passes"},
        CPO: {"kl", "case", "updates_recovery", "step_fraction"},
        CVPO: {"kl_mean", "kl_covariance", "kkt_residual", "cost_value_excess", "recoveries"},
        SACLagrangian: {"entropy", "temperature"},
    }[agent_class]
    assert needed <= set(agent.diagnostics)
    for diagnostics in recorder.diagnostics[3:]:
        assert all(type(v) is float and np.isfinite(v) for v in diagnostics.values()), diagnostics


@pytest.mark.parametrize("agent_class", AGENTS)
def test_works_with_sb3_wrappers_monitor_and_evaluation(agent_class):
    """DummyVecEnv, VecNormalize, TimeLimit and evaluate_policy work as with any SB3 agent."""
    env = make_vec_env(lambda: MdpEnv(Speed()), n_envs=2, seed=0)
    agent = make(agent_class, VecNormalize(env, norm_reward=False))
    agent.learn(STEPS[agent_class] // 2)
    evaluation = VecNormalize(
        DummyVecEnv([lambda: Monitor(MdpEnv(Speed()))]), training=False, norm_reward=False
    )
    mean, _ = evaluate_policy(agent, evaluation, n_eval_episodes=2)
    assert np.isfinite(mean)
    assert len(agent.ep_info_buffer) > 0
    single = make(agent_class, TimeLimit(MdpEnv(Speed()), 40))
    single.learn(STEPS[agent_class] // 4)
    assert single.num_timesteps >= STEPS[agent_class] // 4


@pytest.mark.parametrize("agent_class", AGENTS)
def test_starts_at_the_backup(agent_class):
    """``start: backup``: the untrained policy is exactly the backup, and training changes it."""
    backup = AffineBackup([[-0.5]], [0.25])
    on_policy = issubclass(agent_class, ConstrainedOnPolicy)
    policy = BackupActorCriticPolicy if on_policy else "MlpPolicy"
    config = SMALL[agent_class] | {"cost_limit": np.inf}
    agent = agent_class(
        policy, MdpVecEnv(Speed(), 5), seed=0, policy_kwargs={"backup": backup}, **config
    )
    observations = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    np.testing.assert_allclose(
        agent.predict(observations, deterministic=True)[0], 0.25 - 0.5 * observations, atol=1e-7
    )
    agent.learn(STEPS[agent_class])
    assert (
        np.abs(
            agent.predict(observations, deterministic=True)[0] - (0.25 - 0.5 * observations)
        ).max()
        > 1e-3
    )
    np.testing.assert_array_equal(backup.gain.numpy(), [[-0.5]])
    file = io.BytesIO()
    agent.save(file)
    file.seek(0)
    loaded = agent_class.load(file)
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0],
        agent.predict(observations, deterministic=True)[0],
    )


def test_discrete_actions_on_policy():
    """PPO-Lagrangian and CPO support discrete actions; Gaussian policies refuse them."""
    for agent_class in (PPOLagrangian, CPO):
        agent = make(agent_class, MdpVecEnv(TwoState(discrete=True), 5)).learn(800)
        assert agent.predict(np.eye(2, dtype=np.float32))[0].shape == (2,)
    for agent_class in (CVPO, SACLagrangian):
        with pytest.raises(AssertionError, match="Box"):
            make(agent_class, MdpVecEnv(TwoState(discrete=True), 5))


def test_float64_spaces():
    """Safety-Gymnasium's float64 spaces work with the agents' float32 networks and buffers."""
    mdp = Speed()
    mdp.observation_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float64)
    mdp.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float64)
    for agent_class in AGENTS:
        agent = make(agent_class, MdpVecEnv(mdp, 5)).learn(STEPS[agent_class] // 2)
        assert np.isfinite(agent.predict(np.zeros((1, 1)), deterministic=True)[0]).all()


# ---- errors ----


class Faulty(MdpVecEnv):
    """Puts a bad value into one field of environment 3 at the 7th step."""

    def __init__(self, field, value):
        super().__init__(Speed(), 5)
        self.field, self.value, self.steps_taken = field, value, 0

    def step_wait(self):
        observations, rewards, dones, infos = super().step_wait()
        self.steps_taken += 1
        if self.steps_taken == 7:
            if self.field == "observation":
                observations[3, 0] = self.value
            elif self.field == "reward":
                rewards[3] = self.value
            elif self.field == "cost":
                infos[3]["cost"] = self.value
            else:
                del infos[3]["cost"]
        return observations, rewards, dones, infos


@pytest.mark.parametrize("agent_class", AGENTS)
@pytest.mark.parametrize(
    ("field", "value"), [("observation", np.nan), ("reward", np.inf), ("cost", np.nan)]
)
def test_non_finite_values_stop_the_run(agent_class, field, value):
    """A NaN is never learnt from: the run stops and says where.

    Five environments, 7th step: step 35.
    """
    with pytest.raises(FloatingPointError, match=f"step 35, environment 3: {field} is not finite"):
        make(agent_class, Faulty(field, value)).learn(1000)


@pytest.mark.parametrize("agent_class", AGENTS)
def test_missing_cost_is_an_error(agent_class):
    """An environment without costs does not count as safe."""
    with pytest.raises(KeyError, match="environment 3: info has no 'cost'"):
        make(agent_class, Faulty("missing", None)).learn(1000)


@pytest.mark.parametrize("agent_class", AGENTS)
def test_configuration_errors_name_the_field(agent_class):
    """Unknown keys and impossible values are refused before anything runs."""
    name = agent_class.Config.__name__
    with pytest.raises(
        ValueError, match=rf"{name}\.cost_limits: unknown field; did you mean 'cost_limit'"
    ):
        make(agent_class, cost_limits=3.0)
    with pytest.raises(ValueError, match=rf"{name}\.batch_size: must be at least 1, got 0"):
        make(agent_class, batch_size=0)
    with pytest.raises(ValueError, match=rf"{name}\.cost_limit"):
        make(agent_class, cost_limit=-1.0)


@pytest.mark.parametrize("agent_class", [CPO, CVPO, SACLagrangian])
def test_several_constraints_are_refused_where_one_is_covered(agent_class):
    """Several constraints are refused: using only the first would be unsafe."""
    with pytest.raises(ValueError, match="one constraint"):
        make(agent_class, cost_keys=("cost", "other"), cost_limit=(1.0, 2.0))


class TwoCosts(MdpVecEnv):
    """A second cost: nonzero, always far below its limit."""

    def step_wait(self):
        observations, rewards, dones, infos = super().step_wait()
        for info in infos:
            info["energy"] = 0.01
        return observations, rewards, dones, infos


def test_several_constraints_have_a_multiplier_each():
    """The violated constraint's multiplier rises; the satisfied one's falls to zero and stays."""
    agent = make(
        PPOLagrangian, TwoCosts(Speed(), 5), cost_keys=["cost", "energy"], cost_limit=[0.0, 100.0]
    )
    agent.learn(2000)
    assert agent.diagnostics["multiplier_cost"] > 0.1
    assert agent.diagnostics["multiplier_energy"] == 0.0
    assert agent.diagnostics["episodic_cost_energy"] == pytest.approx(0.4)
    names = ("reward_critic_error", "cost_critic_error_cost", "cost_critic_error_energy")
    assert len({agent.diagnostics[name] for name in names}) == 3


# ---- CPO ----


def test_every_step_keeps_the_kl_bound_and_counts_its_case():
    """Every policy update stays within the trust region and is counted in one case."""
    recorder = Recorder()
    make(CPO, target_kl=0.02).learn(4000, recorder)
    updates = [d for d in recorder.diagnostics if d]
    assert all(0 <= d["kl"] <= 0.02 for d in updates)
    for i, d in enumerate(updates, 1):
        assert sum(d[f"updates_{case.name.lower()}"] for case in Case) == i


# ---- unconstrained parents ----


class ScaledCosts(MdpVecEnv):
    def __init__(self, mdp, num_envs, scale):
        super().__init__(mdp, num_envs)
        self.scale = scale

    def step_wait(self):
        observations, rewards, dones, infos = super().step_wait()
        for info in infos:
            info["cost"] *= self.scale
        return observations, rewards, dones, infos


@pytest.mark.parametrize("agent_class", AGENTS)
def test_costs_do_not_matter_without_a_limit(agent_class):
    """With an infinite limit the policy must be exactly the one that no cost at all would give."""
    policies = []
    for scale in (0.0, 50.0):
        agent = make(agent_class, ScaledCosts(Speed(), 5, scale), cost_limit=np.inf)
        agent.learn(STEPS[agent_class])
        policies.append(
            agent.predict(np.linspace(-1, 1, 9, dtype=np.float32)[:, None], deterministic=True)[0]
        )
        assert agent.diagnostics["multiplier"] == 0.0
    np.testing.assert_array_equal(*policies)


def test_ppo_lagrangian_without_a_limit_takes_ppos_step():
    """Without a limit a minibatch step equals PPO's, written with SB3's policy and autograd."""
    agent = make(
        PPOLagrangian, cost_limit=np.inf, critic_passes=1, batch_size=400, max_grad_norm=1e9, seed=5
    )
    before = {k: v.clone() for k, v in agent.policy.state_dict().items()}
    agent.learn(400)
    rollout = agent.rollout_buffer
    observations = torch.from_numpy(rollout.observations.reshape(400, -1))
    actions = torch.from_numpy(rollout.actions.reshape(400, -1))
    after = {k: v.clone() for k, v in agent.policy.state_dict().items()}
    agent.policy.load_state_dict(before)
    from scpo_bench.baselines.actors import actor_of

    batch = agent._batch(actor_of(agent.policy), agent._critics())
    advantages = torch.from_numpy(
        (batch.advantages[0] - batch.advantages[0].mean()) / batch.advantages[0].std()
    )
    _, log_prob, _ = agent.policy.evaluate_actions(observations, actions)
    ratio = torch.exp(log_prob - log_prob.detach())
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    names = [
        n
        for n, _ in agent.policy.named_parameters()
        if "policy_net" in n or n.startswith(("action_net", "log_std"))
    ]
    trained = [dict(agent.policy.named_parameters())[n] for n in names]
    optimizer = torch.optim.Adam(trained, lr=3e-4)
    loss.backward()
    optimizer.step()
    for name, parameter in zip(names, trained):
        torch.testing.assert_close(after[name], parameter.detach(), atol=2e-6, rtol=1e-4)


def test_cpo_without_a_limit_takes_trpos_step():
    """Without a limit the step is the natural gradient, scaled to the trust region.

    Its quadratic KL is delta, and case 1 or 2 fires.
    """
    recorder = Recorder()
    agent = make(CPO, cost_limit=np.inf, cg_damping=1e-3, target_kl=1e-3)
    agent.learn(1200, recorder)
    for d in [*recorder.diagnostics[1:], agent.diagnostics]:
        assert d["case"] in (Case.UNCONSTRAINED, Case.ALL_FEASIBLE)
        assert d["kl"] <= 1e-3
        assert d["kl"] == pytest.approx(1e-3 * d["step_fraction"] ** 2, rel=0.15)
        assert d["c"] == 0.0  # minus infinity, which a record could not hold


UNCONSTRAINED = {
    PPOLagrangian: {"actor_lr": 3e-3, "critic_lr": 3e-3, "gamma": 0.9, "target_kl": 0.05},
    CPO: {"gamma": 0.9, "target_kl": 0.05, "critic_lr": 3e-3, "cg_damping": 0.01},
    CVPO: {
        "gamma": 0.9,
        "actor_lr": 2e-3,
        "critic_lr": 2e-3,
        "kl_bound": 0.2,
        "mean_kl_bound": 0.05,
        "updates_per_step": 0.2,
    },
    SACLagrangian: {
        "gamma": 0.9,
        "actor_lr": 2e-3,
        "critic_lr": 2e-3,
        "updates_per_step": 0.2,
        "temperature_init": 0.01,
    },
}


@pytest.mark.parametrize("agent_class", AGENTS)
def test_without_a_limit_the_unconstrained_optimum_is_reached(agent_class):
    """Without a limit the agents reach the unconstrained optimum, full throttle, within 5 %."""
    agent = make(agent_class, cost_limit=np.inf, **UNCONSTRAINED[agent_class])
    agent.learn(12_000 if issubclass(agent_class, ConstrainedOnPolicy) else 3000)
    reached, _ = episode_means(agent, Speed(), deterministic=True)
    assert reached >= 0.95 * Speed().unconstrained_return


def test_cvpo_recovers_counted_and_reports_kkt():
    """Where no reweighting meets the limit of zero, recovery steps are taken and counted."""
    recorder = Recorder()
    agent = make(CVPO, cost_limit=0.0, gamma=0.9, initial_std=0.3, pessimistic_cost=True)
    agent.learn(1500, recorder)
    updates = [d for d in recorder.diagnostics if "recoveries" in d]
    assert (
        agent.recoveries == updates[-1]["recoveries"]
        or agent.recoveries > updates[-1]["recoveries"]
    )
    assert agent.recoveries > 0
    assert all(d["kkt_residual"] <= 1e-8 and d["e_step_kl"] <= 0.02 * (1 + 1e-8) for d in updates)


def test_gym_registered_time_limit_sets_cvpos_threshold():
    """T in CVPO's threshold comes from the environment's own time limit.

    40 steps, so d = C (1 - gamma^40) / ((1 - gamma) 40).
    """
    gym.register("TestSpeed-v0", entry_point=lambda: MdpEnv(Speed()), max_episode_steps=40)
    try:
        agent = make(CVPO, gym.make("TestSpeed-v0"), episode_steps=None, gamma=0.9, cost_limit=8.0)
        assert agent.threshold() == pytest.approx(8.0 * (1 - 0.9**40) / (0.1 * 40))
    finally:
        gym.registry.pop("TestSpeed-v0")
