"""Plays episodes with a trained policy, and says what they return; films, shows or exports it.

  dynajax play runs/cheetah-run-...
  dynajax play runs/cheetah-run-... --row=0 --which=last --episodes=20 --video
  dynajax play runs/cheetah-run-... --row=0 --export=policy.npz

The episodes are new ones, so the best policy's return here lacks the luck that made it the best.
An .npz needs numpy alone where it is used (the function is dynajax/policy/standalone.py, a file to
copy), an .onnx any runtime of ONNX (to write one takes the extra onnx).
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dynajax.cli import common
from dynajax.policy import Policy, export, load_policy, play, standalone
from dynajax.policy.selection import learner_names, select_learner
from dynajax.report import statistics
from dynajax.runs import video
from dynajax.types import UsageError

FLAGS = flags.FLAGS
flags.DEFINE_multi_integer("row", [], "Which of a run's rows; repeat for more. All by default.")
flags.DEFINE_enum(
    "which", "best", ["best", "last"], "The policy at the best evaluation, or the last."
)
flags.DEFINE_integer("episodes", 10, "How many.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Fixes the episodes.", lower_bound=0)
flags.DEFINE_string("env", None, "Another task with as many observations and actions.")
flags.DEFINE_bool("video", False, "Film an episode into the run's folder.")
flags.DEFINE_bool("view", False, "Show the episodes in MuJoCo's viewer.")
flags.DEFINE_string("export", None, "FILE.npz or FILE.onnx: write the policy, and play nothing.")


def chosen(folders: Sequence[str]) -> list[tuple[Path, int, Policy]]:
    """The policies that the words and flags name, with their folders and rows."""
    policies = []
    for folder in dict.fromkeys(map(common.folder, folders)):
        count = len(learner_names(select_learner(folder, 0).config))
        for row in FLAGS.row or range(count):
            policies.append((folder, row, load_policy(folder, row, FLAGS.which)))
    return policies


def show(folder: Path, row: int, policy: Policy) -> None:
    """Plays with one policy, and prints what came of it."""
    plain = select_learner(folder, row).config
    config, spec = play.configure(policy, FLAGS.env, FLAGS.episodes, plain["host"]["time_limit"])
    print(
        f"{folder}, row {row}: {policy.variant}, seed {policy.seed}, {FLAGS.which} policy, of step "
        f"{policy.step:,}",
        flush=True,
    )
    if FLAGS.view:
        print(f"  {play.view(policy, config, FLAGS.seed)} episodes shown")
        return
    returns = play.episodes(policy, config, spec, FLAGS.seed).returns[0]
    mean, low, high = map(float, statistics.interval(returns))
    spread = f" (95 % {low:,.1f} to {high:,.1f})" if len(returns) > 1 else ""
    print("  returns " + ", ".join(f"{value:,.1f}" for value in returns))
    where = f" on {FLAGS.env}" if FLAGS.env else ""
    print(
        f"  mean {mean:,.1f}{spread}{where}; the run's own evaluation said {policy.score:,.1f}",
        flush=True,
    )
    if FLAGS.video:
        name = (
            f"video-{video.variant_file_name(policy.variant)}-seed{policy.seed}-{FLAGS.which}.mp4"
        )
        video.record_episode(config, policy.normalized_action, folder / name)
        print(f"  video: {folder / name}")


def main(folders: Sequence[str]) -> int:
    if not folders:
        raise UsageError("name at least one run's folder, such as runs/cheetah-run-*")
    if FLAGS.view:
        play.check_display()
    common.start()
    policies = chosen(folders)
    if FLAGS.export is None:
        for policy in policies:
            show(*policy)
        return 0
    if len(policies) != 1:
        raise UsageError(
            f"--export={FLAGS.export}: one policy at a time; choose it by --row=NUMBER"
        )
    path = common.folder(FLAGS.export)
    export.export(policies[0][2], path)
    reader = f"; the function that reads it: {standalone.__file__}" if path.suffix == ".npz" else ""
    print(f"written: {path}{reader}")
    return 0
