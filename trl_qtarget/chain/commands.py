"""Facts about the commands that a chain can run."""

OUTPUT = {  # a command -> the name of its output in its stage's folder
    "sft": "model",
    "dpo": "model",
    "kto": "model",
    "grpo": "model",
    "rloo": "model",
    "reward": "model",
    "merge": "model",
    "cache": "cache",
    "eval": "results",
}
# with use_peft they write an adapter that a later stage can go on from
ADAPTING = ("sft", "dpo", "kto", "grpo", "rloo")
POLICIES = (*ADAPTING, "merge")  # the next stage starts from the model that they write
STEP0_CHECKED = ("dpo", "kto", "grpo", "rloo")  # they start with a reference model that equals the model
PLUGIN = ("sft", "cache", "plan", "eval", "merge")  # their scripts are in this package, those of the others in TRL
SET_BY_CHAIN = {  # options that a chain sets, and the reason why a file must not
    "output_dir": "every stage writes into the chain's output_dir",
    "resume_from_checkpoint": "a chain resumes by itself",
    "overwrite_output_dir": "a chain overwrites nothing",
    "overwrite": "a chain overwrites nothing",
}
