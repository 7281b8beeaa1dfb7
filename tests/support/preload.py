"""What the fork server of ranks.py imports, once for all ranks."""

import gc
import importlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks at it as it is imported

for name in (
    *("torch", "torchmetrics", "pytest", "pandas", "pandas.core.methods.to_dict", "pyarrow.pandas_compat"),
    *("dtrain.trainer.trainer", "dtrain.trainer.checkpoint.storage", "dtrain.trainer.metrics.metric_set"),
    *("dtrain.trainer.strategies.ddp", "dtrain.trainer.strategies.fsdp", "dtrain.trainer.strategies.deepspeed"),
    # torch and DeepSpeed import the rest as they are used.
    *("torch._inductor.compile_fx", "torch._dynamo.repro.after_dynamo", "torch.utils.serialization.config"),
    *("deepspeed", "deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer"),
    *("deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer"),
):
    importlib.import_module(name)

# Looking for a compiler takes a second, for each rank that does.
importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False

gc.collect()
gc.freeze()  # a rank's collection would look through a million objects, and copy their pages
