"""Check the settings of `trl-qtarget sft` before any process is launched."""

from pathlib import Path

from ..cache import MANIFEST
from ..files import is_path


CONFIGS = ("config.json", "adapter_config.json")


def mistakes(script_args, training_args, model_args, dataset_args) -> list[str]:
    """Return one line for each mistake that would otherwise show minutes later, or would overwrite a model."""
    folder = Path(training_args.output_dir)
    found = [
        *no_models(training_args, model_args),
        *_no_checkpoint(checkpoint(training_args), folder),
        *no_data(script_args, dataset_args),
    ]
    overwrites = any(getattr(args, "overwrite_output_dir", False) for args in (script_args, training_args))
    if checkpoint(training_args) is None and not overwrites and _holds_model(folder):
        found.append(
            f"output_dir {folder} holds a finished model: give another --output_dir, go on from it with "
            "--resume_from_checkpoint true, or replace it with --overwrite_output_dir"
        )
    return found


def checkpoint(training_args) -> str | bool | None:
    """Return `resume_from_checkpoint` as `Trainer.train` takes it: `true`, `false` and `none` arrive as text."""
    value = training_args.resume_from_checkpoint
    return {"true": True, "false": None, "none": None}.get(str(value).lower(), value)


def no_data(script_args, dataset_args) -> list[str]:
    """Report settings that name no data set."""
    if dataset_args.datasets or script_args.dataset_name is not None:
        return []
    return ["no data: pass --dataset_name, or list `datasets` in the YAML file"]


def no_models(training_args, model_args) -> list[str]:
    """Report a student, a teacher or a teacher cache that is missing."""
    teacher, cache = training_args.teacher_model_name_or_path, training_args.teacher_cache
    found = [
        *no_model("model_name_or_path", model_args.model_name_or_path),
        *(no_model("teacher_model_name_or_path", teacher) if cache is None else no_cache(cache)),
    ]
    if model_args.model_name_or_path is None:
        found.append("no model: pass --model_name_or_path with a folder or a name of the Hub")
    average = training_args.teacher_ema_decay
    if "teacher" in training_args.target().needs and teacher is None and cache is None and average is None:
        found.append(
            f"loss {training_args.loss!r} needs a teacher: pass --teacher_model_name_or_path, or --teacher_cache"
        )
    return found


def no_model(option: str, name: str | None) -> list[str]:
    """Report a path that leads to no model; names that can be on the Hub are not checked."""
    folder = Path(name or "")
    if name is not None and is_path(name) and not folder.is_dir():
        return [f"{option}: there is no folder {name}"]
    if name is not None and folder.is_dir() and not any((folder / file).is_file() for file in CONFIGS):
        return [f"{option}: the folder {name} holds no model (no config.json)"]
    return []


def no_cache(name: str) -> list[str]:
    """Report a path that leads to no teacher cache; names that can be on the Hub are not checked."""
    folder = Path(name)
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        return [f"teacher_cache: the folder {name} holds no cache (no {MANIFEST}); make one with trl-qtarget cache"]
    if is_path(name) and not folder.is_dir():
        return [f"teacher_cache: there is no folder {name}; make the cache with trl-qtarget cache"]
    return []


def _holds_model(folder: Path) -> bool:
    """Whether the folder holds a finished model; checkpoints in folders below it do not count."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("*model*.bin")]
    return bool(weights) and any((folder / file).is_file() for file in CONFIGS)


def _no_checkpoint(resumed: str | bool | None, folder: Path) -> list[str]:
    """Report a run that is to be resumed and has no checkpoint."""
    if resumed is True and not any(folder.glob("checkpoint-*/trainer_state.json")):
        return [f"resume_from_checkpoint: output_dir {folder} holds no checkpoint; leave it out to start from scratch"]
    if isinstance(resumed, str) and not Path(resumed, "trainer_state.json").is_file():
        return [f"resume_from_checkpoint: {resumed} is no checkpoint (no trainer_state.json)"]
    return []
