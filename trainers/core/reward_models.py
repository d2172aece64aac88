"""Scalar reward models: loaded, or made of a causal model's backbone."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from trainers.contract import BadInput
from trainers.core.chat import chat_format
from trainers.core.context import PhaseContext
from trainers.core.models import LoadedModel, causal_lm, held_in, prepared, pretrained
from trainers.spec import Lora, ModelRef, RewardModelRef


def load_reward_model(ctx: PhaseContext, ref: RewardModelRef, frozen: bool = True) -> LoadedModel:
    """A one-label sequence classifier with its tokenizer, on the device."""
    model, tokenizer = pretrained(AutoModelForSequenceClassification, ctx, ref, held_in(ctx, ref, frozen))
    if model.config.num_labels != 1:
        raise BadInput(f"{ref.source or ref.phase} has {model.config.num_labels} labels; a reward model has one")
    return prepared(ctx, model, tokenizer, None, frozen)


def new_reward_model(ctx: PhaseContext, ref: ModelRef | None, lora: Lora | None) -> tuple[LoadedModel, Any]:
    """A causal model's backbone with a fresh scalar head (normal, std 1/sqrt(H+1), as in InstructGPT's successors).

    Also returns the causal model, which shares the backbone and is not part of what is saved.
    """
    base, tokenizer = causal_lm(ctx, ref, held_in(ctx, ref, frozen=lora is not None))
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
    return prepared(ctx, model, tokenizer, lora, frozen=False), base


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
