"""Write run directories as training would, without the training."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS = ("none", "scale", "target", "scale,target")
DIMS = [*(f"position[{i}]" for i in range(8)), *(f"velocity[{i}]" for i in range(9))]
_LEVEL = {"none": 120.0, "scale": 560.0, "target": 170.0, "scale,target": 700.0}


def fake_run(
    folder: Path,
    *,
    env: str = "cheetah-run",
    algo: str = "mbpo",
    preset: str = "quick",
    variants: tuple[str, ...] = VARIANTS,
    seeds: int = 3,
    seed: int = 0,
    steps: int = 10_000,
    every: int = 1_000,
    level: float = 1.0,
    settings: dict[str, float] | None = None,
    agent: str = "sac",
    trust: str = "none",
    repeat: int = 1,
) -> Path:
    """Write a run directory with plausible curves.

    Args:
      level: factor of all returns.
      settings: of the group `learn`.
    """
    has_model = algo == "mbpo"
    variants = variants if has_model else ("none",)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    config = {
        "env": env,
        "algo": algo,
        "preset": preset,
        "engine": "host",
        "variants": list(variants),
        "seed": seed,
        "seeds": seeds,
        "steps": steps,
        "random_steps": 1000,
        "agent_name": agent,
        "agent": {"hidden": [128, 128]},
        "learn": {"utd": 10, "batch": 256, "discount": 0.99, "reset_every": 0, "reset_at": []}
        | (settings or {}),
        "trust_name": trust,
        "trust": None,
        "task": {"repeat": repeat},
        "model": {"members": 5},
        "rollout": {"batch": 200},
        "replay": {"real": 100_000},
        "eval": {"every": every, "episodes": 2},
        "host": {"workers": 0},
    }
    _write_config(folder, config)
    lines: list[dict[str, Any]] = []
    with open(folder / "eval.csv", "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        numbers = ("return_mean", "return_std", "length_mean", "return_0", "return_1")
        out.writerow(["variant", "seed", "step", "frames", *numbers])
        for step in range(every, steps + 1, every):
            share = step / steps
            for v in variants:
                top = level * (_LEVEL.get(v, 400.0) if has_model else 300.0)
                for s in range(seed, seed + seeds):
                    mean = top * (1 - np.exp(-4 * share)) + 0.06 * top * rng.normal()
                    out.writerow([v, s, step, repeat * step, mean, 5.0, 1000.0, mean - 5, mean + 5])
                    learner = {"variant": v, "seed": s, "step": step}
                    noise = np.exp(0.1 * rng.normal())
                    lines.append(
                        {"kind": "learn", **learner, **_agent_metrics(mean, top, share, noise)}
                        | (_synthetic_metrics(mean, noise, trust) if has_model else {})
                    )
                    if has_model:
                        fit_steps = 500 + 100 * int(rng.integers(5))
                        metrics = _fit_metrics(mean, share, noise, "scale" in v)
                        lines.append({"kind": "fit", **learner, "fit_steps": fit_steps, **metrics})
            lines.append(_time(step))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    content = {
        "config": config,
        "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
        "device": "cpu: x1",
        "machine": "A processor, 2 cores; Linux",
        "dims": DIMS,
        "git_commit": "abc1234",
        "command": f"python experiments/run.py --env={config['env']}",
        "parameters": {"actor": 12_345, "critic": 23_456, "model": 345_678},
    }
    (folder / "config.json").write_text(json.dumps(content))


def _agent_metrics(mean: float, top: float, share: float, noise: float) -> dict[str, float | None]:
    """Return metrics of kind "learn" after a share of the run."""
    return {
        "critic_loss": (0.1 + share) * noise,
        "actor_loss": -top * share / 10,
        "temperature_loss": 0.1,
        "q_mean": top * share / 10 * noise,
        "target_mean": top * share / 10,
        "temperature": 0.5 * np.exp(-3 * share) * noise,
        "entropy": -3 * noise,
        "real_reward_mean": mean / 1000,
        "train_return": None,
        "start_value": 0.9 * mean / 10,
        "start_return": mean / 10,
    }


def _synthetic_metrics(mean: float, noise: float, trust: str) -> dict[str, float]:
    """Return metrics of kind "learn" that only a run with a model has."""
    metrics = {"synthetic_reward_mean": mean / 1100, "valid_fraction": 0.9}
    if trust != "none":
        metrics |= {f"accepted_fraction_{h + 1}": 0.9**h * noise**0.1 for h in range(5)}
    if trust == "m2ac":
        metrics["penalty"] = 0.1 * noise
    return metrics


def _fit_metrics(mean: float, share: float, noise: float, scaled: bool) -> dict[str, Any]:
    """Return metrics of kind "fit" of a variant with or without scaled targets."""
    return {
        "nll": -20 * share + noise,
        "holdout_mse": 0.5 * np.exp(-share) * noise,
        "r2_state": 0.8 * share,
        "r2_reward": (0.9 if scaled else 0.05) - 0.5 * np.exp(-6 * share) + 0.02 * noise,
        "r2_state_dims": [None, *(0.8 * share * d / 17 for d in range(1, 17))],
        "aleatoric_std": 0.2 * np.exp(-share) * noise,
        "coverage_80": 0.85,
        "target_variance_ratio": (17.0 if scaled else 4e5) * noise,
        "epistemic_std": 0.1 * np.exp(-share) * noise,
        "model_reward_mean": mean / 1000 * (1 if scaled else 0.4),
        "real_reward_mean": mean / 1000,
    }


def _time(step: int) -> dict[str, Any]:
    return {
        "kind": "time",
        "step": step,
        "wall_seconds": 0.2 * step,
        "steps_per_second": 5.0,
        "seconds": {
            "environment": 0.02 * step,
            "update": 0.1 * step,
            "fit": 0.05 * step,
            "evaluate": 0.02 * step,
            "checkpoint": 1.0,
            "other": 1.0,
        },
        "dropped": 0,
    }
