"""What is said to a vLLM server and what it answers: token ids and log-probabilities. Imports no torch.

By `/v1/completions`, the interface that all of its versions have; `token_ids` in the answer came with 0.10.2.

Names: T tokens of a response, k likeliest next tokens.
"""

from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.contract import BadInput
from trainers.core.served.server import Server
from trainers.spec import Sampling

LEAST_REST = float(np.log(2.0**-23))
"""Lowest log-probability of all other tokens together: what the kept ones leave of 1, and they are known to fp32's rounding."""


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    """Generated tokens, the end token included."""
    logprobs: list[float]
    """Of each, at temperature 1 and without any cut."""


@dataclass(frozen=True)
class Wire:
    """A model of a server."""

    server: Server
    name: str
    positions: int
    """Tokens that prompt and response may have together."""

    def check_length(self, tokens: int) -> None:
        """Raise BadInput if the server does not take so many of prompt and response."""
        if tokens > self.positions:
            raise BadInput(
                f"{self.server.field}: {self.server.url} takes {self.positions} tokens of prompt and response, and {tokens} "
                f"are asked for: start it with --max-model-len {tokens}, or lower maxNewTokens or maxPromptLength"
            )

    def respond(
        self, prompt: List[int], sampling: Sampling, seed: int, stops: List[int], bias: Mapping[str, float]
    ) -> Answer:
        """A response to a prompt. All is said that the server would else take from its model's files or its own settings."""
        found = self._complete(
            prompt,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            stop_token_ids=stops,
            logprobs=0,
            return_token_ids=True,
            return_tokens_as_token_ids=True,
            **({"logit_bias": bias} if bias else {}),
        )
        ids, logprobs = found.get("token_ids"), (found.get("logprobs") or {}).get("token_logprobs")
        if not ids or not logprobs or len(ids) != len(logprobs):
            raise self._no_such_answer("token_ids")
        if len(ids) < sampling.max_new_tokens and ids[-1] not in stops:
            raise BadInput(
                f"{self.server.field}: {self.server.url} ended a response by itself ({found.get('finish_reason')}, "
                f"{found.get('stop_reason')}): start it without stop tokens and token limits of its own"
            )
        return Answer(ids, logprobs)

    def likeliest(self, ids: List[int], first: int, k: int, known: int) -> np.ndarray:
        """The k likeliest next tokens at each position from ``first`` on, as
        :func:`trainers.core.top_k.likeliest` has them: their ids, their log-probabilities and that of all others, (T, 2 k + 1).

        Ids from ``known`` on are among the others. A place that nothing is left for repeats the first id, at -inf.
        """
        found = [_likeliest(position, k, known) for position in self._scored(ids, k)[first:]]
        return np.array(found, dtype=np.float64).reshape(len(found), 2 * k + 1)

    def continued(self, ids: List[int], new_tokens: int) -> list[int]:
        """The likeliest tokens behind these, whatever ends a response."""
        found = self._complete(ids, max_tokens=new_tokens, temperature=0, return_token_ids=True).get("token_ids")
        if not found:
            raise self._no_such_answer("token_ids")
        return list(found)

    def logprobs(self, ids: List[int]) -> list[float]:
        """Of every token but the first."""
        scored = self._scored(ids, 1)
        return [float(position[str(token)]["logprob"]) for position, token in zip(scored[1:], ids[1:], strict=True)]

    def takes(self, token: int) -> bool:
        """Whether an id is in the vocabulary."""
        try:
            self._complete([token], max_tokens=1, temperature=0)
        except BadInput as refusal:
            if "vocabulary" in str(refusal):
                return False
            raise
        return True

    def tokens(self, text: str) -> list[int] | None:
        """Of a text as it stands; None from a server that does not tell."""
        return self._tokenized({"prompt": text, "add_special_tokens": False})

    def conversation_tokens(self, messages: List[Mapping[str, Any]]) -> list[int] | None:
        """Of what the server's own template makes of a conversation; None if it has none, or does not tell."""
        return self._tokenized({"messages": list(messages), "add_generation_prompt": True})

    def _tokenized(self, body: dict[str, Any]) -> list[int] | None:
        try:
            found = self.server.post("/tokenize", {"model": self.name, **body})
        except BadInput:
            return None
        return found.get("tokens") if isinstance(found, dict) else None

    def _scored(self, ids: List[int], k: int) -> list[dict[str, dict[str, Any]]]:
        try:
            found = self._complete(ids, max_tokens=1, temperature=0, prompt_logprobs=k)
        except BadInput as refusal:
            if "logprobs" in str(refusal):
                raise BadInput(f"{refusal}; start the server with --max-logprobs {k}") from refusal
            raise
        scored = found.get("prompt_logprobs")
        if not isinstance(scored, list) or len(scored) != len(ids):
            raise self._no_such_answer("prompt_logprobs")
        return scored

    def _complete(self, prompt: List[int], **settings: Any) -> dict[str, Any]:
        plain = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "ignore_eos": True}
        answer = self.server.post("/v1/completions", {"model": self.name, "prompt": list(prompt), **plain, **settings})
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not choices:
            raise self._no_such_answer("choices")
        found: dict[str, Any] = choices[0]
        return found

    def _no_such_answer(self, what: str) -> BadInput:
        return BadInput(
            f"{self.server.field}: {self.server.url} answers without {what}: it must be vLLM 0.10.2 or newer"
        )


def connected(server: Server, served_as: str | None) -> Wire:
    """The model of this name, or the only one. Raises BadInput if the server has no such model."""
    document = server.get("/v1/models")
    listed = document.get("data") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not all(isinstance(model, dict) and "id" in model for model in listed):
        raise BadInput(f"{server.field}: {server.url} lists no models: is it a vLLM server?")
    names = [str(model["id"]) for model in listed]
    if served_as is None and len(names) != 1:
        raise BadInput(
            f"{server.field}: {server.url} has {', '.join(names) or 'no models'}: set servedAs to one of them"
        )
    if served_as is not None and served_as not in names:
        raise BadInput(
            f"{server.field}.servedAs: {server.url} has no {served_as!r}, but {', '.join(names) or 'nothing'}"
        )
    model = listed[names.index(served_as)] if served_as is not None else listed[0]
    return Wire(server, str(model["id"]), int(model.get("max_model_len") or 2**20))


def _likeliest(position: Mapping[str, Mapping[str, Any]], k: int, known: int) -> list[float]:
    """One row. Beside the k likeliest the server names the token that stands there, which may be none of them."""
    by_rank = sorted(position.items(), key=lambda entry: int(entry[1]["rank"]))[:k]
    kept = [(int(token), float(entry["logprob"])) for token, entry in by_rank if int(token) < known]
    ids = [token for token, _ in kept] or [0]
    logs = [log for _, log in kept] or [-np.inf]
    lacking = k - len(ids)
    return [*ids, *ids[:1] * lacking, *logs, *[-np.inf] * lacking, _rest(logs, known)]


def _rest(logs: list[float], known: int) -> float:
    """Log-probability of all tokens that are not kept."""
    if len(logs) >= known:
        return -np.inf
    left = 1 - float(np.exp(logs).sum())
    return float(np.log(left)) if left > np.exp(LEAST_REST) else LEAST_REST
