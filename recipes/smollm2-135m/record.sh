#!/usr/bin/env bash
# Run all recipes of this folder one after the other and record their peak memory: writes runs/smollm2-135m/*.log
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/smollm2-135m
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

run() { # name, command...
    local name=$1
    shift
    echo "== $name: $*"
    /usr/bin/time --format "peak memory %M KiB, wall %e s" "$@" > "$out/$name.log" 2>&1 || { tail -n 20 "$out/$name.log"; exit 1; }
    tail -n 2 "$out/$name.log"
}

lora=(--use_peft --lora_target_modules all-linear --learning_rate 2e-4)
run sft trl sft --config recipes/smollm2-135m/sft.yaml
for loss in asft target_sft; do
    run "$loss" trl-qtarget sft --config "recipes/smollm2-135m/$loss.yaml"
    run "$loss-lora" trl-qtarget sft --config "recipes/smollm2-135m/$loss.yaml" "${lora[@]}" --output_dir "$out/$loss-lora"
done
run sft-lora trl sft --config recipes/smollm2-135m/sft.yaml "${lora[@]}" --output_dir "$out/sft-lora"
