"""Says why synthetic data fails on a task, before training or of a run, on one page.

  python experiments/diagnose.py --env=humanoid-stand
  python experiments/diagnose.py --run=runs/cheetah-run-mbpo-...

With --env it collects random transitions, fits small models under every fix, and says which parts
of the task they can learn. --data=FOLDER takes a run's replay for that. With --run it asks a run's
critic and model where they are wrong, and the simulator for the truth.
"""

import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dynajax import cli, envs, targets
from dynajax.diagnose import data, fits, offline, page
from dynajax.loggers import duration
from dynajax.types import UsageError

FLAGS = flags.FLAGS
flags.DEFINE_string("env", None, "A task to diagnose: DOMAIN-TASK, or [module:]Name-v0.")
flags.DEFINE_string("data", None, "A run's folder, whose replay takes the random policy's place.")
flags.DEFINE_multi_string("fix", [], "Comma list; repeat for more. All sensible ones by default.")
flags.DEFINE_integer("transitions", 12_000, "Real transitions for each seed.", lower_bound=600)
flags.DEFINE_integer("seeds", 3, "Seeds: data, split and weights of their own.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
flags.DEFINE_string("out", None, "The page's folder; diagnosis/NAME by default.")


def before(command: str) -> None:
    """The diagnosis before training."""
    begin = time.perf_counter()
    codes = [",".join(targets.parse_fixes(fix)) or "none" for fix in FLAGS.fix or fits.CODES]
    for code in codes:
        if codes.count(code) > 1:
            raise UsageError(f"--fix={code}: it is given twice")
    spec = envs.spec(FLAGS.env)
    name = re.sub(r"[:/]", ".", spec.name)
    out = Path(FLAGS.out or Path("diagnosis") / name)
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
    recordings = [data.collect(spec, FLAGS.transitions, seed) for seed in seeds]
    source = "Random policy, half white and half correlated actions"
    print(f"{spec.name}: {len(codes)} codes x {len(seeds)} seeds, {FLAGS.transitions:,} "
          f"transitions each, collected in {duration(time.perf_counter() - begin)}",
          flush=True)  # fmt: skip
    fitting = time.perf_counter()

    def said(done: int) -> None:
        nonlocal fitting
        now = time.perf_counter()
        if done == 1:  # the first round compiles
            fitting = now
            print(f"compiled in {duration(now - begin)}", flush=True)
        elif done == 2:
            left = (now - fitting) * (fits.ROUNDS - done)
            print(f"fitting: about {duration(left)} left", flush=True)

    found = offline.measure(spec, recordings, codes, source=source, seed=FLAGS.seed, said=said)
    try:
        verdict = page.write(found, out, command)
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
    lines = [verdict.headline, *(c.text for c in verdict.causes[1:]), *verdict.remarks]
    print("\n".join(re.sub(r"</?b>", "", line) for line in lines))
    print(f"{duration(time.perf_counter() - begin)}; page: {out / 'diagnosis.html'}")


def main(argv: Sequence[str]) -> None:
    if argv:
        raise UsageError(f"{argv[0]}: flags only, such as --env={argv[0]}")
    cli.use_compilation_cache()
    command = shlex.join(["python", "experiments/diagnose.py", *sys.argv[1:]])
    before(command)


if __name__ == "__main__":
    cli.run(main)
