"""Linear layers by oneDNN against torch's own, and who gets them."""

import pytest
import torch
from torch import nn

from trainers.core import packed_linears as module
from trainers.core.packed_linears import packed_linears
from trainers.sizing.at_once import FEWEST_ROWS


def changed(model, rows=FEWEST_ROWS):
    """Names of the layers that multiply otherwise inside."""
    with packed_linears(model, rows):
        return {name for name, module in model.named_modules() if "forward" in module.__dict__}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (9, 24), (64, 1, 24), (3, 200, 24)])
def test_products_are_torchs_own(shape, bias):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(24, 50, bias=bias), torch.randn(shape)
    with torch.no_grad():
        own = layer(inputs)
        with packed_linears(layer, FEWEST_ROWS):
            assert "forward" in layer.__dict__
            torch.testing.assert_close(layer(inputs), own, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer(inputs.transpose(0, 0)[..., :]), own, atol=1e-5, rtol=1e-5)
        assert "forward" not in layer.__dict__
        assert torch.equal(layer(inputs), own)


def test_layers_that_are_no_plain_ones_and_few_rows_stay_as_they_were():
    class Other(nn.Linear):
        """Weights packed in bits are of such classes."""

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "rounded": nn.Linear(8, 8).bfloat16(),
            "other": Other(8, 8),
            "theirs": nn.Linear(8, 8),
        }
    )
    model["theirs"].forward = own = model["theirs"].forward
    assert changed(model) == {"plain", "theirs"}
    assert model["theirs"].forward is own
    assert changed(model, FEWEST_ROWS - 1) == {"theirs"}
    with torch.autocast("cpu", torch.bfloat16):
        assert changed(model) == {"theirs"}


def test_an_error_inside_puts_layers_back():
    layer = nn.Linear(8, 8)
    with pytest.raises(ZeroDivisionError), packed_linears(layer, FEWEST_ROWS):
        _ = 1 / 0
    assert "forward" not in layer.__dict__


def test_copies_are_bounded(monkeypatch):
    layer = nn.Linear(64, 32)
    monkeypatch.setattr(module, "LARGEST_COPY", 4 * 64 * 32)
    assert changed(layer) == {""}
    monkeypatch.setattr(module, "LARGEST_COPY", 4 * 64 * 32 - 1)
    assert changed(layer) == set()
