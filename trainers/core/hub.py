"""The Hugging Face hub: which commit a name means, its files, and what its failures mean. Imports no torch."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from trainers.contract import BadInput, Infrastructure
from trainers.failures import chain

T = TypeVar("T")
RepoType = Literal["model", "dataset"]

WAITS = (1.0, 4.0, 16.0)
"""Seconds between the tries of a call that the hub does not answer."""

NO = {
    "GatedRepoError": "its owner has to grant you access to it, on its page; then set HF_TOKEN",
    "RepositoryNotFoundError": "there is no such repository, or it is private and HF_TOKEN does not open it",
    "DatasetNotFoundError": "there is no such repository or revision, or it is private and HF_TOKEN does not open it",
    "RevisionNotFoundError": "it has no such revision",
    "DisabledRepoError": "the hub has disabled it",
}
"""What the hub's refusals mean, by the names of their types; the first that fits says it."""

BUSY = (408, 425, 429)
"""HTTP statuses below 500 that say: ask again later."""

MODEL_FILES = ("*.json", "model*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")
"""What a model is loaded from. Repositories hold the same weights in other forms too, and often twice the bytes."""

TRANSFER = re.compile(r"CAS (service|client) error|reqwest|xet.*(timed out|connection)", re.IGNORECASE)
"""What the hub's transfer library, which is written in Rust, says of a network that fails."""

PATH_LIKE = re.compile(r"^[./~]|^.*//|.*/.*/")
"""Sources that can only be paths: a hub id is `name` or `owner/name`."""


def from_hub(what: str, call: Callable[[], T]) -> T:
    """What ``call`` brings from the hub; it is tried again, after :data:`WAITS`, while the hub does not answer.

    Raises Infrastructure if it never answers, BadInput if it says no: no such name or revision, no access, or not in
    the cache in offline mode. Any other error passes.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            if not _is_unanswered(error):
                raise _refusal(what, error) from error
            if wait is None:
                raise Infrastructure(f"{what}: the hub does not answer ({_reason(error)})") from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def resolve(name: str, revision: str | None, repo_type: RepoType = "model") -> str:
    """The commit that a revision (branch or tag, the default branch unless given) of a repository means now.

    If the hub does not answer it is the commit that the local cache holds under that name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    def ask() -> str:
        try:
            return HfApi().resolve_revision(name, repo_type=repo_type, revision=revision).resolved
        except RevisionResolutionError as error:
            reason = error.__cause__ or error
        raise reason  # outside of the handler: else each would be the other's reason

    return from_hub(f"{repo_type} {_shown(name, revision)}", ask)


def model_files(name: str, revision: str | None) -> Path:
    """The local folder with a model's files at a revision, downloaded if they are not in the cache."""
    from huggingface_hub import snapshot_download

    def fetch() -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(MODEL_FILES)))

    return from_hub(f"model {_shown(name, revision)}", fetch)


def hub_name(source: str, base_dir: Path) -> str | None:
    """The hub id that a model's source is; None for a folder, which starts at ``base_dir``, and for a package."""
    is_path = PATH_LIKE.match(source) or os.path.isdir(base_dir / source)
    return None if is_path or source.startswith("package:") else source


def _shown(name: str, revision: str | None) -> str:
    return f"{name}@{revision}" if revision else name


def _refusal(what: str, error: Exception) -> Exception:
    """The hub's own no as BadInput; anything else, such as a full disk, as it is."""
    if _is_offline(error):
        return BadInput(f"{what} is not in the local cache, and HF_HUB_OFFLINE forbids to ask the hub")
    of_this_machine = isinstance(error, OSError) and error.errno is not None
    if (isinstance(error, OSError | ValueError) and not of_this_machine) or "DatasetsError" in _bases(error):
        return BadInput(f"{what}: {_reason(error)}")
    return error


def _is_offline(error: BaseException) -> bool:
    return any("OfflineModeIsEnabled" in _bases(e) for e in chain(error))


def _is_unanswered(error: BaseException) -> bool:
    """Whether no answer came, or one that says that the hub is down or busy.

    By name: the hub's client and ``datasets`` use two versions of one HTTP library, and wrap its errors.
    """
    for e in chain(error):
        status = getattr(getattr(e, "response", None), "status_code", None)
        if status is not None:
            return status >= 500 or status in BUSY
        if "OfflineModeIsEnabled" in _bases(e):
            return False
        if isinstance(e, ConnectionError | TimeoutError) or _bases(e) & {"TransportError", "XetDownloadError"}:
            return True
        if isinstance(e, RuntimeError) and TRANSFER.search(str(e)):
            return True
    return False


def _bases(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _reason(error: BaseException) -> str:
    for e in chain(error):
        if known := next((text for name, text in NO.items() if name in _bases(e)), None):
            return known
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
