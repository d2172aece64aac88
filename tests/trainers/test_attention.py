"""Attention of packed rows: routed by transformers' names, exact for every layout, refused where it would leave out."""

import pytest
import torch
from one_rank import OneRank
from test_batch import SIZES, some_sequences
from torch.nn.attention import flex_attention, varlen
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from trainers.contract import BadInput
from trainers.core import attention
from trainers.core.batch import Packing, collate
from trainers.core.generate import generate
from trainers.core.heads import head_logits
from trainers.core.models import LoadedModel
from trainers.core.scoring import Scorer, check_scoring, hidden_states, target_logprobs
from trainers.spec import Sampling

CPU = torch.device("cpu")
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
# Windows of four tokens, so that they matter in sequences this short; in deepseek_v3 values are narrower than keys.
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {**LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 2},
}
LENGTHS = [9, 3, 5, 1, 8, 2]


def tiny(kind="llama", **settings):
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **(SIZES | KINDS.get(kind, {}) | settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # random weights are so small that a leak between sequences would hardly show
    return model


def by_loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What torch documents of ``varlen_attn``, sequence by sequence, on any device: (T, H, D) to (T, H, D)."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert value.shape == key.shape
    assert query.shape[-1] == value.shape[-1]
    assert cu_seq_q.dtype == torch.int32
    assert cu_seq_q[-1] == len(query)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(group, 1) for states in (key, value))
    found = []
    for first, last in zip(cu_seq_q[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True):
        q, k, v = (states[first:last].transpose(0, 1) for states in (query, key, value))
        back = torch.arange(last - first)[:, None] - torch.arange(last - first)
        left, right = window_size
        seen = (back >= -right if right >= 0 else True) & (back <= left if left >= 0 else torch.tensor(True))
        weights = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        found.append((weights @ v).transpose(0, 1))
    return torch.cat(found)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", by_loop)
    monkeypatch.setattr(attention, "why_not", lambda *_: None)


def scores(model, sequences, packing):
    batch = collate(sequences, packing, CPU)
    return head_logits(model, hidden_states(model, batch)[batch.scored_at])


def gradient(model, sequences, packing):
    batch = collate(sequences, packing, CPU)
    model.zero_grad()
    Scorer(model)(batch, target_logprobs(batch), lambda found, _: found.sum())[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_varlen_is_transformers_own_attention_in_every_layout(kind, kernel):
    model, sequences = tiny(kind), some_sequences(LENGTHS)
    alone = torch.cat([model(input_ids=torch.from_numpy(s.ids[None])).logits[0, :-1][s.scored[1:]] for s in sequences])
    slopes = gradient(model, sequences, Packing.PADDED)
    model.set_attn_implementation("varlen")
    for packing in Packing:
        torch.testing.assert_close(scores(model, sequences, packing), alone, atol=1e-5, rtol=1e-5)
        ours = gradient(model, sequences, packing)
        torch.testing.assert_close(ours / slopes.abs().max(), slopes / slopes.abs().max(), atol=1e-5, rtol=0)


@pytest.fixture
def flex_anywhere(monkeypatch):
    """Flex attention as plain operations instead of a program. torch refuses gradients on CPUs, where it has none with them."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", KINDS)
def test_flex_keeps_sequences_apart_too(kind, flex_anywhere):
    """What transformers and flex attention are told of a packed row, not the kernel, which only a GPU has."""
    model, sequences = tiny(kind), some_sequences(LENGTHS)
    apart, slopes = (f(model, sequences, Packing.PADDED) for f in (scores, gradient))
    model.set_attn_implementation("flex_attention")
    for packing in (Packing.ROWS, Packing.ONE_ROW):
        torch.testing.assert_close(scores(model, sequences, packing), apart, atol=1e-5, rtol=1e-5)
        ours = gradient(model, sequences, packing)
        torch.testing.assert_close(ours / slopes.abs().max(), slopes / slopes.abs().max(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("packing", [Packing.ROWS, Packing.ONE_ROW])
def test_bounds_are_what_transformers_finds_in_position_ids(packing):
    batch = collate(some_sequences(LENGTHS), packing, CPU)
    (bounds, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch.position_ids)
    assert batch.bounds.tolist() == bounds.tolist()
    assert batch.bounds.dtype == torch.int32
    assert batch.longest == longest


def test_one_row_has_no_padding():
    batch = collate(some_sequences(LENGTHS), Packing.ONE_ROW, CPU)
    assert batch.input_ids.shape == (1, sum(LENGTHS))
    assert batch.num_tokens == sum(LENGTHS)


# ---------------------------------------------------------------- which models can have it


@pytest.mark.parametrize(
    ("kind", "settings", "name", "said"),
    [
        ("llama", {}, "varlen", None),
        ("qwen3", {}, "flex", None),
        ("mistral", {}, "varlen", None),
        ("gemma2", {"head_dim": 8}, "varlen", "soft cap"),
        ("gemma2", {"head_dim": 8}, "flex", None),
        ("gemma2", {"head_dim": 8}, "sdpa", "transformers has it not"),
        ("gpt_oss", {"head_dim": 8}, "varlen", "sinks"),
        ("gpt_oss", {"head_dim": 8}, "flex", None),
        ("llama4_text", {"head_dim": 8}, "varlen", "transformers has it not"),
        ("llama", {"head_dim": 12}, "varlen", "heads are 12 wide"),
        ("llama", {"head_dim": 512}, "varlen", "heads are 512 wide"),
        ("llama", {"attention_dropout": 0.1}, "flex", "attention_dropout is 0.1"),
        ("llama", {}, "flash", "not installed"),
        ("llama", {}, "eager", None),
    ],
)
def test_what_a_model_cannot_have_is_said(kind, settings, name, said):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | settings)))
    reason = attention.why_not(model, name, "cuda", bf16=True)
    assert reason is None if said is None else said in reason


def test_without_a_gpu_or_bf16_there_are_no_kernels():
    model = tiny()
    assert "needs a GPU" in attention.why_not(model, "flex", "cpu", bf16=True)
    assert "precision is fp32" in attention.why_not(model, "varlen", "cuda", bf16=False)
    assert attention.why_not(model, "flex", "cuda", bf16=False) is None


def test_what_is_compiled_where_it_runs_needs_a_compiler_there(monkeypatch):
    """As in the trainers' image, which has none: the best of the others is taken, and nothing fails on the way."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no gcc or clang here" in attention.why_not(tiny(), "flex", "cuda", bf16=False)
    assert attention.why_not(tiny(), "varlen", "cuda", bf16=True) is None


def workers(name: str) -> OneRank:
    found = OneRank()
    found.attention = name
    return found


def checked(model, name):
    loaded = LoadedModel(model, None, None)
    check_scoring(loaded, workers(name))
    return loaded.packs


def test_a_choice_that_cannot_be_kept_names_both():
    with pytest.raises(BadInput, match="models of type llama cannot use varlen: it needs a GPU"):
        checked(tiny(), "varlen")


@pytest.mark.parametrize("name", ["auto", "sdpa", "eager"])
def test_on_a_cpu_packed_rows_have_a_mask(name):
    model = tiny()
    assert checked(model, name) == Packing.ROWS
    assert model.config._attn_implementation == ("eager" if name == "eager" else "sdpa")


def test_auto_takes_the_first_that_keeps_sequences_apart(kernel, monkeypatch):
    monkeypatch.setattr(attention, "OF_GPUS", ("varlen",))
    monkeypatch.setattr(attention, "why_not", lambda *_: None)
    model = tiny()
    assert checked(model, "auto") == Packing.ONE_ROW
    assert model.config._attn_implementation == "varlen"


def test_auto_leaves_what_lets_sequences_see_each_other(kernel, monkeypatch):
    def leaking(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **settings):
        ends = cu_seq_q[[0, -1]]
        return by_loop(query, key, value, ends, ends, int(ends[1]), int(ends[1]), **settings)

    monkeypatch.setattr(varlen, "varlen_attn", leaking)
    monkeypatch.setattr(attention, "OF_GPUS", ("varlen",))
    model = tiny()
    assert checked(model, "auto") == Packing.ROWS
    assert model.config._attn_implementation == "sdpa"


def test_what_the_kernel_would_leave_out_is_refused(kernel):
    model = tiny("gemma2", head_dim=8, attn_logit_softcapping=2.0)
    model.set_attn_implementation("varlen")
    with pytest.raises(BadInput, match="varlen: models of type gemma2 attend with softcap"):
        scores(model, some_sequences([3, 4]), Packing.ONE_ROW)


def test_responses_are_the_same_whatever_attention_scores_them(kernel):
    model, prompts = tiny(), [[5, 6, 7], [8, 9, 10, 11, 12]]
    greedy = Sampling(temperature=0, max_new_tokens=6, batch_size=2)
    before = [r.ids for r in generate(model, prompts, greedy, frozenset())]
    model.set_attn_implementation("varlen")
    assert [r.ids for r in generate(model, prompts, greedy, frozenset())] == before
    assert model.config._attn_implementation == "varlen"


def test_the_name_is_not_written_with_the_model(kernel, tmp_path):
    model = tiny()
    model.set_attn_implementation("varlen")
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()
