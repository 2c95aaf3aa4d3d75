"""Claims about `meshctl run`: Django, FastAPI and Celery as their documentation begins, without a word of a mesh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from instrumentation.test_run import RUN, environment, reviews, served
from peers import Peer, unused_port

__all__ = ["environment", "reviews"]  # fixtures

pytestmark = pytest.mark.processes

DJANGO = """
import requests
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="of a test")

def page(request):
    return HttpResponse(requests.get("http://reviews:9080/django", timeout=30).text)

urlpatterns = [path("", page)]
application = get_wsgi_application()
"""
FASTAPI = """
import httpx
from fastapi import FastAPI

app = FastAPI()

@app.get("/")
async def page() -> str:
    async with httpx.AsyncClient(timeout=30) as client:
        return (await client.get("http://reviews:9080/fastapi")).text
"""
CELERY = """
import celery, requests

app = celery.Celery("tasks", broker="memory://", backend="cache+memory://")

@app.task
def review():
    return requests.get("http://reviews:9080/celery", timeout=30).text

if __name__ == "__main__":
    from celery.contrib.testing.worker import start_worker

    with start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=30):
        print(review.delay().get(timeout=30))
"""


def test_django_behind_gunicorn_is_on_the_mesh(tmp_path: Path, environment: dict[str, str], reviews: Peer) -> None:
    """A view's call by requests goes where the mesh says, and carries the request's id."""
    (tmp_path / "site_of_a_test.py").write_text(DJANGO)
    port = unused_port()
    command = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "site_of_a_test:application"]
    with served(command, port, environment, tmp_path):
        answer = httpx.get(f"http://127.0.0.1:{port}/", headers={"x-request-id": "7"}, trust_env=False, timeout=30)
    assert (answer.status_code, answer.text) == (200, "by the mesh")
    assert [(each.target, each.header("x-request-id")) for each in reviews.received] == [("/django", "7")]


def test_fastapi_behind_uvicorn_is_on_the_mesh(tmp_path: Path, environment: dict[str, str], reviews: Peer) -> None:
    """A coroutine's call by httpx goes where the mesh says, and carries the request's id."""
    (tmp_path / "api_of_a_test.py").write_text(FASTAPI)
    port = unused_port()
    command = [sys.executable, "-m", "uvicorn", "--port", str(port), "api_of_a_test:app"]
    with served(command, port, environment, tmp_path):
        answer = httpx.get(f"http://127.0.0.1:{port}/", headers={"x-request-id": "7"}, trust_env=False, timeout=30)
    assert (answer.status_code, answer.json()) == (200, "by the mesh")
    assert [(each.target, each.header("x-request-id")) for each in reviews.received] == [("/fastapi", "7")]


def test_a_task_of_celery_is_on_the_mesh(tmp_path: Path, environment: dict[str, str], reviews: Peer) -> None:
    """A worker's call goes where the mesh says."""
    (tmp_path / "tasks.py").write_text(CELERY)
    ran = subprocess.run(
        [*RUN, "--", sys.executable, "tasks.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (ran.returncode, ran.stdout) == (0, "by the mesh\n"), ran.stderr
    assert [each.target for each in reviews.received] == ["/celery"]
