"""The seam with the model: a forward that stops at the last hidden states and hands them on with the head.

`model(**inputs, qtarget=reader)` runs the backbone and returns `reader(hidden, labels, head, aux_loss)`; without the
keyword the forward is the model's own, so generation and saving see nothing of it. This module holds the only
assignment to `model.forward` in the package. The forward is called through whatever wraps the model (DDP, FSDP,
DeepSpeed, autocast), and backbone and head are looked up in each call, because PEFT and FSDP replace them.

    DDP, FSDP1   the wrapper's forward is entered as ever; gradients of the head flow through its parameter
    FSDP2        a head that is still sharded is a DTensor: gathered once, before the loss, and its gradient reduced
    ZeRO-3       heads are gathered around the loss (`gathered`)
    LoRA         a frozen head gets no product and no buffer
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .compat import backbone, balancing_loss
from .kernels.products import Head
from .loss import LabelCount, QTargetOutput, qtarget_loss
from .reference import IGNORE, dense_tokens
from .target import Target
from .teachers.base import ProjectedLogits, TeacherLogits, TopKLogits


Reader = Callable[[Tensor, Tensor, Head, Tensor | None], Any]

SELF_CHECK_TOKENS = 64
SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")  # as configurations call it


def install(model: PreTrainedModel) -> None:
    """Give `model` the forward described above. Call it on the base model of a PEFT model, before any wrapping."""
    own_forward = model.forward
    backbone(model)  # refused here rather than in the first step

    # the original's signature, since transformers reads it to decide what a model may be given
    @functools.wraps(type(model).forward)
    def forward(self, *args, qtarget: Reader | None = None, **kwargs):
        if qtarget is None:
            return own_forward(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        kwargs.pop("num_items_in_batch", None)
        outputs = backbone(self)(*args, **kwargs)
        head = read_head(self)
        hidden = outputs.last_hidden_state.to(head.weight.device)  # apart only where device_map splits the model
        if shifted is None and labels is not None:
            shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        shifted = None if shifted is None else shifted.to(hidden.device)
        return _read(qtarget, hidden, shifted, head, _aux_loss(self, outputs, kwargs))

    model.forward = types.MethodType(forward, model)


@torch.compiler.disable()  # rows, tiles and kernels are chosen by the data, which a compiled model need not follow
def _read(reader: Reader, *given: Any) -> Any:
    return reader(*given)


def read_head(model: PreTrainedModel) -> Head:
    """The model's output head, with the scale and the softcap its configuration puts on logits."""
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    # PEFT's wrapper around a tied head of which single rows are trained has a weight of its own and no bias
    bias = head.bias if hasattr(head, "bias") else head.original_module.bias
    weight, bias = (_whole(x) if hasattr(x, "full_tensor") else x for x in (head.weight, bias))
    softcap = next((getattr(config, name) for name in SOFTCAPS if getattr(config, name, None) is not None), None)
    return Head(weight, bias, _logit_scale(config), softcap)


def _whole(sharded: Any) -> Tensor:
    """All of a DTensor. Each rank has a gradient of its own for it, and a shard gets the mean of them, as in FSDP."""
    whole = sharded.full_tensor(grad_placements=[Partial()] * sharded.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / sharded.device_mesh.size())
    return whole


def head_rows(model: PreTrainedModel) -> int:
    """Rows of the model's output head, also where ZeRO-3 keeps none of them here."""
    weight: Any = model.get_output_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def _logit_scale(config: Any) -> float:
    """The factor on logits, under each name that transformers' configurations have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1 / scaling


def _aux_loss(model: PreTrainedModel, outputs: Any, kwargs: dict) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, where the caller asked for router logits."""
    if not kwargs.get("output_router_logits"):
        return None
    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return balancing_loss(outputs.router_logits, experts, config.num_experts_per_tok, kwargs.get("attention_mask"))


def gathered(*parameters: Any) -> contextlib.AbstractContextManager:
    """Parameters that ZeRO-3 has split are whole inside this context; elsewhere it does nothing.

    What is whole already is in use by a forward pass that goes on, and is left to that.
    """
    split = {id(p): p for p in parameters if hasattr(p, "ds_id") and p.ds_status.name != "AVAILABLE"}
    if not split:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(split.values()))


@torch.no_grad()
def read_teacher(model: Any, *parts: dict[str, Any]) -> ProjectedLogits:
    """A frozen model's hidden states on these inputs, (B, T, D), with its head: logits are never made here.

    Of several parts, which are read one after another, the rows are joined.
    """
    kept: list[ProjectedLogits] = []

    def keep(hidden: Tensor, labels: Tensor | None, head: Head, aux_loss: Tensor | None) -> None:
        kept.append(ProjectedLogits(hidden, head.weight, head.bias, head.scale, head.softcap))

    for inputs in parts:
        model(**inputs, qtarget=keep)
    return kept[0] if len(kept) == 1 else replace(kept[-1], hidden=torch.cat([part.hidden for part in kept]))


@dataclass
class ScoredOutput(ModelOutput):
    """What a scoring forward returns, as transformers and the wrappers around a model expect it."""

    total: Tensor | None = None  # () the loss summed over labelled tokens, which carries the gradient
    sums: Tensor | None = None  # (len(SUMS),) detached
    aux_loss: Tensor | None = None  # ()


@torch.no_grad()
def check_head(model: Any, input_ids: Tensor, half: bool) -> None:
    """Raise unless hidden states times head are the logits of the model's own forward, on a few tokens.

    A model may transform, cap or scale its logits in a way that no configuration names; any loss computed from its
    hidden states would then be a loss of another model. In half precision, two ways to round logits of 30 differ by a
    tenth of a nat already.
    """
    few = input_ids[:1, :SELF_CHECK_TOKENS]
    own = model(input_ids=few).logits.float().log_softmax(-1)
    read = read_teacher(model, {"input_ids": few})
    with gathered(read.weight, read.bias):
        ours = _dense(read.hidden, read.head).log_softmax(-1)
        half = half or read.weight.dtype in (torch.float16, torch.bfloat16)
    top = own.argmax(-1, keepdim=True)
    error = (own - ours).gather(-1, top).abs().mean()
    if error > (0.25 if half else 0.01):
        raise RuntimeError(
            f"{type(model).__name__} does something to its logits that trl_qtarget does not know of: computed from "
            f"hidden states and head, its log-probabilities are off by {error:.3f} nats. Train it with TRL's "
            "SFTTrainer, and please report the model's name."
        )


SUMS = ("tokens", "nll", "entropy", "top1", "trust", "moved", "target_p_y", "grad_mass")


@dataclass
class Scorer:
    """The reader that computes the loss of one batch, and says whether it was ever called."""

    target: Target
    backend: str = "auto"
    chunk_size: int | None = None
    columns: int | None = None  # compare student and teacher over these first ids only
    teacher: TeacherLogits | None = None  # hidden (B, T, D_T); ids and log_probs (B, T, K)
    reference_log_p_y: Tensor | None = None  # (B, T)
    reference_mass: Tensor | None = None  # (B, T)
    token_weight: Tensor | None = None  # (B, T)
    trust: Tensor | None = None  # (B, T)
    trajectory: Tensor | None = None  # (B, T)
    labelled: LabelCount | None = None
    check: bool = False
    called: bool = False

    def __call__(self, hidden: Tensor, labels: Tensor, head: Head, aux_loss: Tensor | None) -> ScoredOutput:
        self.called = True
        hidden, labels = self._without_virtual_tokens(hidden, labels)
        taught = (self.teacher.weight, self.teacher.bias) if isinstance(self.teacher, ProjectedLogits) else ()
        with gathered(head.weight, head.bias, *taught):
            head = head if self.columns is None else head.first(self.columns)
            teacher = self._flat_teacher(hidden.device)
            out = self._loss(hidden, labels, head, teacher)
            if self.check and not self.target.whole_batch:
                self._compare_with_reference(hidden, labels, head, teacher, out)
        count = (labels != IGNORE).sum()
        vectors = (-out.log_p_y, out.entropy, out.is_top1, out.trust, out.moved, out.target_p_y, out.grad_mass)
        sums = torch.stack([count.float(), *(x.sum(dtype=torch.float32) for x in vectors)])
        return ScoredOutput(out.loss, sums, aux_loss)

    def _loss(self, hidden: Tensor, labels: Tensor, head: Head, teacher: TeacherLogits | None) -> QTargetOutput:
        return qtarget_loss(
            hidden,
            head.weight,
            labels,
            self.target,
            teacher=teacher,
            reference_log_p_y=self.reference_log_p_y,
            reference_mass=self.reference_mass,
            token_weight=self.token_weight,
            trust=self.trust,
            trajectory=self.trajectory,
            bias=head.bias,
            logit_scale=head.scale,
            softcap=head.softcap,
            backend=self.backend,
            chunk_size=self.chunk_size,
            labelled=self.labelled,
        )

    def log_p_y(self, other: ProjectedLogits, labels: Tensor) -> Tensor:  # (B, T)
        """log-probabilities of the labels under a model that was read, (B, T) as its hidden states."""
        with gathered(other.weight, other.bias):
            head = other.head if self.columns is None else other.head.first(self.columns)
            return self._loss(other.hidden, labels, head, None).log_p_y

    def _without_virtual_tokens(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt tuning puts tokens before the student's that no teacher sees, and nothing is learnt on them."""
        given = (self.reference_log_p_y, self.reference_mass, self.token_weight, self.trust, self.trajectory)
        beside = [x.shape[1] for x in given if x is not None]
        beside += [self.teacher.hidden.shape[1]] if isinstance(self.teacher, ProjectedLogits) else []
        beside += [self.teacher.ids.shape[1]] if isinstance(self.teacher, TopKLogits) else []
        width = min([*beside, hidden.shape[1]])
        return hidden[:, hidden.shape[1] - width :], labels[:, labels.shape[1] - width :]

    def _flat_teacher(self, device: torch.device) -> TeacherLogits | None:
        t = self.teacher
        if t is None:
            return None
        if isinstance(t, TopKLogits):
            return TopKLogits(t.ids.flatten(0, 1), t.log_probs.flatten(0, 1))
        head = t.head if self.columns is None else t.head.first(self.columns)
        bias = None if head.bias is None else head.bias.to(device)
        hidden = t.hidden.flatten(0, 1).to(device)
        return ProjectedLogits(hidden, head.weight.to(device), bias, t.logit_scale, t.softcap)

    @torch.no_grad()
    def _compare_with_reference(
        self, hidden: Tensor, labels: Tensor, head: Head, teacher: TeacherLogits | None, out: QTargetOutput
    ) -> None:
        """Stop if the fused loss of a few tokens is not the specified one."""
        rows = (labels.flatten() != IGNORE).nonzero().squeeze(-1)[:SELF_CHECK_TOKENS]
        if not len(rows):
            return
        few = None if teacher is None else teacher.take(rows)
        logits = _dense(hidden.flatten(0, 1)[rows], head)
        taught = None
        if few is not None:
            taught = few.dense(logits) if isinstance(few, TopKLogits) else _dense(few.hidden, few.head)
        given = (self.reference_log_p_y, self.token_weight, None, self.reference_mass, self.trust)
        tokens = dense_tokens(
            logits.double().log_softmax(-1),
            labels.flatten()[rows],
            self.target,
            taught,
            *(None if x is None else x.flatten()[rows] for x in given),
        )
        expected = self.target.token_loss(self.target.weights(tokens), tokens)
        got = out.token_loss.flatten()[rows]
        close = (got - expected).abs() <= 0.05 * expected.abs() + 0.05
        # a threshold (profit, psft, prift) may fall on either side in half precision, for a few tokens
        if close.float().mean() < 0.9:
            raise RuntimeError(
                f"The fused loss differs from its specification on this model: {got.mean():.4f} against "
                f"{expected.mean():.4f} nats a token. Please report it with the model's name; "
                "qtarget_self_check=False trains on regardless."
            )


def _dense(hidden: Tensor, head: Head) -> Tensor:
    logits = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float() * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
