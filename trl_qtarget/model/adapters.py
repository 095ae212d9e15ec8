"""The adapters of a PEFT model, and the transformers model under them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.utils import is_peft_model
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..compat import targets_module


def adapter_config(path: str, revision: str | None = None) -> Any:
    """The configuration of the adapter in a folder or Hub repository, or None if it holds no adapter."""
    if find_adapter_config_file(path, revision=revision) is None:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(path, revision=revision)


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model; any other model as it is."""
    return model.get_base_model() if is_peft_model(model) else model


EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embed_in",
    "word_embeddings",
)  # names of the embedding in transformers' architectures


def ties_head(model: Any) -> bool:
    """Whether embedding and head of a model share one matrix."""
    return bool(base_model(model).config.get_text_config().tie_word_embeddings)


def adapts_head(config: Any, names: Iterable[str] = ("lm_head",), tied: bool = False) -> bool:
    """Whether an adapter of this configuration changes the output head, which is called one of `names`.

    With tied embeddings (`tied`) PEFT's `ensure_weight_tying` puts the embedding's adapter on the head as well.
    """
    embedding = EMBEDDINGS if tied and getattr(config, "ensure_weight_tying", False) else ()
    names = (*names, *embedding)
    modules, parameters = (getattr(config, f"target_{kind}", None) or () for kind in ("modules", "parameters"))
    on_weight = any(f".{parameter}".endswith(f".{name}.weight") for parameter in parameters for name in names)
    return on_weight or any(modules and targets_module(config, name) for name in names)


def adapters_of(model: Any) -> list[Any]:
    """The configurations of a PEFT model's adapters; an empty list for a plain model, or for the name of a model."""
    if not (isinstance(model, Module) and is_peft_model(model)):
        return []
    configs: Any = model.peft_config
    return list(configs.values())


def has_virtual_tokens(model: Any) -> bool:
    """Whether an adapter puts virtual tokens before those of the data, as prompt tuning does."""
    return any(config.is_prompt_learning for config in adapters_of(model))


REWRITE_BASE = ("pissa", "olora", "corda", "loftq")  # values of init_lora_weights that change the base weights
NEW_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def base_is_initial(student: Any, peft_config: Any) -> bool:
    """Whether the base weights of a student equal the student before training; True for a plain model.

    They are not if the student arrives with a trained adapter, or if the adapter's initialisation rewrites the base
    weights, as PiSSA does.
    """
    if peft_config is not None:
        return not str(getattr(peft_config, "init_lora_weights", "")).lower().startswith(REWRITE_BASE)
    if not adapters_of(student):
        return True
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if not trained:  # loaded for inference: the trainer will refuse it
        return False
    is_lora = all(any(f".{part}" in name for part in NEW_LORA) for name in trained)
    return is_lora and not any(p.any() for name, p in trained.items() if "lora_B" in name or "embedding_B" in name)
