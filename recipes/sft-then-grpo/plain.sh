#!/bin/sh
# SFT and GRPO without a chain: trl-qtarget sft, then TRL's own grpo on its output folder. A few minutes on a CPU.
#   sh recipes/sft-then-grpo/plain.sh [FOLDER]       from the root of the repository; $STEPS of each stage
set -eu
out=${1:-runs/sft-then-grpo-plain}
steps=${STEPS:-60}
cpu="--use_cpu true --bf16 false --dtype float32 --report_to none --save_strategy no --logging_steps 10"

python recipes/quickstart/task.py --output_dir "$out/data"

trl-qtarget sft --config recipes/quickstart/target_sft.yaml --dataset_name "$out/data" --output_dir "$out/sft" \
    --max_steps "$steps" --logging_steps 10

# trl_qtarget is not used from here on. 4 problems per step, 8 samples each; reward 1 for a right answer that ends
trl grpo --model_name_or_path "$out/sft" --dataset_name "$out/data" --output_dir "$out/grpo" $cpu \
    --reward_funcs recipes.quickstart.task.reward --num_generations 8 --per_device_train_batch_size 32 \
    --max_completion_length 16 --learning_rate 2.0e-4 --max_steps "$steps"
