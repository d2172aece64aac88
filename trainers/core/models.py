"""Loading models. Weights are safetensors only; code that comes with a model runs only if the spec says so."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from trainers.contract import BadInput
from trainers.core.adapters import check_names, with_adapters
from trainers.core.batch import Packing
from trainers.core.chat import ChatFormat, chat_format
from trainers.core.chat_settings import apply_chat_settings
from trainers.core.compiling import compile_layers
from trainers.core.context import PhaseContext
from trainers.core.heads import is_adapted, is_plain
from trainers.core.hub import hub_name
from trainers.core.layers import hold, hold_angles, keep_layers, keep_split_layers
from trainers.core.products import hasten
from trainers.core.quantization import FourBit
from trainers.core.sharding import Sharding, is_split, whole_shape
from trainers.core.vocabulary import num_known
from trainers.core.weights import check_trainable, read_config, read_model
from trainers.rotary import same_angles
from trainers.spec import Lora, ModelRef, Parallel, RewardModelRef

transformers_logging.disable_progress_bar()

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class LoadedModel:
    model: Any
    tokenizer: Any
    chat: ChatFormat
    adapters: Any = None
    """The peft model around ``model`` when low-rank adapters are trained."""
    export_dtype: torch.dtype | None = None
    """Type of the weights that are saved; None: as they are held."""
    num_known: int | None = None
    """Responses hold ids below this alone: a phase lowers it to what those embed who read the responses. None: no limit."""
    whole_turns: bool = False
    """Of a reward model from elsewhere: it is read at the end of all that its template writes, not of the response."""
    packs: Packing = Packing.ROWS
    """How several sequences can share a row without seeing each other; the start-up check finds out."""

    @property
    def positions(self) -> int:
        """Tokens that the model was made for."""
        return context_length(self.model)

    @property
    def num_parameters(self) -> int:
        """Of what is saved: adapters are merged into the weights, and a trained head replaces the one it copies."""
        gone = ("lora_", "original_module")
        kept = [p for name, p in self.model.named_parameters() if not any(part in name for part in gone)]
        return sum(whole_shape(p).numel() for p in kept)


def load_causal_lm(
    ctx: PhaseContext,
    ref: ModelRef | None,
    lora: Lora | None = None,
    frozen: bool = False,
    like: LoadedModel | None = None,
) -> LoadedModel:
    """A causal language model with its tokenizer, on the device.

    ``like`` holds the weights as another model does, unless the reference says how: two copies of a model give the same
    numbers only if both are held in the same type (bf16 beside fp32 under autocast: 0.04 nats a token).
    """
    dtype = like.model.dtype if like is not None and ref is not None and ref.dtype == "auto" else None
    dtype = dtype or held_in(ctx, ref, frozen or lora is not None)
    return prepared(ctx, *causal_lm(ctx, ref, dtype, sharding_of(ctx, frozen), lora), lora, frozen)


def load_some_layers(
    ctx: PhaseContext, ref: ModelRef, layers: tuple[int, ...], lora: Lora | None = None
) -> LoadedModel:
    """A model to be trained that starts from another one's chosen decoder layers, embeddings and head."""
    sharding = sharding_of(ctx, frozen=False)
    _check_target_modules(ctx, ref, lora)
    model, tokenizer = causal_lm(ctx, ref, held_in(ctx, ref, frozen=lora is not None), sharding)
    small = (
        keep_split_layers(model, layers, sharding.apply)
        if sharding is not None and is_split(model)
        else keep_layers(model, layers)
    )
    return prepared(ctx, small, tokenizer, lora, frozen=False)


def sharding_of(ctx: PhaseContext, frozen: bool) -> Sharding | None:
    """How a model is split over processes."""
    return ctx.workers.frozen_sharding if frozen else ctx.workers.trained_sharding


def held_in(ctx: PhaseContext, ref: ModelRef | RewardModelRef | None, frozen: bool) -> torch.dtype:
    """The type of a model's weights; ``frozen``: they are not trained."""
    dtype = ref.dtype if ref is not None else "auto"
    if dtype == "bf16" and not ctx.workers.bf16:
        raise BadInput("dtype bf16 needs parallel.precision bf16: unless told this device computes in fp32")
    if dtype == "auto":
        return torch.bfloat16 if frozen and ctx.workers.bf16 else torch.float32
    return DTYPES[dtype] or torch.float32


def causal_lm(
    ctx: PhaseContext,
    ref: ModelRef | None,
    dtype: torch.dtype,
    sharding: Sharding | None = None,
    lora: Lora | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer). From files it is split, or packed beneath adapters, as it is read; a model made here is whole."""
    if ref is None:
        raise BadInput("model: name one (in a run, the run's own model takes its place)")
    if ref.scratch is None:
        _check_target_modules(ctx, ref, lora)
        return pretrained(AutoModelForCausalLM, ctx, ref, dtype, sharding, four_bit_of(ctx, lora))
    from trainers.core.scratch import scratch_model

    model, tokenizer = scratch_model(ref.scratch, ctx.seed, Path(ctx.file.base_dir))
    apply_chat_settings(tokenizer, ref, ctx.base_dir)
    return hold(model, dtype), tokenizer


def _check_target_modules(ctx: PhaseContext, ref: ModelRef, lora: Lora | None) -> None:
    """Raise BadInput for names that no layer of the model has, before its weights are read."""
    if lora is None or not lora.target_modules:
        return
    config = read_config(ctx.model_location(ref), ref.trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=ref.trust_remote_code)
    except (ValueError, RuntimeError):  # no such model, or one whose making looks at numbers: reading it tells
        return
    check_names(model, list(lora.target_modules))


def four_bit_of(ctx: PhaseContext, lora: Lora | None) -> FourBit | None:
    """How a base is packed beneath adapters; None: it is not."""
    if lora is None or lora.quantization is None:
        return None
    strategy = ctx.spec.parallel.strategy
    if strategy in ("fsdp", "deepspeed"):  # an accelerate file's, which the spec did not know
        raise BadInput(f"lora.quantization {lora.quantization} cannot be split by strategy {strategy}: use ddp")
    return FourBit(torch.bfloat16 if ctx.workers.bf16 else torch.float32, ctx.workers.device)


def context_length(model: Any) -> int:
    """Positions that the model was made for; a very large number when its kind has no limit."""
    return positions(model.config)


def positions(config: Any) -> int:
    text = config.get_text_config()
    limits = (getattr(text, "max_position_embeddings", None), same_angles(vars(text)))
    return min((limit for limit in limits if limit), default=2**20)


def length_limit(loaded: LoadedModel, wanted: int) -> int:
    """Tokens of a sequence that is trained on: no more than the model has positions. What is cut to it is counted."""
    return min(wanted, context_length(loaded.model))


def pretrained(
    auto: Any,
    ctx: PhaseContext,
    ref: ModelRef | RewardModelRef,
    dtype: torch.dtype,
    sharding: Sharding | None = None,
    four_bit: FourBit | None = None,
) -> tuple[Any, Any]:
    location = ctx.model_location(ref)
    model, tokenizer = read_model(auto, location, dtype, ref.trust_remote_code, sharding, four_bit)
    if ref.source is not None and hub_name(ref.source, ctx.base_dir) is not None:
        model.config._name_or_path = ref.source  # what adapters name as their base, not this machine's cache
    apply_chat_settings(tokenizer, ref, ctx.base_dir)
    return model, tokenizer


def prepared(ctx: PhaseContext, model: Any, tokenizer: Any, lora: Lora | None, frozen: bool) -> LoadedModel:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    place(ctx, model, frozen)
    _hold_angles(ctx, model)
    chat = chat_format(tokenizer, model)
    if ctx.spec.parallel.compile:
        compile_layers(model, ctx.workers.device)
    elif ctx.workers.zero is None:
        hasten(model)
    if frozen:
        model.requires_grad_(False).eval()
        return LoadedModel(model, tokenizer, chat, num_known=num_known(model, tokenizer))
    if four_bit_of(ctx, lora) is None:
        check_trainable(model)
    if ctx.spec.parallel.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    adapters = with_adapters(model, lora, ctx.seed) if lora is not None else None
    check_adapters(ctx.spec.parallel, adapters)
    check_head(ctx.spec.parallel, model)
    for parameter in model.parameters():
        if adapters is not None and parameter.requires_grad:
            parameter.data = parameter.data.to(ctx.workers.device)  # made beside weights that may lie elsewhere
    plain = adapters.base_model.model if adapters is not None else model
    dtype = DTYPES[ctx.spec.export_dtype]
    return LoadedModel(plain, tokenizer, chat, adapters, dtype, num_known=num_known(model, tokenizer))


def _hold_angles(ctx: PhaseContext, model: Any) -> None:
    hold_angles(model)
    whole, limit = getattr(model.config.get_text_config(), "max_position_embeddings", None), context_length(model)
    if ctx.workers.is_main and whole and limit < whole:
        print(
            f"{model.config.model_type}: rotary angles change beyond {limit} tokens (longrope), so rows have no more; "
            "with a short_factor that equals long_factor in config.json the model has the long ones' for all rows"
        )


def check_adapters(parallel: Parallel, adapters: Any) -> None:
    """Raise BadInput for adapters that peft puts into stacked weights where those are gathered layer by layer when called.

    It reads them, and its own, around the layers that own them: FSDP has gathered a whole decoder layer then, ZeRO nothing.
    """
    config = adapters.peft_config["default"] if adapters is not None else None
    taken = sorted(getattr(config, "target_parameters", None) or ())
    if taken and parallel.strategy == "deepspeed" and parallel.splits_weights:
        raise BadInput(
            f"lora: experts' stacked weights ({', '.join(taken)}) can have no adapters under ZeRO's stage 3: "
            "set targetModules without them, stage 2, or strategy fsdp"
        )


def check_head(parallel: Parallel, model: Any) -> None:
    """Raise BadInput for a language head whose split weights could not be gathered: one that is no linear layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if parallel.splits_weights and head is not None and not (is_plain(head) or is_adapted(head)):
        raise BadInput(
            f"a language head of type {type(head).__name__} cannot be used under strategy {parallel.strategy}, which "
            "splits its weights: set strategy ddp"
        )


def place(ctx: PhaseContext, model: Any, frozen: bool) -> None:
    """Put a model on the device, whole or this process's part of it."""
    sharding = sharding_of(ctx, frozen)
    if sharding is None:
        model.to(ctx.workers.device)
    else:
        sharding.apply(model)


def speak_alike(teacher: LoadedModel, student: LoadedModel) -> None:
    """Give a base model the chat format of an instruct model of its family. What it has learned to end with still ends."""
    student.tokenizer.chat_template = teacher.tokenizer.chat_template
    if teacher.tokenizer.eos_token in student.tokenizer.get_vocab():
        student.tokenizer.eos_token = teacher.tokenizer.eos_token
    student.chat = chat_format(student.tokenizer, student.model)
