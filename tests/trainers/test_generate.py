"""The rollout engine against transformers' own generation and its logits processors."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from trainers.core import slots as slots_module
from trainers.core.generate import generate
from trainers.core.lean import JOINED
from trainers.core.packed_linears import packed_linears
from trainers.core.sampling import sample, warped
from trainers.core.slots import fits_slots
from trainers.sizing.at_once import FEWEST_ROWS
from trainers.spec import Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=20, batch_size=4)
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 16], [9, 9], [20, 21, 22, 23], [30]]
PAD = 0
FP32_NATS = 1e-4
"""How far the log-probability of a sampled token may be off."""


def llama(vocab=40, layers=2, **config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, num_hidden_layers=layers, initializer_range=0.4, **shape, **config)
    ).eval()


@pytest.fixture(scope="module")
def model():
    return llama()


def theirs(model, prompt, sampling, stop):
    """transformers' greedy answer to one prompt alone."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(stop) or None,
        pad_token_id=PAD,
    )
    return out[0, len(prompt) :].tolist()


def common_tokens(model, count):
    """End tokens that greedy answers really contain, so that rows end at different times."""
    answers = [theirs(model, prompt, GREEDY, frozenset()) for prompt in PROMPTS]
    return frozenset(answer[3 + 2 * i] for i, answer in enumerate(answers[:count]))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_an_id_that_nobody_knows_is_never_chosen(model, temperature):
    """Rows of the head beyond the tokens are padding: here they would win every time."""
    loud = llama()
    with torch.no_grad():
        loud.lm_head.weight.copy_(model.lm_head.weight)
        loud.lm_head.weight[33:] *= 50
    sampling = Sampling(temperature=temperature, max_new_tokens=20, batch_size=4)
    free = generate(loud, PROMPTS, sampling, frozenset(), torch.Generator().manual_seed(0), PAD)
    assert max(max(r.ids) for r in free) >= 33
    bound = generate(loud, PROMPTS, sampling, frozenset(), torch.Generator().manual_seed(0), PAD, num_known=33)
    assert max(max(r.ids) for r in bound) < 33


@pytest.mark.parametrize("stops", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_greedy_is_transformers_own(model, stops, batch_size):
    stop = common_tokens(model, stops)
    sampling = GREEDY.model_copy(update={"batch_size": batch_size})
    responses = generate(model, PROMPTS, sampling, stop, pad_id=PAD)
    assert [r.ids for r in responses] == [theirs(model, p, sampling, stop) for p in PROMPTS]
    assert [r.ended for r in responses] == [r.ids[-1] in stop for r in responses]
    if stops:
        assert len({len(r.ids) for r in responses}) > 1, "the rows end at different times"


def test_a_sliding_window_and_grouped_heads_work():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, use_sliding_window=True, sliding_window=4, max_window_layers=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    stop = common_tokens(model, 2)
    assert [r.ids for r in generate(model, PROMPTS, GREEDY, stop)] == [theirs(model, p, GREEDY, stop) for p in PROMPTS]


@pytest.mark.parametrize("rope", [{}, {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}])
def test_windows_of_all_layers_and_angles_that_are_stretched_work(rope):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, sliding_window=4, max_position_embeddings=64,
        rope_parameters={"rope_theta": 100.0, "rope_type": "default", **rope},
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    assert max(map(len, PROMPTS)) > config.sliding_window + 1, "a prompt's own tokens are out of sight"
    assert [r.ids for r in generate(model, PROMPTS, GREEDY, frozenset())] == [
        theirs(model, p, GREEDY, frozenset()) for p in PROMPTS
    ]


def test_projections_with_biases_in_one_product_work(monkeypatch):
    """Where there are rows enough for copies of weights, and prompts are read in several passes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith("bias"):
                bias.normal_()
    prompts = [[3 + (7 * i + j) % 37 for j in range(1 + i)] for i in range(FEWEST_ROWS + 4)]
    monkeypatch.setattr(slots_module, "CELLS", 16)
    sampling = GREEDY.model_copy(update={"batch_size": FEWEST_ROWS})
    with packed_linears(model, FEWEST_ROWS):
        assert all(JOINED in layer.self_attn.__dict__ for layer in model.model.layers)
    assert [r.ids for r in generate(model, prompts, sampling, frozenset())] == [
        theirs(model, p, sampling, frozenset()) for p in prompts
    ]


def test_learned_positions_work():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4)
    )
    model.eval()
    stop = common_tokens(model, 2)
    assert [r.ids for r in generate(model, PROMPTS, GREEDY, stop)] == [theirs(model, p, GREEDY, stop) for p in PROMPTS]


def test_sampling_is_a_function_of_the_generator(model):
    sampling = Sampling(max_new_tokens=12, batch_size=3)

    def run(seed):
        return [r.ids for r in generate(model, PROMPTS, sampling, frozenset({5}), torch.Generator().manual_seed(seed))]

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert run(0) == first, "the global generator plays no part"
    assert run(1) != first


def test_a_response_does_not_depend_on_its_batch(model):
    sampling = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9)
    uniforms = torch.rand(len(PROMPTS), 12, dtype=torch.float64)
    together = generate(model, PROMPTS, sampling, frozenset({5}), uniforms=uniforms)
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], sampling, frozenset({5}), uniforms=uniforms[[i]])[0].ids == together[i].ids


def test_samples_follow_the_models_distribution(model):
    """Two-token responses to one prompt, their frequencies against the model's probabilities."""
    count = 4000
    sampling = Sampling(max_new_tokens=2, batch_size=count)
    responses = generate(model, [[7, 8, 9]] * count, sampling, frozenset(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model(torch.tensor([[7, 8, 9]])).logits[0, -1].softmax(-1)
        best = int(first.argmax())
        second = model(torch.tensor([[7, 8, 9, best]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(torch.tensor([r.ids[0] for r in responses]), minlength=40) / count
    after = torch.tensor([r.ids[1] for r in responses if r.ids[0] == best])
    assert (seen - first).abs().max() < 4 * 0.5 / count**0.5
    assert (torch.bincount(after, minlength=40) / len(after) - second).abs().max() < 4 * 0.5 / len(after) ** 0.5


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_no_token_of_probability_zero_is_chosen(uniform):
    logits = torch.full((1, 6), float("-inf"))
    logits[0, 2:4] = 1.0
    token, _ = sample(logits, Sampling(), torch.tensor([uniform], dtype=torch.float64))
    assert token.item() == (2 if uniform < 0.5 else 3)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (8, 0.5), (0, 0.01), (1, 1.0), (100, 1.0)])
def test_truncation_is_transformers_own(top_k, top_p):
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 30 if top_k else 900)
    wanted = logits / 0.7
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    assert torch.equal(warped(logits, Sampling(temperature=0.7, top_k=top_k, top_p=top_p)), wanted)


def test_gradient_checkpointing_leaves_the_cache_on(model):
    checkpointed = llama()
    checkpointed.gradient_checkpointing_enable()
    checkpointed.train()
    lengths = []
    checkpointed.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    responses = generate(checkpointed, PROMPTS, GREEDY, frozenset())
    assert [r.ids for r in responses] == [r.ids for r in generate(model, PROMPTS, GREEDY, frozenset())]
    assert checkpointed.training, "the mode is put back"
    assert max(lengths) < max(map(len, PROMPTS)), "after the prompts every step reads one token"


def test_rows_that_end_leave_the_batch(model):
    """Half of the rows end at once; later forward passes carry only the others."""
    stop = frozenset(theirs(model, p, GREEDY, frozenset())[0] for p in PROMPTS[:3])
    rows = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    responses = generate(model, PROMPTS, GREEDY.model_copy(update={"batch_size": 6}), stop)
    handle.remove()
    assert [r.ids for r in responses] == [theirs(model, p, GREEDY, stop) for p in PROMPTS]
    assert rows[rows.index(6) + 1] <= 3


def passes(model, run):
    """(rows, tokens) of every forward pass that ``run`` makes, and what it returns."""
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    found = run()
    handle.remove()
    return seen, found


def test_ended_rows_make_room_for_new_prompts(model):
    """Any prompts in any seats: every response is what it is alone, and while prompts wait hardly a row lies idle."""
    random = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 13, (30,), generator=random).tolist()
    prompts = [torch.randint(3, 40, (length,), generator=random).tolist() for length in lengths]
    uniforms = torch.rand(30, 16, dtype=torch.float64, generator=random)
    stop = frozenset({5, 17, 30})

    def answers(some, size):
        sampling = Sampling(max_new_tokens=16, batch_size=size)
        return generate(model, [prompts[i] for i in some], sampling, stop, uniforms=uniforms[some])

    alone = [answers([i], 1)[0].ids for i in range(30)]
    assert len(set(map(len, alone))) > 8
    for size in (3, 10, 16):
        seen, found = passes(model, partial(answers, list(range(30)), size))
        assert [r.ids for r in found] == alone
        steps = [rows for rows, tokens in seen if tokens == 1 and rows > 1]
        assert sum(steps) < 1.3 * sum(map(len, alone))


def test_prompts_that_are_alike_are_read_once(model):
    """Side by side, and after one of them that is still on its way."""
    prompts = [[9, 8, 7, 6, 5], *[[11, 12, 13, 14, 15, 16]] * 9]
    uniforms = torch.rand(10, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampling, stop = Sampling(max_new_tokens=9, batch_size=4), frozenset({5, 17, 30, 31, 32, 33})
    seen, found = passes(model, lambda: generate(model, prompts, sampling, stop, uniforms=uniforms))
    assert [shape for shape in seen if shape[1] > 1] == [(2, 5)]
    for prompt, row, response in zip(prompts, uniforms, found, strict=True):
        assert generate(model, [prompt], sampling, stop, uniforms=row[None])[0].ids == response.ids


def test_bfloat16_and_autocast(model):
    half = llama().to(torch.bfloat16)
    responses = generate(half, PROMPTS, Sampling(max_new_tokens=5), frozenset(), torch.Generator().manual_seed(0))
    assert all(len(r.ids) == 5 for r in responses)
    with torch.autocast("cpu", torch.bfloat16):
        again = generate(model, PROMPTS, Sampling(max_new_tokens=5), frozenset(), torch.Generator().manual_seed(0))
    assert all(len(r.ids) == 5 for r in again)


def test_weights_trained_in_fp32_have_one_copy_in_bf16_for_all_tokens():
    """Autocast's own: it lives as long as autocast does around a call of the engine."""

    class Copies(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.made += func is torch.ops.aten._to_copy.default and tuple(args[0].shape) in shapes
            return func(*args, **(kwargs or {}))

    model = llama()
    linears = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    shapes = {tuple(weight.shape) for weight in linears}
    with Copies() as copies, torch.autocast("cpu", torch.bfloat16):
        generate(model, PROMPTS, GREEDY, frozenset())
    assert copies.made == len(linears)


def test_times_are_kept_for_every_token(model):
    stop = common_tokens(model, 2)
    for response in generate(model, PROMPTS, GREEDY, stop, keep_times=True):
        assert len(response.times) == len(response.ids)
        assert response.times == sorted(response.times) and response.times[0] > 0


def test_no_prompts_no_responses(model):
    assert generate(model, [], GREEDY, frozenset()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generators_of_either_device_work_on_a_gpu(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).cuda()
    sampling = Sampling(max_new_tokens=5)
    for device in ("cpu", "cuda"):
        responses = generate(model, [[3, 4], [5]], sampling, frozenset(), torch.Generator(device).manual_seed(0))
        assert all(len(r.ids) == 5 for r in responses)


def slots(dtype=torch.float32):
    return llama(vocab=300).to(dtype)


def padded(dtype=torch.float32):
    """Keys and values alone, too, but of a type that slots are not tried with."""
    from transformers import StableLmConfig, StableLmForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return StableLmForCausalLM(StableLmConfig(vocab_size=300, num_hidden_layers=2, initializer_range=0.4, **shape)).to(
        dtype
    )


HOW = [
    Sampling(max_new_tokens=16, batch_size=9),
    Sampling(max_new_tokens=16, batch_size=3, temperature=0),
    Sampling(max_new_tokens=16, batch_size=4, temperature=0.6, top_k=40),
    Sampling(max_new_tokens=16, batch_size=1, temperature=1.5, top_p=0.8),
]


def answers_with_logprobs(model, sampling):
    """Of prompts of all lengths, some alike, with rows that end and others that come in: (prompt and response, found)."""
    prompts = [*PROMPTS, PROMPTS[2], PROMPTS[2], [8] * 12]
    stop = frozenset(range(0, 300, 12))
    found = generate(model, prompts, sampling, stop, torch.Generator().manual_seed(1), PAD)
    assert sampling.temperature == 0 or len({len(r.ids) for r in found}) > 3
    assert all(len(r.logprobs) == len(r.ids) for r in found)
    return zip(prompts, found, strict=True)


def fresh_logprobs(model, prompt, response):
    """transformers' own, of one sequence alone and without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[torch.arange(len(response)), response]


@pytest.mark.parametrize("make", [slots, padded])
@pytest.mark.parametrize("sampling", HOW)
def test_log_probabilities_are_those_of_a_fresh_forward_pass(make, sampling):
    model = make().eval()
    assert fits_slots(model) is (make is slots)
    for prompt, response in answers_with_logprobs(model, sampling):
        off = (torch.tensor(response.logprobs) - fresh_logprobs(model, prompt, response.ids)).abs()
        assert off.max() < FP32_NATS, off


def test_log_probabilities_at_the_temperature_of_the_sampling_change_no_token():
    model, stop = slots().eval(), frozenset(range(0, 300, 12))
    for sampling in HOW:
        plain, tempered = (
            generate(model, PROMPTS, sampling, stop, torch.Generator().manual_seed(1), PAD, tempered=asked)
            for asked in (False, True)
        )
        assert [r.ids for r in tempered] == [r.ids for r in plain]
        for prompt, response in zip(PROMPTS, tempered, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response.ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            wanted = (logits.double() / (sampling.temperature or 1)).log_softmax(-1)
            told = torch.tensor(response.logprobs).double()
            assert (told - wanted[torch.arange(len(response.ids)), response.ids]).abs().max() < 2 * FP32_NATS


@pytest.mark.parametrize("make", [slots, padded])
def test_log_probabilities_in_bf16_are_a_fresh_pass_but_for_the_rounding_of_eight_bits(make):
    model = make(torch.bfloat16).eval()
    off = [
        abs(torch.tensor(response.logprobs) - fresh_logprobs(model, prompt, response.ids))
        for prompt, response in answers_with_logprobs(model, HOW[0])
    ]
    assert torch.cat(off).mean() < 0.05 and torch.cat(off).max() < 0.25
