# /// script
# dependencies = [
#     "trl-qtarget[peft]",
#     "trackio",
#     "kernels",
# ]
# ///

"""
Supervised fine-tuning towards a target distribution. `trl-qtarget sft` runs this module under `accelerate launch`.

# Full training
```bash
trl-qtarget sft \
    --model_name_or_path Qwen/Qwen2.5-0.5B \
    --loss target_sft \
    --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name trl-lib/Capybara \
    --learning_rate 2.0e-5 \
    --num_train_epochs 1 \
    --packing \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --eos_token '<|im_end|>' \
    --output_dir Qwen2.5-0.5B-Target-SFT
```

# LoRA, with a loss whose reference is the base model
```bash
trl-qtarget sft \
    --model_name_or_path Qwen/Qwen2.5-0.5B \
    --loss asft \
    --dataset_name trl-lib/Capybara \
    --learning_rate 2.0e-4 \
    --num_train_epochs 1 \
    --packing \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --eos_token '<|im_end|>' \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16 \
    --output_dir Qwen2.5-0.5B-ASFT-LoRA
```
"""

import sys
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from trl import ScriptArguments

from ..data.loading import load_splits
from ..files import no_empty_folder, whole_model
from ..options import resuming
from ..options.launching import accelerate_configs, make_launcher
from ..options.parsing import StrictParser, fail, is_own_sentence, mistake_of
from ..options.preflight import mistakes, overwrites, unreachable


PROG = "trl-qtarget sft"


@dataclass
class ConversationArguments(ScriptArguments):
    """TRL's `ScriptArguments`, and how columns with any names become a conversation."""

    dataset_conversation: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Texts for the roles user, assistant and, optionally, system, with columns of the data in braces, "
            'e.g. \'{"user": "{problem}", "assistant": "{solution}"}\'.'
        },
    )

    def __post_init__(self):
        if self.dataset_conversation is None:
            return
        from ..data.conversations import check
        from ..training.config import as_mapping

        self.dataset_conversation = as_mapping("dataset_conversation", self.dataset_conversation)
        check(self.dataset_conversation)


@dataclass
class SFTScriptArguments(ConversationArguments):
    """`ConversationArguments`, and an option that `TrainingArguments` lacks since Transformers 5."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train even though `output_dir` holds a finished model, and replace it."}
    )


class Beginning(TrainerCallback):
    """The last moment before the first step: the settings of the run are written into its `output_dir`.

    Before that moment nothing is in the folder, so that a mistake which shows while training is prepared leaves it as
    it was.
    """

    def __init__(self, trainer, resumed: str | None, settings: dict[str, Any]):
        self.accelerator, self.folder = trainer.accelerator, Path(trainer.args.output_dir)
        self.resumed, self.settings = resumed, {**settings, **resuming.of_trainer(trainer)}
        self.line = resuming.compare(self.folder, resumed, self.settings)
        self.passed = False

    def on_train_begin(self, args, state, control, **kwargs):
        if self.line is not None:
            self.accelerator.print(self.line)
        self.accelerator.wait_for_everyone()  # every rank has looked at the folder
        if args.should_save:
            resuming.begin(self.folder, self.resumed, self.settings)
        self.passed = True


def start(*values) -> tuple[Any, Beginning]:
    """Make the trainer, and the callback that knows whether its first step has begun.

    Raises:
        ValueError: the data or a setting is wrong, or the run resumes from a checkpoint that was made with others.
    """
    settings = resuming.settings(*values)  # before the trainer works on the very objects
    trainer = make_trainer(*values)
    beginning = Beginning(trainer, resuming.checkpoint(values[1], overwrites(*values[:2])), settings)
    trainer.add_callback(beginning)
    return trainer, beginning


def make_trainer(script_args, training_args, model_args, dataset_args):
    """Load the data and make the trainer, as TRL's script does for `SFTTrainer`.

    Raises:
        ValueError: the data or a setting is wrong, or no row has anything to learn from.
    """
    from trl import get_peft_config, get_quantization_config

    from ..training.trainer import TargetSFTTrainer

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = load_splits(script_args, training_args, dataset_args)
    return TargetSFTTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def train(trainer, script_args, training_args) -> None:
    """Train, save the model, and push it to the Hub if asked to.

    Raises:
        Unsaved: the trained model cannot be saved.
    """
    trainer.train(resume_from_checkpoint=resuming.checkpoint(training_args, overwrites(script_args, training_args)))
    save(trainer, Path(training_args.output_dir))
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    if hasattr(trainer, "end"):  # since Transformers 5.18; ends the trackers and the process group
        trainer.end()


class Unsaved(RuntimeError):
    """The trained model could not be written; the folder holds no part of it that counts as a model."""


def save(trainer, folder: Path) -> None:
    """Save the model into `folder` so that the folder holds all of it or no model, whenever the process is killed.

    Raises:
        Unsaved: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError

    try:
        with whole_model(folder, writes=trainer.args.should_save) as unfinished:
            trainer.accelerator.wait_for_everyone()  # what a killed save has left is gone
            trainer.save_model(str(unfinished), _internal_call=True)  # otherwise it is pushed to the Hub from there
            trainer.accelerator.wait_for_everyone()  # the parts of all ranks are there
    except (OSError, SafetensorError) as error:
        raise Unsaved(f"the model is trained and cannot be saved in {folder}: {error}") from error
    trainer.accelerator.wait_for_everyone()


def make_parser(
    prog: str | None = None,
    more: tuple[type, ...] = (),
    config: type | None = None,
) -> StrictParser:
    """Make the parser of a training recipe.

    Args:
        more: dataclasses with further options.
        config: a subclass of `TargetSFTConfig` to use in its place.
    """
    from trl import DatasetMixtureConfig, ModelConfig, SFTConfig

    from ..training.config import TargetSFTConfig

    has_overwrite = "overwrite_output_dir" in TargetSFTConfig.__dataclass_fields__  # Transformers 4
    script = ConversationArguments if has_overwrite else SFTScriptArguments
    kinds = (script, config or TargetSFTConfig, ModelConfig, DatasetMixtureConfig, *more)
    parser = StrictParser(
        kinds,
        launcher=make_launcher(),
        prog=prog or PROG,
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        epilog="Options of `accelerate launch` (see its --help) can be given here and in the YAML file, as can "
        f"--accelerate_config with a file or one of {', '.join(accelerate_configs())}.",
    )
    for action in parser.actions:
        if action.dest == "loss_type":
            action.choices = None  # any value passes here: the configuration refuses it and names --loss
    parser.add_argument(
        "--print_config", action="store_true", help="Print each setting and where it comes from, and exit."
    )
    of_trl = {f.name for kind in (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig) for f in fields(kind)}
    parser.show_last("options of trl sft", of_trl)
    return parser


def run() -> None:
    """Run one process of the training; a mistake of the user is one line and exit code 2, a crash is a traceback."""
    # a warning about TRL's own default, which the user did not choose
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    parsed = make_parser().parse()
    script_args, training_args, model_args, _ = parsed.values
    found = mistakes(*parsed.values)
    if len(parsed.own) < len(sys.argv) - 1:
        found.append("options of `accelerate launch` belong before the script; `trl-qtarget sft` takes them anywhere")
    reads_teacher = training_args.teacher_cache is None and training_args.target().reads_model()
    found = found or unreachable(training_args, model_args, reads_teacher)
    if found:
        fail(PROG, *found)
    beginning = None
    try:
        with no_empty_folder(Path(training_args.output_dir)):
            trainer, beginning = start(*parsed.values)
            train(trainer, script_args, training_args)
    except Unsaved as failure:
        fail(PROG, failure, code=1)
    except Exception as error:
        began = beginning is not None and beginning.passed
        sentence = mistake_of(error) if not began else str(error) if is_own_sentence(error) else None
        if training_args.log_level == "debug" or sentence is None:
            raise
        fail(PROG, sentence, code=1 if began else 2)


if __name__ == "__main__":
    try:
        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
