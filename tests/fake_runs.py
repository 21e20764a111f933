"""Runs' folders as training would leave them, without the training."""

import csv
import json
from pathlib import Path

import numpy as np

VARIANTS = ("none", "scale", "target", "scale,target")
CHANNELS = [*(f"position[{i}]" for i in range(8)), *(f"velocity[{i}]" for i in range(9))]
_LEVEL = {"none": 120.0, "scale": 560.0, "target": 170.0, "scale,target": 700.0, "SAC": 300.0}


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
    old: bool = False,
) -> Path:
    """A run's folder as training would leave it, with plausible curves; `old`, as it would have
    before there were agents, rules of trust and action repeat."""
    variants = ("none",) if algo == "sac" else variants
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    plain = {
        "env": env,
        "algo": algo,
        "preset": preset,
        "engine": "host",
        "variants": list(variants),
        "seed": seed,
        "seeds": seeds,
        "steps": steps,
        "random_steps": 1000,
        **(
            {"sac": {"hidden": [128, 128], "utd": 10, "batch": 256, "discount": 0.99}}
            if old
            else {
                "agent_name": agent,
                "agent": {"hidden": [128, 128]},
                "learn": {"utd": 10, "batch": 256, "discount": 0.99, "reset_every": 0}
                | {"reset_at": []}
                | (settings or {}),
                "trust_name": trust,
                "trust": None,
                "task": {"repeat": repeat},
            }
        ),
        "model": {"members": 5},
        "rollout": {"batch": 200},
        "replay": {"real": 100_000},
        "eval": {"every": every, "episodes": 2},
        "host": {"workers": 0},
    }
    (folder / "config.json").write_text(
        json.dumps(
            {
                "config": plain,
                "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
                "device": "cpu: x1",
                **({} if old else {"machine": "A processor, 2 cores; Linux", "channels": CHANNELS}),
                "git_commit": "abc1234",
                "command": f"python experiments/run.py --env={env}",
                "parameters": {"actor": 12_345, "critic": 23_456, "model": 345_678},
            }
        )
    )
    lines: list[dict] = []
    with open(folder / "eval.csv", "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        numbers = ("return_mean", "return_std", "length_mean", "return_0", "return_1")
        out.writerow(["variant", "seed", "step", *([] if old else ["frames"]), *numbers])
        for step in range(every, steps + 1, every):
            share = step / steps
            for v in variants:
                top = level * _LEVEL.get("SAC" if algo == "sac" else v, 400.0)
                for s in range(seed, seed + seeds):
                    mean = top * (1 - np.exp(-4 * share)) + 0.06 * top * rng.normal()
                    count = [step] if old else [step, repeat * step]
                    out.writerow([v, s, *count, mean, 5.0, 1000.0, mean - 5, mean + 5])
                    who = {"variant": v, "seed": s, "step": step}
                    noise = np.exp(0.1 * rng.normal())
                    synthetic = algo == "mbpo"
                    lines.append(
                        {
                            "kind": "learn",
                            **who,
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
                            **(
                                {"synthetic_reward_mean": mean / 1100, "valid_fraction": 0.9}
                                if synthetic
                                else {}
                            ),
                            **(
                                {
                                    f"accepted_fraction_{h + 1}": 0.9**h * noise**0.1
                                    for h in range(5)
                                }
                                if trust != "none"
                                else {}
                            ),
                            **({"penalty": 0.1 * noise} if trust == "m2ac" else {}),
                        }
                    )
                    if synthetic:
                        scaled = "scale" in v
                        r2 = (0.9 if scaled else 0.05) - 0.5 * np.exp(-6 * share) + 0.02 * noise
                        lines.append(
                            {
                                "kind": "fit",
                                **who,
                                "fit_steps": 500 + 100 * int(rng.integers(5)),
                                "nll": -20 * share + noise,
                                "score": 0.5 * np.exp(-share) * noise,
                                "r2_state": 0.8 * share,
                                "r2_reward": r2,
                                "r2_state_dims": [
                                    None,
                                    *(0.8 * share * c / 17 for c in range(1, 17)),
                                ],
                                "noise": 0.2 * np.exp(-share) * noise,
                                "coverage_80": 0.85,
                                "target_variance_ratio": (17.0 if scaled else 4e5) * noise,
                                "spread": 0.1 * np.exp(-share) * noise,
                                "model_reward_mean": mean / 1000 * (1 if scaled else 0.4),
                                "real_reward_mean": mean / 1000,
                            }
                        )
            lines.append(
                {
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
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
