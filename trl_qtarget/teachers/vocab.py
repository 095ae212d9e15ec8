"""How far the tokenizers of student and teacher agree, and the ids over which the two models are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any


SHOWN = 5  # differing tokens that an error lists
LISTED = 20  # tokens of one tokenizer that a warning lists

# Texts that tokenizers of equal id maps split differently: digit groups, pre-tokenizer, normaliser, byte fallback
PROBES = (
    "In 1969, 1234567890 / 3.14159 = 0x1F 1,000,000",
    "def f(x):\n\treturn {'a': x**2, \"b\": [x != 0]}  # HTTPServer snake_case\n",
    "It's what they'VE said: DON'T e-mail me...",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
    "\U0001f642 \U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea",
    "  two   three    four\t\ttabs \n\n\n lines \r\n end  ",
    "na\u00efve nai\u0308ve \ufb01n \u212b \u00bd \uff21",
)


@dataclass(frozen=True)
class Agreement:
    """The agreement of two tokenizers: ids 0 to `common - 1` are the same tokens, and text is split in the same way.

    Each tokenizer may have added tokens after the common ones. Student and teacher are compared over the common ids
    alone: the columns of other ids are left out of both softmaxes before these are normalised, as those of padded rows
    are. A teacher that lacks a token says nothing of it, not that it is improbable. Such a token may therefore be no
    label (`KnownIds`), and its logit gets no gradient from the head: the student can still produce the token.
    """

    common: int
    student_only: dict[int, str] = field(default_factory=dict)
    teacher_only: dict[int, str] = field(default_factory=dict)

    def one_sided(self) -> str:
        """List the tokens that only one tokenizer has, in words; empty if there are none."""
        sides = (("student", self.student_only), ("teacher", self.teacher_only))
        return "; ".join(f"{_listed(tokens)} for the {side} only" for side, tokens in sides if tokens)


def _listed(tokens: dict[int, str]) -> str:
    more = f" and {len(tokens) - LISTED} more" if len(tokens) > LISTED else ""
    return ", ".join(f"{token!r} ({id})" for id, token in list(tokens.items())[:LISTED]) + more


def compare(student: Any, teacher: Any, texts: Iterable[str] = PROBES) -> Agreement:
    """Return the ids on which two tokenizers agree, and the tokens that only one of them has.

    Raises:
        ValueError: a token that both have is not among the common first ids, or the tokenizers split one of the texts
            or their special tokens differently.
    """
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    differing = sorted((id, token) for token, id in student_ids.items() ^ teacher_ids.items())
    common = differing[0][0] if differing else max(student_ids.values()) + 1
    shared = student_ids.keys() & teacher_ids.keys()
    if not shared or any(max(student_ids[token], teacher_ids[token]) >= common for token in shared):
        tokens = list(dict.fromkeys(token for _, token in differing))
        shown = (
            f"{token!r} is {student_ids.get(token, 'unknown')} for the student and "
            f"{teacher_ids.get(token, 'unknown')} for the teacher"
            for token in tokens[:SHOWN]
        )
        raise ValueError(
            f"The teacher must share the student's token ids, {len(tokens)} differ: {'; '.join(shown)}. Choose a "
            "teacher of the student's own family."
        )
    specials = dict.fromkeys(t for t in (*student.all_special_tokens, *teacher.all_special_tokens) if t in shared)
    added = (student.get_added_vocab().keys() | teacher.get_added_vocab().keys()) - shared
    for text in (*texts, "".join(f"{token}a {token}\n" for token in specials)):
        if not any(token in text for token in added):  # a tokenizer that lacks the token is bound to split it
            _require_same_split(student, teacher, text)
    return Agreement(
        common,
        student_only={id: token for id, token in differing if token in student_ids},
        teacher_only={id: token for id, token in differing if token in teacher_ids},
    )


def _require_same_split(student: Any, teacher: Any, text: str) -> None:
    split = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in (student, teacher)]
    if split[0] == split[1]:
        return
    pairs = enumerate(zip(*split, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(map(len, split)))
    pieces = [
        tokenizer.convert_ids_to_tokens(ids[first : first + SHOWN])
        for tokenizer, ids in zip((student, teacher), split, strict=True)
    ]
    raise ValueError(
        f"The teacher has the student's token ids but splits text differently: {text[:60]!r} has, from token {first} "
        f"on, {pieces[0]} for the student and {pieces[1]} for the teacher. Choose a teacher with the same merges, "
        "normalizer and pre-tokenizer."
    )


def texts_of(row: Any, tokenizer: Any) -> list[str]:
    """Return the texts of a row of data, from every depth of it, and its `input_ids` decoded; 1000 of each at most."""
    if isinstance(row, str):
        return [row[:1000]]
    if isinstance(row, dict):
        tokens = [tokenizer.decode(row["input_ids"][:1000])] if "input_ids" in row else []
        return tokens + [text for value in row.values() for text in texts_of(value, tokenizer)]
    if isinstance(row, list):
        return list(chain.from_iterable(texts_of(value, tokenizer) for value in row))
    return []


def common_columns(
    agreement: Agreement | None, tokens: int, student_rows: int, teacher_rows: int
) -> tuple[int | None, str]:
    """Return how many first ids student and teacher are compared over, None for all, and a line that says so.

    Args:
        agreement: of the two tokenizers; None where they could not be compared, and `tokens` is taken instead.
        tokens: the number of the student's tokens.
        student_rows, teacher_rows: the rows of the two heads, padding included.

    Raises:
        ValueError: the teacher's head has fewer rows than there are common ids.
    """
    common = tokens if agreement is None else agreement.common
    if teacher_rows < common:
        raise ValueError(
            f"The teacher has {teacher_rows} tokens and the student's tokenizer {common}: a teacher must know every "
            "token of the student."
        )
    checked = "ids not checked" if agreement is None else f"identical on {common:,} ids"
    one_sided = agreement is not None and (tokens > common or agreement.one_sided() != "")
    if student_rows == teacher_rows and not one_sided:
        return None, f"Student and teacher: {checked}; comparing all {student_rows:,} rows"
    columns = min(common, student_rows)
    kind = "padded or unshared rows" if one_sided else "padded rows"
    return columns, (
        f"Student and teacher: {checked}; ignoring {student_rows - columns:,} (student) and "
        f"{teacher_rows - columns:,} (teacher) {kind}"
    )
