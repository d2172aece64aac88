"""Loading and saving models. Weights are safetensors only; code that comes with a model runs only if the spec says so."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from trainers.contract import BadInput, commit_directory
from trainers.core.chat import ChatFormat, chat_format
from trainers.core.context import PhaseContext
from trainers.spec import Lora, ModelRef, RewardModelRef

transformers_logging.disable_progress_bar()


@dataclass
class LoadedModel:
    model: Any
    tokenizer: Any
    chat: ChatFormat
    adapters: Any = None
    """The peft model around ``model`` when low-rank adapters are trained."""

    @property
    def num_parameters(self) -> int:
        """Of what is saved: adapters are merged into the weights, and a trained head replaces the one it copies."""
        gone = ("lora_", "original_module")
        return sum(p.numel() for name, p in self.model.named_parameters() if not any(part in name for part in gone))


def load_causal_lm(
    ctx: PhaseContext, ref: ModelRef | None, lora: Lora | None = None, frozen: bool = False
) -> LoadedModel:
    """A causal language model with its tokenizer, on the device.

    Trained weights are fp32 (bf16 arithmetic comes from autocast); frozen ones are held in the arithmetic's own type.
    """
    return _prepare(ctx, *_causal_lm(ctx, ref, frozen), lora, frozen)


def load_some_layers(ctx: PhaseContext, ref: ModelRef, layers: tuple[int, ...]) -> LoadedModel:
    """A model to be trained that starts from another one's chosen decoder layers, embeddings and head."""
    model, tokenizer = _causal_lm(ctx, ref, frozen=False)
    return _prepare(ctx, keep_layers(model, layers), tokenizer, None, frozen=False)


def _causal_lm(ctx: PhaseContext, ref: ModelRef | None, frozen: bool) -> tuple[Any, Any]:
    if ref is None:
        raise BadInput("model: name one (in a run, the run's own model takes its place)")
    if ref.scratch is None:
        return _pretrained(AutoModelForCausalLM, ctx, ref, frozen)
    from trainers.core.scratch import scratch_model

    return scratch_model(ref.scratch, ctx.seed, Path(ctx.file.base_dir))


def load_reward_model(ctx: PhaseContext, ref: RewardModelRef, frozen: bool = True) -> LoadedModel:
    """A one-label sequence classifier with its tokenizer, on the device."""
    model, tokenizer = _pretrained(AutoModelForSequenceClassification, ctx, ref, frozen)
    if model.config.num_labels != 1:
        raise BadInput(f"{ref.source or ref.phase} has {model.config.num_labels} labels; a reward model has one")
    return _prepare(ctx, model, tokenizer, None, frozen)


def new_reward_model(ctx: PhaseContext, ref: ModelRef | None, lora: Lora | None) -> tuple[LoadedModel, Any]:
    """A causal model's backbone with a fresh scalar head (normal, std 1/sqrt(H+1), as in InstructGPT's successors).

    Also returns the causal model, which shares the backbone and is not part of what is saved.
    """
    base, tokenizer = _causal_lm(ctx, ref, frozen=False)
    stop_ids = chat_format(tokenizer, base).stop_ids
    _own_pad_token(base, tokenizer, stop_ids)
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    if len(stop_ids) > 1:  # a classifier has no generation settings to keep them in
        config.eos_token_id = sorted(stop_ids)
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise BadInput(f"models of type {config.model_type} have no sequence-classification form") from error
    setattr(model, model.base_model_prefix, getattr(base, base.base_model_prefix))
    head = score_head(model).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(ctx.seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5)
        if head.bias is not None:
            head.bias.zero_()
    base.to(ctx.workers.device).requires_grad_(lora is None)
    return _prepare(ctx, model, tokenizer, lora, frozen=False), base


def _own_pad_token(model: Any, tokenizer: Any, stop_ids: frozenset[int]) -> None:
    """Give the tokenizer a pad token that ends no response.

    transformers' own classifiers read the score at the last token that is not the pad id. If that is the end token,
    they read the one before it and disagree with us (huggingface/transformers#35352).
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stop_ids:
        return
    free = [token for token in (tokenizer.bos_token, tokenizer.unk_token) if token is not None]
    free = [token for token in free if tokenizer.convert_tokens_to_ids(token) not in stop_ids]
    tokenizer.add_special_tokens({"pad_token": free[0] if free else "<|pad|>"})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def score_head(model: Any) -> Any:
    """The linear layer that makes a score of a hidden state, or peft's trained copy of it."""
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(getattr(head, "original_module", head), nn.Linear):
            return head
    raise BadInput(f"models of type {model.config.model_type} have no linear score head")


def keep_layers(model: Any, layers: tuple[int, ...]) -> Any:
    """A copy of a Llama-like model with only these decoder layers."""
    decoder = getattr(model, model.base_model_prefix)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise BadInput(
            f"teacherLayers needs a model with a plain list of decoder layers; {model.config.model_type} has none"
        )
    count = len(decoder.layers)
    if layers[-1] >= count:
        raise BadInput(f"teacherLayers {list(layers)}: the teacher has layers 0 to {count - 1}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    small = type(model)(config).to(next(model.parameters()).dtype)
    small.load_state_dict(_kept_weights(model, layers))
    # It may name more end tokens than the tokenizer does.
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def _kept_weights(model: Any, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The state dict with layers renumbered."""
    marker = f"{model.base_model_prefix}.layers."
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(marker):
            index, rest = name[len(marker) :].split(".", 1)
            if int(index) not in layers:
                continue
            weights[f"{marker}{layers.index(int(index))}.{rest}"] = tensor
        else:
            weights[name] = tensor
    return weights


def context_length(model: Any) -> int:
    """Positions that the model was made for; a very large number when its kind has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20


def save_model(loaded: LoadedModel, directory: Path) -> None:
    """Write a Hugging Face model directory, all or nothing."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if loaded.adapters is not None:
        loaded.model = loaded.adapters.merge_and_unload()
        loaded.adapters = None
    loaded.model.save_pretrained(temporary, safe_serialization=True)
    loaded.tokenizer.save_pretrained(temporary)
    commit_directory(temporary, directory)


def same_tokens(teacher: Any, student: Any) -> str | None:
    """Why the student's tokenizer cannot serve the teacher's, or None. Ids must mean the same text in both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    wrong = [token for token, index in theirs.items() if ours.get(token) != index]
    if wrong:
        return f"{len(wrong)} of the teacher's {len(theirs)} tokens have another id or none, for example {wrong[0]!r}"
    if teacher.eos_token_id != student.eos_token_id:
        return f"the end token is {student.eos_token!r}, the teacher's is {teacher.eos_token!r}"
    if teacher.chat_template != student.chat_template:
        return "the chat templates differ"
    return None


def _pretrained(auto: Any, ctx: PhaseContext, ref: ModelRef | RewardModelRef, frozen: bool) -> tuple[Any, Any]:
    location = ctx.model_location(ref)
    options = {"revision": ref.revision, "trust_remote_code": ref.trust_remote_code}
    dtype = torch.bfloat16 if frozen and ctx.workers.bf16 else torch.float32
    try:
        config = AutoConfig.from_pretrained(location, **options)
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        model = auto.from_pretrained(location, config=config, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"model {location} cannot be loaded: {reason}") from error
    return model, tokenizer


def _prepare(ctx: PhaseContext, model: Any, tokenizer: Any, lora: Lora | None, frozen: bool) -> LoadedModel:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(ctx.workers.device)
    chat = chat_format(tokenizer, model)
    if frozen:
        model.requires_grad_(False).eval()
        return LoadedModel(model, tokenizer, chat)
    if ctx.spec.parallel.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    adapters = _adapters(model, lora, ctx.seed) if lora is not None else None
    return LoadedModel(adapters.base_model.model if adapters is not None else model, tokenizer, chat, adapters)


def _adapters(model: Any, lora: Lora, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    head = "score" if hasattr(model, "score") else None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        modules_to_save=[head] if head else None,
    )
    torch.manual_seed(seed)
    try:
        adapters = get_peft_model(model, config)
    except ValueError as error:
        raise BadInput(f"lora.targetModules {list(lora.target_modules)}: {str(error).splitlines()[0]}") from error
    if model.is_gradient_checkpointing:
        # Frozen embeddings give the first checkpointed block no input that needs a gradient.
        adapters.enable_input_require_grads()
    return adapters
