#!/usr/bin/env bash
# `compress quantize` on SmolLM2-135M, killed with -9 at 20 random moments and started again each
# time, against the same command left alone: are the files equal, and what did it cost?
#
#     benchmarks/killed_20_times.sh WORK_FOLDER TEXT [METHOD]
set -eu
work=$1 text=$2 method=${3:-gptq}
RANDOM=7
command=(compress quantize smollm2 --method "$method" --group-size 64 --calibration "$text")
mkdir -p "$work/whole" "$work/killed"

start=$(date +%s)
"${command[@]}" --out "$work/whole/out" > /dev/null 2> "$work/whole.log"
whole=$(($(date +%s) - start))
echo "left alone: $whole s"

compare() {
  for file in model.safetensors compress.json config.json; do
    cmp "$work/whole/out/$file" "$work/killed/out/$file" && echo "$file: equal"
  done
}

kills=0
while [ $kills -lt 20 ] || [ ! -e "$work/killed/out" ]; do
  if [ -e "$work/killed/out" ]; then # a quick method is done before 20 kills: once more
    compare
    rm -r "$work/killed/out"
  fi
  "${command[@]}" --out "$work/killed/out" > /dev/null 2>> "$work/killed.log" &
  if [ $kills -lt 20 ]; then
    sleep $((6 + RANDOM % 9)).$((RANDOM % 10))
    if kill -9 $! 2> /dev/null; then kills=$((kills + 1)); fi
  fi
  wait $! || true
done
echo "killed $kills times: $(($(date +%s) - start - whole)) s in all"
compare
