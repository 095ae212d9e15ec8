"""Merging an adapter into its base model, checked by the logits before and after.

With tied embeddings one matrix is both embedding and head. An adapter that changes one of the two would, once merged,
change the other as well, so the two are untied first: the merged model gets a matrix for each.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel


TOLERANCE = {
    "float32": 1e-4,
    "float16": 1e-2,
    "bfloat16": 6e-2,
}  # share of the largest logit: a few roundings of the type
PROBE = (4, 32)  # sequences of the probe batch, and their tokens


def merge_adapter(model: Any) -> tuple[PreTrainedModel, float]:
    """Merge the active adapter of a `PeftModel`; return the model and the largest difference of logits.

    The difference is a share of the largest logit, on random tokens.

    Raises:
        ValueError: the merged model computes other logits than base and adapter.
    """
    ids = _probe(model.get_base_model())
    wanted = _logits(model, ids)
    _untie(model.get_base_model())
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Model (has|with) `tie_word_embeddings=True`", UserWarning
        )  # `_untie` has untied them
        merged = model.merge_and_unload(safe_merge=True)
    return merged, _difference(_logits(merged, ids), wanted, merged.dtype, "The merged model's")


def compare_logits(model: Any, expected: Any, which: str) -> float:
    """The largest difference of two models' logits on random tokens, as a share of the largest logit.

    Raises:
        ValueError: the difference is larger than rounding explains; the message begins with `which`.
    """
    ids = _probe(expected)
    return _difference(_logits(model, ids), _logits(expected, ids), expected.dtype, which)


def _difference(got: Tensor, wanted: Tensor, dtype: torch.dtype, which: str) -> float:
    difference = float((got - wanted).abs().max() / wanted.abs().max())
    allowed = TOLERANCE[str(dtype).removeprefix("torch.")]
    if not difference <= allowed:
        remedy = " Try --dtype float32." if dtype != torch.float32 else " This adapter cannot be merged."
        raise ValueError(
            f"{which} logits differ from those of base and adapter by {difference:.1e} of the largest, more than the "
            f"{allowed:.0e} of rounding in {dtype}: nothing was written.{remedy}"
        )
    return difference


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.float()


def _probe(base: PreTrainedModel) -> Tensor:
    embeddings: Any = plain(base.get_input_embeddings())
    ids = torch.randint(len(embeddings.weight), PROBE, generator=torch.Generator().manual_seed(0))
    return ids.to(embeddings.weight.device)


def _untie(base: PreTrainedModel) -> None:
    """Give the head its own copy of a shared matrix, if an adapter changes the embedding or the head."""
    ends: Any = base.get_input_embeddings(), base.get_output_embeddings()
    embedding, head = (plain(end) for end in ends)
    if head is None or head.weight is not embedding.weight or (head is ends[1] and embedding is ends[0]):
        return
    head.weight = Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def plain(module: Any) -> Any:
    """The embedding or linear layer inside the wrappers of PEFT; a layer without wrappers as it is."""
    while module is not None and (inner := _inner(module)) is not None:
        module = inner
    return module


def _inner(module: Any) -> Any:
    return next((getattr(module, name) for name in ("base_layer", "original_module") if hasattr(module, name)), None)
