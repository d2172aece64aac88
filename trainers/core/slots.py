"""Keys and values of responses that are on their way, in slots: a row's place is filled again as soon as it has ended.

Every layer has one tensor of keys and one of values, for S slots of as many positions as the longest row needs. Rows 0 to
B - 1 are the ones on their way. A row's token is read at the row's own position, so rows of any length go side by side,
and a mask says up to where each of them has come. transformers' modules compute all of it: the cache is one of theirs by
its interface, and the mask is given to them ready-made.

What a prompt's last token is followed by is found in the first step of its row, beside the steps of other rows: reading a
prompt means its keys and values only. Prompts that are alike are read once and copied; so is what prompts begin with alike
(:mod:`trainers.core.beginnings`), where a model's passes are computed in own functions.

Names: B rows of S slots, V vocabulary; G prompts, of which at most L tokens are read behind others, W positions.
"""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from trainers.core.beginnings import FEWEST, Piece, Prompt, levels, longest_beginning
from trainers.core.lean import Grid, Lean, is_lean
from trainers.core.padded import without_router_logits
from trainers.core.products import step
from trainers.core.sharding import computes_on
from trainers.sizing.at_once import CELLS

T = TypeVar("T")

ALIKE = frozenset(
    {
        "cohere",
        "deepseek_v3",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen3_moe",
    }
)
"""Model types that take one mask for all layers."""
BY_KIND = frozenset({"gemma2", "gemma3_text", "gpt_oss", "qwen2", "qwen3"})
"""Model types that take one for each kind of layer."""
GROWTH = 128
"""Positions that slots grow by, or a quarter of what they have."""


def fits_slots(model: Any) -> bool:
    """Whether a model's states are keys and values alone, in a way that is known here."""
    return model.config.model_type in ALIKE | BY_KIND


class Slots:
    refills = True

    def __init__(self, model: Any, count: int, longest: int, whole: bool = False) -> None:
        """``whole``: with all positions from the start, so that they stay where they are."""
        self.model, self.count = model, count
        self.least = longest if whole else 0
        self.device = computes_on(model)
        self.layers = [_Layer(count, longest) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        self.lean = Lean(model, longest) if is_lean(model) else None
        self.read: list[Prompt] = [()] * count
        """What of its prompt each slot has begun with."""

    def fill(self, rows: List[int], prompts: List[list[int]]) -> None:
        """Read all but the last tokens of prompts into slots: each different one once, and what several begin with."""
        wanted = {row: tuple(prompt[:-1]) for row, prompt in zip(rows, prompts, strict=True)}
        first = {prefix: row for row, prefix in reversed(wanted.items()) if prefix}
        for layer in self.layers:
            layer.room = max([self.least, *map(len, first)])
        known = self._reuse(first)
        if self.lean is not None:
            self._read_levels(self.lean, first, known)
        else:
            self._read_whole({prefix: row for prefix, row in first.items() if known[prefix] < len(prefix)})
        copies = {row: first[prefix] for row, prefix in wanted.items() if prefix and first[prefix] != row}
        self._copy(list(copies), list(copies.values()))
        for row, prefix in wanted.items():
            self.read[row] = prefix

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
        """(B, V) of what follows the tokens, which are at these positions (below ``width``) of their rows."""
        rows = torch.arange(len(tokens), device=self.device)
        mask = self._mask(positions, width)
        if self.lean is not None:
            self._aim(Cells(rows, positions), width)
            return self.lean.logits(tokens, positions, mask, self.cache)
        out = self._pass(tokens[:, None], positions[:, None], mask, Cells(rows, positions), width)
        return out.logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        """Row i is from now on what row ``rows[i]`` was."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().flatten()
        self._copy(moved, rows[moved])
        was = list(self.read)
        self.read = [was[row] for row in rows.tolist()] + [()] * (self.count - len(rows))

    def _reuse(self, prompts: dict[Prompt, int]) -> dict[Prompt, int]:
        """Copy from slots what they begin with of prompts: how many first tokens each has of it. Nothing has been read yet.

        All at once, so slots that are about to be filled anew still have what they had.
        """
        there = {prefix: row for row, prefix in enumerate(self.read) if prefix}
        ordered = sorted(there)
        copies, known = {}, dict.fromkeys(prompts, 0)
        for prompt, row in prompts.items():
            length, like = longest_beginning(prompt, ordered)
            if length == len(prompt) or (self.lean is not None and length >= FEWEST):
                known[prompt] = length
                if self.read[row][:length] != prompt[:length]:
                    copies[row] = there[like]
        self._copy(list(copies), list(copies.values()), slice(max(known.values(), default=0)))
        return known

    def _read_levels(self, lean: Lean, slots: dict[Prompt, int], known: dict[Prompt, int]) -> None:
        """Beginnings that prompts share, copied to all who share them, then what is behind these."""
        for pieces in levels(known):
            for behind in (False, True):
                for some in _cut((p for p in pieces if bool(p.start) is behind), lambda piece: len(piece.tokens)):
                    self._read_lean(lean, some, [slots[piece.of] for piece in some], behind)
            for piece in pieces:
                self._copy([slots[other] for other in piece.others], [slots[piece.of]], slice(len(piece.tokens)))

    def _read_whole(self, prompts: dict[Prompt, int]) -> None:
        """Prompts into slots, those of like length together."""
        for _, alike in groupby(sorted(prompts, key=len), key=lambda prompt: len(prompt).bit_length()):
            for some in _cut(alike, len):
                self._read_padded(some, [prompts[prompt] for prompt in some])

    def _read_lean(self, lean: Lean, pieces: List[Piece], slots: List[int], behind: bool) -> None:
        """All tokens behind each other, and the last one a few times more: products come in few numbers of rows."""
        places = [(i, at) for i, piece in enumerate(pieces) for at in range(piece.start, len(piece.tokens))]
        places += places[-1:] * (-len(places) % step(len(places)))
        ids = torch.tensor([pieces[i].tokens[at] for i, at in places], device=self.device)
        of_piece, positions = torch.tensor(places, device=self.device).T
        rows = torch.tensor(slots, device=self.device)
        width = max(len(piece.tokens) for piece in pieces)
        self._aim(Cells(rows[of_piece], positions), width)
        if not behind:
            grid = Grid(of_piece, positions, len(pieces), width)
            lean.read(ids, positions, grid, self._mask_of_prompts(width), self.cache)
            return
        starts = torch.tensor([piece.start for piece in pieces], device=self.device)
        longest = max(len(piece.tokens) - piece.start for piece in pieces)
        grid = Grid(of_piece, positions - starts[of_piece], len(pieces), longest, rows)
        lean.read(ids, positions, grid, self._mask_behind(starts, longest, width), self.cache)

    def _mask_behind(self, starts: torch.Tensor, longest: int, width: int) -> Any:
        """(G, 1, L, W) of what to add to scores of tokens that stand behind these positions of their rows."""
        positions = starts[:, None] + torch.arange(longest, device=self.device)
        found = self._mask(positions.clamp(max=width - 1).flatten(), width)
        shape = (len(starts), 1, longest, width)
        if isinstance(found, dict):
            return {kind: mask.view(shape) for kind, mask in found.items()}
        return found.view(shape)

    def _mask_of_prompts(self, width: int) -> Any:
        """(W, W) of what to add to scores, where a window hides some of what is before; None where nothing does."""
        window = getattr(self.model.config, "sliding_window", None)
        if window is None or window >= width:
            return None
        found = self._mask(torch.arange(width, device=self.device), width)
        if isinstance(found, dict):
            return {kind: mask[:, 0, 0] for kind, mask in found.items()}
        return found[:, 0, 0]

    def _read_padded(self, prompts: List[Prompt], slots: List[int]) -> None:
        """Padded behind, where nothing of theirs looks."""
        width = len(prompts[-1])
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.device)
        rows = torch.tensor(slots, device=self.device)
        positions = torch.arange(width, device=self.device).expand(len(prompts), -1)
        self._pass(ids, positions, None, (rows, slice(width)), width)

    def _pass(self, ids: torch.Tensor, positions: torch.Tensor, mask: Any, place: "Place", width: int) -> Any:
        self._aim(place, width)
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **without_router_logits(self.model),
        )

    def _aim(self, place: "Place", width: int) -> None:
        for layer in self.layers:
            layer.place, layer.width = place, width

    def _mask(self, positions: torch.Tensor, width: int) -> Any:
        """What to add to scores: 0 up to a row's position, minus infinity behind it and before its window."""
        config = self.model.config
        columns, last = torch.arange(width, device=self.device), positions[:, None]
        hidden = columns > last
        window = getattr(config, "sliding_window", None)
        outside = hidden if window is None else hidden | (columns <= last - window)
        if config.model_type not in BY_KIND:
            return self._added(outside)
        return {"full_attention": self._added(hidden), "sliding_attention": self._added(outside)}

    def _added(self, hidden: torch.Tensor) -> torch.Tensor:
        """As numbers: torch's attention on a CPU takes three times as long with a mask of truth values, or none."""
        zeros = torch.zeros(hidden.shape, dtype=self.model.dtype, device=self.device)
        return zeros.masked_fill_(hidden, float("-inf"))[:, None, None]

    def _copy(self, targets: Any, sources: Any, positions: slice = slice(None)) -> None:
        if len(targets):
            for layer in self.layers:
                layer.copy(targets, sources, positions)


class Cells:
    """Rows of tokens, and their positions: where a pass keeps its keys and values."""

    def __init__(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        self.rows, self.positions = rows, positions
        self.found: dict[tuple[int, int], torch.Tensor] = {}

    def flat(self, heads: int, room: int) -> torch.Tensor:
        """Numbers of cells in (rows, heads, positions), heads of each token together: the same for all layers."""
        if (heads, room) not in self.found:
            at = self.rows[:, None] * heads + torch.arange(heads, device=self.rows.device)
            self.found[heads, room] = (at * room + self.positions[:, None]).flatten()
        return self.found[heads, room]


Place = Cells | tuple[torch.Tensor, slice]
"""Where a pass writes: cells, or rows and a range of positions of all."""


class _Layer(CacheLayerMixin):
    """One layer's (S, heads, positions, width), made when the first keys come."""

    place: Place
    width: int
    room: int
    """Positions that prompts take which are about to be read, some of them later than others."""

    def __init__(self, count: int, longest: int) -> None:
        super().__init__()
        self.count, self.longest = count, longest

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new keys and values; what attention looks at: a prompt at itself, a token at all of its row."""
        self.keep(keys, values)
        if not isinstance(self.place, Cells):
            return keys, values
        rows = len(self.place.rows)
        return self.keys[:rows, :, : self.width], self.values[:rows, :, : self.width]

    def keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if self.width > self.keys.shape[2]:
            self._grow()
        if not isinstance(self.place, Cells):
            rows, positions = self.place
            for kept, new in ((self.keys, keys), (self.values, values)):
                kept[rows, :, positions] = new.to(kept.dtype)
            return
        at = self.place.flat(*self.keys.shape[1:3])
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept.flatten(0, 2).index_copy_(0, at, new.flatten(0, 2).to(kept.dtype))

    def lazy_initialization(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """In the type that attention computes in: under autocast it would be made of all positions for every token."""
        kind = keys.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.keys, self.values = (
            x.new_zeros(self.count, x.shape[1], 0, x.shape[3], dtype=dtype or x.dtype) for x in (keys, values)
        )
        self.is_initialized = True

    def _grow(self) -> None:
        """With zeros: what a mask hides is multiplied by zero, and has to be a number."""
        there = self.keys.shape[2]
        more = min(max(GROWTH, there // 4, self.width - there, self.room - there), self.longest - there)
        self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))

    def copy(self, targets: Any, sources: Any, positions: slice) -> None:
        if self.is_initialized:
            for kept in (self.keys, self.values):
                kept[targets, :, positions] = kept[sources, :, positions]

    def of(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some rows, as far as a pass looks."""
        return self.keys[rows, :, : self.width], self.values[rows, :, : self.width]

    def get_seq_length(self) -> int:
        """Of prompts, which begin: to later tokens a mask is given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self.longest


def _cut(items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """By length, in runs that are read at once."""
    some: list[T] = []
    for item in sorted(items, key=length):
        if some and (len(some) + 1) * length(item) > CELLS:
            yield some
            some = []
        some.append(item)
    if some:
        yield some
