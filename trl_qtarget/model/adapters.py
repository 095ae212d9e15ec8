"""The adapters of a PEFT model, and the transformers model under them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.utils import is_peft_model
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file


def adapter_config(path: str, revision: str | None = None) -> Any:
    """The configuration of the adapter in a folder or Hub repository, or None if it holds no adapter."""
    if find_adapter_config_file(path, revision=revision) is None:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(path, revision=revision)


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model; any other model as it is."""
    return model.get_base_model() if is_peft_model(model) else model


def adapts_head(config: Any, names: Iterable[str] = ("lm_head",)) -> bool:
    """Whether an adapter of this configuration changes the output head, which is called one of `names`."""
    from peft.tuners.tuners_utils import check_target_module_exists

    modules, parameters = (getattr(config, f"target_{kind}", None) or () for kind in ("modules", "parameters"))
    on_weight = any(f".{parameter}".endswith(f".{name}.weight") for parameter in parameters for name in names)
    return on_weight or any(bool(modules and check_target_module_exists(config, name)) for name in names)


def adapters_of(model: Any) -> list[Any]:
    """The configurations of a PEFT model's adapters; an empty list for a plain model, or for the name of a model."""
    if not (isinstance(model, Module) and is_peft_model(model)):
        return []
    configs: Any = model.peft_config
    return list(configs.values())


def has_virtual_tokens(model: Any) -> bool:
    """Whether an adapter puts virtual tokens before those of the data, as prompt tuning does."""
    return any(config.is_prompt_learning for config in adapters_of(model))
