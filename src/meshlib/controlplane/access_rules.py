"""Who may do what through the admin API? Roles by namespace, from one small YAML file.

Three roles, each with what those before it have: a viewer reads; an operator steers traffic, so it applies and deletes
the kinds of OPERATED; an admin changes every object, makes join tokens and, with all namespaces, rotates the CA.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import yaml

from meshlib.controlplane.authentication import ALGORITHMS, Issuer
from meshlib.controlplane.private_files import StateError, refuse_writable

logger = logging.getLogger("meshlib.controlplane.access")

EVERYWHERE = "*"
TOKEN_PREFIX = "mat_"
LOOK_AGAIN = 1.0
"""Seconds between two looks at whether the file has changed."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
_HASH = re.compile(r"[0-9a-f]{64}")


class Role(enum.IntEnum):
    """Each may do what the ones before it may."""

    VIEWER = 1
    OPERATOR = 2
    ADMIN = 3

    def __str__(self) -> str:
        return self.name.lower()


NETWORKING, OWN, GATEWAY_API = "networking.istio.io", "meshlib.io", "gateway.networking.k8s.io"
OPERATED = frozenset(
    {
        *((NETWORKING, kind) for kind in ("VirtualService", "DestinationRule", "ServiceEntry", "WorkloadEntry")),
        (NETWORKING, "Sidecar"),
        *((OWN, kind) for kind in ("BackendTrafficPolicy", "RateLimit")),
        *((GATEWAY_API, kind) for kind in ("HTTPRoute", "GRPCRoute")),
        ("telemetry.istio.io", "Telemetry"),
    }
)
"""(group, kind) of what steers traffic. Who may call whom, what gets in, and what is a service, is an admin's."""


def role_for(group: str, kind: str) -> Role:
    """The role that a change of such an object needs."""
    return Role.OPERATOR if (group, kind) in OPERATED else Role.ADMIN


@dataclass(frozen=True, slots=True)
class Powers:
    """What somebody may do now: (role, namespaces) pairs; EVERYWHERE among the namespaces is all."""

    grants: tuple[tuple[Role, frozenset[str]], ...] = ()

    def has(self, role: Role, namespace: str = EVERYWHERE) -> bool:
        """namespace: EVERYWHERE asks for all of them at once."""
        return any(
            held >= role and (EVERYWHERE in namespaces or namespace in namespaces) for held, namespaces in self.grants
        )

    def sees(self, namespace: str) -> bool:
        """namespace: "", of what is in none, takes the right to see all."""
        return self.has(Role.VIEWER, namespace)

    def namespaces(self, role: Role) -> tuple[str, ...]:
        """Where this role, or a greater one, is held; (EVERYWHERE,) for all."""
        found = frozenset().union(*(namespaces for held, namespaces in self.grants if held >= role))
        return (EVERYWHERE,) if EVERYWHERE in found else tuple(sorted(found))

    def lack(self, role: Role, namespace: str = EVERYWHERE) -> str:
        """Why not, for people; "" for who may."""
        if self.has(role, namespace):
            return ""
        where = "all namespaces" if namespace == EVERYWHERE else f"namespace {namespace}"
        held = "; ".join(f"{each} in {', '.join(sorted(names))}" for each, names in self.grants) or "none"
        return f"needs the role {role} in {where} (yours: {held})"


EVERYTHING = Powers(((Role.ADMIN, frozenset({EVERYWHERE})),))


@dataclass(frozen=True, slots=True)
class Grant:
    role: Role
    subjects: frozenset[str]
    namespaces: frozenset[str]


@dataclass(frozen=True, slots=True)
class StaticToken:
    """expires: seconds since 1970; 0 is never."""

    name: str
    sha256: str
    expires: float = 0.0


@dataclass(frozen=True, slots=True)
class PeopleIssuer:
    """An OIDC provider. name: as grants call it. subject, groups: the claims that name a person and their groups."""

    name: str
    issuer: Issuer
    subject: str = "sub"
    groups: str = "groups"


@dataclass(frozen=True, slots=True)
class AccessRules:
    """What the file says. tokens: by their hash. roots: PEM of those who sign people's certificates."""

    grants: tuple[Grant, ...] = ()
    tokens: Mapping[str, StaticToken] = field(default_factory=dict)
    issuers: tuple[PeopleIssuer, ...] = ()
    roots: bytes = b""

    def powers(self, names: Collection[str]) -> Powers:
        """Of who is known by these names."""
        return Powers(
            tuple((each.role, each.namespaces) for each in self.grants if not each.subjects.isdisjoint(names))
        )


def token_hash(text: str) -> str:
    """Tokens are 256 random bits (`meshctl access token` makes them), so that a plain hash is enough."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# The file


class _Grant(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    to: list[str]
    namespaces: list[str]


class _Issuer(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    issuer: str
    audience: str
    jwks: str
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    subject: str = "sub"
    groups: str = "groups"


class _Certificates(msgspec.Struct, forbid_unknown_fields=True):
    roots: str


class _File(msgspec.Struct, forbid_unknown_fields=True):
    grants: list[_Grant]
    tokens: str = ""
    issuers: list[_Issuer] = []
    certificates: _Certificates | None = None


class _Token(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    sha256: str
    expires: Any = None


class _Tokens(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[_Token] = []


def read_rules(file: Path) -> AccessRules:
    """Paths in it are relative to its folder.

    Raises StateError, naming file and field, for what can't be read or understood, and for what others can write.
    """
    found = _load(file, _File)
    grants = tuple(_grant(file, number, each) for number, each in enumerate(found.grants))
    issuers = tuple(_issuer(file, number, each) for number, each in enumerate(found.issuers))
    if len({each.name for each in issuers}) < len(issuers):
        raise StateError(f"{file}: issuers: two have one name: name them apart")
    tokens = read_tokens(file.parent / found.tokens) if found.tokens else ()
    roots = _roots(file.parent / found.certificates.roots) if found.certificates is not None else b""
    rules = AccessRules(grants, {each.sha256: each for each in tokens}, issuers, roots)
    _check_subjects(file, rules)
    return rules


def read_tokens(file: Path) -> tuple[StaticToken, ...]:
    """Raises StateError."""
    made: dict[str, StaticToken] = {}
    for number, each in enumerate(_load(file, _Tokens).tokens):
        at = f"{file}: tokens[{number}]"
        if not _NAME.fullmatch(each.name):
            raise StateError(f"{at}.name: {each.name!r} is no name (letters, digits and ._@-)")
        if not _HASH.fullmatch(each.sha256):
            raise StateError(f"{at}.sha256: 64 hexadecimal digits are wanted (meshctl access token makes the entry)")
        if each.name in made:
            raise StateError(f"{at}.name: {each.name} is there twice: name them apart, or take one out")
        made[each.name] = StaticToken(each.name, each.sha256, _moment(f"{at}.expires", each.expires))
    return tuple(made.values())


def _load(file: Path, shape: Any) -> Any:
    try:
        refuse_writable(file)
        content = yaml.safe_load(file.read_text("utf-8"))
        return msgspec.convert(content if content is not None else {}, shape)
    except OSError as error:
        raise StateError(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        raise StateError(f"{file}{'' if line is None else f':{line + 1}'}: is no YAML") from None
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        raise StateError(f"{file}: {place.strip('`.') or 'the whole'}: {text}") from None


def _grant(file: Path, number: int, given: _Grant) -> Grant:
    at = f"{file}: grants[{number}]"
    try:
        role = Role[given.role.upper()]
    except KeyError:
        raise StateError(f"{at}.role: {given.role!r}: there are viewer, operator and admin") from None
    if not given.to or not given.namespaces:
        raise StateError(f"{at}: to and namespaces must name somebody and something ('*' for all namespaces)")
    for each in given.namespaces:
        if each != EVERYWHERE and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", each):
            raise StateError(f"{at}.namespaces: {each!r} is neither '*' nor a namespace")
    return Grant(role, frozenset(given.to), frozenset(given.namespaces))


def _issuer(file: Path, number: int, given: _Issuer) -> PeopleIssuer:
    at = f"{file}: issuers[{number}]"
    if not _NAME.fullmatch(given.name):
        raise StateError(f"{at}.name: {given.name!r} is no name (letters, digits and ._@-)")
    for name in ("issuer", "audience", "jwks", "subject"):
        if not getattr(given, name):
            raise StateError(f"{at}.{name}: is empty: fill it, or leave it out")
    if bad := sorted(set(given.algorithms) - set(ALGORITHMS)):
        raise StateError(f"{at}.algorithms: {bad[0]} is not allowed; there are {', '.join(ALGORITHMS)}")
    jwks = given.jwks
    if "://" in jwks:
        if not jwks.startswith("https://") and not re.match(r"http://(localhost|127\.\d+\.\d+\.\d+|\[::1\])[:/]", jwks):
            raise StateError(f"{at}.jwks: keys are fetched by https only, but from this machine")
    else:
        jwks = str(file.parent / jwks)
    issuer = Issuer(given.issuer, given.audience, jwks, given.algorithms)
    return PeopleIssuer(given.name, issuer, given.subject, given.groups)


def _check_subjects(file: Path, rules: AccessRules) -> None:
    """A grant to nobody is a misspelling; better told than missed."""
    tokens = {each.name for each in rules.tokens.values()}
    issuers = {each.name for each in rules.issuers}
    for number, grant in enumerate(rules.grants):
        for subject in sorted(grant.subjects):
            at = f"{file}: grants[{number}].to: {subject!r}"
            kind, colon, name = subject.partition(":")
            if kind == "token" and colon:
                if name not in tokens:
                    raise StateError(f"{at}: the tokens' file has no such token: meshctl access token makes one")
            elif kind in ("user", "group") and colon:
                if name.partition("/")[0] not in issuers or not name.partition("/")[2]:
                    raise StateError(f"{at}: is written {kind}:ISSUER/NAME, with the name of one of `issuers`")
            elif kind == "cn" and name:
                if not rules.roots:
                    raise StateError(f"{at}: certificates.roots says who signs the certificates of people")
            elif not subject.startswith("spiffe://"):
                raise StateError(
                    f"{at}: is none of token:NAME, user:ISSUER/NAME, group:ISSUER/NAME, cn:NAME, spiffe://..."
                )


def _moment(at: str, given: Any) -> float:
    if given is None:
        return 0.0
    try:
        found = datetime.fromisoformat(given if isinstance(given, str) else given.isoformat())
    except (ValueError, AttributeError):
        raise StateError(f"{at}: {given!r} is no date: write 2027-01-31") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _roots(file: Path) -> bytes:
    from cryptography import x509

    try:
        refuse_writable(file)
        content = file.read_bytes()
        x509.load_pem_x509_certificates(content)
        return content
    except OSError as error:
        raise StateError(f"{file}: {error.strerror}") from None
    except ValueError:
        raise StateError(f"{file}: has no PEM certificates: -----BEGIN CERTIFICATE----- is how they begin") from None


class AccessFile:
    """The rules as the file says them now; it is looked at again as it is asked. A bad edit is told, and the last good
    rules stay. Raises StateError at the first reading."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self._clock = file, clock
        self._rules, self._seen = read_rules(file), self._signature()
        self._looked = clock()
        self.problem = ""

    def rules(self) -> AccessRules:
        now = self._clock()
        if now - self._looked >= LOOK_AGAIN:
            self._looked = now
            seen = self._signature()
            if seen != self._seen:
                self._seen = seen
                try:
                    self._rules = read_rules(self.file)
                    self.problem = ""
                    logger.info("%s was read again", self.file)
                except StateError as error:
                    self.problem = str(error)
                    logger.error("the rules of before stay in force: %s", error)
        return self._rules

    def _signature(self) -> tuple[object, ...]:
        """Of the file and those that it names."""
        try:
            named = _load(self.file, _File)
            paths = [self.file, *([self.file.parent / named.tokens] if named.tokens else ())]
            if named.certificates is not None:
                paths.append(self.file.parent / named.certificates.roots)
        except StateError:
            paths = [self.file]
        return tuple(map(_stat, paths))

    def __repr__(self) -> str:
        return f"<AccessFile {self.file} {len(self._rules.grants)} grants>"


def _stat(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode)
