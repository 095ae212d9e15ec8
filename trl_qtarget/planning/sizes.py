"""From a recipe to the `Run` whose memory is computed: models are made on the meta device, which takes no memory."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import is_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import get_peft_config

from ..cache.shards import read_manifest
from ..model.adapters import adapter_config, base_model
from ..teachers.loading import shares_base
from ..theory.target import Target
from .advice import CACHED_IDS
from .run import Engine, Run, Size, Teacher


QUANTIZED = {"load_in_4bit": 0.5 + 4 / 64, "load_in_8bit": 1.0}  # bytes of a weight, with a scale for every 64


def run_of(script_args, training_args, model_args, dataset_args, plan_args, engine: Engine) -> Run:
    """Return the facts of a recipe that decide its memory.

    Raises:
        ValueError: a model's configuration cannot be read.
    """
    args, half = training_args, bool(training_args.bf16 or training_args.fp16)
    if model_args.use_peft:
        model = with_adapters(model_args, args)
    else:
        model = on_meta(model_args.model_name_or_path, model_args.model_revision, args)
    itemsize = _itemsize((args.model_init_kwargs or {}).get("dtype", model_args.dtype), base_model(model))
    student = size_of(model, itemsize, _quantized(model_args))
    packed = args.padding_free or (args.packing and args.packing_strategy != "wrapped")
    target = args.target()
    return Run(
        student=student,
        rows=args.per_device_train_batch_size,
        row_tokens=plan_args.row_tokens or args.max_length,
        engine=engine,
        accumulation=args.gradient_accumulation_steps,
        half=half,
        checkpointing=bool(args.gradient_checkpointing),
        state=optimizer_state(args.optim),
        teacher=_teacher(args, target, student, model, itemsize, half),
        cached_ids=_cached_ids(args) if target.reads_logits() else 0,
        chunk_size=args.qtarget_chunk_size,
        device="cpu" if args.use_cpu else "cuda",
        cacheable=target.residual.teacher == 0 or target.residual.sums_to_one,
        splits_rows=not packed,
    )


def adapted(run: Run, script_args, training_args, model_args, *_: Any) -> Run:
    """Add to `run` the size of the student with LoRA adapters, so that `advise` can recommend them.

    The run is returned unchanged if it trains adapters already, or if PEFT does not know where to put them.
    """
    if model_args.use_peft:
        return run
    try:
        model = with_adapters(model_args, training_args)
    except ValueError:  # an architecture for which the recipe must name lora_target_modules
        return run
    return replace(run, with_lora=size_of(model, run.student.itemsize, _quantized(model_args)))


def on_meta(name: str, revision: str | None, args: Any) -> PreTrainedModel:
    """Make a model on the meta device, of the architecture that its configuration names.

    Raises:
        ValueError: the configuration cannot be read, or is not that of a causal language model.
    """
    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or "main", **trust)
    except Exception as error:  # a configuration checks itself, and may raise anything
        raise ValueError(
            f"the configuration of {name!r} cannot be read ({_first_line(error)}): check the name, or download it "
            "first."
        ) from None
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **trust) if architecture is None else architecture(config)
    except Exception as error:  # a model's own code runs, and may raise anything
        raise ValueError(
            f"no model can be made from the configuration of {name!r} ({type(error).__name__}: {_first_line(error)})."
        ) from None
    if model.get_output_embeddings() is None or not model.can_generate():
        raise ValueError(f"{name!r} is a {type(model).__name__}, which is no causal language model: give one.")
    return model


def with_adapters(model_args: Any, args: Any) -> Any:
    """Make the student on the meta device with the recipe's adapters, as if the recipe set `use_peft`.

    Raises:
        ValueError: PEFT is not installed, or cannot put these adapters on the student.
    """
    if find_spec("peft") is None:
        raise ValueError("use_peft: the package peft is not installed: pip install peft.")
    from peft import get_peft_model

    model = on_meta(model_args.model_name_or_path, model_args.model_revision, args)
    config: Any = get_peft_config(replace(model_args, use_peft=True))
    try:
        with torch.device("meta"):
            return get_peft_model(model, config)
    except ValueError as error:
        kind = type(model).__name__
        if not model_args.lora_target_modules and not model_args.lora_target_parameters:
            raise ValueError(
                f"PEFT does not know where to put adapters in {kind}: pass --lora_target_modules all-linear, or the "
                "names of its layers."
            ) from None
        raise ValueError(
            f"PEFT cannot put these adapters on {kind} ({_first_line(error)}): change --lora_target_modules or what "
            "the reason names."
        ) from None


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, and the second one after a colon."""
    first, _, rest = str(error).strip().partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}".rstrip(".") if first.endswith(":") else first.rstrip(".")


def size_of(model: Any, itemsize: int, quantized: float | None = None) -> Size:
    """Count the parameters of a model that is loaded in `itemsize` bytes a weight.

    Adapters are in float32, as PEFT makes them, but over a quantized model in half precision.

    Args:
        quantized: bytes of a weight of the frozen matrices, if they are quantized.

    Raises:
        ValueError: no formula covers the model's layers.
    """
    base, adapters = base_model(model), model is not base_model(model)
    text = base.config.get_text_config()
    if not all(getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")):
        raise ValueError(
            f"the plan has no formula for the layers of {type(base).__name__}, whose configuration has no attention "
            "heads: measure a step of a short run instead."
        )
    ends: Any = base.get_output_embeddings(), base.get_input_embeddings()
    head, embedding = (end.weight for end in ends)
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    matrices = [p for p in parameters if p.ndim > 1 and p is not head and p is not embedding]
    frozen_bytes = frozen * itemsize
    if quantized is not None:
        frozen_bytes += int(sum(p.numel() for p in matrices if not p.requires_grad) * (quantized - itemsize))
    return Size(
        frozen=frozen,
        trained=trained,
        linear=sum(p.numel() for p in matrices),
        rows=head.shape[0],
        width=head.shape[1],
        layers=text.num_hidden_layers,
        inner=_inner(text),
        frozen_bytes=frozen_bytes,
        itemsize=(2 if quantized else 4) if adapters else itemsize,
        tied=head is embedding,
        head_trained=head.requires_grad,
    )


def _inner(text: Any) -> int:
    """Count the numbers that a layer keeps of a token.

    These are the inputs of attention and MLP, q, k, v and the attended values, and four numbers for each unit of the
    MLP. In a mixture of experts only the experts that a token visits count.
    """
    D, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or D // heads
    kv = getattr(text, "num_key_value_heads", None) or heads
    mlp = getattr(text, "intermediate_size", None) or 4 * D
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        mlp = experts * (getattr(text, "moe_intermediate_size", None) or mlp)
    return 2 * D + 2 * head_dim * (heads + kv) + 4 * mlp


def _quantized(model_args: Any) -> float | None:
    """Return the bytes of a quantized weight, or None if the recipe does not quantize."""
    return next((size for option, size in QUANTIZED.items() if getattr(model_args, option)), None)


def _itemsize(dtype: Any, model: PreTrainedModel) -> int:
    """Return the bytes of a number of `dtype`, as recipes spell it; "auto" is the type that the model was saved in."""
    dtype = model.config.dtype if dtype == "auto" else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return (dtype or torch.float32).itemsize


def optimizer_state(name: Any) -> tuple[float, int | None]:
    """Return how many numbers an optimizer keeps a parameter, and their bytes (None: those of the parameter).

    An optimizer that is not known is counted as AdamW.
    """
    name = getattr(name, "value", str(name))
    itemsize = 1 if "8bit" in name else None
    if name in ("sgd", "adafactor"):
        return 0, itemsize
    if any(kind in name for kind in ("lion", "rmsprop", "adagrad")):
        return 1, itemsize
    return 3 if "ademamix" in name else 2, itemsize


def _teacher(args: Any, target: Target, student: Size, model: Any, itemsize: int, half: bool) -> Teacher | None:
    """Return the second model that the loss reads in the process, or None."""
    options: dict[str, Any] = {"dense": target.reads_logits(), "rows": args.teacher_batch_size}
    compute = 2 if half else itemsize
    if "snapshot" in target.needs:
        return Teacher(student, student.trained * student.itemsize, compute, stands_apart=False, **options)
    if not target.reads_model() or args.teacher_cache is not None:
        return None
    if args.teacher_ema_decay is not None:
        return Teacher(student, student.trained * 4, compute, stands_apart=False, **options)
    options["offloaded"] = args.teacher_offload
    name, revision = args.teacher_model_name_or_path, args.teacher_model_revision
    if name is None and is_peft_model(model):
        return Teacher(student, 0, compute, stands_apart=False, **options)
    if name is None:
        return Teacher(student, student.parameters * itemsize, itemsize, is_reference=True, **options)
    adapter = _adapter(name, revision)
    if adapter is not None and shares_base(model, name, args):
        before = sum(p.numel() for p in model.parameters())
        with torch.device("meta"):
            model.add_adapter("teacher", adapter)
        added = sum(p.numel() for p in model.parameters()) - before
        return Teacher(student, added * 4, compute, stands_apart=False, **options)
    if adapter is not None:
        name, revision = adapter.base_model_name_or_path, adapter.revision
    other = on_meta(name, revision, args)
    given = (args.teacher_model_init_kwargs or {}).get("dtype", "bfloat16" if half else "float32")
    size = size_of(other, _itemsize(given, other))
    return Teacher(size, size.parameters * size.itemsize, size.itemsize, **options)


def _adapter(name: str, revision: str | None) -> Any:
    try:
        return adapter_config(name, revision)
    except ImportError:
        raise ValueError(
            f"teacher_model_name_or_path: {name} is an adapter, and the package peft is not installed: pip install "
            "peft."
        ) from None


def _cached_ids(args: Any) -> int:
    """Return K of the recipe's cache, or the default K of a cache that is not on this machine; 0 without a cache."""
    if args.teacher_cache is None:
        return 0
    folder = Path(args.teacher_cache)
    return read_manifest(folder)["settings"]["k"] if folder.is_dir() else CACHED_IDS
