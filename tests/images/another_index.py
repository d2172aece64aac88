"""A package index that wants a password, with a torch in it that is none."""

import base64
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

USER, PASSWORD = "builder", "not-to-be-seen"
METADATA = "Metadata-Version: 2.1\nName: torch\nVersion: {}\nRequires-Dist: sympy\nRequires-Dist: filelock\n"


class Guarded(SimpleHTTPRequestHandler):
    """Files, for those who say the password."""

    def do_GET(self) -> None:
        wanted = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") == f"Basic {wanted}":
            super().do_GET()
            return
        self.send_response(401)
        self.send_header("WWW-Authenticate", "Basic")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def served(folder: Path, version: str) -> Iterator[str]:
    """The index's address while it is there. torch wants packages that the index has not."""
    name = f"torch-{version}-py3-none-any.whl"
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/index.html").write_text(f'<a href="{name}">{name}</a>')
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / "torch" / name, "w") as wheel:
        wheel.writestr("torch/__init__.py", f'__version__ = "{version}"\n')
        wheel.writestr(f"{info}/METADATA", METADATA.format(version))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
