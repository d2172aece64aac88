"""DeepSpeed's configuration of a run: its ``parallel.deepspeed``, with a JSON file of the user's beneath. Imports no torch.

DeepSpeed ignores keys that it does not know, and a file may say what the run says too. So a key is allowed only if it is
known here not to change results; one that the run has a field for may say the same or ``auto``, which means that field.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainers.contract import BadInput
from trainers.spec import DeepSpeed

FIELDS = {
    "train_batch_size": "batchSize",
    "train_micro_batch_size_per_gpu": "parallel.microBatchTokens",
    "gradient_accumulation_steps": "parallel.microBatchTokens",
    "gradient_clipping": "optim.maxGradNorm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "parallel.precision",
    "bf16": "parallel.precision and the model's dtype",
    "amp": "parallel.precision",
    "torch_autocast": "parallel.precision",
    "data_types": "parallel.precision",
    "activation_checkpointing": "parallel.gradientCheckpointing",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
}
"""Keys that the run has fields for."""

ALLOWED = frozenset(
    {
        "zero_optimization", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
        "flops_profiler", "comms_logger", "tensorboard", "csv_monitor", "zero_optimization.allgather_bucket_size",
        "zero_optimization.allgather_partitions", "zero_optimization.contiguous_gradients",
        "zero_optimization.ignore_unused_parameters", "zero_optimization.log_trace_cache_warnings",
        "zero_optimization.memory_efficient_linear", "zero_optimization.offload_optimizer",
        "zero_optimization.offload_optimizer.buffer_count", "zero_optimization.offload_optimizer.device",
        "zero_optimization.offload_optimizer.fast_init", "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_optimizer.pipeline_read", "zero_optimization.offload_optimizer.pipeline_write",
        "zero_optimization.offload_optimizer.ratio", "zero_optimization.offload_param",
        "zero_optimization.offload_param.buffer_count", "zero_optimization.offload_param.buffer_size",
        "zero_optimization.offload_param.device", "zero_optimization.offload_param.max_in_cpu",
        "zero_optimization.offload_param.pin_memory", "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size", "zero_optimization.reduce_scatter",
        "zero_optimization.round_robin_gradients", "zero_optimization.stage",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save", "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.stage3_max_reuse_distance", "zero_optimization.stage3_module_granularity_threshold",
        "zero_optimization.stage3_param_persistence_threshold", "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.sub_group_size", "zero_optimization.use_multi_rank_bucket_allreduce",
        "zero_optimization.zero_hpz_partition_size",
    }
)  # fmt: skip
"""Keys that cannot change a result, by their dotted path."""

OPEN = ("flops_profiler", "comms_logger", "tensorboard", "csv_monitor")
"""Sections of which DeepSpeed checks the keys."""

ZERO = "zero_optimization"


def zero_config(settings: DeepSpeed, base_dir: Path) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given, but for the run's clipping. Raises BadInput for a file that may not be used.

    Gradients are summed by the run's own passes, so a step of DeepSpeed's is one pass of one example to it.
    """
    config = _without_auto(_read(settings.config, base_dir)) if settings.config is not None else {}
    if problems := list(key_problems(settings, config)):
        raise BadInput(f"parallel.deepspeed.config {settings.config}: {problems[0]}")
    own = {name: {"device": "cpu"} for name, wanted in _offloads(settings).items() if wanted}
    zero = config.get(ZERO, {})
    zero |= {"stage": settings.stage} | {name: zero.get(name, {}) | value for name, value in own.items()}
    return config | {
        ZERO: zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # torch's AdamW serves on the CPU too, and needs no compiler.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def key_problems(settings: DeepSpeed, config: Mapping[str, Any]) -> Iterator[str]:
    """What a DeepSpeed configuration holds that the run says, or that is not known to leave results as they are."""
    for path, value in _paths(config):
        if path in FIELDS:
            yield f"{path} is set by the run's {FIELDS[path]}: remove it"
        elif path not in ALLOWED:
            yield f"{path} is no setting that can be used here: remove it, or put what it means into the run"
        else:
            yield from _contradictions(settings, path, value)


def _contradictions(settings: DeepSpeed, path: str, value: Any) -> Iterator[str]:
    if path == f"{ZERO}.stage" and value != settings.stage:
        yield f"{path} is {value}, parallel.deepspeed.stage is {settings.stage}: remove it, or make them one"
    for name, wanted in _offloads(settings).items():
        device = value if path == f"{ZERO}.{name}.device" else None
        field = "offloadOptimizer" if name == "offload_optimizer" else "offloadParameters"
        if device is not None and device != ("cpu" if wanted else "none"):
            yield f"{path} is {device!r}, parallel.deepspeed.{field} is {str(wanted).lower()}: make them one"


def _offloads(settings: DeepSpeed) -> dict[str, bool]:
    return {"offload_optimizer": settings.offload_optimizer, "offload_param": settings.offload_parameters}


def _paths(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key by its dotted path; sections come before what is in them."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        yield path, value
        if isinstance(value, Mapping) and path not in OPEN and path not in FIELDS:
            yield from _paths(value, f"{path}.")


def _read(file: str, base_dir: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BadInput."""
    path = base_dir / file
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(
            f"parallel.deepspeed.config {file} cannot be read: {path.absolute()}: {error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"parallel.deepspeed.config {file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadInput(f"parallel.deepspeed.config {file}: must be a JSON object, is {type(found).__name__}")
    return found


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """``auto`` means the run's own setting, or DeepSpeed's default; a section that holds nothing else is left out."""
    found = {}
    for name, value in config.items():
        kept = _without_auto(value) if isinstance(value, dict) else value
        if value != "auto" and (kept or not isinstance(kept, dict)):
            found[name] = kept
    return found
