"""Which known vulnerabilities do the tested versions have, and of which could nobody be asked?

`make audit` hands it the report of pip-audit, which asks the index for each version by itself
(/pypi/NAME/VERSION/json). Many mirrors answer only for a package as a whole (/pypi/NAME/json), and pip-audit then takes
the version for unknown. That answer names the vulnerabilities of the newest version: it is asked for here, and taken
where the newest is the one in use.

A vulnerability ends with 1; so does a report in which nobody answered for anything. What could not be asked is listed,
and ends with 1 under --strict.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 60.0  # seconds for one package: some answers have ten megabytes


class Unanswered(Exception):
    """The index says nothing about this version; the message says why."""


@dataclass(frozen=True, slots=True)
class Vulnerability:
    package: str
    version: str
    identifiers: tuple[str, ...]
    fixed_in: tuple[str, ...]

    def __str__(self) -> str:
        fixed = f"fixed in {', '.join(self.fixed_in)}" if self.fixed_in else "no version mends it"
        return f"{self.package} {self.version}: {', '.join(self.identifiers)} ({fixed})"


def ask(index: str, package: str, version: str) -> list[Vulnerability]:
    """What `index` knows of `version`, which has to be the newest of `package`."""
    try:
        with urllib.request.urlopen(f"{index}/pypi/{canonical(package)}/json", timeout=TIMEOUT) as answer:
            said = json.load(answer)
            newest, known = said["info"]["version"], said["vulnerabilities"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unanswered(f"{index}: {error}") from error
    if newest != version:
        raise Unanswered(f"{index} answers for its newest version alone, {newest}")
    return [
        Vulnerability(package, version, (each["id"], *each["aliases"]), tuple(each["fixed_in"]))
        for each in known
        if each.get("withdrawn") is None
    ]


def audit(
    report: dict[str, Any], versions: dict[str, str], index: str
) -> tuple[list[Vulnerability], list[str], list[str]]:
    """The vulnerabilities, a line for each package that someone answered for, and one for each that no one did."""
    found: list[Vulnerability] = []
    answered: list[str] = []
    unanswered: list[str] = []
    for each in report["dependencies"]:
        package: str = each["name"]
        version = versions[canonical(package)]
        if "skip_reason" not in each:
            found += [
                Vulnerability(package, version, (known["id"], *known["aliases"]), tuple(known["fix_versions"]))
                for known in each["vulns"]
            ]
            answered.append(f"{package} {version}")
            continue
        try:
            found += ask(index, package, version)
            answered.append(f"{package} {version}")
        except Unanswered as error:
            unanswered.append(f"{package} {version}: {error}")
    return found, answered, unanswered


def canonical(package: str) -> str:
    """As PEP 503 spells a name."""
    return re.sub(r"[-_.]+", "-", package).lower()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("constraints", type=Path, help="NAME==VERSION, one a line: what pip-audit was asked about")
    parser.add_argument("report", type=Path, help="what pip-audit said (--format json)")
    parser.add_argument("--index", default="https://pypi.org")
    parser.add_argument("--strict", action="store_true", help="a package that nobody answers for is a failure")
    options = parser.parse_args(arguments)
    try:
        report = json.loads(options.report.read_text())
    except (OSError, ValueError) as error:
        print(f"pip-audit gave no report, what it says is above: {error}", file=sys.stderr)
        return 1
    lines = (line.partition("==") for line in options.constraints.read_text().splitlines() if not line.startswith("#"))
    versions = {canonical(name): version for name, _, version in lines}
    found, answered, unanswered = audit(report, versions, options.index)
    left_out = sorted(versions.keys() - {canonical(each["name"]) for each in report["dependencies"]})
    unanswered += [f"{package} {versions[package]}: pip-audit's report leaves it out" for package in left_out]
    for line in unanswered:
        print(f"not audited: {line}")
    for vulnerability in found:
        print(f"VULNERABLE: {vulnerability}")
    print(f"{len(answered)} versions audited, {len(found)} vulnerabilities, {len(unanswered)} versions not audited")
    return 1 if found or not answered or (unanswered and options.strict) else 0


if __name__ == "__main__":
    sys.exit(main())
