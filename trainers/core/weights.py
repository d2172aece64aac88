"""Reading a model's folder: config, tokenizer and every weight, or one line that says what is wrong with it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoTokenizer

from trainers.contract import BadInput, FailureClass
from trainers.core.quantization import FourBit, is_packed, scales, settle
from trainers.core.sharding import Sharding, local
from trainers.failures import classify
from trainers.model_files import model_problem


def read_model(
    auto: Any,
    folder: str | Path,
    dtype: torch.dtype,
    trust_remote_code: bool,
    sharding: Sharding | None = None,
    four_bit: FourBit | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) by one of transformers' auto classes. Safetensors only. A split model reads its shards alone.
    With ``four_bit`` linear layers are packed as they are read, and the model is on the device.
    Raises BadInput for a folder that cannot be read as such a model; what this machine lacks (memory, a readable disk)
    passes as it is.
    """
    config = read_config(folder, trust_remote_code)
    splitting: AbstractContextManager[dict[str, Any]] = nullcontext({})
    if sharding is not None and sharding.world > 1:
        splitting = sharding.loading()
    packed = {} if four_bit is None else four_bit.loading(_empty(auto, config, trust_remote_code))
    with _readable(folder), splitting as split:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model, found = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
            output_loading_info=True,
            **split,
            **packed,
        )
        if split:
            fresh = _empty(auto, config, trust_remote_code)
            _mend_tables(model, fresh)
            _check_tied(folder, model, fresh)
    vars(model.config).pop("distributed_config", None)  # of this process, and no part of the model
    if four_bit is not None:
        settle(model)
    _check_weights(folder, model, found)
    _check_numbers(folder, model)
    return model, tokenizer


def _mend_tables(model: Any, fresh: Any) -> None:
    """Tables that are in no file, such as Falcon-H1's multipliers, which transformers leaves as they come in a split model."""
    tables = dict(model.named_non_persistent_buffers())
    for name, table in fresh.named_non_persistent_buffers():
        tables[name].copy_(table)


def _check_tied(folder: str | Path, model: Any, fresh: Any) -> None:
    """Weights that are one by the config were split as one. transformers leaves them two where files hold two that differ."""
    if parted := sorted(fresh.all_tied_weights_keys.keys() - model.all_tied_weights_keys.keys()):
        raise BadInput(
            f"model {folder}: its config says that {parted[0]} is the embeddings, and its files hold another: "
            "set tie_word_embeddings to false in config.json"
        )


def _empty(auto: Any, config: Any, trust_remote_code: bool) -> Any:
    """A model without weights, with its tables."""
    with init_empty_weights(include_buffers=False):
        return auto.from_config(config, trust_remote_code=trust_remote_code)


def read_config(folder: str | Path, trust_remote_code: bool) -> Any:
    """A model's config alone, once its files are such as can be given to a library. Raises as :func:`read_model` does."""
    if (problem := model_problem(Path(folder))) is not None:
        raise BadInput(f"model {folder} cannot be loaded: {problem}")
    with _readable(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def read_tokenizer(folder: str | Path, trust_remote_code: bool) -> Any:
    """A model's tokenizer alone. Raises as :func:`read_model` does."""
    with _readable(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


@contextmanager
def _readable(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if _is_of_this_machine(error):
            raise
        raise BadInput(f"model {folder} cannot be loaded: {_reason(error)}") from error


def check_trainable(model: Any) -> None:
    """Raise BadInput for a model whose weights are held in fewer bits than can be trained."""
    small = next((name for name, weight in model.named_parameters() if not _is_whole(weight)), None)
    if small is not None:
        method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "fewer bits")
        raise BadInput(f"{small} is quantized ({method}) and cannot be trained: use a checkpoint with whole weights")


def _is_whole(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize >= 2


def _check_weights(folder: str | Path, model: Any, found: dict[str, Any]) -> None:
    """Refuse what transformers fills with random numbers: weights that the files lack, or hold in another shape."""
    kind = type(model).__name__
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise BadInput(f"model {folder} is no whole {kind}: its files hold no {missing[0]}{more}")
    if other := sorted(found["mismatched_keys"]):
        name, held, wanted = other[0][:3]
        raise BadInput(
            f"model {folder} is no whole {kind}: {name} has the shape {list(held)}, its config asks for {list(wanted)}"
        )


def _check_numbers(folder: str | Path, model: Any) -> None:
    """Refuse weights that are no numbers: training would blame its settings, or never look at them and pass them on."""
    for name, weight in model.named_parameters():
        held = local(scales(weight) if is_packed(weight) else weight.detach())
        if _is_whole(held) and held.numel() and not held.is_meta:
            least, most = torch.aminmax(held)  # one pass, and nothing of the weight's size beside it
            wrong = [number.item() for number in (least, most) if not number.isfinite()]
            if wrong:
                raise BadInput(f"model {folder} is damaged: its weight {name} holds {wrong[0]}; use a whole copy of it")


def _is_of_this_machine(error: Exception) -> bool:
    failure = classify(error)
    has_number = isinstance(error, OSError) and error.errno is not None
    return failure is FailureClass.OUT_OF_MEMORY or (has_number and failure is FailureClass.INFRASTRUCTURE)


def _reason(error: Exception) -> str:
    """The line that says most: a validator's error has its finding in the last one, others in the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "alidation error" in lines[0]:
        return lines[-1]
    return lines[0] if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {lines[0]}"
