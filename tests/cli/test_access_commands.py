"""Does meshctl say who is typing, and show who may what and who did what? Real processes, TLS, off loopback."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from certificates import TestCA, pem_of, write_identity
from cli.meshctl_processes import ControlPlaneProcess, control_plane, meshctl
from controlplane.access import POLICY, TOKENS, VIRTUAL_SERVICE, write_access
from meshlib.cli import connection
from meshlib.cli.app import app
from meshlib.cli.connection import BadConnection, chosen
from meshlib.cli.control_plane import issuer, review
from meshlib.controlplane.access_rules import token_hash

pytestmark = pytest.mark.processes
ANYWHERE = ("--admin", "0.0.0.0:0", "--xds", "127.0.0.1:0")


def here(home: Path, *words: str, stdin: str | None = None, **more: str) -> Result:
    """The same as a process would do, without the second that it takes to start."""
    empty = dict.fromkeys((*(name for name in os.environ if name.startswith(("MESHLIB_", "MESHCTL_"))),), "")
    homes = {"XDG_STATE_HOME": str(home / "state-home"), "XDG_CONFIG_HOME": str(home / "config-home")}
    return CliRunner().invoke(app, list(words), input=stdin, env={**empty, **homes, **more})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def plane(home: Path) -> Iterator[ControlPlaneProcess]:
    access = write_access(home / "access")
    with control_plane(home, *ANYWHERE, "--access", str(access), "--state", str(home / "state")) as made:
        yield made


def test_each_does_what_the_role_allows_and_the_log_says_who(home: Path, plane: ControlPlaneProcess) -> None:
    """The control plane of this machine is found with its root, by all users of it; the token says who one is."""
    assert plane.admin.startswith("https://0.0.0.0:")
    nobody = meshctl(home, "get", "all")
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert "show a token" in nobody.stderr
    wrong = here(home, "get", "all", "--token", "mat_guess")
    assert "does not know the token" in wrong.stderr
    routed, guarded = (text.replace("NAMESPACE", "default") for text in (VIRTUAL_SERVICE, POLICY))
    olaf = {"MESHLIB_TOKEN": TOKENS["olaf"]}
    applied = meshctl(home, "apply", "-f", "-", stdin=routed, **olaf)
    assert applied.stdout == "virtualservice.networking.istio.io/reviews created\n"
    denied = here(home, "apply", "-f", "-", stdin=guarded, **olaf)
    assert denied.exit_code == 1
    assert "needs the role admin in namespace default" in denied.stderr
    me = here(home, "identity", **olaf).stdout
    assert re.search(r"name: +token:olaf\n", me)
    assert "operator in default" in me
    assert re.search(r"root: +[0-9a-f]{64} \(signing", me)
    assert "needs the role admin" in here(home, "audit", **olaf).stderr
    alice = {"MESHLIB_TOKEN": TOKENS["alice"]}
    told = here(home, "audit", **alice).stdout.splitlines()
    assert [line.split("   ")[0] for line in told[:1]] == ["TIME"]
    assert "token:olaf" in told[1] and "VirtualService default/reviews" in told[1] and " ok " in told[1]
    assert "denied" in told[2] and "AuthorizationPolicy default/deny-all" in told[2]
    differences = here(home, "audit", "reviews", "--diff", "--who", "token:olaf", **alice).stdout
    assert "    +kind: VirtualService\n" in differences
    (entry,) = map(json.loads, here(home, "audit", "reviews", "-o", "json", **alice).stdout.splitlines())
    assert (entry["who"], entry["before"]) == ("token:olaf", "")
    assert "timeout: 2s" in entry["after"]
    assert entry["agent"].startswith("meshctl/")
    log = home / "state" / "audit.jsonl"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert [json.loads(line)["action"] for line in log.read_text().splitlines()][:2] == ["apply", "apply"]


def test_a_root_is_rotated_by_two_commands(home: Path, plane: ControlPlaneProcess) -> None:
    """Begun, switched to, and, once what the old one signed is over, finished; each is in the log."""
    alice = {"MESHLIB_TOKEN": TOKENS["alice"]}
    before = here(home, "ca", "bundle", **alice).stdout
    assert before.count("BEGIN CERTIFICATE") == 1
    assert "needs the role admin in all namespaces" in here(home, "ca", "rotate", MESHLIB_TOKEN=TOKENS["dora"]).stderr
    rotated = here(home, "ca", "rotate", **alice)
    assert [line.partition(":")[0] for line in rotated.stdout.splitlines()][:2] == ["begun", "switched"], rotated.stderr
    assert "switched" in here(home, "ca", "status", **alice).stdout
    assert here(home, "ca", "bundle", **alice).stdout.count("BEGIN CERTIFICATE") == 2
    waiting = here(home, "ca", "rotate", **alice)
    assert "may be valid until" in waiting.stderr
    finished = here(home, "ca", "rotate", "--force", **alice)
    assert finished.stdout.startswith("finished:")
    assert here(home, "ca", "bundle", **alice).stdout != before
    (home / "root.pem").write_text(before)
    stale = here(home, "ca", "bundle", "--ca", str(home / "root.pem"), **alice)
    assert stale.exit_code == 1
    assert "name the root that vouches for it" in stale.stderr


def test_contexts_hold_url_root_and_token(tmp_path: Path) -> None:
    """As kubeconfig does: the current one without a word, another by its name; a token goes nowhere else."""
    people = TestCA("people.example")
    more = "- {role: viewer, to: ['cn:carol'], namespaces: [default]}\ncertificates: {roots: people.pem}\n"
    (tmp_path / "access").mkdir()
    (tmp_path / "access" / "people.pem").write_bytes(people.root)
    access = write_access(tmp_path / "access", more)
    words = (*ANYWHERE, "--san", "mesh.example", "--access", str(access), "--state", str(tmp_path / "state"))
    with control_plane(tmp_path / "elsewhere", *words) as plane:
        url = plane.admin.replace("0.0.0.0", "127.0.0.1")
        folder = tmp_path / "config-home" / "meshlib"
        folder.mkdir(parents=True)
        root = here(tmp_path / "elsewhere", "ca", "bundle", MESHLIB_TOKEN=TOKENS["vera"]).stdout
        (folder / "root.pem").write_text(root)
        (folder / "vera.token").write_text(TOKENS["vera"] + "\n")
        file = folder / "meshctl.yaml"
        contexts = [
            {"name": "vera", "url": url, "ca": "root.pem", "token_file": "vera.token"},
            {"name": "alice", "url": url, "ca": "root.pem", "token": TOKENS["alice"]},
            {"name": "carol", "url": url, "ca": "root.pem", "certificate": "carol.pem", "key": "carol.key"},
        ]
        for name, content in zip(("carol.pem", "carol.key"), people.issue(common_name="carol"), strict=True):
            (folder / name).write_bytes(content)
        file.write_text(yaml.safe_dump({"current": "vera", "contexts": contexts}))
        readable = here(tmp_path, "identity")
        assert "chmod 600" in readable.stderr
        assert TOKENS["alice"] not in readable.stderr
        file.chmod(0o600)
        assert "token:vera" in here(tmp_path, "identity").stdout
        assert "token:alice" in here(tmp_path, "identity", "--context", "alice").stdout
        carol = here(tmp_path, "identity", "--context", "carol").stdout
        assert "cn:carol" in carol and "certificate" in carol
        other = here(tmp_path, "identity", "--control-plane", "http://127.0.0.1:1")
        assert "no control plane is running" in other.stderr
        missing = here(tmp_path, "identity", "--context", "nobody")
        assert "has no such context" in missing.stderr


def test_a_token_is_not_sent_in_plaintext_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of a context to another URL."""
    monkeypatch.setenv("MESHCTL_CONFIG", str(tmp_path / "meshctl.yaml"))
    contexts = {"contexts": [{"name": "a", "url": "https://a.example", "token": "mat_a"}]}
    (tmp_path / "meshctl.yaml").write_text(yaml.safe_dump(contexts))
    (tmp_path / "meshctl.yaml").chmod(0o600)
    monkeypatch.setattr(connection, "typed", connection.Typed(token="mat_b"))
    with pytest.raises(BadConnection, match="plain HTTP"):
        chosen("http://cp.example:15014")
    assert chosen("http://127.0.0.1:15014").token == "mat_b"
    monkeypatch.setattr(connection, "typed", connection.Typed())
    assert chosen("https://a.example").token == "mat_a"
    assert chosen("https://a.example:15014").token == ""
    assert "mat_a" not in repr(chosen("https://a.example"))
    monkeypatch.setattr(connection, "typed", connection.Typed(context="a"))
    with pytest.raises(BadConnection, match="--control-plane says"):
        chosen("https://b.example")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (ANYWHERE, "--admin 0.0.0.0 without --access FILE"),
        (("--xds", "0.0.0.0:0", "--no-tls"), "plaintext is for loopback only"),
        (("--ca-cert", "x.pem"), "--ca-cert, --ca-key and --root-cert together"),
        (("--jwt-issuer", "https://a.example"), "ISSUER,AUDIENCE,JWKS"),
        (("--jwt-issuer", "a,b,http://a.example/k"), "https only"),
        (("--jwt-issuer", "a,b,nowhere.json"), "neither a URL nor a file"),
        (("--token-review", "http://api.example"), "https only"),
        (("--token-review", "in-cluster"), "this is no pod"),
        (("--access", "nowhere.yaml"), "nowhere.yaml"),
        (("--audit-log", "/nowhere/audit.jsonl"), "/nowhere/audit.jsonl"),
    ],
)
def test_what_can_not_be_served_is_told_in_a_sentence(
    words: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the option's name, and exit code 1; nothing is left listening."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("meshlib.cli.control_plane.log_to_stderr", lambda level: None)  # the process's, for good
    given = {"--xds": "127.0.0.1:0", "--admin": "127.0.0.1:0"}
    more = [part for name, value in given.items() if name not in words for part in (name, value)]
    found = here(tmp_path, "control-plane", *more, *words)
    assert found.exit_code == 1
    assert found.stderr.startswith("error: ") or "\nerror: " in found.stderr, found.stderr
    assert told in found.stderr
    assert "Traceback" not in found.stderr


def test_whose_tokens_are_believed(tmp_path: Path) -> None:
    """A key set by URL or by file; Kubernetes by its API server."""
    (tmp_path / "keys.json").write_text("{}")
    found = issuer(f"https://a.example,meshlib,{tmp_path / 'keys.json'}")
    assert (found.issuer, found.audience, found.jwks) == ("https://a.example", "meshlib", str(tmp_path / "keys.json"))
    assert issuer("a,b,https://a.example/keys").jwks == "https://a.example/keys"
    assert issuer("a,b,http://127.0.0.1:80/keys").jwks == "http://127.0.0.1:80/keys"
    asked = review("https://api.example/", "mesh")
    assert (asked.api, asked.audience) == ("https://api.example", "mesh")


def test_a_ca_is_plugged_in(tmp_path: Path) -> None:
    """Its root is the mesh's; who issued it rotates it; names and trust domain are what the options say."""
    root = TestCA("corp.example")
    for name, content in (("cert", root.root), ("root", root.root), ("key", pem_of(root.key))):
        (tmp_path / f"{name}.pem").write_bytes(content)
    (tmp_path / "key.pem").chmod(0o600)
    files = {"--ca-cert": "cert.pem", "--ca-key": "key.pem", "--root-cert": "root.pem"}
    words = [part for option, name in files.items() for part in (option, str(tmp_path / name))]
    local = ("--admin", "127.0.0.1:0", "--xds", "127.0.0.1:0", "--tls", "--trust-domain", "corp.example")
    with control_plane(tmp_path, *local, *words):
        assert here(tmp_path, "ca", "bundle").stdout.strip() == root.root.decode().strip()
        assert "CA of corp.example, plugged in" in here(tmp_path, "ca", "status").stdout
        assert "have whoever issued it rotate it" in here(tmp_path, "ca", "rotate").stderr
        made = here(tmp_path, "token", "create", "--service-account", "reviews")
        assert made.stdout.startswith("mjt_")
        assert "spiffe://corp.example/ns/default/sa/reviews" in here(tmp_path, "token", "list").stdout
        me = here(tmp_path, "identity").stdout
        assert "nothing: this control plane asks nobody" in me
    (tmp_path / "key.pem").chmod(0o644)
    refused = meshctl(tmp_path, "control-plane", *local, *words)
    assert "may be read by others" in refused.stderr


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"MESHLIB_IDENTITY": "", "MESHCTL_ADMIN": ""})


def test_a_token_is_made_and_its_hash_kept(tmp_path: Path) -> None:
    """The file has no more than the hash; the access file is checked as the control plane would."""
    tokens, out = tmp_path / "tokens.yaml", tmp_path / "alice.token"
    made = run("access", "token", "alice", "--file", str(tokens), "-o", str(out), "--expires", "2099-01-01")
    assert (made.exit_code, made.output) == (0, "")
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    token = out.read_text().strip()
    assert token.startswith("mat_")
    assert token not in tokens.read_text()
    assert token_hash(token) in tokens.read_text()
    assert "already" in run("access", "token", "alice", "--file", str(tokens)).stderr
    second = run("access", "token", "bob")
    assert token_hash(second.stdout.strip()) in second.stderr
    access = tmp_path / "access.yaml"
    access.write_text("tokens: tokens.yaml\ngrants: [{role: admin, to: ['token:alice'], namespaces: ['*']}]\n")
    assert run("access", "check", str(access)).stdout == f"{access}: 1 grants, 1 tokens, 0 issuers\n"
    access.write_text("grants: [{role: king, to: ['token:alice'], namespaces: ['*']}]\n")
    assert "grants[0].role" in run("access", "check", str(access)).stderr


def test_who_is_a_process_of_this_environment(tmp_path: Path) -> None:
    """From watched files; a join token is not spent to look."""
    write_identity(tmp_path, TestCA().credentials("reviews"))
    found = CliRunner().invoke(app, ["identity", "--workload"], env={"MESHLIB_IDENTITY": f"files:{tmp_path}"})
    assert "spiffe://cluster.local/ns/default/sa/reviews" in found.stdout
    assert re.search(r"trusts: +cluster.local by root [0-9a-f]{64}", found.stdout)
    assert "PRIVATE" not in found.output
    (tmp_path / "token").write_text("mjt_1.secret.00")
    joining = {
        "MESHLIB_IDENTITY": "control-plane",
        "MESHLIB_CONTROL_PLANE": "127.0.0.1:1",
        "MESHLIB_TOKEN_FILE": str(tmp_path / "token"),
    }
    refused = CliRunner().invoke(app, ["identity", "--workload"], env=joining)
    assert "would spend it" in refused.stderr
    assert "secret" not in refused.output
