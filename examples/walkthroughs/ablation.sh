#!/usr/bin/env bash
# Which ingredients pay? Every one has a switch, every run a seed and a JSON result.
set -euo pipefail
examples=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:=$(mktemp -d)}" && cd "$1"

run() { # run NAME FLAGS...: a quarter of the FLOPs, two seeds; one JSON file each
  local name=$1 seed
  shift
  for seed in 1 2; do
    mhacut prune "$examples/digits/model" --flops 25% --data-dir "$examples/digits/images" --seed "$seed" \
      --calibration-images 64 --no-latency --dry-run --json --quiet "$@" >"$name-$seed.json"
  done
}

run full
run no-repair --no-repair
run channel-basis --basis channel
run uniform-widths --allocation uniform
run paper --allocation indicator --selection indicator --basis channel --no-repair --steps 20
run paper-no-similarity --allocation indicator --selection indicator --basis channel --no-repair --steps 20 --no-similarity

python - <<'PYTHON'
import json
from pathlib import Path
from statistics import mean

print(f"{'method':22}top-1 per seed    mean")
for first in sorted(Path().glob("*-1.json")):
    name = first.stem.removesuffix("-1")
    top1 = [json.loads(Path(f"{name}-{seed}.json").read_text())["slim"]["top1"] for seed in (1, 2)]
    print(f"{name:22}{top1[0]:6.2f} {top1[1]:6.2f}   {mean(top1):7.2f}")
PYTHON
echo "At scale, against Torch-Pruning and others at equal FLOPs: examples/benchmarks/"
