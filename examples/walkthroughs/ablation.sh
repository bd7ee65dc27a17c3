#!/usr/bin/env bash
# Which ingredients pay? Each ingredient has a switch; each run has a seed and a JSON result.
set -euo pipefail
examples=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:=$(mktemp -d)}" && cd "$1"

seeds=${SEEDS:-1 2}

run() { # run NAME FLAGS...: a quarter of the FLOPs; one JSON file for each seed
  local name=$1 seed
  shift
  [[ " ${METHODS:-$name} " == *" $name "* ]] || return 0 # METHODS="full paper" runs those two alone
  for seed in $seeds; do
    mhacut prune "$examples/digits/model" --flops 25% --data-dir "$examples/digits/images" --seed "$seed" \
      --effort fast --calibration-images 64 --no-latency --dry-run --json --quiet "$@" >"$name-$seed.json"
  done
}

run full
run no-repair --set repair=false
run channel-basis --set basis=channel
run uniform-widths --set allocation=uniform
run paper --set allocation=indicator --set selection=indicator --set basis=channel --set repair=false --set steps=20
run paper-no-similarity --set allocation=indicator --set selection=indicator --set basis=channel --set repair=false --set steps=20 --set similarity=false

ls ./*.json >/dev/null || { echo "METHODS=$METHODS: none of the methods above" >&2; exit 2; }
python - <<'PYTHON'
import json
from pathlib import Path
from statistics import mean

print(f"{'method':22}top-1 per seed    mean")
results = {}
for path in sorted(Path().glob("*.json")):
    method = path.stem.rpartition("-")[0]
    results.setdefault(method, []).append(json.loads(path.read_text())["slim"]["top1"])
for method, top1 in results.items():
    print(f"{method:22}" + " ".join(f"{value:6.2f}" for value in top1) + f"   {mean(top1):7.2f}")
PYTHON
echo "At scale, against Torch-Pruning and others at equal FLOPs: examples/benchmarks/"
