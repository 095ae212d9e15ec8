"""Merge an adapter into its base model: a folder that every command and plain transformers load.

trl-qtarget merge --model_name_or_path outputs/sft --output_dir outputs/sft-merged

The weights keep the base model's type, the tokenizer and chat template are the adapter's, the generation settings the
base model's. The merged model must give the logits of base and adapter on a few tokens, or nothing is written.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from ..options.parsing import StrictParser, fail


PROG = "trl-qtarget merge"
DTYPES = ("auto", "float32", "bfloat16", "float16")
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}  # of the largest logit, some roundings of the type
PROBE = (4, 32)  # sequences of a probe batch and their tokens


@dataclass
class MergeArguments:
    """What `trl-qtarget merge` takes."""

    model_name_or_path: str = field(metadata={"help": "the adapter's folder"})
    output_dir: str = field(metadata={"help": "the merged model's folder, which must be new or empty"})
    dtype: str = field(default="auto", metadata={"help": f"one of {', '.join(DTYPES)}; auto is the base model's"})
    model_revision: str | None = field(default=None, metadata={"help": "the base model's revision on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that comes with a model"})

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")


def make_parser(prog: str | None = None) -> StrictParser:
    return StrictParser(MergeArguments, prog=prog or PROG, description=(__doc__ or "").split("\n")[0])


def mistakes(args: MergeArguments) -> list[str]:
    """What can be said before anything is loaded."""
    adapter, out, found = Path(args.model_name_or_path), Path(args.output_dir), []
    if not (adapter / "adapter_config.json").is_file():
        found.append(f"model_name_or_path: the folder {adapter} holds no adapter (no adapter_config.json)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found.append(f"output_dir {out} is not empty: give another --output_dir")
    return found


def main(args: MergeArguments) -> None:
    """Merge and say how well. A mistake is one sentence and exit code 2."""
    found = mistakes(args)
    if found:
        fail(PROG, *found)
    try:
        difference = merge(args)
    except (ValueError, OSError, ImportError) as mistake:
        fail(PROG, mistake)
    print({"logit_difference": difference})
    print(f"Merged model saved to {args.output_dir}.")


def merge(args: MergeArguments) -> float:
    """Merge, check and save. Returns the largest difference of logits, as a share of the largest logit.

    Raises:
        ValueError: the merged model is not the one that was trained.
    """
    import torch
    from transformers import AutoTokenizer

    model = _load(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    ids = torch.randint(len(tokenizer), PROBE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.float()
        merged = model.merge_and_unload(safe_merge=True)
        made = merged(input_ids=ids).logits.float()
    difference = float((made - wanted).abs().max() / wanted.abs().max())
    allowed = TOLERANCE[str(merged.dtype).removeprefix("torch.")]
    if not difference <= allowed:
        raise ValueError(
            f"The merged model's logits differ from those of base and adapter by {difference:.1e} of the largest, "
            f"more than the {allowed:.0e} of rounding in {merged.dtype}: nothing was written. Try --dtype float32."
        )
    _save(merged, tokenizer, Path(args.output_dir))
    return difference


def _load(args: MergeArguments):
    """Base and adapter."""
    from peft import AutoPeftModelForCausalLM, PeftConfig

    config = PeftConfig.from_pretrained(args.model_name_or_path)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"The adapter is for {config.task_type}: only those of causal language models are merged.")
    if config.is_prompt_learning:
        raise ValueError(f"An adapter of type {config.peft_type} is no change of weights, so it cannot be merged.")
    config.revision = args.model_revision or config.revision
    model = AutoPeftModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        use_safetensors=True,
    )
    return model.eval()


def _save(model, tokenizer, folder: Path) -> None:
    """A whole folder or none."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if folder.is_dir():
        folder.rmdir()  # empty, or this fails
    unfinished.rename(folder)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
