"""Which ids two models share: the same tokenizer, padded to different sizes, or not the same tokenizer at all."""

from __future__ import annotations

from typing import Any


SHOWN = 5  # differing tokens that an error lists


def common_columns(student: Any, teacher: Any, student_size: int, teacher_size: int) -> int | None:
    """Over how many first ids a student and its teacher are to be compared; None where that is all of both.

    Padding rows are nobody's tokens: where the two heads differ in size, both distributions are normalised over the
    real ids only. Sizes are rows of the heads.

    Raises:
        ValueError: the tokenizers give some id to different tokens; with the first of them.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = sorted(
        (id, token, theirs.get(token)) for token, id in ours.items() if theirs.get(token) != id and id < teacher_size
    )
    missing = sorted((id, token) for token, id in theirs.items() if token not in ours and id < student_size)
    if differing or missing:
        shown = [
            f"{token!r} is {id} for the student and {other if other is not None else 'unknown'} for the teacher"
            for id, token, other in differing[:SHOWN]
        ] + [f"{token!r} is {id} for the teacher and unknown to the student" for id, token in missing]
        raise ValueError(
            f"The teacher must share the student's token ids, {len(differing) + len(missing)} differ: "
            f"{'; '.join(shown[:SHOWN])}. Choose a teacher of the student's own family."
        )
    if student_size == teacher_size:
        return None
    return min(max(ours.values()) + 1, student_size, teacher_size)
