"""The names of TRL, transformers, accelerate, PEFT and DeepSpeed that this package uses and no release promises.

`names` lists the private names by feature and checks them, `uses` and `engines` are the functions that touch them, and
`releases` says which versions the package is tested with. `tests/test_private_names.py` finds a private name of
another package anywhere else. Other packages are imported when a function needs them, so that the command line can
print versions without loading torch. `python -m trl_qtarget.compat` prints what an issue report needs.

May import `loss` and `theory`.
"""

from .engines import (
    is_zero3_shard,
    parallelism_config,
    prepare_frozen,
    rows_before_repeats,
    sequence_parallel_size,
    shards_weights,
    summed_parts,
    tensor_parallel_size,
    zero3_shape,
)
from .names import NAMES, PARAMETERS, TRAINER_ATTRIBUTES, check_names, check_trainer, find
from .releases import PACKAGES, TESTED, about, outside, report, tested, versions, warn_if_outside
from .uses import (
    ACCELERATE_LAUNCH,
    accelerate_profiles,
    backbone,
    balancing_loss,
    column_names,
    count_train_tokens,
    create_model,
    forward_of_instance,
    keep_columns,
    launch_parser,
    launch_settings,
    metrics,
    run_launch,
    run_trl,
    script_arguments,
    split_warmup,
    targets_module,
    tokenizer,
    trains_on_images,
    trl_commands,
)
