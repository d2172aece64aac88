"""What servers answer: right answers are read, and anything else in any place of them is the server's fault, in one line."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from served import VllmLike, started

from trainers.contract import BadInput
from trainers.core.served.server import Server
from trainers.core.served.wire import Wire, connected
from trainers.spec import Sampling, Served

VOCABULARY, KNOWN, K, NEW = 60, 50, 3, 4
PROMPT = [5, 6, 7]
SAMPLING = Sampling(max_new_tokens=NEW, engine="vllm")


class Says(VllmLike):
    """Says what it is told to, by its path."""

    def __post_init__(self) -> None:
        self.documents: dict[str, Any] = {}

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        alone = body is not None and body.get("prompt_logprobs") == 1
        return 200, self.documents[ALONE if alone else path]


def position(*ids: int) -> dict[str, Any]:
    return {str(token): {"logprob": -1.2 - rank, "rank": rank + 1} for rank, token in enumerate(ids)}


ALONE = "/v1/completions of the likeliest"

RIGHT = {
    ALONE: {"choices": [{"prompt_logprobs": [None, position(8, 6), position(7)]}]},
    "/v1/models": {"data": [{"id": "policy", "max_model_len": 512}]},
    "/tokenize": {"tokens": [3, 4]},
    "/v1/completions": {
        "choices": [
            {
                "token_ids": [5, 9, 9, 1],
                "logprobs": {"token_logprobs": [-1.0, -0.5, 0.0, -9999.0]},
                "finish_reason": "length",
                "stop_reason": None,
                "prompt_logprobs": [None, position(8, 2, 6, 3), position(55, 7, 4)],
            }
        ]
    },
}

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 60)
    | st.floats()
    | st.text()
    | st.sampled_from(["", "vocabulary", "logprobs", "\x1b[2J\n", "\ud800", "7", "07", 10**400, -(10**400), 2**63]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(["7", "id"]), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all parts of a document, the whole too."""
    yield here
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*here, key))


def replaced(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    found = copy.deepcopy(document)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return found


PLACES = [(path, place) for path, document in RIGHT.items() for place in places(document)]


@pytest.fixture(scope="module")
def server():
    with started(Says(None)) as says:
        yield says, Server("policy", Served(url=says.url), patience=1)


def check_response(wire: Wire) -> None:
    found = wire.respond(PROMPT, SAMPLING, 0, [1], {}, VOCABULARY)
    assert 0 < len(found.ids) == len(found.logprobs) <= NEW
    assert all(type(token) is int and 0 <= token < VOCABULARY for token in found.ids)
    assert all(type(value) is float and -1e39 < value <= 0.01 for value in found.logprobs)


def check_likeliest(wire: Wire) -> None:
    found = wire.likeliest(PROMPT, 1, K, KNOWN)
    assert found.shape == (2, 2 * K + 1)
    ids, logprobs = found[:, :K], found[:, K:]
    assert ((ids >= 0) & (ids < KNOWN) & (ids == ids.astype(int))).all()
    assert not np.isnan(logprobs).any() and (logprobs <= 0.01).all()
    assert np.exp(logprobs).sum(axis=1) == pytest.approx(1, abs=0.02)


def check_logprobs(wire: Wire) -> None:
    found = wire.logprobs(PROMPT)
    assert len(found) == 2 and all(type(value) is float and -1e39 < value <= 0.01 for value in found)


def check_continued(wire: Wire) -> None:
    found = wire.continued(PROMPT, NEW, VOCABULARY)
    assert 0 < len(found) <= NEW and all(type(token) is int and 0 <= token < VOCABULARY for token in found)


def check_taken(wire: Wire) -> None:
    assert wire.takes(5)


def check_tokens(wire: Wire) -> None:
    for found in (wire.tokens("a"), wire.conversation_tokens([])):
        assert found is None or all(type(token) is int and token >= 0 for token in found)


CHECKS = (check_response, check_likeliest, check_logprobs, check_continued, check_taken, check_tokens)


def told(says: Says, error: BadInput) -> str:
    """The error's one line."""
    text = str(error)
    assert text.startswith(("policy: ", "policy.servedAs: ")) and says.url in text
    assert text.isprintable() and len(text) < 500, text
    return text


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PLACES), JSON)
@example(("/v1/models", ("data", 0, "max_model_len")), "many")
@example(("/v1/completions", ("choices",)), ["x"])
@example(("/v1/completions", ("choices", 0, "logprobs")), [1])
@example(("/v1/completions", ("choices", 0, "prompt_logprobs")), [None] * 3)
def test_any_value_in_any_place_is_read_or_told(server, where, value):
    says, asked = server
    path, place = where
    says.documents = {**RIGHT, path: replaced(RIGHT[path], place, value)}
    try:
        wire = connected(asked, None)
        assert wire.positions > 0
    except BadInput as error:
        told(says, error)
        return
    for check in CHECKS:
        try:
            check(wire)
        except BadInput as error:
            told(says, error)


def test_a_right_answer(server):
    says, asked = server
    says.documents = RIGHT
    wire = connected(asked, "policy")
    assert (wire.name, wire.positions) == ("policy", 512)
    for check in CHECKS:
        check(wire)
    assert wire.respond(PROMPT, SAMPLING, 0, [1], {}, VOCABULARY).ids == [5, 9, 9, 1]
    assert wire.logprobs(PROMPT) == [-2.2, -1.2]
    assert wire.likeliest(PROMPT, 1, K, KNOWN)[:, : K + 3].tolist() == [
        [8, 2, 6, -1.2, -2.2, -3.2],
        [7, 4, 7, -2.2, -3.2, -np.inf],
    ]


NAN = float("nan")


@pytest.mark.parametrize(
    ("place", "value", "wanted"),
    [
        (("token_ids", 1), 10**6, "token_ids[1] 1000000, where a token's id below 60 belongs"),
        (("token_ids", 1), -3, "token_ids[1] -3"),
        (("token_ids", 1), "a\x1b", "token_ids[1] 'a\\x1b'"),
        (("token_ids", 1), True, "token_ids[1] True"),
        (("token_ids",), [5] * 9, "where a list of 1 to 4 belongs"),
        (("token_ids",), [], "where a list of 1 to 4 belongs"),
        (("token_ids", 1), 1, "a response that its end token ends"),
        (("token_ids",), None, "answers without choices[0].token_ids: it must be vLLM 0.10.2 or newer"),
        (("logprobs",), [1], "logprobs [1], where an object belongs"),
        (("logprobs", "token_logprobs"), "text", "token_logprobs 'text', where a list belongs"),
        (("logprobs", "token_logprobs"), [-1.0], "where a list of 4"),
        (("logprobs", "token_logprobs", 2), None, "token_logprobs[2] None, where a token's log-probability belongs"),
        (("logprobs", "token_logprobs", 2), NAN, "token_logprobs[2] nan"),
        (("logprobs", "token_logprobs", 2), 3.0, "token_logprobs[2] 3.0"),
    ],
)  # fmt: skip
def test_a_response_that_cannot_be(server, place, value, wanted):
    says, asked = server
    says.documents = {**RIGHT, "/v1/completions": replaced(RIGHT["/v1/completions"], ("choices", 0, *place), value)}
    with pytest.raises(BadInput) as error:
        check_response(connected(asked, None))
    assert wanted in told(says, error.value)


def four(logprob: float) -> dict[str, Any]:
    return {str(token): {"logprob": logprob, "rank": token + 1} for token in range(4)}


@pytest.mark.parametrize(
    "value",
    [
        None,
        four(NAN),
        four(3.0),
        four(-0.1),  # probabilities of 3.6
        four(-9999.0),  # likeliest of more tokens than there are
        {"7": {"logprob": -1.0, "rank": 1}},
        {**position(7, 4), "x": {"logprob": -9.0, "rank": 3}},
        {**position(7, 4), "04": {"logprob": -9.0, "rank": 3}},
        {**position(7, 4), "2": {"logprob": -9.0}},
        {**position(7, 4), "2": {"logprob": -9.0, "rank": 0}},
        {**position(7, 4), "2": {"logprob": -0.9, "rank": 3}},  # likelier than the second
        position(7, 4, 2, 3, 8),
    ],
)
def test_scores_that_cannot_be(server, value):
    says, asked = server
    place = ("choices", 0, "prompt_logprobs", 2)
    says.documents = {**RIGHT, "/v1/completions": replaced(RIGHT["/v1/completions"], place, value)}
    wire = connected(asked, None)
    with pytest.raises(BadInput, match=r"answers with choices\[0\]\.prompt_logprobs\[2\] ") as error:
        check_likeliest(wire)
    told(says, error.value)


def test_a_token_that_stands_there_and_is_not_told(server):
    says, asked = server
    says.documents = {**RIGHT, ALONE: replaced(RIGHT[ALONE], ("choices", 0, "prompt_logprobs", 2), position(8))}
    with pytest.raises(BadInput, match=r"without the token that stands there, 7, in prompt_logprobs\[2\]") as error:
        connected(asked, None).logprobs(PROMPT)
    told(says, error.value)


def test_rounding_is_no_fault(server):
    """Of a server that works in bf16: a certain token's log-probability is a little above 0."""
    says, asked = server
    place, sure = ("choices", 0, "prompt_logprobs", 2), {**position(7, 4, 2)}
    sure |= {"7": {"logprob": 0.004, "rank": 1}, "4": {"logprob": -7.0, "rank": 2}, "2": {"logprob": -9999, "rank": 3}}
    says.documents = {**RIGHT, "/v1/completions": replaced(RIGHT["/v1/completions"], place, sure)}
    check_likeliest(connected(asked, None))


def test_words_of_a_refusal_are_one_printable_line(server):
    says, asked = server
    says.documents = {"/v1/models": {"data": [{"id": "a\x1b[2J"}, {"id": "b\n"}]}}
    with pytest.raises(BadInput, match=r"has a\\x1b\[2J, b\\n: set servedAs") as error:
        connected(asked, None)
    told(says, error.value)
