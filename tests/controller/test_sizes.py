"""What phases will need, worked out from a run and the configs of its models."""

import re

import pytest
import yaml
from builders import DATA, PAIRS, PROMPTS, START, document, dpo, make_run, ppo, reward, sft
from typer.testing import CliRunner

from controller.api.quantities import byte_count
from controller.api.run import AlignmentRun
from controller.cli import app
from controller.commands.sizes import count, markdown_lines, plain_lines, remarks, sizes_here
from controller.operator.events import transitions
from controller.plan.decide import decide
from controller.plan.observed import Observed
from controller.plan.shapes import sources
from controller.plan.sizes import PhaseSize, run_sizes, sentence, shown
from trainers.sizing.devices import GIB, product_memory
from trainers.sizing.memory import Place, forward_alone
from trainers.sizing.shapes import shape_of
from trainers.spec import Parallel

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_1B = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
BIG, SMALL = 8_030_261_248, 1_543_714_304
CONFIGS = {("org/big", None): LLAMA_8B, ("org/small", None): QWEN_1B, ("org/small", "v2"): QWEN_1B}
ON_POLICY = {"prompts": PROMPTS, "onPolicyFraction": 1}
EIGHT_H100 = {"procsPerNode": 8, "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}}


def tuned(source: str, name: str = "sft", **settings) -> dict:
    return {"name": name, "sft": {"model": {"source": source}, "data": DATA, **settings}}


def one(phase: dict, configs=CONFIGS, template=EIGHT_H100) -> PhaseSize:
    return run_sizes(make_run(phase, template=template), configs)[phase["name"]]


@pytest.mark.parametrize(
    ("quantity", "size"),
    [
        ("80Gi", 80 * 2**30),
        ("1.5G", 1_500_000_000),
        ("128974848", 128_974_848),
        ("1e9", 10**9),
        ("1500m", 1),
        ("2k", 2000),
    ],
)
def test_quantities(quantity, size):
    assert byte_count(quantity) == size


@pytest.mark.parametrize("text", ["", "80 Gi", "Gi", "-1", "8GiB"])
def test_what_is_no_quantity(text):
    with pytest.raises(ValueError, match="not a quantity"):
        byte_count(text)


@pytest.mark.parametrize(
    ("product", "size"),
    [
        ("NVIDIA-A100-SXM4-80GB", 80), ("NVIDIA-A100-SXM4-40GB", 40), ("NVIDIA-A100-SXM4-40GB-MIG-2g.10gb", 10),
        ("NVIDIA-H100-80GB-HBM3", 80), ("NVIDIA-H200", 139), ("NVIDIA-L4", 22), ("NVIDIA-L40S", 44), ("Tesla-T4", 14),
        ("Tesla-V100-SXM2-32GB", 32), ("NVIDIA-A10G", 22), ("NVIDIA-H100-NVL", 93), ("NVIDIA-B200", 178),
    ],
)  # fmt: skip
def test_memory_of_products(product, size):
    assert product_memory(product) == size * GIB


def test_products_that_are_not_known():
    assert product_memory("AMD-Instinct") is None
    assert product_memory("") is None


# ---------------------------------------------------------------- by hand


def test_data_parallel_training_by_hand():
    """Sixteen bytes a parameter: weights, gradients, two moments in fp32; and DDP's buckets."""
    memory = one(tuned("org/small")).needs.memory
    assert memory.weights == memory.gradients == memory.exchange == 4 * SMALL
    assert memory.optimizer == 8 * SMALL
    assert memory.frozen == memory.cache == 0


def test_a_single_process_has_no_buckets():
    memory = one(tuned("org/small"), template={**EIGHT_H100, "procsPerNode": 1}).needs.memory
    assert memory.exchange == 0


def test_fully_sharded_training_by_hand():
    memory = one(tuned("org/big", parallel={"strategy": "fsdp"})).needs.memory
    assert memory.weights == memory.gradients == 4 * BIG // 8
    assert memory.optimizer == 8 * BIG // 8
    layer = 218_112_000
    # Two whole layers in bf16, or one and the embeddings in fp32; and the gradient of these, as it is made and as it is sent.
    embedding = 128256 * 4096
    assert memory.exchange == 2 * layer + 4 * embedding + 8 * embedding


def test_hybrid_sharding_divides_by_a_node():
    parallel = {"strategy": "fsdp", "fsdp": {"hybrid": True}}
    template = {**EIGHT_H100, "nodes": 4}
    assert one(tuned("org/big", parallel=parallel), template=template).needs.memory.weights == 4 * BIG // 8
    plain = one(tuned("org/big", parallel={"strategy": "fsdp"}), template=template)
    assert plain.needs.memory.weights == 4 * BIG // 32
    assert plain.devices == 32


@pytest.mark.parametrize(("stage", "parts"), [(1, (1, 1, 8)), (2, (1, 8, 8)), (3, (8, 8, 8))])
def test_zero_splits_moments_then_gradients_then_weights(stage, parts):
    parallel = {"strategy": "deepspeed", "deepspeed": {"stage": stage}}
    memory = one(tuned("org/big", parallel=parallel)).needs.memory
    assert (memory.weights, memory.gradients) == (4 * BIG // parts[0], 4 * BIG // parts[1])
    assert memory.optimizer == 12 * BIG // parts[2], "moments, and the copy in fp32 that is updated"


def test_offloaded_is_not_on_the_device():
    parallel = {"strategy": "fsdp", "fsdp": {"cpuOffload": True}}
    memory = one(tuned("org/big", parallel=parallel)).needs.memory
    assert memory.weights == memory.gradients == memory.optimizer == 0
    assert memory.activations > 0


@pytest.mark.parametrize(
    ("stage", "more", "left"), [(2, {}, "weights"), (3, {}, "weights"), (3, {"offloadParameters": True}, "")]
)
def test_zeros_gradients_are_where_moments_are(stage, more, left):
    zero = {"stage": stage, "offloadOptimizer": True, **more}
    memory = one(tuned("org/big", parallel={"strategy": "deepspeed", "deepspeed": zero})).needs.memory
    assert memory.gradients == memory.optimizer == 0
    assert bool(memory.weights) == bool(left)


def test_adapters_are_all_that_is_trained():
    memory = one(tuned("org/big", lora={"rank": 16})).needs.memory
    trained = 16 * 32 * (3 * (4096 + 14336) + 2 * (4096 + 4096) + 2 * (4096 + 1024))
    assert memory.weights == 2 * BIG + 4 * trained
    assert memory.optimizer == 8 * trained


def test_moments_in_bf16_are_half():
    assert one(tuned("org/small", optim={"stateDtype": "bf16"})).needs.memory.optimizer == 4 * SMALL


def test_weights_in_bf16():
    phase = {"name": "sft", "sft": {"model": {"source": "org/small", "dtype": "bf16"}, "data": DATA}}
    memory = one(phase).needs.memory
    assert memory.weights == memory.gradients == 2 * SMALL


def test_activations_grow_with_the_tokens():
    def kept(tokens: int) -> int:
        return one(tuned("org/big", parallel={"microBatchTokens": tokens})).needs.memory.activations

    assert kept(3072) - kept(2048) == kept(2048) - kept(1024) > 2**30


@pytest.mark.parametrize(
    ("phase", "longest"),
    [
        (tuned("org/big", data={**DATA, "maxLength": 2048}), 2048),
        ({"name": "reward", "reward": {"model": {"source": "org/big"}, "data": {**PAIRS, "maxLength": 1024}}}, 2048),
        ({"name": "dpo", "dpo": {"policy": {"source": "org/big"}, "data": {**PAIRS, "maxLength": 1024}}}, 2048),
    ],
)
def test_a_pass_is_no_smaller_than_its_longest_example(phase, longest):
    """So fewer tokens than that are no advice."""

    def size(tokens: int, memory: str = "80Gi") -> PhaseSize:
        kind = next(name for name in phase if name != "name")
        parallel = {"strategy": "fsdp", "microBatchTokens": tokens, "gradientCheckpointing": True}
        return one(
            phase | {kind: phase[kind] | {"parallel": parallel}}, template={"procsPerNode": 8, "gpuMemory": memory}
        )

    assert size(512).needs.memory == size(longest).needs.memory
    assert size(longest).needs.memory.activations < size(2 * longest).needs.memory.activations
    for memory in ("16Gi", "18Gi", "20Gi", "22Gi", "24Gi"):
        advised = re.search(r"microBatchTokens: (\d+)", size(8192, memory).advice)
        assert advised is None or int(advised[1]) >= longest


def test_the_cache_by_hand():
    """Keys and values of 64 responses of 512 + 256 tokens in bf16; one layer more while it grows; what computes prompts."""
    phase = {"name": "traces", "rollout": {"policy": {"source": "org/big"}, "data": PROMPTS}}
    memory = one(phase).needs.memory
    a_token = 2 * 8 * 128 * 32
    prompts = forward_alone(Place(Parallel(), bf16=True), shape_of(LLAMA_8B), 64 * 512, 512)
    assert memory.cache == 2 * a_token * 64 * 768 * 33 // 32 + prompts
    assert memory.frozen == 2 * BIG
    phase["rollout"]["data"] = {**PROMPTS, "maxPromptLength": 1}
    assert one(phase).needs.memory.cache == 2 * a_token * 64 * 257 * 33 // 32 + 64 * 128256 * 16, "or logits"


def test_casts_of_a_policy_that_speaks_under_autocast():
    """Its weights are held in fp32, and have copies in bf16 while it does; embeddings and head have none."""
    phase = ppo("ppo", "sft", "r")
    run = make_run(tuned("org/big"), reward("r", "sft"), phase, template=EIGHT_H100)
    spoken = run_sizes(run, CONFIGS)["ppo"].needs.memory.cache
    phase["ppo"]["parallel"] = {"precision": "fp32"}
    run = make_run(tuned("org/big"), reward("r", "sft"), phase, template=EIGHT_H100)
    plain = run_sizes(run, CONFIGS)["ppo"].needs.memory
    assert plain.cache > 0
    assert spoken > 2 * (BIG - 2 * 128256 * 4096)


def test_a_reference_whose_scores_are_stored_is_gone_before_there_are_moments():
    phase = {
        "name": "dpo",
        "dpo": {"policy": {"source": "org/small"}, "reference": {"source": "org/small"}, "data": PAIRS},
    }
    memory = one(phase).needs.memory
    assert memory.frozen == 0
    assert memory.cache > 4 * SMALL, "it is held as the policy is"
    phase["dpo"]["referenceScores"] = "on-the-fly"
    assert one(phase).needs.memory.frozen == 4 * SMALL


@pytest.mark.parametrize(
    ("zero", "stage", "exchange"),
    [
        ({}, 2, 4 * 5 * 10**8),
        ({"reduce_bucket_size": 10**7}, 2, 4 * 10**7),
        ({"reduce_bucket_size": 10**7, "overlap_comm": True}, 2, 2 * 4 * 10**7),
        ({}, 3, 4 * (10**9 + 2 * 5 * 10**8)),
        (
            {
                "reduce_bucket_size": 10**7, "stage3_max_live_parameters": 10**8, "stage3_max_reuse_distance": 10**8,
                "stage3_prefetch_bucket_size": 10**6,
            },
            3,
            4 * (128256 * 4096 + 10**6 + 2 * 10**7),
        ),
    ],
)  # fmt: skip
def test_buckets_are_those_of_the_deepspeed_file(zero, stage, exchange):
    parallel = {"strategy": "deepspeed", "deepspeed": {"stage": stage, "config": "zero.json"}}
    run = make_run(tuned("org/big", parallel=parallel), template=EIGHT_H100)
    assert run_sizes(run, CONFIGS, {"zero.json": zero})["sft"].needs.memory.exchange == exchange


def test_a_bucket_is_no_larger_than_the_gradients():
    small = tuned("org/small", parallel={"strategy": "deepspeed", "deepspeed": {"stage": 1}}, lora={"rank": 1})
    memory = one(small).needs.memory
    assert memory.exchange == memory.gradients


def test_sampling_gathers_layers_where_whole_weights_do_not_fit():
    configs = CONFIGS | {("org/huge", None): SEVENTY}

    def of(source: str) -> PhaseSize:
        policy = {"policy": {"source": source}, "data": PROMPTS, "parallel": {"frozen": "sharded"}}
        return one({"name": "traces", "rollout": policy}, configs)

    size = of("org/huge")
    assert size.fits
    assert size.needs.memory.total < 2 * size.needs.models[0][1], "whole it takes two bytes a parameter"
    assert sentence(size).endswith("do not fit: layers are gathered for every token, which is slow")
    assert of("org/big").needs.memory.cache > 2 * BIG
    assert "layers" not in sentence(of("org/big"))


# ---------------------------------------------------------------- through the graph


def test_phases_have_the_size_of_what_they_start_from():
    run = make_run(
        tuned("org/small", "base"), dpo("dpo", "base"), reward("reward", "dpo"), ppo("ppo", "dpo", "reward"),
        template=EIGHT_H100,
    )  # fmt: skip
    sizes = run_sizes(run, CONFIGS)
    scalar = SMALL + 1536  # embeddings without a head of their own, and a score
    assert dict(sizes["dpo"].needs.models) == {"policy": SMALL}
    assert dict(sizes["reward"].needs.models) == {"model": scalar}
    assert dict(sizes["ppo"].needs.models) == {
        "policy": SMALL, "rewardModel": scalar, "critic": scalar, "reference": SMALL,
    }  # fmt: skip


def test_a_distillation_holds_its_teacher_frozen():
    phase = {
        "name": "distill",
        "distill": {"teacher": {"source": "org/big"}, "student": {"source": "org/small"}, **ON_POLICY},
    }  # fmt: skip
    memory = one(phase).needs.memory
    assert memory.frozen == 2 * BIG
    assert memory.weights == 4 * SMALL
    phase["distill"]["parallel"] = {"strategy": "fsdp"}
    assert one(phase).needs.memory.frozen == 2 * BIG // 8


def test_a_student_of_some_layers():
    phase = {
        "name": "distill",
        "distill": {"teacher": {"source": "org/big"}, "student": {"teacherLayers": [0, 8, 16, 24]}, **ON_POLICY},
    }  # fmt: skip
    assert dict(one(phase).needs.models)["student"] == BIG - 28 * 218_112_000


def test_scratch_models_need_no_config():
    assert run_sizes(make_run(sft("base")), {})["base"].needs is not None


def test_packaging_needs_no_device():
    assert "package" not in run_sizes(make_run(sft("base"), {"name": "package", "package": {}}), {})


def test_sources_are_those_that_are_named():
    run = make_run(
        tuned("org/big"), ppo("ppo", "sft", "r"), reward("r", "sft"), model={"source": "org/small", "revision": "v2"}
    )
    assert sources(run) == {("org/big", None), ("org/small", "v2")}


# ---------------------------------------------------------------- whether it fits


def test_what_fits():
    size = one(tuned("org/small", parallel={"microBatchTokens": 4096}))
    assert size.fits is True
    assert size.advice == ""


def test_what_does_not_fit_and_what_would():
    size = one(tuned("org/big"))
    assert size.fits is False
    assert size.advice.startswith("would fit with strategy: fsdp, gradientCheckpointing: true")
    changed = one(tuned("org/big", parallel={"strategy": "fsdp", "gradientCheckpointing": True}))
    assert changed.fits is True, "the advice, followed, is right"


def test_fewer_tokens_at_once():
    size = one(tuned("org/small", parallel={"gradientCheckpointing": True, "microBatchTokens": 2**18}))
    assert size.advice.startswith("would fit with microBatchTokens: ")
    tokens = int(size.advice.split()[4].rstrip(":"))
    assert one(tuned("org/small", parallel={"gradientCheckpointing": True, "microBatchTokens": tokens})).fits is True


def test_fewer_responses_at_once():
    data = {**PROMPTS, "maxPromptLength": 4096}
    phase = {"name": "traces", "rollout": {"policy": {"source": "org/big"}, "data": data}}
    phase["rollout"]["sampling"] = {"batchSize": 512}
    size = one(phase)
    assert size.fits is False
    assert size.advice.startswith("would fit with sampling.batchSize: ")
    phase["rollout"]["sampling"] = {"batchSize": int(size.advice.split()[4].rstrip(":"))}
    assert one(phase).fits is True


def test_layers_are_computed_again_before_passes_get_tiny():
    size = one(tuned("org/big", lora={"rank": 16}), template={**EIGHT_H100, "procsPerNode": 1, "gpuMemory": "24Gi"})
    assert size.advice.startswith("would fit with gradientCheckpointing: true")


SEVENTY = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def seventy(phase: dict, memory: str | None = None) -> PhaseSize:
    resources = {} if memory is None else {"resources": {"limits": {"memory": memory}}}
    return one(phase, {("org/70b", None): SEVENTY}, EIGHT_H100 | resources)


def test_what_is_offloaded_needs_room_in_the_machine():
    """70B are sixteen bytes a parameter there, an eighth of it for each process."""
    phase = tuned("org/70b", parallel={"strategy": "fsdp"})
    size = seventy(phase)
    assert size.fits is False
    assert "fsdp.cpuOffload" in size.advice
    assert size.advice.endswith("and 131 GiB of the machine's memory for each")
    assert seventy(phase, "2Ti").advice == size.advice
    assert "nodes:" in seventy(phase, "1Ti").advice


def test_smaller_passes_come_before_twice_as_many_nodes():
    template = {"procsPerNode": 8, "gpuMemory": "22Gi", "resources": {"limits": {"memory": "64Gi"}}}
    assert "nodes: 2, strategy: fsdp" in (advice := one(tuned("org/big"), template=template).advice)
    assert "microBatchTokens: " in advice


def test_followed_advice_to_offload_says_what_lies_beside_the_device():
    settings = {"strategy": "fsdp", "fsdp": {"cpuOffload": True}, "gradientCheckpointing": True}
    phase = tuned("org/70b", parallel=settings)
    assert seventy(phase).needs.memory.offloaded == 16 * seventy(phase).needs.models[0][1] // 8
    assert "131 GiB of the machine's memory for each" in sentence(seventy(phase))
    assert (seventy(phase, "2Ti").fits, seventy(phase, "1Ti").fits) == (True, False)


def test_sampling_by_layers_is_advised_where_no_device_holds_whole_weights():
    """Whole ones are 131 GiB, whatever the number of nodes."""
    phase = {"name": "traces", "rollout": {"policy": {"source": "org/70b"}, "data": PROMPTS}}
    phase["rollout"]["sampling"] = {"batchSize": 16}
    size = seventy(phase)
    assert size.fits is False
    assert size.advice.startswith("would fit with frozen: sharded: ")
    assert size.advice.endswith("layers are gathered for every token, which is slow")
    phase["rollout"]["parallel"] = {"frozen": "sharded"}
    assert seventy(phase).fits is True


def test_nothing_that_would_fit():
    assert one(tuned("org/big"), template={"procsPerNode": 1, "gpuMemory": "1Gi"}).advice.startswith("no strategy")


def test_one_device_can_put_what_it_trains_into_the_machines_memory():
    template = {"procsPerNode": 1, "nodeSelector": {"nvidia.com/gpu.product": "Tesla-T4"}}
    assert "fsdp.cpuOffload: true" in one(tuned("org/big"), template=template).advice
    template |= {"resources": {"limits": {"memory": "64Gi"}}}
    assert "nodes: " in one(tuned("org/big"), template=template).advice


def test_a_gpu_whose_memory_is_said():
    template = {"procsPerNode": 8, "gpuMemory": "192Gi", "resources": {"limits": {"nvidia.com/gpu": 8}}}
    assert one(tuned("org/big"), template=template).device.memory == 192 * GIB


def test_what_is_set_aside_is_told_where_it_decides():
    def said(memory: str, machine: str = "2Ti", **parallel) -> str:
        template = {"procsPerNode": 8, "gpuMemory": memory, "resources": {"limits": {"memory": machine}}}
        settings = {"strategy": "fsdp", "gradientCheckpointing": True} | parallel
        return sentence(one(tuned("org/big", parallel=settings), template=template))

    assert "needs 30 GiB of 30 GiB on each of 8 devices, of which 28 GiB can be used, which does not fit" in said(
        "30Gi"
    )
    assert "needs 30 GiB of 22 GiB on each of 8 devices, which does not fit" in said("22Gi")
    offloaded = said("30Gi", "64Gi", fsdp={"cpuOffload": True})
    assert "and 15 GiB of the machine's memory for each, where there are 7.2 GiB, which does not fit" in offloaded


def test_a_gpu_of_unknown_memory():
    size = one(tuned("org/big"), template={"resources": {"limits": {"nvidia.com/gpu": 1}}})
    assert size.device.gpu
    assert size.fits is None


def test_on_a_cpu_processes_share_the_limit():
    template = {"procsPerNode": 2, "resources": {"limits": {"memory": "64Gi"}}}
    size = one(tuned("org/small"), template=template)
    assert (size.device.memory, size.fits) == (32 * GIB, False)
    assert size.needs.memory.frozen == 0


def test_a_size_that_is_not_known_is_said_once():
    run = make_run(tuned("org/other"), dpo("dpo", "sft"), template=EIGHT_H100)
    sizes = list(run_sizes(run, CONFIGS).values())
    assert remarks(sizes) == ["what sft, dpo will need is not known: the config.json of org/other is not known here"]
    assert len(plain_lines(sizes)) == 1


def test_state_spaces_keep_what_no_arithmetic_tells():
    config = {
        "model_type": "mamba2", "hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 8,
        "num_hidden_layers": 2, "vocab_size": 99, "conv_kernel": 4,
    }  # fmt: skip
    size = one(tuned("org/m"), {("org/m", None): config})
    assert size.fits is None
    assert "> " in plain_lines([size])[1]


def test_tables():
    size = one(tuned("org/small", parallel={"microBatchTokens": 4096}))
    assert "sft" in plain_lines([size])[1]
    assert "model 1.54B" in plain_lines([size])[1]
    header, rule, line = markdown_lines([size])
    assert header.count("|") == rule.count("|") == line.count("|")


@pytest.mark.parametrize(
    ("number", "text"), [(7_615_616_512, "7.62B"), (134_515_008, "135M"), (13_000, "13k"), (7, "7")]
)
def test_counts(number, text):
    assert count(number) == text


@pytest.mark.parametrize(("size", "text"), [(38 * GIB, "38 GiB"), (3 * GIB // 2, "1.5 GiB"), (210 * 2**20, "210 MiB")])
def test_sizes_in_words(size, text):
    assert shown(size) == text


LARGE = {"scratch": {"hiddenSize": 4096, "numLayers": 32, "numHeads": 32, "tokenizer": {"trainOn": DATA["train"]}}}


@pytest.mark.parametrize(("memory", "warned"), [("80Gi", True), ("800Gi", False), (None, False)])
def test_validate_warns_of_what_does_not_fit_and_does_not_fail(memory, warned, tmp_path):
    template = {"procsPerNode": 8, "resources": {"limits": {"nvidia.com/gpu": 8}}}
    template |= {"gpuMemory": memory} if memory else {}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(document({"name": "sft", "sft": {"model": LARGE, "data": DATA}}, template=template)))
    result = CliRunner().invoke(app, ["validate", str(file)])
    assert (result.exit_code, "is valid" in result.stdout) == (0, True)
    assert ("warning: sft needs" in result.stderr) is warned
    assert ("would fit with strategy: fsdp" in result.stderr) is warned


def test_plans_read_the_deepspeed_file(tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"reduce_bucket_size": 10000000}}')
    parallel = {"strategy": "deepspeed", "deepspeed": {"stage": 2, "config": "zero.json"}}
    run = make_run({"name": "sft", "sft": {"model": LARGE, "data": DATA, "parallel": parallel}}, template=EIGHT_H100)
    assert sizes_here(run, tmp_path)["sft"].needs.memory.exchange == 4 * 10**7


# ---------------------------------------------------------------- in the status


def status_of(run: AlignmentRun, configs, before=None):
    if before is not None:
        run = run.model_copy(update={"status": before})
    return decide(run, Observed(configs=configs), START).status


def test_the_status_says_what_a_phase_needs():
    run = make_run(tuned("org/small", parallel={"microBatchTokens": 4096}), template=EIGHT_H100)
    phase = status_of(run, CONFIGS).phases[0]
    assert phase.needs.startswith("needs ")
    assert phase.needs.endswith(" of 80 GiB on each of 8 devices")
    assert phase.fits is True


def test_what_does_not_fit_is_a_warning_and_no_refusal():
    run = make_run(tuned("org/big"), template=EIGHT_H100)
    after = status_of(run, CONFIGS)
    assert after.phases[0].fits is False
    assert str(after.phases[0].state) == "Running"
    events = [e for e in transitions(run.status or type(after)(), after) if e.reason == "WillNotFit"]
    assert len(events) == 1
    assert events[0].type == "Warning"
    assert "would fit with" in events[0].note
    again = status_of(run, CONFIGS, after)
    assert not [e for e in transitions(after, again) if e.reason == "WillNotFit"], "said once"


def test_it_is_worked_out_once_for_a_generation(monkeypatch):
    run = make_run(tuned("org/small"), template=EIGHT_H100)
    before = status_of(run, CONFIGS)
    monkeypatch.setattr("controller.plan.decide.run_sizes", lambda *_: pytest.fail("again"))
    assert status_of(run, CONFIGS, before).phases[0].needs == before.phases[0].needs


def test_what_is_unknown_is_said_and_looked_at_again():
    run = make_run(tuned("org/small"), template=EIGHT_H100)
    before = status_of(run, {})
    assert before.phases[0].needs == "needs unknown: the config.json of org/small is not known here"
    assert before.phases[0].fits is None
    assert status_of(run, CONFIGS, before).phases[0].needs.startswith("needs ")
    assert status_of(run, CONFIGS, before).phases[0].fits is not None


def test_the_status_stays_small():
    phases = [tuned("org/big", f"p{i}") for i in range(30)]
    found = status_of(make_run(*phases, template=EIGHT_H100), CONFIGS)
    assert max(len(phase.needs) for phase in found.phases) < 200
