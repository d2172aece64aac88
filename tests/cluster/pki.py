"""Throw-away certificates and kubeconfigs, made with the openssl command."""

import base64
import json
import subprocess
from pathlib import Path

_DAYS = "3650"
_EC = ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")


class Authority:
    """A certificate authority whose files are ``<folder>/<name>.{crt,key}``."""

    def __init__(self, folder: Path, name: str = "ca", rsa_for: list[str] | None = None):
        """``rsa_for``: DNS names of the authority itself; its key is then RSA in PKCS#1."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.certificate, self.key = folder, folder / f"{name}.crt", folder / f"{name}.key"
        if rsa_for:
            _openssl("genrsa", "-traditional", "-out", str(self.key), "2048")
        else:
            _openssl("genpkey", "-algorithm", *_EC, "-out", str(self.key))
        _openssl(
            "req", "-x509", "-new", "-key", str(self.key), "-days", _DAYS, "-out", str(self.certificate),
            "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,digitalSignature",
            *(["-addext", "subjectAltName=" + ",".join(f"DNS:{n}" for n in rsa_for)] if rsa_for else []),
        )  # fmt: skip

    def sign(self, name: str, subject: str, *alternative: str) -> None:
        """Leaves ``<name>.crt`` and ``<name>.key``, good for a server and a client."""
        base = str(self.folder / name)
        extensions = "keyUsage=digitalSignature,keyEncipherment\nextendedKeyUsage=serverAuth,clientAuth\n"
        if alternative:
            extensions += f"subjectAltName={','.join(alternative)}\n"
        Path(f"{base}.ext").write_text(extensions)
        _openssl("req", "-newkey", *_EC, "-nodes", "-keyout", f"{base}.key", "-out", f"{base}.csr", "-subj", subject)
        _openssl(
            "x509", "-req", "-in", f"{base}.csr", "-CA", str(self.certificate), "-CAkey", str(self.key),
            "-CAcreateserial", "-days", _DAYS, "-out", f"{base}.crt", "-extfile", f"{base}.ext",
        )  # fmt: skip

    def kubeconfig(self, user: str, server: str, out: Path) -> Path:
        credentials = {
            "client-certificate-data": encoded(self.folder / f"{user}.crt"),
            "client-key-data": encoded(self.folder / f"{user}.key"),
        }
        return write_kubeconfig(out, server, encoded(self.certificate), credentials)


def service_account_keys(folder: Path) -> None:
    _openssl("genrsa", "-out", str(folder / "sa.key"), "2048")
    _openssl("rsa", "-in", str(folder / "sa.key"), "-pubout", "-out", str(folder / "sa.pub"))


def write_kubeconfig(out: Path, server: str, authority: str, credentials: dict[str, str], namespace: str = "") -> Path:
    """``authority``: the certificate in base64. JSON is YAML too."""
    context = {"cluster": "test", "user": "test"} | ({"namespace": namespace} if namespace else {})
    document = {
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority-data": authority}}],
        "users": [{"name": "test", "user": credentials}],
        "contexts": [{"name": "test", "context": context}],
    }  # fmt: skip
    out.touch(mode=0o600)
    out.write_text(json.dumps(document, indent=1))
    return out


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]} failed: {done.stderr}")
