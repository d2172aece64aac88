"""Who may read metrics: what no NetworkPolicy can have is said when the operator starts, with its field."""

import json
import subprocess
import sys

import pytest
from peer_cases import BAD, GOOD

from controller.operator.peers import BadPeers, peers


@pytest.mark.parametrize("case", GOOD)
def test_what_a_policy_can_have_is_taken_as_it_is(case: str) -> None:
    assert peers(json.dumps([GOOD[case]])) == (GOOD[case],)


@pytest.mark.parametrize("case", BAD)
def test_what_none_can_have_is_told_with_its_field(case: str) -> None:
    peer, said = BAD[case]
    with pytest.raises(BadPeers) as caught:
        peers(json.dumps([peer]))
    assert str(caught.value).startswith("--metrics-readers[0]")
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "foo", "[1]"])
def test_what_is_no_list_of_them_is_told(text: str) -> None:
    with pytest.raises(BadPeers, match=r"^--metrics-readers"):
        peers(text)


def test_the_operator_does_not_start_with_it() -> None:
    command = [sys.executable, "-m", "controller", "--metrics-readers", '[{"namespaceSelector":"foo"}]']
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert 'error: --metrics-readers[0].namespaceSelector: "foo"' in ended.stderr
