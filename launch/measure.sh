#!/usr/bin/env bash
# Measure an accelerator in half an hour, the most important parts first. After an interruption the same
# command resumes.
#
#   launch/measure.sh OUT [MINUTES]      30 minutes by default
#   DRY=1 launch/measure.sh OUT          every part at its smallest size, to test the script on a CPU
#
# The parts and their minutes of 30:
#   4  correctness: tests that compare the accelerator with a CPU
#   5  speed (bench.py)
#   2  speed of six learners with whole loops as CUDA graphs; by default XLA makes one graph per iteration
#   2  the kernels' measured times and their lower bound (ahead.py and trace.py, for DEVICE)
#  17  learning: the agent of `quick` without a model and with a tenth of synthetic data generated on the
#      fly, 16 seeds per arm, on a task where eight seeds on a CPU showed a gain and on one where they did
#      not decide; then the preset `modern`
# A part that is done leaves OUT/NAME.done and is not repeated. DEVICE is the name of the accelerator in
# ahead.py (h100 by default), PYTHON the interpreter, and RUN_FLAGS are added to the runs' flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:?usage: launch/measure.sh OUT [MINUTES]}
minutes=${2:-30}
end=$((SECONDS + 60 * minutes))
python=${PYTHON:-python}
device=${DEVICE:-h100}
read -ra run_flags <<<"${RUN_FLAGS:-}"
envs=cheetah-run,humanoid-stand learners=1,6,16,64 seeds=6 seconds=1 preset=(--preset=paper)
model_flags=()
evaluations=(--set=eval.every=2500 --set=eval.episodes=10)
tests=(tests/test_sac.py tests/test_ensemble.py tests/test_training.py tests/test_replay.py
  tests/test_device_tasks.py -k "not float64 and not (float32 and (quadruped or humanoid or cheetah))")
if [[ -n ${DRY:-} ]]; then
  envs=pendulum-swingup learners=1 seeds=1 seconds=0.01 device=cpu
  tests=(tests/test_replay.py -k mapped)
  small=(--set=replay.real=500 --set=agent.critic_width=8 --set=agent.actor_width=8)
  model_flags=(--set=model.width=8 --set=model.fit_steps=5 --set=model.max_holdout=20
    --set=rollout.batch=100)
  preset=(--preset=quick "${small[@]}" "${model_flags[@]}")
  run_flags+=("${small[@]}" --steps=200 --seeds=1 --set=random_steps=100)
  evaluations=(--set=eval.every=100 --set=eval.episodes=1)
fi
mkdir -p "$out/curves"

# part NAME MINUTES COMMAND...: run a command within its minutes and those that are left. It ends with
# SIGTERM, so that a run saves itself. If a part fails, the others still run.
part() {
  local name=$1 limit=$(($2 * 60)) left=$((end - SECONDS)) status=0
  shift 2
  if [[ -f $out/$name.done ]]; then
    echo "== $name: already done"
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

part tests 4 "$python" -m pytest -n 0 -m "slow or not slow" "${tests[@]}"
part bench 5 "$python" experiments/bench.py --out="$out/bench" --env="$envs" --learners="$learners" \
  --seconds="$seconds" "${preset[@]}"
part graphs 2 env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=+WHILE" "$python" \
  experiments/bench.py --out="$out/graphs" --env="${envs%%,*}" --learners="$seeds" --seconds="$seconds" "${preset[@]}"
part bound 1 env JAX_PLATFORMS=cpu "$python" experiments/ahead.py --device="$device" \
  --env="${envs%%,*}" --seeds="$seeds" --out="$out/bound" --nocapacity "${preset[@]}"
part times 1 "$python" results/scripts/trace.py --env="${envs%%,*}" --seeds="$seeds" \
  --bound="$out/bound" --out="$out/times" "${preset[@]}"

# study NAME MINUTES FLAGS...: train a run, and copy its curves.
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
  study "$env-tenth-synthetic" 4 "${quick[@]}" --algo=dynajax --set=rollout.real_fraction=0.9 \
    "${model_flags[@]}"
  study "$env-model-free" 2 "${quick[@]}" --algo=model-free
done
study modern 5 --env=quadruped-walk --preset=modern --algo=dynajax --steps=50000 --seeds=8 "${evaluations[@]}" \
  "${model_flags[@]}"
echo "written: $out"
