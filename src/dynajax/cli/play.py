"""Play episodes with a trained policy and print their returns; record, show or export the policy.

  dynajax play runs/cheetah-run-...
  dynajax play runs/cheetah-run-... --learner=0 --which=last --episodes=20 --video
  dynajax play runs/cheetah-run-... --learner=0 --export=policy.npz

The episodes are new ones, so the best policy can have a lower return here than in the evaluation
that selected it. An .npz file needs only numpy (copy dynajax/policy/standalone.py, which reads it);
an .onnx file needs any ONNX runtime (and the extra onnx to write it).
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dynajax.cli import common
from dynajax.cli import flags as shared
from dynajax.policy import Policy, export, load_policy, play, standalone
from dynajax.policy.selection import learner_names, select_learner
from dynajax.report import statistics
from dynajax.report.run import return_bounds
from dynajax.runs import video
from dynajax.runs.directory import expand_user, make_writable, reading_config
from dynajax.types import UsageError

FLAGS = flags.FLAGS
flags.DEFINE_multi_integer(
    "learner", [], "Number of a learner of the run; repeat for more. By default all learners."
)
shared.define_choice(
    "which",
    "best",
    ["best", "last"],
    "best: the policy with the best evaluation; last: the last one.",
)
flags.DEFINE_integer("episodes", 10, "Number of episodes of each learner.", lower_bound=1)
shared.define_seed("Seed of the episodes.", lower_bound=0)
shared.define_env(None, "Another task with as many observations and actions.")
shared.define_video("Record a video of an episode into the run directory.")
flags.DEFINE_bool("view", False, "Show the episodes in MuJoCo's viewer.")
flags.DEFINE_string("export", None, "FILE.npz or FILE.onnx: write the policy and play nothing.")


#: Flags that have no effect together with another one.
_UNUSED = {"export": ("episodes", "seed", "env", "video", "view"), "view": ("video",)}


def load_policies(folders: Sequence[str]) -> list[tuple[Path, int, Policy]]:
    """Return the policies that the arguments and flags name, with their folders and learners."""
    policies = []
    for folder in dict.fromkeys(map(expand_user, folders)):
        count = len(learner_names(select_learner(folder, 0).config))
        for learner in FLAGS.learner or range(count):
            try:
                policies.append((folder, learner, load_policy(folder, learner, FLAGS.which)))
            except UsageError as error:  # it names the argument `learner`, not the flag
                raise UsageError(re.sub("^learner=", "--learner=", str(error))) from None
    return policies


def play_policy(folder: Path, learner: int, policy: Policy) -> None:
    """Play episodes with one policy and print their returns."""
    with reading_config(folder):
        time_limit = select_learner(folder, learner).config["host"]["time_limit"]
    config, spec = play.configure(policy, FLAGS.env, FLAGS.episodes, time_limit)
    print(
        f"{folder}, learner {learner}: {policy.variant}, seed {policy.seed}, {FLAGS.which} policy, "
        f"at step {policy.step:,}",
        flush=True,
    )
    if FLAGS.view:
        print(f"  {play.view(policy, config, FLAGS.seed)} episodes shown")
        return
    returns = play.episodes(policy, config, spec, FLAGS.seed).returns[0]
    bounds = return_bounds(config.env)
    mean, low, high = map(float, statistics.interval(returns, bounds=bounds))
    interval = f" (95 % {low:,.1f} to {high:,.1f})" if len(returns) > 1 else ""
    if failed := np.isnan(returns).sum():
        interval += f", without {failed} episodes in which a number was not finite"
    print("  returns " + ", ".join(f"{value:,.1f}" for value in returns))
    task = f" on {FLAGS.env}" if FLAGS.env else ""
    print(
        f"  mean {mean:,.1f}{interval}{task}; the evaluation during training gave {policy.score:,.1f}",
        flush=True,
    )
    if FLAGS.video:
        name = (
            f"video-{video.variant_file_name(policy.variant)}-seed{policy.seed}-{FLAGS.which}.mp4"
        )
        video.record_episode(config, policy.normalized_action, folder / name)
        print(f"  video: {folder / name}")


def main(folders: Sequence[str]) -> int:
    """Play or export the policies of some runs."""
    if not folders:
        raise UsageError("name at least one run's folder, such as runs/cheetah-run-*")
    for name, unused in _UNUSED.items():
        if FLAGS[name].value:
            common.refuse_flags(unused, f"with --{name}")
    if FLAGS.view:
        play.check_display()
    common.start()
    policies = load_policies(folders)
    if FLAGS.export is None:
        if FLAGS.video:
            # Find out that a folder cannot be written before the episodes are played.
            for folder in dict.fromkeys(folder for folder, _, _ in policies):
                make_writable(folder, f"--video: {folder}")
        for policy in policies:
            play_policy(*policy)
        return 0
    if len(policies) != 1:
        raise UsageError(
            f"--export={FLAGS.export}: one policy at a time; choose it by --learner=NUMBER"
        )
    path = expand_user(FLAGS.export)
    export.export(policies[0][2], path)
    reader = f"; the function that reads it: {standalone.__file__}" if path.suffix == ".npz" else ""
    print(f"written: {path}{reader}")
    return 0
