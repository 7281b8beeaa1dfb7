"""The `deepspeed` section: DeepSpeed's own keys, besides what the job already sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dtrain.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from dtrain.schema.sections import Fit

# Passed on as they are, from DeepSpeed 0.19, which silently ignores names it does not know.
_ITS_OWN = (
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "torch_autocast"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "disable_allgather", "data_types"),
    *("aio", "steps_per_print", "dump_state", "log_level", "wall_clock_breakdown", "memory_breakdown", "timers"),
    *("comms_logger", "flops_profiler", "disable_python_gc", "tensorboard", "wandb", "csv_monitor", "comet"),
)
_OF_THE_JOB = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "optimizer", "fp16", "bf16")
_SAME_SAMPLES = "would give ranks the same samples, but dtrain gives each rank its own; leave it out"
_REFUSED = {
    "gradient_accumulation_steps": "follows from data.batch_size, fit.micro_batch_size and the number of ranks; "
    "leave it out",
    "scheduler": "is the job's own, under scheduler; leave it out",
    "amp": "no longer exists in DeepSpeed; use fit.precision",
    "activation_checkpointing": "is set by dtrain: use fit.activation_checkpointing",
    "checkpoint": "is set by dtrain: use the section checkpoint",
    "dataloader_drop_last": "dtrain drops no sample; leave it out",
    "gradient_allreduce_op": "dtrain's gradient is the batch's mean; leave it out",
    "managed_gradient_accumulation": "is set by dtrain; leave it out",
    "tensor_parallel": _SAME_SAMPLES,
    "expert_parallel": _SAME_SAMPLES,
    "sequence_parallel_size": _SAME_SAMPLES,
    "pipeline": _SAME_SAMPLES,
    "data_efficiency": "would change the order of the samples, which dtrain determines; leave it out",
    "hybrid_engine": "is for reinforcement learning, which dtrain does not support; leave it out",
    "autotuning": "starts jobs of its own; leave it out",
    "compile": "is not supported; leave it out",
}


def stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage that a section asks for."""
    zero = config.get("zero_optimization")
    number = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    return int(number) if number in (1, 2, 3) else 0


def disagreements(
    config: Mapping[str, Any],
    fit: Fit,
    *,
    batch_size: int | None = None,
    optimizer: Mapping[str, Any] | None = None,
) -> Iterator[Problem]:
    """What a section contains that DeepSpeed does not know, that is not its to set here, or that contradicts the job.

    "auto", as other tools write it, sets nothing.

    Args:
        batch_size: None if it is not known yet; then any value is accepted.
        optimizer: the job's, with `_target_` and its arguments; None if unknown.
    """
    config = without_auto(config)
    said = {
        "train_batch_size": ("data.batch_size", batch_size or config.get("train_batch_size")),
        "train_micro_batch_size_per_gpu": ("fit.micro_batch_size", fit.micro_batch_size),
        "gradient_clipping": ("fit.clip_norm", fit.clip_norm or 0.0),
    }
    for key, value in config.items():
        path = f"deepspeed.{key}"
        if key in _REFUSED:
            yield Problem(_REFUSED[key], path)
        elif key in said and value != said[key][1]:
            yield Problem(f"is {value}, where {said[key][0]} is {said[key][1] or 'null'}; make them agree", path)
        elif key not in _ITS_OWN and key not in _OF_THE_JOB:
            hint = did_you_mean(key, [*_ITS_OWN, *_OF_THE_JOB]) or f"known keys: {', '.join(_ITS_OWN)}"
            yield Problem("unknown key", path, hint=hint)
    yield from _precision(config, fit.precision)
    if optimizer is not None and "optimizer" in config:
        yield from _optimizer(config["optimizer"], optimizer)
    yield from _zero(config.get("zero_optimization", {}), fit.ema)
    for name, value in (("l1", fit.l1), ("l2", fit.l2)):
        if value is not None:
            message = "needs whole weights, but ZeRO trains flattened shards of them; use ddp or fsdp"
            mend = ", or optimizer.groups with weight_decay" if name == "l2" else ""
            yield Problem(message + mend, f"fit.{name}")


def _precision(config: Mapping[str, Any], precision: str) -> Iterator[Problem]:
    if precision == "fp16":
        yield Problem("fp16 is not supported with deepspeed; use bf16, or fsdp", "fit.precision")
    for key in ("fp16", "bf16"):
        section = config.get(key, {})
        if not isinstance(section, Mapping) or section.get("enabled"):
            message = f"is on, where fit.precision is {precision}; dtrain computes in 16 bits by autocast and keeps the"
            yield Problem(
                f"{message} weights in float32: leave it out, and set fit.precision: bf16", f"deepspeed.{key}"
            )
    autocast = config.get("torch_autocast", {})
    if not isinstance(autocast, Mapping):
        yield Problem("expected a mapping", "deepspeed.torch_autocast")
    elif "enabled" in autocast and autocast["enabled"] != (precision == "bf16"):
        yield Problem(
            f"is {autocast['enabled']}, where fit.precision is {precision}", "deepspeed.torch_autocast.enabled"
        )
    elif autocast.get("dtype", "bfloat16") not in ("bf16", "bfloat16", "torch.bfloat16"):
        yield Problem(f"is {autocast['dtype']}, where fit.precision is {precision}", "deepspeed.torch_autocast.dtype")


def _optimizer(given: Any, optimizer: Mapping[str, Any]) -> Iterator[Problem]:
    path, name = "deepspeed.optimizer", str(optimizer["_target_"]).rpartition(".")[2]
    if not isinstance(given, Mapping):
        yield Problem("expected a mapping with type and params", path)
        return
    if str(given.get("type")).lower() != name.lower():
        yield Problem(f"is {given.get('type')}, where optimizer._target_ is {name}; make them agree", f"{path}.type")
    params = given.get("params", {})
    for key, value in params.items() if isinstance(params, Mapping) else ():
        if value != optimizer.get(key):
            message = f"is {value}, where optimizer.{key} is {optimizer.get(key, 'not given')}; make them agree"
            yield Problem(message, f"{path}.params.{key}")


def _zero(zero: Any, ema: float | None) -> Iterator[Problem]:
    path = "deepspeed.zero_optimization"
    if not isinstance(zero, Mapping):
        yield Problem("expected a mapping, such as {stage: 2}", path)
        return
    if zero.get("stage", 0) not in (0, 1, 2, 3) or isinstance(zero.get("stage"), bool):
        yield Problem(f"expected 0, 1, 2 or 3, found {zero['stage']}", f"{path}.stage")
    for part in ("offload_optimizer", "offload_param"):
        offload = zero.get(part) or {}
        if isinstance(offload, Mapping) and offload.get("device") == "nvme":
            yield Problem("dtrain's checkpoints do not include state on NVMe; use cpu", f"{path}.{part}.device")
    if zero.get("zenflow"):
        yield Problem("updates weights asynchronously, which is not exact; leave it out", f"{path}.zenflow")
    if ema is not None and zero.get("stage") == 3:
        yield Problem(
            "averages whole parameters, but stage 3 leaves each rank only a shard; use stage 2, or fsdp", "fit.ema"
        )


def filled(config: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The whole configuration for DeepSpeed, with what the job and dtrain decide."""
    config = without_auto(config)
    own = {key: value for key, value in config.items() if key in _ITS_OWN}
    if precision == "bf16":  # communicate in float32, unless the section names modules for which 16 bits are safe
        own["torch_autocast"] = {"lower_precision_safe_modules": [], **own.get("torch_autocast", {})}
        own["torch_autocast"] |= {"enabled": True, "dtype": "bfloat16"}
    return {
        "zero_allow_untested_optimizer": True,  # any elementwise optimizer
        "zero_force_ds_cpu_optimizer": False,  # its own is compiled on first use
        **own,
        "train_micro_batch_size_per_gpu": 1,  # required; ranks' shares may differ
        "gradient_clipping": 0.0,  # the loop clips the summed gradients before its step; its default is 1.0
    }


def without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same without the keys, at any depth, whose value is "auto"."""
    kept = {key: value for key, value in config.items() if value != "auto"}
    return {key: without_auto(value) if isinstance(value, Mapping) else value for key, value in kept.items()}
