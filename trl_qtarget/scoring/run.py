"""A run of `trl-qtarget cache`: the sequences that a recipe makes of its data, and the teacher that scores them."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from .. import compat
from ..cache.fingerprints import model_fingerprint, template_fingerprint, tokenizer_fingerprint
from ..cache.reader import readable
from ..cache.sequences import TokenSequence, by_name, dataset_sequences, row_sequences
from ..cache.shards import Entry, Settings
from ..data.known_ids import KnownIds
from ..data.loading import load_splits
from ..model.adapters import base_model
from ..model.head import head_rows
from ..teachers.loading import load_teacher
from ..teachers.vocab import common_columns
from ..training.checks import compare_tokenizers
from ..training.trainer import TargetSFTTrainer
from .score import score


ROUNDING_TOLERANCE = 1e-3  # of the probability: where float16 moves less than this, `cache_dtype: auto` takes it


class Row(NamedTuple):
    """The place and the size of one sequence of the prepared data."""

    dataset: str
    number: int  # of the row in its dataset
    part: int  # the number of the sequence within a packed row
    tokens: int
    labels: int


class CacheRun:
    """A recipe's prepared data, as the student's trainer would make it, and its teacher, ready to score.

    `TargetSFTTrainer` itself prepares the data, with the student's tokenizer and the recipe's template, truncation and
    packing: rows that were prepared in another way would not be found again in training.
    """

    def __init__(self, script_args, training_args, model_args, dataset_args, cache_args):
        self.args, self.options = training_args, cache_args
        self.teacher_name, self.folder = training_args.teacher_model_name_or_path, training_args.teacher_cache
        tokenizer, student_columns = _student(model_args, training_args)
        train, evaluation = load_splits(script_args, training_args, dataset_args)  # before a teacher is loaded for it
        teacher = load_teacher(self.teacher_name, training_args)
        _only_prepare(training_args)
        agreement = compare_tokenizers(
            model_args.model_name_or_path, self.teacher_name, tokenizer, training_args, train
        )
        self.teacher_columns = head_rows(teacher)
        shared, self.report = common_columns(agreement, len(tokenizer), student_columns, self.teacher_columns)
        self.columns = student_columns if shared is None else shared
        trainer = TargetSFTTrainer(
            teacher, training_args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer
        )
        self.tokenizer, self.accelerator = compat.tokenizer(trainer), trainer.accelerator
        self.model = base_model(trainer.model).to(self.accelerator.device).eval()
        self.datasets = {
            name: dataset
            if isinstance(dataset, Dataset)
            else Dataset.from_list(list(dataset))  # a stream is read once
            for name, dataset in by_name(trainer.train_dataset, trainer.eval_dataset).items()
        }

    def check_known_ids(self) -> None:
        """Check that the teacher knows every label of the data and can read every input.

        Raises:
            ValueError: the first id that the teacher does not know, with its row and position.
        """
        known = KnownIds(None, {"labels": self.columns, "input_ids": self.teacher_columns}, self.tokenizer)
        for name, dataset in self.datasets.items():
            known.scan(name, dataset)

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Every distinct sequence of the data, by its key."""
        rows, quiet = {}, not self.accelerator.is_main_process
        for name, dataset in self.datasets.items():
            for key, number, part, sequence in dataset_sequences(dataset, name, disable=quiet):
                rows.setdefault(key, Row(name, number, part, len(sequence.ids), sequence.labels))
        return rows

    def sequence(self, key: str) -> TokenSequence:
        row = self.rows[key]
        return row_sequences(self.datasets[row.dataset][row.number])[row.part]

    def score(self, keys: list[str]) -> list[Entry]:
        return score(self.model, [self.sequence(key) for key in keys], self.k, self.columns)

    def by_length(self) -> list[str]:
        """The keys of all rows, shortest first."""
        return sorted(self.rows, key=lambda key: (self.rows[key].tokens, self.rows[key].labels))

    def batches(self, keys: list[str]) -> Iterator[list[str]]:
        """Divide keys of ascending length into batches of at most `batch_tokens` tokens, padding included."""
        batch: list[str] = []
        for key in keys:
            if batch and self.rows[key].tokens * (len(batch) + 1) > self.options.batch_tokens:
                yield batch
                batch = []
            batch.append(key)
        if batch:
            yield batch

    @property
    def k(self) -> int:
        return min(self.options.top_k, self.columns)

    @property
    def dtype(self) -> str:
        """The type of the log-probabilities; for `auto`, float16 unless it would round too much away."""
        if self.rounding_error is None:
            return self.options.cache_dtype
        return "float16" if self.rounding_error < ROUNDING_TOLERANCE else "float32"

    @cached_property
    def rounding_error(self) -> float | None:
        """The probability that float16 moves in a token's distribution, a mean over one batch; None unless `auto`."""
        if self.options.cache_dtype != "auto":
            return None
        moved = []
        for entry in self.score(next(self.batches(self.by_length()))):
            rounded = readable(entry._replace(log_probs=entry.log_probs.astype(np.float16)))[1]
            moved.append(0.5 * np.abs(np.exp(rounded) - np.exp(readable(entry)[1])).sum(-1))
        return float(np.concatenate(moved).mean())

    def settings(self) -> Settings:
        return Settings(
            teacher=self.teacher_name,
            teacher_revision=self.args.teacher_model_revision,
            teacher_fingerprint=model_fingerprint(self.model),
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            template_fingerprint=template_fingerprint(self.tokenizer),
            vocab_size=self.columns,
            k=self.k,
            dtype=self.dtype,
            max_length=self.args.max_length,
        )


def _student(model_args: Any, training_args: Any) -> tuple[Any, int]:
    """Load the student's tokenizer and the number of rows of its head, without its weights."""
    options = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **options)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **options)
    return tokenizer, config.get_text_config().vocab_size


def _only_prepare(training_args: Any) -> None:
    """Clear the options of the loss and of the student's model: the trainer gets the teacher as its model."""
    of_teacher = ("model_name_or_path", "cache", "ema_decay", "offload", "batch_size")
    for option in ("loss_kwargs", "model_init_kwargs", *(f"teacher_{name}" for name in of_teacher)):
        setattr(training_args, option, None)
    training_args.loss, training_args.push_to_hub, training_args.report_to = "nll", False, []
