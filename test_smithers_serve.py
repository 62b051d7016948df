"""The specification of smithers_serve as tests: real sockets, real processes, real databases.

python3 test_smithers_serve.py           every test, several at once; nothing to install
python3 test_smithers_serve.py NAME...   these classes or tests, as `python3 -m unittest` does
python3 test_smithers_serve.py bench     measure
                                         (also: crash N, crash-server N, restart N, power [ROUNDS],
                                         fuzz SECONDS, fuzz-server SECONDS, model SECONDS,
                                         executors [NAME...])
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import codecs
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import datetime
import decimal
import functools
import gc
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
import traceback
import types
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
from smithers_serve import (
    Approval,
    Ctx,
    Fail,
    Loop,
    Parallel,
    Pause,
    Sequence,
    Task,
    Workflow,
    current_task,
)

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
    "RunCancelled": "by? reason? bySource?",
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
    "ApprovalGranted": "nodeId iteration note? decidedBy? bySource?",
    "ApprovalDenied": "nodeId iteration note? decidedBy? bySource?",
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
        done = [a.key for a in attempts if a.state == "finished" and not a.meta.get("forgiven")]
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

    def counted(self, db: ss.SmithersDb, name: str) -> float:
        """Return the value of a metric without labels."""
        return float(db.metrics.render().partition(f"\n{name} ")[2].partition("\n")[0])

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


def is_process(pid: int) -> bool:
    """Return whether a process lives; where there is /proc, a zombie does not."""
    if os.path.isdir("/proc/self"):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
                return stat.read().rpartition(")")[2].split()[0] not in "ZX"
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Child:
    """A process of Python: the lines of its stderr as they come, its stdout on demand."""

    def __init__(
        self,
        *argv: object,
        folder: str | None = None,
        shell: str = "",  # with "$@" for the command
        python: str = sys.executable,
        **env: str,
    ) -> None:
        command = [python, *map(str, argv)]
        self.started_at = time.perf_counter()
        self.process = subprocess.Popen(
            ["sh", "-c", shell, "sh", *command] if shell else command,
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
        watchdog = threading.Timer(3 * PATIENCE, self.process.kill)
        watchdog.daemon = True
        watchdog.start()
        if number is not None:
            self.process.send_signal(number)
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(said)
            self.stdin.close()
        out = self.stdout.read()
        code = self.process.wait(PATIENCE)
        watchdog.cancel()
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


# Rows by the number, up to a count, for a statement that goes on.
NUMBERS = "with recursive numbers(n) as (select 1 union all select n + 1 from numbers where n < {})"
RUN_ROW = "select status, runtime_owner_id from _smithers_runs where run_id = ?"


def read_rows(path: str, sql: str, *parameters: Any) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path, timeout=PATIENCE)) as db:
        return db.execute(sql, parameters).fetchall()


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
        tokens: str | None = None,
        metrics: bool = True,
        host: str = LOOPBACK,
        **options: Any,
    ) -> None:
        self.db, self.path, self.run_id = db, db.path, run_id
        self.abort = threading.Event()
        self.app = ss.create_serve_app(
            adapter=db, run_id=run_id, abort=self.abort, auth_token=token, metrics=metrics,
            tokens=tokens,
        )  # fmt: skip
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

    def at_gate(self, tree: Any = release, **options: Any) -> RunServer:
        """Serve one more run that waits at its gate."""
        served = self.fresh(**options)
        served.run_to_gate(tree)
        return served

    def look(self, path: str, *tree: Any) -> Any:
        """Return the body of a GET, of one more run with this tree where one is given."""
        if tree:
            self.served = self.at_gate(list(tree))
        return self.assert_ask(200, "GET", path).body

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
        self.assertEqual(result[:3], ("r", "finished", None))
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
        pause = functools.partial(Pause, "p")
        refuse("'p'", pause, {}, {"seconds": -1}, {"seconds": 1, "until": 1}, {"until": "noon"})
        refuse("'p'", pause, {"until": datetime.datetime(2026, 1, 1)}, {"seconds": None})
        again = functools.partial(Loop, id="l")
        refuse("'l'", again, {"until": None}, {"until": True, "on_max": "stop"})
        refuse("'l'", again, {"until": True, "max_iterations": 0})
        refuse("max_concurrency", Parallel, {"max_concurrency": 0})
        refuse("name", Workflow, {"name": ""}, {"name": lone})
        refuse("Fail", Fail, {"message": ""}, {"message": 5}, {"message": lone})

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

    def test_a_workflow_fails_on_purpose(self) -> None:
        def workflow(ctx: Ctx) -> Workflow:
            error = ctx.error("deploy")
            mend = [*tasks("rollback"), Fail(f"rolled back: {error['message']}")] if error else None
            deploy = Task("deploy", fail_until_go, continue_on_fail=True)
            return Workflow("w", deploy, mend, *tasks("announce"))

        error = {"name": "TaskFailed", "message": "rolled back: no luck", "code": "WORKFLOW_FAILED"}
        states = "deploy failed, rollback finished, announce pending"
        self.assertEqual(self.play(workflow, ends="failed", states=states).error, error)
        GO.set()
        self.drive(workflow, retry=True)
        self.assertEqual(self.status(), "finished")

    def test_what_is_in_flight_ends_before_a_fail(self) -> None:
        tree = Parallel(Task("a", wait_for_go), Sequence(*tasks("b"), Fail("enough"), *tasks("c")))
        states = "a finished, b finished, c pending"
        self.play(tree, "NodeFinished b; go", "failed", states=states)

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

    def test_ctx_of_a_test_knows_what_it_is_given(self) -> None:
        ctx = Ctx(
            "r",
            {"ref": "v1"},
            outputs={"review": {"ok": True}, ("turn", 0): "first", ("turn", 1): "second"},
            states={"lint": "in-progress"},
            errors={"unit": {"name": "E", "message": "no"}, "lint": ValueError("no luck")},
            iterations={"polish": 2},
        )
        self.assertEqual(ctx.output("review"), {"ok": True})
        self.assertEqual(ctx.output("review", iteration=3), {"ok": True})
        turns = [ctx.output("turn"), ctx.output("turn", iteration=0), ctx.output("turn", 9, 5)]
        self.assertEqual(turns, ["second", "first", 9])
        seen = [ctx.state(id) for id in ("review", "unit", "lint", "nobody")]
        self.assertEqual(seen, ["finished", "failed", "in-progress", None])
        self.assertEqual(ctx.error("lint"), {"name": "ValueError", "message": "no luck"})
        self.assertEqual(
            (ctx.error("review"), ctx.error("unit")), (None, {"name": "E", "message": "no"})
        )
        self.assertEqual((ctx.iteration("polish"), ctx.iteration("other")), (2, 0))

    def test_a_fake_task_keeps_what_is_logged(self) -> None:
        async def work() -> str:
            task = current_task()
            task.log("two\nlines")
            print("printed")
            return f"{task.node_id} {task.attempt} {task.cancelled.is_set()}"

        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), ss.fake_task("unit", attempt=1) as task:
            task.cancelled.set()
            self.assertEqual(asyncio.run(work()), "unit 1 True")
        self.assertEqual(task.lines, ["two", "lines", "printed"])
        self.assertEqual(printed.getvalue(), "printed\n")
        with self.assertRaises(RuntimeError):
            current_task()

    def test_a_result_reads_outputs_on_demand(self) -> None:
        outputs = self.drive(
            [Task("a", {"n": 1}), loop(Task("t", turn)), *tasks("b", skip_if=True)]
        ).outputs
        self.assertEqual((dict(outputs), len(outputs)), ({"a": {"n": 1}, "t": 1}, 2))
        with self.assertRaises(KeyError):
            outputs["b"]

    def test_a_traceback_begins_at_the_tasks_line(self) -> None:
        async def broken() -> None:
            await asyncio.sleep(0)
            fail()

        for number, run in enumerate((fail, broken)):
            self.drive(Task("a", run), f"r{number}")
            _, first, *_ = self.db.list_attempts(f"r{number}")[0].meta["traceback"].split("\n")
            self.assertIn(f'{SELF}", line', first)
            self.assertIn(f"in {run.__name__}", first)

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

    def test_a_path_is_no_adapter(self) -> None:
        wrong: Any = self.in_folder("x.db")
        for use in (
            lambda: ss.run_workflow(Workflow("w"), adapter=wrong),
            lambda: ss.create_serve_app(adapter=wrong, run_id="r"),
        ):
            with self.assertRaisesRegex(ss.AuthoringError, "SmithersDb.* opens a file"):
                use()
            self.assertFalse(os.path.exists(wrong))

    def test_database_without_a_file_is_refused(self) -> None:
        for name in (":memory:", "", "file:x.db"):
            with self.subTest(name=name), self.assertRaisesRegex(ss.StorageError, "in a file"):
                ss.SmithersDb(name)
            self.assertFalse(os.path.exists(name))


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
            tells=in_turn("a b c d")),
        "needs by list only wait": Row(
            Parallel(*tasks("late", needs=["a", "b"]), *tasks("a"), *tasks("b", needs=("a",))),
            tells="NodeStarted a 0 0, b 0 0, late 0 0"),
        "place of static task goes on": Row(
            Parallel(*MIXED, max_concurrency=1), tells=in_turn("n0 n1 n2 n3 n4")),
        "loop runs until condition holds": Row(until_one, tells="NodeStarted t 0 0, t 1 0"),
        "loop already done never begins": Row(
            [loop(*tasks("t"), until=True), *tasks("next")], tells="NodeStarted next 0 0"),
        "loop ends after max iterations": Row(
            [loop(*tasks("t"), turns=3), *tasks("next")],
            tells="NodeStarted t 0 0, t 1 0, t 2 0, next 0 0"),
        "nested loop carries outer iteration": Row(
            nested_loops,
            tells="NodeStarted t@@outer=0 0 0, t@@outer=0 1 0, o 0 0, "
            "t@@outer=1 0 0, t@@outer=1 1 0, o 1 0"),
        "third level carries both outer iterations": Row(
            loop(loop(loop(*tasks("t"), id="c"), id="b"), id="a"),
            tells="NodeStarted t@@a=0,b=0 0 0, t@@a=0,b=0 1 0, t@@a=0,b=1 0 0, t@@a=0,b=1 1 0, "
            "t@@a=1,b=0 0 0, t@@a=1,b=0 1 0, t@@a=1,b=1 0 0, t@@a=1,b=1 1 0"),
        "skipped tasks do not run": Row(
            [Task("a", fail, skip_if=True), Approval("g", skip_if=True), *tasks("b")],
            tells="NodeSkipped a 0, g 0, NodeStarted b 0 0, no ApprovalRequested",
            states="a skipped, g skipped, b finished"),
        "continue on fail goes on": Row(
            [*tasks("a", fail, continue_on_fail=True), *tasks("b")],
            states="a failed, b finished"),
        "dropped gate is closed": Row(
            drop_gate, "NodeWaitingApproval gate; go",
            tells="NodeCancelled gate 0 no longer in the tree"),
        "limit holds over new renders": Row(grow, tells=in_turn("n0 n1 n2 n3 n4 extra")),
    }  # fmt: skip

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
                ("", 1), ("output b", 2), ("output ghost", 1), ("output a, output c", 3),
                ("error b", 1),
            )
        ):  # fmt: skip
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
            "NodeStarted a 0 1, NodeFinished a 0 1"),
        "retries end": Row(
            Task("a", fail, retries=2, retry_delay=0.001), ends="failed",
            tells="NodeStarted a 0 0, NodeFailed a 0 0 ValueError, NodeRetrying a 0 1, "
            "NodeStarted a 0 1, NodeFailed a 0 1 ValueError, NodeRetrying a 0 2, "
            "NodeStarted a 0 2, NodeFailed a 0 2 ValueError"),
        "delayed retry leaves place to others": Row(
            Parallel(Task("a", fail_once, retries=1, retry_delay=0.1), *tasks("b")),
            tells="NodeStarted a 0 0, b 0 0, a 0 1", options={"max_concurrency": 1}),
        "after failure in flight drains only": Row(
            [
                Parallel(Task("slow", wait_for_go), *tasks("bad", fail), *tasks("queued")),
                *tasks("after"),
            ],
            "NodeFailed bad; go", ends="failed",
            states="slow finished, bad failed, queued pending, after pending",
            options={"max_concurrency": 2}),
        "exception without words fails task": Row(
            Task("a", fail_mutely), ends="failed", tells="NodeFailed a 0 0 Mute"),
        "timeout stops function and retries": Row(
            Task("a", wait_for_stop, timeout=0.05, retries=1), ends="failed",
            tells="NodeStarted a 0 0, NodeFailed a 0 0 TASK_TIMEOUT, "
            "NodeStarted a 0 1, NodeFailed a 0 1 TASK_TIMEOUT"),
        "timeout stops command and retries": Row(
            Task("a", ["sleep", "60"], timeout=0.05, retries=1), ends="failed",
            tells="NodeStarted a 0 0, NodeFailed a 0 0 TASK_TIMEOUT, "
            "NodeStarted a 0 1, NodeFailed a 0 1 TASK_TIMEOUT"),
        "missing command fails its task": Row(
            Task("a", ["no-such-command-here"]), ends="failed",
            tells="NodeFailed a 0 0 FileNotFoundError"),
        "cancel ends waiting retry": Row(
            Task("a", fail, retries=1, retry_delay=600), "NodeRetrying a; cancel", "cancelled"),
    }  # fmt: skip

    def test_event_log_tells_whole_run(self) -> None:
        self.drive(Task("a", answer))
        self.assertEqual(
            self.told(),
            [
                "RunStarted", "RunStatusChanged running", "NodePending a 0",
                f"FrameCommitted 1 {self.db.list_frames('r', 1)[0].xml_hash}", "NodeStarted a 0 0",
                "NodeFinished a 0 0", "RunStatusChanged finished", "RunFinished",
            ],
        )  # fmt: skip

    def test_every_attempt_has_its_row(self) -> None:
        self.drive(Task("a", fail_once, retries=2))
        self.assertEqual(self.attempts(), "a 0 failed, a 1 finished")
        self.assertEqual(self.error_of("a"), {"name": "ValueError", "message": "no luck"})

    def test_backoff_grows_as_named(self) -> None:
        for backoff, delays in (
            ("fixed", [2] * 4), ("linear", [2, 4, 6, 8]), ("exponential", [2, 4, 8, 16]),
        ):  # fmt: skip
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
        wrong = (
            object(), {1, 2}, float("nan"), b"bytes", "\ud800", {(1, 2): 3}, {1: "a", "1": "b"},
            ring,
        )  # fmt: skip
        for number, value in enumerate(wrong):
            with self.subTest(value=repr(value)):
                self.play(
                    Task("a", lambda value=value: value, retries=3),
                    ends="failed",
                    tells="NodeFailed a 0 0 OUTPUT_NOT_JSON, no NodeRetrying",
                    run_id=f"r{number}",
                )

    def test_output_over_a_mebibyte_fails(self) -> None:
        fits = ss.MAX_OUTPUT_BYTES - 2
        self.play(
            [
                Task("fits", lambda: "x" * fits),
                Task("big", lambda: "x" * (fits + 1), continue_on_fail=True),
                Task("wide", lambda: "ä" * (fits // 2 + 1), retries=3),
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
        self.assertEqual(self.output("a"), {"exitCode": 0, "stdout": "begun\nmore\n", "stderr": ""})

    def test_command_output_keeps_last_64_kib(self) -> None:
        script = "head -c 200000 /dev/zero | tr '\\0' x; echo end"
        self.drive(Task("a", ["sh", "-c", script]))
        found = self.output("a")
        kept = found["stdout"]
        self.assertEqual((len(kept), kept[-6:]), (ss.COMMAND_TAIL_BYTES, "xxend\n"))
        self.assertEqual(found["truncated"], {"stdout": 200004 - ss.COMMAND_TAIL_BYTES})
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
        self.assertEqual(result[:3], ("r", "cancelled", None))
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
            Approval("gate", on_deny="continue"), "finished", "finished"),
        "denied gate may be skipped": denied(
            Approval("gate", on_deny="skip"), "finished", "skipped"),
        "denied task fails by default": denied(
            asking(), "failed", "failed", "pending", "no NodeStarted"),
        "denied task never runs to continue": denied(
            asking(on_deny="continue"), "finished", "skipped", tells="NodeStarted after 0 0"),
        "denied task may be skipped": denied(
            asking(on_deny="skip"), "finished", "skipped", tells="NodeStarted after 0 0"),
        "denied task may fail and continue": denied(
            asking(continue_on_fail=True), "finished", "failed", tells="NodeStarted after 0 0"),
        "approved task runs with retries": Row(
            Task("gate", fail_once, needs_approval=True, retries=1), f"{WAITS}; approve gate",
            tells="ApprovalRequested gate 0, NodeStarted gate 0 0, gate 0 1"),
        "gate timeout may fail": Row(
            Approval("gate", **QUICK), ends="failed",
            tells="ApprovalRequested gate 0, NodeFailed gate 0 0 APPROVAL_TIMEOUT"),
        "gate timeout may approve": Row(
            Approval("gate", on_timeout="approve", **QUICK),
            tells="ApprovalGranted gate 0 nobody decided within 0.02 s", states="gate finished"),
        "gate timeout may deny and fail": Row(
            Approval("gate", on_timeout="deny", **QUICK), ends="failed",
            tells="ApprovalDenied gate 0 nobody decided within 0.02 s", states="gate failed"),
        "gate timeout may deny and continue": Row(
            Approval("gate", on_timeout="deny", on_deny="continue", **QUICK),
            tells="ApprovalDenied gate 0 nobody decided within 0.02 s", states="gate finished"),
        "gate timeout may deny and skip": Row(
            Approval("gate", on_timeout="deny", on_deny="skip", **QUICK),
            tells="ApprovalDenied gate 0 nobody decided within 0.02 s", states="gate skipped"),
        "each iteration has its gate": Row(
            loop(Approval("gate")), f"{WAITS} 0; approve gate 0; {WAITS} 1; approve gate 1",
            tells="ApprovalRequested gate 0, NodeWaitingApproval gate 0, ApprovalGranted gate 0, "
            "ApprovalRequested gate 1, NodeWaitingApproval gate 1, ApprovalGranted gate 1"),
        "open gate does not starve retries": Row(
            Parallel(Approval("gate"), Task("a", fail_once, retries=1, retry_delay=0.05)),
            f"NodeFinished a; {PARKS}; approve gate"),
        "failure closes open gates": Row(
            Parallel(Approval("gate"), Sequence(Task("a", wait_for_go), Task("b", fail))),
            f"{WAITS}; go", "failed", states="gate cancelled, a finished, b failed"),
    }  # fmt: skip

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
                if gate.is_pause:
                    self.assertNotIn(gate.key, said)
                    continue
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
                "RunStatusChanged running", "ApprovalRequested gate 0",
                "RunStatusChanged waiting-approval", "ApprovalGranted gate 0 Looks good alice",
                "RunStatusChanged running", "RunStatusChanged finished",
            ],
        )  # fmt: skip
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

    def changing(self, **then: Any) -> Live:
        """Start a run whose open gate is rendered otherwise once `k` has ended."""

        def workflow(ctx: Ctx) -> Workflow:
            options = then if ctx.output("k") else {"title": "Ship 1?"}
            return Workflow("w", Parallel(Task("k", wait_for_go), Approval("gate", **options)))

        live = self.start(workflow)
        live.wait(WAITS)
        return live

    def test_decision_on_another_question_is_refused(self) -> None:
        live = self.changing(title="Ship 2?")
        seen = self.gate()
        GO.set()
        live.wait(PARKS)
        self.refused(ss.GateChanged, "approved", requested_at_ms=seen.requested_at_ms)
        self.assertEqual(self.told("ApprovalRequested"), ["ApprovalRequested gate 0"] * 2)
        self.assertEqual(json.loads(self.gate().request_json or "")["title"], "Ship 2?")
        self.decide("approved", requested_at_ms=self.gate().requested_at_ms)
        self.assertEqual(live.end().status, "finished")

    def test_open_gate_takes_todays_approvers(self) -> None:
        live = self.changing(title="Ship 1?", approvers=["alice"])
        seen = self.gate()
        GO.set()
        live.wait(PARKS)
        self.assertEqual(self.gate().requested_at_ms, seen.requested_at_ms)
        bob, alice = (ss.Identity(name, "approver") for name in ("bob", "alice"))
        with self.assertRaises(ss.Forbidden):
            ss.decide(self.db, "r", "gate", ss.Decision("approved"), bob)
        ss.decide(self.db, "r", "gate", ss.Decision("approved"), alice)
        self.assertEqual(live.end().status, "finished")

    def test_timeout_of_open_gate_may_come_later(self) -> None:
        live = self.changing(title="Ship 1?", timeout=0.02, on_timeout="approve")
        self.assertTrue(live.is_running())
        GO.set()
        self.assertEqual(live.end().status, "finished")
        self.assertEqual(len(self.told("ApprovalGranted")), 1)

    def test_open_gate_that_is_to_be_skipped_is_closed(self) -> None:
        live = self.changing(skip_if=True)
        GO.set()
        self.assertEqual(live.end().status, "finished")
        self.assertEqual((self.gate().status, self.states()["gate"]), ("cancelled", "skipped"))

    def test_skip_of_task_is_not_that_of_gate_of_its_id(self) -> None:
        """Also when the process that skipped it has gone: what it was is stored with it."""
        for first, options in (
            (Task("gate", answer, skip_if=True), {}),
            (Approval("gate", skip_if=True), {"resume": True}),
            (Approval("gate"), {"resume": True}),
        ):
            result = self.drive([first, Approval("hold")], park=False, **options)
            self.assertEqual(result.status, "waiting-approval")
        self.assertEqual(self.states()["gate"], "waiting-approval")
        self.cancel()
        self.drive(Approval("gate"), resume=True)

    def test_a_pause_ends_by_itself(self) -> None:
        for run_id in ("seconds", "until", "datetime"):
            soon = time.time() + 0.2
            at = datetime.datetime.fromtimestamp(soon, datetime.timezone.utc)
            until = {"until": soon if run_id == "until" else at}
            options: dict[str, Any] = {"seconds": 0.2} if run_id == "seconds" else until
            live = self.start([Pause("gate", **options), AFTER], run_id)
            live.wait(PARKS)
            self.assertEqual(live.end().status, "finished")
            gate = self.gate(run_id)
            due = gate.deadline_at_ms or 0
            if "until" in options:
                self.assertAlmostEqual(due, soon * 1000, delta=1)
            self.assertGreaterEqual(gate.decided_at_ms or 0, due)
            told = self.told("ApprovalRequested", "NodeWaitingApproval", "ApprovalGranted")
            self.assertEqual(told, [])

    def test_a_pause_that_is_over_holds_nothing_up(self) -> None:
        self.play([Pause("gate", until=1.0), AFTER], tells="NodeFinished gate 0 0, after 0 0")

    def test_nobody_decides_a_pause(self) -> None:
        live = self.start([Pause("gate", seconds=600), AFTER])
        live.wait(PARKS)
        for verdict in ("approved", "denied"):
            self.refused(ss.ApprovalNotPending, verdict)
        with self.db.snapshot() as reads:
            run = reads.get_run("r")
            assert run is not None
            self.assertEqual(ss.approvals_json(reads, run, None), [])
            self.assertIsNone(ss.node_detail_json(reads, run, "gate", None)["gate"])
            why = ss.why_json(reads, run)
            row = ss.run_row(reads, run)
        self.assertEqual([item["kind"] for item in why["blocked"]], ["pause"])
        self.assertEqual((row["waitsFor"], row["state"]), (None, "waiting-approval"))
        self.cancel()
        self.assertEqual(live.end().status, "cancelled")
        self.assertEqual(self.gate().status, "cancelled")

    def test_a_pause_keeps_its_end_through_restarts(self) -> None:
        pause: list[Any] = [Pause("gate", seconds=600), AFTER]
        engine = ss.Engine(as_workflow(pause), self.db, "r")
        engine.open()
        thread = ss.start_thread("engine", engine.run)
        eventually(lambda: self.db.list_gates("r"))
        engine.suspend()
        thread.join(PATIENCE)
        asked = "update _smithers_approvals set requested_at_ms = requested_at_ms - 600000"
        change(self.path, asked)
        self.play(pause, options={"resume": True})
        self.assertEqual(len(self.told("NodeOutput")), 1)

    def test_a_pause_that_leaves_the_tree_is_over(self) -> None:
        def workflow(ctx: Ctx) -> Workflow:
            pause = Pause("gate", seconds=600) if ctx.output("a") is None else None
            return Workflow("w", Parallel(Task("a", wait_for_go), pause), AFTER)

        live = self.start(workflow)
        eventually(lambda: self.db.list_gates("r"))
        GO.set()
        self.assertEqual(live.end().status, "finished")
        self.assertEqual((self.gate().status, self.states()["gate"]), ("cancelled", "cancelled"))

    def test_each_iteration_pauses_once(self) -> None:
        tree = loop(Pause("gate", seconds=0), Task("t", fail_until_go), turns=2)
        self.play(tree, "NodeFailed t; go; retry")
        self.play(tree, options={"resume": True})
        told = "NodeFinished gate 0 0, t 0 1, gate 1 0, t 1 0"
        self.check_told(told, "r")
        self.assertEqual(len(self.told("NodeOutput")), 2)

    def test_a_pauses_end_passes_no_gate_of_its_id(self) -> None:
        self.drive([Pause("gate", seconds=0), Task("after", fail)])
        live = self.start(lambda ctx: Workflow("test", Approval("gate"), AFTER), retry=True)
        live.wait(WAITS)
        self.assertEqual(self.starts(), "after")
        self.decide("approved")
        self.assertEqual(live.end().status, "finished")

    def test_unparked_run_returns_at_gate(self) -> None:
        elements = [Approval("gate"), *tasks("a")]
        self.play(elements, ends="waiting-approval", options={"park": False})
        self.decide("approved")
        self.play(elements, options={"park": False, "resume": True})
        self.assertEqual(self.starts(), "a")


# ---------------------------------------------------------------------------
# Rehearsal
# ---------------------------------------------------------------------------


def canary(ctx: Ctx) -> Workflow:
    error, watched = ctx.error("deploy"), ctx.output("watch") or {}
    retries = {"retries": 3, "retry_delay": 600.0, "timeout": 0.001}
    return Workflow(
        "canary",
        Task("deploy", fail, continue_on_fail=True, **retries),  # type: ignore[arg-type]
        [*tasks("rollback", fail), Fail(f"rolled back: {error['message']}")] if error else None,
        loop(*tasks("watch", fail), Pause("settle", seconds=300), until=watched.get("ok") is True),
        Approval("promote", timeout=7200, on_timeout="deny", on_deny="skip"),
        Task("tell", {"told": True}),
    )


class RehearsalTest(RunCase):
    LOOPED = "deploy watch settle watch settle promote"

    def test_a_rehearsal_takes_what_it_is_told(self) -> None:
        found = ss.rehearse(
            canary,
            outputs={"deploy": "v1", ("watch", 1): {"ok": True}},
            failures={"deploy": [ValueError("no"), ValueError("luck")]},
        )
        self.assertEqual((found.status, found.error), ("finished", None))
        self.assertEqual(found.order, f"deploy deploy {self.LOOPED} tell".split())
        self.assertEqual(found.seconds, 2 * 600 + 2 * 300 + 7200)
        self.assertEqual((found.outputs["deploy"], found.outputs["watch"]), ("v1", {"ok": True}))
        self.assertEqual((found.states["promote"], found.states["tell"]), ("skipped", "finished"))
        self.assertEqual([frame["props"]["name"] for frame in found.frames], ["canary"] * 3)
        self.assertEqual(words_of(found.events[-1]), "RunFinished")

    def test_a_rehearsed_task_may_fail_for_good(self) -> None:
        found = ss.rehearse(canary, failures={"deploy": ValueError("no luck")})
        self.assertEqual(found.order, ["deploy"] * 4 + ["rollback"])
        assert found.error is not None
        self.assertEqual((found.status, found.error["message"]), ("failed", "rolled back: no luck"))

    def test_rehearsed_gates_are_decided_or_wait(self) -> None:
        said = {"approved": True, "note": "go", "decidedBy": "alice"}
        for decisions, after in (({"promote": said}, True), ({"promote": False}, False)):
            gate = Approval("promote")
            found = ss.rehearse(Workflow("w", gate, AFTER), decisions=decisions)
            self.assertEqual("after" in found.order, after)
        found = ss.rehearse(Workflow("w", Approval("promote"), AFTER), decisions={"promote": said})
        self.assertEqual(found.outputs["promote"], {**found.outputs["promote"], **said})
        tree = loop(Approval("gate", on_deny="continue"))
        found = ss.rehearse(Workflow("w", tree), decisions={("gate", 0): False})
        self.assertEqual((found.status, found.order), ("waiting-approval", ["gate", "gate"]))

    def test_a_rehearsal_goes_as_the_run_would(self) -> None:
        trees = (
            [Task("a", fail, retries=1, continue_on_fail=True), *tasks("b c"), Fail("enough")],
            Parallel(*tasks("a b c"), Sequence(*tasks("d", skip_if=True), *tasks("e"))),
            loop(loop(*tasks("a"), id="inner"), *tasks("b", needs=["a"])),
            [
                Approval("a", on_timeout="approve", **QUICK),
                asking(skip_if=True),
                Pause("p", seconds=0),
            ],
            [Task("a", answer, needs=["ghost"])],
        )
        for number, tree in enumerate(trees):
            run_id = f"r{number}"
            self.drive(tree, run_id, max_concurrency=1)
            failures = {"a": ValueError("no luck")} if number == 0 else {}
            found = ss.rehearse(as_workflow(tree), failures=failures, max_concurrency=1)
            expected = [w for w in self.told(run_id=run_id) if not w.startswith("NodeOutput")]
            rehearsed = [words_of(e) for e in found.events if e.type != "NodeOutput"]
            parked = "RunStatusChanged waiting-approval"  # for how long is the clock's affair
            self.assertEqual(
                [w for w in rehearsed if w != parked], [w for w in expected if w != parked]
            )

    def test_a_rehearsal_leaves_nothing_behind(self) -> None:
        before, kept = threading.active_count(), os.getcwd()
        os.chdir(self.folder)
        try:
            ss.rehearse(canary)
        finally:
            os.chdir(kept)
        self.assertEqual(threading.active_count(), before)
        self.assertEqual([n for n in os.listdir(self.folder) if "smithers.db" not in n], [])


# ---------------------------------------------------------------------------
# Durability: crash, resume, ownership, control from outside
# ---------------------------------------------------------------------------

# Lives a life of a run for every line of `[path, effects, kill_at]`: in a process of its own that
# kills itself right after the commit of the kill_at-th event that its engine tells of. Answers with
# what became of that process.
CRASH_SCRIPT = """
import json, os, signal, sys
from smithers_serve import (
    Approval, Loop, Parallel, SmithersDb, Task, Workflow, current_task, run_workflow)

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

for line in sys.stdin:
    path, effects, kill_at = json.loads(line)
    pid = os.fork()
    if pid == 0:
        db = SmithersDb(path)
        resume = db.get_run("r") is not None
        result = run_workflow(workflow, adapter=db, run_id="r", resume=resume, on_event=see)
        os._exit(0 if result.status == "finished" else 1)
    print(os.waitpid(pid, 0)[1], flush=True)
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
            "NodeStarted hold; cancel; retry", tells="NodeStarted a 0 0, hold 0 0, hold 0 1"),
        "cancelled gate is asked again": Row(
            Approval("gate"), f"{WAITS}; cancel; retry; {WAITS}; approve gate"),
        "denied gate of failed run asks again": Row(
            Approval("gate"), f"{WAITS}; deny gate; retry; {WAITS}; approve gate"),
        "failed nodes get fresh try": Row(
            [*tasks("a"), Task("b", fail_until_go, retries=1), *tasks("c")], "end; go; retry",
            tells="NodeStarted a 0 0, b 0 0, b 0 1, b 0 2, c 0 0"),
        "run cancelled while draining resumes": Row(
            Parallel(Task("bad", fail_until_go), Task("hold", wait_once)),
            "NodeFailed bad; cancel; end; go; retry"),
        "resume still knows old errors": Row(
            mended, "NodeStarted mend; cancel; retry",
            tells="NodeStarted a 0 0, mend 0 0, mend 0 1", states="a failed, mend finished"),
        "resume still knows nested iteration": Row(
            held_in_second_turn, "NodeStarted hold@@outer=0; cancel; retry",
            states="t@@outer=0 finished, hold@@outer=0 finished"),
        "loop goes on at its iteration": Row(
            loop(Task("t", wait_in_second_turn), turns=3), "NodeStarted t 1; cancel; retry",
            tells="NodeStarted t 0 0, t 1 0, t 1 1, t 2 0"),
        "retries are counted over resume": Row(
            Task("a", fail_after_stop, retries=1), "NodeStarted a 0 1; cancel; retry", "failed",
            "NodeStarted a 0 0, NodeFailed a 0 0 ValueError, "
            "NodeStarted a 0 1, a 0 2, NodeFailed a 0 2 ValueError"),
    }  # fmt: skip

    def test_killed_run_resumes_at_every_point(self) -> None:
        """Its resume is killed too, and the third life goes to the end."""
        with Child("-c", CRASH_SCRIPT) as child:

            def live(name: str, kill_at: int, ends: int) -> None:
                paths = [self.in_folder(name + end) for end in (".db", ".effects")]
                self.assertIn(child.ask(*paths, kill_at), (ends, 0), child.text())
                check_integrity(paths[0])

            live("whole", 0, 0)
            with ss.SmithersDb(self.in_folder("whole.db")) as db:
                whole = len(db.list_events("r"))
            for point in range(1, whole + 1, 2):
                with self.subTest(kill_at=point):
                    live(f"kill-{point}", point, signal.SIGKILL)
                    live(f"kill-{point}", 1 + point % 3, signal.SIGKILL)
                    live(f"kill-{point}", 0, 0)
                    self.check_crashed(self.in_folder(f"kill-{point}"))

    def check_crashed(self, name: str) -> None:
        with ss.SmithersDb(f"{name}.db") as db:
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
        """It is decided after the resume, or before it."""
        for number, script in enumerate(("RunStatusChanged running; approve gate", "")):
            self.db.close()
            self.path = self.in_folder(f"crash-{number}.db")
            self.hold("gate", WAITS)
            self.db = self.adapter()
            requested = self.gate().requested_at_ms
            if not script:
                self.decide("approved")
            self.play(
                [*tasks("a", fail), Approval("gate")], script, options={"resume": True},
                tells="ApprovalRequested gate 0, ApprovalGranted gate 0",
            )  # fmt: skip
            self.assertEqual(self.gate().requested_at_ms, requested)

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
        code, _, err = run_child(*command, shell='ulimit -f 600; exec "$@"')  # blocks of 512 bytes
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
        with ss.SmithersDb(path) as db:
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

    def network_path(self) -> str:
        """Return where sqlite cannot make its shared memory, and falls back to a journal."""
        path = self.in_folder("network.db")
        os.mkdir(path + "-shm")
        return path

    def test_without_shared_memory_the_file_works_too(self) -> None:
        with ss.SmithersDb(self.network_path()) as db:
            self.play_in(db, "run")
            # Of a rollback journal the removal is the commit: its folder has to be synced.
            self.assertEqual(db._writer.execute("pragma journal_mode").fetchone(), ("delete",))
            self.assertEqual(db._writer.execute("pragma synchronous").fetchone(), (3,))

    def test_file_may_move_to_where_shared_memory_is_missing(self) -> None:
        path = self.in_folder("moved.db")
        with ss.SmithersDb(path) as db:
            self.play_in(db, "here")
        os.mkdir(path + "-shm")
        with ss.SmithersDb(path) as db:
            self.play_in(db, "there")

    def test_commit_waits_for_reader_of_rollback_journal(self) -> None:
        path = self.network_path()
        with (
            mock.patch.object(ss.SmithersDb, "BUSY_SECONDS", 0.01),
            ss.SmithersDb(path) as db,
            contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader,
        ):
            live = self.start(Task("wait", wait_for_go), adapter=db)
            live.wait("NodeStarted")
            reader.execute("begin")
            reader.execute("select count(*) from _smithers_events").fetchone()
            GO.set()
            eventually(lambda: self.counted(db, "smithers_db_retries") > 20)
            self.assertTrue(live.is_running())
            reader.execute("commit")
            self.assertEqual(live.end().status, "finished")

    def test_engine_waits_to_read_a_rollback_journal(self) -> None:
        """Between a commit and the render after it another program may take the file for itself."""
        path = self.network_path()

        def workflow(ctx: Ctx) -> Workflow:
            found = ctx.output("a")
            return Workflow("test", Task("a", answer), Task("b", {"a": found}) if found else None)

        with (
            mock.patch.object(ss.SmithersDb, "BUSY_SECONDS", 0.01),
            ss.SmithersDb(path) as db,
            contextlib.closing(
                sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            ) as other,
        ):
            has_lock = threading.Event()

            def take(_: Live, event: ss.Event) -> None:
                if event.type == "NodeFinished" and event.payload["nodeId"] == "a":
                    other.execute("begin exclusive")
                    has_lock.set()

            with mock.patch.object(Live, "see", take):
                live = self.start(workflow, adapter=db)
                self.assertTrue(has_lock.wait(PATIENCE))
                self.assertTrue(live.is_running(0.2))
                other.execute("rollback")
                self.assertEqual(live.end().status, "finished")

    def test_decisions_elsewhere_leave_the_journal_alone(self) -> None:
        """Another process that tried the log would take the file from under the engine's feet."""
        path = self.network_path()

        def chat() -> None:
            while not GO.is_set():
                current_task().log("and another thing")
                GO.wait(0.01)  # every line is a commit: others would hardly have a turn

        ids = [f"gate{n}" for n in range(30)]
        tree = Workflow("test", Parallel(Task("chat", chat), *map(Approval, ids)))
        with ss.SmithersDb(path) as db:
            live = self.start(tree, adapter=db)
            for id in ids:
                live.wait(f"NodeWaitingApproval {id}")
                with ss.SmithersDb(path, create=False) as other:
                    ss.decide(other, "r", id, ss.Decision("approved"))
                live.wait(f"NodeFinished {id}")
            GO.set()
            self.assertEqual(live.end().status, "finished")


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


def remote_wait(begun: str = os.devnull) -> str:
    remote_touch(begun)
    told = current_task().cancelled.wait(PATIENCE)
    current_task().log("told" if told else "not told")
    return "half done"


def remote_touch(path: str) -> None:
    with open(path, "w"):
        pass


class Opaque(concurrent.futures.Executor):
    """A pool that does not say which of its calls have begun, as those of clusters do not."""

    def __init__(self, pool: concurrent.futures.Executor) -> None:
        self._pool = pool

    def submit(self, *call: Any, **options: Any) -> concurrent.futures.Future[Any]:
        outer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        inner = self._pool.submit(*call, **options)
        inner.add_done_callback(lambda done: outer.set_result(done.result()))
        return outer


async def remote_sleep() -> None:
    try:
        await asyncio.sleep(PATIENCE)
    except asyncio.CancelledError:
        current_task().log("told")
        raise


class ExecutorTest(RunCase):
    processes: concurrent.futures.Executor

    @classmethod
    def setUpClass(cls) -> None:
        try:
            cls.processes = cls.make_processes()
            cls.processes.submit(int).result()  # there is a worker: no timeout is its start's
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
                Task("a", remote_double, args=[4], kwargs={"by": 3}), Task("b", remote_coroutine),
                Task("c", ["sh", "-c", "echo local"]), Task("d", remote_keep, needs={"value": "a"}),
            ],
            tells="NodeOutput a 0 0 doubling 4 stdout, c 0 0 local stdout",
            options={"executor": self.processes},
        )  # fmt: skip
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

    def cancel_begun(self, tells: str, run_id: str, executor: Any, *others: Any) -> None:
        """Cancel a run whose task waits in its worker, beside others."""
        begun = self.in_folder(f"{run_id} begun")
        tree = Parallel(Task("a", remote_wait, args=[begun]), *others)
        live = self.start(tree, run_id, executor=executor)
        eventually(lambda: os.path.exists(begun))
        for other in others:
            live.wait(f"NodeStarted {other.id}")
        self.cancel(run_id)
        self.assertEqual(live.end().status, "cancelled")
        why = "the run was cancelled"
        tells = f"NodeOutput a 0 0 told stdout, NodeCancelled a 0 0 {why}{tells and tells + why}"
        self.check_told(tells, run_id)

    def test_worker_is_told_to_stop(self) -> None:
        late = "NodeOutput a 0 0 told stdout, NodeFailed a 0 0 TASK_TIMEOUT"
        for run in (remote_wait, remote_sleep):
            tree, options = Task("a", run, timeout=0.3), {"executor": self.processes}
            self.play(tree, "", "failed", late, run_id=run.__name__, options=options)
        self.cancel_begun("", "cancelled", self.processes)

    def test_worker_that_gave_up_has_not_finished(self) -> None:
        engine = ss.Engine(as_workflow(Task("a", remote_wait)), self.db, "r", patience="timed",
                           executor=self.processes, on_event=lambda event: None)  # fmt: skip
        engine.open()
        thread = ss.start_thread("engine", engine.run)
        eventually(lambda: self.attempts() == "a 0 in-progress")
        engine.suspend()
        thread.join(PATIENCE)
        self.assertEqual(self.attempts(), "a 0 cancelled")

    def test_a_pool_that_cancels_calls_is_made_anew(self) -> None:
        class Dead(concurrent.futures.Executor):
            def submit(self, *call: Any, **options: Any) -> concurrent.futures.Future[Any]:
                future: concurrent.futures.Future[Any] = concurrent.futures.Future()
                future.cancel()
                return future

            def shutdown(self, *_: Any, **options: Any) -> None:
                raise RuntimeError("nobody there")

        pools = [self.threads(), Dead()]
        tells = (
            "NodeStarted a 0 0, NodeCancelled a 0 0 its pool of workers broke, NodeStarted a 0 1"
        )
        self.play(tasks("a"), tells=tells, options={"executor": pools.pop})

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

    def test_what_is_told_to_stop_in_a_queue_never_begins(self) -> None:
        for run_id, pool in (("threads", self.threads(1)), ("processes", self.processes)):
            path = self.in_folder(f"{run_id} ran")
            waiting = Task("b", remote_touch, args=[path])
            self.cancel_begun(", b 0 0 ", run_id, Opaque(pool), waiting)
            self.assertFalse(os.path.exists(path))

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
                "runId": RUN, "workflowName": "release", "status": "waiting-approval",
                "finishedAtMs": None,
                "summary": {"finished": 1, "waiting-approval": 1, "pending": 1},
            },
        )  # fmt: skip

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
        gets = "/ /frames /nodes /nodes/build /approvals /why".split()
        for method, path in (*(("GET", path) for path in gets), ("POST", "/cancel"),
                             ("POST", "/approve/deploy")):  # fmt: skip
            self.assert_refused(404, "RUN_NOT_FOUND", "unborn", method, path)

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
            f"""{NUMBERS.format(count)} insert into _smithers_frames
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
    *((b'{"' + key.encode() + b'":"a"}', key) for key in (
        "decided_by", "Note", "itteration", "verdict",
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

    def test_a_gate_open_after_the_end_is_closed(self) -> None:
        self.served = self.at_gate(db=self.foreign_database())
        change(self.served.path, "update _smithers_runs set status = 'cancelled'")
        self.assert_error(self.served.ask("POST", "/approve/deploy"), 409, "RUN_NOT_ACTIVE")

    def test_a_decision_is_about_the_gate_seen(self) -> None:
        asked = self.gate(RUN).requested_at_ms
        assert asked is not None
        self.refuse_decision(409, "GATE_CHANGED", str(asked), "deploy", {"requestedAtMs": 1})
        self.refuse_decision(400, "INVALID_REQUEST", "'noted'", "deploy", {"noted": "x"})
        self.assert_ask(200, "POST", "/approve/deploy", {"requestedAtMs": asked})

    def test_a_gate_asked_twice_needs_its_iteration(self) -> None:
        self.served = self.fresh()
        tree = loop(Approval("ok", on_deny="continue"))
        live = self.served.start(tree, "NodeWaitingApproval ok 0")
        self.assert_ask(200, "POST", "/deny/ok")
        live.wait("NodeWaitingApproval ok 1")
        self.refuse_decision(400, "INVALID_REQUEST", "iteration: 0, 1", "ok")
        self.assert_ask(200, "POST", "/deny/ok", {"iteration": 0})  # a late repetition
        gates = {gate.iteration: gate.status for gate in self.db.list_gates(self.served.run_id)}
        self.assertEqual(gates, {0: "denied", 1: "requested"})
        self.assert_ask(200, "POST", "/approve/ok", {"iteration": 1})
        self.assertEqual(live.end().status, "finished")

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

    def test_an_ended_run_is_not_active(self) -> None:
        self.assert_ask(200, "POST", "/cancel")
        self.assert_refused(409, "RUN_NOT_ACTIVE", "cancelled", "POST", "/cancel")
        self.assertTrue(self.served.abort.is_set())

    def test_a_cancel_says_who_and_why(self) -> None:
        for body, says in (({"by": "x"}, "'by'"), ({"reason": 7}, "reason"), ([], "object")):
            self.assert_refused(400, "INVALID_REQUEST", says, "POST", "/cancel", body)
        self.assert_ask(200, "POST", "/cancel", {"decidedBy": "alice", "reason": "wrong branch"})
        self.assertEqual(self.told("RunCancelled", run_id=RUN), ["RunCancelled alice wrong branch"])
        self.assertEqual(self.served.status(), "cancelled")

    def test_a_refused_cancel_aborts_nothing(self) -> None:
        served = self.at_gate(token="tok")
        self.assert_error(served.ask("POST", "/cancel"), 401, "UNAUTHORIZED")
        self.assertFalse(served.abort.is_set())


# What is shown of a node, of a gate and of whatever holds a run up: the keys, in order.
NODE_KEYS = listed(
    "nodeId iteration label state attempts startedAtMs finishedAtMs durationMs error", " "
)
GATE_KEYS = listed(
    "runId nodeId iteration workflowName runStatus label requestTitle requestSummary metadata"
    " requestedAtMs waitingMs deadlineAtMs onDeny onTimeout approvers status note decidedBy"
    " decidedAtMs", " ",
)  # fmt: skip
DETAIL_KEYS = [*NODE_KEYS, "output", "gate", "needs", "log"]
EVIDENCE_KEYS = listed("nodeId iteration state error output isCut log", " ")
BLOCK_KEYS = listed("kind nodeId iteration sinceMs detail", " ")


def chatter() -> str:
    for number in range(150):
        current_task().log(f"line {number}")
    return "ä" * 5000


def keys_of(nodes: Any) -> str:
    return " ".join(f"{node['nodeId']}::{node['iteration']}" for node in nodes)


class NodesTest(ServerCase):
    def pages(self, query: str, limit: int) -> str:
        """Return the nodes of all pages of so many."""
        found: list[str] = []
        while True:
            after = f"&after={found[-1]}" if found else ""
            page = keys_of(self.look(f"/nodes?limit={limit}{after}{query}")).split()
            if not page:
                return " ".join(found)
            self.assertFalse(set(page) & set(found))
            found += page

    def test_nodes_come_in_order_of_the_tree(self) -> None:
        tree = [*tasks("z a"), loop(Task("m", turn)), Approval("gate")]
        self.assertEqual(keys_of(self.look("/nodes", *tree)), "z::0 a::0 m::1 gate::0 m::0")
        for limit in range(1, 7):
            self.assertEqual(self.pages("", limit), "z::0 a::0 m::1 gate::0 m::0")
            self.assertEqual(self.pages("&state=finished", limit), "z::0 a::0 m::1 m::0")
        self.assertEqual(self.look("/nodes?state=failed"), [])

    def test_paging_goes_on_after_a_node_has_moved(self) -> None:
        self.served = self.at_gate(tasks("a b c") + [Approval("gate")], db=self.foreign_database())
        first = keys_of(self.look("/nodes?state=finished&limit=1"))
        self.assertEqual(first, "a::0")
        change(self.served.path, "update _smithers_nodes set state = 'pending' where node_id = 'a'")
        self.assertEqual(keys_of(self.look(f"/nodes?state=finished&after={first}")), "b::0 c::0")

    def test_a_failed_node_tells_its_tries(self) -> None:
        self.look("/nodes", Task("f", fail, retries=1, label="F", continue_on_fail=True))
        shown = self.look("/nodes")[0]
        self.assertEqual(list(shown), NODE_KEYS)
        self.assertEqual(shown["durationMs"], shown["finishedAtMs"] - shown["startedAtMs"])
        error = {"name": "ValueError", "message": "no luck"}
        found = [shown[name] for name in ("label", "state", "attempts", "error")]
        self.assertEqual(found, ["F", "failed", 2, error])
        self.assertEqual(self.look("/nodes/f")["attempts"][1]["error"], error)

    def test_one_node_is_told_in_full(self) -> None:
        shown = self.look("/nodes/b", *tasks("a"), Task("b", chatter, needs=["a"]), Approval("g"))
        self.assertEqual(list(shown), DETAIL_KEYS)
        (attempt,) = shown["attempts"]
        keys = ["attempt", "state", "startedAtMs", "finishedAtMs", "error"]
        self.assertEqual((list(attempt), attempt["state"]), (keys, "finished"))
        self.assertEqual(
            (shown["output"], shown["needs"], shown["gate"]), ("ä" * 5000, ["a"], None)
        )
        texts = [line["text"] for line in shown["log"]]
        self.assertEqual(texts, [f"line {number}" for number in range(50, 150)])
        self.assertEqual(list(shown["log"][0]), ["attempt", "stream", "text", "timestampMs"])
        gate = self.look("/nodes/g")["gate"]
        self.assertEqual((list(gate), gate["status"]), ([*GATE_KEYS, "evidence"], "requested"))

    def test_a_long_log_hides_no_nodes_lines(self) -> None:
        self.served = self.at_gate([Task("a", chatter), Approval("g")], db=self.foreign_database())
        fill(self.served, 100_001)
        self.assertEqual(len(self.look("/nodes/a")["log"]), 100)
        self.assertEqual(len(self.look("/approvals")[0]["evidence"][0]["log"]), 20)

    def test_lines_of_every_attempt_are_found(self) -> None:
        """However much others have printed between the attempts."""

        def speak() -> None:
            current_task().log(f"attempt {current_task().attempt}")
            fail_once()

        served = self.served = self.at_gate(
            [Task("a", speak, retries=1), Approval("g")], db=self.foreign_database()
        )
        at = min(event.timestamp_ms for event in served.events())
        change(  # all within one millisecond
            served.path,
            f"update _smithers_events set timestamp_ms = {at}",
            f"update _smithers_attempts set started_at_ms = {at}, finished_at_ms = {at}",
        )
        found = [line["text"] for line in self.look("/nodes/a")["log"]]
        self.assertEqual(found, ["attempt 0", "attempt 1"])
        (seq,) = [event.seq for event in served.events() if event.type == "NodeRetrying"]
        later = "+ 60000 where"
        change(
            served.path,
            f"""update _smithers_events set seq = seq + 200000, timestamp_ms = timestamp_ms {later}
                seq > {seq}""",
            f"""update _smithers_attempts set finished_at_ms = finished_at_ms + 60000,
                started_at_ms = started_at_ms {later} attempt = 1""",
            f"""{NUMBERS.format(200_000)} insert into _smithers_events
                select '{served.run_id}', {seq} + n, (select timestamp_ms + 30000
                from _smithers_events where seq = {seq}), 'NodeOutput', '{{}}' from numbers""",
        )
        found = [line["text"] for line in self.look("/nodes/a")["log"]]
        self.assertEqual(found, ["attempt 0", "attempt 1"])

    def test_iterations_of_a_node_are_told_apart(self) -> None:
        nested = loop(loop(Task("in", turn), id="inner"), id="outer")
        self.look("/nodes", loop(Task("m", turn)), nested)
        for path, output in (
            ("m", 1), ("m?iteration=0", 0), ("in@@outer=1", 1),
            ("in%40%40outer%3D1?iteration=0", 0),
        ):  # fmt: skip
            self.assertEqual(self.look(f"/nodes/{path}")["output"], output, path)

    def test_what_is_not_there_is_named(self) -> None:
        for path, says in (("nobody", "'nobody'"), ("build?iteration=7", "iteration 7")):
            self.assert_refused(404, "NODE_NOT_FOUND", says, "GET", f"/nodes/{path}")

    def test_bad_parameters_are_refused_and_named(self) -> None:
        for path, says in (
            ("/nodes?stat=failed", "'stat'"), ("/nodes?state=faild", "state"),
            ("/nodes?limit=0", "limit"), ("/nodes?limit=many", "limit"),
            ("/nodes?after=build", "after"), ("/nodes?after=build::x", "after"),
            ("/nodes/build?iteration=-1", "iteration"), ("/nodes/build?attempt=0", "'attempt'"),
            ("/approvals?limt=1", "'limt'"), ("/approvals?status=open", "status"),
            ("/why?node=build", "'node'"),
        ):  # fmt: skip
            self.assert_refused(400, "INVALID_REQUEST", says, "GET", path)


class ApprovalsTest(ServerCase):
    def test_a_gate_shows_all_an_approver_needs(self) -> None:
        gate = Approval(
            "gate", title="Ship?", summary="All of it", metadata={"ref": "v1"}, timeout=600,
            on_timeout="deny", on_deny="skip", approvers=["alice"],
        )  # fmt: skip
        self.served = self.fresh()
        self.served.start([*tasks("a"), gate], PARKS)
        (shown,) = self.look("/approvals")
        self.assertEqual(list(shown), [*GATE_KEYS, "evidence"])
        asked = shown.pop("requestedAtMs")
        self.assertEqual(shown.pop("deadlineAtMs"), asked + 600_000)
        self.assertGreaterEqual(shown.pop("waitingMs"), 0)
        del shown["evidence"]
        told = ["gate", 0, "test", "waiting-approval", "Ship?", "Ship?", "All of it"]
        told += [{"ref": "v1"}, "skip", "deny", ["alice"], "requested", None, None, None]
        self.assertEqual(list(shown.values()), [self.served.run_id, *told])

    def test_the_oldest_request_comes_first(self) -> None:
        self.look("/why", Parallel(*map(Approval, ("a", "b", "c"))))
        change(
            self.path,
            f"""update _smithers_approvals set requested_at_ms = requested_at_ms - 5
                where node_id = 'b' and run_id = '{self.served.run_id}'""",
        )
        self.assertEqual(keys_of(self.look("/approvals")), "b::0 a::0 c::0")
        self.assert_ask(200, "POST", "/approve/a", {"note": "fine", "decidedBy": "alice"})
        self.assertEqual(keys_of(self.look("/approvals")), "b::0 c::0")
        (decided,) = self.look("/approvals?status=approved")
        self.assertEqual((decided["note"], decided["decidedBy"]), ("fine", "alice"))

    def test_all_of_many_gates_can_be_seen(self) -> None:
        self.look("/why", Parallel(*(Approval(f"g{n}") for n in range(1003))))
        found: list[Any] = []
        after = ""
        for _ in range(4):
            page = self.look(f"/approvals?limit=400{after}")
            found += page
            if page:
                last = page[-1]
                # Decided meanwhile, it is no longer among those that wait.
                self.assert_ask(200, "POST", f"/approve/{last['nodeId']}")
                after = f"&after={last['requestedAtMs']}::{last['nodeId']}::0"
        self.assertEqual(len({gate["nodeId"] for gate in found}), 1003)
        self.assertEqual(len(found), 1003)
        self.assertEqual(len(self.look("/approvals")), 1000)
        kinds = [item["kind"] for item in self.look("/why")["blocked"]]
        self.assertEqual(kinds.count("approval"), 1000)
        for query in ("limit=0", "after=g1", "after=1::g1", "after=x::g1::0"):
            self.assert_ask(400, "GET", f"/approvals?{query}")

    def test_evidence_is_what_a_gate_stands_on(self) -> None:
        before = Parallel(Task("x", answer), Task("y", fail, continue_on_fail=True))
        for options, ids in (({}, "x::0 y::0"), ({"needs": ["first"]}, "first::0")):
            tree = [Task("first", answer), before, Approval("gate", **options)]
            evidence = self.look("/approvals", *tree)[0]["evidence"]
            self.assertEqual(keys_of(evidence), ids)
            self.assertEqual((evidence[0]["state"], evidence[0]["output"]), ("finished", 42))
        self.assertEqual(list(evidence[0]), EVIDENCE_KEYS)

    def test_long_evidence_is_cut(self) -> None:
        (found,) = self.look("/approvals", Task("a", chatter), Approval("gate"))[0]["evidence"]
        self.assertTrue(found["isCut"])
        self.assertRegex(found["output"], '^"ä{1000,}$')
        self.assertLessEqual(len(found["output"].encode()), 4096)
        self.assertEqual([x["text"] for x in found["log"]], [f"line {n}" for n in range(130, 150)])


class StoredTreeTest(unittest.TestCase):
    """Where the nodes of a stored tree stand, read from its text."""

    def check(self, tree: dict[str, Any], text: str) -> int:
        """Compare with what its JSON says; return the number of nodes."""
        expected: dict[str, tuple[list[str], tuple[str, ...]]] = {}

        def walk(element: Any, before: list[str], loops: tuple[str, ...]) -> list[str]:
            if element["tag"] == Task.tag:
                expected[element["props"]["id"]] = (before, loops)
                return [element["props"]["id"]]
            if element["tag"] == Loop.tag:
                loops += (element["props"]["id"],)
            ids: list[str] = []
            for child in element["children"]:
                below = walk(child, before, loops)
                before = before if element["tag"] == Parallel.tag else below
                ids += below
            return ids

        walk(tree, [], ())
        found = ss.Outline(text)
        self.assertEqual([found.id(n) for n in range(found.count)], list(expected))
        for number, (id, (before, loops)) in enumerate(expected.items()):
            self.assertEqual((found.number_of(id), found.numbers[id]), (number, number))
            self.assertEqual((found.ids_before(id), found.loops(number)), (before, loops), text)
            self.assertEqual(found.props(number), ss.props_of(text, id))
        chance = random.Random(text)
        for share in (0.2, 0.5, 0.9):
            unended = [n for n in range(found.count) if chance.random() < share]
            reached = [n for n in unended if not set(found.before(n)).intersection(unended)]
            self.assertEqual(list(found.reached(unended)), reached, text)
        return found.count

    def test_any_tree_is_read_as_its_json(self) -> None:
        nodes = 0
        for seed in range(200):
            tree = ss.xml_of(Wood(random.Random(f"stored {seed}"), answer).tree())
            nodes += self.check(tree, ss.to_json(tree))
        self.assertGreater(nodes, 500)

    def test_a_value_is_never_taken_for_an_element(self) -> None:
        label = '","props":{"id":"x"},"children":[]},{"kind":"element","tag":"smithers:task'
        tree = ss.xml_of(as_workflow([Task("a", {}, label=label), Task("b", {}, label="]}]}")]))
        self.assertEqual(self.check(tree, ss.to_json(tree)), 2)

    def test_a_node_is_found_whatever_was_looked_for_before(self) -> None:
        for seed in range(50):
            chance = random.Random(f"found {seed}")
            text = ss.to_json(ss.xml_of(Wood(chance, answer).tree()))
            found, again = ss.Outline(text), ss.Outline(text)
            loops = {id for n in range(found.count) for id in found.loops(n)}
            wanted = chance.choices([*found.numbers, "none", *loops], k=20)
            for id in [*found.numbers, *wanted * (1 + seed % 2 * 60)]:
                self.assertEqual(again.number_of(id), found.numbers.get(id), (id, text))

    def test_text_between_elements_is_passed_over(self) -> None:
        tree = ss.xml_of(as_workflow([Parallel(*tasks("a b")), *tasks("c")]))
        said = '{"kind":"text","text":"]}\\"]}"}'
        text = ss.to_json(tree).replace(',{"kind"', f',{said},{{"kind"').replace("[]", f"[{said}]")
        self.assertEqual(self.check(tree, text), 3)


class TreeCostTest(RunCase):
    """The tree of 60,000 nodes is 6 MiB of text: who can answer without it does not look at it."""

    def setUp(self) -> None:
        super().setUp()
        before = Parallel(*tasks("a b"))
        gates = Parallel(Approval("one"), Approval("two"), Approval("three", needs=["a"]))
        tree = as_workflow([before, gates, Task("after", answer)])
        ss.run_workflow(tree, adapter=self.db, run_id="r", park=False)
        self.app = ss.create_serve_app(adapter=self.db, run_id="r")
        self.addCleanup(self.app.close)

    def ask(self, path: str) -> Any:
        answer = self.app.request("GET", path)
        self.assertEqual(answer.status, 200)
        return answer.json()

    def test_only_where_something_stands_is_asked_of_the_tree(self) -> None:
        for path, looks in (
            ("/nodes", 0), ("/nodes?state=pending", 0), ("/nodes/a", 0), ("/nodes/three", 0),
            ("/approvals?status=denied", 0), ("/why", 0), ("/nodes/one", 1), ("/approvals", 1),
        ):  # fmt: skip
            with (
                self.subTest(path=path),
                mock.patch.object(ss, "Outline", wraps=ss.Outline) as made,
            ):
                self.db._kept.clear()
                self.ask(path)
                self.assertEqual(made.call_count, looks)

    def test_a_frame_is_read_once(self) -> None:
        with (
            mock.patch.object(ss, "Outline", wraps=ss.Outline) as made,
            mock.patch.object(ss, "owner_life", lambda run: "alive"),
        ):
            for number in (1, 2):
                for path in ("/why", "/approvals", "/nodes/two", "/why"):
                    self.ask(path)
                    self.assertEqual(made.call_count, number)
                change(
                    self.path,
                    """insert into _smithers_frames (run_id, frame_no, xml_json)
                       select run_id, frame_no + 1, xml_json from _smithers_frames
                       where run_id = 'r' order by frame_no desc limit 1""",
                )

    def test_no_question_parses_the_tree(self) -> None:
        with mock.patch.object(ss.json, "loads", wraps=json.loads) as loads:
            for path in ("/nodes", "/nodes/one", "/approvals?status=all", "/why"):
                self.ask(path)
        self.assertTrue(loads.called)
        self.assertNotIn(self.db.get_tree("r"), [call.args[0] for call in loads.call_args_list])

    def test_what_several_gates_stand_on_is_looked_at_once(self) -> None:
        with mock.patch.object(ss, "evidence_json", wraps=ss.evidence_json) as looked:
            shown = self.ask("/approvals")
        self.assertEqual([call.args[2] for call in looked.call_args_list], ["a", "b"])
        found = {gate["nodeId"]: keys_of(gate["evidence"]) for gate in shown}
        self.assertEqual(found, {"one": "a::0 b::0", "two": "a::0 b::0", "three": "a::0"})


class WhyTest(ServerCase):
    def blocked(self) -> str:
        """Return what holds the run up, as `kind node`."""
        found = self.look("/why")["blocked"]
        for item in found:
            self.assertEqual(list(item), BLOCK_KEYS)
        return ", ".join(f"{x['kind']} {x['nodeId']}: {x['detail']}" for x in found)

    def test_every_kind_of_wait_is_told(self) -> None:
        for tree, until, state, blocked in (
            (Approval("g", title="Go?"), "NodeWaitingApproval g", "waiting-approval",
             "approval g: Go\\?"),
            (Approval("g", timeout=7200, on_timeout="deny"), PARKS, "waiting-approval",
             "approval g: .*, timeout g: .*deny in 2 h"),
            (Task("t", wait_for_stop), "NodeOutput t", "running", "task t: .*up"),
            (Task("r", fail, retries=1, retry_delay=7200), "NodeRetrying r", "running",
             "retry r: .*2 h"),
            (Parallel(*tasks("a b", wait_for_go), max_concurrency=1), "NodeStarted a", "running",
             "task a: no line yet, concurrency b: .*"),
            (Parallel(Task("a", wait_for_go), Task("b", answer, needs=["a"])), "NodeStarted a",
             "running", "task a: no line yet, dependency b: .*a"),
            (tasks("a b", wait_for_go), "NodeStarted a", "running", "task a: no line yet"),
        ):  # fmt: skip
            with self.subTest(blocked=blocked):
                self.served = self.fresh()
                self.served.start(tree, until)
                self.assertRegex(self.blocked(), rf"\A{blocked}\Z")
                self.assertEqual(self.look("/why")["state"], state)
            GO.set()
            self.served.close()
            GO.clear()

    def test_a_large_trees_queue_is_told(self) -> None:
        self.served = self.fresh()
        hold, many = Task("hold", wait_for_stop), [Task(f"t{n}", answer) for n in range(5000)]
        self.served.start([Parallel(hold, *many, max_concurrency=1)], "NodeOutput hold")
        found = [item["nodeId"] for item in self.look("/why")["blocked"]]
        self.assertEqual(found[:3], ["hold", "t0", "t1"])
        self.assertGreater(len(found), 100)

    def test_what_waits_for_a_loop_is_not_ready(self) -> None:
        self.served = self.fresh()
        turns = loop(Task("a", answer), Task("b", wait_for_stop))
        tree = Parallel(
            turns,
            Task("x", answer, needs=["a"]),
            Sequence(Task("y", wait_for_stop), Task("z", answer)),
        )
        self.served.start([tree], "NodeStarted b")
        self.assertIn("dependency x: waits for a", self.blocked())
        self.assertNotIn(" z:", self.blocked())

    def test_each_running_task_tells_its_last_line(self) -> None:
        """Also the one that has said little beside one that says much."""
        self.served = self.fresh()

        def chat(count: int) -> None:
            for number in range(count):
                current_task().log(f"line {number}")
            current_task().cancelled.wait(PATIENCE)

        tree = Parallel(Task("few", chat, args=(1,)), Task("many", chat, args=(500,)))
        live = self.served.start([tree], "NodeOutput few")
        live.wait("NodeOutput many 0 0 line 499")
        self.assertIn("task few: last line: line 0", self.blocked())
        self.assertIn("task many: last line: line 499", self.blocked())

    def test_nothing_is_now_that_is_still_to_come(self) -> None:
        told = [ss.duration_text(ms) for ms in (-5, 400, 999, 1000, 89_000, 90_000)]
        self.assertEqual(told, ["now", "now", "1 s", "1 s", "89 s", "2 min"])

    def test_a_retry_tells_how_many_are_left(self) -> None:
        self.served = self.fresh()
        self.served.start([Task("r", fail, retries=2, retry_delay=7200)], "NodeRetrying r")
        self.assertIn("its 2nd attempt of 3 is due in 2 h", self.blocked())

    def test_a_run_without_engine_says_so(self) -> None:
        self.assertRegex(self.blocked(), r"\Aowner None: .*, approval deploy: Deploy\?\Z")
        self.assert_ask(200, "POST", "/approve/deploy")  # what comes next waits for an engine too
        self.assertRegex(self.blocked(), r"\Aowner None: [^,]*\Z")

    def test_every_state_of_a_run_is_told(self) -> None:
        self.served = self.at_gate(tasks("a", fail), db=self.foreign_database())
        found = self.look("/why")
        self.assertEqual((found["state"], found["blocked"]), ("failed", []))
        self.assertEqual(found["error"]["message"], "Task(s) failed: a")
        dead, far = f"'{ss._host()}|{os.getpid()}|1|x'", "'elsewhere|1|1|x'"
        now = ss.now_ms()
        for status, owner, heartbeat, state in (
            ("finished", "null", "null", "succeeded"), ("continued", "null", "null", "succeeded"),
            ("cancelled", "null", "null", "cancelled"), ("running", dead, now, "orphaned"),
            ("running", far, now, "running"), ("running", far, now - 60_000, "stale"),
            ("waiting-approval", far, now, "waiting-approval"),
            ("queued", "null", "null", "queued"),
        ):  # fmt: skip
            change(
                self.served.path,
                f"""update _smithers_runs set status = '{status}', runtime_owner_id = {owner},
                    heartbeat_at_ms = {heartbeat}""",
            )
            self.assertEqual(self.look("/why")["state"], state, status)


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
        f"""{NUMBERS.format(count)}
        insert into _smithers_events (run_id, seq, timestamp_ms, type, payload_json)
        select '{served.run_id}', {served.newest()} + n, {ss.now_ms()}, 'NodeOutput',
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
            r"Cache-Control: no-cache\r\nX-Content-Type-Options: nosniff\r\n"
            r"X-Accel-Buffering: no\r\nDate: [^\r]+ GMT\r\n"
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
                        slow.until(10)  # its socket takes more now, which is not to be had
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


def ways(request: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Yield every way in which a request is sent, and its pieces."""
    yield "whole", [request]
    if len(request) < 1000:
        yield "byte by byte", [request[i : i + 1] for i in range(len(request))]
    marks = [match.end() for match in re.finditer(rb"\r\n|[ :]|\r", request)][:400]
    cuts = [0, *marks, len(request)]
    yield "split", [request[a:b] for a, b in zip(cuts, cuts[1:]) if a < b]
    middle = len(request) - len(request) // 3
    yield "in two", [request[:middle], request[middle:]]


class RequestsCase(ServerCase):
    """Raw bytes, and the answers to them."""

    def send(self, *pieces: bytes) -> bytes:
        return send(self.served.port, *pieces)

    def check(self, name: str, request: bytes, pieces: Seq[bytes], expected: list[int]) -> None:
        with self.subTest(sent=name, request=request[:150], size=len(request)):
            replies = split(self.send(*pieces))
            self.assertEqual([reply.status for reply in replies], expected)
            for status, headers, body in replies:
                self.assertEqual(headers["content-type"], "application/json")
                if status >= 400:
                    self.assertEqual(list(body), ["error"])
                if status in (400, 413, 414, 431, 501, 505):
                    self.assertEqual(headers["connection"], "close")

    def check_requests(self) -> None:
        before = rows(self.path)
        for request, expected in REQUESTS:
            for name, pieces in ways(request):
                self.check(name, request, pieces, expected)
        self.assertEqual(rows(self.path), before)


class StrictRequestTest(RequestsCase):
    def test_requests_are_answered_however_they_are_cut(self) -> None:
        self.check_requests()

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
            post(smuggled, length, path=b"/nowhere"), post(smuggled, length, path=b"/health"),
            post(smuggled, length, b"Origin: http://evil"),
            post(smuggled, length, b"Sec-Fetch-Site: cross-site", path=b"/cancel"),
            post(pieces, b"Transfer-Encoding: chunked", path=b"/no"),
            post(smuggled, b"Content-Length: 1048577"), post(smuggled, b"Transfer-Encoding: gzip"),
        ):  # fmt: skip
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
            get(b"X: <script>\x00"), get(path=b"/<script>%"), get(host=b"Host: <script>"),
            get(path=b"/<script>"), b"GET /<script> HTTP/9.9\r\n\r\n",
        ):  # fmt: skip
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
        options = {"shell": 'ulimit -n 100; exec "$@"'}
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
            first_bytes = second.recv(1000, socket.MSG_WAITALL)  # it does not take the rest either
            eventually(lambda: len(self.served.server.network._connections) == 1)
            self.assertEqual(len(split(first_bytes + receive(second))[0].body), 4)
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

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Have the network thread look at nothing in the meantime."""
        held = threading.Event()

        def hold(_: Any) -> None:
            held.set()
            wait_for_go()

        self.served.server.network.post(hold)
        self.assertTrue(held.wait(PATIENCE))
        try:
            yield
        finally:
            GO.set()

    def count_health(self, text: str) -> int:
        """Return how many answers to /health a text of metrics knows of."""
        found = re.search(r'^smithers_http_requests\{.*route="/health".*\} (\d+)$', text, re.M)
        return int(found[1]) if found else 0

    def test_a_fresh_request_waits_for_one_answer_of_each_client(self) -> None:
        """However many requests the others have sent at once."""
        self.served = self.at_gate()
        others = [self.connect() for _ in range(20)]
        fresh = self.connect()
        self.assert_asks(fresh, *others)
        with self.still():
            for other in others:
                other.sendall(get() * 200)
            fresh.sendall(get(b"Connection: close", path=b"/metrics"))
        (reply,) = split(receive(fresh))
        self.assertLessEqual(self.count_health(reply.body), 2 * len(others) + 1)

    def test_pipelined_requests_are_answered_in_turns(self) -> None:
        """A client that sends more the more it is given has no more turns than the others."""
        self.served = self.at_gate()
        greedy, modest = self.connect(), self.connect()
        self.assert_asks(greedy, modest)
        with self.still():
            greedy.sendall(get() * 2000)
            modest.sendall(get() * 50 + get(path=b"/metrics"))
        body = b""
        while b"# HELP smithers_http_requests " not in body:
            body += modest.recv(65536)
        self.assertLessEqual(self.count_health(body.decode()), 2 * 50 + 4)

    @unittest.skipUnless(sys.platform == "linux", "elsewhere the socket takes what it can hold")
    def test_few_answers_are_made_for_a_client_that_does_not_read(self) -> None:
        self.served = self.at_gate()
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((LOOPBACK, self.served.port))
            deaf.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    deaf.send(get() * 400)
            network = self.served.server.network
            eventually(lambda: [c.events for c in network._connections] == [selectors.EVENT_WRITE])
            text = self.served.app.request("GET", "/metrics", headers={"Host": "localhost"}).body
            size = len(send(self.served.port, get(b"Connection: close")))
            self.assertLess(size * self.count_health(text.decode()), 200_000)

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
            {"Authorization": "Bearer sk-secret"}, {"authorization": "bearer sk-secret"},
            {"AUTHORIZATION": "BEARER  sk-secret "}, {"x-smithers-key": "sk-secret"},
            {"X-Smithers-Key": "sk-secret"},
            {"Authorization": "Basic xyz", "X-Smithers-Key": "sk-secret"},
        ):  # fmt: skip
            self.assert_ask(200, "GET", "/", None, headers)

    def test_missing_and_wrong_tokens_are_unauthorized(self) -> None:
        wrong = ["wrong", "sk-secret2", "sk-secre", "SK-SECRET", "", "sk-secret sk-secret"]
        before = rows(self.path)
        for headers in (
            {}, *map(bearer, wrong), {"Authorization": "Basic sk-secret"},
            {"Authorization": "sk-secret"}, {"Authorization": "Bearer"},
            {"Authorization": "Bearer\tsk-secret"}, {"x-smithers-key": ""},
            {"x-smithers-key": "s\xe9cret"}, {"x-smithers-key": "Bearer sk-secret"},
            {"Cookie": "x-smithers-key=sk-secret"},
        ):  # fmt: skip
            for method, path in (("GET", "/"), ("POST", "/approve/deploy"), ("POST", "/cancel")):
                with self.subTest(headers=headers, path=path):
                    reply = self.served.ask(method, path, None, headers)
                    self.assert_error(reply, 401, "UNAUTHORIZED")
                    self.assertEqual(reply.headers["www-authenticate"], "Bearer")
        self.assertEqual(rows(self.path), before)

    def test_401_comes_before_404_and_bodies(self) -> None:
        for question in (
            "GET /", "GET /events", "GET /frames", "GET /metrics", "GET /frames?limit=x",
            "GET /nowhere", "DELETE /", "POST /health", "POST /approve/nobody",
            "GET /?token=sk-secret&authToken=sk-secret",
        ):  # fmt: skip
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


class NamedTokenTest(ServerCase):
    """Who decided: a file of tokens, `name role token` a line."""

    FILE = "# who\nvera viewer v\nalice approver a\nbob approver b\n\nolga operator o\n"

    def setUp(self) -> None:
        super().setUp()
        self.tokens = self.in_folder("tokens")
        self.keep(self.FILE)
        self.served = self.at_gate(tokens=self.tokens)

    def keep(self, text: str, mode: int = 0o600) -> None:
        """Replace the file, as an editor does."""
        os.chmod(self.write("tokens.new", text), mode)
        os.replace(self.in_folder("tokens.new"), self.tokens)

    def status_of(self, token: str, method: str, path: str, body: Any = None) -> int:
        return self.served.ask(method, path, body, bearer(token)).status

    def test_each_role_may_do_its_part(self) -> None:
        for path, allowed in (
            ("GET /why", "v a b o"), ("GET /metrics", "v a b o"), ("POST /deny/nobody", "a b o"),
            ("POST /cancel", "o"),
        ):  # fmt: skip
            for token in "x v a b o".split():
                expected = (200, 404) if token in allowed else (401,) if token == "x" else (403,)
                self.assertIn(self.status_of(token, *path.split()), expected, (path, token))

    def test_a_decision_bears_the_tokens_name(self) -> None:
        before = rows(self.path)
        reply = self.served.ask("POST", "/approve/deploy", {"decidedBy": "bob"}, bearer("a"))
        self.assert_error(reply, 403, "FORBIDDEN", "bob")
        self.assertEqual(rows(self.path), before)
        self.assertEqual(self.status_of("a", "POST", "/approve/deploy", {"note": "ok"}), 200)
        told = self.told("ApprovalGranted", run_id=self.served.run_id)
        self.assertEqual(told, ["ApprovalGranted deploy 0 ok alice token"])
        self.assertEqual(self.gate(self.served.run_id).decided_by, "alice")
        self.assertEqual(self.status_of("o", "POST", "/cancel", {"decidedBy": "vera"}), 403)
        self.assertEqual(self.status_of("o", "POST", "/cancel", {"decidedBy": "olga"}), 200)
        self.assertEqual(
            self.told("RunCancelled", run_id=self.served.run_id), ["RunCancelled olga token"]
        )

    def test_only_approvers_decide_their_gate(self) -> None:
        for approvers, allowed in (
            (["alice"], "a"), (["alice", "bob"], "a b"), (["operator"], "o"),
            (["approver", "vera"], "a b"),
        ):  # fmt: skip
            gates = [Approval(f"g-{token}", approvers=approvers) for token in "vabo"]
            self.served = self.at_gate([Parallel(*gates)], tokens=self.tokens)
            found = [t for t in "vabo" if self.status_of(t, "POST", f"/approve/g-{t}") == 200]
            self.assertEqual(" ".join(found), allowed, approvers)

    def test_a_name_that_is_claimed_opens_no_gate(self) -> None:
        for options in ({}, {"token": "tok"}):
            self.served = self.at_gate([Approval("g", approvers=["alice"])], **options)
            reply = self.served.ask("POST", "/approve/g", {"decidedBy": "alice"}, bearer())
            self.assert_error(reply, 403, "FORBIDDEN", "alice")

    def test_a_changed_file_counts_at_once(self) -> None:
        self.keep(
            self.FILE.replace("approver a", "approver A").replace("vera viewer", "vera approver")
        )
        found = [self.status_of(token, "POST", "/deny/nobody") for token in "a A v".split()]
        self.assertEqual(found, [401, 404, 404])
        self.keep("nonsense")
        self.assertEqual(self.status_of("o", "GET", "/"), 401)
        self.keep(self.FILE)
        self.assertEqual(self.status_of("o", "GET", "/"), 200)
        os.remove(self.tokens)
        self.assertEqual(self.status_of("o", "GET", "/"), 401)

    def test_who_follows_events_is_asked_again(self) -> None:
        """An open stream ends when the file changes: who may still read comes again."""
        with EventReader(self.served.port, headers=bearer("v")) as reader:
            reader.until("NodeWaitingApproval")
            self.keep(self.FILE.replace("viewer v", "viewer V"))
            eventually(lambda: not self.served.server.network.has_streams)
        for token, status in (("v", 401), ("V", 200)):
            with EventReader(self.served.port, headers=bearer(token)) as reader:
                self.assertEqual(reader.status, status)

    def test_a_file_may_be_made_on_windows(self) -> None:
        """The mark that an editor puts before its first line is no part of a name."""
        self.keep("\ufeffalice approver a\r\nolga operator o\r\n")
        self.assertEqual(
            self.status_of("a", "POST", "/approve/deploy", {"decidedBy": "alice"}), 200
        )
        self.assertEqual(self.status_of("o", "GET", "/"), 200)

    def test_a_file_others_can_read_lets_nobody_in(self) -> None:
        for mode, status in ((0o644, 401), (0o600, 200), (0o640, 401), (0o400, 200)):
            os.chmod(self.tokens, mode)
            self.assertEqual(self.status_of("o", "GET", "/"), status, oct(mode))

    def test_files_that_are_none_are_refused(self) -> None:
        for text, mode in (
            (self.FILE, 0o644), (self.FILE, 0o604), ("alice approver", 0o600),
            ("alice boss a", 0o600), ("alice approver ä", 0o600), ("a b c d", 0o600),
            ("alice viewer a\nolga operator a", 0o600),
        ):  # fmt: skip
            self.keep(text, mode)
            with self.assertRaises(ValueError):
                ss.create_serve_app(adapter=self.db, run_id=RUN, tokens=self.tokens)


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


class TlsTest(RequestsCase):
    def setUp(self) -> None:
        super().setUp()
        context = ss.make_ssl_context(make_certificate(self.folder), None)
        self.served = self.at_gate(ssl_context=context)
        self.secure = {"context": trust_all()}

    def ask(self, method: str, path: str) -> Reply:
        return ask(self.served.port, method, path, **self.secure)

    def test_its_address_says_so(self) -> None:
        self.assertTrue(self.served.server.url.startswith("https://127.0.0.1:"))

    def send(self, *pieces: bytes) -> bytes:
        """Send every piece as a record of its own, and a farewell; return all that comes back."""
        received, coming, going = b"", ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self.secure["context"].wrap_bio(coming, going)
        with connect(self.served.port) as sock:

            def finish(act: Callable[[], Any]) -> Any:
                while True:
                    try:
                        return act()
                    except ssl.SSLWantReadError:
                        sock.sendall(going.read())
                        coming.write(sock.recv(65536)) or coming.write_eof()

            finish(tls.do_handshake)
            for piece in pieces:
                tls.write(piece)
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.unwrap()
            # With a farewell, or without one: the length of an answer tells its end.
            with contextlib.suppress(ssl.SSLZeroReturnError, ssl.SSLEOFError, ConnectionError):
                while data := finish(lambda: tls.read(65536)):
                    received += data
        return received

    def test_requests_are_answered_over_tls_however_they_are_cut(self) -> None:
        self.check_requests()

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
            "content-type: text/html; charset=utf-8", "cache-control: no-store",
            "referrer-policy: no-referrer", "x-content-type-options: nosniff",
            "x-frame-options: DENY",
        ):  # fmt: skip
            name, value = line.split(": ")
            self.assertEqual(headers[name], value)

    def test_it_is_small_and_asks_nobody_else(self) -> None:
        for page in (ss.PAGE, ss.SERVER_PAGE):
            self.assertLess(len(page.encode()), 48 << 10)
        self.assertNotIn("://", ss.PAGE)
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
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.path = self._start_session()
            undo.pop_all()

    def _start_session(self) -> str:
        wait_for_answer(self.port, "/status")
        options = {"args": [*self.FLAGS, f"--user-data-dir={self.folder}"]}
        logs = {"performance": "ALL", "browser": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        made = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        return f"/session/{made['sessionId']}"

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
            return found ? found.querySelector("input, textarea")
                : document.querySelector(`input[aria-label="${arguments[0]}"]`)"""
        element = self.wait(script, label)[self.ELEMENT]
        self.ask("POST", f"/element/{element}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Return what has been logged since the last time."""
        return list(self.ask("POST", "/se/log", {"type": kind}))


GATE_AT = "#/node/deploy/0"
TAB, ENTER, ESCAPE = "\ue004", "\ue007", "\ue00c"
FOCUSED = "return document.activeElement.innerText"
NOTE = "return document.querySelector('textarea').value"
MARKUP = "<img src=x onerror=document.title='hit'><b>bold</b>"


def speak(text: str) -> dict[str, str]:
    current_task().log(text)
    return {text: text}


def fail_with(text: str) -> None:
    raise ValueError(text)


FLAKY_FLOW = """
import os
from smithers_serve import Task, Workflow

def twice():
    if not os.path.exists(os.path.join(os.path.dirname(__file__), "ok")):
        raise ValueError("not yet")
    return True

workflow = Workflow("flaky", Task("twice", twice))
"""


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

    def open(self, served: Any = None, at: str = "#/") -> Any:
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

    def serve_all(self, db: ss.SmithersDb | None = None, **options: Any) -> Any:
        """Serve all runs of this test's database."""
        app = ss.create_server_app(adapter=db or self.adapter(), **options)
        self.addCleanup(app.close)
        server = ss.make_server(app, LOOPBACK, 0)
        server.start()
        self.addCleanup(server.stop)
        return types.SimpleNamespace(app=app, port=server.server_port, stop=server.stop)

    def restart(self, served: Any) -> None:
        again = ss.make_server(served.app, LOOPBACK, served.port)
        again.start()
        self.addCleanup(again.stop)

    def add_runs(self, count: int, status: str = "queued") -> None:
        """Add older runs, `old-1` the newest of them."""
        change(
            self.path,
            f"""{NUMBERS.format(count)} insert into _smithers_runs
            (run_id, workflow_name, status, created_at_ms)
            select 'old-' || n, 'nightly', '{status}', {ss.now_ms()} - 60000 * n from numbers""",
        )

    def see_rows(self, text: str) -> None:
        """See just these rows of a list, by the ids in them."""
        names = "return Array.from(document.querySelectorAll('.name .mono')).map((one) =>"
        self.browser.wait(f"{names} one.innerText).join(' ') === arguments[0]", text)

    def count_elements(self) -> int:
        return int(self.browser.run("return document.querySelectorAll('*').length"))

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
        self.browser.click("Run")
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
        self.add_runs(1)
        run_id = MARKUP.replace("'", "''")
        change(self.path, f"update _smithers_runs set run_id = '{run_id}' where run_id = 'old-1'")
        self.open(self.serve_all())
        self.browser.see(f"{MARKUP} {served.run_id}\n{MARKUP}\n", f"nightly {MARKUP}")
        self.go("#/runs/" + urllib.parse.quote(MARKUP, safe=""))
        self.browser.see("waits for its turn", MARKUP)
        self.assertIsNone(self.browser.run("return document.querySelector('main img, main b')"))

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
        self.assertEqual(self.browser.run(NOTE), "please")
        self.assertEqual(self.gate(served.run_id).status, "requested")

    def test_decisions_are_off_until_the_server_is_back(self) -> None:
        served = self.open(self.live(), "#/node/deploy/0")
        self.browser.type("Note", "kept")
        self.browser.find("Approve deploy")
        served.stop()
        self.browser.see("The server does not answer", "Decisions are off", "Offline")
        self.assertTrue(self.browser.run("return document.querySelector('.yes').disabled"))
        self.restart(served)
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
        self.assertEqual(self.browser.run(NOTE), "half said")

    def tab_to(self, text: str) -> None:
        for _ in range(30):
            self.browser.press(TAB)
            if text in self.browser.run(FOCUSED):
                return
        self.fail(f"{text} is not reached")

    def test_a_page_that_loads_asks_for_nothing_in_vain(self) -> None:
        for served in (self.served, self.serve_all()):
            self.open(served)
            self.browser.see("Deploy?")
            self.assertEqual(self.browser.log("browser"), [])

    def test_the_keyboard_opens_a_run_of_the_list(self) -> None:
        self.open(self.serve_all())
        self.see_rows(RUN)
        self.tab_to("Deploy?")
        self.browser.press(ENTER)
        self.browser.find("Review: Deploy?")
        self.assertEqual(self.browser.run("return document.activeElement.tagName"), "H1")

    def test_the_timeline_shows_steps_and_gates_in_order_of_their_begin(self) -> None:
        served = self.open(self.live(), "#/timeline")
        self.see_rows("build deploy")
        self.browser.see("From ", " to now")
        served.ask("POST", "/approve/deploy")
        self.see_rows("build deploy announce")

    def test_the_keyboard_is_enough(self) -> None:
        served = self.open(self.live(), "#/node/deploy/0")
        self.browser.find("Deny deploy")
        self.tab_to("Deny deploy")
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
        self.browser.see("A token is needed")
        self.browser.type("Token", "wrong" + ENTER)
        self.browser.see("That token was refused")
        self.browser.type("Token", "tok" + ENTER)
        self.browser.see("Deploy?", "What led here")
        self.assertNotIn("tok", self.browser.run("return location.href + document.cookie"))
        self.open(served, "?again#/")
        self.browser.see("1 decision is waiting")
        self.open(self.serve_all(auth_token="tok"))
        self.browser.see("A token is needed")
        self.browser.type("Token", "tok" + ENTER)
        self.see_rows(f"{served.run_id} {RUN}")

    def test_without_an_engine_it_says_when_a_decision_counts(self) -> None:
        self.open(at="#/node/deploy/0")
        self.browser.see("No engine drives this run", f"smithers_serve status {RUN}")
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
            f"""{NUMBERS.format(10_000)} insert into _smithers_nodes
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
            self.assertLess(self.count_elements(), 1000)
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
        self.assertLess(self.count_elements(), 2000)

    def test_gates_of_several_answers_are_all_told(self) -> None:
        served = self.fresh()
        served.run_to_gate([Parallel(*(Approval(f"g{n}") for n in range(1001)))])
        self.open(served)
        self.browser.see("1001 decisions are waiting")

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

    def test_of_all_runs_those_come_first_that_need_somebody(self) -> None:
        self.add_runs(2)
        with self.assertLogs("smithers_serve"):
            self.drive([Task("fails", fail_with, args=["disk full"])], "broken")
        self.drive([Task("fine", answer)], "fine")
        self.open(self.serve_all())
        self.browser.see("1 decision is waiting", "5 runs", "Deploy?", "Task(s) failed: fails")
        self.assertEqual(self.browser.run("return document.title"), "(1) Smithers")
        self.see_rows(f"{RUN} broken old-1 old-2 fine")
        self.browser.click("Queued\n2")
        self.see_rows("old-1 old-2")
        self.browser.click("All\n5")
        self.browser.type("Find a run", "DEPLOY")
        self.see_rows(RUN)
        self.go(f"#/runs/{RUN}")
        self.browser.see("1 of 3 steps done")
        self.browser.ask("POST", "/back")
        self.see_rows(RUN)  # what was looked for is still what is shown
        self.browser.type("Find a run", "!!")
        self.browser.see("No run matches.")

    def test_all_runs_stay_current_without_a_stream(self) -> None:
        served = self.open(self.serve_all())
        self.browser.see("1 run\n")
        self.at_gate()
        self.browser.see("2 decisions are waiting", "2 runs", "fresh-1")
        text = served.app.request("GET", "/metrics", headers={"Host": "localhost"}).body.decode()
        self.assertIn("smithers_event_streams_active 0\n", text)
        served.stop()
        self.browser.see("The server does not answer", "Offline", "fresh-1")
        self.restart(served)
        self.browser.see("Live")

    def test_a_server_without_runs_says_how_one_begins(self) -> None:
        self.open(self.serve_all(self.foreign_database()))
        self.browser.see("No runs yet", "POST v1/runs")

    def test_a_thousand_runs_stay_small(self) -> None:
        self.add_runs(1000)
        self.open(self.serve_all())
        self.browser.see("The newest 1000 runs", "old-1", "Queued\n999")
        self.assertLess(self.count_elements(), 500)
        end = "scrollTo(0, 1e9); return document.body.innerText.includes('old-999\\n')"
        self.browser.wait(end)
        self.assertLess(self.count_elements(), 500)

    def test_a_link_to_a_gate_leads_there_and_back(self) -> None:
        served = self.serve_all()
        self.open(served)
        self.see_rows(RUN)
        url = ss.page_url(f"http://127.0.0.1:{served.port}/v1/runs/{RUN}", "node", "deploy", "0")
        self.browser.ask("POST", "/url", {"url": url})
        self.browser.see("Deploy?", "What led here", "app-1.0")
        self.browser.click("All runs")
        self.see_rows(RUN)
        self.browser.ask("POST", "/back")
        self.browser.see("No engine drives this run")
        self.browser.click("Approve deploy", "Yes, approve deploy")
        self.browser.see("It counts when somebody resumes the run")
        self.assertEqual(self.gate(RUN).status, "approved")

    def test_a_run_that_waits_for_its_turn_has_not_lost_its_engine(self) -> None:
        self.add_runs(1)
        self.open(self.serve_all(), "#/runs/old-1")
        self.browser.see("The run waits for its turn", "Queued")
        self.assertNotIn("No engine", self.browser.run("return document.body.innerText"))

    def test_a_failed_run_is_retried_after_asking_twice(self) -> None:
        self.write("flow.py", FLAKY_FLOW)
        served = self.serve_all(root=self.folder)
        order = {"workflowPath": "flow.py", "runId": "flaky"}
        self.assertEqual(ask(served.port, "POST", "/v1/runs", order).status, 200)
        self.open(served, "#/runs/flaky")
        self.browser.see("The run has failed", "not yet")
        self.write("ok", "")
        self.browser.click("Retry run…", "Leave it")
        self.go("#/runs/flaky/node/twice/0")
        self.browser.click("Retry this step…", "Yes, retry twice")
        self.browser.see("Attempt 2")
        self.go("#/runs/flaky")
        self.browser.see("The run has finished", "Ended")

    def test_a_retry_that_is_refused_is_told_in_words(self) -> None:
        with self.assertLogs("smithers_serve"):
            self.drive([Task("fails", fail_with, args=["disk full"])], "broken")
        served = self.open(self.serve("broken"))
        self.browser.click("Retry run…", "Yes, retry the run")
        self.browser.see("Nothing was changed: no engine here")
        self.browser.click("Retry run…")
        served.stop()
        self.browser.click("Yes, retry the run")
        self.browser.see("The retry may have arrived or not")
        self.open(self.serve_all(), "#/runs/broken")
        self.browser.click("Retry run…", "Yes, retry the run")
        self.browser.see("You may not do this: this server starts no workflows")

    def test_what_is_gone_is_told_in_words(self) -> None:
        self.add_runs(1, "failed")
        self.open(self.serve_all(root=self.folder), "#/runs/old-1")
        self.browser.click("Retry run…")
        change(self.path, "delete from _smithers_runs where run_id = 'old-1'")
        self.browser.click("Yes, retry the run")
        self.browser.see("This is no longer there: there is no run old-1")
        self.go("#/runs/never")
        self.browser.see("There is no such run here")

    def test_what_is_too_large_is_told_in_words(self) -> None:
        self.open(self.live(), "#/node/deploy/0")
        self.browser.find("Approve deploy")
        self.browser.run("""const area = document.querySelector("textarea");
            area.value = "x".repeat(1 << 20); area.dispatchEvent(new Event("input"))""")
        self.browser.click("Approve deploy", "Yes, approve deploy")
        self.browser.see("The text is too long", "Your note is kept")
        self.go("#/node/" + "x" * 8500 + "/0")
        self.browser.see("The address is too long")
        crumbs = "for (let n = 0; n < 10; n++) document.cookie = `n${n}=${arguments[0]}`"
        self.browser.run(crumbs, "x" * 4000 + ";max-age=60")
        self.addCleanup(self.browser.run, crumbs, ";max-age=0")
        self.go("#/node/deploy/0")
        self.browser.see("The browser sends too much with it")

    def test_back_returns_to_where_one_was(self) -> None:
        self.open()
        self.browser.click("Review: Deploy?")
        self.browser.see("Your decision")
        self.browser.ask("POST", "/back")
        self.browser.see("1 decision is waiting")

    def test_a_phone_shows_all_of_it_and_fingers_hit(self) -> None:
        self.browser.show(360, 740)
        served, everything = self.live(), self.serve_all()
        self.add_runs(3)
        places = [(served, at) for at in f"{GATE_AT} #/ #/node/build/0 #/log #/timeline".split()]
        for place, at in (*places, (everything, "#/"), (everything, f"#/runs/{RUN}")):
            self.open(place, f"?{len(at)}{at}")
            self.browser.wait("return document.querySelector('h2, .log, .list')")
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
            self.drive([Task("fails", fail_with, args=["disk full"])], "broken")
            served = self.live(
                Task("fails", fail_with, args=["no luck"], continue_on_fail=True),
                Approval("deploy", metadata={"to": "all"}, needs=["fails"]),
            )
        places = [
            (served, GATE_AT, ""), (served, GATE_AT, "Approve deploy"),
            (served, "#/node/fails/0", ""), (served, "#/log", ""), (served, "#/timeline", ""),
            (served, "#/", ""), (served, "#/", "Cancel run…"), (self.served, GATE_AT, ""),
            (self.at_gate(token="tok"), "#/", ""), (self.serve("broken"), "#/", "Retry run…"),
            (self.serve("broken"), "#/node/fails/0", ""), (self.serve_all(), "#/", ""),
            (self.serve_all(), f"#/runs/{RUN}", ""),
            (self.serve_all(self.foreign_database()), "#/", ""),
        ]  # fmt: skip
        for is_dark in (False, True):
            for width in (1280, 360):
                self.browser.show(width, 800, is_dark)
                for n, (place, at, pressed) in enumerate(places):
                    self.open(place, f"?{width}{is_dark}{n}{at}")
                    self.browser.wait(
                        "return !/Loading/.test(document.querySelector('main h1').innerText)"
                    )
                    if pressed:
                        self.browser.click(pressed)
                    self.browser.run(axe)
                    ran = "const end = arguments[0]; axe.run().then((all) => end(all.violations))"
                    found = self.browser.ask("POST", "/execute/async", {"script": ran, "args": []})
                    shown = [
                        (one["id"], [n["html"] for n in one["nodes"]][:3])
                        for one in found
                        if one["impact"] in ("serious", "critical")
                    ]
                    self.assertEqual(shown, [], (at, pressed, width, is_dark))


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
            "runs_total": 1, "runs_finished_total": 1, "runs_failed_total": 0,
            "runs_cancelled_total": 0, "nodes_started": 2, "nodes_failed": 0,
            "node_retries_total": 1, "errors_total": 1,
            "events_emitted_total": len(served.events()), "approvals_requested": 1,
            "approvals_granted": 1, "approvals_denied": 0, "run_duration_ms_count": 1,
            "attempt_duration_ms_count": 2, "approval_wait_duration_ms_count": 1,
        }  # fmt: skip
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
            ("GET", "/?x=secret-path"), ("POST", "/approve/secret-node"), ("GET", "/secret-path"),
            ("GET", "/approve/secret-node"), ("SECRET", "/"), ("HEAD", "/health"),
        ):  # fmt: skip
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
            ("GET", "/health", None), ("GET", "/", None), ("HEAD", "/", None),
            ("GET", "/frames?limit=1", None), ("GET", "/frames?limit=x", None),
            ("POST", "/approve/nobody", {"note": "x"}), ("POST", "/approve/deploy", b"["),
            ("POST", "/approve/%2564eploy", None), ("DELETE", "/frames", None),
            ("GET", "/nowhere", None), ("POST", "/approve/deploy", {"note": "yes"}),
            ("POST", "/approve/deploy", None), ("GET", "/", None), ("POST", "/deny/deploy", None),
        ):  # fmt: skip
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
from smithers_serve import Approval, Ctx, Parallel, Task, Workflow, current_task

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
is_other = dict

def spawned():
    import concurrent.futures, multiprocessing
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context)

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

def talk():
    for number in range(2000):
        print("x" * 1000)

lengthy = Workflow("lengthy", Approval("deploy"), Task("talk", talk))
broad = Workflow("broad", Parallel(Task("a", {}), max_concurrency=8))
ignoring = Workflow("ignoring", Task("deaf", deaf))
number = 7
"""


MODULE = ("-m", "smithers_serve")
# The same, with less patience for tasks that are deaf.
HASTY = (
    "-c",
    "import sys, smithers_serve as ss; ss.HURRY_SECONDS = ss.SUSPEND_SECONDS = 0.3; "
    "sys.exit(ss.main())",
)


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
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        kept, modules, handlers = os.getcwd(), set(sys.modules), logging.root.handlers[:]
        signals = [signal.getsignal(number) for number in numbers]
        try:
            os.chdir(self.folder)
            with mock.patch.dict(os.environ), mock.patch("sys.path", sys.path[:]):
                os.environ.pop("SMITHERS_API_KEY", None)
                os.environ.update(env)
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    with mock.patch("sys.stdin", io.StringIO(said)), warnings.catch_warnings():
                        # What another test has left to be collected is not this command's.
                        warnings.simplefilter("ignore", ResourceWarning)
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

    def test_what_a_task_logs_is_its_output(self) -> None:
        """By handlers that the file has made when it was loaded, and as it has set them."""
        self.write(
            "logs.py",
            """
import logging, sys
from smithers_serve import Task, Workflow
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
logging.info("loading")
own = logging.getLogger("own")
own.addHandler(logging.StreamHandler(sys.stderr))
own.propagate = False

def work():
    logging.info("at work")
    own.warning("careful")

workflow = Workflow("logs", Task("work", work))
""",
        )
        code, _, err = run_child(*MODULE, "up", "logs.py", "-r", "r", folder=self.folder)
        self.assertEqual(code, 0, err)
        self.assertIn("\nINFO loading\n", "\n" + err)
        self.finished()
        lines = [e.payload for e in self.db.list_events("r") if e.type == "NodeOutput"]
        found = [(line["nodeId"], line["stream"], line["text"]) for line in lines]
        self.assertEqual(found, [("work", "stderr", "INFO at work"), ("work", "stderr", "careful")])

    def test_the_workflow_imports_the_running_module(self) -> None:
        argv = ("up", "flow.py:same", "-r", "r")
        code, _, err = run_child(*MODULE, *argv, folder=self.folder)
        self.assertEqual(code, 0, err)
        self.finished()
        self.assertIs(self.output("check"), True)

    def test_workers_import_what_the_engine_does(self) -> None:
        elsewhere = self.in_folder("elsewhere")
        os.mkdir(elsewhere)
        script = (os.path.join(HERE, "smithers_serve.py"),)
        flags = ("up", "../flow.py:same", "--db", self.path, "--executor", "flow:spawned")
        for run_id, start, path in (("module", MODULE, HERE), ("script", script, "")):
            argv = (*start, *flags, "-r", run_id)
            code, _, err = run_child(*argv, folder=elsewhere, PYTHONPATH=path)
            self.assertEqual(code, 0, err)
            self.assertNotIn("Warning", err)
        self.finished()
        self.assertIs(self.output("check", run_id="module"), True)

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

    def test_server_flags_are_honoured(self) -> None:
        self.write("token", "  from-file\n")
        evil, box = {"Host": "evil.example"}, {"Host": "box.example"}
        for flags, env, answers in (
            ("--no-metrics --allowed-host box.example", {},
             ((box, "/", 200), (evil, "/", 403), (box, "/metrics", 404))),
            ("--auth-token-file token --metrics false", {"SMITHERS_API_KEY": "env"},
             ((bearer("from-file"), "/", 200), (bearer("env"), "/", 401),
              (bearer("from-file"), "/metrics", 404))),
            ("--host 0.0.0.0 --metrics true", {}, (({}, "/metrics", 200),)),
        ):  # fmt: skip
            with self.subTest(flags=flags), self.up("workflow", *flags.split(), **env) as child:
                for headers, path, status in answers:
                    reply = ask(child.port, "GET", path, None, headers)
                    self.assertEqual(reply.status, status, (headers, path))
                if "0.0.0.0" in flags:
                    child.wait_for("WARNING.*--auth-token")
                child.finish(signal.SIGINT)
            os.remove(self.path)

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
            ("other", 0, "finished"), ("failing", 1, "failed"), ("workflow", 3, "waiting-approval"),
        ):  # fmt: skip
            code, out, err = self.main("up", f"flow.py:{name}")
            self.assertEqual((code, json.loads(out)["status"]), (expected, status), err)
            if name == "failing":
                self.assertEqual(json.loads(out)["error"]["message"], "Task(s) failed: fail")
                self.assertIn("[smithers] fail failed: it broke\n", err)

    def test_with_a_server_the_runs_own(self) -> None:
        failed = r"Workflow failed\. Server still running"
        rows = (("other", "Workflow finished", 0), ("failing", failed, 1))
        for name, line, expected in (*rows, ("workflow", "waits for approval", 3)):
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

    # The files that are there, and of every kind of mistake what is said and the command line.
    FILES = {
        "broken.py": "x = 1\ndef f(:\n", "raises.py": "x = 1\n\n1 / 0\n",
        "exits.py": "import sys\nsys.exit(0)\n", "notes.txt": "hello",
        "text.db": "this is not a database, but a letter to a friend\n" * 100,
        "open": "alice approver a\n", "boss": "alice boss a\n",
    }  # fmt: skip
    # fmt: off
    MISTAKES = {
        "an executor that cannot be made": (
            ("nowhere.*No module named", "flow.py:other --executor nowhere:make"),
            ("flow:none.*MODULE:FACTORY", "flow.py:other --executor flow:none"),
            ("flow:fail: RuntimeError: it broke", "flow.py:other --executor flow:fail"),
            ("flow:is_other: dict is not an executor", "flow.py:other --executor flow:is_other")),
        "a file that cannot be loaded": (
            ("missing.py", "missing.py"), ("missing.py", "missing.py:workflow"),
            ("broken.py, line 2.*SyntaxError", "broken.py"),
            ("raises.py, line 3.*ZeroDivisionError", "raises.py"), ("exits.py", "exits.py"),
            ("notes.txt", "notes.txt"), ("nothing", "flow.py:nothing"),
            ("number", "flow.py:number")),
        "an input that is not JSON": (
            ("--input", "flow.py -i {"), ("--input", "flow.py -i NaN"),
            *(("--input", f"flow.py -i '{text}'") for text in ("[1]", '"text"', "1", "null")),
            ("1e400", "flow.py -i '{\"x\": 1e400}'"),
            ("--input", 'flow.py -i \'{"a": 1, "a": 2}\''),
            ("missing.json", "flow.py -i @missing.json"), ("--input", "flow.py -d -i {")),
        "a database that cannot be used": (
            ("text.db.*not a database", "flow.py --db text.db"),
            ("folder", "flow.py --db no/folder.db"), ("database", "flow.py --db .")),
        "a secret that cannot be used": (
            ("token", "flow.py --serve --auth-token ''"),
            ("token", "flow.py --serve --auth-token 'a b'"),
            ("missing", "flow.py --serve --auth-token-file missing"),
            ("missing.pem", "flow.py --serve --certfile missing.pem"),
            ("--certfile", "flow.py --serve --keyfile missing.pem")),
        "a file of tokens that cannot be used": (
            ("missing", "flow.py --serve --port 0 --tokens missing"),
            ("open.*others", "flow.py --serve --port 0 --tokens open"),
            ("boss.*role", "flow.py --serve --port 0 --tokens boss")),
        "words to notify that cannot be split": (
            ("--notify", 'flow.py --notify "it\'s"'), ("--notify", "flow.py --notify ''")),
        "flags that do not exist": tuple(("--help", line) for line in (
            "", "flow.py --port 70000", "flow.py --port ²", "flow.py --metrics perhaps",
            "flow.py -c 0", "flow.py --nonsense")),
    }
    # fmt: on

    def test_every_mistake_is_told_in_a_line(self) -> None:
        for name, text in self.FILES.items():
            os.chmod(self.write(name, text), 0o644 if name == "open" else 0o600)
        for kind, mistakes in self.MISTAKES.items():
            with self.subTest(kind=kind):
                self.assert_mistakes(*mistakes)

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
        self.assertEqual(self.main("up", "flow.py", "-r", "r2")[0], 3)
        self.assert_mistakes(
            ("r1 exists", "flow.py:other -r r1"),
            ("'bugfix'.*'other'.*--force", "flow.py:other -r r2 --resume"),
            ("--run-id", "flow.py:other --resume"),
            ("a b", "flow.py:other -r 'a b'"),
            ("--force", "flow.py:other --force"),
        )

    def test_no_such_command_is_a_mistake(self) -> None:
        for line in ("down", ""):
            code, out, err = self.main(*line.split())
            self.assertEqual((code, out), (4, ""))
            self.assertRegex(err, r"\A\[smithers\] Error: .*--help\n\Z")

    def test_help_is_no_mistake(self) -> None:
        code, out, err = self.main("up", "--help")
        self.assertEqual((code, err), (0, ""))
        for flag in ("--serve", "--port", "--auth-token-file", "--allowed-host", "--resume"):
            self.assertIn(flag, out)
        self.assertEqual(self.main("--version")[1].strip(), ss.__version__)


class TreeMistakeTest(CommandCase):
    def test_a_mistake_is_told_alike_wherever_the_tree_is_built(self) -> None:
        mistakes = {
            'Task("a b", print)': "Task id 'a b'",
            'Task("t", print, retries=-1)': "Task 't': retries",
            'Task("t", print, retrys=1)': "retrys",
            'Parallel(Task("t", print), Task("t", print))': "'t' is used twice",
            'Task("t", print, needs=["ghost"])': "'ghost'",
        }
        start = "from smithers_serve import *\n"
        for mistake, says in mistakes.items():
            self.write("outside.py", f"{start}\nworkflow = Workflow('w', {mistake})\n")
            self.write(
                "inside.py", f"{start}def workflow(ctx):\n    return Workflow('w', {mistake})\n"
            )
            for name in ("outside", "inside"):
                code, _, err = self.main("up", f"{name}.py")
                self.assertEqual(code, 4, err)
                self.assertRegex(err, rf"\A\[smithers\] Error: [^\n]*{re.escape(says)}[^\n]*\n\Z")
                self.assertRegex(err, rf"{name}\.py|, line 3: ")
        self.assertFalse(os.path.exists(self.path))


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
        before = rows(self.path)
        code, out, err = self.main("up", "flow.py", "--resume", "-r", "r")
        self.assertEqual((code, json.loads(out)["status"]), (2, "cancelled"), err)
        self.assertEqual(rows(self.path), before)
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
        argv = ("up", "flow.py:ignoring", "-r", "r", "--serve", "--port", "0")
        with Child(*HASTY, *argv, folder=self.folder) as child:
            child.wait_for("deaf . deaf")
            self.assertEqual(child.finish(signal.SIGINT)[0], 2)
        self.finished()
        self.assertEqual(self.status(), "cancelled")


class DetachTest(CommandCase):
    def end(self, pid: int) -> None:
        """End a detached process and wait until it has gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        eventually(lambda: not is_process(pid))

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
        said = [line for line in log().splitlines() if "[smithers]" in line]
        for line in said:
            self.assertRegex(line, r"\A\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[ ,]")
        self.assertNotIn("sk-secret", log())

    def test_a_child_that_dies_shows_its_log(self) -> None:
        self.write("raises.py", "raise RuntimeError('no such luck')\n")
        code, out, err = self.detach("raises.py")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("no such luck", err)


class NotifyTest(CommandCase):
    """`--notify`: whatever its program does, the run goes on, and no process is left."""

    TOLD = """
import json, os, sys
with open("told", "a") as file:
    file.write(sys.stdin.read() + "\\n")
"""

    def up_told(self, program: str, *flags: str, name: str = "workflow") -> Child:
        """Start a run that starts a program of Python, in a child with shorter times."""
        source = self.write("told.py", "import os\nopen(str(os.getpid()), 'w')\n" + program)
        seconds = 0.3 if "sleep" in program else PATIENCE
        short = f"ss.Notifier.TRY_SECONDS = {seconds}; ss.HURRY_SECONDS = 0.3"
        code = f"import sys, smithers_serve as ss; {short}; sys.exit(ss.main(sys.argv[1:]))"
        notify = shlex.join([sys.executable, source])
        argv = ("up", f"flow.py:{name}", "-r", "r", "--notify", notify, *flags)
        return Child("-c", code, *argv, folder=self.folder)

    def started(self) -> list[int]:
        """Return the process ids of the programs so far."""
        return [int(name) for name in os.listdir(self.folder) if name.isdecimal()]

    def test_gate_and_end_are_told_with_the_address(self) -> None:
        with self.up_told(self.TOLD, "--serve", "--port", "0", "--linger", "0") as child:
            child.wait_for("waits for approval")
            eventually(self.started)  # a gate that is decided is no news any more
            ask(child.port, "POST", "/approve/deploy")
            self.assertEqual(child.finish()[0], 0)
            url = child.wait_for(r"Page: (\S+)")
        with open(self.in_folder("told")) as file:
            gate, end = map(json.loads, file)
        names = "event runId workflowName status url nodeId iteration title summary".split()
        self.assertEqual(list(gate), names)
        self.assertEqual((gate["event"], gate["title"]), ("gate-opened", "Deploy?"))
        self.assertEqual((gate["url"], end["url"]), (f"{url}#/node/deploy/0", url))
        self.assertEqual((end["event"], end["status"]), ("run-ended", "finished"))

    def test_a_program_that_fails_costs_one_line(self) -> None:
        for program, says in (
            ("raise SystemExit(3)", "it ended with 3"),
            (
                "import time\nos.fork()\ntime.sleep(60)",
                "(it took over 0.3 s|there was no time left)",
            ),
        ):
            with self.subTest(says=says), self.up_told(program, name="other") as child:
                self.assertEqual(child.finish()[0], 0)
                lines = [line for line in child.lines if "--notify" in line]
                self.assertEqual(len(lines), 1, child.text())
                self.assertRegex(lines[0], f"did not work: {says}")
                self.assertLessEqual(len(self.started()), 3)
                for pid in self.started():
                    self.assertFalse(is_process(pid))
                    os.remove(self.in_folder(str(pid)))
                os.remove(self.path)

    def test_a_missing_program_costs_one_line(self) -> None:
        argv = (*MODULE, "up", "flow.py:other", "--notify", "no-such-program")
        code, _, err = run_child(*argv, folder=self.folder)
        says = "WARNING --notify no-such-program did not work: No such file or directory\n"
        self.assertEqual((code, err.count("--notify"), err.count(says)), (0, 1, 1), err)

    def test_a_program_may_flood_and_not_read(self) -> None:
        program = "os.write(1, bytes(1 << 22)), os.write(2, bytes(1 << 22)), os.close(0)"
        with self.up_told(program, name="other") as child:
            self.assertEqual(child.finish()[0], 0)
            self.assertNotIn("--notify", child.text())
            self.assertLess(len(child.text()), 4096)

    def test_a_signal_leaves_no_program_behind(self) -> None:
        program = "import time\ntime.sleep(60)"
        with self.up_told(program, "--serve", "--port", "0") as child:
            child.wait_for("waits for approval")
            eventually(self.started)
            self.assertEqual(child.finish(signal.SIGTERM)[0], 3)
        for pid in self.started():
            self.assertFalse(is_process(pid))


class LingerTest(CommandCase):
    def test_the_server_ends_after_its_run(self) -> None:
        for name, seconds, expected in (("other", "0", 0), ("failing", "0.1", 1)):
            with self.subTest(name=name), self.up(name, "--linger", seconds, "-r", name) as child:
                child.wait_for(f"Workflow (finished|failed). Server ends in {seconds} s")
                self.assertEqual(child.finish()[0], expected)

    def test_seconds_are_a_number_that_can_pass(self) -> None:
        for line in ("up flow.py:other --linger", "wait --timeout"):
            for seconds in ("-1", "nan", "inf", "soon", ""):
                code, _, err = self.main(*line.split(), seconds)
                self.assertEqual(code, 4)
                self.assertRegex(err, r"\A\[smithers\] Error: [^\n]*expected seconds[^\n]*\n\Z")

    def test_a_follower_gets_the_last_event(self) -> None:
        """However slowly it reads: the server's end waits for what is under way."""
        with self.up("lengthy", "--linger", "0") as child:
            child.wait_for("waits for approval")
            with EventReader(child.port, buffer_bytes=4096) as reader:
                ask(child.port, "POST", "/approve/deploy")
                child.wait_for("Workflow finished")
                self.assertGreater(len(reader.rest()), 2000)
                self.assertTrue(reader.has_ended)
            self.assertEqual(child.finish()[0], 0)


class WarningTest(CommandCase):
    def test_serve_flags_without_serve_are_told(self) -> None:
        _, _, err = self.main(
            "up", "flow.py:other", "--port", "0", "--linger", "3", "--host", "::1"
        )
        for name in ("--port", "--linger", "--host"):
            self.assertIn(f"WARNING: {name} has no effect without --serve\n", err)
        self.assertEqual(err.count("no effect"), 3)

    def test_a_parallel_above_the_limit_is_told(self) -> None:
        for flags, is_told in ((), True), (("-c", "8"), False):
            argv = (*MODULE, "up", "flow.py:broad", *flags)
            err = run_child(*argv, folder=self.folder)[2]
            says = "WARNING Parallel(max_concurrency=8) is limited to 4: -c"
            self.assertEqual(says in err, is_told, err)


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
# The operator's seat
# ---------------------------------------------------------------------------

SEAT = """
import os, sys
from smithers_serve import Approval, Loop, Parallel, Pause, Task, Workflow, current_task

def chat():
    print("line 1")
    print("oh", file=sys.stderr)
    return {"n": 1}

def broken():
    if not os.path.exists("go"):
        raise ValueError("no luck")

def give_up():
    print("try", current_task().attempt)
    raise ValueError("no luck")

def hold():
    current_task().log("asleep")
    current_task().cancelled.wait(60)

def note():
    with open("notes", "a") as file:
        file.write(f"{current_task().node_id} {current_task().iteration}\\n")

ship = Workflow("ship", Task("build", chat), Approval("deploy", title="Deploy?"),
                Task("announce", chat))
broke = Workflow("broke", Task("build", chat), Task("fail", broken), Task("last", note))
notes = Workflow("notes", Task("a", note), Loop(Task("b", note), id="l", until=False,
                 max_iterations=2), Parallel(Task("c", note), Task("d", note)), Task("e", note))
long = Workflow("long", Task("hold", hold), Approval("deploy"))
paused = Workflow("paused", Pause("rest", seconds=600), Task("after", {}))
listed = Workflow("listed", Approval("deploy", metadata=["a", "b"]))
gave_up = Workflow("gave_up", Task("build", chat), Task("x", give_up, retries=1))
where = Workflow("where", Task("where", ["pwd"]), Task("fail", broken))
wide = Workflow("wide", Parallel(*[Task(f"t{n}", {}) for n in range(12)]), Task("join", {}))

def asks(ctx):
    return Workflow("asks", Task("a", {"ref": ctx.input["ref"]}))
"""


class SeatCase(CommandCase):
    """Tests of the operator's commands, on a file with runs in several states."""

    def setUp(self) -> None:
        super().setUp()
        self.write("seat.py", SEAT)

    def begin(self, name: str, run_id: str = "", *flags: str) -> tuple[int, str, str]:
        """Run one of SEAT in this process, as far as it goes without a server."""
        return self.main("up", f"seat.py:{name}", "-r", run_id or name, *flags)

    def tell(self, line: str, code: int = 0) -> str:
        """Return what a command prints."""
        found, out, err = self.main(*shlex.split(line))
        self.assertEqual(found, code, (line, out, err))
        return out

    def told_json(self, line: str, code: int = 0) -> Any:
        return json.loads(self.tell(f"{line} --json", code))

    def refused(self, code: int, says: str, line: str) -> None:
        """Assert that a command is a mistake: one line, nothing else."""
        with self.subTest(line=line):
            found, out, err = self.main(*shlex.split(line))
            self.assertEqual((found, out), (code, ""), err)
            self.assertRegex(err, rf"\A\[smithers\] Error: [^\n]*{says}[^\n]*\n\Z")


RUN_KEYS = listed(
    "runId workflowName state done nodes createdAtMs finishedAtMs engine waitsFor url page logFile",
    " ",
)
RESULT_KEYS = listed("runId status summary error?", " ")
HISTORY_KEYS = listed(
    "timestampMs what nodeId? iteration? status? decidedBy? bySource? by? note? reason? error?", " "
)
LINE_KEYS = listed("type runId nodeId iteration attempt text stream timestampMs", " ")
# The keys of what every command prints with --json, or of each item of a list; `?` marks those that
# may be missing. An empty list of keys: a plain value.
JSON_KEYS = {
    "ps -a": RUN_KEYS,
    "status ship": [*RUN_KEYS, "status", "why", "resume", "failed", "summary"],
    "show ship": [*GATE_KEYS, "evidence"],
    "show broke": [*RUN_KEYS, "status", "why", "resume", "failed", "summary"],
    "show broke fail": DETAIL_KEYS,
    "logs broke": LINE_KEYS,
    "history broke": HISTORY_KEYS,
    "approve ship deploy -y": ["runId", "nodeId", "status", "engine"],
    "deny ship2 deploy -y": ["runId", "nodeId", "status", "engine"],
    "stop ship": ["runId", "status"],
    "cancel ship": ["runId"],
    "retry broke": RESULT_KEYS,
    "wait broke": ["runId", "status"],
    "output ship build": ["n"],
    "graph seat.py:ship": ["kind", "tag", "props", "children"],
    "gc --older-than 1d": [],
}


# Every command but those that write, and `graph`, which has no database.
READING = (
    "ps", "ps -a", "status", "status --exit-status", "show", "show build", "logs", "logs --tail 1",
    "logs build --since 1d", "logs --failed", "logs --events", "history", "output build",
    "wait --timeout 0.01", "wait --for gate --timeout 0.01", "gc --older-than 1d --dry-run",
)  # fmt: skip
WRITING = "up server demo approve deny stop cancel retry graph".split()


class Terminal:
    """A command on a pseudo terminal: what it writes, and what a person sees of it."""

    def __init__(
        self, folder: str, line: str, columns: int = 80, lines: int = 24, is_piped: bool = False
    ) -> None:
        import pty

        try:
            self._ours, theirs = pty.openpty()
        except OSError as error:
            raise unittest.SkipTest(f"no pseudo terminals here: {error}") from error
        self.written, self.rows = "", [""]
        self._at = (0, 0)  # row, column
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._arrived = threading.Condition()
        self._resize(theirs, columns, lines)
        self.process = subprocess.Popen(
            [sys.executable, *MODULE, *shlex.split(line)], cwd=folder, stdin=theirs, stderr=theirs,
            stdout=subprocess.PIPE if is_piped else theirs, env=child_environment(TERM="xterm"),
        )  # fmt: skip
        os.close(theirs)
        source = self.process.stdout.fileno() if self.process.stdout else self._ours
        self._reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *unused: object) -> None:
        self.process.kill()
        self.end()

    def _resize(self, terminal: int, columns: int, lines: int) -> None:
        import fcntl
        import termios

        self._columns, self._lines = columns, lines
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        with self._arrived:
            self._resize(self._ours, columns, lines)

    def say(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def _read(self, source: int) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while data := os.read(source, 65536):
                with self._arrived:
                    self._see(self._decode(data))
                    self._arrived.notify_all()

    def _see(self, text: str) -> None:
        """Do what a terminal does; what it is not expected to be told to is shown as it is."""
        self.written += text
        for escape, count, what, plain in re.findall(r"(\x1b\[(\d*)([AHJK]))|(.)", text, re.DOTALL):
            row, column = self._at
            if escape:
                if what == "A":
                    self._at = (max(0, row - int(count or 1)), column)
                elif what == "H":
                    self._at = (max(0, len(self.rows) - self._lines), 0)
                else:
                    self.rows[row] = self.rows[row][:column]
                    if what == "J":
                        begin = max(0, len(self.rows) - self._lines) if count else row + 1
                        self.rows[begin:] = [""] * (len(self.rows) - begin)
            elif plain == "\r":
                self._at = (row, 0)
            elif plain == "\n":
                self._at = (row + 1, column)
            else:
                if column == self._columns:
                    row, column = row + 1, 0
                self.rows += [""] * (row + 1 - len(self.rows))
                line = self.rows[row].ljust(column)
                self.rows[row] = line[:column] + plain + line[column + 1 :]
                self._at = (row, column + 1)
            self.rows += [""] * (self._at[0] + 1 - len(self.rows))

    def wait_for(self, pattern: str) -> list[str]:
        """Return the rows once the screen shows this."""

        def shown() -> list[str]:
            return self.rows[-self._lines :]

        with self._arrived:
            found = self._arrived.wait_for(
                lambda: re.search(pattern, "\n".join(shown())), 2 * PATIENCE
            )
            if not found:
                raise AssertionError(f"no {pattern!r} in {shown()}")
            return shown()

    def end(self) -> tuple[int, str]:
        """Return the exit code, once the command has left, and what it has written."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1
        if self.process.stdout:
            self.process.stdout.close()
        return code, self.written.replace("\r\n", "\n")


def on_terminal(
    folder: str, line: str, columns: int, is_piped: bool = False, said: str = ""
) -> str:
    """Return what a command prints on a terminal, or from one into a pipe."""
    with Terminal(folder, line, columns, is_piped=is_piped) as terminal:
        terminal.say(said)
        return terminal.end()[1]


class SeatTest(SeatCase):
    def test_every_answer_has_its_keys(self) -> None:
        for name, run_id in (("broke", ""), ("ship", ""), ("ship", "ship2")):
            self.begin(name, run_id)
        described = {line.split()[0] for line in JSON_KEYS}
        self.assertEqual({c.name for c in ss.COMMANDS} - {"up", "server", "demo"}, described)
        for line, keys in JSON_KEYS.items():
            with self.subTest(line=line):
                code, out, err = self.main(*shlex.split(line), "--json")
                self.assertEqual(code, 1 if line in ("retry broke", "wait broke") else 0, err)
                is_lines = line.startswith("logs")
                value = json.loads(f"[{','.join(out.splitlines())}]" if is_lines else out)
                for item in value if isinstance(value, list) else [value]:
                    must = {key for key in keys if not key.endswith("?")}
                    self.assertLessEqual(must, set(item))
                    self.assertLessEqual(set(item), {key.rstrip("?") for key in keys})

    def test_every_help_ends_in_an_example(self) -> None:
        for command in ss.COMMANDS:
            code, out, _ = self.main(command.name, "--help", COLUMNS="40")
            self.assertEqual(code, 0)
            example = out.splitlines()[-1]  # in one line, so that it can be pasted
            self.assertEqual(example.partition(" ")[0], "example:")
            _, python, program, *words = shlex.split(example)
            self.assertEqual((python, program), (sys.executable, os.path.abspath(ss.__file__)))
            self.assertEqual(words[0], command.name)
            self.assertIs(ss.make_parser().parse_args(words).run, command.run)

    def test_unknown_words_name_what_was_meant(self) -> None:
        for word, meant in (
            ("status-all", "status"), ("aprove", "approve"), ("log", "logs"), ("list", "ps"),
            ("run", "up"), ("shw", "show"),
        ):  # fmt: skip
            says = f"no command '{word}'; did you mean {meant}\\?"
            self.refused(4, says, word)

    def test_runs_are_found_by_their_beginning(self) -> None:
        self.refused(4, re.escape(self.path), "status")
        self.assertFalse(os.path.exists(self.path))
        for run_id in ("alpha-1", "alpha-2", "beta"):
            self.begin("ship", run_id)
        self.assertEqual(self.told_json("status b")["runId"], "beta")
        self.assertEqual(self.told_json("status alpha-1")["runId"], "alpha-1")
        self.assertEqual(self.told_json("status")["runId"], "beta")
        self.refused(4, "alpha-1, alpha-2", "status alpha")
        for run_id in ("alpha-1", "beta"):
            self.tell(f"cancel {run_id}")
        self.assertEqual(self.told_json("status")["runId"], "alpha-2")
        self.assertEqual(self.told_json("show build")["nodeId"], "build")
        self.refused(4, re.escape(self.path) + ".*beta", "status gamma")

    def test_words_that_do_not_fit_are_mistakes(self) -> None:
        self.begin("ship")
        for line in ("approve -y", "deny -y", "output", "approve ship deploy more -y",
                     "output ship build more", "show ship build more", "logs a b c"):  # fmt: skip
            self.refused(4, "", line)
        for line, says in (
            ("show ship nobody", "nobody"), ("output ship nobody", "nobody"),
            ("approve ship nobody -y", "nobody"), ("logs --since soon", "soon"),
            ("gc --older-than 3", "3"), ("retry ship nobody", "nobody"),
        ):  # fmt: skip
            self.refused(4, says, line)

    def test_approve_says_when_nothing_waits(self) -> None:
        self.begin("broke")
        self.refused(5, "nothing waits.*broke.*failed", "approve broke fail -y")
        self.begin("ship")
        self.refused(5, "build", "approve ship build -y")
        self.tell("deny ship deploy -y -m no --by alice")
        self.refused(5, "deploy.*was denied by alice", "approve ship deploy -y")
        self.tell("deny ship deploy -y")  # again: as over HTTP, nothing changes

    def test_approve_says_what_the_run_does_instead(self) -> None:
        with self.up("napping") as child:
            child.wait_for("asleep")
            self.refused(5, "nothing waits.*running; .*asleep", "approve r x -y")
            child.process.kill()
        self.refused(5, "nothing waits.*orphaned; no engine", "approve r x -y")
        self.assertRegex(self.tell("status r"), "was running, since .*: last line: asleep")

    def test_what_changes_a_run_is_told_which(self) -> None:
        for run_id in ("one", "two"):
            self.begin("ship", run_id)
        before = rows(self.path)
        for line in ("approve deploy -y", "deny deploy -y", "stop", "cancel", "retry"):
            self.refused(4, "2 runs have not ended: say which.*two, one", line)
        self.assertEqual(rows(self.path), before)
        self.tell("cancel one")
        self.tell("cancel")
        self.assertEqual(self.told_json("ps"), [])

    def test_retry_of_what_went_well_needs_a_node(self) -> None:
        self.begin("notes")
        self.refused(4, "has finished: say which nodes", "retry notes")
        self.begin("ship")
        change(self.path, """update _smithers_runs set config_json = '{"server": true}'
                             where run_id = 'ship'""")  # fmt: skip
        self.refused(5, "what has ended can be retried", "retry ship")

    def test_columns_stand_where_letters_are_wide(self) -> None:
        for run_id, name in (("a", "\u8a2d\u5b9a"), ("b", "plain")):
            self.write(
                "wide.py",
                f"from smithers_serve import *\nworkflow = Workflow({name!r}, Approval('x'))",
            )
            self.main("up", "wide.py", "-r", run_id)
            change(self.path, """update _smithers_runs set config_json = '{"url": "http://x"}'""")
        with mock.patch.object(ss, "owner_life", return_value="alive"):
            table = self.tell("ps").splitlines()
        self.assertEqual(len({ss.cells(row[: row.index("http")]) for row in table[1:]}), 1)

    def test_what_is_cut_is_said_to_be(self) -> None:
        self.write(
            "much.py",
            "from smithers_serve import *\n"
            "workflow = Workflow('much', Task('a', {'n': 'x' * 5000}), Approval('gate'))",
        )
        self.main("up", "much.py", "-r", "much")
        for line in ("show much", "show much a"):
            self.assertIn("x ... (`output` prints all of it)\n", self.tell(line).replace('"', ""))
        self.assertEqual(len(self.told_json("output much a")["n"]), 5000)

    def test_old_runs_that_wait_are_not_lost(self) -> None:
        """However many have begun and ended since."""
        self.begin("ship", "old")
        self.begin("broke", "new")
        change(self.path, "update _smithers_runs set created_at_ms = 1 where run_id = 'old'",
               """with recursive n(i) as (select 1 union all select i + 1 from n where i < 1001)
                  insert into _smithers_runs (run_id, workflow_name, status, created_at_ms)
                  select 'r' || i, 'x', 'finished', 5 from n""")  # fmt: skip
        self.assertEqual([run["runId"] for run in self.told_json("ps")], ["old"])
        self.assertEqual(len(self.told_json("ps -a")), 1003)
        self.assertEqual(self.told_json("status")["runId"], "old")
        change(self.path, "delete from _smithers_runs where created_at_ms = 5")

    def test_words_may_come_after_flags(self) -> None:
        self.begin("ship")
        build = self.tell("show ship build")
        self.assertEqual(self.tell("show ship --iteration 0 build"), build)
        self.assertEqual(self.tell("show ship --iteration 0 -- build"), build)
        self.refused(4, "unrecognized arguments: .*-x", "show ship --iteration 0 build -x")
        self.refused(4, "unrecognized arguments: more", "status ship more")
        self.tell("approve ship -m fine deploy -y")

    def test_words_are_checked_as_over_http(self) -> None:
        self.begin("ship")
        for line in ("approve ship deploy -y", "cancel ship"):
            self.main(*shlex.split(line), "--by", "x" * 201)
            self.main(*shlex.split(line), "-m", "x" * 10_001)
            self.assertEqual(self.main(*shlex.split(line), "-m", "a\udcff")[0], 4)
        self.assertEqual(self.told_json("status ship")["state"], "waiting-approval")
        self.refused(4, "not valid Unicode", "status 'a\udcff'")

    def test_a_person_who_says_no_decides_nothing(self) -> None:
        self.begin("ship")
        out = on_terminal(self.folder, "approve ship deploy", columns=80, said="n\n")
        self.assertRegex(out, r"\[y/N\] n?\s*\[smithers\] Error: not decided\n")
        self.refused(4, "without a terminal -y", "approve ship deploy --json")

    def test_conflicts_have_a_code_of_their_own(self) -> None:
        self.begin("broke")
        for line in ("cancel broke", "stop broke", "deny broke fail -y"):
            self.refused(5, "broke", line)
        with self.up("napping") as child:
            child.wait_for("asleep")
            self.refused(5, "r", "retry r")

    def test_history_tells_who_and_why(self) -> None:
        self.begin("ship")
        self.tell("approve ship deploy -y -m 'Ship it' --by alice")
        self.begin("ship", "two")
        self.tell("cancel two -m 'wrong branch' --by bob")
        out = self.tell("history ship")
        self.assertRegex(
            out, r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  deploy approved by alice.*: Ship it$"
        )
        self.assertRegex(self.tell("history two"), "(?m)cancelled by bob.*: wrong branch$")
        (found,) = [x for x in self.told_json("history ship") if x["what"] == "approved"]
        self.assertEqual((found["decidedBy"], found.get("bySource")), ("alice", "claimed"))
        (found,) = [x for x in self.told_json("history two") if x["what"] == "cancelled"]
        self.assertEqual((found["by"], found.get("bySource")), ("bob", "claimed"))

    def test_history_tells_of_suspensions_and_takeovers(self) -> None:
        with self.up("napping") as child:
            child.wait_for("asleep")
            self.assertIn("--resume", self.tell("stop r"))
            self.assertEqual(child.finish()[0], 3)
        self.assertIn("suspended", self.tell("history r"))
        self.assertEqual(self.main("up", "flow.py:napping", "-r", "r", "--resume")[0], 0)
        self.assertRegex(self.tell("history r"), "resumed|taken over")

    def test_retry_runs_what_came_after_again(self) -> None:
        self.begin("broke")
        self.write("go", "")
        self.tell("retry broke")
        self.assertEqual(self.read_notes(), "last 0")
        self.begin("notes")
        self.assertEqual(self.read_notes(), "last 0, a 0, b 0, b 1, c 0, d 0, e 0")
        os.remove(self.in_folder("notes"))
        for node, expected in (("e", "e 0"), ("c", "c 0, e 0"), ("b", "b 1, c 0, d 0, e 0")):
            self.tell(f"retry notes {node}")
            self.assertEqual(self.read_notes(), expected, node)
            os.remove(self.in_folder("notes"))
        self.tell("retry notes a")
        self.assertEqual(self.read_notes(), "a 0, b 0, b 1, c 0, d 0, e 0")

    def read_notes(self) -> str:
        """Return what ran, in order; what runs together by name."""
        with open(self.in_folder("notes")) as file:
            lines = file.read().split("\n")[:-1]
        return ", ".join(lines).replace("d 0, c 0", "c 0, d 0")

    def test_retry_goes_on_where_the_run_began(self) -> None:
        self.begin("where")
        os.mkdir(self.in_folder("elsewhere"))
        argv = ("retry", "where", "where", "--db", self.path)
        run_child(*MODULE, *argv, folder=self.in_folder("elsewhere"))
        self.finished()
        output = self.output("where", run_id="where")
        self.assertEqual(output["stdout"].strip(), os.path.realpath(self.folder))

    def test_failed_logs_are_those_of_failed_nodes_alone(self) -> None:
        self.begin("gave_up")
        lines = self.tell("logs --failed").splitlines()
        self.assertEqual([line.split(" ", 1)[1] for line in lines], ["x | try 0", "x | try 1"])
        self.assertEqual(self.tell("logs --failed --tail 1").splitlines(), lines[-1:])
        self.assertEqual(self.tell("logs gave_up build --failed"), "")

    def test_events_of_a_node_are_its_own(self) -> None:
        self.begin("gave_up")
        log = [json.loads(line) for line in self.tell("logs gave_up --events").splitlines()]
        self.assertEqual([event["type"] for event in log if "nodeId" not in event][0], "RunStarted")
        own = [event for event in log if event.get("nodeId") == "x"]
        self.assertLess(len(own), len(log))
        for line, expected in (("", own), (" --tail 2", own[-2:]), (" --json --tail 1", own[-1:])):
            told = self.tell(f"logs gave_up x --events{line}").splitlines()
            self.assertEqual(list(map(json.loads, told)), expected)
        self.assertEqual(json.loads(self.tell("logs gave_up --events --tail 1")), log[-1])

    def test_wait_ends_at_the_end_or_a_gate(self) -> None:
        self.begin("ship")
        for line, code in (("--for gate", 3), ("--timeout 0.05", 5), ("--timeout 0", 5)):
            self.tell(f"wait ship {line}", code)

    def test_a_pause_waits_for_nobody(self) -> None:
        argv = (*MODULE, "up", "seat.py:paused", "-r", "paused")
        with Child(*argv, folder=self.folder) as child:
            child.wait_for("rest . pauses until ....-..-.. ..:..:.. UTC")
            eventually(lambda: "waiting-approval" in self.tell("ps"))
            self.assertIn("  rest pauses: goes on in 10 min\n", self.tell("status"))
            self.assertNotIn("1 approval", self.tell("ps"))
            self.assertIn("Nothing waits for a decision.", self.tell("show"))
            self.assertNotIn("approve", self.tell("show paused rest"))
            self.tell("approve paused rest -y", 5)
            self.tell("wait paused --for gate --timeout 0.05", 5)
            self.assertEqual(child.finish(signal.SIGTERM)[0], 3)
        self.assertIn("pause rest", self.tell("graph seat.py:paused"))

    def test_graph_shows_the_order_without_running(self) -> None:
        out = self.tell("graph seat.py:wide --mermaid")
        self.assertEqual(out.splitlines()[0], "flowchart TD")
        self.assertEqual(out.count(" --> n12"), 12)
        self.assertEqual(self.tell("graph seat.py:ship").split("\n")[0], "workflow ship")
        self.assertIn('{{"deploy"}}', self.tell("graph seat.py:ship --mermaid"))
        self.tell(shlex.join(["graph", "seat.py:asks", "--input", '{"ref": "v1"}']))
        self.refused(4, "ref", "graph seat.py:asks")
        twice = "Workflow('x', Task('a', {}), Task('a', {}))"
        self.write("twice.py", f"from smithers_serve import *\nworkflow = {twice}")
        self.refused(4, "'a'", "graph twice.py")
        self.assertFalse(os.path.exists(self.path))

    def test_lines_are_cut_for_a_terminal_alone(self) -> None:
        self.begin("ship", "a-run-with-a-long-name")
        ageless = functools.partial(re.sub, r"\b\d+ s\b", "0 s")
        whole = ageless(self.tell("status"))
        for is_piped in (True, False):
            out = ageless(on_terminal(self.folder, "status", columns=40, is_piped=is_piped))
            hints = [line for line in out.splitlines() if " approve " in line]
            self.assertEqual(hints, [line for line in whole.splitlines() if " approve " in line])
            self.assertEqual(out == whole, is_piped)

    def test_watch_draws_in_place_until_the_end(self) -> None:
        """Line over line: a screen that is cleared each time flickers. Only a new size does so."""
        with self.up("napping") as child:
            child.wait_for("asleep")
            with Terminal(self.folder, "status --watch", columns=40, lines=12) as terminal:
                narrow = terminal.wait_for("since [2-9] s")
                terminal.resize(20, 4)
                terminal.wait_for(r"\.\.\.")
                terminal.resize(200, 24)
                wide = terminal.wait_for("last line: asleep")
                for rows in (narrow, wide):
                    self.assertEqual(sum("napping" in row for row in rows), 1, rows)
                ask(child.port, "POST", "/cancel")
                self.assertEqual(terminal.end()[0], 0)
                self.assertRegex("\n".join(terminal.rows), "r  napping  cancelled")
                self.assertEqual(terminal.written.count("\x1b[2J"), 2)
                self.assertEqual(terminal.written.count("\x1b[H"), 2)

    def test_ids_that_look_like_flags_can_be_pasted(self) -> None:
        self.write(
            "dash.py", "from smithers_serve import *\nworkflow = Workflow('d', Approval('-y'))"
        )
        self.main("up", "dash.py", "--run-id=-r")
        for line in ("status", "show"):
            (hint,) = [row for row in self.tell(line).splitlines() if " approve " in row]
            self.assertEqual(shlex.split(hint)[:2], [sys.executable, os.path.abspath(ss.__file__)])
        _, _, approve, *rest = shlex.split(hint)
        self.assertIn("approved", self.tell(shlex.join([approve, "-y", *rest])))
        self.assertIn("--run-id=-r", self.tell("status"))

    def test_a_watch_stays_with_its_run(self) -> None:
        self.begin("ship", "other")
        self.tell("cancel other")
        with self.up("napping", "-r", "first") as child:
            child.wait_for("asleep")
            change(self.path, "update _smithers_runs set created_at_ms = 1 where run_id = 'first'")
            with Terminal(self.folder, "status --watch --exit-status") as terminal:
                terminal.wait_for("first  napping  running")
                child.finish(signal.SIGINT)
                self.assertEqual(terminal.end()[0], 2)
                self.assertNotIn("other", terminal.written)

    def test_leaving_a_command_is_quiet(self) -> None:
        with self.up("napping") as child:
            child.wait_for("asleep")
            for line, seen in (("status --watch", "napping"), ("logs -f", "asleep")):
                with Terminal(self.folder, line) as terminal:
                    terminal.wait_for(seen)
                    terminal.process.send_signal(signal.SIGINT)
                    code, written = terminal.end()
                    self.assertEqual(code, 130)
                    self.assertNotIn("Traceback", written)
        for line in ("ps -a", "logs", "logs --events --json"):
            reader, writer = os.pipe()
            os.close(reader)
            argv = [sys.executable, *MODULE, *line.split()]
            done = subprocess.run(
                argv,
                cwd=self.folder,
                env=child_environment(),
                stdout=writer,
                stderr=subprocess.PIPE,
            )
            os.close(writer)
            self.assertEqual((done.returncode, done.stderr), (141, b""))

    def test_what_is_shown_fits_the_terminal(self) -> None:
        """Counted in columns, where letters are wide; and nothing that it would obey."""
        wide = "\u8a2d" * 60
        self.write(
            "text.py",
            "from smithers_serve import *\n"
            f"workflow = Workflow('text', Approval('a', title={wide!r}, summary='\x9b31m'))",
        )
        self.main("up", "text.py", "-r", "r")
        with Terminal(self.folder, "status", columns=40) as terminal:
            written = terminal.end()[1]
        (row,) = [row for row in written.splitlines() if row.startswith("! a")]
        self.assertEqual(ss.cells(row), 40 - ss.cells(row) % 2)
        self.assertNotIn("\x9b", self.tell("show"))
        self.assertIn(wide, on_terminal(self.folder, "show", columns=40))

    def test_reading_a_killed_engines_file_changes_nothing(self) -> None:
        with self.up("napping") as child:
            child.wait_for("asleep")
            child.process.kill()
            child.process.wait()
        for line in READING:
            before = self.contents()
            self.main(*shlex.split(line))
            self.assertEqual(self.contents(), before, line)

    def test_reading_changes_nothing(self) -> None:
        """Not in our own file, nor in one of the original's, which has fewer tables."""
        self.begin("ship")
        self.assertEqual({line.split()[0] for line in READING} | set(WRITING),
                         {command.name for command in ss.COMMANDS})  # fmt: skip
        with contextlib.closing(sqlite3.connect(self.in_folder("smithers.db-theirs"))) as theirs:
            theirs.executescript(ORIGINAL_SCHEMA)
        before = self.contents()
        for line in (*READING, *(f"{line} --json" for line in READING)):
            for db in ("smithers.db", "smithers.db-theirs"):
                code, _, err = self.main(*shlex.split(line), "--db", db)
                self.assertNotIn("Traceback", err)
                self.assertEqual(self.contents(), before, (line, db))

    def test_no_lock_is_held_while_a_command_writes(self) -> None:
        """Without a write-ahead log a commit waits for readers: here that would be for ever."""
        theirs = self.in_folder("theirs.db")
        with contextlib.closing(sqlite3.connect(theirs, timeout=0)) as engine:
            engine.executescript(ORIGINAL_SCHEMA)

            class Reader(io.StringIO):
                def write(self, text: str) -> int:
                    engine.execute("update _smithers_runs set heartbeat_at_ms = 1")
                    engine.commit()
                    return super().write(text)

            told = 0
            for line in (*READING, "show lint", "show gate"):
                reader = Reader()
                with mock.patch.object(io, "StringIO", return_value=reader):
                    self.main(*shlex.split(line), "--db", theirs)
                told += bool(reader.getvalue())
            self.assertGreater(told, 8)

    def contents(self) -> dict[str, str]:
        """Return a digest of the database and of its log: sqlite leaves an empty one behind."""
        found = {}
        for name in sorted(os.listdir(self.folder)):
            if name.startswith("smithers.db") and not name.endswith("-shm"):
                with open(self.in_folder(name), "rb") as file:
                    data = file.read()
                if data:
                    found[name] = hashlib.sha256(data).hexdigest()
        return found

    def test_no_traceback_is_obeyed_by_a_terminal(self) -> None:
        self.write(
            "esc.py",
            "from smithers_serve import *\n"
            "def cry():\n"
            "    raise ValueError('\\x1b[31mred\\nand more')\n"
            "workflow = Workflow('esc', Task('cry', cry))",
        )
        code, _, err = run_child(*MODULE, "up", "esc.py", folder=self.folder)
        self.assertEqual(code, 1)
        self.assertRegex(err, r"ValueError: \\x1b\[31mred\nand more\n")
        self.assertNotIn("\x1b", err)

    def test_any_metadata_can_be_shown(self) -> None:
        self.begin("listed")
        self.assertIn("b", self.tell("show listed"))

    def test_gc_removes_what_ended_long_ago(self) -> None:
        for name in ("broke", "ship", "notes"):
            self.begin(name)
        long_ago = "update _smithers_runs set finished_at_ms = 5, created_at_ms = 5"
        change(self.path, long_ago + " where run_id <> 'notes'",
               "update _smithers_events set payload_json = hex(randomblob(1000000))"
               " where run_id = 'broke' and seq = 0")  # fmt: skip
        self.assertEqual(self.told_json("gc --older-than 30d --dry-run"), ["broke"])
        size = os.path.getsize(self.path)
        self.assertEqual(self.told_json("gc --older-than 30d"), ["broke"])
        self.assertLess(os.path.getsize(self.path), size - 1_000_000)
        self.assertEqual([run["runId"] for run in self.told_json("ps -a")], ["notes", "ship"])
        for table in rows(self.path).values():
            self.assertNotIn("broke", [row.get("run_id") for row in table])


# ---------------------------------------------------------------------------
# README: its own code, run as written
# ---------------------------------------------------------------------------


def readme_blocks(holds: str = "") -> list[str]:
    """Return the README's blocks of Python in order, or those that hold something."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as readme:
        blocks = re.findall(r"^```python\n(.*?)^```$", readme.read(), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if holds in block]


README_FILES = {
    "workflow.py": "def workflow(ctx",
    "canary.py": "def canary(",
    "test_workflow.py": "class RehearsalTest",
    "library.py": "run_workflow(",
}
PYRIGHT = {"typeCheckingMode": "strict", "include": list(README_FILES)}


def readme_command(folder: str) -> int:
    """Write the README's workflows beside the module, for checkers of types."""
    os.makedirs(folder)
    shutil.copy(os.path.join(HERE, "smithers_serve.py"), folder)
    for name, holds in README_FILES.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(readme_blocks(holds)[0])
    with open(os.path.join(folder, "pyrightconfig.json"), "w", encoding="utf-8") as file:
        json.dump(PYRIGHT, file)
    return 0


SAMPLE = """
from smithers_serve import Approval, Parallel, Task, Workflow

def run_tests():
    print("collected 12 tests")
    print("12 passed")
    return {"passed": 12}

lint = ["sh", "-c", "echo 'Found 3 errors.' >&2; exit 1"]
checks = Parallel(Task("test", run_tests), Task("lint", lint, continue_on_fail=True))
gate = Approval("ship", title="Ship v1.2?", summary="Goes to all customers.",
                metadata={"ref": "v1.2"}, timeout=3600, on_timeout="deny")
workflow = Workflow("release", checks, gate, Task("announce", {"channel": "releases"}))
"""


class ReadmeTest(RunCase):
    """A newcomer copies from the README; what is written there must run."""

    def run_block(self, holds: str, *argv: str, more: str = "") -> tuple[int, str, str]:
        """Run a block as `workflow.py`."""
        self.write("workflow.py", readme_blocks(holds)[0] + more)
        return run_child(*(argv or ["workflow.py"]), folder=self.folder)

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

    def test_the_operators_lines_are_what_is_printed(self) -> None:
        """But for paths and ages; and every line of the table is one that is taken."""
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as readme:
            seat = readme.read().partition("## The operator's seat")[2].partition("## The page")[0]
        self.write("flow.py", SAMPLE)
        with Child(*MODULE, "up", "flow.py", "-r", "r1", "--serve", "--port", "0",
                   folder=self.folder) as child:  # fmt: skip
            child.wait_for("waits for approval")
            samples = re.findall(r"\$ python3 -m smithers_serve (.*)\n((?:.+\n)+)", seat)
            self.assertEqual([line for line, _ in samples], ["status", "show"])
            for line, shown in samples:
                code, out, err = run_child(*MODULE, *line.split(), folder=self.folder)
                for found, told in (
                    (re.escape(sys.executable), "/usr/bin/python3"),
                    (re.escape(os.path.abspath(ss.__file__)), "/srv/smithers_serve.py"),
                    (re.escape(os.path.realpath(self.path)), "/srv/smithers.db"),
                    (re.escape(self.path), "/srv/smithers.db"),
                    (r"since \d+ s", "since 3 min"), (r"asked \d+ s", "asked 3 min"),
                    (r"in \d+ min", "in 57 min"),
                ):  # fmt: skip
                    out = re.sub(found, told, out)
                self.assertEqual((code, out), (0, shown.replace("```\n", "")), err)
        cells = re.findall(r"(?m)^\| .* \| (`.*`) \|$", seat)
        self.assertEqual(len(cells), 12)
        for cell in cells:
            for line in re.findall("`(.*?)`", cell):
                words = re.sub(r"[][]|\.\.\.", " ", line).replace("end or gate", "gate").split()
                values = {"N": "1", "S": "1", "J": "{}", "FILE": "x.py", ":name": ""}
                argv = [values.get(word, word) for word in words if values.get(word, word)]
                with self.subTest(line=line):
                    ss.make_parser().parse_args(argv)

    def test_the_library_example_runs(self) -> None:
        code, out, err = self.run_block("run_workflow(")
        self.assertEqual((code, out), (0, "finished {'text': 'hi'} {'ok': True}\n"), err)

    def test_the_tests_of_its_workflows_pass(self) -> None:
        self.write("canary.py", readme_blocks("def canary(")[0])
        self.write("test_workflow.py", readme_blocks("class RehearsalTest")[0])
        argv = ("-m", "unittest", "test_workflow.py")
        code, _, err = self.run_block("def workflow(ctx", *argv)
        self.assertEqual((code, err.count("Ran 6 tests")), (0, 1), err)

    def test_the_executor_of_processes_runs_the_workflow(self) -> None:
        self.write("engines.py", readme_blocks("def processes(")[0])
        argv = (*MODULE, "up", "workflow.py", "--executor", "engines:processes")
        code, _, err = self.run_block("def workflow(ctx", *argv)
        self.assertEqual(code, 3, err)

    def test_the_mounted_app_answers_at_its_prefix(self) -> None:
        more = (
            "\nenviron = {'PATH_INFO': '/smithers/health', 'REQUEST_METHOD': 'GET'}"
            "\nprint(b''.join(site(environ, lambda status, headers: print(status))).decode())\n"
        )
        _, out, err = self.run_block("make_wsgi_server", more=more)
        self.assertEqual(out, '200 OK\n{"ok":true}\n', err)


# ---------------------------------------------------------------------------
# Faults: a rig of processes that die, locks that are held, clocks that step, readers that leave
# ---------------------------------------------------------------------------

# Tasks write what they do to the file that EFFECTS names, a line each: node, attempt, word.
FAULT_FLOWS = r"""
import asyncio, contextvars, decimal, os, signal, subprocess, sys, threading, time
from smithers_serve import Approval, Loop, Parallel, Sequence, Task, Workflow, current_task

EFFECTS = os.environ.get("EFFECTS", os.devnull)

def note(word):
    task = current_task()
    with open(EFFECTS, "ab", buffering=0) as out:
        out.write(f"{task.node_id} {task.attempt} {word}\n".encode())

def step():
    note("done")
    return {"attempt": current_task().attempt}

def hold():
    note("begin")
    current_task().log("holding")
    if current_task().attempt == 0:
        current_task().cancelled.wait(60)
        raise RuntimeError("told to stop")
    note("done")

COMMAND = ["sh", "-c", 'echo "$SMITHERS_NODE_ID $SMITHERS_ATTEMPT begin $$" >> "$EFFECTS"; '
           'echo holding; if [ "$SMITHERS_ATTEMPT" = 0 ]; then sleep 60; fi; '
           'echo "$SMITHERS_NODE_ID $SMITHERS_ATTEMPT done" >> "$EFFECTS"']

def deaf():
    note("begin")
    current_task().log("holding")
    time.sleep(60)

ignoring = Workflow("ignoring", Task("deaf", deaf), Task("after", step))
gated = Workflow("gated", Task("before", step), Approval("ok"), Task("after", step))
held = Workflow("held", Task("before", step), Task("hold", hold), Task("after", step))
commanded = Workflow("commanded", Task("command", COMMAND), Task("after", step))

def grandchild(ctx):
    script = ('env -i sh -c "echo child \\$\\$; exec sleep 60" >> "$EFFECTS" & '
              'echo holding; [ "$SMITHERS_ATTEMPT" = 0 ] && wait; true')
    return Workflow("grandchild", Task("command", ["sh", "-c", script]))

def fail_once():
    note("begin")
    if current_task().attempt == 0:
        raise RuntimeError("not yet")

def delayed(ctx):
    delay = float(os.environ.get("DELAY", "30"))
    return Workflow("delayed", Task("flaky", fail_once, retries=1, retry_delay=delay))

def broken():
    note("begin")
    raise RuntimeError("it broke")

failing = Workflow("failing", Task("broken", broken))

def poison():
    note("begin")
    os.kill(os.getpid(), signal.SIGKILL)

def good():
    note("begin")
    current_task().log("good begins")
    time.sleep(float(os.environ.get("GOOD", "0.3")))
    note("done")

poisoned = Workflow("poisoned",
        Parallel(Task("poison", poison, retries=2, continue_on_fail=True),
                 Task("good", good), Task("other", good)),
        Task("after", step))

def pooled(ctx):
    tasks = [Task(f"good{n}", good) for n in range(3)]
    return Workflow("pooled",
        Parallel(Task("poison", poison, retries=2, continue_on_fail=True), *tasks),
        Task("after", step))

def pool_hold():
    note("begin " + str(os.getpid()))
    time.sleep(60)

def pool_held(ctx):
    run = pool_hold if ctx.state("held") is None else pool_hold
    return Workflow("pool_held", Task("held", run))

def make_pool():
    import concurrent.futures, multiprocessing
    context = multiprocessing.get_context("fork")
    return concurrent.futures.ProcessPoolExecutor(3, mp_context=context)

def exiting(ctx):
    sys.exit("usage")

def to_thread(ctx):
    async def wait():
        current_task().log("holding")
        await asyncio.to_thread(time.sleep, 60)
    return Workflow("to_thread", Task("wait", wait))

def thread(ctx):
    def wait():
        threading.Thread(target=time.sleep, args=(60,), daemon=False).start()
        current_task().log("holding")
        current_task().cancelled.wait(60)
    return Workflow("thread", Task("wait", wait))

def printing(ctx):
    def say():
        for number in range(50):
            print("line", number)
            print("error", number, file=sys.stderr)
    return Workflow("printing", Task("say", say), Task("after", step))

def lose_folder():
    note("begin")
    os.rmdir(os.getcwd())
    raise RuntimeError("no folder")

homeless = Workflow("homeless", Task("lose", lose_folder, timeout=30, continue_on_fail=True),
                    Approval("ok"), Task("after", step))
moving = Workflow("moving", Task("move", lambda: os.chdir("/")), Approval("ok"),
                  Task("after", step))

def freeze():
    import ctypes
    with open(os.environ["FIFO"]) as fifo:
        note("begin")
        ctypes.PyDLL(None).read(fifo.fileno(), ctypes.create_string_buffer(1), 1)
    note("done")

frozen = Workflow("frozen", Task("freeze", freeze), Task("after", step))

def cooperative():
    note("begin")
    current_task().log("holding")
    done = 0
    while done < 3 and not current_task().cancelled.is_set():
        if current_task().attempt == 0:
            current_task().cancelled.wait(60)
        else:
            done += 1
    return {"done": done}

polite = Workflow("polite", Task("work", cooperative))

def fork():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    note("child " + str(pid))
    current_task().log("holding")
    current_task().cancelled.wait(60)

forking = Workflow("forking", Task("fork", fork))

def return_twice():
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    return {"is_child": pid == 0}

returning = Workflow("returning", Task("twice", return_twice), Task("after", step))

def fork_and_wait():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)[1]

waiting = Workflow("waiting", Task("status", fork_and_wait))

def sleepers():
    found = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                found += "(sleep)" in stat.read()
        except OSError:
            pass
    return found

def wait_until_buried():
    deadline = time.monotonic() + 10
    while sleepers() and time.monotonic() < deadline:
        time.sleep(0.02)
    return {"pid": os.getpid(), "left": sleepers()}

def own_children():
    start = [sys.executable, "-c", "import sys; sys.exit(7)"]
    every = [subprocess.Popen(start, start_new_session=n % 2 == 0) for n in range(6)]
    for process in every:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    wait_until = time.monotonic() + 0.3  # several looks at what has died
    while time.monotonic() < wait_until:
        time.sleep(0.02)
    return [process.wait() for process in every]

def first(ctx):
    leave = ["sh", "-c", "for n in 1 2 3 4; do sleep 0.1 >/dev/null 2>&1 & done"]
    return Workflow("first", Task("leave", leave), Task("buried", wait_until_buried),
                    Task("own", own_children))

def make_forked():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    with open(EFFECTS, "a") as out:
        out.write(f"child {pid}\n")
    import concurrent.futures
    return concurrent.futures.ThreadPoolExecutor(2)

def stubborn(ctx):
    script = 'trap "" TERM; echo "cmd $$" >> "$EFFECTS"; echo holding; while :; do sleep 1; done'
    return Workflow("stubborn", Task("command", ["sh", "-c", script]))
"""


class Clock:
    """The wall clock, and steps of it."""

    def __init__(self) -> None:
        self.offset_ms = 0

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.offset_ms


@contextlib.contextmanager
def stepping_clock() -> Iterator[Clock]:
    clock = Clock()
    with mock.patch.object(ss, "now_ms", clock.now_ms):
        yield clock


class FaultCase(CommandCase):
    """A folder with FAULT_FLOWS, lives of their runs, and what these have done."""

    def setUp(self) -> None:
        super().setUp()
        self.write("flows.py", FAULT_FLOWS)
        self.run_id = "r"
        self.effects_path = self.in_folder("effects")

    def words(self, flow: str, *extra: str) -> list[str]:
        """Return the line that begins the run, or goes on with it when it has begun."""
        resume = ["--resume"] if self.has_begun else []
        return ["up", f"flows.py:{flow}", *resume, "--run-id", self.run_id, *extra]

    @property
    def has_begun(self) -> bool:
        if not os.path.exists(self.path):
            return False
        with contextlib.suppress(sqlite3.OperationalError):  # the tables are not there yet
            return bool(self.read("select 1 from _smithers_runs where run_id = ?", self.run_id))
        return False

    def life(self, flow: str, *extra: str, start: Seq[str] = MODULE, **env: str) -> Child:
        """Start one life of a served run, in a process of its own."""
        env.setdefault("EFFECTS", self.effects_path)
        words = self.words(flow, "--serve", "--port", "0", *extra)
        return Child(*start, *words, folder=self.folder, **env)

    def live(self, flow: str, *extra: str) -> tuple[int, str, str]:
        """Live one life in this process, without a server, to its end."""
        return self.main(*self.words(flow, *extra), EFFECTS=self.effects_path)

    def live_apart(self, flow: str, *extra: str) -> tuple[int, str, str]:
        """Live one life in a process of its own, without a server, to its end."""
        words = self.words(flow, *extra)
        return run_child(*MODULE, *words, folder=self.folder, EFFECTS=self.effects_path)

    def end_life(self, flow: str, until: str, number: int) -> int:
        """Live until a line has come, then send a signal; return the exit code."""
        with self.life(flow) as child:
            child.wait_for(until)
            code, _ = child.finish(number)
        self.said = child.text()
        return code

    def effects(self) -> list[str]:
        if not os.path.exists(self.effects_path):
            return []
        with open(self.effects_path, encoding="utf-8") as file:
            return file.read().splitlines()

    def read(self, sql: str, *parameters: Any) -> list[Any]:
        return read_rows(self.path, sql, *parameters)

    def row(self) -> tuple[str, str | None]:
        """Return status and owner of the run."""
        return read_rows(self.path, RUN_ROW, self.run_id)[0]

    def ends(self, node_id: str) -> list[str]:
        """Return the states of a node's attempts."""
        sql = "select state from _smithers_attempts where run_id = ? and node_id = ?"
        return [row[0] for row in self.read(sql + " order by attempt", self.run_id, node_id)]

    def approve(self) -> None:
        self.decide("approved", "ok", self.run_id)

    def assert_status(self, code: int, status: str, flow: str) -> None:
        """Assert how one more life of the run ends."""
        found, out, err = self.live(flow)
        self.assertEqual((found, json.loads(out)["status"]), (code, status), err)

    def paste(self, said: str, folder: str = "/") -> None:
        """Run the line that was printed in a shell of another folder, to the run's end."""
        line = re.search(r"Go on with: (.*)", said)
        assert line is not None, said
        done = subprocess.run(
            ["sh", "-c", line[1].replace(" --serve", "")],
            cwd=folder,
            env=child_environment(EFFECTS=self.effects_path, PYTHONPATH=""),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(done.stdout)["status"], "finished")


class SuspendTest(FaultCase):
    """SIGTERM and SIGHUP are the machine's: the run goes on later, as if nothing had been."""

    def test_signals_of_machine_suspend(self) -> None:
        """And the line that is printed then goes on, also where a task has moved elsewhere."""
        for flow, number in (("gated", signal.SIGTERM), ("moving", signal.SIGHUP)):
            self.run_id = flow
            with self.subTest(flow=flow, number=number):
                self.assertEqual(self.end_life(flow, "ok waits", number), 3)
                self.assertEqual(self.row(), ("waiting-approval", None))
                sql = "select status from _smithers_approvals where run_id = ?"
                self.assertEqual(self.read(sql, self.run_id), [("requested",)])
                self.approve()
                self.paste(self.said)

    def test_suspended_attempts_run_again(self) -> None:
        """Also a function that looks at its flag and returns early: it has not done its work."""
        for flow, node in (("held", "hold"), ("commanded", "command"), ("polite", "work")):
            self.run_id = flow
            with self.subTest(flow=flow):
                self.assertEqual(self.end_life(flow, "holding", signal.SIGTERM), 3)
                self.assertEqual(self.row(), ("running", None))
                self.assertEqual(self.ends(node), ["cancelled"])
                self.assert_status(0, "finished", flow)
                self.assertEqual(self.ends(node), ["cancelled", "finished"])
        self.assertEqual(self.effects().count("before 0 done"), 1)
        output = self.read("select output_json from _smithers_outputs where run_id = 'polite'")
        self.assertEqual(output, [('{"done":3}',)])

    def test_three_suspended_lives_are_no_crash(self) -> None:
        for _ in range(4):
            with self.life("pool_held", start=HASTY) as child:
                child.wait_for("held.* started")
                self.assertEqual(child.finish(signal.SIGTERM)[0], 3)
        self.assertEqual(self.ends("held"), ["cancelled"] * 4)

    def test_printed_line_goes_on_from_anywhere(self) -> None:
        """Also when it was started with relative files, and a module of the working folder."""
        os.mkdir(self.in_folder("sub"))
        shutil.move(self.in_folder("flows.py"), self.in_folder("sub"))
        source = "from concurrent.futures import ThreadPoolExecutor\nmake = ThreadPoolExecutor\n"
        self.write("pools.py", source)
        self.write("token", "secret\n")
        words = ["up", "sub/flows.py:gated", "--run-id", self.run_id, "--serve", "--port", "0"]
        words += ["--executor", "pools:make", "--auth-token-file", "token"]
        with Child(*MODULE, *words, folder=self.folder, PYTHONPATH=HERE) as child:
            child.wait_for("ok waits")
            self.assertEqual(child.finish(signal.SIGTERM)[0], 3)
        self.approve()
        for folder in (self.folder, "/"):
            self.paste(child.text(), folder)

    def test_line_is_printed_without_working_folder(self) -> None:
        home = self.in_folder("home")
        os.mkdir(home)
        words = ["up", "../flows.py:gated", "--run-id", self.run_id, "--serve", "--port", "0"]
        with Child(*MODULE, *words, "--db", "../smithers.db", folder=home) as child:
            child.wait_for("ok waits")
            os.rmdir(home)
            self.assertEqual(child.finish(signal.SIGTERM)[0], 3, child.text())
        self.assertNotIn("Traceback", child.text())
        self.approve()
        self.paste(child.text())


class ResumeTest(FaultCase):
    def test_looking_at_ended_run_changes_nothing(self) -> None:
        self.assertEqual(self.live("failing")[0], 1)
        before = rows(self.path)
        self.assert_status(1, "failed", "failing")
        self.assertEqual((rows(self.path), self.effects()), (before, ["broken 0 begin"]))
        self.assertEqual(self.live("failing", "--retry")[0], 1)
        self.assertEqual(self.effects(), ["broken 0 begin", "broken 1 begin"])

    def test_acknowledged_cancel_survives_kill(self) -> None:
        with self.life("ignoring") as child:
            child.wait_for("holding")
            self.assertEqual(ask(child.port, "POST", "/cancel").status, 200)
            child.finish(signal.SIGKILL)
        self.assert_status(2, "cancelled", "ignoring")
        self.assertEqual(self.effects(), ["deaf 0 begin"])

    def test_rest_of_retry_delay_is_kept(self) -> None:
        with self.life("delayed", DELAY="3600") as child:
            child.wait_for("will be tried again in 60 min: 2nd attempt of 2$")
            child.finish(signal.SIGKILL)
        with self.life("delayed", DELAY="3600") as child:
            self.assertEqual(ask(child.port, "GET", "/").body["status"], "running")
            self.assertEqual(child.finish(signal.SIGTERM)[0], 3)
        self.assertEqual(self.effects(), ["flaky 0 begin"])

    def test_cancel_of_suspended_run_is_final(self) -> None:
        self.assertEqual(self.end_life("held", "holding", signal.SIGTERM), 3)
        self.cancel(self.run_id, self.adapter())
        self.assertEqual(self.live("held")[0], 2)
        self.assertEqual(self.effects(), ["before 0 done", "hold 0 begin"])


class LeftoverTest(FaultCase):
    """No work without an engine."""

    def commands_pid(self) -> int:
        return int(self.effects()[0].split()[-1])

    def test_command_is_ended_before_new_attempt(self) -> None:
        for number in (signal.SIGKILL, signal.SIGHUP):
            self.run_id = f"run-{number}"
            self.effects_path = self.in_folder(self.run_id)
            with self.subTest(number=number):
                self.end_life("commanded", "holding", number)
                pid = self.commands_pid()
                self.assert_status(0, "finished", "commanded")
                self.assertFalse(is_process(pid))
                self.assertEqual(
                    self.effects()[1:],
                    [f"command 1 begin {self.effects()[1].split()[-1]}", "command 1 done",
                     "after 0 done"],
                )  # fmt: skip

    def test_whole_group_of_command_is_ended(self) -> None:
        """Also processes in it that have cleared their environment."""
        self.end_life("grandchild", "holding", signal.SIGKILL)
        eventually(lambda: any(line.startswith("child") for line in self.effects()))
        pid = self.commands_pid()
        self.assertTrue(is_process(pid))
        self.assert_status(0, "finished", "grandchild")
        self.assertFalse(is_process(pid))

    def test_same_run_id_elsewhere_is_left_alone(self) -> None:
        """A run of another database has its own commands."""
        other = self.in_folder("other.effects")
        with self.life("commanded", "--db", "other.db", EFFECTS=other) as neighbour:
            neighbour.wait_for("holding")
            self.assertFalse(self.has_begun)
            self.end_life("commanded", "holding", signal.SIGKILL)
            with open(other, encoding="utf-8") as file:
                pid = int(file.readline().split()[-1])
            self.assertEqual(self.live("commanded")[0], 0)
            self.assertTrue(is_process(pid), "the neighbour's command was killed")
            neighbour.finish(signal.SIGTERM)

    def test_pool_workers_end_with_engine(self) -> None:
        flags = ("--executor", "flows:make_pool")
        with self.life("pool_held", *flags) as child:
            eventually(lambda: bool(self.effects()))
            workers = children_of(child.pid)
            self.assertTrue(workers)
            child.process.kill()
            child.process.wait(PATIENCE)
            try:
                eventually(lambda: not any(is_process(pid) for pid in workers))
            finally:
                for pid in filter(is_process, workers):
                    os.kill(pid, signal.SIGKILL)

    def test_first_process_buries_what_commands_leave(self) -> None:
        """And nothing else: who waits for a child of its own gets its status."""
        alone = next(filter(self.can_unshare, (("-pf",), ("-Urpf",))), None)
        if alone is None:
            self.skipTest("needs unshare, and the right to make a process namespace")
        lively = (
            "import sys, smithers_serve as ss; ss.HEARTBEAT_SECONDS = 0.05; sys.exit(ss.main())"
        )
        words = (*alone, "--mount-proc", sys.executable, "-c", lively, *self.words("first"))
        code, _, err = run_child(*words, python="unshare", folder=self.folder)
        self.assertEqual(code, 0, err)
        outputs = dict(self.read("select node_id, output_json from _smithers_outputs"))
        self.assertEqual(outputs["buried"], '{"pid":1,"left":0}')
        self.assertEqual(outputs["own"], "[7,7,7,7,7,7]")

    @staticmethod
    def can_unshare(flags: tuple[str, ...]) -> bool:
        with contextlib.suppress(OSError):
            command = ["unshare", *flags, "--mount-proc", "true"]
            return subprocess.run(command, capture_output=True).returncode == 0
        return False


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        direct = [int(word) for word in file.read().split()]
    every = set(direct)
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
            every.update(int(word) for word in file.read().split())
    return sorted(every)


def pool_context() -> None:
    CONTEXT_LEFT.set("dirty")
    decimal.getcontext().prec = 3


def pool_context_seen() -> list[Any]:
    return [CONTEXT_LEFT.get(), decimal.getcontext().prec]


CONTEXT_LEFT: contextvars.ContextVar[str] = contextvars.ContextVar("left", default="clean")


def fork_line() -> None:
    current_task().log("a line")


class IsolationTest(RunCase):
    """No attempt reaches into the next one."""

    def pools(self) -> Iterator[tuple[str, Any]]:
        fork = multiprocessing.get_context("fork")
        yield "own threads", None
        for name, pool in (
            ("threads", concurrent.futures.ThreadPoolExecutor(1)),
            ("processes", concurrent.futures.ProcessPoolExecutor(1, mp_context=fork)),
        ):
            with pool:
                yield name, pool

    def test_context_of_attempt_ends_with_it(self) -> None:
        for name, pool in self.pools():
            with self.subTest(executor=name):
                tree = [Task("a", pool_context), Task("b", pool_context_seen)]
                self.drive(tree, name.replace(" ", "-"), executor=pool)
                seen = self.output("b", run_id=name.replace(" ", "-"))
                self.assertEqual(seen, ["clean", 28])

    def test_forked_workers_lines_arrive(self) -> None:
        """Also those of the attempt whose submission has forked the worker."""
        for name, pool in self.pools():
            run_id = name.replace(" ", "-")
            with self.subTest(executor=name):
                self.drive([Task("a", fork_line)], run_id, executor=pool)
                told = self.told("NodeOutput", run_id=run_id)
                self.assertEqual(told, ["NodeOutput a 0 0 a line stdout"])


class PoisonTest(FaultCase):
    def lives(self, *extra: str) -> list[int]:
        """Live on until a life ends by itself; return the exit codes."""
        codes: list[int] = []
        while len(codes) < 12 and (not codes or codes[-1] == -signal.SIGKILL):
            codes.append(self.live_apart(*extra)[0])
        return codes

    def test_task_that_kills_its_process_fails(self) -> None:
        self.assertEqual(self.lives("poisoned"), [-signal.SIGKILL] * 3 + [0])
        effects = self.effects()
        self.assertEqual(sum(line.startswith("poison ") for line in effects), 3)
        self.assertTrue(all(any(f"{node} {n} done" in effects for n in range(4))
                            for node in ("good", "other")))  # fmt: skip
        self.assertIn("after 0 done", effects)
        error = self.read("select error_json from _smithers_attempts where node_id = 'poison'")
        self.assertIn("TASK_CRASHED", str(error[-1][0]))

    def test_broken_pool_is_made_anew(self) -> None:
        code, out, err = self.live_apart("pooled", "--executor", "flows:make_pool")
        self.assertEqual(code, 0, err)
        effects = self.effects()
        self.assertEqual(sum(line.startswith("poison ") for line in effects), 3)
        for number in range(3):
            self.assertEqual(
                len([e for e in effects if re.fullmatch(rf"good{number} \d done", e)]), 1
            )


class TaskEndTest(RunCase):
    """The end of a task is told when it has come, with all that was said before."""

    def test_last_output_of_command_is_kept(self) -> None:
        """Also when it has exited between the last look at its pipe and the look at itself."""
        poll = subprocess.Popen.poll

        def poll_late(process: subprocess.Popen[bytes]) -> int | None:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            return poll(process)

        command = ["sh", "-c", "sleep 0.15; echo RESULT; echo REASON >&2; exit $1", "sh"]
        with mock.patch.object(subprocess.Popen, "poll", poll_late):
            tree = [Task("good", [*command, "0"]), Task("bad", [*command, "1"])]
            self.drive(tree)
        found = self.output("good")
        self.assertEqual((found["stdout"], found["stderr"]), ("RESULT\n", "REASON\n"))
        self.assertTrue(self.error_of("bad")["message"].endswith(": REASON"))

    def test_writing_grandchild_holds_no_task_open(self) -> None:
        script = "(for n in $(seq 4000); do echo tick; sleep 0.01; done) & echo started"
        live = self.start([Task("command", ["sh", "-c", script])])
        self.assertEqual(live.end().status, "finished")
        self.assertTrue(self.output("command")["stdout"].startswith("started\n"))

    def test_last_words_of_stopped_command_arrive(self) -> None:
        script = 'trap "echo bye; exit 1" TERM; echo ready; while :; do sleep 0.01; done'
        live = self.start([Task("command", ["sh", "-c", script])])
        live.wait("NodeOutput command 0 0 ready")
        self.cancel()
        self.assertEqual(live.end().status, "cancelled")
        self.assertIn("NodeOutput command 0 0 bye stdout", self.told("NodeOutput"))


class LeavingTest(FaultCase):
    """Whatever a task or a workflow file does, the process tells its end and leaves."""

    def test_error_without_folder_is_told(self) -> None:
        home = self.in_folder("home")
        os.mkdir(home)
        words = ("up", "../flows.py:homeless", "--run-id", self.run_id, "--db", self.path)
        code, _, err = run_child(*MODULE, *words, folder=home)
        self.assertEqual(code, 3, err)
        errors = self.read("select error_json from _smithers_attempts where node_id = 'lose'")
        self.assertEqual(json.loads(errors[0][0])["message"], "no folder")

    def test_workflow_that_exits_fails_run(self) -> None:
        code, _, err = self.live("exiting")
        self.assertIn("SystemExit: usage", err)
        self.assertEqual((code, self.row()), (1, ("failed", None)))

    def test_foreign_threads_hold_no_process(self) -> None:
        for flow in ("to_thread", "thread"):
            for number, expected in ((signal.SIGINT, 2), (signal.SIGTERM, 3)):
                self.run_id = f"{flow}-{number}"
                with self.subTest(flow=flow, number=number):
                    with self.life(flow, start=HASTY) as child:
                        child.wait_for("holding")
                        child.process.send_signal(number)
                        self.assertEqual(child.process.wait(PATIENCE), expected)


class SecondSignalTest(FaultCase):
    """A second signal within the grace: the process leaves at once, and nothing is forgotten."""

    def twice(self, flow: str, first: int, second: int) -> tuple[int, str]:
        """Send two signals, the other after the first was told; return exit code and stdout."""
        with self.life(flow) as child:
            child.wait_for("holding")
            child.process.send_signal(first)
            child.wait_for("Stopping")
            with self.assertRaises(subprocess.TimeoutExpired):
                child.process.wait(2 * ss.SAME_SIGNAL_SECONDS)
            return child.finish(second)

    def test_second_signal_leaves_at_once(self) -> None:
        self.assertEqual(self.twice("ignoring", signal.SIGTERM, signal.SIGTERM), (3, ""))
        self.assertEqual(self.ends("deaf"), ["in-progress"])
        self.assertEqual(self.row()[0], "running")

    def test_cancel_counts_after_second_signal(self) -> None:
        for second in (signal.SIGINT, signal.SIGTERM):
            self.run_id = f"run-{second}"
            with self.subTest(second=second):
                self.assertEqual(self.twice("ignoring", signal.SIGINT, second), (2, ""))
                self.assert_status(2, "cancelled", "ignoring")
        self.assertEqual(self.effects(), ["deaf 0 begin"] * 2)

    def test_second_signal_leaves_no_command(self) -> None:
        self.twice("stubborn", signal.SIGTERM, signal.SIGTERM)
        pid = int(self.effects()[0].split()[1])
        eventually(lambda: not is_process(pid))  # it has been killed, but takes a moment to die


class ClockTest(RunCase):
    """One clock decides a deadline, and it is looked at again and again."""

    def gate(self, timeout: float) -> Approval:
        return Approval("gate", timeout=timeout, on_timeout="deny", on_deny="continue")

    def test_gate_expires_though_clock_steps_back(self) -> None:
        with stepping_clock() as clock:
            live = self.start([self.gate(0.3)])
            live.wait("NodeWaitingApproval")
            clock.offset_ms -= 20
            self.assertEqual(live.end().status, "finished")

    def test_retry_comes_though_clock_steps_back(self) -> None:
        def flaky() -> None:
            if current_task().attempt == 0:
                raise ValueError("not yet")

        with stepping_clock() as clock:
            live = self.start([Task("flaky", flaky, retries=1, retry_delay=0.3)])
            live.wait("NodeRetrying")
            clock.offset_ms -= 20
            self.assertEqual(live.end().status, "finished")

    def test_sleep_past_deadline_expires_gate(self) -> None:
        """The machine slept: the wall clock has gone on, the other one has not."""
        with stepping_clock() as clock:
            live = self.start([self.gate(3600)])
            live.wait("NodeWaitingApproval")
            clock.offset_ms += 3_600_000
            self.assertEqual(live.end().status, "finished")

    def test_gates_expire_beside_chatty_task(self) -> None:
        gates = [
            Approval(f"gate{n}", timeout=0.2 + n / 100, on_timeout="deny", on_deny="continue")
            for n in range(20)
        ]
        decided: list[ss.Event] = []
        is_over = threading.Event()

        def see(event: ss.Event) -> None:
            if event.type == "ApprovalDenied":
                decided.append(event)
            if len(decided) == len(gates):
                is_over.set()

        def chat() -> None:
            for _ in range(20_000):
                current_task().log("and another thing")
                if is_over.is_set():
                    return

        tree = Workflow("test", Parallel(Task("chat", chat), *gates))
        ss.run_workflow(tree, adapter=self.db, run_id="r", on_event=see)
        seen = [words.split()[0] for words in self.told("ApprovalDenied", "NodeOutput")]
        self.assertEqual(seen.count("ApprovalDenied"), len(gates))
        after_last = seen[::-1].index("ApprovalDenied")
        self.assertLess(after_last, len(seen) - 20, "they were decided when the talk was over")


class OwnerTest(FaultCase):
    """Who lives is what the kernel says, whatever a clock or a heartbeat says."""

    def write_row(self, **values: Any) -> None:
        """Change the row of the run."""
        for name, value in values.items():
            change(
                self.path,
                f"update _smithers_runs set {name} = {value!r} where run_id = '{self.run_id}'",
            )

    @contextlib.contextmanager
    def write_lock(self) -> Iterator[sqlite3.Connection]:
        """Another program's write transaction, for as long as the block lasts."""
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("pragma busy_timeout = 20000")
            other.execute("begin immediate")
            yield other
            other.execute("rollback")

    def assert_kept(self, flow: str) -> None:
        """Assert that one more engine leaves the run to the one that has it."""
        code, _, err = self.live(flow)
        self.assertEqual(code, 4, err)
        self.assertIn("living process", err)

    @contextlib.contextmanager
    def stopped(self, child: Child) -> Iterator[None]:
        child.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            child.process.send_signal(signal.SIGCONT)

    def test_living_owner_is_kept(self) -> None:
        """Stopped, with a heart that another program's lock keeps from beating, by any clock."""
        heartless = "import smithers_serve as ss, sys; ss.HEARTBEAT_SECONDS = 3600; "
        with self.life("gated", start=("-c", heartless + "sys.exit(ss.main())")) as child:
            child.wait_for("ok waits")
            self.write_row(heartbeat_at_ms=1)
            with self.subTest("stopped"), self.stopped(child):
                self.assert_kept("gated")
            with self.subTest("behind a lock"), self.write_lock():
                self.assert_kept("gated")
            for offset_ms in (7_200_000, -7_200_000):
                with self.subTest("another clock", offset_ms=offset_ms), stepping_clock() as clock:
                    clock.offset_ms = offset_ms
                    self.assert_kept("gated")
            self.approve()
            child.wait_for("Workflow finished")
        self.assertEqual(self.effects(), ["before 0 done", "after 0 done"])

    def test_owner_in_call_that_lets_nobody_run_is_kept(self) -> None:
        """A function of C holds the interpreter: no other thread of the engine moves."""
        os.mkfifo(self.in_folder("fifo"))
        with self.life("frozen", FIFO=self.in_folder("fifo")) as child:
            with open(self.in_folder("fifo"), "w") as fifo:
                eventually(self.effects)
                self.write_row(heartbeat_at_ms=1)
                self.assert_kept("frozen")
                fifo.write("x")
            child.wait_for("Workflow finished")
        self.assertEqual(self.effects(), ["freeze 0 begin", "freeze 0 done", "after 0 done"])

    def test_unseen_owner_behind_write_lock_is_kept(self) -> None:
        """While its heart cannot beat, its silence does not count."""
        self.assertEqual(self.live("gated")[0], 3)
        owner = "elsewhere/boot/pid:[1]|1|1|token"
        self.write_row(runtime_owner_id=owner, heartbeat_at_ms=1, status="running")
        looks: list[ss.Run] = []
        found: queue.SimpleQueue[ss.Life] = queue.SimpleQueue()
        db = self.adapter()
        get_run = db.get_run

        def look(run_id: str) -> ss.Run | None:
            looks.extend(filter(None, [get_run(run_id)]))
            return looks[-1]

        def watch() -> None:
            with mock.patch.object(db, "get_run", look):
                found.put(ss.watch_owner(db, self.run_id, seconds=0.2))

        thread = threading.Thread(target=watch)
        with self.write_lock() as other:
            thread.start()
            eventually(lambda: len(looks) > 8 or not found.empty())
            self.assertTrue(found.empty(), "silence behind a lock was taken for death")
            other.execute("update _smithers_runs set heartbeat_at_ms = 2")
            other.execute("commit")
            self.assertEqual(found.get(timeout=PATIENCE), "alive")
            other.execute("begin")
        thread.join()

    def test_lock_for_minutes_is_waited_for(self) -> None:
        """By an engine that runs for as long as it takes; a line that starts says how to go on."""
        self.assertEqual(self.live("gated")[0], 3)
        before = rows(self.path)
        begin = ss.SmithersDb._begin

        def hasty_begin(db: ss.SmithersDb, patience: float, *rest: Any) -> None:
            begin(db, patience / 1000, *rest)  # what is without end stays so

        with (
            mock.patch.object(ss.SmithersDb, "_begin", hasty_begin),
            mock.patch.object(ss.SmithersDb, "BUSY_SECONDS", 0.01),
        ):
            with self.write_lock():
                code, _, err = self.live("gated")
                said = "[smithers] Error: the database is locked by another process; "
                self.assertEqual((code, err), (1, f"{said}the same line tries again\n"))
            self.assertEqual(rows(self.path), before)
            db = self.adapter()
            live = self.start(Task("wait", wait_for_go), "other", db)
            live.wait("NodeStarted")

            with self.write_lock():
                before_go = self.counted(db, "smithers_db_retries")
                GO.set()
                eventually(lambda: self.counted(db, "smithers_db_retries") > before_go + 20)
                self.assertTrue(live.is_running())
            self.assertEqual(live.end().status, "finished")
        self.approve()
        self.assert_status(0, "finished", "gated")

    def test_dead_owner_is_dead(self) -> None:
        """Whatever its heartbeat says, and when its process id was given anew."""
        for how in ("new heartbeat", "used number"):
            self.run_id = how.replace(" ", "-")
            with self.subTest(how=how):
                with self.life("gated") as child:
                    child.wait_for("ok waits")
                    host, _, start, token = str(self.row()[1]).rsplit("|", 3)
                    child.finish(signal.SIGKILL)
                if how == "new heartbeat":
                    self.write_row(heartbeat_at_ms=2**45)
                else:
                    other = "|".join([host, str(os.getppid()), start, token])
                    self.write_row(runtime_owner_id=other)
                self.approve()
                self.assert_status(0, "finished", "gated")

    def test_unseen_owner_lives_by_its_heart(self) -> None:
        """Not by what its clock says: by whether the heartbeat moves."""
        self.assertEqual(self.live("gated")[0], 3)
        far = ss.now_ms() + 7_200_000
        stop = threading.Event()

        def beat() -> None:
            beats = 0
            while not stop.wait(0.2):
                beats += 1
                self.write_row(heartbeat_at_ms=beats)

        owner = "elsewhere/boot/pid:[1]|1|1|token"
        self.write_row(runtime_owner_id=owner, heartbeat_at_ms=1, status="running")
        heart = threading.Thread(target=beat)
        brief = mock.patch.object(ss, "watch_owner", functools.partial(ss.watch_owner, seconds=1.0))
        brief.start()
        self.addCleanup(brief.stop)
        heart.start()
        try:
            code, _, err = self.live("gated")
        finally:
            stop.set()
            heart.join()
        self.assertEqual(code, 4, err)
        self.write_row(heartbeat_at_ms=far)
        self.cancel(self.run_id, self.adapter())
        self.assertEqual(self.row(), ("cancelled", None))


class FileTest(FaultCase):
    """The file under the run."""

    def test_removed_or_moved_file_ends_engine(self) -> None:
        for how in ("removed", "moved", "replaced"):
            self.run_id = how
            self.effects_path = self.in_folder("effects." + how)
            with self.subTest(how=how), self.life("held") as child:
                child.wait_for("holding")
                os.rename(self.path, self.path + ".old")
                if how == "removed":
                    os.remove(self.path + ".old")
                elif how == "replaced":
                    ss.SmithersDb(self.path).close()
                line = child.wait_for("Engine stopped: (.*)")
                self.assertIn("removed or replaced", line)
                self.assertEqual(child.finish()[0], 1)
                self.assertEqual(self.effects(), ["before 0 done", "hold 0 begin"])
            for name in os.listdir(self.folder):
                if name.startswith("smithers.db"):
                    os.remove(self.in_folder(name))

    def test_many_processes_open_one_new_file(self) -> None:
        script = """
import multiprocessing, os, sys
import smithers_serve as ss
def open_one(path, barrier, failures):
    barrier.wait()
    try:
        ss.SmithersDb(path).close()
    except Exception as error:
        failures.put(str(error))
context = multiprocessing.get_context("fork")
failures = context.SimpleQueue()
for round in range(8):
    barrier = context.Barrier(6)
    every = [context.Process(target=open_one, args=(f"{sys.argv[1]}/{round}.db", barrier, failures))
             for _ in range(6)]
    for process in every: process.start()
    for process in every: process.join()
while not failures.empty(): print(failures.get())
"""
        self.assertEqual(run_child("-c", script, self.folder), (0, "", ""))

    def test_log_shrinks_when_reader_has_left(self) -> None:
        output = ss.to_json("x" * 1_000_000)

        def write(db: ss.SmithersDb, count: int) -> None:
            for number in range(count):
                with db.transaction("r") as tx:
                    tx.put_output((f"node{number}", 0), output)

        with ss.SmithersDb(self.path) as db:
            write(db, 1)
            with contextlib.closing(sqlite3.connect(self.path)) as reader:
                reader.execute("begin")
                reader.execute("select count(*) from _smithers_outputs").fetchone()
                write(db, 12)
                self.assertGreater(os.path.getsize(self.path + "-wal"), 10_000_000)
            write(db, 3)
            self.assertLess(os.path.getsize(self.path + "-wal"), 6_000_000)

    def test_file_behind_dangling_link_is_private(self) -> None:
        link = self.in_folder("link.db")
        os.symlink("target.db", link)
        ss.SmithersDb(link).close()
        mode = os.stat(self.in_folder("target.db")).st_mode
        self.assertEqual(stat.S_IMODE(mode), 0o600)


class ForkTest(FaultCase):
    """Children keep nothing that is ours."""

    def end_children(self) -> None:
        for line in self.effects():
            pid = line.split()[-1]
            if pid.isdecimal() and is_process(int(pid)):
                os.kill(int(pid), signal.SIGKILL)

    def test_children_hold_no_sockets(self) -> None:
        """Neither the port nor a client's connection outlives the process that listened."""
        for flow, extra in (("forking", ()), ("pool_held", ("--executor", "flows:make_pool"))):
            self.run_id = flow
            self.effects_path = self.in_folder("effects." + flow)
            self.addCleanup(self.end_children)
            with self.subTest(flow=flow), self.life(flow, *extra) as child:
                port = child.port
                with EventReader(port) as before:
                    eventually(lambda: bool(self.effects()))
                    with EventReader(port) as after:
                        child.process.kill()
                        child.process.wait(PATIENCE)
                        for reader in (before, after):
                            with contextlib.suppress(ConnectionError):
                                receive(reader.socket)  # to the end, which comes
                with contextlib.closing(socket.socket()) as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind((LOOPBACK, port))
                    sock.listen(1)
                self.end_children()  # they hold what reads our stderr

    def test_child_that_returns_is_no_engine(self) -> None:
        code, out, err = self.live_apart("returning")
        self.assertEqual((code, out.count("runId")), (0, 1), err)
        self.assertEqual(self.ends("twice"), ["finished"])
        found = self.read("select output_json from _smithers_outputs where node_id = 'twice'")
        self.assertEqual(found, [('{"is_child":false}',)])
        self.assertEqual(self.effects(), ["after 0 done"])

    def test_signal_at_fork_ends_child(self) -> None:
        """A pool that broke ends workers as young as that; a deaf one is waited for for ever."""
        script = """
import os, signal, sys
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
import smithers_serve
sys.exit(smithers_serve.main(sys.argv[1:]))
"""
        code, _, err = run_child("-c", script, *self.words("waiting"), folder=self.folder)
        self.assertEqual(code, 0, err)
        found = self.read("select output_json from _smithers_outputs")
        self.assertEqual(found, [(str(int(signal.SIGTERM)),)])

    def test_detaching_returns_though_factory_has_forked(self) -> None:
        self.addCleanup(self.end_children)
        words = self.words("gated", "--serve", "--port", "0", "--executor", "flows:make_forked")
        options = {"folder": self.folder, "EFFECTS": self.effects_path}
        with Child(*MODULE, *words, "-d", **options) as child:  # its stderr is the children's too
            self.assertEqual(child.process.wait(PATIENCE), 0)
            pid = child.read()["pid"]
            self.end_children()
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not is_process(pid))
        self.end_children()


class StandardStreamTest(FaultCase):
    """Standard streams that are closed, full or left cost no run."""

    def printing(self, shell: str, *flags: str) -> Child:
        """Run a flow that prints, by a shell or with a redirection."""
        shell = shell if "$@" in shell else f'exec "$@" {shell}'
        options = {"shell": shell, "folder": self.folder, "EFFECTS": self.effects_path}
        return Child(*MODULE, *self.words("printing", *flags), **options)

    def test_missing_and_full_streams_are_borne(self) -> None:
        for number, redirection in enumerate(
            ("<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full")
        ):
            self.run_id = f"run-{number}"
            with self.subTest(redirection=redirection), self.printing(redirection) as child:
                code, out = child.finish()
                self.assertNotIn("Traceback", out + child.text())
                self.assertEqual((code, self.row()), (0, ("finished", None)), child.text())
                if redirection == ">/dev/full":
                    said = "The result could not be written: No space left"
                    self.assertIn(said, child.text())

    def test_served_run_needs_no_stderr(self) -> None:
        with self.printing("2>&-", "--serve", "--port", "0") as child:
            eventually(lambda: self.has_begun and self.row()[0] == "finished")
            self.assertEqual(child.finish(signal.SIGTERM)[0], 0)

    def test_reader_may_leave_early(self) -> None:
        shell = 'exec 3>&1; { "$@" 2>&1 >&3 && echo well >&3; } | head -n 1 >&2'
        with self.printing(shell) as child:
            out = child.finish()[1].splitlines()
            self.assertEqual((json.loads(out[0])["status"], out[1:]), ("finished", ["well"]))


class ScaleTest(RunCase):
    """What waits costs nothing."""

    @contextlib.contextmanager
    def tuned(self, tune: Callable[[sqlite3.Connection], None]) -> Iterator[None]:
        """Do something to every connection that the block opens."""
        connect = sqlite3.connect

        def connect_tuned(*args: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*args, **options)
            tune(connection)
            return connection

        with mock.patch.object(ss.sqlite3, "connect", connect_tuned):
            yield

    @contextlib.contextmanager
    def counted_steps(self) -> Iterator[list[int]]:
        """Count the hundreds of sqlite's steps that the block takes."""
        steps = [0]

        def count() -> int:
            steps[0] += 1
            return 0

        with self.tuned(lambda connection: connection.set_progress_handler(count, 100)):
            yield steps

    def work_of_decisions(self, gates: int) -> int:
        """Return what 20 decisions among open gates take."""
        run_id = f"run-{gates}"
        every = [Approval(f"gate{n}", on_deny="continue") for n in range(gates)]
        with self.counted_steps() as steps:
            db = self.adapter()
            live = self.start([Parallel(*every)], run_id, adapter=db)
            live.wait(PARKS)
            steps[0] = 0
            for number in range(20):
                ss.decide(db, run_id, f"gate{number}", ss.Decision("approved"))
                live.wait(f"NodeFinished gate{number}")
            counted = steps[0]
            self.cancel(run_id)
            live.end()
        return counted

    def test_turns_that_are_over_are_not_kept(self) -> None:
        gate = Approval("gate", timeout=3600)
        for name, child in (
            ("given", Task("a", {"n": 1})), ("called", Task("a", answer, timeout=3600)),
            ("asked", gate), ("nested", loop(Task("a", {}), id="inner")),
        ):  # fmt: skip
            with self.subTest(name=name):
                few, many = (self.held_after(child, turns) for turns in (50, 100))
                self.assertLess(many - few, 50)

    def held_after(self, child: Any, turns: int) -> int:
        """Return how many objects an engine keeps of a run that was a loop with so many turns."""
        run_id = f"{child.id}-{turns}-{type(child).__name__}-{getattr(child, 'timeout', 0)}"

        def decide(event: ss.Event) -> None:
            if event.type == "NodeWaitingApproval":
                decision = ss.Decision("approved", event.payload["iteration"])
                ss.decide(self.db, run_id, "gate", decision)

        tree = Workflow("test", loop(child, turns=turns))
        engine = ss.Engine(tree, self.db, run_id, on_event=decide)
        self.assertTrue(engine.open())
        self.assertEqual(engine.run().status, "finished")
        seen: dict[int, Any] = {}
        rest: list[Any] = [engine._progress, engine._steps, engine._attempts, engine._renderer]
        others = (type, types.ModuleType, types.FunctionType, ss.SmithersDb, ss.Metrics)
        while rest:
            found = rest.pop()
            if id(found) not in seen and not isinstance(found, others):
                seen[id(found)] = found
                rest += gc.get_referents(found)
        return len(seen)

    def test_long_loop_lets_others_have_their_turn(self) -> None:
        """One whose outputs are given has no task to wait for, and no end soon."""
        live = self.start(loop(Task("a", {}), turns=20_000))
        live.wait("NodeFinished a 9")
        self.cancel()
        self.assertEqual(live.end().status, "cancelled")

    def test_decision_reads_no_other_gates(self) -> None:
        with mock.patch.object(ss, "HEARTBEAT_SECONDS", 3600):
            few, many = self.work_of_decisions(30), self.work_of_decisions(600)
        self.assertLess(many, 3 * few + 100)

    def work_of_evidence(self, nodes: int) -> int:
        """Return what it takes to show a gate beside so many nodes."""
        tree = [Task("a", answer), Approval("gate", needs=["a"])]
        ss.run_workflow(as_workflow(tree), adapter=self.db, run_id=f"r{nodes}", park=False)
        change(
            self.path,
            f"""{NUMBERS.format(nodes)}
                insert into _smithers_nodes (run_id, node_id, state, last_attempt)
                select 'r{nodes}', 'n' || n, 'finished', 0 from numbers""",
        )
        with self.counted_steps() as steps, self.adapter().snapshot() as reads:
            steps[0] = 0
            ss.approvals_json(reads, self.run_row(f"r{nodes}"), "requested")
            return steps[0]

    def test_evidence_reads_no_other_nodes(self) -> None:
        few, many = self.work_of_evidence(30), self.work_of_evidence(10_000)
        self.assertLess(many, 3 * few + 100)

    def test_parked_run_reads_no_gates(self) -> None:
        """Beside its heartbeat a parked run asks how many wait, in one statement."""
        statements: list[str] = []
        every = [Approval(f"gate{n}") for n in range(300)]
        with (
            self.tuned(lambda connection: connection.set_trace_callback(statements.append)),
            mock.patch.object(ss, "HEARTBEAT_SECONDS", 0.05),
        ):
            db = self.adapter()
            live = self.start([Parallel(*every)], adapter=db)
            live.wait(PARKS)
            statements.clear()

            def beats() -> int:
                return sum("heartbeat_at_ms = " in text for text in tuple(statements))

            eventually(lambda: beats() >= 5)
            seen = tuple(statements)
            ss.cancel_run(db, "r")
            live.end()
        listed = [text for text in seen if "_smithers_approvals" in text and "count" not in text]
        self.assertEqual(listed, [])
        self.assertLess(len(seen), 30 * (beats() + 1))


# The tables of the original's 0.12.8 that both programs know, as it makes them.
ORIGINAL_SCHEMA = """
CREATE TABLE _smithers_runs (run_id TEXT PRIMARY KEY, workflow_name TEXT NOT NULL,
  workflow_path TEXT, workflow_hash TEXT, status TEXT NOT NULL, created_at_ms INTEGER NOT NULL,
  started_at_ms INTEGER, finished_at_ms INTEGER, heartbeat_at_ms INTEGER, runtime_owner_id TEXT,
  cancel_requested_at_ms INTEGER, hijack_requested_at_ms INTEGER, hijack_target TEXT,
  vcs_type TEXT, vcs_root TEXT, vcs_revision TEXT, error_json TEXT, config_json TEXT);
CREATE TABLE _smithers_nodes (run_id TEXT NOT NULL, node_id TEXT NOT NULL,
  iteration INTEGER NOT NULL DEFAULT 0, state TEXT NOT NULL, last_attempt INTEGER,
  updated_at_ms INTEGER NOT NULL, output_table TEXT NOT NULL, label TEXT,
  PRIMARY KEY (run_id, node_id, iteration));
CREATE TABLE _smithers_attempts (run_id TEXT NOT NULL, node_id TEXT NOT NULL,
  iteration INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL, state TEXT NOT NULL,
  started_at_ms INTEGER NOT NULL, finished_at_ms INTEGER, error_json TEXT, jj_pointer TEXT,
  response_text TEXT, jj_cwd TEXT, cached INTEGER DEFAULT 0, meta_json TEXT,
  PRIMARY KEY (run_id, node_id, iteration, attempt));
CREATE TABLE _smithers_frames (run_id TEXT NOT NULL, frame_no INTEGER NOT NULL,
  created_at_ms INTEGER NOT NULL, xml_json TEXT NOT NULL, xml_hash TEXT NOT NULL,
  mounted_task_ids_json TEXT, task_index_json TEXT, note TEXT, PRIMARY KEY (run_id, frame_no));
CREATE TABLE _smithers_approvals (run_id TEXT NOT NULL, node_id TEXT NOT NULL,
  iteration INTEGER NOT NULL DEFAULT 0, status TEXT NOT NULL, requested_at_ms INTEGER,
  decided_at_ms INTEGER, note TEXT, decided_by TEXT, PRIMARY KEY (run_id, node_id, iteration));
CREATE TABLE _smithers_events (run_id TEXT NOT NULL, seq INTEGER NOT NULL,
  timestamp_ms INTEGER NOT NULL, type TEXT NOT NULL, payload_json TEXT NOT NULL,
  PRIMARY KEY (run_id, seq));
CREATE TABLE _smithers_ralph (run_id TEXT NOT NULL, ralph_id TEXT NOT NULL,
  iteration INTEGER NOT NULL DEFAULT 0, done INTEGER NOT NULL DEFAULT 0,
  updated_at_ms INTEGER NOT NULL, PRIMARY KEY (run_id, ralph_id));
CREATE TABLE input (run_id TEXT PRIMARY KEY, payload TEXT);
INSERT INTO _smithers_runs (run_id, workflow_name, status, created_at_ms, started_at_ms)
  VALUES ('r', 'deploy', 'waiting-approval', 1000, 1000);
INSERT INTO _smithers_nodes VALUES ('r', 'lint', 0, 'finished', 1, 1000, 'a', NULL),
  ('r', 'gate', 0, 'waiting-approval', NULL, 1000, 'c', 'Ship it?');
INSERT INTO _smithers_attempts (run_id, node_id, attempt, state, started_at_ms, finished_at_ms)
  VALUES ('r', 'lint', 1, 'finished', 1000, 1000);
INSERT INTO _smithers_approvals VALUES ('r', 'gate', 0, 'requested', 1000, NULL, NULL, NULL);
INSERT INTO _smithers_frames VALUES ('r', 1, 1000, '{"kind":"element"}', 'hash', NULL, NULL, NULL);
INSERT INTO _smithers_events VALUES ('r', 0, 1000, 'RunStarted',
  '{"type":"RunStarted","runId":"r","timestampMs":1000}');
"""

# How the original writes a node.
ORIGINAL_UPSERT = """
insert into _smithers_nodes
  (run_id, node_id, iteration, state, last_attempt, updated_at_ms, output_table, label)
values ('r', ?, 0, ?, ?, 2000, 'c', null)
on conflict (run_id, node_id, iteration) do update set
  state = excluded.state, last_attempt = excluded.last_attempt,
  updated_at_ms = excluded.updated_at_ms, output_table = excluded.output_table,
  label = excluded.label
"""


class TwoProgramsTest(CommandCase):
    """The original's program on the same file."""

    def setUp(self) -> None:
        super().setUp()
        self.db = self.adapter()

    def theirs(self, *statements: tuple[Any, ...]) -> None:
        """Write as another program does: on its own connection, in one transaction."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=PATIENCE)) as db, db:
            for sql, *parameters in statements:
                db.execute(sql, parameters)

    def original_file(self) -> str:
        path = self.in_folder("original.db")
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(ORIGINAL_SCHEMA)
        return path

    @contextlib.contextmanager
    def serving(self, path: str) -> Iterator[Any]:
        """Yield an app of the original's run."""
        with ss.SmithersDb(path) as db:
            app = ss.create_serve_app(adapter=db, run_id="r", abort=threading.Event())
            with contextlib.closing(app):
                yield app

    def deny_like_original(self) -> None:
        """What its `deny` writes when no engine runs."""
        self.theirs(
            ("update _smithers_approvals set status = 'denied', decided_at_ms = 2000,"
             " requested_at_ms = null where run_id = 'r' and node_id = 'gate'",),
            (ORIGINAL_UPSERT, "gate", "failed", None),
            ("insert into _smithers_events select 'r', max(seq) + 1, 2000, 'ApprovalDenied',"
             """ '{"type":"ApprovalDenied","runId":"r","nodeId":"gate","iteration":0,"""
             """"timestampMs":2000}' from _smithers_events where run_id = 'r'""",),
        )  # fmt: skip

    def test_upserts_of_nodes_are_counted(self) -> None:
        """Also where sqlite turns `insert or ignore` in a trigger into an error."""
        self.drive([Task("a", answer), Approval("gate")], park=False)
        for state in ("in-progress", "finished", "finished"):
            self.theirs((ORIGINAL_UPSERT, "theirs", state, 1), (ORIGINAL_UPSERT, "gate", state, 1))
        self.assertEqual(self.db.get_summary("r"), {"finished": 3})

    def resume_denied(self, on_deny: str) -> tuple[str, str]:
        """Return how a run ends whose gate the original has denied, and what was started then."""
        tree = [Approval("gate", on_deny=on_deny), Task("after", answer)]
        self.drive(tree, park=False)
        self.deny_like_original()
        result = self.drive(tree, resume=True, park=False)
        self.assertEqual(len(self.told("ApprovalRequested")), 1)
        return result.status, self.starts()

    def test_denial_without_engine_is_not_asked_again(self) -> None:
        self.assertEqual(self.resume_denied("fail"), ("failed", ""))

    def test_denial_without_engine_may_continue(self) -> None:
        self.assertEqual(self.resume_denied("continue"), ("finished", "after"))
        self.assertEqual(self.output("gate")["approved"], False)

    def test_wiped_labels_come_back(self) -> None:
        tree = [Approval("gate", title="Ship it?"), Task("after", answer, label="After")]
        self.drive(tree, park=False)

        def labels() -> list[str | None]:
            return [node.label for node in self.db.list_nodes("r")]

        before = labels()
        self.assertNotIn(None, before)
        self.theirs(
            ("update _smithers_approvals set status = 'approved', decided_at_ms = 2000",),
            (ORIGINAL_UPSERT, "gate", "pending", None),
        )
        self.assertEqual(self.drive(tree, resume=True, park=False).status, "finished")
        self.assertEqual(labels(), before)

    def test_run_ended_by_other_program_stops(self) -> None:
        for status in ("cancelled", "failed", "continued"):
            run_id = f"run-{status}"
            with self.subTest(status=status):
                stopped = threading.Event()

                def hold(stopped: threading.Event = stopped) -> None:
                    if current_task().cancelled.wait(PATIENCE):
                        stopped.set()

                live = self.start([Task("hold", hold), Task("after", answer)], run_id)
                live.wait("NodeStarted")
                self.theirs(
                    ("update _smithers_runs set status = ? where run_id = ?", status, run_id)
                )
                self.assertEqual(live.end().status, status)
                self.assertTrue(stopped.is_set())
                self.assertEqual(self.status(run_id), status)
                self.assertEqual(self.states(run_id), {"hold": "cancelled", "after": "pending"})
                # Its log has no end that we know.
                self.theirs(("delete from _smithers_runs where run_id = ?", run_id))

    def test_watching_leaves_file_as_it_is(self) -> None:
        path = self.original_file()
        with open(path, "rb") as file:
            before = file.read()
        with self.serving(path) as app:
            app.request("GET", "/events")
            for route in "/ /frames /metrics /nodes /nodes/gate /approvals /why".split():
                self.assertEqual(app.request("GET", route).status, 200, route)
            summary = {"finished": 1, "waiting-approval": 1}
            self.assertEqual(app.request("GET", "/").json()["summary"], summary)
        for line in ("ps", "status r", "show r", "logs r", "history r", "output r lint"):
            _, _, err = self.main(*line.split(), "--db", path)
            self.assertNotIn("Traceback", err)
        with open(path, "rb") as file:
            self.assertTrue(file.read() == before, "the file was changed")
        found = [name for name in os.listdir(self.folder) if name.startswith("original")]
        self.assertEqual(found, ["original.db"])

    def test_decision_is_written_into_originals_file(self) -> None:
        path = self.original_file()
        with ss.SmithersDb(path) as db:
            ss.decide(db, "r", "gate", ss.Decision("approved", note="go"))
        with contextlib.closing(sqlite3.connect(path)) as theirs:
            row = theirs.execute("select status, requested_at_ms, note from _smithers_approvals")
            self.assertEqual(row.fetchall(), [("approved", 1000, "go")])
            theirs.execute(ORIGINAL_UPSERT, ("gate", "finished", 1))
            theirs.execute(ORIGINAL_UPSERT, ("next", "pending", None))
            theirs.commit()
        with ss.SmithersDb(path) as db:
            self.assertEqual(db.get_summary("r"), {"finished": 2, "pending": 1})

    def test_old_triggers_are_mended_on_open(self) -> None:
        self.db.close()
        change(
            self.path,
            "drop trigger _smithers_nodes_moved",
            """create trigger _smithers_nodes_moved after update of state on _smithers_nodes
               when old.state <> new.state begin
                 insert or ignore into _smithers_summary values (new.run_id, new.state, 0);
                 update _smithers_summary set nodes = nodes + 1
                   where run_id = new.run_id and state = new.state;
               end""",
        )
        self.db = self.adapter()
        self.drive([Approval("gate"), Task("a", answer)], park=False)
        for state in ("finished", "pending", "finished"):
            self.theirs((ORIGINAL_UPSERT, "gate", state, 1))
        self.assertEqual(self.db.get_summary("r"), {"finished": 1, "pending": 1})

    def test_frames_that_are_deltas_are_no_trees(self) -> None:
        path = self.original_file()
        change(
            path,
            "alter table _smithers_frames add column encoding text default 'full'",
            """insert into _smithers_frames (run_id, frame_no, created_at_ms, xml_json, xml_hash,
               encoding) values ('r', 2, 2000, '{"version":1,"ops":[]}', 'hash', 'delta')""",
        )
        with self.serving(path) as app:
            frames = app.request("GET", "/frames").json()
            self.assertNotIn("ops", "".join(frame["xmlJson"] for frame in frames))
            self.assertEqual(frames[-1]["frameNo"], 1)

    def test_unknown_statuses_are_what_they_say(self) -> None:
        """`continued` is an end; `paused` and other ways to wait are none."""
        path = self.original_file()
        for status, is_ended in (("continued", True), ("paused", False), ("waiting-timer", False)):
            change(
                path,
                f"update _smithers_runs set status = '{status}'",
                "update _smithers_approvals set status = 'requested'",
            )
            with self.subTest(status=status), self.serving(path) as app:
                self.assertEqual(app.request("GET", "/").json()["status"], status)
                answer = app.request("POST", "/approve/gate")
                self.assertEqual(answer.status, 409 if is_ended else 200)
                if is_ended:
                    tree = Workflow("deploy", Task("never", fail))
                    result = ss.run_workflow(tree, adapter=app.adapter, run_id="r", resume=True)
                    self.assertEqual(result.status, status)

    def test_its_real_files_are_shown_and_steered(self) -> None:
        shared = os.path.join(HERE, os.pardir, "shared", "interop")
        if not os.path.isdir(shared):
            self.skipTest("the original's files are not beside this checkout")
        for name in sorted(os.listdir(shared)):
            path = shutil.copyfile(os.path.join(shared, name), self.in_folder(name))
            before = rows(path)
            with self.subTest(name), ss.SmithersDb(path, create=False) as db:
                app = ss.create_server_app(adapter=db)
                self.addCleanup(app.close)

                def ask(method: str, path: str, app: Any = app) -> Any:
                    answer = app.request(method, path)
                    self.assertEqual(answer.status, 200, path)
                    return answer.json()

                routes = [f"/v1/runs/{run['runId']}" for run in ask("GET", "/v1/runs")]
                self.assertEqual(len(routes), len(before["_smithers_runs"]))
                for route in routes:
                    for end in ("", "/frames", "/nodes", "/approvals", "/why"):
                        ask("GET", route + end)
                gates = ask("GET", "/v1/approvals")["approvals"]
                for table in ("_smithers_runs", "_smithers_events", "_smithers_approvals"):
                    self.assertEqual(rows(path)[table], before[table])
                for gate in gates:
                    route = f"/v1/runs/{gate['runId']}"
                    ask("POST", f"{route}/nodes/{gate['nodeId']}/approve")
                    ask("POST", f"{route}/cancel")
                    self.assertEqual(ask("GET", route)["status"], "cancelled")


class AccidentTest(ServerCase):
    """Nothing is decided or told by accident."""

    def test_event_id_of_another_run_begins_anew(self) -> None:
        headers = {"Last-Event-ID": str(self.served.newest() + 50)}
        with self.served.listen(headers=headers) as reader:
            self.assertEqual((reader.status, reader.until(0)), (200, 0))

    def test_answers_say_that_file_has_gone(self) -> None:
        served = self.serve(db=self.foreign_database())
        served.run_to_gate()
        os.rename(served.path, served.path + ".old")
        for method, path in (("GET", "/"), ("POST", "/approve/deploy"), ("POST", "/cancel")):
            with self.subTest(path=path):
                reply = served.ask(method, path)
                self.assertGreaterEqual(reply.status, 500)
                self.assertNotIn("locked", reply.body["error"]["message"])


class LineTest(RunCase):
    """What a task says arrives, whole, in order, with its cause."""

    def texts(self, run_id: str = "r") -> list[str]:
        events = self.db.list_events(run_id)
        return [event.payload["text"] for event in events if event.type == "NodeOutput"]

    @unittest.skipUnless(hasattr(asyncio, "TaskGroup"), "asyncio has no TaskGroup here")
    def test_group_errors_name_their_causes(self) -> None:
        async def work() -> None:
            async def break_down() -> None:
                raise ValueError("the disk is full")

            async with asyncio.TaskGroup() as group:
                group.create_task(break_down())
                group.create_task(asyncio.sleep(PATIENCE))

        self.drive([Task("work", work)])
        self.assertIn("ValueError: the disk is full", self.error_of("work")["message"])

    def test_errors_name_what_caused_them(self) -> None:
        def work() -> None:
            try:
                raise KeyError("host")
            except KeyError as error:
                raise RuntimeError("no settings") from error

        self.drive([Task("work", work)])
        self.assertEqual(
            self.error_of("work")["message"], "no settings (caused by KeyError: 'host')"
        )

    def test_blank_lines_and_rests_arrive(self) -> None:
        ways = {
            "command": ["printf", r"a\n\nb\r\n\n  c"],
            "printed": lambda: print("a\n\nb\r\n\n  c", end=""),
            "logged": lambda: current_task().log("a\n\nb\r\n\n  c"),
        }
        with contextlib.redirect_stdout(io.StringIO()):
            self.drive([Task(name, way) for name, way in ways.items()])
        self.assertEqual(self.texts(), ["a", "", "b", "", "  c"] * len(ways))

    def test_prints_of_any_kind_are_their_nodes(self) -> None:
        def redirect() -> str:
            with contextlib.redirect_stdout(io.StringIO()) as kept:
                print("kept")
            print("told")
            return kept.getvalue()

        def replace() -> None:
            own, sys.stdout = sys.stdout, io.StringIO()
            print("kept")
            sys.stdout = own

        def go_on() -> None:
            for _ in range(3):
                print(".", end="", flush=True)
            sys.stderr.write("half")
            print("done")

        for name, run, expected in (
            ("surrogate", lambda: print("a\ud800b"), ["a?b"]),
            ("bytes", lambda: print(b"\xff", "\0"), ["b'\\xff' \0"]),
            ("long", lambda: print("x" * 20_000), ["x" * 8192, "x" * 8192, "x" * 3616]),
            ("pieces", go_on, ["...done", "half"]),
            ("lines", lambda: sys.stdout.writelines(["a\n", "b\n"]), ["a", "b"]),
            ("redirected", redirect, ["told"]),
            ("replaced", replace, []),
        ):
            with self.subTest(name=name), contextlib.redirect_stdout(io.StringIO()):
                with contextlib.redirect_stderr(io.StringIO()):
                    result = self.drive([Task(name, run)], run_id=name)
                self.assertEqual(result.status, "finished", result.error)
                self.assertEqual(self.texts(name), expected)
        self.assertEqual(self.output("redirected", run_id="redirected"), "kept\n")

    def test_prints_of_many_are_told_apart(self) -> None:
        meet = threading.Barrier(4)

        async def talk() -> None:
            meet.wait(PATIENCE)
            for number in range(20):
                print(current_task().node_id, end="")
                await asyncio.sleep(0)
                print("", number)

        ids = "a b c d".split()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.drive([Parallel(*[Task(id, talk) for id in ids])])
        for id in ids:
            found = [e.payload for e in self.db.list_events("r") if e.type == "NodeOutput"]
            texts = [line["text"] for line in found if line["nodeId"] == id]
            self.assertEqual(texts, [f"{id} {number}" for number in range(20)])
        self.assertEqual(out.getvalue().count("\n"), 80)  # and nothing is taken away

    def test_characters_at_edges_stay_whole(self) -> None:
        """Of a read, of a kept tail, of a long line."""
        text = "aé€😀" * 30_000
        script = "import sys; sys.stdout.buffer.write(('aé€😀' * 30_000).encode())"
        self.drive([Task("command", [sys.executable, "-c", script])])
        self.assertEqual("".join(self.texts()), text)
        self.assertLessEqual(max(map(len, self.texts())), ss.MAX_LOG_LINE)
        kept = self.output("command")["stdout"]
        self.assertTrue(text.endswith(kept))
        self.assertGreater(len(kept.encode()), ss.COMMAND_TAIL_BYTES - 4)

    def test_lines_are_the_same_in_any_pieces(self) -> None:
        limit = ss.MAX_LOG_LINE
        for text in ("a\r\nb\n\nc\r", "x" * limit + "\r\ny\n", "x" * (limit - 1) + "\r\ny\n",
                     "x" * (2 * limit) + "\n", "x" * (limit + 1) + "\r\n\r\n"):  # fmt: skip
            whole = ss.Lines()
            expected = whole.feed(text) + whole.rest()
            for size in (1, 2, 7, limit, limit + 1):
                with self.subTest(text=f"{len(text)} characters", size=size):
                    lines, found = ss.Lines(), []
                    for at in range(0, len(text), size):
                        found += lines.feed(text[at : at + size])
                    self.assertEqual(found + lines.rest(), expected)


class MinorFaultTest(FaultCase):
    def test_no_thread_left_fails_tasks(self) -> None:
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith("smithers-task"):
                raise RuntimeError("can't start new thread")
            start(thread)

        tasks = [Task(f"t{number}", answer, continue_on_fail=True) for number in range(20)]
        with ss.SmithersDb(self.path) as db:
            with mock.patch.object(threading.Thread, "start", refuse):
                tree = Workflow("w", Parallel(*tasks))
                result = ss.run_workflow(tree, adapter=db, run_id="r")
            self.assertEqual(result.status, "finished")
            self.assertEqual(db.get_summary("r"), {"failed": 20})

    def test_linked_workflow_finds_its_siblings(self) -> None:
        os.mkdir(self.in_folder("real"))
        self.write("real/sibling.py", "def work():\n    return 7\n")
        self.write(
            "real/flow.py",
            "from sibling import work\nfrom smithers_serve import Task, Workflow\n"
            'workflow = Workflow("w", Task("a", work))\n',
        )
        os.symlink("real/flow.py", self.in_folder("link.py"))
        code, _, err = self.main("up", "link.py")
        self.assertEqual(code, 0, err)

    def test_detaching_a_living_run_is_refused(self) -> None:
        with self.life("gated") as child:
            child.wait_for("ok waits")
            log = self.write(f"smithers-{self.run_id}.log", "what was said before\n")
            for extra in ((), ("--resume",)):
                words = ["up", "flows.py:gated", "--run-id", self.run_id, "--serve", "--port", "0"]
                code, out, err = run_child(*MODULE, *words, *extra, "-d", folder=self.folder)
                self.assertEqual((code, out), (4, ""), err)
                self.assertRegex(err, r"\A\[smithers\] Error: .*\n\Z")
                with open(log, encoding="utf-8") as file:
                    self.assertEqual(file.read(), "what was said before\n")
            child.finish(signal.SIGTERM)


# ---------------------------------------------------------------------------
# Many runs
# ---------------------------------------------------------------------------

MANY_FLOWS = r"""
import os, signal, sys, time
from smithers_serve import Approval, Loop, Parallel, Task, Workflow, current_task

def step():
    return {"pid": os.getpid(), "in": os.getcwd()}

def hold():
    task = current_task()
    task.log("holding")
    while not os.path.exists(f"go-{task.run_id}") and not task.cancelled.wait(0.01):
        pass
    if task.cancelled.is_set():
        raise RuntimeError("told to stop")
    return task.attempt

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def workflow(ctx):
    return Workflow("two", Task("one", step, label=str(ctx.input.get("n"))), Task("two", step))

gated = Workflow("gated", Task("before", step), Approval("ok"), Task("after", step))
timed = Workflow("timed", Approval("ok", timeout=0.3, on_timeout="approve"),
                 Task("after", step))
held = Workflow("held", Task("before", step), Task("hold", hold), Task("after", step))

def slowly_timed(ctx):
    seconds = ctx.input.get("seconds", 1.2)
    return Workflow("timed", Approval("ok", timeout=seconds, on_timeout="approve"))

def finish_slowly():
    current_task().log("holding")
    current_task().cancelled.wait(60)
    current_task().log("leaving")
    time.sleep(0.5)
    return {}

slow_to_leave = Workflow("slow", Task("hold", finish_slowly), Task("after", step))
gated_hold = Workflow("gated", Task("before", step), Approval("ok"), Task("hold", hold))

def broken(ctx):
    return Workflow("broken", Task("fail", ["test", "-e", f"go-{ctx.run_id}"]),
                    Task("after", step))

def gated_leaving(ctx):
    if os.path.exists(f"go-{ctx.run_id}"):
        os._exit(3)
    return gated

poisoned = Workflow("poisoned", Task("poison", die))

def leaving(ctx):
    print("leaving for", ctx.run_id, file=sys.stderr, flush=True)
    os._exit(ctx.input["code"])

number = 7
"""


class Many:
    """A folder with workflows, and a server of its runs, one process after another."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.root = os.path.join(folder, "flows")
        self.path = os.path.join(folder, "smithers.db")
        os.mkdir(self.root)
        self.write("jobs.py", MANY_FLOWS)

    def write(self, name: str, text: str) -> str:
        path = os.path.join(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def go(self, run_id: str) -> None:
        """Let a task that holds go on."""
        self.write(f"go-{run_id}", "")

    def start(self, *flags: str, command: Seq[str] = MODULE, **env: str) -> Child:
        """Start the server's next life; it serves on return."""
        words = ("server", "--root", "flows", "--port", "0", *flags)
        self.child = Child(*command, *words, folder=self.folder, **env)
        self.port = self.child.port
        return self.child

    def ask(self, method: str, path: str, *body_and_headers: Any) -> Reply:
        return ask(self.port, method, path, *body_and_headers)

    def post(self, workflow: str, run_id: str, **body: Any) -> Reply:
        return self.ask("POST", "/v1/runs", {"workflowPath": workflow, "runId": run_id, **body})

    def read(self, sql: str, *parameters: Any) -> list[Any]:
        return read_rows(self.path, sql, *parameters)

    def row(self, run_id: str) -> tuple[str, str | None]:
        """Return status and owner of a run."""
        found: tuple[str, str | None] = self.read(RUN_ROW, run_id)[0]
        return found

    def worker_of(self, run_id: str) -> int:
        """Return the process that drives a run, once there is one."""
        eventually(lambda: self.row(run_id)[1])
        return ss.process_of(self.row(run_id)[1] or "")[1]

    def wait(self, run_id: str, *statuses: str) -> None:
        """Wait until a run has one of these statuses, and no process."""
        eventually(lambda: self.row(run_id)[0] in statuses and self.row(run_id)[1] is None)

    def lines(self, run_id: str) -> list[str]:
        sql = "select payload_json from _smithers_events where run_id = ? and type = 'NodeOutput'"
        return [json.loads(payload)["text"] for (payload,) in self.read(sql, run_id)]

    def wait_for_lines(self, run_id: str, count: int = 1) -> None:
        eventually(lambda: len(self.lines(run_id)) >= count)

    def forker(self) -> int:
        """Return the process that starts the workers."""
        eventually(lambda: children_of(self.child.pid))
        return children_of(self.child.pid)[0]

    def metric(self, name: str, headers: Any = None) -> float:
        text = self.ask("GET", "/metrics", None, headers).body
        found = re.search(rf"^smithers_{name} (.*)$", text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    def close(self) -> None:
        """End the server, and every worker that it has left."""
        if hasattr(self, "child"):
            self.child.close()
        for (owner,) in self.read("select runtime_owner_id from _smithers_runs"):
            if owner is not None and ss.process_is_alive(owner):
                os.kill(ss.process_of(owner)[1], signal.SIGKILL)


class ManyCase(RunCase):
    """Tests of a server of many runs; the tests of a class share one, started with FLAGS."""

    FLAGS: tuple[str, ...] = ()
    many: Many

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory(prefix="smithers-test-")
        cls.addClassCleanup(folder.cleanup)
        cls.many = Many(folder.name)
        cls.addClassCleanup(cls.many.close)
        cls.many.start(*cls.FLAGS)

    def setUp(self) -> None:
        self.folder, self.path = self.many.folder, self.many.path
        self.db = self.adapter()
        self.run_id = self.id().rpartition(".test_")[2].replace("_", "-")

    def begin(self, workflow: str = "jobs.py", run_id: str = "", **body: Any) -> str:
        """Start a run, by default one named as the test."""
        run_id = run_id or self.run_id
        reply = self.many.post(workflow, run_id, **body)
        self.assertEqual((reply.status, reply.body), (200, {"runId": run_id}))
        return run_id

    def begin_held(self, run_id: str = "") -> tuple[str, int]:
        """Start a run whose task holds; return the run and its process."""
        run_id = self.begin("jobs.py:held", run_id)
        self.many.wait_for_lines(run_id)
        return run_id, self.many.worker_of(run_id)

    def park(self, run_id: str = "") -> str:
        """Start a run and wait until it has no process and waits at its gate."""
        run_id = self.begin("jobs.py:gated", run_id)
        self.many.wait(run_id, "waiting-approval")
        return run_id

    def assert_ends(self, run_id: str, status: str = "finished") -> None:
        self.many.wait(run_id, *ss.TERMINAL_STATUSES)
        self.assertEqual(self.many.row(run_id)[0], status, self.db.get_run(run_id))

    def assert_refused(self, status: int, code: str, says: str, reply: Reply) -> None:
        self.assertEqual((reply.status, reply.body["error"]["code"]), (status, code), reply.body)
        self.assertIn(says, reply.body["error"]["message"])

    def error_of_run(self, run_id: str) -> dict[str, Any]:
        return dict(json.loads(self.run_row(run_id).error_json or ""))

    def tell(self, *words: str) -> tuple[int, str, str]:
        """Run a command in a process of its own, on the server's file."""
        return run_child(*MODULE, *words, "--db", self.path, folder=self.folder)


class ServerTest(ManyCase):
    """Runs that are started, decided and gone on with."""

    def test_run_is_started_and_finishes(self) -> None:
        self.begin(input={"n": 5}, config={"maxConcurrency": "2"})
        self.assert_ends(self.run_id)
        reply = self.many.ask("GET", f"/v1/runs/{self.run_id}")
        self.assertEqual(list(reply.body), ["runId", "workflowName", "status", "startedAtMs",
                                            "finishedAtMs", "summary"])  # fmt: skip
        self.assertEqual(reply.body["summary"], {"finished": 2})
        self.assertEqual(self.output("one", run_id=self.run_id)["in"], self.many.root)
        self.assertEqual(self.db.list_nodes(self.run_id)[0].label, "5")

    def test_runs_have_processes_of_their_own(self) -> None:
        pids = {self.begin_held(f"own-{number}")[1] for number in range(2)}
        self.assertEqual(len(pids - {self.many.child.pid, self.many.forker()}), 2)
        for number in range(2):
            self.many.go(f"own-{number}")
            self.assert_ends(f"own-{number}")
        eventually(lambda: not any(map(is_process, pids)))

    def test_racing_posts_of_an_id_start_one_run(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _: self.many.post("jobs.py", self.run_id), range(8)))
        self.assertEqual(sorted(reply.status for reply in replies), [200] + [409] * 7)
        codes = {reply.body["error"]["code"] for reply in replies if reply.status == 409}
        self.assertEqual(codes, {"RUN_ALREADY_EXISTS"})
        self.assert_ends(self.run_id)
        self.assertEqual(self.told("RunStarted", run_id=self.run_id), ["RunStarted"])

    def test_parked_run_has_no_process(self) -> None:
        run_id = self.park()
        worker = self.output("before", run_id=run_id)["pid"]
        eventually(lambda: not is_process(worker))
        reply = self.many.ask("POST", f"/v1/runs/{run_id}/nodes/ok/approve", {"decidedBy": "ann"})
        self.assertEqual((reply.status, reply.body), (200, {"runId": run_id}))
        self.assert_ends(run_id)
        self.assertNotEqual(self.output("after", run_id=run_id)["pid"], worker)

    def test_whoever_decides_wakes_a_parked_run(self) -> None:
        """A command, the original's program as it writes a decision, and a cancel."""
        inserted = """insert into _smithers_approvals
            (run_id, node_id, iteration, status, decided_at_ms) values ('{}', 'ok', 0,
            'approved', 1) on conflict (run_id, node_id, iteration) do update set
            status = excluded.status, decided_at_ms = excluded.decided_at_ms"""
        updated = "update _smithers_approvals set status = 'denied' where run_id = '{}'"
        acts: dict[str, tuple[str, Callable[[str], Any]]] = {
            "command": ("finished", lambda run_id: self.tell("approve", run_id, "ok", "-y")),
            "inserted": ("finished", lambda run_id: change(self.path, inserted.format(run_id))),
            "updated": ("failed", lambda run_id: change(self.path, updated.format(run_id))),
            "cancel": ("cancelled", lambda run_id: self.many.ask(
                "POST", f"/v1/runs/{run_id}/cancel")),
        }  # fmt: skip
        for name, (status, act) in acts.items():
            with self.subTest(name):
                run_id = self.park(f"{self.run_id}-{name}")
                act(run_id)
                self.assert_ends(run_id, status)

    def test_deadline_of_parked_run_fires(self) -> None:
        run_id = self.begin("jobs.py:timed")
        self.assert_ends(run_id)
        self.assertEqual(self.db.list_gates(run_id)[0].status, "approved")

    def test_killed_worker_is_replaced(self) -> None:
        run_id, worker = self.begin_held()
        os.kill(worker, signal.SIGKILL)
        self.many.wait_for_lines(run_id, 2)
        self.many.go(run_id)
        self.assert_ends(run_id)
        attempts = [a for a in self.attempts(run_id).split(", ") if a.startswith("hold")]
        self.assertEqual(attempts, ["hold 0 cancelled", "hold 1 finished"])

    def test_render_that_kills_worker_of_decided_run_fails_it(self) -> None:
        run_id = self.begin("jobs.py:gated_leaving")
        self.many.wait(run_id, "waiting-approval")
        self.many.go(run_id)
        self.many.ask("POST", f"/v1/runs/{run_id}/nodes/ok/approve")
        self.assert_ends(run_id, "failed")
        self.assertEqual(self.error_of_run(run_id)["code"], "WORKER_CRASHED")

    def test_what_kills_a_worker_or_is_no_workflow_fails_its_run(self) -> None:
        exits = "import os\nprint('so long', flush=True)\nos._exit(0)"
        self.many.write("exit.py", exits)
        self.many.write("segfault.py", exits.replace("os._exit(0)", "os.kill(os.getpid(), 11)"))
        self.many.write("raises.py", "import os\n\nos.nothing\n")
        for workflow, body, code, says in (
            ("jobs.py:poisoned", {}, "TASK_FAILED", "Task(s) failed: poison"),
            *(("jobs.py:leaving", {"input": {"code": code}}, "WORKER_CRASHED", "leaving for ")
              for code in (0, 3, 7)),
            ("exit.py", {}, "WORKER_CRASHED", "so long"),
            ("segfault.py", {}, "WORKER_CRASHED", "so long"),
            ("raises.py", {}, "WORKFLOW_INVALID", "raises.py, line 3: AttributeError"),
            ("jobs.py:nothing", {}, "WORKFLOW_INVALID", "no object called 'nothing'"),
            ("jobs.py:number", {}, "WORKFLOW_INVALID", "not a workflow function but a int"),
        ):  # fmt: skip
            with self.subTest(workflow=workflow, body=body):
                number = len(self.db.list_runs(ss.TERMINAL_STATUSES))
                run_id = self.begin(workflow, f"{self.run_id}-{number}", **body)
                self.assert_ends(run_id, "failed")
                error = self.error_of_run(run_id)
                self.assertEqual(error["code"], code)
                self.assertIn(says, error["message"])
                if workflow == "jobs.py:poisoned":
                    self.assertEqual(self.error_of("poison", run_id)["code"], "TASK_CRASHED")
                    self.assertEqual(len(self.told("NodeStarted", run_id=run_id)), 3)

    def test_file_that_is_no_workflow_is_refused(self) -> None:
        self.many.write("syntax.py", "a = 1\nb = = 2\n")
        for workflow, says in (
            ("syntax.py", "syntax.py, line 2"),
            ("missing.py", "there is no workflow file missing.py"),
            (".", "is not a workflow file"),
            ("x" * 300, "there is no workflow file"),
        ):
            reply = self.many.post(workflow, self.run_id)
            self.assert_refused(400, "WORKFLOW_INVALID", says, reply)
            self.assertNotIn(self.many.root, reply.body["error"]["message"])
        self.assertIsNone(self.db.get_run(self.run_id))

    def test_file_outside_of_root_is_refused(self) -> None:
        outside = os.path.join(self.folder, "outside.py")
        with open(outside, "w", encoding="utf-8") as file:
            file.write(MANY_FLOWS)
        os.symlink(outside, os.path.join(self.many.root, "link.py"))
        for workflow in ("../outside.py", outside, "link.py", "/etc/passwd", "a/../../outside.py"):
            reply = self.many.post(workflow, self.run_id)
            self.assert_refused(400, "WORKFLOW_PATH_OUTSIDE_ROOT", "within", reply)
        for workflow in ("../flows/jobs.py", os.path.join(self.many.root, "jobs.py")):
            self.assert_ends(self.begin(workflow, f"{self.run_id}-{len(workflow)}"))

    def test_resume_says_how_a_run_stands(self) -> None:
        run_id, worker = self.begin_held()
        running = {"runId": run_id, "status": "running"}
        for path, body in (
            (f"/v1/runs/{run_id}/resume", None),
            (f"/v1/runs/{run_id}/resume", {"workflowPath": "jobs.py:held"}),
            ("/v1/runs", {"workflowPath": "jobs.py:held", "runId": run_id, "resume": True}),
        ):
            reply = self.many.ask("POST", path, body)
            self.assertEqual((reply.status, reply.body), (200, running))
        self.assertEqual(self.many.worker_of(run_id), worker)
        self.many.go(run_id)
        self.assert_ends(run_id)
        before = self.db.get_run(run_id)
        reply = self.many.ask("POST", f"/v1/runs/{run_id}/resume")
        self.assertEqual((reply.status, reply.body), (200, {"runId": run_id}))
        self.assertEqual(self.db.get_run(run_id), before)

    def test_stopped_run_is_gone_on_with_at_resume(self) -> None:
        run_id, _ = self.begin_held()
        code, out, err = self.tell("stop", run_id)
        self.assertEqual(code, 0, err)
        self.many.wait(run_id, "running")
        self.many.go(run_id)
        self.assertEqual(self.many.ask("POST", f"/v1/runs/{run_id}/resume").status, 200)
        self.assert_ends(run_id)

    def test_resume_of_another_file_is_refused(self) -> None:
        run_id = self.park()
        self.many.write("other.py", MANY_FLOWS)
        reply = self.many.ask("POST", f"/v1/runs/{run_id}/resume", {"workflowPath": "other.py"})
        self.assert_refused(400, "WORKFLOW_MISMATCH", run_id, reply)

    def test_run_of_a_renamed_workflow_fails(self) -> None:
        self.many.write("renamed.py", MANY_FLOWS)
        run_id = self.begin("renamed.py:gated")
        self.many.wait(run_id, "waiting-approval")
        text = MANY_FLOWS.replace('Workflow("gated", Task', 'Workflow("something else", Task')
        self.many.write("renamed.py", text)
        self.many.ask("POST", f"/v1/runs/{run_id}/nodes/ok/approve")
        self.assert_ends(run_id, "failed")
        message = self.error_of_run(run_id)["message"]
        self.assertEqual(message.count("is of workflow 'gated', not of 'something else'"), 1)

    def test_run_of_a_command_is_adopted_at_resume(self) -> None:
        words = ("up", "flows/jobs.py:gated", "-r", self.run_id)
        self.assertEqual(self.tell(*words)[0], 3)
        reply = self.many.ask("POST", f"/v1/runs/{self.run_id}/nodes/ok/approve")
        self.assertEqual(reply.status, 200)
        self.assertEqual(self.many.row(self.run_id), ("waiting-approval", None))
        self.assertEqual(self.many.ask("POST", f"/v1/runs/{self.run_id}/resume").status, 200)
        self.assert_ends(self.run_id)

    def test_foreign_run_is_adopted_though_others_look_in_between(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="smithers-test-")
        self.addCleanup(folder.cleanup)
        db = ss.SmithersDb(os.path.join(folder.name, "smithers.db"))
        self.addCleanup(db.close)
        with open(os.path.join(folder.name, "jobs.py"), "w", encoding="utf-8") as file:
            file.write(MANY_FLOWS)
        tree = Workflow("gated", Task("before", {}), Approval("ok"), Task("after", {}))
        ss.run_workflow(tree, adapter=db, run_id="r", park=False)
        app = ss.create_server_app(adapter=db, root=folder.name)
        self.addCleanup(app.close)
        supervisor: Any = app.supervisor
        ss.decide(db, "r", "ok", ss.Decision("approved"))
        eventually(lambda: "r" in supervisor._foreign)

        def until_seen(tx: ss.Tx) -> None:
            eventually(lambda: supervisor._watch._seen == supervisor._watch.version())
            eventually(supervisor._inbox.empty)

        db.subscribe(until_seen)
        reply = app.request("POST", "/v1/runs/r/resume", json={"workflowPath": "jobs.py:gated"})
        self.assertEqual(reply.status, 200)
        db.unsubscribe(until_seen)
        eventually(lambda: db.existing_run("r").status == "finished")

    def test_retry_gives_failed_nodes_a_fresh_try(self) -> None:
        for retry in (
            lambda run_id: self.many.ask("POST", f"/v1/runs/{run_id}/retry").status == 200,
            lambda run_id: self.tell("retry", run_id)[0] == 0,
        ):
            run_id = self.begin("jobs.py:broken", f"{self.run_id}-{retry.__code__.co_firstlineno}")
            self.assert_ends(run_id, "failed")
            self.many.go(run_id)
            self.assertTrue(retry(run_id))
            self.many.wait(run_id, "finished")

    def test_every_run_has_its_files_as_they_are_then(self) -> None:
        """Helpers of one name do not meet, and an edited file counts at the next run."""
        for name, word in (("a", "old"), ("b", "other"), ("a", "newer")):
            self.many.write(f"{name}/helper.py", f"SAID = '{word}'\n")
            self.many.write(
                f"{name}/flow.py",
                "import helper\nfrom smithers_serve import Task, Workflow\n"
                f"workflow = Workflow('w', Task('say', {{'said': [helper.SAID, '{word}']}}))\n",
            )
            run_id = self.begin(f"{name}/flow.py", f"{self.run_id}-{word}")
            self.assert_ends(run_id)
            self.assertEqual(self.output("say", run_id=run_id), {"said": [word, word]})

    def test_streams_of_many_runs(self) -> None:
        ids = [self.begin_held(f"{self.run_id}-{number}")[0] for number in range(3)]
        with contextlib.ExitStack() as stack:
            readers = [
                stack.enter_context(EventReader(self.many.port, f"/v1/runs/{run_id}/events"))
                for run_id in ids
            ]
            for run_id in ids:
                self.many.go(run_id)
            for run_id, reader in zip(ids, readers):
                seen = list(iter(reader.event, None))
                log = [(e.seq, e.payload) for e in self.db.list_events(run_id)]
                self.assertEqual(seen, log)

    def test_stream_goes_on_after_last_event(self) -> None:
        run_id = self.begin()
        self.assert_ends(run_id)
        newest = self.db.list_events(run_id)[-1].seq
        path = f"/v1/runs/{run_id}/events"
        for number, expected in ((newest - 1, [newest]), (1, list(range(2, newest + 1)))):
            with EventReader(self.many.port, path, {"Last-Event-ID": str(number)}) as reader:
                self.assertEqual(reader.rest(), expected)
        headers = {"Last-Event-ID": str(newest)}
        self.assertEqual(self.many.ask("GET", path, None, headers).status, 204)

    def test_unknown_run_is_not_found(self) -> None:
        for method, path in (
            ("GET", ""), ("GET", "/events"), ("GET", "/frames"), ("GET", "/nodes"), ("GET", "/why"),
            ("GET", "/nodes/a"), ("GET", "/approvals"), ("POST", "/nodes/a/approve"),
            ("POST", "/nodes/a/deny"), ("POST", "/cancel"), ("POST", "/retry"),
        ):  # fmt: skip
            with self.subTest(path=path):
                reply = self.many.ask(method, f"/v1/runs/nobody{path}")
                self.assert_refused(404, "NOT_FOUND", "nobody", reply)
        reply = self.many.ask("POST", "/v1/runs/nobody/resume")
        self.assert_refused(404, "RUN_NOT_FOUND", "nobody", reply)

    def test_all_gates_are_listed_oldest_first(self) -> None:
        ids = [self.park(f"{self.run_id}-{number}") for number in range(3)]
        found = self.many.ask("GET", "/v1/approvals").body["approvals"]
        self.assertEqual([g["runId"] for g in found if g["runId"] in ids], ids)
        for run_id in ids:
            self.many.ask("POST", f"/v1/runs/{run_id}/cancel")

    def test_log_is_private_and_goes_with_its_run(self) -> None:
        run_id = self.begin()
        self.assert_ends(run_id)
        log = f"{self.path}.logs/{run_id}.log"
        self.assertEqual(stat.S_IMODE(os.stat(log).st_mode), 0o600)
        with open(log, encoding="utf-8") as file:
            self.assertIn("two finished", file.read())
        eventually(lambda: not os.path.exists(f"{self.path}.logs/{run_id}.metrics"))
        code, _, err = self.tell("gc", "--older-than", "0s")
        self.assertEqual(code, 0, err)
        self.assertFalse(os.path.exists(log))
        self.assertEqual(self.many.ask("GET", f"/v1/runs/{run_id}").status, 404)

    def test_id_of_a_removed_run_is_free_again(self) -> None:
        path = f"/v1/runs/{self.run_id}/events"
        for workflow in ("jobs.py", "jobs.py:timed"):
            run_id = self.begin(workflow)
            self.assert_ends(run_id)
            with EventReader(self.many.port, path) as reader:
                seen = list(iter(reader.event, None))
            self.assertEqual(seen, [(e.seq, e.payload) for e in self.db.list_events(run_id)])
            self.assertEqual(self.tell("gc", "--older-than", "0s")[0], 0)

    def test_commands_tell_of_runs(self) -> None:
        run_id, worker = self.begin_held()
        code, out, err = self.tell("ps")
        self.assertEqual(code, 0, err)
        line = next(line for line in out.splitlines() if line.startswith(run_id))
        self.assertIn(str(worker), line)
        self.assertIn(f":{self.many.port}/ui#/runs/{run_id}", line)
        self.assertIn("holding", self.tell("status", run_id)[1])
        self.assertEqual(self.tell("cancel", run_id)[0], 0)
        self.assert_ends(run_id, "cancelled")

    def test_second_server_of_a_file_is_refused(self) -> None:
        words = ("server", "--root", "flows", "--port", "0", "--db", self.path)
        code, out, err = run_child(*MODULE, *words, folder=self.folder)
        self.assertEqual((code, out), (4, ""))
        self.assertRegex(err, r"\A\[smithers\] Error: another server starts the runs of [^\n]*\n\Z")

    def test_server_without_root_shows_and_steers(self) -> None:
        parked = self.park()
        words = ("server", "--port", "0", "--db", self.path)
        with Child(*MODULE, *words, folder=self.folder) as child:
            reply = ask(child.port, "POST", "/v1/runs", {"workflowPath": "jobs.py"})
            self.assert_refused(403, "FORBIDDEN", "no root", reply)
            reply = ask(child.port, "POST", f"/v1/runs/{parked}/resume")
            self.assert_refused(403, "FORBIDDEN", "no root", reply)
            self.assertEqual(ask(child.port, "GET", "/v1/runs").body[0]["runId"], parked)
            path = f"/v1/runs/{parked}/nodes/ok/approve"
            self.assertEqual(ask(child.port, "POST", path).status, 200)
            self.assert_ends(parked)  # by the server that has a root

    def test_worker_that_leaves_with_1_counts_as_crashed(self) -> None:
        self.begin("jobs.py:leaving", input={"code": 1})
        self.many.child.wait_for("ended with 1; crash 1 in a row")
        self.many.ask("POST", f"/v1/runs/{self.run_id}/cancel")
        self.assert_ends(self.run_id, "cancelled")

    def test_metrics_of_workers_are_the_servers(self) -> None:
        before = self.many.metric("nodes_finished"), self.many.metric("runs_finished_total")
        run_id, worker = self.begin_held()
        eventually(lambda: self.many.metric("nodes_active") == 1)
        os.kill(worker, signal.SIGKILL)
        self.many.wait_for_lines(run_id, 2)
        eventually(lambda: self.many.metric("runs_active") == 1)
        self.assertEqual(self.many.metric("nodes_active"), 1)
        self.assertGreaterEqual(self.many.metric("nodes_finished"), before[0] + 1)
        self.many.go(run_id)
        self.assert_ends(run_id)
        eventually(lambda: self.many.metric("runs_active") == self.many.metric("nodes_active") == 0)
        after = self.many.metric("nodes_finished"), self.many.metric("runs_finished_total")
        self.assertEqual(after, (before[0] + 3, before[1] + 1))


class QueueTest(ManyCase):
    """More runs than may run at once."""

    FLAGS = ("--max-runs", "1")

    def test_queued_runs_begin_first_come_first_served(self) -> None:
        first, _ = self.begin_held()
        ids = [self.begin("jobs.py", f"{self.run_id}-{number}") for number in range(3)]
        self.assertEqual([self.many.row(run_id) for run_id in ids], [("queued", None)] * 3)
        reply = self.many.ask("GET", f"/v1/runs/{ids[0]}/why")
        self.assertEqual(reply.body["state"], "queued")
        reply = self.many.ask("POST", f"/v1/runs/{ids[2]}/resume")  # which keeps its place
        self.assertEqual((reply.status, reply.body), (200, {"runId": ids[2]}))
        self.many.go(first)
        for run_id in ids:
            self.assert_ends(run_id)
        begun = [self.db.list_events(run_id)[0].timestamp_ms for run_id in ids]
        self.assertEqual(begun, sorted(begun))

    def test_queued_run_can_be_cancelled(self) -> None:
        first, _ = self.begin_held()
        run_id = self.begin("jobs.py", f"{self.run_id}-1")
        self.assertEqual(self.many.ask("POST", f"/v1/runs/{run_id}/cancel").status, 200)
        self.assert_ends(run_id, "cancelled")
        self.assertEqual(self.many.metric("runs_queued"), 0)
        self.many.go(first)
        self.assert_ends(first)
        self.assertEqual(self.told("NodeStarted", run_id=run_id), [])

    def test_stream_of_queued_run_begins_with_it(self) -> None:
        first, _ = self.begin_held()
        run_id = self.begin("jobs.py", f"{self.run_id}-1")
        with EventReader(self.many.port, f"/v1/runs/{run_id}/events") as reader:
            self.many.go(first)
            self.assertEqual(reader.rest(), [e.seq for e in self.db.list_events(run_id)])

    def test_metrics_count_queue_and_workers(self) -> None:
        started, crashed = (self.many.metric(f"workers_{word}_total") for word in
                            ("started", "crashed"))  # fmt: skip
        first, worker = self.begin_held()
        self.begin("jobs.py", f"{self.run_id}-1")
        self.assertEqual(self.many.metric("runs_queued"), 1)
        self.assertEqual(self.many.metric("workers_active"), 1)
        os.kill(worker, signal.SIGKILL)
        self.many.wait_for_lines(first, 2)
        self.many.go(first)
        self.assert_ends(first)
        self.assert_ends(f"{self.run_id}-1")
        eventually(lambda: self.many.metric("workers_active") == 0)
        self.assertEqual(self.many.metric("runs_queued"), 0)
        self.assertEqual(self.many.metric("workers_started_total"), started + 3)
        self.assertEqual(self.many.metric("workers_crashed_total"), crashed + 1)


class ServerLifeTest(ManyCase):
    """Servers that stop, die and come again; each test has its own."""

    @classmethod
    def setUpClass(cls) -> None:
        pass

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="smithers-test-")
        self.addCleanup(folder.cleanup)
        self.many = Many(folder.name)
        self.addCleanup(self.many.close)
        self.many.start()
        super().setUp()

    def restart(self, number: int, *flags: str, command: Seq[str] = MODULE) -> None:
        """End the server by a signal and start the next one."""
        self.many.child.finish(number)
        self.many.child.close()
        self.many.start(*flags, command=command)

    def test_retry_while_the_worker_leaves_is_not_lost(self) -> None:
        until_told = "while ! test -e flows/told && ! test -e told; do sleep 0.01; done"
        self.restart(signal.SIGTERM, "--notify", f"sh -c {shlex.quote(until_told)}")
        run_id = self.begin("jobs.py:broken", "a")
        self.many.wait(run_id, "failed")
        self.many.go(run_id)
        self.assertEqual(self.many.ask("POST", f"/v1/runs/{run_id}/retry").status, 200)
        self.assertEqual(self.many.metric("workers_active"), 1)  # the one that leaves
        self.many.write("told", "")
        eventually(lambda: self.many.row(run_id)[0] == "finished")

    def test_a_server_of_another_root_starts_no_run_of_this_one(self) -> None:
        parked = self.park("a")
        other = os.path.join(self.folder, "others")
        os.makedirs(other, exist_ok=True)
        with open(os.path.join(other, "jobs.py"), "w", encoding="utf-8") as file:
            file.write(MANY_FLOWS)
        self.restart(signal.SIGTERM, "--root", other)
        self.many.ask("POST", f"/v1/runs/{parked}/nodes/ok/approve")
        self.begin("jobs.py", "b")
        self.assert_ends("b")
        self.assertEqual(self.many.row(parked), ("waiting-approval", None))
        self.restart(signal.SIGTERM)
        self.assert_ends(parked)

    def test_sigterm_suspends_all_and_next_server_goes_on(self) -> None:
        workers = [self.begin_held(run_id)[1] for run_id in ("a", "b")]
        parked = self.park("c")
        code, _ = self.many.child.finish(signal.SIGTERM)
        self.assertEqual(code, 0)
        self.assertFalse(any(map(is_process, workers)))
        for run_id in ("a", "b"):
            self.assertEqual(self.many.row(run_id), ("running", None))
            self.assertIn("suspended", str(self.run_row(run_id).config["history"]))
            self.many.go(run_id)
        self.many.child.close()
        self.many.start()
        for run_id in ("a", "b"):
            self.assert_ends(run_id)
        self.assertEqual(self.many.row(parked), ("waiting-approval", None))

    def test_workers_outlive_their_server(self) -> None:
        """The next one sees to them: to their ends, to those that die, and at its own end."""
        run_id, worker = self.begin_held("a")
        dying, other = self.begin_held("b")
        _, last = self.begin_held("c")
        parked = self.park("d")
        forker = self.many.forker()
        self.restart(signal.SIGKILL)
        eventually(lambda: not is_process(forker))
        self.assertEqual(self.many.worker_of(run_id), worker)
        eventually(lambda: self.many.metric("workers_active") == 3)
        ss.decide(self.db, parked, "ok", ss.Decision("approved"))
        self.assert_ends(parked)
        self.assertEqual(len(self.many.lines(run_id)), 1)
        os.kill(other, signal.SIGKILL)
        self.many.wait_for_lines(dying, 2)
        for held in (run_id, dying):
            self.many.go(held)
            self.assert_ends(held)
        self.assertEqual(self.many.metric("runs_finished_total"), 3)
        self.many.child.finish(signal.SIGTERM)
        self.assertFalse(is_process(last))
        self.assertEqual(self.many.row("c"), ("running", None))

    def test_next_server_takes_up_what_was_left(self) -> None:
        run_id, worker = self.begin_held("orphaned")
        parked = self.park("decided")
        self.many.child.finish(signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        ss.decide(self.db, parked, "ok", ss.Decision("approved"))
        with self.db.transaction("queued") as tx:
            config = self.db.get_run(parked).config  # type: ignore[union-attr]
            tx.insert_run("two", None, None, None, "{}", json.dumps({**config, "pid": None}))
        self.many.go(run_id)
        self.many.child.close()
        self.many.start()
        for name in (run_id, parked):
            self.assert_ends(name)
        self.many.wait("queued", "waiting-approval")

    def test_workers_outlive_the_process_that_forks_them(self) -> None:
        (a, worker), (b, other) = self.begin_held("a"), self.begin_held("b")
        forker = self.many.forker()
        os.kill(forker, signal.SIGKILL)
        self.begin("jobs.py", "c")
        self.assert_ends("c")
        self.assertNotEqual(self.many.forker(), forker)
        self.assertEqual(self.many.worker_of(a), worker)
        os.kill(other, signal.SIGKILL)  # nobody is told of its end
        self.many.wait_for_lines(b, 2)
        for run_id in (a, b):
            self.many.go(run_id)
            self.assert_ends(run_id)

    def test_roles_say_who_starts_runs(self) -> None:
        tokens = os.path.join(self.folder, "tokens")
        with open(tokens, "w", encoding="utf-8") as file:
            file.write("ann operator tok-ann\nbob approver tok-bob\nvic viewer tok-vic\n")
        os.chmod(tokens, 0o600)
        self.restart(signal.SIGTERM, "--tokens", tokens)
        order = {"workflowPath": "jobs.py:gated", "runId": "a"}
        for name, status in (("vic", 403), ("bob", 403), ("ann", 200)):
            reply = self.many.ask("POST", "/v1/runs", order, bearer(f"tok-{name}"))
            self.assertEqual(reply.status, status, name)
        self.assertEqual(self.many.ask("POST", "/v1/runs", order).status, 401)
        self.many.wait("a", "waiting-approval")
        path = "/v1/runs/a/nodes/ok/approve"
        self.assertEqual(self.many.ask("POST", path, None, bearer("tok-vic")).status, 403)
        self.assertEqual(self.many.ask("POST", path, None, bearer("tok-bob")).status, 200)
        self.assert_ends("a")
        self.assertEqual(self.db.list_gates("a")[0].decided_by, "bob")

    def test_deadline_fires_under_the_next_server(self) -> None:
        self.begin("jobs.py:slowly_timed", "a")
        self.many.wait("a", "waiting-approval")
        self.restart(signal.SIGKILL)
        self.assert_ends("a")

    def test_run_whose_command_dies_is_gone_on_with(self) -> None:
        """Here an `up` that was faster: whoever drives a run of the server's is looked at."""
        run_id = self.begin("jobs.py:gated_hold", "a")
        self.many.wait(run_id, "waiting-approval")
        words = ("up", "flows/jobs.py:gated_hold", "--resume", "-r", run_id, "--serve")
        with Child(*MODULE, *words, "--port", "0", folder=self.folder) as child:
            child.wait_for("waits for approval|Page: ")
            self.assertEqual(self.many.worker_of(run_id), child.pid)
            ss.decide(self.db, run_id, "ok", ss.Decision("approved"))
            self.many.wait_for_lines(run_id)
            eventually(lambda: self.many.metric("workers_active") == 1)
            child.process.kill()
            self.many.wait_for_lines(run_id, 2)
        self.many.go(run_id)
        self.assert_ends(run_id)

    def test_database_that_has_gone_is_told_of_once(self) -> None:
        kept = self.path + ".kept"
        os.rename(self.path, kept)
        self.many.child.wait_for("the supervisor failed")
        time.sleep(5 * ss.WATCH_SECONDS)
        self.assertEqual(self.many.child.text().count("the supervisor failed"), 1)
        os.rename(kept, self.path)
        self.begin("jobs.py", "a")
        self.assert_ends("a")

    def test_signal_to_all_processes_of_a_service_suspends_once(self) -> None:
        """As a service manager sends it: to the workers, and to the server that passes it on."""
        run_id = self.begin("jobs.py:slow_to_leave", "a")
        self.many.wait_for_lines(run_id)
        os.kill(self.many.worker_of(run_id), signal.SIGTERM)
        self.many.wait_for_lines(run_id, 2)
        time.sleep(ss.SAME_SIGNAL_SECONDS)
        self.many.child.finish(signal.SIGTERM)
        self.assertEqual(self.many.row(run_id), ("running", None))
        self.assertEqual(self.attempts(run_id), "hold 0 cancelled")

    def test_run_that_is_just_starting_is_suspended_too(self) -> None:
        ids = [self.begin("jobs.py:held", f"r{number}") for number in range(4)]
        code, _ = self.many.child.finish(signal.SIGTERM)
        self.assertEqual(code, 0)
        owners = {run_id: self.many.row(run_id)[1] for run_id in ids}
        self.assertFalse([i for i, owner in owners.items() if owner and ss.process_is_alive(owner)])
        self.many.child.close()
        self.many.start()
        for run_id in ids:
            self.many.go(run_id)
            self.assert_ends(run_id)

    def test_somebody_is_told_of_a_parked_gate_that_expires_soon(self) -> None:
        said = os.path.join(self.folder, "said")
        early = "import smithers_serve as ss; ss.Notifier.SOON_SHARE = 0.9975; ss.main()"
        notify = f"sh -c 'cat >> {said}; echo >> {said}'"
        self.restart(signal.SIGTERM, "--notify", notify, command=("-c", early))
        self.begin("jobs.py:slowly_timed", "a", input={"seconds": 600})

        def told() -> list[str]:
            with open(said, encoding="utf-8") as file:
                return [json.loads(line)["event"] for line in file if line.endswith("}\n")]

        eventually(lambda: os.path.exists(said) and "gate-expiring" in told())
        self.many.ask("POST", "/v1/runs/a/nodes/ok/approve")
        self.assert_ends("a")
        eventually(lambda: "run-ended" in told())
        self.assertEqual(told(), ["gate-opened", "gate-expiring", "run-ended"])

    def test_start_and_stop_in_code(self) -> None:
        self.many.child.finish(signal.SIGTERM)
        server = ss.start_server(port=0, db=self.path, root_dir=self.many.root, max_body_bytes=100)
        try:
            self.many.port = server.server_port
            self.begin("jobs.py", "a")
            self.assert_ends("a")
            reply = self.many.post("x" * 100, "b")
            self.assert_refused(413, "PAYLOAD_TOO_LARGE", "100 bytes", reply)
        finally:
            server.stop()
            server.app.close()


RECORDED = os.path.join(HERE, os.pardir, "shared", "spec", "multi-workflow-recorded.json")
RECORDED_FLOWS = {
    "ok": "Task('one', {}), Task('two', {})",
    "gate": "Task('pre', {}), Task('deploy', {}, needs_approval=True), Task('post', {})",
    "slow": "Task('slow', hold), Task('then', {})",
    "fail": "Task('fail', ['false'])",
    "inp": "Task('inp', {'n': ctx.input['n']})",
}


def gist(status: int, text: str) -> tuple[Any, ...]:
    """Return of an answer what must be alike: of a list only the first, of a stream if it tells.

    Bodies are recorded up to some length only.
    """
    if text.startswith("retry: 1000\n\n"):
        return status, "stream", "data: " in text
    if not text.startswith(("{", "[{")):
        return status, text[:2] if text != "" and text[0] in "[]" else ""
    try:
        first, _ = json.JSONDecoder().raw_decode(text.lstrip("["))
    except ValueError:
        return status, text[0]
    if "error" in first:
        return status, first["error"]["code"]
    names = ("runId", "workflowName", "status", "summary")
    told = {name: first[name] for name in names if name in first}
    if re.fullmatch(r"[0-9a-f-]{36}|run-\d+-\w+", str(first.get("runId"))):
        told["runId"] = "a new one"
    return status, text[0], list(first), told


class ReplayTest(ManyCase):
    """Every recorded answer of the original's server, beside ours."""

    # Why an answer of ours differs -> its status and code, if any -> the records.
    DIFFERS = {
        "there is a route /health": {"200": "2"},
        "there is always a database": {"200": "3"},
        "what is no workflow is a mistake of the client's": {
            "400 WORKFLOW_INVALID": "29 30 32 212"},
        "the module is loaded by the run's process, which fails the run": {"200": "31"},
        "workflowPath may be left out at a resume: its row has it": {"404 RUN_NOT_FOUND": "36"},
        "the run has a row, with its name, before the answer; here it has ended": {"200": "39"},
        "a run that has ended is shown": {"200": "40 60 70 112", "409 RUN_NOT_ACTIVE": "42"},
        "a page of another site starts nothing": {"403 FORBIDDEN": "44", "404 NOT_FOUND": "45"},
        "a run id that no URL could name is refused": {
            "400 INVALID_REQUEST": "46 47 48 49 50 51 52"},
        "what is malformed is refused, not failed at": {
            "400 INVALID_REQUEST": "56 82 101 102 103 104 172", "400 INVALID_JSON": "67"},
        "the cancel above was refused": {"200": "68"},
        "real paths count, and a root is never left": {
            "400 WORKFLOW_PATH_OUTSIDE_ROOT": "57 175"},
        "the run above was refused": {"200": "176"},
        "numbers are whole and written in digits, and given once": {
            "400 INVALID_REQUEST": "79 80 81 85 87 88 180 181 182 186 187"},
        "a frame is committed when the tree differs from the last": {"200": "83"},
        "there are fewer events, and numbers: none of snapshots": {"200": "91 183"},
        "a path is percent-decoded": {"200": "90"},
        "HEAD is answered as GET": {"200": "92"},
        "only an open gate is decided, and once": {
            "404 NODE_NOT_FOUND": "97 99 105", "409 APPROVAL_NOT_PENDING": "98 108 203"},
        "a decision wakes the run: it has finished since": {
            "200": "107 110 116 117 160 162 194", "409 RUN_NOT_ACTIVE": "161"},
        "of racing requests for one id one starts a run": {"409 RUN_ALREADY_EXISTS": "119 120"},
        "as in serve mode: a scheme in any case, no token without one, either header": {
            "401 UNAUTHORIZED": "125 129", "200": "126 130"},
        "a run is named as its workflow, in every list": {
            "200": "140 141 142 143 145 148 150 151 152 165 167"},
        "a parameter that nobody knows is refused": {"400 INVALID_REQUEST": "149"},
        "frames are kept": {"200": "154 155"},
        "a run without an engine can be cancelled": {"200": "169"},
        "a run that has ended stays as it is": {"200": "171 208"},
        "what was open is closed with the run": {"200": "201 204"},
    }  # fmt: skip

    @classmethod
    def setUpClass(cls) -> None:
        pass

    def setUp(self) -> None:
        if not os.path.exists(RECORDED):
            self.skipTest("the recorded answers are not beside this checkout")
        with open(RECORDED, encoding="utf-8") as file:
            self.records = json.load(file)["records"]
        self.servers = {}
        for name in "ABC":
            folder = tempfile.TemporaryDirectory(prefix="smithers-test-")
            self.addCleanup(folder.cleanup)
            self.servers[name] = many = Many(folder.name)
            for flow, tree in RECORDED_FLOWS.items():
                text = (
                    f"{MANY_FLOWS}\ndef workflow(ctx):\n    return Workflow('{flow}-wf', {tree})\n"
                )
                many.write(f"flows/{flow}.py", text)
            many.write("flows/syntax.py", "a = = 1\n")
            many.write("flows/nodefault.py", "a = 1\n")
            outside = os.path.join(many.folder, "outside")
            os.mkdir(outside)
            shutil.copyfile(os.path.join(many.root, "flows", "ok.py"), f"{outside}/x.py")
            os.symlink(f"{outside}/x.py", os.path.join(many.root, "flows", "link.py"))
            self.addCleanup(many.close)
            many.start(*(("--auth-token", "sk") if name == "B" else ()))

    def tearDown(self) -> None:
        for many in getattr(self, "servers", {}).values():
            self.path = many.path
            self.check_database(self.adapter())

    @staticmethod
    def is_settled(many: Many) -> bool:
        """Return whether every run has ended, waits without a process, or is a slow one at work."""
        left = """select run_id from _smithers_runs where not (
            status in ('finished', 'failed', 'cancelled')
            or status = 'waiting-approval' and runtime_owner_id is null
              and run_id not in (select run_id from _smithers_woken)
            or status = 'running' and cancel_requested_at_ms is null and exists (
              select 1 from _smithers_nodes n where n.run_id = _smithers_runs.run_id
              and node_id = 'slow' and state = 'in-progress'))"""
        return not many.read(left)

    def replay(self, record: dict[str, Any]) -> tuple[list[str], str]:
        """Put a recorded question to ours and return the lines of its head, and its body."""
        many = self.servers[record["server"][0]]
        eventually(lambda: self.is_settled(many))
        headers = {name: value for name, value in record["headers"].items()
                   if name.lower() not in ("content-length", "transfer-encoding")}  # fmt: skip
        body = (record["body"] or "").replace(".tsx", ".py").encode()
        is_chunked = record["headers"].get("Transfer-Encoding") == "chunked"
        size = int(record["headers"].get("Content-Length", 1_048_577 if is_chunked else 0))
        if size > 10_000:  # not recorded in full
            end = b'"}' if record["n"] == 212 else b""
            body = (b'{"workflowPath":"' + b"x" * size)[: size - len(end)] + end
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        host = "a b" if record["n"] == 56 else "localhost"
        framed = b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        if is_chunked:
            framed = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        head = f"{record['method']} {record['path']} HTTP/1.1\r\nHost: {host}\r\n{lines}"
        head += "Connection: close\r\n"
        with connect(many.port, head.encode() + framed) as sock:
            received = b""
            # A stream of a run that goes on has no end: what it says at once is enough.
            with contextlib.suppress(ConnectionError, socket.timeout):
                while b"\ndata: " not in received:
                    if b"retry: 1000" in received:
                        sock.settimeout(0.2)
                    data = sock.recv(65536)
                    if not data:
                        break
                    received += data
        top, _, rest = received.partition(b"\r\n\r\n")
        if b"chunked" in top:
            rest = re.sub(rb"(?:\A|\r\n)[0-9a-f]+\r\n", b"", rest)
        return top.decode().split("\r\n"), rest.decode()

    def test_answers_are_the_originals(self) -> None:
        differs = {
            int(number): answer
            for answers in self.DIFFERS.values()
            for answer, numbers in answers.items()
            for number in numbers.split()
        }
        for record in self.records:
            (first, *lines), text = self.replay(record)
            status = int(first.split(" ")[1])
            ours, theirs = gist(status, text), gist(record["status"], record["responseBody"])
            with self.subTest(n=record["n"], path=record["path"], body=str(record["body"])[:80]):
                if record["n"] in differs:
                    self.assertNotEqual(ours[: len(theirs)], theirs, "it is alike: unlist it")
                    code = f" {ours[1]}" if status >= 400 else ""
                    self.assertEqual(f"{status}{code}", differs[record["n"]])
                else:
                    self.assertEqual(ours[: len(theirs)], theirs)
                    kept = ("Content-Type: ", "Cache-Control: ", "X-Content-Type-Options: ")
                    expected = {x for x in record["responseHeaders"] if x.startswith(kept)}
                    self.assertLessEqual(expected, set(lines))


# ---------------------------------------------------------------------------
# Model: random trees that change while they run, held against rules of their own
# ---------------------------------------------------------------------------

# What a twig may be like; a value that stands twice is drawn twice as often.
TWIG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "limit": (None, None, 1, 1, 2, 3),
    "until": (False, False, True),
    "max_iterations": (1, 2, 3),
    "on_max": ("return-last",) * 9 + ("fail",),
    "on_deny": ("fail", "continue", "skip"),
    "skip_if": (False,) * 8 + (True,),
    "continue_on_fail": (False, True),
    "needs_approval": (False,) * 5 + (True,),
    "retries": (0, 1, 2, 2),
    "retry_delay": (0, 0, 1),
    "timeout": (None, None, 9),
    "on_timeout": ("fail", "approve", "deny"),
    "is_static": (False,) * 6 + (True,),
}
NESTS = ("sequence", "parallel", "loop")


@dataclasses.dataclass(eq=False)
class Twig:
    """An element of a tree that changes. Every twig could become each kind of element."""

    id: str
    kind: str  # one of NESTS, "task" or "approval"
    options: dict[str, Any]
    needs: list[str] = dataclasses.field(default_factory=list)
    below: list[Twig] = dataclasses.field(default_factory=list)
    turns: int = 0  # into a gate or a task

    def walk(self) -> Iterator[tuple[Twig, Twig]]:
        """Yield everything below, each with what it hangs on."""
        for twig in self.below:
            yield twig, self
            yield from twig.walk()


class Wood:
    """A tree that changes at random: twigs are dropped, come back, move, turn into others."""

    MOST_TWIGS = 16

    def __init__(
        self, chance: random.Random, run: Callable[[], Any], unit: float = 1.0, pauses: bool = False
    ) -> None:
        self._pauses = pauses  # every third gate is a pause
        self.root = Twig("root", "sequence", {})
        self.dropped: list[tuple[Twig, Twig]] = []  # each with what it hung on
        self._run = run
        self._unit = unit  # seconds that delays and timeouts are counted in
        self._count = 0
        # Some woods are full of loops: much of what can go wrong needs several around a node.
        self._nests = chance.choice((NESTS, NESTS, ("parallel", *("loop",) * 4)))
        for _ in range(chance.choice((1, 2, 2, 3, 3, 4, 6, 9))):
            self._sprout(chance)

    # As a tree

    def tree(self) -> Workflow:
        """Return the tree; without its needs, where they form a cycle."""
        ids = {twig.id for twig, _ in self.root.walk() if twig.kind not in NESTS}
        try:
            tree = Workflow("wood", *[self._build(twig, ids) for twig in self.root.below])
            ss.Plan(tree, {})
        except ss.AuthoringError:
            tree = Workflow("wood", *[self._build(twig, set()) for twig in self.root.below])
        return tree

    def _build(self, twig: Twig, ids: set[str]) -> ss.Element:
        below, options = [self._build(one, ids) for one in twig.below], twig.options
        some = {name: options[name] for name in ("on_deny", "skip_if")}
        some["needs"] = [id for id in twig.needs if id in ids]
        if twig.kind == "sequence":
            return Sequence(*below)
        if twig.kind == "parallel":
            return Parallel(*below, max_concurrency=options["limit"])
        if twig.kind == "loop":
            some = {name: options[name] for name in ("until", "max_iterations", "on_max")}
            return Loop(*below, id=twig.id, **some)
        if twig.kind == "approval" and self._pauses and int(twig.id[1:]) % 3 == twig.turns % 3:
            return Pause(twig.id, seconds=1, needs=some["needs"], skip_if=some["skip_if"])
        if twig.kind == "approval":
            timeout = options["timeout"] and options["timeout"] * self._unit
            return Approval(twig.id, timeout=timeout, on_timeout=options["on_timeout"], **some)
        for name in ("retries", "continue_on_fail", "needs_approval"):
            some[name] = options[name]
        run = {} if options["is_static"] else self._run
        return Task(twig.id, run, retry_delay=options["retry_delay"] * self._unit, **some)

    # Changes

    def _new(self, chance: random.Random, kind: str) -> Twig:
        self._count += 1
        options = {name: chance.choice(values) for name, values in TWIG_OPTIONS.items()}
        return Twig(f"{kind[0]}{self._count}", kind, options)

    def _sprout(self, chance: random.Random) -> None:
        twig = self._new(chance, chance.choice(("task", "task", "task", "approval")))
        if chance.random() < 0.3:
            twig.needs = self._some_ids(chance)
        for _ in range(chance.choice((0, 0, 1, 1, 2))):
            nest = self._new(chance, chance.choice(self._nests))
            nest.below, twig = [twig], nest
        self._insert(chance, twig)

    def _some_ids(self, chance: random.Random) -> list[str]:
        ids = [twig.id for twig, _ in self.root.walk() if twig.kind not in NESTS]
        return chance.sample(ids, min(len(ids), chance.choice((0, 1, 1, 2))))

    def _insert(self, chance: random.Random, twig: Twig, kinds: Seq[str] = NESTS) -> None:
        nests = [one for one, _ in self.root.walk() if one.kind in kinds]
        below = chance.choice([*nests, self.root] if kinds is NESTS else nests or [self.root]).below
        below.insert(chance.randint(0, len(below)), twig)

    def change(self, chance: random.Random, busy: set[str]) -> None:
        """Change one thing, rather often at or around a node that is busy."""
        pairs = list(self.root.walk())
        near = [(twig, on) for twig, on in pairs if twig.id in busy]
        if near and chance.random() < 0.5:
            pairs = near
        changes = [self._return, self._return, self._grow]
        if pairs:
            changes += [self._drop, self._move, self._gate, self._turn, self._wrap, self._alter] * 2
        chance.choice(changes)(chance, *(chance.choice(pairs) if pairs else (self.root, self.root)))

    def _return(self, chance: random.Random, *_: Twig) -> None:
        """Bring one back, most often to where it was."""
        if not self.dropped:
            return
        twig, on = self.dropped.pop(chance.randrange(len(self.dropped)))
        if chance.random() < 0.3 or on not in [self.root, *(one for one, _ in self.root.walk())]:
            self._insert(chance, twig)
        else:
            on.below.insert(chance.randint(0, len(on.below)), twig)

    def _grow(self, chance: random.Random, *_: Twig) -> None:
        if sum(1 for _ in self.root.walk()) < self.MOST_TWIGS:
            self._sprout(chance)

    def _drop(self, chance: random.Random, twig: Twig, on: Twig) -> None:
        on.below.remove(twig)
        self.dropped.append((twig, on))

    def _move(self, chance: random.Random, twig: Twig, on: Twig) -> None:
        on.below.remove(twig)
        self._insert(chance, twig, chance.choice((NESTS, NESTS, ("loop",))))

    def _gate(self, chance: random.Random, twig: Twig, on: Twig) -> None:
        """Put a gate before a node."""
        gate, at = self._new(chance, "approval"), on.below.index(twig)
        if on.kind == "parallel":
            both = self._new(chance, "sequence")
            both.below, on.below[at] = [gate, twig], both
        else:
            on.below.insert(at, gate)

    def _turn(self, chance: random.Random, twig: Twig, _: Twig) -> None:
        if twig.kind in NESTS:
            twig.kind = chance.choice(self._nests)
        else:
            twig.kind = "task" if twig.kind == "approval" else "approval"
            twig.turns += 1

    def _wrap(self, chance: random.Random, twig: Twig, on: Twig) -> None:
        at = on.below.index(twig)
        if twig.kind in NESTS:
            on.below[at : at + 1] = twig.below
        else:
            nest = self._new(chance, chance.choice(self._nests))
            nest.below, on.below[at] = [twig], nest

    def _alter(self, chance: random.Random, twig: Twig, _: Twig) -> None:
        if chance.random() < 0.15:
            twig.needs = self._some_ids(chance)
        name = chance.choice(list(TWIG_OPTIONS))
        twig.options[name] = chance.choice(TWIG_OPTIONS[name])


def sketch(element: dict[str, Any]) -> str:
    """Return a frame in one line: t1 is a task, a2? a gate, [..] a Sequence, (..) a Parallel."""
    props, kind = dict(element["props"]), element["tag"].partition(":")[2]
    inner = " ".join(map(sketch, element["children"]))
    name = props.pop("id", "") + "?" * (props.pop("approvalMode", None) is not None)
    props.pop("name", None)
    if name.endswith("?"):
        props.pop("needsApproval", None)
    shown = ",".join(f"{key}={value}" for key, value in props.items() if key != "onMaxReached")
    shown = f"{{{shown}}}" if shown else ""
    if kind == "task":
        return name + shown
    left, right = {"parallel": "()", "ralph": "<>"}.get(kind, "[]")
    return f"{name}{shown}{left}{inner}{right}"


# The rules


class Broken(AssertionError):
    """A rule does not hold: which, and at what."""

    def __init__(self, rule: str, detail: object = "") -> None:
        super().__init__(f"{rule}: {detail}" if detail != "" else rule)
        self.rule = rule


def hold(condition: object, rule: str, detail: object = "") -> None:
    if not condition:
        raise Broken(rule, detail)


@dataclasses.dataclass
class NodeRow:
    """What is stored of one node: what a driver keeps, or a log tells."""

    state: str = "pending"
    attempts: list[ss.Attempt] = dataclasses.field(default_factory=list)
    gate: str | None = None
    is_pause: bool = False  # what its gate is, or was
    ended_as: str = ""  # "task", "approval" or "pause": what its id stood for when it ended
    crashes: int = 0  # in a row
    due_at_ms: int = 0  # its next attempt begins no earlier
    kind: str | None = None  # what it is stored as
    asked: dict[str, Any] | None = None  # at its gate

    @property
    def is_running(self) -> bool:
        return self.state == "in-progress"


class Place:
    """An element of the newest frame, with the key that its loops give it."""

    def __init__(self, element: dict[str, Any], on: Place | None, loops: tuple[Place, ...]) -> None:
        props = element["props"]
        self.kind = {"ralph": "loop"}.get(kind := element["tag"].partition(":")[2], kind)
        if "approvalMode" in props:
            self.kind = "pause" if props["approvalMode"] == "pause" else "approval"
        self.props: dict[str, str] = props
        self.on = on
        self.loops = loops
        self.key: Any = None  # (node id, iteration) of a node, the scoped id of a loop
        self.below: list[Place] = []
        self.limit = int(props.get("maxConcurrency", 10**9))
        self.needs = [id for id in props.get("dependsOn", "").split(",") if id]
        self.is_skipped = "skipIf" in props
        self.may_fail = "continueOnFail" in props
        self.asks_first = "needsApproval" in props or self.kind == "pause"


class Rules:
    """What may happen, and what must: from the newest frame, the rows and the loops alone.

    A question may be asked in two ways. `surely` is for what must happen: a node that ended before
    its turn has come lets nothing go on yet. The other way is for what must not.
    """

    def __init__(
        self,
        frame: dict[str, Any],
        rows: dict[ss.Key, NodeRow],
        loops: dict[str, tuple[int, bool]],
    ) -> None:
        self.rows = rows
        self.loops = loops
        self.by_id: dict[str, Place] = {}
        self.root = self._mount(frame, None, ())
        self.places = {place.key: place for place in self.by_id.values()}
        self.nodes = [place for place in self.by_id.values() if place.kind != "loop"]
        self.running = [key for key, row in rows.items() if row.is_running]

    def _mount(self, element: dict[str, Any], on: Place | None, loops: tuple[Place, ...]) -> Place:
        place = Place(element, on, loops)
        id = place.props.get("id")
        if id is not None:
            self.by_id[id] = place
            rounds = [f"{loop.props['id']}={self.iteration(loop)}" for loop in loops]
            if place.kind == "loop":
                place.key = id + (f"@@{','.join(rounds)}" if rounds else "")
            else:
                scope = f"@@{','.join(rounds[:-1])}" if rounds[:-1] else ""
                place.key = (id + scope, self.iteration(loops[-1]) if loops else 0)
        inner = (*loops, place) if place.kind == "loop" else loops
        place.below = [self._mount(child, place, inner) for child in element["children"]]
        return place

    def iteration(self, loop: Place) -> int:
        return self.loops.get(loop.key, (0, False))[0]

    # What has ended, and whose turn has come

    def has_ended(self, place: Place) -> bool:
        """True for a node that lets what follows it go on: under the id that it now has."""
        row = self.rows.get(place.key, NodeRow())
        if row.is_running:
            return False
        is_same = row.ended_as == place.kind
        if row.state == "finished":
            return is_same or place.kind in GATES and row.gate in DECIDED
        if row.state == "skipped":
            return is_same or place.is_skipped or place.asks_first and row.gate == "denied"
        return row.state == "failed" and is_same and place.may_fail

    def passed(self, place: Place, surely: bool = False) -> bool:
        if place.kind == "loop":
            return self.loops.get(place.key, (0, False))[1]
        if place.kind in ("task", *GATES):
            return self.has_ended(place) and (not surely or self.has_turn(place, surely))
        return all(self.passed(below, surely) for below in place.below)

    def has_turn(self, place: Place, surely: bool = False) -> bool:
        on = place.on
        if on is None:
            return True
        if not self.has_turn(on, surely):
            return False
        if on.kind == "loop" and not self.is_going(on):
            return False
        before = [] if on.kind == "parallel" else on.below[: on.below.index(place)]
        return all(self.passed(one, surely) for one in before) and all(
            self.passed(self._awaited(self.by_id[id], place), surely) for id in place.needs
        )

    def is_going(self, loop: Place) -> bool:
        """True for a loop that has begun and is not over."""
        return loop.key in self.loops and not self.loops[loop.key][1]

    @staticmethod
    def _awaited(target: Place, place: Place) -> Place:
        return next((loop for loop in target.loops if loop not in place.loops), target)

    def _around(self, place: Place) -> Iterator[Place]:
        while place.on is not None:
            place = place.on
            yield place

    def has_room(self, place: Place, limit: int) -> bool:
        """True when the run and every Parallel around a node have a free place."""
        taken = Counter(
            around
            for key in self.running
            for around in self._around(self.places.get(key, self.root))
        )
        is_alone = not any(self.rows[key].crashes for key in self.running)
        return (
            len(self.running) < limit
            and all(taken[around] < around.limit for around in self._around(place))
            and (is_alone or not self.rows[place.key].crashes)
        )

    def can_start(self, place: Place, now_ms: int, surely: bool) -> bool:
        """True for a node that needs nothing but a free place."""
        row = self.rows[place.key]
        return (
            place.kind == "task"
            and not row.is_running
            and not self.has_ended(place)
            and not place.is_skipped
            and (not place.asks_first or row.gate == "approved")
            and row.due_at_ms <= now_ms
            and row.crashes < ss.MAX_CRASHES
            and self.has_turn(place, surely)
        )

    def check_start(self, key: ss.Key, now_ms: int, limit: int) -> None:
        """Hold a start against the rules; the rows are as they were before it."""
        place = self.places.get(key)
        if place is None or place.kind != "task":
            raise Broken("a node starts that is not in the tree", key)
        row = self.rows[key]
        hold(not row.is_running, "a node runs twice at once", key)
        hold(not self.has_ended(place), "finished work runs again", key)
        hold(self.has_turn(place), "a node starts before its turn", key)
        hold(not place.asks_first or row.gate == "approved", "a gate of its own is passed", key)
        hold(row.due_at_ms <= now_ms, "a retry starts too early", key)
        hold(self.can_start(place, now_ms, False), "a node starts that should not", key)
        hold(self.has_room(place, limit), "more run at once than may", key)

    def check_end(self, place: Place, state: str, on_deny: str | None = None) -> None:
        """Hold an end without an attempt against the rules: a skip, a decision, a denial."""
        row = self.rows[place.key]
        hold(self.has_turn(place), f"a node is {state} before its turn", place.key)
        if state == "finished":
            rights = {"approved"} if on_deny not in (None, "continue") else DECIDED
            hold(
                place.kind in GATES and row.gate in rights,
                "a gate passes without a decision",
                place.key,
            )
        elif state == "failed":
            hold(row.gate == "denied" and on_deny in (None, "fail"), "fails undenied", place.key)
        else:
            is_denied = row.gate == "denied" and on_deny != "fail"
            hold(place.is_skipped or is_denied, "a node is skipped without a reason", place.key)

    def check_loop(self, key: str, iteration: int, is_done: bool) -> None:
        """Hold the begin, the next iteration or the end of a loop against the rules."""
        loop = self.places[key]
        begun = key in self.loops
        known, was_done = self.loops.get(key, (-1, False))
        hold(self.has_turn(loop) and not was_done, "a loop moves out of turn", key)
        hold(not begun or all(map(self.passed, loop.below)), "a loop leaves its body early", key)
        is_last = loop.props["until"] == "true" or known + 1 >= int(loop.props["maxIterations"])
        hold(is_last == is_done, "a loop goes on or ends against `until`", key)
        hold(iteration == (max(known, 0) if is_done else known + 1), "a loop miscounts", key)

    def check_rest(self, now_ms: int, limit: int) -> None:
        """When nothing is left to do now, nothing may be left undone."""
        for place in self.nodes:
            row = self.rows.get(place.key)
            hold(row is not None, "a node has no row", place.key)
            assert row is not None
            if row.is_running or self.has_ended(place) or not self.has_turn(place, True):
                continue
            hold(not place.is_skipped or row.gate == "requested", "is not skipped", place.key)
            if place.asks_first:
                known = (row.gate, row.state)
                hold(row.gate in DECIDED or known == ASKED[place.kind == "pause"],
                     "a gate is not asked", place.key)  # fmt: skip
                is_wanted = place.kind == "task" and row.gate == "approved"
                hold(is_wanted or row.gate == "requested", "a decision is not heard", place.key)
                if row.gate == "requested":
                    continue
            is_bad = place.kind == "task" and row.crashes >= ss.MAX_CRASHES
            hold(not is_bad or place.is_skipped, "a node crashes on and on", place.key)
            if self.can_start(place, now_ms, True):
                hold(not self.has_room(place, limit), "a free place stays empty", place.key)
        for loop in self.by_id.values():
            if loop.kind == "loop" and self.has_turn(loop, True) and not self.passed(loop):
                hold(loop.key in self.loops, "a loop does not begin", loop.key)
                is_over = all(self.passed(below, True) for below in loop.below)
                hold(not is_over, "a loop neither ends nor goes on", loop.key)


DECIDED = ("approved", "denied")
ASKED = (("requested", "waiting-approval"), ("requested", "pending"))  # the latter of a pause
GATES = ("approval", "pause")


# The pure core, driven without an engine


class StoredRows:
    """The rows of a model run, read as an engine reads those of its file."""

    def __init__(self, rows: dict[ss.Key, NodeRow], loops: dict[str, tuple[int, bool]]) -> None:
        self.rows = sorted(rows.items())
        self.loops = loops

    def list_nodes(self, _: str) -> list[ss.Node]:
        newest = [len(row.attempts) - 1 if row.attempts else None for _, row in self.rows]
        return [
            ss.Node(*key, row.state, last, 0, None, row.kind)
            for (key, row), last in zip(self.rows, newest)
        ]

    def list_attempts(self, _: str, open_nodes_only: bool) -> list[ss.Attempt]:
        over = ("finished", "skipped") if open_nodes_only else ()
        rows = [row for _, row in self.rows]
        asked = [row for row in rows if row.state == "finished" and row.gate is not None]
        known = [row for row in rows if row.state not in over or row in asked]
        return [attempt for row in known for attempt in row.attempts]

    def list_gates(self, _: str) -> list[ss.Gate]:
        gates = [(key, row.gate) for key, row in self.rows if row.gate is not None]
        pauses = {key: '{"pause":true}' for key, row in self.rows if row.is_pause}
        return [
            ss.Gate(*key, status, 0, None, None, None, pauses.get(key)) for key, status in gates
        ]

    def list_loops(self, _: str) -> dict[str, tuple[int, bool]]:
        return dict(self.loops)


class Case(NamedTuple):
    """What a model run depends on: each step draws from a generator of its own."""

    seed: str
    steps: tuple[int, ...]
    pruned: tuple[int, ...] = ()  # twigs of the first tree that are left out


class PureModel:
    """Drives `Progress` as an engine would, with a clock of its own, and dies now and then."""

    MOST_STEPS = 3000

    def __init__(self, case: Case) -> None:
        chance = random.Random(f"{case.seed} tree")
        self.case = case
        self.limit = chance.choice((1, 2, 2, 3, 4))
        self.wood = Wood(chance, answer, pauses=True)
        for index, (twig, on) in enumerate(list(self.wood.root.walk())):
            if index in case.pruned and twig in on.below:
                on.below.remove(twig)
        self.trace: list[str] = [f"max_concurrency={self.limit}"]
        self.now = 1000
        self.rows: dict[ss.Key, NodeRow] = {}
        self.loops: dict[str, tuple[int, bool]] = {}
        self.begin()

    def note(self, *words: object) -> None:
        self.trace.append(" ".join(map(str, words)))

    def run(self) -> None:
        """Carry out the steps, then let everything come to its end."""
        chance = random.Random(f"{self.case.seed} start")
        self.settle(chance, 0)
        for number in self.case.steps:
            chance = random.Random(f"{self.case.seed} {number}")
            if self.is_over:
                self.close()
                if not self.retry(chance):
                    return
            self.act(chance)
            self.settle(chance, chance.choice((0, 0, 1, 3)))
        for _ in range(self.MOST_STEPS):
            if self.is_over:
                self.close()
                return
            self.act_towards_the_end(chance)
            self.settle(chance, 0)
        raise Broken("the run does not end")

    # Lives

    def begin(self) -> None:
        """Begin a life: recall what the rows say, as an engine does."""
        self.progress = ss.Progress(self.limit)
        self.retries: dict[ss.Key, int] = {}  # when they are due
        self.stopped: set[ss.Key] = set()
        self.seen: dict[str, tuple[ss.Key, str]] = {}  # what the newest render has read of states
        reads: Any = StoredRows(self.rows, self.loops)
        self.frame: dict[str, Any] = ss.xml_of(Workflow("wood"))
        self.leaves: dict[str, ss.Leaf] = {}
        ss.recall_records(reads, "model", self.progress)
        for key, row in self.rows.items():
            if row.state in ("finished", "skipped"):  # what it had failed before counts no more
                row.due_at_ms = 0
                row.attempts = [a._replace(meta_json='{"forgiven": true}') for a in row.attempts]
            row.crashes = self.progress.records[key].crashes

    def die(self, has_crashed: bool) -> None:
        self.note("the process", "crashes" if has_crashed else "ends", "and resumes")
        for key in self.running:
            self.end_attempt(key, "cancelled", **({"crashed": True} if has_crashed else {}))
            self.rows[key].state = "cancelled"
        self.begin()

    def suspend(self, chance: random.Random) -> None:
        self.note("the run is suspended")
        self.progress.is_stopping = True
        for key in self.running:
            self.finish(key, chance.choice(("interrupted", "interrupted", "finished", "failed")))
        self.settle(chance, 0)
        if not self.progress.failed:
            self.die(False)

    @property
    def is_over(self) -> bool:
        return self.progress.standing() == "ended"

    def close(self) -> None:
        """Close a run that has ended, as an engine does."""
        for row in self.rows.values():
            if row.state == "waiting-approval":
                row.state = "cancelled"
            row.gate = "cancelled" if row.gate == "requested" else row.gate
        left = [key for key, row in self.rows.items() if row.gate == "requested" or row.is_running]
        hold(not left, "something is open after the end", left)

    def retry(self, chance: random.Random) -> bool:
        """Give what failed a fresh try; False when the run is over."""
        if not self.progress.failed or chance.random() < 0.5:
            return False
        self.note("the failed nodes get a fresh try")
        for row in self.rows.values():
            if row.state == "failed":
                row.attempts = [a._replace(meta_json='{"forgiven": true}') for a in row.attempts]
                row.state, row.ended_as, row.due_at_ms = "pending", "", 0
                row.gate = row.gate and "cancelled"
        self.begin()
        self.settle(chance, 1)
        return not self.is_over

    # Steps

    def act(self, chance: random.Random) -> None:
        """Let one thing happen, or several before the core is asked to go on."""
        acts: list[Callable[[random.Random], None]] = [self.change, self.change]
        acts += [self.end_one] * 3 * bool(self.running)
        acts += [self.decide_one] * 2 * bool(self.open_gates)
        acts += [self.wait] * 2 * bool(self.retries)
        if chance.random() < 0.08:
            acts = [self.suspend, lambda chance: self.die(chance.random() < 0.7)]
        chance.choice(acts)(chance)
        if chance.random() < 0.2 and not self.is_over:
            self.act(chance)

    def act_towards_the_end(self, chance: random.Random) -> None:
        if self.running:
            self.end_one(chance, "finished")
        elif self.retries:
            self.wait(chance)
        elif self.open_gates:
            self.decide_one(chance)
        else:
            raise Broken("the run hangs", self.progress.standing())

    @property
    def running(self) -> list[ss.Key]:
        return sorted(key for key, row in self.rows.items() if row.is_running)

    @property
    def open_gates(self) -> list[ss.Key]:
        return sorted(key for key, row in self.rows.items() if row.gate == "requested")

    def change(self, chance: random.Random) -> None:
        for _ in range(chance.choice((1, 1, 2, 3))):
            busy = {key[0].partition("@@")[0] for key in (*self.running, *self.retries)}
            self.wood.change(chance, busy)
        if not self.progress.is_halting:
            self.render(chance)

    def wait(self, chance: random.Random) -> None:
        self.now = max(self.now, min(self.retries.values()))
        self.note("time passes:", self.now)
        for key in [key for key, due in self.retries.items() if due <= self.now]:
            del self.retries[key]
            self.progress.retry_is_due(key, self.now)

    def decide_one(self, chance: random.Random, in_time: bool = False) -> None:
        key = chance.choice(self.open_gates)
        verdict, leaf = chance.choice(("approved", "approved", "denied")), self.leaf(key)
        is_timed = isinstance(leaf, Approval) and leaf.timeout is not None
        is_timed = is_timed and not isinstance(leaf, Pause)
        is_timed = is_timed and not in_time and not self.progress.is_halting
        if is_timed and self.progress.records[key].phase == ss.AT_GATE and chance.random() < 0.3:
            assert isinstance(leaf, Approval)
            if leaf.on_timeout == "fail":
                self.note(*key, "is not decided in time")
                self.progress.gate_expired(key)
                row = self.rows[key]
                row.gate, row.state, row.ended_as = "cancelled", "failed", "approval"
                return
            verdict = "approved" if leaf.on_timeout == "approve" else "denied"
        verdict = "approved" if self.rows[key].is_pause else verdict
        self.note(*key, "is", verdict)
        row = self.rows[key]
        row.gate = verdict
        if row.state == "waiting-approval":
            row.state = "pending"
        self.progress.gate_decided(key, verdict)

    def end_one(self, chance: random.Random, result: str | None = None) -> None:
        key = chance.choice(self.running)
        results = ("finished",) * 5 + ("failed",) * 3 + ("unfixable", "crashed")
        result = result or chance.choice(results)
        self.finish(key, "interrupted" if key in self.stopped else result)

    def finish(self, key: ss.Key, result: str) -> None:
        """End an attempt, and see what becomes of its node."""
        row, leaf = self.rows[key], self.leaf(key)
        is_failing = bool(self.progress.failed or self.progress.fatal)
        became = self.progress.attempt_ended(key, result, self.now)
        self.note(*key, result, "->", became)
        expected = "cancelled"
        if isinstance(leaf, Task) and result not in ("interrupted", "crashed"):
            failed = [a for a in row.attempts if a.state == "failed" and "forgiven" not in a.meta]
            is_last = result == "unfixable" or len(failed) >= leaf.retries or is_failing
            expected = "finished" if result == "finished" else "failed" if is_last else "retrying"
        hold(became == expected, f"an attempt should be {expected}", f"{key} is {became}")
        record = self.progress.records[key]
        self.stopped.discard(key)
        if became in ("finished", "failed"):
            self.end_attempt(key, became)
            row.state, row.ended_as, row.crashes = became, "task", 0
        elif became == "retrying":
            assert isinstance(leaf, Task)
            row.due_at_ms = self.now + round(1000 * leaf.retry_delay)
            hold(record.due_at_ms == row.due_at_ms, "a retry is due at the wrong time", key)
            self.end_attempt(key, "failed", dueAtMs=row.due_at_ms)
            row.state = "pending"
        else:
            is_crash = result == "crashed"
            self.end_attempt(key, "cancelled", **({"crashed": True} if is_crash else {}))
            row.crashes += is_crash
            row.state = "cancelled"
        if became == "failed" and leaf is not None and not leaf.continue_on_fail:
            hold(self.progress.is_halting, "the run goes on after a failure", key)

    def end_attempt(self, key: ss.Key, state: str, **meta: Any) -> None:
        attempts = self.rows[key].attempts
        attempts[-1] = attempts[-1]._replace(state=state, meta_json=ss.to_json(meta))

    def leaf(self, key: ss.Key) -> ss.Leaf | None:
        """Return what the newest tree has under a key."""
        place = self.rules().places.get(key)
        return None if place is None else self.leaves[place.props["id"]]

    def rules(self) -> Rules:
        return Rules(self.frame, self.rows, self.loops)

    # What the engine does

    def settle(self, chance: random.Random, changes: int) -> None:
        """Go on until nothing is left to do now; render when what was read has changed."""
        while True:
            for effect in self.progress.advance(self.now):
                self.carry_out(effect)
            self.check()
            if not self.progress.is_stale or self.progress.is_halting:
                return
            if changes and chance.random() < 0.5:
                changes -= 1
                self.wood.change(chance, {key[0].partition("@@")[0] for key in self.running})
                if chance.random() < 0.03:
                    self.die(True)
            self.progress.refuse_endless_rendering(ss.Plan(self.wood.tree(), self.loops))
            self.render(chance)

    def render(self, chance: random.Random) -> None:
        tree = self.wood.tree()
        self.progress.begin_render()
        plan = ss.Plan(tree, self.progress.loops)
        places = self.rules().by_id
        share = chance.choice((0, 0.5, 1))
        reads = {("state", id) for id in plan.by_id if chance.random() < share}
        self.seen = {
            id: (place.key, self.rows[place.key].state)
            for id, place in places.items()
            if ("state", id) in reads and place.key in self.rows
        }
        if self.open_gates and chance.random() < 0.1:
            self.decide_one(chance, in_time=True)
        self.frame = ss.xml_of(tree)
        self.leaves = {slot.leaf.id: slot.leaf for slot in plan.leaves()}
        self.note("tree:", sketch(self.frame))
        for effect in self.progress.rendered(plan, reads):
            self.carry_out(effect)

    def carry_out(self, effect: ss.Effect) -> None:
        if effect.kind != "frame":
            self.note(" ", effect.kind, *effect.key, "" if effect.detail is None else effect.detail)
            getattr(self, "on_" + effect.kind)(effect.key, effect.detail)

    def at(self, key: ss.Key) -> tuple[Rules, Place]:
        """Return the rules, and the place in today's tree that something happens at."""
        rules = self.rules()
        if key not in rules.places:
            raise Broken("something happens to a node that is not in the tree", key)
        return rules, rules.places[key]

    def on_insert(self, key: ss.Key, _: object) -> None:
        hold(key not in self.rows, "a row is inserted twice", key)
        self.rows[key] = NodeRow(kind=self.at(key)[1].kind)

    def on_repeat(self, key: ss.Key, _: object) -> None:
        rules, place = self.at(key)
        # A gate whose node has had attempts may be asked anew: they were a task's of its id.
        was_task = place.kind in GATES and bool(self.rows[key].attempts)
        hold(was_task or not rules.has_ended(place), "an ended node begins again", key)
        self.rows[key].state = "pending"

    def on_recall(self, key: ss.Key, _: object) -> None:
        if key in self.rows:
            stored = StoredRows({key: self.rows[key]}, {})
            gate = next(iter(stored.list_gates("")), None)
            record = ss.record_of(stored.list_nodes("")[0], self.rows[key].attempts, gate)
            self.progress.recall(key, record)

    def on_renew(self, key: ss.Key, _: object) -> None:
        row = self.rows[key]
        row.attempts = [a._replace(meta_json='{"forgiven": true}') for a in row.attempts]
        row.gate = row.gate and "cancelled"
        row.due_at_ms = 0
        row.kind = self.at(key)[1].kind

    def on_skip(self, key: ss.Key, _: object) -> None:
        self.end_node(key, "skipped")

    def on_pass(self, key: ss.Key, _: object) -> None:
        self.end_node(key, "finished")

    def on_deny(self, key: ss.Key, _: object) -> None:
        self.end_node(key, "failed")

    def end_node(self, key: ss.Key, state: str) -> None:
        rules, place = self.at(key)
        rules.check_end(place, state, self.leaves[place.props["id"]].on_deny)
        self.rows[key].state, self.rows[key].ended_as = state, place.kind
        self.rows[key].crashes = 0

    def on_crash(self, key: ss.Key, _: object) -> None:
        row = self.rows[key]
        hold(row.crashes >= ss.MAX_CRASHES, "a node fails that did not crash", key)
        row.state, row.ended_as, row.crashes = "failed", "task", 0

    def on_delay(self, key: ss.Key, due_at_ms: int) -> None:
        hold(due_at_ms == self.rows[key].due_at_ms > self.now, "a wrong delay", key)
        self.retries[key] = due_at_ms

    def on_start(self, key: ss.Key, attempt: int) -> None:
        hold(not self.progress.is_halting, "a node starts in a run that halts", key)
        self.rules().check_start(key, self.now, self.limit)
        row = self.rows[key]
        hold(attempt == len(row.attempts), "a wrong attempt number", key)
        row.attempts.append(ss.Attempt(*key, attempt, "in-progress", self.now, None, None, None))
        row.state = "in-progress"
        leaf = self.leaf(key)
        if isinstance(leaf, Task) and isinstance(leaf.run, dict):
            self.finish(key, "finished")

    def on_stop(self, key: ss.Key, _: object) -> None:
        hold(self.rows[key].is_running, "something is stopped that does not run", key)
        place = self.rules().places.get(key)
        hold(place is None or place.kind != "task", "a task of the tree is stopped", key)
        self.stopped.add(key)

    def on_open(self, key: ss.Key, _: object) -> None:
        row, (rules, place) = self.rows[key], self.at(key)
        hold(rules.has_turn(place), "a gate is asked before its turn", key)
        hold(row.gate not in ("requested", *DECIDED), "a gate is asked twice", key)
        row.is_pause = place.kind == "pause"
        row.gate, row.state = ASKED[row.is_pause]
        row.asked = self.leaves[place.props["id"]].request()

    def on_await(self, key: ss.Key, _: object) -> None:
        row = self.rows[key]
        is_open = (row.gate, row.state) == ASKED[row.is_pause]
        hold(is_open, "a gate is awaited that is not open", key)
        row.asked = self.leaves[self.at(key)[1].props["id"]].request()

    def on_close(self, key: ss.Key, _: object) -> None:
        hold(self.rows[key].gate == "requested", "a gate is closed that is not open", key)
        self.rows[key].gate = self.rows[key].state = "cancelled"

    def on_loop(self, key: tuple[str, int], is_done: bool) -> None:
        self.rules().check_loop(*key, is_done)
        self.loops[key[0]] = (key[1], is_done)

    # What must hold after each step

    def check(self) -> None:
        progress, rules = self.progress, self.rules()
        for key, record in progress.records.items():
            row = self.rows[key]
            last = row.attempts[-1].attempt if row.attempts else None
            told = (record.state, record.last_attempt, record.phase == ss.RUNNING)
            known = (row.state, last, row.is_running)
            hold(told == known, "a record is not what was done", f"{key} {told} {known}")
        hold(progress.running == len(rules.running), "running is miscounted", progress.running)
        if progress.is_halting:
            for place in rules.nodes:
                if place.key[0] in progress.failed:
                    is_same = rules.rows[place.key].ended_as == place.kind
                    hold(is_same and not place.may_fail, "the run fails of nothing", place.key)
            expected = "busy" if rules.running else "ended"
            hold(progress.standing() == expected, "a halting run is not", expected)
            return
        for place in rules.nodes:
            row = rules.rows[place.key]
            if (row.gate, row.state) == ASKED[row.is_pause]:
                hold(not place.is_skipped, "a gate is open that is to be skipped", place.key)
                today = self.leaves[place.props["id"]].request()
                hold(row.asked == today, "a gate asks what the tree does not", place.key)
        if progress.is_stale:
            hold(progress.standing() == "stale", "a stale run is not", progress.standing())
            return
        gates = len(self.open_gates)
        hold(progress.open_gates == gates, "gates are miscounted", (progress.open_gates, gates))
        outside = [key for key in rules.running if key not in rules.places]
        hold(self.stopped.issuperset(outside), "what left the tree runs on", outside)
        outside = [key for key in self.open_gates if key not in rules.places]
        hold(not outside, "a gate that left the tree stays open", outside)
        rules.check_rest(self.now, self.limit)
        queued = [
            sum(rules.can_start(place, self.now, surely) for place in rules.nodes)
            for surely in (True, False)
        ]
        is_right = queued[0] <= progress.queued <= queued[1]
        hold(is_right, "queued is miscounted", f"{progress.queued}, not {queued}")
        for id, (key, state) in self.seen.items():
            if id in rules.by_id and rules.by_id[id].key == key:
                row = self.rows[key]
                hold(row.state == state, "a render is due", f"{id} was {state}, is {row.state}")
        self.check_standing(progress.standing(), rules)

    def check_standing(self, standing: str, rules: Rules) -> None:
        is_done = all(map(rules.passed, rules.root.below))
        is_delayed = any(due > self.now for due in self.retries.values())
        hold(standing in ("busy", "ended", "waiting"), "the run is stuck", standing)
        if standing == "ended":
            hold(is_done and not rules.running, "the run ends early")
        elif standing == "busy":
            hold(rules.running or is_delayed, "the run is busy with nothing")
        else:
            hold(self.open_gates and not rules.running, "the run waits for nothing")


def broken_by(case: Case) -> tuple[str, list[str]] | None:
    """Run a case; return the rule that it breaks and its trace."""
    model = None
    try:
        model = PureModel(case)
        model.run()
    except Exception as error:  # also what the core itself raises
        trace = model.trace if model is not None else []
        rule = error.rule if isinstance(error, Broken) else f"raised {type(error).__name__}"
        last = traceback.extract_tb(error.__traceback__)[-1]
        return rule, [*trace, f"BROKEN {error!r} at {last.name}, line {last.lineno}"]
    return None


def shrink(case: Case) -> tuple[Case, list[str]]:
    """Leave out steps and twigs as long as the same rule breaks; return the rest and its trace."""
    found = broken_by(case)
    assert found is not None
    rule, trace = found
    twigs = len(list(PureModel(case).wood.root.walk()))
    deadline = time.monotonic() + 20
    size = max(len(case.steps) // 2, 1)
    while size and time.monotonic() < deadline:
        smaller = [
            case._replace(steps=case.steps[:at] + case.steps[at + size :])
            for at in range(0, len(case.steps), size)
        ]
        smaller += [
            case._replace(pruned=(*case.pruned, n)) for n in range(twigs) if n not in case.pruned
        ]
        for one in smaller:
            found = broken_by(one)
            if found is not None and found[0] == rule:
                case, trace = one, found[1]
                break
        else:
            size //= 2
    return case, trace


def pure_case(seed: str) -> Case:
    return Case(seed, tuple(range(random.Random(seed).choice((3, 6, 10, 15, 25, 40)))))


# The real engine, and its log


class LogRules(Rules):
    """The rules as far as a log can tell: it does not say when a loop ends, only when it may."""

    begun: set[str] = set()  # loops of which something has begun, by key
    unseen: set[str] = set()  # loops that were without a node: their iterations leave no trace

    def is_going(self, loop: Place) -> bool:
        return True

    def note_ends(self, place: Place) -> None:
        """Note for each loop at or below a place that it may be over, the inner ones first."""
        for below in place.below:
            self.note_ends(below)
        if place.kind != "loop" or not self.has_turn(place):
            return
        nodes = [one for one in self.nodes if place in one.loops]
        is_last = self.iteration(place) + 1 >= int(place.props["maxIterations"])
        is_over = all(map(self.passed, place.below)) or place.key not in self.begun
        if not nodes:
            self.unseen.add(place.key)
        if place.key in self.unseen or is_over and (is_last or place.props["until"] == "true"):
            self.loops[place.key] = (self.iteration(place), True)


class Judge:
    """Reads the log of a run and holds every event against the rules, with the frames beside it."""

    # What happens to a node only when its turn has come, unless an attempt was in flight.
    TURNS = ("NodeStarted", "NodeFinished", "NodeSkipped", "ApprovalRequested")

    def __init__(self, db: ss.SmithersDb, run_id: str, limit: int) -> None:
        self.db = db
        self.run_id = run_id
        self.limit = limit
        self.rows: dict[ss.Key, NodeRow] = {}
        self.loops: dict[str, tuple[int, bool]] = {}
        self.frame: dict[str, Any] = ss.xml_of(Workflow("wood"))
        self.frames = {frame.frame_no: frame for frame in db.list_frames(run_id, 10**6, 0)}
        self.begun: set[str] = set()
        self.unseen: set[str] = set()
        self.has_failed = False
        self.is_claimed = False  # a life has just begun, perhaps with fresh tries
        self.trace: list[str] = []
        self.kinds: dict[str, str] = {}
        self.both: set[str] = set()  # ids that a task and a gate have shared: asked or run anew

    def judge(self) -> None:
        for event in self.db.list_events(self.run_id):
            payload = event.payload
            self.is_claimed &= event.type in ("NodePending", "NodeCancelled")
            said = [value for name, value in payload.items() if name not in ("runId", "xmlHash")]
            self.trace.append(f"{event.seq} {' '.join(map(str, said[:-1]))}")
            if event.type == "FrameCommitted":
                self.take_frame(self.frames[payload["frameNo"]])
                for place in self.rules().nodes:
                    id = place.props["id"]
                    if self.kinds.setdefault(id, place.kind) != place.kind:
                        self.both.add(id)
                self.trace[-1] += " " + sketch(self.frame)
            elif "nodeId" in payload:
                key = (payload["nodeId"], payload["iteration"])
                rules = self.rules()
                was_running = key in self.rows and self.rows[key].is_running
                getattr(self, "on_" + event.type)(key, rules, payload)
                if key in rules.places and not was_running and event.type in self.TURNS:
                    self.begun |= {loop.key for loop in rules.places[key].loops}
            elif event.type == "RunStatusChanged":
                self.is_claimed = payload["status"] == "running"
                self.has_failed &= not self.is_claimed
            rules = self.rules()
            rules.note_ends(rules.root)
            if payload.get("status") == "waiting-approval":
                hold(not rules.running, "a run waits that is busy", rules.running)
            elif payload.get("status") == "finished":
                is_done = all(map(rules.passed, rules.root.below))
                hold(is_done and not rules.running, "the run ends early")
        self.compare()

    def compare(self) -> None:
        """Hold the tables against the log."""
        nodes = {node.key: node.state for node in self.db.list_nodes(self.run_id)}
        told = {key: row.state for key, row in self.rows.items()}
        hold(nodes == told, "nodes are not as the log tells", sorted(nodes.items() ^ told.items()))
        attempts = Counter(attempt.key for attempt in self.db.list_attempts(self.run_id))
        started = Counter({key: len(row.attempts) for key, row in self.rows.items()})
        hold(attempts == +started, "attempts are not as the log tells", (attempts, started))
        still = self.db.list_gates(self.run_id, "requested")
        hold(not still, "a gate stays open after the end", still)

    def rules(self) -> LogRules:
        rules = LogRules(self.frame, self.rows, self.loops)
        rules.begun, rules.unseen = self.begun, self.unseen
        return rules

    def take_frame(self, frame: ss.Frame) -> None:
        """Make a frame the newest, and learn from its keys which iteration each loop is at."""
        self.frame = json.loads(frame.xml_json)
        entries = [entry.rpartition("::") for entry in json.loads(frame.mounted_task_ids_json)]
        mounted = iter([(id, int(iteration)) for id, _, iteration in entries])

        def walk(element: dict[str, Any], loops: tuple[str, ...]) -> None:
            props = element["props"]
            if element["tag"] == "smithers:ralph":
                loops = (*loops, props["id"])
            if element["tag"] == "smithers:task":
                id, iteration = next(mounted)
                rounds = [*re.findall(r"=(\d+)", id), iteration]
                around = [f"{loop}={number}" for loop, number in zip(loops, rounds)]
                for depth, loop in enumerate(loops):
                    key = loop + ("@@" + ",".join(around[:depth]) if depth else "")
                    if self.loops.get(key, (-1, False))[0] != int(rounds[depth]):
                        self.loops[key] = (int(rounds[depth]), key in self.unseen)
            for child in element["children"]:
                walk(child, loops)

        walk(self.frame, ())

    def place(self, key: ss.Key, rules: Rules) -> Place:
        if key not in rules.places:
            raise Broken("something happens to a node that is not in the tree", key)
        return rules.places[key]

    def on_NodePending(self, key: ss.Key, rules: Rules, _: object) -> None:
        row = self.rows.setdefault(key, NodeRow())
        if self.is_claimed and row.state == "failed":  # it gets a fresh try
            row.gate, row.ended_as, row.due_at_ms = row.gate and "cancelled", "", 0
        place = rules.places.get(key)
        is_over = place is not None and row.state != "failed" and rules.has_ended(place)
        if key[0].partition("@@")[0] in self.both:
            is_over, row.gate, row.ended_as = False, row.gate and "cancelled", ""
        hold(not is_over, "an ended node begins again", key)
        row.state = "pending"

    def on_NodeStarted(self, key: ss.Key, rules: Rules, payload: dict[str, Any]) -> None:
        hold(not self.has_failed, "a node starts in a run that fails", key)
        rules.check_start(key, payload["timestampMs"], self.limit)
        row, attempt = self.rows[key], payload["attempt"]
        hold(attempt == len(row.attempts), "a wrong attempt number", key)
        row.attempts.append(ss.Attempt(*key, attempt, "in-progress", 0, None, None, None))
        row.state = "in-progress"

    def on_NodeFinished(self, key: ss.Key, rules: Rules, _: object) -> None:
        self.end(key, rules, "finished")

    def on_NodeSkipped(self, key: ss.Key, rules: Rules, _: object) -> None:
        self.end(key, rules, "skipped")

    def on_NodeFailed(self, key: ss.Key, rules: Rules, payload: dict[str, Any]) -> None:
        place, row = self.place(key, rules), self.rows[key]
        if payload["error"].get("code") == "APPROVAL_TIMEOUT":
            row.state, row.ended_as, row.gate = "failed", place.kind, "cancelled"
        else:
            self.end(key, rules, "failed")
        self.has_failed |= not place.may_fail

    def end(self, key: ss.Key, rules: Rules, state: str) -> None:
        place, row = self.place(key, rules), self.rows[key]
        if not row.is_running:
            rules.check_end(place, state, place.props.get("onDeny"))
        row.state, row.ended_as = state, place.kind

    def on_NodeRetrying(self, key: ss.Key, _: object, payload: dict[str, Any]) -> None:
        row = self.rows[key]
        row.state, row.ended_as, row.due_at_ms = "pending", "", payload["dueAtMs"]
        self.has_failed = False

    def on_NodeCancelled(self, key: ss.Key, _: object, payload: dict[str, Any]) -> None:
        row = self.rows[key]
        hold(row.is_running == ("attempt" in payload), "something else is cancelled", key)
        if not row.is_running:
            row.gate = "cancelled"
        row.state = "cancelled"

    def on_ApprovalRequested(self, key: ss.Key, rules: Rules, _: object) -> None:
        place, row = self.place(key, rules), self.rows[key]
        hold(rules.has_turn(place), "a gate is asked before its turn", key)
        is_shared = key[0].partition("@@")[0] in self.both
        hold(is_shared or row.gate not in ("requested", *DECIDED), "a gate is asked twice", key)
        row.gate = "requested"

    def on_NodeWaitingApproval(self, key: ss.Key, _: object, __: object) -> None:
        self.rows[key].state = "waiting-approval"

    def on_ApprovalGranted(self, key: ss.Key, _: object, payload: dict[str, Any]) -> None:
        row = self.rows[key]
        hold(row.gate == "requested", "a decision about nothing", key)
        row.gate = "approved" if payload["type"] == "ApprovalGranted" else "denied"
        row.state = "pending" if row.state == "waiting-approval" else row.state

    on_ApprovalDenied = on_ApprovalGranted


class Died(BaseException):
    """What a kill looks like to an engine in this process."""


class Part:
    """One attempt, which ends when it is told to."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.fails = False


class EngineModel:
    """Drives a real engine through a tree that changes; its observer says what happens next.

    Nothing waits for a clock: an attempt ends when it is told to, and whenever the observer is
    called it sees to it that something is told.
    """

    RUN = "model"
    MOST_RENDERS = 40

    def __init__(self, seed: str, path: str) -> None:
        self.seed = seed
        self.chance = random.Random(f"{seed} engine")
        self.limit = self.chance.choice((1, 2, 3, 4))
        self.at_once = self.chance.choice((1, 1, 2, 4))
        self.lives = self.chance.choice((1, 1, 2, 3))
        self.wood = Wood(random.Random(f"{seed} tree"), self.play, 0.002)
        self.db = ss.SmithersDb(path)
        self.renders = 0
        self.parts: dict[tuple[str, int, int], Part] = {}
        self.is_live = False
        self.remember()

    def remember(self) -> None:
        """Learn from the log what is in flight."""
        self.playing: dict[ss.Key, int] = {}  # attempts in flight, by node
        self.gates: set[ss.Key] = set()
        self.told: set[ss.Key] = set()  # what was told to end, or decided, and has no event yet
        for event in self.db.list_events(self.RUN):
            self.follow(event.payload)

    def run(self) -> list[str]:
        """Run to the end, then judge; return the log as lines."""
        judge = None
        try:
            self.drive()
            judge = Judge(self.db, self.RUN, self.limit)
            judge.judge()
        except Exception as error:
            if judge is None:
                judge = Judge(self.db, self.RUN, self.limit)
                with contextlib.suppress(Exception):
                    judge.judge()
            broken = Broken(f"seed {self.seed}: {error!r}")
            broken.trace = judge.trace  # type: ignore[attr-defined]
            raise broken from error
        finally:
            self.db.close()
        return judge.trace

    def drive(self) -> None:
        retry = False
        while True:
            engine = self.engine = ss.Engine(
                self.workflow,
                self.db,
                self.RUN,
                max_concurrency=self.limit,
                on_event=self.see,
            )
            self.is_live = False
            self.remember()
            if self.gates and self.chance.random() < 0.5:
                self.tell(self.chance.choice(sorted(self.gates)))
                self.remember()
            if not engine.open(resume=True, retry=retry):
                return
            result = self.live(engine)
            self.end_all()
            if result in ss.TERMINAL_STATUSES:
                retry = result == "failed" and self.chance.random() < 0.3
                if not retry:
                    return

    def live(self, engine: ss.Engine) -> str:
        """Return how the run stands when its engine has left it, `died` when it was killed."""
        outcome: list[Any] = []

        def run() -> None:
            try:
                self.is_live = True
                outcome.append(engine.run().status)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if thread.is_alive():
            engine.cancel()
            self.end_all()
            thread.join(PATIENCE)
            raise Broken("the run hangs", (self.playing, self.gates, self.told))
        if isinstance(outcome[0], Died):
            return "died"
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return str(outcome[0])

    # What the engine calls

    def workflow(self, ctx: Ctx) -> Workflow:
        self.renders += 1
        chance = random.Random(f"{self.seed} {self.renders}")
        if 1 < self.renders < self.MOST_RENDERS:
            for _ in range(chance.choice((0, 0, 1, 2))):
                self.wood.change(chance, {key[0].partition("@@")[0] for key in self.playing})
        share = chance.choice((0.3, 1, 1))
        for twig, _ in self.wood.root.walk():
            if chance.random() < share:
                ctx.state(twig.id)
        return self.wood.tree()

    def play(self) -> int:
        """Be an attempt."""
        task = current_task()
        part = self.parts.setdefault((task.node_id, task.iteration, task.attempt), Part())
        part.is_over.wait(PATIENCE)
        if part.fails:
            raise ss.TaskFailed("so it was told")
        return task.attempt

    def see(self, event: ss.Event) -> None:
        self.follow(event.payload)
        if self.is_live and self.lives > 1 and self.chance.random() < 0.04:
            self.lives -= 1
            if self.chance.random() < 0.5:
                raise Died
            self.engine.suspend()
            self.end_all()
        self.direct()

    def follow(self, payload: dict[str, Any]) -> None:
        type, key = payload["type"], (payload.get("nodeId"), payload.get("iteration"))
        if type == "NodeStarted":
            self.playing[key] = payload["attempt"]
        elif type == "ApprovalRequested":
            self.gates.add(key)
        elif type in ("ApprovalGranted", "ApprovalDenied"):
            self.gates.discard(key)
            self.told.discard(key)
        elif type in ("NodeFinished", "NodeFailed", "NodeCancelled"):
            self.playing.pop(key, None)
            self.gates.discard(key)
            self.told.discard(key)

    def direct(self) -> None:
        """See to it that something is told to end, or is decided."""
        while len(self.told) < self.at_once:
            left = sorted({*self.playing, *self.gates} - self.told)
            if not left:
                return
            self.told.add(key := self.chance.choice(left))
            self.tell(key)

    def tell(self, key: ss.Key) -> None:
        if key in self.gates:
            verdict = self.chance.choice(("approved", "approved", "approved", "denied"))
            try:
                ss.decide(self.db, self.RUN, key[0], ss.Decision(verdict, key[1]))
            except (ss.ApprovalNotPending, ss.RunNotActive):  # closed; the event is on its way
                self.gates.discard(key)
                self.told.discard(key)
        else:
            part = self.parts.setdefault((*key, self.playing[key]), Part())
            part.fails = self.chance.random() < 0.25
            part.is_over.set()

    def end_all(self) -> None:
        for key, attempt in self.playing.items():
            self.parts.setdefault((*key, attempt), Part()).is_over.set()


class ProgressTest(unittest.TestCase):
    """The pure core under random trees that change, ends, decisions and deaths."""

    def test_no_rule_breaks(self) -> None:
        for number in range(200):
            case = pure_case(f"progress {number}")
            if broken_by(case) is not None:
                case, trace = shrink(case)
                self.fail("\n".join([str(case), *trace]))


class ModelTest(unittest.TestCase):
    """The engine itself under random trees that change, ends, decisions and deaths."""

    def test_no_rule_breaks(self) -> None:
        for number in range(20):
            with tempfile.TemporaryDirectory(prefix="smithers-model-") as folder:
                EngineModel(f"engine {number}", os.path.join(folder, "smithers.db")).run()


def model_command(arguments: argparse.Namespace) -> int:
    """Break no rule for some seconds: the pure core most of the time, the engine now and then."""
    began = time.monotonic()
    pure = driven = 0
    while time.monotonic() - began < arguments.seconds:
        for _ in range(200):
            case = pure_case(f"{arguments.seed}/{pure}")
            pure += 1
            if broken_by(case) is not None:
                case, trace = shrink(case)
                print("\n".join([f"VIOLATION seed {arguments.seed}: {case}", *trace]))
                return 1
        for _ in range(10):
            with tempfile.TemporaryDirectory(prefix="smithers-model-") as folder:
                seed = f"{arguments.seed}/{driven}"
                driven += 1
                try:
                    EngineModel(seed, os.path.join(folder, "smithers.db")).run()
                except Broken as error:
                    trace = getattr(error, "trace", [])
                    print("\n".join([*trace, f"VIOLATION of the engine: {error}"]))
                    return 1
    print(f"{pure:,} runs of the core, {driven:,} of the engine in "
          f"{time.monotonic() - began:.0f} s, seed {arguments.seed}: no violation")  # fmt: skip
    return 0


# ---------------------------------------------------------------------------
# Commands: bench, crash, restart, power, fuzz and model
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
    with ss.SmithersDb(path) as db:
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
            with ss.SmithersDb(path) as db:
                opened.append(1000 * (time.perf_counter() - began))
                app = ss.create_serve_app(adapter=db, run_id=RUN)
                began = time.perf_counter()
                app.request("GET", "/")
                answered.append(1000 * (time.perf_counter() - began))
                app.close()
    what = "100,000 nodes, 1,000,000 events"
    return [Measure(f"open a file of {what}", "ms", opened, 50),
            Measure(f"first GET / of {what}", "ms", answered, 50)]  # fmt: skip


PAINTED = """new MutationObserver((changes, observer) => {
    if (!document.querySelector(".gate") || !document.querySelector(".list")) return;
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => { window.painted = performance.now(); }));
}).observe(document, { childList: true, subtree: true })"""


@bench("page")
def bench_page(options: Options) -> list[Measure]:
    """From the address to the gate and the steps on the screen; no row without a browser."""
    if not shutil.which("chromedriver"):
        return []
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        fill_nodes(os.path.join(folder, "smithers.db"), 10_000, 2)
        with serve_child(folder, GATE_FLOW, "--resume") as run:
            run.wait_for_status("waiting-approval")
            with contextlib.closing(Browser()) as browser:
                browser.tell("Page.addScriptToEvaluateOnNewDocument", source=PAINTED)
                times = []
                for n in range(max(3, options.rounds)):
                    url = f"http://127.0.0.1:{run.port}/ui?{n}"
                    browser.ask("POST", "/url", {"url": url})
                    times.append(browser.wait("return window.painted"))
    return [Measure("first paint of the page of 10,000 nodes", "ms", times, 1000)]


# Peers


PEER_APP = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

async def health(request):
    return JSONResponse({"ok": True})

app = Starlette(routes=[Route("/health", health)])
"""
PEER_DBOS = """
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
figures = []
for _ in range(int(sys.argv[2])):
    began = time.perf_counter()
    MEASURE
print(json.dumps(figures), flush=True)
os._exit(0)
"""
PEER_STEPS = PEER_DBOS.replace(
    "MEASURE",
    """flow(200)
    figures.append(1000 * (time.perf_counter() - began) / 200)""",
)


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
        theirs = run_peer(PEER_STEPS, options)
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


def run_peer(script: str, options: Options) -> list[float]:
    """Return what a script prints, run by the interpreter that has the peers."""
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        path = os.path.join(folder, "peer_steps.py")
        with open(path, "w", encoding="utf-8") as out:
            out.write(script)
        argv = [path, os.path.join(folder, "dbos.sqlite"), options.rounds]
        code, out_text, err = run_child(*argv, folder=folder, python=options.peer)
        if code:
            raise RuntimeError(err[-200:])
        figures: list[float] = json.loads(out_text.splitlines()[-1])
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
        commit = commit_ms(os.path.join(folder, "bare.db"))
    if result.status != "finished":
        raise RuntimeError(f"the run is {result.status}: {result.error}")
    ms = 1000 * took / int(count)
    tell({"ms": ms, "bytes": size / int(count), "commits": ms / commit})
    return 0


def commit_ms(path: str, count: int = 300) -> float:
    """Return what the commit of one row takes on this disk, with our settings."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as bare:
        bare.execute("pragma journal_mode = wal")
        bare.execute("pragma synchronous = full")
        bare.execute("pragma wal_autocheckpoint = 200")
        bare.execute("create table t (id integer primary key, text)")
        began = time.perf_counter()
        for _ in range(count):
            bare.execute("begin immediate")
            bare.execute("insert into t (text) values (?)", ("a" * 200,))
            bare.execute("commit")
        return 1000 * (time.perf_counter() - began) / count


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
        figures = [run_steps(kind, count) for _ in range(options.rounds)]
        what = f"a step, {count:,} in a {kind}"
        rows.append(Measure(what, "ms", [f["ms"] for f in figures], target))
        most = {"sequence": 2.0, "parallel": 1.5}.get(kind)
        rows.append(Measure(f"{what}, in commits", "times", [f["commits"] for f in figures], most))
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


# Many runs


MANY_BENCH_FLOW = """
from smithers_serve import Approval, Task, Workflow, current_task

def step():
    return 1

def hold():
    current_task().log("holding")
    current_task().cancelled.wait(600)

def workflow(ctx):
    return Workflow("two", Task("one", step), Task("two", step))

parked = Workflow("parked", Approval("ok"), Task("after", step))
held = Workflow("held", Task("hold", hold))
"""
PEER_RUNS = PEER_DBOS.replace(
    "MEASURE",
    """handles = [DBOS.start_workflow(flow, 2) for _ in range(200)]
    for handle in handles:
        handle.get_result()
    figures.append(200 / (time.perf_counter() - began))""",
)


@contextlib.contextmanager
def serving_many(*flags: str) -> Iterator[Many]:
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        many = Many(folder)
        many.write("bench.py", MANY_BENCH_FLOW)
        many.start(*flags)
        try:
            many.post("bench.py", "warm")
            many.wait("warm", "finished")
            yield many
        finally:
            many.close()


def count_runs(many: Many, status: str) -> int:
    found = many.read("select count(*) from _smithers_runs where status = ?", status)
    return int(found[0][0])


def run_many(many: Many, name: str, count: int) -> float:
    """Start so many runs over one connection; return how many have finished in a second."""
    began = time.perf_counter()
    with contextlib.closing(http.client.HTTPConnection(LOOPBACK, many.port)) as client:
        for number in range(count):
            body = json.dumps({"workflowPath": "bench.py", "runId": f"{name}-{number}"})
            client.request("POST", "/v1/runs", body)
            client.getresponse().read()
    sql = "select count(*) from _smithers_runs where status = 'finished' and run_id like ?"
    with contextlib.closing(sqlite3.connect(many.path)) as db:
        while db.execute(sql, (f"{name}-%",)).fetchone()[0] < count:
            time.sleep(0.02)
    return count / (time.perf_counter() - began)


@bench("runs")
def bench_runs(options: Options) -> list[Measure]:
    """Runs of two tasks, each in a process of its own: one by one, and as many as can be."""
    has_peer = has_modules(options.peer, "dbos")
    theirs, rates, posts = [], [], []
    with serving_many() as many:
        for number in range(20):
            began = time.perf_counter()
            many.post("bench.py", f"one-{number}")
            posts.append(1000 * (time.perf_counter() - began))
            many.wait(f"one-{number}", "finished")
        for turn in range(options.rounds):  # in turns: others may use the machine too
            rates.append(run_many(many, f"{turn}", 200))
            theirs += run_peer(PEER_RUNS, Options(1, options.peer)) if has_peer else []
    rows = [Measure("POST /v1/runs", "ms", posts, 5),
            Measure("runs of two tasks, started and finished", "/s", rates)]  # fmt: skip
    if theirs:
        ratio = [ours / other for ours, other in zip(rates, theirs)]
        rows += [Measure("the same, DBOS on sqlite in one process", "/s", theirs),
                 Measure("ours to DBOS", "times", ratio, 1, ">")]  # fmt: skip
    return rows


def private_mib(pid: int) -> float:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1024


def decide_and_measure(many: Many, ids: Iterable[str]) -> list[float]:
    """Approve gates one after the other; return the times to the next task in ms."""
    waited = []
    for run_id in ids:
        many.ask("POST", f"/v1/runs/{run_id}/nodes/ok/approve")
        many.wait(run_id, "finished")
        sql = "select type, timestamp_ms from _smithers_events where run_id = ?"
        times = dict(many.read(f"{sql} and type in ('ApprovalGranted', 'NodeStarted')", run_id))
        waited.append(float(times["NodeStarted"] - times["ApprovalGranted"]))
    return waited


@bench("workers")
def bench_workers(options: Options) -> list[Measure]:
    with serving_many() as many:
        for number in range(3):
            many.post("bench.py:held", f"h{number}")
            many.wait_for_lines(f"h{number}")
        sizes = [private_mib(many.worker_of(f"h{number}")) for number in range(3)]
    return [Measure("private memory of an active run's worker", "MiB", sizes, 12)]


@bench("parked")
def bench_parked(options: Options) -> list[Measure]:
    """Ten thousand runs that wait for people."""
    with serving_many() as many:
        many.post("bench.py:parked", "p0")
        many.wait("p0", "waiting-approval")
        many.child.finish(signal.SIGTERM)
        many.child.close()
        park_copies(many.path, "p0", 10_000)
        began = time.perf_counter()
        child = many.start()
        wait_for_answer(many.port, "/v1/runs?limit=50")
        start = 1000 * (time.perf_counter() - began)
        time.sleep(1.0)
        share = cpu_share(child.pid, 10.0)
        figures = measure_load(many.port, "/v1/runs?limit=50", options.rounds)
        waited = decide_and_measure(many, [f"p{100 * number}" for number in range(1, 61)])
        memory = vitals(child.pid).rss
        return [
            Measure("start to first answer, 10,000 parked runs", "ms", [start]),
            Measure("memory of the server, 10,000 parked runs", "MiB", [memory], 60),
            Measure("share of a core over 10 s, 10,000 parked runs", "%", [share], 1),
            Measure("GET /v1/runs?limit=50, 64 connections, p99", "ms",
                    [figure["p99"] for figure in figures], 20),
            Measure("GET /v1/runs?limit=50, 64 connections", "/s",
                    [figure["rate"] for figure in figures]),
            Measure("decision to next task, parked run, p99 of 60", "ms",
                    [percentile(waited, 0.99)], 150),
            Measure("decision to next task, parked run, median", "ms", [statistics.median(waited)]),
        ]  # fmt: skip


def park_copies(path: str, run_id: str, count: int) -> None:
    """Copy all rows of a run so often."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for (table,) in db.execute(
            "select name from sqlite_master where type = 'table'"
        ).fetchall():
            names = [row[1] for row in db.execute(f"pragma table_info({table})")]
            if "run_id" not in names or table in ("_smithers_summary", "_smithers_woken"):
                continue  # kept by triggers
            others = ", ".join(name for name in names if name != "run_id")
            db.execute(
                f"""with recursive n(i) as (select 1 union all select i + 1 from n where i < ?)
                    insert into {table} (run_id, {others}) select 'p' || i, {others}
                    from n, {table} where run_id = ?""",
                (count, run_id),
            )


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
import os, signal, time
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

def make_pool():
    import concurrent.futures, multiprocessing
    return concurrent.futures.ProcessPoolExecutor(
        3, mp_context=multiprocessing.get_context("fork"))
'''
SUSPECT_FLOW = (
    CRASH_FLOW
    + """
def kill_twice():
    note("start")
    if current_task().attempt < 2:
        os.kill(os.getpid(), signal.SIGKILL)
    note("end")

crash = workflow

def workflow(ctx):
    return Workflow("suspect",
        Parallel(Task("killer", kill_twice),
                 *[Task(f"beside{n}", act, kwargs={"seconds": 0.05}) for n in range(3)]),
        *crash(ctx).children)
"""
)
CANCEL_FLOW = (
    CRASH_FLOW
    + """
STUBBORN = "trap '' TERM" + COMMAND.replace("sleep 0.01", "sleep 60")

def deaf():
    note("start")
    time.sleep(60)

def polite():
    note("start")
    current_task().cancelled.wait(60)

def workflow(ctx):
    return Workflow("cancel",
        *[Task(f"s{number}", act) for number in range(3)],
        Parallel(Task("deaf", deaf), Task("polite", polite), Approval("ship"), Approval("again"),
                 Task("command", ["sh", "-c", STUBBORN])),
        Task("after", act))
"""
)


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
                self.decide_apart(node, iteration, verdict)
            else:
                body = {"iteration": iteration, "decidedBy": "watcher"}
                word = "deny" if verdict == "denied" else "approve"
                if ask(self.port, "POST", f"/{word}/{node}", body).status == 200:
                    self.note_answer(node, iteration)

    def decide_apart(self, node: str, iteration: int, verdict: str) -> None:
        with ss.SmithersDb(self._path) as db:
            ss.decide(db, RUN, node, ss.Decision(verdict, iteration))

    def note_answer(self, node: str, iteration: int) -> None:
        """Keep that a decision was acknowledged."""

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
        elif kind == "NodeCancelled" and self.gates.get(key) == "requested":
            self.gates[key] = "cancelled"
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
        elif state == "failed" and node not in ("flaky", "later"):
            wrong.append(f"{node} {iteration} {attempt} failed")
    return wrong


class Crash:
    """One workflow run, killed at random moments until it finishes."""

    ENDED = "Server still running"
    FLOW = CRASH_FLOW
    FLAGS: tuple[str, ...] = ()
    STATUS = "finished"
    NODES = 20
    SUSPENDS = True

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
        self.wrong += self._left_behind()

    def _live_once(self, may_kill: bool) -> bool:
        """One life of the run; True when it has ended and everything was checked."""
        with self._serve() as run:
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

    def _serve(self) -> Child:
        flags = [*(["--resume"] if self._has_run() else []), *self.FLAGS]
        return serve_child(self.folder, self.FLOW, *flags, CRASH_EFFECTS=self.effects)

    def _has_run(self) -> bool:
        if not os.path.exists(self.path):
            return False
        try:
            with contextlib.closing(sqlite3.connect(self.path)) as db:
                return bool(db.execute("select count(*) from _smithers_runs").fetchone()[0])
        except sqlite3.OperationalError:  # killed before the tables were there
            return False

    def _run_until_moment(self, run: Child, may_kill: bool) -> bool:
        """Wait for a moment to kill in; False when the run has ended before."""
        spared = self._close_to_failing() if self._has_run() else []
        if may_kill and not spared and self.chance.random() < 0.3:
            self.moments["while starting"] += 1
            time.sleep(self.chance.uniform(0, 0.35))
            return True
        self.watcher.port = run.port
        lines = self.chance.randint(2, 30) if may_kill else 10**9

        def has_come() -> bool:
            said = run.text()
            has_lines = len(run.lines) >= lines and all(end in said for end in spared)
            return has_lines or self.ENDED in said

        run.wait_until(has_come, 60)
        if self.ENDED in run.text():
            return False
        if run.has_hung_up and run.process.wait() == -signal.SIGKILL:
            self.moments["by its own task"] += 1
            return True
        if not may_kill:
            return False
        if self.SUSPENDS and self.chance.random() < 0.4:
            self.moments["while suspending"] += 1
            run.process.terminate()
            time.sleep(self.chance.uniform(0, 0.15))
            return True
        self.moments["after a line"] += 1
        time.sleep(self.chance.choice((0.0, self.chance.uniform(0, 0.02))))
        return True

    def _close_to_failing(self) -> list[str]:
        """Return what the ends of nodes that have brought down two lives will be told as.

        A third one would be held against them: they get through first.
        """
        crashes: Counter[tuple[str, int]] = Counter()
        with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as db:
            attempts = db.execute(
                """select node_id, iteration, state = 'in-progress'
                          or coalesce(json_extract(meta_json, '$.crashed'), 0)
                   from _smithers_attempts order by node_id, iteration, attempt"""
            )
            for node, iteration, has_crashed in attempts:
                key = (node, iteration)
                crashes[key] = crashes[key] + 1 if has_crashed else 0
        close = [key for key, count in crashes.items() if count > 1]
        return [f"] {node} iteration {turn} finished" if turn else f"] {node} finished"
                for node, turn in close]  # fmt: skip

    def _check_end(self, run: Child) -> None:
        if not run.wait_until(lambda: self.ENDED in run.text(), 60):
            self.wrong.append("a life ended without an ended run: " + run.text()[-800:])
            return
        deadline = time.monotonic() + 10
        while not self.watcher.has_ended and time.monotonic() < deadline:
            time.sleep(0.01)
        self.wrong += inspect(self.path, self.effects, list(self.watcher.seen))
        with ss.SmithersDb(self.path) as db:
            log = [(event.seq, event.payload) for event in db.list_events(RUN)]
            run_row = db.get_run(RUN)
            nodes = db.list_nodes(RUN)
            gates = db.list_gates(RUN)
        self.events = len(log)
        if not self.watcher.has_ended or self.watcher.seen != log:
            self.wrong.append(f"the client has {len(self.watcher.seen)} events of {len(log)}")
        if run_row is None or run_row.status != self.STATUS:
            self.wrong.append(f"the run is {run_row and run_row.status}")
        busy = [node for node in nodes if node.state in ("in-progress", "waiting-approval")]
        if busy or "requested" in [gate.status for gate in gates]:
            self.wrong.append(f"the run has ended, but not {busy}, {gates}")
        self._check_nodes(nodes)

    def _check_nodes(self, nodes: list[ss.Node]) -> None:
        if [node for node in nodes if node.state != "finished"] or len(nodes) != self.NODES:
            self.wrong.append(f"{len(nodes)} nodes, not {self.NODES}, or some not finished")

    def _left_behind(self) -> list[str]:
        """Return the processes that still live when all is over: commands, workers of a pool."""
        mark = f"CRASH_EFFECTS={self.effects}\0".encode()

        def left() -> list[str]:
            found = []
            for name in filter(str.isdecimal, os.listdir("/proc")):
                with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                    found += [name] if mark in file.read() and is_process(int(name)) else []
            return found

        if os.path.isdir("/proc/self"):
            try:
                eventually(lambda: not left())
            except AssertionError:
                return [f"processes are left: {left()}"]
        return []


class PoolCrash(Crash):
    """The same, with functions in a pool of processes."""

    FLAGS = ("--executor", "served_flow:make_pool")


class SuspectCrash(Crash):
    """A run with a task that brings down two lives, and others that are in flight then."""

    FLOW = SUSPECT_FLOW
    NODES = 24


class CancelCrash(Crash):
    """A run that is killed after a cancel was acknowledged."""

    FLOW = CANCEL_FLOW
    STATUS = "cancelled"

    def __init__(self, folder: str, chance: random.Random) -> None:
        super().__init__(folder, chance)
        self.FLAGS = chance.choice((Crash.FLAGS, PoolCrash.FLAGS))
        self.newest = -1  # event of the log when the cancel had been acknowledged

    def _run_until_moment(self, run: Child, may_kill: bool) -> bool:
        if self.newest >= 0:
            return super()._run_until_moment(run, may_kill)
        self.watcher.port = run.port
        moment = self.chance.choice(("s1 started", "deaf started", "command started", "ship waits"))
        run.wait_until(lambda: moment in run.text())
        if self.chance.random() < 0.5:
            answer = ask(run.port, "POST", "/cancel")
            self.wrong += [] if answer.status == 200 else [f"cancel: {answer}"]
        else:
            with ss.SmithersDb(self.path) as db:
                ss.cancel_run(db, RUN)
        with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as plain:
            sql = "select max(seq) from _smithers_events"
            self.newest = plain.execute(sql).fetchone()[0]
        self.moments["after a cancel"] += 1
        time.sleep(self.chance.uniform(0, 0.3))
        return True

    def _check_nodes(self, nodes: list[ss.Node]) -> None:
        late = [event for seq, event in self.watcher.seen
                if seq > self.newest and event["type"] == "NodeStarted"]  # fmt: skip
        self.wrong += [f"started after the cancel: {event}" for event in late]


CRASHES = (Crash, CancelCrash, PoolCrash, CancelCrash, SuspectCrash)


def is_wrong(said: str, wrong: list[str], folder: str) -> bool:
    """Remove the folder of a trial; or, when something is wrong, tell of it and keep it."""
    if wrong:
        print(f"{said}; kept: {folder}", *(f"VIOLATION {text}" for text in wrong), sep="\n")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return bool(wrong)


def crash_command(arguments: argparse.Namespace) -> int:
    """Kill and resume N times, over as many runs as that takes."""
    chance = random.Random(arguments.seed)
    kills = runs = reconnects = events = 0
    moments: Counter[str] = Counter()
    began = time.monotonic()
    while kills < arguments.count:
        folder = tempfile.mkdtemp(prefix="smithers-crash-")
        crash = CRASHES[runs % len(CRASHES)](folder, chance)
        crash.drive(min(chance.randint(3, 12), arguments.count - kills))
        kills, runs = kills + crash.kills, runs + 1
        reconnects, events = reconnects + crash.watcher.reconnects, events + crash.events
        moments += crash.moments
        name = type(crash).__name__
        said = f"seed {arguments.seed}, run {runs}, {name}, after {crash.kills} kills"
        if is_wrong(said, crash.wrong, folder):
            return 1
    said = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items()))
    print(f"{kills} kills ({said}) over {runs} runs in {time.monotonic() - began:.0f} s: every run "
          f"ended as it should, {events} events, {reconnects} connections of the client, seed "
          f"{arguments.seed}: no violation")  # fmt: skip
    return 0


SERVER_CRASH_FLOW = (
    CRASH_FLOW.replace('EFFECTS = os.environ["CRASH_EFFECTS"]', "EFFECTS = None")
    .replace('with open(EFFECTS, "ab"', 'with open("effects-" + task.run_id, "ab"')
    .replace("with open(EFFECTS) as", 'with open("effects-" + current_task().run_id) as')
    .replace('"$CRASH_EFFECTS"', '"effects-$SMITHERS_RUN_ID"')
)


class ServerCrash:
    """A server whose runs are decided and cancelled while it, or a part of it, is killed."""

    def __init__(self, folder: str, chance: random.Random) -> None:
        self.many = Many(folder)
        self.many.write("crash.py", SERVER_CRASH_FLOW)
        self.chance = chance
        self.kills: Counter[str] = Counter()
        self.cancelled: set[str] = set()
        self.ended: Counter[str] = Counter()
        self.memory: list[float] = []
        self.wrong: list[str] = []
        self.rounds = 0
        self.many.start("--max-runs", "4")

    def round(self) -> None:
        """Start runs, kill something at a random moment, and see every run to its end."""
        self.rounds += 1
        ids = [f"r{self.rounds}-{number}" for number in range(self.chance.randint(1, 6))]
        for run_id in ids:
            self._post("/v1/runs", {"workflowPath": "crash.py", "runId": run_id})
        stop = threading.Event()
        decider = threading.Thread(target=self._decide, args=(stop,))
        decider.start()
        try:
            if self.chance.random() < 0.3:
                run_id = self.chance.choice(ids)
                time.sleep(self.chance.uniform(0, 0.3))
                if self._post(f"/v1/runs/{run_id}/cancel", {}).status == 200:
                    self.cancelled.add(run_id)
            time.sleep(self.chance.uniform(0, 0.6))
            self._kill(self.chance.choice(("worker", "forker", "server", "server and worker")))
            self._wait_for_ends(ids)
        finally:
            stop.set()
            decider.join()
        for run_id in ids:
            self._inspect(run_id)
        if self.rounds % 10 == 0:
            self.memory.append(vitals(self.many.child.pid).rss)

    def _post(self, path: str, body: Any) -> Reply:
        """Ask until there is an answer: the server may have been killed meanwhile."""
        replies: list[Reply] = []

        def is_answered() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                replies.append(self.many.ask("POST", path, body))
            return bool(replies)

        eventually(is_answered, 60)
        return replies[0]

    def _decide(self, stop: threading.Event) -> None:
        """Decide every gate that waits: over HTTP, or straight in the file."""
        with ss.SmithersDb(self.many.path) as db:
            while not stop.wait(0.02):
                for run_id, gate in db.list_open_gates():
                    verdict = "denied" if gate.key == ("again", 2) else "approved"
                    with contextlib.suppress(OSError, http.client.HTTPException, ss.SmithersError):
                        if self.chance.random() < 0.5:
                            decision = ss.Decision(verdict, gate.iteration)
                            ss.decide(db, run_id, gate.node_id, decision)
                        else:
                            word = "deny" if verdict == "denied" else "approve"
                            path = f"/v1/runs/{run_id}/nodes/{gate.node_id}/{word}"
                            self.many.ask("POST", path, {"iteration": gate.iteration})

    def _kill(self, what: str) -> None:
        self.kills[what] += 1
        if what.startswith("server"):
            self.many.child.process.kill()
            self.many.child.close()
        if what != "server":
            is_forker = what == "forker"
            self._kill_one(children_of(self.many.child.pid) if is_forker else self._workers())
        if what.startswith("server"):
            self.many.start("--max-runs", "4")

    def _kill_one(self, pids: list[int]) -> None:
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.chance.choice(pids), signal.SIGKILL)

    def _workers(self) -> list[int]:
        owners = self.many.read("select runtime_owner_id from _smithers_runs where status = "
                                "'running' and runtime_owner_id is not null")  # fmt: skip
        return [ss.process_of(owner)[1] for (owner,) in owners if ss.process_is_alive(owner)]

    def _wait_for_ends(self, ids: list[str]) -> None:
        try:
            eventually(lambda: all(self.many.row(i)[0] in ss.TERMINAL_STATUSES for i in ids), 60)
        except AssertionError:
            rows = [(run_id, *self.many.row(run_id)) for run_id in ids]
            self.wrong.append(f"not ended: {rows}: {self.many.child.text()[-1500:]}")

    def _inspect(self, run_id: str) -> None:
        status = self.many.row(run_id)[0]
        self.ended[status] += 1
        expected = "cancelled" if run_id in self.cancelled else "finished"
        if status != expected:
            self.wrong.append(f"{run_id} is {status}, not {expected}")
        with contextlib.closing(sqlite3.connect(self.many.path, timeout=10)) as db:
            only = sqlite3.connect(":memory:")
            tables = ("runs", "events", "nodes", "attempts", "approvals", "frames", "summary",
                      "outputs")  # fmt: skip
            for table in (f"_smithers_{name}" for name in tables):
                names = [row[1] for row in db.execute(f"pragma table_info({table})")]
                only.execute(f"create table {table} ({', '.join(names)})")
                found = db.execute(f"select * from {table} where run_id = ?", (run_id,)).fetchall()
                only.executemany(
                    f"insert into {table} values ({','.join('?' * len(names))})", found
                )
        with contextlib.closing(only):
            log = [(seq, json.loads(payload)) for seq, payload in only.execute(
                "select seq, payload_json from _smithers_events order by seq")]  # fmt: skip
            if [seq for seq, _ in log] != list(range(len(log))):
                self.wrong.append(f"{run_id}: the log has gaps")
            found = []
            if status == "finished":
                found += inspect_rows(only, Book(log))
            effects = os.path.join(self.many.root, f"effects-{run_id}")
            found += [] if run_id in self.cancelled else inspect_effects(only, effects)
            self.wrong += [f"{run_id}: {text}" for text in found]

    def close(self) -> None:
        """End the server: nothing may be left of it or of its workers."""
        family = [*self._workers(), *children_of(self.many.child.pid)]
        self.many.child.finish(signal.SIGTERM)
        self.many.child.close()
        with contextlib.suppress(AssertionError):
            eventually(lambda: not any(map(is_process, family)), 10)
        self.wrong += [f"process {pid} is left" for pid in family if is_process(pid)]
        root = self.many.root
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/cwd") == root:
                    self.wrong.append(f"process {name} is left in {root}")


def server_crash_command(arguments: argparse.Namespace) -> int:
    """Kill parts of a server of many runs in N rounds."""
    began = time.monotonic()
    folder = tempfile.mkdtemp(prefix="smithers-many-")
    crash = ServerCrash(folder, random.Random(arguments.seed))
    try:
        while crash.rounds < arguments.count and not crash.wrong:
            crash.round()
    finally:
        crash.close()
    took = time.monotonic() - began
    memory = ", ".join(f"{rss:.1f}" for rss in crash.memory)
    print(f"{crash.rounds} rounds in {took:.0f} s, seed {arguments.seed}")
    print(f"killed {dict(crash.kills)}, runs {dict(crash.ended)}, server's MiB: {memory}")
    if is_wrong("after these", crash.wrong, folder):
        return 1
    print("no violation")
    return 0


# ---------------------------------------------------------------------------
# Restart: SIGTERM and the same line again, as a service manager does, with a kill -9 at times
# ---------------------------------------------------------------------------

RESTART_FLOW = (
    CRASH_FLOW
    + """
import asyncio

def polite():
    note("start")
    if not current_task().cancelled.wait(0.02):
        note("end")

async def wait():
    note("start")
    await asyncio.sleep(0.02)
    note("end")

def later():
    note("start")
    if current_task().attempt == 0:
        note("fail")
        raise TaskFailed("not yet")
    note("end")

crash = workflow

def workflow(ctx):
    return Workflow("restart",
        Parallel(Task("polite", polite), Task("wait", wait),
                 Task("later", later, retries=1, retry_delay=0.5)),
        Loop(Task("turn", polite), Task("told", ["sh", "-c", COMMAND]),
             id="turns", until=False, max_iterations=5),
        *crash(ctx).children)
"""
)


class Restart(Crash):
    """One run of a service, stopped at random moments and started by the same line."""

    FLOW = RESTART_FLOW
    NODES = 33
    SUSPENDS = False  # it is what is done to it
    MAX_KILLS = 2  # a node that is in flight at a third one may be failed as a crasher

    def __init__(self, folder: str, chance: random.Random) -> None:
        super().__init__(folder, chance)
        self.stops = 0
        self._port = str(free_port())

    def _live_once(self, may_stop: bool) -> bool:
        with self._serve() as run:
            try:
                if not self._run_until_moment(run, self.stops + self.kills < self.rounds):
                    self._check_end(run)
                    self._stop(run)
                    self._look_again()
                    return True
                if self.kills < self.MAX_KILLS and self.chance.random() < 0.2:
                    run.process.kill()
                    run.process.wait()
                    self.kills += 1
                else:
                    self._stop(run)
            finally:
                self.watcher.port = 0
        if self._has_run():
            self.wrong += inspect(self.path, self.effects, list(self.watcher.seen))
            self.wrong += inspect_waits(self.path)
        return False

    def _serve(self) -> Child:
        words = ("--resume", "--port", self._port)
        return serve_child(self.folder, self.FLOW, *words, CRASH_EFFECTS=self.effects)

    def stop_often(self, rounds: int) -> None:
        self.rounds = rounds
        self.drive(rounds)

    def _stop(self, run: Child) -> None:
        """Send SIGTERM, and see that the run is left as a suspended one."""
        self.stops += 1
        try:
            code, _ = run.finish(signal.SIGTERM)
        except subprocess.TimeoutExpired:
            self.wrong.append("does not leave at SIGTERM: " + run.text()[-800:])
            return
        if code == -signal.SIGTERM and not run.text():
            return  # so early that nobody has asked to hear signals yet
        said = run.text()[-800:]
        if code not in (0, 3) or code == 3 and "Go on with: " not in said:
            self.wrong.append(f"SIGTERM: exit code {code}: {said}")
        if not self._has_run():
            return
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            row = db.execute("select status, runtime_owner_id from _smithers_runs").fetchone()
            busy = db.execute(
                "select node_id from _smithers_attempts where state = 'in-progress'"
            ).fetchall()
        wanted = ("finished",) if code == 0 else ss.ACTIVE_STATUSES
        if row[0] not in wanted or row[1] is not None or busy:
            self.wrong.append(f"after SIGTERM, code {code}: row {row}, in progress {busy}: {said}")

    def _look_again(self) -> None:
        """The same line on the finished run serves it and changes nothing."""
        before = rows(self.path)
        with self._serve() as run:
            if not run.wait_until(lambda: self.ENDED in run.text(), 30):
                self.wrong.append("a finished run is not served: " + run.text()[-800:])
            self._stop(run)
        if rows(self.path) != before:
            self.wrong.append("looking at the finished run has changed it")


def inspect_waits(path: str) -> list[str]:
    """Return what was cancelled, or tried again before its delay was over."""
    wrong = []
    due: dict[str, int] = {}
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as db:
        log = db.execute("select payload_json from _smithers_events order by seq").fetchall()
        gates = db.execute("select * from _smithers_approvals where status = 'cancelled'")
        wrong += [f"a gate was closed: {gate}" for gate in gates]
    for (payload,) in log:
        event = json.loads(payload)
        if event["type"] == "NodeRetrying":
            due[event["nodeId"]] = event["dueAtMs"]
        elif event["type"] == "NodeStarted":
            early = due.pop(event["nodeId"], 0) - event["timestampMs"]
            wrong += [f"{event['nodeId']} was tried {early} ms too early"] if early > 0 else []
        elif event["type"] == "RunCancelled" or (
            event["type"] == "NodeCancelled"
            and event["reason"] not in ("the engine was stopped", "the run was interrupted")
        ):
            wrong.append(f"cancelled: {payload}")
    return wrong


def restart_command(arguments: argparse.Namespace) -> int:
    """Stop and start again N times, over as many runs as that takes."""
    chance = random.Random(arguments.seed)
    stops = kills = runs = 0
    began = time.monotonic()
    while stops + kills < arguments.count:
        folder = tempfile.mkdtemp(prefix="smithers-restart-")
        restart = Restart(folder, chance)
        restart.stop_often(arguments.count - stops - kills)
        stops, kills, runs = stops + restart.stops, kills + restart.kills, runs + 1
        after = f"{restart.stops} stops and {restart.kills} kills"
        if is_wrong(f"seed {arguments.seed}, run {runs}, after {after}", restart.wrong, folder):
            return 1
    print(f"{stops} stops and {kills} kills over {runs} runs in {time.monotonic() - began:.0f} s: "
          f"every run finished, seed {arguments.seed}: no violation")  # fmt: skip
    return 0


# ---------------------------------------------------------------------------
# Power: what a disk may hold when the power fails, at every sync of a run
# ---------------------------------------------------------------------------

# Writes to the file that POWER_TRACE names what is done to the database that POWER_DATABASE names,
# its log or journal, and its folder, and what is sent to clients: see Trace. A file is what its
# descriptor leads to, so that nothing has to be remembered, least of all over a fork.
POWER_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* What is done and its record are one. A process that is killed between them has written without
   having done, or synced without having written: either way the safe side. */
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static const char *database, *folder;
static int trace = -1;

__attribute__((constructor)) static void begin(void)
{
    database = getenv("POWER_DATABASE");
    folder = getenv("POWER_FOLDER");
    trace = open(getenv("POWER_TRACE"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

static void record(char kind, uint64_t inode, int64_t number, const void *data, uint64_t size)
{
    struct { uint64_t kind, inode; int64_t number; uint64_t size; } head =
        { (uint64_t)kind, inode, number, size };
    struct iovec parts[2] = { { &head, sizeof head }, { (void *)data, size } };
    if (writev(trace, parts, 2) != (ssize_t)(sizeof head + size))
        abort();
}

static int matters(const char *path)
{
    size_t length = strlen(database);
    return trace >= 0 && strncmp(path, database, length) == 0
        && strncmp(path + length, "-shm", 4) != 0; /* nor as it is called when it is deleted */
}

/* Return the inode behind a descriptor, 0 when it is nothing that is looked at. */
static uint64_t inode_of(int fd)
{
    char link[64], path[4096];
    struct stat found;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    if (trace < 0 || (!matters(path) && strcmp(path, folder) != 0) || fstat(fd, &found) != 0)
        return 0;
    return S_ISDIR(found.st_mode) ? 1 : found.st_ino;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        int mode = flags & O_CREAT ? va_arg(rest, int) : 0; \
        va_end(rest); \
        if (!matters(path)) \
            return real(path, flags, mode); \
        pthread_mutex_lock(&turn); \
        int fd = flags & O_CREAT ? real(path, flags | O_EXCL, mode) : -1; \
        if (fd >= 0) \
            record('O', inode_of(fd), 0, path, strlen(path)); \
        else \
            fd = real(path, flags, mode); \
        pthread_mutex_unlock(&turn); \
        return fd; \
    }
OPEN(open)
OPEN(open64)

#define ACT(name, call, kind, number, data, size) \
    { \
        REAL(name); \
        uint64_t inode = inode_of(fd); \
        if (!inode) \
            return call; \
        pthread_mutex_lock(&turn); \
        if (kind != 'S') \
            record(kind, inode, number, data, size); \
        __typeof__(call) done = call; \
        if (kind == 'S' && done == 0) \
            record(kind, inode, number, data, size); \
        pthread_mutex_unlock(&turn); \
        return done; \
    }
ssize_t write(int fd, const void *data, size_t size)
    ACT(write, real(fd, data, size), 'W', lseek(fd, 0, SEEK_CUR), data, size)
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
    ACT(pwrite, real(fd, data, size, offset), 'W', offset, data, size)
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
    ACT(pwrite64, real(fd, data, size, offset), 'W', offset, data, size)
int ftruncate(int fd, off_t size) ACT(ftruncate, real(fd, size), 'T', size, "", 0)
int ftruncate64(int fd, off64_t size) ACT(ftruncate64, real(fd, size), 'T', size, "", 0)
int fsync(int fd) ACT(fsync, real(fd), 'S', 0, "", 0)
int fdatasync(int fd) ACT(fdatasync, real(fd), 'S', 0, "", 0)

int unlink(const char *path)
{
    REAL(unlink);
    if (!matters(path))
        return real(path);
    pthread_mutex_lock(&turn);
    int done = real(path);
    if (done == 0)
        record('U', 0, 0, path, strlen(path));
    pthread_mutex_unlock(&turn);
    return done;
}

ssize_t send(int fd, const void *data, size_t size, int flags)
{
    REAL(send);
    if (trace >= 0)
        record('M', (uint64_t)fd, 0, data, size); /* before anybody can have it */
    return real(fd, data, size, flags);
}
"""
POWER_FLOW = (
    CRASH_FLOW
    + """
def workflow(ctx):
    return Workflow("power", Task("command", ["sh", "-c", COMMAND]),
        Task("flaky", flaky, retries=3, retry_delay=0.02), Approval("ship"),
        Loop(Task("inner", act), id="rounds", until=False, max_iterations=3))
"""
)
# The same command line, with a promise that sqlite does not keep.
CARELESS = (
    "import sys, smithers_serve as ss; use = ss.SmithersDb._use_mode; "
    "ss.SmithersDb._use_mode = lambda db, mode: "
    "(use(db, mode), db._writer.execute('pragma synchronous = {}')); sys.exit(ss.main())"
)


@functools.lru_cache(maxsize=1)
def power_shim() -> str:
    """Return the path of the shim, compiled. Raises SkipTest where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        raise unittest.SkipTest("needs Linux and a C compiler")
    path = os.path.join(compiled_folder(), "power.so")
    command = [compiler, "-x", "c", "-shared", "-fPIC", "-O1", "-o", path, "-", "-ldl", "-lpthread"]
    done = subprocess.run(command, input=POWER_SHIM, text=True, capture_output=True)
    if done.returncode != 0:
        raise unittest.SkipTest(f"the compiler does not make a shim: {done.stderr[-300:]}")
    return path


class TraceRecord(NamedTuple):
    """What was done: (O)pened anew, (W)ritten, (T)runcated, (S)ynced, (U)nlinked, told in a
    (M)essage on a socket, or (A)cknowledged.

    `number` is an offset or a size; the folder has inode 1.
    """

    kind: str
    inode: int
    number: int
    data: bytes


def read_trace(path: str) -> Iterator[TraceRecord]:
    with open(path, "rb") as file:
        for head in iter(lambda: file.read(32), b""):
            kind, inode, number, size = struct.unpack("=QQqQ", head)
            yield TraceRecord(chr(kind), inode, number, file.read(size))


class DiskFile:
    """What of a file is safe, and what was done to it since its last sync."""

    def __init__(self) -> None:
        self.safe = b""
        self.since: list[tuple[int, bytes | None]] = []  # (offset, data), or (size, None)

    def sync(self) -> None:
        self.safe, self.since = self.with_changes(self.since), []

    def with_changes(self, changes: Iterable[tuple[int, bytes | None]]) -> bytes:
        content = bytearray(self.safe)
        for number, data in changes:
            content.extend(bytes(max(0, number - len(content))))
            if data is None:
                del content[number:]
            else:
                content[number : number + len(data)] = data
        return bytes(content)


class Disk:
    """A folder of files as a power failure may leave it.

    What was synced is there, of what came later anything. Names are synced with the folder; a
    sector of a file is written wholly or not at all.
    """

    WAYS = ("dropped", "kept", "torn", "mixed")
    SECTOR = 512

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.files: dict[int, DiskFile] = {}
        self.now: dict[str, DiskFile] = {}
        self.safe: dict[str, DiskFile] = {}
        self.since: list[tuple[str, DiskFile | None]] = []

    def take(self, record: TraceRecord) -> None:
        kind, inode, number, data = record
        if kind == "O":
            self.files[inode] = self.now[data.decode()] = DiskFile()
            self.since.append((data.decode(), self.files[inode]))
        elif kind == "U":
            del self.now[data.decode()]
            self.since.append((data.decode(), None))
        elif kind in "WT":
            self.files[inode].since.append((number, data if kind == "W" else None))
        elif kind == "S" and inode == 1:
            self.safe, self.since = dict(self.now), []
        elif kind == "S":
            self.files[inode].sync()

    def image(self, way: str) -> dict[str, bytes]:
        """Return the content of each file after a failure now."""
        names = dict(self.safe)
        count = {"dropped": 0, "kept": len(self.since)}.get(way)
        for name, file in self.since[: self.chance.randint(0, len(self.since))
                                     if count is None else count]:  # fmt: skip
            if file is None:
                names.pop(name, None)
            else:
                names[name] = file
        return {name: file.with_changes(self._survivors(file.since, way))
                for name, file in names.items()}  # fmt: skip

    def _survivors(
        self, changes: list[tuple[int, bytes | None]], way: str
    ) -> Iterator[tuple[int, bytes | None]]:
        if way == "kept":
            yield from changes
        elif way == "torn":
            whole = self.chance.randint(0, len(changes))
            yield from changes[:whole]
            for number, data in changes[whole : whole + 1]:
                if data is not None:
                    yield (
                        number,
                        data[: self.SECTOR * self.chance.randint(0, len(data) // self.SECTOR)],
                    )
        elif way == "mixed":
            for number, data in changes:
                if data is None:
                    yield from [(number, data)][self.chance.randint(0, 1) :]
                    continue
                for start in range(0, len(data), self.SECTOR):
                    if self.chance.random() < 0.5:
                        yield number + start, data[start : start + self.SECTOR]


class PowerWatcher(Watcher):
    """A client that says in the trace what was acknowledged to it, by whom ever."""

    def __init__(self, path: str, chance: random.Random, environment: dict[str, str]) -> None:
        self._environment = environment
        super().__init__(path, chance)

    def decide_apart(self, node: str, iteration: int, verdict: str) -> None:
        word = "deny" if verdict == "denied" else "approve"
        words = (word, RUN, node, "--iteration", str(iteration), "-y", "--db", self._path)
        if run_child(*MODULE, *words, **self._environment)[0] == 0:
            self.note_answer(node, iteration)

    def note_answer(self, node: str, iteration: int) -> None:
        data = f"{node} {iteration}".encode()
        with open(self._environment["POWER_TRACE"], "ab", buffering=0) as trace:
            trace.write(struct.pack("=QQqQ", ord("A"), 0, 0, len(data)) + data)


class Power:
    """One recorded run, and what is left of it wherever the power might have failed."""

    def __init__(self, folder: str, chance: random.Random, mode: str, careless: str = "") -> None:
        self.folder = os.path.realpath(folder)
        self.chance = chance
        self.careless = careless
        self.path = os.path.join(self.folder, "disk", "smithers.db")
        self.effects = os.path.join(self.folder, "effects.txt")
        self.trace = os.path.join(self.folder, "trace")
        self.log: list[tuple[int, Any]] = []
        self.syncs = self.images = self.resumed = 0
        self.wrong: list[str] = []
        os.mkdir(os.path.dirname(self.path))
        if mode == "journal":
            os.mkdir(self.path + "-shm")  # sqlite cannot make its shared memory here

    def record(self, flow: str = CRASH_FLOW, kills: int = 0) -> None:
        """Run it to its end, with a client that decides its gates, and stop its server."""
        environment = {
            "LD_PRELOAD": power_shim(), "POWER_TRACE": self.trace, "POWER_DATABASE": self.path,
            "POWER_FOLDER": os.path.dirname(self.path), "CRASH_EFFECTS": self.effects,
        }  # fmt: skip
        watcher = PowerWatcher(self.path, self.chance, environment)
        start = ("-c", CARELESS.format(self.careless)) if self.careless else MODULE
        try:
            lines = self.chance.randint(5, 30)
            for _ in range(kills):
                with self._life(flow, self.path, start, **environment) as run:
                    watcher.port = run.port
                    run.wait_until(lambda: len(run.lines) >= lines)
                    run.process.kill()
                    watcher.port = 0
            with self._life(flow, self.path, start, **environment) as run:
                watcher.port = run.port
                if not run.wait_until(lambda: Crash.ENDED in run.text(), 60):
                    raise AssertionError("no finished run: " + run.text()[-800:])
                eventually(lambda: watcher.has_ended)
                run.finish(signal.SIGTERM)
        finally:
            watcher.close()
        self.log = self._read(self.path)
        if watcher.seen != self.log:
            self.wrong.append("the client has not seen the log")

    def _life(self, flow: str, path: str, start: Seq[str] = MODULE, **environment: str) -> Child:
        file = os.path.join(self.folder, "served_flow.py")
        with open(file, "w", encoding="utf-8") as out:
            out.write(flow)
        words = ("up", file, "--serve", "--port", "0", "--run-id", RUN, "--db", path, "--resume")
        return Child(*start, *words, folder=self.folder, **environment)

    def _read(self, path: str) -> list[tuple[int, Any]]:
        with contextlib.closing(sqlite3.connect(path)) as db:
            events = db.execute("select seq, payload_json from _smithers_events order by seq")
            return [(seq, json.loads(payload)) for seq, payload in events]

    def check(self, resumes: int = 0) -> None:
        """Look at what is left before every sync and at the end; go on with some of it."""
        disk = Disk(self.chance)
        told = 0  # how many events of the log clients have, or can conclude to be there
        records = list(read_trace(self.trace))
        moments = [n for n, record in enumerate(records) if record.kind == "S"] + [len(records)]
        later = self.chance.sample(moments, min(resumes, len(moments)))
        self.syncs = len(moments) - 1
        for number, record in enumerate([*records, None]):
            for way in Disk.WAYS if record is None or record.kind == "S" else ():
                self._look(disk, way, number, told)
            if number in later:
                self._go_on(disk, told)
            if self.wrong:
                return
            if record is not None:
                disk.take(record)
                told = max(told, self._told_by(record))

    def _told_by(self, record: TraceRecord) -> int:
        if record.kind == "M":
            return max((int(seq) + 1 for seq in re.findall(rb"\nid: (\d+)\n\n", record.data)),
                       default=0)  # fmt: skip
        if record.kind == "A":
            node, iteration = record.data.decode().split()
            gate = (node, int(iteration))
            return next(seq + 1 for seq, event in self.log
                        if (event.get("nodeId"), event.get("iteration")) == gate
                        and event["type"] in ("ApprovalGranted", "ApprovalDenied"))  # fmt: skip
        return 0

    def _write_image(self, disk: Disk, way: str) -> str:
        folder = os.path.join(self.folder, "image")
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder)
        for name, content in disk.image(way).items():
            with open(os.path.join(folder, os.path.basename(name)), "wb") as file:
                file.write(content)
        return os.path.join(folder, "smithers.db")

    def _look(self, disk: Disk, way: str, number: int, told: int) -> None:
        path = self._write_image(disk, way)
        self.images += 1
        try:
            found = self._wrong_of(path, told)
        except sqlite3.DatabaseError as error:
            found = [f"{type(error).__name__}: {error}"]
        self.wrong += [f"record {number}, the rest {way}: {text}" for text in found]

    def _wrong_of(self, path: str, told: int) -> list[str]:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("begin")
            sound = db.execute("pragma integrity_check").fetchone()[0]
            if sound != "ok":
                return [f"integrity_check: {sound}"]
            exists = "select 1 from sqlite_master where name = '_smithers_events'"
            log = self._read(path) if db.execute(exists).fetchone() else []
            if log != self.log[: len(log)]:
                return ["the log is not the run's first events"]
            if len(log) < told:
                return [f"{told} events were told, {len(log)} are there"]
            return inspect_rows(db, Book(log)) if log else []

    def _go_on(self, disk: Disk, told: int) -> None:
        """Finish the run from what is left; nothing that was told to be done is done again."""
        path = self._write_image(disk, self.chance.choice(Disk.WAYS))
        effects = os.path.join(self.folder, "image", "effects.txt")
        done = {(event["nodeId"], event["iteration"]) for _, event in self.log[:told]
                if event["type"] == "NodeFinished"}  # fmt: skip
        watcher = Watcher(path, self.chance)
        try:
            with self._life(CRASH_FLOW, path, CRASH_EFFECTS=effects) as run:
                watcher.port = run.port
                run.wait_until(lambda: Crash.ENDED in run.text(), 60)
                said = run.text()
        finally:
            watcher.close()
        self.resumed += 1
        with contextlib.closing(sqlite3.connect(path)) as db:
            log = self._read(path)
            self.wrong += inspect_rows(db, Book(log))
        if "Workflow finished" not in said or log[:told] != self.log[:told]:
            self.wrong.append(f"does not go on from {told} events: {said[-800:]}")
        with open(effects, "a+", encoding="utf-8") as file:
            file.seek(0)
            again = {(node, int(turn)) for node, turn, *_ in map(str.split, file)} & done
        self.wrong += [f"{key} was told to be finished, and ran again" for key in again]


def power_command(arguments: argparse.Namespace) -> int:
    """Record runs and look at all that a power failure could leave of them."""
    chance = random.Random(arguments.seed)
    began = time.monotonic()
    for mode in ("wal", "journal"):
        syncs = images = resumed = events = 0
        for number in range(arguments.count):
            folder = tempfile.mkdtemp(prefix="smithers-power-")
            power = Power(folder, chance, mode)
            power.record(kills=number % 2)
            power.check(resumes=6)
            syncs, images = syncs + power.syncs, images + power.images
            resumed, events = resumed + power.resumed, events + len(power.log)
            if is_wrong(f"seed {arguments.seed}, {mode}, round {number}", power.wrong, folder):
                return 1
        print(f"{mode}: {images} images at {syncs} syncs of {arguments.count} runs, {events} "
              f"events, {resumed} of the images gone on with")  # fmt: skip
    print(f"{time.monotonic() - began:.0f} s, seed {arguments.seed}: no violation")
    return 0


class PowerTest(unittest.TestCase):
    """What was told has reached the disk, however a power failure treats the rest."""

    def look(self, mode: str, careless: str = "") -> Power:
        folder = tempfile.TemporaryDirectory(prefix="smithers-power-")
        self.addCleanup(folder.cleanup)
        power = Power(folder.name, random.Random(0), mode, careless)
        power.record(POWER_FLOW)
        power.check()
        return power

    def test_told_events_survive_power_failure(self) -> None:
        for mode in ("wal", "journal"):
            with self.subTest(mode=mode):
                power = self.look(mode)
                self.assertEqual(power.wrong, [])
                self.assertGreater(power.images, 40)

    def test_careless_sync_would_be_seen(self) -> None:
        """Also the care that is nearly enough, and all that the other mode needs."""
        for mode, careless in (("wal", "normal"), ("journal", "full")):
            with self.subTest(mode=mode, careless=careless):
                self.assertIn("events were told", str(self.look(mode, careless).wrong))


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
ORDER = (
    b'{"workflowPath": "fuzz.py:ends", "runId": "ended", "input": {"n": 1}, "resume": true,'
    b' "config": {"maxConcurrency": "2"}}'
)
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
SERVER_VALID = (
    b"GET /v1/runs HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"GET /v1/runs?limit=2&status=running HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"GET /v1/approvals?limit=3 HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"GET /v1/runs/again HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"GET /v1/runs/ended/frames?limit=2&afterFrameNo=0 HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"GET /v1/runs/ended/events?afterSeq=3 HTTP/1.1\r\n" + HOST_LINE + b"Last-Event-ID: 5\r\n\r\n",
    b"GET /v1/runs/again/nodes?state=finished&limit=1 HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"GET /v1/runs/again/nodes/ship?iteration=0 HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"HEAD /v1/runs/again/why HTTP/1.1\r\n" + HOST_LINE + b"\r\n",
    b"POST /v1/runs/again/nodes/ship/approve HTTP/1.1\r\n" + HOST_LINE
    + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    b"POST /v1/runs/again/nodes/sh%69p/deny HTTP/1.1\r\n" + HOST_LINE
    + b"Content-Length: 2\r\n\r\n{}",
    b"POST /v1/runs/ended/cancel HTTP/1.1\r\n" + HOST_LINE + b"Content-Length: 0\r\n\r\n",
    b"POST /v1/runs/ended/retry HTTP/1.1\r\n" + HOST_LINE + b"Content-Length: 2\r\n\r\n{}",
    b"POST /v1/runs/again/resume HTTP/1.1\r\n" + HOST_LINE + b"Content-Length: 0\r\n\r\n",
    b"POST /v1/runs HTTP/1.1\r\n" + HOST_LINE + b"Content-Length: %d\r\n\r\n" % len(ORDER) + ORDER,
    b"POST /v1/runs HTTP/1.1\r\n" + HOST_LINE + b"Transfer-Encoding: chunked\r\n\r\n"
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(ORDER), ORDER),
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


def make_request(chance: random.Random, valid: tuple[bytes, ...] = VALID) -> bytes:
    """Return one to four valid requests in a row, with up to four things changed."""
    data = b"".join(chance.choice(valid) for _ in range(chance.choice((1, 1, 1, 2, 4))))
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

    def __init__(self, run: Child, seed: int, valid: tuple[bytes, ...] = VALID) -> None:
        self.run = run
        self.seed = seed
        self.valid = valid
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
            request = make_request(chance, self.valid)
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
        cancel = functools.partial(ask, run.port, "POST", "/cancel")
        return fuzz_server(Fuzz(run, arguments.seed), arguments.seconds, cancel)


def fuzz_many_command(arguments: argparse.Namespace) -> int:
    """Fuzz /v1 of a server with some runs for some seconds; it must stay as it was."""
    with tempfile.TemporaryDirectory(prefix="smithers-fuzz-") as folder:
        many = Many(folder)
        many.write("fuzz.py", FUZZ_FLOW + "\nends = Workflow('ends', Task('build', {}))\n")
        run = many.start(PYTHONFAULTHANDLER="1")
        try:
            for flow, run_id in (("fuzz.py", "again"), ("fuzz.py:ends", "ended")):
                many.post(flow, run_id)
                many.wait(run_id, "waiting-approval", "finished")
            cancel = functools.partial(many.ask, "POST", "/v1/runs/again/cancel")
            fuzz = Fuzz(run, arguments.seed, SERVER_VALID)
            return fuzz_server(fuzz, arguments.seconds, cancel)
        finally:
            many.close()


def fuzz_server(fuzz: Fuzz, seconds: float, cancel: Callable[[], Any]) -> int:
    """Fuzz a server and tell how it stands then; `cancel` ends its run, before the last part."""
    run, seed = fuzz.run, fuzz.seed
    fuzz.throw(min(1.0, seconds / 4))  # what a warm server holds is no leak
    time.sleep(3.0)
    before = vitals(run.pid)
    fuzz.seed += 1
    fuzz.throw(seconds * 0.75)
    if not fuzz.wrong:
        cancel()
        fuzz.seed += 1
        fuzz.throw(seconds * 0.25)  # at a run that has ended
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
    print(f"{fuzz.requests:,} connections, seed {seed}; {counts}")
    print(f"threads {before.threads} -> {after.threads}, descriptors {before.descriptors} -> "
          f"{after.descriptors}, memory {before.rss:.1f} -> {after.rss:.1f} MiB")  # fmt: skip
    print("\n".join(f"VIOLATION {text}" for text in fuzz.wrong[:20]) or "no violation")
    return 1 if fuzz.wrong else 0


# ---------------------------------------------------------------------------
# Executors: the README's recipes, each tried with a real engine
# ---------------------------------------------------------------------------

TRIAL_FLOW = """
import os, signal, sys, threading, time
from smithers_serve import Parallel, Task, Workflow, current_task

def note(path, word=""):
    task = current_task()
    with open(path, "a") as file:
        file.write(f"{task.node_id} {task.attempt} {os.getpid()} {word}\\n")

def work(path, n, seconds=0.0):
    note(path)
    time.sleep(seconds)
    print(f"n is {n}")
    return {"n": 2 * n}

def flaky(path):
    note(path)
    if current_task().attempt < 2:
        raise ValueError("not yet")

class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")
        self.lock = threading.Lock()

def odd(path):
    note(path)
    raise Odd("no", "luck")

def take(path, lock):
    note(path)

def give(path):
    note(path)
    return threading.Lock()

def wait(path):
    note(path)
    note(path, "told" if current_task().cancelled.wait(30) else "untold")

def die(path):
    note(path)
    if current_task().attempt == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def many(path, seconds=0.0):
    return Parallel([Task(f"n{n}", work, args=(path, n, seconds)) for n in range(200)])

def working(ctx):
    path, may = ctx.input["path"], {"continue_on_fail": True}
    return Workflow("working", many(path), Task("flaky", flaky, args=(path,), retries=2),
        Task("odd", odd, args=(path,), **may), Task("give", give, args=(path,), retries=2, **may),
        Task("take", take, args=(path, threading.Lock()), **may),
        Task("late", wait, args=(path,), timeout=1.5, **may))

def dying(ctx):
    return Workflow("dying", Task("die", die, args=(ctx.input["path"],), retries=2),
                    Task("after", work, args=(ctx.input["path"], 1), retries=2))

def waiting(ctx):
    waits = [Task(f"w{n}", wait, args=(ctx.input["path"],)) for n in (1, 2)]
    return Workflow("waiting", Parallel(waits))

def slow(ctx):
    return Workflow("slow", many(ctx.input["path"], 0.02))
"""


class Engine(NamedTuple):
    """How the README starts one: its recipe, what it needs, and what it cannot do."""

    factory: str
    module: str = ""
    install: str = ""  # how to get it
    start: tuple[str, ...] = ()
    workers: int = 2  # tasks at once
    beside: tuple[tuple[str, ...], ...] = ()  # processes that are there before
    cannot: dict[str, str] = {}


MPI_START = ("mpiexec", "-n", "3", sys.executable, "-m", "mpi4py.futures")
DASK_SCHEDULER = (sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "8786")
DASK_WORKER = (sys.executable, "-m", "distributed.cli.dask_worker", "tcp://127.0.0.1:8786")
ENGINES = {
    "processes": Engine("processes"),
    "dask": Engine("dask", "dask.distributed", "pip install dask distributed"),
    "dask_cluster": Engine(
        "dask_cluster",
        "dask.distributed",
        "pip install dask distributed",
        beside=(DASK_SCHEDULER, *[(*DASK_WORKER, "--nthreads", "1")] * 2),
    ),
    "ray": Engine("RayExecutor", "ray", "pip install ray"),
    "mpi": Engine(
        "mpi",
        "mpi4py.futures",
        "pip install mpi4py, and apt-get install openmpi-bin",
        MPI_START,
        cannot={"Ctrl+C": "mpiexec ends the job at once; --resume goes on, cancel cancels"},
    ),
}


class Trial:
    """Runs TRIAL_FLOW with one engine, in ways that an engine can break."""

    def __init__(self, name: str, folder: str) -> None:
        self.name, self.folder, self.engine = name, folder, ENGINES[name]
        self.path = os.path.join(folder, "smithers.db")
        self.wrong = 0
        with open(os.path.join(folder, "flow.py"), "w", encoding="utf-8") as file:
            file.write(TRIAL_FLOW)
        with open(os.path.join(folder, "engines.py"), "w", encoding="utf-8") as file:
            (recipes,) = readme_blocks("def dask_cluster")
            file.write(recipes.replace("//scheduler:", "//127.0.0.1:"))

    def up(self, workflow: str, *flags: str, run_id: str = "") -> Child:
        self.run_id = run_id or workflow
        self.effects = os.path.join(self.folder, self.run_id)
        argv = [*(self.engine.start or (sys.executable,)), *MODULE, "up"]
        argv += [f"flow.py:{workflow}", "-r", self.run_id, "-c", str(self.engine.workers)]
        argv += ["-i", json.dumps({"path": self.effects}), *flags]
        python, *rest = [*argv, "--executor", f"engines:{self.engine.factory}"]
        return Child(*rest, python=python, folder=self.folder, **TRIAL_ENVIRONMENT)

    def done(self) -> list[tuple[str, int, str]]:
        """Return what ran: (node, attempt, word), a line each."""
        if not os.path.exists(self.effects):
            return []
        with open(self.effects, encoding="utf-8") as file:
            lines = [line.rstrip("\n").split(" ") for line in file]
        return [(node, int(attempt), word) for node, attempt, _, word in lines]

    def outputs(self) -> dict[str, Any]:
        with ss.SmithersDb(self.path, create=False) as db:
            return dict(ss.Outputs(db, self.run_id))

    def told(self, *types: str) -> list[str]:
        with ss.SmithersDb(self.path, create=False) as db:
            return [words_of(event) for event in db.list_events_of(self.run_id, types)]

    def check(self, rule: str, *holds: object) -> None:
        """Print whether a rule holds: each of `holds` is true, or a pair that is equal."""
        reason = self.engine.cannot.get(rule)
        wrong = [h for h in holds if (h[0] != h[1] if isinstance(h, tuple) else not h)]
        self.wrong += bool(wrong) and reason is None
        said = "ok" if not wrong else f"cannot: {reason}" if reason else f"WRONG {str(wrong)[:600]}"
        print(f"{self.name:<13} {rule:<36} {said}", flush=True)

    def once(self) -> tuple[int, int]:
        """Return how often something ran, and how many attempts that were: the same, if once."""
        ran = [(node, attempt) for node, attempt, word in self.done() if not word]
        return len(ran), len(set(ran))

    def run(self) -> int:
        began = time.monotonic()
        for trial in (self.work, self.die, self.cancel, self.interrupt, self.kill):
            try:
                trial()
            except (AssertionError, RuntimeError, OSError) as error:
                self.check(f"the trial of {trial.__name__}", False)
                print(error)
        print(f"{self.name:<13} {time.monotonic() - began:.0f} s, {self.wrong} wrong")
        return self.wrong

    def work(self) -> None:
        with self.up("working") as run:
            code, out = run.finish()
        if not out:
            self.check("the run ends", False, run.text()[-800:])
            return
        outputs = self.outputs()
        results = [outputs.get(f"n{n}") for n in range(200)]
        self.check("200 results", (results, [{"n": 2 * n} for n in range(200)]), (code, 0))
        lines = [line for line in self.told("NodeOutput") if " n is " in line]
        self.check("200 lines", (len(lines), 200))
        flaky = [(node, attempt) for node, attempt, _ in self.done() if node == "flaky"]
        self.check("retries counted once", self.once(), (flaky, [("flaky", n) for n in range(3)]))
        failed = self.told("NodeFailed")
        self.check("an error that cannot be pickled", ("NodeFailed odd 0 0 Odd" in failed, True))
        values = [words for words in failed if words.split()[1] in ("give", "take")]
        expected = ["NodeFailed give 0 0 OUTPUT_NOT_JSON", "NodeFailed take 0 0 EXECUTOR_FAILED"]
        self.check("a value that cannot be pickled", (values, expected))
        late = [word for node, _, word in self.done() if node == "late" and word]
        self.check(
            "timeout, and it is told",
            "NodeFailed late 0 0 TASK_TIMEOUT" in failed,
            (late, ["told"]),
        )

    def die(self) -> None:
        with self.up("dying") as run:
            code, _ = run.finish()
            if self.engine.start:
                run = self.up("dying", "--resume")
                code, _ = run.finish()
        ran, expected = [done[:2] for done in self.done()], [("die", 0), ("die", 1), ("after", 0)]
        self.check("a killed worker", (code, 0), self.once(), (ran, expected))

    def wait_for(self, count: int) -> None:
        eventually(lambda: len(self.done()) >= count, 60)

    def cancel(self) -> None:
        with self.up("waiting", run_id="cancel") as run:
            self.wait_for(2)
            run_child(*MODULE, "cancel", "cancel", folder=self.folder)
            code, _ = run.finish()
        self.check("cancel, and it is told", (code, 2),
                   ([word for *_, word in self.done() if word], ["told", "told"]))  # fmt: skip

    def interrupt(self) -> None:
        with self.up("waiting", run_id="interrupt") as run:
            self.wait_for(2)
            began = time.monotonic()
            code, _ = run.finish(signal.SIGINT)
            took = time.monotonic() - began
        self.check("Ctrl+C", (code, 2), took < 10, (self.told("RunCancelled"), ["RunCancelled"]))

    def kill(self) -> None:
        with self.up("slow") as run:
            self.wait_for(60)
            (engine,) = self.engines()
            os.kill(engine, signal.SIGKILL)
            run.process.wait(PATIENCE)
        finished = {word.split()[1] for word in self.told("NodeFinished")}
        before = len(self.done())
        with self.up("slow", "--resume") as run:
            code, _ = run.finish()
        values = {node: self.outputs().get(node) for node in (f"n{n}" for n in range(200))}
        again = {node for node, _, _ in self.done()[before:]} & finished
        self.check("kill -9 of the engine, and resume", (code, 0), self.once(), (again, set()),
                   (values, {f"n{n}": {"n": 2 * n} for n in range(200)}))  # fmt: skip

    def engines(self) -> list[int]:
        """Return the process that drives the run."""
        with ss.SmithersDb(self.path, create=False) as db:
            run = db.get_run(self.run_id)
            assert run is not None
            return [ss.process_of(run.runtime_owner_id or "")[1]]


# What Open MPI wants where the tests run as root on few cores.
TRIAL_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
}


def executors_command(arguments: argparse.Namespace) -> int:
    """Try each engine; what is not installed here is wrong only when it was asked for."""
    wrong = 0
    for name in arguments.names or ENGINES:
        engine = ENGINES[name]
        has_module = not engine.module or has_modules(sys.executable, engine.module)
        missing = [] if has_module else [engine.module]
        missing += [word for word in engine.start[:1] if shutil.which(word) is None]
        if missing:
            print(f"{name:<13} not tried: no {' and no '.join(missing)} here ({engine.install})")
            wrong += bool(arguments.names)
            continue
        with tempfile.TemporaryDirectory(prefix="smithers-executors-") as folder:
            with contextlib.ExitStack() as stack:
                trial = Trial(name, folder)
                for argv in engine.beside:
                    stack.enter_context(
                        Child(
                            *argv[1:],
                            python=argv[0],
                            folder=folder,
                            PYTHONPATH=f"{folder}{os.pathsep}{HERE}",
                            **TRIAL_ENVIRONMENT,
                        )
                    )
                wrong += trial.run()
    return 1 if wrong else 0


# ---------------------------------------------------------------------------
# Every test, several at once
# ---------------------------------------------------------------------------

WORKERS = 3 * (os.cpu_count() or 1)  # most tests wait most of the time


def make_portions() -> list[list[Any]]:
    """Return every test as a portion, but every third of a class whose tests share something.

    Those come first, and then the file from its end: what takes long is there.
    """
    shared: list[list[Any]] = []
    alone: list[list[Any]] = []
    for suite in unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__]):
        tests: list[Any] = list(suite)
        if tests and tests[0].setUpClass.__func__ is not unittest.TestCase.setUpClass.__func__:
            shared += filter(None, (tests[number::3] for number in range(3)))
        else:
            alone += ([test] for test in tests)
    return shared + alone[::-1]


def run_portion(tests: list[Any]) -> tuple[int, int, list[str]]:
    """Return how many tests were run and skipped, and what there is to tell of failures."""
    runner = unittest.TextTestRunner(stream=io.StringIO(), verbosity=0)
    result = runner.run(unittest.TestSuite(tests))
    wrong: list[Any] = [("ERROR", *error) for error in result.errors]
    wrong += [("FAIL", *failure) for failure in result.failures]
    wrong += [("UNEXPECTED SUCCESS", test, "") for test in result.unexpectedSuccesses]
    told = [f"{what}: {test}\n{'-' * 70}\n{trace}" for what, test, trace in wrong]
    print("F" if told else "." * result.testsRun, end="", file=sys.stderr, flush=True)
    return result.testsRun, len(result.skipped), told


def work(portions: list[list[Any]], numbers: int, path: str) -> None:
    """Run the portions whose numbers come out of a pipe; note that each begins, and its end."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    with open(path, "w", encoding="utf-8") as notes:
        while parent and parent.is_alive() and (number := os.read(numbers, 4)):
            tests = portions[int(number)]
            died = f"ERROR: {' '.join(test.id() for test in tests)}\nits process has died\n"
            print(json.dumps([int(number), 0, 0, [died]]), file=notes, flush=True)
            try:
                print(json.dumps([int(number), *run_portion(tests)]), file=notes, flush=True)
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                for test in tests:
                    test.doCleanups()
                tests[0].doClassCleanups()
                return


def run_all() -> int:
    """Run every test in several processes; tell how they ended, and return, as unittest does."""
    began, portions, fork = time.monotonic(), make_portions(), multiprocessing.get_context("fork")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    run_child("-c", "import smithers_serve")  # compiled once for all
    numbers, queue = os.pipe()
    os.write(queue, b"".join(b"%4d" % number for number in range(len(portions))))
    os.close(queue)
    ended = {
        number: (0, 0, [f"ERROR: {tests}\nnot run\n"]) for number, tests in enumerate(portions)
    }
    with tempfile.TemporaryDirectory(prefix="smithers-suite-") as folder:
        paths = [os.path.join(folder, str(number)) for number in range(WORKERS)]
        workers = [fork.Process(target=work, args=(portions, numbers, path)) for path in paths]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            begun = [worker for worker in workers if worker.pid]
            for worker in begun:
                if worker.is_alive():
                    os.kill(worker.pid or 0, signal.SIGINT)
            for worker in begun:
                worker.join()
            return 130
        for path in filter(os.path.exists, paths):
            with open(path, encoding="utf-8") as notes:
                ended.update((number, rest) for number, *rest in map(json.loads, notes))
    counts, skips, texts = zip(*ended.values())
    told = sum(texts, [])
    marks = [f"failures={len(told)}"] * bool(told) + [f"skipped={sum(skips)}"] * any(skips)
    end = " ".join(["FAILED" if told else "OK", f"({', '.join(marks)})" if marks else ""])
    took = f"{'-' * 70}\nRan {sum(counts)} tests in {time.monotonic() - began:.3f}s\n\n"
    shown = "".join(f"\n{'=' * 70}\n{text}" for text in told)
    print(shown, took + end.rstrip(), sep="\n", file=sys.stderr)
    return 1 if told else 0


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------

CHILDREN: dict[str, Callable[..., int]] = {
    "_load": load_command,
    "_serve": serve_command,
    "_write": write_command,
    "_listen": listen_command,
    "_steps": steps_command,
    "_readme": readme_command,
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
    executors = commands.add_parser("executors", help="try the README's executors")
    executors.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ENGINES))
    executors.set_defaults(run=executors_command)
    seconds: dict[str, Any] = {"dest": "seconds", "type": float, "metavar": "SECONDS"}
    count: dict[str, Any] = {"dest": "count", "type": int, "metavar": "N"}
    rounds: dict[str, Any] = {"dest": "count", "type": int, "metavar": "ROUNDS", "nargs": "?"}
    for name, run, options, told in (
        ("crash", crash_command, count, "kill and resume a run N times"),
        ("crash-server", server_crash_command, count, "kill parts of a server in N rounds"),
        ("restart", restart_command, count, "stop and go on with a run N times"),
        ("power", power_command, {**rounds, "default": 3}, "look at what power failures leave"),
        ("fuzz", fuzz_command, seconds, "throw mutated requests at a server"),
        ("fuzz-server", fuzz_many_command, seconds, "the same, at a server of many runs"),
        ("model", model_command, seconds, "run random trees that change while they run"),
    ):
        command = commands.add_parser(name, help=told)
        command.add_argument(**options)
        command.add_argument("--seed", type=int, default=random.randrange(10**6))
        command.set_defaults(run=run)
    return parser


def main(argv: list[str]) -> int:
    if argv and argv[0] in CHILDREN:
        return CHILDREN[argv[0]](*argv[1:])
    arguments = make_arguments().parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        raise SystemExit(run_all())
    if sys.argv[1][0].islower() or sys.argv[1] in CHILDREN:
        raise SystemExit(main(sys.argv[1:]))
    unittest.main()
