"""Files in an object store: listed, read, written, copied on its side. Imports no torch.

Any store that fsspec knows will do (`s3://`, `gs://`, …). Credentials and the endpoint come from the environment, as the
store's own library reads them, and are never printed. What goes wrong ends as one line that names the address.
"""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from trainers.contract import BadInput, Infrastructure, PhaseError

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
CHANGED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "404", "409", "412")
"""A store's words for an object that is not what a condition says."""
AT_ONCE = 2
"""Files under way side by side. On S3 with four parts of 50 MiB each: large uploads take up to 0.8 GiB of memory."""
S3_OPTIONS = {
    "max_concurrency": 4,
    "default_block_size": 16 * 2**20,
    "config_kwargs": {"connect_timeout": 10, "retries": {"mode": "standard", "max_attempts": 5}},
}


@dataclass(frozen=True)
class Object:
    size: int
    modified: float
    """Seconds since the epoch; 0 where the store does not say."""


class Damaged(BadInput):
    """An object's content is not what was once written."""


class Store:
    """The objects below one address; their names are relative to it.

    Every method raises BadInput for what only the user can mend (credentials, a missing bucket, a missing package),
    Damaged where the store's own checksum is wrong, and Infrastructure for what may pass.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        with errors_of(self.uri):
            self._fs, root = _open(self.uri)
        self._root = root.rstrip("/")
        self.guard: Callable[[], None] | None = None
        """Raises if this process may write no more (:mod:`trainers.remote.lease`); called before anything is changed."""

    def address(self, name: str) -> str:
        return f"{self.uri}/{name}" if name else self.uri

    def check(self) -> None:
        """Whether there is anything of that address at all: where there is no bucket, S3's library finds nothing in it."""
        if self._is_s3:
            bucket, prefix, _ = self._fs.split_path(self._root)
            with errors_of(self.uri):
                self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)

    @property
    def _is_s3(self) -> bool:
        return self.uri.startswith(("s3://", "s3a://"))

    def find(self, folder: str = "") -> dict[str, Object]:
        """All objects below a folder, or the one of that very name, sorted; none if there is no such folder."""
        with errors_of(self.address(folder)):
            found = self._fs.find(self._path(folder), detail=True)
        return self._objects(found)

    def glob(self, pattern: str) -> dict[str, Object]:
        """Objects whose names match; `*` stops at slashes, `**` does not."""
        with errors_of(self.address(pattern)):
            found = self._fs.glob(self._path(pattern), detail=True)
        return self._objects(found)

    def read(self, name: str) -> bytes | None:
        """An object's content, or None without it."""
        with errors_of(self.address(name)):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def tag(self, name: str) -> str | None:
        """What tells an object's content from any that it had before; None if there is no object."""
        with errors_of(self.address(name)):
            try:
                info = self._fs.info(self._path(name))
            except FileNotFoundError:
                return None
        if info["type"] != "file":
            return None
        return str(info.get("ETag") or info.get("etag") or hashlib.sha256(self.read(name) or b"").hexdigest())

    def swap(self, name: str, content: bytes, tag: str | None) -> str | None:
        """Write an object if it still has this tag, or if there is none. Its new tag, or None if it is another by now.

        Of stores other than S3 the condition is looked at before, and not by the store.
        """
        if (written := (self._put_if if self._is_s3 else self._put_after_a_look)(name, content, tag)) is not None:
            return written
        found = self.tag(name)
        return found if self.read(name) == content else None  # the library asks again when an answer is lost

    def _put_if(self, name: str, content: bytes, tag: str | None) -> str | None:
        condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
        with errors_of(self.address(name)):
            try:
                return str(self._fs.pipe_file(self._path(name), content, **condition)["ETag"])
            except OSError as error:
                if _code(error) not in CHANGED:
                    raise
        return None

    def _put_after_a_look(self, name: str, content: bytes, tag: str | None) -> str | None:
        if self.tag(name) != tag:
            return None
        with errors_of(self.address(name)):
            self._fs.pipe_file(self._path(name), content)
        return self.tag(name)

    def create(self, name: str, content: bytes) -> None:
        """Write an object that is not there. Raises Infrastructure if it is."""
        self._check()
        if self.swap(name, content, None) is None:
            self._check()
            raise Infrastructure(f"{self.address(name)}: somebody else has written it")

    def write(self, name: str, content: bytes) -> None:
        self._check()
        with errors_of(self.address(name)):
            self._fs.pipe_file(self._path(name), content)

    def upload(self, files: Mapping[str, Path]) -> None:
        """Local files by the names they get. An object is seen whole or not at all."""
        if not files:
            return
        self._check()
        with errors_of(self.uri):
            targets = [self._path(name) for name in files]
            self._fs.put([str(path) for path in files.values()], targets, batch_size=AT_ONCE)

    def download(self, files: Mapping[str, Path], objects: Mapping[str, Object]) -> None:
        """Objects to local paths. A path holds a whole file or nothing, with the object's time, so that it is known again."""
        wanted = {name: path for name, path in files.items() if not _is_same(path, objects[name])}
        if not wanted:
            return
        mark = secrets.token_hex(4)  # in containers all processes have the same number
        parts = {name: path.with_name(f".{path.name}.{mark}.part") for name, path in wanted.items()}
        for path in wanted.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with errors_of(self.uri):
                sources = [self._path(name) for name in wanted]
                self._fs.get(sources, [str(part) for part in parts.values()], batch_size=AT_ONCE)
        except BaseException:
            for part in parts.values():
                part.unlink(missing_ok=True)
            raise
        for name, part in parts.items():
            if objects[name].modified:
                os.utime(part, (objects[name].modified, objects[name].modified))
            os.replace(part, wanted[name])

    def copy(self, names: Mapping[str, str]) -> None:
        """Copy inside the store, without a way through this machine."""
        if not names:
            return
        self._check()
        with errors_of(self.uri):
            self._fs.copy(
                [self._path(name) for name in names], [self._path(name) for name in names.values()], batch_size=AT_ONCE
            )

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects in this order. One by one: deleting many at once tells nothing of those that stayed."""
        self._check()
        for name in names:
            with errors_of(self.address(name)):
                self._fs.rm_file(self._path(name))

    def _check(self) -> None:
        if self.guard is not None:
            self.guard()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _objects(self, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Object]:
        start = len(self._root) + 1
        files = {name[start:]: info for name, info in sorted(found.items()) if info["type"] == "file"}
        return {
            name: Object(int(info["size"]), _modified(info)) for name, info in files.items() if not name.endswith("/")
        }


def _open(uri: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write there too
    if uri.startswith(("s3://", "s3a://")):
        options |= S3_OPTIONS
        # boto reads AWS_DEFAULT_REGION only.
        if region := os.environ.get("AWS_REGION"):
            options["client_kwargs"] = {"region_name": region}
    fs, root = url_to_fs(uri, **options)
    return fs, str(root)


def _modified(info: Mapping[str, Any]) -> float:
    value = info.get("LastModified", info.get("mtime"))
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if isinstance(value, int | float) else 0.0


def _is_same(path: Path, found: Object) -> bool:
    """Whether a file was downloaded from this very object."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return stat.st_size == found.size and found.modified > 0 and abs(stat.st_mtime - found.modified) < 1e-3


# ---------------------------------------------------------------- what goes wrong


@contextmanager
def errors_of(uri: str) -> Iterator[None]:
    """Turn the library's errors into BadInput or Infrastructure. Errors of local files pass as they are."""
    try:
        yield
    except PhaseError:
        raise
    except Exception as error:
        problem = _problem(uri, error)
        if problem is None:
            raise
        raise problem from error


def _problem(uri: str, error: Exception) -> PhaseError | None:
    scheme = uri.partition("://")[0]
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError) and error.filename is not None:
        return None
    if "ChecksumError" in type(error).__name__:
        return Damaged(f"{uri}: damaged ({text})")
    if (mistake := _mistake(scheme, text, error)) is not None:
        return BadInput(f"{uri}: {mistake}")
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in ("builtins", "trainers"):
        return Infrastructure(f"{uri}: {text}{_endpoint_hint(scheme)}")
    return None


def _mistake(scheme: str, text: str, error: Exception) -> str | None:
    """What only the user can mend, with what to do; None for other errors."""
    if isinstance(error, ImportError):
        return f"{text}; pip install {PACKAGES.get(scheme, 'the package that serves ' + scheme)}"
    if _denied(error):
        return f"access denied ({text}); {_credentials_hint(scheme)}"
    if _code(error) == "NoSuchBucket":
        return f"{text} Create it, or correct the address"
    if _code(error) in _WRONG_PLACE:
        return f"{text}; check the address, AWS_ENDPOINT_URL and AWS_REGION"
    if isinstance(error, ValueError) or _code(error) in ("ParamValidationError", "InvalidBucketName"):
        return f"{text}; check the address{_endpoint_hint(scheme)}"
    return None


# To a request without a body (400) a store that is asked in the name of another region cannot say what is wrong.
_WRONG_PLACE = ("400", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "UnauthorizedSSOTokenError",
)


def _denied(error: Exception) -> bool:
    unknown_key = _status(error) in (401, 403) or "access key" in str(error).lower()
    return isinstance(error, PermissionError) or _code(error) in _NO_CREDENTIALS or unknown_key


def _code(error: Exception) -> str:
    """The store's own word for an error; a library's own errors by their type's name."""
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code")) if response else type(error).__name__


def _status(error: Exception) -> int:
    response = getattr(error.__cause__, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _credentials_hint(scheme: str) -> str:
    if PACKAGES.get(scheme) != "s3fs":
        return "check the credentials in the environment"
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    missing = [name for name in names if not os.environ.get(name)]
    return f"set {' and '.join(missing)}" if missing else f"check {' and '.join(names)}"


def _endpoint_hint(scheme: str) -> str:
    if PACKAGES.get(scheme) != "s3fs":
        return ""
    return "; check AWS_ENDPOINT_URL" if os.environ.get("AWS_ENDPOINT_URL") else "; AWS_ENDPOINT_URL is not set"
