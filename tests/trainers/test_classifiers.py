"""Reward models from outside give the scores that transformers alone gives, whatever their architecture."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foreign_models import ENCODERS, save_encoder
from one_rank import OneRank
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from trainers.contract import BadInput
from trainers.core.classifiers import TextClassifier, question, text_scores
from trainers.core.models import LoadedModel
from trainers.core.reward_models import load_reward_model, load_value_model
from trainers.core.rewards import response_rewards
from trainers.spec import Parallel, RewardModelRef

CPU = torch.device("cpu")
PAIRS = [
    ("open the hat", "yes please ok"),
    ("copy box : A B", "A B"),
    ("reverse box : A B C D E F G H", "no"),
    ("a", "b"),
]
NEWLINE_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %} A {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
"""Goes on behind the end of a turn, as ChatML's line break does."""


def context(bf16: bool = False):
    spec = SimpleNamespace(parallel=Parallel(), export_dtype="auto")
    return SimpleNamespace(
        workers=OneRank(bf16=bf16), seed=0, spec=spec, base_dir=Path("."), model_location=lambda ref: ref.source
    )


def messages(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def rewards(loaded, pairs, ctx=None, max_length: int = 10**6, tokens: int = 8192, ended=None) -> torch.Tensor:
    prompts, responses = [messages(q) for q, _ in pairs], [a for _, a in pairs]
    workers = (ctx or context()).workers
    return torch.tensor(response_rewards(workers, loaded, prompts, responses, ended, max_length, tokens))


@torch.no_grad()
def transformers_scores(folder: Path, pairs) -> torch.Tensor:
    """Each pair alone, as a model card of such a model says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return torch.cat([model(**tokenizer(q, a, return_tensors="pt")).logits[0] for q, a in pairs])


@pytest.mark.parametrize("kind", list(ENCODERS))
@pytest.mark.parametrize("tokens", [8192, 20])
def test_an_encoder_scores_as_transformers_does(tmp_path: Path, kind: str, tokens: int):
    folder = save_encoder(kind, tmp_path / "rm")
    loaded = load_reward_model(context(), RewardModelRef(source=str(folder)))
    assert isinstance(loaded, TextClassifier)
    expected = transformers_scores(folder, PAIRS)
    assert expected.std() > 1e-3
    torch.testing.assert_close(rewards(loaded, PAIRS, tokens=tokens), expected, atol=2e-5, rtol=1e-4)
    assert rewards(loaded, []).tolist() == []


def test_an_encoder_is_read_in_fp32_where_the_rest_computes_in_bf16(tmp_path: Path):
    folder = save_encoder("bert", tmp_path / "rm")
    ctx = context(bf16=True)
    loaded = load_reward_model(ctx, RewardModelRef(source=str(folder)))
    torch.testing.assert_close(rewards(loaded, PAIRS, ctx), transformers_scores(folder, PAIRS), atol=1e-4, rtol=1e-4)
    held = load_reward_model(ctx, RewardModelRef(source=str(folder), dtype="bf16"))
    assert held.model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_too_long_a_question_loses_its_start_and_an_answer_its_end(tmp_path: Path, kind: str):
    folder = save_encoder(kind, tmp_path / "rm")
    loaded = load_reward_model(context(), RewardModelRef(source=str(folder)))
    longest = loaded.max_length
    assert longest == 64
    question_, answer = " ".join(["a"] * 60 + ["hat", "box"]), " ".join(["yes"] * 30 + ["no"])
    kept = " ".join(question_.split()[-(longest - 3 - 31) :])
    expected = transformers_scores(folder, [(kept, answer)])
    torch.testing.assert_close(rewards(loaded, [(question_, answer)]), expected, atol=1e-4, rtol=1e-4)
    endless = " ".join(["yes"] * 500)
    expected = transformers_scores(folder, [("box", " ".join(["yes"] * (longest - 4)))])
    torch.testing.assert_close(rewards(loaded, [(question_, endless)]), expected, atol=1e-4, rtol=1e-4)


def test_an_encoder_with_a_chat_template_reads_one_text(tmp_path: Path):
    folder = save_encoder("bert", tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    loaded = load_reward_model(context(), RewardModelRef(source=str(folder)))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [tokenizer(f"user : {q} assistant : {a}", return_tensors="pt") for q, a in PAIRS]
    with torch.no_grad():
        expected = torch.cat([model(**text).logits[0] for text in texts])
    torch.testing.assert_close(rewards(loaded, PAIRS), expected, atol=1e-4, rtol=1e-4)


def test_what_came_before_the_question_is_part_of_it():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    assert question([{"role": r, "content": c} for r, c in turns]) == "System: s\n\nUser: a\n\nAssistant: b\n\nUser: c"
    assert question(messages("a")) == "a"


ASKED = {"role": "user", "content": "copy box"}
WITH_TOOLS = {
    "definitions": [{"role": "tools", "tools": [{"name": "box"}]}, ASKED],
    "a call": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"name": "box"}]}, ASKED],
    "a result": [ASKED, {"role": "tool", "content": "A"}],
}


@pytest.mark.parametrize("kind", list(WITH_TOOLS))
def test_tools_are_not_left_out_where_no_template_writes_them(tmp_path: Path, kind: str):
    loaded = load_reward_model(context(), RewardModelRef(source=str(save_encoder("bert", tmp_path / "rm"))))
    with pytest.raises(BadInput, match=r"the plain format has no tools: give the model a chat template"):
        response_rewards(context().workers, loaded, [WITH_TOOLS[kind]], ["A"], None, 64, 64)


def test_an_encoder_cannot_be_trained(tmp_path: Path):
    folder = save_encoder("bert", tmp_path / "rm")
    with pytest.raises(BadInput, match="type bert score a text as a whole"):
        load_value_model(context(), RewardModelRef(source=str(folder)))


def test_a_model_whose_score_depends_on_its_neighbours_is_refused(tmp_path: Path, monkeypatch):
    folder = save_encoder("bert", tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_input_names = ["input_ids"]  # no padding mask
    tokenizer.save_pretrained(folder)
    with pytest.raises(BadInput, match="how much padding is beside it"):
        load_reward_model(context(), RewardModelRef(source=str(folder)))


# ---------------------------------------------------------------- decoders


def save_decoder(kind: str, tiny_reward_dir: Path, folder: Path, template: str | None = None) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    if template is not None:
        tokenizer.chat_template = template
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if kind == "qwen2":
        sizes["num_key_value_heads"] = 4
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    torch.manual_seed(2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def chat_scores(folder: Path, pairs) -> torch.Tensor:
    """All that the template writes, scored by the model's own forward: what model cards of published ones show."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for q, a in pairs:
        ids = tokenizer.apply_chat_template(
            [*messages(q), {"role": "assistant", "content": a}], return_tensors="pt", return_dict=True
        )["input_ids"]
        found.append(model(input_ids=ids).logits[0])
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("template", [None, NEWLINE_TEMPLATE])
def test_a_decoder_from_elsewhere_reads_all_that_its_template_writes(tiny_reward_dir, tmp_path, kind, template):
    folder = save_decoder(kind, tiny_reward_dir, tmp_path / "rm", template)
    loaded = load_reward_model(context(), RewardModelRef(source=str(folder)))
    assert isinstance(loaded, LoadedModel)
    torch.testing.assert_close(rewards(loaded, PAIRS), chat_scores(folder, PAIRS), atol=1e-5, rtol=1e-5)


def test_the_projects_own_reads_the_token_that_ends_the_response(run_phase, tiny_model_dir, tmp_path):
    """Also when its folder is given by its path; where the template goes on, that is another token than the last."""
    start = tmp_path / "start"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = NEWLINE_TEMPLATE
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(start)
    tokenizer.save_pretrained(start)
    spec = {
        "model": {"source": str(start)},
        "data": {
            "train": [{"synthetic": {"task": "letters", "split": "preferences", "count": 8}}],
            "maxLength": 64,
        },
        "batchSize": 8,
        "duration": {"maxSteps": 1},
    }
    output = tmp_path / "run" / "reward"
    assert run_phase("reward", spec, None, output)[0] == 0
    loaded = load_reward_model(context(), RewardModelRef(source=str(output / "model")))
    assert tokenizer.eos_token_id in loaded.model.config.score_token_ids
    model = AutoModelForSequenceClassification.from_pretrained(output / "model").eval()
    with torch.no_grad():
        expected = torch.cat(
            [
                model(
                    **tokenizer(f"user {q} A assistant {a}<eos>", add_special_tokens=False, return_tensors="pt")
                ).logits[0]
                for q, a in PAIRS
            ]
        )
    torch.testing.assert_close(rewards(loaded, PAIRS), expected, atol=1e-5, rtol=1e-5)


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path):
    folder = save_encoder("bert", tmp_path / "rm")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(folder)
    with pytest.raises(BadInput, match="has 2 labels"):
        load_reward_model(context(), RewardModelRef(source=str(folder)))


def test_scores_keep_their_order(tmp_path: Path):
    folder = save_encoder("bert", tmp_path / "rm")
    loaded = load_reward_model(context(), RewardModelRef(source=str(folder)))
    texts = [loaded.encoded(messages(q), a, 64) for q, a in PAIRS]
    forward = text_scores(context().workers, loaded, texts, 16)
    backward = text_scores(context().workers, loaded, texts[::-1], 16)
    torch.testing.assert_close(forward, backward.flip(0))
