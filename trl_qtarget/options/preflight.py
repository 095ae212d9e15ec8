"""Check the settings of `trl-qtarget sft` before any process is launched, and what they name before it is loaded."""

import difflib
import importlib.util
from pathlib import Path
from typing import Any

from ..cache import MANIFEST
from ..files import CONFIGS, cut_weights, is_path
from ..loss.backends import tiles_for
from . import resuming


LEAST = {
    "learning_rate": 0, "max_length": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "dataloader_num_workers": 0,
}  # fmt: skip
TRACKERS = {  # values of report_to, and the module that each imports
    "azure_ml": "azureml", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "mlflow": "mlflow", "neptune": "neptune",
    "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip


def mistakes(script_args, training_args, model_args, dataset_args) -> list[str]:
    """Return one line for each mistake that would otherwise show minutes later, or would overwrite a model."""
    now = resuming.settings(script_args, training_args, model_args, dataset_args)
    return [
        *no_models(training_args, model_args),
        *no_tokenizer(model_args.model_name_or_path),
        *no_data(script_args, dataset_args),
        *resuming.mistakes(training_args, now, overwrites(script_args, training_args)),
        *out_of_range(training_args),
        *no_template(training_args.chat_template_path),
        *no_tracker(training_args.report_to),
        *no_backend(training_args),
        *(no_package("use_peft", "peft") if model_args.use_peft else []),
    ]


def overwrites(script_args, training_args) -> bool:
    """Whether the run was told to replace what is in `output_dir`; transformers 4 has that option itself."""
    return any(getattr(args, "overwrite_output_dir", False) for args in (script_args, training_args))


def out_of_range(training_args) -> list[str]:
    """Report numbers that transformers accepts, although training would cut other tokens, train nothing, or crash."""
    found = [
        f"{name} must be at least {least}, got {value}"
        for name, least in LEAST.items()
        if (value := getattr(training_args, name)) is not None and value < least
    ]
    if training_args.max_steps == 0:
        found.append("max_steps must be at least 1, or -1 to train for num_train_epochs, got 0")
    if training_args.max_steps < 0 and training_args.num_train_epochs <= 0:
        found.append(f"num_train_epochs must be above 0, got {training_args.num_train_epochs}")
    return found


def no_template(name: str | None) -> list[str]:
    """Report a chat template that is given as a file that does not exist."""
    path = Path(name or "")
    if name is None or path.exists() or not (is_path(name) or path.suffix in (".jinja", ".j2")):
        return []
    return [f"chat_template_path: there is no file or folder {name}{_nearest(name)}"]


def no_tracker(report_to: list[str]) -> list[str]:
    """Report loggers of metrics whose package is not installed."""
    missing = [name for name in report_to if name in TRACKERS and not _is_installed(TRACKERS[name])]
    return [
        f"report_to: the package {TRACKERS[name]} is not installed: install it, or log nowhere with --report_to none"
        for name in missing
        if name != "tensorboard" or not _is_installed("tensorboardX")
    ]


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def no_backend(training_args) -> list[str]:
    """Report kernels that this machine cannot run; "auto" and "torch" run everywhere."""
    if training_args.qtarget_backend == "auto":
        return []
    try:
        tiles_for(training_args.qtarget_backend, training_args.device)
    except ValueError as mistake:
        return [f"qtarget_backend: {mistake}"]
    return []


def no_package(option: str, package: str) -> list[str]:
    """Report an option whose package is not installed."""
    return (
        [] if _is_installed(package) else [f"{option}: the package {package} is not installed: pip install {package}"]
    )


def no_data(script_args, dataset_args) -> list[str]:
    """Report settings that name no data set."""
    name = script_args.dataset_name
    if dataset_args.datasets or name is not None:
        missing = not dataset_args.datasets and is_path(name) and not Path(name).exists()
        return [f"dataset_name: there is no file or folder {name}{_nearest(name)}"] if missing else []
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
        return [f"{option}: there is no folder {name}{_nearest(name)}"]
    if name is not None and folder.is_dir() and not any((folder / file).is_file() for file in CONFIGS):
        return [f"{option}: the folder {name} holds no model (no config.json)"]
    cut = cut_weights(folder) if name is not None and folder.is_dir() else None
    return [] if cut is None else [f"{option}: {cut}"]


def no_tokenizer(name: str | None) -> list[str]:
    """Report a student's folder without a tokenizer; transformers 5 would make one that knows no text."""
    folder = Path(name or "")
    patterns = ("*token*", "*vocab*", "*.model", "*.txt", "tekken*")
    if name is None or not (folder / CONFIGS[0]).is_file() or any(any(folder.glob(pattern)) for pattern in patterns):
        return []
    return [f"model_name_or_path: the folder {name} holds no tokenizer: save the tokenizer into the same folder"]


def _nearest(name: str) -> str:
    """Return ` (did you mean 'x'?)` for the most similar file or folder beside a path, or an empty text."""
    folder = Path(name).parent
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    guess = difflib.get_close_matches(Path(name).name, names, n=1, cutoff=0.8)
    return f" (did you mean {str(folder / guess[0])!r}?)" if guess else ""


def unreachable(training_args, model_args, reads_teacher: bool) -> list[str]:
    """Report a student or teacher that is neither on this machine nor on the Hub; asks the Hub for one small file."""
    student, revision = model_args.model_name_or_path, model_args.model_revision
    found = no_hub_model("model_name_or_path", student, revision, training_args.model_init_kwargs)
    if reads_teacher:
        teacher, revision = training_args.teacher_model_name_or_path, training_args.teacher_model_revision
        found += no_hub_model("teacher_model_name_or_path", teacher, revision, training_args.teacher_model_init_kwargs)
    template = training_args.chat_template_path
    if template is not None and not Path(template).exists():
        found += no_hub_model("chat_template_path", template, None, None, files=("tokenizer_config.json",))
    return found


def no_hub_model(
    option: str, name: str | None, revision: str | None, init_kwargs: dict[str, Any] | None, files=CONFIGS
) -> list[str]:
    """Report a name that is no folder and leads to none of the files on the Hub or in its local cache."""
    if name is None or Path(name).is_dir() or {"subfolder", "gguf_file"} & {*(init_kwargs or {})}:
        return []
    from huggingface_hub import errors, hf_hub_download

    where = {key: value for key, value in (init_kwargs or {}).items() if key in ("cache_dir", "token", "revision")}
    where.setdefault("revision", revision)
    absent = f"there is no folder {name} here{_nearest(name)}, and no model of that name"
    problem = ""
    for file in files:
        try:
            hf_hub_download(name, file, **where)
            return []
        except errors.GatedRepoError:
            problem = f"{name} is gated: ask for access on its page of the Hub, and log in with `hf auth login`"
        except errors.RevisionNotFoundError:
            problem = f"{name} has no revision {where['revision']!r}"
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            problem = f"{absent} on the Hub; if it is private, log in with `hf auth login`"
        except errors.LocalEntryNotFoundError:
            problem = f"{absent} in the local cache of the Hub, and the Hub cannot be reached"
        except errors.EntryNotFoundError:
            problem = problem or f"the model {name} of the Hub has no {file}"
        except OSError as error:
            problem = f"{absent} could be fetched from the Hub: {error}"
    return [f"{option}: {problem}"]


def no_cache(name: str) -> list[str]:
    """Report a path that leads to no teacher cache; names that can be on the Hub are not checked."""
    folder = Path(name)
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        return [f"teacher_cache: the folder {name} holds no cache (no {MANIFEST}); make one with trl-qtarget cache"]
    if is_path(name) and not folder.is_dir():
        return [f"teacher_cache: there is no folder {name}; make the cache with trl-qtarget cache"]
    return []
