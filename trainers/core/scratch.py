"""Models made on the spot: random Llama weights and a tokenizer learned from the run's own text."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainers import json_text
from trainers.contract import BadInput
from trainers.core.sources import raw_rows
from trainers.spec import ScratchModel, ScratchTokenizer

SPECIAL = ("<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>")

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""Words stay separated by single spaces, so word-level tokens come back as the same text."""


def scratch_model(spec: ScratchModel, seed: int, base_dir: Path) -> tuple[Any, Any]:
    """(model, tokenizer). The same spec and seed give the same weights."""
    tokenizer = scratch_tokenizer(spec.tokenizer, base_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size or 4 * spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_heads,
        max_position_embeddings=spec.max_positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config), tokenizer


def scratch_tokenizer(spec: ScratchTokenizer, base_dir: Path) -> Any:
    texts = sorted(set(_texts(spec, base_dir)))
    if not texts:
        raise BadInput("scratch.tokenizer.trainOn: no text")
    core = _words(texts, spec.vocab_size) if spec.kind == "word" else _bytes(texts, spec.vocab_size)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _texts(spec: ScratchTokenizer, base_dir: Path) -> list[str]:
    """Every text in every row, those of turns too; only not who speaks."""
    return [text for row in _all_rows(spec, base_dir) for text in _in(row) if text]


def _all_rows(spec: ScratchTokenizer, base_dir: Path) -> Iterator[Any]:
    for source in spec.train_on:
        for place, raw in islice(raw_rows(source, base_dir), source.limit):
            try:
                yield json_text.value(raw)
            except json_text.Malformed as problem:
                raise BadInput(f"{place}: {problem}") from problem


def _in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "from"):
                yield from _in(item)


def _words(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL)))
    return tokenizer


def _bytes(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
