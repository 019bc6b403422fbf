#!/usr/bin/env bash
# Runs the checks of tools/bench/gpu_drill.py on one GPU, in at most ten minutes.
#
#   make gpu-drill OUT=gpu_drill.md
#   tools/bench/gpu_drill.sh gpu_drill.md [PART ...]       only the named parts
#
# Each part runs under a time limit and appends its Markdown to the file. The last table lists which
# parts passed. The exit code is 1 if a part failed or ran out of time. Without a GPU, parts that can
# run on a CPU use small models over gloo. SLOWER=3 multiplies the time limits by 3.
set -uo pipefail
out=$(realpath -m "${1:?usage: tools/bench/gpu_drill.sh FILE [PART ...]}")
chosen=" ${*:2} "
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} slower=${SLOWER:-1} failed=0 results=()
export OMP_NUM_THREADS=1
export PYTORCH_NVML_BASED_CUDA_CHECK=1 # is_available() must not initialise CUDA: ranks are forked

about='
import datetime, torch
gpu = torch.cuda.is_available()
print("cuda" if gpu else "cpu")
print("##", torch.cuda.get_device_name(0) if gpu else "no GPU: small models on the CPU, over gloo",
      "| torch", torch.__version__, "| CUDA", torch.version.cuda, "| NCCL",
      ".".join(map(str, torch.cuda.nccl.version())) if gpu else None, "|", datetime.date.today())
'
found=$("$python" -c "$about") || exit 1
device=${found%%$'\n'*}
echo "${found#*$'\n'}" >> "$out" || exit 1
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

part() { # name, seconds
  [[ -z ${chosen// } || $chosen == *" $1 "* ]] || return 0
  local limit=$(($2 * slower)) left=$((600 * slower - SECONDS)) start=$SECONDS code=124 result
  limit=$((limit < left ? limit : left))
  printf '\n### %s\n\n' "$1" >> "$out"
  if ((limit > 0)); then
    timeout --kill-after 5 "$limit" "$python" -m tools.bench.gpu_drill "$1" --device "$device" \
      >> "$out" 2> "$errors"
    code=$?
  fi
  case $code in
    0) result=passed ;;
    3) result='not run' ;; # the part prints what it needs
    124 | 137) result='out of time' failed=1 ;;
    *) result=failed failed=1 ;;
  esac
  if ((code != 0 && code != 3)); then
    printf '\n```\n%s\n```\n' "$(tail -n 15 "$errors")" >> "$out"
  fi
  results+=("| $1 | $result | $((SECONDS - start)) |")
  echo "$1: $result"
}

part parity 100 # if this fails, the results below mean nothing
part late 110
part train 80
part syncs 50
part speed 140
part profile 40
part fragmentation 40
part memcheck 60
if ((${#results[@]} == 0)); then
  echo "gpu_drill.sh: there is no part named${chosen}" >&2
  exit 2
fi
printf '\n| part | result | seconds |\n|---|---|---|\n' >> "$out"
printf '%s\n' "${results[@]}" >> "$out"
exit $failed
