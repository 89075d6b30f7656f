#!/usr/bin/env bash
# The whole story on a laptop, in the order it happens: the commands that you would type yourself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:-runs/quickstart}
CONFIGS=jobs/configs/quickstart
export OMP_WAIT_POLICY=PASSIVE # threads that wait should not take a core from those that work
export MLFLOW_TRACKING_URI="sqlite:///$PWD/runs/mlflow.db" MLFLOW_DISABLE_TELEMETRY=true HF_HUB_OFFLINE=1
rm -rf "$OUT" && mkdir -p "$OUT"

# One local Ray that every stage joins: free ports, a token, more logical CPUs than cores; ours alone is stopped at the end.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0 RAY_BACKEND_LOG_LEVEL=fatal
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
HOUSE=$(mktemp -d /tmp/rlfseg-XXXXXX)
ray start --head --block --port=0 --num-cpus=12 --include-dashboard=false --temp-dir="$HOUSE" >"$OUT/ray.log" 2>&1 &
RAY=$!
trap 'kill $RAY 2>/dev/null || true; wait $RAY 2>/dev/null || true; rm -rf "$HOUSE"' EXIT
for _ in $(seq 120); do [ -s "$HOUSE/ray_current_cluster" ] && break; sleep 0.5; done
export RAY_ADDRESS
RAY_ADDRESS=$(cat "$HOUSE/ray_current_cluster")

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
SECONDS=0

step "1. Draw scenes: polygon-like labels to train on, exact ones to compare, validate and test with"
rlfseg prepare --shapes.count 1000 --shapes.labels coarse --images_per_shard 250 --out "$OUT/train"
rlfseg prepare --shapes.count 1000 --shapes.labels exact --images_per_shard 250 --out "$OUT/train-exact"
rlfseg prepare --shapes.count 60 --shapes.split val --out "$OUT/val"
rlfseg prepare --shapes.count 120 --shapes.split test --out "$OUT/test"

step "2. Refine the labels with SAM (Eq. 3, Algorithm 1)"
rlfseg refine --config $CONFIGS/refine.yaml --samples "$OUT/train" --out "$OUT/refined"

step "3. Encode images and both labels, once"
rlfseg encode --config $CONFIGS/encode.yaml --samples "$OUT/refined" --out "$OUT/latents"

step "4. Train LoRA as a rectified flow, with dynamic selection (Eq. 2, 4)"
rlfseg train --config $CONFIGS/train.yaml --latents "$OUT/latents" --val_samples "$OUT/val" --out "$OUT/train-1"

step "5. Calibrate threshold and eps on the validation split"
rlfseg calibrate --adapter "$OUT/train-1/adapter" --samples "$OUT/val" --out "$OUT/calibration"

step "6. Evaluate on the test split: the base alone, one step, five steps, AOS, HSS; the labels themselves; the shipped adapter"
measure() { rlfseg evaluate --samples "$OUT/test" --out "$OUT/test-$1" --run.batch_size 16 "${@:2}"; }
measure base --adapter "$OUT/train-1/adapter" --base_only true
measure one-step --adapter "$OUT/train-1/adapter"
measure five-steps --adapter "$OUT/train-1/adapter" --sampling.steps 5
measure aos --adapter "$OUT/train-1/adapter" --sampling.rescale aos
measure hss --adapter "$OUT/train-1/adapter" --sampling.rescale hss
measure shipped --adapter tiny
rlfseg evaluate --samples "$OUT/train-exact" --predictions "$OUT/train" --out "$OUT/labels-coarse" --overlays 0
rlfseg evaluate --samples "$OUT/train-exact" --predictions "$OUT/refined" --out "$OUT/labels-refined"

step "7. Predict: phrases on pictures, with overlays"
rlfseg predict --images "$OUT/test" --adapter "$OUT/train-1/adapter" --overlays true --run.batch_size 16 --out "$OUT/masks"

python scripts/quickstart_table.py "$OUT" "$SECONDS"
