"""What Kubernetes takes for a name, a key or an image, exactly: neither more, which no pod could be, nor less.

As k8s.io/apimachinery (`pkg/api/validate/content`), k8s.io/kubernetes (`pkg/apis/core/validation`) and, for images,
github.com/distribution/reference have it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
_HOST_PART = r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = rf"({_HOST_PART}(\.{_HOST_PART})*|\[[a-fA-F0-9:]+\])(:[0-9]+)?"
_FOLDER = r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*"
_DIGEST = r"sha256:[a-f0-9]{64}|sha384:[a-f0-9]{96}|sha512:[a-f0-9]{128}"
_IMAGE = rf"(?P<path>{_FOLDER}(/{_FOLDER})*)(:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(@({_DIGEST}))?"
_HUB = "docker.io"

STANDARD_RESOURCES = ("cpu", "memory", "ephemeral-storage")
HUGE_PAGES = "hugepages-"
QUOTA = "requests."
"""A quota of a resource has this before the resource's name, and has to be a name too."""


@dataclass(frozen=True)
class Syntax:
    words: str
    """What it is, for whoever has written something else."""
    fits: Callable[[str], bool]


def _matches(pattern: str, longest: int) -> Callable[[str], bool]:
    known = re.compile(pattern)
    return lambda text: len(text) <= longest and known.fullmatch(text) is not None


_is_subdomain = _matches(rf"{_LABEL}(\.{_LABEL})*", 253)
_is_short_name = _matches(_NAME, 63)


def _is_qualified(text: str) -> bool:
    *prefix, name = text.split("/")
    return len(prefix) <= 1 and all(map(_is_subdomain, prefix)) and _is_short_name(name)


def _is_annotation(text: str) -> bool:
    return _is_qualified(text.lower())


def is_extended(resource: str) -> bool:
    """A device's, of which there are whole numbers."""
    native = "/" not in resource or "kubernetes.io/" in resource
    return not native and not resource.startswith(QUOTA) and _is_qualified(QUOTA + resource)


def _is_resource(text: str) -> bool:
    if not _is_qualified(text):
        return False
    if "/" not in text:
        return text in STANDARD_RESOURCES or text.startswith(HUGE_PAGES)
    return "kubernetes.io/" in text or is_extended(text)


def _is_image(text: str) -> bool:
    if re.fullmatch(r"[a-f0-9]{64}", text):
        return False  # an image's id is none of its names
    found = re.fullmatch(_IMAGE, _path_at_host(text))
    return found is not None and len(found["path"]) <= 255


def _path_at_host(image: str) -> str:
    """With tag and digest. What is no host is a folder."""
    first, slash, rest = image.partition("/")
    is_host = slash and (first == "localhost" or first != first.lower() or any(char in first for char in ".:"))
    host, path = (first, rest) if is_host and re.fullmatch(_HOST, first) else (_HUB, image)
    is_official = host in (_HUB, f"index.{_HUB}") and "/" not in path
    return f"library/{path}" if is_official else path


def _is_folder_within(text: str) -> bool:
    return not text.startswith("/") and ".." not in text.split("/")


_PARTS = "lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit"
SUBDOMAIN = Syntax(f"a name: {_PARTS}, 253 characters at most", _is_subdomain)
SHORT_SUBDOMAIN = Syntax(
    f"a name: {_PARTS}, 63 characters at most", lambda text: len(text) <= 63 and _is_subdomain(text)
)
QUALIFIED = Syntax(
    "a key: NAME or PREFIX/NAME, the name of letters, digits, '-', '_' and '.', 63 characters at most", _is_qualified
)
ANNOTATION = Syntax(QUALIFIED.words, _is_annotation)
VALUE = Syntax(
    "a label's value: letters, digits, '-', '_' and '.', beginning and ending with a letter or digit, 63 characters at most",
    lambda text: not text or _is_short_name(text),
)
RESOURCE = Syntax(
    "a resource: cpu, memory, ephemeral-storage, hugepages-SIZE or DOMAIN/NAME (nvidia.com/gpu)", _is_resource
)
IMAGE = Syntax("an image: REGISTRY/NAME:TAG, with or without @DIGEST", _is_image)
FOLDER_WITHIN = Syntax("a folder in the claim: a relative path without '..'", _is_folder_within)
