"""What can be seen to be wrong with a model's folder before any of it is loaded: which file, which field. Imports no torch.

Libraries that load models trust these files. A wrong type raises somewhere inside, a number of layers that nobody has
meant keeps a process busy for ever, a pipe in a file's place is waited for. Fields that are not looked at here, and what
only one architecture knows, are left to the library.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from trainers.json_text import Malformed, check, not_json, reason

LARGEST_JSON = 512 * 2**20
"""Bytes. The largest tokenizers have a tenth of it."""

LARGEST_HEADER = 100 * 10**6
"""Bytes of a safetensors file's header: its format's own limit."""

LARGEST_SIZE = 2**24
"""Of a vocabulary, a layer's width, a number of heads: more than ten times the largest there is."""

MOST_LAYERS = 2**12

LARGEST_ID = 2**31 - 1

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what would be."""


def _whole(least: int, most: int) -> Rule:
    return (lambda v: type(v) is int and least <= v <= most), f"a whole number from {least:,} to {most:,}"


def _one_or_list(rule: Rule) -> Rule:
    """Some architectures have a value for each layer."""
    right, what = rule
    return (lambda v: all(map(right, v)) if isinstance(v, list) else right(v)), f"{what}, or a list of such"


def _names_to(rule: Rule) -> Rule:
    right, what = rule
    return (lambda v: isinstance(v, dict) and all(map(right, v.values()))), f"an object, each of whose values is {what}"


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


TEXT: Rule = (lambda v: isinstance(v, str)), "a text"
NUMBER: Rule = (lambda v: type(v) in (int, float)), "a number"
TRUTH: Rule = (lambda v: isinstance(v, bool)), "true or false"
OBJECT: Rule = (lambda v: isinstance(v, dict)), "an object"
TEXTS: Rule = (lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v)), "a list of texts"
TOKEN: Rule = _is_token, 'a text, or an object with a text "content"'
SIZE = _one_or_list(_whole(1, LARGEST_SIZE))
PART = _one_or_list(_whole(0, LARGEST_SIZE))
ID = _one_or_list(_whole(-1, LARGEST_ID))
IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), ID)

CONFIG: Mapping[str, Rule] = {
    "model_type": TEXT,
    "architectures": TEXTS,
    **dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "n_embd", "n_head"), SIZE),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), _whole(1, MOST_LAYERS)),
    **dict.fromkeys(("intermediate_size", "num_key_value_heads", "head_dim", "n_inner"), PART),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), PART),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _whole(1, 2**40)),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "initializer_range", "rope_theta"), NUMBER
    ),
    **dict.fromkeys(("hidden_act", "activation_function"), TEXT),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config", "text_config", "id2label"), OBJECT),
    **IDS,
    "layer_types": TEXTS,
    "tie_word_embeddings": TRUTH,
}
"""Of transformers' `config.json`. All may be null, and be missing."""

GENERATION: Mapping[str, Rule] = {
    **IDS,
    **dict.fromkeys(("max_length", "max_new_tokens", "top_k"), _whole(0, LARGEST_ID)),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty"), NUMBER),
    "do_sample": TRUTH,
}

TOKENIZER_CONFIG: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"), TOKEN
    ),
    "chat_template": ((lambda v: isinstance(v, str | list | dict)), "a text, or a list of templates with their names"),
    "model_max_length": NUMBER,
    "tokenizer_class": TEXT,
    "added_tokens_decoder": _names_to(TOKEN),
}

TOKENIZER: Mapping[str, Rule] = {"model": OBJECT, "added_tokens": ((lambda v: isinstance(v, list)), "a list")}

ADDED: Mapping[str, Rule] = {"id": _whole(0, LARGEST_ID), "content": TEXT}

INDEX: Mapping[str, Rule] = {"weight_map": _names_to(TEXT)}

FILES = {
    "generation_config.json": GENERATION,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "special_tokens_map.json": TOKENIZER_CONFIG,
    "added_tokens.json": {},
}
"""Besides those that have a function of their own."""

BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
BITS |= {"I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}


def model_problem(folder: Path) -> str | None:
    """What is wrong with a folder's files, as ``file: field: what``. Files that lack are no matter."""
    return next(_problems(folder), None)


def config_problem(config: Mapping[str, Any]) -> str | None:
    """What is wrong with what stands in a `config.json`, as ``field: what``."""
    wrong = _wrong(config, CONFIG)
    if wrong is None and isinstance(inner := config.get("text_config"), dict):
        wrong = _wrong(inner, CONFIG, "text_config.")
    return wrong


def _problems(folder: Path) -> Iterator[str]:
    try:
        yield from _found("config.json", config_problem(_document(folder / "config.json")))
        for name, rules in FILES.items():
            yield from _found(name, _wrong(_document(folder / name), rules))
        yield from _found("tokenizer.json", _tokenizer_problem(_document(folder / "tokenizer.json")))
        index = folder / "model.safetensors.index.json"
        yield from _found(index.name, _index_problem(folder, _document(index)))
        for path in sorted(folder.glob("*.safetensors")):
            yield from _found(path.name, _weights_problem(path))
    except Malformed as problem:
        yield str(problem)


def _found(name: str, problem: str | None) -> Iterator[str]:
    if problem is not None:
        yield f"{name}: {problem}"


def _document(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one for a file that is not there. Raises Malformed with the file's name."""
    if not path.exists():
        return {}
    if not path.is_file():
        raise Malformed(f"{path.name}: no regular file, but a folder, pipe or device")
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise Malformed(f"{path.name}: {size:,} bytes: too large to be what its name says")
    try:
        return _object(path.read_bytes())
    except Malformed as problem:
        raise Malformed(f"{path.name}: {problem}") from problem


def _object(content: bytes) -> dict[str, Any]:
    try:
        text = content.decode()
        found = json.loads(text)
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 text ({error.reason} at byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise Malformed(f"{not_json(error)} at line {error.lineno}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise reason(error) from error
    check(found, text)
    if not isinstance(found, dict):
        raise Malformed(f"expected an object, got {type(found).__name__}")
    return found


def _wrong(values: Mapping[str, Any], rules: Mapping[str, Rule], place: str = "") -> str | None:
    for name, (right, what) in rules.items():
        if (value := values.get(name)) is not None and not right(value):
            return f"{place}{name}: {_shown(value)} is not {what}"
    return None


def _shown(value: Any) -> str:
    """A value on one line, and no more of it than says what it is."""
    if isinstance(value, int) and abs(value) >= 2**63:  # Python writes none of more than 4,300 digits
        return f"a number of {value.bit_length()} bits"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tokenizer_problem(document: dict[str, Any]) -> str | None:
    if (wrong := _wrong(document, TOKENIZER)) is not None:
        return wrong
    for i, token in enumerate(document.get("added_tokens") or []):
        if not isinstance(token, dict):
            return f"added_tokens[{i}]: {_shown(token)} is not an object"
        if (wrong := _wrong(token, ADDED, f"added_tokens[{i}].")) is not None:
            return wrong
    return _words_problem((document.get("model") or {}).get("vocab"))


def _words_problem(words: Any) -> str | None:
    """Of a vocabulary: ids by token, or a Unigram model's [piece, score] in the order of their ids."""
    right, what = ADDED["id"]
    if isinstance(words, dict):
        token = next((token for token, number in words.items() if not right(number)), None)
        return None if token is None else f"model.vocab[{_shown(token)}]: {_shown(words[token])} is not {what}"
    if isinstance(words, list):
        i = next((i for i, pair in enumerate(words) if not _is_piece(pair)), None)
        return None if i is None else f"model.vocab[{i}]: {_shown(words[i])} is not [text, number]"
    return None if words is None else f"model.vocab: {_shown(words)} is neither an object nor a list"


def _is_piece(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) in (int, float)


def _index_problem(folder: Path, document: dict[str, Any]) -> str | None:
    if (wrong := _wrong(document, INDEX)) is not None:
        return wrong
    for weight, name in (document.get("weight_map") or {}).items():
        if Path(name).name != name:
            return f"weight_map[{_shown(weight)}]: {_shown(name)} is not the name of a file beside it"
        if not (folder / name).is_file():
            return f"weight_map[{_shown(weight)}]: there is no file {_shown(name)}"
    return None


# ---------------------------------------------------------------- safetensors


def _weights_problem(path: Path) -> str | None:
    """What is wrong with a file's header, or with its length, which the header tells."""
    if not path.is_file():
        return "no regular file, but a folder, pipe or device"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
        if length > min(LARGEST_HEADER, size - 8):
            return (
                f"its header would have {length:,} of the file's {size:,} bytes: it is cut off, or no safetensors file"
            )
        content = file.read(length)
    try:
        header = _object(content)
    except Malformed as problem:
        return f"header: {problem}"
    return _tensors_problem({name: header[name] for name in header if name != "__metadata__"}, size - 8 - length)


def _tensors_problem(header: Mapping[str, Any], size: int) -> str | None:
    """``size``: bytes behind the header."""
    end = 0
    for name, tensor in header.items():
        if (wrong := _tensor_problem(tensor)) is not None:
            return f"{_shown(name)}: {wrong}"
        end = max(end, tensor["data_offsets"][1])
    return f"cut off: {end - size:,} of its bytes are missing" if end > size else None


def _tensor_problem(tensor: Any) -> str | None:
    if not isinstance(tensor, dict):
        return f"{_shown(tensor)} is not an object"
    shape, kind = tensor.get("shape"), tensor.get("dtype")
    if not _is_numbers(shape):
        return f"shape: {_shown(shape)} is not a list of whole numbers"
    if not _is_numbers(offsets := tensor.get("data_offsets")) or len(offsets) != 2:
        return f"data_offsets: {_shown(offsets)} are not two whole numbers"
    if not isinstance(kind, str):
        return f"dtype: {_shown(kind)} is not a text"
    if kind in BITS and math.prod(shape) * BITS[kind] != 8 * (offsets[1] - offsets[0]):
        return f"data_offsets: {_shown(offsets)} do not hold {kind} of shape {_shown(shape)}"
    return None


def _is_numbers(found: Any) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(type(number) is int and 0 <= number < 2**63 for number in found)
