#!/usr/bin/env bash
# Everything that is still to be measured on an accelerator, in the order of its worth:
# correctness, speed, then learning curves for as long as there is time.
#
#   launch/measure.sh OUT [MINUTES]      default: 30 minutes in all
#
# Learning curves go on from their checkpoints when the same command is given again. Further flags
# for the curves' runs in RUN_FLAGS, for the benchmarks in BENCH_FLAGS and ENVS_FLAGS; PYTHON names the
# interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:?usage: launch/measure.sh OUT [MINUTES]}
end=$((SECONDS + 60 * ${2:-30}))
python=${PYTHON:-python}
read -ra run_flags <<<"${RUN_FLAGS:-}"
read -ra bench_flags <<<"${BENCH_FLAGS:-}"
read -ra envs_flags <<<"${ENVS_FLAGS:-}"
mkdir -p "$out/curves"

# part NAME COMMAND...: within the time that is left; SIGTERM, so that a run saves itself. A part
# that fails does not take the others with it.
part() {
  local name=$1 left=$((end - SECONDS)) status=0
  shift
  if ((left < 60)); then
    echo "== $name: no time left"
    return
  fi
  echo "== $name"
  timeout --signal=TERM --kill-after=120 "$left" "$@" 2>&1 | tee "$out/$name.log" || status=$?
  echo "== $name: status $status"
}

part tests "$python" -m pytest tests/test_sac.py tests/test_ensemble.py tests/test_fitting.py tests/test_train.py \
  tests/test_device_tasks.py -k "not float64 and not (float32 and (quadruped or humanoid or cheetah))"
part bench "$python" experiments/bench.py --out="$out/bench" --start \
  --env=cheetah-run,humanoid-stand,quadruped-run --rows=1,2,4,6,16,64 "${bench_flags[@]}"
part envs "$python" experiments/bench_envs.py --out="$out/bench" "${envs_flags[@]}"

variants=(--fix=none --fix=scale --fix=target --fix=scale,target --fix=scale,auto,beta)
for env in quadruped-run hopper-stand humanoid-stand; do
  for algo in mbpo sac; do
    name=$env-$algo flags=(--algo=sac)
    [[ $algo == mbpo ]] && flags=("${variants[@]}")
    part "$name" "$python" experiments/run.py --env="$env" --preset=paper --seeds=2 \
      --out="$out/runs/$name" "${flags[@]}" "${run_flags[@]}"
    mkdir -p "$out/curves/$name"
    for file in config.json eval.csv metrics.jsonl; do
      [[ -f $out/runs/$name/$file ]] && cp "$out/runs/$name/$file" "$out/curves/$name/"
    done
  done
done
echo "written: $out"
