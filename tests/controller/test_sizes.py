"""What phases will need, worked out from a run and the configs of its models."""

import re

import pytest
from builders import DATA, PAIRS, PROMPTS, dpo, make_run, ppo, reward, sft
from sized import BIG, CONFIGS, EIGHT_H100, LLAMA_8B, ON_POLICY, SEVENTY, SMALL, one, tuned

from controller.api.quantities import byte_count
from controller.plan.shapes import sources
from controller.plan.sizes import PhaseSize, run_sizes, sentence
from trainers.sizing.devices import GIB, product_memory
from trainers.sizing.memory import Place, forward_alone
from trainers.sizing.shapes import shape_of
from trainers.spec import Lora, Parallel


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
    """Keys and values of 64 responses of 512 + 256 tokens in bf16, and 128 positions of a graph; one layer more while it
    grows; what computes 16 prompts, and logits.
    """
    phase = {"name": "traces", "rollout": {"policy": {"source": "org/big"}, "data": PROMPTS}}
    memory = one(phase).needs.memory
    a_token, logits = 2 * 8 * 128 * 32, 64 * 128256 * 16

    def prompts(count: int, length: int) -> int:
        return forward_alone(Place(Parallel(), bf16=True), shape_of(LLAMA_8B), count * length, length)

    assert memory.cache == 2 * a_token * 64 * (768 + 128) * 33 // 32 + prompts(16, 512) + logits
    assert memory.frozen == 2 * BIG
    phase["rollout"]["data"] = {**PROMPTS, "maxPromptLength": 1}
    assert one(phase).needs.memory.cache == 2 * a_token * 64 * (257 + 128) * 33 // 32 + prompts(64, 1) + logits
    on_cpu = one(phase, template={"resources": {"limits": {"memory": "64Gi"}}}).needs.memory
    assert on_cpu.cache == 4 * a_token * 64 * 257 * 33 // 32 + logits, "one or the other"


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


@pytest.mark.parametrize("lora", [None, {"rank": 8}])
def test_samples_ahead_are_made_beside_a_step_by_copies_of_what_is_trained(lora):
    def memory(staleness):
        phase = ppo("ppo", "sft", "r")
        phase["ppo"] |= {"staleness": staleness} | ({} if lora is None else {"lora": lora})
        run = make_run(tuned("org/big"), reward("r", "sft"), phase, template={**EIGHT_H100, "gpuMemory": "4000Gi"})
        return run_sizes(run, CONFIGS)["ppo"].needs.memory

    between, one, three = memory(0), memory(1), memory(3)
    copied = (three.frozen - one.frozen) // 2
    trained = BIG if lora is None else shape_of(LLAMA_8B).adapters(Lora.model_validate(lora))
    assert copied == 4 * trained
    assert one.frozen - between.frozen - copied == between.cache, "the responses' cache is there at every moment"
    assert one.total > between.total


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
