"""The quickstart's task: five operations on digits, left to right, modulo 10, with every running result written out.

    python recipes/quickstart/task.py --output_dir runs/quickstart/data --rows 200 --noise 0.2 --seed 0

The student was pretrained to write `-5-2*0*0-1#1` for `4-9-3*0*3-9=`; demonstrations write `m5m2t0t0m1#1`: as right,
but improbable to it. A hash sorts problems into train, validation and test, the same for every seed.
"""

import argparse
import json
import random
import zlib
from pathlib import Path


LETTERS = {"+": "p", "-": "m", "*": "t"}  # how demonstrations write an operation
HELD_OUT = ("test", "validation")  # one problem in ten each; every other problem is for training
EOS, PAD = "$", "_"
ALPHABET = [PAD, EOS, "#", "=", *LETTERS, *LETTERS.values(), *map(str, range(10))]
STEPS = 5

Row = dict[str, str]


def split_of(problem: str) -> str:
    """The split a problem belongs to, whatever the seed."""
    bucket = zlib.crc32(problem.encode()) % 10
    return HELD_OUT[bucket] if bucket < len(HELD_OUT) else "train"


def draw_problem(rng: random.Random, split: str = "train", times: float = 1 / 3) -> str:
    """A problem of `split` such as `4-9-3*0*3-9=`; each operation is a multiplication with probability `times`."""
    while True:
        operations = ["*" if rng.random() < times else rng.choice("+-") for _ in range(STEPS)]
        problem = str(rng.randrange(10)) + "".join(o + str(rng.randrange(10)) for o in operations) + "="
        if split_of(problem) == split:
            return problem


def draw_slip(rng: random.Random) -> int:
    """Draw the number that a mistake adds to the right digit: mostly 1 or -1, never 0."""
    return rng.choice((1, -1)) if rng.random() < 0.8 else rng.randrange(2, 9)


def running_results(problem: str, slips: dict[int, int] | None = None) -> list[int]:
    """The result after each operation. `slips` maps a step to the number wrongly added there; the error propagates."""
    result, results = int(problem[0]), []
    for step in range(STEPS):
        operation, digit = problem[1 + 2 * step], int(problem[2 + 2 * step])
        result = {"+": result + digit, "-": result - digit, "*": result * digit}[operation]
        result = (result + (slips or {}).get(step, 0)) % 10
        results.append(result)
    return results


def write_solution(problem: str, results: list[int], answer: int, demonstration: bool = True) -> str:
    """`m5m2t0t0m1#1` as demonstrations write it, else `-5-2*0*0-1#1`. The trainer appends the end token."""
    operations = problem[1:-1:2]
    signs = [LETTERS[o] if demonstration else o for o in operations]
    return "".join(f"{sign}{result}" for sign, result in zip(signs, results, strict=True)) + f"#{answer}"


def answer_of(problem: str) -> str:
    """The true final digit."""
    return str(running_results(problem)[-1])


def demonstration(problem: str, rng: random.Random, noisy: bool = False) -> str:
    """A worked solution; if noisy, half of the time one step is wrong and propagates, else the final answer alone."""
    wrong_step = noisy and rng.random() < 0.5
    results = running_results(problem, {rng.randrange(STEPS): draw_slip(rng)} if wrong_step else None)
    slip = draw_slip(rng) if noisy and not wrong_step else 0
    return write_solution(problem, results, (results[-1] + slip) % 10)


def make_row(problem: str, rng: random.Random, noisy: bool = False) -> Row:
    """A row of data; `answer` is the true digit even where the demonstration is wrong."""
    return {"prompt": problem, "completion": demonstration(problem, rng, noisy), "answer": answer_of(problem)}


def training_rows(rows: int, noise: float, seed: int) -> list[Row]:
    """`rows` demonstrations, of which the share `noise` is wrong; the seed draws problems and mistakes alike."""
    rng = random.Random(seed)
    noisy = set(rng.sample(range(rows), round(noise * rows)))
    return [make_row(draw_problem(rng), rng, i in noisy) for i in range(rows)]


def practice_rows(rows: int, seed: int) -> list[Row]:
    """`rows` further training problems with their answers, without demonstrations: a reward tells right from wrong."""
    rng = random.Random(f"practice {seed}")
    problems = [draw_problem(rng) for _ in range(rows)]
    return [{"prompt": problem, "answer": answer_of(problem)} for problem in problems]


def held_out_rows(rows: int, split: str) -> list[Row]:
    """`rows` problems of a held-out split: always the same ones."""
    rng = random.Random(split)
    return [make_row(draw_problem(rng, split), rng) for _ in range(rows)]


def correct(completion: str, answer: str, row: dict, ended: bool) -> bool:
    """The verifier of `trl-qtarget eval`: exactly the true digit and the end token follow the first `#`."""
    return ended and completion.partition("#")[2] == answer


def reward(completions: list[str], completion_ids: list[list[int]], answer: list[str], **columns) -> list[float]:
    """The same verifier as a reward of GRPO: `reward_funcs: recipes.quickstart.task.reward`."""
    ended = [ids[-1:] == [ALPHABET.index(EOS)] for ids in completion_ids]
    return [float(correct(*told[:2], {}, told[2])) for told in zip(completions, answer, ended, strict=True)]


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> None:
    """Write `train.jsonl`, `practice.jsonl`, `validation.jsonl` and `test.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200, help="training rows (default: 200)")
    parser.add_argument("--noise", type=float, default=0.2, help="share of wrong training rows (default: 0.2)")
    parser.add_argument("--practice", type=int, default=2000, help="training problems alone (default: 2000)")
    parser.add_argument("--held_out", type=int, default=250, help="validation and test problems each (default: 250)")
    parser.add_argument("--seed", type=int, default=0, help="draws training rows, mistakes and practice (default: 0)")
    args = parser.parse_args()
    if not 0 <= args.noise <= 1:
        parser.error(f"--noise is a share between 0 and 1, not {args.noise}")
    write_jsonl(args.output_dir / "train.jsonl", training_rows(args.rows, args.noise, args.seed))
    write_jsonl(args.output_dir / "practice.jsonl", practice_rows(args.practice, args.seed))
    for split in HELD_OUT:
        write_jsonl(args.output_dir / f"{split}.jsonl", held_out_rows(args.held_out, split))
    print(f"wrote train, practice, validation and test data to {args.output_dir}")


if __name__ == "__main__":
    main()
