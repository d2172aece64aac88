"""Quantities, beside what Kubernetes' own client reads, and such as strangers write."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils import parse_quantity
from pydantic import TypeAdapter, ValidationError

from controller.api.quantities import QUANTITY, Quantity, byte_count, number


@given(st.from_regex(QUANTITY.removesuffix("$") + r"\Z"))
def test_each_that_is_taken_is_a_number_of_bounded_size(text: str):
    assert 0 <= number(text) < 10**120
    assert byte_count(text) == int(number(text))
    if not re.search("[eE][0-9]", text):  # Kubernetes' client reads no exponents
        assert float(number(text)) == pytest.approx(float(parse_quantity(text)), rel=1e-12)


@pytest.mark.parametrize(
    "text", ["1e999999999", "9" * 10_000_000, "1." + "0" * 10_000_000, "1e100", "x", "", "-1", "1 Gi"]
)
def test_others_are_refused_at_once(text: str):
    began = time.process_time()
    with pytest.raises(ValidationError):
        TypeAdapter(Quantity).validate_python(text)
    with pytest.raises(ValueError, match="is not a quantity"):
        number(text)
    assert time.process_time() - began < 1
