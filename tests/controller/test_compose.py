"""Reading, merging and setting: by tables, and by laws that hold for every document."""

from pathlib import Path
from typing import Any

import pytest
from builders import document, dpo, ppo, reward, sft
from hypothesis import given
from hypothesis import strategies as st

from controller.api.problems import InvalidRun
from controller.compose import LARGEST, apply_setting, compose, merge, read_document
from controller.yaml_text import parse_yaml

# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2", ":2:2: not valid YAML: while parsing a flow sequence"),
        ("a: 1\nb: 2\na: 3", ":3:1: not valid YAML: the key 'a' is given twice"),
        ("a: 1\n---\nb: 2", ": holds 2 YAML documents; one AlignmentRun is expected"),
        ("", ": holds 0 YAML documents; one AlignmentRun is expected"),
        ("- a", ": is not a YAML mapping; one AlignmentRun is expected"),
    ],
)
def test_files_that_hold_no_run(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRun) as caught:
        read_document(file)
    assert str(caught.value).startswith(f"{file}{expected}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRun, match=r"nope\.yaml: No such file or directory"):
        read_document(tmp_path / "nope.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5", 5), (".5", 0.5), ("-2.5E+3", -2500.0), ("'1e4'", "1e4"), ("v1", "v1"), ("1.0.0", "1.0.0")],
)
def test_numbers_are_json_numbers(text: str, value: object) -> None:
    (read,) = parse_yaml(text)
    assert read == value
    assert type(read) is type(value)


# ---------------------------------------------------------------- fragments

MERGES: dict[str, tuple[Any, Any, Any]] = {
    "maps merge deep": ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
    "lists replace": ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
    "null deletes": ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
    "null deletes deep, also what is not there": ({}, {"a": {"b": None}}, {"a": {}}),
    "named items merge by name and keep their order": (
        [{"name": "x", "v": 1}, {"name": "y", "v": 2}], [{"name": "y", "v": 3}], [{"name": "x", "v": 1}, {"name": "y", "v": 3}],
    ),
    "new named items follow": ([{"name": "x"}], [{"name": "z"}], [{"name": "x"}, {"name": "z"}]),
    "a list in which one has no name replaces": ([{"name": "x"}], [{"v": 1}], [{"v": 1}]),
    "an empty list replaces": ([{"name": "x"}], [], []),
    "another type replaces the old one's settings": (
        [{"name": "x", "dpo": {"beta": 1}, "suspend": True}], [{"name": "x", "ppo": {"gamma": 1}}],
        [{"name": "x", "suspend": True, "ppo": {"gamma": 1}}],
    ),
    "a phase whose member is deleted is gone": (
        [{"name": "x", "dpo": {}}, {"name": "y"}], [{"name": "x", "dpo": None}], [{"name": "y"}]),
}  # fmt: skip


@pytest.mark.parametrize("sentence", MERGES)
def test_merge(sentence: str) -> None:
    base, overlay, expected = MERGES[sentence]
    assert merge({"it": base}, {"it": overlay}) == {"it": expected}


scalars = st.one_of(st.booleans(), st.integers(), st.text(max_size=3))
keys = st.sampled_from(["a", "b", "c"])
documents = st.dictionaries(
    keys,
    st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(keys, inner, max_size=3)),
        max_leaves=8,
    ),
    max_size=3,
)


@given(documents)
def test_merging_nothing_changes_nothing(doc: dict[str, Any]) -> None:
    assert merge(doc, {}) == doc


@given(documents)
def test_merging_a_document_with_itself_changes_nothing(doc: dict[str, Any]) -> None:
    assert merge(doc, doc) == doc


shaped = st.fixed_dictionaries(
    {},
    optional={
        "scalar": scalars,
        "list": st.lists(scalars, max_size=2),
        "map": st.dictionaries(keys, scalars, max_size=3),
        "items": st.lists(
            st.builds(lambda name, v: {"name": name, "v": v}, keys, scalars),
            min_size=1,
            max_size=3,
            unique_by=lambda i: i["name"],
        ),
    },
)


@given(shaped, shaped, shaped)
def test_fragments_can_be_merged_beforehand_or_one_by_one(
    a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]
) -> None:
    """Where fields keep their kind, as those of a run do, and nothing is deleted."""
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


@given(documents, documents)
def test_inputs_stay_as_they_are(a: dict[str, Any], b: dict[str, Any]) -> None:
    before = repr((a, b))
    merged = merge(a, b)
    compose(merged, [], ["a.x=1"]) if isinstance(merged.get("a", {}), dict) else None
    assert repr((a, b)) == before


# ---------------------------------------------------------------- --set

RUN = document(sft("base"), dpo("dpo", "base"), reward("reward", "base"), ppo("ppo", "base", "reward"))


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("spec.seed=3", ("spec", "seed"), 3),
        ("spec.phases.dpo.dpo.beta=0.2", ("spec", "phases", 1, "dpo", "beta"), 0.2),
        ("spec.phases[dpo].dpo.beta=2e-1", ("spec", "phases", 1, "dpo", "beta"), 0.2),
        ("spec.phases.1.dpo.beta=0.2", ("spec", "phases", 1, "dpo", "beta"), 0.2),
        ("spec.template.env=[{name: A, value: b}]", ("spec", "template", "env"), [{"name": "A", "value": "b"}]),
        (r"spec.template.nodeSelector.a\.b/c=x", ("spec", "template", "nodeSelector", "a.b/c"), "x"),
        ("spec.a=b=c", ("spec", "a"), "b=c"),
    ],
)
def test_set(setting: str, path: tuple[Any, ...], value: object) -> None:
    here: Any = apply_setting(RUN, setting)
    for part in path:
        here = here[part]
    assert here == value


def test_set_null_removes() -> None:
    assert [p["name"] for p in apply_setting(RUN, "spec.phases.ppo=null")["spec"]["phases"]] == [
        "base",
        "dpo",
        "reward",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("spec.seed", "--set spec.seed: expected PATH=VALUE, for example spec.seed=1"),
        (
            "spec.phases.rewad.x=1",
            "--set spec.phases.rewad.x: no item rewad in the list; items are base, dpo, reward, ppo (did you mean reward?)",
        ),
        ("kind.x=1", "--set kind.x: kind is 'AlignmentRun', which has no fields"),
        ("spec.seed=[1", "--set spec.seed=[1: the value is not valid YAML"),
    ],
)
def test_settings_that_cannot_be(setting: str, message: str) -> None:
    with pytest.raises(InvalidRun) as caught:
        apply_setting(RUN, setting)
    assert str(caught.value) == message


@given(st.floats(0.001, 10), st.integers(0, 100))
def test_settings_of_different_places_commute(beta: float, seed: int) -> None:
    one, two = f"spec.phases.dpo.dpo.beta={beta}", f"spec.seed={seed}"
    assert compose(RUN, [], [one, two]) == compose(RUN, [], [two, one])


def _bomb(lines):
    first = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    return first + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, lines))


HOSTILE = {
    "[" * 100_000 + "]" * 100_000: ":1:65: not valid YAML: nested deeper than 64 levels",
    "a: " + "{b: " * 1000 + "1" + "}" * 1000: "not valid YAML: nested deeper than 64 levels",
    _bomb(9): ":5:45: not valid YAML: more than 100,000 values, counting what aliases stand for",
    "a: &a [*a]": ":1:8: not valid YAML: *a stands inside what it means",
    "a: &a {b: {<<: *a}}": "not valid YAML: *a stands inside what it means",
    "seed: "
    + "9" * 10_000: "not valid YAML: '9999999999999999999999999999999999999999…' cannot be read (Exceeds the limit",
    "seed: 0x" + "f" * 10_000: "the number '0xffffffffffffffffffffffffffffffffffffff…' is too large",
    "seed: 2001-99-99": ":1:7: not valid YAML: '2001-99-99' cannot be read (month must be in 1..12)",
    "? [a]\n: 1": ":1:3: not valid YAML: a key must be a text, not a list or mapping",
    "a: \0": "not valid YAML: unacceptable character #x0000: control characters are not allowed",
    "a: '" + "x" * LARGEST + "'": "larger than 2,097,152 bytes",
}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_yaml_is_one_line(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRun) as caught:
        read_document(path)
    (problem,) = caught.value.problems
    assert HOSTILE[text] in str(problem)
    assert len(str(problem).splitlines()) == 1


def test_what_an_alias_stands_for_is_set_where_it_was_asked_for_alone():
    text = "a: &o {lr: 1, deep: {x: 1}}\nb: *o\nc: {<<: *o}\nd: [*o, *o]"
    (document,) = parse_yaml(text)
    changed = apply_setting(apply_setting(document, "a.deep.x=9"), "d.0.lr=7")
    same = {"lr": 1, "deep": {"x": 1}}
    assert changed == {"a": {"lr": 1, "deep": {"x": 9}}, "b": same, "c": same, "d": [{**same, "lr": 7}, same]}


def test_aliases_that_are_used_as_meant_are_fine():
    text = "base: &base {a: [1, 2]}\nuses:\n- {<<: *base, b: 1}\n- *base\nscalar: &s 3\nagain: *s\n"
    (found,) = parse_yaml(text)
    assert found["uses"] == [{"a": [1, 2], "b": 1}, {"a": [1, 2]}]
    assert found["again"] == 3
    (most,) = parse_yaml("a: " + "[" * 63 + "]" * 63)
    assert most["a"]
