"""Attention that a GPU has kernels of, with these as plain operations, in every family that is let have it."""

import pytest
import test_attention
import torch
from families.architectures import FAMILIES, family_model, sequences
from one_rank import OneRank
from torch.nn.attention import flex_attention, varlen

from trainers.core import attention
from trainers.core.batch import Packing
from trainers.core.models import LoadedModel
from trainers.core.scoring import check_scoring

pytestmark = pytest.mark.families

LACKING = ("qwen3_next", "bamba", "falcon_h1", "jamba", "mamba", "mamba2")
REFUSED = {
    "varlen": dict.fromkeys((*LACKING, "zamba2"), "transformers has it not")
    | {"gemma2": "soft cap", "gpt_oss": "attention has sinks"},
    "flex": dict.fromkeys((*LACKING, "gpt2"), "transformers has it not"),
}
"""What is said against a family's having it. The others have it."""

UNPACKED = ("lfm2", "zamba2")
"""Their convolutions and state spaces run over a row."""


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", ["varlen", "flex"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_packed_are_the_padded_ones_or_are_not_packed(family, kind, monkeypatch):
    model = family_model(family).eval()
    reason = attention.why_not(model, kind, "cuda", bf16=True)
    assert (REFUSED[kind].get(family) or "None") in str(reason)
    if reason is not None:
        return
    if (family, kind) == ("gpt_oss", "flex"):
        pytest.skip("transformers gives flex attention sinks on GPUs alone")
    expected = test_attention.scores(model, sequences(), Packing.PADDED)
    slopes = test_attention.gradient(model, sequences(), Packing.PADDED)
    monkeypatch.setattr(varlen, "varlen_attn", test_attention.by_loop)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "why_not", lambda *_: None)
    workers = OneRank()
    workers.attention = kind
    loaded = LoadedModel(model, None, None)
    with torch.compiler.set_stance("force_eager"):
        check_scoring(loaded, workers)
        assert (loaded.packs == Packing.ONE_ROW) == (family not in UNPACKED)
        ours = test_attention.scores(model, sequences(), loaded.packs)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        found = test_attention.gradient(model, sequences(), loaded.packs)
    torch.testing.assert_close(found / slopes.abs().max(), slopes / slopes.abs().max(), atol=1e-4, rtol=0)
