"""Whom does the mesh trust, and how is its root replaced? The CA's routes of the admin API."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cryptography import x509
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meshlib.controlplane.admin import check_yaml, query_of
from meshlib.controlplane.admin_api import Authority, Root
from meshlib.controlplane.audit import AuditLog
from meshlib.controlplane.ca import CertificateAuthority, RotationRefused, fingerprint
from meshlib.controlplane.gate import JSON, admission_of
from meshlib.controlplane.private_files import StateError


class AuthorityRoutes:
    """late: who does not trust the present bundle yet."""

    def __init__(
        self, authority: CertificateAuthority, late: Callable[[], Sequence[str]], audit: AuditLog | None = None
    ) -> None:
        self._authority, self._late, self._audit = authority, late, audit

    def routes(self) -> list[Route]:
        return [Route("/v1/ca", self._show), Route("/v1/ca/rotate", self._rotate, methods=["POST"])]

    async def _show(self, request: Request) -> Response:
        """Roots are public; who is late is for those who see everything."""
        return JSON(self._told(admission_of(request).powers.sees("")))

    async def _rotate(self, request: Request) -> Response:
        """The gate lets nobody through but admins of all namespaces."""
        check_yaml(request)
        query = query_of(request, "step", "force")
        step = query["step"]
        if step not in ("begin", "switch", "finish"):
            raise HTTPException(400, "step is begin, switch or finish")
        force = query["force"] == "true"
        trusted = ", ".join(fingerprint(each)[:12] for each in self._authority.roots)
        self._write(request, step, note=f"trusted before: {trusted}{'; forced' if force else ''}")
        try:
            self._authority.rotate(step, self._late, force=force)
        except RotationRefused as error:
            self._write(request, step, outcome="failed", note=str(error))
            raise HTTPException(409, str(error)) from None
        except StateError as error:
            self._write(request, step, outcome="failed", note=str(error))
            raise
        return JSON(self._told(True))

    def _write(self, request: Request, step: str, **fields: str) -> None:
        if self._audit is not None:
            self._audit.write(admission_of(request).actor, f"ca {step}", object="CertificateAuthority", **fields)

    def _told(self, with_late: bool) -> Authority:
        authority = self._authority
        return Authority(
            authority.trust_domain,
            authority.stage,
            authority.is_plugged,
            tuple(_root(pem, number, authority.stage) for number, pem in enumerate(authority.roots)),
            tuple(self._late()) if with_late else (),
            authority.old_until,
        )


def _root(pem: bytes, number: int, stage: str) -> Root:
    certificate = x509.load_pem_x509_certificate(pem)
    state = "signing" if number == 0 else "next" if stage == "begun" else "old"
    return Root(
        fingerprint(pem),
        certificate.subject.rfc4514_string(),
        state,
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
        pem.decode("ascii"),
    )
