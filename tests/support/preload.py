"""What the fork server of ranks.py imports, once for all ranks."""

import importlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks at it as it is imported

for name in (
    *(
        "torch",
        "torchmetrics",
        "pytest",
        "pandas",
        "dtrain.trainer.trainer",
        "dtrain.trainer.checkpoint.storage",
        "deepspeed",
    ),
    # DeepSpeed's engines import the rest as they are made.
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3"),
    *("torch._inductor.compile_fx", "matplotlib.backends.backend_agg", "matplotlib.figure"),
):
    importlib.import_module(name)

# Looking for a compiler takes a second, for each rank that does.
importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
