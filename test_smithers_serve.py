"""The specification of smithers_serve as tests: real sockets, real processes, real databases.

python3 -m unittest                      every test, nothing to install
python3 test_smithers_serve.py bench     measure (also: crash N, fuzz SECONDS)
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import io
import json
import logging
import multiprocessing
import os
import platform
import queue
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.parse
import warnings
import wsgiref.simple_server
import wsgiref.util
import wsgiref.validate
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from email.message import Message
from typing import Any, Callable, NamedTuple
from unittest import mock

import smithers_serve as ss
from smithers_serve import Approval, Ctx, Loop, Parallel, Sequence, Task, Workflow, current_task

SELF = os.path.abspath(__file__)
HERE = os.path.dirname(SELF)
LOOPBACK = "127.0.0.1"
RUN = "run-1"
PATIENCE = 20.0  # seconds until a wait counts as a failure; no test is meant to come near

# What a failing task raises goes to the log with its traceback; a test that wants it asks for it.
ss.logger.addHandler(logging.NullHandler())
ss.logger.propagate = False

# ---------------------------------------------------------------------------
# Helpers: what tasks do
# ---------------------------------------------------------------------------

GO = threading.Event()  # what `wait_for_go` waits for: set by the script, cleared before each test


def answer() -> int:
    return 42


def fail() -> None:
    raise ValueError("no luck")


def fail_until_go() -> None:
    if not GO.is_set():
        raise ValueError("no luck")


def fail_once() -> str:
    if current_task().attempt == 0:
        raise ValueError("no luck")
    return "ran"


def turn() -> int:
    return current_task().iteration


def wait_for_go() -> bool:
    return GO.wait(PATIENCE)


def wait_for_stop() -> None:
    current_task().log("up")
    if not current_task().cancelled.wait(PATIENCE):
        raise AssertionError("never told to stop")


def wait_once() -> None:
    """Wait in the first attempt, until it is stopped."""
    if current_task().attempt == 0:
        current_task().cancelled.wait(PATIENCE)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("mute")


def fail_mutely() -> None:
    raise Mute


def tasks(ids: str, run: Any = answer, **options: Any) -> list[Task]:
    return [Task(id, run, **options) for id in ids.split()]


def in_turn(ids: str) -> str:
    """Return what a run tells whose nodes start and finish one after the other."""
    return ", ".join(
        f"Node{what} {id} 0 0" for id in ids.split() for what in ("Started", "Finished")
    )


def loop(*children: Any, turns: int = 2, id: str = "l", **options: Any) -> Loop:
    return Loop(*children, id=id, max_iterations=turns, **{"until": False, **options})


def as_workflow(tree: Any) -> Any:
    """Return a workflow of an element or of a list of them; others as they are."""
    if isinstance(tree, Workflow) or callable(tree):
        return tree
    return Workflow("test", *(tree if isinstance(tree, (list, tuple)) else [tree]))


def release(ctx: Ctx) -> Workflow:
    """A task, a gate and a task: the run that most tests of the server look at."""
    return Workflow(
        "release",
        Task("build", {"artifact": "app-1.0"}),
        Approval("deploy", title="Deploy?"),
        Task("announce", {"sent": True}),
    )


# ---------------------------------------------------------------------------
# Helpers: a run in this process
# ---------------------------------------------------------------------------

# The fields of every event between `type, runId` and `timestampMs`; a `?` marks optional ones.
EVENT_FIELDS = {
    "RunStarted": "",
    "RunStatusChanged": "status",
    "RunFinished": "",
    "RunFailed": "error",
    "RunCancelled": "by? reason?",
    "FrameCommitted": "frameNo xmlHash",
    "NodePending": "nodeId iteration",
    "NodeStarted": "nodeId iteration attempt",
    "NodeFinished": "nodeId iteration attempt",
    "NodeFailed": "nodeId iteration attempt error",
    "NodeRetrying": "nodeId iteration attempt dueAtMs",
    "NodeCancelled": "nodeId iteration attempt? reason",
    "NodeSkipped": "nodeId iteration",
    "ApprovalRequested": "nodeId iteration",
    "NodeWaitingApproval": "nodeId iteration",
    "ApprovalGranted": "nodeId iteration note? decidedBy?",
    "ApprovalDenied": "nodeId iteration note? decidedBy?",
    "NodeOutput": "nodeId iteration attempt text stream",
}
LAST_EVENTS = {"finished": "RunFinished", "failed": "RunFailed", "cancelled": "RunCancelled"}


def words_of(event: ss.Event) -> str:
    """Return an event as `Type value value`, an error as its code or name, without times."""
    values = [v for name, v in event.payload.items() if not name.endswith("AtMs")]
    shown = [v.get("code", v["name"]) if isinstance(v, dict) else str(v) for v in values[2:-1]]
    return " ".join([event.type, *shown])


def eventually(holds: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Return once `holds`: for what only another thread or process can bring about."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError("it did not come to hold")
        pause.wait(0.005)


class Live:
    """A run in a thread of its own, and the events it has told of so far."""

    def __init__(self, workflow: Any, adapter: ss.SmithersDb, run_id: str, **options: Any) -> None:
        self._arrived = threading.Condition()
        self._seen: list[ss.Event] = []
        self._outcome: Any = None
        options.update(adapter=adapter, run_id=run_id, on_event=self.see)
        self._thread = threading.Thread(target=self._run, args=(workflow, options), daemon=True)
        self._thread.start()

    def _run(self, workflow: Any, options: dict[str, Any]) -> None:
        try:
            outcome: Any = ss.run_workflow(as_workflow(workflow), **options)
        except BaseException as error:
            outcome = error
        with self._arrived:
            self._outcome = outcome
            self._arrived.notify_all()

    def see(self, event: ss.Event) -> None:
        with self._arrived:
            self._seen.append(event)
            self._arrived.notify_all()

    def wait(self, words: str) -> None:
        """Wait until an event that begins with these words is committed."""
        number = 0
        with self._arrived:
            while True:
                for event in self._seen[number:]:
                    if f"{words_of(event)} ".startswith(f"{words} "):
                        return
                number = len(self._seen)
                if self._outcome is not None or not self._arrived.wait(PATIENCE):
                    raise AssertionError(f"no {words} before {self._outcome!r}")

    def is_running(self, seconds: float = 0) -> bool:
        with self._arrived:
            return not self._arrived.wait_for(lambda: self._outcome is not None, seconds)

    def end(self) -> ss.RunResult:
        """Return the run's result, or raise what it raised."""
        if self.is_running(PATIENCE):
            raise AssertionError("the run does not end")
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


class Writer(Live):
    """A run of one task that logs what it is told to, and knows when it did."""

    def __init__(self, adapter: ss.SmithersDb, run_id: str = RUN) -> None:
        self._orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._newest = -1
        super().__init__(Task("task", self._log), adapter, run_id)
        self.wait("NodeStarted task")

    def _log(self) -> None:
        for text in iter(self._orders.get, None):
            current_task().log(text)

    def see(self, event: ss.Event) -> None:
        self._newest = event.seq  # lines are counted, not kept
        with self._arrived:
            self._arrived.notify_all()
        if event.type != "NodeOutput":
            super().see(event)

    def newest(self) -> int:
        return self._newest

    def emit(
        self, count: int, interval: float = 0.0, at_once: int = 1, text: str = "a line of output"
    ) -> dict[int, int]:
        """Log lines; return the seq of the last one of every time and when, in ns, it was told."""
        told, seqs, first = [], [], self.newest() + 1
        due = time.perf_counter()
        for start in range(0, count, at_once):
            lines = min(at_once, count - start)
            told.append(time.monotonic_ns())
            seqs.append(first + start + lines - 1)
            self._orders.put("\n".join([text] * lines))
            due += interval
            time.sleep(max(0.0, due - time.perf_counter()))
        with self._arrived:
            assert self._arrived.wait_for(lambda: self.newest() >= seqs[-1], 3 * PATIENCE)
        return dict(zip(seqs, told))

    def finish(self) -> int:
        """End the run and return its last seq."""
        self._orders.put(None)
        self.end()
        return self.newest()


class Row(NamedTuple):
    """A scenario: a tree, what is done to its run, and what the run tells.

    Every order of `script` is `Type node ...`, an event to wait for, or `approve node`, `deny
    node`, `cancel`, `go` (see GO), `end`, which waits for it, or `retry`, which then starts the
    run again.
    `tells` are the events of the types that it names: `Type node ..., node ..., no Type`; `states`
    is `node state` of every node; `outputs` are those of some.
    """

    tree: Any
    script: str = ""
    ends: str = "finished"
    tells: str = ""
    states: str = ""
    outputs: dict[str, Any] = {}
    options: dict[str, Any] = {}


def listed(text: str, mark: str = ", ") -> list[str]:
    return [part.strip() for part in text.split(mark) if part.strip()]


class RunCase(unittest.TestCase):
    """A folder and a database per test; afterwards every run in it must be consistent.

    Every row of a class's ROWS is a test of its own, named by its key.
    """

    maxDiff = None
    ROWS: dict[str, Row] = {}

    def __init_subclass__(cls) -> None:
        for name, row in cls.__dict__.get("ROWS", {}).items():

            def test(self: RunCase, row: Row = row) -> None:
                self.play(*row)

            setattr(cls, "test_" + name.replace(" ", "_"), test)

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="smithers-test-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.path = self.in_folder("smithers.db")
        self.db = self.adapter()
        GO.clear()
        self.addCleanup(GO.set)

    def tearDown(self) -> None:
        self.check_database(self.db)

    def check_database(self, db: ss.SmithersDb) -> None:
        for run in db.list_runs((*ss.ACTIVE_STATUSES, *ss.TERMINAL_STATUSES)):
            self.check_log(db, run)
            self.check_rows(db, run)

    def check_log(self, db: ss.SmithersDb, run: ss.Run) -> None:
        """The log has no gap, every event its documented keys, and the end is told once."""
        log = db.list_events(run.run_id)
        self.assertEqual([event.seq for event in log], list(range(len(log))))
        for event in log:
            keys = list(event.payload)
            fields = EVENT_FIELDS[event.type].split()
            expected = [f.rstrip("?") for f in fields if "?" not in f or f.rstrip("?") in keys]
            self.assertEqual(keys, ["type", "runId", *expected, "timestampMs"])
        if run.is_terminal:
            self.assertEqual(log[-1].type, LAST_EVENTS[run.status])

    def check_rows(self, db: ss.SmithersDb, run: ss.Run) -> None:
        """Of a run that has ended nothing is open; of no node two attempts are."""
        attempts = db.list_attempts(run.run_id)
        busy = [(a.node_id, a.iteration) for a in attempts if a.state == "in-progress"]
        self.assertEqual(len(busy), len(set(busy)))
        done = [(a.node_id, a.iteration) for a in attempts if a.state == "finished"]
        self.assertEqual(len(done), len(set(done)), "finished work ran again")
        if run.is_terminal:
            states = {node.state for node in db.list_nodes(run.run_id)}
            self.assertFalse(states & {"in-progress", "waiting-approval"})
            self.assertFalse(busy)
            self.assertNotIn("requested", [g.status for g in db.list_gates(run.run_id)])
            self.assertIsNone(run.runtime_owner_id)
        if run.status == "finished":
            self.assertEqual((run.error_json, run.cancel_requested_at_ms), (None, None))

    def in_folder(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def write(self, name: str, text: str) -> str:
        with open(self.in_folder(name), "w", encoding="utf-8") as file:
            file.write(text)
        return file.name

    def adapter(self) -> ss.SmithersDb:
        """Return one more adapter on the file, as another process would have."""
        db = ss.SmithersDb(self.path)
        self.addCleanup(db.close)
        return db

    def start(
        self, tree: Any, run_id: str = "r", adapter: ss.SmithersDb | None = None, **options: Any
    ) -> Live:
        return Live(tree, adapter or self.db, run_id, **options)

    def drive(self, tree: Any, run_id: str = "r", **options: Any) -> ss.RunResult:
        """Run a workflow, or elements, to its end."""
        return self.start(tree, run_id, **options).end()

    def play(self, *row: Any, run_id: str = "r", **fields: Any) -> ss.RunResult:
        """Carry out a row: see Row."""
        tree, script, ends, tells, states, outputs, options = Row(*row, **fields)
        live = self.start(tree, run_id, **options)
        for order in listed(script, ";"):
            word, *rest = order.split(" ")
            if word in ("approve", "deny"):
                fields = {"iteration": int(rest[1])} if rest[1:] else {}
                verdict = {"approve": "approved", "deny": "denied"}[word]
                self.decide(verdict, rest[0], run_id, **fields)
            elif word == "cancel":
                self.cancel(run_id)
            elif word == "go":
                GO.set()
            elif word == "end":
                live.end()
            elif word == "retry":
                live.end()
                live = self.start(tree, run_id, retry=True, **options)
            else:
                live.wait(order)
        result = live.end()
        self.assertEqual(result.status, ends, result.error)
        self.assertEqual(self.status(run_id), ends)
        self.check_told(tells, run_id)
        if states:
            pairs = [tuple(pair.split()) for pair in listed(states)]
            self.assertEqual(self.states(run_id), dict(pairs))
        found = {node_id: self.output(node_id, None, run_id) for node_id in outputs}
        self.assertEqual(found, outputs)
        return result

    def check_told(self, tells: str, run_id: str) -> None:
        expected, types, type = [], set(), ""
        for words in listed(tells):
            if words[0].isupper():
                type = words.split(" ")[0]
            elif words.startswith("no "):
                type = words[3:]
            types.add(type)
            if not words.startswith("no "):
                expected.append(words if words[0].isupper() else f"{type} {words}")
        if types:
            self.assertEqual(self.told(*types, run_id=run_id), expected)

    def decide(self, verdict: str, node_id: str = "gate", run_id: str = "r", **fields: Any) -> None:
        """Decide a gate from another adapter."""
        ss.decide(self.adapter(), run_id, node_id, ss.Decision(verdict, **fields))

    def cancel(self, run_id: str = "r", adapter: ss.SmithersDb | None = None) -> None:
        ss.cancel_run(adapter or self.db, run_id)

    def told(self, *types: str, run_id: str = "r") -> list[str]:
        """Return the events of these types, or of all, in words."""
        log = self.db.list_events(run_id)
        return [words_of(event) for event in log if event.type in types or not types]

    def starts(self) -> str:
        """Return the ids of the nodes whose attempts began, in order."""
        return " ".join(words.split()[1] for words in self.told("NodeStarted"))

    def attempts(self, run_id: str = "r") -> str:
        found = self.db.list_attempts(run_id)
        return ", ".join(f"{a.node_id} {a.attempt} {a.state}" for a in found)

    def output(self, node_id: str, iteration: int | None = None, run_id: str = "r") -> Any:
        found = self.db.find_output(run_id, node_id, iteration)
        return None if found is None else json.loads(found)

    def states(self, run_id: str = "r") -> dict[str, str]:
        """Return the state of each node in its newest iteration."""
        return {node.node_id: node.state for node in self.db.list_nodes(run_id)}

    def error_of(self, node_id: str, run_id: str = "r") -> dict[str, Any]:
        """Return the error of the node's last NodeFailed."""
        failed = [e.payload for e in self.db.list_events(run_id) if e.type == "NodeFailed"]
        return [event["error"] for event in failed if event["nodeId"] == node_id][-1]

    def gate(self, run_id: str = "r") -> ss.Gate:
        return self.db.list_gates(run_id)[0]

    def run_row(self, run_id: str = "r") -> ss.Run:
        run = self.db.get_run(run_id)
        assert run is not None
        return run

    def status(self, run_id: str = "r") -> str:
        return self.run_row(run_id).status


# ---------------------------------------------------------------------------
# Helpers: a process
# ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def compiled_folder() -> str:
    """Return a folder in which the module is compiled once for all child processes."""
    folder = tempfile.mkdtemp(prefix="smithers-pycache-")
    atexit.register(shutil.rmtree, folder, True)
    return folder


def child_environment(**extra: str) -> dict[str, str]:
    """Return the environment of every child: this module importable and compiled once, no token."""
    dropped = ("SMITHERS_API_KEY", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))
    compiled = os.environ.get("PYTHONPYCACHEPREFIX") or compiled_folder()
    return {**kept, "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": compiled, **extra}


class Child:
    """A process of Python: the lines of its stderr as they come, its stdout on demand."""

    def __init__(
        self,
        *argv: object,
        folder: str | None = None,
        limit: str = "",
        python: str = sys.executable,
        **env: str,
    ) -> None:
        command = [python, *map(str, argv)]
        self.started_at = time.perf_counter()
        self.process = subprocess.Popen(
            ["sh", "-c", f'{limit}; exec "$@"', "sh", *command] if limit else command,
            cwd=folder,
            env=child_environment(**env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.pid = self.process.pid
        self.lines: list[str] = []
        self.has_hung_up = False
        self._arrived = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _read(self, stderr: Iterable[str]) -> None:
        for line in stderr:
            with self._arrived:
                self.lines.append(line)
                self._arrived.notify_all()
        with self._arrived:
            self.has_hung_up = True
            self._arrived.notify_all()

    def text(self) -> str:
        return "".join(self.lines)

    def wait_until(self, holds: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Wait for something about `lines`; return it, or what is false when it does not come."""
        with self._arrived:
            self._arrived.wait_for(lambda: holds() or self.has_hung_up, seconds)
            return holds()

    def wait_for(self, pattern: str) -> str:
        """Return the first group of the first line of stderr that matches."""

        def find() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        found: re.Match[str] | None = self.wait_until(find)
        if found is None:
            raise RuntimeError(f"no line {pattern!r} in {self.text()}")
        return found[1] if found.re.groups else found[0]

    @property
    def port(self) -> int:
        """The port of the server that it says it has."""
        return int(self.wait_for(r"listening on https?://[^ ]*:(\d+)"))

    def wait_for_status(self, status: str) -> None:
        eventually(lambda: ask(self.port, "GET", "/").body["status"] == status, 30.0)

    def read(self) -> Any:
        """Return the JSON of the next line of stdout."""
        line = self.stdout.readline()
        if not line:
            raise RuntimeError(f"a child process has died: {self.text()}")
        return json.loads(line)

    def ask(self, *order: object) -> Any:
        """Give an order, a line of JSON, and return the answer."""
        self.stdin.write(json.dumps(order) + "\n")
        self.stdin.flush()
        return self.read()

    def finish(self, number: int | None = None, said: str = "") -> tuple[int, str]:
        """Send a signal or a text, if any, and return (exit code, stdout) at the end."""
        if number is not None:
            self.process.send_signal(number)
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(said)
            self.stdin.close()
        out = self.stdout.read()
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code, out

    def close(self) -> None:
        """End the process: by the end of its input, by SIGTERM, by SIGKILL."""
        with contextlib.suppress(OSError):
            self.stdin.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(8.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        self.stdout.close()
        self.process.stderr.close()  # type: ignore[union-attr]


def run_child(*argv: object, said: str = "", **options: Any) -> tuple[int, str, str]:
    """Run a process to its end and return (exit code, stdout, stderr)."""
    with Child(*argv, **options) as child:
        code, out = child.finish(said=said)
        return code, out, child.text()


def serve_child(folder: str, source: str, *flags: str, **options: Any) -> Child:
    """Start `up --serve` of a workflow with this source, on a free port."""
    file = os.path.join(folder, "served_flow.py")
    with open(file, "w", encoding="utf-8") as out:
        out.write(source)
    argv = ["-m", "smithers_serve", "up", file, "--serve", "--port", "0", "--run-id", RUN]
    return Child(*argv, *flags, folder=folder, **options)


# ---------------------------------------------------------------------------
# Helpers: a question, a stream, a server
# ---------------------------------------------------------------------------


class Reply(NamedTuple):
    """An answer: `body` is JSON where it says so, or else text."""

    status: int
    headers: dict[str, str]
    body: Any


def bearer(token: str = "tok") -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def read_body(headers: dict[str, str], body: bytes) -> Any:
    is_json = headers.get("content-type") == "application/json" and body
    return json.loads(body) if is_json else body.decode()


def ask(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    context: ssl.SSLContext | None = None,
) -> Reply:
    """Ask one question on a connection of its own; `body` is bytes, or JSON to send."""
    client = (
        http.client.HTTPConnection(LOOPBACK, port, timeout=PATIENCE)
        if context is None
        else http.client.HTTPSConnection(LOOPBACK, port, timeout=PATIENCE, context=context)
    )
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    with contextlib.closing(client):
        client.request(method, path, data, headers or {})
        response = client.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, fields, read_body(fields, response.read()))


def connect(port: int, *pieces: bytes) -> socket.socket:
    """Return a connection over which these bytes were sent, piece by piece."""
    sock = socket.create_connection((LOOPBACK, port), PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # refused and closed before all was sent
        for piece in pieces:
            sock.sendall(piece)
    return sock


def receive(sock: socket.socket) -> bytes:
    """Return all that comes until the other side closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        for data in iter(lambda: sock.recv(65536), b""):
            received += data
    return received


def send(port: int, *pieces: bytes, end: bool = True) -> bytes:
    """Send raw bytes and return all that comes back; `end` closes our side before."""
    with connect(port, *pieces) as sock:
        with contextlib.suppress(OSError):
            if end:
                sock.shutdown(socket.SHUT_WR)
        return receive(sock)


def split(raw: bytes) -> list[Reply]:
    """Return the answers in raw bytes."""
    replies = []
    while raw:
        head, separator, raw = raw.partition(b"\r\n\r\n")
        assert separator, f"no end of head in {head!r}"
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines)
        length = int(fields.get("content-length", "0"))
        replies.append(Reply(int(first.split(" ")[1]), fields, read_body(fields, raw[:length])))
        raw = raw[length:]
    return replies


def statuses(raw: bytes) -> list[int]:
    return [reply.status for reply in split(raw)]


class EventReader:
    """Reads an event stream block by block, and checks its framing on the way."""

    def __init__(
        self,
        port: int,
        path: str = "/events",
        headers: dict[str, str] | None = None,
        version: str = "1.1",
        buffer_bytes: int | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.socket = socket.socket()
        if buffer_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.socket.settimeout(PATIENCE)
        self.socket.connect((LOOPBACK, port))
        if context is not None:
            self.socket = context.wrap_socket(self.socket)
        fields = {"Host": "localhost", **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.socket.sendall(f"GET {path} HTTP/{version}\r\n{lines}\r\n".encode("ascii"))
        self.raw = b""  # received, but not yet taken out of its chunks
        first, *rest = self._until(b"\r\n\r\n").decode("ascii").split("\r\n")
        self.status = int(first.split(" ")[1])
        self.headers = {n.lower(): value for n, _, value in (x.partition(": ") for x in rest)}
        self._is_chunked = self.headers.get("transfer-encoding") == "chunked"
        self._text = b""
        self.has_ended = False  # by the last chunk, or by the close where there are no chunks
        self.last, self.is_in_order = -1, True  # for one who scans many streams at once

    def __enter__(self) -> EventReader:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Leave without a farewell."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def _more(self) -> bool:
        data = self.socket.recv(262144)
        self.raw += data
        return bool(data)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.raw:
            assert self._more(), f"no {mark!r} in {self.raw!r}"
        found, _, self.raw = self.raw.partition(mark)
        return found

    def _chunk(self) -> bytes:
        """Return the next chunk, or what has come where there are none; b"" at the end."""
        if not self._is_chunked:
            if not self.raw:
                self._more()
            data, self.raw = self.raw, b""
            return data
        size = int(self._until(b"\r\n"), 16)
        while len(self.raw) < size + 2:
            assert self._more(), "the stream ends within a chunk"
        data, end, self.raw = self.raw[:size], self.raw[size : size + 2], self.raw[size + 2 :]
        assert end == b"\r\n"
        return data

    def block(self) -> str:
        """Return the next block without its empty line, "" at the end."""
        while b"\n\n" not in self._text:
            data = self._chunk()
            self._text += data
            if not data:
                self.has_ended = True
                assert not self._text
                return ""
        block, _, self._text = self._text.partition(b"\n\n")
        return block.decode("utf-8")

    def event(self) -> tuple[int, dict[str, Any]] | None:
        """Return (id, payload) of the next event, None at the end; other blocks are passed over."""
        for block in iter(self.block, ""):
            if block.startswith("event: "):
                name, data, number = block.split("\n")
                assert name == "event: smithers" and number.startswith("id: ")
                return int(number[4:]), json.loads(data[6:])
        return None

    def until(self, mark: str | int) -> int:
        """Read up to the event of this type or seq and return its seq."""
        for seq, payload in iter(self.event, None):
            if mark in (seq, payload["type"]):
                return seq
        raise AssertionError(f"the stream has ended without {mark}")

    def rest(self) -> list[int]:
        """Return the seqs of all events to the end of the stream."""
        return [seq for seq, _ in iter(self.event, None)]


def sse_of(events: Seq[ss.Event]) -> str:
    """Return the stream's whole text for these events."""
    return "retry: 1000\n\n" + "".join(
        f"event: smithers\ndata: {e.payload_json}\nid: {e.seq}\n\n" for e in events
    )


def rows(path: str) -> dict[str, list[Any]]:
    """Return everything in a database but heartbeats."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        names = [r[0] for r in db.execute("select name from sqlite_master where type = 'table'")]
        found = {name: [dict(r) for r in db.execute(f"select * from {name}")] for name in names}
    for run in found["_smithers_runs"]:
        del run["heartbeat_at_ms"]
    return found


def change(path: str, *statements: str) -> None:
    """Change a database as another program would."""
    with contextlib.closing(sqlite3.connect(path, timeout=PATIENCE)) as db, db:
        for statement in statements:
            db.execute(statement)


class RunServer:
    """A real server on a free port for one run, which an engine in a thread may drive."""

    def __init__(
        self,
        db: ss.SmithersDb,
        run_id: str = RUN,
        token: str | None = None,
        metrics: bool = True,
        host: str = LOOPBACK,
        **options: Any,
    ) -> None:
        self.db, self.path, self.run_id = db, db.path, run_id
        self.abort = threading.Event()
        self.app = ss.create_serve_app(
            adapter=db, run_id=run_id, abort=self.abort, auth_token=token, metrics=metrics
        )
        self.server = ss.make_server(self.app, host, 0, **options)
        self.port = self.server.server_port
        self.is_stopped = False
        self._runs: list[Live] = []
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def run_to_gate(self, workflow: Any = release, **options: Any) -> int:
        """Run until only gates are left, without an engine that goes on; return the last seq."""
        options.update(adapter=self.db, run_id=self.run_id, park=False)
        ss.run_workflow(as_workflow(workflow), **options)
        return self.newest()

    def start(self, workflow: Any = release, until: str = "") -> Live:
        """Drive the run in a thread; return once it has come to an event, where one is named."""
        self._runs.append(Live(workflow, self.db, self.run_id, abort=self.abort))
        if until:
            self._runs[-1].wait(until)
        return self._runs[-1]

    def write(self) -> Writer:
        """Start a run that logs what it is told to."""
        self._runs.append(writer := Writer(self.db, self.run_id))
        return writer

    def newest(self) -> int:
        return self.events()[-1].seq

    def stop(self) -> None:
        if not self.is_stopped:
            self.is_stopped = True
            self.server.stop()

    def close(self) -> None:
        self.abort.set()
        for run in self._runs:
            if isinstance(run, Writer):
                run.finish()
            run.is_running(PATIENCE)
        self.stop()
        self._thread.join(PATIENCE)
        self.app.close()

    def ask(self, method: str, path: str, *body_and_headers: Any) -> Reply:
        return ask(self.port, method, path, *body_and_headers)

    def listen(self, path: str = "/events", **options: Any) -> EventReader:
        return EventReader(self.port, path, **options)

    def events(self, after_seq: int = -1) -> list[ss.Event]:
        return self.db.list_events(self.run_id, after_seq)

    def status(self) -> Any:
        return self.ask("GET", "/").body["status"]

    def metrics(self) -> dict[str, str]:
        """Return the samples of /metrics by name and labels, asked for without a connection."""
        headers = {"Host": "localhost", **bearer()}
        text = self.app.request("GET", "/metrics", headers=headers).body.decode()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {
            name.replace("smithers_", "", 1): value
            for name, value in (line.rsplit(" ", 1) for line in lines)
        }

    def streams(self) -> str:
        return self.metrics()["event_streams_active"]


class ServerCase(RunCase):
    """Tests of a server; `self.served` has a run that waits at its gate `deploy`, no engine."""

    token: str | None = None

    def setUp(self) -> None:
        super().setUp()
        self.served = self.serve(token=self.token)
        self.served.run_to_gate()

    def serve(self, run_id: str = RUN, db: Any = None, **options: Any) -> RunServer:
        """Serve a run of this test's database, to the end of the test."""
        served = RunServer(db or self.db, run_id, **options)
        self.addCleanup(served.close)
        return served

    def fresh(self, **options: Any) -> RunServer:
        """Serve a run that has not begun."""
        self.count = getattr(self, "count", 0) + 1
        return self.serve(f"fresh-{self.count}", **options)

    def at_gate(self, **options: Any) -> RunServer:
        """Serve one more run that waits at its gate."""
        served = self.fresh(**options)
        served.run_to_gate()
        return served

    def foreign_database(self) -> ss.SmithersDb:
        """Return a database of this test that is not checked: the test breaks it."""
        db = ss.SmithersDb(self.in_folder("foreign.db"))
        self.addCleanup(db.close)
        return db

    def assert_error(self, reply: Reply, status: int, code: str, says: str = "") -> None:
        self.assertEqual((reply.status, list(reply.body)), (status, ["error"]))
        self.assertEqual(list(reply.body["error"]), ["code", "message"])
        self.assertEqual(reply.body["error"]["code"], code)
        self.assertIn(says, reply.body["error"]["message"])
        self.assertEqual(reply.headers["content-type"], "application/json")

    def assert_refused(
        self, status: int, code: str, says: str, method: str, path: str, body: Any = None
    ) -> None:
        """Assert the answer of a request, and that it changed nothing."""
        before = rows(self.path)
        with self.subTest(path=path, body=str(body)[:60]):
            self.assert_error(self.served.ask(method, path, body), status, code, says)
            self.assertEqual(rows(self.path), before)

    def assert_ask(self, expected: int, *question: Any) -> Reply:
        """Assert the status of an answer, and return it."""
        reply = self.served.ask(*question)
        self.assertEqual(reply.status, expected, question)
        return reply


# ---------------------------------------------------------------------------
# Authoring
# ---------------------------------------------------------------------------


class AuthoringTest(RunCase):
    def refuse(self, code: str, named: str, build: Callable[..., Any], *values: Any) -> None:
        """Run a workflow with a mistake, or one for each value.

        It fails with `code`, names the id, and nothing runs.
        """
        for arguments in [(value,) for value in values] or [()]:
            self.count = getattr(self, "count", 0) + 1
            run_id = f"r{self.count}"
            with self.subTest(code=code, named=named, number=self.count, arguments=arguments):
                result = self.drive(lambda ctx, a=arguments: as_workflow(build(*a)), run_id)
                self.assertEqual(result.status, "failed")
                assert result.error is not None
                self.assertEqual(result.error["code"], code, result.error)
                self.assertIn(named, result.error["message"])
                self.assertEqual(
                    self.told(run_id=run_id),
                    ["RunStarted", "RunStatusChanged running", "RunStatusChanged failed"]
                    + [f"RunFailed {code}"],
                )
                self.assertEqual(json.loads(self.run_row(run_id).error_json or ""), result.error)

    def test_design_example_runs_as_written(self) -> None:
        def run_unit_tests(ref: str) -> dict[str, Any]:
            return {"ref": ref}

        def fix(report: dict[str, Any]) -> str:
            return f"fixed {report['ref']}"

        def review() -> dict[str, Any]:
            return {"ok": current_task().iteration == 1}

        def workflow(ctx: Ctx) -> Workflow:
            unit = Task(
                "unit", run_unit_tests, kwargs={"ref": ctx.input["ref"]}, retries=2, retry_delay=1.0
            )
            return Workflow(
                "release",
                Parallel(unit, Task("lint", ["sh", "-c", "exit 1"], continue_on_fail=True)),
                Loop(
                    Task("fix", fix, needs={"report": "unit"}),
                    Task("review", review),
                    id="polish",
                    until=(ctx.output("review") or {}).get("ok") is True,
                    max_iterations=3,
                ),
                Approval("ship", title=f"Ship {ctx.input['ref']}?"),
                Task("announce", {"channel": "releases"}) if ctx.input.get("announce") else None,
            )

        result = self.play(
            workflow,
            "NodeWaitingApproval ship; approve ship",
            states="unit finished, lint failed, fix finished, review finished, ship finished, "
            "announce finished",
            options={"input": {"ref": "v1", "announce": True}},
        )
        self.assertEqual(result, ("r", "finished", None))
        self.assertEqual(self.run_row().workflow_name, "release")
        self.assertEqual(self.output("fix", 1), "fixed v1")
        self.assertIsNone(self.output("fix", 2))

    def test_task_may_be_any_of_four(self) -> None:
        async def coroutine(a: int, b: int) -> int:
            return a + b

        def function(a: int, b: int) -> int:
            return a * b

        printed = {"exitCode": 0, "stdout": "out\n", "stderr": "err\n"}
        fixed = {"a": [1, None, "ä"]}
        self.play(
            [
                Task("function", function, args=(3,), kwargs={"b": 4}),
                Task("coroutine", coroutine, args=[3], kwargs={"b": 4}),
                Task("command", ["sh", "-c", "echo out; echo err >&2"]),
                Task("object", fixed),
            ],
            outputs={"function": 12, "coroutine": 7, "command": printed, "object": fixed},
        )

    def test_workflow_instance_runs_without_function(self) -> None:
        self.play(Workflow("fixed", Task("a", answer)))
        self.assertEqual(self.run_row().workflow_name, "fixed")

    def test_none_children_are_dropped_everywhere(self) -> None:
        task = Task("a", answer)
        self.assertEqual(Workflow("w", None, task, None).children, (task,))
        self.assertEqual(Sequence(None, task).children, (task,))
        self.assertEqual(Parallel(task, None).children, (task,))
        self.assertEqual(Loop(None, task, id="l", until=True).children, (task,))

    def test_list_of_children_fans_out(self) -> None:
        self.drive(Parallel(*[Task(f"n{i}", {"i": i}) for i in range(3)]))
        self.assertEqual([self.output(f"n{i}") for i in range(3)], [{"i": i} for i in range(3)])

    def test_needs_by_keyword_pass_outputs(self) -> None:
        def join(left: str, right: str) -> str:
            return left + right

        joined = Task("join", join, needs={"left": "l"}, kwargs={"right": "!"})
        self.drive(Parallel(joined, Task("l", lambda: "x")))
        self.assertEqual((self.output("join"), self.starts()), ("x!", "l join"))

    def test_needs_from_outside_get_newest_turn(self) -> None:
        after = Task("after", lambda last: last, needs={"last": "turn"})
        self.play(Parallel(after, loop(Task("turn", turn), turns=3)), outputs={"after": 2})
        node = Task("turn", lambda: current_task().node_id)
        nested = [loop(loop(node, turns=1), id="outer"), after]
        self.play(nested, outputs={"after": "turn@@outer=1"}, run_id="nested")

    def test_needs_of_skipped_task_are_met(self) -> None:
        needy = Task("b", lambda a: a, needs={"a": "a"})
        self.play(
            [*tasks("a", skip_if=True), needy], states="a skipped, b finished", outputs={"b": None}
        )

    def test_ids_used_twice_are_refused(self) -> None:
        a = Task("a", answer)
        for tree in (Parallel(a, Sequence(a)), loop(a, id="a"), Sequence(a, Approval("a"))):
            self.refuse("DUPLICATE_ID", "'a'", lambda tree=tree: tree)

    def test_ids_outside_alphabet_are_refused(self) -> None:
        for bad in ("", "a b", "ä", "a/b", "a@@b=1", "x" * 129, "a\n", 7, None):
            self.refuse("INVALID_ID", repr(bad), lambda id: Task(id, answer), bad)
        self.refuse("INVALID_ID", "'a b'", lambda: Approval("a b"))
        self.refuse("INVALID_ID", "'a b'", lambda: Loop(id="a b", until=True))
        self.refuse("INVALID_ID", "'t'", lambda: Task("t", answer, needs=["no such"]))

    def test_ids_of_full_alphabet_are_taken(self) -> None:
        for good in ("A.b_c:d-9", "x" * 128, "0"):
            self.assertEqual(Task(good, answer).id, good)

    def test_unknown_needs_are_refused(self) -> None:
        for needy in (Task("a", answer, needs=["ghost"]), Approval("a", needs={"x": "ghost"})):
            self.refuse("UNKNOWN_DEPENDENCY", "'ghost'", lambda needy=needy: needy)

    def test_cyclic_needs_are_refused(self) -> None:
        def needy(id: str, needed: str) -> Task:
            return Task(id, answer, needs=[needed])

        later = Task("late", answer)
        for named, tree in (
            ("'a'", needy("a", "a")),
            ("'a'", Parallel(needy("a", "b"), needy("b", "a"))),
            ("'early'", Sequence(needy("early", "late"), later)),
            ("'in'", Sequence(loop(needy("in", "late")), later)),
        ):
            self.refuse("CYCLIC_DEPENDENCY", named, lambda tree=tree: tree)

    def test_wrong_arguments_are_refused(self) -> None:
        def refuse(named: str, build: Callable[..., Any], *wrong: dict[str, Any]) -> None:
            self.refuse("INVALID_ARGUMENT", named, lambda a: build(**a), *wrong)

        lone = "\ud800"  # text beyond UTF-8
        task = functools.partial(Task, "t", answer)
        refuse("'t'", task, {"retries": -1}, {"retries": 1.5}, {"retries": True})
        refuse("'t'", task, {"retry_delay": -0.1}, {"retry_delay": float("nan")})
        refuse("'t'", task, {"retry_delay": "1"}, {"timeout": 0}, {"timeout": float("inf")})
        refuse("'t'", task, {"backoff": "random"}, {"on_deny": "approve"}, {"needs_approval": 1})
        refuse("'t'", task, {"skip_if": None}, {"continue_on_fail": "yes"}, {"label": 5})
        refuse("'t'", task, {"label": lone}, {"args": 5}, {"kwargs": 5}, {"kwargs": {1: 2}})
        refuse("'t'", task, {"needs": "a"}, {"needs": {"not a name": "a"}}, {"needs": 5})
        refuse("'t'", task, {"needs": {"x": "a"}, "kwargs": {"x": 1}})
        command = functools.partial(Task, "t", ["true"])
        refuse("'t'", command, {"args": [1]}, {"kwargs": {"x": 1}}, {"needs": {"x": "a"}})
        gate = functools.partial(Approval, "g")
        refuse("'g'", gate, {"timeout": -1}, {"on_deny": "deny"}, {"on_timeout": "continue"})
        refuse("'g'", gate, {"title": 1}, {"summary": []}, {"metadata": {"x": object()}})
        refuse("'g'", gate, {"skip_if": 0}, {"title": lone}, {"metadata": {"x": lone}})
        again = functools.partial(Loop, id="l")
        refuse("'l'", again, {"until": None}, {"until": True, "on_max": "stop"})
        refuse("'l'", again, {"until": True, "max_iterations": 0})
        refuse("max_concurrency", Parallel, {"max_concurrency": 0})
        refuse("name", Workflow, {"name": ""}, {"name": lone})

    def test_wrong_runnables_are_refused(self) -> None:
        wrong = (None, "ls", [], ["ls", 1], ["a\0b"], 5, {"x": object()}, {"x": "\ud800"})
        self.refuse("INVALID_ARGUMENT", "'t'", lambda run: Task("t", run), *wrong)

    def test_static_output_over_limit_is_refused(self) -> None:
        big = {"x": "y" * (ss.MAX_OUTPUT_BYTES + 1)}
        self.play(lambda ctx: as_workflow(Task("t", big)), ends="failed")

    def test_what_is_no_element_is_refused(self) -> None:
        self.refuse("INVALID_TREE", "child", Sequence, "a", answer, 5, Task, Workflow("inner"))

    def test_too_deep_tree_is_refused(self) -> None:
        def deep() -> Any:
            tree: Any = Task("t", answer)
            for _ in range(ss.MAX_TREE_DEPTH + 2):
                tree = Sequence(tree)
            return tree

        self.refuse("INVALID_TREE", "deep", deep)

    def test_render_that_fails_fails_run(self) -> None:
        def leave(ctx: Ctx) -> Workflow:
            raise KeyError("ref")

        renders: dict[Any, tuple[str, str]] = {
            leave: ("RENDER_FAILED", "KeyError: 'ref'"),
            lambda ctx: fail_mutely(): ("RENDER_FAILED", "Mute"),
            lambda ctx: None: ("INVALID_TREE", ""),
            lambda ctx: Task("a", answer): ("INVALID_TREE", ""),
            lambda ctx: []: ("INVALID_TREE", ""),
        }
        for number, (render, (code, says)) in enumerate(renders.items()):
            with self.subTest(code=code, number=number):
                error = self.play(render, ends="failed", run_id=f"r{number}").error or {}
                self.assertEqual(error["code"], code)
                self.assertIn(says, error["message"])

    def test_late_render_error_drains_and_fails(self) -> None:
        def workflow(ctx: Ctx) -> Workflow:
            if ctx.output("a"):
                raise ValueError("late")
            return Workflow("w", *tasks("a b"))

        self.play(workflow, ends="failed", states="a finished, b pending")

    def test_endless_rendering_is_stopped_by_name(self) -> None:
        def workflow(ctx: Ctx) -> Workflow:
            known = 0
            while ctx.state(f"n{known}") is not None:
                known += 1
            return Workflow("w", *[Task(f"n{i}", answer, skip_if=True) for i in range(known + 1)])

        with mock.patch.object(ss, "MAX_RENDERS_WITHOUT_PROGRESS", 5):
            error = self.play(workflow, ends="failed").error or {}
        self.assertEqual(error["code"], "RENDER_LOOP")
        self.assertIn("what changes: n", error["message"])

    def last_seen(self, look: Callable[[Ctx], Any], *tree: Any) -> Any:
        """Return what `look` sees in the last rendering of a run of this tree."""
        seen: list[Any] = []

        def workflow(ctx: Ctx) -> Workflow:
            seen.append(look(ctx))
            return Workflow("w", *tree)

        self.play(workflow)
        return seen[-1]

    def test_ctx_gives_defaults_for_missing(self) -> None:
        def look(ctx: Ctx) -> Any:
            outputs = ctx.output("x"), ctx.output("x", "default"), ctx.output("x", iteration=7)
            rest = ctx.state("x"), ctx.error("x"), ctx.iteration("x")
            return (ctx.run_id, ctx.input, *outputs, *rest)

        expected = ("r", {}, None, "default", None, None, None, 0)
        self.assertEqual(self.last_seen(look), expected)
        self.assertEqual(look(Ctx("r")), expected)

    def test_ctx_tells_state_error_and_iteration(self) -> None:
        failing = Task("a", fail, continue_on_fail=True)
        seen = self.last_seen(lambda ctx: (ctx.state("a"), ctx.error("a")), failing)
        self.assertEqual(seen, ("failed", {"name": "ValueError", "message": "no luck"}))

    def test_ctx_output_takes_an_iteration(self) -> None:
        seen = self.last_seen(
            lambda ctx: [ctx.output("t"), ctx.output("t", iteration=0), ctx.iteration("l")],
            loop(Task("t", turn), turns=3),
        )
        self.assertEqual(seen, [2, 0, 2])

    def test_current_task_outside_of_task_raises(self) -> None:
        with self.assertRaises(RuntimeError):
            current_task()

    def test_current_task_knows_its_attempt(self) -> None:
        seen: list[Any] = []

        def once() -> None:
            task = current_task()
            seen.append((task.run_id, task.node_id, task.iteration, task.attempt))
            seen.append(task.idempotency_key)
            task.log("two\nlines")
            fail_once()

        told = "a 0 0 two stdout, a 0 0 lines stdout, a 0 1 two stdout, a 0 1 lines stdout"
        self.play(Task("a", once, retries=1), tells=f"NodeOutput {told}")
        self.assertEqual(seen[0::2], [("r", "a", 0, 0), ("r", "a", 0, 1)])
        self.assertEqual(seen[1], seen[3])

    def test_coroutine_sees_its_current_task(self) -> None:
        async def look() -> str:
            await asyncio.sleep(0)
            return current_task().node_id

        self.play(Task("a", look), outputs={"a": "a"})

    def test_dataclass_outputs_become_objects(self) -> None:
        @dataclasses.dataclass
        class Report:
            passed: int
            names: list[str]

        report = {"report": {"passed": 3, "names": ["x"]}}
        self.play(Task("a", lambda: {"report": Report(3, ["x"])}), outputs={"a": report})

    def test_wrong_run_arguments_write_nothing(self) -> None:
        wrong: list[tuple[Any, dict[str, Any]]] = [
            (Workflow("w"), {"run_id": "a b"}),
            (Workflow("w"), {"max_concurrency": 0}),
            ("workflow", {}),
        ]
        for workflow, options in wrong:
            with self.assertRaises(ss.AuthoringError):
                ss.run_workflow(workflow, adapter=self.db, **options)
        self.assertEqual(self.db.list_runs(ss.TERMINAL_STATUSES + ss.ACTIVE_STATUSES), [])

    def test_run_id_can_be_used_once(self) -> None:
        self.drive(Task("a", answer))
        before = self.told()
        with self.assertRaises(ss.RunExists):
            self.drive(Task("a", answer))
        self.assertEqual(self.told(), before)


# ---------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------


def until_one(ctx: Ctx) -> Workflow:
    return Workflow("w", Loop(Task("t", turn), id="l", until=ctx.output("t") == 1))


def nested_loops(ctx: Ctx) -> Workflow:
    inner = Loop(Task("t", turn), id="inner", until=ctx.output("t") == 1)
    return Workflow("w", loop(inner, Task("o", answer), id="outer"))


def drop_gate(ctx: Ctx) -> Workflow:
    gate = None if ctx.output("a") else Approval("gate")
    return Workflow("w", Parallel(gate, Task("a", wait_for_go)))


def grow(ctx: Ctx) -> Workflow:
    """One place, and a sixth task once three have ended."""
    done = sum(ctx.state(f"n{i}") == "finished" for i in range(5))
    extra = Task("extra", answer) if done > 2 else None
    return Workflow("w", Parallel(*tasks("n0 n1 n2 n3 n4"), extra, max_concurrency=1))


MIXED = [Task(f"n{i}", r) for i, r in enumerate([answer, {"x": 1}, answer, {"x": 1}, ["true"]])]


class ScheduleTest(RunCase):
    ROWS = {
        "empty workflow finishes at once": Row([], states=""),
        "empty containers finish at once": Row([Sequence(), Parallel(), loop()]),
        "children run in order": Row(
            [*tasks("a"), Sequence(*tasks("b"), Sequence(*tasks("c"))), *tasks("d")],
            tells=in_turn("a b c d"),
        ),
        "needs by list only wait": Row(
            Parallel(*tasks("late", needs=["a", "b"]), *tasks("a"), *tasks("b", needs=("a",))),
            tells="NodeStarted a 0 0, b 0 0, late 0 0",
        ),
        "place of static task goes on": Row(
            Parallel(*MIXED, max_concurrency=1), tells=in_turn("n0 n1 n2 n3 n4")
        ),
        "loop runs until condition holds": Row(until_one, tells="NodeStarted t 0 0, t 1 0"),
        "loop already done never begins": Row(
            [loop(*tasks("t"), until=True), *tasks("next")], tells="NodeStarted next 0 0"
        ),
        "loop ends after max iterations": Row(
            [loop(*tasks("t"), turns=3), *tasks("next")],
            tells="NodeStarted t 0 0, t 1 0, t 2 0, next 0 0",
        ),
        "nested loop carries outer iteration": Row(
            nested_loops,
            tells="NodeStarted t@@outer=0 0 0, t@@outer=0 1 0, o 0 0, "
            "t@@outer=1 0 0, t@@outer=1 1 0, o 1 0",
        ),
        "third level carries both outer iterations": Row(
            loop(loop(loop(*tasks("t"), id="c"), id="b"), id="a"),
            tells="NodeStarted t@@a=0,b=0 0 0, t@@a=0,b=0 1 0, t@@a=0,b=1 0 0, t@@a=0,b=1 1 0, "
            "t@@a=1,b=0 0 0, t@@a=1,b=0 1 0, t@@a=1,b=1 0 0, t@@a=1,b=1 1 0",
        ),
        "skipped tasks do not run": Row(
            [Task("a", fail, skip_if=True), Approval("g", skip_if=True), *tasks("b")],
            tells="NodeSkipped a 0, g 0, NodeStarted b 0 0, no ApprovalRequested",
            states="a skipped, g skipped, b finished",
        ),
        "continue on fail goes on": Row(
            [*tasks("a", fail, continue_on_fail=True), *tasks("b")],
            states="a failed, b finished",
        ),
        "dropped gate is closed": Row(
            drop_gate,
            "NodeWaitingApproval gate; go",
            tells="NodeCancelled gate 0 no longer in the tree",
        ),
        "limit holds over new renders": Row(grow, tells=in_turn("n0 n1 n2 n3 n4 extra")),
    }

    def test_loop_may_fail_at_max(self) -> None:
        result = self.play(
            [loop(*tasks("t"), on_max="fail"), *tasks("next")],
            ends="failed",
            tells="NodeStarted t 0 0, t 1 0, RunFailed LOOP_EXHAUSTED",
        )
        self.assertIn("'l'", (result.error or {})["message"])

    def test_parallel_children_run_together(self) -> None:
        together = threading.Barrier(3)
        self.play(Parallel(*tasks("a b c", lambda: bool(together.wait(PATIENCE)))))

    def test_dropped_task_is_cancelled(self) -> None:
        stopped: list[bool] = []

        def watch() -> None:
            stopped.append(current_task().cancelled.wait(PATIENCE))

        def workflow(ctx: Ctx) -> Workflow:
            watcher = None if ctx.output("a") else Task("watch", watch)
            return Workflow("w", Parallel(watcher, *tasks("a")))

        self.play(workflow, tells="NodeCancelled watch 0 0 no longer in the tree")
        self.assertEqual(stopped, [True])

    def test_limits_hold_at_every_level(self) -> None:
        branches = [Sequence(*tasks(f"a{i} b{i}")) for i in range(4)]
        inner = Parallel(*tasks("i0 i1 i2 i3"), max_concurrency=1)
        for name, tree, limit in (
            ("tasks below a parallel", Parallel(*branches, max_concurrency=2), None),
            ("all tasks of a run", Parallel(*tasks("a b c d e f")), 2),
            ("both", Parallel(inner, *tasks("o0 o1 o2"), max_concurrency=2), 8),
        ):
            with self.subTest(limit_of=name):
                options = {} if limit is None else {"max_concurrency": limit}
                run_id = name.replace(" ", "-")
                self.play(tree, options=options, run_id=run_id)
                busy, inner_busy, most, inner_most = 0, 0, 0, 0
                for words in self.told("NodeStarted", "NodeFinished", run_id=run_id):
                    step = 1 if words.startswith("NodeStarted") else -1
                    busy, inner_busy = busy + step, inner_busy + step * (" i" in words)
                    most, inner_most = max(most, busy), max(inner_most, inner_busy)
                self.assertEqual((most, inner_most), (2, 1 if name == "both" else 0))

    def test_task_skipped_before_retry_stays_skipped(self) -> None:
        def fail_and_go() -> None:
            GO.set()
            raise ValueError

        def workflow(ctx: Ctx) -> Workflow:
            skip = ctx.state("other") == "finished"
            return Workflow(
                "w",
                Parallel(
                    Task("a", fail_and_go, retries=1, retry_delay=0.4, skip_if=skip),
                    Task("other", wait_for_go),
                    Task("later", fail_once, retries=1, retry_delay=0.5),
                ),
            )

        self.play(workflow, states="a skipped, other finished, later finished")
        self.assertEqual(self.starts().split().count("a"), 1)

    def test_renders_only_after_what_was_read(self) -> None:
        for number, (reads, expected) in enumerate(
            (
                ("", 1),
                ("output b", 2),
                ("output ghost", 1),
                ("output a, output c", 3),
                ("error b", 1),
            )
        ):
            calls: list[int] = []

            def workflow(ctx: Ctx, reads: str = reads, calls: list[int] = calls) -> Workflow:
                calls.append(1)
                for read in listed(reads):
                    kind, _, id = read.partition(" ")
                    getattr(ctx, kind)(id)
                return Workflow("w", *[Task(id, {"id": id}) for id in "abc"])

            with self.subTest(reads=reads):
                self.drive(workflow, f"r{number}")
                self.assertEqual(len(calls), expected)

    def test_frames_only_when_tree_differs(self) -> None:
        def workflow(ctx: Ctx) -> Workflow:
            extra = Task("c", answer) if ctx.output("b") else None
            ctx.output("a")
            return Workflow("w", *tasks("a b"), extra)

        self.drive(workflow)
        frames = self.db.list_frames("r", 10)
        self.assertEqual([frame.frame_no for frame in frames], [2, 1])
        expected = [f"FrameCommitted {f.frame_no} {f.xml_hash}" for f in frames[::-1]]
        self.assertEqual(self.told("FrameCommitted"), expected)

    def test_each_iteration_has_its_frame(self) -> None:
        self.drive(loop(*tasks("t"), turns=3))
        mounted = [f.mounted_task_ids_json for f in self.db.list_frames("r", 10, 0)]
        self.assertEqual(mounted, ['["t::0"]', '["t::1"]', '["t::2"]'])

    def test_frame_row_is_what_clients_expect(self) -> None:
        self.drive(
            [
                Parallel(
                    Task("a", answer, label="Ä", retries=2, timeout=1.5, continue_on_fail=True),
                    Task("b", answer, needs=["a"], skip_if=True),
                    max_concurrency=2,
                ),
                loop(*tasks("t"), turns=1),
                Approval("g", title="Go?", timeout=0.001, on_timeout="approve"),
            ]
        )
        frame = self.db.list_frames("r", 1, 0)[0]

        def element(tag: str, *children: Any, **props: str) -> dict[str, Any]:
            tag = f"smithers:{tag}"
            return {"kind": "element", "tag": tag, "props": props, "children": children}

        first = element(
            "task", continueOnFail="true", id="a", label="Ä", retries="2", timeoutMs="1500"
        )
        second = element("task", dependsOn="a", id="b", skipIf="true")
        turns = {"maxIterations": "1", "onMaxReached": "return-last", "until": "false"}
        gate = {"approvalMode": "decision", "id": "g", "label": "Go?", "needsApproval": "true"}
        tree = element(
            "workflow",
            element("parallel", first, second, maxConcurrency="2"),
            element("ralph", element("task", id="t"), id="l", **turns),
            element("task", **gate, onDeny="fail", timeoutMs="1"),
            name="test",
        )
        expected = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
        self.assertEqual(frame.xml_json, expected)
        self.assertEqual(frame.xml_hash, hashlib.sha256(expected.encode()).hexdigest())
        self.assertEqual(frame.mounted_task_ids_json, '["a::0","b::0","t::0","g::0"]')
        self.assertEqual(
            json.loads(frame.task_index_json),
            [{"nodeId": id, "ordinal": n, "iteration": 0} for n, id in enumerate("abtg")],
        )

    def test_order_holds_when_tree_grows_before(self) -> None:
        begun, grown = threading.Event(), threading.Event()

        def old() -> None:
            begun.set()
            grown.wait(PATIENCE)

        def first() -> None:
            grown.set()
            wait_for_go()

        def workflow(ctx: Ctx) -> Workflow:
            new = [Task("first", first), *tasks("second")] if ctx.output("kick") else []
            kick = Task("kick", lambda: begun.wait(PATIENCE))
            return Workflow("w", Parallel(Sequence(*new, Task("old", old)), kick))

        self.play(
            workflow,
            "NodeFinished old; go",
            tells="NodeStarted old 0 0, kick 0 0, first 0 0, second 0 0",
        )
        told = self.told("NodeStarted", "NodeFinished")
        self.assertLess(told.index("NodeFinished first 0 0"), told.index("NodeStarted second 0 0"))


# ---------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------


IMPATIENT = mock.patch.object(ss, "STOP_GRACE_SECONDS", 0.05)


class RunningTest(RunCase):
    ROWS = {
        "failed attempts are tried again": Row(
            Task("a", fail_once, retries=2),
            tells="NodeStarted a 0 0, NodeFailed a 0 0 ValueError, NodeRetrying a 0 1, "
            "NodeStarted a 0 1, NodeFinished a 0 1",
        ),
        "retries end": Row(
            Task("a", fail, retries=2, retry_delay=0.001),
            ends="failed",
            tells="NodeStarted a 0 0, NodeFailed a 0 0 ValueError, NodeRetrying a 0 1, "
            "NodeStarted a 0 1, NodeFailed a 0 1 ValueError, NodeRetrying a 0 2, "
            "NodeStarted a 0 2, NodeFailed a 0 2 ValueError",
        ),
        "delayed retry leaves place to others": Row(
            Parallel(Task("a", fail_once, retries=1, retry_delay=0.1), *tasks("b")),
            tells="NodeStarted a 0 0, b 0 0, a 0 1",
            options={"max_concurrency": 1},
        ),
        "after failure in flight drains only": Row(
            [
                Parallel(Task("slow", wait_for_go), *tasks("bad", fail), *tasks("queued")),
                *tasks("after"),
            ],
            "NodeFailed bad; go",
            ends="failed",
            states="slow finished, bad failed, queued pending, after pending",
            options={"max_concurrency": 2},
        ),
        "exception without words fails task": Row(
            Task("a", fail_mutely), ends="failed", tells="NodeFailed a 0 0 Mute"
        ),
        "timeout stops function and retries": Row(
            Task("a", wait_for_stop, timeout=0.05, retries=1),
            ends="failed",
            tells="NodeStarted a 0 0, NodeFailed a 0 0 TASK_TIMEOUT, "
            "NodeStarted a 0 1, NodeFailed a 0 1 TASK_TIMEOUT",
        ),
        "timeout stops command and retries": Row(
            Task("a", ["sleep", "60"], timeout=0.05, retries=1),
            ends="failed",
            tells="NodeStarted a 0 0, NodeFailed a 0 0 TASK_TIMEOUT, "
            "NodeStarted a 0 1, NodeFailed a 0 1 TASK_TIMEOUT",
        ),
        "missing command fails its task": Row(
            Task("a", ["no-such-command-here"]),
            ends="failed",
            tells="NodeFailed a 0 0 FileNotFoundError",
        ),
        "cancel ends waiting retry": Row(
            Task("a", fail, retries=1, retry_delay=600), "NodeRetrying a; cancel", "cancelled"
        ),
    }

    def test_event_log_tells_whole_run(self) -> None:
        self.drive(Task("a", answer))
        self.assertEqual(
            self.told(),
            [
                "RunStarted",
                "RunStatusChanged running",
                "NodePending a 0",
                f"FrameCommitted 1 {self.db.list_frames('r', 1)[0].xml_hash}",
                "NodeStarted a 0 0",
                "NodeFinished a 0 0",
                "RunStatusChanged finished",
                "RunFinished",
            ],
        )

    def test_every_attempt_has_its_row(self) -> None:
        self.drive(Task("a", fail_once, retries=2))
        self.assertEqual(self.attempts(), "a 0 failed, a 1 finished")
        self.assertEqual(self.error_of("a"), {"name": "ValueError", "message": "no luck"})

    def test_backoff_grows_as_named(self) -> None:
        for backoff, delays in (
            ("fixed", [2] * 4),
            ("linear", [2, 4, 6, 8]),
            ("exponential", [2, 4, 8, 16]),
        ):
            task = Task("a", answer, retry_delay=2, backoff=backoff)
            self.assertEqual([task.retry_delay_after(n) for n in (1, 2, 3, 4)], delays)
        far = Task("a", answer, retry_delay=60, backoff="exponential").retry_delay_after(10_000)
        self.assertEqual(far, ss.MAX_RETRY_DELAY_SECONDS)

    def test_failure_names_all_failed_tasks(self) -> None:
        both = threading.Barrier(2)

        def meet() -> None:
            both.wait(PATIENCE)
            raise ValueError

        result = self.play(Parallel(*tasks("a b", meet)), ends="failed")
        assert result.error is not None
        self.assertIn(result.error["message"], ("Task(s) failed: a, b", "Task(s) failed: b, a"))
        self.assertEqual(self.db.list_events("r")[-1].payload["error"], result.error)
        self.assertEqual(json.loads(self.run_row().error_json or ""), result.error)

    def test_errors_carry_no_paths_or_tracebacks(self) -> None:
        def leak() -> None:
            raise ValueError(f"cannot read {os.path.dirname(json.__file__)}/secret.txt")

        def fetch() -> None:
            raise urllib.error.HTTPError("http://host/path", 404, "Not Found", Message(), None)

        def refuse() -> None:
            open(self.in_folder("missing.txt")).close()

        with self.assertLogs(ss.logger, "WARNING") as logged:
            for run, name, message in (
                (leak, "ValueError", "cannot read json/secret.txt"),
                (refuse, "FileNotFoundError", "No such file or directory: 'missing.txt'"),
                (fetch, "HTTPError", "HTTP Error 404: Not Found"),
            ):
                with self.subTest(name=name):
                    self.drive(Task("a", run), name)
                    self.assertEqual(self.error_of("a", name), {"name": name, "message": message})
        self.assertIn("Traceback", logged.output[0])

    def test_leaving_exceptions_fail_only_task(self) -> None:
        for kind in (SystemExit, KeyboardInterrupt, GeneratorExit):

            def leave(kind: type[BaseException] = kind) -> None:
                raise kind("bye")

            self.play(Task("a", leave), ends="failed", run_id=kind.__name__)

    def test_timeout_stops_coroutine_and_retries(self) -> None:
        stopped: list[str] = []

        async def sleep() -> None:
            try:
                await asyncio.sleep(PATIENCE)
            except asyncio.CancelledError:
                stopped.append("stopped")
                raise

        self.play(Task("a", sleep, timeout=0.05, retries=1), ends="failed")
        self.assertEqual(self.error_of("a")["code"], "TASK_TIMEOUT")
        self.assertEqual(stopped, ["stopped"] * 2)

    def fifo(self) -> str:
        os.mkfifo(self.in_folder("fifo"))
        return self.in_folder("fifo")

    def test_timeout_ends_whole_process_group(self) -> None:
        fifo = self.fifo()
        live = self.start(Task("a", ["sh", "-c", f"sleep 60 > {fifo} & wait"], timeout=0.2))
        with open(fifo, "rb") as pipe:
            self.assertEqual(live.end().status, "failed")
            self.assertTrue(select.select([pipe], [], [], PATIENCE)[0], "its child lives on")
            self.assertEqual(pipe.read(), b"")

    def test_command_ignoring_term_is_killed(self) -> None:
        command = ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"]
        with mock.patch.object(ss, "KILL_AFTER_SECONDS", 0.1):
            self.play(Task("a", command), "NodeOutput a; cancel", "cancelled")

    @IMPATIENT
    def test_function_ignoring_timeout_is_not_retried(self) -> None:
        self.play(
            Task("a", wait_for_go, timeout=0.05, retries=5),
            ends="failed",
            tells="NodeStarted a 0 0, NodeFailed a 0 0 TASK_TIMEOUT",
        )

    @IMPATIENT
    def test_function_ignoring_cancel_is_abandoned(self) -> None:
        self.play(Task("a", wait_for_go), "NodeStarted a; cancel", "cancelled")

    @IMPATIENT
    def test_late_result_of_given_up_task_is_dropped(self) -> None:
        returned = threading.Event()

        def late() -> str:
            wait_for_go()
            returned.set()
            return "late"

        def then() -> None:
            GO.set()
            returned.wait(PATIENCE)

        given_up = Task("a", late, timeout=0.05, continue_on_fail=True)
        self.play(
            [given_up, Task("b", then), *tasks("c")], states="a failed, b finished, c finished"
        )
        self.assertIsNone(self.output("a"))

    def test_output_that_is_not_json_fails(self) -> None:
        ring: list[Any] = []
        ring.append(ring)
        wrong = (object(), {1, 2}, float("nan"), b"bytes", "\ud800", {(1, 2): 3}, ring)
        for number, value in enumerate(wrong):
            with self.subTest(value=repr(value)):
                self.play(
                    Task("a", lambda value=value: value),
                    ends="failed",
                    tells="NodeFailed a 0 0 OUTPUT_NOT_JSON",
                    run_id=f"r{number}",
                )

    def test_output_over_a_mebibyte_fails(self) -> None:
        fits = ss.MAX_OUTPUT_BYTES - 2
        self.play(
            [
                Task("fits", lambda: "x" * fits),
                Task("big", lambda: "x" * (fits + 1), continue_on_fail=True),
                Task("wide", lambda: "ä" * (fits // 2 + 1)),
            ],
            ends="failed",
            tells="NodeFailed big 0 0 OUTPUT_TOO_LARGE, wide 0 0 OUTPUT_TOO_LARGE",
            states="fits finished, big failed, wide failed",
        )

    def test_command_lines_become_events(self) -> None:
        self.drive(Task("a", ["sh", "-c", r"echo one; echo two >&2; printf 'thr\377ee'"]))
        self.assertEqual(
            sorted(self.told("NodeOutput")),
            ["NodeOutput a 0 0 one stdout", "NodeOutput a 0 0 thr\ufffdee stdout"]
            + ["NodeOutput a 0 0 two stderr"],
        )

    def test_command_lines_come_while_it_runs(self) -> None:
        fifo = self.fifo()
        live = self.start(Task("a", ["sh", "-c", f"echo begun; cat {fifo}"]))
        live.wait("NodeOutput a 0 0 begun")
        with open(fifo, "w") as pipe:
            pipe.write("more\n")
        live.end()
        self.assertEqual(self.output("a")["stdout"], "begun\nmore\n")

    def test_command_output_keeps_last_64_kib(self) -> None:
        script = "head -c 200000 /dev/zero | tr '\\0' x; echo end"
        self.drive(Task("a", ["sh", "-c", script]))
        kept = self.output("a")["stdout"]
        self.assertEqual((len(kept), kept[-6:]), (ss.COMMAND_TAIL_BYTES, "xxend\n"))
        log = self.db.list_events("r")
        told = "".join(event.payload["text"] for event in log if event.type == "NodeOutput")
        self.assertEqual(told, "x" * 200000 + "end")

    def test_command_that_exits_nonzero_fails(self) -> None:
        self.play(Task("a", ["sh", "-c", "echo why >&2; exit 3"]), ends="failed")
        message = "sh exited with code 3: why"
        self.assertEqual(
            self.error_of("a"), {"name": "TaskFailed", "message": message, "code": "COMMAND_FAILED"}
        )

    def test_command_knows_run_but_not_token(self) -> None:
        script = 'echo "$SMITHERS_RUN_ID $SMITHERS_NODE_ID $SMITHERS_ATTEMPT $SMITHERS_API_KEY."'
        with mock.patch.dict(os.environ, {"SMITHERS_API_KEY": "sk-secret"}):
            self.drive(Task("a", ["sh", "-c", script]))
        self.assertEqual(self.output("a")["stdout"], "r a 0 .\n")

    def test_printing_too_much_fails_task(self) -> None:
        def chatter() -> None:
            for _ in range(1000):
                current_task().log("x" * 100)

        with mock.patch.object(ss, "MAX_LOG_BYTES", 5000):
            function = Task("function", chatter, continue_on_fail=True)
            self.play(
                Parallel(function, Task("command", ["sh", "-c", "yes | head -n 9999"])),
                ends="failed",
            )
        for node_id in ("function", "command"):
            self.assertEqual(self.error_of(node_id)["code"], "OUTPUT_LIMIT")
            kept = [words.split(" ")[4] for words in self.told("NodeOutput") if node_id in words]
            self.assertLessEqual(sum(map(len, kept)), 5000)

    def test_cancel_stops_every_kind_of_task(self) -> None:
        stopped: list[str] = []

        async def sleep() -> None:
            try:
                current_task().log("up")
                await asyncio.sleep(PATIENCE)
            finally:
                stopped.append("coroutine")

        def wait() -> None:
            wait_for_stop()
            stopped.append("function")

        command = Task("command", ["sh", "-c", "echo up; exec sleep 60"])
        kinds = Parallel(command, Task("coroutine", sleep), Task("function", wait))
        result = self.play(
            [kinds, *tasks("never")],
            "NodeOutput command; NodeOutput coroutine; NodeOutput function; cancel",
            "cancelled",
            states="command cancelled, coroutine cancelled, function cancelled, never pending",
        )
        self.assertEqual(result, ("r", "cancelled", None))
        self.assertEqual(sorted(stopped), ["coroutine", "function"])
        why = "the run was cancelled"
        self.assertEqual(
            sorted(self.told("NodeCancelled")),
            [f"NodeCancelled {id} 0 0 {why}" for id in ("command", "coroutine", "function")],
        )
        self.assertEqual({a.state for a in self.db.list_attempts("r")}, {"cancelled"})

    def test_abort_event_cancels_run(self) -> None:
        abort = threading.Event()
        live = self.start(Task("a", wait_for_stop), abort=abort)
        live.wait("NodeStarted a")
        abort.set()
        self.assertEqual(live.end().status, "cancelled")
        self.play(Task("a", fail), ends="cancelled", options={"abort": abort}, run_id="at-start")
        self.assertEqual(self.told("NodeStarted", run_id="at-start"), [])

    def test_ended_run_cannot_be_cancelled(self) -> None:
        self.drive(Task("a", answer))
        with self.assertRaises(ss.RunNotActive):
            self.cancel()
        with self.assertRaises(ss.RunNotFound):
            self.cancel("ghost")

    def test_many_tasks_finish_each_once(self) -> None:
        many = [Task(f"n{i}", {"i": i}) for i in range(150)]
        self.play([Parallel(*many[:100]), *many[100:]], options={"max_concurrency": 16})
        self.assertEqual(len(self.starts().split()), 150)
        self.assertEqual(set(self.states().values()), {"finished"})


# ---------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------

WAITS = "NodeWaitingApproval gate"
PARKS = "RunStatusChanged waiting-approval"
AFTER = Task("after", answer)
QUICK = {"timeout": 0.02}


def denied(gate: Any, ends: str, state: str, after: str = "finished", tells: str = "") -> Row:
    """A gate is denied; its run ends so, and so do its node and the one after it."""
    states = f"gate {state}, after {after}"
    return Row([gate, AFTER], f"{WAITS}; deny gate", ends, tells, states)


def asking(**options: Any) -> Task:
    return Task("gate", answer, needs_approval=True, **options)


class GateTest(RunCase):
    ROWS = {
        "denied gate fails by default": denied(Approval("gate"), "failed", "failed", "pending"),
        "denied gate may continue": denied(
            Approval("gate", on_deny="continue"), "finished", "finished"
        ),
        "denied gate may be skipped": denied(
            Approval("gate", on_deny="skip"), "finished", "skipped"
        ),
        "denied task fails by default": denied(
            asking(), "failed", "failed", "pending", "no NodeStarted"
        ),
        "denied task never runs to continue": denied(
            asking(on_deny="continue"), "finished", "skipped", tells="NodeStarted after 0 0"
        ),
        "denied task may be skipped": denied(
            asking(on_deny="skip"), "finished", "skipped", tells="NodeStarted after 0 0"
        ),
        "denied task may fail and continue": denied(
            asking(continue_on_fail=True), "finished", "failed", tells="NodeStarted after 0 0"
        ),
        "approved task runs with retries": Row(
            Task("gate", fail_once, needs_approval=True, retries=1),
            f"{WAITS}; approve gate",
            tells="ApprovalRequested gate 0, NodeStarted gate 0 0, gate 0 1",
        ),
        "gate timeout may fail": Row(
            Approval("gate", **QUICK),
            ends="failed",
            tells="ApprovalRequested gate 0, NodeFailed gate 0 0 APPROVAL_TIMEOUT",
        ),
        "gate timeout may approve": Row(
            Approval("gate", on_timeout="approve", **QUICK),
            tells="ApprovalGranted gate 0 nobody decided within 0.02 s",
            states="gate finished",
        ),
        "gate timeout may deny and fail": Row(
            Approval("gate", on_timeout="deny", **QUICK),
            ends="failed",
            tells="ApprovalDenied gate 0 nobody decided within 0.02 s",
            states="gate failed",
        ),
        "gate timeout may deny and continue": Row(
            Approval("gate", on_timeout="deny", on_deny="continue", **QUICK),
            tells="ApprovalDenied gate 0 nobody decided within 0.02 s",
            states="gate finished",
        ),
        "gate timeout may deny and skip": Row(
            Approval("gate", on_timeout="deny", on_deny="skip", **QUICK),
            tells="ApprovalDenied gate 0 nobody decided within 0.02 s",
            states="gate skipped",
        ),
        "each iteration has its gate": Row(
            loop(Approval("gate")),
            f"{WAITS} 0; approve gate 0; {WAITS} 1; approve gate 1",
            tells="ApprovalRequested gate 0, NodeWaitingApproval gate 0, ApprovalGranted gate 0, "
            "ApprovalRequested gate 1, NodeWaitingApproval gate 1, ApprovalGranted gate 1",
        ),
        "open gate does not starve retries": Row(
            Parallel(Approval("gate"), Task("a", fail_once, retries=1, retry_delay=0.05)),
            f"NodeFinished a; {PARKS}; approve gate",
        ),
        "failure closes open gates": Row(
            Parallel(Approval("gate"), Sequence(Task("a", wait_for_go), Task("b", fail))),
            f"{WAITS}; go",
            "failed",
            states="gate cancelled, a finished, b failed",
        ),
    }

    def tearDown(self) -> None:
        """A decision is stored with its gate: what the log says of it, the row says too."""
        super().tearDown()
        words = {"Granted": "approved", "Denied": "denied", "Requested": "requested"}
        for run in self.db.list_runs((*ss.ACTIVE_STATUSES, *ss.TERMINAL_STATUSES)):
            said = {}
            for event in self.db.list_events(run.run_id):
                if event.type.startswith("Approval"):
                    p = event.payload
                    said[p["nodeId"], p["iteration"]] = words[event.type[8:]]
            for gate in self.db.list_gates(run.run_id):
                told = said[gate.node_id, gate.iteration]
                self.assertEqual(gate.status, "cancelled" if told == "requested" else told)

    def open(self, *nodes: Any) -> Live:
        """Start a run that waits at its gate."""
        live = self.start(nodes or Approval("gate"))
        live.wait(WAITS)
        return live

    def refused(self, error: type[Exception], *decision: Any, **fields: Any) -> None:
        before = self.told()
        with self.assertRaises(error):
            self.decide(*decision, **fields)
        self.assertEqual(self.told(), before)

    def test_gate_is_requested_when_reached(self) -> None:
        live = self.start([Task("a", wait_for_go), Approval("gate")])
        live.wait("NodeStarted a")
        self.assertEqual((self.db.list_gates("r"), self.states()["gate"]), ([], "pending"))
        self.refused(ss.ApprovalNotPending, "approved")
        GO.set()
        live.wait(WAITS)
        self.decide("approved")
        self.assertEqual(live.end().status, "finished")

    def test_request_keeps_title_summary_metadata(self) -> None:
        request = {"title": "Go?", "summary": "S", "metadata": {"a": [1]}}
        for run_id, gate, expected in (
            ("gate", Approval("gate", **request), request),
            ("task", asking(label="Run it?"), {"title": "Run it?"}),
        ):
            self.play(gate, f"{WAITS}; approve gate", run_id=run_id)
            kept = json.loads(self.gate(run_id).request_json or "")
            self.assertEqual(kept, {**kept, **expected})

    def test_decision_wakes_parked_run(self) -> None:
        after = Task("after", lambda said: said, needs={"said": "gate"})
        live = self.open(Approval("gate"), after)
        live.wait(PARKS)
        requested = self.gate().requested_at_ms
        self.decide("approved", note="Looks good", decided_by="alice")
        self.assertEqual(live.end().status, "finished")
        self.assertEqual(
            self.told("RunStatusChanged", "ApprovalRequested", "ApprovalGranted"),
            [
                "RunStatusChanged running",
                "ApprovalRequested gate 0",
                "RunStatusChanged waiting-approval",
                "ApprovalGranted gate 0 Looks good alice",
                "RunStatusChanged running",
                "RunStatusChanged finished",
            ],
        )
        gate = self.gate()
        said = {"approved": True, "note": "Looks good", "decidedBy": "alice"}
        self.assertEqual(self.output("after"), {**said, "decidedAtMs": gate.decided_at_ms})
        self.assertIsNotNone(requested)
        self.assertEqual(gate.requested_at_ms, requested)
        self.assertGreaterEqual(gate.decided_at_ms or 0, requested or 0)

    def test_denial_says_who_and_why(self) -> None:
        live = self.open()
        self.decide("denied", note="no", decided_by="bob")
        live.end()
        error = {"name": "TaskFailed", "message": "denied by bob: no", "code": "APPROVAL_DENIED"}
        self.assertEqual(self.error_of("gate"), error)

    def test_outcome_is_output_of_gate(self) -> None:
        late = {"timeout": 0.02, "on_timeout": "approve"}
        for script, gate, approved in (
            (f"{WAITS}; deny gate", Approval("gate", on_deny="continue"), False),
            (f"{WAITS}; deny gate", Approval("gate", on_deny="skip"), False),
            ("", Approval("gate", **late), True),
        ):
            run_id = f"{gate.on_deny}-{approved}"
            self.play(gate, script, run_id=run_id)
            self.assertIs(self.output("gate", run_id=run_id)["approved"], approved)

    def test_ctx_tells_denial_of_task(self) -> None:
        seen: list[Any] = []

        def workflow(ctx: Ctx) -> Workflow:
            seen.append(ctx.error("gate"))
            return Workflow("w", asking(continue_on_fail=True), AFTER)

        self.play(workflow, f"{WAITS}; deny gate")
        error = {"name": "TaskFailed", "message": "denied", "code": "APPROVAL_DENIED"}
        self.assertEqual(seen[-1], error)

    def test_same_decision_again_changes_nothing(self) -> None:
        live = self.open(Approval("gate", on_deny="continue"))
        self.decide("denied", note="first", decided_by="alice")
        self.decide("denied", note="second", decided_by="bob")
        live.end()
        self.decide("denied", note="third")
        self.assertEqual(self.told("ApprovalDenied"), ["ApprovalDenied gate 0 first alice"])
        self.assertEqual((self.gate().note, self.gate().decided_by), ("first", "alice"))

    def test_opposite_decision_is_refused(self) -> None:
        live = self.open()
        self.decide("approved")
        with self.assertRaises(ss.ApprovalNotPending):
            self.decide("denied")
        live.end()
        self.refused(ss.ApprovalNotPending, "denied")
        self.assertEqual(self.told("ApprovalDenied"), [])

    def test_one_of_many_decisions_wins(self) -> None:
        live = self.open(Approval("gate", on_deny="continue"))
        together = threading.Barrier(8)

        def decide(number: int) -> str:
            verdict = ("approved", "denied")[number % 2]
            adapter = self.adapter()
            together.wait(PATIENCE)
            try:
                ss.decide(adapter, "r", "gate", ss.Decision(verdict))
            except ss.ApprovalNotPending:
                return "refused"
            return verdict

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            said = Counter(pool.map(decide, range(8)))
        live.end()
        self.assertEqual(said, {"refused": 4, self.gate().status: 4})
        self.assertEqual(len(self.told("ApprovalGranted", "ApprovalDenied")), 1)

    def test_unknown_nodes_are_refused(self) -> None:
        live = self.open(Approval("gate"), AFTER)
        self.refused(ss.NodeNotFound, "approved", "ghost")
        self.refused(ss.NodeNotFound, "approved", iteration=1)
        self.refused(ss.RunNotFound, "approved", "gate", "ghost")
        self.refused(ss.ApprovalNotPending, "approved", "after")
        self.decide("approved", iteration=0)
        self.assertEqual(live.end().status, "finished")

    def test_cancel_closes_open_gate(self) -> None:
        why = "the run was cancelled"
        self.play(Approval("gate"), f"{WAITS}; cancel", "cancelled", f"NodeCancelled gate 0 {why}")
        self.assertEqual(self.gate().status, "cancelled")
        self.refused(ss.ApprovalNotPending, "approved")

    def test_run_counts_as_running_beside_gate(self) -> None:
        live = self.open(Parallel(Approval("gate"), Task("a", wait_for_go)))
        self.assertEqual(self.status(), "running")
        GO.set()
        live.wait(PARKS)
        self.assertEqual(self.status(), "waiting-approval")
        self.decide("approved")
        live.end()

    def test_unparked_run_returns_at_gate(self) -> None:
        elements = [Approval("gate"), *tasks("a")]
        self.play(elements, ends="waiting-approval", options={"park": False})
        self.decide("approved")
        self.play(elements, options={"park": False, "resume": True})
        self.assertEqual(self.starts(), "a")


# ---------------------------------------------------------------------------
# Durability: crash, resume, ownership, control from outside
# ---------------------------------------------------------------------------

# Run as `python -c SCRIPT database effects kill_at`: the process kills itself right after the
# commit of the kill_at-th event that its engine tells of, so that no point between two commits is
# left out.
CRASH_SCRIPT = """
import os, signal, sys
from smithers_serve import (
    Approval, Loop, Parallel, SmithersDb, Task, Workflow, current_task, run_workflow)

path, effects, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
told = 0

def see(event):
    global told
    told += 1
    if told == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

def step():
    task = current_task()
    with open(effects, "a") as file:
        file.write(f"{task.node_id} {task.iteration} {task.attempt}\\n")
    return {"turn": task.iteration}

def flaky():
    step()
    if current_task().attempt == 0:
        raise ValueError("first try")

def never():
    raise ValueError("always")

def workflow(ctx):
    turn = (ctx.output("turn") or {"turn": -1})["turn"]
    mend = Task("mend", step) if ctx.error("never") else None
    return Workflow("crash",
        Task("first", step),
        Parallel(Task("flaky", flaky, retries=3), Task("never", never, continue_on_fail=True)),
        mend,
        Loop(Task("turn", step), id="loop", until=turn >= 1),
        Approval("gate", timeout=0.01, on_timeout="approve"),
        Task("last", step))

db = SmithersDb(path)
resume = db.get_run("r") is not None
result = run_workflow(workflow, adapter=db, run_id="r", resume=resume, on_event=see)
print(result.status, told)
"""

HOLD_SCRIPT = """
import sys, threading
from smithers_serve import Approval, Parallel, SmithersDb, Task, Workflow, run_workflow

def bad():
    raise ValueError

def hold():
    threading.Event().wait()

def see(event):
    print(event.type, event.payload.get("nodeId", ""), file=sys.stderr, flush=True)

trees = {
    "task": [Task("a", {"x": 1}), Task("hold", hold)],
    "gate": [Task("a", {"x": 1}), Approval("gate")],
    "drain": [Parallel(Task("bad", bad), Task("hold", hold))],
}
db = SmithersDb(sys.argv[1])
run_workflow(Workflow("test", *trees[sys.argv[2]]), adapter=db, run_id="r", on_event=see)
"""

FILL_WORKFLOW = """
from smithers_serve import Task, Workflow

def fill():
    return "x" * 20000

workflow = Workflow("fill", *[Task(f"n{i}", fill) for i in range(40)])
"""


def wait_in_second_turn() -> None:
    if current_task().iteration == 1:
        wait_once()


def fail_after_stop() -> None:
    if current_task().attempt == 1:
        current_task().cancelled.wait(PATIENCE)
    raise ValueError


def mended(ctx: Ctx) -> Workflow:
    mend = Task("mend", wait_once) if ctx.error("a") else None
    return Workflow("w", Task("a", fail, continue_on_fail=True), mend)


def held_in_second_turn(ctx: Ctx) -> Workflow:
    hold = Task("hold", wait_once) if ctx.iteration("inner") == 1 else None
    return Workflow("w", loop(loop(*tasks("t"), hold, id="inner"), id="outer", turns=1))


class DurabilityTest(RunCase):
    ROWS = {
        "cancelled run resumes": Row(
            [*tasks("a"), Task("hold", wait_once), Approval("gate", skip_if=True)],
            "NodeStarted hold; cancel; retry",
            tells="NodeStarted a 0 0, hold 0 0, hold 0 1",
        ),
        "cancelled gate is asked again": Row(
            Approval("gate"), f"{WAITS}; cancel; retry; {WAITS}; approve gate"
        ),
        "denied gate of failed run asks again": Row(
            Approval("gate"), f"{WAITS}; deny gate; retry; {WAITS}; approve gate"
        ),
        "failed nodes get fresh try": Row(
            [*tasks("a"), Task("b", fail_until_go, retries=1), *tasks("c")],
            "end; go; retry",
            tells="NodeStarted a 0 0, b 0 0, b 0 1, b 0 2, c 0 0",
        ),
        "run cancelled while draining resumes": Row(
            Parallel(Task("bad", fail_until_go), Task("hold", wait_once)),
            "NodeFailed bad; cancel; end; go; retry",
        ),
        "resume still knows old errors": Row(
            mended,
            "NodeStarted mend; cancel; retry",
            tells="NodeStarted a 0 0, mend 0 0, mend 0 1",
            states="a failed, mend finished",
        ),
        "resume still knows nested iteration": Row(
            held_in_second_turn,
            "NodeStarted hold@@outer=0; cancel; retry",
            states="t@@outer=0 finished, hold@@outer=0 finished",
        ),
        "loop goes on at its iteration": Row(
            loop(Task("t", wait_in_second_turn), turns=3),
            "NodeStarted t 1; cancel; retry",
            tells="NodeStarted t 0 0, t 1 0, t 1 1, t 2 0",
        ),
        "retries are counted over resume": Row(
            Task("a", fail_after_stop, retries=1),
            "NodeStarted a 0 1; cancel; retry",
            "failed",
            "NodeStarted a 0 0, NodeFailed a 0 0 ValueError, "
            "NodeStarted a 0 1, a 0 2, NodeFailed a 0 2 ValueError",
        ),
    }

    def crash(self, name: str, kill_at: int) -> str:
        """Live one life of the crash run in database `name`; return what it prints at its end."""
        paths = [self.in_folder(name + end) for end in (".db", ".effects")]
        code, out, err = run_child("-c", CRASH_SCRIPT, *paths, kill_at)
        if code not in (0, -signal.SIGKILL):
            raise AssertionError(err)
        return out

    def live_thrice(self, kill_at: int) -> str:
        """Kill a run at an event, kill its resume too, and let the third life go to the end."""
        for point in (kill_at, 1 + kill_at % 3):
            self.crash(f"kill-{kill_at}", point)
            check_integrity(self.in_folder(f"kill-{kill_at}.db"))
        return self.crash(f"kill-{kill_at}", 0)

    def test_killed_run_resumes_at_every_point(self) -> None:
        self.crash("whole", 0)
        with contextlib.closing(ss.SmithersDb(self.in_folder("whole.db"))) as db:
            whole = len(db.list_events("r"))
        points = sorted({1 + whole * number // 14 for number in range(14)})
        self.assertGreaterEqual(len(points), 8)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            ends = dict(zip(points, pool.map(self.live_thrice, points)))
        for point in points:
            with self.subTest(kill_at=point):
                self.assertEqual(ends[point].split()[0], "finished")
                self.check_crashed(self.in_folder(f"kill-{point}"))

    def check_crashed(self, name: str) -> None:
        with contextlib.closing(ss.SmithersDb(f"{name}.db")) as db:
            self.check_database(db)
            states = {(n.node_id, n.iteration): n.state for n in db.list_nodes("r")}
            attempts = db.list_attempts("r")
        done = [("turn", 1), *((id, 0) for id in "first flaky gate last mend turn".split())]
        self.assertEqual(states, {**dict.fromkeys(done, "finished"), ("never", 0): "failed"})
        with open(f"{name}.effects") as file:
            effects = [tuple(line.split()) for line in file]
        self.assertEqual(len(effects), len(set(effects)), "an attempt ran twice")
        newest = {
            (node_id, int(iteration)): int(attempt) for node_id, iteration, attempt in effects
        }
        for a in attempts:
            if a.state == "finished":
                self.assertEqual(newest[a.node_id, a.iteration], a.attempt)

    def hold(self, what: str, until: str) -> None:
        """Run HOLD_SCRIPT in a process of its own and kill it when it has told of `until`."""
        with Child("-c", HOLD_SCRIPT, self.path, what) as child:
            child.wait_for(f"^{until}$")
            child.process.kill()
        check_integrity(self.path)

    def test_interrupted_attempt_becomes_cancelled(self) -> None:
        self.hold("task", "NodeStarted hold")
        self.play(
            [*tasks("a", fail), *tasks("hold")],
            tells="NodeStarted a 0 0, NodeStarted hold 0 0, "
            "NodeCancelled hold 0 0 the run was interrupted, NodeStarted hold 0 1",
            options={"resume": True},
        )
        self.assertEqual(self.attempts(), "a 0 finished, hold 0 cancelled, hold 1 finished")

    def test_run_killed_while_draining_resumes(self) -> None:
        self.hold("drain", "NodeFailed bad")
        tree = Parallel(*tasks("bad hold"))
        self.play(tree, ends="failed", options={"resume": True})
        self.play(tree, states="bad finished, hold finished", options={"retry": True})

    def test_failed_run_cancelled_at_resume_resumes(self) -> None:
        abort = threading.Event()
        abort.set()
        self.play(Task("a", fail), ends="failed")
        self.play(tasks("a"), ends="cancelled", options={"retry": True, "abort": abort})
        self.play(tasks("a"), options={"retry": True})

    def test_gate_stays_open_over_crash(self) -> None:
        self.hold("gate", WAITS)
        requested = self.gate().requested_at_ms
        self.play(
            [*tasks("a", fail), Approval("gate")],
            "RunStatusChanged running; approve gate",
            tells="ApprovalRequested gate 0, ApprovalGranted gate 0",
            options={"resume": True},
        )
        self.assertEqual(self.gate().requested_at_ms, requested)

    def test_decision_without_engine_counts_at_resume(self) -> None:
        self.hold("gate", WAITS)
        self.decide("approved")
        self.play(
            [*tasks("a", fail), Approval("gate")],
            tells="ApprovalRequested gate 0, ApprovalGranted gate 0",
            options={"resume": True},
        )

    def test_cancel_with_dead_owner_ends_run(self) -> None:
        self.hold("task", "NodeStarted hold")
        self.cancel()
        self.assertEqual(self.status(), "cancelled")
        self.assertEqual(self.states(), {"a": "finished", "hold": "cancelled"})
        self.play([*tasks("a", fail), *tasks("hold")], options={"retry": True})

    def test_finished_run_is_left_alone(self) -> None:
        self.drive(tasks("a"))
        before = self.told()
        self.play(tasks("a", fail), options={"resume": True})
        self.assertEqual(self.told(), before)

    def test_resume_begins_run_that_is_not_there(self) -> None:
        self.play(tasks("a"), options={"resume": True})

    def test_resume_keeps_input_of_beginning(self) -> None:
        seen: list[Any] = []

        def workflow(ctx: Ctx) -> Workflow:
            seen.append(ctx.input)
            return Workflow("w", *tasks("a", fail))

        self.drive(workflow, input={"x": 1})
        self.drive(workflow, retry=True, input={"x": 2})
        self.assertEqual(seen, [{"x": 1}] * 3)

    def test_second_engine_is_refused(self) -> None:
        live = self.start(Approval("gate"))
        live.wait(WAITS)
        before = self.told()
        with self.assertRaises(ss.RunOwned):
            self.drive(tasks("a"), adapter=self.adapter(), resume=True)
        self.assertEqual(self.told(), before)
        self.decide("approved")
        live.end()

    def test_one_of_many_engines_owns_run(self) -> None:
        self.play(Task("a", fail), ends="failed")
        adapters = [self.adapter() for _ in range(8)]
        together = threading.Barrier(8)
        refused = threading.Semaphore(0)

        def resume(adapter: ss.SmithersDb) -> str:
            together.wait(PATIENCE)
            try:
                return self.drive(Task("a", wait_for_go), adapter=adapter, retry=True).status
            except ss.RunOwned:
                refused.release()
                return "refused"

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(resume, adapter) for adapter in adapters]
            for _ in range(7):
                self.assertTrue(refused.acquire(timeout=PATIENCE))
            GO.set()
        ends = Counter(future.result() for future in futures)
        self.assertEqual(ends, {"finished": 1, "refused": 7})

    def test_forced_takeover_fences_first_engine(self) -> None:
        old = self.start(Task("a", wait_once))
        old.wait("NodeStarted a")
        second = Task("a", lambda: "second")
        new = self.start(second, adapter=self.adapter(), resume=True, force=True)
        self.assertEqual(new.end().status, "finished")
        with self.assertRaises(ss.OwnerLost):
            old.end()
        self.assertEqual(self.output("a"), "second")
        self.assertEqual(len(self.told("RunFinished")), 1)
        self.assertEqual(self.attempts(), "a 0 cancelled, a 1 finished")

    def test_cancel_from_other_adapter_stops_run(self) -> None:
        live = self.start(Task("a", wait_for_stop))
        live.wait("NodeStarted a")
        self.cancel(adapter=self.adapter())
        self.assertEqual(live.end().status, "cancelled")

    def test_run_waits_for_write_lock(self) -> None:
        live = self.start([Task("a", wait_for_go), *tasks("b")])
        live.wait("NodeStarted a")
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("begin immediate")
            GO.set()
            self.assertTrue(live.is_running(0.3))
            self.assertEqual(self.states(), {"a": "in-progress", "b": "pending"})
            other.execute("rollback")
        self.assertEqual(live.end().status, "finished")

    def test_full_disk_stops_engine_with_one_line(self) -> None:
        command = ["-m", "smithers_serve", "up", self.write("fill.py", FILL_WORKFLOW)]
        command += ["--run-id", "r", "--db", self.path]
        self.db.close()
        code, _, err = run_child(*command, limit="ulimit -f 600")  # blocks of 512 bytes
        self.db = self.adapter()
        self.assertEqual(code, 1, err)
        stopped = [line for line in err.splitlines() if "n0" not in line]
        self.assertIn("[smithers] Engine stopped: cannot write the database:", stopped[-1])
        self.assertNotIn("Traceback", err)
        self.assertLess(len(self.told("NodeFinished")), 40)
        code, _, err = run_child(*command, "--resume")
        self.assertEqual(code, 0, err)
        self.assertEqual(set(self.states().values()), {"finished"})
        self.assertEqual(len(self.told("NodeFinished")), 40)

    def test_file_that_is_no_database_is_refused(self) -> None:
        path = self.write("notes.txt", "these are my notes\n" * 100)
        with self.assertRaisesRegex(ss.StorageError, "notes.txt"):
            ss.SmithersDb(path)
        with open(path) as file:
            self.assertEqual(file.read(), "these are my notes\n" * 100)
        for wrong in (self.folder, self.in_folder("no", "such.db")):
            with self.assertRaises(ss.StorageError):
                ss.SmithersDb(wrong)

    def test_new_files_are_private(self) -> None:
        self.drive(tasks("a"))
        for name in os.listdir(self.folder):
            mode = stat.S_IMODE(os.stat(self.in_folder(name)).st_mode)
            self.assertEqual(oct(mode), oct(0o600), name)

    def test_columns_are_added_and_foreign_kept(self) -> None:
        path = self.in_folder("old.db")
        change(
            path,
            "create table _smithers_runs (run_id text primary key, status text not null, "
            "workflow_name text not null, created_at_ms integer not null, theirs text)",
            "insert into _smithers_runs values ('old', 'finished', 'w', 5, 'kept')",
            "create table _smithers_nodes (run_id text, node_id text, iteration integer, "
            "state text, extra text, primary key (run_id, node_id, iteration))",
            "insert into _smithers_nodes values ('old', 'a', 0, 'finished', 'kept')",
            "create table foreign_table (x)",
        )
        with contextlib.closing(ss.SmithersDb(path)) as db:
            app = ss.create_serve_app(adapter=db, run_id="old")
            shown = app.request("GET", "/", headers={"Host": "localhost"}).json()
            self.assertEqual((shown["status"], shown["summary"]), ("finished", {"finished": 1}))
            app.close()
            self.play_in(db, "new")
        found = rows(path)
        self.assertEqual(found["_smithers_runs"][0]["theirs"], "kept")
        self.assertEqual(found["_smithers_nodes"][0]["extra"], "kept")
        self.assertEqual(found["foreign_table"], [])

    def play_in(self, db: ss.SmithersDb, run_id: str) -> None:
        done = ss.run_workflow(as_workflow(tasks("a")), adapter=db, run_id=run_id)
        self.assertEqual(done.status, "finished")

    def test_two_runs_share_one_file(self) -> None:
        adapters = {"one": self.db, "two": self.db, "three": self.adapter()}
        lives = [self.start(Task("a", wait_for_go), *pair) for pair in adapters.items()]
        for live in lives:
            live.wait("NodeStarted a")
        GO.set()
        self.assertEqual([live.end().status for live in lives], ["finished"] * 3)

    def test_without_shared_memory_the_file_works_too(self) -> None:
        path = self.in_folder("network.db")
        os.mkdir(path + "-shm")  # sqlite cannot make its shared memory here
        with contextlib.closing(ss.SmithersDb(path)) as db:
            self.play_in(db, "run")


def check_integrity(path: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        found = db.execute("pragma integrity_check").fetchone()[0]
        if found != "ok":
            raise AssertionError(found)


# ---------------------------------------------------------------------------
# Executors
# ---------------------------------------------------------------------------


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")
        self.lock = threading.Lock()


def remote_double(value: int, by: int = 2) -> dict[str, Any]:
    task = current_task()
    task.log(f"doubling {value}")
    return {"value": value * by, "pid": os.getpid(), "node": task.node_id, "try": task.attempt}


def remote_keep(value: Any) -> Any:
    return value


async def remote_coroutine() -> str:
    await asyncio.sleep(0)
    return current_task().node_id


def remote_fail() -> None:
    raise Unpicklable("no", "luck")


def remote_die() -> None:
    os._exit(7)


class ExecutorTest(RunCase):
    processes: concurrent.futures.Executor

    @classmethod
    def setUpClass(cls) -> None:
        try:
            cls.processes = cls.make_processes()
        except OSError as error:
            raise unittest.SkipTest(f"no process pools here: {error}") from error
        cls.addClassCleanup(cls.processes.shutdown)

    @staticmethod
    def make_processes() -> concurrent.futures.Executor:
        context = multiprocessing.get_context("spawn")
        return concurrent.futures.ProcessPoolExecutor(1, mp_context=context)

    def threads(self, count: int = 4) -> concurrent.futures.Executor:
        pool = concurrent.futures.ThreadPoolExecutor(count)
        self.addCleanup(pool.shutdown)
        return pool

    def test_threads_of_an_executor_run_tasks(self) -> None:
        def where() -> str:
            current_task().log("here")
            return threading.current_thread().name

        options = {"executor": self.threads()}
        self.play(Task("a", where), tells="NodeOutput a 0 0 here stdout", options=options)
        self.assertIn("ThreadPoolExecutor", self.output("a"))

    def test_process_pool_runs_tasks_elsewhere(self) -> None:
        self.play(
            [
                Task("a", remote_double, args=[4], kwargs={"by": 3}),
                Task("b", remote_coroutine),
                Task("c", ["sh", "-c", "echo local"]),
                Task("d", remote_keep, needs={"value": "a"}),
            ],
            tells="NodeOutput a 0 0 doubling 4 stdout, c 0 0 local stdout",
            options={"executor": self.processes},
        )
        output = self.output("a")
        self.assertEqual(self.output("d"), output)
        self.assertNotEqual(output.pop("pid"), os.getpid())
        self.assertEqual(output, {"value": 12, "node": "a", "try": 0})
        self.assertEqual((self.output("b"), self.output("c")["stdout"]), ("b", "local\n"))

    def test_unpicklable_exception_comes_back_as_text(self) -> None:
        self.drive(Task("a", remote_fail, retries=1), executor=self.processes)
        self.assertEqual(self.error_of("a"), {"name": "Unpicklable", "message": "no luck"})
        self.assertEqual(self.starts(), "a a")

    def test_unpicklable_function_fails_its_task(self) -> None:
        wrong = Task("a", remote_keep, args=[threading.Lock()], continue_on_fail=True)
        self.play(
            [wrong, Task("b", remote_double, args=[1])],
            tells="NodeFailed a 0 0 EXECUTOR_FAILED",
            options={"executor": self.processes},
        )

    def test_worker_that_dies_fails_attempt(self) -> None:
        pool = self.make_processes()
        self.addCleanup(pool.shutdown)
        self.play(
            [Task("a", remote_die, continue_on_fail=True), *tasks("b")],
            ends="failed",
            tells="NodeFailed a 0 0 WORKER_CRASHED, b 0 0 WORKER_CRASHED",
            options={"executor": pool},
        )
        for node_id in ("a", "b"):
            self.assertIn("BrokenProcessPool", self.error_of(node_id)["message"])

    def test_closed_executor_fails_task_with_reason(self) -> None:
        pool = self.threads()
        pool.shutdown()
        self.play(tasks("a"), ends="failed", options={"executor": pool})
        self.assertIn("shutdown", self.error_of("a")["message"])

    def test_cancel_takes_back_what_waits_in_executor(self) -> None:
        ran: list[str] = []

        def hold() -> None:
            ran.append("hold")
            wait_once()

        options = {"executor": self.threads(1)}
        tree = Parallel(*tasks("a b", hold))
        self.play(tree, "NodeStarted b; cancel", "cancelled", options=options)
        self.assertLessEqual(len(ran), 1)

    @IMPATIENT
    def test_late_result_of_executor_is_dropped(self) -> None:
        begun = threading.Event()

        def late() -> str:
            begun.set()
            wait_for_go()
            return "late"

        pool = self.threads()
        live = self.start(Task("a", late), executor=pool)
        self.assertTrue(begun.wait(PATIENCE))
        self.cancel()
        self.assertEqual(live.end().status, "cancelled")
        before = self.told()
        GO.set()
        pool.shutdown()
        self.assertEqual(self.told(), before)
        self.assertIsNone(self.output("a"))


# ---------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------

ACCEPTED = {"runId": RUN}


class StatusTest(ServerCase):
    def test_status_has_the_specified_keys(self) -> None:
        body = self.assert_ask(200, "GET", "/").body
        keys = ["runId", "workflowName", "status", "startedAtMs", "finishedAtMs", "summary"]
        self.assertEqual(list(body), keys)
        self.assertIsInstance(body.pop("startedAtMs"), int)
        self.assertEqual(
            body,
            {
                "runId": RUN,
                "workflowName": "release",
                "status": "waiting-approval",
                "finishedAtMs": None,
                "summary": {"finished": 1, "waiting-approval": 1, "pending": 1},
            },
        )

    def test_json_is_compact_and_private(self) -> None:
        raw = send(self.served.port, get(path=b"/"))
        ((_, headers, body),) = split(raw)
        self.assertEqual(headers["content-type"], "application/json")
        self.assertEqual(headers["cache-control"], "no-store")
        self.assertEqual(headers["x-content-type-options"], "nosniff")
        compact = json.dumps(body, separators=(",", ":")).encode()
        self.assertEqual(raw.partition(b"\r\n\r\n")[2], compact)

    def test_status_before_the_run_exists(self) -> None:
        self.served = self.serve("unborn")
        for question in ("GET /", "GET /frames", "POST /cancel", "POST /approve/deploy"):
            self.assert_refused(404, "RUN_NOT_FOUND", "unborn", *question.split())

    def test_a_run_that_fails_at_render_is_shown(self) -> None:
        served = self.fresh()
        with self.assertLogs("smithers_serve", logging.ERROR):
            served.start(lambda ctx: 1 / 0).end()
        self.assertEqual(served.status(), "failed")

    def test_another_processes_commit_shows_at_once(self) -> None:
        served = self.at_gate(db=self.foreign_database())
        self.assertEqual(served.status(), "waiting-approval")
        change(served.path, "update _smithers_runs set status = 'failed', finished_at_ms = 7")
        body = served.ask("GET", "/").body
        self.assertEqual((body["status"], body["finishedAtMs"]), ("failed", 7))

    def test_every_get_answers_head(self) -> None:
        for path in ("/health", "/", "/frames", "/metrics", "/nowhere"):
            with self.subTest(path=path):
                got, head = self.served.ask("GET", path), self.served.ask("HEAD", path)
                self.assertEqual((head.status, head.body), (got.status, ""))
                for reply in (got, head):
                    reply.headers.pop("date")
                    if path == "/metrics":  # the second scrape has the first one in it
                        reply.headers["content-length"] = str(len(reply.headers["content-length"]))
                self.assertEqual(head.headers, got.headers)

    def test_wrong_methods_are_told_what_is_allowed(self) -> None:
        wrong = [("POST", p, "GET, HEAD") for p in ("/health", "/", "/events", "/frames")]
        wrong += [("DELETE", "/metrics", "GET, HEAD"), ("PUT", "/cancel", "POST")]
        wrong += [(m, p, "POST") for m in ("GET", "HEAD") for p in ("/approve/a", "/deny/a")]
        before = rows(self.path)
        for method, path, allow in wrong:
            with self.subTest(method=method, path=path):
                reply = self.assert_ask(404, method, path)
                self.assertEqual(reply.headers.get("allow"), allow)
                if method != "HEAD":
                    self.assert_error(reply, 404, "NOT_FOUND")
        self.assertEqual(rows(self.path), before)

    def test_unknown_routes_are_not_found(self) -> None:
        for path in ("/nowhere", "/health/", "//", "/frames/1", "/approve", "/approve/", "/v1/x"):
            for method in ("GET", "POST", "BREW"):
                with self.subTest(method=method, path=path):
                    reply = self.served.ask(method, path)
                    self.assert_error(reply, 404, "NOT_FOUND")
                    self.assertNotIn("allow", reply.headers)


class FramesCase(ServerCase):
    def serve_frames(self, count: int, size: int) -> RunServer:
        """Serve a run with so many frames, each with so many bytes of tree."""
        served = self.at_gate(db=self.foreign_database())
        change(
            served.path,
            "delete from _smithers_frames",
            f"""with recursive numbers(n) as (select 1 union all select n + 1 from numbers
            where n < {count}) insert into _smithers_frames
            (run_id, frame_no, xml_json, xml_hash, mounted_task_ids_json, task_index_json)
            select '{served.run_id}', n, printf('%.{size - 4}c', 'x'), 'hash', '[]', '[]'
            from numbers""",
        )
        return served


class FramesTest(FramesCase):
    def looped(self) -> list[dict[str, Any]]:
        """Serve a run of many frames instead and return them, oldest first."""

        def workflow(ctx: Ctx) -> Workflow:
            done = sum(ctx.output(f"t{i}") is not None for i in range(8))
            return Workflow("grow", *(Task(f"t{i}", {"n": i}) for i in range(min(8, done + 1))))

        self.served = self.fresh()
        self.served.start(workflow).end()
        return self.frames("?afterFrameNo=-1")

    def frames(self, query: str = "") -> Any:
        return self.assert_ask(200, "GET", f"/frames{query}").body

    def test_a_frame_has_the_originals_keys(self) -> None:
        (frame,) = self.frames()
        keys = "runId frameNo createdAtMs xmlJson xmlHash mountedTaskIdsJson taskIndexJson note"
        self.assertEqual(list(frame), keys.split())
        self.assertEqual(json.loads(frame["xmlJson"])["tag"], "smithers:workflow")
        self.assertEqual(frame["mountedTaskIdsJson"], '["build::0","deploy::0","announce::0"]')

    def test_newest_frames_come_first(self) -> None:
        frames = self.looped()
        self.assertGreater(len(frames), 5)
        self.assertEqual(self.frames("?limit=3"), frames[::-1][:3])
        self.assertEqual(self.frames(), frames[::-1])

    def test_large_frames_come_a_few_at_a_time(self) -> None:
        self.served = self.serve_frames(12, 1 << 20)
        for query, numbers in (("", range(12, 4, -1)), ("?afterFrameNo=0", range(1, 9))):
            self.assertEqual([f["frameNo"] for f in self.frames(query)], list(numbers))
        self.served = self.serve_frames(2, 9 << 20)
        self.assertEqual(len(self.frames()), 1)

    def test_paging_forward_loses_no_frame(self) -> None:
        frames = self.looped()
        for size in (1, 2, 3, 50):
            seen: list[dict[str, Any]] = []
            page, after = frames, -1
            while page:
                page = self.frames(f"?limit={size}&afterFrameNo={after}")
                self.assertLessEqual(len(page), size)
                seen += page
                after = seen[-1]["frameNo"]
            self.assertEqual(seen, frames)

    def test_bad_query_values_say_which(self) -> None:
        limits = ("", "x", "0", "-1", "1.5", "1_0", "+1", "%201", "1e2", "²", "9" * 19, "9" * 5000)
        numbers = ("", "x", "-2", "1.0", "²", str(2**63), "9" * 5000)
        for route, name, values in (
            ("/frames", "limit", limits),
            ("/frames", "afterFrameNo", numbers),
            ("/events", "afterSeq", numbers),
        ):
            for value in values:
                path = f"{route}?{name}={urllib.parse.quote(value, safe='%')}"
                self.assert_refused(400, "INVALID_REQUEST", name, "GET", path)

    def test_repeated_or_malformed_queries_are_refused(self) -> None:
        for query in ("limit=1&limit=2", "limit=1&%6cimit=1", "limit=%", "limit=%ff", "x=%zz"):
            self.assert_refused(400, "INVALID_REQUEST", "", "GET", f"/frames?{query}")

    def test_unknown_query_parameters_are_ignored(self) -> None:
        for query in ("?limit=1&x=2", "?&&limit=1&", "?limit=1&flag", "?%6cimit=1"):
            self.assertEqual(len(self.frames(query)), 1)

    def test_the_greatest_numbers_are_taken(self) -> None:
        top = 2**63 - 1
        self.assertEqual(len(self.frames(f"?limit={top}")), 1)
        self.assertEqual(self.frames(f"?afterFrameNo={top}"), [])


# Each body with what its refusal names.
# fmt: off
BAD_BODIES: tuple[tuple[bytes, str], ...] = (
    *((body, "JSON") for body in (
        b"{", b"{}x", b"{'note':'a'}", b"\xef\xbb\xbf{}", "{}".encode("utf-16"),
        b'{"note":"\xff"}', b'{"note":"\\ud800"}', b'{"x":NaN}', b'{"iteration":-Infinity}',
        b'{"note":"a","note":"b"}', b'{"note":"a\nb"}', b"[" * 100_000,
        b'{"x":' * 50_000 + b"1" + b"}" * 50_000,
    )),
    *((body, "object") for body in (b"null", b"[]", b'"x"', b"1", b"true")),
    *((b'{"iteration":' + value + b"}", "iteration") for value in (
        b'"0"', b"true", b"-1", b"0.0", b"[0]", b"9223372036854775808",
    )),
    (b'{"iteration":' + b"9" * 5000 + b"}", ""),
    (b'{"iteration":1e999}', "1e999"),
    *((b'{"note":' + value + b"}", "note") for value in (
        b"1", b'["a"]', b'"%b"' % (b"n" * 10_001),
    )),
    *((b'{"decidedBy":' + value + b"}", "decidedBy") for value in (b"{}", b'"%b"' % (b"d" * 201))),
)
# fmt: on


class DecisionTest(ServerCase):
    def refuse_decision(
        self, status: int, code: str, says: str, node: str, body: Any = None
    ) -> None:
        """Assert that a node can be neither approved nor denied so."""
        for verdict in ("approve", "deny"):
            self.assert_refused(status, code, says, "POST", f"/{verdict}/{node}", body)

    def test_a_decision_is_stored_with_its_words(self) -> None:
        said = {"iteration": 0, "note": "Looks good", "decidedBy": "alice"}
        for path, status, type in (
            ("/approve/deploy", "approved", "ApprovalGranted"),
            ("/deny/deploy", "denied", "ApprovalDenied"),
        ):
            served = self.at_gate()
            reply = served.ask("POST", path, said)
            self.assertEqual((reply.status, reply.body), (200, {"runId": served.run_id}))
            gate = self.gate(served.run_id)
            found = (gate.status, gate.note, gate.decided_by)
            self.assertEqual(found, (status, "Looks good", "alice"))
            self.assertIsNotNone(gate.requested_at_ms)
            event = served.events()[-1]
            self.assertEqual(
                event.payload_json,
                f'{{"type":"{type}","runId":"{served.run_id}","nodeId":"deploy","iteration":0,'
                f'"note":"Looks good","decidedBy":"alice","timestampMs":{event.timestamp_ms}}}',
            )

    def test_all_fields_are_optional(self) -> None:
        for body in (None, b"", {}, {"note": None, "iteration": None, "decidedBy": None}):
            with self.subTest(body=body):
                served = self.at_gate()
                self.assertEqual(served.ask("POST", "/approve/deploy", body).status, 200)
                self.assertEqual(self.gate(served.run_id).status, "approved")

    def test_content_type_does_not_matter(self) -> None:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d sends
        self.assert_ask(200, "POST", "/approve/deploy", {"note": "Ship it"}, headers)
        self.assertEqual(self.gate(RUN).note, "Ship it")

    def test_unknown_nodes_and_iterations_are_not_found(self) -> None:
        self.refuse_decision(404, "NODE_NOT_FOUND", "nobody", "nobody")
        for iteration in (1, 2**63 - 1):
            body = {"iteration": iteration}
            self.refuse_decision(404, "NODE_NOT_FOUND", "deploy", "deploy", body)

    def test_a_node_without_gate_is_not_pending(self) -> None:
        for node in ("build", "announce"):
            self.refuse_decision(409, "APPROVAL_NOT_PENDING", node, node)

    def test_the_same_decision_again_changes_nothing(self) -> None:
        self.assert_ask(200, "POST", "/approve/deploy", {"note": "first"})
        before = rows(self.path)
        reply = self.assert_ask(200, "POST", "/approve/deploy", {"note": "second"})
        self.assertEqual((reply.body, rows(self.path)), (ACCEPTED, before))

    def test_the_opposite_decision_is_refused(self) -> None:
        for first, second in (("approve", "deny"), ("deny", "approve")):
            self.served = self.at_gate()
            self.assert_ask(200, "POST", f"/{first}/deploy")
            path = f"/{second}/deploy"
            self.assert_refused(409, "APPROVAL_NOT_PENDING", "deploy", "POST", path)

    def test_bad_bodies_are_refused_and_change_nothing(self) -> None:
        for body, says in BAD_BODIES:
            self.refuse_decision(400, "INVALID_REQUEST", says, "deploy", body)

    def test_bodies_nested_at_any_depth_are_answered(self) -> None:
        for depth in (10, 499, 500, *range(900, 1005), 100_000):
            body = b'{"a":"\\u0041","x":' + b"[" * depth + b"]" * depth + b"}"
            says = "field 'a'" if depth < 500 else "nested too deeply"
            reply = self.served.ask("POST", "/approve/nobody", body)
            self.assert_error(reply, 400, "INVALID_REQUEST", says)

    def test_a_gate_of_an_ended_run_is_closed(self) -> None:
        self.assert_ask(200, "POST", "/cancel")
        self.refuse_decision(409, "APPROVAL_NOT_PENDING", "deploy", "deploy")

    def test_node_ids_are_percent_decoded_once(self) -> None:
        for path, node in (("%2564eploy", "%64eploy"), ("a%2Fb", "a/b"), ("a+b", "a+b")):
            self.refuse_decision(404, "NODE_NOT_FOUND", f"'{node}'", path)
        for path in ("%", "%zz", "%ff", "%ed%a0%80"):
            self.refuse_decision(400, "INVALID_REQUEST", "path", path)
        self.assert_ask(200, "POST", "/approve/%64eploy")

    def test_one_of_many_deciders_wins(self) -> None:
        start = threading.Barrier(8)

        def decide(verdict: str) -> int:
            start.wait(PATIENCE)
            return self.served.ask("POST", f"/{verdict}/deploy").status

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = Counter(pool.map(decide, ("approve", "deny") * 4))
        self.assertEqual(found, {200: 4, 409: 4})
        self.assertEqual(len(self.told("ApprovalGranted", "ApprovalDenied", run_id=RUN)), 1)


class SteeringTest(ServerCase):
    """What a POST does to a run whose engine lives."""

    def test_a_parked_run_goes_where_it_is_sent(self) -> None:
        finished = {"finished": 3}
        for path, status, summary in (
            ("/approve/deploy", "finished", finished),
            ("/deny/deploy", "failed", {"finished": 1, "failed": 1, "pending": 1}),
            ("/cancel", "cancelled", {"finished": 1, "cancelled": 1, "pending": 1}),
        ):
            with self.subTest(path=path):
                served = self.fresh()
                live = served.start(until=PARKS)
                reply = served.ask("POST", path)
                self.assertEqual((reply.status, reply.body), (200, {"runId": served.run_id}))
                live.end()
                body = served.ask("GET", "/").body
                self.assertEqual((body["status"], body["summary"]), (status, summary))
                self.assertEqual(served.events()[-1].type, LAST_EVENTS[status])

    def test_a_run_without_engine_is_cancelled(self) -> None:
        self.assert_ask(200, "POST", "/cancel")
        self.assertEqual(self.served.status(), "cancelled")

    def test_an_ended_run_is_not_active(self) -> None:
        self.assert_ask(200, "POST", "/cancel")
        self.assert_refused(409, "RUN_NOT_ACTIVE", "cancelled", "POST", "/cancel")
        self.assertTrue(self.served.abort.is_set())

    def test_a_refused_cancel_aborts_nothing(self) -> None:
        served = self.at_gate(token="tok")
        self.assert_error(served.ask("POST", "/cancel"), 401, "UNAUTHORIZED")
        self.assertFalse(served.abort.is_set())


class HealthTest(ServerCase):
    token = "tok"

    def test_health_needs_no_token(self) -> None:
        for headers in ({}, bearer("wrong"), bearer()):
            reply = self.assert_ask(200, "GET", "/health", None, headers)
            self.assertEqual(reply.body, {"ok": True})

    def test_health_needs_no_database(self) -> None:
        self.served = self.at_gate(db=self.foreign_database())
        with contextlib.closing(sqlite3.connect(self.served.path)) as other:
            other.execute("begin exclusive")
            self.assert_ask(200, "GET", "/health")
        self.served.db.close()
        self.assert_ask(200, "GET", "/health")

    def test_health_answers_while_tasks_block(self) -> None:
        served = self.fresh()
        served.start(Task("wait", wait_for_go), "NodeStarted wait")
        self.assertEqual(served.ask("GET", "/health").body, {"ok": True})
        self.assertEqual(served.ask("GET", "/").body["summary"], {"in-progress": 1})
        GO.set()


# ---------------------------------------------------------------------------
# Event stream
# ---------------------------------------------------------------------------


def fill(served: RunServer, count: int, size: int = 1) -> int:
    """Add events with so much text to the log of a run, as another process would."""
    change(
        served.path,
        f"""with recursive numbers(n) as (select 1 union all select n + 1 from numbers
        where n < {count}) insert into _smithers_events (run_id, seq, type, payload_json)
        select '{served.run_id}', {served.newest()} + n, 'NodeOutput',
        '{{"type":"NodeOutput","runId":"{served.run_id}","nodeId":"build","iteration":0,'
        || '"attempt":0,"text":"{"x" * size}","stream":"stdout","timestampMs":0}}'
        from numbers""",
    )
    return served.newest()


class EventStreamTest(ServerCase):
    def finished(self) -> RunServer:
        """Serve a run that has ended."""
        served = self.fresh()
        served.start([Task("a", {"n": 1}), Task("b", {"n": 2})]).end()
        return served

    def test_a_finished_run_is_sent_in_exact_bytes(self) -> None:
        served = self.finished()
        text = sse_of(served.events())
        head, _, body = send(served.port, get(path=b"/events"), end=False).partition(b"\r\n\r\n")
        self.assertRegex(
            head.decode(),
            r"\AHTTP/1\.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            r"Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\nDate: [^\r]+ GMT\r\n"
            r"Transfer-Encoding: chunked\r\nConnection: close\Z",
        )
        blocks = [block.encode() + b"\n\n" for block in text.split("\n\n")[:-1]]
        chunks = [b"%x\r\n%b\r\n" % (len(block), block) for block in [*blocks, b""]]
        self.assertEqual(body, b"".join(chunks))
        old = get(path=b"/events").replace(b"1.1", b"1.0")
        head, _, body = send(served.port, old, end=False).partition(b"\r\n\r\n")
        self.assertNotIn(b"transfer-encoding", head.lower())
        self.assertEqual(body.decode(), text)

    def test_events_carry_the_originals_fields(self) -> None:
        served = self.finished()
        with served.listen() as reader:
            self.assertEqual(reader.block(), "retry: 1000")
            seqs, payloads = zip(*iter(reader.event, None))
        self.assertEqual(list(seqs), list(range(len(served.events()))))
        started = next(p for p in payloads if p["type"] == "NodeStarted")
        keys = ["type", "runId", "nodeId", "iteration", "attempt", "timestampMs"]
        self.assertEqual(list(started), keys)
        self.assertEqual((started["iteration"], started["attempt"]), (0, 0))

    def test_a_stream_begins_after_what_was_seen(self) -> None:
        served = self.finished()
        last = served.newest()
        seen: list[tuple[str, dict[str, str], int]] = [
            (f"?afterSeq={seq}", {}, seq) for seq in (-1, 0, 3, last - 1, last, last + 1, 2**63 - 1)
        ]
        seen.append(("?afterSeq=1", {"Last-Event-ID": "4"}, 4))
        seen.append(("?afterSeq=1", {"Last-Event-ID": ""}, 1))
        for query, headers, after in seen:
            with self.subTest(query=query, headers=headers):
                with served.listen("/events" + query, headers=headers) as reader:
                    self.assertEqual(reader.rest(), list(range(after + 1, last + 1)))
                    self.assertTrue(reader.has_ended)

    def test_a_bad_last_event_id_is_refused(self) -> None:
        for value in ("x", "-2", "1.0", "9" * 30):
            reply = self.served.ask("GET", "/events", None, {"Last-Event-ID": value})
            self.assert_error(reply, 400, "INVALID_REQUEST", "Last-Event-ID")

    def test_a_finished_reconnect_gets_204(self) -> None:
        served = self.finished()
        for method in ("GET", "HEAD"):
            seen = {"Last-Event-ID": str(served.newest())}
            reply = served.ask(method, "/events", None, seen)
            self.assertEqual((reply.status, reply.body), (204, ""))
            self.assertNotIn("content-length", reply.headers)

    def test_a_reconnect_to_a_live_run_waits(self) -> None:
        served = self.fresh()
        writer = served.write()
        last = writer.newest()
        with served.listen(headers={"Last-Event-ID": str(last)}) as reader:
            self.assertEqual((reader.status, reader.block()), (200, "retry: 1000"))
            writer.emit(1)
            self.assertEqual(reader.until("NodeOutput"), last + 1)

    def test_a_stream_opened_before_the_run_follows_it(self) -> None:
        served = self.fresh()
        with served.listen() as reader:
            self.assertEqual(reader.headers["content-type"], "text/event-stream")
            self.assertEqual(reader.block(), "retry: 1000")
            served.start(tasks("a b")).end()
            self.assertEqual(reader.rest(), [event.seq for event in served.events()])
            self.assertTrue(reader.has_ended)

    def test_a_stream_follows_a_run_past_its_gate(self) -> None:
        served = self.fresh()
        live = served.start()
        with served.listen() as reader:
            reader.until("NodeWaitingApproval")
            served.ask("POST", "/approve/deploy")
            granted = reader.until("ApprovalGranted")
            rest = reader.rest()
        live.end()
        self.assertEqual(rest, list(range(granted + 1, len(served.events()))))
        self.assertEqual(served.events()[-1].type, "RunFinished")

    def test_silent_streams_are_kept_alive(self) -> None:
        with mock.patch.object(ss, "KEEP_ALIVE_SECONDS", 0.05):
            served = self.fresh()
            writer = served.write()
            with served.listen(f"/events?afterSeq={writer.newest()}") as reader:
                blocks = [reader.block() for _ in range(3)]
                self.assertEqual(blocks, ["retry: 1000", ": keep-alive", ": keep-alive"])
                writer.emit(1)
                self.assertEqual(reader.until("NodeOutput"), writer.newest())

    def test_another_processes_events_arrive(self) -> None:
        last = self.served.newest()
        with self.served.listen(f"/events?afterSeq={last}") as reader:
            self.assertEqual(reader.block(), "retry: 1000")
            fill(self.served, 1)
            self.assertEqual(reader.until("NodeOutput"), last + 1)
            self.cancel(RUN, self.adapter())
            self.assertEqual(reader.rest()[-1], self.served.newest())

    def test_head_of_events_ends_at_once(self) -> None:
        reply = self.assert_ask(200, "HEAD", "/events")
        self.assertEqual(reply.body, "")
        self.assertEqual(reply.headers["content-type"], "text/event-stream")
        self.assertEqual(self.served.streams(), "0")

    def test_vanished_clients_are_forgotten(self) -> None:
        readers = [self.served.listen() for _ in range(4)]
        for reader in readers:
            reader.block()
        self.assertEqual(self.served.streams(), "4")
        for reader in readers[:2]:
            reader.reset()
        eventually(lambda: self.served.streams() == "2")
        for reader in readers[2:]:
            reader.close()
        eventually(lambda: self.served.streams() == "0")

    def test_a_half_closed_client_is_still_served(self) -> None:
        served = self.fresh()
        writer = served.write()
        with served.listen() as reader:
            reader.socket.shutdown(socket.SHUT_WR)
            seen = reader.until(writer.newest())
            last = writer.finish()
            self.assertEqual(reader.rest(), list(range(seen + 1, last + 1)))
            self.assertTrue(reader.has_ended)

    def test_a_slow_reader_delays_nobody(self) -> None:
        served = self.fresh()
        writer = served.write()
        with served.listen(buffer_bytes=4096) as slow:
            with served.listen() as quick:
                writer.emit(2000, at_once=100, text="x" * 2000)
                count = writer.finish() + 1
                self.assertEqual(quick.rest(), list(range(count)))
            eventually(lambda: served.streams() == "1")
            self.assertEqual(slow.rest(), list(range(count)))
            self.assertTrue(slow.has_ended)

    def test_an_open_stream_follows_a_resumed_run(self) -> None:
        served = self.served
        with served.listen(buffer_bytes=4096) as slow:
            with served.listen() as quick:
                fill(served, 2000, 2000)
                self.cancel(RUN)
                first_end = quick.rest()[-1]
            served.run_to_gate(retry=True)
            served.ask("POST", "/approve/deploy")
            self.assertGreater(served.run_to_gate(resume=True), first_end)
            self.assertEqual(slow.rest(), list(range(served.newest() + 1)))

    def test_every_stream_gets_every_event_once(self) -> None:
        served = self.fresh()
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(served.listen()) for _ in range(30)]
            served.start([Task(f"t{n}", {"n": n}) for n in range(40)]).end()
            for reader in readers:
                self.assertEqual(reader.rest(), list(range(len(served.events()))))

    def test_a_long_log_is_replayed_whole(self) -> None:
        fill(self.served, 3000)
        self.cancel(RUN)
        for after in (-1, 254, 255, 256, 1023):
            with self.served.listen(f"/events?afterSeq={after}") as reader:
                self.assertEqual(reader.rest(), list(range(after + 1, self.served.newest() + 1)))

    def test_a_foreign_log_with_gaps_is_sent(self) -> None:
        served = self.at_gate(db=self.foreign_database())
        seqs = [event.seq for event in served.events()]
        for seq in (2000, 9001):
            value = f"('{served.run_id}', {seq}, 0, 'X', '{{\n\"type\":\r\"X\"}}')"
            change(served.path, f"insert into _smithers_events values {value}")
        with served.listen() as reader:
            self.assertEqual([reader.event()[0] for _ in seqs], seqs)  # type: ignore[index]
            for seq in (2000, 9001):
                self.assertEqual(reader.event(), (seq, {"type": "X"}))

    def test_a_server_stop_ends_streams_properly(self) -> None:
        readers = [self.served.listen() for _ in range(3)]
        for reader in readers:
            reader.until(self.served.newest())
        self.served.stop()
        for reader in readers:
            self.assertEqual(reader.block(), "")
            self.assertTrue(reader.has_ended)
            reader.close()
        self.assertEqual(self.served.streams(), "0")

    def test_a_stop_without_streams_or_start(self) -> None:
        app = ss.create_serve_app(adapter=self.db, run_id=RUN)
        server = ss.make_server(app, LOOPBACK, 0)
        stopping = threading.Thread(target=server.stop, daemon=True)
        stopping.start()
        stopping.join(PATIENCE)
        self.assertFalse(stopping.is_alive())
        app.close()

    def test_too_many_streams_are_told_to_wait(self) -> None:
        with mock.patch.object(ss, "MAX_STREAMS", 2):
            served = self.at_gate()
            first, second = served.listen(), served.listen()
            for reader in (first, second):
                self.assertEqual(reader.block(), "retry: 1000")
            refused, healthy = split(send(served.port, get(path=b"/events") + get()))
            self.assert_error(refused, 503, "UNAVAILABLE")
            self.assertRegex(refused.headers["retry-after"], r"\A[1-9][0-9]*\Z")
            self.assertEqual(healthy.status, 200)
            labels = 'method="GET",route="/events",status_code="503",status_class="5xx"'
            self.assertEqual(served.metrics()[f"http_requests{{{labels}}}"], "1")
            first.reset()
            eventually(lambda: served.streams() == "1")
            with served.listen() as third:
                self.assertEqual(third.block(), "retry: 1000")
            second.close()

    def test_fast_readers_elsewhere_get_every_event(self) -> None:
        """Their sockets are full and empty again at every moment there is."""
        fill(self.served, 50_000)
        with listening(self.served.port, 10) as listener:
            seen = listener.ask("wait", self.served.newest(), PATIENCE)
            self.assertEqual((seen["complete"], seen["inOrder"]), (True, True))

    def test_streams_go_on_after_the_database_was_unreadable(self) -> None:
        with mock.patch.object(ss, "KEEP_ALIVE_SECONDS", 0.1):
            served = self.at_gate(db=self.foreign_database())
            last = fill(served, 4000, 2000)
            with served.listen(buffer_bytes=4096) as slow:
                with served.listen() as quick:
                    quick.until(last)
                    with self.assertLogs("smithers_serve", logging.ERROR) as logs:
                        change(served.path, "alter table _smithers_events rename to hidden")
                        slow.until(100)  # its socket takes more now, which is not to be had
                        count = len(logs.output)
                        eventually(lambda: len(logs.output) > count + 3)
                        change(served.path, "alter table hidden rename to _smithers_events")
                    self.cancel(served.run_id, served.db)
                    self.assertEqual(quick.until("RunCancelled"), served.newest())
                self.assertEqual(slow.rest()[-1], served.newest())

    def test_clients_that_never_read_cost_no_memory(self) -> None:
        last = fill(self.served, 1000, 7000)
        before = float(self.served.metrics()["process_memory_rss_bytes"])
        deaf = [
            self.served.listen(f"/events?afterSeq={9 * number}", buffer_bytes=4096)
            for number in range(100)
        ]
        with self.served.listen() as reader:  # takes hundreds of turns, as do the others
            reader.until(last)
        grown = float(self.served.metrics()["process_memory_rss_bytes"]) - before
        self.assertEqual(self.served.streams(), "101")
        for other in deaf:
            other.reset()
        self.assertLess(grown / 2**20, 60)

    def test_streams_cost_no_threads(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.served.listen()).block()
            count = threading.active_count()
            for _ in range(25):
                stack.enter_context(self.served.listen()).block()
            eventually(lambda: threading.active_count() <= count)


# ---------------------------------------------------------------------------
# Strict requests
# ---------------------------------------------------------------------------


def lines_of(first: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join([first + b" HTTP/1.1", *filter(None, lines)]) + b"\r\n\r\n"


def get(*lines: bytes, path: bytes = b"/health", host: bytes = b"Host: localhost") -> bytes:
    """Return a GET request of these header lines."""
    return lines_of(b"GET " + path, host, *lines)


def post(body: bytes, *lines: bytes, path: bytes = b"/approve/nobody") -> bytes:
    """Return a POST request; its length has to be among the lines."""
    return lines_of(b"POST " + path, b"Host: localhost", *lines) + body


def chunked(body: bytes) -> bytes:
    return post(body, b"Transfer-Encoding: chunked")


L = b"Host: localhost\r\n"


def answered(status: int, make: Callable[[bytes], bytes], *parts: bytes) -> list[Any]:
    """Return what is made of each part, with the status of its only answer."""
    return [(make(part), [status]) for part in parts]


def started(line: bytes) -> bytes:
    return line + b"\r\n" + L + b"\r\n"


def sized(length: bytes) -> bytes:
    return post(b"{}", b"Content-Length:" + length)


def coded(coding: bytes) -> bytes:
    return post(b"0\r\n\r\n", b"Transfer-Encoding: " + coding)


# Each request with the statuses of its answers: after a refusal there is never another answer.
# fmt: off
REQUESTS: tuple[tuple[bytes, list[int]], ...] = (
    # Valid
    *answered(
        200, bytes, get(), get(b"Connection: close") + get(),
        get(b"X-Empty:", b"x-tab:\ta\tb\t", b"X-Latin: \xe9\xff"),
        get(b"Accept: a", b"Accept: b", b"Cookie: c"), get(host=b"HOST:localhost"),
        get(host=b"host:   localhost:7331  "), b"GET /health HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\n" + L + b"\r\n" + get(), get(*[b"X-%d: y" % n for n in range(99)]),
        get(b"X: " + b"y" * 30_000),
    ),
    *answered(
        200, lambda path: get(path=path), b"/%68ealth?x=%", b"http://localhost/health",
        b"HTTP://LOCALHOST/health", b"http://localhost?x=1", b"http://localhost",
    ),
    (b"GET / HTTP/1.0\r\n" + L + b"Connection: keep-alive\r\n\r\n" + get(), [200, 200]),
    (get() + get(path=b"/") + get(path=b"/nowhere") + get(), [200, 200, 404, 200]),
    (get(b"Content-Length: 0") + get(), [200, 200]),
    (get(b"Content-Length: 5") + b"GET /" + get(), [200, 200]),
    (get(b"Transfer-Encoding: chunked") + b"5\r\nGET /\r\n0\r\n\r\n" + get(), [200, 200]),
    (b"BREW / HTTP/1.1\r\n" + L + b"\r\n" + get(), [404, 200]),
    (get(path=b"//[") + get(), [404, 200]),
    (post(b"{}", b"Content-Length: 2") + get(), [404, 200]),
    (post(b"") + get(), [404, 200]),
    (chunked(b"2\r\n{}\r\n0\r\n\r\n") + get(), [404, 200]),
    (chunked(b'0002;a=b;c="d e"\r\n{}\r\n0;x\r\nTrailer: t\r\nX:\r\n\r\n') + get(), [404, 200]),
    *answered(
        404, bytes, b"OPTIONS * HTTP/1.1\r\n" + L + b"\r\n", get(path=b"/" + b"a" * 8000),
        post(b"", b"Content-Length: 0"), chunked(b"1\r\n{\r\n1\r\n}\r\n000\r\n\r\n"),
        post(b"2\r\n{}\r\n0\r\n\r\n", b"transfer-encoding: \tCHUNKED "),
        chunked(b"A\r\n          \r\n2\r\n{}\r\n0\r\n\r\n"),
    ),
    # The request line
    *answered(
        400, bytes, b"\r\n" + get(), b"\n" + get(), b"GET\r\n\r\n", b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r" + L + b"\r\n", b"GET /health HTTP/1.1\n" + L + b"\r\n",
        b"GET /health HTTP/1.1\n" + L.replace(b"\r", b"") + b"\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ),
    *answered(
        400, started, b"GET  /health HTTP/1.1", b"GET /health  HTTP/1.1", b"GET\t/health HTTP/1.1",
        b"GET\x0b/health\x0cHTTP/1.1", b" GET /health HTTP/1.1", b"GET /health HTTP/1.1 ",
        b"GET /he alth HTTP/1.1", b"GET /health HTTP/11", b"GET /health HTTP/1.10",
        b"GET /health HTTP/1", b"GET /health http/1.1", b"GET /health HTTP/\xb2.1",
        b"G(T /health HTTP/1.1", b"\xc7ET /health HTTP/1.1", b"CONNECT localhost:80 HTTP/1.1",
    ),
    *answered(505, started, b"GET /health HTTP/2.0", b"GET /health HTTP/1.2", b"GET / HTTP/0.9"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
    # The target
    *answered(
        400, lambda path: get(path=path), b"health", b"localhost:80", b"ftp://localhost/health",
        b"http://other/health", b"http://[/health", b"http://user@localhost/health", b"/health#x",
        b"/\x00", b"/\x7f", b"/\xc3\xa9", b"/%", b"/%f", b"/%u0041", b"/%ff", b"/%ed%a0%80",
        b"/%c0%af",
    ),
    # Header lines
    *answered(
        400, lambda line: get(host=line), b"", b"Host: local host", b"Host: localhost/x",
        b"Host: a@localhost", b"Host: localhost, other", b"Host: localhost:80x",
        b"Host: localhost:\xb2", b"Host: [::1",
    ),
    *answered(
        400, get, b"Host: localhost", b"host: other", b"X: a\r\n folded", b"X: a\r\n\tfolded",
        b": nameless", b"no colon", b"X : a", b"X\t: a", b"X Y: a", b"X\xe9: a", b"X\x00: a",
        b"X: a\x00b", b"X: a\x01b", b"X: a\x7fb", b"X: a\x0bb", b"X: a\rY: b", b"X: a\r",
        b"X: a\nY: b", b"X: a\n", b"Authorization: Bearer a\r\nAuthorization: Bearer b",
        b"X-Smithers-Key: a\r\nx-smithers-key: b", b"Expect: 200-ok",
    ),
    (b"GET /health HTTP/1.1\r\n Host: x\r\n" + L + b"\r\n", [400]),
    # How long the body is
    *answered(
        400, sized, b" 2\r\nContent-Length: 2", b" 2\r\ncontent-length: 3", b" 2, 2", b" +2",
        b" -2", b" 2_0", b" 0x2", b" 2 2", b" 2.0", b" \xb2", b" \xd9\xa2", b"", b" " + b"9" * 5000,
        b" 3",
    ),
    *answered(413, sized, b" 1048577", b" 9223372036854775808"),
    (post(b"0\r\n\r\n", b"Content-Length: 5", b"Transfer-Encoding: chunked"), [400]),
    (b"POST / HTTP/1.0\r\n" + L + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
    *answered(400, coded, b"chunked\r\nTransfer-Encoding: chunked", b"\x0bchunked"),
    *answered(501, coded, b"identity", b"gzip, chunked", b"chunked, gzip", b"xchunked"),
    # Chunks
    *answered(
        400, lambda size: chunked(size + b"\r\n{}\r\n0\r\n\r\n"), b"", b"g", b"+2", b"-2", b"0x2",
        b" 2", b"2 ", b"2_", b"\xb2", b"2;a\x00", b"2;a\n",
    ),
    *answered(
        400, chunked, b"2\n{}\r\n0\r\n\r\n", b"2\r\n{}0\r\n\r\n", b"2\r\n{}\n0\r\n\r\n",
        b"2\r\n{}\rx0\r\n\r\n", b"2\r\n{}", b"2\r\n{}\r\n0\r\n", b"FFFFFFFFF\r\n",
        b"2\r\n{}\r\n0\r\nbad trailer\r\n\r\n", b"2\r\n{}\r\n0\r\nX: a\nY: b\r\n\r\n",
    ),
    (chunked(b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 101 + b"\r\n"), [431]),
    *answered(413, chunked, b"FFFFFFFF\r\n", b"100001\r\n"),
    # Too much
    *answered(
        414, lambda letters: get(path=b"/" + letters), b"a" * 8192, b"a" * 20_000, b"a" * 50_000
    ),
    *answered(431, get, b"X: " + b"y" * 33_000, b"X: " + b"y" * 70_000),
    (get(*[b"X-%d: y" % n for n in range(100)]), [431]),
    (get(*[b"X-%d: " % n + b"y" * 900 for n in range(50)]), [431]),
)
# fmt: on


class StrictRequestTest(ServerCase):
    def check(self, name: str, request: bytes, pieces: Seq[bytes], expected: list[int]) -> None:
        with self.subTest(sent=name, request=request[:150], size=len(request)):
            replies = split(send(self.served.port, *pieces))
            self.assertEqual([reply.status for reply in replies], expected)
            for status, headers, body in replies:
                self.assertEqual(headers["content-type"], "application/json")
                if status >= 400:
                    self.assertEqual(list(body), ["error"])
                if status in (400, 413, 414, 431, 501, 505):
                    self.assertEqual(headers["connection"], "close")

    def test_requests_sent_whole(self) -> None:
        before = rows(self.path)
        for request, expected in REQUESTS:
            self.check("whole", request, [request], expected)
        self.assertEqual(rows(self.path), before)

    def test_requests_sent_byte_by_byte(self) -> None:
        for request, expected in REQUESTS:
            if len(request) < 1000:
                pieces = [request[i : i + 1] for i in range(len(request))]
                self.check("byte by byte", request, pieces, expected)

    def test_requests_split_at_boundaries(self) -> None:
        for request, expected in REQUESTS:
            marks = [match.end() for match in re.finditer(rb"\r\n|[ :]|\r", request)][:400]
            cuts = [0, *marks, len(request)]
            pieces = [request[a:b] for a, b in zip(cuts, cuts[1:]) if a < b]
            self.check("split", request, pieces, expected)
            middle = len(request) - len(request) // 3
            self.check("halves", request, [request[:middle], request[middle:]], expected)

    def test_every_split_of_a_request_counts_the_same(self) -> None:
        request = chunked(b"2;x=y\r\n{}\r\n0\r\nT: t\r\n\r\n") + get()
        for cut in range(1, len(request)):
            self.check(f"cut at {cut}", request, [request[:cut], request[cut:]], [404, 200])

    def test_pipelined_requests_are_answered_in_order(self) -> None:
        approve = post(b'{"note":"yes"}', b"Content-Length: 14", path=b"/approve/deploy")
        request = get() + get(path=b"/") + approve + get(path=b"/")
        request += chunked(b"2\r\n{}\r\n0\r\n\r\n") + get(b"Connection: close")
        replies = split(send(self.served.port, request, end=False))
        self.assertEqual([reply.status for reply in replies], [200, 200, 200, 200, 404, 200])
        self.assertEqual(replies[1].body["summary"].get("waiting-approval"), 1)
        self.assertEqual(replies[2].body, ACCEPTED)
        self.assertNotIn("waiting-approval", replies[3].body["summary"])
        self.assertEqual(replies[-1].headers["connection"], "close")

    def test_expect_100_continue_is_answered(self) -> None:
        request = post(b"", b"Content-Length: 2", b"Expect: 100-Continue")
        with connect(self.served.port, request) as sock:
            self.assertEqual(sock.recv(65536), b"HTTP/1.1 100 Continue\r\n\r\n")
            sock.sendall(b"{}")
            self.assertEqual(statuses(sock.recv(65536)), [404])

    def test_a_refused_expectation_gets_no_continue(self) -> None:
        request = post(b"", b"Content-Length: 2", b"Expect: 100-continue", path=b"/nowhere")
        self.assertEqual(statuses(send(self.served.port, request)), [404])

    def test_unread_bodies_never_become_requests(self) -> None:
        smuggled = get() * 3
        length = b"Content-Length: %d" % len(smuggled)
        pieces = b"%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled), smuggled)
        for request in (
            post(smuggled, length, path=b"/nowhere"),
            post(smuggled, length, path=b"/health"),
            post(smuggled, length, b"Origin: http://evil"),
            post(smuggled, length, b"Sec-Fetch-Site: cross-site", path=b"/cancel"),
            post(pieces, b"Transfer-Encoding: chunked", path=b"/no"),
            post(smuggled, b"Content-Length: 1048577"),
            post(smuggled, b"Transfer-Encoding: gzip"),
        ):
            with self.subTest(request=request):
                (reply,) = split(send(self.served.port, request, end=False))
                self.assertGreaterEqual(reply.status, 400)
                self.assertEqual(reply.headers["connection"], "close")

    def test_a_body_of_the_greatest_size_is_read(self) -> None:
        body = b'{"x":"' + b"x" * ((1 << 20) - 8) + b'"}'
        self.assert_ask(400, "POST", "/approve/nobody", body)
        self.assert_ask(413, "POST", "/approve/nobody", body + b" ")
        sizes = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:9], body[9:])]
        request = chunked(b"".join(sizes) + b"0\r\n\r\n")
        self.assertEqual(statuses(send(self.served.port, request)), [400])

    def test_what_the_mutation_run_begins_with_is_served(self) -> None:
        context: dict[str, Any] = {}
        exec(FUZZ_FLOW, context)  # the flow that these requests are for
        for request in VALID:
            with self.subTest(request=request):
                served = self.fresh()
                served.run_to_gate(context["workflow"])
                with connect(served.port, request) as sock:
                    reply = sock.recv(65536).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
                    self.assertRegex(reply or sock.recv(65536), rb"\AHTTP/1\.1 (200|409) ")

    def test_refusals_never_quote_the_request(self) -> None:
        for request in (
            get(b"X: <script>\x00"),
            get(path=b"/<script>%"),
            get(host=b"Host: <script>"),
            get(path=b"/<script>"),
            b"GET /<script> HTTP/9.9\r\n\r\n",
        ):
            self.assertNotIn(b"<script>", send(self.served.port, request))

    def test_requests_leave_no_thread_behind(self) -> None:
        self.assert_ask(404, "POST", "/approve/nobody")
        count = threading.active_count()
        for request, _ in REQUESTS[:40]:
            send(self.served.port, request)
        eventually(lambda: threading.active_count() <= count)


class DeadlineTest(ServerCase):
    def check(self, constant: str, **requests: tuple[bytes, list[int]]) -> None:
        """With this deadline short, and nothing following, these requests are answered so."""
        with mock.patch.object(ss, constant, 0.01):
            served = self.at_gate()
            with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
                found = pool.map(
                    lambda row: send(served.port, row[0], end=False), requests.values()
                )
                for (name, (_, expected)), raw in zip(requests.items(), found):
                    with self.subTest(request=name):
                        self.assertEqual(statuses(raw), expected)

    def test_an_unfinished_head_is_timed_out(self) -> None:
        first, second = b"GET /health HTTP/1.1\r\nHo", get() + b"GET /"
        self.check("HEAD_SECONDS", first=(first, [408]), second=(second, [200, 408]))

    def test_an_unfinished_body_is_timed_out(self) -> None:
        sized, pieces = post(b"{", b"Content-Length: 2"), chunked(b"5\r\n{")
        self.check("BODY_SECONDS", sized=(sized, [408]), chunked=(pieces, [408]))

    def test_idle_connections_are_closed_silently(self) -> None:
        self.check("IDLE_SECONDS", fresh=(b"", []), used=(get(), [200]))

    def test_a_trickle_does_not_extend_the_deadline(self) -> None:
        with mock.patch.object(ss, "HEAD_SECONDS", 0.01):
            served = self.at_gate()
            with connect(served.port, b"GET /health HTTP/1.1\r\nX: ") as sock:
                sock.settimeout(0.05)
                reply = b""
                while not reply:
                    with contextlib.suppress(socket.timeout):
                        sock.sendall(b"y")
                        reply = sock.recv(65536)
                self.assertEqual(statuses(reply), [408])


class ConnectionLimitTest(FramesCase):
    def connect(self, *pieces: bytes) -> socket.socket:
        sock = connect(self.served.port, *pieces)
        self.addCleanup(sock.close)
        return sock

    def assert_answered(self, sock: socket.socket, *expected: int) -> None:
        self.assertEqual(statuses(sock.recv(65536)), list(expected))

    def assert_asks(self, *socks: socket.socket) -> None:
        for sock in socks:
            sock.sendall(get())
            self.assert_answered(sock, 200)

    def limit(self, constant: str, value: float) -> None:
        patch = mock.patch.object(ss, constant, value)
        patch.start()
        self.addCleanup(patch.stop)
        self.served = self.at_gate()

    def test_the_longest_idle_connection_makes_room(self) -> None:
        self.limit("MAX_CONNECTIONS", 3)
        oldest, middle, newest = (self.connect() for _ in range(3))
        self.assert_asks(oldest, middle, newest, oldest)
        fourth = self.connect()
        self.assert_asks(fourth)
        self.assertEqual(middle.recv(1), b"")
        self.assert_asks(oldest, newest, fourth)

    def test_503_when_every_connection_is_busy(self) -> None:
        self.limit("MAX_CONNECTIONS", 1)
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("begin immediate")
            approve = post(b"", b"Connection: close", path=b"/approve/deploy")
            raw, firsts = b"", []
            while not raw:  # as long as the first one is not in work, it is the one that has to go
                firsts.append(self.connect(approve))
                with connect(self.served.port) as second:
                    if select.select([second], [], [], 0.1)[0]:
                        raw = second.recv(65536)
            (refused,) = split(raw)
            self.assert_error(refused, 503, "UNAVAILABLE")
            self.assertEqual(refused.headers["connection"], "close")
            self.assertIn("retry-after", refused.headers)
            other.execute("rollback")
        self.assertIn([200], [statuses(receive(sock)) for sock in firsts])

    def test_a_connection_outlives_the_thread_of_a_request(self) -> None:
        """The next request may have its thread before the last one's has ended."""
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-5)
        request = post(b"", b"Content-Length: 0", path=b"/approve/nobody")

        def repeat(_: int) -> None:
            sock = self.connect()
            for _ in range(400):
                sock.sendall(request)
                reply = b""
                while b"}}" not in reply:
                    data = sock.recv(65536)
                    self.assertTrue(data, "closed without an answer")
                    reply += data

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(repeat, range(6)))
        self.assert_asks(self.connect())

    def test_what_follows_a_last_answer_is_not_reset(self) -> None:
        """A reset could overtake the answer on its way."""
        for request in (
            get(b"Connection: close"),
            get(b"Connection: close", path=b"/frames"),
            b"HEAD /events HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            with self.subTest(request=request):
                sock = self.connect(request)
                self.assertEqual(statuses(receive(sock)), [200])
                for _ in range(100):
                    sock.sendall(b"x" * 1000)

    def test_few_descriptors_mean_503_and_not_silence(self) -> None:
        """A server with 100 descriptors, asked for 150 streams, answers everybody."""
        flow = "from smithers_serve import *\nworkflow = Workflow('w', Approval('gate'))\n"
        options = {"limit": "ulimit -n 100"}
        with serve_child(self.folder, flow, "--db", "child.db", **options) as child:
            readers = [EventReader(child.port) for _ in range(150)]
            self.assertEqual({reader.status for reader in readers}, {200, 503})
            self.assertEqual(ask(child.port, "GET", "/").status, 200)
            self.assertEqual(ask(child.port, "POST", "/approve/gate").status, 200)
            child.wait_for("Workflow finished")
            for reader in readers:
                reader.close()

    def test_the_slowest_reader_of_large_answers_has_to_go(self) -> None:
        with mock.patch.object(ss, "MAX_LARGE_BYTES", 5 << 20):
            self.served = self.serve_frames(8, 1 << 20)
            slowest = self.connect(get(b"Connection: close", path=b"/frames?limit=3"))
            began = slowest.recv(1000, socket.MSG_WAITALL)  # its body is on the way
            second = self.connect(get(b"Connection: close", path=b"/frames?limit=4"))
            self.assertEqual(len(split(receive(second))[0].body), 4)
            self.assertLess(len(began + receive(slowest)), 3 << 20)

    @contextlib.contextmanager
    def slow_frames(self) -> Iterator[list[int]]:
        """Have reading more than one frame last until GO; yield the answers in the making."""
        making: list[int] = []
        read = ss.Reads.list_frames

        def read_slowly(reads: ss.Reads, run_id: str, limit: int, *rest: Any) -> list[ss.Frame]:
            if limit > 1:
                making.append(limit)
                wait_for_go()
            return read(reads, run_id, limit, *rest)

        self.served = self.serve_frames(8, 100)
        with mock.patch.object(ss.Reads, "list_frames", read_slowly):
            try:
                yield making
            finally:
                GO.set()

    def test_a_large_answer_in_the_making_holds_nobody_up(self) -> None:
        with self.slow_frames() as making:
            self.assert_ask(200, "GET", "/frames?limit=1")
            sock = self.connect(get(path=b"/frames?limit=8"))
            eventually(lambda: making == [8])
            self.assert_asks(self.connect())
            self.assert_ask(200, "GET", "/")
            GO.set()
            self.assert_answered(sock, 200)

    def test_few_answers_are_made_at_once(self) -> None:
        with self.slow_frames() as making:
            socks = [self.connect(get(path=b"/frames?limit=%d" % n)) for n in range(2, 12)]
            eventually(lambda: len(making) >= ss.MAX_READERS)
            self.assert_ask(404, "POST", "/approve/nobody")
            self.assert_asks(self.connect())
            self.assertEqual(len(making), ss.MAX_READERS)
            GO.set()
            for sock in socks:
                self.assert_answered(sock, 200)

    def test_few_large_bodies_are_taken_at_once(self) -> None:
        self.limit("MAX_LARGE_REQUESTS", 1)
        body = b'{"x":"' + b"x" * 100_000 + b'"}'
        small = post(b"{}", b"Content-Length: 2")
        for large in (
            post(body, b"Content-Length: %d" % len(body)),
            chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)),
        ):
            with self.subTest(request=large[:100]):
                first, second = self.connect(large[:-1]), self.connect(large)
                for _ in range(20):
                    other = self.connect(small)
                    self.assert_answered(other, 404)
                waiting, _, _ = select.select([first, second], [], [], 0)
                self.assertEqual(waiting, [], "both are read at once")
                first.sendall(large[-1:])
                for sock in (first, second):
                    self.assert_answered(sock, 400)

    def test_a_large_body_may_wait_too_long(self) -> None:
        self.limit("MAX_LARGE_REQUESTS", 1)
        body = b'{"x":"' + b"x" * 100_000 + b'"}'
        large = post(body, b"Content-Length: %d" % len(body))

        def is_refused() -> bool:
            self.connect(large[:-1])
            return statuses(send(self.served.port, large)) == [503]

        with mock.patch.object(ss, "BODY_SECONDS", 0.1):
            eventually(is_refused)

    def test_streams_do_not_count_as_connections(self) -> None:
        self.limit("MAX_CONNECTIONS", 2)
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                reader = stack.enter_context(self.served.listen())
                self.assertEqual(reader.block(), "retry: 1000")
            self.assert_asks(self.connect())
            self.assertEqual(self.served.streams(), "5")


# ---------------------------------------------------------------------------
# Who may ask
# ---------------------------------------------------------------------------

SECRET = bearer("sk-secret")


class TokenTest(ServerCase):
    token = "sk-secret"

    def test_both_header_forms_are_accepted(self) -> None:
        for headers in (
            {"Authorization": "Bearer sk-secret"},
            {"authorization": "bearer sk-secret"},
            {"AUTHORIZATION": "BEARER  sk-secret "},
            {"x-smithers-key": "sk-secret"},
            {"X-Smithers-Key": "sk-secret"},
            {"Authorization": "Basic xyz", "X-Smithers-Key": "sk-secret"},
        ):
            self.assert_ask(200, "GET", "/", None, headers)

    def test_missing_and_wrong_tokens_are_unauthorized(self) -> None:
        wrong = ["wrong", "sk-secret2", "sk-secre", "SK-SECRET", "", "sk-secret sk-secret"]
        before = rows(self.path)
        for headers in (
            {},
            *map(bearer, wrong),
            {"Authorization": "Basic sk-secret"},
            {"Authorization": "sk-secret"},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer\tsk-secret"},
            {"x-smithers-key": ""},
            {"x-smithers-key": "s\xe9cret"},
            {"x-smithers-key": "Bearer sk-secret"},
            {"Cookie": "x-smithers-key=sk-secret"},
        ):
            for method, path in (("GET", "/"), ("POST", "/approve/deploy"), ("POST", "/cancel")):
                with self.subTest(headers=headers, path=path):
                    reply = self.served.ask(method, path, None, headers)
                    self.assert_error(reply, 401, "UNAUTHORIZED")
                    self.assertEqual(reply.headers["www-authenticate"], "Bearer")
        self.assertEqual(rows(self.path), before)

    def test_401_comes_before_404_and_bodies(self) -> None:
        for question in (
            "GET /",
            "GET /events",
            "GET /frames",
            "GET /metrics",
            "GET /frames?limit=x",
            "GET /nowhere",
            "DELETE /",
            "POST /health",
            "POST /approve/nobody",
            "GET /?token=sk-secret&authToken=sk-secret",
        ):
            method, path = question.split()
            with self.subTest(question=question):
                reply = self.served.ask(method, path)
                self.assert_error(reply, 401, "UNAUTHORIZED")
                self.assertNotIn("allow", reply.headers)
                if method == "GET":
                    self.assert_ask(401, "HEAD", path)
        self.assert_error(self.served.ask("POST", "/cancel", b"{"), 401, "UNAUTHORIZED")

    def test_tokens_never_show(self) -> None:
        refused = self.assert_ask(401, "GET", "/", None, bearer("sk-wrong")).body
        self.assert_ask(404, "GET", "/sk-secret", None, SECRET)
        self.assert_ask(400, "POST", "/approve/nobody", {"note": 1}, SECRET)
        metrics = self.assert_ask(200, "GET", "/metrics", None, SECRET).body
        for text in (metrics, json.dumps(refused), json.dumps(rows(self.path))):
            self.assertNotRegex(text, "sk-secret|sk-wrong")

    def test_the_environment_gives_a_token(self) -> None:
        with mock.patch.dict(os.environ, {"SMITHERS_API_KEY": "from-env"}):
            self.served = self.at_gate()
            self.assert_ask(401, "GET", "/")
            self.assert_ask(200, "GET", "/", None, bearer("from-env"))
        with mock.patch.dict(os.environ, {"SMITHERS_API_KEY": ""}):
            with self.assertRaises(ValueError):
                ss.create_serve_app(adapter=self.db, run_id=RUN)

    def test_a_token_no_header_can_carry_is_refused(self) -> None:
        for token in ("", "a b", "a\n", "tök", "\x00"):
            with self.assertRaises(ValueError):
                ss.create_serve_app(adapter=self.db, run_id=RUN, auth_token=token)


class ForeignPageTest(ServerCase):
    token = "sk-secret"

    def test_a_foreign_page_may_not_post(self) -> None:
        own = f"http://127.0.0.1:{self.served.port}"
        origins = ["http://evil.example", "null", "", "http://127.0.0.1:1", f"{own}.evil.example"]
        origins.append(own.replace("127.0.0.1", "localhost"))
        before = rows(self.path)
        for foreign in (
            *({"Origin": origin} for origin in origins),
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "Cross-Site"},
        ):
            for path in ("/approve/deploy", "/deny/deploy", "/cancel"):
                with self.subTest(foreign=foreign, path=path):
                    reply = self.served.ask("POST", path, None, {**SECRET, **foreign})
                    self.assert_error(reply, 403, "FORBIDDEN")
                    reply = self.served.ask("POST", path, None, foreign)
                    self.assert_error(reply, 401, "UNAUTHORIZED")
        request = b"POST /cancel HTTP/1.0\r\nx-smithers-key: sk-secret\r\nOrigin: null\r\n\r\n"
        self.assertEqual(statuses(send(self.served.port, request)), [403])  # without a Host
        self.assertEqual(rows(self.path), before)

    def test_its_own_page_may_post(self) -> None:
        for own in (
            {"Origin": f"http://127.0.0.1:{self.served.port}"},
            {"Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Site": "none"},
        ):
            self.assert_ask(200, "POST", "/approve/deploy", None, {**SECRET, **own})

    def test_no_answer_lets_another_origin_read(self) -> None:
        for method in ("GET", "OPTIONS"):
            headers = {**SECRET, "Origin": "http://evil.example"}
            reply = self.served.ask(method, "/", None, headers)
            self.assertFalse([n for n in reply.headers if n.startswith("access-control")])


class ForeignHostTest(ServerCase):
    def assert_hosts(self, expected: int, *hosts: str, **more: str) -> None:
        for host in hosts:
            self.assert_ask(expected, "GET", "/", None, {"Host": host, **more})

    def test_only_loopback_names_are_served(self) -> None:
        self.assert_hosts(200, "localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:80", "[::1]:80")
        before = rows(self.path)
        for host in ("evil.example", "localhost.evil.example", "evil:80", "[::2]", "127.1", ""):
            for question in ("GET /", "POST /cancel", "GET /nowhere"):
                self.assert_ask(403, *question.split(), None, {"Host": host})
        self.assertEqual(rows(self.path), before)

    def test_allowed_hosts_are_added(self) -> None:
        self.served = self.at_gate(allowed_hosts=["Box.example"])
        self.assert_hosts(200, "box.example:8080", "localhost")
        self.assert_hosts(403, "evil.example")
        headers = {"Origin": "https://box.example", "Host": "localhost"}
        self.assert_ask(200, "POST", "/approve/deploy", None, headers)

    def test_a_token_or_wide_bind_makes_any_host_welcome(self) -> None:
        self.served = self.at_gate(token="tok")
        self.assert_hosts(200, "box.example", **bearer())
        self.served = self.at_gate(host="0.0.0.0")
        self.assert_hosts(200, "box.example")

    def test_a_served_app_still_answers_in_process(self) -> None:
        self.assertEqual(self.served.app.request("GET", "/").status, 200)


def make_certificate(folder: str) -> str:
    """Return a file with a key and a certificate for localhost; skip the test without openssl."""
    path = os.path.join(folder, "server.pem")
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj"
    command = [shutil.which("openssl") or "", *options.split(), "/CN=localhost"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        files = ["-keyout", path, "-out", path + ".crt"]
        subprocess.run([*command, *files], capture_output=True, check=True)
        with open(path, "a") as pem, open(path + ".crt") as certificate:
            pem.write(certificate.read())
        return path
    raise unittest.SkipTest("there is no openssl to make a certificate")


def trust_all(maximum: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if maximum is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.maximum_version = maximum
    return context


class TlsTest(ServerCase):
    def setUp(self) -> None:
        super().setUp()
        context = ss.make_ssl_context(make_certificate(self.folder), None)
        self.served = self.at_gate(ssl_context=context)
        self.secure = {"context": trust_all()}

    def ask(self, method: str, path: str) -> Reply:
        return ask(self.served.port, method, path, **self.secure)

    def test_requests_are_answered_over_tls(self) -> None:
        self.assertTrue(self.served.server.url.startswith("https://127.0.0.1:"))
        self.assertEqual(self.ask("GET", "/").body["status"], "waiting-approval")
        self.assertEqual(self.ask("POST", "/approve/deploy").status, 200)

    def test_streams_follow_a_run_over_tls(self) -> None:
        with self.served.listen(**self.secure) as reader:
            reader.until(self.served.newest())
            self.assertEqual(self.ask("POST", "/cancel").status, 200)
            self.assertEqual(reader.rest()[-1], self.served.newest())
            self.assertTrue(reader.has_ended)

    def test_a_long_replay_passes_through_tls(self) -> None:
        fill(self.served, 1500, 2000)
        self.cancel(self.served.run_id)
        expected = list(range(self.served.newest() + 1))
        with self.served.listen(buffer_bytes=4096, **self.secure) as reader:
            self.assertEqual(reader.rest(), expected)
        with self.served.listen(version="1.0", **self.secure) as reader:
            self.assertEqual(reader.rest(), expected)  # ended by a farewell, or reading would fail

    def test_an_unfinished_handshake_blocks_nobody(self) -> None:
        silent = [connect(self.served.port, b"\x16\x03\x01"[:n]) for n in (3, 0, 0, 0, 0)]
        for _ in range(3):
            self.assertEqual(self.ask("GET", "/health").status, 200)
        for sock in silent:
            sock.close()

    def test_an_unfinished_handshake_is_timed_out(self) -> None:
        with mock.patch.object(ss, "HEAD_SECONDS", 0.01):
            raw = send(self.served.port, b"\x16\x03\x01", end=False)
        self.assertNotIn(b"HTTP", raw)

    def test_plain_http_is_not_answered(self) -> None:
        self.assertNotIn(b"HTTP/1.1 200", send(self.served.port, get()))
        self.assertEqual(self.ask("GET", "/health").status, 200)

    def test_old_tls_is_refused(self) -> None:
        with self.assertRaises((ssl.SSLError, ConnectionError)):
            ask(self.served.port, "GET", "/health", context=trust_all(ssl.TLSVersion.TLSv1_1))


# ---------------------------------------------------------------------------
# What answers hold
# ---------------------------------------------------------------------------

ODD_TEXTS = (
    "line\nline\r\n\r\nevent: smithers\ndata: {}\nid: 99\n\n",
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f\x85\x9b",
    "\u2028\u2029\u202e\ufeff",
    "\U0001f680 \xe9 \"quoted\" \\ 'single' </script>",
)


class ContentHygieneTest(ServerCase):
    def test_odd_texts_come_back_as_data(self) -> None:
        for text in ODD_TEXTS:
            with self.subTest(text=text):
                served = self.fresh()
                say = Task("say", lambda said: said["note"], needs={"said": "deploy"})
                live = served.start([Approval("deploy"), say], PARKS)
                said = {"note": text, "decidedBy": text}
                self.assertEqual(served.ask("POST", "/approve/deploy", said).status, 200)
                live.end()
                gate = self.gate(served.run_id)
                self.assertEqual((gate.note, gate.decided_by), (text, text))
                self.assertEqual(self.output("say", run_id=served.run_id), text)
                with served.listen() as reader:
                    told = [
                        e for _, e in iter(reader.event, None) if e["type"] == "ApprovalGranted"
                    ]
                self.assertEqual([(e["note"], e["decidedBy"]) for e in told], [(text, text)])

    def test_error_messages_hold_no_control_characters(self) -> None:
        for path in ("/approve/%1b%5b31m%0d%0aX", "/approve/%00", "/approve/%E2%80%AE"):
            reply = self.served.ask("POST", path)
            self.assert_error(reply, 404, "NODE_NOT_FOUND")
            self.assertTrue(reply.body["error"]["message"].isprintable())

    def test_a_500_hides_what_went_wrong(self) -> None:
        self.served = self.at_gate(db=self.foreign_database())
        change(self.served.path, "drop table _smithers_frames")
        with self.assertLogs("smithers_serve", logging.ERROR) as logs:
            reply = self.served.ask("GET", "/frames")
        self.assert_error(reply, 500, "SERVER_ERROR")
        self.assertNotRegex(reply.body["error"]["message"], r"sqlite|_smithers|Traceback|/|table")
        self.assertEqual(len(logs.records), 1)
        self.assertIn("_smithers_frames", logs.output[0])
        self.assert_ask(200, "GET", "/health")

    def test_a_failure_says_no_folder_of_the_machine(self) -> None:
        def read() -> None:
            raise RuntimeError(f"cannot read {os.path.join(HERE, 'no-such-file')}")

        served = self.fresh()
        with self.assertLogs("smithers_serve"):
            served.start(Task("read", read)).end()
        told = "".join(event.payload_json for event in served.events())
        self.assertIn("no-such-file", told)
        self.assertNotIn(HERE, told)
        self.assertNotIn("Traceback", told)


# ---------------------------------------------------------------------------
# The page, without a browser and in one
# ---------------------------------------------------------------------------


class PageTest(ServerCase):
    def test_only_its_own_script_and_style_may_run(self) -> None:
        reply = self.assert_ask(200, "GET", "/ui")
        policy = dict(
            part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; ")
        )
        for tag in ("script", "style"):
            (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", reply.body, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            self.assertEqual(policy.pop(f"{tag}-src"), f"'sha256-{digest}'")
        none = "default-src base-uri form-action frame-ancestors".split()
        expected = {**dict.fromkeys(none, "'none'"), "connect-src": "'self'", "img-src": "data:"}
        self.assertEqual(policy, expected)

    def test_its_headers_keep_it_to_itself(self) -> None:
        headers = self.assert_ask(200, "HEAD", "/ui").headers
        for line in (
            "content-type: text/html; charset=utf-8",
            "cache-control: no-store",
            "referrer-policy: no-referrer",
            "x-content-type-options: nosniff",
            "x-frame-options: DENY",
        ):
            name, value = line.split(": ")
            self.assertEqual(headers[name], value)

    def test_it_is_small_and_asks_nobody_else(self) -> None:
        self.assertLess(len(ss.PAGE.encode()), 48 << 10)
        self.assertEqual(re.findall(r"https?://[^\"]*", ss.PAGE), ["http://www.w3.org/2000/svg"])
        for danger in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
            self.assertNotIn(danger, ss.PAGE)
        self.assertNotRegex(ss.PAGE, r"<[^>]* (on\w+|style|src)=")

    def test_it_needs_no_token_but_a_host_of_ours(self) -> None:
        self.assert_ask(403, "GET", "/ui", None, {"Host": "evil.example"})
        self.assert_ask(200, "GET", "/health", None, {"Host": "evil.example"})
        self.served = self.at_gate(token="tok")
        self.assert_ask(200, "GET", "/ui")

    def test_a_stream_can_begin_with_the_newest_events(self) -> None:
        newest = self.served.newest()
        for last, first in ((0, None), (2, newest - 1), (1000, 0)):
            with self.served.listen(f"/events?last={last}") as reader:
                self.assertEqual(first, reader.event()[0] if last else None)  # type: ignore[index]
        self.assert_ask(400, "GET", "/events?last=-1")


class Browser:
    """Headless Chromium behind chromedriver. Source: W3C WebDriver, Chrome DevTools Protocol."""

    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
    FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run
        --disable-background-networking --disable-component-update --disable-sync""".split()

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="smithers-browser-")
        self.port, self.path = free_port(), ""
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_answer(self.port, "/status")
        options = {"args": [*self.FLAGS, f"--user-data-dir={self.folder}"]}
        logs = {"performance": "ALL", "browser": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        made = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.path = f"/session/{made['sessionId']}"

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait(PATIENCE)
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method != "POST" else body or {}
        reply = ask(self.port, method, self.path + path, data)
        value = (reply.body if isinstance(reply.body, dict) else json.loads(reply.body))["value"]
        if reply.status != 200:
            raise AssertionError(f"{path}: {value['message'].splitlines()[0]}")
        return value

    def run(self, script: str, *args: Any) -> Any:
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def tell(self, command: str, **params: Any) -> Any:
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def show(self, width: int = 1280, height: int = 800, is_dark: bool = False) -> None:
        """Take this size and colour."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.tell("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[feature])

    def wait(self, script: str, *args: Any) -> Any:
        """Return what a script returns, as soon as it is something."""
        found: list[Any] = [None]

        def holds() -> Any:
            found[0] = self.run(script, *args)
            return found[0]

        try:
            eventually(holds)
        except AssertionError as error:
            text = self.run("return document.body.innerText")
            raise AssertionError(f"{script} {args} in {text}") from error
        return found[0]

    def see(self, *texts: str) -> None:
        for text in texts:
            self.wait("return document.body.innerText.includes(arguments[0])", text)

    def find(self, text: str) -> str:
        """Return the button or link with this text or label, once it can be used."""
        script = """return Array.from(document.querySelectorAll("button, a")).find((one) =>
            one.offsetParent && !one.disabled &&
            (one.innerText.trim() === arguments[0] || one.ariaLabel === arguments[0]))"""
        return str(self.wait(script, text)[self.ELEMENT])

    def click(self, *texts: str) -> None:
        for text in texts:
            self.ask("POST", f"/element/{self.find(text)}/click")

    def type(self, label: str, text: str) -> None:
        script = """const found = Array.from(document.querySelectorAll("label")).find((one) =>
            one.innerText.startsWith(arguments[0]));
            return found && found.querySelector("input, textarea")"""
        element = self.wait(script, label)[self.ELEMENT]
        self.ask("POST", f"/element/{element}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Return what has been logged since the last time."""
        return list(self.ask("POST", "/se/log", {"type": kind}))


TAB, ENTER, ESCAPE = "\ue004", "\ue007", "\ue00c"
FOCUSED = "return document.activeElement.innerText"
MARKUP = "<img src=x onerror=document.title='hit'><b>bold</b>"


def speak(text: str) -> dict[str, str]:
    current_task().log(text)
    return {text: text}


def fail_with(text: str) -> None:
    raise ValueError(text)


@unittest.skipUnless(shutil.which("chromedriver"), "chromedriver is not installed")
class BrowserTest(ServerCase):
    """The page in a real browser; afterwards it must have no error and have asked nobody else."""

    browser: Browser

    @classmethod
    def setUpClass(cls) -> None:
        cls.browser = Browser()
        cls.addClassCleanup(cls.browser.close)

    def setUp(self) -> None:
        super().setUp()
        self.browser.show()
        self.ports = set[int]()
        self.browser.log("performance"), self.browser.log("browser")
        self.addCleanup(self.check_browser)

    def check_browser(self) -> None:
        self.browser.ask("POST", "/url", {"url": "about:blank"})
        entries = self.browser.log("browser")
        errors = [e for e in entries if e["source"] != "network" and e["level"] != "DEBUG"]
        self.assertEqual(errors, [])
        messages = (json.loads(e["message"])["message"] for e in self.browser.log("performance"))
        asked = [
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
        ]
        own = tuple(f"http://127.0.0.1:{port}/" for port in self.ports)
        self.assertEqual([url for url in asked if not url.startswith((*own, "data:"))], [])

    def open(self, served: RunServer | None = None, at: str = "#/") -> RunServer:
        served = served or self.served
        self.ports.add(served.port)
        self.browser.ask("POST", "/url", {"url": f"http://127.0.0.1:{served.port}/ui{at}"})
        return served

    def go(self, at: str) -> None:
        self.browser.run("location.hash = arguments[0]", at)

    def live(self, *tree: Any) -> RunServer:
        """Serve a run that an engine drives, at its gate."""
        served = self.fresh()
        served.start(list(tree) or release, "NodeWaitingApproval deploy")
        return served

    def test_a_stranger_approves_on_a_phone(self) -> None:
        self.browser.show(360, 740)
        served = self.open(self.live())
        self.browser.see("1 decision is waiting", "1 of 3 steps done")
        self.assertEqual(self.browser.run("return document.title"), "(1) release · Waiting")
        self.browser.click("Review: Deploy?")
        self.browser.see("What led here", "app-1.0", "The run goes on.")
        self.browser.type("Your name", "alice")
        self.browser.type("Note", "looks good")
        self.browser.click("Approve deploy", "Yes, approve deploy")
        self.browser.see("Approved by alice", "looks good")
        self.browser.click("← Run")
        self.browser.see("The run has finished", "3 of 3 steps done", "Ended")
        self.assertEqual(self.browser.run("return document.title"), "release · Finished")
        gate = self.gate(served.run_id)
        self.assertEqual((gate.decided_by, gate.note), ("alice", "looks good"))

    def test_what_looks_like_markup_stays_text(self) -> None:
        with self.assertLogs("smithers_serve"):
            served = self.fresh()
            tree = Workflow(
                MARKUP,
                Task("speak", speak, args=[MARKUP], label=MARKUP),
                Task("fails", fail_with, args=[MARKUP], continue_on_fail=True),
                Approval("first"),
                Approval(
                    "deploy",
                    title=MARKUP,
                    summary=MARKUP,
                    approvers=[MARKUP],
                    metadata={MARKUP: MARKUP},
                    needs=["speak", "fails", "first"],
                ),
            )
            served.start(tree, "NodeWaitingApproval first")
            said = {"note": MARKUP, "decidedBy": MARKUP}
            self.assertEqual(served.ask("POST", "/approve/first", said).status, 200)
        self.open(served)
        self.browser.see("1 decision is waiting")
        nodes = [f"#/node/{name}/0" for name in ("deploy", "first", "speak", "fails")]
        for at in ("#/", *nodes, "#/log", "#/timeline"):
            self.go(at)
            self.browser.wait("return document.querySelector('[aria-current], .back, .log')")
            if at != "#/timeline":
                self.browser.see(MARKUP)
            self.assertIsNone(self.browser.run("return document.querySelector('main img, main b')"))
        self.assertIn("<img", self.browser.run("return document.title"))

    def test_a_second_decider_is_told_who_was_first(self) -> None:
        served = self.open(self.live(), "#/node/deploy/0")
        self.browser.type("Note", "my own words")
        self.browser.click("Approve deploy")
        served.ask("POST", "/deny/deploy", {"decidedBy": "bob", "note": "not today"})
        self.browser.click("Yes, approve deploy")
        self.browser.see("Nothing was changed", "Denied by bob", "not today", "my own words")

    def test_a_refusal_is_told_and_keeps_the_note(self) -> None:
        served = self.open(self.live(Approval("deploy", approvers=["ops"])), "#/node/deploy/0")
        self.browser.type("Note", "please")
        self.browser.click("Deny deploy", "Yes, deny deploy")
        self.browser.see("You may not do this", "decided by ops", "Your note is kept")
        self.assertEqual(
            self.browser.run("return document.querySelector('textarea').value"), "please"
        )
        self.assertEqual(self.gate(served.run_id).status, "requested")

    def test_decisions_are_off_until_the_server_is_back(self) -> None:
        served = self.open(self.live(), "#/node/deploy/0")
        self.browser.type("Note", "kept")
        self.browser.find("Approve deploy")
        served.stop()
        self.browser.see("The server does not answer", "Decisions are off", "Offline")
        self.assertTrue(self.browser.run("return document.querySelector('.yes').disabled"))
        again = ss.make_server(served.app, LOOPBACK, served.port)
        again.start()
        self.addCleanup(again.stop)
        self.browser.click("Approve deploy", "Yes, approve deploy")
        self.browser.see("Approved", "kept")
        self.go("#/log")
        self.browser.see("The run finished")
        lines = self.browser.run("return document.querySelector('.log').innerText").split("\n")
        self.assertEqual(len(lines), len(set(lines)), lines)

    def test_a_decision_on_a_lost_connection_is_told_as_unknown(self) -> None:
        served = self.open(self.live(), "#/node/deploy/0")
        self.browser.type("Note", "half said")
        self.browser.click("Deny deploy")
        served.stop()
        self.browser.click("Yes, deny deploy")
        self.browser.see("may have arrived or not", "Your note is kept")
        note = self.browser.run("return document.querySelector('textarea').value")
        self.assertEqual(note, "half said")

    def test_the_keyboard_is_enough(self) -> None:
        served = self.open(self.live(), "#/node/deploy/0")
        self.browser.find("Deny deploy")
        for _ in range(30):
            self.browser.press(TAB)
            if self.browser.run(FOCUSED) == "Deny deploy":
                break
        self.browser.press(ENTER)
        self.assertEqual(self.browser.wait(FOCUSED), "Go back")
        self.browser.press(TAB)
        self.assertEqual(self.browser.run(FOCUSED), "Yes, deny deploy")
        self.browser.press(ESCAPE)
        self.assertEqual(self.browser.wait(FOCUSED), "Deny deploy")
        self.browser.press(TAB, ENTER, TAB, ENTER)
        self.browser.see("Approved")
        self.assertEqual(self.gate(served.run_id).status, "approved")

    def test_a_token_is_asked_for_and_kept_in_the_tab(self) -> None:
        served = self.at_gate(token="tok")
        self.open(served, "#/node/deploy/0")
        self.browser.see("This run is locked")
        self.browser.type("Token", "wrong" + ENTER)
        self.browser.see("That token was refused")
        self.browser.type("Token", "tok" + ENTER)
        self.browser.see("Deploy?", "What led here")
        self.assertNotIn("tok", self.browser.run("return location.href + document.cookie"))
        self.open(served, "?again#/")
        self.browser.see("1 decision is waiting")

    def test_without_an_engine_it_says_when_a_decision_counts(self) -> None:
        self.open(at="#/node/deploy/0")
        self.browser.see("No engine drives this run", f"--resume --run-id {RUN}")
        self.browser.click("Approve deploy", "Yes, approve deploy")
        self.browser.see("It counts when somebody resumes the run")

    def test_a_run_is_cancelled_by_name_and_reason(self) -> None:
        served = self.open(self.live())
        self.browser.click("Cancel run…")
        self.browser.type("Your name", "carol")
        self.browser.type("Why", "wrong branch")
        self.browser.click("Yes, cancel the run")
        self.browser.see("The run was cancelled")
        told = served.events()[-1].payload
        self.assertEqual((told["by"], told["reason"]), ("carol", "wrong branch"))

    def test_new_nodes_take_their_place_in_the_tree(self) -> None:
        def tree(ctx: Ctx) -> Workflow:
            more = [Task("grown", answer)] if ctx.output("deploy") else []
            return Workflow("grows", Approval("deploy"), *more, Task("waits", wait_for_go))

        served = self.fresh()
        served.start(tree, "NodeWaitingApproval deploy")
        self.open(served)
        self.browser.see("waits")
        served.ask("POST", "/approve/deploy")
        names = "return Array.from(document.querySelectorAll('.name')).map((one) => one.innerText)"
        self.browser.wait(f"{names}.join() === 'deploy,grown,waits'")
        GO.set()
        self.browser.see("The run has finished")

    def test_ten_thousand_nodes_and_a_long_log_stay_small(self) -> None:
        change(
            self.path,
            f"""with recursive numbers(n) as (select 1 union all select n + 1
            from numbers where n < 10000) insert into _smithers_nodes
            (run_id, node_id, iteration, state) select '{RUN}', 'n' || n, 0, 'finished'
            from numbers""",
        )
        fill(self.served, 100_000)
        self.open()
        self.browser.see("10003 steps", "n1\n")
        self.browser.wait("scrollTo(0, 1e9); return document.body.innerText.includes('n9999\\n')")
        for at in ("#/", "#/log", "#/timeline"):
            self.go(at)
            self.browser.wait("return document.querySelector('main h1')")
            count = self.browser.run("return document.querySelectorAll('*').length")
            self.assertLess(count, 1000)
        self.go("#/log")
        self.browser.see("500 lines, and older ones")
        self.browser.click("Older lines")
        self.browser.see("1500 lines, and older ones")

    def test_fifty_gates_are_told_at_once(self) -> None:
        gates = Parallel(*(Approval(f"g{n}", title=f"Gate {n}?") for n in range(50)))
        served = self.fresh()
        served.run_to_gate([gates])
        self.open(served)
        self.browser.see("50 decisions are waiting", "Gate 49?")
        self.assertLess(self.browser.run("return document.querySelectorAll('*').length"), 2000)

    def test_a_hidden_tab_closes_its_stream(self) -> None:
        served = self.open(self.live())
        eventually(lambda: served.streams() == "1")
        before = self.browser.ask("GET", "/window")
        other = self.browser.ask("POST", "/window/new", {"type": "tab"})["handle"]
        self.browser.ask("POST", "/window", {"handle": other})
        eventually(lambda: served.streams() == "0")
        self.browser.ask("DELETE", "/window")
        self.browser.ask("POST", "/window", {"handle": before})
        eventually(lambda: served.streams() == "1")
        self.browser.see("Live")

    def test_back_returns_to_where_one_was(self) -> None:
        self.open()
        self.browser.click("Review: Deploy?")
        self.browser.see("Your decision")
        self.browser.ask("POST", "/back")
        self.browser.see("1 decision is waiting")

    def test_a_phone_shows_all_of_it_and_fingers_hit(self) -> None:
        self.browser.show(360, 740)
        self.open(self.live())
        for at in "#/ #/node/deploy/0 #/node/build/0 #/log #/timeline".split():
            self.go(at)
            self.browser.wait("return document.querySelector('h2, .log, svg')")
            with self.subTest(at=at):
                self.assertEqual(self.browser.run("return document.body.scrollWidth"), 345)
                small = self.browser.run("""return Array.from(document.querySelectorAll(
                    "button, input, textarea, nav a, .button, .node, .back")).filter((one) =>
                    one.offsetParent && one.type !== "checkbox" && one.offsetHeight < 44)
                    .map((one) => one.outerHTML)""")
                self.assertEqual(small, [])

    @unittest.skipUnless(os.environ.get("SMITHERS_AXE"), "SMITHERS_AXE names no axe.min.js")
    def test_axe_finds_nothing_serious(self) -> None:
        with open(os.environ["SMITHERS_AXE"], encoding="utf-8") as file:
            axe = file.read()
        with self.assertLogs("smithers_serve"):
            served = self.live(
                Task("fails", fail_with, args=["no luck"], continue_on_fail=True),
                Approval("deploy", metadata={"to": "all"}, needs=["fails"]),
            )
        places = [
            (served, "#/node/deploy/0"),
            (served, "#/node/fails/0"),
            (served, "#/log"),
            (served, "#/timeline"),
            (served, "#/"),
            (self.served, "#/node/deploy/0"),
            (self.at_gate(token="tok"), "#/"),
        ]
        for is_dark in (False, True):
            for width in (1280, 360):
                self.browser.show(width, 800, is_dark)
                for place, at in places:
                    self.open(place, f"?{width}{is_dark}{at}")
                    self.browser.wait(
                        "return document.querySelector('h2, .log, svg, [type=password]')"
                    )
                    self.browser.run(axe)
                    ran = "const end = arguments[0]; axe.run().then((all) => end(all.violations))"
                    found = self.browser.ask("POST", "/execute/async", {"script": ran, "args": []})
                    shown = [
                        (one["id"], [n["html"] for n in one["nodes"]][:3])
                        for one in found
                        if one["impact"] in ("serious", "critical")
                    ]
                    self.assertEqual(shown, [], (at, width, is_dark))


# ---------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------

COUNTERS = """runs_total runs_finished_total runs_failed_total runs_cancelled_total
runs_resumed_total nodes_started nodes_finished nodes_failed node_retries_total errors_total
events_emitted_total approvals_requested approvals_granted approvals_denied db_retries
http_requests""".split()
GAUGES = """runs_active nodes_active approval_pending scheduler_queue_depth
scheduler_concurrency_utilization process_uptime_seconds process_memory_rss_bytes
event_streams_active""".split()
HISTOGRAMS = """run_duration_ms node_duration_ms attempt_duration_ms approval_wait_duration_ms
scheduler_wait_duration_ms db_query_ms http_request_duration_ms""".split()

RENDERED_SAMPLES = (
    "# HELP smithers_runs_total Runs started or resumed here.\n"
    "# TYPE smithers_runs_total counter\n"
    "smithers_runs_total 3\n",
    "# TYPE smithers_scheduler_queue_depth gauge\nsmithers_scheduler_queue_depth -0.5\n",
    'smithers_db_query_ms_bucket{le="1"} 2\nsmithers_db_query_ms_bucket{le="2"} 2\n',
    'smithers_db_query_ms_bucket{le="2048"} 3\nsmithers_db_query_ms_bucket{le="+Inf"} 4\n'
    "smithers_db_query_ms_sum 7049.25\nsmithers_db_query_ms_count 4\n",
    'smithers_http_requests{method="a\\"b\\\\c\\nd",route="/",'
    'status_code="200",status_class="2xx"} 1\n',
)

BUCKETS = [str(100 * 2**k) for k in range(12)], [str(2**k) for k in range(12)]
PATTERNS = {"/health", "/", "/events", "/frames", "/approve/:nodeId", "/deny/:nodeId", "/cancel"}
PATTERNS.add("/metrics")


class MetricsTest(ServerCase):
    def scrape(self) -> str:
        """Return the metrics of a process of its own, asked for after /health."""
        app = ss.create_serve_app(adapter=self.foreign_database(), run_id=RUN)
        self.addCleanup(app.close)
        app.request("GET", "/health")
        reply = app.request("GET", "/metrics")
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        self.assertEqual((reply.status, reply.headers["Content-Type"]), (200, content_type))
        return reply.body.decode()

    def test_samples_render_exactly(self) -> None:
        metrics = ss.Metrics()
        metrics.inc("smithers_runs_total")
        metrics.inc("smithers_runs_total", 2)
        metrics.inc("smithers_scheduler_queue_depth", -0.5)
        for value in (0.25, 1, 2048, 5000):
            metrics.observe("smithers_db_query_ms", value)
        metrics.observe_request('a"b\\c\nd', "/", 200, 1.0)
        text = metrics.render()
        for part in RENDERED_SAMPLES:
            self.assertIn(part, text)

    def test_every_family_is_there_from_the_start(self) -> None:
        text = self.scrape()
        kinds = dict(re.findall(r"^# TYPE smithers_(\S+) (\S+)$", text, re.MULTILINE))
        families = {"counter": COUNTERS, "gauge": GAUGES, "histogram": HISTOGRAMS}
        expected = {name: kind for kind, names in families.items() for name in names}
        self.assertEqual(kinds, expected)
        self.assertEqual(re.findall(r"^# HELP smithers_(\S+) \S", text, re.MULTILINE), list(kinds))
        for name in set(GAUGES):
            self.assertRegex(text, rf"(?m)^smithers_{name} [0-9]")
        for name in set(COUNTERS) - {"http_requests"}:
            self.assertIn(f"\nsmithers_{name} 0\n", text)

    def test_samples_follow_their_own_family(self) -> None:
        text, family = self.scrape(), ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ")[2]
            elif not line.startswith("#"):
                self.assertRegex(line, rf"\A{family}(_bucket|_sum|_count)?(\{{.*\}})? [^ ]+\Z")
        self.assertTrue(text.endswith("\n"))

    def test_buckets_are_ordered_with_one_infinity(self) -> None:
        text = self.scrape()
        for name in HISTOGRAMS:
            pattern = rf'^smithers_{name}_bucket{{(?:.*,)?le="(.*)"}} (\d+)$'
            found = re.findall(pattern, text, re.MULTILINE)
            fast = name in ("db_query_ms", "http_request_duration_ms")
            self.assertEqual([mark for mark, _ in found], [*BUCKETS[fast], "+Inf"], name)
            counts = [int(count) for _, count in found]
            self.assertEqual(counts, sorted(counts))
            self.assertRegex(text, rf"(?m)^smithers_{name}_count(\{{.*\}})? {counts[-1]}$")

    def test_a_run_is_counted(self) -> None:
        served = self.fresh(db=self.foreign_database())
        tree = [Task("flaky", fail_once, retries=1), Approval("deploy")]
        live = served.start(tree, PARKS)
        waiting = served.metrics()
        self.assertEqual((waiting["runs_active"], waiting["approval_pending"]), ("1", "1"))
        served.ask("POST", "/approve/deploy")
        live.end()
        expected = {
            "runs_total": 1,
            "runs_finished_total": 1,
            "runs_failed_total": 0,
            "runs_cancelled_total": 0,
            "nodes_started": 2,
            "nodes_failed": 0,
            "node_retries_total": 1,
            "errors_total": 1,
            "events_emitted_total": len(served.events()),
            "approvals_requested": 1,
            "approvals_granted": 1,
            "approvals_denied": 0,
            "run_duration_ms_count": 1,
            "attempt_duration_ms_count": 2,
            "approval_wait_duration_ms_count": 1,
        }
        values = served.metrics()
        self.assertEqual({name: int(values[name]) for name in expected}, expected)

    def test_gauges_are_back_at_zero_after_a_run(self) -> None:
        db = self.foreign_database()
        for end in ("approve/deploy", "deny/deploy", "cancel"):
            with self.subTest(end=end):
                served = self.fresh(db=db)
                live = served.start()
                with served.listen() as reader:
                    reader.until("NodeWaitingApproval")
                    self.assertEqual(served.streams(), "1")
                    served.ask("POST", f"/{end}")
                    reader.rest()
                live.end()
                eventually(lambda served=served: served.streams() == "0")
                values = served.metrics()
                zero = [name for name in GAUGES if not name.startswith("process_")]
                self.assertEqual([values[name] for name in zero], ["0"] * len(zero))
        for name in ("runs_finished_total", "runs_failed_total", "runs_cancelled_total",
                     "approvals_granted", "approvals_denied"):  # fmt: skip
            self.assertEqual(values[name], "1", name)

    def test_requests_are_labelled_by_pattern(self) -> None:
        for method, path in (
            ("GET", "/?x=secret-path"),
            ("POST", "/approve/secret-node"),
            ("GET", "/secret-path"),
            ("GET", "/approve/secret-node"),
            ("SECRET", "/"),
            ("HEAD", "/health"),
        ):
            self.served.ask(method, path)
        send(self.served.port, b"secret-line\r\n\r\n")
        text = self.assert_ask(200, "GET", "/metrics").body
        self.assertNotIn("secret", text.lower())
        routes = set(re.findall(r'route="([^"]*)"', text))
        self.assertEqual(len(routes - PATTERNS), 1)
        self.assertIn("/approve/:nodeId", routes)
        labels = 'method="HEAD",route="/health",status_code="200",status_class="2xx"'
        self.assertIn(f"smithers_http_requests{{{labels}}} 1\n", text)

    def test_metrics_can_be_switched_off(self) -> None:
        self.served = self.at_gate(metrics=False)
        self.assert_ask(404, "HEAD", "/metrics")
        self.assert_refused(404, "NOT_FOUND", "", "GET", "/metrics")


# ---------------------------------------------------------------------------
# Mounts
# ---------------------------------------------------------------------------


class QuietHandler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class MountTest(ServerCase):
    """The same app without its own server: under wsgiref at a prefix, and without a socket."""

    token = "tok"

    def mount(self) -> int:
        """Serve the app at /smithers under wsgiref and return the port."""
        app = wsgiref.validate.validator(self.served.app)

        def site(environ: dict[str, Any], start_response: Any) -> Any:
            if environ["PATH_INFO"].startswith("/smithers/"):
                wsgiref.util.shift_path_info(environ)
                return app(environ, start_response)
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"not here"]

        server = wsgiref.simple_server.make_server(
            LOOPBACK, 0, wsgiref.validate.validator(site), handler_class=QuietHandler
        )
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        for cleanup in (thread.join, server.server_close, server.shutdown):
            self.addCleanup(cleanup)
        return server.server_port

    def test_a_mount_answers_like_the_server(self) -> None:
        port = self.mount()
        for method, path, body in (
            ("GET", "/health", None),
            ("GET", "/", None),
            ("HEAD", "/", None),
            ("GET", "/frames?limit=1", None),
            ("GET", "/frames?limit=x", None),
            ("POST", "/approve/nobody", {"note": "x"}),
            ("POST", "/approve/deploy", b"["),
            ("POST", "/approve/%2564eploy", None),
            ("DELETE", "/frames", None),
            ("GET", "/nowhere", None),
            ("POST", "/approve/deploy", {"note": "yes"}),
            ("POST", "/approve/deploy", None),
            ("GET", "/", None),
            ("POST", "/deny/deploy", None),
        ):
            with self.subTest(method=method, path=path):
                own = self.served.ask(method, path, body, bearer())
                mounted = ask(port, method, "/smithers" + path, body, bearer())
                self.assertEqual((mounted.status, mounted.body), (own.status, own.body))
                for name in ("content-type", "content-length", "cache-control", "allow"):
                    self.assertEqual(mounted.headers.get(name), own.headers.get(name))

    def test_a_mount_asks_for_the_token(self) -> None:
        port = self.mount()
        self.assertEqual(ask(port, "GET", "/smithers/health").status, 200)
        self.assertEqual(ask(port, "GET", "/smithers/").status, 401)
        self.assertEqual(ask(port, "GET", "/").body, "not here")
        headers = {**bearer(), "Origin": "http://evil.example"}
        self.assertEqual(ask(port, "POST", "/smithers/cancel", None, headers).status, 403)

    def test_a_mounted_stream_follows_the_run(self) -> None:
        port = self.mount()
        with EventReader(port, "/smithers/events?afterSeq=0", bearer()) as reader:
            self.assertEqual(reader.headers["content-type"], "text/event-stream")
            self.assertEqual(reader.block(), "retry: 1000")
            self.assertEqual(reader.until(1), 1)
            self.assert_ask(200, "POST", "/cancel", None, bearer())
            self.assertEqual(reader.rest()[-1], self.served.newest())
        headers = {**bearer(), "Last-Event-ID": str(self.served.newest())}
        self.assertEqual(ask(port, "GET", "/smithers/events", None, headers).status, 204)

    def test_a_client_that_leaves_a_mount_is_forgotten(self) -> None:
        answer = self.request("GET", "/events")
        self.assertEqual(next(answer.chunks), b"retry: 1000\n\n")
        self.assertEqual(self.served.streams(), "1")
        answer.chunks.close()
        self.assertEqual(self.served.streams(), "0")

    def test_a_too_large_body_is_refused_in_a_mount(self) -> None:
        head = post(
            b"", b"Content-Length: 1048577", b"x-smithers-key: tok", path=b"/smithers/cancel"
        )
        with connect(self.mount(), head) as sock:
            self.assertIn(b" 413 ", sock.recv(65536).partition(b"\r\n")[0])

    def request(self, method: str, path: str, **options: Any) -> Any:
        return self.served.app.request(method, path, headers=bearer(), **options)

    def test_requests_without_a_socket(self) -> None:
        answer = self.request("GET", "/")
        self.assertEqual((answer.status, answer.headers["Content-Type"]), (200, "application/json"))
        self.assertEqual(answer.json(), self.served.ask("GET", "/", None, bearer()).body)
        approved = self.request("POST", "/approve/deploy", json={"note": "x", "decidedBy": "y"})
        self.assertEqual((approved.status, approved.json()), (200, ACCEPTED))
        self.assertEqual(self.request("POST", "/deny/deploy").status, 409)
        self.assertEqual(self.request("POST", "/approve/deploy", body=b"{").status, 400)
        for path in ("/frames?limit=0", "/approve/%ff"):
            self.assertEqual(self.request("GET", path).status, 400)
        self.assertEqual(self.request("HEAD", "/").body, b"")
        self.assertEqual(self.served.app.request("GET", "/").status, 401)

    def test_an_answer_can_be_read_again(self) -> None:
        answer = self.request("GET", "/health")
        self.assertEqual((answer.body, answer.body), (b'{"ok":true}', b'{"ok":true}'))
        self.assertEqual((answer.json(), answer.json()), ({"ok": True}, {"ok": True}))

    def test_a_stream_without_a_socket(self) -> None:
        answer = self.request("GET", "/events")
        self.assertEqual(next(answer.chunks), b"retry: 1000\n\n")
        self.assertEqual(next(answer.chunks).decode(), sse_of(self.served.events())[13:])
        last = self.served.newest()
        self.request("POST", "/cancel")
        rest = b"".join(answer.chunks).decode()
        self.assertEqual(rest, sse_of(self.served.events(last))[13:])
        self.assertEqual(self.request("HEAD", "/events").body, b"")


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------

WORKFLOWS = """
import subprocess, time
import smithers_serve
from smithers_serve import Approval, Ctx, Task, Workflow, current_task

def announce(ref):
    print("printed by a task")
    current_task().log("told \\x1b[31meverybody")
    return {"announced": ref}

def workflow(ctx: Ctx) -> Workflow:
    return Workflow("bugfix", Task("build", {"ok": True}), Approval("deploy", title="Deploy?"),
                    Task("announce", announce, args=(ctx.input.get("ref"),)))

def other(ctx: Ctx) -> Workflow:
    return Workflow("other", Task("announce", announce, kwargs={"ref": ctx.input.get("ref")}))

def shout():
    subprocess.run(["echo", "printed by a process"])

loud = Workflow("loud", Task("shout", shout))

def is_same():
    import sys
    assert isinstance(current_task(), smithers_serve.CurrentTask)
    assert sys.modules["__main__"].Task is Task is smithers_serve.Task
    return isinstance(same, smithers_serve.Workflow)

same = Workflow("same", Task("check", is_same))

def fail():
    raise RuntimeError("it broke")

failing = Workflow("failing", Task("fail", fail))

def wait(ctx: Ctx) -> Workflow:
    return Workflow("wait", Task("before", {"n": 1}),
                    Task("sleep", ["sleep", "60"] if ctx.output("sleep") is None else {"n": 2}))

def nap():
    if current_task().attempt == 0:
        current_task().log("asleep")
        current_task().cancelled.wait(60)

napping = Workflow("napping", Task("before", {"n": 1}), Task("nap", nap), Task("after", {"n": 3}))

def deaf():
    current_task().log("deaf")
    time.sleep(60)

ignoring = Workflow("ignoring", Task("deaf", deaf))
number = 7
"""


MODULE = ("-m", "smithers_serve")


class CommandCase(RunCase):
    """Tests of the command line, most of them in this process; none has a database yet."""

    def setUp(self) -> None:
        super().setUp()
        self.db.close()
        for name in os.listdir(self.folder):
            os.remove(self.in_folder(name))
        self.write("flow.py", WORKFLOWS)

    def tearDown(self) -> None:
        if os.path.exists(self.path):
            self.db = self.adapter()
            self.check_database(self.db)

    def main(self, *argv: str, said: str = "", **env: str) -> tuple[int, str, str]:
        """Call main() in the folder and return (exit code, stdout, stderr)."""
        out, err = io.StringIO(), io.StringIO()
        numbers = (signal.SIGINT, signal.SIGTERM)
        kept, modules, handlers = os.getcwd(), set(sys.modules), logging.root.handlers[:]
        signals = [signal.getsignal(number) for number in numbers]
        try:
            os.chdir(self.folder)
            with mock.patch.dict(os.environ), mock.patch("sys.path", sys.path[:]):
                os.environ.pop("SMITHERS_API_KEY", None)
                os.environ.update(env)
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    with mock.patch("sys.stdin", io.StringIO(said)):
                        code = ss.main(argv)
        finally:
            os.chdir(kept)
            logging.root.handlers[:] = handlers
            for number, handler in zip(numbers, signals):
                signal.signal(number, handler)
            for name in set(sys.modules) - modules:
                del sys.modules[name]
        return code, out.getvalue(), err.getvalue()

    def up(self, name: str = "workflow", *flags: str, **env: str) -> Child:
        """Start `up --serve` of one of WORKFLOWS in a process of its own, on a free port."""
        argv = ("up", f"flow.py:{name}", "-r", "r", "--serve", "--port", "0", *flags)
        return Child(*MODULE, *argv, folder=self.folder, **env)

    def finished(self) -> None:
        """Open the database that the command has made."""
        self.db = self.adapter()


class UpTest(CommandCase):
    def test_the_specifications_example_works(self) -> None:
        token = bearer("sk-secret")
        flags = ("--auth-token", "sk-secret", "--input", '{"ref":"v1"}')
        with self.up("workflow", *flags) as child:
            port = child.port
            with EventReader(port, headers=token) as reader:
                self.assertEqual(ask(port, "GET", "/").status, 401)
                reader.until("NodeWaitingApproval")
                body = ask(port, "GET", "/", None, token).body
                self.assertEqual(body["workflowName"], "bugfix")
                said = {"note": "Ship it", "decidedBy": "alice"}
                headers = {**token, "Content-Type": "application/json"}
                reply = ask(port, "POST", "/approve/deploy", said, headers)
                self.assertEqual((reply.status, reply.body), (200, {"runId": "r"}))
                self.assertEqual(ask(port, "GET", "/health").body, {"ok": True})
                reader.rest()
                self.assertTrue(reader.has_ended)
            child.wait_for("Workflow finished. Server still running — press Ctrl.C to stop.")
            body = ask(port, "GET", "/", None, token).body
            self.assertEqual((body["status"], body["summary"]), ("finished", {"finished": 3}))
            code, out = child.finish(signal.SIGINT)
        self.assertEqual((code, json.loads(out)["status"]), (0, "finished"))
        self.assertNotIn("sk-secret", child.text())
        self.assertIn("deploy approved by alice: Ship it", child.text())

    def test_a_colon_picks_another_object(self) -> None:
        code, out, err = self.main("up", "flow.py:other", "-i", '{"ref":"v2"}', "-r", "r")
        self.assertEqual(code, 0, err)
        shown = {"runId": "r", "status": "finished", "summary": {"finished": 1}}
        self.assertEqual((json.loads(out), out.count("\n")), (shown, 1))
        self.assertIn("printed by a task\n", err)
        self.assertIn("announce | told \\x1b[31meverybody", err)
        self.finished()
        self.assertEqual(self.output("announce"), {"announced": "v2"})

    def test_what_a_tasks_process_prints_stays_out(self) -> None:
        for name, printed in (("loud", "printed by a process\n"), ("other", "printed by a task\n")):
            code, out, err = run_child(*MODULE, "up", f"flow.py:{name}", folder=self.folder)
            self.assertEqual((code, out.count("\n")), (0, 1))
            self.assertEqual(list(json.loads(out)), ["runId", "status", "summary"])
            self.assertIn(printed, err)

    def test_the_workflow_imports_the_running_module(self) -> None:
        argv = ("up", "flow.py:same", "-r", "r")
        code, _, err = run_child(*MODULE, *argv, folder=self.folder)
        self.assertEqual(code, 0, err)
        self.finished()
        self.assertIs(self.output("check"), True)

    def test_input_comes_from_a_file_or_stdin(self) -> None:
        self.write("input.json", '{"ref": "from a file"}')
        for run_id, source, said in (
            ("file", "@input.json", ""),
            ("stdin", "-", '{"ref": "from stdin"}'),
        ):
            code, _, err = self.main("up", "flow.py:other", "-i", source, "-r", run_id, said=said)
            self.assertEqual(code, 0, err)
        self.finished()
        self.assertEqual(self.output("announce", run_id="file"), {"announced": "from a file"})
        self.assertEqual(self.output("announce", run_id="stdin"), {"announced": "from stdin"})

    def test_the_database_is_its_owners_alone(self) -> None:
        self.main("up", "flow.py:other", "--db", "own.db")
        mode = stat.S_IMODE(os.stat(self.in_folder("own.db")).st_mode)
        self.assertEqual(oct(mode), oct(0o600))

    def test_server_flags_are_honoured(self) -> None:
        with self.up("workflow", "--no-metrics", "--allowed-host", "box.example") as child:
            for host, path, status in (
                ("box.example", "/", 200),
                ("evil.example", "/", 403),
                ("box.example", "/metrics", 404),
            ):
                reply = ask(child.port, "GET", path, None, {"Host": host})
                self.assertEqual(reply.status, status, (host, path))

    def test_a_token_comes_from_a_file(self) -> None:
        self.write("token", "  from-file\n")
        flags = ("--auth-token-file", "token", "--metrics", "false")
        with self.up("workflow", *flags, SMITHERS_API_KEY="env") as child:
            for token, path, status in (
                ("from-file", "/", 200),
                ("env", "/", 401),
                ("from-file", "/metrics", 404),
            ):
                reply = ask(child.port, "GET", path, None, bearer(token))
                self.assertEqual(reply.status, status, (token, path))

    def test_a_wide_bind_without_token_warns(self) -> None:
        flags = ("--host", "0.0.0.0", "--metrics", "true")
        with self.up("workflow", *flags) as child:
            child.wait_for("WARNING.*--auth-token")
            self.assertEqual(ask(child.port, "GET", "/metrics").status, 200)

    def test_a_gate_prints_how_to_approve_it(self) -> None:
        with self.up("workflow", "--host", "0.0.0.0", SMITHERS_API_KEY="tok") as child:
            *start, flag, header = shlex.split(child.wait_for(r"Approve it: (.*)"))
            url = f"http://127.0.0.1:{child.port}/approve/deploy"
            self.assertEqual(start, ["curl", "-X", "POST", url])
            self.assertEqual((flag, header), ("-H", "Authorization: Bearer $SMITHERS_API_KEY"))
            self.assertNotIn("WARNING", child.text())

    def test_a_served_run_speaks_tls(self) -> None:
        certificate = make_certificate(self.folder)
        context = ssl.create_default_context(cafile=certificate + ".crt")
        context.check_hostname = False
        with self.up("workflow", "--certfile", certificate) as child:
            self.assertIn("https://", child.wait_for("listening on .*"))
            self.assertEqual(ask(child.port, "GET", "/health", context=context).body, {"ok": True})


class ExitCodeTest(CommandCase):
    def test_without_a_server(self) -> None:
        for name, expected, status in (
            ("other", 0, "finished"),
            ("failing", 1, "failed"),
            ("workflow", 3, "waiting-approval"),
        ):
            code, out, err = self.main("up", f"flow.py:{name}")
            self.assertEqual((code, json.loads(out)["status"]), (expected, status), err)
            if name == "failing":
                self.assertEqual(json.loads(out)["error"]["message"], "Task(s) failed: fail")
                self.assertIn("[smithers] fail failed: it broke\n", err)

    def test_with_a_server_the_runs_own(self) -> None:
        for name, line, expected in (
            ("other", "Workflow finished", 0),
            ("failing", r"Workflow failed\. Server still running", 1),
            ("workflow", "waits for approval", 3),
        ):
            with self.subTest(name=name), self.up(name, "-r", name) as child:
                child.wait_for(line)
                self.assertEqual(child.finish(signal.SIGTERM)[0], expected)

    def test_a_run_cancelled_over_http(self) -> None:
        with self.up("napping") as child:
            child.wait_for("asleep")
            self.assertEqual(ask(child.port, "POST", "/cancel").status, 200)
            child.wait_for("Workflow cancelled")
            self.assertEqual(child.finish(signal.SIGTERM)[0], 2)


class MistakeTest(CommandCase):
    """Every mistake of a user: one clear line, exit code 4, nothing written."""

    def assert_mistakes(self, *mistakes: tuple[str, str], **env: str) -> None:
        """Assert what `up` says of each command line."""
        for says, line in mistakes:
            before = self.contents()
            with self.subTest(line=line):
                code, out, err = self.main("up", *shlex.split(line), **env)
                self.assertEqual((code, out), (4, ""), err)
                self.assertRegex(err, rf"\A\[smithers\] Error: [^\n]*{says}[^\n]*\n\Z")
                self.assertEqual(self.contents(), before)

    def contents(self) -> dict[str, Any]:
        """Return every file of the folder with its bytes; of a database, its rows."""
        found: dict[str, Any] = {}
        for name in sorted(os.listdir(self.folder)):
            path = self.in_folder(name)
            if name == "smithers.db":
                found[name] = rows(path)
            elif os.path.isfile(path) and not name.startswith("smithers.db-"):
                with open(path, "rb") as file:
                    found[name] = file.read()
        return found

    def test_a_file_that_cannot_be_loaded(self) -> None:
        self.write("broken.py", "x = 1\ndef f(:\n")
        self.write("raises.py", "x = 1\n\n1 / 0\n")
        self.write("notes.txt", "hello")
        self.assert_mistakes(
            ("missing.py", "missing.py"),
            ("missing.py", "missing.py:workflow"),
            ("broken.py, line 2.*SyntaxError", "broken.py"),
            ("raises.py, line 3.*ZeroDivisionError", "raises.py"),
            ("notes.txt", "notes.txt"),
            ("nothing", "flow.py:nothing"),
            ("number", "flow.py:number"),
        )

    def test_an_input_that_is_not_json(self) -> None:
        self.assert_mistakes(
            ("--input", "flow.py -i {"),
            ("--input", "flow.py -i NaN"),
            ("missing.json", "flow.py -i @missing.json"),
            ("--input", "flow.py -d -i {"),
        )

    def test_an_address_that_cannot_be_bound(self) -> None:
        with contextlib.closing(socket.socket()) as taken:
            taken.bind((LOOPBACK, 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            self.assert_mistakes(
                (port, f"flow.py --serve --port {port}"),
                ("203.0.113.1", "flow.py --serve --host 203.0.113.1"),
            )

    def test_run_ids_that_do_not_fit(self) -> None:
        self.assertEqual(self.main("up", "flow.py:other", "-r", "r1")[0], 0)
        self.assert_mistakes(
            ("r1 exists", "flow.py:other -r r1"),
            ("--run-id", "flow.py:other --resume"),
            ("a b", "flow.py:other -r 'a b'"),
            ("--force", "flow.py:other --force"),
        )

    def test_databases_that_cannot_be_used(self) -> None:
        self.write("text.db", "this is not a database, but a letter to a friend\n" * 100)
        self.assert_mistakes(
            ("text.db.*not a database", "flow.py --db text.db"),
            ("folder", "flow.py --db no/folder.db"),
            ("database", "flow.py --db ."),
        )

    def test_secrets_that_cannot_be_used(self) -> None:
        self.assert_mistakes(
            ("token", "flow.py --serve --auth-token ''"),
            ("token", "flow.py --serve --auth-token 'a b'"),
            ("missing", "flow.py --serve --auth-token-file missing"),
            ("missing.pem", "flow.py --serve --certfile missing.pem"),
            ("--certfile", "flow.py --serve --keyfile missing.pem"),
        )

    def test_flags_that_do_not_exist(self) -> None:
        for line in (
            "up",
            "up flow.py --port 70000",
            "up flow.py --port ²",
            "up flow.py --metrics perhaps",
            "up flow.py -c 0",
            "up flow.py --nonsense",
            "down",
            "",
        ):
            with self.subTest(line=line):
                code, out, err = self.main(*line.split())
                self.assertEqual((code, out), (4, ""))
                self.assertRegex(err, r"\A\[smithers\] Error: .*--help\n\Z")
        code, out, _ = run_child(*MODULE, "down", folder=self.folder)
        self.assertEqual((code, out), (4, ""))
        self.assertEqual(os.listdir(self.folder), ["flow.py"])

    def test_help_is_no_mistake(self) -> None:
        code, out, err = self.main("up", "--help")
        self.assertEqual((code, err), (0, ""))
        for flag in ("--serve", "--port", "--auth-token-file", "--allowed-host", "--resume"):
            self.assertIn(flag, out)
        self.assertEqual(self.main("--version")[1].strip(), ss.__version__)


class SignalTest(CommandCase):
    def test_a_signal_cancels_the_run_durably(self) -> None:
        for number, name, line in (
            (signal.SIGINT, "napping", "asleep"),
            (signal.SIGINT, "wait", "sleep started"),
        ):
            for flags in ((), ("--serve", "--port", "0")):
                run_id = f"{name}-{len(flags)}"
                argv = ("up", f"flow.py:{name}", "-r", run_id, *flags)
                with self.subTest(run_id=run_id):
                    with Child(*MODULE, *argv, folder=self.folder) as child:
                        child.wait_for(line)
                        code, out = child.finish(number)
                    self.assertEqual((code, json.loads(out)["status"]), (2, "cancelled"))
                    self.finished()
                    self.assertEqual(self.status(run_id), "cancelled")
                    self.assertEqual(self.told(run_id=run_id)[-1], "RunCancelled")
                    states = self.states(run_id)
                    self.assertEqual(states.pop("before"), "finished")
                    self.assertIn("cancelled", states.values())

    def test_a_signal_at_a_gate_closes_it(self) -> None:
        with self.up() as child, EventReader(child.port) as reader:
            reader.until("NodeWaitingApproval")
            self.assertEqual(child.finish(signal.SIGINT)[0], 2)
            reader.rest()
            self.assertTrue(reader.has_ended)
        self.finished()
        self.assertEqual(self.gate().status, "cancelled")

    def test_a_cancelled_run_can_be_resumed(self) -> None:
        with self.up("napping") as child:
            child.wait_for("asleep")
            self.assertEqual(child.finish(signal.SIGINT)[0], 2)
        code, out, err = self.main("up", "flow.py:napping", "--resume", "--retry", "-r", "r")
        self.assertEqual((code, json.loads(out)["status"]), (0, "finished"), err)
        self.finished()
        told = "after 0 finished, before 0 finished, nap 0 cancelled, nap 1 finished"
        self.assertEqual(self.attempts(), told)

    def test_a_deaf_task_holds_no_signal_up(self) -> None:
        hasty = "import sys, smithers_serve as ss; ss.HURRY_SECONDS = 0.3; sys.exit(ss.main())"
        argv = ("up", "flow.py:ignoring", "-r", "r", "--serve", "--port", "0")
        with Child("-c", hasty, *argv, folder=self.folder) as child:
            child.wait_for("deaf . deaf")
            self.assertEqual(child.finish(signal.SIGINT)[0], 2)
        self.finished()
        self.assertEqual(self.status(), "cancelled")

    def test_a_second_signal_leaves_at_once(self) -> None:
        with self.up("ignoring") as child:
            child.wait_for("deaf . deaf")
            child.process.send_signal(signal.SIGINT)
            child.wait_for("Stopping")
            with self.assertRaises(subprocess.TimeoutExpired):
                child.process.wait(2 * ss.SAME_SIGNAL_SECONDS)
            self.assertEqual(child.finish(signal.SIGINT), (2, ""))
        self.finished()
        self.assertNotIn(self.status(), ss.TERMINAL_STATUSES)


class DetachTest(CommandCase):
    def end(self, pid: int) -> None:
        """End a detached process and wait until it has gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        eventually(lambda: not self.is_alive(pid))

    @staticmethod
    def is_alive(pid: int) -> bool:
        with contextlib.suppress(OSError):  # where there is /proc, an orphan may stay a zombie
            with open(f"/proc/{pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] != "Z"
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not os.path.isdir("/proc/self")

    def detach(self, *argv: str) -> tuple[int, str, str]:
        argv = ("up", *argv, "--serve", "--port", "0", "-d")
        return run_child(*MODULE, *argv, folder=self.folder)

    def test_a_detached_run_is_served(self) -> None:
        flags = ("--auth-token", "sk-secret", "-r", "r", "-i", '{"ref":"v3"}')
        code, out, err = self.detach("flow.py", *flags)
        self.assertEqual(code, 0, err)
        shown = json.loads(out)
        self.addCleanup(self.end, shown["pid"])
        self.assertEqual(list(shown), ["runId", "pid", "logFile", "url", "page"])
        self.assertEqual(shown["page"], shown["url"] + "/ui")
        self.assertEqual(shown["runId"], "r")
        self.assertNotEqual(os.getpgid(shown["pid"]), os.getpgid(0))
        if os.path.isdir("/proc/self"):
            with open(f"/proc/{shown['pid']}/cmdline") as line:
                self.assertNotIn("sk-secret", line.read())
        os.kill(shown["pid"], signal.SIGHUP)
        port = int(shown["url"].rpartition(":")[2])
        self.assertEqual(ask(port, "GET", "/").status, 401)
        with EventReader(port, headers=SECRET) as reader:
            reader.until("NodeWaitingApproval")
            ask(port, "POST", "/approve/deploy", None, SECRET)
            reader.rest()
        self.assertEqual(ask(port, "GET", "/", None, SECRET).body["status"], "finished")
        self.finished()
        self.assertEqual(self.output("announce"), {"announced": "v3"})

        def log() -> str:
            with open(shown["logFile"]) as file:
                return file.read()

        eventually(lambda: "announce finished" in log())  # said after it is committed
        self.assertNotIn("sk-secret", log())

    def test_a_child_that_dies_shows_its_log(self) -> None:
        self.write("raises.py", "raise RuntimeError('no such luck')\n")
        code, out, err = self.detach("raises.py")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("no such luck", err)


class DemoTest(CommandCase):
    def test_the_printed_line_approves_the_demo(self) -> None:
        with Child(*MODULE, "demo", "--port", "0", folder=self.folder) as child:
            line = child.wait_for(r"(curl -X POST \S+)")
            url = urllib.parse.urlsplit(shlex.split(line)[-1])
            self.assertEqual(url.port, child.port)
            self.assertEqual(child.wait_for(r"Page: (\S+)"), f"http://127.0.0.1:{url.port}/ui")
            self.assertEqual(ask(child.port, "GET", "/").body["status"], "waiting-approval")
            self.assertEqual(ask(child.port, "POST", url.path).status, 200)
            child.wait_for(r"Workflow finished\. Server still running")
            self.assertEqual(ask(child.port, "GET", "/").body["status"], "finished")
            code, out = child.finish(signal.SIGINT)
            self.assertEqual((code, json.loads(out)["status"]), (0, "finished"))
        self.assertEqual(os.listdir(self.folder), ["flow.py"])


# ---------------------------------------------------------------------------
# README: its own code, run as written
# ---------------------------------------------------------------------------


def readme_blocks(holds: str = "") -> list[str]:
    """Return the README's blocks of Python in order, or those that hold something."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as readme:
        blocks = re.findall(r"^```python\n(.*?)^```$", readme.read(), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if holds in block]


class ReadmeTest(RunCase):
    """A newcomer copies from the README; what is written there must run."""

    def run_block(self, holds: str, *argv: str, more: str = "") -> tuple[int, str, str]:
        """Run a block as `workflow.py`, beside a copy of the module."""
        shutil.copy(os.path.join(HERE, "smithers_serve.py"), self.folder)
        self.write("workflow.py", readme_blocks(holds)[0] + more)
        return run_child(*(argv or ["workflow.py"]), folder=self.folder, PYTHONPATH="")

    def test_every_python_block_compiles(self) -> None:
        for number, block in enumerate(readme_blocks()):
            with self.subTest(block=number):
                compile(block, f"README block {number}", "exec")

    def test_the_workflow_runs_to_its_gate(self) -> None:
        argv = (*MODULE, "up", "workflow.py", "--input", '{"ref": "v1.2"}')
        code, out, err = self.run_block("def workflow(ctx", *argv)
        self.assertEqual(code, 3, err)
        summary = {"finished": 4, "pending": 1, "waiting-approval": 1}
        self.assertEqual(json.loads(out)["summary"], summary)

    def test_the_library_example_runs(self) -> None:
        code, out, err = self.run_block("run_workflow(")
        self.assertEqual((code, out), (0, "finished {'ok': True}\n"), err)

    def test_the_mounted_app_answers_at_its_prefix(self) -> None:
        more = (
            "\nenviron = {'PATH_INFO': '/smithers/health', 'REQUEST_METHOD': 'GET'}"
            "\nprint(b''.join(site(environ, lambda status, headers: print(status))).decode())\n"
        )
        _, out, err = self.run_block("make_wsgi_server", more=more)
        self.assertEqual(out, '200 OK\n{"ok":true}\n', err)


# ---------------------------------------------------------------------------
# Commands: bench, crash and fuzz
# ---------------------------------------------------------------------------


@contextlib.contextmanager
def served(source: str, *flags: str, **env: str) -> Iterator[Child]:
    """Serve a run in a process and a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        with serve_child(folder, source, *flags, **env) as run:
            yield run


def tell(value: Any) -> None:
    print(json.dumps(value), flush=True)


class Vitals(NamedTuple):
    """What /proc says of a process: threads, descriptors, MiB resident, CPU seconds."""

    threads: int
    descriptors: int
    rss: float
    cpu: float


def vitals(pid: int) -> Vitals:
    """Return the vitals of a process. Raises OSError where there is no /proc."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        facts = dict(line.split(":", 1) for line in file if ":" in line)
    rss = int(facts["VmRSS"].split()[0]) / 1024
    return Vitals(int(facts["Threads"]), len(os.listdir(f"/proc/{pid}/fd")), rss, cpu_seconds(pid))


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process's threads, to the nanosecond."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/schedstat") as file:
            total += int(file.read().split()[0])
    return total / 1e9


def cpu_share(pid: int, seconds: float) -> float:
    """Return the share of one core, in percent, that a process uses over some seconds."""
    before, began = vitals(pid).cpu, time.perf_counter()
    time.sleep(seconds)
    return 100 * (vitals(pid).cpu - before) / (time.perf_counter() - began)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


# ---------------------------------------------------------------------------
# Load: one thread, raw sockets, keep-alive
# ---------------------------------------------------------------------------


ANSWER = re.compile(
    rb"HTTP/1\.1 (\d+) [^\r\n]*(?:\r\n[^\r\n]+)*?\r\n(?i:content-length): *(\d+)"
    rb"(?:\r\n[^\r\n]+)*\r\n\r\n"
)


class Load:
    """Keeps `count` connections busy with one request each, and times every answer."""

    def __init__(self, port: int, path: str, count: int) -> None:
        self._request = f"GET {path} HTTP/1.1\r\nHost: {LOOPBACK}\r\n\r\n".encode()
        self._selector = selectors.DefaultSelector()
        self._sockets: dict[int, socket.socket] = {}
        self._sent_at: dict[int, float] = {}
        self._partial: dict[int, bytes] = {}
        self._length = 0  # of the last whole answer: the next one is nearly always as long
        self.latencies: list[float] = []
        self.errors = 0
        for _ in range(count):
            sock = socket.create_connection((LOOPBACK, port), 30)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            self._sockets[sock.fileno()] = sock
            self._selector.register(sock, selectors.EVENT_READ, sock)

    def begin(self) -> None:
        for number, sock in self._sockets.items():
            self._sent_at[number] = time.perf_counter()
            sock.send(self._request)

    def run(self, seconds: float) -> float:
        """Ask for some seconds; return how long it was."""
        clock, sent_at, partial = time.perf_counter, self._sent_at, self._partial
        request, buffer = self._request, bytearray(1 << 18)
        view, note = memoryview(buffer), self.latencies.append
        began = now = clock()
        until = began + seconds
        select = self._poller()
        while now < until:
            for number, sock in select():
                size = sock.recv_into(buffer)
                is_known = size == self._length and number not in partial
                if not (is_known and buffer[9:12] == b"200" or self._take(number, view[:size])):
                    continue
                now = clock()
                note(now - sent_at[number])
                sent_at[number] = now
                sock.send(request)
            now = clock()
        return now - began

    def _poller(self) -> Callable[[], list[tuple[int, socket.socket]]]:
        if not hasattr(selectors, "EpollSelector"):
            return lambda: [(key.fd, key.data) for key, _ in self._selector.select(1.0)]
        import select

        epoll = select.epoll()
        for number in self._sockets:
            epoll.register(number, select.EPOLLIN)
        sockets, poll = self._sockets, epoll.poll
        return lambda: [(number, sockets[number]) for number, _ in poll(1.0, 256)]

    def _take(self, number: int, part: memoryview) -> bool:
        """Take bytes the fast way does not understand; True when an answer is whole."""
        data = self._partial.pop(number, b"") + part
        found = ANSWER.match(data)
        if not data or found is None and b"\r\n\r\n" in data:
            raise RuntimeError(f"not an answer: {data[:200]!r}")
        if found is None or len(data) < found.end() + int(found[2]):
            self._partial[number] = data
            return False
        self._length = len(data)
        self.errors += found[1] != b"200"
        return True


def load_command(port: str, path: str, count: str, seconds: str, rounds: str) -> int:
    """Print the rate and the latencies of several rounds, after a warm-up."""
    load = Load(int(port), path, int(count))
    load.begin()
    load.run(0.5)
    figures = []
    for _ in range(int(rounds)):
        load.latencies.clear()
        took = load.run(float(seconds))
        times = load.latencies
        figures.append(
            {"rate": len(times) / took, "p50": 1000 * percentile(times, 0.5),
             "p99": 1000 * percentile(times, 0.99), "max": 1000 * max(times)}
        )  # fmt: skip
    tell({"rounds": figures, "errors": load.errors})
    return 0


def measure_load(
    port: int, path: str, rounds: int, count: int = 64, seconds: float = 1.5
) -> list[dict[str, float]]:
    """Return `rate`, `p50`, `p99` (ms) of every round, from a load generator of its own."""
    with Child(SELF, "_load", port, path, count, seconds, rounds) as load:
        answer = load.read()
    if answer["errors"]:
        raise RuntimeError(f"{answer['errors']} answers to {path} were not 200")
    figures: list[dict[str, float]] = answer["rounds"]
    return figures


# ---------------------------------------------------------------------------
# Streams: a server and a writer that take orders, and a listener on many streams
# ---------------------------------------------------------------------------


def obey(orders: Any) -> int:
    """Carry out orders, a line of JSON each, until standard input ends."""
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        tell(getattr(orders, name)(*arguments))
    return 0


def serve_command(path: str, prefill: str) -> int:
    """Serve a run whose events are made to order; without prefill, one of another process."""
    db = ss.SmithersDb(path)
    writer = Writer(db) if prefill else None
    if writer is not None:
        writer.emit(int(prefill) - writer.newest() - 1, at_once=10_000)
    sys.setswitchinterval(0.0005)  # as `up --serve` does
    tell(RunServer(db).port)
    return obey(writer)


def write_command(path: str) -> int:
    writer = Writer(ss.SmithersDb(path))
    tell(True)
    return obey(writer)


class Listener:
    """Any number of event streams scanned by one thread."""

    ID = re.compile(rb"\nid: (\d+)\n\n")

    def __init__(self, port: int, count: int, after: int) -> None:
        self._selector = selectors.DefaultSelector()
        self.readers: list[EventReader] = []
        self.arrivals: list[tuple[int, int]] = []  # (seq, ns), one per stream and event
        self.is_stamping = True
        self.began = time.perf_counter()
        for _ in range(count):
            reader = EventReader(port, f"/events?afterSeq={after}")
            if reader.status != 200:
                raise RuntimeError(f"no stream: {reader.status}")
            reader.socket.setblocking(False)
            self._selector.register(reader.socket, selectors.EVENT_READ, reader)
            self.readers.append(reader)

    def pump(self, seconds: float, is_done: Callable[[], bool]) -> bool:
        """Read until something is so; False when it is not within the time."""
        deadline = time.monotonic() + seconds
        while not is_done():
            if time.monotonic() > deadline:
                return False
            self.read_once(0.05)
        return True

    def read_once(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                continue
            try:
                data = key.data.socket.recv(262144)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            self._take(key.data, data, time.monotonic_ns())

    def _take(self, reader: EventReader, data: bytes, now: int) -> None:
        if not data:
            reader.has_ended = reader.raw.endswith(b"0\r\n\r\n")
            self.drop(reader)
            return
        text = reader.raw + data
        cut = text.rfind(b"\n\n") + 2 if b"\n\n" in text else 0
        reader.raw = text[cut:]
        ids = [int(number) for number in self.ID.findall(text[:cut])]
        if ids:
            expected = range(reader.last + 1, reader.last + 1 + len(ids))
            reader.is_in_order &= reader.last < 0 or ids == list(expected)
            reader.last = ids[-1]
            if self.is_stamping:
                self.arrivals.extend((seq, now) for seq in ids)

    def drop(self, reader: EventReader) -> None:
        if reader.socket.fileno() >= 0:
            self._selector.unregister(reader.socket)
            reader.close()

    # Orders

    def wait(self, seq: int, seconds: float) -> dict[str, Any]:
        """Read until every stream has come to `seq`, and say when and how."""
        done = self.pump(seconds, lambda: all(reader.last >= seq for reader in self.readers))
        in_order = all(reader.is_in_order for reader in self.readers)
        return {"complete": done, "inOrder": in_order, "seconds": time.perf_counter() - self.began}

    def latency(self, stamps: dict[str, int]) -> dict[str, float]:
        """Return the time from a task's word to its arrival, in ms, over all streams."""
        times = [(ns - stamps[str(seq)]) / 1e6 for seq, ns in self.arrivals if str(seq) in stamps]
        self.arrivals = []
        return {"count": len(times), "max": max(times, default=float("nan")),
                "p50": percentile(times, 0.5), "p99": percentile(times, 0.99)}  # fmt: skip

    def stamp(self, is_stamping: bool) -> bool:
        self.is_stamping = is_stamping
        return True

    def leave(self, count: int) -> int:
        """Drop this many streams without a word."""
        for reader in self.readers[:count]:
            self.drop(reader)
        del self.readers[:count]
        return count

    def ended(self, seconds: float) -> int:
        """Wait for the streams to end; return how many did so with a proper last chunk."""
        self.pump(seconds, lambda: all(reader.socket.fileno() < 0 for reader in self.readers))
        return sum(reader.has_ended for reader in self.readers)

    def obey(self) -> int:
        """Read streams and carry out orders."""
        os.set_blocking(0, False)
        self._selector.register(0, selectors.EVENT_READ, None)
        while True:
            self.read_once(1.0)
            orders = os.read(0, 1 << 24) if select.select([0], [], [], 0)[0] else None
            if orders == b"":
                return 0
            while orders and not orders.endswith(b"\n"):
                with contextlib.suppress(BlockingIOError):
                    orders += os.read(0, 1 << 24)
            for line in (orders or b"").splitlines():
                name, *arguments = json.loads(line)
                tell(getattr(self, name)(*arguments))


def listen_command(port: str, count: str, after: str) -> int:
    ss.raise_descriptor_limit()
    listener = Listener(int(port), int(count), int(after))
    tell(len(listener.readers))
    return listener.obey()


@contextlib.contextmanager
def bench_server(prefill: int | str = 10) -> Iterator[tuple[Child, int, str]]:
    """Yield (server process, port, database) over a run that already has some events."""
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        path = os.path.join(folder, "smithers.db")
        with Child(SELF, "_serve", path, prefill) as server:
            yield server, server.read(), path


@contextlib.contextmanager
def listening(port: int, count: int, after: int = -1) -> Iterator[Child]:
    with Child(SELF, "_listen", port, count, after) as listener:
        if listener.read() != count:
            raise RuntimeError("not every stream was opened")
        yield listener


# ---------------------------------------------------------------------------
# Bench: one function per row or group of rows
# ---------------------------------------------------------------------------

GATE_FLOW = """
from smithers_serve import Approval, Task, Workflow

def workflow(ctx):
    return Workflow("bench", Task("build", {"ok": True}), Task("test", {"ok": True}),
                    Approval("ship", title="Ship it?"), Task("announce", {"ok": True}))
"""
BUSY_FLOW = """
import time
from smithers_serve import Task, Workflow, current_task

def spin():
    until = time.monotonic() + 60
    while time.monotonic() < until and not current_task().cancelled.is_set():
        sum(range(1000))

def workflow(ctx):
    return Workflow("busy", Task("spin", spin))
"""


class Measure(NamedTuple):
    """One measure: its values over the rounds, and what is to be reached ("<" or ">")."""

    measure: str
    unit: str
    values: list[float]
    target: float | None = None
    sign: str = "<"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.median <= self.target if self.sign == "<" else self.median >= self.target

    def to_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure, "unit": self.unit, "median": self.median,
            "min": min(self.values), "max": max(self.values), "values": self.values,
            "target": self.target, "sign": self.sign, "reached": self.is_reached,
        }  # fmt: skip


class Options(NamedTuple):
    rounds: int
    peer: str  # the interpreter that has the peers


Bench = Callable[[Options], "list[Measure]"]
BENCHES: dict[str, Bench] = {}


def bench(name: str) -> Callable[[Bench], Bench]:
    def register(measure: Bench) -> Bench:
        BENCHES[name] = measure
        return measure

    return register


def load_rows(
    name: str, port: int, path: str, options: Options, rate: float | None = 12_000
) -> list[Measure]:
    figures = measure_load(port, path, options.rounds)
    return [
        Measure(f"{name}, 64 connections", "/s", [f["rate"] for f in figures], rate, ">"),
        Measure(f"{name}, p99", "ms", [f["p99"] for f in figures], 25),
    ]


def measure_route(path: str, rate: float | None, options: Options) -> list[Measure]:
    with served(GATE_FLOW) as run:
        run.wait_for_status("waiting-approval")
        return load_rows(f"GET {path}", run.port, path, options, rate)


for _name, _path, _rate in (
    ("status", "/", 12_000),
    ("frames", "/frames", 12_000),
    ("metrics", "/metrics", 12_000),
    ("health", "/health", None),
):
    BENCHES[_name] = functools.partial(measure_route, _path, _rate)


def fill_nodes(path: str, nodes: int, events: int) -> None:
    """Make a parked run of many nodes, all finished but its gate."""
    with contextlib.closing(ss.SmithersDb(path)) as db:
        ss.run_workflow(Workflow("bench", Approval("ship")), adapter=db, run_id=RUN, park=False)
        first = db.list_events(RUN)[-1].seq + 1
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        raw.executemany(
            "insert into _smithers_nodes (run_id, node_id, iteration, state, last_attempt) "
            "values (?, ?, 0, 'finished', 0)",
            ((RUN, f"n{number}") for number in range(nodes)),
        )
        payload = json.dumps({"type": "NodePending", "runId": RUN, "nodeId": "n", "iteration": 0})
        raw.executemany(
            "insert into _smithers_events (run_id, seq, type, payload_json) values (?, ?, ?, ?)",
            ((RUN, seq, "NodePending", payload) for seq in range(first, events)),
        )


@bench("status-100k")
def bench_status_100k(options: Options) -> list[Measure]:
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        fill_nodes(os.path.join(folder, "smithers.db"), 100_000, 2)
        with serve_child(folder, GATE_FLOW, "--resume") as run:
            run.wait_for_status("waiting-approval")
            return load_rows("GET / of 100,000 nodes", run.port, "/", options)


@bench("big")
def bench_big(options: Options) -> list[Measure]:
    """A file of 100,000 nodes and 1,000,000 events: its opening and a fresh status."""
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        path = os.path.join(folder, "smithers.db")
        fill_nodes(path, 100_000, 1_000_000)
        opened, answered = [], []
        for _ in range(max(3, options.rounds)):
            began = time.perf_counter()
            with contextlib.closing(ss.SmithersDb(path)) as db:
                opened.append(1000 * (time.perf_counter() - began))
                app = ss.create_serve_app(adapter=db, run_id=RUN)
                began = time.perf_counter()
                app.request("GET", "/")
                answered.append(1000 * (time.perf_counter() - began))
                app.close()
    what = "100,000 nodes, 1,000,000 events"
    return [Measure(f"open a file of {what}", "ms", opened, 50),
            Measure(f"first GET / of {what}", "ms", answered, 50)]  # fmt: skip


# Peers


PEER_APP = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

async def health(request):
    return JSONResponse({"ok": True})

app = Starlette(routes=[Route("/health", health)])
"""
PEER_STEPS = """
import json, os, sys, time
from dbos import DBOS

DBOS(config={"name": "bench", "system_database_url": "sqlite:///" + sys.argv[1],
             "log_level": "ERROR", "run_admin_server": False})

@DBOS.step()
def step():
    return 1

@DBOS.workflow()
def flow(count):
    for _ in range(count):
        step()

DBOS.launch()
flow(10)
times = []
for _ in range(int(sys.argv[2])):
    began = time.perf_counter()
    flow(200)
    times.append(1000 * (time.perf_counter() - began) / 200)
print(json.dumps(times), flush=True)
os._exit(0)
"""


def has_modules(python: str, *names: str) -> bool:
    code = f"import {', '.join(names)}"
    return run_child("-c", code, python=python)[0] == 0


@bench("peers")
def bench_peers(options: Options) -> list[Measure]:
    """The peers that are installed, beside the same measure of ours in the same minute."""
    rows = []
    if has_modules(options.peer, "uvicorn", "starlette"):
        theirs, ours = measure_beside_uvicorn(options)
        ratio = [mine / other for mine, other in zip(ours, theirs)]
        rows += [Measure("GET /health, uvicorn+Starlette", "/s", theirs),
                 Measure("GET /health, ours", "/s", ours),
                 Measure("GET /health, ours to uvicorn+Starlette", "times", ratio, 1,
                         ">")]  # fmt: skip
    if has_modules(options.peer, "dbos"):
        theirs = measure_dbos(options)
        ours = [run_steps("sequence", 200)["ms"] for _ in theirs]
        ratio = [other / mine for mine, other in zip(ours, theirs)]
        rows += [Measure("a step, DBOS on sqlite", "ms", theirs),
                 Measure("a step, ours", "ms", ours),
                 Measure("a step, DBOS to ours", "times", ratio, 1, ">")]  # fmt: skip
    return rows


def measure_beside_uvicorn(options: Options) -> tuple[list[float], list[float]]:
    """Return the rates of uvicorn and of ours, measured in turns."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        with open(os.path.join(folder, "peer_app.py"), "w", encoding="utf-8") as out:
            out.write(PEER_APP)
        argv = ["-m", "uvicorn", "peer_app:app", "--port", port, "--log-level", "error"]
        with Child(*argv, "--no-access-log", folder=folder, python=options.peer):
            wait_for_answer(port, "/health")
            with served(GATE_FLOW) as run:
                run.wait_for_status("waiting-approval")
                pairs = [(measure_load(port, "/health", 1)[0]["rate"],
                          measure_load(run.port, "/health", 1)[0]["rate"])
                         for _ in range(options.rounds)]  # fmt: skip
    return [theirs for theirs, _ in pairs], [ours for _, ours in pairs]


def measure_dbos(options: Options) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        script = os.path.join(folder, "peer_steps.py")
        with open(script, "w", encoding="utf-8") as out:
            out.write(PEER_STEPS)
        argv = [script, os.path.join(folder, "dbos.sqlite"), options.rounds]
        code, out, err = run_child(*argv, folder=folder, python=options.peer)
        if code:
            raise RuntimeError(err[-200:])
        figures: list[float] = json.loads(out.splitlines()[-1])
        return figures


def wait_for_answer(port: int, path: str) -> float:
    """Ask until there is a 200; return perf_counter of that moment."""
    answered_at: list[float] = []

    def is_answered() -> bool:
        with contextlib.suppress(OSError):
            if ask(port, "GET", path).status == 200:
                answered_at.append(time.perf_counter())
        return bool(answered_at)

    eventually(is_answered)
    return answered_at[0]


# Streams


@bench("live")
def bench_live(options: Options) -> list[Measure]:
    rows = []
    for clients, target in ((1, 10), (1000, 50)):
        figures = [measure_live(clients, False) for _ in range(options.rounds)]
        rows += live_rows(f"live event, {clients:,} client{'s'[: clients - 1]}", figures, target)
    figures = [measure_live(1, True) for _ in range(options.rounds)]
    return rows + live_rows("live event of another process", figures, 100)


def live_rows(name: str, figures: list[dict[str, float]], target: float) -> list[Measure]:
    return [Measure(f"{name}, p50", "ms", [f["p50"] for f in figures]),
            Measure(f"{name}, p99", "ms", [f["p99"] for f in figures], target)]  # fmt: skip


def measure_live(clients: int, elsewhere: bool) -> dict[str, float]:
    prefill = "" if elsewhere else 10
    with bench_server(prefill) as (server, port, path), listening(port, clients) as listener:
        with Child(SELF, "_write", path) if elsewhere else contextlib.nullcontext(server) as writer:
            if elsewhere:
                writer.read()
            stamps = writer.ask("emit", 60, 0.03)
            check(listener.ask("wait", max(map(int, stamps)), 10.0), "live")
        latency: dict[str, float] = listener.ask("latency", stamps)
    if latency["count"] != 60 * clients:
        raise RuntimeError(f"{latency['count']} arrivals, not {60 * clients}")
    return latency


def check(waited: dict[str, Any], what: str) -> float:
    """Return the seconds that a wait took. Raises when something was lost or out of order."""
    if not waited["complete"] or not waited["inOrder"]:
        raise RuntimeError(f"{what}: events were lost, late or out of order: {waited}")
    return float(waited["seconds"])


@bench("replay")
def bench_replay(options: Options) -> list[Measure]:
    events = 100_000
    rates: dict[int, list[float]] = {1: [], 10: []}
    with bench_server(prefill=events) as (server, port, _):
        for _ in range(options.rounds):
            for clients, figures in rates.items():
                with listening(port, clients) as listener:
                    seconds = check(listener.ask("wait", events - 1, 60.0), "replay")
                figures.append(events * clients / seconds)
    return [Measure(f"replay of 100,000 events, {clients} at once", "/s", figures, 100_000, ">")
            for clients, figures in rates.items()]  # fmt: skip


@bench("streams")
def bench_streams(options: Options) -> list[Measure]:
    """5,000 streams: what they cost, how fast one event reaches them, what they leave behind."""
    count = 5000
    with bench_server() as (server, port, _):
        ask(port, "GET", "/")
        before = vitals(server.pid)
        with listening(port, count) as listener:
            listener.ask("stamp", True)
            idle = cpu_share(server.pid, 4.0)
            during = vitals(server.pid)
            reach = [measure_reach(server, listener) for _ in range(max(5, options.rounds))]
            listener.ask("stamp", False)
            last = max(map(int, server.ask("emit", 200, 0.005)))
            check(listener.ask("wait", last, 60.0), "streams")
            listener.ask("leave", count // 2)
            server.ask("finish")
            properly = listener.ask("ended", 30.0)
        after = settle(server.pid, before)
    return [
        Measure("5,000 idle streams, threads", "", [during.threads], 64),
        Measure("5,000 idle streams, memory", "MiB", [during.rss], 150),
        Measure("5,000 idle streams, share of a core", "%", [idle], 5),
        Measure("one event at all of 5,000 streams", "ms", reach, 250),
        Measure("200 events at all, once and in order: streams", "", [count], count, ">"),
        Measure("streams that ended properly, of 2,500", "", [properly], count - count // 2, ">"),
        Measure("threads left behind", "", [after.threads - before.threads], 1),
        Measure("descriptors left behind", "", [after.descriptors - before.descriptors], 8),
        Measure("memory left behind", "MiB", [after.rss - before.rss], 20),
    ]


def measure_reach(server: Child, listener: Child) -> float:
    stamps = server.ask("emit", 1, 0.0)
    check(listener.ask("wait", max(map(int, stamps)), 20.0), "reach")
    return float(listener.ask("latency", stamps)["max"])


def settle(pid: int, before: Vitals, seconds: float = 6.0) -> Vitals:
    """Return the vitals once threads and descriptors are back, or after some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        now = vitals(pid)
        back = now.threads <= before.threads + 1 and now.descriptors <= before.descriptors + 4
        if back or time.monotonic() > deadline:
            return now
        time.sleep(0.2)


@bench("slow-reader")
def bench_slow_reader(options: Options) -> list[Measure]:
    """200 streams that read beside one that never does, over 100,000 events."""
    events = 100_000
    with bench_server() as (server, port, _), listening(port, 200) as listener:
        listener.ask("stamp", False)
        with EventReader(port):
            last = max(map(int, server.ask("emit", 5000, 0.0, 100)))
            check(listener.ask("wait", last, 60.0), "slow-reader")
            sizes, began = [vitals(server.pid).rss], time.perf_counter()
            for _ in range(2):
                last = max(map(int, server.ask("emit", events // 2, 0.0, 100)))
                check(listener.ask("wait", last, 120.0), "slow-reader")
                sizes.append(vitals(server.pid).rss)
            took = time.perf_counter() - began
            listener.ask("stamp", True)
            stamps = server.ask("emit", 60, 0.03)
            check(listener.ask("wait", last + 60, 10.0), "slow-reader")
            latency = listener.ask("latency", stamps)
    return [
        Measure("one reads nothing: memory over 100,000 events", "MiB", [sizes[2] - sizes[0]], 40),
        Measure(
            "one reads nothing: of that, over the last 50,000", "MiB", [sizes[2] - sizes[1]], 4
        ),
        Measure("one reads nothing: deliveries to 200 others", "/s", [200 * events / took]),
        Measure("one reads nothing: live p99 of 200 others", "ms", [latency["p99"]], 50),
    ]


class Comer:
    """A client that reads some events, drops the connection and comes back where it was."""

    def __init__(self, port: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.port = port
        self.last = -1
        self.visits = 0
        self.wrong = 0  # events that were missed or came twice

    async def follow(self) -> None:
        """Come back until the run has ended and everything was read."""
        while await self.visit(self.chance.randint(1, 50)):
            self.visits += 1

    async def visit(self, events: int) -> bool:
        """Read some events of one connection; False when there is nothing left to come for."""
        reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
        head = f"GET /events HTTP/1.1\r\nHost: {LOOPBACK}\r\nLast-Event-ID: {self.last}\r\n\r\n"
        writer.write(head.encode())
        try:
            if b" 204 " in await reader.readline():
                return False
            while events > 0:
                line = await reader.readline()
                if not line:
                    break
                if line.startswith(b"id: "):
                    self.wrong += int(line[4:]) != self.last + 1
                    self.last = int(line[4:])
                    events -= 1
        finally:
            writer.transport.abort()
        return True


@bench("churn")
def bench_churn(options: Options) -> list[Measure]:
    """1,000 clients come and go for a minute; each must see every event once."""

    async def meet(port: int, server: Child) -> tuple[list[Comer], int]:
        comers = [Comer(port, seed) for seed in range(1000)]
        tasks = [asyncio.ensure_future(comer.follow()) for comer in comers]
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, server.ask, "emit", 1200, 0.05)
        newest = await loop.run_in_executor(None, server.ask, "finish")
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
        return comers, newest

    with bench_server() as (server, port, _):
        comers, newest = asyncio.run(meet(port, server))
    missed = sum(newest - comer.last for comer in comers)
    return [
        Measure("1,000 clients drop and come back: visits", "", [sum(c.visits for c in comers)]),
        Measure("events they missed or got twice", "", [missed + sum(c.wrong for c in comers)], 0),
    ]


# Steps


def no_op() -> int:
    return 1


def make_flow(kind: str, count: int) -> ss.Workflow:
    if kind == "loop":
        loop = ss.Loop(ss.Task("t", no_op), id="l", until=False, max_iterations=count)
        return ss.Workflow("bench", loop)
    tasks = [ss.Task(f"t{number}", no_op) for number in range(count)]
    return ss.Workflow("bench", ss.Parallel(*tasks) if kind == "parallel" else ss.Sequence(*tasks))


def steps_command(kind: str, count: str) -> int:
    """Run trivial function tasks and print what one costs."""
    flow = make_flow(kind, int(count))
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        path = os.path.join(folder, "smithers.db")
        db = ss.SmithersDb(path)
        empty = os.path.getsize(path)
        began = time.perf_counter()
        result = ss.run_workflow(flow, adapter=db, run_id=RUN, max_concurrency=4)
        took = time.perf_counter() - began
        db.close()
        size = os.path.getsize(path) - empty
    if result.status != "finished":
        raise RuntimeError(f"the run is {result.status}: {result.error}")
    tell({"ms": 1000 * took / int(count), "bytes": size / int(count)})
    return 0


def run_steps(kind: str, count: int) -> dict[str, float]:
    with Child(SELF, "_steps", kind, count) as process:
        figure: dict[str, float] = process.read()
        return figure


@bench("steps")
def bench_steps(options: Options) -> list[Measure]:
    plan = (("sequence", 200, 0.5), ("sequence", 1000, 0.5), ("parallel", 1000, 0.3),
            ("loop", 1000, 0.5))  # fmt: skip
    rows = []
    for kind, count, target in plan:
        figures = [run_steps(kind, count)["ms"] for _ in range(options.rounds)]
        rows.append(Measure(f"a step, {count:,} in a {kind}", "ms", figures, target))
    fsyncs = [fsync_ms() for _ in range(max(3, options.rounds))]
    return [*rows, Measure("one fsync of 4 KiB here; a step in a row holds one", "ms", fsyncs)]


@bench("flat")
def bench_flat(options: Options) -> list[Measure]:
    """What a task of 10,000 costs, against a task of 100."""
    rows = []
    for kind in ("sequence", "parallel", "loop"):
        few = [run_steps(kind, 100) for _ in range(max(3, options.rounds))]
        many = [run_steps(kind, 10_000) for _ in range(max(1, options.rounds // 2))]
        for key, what in (("ms", "time"), ("bytes", "bytes")):
            base = statistics.median(f[key] for f in few)
            ratios = [f[key] / base for f in many]
            rows.append(Measure(f"{what} a task, 10,000 to 100, {kind}", "times", ratios, 1.5))
        rows.append(Measure(f"a step, 10,000 in a {kind}", "ms", [f["ms"] for f in many]))
    return rows


# Start, size and idling


@bench("start")
def bench_start(options: Options) -> list[Measure]:
    times = [measure_start() for _ in range(2 * options.rounds + 1)]
    return [Measure("start to first answer", "ms", times[1:], 250)]


def measure_start() -> float:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        with serve_child(folder, GATE_FLOW, "--port", str(port)) as run:
            return 1000 * (wait_for_answer(port, "/") - run.started_at)


@bench("import")
def bench_import(options: Options) -> list[Measure]:
    code = (
        "import time; began = time.perf_counter(); import smithers_serve; "
        "print(1000 * (time.perf_counter() - began))"
    )
    times = [float(run_child("-c", code)[1]) for _ in range(2 * options.rounds + 1)]
    return [Measure("import", "ms", times[1:], 100)]


@bench("idle")
def bench_idle(options: Options) -> list[Measure]:
    with served(GATE_FLOW) as run:
        run.wait_for_status("waiting-approval")
        time.sleep(0.5)
        memory = vitals(run.pid).rss
        shares = [cpu_share(run.pid, 5.0 / options.rounds + 0.5) for _ in range(options.rounds)]
        return [Measure("memory, parked at a gate", "MiB", [memory], 30),
                Measure("share of a core, parked at a gate", "%", shares, 1)]  # fmt: skip


@bench("busy")
def bench_busy(options: Options) -> list[Measure]:
    """The status while a Python task in the same process computes."""
    rows = []
    for count in (8, 64):
        with served(BUSY_FLOW) as run:
            run.wait_for("spin started")
            figures = measure_load(run.port, "/", options.rounds, count)
        name = f"GET / while a task computes, {count} connections"
        rows += [Measure(f"{name}, p99", "ms", [f["p99"] for f in figures], 100),
                 Measure(name, "/s", [f["rate"] for f in figures])]  # fmt: skip
    return rows


# The table


def machine_facts() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.partition(": ")[2].strip() for line in file
                      if line.startswith("model name")), model)  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "cores": os.cpu_count(), "cpu": model,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sqlite": sqlite3.sqlite_version, "system": f"{platform.system()} {platform.release()}",
        "fsyncMs": round(fsync_ms(), 3), "version": ss.__version__,
    }  # fmt: skip


def fsync_ms() -> float:
    """Return what one small durable write costs in the folder that is measured in."""
    with tempfile.NamedTemporaryFile(prefix="smithers-bench-") as file:
        times = []
        for _ in range(20):
            began = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def show_number(value: float) -> str:
    if value != value:
        return "failed"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def show_row(row: Measure) -> str:
    spread = ""
    if len(row.values) > 1:
        spread = f" ({show_number(min(row.values))}..{show_number(max(row.values))})"
    figure = f"{show_number(row.median)}{'' if row.unit == '/s' else ' '}{row.unit}".rstrip()
    wish = "" if row.target is None else f"{row.sign} {show_number(row.target)} {row.unit}".rstrip()
    word = {True: "yes", False: "NO", None: ""}[row.is_reached]
    return f"| {row.measure:<50} | {figure + spread:<34} | {wish:<16} | {word:<7} |"


def bench_command(arguments: argparse.Namespace) -> int:
    """Run benches by name, all when none is given; 0 when every target is reached."""
    unknown = sorted(set(arguments.names) - BENCHES.keys())
    if unknown:
        print(f"no such bench: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
        return 2
    ss.raise_descriptor_limit()
    facts, options = machine_facts(), Options(arguments.rounds, arguments.peer)
    if not arguments.json:
        print("\n".join(f"{key}: {value}" for key, value in facts.items()))
        print(f"\n| {'measure':<50} | {'median (min..max)':<34} | {'target':<16} | reached |")
        print(f"|{'-' * 52}|{'-' * 36}|{'-' * 18}|{'-' * 9}|", flush=True)
    rows: list[Measure] = []
    for name in arguments.names or BENCHES:
        rows += measure_and_show(name, options, not arguments.json)
    if arguments.json:
        print(json.dumps({"machine": facts, "rows": [row.to_json() for row in rows]}, indent=1))
    return 0 if all(row.is_reached is not False for row in rows) else 1


def measure_and_show(name: str, options: Options, is_shown: bool) -> list[Measure]:
    began = time.monotonic()
    try:
        rows = BENCHES[name](options)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        rows = [Measure(f"{name}: {type(error).__name__}: {error}"[:200], "", [float("nan")], 0)]
    if is_shown:
        print("\n".join(map(show_row, rows)), flush=True)
        print(f"[{name}: {time.monotonic() - began:.1f} s]", file=sys.stderr, flush=True)
    return rows


# ---------------------------------------------------------------------------
# Crash: kill -9 and resume, again and again
# ---------------------------------------------------------------------------

CRASH_FLOW = '''
import os, time
from smithers_serve import Approval, Loop, Parallel, Task, TaskFailed, Workflow, current_task

EFFECTS = os.environ["CRASH_EFFECTS"]

def note(what):
    task = current_task()
    line = f"{task.node_id} {task.iteration} {task.attempt} {what}\\n"
    with open(EFFECTS, "ab", buffering=0) as out:
        out.write(line.encode())

def act(seconds=0.004, upstream=None):
    note("start")
    current_task().log("working")
    time.sleep(seconds)
    note("end")
    return {"upstream": upstream}

def flaky():
    note("start")
    with open(EFFECTS) as seen:
        if "fail" not in seen.read():
            note("fail")
            raise TaskFailed("not yet")
    note("end")

COMMAND = """
say() { echo "$SMITHERS_NODE_ID $SMITHERS_ITERATION $SMITHERS_ATTEMPT $1" >> "$CRASH_EFFECTS"; }
say start; echo working; sleep 0.01; say end
"""

def workflow(ctx):
    return Workflow("crash",
        *[Task(f"s{number}", act) for number in range(4)],
        Parallel(*[Task(f"p{number}", act, kwargs={"seconds": 0.01}) for number in range(6)],
                 max_concurrency=3),
        Task("command", ["sh", "-c", COMMAND]),
        Task("flaky", flaky, retries=3, retry_delay=0.02),
        Approval("ship", title="Ship?"),
        Loop(Task("inner", act), Approval("again", on_deny="continue"),
             id="rounds", max_iterations=4,
             until=(ctx.output("again") or {}).get("approved") is False),
        Task("last", act, needs={"upstream": "inner"}) if ctx.state("inner") else None)
'''


class Watcher:
    """A client that follows a run over all its lives and decides its gates."""

    def __init__(self, path: str, chance: random.Random) -> None:
        self._path = path
        self._chance = chance
        self.port = 0
        self.seen: list[tuple[int, Any]] = []
        self.gates: set[tuple[str, int]] = set()
        self.has_ended = False
        self.reconnects = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._loop, args=(step,), daemon=True)
                         for step in (self._follow, self._decide)]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def _loop(self, step: Callable[[], None]) -> None:
        while not self._stop.wait(0.01):
            # A stream that is cut off is no mistake of the server, which was killed.
            with contextlib.suppress(OSError, AssertionError, ValueError, ss.SmithersError):
                step()

    def _follow(self) -> None:
        if not self.port or self.has_ended:
            return
        headers = {"Last-Event-ID": str(self.seen[-1][0])} if self.seen else {}
        with EventReader(self.port, headers=headers) as reader:
            self.reconnects += 1
            self.has_ended = reader.status == 204
            for seq, payload in iter(reader.event, None):
                self._take(seq, payload)

    def _take(self, seq: int, event: dict[str, Any]) -> None:
        self.seen.append((seq, event))
        gate = (event.get("nodeId", ""), event.get("iteration", 0))
        if event["type"] == "NodeWaitingApproval":
            self.gates.add(gate)
        elif event["type"] in ("ApprovalGranted", "ApprovalDenied"):
            self.gates.discard(gate)

    def _decide(self) -> None:
        """Decide what waits: over HTTP, or straight in the file, engine or not."""
        for node, iteration in sorted(self.gates):
            time.sleep(self._chance.uniform(0, 0.06))
            verdict = "denied" if (node, iteration) == ("again", 2) else "approved"
            if self._chance.random() < 0.5:
                with contextlib.closing(ss.SmithersDb(self._path)) as db:
                    ss.decide(db, RUN, node, ss.Decision(verdict, iteration))
            else:
                body = {"iteration": iteration, "decidedBy": "watcher"}
                word = "deny" if verdict == "denied" else "approve"
                ask(self.port, "POST", f"/{word}/{node}", body)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(6)


class Book:
    """What the log says, folded, and what is wrong with it."""

    STATES = {
        "NodePending": "pending", "NodeStarted": "in-progress", "NodeFinished": "finished",
        "NodeFailed": "failed", "NodeRetrying": "pending", "NodeCancelled": "cancelled",
        "NodeSkipped": "skipped", "NodeWaitingApproval": "waiting-approval",
        "ApprovalGranted": "pending", "ApprovalDenied": "pending",
    }  # fmt: skip
    GATES = {"ApprovalRequested": "requested", "ApprovalGranted": "approved",
             "ApprovalDenied": "denied"}  # fmt: skip

    def __init__(self, log: list[tuple[int, Any]]) -> None:
        self.status = ""
        self.nodes: dict[tuple[str, int], str] = {}
        self.attempts: dict[tuple[str, int, int], str] = {}
        self.gates: dict[tuple[str, int], str] = {}
        self.frames: list[tuple[int, str]] = []
        for _, event in log:
            self._fold(event)

    def _fold(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "RunStatusChanged":
            self.status = event["status"]
        elif kind == "FrameCommitted":
            self.frames.append((event["frameNo"], event["xmlHash"]))
        if "nodeId" not in event:
            return
        key = (event["nodeId"], event["iteration"])
        if kind in self.STATES:
            self.nodes[key] = self.STATES[kind]
        if kind in self.GATES:
            self.gates[key] = self.GATES[kind]
        attempt = (*key, event.get("attempt", -1))
        if kind == "NodeStarted" or attempt in self.attempts and kind in (
            "NodeFinished", "NodeFailed", "NodeCancelled"
        ):  # fmt: skip
            self.attempts[attempt] = self.STATES[kind]


def inspect(path: str, effects: str, seen: list[tuple[int, Any]]) -> list[str]:
    """Return what is wrong with a run's file, its side effects and what a client saw."""
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as db:
        db.execute("begin")
        read = db.execute
        sound = read("pragma integrity_check").fetchone()[0]
        events = read("select seq, payload_json from _smithers_events order by seq")
        log = [(seq, json.loads(payload)) for seq, payload in events]
        wrong = [] if sound == "ok" else [f"integrity_check: {sound}"]
        if [seq for seq, _ in log] != list(range(len(log))):
            wrong.append("the log has gaps")
        if seen != log[: len(seen)]:
            wrong.append(f"a client saw {len(seen)} events that are not the log's first")
        wrong += inspect_rows(db, Book(log))
        wrong += inspect_effects(db, effects)
        return wrong


def inspect_rows(db: sqlite3.Connection, book: Book) -> list[str]:
    """Compare every table with the folded log."""
    read = db.execute
    nodes = {(n, i): s for n, i, s in read("select node_id, iteration, state from _smithers_nodes")}
    attempts = {(n, i, a): s for n, i, a, s in read(
        "select node_id, iteration, attempt, state from _smithers_attempts")}  # fmt: skip
    gates = {(n, i): s for n, i, s in read(
        "select node_id, iteration, status from _smithers_approvals")}  # fmt: skip
    frames = read("select frame_no, xml_hash from _smithers_frames order by frame_no").fetchall()
    summary = dict(read("select state, nodes from _smithers_summary where nodes > 0").fetchall())
    outputs = set(read("select node_id, iteration from _smithers_outputs"))
    status = read("select status from _smithers_runs").fetchall()
    done = {key for key, state in nodes.items() if state == "finished"}
    pairs = {
        "nodes": (nodes, book.nodes), "attempts": (attempts, book.attempts),
        "gates": (gates, book.gates), "frames": (frames, book.frames),
        "status": (status, [(book.status,)]), "summary": (summary, Counter(nodes.values())),
        "outputs": (outputs, done),
    }  # fmt: skip
    return [f"{name}: rows {rows} but log {folded}"[:600]
            for name, (rows, folded) in pairs.items() if rows != folded]  # fmt: skip


def inspect_effects(db: sqlite3.Connection, effects: str) -> list[str]:
    """Compare what tasks have done with the attempts that were committed."""
    attempts = {(n, i, a): s for n, i, a, s in db.execute(
        "select node_id, iteration, attempt, state from _smithers_attempts")}  # fmt: skip
    done: dict[tuple[str, int, int], list[str]] = {}
    if os.path.exists(effects):
        with open(effects, encoding="utf-8") as file:
            for line in file:
                node, iteration, attempt, what = line.split()
                done.setdefault((node, int(iteration), int(attempt)), []).append(what)
    wrong = [f"{key} was never committed, but ran" for key in done if key not in attempts]
    twice = {key: what for key, what in done.items() if len(set(what)) < len(what)}
    wrong += [f"{key} ran twice: {what}" for key, what in twice.items()]
    finished: dict[tuple[str, int], int] = {}
    for (node, iteration, attempt), state in sorted(attempts.items()):
        if (node, iteration) in finished:
            wrong.append(f"{node} {iteration} was tried again after it had finished")
        if state == "finished":
            finished[(node, iteration)] = attempt
            if done.get((node, iteration, attempt)) != ["start", "end"]:
                wrong.append(f"{node} {iteration} {attempt} finished without its effects")
        elif state == "failed" and node != "flaky":
            wrong.append(f"{node} {iteration} {attempt} failed")
    return wrong


class Crash:
    """One workflow run, killed at random moments until it finishes."""

    ENDED = "Server still running"

    def __init__(self, folder: str, chance: random.Random) -> None:
        self.folder = folder
        self.chance = chance
        self.effects = os.path.join(folder, "effects.txt")
        self.path = os.path.join(folder, "smithers.db")
        self.watcher = Watcher(self.path, chance)
        self.kills = 0
        self.events = 0
        self.moments: Counter[str] = Counter()
        self.wrong: list[str] = []

    def drive(self, kills: int) -> None:
        """Kill at most this often, then let it finish."""
        try:
            while not self._live_once(self.kills < kills) and not self.wrong:
                pass
        finally:
            self.watcher.close()

    def _live_once(self, may_kill: bool) -> bool:
        """One life of the run; True when it has finished and everything was checked."""
        resume = ["--resume"] if self._has_run() else []
        with serve_child(self.folder, CRASH_FLOW, *resume, CRASH_EFFECTS=self.effects) as run:
            try:
                if self._run_until_moment(run, may_kill):
                    run.process.kill()
                    run.process.wait()
                    self.kills += 1
                    seen = list(self.watcher.seen)
                    self.wrong += inspect(self.path, self.effects, seen) if self._has_run() else []
                    return False
                self._check_end(run)
                return True
            finally:
                self.watcher.port = 0

    def _has_run(self) -> bool:
        if not os.path.exists(self.path):
            return False
        try:
            with contextlib.closing(sqlite3.connect(self.path)) as db:
                return bool(db.execute("select count(*) from _smithers_runs").fetchone()[0])
        except sqlite3.OperationalError:  # killed before the tables were there
            return False

    def _run_until_moment(self, run: Child, may_kill: bool) -> bool:
        """Wait for a moment to kill in; False when the run has finished before."""
        if may_kill and self.chance.random() < 0.4:
            self.moments["while starting"] += 1
            time.sleep(self.chance.uniform(0, 0.35))
            return True
        self.watcher.port = run.port
        lines = self.chance.randint(2, 30) if may_kill else 10**9
        run.wait_until(lambda: len(run.lines) >= lines or self.ENDED in run.text(), 60)
        if not may_kill or self.ENDED in run.text():
            return False
        self.moments["after a line"] += 1
        time.sleep(self.chance.choice((0.0, self.chance.uniform(0, 0.02))))
        return True

    def _check_end(self, run: Child) -> None:
        if not run.wait_until(lambda: self.ENDED in run.text(), 60):
            self.wrong.append("a life ended without a finished run: " + run.text()[-800:])
            return
        deadline = time.monotonic() + 10
        while not self.watcher.has_ended and time.monotonic() < deadline:
            time.sleep(0.01)
        self.wrong += inspect(self.path, self.effects, list(self.watcher.seen))
        with contextlib.closing(ss.SmithersDb(self.path)) as db:
            log = [(event.seq, event.payload) for event in db.list_events(RUN)]
            run_row = db.get_run(RUN)
            nodes = db.list_nodes(RUN)
        self.events = len(log)
        if not self.watcher.has_ended or self.watcher.seen != log:
            self.wrong.append(f"the client has {len(self.watcher.seen)} events of {len(log)}")
        if run_row is None or run_row.status != "finished":
            self.wrong.append(f"the run is {run_row and run_row.status}")
        if [node for node in nodes if node.state != "finished"] or len(nodes) != 20:
            self.wrong.append(f"{len(nodes)} nodes, not 20, or some not finished")


def crash_command(arguments: argparse.Namespace) -> int:
    """Kill and resume N times, over as many runs as that takes."""
    chance = random.Random(arguments.seed)
    kills = runs = reconnects = events = 0
    moments: Counter[str] = Counter()
    began = time.monotonic()
    while kills < arguments.count:
        folder = tempfile.mkdtemp(prefix="smithers-crash-")
        crash = Crash(folder, chance)
        crash.drive(min(chance.randint(3, 12), arguments.count - kills))
        kills, runs = kills + crash.kills, runs + 1
        reconnects, events = reconnects + crash.watcher.reconnects, events + crash.events
        moments += crash.moments
        if crash.wrong:
            print(f"seed {arguments.seed}, run {runs}, after {crash.kills} kills; kept: {folder}")
            print("\n".join(f"VIOLATION {text}" for text in crash.wrong))
            return 1
        shutil.rmtree(folder, ignore_errors=True)
    said = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items()))
    print(f"{kills} kills ({said}) over {runs} runs in {time.monotonic() - began:.0f} s: every run "
          f"finished, {events} events, {reconnects} connections of the client, seed "
          f"{arguments.seed}: no violation")  # fmt: skip
    return 0


# ---------------------------------------------------------------------------
# Fuzz: mutated requests against a server in a process of its own
# ---------------------------------------------------------------------------

FUZZ_FLOW = """
from smithers_serve import Approval, Loop, Task, Workflow

def workflow(ctx):
    return Workflow("fuzz", Task("build", {"ok": True}),
                    Loop(Approval("ship", on_deny="continue"), id="again", until=False,
                         max_iterations=1000000),
                    Approval("never"))
"""
BODY = b'{"iteration": 0, "note": "fine \\u00e9", "decidedBy": "fuzz"}'
HOST_LINE = b"Host: 127.0.0.1\r\n"
VALID = (
    b"GET / HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"GET /health HTTP/1.1\r\n" + HOST_LINE + b"Accept: */*\r\nUser-Agent: fuzz/1.0\r\n\r\n",
    b"HEAD /health HTTP/1.0\r\n\r\n",
    b"GET /frames?limit=2&afterFrameNo=0 HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"GET /events?afterSeq=3 HTTP/1.1\r\n" + HOST_LINE + b"Last-Event-ID: 5\r\n\r\n",
    b"GET /events HTTP/1.0\r\n\r\n",
    b"HEAD /events HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"GET /metrics HTTP/1.1\r\n" + HOST_LINE + b"Connection: close\r\n\r\n",
    b"GET http://127.0.0.1/ HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"POST /approve/ship HTTP/1.1\r\n" + HOST_LINE + b"Content-Length: 0\r\n\r\n",
    b"POST /approve/sh%69p HTTP/1.1\r\n" + HOST_LINE + b"Content-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    b"POST /deny/ship HTTP/1.1\r\n" + HOST_LINE + b"Origin: http://127.0.0.1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"not\r\n11;x=y\r\ne\": \"no, thanks\"}\r\n"
    b"0\r\nTrailer: yes\r\n\r\n",
    b"POST /approve/ship HTTP/1.1\r\n" + HOST_LINE + b"Expect: 100-continue\r\n"
    b"Authorization: Bearer token\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /deny/never HTTP/1.1\r\n" + HOST_LINE + b"Sec-Fetch-Site: same-origin\r\n"
    b"Content-Length: 2\r\n\r\n{}",
)  # fmt: skip
PIECES = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%", b"%00", b"%ff", b"..", b"//", b"*",
    b"\xff\xfe", b"\xed\xa0\x80", b"\xc2\xb2", b"-1", b"+1", b"1_0", b"0x10", b"99999999999999999",
    b"9223372036854775808", b"1" * 5000, b"A" * 9000, b"chunked, chunked", b"identity",
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Content-Length: 5, 5\r\n",
    b"Host: evil.example\r\n", b" folded\r\n", b"Connection: close\r\n", b"Upgrade: h2c\r\n",
    b"Expect: 200-maybe\r\n", b"HTTP/1.1", b"HTTP/2.0", b"NaN", b"[[[[[[[[" * 200, b'"\\ud800"',
)  # fmt: skip


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Return a request with one thing changed."""
    kind = chance.randrange(8)
    at, to = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
    if kind == 0:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at : at + 1].swapcase() + data[at + 1 :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[to:] if to - at < 40 else data[:at] + data[at + 1 :]
    if kind == 4:
        return data[:to] + data[at:to] + data[to:]
    if kind == 5:
        lines = data.split(b"\r\n")
        return b"\r\n".join([*lines[:1], chance.choice(lines), *lines[1:]])
    if kind == 6:
        numbers = list(re.finditer(rb"\d+", data))
        found = chance.choice(numbers) if numbers else None
        number = b"%d" % chance.choice((0, 1, 2**31, 2**63, 10**19, 10**40, 7))
        return data if found is None else data[: found.start()] + number + data[found.end() :]
    return data[:at] + chance.choice(PIECES) + data[at:]


def make_request(chance: random.Random) -> bytes:
    """Return one to four valid requests in a row, with up to four things changed."""
    data = b"".join(chance.choice(VALID) for _ in range(chance.choice((1, 1, 1, 2, 4))))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 4))):
        data = mutate(data, chance) or b"\r\n"
    return data


def cut(data: bytes, chance: random.Random) -> list[bytes]:
    """Return the pieces a request is sent in."""
    kind = chance.random()
    if kind < 0.6:
        return [data]
    if kind < 0.65 and len(data) < 400:
        return [data[index : index + 1] for index in range(len(data))]
    at = chance.randrange(len(data))
    return [data[:at], data[at:]]


class Fuzz:
    """Throws mutated requests at a server, several threads at once, and keeps the books."""

    THREADS = 4
    ALLOWED = (501, 503, 505)
    STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Z][A-Za-z -]*\r\n")

    def __init__(self, run: Child, seed: int) -> None:
        self.run = run
        self.seed = seed
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.requests = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards the books

    def throw(self, seconds: float) -> None:
        """Fuzz for some seconds, and see now and then that the server lives."""
        self._stop.clear()
        workers = [threading.Thread(target=self._work, args=(self.seed * 1000 + number,))
                   for number in range(self.THREADS)]  # fmt: skip
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.wrong:
            self._see_alive()
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
        self._stop.set()
        for worker in workers:
            worker.join()
        self._see_alive()

    def _see_alive(self) -> None:
        began = time.perf_counter()
        try:
            status = ask(self.run.port, "GET", "/health").status
        except (OSError, http.client.HTTPException) as error:
            status = 0
            self._report(f"/health failed: {error!r}", b"")
        if status not in (0, 200) or time.perf_counter() - began > 2:
            self._report(f"/health {status} in {time.perf_counter() - began:.1f} s", b"")

    def _report(self, text: str, request: bytes) -> None:
        with self._lock:
            self.wrong.append(text + (f" after {request!r}" if request else ""))

    def _work(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stop.is_set():
            request = make_request(chance)
            try:
                answer = self._exchange(cut(request, chance), chance)
            except OSError as error:
                answer, name = b"", type(error).__name__
                with self._lock:
                    self.statuses[name] += 1
                if name == "ConnectionRefusedError":
                    self._report("the server does not accept any more", request)
                    return
            self._judge(request, answer)

    def _exchange(self, pieces: list[bytes], chance: random.Random) -> bytes:
        """Send the pieces and return what comes until the end, or the begin of a stream."""
        answer = b""
        with connect(self.run.port) as sock:
            for index, piece in enumerate(pieces):
                sock.sendall(piece)
                if index + 1 < len(pieces) < 4:
                    time.sleep(chance.choice((0, 0.001, 0.01)))
            if chance.random() < 0.05:
                return b""  # vanishes without a word
            sock.shutdown(socket.SHUT_WR)
            while b"text/event-stream" not in answer:
                data = sock.recv(65536)
                if not data:
                    break
                answer += data
        return answer

    def _judge(self, request: bytes, answer: bytes) -> None:
        codes = [int(code) for code in self.STATUS.findall(answer)]
        with self._lock:
            self.requests += 1
            self.statuses.update(map(str, codes) if codes else ["nothing"])
        for code in codes:
            if code >= 500 and code not in self.ALLOWED:
                self._report(f"answered {code}", request)
        if answer and not answer.startswith(b"HTTP/1.1 "):
            self._report(f"answered {answer[:100]!r}", request)
        if b"<html" in answer.lower() or b"Traceback" in answer:
            self._report("an answer holds a page or a traceback", request)


def fuzz_command(arguments: argparse.Namespace) -> int:
    """Fuzz for some seconds; the server must stay as it was."""
    with served(FUZZ_FLOW, PYTHONFAULTHANDLER="1") as run:
        run.wait_for_status("waiting-approval")
        fuzz = Fuzz(run, arguments.seed)
        fuzz.throw(min(1.0, arguments.seconds / 4))  # what a warm server holds is no leak
        time.sleep(3.0)
        before = vitals(run.pid)
        fuzz.seed += 1
        fuzz.throw(arguments.seconds * 0.75)
        if not fuzz.wrong:
            ask(run.port, "POST", "/cancel")
            fuzz.seed += 1
            fuzz.throw(arguments.seconds * 0.25)  # at a run that has ended
        after = settle(run.pid, before, 15.0)
        if run.process.poll() is not None:
            fuzz.wrong.append(f"the server has ended with {run.process.returncode}")
        if after.threads > before.threads + 1 or after.descriptors > before.descriptors + 4:
            fuzz.wrong.append(f"leaked: {before} became {after}")
        fuzz.wrong += [line for line in run.lines if "Traceback" in line or "ERROR" in line][:5]
        if fuzz.wrong and run.process.poll() is None:
            run.process.send_signal(signal.SIGABRT)  # it tells where its threads are
            run.process.wait()
            run.close()
            print("".join(run.lines[-100:]))
    counts = ", ".join(f"{key}: {count:,}" for key, count in sorted(fuzz.statuses.items()))
    print(f"{fuzz.requests:,} connections, seed {arguments.seed}; {counts}")
    print(f"threads {before.threads} -> {after.threads}, descriptors {before.descriptors} -> "
          f"{after.descriptors}, memory {before.rss:.1f} -> {after.rss:.1f} MiB")  # fmt: skip
    print("\n".join(f"VIOLATION {text}" for text in fuzz.wrong[:20]) or "no violation")
    return 1 if fuzz.wrong else 0


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------

CHILDREN: dict[str, Callable[..., int]] = {
    "_load": load_command,
    "_serve": serve_command,
    "_write": write_command,
    "_listen": listen_command,
    "_steps": steps_command,
}


def make_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measures = commands.add_parser("bench", help="measure, and compare with the targets")
    measures.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    measures.add_argument("--json", action="store_true", help="print JSON, not a table")
    measures.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    measures.add_argument("--peer", default=sys.executable, help="the interpreter with the peers")
    measures.set_defaults(run=bench_command)
    crash = commands.add_parser("crash", help="kill and resume a run N times")
    crash.add_argument("count", type=int, metavar="N")
    crash.add_argument("--seed", type=int, default=random.randrange(10**6))
    crash.set_defaults(run=crash_command)
    fuzz = commands.add_parser("fuzz", help="throw mutated requests at a server")
    fuzz.add_argument("seconds", type=float, metavar="SECONDS")
    fuzz.add_argument("--seed", type=int, default=random.randrange(10**6))
    fuzz.set_defaults(run=fuzz_command)
    return parser


def main(argv: list[str]) -> int:
    if argv and argv[0] in CHILDREN:
        return CHILDREN[argv[0]](*argv[1:])
    arguments = make_arguments().parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in (*CHILDREN, "bench", "crash", "fuzz"):
        raise SystemExit(main(sys.argv[1:]))
    unittest.main()
