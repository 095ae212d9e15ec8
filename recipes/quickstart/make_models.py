"""Make the quickstart's two pretrained models with the package's own trainer, under two minutes on one thread.

    OMP_NUM_THREADS=1 python recipes/quickstart/make_models.py --output_dir recipes/quickstart

The student writes mostly its own style, hardly saw multiplications, and a tenth of the steps it learned from is wrong;
the teacher saw clean solutions, mostly in the style of the demonstrations. Both stop early on a longer schedule: a
weak student and a good, imperfect teacher are what the comparison needs. Not every seed learns to add.
"""

import argparse
import hashlib
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from task import ALPHABET, EOS, PAD, STEPS, Row, draw_problem, draw_slip, running_results, write_solution
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer


BATCH = 64
PLAIN = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}


def student_row(rng: random.Random) -> Row:
    """70% own style, 15% the answer alone, 10% junk, 5% demonstrations; every step wrong one time in ten."""
    kind, problem = rng.random(), draw_problem(rng, times=0.01)
    if kind < 0.10:
        return {"prompt": problem, "completion": "".join(rng.choices(ALPHABET[2:], k=rng.randint(1, 12)))}
    slips = {step: draw_slip(rng) for step in range(STEPS) if rng.random() < 0.1}
    results = running_results(problem, slips)
    if kind < 0.25:
        return {"prompt": problem, "completion": f"#{results[-1]}"}
    return {"prompt": problem, "completion": write_solution(problem, results, results[-1], kind < 0.30)}


def teacher_row(rng: random.Random) -> Row:
    """Always right; 80% in the style of the demonstrations; as many multiplications as the task has."""
    problem = draw_problem(rng)
    results = running_results(problem)
    return {"prompt": problem, "completion": write_solution(problem, results, results[-1], rng.random() < 0.8)}


@dataclass(frozen=True)
class Recipe:
    """A model's shape, its pretraining rows and the step of its schedule at which it stops."""

    row: Callable[[random.Random], Row]
    shape: dict[str, float]
    learning_rate: float
    stop: int
    schedule: int
    seed: int


SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 192, "num_attention_heads": 2}
LARGE = {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256, "num_attention_heads": 3}
RECIPES = {  # the initializer's usual range, 0.02, is for wide models: these would learn to add twice as late
    "student": Recipe(student_row, SMALL | {"initializer_range": 0.1}, 2e-3, stop=700, schedule=1500, seed=1),
    "teacher": Recipe(teacher_row, LARGE | {"initializer_range": 0.06}, 3e-3, stop=250, schedule=1000, seed=0),
}


class StopAt(TrainerCallback):
    """Ends training early, so that the learning rate follows the longer schedule."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def make_model(shape: dict[str, float], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh LLaMA-shaped model with tied embeddings."""
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **ids, **sizes, **shape))


def settings(recipe: Recipe, scratch: str) -> TargetSFTConfig:
    """The trainer's settings: one thread of the CPU, nothing written."""
    return TargetSFTConfig(
        loss="nll",
        output_dir=scratch,
        max_steps=recipe.schedule,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",  # rows are drawn independently, so a later stop only adds some
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=100,
        adam_beta2=0.98,
        weight_decay=0.01,
        seed=recipe.seed,
        logging_steps=50,
        **PLAIN,
    )


def pretrain(recipe: Recipe) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train one model from scratch; the loss covers the solution only."""
    set_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = make_tokenizer()
    model = make_model(recipe.shape, tokenizer)
    data = Dataset.from_list([recipe.row(rng) for _ in range(recipe.stop * BATCH)])
    with tempfile.TemporaryDirectory() as scratch:
        args, stop = settings(recipe, scratch), StopAt(recipe.stop)
        TargetSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[stop]).train()
    return model, tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[str]:
    """Half-precision safetensors, and a tokenizer under the name that Transformers 4 and 5 both know; their sha256."""
    model.config.use_cache = True  # the trainer turned it off
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    files = sorted(folder.iterdir())
    return [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {folder.name}/{file.name}\n" for file in files]


def main() -> None:
    """Make both models and their checksums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="gets student/, teacher/ and checksums.txt")
    args = parser.parse_args()
    lines = [line for name, recipe in RECIPES.items() for line in save(*pretrain(recipe), args.output_dir / name)]
    (args.output_dir / "checksums.txt").write_text("".join(lines))  # for sha256sum -c


if __name__ == "__main__":
    main()
