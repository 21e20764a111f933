"""Compare the time of a SimBa update in dynajax with its authors' code, in one process.

    git clone https://github.com/SonyResearch/simba
    pip install tensorflow-probability omegaconf
    python results/scripts/compare_simba.py --simba=simba --out=comparison

The authors' agent and its normalising wrapper are called as in their training loop: one update after
another, each with a minibatch from the host. dynajax does all updates of an environment step in one
program. The authors' code has no vectorised agents, so several seeds run one after another there. Both
alternate. Writes compare_simba.csv: milliseconds of an update of all seeds, the ratio of both, and the
share of NumPy's matmul rate.
"""

import types
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from absl import flags

import external_code
from dynajax import envs, make_config
from dynajax.cli import common
from dynajax.profiling import benchmark

FLAGS = flags.FLAGS
flags.DEFINE_string("simba", None, "A clone of github.com/SonyResearch/simba.", required=True)
flags.DEFINE_string("env", "cheetah-run", "Task whose sizes are used.")
flags.DEFINE_list("seeds", ["1", "4"], "Numbers of seeds.")
flags.DEFINE_integer("critics", 1, "Number of critics.", lower_bound=1, upper_bound=2)
flags.DEFINE_list("widths", ["128", "512"], "Widths of actor and critic.")
flags.DEFINE_integer("batch", 256, "Transitions in a minibatch.", lower_bound=1)
flags.DEFINE_float("seconds", 60, "Seconds for all measurements.", lower_bound=1)
flags.DEFINE_string("out", "comparison", "Folder for the table.")

#: Updates in one timed run of either code.
UPDATES = 10


def _their_agent(folder: str) -> tuple[Any, Any]:
    """Return the authors' agent and its wrapper."""
    # The packages import environments and buffers that an update does not need.
    buffers = [types.ModuleType(f"scale_rl.buffers{n}") for n in ("", ".base_buffer")]
    for module in buffers:
        vars(module)["Batch"] = dict
    agent, wrappers = external_code.load(
        "simba",
        folder,
        "scale_rl/agents/sac",
        "tensorflow-probability and omegaconf",
        buffers,
        "scale_rl.agents.sac.sac_agent",
        "scale_rl.agents.wrappers",
    )
    return agent.SACAgent, wrappers.ObservationNormalizer


def theirs(folder: str, obs_dim: int, action_dim: int, seeds: int) -> Callable[[], None]:
    """Return a function that does `UPDATES` updates of each of `seeds` agents."""
    agent_class, wrapper = _their_agent(folder)
    actor_width, critic_width = map(int, FLAGS.widths)
    spaces = [
        types.SimpleNamespace(shape=(1, size), dtype=np.float32) for size in (obs_dim, action_dim)
    ]
    parts = {"learning_rate": 1e-4, "weight_decay": 1e-2, "block_type": "residual"}
    sizes = {
        "actor": {"num_blocks": 1, "hidden_dim": actor_width},
        "critic": {"num_blocks": 2, "hidden_dim": critic_width, "use_cdq": FLAGS.critics == 2},
    }
    options = {f"{n}_{k}": v for n, size in sizes.items() for k, v in (parts | size).items()}
    options |= {
        "num_train_envs": 1,
        "max_episode_steps": 1000,
        "normalize_observation": True,
        "temp_target_entropy": None,
        "temp_target_entropy_coef": -0.5,
        "temp_initial_value": 0.01,
        "temp_learning_rate": 1e-4,
        "temp_weight_decay": 0.0,
        "target_tau": 0.005,
        "gamma": 0.99,
        "n_step": 1,
        "mixed_precision": False,
    }
    agents = []
    for seed in range(seeds):
        agent = wrapper(agent_class(*spaces, {"seed": seed, **options}))
        agent.obs_rms.update(np.random.default_rng(0).normal(size=(100, obs_dim)))
        agents.append(agent)
    rng = np.random.default_rng(0)
    size = FLAGS.batch
    states = rng.normal(size=(2, size, obs_dim)).astype(np.float32)
    batch = {
        "observation": states[0],
        "action": rng.uniform(-1, 1, (size, action_dim)).astype(np.float32),
        "reward": rng.normal(size=size).astype(np.float32),
        "terminated": np.zeros(size, np.float32),
        "truncated": np.zeros(size, np.float32),
        "next_observation": states[1],
    }

    def run() -> None:
        for agent in agents:
            for step in range(UPDATES):
                agent.update(step, dict(batch))

    return run


def main(argv: Sequence[str]) -> None:
    """Time both codes at every number of seeds."""
    common.start()
    spec = envs.spec(FLAGS.env)
    actor_width, critic_width = map(int, FLAGS.widths)
    settings = {
        "learn.utd": UPDATES,
        "learn.batch": FLAGS.batch,
        "agent.critics": FLAGS.critics,
        "agent.actor_width": actor_width,
        "agent.critic_width": critic_width,
    }
    lines = []
    for seeds in map(int, FLAGS.seeds):
        config = make_config(
            FLAGS.env,
            algo="model-free",
            agent="simba",
            preset="paper",
            seeds=seeds,
            settings=settings,
        )
        with ExitStack() as stack:
            stage = stack.enter_context(benchmark.Workload(config)).stages()["agent update"]
            peak = benchmark.numpy_matmul()
            runs = {
                "theirs": theirs(FLAGS.simba, spec.obs_dim, spec.action_dim, seeds),
                "ours": stage.run,
                "numpy": peak.run,
            }
            seconds = benchmark.interleave(runs, FLAGS.seconds / len(FLAGS.seeds))
        rate = peak.flops * peak.calls / float(np.median(seconds["numpy"]))
        each = {"theirs": seconds["theirs"] / UPDATES, "ours": seconds["ours"] / stage.calls}
        for side, times in each.items():
            median = float(np.median(times))
            entry = external_code.line(FLAGS.env, seeds, side, times / each["theirs"], "of_theirs")
            more = {"critics": FLAGS.critics, "ms": f"{1e3 * median:.2f}"}
            share = {"share_of_matmul_rate": f"{stage.flops / median / rate:.3f}"}
            lines.append(entry | more | share)
            print(lines[-1], flush=True)
    external_code.write(FLAGS.out, "compare_simba.csv", lines)


if __name__ == "__main__":
    common.run(main)
