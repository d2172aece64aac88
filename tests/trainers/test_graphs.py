"""Steps as graphs, proven without a GPU: a step is traced, and its program, over the same tensors, takes all further steps.

A traced program is what a CUDA graph is: the same operations on the same addresses, whatever has become of Python's numbers.
"""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.core import graphs
from trainers.core.generate import _Run, generate
from trainers.spec import Sampling

SHAPE = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama, grouped heads": {"model_type": "llama"},
    "mistral, windows": {"model_type": "mistral", "sliding_window": 5},
    "qwen2, biases and windows of some layers": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
    },
    "qwen3, norms of queries and keys": {"model_type": "qwen3", "head_dim": 8},
}  # fmt: skip
HOW = {
    "greedy": Sampling(temperature=0, max_new_tokens=24, batch_size=4),
    "sampled": Sampling(max_new_tokens=24, batch_size=4),
    "top-k": Sampling(temperature=0.7, top_k=30, max_new_tokens=24, batch_size=4),
    "top-p": Sampling(top_p=0.9, max_new_tokens=24, batch_size=4),
}
PAIRS = [(kind, "sampled") for kind in KINDS] + [("llama, grouped heads", how) for how in HOW if how != "sampled"]
LENGTHS = (1, 3, 9, 2, 14, 5, 5, 8, 1, 11)
KNOWN = {
    "_fused_rms_norm", "_safe_softmax", "_to_copy", "_unsafe_view", "abs", "add", "add_", "addcmul", "addmm",
    "all", "amax", "arange", "argmax", "bitwise_and", "bitwise_and_", "bitwise_or", "bmm", "cat", "clamp",
    "clone", "constant_pad_nd", "copy_", "cumsum", "div", "div_", "embedding", "eq", "exp", "exp_", "expand",
    "full_like", "gather", "ge", "gt", "index", "index_copy_", "index_put_", "le", "log", "logsumexp", "lt",
    "masked_fill", "masked_fill_", "mm", "mul", "mul_", "ne", "roll", "scalar_tensor", "scatter",
    "searchsorted", "silu", "slice", "squeeze", "sub", "sum", "t", "topk", "transpose", "unsqueeze", "view",
    "where", "zeros",
}  # fmt: skip
"""Operations whose CUDA kernels neither wait for the device nor look at what is on it, as far as torch's sources tell."""
STOPS = frozenset(range(3, 600, 15))


def model_of(kind="llama, grouped heads", **others):
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE | KINDS[kind] | others)).eval()
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    return found


class Recorded:
    """What is recorded, and how often it is replayed."""

    def __init__(self, record, before=lambda replays: None):
        self.record, self.before = record, before
        self.programs, self.replays = [], 0

    def __call__(self, step):
        program = self.record(step)
        self.programs.append(program)
        return partial(self.replay, program)

    def replay(self, program):
        self.replays += 1
        self.before(self.replays)
        program()


def as_it_is(step):
    step()
    return step


def traced(step):
    return make_fx(step)()


def prompts(count=10):
    some = torch.Generator().manual_seed(1)
    return [torch.randint(1, 600, (length,), generator=some).tolist() for length in LENGTHS[:count]]


def responses(model, sampling, record=None, stops=STOPS, **others):
    asked = prompts()
    uniforms = torch.rand(len(asked), 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return generate(model, asked, sampling, stops, uniforms=uniforms, record=record, **others)


NARROWEST = graphs.NARROWEST


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Several widths within a few tokens, and nothing that is remembered of another test."""
    monkeypatch.setattr(graphs, "NARROWEST", 16)
    monkeypatch.setattr(graphs, "given_up", [])
    graphs._say.cache_clear()


@pytest.mark.parametrize(("kind", "how"), PAIRS)
def test_a_recorded_step_takes_all_others(kind, how, capsys):
    """Exactly as the step itself does with the same widths, and as steps of widths without gaps do but for rounding."""
    model, tempered = model_of(kind), how == "top-k"
    program, step = Recorded(traced), Recorded(as_it_is)
    found = responses(model, HOW[how], program, tempered=tempered)
    assert found == responses(model, HOW[how], step, tempered=tempered)
    assert len({len(r.ids) for r in found}) > 3 and any(r.ended for r in found), "rows end, and others take their place"
    assert program.replays == step.replays > 3 * len(program.programs) > 6
    assert capsys.readouterr().out == ""
    plain = responses(model, HOW[how], tempered=tempered)
    assert [r.ids for r in found] == [r.ids for r in plain]
    for one, other in zip(found, plain, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_weights_may_change_in_their_place_between_replays():
    """As an optimizer's step changes them; and a later call has graphs of its own, of whatever the weights are then."""

    def shift(model, replays):
        if replays % 5 == 0:
            for weight in model.parameters():
                weight.mul_(1.5)

    def twice(record):
        model = model_of()
        program = Recorded(record, partial(shift, model))
        return [responses(model, HOW["sampled"], program) for _ in range(2)]

    first, second = twice(traced)
    assert [first, second] == twice(as_it_is)
    assert first != second and first != responses(model_of(), HOW["sampled"])


@pytest.mark.parametrize("record", [traced, as_it_is])
def test_adapters_and_weights_in_fp32_under_autocast(record):
    from peft import LoraConfig, get_peft_model

    model = model_of()
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    program = Recorded(record)
    with torch.autocast("cpu", torch.bfloat16):
        found = responses(model, HOW["sampled"], program)
    with torch.autocast("cpu", torch.bfloat16):
        assert found == responses(model, HOW["sampled"], as_it_is)
    assert program.replays > 20 and not graphs.given_up


def test_steps_that_are_recorded_make_no_copies_of_weights_under_autocast():
    """They would be made anew for every token, or, if autocast keeps them, be no more than an address."""

    class Copies(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.made += func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter)
            return func(*args, **(kwargs or {}))

    def counted(step):
        step()
        return partial(again, step)

    def again(step):
        with copies:
            step()

    copies = Copies()
    with torch.autocast("cpu", torch.bfloat16):
        responses(model_of(), HOW["sampled"], counted)
        assert copies.made == 0
        with copies:
            responses(model_of(), HOW["sampled"])
        assert copies.made > 0


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("fails", "no room for a graph"),
        ("does nothing", "a graph does something else than the step that it was recorded of"),
    ],
)
def test_what_cannot_be_recorded_is_said_once_and_nothing_is_lost(record, reason, capsys):
    def failing(step):
        step()
        raise RuntimeError(f"{reason}\nand where")

    def idle(step):
        step()
        return lambda: None

    model = model_of()
    found = responses(model, HOW["sampled"], failing if record == "fails" else idle)
    assert capsys.readouterr().out == f"sampling goes on without CUDA graphs: {reason}\n"
    assert [r.ids for r in found] == [r.ids for r in responses(model, HOW["sampled"])]
    assert graphs.recorder(torch.device("cuda")) is None, "it is not tried again in this process"


def test_models_without_graphs_say_why(capsys):
    def never(step):
        raise AssertionError("nothing is to be recorded")

    hooked = model_of()
    hooked.model.layers[0].register_forward_pre_hook(lambda *_: None)
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE | {"model_type": "granite"})).eval()
    for model, sampling in ((hooked, HOW["greedy"]), (other, HOW["greedy"]), (model_of(), Sampling(max_new_tokens=4))):
        for _ in range(2):
            assert responses(model, sampling, never) == responses(model, sampling)
    assert [graphs.recorder(torch.device("cuda"), alone=False) for _ in range(2)] == [None, None]
    assert graphs.recorder(torch.device("cpu")) is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and "hangs on" in said[0] and "granite" in said[1] and "fewer than" in said[2]
    assert said[3] == "sampling without CUDA graphs: responses are sampled beside updates, where none was ever recorded"


@pytest.mark.parametrize("width", [1, 7, 8, 9, 100, 1000, 1025, 5000, 70000])
def test_widths_are_few_and_little_more(width, monkeypatch):
    monkeypatch.setattr(graphs, "NARROWEST", NARROWEST)
    found = graphs.wide(width)
    assert width <= found <= width + max(NARROWEST, width // 8), "what plans count"
    assert graphs.wide(found) == found
    assert len({graphs.wide(w) for w in range(1, 32769)}) == 16 + 4 * 8


@pytest.mark.parametrize(("kind", "how"), [(list(KINDS)[2], "top-p"), (list(KINDS)[3], "sampled")])
def test_a_step_on_a_gpu_waits_for_nothing(kind, how):
    """By tensors without content, which have no GPU to be on: what looks at one fails, as do shapes that depend on one."""
    asked = prompts(4)
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model = model_of(kind, dtype=torch.bfloat16)
        uniforms = torch.rand(4, 24, dtype=torch.float64, device="cuda")
        run = _Run(model, asked, HOW[how], STOPS, uniforms, 0, 590, True, traced)
        run._admit([(row, row) for row in range(4)])
        nodes = make_fx(partial(run._step, 16))().graph.nodes
    calls = [node for node in nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert len(calls) > 100
    assert {node.target.overloadpacket.__name__ for node in calls} <= KNOWN
    made = [
        value for node in calls for value in pytree.tree_leaves(node.meta["val"]) if isinstance(value, torch.Tensor)
    ]
    assert {value.device.type for value in made} == {"cuda"}
    assert any(value.dtype == torch.bfloat16 for value in made)
