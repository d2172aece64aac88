"""What a run says about a model's conversations: applied, saved with the model, part of the phase's identity."""

import pytest
import real_tokenizers
from chat_tokenizers import CHATML, QUESTION, bytes_tokenizer
from pydantic import ValidationError

from trainers.contract import BadInput
from trainers.core.chat import chat_format
from trainers.core.chat_settings import apply_chat_settings
from trainers.origins import origins_of
from trainers.phases import phase_type
from trainers.spec import ModelRef


def settled(tmp_path, template: str | None = CHATML, **settings):
    tokenizer = bytes_tokenizer(template)
    apply_chat_settings(tokenizer, ModelRef.model_validate({"source": "x", **settings}), tmp_path)
    return tokenizer


def test_a_template_is_given_as_text_or_as_a_file(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    for given in ("chat.jinja", str(tmp_path / "chat.jinja"), CHATML):
        assert settled(tmp_path, None, chatTemplate=given).chat_template == CHATML


def test_an_end_token_is_given_and_saved(tmp_path):
    from transformers import AutoTokenizer

    settled(tmp_path, endToken="<|end|>").save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<|end|>"


def test_options_go_on_with_a_saved_model(tmp_path):
    from transformers import AutoTokenizer

    template = "{{ mode | default('loud') }} {{ date_string | default('') }} " + CHATML
    saved = settled(tmp_path, template, templateOptions={"mode": "quiet"}, templateDate="2025-03-09")
    saved.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.apply_chat_template(QUESTION, tokenize=False).startswith("quiet 09 Mar 2025 <|start|>")


READS = """{% set mode = mode | default('loud') %}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}
{% generation %}{{ m.content }}{{ depth if depth is defined }}{{ eos_token }}{% endgeneration %}{% endfor %}"""


@pytest.mark.parametrize("name", ["moed", "messages", "eos_token"])
def test_an_option_that_the_template_never_reads_is_refused_with_those_that_it_reads(tmp_path, name):
    with pytest.raises(BadInput, match=rf"templateOptions.{name}: .* never reads it; it reads depth, mode$"):
        settled(tmp_path, READS, templateOptions={name: "x"})
    settled(tmp_path, READS, templateOptions={"mode": "quiet", "depth": 1})


def test_qwen3_without_thinking(tmp_path):
    import copy

    tokenizer = copy.deepcopy(real_tokenizers.tokenizer("qwen3"))
    ref = ModelRef.model_validate({"source": "x", "templateOptions": {"enable_thinking": False}})
    apply_chat_settings(tokenizer, ref, tmp_path)
    prompt, response = chat_format(tokenizer).answer(QUESTION, "<think>\nhm\n</think>\n\nHello.")
    wanted = real_tokenizers.tokenizer("qwen3").apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert tokenizer.decode(prompt) == wanted
    assert tokenizer.decode(response) == "Hello.<|im_end|>"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"chatTemplate": "gone.jinja"}, r"chatTemplate: .*gone\.jinja cannot be read"),
        ({"endToken": "<|im_end|>"}, r"endToken: '<\|im_end\|>' is no token of the model's vocabulary"),
        ({"templateOptions": {"a": 1}}, "the model has no chat template; set chatTemplate"),
    ],
)
def test_what_cannot_be_applied_is_bad_input(tmp_path, settings, problem):
    with pytest.raises(BadInput, match=problem):
        settled(tmp_path, None, **settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"templateOptions": {"a b": 1}}, "templateOptions.a b"),
        ({"templateOptions": {"tools": [1]}}, r"templateOptions.tools: \[1\] must be"),
        ({"templateOptions": {"mode": float("nan")}}, "templateOptions.mode: nan must be finite"),
        ({"templateDate": "2025-02-30"}, "templateDate 2025-02-30"),
        ({"templateDate": "today"}, "pattern"),
    ],
)
def test_what_is_no_setting_is_refused_before_anything_runs(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        ModelRef.model_validate({"source": "x", **settings})


def test_a_template_files_content_is_part_of_what_a_result_is_made_of(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    kind = phase_type("sft")
    spec = kind.spec.model_validate(
        {
            "model": {"source": "x", "chatTemplate": "chat.jinja"},
            "data": {"train": [{"synthetic": {"task": "letters", "split": "sft", "count": 1}}]},
        }
    )
    before = origins_of(kind, spec, tmp_path).content["model.chatTemplate"]
    (tmp_path / "chat.jinja").write_text(CHATML + " ")
    assert origins_of(kind, spec, tmp_path).content["model.chatTemplate"] != before
