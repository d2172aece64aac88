"""Reward models as others make them: encoders with their own tokenizers, random and tiny."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

WORDS = ("open close hat box copy reverse the a b c d e yes no A B C D E F G H please ok : user assistant").split()  # noqa: SIM905

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 66, "pad_token_id": 1},
    "deberta-v2": {"pos_att_type": ["p2c", "c2p"], "relative_attention": True, "position_biased_input": False},
    "electra": {"embedding_size": 32},
    "modernbert": {"global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
}


def encoder_tokenizer(pad_first: bool = True) -> Any:
    """Words, with `[CLS] question [SEP] answer [SEP]` and token types."""
    special = SPECIAL if pad_first else ("[UNK]", "[PAD]", *SPECIAL[2:])
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save_encoder(kind: str, folder: Path) -> Path:
    """A random one-label classifier with its tokenizer."""
    tokenizer = encoder_tokenizer(pad_first=kind != "roberta")
    if kind in ("roberta", "modernbert"):  # these have one token type, or none
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    more = {"max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id, **ENCODERS[kind]}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), num_labels=1, **sizes, **more)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # else all scores are nearly the same
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
