"""Whether it fits what a phase will need, and what is said of it: plans, `alignctl validate`, the status."""

import pytest
import yaml
from builders import DATA, PROMPTS, START, document, dpo, make_run
from sized import CONFIGS, EIGHT_H100, SEVENTY, one, tuned
from typer.testing import CliRunner

from controller.api.run import AlignmentRun
from controller.cli import app
from controller.commands.sizes import count, fewer_rows, markdown_lines, plain_lines, remarks, sizes_here
from controller.operator.events import transitions
from controller.plan.attempts import Extent
from controller.plan.decide import decide
from controller.plan.observed import Observed
from controller.plan.sizes import PhaseSize, run_sizes, sentence, shown
from trainers.sizing.devices import GIB


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
    assert size.fits is True
    assert size.rows is not None
    assert f" with {size.rows[0]} responses side by side instead of 512" in sentence(size)
    assert remarks([size]) == fewer_rows([size]) == [f"traces {sentence(size)}"], "plan and validate say it"
    tight = one(phase, template={**EIGHT_H100, "gpuMemory": "2Gi"})
    assert (tight.fits, tight.rows) == (False, (1, 512)), "as it will be tried"
    assert " with 1 response side by side instead of 512, which does not fit" in sentence(tight)
    assert not fewer_rows([tight])
    assert len(remarks([tight])) == 1
    phase["rollout"]["sampling"] = {"batchSize": size.rows[0]}
    alone = one(phase)
    assert (alone.fits, alone.rows, alone.needs) == (True, None, size.needs)


def test_attempts_after_running_out_of_memory_are_told_with_half_of_what_the_one_before_had():
    data = {**PROMPTS, "maxPromptLength": 4096}
    phase = {"name": "traces", "rollout": {"policy": {"source": "org/big"}, "data": data}}
    phase["rollout"]["sampling"] = {"batchSize": 512}
    run = make_run(phase, template=EIGHT_H100)
    sizes = [run_sizes(run, CONFIGS, extents={"traces": Extent(1, halved)})["traces"] for halved in range(3)]
    assert sizes[0] == one(phase)
    few = sizes[0].rows[0]
    assert [size.rows for size in sizes] == [(few, 512), (few // 2, 512), (few // 4, 512)]
    caches = [size.needs.memory.cache for size in sizes]
    assert caches[0] > caches[1] > caches[2]


def test_layers_are_computed_again_before_passes_get_tiny():
    size = one(tuned("org/big", lora={"rank": 16}), template={**EIGHT_H100, "procsPerNode": 1, "gpuMemory": "24Gi"})
    assert size.advice.startswith("would fit with gradientCheckpointing: true")


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
    # Where not even that fits it is what the phase tries.
    tight = one(phase, {("org/70b", None): SEVENTY}, EIGHT_H100 | {"gpuMemory": "18Gi"})
    assert (tight.fits, tight.by_layers, tight.rows) == (False, True, (1, 16))
    assert shown(tight.needs.memory.total) == "20 GiB", "an eighth of 131, and a layer with the head"
    said = " of 18 GiB on each of 8 devices with 1 response side by side instead of 16, with layers gathered for every token"
    assert f"{said}, which does not fit; " in sentence(tight)


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
    assert "and 15 GiB of the machine's memory for each, where there are 6.9 GiB, which does not fit" in offloaded


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
