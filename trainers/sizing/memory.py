"""Bytes that a phase needs on one device, from the shapes of its models and how it is spread over processes.

What torch is asked for, not what a caching allocator holds on to. Names: n tokens of a forward pass, L of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainers.sizing.at_once import BLOCK, CELLS, CHUNK_ELEMENTS, FEWEST_ROWS, LARGEST_COPY, NARROWEST
from trainers.sizing.servers import ServerPlace
from trainers.sizing.shapes import ModelShape
from trainers.spec import Lora, Parallel

FP32, BF16 = 4, 2
NF4 = (4 + (8 + 32 / 256) / 64) / 8
"""Bytes of a weight in 4 bits, with its block's scale in 8 bits and that one's in 32."""
BUCKET_ELEMENTS = 5 * 10**8
"""Numbers in one of DeepSpeed's buckets of gradients unless its config says otherwise, or there are fewer."""
LIVE_ELEMENTS = 10**9
"""Weights that DeepSpeed holds whole at a time in stage 3 unless its config says otherwise: those that are soon used again."""
PREFETCH_ELEMENTS = 5 * 10**7
"""Weights that DeepSpeed fetches ahead in stage 3 unless its config says otherwise."""
AT_ONCE = 2 / 3
"""Share of what a layer would keep for its backward pass that is there at once where there is none."""
PREFETCHED = 2
"""Layers whose weights FSDP holds whole at a time: the one that computes, and the next."""
LOGITS = 4
"""Numbers for each logit of a step, in fp32: the model's own, divided by a temperature, weights, padded blocks."""
NUCLEUS = 17
"""Where steps are graphs and a nucleus is drawn from, which puts whole vocabularies in order: eleven are counted by a test; a
sort on a GPU has keys and places twice while it moves them, which nobody has measured."""


@dataclass(frozen=True)
class Place:
    """Where a phase runs and how it is spread."""

    parallel: Parallel
    nodes: int = 1
    procs_per_node: int = 1
    bf16: bool = False
    """Arithmetic of forward and backward."""
    gpu: bool = False
    zero: Mapping[str, Any] = field(default_factory=dict)
    """`zero_optimization` of a DeepSpeed JSON file."""
    by_layers: bool = False
    """Sampling gathers a split model's layers for every token, not the whole once."""
    server: ServerPlace = field(default_factory=ServerPlace)
    """Where a vLLM runs that the phase starts."""

    @property
    def world(self) -> int:
        return self.nodes * self.procs_per_node

    @property
    def strategy(self) -> str:
        if self.parallel.strategy == "auto":
            return "single" if self.world == 1 else "ddp"
        return self.parallel.strategy

    @property
    def stage(self) -> int:
        """Of ZeRO; FSDP splits what stage 3 does, and without splitting it is 0."""
        if self.strategy == "deepspeed":
            return self.parallel.deepspeed.stage if self.parallel.deepspeed is not None else 2
        return 3 if self.strategy == "fsdp" else 0

    @property
    def shards(self) -> int:
        """Processes that share one copy of what is split."""
        hybrid = self.parallel.fsdp is not None and self.parallel.fsdp.hybrid
        return self.procs_per_node if hybrid else self.world

    @property
    def masks(self) -> bool:
        """Whether packed rows attend by a mask. Kernels that need none are there on GPUs alone."""
        return not self.gpu or self.parallel.attention in ("sdpa", "eager")

    @property
    def number(self) -> int:
        """Bytes of a number in forward and backward."""
        return BF16 if self.bf16 else FP32


@dataclass(frozen=True)
class Trained:
    """A model in training."""

    shape: ModelShape
    lora: Lora | None = None
    held: int = FP32
    """Bytes of one of its weights."""
    moment: int = FP32
    """Bytes of one number of one of AdamW's moments."""
    head: int = 0
    """Tensors of a chunk of logits, in fp32, that are there at once; 0 without a language head."""
    beside: int = 0
    """Bytes of a frozen model's head in fp32, which is there while the loss is formed."""

    @property
    def packed(self) -> bool:
        return self.lora is not None and self.lora.quantization is not None

    @property
    def parameters(self) -> int:
        """Those that are trained."""
        return self.shape.parameters if self.lora is None else self.shape.adapters(self.lora)


@dataclass(frozen=True)
class Frozen:
    """A model that is not trained."""

    shape: ModelShape
    held: int = FP32


@dataclass(frozen=True)
class Memory:
    """Of one device. Trainees take turns, so of activations the largest count, and responses are generated in between."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    frozen: int = 0
    exchange: int = 0
    """Buffers: whole layers of what is split, gradients on their way."""
    activations: int = 0
    cache: int = 0
    """Of generation, with the whole weights that it gathers, and the logits of its last tokens."""
    vllm: int = 0
    """Of a server that the phase starts on the same device."""
    offloaded: int = 0
    """What lies in the machine's memory instead."""

    @property
    def total(self) -> int:
        """At the worst moment."""
        step = self.gradients + self.exchange + self.activations
        return self.weights + self.optimizer + self.frozen + self.vllm + max(step, self.cache)

    def __add__(self, more: "Memory") -> "Memory":
        return Memory(
            self.weights + more.weights,
            self.gradients + more.gradients,
            self.optimizer + more.optimizer,
            self.frozen + more.frozen,
            max(self.exchange, more.exchange),
            max(self.activations, more.activations),
            max(self.cache, more.cache),
            max(self.vllm, more.vllm),
            self.offloaded + more.offloaded,
        )


# ---------------------------------------------------------------- what is held


def held_trained(place: Place, model: Trained) -> Memory:
    """Weights, gradients, moments, and buffers of their exchange."""
    if model.lora is not None:
        return _with_adapters(place, model)
    whole, shards = model.parameters, place.shards
    # DeepSpeed updates a copy in fp32 even of weights in fp32.
    master = FP32 if place.strategy == "deepspeed" else 0
    weights = model.held * whole // (shards if place.stage == 3 else 1)
    gradients = model.held * whole // (shards if place.stage >= 2 else 1)
    optimizer = (2 * model.moment + master) * whole // (shards if place.stage >= 1 else 1)
    memory = Memory(weights, gradients, optimizer, exchange=_buffers(place, model))
    return _offloaded(place, memory)


def _with_adapters(place: Place, model: Trained) -> Memory:
    """The base is split where weights are; adapters are whole everywhere, in fp32, and so are their moments but for ZeRO's."""
    base = _base(model) // (place.shards if place.stage == 3 else 1)
    trained = model.parameters
    moments = 2 * model.moment * trained // (place.shards if place.strategy == "deepspeed" else 1)
    exchange = FP32 * trained if place.world > 1 else 0
    exchange += _gathered(place, model.shape, model.held) if place.stage == 3 else 0
    memory = Memory(base + FP32 * trained, FP32 * trained, moments, exchange=exchange)
    return replace(memory, weights=FP32 * trained, offloaded=base) if _offloads_weights(place) else memory


def _base(model: Trained) -> int:
    """Of weights beneath adapters, of which linear layers may be packed."""
    packed = model.shape.packable if model.packed else 0
    return int(NF4 * packed) + model.held * (model.shape.parameters - packed)


def _buffers(place: Place, model: Trained) -> int:
    """DDP gathers gradients in buckets as large as they are; ZeRO in buckets of a fixed size; FSDP gathers layers."""
    whole = model.parameters
    if place.strategy == "ddp":
        return model.held * whole
    gathered = _gathered(place, model.shape, model.held) if place.stage == 3 else 0
    if place.strategy == "deepspeed":
        return gathered + _zero_buckets(place, model)
    if place.stage == 3:
        layer, embedding = model.shape.largest_layer, model.shape.embedding
        return gathered + max((_gather_bytes(place, model.held) + FP32) * layer, (model.held + FP32) * embedding)
    return 0


def _zero_buckets(place: Place, model: Trained) -> int:
    """They come with a backward pass, and go with it. On a CPU they take memory as they fill, while activations go."""
    if place.stage < 3 and not place.gpu:
        return 0
    # Stage 3 puts a bucket in the order of its parts before it goes; else one is filled while another one is on its way.
    count = 2 if place.stage == 3 or place.zero.get("overlap_comm") else 1
    size = int(place.zero.get("reduce_bucket_size", min(model.parameters, BUCKET_ELEMENTS)))
    return count * model.held * size


def _gather_bytes(place: Place, held: int) -> int:
    """FSDP gathers layers in the type of the arithmetic, DeepSpeed in the weights' own, as both do what is no layer."""
    if place.strategy == "deepspeed":
        return held
    fsdp = place.parallel.fsdp
    wanted = fsdp.gather_dtype if fsdp is not None else "auto"
    if wanted == "auto":
        return min(held, place.number)
    return BF16 if wanted == "bf16" else FP32


def _gathered(place: Place, shape: ModelShape, held: int) -> int:
    """Whole weights of a trained model that are there at once."""
    if place.strategy == "deepspeed":
        return held * _live(place, shape)
    fsdp = place.parallel.fsdp
    if fsdp is not None and not fsdp.reshard_after_forward:
        return _whole(place, shape, held)
    return _layers(shape, _gather_bytes(place, held), held)


def _whole(place: Place, shape: ModelShape, held: int) -> int:
    """All of a model's weights, gathered."""
    outside = shape.outside_layers
    return _gather_bytes(place, held) * (shape.parameters - outside) + held * outside


def _live(place: Place, shape: ModelShape) -> int:
    """Weights that ZeRO keeps whole for their next use, or fetches ahead; the largest is there in any case."""
    names = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    kept = max(int(place.zero.get(name, LIVE_ELEMENTS)) for name in names)
    ahead = int(place.zero.get("stage3_prefetch_bucket_size", PREFETCH_ELEMENTS))
    return min(shape.parameters, max(kept, shape.embedding + ahead))


def _layers(shape: ModelShape, number: int, held: int) -> int:
    """FSDP's: layers that compute and are fetched. Embeddings that are the head too are there from begin to end."""
    layers, embedding = number * PREFETCHED * shape.largest_layer, held * shape.embedding
    return layers + embedding if shape.tied else max(layers, number * shape.largest_layer + embedding)


def _offloads_weights(place: Place) -> bool:
    fsdp, zero = place.parallel.fsdp, place.parallel.deepspeed
    return place.gpu and bool((fsdp and fsdp.cpu_offload) or (zero and zero.offload_parameters))


def _offloaded(place: Place, memory: Memory) -> Memory:
    """Without what lies in the machine's memory. On a CPU that is the same memory."""
    if not place.gpu:
        return memory
    fsdp, zero = place.parallel.fsdp, place.parallel.deepspeed
    gone: set[str] = set()
    if fsdp is not None and fsdp.cpu_offload:
        gone = {"weights", "gradients", "optimizer"}
    if zero is not None and zero.offload_optimizer:
        gone |= {"gradients", "optimizer"}  # DeepSpeed adds gradients up where moments are
    if zero is not None and zero.offload_parameters:
        gone |= {"weights", "optimizer"}
    moved = sum(getattr(memory, name) for name in gone)
    return replace(memory, offloaded=moved, **dict.fromkeys(gone, 0))


def held_frozen(place: Place, model: Frozen) -> Memory:
    size = model.held * model.shape.parameters
    if not place.parallel.splits_frozen or place.world == 1:
        return Memory(frozen=size)
    gathered = _layers(model.shape, model.held, model.held)
    size //= place.shards
    away = place.gpu and place.parallel.frozen == "offloaded"
    return Memory(frozen=0 if away else size, exchange=gathered, offloaded=size if away else 0)


# ---------------------------------------------------------------- what computing takes


def activations(place: Place, model: Trained, tokens: int, row: int, masked: bool) -> int:
    """What a forward pass keeps for its backward pass, and what that has at its worst moment."""
    number, shape = place.number, model.shape
    # A norm computes in fp32, and what it has normed is again of the type of what it was given, which is the weights'.
    wide = (FP32 + model.held) // 2
    layers = [
        wide * layer.wide + _kept(layer.narrow + masked * layer.masked, layer.pairs, number, row)
        for layer in shape.layers
    ]
    # With checkpointing only the input of every layer is kept, and one layer at a time is computed again.
    checkpointed = model.held * shape.width * len(layers) + max(layers)
    kept = checkpointed if place.parallel.gradient_checkpointing else sum(layers)
    kept += wide * shape.around.wide + FP32 * shape.width
    if masked:
        kept += FP32 * row
    head = head_bytes(model, tokens, trained=model.lora is None) + model.beside + _turned(place, model, tokens)
    return tokens * kept + _copies(place, model) + head


def _kept(narrow: int, pairs: int, number: int, row: int) -> int:
    return number * narrow + FP32 * pairs * row


def _copies(place: Place, model: Trained) -> int:
    """Of weights in the type of the arithmetic: of adapters all, and of what they are on, of which one layer's is unpacked
    at a time.
    """
    adapters = _casts_of(place, FP32, model.parameters) if model.lora is not None else 0
    if model.packed:
        return adapters + sum({model.held, place.number}) * model.shape.largest_linear
    return adapters + _casts(place, model.shape, model.held)


def _casts(place: Place, shape: ModelShape, held: int) -> int:
    """Of layers. What FSDP gathers is in that type."""
    return 0 if place.strategy == "fsdp" else _casts_of(place, held, shape.parameters - shape.embedding - shape.head)


def _casts_of(place: Place, held: int, parameters: int) -> int:
    """Under autocast weights in fp32 have a copy in bf16 until their backward pass."""
    return place.number * parameters if held > place.number else 0


def head_bytes(model: Trained, tokens: int, trained: bool) -> int:
    """A chunk of logits in fp32 and what is made of it; the gradient of a trained head, which is there before the backward
    pass; and a copy in fp32 of a head in bf16.
    """
    if not model.head:
        return 0
    chunk = min(CHUNK_ELEMENTS, tokens * model.shape.vocabulary)
    gradient = FP32 * trained * model.shape.embedding
    return FP32 * model.head * chunk + gradient + head_copy(model.shape, model.held)


def _turned(place: Place, model: Trained, tokens: int) -> int:
    """On a processor some of a chunk's gradient in another order, and what it adds to that of a trained head."""
    if place.gpu or not model.head or model.lora is not None:
        return 0
    rows = min(BLOCK, model.shape.vocabulary)
    chunk = min(tokens, max(1, CHUNK_ELEMENTS // model.shape.vocabulary))
    return FP32 * rows * (chunk + model.shape.width)


def head_copy(shape: ModelShape, held: int) -> int:
    """Heads compute in fp32 (ADR 6)."""
    return FP32 * shape.embedding if held != FP32 else 0


def forward_alone(place: Place, shape: ModelShape, tokens: int, row: int) -> int:
    """What one layer holds while it computes, and the hidden states before and behind it, without gradients."""
    layer = max((_kept(layer.narrow, layer.pairs, place.number, row) for layer in shape.layers), default=0)
    return tokens * (int(AT_ONCE * layer) + 2 * FP32 * shape.width)


def generation(
    place: Place, shape: ModelShape, held: int, responses: int, prompt: int, length: int, split: bool, nucleus: bool
) -> int:
    """The cache of keys and values of ``responses`` side by side, whole weights if they are split, and what is computed:
    some prompts at once; then one token of each.

    One layer's cache is there twice while it grows. Logits come of the model's own forward pass, under autocast; in fp32
    they are divided by a temperature and become weights, whose blocks are padded. On a GPU steps are graphs, whose cache has
    up to so many more positions, and whose memory stays while further prompts are read.
    """
    number = min(place.number, held) if place.bf16 else held
    length += max(NARROWEST, length // 8) if place.gpu else 0
    cache = number * shape.cache * responses * length * (len(shape.layers) + 1) // max(1, len(shape.layers))
    logits = responses * shape.vocabulary * (NUCLEUS if nucleus and place.gpu else LOGITS) * FP32
    prompts = forward_alone(place, shape, _read_at_once(shape, responses, prompt), prompt)
    found = cache + (prompts + logits if place.gpu else max(prompts, logits))
    found += _casts(place, shape, held) + _casts_of(place, held, shape.embedding)
    found += _reordered(place, shape, held, responses)
    if not split:
        return found
    by_layers = place.by_layers
    return found + (_layers(shape, _gather_bytes(place, held), held) if by_layers else _whole(place, shape, held))


def _read_at_once(shape: ModelShape, responses: int, prompt: int) -> int:
    """Tokens of prompts; with states that are no keys and values all of them begin together."""
    some = max(1, CELLS // max(1, prompt)) if shape.activations_known else responses
    return min(responses, some) * prompt


def _reordered(place: Place, shape: ModelShape, held: int, responses: int) -> int:
    """Linear layers and the head once more, in the order in which a processor multiplies faster (`core/packed_linears.py`)."""
    if place.gpu or place.bf16 or held != FP32 or responses < FEWEST_ROWS:
        return 0
    linears = sum(inputs * outputs for layer in shape.layers for _, inputs, outputs in layer.linears)
    copies = FP32 * (linears + shape.embedding)
    return copies if copies <= LARGEST_COPY else 0


def largest(memories: Sequence[Memory]) -> Memory:
    return max(memories, key=lambda memory: memory.total, default=Memory())
