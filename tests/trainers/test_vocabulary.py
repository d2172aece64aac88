"""Which tokenizers can serve one another: an instruct teacher with its base student can, other ids cannot."""

import copy
import json

import pytest
import real_tokenizers
import torch
from chat_tokenizers import CHATML, OPEN, WITH_BOS, bytes_tokenizer

from trainers.core.models import LoadedModel, speak_alike
from trainers.core.vocabulary import same_ids, same_tokens
from trainers.vocabulary import Vocabulary, other_tokens, stored_vocabulary

TEXT = {"a": 0, "b": 1, "c": 2}


def words(more: dict[str, int] | None = None, padding: str | None = None) -> Vocabulary:
    return Vocabulary(TEXT | (more or {}), frozenset(more or {}), padding)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (words(), words()),
        (words({"<tool>": 3, "<call>": 4}), words()),
        (words({"<|finetune_pad|>": 3}), words({"<|reserved_7|>": 3})),
        (words({"<pad>": 3}, "<pad>"), words({"<pad>": 4}, "<pad>")),
    ],
)
def test_what_nothing_uses_may_differ(theirs, ours):
    assert other_tokens(theirs, ours) is None
    assert other_tokens(ours, theirs) is None


@pytest.mark.parametrize(
    ("theirs", "ours", "reason"),
    [
        (words(), Vocabulary({"a": 1, "b": 0, "c": 2}), "2 tokens have other ids, for example 'a' 1 and not 0"),
        (words({"<end>": 3}), words({"<end>": 4}), "1 token have other ids, for example '<end>' 4 and not 3"),
        (words(), Vocabulary({"a": 0, "b": 1}), "it lacks 1 token, for example 'c'"),
        (words(), Vocabulary(TEXT | {"d": 3, "e": 4}), "it has 2 tokens more, for example 'd'"),
    ],
)
def test_other_text_is_told(theirs, ours, reason):
    assert other_tokens(theirs, ours) == reason


def test_a_stored_vocabulary_is_the_loaded_one(tmp_path):
    tokenizer = bytes_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path)
    stored = stored_vocabulary(tmp_path)
    assert stored.ids == tokenizer.get_vocab()
    assert stored.added == frozenset(tokenizer.get_added_vocab())
    assert stored.padding == "<pad>"


def test_a_unigram_vocabulary_is_read_by_the_order_of_its_pieces(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}))
    assert stored_vocabulary(tmp_path).ids == {"a": 0, "b": 1}


# ---------------------------------------------------------------- formats


def test_the_name_of_the_end_token_is_no_matter_where_the_template_ends_turns():
    assert same_tokens(bytes_tokenizer(CHATML, eos="<|end|>"), bytes_tokenizer(CHATML, eos="<eos>")) is None


@pytest.mark.parametrize("template", [WITH_BOS, OPEN, None])
def test_another_end_token_is_told_with_what_to_set(template):
    reason = same_tokens(bytes_tokenizer(template, eos="<eos>"), bytes_tokenizer(template, eos="<|end|>"))
    assert reason == "the end token is '<|end|>', the other model's is '<eos>': set endToken to '<eos>'" or (
        template is None and "differ" in reason
    )


@pytest.mark.parametrize("student", [None, OPEN, WITH_BOS])
def test_another_template_is_told_with_what_to_set(student):
    reason = same_tokens(bytes_tokenizer(CHATML), bytes_tokenizer(student))
    assert reason == "the chat templates differ: set chatTemplate to the text, or the file, of the other model's"


def test_templates_that_write_the_same_are_the_same():
    noted = "{# a note #}" + CHATML
    assert same_tokens(bytes_tokenizer(CHATML), bytes_tokenizer(noted)) is None


def test_a_base_model_of_the_family_speaks_as_its_instruct_model_does():
    """Qwen2.5: the instruct tokenizer ends with <|im_end|> and has tool tokens, the base one has neither them nor a template."""
    instruct = real_tokenizers.tokenizer("qwen3")
    base = copy.deepcopy(instruct)
    base.chat_template, base.eos_token = None, "<|endoftext|>"
    assert "chat templates differ" in same_tokens(instruct, base)

    class Model:
        class generation_config:
            eos_token_id = base.eos_token_id

        @staticmethod
        def get_input_embeddings():
            return torch.nn.Embedding(151936, 1)

    student = LoadedModel(Model, base, chat=None)
    speak_alike(LoadedModel(None, instruct, chat=None), student)
    assert same_tokens(instruct, base) is None
    assert student.chat.stop_ids == {instruct.eos_token_id, Model.generation_config.eos_token_id}


@pytest.mark.parametrize("other", ["llama3_1", "gemma3"])
def test_families_are_not_mixed(other):
    assert "other ids" in same_tokens(real_tokenizers.tokenizer("qwen3"), real_tokenizers.tokenizer(other))


# ---------------------------------------------------------------- models that only read


def test_a_model_that_only_reads_needs_no_template():
    instruct = real_tokenizers.tokenizer("qwen3")
    base = copy.deepcopy(instruct)
    base.chat_template, base.eos_token = None, "<|endoftext|>"
    assert same_ids(instruct, base) is None


def test_a_model_that_only_reads_must_know_the_marks_of_conversations():
    speaker, reader = bytes_tokenizer(CHATML), bytes_tokenizer(CHATML)
    speaker.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    reader.add_special_tokens({"extra_special_tokens": ["<place 7>"]})
    assert same_ids(speaker, reader) is None, "nothing says it"
    speaker.chat_template = CHATML.replace("<|start|>", "<turn>")
    assert (
        same_ids(speaker, reader)
        == "'<turn>', which conversations have, is '<place 7>' to it; use a model that knows it"
    )
