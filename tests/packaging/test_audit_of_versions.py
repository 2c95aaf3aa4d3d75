"""Does `make audit` fail for a known vulnerability, and say of which versions nobody told anything?"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from peers import Answer, Peer, Received

ROOT = Path(__file__).parents[2]
KNOWN = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fixed_in": ["1.1"], "withdrawn": None}
UNKNOWN_TO_PIP_AUDIT = "Dependency not found on PyPI and could not be audited"

Audit = Callable[..., int]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit_of_the_index", ROOT / "scripts" / "audit.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    """The program, told of one constraint, with pip-audit's report and an index that answers for packages alone."""

    def run(
        *reported: dict[str, object], newest: str = "1.0", known: object = (), status: int = 200, more: str = ""
    ) -> int:
        def index(received: Received) -> Answer:
            assert received.target == "/pypi/some-package/json"
            said = {"info": {"version": newest}, "vulnerabilities": known}
            return Answer(status=status, body=json.dumps(said).encode())

        constraints, report = tmp_path / "constraints.txt", tmp_path / "report.json"
        constraints.write_text("# held\nSome_Package==1.0\n" + more)
        report.write_text(json.dumps({"dependencies": list(reported)}))
        with Peer(index) as peer:
            told = [str(constraints), str(report), "--index", f"http://127.0.0.1:{peer.port}"]
            answer: int = script().main(told)
            assert script().main([*told, "--strict"]) >= answer
        return answer

    return run


def skipped(name: str = "Some_Package") -> dict[str, object]:
    return {"name": name, "skip_reason": UNKNOWN_TO_PIP_AUDIT}


def test_what_pip_audit_found_fails(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    """With its names, and with what mends it."""
    found = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["1.1", "2.0"]}
    assert audit({"name": "Some_Package", "version": "1.0", "vulns": [found]}) == 1
    said = capsys.readouterr().out
    assert "VULNERABLE: Some_Package 1.0: PYSEC-2026-1, CVE-2026-1 (fixed in 1.1, 2.0)" in said


def test_what_pip_audit_could_not_ask_is_asked_of_the_package(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    """A mirror that knows no /pypi/NAME/VERSION/json: its answer for the newest version is good for that version."""
    assert audit(skipped(), known=[KNOWN]) == 1
    assert "VULNERABLE: Some_Package 1.0: PYSEC-2026-1, CVE-2026-1 (fixed in 1.1)" in capsys.readouterr().out
    assert audit(skipped(), known=[{**KNOWN, "withdrawn": "2026-02-01T00:00:00Z"}]) == 0
    assert audit(skipped()) == 0
    assert "1 versions audited, 0 vulnerabilities, 0 versions not audited" in capsys.readouterr().out


def test_what_nobody_answers_for_is_named(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    """And is a failure under --strict alone, unless nobody answered for anything at all."""
    good = {"name": "good", "version": "2.0", "vulns": []}
    assert audit(good, skipped(), newest="1.1", known=[KNOWN], more="good==2.0\nmissing==3.0\n") == 0
    said = capsys.readouterr().out
    assert "not audited: Some_Package 1.0: " in said and "answers for its newest version alone, 1.1" in said
    assert "not audited: missing 3.0: pip-audit's report leaves it out" in said
    assert audit(skipped(), status=503) == 1
    assert "503" in capsys.readouterr().out


def test_a_report_that_is_not_there_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pip-audit writes none where it can't reach the index."""
    (tmp_path / "constraints.txt").write_text("some-package==1.0\n")
    assert script().main([str(tmp_path / "constraints.txt"), str(tmp_path / "report.json")]) == 1
    assert "pip-audit gave no report" in capsys.readouterr().err
