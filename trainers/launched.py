"""What ``accelerate launch`` was told, by its arguments or its configuration file. Imports no torch.

It is passed on as environment variables, from which accelerate would wrap models by itself. Here it decides where the run
leaves the choice (``parallel.strategy: auto``), and must agree with the run where it does not.
"""

import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from trainers.contract import BadInput
from trainers.spec import DeepSpeed, Fsdp, Parallel

USES = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_FSDP": "fsdp"}
"""Variables that would make accelerate do what the strategy does."""


def as_launched(parallel: Parallel, environment: MutableMapping[str, str]) -> Parallel:
    """The settings with what the launcher decides, whose variables are taken out of the environment.

    Raises BadInput where it contradicts the run, asks for what there is not, or has started too few processes.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return parallel
    _check_started(environment)
    if problems := list(_problems(parallel, environment)):
        raise BadInput(f"accelerate launch {problems[0]}")
    strategy = next((name for variable, name in USES.items() if _is_set(environment, variable)), None)
    wanted = _parallel(strategy, environment)
    for variable in USES:
        environment.pop(variable, None)
    if wanted is None:
        return parallel
    return _agreed(parallel, wanted)


def _check_started(environment: Mapping[str, str]) -> None:
    """On CPUs alone it starts one process whatever it was told, and only leaves an address for others."""
    if "MASTER_ADDR" in environment and "RANK" not in environment:
        raise BadInput(
            "accelerate launch was told to start several processes and started one, as it does on CPUs: "
            "start them with torchrun --nproc-per-node N -m trainers"
        )


def _problems(parallel: Parallel, environment: Mapping[str, str]) -> Iterator[str]:
    precision = environment["ACCELERATE_MIXED_PRECISION"]
    if precision not in ("no", "fp32", "bf16"):
        yield f"--mixed_precision {precision} is not available: use bf16 or no, and parallel.precision"
    if precision == "bf16" and parallel.precision != "bf16":
        yield f"--mixed_precision bf16 contradicts parallel.precision {parallel.precision}: set bf16 there, or no here"
    passes = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if passes not in ("1", "auto"):
        yield f"--gradient_accumulation_steps {passes}: the run's batchSize and parallel.microBatchTokens decide; leave it"
    if environment.get("ACCELERATE_GRADIENT_CLIPPING", "none") not in ("none", "auto"):
        yield "--gradient_clipping: the run's optim.maxGradNorm decides; leave it"
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "NO") not in ("NO", "no"):
        yield "--dynamo_backend: parallel.compile decides; leave it"
    if _is_set(environment, "ACCELERATE_USE_MEGATRON_LM"):
        yield "--use_megatron_lm is not available: use --use_fsdp or --use_deepspeed"
    if _is_set(environment, "ACCELERATE_USE_FSDP") and environment.get("FSDP_VERSION", "1") != "2":
        yield "--use_fsdp means FSDP's first version, which is not available: add --fsdp_version 2"


def _parallel(strategy: str | None, environment: Mapping[str, str]) -> Parallel | None:
    """The settings that the launcher asks for; None: it leaves them to the run."""
    if strategy == "fsdp":
        fsdp = Fsdp(
            cpu_offload=_is_set(environment, "FSDP_OFFLOAD_PARAMS"),
            reshard_after_forward=environment.get("FSDP_RESHARD_AFTER_FORWARD", "true") in ("true", "1", "full_shard"),
        )
        return Parallel(strategy="fsdp", fsdp=fsdp)
    return Parallel(strategy="deepspeed", deepspeed=_deepspeed(environment)) if strategy else None


def _deepspeed(environment: Mapping[str, str]) -> DeepSpeed:
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file not in (None, "none"):
        return _of_file(str(Path(str(file)).absolute()))
    device = "ACCELERATE_DEEPSPEED_OFFLOAD_{}_DEVICE"
    offloads = [environment.get(device.format(what), "none") for what in ("OPTIMIZER", "PARAM")]
    if unknown := set(offloads) - {"none", "cpu"}:
        raise BadInput(f"accelerate launch: offloading to {unknown.pop()} is not available: use cpu or none")
    stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return _checked(stage, offloads[0] == "cpu", offloads[1] == "cpu", None)


def _of_file(file: str) -> DeepSpeed:
    """What a DeepSpeed file says; its other keys are checked where it is used."""
    try:
        zero = json.loads(Path(file).read_text()).get("zero_optimization", {})
        devices = [zero.get(name, {}).get("device") == "cpu" for name in ("offload_optimizer", "offload_param")]
        stage = zero.get("stage", 2)
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"accelerate launch: the DeepSpeed file {file} cannot be read: {error}") from error
    return _checked(2 if stage == "auto" else stage, devices[0], devices[1], file)


def _checked(stage: object, optimizer: bool, parameters: bool, file: str | None) -> DeepSpeed:
    if stage not in (1, 2, 3):
        raise BadInput(f"accelerate launch: ZeRO's stage is {stage}: it must be 1, 2 or 3")
    if parameters and stage != 3:
        raise BadInput(f"accelerate launch: offloading parameters needs ZeRO's stage 3, it is {stage}")
    return DeepSpeed(stage=stage, offload_optimizer=optimizer, offload_parameters=parameters, config=file)


def _agreed(parallel: Parallel, wanted: Parallel) -> Parallel:
    """Raises BadInput if both say what they want, and it is not the same, or cannot be had together."""
    name = wanted.strategy
    if parallel.compile and wanted.deepspeed is not None and wanted.deepspeed.stage == 3:
        raise BadInput(
            "accelerate launch asks for ZeRO's stage 3, with which parallel.compile cannot be had: take FSDP, "
            "or set compile: false"
        )
    if parallel.strategy == "auto":
        return parallel.model_copy(update={"strategy": name, name: getattr(wanted, name)})
    if parallel.strategy != name:
        raise BadInput(
            f"accelerate launch asks for {name}, parallel.strategy is {parallel.strategy}: make them one, or set auto"
        )
    ours, theirs = getattr(parallel, name), getattr(wanted, name)
    if ours is None:
        return parallel.model_copy(update={name: theirs})
    for field in ("stage", "offload_optimizer", "offload_parameters", "cpu_offload"):
        if getattr(ours, field, None) != getattr(theirs, field, None):
            raise BadInput(
                f"accelerate launch asks for {name} with {field} {getattr(theirs, field)}, parallel.{name} says "
                f"{getattr(ours, field)}: make them one"
            )
    return parallel


def _is_set(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() in ("true", "1", "yes")
