"""What a run may say of servers, and the one line that it gets else."""

import pytest
from pydantic import ValidationError

from trainers.contract import phase_digest
from trainers.phases import phase_type

PROMPTS = {"prompts": [{"files": "p.jsonl"}]}
URL = "http://vllm.team:8000"
VLLM = {"engine": "vllm"}
SERVED = {"url": URL, "servedAs": "big", "topK": 32}
EVALUATION = {"data": {"rows": [{"files": "t.jsonl"}]}, "benchmarks": [{"name": "length", "length": {}}]}


def spec_of(kind, **spec):
    return phase_type(kind).spec.model_validate(spec)


SCRATCH = {"hiddenSize": 32, "numLayers": 1, "tokenizer": {"trainOn": [{"files": "p.jsonl"}]}}


def rollout(policy=None, sampling=None, data=PROMPTS, **changes):
    policy = {"phase": "dpo", "url": URL} if policy is None else policy
    return spec_of("rollout", policy=policy, data=data, sampling=VLLM if sampling is None else sampling, **changes)


def own(*args):
    return rollout({"phase": "dpo"}, server={"args": list(args)})


def evaluation(models, sampling=None, **changes):
    return spec_of("evaluate", models=models, sampling=sampling or {}, **{**EVALUATION, **changes})


def distill(teacher, **changes):
    base = {"student": {"source": "s"}, "prompts": PROMPTS, "onPolicyFraction": 1}
    return spec_of("distill", teacher=teacher, **{**base, **changes})


def ppo(changes=None, sampling=None):
    base = {"policy": {"phase": "a"}, "rewardModel": {"phase": "r"}, "data": PROMPTS}
    return spec_of("ppo", **{**base, **(changes or {})}, sampling=VLLM if sampling is None else sampling)


def several(*changes, **of_spec):
    teachers = [{**SERVED, "name": "ab"[i], **change} for i, change in enumerate(changes)]
    return distill(of_spec.pop("teacher", None), teachers=teachers, **of_spec)


def said(make) -> str:
    with pytest.raises(ValidationError) as caught:
        make()
    return " ".join(error["msg"] for error in caught.value.errors())


@pytest.mark.parametrize("url", [URL, "https://vllm", "http://10.0.0.1:80/v1", "http://[::1]:8000", "http://h/prefix/"])
def test_addresses(url):
    assert rollout({"phase": "dpo", "url": url}).policy.url == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("vllm:8000", "is not of http or https"),
        ("ftp://vllm", "is not of http or https"),
        ("s3://bucket/x", "is not of http or https"),
        ("http://", "names no host"),
        ("http://:8000", "names no host"),
        ("http://a b", "names no host"),
        ("http://h:99999", "is no address"),
        ("http://h:x", "is no address"),
        ("http://[::1", "is no address"),
        ("http://h?key=1", "has more than an address"),
        ("", "is not of http or https"),
    ],
)
def test_what_is_no_address(url, reason):
    found = said(lambda: rollout({"phase": "dpo", "url": url}))
    assert reason in found and "write http://HOST:PORT" in found


def test_a_password_in_an_address_is_refused_and_not_repeated():
    found = said(lambda: rollout({"phase": "dpo", "url": "http://me:opensesame@vllm"}))
    assert "keyVariable" in found and "opensesame" not in found


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: rollout(sampling={}), "policy.url is of no use to sampling.engine own"),
        (lambda: rollout({"phase": "dpo", "servedAs": "x"}, {}), "servedAs x is of a server"),
        (lambda: rollout({"phase": "dpo", "keyVariable": "K"}, {}), "keyVariable K is of a server"),
        (lambda: rollout({"phase": "dpo", "checkWeights": False}, {}), "checkWeights is of a server"),
        (lambda: rollout(sampling={"engine": "sglang"}), "'own' or 'vllm'"),
        (lambda: rollout(sampling={**VLLM, "temperature": 0.005}), "vLLM takes 0"),
        (lambda: rollout({"scratch": SCRATCH}), "policy.scratch has no files that a server could read"),
        (lambda: rollout({"phase": "dpo"}, {}, server={}), "server is of no use to sampling.engine own"),
        (lambda: rollout(server={}), "policy.url names one that is there already: leave server or url out"),
        (lambda: rollout({"phase": "dpo"}, server={"args": ["--port=80"]}), "--port=80 is set by the phase"),
        (lambda: own("--logprobs-mode", "raw_logits"), "--logprobs-mode is set by the phase"),
        (lambda: own("--serv", "x"), "--serv is set by the phase"),
        (lambda: own("--hf_overrides={}"), "--hf_overrides={} makes it another model than the phase's"),
        (lambda: own("--hf-overrides.rope_theta", "1"), "--hf-overrides.rope_theta makes it another model"),
        (lambda: own("--tokenizer", "x"), "--tokenizer makes it another model"),
        (lambda: own("--load-format", "dummy"), "--load-format dummy has random weights"),
        (lambda: own("--load_format=dummy"), "--load-format dummy has random weights"),
        (lambda: own("--max-model-len", "banana"), "args: --max-model-len 'banana' is no number of tokens above 0: set one"),
        (lambda: own("--max-model-len", "1.5K"), "--max-model-len '1.5K' is no number of tokens"),
        (lambda: own("--max-model-len", 400 * "9" + "k"), "is no number of tokens above 0"),
        (lambda: own("--max_model_len=-5"), "--max-model-len '-5' is no number of tokens"),
        (lambda: own("--max-model-len", "--enforce-eager"), "--max-model-len '' is no number of tokens"),
        (lambda: own("--max-num-seqs", "0"), "args: --max-num-seqs '0' is no number of sequences above 0: set one"),
        (lambda: own("--gpu-memory-utilization", "5"), "--gpu-memory-utilization '5' is no share of a device's memory"),
        (lambda: own("--gpu_memory_utilization=0"), "set a number above 0 and at most 1"),
        (lambda: own("--gpu-memory-utilization", "nan"), "set a number above 0 and at most 1"),
        (lambda: own("--max-model-len", "256"), "sampling.maxNewTokens 256 leaves no room for a prompt; set 256 and"),
        (lambda: ppo({"server": {"args": ["--max-model-len=8"]}}), "server.args: --max-model-len 8 is of prompt and"),
        (lambda: evaluation([{"phase": "a"}], VLLM, server={"args": ["--max-model-len=8"]}), "leaves no room for a prompt"),
        (lambda: rollout({"phase": "dpo"}, server={"command": []}), "at least 1 item"),
        (lambda: evaluation([{"phase": "a"}], server={}), "server is of no use to sampling.engine own"),
        (lambda: evaluation([{"phase": "a", "url": URL}], VLLM, server={}), "models[0].url names one"),
        (lambda: evaluation([{"phase": "a", "url": URL}]), "models[0].url is of no use"),
        (lambda: spec_of("package", models=[{"phase": "a", "url": URL}]), "no server is asked"),
        (lambda: ppo({"staleness": 2}, sampling={**VLLM, "temperature": 0}), "sampling.temperature 0 has none"),
        (lambda: ppo(sampling={**VLLM, "temperature": 0.7, "topK": 8}), "sampling.temperature 0.7 with topP or topK"),
        (lambda: ppo({"server": {}}, sampling={}), "server is of no use to sampling.engine own"),
        (lambda: distill({"url": URL}), "servedAs: name the model"),
        (lambda: distill({"url": "vllm", "servedAs": "big"}), "is not of http or https"),
        (lambda: distill({"phase": "a", "url": URL, "servedAs": "big"}), "exactly one of phase, source, scratch, url"),
        (lambda: distill({"phase": "a", "topK": 8}), "topK is of a served teacher"),
        (lambda: distill({"source": "x", "concurrency": 2}), "concurrency is of a served teacher"),
        (lambda: distill({"source": "x", "servedAs": "big"}), "servedAs big is of a server"),
        (lambda: distill({**SERVED, "chatTemplate": "{{ x }}"}), "chatTemplate has no effect on a served teacher"),
        (lambda: distill({**SERVED, "dtype": "bf16"}), "dtype has no effect"),
        (lambda: several({}, {"name": "a"}), "the name 'a' is used more than once"),
        (lambda: several({}, {"topK": 8}), "topK is 8 and 32: set the same"),
        (lambda: several({}, {"url": None, "servedAs": None}), "'b' has no url"),
        (lambda: several({}, {"weight": 0}), "greater than 0"),
        (lambda: several({}, teacher=SERVED), "teacher and teachers: set one of them"),
        (lambda: several({}, temperature=2.0), "temperature 2 needs a teacher that is loaded here"),
        (lambda: distill(SERVED, temperature=2.0), "temperature 2 needs a teacher that is loaded here"),
        (lambda: distill(SERVED, student={"teacherLayers": [0]}), "student.teacherLayers needs a teacher that is loaded"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(make, reason):
    found = said(make)
    assert reason in found and "\n" not in found


def test_what_rounds_otherwise_or_is_faster_is_the_users_choice():
    words = (
        "--dtype",
        "half",
        "--quantization",
        "fp8",
        "--load-format",
        "safetensors",
        "-q=fp8",
        "--max-model-len",
        "4k",
    )
    flags = (
        "--gpu-memory-utilization=0.5",
        "--enforce-eager",
        "--max-num-seqs",
        "16",
        "--trust-remote-code",
        "-tp",
        "2",
    )
    assert own(*words, *flags).server.args == (*words, *flags)


LONG = {**PROMPTS, "maxPromptLength": 400}
ROWS = {**EVALUATION["data"], "maxPromptLength": 400}
LENGTH = {"name": "length", "length": {}}
OF_OWN_ROWS = {"name": "length", "length": {"data": ROWS}}
STUDENT = {"prompts": LONG, "sampling": VLLM}

SPEAKING = {
    "rollout": (lambda server: rollout({"phase": "a"}, data=LONG, server=server), 656),
    "rollout with scores": (lambda server: rollout({"phase": "a"}, data=LONG, teacherTopK=8, server=server), 657),
    "ppo": (lambda server: ppo({"data": LONG, "server": server}), 656),
    "distill": (lambda server: distill({"source": "x"}, server=server, **STUDENT), 656),
    "distill, held": (lambda server: distill({"source": "x"}, server=server, **STUDENT, maxLength=650), 650),
    "evaluate": (lambda server: evaluation([{"phase": "a"}], VLLM, data=ROWS, benchmarks=[LENGTH], server=server), 656),
    "of own rows": (lambda server: evaluation([{"phase": "a"}], VLLM, benchmarks=[OF_OWN_ROWS], server=server), 656),
}
"""Phases with prompts of 400 tokens, responses of 256, and the tokens that a server is asked for."""


@pytest.mark.parametrize("name", SPEAKING)
def test_prompts_and_responses_that_are_longer_than_a_server_takes(name):
    make, asked = SPEAKING[name]
    for words in (["--max-model-len", f"{asked - 1}"], [f"--max_model_len={asked - 1}"], ["--max-model-len", "0.6k"]):
        found = said(lambda words=words: make({"args": words}))
        assert "maxPromptLength 400 and sampling.maxNewTokens 256" in found and "\n" not in found
        assert f"are {asked}; set {asked}, or lower them" in found
    for words in ([f"--max-model-len={asked}"], ["--max-model-len", "1k"], ["--max-model-len", "auto"]):
        assert make({"args": words}).server.args == tuple(words)


def test_prompts_whose_length_is_not_said_may_be_short():
    assert own("--max-model-len", "300").data.longest_prompt is None
    assert ppo({"server": {"args": ["--max-model-len=300"]}}).data.max_prompt_length > 300


@pytest.mark.parametrize(
    ("word", "longest"),
    [("257", 257), ("4k", 4000), ("4K", 4096), ("25.6k", 25600), ("auto", None), ("AUTO", None), ("-1", None)],
)
def test_lengths_that_vllm_reads(word, longest):
    for args in (("--max-model-len", word), (f"--max_model_len={word}", "--enforce-eager")):
        assert own(*args).server.longest == longest
        assert own(*args).server.with_flags({"--max-model-len": "9"})[-1] == "--max-model-len=9"


def test_a_negative_number_goes_with_its_flag():
    assert own("--max-model-len", "-1", "--seed", "3").server.with_flags({"--max-model-len": "512"}) == [
        "--seed", "3", "--max-model-len=512",
    ]  # fmt: skip


def test_a_benchmark_may_have_an_engine_of_its_own():
    length = {"name": "length", "length": {"sampling": VLLM}}
    assert evaluation([{"phase": "a", "url": URL}], benchmarks=[length]).models[0].url == URL


def test_an_address_is_no_identity_and_what_it_serves_is():
    def digest(**policy):
        return phase_digest("rollout", rollout({"phase": "dpo", "url": URL, **policy}), "", {"dpo": "0"})

    assert digest() == digest(url="https://elsewhere", keyVariable="K", checkWeights=False)
    assert digest() != digest(servedAs="dpo-2")
    own = rollout({"phase": "dpo"}, {})
    assert digest() != phase_digest("rollout", own, "", {"dpo": "0"})


def test_how_a_server_is_started_is_no_identity_and_what_it_computes_with_is():
    def digest(**server):
        spec = rollout({"phase": "dpo"}, server={"args": ["--dtype", "float16"], **server})
        return phase_digest("rollout", spec, "", {"dpo": "0"})

    assert digest() == digest(command=["/opt/vllm/bin/vllm", "serve"], startTimeoutSeconds=60)
    assert digest() != digest(args=["--quantization", "fp8"])


def test_an_evaluation_may_have_both_kinds_of_servers():
    found = evaluation([{"phase": "a", "url": URL}, {"phase": "b"}], VLLM, server={})
    assert found.models[1].url is None and found.server is not None


def test_a_served_teacher_is_its_name_and_its_number_of_tokens():
    def digest(**teacher):
        return phase_digest("distill", distill({**SERVED, **teacher}), "", {})

    assert digest() == digest(url="https://elsewhere", keyVariable="K", concurrency=64)
    assert len({digest(), digest(servedAs="bigger"), digest(topK=64)}) == 3


def test_only_a_teacher_that_is_loaded_has_a_size():
    assert "teacherParameters" in distill({"source": "x"}).final_metrics()
    assert "teacherParameters" not in distill(SERVED).final_metrics()
