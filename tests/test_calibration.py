"""The calibration beside OmniSafe: its page is what the committed runs give, at equal settings."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RUNS = sorted((ROOT / "tests" / "data" / "calibration").glob("*.json"))


@pytest.fixture
def calibration(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, whose folder is no package."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "performance")
    return importlib.import_module("calibration")


def test_page_is_what_the_committed_runs_give(calibration):
    """docs/calibration.md is not edited by hand and tells every missing run."""
    plans = calibration.plans(
        calibration.LIBRARIES,
        calibration.TASKS,
        calibration.AGENTS,
        calibration.SEEDS,
        calibration.STEPS,
    )
    curves = calibration.read_curves(plans, calibration.DATA)
    assert {plan.path(calibration.DATA) for plan in curves} == set(RUNS)  # no file is left out
    page = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    assert page == calibration.text(plans, curves)


def test_trailing_means_by_hand(calibration):
    """Our curves average the episodes that OmniSafe's logger averages, across updates."""
    episodes = [[], [4.0], [], [2.0, 6.0], [1.0]]
    assert calibration.trailing_means(episodes, 3) == [None, 4.0, 4.0, 4.0, 3.0]


def test_final_value_by_hand(calibration):
    """The table shows the end of training: the last tenth of the updates, and no more of them."""
    assert calibration.final([100.0] * 18 + [1.0, 2.0]) == 1.5
    assert calibration.final([None, 7.0]) == 7.0


def test_a_run_of_other_length_is_another_run(calibration, tmp_path):
    """A short trial cannot pass for a run of the planned length."""
    (short,) = calibration.plans(["ours"], ["T-v0"], ["cpo"], 1, 4096)
    (planned,) = calibration.plans(["ours"], ["T-v0"], ["cpo"], 1, 1_000_000)
    curve = {"steps": [2048, 4096], "returns": [None, 1.0], "costs": [None, 2.0]}
    short.path(tmp_path).write_text(json.dumps({"curve": curve}))
    assert calibration.read_curves([planned], tmp_path) == {}
    assert calibration.read_curves([short], tmp_path)[short].returns == [None, 1.0]
    assert (short.updates(), planned.updates()) == (2, 488)


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """The settings that both libraries have, by OmniSafe's names."""
    config = record["config"]
    if record["library"] == "omnisafe":
        algo = config["algo_cfgs"]
        names = ("steps_per_epoch", "gamma", "cost_gamma", "lam", "lam_c", "update_iters")
        found = {name: algo[name] for name in (*names, "batch_size", "target_kl", "max_grad_norm")}
        found["critic_norm_coef"] = algo["critic_norm_coef"]
        found["cost_limit"] = config.get("lagrange_cfgs", algo)["cost_limit"]
        found["critic_lr"] = config["model_cfgs"]["critic"]["lr"]
        assert algo["obs_normalize"]
        assert not algo["reward_normalize"]
        assert not algo["cost_normalize"]
        assert config["train_cfgs"]["vector_env_nums"] == 1
        extra = ("clip", "cg_iters", "cg_damping")
        return found | {name: algo[name] for name in extra if name in algo}
    names = {
        "steps_per_update": "steps_per_epoch",
        "gamma": "gamma",
        "cost_gamma": "cost_gamma",
        "gae_lambda": "lam",
        "cost_gae_lambda": "lam_c",
        "critic_passes": "update_iters",
        "batch_size": "batch_size",
        "target_kl": "target_kl",
        "max_grad_norm": "max_grad_norm",
        "critic_l2": "critic_norm_coef",
        "cost_limit": "cost_limit",
        "critic_lr": "critic_lr",
        "clip_range": "clip",
        "cg_iterations": "cg_iters",
        "cg_damping": "cg_damping",
    }
    return {theirs: config[name] for name, theirs in names.items() if name in config}


def test_committed_runs_have_equal_settings():
    """The two libraries are compared at the same settings, as docs/calibration.md says."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in RUNS]
    for agent in ("ppo-lagrangian", "cpo"):
        used = [settings(record) for record in records if record["agent"] == agent]
        assert all(found == used[0] for found in used)
