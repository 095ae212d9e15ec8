"""Draw the README's picture: one token of a faulty demonstration, and the targets of nll and Target-SFT there.

    python recipes/guide/target.py --output recipes/guide/target.png

Student and teacher are those of the quickstart, and the demonstration is drawn like the quickstart's noisy ones. Of
three hundred wrong digits the picture shows the one at which the student's probability of the right digit is nearest
to 0.4.
"""

import argparse
import random
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_qtarget import build
from trl_qtarget.theory.reference import dense_tokens, pool


QUICKSTART = Path(__file__).parents[1] / "quickstart"
sys.path.insert(0, str(QUICKSTART))
import task  # noqa: E402


ETA = 0.5
INK, LABEL, STUDENT, TEACHER, TARGET = "#333333", "#d1495b", "#8d99ae", "#3d7ea6", "#2a9d8f"


def faulty_token(tokenizer, student) -> tuple[str, int]:
    """A demonstration with one wrong step, and the position of its wrong digit."""
    rng, best = random.Random(0), (1.0, "", 0)
    for _ in range(300):
        problem = task.draw_problem(rng)
        step = rng.randrange(1, task.STEPS)
        right, wrong = task.running_results(problem), task.running_results(problem, {step: task.draw_slip(rng)})
        text = problem + task.write_solution(problem, wrong, wrong[-1])
        at = len(problem) + 2 * step + 1
        p = distribution(student, tokenizer, text[:at])
        unsure = abs(p[tokenizer.convert_tokens_to_ids(str(right[step]))].item() - 0.4)
        best = min(best, (unsure, text, at))
    return best[1:]


@torch.no_grad()
def distribution(model, tokenizer, prefix: str) -> torch.Tensor:
    ids = tokenizer(prefix, return_tensors="pt", return_token_type_ids=False)
    return model(**ids).logits[0, -1].double().softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "student")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(QUICKSTART / name, dtype=torch.float32) for name in ("student", "teacher")
    )
    text, at = faulty_token(tokenizer, student)
    log_p, log_q = (distribution(m, tokenizer, text[:at]).log()[None] for m in (student, teacher))
    label = torch.tensor([tokenizer.convert_tokens_to_ids(text[at])])
    target = build("target_sft", eta=ETA)
    gamma = target.weights(dense_tokens(log_p, label, target, log_q)).trust
    one_hot = torch.zeros_like(log_p).scatter(-1, label[:, None], 1.0)
    Q = gamma[:, None] * one_hot + (1 - gamma[:, None]) * pool(target.residual, log_p, log_q).exp()

    digits = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    panels = [
        ("what nll trains on: the label", one_hot, LABEL),
        ("the student", log_p.exp(), STUDENT),
        ("the teacher", log_q.exp(), TEACHER),
        (f"what Target-SFT trains on: Q, with gamma = {gamma.item():.2f}", Q, TARGET),
    ]
    fig, axes = plt.subplots(1, 4, figsize=(13, 2.9), sharey=True, layout="constrained")
    for ax, (title, values, colour) in zip(axes, panels, strict=True):
        bars = ax.bar(range(10), values[0, digits].tolist(), color=colour, width=0.78)
        bars[int(text[at])].set_edgecolor(LABEL)
        bars[int(text[at])].set_linewidth(1.8)
        ax.set_title(title, fontsize=9.5, color=INK, loc="left")
        ax.set_xticks(range(10))
        ax.set_ylim(0, 1.02)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8.5, colors=INK)
        ax.set_xlabel("next token", fontsize=8.5, color=INK)
    axes[0].set_ylabel("probability", fontsize=8.5, color=INK)
    fig.suptitle(
        f"A faulty demonstration, {text[:at]}[{text[at]}]: the digit in brackets is wrong", fontsize=11, color=INK
    )
    fig.savefig(args.output, dpi=130)
    print(f"{args.output}: {text}, token {at}")


if __name__ == "__main__":
    main()
