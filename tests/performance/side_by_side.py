"""What the comparisons with OmniSafe 0.5.0 share: its environment, and the same tasks on our side.

OmniSafe is never a dependency of this project. It needs Python 3.10 and old pins, so it lives in a
virtual environment of its own, created on first use in the folder for temporary files (about 3 GB,
mostly torch's CUDA libraries, which are not used):

    python3.10 -m venv VENV
    VENV/bin/pip install omnisafe==0.5.0 "numpy<2" "torch==2.4.1" "moviepy<2" "setuptools<80"

numpy<2: its pandas is built against 1.x; torch 2.4.1: the newest tried with it; moviepy<2 and
setuptools<80: modules it imports were removed later.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize

PINS = ["omnisafe==0.5.0", "numpy<2", "torch==2.4.1", "moviepy<2", "setuptools<80"]
THEIR_NAMES = {"ppo-lagrangian": "PPOLag", "cpo": "CPO"}
"""Agent -> the same algorithm's name in OmniSafe."""

# Runs in the other environment: argv = algorithm, task, custom configuration (JSON). Its logger
# writes config.json and progress.csv below runs/.
_TRAIN = """
import json, sys, time
from importlib.metadata import version
import omnisafe
PACKAGES = ("omnisafe", "torch", "numpy", "gymnasium", "safety-gymnasium", "mujoco")
if __name__ == "__main__":
    agent = omnisafe.Agent(sys.argv[1], sys.argv[2], custom_cfgs=json.loads(sys.argv[3]))
    start = time.perf_counter()
    agent.learn()
    seconds = time.perf_counter() - start
    versions = {name: version(name) for name in PACKAGES}
    with open("trained.json", "w") as file:
        json.dump({"seconds": seconds, "versions": versions}, file)
"""


@dataclass(frozen=True)
class Trained:
    """A training run of OmniSafe."""

    seconds: float
    """Duration of ``learn``."""
    progress: list[dict[str, str]]
    """Rows of its progress.csv, one per update."""
    config: dict[str, Any]
    """Its resolved configuration, as far as it is about training."""
    versions: dict[str, str]
    """Of the packages in its environment."""


def omnisafe_python(given: str | None = None) -> Path:
    """The interpreter of OmniSafe's environment, which is created if necessary."""
    if given:
        return Path(given)
    venv = Path(tempfile.gettempdir()) / "scpo-bench-omnisafe-0.5.0"
    python = venv / "bin" / "python"
    if not any(venv.glob("lib/*/site-packages/omnisafe-0.5.0.dist-info")):  # pip's last step
        base = shutil.which("python3.10")
        # pyenv's stand-in is on the path whether or not a 3.10 is selected.
        if base is None or subprocess.run([base, "-c", ""], check=False).returncode:
            sys.exit(
                "needs a python3.10 that runs (with pyenv: PYENV_VERSION=3.10.x before the "
                "command), or --omnisafe-python"
            )
        subprocess.run([base, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "--no-cache-dir", *PINS], check=True)
    return python


def train_omnisafe(python: Path, agent: str, task: str, settings: dict[str, Any]) -> Trained:
    """Train ``agent`` with OmniSafe's defaults but for ``settings``; RuntimeError if it fails.

    settings: OmniSafe's ``custom_cfgs``, without ``logger_cfgs``.
    """
    logs = {"use_wandb": False, "use_tensorboard": False, "log_dir": "runs"}
    custom = json.dumps({**settings, "logger_cfgs": logs})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.py").write_text(_TRAIN)
        command = [str(python), "train.py", THEIR_NAMES[agent], task, custom]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"OmniSafe failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        with next(folder.rglob("progress.csv")).open() as file:
            progress = list(csv.DictReader(file))
        config = json.loads(next(folder.rglob("config.json")).read_text())
        parts = ("train_cfgs", "algo_cfgs", "lagrange_cfgs", "model_cfgs")
        config = {name: config[name] for name in parts if name in config}
        return Trained(
            progress=progress, config=config, **json.loads((folder / "trained.json").read_text())
        )


def make_environments(task: str, num_envs: int) -> VecEnv:
    """The task for our agents: SB3's DummyVecEnv."""
    import gymnasium as gym
    from stable_baselines3.common.vec_env import DummyVecEnv

    from scpo_bench.envs.safety_gymnasium import register_safety_gymnasium

    register_safety_gymnasium()
    return DummyVecEnv([lambda: gym.make(task)] * num_envs)


def normalised(env: VecEnv) -> VecNormalize:
    """Observations by running statistics, clipped at 5, as OmniSafe's ``obs_normalize``."""
    from stable_baselines3.common.vec_env import VecNormalize

    return VecNormalize(env, norm_reward=False, clip_obs=5.0)
