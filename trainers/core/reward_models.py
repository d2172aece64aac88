"""Scalar reward models: loaded, or made of a causal model's backbone."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from trainers.contract import BadInput
from trainers.core.chat import chat_format
from trainers.core.classifiers import RewardModel, TextClassifier, check_text_scores
from trainers.core.context import PhaseContext
from trainers.core.layers import score_head
from trainers.core.models import LoadedModel, causal_lm, held_in, prepared, pretrained, sharding_of
from trainers.core.rewards import check_reward_scoring, reads_last_token
from trainers.core.sharding import Sharding, is_split
from trainers.core.weights import read_config
from trainers.spec import Lora, ModelRef, RewardModelRef

MARK = "score_token_ids"
"""In the config of the project's own reward models: the tokens at which, as a response's last, a score is read."""


def load_reward_model(ctx: PhaseContext, ref: RewardModelRef) -> RewardModel:
    """A frozen one-label sequence classifier with its tokenizer, on the device, read as its architecture demands.

    One whose score is a linear layer on its last token's hidden state is scored as the project's own are; any other by
    its own forward. Raises BadInput for a model that has not one label.
    """
    sharding = sharding_of(ctx, frozen=True) if _has_score_layer(ctx, ref) else None
    model, tokenizer = _classifier(ctx, ref, held_in(ctx, ref, frozen=True), sharding)
    if isinstance(getattr(model, "score", None), nn.Linear):
        loaded = prepared(ctx, model, tokenizer, None, frozen=True)
        loaded.whole_turns = ref.phase is None and not hasattr(model.config, MARK)
        if reads_last_token(loaded, ctx.workers):
            return loaded
    if is_split(model) or (ref.dtype == "auto" and model.dtype != torch.float32):
        dtype = torch.float32 if ref.dtype == "auto" else held_in(ctx, ref, frozen=True)
        model, tokenizer = _classifier(ctx, ref, dtype, None)
    return _text_classifier(ctx, model, tokenizer)


def _has_score_layer(ctx: PhaseContext, ref: RewardModelRef) -> bool:
    config = read_config(ctx.model_location(ref), ref.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=ref.trust_remote_code)
    return isinstance(getattr(model, "score", None), nn.Linear)


def load_value_model(ctx: PhaseContext, ref: RewardModelRef) -> LoadedModel:
    """A one-label sequence classifier to be trained further, read at every token. Raises BadInput for other kinds."""
    model, tokenizer = _classifier(ctx, ref, held_in(ctx, ref, frozen=False), sharding_of(ctx, frozen=False))
    if not isinstance(getattr(model, "score", None), nn.Linear):
        kind = model.config.model_type
        raise BadInput(f"reward models of type {kind} score a text as a whole, so none of its tokens has a value")
    loaded = prepared(ctx, model, tokenizer, None, frozen=False)
    check_reward_scoring(loaded, ctx.workers)
    return loaded


def _classifier(
    ctx: PhaseContext, ref: RewardModelRef, dtype: torch.dtype, sharding: Sharding | None
) -> tuple[Any, Any]:
    model, tokenizer = pretrained(AutoModelForSequenceClassification, ctx, ref, dtype, sharding)
    if model.config.num_labels != 1:
        raise BadInput(f"{ref.source or ref.phase} has {model.config.num_labels} labels; a reward model has one")
    return model, tokenizer


def _text_classifier(ctx: PhaseContext, model: Any, tokenizer: Any) -> TextClassifier:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    classifier = TextClassifier(model.to(ctx.workers.device).requires_grad_(False).eval(), tokenizer)
    check_text_scores(ctx.workers, classifier)
    return classifier


def new_reward_model(ctx: PhaseContext, ref: ModelRef | None, lora: Lora | None) -> tuple[LoadedModel, Any]:
    """A causal model's backbone with a fresh scalar head (normal, std 1/sqrt(H+1), as in InstructGPT's successors).

    Also returns what has the causal model's head, which shares the backbone's weights and is not part of what is saved.
    """
    dtype = held_in(ctx, ref, frozen=lora is not None)
    base, tokenizer = causal_lm(ctx, ref, dtype, _sharding_of_base(ctx, ref), lora)
    stop_ids = chat_format(tokenizer, base).stop_ids
    _own_pad_token(base, tokenizer, stop_ids)
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    if len(stop_ids) > 1:  # a classifier has no generation settings to keep them in
        config.eos_token_id = sorted(stop_ids)
    setattr(config, MARK, sorted(stop_ids))
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
    base.requires_grad_(lora is None)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    loaded = prepared(ctx, model, tokenizer, lora, frozen=False)
    if tied and is_split(model):
        return loaded, EmbeddingsAsHead(base)
    base.get_output_embeddings().to(ctx.workers.device)
    return loaded, base


class EmbeddingsAsHead(nn.Module):
    """A causal model whose head is its embeddings: these are called as the head too, which gathers what is split of them.

    Beside a classifier they are a group of their own, which the head's module knows nothing of.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.config = base.config
        self.embeddings = base.get_input_embeddings()
        if base.get_output_embeddings().bias is not None:
            raise BadInput("lmWeight: embeddings that are the head too cannot be split beside its bias: use ddp")

    def get_output_embeddings(self) -> nn.Module:
        return self.embeddings


def _sharding_of_base(ctx: PhaseContext, ref: ModelRef | None) -> Sharding | None:
    """None for a model whose embeddings are its head as well: read as one they could not be split apart from its head."""
    sharding = sharding_of(ctx, frozen=False)
    if sharding is None or ref is None or ref.scratch is not None:
        return None
    config = read_config(ctx.model_location(ref), ref.trust_remote_code)
    return None if config.get_text_config().tie_word_embeddings else sharding


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
        if is_split(model):
            raise BadInput(
                "model: its vocabulary has no token for padding, and none can be added where weights are split: use ddp"
            )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
