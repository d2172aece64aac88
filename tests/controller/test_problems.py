"""Every way to write a wrong run, and the one line that comes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import DATA, PROMPTS, SCRATCH, document, dpo, ppo, reward, sft

from controller.api.problems import InvalidRun
from controller.compose import merge
from controller.preflight import load_run

BASE, SFT, REWARD = sft("base"), sft("sft", "base"), reward("reward", "base")


def edit(phase: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return merge(phase, changes)  # type: ignore[no-any-return]


def distill(student: dict[str, Any], **settings: Any) -> dict[str, Any]:
    values = {"teacher": {"phase": "base"}, "student": student, "prompts": PROMPTS, "onPolicyFraction": 1}
    return {"name": "distill", "distill": {**values, "weighting": {"mode": "none"}, **settings}}


def rollout(policy: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"name": "rollout", "rollout": {"policy": policy, "data": {"prompts": PROMPTS["prompts"]}, **settings}}


def files(name: str) -> dict[str, Any]:
    return {"sft": {"data": {"train": [{"files": name}]}}}


OTHER_SCRATCH = edit(SCRATCH, {"scratch": {"tokenizer": {"vocabSize": 99}}})
SHARE = "--gpu-memory-utilization"
MEMBERS = "sft, reward, dpo, ppo, rollout, distill, evaluate, package"

PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "a typing error in a field": (
        document(edit(BASE, {"sft": {"batchsize": 3}})),
        "spec.phases[base].sft.batchsize: no such field (did you mean batchSize?)",
    ),
    "a field that is nothing like any": (
        document(BASE, zzz=1),
        "spec.zzz: no such field; fields here are model, seed, workspace, template, backend, queueName, queuePriority, "
        "failurePolicy, suspend, ttlSecondsAfterFinished, runTtlSecondsAfterFinished, phases",
    ),
    "a word for a number": (
        document(edit(BASE, {"sft": {"batchSize": "many"}})),
        'spec.phases[base].sft.batchSize: "many": input should be a valid integer, unable to parse string as an integer',
    ),
    "a value out of range": (
        document(edit(BASE, {"sft": {"optim": {"lr": -1}}})),
        "spec.phases[base].sft.optim.lr: -1: input should be greater than 0",
    ),
    "a choice that does not exist": (
        document(edit(BASE, {"sft": {"optim": {"schedule": "cosin"}}})),
        "spec.phases[base].sft.optim.schedule: \"cosin\" is not one of 'constant', 'linear' or 'cosine' (did you mean cosine?)",
    ),
    "a missing field": (document({"name": "a", "sft": {"model": SCRATCH}}), "spec.phases[a].sft.data: is required and not set"),
    "a DPO without a policy": (
        document(BASE, {"name": "dpo", "dpo": {"data": DATA}}),
        "spec.phases[dpo].dpo.policy: is required and not set",
    ),
    "a PPO without a reward model": (
        document(BASE, {"name": "ppo", "ppo": {"policy": {"phase": "base"}, "data": PROMPTS}}),
        "spec.phases[ppo].ppo.rewardModel: is required and not set",
    ),
    "a text for a list": (
        document(BASE, rollout({"phase": "base"}, sampling={"engine": "vllm"}, server={"command": "vllm serve"})),
        'spec.phases[rollout].rollout.server.command: "vllm serve": input should be a list',
    ),
    "a list of nothing": (
        document(BASE, rollout({"phase": "base"}, sampling={"engine": "vllm"}, server={"command": []})),
        "spec.phases[rollout].rollout.server.command: a list: it has 0 items, and 1 or more belong there",
    ),
    "a share of memory above all of it": (
        document(BASE, rollout({"phase": "base"}, sampling={"engine": "vllm"}, server={"args": [SHARE, "5"]})),
        f"spec.phases[rollout].rollout.server: args: {SHARE} '5' is no share of a device's memory: set a number above 0 and "
        "at most 1, such as 0.5",
    ),
    "a server's length without room for a prompt": (
        document(BASE, rollout({"phase": "base"}, sampling={"engine": "vllm"}, server={"args": ["--max-model-len=8"]})),
        "spec.phases[rollout].rollout: server.args: --max-model-len 8 is of prompt and response together: "
        "sampling.maxNewTokens 256 leaves no room for a prompt; set 256 and the longest prompt's tokens",
    ),
    "a server's length that its prompts go beyond": (
        document(
            BASE,
            rollout(
                {"phase": "base"},
                sampling={"engine": "vllm", "maxNewTokens": 100},
                server={"args": ["--max-model-len=300"]},
                data={"prompts": [{"files": "p.jsonl"}], "maxPromptLength": 201},
            ),
        ),
        "spec.phases[rollout].rollout: server.args: --max-model-len 300 is of prompt and response together: "
        "data.maxPromptLength 201 and sampling.maxNewTokens 100 are 301; set 301, or lower them",
    ),
    "no phases": (document(), "spec.phases: a list: it has 0 items, and 1 or more belong there"),
    "two members": (
        document({**BASE, "reward": REWARD["reward"]}),
        f"spec.phases[base]: a phase has exactly one of {MEMBERS}; got sft and reward",
    ),
    "no member": (document({"name": "base"}), f"spec.phases[base]: a phase has exactly one of {MEMBERS}; got none of them"),
    "a name that is none": (
        document(edit(BASE, {"name": "Base_1"})),
        "spec.phases[Base_1].name: \"Base_1\" is not a name: use lower-case letters, digits and '-', beginning and ending "
        "with a letter or digit",
    ),
    "a name twice": (document(BASE, BASE), 'spec.phases[base].name: "base" is the name of 2 phases; names are unique in a run'),
    "a reference to nothing": (
        document(BASE, SFT, REWARD, dpo("dpo", "sfft")),
        'spec.phases[dpo].dpo.policy.phase: "sfft" is not a phase of this run; phases are: base, sft, reward (did you mean sft?)',
    ),
    "a reference to itself": (document(sft("a", "a")), 'spec.phases[a].sft.model.phase: "a" is this phase itself'),
    "a reward model that is none": (
        document(BASE, REWARD, ppo("ppo", "base", "base")),
        'spec.phases[ppo].ppo.rewardModel.phase: "base" is of type sft and leaves a model, not a reward-model; '
        "phases that leave one: reward",
    ),
    "a loop": (
        document(sft("a", "c"), sft("b", "a"), sft("c", "b")),
        "spec.phases: these phases wait for each other: a -> b -> c -> a",
    ),
    "two sources of a model": (
        document(edit(BASE, {"sft": {"model": {"source": "x"}}})),
        "spec.phases[base].sft.model: set exactly one of phase, source, scratch; got source and scratch",
    ),
    "no model anywhere": (
        document({"name": "a", "sft": {"data": DATA}}),
        "spec.phases[a].sft.model: is not set, and spec.model, which would stand in for it, is not set either",
    ),
    "settings that do not go with the run's model": (
        document({"name": "a", "sft": {"data": DATA, "lora": {"quantization": "nf4"}}}, model=SCRATCH),
        "spec.phases[a].sft: lora.quantization nf4 is made while a model's files are read: model.scratch has none; "
        "set model.source or model.phase",
    ),
    "more processes than GPUs": (
        document(BASE, template={"procsPerNode": 2, "resources": {"limits": {"nvidia.com/gpu": 1}}}),
        "spec.phases[base].template.procsPerNode: 2 processes on 1 GPU (resources.limits): each takes one of its own",
    ),
    "a folder of data that is not there": (
        document(edit(BASE, {"sft": {"data": {"train": [{"hub": {"name": "./nope"}}]}}})),
        'spec.phases[base].sft.data.train[0].hub.name: "./nope" is not there: HERE/nope does not exist',
    ),
    "the run's model is a phase": (
        document(BASE, model={"phase": "base"}),
        "spec.model.phase: \"base\": the run's own model is a source or scratch; name phases in the phases",
    ),
    "a student with another scratch tokenizer": (
        document(BASE, distill(OTHER_SCRATCH)),
        "spec.phases[distill].distill.student: its tokenizer is made otherwise than the other model's: give both scratch "
        "models the same tokenizer settings",
    ),
    "a student that was trained from another tokenizer": (
        document(BASE, edit(sft("s"), {"sft": {"model": OTHER_SCRATCH}}), distill({"phase": "s"})),
        "spec.phases[distill].distill.student: its tokenizer is made otherwise than the other model's: give both scratch "
        "models the same tokenizer settings",
    ),
    "a hub student for a scratch teacher": (
        document(BASE, distill({"source": "org/student"})),
        "spec.phases[distill].distill.student: the other model's tokenizer is made on the spot and cannot match the one of "
        "org/student",
    ),
    "a distillation without traces": (
        document(BASE, distill({"teacherLayers": [0]}, onPolicyFraction=0.5)),
        "spec.phases[distill].distill: onPolicyFraction 0.5 leaves steps that need stored traces: set traces, or "
        "onPolicyFraction: 1",
    ),
    "a synthetic task that does not exist": (
        document(edit(BASE, {"sft": {"data": {"train": [{"synthetic": {"task": "leters", "split": "x", "count": 1}}]}}})),
        'spec.phases[base].sft.data.train[0].synthetic.task: "leters" is not a synthetic task; tasks are: letters '
        "(did you mean letters?)",
    ),
    "a glob that matches nothing": (
        document(edit(BASE, files("shards/*.jsonl"))),
        'spec.phases[base].sft.data.train[0].files: "shards/*.jsonl" matches no file (relative paths start at HERE)',
    ),
    "a data file that is not there": (
        document(edit(BASE, files("rows.jsonl"))),
        'spec.phases[base].sft.data.train[0].files: "rows.jsonl" is not there: HERE/rows.jsonl does not exist or is not a file',
    ),
    "a model folder that is not there": (
        document({"name": "a", "sft": {"model": {"source": "./nope"}, "data": DATA}}),
        'spec.phases[a].sft.model.source: "./nope" is not there: HERE/nope does not exist',
    ),
    "a folder that holds no model": (
        document({"name": "a", "sft": {"model": {"source": "./empty"}, "data": DATA}}),
        'spec.phases[a].sft.model.source: "./empty" is a folder without config.json; a model saved by Hugging Face '
        "transformers is expected",
    ),
    "a chat template that is not there": (
        document({"name": "a", "sft": {"model": {"source": "org/model", "chatTemplate": "chat.jinja"}, "data": DATA}}),
        'spec.phases[a].sft.model.chatTemplate: "chat.jinja" is neither a template nor a file: HERE/chat.jinja is not there',
    ),
    "a chat template that does not end": (
        document({"name": "a", "sft": {"model": {"source": "./one", "chatTemplate": "{% for m in messages %}"}, "data": DATA}}),
        'spec.phases[a].sft.model.chatTemplate: "{% for m in messages %}" is no valid template: Unexpected end of template. '
        "Jinja was looking for the following tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for'. "
        "(line 1)",
    ),
    "a file that is no chat template": (
        document({"name": "a", "sft": {"model": {"source": "org/model", "chatTemplate": "bad.jinja"}, "data": DATA}}),
        'spec.phases[a].sft.model.chatTemplate: "bad.jinja" is no valid template: No filter named \'shout\'. (line 2)',
    ),
    "an end token that the model has not": (
        document({"name": "a", "sft": {"model": {"source": "./one", "endToken": "<|im_end|>"}, "data": DATA}}),
        'spec.phases[a].sft.model.endToken: "<|im_end|>" is no token of the model\'s vocabulary (HERE/one/tokenizer.json)',
    ),
    "a DeepSpeed file that says what the run says": (
        document({"name": "a", "sft": {"model": {"source": "org/model"}, "data": DATA, "parallel": {
            "strategy": "deepspeed", "deepspeed": {"config": "ds.json"}}}}),
        "spec.phases[a].sft.parallel.deepspeed.config: ds.json: gradient_clipping is set by the run's optim.maxGradNorm: "
        "remove it",
    ),
    "a response as long as a scratch model": (
        document(BASE, distill({"phase": "base"}, sampling={"maxNewTokens": 1024}, maxLength=2000)),
        "spec.phases[distill].distill.sampling.maxNewTokens: 1024: the model has 1024 positions, for a prompt and the response "
        "together",
    ),
    "an evaluation's response as long as a model": (
        document(BASE, {"name": "e", "evaluate": {
            "models": [{"phase": "base"}, {"source": "./short"}], "data": {"rows": PROMPTS["prompts"]},
            "benchmarks": [{"name": "long", "length": {"sampling": {"maxNewTokens": 16}}},
                           {"name": "ok", "length": {"sampling": {"maxNewTokens": 8}}}]}}),
        "spec.phases[e].evaluate.benchmarks[long].length.sampling.maxNewTokens: 16: model short has 16 positions, for a prompt "
        "and the response together",
    ),
    "an evaluation that says no length": (
        document(rollout({"source": "./short"}, sampling={"maxNewTokens": 8}), {"name": "e", "evaluate": {
            "models": [{"source": "./short"}], "data": {"rows": PROMPTS["prompts"]},
            "benchmarks": [{"name": "a", "length": {}}]}}),
        "spec.phases[e].evaluate.sampling.maxNewTokens: 256: model short has 16 positions, for a prompt and the response "
        "together",
    ),
    "a response as long as a model in a folder": (
        document(rollout({"source": "./short"}, sampling={"maxNewTokens": 32})),
        "spec.phases[rollout].rollout.sampling.maxNewTokens: 32: the model has 16 positions, for a prompt and the response "
        "together",
    ),
    "more machines than one": (
        document(BASE, template={"nodes": 2}),
        "spec.template.nodes: 2: a local run has one machine; set 1, or apply the run to a cluster",
    ),
    "another kind": ({**document(BASE), "kind": "Job"}, "kind: \"Job\" is not one of 'AlignmentRun'"),
    "student and teacher folders with different vocabularies": (
        document({"name": "t", "sft": {"model": {"source": "./one"}, "data": DATA}},
                 edit(distill({"source": "./two"}), {"distill": {"teacher": {"phase": "t"}}})),
        "spec.phases[distill].distill.student: its tokenizer (HERE/two) has another vocabulary than the other model's (HERE/one)",
    ),
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"overlap_comm": true}, "gradient_clipping": 1.0}')
    (tmp_path / "bad.jinja").write_text("{{ x }}\n{{ x | shout }}")
    for name, word in (("one", "a"), ("two", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {word: 0}}}))
    (tmp_path / "short").mkdir()
    config = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "vocab_size": 8, "max_position_embeddings": 16,
    }  # fmt: skip
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("sentence", PROBLEMS)
def test_one_line_with_path_value_and_what_would_be_right(sentence: str, here: Path) -> None:
    run, expected = PROBLEMS[sentence]
    with pytest.raises(InvalidRun) as caught:
        load_run(run, here, local=True)
    assert [str(problem) for problem in caught.value.problems] == [expected.replace("HERE", str(here))]


@pytest.mark.parametrize("end", ["a", "<eos>", "<é>"])
def test_templates_and_end_tokens_as_models_have_them_are_accepted(here: Path, end: str) -> None:
    """The tag around what is said, leaving a loop, variables and functions that only a renderer has."""
    (here / "one" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eos>"}, "pad_token": "<é>"}')
    template = (
        "{{ bos_token }}{%- for m in messages -%}{% generation %}{{ m.content | trim | tojson }}{% endgeneration %}"
        "{% if m.x is defined %}{% break %}{% endif %}{{ raise_exception(strftime_now('%d')) }}{%- endfor -%}"
    )
    model = {"source": "./one", "chatTemplate": template, "endToken": end}
    load_run(document({"name": "a", "sft": {"model": model, "data": DATA}}), here)


def test_all_problems_are_listed_whatever_their_kind() -> None:
    run = document(edit(BASE, {"sft": {"batchsize": 3}}), dpo("dpo", "bass"), ppo("ppo", "base", "nope"))
    with pytest.raises(InvalidRun) as caught:
        load_run(run)
    assert [problem.path for problem in caught.value.problems] == [
        "spec.phases[base].sft.batchsize",
        "spec.phases[dpo].dpo.policy.phase",
        "spec.phases[ppo].ppo.rewardModel.phase",
    ]


def test_what_is_right_is_accepted(here: Path) -> None:
    (here / "rows.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    phases = (
        BASE,
        SFT,
        REWARD,
        ppo("ppo", "sft", "reward"),
        distill({"teacherLayers": [0]}),
        edit(sft("f"), files("rows.jsonl")),
    )
    assert load_run(document(*phases), here, local=True).name == "test"


@pytest.mark.parametrize("value", [0, -1])
def test_a_number_is_shown_as_a_number(value: int) -> None:
    with pytest.raises(InvalidRun, match=f"batchSize: {value}: input should be"):
        load_run(document(edit(BASE, {"sft": {"batchSize": value}})))


@pytest.mark.parametrize("phase", ["nope", "b", "a"], ids=["dangling", "cycle", "self"])
def test_a_broken_graph_is_told_where_tokenizers_are_compared(tmp_path: Path, phase: str) -> None:
    """The comparison follows references; it used to end in KeyError and RecursionError."""
    student = {"name": "d", "distill": distill({"phase": "a"})["distill"] | {"teacher": {"phase": "b"}}}
    run = document(sft("a", phase), sft("b", "a"), student)
    with pytest.raises(InvalidRun):
        load_run(run, tmp_path)


def test_a_duplicate_name_is_told_where_tokenizers_are_compared(tmp_path: Path) -> None:
    with pytest.raises(InvalidRun, match="names are unique"):
        load_run(document(BASE, sft("x", "base"), sft("x", "base"), distill({"phase": "x"})), tmp_path)


def test_an_object_store_is_left_to_the_phase(here: Path) -> None:
    """Only the phase has the credentials, and the store may be reachable from pods alone."""
    phase = {
        "name": "base",
        "sft": {"model": {"source": "s3://bucket/model"}, "data": {"train": [{"files": "s3://bucket/a.jsonl"}]}},
    }
    assert load_run(document(phase), here).phases[0].name == "base"


SOON = {
    "single": (
        {"procsPerNode": 2},
        "spec.phases[base].sft.parallel.strategy: single is one process, and the template asks for 2",
    ),
    "no unit": ({"gpuMemory": "80"}, 'spec.template.gpuMemory: "80" is less than any GPU has; with its unit: 80Gi'),
    "nothing": ({"gpuMemory": "0Gi"}, 'spec.template.gpuMemory: "0Gi" is less than any GPU has'),
    "no such unit": ({"gpuMemory": "80GB"}, 'spec.template.gpuMemory: "80GB" is not a quantity: a number, and a unit'),
}


@pytest.mark.parametrize("case", SOON)
def test_what_a_phase_would_refuse_at_its_start_is_refused_before(case: str) -> None:
    template, said = SOON[case]
    with pytest.raises(InvalidRun) as problem:
        load_run(document(sft("base", parallel={"strategy": "single"}), template=template), Path("."))
    assert said in str(problem.value)
