"""Whether two models speak of the same tokens."""

from __future__ import annotations

from typing import Any


SHOWN = 5  # differing tokens that an error lists


def require_same_tokens(student: Any, teacher: Any) -> None:
    """Raise a ValueError with the first differing tokens, unless two tokenizers give every id to the same token."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = sorted((id, token, theirs.get(token)) for token, id in ours.items() if theirs.get(token) != id)
    missing = sorted((id, token) for token, id in theirs.items() if token not in ours)
    if differing or missing:
        shown = [
            f"{token!r} is {id} for the student and {other if other is not None else 'unknown'} for the teacher"
            for id, token, other in differing[:SHOWN]
        ] + [f"{token!r} is {id} for the teacher and unknown to the student" for id, token in missing]
        raise ValueError(
            f"The teacher must share the student's token ids, {len(differing) + len(missing)} differ: "
            f"{'; '.join(shown[:SHOWN])}. Choose a teacher of the student's own family."
        )
