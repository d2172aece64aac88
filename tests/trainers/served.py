"""A server that speaks vLLM's wire and computes with transformers: real HTTP, a real model, and faults on demand.

As a program it takes what a phase says to a vLLM that it starts: `served.py FOLDER --uds SOCKET …`.
"""

import argparse
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

os.environ["NO_PROXY"] = f"{os.environ.get('NO_PROXY', '')},127.0.0.1"


@dataclass
class VllmLike:
    """What the server has, how it behaves, and what it was asked."""

    folder: Path
    name: str = "tiny"
    key: str | None = None
    max_model_len: int = 512
    max_logprobs: int = 64
    failures: list[int] = field(default_factory=list)
    """Statuses that the next completions get instead of an answer; 0 breaks the connection off."""
    processed: bool = False
    """Log-probabilities of what was drawn from, in place of the model's own."""
    delay: float = 0.0
    """Seconds that an answer takes."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Completions' bodies."""
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @property
    def rows(self) -> int:
        return int(self.model.config.vocab_size)

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        with self.lock:
            return self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name, "max_model_len": self.max_model_len, "parent": None}]}
        if path == "/tokenize" and body is not None:
            return 200, {"tokens": self.tokenize(body)}
        if path == "/collective_rpc" and body is not None:
            assert body["method"] == "reload_weights"
            self.model = AutoModelForCausalLM.from_pretrained(
                body["kwargs"]["weights_path"], dtype=torch.float32
            ).eval()
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path != "/v1/completions" or body is None:
            return 404, {"detail": "Not Found"}
        if problem := self.problem(body):
            return 400, {"error": {"message": problem, "type": "BadRequestError", "code": 400}}
        return 200, {"choices": [self.choice(body)]}

    def tokenize(self, body: dict[str, Any]) -> list[int]:
        if "messages" in body:
            text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]

    def problem(self, body: dict[str, Any]) -> str | None:
        if body["model"] != self.name:
            return f"The model `{body['model']}` does not exist."
        if (worst := max(body["prompt"])) > max(self.rows, len(self.tokenizer)) - 1:
            return f"Token id {worst} is out of vocabulary"
        if body.get("prompt_logprobs", 0) > self.max_logprobs:
            asked = body["prompt_logprobs"]
            return f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
        if len(body["prompt"]) >= self.max_model_len:
            return f"This model's maximum context length is {self.max_model_len} tokens."
        return None

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, stops = body["prompt"], body.get("stop_token_ids", [])
        assert len(body.get("logit_bias", {})) <= 1024, "vLLM's newer model runner ends where there are more"
        ids, logs = list(prompt), []
        random = np.random.default_rng(body.get("seed"))
        while len(logs) < body["max_tokens"] and len(ids) < self.max_model_len:
            raw = self.log_probs(ids)[-1]
            drawn = (self.biased(raw, body) / (body["temperature"] or 1)).log_softmax(-1)
            token = int(drawn.argmax()) if body["temperature"] == 0 else self.drawn(drawn, random)
            ids.append(token)
            logs.append(float((drawn if self.processed else raw)[token]))
            if token in stops:
                break
        found: dict[str, Any] = {"text": "", "finish_reason": "length", "stop_reason": None}
        if body.get("return_token_ids"):
            found["token_ids"] = ids[len(prompt) :]
        if "logprobs" in body:
            found["logprobs"] = {"token_logprobs": logs}
        if "prompt_logprobs" in body:
            found["prompt_logprobs"] = self.prompt_logprobs(prompt, body["prompt_logprobs"])
        return found

    def biased(self, raw: torch.Tensor, body: dict[str, Any]) -> torch.Tensor:
        logits = raw.clone()
        for token, bias in body.get("logit_bias", {}).items():
            logits[int(token)] += bias
        return logits

    def drawn(self, log_probs: torch.Tensor, random: np.random.Generator) -> int:
        weights = log_probs.exp().double().numpy()
        return int(random.choice(len(weights), p=weights / weights.sum()))

    def prompt_logprobs(self, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
        found: list[dict[str, Any] | None] = [None]
        for row, token in zip(self.log_probs(prompt), prompt[1:], strict=False):
            top = [token, *row.topk(k).indices.tolist()]  # the token that stands there comes first, as vLLM has it
            found.append({str(t): {"logprob": float(row[t]), "rank": int((row > row[t]).sum()) + 1} for t in top})
        return found


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[VllmLike]:
    with started(VllmLike(folder, **settings)) as vllm:
        yield vllm


@contextmanager
def started(vllm: VllmLike, port: int = 0) -> Iterator[VllmLike]:
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(vllm))
    vllm.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield vllm
    finally:
        server.shutdown()
        server.server_close()


def _handler(vllm: VllmLike) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.say(*self.answer(None))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with vllm.lock:
                vllm.asked.append(body)
                failure = vllm.failures.pop(0) if vllm.failures else None
                vllm.at_once += 1
                vllm.most_at_once = max(vllm.most_at_once, vllm.at_once)
            time.sleep(vllm.delay)
            answer = self.answer(body) if failure is None else (failure, {"error": {"message": "overloaded"}})
            with vllm.lock:
                vllm.at_once -= 1  # before the answer, upon which the next question comes
            if failure == 0:
                self.connection.close()
            else:
                self.say(*answer)

        def answer(self, body: dict[str, Any] | None) -> tuple[int, Any]:
            if vllm.key is not None and self.headers["Authorization"] != f"Bearer {vllm.key}":
                return 401, {"error": "Unauthorized"}
            return vllm.answer(self.path, body)

        def say(self, status: int, document: Any) -> None:
            text = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


def swapped(words: dict[str, int]) -> dict[str, int]:
    a, b = (next(word for word, i in words.items() if i == wanted) for wanted in (6, 7))
    return words | {a: words[b], b: words[a]}


def moved(words: dict[str, int]) -> dict[str, int]:
    """By words that are in front of the student's, behind the marks."""
    marks = 6
    return {word: i if i < marks else i + 10 for word, i in words.items()} | {f"new{i}": marks + i for i in range(10)}


def with_words(folder: Path, change: Callable[[dict[str, int]], dict[str, int]], path: Path) -> Path:
    """The folder's model with its words at other ids, as a folder of its own."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    words = document["model"]["vocab"] = change(document["model"]["vocab"])
    tokenizer.save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(document))
    model.resize_token_embeddings(len(words))
    model.save_pretrained(path)
    return path


class _SocketServer(ThreadingHTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "here", 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uds", required=True)
    parser.add_argument("--dtype", choices=["float32"])
    parser.add_argument("--max-logprobs", type=int, default=20)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--served-model-name", default="tiny")
    parser.add_argument("--logprobs-mode", choices=["raw_logprobs", "processed_logprobs"], default="raw_logprobs")
    parser.add_argument("--break-after", type=int, default=10**9, help="completions, after which it ends as by a fault")
    parser.add_argument(
        "--hang", nargs=2, default=["", ""], help="a path without an answer, and a file to make once it is asked"
    )
    args = parser.parse_args()
    vllm = VllmLike(args.folder, name=args.served_model_name, max_logprobs=args.max_logprobs)
    vllm.max_model_len = args.max_model_len
    vllm.processed = args.logprobs_mode == "processed_logprobs"

    class Handler(_handler(vllm)):  # type: ignore[misc]
        disable_nagle_algorithm = False  # there is none on such a socket

        def answer(self, body: dict[str, Any] | None) -> tuple[int, Any]:
            if self.path == args.hang[0]:
                Path(args.hang[1]).touch()
                time.sleep(3600)
            return super().answer(body)

        def do_POST(self) -> None:
            if len(vllm.asked) >= args.break_after:
                print("ValueError: no memory for this\nsomething else", flush=True)
                os._exit(3)
            super().do_POST()

    _SocketServer(args.uds, Handler).serve_forever()


if __name__ == "__main__":
    main()
