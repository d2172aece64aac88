"""A model's sizes, from its `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainers.model_files import config_problem
from trainers.rotary import same_angles
from trainers.sizing.families import DEFAULTS, FAMILIES, READ_DIRECTLY, STATE_SPACE
from trainers.sizing.parts import Part, layer_norm, norm
from trainers.spec import Lora, ScratchModel

UNSTATED = 2**20
"""Positions of a model whose config states none."""


class UnknownSize(ValueError):
    """The config does not tell how large the model is; says why."""


@dataclass(frozen=True)
class ModelShape:
    """Counts are of parameters."""

    model_type: str
    width: int
    """Of a hidden state."""
    vocabulary: int
    """Rows of the embeddings."""
    layers: tuple[Part, ...]
    """Decoder layers, first to last."""
    around: Part
    """What belongs to no layer, without embeddings and head: the last norm, learned positions."""
    tied: bool
    """Head and embeddings are one."""
    language_head: bool = True
    """Else a score of one number."""
    positions: int = UNSTATED
    """Longest sequence."""

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.width

    @property
    def head(self) -> int:
        """A matrix of its own, or none."""
        if not self.language_head:
            return self.width
        return 0 if self.tied else self.embedding

    @cached_property
    def parameters(self) -> int:
        return self.embedding + self.head + self.around.parameters + sum(layer.parameters for layer in self.layers)

    @cached_property
    def largest_layer(self) -> int:
        return max(layer.parameters for layer in self.layers)

    @property
    def outside_layers(self) -> int:
        return self.embedding + self.head + self.around.parameters

    @property
    def activations_known(self) -> bool:
        return self.model_type not in STATE_SPACE

    @property
    def cache(self) -> int:
        """Numbers that a token leaves in the cache of generation."""
        return sum(layer.cache for layer in self.layers)

    @cached_property
    def packable(self) -> int:
        """Of linear layers that `lora.quantization` packs; heads, embeddings and all else stay as they are."""
        linears = (linear for layer in self.layers for linear in layer.linears)
        return sum(inputs * outputs for name, inputs, outputs in linears if self._is_called(name))

    @property
    def largest_linear(self) -> int:
        linears = (linear for layer in self.layers for linear in layer.linears)
        return max((inputs * outputs for _, inputs, outputs in linears), default=0)

    def adapters(self, lora: Lora) -> int:
        """Parameters of low-rank adapters, and of a score head, which is trained with them."""
        found = sum(
            inputs + outputs
            for layer in self.layers
            for name, inputs, outputs in layer.linears
            if self._adapted(name, lora)
        )
        return lora.rank * found + (0 if self.language_head else self.head)

    def _adapted(self, name: str, lora: Lora) -> bool:
        if lora.target_modules:
            return any(wanted.rsplit(".", 1)[-1] == name for wanted in lora.target_modules)
        return self._is_called(name)

    def _is_called(self, name: str) -> bool:
        return not name.isdigit() and name not in READ_DIRECTLY.get(self.model_type, ())


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The sizes of a causal language model, or of a classifier with one label. Raises UnknownSize."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    if (wrong := config_problem(config)) is not None:
        raise UnknownSize(f"its config.json lacks or misstates {wrong}")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UnknownSize(f"models of type {kind} are not known here")
    settings = {**DEFAULTS.get(kind, {}), **{key: value for key, value in config.items() if value is not None}}
    try:
        found = _shape(kind, settings, _is_classifier(config))
        if found.parameters <= 0:  # whatever is no number raises here
            raise ValueError("its sizes")
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UnknownSize(f"its config.json lacks or misstates {error}") from error
    return found


def _shape(kind: str, c: dict[str, Any], classifier: bool) -> ModelShape:
    width = c["n_embd"] if kind == "gpt2" else c["hidden_size"]
    if kind != "gpt2" and "num_attention_heads" in c:
        c.setdefault("num_key_value_heads", c["num_attention_heads"])
    around = layer_norm(width) if kind in ("gpt2", "gpt_neox") else norm(width)
    positions = c.get("n_positions" if kind == "gpt2" else "max_position_embeddings") or UNSTATED
    positions = min(positions, same_angles(c) or positions)
    if kind == "gpt2":
        around += Part(other=positions * width)
    return ModelShape(
        kind,
        width,
        c["vocab_size"],
        tuple(FAMILIES[kind](c)),
        around,
        bool(c.get("tie_word_embeddings", False)),
        not classifier,
        positions,
    )


def _is_classifier(config: Mapping[str, Any]) -> bool:
    return any("SequenceClassification" in name for name in config.get("architectures") or ())


def scratch_shape(spec: ScratchModel) -> ModelShape:
    """A scratch model's sizes, with as many tokens as its vocabulary may have: the text that is there may give fewer."""
    return shape_of(
        {
            "model_type": "llama",
            "vocab_size": spec.tokenizer.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size or 4 * spec.hidden_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "max_position_embeddings": spec.max_positions,
        }
    )
