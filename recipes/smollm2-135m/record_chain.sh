#!/usr/bin/env bash
# Run chain.yaml one stage and its merge at a time, to record the peak memory of each: writes runs/smollm2-135m/chain.log
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

for stage in teacher sft-merge dpo-merge grpo-merge; do
    /usr/bin/time --format "up to $stage: peak memory %M KiB, wall %e s, processor %U s" \
        trl-qtarget chain --config recipes/smollm2-135m/chain.yaml --to "$stage"
done 2>&1 | tee runs/smollm2-135m/chain.log
