#!/usr/bin/env bash
# What to do with half an hour of an accelerator, in the order of its worth; the same command goes on
# where it was interrupted.
#
#   launch/measure.sh OUT [MINUTES]      default: 30 minutes in all
#   DRY=1 launch/measure.sh OUT          every part at its smallest, to see on a CPU that it runs
#
# The plan, in minutes of 30: 4 correctness against a CPU; 5 speed (bench.py, whose table has
# the lower bound's counterpart: operations of each stage); 2 the same for six rows with whole loops as CUDA
# graphs, which XLA makes of a loop's rounds only unless asked; 2 the kernels' real times beside the lower
# bound (ahead.py and trace.py, on DEVICE); 17 learning: `quick`'s agent alone and with a tenth
# imagined afresh, 16 seeds a side as rows, on the task where a CPU's eight showed a gain and on one where its few
# seeds left it open, then the preset `modern`.
# A part that is done leaves OUT/NAME.done, and is not repeated. DEVICE is the name that ahead.py has
# for the accelerator (h100); PYTHON names the interpreter; RUN_FLAGS are for the study's runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:?usage: launch/measure.sh OUT [MINUTES]}
minutes=${2:-30}
end=$((SECONDS + 60 * minutes))
python=${PYTHON:-python}
device=${DEVICE:-h100}
read -ra run_flags <<<"${RUN_FLAGS:-}"
envs=cheetah-run,humanoid-stand rows=1,6,16,64 seeds=6 seconds=1 preset=(--preset=paper)
evaluations=(--set=eval.every=2500 --set=eval.episodes=10)
tests=(tests/test_sac.py tests/test_ensemble.py tests/test_fitting.py tests/test_replay.py
  tests/test_device_tasks.py -k "not float64 and not (float32 and (quadruped or humanoid or cheetah))")
if [[ -n ${DRY:-} ]]; then
  envs=pendulum-swingup rows=1 seeds=1 seconds=0.01 device=cpu
  tests=(tests/test_replay.py -k mapped)
  small=(--set=replay.real=500 --set=agent.critic_width=8 --set=agent.actor_width=8 --set=model.width=8
    --set=model.fit_steps=5 --set=model.max_holdout=20 --set=rollout.batch=100)
  preset=(--preset=quick "${small[@]}")
  run_flags+=("${small[@]}" --steps=200 --seeds=1 --set=random_steps=100)
  evaluations=(--set=eval.every=100 --set=eval.episodes=1)
fi
mkdir -p "$out/curves"

# part NAME MINUTES COMMAND...: within its minutes and those that are left; SIGTERM, so that a run
# saves itself. A part that fails does not take the others with it.
part() {
  local name=$1 limit=$(($2 * 60)) left=$((end - SECONDS)) status=0
  shift 2
  if [[ -f $out/$name.done ]]; then
    echo "== $name: done before"
    return
  fi
  if ((left < 60)); then
    echo "== $name: no time left"
    return
  fi
  echo "== $name"
  timeout --signal=TERM --kill-after=120 "$((limit < left ? limit : left))" "$@" 2>&1 |
    tee "$out/$name.log" || status=$?
  echo "== $name: status $status"
  ((status)) || touch "$out/$name.done"
}

part tests 4 "$python" -m pytest -n 0 "${tests[@]}"
part bench 5 "$python" experiments/bench.py --out="$out/bench" --env="$envs" --rows="$rows" \
  --seconds="$seconds" "${preset[@]}"
part graphs 2 env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=+WHILE" "$python" \
  experiments/bench.py --out="$out/graphs" --env="${envs%%,*}" --rows="$seeds" --seconds="$seconds" "${preset[@]}"
part bound 1 env JAX_PLATFORMS=cpu "$python" experiments/ahead.py --device="$device" \
  --env="${envs%%,*}" --seeds="$seeds" --out="$out/bound" --nofit_rows "${preset[@]}"
part times 1 "$python" experiments/trace.py --env="${envs%%,*}" --seeds="$seeds" \
  --bound="$out/bound" --out="$out/times" "${preset[@]}"

# study NAME MINUTES FLAGS...: a run, and its curves.
study() {
  local name=study-$1 minutes=$2 file
  shift 2
  part "$name" "$minutes" "$python" experiments/run.py --out="$out/runs/$name" "$@" "${run_flags[@]}"
  mkdir -p "$out/curves/$name"
  for file in config.json eval.csv metrics.jsonl; do
    [[ ! -f $out/runs/$name/$file ]] || cp "$out/runs/$name/$file" "$out/curves/$name/"
  done
}

for env in quadruped-walk hopper-stand; do
  quick=(--env="$env" --preset=quick --steps=20000 --seeds=16 "${evaluations[@]}")
  study "$env-tenth-fresh" 4 "${quick[@]}" --fix=scale,auto,beta --set=rollout.real_fraction=0.9
  study "$env-alone" 2 "${quick[@]}" --algo=model-free
done
study modern 5 --env=quadruped-walk --preset=modern --steps=50000 --seeds=8 "${evaluations[@]}" --fix=scale,auto,beta
echo "written: $out"
