"""The second model of a run, a teacher or a reference: where it is chosen, and where it is opened.

    what the run has                              what is read in each step
    a loss without teacher or reference           nothing
    teacher_cache                                 columns of the batch, which a collator takes from the cache
    psft                                          Snapshot: the student of some updates ago
    teacher_ema_decay                             Average: a moving average of the student
    a teacher: an adapter over the student's base OtherAdapter: the student's base weights with the teacher's adapter
    any other teacher                             FrozenModel
    a reference, new adapters on the student      AdaptersOff: the base weights
    a reference, trained or rewriting adapters    Initial: a copy of the adapters as they arrive
    a reference, no adapters                      FrozenModel: a copy of the untrained student

`choose` runs before TRL's trainer exists, so that a teacher that does not fit is refused before any data is tokenized,
and a reference is copied before anything changes the student. `open_second_model` runs after it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .. import compat
from ..cache.offline import CachedTeacherCollator, open_cache
from ..cache.sequences import by_name
from ..data.columns import token_columns
from ..data.known_ids import KnownIds
from ..model.adapters import base_is_initial, base_model
from ..model.head import gathered, head_rows
from ..teachers.loading import copy_of_initial, load_teacher, revision_of, shares_base
from ..teachers.models import AdaptersOff, FrozenModel, OtherAdapter, ReadModel
from ..teachers.remembered import Average, Initial, Remembered, Snapshot
from ..teachers.vocab import Agreement, common_columns
from ..theory.target import Target
from .checks import (
    compare_tokenizers,
    refuse,
    refuse_images,
    refuse_joined_rows,
    refuse_model,
    refuse_placement,
)
from .config import TargetSFTConfig


@dataclass(frozen=True)
class Choice:
    """The second model as it is known before TRL's trainer exists."""

    columns: list[str]  # token columns that all datasets have
    needed: bool  # the loss reads a teacher or reference that no column replaces
    teacher: PreTrainedModel | str | None = None
    reference: PreTrainedModel | None = None  # a copy of the untrained student
    agreement: Agreement | None = None  # of the two tokenizers; None where they were not compared
    base_is_initial: bool = True  # the student with its adapters off is the student before training


class SecondModel(NamedTuple):
    """The second model as a trainer uses it."""

    model: ReadModel | None  # None where no model is read in a step
    vocabulary: int | None  # student and teacher are compared over these first ids; None: over all
    collator: Any


def choose(
    student: PreTrainedModel | str,
    teacher: PreTrainedModel | str | None,
    args: TargetSFTConfig,
    target: Target,
    kwargs: dict[str, Any],
) -> Choice:
    """Choose the second model from the arguments of a trainer, `kwargs` being those of TRL's.

    Raises:
        ValueError: an option that the loss would not honour, or a teacher that is missing or does not fit.
    """
    if teacher is not None and args.teacher_cache is not None:
        raise ValueError("teacher_model and teacher_cache are both given: leave one of them out.")
    teacher = teacher or (None if args.teacher_cache else args.teacher_model_name_or_path)
    refuse(args, target, teacher or args.teacher_ema_decay, kwargs)
    refuse_placement(args, target)
    refuse_model(student, teacher, args, kwargs.get("peft_config"))
    columns = token_columns(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
    if not target.reads_model(columns):
        return Choice(columns, needed=False)
    if teacher is not None:
        rows = kwargs.get("train_dataset") or ()
        agreement = None
        if not clones_template(args):  # cloning adds tokens to the student's tokenizer: compared after that
            agreement = compare_tokenizers(student, teacher, kwargs.get("processing_class"), args, rows)
        if teacher is student and not isinstance(student, str):
            teacher = copy.deepcopy(student)  # freezing the teacher must not freeze the student
        return Choice(columns, True, teacher, agreement=agreement)
    if args.teacher_ema_decay or args.teacher_cache:
        return Choice(columns, needed=True)
    peft_config = kwargs.get("peft_config")
    reference = copy_of_initial(student, args, peft_config)
    return Choice(columns, True, reference=reference, base_is_initial=base_is_initial(student, peft_config))


def open_second_model(choice: Choice, trainer: Any) -> SecondModel:
    """Load and place the chosen model beside the student, and check that it knows all ids of the data.

    Raises:
        ValueError: the teacher does not fit the student or the data.
    """
    args, target, collator = trainer.args, trainer.target, trainer.data_collator
    if "snapshot" not in target.needs:
        if not choice.needed:
            return SecondModel(None, None, collator)
        if args.teacher_cache is not None:
            return _open_cache(trainer)
    if choice.reference is not None:
        _grow(choice.reference, base_model(trainer.model))
        return SecondModel(FrozenModel(choice.reference, trainer.accelerator, args.teacher_offload), None, collator)
    inside = within_student(choice, trainer)
    if inside is not None:
        return SecondModel(inside, None, collator)
    teacher: Any = choice.teacher
    if isinstance(teacher, str):
        teacher = load_teacher(teacher, args)
        refuse_joined_rows(teacher, args)
    if compat.trains_on_images(trainer):
        refuse_images(teacher, args)
    agreement = choice.agreement
    if clones_template(args):
        agreement = compare_tokenizers(
            trainer.model, choice.teacher, compat.tokenizer(trainer), args, trainer.train_dataset
        )
    vocabulary, collator = _common_vocabulary(teacher, agreement, trainer)
    return SecondModel(FrozenModel(teacher, trainer.accelerator, args.teacher_offload), vocabulary, collator)


def clones_template(args: TargetSFTConfig) -> bool:
    """Whether TRL copies the chat template of another tokenizer, and with it tokens that the student lacks."""
    path = args.chat_template_path
    return path is not None and not path.endswith((".jinja", ".j2"))


def known_to_student(trainer: Any, collator: Any) -> Any:
    """A collator that refuses tokens without a row in the student's embedding, which nobody has resized for them.

    The datasets are scanned at once. A tokenizer with no more tokens than the student has rows needs no such collator.
    """
    rows, tokenizer = head_rows(base_model(trainer.model)), compat.tokenizer(trainer)
    if len(tokenizer) <= rows:
        return collator
    known = KnownIds(collator, {"labels": rows, "input_ids": rows}, tokenizer, model="student")
    known.scan("train", trainer.train_dataset)
    known.scan("eval", trainer.eval_dataset)
    return known


@torch.no_grad()
def _grow(reference: Any, student: Any) -> None:
    """Give a copy of the untrained student the rows that TRL has added to the student for a cloned chat template."""
    before, rows = head_rows(reference), head_rows(student)
    if before == rows:
        return
    reference.resize_token_embeddings(rows, mean_resizing=False)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        own, theirs = (getattr(model, name)().weight for model in (reference, student))
        with gathered(theirs):
            own[before:] = theirs[before:].to(own)


def within_student(choice: Choice, trainer: Any) -> ReadModel | None:
    """The second model if it is read through the student's own modules, else None.

    Raises:
        ValueError: copies of weights under FSDP or ZeRO-3, where weights swapped into one rank's shard would never be
            gathered; or `teacher_offload` for weights that the student needs as well.
    """
    student, teacher, args, target = trainer.model, choice.teacher, trainer.args, trainer.target
    inside: ReadModel | None = None
    if "snapshot" in target.needs:
        inside = Snapshot(student, target.snapshot_every)
    elif args.teacher_ema_decay is not None:
        inside = Average(student, args.teacher_ema_decay)
    elif teacher is None:
        inside = AdaptersOff(student) if choice.base_is_initial else Initial(student)
    elif isinstance(teacher, str) and shares_base(student, teacher, args):
        inside = OtherAdapter(student, teacher, **revision_of(args))
    if isinstance(inside, Remembered) and compat.shards_weights(trainer.accelerator):
        raise ValueError(
            "psft, teacher_ema_decay, and references of a student that arrives with trained adapters keep copies of "
            "the student's weights, and FSDP or ZeRO-3 shards them: train with DDP or ZeRO-2, or with another loss or "
            "teacher."
        )
    if inside is not None and args.teacher_offload:
        raise ValueError(
            "teacher_offload is for a teacher with weights of its own, and this one has the student's: leave it out."
        )
    return inside


def _open_cache(trainer: Any) -> SecondModel:
    if compat.trains_on_images(trainer):
        raise ValueError("A teacher cache holds sequences of text: for images pass teacher_model_name_or_path.")
    columns = head_rows(base_model(trainer.model))
    datasets = by_name(trainer.train_dataset, trainer.eval_dataset)
    cache = open_cache(trainer.args, compat.tokenizer(trainer), columns, datasets)
    made = cache.settings
    trainer.accelerator.print(f"Teacher: {made.teacher}, {made.k} ids a label from {len(cache)} cached sequences")
    vocabulary = made.vocab_size if made.vocab_size < columns else None
    return SecondModel(None, vocabulary, CachedTeacherCollator(trainer.data_collator, cache))


def _common_vocabulary(teacher: Any, agreement: Agreement | None, trainer: Any) -> tuple[int | None, Any]:
    """The number of first ids that the models are compared over, and a collator that refuses data outside of them."""
    tokenizer = compat.tokenizer(trainer)
    student_rows, teacher_rows = (head_rows(base_model(model)) for model in (trainer.model, teacher))
    vocabulary, report = common_columns(agreement, len(tokenizer), student_rows, teacher_rows)
    trainer.accelerator.print(report)
    if vocabulary is None:
        return None, trainer.data_collator
    known = KnownIds(trainer.data_collator, {"labels": vocabulary, "input_ids": teacher_rows}, tokenizer)
    known.scan("train", trainer.train_dataset)
    known.scan("eval", trainer.eval_dataset)
    return vocabulary, known
