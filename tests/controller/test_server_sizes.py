"""What is told beforehand of a vLLM that a phase starts: what it takes, beside the phase or in a container of its own."""

import json

import pytest
from builders import PROMPTS, make_run
from sized import BIG, CONFIGS, SMALL, one

from controller.commands.sizes import remarks, row, sizes_here
from controller.plan.advice import changed
from controller.plan.resolve import resolve
from controller.plan.sizes import PhaseSize, sentence
from trainers.sizing.devices import GIB
from trainers.sizing.servers import PROCESSES
from trainers.spec import OwnServer

GPU = {"gpuMemory": "80Gi", "resources": {"limits": {"nvidia.com/gpu": 1}}}
UNKNOWN_GPU = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
STATED = {key: config | {"max_position_embeddings": 32768} for key, config in CONFIGS.items()}
"""A token of org/big leaves 2 x 8 heads x 128 numbers in each of 32 layers: 128 KiB in bf16, a sequence of 32768 4 GiB."""


def cpu(memory: str, **more) -> dict:
    return {"resources": {"limits": {"memory": memory}}, **more}


def rollout(template: dict, *args: str, source: str = "org/big") -> PhaseSize:
    spec = {"policy": {"source": source}, "data": PROMPTS, "sampling": {"engine": "vllm"}, "server": {"args": [*args]}}
    return one({"name": "traces", "rollout": spec}, STATED, template)


def ppo(template: dict, *args: str, engine: str = "vllm") -> PhaseSize:
    model = {"source": "org/small"}
    spec = {"policy": model, "rewardModel": model, "data": PROMPTS, "lora": {"rank": 8}, "sampling": {"engine": engine}}
    spec |= {"parallel": {"gradientCheckpointing": True}} | ({"server": {"args": [*args]}} if args else {})
    return one({"name": "ppo", "ppo": spec}, STATED, template)


def test_a_share_of_the_gpu():
    assert rollout(GPU).needs.memory.total == int(0.92 * 80 * GIB), "vLLM's own default"
    size = rollout(GPU, "--gpu-memory-utilization", "0.5")
    assert (size.needs.memory.vllm, size.fits) == (40 * GIB, True)
    assert sentence(size) == "needs 40 GiB of 80 GiB on one device, of which 40 GiB for vLLM"
    assert row(size)[:2] == ("traces", "policy 8.03B")


@pytest.mark.parametrize("args", [("--gpu_memory_utilization", "0.5"), ("--gpu-memory-utilization=0.5",)])
def test_flags_are_read_as_vllm_reads_them(args):
    assert rollout(GPU, *args).needs.memory.vllm == 40 * GIB


def test_keys_and_values_of_a_size_that_is_said():
    size = rollout(GPU, "--kv-cache-memory-bytes", "10G")
    assert size.needs.memory.vllm == 2 * BIG + 10 * GIB
    assert rollout(GPU, "--kv-cache-memory-bytes", "10g", "--dtype", "float32").needs.memory.vllm == 4 * BIG + 10**10


def test_one_that_would_not_start_is_told_with_what_would():
    size = rollout(GPU, "--gpu-memory-utilization", "0.2")
    assert size.fits is False
    assert sentence(size) == (
        "needs 16 GiB of 80 GiB on one device, of which 16 GiB for vLLM, less than the 19 GiB of its weights and a sequence of "
        "32768 tokens, which does not fit; "
        "would fit with server.args: [--gpu-memory-utilization, '0.2', --max-model-len=768]: 16 GiB"
    )
    assert size.needs.server.least == 2 * BIG + 4 * GIB
    assert rollout(GPU, "--gpu-memory-utilization", "0.2", "--max-model-len", "4096").fits is True
    assert (
        rollout(GPU, "--gpu-memory-utilization", "0.2", "--kv-cache-dtype", "fp8").needs.server.least
        == 2 * BIG + 2 * GIB
    )


def test_spread_over_gpus():
    assert rollout(GPU, "--tensor-parallel-size", "2").needs.server.least == BIG + 2 * GIB


def test_a_trainer_beside_it():
    """The default leaves a trainer 6 GiB."""
    alone = ppo(GPU, engine="own").needs.memory.total
    size = ppo(GPU)
    assert size.needs.memory.vllm == int(0.92 * 80 * GIB)
    assert size.needs.memory.total > alone
    assert size.fits is False
    assert size.advice.startswith("would fit with server.args: [--gpu-memory-utilization=0.")
    word = size.advice.split("[")[1].split("]")[0]
    followed = ppo(GPU, word)
    assert followed.fits is True, "the advice, followed, is right"
    assert "of which" in sentence(followed)


def test_a_gpu_of_unknown_memory():
    size = ppo(UNKNOWN_GPU)
    assert (size.fits, size.needs.known) == (None, False)
    assert size.needs.memory.vllm == 2 * SMALL
    said = sentence(size)
    assert said.startswith("needs at least ")
    assert said.endswith("of which 2.9 GiB for vLLM: what it starts with, and it takes 0.92 of the memory there")
    assert remarks([size]) == [f"ppo {said}"]


def test_in_a_container_of_its_own():
    """Its GPUs are not the trainer's, which a trainer that has none shows."""
    apart = {"server": {"resources": {"limits": {"nvidia.com/gpu": 1}}}, "gpuMemory": "80Gi"}
    size = rollout(apart)
    assert (size.needs.memory.total, size.fits) == (0, True)
    assert sentence(size).endswith("and 74 GiB for vLLM in a container of its own")
    assert rollout(apart | {"gpuMemory": "16Gi"}).fits is False
    on_cpu = {"server": {"resources": {"limits": {"memory": "8Gi"}}}, **cpu("64Gi")}
    assert rollout(on_cpu).fits is False, "its weights alone are 30 GiB"
    assert rollout(on_cpu | {"server": {}}).fits is True, "nothing says what the container may use"


def test_on_a_processor():
    """vLLM takes its share of the container's limit there too, unless it is told in GiB."""
    assert rollout(cpu("64Gi"), source="org/small").needs.memory.vllm == int(0.92 * 64 * GIB)
    env = {"env": [{"name": "VLLM_CPU_KVCACHE_SPACE", "value": "4"}]}
    size = rollout(cpu("64Gi", **env), source="org/small")
    assert size.needs.memory.vllm == 4 * SMALL + 4 * GIB + PROCESSES
    shared = rollout(cpu("64Gi", procsPerNode=2, **env), source="org/small")
    assert shared.needs.memory.vllm == size.needs.memory.vllm // 2, "of each process's half of the machine"
    assert rollout({"nodes": 1, **env}, source="org/small").needs.known, "what is said is known on any machine"
    unknown = rollout({"nodes": 1}, source="org/small")
    assert not unknown.needs.known and row(unknown)[-1] == "–"
    both = rollout({"nodes": 1, **env}, "--kv-cache-memory-bytes", "10G", source="org/small")
    assert both.needs.memory.vllm == size.needs.memory.vllm, "vLLM takes what the environment says"


def test_an_evaluation_has_one_server_at_a_time_beside_its_weights():
    models = [{"name": name, "source": f"org/{name}"} for name in ("big", "small")]
    spec = {"models": models, "sampling": {"engine": "vllm"}, "benchmarks": []}
    size = one({"name": "eval", "evaluate": spec}, STATED, GPU)
    assert size.needs.memory.vllm == int(0.92 * 80 * GIB)
    assert size.needs.memory.frozen == 2 * BIG
    assert size.needs.server.least == 2 * BIG + 4 * GIB
    assert size.fits is False


def test_quantized_weights_are_not_counted():
    assert rollout(GPU, "--quantization", "fp8").needs.server.least == 4 * GIB


def test_another_word_for_a_flag_of_the_phase_is_refused():
    with pytest.raises(ValueError, match="--served_model_name is set by the phase"):
        OwnServer(args=("--served_model_name", "other"))


def test_other_flags_keep_their_words():
    own = OwnServer(args=("--enforce-eager", "--max_model_len", "9", "--allowed-origins", "a", "b"))
    assert own.with_flags({"--max-model-len": "4"}) == [
        "--enforce-eager",
        "--allowed-origins",
        "a",
        "b",
        "--max-model-len=4",
    ]


def test_what_a_run_does_not_say_keeps_no_advice_from_it():
    """Lengths that may go beyond the server's by what is there unless said."""
    spec = {"policy": {"source": "org/big"}, "data": PROMPTS, "sampling": {"engine": "vllm"}}
    spec["server"] = {"args": ["--max-model-len=300"]}
    phase = next(iter(resolve(make_run({"name": "traces", "rollout": spec}, template=GPU))))
    assert changed(phase, {"sampling.batchSize": 1}) is not None


def test_on_this_machine(tmp_path, monkeypatch):
    """What nothing limits has the machine's memory, or its container's."""
    monkeypatch.setattr("controller.commands.sizes.machine_memory", lambda: 40 * GIB)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIGS["org/big", None]))
    spec = {"policy": {"source": "model"}, "data": PROMPTS, "sampling": {"engine": "vllm"}}

    def here(template: dict) -> PhaseSize:
        return sizes_here(make_run({"name": "traces", "rollout": spec}, template=template), tmp_path)["traces"]

    size = here({"nodes": 1})
    assert size.needs.memory.vllm == int(0.92 * 40 * GIB)
    assert sentence(size) == "needs 37 GiB of this machine's 40 GiB on one device, of which 37 GiB for vLLM"
    assert row(size)[-2:] == ("37 GiB", "40 GiB")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    size = here({"nodes": 1})
    assert size.needs.memory.vllm == 4 * BIG + 4 * GIB + PROCESSES, "in fp32, and as the phase's environment says"
    assert here({"nodes": 1, "env": [{"name": "VLLM_CPU_KVCACHE_SPACE", "value": "6"}]}).needs.memory.vllm == (
        size.needs.memory.vllm + 2 * GIB
    ), "what the run says comes first"
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    monkeypatch.setattr("controller.commands.sizes.machine_memory", lambda: 20 * GIB)
    assert here({"nodes": 1}).fits is False, "its weights alone are 30 GiB"
    assert here(cpu("64Gi")).needs.memory.vllm == int(0.92 * 64 * GIB), "a limit is what counts"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not here({"nodes": 1}).needs.known, "it would be on the GPU"
