"""A model's folder with hostile files: one line that names file and field, before a library sees them."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from controller.preflight import _model_problems
from trainers.model_files import model_problem
from trainers.sizing.configs import read_configs
from trainers.sizing.shapes import UnknownSize, shape_of

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
WEIGHT = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def header(document, data=bytes(24), length=None):
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + data


TEXTS = {
    "config.json": {
        b'{"hidden_size": "64"}': 'hidden_size: "64" is not a whole number from 1 to 16,777,216, or a list of such',
        b'{"hidden_size": true}': "hidden_size: true is not",
        b'{"vocab_size": -3}': "vocab_size: -3 is not",
        b'{"vocab_size": 1e30}': "vocab_size: 1e+30 is not",
        b'{"num_hidden_layers": 1000000000}': "num_hidden_layers: 1000000000 is not a whole number from 1 to 4,096",
        b'{"num_hidden_layers": ' + b"9" * 4000 + b"}": "num_hidden_layers: a number of 13288 bits is not",
        b'{"num_hidden_layers": ' + b"9" * 5000 + b"}": "not valid JSON (Exceeds the limit (4300 digits)",
        b'{"text_config": {"hidden_size": []}, "model_type": 5}': "model_type: 5 is not a text",
        b'{"text_config": {"hidden_size": {}}}': "text_config.hidden_size: {} is not",
        b'{"text_config": [1]}': "text_config: [1] is not an object",
        b'{"architectures": 5}': "architectures: 5 is not a list of texts",
        b'{"eos_token_id": [1, "2"]}': 'eos_token_id: [1, "2"] is not',
        b'{"rope_theta": "' + b"x" * 10_000 + b'"}': f'rope_theta: "{"x" * 56}... is not a number',
        DEEP: "nested deeper than 64 levels",
        b"[" * 70 + b"]" * 70: "nested deeper than 64 levels",
        b'{"hidden_size": 64': "not valid JSON (Expecting ',' delimiter at line 1, column 19)",
        bytes(100): "not valid JSON (a NUL byte, as a crash or another encoding leaves them, at line 1, column 1)",
        b"\xff\xfe{}": "not UTF-8 text",
        b"[]": "expected an object, got list",
        b"": "not valid JSON (Expecting value at line 1, column 1)",
    },
    "generation_config.json": {
        b'{"eos_token_id": "</s>"}': 'eos_token_id: "</s>" is not',
        b'{"temperature": [1]}': "temperature: [1] is not a number",
        b"{": "not valid JSON",
        DEEP: "nested deeper",
    },
    "tokenizer_config.json": {
        b'{"eos_token": 7}': 'eos_token: 7 is not a text, or an object with a text "content"',
        b'{"pad_token": {"content": null}}': 'pad_token: {"content": null} is not',
        b'{"chat_template": 1}': "chat_template: 1 is not",
        b'{"added_tokens_decoder": {"1": {"content": 1}}}': "added_tokens_decoder: ",
        b'{"model_max_length": "512"}': 'model_max_length: "512" is not a number',
    },
    "tokenizer.json": {
        b'{"model": []}': "model: [] is not an object",
        b'{"added_tokens": {}}': "added_tokens: {} is not a list",
        b'{"added_tokens": [5]}': "added_tokens[0]: 5 is not an object",
        b'{"added_tokens": [{"id": 99999999999, "content": "a"}]}': "added_tokens[0].id: 99999999999 is not",
        b'{"model": {"vocab": {"a": -1}}}': 'model.vocab["a"]: -1 is not a whole number',
        b'{"model": {"vocab": [["a", 0], ["b"]]}}': 'model.vocab[1]: ["b"] is not [text, number]',
        b'{"model": {"vocab": 3}}': "model.vocab: 3 is neither",
        b'{"model": {"vocab": {"a": 1': "not valid JSON",
        DEEP: "nested deeper",
    },
    "model.safetensors.index.json": {
        b'{"weight_map": {"w": "../secret"}}': 'weight_map["w"]: "../secret" is not the name of a file beside it',
        b'{"weight_map": {"w": "gone.safetensors"}}': 'weight_map["w"]: there is no file "gone.safetensors"',
        b'{"weight_map": {"w": 1}}': "weight_map: ",
    },
    "model.safetensors": {
        b"": "its header would have",
        b"\xff" * 100: "its header would have 18,446,744,073,709,551,615 of the file's 100 bytes",
        header(b"{}", length=50): "its header would have 50 of the file's 34 bytes",
        header(b'{"w": '): "header: not valid JSON",
        header(DEEP): "header: nested deeper",
        header([1]): "header: expected an object, got list",
        header({"w": 1}): '"w": 1 is not an object',
        header({"w": WEIGHT | {"shape": [2, -3]}}): '"w": shape: [2, -3] is not a list of whole numbers',
        header({"w": WEIGHT | {"shape": [2**62, 2**62]}}): '"w": data_offsets: [0, 24] do not hold F32 of shape',
        header({"w": WEIGHT | {"dtype": 32}}): '"w": dtype: 32 is not a text',
        header({"w": WEIGHT | {"data_offsets": [0]}}): '"w": data_offsets: [0] are not two whole numbers',
        header({"w": WEIGHT | {"data_offsets": [24, 0]}}): '"w": data_offsets: [24, 0] do not hold',
        header({"w": WEIGHT}, data=bytes(20)): "cut off: 4 of its bytes are missing",
    },
}
HOSTILE = [(name, content, said) for name, contents in TEXTS.items() for content, said in contents.items()]


@pytest.mark.parametrize(("name", "content", "said"), HOSTILE, ids=[f"{n}-{s[:40]}" for n, _, s in HOSTILE])
def test_one_line_names_file_and_field(tmp_path: Path, name: str, content: bytes, said: str):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / name).write_bytes(content)
    found = model_problem(tmp_path / "model")
    assert found is not None
    assert found.startswith(f"{name}: {said}")
    assert len(found.splitlines()) == 1 and len(found) < 300
    (problem,) = _model_problems("spec.model.source", "./model", tmp_path)
    assert str(problem) == f'spec.model.source: "./model" holds no model that can be loaded: {found}'
    if name == "config.json":
        assert read_configs([("./model", None)], tmp_path) == {}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str):
    os.mkfifo(tmp_path / name)
    assert model_problem(tmp_path) == f"{name}: no regular file, but a folder, pipe or device"


def test_a_whole_folder_has_no_problem(tiny_model_dir: Path, tiny_reward_dir: Path):
    assert model_problem(tiny_model_dir) is None
    assert model_problem(tiny_reward_dir) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60)
@given(st.data())
def test_whatever_stands_in_a_config_sizing_answers(data: st.DataObject):
    """Also for fields that only one architecture has, and whose types nobody checks."""
    known = {
        "vocab_size": 8, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 16, "head_dim": 2, "architectures": ["X"], "layer_types": [],
    }  # fmt: skip
    field = data.draw(st.sampled_from(sorted(known)))
    config = {"model_type": "llama", **known, field: data.draw(VALUES)}
    with suppress(UnknownSize):
        assert shape_of(config).parameters > 0


@settings(max_examples=100)
@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_changed_byte_that_safetensors_refuses_is_refused_or_left_to_it(tmp_path_factory, at: int, byte: int):
    """And nothing that it takes is refused here."""
    folder = tmp_path_factory.mktemp("flip")
    content = bytearray(header({"w": WEIGHT, "__metadata__": {"format": "pt"}}))
    content[at % len(content)] = byte
    (folder / "model.safetensors").write_bytes(content)
    problem = model_problem(folder)
    try:
        with safe_open(folder / "model.safetensors", "np") as file:
            taken = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
        assert problem is None, (bytes(content), taken)
    except SafetensorError:
        pass
    shutil.rmtree(folder)
