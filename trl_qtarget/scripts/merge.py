"""Merge an adapter into its base model; every command and plain transformers can load the folder that is written.

trl-qtarget merge --model_name_or_path outputs/sft --output_dir outputs/sft-merged

The merged model has the data type and the generation settings of the base model, and the tokenizer and chat template
of the adapter. If its logits differ from those of base and adapter on a few tokens, nothing is written.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..files import whole_folder
from ..options.parsing import StrictParser, fail


PROG = "trl-qtarget merge"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class MergeArguments:
    """The options of `trl-qtarget merge`."""

    model_name_or_path: str = field(metadata={"help": "folder of the adapter"})
    output_dir: str = field(metadata={"help": "folder for the merged model, new or empty"})
    dtype: str = field(
        default="auto", metadata={"help": f"one of {', '.join(DTYPES)}; auto keeps that of the base model"}
    )
    model_revision: str | None = field(default=None, metadata={"help": "revision of the base model on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that comes with a model"})

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")


def make_parser(prog: str | None = None) -> StrictParser:
    return StrictParser(MergeArguments, prog=prog or PROG, description=(__doc__ or "").split("\n")[0])


def mistakes(args: MergeArguments) -> list[str]:
    """Return one line for each mistake that can be found before anything is loaded."""
    adapter, out, found = Path(args.model_name_or_path), Path(args.output_dir), []
    if not (adapter / "adapter_config.json").is_file():
        found.append(f"model_name_or_path: the folder {adapter} holds no adapter (no adapter_config.json)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found.append(f"output_dir {out} is not empty: give another --output_dir")
    return found


def main(args: MergeArguments) -> None:
    """Merge and print the difference in logits; a mistake of the user is one sentence and exit code 2."""
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
    """Merge, check and save; return the largest difference of logits as a share of the largest logit.

    The saved folder is loaded again before it gets its name, since a base whose embeddings were tied might be tied
    again by an older transformers, and then compute other logits.

    Raises:
        ValueError: the merged or the reloaded model computes other logits, or the adapter cannot be merged.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..model.merging import compare_logits, merge_adapter

    model = _load(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    merged, difference = merge_adapter(model)
    with whole_folder(Path(args.output_dir)) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(
            folder, dtype=merged.dtype, trust_remote_code=args.trust_remote_code, use_safetensors=True
        )
        return max(difference, compare_logits(again.eval(), merged, "The saved folder's"))


def _load(args: MergeArguments):
    """Load the adapter and its base model.

    Raises:
        ValueError: the adapter is for another task, or does not change weights.
    """
    from peft import AutoPeftModelForCausalLM, PeftConfig

    config = PeftConfig.from_pretrained(args.model_name_or_path)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"The adapter is for {config.task_type}: only adapters for CAUSAL_LM are merged.")
    if config.is_prompt_learning:
        raise ValueError(f"An adapter of type {config.peft_type} changes no weights, so it cannot be merged.")
    config.revision = args.model_revision or config.revision
    model = AutoPeftModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        use_safetensors=True,
    )
    return model.eval()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
