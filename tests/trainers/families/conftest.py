"""Folders of tiny models of every family."""

import pytest


@pytest.fixture(scope="session")
def family_dirs(tiny_model_dir, tmp_path_factory):
    """``family_dirs(name)``: folders of a model and of a classifier, or None, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = _save(name, tiny_model_dir, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def _save(name, tokenizer_dir, folder):
    import torch
    from families.architectures import family_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = family_model(name, len(tokenizer), **special)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    try:
        torch.manual_seed(1)
        model.config.num_labels = 1
        classifier = AutoModelForSequenceClassification.from_config(model.config)
    except ValueError:
        return folder / "model", None
    classifier.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    return folder / "model", folder / "reward"
