"""A check of batches and datasets: a model must know every label and be able to read every input."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from .collators import WrappedCollator
from .tokenized import check_tokenized


CONTEXT = 10  # tokens before an unknown one that an error shows
SCANNED = 1000  # rows of a dataset that are checked together
OWN = "Its tokenizer has more: resize its embeddings (`model.resize_token_embeddings`), and save the model again."
REMEDY = {
    (
        "teacher",
        "labels",
    ): "Set that label to -100, leave the row out, or give the teacher the token and train it first.",
    (
        "teacher",
        "input_ids",
    ): "Resize the teacher's embeddings to the student's, or choose a pad_token that both know.",
    ("student", "labels"): OWN,
    ("student", "input_ids"): OWN,
}


class KnownIds(WrappedCollator):
    """A collator that refuses batches with a label or an input that the teacher, or the student, does not know.

    Batches are checked where they are made, on the CPU: a check on the device would have to wait for its result. The
    first token of a sequence is not checked as a label, since no position predicts it.

    Args:
        limits: the number of ids that the model knows ("labels") and can read ("input_ids").
        model: "teacher" or "student", for the message.
    """

    def __init__(self, collator: Any, limits: dict[str, int], tokenizer: Any, model: str = "teacher"):
        super().__init__(collator)
        self.limits = limits
        self.tokenizer = tokenizer
        self.model = model

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for column, limit in self.limits.items():
            if column not in batch:
                continue
            unknown = batch[column] >= limit
            if column == "labels":
                unknown[:, 0] = False
            if unknown.any():
                row, position = unknown.nonzero()[0].tolist()
                inputs = batch["input_ids"][row].tolist()
                self._refuse(f"Row {row} of a batch", column, position, int(batch[column][row, position]), inputs)
        return batch

    def scan(self, name: str, dataset: Any) -> None:
        """Check a prepared dataset, or several by name. A stream is left to the check of its batches.

        Raises:
            ValueError: the first id that the model does not know, with its row and position.
        """
        if isinstance(dataset, dict):
            for key, part in dataset.items():
                self.scan(f"{name} ({key})", part)
        if not isinstance(dataset, Dataset):
            return
        check_tokenized(name, dataset)
        columns = [column for column in self.limits if column in dataset.column_names]
        kept = dataset.select_columns([c for c in (*self.limits, "seq_lengths") if c in dataset.column_names])
        for i, table in enumerate(kept.with_format("arrow").iter(SCANNED)):
            for column in columns:
                found = _first_unknown(table, column, self.limits[column])
                if found is not None:
                    row, position = found[0] + i * SCANNED, found[1]
                    example = kept.with_format(None)[row]
                    where = f"Row {row} of the prepared {name} dataset"
                    self._refuse(where, column, position, example[column][position], example.get("input_ids", []))

    def _refuse(self, where: str, column: str, position: int, id: int, inputs: list[int]) -> None:
        token = self.tokenizer.convert_ids_to_tokens(id)
        before = self.tokenizer.decode(inputs[max(0, position - CONTEXT) : position])
        raise ValueError(
            f"{where} has {token!r} (id {id}) in {column} at position {position}, after {before!r}. The {self.model} "
            f"knows the first {self.limits[column]} ids only. {REMEDY[self.model, column]}"
        )


def _first_unknown(table: Any, column: str, limit: int) -> tuple[int, int] | None:
    """Return row and position of the first id in a table of lists that is at least `limit`, or None."""
    lists = table[column].combine_chunks()
    unknown = lists.flatten().to_numpy(zero_copy_only=False) >= limit
    if not unknown.any():
        return None
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    starts = np.cumsum(lengths) - lengths
    if column == "labels":
        packed = "seq_lengths" in table.column_names
        sequences = table["seq_lengths"].combine_chunks().flatten().to_numpy() if packed else lengths
        unknown[(np.cumsum(sequences) - sequences)[sequences > 0]] = False
    if not unknown.any():
        return None
    i = int(unknown.argmax())
    row = int(np.searchsorted(starts, i, side="right")) - 1
    return row, i - int(starts[row])
