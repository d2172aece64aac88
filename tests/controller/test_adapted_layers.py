"""`lora.targetModules` that no layer is called: told before anything starts, where the model's layers are known."""

import json
from pathlib import Path

import pytest
from builders import DATA, document, make_run
from sized import CONFIGS

from controller.api.problems import InvalidRun
from controller.plan.adapted import adapter_problems
from controller.plan.check import check_run
from controller.preflight import load_run

LETTERS = {"synthetic": {"task": "letters", "split": "demonstrations", "count": 9}}
SCRATCH = {"hiddenSize": 32, "numLayers": 2, "tokenizer": {"trainOn": [LETTERS]}}


def sft(*names: str, name: str = "sft", **model) -> dict:
    return {"name": name, "sft": {"model": model, "data": DATA, "lora": {"targetModules": [*names]}}}


def said(*phases: dict) -> list[str]:
    return [str(problem) for problem in adapter_problems(make_run(*phases), CONFIGS)]


def test_a_name_that_no_layer_has():
    (problem,) = said(sft("q_proj", "q_porj", source="org/big"))
    assert problem == (
        'spec.phases[sft].sft.lora.targetModules: "q_porj": no layer is called that; there are '
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj (did you mean q_proj?)"
    )


@pytest.mark.parametrize("name", ["q_proj", "self_attn.q_proj", "layers.1.mlp.down_proj", "lm_head", "embed_tokens"])
def test_a_name_that_one_has(name):
    assert not said(sft(name, source="org/big"))


def test_the_model_of_the_phase_before():
    before = {"name": "sft", "sft": {"model": {"source": "org/big"}, "data": DATA}}
    later = {"name": "dpo", "dpo": {"policy": {"phase": "sft"}, "data": DATA, "lora": {"targetModules": ["c_attn"]}}}
    assert len(said(before, later)) == 1


def test_a_model_that_is_not_known_is_left_to_the_phase():
    assert not said(sft("anything", source="org/other"))


def test_one_made_from_scratch_is_known_on_a_cluster_too():
    found = check_run(make_run(sft("c_attn", scratch=SCRATCH)))
    assert any("no layer is called that" in str(problem) for problem in found)


def test_layers_that_are_read_without_being_called():
    config = {
        "model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64,
        "state_size": 8, "time_step_rank": 2, "conv_kernel": 4,
    }  # fmt: skip
    run = make_run(sft("out_proj", source="a"))
    (problem,) = adapter_problems(run, {("a", None): config})
    assert "models of type mamba read its weight without calling it" in str(problem)


def test_validate_looks_into_a_local_folder(tmp_path: Path):
    (tmp_path / "model").mkdir()
    config = CONFIGS["org/big", None] | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRun, match='targetModules: "qq": no layer is called that'):
        load_run(document(sft("qq", source="model")), tmp_path)
