"""What happens to calls while their process forks: `python fork_scene.py CONFIG CHILDREN CALLS`, told as one JSON line.

Threads of the parent call all the time, so that locks are held and answers are on their way whenever it forks. Each
child calls with the parent's own client, by os.fork and by multiprocessing in turn, and tells how each call ended.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import multiprocessing
import os
import sys
import threading
from typing import Any

import httpx

import meshlib

HOST = "http://ledger.example.com"
STRIDE = 1_000_000
"""Numbers of one process's calls."""


def call(client: httpx.Client, number: int, method: str) -> str:
    """How it failed; "" for its own answer."""
    try:
        answer = client.request(method, HOST, headers={"x-call": str(number)})
    except httpx.HTTPError as error:
        return f"{number} {error!r}"
    return "" if answer.text == f"{number} " else f"{number} got {answer.status_code} {answer.text!r}"


def in_child(client: httpx.Client, child: int, calls: int, told: int) -> None:
    faulthandler.dump_traceback_later(60, exit=True)  # whoever waits for a lock that nobody gives back says where
    failures = [call(client, child * STRIDE + number, "POST") for number in range(1, calls + 1)]
    os.write(told, (json.dumps([each for each in failures if each]) + "\n").encode())


def main(config: str, children: int, calls: int) -> None:
    faulthandler.enable()  # the stack of a child that crashes
    failures: list[str] = []
    over, numbers = threading.Event(), itertools.count(1)
    with meshlib.connect(config) as mesh, mesh.Client(timeout=60) as client:

        def load() -> None:
            while not over.wait(0.002):
                number = next(numbers)
                failures.extend(filter(None, [call(client, number, ("GET", "POST")[number % 2])]))

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        hear, told = os.pipe()
        running: list[Any] = []
        context = multiprocessing.get_context("fork")
        for child in range(1, children + 1):
            if child % 2:
                process = context.Process(target=in_child, args=(client, child, calls, told))
                process.start()
                running.append(process)
                continue
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    in_child(client, child, calls, told)
                    code = 0
                finally:
                    os._exit(code)
            running.append(pid)
        codes = []
        for each in running:
            if isinstance(each, int):
                codes.append(os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]))
            else:
                each.join()
                codes.append(each.exitcode)
        over.set()
        for thread in threads:
            thread.join()
    os.close(told)
    with os.fdopen(hear) as lines:
        for line in lines:
            failures.extend(json.loads(line))
    print(json.dumps({"codes": codes, "failures": failures, "parent": next(numbers) - 1}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
