"""Which control plane does meshctl talk to, and by what does it say who is typing?

--token, MESHLIB_TOKEN, or the context that was chosen in meshctl's own file, as kubectl's. A token goes to the URL that
it was given for, and never over plain HTTP to another machine.
"""

from __future__ import annotations

import functools
import inspect
import ipaddress
import os
import ssl
import stat
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import typer
import yaml

from meshlib.cli import running

USUAL_ADMIN = "http://127.0.0.1:15014"


class BadConnection(Exception):
    """The message is for the person who typed it."""


class Context(msgspec.Struct, forbid_unknown_fields=True):
    """One control plane. url: of its admin API. ca: PEM file of the root that vouches for it. token, token_file: who is
    typing; certificate and key: the same, as PEM files. Paths are relative to the file."""

    name: str
    url: str
    ca: str = ""
    token: str = ""
    token_file: str = ""
    certificate: str = ""
    key: str = ""

    def __repr__(self) -> str:
        return f"<Context {self.name} {self.url}>"


class Contexts(msgspec.Struct, forbid_unknown_fields=True):
    contexts: list[Context] = []
    current: str = ""


@dataclass(frozen=True, slots=True)
class Connection:
    """url: of the admin API. token: "" where none is shown. verify: how its certificate is judged."""

    url: str
    token: str
    verify: ssl.SSLContext | bool

    def __repr__(self) -> str:
        return f"<Connection {self.url}>"


@dataclass(slots=True)
class Typed:
    """What the options of this command say."""

    token: str = ""
    context: str = ""
    ca: str = ""


typed = Typed()


Token = Annotated[
    str,
    typer.Option(
        envvar="MESHLIB_TOKEN", metavar="TOKEN", help="Who is typing, for a control plane with access control."
    ),
]
Named = Annotated[
    str, typer.Option(envvar="MESHCTL_CONTEXT", metavar="NAME", help="Which control plane of meshctl.yaml.")
]
Root = Annotated[
    str,
    typer.Option(
        envvar="MESHCTL_CA", metavar="FILE", help="PEM file of the root that vouches for an https:// control plane."
    ),
]
SHARED = {"token": Token, "context": Named, "ca": Root}
"""The options of every command that asks the admin API."""


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the options of SHARED besides its own."""

    @functools.wraps(command)
    def asked(token: str = "", context: str = "", ca: str = "", **own: Any) -> None:
        typed.token, typed.context, typed.ca = token, context, ca
        command(**own)

    hints = typing.get_type_hints(command, include_extras=True)
    own = inspect.signature(command).parameters.values()
    parameters = [each.replace(annotation=hints[each.name]) for each in own]
    for name, kind in SHARED.items():
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default="", annotation=kind))
    asked.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    asked.__annotations__ = {**hints, **SHARED}
    return asked


def contexts_file() -> Path:
    """`$MESHCTL_CONFIG`, or `meshlib/meshctl.yaml` in the user's folder for configuration."""
    if named := os.environ.get("MESHCTL_CONFIG", ""):
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(home) if home else Path.home() / ".config") / "meshlib" / "meshctl.yaml"


def read_contexts(file: Path) -> Contexts:
    """Raises BadConnection; a file that is not there has none."""
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        found = msgspec.convert(yaml.safe_load(file.read_text("utf-8")) or {}, Contexts)
    except FileNotFoundError:
        return Contexts()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConnection(f"{file} can't be read: {error}") from None
    except yaml.YAMLError:
        raise BadConnection(f"{file} is no YAML") from None
    except msgspec.ValidationError as error:
        raise BadConnection(f"{file}: {error}") from None
    if mode & 0o077 and any(each.token for each in found.contexts):
        raise BadConnection(f"{file} holds tokens, and may be read by others ({mode:04o}): chmod 600 it first")
    return found


def chosen(url: str) -> Connection:
    """url: of --control-plane, "" when it was not given. Raises BadConnection."""
    file = contexts_file()
    context = _context(file, url)
    if not url:
        url = context.url if context is not None else ""
    announced = running.find() if not url else None
    if not url:
        url = announced.admin if announced else USUAL_ADMIN
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    folder = file.parent
    token = typed.token
    if not token and context is not None:
        token = context.token or (_text(folder / context.token_file) if context.token_file else "")
    if token and urlsplit(url).scheme != "https" and not _is_this_machine(url):
        raise BadConnection(f"{url}: a token is not sent over plain HTTP to another machine; use https://")
    return Connection(url, token, _verify(url, context, folder, announced.ca if announced else ""))


def _context(file: Path, url: str) -> Context | None:
    """The one named by --context, the one with this URL, or the current one where no URL is given."""
    if typed.context:
        found = next((each for each in read_contexts(file).contexts if each.name == typed.context), None)
        if found is None:
            raise BadConnection(f"--context {typed.context!r}: {file} has no such context")
        if url and not _same(url, found.url):
            raise BadConnection(f"--context {typed.context} is of {found.url}, and --control-plane says {url}")
        return found
    contexts = read_contexts(file)
    if url:
        return next((each for each in contexts.contexts if _same(each.url, url)), None)
    if not contexts.current:
        return None
    found = next((each for each in contexts.contexts if each.name == contexts.current), None)
    if found is None:
        raise BadConnection(f"{file}: current: there is no context {contexts.current!r}")
    return found


def _same(one: str, two: str) -> bool:
    def plain(url: str) -> tuple[str, str]:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        return parts.scheme, parts.netloc.lower()

    return plain(one) == plain(two)


def _verify(url: str, context: Context | None, folder: Path, announced: str) -> ssl.SSLContext | bool:
    """announced: PEM of the roots of the control plane that runs on this machine, as it has written them down."""
    if urlsplit(url).scheme != "https":
        return True
    ca = Path(typed.ca) if typed.ca else folder / context.ca if context is not None and context.ca else None
    try:
        made = ssl.create_default_context(
            cafile=str(ca) if ca is not None else None, cadata=announced if ca is None and announced else None
        )
        if context is not None and context.certificate:
            made.load_cert_chain(folder / context.certificate, folder / context.key if context.key else None)
    except (OSError, ssl.SSLError) as error:
        named = ca or (context.certificate if context is not None else "")
        raise BadConnection(f"{named}: {error.strerror or 'is no PEM certificate'}") from None
    return made


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConnection(f"token_file {file}: {getattr(error, 'strerror', None) or 'is no text'}") from None


def _is_this_machine(url: str) -> bool:
    host: Any = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return bool(host == "localhost")
