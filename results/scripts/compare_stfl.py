"""Compare the time of an environment step in dynajax with the authors' earlier code (STFL).

    git clone https://github.com/CLeARoboticsLab/STFL
    pip install tensorflow-probability
    python results/scripts/compare_stfl.py --stfl=STFL --out=comparison

The authors' learner and replay buffer are called as in their training loop: act, insert, 400 synthetic
transitions, 20 updates, and every 250 steps a fit of 25 x 200 steps. Both codes alternate in one
process. The time of dynajax includes the step of the environment, the other one does not. Writes
beside.csv: milliseconds, and the ratio of both.
"""

import types
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import external_code
from dynajax import envs, make_config
from dynajax.cli import common
from dynajax.profiling import benchmark

FLAGS = flags.FLAGS
flags.DEFINE_string("stfl", None, "A clone of github.com/CLeARoboticsLab/STFL.", required=True)
flags.DEFINE_string("env", "cheetah-run", "Task whose sizes are used.")
flags.DEFINE_integer("seeds", 1, "Number of seeds.", lower_bound=1)
flags.DEFINE_list("preset", ["paper", "fast"], "Presets of dynajax.")
flags.DEFINE_float("seconds", 90, "Seconds for all measurements.", lower_bound=1)
flags.DEFINE_string("out", "comparison", "Folder for the table.")

#: The values of the authors' training script and its defaults.
BATCH, REAL, UPDATES, SYNTHETIC = 256, 13, 20, 400
CHUNK, CHUNKS, FIT_EVERY = 200, 25, 250
STORED = 20_000  # real transitions in the replay buffer


def _their_modules(folder: str) -> tuple[Any, Any, Any]:
    """Return the authors' learner, replay buffer and batch, without importing gym."""
    # The packages import every agent and environment; gym's spaces occur in annotations only.
    names = ("jaxrl.agents", "jaxrl.datasets.dataset_utils", "gym")
    agents, data, gym = stand_ins = [types.ModuleType(n) for n in names]
    agents.__path__ = [str(Path(folder).resolve() / "jaxrl" / "agents")]
    vars(data)["make_env_and_dataset"] = None
    vars(gym)["spaces"] = types.SimpleNamespace(Box=object)
    learner, replay = external_code.load(
        "stfl",
        folder,
        "jaxrl/agents/mbpo",
        "tensorflow-probability",
        stand_ins,
        "jaxrl.agents.mbpo.mbpo_learner",
        "jaxrl.datasets.parallel_replay_buffer",
    )
    return learner.MBPOLearner, replay.ParallelReplayBuffer, replay.Batch


def theirs(folder: str, obs_dim: int, action_dim: int) -> dict[str, Callable[[], None]]:
    """Return the authors' environment step, and one of the 25 parts of their fit."""
    learner_class, replay_class, batch_class = _their_modules(folder)
    seeds, rng = FLAGS.seeds, np.random.default_rng(0)
    space = types.SimpleNamespace(shape=(obs_dim,), dtype=np.float32)
    obs, action = (np.zeros((seeds, size), np.float32) for size in (obs_dim, action_dim))
    learner = learner_class(0, obs[:1], action[:1], lambda *_: jnp.zeros(()), num_seeds=seeds)
    real, synthetic = (replay_class(space, action_dim, 500_000, seeds) for _ in range(2))
    ones = np.ones((seeds, STORED), np.float32)
    states = [rng.normal(size=(seeds, STORED, obs_dim)).astype(np.float32) for _ in range(2)]
    actions = rng.uniform(-1, 1, (seeds, STORED, action_dim)).astype(np.float32)
    real.batch_insert(states[0], actions, states[0][..., 0], ones, 0 * ones, states[1])
    settings = types.SimpleNamespace(batch_size=BATCH)

    def fit() -> None:
        learner.train_mbpo(real, settings, num_epochs=CHUNK)
        jax.block_until_ready(learner.ensemble.params)

    def step() -> None:
        zeros = np.zeros(seeds, np.float32)
        real.insert(obs, learner.sample_actions(obs), zeros, zeros + 1, zeros, obs)
        learner.generate_transitions(real, synthetic, batch_size=SYNTHETIC)
        parts = zip(
            real.sample_parallel_multibatch(REAL, UPDATES),
            synthetic.sample_parallel_multibatch(BATCH - REAL, UPDATES),
            strict=True,
        )
        learner.update(batch_class(*(np.concatenate(p, 2) for p in parts)), num_updates=UPDATES)
        jax.block_until_ready(learner.actor.params)

    fit()
    return {"theirs, step": step, "theirs, fit": fit}


def main(argv: Sequence[str]) -> None:
    """Time both codes."""
    common.start()
    spec = envs.spec(FLAGS.env)
    configs = {
        p: make_config(FLAGS.env, preset=p, fixes=["scale,target"], seeds=FLAGS.seeds)
        for p in FLAGS.preset
    }
    runs = theirs(FLAGS.stfl, spec.obs_dim, spec.action_dim)
    weights = {"theirs": {"theirs, step": 1.0, "theirs, fit": CHUNKS / FIT_EVERY}}
    with ExitStack() as stack:
        for preset, config in configs.items():
            stages = stack.enter_context(benchmark.Workload(config)).stages()
            named = {f"{preset}, {n}": stages[n] for n in benchmark.WHOLE_STEP}
            runs |= {name: stage.run for name, stage in named.items()}
            weights[preset] = {n: (s.per_step or 1) / s.calls for n, s in named.items()}
        seconds = benchmark.interleave(runs, FLAGS.seconds)
    totals = {
        side: sum(share * seconds[name] for name, share in parts.items())
        for side, parts in weights.items()
    }
    lines = []
    for side, total in totals.items():
        parts = {
            name.split(", ", 1)[1]: 1e3 * share * float(np.median(seconds[name]))
            for name, share in weights[side].items()
        }
        fit = sum(ms for name, ms in parts.items() if name.startswith("fit"))
        ratios = np.asarray(totals["theirs"] / total)
        entry = external_code.line(FLAGS.env, FLAGS.seeds, side, ratios, "theirs_over_it")
        ms = {"ms": f"{1e3 * np.median(total):.1f}", "ms_of_fit": f"{fit:.1f}"}
        lines.append(entry | ms)
        print(lines[-1], flush=True)
    external_code.write(FLAGS.out, "beside.csv", lines)


if __name__ == "__main__":
    common.run(main)
