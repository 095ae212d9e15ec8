"""Loading of frozen models: teachers from a Hub id or folder, and copies of the untrained student."""

from __future__ import annotations

import copy
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from ..compat import create_model
from ..model.adapters import adapter_config, adapts_head, base_model, ties_head
from ..model.merging import merge_adapter


def load(path: str, args: Any, **kwargs: Any) -> PreTrainedModel:
    """Load a model from a Hub id or folder, in the precision of the run unless `kwargs` have a dtype.

    An adapter is merged into its base model. A model with virtual tokens stays a `PeftModel`.

    Raises:
        ValueError: an adapter that cannot be merged.
    """
    adapter = adapter_config(path, kwargs.get("revision"))
    if adapter is not None:
        from peft import PeftModel

        base = load(adapter.base_model_name_or_path, args, **{**kwargs, "revision": adapter.revision or "main"})
        model: Any = PeftModel.from_pretrained(base, path, revision=kwargs.get("revision"))
        # virtual tokens cannot be merged: the model is read through PEFT
        return model if adapter.is_prompt_learning else merge_adapter(model)[0]
    if "dtype" not in kwargs and (args.bf16 or args.fp16):
        kwargs["dtype"] = "bfloat16" if args.bf16 else "float16"
    if args.distributed_state.distributed_type != "NO" or args.teacher_offload:
        kwargs["device_map"] = None  # each rank loads a copy or its shard; offloaded weights stay on the host
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model(path, **kwargs)


def revision_of(args: Any) -> dict[str, str]:
    """The teacher's revision as a keyword argument; none if no revision is given."""
    return {} if args.teacher_model_revision is None else {"revision": args.teacher_model_revision}


def load_teacher(path: str, args: Any) -> PreTrainedModel:
    """Load the teacher of a run as a separate model."""
    return load(path, args, **(args.teacher_model_init_kwargs or {}), **revision_of(args))


def shares_base(student: Any, path: str, args: Any) -> bool:
    """Whether a folder or Hub id holds an adapter for the base weights of a PEFT student, of the same adapter type."""
    adapter = adapter_config(path, args.teacher_model_revision) if is_peft_model(student) else None
    if adapter is None:
        return False
    own = student.peft_config[student.active_adapter]
    same_kind = own.peft_type == adapter.peft_type and (own.revision or "main") == (adapter.revision or "main")
    name = adapter.base_model_name_or_path
    same_base = bool(name) and name == base_model(student).config.name_or_path
    # an adapter of the head, or of an embedding that is the head too, would be left out of the logits
    return same_base and same_kind and not adapts_head(adapter, tied=ties_head(student))


def copy_of_initial(model: Any, args: Any, peft_config: Any) -> Any:
    """A copy of the untrained student; None if adapters are trained, as the base weights are the untrained model."""
    if peft_config is not None or (not isinstance(model, str) and is_peft_model(model)):
        return None
    if isinstance(model, str):
        return load(model, args, **{"dtype": "float32", **(args.model_init_kwargs or {})})
    return copy.deepcopy(model)
