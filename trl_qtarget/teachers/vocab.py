"""Whether two models speak of the same tokens, over which ids they are compared, and that no label lies outside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any


SHOWN = 5  # differing tokens that an error lists
LISTED = 20  # tokens of one side that a warning lists

# each for one way in which tokenizers of equal id maps differ: digit groups, pre-tokenizer, normaliser, byte fallback
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
    """What two tokenizers have in common: ids 0 to `common - 1` are the same tokens, and text is split into the same.

    Either side may have added tokens of its own after those. Student and teacher are compared over the common ids
    alone: columns of other ids are left out of both softmaxes before they are normalised, like padded rows. A teacher
    that does not know a token says nothing about it, which is not that it is improbable: no label may be such a token
    (`KnownIds`), and none is pushed down either. The student's logits of its own tokens get no gradient from the head,
    so it can still produce what it has learnt elsewhere.
    """

    common: int
    ours_only: dict[int, str] = field(default_factory=dict)
    theirs_only: dict[int, str] = field(default_factory=dict)

    def one_sided(self) -> str:
        """The tokens that only one side knows, in words; empty where there are none."""
        sides = (("student", self.ours_only), ("teacher", self.theirs_only))
        return "; ".join(f"{_listed(tokens)} for the {side} only" for side, tokens in sides if tokens)


def _listed(tokens: dict[int, str]) -> str:
    more = f" and {len(tokens) - LISTED} more" if len(tokens) > LISTED else ""
    return ", ".join(f"{token!r} ({id})" for id, token in list(tokens.items())[:LISTED]) + more


def compare(student: Any, teacher: Any, texts: Iterable[str] = PROBES) -> Agreement:
    """The ids on which two tokenizers agree, and the tokens that only one of them has.

    Raises:
        ValueError: a token that both know is not among the common first ids, or one of the texts, or of the special
            tokens that both know, is split differently.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    apart = sorted((id, token) for token, id in ours.items() ^ theirs.items())
    common = apart[0][0] if apart else max(ours.values()) + 1
    shared = ours.keys() & theirs.keys()
    if not shared or any(max(ours[token], theirs[token]) >= common for token in shared):
        tokens = list(dict.fromkeys(token for _, token in apart))
        shown = (
            f"{t!r} is {ours.get(t, 'unknown')} for the student and {theirs.get(t, 'unknown')} for the teacher"
            for t in tokens[:SHOWN]
        )
        raise ValueError(
            f"The teacher must share the student's token ids, {len(tokens)} differ: {'; '.join(shown)}. Choose a "
            "teacher of the student's own family."
        )
    specials = dict.fromkeys(t for t in (*student.all_special_tokens, *teacher.all_special_tokens) if t in shared)
    added = (student.get_added_vocab().keys() | teacher.get_added_vocab().keys()) - shared
    for text in (*texts, "".join(f"{token}a {token}\n" for token in specials)):
        if not any(token in text for token in added):  # the side that does not know it is bound to split it
            _require_same_split(student, teacher, text)
    return Agreement(common, *({id: token for id, token in apart if token in side} for side in (ours, theirs)))


def _require_same_split(student: Any, teacher: Any, text: str) -> None:
    ours, theirs = (t.encode(text, add_special_tokens=False) for t in (student, teacher))
    if ours == theirs:
        return
    pairs = enumerate(zip(ours, theirs, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    pieces = [t.convert_ids_to_tokens(ids[first : first + SHOWN]) for t, ids in ((student, ours), (teacher, theirs))]
    raise ValueError(
        f"The teacher has the student's token ids but splits text differently: {text[:60]!r} has, from token {first} "
        f"on, {pieces[0]} for the student and {pieces[1]} for the teacher. Choose a teacher with the same merges, "
        "normalizer and pre-tokenizer."
    )


def texts_of(row: Any, tokenizer: Any) -> list[str]:
    """The text in a row of data, wherever it stands; decoded where the row holds tokens."""
    if isinstance(row, str):
        return [row[:1000]]
    if isinstance(row, dict):
        tokens = [tokenizer.decode(row["input_ids"][:1000])] if "input_ids" in row else []
        return tokens + [text for value in row.values() for text in texts_of(value, tokenizer)]
    if isinstance(row, list):
        return list(chain.from_iterable(texts_of(value, tokenizer) for value in row))
    return []


def common_columns(agreement: Agreement | None, tokens: int, ours: int, theirs: int) -> tuple[int | None, str]:
    """Over how many first ids heads of so many rows are compared, None for all of them, and a line that says so.

    `tokens` is the number of the student's, which is all there is to go by where no tokenizers were compared.
    """
    common = tokens if agreement is None else agreement.common
    if theirs < common:
        raise ValueError(
            f"The teacher has {theirs} tokens and the student's tokenizer {common}: a teacher must know every token "
            "of the student."
        )
    said = "ids not checked" if agreement is None else f"identical on {common:,} ids"
    one_sided = agreement is not None and (tokens > common or agreement.one_sided() != "")
    if ours == theirs and not one_sided:
        return None, f"Student and teacher: {said}; comparing all {ours:,} rows"
    columns = min(common, ours)
    rows = "padded or unshared rows" if one_sided else "padded rows"
    return columns, (
        f"Student and teacher: {said}; ignoring {ours - columns:,} (student) and {theirs - columns:,} (teacher) {rows}"
    )
