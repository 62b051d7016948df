"""The specification of smithers_serve as tests: real sockets, real processes, real databases.

python3 -m unittest                      every test, nothing to install
python3 test_smithers_serve.py bench     measure (also: crash N, fuzz SECONDS)
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import json
import logging
import multiprocessing
import os
import platform
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
import unittest.mock
import urllib.error
import urllib.parse
import urllib.request
import warnings
import wsgiref.simple_server
import wsgiref.util
import wsgiref.validate
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from email.message import Message
from typing import Any, Callable, NamedTuple
from unittest import mock

import smithers_serve as ss

SELF = os.path.abspath(__file__)
HERE = os.path.dirname(SELF)

# What a failing task raises goes to the log with its traceback; a test that wants it asks for it.
ss.logger.addHandler(logging.NullHandler())
ss.logger.propagate = False

# ---------------------------------------------------------------------------
# Helpers: a run in this process
# ---------------------------------------------------------------------------

PATIENCE = 20.0  # seconds until a wait counts as a failure; no test is meant to come near

# The fields of every event between `type, runId` and `timestampMs`; a `?` marks optional ones.
EVENT_FIELDS = {
    "RunStarted": "",
    "RunStatusChanged": "status",
    "RunFinished": "",
    "RunFailed": "error",
    "RunCancelled": "",
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


@functools.cache
def cache_folder() -> str:
    """Return a folder in which the module is compiled once for all child processes."""
    folder = tempfile.mkdtemp(prefix="smithers-pycache-")
    atexit.register(shutil.rmtree, folder, True)
    return folder


def engine_environment(**extra: str) -> dict[str, str]:
    """Return the environment of a child process that imports the module under test quickly."""
    path = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))
    child = {**os.environ, "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": cache_folder(), **extra}
    child.pop("PYTHONDONTWRITEBYTECODE", None)
    return child


def answer() -> int:
    return 42


def fail() -> None:
    raise ValueError("no luck")


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("mute")


def fail_mutely() -> None:
    raise Mute


class Live:
    """A run in a thread of its own, and the events it has told of so far."""

    def __init__(self, workflow: Any, adapter: ss.SmithersDb, run_id: str, **options: Any) -> None:
        self._arrived = threading.Condition()
        self._seen: list[ss.Event] = []
        self._outcome: Any = None
        self._thread = threading.Thread(
            target=self._run, args=(workflow, adapter, run_id, options), daemon=True
        )
        self._thread.start()

    def _run(
        self, workflow: Any, adapter: ss.SmithersDb, run_id: str, options: dict[str, Any]
    ) -> None:
        try:
            outcome: Any = ss.run_workflow(
                workflow, adapter=adapter, run_id=run_id, on_event=self._see, **options
            )
        except BaseException as error:
            outcome = error
        with self._arrived:
            self._outcome = outcome
            self._arrived.notify_all()

    def _see(self, event: ss.Event) -> None:
        with self._arrived:
            self._seen.append(event)
            self._arrived.notify_all()

    def wait(self, type: str, node_id: str | None = None, **fields: Any) -> None:
        """Wait until an event of this type, node and fields is committed."""
        wanted = {"type": type, **fields, **({} if node_id is None else {"nodeId": node_id})}

        def has_come() -> bool:
            return any(wanted.items() <= _flat(event).items() for event in self._seen)

        with self._arrived:
            self._arrived.wait_for(lambda: has_come() or self._outcome is not None, PATIENCE)
            if not has_come():
                raise AssertionError(f"no {wanted} before {self._outcome!r}")

    def is_running(self, seconds: float = 0) -> bool:
        with self._arrived:
            return not self._arrived.wait_for(lambda: self._outcome is not None, seconds)

    def end(self) -> ss.RunResult:
        """Return the run's result, or raise what it raised."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._outcome is not None, PATIENCE):
                raise AssertionError("the run does not end")
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


def _flat(event: ss.Event) -> dict[str, Any]:
    return {key: value for key, value in event.payload.items() if not isinstance(value, dict)}


class DatabaseCase(unittest.TestCase):
    """A folder and a database per test; afterwards every run in it must be consistent."""

    maxDiff = None

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="smithers-test-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.path = os.path.join(self.folder, "smithers.db")
        self.db = self.adapter()

    def tearDown(self) -> None:
        every = (*ss.ACTIVE_STATUSES, *ss.TERMINAL_STATUSES)
        for run in self.db.list_runs(every):
            self.check_log(run)
            self.check_rows(run)

    def check_log(self, run: ss.Run) -> None:
        """The log has no gap, every event its documented keys, and the end is told once."""
        log = self.db.list_events(run.run_id)
        self.assertEqual([event.seq for event in log], list(range(len(log))))
        for event in log:
            keys = list(event.payload)
            fields = EVENT_FIELDS[event.type].split()
            expected = [f.rstrip("?") for f in fields if "?" not in f or f.rstrip("?") in keys]
            self.assertEqual(keys, ["type", "runId", *expected, "timestampMs"])
        if run.is_terminal:
            self.assertEqual(log[-1].type, LAST_EVENTS[run.status])

    def check_rows(self, run: ss.Run) -> None:
        """Of a run that has ended nothing is open; of no node two attempts are."""
        attempts = self.db.list_attempts(run.run_id)
        busy = [(a.node_id, a.iteration) for a in attempts if a.state == "in-progress"]
        self.assertEqual(len(busy), len(set(busy)))
        done = [(a.node_id, a.iteration) for a in attempts if a.state == "finished"]
        self.assertEqual(len(done), len(set(done)), "finished work ran again")
        if run.is_terminal:
            states = {node.state for node in self.db.list_nodes(run.run_id)}
            self.assertFalse(states & {"in-progress", "waiting-approval"})
            self.assertFalse(busy)
            self.assertNotIn("requested", [g.status for g in self.db.list_gates(run.run_id)])
            self.assertIsNone(run.runtime_owner_id)

    def adapter(self) -> ss.SmithersDb:
        """Return one more adapter on the file, as another process would have."""
        db = ss.SmithersDb(self.path)
        self.addCleanup(db.close)
        return db

    def drive(self, workflow: Any, run_id: str = "r", **options: Any) -> ss.RunResult:
        """Run a workflow, or a list of elements, to its end."""
        return self.start(workflow, run_id, **options).end()

    def start(
        self, workflow: Any, run_id: str = "r", adapter: ss.SmithersDb | None = None, **options: Any
    ) -> Live:
        if isinstance(workflow, list):
            workflow = ss.Workflow("test", *workflow)
        return Live(workflow, adapter or self.db, run_id, **options)

    def decide(self, verdict: str, node_id: str = "gate", **fields: Any) -> None:
        """Decide a gate from another adapter."""
        ss.decide(self.adapter(), "r", node_id, ss.Decision(verdict, **fields))

    def events(self, *types: str, run_id: str = "r") -> list[tuple[Any, ...]]:
        """Return (type, values between runId and timestampMs) of these types, or of all."""
        log = self.db.list_events(run_id)
        return [
            (e.type, *list(e.payload.values())[2:-1]) for e in log if e.type in types or not types
        ]

    def starts(self) -> list[str]:
        return [event[1] for event in self.events("NodeStarted")]

    def output(self, node_id: str, iteration: int | None = None, run_id: str = "r") -> Any:
        found = self.db.find_output(run_id, node_id, iteration)
        return None if found is None else json.loads(found)

    def states(self, run_id: str = "r") -> dict[str, str]:
        """Return the state of each node in its newest iteration."""
        return {node.node_id: node.state for node in self.db.list_nodes(run_id)}

    def error_of(self, node_id: str) -> dict[str, Any]:
        """Return the error of the node's last NodeFailed."""
        return [event for event in self.events("NodeFailed") if event[1] == node_id][-1][4]

    def status(self, run_id: str = "r") -> str:
        run = self.db.get_run(run_id)
        assert run is not None
        return run.status


# ---------------------------------------------------------------------------
# Authoring
# ---------------------------------------------------------------------------


class AuthoringTest(DatabaseCase):
    def refuse(self, code: str, named: str, build: Callable[[], Any]) -> None:
        """Run a workflow with a mistake: it fails with `code`, names the id, and nothing runs."""
        self.runs = getattr(self, "runs", 0) + 1
        run_id = f"r{self.runs}"

        def workflow(ctx: ss.Ctx) -> Any:
            built = build()
            return built if isinstance(built, ss.Workflow) else ss.Workflow("w", built)

        with self.subTest(code=code, named=named, number=self.runs):
            result = self.drive(workflow, run_id)
            self.assertEqual(result.status, "failed")
            assert result.error is not None
            self.assertEqual(result.error["code"], code, result.error)
            self.assertIn(named, result.error["message"])
            self.assertEqual(
                [event[0] for event in self.events(run_id=run_id)],
                ["RunStarted", "RunStatusChanged", "RunStatusChanged", "RunFailed"],
            )
            run = self.db.get_run(run_id)
            assert run is not None and run.error_json is not None
            self.assertEqual(json.loads(run.error_json), result.error)

    def test_design_example_runs_as_written(self) -> None:
        def run_unit_tests(ref: str) -> dict[str, Any]:
            return {"ref": ref}

        def fix(report: dict[str, Any]) -> str:
            return f"fixed {report['ref']}"

        def review() -> dict[str, Any]:
            return {"ok": ss.current_task().iteration == 1}

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            return ss.Workflow(
                "release",
                ss.Parallel(
                    ss.Task(
                        "unit",
                        run_unit_tests,
                        kwargs={"ref": ctx.input["ref"]},
                        retries=2,
                        retry_delay=1.0,
                    ),
                    ss.Task("lint", ["sh", "-c", "exit 1"], continue_on_fail=True),
                ),
                ss.Loop(
                    ss.Task("fix", fix, needs={"report": "unit"}),
                    ss.Task("review", review),
                    id="polish",
                    until=(ctx.output("review") or {}).get("ok") is True,
                    max_iterations=3,
                ),
                ss.Approval("ship", title=f"Ship {ctx.input['ref']}?"),
                ss.Task("announce", {"channel": "releases"}) if ctx.input.get("announce") else None,
            )

        live = self.start(workflow, input={"ref": "v1", "announce": True})
        live.wait("NodeWaitingApproval", "ship")
        self.decide("approved", "ship")
        self.assertEqual(live.end(), ("r", "finished", None))
        self.assertEqual(
            self.states(),
            {
                "unit": "finished",
                "lint": "failed",
                "fix": "finished",
                "review": "finished",
                "ship": "finished",
                "announce": "finished",
            },
        )
        self.assertEqual(self.output("fix", 1), "fixed v1")
        self.assertIsNone(self.output("fix", 2))

    def test_task_may_be_any_of_four(self) -> None:
        async def coroutine(a: int, b: int) -> int:
            return a + b

        def function(a: int, b: int) -> int:
            return a * b

        self.drive(
            [
                ss.Task("function", function, args=(3,), kwargs={"b": 4}),
                ss.Task("coroutine", coroutine, args=[3], kwargs={"b": 4}),
                ss.Task("command", ["sh", "-c", "echo out; echo err >&2"]),
                ss.Task("object", {"a": [1, None, "ä"]}),
            ]
        )
        self.assertEqual(self.output("function"), 12)
        self.assertEqual(self.output("coroutine"), 7)
        self.assertEqual(
            self.output("command"), {"exitCode": 0, "stdout": "out\n", "stderr": "err\n"}
        )
        self.assertEqual(self.output("object"), {"a": [1, None, "ä"]})

    def test_workflow_instance_runs_without_function(self) -> None:
        result = self.drive(ss.Workflow("fixed", ss.Task("a", answer)))
        self.assertEqual(result.status, "finished")
        run = self.db.get_run("r")
        assert run is not None
        self.assertEqual(run.workflow_name, "fixed")

    def test_empty_workflow_finishes_at_once(self) -> None:
        self.assertEqual(self.drive(ss.Workflow("empty")).status, "finished")
        parts = [ss.Sequence(), ss.Parallel(), ss.Loop(id="l", until=False, max_iterations=2)]
        self.assertEqual(self.drive(parts, "r2").status, "finished")

    def test_none_children_are_dropped_everywhere(self) -> None:
        task = ss.Task("a", answer)
        self.assertEqual(ss.Workflow("w", None, task, None).children, (task,))
        self.assertEqual(ss.Sequence(None, task).children, (task,))
        self.assertEqual(ss.Parallel(task, None).children, (task,))
        self.assertEqual(ss.Loop(None, task, id="l", until=True).children, (task,))

    def test_list_of_children_fans_out(self) -> None:
        self.drive([ss.Parallel(*[ss.Task(f"n{i}", {"i": i}) for i in range(3)])])
        self.assertEqual([self.output(f"n{i}") for i in range(3)], [{"i": i} for i in range(3)])

    def test_needs_by_keyword_pass_outputs(self) -> None:
        def join(left: str, right: str) -> str:
            return left + right

        self.drive(
            [
                ss.Parallel(
                    ss.Task("join", join, needs={"left": "l"}, kwargs={"right": "!"}),
                    ss.Task("l", lambda: "x"),
                )
            ]
        )
        self.assertEqual(self.output("join"), "x!")
        self.assertEqual(self.starts(), ["l", "join"])

    def test_needs_by_list_only_wait(self) -> None:
        self.drive(
            [
                ss.Parallel(
                    ss.Task("late", answer, needs=["a", "b"]),
                    ss.Task("a", answer),
                    ss.Task("b", answer, needs=("a",)),
                )
            ]
        )
        self.assertEqual(self.starts(), ["a", "b", "late"])

    def test_needs_from_outside_wait_for_loop(self) -> None:
        def turn() -> int:
            return ss.current_task().iteration

        self.drive(
            [
                ss.Parallel(
                    ss.Task("after", lambda last: last, needs={"last": "turn"}),
                    ss.Loop(ss.Task("turn", turn), id="l", until=False, max_iterations=3),
                )
            ]
        )
        self.assertEqual(self.output("after"), 2)

    def test_needs_from_outside_get_newest_outer_turn(self) -> None:
        inner = ss.Loop(
            ss.Task("turn", lambda: ss.current_task().node_id),
            id="inner",
            until=False,
            max_iterations=1,
        )
        self.drive(
            [
                ss.Loop(inner, id="outer", until=False, max_iterations=2),
                ss.Task("after", lambda last: last, needs={"last": "turn"}),
            ]
        )
        self.assertEqual(self.output("after"), "turn@@outer=1")

    def test_needs_of_skipped_task_are_met(self) -> None:
        self.drive(
            [
                ss.Task("a", answer, skip_if=True),
                ss.Task("b", lambda a: a, needs={"a": "a"}),
            ]
        )
        self.assertEqual(self.states(), {"a": "skipped", "b": "finished"})
        self.assertIsNone(self.output("b"))

    def test_ids_used_twice_are_refused(self) -> None:
        self.refuse(
            "DUPLICATE_ID",
            "'a'",
            lambda: ss.Parallel(ss.Task("a", answer), ss.Sequence(ss.Task("a", answer))),
        )
        self.refuse(
            "DUPLICATE_ID", "'a'", lambda: ss.Loop(ss.Task("a", answer), id="a", until=True)
        )
        self.refuse(
            "DUPLICATE_ID", "'a'", lambda: ss.Sequence(ss.Task("a", answer), ss.Approval("a"))
        )

    def test_ids_outside_alphabet_are_refused(self) -> None:
        for bad in ("", "a b", "ä", "a/b", "a@@b=1", "x" * 129, "a\n", 7, None):
            value: Any = bad
            self.refuse("INVALID_ID", repr(bad), lambda value=value: ss.Task(value, answer))
        self.refuse("INVALID_ID", "'a b'", lambda: ss.Approval("a b"))
        self.refuse("INVALID_ID", "'a b'", lambda: ss.Loop(id="a b", until=True))

    def test_ids_of_full_alphabet_are_taken(self) -> None:
        for good in ("A.b_c:d-9", "x" * 128, "0"):
            self.assertEqual(ss.Task(good, answer).id, good)

    def test_unknown_needs_are_refused(self) -> None:
        self.refuse("UNKNOWN_DEPENDENCY", "'ghost'", lambda: ss.Task("a", answer, needs=["ghost"]))
        self.refuse("UNKNOWN_DEPENDENCY", "'ghost'", lambda: ss.Approval("a", needs={"x": "ghost"}))

    def test_cyclic_needs_are_refused(self) -> None:
        self.refuse("CYCLIC_DEPENDENCY", "'a'", lambda: ss.Task("a", answer, needs=["a"]))
        self.refuse(
            "CYCLIC_DEPENDENCY",
            "'a'",
            lambda: ss.Parallel(
                ss.Task("a", answer, needs=["b"]), ss.Task("b", answer, needs=["a"])
            ),
        )

    def test_waiting_for_later_sibling_is_cycle(self) -> None:
        self.refuse(
            "CYCLIC_DEPENDENCY",
            "'early'",
            lambda: ss.Sequence(ss.Task("early", answer, needs=["late"]), ss.Task("late", answer)),
        )
        self.refuse(
            "CYCLIC_DEPENDENCY",
            "'in'",
            lambda: ss.Sequence(
                ss.Loop(ss.Task("in", answer, needs=["late"]), id="l", until=False),
                ss.Task("late", answer),
            ),
        )

    def test_wrong_numbers_are_refused(self) -> None:
        bad: list[dict[str, Any]] = [
            {"retries": -1},
            {"retries": 1.5},
            {"retries": True},
            {"retry_delay": -0.1},
            {"retry_delay": float("nan")},
            {"retry_delay": "1"},
            {"timeout": 0},
            {"timeout": float("inf")},
        ]
        for arguments in bad:
            self.refuse("INVALID_ARGUMENT", "'t'", lambda a=arguments: ss.Task("t", answer, **a))
        self.refuse("INVALID_ARGUMENT", "'g'", lambda: ss.Approval("g", timeout=-1))
        self.refuse(
            "INVALID_ARGUMENT", "'l'", lambda: ss.Loop(id="l", until=True, max_iterations=0)
        )
        self.refuse("INVALID_ARGUMENT", "max_concurrency", lambda: ss.Parallel(max_concurrency=0))

    def test_wrong_choices_and_flags_are_refused(self) -> None:
        bad: list[dict[str, Any]] = [
            {"backoff": "random"},
            {"on_deny": "approve"},
            {"needs_approval": 1},
            {"skip_if": None},
            {"continue_on_fail": "yes"},
            {"label": 5},
        ]
        for arguments in bad:
            self.refuse("INVALID_ARGUMENT", "'t'", lambda a=arguments: ss.Task("t", answer, **a))
        wrong: list[dict[str, Any]] = [
            {"on_deny": "deny"},
            {"on_timeout": "continue"},
            {"title": 1},
            {"summary": []},
            {"metadata": {"x": object()}},
            {"skip_if": 0},
        ]
        for arguments in wrong:
            self.refuse("INVALID_ARGUMENT", "'g'", lambda a=arguments: ss.Approval("g", **a))
        loops: list[dict[str, Any]] = [{"until": None}, {"until": True, "on_max": "stop"}]
        for arguments in loops:
            self.refuse("INVALID_ARGUMENT", "'l'", lambda a=arguments: ss.Loop(id="l", **a))

    def test_wrong_runnables_are_refused(self) -> None:
        runnables: list[Any] = [None, "ls", [], ["ls", 1], ["a\0b"], 5, {"x": object()}]
        for run in runnables:
            self.refuse("INVALID_ARGUMENT", "'t'", lambda run=run: ss.Task("t", run))

    def test_wrong_arguments_and_needs_are_refused(self) -> None:
        bad: list[dict[str, Any]] = [
            {"needs": "a"},
            {"needs": {"not a name": "a"}},
            {"needs": {"x": "a"}, "kwargs": {"x": 1}},
            {"needs": 5},
            {"args": 5},
            {"kwargs": 5},
            {"kwargs": {1: 2}},
        ]
        for arguments in bad:
            self.refuse("INVALID_ARGUMENT", "'t'", lambda a=arguments: ss.Task("t", answer, **a))
        for extra in ({"args": [1]}, {"kwargs": {"x": 1}}, {"needs": {"x": "a"}}):
            self.refuse("INVALID_ARGUMENT", "'t'", lambda e=extra: ss.Task("t", ["true"], **e))
        self.refuse("INVALID_ID", "'t'", lambda: ss.Task("t", answer, needs=["no such"]))

    def test_text_beyond_utf8_is_refused(self) -> None:
        lone = "\ud800"
        self.refuse("INVALID_ARGUMENT", "name", lambda: ss.Workflow(lone))
        self.refuse("INVALID_ARGUMENT", "'t'", lambda: ss.Task("t", answer, label=lone))
        self.refuse("INVALID_ARGUMENT", "'t'", lambda: ss.Task("t", {"x": lone}))
        self.refuse("INVALID_ARGUMENT", "'g'", lambda: ss.Approval("g", title=lone))
        self.refuse("INVALID_ARGUMENT", "'g'", lambda: ss.Approval("g", metadata={"x": lone}))

    def test_static_output_over_limit_is_refused(self) -> None:
        big = {"x": "y" * (ss.MAX_OUTPUT_BYTES + 1)}
        result = self.drive(lambda ctx: ss.Workflow("w", ss.Task("t", big)))
        self.assertEqual(result.status, "failed")

    def test_what_is_no_element_is_refused(self) -> None:
        children: list[Any] = ["a", answer, 5, ss.Task, ss.Workflow("inner")]
        for child in children:
            self.refuse("INVALID_TREE", "child", lambda child=child: ss.Sequence(child))
        self.refuse("INVALID_ARGUMENT", "name", lambda: ss.Workflow(""))

    def test_too_deep_tree_is_refused(self) -> None:
        def deep() -> Any:
            tree: Any = ss.Task("t", answer)
            for _ in range(ss.MAX_TREE_DEPTH + 2):
                tree = ss.Sequence(tree)
            return tree

        self.refuse("INVALID_TREE", "deep", deep)

    def test_render_returning_no_workflow_fails(self) -> None:
        for number, wrong in enumerate((None, ss.Task("a", answer), [])):
            result = self.drive(lambda ctx, wrong=wrong: wrong, f"r{number}")
            assert result.error is not None
            self.assertEqual(result.error["code"], "INVALID_TREE")

    def test_render_that_raises_fails_run(self) -> None:
        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            raise KeyError("ref")

        result = self.drive(workflow)
        self.assertEqual(result.status, "failed")
        assert result.error is not None
        self.assertEqual(result.error["code"], "RENDER_FAILED")
        self.assertIn("KeyError: 'ref'", result.error["message"])

    def test_render_error_without_words_fails_run(self) -> None:
        result = self.drive(lambda ctx: ss.Workflow("w", fail_mutely()))
        self.assertEqual(result.status, "failed")

    def test_late_render_error_drains_and_fails(self) -> None:
        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            if ctx.output("a"):
                raise ValueError("late")
            return ss.Workflow("w", ss.Task("a", answer), ss.Task("b", answer))

        result = self.drive(workflow)
        self.assertEqual(result.status, "failed")
        self.assertEqual(self.states(), {"a": "finished", "b": "pending"})

    def test_endless_rendering_is_stopped_by_name(self) -> None:
        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            known = 0
            while ctx.state(f"n{known}") is not None:
                known += 1
            return ss.Workflow(
                "w",
                *[ss.Task(f"n{i}", answer, skip_if=True) for i in range(known + 1)],
            )

        with mock.patch.object(ss, "MAX_RENDERS_WITHOUT_PROGRESS", 5):
            result = self.drive(workflow)
        assert result.error is not None
        self.assertEqual(result.error["code"], "RENDER_LOOP")
        self.assertIn("what changes: n", result.error["message"])

    def test_reading_what_is_missing_gives_default(self) -> None:
        seen: list[Any] = []

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            seen.append(
                (
                    ctx.run_id,
                    ctx.input,
                    ctx.output("ghost"),
                    ctx.output("ghost", "default"),
                    ctx.output("ghost", iteration=7),
                    ctx.state("ghost"),
                    ctx.error("ghost"),
                    ctx.iteration("ghost"),
                )
            )
            return ss.Workflow("w")

        self.drive(workflow)
        self.assertEqual(seen, [("r", {}, None, "default", None, None, None, 0)])
        self.assertEqual(workflow(ss.Ctx("r")), ss.Workflow("w"))

    def test_ctx_tells_state_and_error(self) -> None:
        seen: list[Any] = []

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            seen.append((ctx.state("a"), ctx.error("a")))
            return ss.Workflow("w", ss.Task("a", fail, continue_on_fail=True))

        self.drive(workflow)
        self.assertEqual(seen[-1], ("failed", {"name": "ValueError", "message": "no luck"}))

    def test_ctx_output_takes_an_iteration(self) -> None:
        seen: list[Any] = []

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            seen.append([ctx.output("t"), ctx.output("t", iteration=0), ctx.iteration("l")])
            task = ss.Task("t", lambda: ss.current_task().iteration)
            return ss.Workflow("w", ss.Loop(task, id="l", until=False, max_iterations=3))

        self.drive(workflow)
        self.assertEqual(seen[-1], [2, 0, 2])

    def test_current_task_outside_of_task_raises(self) -> None:
        with self.assertRaises(RuntimeError):
            ss.current_task()

    def test_current_task_knows_its_attempt(self) -> None:
        seen: list[Any] = []

        def once() -> None:
            task = ss.current_task()
            seen.append((task.run_id, task.node_id, task.iteration, task.attempt))
            seen.append(task.idempotency_key)
            task.log("two\nlines")
            if task.attempt == 0:
                raise ValueError

        self.drive([ss.Task("a", once, retries=1)])
        self.assertEqual(seen[0::2], [("r", "a", 0, 0), ("r", "a", 0, 1)])
        self.assertEqual(seen[1], seen[3])
        self.assertEqual(
            self.events("NodeOutput"),
            [
                ("NodeOutput", "a", 0, attempt, text, "stdout")
                for attempt in (0, 1)
                for text in ("two", "lines")
            ],
        )

    def test_coroutine_sees_its_current_task(self) -> None:
        async def look() -> str:
            await asyncio.sleep(0)
            return ss.current_task().node_id

        self.drive([ss.Task("a", look)])
        self.assertEqual(self.output("a"), "a")

    def test_dataclass_outputs_become_objects(self) -> None:
        @dataclasses.dataclass
        class Report:
            passed: int
            names: list[str]

        self.drive([ss.Task("a", lambda: {"report": Report(3, ["x"])})])
        self.assertEqual(self.output("a"), {"report": {"passed": 3, "names": ["x"]}})

    def test_wrong_run_arguments_write_nothing(self) -> None:
        for options in ({"run_id": "a b"}, {"max_concurrency": 0}):
            with self.assertRaises(ss.AuthoringError):
                ss.run_workflow(ss.Workflow("w"), adapter=self.db, **options)  # type: ignore
        not_one: Any = "workflow"
        with self.assertRaises(ss.AuthoringError):
            ss.run_workflow(not_one, adapter=self.db)
        self.assertEqual(self.db.list_runs(ss.TERMINAL_STATUSES + ss.ACTIVE_STATUSES), [])

    def test_run_id_can_be_used_once(self) -> None:
        self.drive([ss.Task("a", answer)])
        before = self.events()
        with self.assertRaises(ss.RunExists):
            self.drive([ss.Task("a", answer)])
        self.assertEqual(self.events(), before)


# ---------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------


class ScheduleTest(DatabaseCase):
    def test_children_run_in_order(self) -> None:
        self.drive(
            [
                ss.Task("a", answer),
                ss.Sequence(ss.Task("b", answer), ss.Sequence(ss.Task("c", answer))),
                ss.Task("d", answer),
            ]
        )
        told = self.events("NodeStarted", "NodeFinished")
        self.assertEqual([e[1] for e in told], list("aabbccdd"))

    def test_parallel_children_run_together(self) -> None:
        together = threading.Barrier(3)

        def meet() -> None:
            together.wait(PATIENCE)

        tasks = [ss.Task(f"n{i}", meet) for i in range(3)]
        self.assertEqual(self.drive([ss.Parallel(*tasks)]).status, "finished")

    def most_at_once(self, *children: Any, **options: Any) -> int:
        """Return the highest number of attempts that the log shows open at one time."""
        self.drive(list(children), **options)
        busy = most = 0
        for event in self.events("NodeStarted", "NodeFinished"):
            busy += 1 if event[0] == "NodeStarted" else -1
            most = max(most, busy)
        return most

    def test_parallel_limit_counts_tasks_below(self) -> None:
        branches = [
            ss.Sequence(ss.Task(f"a{i}", answer), ss.Task(f"b{i}", answer)) for i in range(4)
        ]
        self.assertEqual(self.most_at_once(ss.Parallel(*branches, max_concurrency=2)), 2)

    def test_run_limit_counts_all_tasks(self) -> None:
        tasks = [ss.Task(f"n{i}", answer) for i in range(6)]
        self.assertEqual(self.most_at_once(ss.Parallel(*tasks), max_concurrency=2), 2)

    def test_inner_parallel_limit_holds_too(self) -> None:
        inner = ss.Parallel(*[ss.Task(f"i{n}", answer) for n in range(4)], max_concurrency=1)
        outer = ss.Parallel(inner, *[ss.Task(f"o{n}", answer) for n in range(3)], max_concurrency=2)
        self.assertLessEqual(self.most_at_once(outer, max_concurrency=8), 2)
        self.assertEqual(set(self.states().values()), {"finished"})

    def test_place_of_static_task_goes_on(self) -> None:
        kinds: list[Any] = [answer, {"static": True}, answer, {"static": True}, ["true"]]
        tasks = [ss.Task(f"n{i}", run) for i, run in enumerate(kinds)]
        self.assertEqual(self.drive([ss.Parallel(*tasks, max_concurrency=1)]).status, "finished")
        self.assertEqual(self.starts(), ["n0", "n1", "n2", "n3", "n4"])

    def test_limit_holds_over_new_renders(self) -> None:
        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            done = sum(ctx.state(f"n{i}") == "finished" for i in range(5))
            extra = ss.Task("extra", answer) if done > 2 else None
            tasks = [ss.Task(f"n{i}", answer) for i in range(5)]
            return ss.Workflow("w", ss.Parallel(*tasks, extra, max_concurrency=1))

        self.drive(workflow)
        told = self.events("NodeStarted", "NodeFinished")
        self.assertEqual([e[0] for e in told], ["NodeStarted", "NodeFinished"] * 6)

    def test_loop_runs_until_condition_holds(self) -> None:
        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            task = ss.Task("t", lambda: ss.current_task().iteration)
            return ss.Workflow("w", ss.Loop(task, id="l", until=ctx.output("t") == 1))

        self.drive(workflow)
        self.assertEqual(
            self.events("NodeStarted"), [("NodeStarted", "t", 0, 0), ("NodeStarted", "t", 1, 0)]
        )

    def test_loop_already_done_never_begins(self) -> None:
        self.drive([ss.Loop(ss.Task("t", answer), id="l", until=True), ss.Task("next", answer)])
        self.assertEqual(self.starts(), ["next"])

    def test_loop_ends_after_max_iterations(self) -> None:
        loop = ss.Loop(ss.Task("t", answer), id="l", until=False, max_iterations=3)
        self.drive([loop, ss.Task("next", answer)])
        self.assertEqual(self.starts(), ["t", "t", "t", "next"])

    def test_loop_may_fail_at_max(self) -> None:
        loop = ss.Loop(ss.Task("t", answer), id="l", until=False, max_iterations=2, on_max="fail")
        result = self.drive([loop, ss.Task("next", answer)])
        self.assertEqual(result.status, "failed")
        assert result.error is not None
        self.assertEqual(result.error["code"], "LOOP_EXHAUSTED")
        self.assertIn("'l'", result.error["message"])
        self.assertEqual(self.starts(), ["t", "t"])

    def nested(self, ctx: ss.Ctx) -> ss.Workflow:
        inner = ss.Loop(
            ss.Task("t", lambda: ss.current_task().iteration),
            id="inner",
            until=ctx.output("t") == 1,
        )
        return ss.Workflow(
            "w",
            ss.Loop(inner, ss.Task("o", answer), id="outer", until=False, max_iterations=2),
        )

    def test_nested_loop_carries_outer_iteration(self) -> None:
        self.drive(self.nested)
        self.assertEqual(
            [event[1:3] for event in self.events("NodeStarted")],
            [
                ("t@@outer=0", 0),
                ("t@@outer=0", 1),
                ("o", 0),
                ("t@@outer=1", 0),
                ("t@@outer=1", 1),
                ("o", 1),
            ],
        )

    def test_third_level_carries_both_outer_iterations(self) -> None:
        def twice(id: str, *children: Any) -> ss.Loop:
            return ss.Loop(*children, id=id, until=False, max_iterations=2)

        self.drive([twice("a", twice("b", twice("c", ss.Task("t", answer))))])
        self.assertEqual(
            [event[1:3] for event in self.events("NodeStarted")],
            [(f"t@@a={a},b={b}", c) for a in (0, 1) for b in (0, 1) for c in (0, 1)],
        )

    def test_skipped_tasks_do_not_run(self) -> None:
        self.drive([ss.Task("a", fail, skip_if=True), ss.Approval("g", skip_if=True)])
        self.assertEqual(self.states(), {"a": "skipped", "g": "skipped"})
        self.assertEqual(
            self.events("NodeSkipped"), [("NodeSkipped", "a", 0), ("NodeSkipped", "g", 0)]
        )
        self.assertEqual(self.events("NodeStarted", "ApprovalRequested"), [])

    def test_task_skipped_before_retry_stays_skipped(self) -> None:
        first_failed = threading.Event()

        def flaky() -> None:
            first_failed.set()
            raise ValueError

        def outlive() -> None:
            first_failed.wait(PATIENCE)
            if ss.current_task().attempt == 0:
                raise ValueError

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            skip = ctx.state("other") == "finished"
            return ss.Workflow(
                "w",
                ss.Parallel(
                    ss.Task("a", flaky, retries=1, retry_delay=0.4, skip_if=skip),
                    ss.Task("other", lambda: first_failed.wait(PATIENCE)),
                    ss.Task("later", outlive, retries=1, retry_delay=0.5),
                ),
            )

        self.assertEqual(self.drive(workflow).status, "finished")
        self.assertEqual(self.states()["a"], "skipped")
        self.assertEqual(self.starts().count("a"), 1)

    def test_continue_on_fail_goes_on(self) -> None:
        result = self.drive([ss.Task("a", fail, continue_on_fail=True), ss.Task("b", answer)])
        self.assertEqual(result.status, "finished")
        self.assertEqual(self.states(), {"a": "failed", "b": "finished"})

    def counted(self, *reads: tuple[str, str]) -> int:
        """Return how often a three-task workflow with these reads is rendered."""
        calls: list[int] = []

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            calls.append(1)
            for kind, id in reads:
                getattr(ctx, kind)(id)
            return ss.Workflow("w", *[ss.Task(id, {"id": id}) for id in "abc"])

        self.drive(workflow, "-".join(["r", *(part for read in reads for part in read)]))
        return len(calls)

    def test_renders_only_after_what_was_read(self) -> None:
        self.assertEqual(self.counted(), 1)
        self.assertEqual(self.counted(("output", "b")), 2)
        self.assertEqual(self.counted(("output", "ghost")), 1)
        self.assertEqual(self.counted(("output", "a"), ("output", "c")), 3)
        self.assertEqual(self.counted(("error", "b")), 1)

    def test_frames_only_when_tree_differs(self) -> None:
        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            extra = ss.Task("c", answer) if ctx.output("b") else None
            ctx.output("a")
            return ss.Workflow("w", ss.Task("a", answer), ss.Task("b", answer), extra)

        self.drive(workflow)
        frames = self.db.list_frames("r", 10)
        self.assertEqual([frame.frame_no for frame in frames], [2, 1])
        self.assertEqual(
            self.events("FrameCommitted"),
            [("FrameCommitted", frame.frame_no, frame.xml_hash) for frame in frames[::-1]],
        )

    def test_each_iteration_has_its_frame(self) -> None:
        loop = ss.Loop(ss.Task("t", answer), id="l", until=False, max_iterations=3)
        self.drive([loop])
        mounted = [f.mounted_task_ids_json for f in self.db.list_frames("r", 10, 0)]
        self.assertEqual(mounted, ['["t::0"]', '["t::1"]', '["t::2"]'])

    def test_frame_row_is_what_clients_expect(self) -> None:
        self.drive(
            [
                ss.Parallel(
                    ss.Task("a", answer, label="Ä", retries=2, timeout=1.5, continue_on_fail=True),
                    ss.Task("b", answer, needs=["a"], skip_if=True),
                    max_concurrency=2,
                ),
                ss.Loop(ss.Task("t", answer), id="l", until=False, max_iterations=1),
                ss.Approval("g", title="Go?", timeout=0.001, on_timeout="approve"),
            ]
        )
        frame = self.db.list_frames("r", 1, 0)[0]

        def element(tag: str, children: list[Any], **props: str) -> dict[str, Any]:
            tag = f"smithers:{tag}"
            return {"kind": "element", "tag": tag, "props": props, "children": children}

        first = element(
            "task", [], continueOnFail="true", id="a", label="Ä", retries="2", timeoutMs="1500"
        )
        gate = element(
            "task",
            [],
            approvalMode="decision",
            id="g",
            label="Go?",
            needsApproval="true",
            onDeny="fail",
            timeoutMs="1",
        )
        tree = element(
            "workflow",
            [
                element(
                    "parallel",
                    [first, element("task", [], dependsOn="a", id="b", skipIf="true")],
                    maxConcurrency="2",
                ),
                element(
                    "ralph",
                    [element("task", [], id="t")],
                    id="l",
                    maxIterations="1",
                    onMaxReached="return-last",
                    until="false",
                ),
                gate,
            ],
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

    def test_dropped_task_is_cancelled(self) -> None:
        stopped: list[bool] = []

        def wait() -> None:
            stopped.append(ss.current_task().cancelled.wait(PATIENCE))

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            watcher = None if ctx.output("a") else ss.Task("watch", wait)
            return ss.Workflow("w", ss.Parallel(watcher, ss.Task("a", answer)))

        self.assertEqual(self.drive(workflow).status, "finished")
        self.assertEqual(stopped, [True])
        self.assertEqual(
            self.events("NodeCancelled"),
            [("NodeCancelled", "watch", 0, 0, "no longer in the tree")],
        )

    def test_dropped_gate_is_closed(self) -> None:
        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            gate = None if ctx.output("a") else ss.Approval("gate")
            return ss.Workflow("w", ss.Parallel(gate, ss.Task("a", lambda: release.wait(PATIENCE))))

        release = threading.Event()
        live = self.start(workflow)
        live.wait("NodeWaitingApproval", "gate")
        release.set()
        self.assertEqual(live.end().status, "finished")
        self.assertEqual(self.db.list_gates("r")[0].status, "cancelled")

    def test_order_holds_when_tree_grows_before(self) -> None:
        begun, grown, over = threading.Event(), threading.Event(), threading.Event()

        def old() -> None:
            begun.set()
            grown.wait(PATIENCE)

        def first() -> None:
            grown.set()
            over.wait(PATIENCE)

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            more = [ss.Task("first", first), ss.Task("second", answer)]
            new = more if ctx.output("kick") else []
            kick = ss.Task("kick", lambda: begun.wait(PATIENCE))
            return ss.Workflow("w", ss.Parallel(ss.Sequence(*new, ss.Task("old", old)), kick))

        live = self.start(workflow)
        live.wait("NodeFinished", "old")
        over.set()
        live.end()
        told = [event[:2] for event in self.events("NodeStarted", "NodeFinished")]
        self.assertLess(
            told.index(("NodeFinished", "first")), told.index(("NodeStarted", "second"))
        )


# ---------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------


class RunningTest(DatabaseCase):
    def wait_for_flag(self) -> None:
        if not ss.current_task().cancelled.wait(PATIENCE):
            raise AssertionError("never told to stop")

    def stubborn(self) -> Callable[[], None]:
        """Return a function that ignores its flag until the test has ended."""
        release = threading.Event()
        self.addCleanup(release.set)
        return lambda: None if release.wait(PATIENCE) else None

    def test_event_log_tells_whole_run(self) -> None:
        self.drive([ss.Task("a", answer)])
        frame = self.db.list_frames("r", 1)[0]
        self.assertEqual(
            self.events(),
            [
                ("RunStarted",),
                ("RunStatusChanged", "running"),
                ("NodePending", "a", 0),
                ("FrameCommitted", 1, frame.xml_hash),
                ("NodeStarted", "a", 0, 0),
                ("NodeFinished", "a", 0, 0),
                ("RunStatusChanged", "finished"),
                ("RunFinished",),
            ],
        )

    def test_failed_attempts_are_tried_again(self) -> None:
        def third_time() -> str:
            if ss.current_task().attempt < 2:
                raise ValueError("not yet")
            return "done"

        self.assertEqual(self.drive([ss.Task("a", third_time, retries=2)]).status, "finished")
        error = {"name": "ValueError", "message": "not yet"}
        told = self.events("NodeStarted", "NodeFailed", "NodeRetrying", "NodeFinished")
        self.assertEqual(
            [event[:4] if event[0] == "NodeRetrying" else event for event in told],
            [
                ("NodeStarted", "a", 0, 0),
                ("NodeFailed", "a", 0, 0, error),
                ("NodeRetrying", "a", 0, 1),
                ("NodeStarted", "a", 0, 1),
                ("NodeFailed", "a", 0, 1, error),
                ("NodeRetrying", "a", 0, 2),
                ("NodeStarted", "a", 0, 2),
                ("NodeFinished", "a", 0, 2),
            ],
        )
        states = [attempt.state for attempt in self.db.list_attempts("r")]
        self.assertEqual(states, ["failed", "failed", "finished"])

    def test_retries_end(self) -> None:
        result = self.drive([ss.Task("a", fail, retries=2, retry_delay=0.001)])
        self.assertEqual(result.status, "failed")
        self.assertEqual(self.starts(), ["a"] * 3)

    def test_backoff_grows_as_named(self) -> None:
        delays = {
            backoff: [
                ss.Task("a", answer, retry_delay=2, backoff=backoff).retry_delay_after(failures)
                for failures in (1, 2, 3, 4)
            ]
            for backoff in ("fixed", "linear", "exponential")
        }
        self.assertEqual(
            delays, {"fixed": [2] * 4, "linear": [2, 4, 6, 8], "exponential": [2, 4, 8, 16]}
        )
        far = ss.Task("a", answer, retry_delay=60, backoff="exponential").retry_delay_after(10_000)
        self.assertEqual(far, ss.MAX_RETRY_DELAY_SECONDS)

    def test_delayed_retry_leaves_place_to_others(self) -> None:
        def once() -> None:
            if ss.current_task().attempt == 0:
                raise ValueError

        tasks = [ss.Task("a", once, retries=1, retry_delay=0.1), ss.Task("b", answer)]
        self.drive([ss.Parallel(*tasks)], max_concurrency=1)
        self.assertEqual(self.starts(), ["a", "b", "a"])

    def test_failure_names_all_failed_tasks(self) -> None:
        both = threading.Barrier(2)

        def meet() -> None:
            both.wait(PATIENCE)
            raise ValueError

        result = self.drive([ss.Parallel(ss.Task("a", meet), ss.Task("b", meet))])
        self.assertEqual(result.status, "failed")
        assert result.error is not None
        self.assertIn(result.error["message"], ("Task(s) failed: a, b", "Task(s) failed: b, a"))
        self.assertEqual(self.events("RunFailed"), [("RunFailed", result.error)])
        run = self.db.get_run("r")
        assert run is not None and run.error_json is not None
        self.assertEqual(json.loads(run.error_json), result.error)

    def test_after_failure_in_flight_drains_only(self) -> None:
        failing = threading.Event()

        def slow() -> str:
            failing.wait(PATIENCE)
            return "drained"

        live = self.start(
            [
                ss.Parallel(
                    ss.Task("slow", slow),
                    ss.Task("bad", fail),
                    ss.Task("queued", answer),
                ),
                ss.Task("after", answer),
            ],
            max_concurrency=2,
        )
        live.wait("NodeFailed", "bad")
        failing.set()
        self.assertEqual(live.end().status, "failed")
        self.assertEqual(
            self.states(),
            {"slow": "finished", "bad": "failed", "after": "pending", "queued": "pending"},
        )
        self.assertEqual(self.output("slow"), "drained")

    def test_errors_carry_no_paths_or_tracebacks(self) -> None:
        def leak() -> None:
            raise ValueError(f"cannot read {os.path.dirname(json.__file__)}/secret.txt")

        with self.assertLogs(ss.logger, "WARNING") as logged:
            self.drive([ss.Task("a", leak)])
        self.assertEqual(
            self.error_of("a"), {"name": "ValueError", "message": "cannot read json/secret.txt"}
        )
        self.assertIn("Traceback", logged.output[0])

    def test_exception_without_words_fails_task(self) -> None:
        self.drive([ss.Task("a", fail_mutely)])
        self.assertEqual(self.error_of("a")["name"], "Mute")

    def test_file_errors_name_file_not_folder(self) -> None:
        missing = os.path.join(self.folder, "missing.txt")
        self.drive([ss.Task("a", open, args=[missing])])
        self.assertEqual(
            self.error_of("a"),
            {"name": "FileNotFoundError", "message": "No such file or directory: 'missing.txt'"},
        )

    def test_http_errors_keep_their_message(self) -> None:
        def fetch() -> None:
            raise urllib.error.HTTPError("http://host/path", 404, "Not Found", Message(), None)

        self.drive([ss.Task("a", fetch)])
        self.assertEqual(self.error_of("a")["message"], "HTTP Error 404: Not Found")

    def test_leaving_exceptions_fail_only_task(self) -> None:
        for number, kind in enumerate((SystemExit, KeyboardInterrupt, GeneratorExit)):

            def leave(kind: type[BaseException] = kind) -> None:
                raise kind("bye")

            self.assertEqual(self.drive([ss.Task("a", leave)], f"r{number}").status, "failed")

    def test_timeout_stops_function_and_retries(self) -> None:
        self.drive([ss.Task("a", self.wait_for_flag, timeout=0.05, retries=1)])
        self.assertEqual(self.error_of("a")["code"], "TASK_TIMEOUT")
        self.assertEqual(self.starts(), ["a", "a"])

    def test_timeout_stops_coroutine_and_retries(self) -> None:
        stopped: list[str] = []

        async def sleep() -> None:
            try:
                await asyncio.sleep(PATIENCE)
            except asyncio.CancelledError:
                stopped.append("stopped")
                raise

        self.drive([ss.Task("a", sleep, timeout=0.05, retries=1)])
        self.assertEqual(self.error_of("a")["code"], "TASK_TIMEOUT")
        self.assertEqual(stopped, ["stopped"] * 2)

    def test_timeout_stops_command_and_retries(self) -> None:
        self.drive([ss.Task("a", ["sleep", "60"], timeout=0.05, retries=1)])
        self.assertEqual(self.error_of("a")["code"], "TASK_TIMEOUT")
        self.assertEqual(self.starts(), ["a", "a"])

    def test_timeout_ends_whole_process_group(self) -> None:
        fifo = os.path.join(self.folder, "fifo")
        os.mkfifo(fifo)
        live = self.start([ss.Task("a", ["sh", "-c", f"sleep 60 > {fifo} & wait"], timeout=0.3)])
        with open(fifo, "rb") as pipe:
            self.assertEqual(live.end().status, "failed")
            self.assertTrue(select.select([pipe], [], [], PATIENCE)[0], "its child lives on")
            self.assertEqual(pipe.read(), b"")

    def test_command_ignoring_term_is_killed(self) -> None:
        command = ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"]
        with mock.patch.object(ss, "KILL_AFTER_SECONDS", 0.1):
            live = self.start([ss.Task("a", command)])
            live.wait("NodeOutput", "a")
            ss.cancel_run(self.db, "r")
            self.assertEqual(live.end().status, "cancelled")

    def test_function_ignoring_timeout_is_not_retried(self) -> None:
        with mock.patch.object(ss, "STOP_GRACE_SECONDS", 0.05):
            result = self.drive([ss.Task("a", self.stubborn(), timeout=0.05, retries=5)])
        self.assertEqual(result.status, "failed")
        self.assertEqual(self.error_of("a")["code"], "TASK_TIMEOUT")
        self.assertEqual(self.starts(), ["a"])

    def test_late_result_of_given_up_task_is_dropped(self) -> None:
        release, returned = threading.Event(), threading.Event()

        def late() -> str:
            release.wait(PATIENCE)
            returned.set()
            return "late"

        def then() -> None:
            release.set()
            returned.wait(PATIENCE)

        with mock.patch.object(ss, "STOP_GRACE_SECONDS", 0.05):
            self.drive(
                [
                    ss.Task("a", late, timeout=0.05, continue_on_fail=True),
                    ss.Task("b", then),
                    ss.Task("c", answer),
                ]
            )
        self.assertEqual(self.states(), {"a": "failed", "b": "finished", "c": "finished"})
        self.assertIsNone(self.output("a"))

    def test_output_that_is_not_json_fails(self) -> None:
        outputs: list[Any] = [object(), {1, 2}, float("nan"), b"bytes", "\ud800", {(1, 2): 3}]
        for number, value in enumerate(outputs):
            with self.subTest(value=repr(value)):
                self.drive([ss.Task("a", lambda value=value: value)], f"r{number}")
                failed = self.events("NodeFailed", run_id=f"r{number}")
                self.assertEqual(failed[0][4]["code"], "OUTPUT_NOT_JSON")

    def test_endless_nesting_is_not_json(self) -> None:
        ring: list[Any] = []
        ring.append(ring)
        self.drive([ss.Task("a", lambda: ring)])
        self.assertEqual(self.error_of("a")["code"], "OUTPUT_NOT_JSON")

    def test_output_over_a_mebibyte_fails(self) -> None:
        fits = ss.MAX_OUTPUT_BYTES - 2
        self.drive(
            [
                ss.Task("fits", lambda: "x" * fits),
                ss.Task("big", lambda: "x" * (fits + 1), continue_on_fail=True),
                ss.Task("wide", lambda: "ä" * (fits // 2 + 1)),
            ]
        )
        self.assertEqual(self.states(), {"fits": "finished", "big": "failed", "wide": "failed"})
        for node_id in ("big", "wide"):
            self.assertEqual(self.error_of(node_id)["code"], "OUTPUT_TOO_LARGE")

    def test_command_lines_become_events(self) -> None:
        self.drive([ss.Task("a", ["sh", "-c", r"echo one; echo two >&2; printf 'thr\377ee'"])])
        told = {(event[5], event[4]) for event in self.events("NodeOutput")}
        self.assertEqual(told, {("stdout", "one"), ("stderr", "two"), ("stdout", "thr\ufffdee")})

    def test_command_lines_come_while_it_runs(self) -> None:
        fifo = os.path.join(self.folder, "fifo")
        os.mkfifo(fifo)
        live = self.start([ss.Task("a", ["sh", "-c", f"echo begun; cat {fifo}"])])
        live.wait("NodeOutput", "a", text="begun")
        with open(fifo, "w") as pipe:
            pipe.write("more\n")
        live.end()
        self.assertEqual(self.output("a")["stdout"], "begun\nmore\n")

    def test_command_output_keeps_last_64_kib(self) -> None:
        script = "head -c 200000 /dev/zero | tr '\\0' x; echo end"
        self.drive([ss.Task("a", ["sh", "-c", script])])
        kept = self.output("a")["stdout"]
        self.assertEqual(len(kept), ss.COMMAND_TAIL_BYTES)
        self.assertTrue(kept.endswith("xxend\n"))
        told = "".join(event[4] for event in self.events("NodeOutput"))
        self.assertEqual(told, "x" * 200000 + "end")

    def test_command_that_exits_nonzero_fails(self) -> None:
        self.drive([ss.Task("a", ["sh", "-c", "echo why >&2; exit 3"])])
        self.assertEqual(
            self.error_of("a"),
            {
                "name": "TaskFailed",
                "message": "sh exited with code 3: why",
                "code": "COMMAND_FAILED",
            },
        )

    def test_missing_command_fails_its_task(self) -> None:
        self.drive([ss.Task("a", ["no-such-command-here"])])
        self.assertEqual(self.error_of("a")["name"], "FileNotFoundError")

    def test_command_knows_run_but_not_token(self) -> None:
        script = 'echo "$SMITHERS_RUN_ID $SMITHERS_NODE_ID $SMITHERS_ATTEMPT $SMITHERS_API_KEY."'
        with mock.patch.dict(os.environ, {"SMITHERS_API_KEY": "sk-secret"}):
            self.drive([ss.Task("a", ["sh", "-c", script])])
        self.assertEqual(self.output("a")["stdout"], "r a 0 .\n")

    def test_printing_too_much_fails_task(self) -> None:
        def chatter() -> None:
            for _ in range(1000):
                ss.current_task().log("x" * 100)

        with mock.patch.object(ss, "MAX_LOG_BYTES", 5000):
            result = self.drive(
                [
                    ss.Parallel(
                        ss.Task("function", chatter, continue_on_fail=True),
                        ss.Task("command", ["sh", "-c", "yes | head -n 9999"]),
                    )
                ]
            )
        self.assertEqual(result.status, "failed")
        for node_id in ("function", "command"):
            self.assertEqual(self.error_of(node_id)["code"], "OUTPUT_LIMIT")
            kept = [event[4] for event in self.events("NodeOutput") if event[1] == node_id]
            self.assertLessEqual(sum(map(len, kept)), 5000)

    def test_cancel_stops_every_kind_of_task(self) -> None:
        stopped: list[str] = []

        async def sleep() -> None:
            try:
                ss.current_task().log("up")
                await asyncio.sleep(PATIENCE)
            finally:
                stopped.append("coroutine")

        def wait() -> None:
            ss.current_task().log("up")
            self.wait_for_flag()
            stopped.append("function")

        live = self.start(
            [
                ss.Parallel(
                    ss.Task("command", ["sh", "-c", "echo up; exec sleep 60"]),
                    ss.Task("coroutine", sleep),
                    ss.Task("function", wait),
                ),
                ss.Task("never", answer),
            ]
        )
        for node_id in ("command", "coroutine", "function"):
            live.wait("NodeOutput", node_id)
        ss.cancel_run(self.db, "r")
        self.assertEqual(live.end(), ("r", "cancelled", None))
        self.assertEqual(sorted(stopped), ["coroutine", "function"])
        self.assertEqual(
            self.states(),
            {
                "command": "cancelled",
                "coroutine": "cancelled",
                "function": "cancelled",
                "never": "pending",
            },
        )
        self.assertEqual(
            sorted(self.events("NodeCancelled")),
            [
                ("NodeCancelled", node_id, 0, 0, "the run was cancelled")
                for node_id in ("command", "coroutine", "function")
            ],
        )
        self.assertEqual({a.state for a in self.db.list_attempts("r")}, {"cancelled"})

    def test_abort_event_cancels_run(self) -> None:
        abort = threading.Event()
        live = self.start([ss.Task("a", self.wait_for_flag)], abort=abort)
        live.wait("NodeStarted", "a")
        abort.set()
        self.assertEqual(live.end().status, "cancelled")

    def test_abort_before_start_runs_nothing(self) -> None:
        abort = threading.Event()
        abort.set()
        self.assertEqual(self.drive([ss.Task("a", answer)], abort=abort).status, "cancelled")
        self.assertEqual(self.starts(), [])

    def test_function_ignoring_cancel_is_abandoned(self) -> None:
        with mock.patch.object(ss, "STOP_GRACE_SECONDS", 0.05):
            live = self.start([ss.Task("a", self.stubborn())])
            live.wait("NodeStarted", "a")
            ss.cancel_run(self.db, "r")
            self.assertEqual(live.end().status, "cancelled")

    def test_cancel_ends_waiting_retry(self) -> None:
        live = self.start([ss.Task("a", fail, retries=1, retry_delay=600)])
        live.wait("NodeRetrying", "a")
        ss.cancel_run(self.db, "r")
        self.assertEqual(live.end().status, "cancelled")

    def test_ended_run_cannot_be_cancelled(self) -> None:
        self.drive([ss.Task("a", answer)])
        with self.assertRaises(ss.RunNotActive):
            ss.cancel_run(self.db, "r")
        with self.assertRaises(ss.RunNotFound):
            ss.cancel_run(self.db, "ghost")

    def test_many_tasks_finish_each_once(self) -> None:
        tasks = [ss.Task(f"n{i}", {"i": i}) for i in range(150)]
        self.drive([ss.Parallel(*tasks[:100]), *tasks[100:]], max_concurrency=16)
        self.assertEqual(len(self.starts()), 150)
        self.assertEqual(set(self.states().values()), {"finished"})


# ---------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------


class GateTest(DatabaseCase):
    def open(self, gate: Any = None, *more: Any, **options: Any) -> Live:
        """Start a run that waits at `gate`."""
        live = self.start([gate or ss.Approval("gate"), *more], **options)
        live.wait("NodeWaitingApproval", "gate")
        return live

    def gate(self) -> ss.Gate:
        return next(gate for gate in self.db.list_gates("r") if gate.node_id == "gate")

    def test_gate_is_requested_when_reached(self) -> None:
        release = threading.Event()
        live = self.start([ss.Task("a", lambda: release.wait(PATIENCE)), ss.Approval("gate")])
        live.wait("NodeStarted", "a")
        self.assertEqual(self.db.list_gates("r"), [])
        self.assertEqual(self.states()["gate"], "pending")
        with self.assertRaises(ss.ApprovalNotPending):
            self.decide("approved")
        release.set()
        live.wait("NodeWaitingApproval", "gate")
        self.decide("approved")
        self.assertEqual(live.end().status, "finished")

    def test_request_keeps_title_summary_metadata(self) -> None:
        live = self.open(ss.Approval("gate", title="Go?", summary="S", metadata={"a": [1]}))
        request = json.loads(self.gate().request_json or "")
        shown = {name: request[name] for name in ("title", "summary", "metadata")}
        self.assertEqual(shown, {"title": "Go?", "summary": "S", "metadata": {"a": [1]}})
        self.decide("approved")
        live.end()

    def test_decision_wakes_parked_run(self) -> None:
        live = self.open(None, ss.Task("after", lambda said: said, needs={"said": "gate"}))
        live.wait("RunStatusChanged", status="waiting-approval")
        self.decide("approved", note="Looks good", decided_by="alice")
        self.assertEqual(live.end().status, "finished")
        self.assertEqual(
            [event for event in self.events() if event[0].startswith(("Approval", "RunStatus"))],
            [
                ("RunStatusChanged", "running"),
                ("ApprovalRequested", "gate", 0),
                ("RunStatusChanged", "waiting-approval"),
                ("ApprovalGranted", "gate", 0, "Looks good", "alice"),
                ("RunStatusChanged", "running"),
                ("RunStatusChanged", "finished"),
            ],
        )
        said = {
            "approved": True,
            "note": "Looks good",
            "decidedBy": "alice",
            "decidedAtMs": self.gate().decided_at_ms,
        }
        self.assertEqual(self.output("after"), said)

    def test_request_time_is_kept_at_decision(self) -> None:
        live = self.open()
        requested = self.gate().requested_at_ms
        self.decide("approved")
        live.end()
        self.assertIsNotNone(requested)
        self.assertEqual(self.gate().requested_at_ms, requested)
        self.assertGreaterEqual(self.gate().decided_at_ms or 0, requested or 0)

    def denied(self, node: Any) -> ss.RunResult:
        live = self.open(node, ss.Task("after", answer))
        self.decide("denied", note="no", decided_by="bob")
        return live.end()

    def test_denied_gate_fails_by_default(self) -> None:
        self.assertEqual(self.denied(ss.Approval("gate")).status, "failed")
        self.assertEqual(self.states(), {"gate": "failed", "after": "pending"})
        self.assertEqual(
            self.error_of("gate"),
            {"name": "TaskFailed", "message": "denied by bob: no", "code": "APPROVAL_DENIED"},
        )

    def test_denied_gate_may_continue(self) -> None:
        self.assertEqual(self.denied(ss.Approval("gate", on_deny="continue")).status, "finished")
        self.assertEqual(self.states(), {"gate": "finished", "after": "finished"})
        self.assertIs(self.output("gate")["approved"], False)

    def test_denied_gate_may_be_skipped(self) -> None:
        self.assertEqual(self.denied(ss.Approval("gate", on_deny="skip")).status, "finished")
        self.assertEqual(self.states(), {"gate": "skipped", "after": "finished"})
        self.assertIs(self.output("gate")["approved"], False)

    def test_denied_task_never_runs(self) -> None:
        expected = {"fail": "failed", "continue": "skipped", "skip": "skipped"}
        for on_deny, state in expected.items():
            with self.subTest(on_deny=on_deny):
                task = ss.Task("gate", answer, needs_approval=True, on_deny=on_deny)
                live = self.start([task], on_deny)
                live.wait("NodeWaitingApproval", "gate")
                ss.decide(self.db, on_deny, "gate", ss.Decision("denied"))
                live.end()
                self.assertEqual(self.states(on_deny), {"gate": state})
                self.assertEqual(self.events("NodeStarted", run_id=on_deny), [])

    def test_denied_task_may_fail_and_continue(self) -> None:
        seen: list[Any] = []

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            seen.append(ctx.error("gate"))
            task = ss.Task("gate", answer, needs_approval=True, continue_on_fail=True)
            return ss.Workflow("w", task, ss.Task("after", answer))

        live = self.start(workflow)
        live.wait("NodeWaitingApproval", "gate")
        self.decide("denied")
        self.assertEqual(live.end().status, "finished")
        self.assertEqual(self.states(), {"gate": "failed", "after": "finished"})
        self.assertEqual(
            seen[-1], {"name": "TaskFailed", "message": "denied", "code": "APPROVAL_DENIED"}
        )

    def test_approved_task_runs_with_retries(self) -> None:
        def once() -> str:
            if ss.current_task().attempt == 0:
                raise ValueError
            return "ran"

        live = self.open(ss.Task("gate", once, needs_approval=True, retries=1, label="Run it?"))
        self.assertEqual(json.loads(self.gate().request_json or "")["title"], "Run it?")
        self.assertEqual(self.starts(), [])
        self.decide("approved")
        self.assertEqual(live.end().status, "finished")
        self.assertEqual(self.output("gate"), "ran")
        self.assertEqual(len(self.events("ApprovalRequested")), 1)

    def test_gate_timeout_may_fail(self) -> None:
        result = self.drive([ss.Approval("gate", timeout=0.02)])
        self.assertEqual(result.status, "failed")
        self.assertEqual(self.error_of("gate")["code"], "APPROVAL_TIMEOUT")
        self.assertEqual(self.gate().status, "cancelled")

    def test_gate_timeout_may_approve(self) -> None:
        self.drive([ss.Approval("gate", timeout=0.02, on_timeout="approve")])
        self.assertEqual(self.states(), {"gate": "finished"})
        self.assertIs(self.output("gate")["approved"], True)
        self.assertEqual(len(self.events("ApprovalGranted")), 1)

    def test_gate_timeout_may_deny(self) -> None:
        expected = {"fail": "failed", "continue": "finished", "skip": "skipped"}
        for on_deny, state in expected.items():
            with self.subTest(on_deny=on_deny):
                gate = ss.Approval("gate", timeout=0.02, on_timeout="deny", on_deny=on_deny)
                self.drive([gate], on_deny)
                self.assertEqual(self.states(on_deny), {"gate": state})
                self.assertEqual(len(self.events("ApprovalDenied", run_id=on_deny)), 1)

    def test_same_decision_again_changes_nothing(self) -> None:
        live = self.open(ss.Approval("gate", on_deny="continue"))
        self.decide("denied", note="first", decided_by="alice")
        self.decide("denied", note="second", decided_by="bob")
        live.end()
        self.decide("denied", note="third")
        self.assertEqual(
            self.events("ApprovalDenied"), [("ApprovalDenied", "gate", 0, "first", "alice")]
        )
        self.assertEqual((self.gate().note, self.gate().decided_by), ("first", "alice"))

    def test_opposite_decision_is_refused(self) -> None:
        live = self.open()
        self.decide("approved")
        with self.assertRaises(ss.ApprovalNotPending):
            self.decide("denied")
        live.end()
        with self.assertRaises(ss.ApprovalNotPending):
            self.decide("denied")
        self.assertEqual(self.gate().status, "approved")
        self.assertEqual(self.events("ApprovalDenied"), [])

    def test_one_of_many_decisions_wins(self) -> None:
        live = self.open(ss.Approval("gate", on_deny="continue"))
        adapters = [self.adapter() for _ in range(8)]
        together = threading.Barrier(8)

        def decide(number: int) -> str:
            verdict = ("approved", "denied")[number % 2]
            together.wait(PATIENCE)
            try:
                ss.decide(adapters[number], "r", "gate", ss.Decision(verdict))
            except ss.ApprovalNotPending:
                return "refused"
            return verdict

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            said = list(pool.map(decide, range(8)))
        live.end()
        self.assertEqual(said.count("refused"), 4)
        self.assertEqual(set(said) - {"refused"}, {self.gate().status})
        self.assertEqual(len(self.events("ApprovalGranted", "ApprovalDenied")), 1)

    def test_unknown_nodes_are_refused(self) -> None:
        live = self.open(None, ss.Task("after", answer))
        before = self.events()
        with self.assertRaises(ss.NodeNotFound):
            self.decide("approved", "ghost")
        with self.assertRaises(ss.NodeNotFound):
            self.decide("approved", iteration=1)
        with self.assertRaises(ss.RunNotFound):
            ss.decide(self.db, "ghost", "gate", ss.Decision("approved"))
        with self.assertRaises(ss.ApprovalNotPending):
            self.decide("approved", "after")
        self.assertEqual(self.events(), before)
        self.decide("approved", iteration=0)
        self.assertEqual(live.end().status, "finished")

    def test_each_iteration_has_its_gate(self) -> None:
        loop = ss.Loop(ss.Approval("gate"), id="l", until=False, max_iterations=2)
        live = self.start([loop])
        for iteration in range(2):
            live.wait("NodeWaitingApproval", "gate", iteration=iteration)
            self.decide("approved", iteration=iteration)
        self.assertEqual(live.end().status, "finished")
        self.assertEqual(
            [(g.iteration, g.status) for g in self.db.list_gates("r")],
            [(0, "approved"), (1, "approved")],
        )

    def test_cancel_closes_open_gate(self) -> None:
        live = self.open()
        ss.cancel_run(self.adapter(), "r")
        self.assertEqual(live.end().status, "cancelled")
        self.assertEqual(self.gate().status, "cancelled")
        self.assertEqual(
            self.events("NodeCancelled"), [("NodeCancelled", "gate", 0, "the run was cancelled")]
        )
        with self.assertRaises(ss.ApprovalNotPending):
            self.decide("approved")

    def test_failure_closes_open_gates(self) -> None:
        release = threading.Event()

        def fail_later() -> None:
            release.wait(PATIENCE)
            raise ValueError

        live = self.start([ss.Parallel(ss.Approval("gate"), ss.Task("a", fail_later))])
        live.wait("NodeWaitingApproval", "gate")
        release.set()
        self.assertEqual(live.end().status, "failed")
        self.assertEqual(self.states(), {"gate": "cancelled", "a": "failed"})
        self.assertEqual(self.gate().status, "cancelled")

    def test_open_gate_does_not_starve_retries(self) -> None:
        def once() -> None:
            if ss.current_task().attempt == 0:
                raise ValueError

        live = self.start(
            [ss.Parallel(ss.Approval("gate"), ss.Task("a", once, retries=1, retry_delay=0.05))]
        )
        live.wait("NodeFinished", "a")
        live.wait("RunStatusChanged", status="waiting-approval")
        self.decide("approved")
        self.assertEqual(live.end().status, "finished")

    def test_run_counts_as_running_beside_gate(self) -> None:
        release = threading.Event()
        live = self.start(
            [ss.Parallel(ss.Approval("gate"), ss.Task("a", lambda: release.wait(PATIENCE)))]
        )
        live.wait("NodeWaitingApproval", "gate")
        self.assertEqual(self.status(), "running")
        release.set()
        live.wait("RunStatusChanged", status="waiting-approval")
        self.assertEqual(self.status(), "waiting-approval")
        self.decide("approved")
        live.end()

    def test_unparked_run_returns_at_gate(self) -> None:
        elements = [ss.Approval("gate"), ss.Task("a", answer)]
        self.assertEqual(self.drive(elements, park=False).status, "waiting-approval")
        self.decide("approved")
        self.assertEqual(self.drive(elements, park=False, resume=True).status, "finished")
        self.assertEqual(self.starts(), ["a"])


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

run_id = "r"
db = SmithersDb(path)
resume = db.get_run(run_id) is not None
result = run_workflow(workflow, adapter=db, run_id=run_id, resume=resume, on_event=see)
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
    print(event.type, event.payload.get("nodeId", ""), flush=True)

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

def workflow(ctx):
    return Workflow("fill", *[Task(f"n{i}", fill) for i in range(40)])
"""


class DurabilityTest(DatabaseCase):
    def crash(self, name: str, kill_at: int) -> tuple[int, str]:
        """Live one life of the crash run in database `name`; return its exit code and output."""
        paths = [os.path.join(self.folder, name + end) for end in (".db", ".effects")]
        done = subprocess.run(
            [sys.executable, "-c", CRASH_SCRIPT, *paths, str(kill_at)],
            env=engine_environment(),
            capture_output=True,
            timeout=3 * PATIENCE,
        )
        if done.returncode not in (0, -signal.SIGKILL):
            raise AssertionError(done.stderr.decode())
        return done.returncode, done.stdout.decode()

    def live_thrice(self, kill_at: int) -> str:
        """Kill a run at an event, kill its resume too, and let the third life go to the end."""
        name = f"kill-{kill_at}"
        for point in (kill_at, 1 + kill_at % 3):
            self.crash(name, point)
            with contextlib.closing(sqlite3.connect(os.path.join(self.folder, name + ".db"))) as db:
                check = db.execute("pragma integrity_check").fetchone()[0]
                if check != "ok":
                    raise AssertionError(check)
        return self.crash(name, 0)[1]

    def test_killed_run_resumes_at_every_point(self) -> None:
        self.crash("whole", 0)
        with contextlib.closing(ss.SmithersDb(os.path.join(self.folder, "whole.db"))) as db:
            whole = len(db.list_events("r"))
        points = sorted({1 + whole * number // 14 for number in range(14)})
        self.assertGreaterEqual(len(points), 8)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            ends = dict(zip(points, pool.map(self.live_thrice, points)))
        for point in points:
            with self.subTest(kill_at=point):
                self.assertEqual(ends[point].split()[0], "finished")
                self.check_crashed(f"kill-{point}")

    def check_crashed(self, name: str) -> None:
        with contextlib.closing(ss.SmithersDb(os.path.join(self.folder, name + ".db"))) as db:
            run = db.get_run("r")
            assert run is not None
            self.db, mine = db, self.db
            try:
                self.check_log(run)
                self.check_rows(run)
                states = {(n.node_id, n.iteration): n.state for n in db.list_nodes("r")}
                attempts = db.list_attempts("r")
            finally:
                self.db = mine
        done = [("first", 0), ("flaky", 0), ("gate", 0), ("last", 0), ("mend", 0)]
        done += [("turn", 0), ("turn", 1)]
        self.assertEqual(states, {**dict.fromkeys(done, "finished"), ("never", 0): "failed"})
        with open(os.path.join(self.folder, name + ".effects")) as file:
            effects = [tuple(line.split()) for line in file]
        self.assertEqual(len(effects), len(set(effects)), "an attempt ran twice")
        for attempt in attempts:
            if attempt.state == "finished":
                key = (attempt.node_id, attempt.iteration)
                later = [e for e in effects if e[0] == key[0] and int(e[1]) == key[1]]
                self.assertEqual(int(later[-1][2]), attempt.attempt)

    def hold(self, what: str, until: str) -> None:
        """Run HOLD_SCRIPT in a process of its own and kill it when it has told of `until`."""
        with subprocess.Popen(
            [sys.executable, "-c", HOLD_SCRIPT, self.path, what],
            env=engine_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as child:
            assert child.stdout is not None
            try:
                told = any(line.strip() == until for line in child.stdout)
            finally:
                child.kill()
        self.assertTrue(told)
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            self.assertEqual(db.execute("pragma integrity_check").fetchone()[0], "ok")

    def test_interrupted_attempt_becomes_cancelled(self) -> None:
        self.hold("task", "NodeStarted hold")
        tree = [ss.Task("a", fail), ss.Task("hold", answer)]
        self.assertEqual(self.drive(tree, resume=True).status, "finished")
        told = [(a.node_id, a.attempt, a.state) for a in self.db.list_attempts("r")]
        self.assertEqual(
            told, [("a", 0, "finished"), ("hold", 0, "cancelled"), ("hold", 1, "finished")]
        )
        self.assertEqual(
            self.events("NodeCancelled"),
            [("NodeCancelled", "hold", 0, 0, "the run was interrupted")],
        )

    def test_run_killed_while_draining_resumes(self) -> None:
        self.hold("drain", "NodeFailed bad")
        tree = [ss.Parallel(ss.Task("bad", answer), ss.Task("hold", answer))]
        self.assertEqual(self.drive(tree, resume=True).status, "failed")
        self.assertEqual(self.drive(tree, retry=True).status, "finished")
        self.assertEqual(self.states(), {"bad": "finished", "hold": "finished"})

    def test_run_cancelled_while_draining_resumes(self) -> None:
        def wait() -> None:
            ss.current_task().cancelled.wait(PATIENCE)

        live = self.start([ss.Parallel(ss.Task("bad", fail), ss.Task("hold", wait))])
        live.wait("NodeFailed", "bad")
        ss.cancel_run(self.db, "r")
        self.assertEqual(live.end().status, "cancelled")
        tree = [ss.Parallel(ss.Task("bad", answer), ss.Task("hold", answer))]
        self.assertEqual(self.drive(tree, retry=True).status, "finished")

    def test_failed_run_cancelled_at_resume_resumes(self) -> None:
        abort = threading.Event()
        abort.set()
        self.assertEqual(self.drive([ss.Task("a", fail)]).status, "failed")
        resumed = self.drive([ss.Task("a", answer)], retry=True, abort=abort)
        self.assertEqual(resumed.status, "cancelled")
        self.assertEqual(self.drive([ss.Task("a", answer)], retry=True).status, "finished")

    def test_gate_stays_open_over_crash(self) -> None:
        self.hold("gate", "NodeWaitingApproval gate")
        requested = self.db.list_gates("r")[0].requested_at_ms
        live = self.start([ss.Task("a", fail), ss.Approval("gate")], resume=True)
        live.wait("RunStatusChanged", status="running")
        self.decide("approved")
        self.assertEqual(live.end().status, "finished")
        self.assertEqual(self.db.list_gates("r")[0].requested_at_ms, requested)
        self.assertEqual(len(self.events("ApprovalRequested")), 1)

    def test_decision_without_engine_counts_at_resume(self) -> None:
        self.hold("gate", "NodeWaitingApproval gate")
        self.decide("approved")
        tree = [ss.Task("a", fail), ss.Approval("gate")]
        self.assertEqual(self.drive(tree, resume=True).status, "finished")
        self.assertEqual(len(self.events("ApprovalGranted")), 1)

    def test_cancel_with_dead_owner_ends_run(self) -> None:
        self.hold("task", "NodeStarted hold")
        ss.cancel_run(self.db, "r")
        self.assertEqual(self.status(), "cancelled")
        self.assertEqual(self.states(), {"a": "finished", "hold": "cancelled"})
        tree = [ss.Task("a", fail), ss.Task("hold", answer)]
        self.assertEqual(self.drive(tree, retry=True).status, "finished")

    def test_cancelled_run_resumes(self) -> None:
        began: list[str] = []

        def hold() -> None:
            began.append("hold")
            if len(began) == 1:
                ss.current_task().cancelled.wait(PATIENCE)

        tree = [ss.Task("a", answer), ss.Task("hold", hold), ss.Approval("gate", skip_if=True)]
        live = self.start(tree)
        live.wait("NodeStarted", "hold")
        ss.cancel_run(self.db, "r")
        self.assertEqual(live.end().status, "cancelled")
        self.assertEqual(self.drive(tree, retry=True).status, "finished")
        self.assertEqual(self.starts(), ["a", "hold", "hold"])
        run = self.db.get_run("r")
        assert run is not None
        self.assertIsNone(run.cancel_requested_at_ms)

    def test_cancelled_gate_is_asked_again(self) -> None:
        live = self.start([ss.Approval("gate")])
        live.wait("NodeWaitingApproval", "gate")
        ss.cancel_run(self.db, "r")
        live.end()
        live = self.start([ss.Approval("gate")], retry=True)
        live.wait("NodeWaitingApproval", "gate")
        self.decide("approved")
        self.assertEqual(live.end().status, "finished")

    def test_failed_nodes_get_fresh_try(self) -> None:
        healthy: list[bool] = []

        def flaky() -> None:
            if not healthy:
                raise ValueError

        tree = [ss.Task("a", answer), ss.Task("b", flaky, retries=1), ss.Task("c", answer)]
        self.assertEqual(self.drive(tree).status, "failed")
        healthy.append(True)
        self.assertEqual(self.drive(tree, retry=True), ("r", "finished", None))
        self.assertEqual(self.starts(), ["a", "b", "b", "b", "c"])
        run = self.db.get_run("r")
        assert run is not None
        self.assertIsNone(run.error_json)

    def test_denied_gate_of_failed_run_asks_again(self) -> None:
        live = self.start([ss.Approval("gate")])
        live.wait("NodeWaitingApproval", "gate")
        self.decide("denied")
        self.assertEqual(live.end().status, "failed")
        live = self.start([ss.Approval("gate")], retry=True)
        live.wait("NodeWaitingApproval", "gate")
        self.decide("approved")
        self.assertEqual(live.end().status, "finished")

    def test_finished_run_is_left_alone(self) -> None:
        self.drive([ss.Task("a", answer)])
        before = self.events()
        self.assertEqual(self.drive([ss.Task("a", fail)], resume=True).status, "finished")
        self.assertEqual(self.events(), before)

    def test_resume_begins_run_that_is_not_there(self) -> None:
        self.assertEqual(self.drive([ss.Task("a", answer)], resume=True).status, "finished")

    def test_resume_keeps_input_of_beginning(self) -> None:
        seen: list[Any] = []

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            seen.append(ctx.input)
            return ss.Workflow("w", ss.Task("a", fail))

        self.drive(workflow, input={"x": 1})
        self.drive(workflow, retry=True, input={"x": 2})
        self.assertEqual(seen, [{"x": 1}] * 3)

    def stop_in(self, task_id: str, workflow: Callable[[ss.Ctx], ss.Workflow]) -> None:
        """Run a workflow and cancel it in this task."""
        live = self.start(workflow)
        live.wait("NodeStarted", task_id)
        ss.cancel_run(self.db, "r")
        self.assertEqual(live.end().status, "cancelled")

    def wait_in_first_attempt(self) -> None:
        if ss.current_task().attempt == 0:
            ss.current_task().cancelled.wait(PATIENCE)

    def test_resume_still_knows_old_errors(self) -> None:
        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            mend = ss.Task("mend", self.wait_in_first_attempt) if ctx.error("a") else None
            return ss.Workflow("w", ss.Task("a", fail, continue_on_fail=True), mend)

        self.stop_in("mend", workflow)
        self.assertEqual(self.drive(workflow, retry=True).status, "finished")
        self.assertEqual(self.states(), {"a": "failed", "mend": "finished"})
        self.assertEqual(self.starts(), ["a", "mend", "mend"])

    def test_resume_still_knows_nested_iteration(self) -> None:
        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            turn = ctx.iteration("inner")
            hold = ss.Task("hold", self.wait_in_first_attempt) if turn == 1 else None
            inner = ss.Loop(ss.Task("t", answer), hold, id="inner", until=False, max_iterations=2)
            return ss.Workflow("w", ss.Loop(inner, id="outer", until=False, max_iterations=1))

        self.stop_in("hold@@outer=0", workflow)
        self.assertEqual(self.drive(workflow, retry=True).status, "finished")
        self.assertEqual(self.states(), {"t@@outer=0": "finished", "hold@@outer=0": "finished"})

    def test_loop_goes_on_at_its_iteration(self) -> None:
        def turn() -> None:
            task = ss.current_task()
            if (task.iteration, task.attempt) == (1, 0):
                task.cancelled.wait(PATIENCE)

        loop = ss.Loop(ss.Task("t", turn), id="l", until=False, max_iterations=3)
        live = self.start([loop])
        live.wait("NodeStarted", "t", iteration=1)
        ss.cancel_run(self.db, "r")
        live.end()
        self.assertEqual(self.db.list_loops("r"), {"l": (1, False)})
        self.assertEqual(self.drive([loop], retry=True).status, "finished")
        self.assertEqual(
            [event[2:] for event in self.events("NodeStarted")], [(0, 0), (1, 0), (1, 1), (2, 0)]
        )

    def test_retries_are_counted_over_resume(self) -> None:
        def hold() -> None:
            if ss.current_task().attempt == 1:
                ss.current_task().cancelled.wait(PATIENCE)
            raise ValueError

        tree = [ss.Task("a", hold, retries=1)]
        live = self.start(tree)
        live.wait("NodeStarted", "a", attempt=1)
        ss.cancel_run(self.db, "r")
        live.end()
        self.assertEqual(self.drive(tree, retry=True).status, "failed")
        states = [attempt.state for attempt in self.db.list_attempts("r")]
        self.assertEqual(states, ["failed", "cancelled", "failed"])

    def test_second_engine_is_refused(self) -> None:
        live = self.start([ss.Approval("gate")])
        live.wait("NodeWaitingApproval", "gate")
        before = self.events()
        with self.assertRaises(ss.RunOwned):
            self.drive([ss.Task("a", answer)], adapter=self.adapter(), resume=True)
        self.assertEqual(self.events(), before)
        self.decide("approved")
        live.end()

    def test_one_of_many_engines_owns_run(self) -> None:
        self.assertEqual(self.drive([ss.Task("a", fail)]).status, "failed")
        adapters = [self.adapter() for _ in range(8)]
        together = threading.Barrier(8)
        release = threading.Event()

        def resume(adapter: ss.SmithersDb) -> str:
            task = ss.Task("a", lambda: release.wait(PATIENCE))
            together.wait(PATIENCE)
            try:
                return self.drive([task], adapter=adapter, retry=True).status
            except ss.RunOwned:
                refused.release()
                return "refused"

        refused = threading.Semaphore(0)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(resume, adapter) for adapter in adapters]
            for _ in range(7):
                self.assertTrue(refused.acquire(timeout=PATIENCE))
            release.set()
        ends = sorted(future.result() for future in futures)
        self.assertEqual(ends, ["finished"] + ["refused"] * 7)

    def test_forced_takeover_fences_first_engine(self) -> None:
        ran: list[str] = []

        def first() -> None:
            ran.append("first")
            ss.current_task().cancelled.wait(PATIENCE)

        def second() -> str:
            ran.append("second")
            return "second"

        old = self.start([ss.Task("a", first)])
        old.wait("NodeStarted", "a")
        new = self.start([ss.Task("a", second)], adapter=self.adapter(), resume=True, force=True)
        self.assertEqual(new.end().status, "finished")
        with self.assertRaises(ss.OwnerLost):
            old.end()
        self.assertEqual(ran, ["first", "second"])
        self.assertEqual(self.output("a"), "second")
        self.assertEqual(len(self.events("RunFinished")), 1)
        states = [attempt.state for attempt in self.db.list_attempts("r")]
        self.assertEqual(states, ["cancelled", "finished"])

    def test_cancel_from_other_adapter_stops_run(self) -> None:
        live = self.start([ss.Task("a", lambda: ss.current_task().cancelled.wait(PATIENCE))])
        live.wait("NodeStarted", "a")
        ss.cancel_run(self.adapter(), "r")
        self.assertEqual(live.end().status, "cancelled")

    def test_run_waits_for_write_lock(self) -> None:
        release = threading.Event()
        live = self.start([ss.Task("a", lambda: release.wait(PATIENCE)), ss.Task("b", answer)])
        live.wait("NodeStarted", "a")
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("begin immediate")
            release.set()
            self.assertTrue(live.is_running(0.5))
            self.assertEqual(self.states(), {"a": "in-progress", "b": "pending"})
            other.execute("rollback")
        self.assertEqual(live.end().status, "finished")

    def test_full_disk_stops_engine_with_one_line(self) -> None:
        import resource

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

        file = os.path.join(self.folder, "fill.py")
        with open(file, "w") as source:
            source.write(FILL_WORKFLOW)
        command = [sys.executable, "-m", "smithers_serve", "up", file, "--run-id", "r"]
        command += ["--db", self.path]
        self.db.close()
        done = subprocess.run(
            command,
            env=engine_environment(),
            capture_output=True,
            text=True,
            preexec_fn=limit,
            timeout=PATIENCE,
        )
        self.db = self.adapter()
        self.assertEqual(done.returncode, 1, done.stderr)
        stopped = [line for line in done.stderr.splitlines() if "n0" not in line]
        self.assertIn("[smithers] Engine stopped: cannot write the database:", stopped[-1])
        self.assertNotIn("Traceback", done.stderr)
        finished = [event[1] for event in self.events("NodeFinished")]
        self.assertLess(len(finished), 40)
        done = subprocess.run(
            [*command, "--resume"],
            env=engine_environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(set(self.states().values()), {"finished"})
        self.assertEqual(len(self.events("NodeFinished")), 40)

    def test_file_that_is_no_database_is_refused(self) -> None:
        path = os.path.join(self.folder, "notes.txt")
        text = "these are my notes\n" * 100
        with open(path, "w") as file:
            file.write(text)
        with self.assertRaises(ss.StorageError) as caught:
            ss.SmithersDb(path)
        self.assertIn("notes.txt", str(caught.exception))
        with open(path) as file:
            self.assertEqual(file.read(), text)
        for wrong in (self.folder, os.path.join(self.folder, "no", "such.db")):
            with self.assertRaises(ss.StorageError):
                ss.SmithersDb(wrong)

    def test_new_files_are_private(self) -> None:
        self.drive([ss.Task("a", answer)])
        for name in os.listdir(self.folder):
            mode = stat.S_IMODE(os.stat(os.path.join(self.folder, name)).st_mode)
            self.assertEqual(oct(mode), oct(0o600), name)

    def test_columns_are_added_and_foreign_kept(self) -> None:
        path = os.path.join(self.folder, "old.db")
        with contextlib.closing(sqlite3.connect(path)) as old:
            old.executescript(
                """
                create table _smithers_runs (run_id text primary key, status text not null,
                  workflow_name text not null, created_at_ms integer not null, theirs text);
                insert into _smithers_runs values ('old', 'finished', 'w', 5, 'kept');
                create table _smithers_nodes (run_id text, node_id text, iteration integer,
                  state text, extra text, primary key (run_id, node_id, iteration));
                insert into _smithers_nodes values ('old', 'a', 0, 'finished', 'kept');
                create table foreign_table (x);
                """
            )
        with contextlib.closing(ss.SmithersDb(path)) as db:
            run, summary = db.get_run("old"), db.get_summary("old")
            assert run is not None
            self.assertEqual((run.status, summary), ("finished", {"finished": 1}))
            done = ss.run_workflow(ss.Workflow("w", ss.Task("a", answer)), adapter=db, run_id="new")
            self.assertEqual(done.status, "finished")
        with contextlib.closing(sqlite3.connect(path)) as old:
            kept = old.execute("select theirs from _smithers_runs where run_id = 'old'").fetchone()
            self.assertEqual(kept, ("kept",))
            kept = old.execute("select extra from _smithers_nodes where run_id = 'old'").fetchone()
            self.assertEqual(kept, ("kept",))
            self.assertEqual(old.execute("select count(*) from foreign_table").fetchone(), (0,))

    def test_two_runs_share_one_file(self) -> None:
        release = threading.Event()
        task = ss.Task("a", lambda: release.wait(PATIENCE))
        lives = [
            self.start([task], run_id, adapter)
            for run_id, adapter in (("one", self.db), ("two", self.db), ("three", self.adapter()))
        ]
        for live in lives:
            live.wait("NodeStarted", "a")
        release.set()
        self.assertEqual([live.end().status for live in lives], ["finished"] * 3)

    # ---------------------------------------------------------------------------
    # Executors
    # ---------------------------------------------------------------------------

    def test_without_shared_memory_the_file_works_too(self) -> None:
        path = os.path.join(self.folder, "network.db")
        os.mkdir(path + "-shm")  # sqlite cannot make its shared memory here
        with contextlib.closing(ss.SmithersDb(path)) as db:
            tree = ss.Workflow("w", ss.Task("a", answer))
            self.assertEqual(ss.run_workflow(tree, adapter=db, run_id="run").status, "finished")


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")
        self.lock = threading.Lock()


def remote_double(value: int, by: int = 2) -> dict[str, Any]:
    task = ss.current_task()
    task.log(f"doubling {value}")
    return {"value": value * by, "pid": os.getpid(), "node": task.node_id, "try": task.attempt}


def remote_keep(value: Any) -> Any:
    return value


async def remote_coroutine() -> str:
    await asyncio.sleep(0)
    return ss.current_task().node_id


def remote_fail() -> None:
    raise Unpicklable("no", "luck")


def remote_die() -> None:
    os._exit(7)


class ExecutorTest(DatabaseCase):
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
        names: list[str] = []

        def where() -> None:
            names.append(threading.current_thread().name)
            ss.current_task().log("here")

        self.drive([ss.Task("a", where)], executor=self.threads())
        self.assertIn("ThreadPoolExecutor", names[0])
        self.assertEqual(self.events("NodeOutput"), [("NodeOutput", "a", 0, 0, "here", "stdout")])

    def test_process_pool_runs_tasks_elsewhere(self) -> None:
        self.drive(
            [
                ss.Task("a", remote_double, args=[4], kwargs={"by": 3}),
                ss.Task("b", remote_coroutine),
                ss.Task("c", ["sh", "-c", "echo local"]),
                ss.Task("d", {"static": True}),
            ],
            executor=self.processes,
        )
        output = self.output("a")
        self.assertNotEqual(output.pop("pid"), os.getpid())
        self.assertEqual(output, {"value": 12, "node": "a", "try": 0})
        self.assertEqual(self.output("b"), "b")
        self.assertEqual(self.output("c")["stdout"], "local\n")
        self.assertEqual(
            self.events("NodeOutput")[0], ("NodeOutput", "a", 0, 0, "doubling 4", "stdout")
        )

    def test_needs_travel_to_process_pool(self) -> None:
        self.drive(
            [
                ss.Task("b", remote_double, kwargs={"value": 4}),
                ss.Task("c", remote_keep, needs={"value": "b"}),
            ],
            executor=self.processes,
        )
        self.assertEqual(self.output("c")["value"], 8)

    def test_unpicklable_exception_comes_back_as_text(self) -> None:
        self.drive([ss.Task("a", remote_fail, retries=1)], executor=self.processes)
        self.assertEqual(self.error_of("a"), {"name": "Unpicklable", "message": "no luck"})
        self.assertEqual(self.starts(), ["a", "a"])

    def test_unpicklable_function_fails_its_task(self) -> None:
        lock = threading.Lock()
        task = ss.Task("a", remote_keep, args=[lock], continue_on_fail=True)
        tree = [task, ss.Task("b", remote_double, args=[1])]
        self.assertEqual(self.drive(tree, executor=self.processes).status, "finished")
        self.assertEqual(self.error_of("a")["code"], "EXECUTOR_FAILED")

    def test_worker_that_dies_fails_attempt(self) -> None:
        pool = self.make_processes()
        self.addCleanup(pool.shutdown)
        tree = [ss.Task("a", remote_die, continue_on_fail=True), ss.Task("b", answer)]
        result = self.drive(tree, executor=pool)
        self.assertEqual(result.status, "failed")
        for node_id in ("a", "b"):
            self.assertEqual(self.error_of(node_id)["code"], "WORKER_CRASHED")
            self.assertIn("BrokenProcessPool", self.error_of(node_id)["message"])

    def test_closed_executor_fails_task_with_reason(self) -> None:
        pool = self.threads()
        pool.shutdown()
        self.assertEqual(self.drive([ss.Task("a", answer)], executor=pool).status, "failed")
        self.assertIn("shutdown", self.error_of("a")["message"])

    def test_cancel_takes_back_what_waits_in_executor(self) -> None:
        ran: list[str] = []

        def hold() -> None:
            ran.append("hold")
            ss.current_task().cancelled.wait(PATIENCE)

        tasks = [ss.Task("a", hold), ss.Task("b", hold)]
        live = self.start([ss.Parallel(*tasks)], executor=self.threads(1))
        live.wait("NodeStarted", "b")
        ss.cancel_run(self.db, "r")
        self.assertEqual(live.end().status, "cancelled")
        self.assertLessEqual(len(ran), 1)

    def test_late_result_of_executor_is_dropped(self) -> None:
        begun, release = threading.Event(), threading.Event()

        def late() -> str:
            begun.set()
            release.wait(PATIENCE)
            return "late"

        pool = self.threads()
        with mock.patch.object(ss, "STOP_GRACE_SECONDS", 0.05):
            live = self.start([ss.Task("a", late)], executor=pool)
            self.assertTrue(begun.wait(PATIENCE))
            ss.cancel_run(self.db, "r")
            self.assertEqual(live.end().status, "cancelled")
        before = self.events()
        release.set()
        pool.shutdown()
        self.assertEqual(self.events(), before)
        self.assertIsNone(self.output("a"))


# ---------------------------------------------------------------------------
# Helpers: a server, a client, a command
# ---------------------------------------------------------------------------


def release(ctx: ss.Ctx) -> ss.Workflow:
    """A task, a gate and a task: the run that most tests look at."""
    return ss.Workflow(
        "release",
        ss.Task("build", {"artifact": "app-1.0"}),
        ss.Approval("deploy", title="Deploy?"),
        ss.Task("announce", {"sent": True}),
    )


def wait_until(db: ss.SmithersDb, holds: Callable[[], bool]) -> None:
    """Return once `holds`, looked at after every commit of `db`."""
    committed = threading.Event()

    def notice(tx: ss.Tx) -> None:
        committed.set()

    db.subscribe(notice)
    try:
        while not holds():
            if not committed.wait(PATIENCE):
                raise AssertionError("nothing was committed any more")
            committed.clear()
    finally:
        db.unsubscribe(notice)


def eventually(holds: Callable[[], bool]) -> None:
    """Return once `holds`: for what only another thread or process can bring about."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError("it did not come to hold")
        pause.wait(0.01)


def rows(path: str) -> dict[str, list[Any]]:
    """Return everything in a database but heartbeats."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        names = [r[0] for r in db.execute("select name from sqlite_master where type = 'table'")]
        found = {name: [dict(r) for r in db.execute(f"select * from {name}")] for name in names}
    for run in found["_smithers_runs"]:
        del run["heartbeat_at_ms"]
    return found


class RunServer:
    """A real server on a free port for one run; `start_run` drives the run in a thread."""

    def __init__(self, folder: str, run_id: str, token: str | None, **options: Any) -> None:
        self.path = os.path.join(folder, "test.db")
        self.run_id = run_id
        self.db = ss.SmithersDb(self.path)
        self.abort = threading.Event()
        metrics = options.pop("metrics", True)
        self.app = ss.create_serve_app(
            adapter=self.db, run_id=run_id, abort=self.abort, auth_token=token, metrics=metrics
        )
        host = options.pop("host", "127.0.0.1")
        self.server = ss.make_server(self.app, host, 0, **options)
        self.port = self.server.server_port
        self.is_stopped = False
        self._runs: list[threading.Thread] = []
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def run_to_gate(self, workflow: Any = release) -> None:
        """Run until only a gate is left, without an engine that goes on."""
        ss.run_workflow(workflow, adapter=self.db, run_id=self.run_id, park=False)

    def start_run(self, workflow: Any = release, **options: Any) -> None:
        def drive() -> None:
            ss.run_workflow(
                workflow, adapter=self.db, run_id=self.run_id, abort=self.abort, **options
            )

        thread = threading.Thread(target=drive, daemon=True)
        self._runs.append(thread)
        thread.start()

    def wait_for(self, *statuses: str) -> None:
        def holds() -> bool:
            run = self.db.get_run(self.run_id)
            return run is not None and run.status in statuses

        wait_until(self.db, holds)

    def join(self) -> None:
        for thread in self._runs:
            thread.join(PATIENCE)

    def stop(self) -> None:
        if not self.is_stopped:
            self.is_stopped = True
            self.server.stop()

    def close(self) -> None:
        self.abort.set()
        self.join()
        self.stop()
        self._thread.join(PATIENCE)
        self.app.close()
        self.db.close()

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        return ask_server(self.port, method, path, body, headers)

    def events(self, after_seq: int = -1) -> list[ss.Event]:
        return self.db.list_events(self.run_id, after_seq)

    def streams(self) -> str:
        """Return the gauge of open streams, asked for without a connection."""
        headers = {"Host": "localhost", **bearer("tok")}
        text = self.app.request("GET", "/metrics", headers=headers).body.decode()
        found = re.search(r"^smithers_event_streams_active (.*)$", text, re.MULTILINE)
        assert found is not None
        return found[1]


@contextlib.contextmanager
def serving(run_id: str = "run-1", token: str | None = None, **options: Any) -> Iterator[RunServer]:
    """Start a real server on a free port, with a database of its own, and stop it."""
    with tempfile.TemporaryDirectory() as folder:
        served = RunServer(folder, run_id, token, **options)
        try:
            yield served
        finally:
            served.close()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def ask_server(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    context: ssl.SSLContext | None = None,
) -> tuple[int, dict[str, str], Any]:
    """Return (status, headers, JSON or text) of one request; `body` is bytes, or JSON to send."""
    client = (
        http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        if context is None
        else http.client.HTTPSConnection("127.0.0.1", port, timeout=PATIENCE, context=context)
    )
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        client.request(method, path, data, headers or {})
        response = client.getresponse()
        payload = response.read()
    finally:
        client.close()
    fields = {name.lower(): value for name, value in response.getheaders()}
    is_json = fields.get("content-type") == "application/json" and payload
    return response.status, fields, json.loads(payload) if is_json else payload.decode()


def send_raw(port: int, pieces: Seq[bytes], end: bool = True) -> bytes:
    """Send bytes piece by piece and return all that comes back; `end` closes our side at last."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", port), PATIENCE)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = []
        with contextlib.suppress(OSError):  # refused and closed before all was sent
            for piece in pieces:
                sock.sendall(piece)
            if end:
                sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while True:
                data = sock.recv(65536)
                if not data:
                    break
                received.append(data)
    return b"".join(received)


def split_answers(raw: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Return (status, headers, body) of each answer in raw bytes."""
    answers = []
    while raw:
        head, separator, raw = raw.partition(b"\r\n\r\n")
        assert separator, f"no end of head in {head!r}"
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines)
        length = int(fields.get("content-length", "0"))
        answers.append((int(first.split(" ")[1]), fields, raw[:length]))
        raw = raw[length:]
    return answers


def statuses_of(raw: bytes) -> list[int]:
    return [status for status, _, _ in split_answers(raw)]


class EventReader:
    """Reads an event stream from a socket, block by block, and checks its framing on the way."""

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
        self.socket.connect(("127.0.0.1", port))
        if context is not None:
            self.socket = context.wrap_socket(self.socket)
        fields = {"Host": "localhost", **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.socket.sendall(f"GET {path} HTTP/{version}\r\n{lines}\r\n".encode("ascii"))
        self._file = self.socket.makefile("rb")
        self.status = int(self._file.readline().split(b" ")[1])
        self.headers = {}
        for line in iter(self._file.readline, b"\r\n"):
            name, _, value = line.decode("ascii").rstrip("\r\n").partition(": ")
            self.headers[name.lower()] = value
        self._is_chunked = self.headers.get("transfer-encoding") == "chunked"
        self._text = b""
        self.has_ended = False  # by the last chunk, or by the close where there are no chunks

    def __enter__(self) -> EventReader:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def reset(self) -> None:
        """Leave without a farewell."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def _more(self) -> bool:
        if self._is_chunked:
            size = int(self._file.readline(), 16)
            data = self._file.read(size)
            assert self._file.read(2) == b"\r\n"
        else:
            data = self._file.read1(65536)
        self._text += data
        self.has_ended = not data
        return bool(data)

    def block(self) -> str:
        """Return the next block without its empty line, "" at the end."""
        while b"\n\n" not in self._text:
            if not self._more():
                assert not self._text
                return ""
        block, _, self._text = self._text.partition(b"\n\n")
        return block.decode("utf-8")

    def event(self) -> tuple[int, dict[str, Any]]:
        """Return (id, payload) of the next event; what is no event is passed over."""
        while True:
            block = self.block()
            if block.startswith("event: "):
                name, data, number = block.split("\n")
                assert name == "event: smithers" and number.startswith("id: ")
                return int(number[4:]), json.loads(data[6:])
            assert block, "the stream has ended"

    def skip_to(self, last: int) -> None:
        """Read up to the event with this seq."""
        while self.event()[0] < last:
            pass

    def until(self, type: str) -> int:
        """Read up to an event of this type and return its seq."""
        while True:
            seq, payload = self.event()
            if payload["type"] == type:
                return seq

    def rest(self) -> list[int]:
        """Return the seqs of all events to the end of the stream."""
        return [
            int(block.rpartition("id: ")[2])
            for block in iter(self.block, "")
            if block.startswith("event: ")
        ]


def sse_of(events: Seq[ss.Event]) -> str:
    """Return the stream's whole text for these events."""
    return "retry: 1000\n\n" + "".join(
        f"event: smithers\ndata: {e.payload_json}\nid: {e.seq}\n\n" for e in events
    )


class Command:
    """A real process of the command line, its progress lines read as they come."""

    def __init__(self, folder: str, *arguments: str, limit: str = "", **env: str) -> None:
        argv = [sys.executable, "-m", "smithers_serve", *arguments]
        self.process = subprocess.Popen(
            ["sh", "-c", limit + 'exec "$@"', "sh", *argv] if limit else argv,
            cwd=folder,
            env=command_env(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._arrived = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *unused: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._arrived:
                self.lines.append(line)
                self._arrived.notify_all()

    def wait_for(self, pattern: str) -> str:
        """Return the first group of the first progress line that matches."""

        def find() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        with self._arrived:
            found = self._arrived.wait_for(find, PATIENCE)
            assert found, f"no line {pattern!r} in {self.lines}"
            return found[1] if found.re.groups else found[0]

    def port(self) -> int:
        return int(self.wait_for(r"HTTP server listening on http://127\.0\.0\.1:(\d+)"))

    def finish(self, number: int | None = None) -> tuple[int, str]:
        """Send a signal, if any, and return (exit code, stdout) at the end."""
        if number is not None:
            self.process.send_signal(number)
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code, out


def command_env(**env: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "SMITHERS_API_KEY"}
    return {**kept, "PYTHONPATH": HERE, **env}


def run_command(folder: str, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Run the command line to its end and return (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "smithers_serve", *arguments],
        cwd=folder,
        env=command_env(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


class FolderCase(unittest.TestCase):
    """A test with a folder of its own."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def write(self, name: str, text: str) -> str:
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path


class ServedCase(unittest.TestCase):
    """A test with a served run that waits at its gate `deploy`, and no engine."""

    token: str | None = None
    options: dict[str, Any] = {}

    def setUp(self) -> None:
        context = serving(token=self.token, **self.options)
        self.served = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        self.served.run_to_gate()

    def assert_error(
        self,
        answer: tuple[int, dict[str, str], Any],
        status: int,
        code: str,
        says: str = "",
    ) -> None:
        self.assertEqual((answer[0], list(answer[2])), (status, ["error"]))
        self.assertEqual(list(answer[2]["error"]), ["code", "message"])
        self.assertEqual(answer[2]["error"]["code"], code)
        self.assertIn(says, answer[2]["error"]["message"])
        self.assertEqual(answer[1]["content-type"], "application/json")

    def assert_refused(
        self, status: int, code: str, says: str, method: str, path: str, body: Any = None
    ) -> None:
        """Assert the answer of a request, and that it changed nothing."""
        before = rows(self.served.path)
        with self.subTest(path=path, body=str(body)[:60]):
            self.assert_error(self.served.ask(method, path, body), status, code, says)
            self.assertEqual(rows(self.served.path), before)


# ---------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------


class StatusTest(ServedCase):
    def test_status_has_the_specified_keys(self) -> None:
        status, headers, body = self.served.ask("GET", "/")
        self.assertEqual(status, 200)
        self.assertEqual(
            list(body),
            ["runId", "workflowName", "status", "startedAtMs", "finishedAtMs", "summary"],
        )
        self.assertIsInstance(body.pop("startedAtMs"), int)
        self.assertEqual(
            body,
            {
                "runId": "run-1",
                "workflowName": "release",
                "status": "waiting-approval",
                "finishedAtMs": None,
                "summary": {"finished": 1, "waiting-approval": 1, "pending": 1},
            },
        )

    def test_json_is_compact_and_private(self) -> None:
        raw = send_raw(self.served.port, [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])
        ((_, headers, body),) = split_answers(raw)
        self.assertEqual(headers["content-type"], "application/json")
        self.assertEqual(headers["cache-control"], "no-store")
        self.assertEqual(headers["x-content-type-options"], "nosniff")
        self.assertEqual(body, json.dumps(json.loads(body), separators=(",", ":")).encode())

    def test_status_before_the_run_exists(self) -> None:
        with serving("unborn") as served:
            self.assert_error(served.ask("GET", "/"), 404, "RUN_NOT_FOUND", "unborn")
            self.assert_error(served.ask("GET", "/frames"), 404, "RUN_NOT_FOUND")
            self.assert_error(served.ask("POST", "/cancel"), 404, "RUN_NOT_FOUND")
            self.assert_error(served.ask("POST", "/approve/deploy"), 404, "RUN_NOT_FOUND")

    def test_a_run_that_fails_at_render_is_shown(self) -> None:
        with serving() as served:
            with self.assertLogs("smithers_serve", logging.ERROR):
                served.start_run(lambda ctx: 1 / 0)
                served.join()
            self.assertEqual(served.ask("GET", "/")[2]["status"], "failed")

    def test_another_processes_commit_shows_at_once(self) -> None:
        self.assertEqual(self.served.ask("GET", "/")[2]["status"], "waiting-approval")
        with contextlib.closing(sqlite3.connect(self.served.path)) as other:
            other.execute("update _smithers_runs set status = 'failed', finished_at_ms = 7")
            other.commit()
        body = self.served.ask("GET", "/")[2]
        self.assertEqual((body["status"], body["finishedAtMs"]), ("failed", 7))

    def test_every_get_answers_head(self) -> None:
        for path in ("/health", "/", "/frames", "/metrics", "/nowhere"):
            with self.subTest(path=path):
                got, head = (
                    self.served.ask("GET", path),
                    self.served.ask("HEAD", path),
                )
                self.assertEqual((head[0], head[2]), (got[0], ""))
                for answer in (got, head):
                    answer[1].pop("date")
                if path == "/metrics":
                    self.assertIn("content-length", head[1])
                    for answer in (got, head):  # the second scrape has the first one in it
                        answer[1].pop("content-length")
                self.assertEqual(head[1], got[1])

    def test_wrong_methods_are_told_what_is_allowed(self) -> None:
        wrong = [("POST", p, "GET, HEAD") for p in ("/health", "/", "/events", "/frames")]
        wrong += [("DELETE", "/metrics", "GET, HEAD"), ("PUT", "/cancel", "POST")]
        wrong += [(m, p, "POST") for m in ("GET", "HEAD") for p in ("/approve/a", "/deny/a")]
        before = rows(self.served.path)
        for method, path, allow in wrong:
            with self.subTest(method=method, path=path):
                answer = self.served.ask(method, path)
                self.assertEqual((answer[0], answer[1].get("allow")), (404, allow))
                if method != "HEAD":
                    self.assert_error(answer, 404, "NOT_FOUND")
        self.assertEqual(rows(self.served.path), before)

    def test_unknown_routes_are_not_found(self) -> None:
        for path in ("/nowhere", "/health/", "//", "/frames/1", "/approve", "/approve/", "/v1/x"):
            for method in ("GET", "POST", "BREW"):
                with self.subTest(method=method, path=path):
                    answer = self.served.ask(method, path)
                    self.assert_error(answer, 404, "NOT_FOUND")
                    self.assertNotIn("allow", answer[1])


@contextlib.contextmanager
def served_frames(count: int, size: int) -> Iterator[RunServer]:
    """Serve a run with so many frames, each with so many bytes of tree."""
    with serving() as served:
        with served.db.transaction("run-1") as tx:
            tx.insert_run("w", None, None, "nobody", "{}", "{}")
            for _ in range(count):
                tx.insert_frame("x" * (size - 4), "hash", "[]", "[]")
        yield served


class FramesTest(ServedCase):
    def looped(self) -> list[dict[str, Any]]:
        """Serve a run of many frames instead and return them, oldest first."""
        context = serving("looped")
        self.served = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

        def workflow(ctx: ss.Ctx) -> ss.Workflow:
            done = [i for i in range(8) if ctx.output(f"t{i}") is not None]
            return ss.Workflow(
                "grow", *(ss.Task(f"t{i}", {"n": i}) for i in range(min(8, len(done) + 1)))
            )

        ss.run_workflow(workflow, adapter=self.served.db, run_id="looped")
        return self.served.ask("GET", "/frames?afterFrameNo=-1")[2]

    def test_a_frame_has_the_originals_keys(self) -> None:
        status, _, frames = self.served.ask("GET", "/frames")
        self.assertEqual(status, 200)
        (frame,) = frames
        self.assertEqual(
            list(frame),
            [
                "runId",
                "frameNo",
                "createdAtMs",
                "xmlJson",
                "xmlHash",
                "mountedTaskIdsJson",
                "taskIndexJson",
                "note",
            ],
        )
        self.assertEqual(json.loads(frame["xmlJson"])["tag"], "smithers:workflow")
        self.assertEqual(frame["mountedTaskIdsJson"], '["build::0","deploy::0","announce::0"]')

    def test_newest_frames_come_first(self) -> None:
        frames = self.looped()
        self.assertGreater(len(frames), 5)
        newest = self.served.ask("GET", "/frames?limit=3")[2]
        self.assertEqual(newest, frames[::-1][:3])
        self.assertEqual(self.served.ask("GET", "/frames")[2], frames[::-1])

    def test_large_frames_come_a_few_at_a_time(self) -> None:
        with served_frames(12, 1 << 20) as served:
            newest = served.ask("GET", "/frames")[2]
            self.assertEqual([frame["frameNo"] for frame in newest], [12, 11, 10, 9, 8, 7, 6, 5])
            page = served.ask("GET", "/frames?afterFrameNo=0")[2]
            self.assertEqual([frame["frameNo"] for frame in page], [1, 2, 3, 4, 5, 6, 7, 8])
        with served_frames(2, 9 << 20) as served:
            self.assertEqual(len(served.ask("GET", "/frames")[2]), 1)

    def test_paging_forward_loses_no_frame(self) -> None:
        frames = self.looped()
        for size in (1, 2, 3, 50):
            seen: list[dict[str, Any]] = []
            after = -1
            while True:
                page = self.served.ask("GET", f"/frames?limit={size}&afterFrameNo={after}")[2]
                if not page:
                    break
                self.assertLessEqual(len(page), size)
                seen += page
                after = page[-1]["frameNo"]
            self.assertEqual(seen, frames)

    def test_bad_query_values_say_which(self) -> None:
        bad = ("", "x", "0", "-1", "1.5", "1_0", "+1", "%201", "1e2", "²", "9" * 19, "9" * 5000)
        for value in bad:
            text = urllib.parse.quote(value, safe="%")
            self.assert_refused(400, "INVALID_REQUEST", "limit", "GET", f"/frames?limit={text}")
        for value in ("", "x", "-2", "1.0", "²", str(2**63), "9" * 5000):
            text = urllib.parse.quote(value)
            for path, name in (("/frames", "afterFrameNo"), ("/events", "afterSeq")):
                self.assert_refused(400, "INVALID_REQUEST", name, "GET", f"{path}?{name}={text}")

    def test_repeated_or_malformed_queries_are_refused(self) -> None:
        for query in ("limit=1&limit=2", "limit=1&%6cimit=1", "limit=%", "limit=%ff", "x=%zz"):
            self.assert_refused(400, "INVALID_REQUEST", "", "GET", f"/frames?{query}")

    def test_unknown_query_parameters_are_ignored(self) -> None:
        for query in ("limit=1&x=2", "&&limit=1&", "limit=1&flag", "%6cimit=1"):
            self.assertEqual(len(self.served.ask("GET", f"/frames?{query}")[2]), 1)

    def test_the_greatest_numbers_are_taken(self) -> None:
        top = 2**63 - 1
        self.assertEqual(self.served.ask("GET", f"/frames?limit={top}")[0], 200)
        self.assertEqual(self.served.ask("GET", f"/frames?afterFrameNo={top}")[2], [])


BAD_BODIES: tuple[tuple[bytes, str], ...] = (
    (b"{", "JSON"),
    (b"{}x", "JSON"),
    (b"{'note':'a'}", "JSON"),
    (b"\xef\xbb\xbf{}", "JSON"),
    ("{}".encode("utf-16"), "JSON"),
    (b'{"note":"\xff"}', "JSON"),
    (b'{"note":"\\ud800"}', "JSON"),
    (b'{"x":NaN}', "JSON"),
    (b'{"iteration":-Infinity}', "JSON"),
    (b'{"note":"a","note":"b"}', "JSON"),
    (b'{"note":"a\nb"}', "JSON"),
    (b"[" * 100_000, "JSON"),
    (b'{"x":' * 50_000 + b"1" + b"}" * 50_000, "JSON"),
    (b"null", "object"),
    (b"[]", "object"),
    (b'"x"', "object"),
    (b"1", "object"),
    (b"true", "object"),
    (b'{"iteration":"0"}', "iteration"),
    (b'{"iteration":true}', "iteration"),
    (b'{"iteration":-1}', "iteration"),
    (b'{"iteration":0.0}', "iteration"),
    (b'{"iteration":1e999}', "1e999"),
    (b'{"iteration":[0]}', "iteration"),
    (b'{"iteration":9223372036854775808}', "iteration"),
    (b'{"iteration":' + b"9" * 5000 + b"}", ""),
    (b'{"note":1}', "note"),
    (b'{"note":["a"]}', "note"),
    (b'{"note":"' + b"n" * 10_001 + b'"}', "note"),
    (b'{"decidedBy":{}}', "decidedBy"),
    (b'{"decidedBy":"' + b"d" * 201 + b'"}', "decidedBy"),
)


class ApproveTest(ServedCase):
    def test_approval_is_stored_with_its_words(self) -> None:
        said = {"iteration": 0, "note": "Looks good", "decidedBy": "alice"}
        answer = self.served.ask("POST", "/approve/deploy", said)
        self.assertEqual((answer[0], answer[2]), (200, {"runId": "run-1"}))
        (gate,) = self.served.db.list_gates("run-1")
        self.assertEqual(
            (gate.status, gate.note, gate.decided_by), ("approved", "Looks good", "alice")
        )
        self.assertIsNotNone(gate.requested_at_ms)
        event = self.served.events()[-1]
        self.assertEqual(
            event.payload_json,
            '{"type":"ApprovalGranted","runId":"run-1","nodeId":"deploy","iteration":0,'
            f'"note":"Looks good","decidedBy":"alice","timestampMs":{event.timestamp_ms}}}',
        )

    def test_all_fields_are_optional(self) -> None:
        for body in (None, b"", {}, {"note": None, "iteration": None, "decidedBy": None}):
            with self.subTest(body=body), serving() as served:
                served.run_to_gate()
                self.assertEqual(served.ask("POST", "/approve/deploy", body)[0], 200)
                self.assertEqual(served.db.list_gates("run-1")[0].status, "approved")

    def test_content_type_does_not_matter(self) -> None:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d sends
        answer = self.served.ask("POST", "/approve/deploy", {"note": "Ship it"}, headers)
        self.assertEqual(answer[0], 200)
        self.assertEqual(self.served.db.list_gates("run-1")[0].note, "Ship it")

    def test_an_unknown_node_is_not_created(self) -> None:
        self.assert_refused(404, "NODE_NOT_FOUND", "nobody", "POST", "/approve/nobody")

    def test_a_wrong_iteration_is_not_found(self) -> None:
        for iteration in (1, 2**63 - 1):
            self.assert_refused(
                404, "NODE_NOT_FOUND", "deploy", "POST", "/approve/deploy", {"iteration": iteration}
            )

    def test_a_node_without_gate_is_not_pending(self) -> None:
        for node in ("build", "announce"):
            self.assert_refused(409, "APPROVAL_NOT_PENDING", node, "POST", f"/approve/{node}")

    def test_the_same_decision_again_changes_nothing(self) -> None:
        self.served.ask("POST", "/approve/deploy", {"note": "first"})
        before = rows(self.served.path)
        answer = self.served.ask("POST", "/approve/deploy", {"note": "second"})
        self.assertEqual((answer[0], answer[2]), (200, {"runId": "run-1"}))
        self.assertEqual(rows(self.served.path), before)

    def test_the_opposite_decision_is_refused(self) -> None:
        self.served.ask("POST", "/approve/deploy")
        self.assert_refused(409, "APPROVAL_NOT_PENDING", "deploy", "POST", "/deny/deploy")

    def test_bad_bodies_are_refused_and_change_nothing(self) -> None:
        for body, says in BAD_BODIES:
            self.assert_refused(400, "INVALID_REQUEST", says, "POST", "/approve/deploy", body)

    def test_bodies_nested_at_any_depth_are_answered(self) -> None:
        for depth in (10, 499, 500, *range(900, 1005), 100_000):
            body = b'{"a":"\\u0041","x":' + b"[" * depth + b"]" * depth + b"}"
            with self.subTest(depth=depth):
                answer = self.served.ask("POST", "/approve/nobody", body)
                says = "field 'a'" if depth < 500 else "nested too deeply"
                self.assertEqual(answer[0], 400)
                self.assertIn(says, answer[2]["error"]["message"])

    def test_a_gate_of_an_ended_run_is_closed(self) -> None:
        self.served.ask("POST", "/cancel")
        for verdict in ("approve", "deny"):
            self.assert_refused(409, "APPROVAL_NOT_PENDING", "deploy", "POST", f"/{verdict}/deploy")

    def test_an_approval_continues_the_run(self) -> None:
        with serving() as served:
            served.start_run()
            served.wait_for("waiting-approval")
            self.assertEqual(served.ask("POST", "/approve/deploy")[0], 200)
            served.join()
            body = served.ask("GET", "/")[2]
            self.assertEqual((body["status"], body["summary"]), ("finished", {"finished": 3}))

    def test_node_ids_are_percent_decoded_once(self) -> None:
        self.assert_refused(404, "NODE_NOT_FOUND", "'%64eploy'", "POST", "/approve/%2564eploy")
        self.assert_refused(404, "NODE_NOT_FOUND", "'a/b'", "POST", "/approve/a%2Fb")
        self.assert_refused(404, "NODE_NOT_FOUND", "'a+b'", "POST", "/approve/a+b")
        for path in ("/approve/%", "/approve/%zz", "/approve/%ff", "/approve/%ed%a0%80"):
            self.assert_refused(400, "INVALID_REQUEST", "path", "POST", path)
        self.assertEqual(self.served.ask("POST", "/approve/%64eploy")[0], 200)

    def test_one_of_many_deciders_wins(self) -> None:
        answers: list[int] = []
        start = threading.Barrier(8)

        def decide(verdict: str) -> None:
            start.wait(PATIENCE)
            answers.append(self.served.ask("POST", f"/{verdict}/deploy")[0])

        threads = [
            threading.Thread(target=decide, args=(verdict,)) for verdict in ("approve", "deny") * 4
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(sorted(answers), [200] * 4 + [409] * 4)
        types = [event.type for event in self.served.events()]
        self.assertEqual(types.count("ApprovalGranted") + types.count("ApprovalDenied"), 1)


class DenyTest(ServedCase):
    def test_denial_is_stored_with_its_words(self) -> None:
        answer = self.served.ask("POST", "/deny/deploy", {"note": "No", "decidedBy": "bob"})
        self.assertEqual((answer[0], answer[2]), (200, {"runId": "run-1"}))
        (gate,) = self.served.db.list_gates("run-1")
        self.assertEqual((gate.status, gate.note, gate.decided_by), ("denied", "No", "bob"))
        self.assertEqual(self.served.events()[-1].type, "ApprovalDenied")

    def test_a_denial_is_refused_like_an_approval(self) -> None:
        self.assert_refused(404, "NODE_NOT_FOUND", "nobody", "POST", "/deny/nobody")
        self.assert_refused(409, "APPROVAL_NOT_PENDING", "build", "POST", "/deny/build")
        self.assert_refused(400, "INVALID_REQUEST", "object", "POST", "/deny/deploy", b"null")
        self.served.ask("POST", "/deny/deploy")
        self.assert_refused(409, "APPROVAL_NOT_PENDING", "denied", "POST", "/approve/deploy")

    def test_a_denial_fails_the_run(self) -> None:
        with serving() as served:
            served.start_run()
            served.wait_for("waiting-approval")
            self.assertEqual(served.ask("POST", "/deny/deploy")[0], 200)
            served.join()
            self.assertEqual(served.ask("GET", "/")[2]["status"], "failed")


class CancelTest(ServedCase):
    def test_cancel_ends_the_run_and_its_gates(self) -> None:
        with serving() as served:
            served.start_run()
            served.wait_for("waiting-approval")
            answer = served.ask("POST", "/cancel")
            self.assertEqual((answer[0], answer[2]), (200, {"runId": "run-1"}))
            served.join()
            body = served.ask("GET", "/")[2]
            self.assertEqual(body["status"], "cancelled")
            self.assertEqual(body["summary"], {"finished": 1, "cancelled": 1, "pending": 1})
            self.assertEqual(served.events()[-1].type, "RunCancelled")

    def test_a_run_without_engine_is_cancelled(self) -> None:
        self.assertEqual(self.served.ask("POST", "/cancel")[0], 200)
        self.assertEqual(self.served.ask("GET", "/")[2]["status"], "cancelled")

    def test_an_ended_run_is_not_active(self) -> None:
        self.served.ask("POST", "/cancel")
        self.assert_refused(409, "RUN_NOT_ACTIVE", "cancelled", "POST", "/cancel")
        self.assertTrue(self.served.abort.is_set())

    def test_a_refused_cancel_aborts_nothing(self) -> None:
        with serving(token="tok") as served:
            served.run_to_gate()
            self.assert_error(served.ask("POST", "/cancel"), 401, "UNAUTHORIZED")
            self.assertFalse(served.abort.is_set())


class HealthTest(ServedCase):
    token = "tok"

    def test_health_needs_no_token(self) -> None:
        for headers in ({}, bearer("wrong"), bearer("tok")):
            answer = self.served.ask("GET", "/health", headers=headers)
            self.assertEqual((answer[0], answer[2]), (200, {"ok": True}))

    def test_health_needs_no_database(self) -> None:
        with contextlib.closing(sqlite3.connect(self.served.path)) as other:
            other.execute("begin exclusive")
            self.assertEqual(self.served.ask("GET", "/health")[2], {"ok": True})
        self.served.db.close()
        self.assertEqual(self.served.ask("GET", "/health")[2], {"ok": True})

    def test_health_answers_while_tasks_block(self) -> None:
        with serving() as served:
            begun, leave = threading.Event(), threading.Event()

            def wait() -> None:
                begun.set()
                leave.wait(PATIENCE)

            served.start_run(ss.Workflow("busy", ss.Task("wait", wait)))
            self.assertTrue(begun.wait(PATIENCE))
            self.assertEqual(served.ask("GET", "/health")[2], {"ok": True})
            self.assertEqual(served.ask("GET", "/")[2]["summary"], {"in-progress": 1})
            leave.set()
            served.join()


# ---------------------------------------------------------------------------
# Event stream
# ---------------------------------------------------------------------------


class EventStreamTest(unittest.TestCase):
    def finished(self, served: RunServer) -> list[ss.Event]:
        """Run to the end and return the events."""
        ss.run_workflow(
            ss.Workflow("quick", ss.Task("a", {"n": 1}), ss.Task("b", {"n": 2})),
            adapter=served.db,
            run_id=served.run_id,
        )
        return served.events()

    def append(self, served: RunServer, count: int = 1, text: str = "x") -> None:
        with served.db.transaction(served.run_id) as tx:
            for _ in range(count):
                tx.append_event("NodeOutput", nodeId="build", iteration=0, attempt=0, text=text)

    def end(self, served: RunServer) -> None:
        with served.db.transaction(served.run_id) as tx:
            tx.end_run("finished", None)
            tx.append_event("RunFinished")

    def test_a_finished_run_is_sent_in_exact_bytes(self) -> None:
        with serving() as served:
            events = self.finished(served)
            raw = send_raw(
                served.port, [b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"], end=False
            )
            head, _, body = raw.partition(b"\r\n\r\n")
            self.assertRegex(
                head.decode(),
                r"\AHTTP/1\.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                r"Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\nDate: [^\r]+ GMT\r\n"
                r"Transfer-Encoding: chunked\r\nConnection: close\Z",
            )
            blocks = [block.encode() + b"\n\n" for block in sse_of(events).split("\n\n")[:-1]]
            chunks = [b"%x\r\n%b\r\n" % (len(block), block) for block in [*blocks, b""]]
            self.assertEqual(body, b"".join(chunks))

    def test_http_1_0_gets_no_chunks(self) -> None:
        with serving() as served:
            events = self.finished(served)
            raw = send_raw(
                served.port, [b"GET /events HTTP/1.0\r\nHost: localhost\r\n\r\n"], end=False
            )
            head, _, body = raw.partition(b"\r\n\r\n")
            self.assertNotIn(b"transfer-encoding", head.lower())
            self.assertEqual(body.decode(), sse_of(events))

    def test_events_carry_the_originals_fields(self) -> None:
        with serving() as served:
            self.finished(served)
            with EventReader(served.port) as reader:
                self.assertEqual(reader.block(), "retry: 1000")
                seqs, payloads = zip(*(reader.event() for _ in served.events()))
            self.assertEqual(list(seqs), list(range(len(seqs))))
            started = next(p for p in payloads if p["type"] == "NodeStarted")
            self.assertEqual(
                list(started), ["type", "runId", "nodeId", "iteration", "attempt", "timestampMs"]
            )
            self.assertEqual((started["iteration"], started["attempt"]), (0, 0))

    def test_after_seq_skips_events_already_seen(self) -> None:
        with serving() as served:
            last = self.finished(served)[-1].seq
            for after in (-1, 0, 3, last - 1, last, last + 1, 2**63 - 1):
                with EventReader(served.port, f"/events?afterSeq={after}") as reader:
                    self.assertEqual(reader.rest(), list(range(after + 1, last + 1)))
                    self.assertTrue(reader.has_ended)

    def test_last_event_id_beats_after_seq(self) -> None:
        with serving() as served:
            last = self.finished(served)[-1].seq
            headers = {"Last-Event-ID": "4"}
            with EventReader(served.port, "/events?afterSeq=1", headers) as reader:
                self.assertEqual(reader.rest(), list(range(5, last + 1)))

    def test_a_bad_last_event_id_is_refused(self) -> None:
        with serving() as served:
            for value in ("x", "-2", "1.0", "9" * 30):
                answer = served.ask("GET", "/events", headers={"Last-Event-ID": value})
                self.assertEqual(answer[0], 400)
                self.assertIn("Last-Event-ID", answer[2]["error"]["message"])

    def test_an_empty_last_event_id_means_none(self) -> None:
        with serving() as served:
            last = self.finished(served)[-1].seq
            with EventReader(served.port, "/events?afterSeq=1", {"Last-Event-ID": ""}) as reader:
                self.assertEqual(reader.rest(), list(range(2, last + 1)))

    def test_a_finished_reconnect_gets_204(self) -> None:
        with serving() as served:
            last = self.finished(served)[-1].seq
            for method in ("GET", "HEAD"):
                for seen in (last,):
                    answer = served.ask(method, "/events", headers={"Last-Event-ID": str(seen)})
                    self.assertEqual((answer[0], answer[2]), (204, ""))
                    self.assertNotIn("content-length", answer[1])

    def test_a_reconnect_to_a_live_run_waits(self) -> None:
        with serving() as served:
            served.run_to_gate()
            last = served.events()[-1].seq
            with EventReader(served.port, headers={"Last-Event-ID": str(last)}) as reader:
                self.assertEqual((reader.status, reader.block()), (200, "retry: 1000"))
                self.append(served)
                self.assertEqual(reader.event()[0], last + 1)

    def test_headers_come_before_any_event(self) -> None:
        with serving() as served, EventReader(served.port) as reader:
            self.assertEqual(reader.headers["content-type"], "text/event-stream")
            self.assertEqual(reader.block(), "retry: 1000")

    def test_a_stream_opened_before_the_run_follows_it(self) -> None:
        with serving() as served, EventReader(served.port) as reader:
            self.assertEqual(reader.block(), "retry: 1000")
            events = self.finished(served)
            self.assertEqual(reader.rest(), [event.seq for event in events])
            self.assertTrue(reader.has_ended)

    def test_a_stream_follows_a_run_past_its_gate(self) -> None:
        with serving() as served:
            served.start_run()
            with EventReader(served.port) as reader:
                reader.until("NodeWaitingApproval")
                served.ask("POST", "/approve/deploy")
                granted = reader.until("ApprovalGranted")
                rest = reader.rest()
            served.join()
            self.assertEqual(rest, list(range(granted + 1, len(served.events()))))
            self.assertEqual(served.events()[-1].type, "RunFinished")

    def test_silent_streams_are_kept_alive(self) -> None:
        with unittest.mock.patch.object(ss, "KEEP_ALIVE_SECONDS", 0.05), serving() as served:
            served.run_to_gate()
            last = served.events()[-1].seq
            with EventReader(served.port, f"/events?afterSeq={last}") as reader:
                self.assertEqual(
                    [reader.block() for _ in range(2)], ["retry: 1000", ": keep-alive"]
                )
                self.append(served)
                self.assertEqual(reader.event()[0], last + 1)

    def test_another_processes_events_arrive(self) -> None:
        with serving() as served:
            served.run_to_gate()
            last = served.events()[-1].seq
            with EventReader(served.port, f"/events?afterSeq={last}") as reader:
                self.assertEqual(reader.block(), "retry: 1000")
                with contextlib.closing(ss.SmithersDb(served.path)) as other:
                    with other.transaction("run-1") as tx:
                        tx.append_event("NodeOutput", nodeId="build", text="from elsewhere")
                    self.assertEqual(reader.event()[1]["text"], "from elsewhere")
                    ss.cancel_run(other, "run-1")
                    self.assertEqual(reader.rest()[-1], served.events()[-1].seq)

    def test_head_of_events_ends_at_once(self) -> None:
        with serving() as served:
            served.run_to_gate()
            status, headers, body = served.ask("HEAD", "/events")
            self.assertEqual((status, body), (200, ""))
            self.assertEqual(headers["content-type"], "text/event-stream")
            self.assertEqual(served.streams(), "0")

    def test_vanished_clients_are_forgotten(self) -> None:
        with serving() as served:
            served.run_to_gate()
            readers = [EventReader(served.port) for _ in range(4)]
            for reader in readers:
                reader.block()
            self.assertEqual(served.streams(), "4")
            for reader in readers[:2]:
                reader.reset()
            eventually(lambda: served.streams() == "2")
            for reader in readers[2:]:
                reader.close()
            eventually(lambda: served.streams() == "0")

    def test_a_half_closed_client_is_still_served(self) -> None:
        with serving() as served:
            served.run_to_gate()
            with EventReader(served.port) as reader:
                reader.socket.shutdown(socket.SHUT_WR)
                reader.skip_to(served.events()[-1].seq)
                self.end(served)
                self.assertEqual(reader.rest(), [served.events()[-1].seq])
                self.assertTrue(reader.has_ended)

    def test_a_slow_reader_delays_nobody(self) -> None:
        with serving() as served:
            served.run_to_gate()
            with EventReader(served.port, buffer_bytes=4096) as slow:
                with EventReader(served.port) as quick:
                    for _ in range(20):
                        self.append(served, 100, "x" * 2000)
                    self.end(served)
                    count = len(served.events())
                    self.assertEqual(quick.rest(), list(range(count)))
                eventually(lambda: served.streams() == "1")
                self.assertEqual(slow.rest(), list(range(count)))
                self.assertTrue(slow.has_ended)

    def test_an_open_stream_follows_a_resumed_run(self) -> None:
        with serving() as served:
            served.run_to_gate()
            with EventReader(served.port, buffer_bytes=4096) as slow:
                with EventReader(served.port) as quick:
                    self.append(served, 2000, "x" * 2000)
                    ss.cancel_run(served.db, "run-1")
                    first_end = quick.rest()[-1]
                ss.run_workflow(release, adapter=served.db, run_id="run-1", retry=True, park=False)
                served.ask("POST", "/approve/deploy")
                ss.run_workflow(release, adapter=served.db, run_id="run-1", resume=True)
                last = served.events()[-1].seq
                self.assertGreater(last, first_end)
                self.assertEqual(slow.rest(), list(range(last + 1)))

    def test_every_stream_gets_every_event_once(self) -> None:
        with serving() as served:
            readers = [EventReader(served.port) for _ in range(30)]
            served.start_run(ss.Workflow("many", *(ss.Task(f"t{n}", {"n": n}) for n in range(40))))
            served.join()
            expected = [event.seq for event in served.events()]
            for reader in readers:
                self.assertEqual(reader.rest(), expected)
                reader.close()

    def test_a_long_log_is_replayed_whole(self) -> None:
        with serving() as served:
            served.run_to_gate()
            self.append(served, 3000)
            self.end(served)
            count = len(served.events())
            for after in (-1, 254, 255, 256, 1023):
                with EventReader(served.port, f"/events?afterSeq={after}") as reader:
                    self.assertEqual(reader.rest(), list(range(after + 1, count)))

    def test_a_foreign_log_with_gaps_is_sent(self) -> None:
        with serving() as served:
            served.run_to_gate()
            seqs = [event.seq for event in served.events()]
            with contextlib.closing(sqlite3.connect(served.path)) as other:
                for seq in (2000, 9001):
                    other.execute(
                        "insert into _smithers_events values ('run-1', ?, 0, 'X', ?)",
                        (seq, '{\n"type":\r"X"}'),
                    )
                other.commit()
            with EventReader(served.port) as reader:
                reader.block()
                self.assertEqual([reader.event()[0] for _ in range(len(seqs))], seqs)
                self.assertEqual(reader.event(), (2000, {"type": "X"}))
                self.assertEqual(reader.event(), (9001, {"type": "X"}))

    def test_a_server_stop_ends_streams_properly(self) -> None:
        with serving() as served:
            served.run_to_gate()
            readers = [EventReader(served.port) for _ in range(3)]
            for reader in readers:
                reader.skip_to(served.events()[-1].seq)
            served.stop()
            for reader in readers:
                self.assertEqual(reader.block(), "")
                self.assertTrue(reader.has_ended)
                reader.close()
            self.assertEqual(served.streams(), "0")

    def test_a_stop_without_streams_or_start(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.closing(ss.SmithersDb(os.path.join(folder, "test.db"))) as db:
                app = ss.create_serve_app(adapter=db, run_id="run-1")
                server = ss.make_server(app, "127.0.0.1", 0)
                stopping = threading.Thread(target=server.stop, daemon=True)
                stopping.start()
                stopping.join(5.0)
                self.assertFalse(stopping.is_alive())
                app.close()

    def test_too_many_streams_are_told_to_wait(self) -> None:
        with unittest.mock.patch.object(ss, "MAX_STREAMS", 2), serving() as served:
            served.run_to_gate()
            first, second = EventReader(served.port), EventReader(served.port)
            for reader in (first, second):
                self.assertEqual(reader.block(), "retry: 1000")
            request = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
            health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            answers = split_answers(send_raw(served.port, [request + health]))
            self.assertEqual([status for status, _, _ in answers], [503, 200])
            self.assertRegex(answers[0][1]["retry-after"], r"\A[1-9][0-9]*\Z")
            self.assertEqual(json.loads(answers[0][2])["error"]["code"], "UNAVAILABLE")
            counted = served.ask("GET", "/metrics")[2].splitlines()
            labels = 'method="GET",route="/events",status_code="503",status_class="5xx"'
            self.assertIn(f"smithers_http_requests{{{labels}}} 1", counted)
            first.reset()
            eventually(lambda: served.streams() == "1")
            with EventReader(served.port) as third:
                self.assertEqual(third.block(), "retry: 1000")
            second.close()

    def test_fast_readers_elsewhere_get_every_event(self) -> None:
        """Their sockets are full and empty again at every moment there is."""
        with bench_server(prefill=50_000) as (_, port, _), listening(port, 10) as listener:
            seen = listener.ask("wait", 49_999, PATIENCE)
            self.assertEqual((seen["complete"], seen["inOrder"]), (True, True))

    def test_streams_go_on_after_the_database_was_unreadable(self) -> None:
        with mock.patch.object(ss, "KEEP_ALIVE_SECONDS", 0.1), serving() as served:
            served.run_to_gate()
            self.append(served, 4000, "x" * 2000)
            with EventReader(served.port, buffer_bytes=4096) as slow:
                with EventReader(served.port) as quick:
                    quick.skip_to(served.events()[-1].seq)
                    with contextlib.closing(sqlite3.connect(served.path)) as other:
                        with self.assertLogs("smithers_serve", logging.ERROR) as logs:
                            other.execute("alter table _smithers_events rename to hidden")
                            slow.skip_to(100)  # its socket takes more now, which is not to be had
                            count = len(logs.output)
                            eventually(lambda: len(logs.output) > count + 3)
                        other.execute("alter table hidden rename to _smithers_events")
                    self.end(served)
                    self.assertEqual(quick.until("RunFinished"), served.events()[-1].seq)
                self.assertEqual(slow.rest()[-1], served.events()[-1].seq)

    def test_clients_that_never_read_cost_no_memory(self) -> None:
        with serving() as served:
            served.run_to_gate()
            with served.db.transaction("run-1") as tx:
                for _ in range(1000):
                    tx.append_event("NodeOutput", text="x" * 7000)
            before = ss._resident_bytes()
            deaf = [
                EventReader(served.port, f"/events?afterSeq={9 * number}", buffer_bytes=4096)
                for number in range(100)
            ]
            with EventReader(served.port) as reader:  # takes hundreds of turns, as do the others
                reader.skip_to(served.events()[-1].seq)
            grown = (ss._resident_bytes() - before) / 2**20
            self.assertEqual(served.streams(), "101")
            for other in deaf:
                other.reset()
            self.assertLess(grown, 60)

    def test_streams_cost_no_threads(self) -> None:
        with serving() as served:
            served.run_to_gate()
            with EventReader(served.port) as reader:
                reader.block()
                eventually(lambda: not self.connection_threads())
                count = threading.active_count()
                readers = [EventReader(served.port) for _ in range(25)]
                for other in readers:
                    other.block()
                eventually(lambda: not self.connection_threads())
                self.assertEqual(threading.active_count(), count)
                for other in readers:
                    other.close()

    @staticmethod
    def connection_threads() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "smithers-http"]


# ---------------------------------------------------------------------------
# Strict requests
# ---------------------------------------------------------------------------


def get(*lines: bytes, path: bytes = b"/health", host: bytes = b"Host: localhost") -> bytes:
    """Return a GET request of these header lines."""
    return b"".join(
        line + b"\r\n" for line in (b"GET " + path + b" HTTP/1.1", host, *lines, b"") if line
    ) + (b"\r\n")


def post(body: bytes, *lines: bytes, path: bytes = b"/approve/nobody") -> bytes:
    """Return a POST request; its length has to be among the lines."""
    return (
        b"".join(line + b"\r\n" for line in (b"POST " + path + b" HTTP/1.1", b"Host: localhost"))
        + b"".join(line + b"\r\n" for line in lines)
        + b"\r\n"
        + body
    )


def chunked(body: bytes) -> bytes:
    return post(body, b"Transfer-Encoding: chunked")


L = b"Host: localhost\r\n"

# Each request with the statuses of its answers: after a refusal there is never another answer.
REQUESTS: tuple[tuple[bytes, list[int]], ...] = (
    # Valid
    (get(), [200]),
    (get(b"Connection: close") + get(), [200]),
    (get(b"X-Empty:", b"x-tab:\ta\tb\t", b"X-Latin: \xe9\xff"), [200]),
    (get(b"Accept: a", b"Accept: b", b"Cookie: c"), [200]),
    (get(host=b"HOST:localhost"), [200]),
    (get(host=b"host:   localhost:7331  "), [200]),
    (get(path=b"/%68ealth?x=%"), [200]),
    (get(path=b"http://localhost/health"), [200]),
    (get(path=b"HTTP://LOCALHOST/health"), [200]),
    (get(path=b"http://localhost?x=1"), [200]),
    (get(path=b"http://localhost"), [200]),
    (b"GET /health HTTP/1.0\r\n\r\n", [200]),
    (b"GET / HTTP/1.0\r\n" + L + b"\r\n" + get(), [200]),
    (b"GET / HTTP/1.0\r\n" + L + b"Connection: keep-alive\r\n\r\n" + get(), [200, 200]),
    (get() + get(path=b"/") + get(path=b"/nowhere") + get(), [200, 200, 404, 200]),
    (get(b"Content-Length: 0") + get(), [200, 200]),
    (get(b"Content-Length: 5") + b"GET /" + get(), [200, 200]),
    (get(b"Transfer-Encoding: chunked") + b"5\r\nGET /\r\n0\r\n\r\n" + get(), [200, 200]),
    (b"OPTIONS * HTTP/1.1\r\n" + L + b"\r\n", [404]),
    (b"BREW / HTTP/1.1\r\n" + L + b"\r\n" + get(), [404, 200]),
    (get(path=b"//[") + get(), [404, 200]),
    (get(path=b"/" + b"a" * 8000), [404]),
    (get(*[b"X-%d: y" % n for n in range(99)]), [200]),
    (get(b"X: " + b"y" * 30_000), [200]),
    (post(b"{}", b"Content-Length: 2") + get(), [404, 200]),
    (post(b"", b"Content-Length: 0"), [404]),
    (post(b"") + get(), [404, 200]),
    (chunked(b"2\r\n{}\r\n0\r\n\r\n") + get(), [404, 200]),
    (post(b"2\r\n{}\r\n0\r\n\r\n", b"transfer-encoding: \tCHUNKED "), [404]),
    (chunked(b"1\r\n{\r\n1\r\n}\r\n000\r\n\r\n"), [404]),
    (chunked(b'0002;a=b;c="d e"\r\n{}\r\n0;x\r\nTrailer: t\r\nX:\r\n\r\n') + get(), [404, 200]),
    (chunked(b"A\r\n          \r\n2\r\n{}\r\n0\r\n\r\n"), [404]),
    # The request line
    (b"\r\n" + get(), [400]),
    (b"\n" + get(), [400]),
    (b"GET\r\n\r\n", [400]),
    (b"GET /health\r\n\r\n", [400]),
    (b"GET  /health HTTP/1.1\r\n" + L + b"\r\n", [400]),
    (b"GET /health  HTTP/1.1\r\n" + L + b"\r\n", [400]),
    (b"GET\t/health HTTP/1.1\r\n" + L + b"\r\n", [400]),
    (b"GET\x0b/health\x0cHTTP/1.1\r\n" + L + b"\r\n", [400]),
    (b" GET /health HTTP/1.1\r\n" + L + b"\r\n", [400]),
    (b"GET /health HTTP/1.1 \r\n" + L + b"\r\n", [400]),
    (b"GET /he alth HTTP/1.1\r\n" + L + b"\r\n", [400]),
    (b"GET /health HTTP/1.1\r" + L + b"\r\n", [400]),
    (b"GET /health HTTP/1.1\n" + L + b"\r\n", [400]),
    (b"GET /health HTTP/1.1\n" + L.replace(b"\r", b"") + b"\n", [400]),
    (b"GET /health HTTP/11\r\n" + L + b"\r\n", [400]),
    (b"GET /health HTTP/1.10\r\n" + L + b"\r\n", [400]),
    (b"GET /health HTTP/1\r\n" + L + b"\r\n", [400]),
    (b"GET /health http/1.1\r\n" + L + b"\r\n", [400]),
    (b"GET /health HTTP/\xb2.1\r\n" + L + b"\r\n", [400]),
    (b"G(T /health HTTP/1.1\r\n" + L + b"\r\n", [400]),
    (b"\xc7ET /health HTTP/1.1\r\n" + L + b"\r\n", [400]),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", [400]),
    (b"GET /health HTTP/2.0\r\n" + L + b"\r\n", [505]),
    (b"GET /health HTTP/1.2\r\n" + L + b"\r\n", [505]),
    (b"GET /health HTTP/0.9\r\n" + L + b"\r\n", [505]),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
    # The target
    (get(path=b"health"), [400]),
    (get(path=b"localhost:80"), [400]),
    (b"CONNECT localhost:80 HTTP/1.1\r\n" + L + b"\r\n", [400]),
    (get(path=b"ftp://localhost/health"), [400]),
    (get(path=b"http://other/health"), [400]),
    (get(path=b"http://[/health"), [400]),
    (get(path=b"http://user@localhost/health"), [400]),
    (get(path=b"/health#x"), [400]),
    (get(path=b"/\x00"), [400]),
    (get(path=b"/\x7f"), [400]),
    (get(path=b"/\xc3\xa9"), [400]),
    (get(path=b"/%"), [400]),
    (get(path=b"/%f"), [400]),
    (get(path=b"/%u0041"), [400]),
    (get(path=b"/%ff"), [400]),
    (get(path=b"/%ed%a0%80"), [400]),
    (get(path=b"/%c0%af"), [400]),
    # Header lines
    (get(host=b""), [400]),
    (get(b"Host: localhost"), [400]),
    (get(b"host: other"), [400]),
    (get(host=b"Host: local host"), [400]),
    (get(host=b"Host: localhost/x"), [400]),
    (get(host=b"Host: a@localhost"), [400]),
    (get(host=b"Host: localhost, other"), [400]),
    (get(host=b"Host: localhost:80x"), [400]),
    (get(host=b"Host: localhost:\xb2"), [400]),
    (get(host=b"Host: [::1"), [400]),
    (get(b"X: a", b" folded"), [400]),
    (get(b"X: a", b"\tfolded"), [400]),
    (b"GET /health HTTP/1.1\r\n Host: x\r\n" + L + b"\r\n", [400]),
    (get(b": nameless"), [400]),
    (get(b"no colon"), [400]),
    (get(b"X : a"), [400]),
    (get(b"X\t: a"), [400]),
    (get(b"X Y: a"), [400]),
    (get(b"X\xe9: a"), [400]),
    (get(b"X\x00: a"), [400]),
    (get(b"X: a\x00b"), [400]),
    (get(b"X: a\x01b"), [400]),
    (get(b"X: a\x7fb"), [400]),
    (get(b"X: a\x0bb"), [400]),
    (get(b"X: a\rY: b"), [400]),
    (get(b"X: a\r"), [400]),
    (get(b"X: a\nY: b"), [400]),
    (get(b"X: a\n"), [400]),
    (get(b"Authorization: Bearer a", b"Authorization: Bearer b"), [400]),
    (get(b"X-Smithers-Key: a", b"x-smithers-key: b"), [400]),
    (get(b"Expect: 200-ok"), [400]),
    # How long the body is
    (post(b"{}", b"Content-Length: 2", b"Content-Length: 2"), [400]),
    (post(b"{}", b"Content-Length: 2", b"content-length: 3"), [400]),
    (post(b"{}", b"Content-Length: 2, 2"), [400]),
    (post(b"{}", b"Content-Length: +2"), [400]),
    (post(b"{}", b"Content-Length: -2"), [400]),
    (post(b"{}", b"Content-Length: 2_0"), [400]),
    (post(b"{}", b"Content-Length: 0x2"), [400]),
    (post(b"{}", b"Content-Length: 2 2"), [400]),
    (post(b"{}", b"Content-Length: 2.0"), [400]),
    (post(b"{}", b"Content-Length: \xb2"), [400]),
    (post(b"{}", b"Content-Length: \xd9\xa2"), [400]),
    (post(b"{}", b"Content-Length:"), [400]),
    (post(b"{}", b"Content-Length: " + b"9" * 5000), [400]),
    (post(b"{}", b"Content-Length: 1048577"), [413]),
    (post(b"{}", b"Content-Length: 9223372036854775808"), [413]),
    (post(b"{}", b"Content-Length: 3"), [400]),
    (post(b"0\r\n\r\n", b"Content-Length: 5", b"Transfer-Encoding: chunked"), [400]),
    (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), [400]),
    (b"POST / HTTP/1.0\r\n" + L + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
    (post(b"0\r\n\r\n", b"Transfer-Encoding: identity"), [501]),
    (post(b"0\r\n\r\n", b"Transfer-Encoding: gzip, chunked"), [501]),
    (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked, gzip"), [501]),
    (post(b"0\r\n\r\n", b"Transfer-Encoding: xchunked"), [501]),
    (post(b"0\r\n\r\n", b"Transfer-Encoding: \x0bchunked"), [400]),
    # Chunks
    (chunked(b"\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"g\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"+2\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"-2\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"0x2\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b" 2\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"2 \r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"2_\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"\xb2\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"2\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"2;a\x00\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"2;a\n\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunked(b"2\r\n{}0\r\n\r\n"), [400]),
    (chunked(b"2\r\n{}\n0\r\n\r\n"), [400]),
    (chunked(b"2\r\n{}"), [400]),
    (chunked(b"2\r\n{}\r\n0\r\n"), [400]),
    (chunked(b"2\r\n{}\r\n0\r\nbad trailer\r\n\r\n"), [400]),
    (chunked(b"2\r\n{}\r\n0\r\nX: a\nY: b\r\n\r\n"), [400]),
    (chunked(b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 101 + b"\r\n"), [431]),
    (chunked(b"FFFFFFFFF\r\n"), [400]),
    (chunked(b"FFFFFFFF\r\n"), [413]),
    (chunked(b"100001\r\n"), [413]),
    # Too much
    (get(path=b"/" + b"a" * 8192), [414]),
    (get(path=b"/" + b"a" * 20_000), [414]),
    (get(path=b"/" + b"a" * 50_000), [414]),
    (get(*[b"X-%d: y" % n for n in range(100)]), [431]),
    (get(b"X: " + b"y" * 33_000), [431]),
    (get(b"X: " + b"y" * 70_000), [431]),
    (get(*[b"X-%d: " % n + b"y" * 900 for n in range(50)]), [431]),
)


class StrictRequestTest(unittest.TestCase):
    def setUp(self) -> None:
        context = serving()
        self.served = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        self.served.run_to_gate()

    def check(self, name: str, request: bytes, pieces: Seq[bytes], expected: list[int]) -> None:
        with self.subTest(sent=name, request=request[:150], size=len(request)):
            answers = split_answers(send_raw(self.served.port, pieces))
            self.assertEqual([status for status, _, _ in answers], expected)
            for status, headers, body in answers:
                self.assertEqual(headers["content-type"], "application/json")
                if status >= 400:
                    self.assertEqual(list(json.loads(body)), ["error"])
                if status in (400, 413, 414, 431, 501, 505):
                    self.assertEqual(headers["connection"], "close")

    def test_requests_sent_whole(self) -> None:
        before = rows(self.served.path)
        for request, expected in REQUESTS:
            self.check("whole", request, [request], expected)
        self.assertEqual(rows(self.served.path), before)

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
        approve = b'{"note":"yes"}'
        request = (
            get()
            + get(path=b"/")
            + post(approve, b"Content-Length: 14", path=b"/approve/deploy")
            + get(path=b"/")
            + chunked(b"2\r\n{}\r\n0\r\n\r\n")
            + get(b"Connection: close")
        )
        answers = split_answers(send_raw(self.served.port, [request], end=False))
        self.assertEqual([status for status, _, _ in answers], [200, 200, 200, 200, 404, 200])
        bodies = [json.loads(body) for _, _, body in answers]
        self.assertEqual(bodies[1]["summary"].get("waiting-approval"), 1)
        self.assertEqual(bodies[2], {"runId": "run-1"})
        self.assertNotIn("waiting-approval", bodies[3]["summary"])
        self.assertEqual(answers[-1][1]["connection"], "close")

    def test_expect_100_continue_is_answered(self) -> None:
        with contextlib.closing(
            socket.create_connection(("127.0.0.1", self.served.port), PATIENCE)
        ) as sock:
            sock.sendall(post(b"", b"Content-Length: 2", b"Expect: 100-Continue"))
            self.assertEqual(sock.recv(65536), b"HTTP/1.1 100 Continue\r\n\r\n")
            sock.sendall(b"{}")
            self.assertEqual(statuses_of(sock.recv(65536)), [404])

    def test_a_refused_expectation_gets_no_continue(self) -> None:
        request = post(b"", b"Content-Length: 2", b"Expect: 100-continue", path=b"/nowhere")
        self.assertEqual(statuses_of(send_raw(self.served.port, [request])), [404])

    def test_unread_bodies_never_become_requests(self) -> None:
        smuggled = get() * 3
        length = b"Content-Length: %d" % len(smuggled)
        size = b"%x\r\n" % len(smuggled)
        for request in (
            post(smuggled, length, path=b"/nowhere"),
            post(smuggled, length, path=b"/health"),
            post(smuggled, length, b"Origin: http://evil"),
            post(smuggled, length, b"Sec-Fetch-Site: cross-site", path=b"/cancel"),
            post(size + smuggled + b"\r\n0\r\n\r\n", b"Transfer-Encoding: chunked", path=b"/no"),
            post(smuggled, b"Content-Length: 1048577"),
            post(smuggled, b"Transfer-Encoding: gzip"),
        ):
            with self.subTest(request=request):
                (answer,) = split_answers(send_raw(self.served.port, [request], end=False))
                self.assertGreaterEqual(answer[0], 400)
                self.assertEqual(answer[1]["connection"], "close")

    def test_a_body_of_the_greatest_size_is_read(self) -> None:
        body = b'{"x":"' + b"x" * ((1 << 20) - 8) + b'"}'
        self.assertEqual(self.served.ask("POST", "/approve/nobody", body)[0], 400)
        self.assertEqual(self.served.ask("POST", "/approve/nobody", body + b" ")[0], 413)
        sizes = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:9], body[9:])]
        request = chunked(b"".join(sizes) + b"0\r\n\r\n")
        self.assertEqual(statuses_of(send_raw(self.served.port, [request])), [400])

    def test_what_the_mutation_run_begins_with_is_served(self) -> None:
        for request in VALID:
            with self.subTest(request=request), serving() as served:
                context: dict[str, Any] = {}
                exec(FUZZ_FLOW, context)  # the flow that these requests are for
                served.run_to_gate(context["workflow"])
                with contextlib.closing(
                    socket.create_connection(("127.0.0.1", served.port), PATIENCE)
                ) as sock:
                    sock.sendall(request)
                    answer = sock.recv(65536).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
                    self.assertRegex(answer or sock.recv(65536), rb"\AHTTP/1\.1 (200|409) ")

    def test_refusals_never_quote_the_request(self) -> None:
        for request in (
            get(b"X: <script>\x00"),
            get(path=b"/<script>%"),
            get(host=b"Host: <script>"),
            get(path=b"/<script>"),
            b"GET /<script> HTTP/9.9\r\n\r\n",
        ):
            self.assertNotIn(b"<script>", send_raw(self.served.port, [request]))

    def test_requests_leave_no_thread_behind(self) -> None:
        for request, _ in REQUESTS[:40]:
            send_raw(self.served.port, [request])
        eventually(lambda: not EventStreamTest.connection_threads())


class DeadlineTest(unittest.TestCase):
    def answers(self, constant: str, *pieces: bytes) -> list[int]:
        """Return the answers when a deadline is short and nothing follows the pieces."""
        with self.short(constant), serving() as served:
            return statuses_of(send_raw(served.port, pieces, end=False))

    @staticmethod
    @contextlib.contextmanager
    def short(constant: str) -> Iterator[None]:
        with unittest.mock.patch.object(ss, constant, 0.01):
            with unittest.mock.patch.object(ss.Network, "TICK_SECONDS", 0.01):
                yield

    def test_an_unfinished_head_is_timed_out(self) -> None:
        self.assertEqual(self.answers("HEAD_SECONDS", b"GET /health HTTP/1.1\r\nHo"), [408])

    def test_an_unfinished_second_head_is_timed_out(self) -> None:
        self.assertEqual(self.answers("HEAD_SECONDS", get() + b"GET /"), [200, 408])

    def test_an_unfinished_body_is_timed_out(self) -> None:
        self.assertEqual(self.answers("BODY_SECONDS", post(b"{", b"Content-Length: 2")), [408])
        self.assertEqual(self.answers("BODY_SECONDS", chunked(b"5\r\n{")), [408])

    def test_idle_connections_are_closed_silently(self) -> None:
        self.assertEqual(self.answers("IDLE_SECONDS"), [])
        self.assertEqual(self.answers("IDLE_SECONDS", get()), [200])

    def test_a_trickle_does_not_extend_the_deadline(self) -> None:
        with self.short("HEAD_SECONDS"), serving() as served:
            with contextlib.closing(
                socket.create_connection(("127.0.0.1", served.port), PATIENCE)
            ) as sock:
                sock.sendall(b"GET /health HTTP/1.1\r\nX: ")
                sock.settimeout(0.05)
                answer = b""
                while not answer:
                    with contextlib.suppress(socket.timeout):
                        sock.sendall(b"y")
                        answer = sock.recv(65536)
                self.assertEqual(statuses_of(answer), [408])


class ConnectionLimitTest(unittest.TestCase):
    def connect(self, served: RunServer) -> socket.socket:
        """Return a connection that takes little before it is read."""
        sock = socket.socket()
        self.addCleanup(sock.close)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", served.port))
        return sock

    def answered(self, sock: socket.socket) -> None:
        sock.sendall(get())
        self.assertEqual(statuses_of(sock.recv(65536)), [200])

    def test_the_longest_idle_connection_makes_room(self) -> None:
        with unittest.mock.patch.object(ss, "MAX_CONNECTIONS", 3), serving() as served:
            oldest, middle, newest = (self.connect(served) for _ in range(3))
            for sock in (oldest, middle, newest, oldest):
                self.answered(sock)
            fourth = self.connect(served)
            self.answered(fourth)
            self.assertEqual(middle.recv(1), b"")
            for sock in (oldest, newest, fourth):
                self.answered(sock)

    def test_503_when_every_connection_is_busy(self) -> None:
        with unittest.mock.patch.object(ss, "MAX_CONNECTIONS", 1), serving() as served:
            served.run_to_gate()
            busy, leave = threading.Event(), threading.Event()

            def hold(tx: ss.Tx) -> None:
                busy.set()
                leave.wait(PATIENCE)

            served.db.subscribe(hold)
            first = self.connect(served)
            first.sendall(post(b"", path=b"/approve/deploy"))
            self.assertTrue(busy.wait(PATIENCE))
            ((status, headers, body),) = split_answers(self.connect(served).recv(65536))
            self.assertEqual((status, headers["connection"]), (503, "close"))
            self.assertIn("retry-after", headers)
            self.assertEqual(json.loads(body)["error"]["code"], "UNAVAILABLE")
            leave.set()
            self.assertEqual(statuses_of(first.recv(65536)), [200])
            served.db.unsubscribe(hold)

    def test_a_connection_outlives_the_thread_of_a_request(self) -> None:
        """The next request may have its thread before the last one's has ended."""
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-5)
        request = post(b"", b"Content-Length: 0", path=b"/approve/nobody")
        broken: list[BaseException] = []

        def ask() -> None:
            try:
                with contextlib.closing(self.connect(served)) as sock:
                    for _ in range(700):
                        sock.sendall(request)
                        answer = b""
                        while b"}}" not in answer:
                            data = sock.recv(65536)
                            if not data:
                                raise ConnectionError("closed without an answer")
                            answer += data
            except OSError as error:
                broken.append(error)

        with serving() as served:
            clients = [threading.Thread(target=ask) for _ in range(6)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            self.assertEqual(broken, [])
            self.answered(self.connect(served))

    def test_what_follows_a_last_answer_is_not_reset(self) -> None:
        """A reset could overtake the answer on its way."""
        with serving() as served:
            served.run_to_gate()
            for request in (
                get(b"Connection: close"),
                get(b"Connection: close", path=b"/frames"),
                b"HEAD /events HTTP/1.1\r\nHost: localhost\r\n\r\n",
            ):
                with self.subTest(request=request):
                    sock = self.connect(served)
                    sock.sendall(request)
                    answer = b"".join(iter(lambda sock=sock: sock.recv(65536), b""))
                    self.assertEqual(statuses_of(answer), [200])
                    for _ in range(100):
                        sock.sendall(b"x" * 1000)

    def test_few_descriptors_mean_503_and_not_silence(self) -> None:
        """A server with 100 descriptors, asked for 150 streams, answers everybody."""
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "flow.py"), "w") as file:
                file.write("from smithers_serve import *\n")
                file.write("workflow = Workflow('w', Approval('gate'))\n")
            argv = "up flow.py --serve --port 0".split()
            with Command(folder, *argv, limit="ulimit -n 100; ") as command:
                port = command.port()
                readers = []
                for _ in range(150):
                    readers.append(EventReader(port))
                counts = Counter(reader.status for reader in readers)
                self.assertEqual(set(counts), {200, 503})
                self.assertEqual(ask_server(port, "GET", "/")[0], 200)
                self.assertEqual(ask_server(port, "POST", "/approve/gate")[0], 200)
                command.wait_for("Workflow finished")
                for reader in readers:
                    reader.close()

    def ask_frames(self, served: RunServer, limit: int) -> socket.socket:
        sock = self.connect(served)
        sock.sendall(get(path=b"/frames?limit=%d" % limit))
        return sock

    def test_the_slowest_reader_of_large_answers_has_to_go(self) -> None:
        with mock.patch.object(ss, "MAX_LARGE_BYTES", 5 << 20), served_frames(8, 1 << 20) as served:
            slowest = self.ask_frames(served, 3)
            began = b""
            while len(began) < 1000:  # its body is on the way
                began += slowest.recv(1000)
            second = self.ask_frames(served, 4)
            for sock, data, frames in ((second, b"", 4), (slowest, began, None)):
                with contextlib.suppress(ConnectionError):
                    while b"}]" not in data[-2:]:
                        part = sock.recv(1 << 20)
                        if not part:
                            break
                        data += part
                body = data.partition(b"\r\n\r\n")[2]
                if frames is None:
                    self.assertLess(len(body), 3 << 20)
                else:
                    self.assertEqual(len(json.loads(body)), frames)

    @contextlib.contextmanager
    def slow_frames(self, served: RunServer) -> Iterator[tuple[list[int], threading.Event]]:
        """Have answers of more than one frame wait; yield those in the making, and what ends it."""
        making: list[int] = []
        leave = threading.Event()
        read = ss.Reads.list_frames

        def read_slowly(reads: ss.Reads, run_id: str, limit: int, *after: Any) -> list[ss.Frame]:
            if limit > 1:
                making.append(limit)
                leave.wait(2 * PATIENCE)
            return read(reads, run_id, limit, *after)

        with mock.patch.object(ss.Reads, "list_frames", read_slowly):
            try:
                yield making, leave
            finally:
                leave.set()

    def test_a_large_answer_in_the_making_holds_nobody_up(self) -> None:
        with served_frames(8, 100) as served, self.slow_frames(served) as (making, leave):
            self.assertEqual(served.ask("GET", "/frames?limit=1")[0], 200)
            sock = self.ask_frames(served, 8)
            eventually(lambda: making == [8])
            self.answered(self.connect(served))
            self.assertEqual(served.ask("GET", "/")[0], 200)
            leave.set()
            self.assertEqual(statuses_of(sock.recv(65536)), [200])

    def test_few_answers_are_made_at_once(self) -> None:
        with served_frames(8, 100) as served, self.slow_frames(served) as (making, leave):
            socks = [self.ask_frames(served, limit) for limit in range(2, 12)]
            eventually(lambda: len(making) >= ss.MAX_READERS)
            self.assertEqual(served.ask("POST", "/approve/nobody")[0], 404)
            self.answered(self.connect(served))
            self.assertEqual(len(making), ss.MAX_READERS)
            leave.set()
            for sock in socks:
                self.assertEqual(statuses_of(sock.recv(65536)), [200])

    def test_few_large_bodies_are_taken_at_once(self) -> None:
        body = b'{"x":"' + b"x" * 100_000 + b'"}'
        sized = post(body, b"Content-Length: %d" % len(body), path=b"/approve/nobody")
        pieces = chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        for request in (sized, pieces):
            with (
                self.subTest(request=request[:100]),
                mock.patch.object(ss, "MAX_LARGE_REQUESTS", 1),
                serving() as served,
            ):
                served.run_to_gate()
                first, second = self.connect(served), self.connect(served)
                first.sendall(request[:-1])
                self.assertEqual(served.ask("POST", "/approve/nobody", b"{}")[0], 404)
                second.sendall(request)
                self.assertEqual(served.ask("POST", "/approve/nobody", b"{}")[0], 404)
                self.assertEqual(select.select([second], [], [], 0)[0], [])
                first.sendall(request[-1:])
                for sock in (first, second):
                    self.assertEqual(statuses_of(sock.recv(65536)), [400])

    def test_streams_do_not_count_as_connections(self) -> None:
        with unittest.mock.patch.object(ss, "MAX_CONNECTIONS", 2), serving() as served:
            readers = []
            for _ in range(5):
                readers.append(EventReader(served.port))
                self.assertEqual(readers[-1].block(), "retry: 1000")
            self.answered(self.connect(served))
            self.assertEqual(served.streams(), "5")
            for reader in readers:
                reader.close()


# ---------------------------------------------------------------------------
# Who may ask
# ---------------------------------------------------------------------------


class TokenTest(ServedCase):
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
            with self.subTest(headers=headers):
                self.assertEqual(self.served.ask("GET", "/", headers=headers)[0], 200)

    def test_missing_and_wrong_tokens_are_unauthorized(self) -> None:
        before = rows(self.served.path)
        for headers in (
            {},
            bearer("wrong"),
            bearer("sk-secret2"),
            bearer("sk-secre"),
            bearer("SK-SECRET"),
            bearer(""),
            bearer("sk-secret sk-secret"),
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
                    answer = self.served.ask(method, path, None, headers)
                    self.assert_error(answer, 401, "UNAUTHORIZED")
                    self.assertEqual(answer[1]["www-authenticate"], "Bearer")
        self.assertEqual(rows(self.served.path), before)

    def test_every_route_but_health_asks(self) -> None:
        for path in ("/", "/events", "/frames", "/metrics", "/frames?limit=x"):
            for method in ("GET", "HEAD"):
                self.assertEqual(self.served.ask(method, path)[0], 401)

    def test_401_comes_before_404_and_bodies(self) -> None:
        for method, path in (
            ("GET", "/nowhere"),
            ("DELETE", "/"),
            ("POST", "/health"),
            ("POST", "/approve/nobody"),
        ):
            answer = self.served.ask(method, path)
            self.assert_error(answer, 401, "UNAUTHORIZED")
            self.assertNotIn("allow", answer[1])
        self.assert_error(self.served.ask("POST", "/cancel", b"{"), 401, "UNAUTHORIZED")

    def test_a_token_in_the_query_does_not_count(self) -> None:
        self.assertEqual(self.served.ask("GET", "/?token=sk-secret&authToken=sk-secret")[0], 401)

    def test_tokens_never_show(self) -> None:
        self.served.ask("GET", "/", headers=bearer("sk-wrong"))
        self.served.ask("GET", "/sk-secret", headers=bearer("sk-secret"))
        self.served.ask("POST", "/approve/nobody", {"note": 1}, bearer("sk-secret"))
        metrics = self.served.ask("GET", "/metrics", headers=bearer("sk-secret"))[2]
        refused = self.served.ask("GET", "/", headers=bearer("sk-wrong"))[2]
        stored = json.dumps(rows(self.served.path))
        for text in (metrics, json.dumps(refused), stored):
            self.assertNotIn("sk-secret", text)
            self.assertNotIn("sk-wrong", text)

    def test_the_environment_gives_a_token(self) -> None:
        with unittest.mock.patch.dict(os.environ, {"SMITHERS_API_KEY": "from-env"}):
            with serving() as served:
                self.assertEqual(served.ask("GET", "/")[0], 401)
                self.assertEqual(served.ask("GET", "/", headers=bearer("from-env"))[0], 404)
        with unittest.mock.patch.dict(os.environ, {"SMITHERS_API_KEY": ""}):
            with self.assertRaises(ValueError):
                ss.create_serve_app(adapter=self.served.db, run_id="run-1")

    def test_a_token_no_header_can_carry_is_refused(self) -> None:
        for token in ("", "a b", "a\n", "tök", "\x00"):
            with self.assertRaises(ValueError):
                ss.create_serve_app(adapter=self.served.db, run_id="run-1", auth_token=token)


class ForeignPageTest(ServedCase):
    token = "sk-secret"

    def headers(self, **fields: str) -> dict[str, str]:
        return {**bearer("sk-secret"), **{k.replace("_", "-"): v for k, v in fields.items()}}

    def test_a_foreign_page_may_not_post(self) -> None:
        before = rows(self.served.path)
        for headers in (
            self.headers(Origin="http://evil.example"),
            self.headers(Origin="null"),
            self.headers(Origin=""),
            self.headers(Origin="http://127.0.0.1:1"),
            self.headers(Origin=f"http://127.0.0.1:{self.served.port}.evil.example"),
            self.headers(Origin=f"http://localhost:{self.served.port}"),
            self.headers(Sec_Fetch_Site="cross-site"),
            self.headers(Sec_Fetch_Site="Cross-Site"),
        ):
            for path in ("/approve/deploy", "/deny/deploy", "/cancel"):
                with self.subTest(headers=headers, path=path):
                    answer = self.served.ask("POST", path, None, headers)
                    self.assert_error(answer, 403, "FORBIDDEN")
        self.assertEqual(rows(self.served.path), before)

    def test_a_page_without_host_is_foreign_too(self) -> None:
        request = b"POST /cancel HTTP/1.0\r\nx-smithers-key: sk-secret\r\nOrigin: null\r\n\r\n"
        self.assertEqual(statuses_of(send_raw(self.served.port, [request])), [403])

    def test_its_own_page_may_post(self) -> None:
        for headers in (
            self.headers(Origin=f"http://127.0.0.1:{self.served.port}"),
            self.headers(Sec_Fetch_Site="same-origin"),
            self.headers(Sec_Fetch_Site="none"),
        ):
            answer = self.served.ask("POST", "/approve/deploy", None, headers)
            self.assertEqual(answer[0], 200)

    def test_no_answer_lets_another_origin_read(self) -> None:
        headers = self.headers(Origin="http://evil.example")
        for method in ("GET", "OPTIONS"):
            answer = self.served.ask(method, "/", None, headers)
            self.assertFalse([n for n in answer[1] if n.startswith("access-control")])

    def test_the_token_is_asked_for_first(self) -> None:
        answer = self.served.ask("POST", "/cancel", None, {"Origin": "http://evil.example"})
        self.assert_error(answer, 401, "UNAUTHORIZED")


class ForeignHostTest(unittest.TestCase):
    def ask(self, served: RunServer, host: str, path: str = "/", method: str = "GET") -> int:
        return served.ask(method, path, None, {"Host": host})[0]

    def test_only_loopback_names_are_served(self) -> None:
        with serving() as served:
            served.run_to_gate()
            for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:80", "[::1]:80"):
                self.assertEqual(self.ask(served, host), 200, host)
            before = rows(served.path)
            for host in ("evil.example", "localhost.evil.example", "evil:80", "[::2]", "127.1", ""):
                self.assertEqual(self.ask(served, host), 403, host)
                self.assertEqual(self.ask(served, host, "/cancel", "POST"), 403, host)
                self.assertEqual(self.ask(served, host, "/nowhere"), 403, host)
            self.assertEqual(rows(served.path), before)

    def test_allowed_hosts_are_added(self) -> None:
        with serving(allowed_hosts=["Box.example"]) as served:
            served.run_to_gate()
            self.assertEqual(self.ask(served, "box.example:8080"), 200)
            self.assertEqual(self.ask(served, "localhost"), 200)
            self.assertEqual(self.ask(served, "evil.example"), 403)
            headers = {"Origin": "https://box.example", "Host": "localhost"}
            self.assertEqual(served.ask("POST", "/approve/deploy", None, headers)[0], 200)

    def test_a_token_makes_any_host_welcome(self) -> None:
        with serving(token="tok") as served:
            served.run_to_gate()
            headers = {"Host": "box.example", **bearer("tok")}
            self.assertEqual(served.ask("GET", "/", None, headers)[0], 200)

    def test_a_wide_bind_serves_any_host(self) -> None:
        with serving(host="0.0.0.0") as served:
            served.run_to_gate()
            self.assertEqual(self.ask(served, "box.example"), 200)

    def test_a_served_app_still_answers_in_process(self) -> None:
        with serving() as served:
            served.run_to_gate()
            self.assertEqual(served.app.request("GET", "/").status, 200)


def make_certificate(folder: str) -> str | None:
    """Return a file with a key and a certificate for localhost; None without openssl."""
    openssl = shutil.which("openssl")
    path = os.path.join(folder, "server.pem")
    if openssl is None:
        return None
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj"
    done = subprocess.run(
        [openssl, *options.split(), "/CN=localhost", "-keyout", path, "-out", path + ".crt"],
        capture_output=True,
    )
    if done.returncode:
        return None
    with open(path, "a") as pem, open(path + ".crt") as certificate:
        pem.write(certificate.read())
    return path


class TlsTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        certificate = make_certificate(folder.name)
        if certificate is None:
            self.skipTest("there is no openssl to make a certificate")
        context = serving(ssl_context=ss.make_ssl_context(certificate, None))
        self.served = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        self.context = ssl.create_default_context()
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE

    def ask(self, method: str, path: str) -> tuple[int, dict[str, str], Any]:
        return ask_server(self.served.port, method, path, context=self.context)

    def test_requests_are_answered_over_tls(self) -> None:
        self.served.run_to_gate()
        self.assertTrue(self.served.server.url.startswith("https://127.0.0.1:"))
        self.assertEqual(self.ask("GET", "/")[2]["status"], "waiting-approval")
        self.assertEqual(self.ask("POST", "/approve/deploy")[2], {"runId": "run-1"})

    def test_streams_follow_a_run_over_tls(self) -> None:
        with EventReader(self.served.port, context=self.context) as reader:
            self.served.run_to_gate()
            reader.skip_to(self.served.events()[-1].seq)
            self.assertEqual(self.ask("POST", "/cancel")[0], 200)
            self.assertEqual(reader.rest()[-1], self.served.events()[-1].seq)
            self.assertTrue(reader.has_ended)

    def test_a_long_replay_passes_through_tls(self) -> None:
        self.served.run_to_gate()
        with self.served.db.transaction("run-1") as tx:
            for _ in range(1500):
                tx.append_event("NodeOutput", nodeId="build", text="x" * 2000)
        ss.cancel_run(self.served.db, "run-1")
        count = len(self.served.events())
        with EventReader(self.served.port, context=self.context, buffer_bytes=4096) as reader:
            self.assertEqual(reader.rest(), list(range(count)))

    def test_a_stream_to_http_1_0_ends_with_a_farewell(self) -> None:
        self.served.run_to_gate()
        ss.cancel_run(self.served.db, "run-1")
        with EventReader(self.served.port, version="1.0", context=self.context) as reader:
            self.assertEqual(reader.rest(), [event.seq for event in self.served.events()])

    def test_an_unfinished_handshake_blocks_nobody(self) -> None:
        silent = [
            socket.create_connection(("127.0.0.1", self.served.port), PATIENCE) for _ in range(5)
        ]
        silent[0].sendall(b"\x16\x03\x01")
        for _ in range(3):
            self.assertEqual(self.ask("GET", "/health")[2], {"ok": True})
        for sock in silent:
            sock.close()

    def test_an_unfinished_handshake_is_timed_out(self) -> None:
        with DeadlineTest.short("HEAD_SECONDS"):
            raw = send_raw(self.served.port, [b"\x16\x03\x01"], end=False)
        self.assertNotIn(b"HTTP", raw)

    def test_plain_http_is_not_answered(self) -> None:
        self.assertNotIn(b"HTTP/1.1 200", send_raw(self.served.port, [get()]))
        self.assertEqual(self.ask("GET", "/health")[0], 200)

    def test_old_tls_is_refused(self) -> None:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname = False
        old.verify_mode = ssl.CERT_NONE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with self.assertRaises((ssl.SSLError, ConnectionError)):
            ask_server(self.served.port, "GET", "/health", context=old)


# ---------------------------------------------------------------------------
# What answers hold
# ---------------------------------------------------------------------------

ODD_TEXTS = (
    "line\nline\r\n\r\nevent: smithers\ndata: {}\nid: 99\n\n",
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f\x85\x9b",
    "\u2028\u2029\u202e\ufeff",
    "\U0001f680 \xe9 \"quoted\" \\ 'single' </script>",
)


class ContentHygieneTest(ServedCase):
    def test_odd_texts_come_back_as_data(self) -> None:
        for number, text in enumerate(ODD_TEXTS):
            run_id = f"odd-{number}"
            with self.subTest(text=text), serving(run_id) as served:
                served.run_to_gate()
                said = {"note": text, "decidedBy": text}
                self.assertEqual(served.ask("POST", "/approve/deploy", said)[0], 200)
                (gate,) = served.db.list_gates(run_id)
                self.assertEqual((gate.note, gate.decided_by), (text, text))
                last = served.events()[-1].seq
                with EventReader(served.port, f"/events?afterSeq={last - 1}") as reader:
                    seq, payload = reader.event()
                self.assertEqual((seq, payload["note"], payload["decidedBy"]), (last, text, text))

    def test_odd_texts_reach_the_next_task(self) -> None:
        with serving() as served:
            served.start_run(
                ss.Workflow(
                    "echo", ss.Approval("deploy"), ss.Task("say", dict, needs={"said": "deploy"})
                )
            )
            served.wait_for("waiting-approval")
            served.ask("POST", "/approve/deploy", {"note": ODD_TEXTS[0]})
            served.join()
            output = served.db.find_output("run-1", "say", None)
            self.assertEqual(json.loads(output or "")["said"]["note"], ODD_TEXTS[0])

    def test_error_messages_hold_no_control_characters(self) -> None:
        for path in ("/approve/%1b%5b31m%0d%0aX", "/approve/%00", "/approve/%E2%80%AE"):
            answer = self.served.ask("POST", path)
            self.assert_error(answer, 404, "NODE_NOT_FOUND")
            self.assertTrue(answer[2]["error"]["message"].isprintable())

    def test_a_500_hides_what_went_wrong(self) -> None:
        with contextlib.closing(sqlite3.connect(self.served.path)) as other:
            other.execute("drop table _smithers_frames")
            other.commit()
        with self.assertLogs("smithers_serve", logging.ERROR) as logs:
            answer = self.served.ask("GET", "/frames")
        self.assert_error(answer, 500, "SERVER_ERROR")
        self.assertNotRegex(answer[2]["error"]["message"], r"sqlite|_smithers|Traceback|/|table")
        self.assertEqual(len(logs.records), 1)
        self.assertIn("_smithers_frames", logs.output[0])
        self.assertEqual(self.served.ask("GET", "/health")[0], 200)

    def test_a_failure_says_no_folder_of_the_machine(self) -> None:
        missing = os.path.join(HERE, "no-such-file")

        def read() -> None:
            raise RuntimeError(f"cannot read {missing}")

        with serving() as served:
            with self.assertLogs("smithers_serve"):
                served.start_run(ss.Workflow("fails", ss.Task("read", read)))
                served.join()
            failed = [e for e in served.events() if e.type == "NodeFailed"]
            self.assertIn("no-such-file", failed[0].payload_json)
            for event in served.events():
                self.assertNotIn(HERE, event.payload_json)
                self.assertNotIn("Traceback", event.payload_json)


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
)


BUCKETS = [str(100 * 2**k) for k in range(12)], [str(2**k) for k in range(12)]


class MetricsTest(unittest.TestCase):
    def values(self, served: RunServer) -> dict[str, str]:
        lines = served.ask("GET", "/metrics")[2].splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    def test_samples_render_exactly(self) -> None:
        metrics = ss.Metrics()
        metrics.inc("smithers_runs_total")
        metrics.inc("smithers_runs_total", 2)
        metrics.inc("smithers_scheduler_queue_depth", -0.5)
        for value in (0.25, 1, 2048, 5000):
            metrics.observe("smithers_db_query_ms", value)
        text = metrics.render()
        for part in RENDERED_SAMPLES:
            self.assertIn(part, text)

    def test_labels_are_escaped(self) -> None:
        metrics = ss.Metrics()
        metrics.observe_request('a"b\\c\nd', "/", 200, 1.0)
        self.assertIn(
            'smithers_http_requests{method="a\\"b\\\\c\\nd",route="/",'
            'status_code="200",status_class="2xx"} 1\n',
            metrics.render(),
        )

    def test_every_family_is_there_from_the_start(self) -> None:
        with serving() as served:
            status, headers, text = served.ask("GET", "/metrics")
        self.assertEqual(status, 200)
        self.assertEqual(headers["content-type"], "text/plain; version=0.0.4; charset=utf-8")
        kinds = dict(re.findall(r"^# TYPE smithers_(\S+) (\S+)$", text, re.MULTILINE))
        self.assertEqual(
            kinds,
            {
                **dict.fromkeys(COUNTERS, "counter"),
                **dict.fromkeys(GAUGES, "gauge"),
                **dict.fromkeys(HISTOGRAMS, "histogram"),
            },
        )
        self.assertEqual(re.findall(r"^# HELP smithers_(\S+) \S", text, re.MULTILINE), list(kinds))
        for name in (set(COUNTERS) | set(GAUGES)) - {"http_requests"}:
            self.assertRegex(text, rf"(?m)^smithers_{name} [0-9]")
        for name in set(COUNTERS) - {"http_requests"}:
            self.assertIn(f"\nsmithers_{name} 0\n", text)

    def test_samples_follow_their_own_family(self) -> None:
        with serving() as served:
            served.ask("GET", "/health")
            text = served.ask("GET", "/metrics")[2]
        family = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ")[2]
            elif not line.startswith("#"):
                self.assertRegex(line, rf"\A{family}(_bucket|_sum|_count)?(\{{.*\}})? [^ ]+\Z")
        self.assertTrue(text.endswith("\n"))

    def test_buckets_are_ordered_with_one_infinity(self) -> None:
        with serving() as served:
            served.ask("GET", "/health")
            text = served.ask("GET", "/metrics")[2]
        for name in HISTOGRAMS:
            pattern = rf'^smithers_{name}_bucket{{(?:.*,)?le="(.*)"}} (\d+)$'
            found = re.findall(pattern, text, re.MULTILINE)
            bounds = [mark for mark, _ in found]
            fast = name in ("db_query_ms", "http_request_duration_ms")
            self.assertEqual(bounds, [*BUCKETS[fast], "+Inf"], name)
            counts = [int(count) for _, count in found]
            self.assertEqual(counts, sorted(counts))
            self.assertRegex(text, rf"(?m)^smithers_{name}_count(\{{.*\}})? {counts[-1]}$")

    def test_a_run_is_counted(self) -> None:
        with serving() as served, self.assertLogs("smithers_serve"):
            tries: list[int] = []

            def flaky() -> None:
                tries.append(1)
                if len(tries) < 2:
                    raise RuntimeError("not yet")

            served.start_run(
                ss.Workflow("counted", ss.Task("flaky", flaky, retries=1), ss.Approval("deploy"))
            )
            served.wait_for("waiting-approval")
            waiting = self.values(served)
            self.assertEqual(waiting["smithers_runs_active"], "1")
            self.assertEqual(waiting["smithers_approval_pending"], "1")
            served.ask("POST", "/approve/deploy")
            served.join()
            values = self.values(served)
            events = len(served.events())
        expected = {
            "runs_total": 1,
            "runs_finished_total": 1,
            "runs_failed_total": 0,
            "runs_cancelled_total": 0,
            "nodes_started": 2,
            "nodes_failed": 0,
            "node_retries_total": 1,
            "errors_total": 1,
            "events_emitted_total": events,
            "approvals_requested": 1,
            "approvals_granted": 1,
            "approvals_denied": 0,
            "run_duration_ms_count": 1,
            "attempt_duration_ms_count": 2,
            "approval_wait_duration_ms_count": 1,
        }
        found = {name: int(values[f"smithers_{name}"]) for name in expected}
        self.assertEqual(found, expected)

    def test_gauges_are_back_at_zero_after_a_run(self) -> None:
        for end in ("approve/deploy", "deny/deploy", "cancel"):
            with self.subTest(end=end), serving() as served:
                served.start_run()
                with EventReader(served.port) as reader:
                    reader.until("NodeWaitingApproval")
                    self.assertEqual(self.values(served)["smithers_event_streams_active"], "1")
                    served.ask("POST", f"/{end}")
                    reader.rest()
                served.join()
                eventually(lambda: served.streams() == "0")
                values = self.values(served)
                for name in GAUGES:
                    if not name.startswith("process_"):
                        self.assertEqual(values[f"smithers_{name}"], "0", name)

    def test_requests_are_labelled_by_pattern(self) -> None:
        with serving() as served:
            served.run_to_gate()
            for method, path in (
                ("GET", "/?x=secret-path"),
                ("POST", "/approve/secret-node"),
                ("GET", "/secret-path"),
                ("GET", "/approve/secret-node"),
                ("SECRET", "/"),
                ("HEAD", "/health"),
            ):
                served.ask(method, path)
            send_raw(served.port, [b"secret-line\r\n\r\n"])
            text = served.ask("GET", "/metrics")[2]
        self.assertNotIn("secret", text.lower())
        routes = set(re.findall(r'route="([^"]*)"', text))
        patterns = {route.pattern for route in ss.APP_ROUTES + ss.RUN_ROUTES}
        self.assertEqual(len(routes - patterns), 1)
        self.assertIn("/approve/:nodeId", routes)
        labels = 'method="HEAD",route="/health",status_code="200",status_class="2xx"'
        self.assertIn(f"smithers_http_requests{{{labels}}} 1\n", text)

    def test_metrics_can_be_switched_off(self) -> None:
        with serving(metrics=False) as served:
            for method in ("GET", "HEAD"):
                self.assertEqual(served.ask(method, "/metrics")[0], 404)
            self.assertEqual(served.ask("GET", "/metrics")[2]["error"]["code"], "NOT_FOUND")


# ---------------------------------------------------------------------------
# Mounts
# ---------------------------------------------------------------------------


class QuietHandler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class MountTest(ServedCase):
    """The same app without its own server: under wsgiref at a prefix, and without a socket."""

    token = "tok"

    def mount(self, app: Any) -> int:
        """Serve `app` at /smithers under wsgiref and return the port."""

        def site(environ: dict[str, Any], start_response: Any) -> Any:
            if environ["PATH_INFO"].startswith("/smithers/"):
                wsgiref.util.shift_path_info(environ)
                return app(environ, start_response)
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"not here"]

        server = wsgiref.simple_server.make_server(
            "127.0.0.1", 0, wsgiref.validate.validator(site), handler_class=QuietHandler
        )
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.addCleanup(thread.join, PATIENCE)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return server.server_port

    def test_a_mount_answers_like_the_server(self) -> None:
        port = self.mount(wsgiref.validate.validator(self.served.app))
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
                own = self.served.ask(method, path, body, bearer("tok"))
                mounted = ask_server(port, method, "/smithers" + path, body, bearer("tok"))
                self.assertEqual((mounted[0], mounted[2]), (own[0], own[2]))
                for name in ("content-type", "content-length", "cache-control", "allow"):
                    self.assertEqual(mounted[1].get(name), own[1].get(name))

    def test_a_mount_asks_for_the_token(self) -> None:
        port = self.mount(self.served.app)
        self.assertEqual(ask_server(port, "GET", "/smithers/health")[0], 200)
        self.assertEqual(ask_server(port, "GET", "/smithers/")[0], 401)
        self.assertEqual(ask_server(port, "GET", "/")[2], "not here")
        headers = {**bearer("tok"), "Origin": "http://evil.example"}
        self.assertEqual(ask_server(port, "POST", "/smithers/cancel", None, headers)[0], 403)

    def test_a_mounted_stream_follows_the_run(self) -> None:
        port = self.mount(wsgiref.validate.validator(self.served.app))
        with EventReader(port, "/smithers/events?afterSeq=0", bearer("tok")) as reader:
            self.assertEqual(reader.headers["content-type"], "text/event-stream")
            self.assertEqual(reader.block(), "retry: 1000")
            self.assertEqual(reader.event()[0], 1)
            self.served.ask("POST", "/cancel", None, bearer("tok"))
            self.assertEqual(reader.rest()[-1], self.served.events()[-1].seq)
        headers = {**bearer("tok"), "Last-Event-ID": str(self.served.events()[-1].seq)}
        self.assertEqual(ask_server(port, "GET", "/smithers/events", None, headers)[0], 204)

    def test_a_client_that_leaves_a_mount_is_forgotten(self) -> None:
        answer = self.served.app.request("GET", "/events", headers=bearer("tok"))
        self.assertEqual(next(answer.chunks), b"retry: 1000\n\n")
        self.assertEqual(self.served.streams(), "1")
        answer.chunks.close()  # type: ignore[attr-defined]
        self.assertEqual(self.served.streams(), "0")

    def test_a_too_large_body_is_refused_in_a_mount(self) -> None:
        port = self.mount(self.served.app)
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        client.putrequest("POST", "/smithers/approve/deploy")
        for name, value in {**bearer("tok"), "Content-Length": str((1 << 20) + 1)}.items():
            client.putheader(name, value)
        client.endheaders()
        self.assertEqual(client.getresponse().status, 413)
        client.close()

    def request(self, method: str, path: str, **options: Any) -> ss.Answer:
        return self.served.app.request(method, path, headers=bearer("tok"), **options)

    def test_requests_without_a_socket(self) -> None:
        answer = self.request("GET", "/")
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.headers["Content-Type"], "application/json")
        self.assertEqual(answer.json(), self.served.ask("GET", "/", None, bearer("tok"))[2])
        approved = self.request("POST", "/approve/deploy", json={"note": "x", "decidedBy": "y"})
        self.assertEqual((approved.status, approved.json()), (200, {"runId": "run-1"}))
        self.assertEqual(self.request("POST", "/deny/deploy").status, 409)
        self.assertEqual(self.request("POST", "/approve/deploy", body=b"{").status, 400)
        self.assertEqual(self.request("GET", "/frames?limit=0").status, 400)
        self.assertEqual(self.request("GET", "/approve/%ff").status, 400)
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
        last = self.served.events()[-1].seq
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


class CommandCase(FolderCase):
    def setUp(self) -> None:
        super().setUp()
        self.write("flow.py", WORKFLOWS)

    def run_up(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        return run_command(self.folder, "up", *arguments, **env)

    def up(self, *arguments: str, **env: str) -> Command:
        """Start `up --serve` on a free port."""
        return Command(self.folder, "up", *arguments, "--serve", "--port", "0", **env)

    def database(self) -> contextlib.closing[ss.SmithersDb]:
        return contextlib.closing(ss.SmithersDb(os.path.join(self.folder, "smithers.db")))

    def run_row(self, run_id: str) -> ss.Run:
        with self.database() as db:
            run = db.get_run(run_id)
        assert run is not None
        return run


class UpTest(CommandCase):
    def test_the_specifications_example_works(self) -> None:
        token = bearer("sk-secret")
        with self.up("flow.py", "--auth-token", "sk-secret", "--input", '{"ref":"v1"}') as command:
            port = command.port()
            with EventReader(port, headers=token) as reader:
                self.assertEqual(ask_server(port, "GET", "/")[0], 401)
                reader.until("NodeWaitingApproval")
                body = ask_server(port, "GET", "/", headers=token)[2]
                self.assertEqual(body["workflowName"], "bugfix")
                said = b'{"note": "Ship it", "decidedBy": "alice"}'
                headers = {**token, "Content-Type": "application/json"}
                answer = ask_server(port, "POST", "/approve/deploy", said, headers)
                self.assertEqual(answer[:1] + answer[2:], (200, {"runId": body["runId"]}))
                self.assertEqual(ask_server(port, "GET", "/health")[2], {"ok": True})
                reader.rest()
                self.assertTrue(reader.has_ended)
            command.wait_for("Workflow finished. Server still running — press Ctrl.C to stop.")
            body = ask_server(port, "GET", "/", headers=token)[2]
            self.assertEqual((body["status"], body["summary"]), ("finished", {"finished": 3}))
            code, out = command.finish(signal.SIGINT)
        self.assertEqual(code, 0)
        self.assertEqual(json.loads(out)["status"], "finished")
        self.assertNotIn("sk-secret", "".join(command.lines))
        self.assertIn("deploy approved by alice: Ship it", "".join(command.lines))

    def test_a_gate_prints_how_to_approve_it(self) -> None:
        with self.up("flow.py", SMITHERS_API_KEY="sk-secret") as command:
            line = command.wait_for(r"Approve it: (.*)")
            *start, flag, header = shlex.split(line)
            self.assertEqual(
                start, ["curl", "-X", "POST", f"http://127.0.0.1:{command.port()}/approve/deploy"]
            )
            self.assertEqual((flag, header), ("-H", "Authorization: Bearer $SMITHERS_API_KEY"))

    def test_a_colon_picks_another_object(self) -> None:
        code, out, err = self.run_up("flow.py:other", "-i", '{"ref":"v2"}', "-r", "r1")
        self.assertEqual(code, 0, err)
        self.assertEqual(
            json.loads(out), {"runId": "r1", "status": "finished", "summary": {"finished": 1}}
        )
        with self.database() as db:
            self.assertEqual(db.find_output("r1", "announce", 0), '{"announced":"v2"}')

    def test_stdout_holds_only_the_result(self) -> None:
        code, out, err = self.run_up("flow.py:other")
        self.assertEqual(list(json.loads(out)), ["runId", "status", "summary"])
        self.assertEqual(out.count("\n"), 1)
        self.assertIn("printed by a task\n", err)
        self.assertIn("announce | told \\x1b[31meverybody", err)

    def test_what_a_tasks_process_prints_stays_out(self) -> None:
        code, out, err = self.run_up("flow.py:loud")
        self.assertEqual(json.loads(out)["status"], "finished")
        self.assertIn("printed by a process\n", err)

    def test_the_workflow_imports_the_running_module(self) -> None:
        code, out, err = self.run_up("flow.py:same", "-r", "r1")
        self.assertEqual(code, 0, err)
        with self.database() as db:
            self.assertEqual(db.find_output("r1", "check", 0), "true")

    def test_input_comes_from_a_file_or_stdin(self) -> None:
        self.write("input.json", '{"ref": "from a file"}')
        self.assertEqual(self.run_up("flow.py:other", "-i", "@input.json", "-r", "r1")[0], 0)
        done = subprocess.run(
            [sys.executable, "-m", "smithers_serve", "up", "flow.py:other", "-i", "-", "-r", "r2"],
            cwd=self.folder,
            env=command_env(),
            input=b'{"ref": "from stdin"}',
            capture_output=True,
        )
        self.assertEqual(done.returncode, 0)
        with self.database() as db:
            self.assertEqual(db.find_output("r1", "announce", 0), '{"announced":"from a file"}')
            self.assertEqual(db.find_output("r2", "announce", 0), '{"announced":"from stdin"}')

    def test_the_database_is_its_owners_alone(self) -> None:
        self.run_up("flow.py:other", "--db", "own.db")
        mode = os.stat(os.path.join(self.folder, "own.db")).st_mode & 0o777
        self.assertEqual(mode, 0o600)

    def test_metrics_false_is_honoured(self) -> None:
        for flags in (("--metrics", "false"), ("--no-metrics",)):
            with self.up("flow.py", *flags) as command:
                self.assertEqual(ask_server(command.port(), "GET", "/metrics")[0], 404)
        with self.up("flow.py", "--metrics", "true") as command:
            self.assertEqual(ask_server(command.port(), "GET", "/metrics")[0], 200)

    def test_allowed_host_is_served(self) -> None:
        with self.up("flow.py", "--allowed-host", "box.example") as command:
            for host, status in (("box.example", 200), ("evil.example", 403)):
                headers = {"Host": host}
                self.assertEqual(ask_server(command.port(), "GET", "/", None, headers)[0], status)

    def test_a_wide_bind_without_token_warns(self) -> None:
        with self.up("flow.py", "--host", "0.0.0.0") as command:
            command.wait_for("WARNING.*--auth-token")
        with self.up("flow.py", "--host", "0.0.0.0", SMITHERS_API_KEY="tok") as command:
            command.wait_for("waits for approval")
            self.assertNotIn("WARNING", "".join(command.lines))

    def test_a_token_comes_from_a_file(self) -> None:
        self.write("token", "  from-file\n")
        with self.up("flow.py", "--auth-token-file", "token", SMITHERS_API_KEY="env") as command:
            port = command.port()
            self.assertEqual(ask_server(port, "GET", "/", headers=bearer("from-file"))[0], 200)
            self.assertEqual(ask_server(port, "GET", "/", headers=bearer("env"))[0], 401)

    def test_a_served_run_speaks_tls(self) -> None:
        certificate = make_certificate(self.folder)
        if certificate is None:
            self.skipTest("there is no openssl to make a certificate")
        context = ssl.create_default_context(cafile=certificate + ".crt")
        context.check_hostname = False
        with self.up("flow.py", "--certfile", certificate) as command:
            port = int(command.wait_for(r"listening on https://127\.0\.0\.1:(\d+)"))
            self.assertEqual(ask_server(port, "GET", "/health", context=context)[2], {"ok": True})


class ExitCodeTest(CommandCase):
    def served(self, name: str, line: str, *numbers: int) -> int:
        """Return the exit code of a served run after a signal, sent when a line has come."""
        with self.up(f"flow.py:{name}") as command:
            command.wait_for(line)
            return command.finish(signal.SIGTERM)[0]

    def test_without_a_server(self) -> None:
        for name, code, status in (
            ("other", 0, "finished"),
            ("failing", 1, "failed"),
            ("workflow", 3, "waiting-approval"),
        ):
            found, out, err = self.run_up(f"flow.py:{name}")
            self.assertEqual((found, json.loads(out)["status"]), (code, status), err)

    def test_with_a_server_the_runs_own(self) -> None:
        self.assertEqual(self.served("other", "Workflow finished"), 0)
        self.assertEqual(self.served("failing", r"Workflow failed\. Server still running"), 1)
        self.assertEqual(self.served("workflow", "waits for approval"), 3)

    def test_a_run_cancelled_over_http(self) -> None:
        with self.up("flow.py:napping") as command:
            command.wait_for("asleep")
            self.assertEqual(ask_server(command.port(), "POST", "/cancel")[0], 200)
            command.wait_for("Workflow cancelled")
            self.assertEqual(command.finish(signal.SIGTERM)[0], 2)

    def test_a_failure_says_why(self) -> None:
        _, out, err = self.run_up("flow.py:failing")
        self.assertEqual(json.loads(out)["error"]["message"], "Task(s) failed: fail")
        self.assertIn("[smithers] fail failed: it broke\n", err)


class MistakeTest(CommandCase):
    """Every mistake of a user: one clear line, exit code 4, nothing written."""

    def assert_mistake(self, says: str, *arguments: str, **env: str) -> None:
        before = self.contents()
        with self.subTest(arguments=arguments):
            code, out, err = self.run_up(*arguments, **env)
            self.assertEqual((code, out), (4, ""), err)
            self.assertRegex(err, rf"\A\[smithers\] Error: [^\n]*{says}[^\n]*\n\Z")
            self.assertEqual(self.contents(), before)

    def contents(self) -> dict[str, bytes]:
        """Return every file of the folder with its bytes; of a database, its rows."""
        found = {}
        for name in sorted(os.listdir(self.folder)):
            path = os.path.join(self.folder, name)
            if name == "smithers.db":
                found[name] = repr(rows(path)).encode()
            elif os.path.isfile(path) and not name.startswith("smithers.db-"):
                with open(path, "rb") as file:
                    found[name] = file.read()
        return found

    def test_a_file_that_cannot_be_loaded(self) -> None:
        self.write("broken.py", "x = 1\ndef f(:\n")
        self.write("raises.py", "x = 1\n\n1 / 0\n")
        self.write("notes.txt", "hello")
        self.assert_mistake("missing.py", "missing.py")
        self.assert_mistake(r"missing.py", "missing.py:workflow")
        self.assert_mistake(r"broken.py, line 2.*SyntaxError", "broken.py")
        self.assert_mistake(r"raises.py, line 3.*ZeroDivisionError", "raises.py")
        self.assert_mistake("notes.txt", "notes.txt")

    def test_an_object_that_is_no_workflow(self) -> None:
        self.assert_mistake("nothing", "flow.py:nothing")
        self.assert_mistake("number", "flow.py:number")

    def test_an_input_that_is_not_json(self) -> None:
        self.assert_mistake("--input", "flow.py", "-i", "{")
        self.assert_mistake("--input", "flow.py", "-i", "NaN")
        self.assert_mistake("missing.json", "flow.py", "-i", "@missing.json")

    def test_a_busy_port(self) -> None:
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            self.assert_mistake(port, "flow.py", "--serve", "--port", port)

    def test_a_host_that_is_not_ours(self) -> None:
        self.assert_mistake("203.0.113.1", "flow.py", "--serve", "--host", "203.0.113.1")

    def test_run_ids_that_do_not_fit(self) -> None:
        self.assertEqual(self.run_up("flow.py:other", "-r", "r1")[0], 0)
        self.assert_mistake("r1 exists", "flow.py:other", "-r", "r1")
        self.assert_mistake("--run-id", "flow.py:other", "--resume")
        self.assert_mistake("a b", "flow.py:other", "-r", "a b")
        self.assert_mistake("--force", "flow.py:other", "--force")

    def test_databases_that_cannot_be_used(self) -> None:
        self.write("text.db", "this is not a database, but a letter to a friend\n" * 100)
        self.assert_mistake("text.db.*not a database", "flow.py", "--db", "text.db")
        self.assert_mistake("folder", "flow.py", "--db", os.path.join("no", "folder.db"))
        self.assert_mistake("database", "flow.py", "--db", ".")

    def test_tokens_that_cannot_be_used(self) -> None:
        self.assert_mistake("token", "flow.py", "--serve", "--auth-token", "")
        self.assert_mistake("token", "flow.py", "--serve", "--auth-token", "a b")
        self.assert_mistake("missing", "flow.py", "--serve", "--auth-token-file", "missing")

    def test_certificates_that_cannot_be_used(self) -> None:
        self.assert_mistake("missing.pem", "flow.py", "--serve", "--certfile", "missing.pem")
        self.assert_mistake("--certfile", "flow.py", "--serve", "--keyfile", "missing.pem")

    def test_flags_that_do_not_exist(self) -> None:
        for arguments in (
            ("up",),
            ("up", "flow.py", "--port", "70000"),
            ("up", "flow.py", "--port", "²"),
            ("up", "flow.py", "--metrics", "perhaps"),
            ("up", "flow.py", "-c", "0"),
            ("up", "flow.py", "--nonsense"),
            ("down",),
            (),
        ):
            with self.subTest(arguments=arguments):
                code, out, err = run_command(self.folder, *arguments)
                self.assertEqual((code, out), (4, ""))
                self.assertRegex(err, r"\A\[smithers\] Error: .*--help\n\Z")
        self.assertEqual(os.listdir(self.folder), ["flow.py"])

    def test_help_is_no_mistake(self) -> None:
        code, out, err = run_command(self.folder, "up", "--help")
        self.assertEqual((code, err), (0, ""))
        for flag in ("--serve", "--port", "--auth-token-file", "--allowed-host", "--resume"):
            self.assertIn(flag, out)
        self.assertEqual(run_command(self.folder, "--version")[1].strip(), ss.__version__)


class SignalTest(CommandCase):
    def test_a_signal_cancels_the_run_durably(self) -> None:
        for number, name, line in (
            (signal.SIGINT, "napping", "asleep"),
            (signal.SIGINT, "wait", "sleep started"),
        ):
            for flags in ((), ("--serve", "--port", "0")):
                run_id = f"{name}-{len(flags)}"
                with (
                    self.subTest(run_id=run_id),
                    Command(self.folder, "up", f"flow.py:{name}", "-r", run_id, *flags) as command,
                ):
                    command.wait_for(line)
                    code, out = command.finish(number)
                    self.assertEqual((code, json.loads(out)["status"]), (2, "cancelled"))
                self.assertEqual(self.run_row(run_id).status, "cancelled")
                with self.database() as db:
                    self.assertEqual(db.list_events(run_id)[-1].type, "RunCancelled")
                    states = {node.node_id: node.state for node in db.list_nodes(run_id)}
                    self.assertEqual(states["before"], "finished")
                    self.assertIn("cancelled", states.values())

    def test_a_signal_at_a_gate_closes_it(self) -> None:
        with self.up("flow.py", "-r", "r1") as command:
            port = command.port()
            with EventReader(port) as reader:
                reader.until("NodeWaitingApproval")
                self.assertEqual(command.finish(signal.SIGINT)[0], 2)
                reader.rest()
                self.assertTrue(reader.has_ended)
        with self.database() as db:
            self.assertNotEqual(db.list_gates("r1")[0].status, "requested")

    def test_a_cancelled_run_can_be_resumed(self) -> None:
        with self.up("flow.py:napping", "-r", "r1") as command:
            command.wait_for("asleep")
            self.assertEqual(command.finish(signal.SIGINT)[0], 2)
        code, out, err = self.run_up("flow.py:napping", "--resume", "--retry", "-r", "r1")
        self.assertEqual((code, json.loads(out)["status"]), (0, "finished"), err)
        with self.database() as db:
            attempts = [(a.node_id, a.attempt, a.state) for a in db.list_attempts("r1")]
            seqs = [event.seq for event in db.list_events("r1")]
        self.assertEqual(
            attempts,
            [
                ("after", 0, "finished"),
                ("before", 0, "finished"),
                ("nap", 0, "cancelled"),
                ("nap", 1, "finished"),
            ],
        )
        self.assertEqual(seqs, list(range(len(seqs))))

    def test_a_deaf_task_holds_no_signal_up(self) -> None:
        with self.up("flow.py:ignoring", "-r", "r1") as command:
            command.wait_for("deaf . deaf")
            self.assertEqual(command.finish(signal.SIGINT)[0], 2)
        self.assertEqual(self.run_row("r1").status, "cancelled")

    def test_a_second_signal_leaves_at_once(self) -> None:
        with self.up("flow.py:ignoring", "-r", "r1") as command:
            command.wait_for("deaf . deaf")
            command.process.send_signal(signal.SIGINT)
            command.wait_for("Stopping")
            with self.assertRaises(subprocess.TimeoutExpired):
                command.process.wait(2 * ss.SAME_SIGNAL_SECONDS)
            self.assertEqual(command.finish(signal.SIGINT), (2, ""))
        self.assertNotIn(self.run_row("r1").status, ss.TERMINAL_STATUSES)


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

    def test_a_detached_run_is_served(self) -> None:
        code, out, err = self.run_up(
            "flow.py", "--serve", "--port", "0", "-d", "--auth-token", "sk-secret", "-r", "r1",
            "-i", '{"ref":"v3"}',
        )  # fmt: skip
        self.assertEqual(code, 0, err)
        shown = json.loads(out)
        self.addCleanup(self.end, shown["pid"])
        self.assertEqual(list(shown), ["runId", "pid", "logFile", "url"])
        self.assertEqual(shown["runId"], "r1")
        self.assertNotEqual(os.getpgid(shown["pid"]), os.getpgid(0))
        if os.path.isdir("/proc/self"):
            with open(f"/proc/{shown['pid']}/cmdline") as line:
                self.assertNotIn("sk-secret", line.read())
        os.kill(shown["pid"], signal.SIGHUP)
        port = int(shown["url"].rpartition(":")[2])
        with EventReader(port, headers=bearer("sk-secret")) as reader:
            reader.until("NodeWaitingApproval")
            ask_server(port, "POST", "/approve/deploy", None, bearer("sk-secret"))
            reader.rest()
        body = ask_server(port, "GET", "/", headers=bearer("sk-secret"))[2]
        self.assertEqual(body["status"], "finished")
        with self.database() as db:
            self.assertEqual(db.find_output("r1", "announce", 0), '{"announced":"v3"}')

        def log() -> str:
            with open(shown["logFile"]) as file:
                return file.read()

        eventually(lambda: "announce finished" in log())  # said after it is committed
        self.assertNotIn("sk-secret", log())

    def test_a_child_that_dies_shows_its_log(self) -> None:
        self.write("raises.py", "raise RuntimeError('no such luck')\n")
        code, out, err = self.run_up("raises.py", "--serve", "--port", "0", "-d")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("no such luck", err)

    def test_a_mistake_is_found_before_detaching(self) -> None:
        code, out, err = self.run_up("flow.py", "-d", "-i", "{")
        self.assertEqual((code, out), (4, ""))
        self.assertEqual(os.listdir(self.folder), ["flow.py"])


class DemoTest(FolderCase):
    def test_the_printed_line_approves_the_demo(self) -> None:
        with Command(self.folder, "demo", "--port", "0") as command:
            line = command.wait_for(r"(curl -X POST \S+)")
            url = urllib.parse.urlsplit(shlex.split(line)[-1])
            self.assertEqual(url.port, command.port())
            self.assertEqual(
                ask_server(command.port(), "GET", "/")[2]["status"], "waiting-approval"
            )
            self.assertEqual(ask_server(url.port or 0, "POST", url.path)[0], 200)
            command.wait_for(r"Workflow finished\. Server still running")
            self.assertEqual(ask_server(command.port(), "GET", "/")[2]["status"], "finished")
            code, out = command.finish(signal.SIGINT)
            self.assertEqual((code, json.loads(out)["status"]), (0, "finished"))
        self.assertEqual(os.listdir(self.folder), [])


# ---------------------------------------------------------------------------
# README: its own code, run as written
# ---------------------------------------------------------------------------


def readme_blocks(language: str) -> list[str]:
    """Return the fenced code blocks of the README in one language, in order."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as readme:
        return re.findall(rf"^```{language}\n(.*?)^```$", readme.read(), re.MULTILINE | re.DOTALL)


class ReadmeTest(unittest.TestCase):
    """A newcomer copies from the README; what is written there must run."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        shutil.copy(os.path.join(HERE, "smithers_serve.py"), self.folder)

    def run_file(self, name: str, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        with open(os.path.join(self.folder, name), "w", encoding="utf-8") as file:
            file.write(text)
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def test_every_python_block_compiles(self) -> None:
        for number, block in enumerate(readme_blocks("python")):
            with self.subTest(block=number):
                compile(block, f"README block {number}", "exec")

    def test_the_workflow_runs_to_its_gate(self) -> None:
        workflow = next(b for b in readme_blocks("python") if "def workflow(ctx" in b)
        arguments = ("-m", "smithers_serve", "up", "workflow.py", "--input", '{"ref": "v1.2"}')
        done = self.run_file("workflow.py", workflow, *arguments)
        self.assertEqual(done.returncode, 3, done.stderr)
        summary = json.loads(done.stdout)["summary"]
        self.assertEqual(summary, {"finished": 4, "pending": 1, "waiting-approval": 1})

    def test_the_library_example_runs(self) -> None:
        library = next(b for b in readme_blocks("python") if "run_workflow(" in b)
        done = self.run_file("library.py", library, "library.py")
        self.assertEqual(
            (done.returncode, done.stdout), (0, "finished {'ok': True}\n"), done.stderr
        )

    def test_the_mounted_app_answers_at_its_prefix(self) -> None:
        mount = next(b for b in readme_blocks("python") if "make_wsgi_server" in b)
        mount += (
            "\nenviron = {'PATH_INFO': '/smithers/health', 'REQUEST_METHOD': 'GET'}"
            "\nprint(b''.join(site(environ, lambda status, headers: print(status))).decode())\n"
        )
        done = self.run_file("mount.py", mount, "mount.py")
        self.assertEqual(done.stdout, '200 OK\n{"ok":true}\n', done.stderr)


# ---------------------------------------------------------------------------
# Commands: bench, crash and fuzz
# ---------------------------------------------------------------------------

LOOPBACK = "127.0.0.1"
RUN = "r1"

# ---------------------------------------------------------------------------
# Processes: a served run, children that take orders, and what the system says of them
# ---------------------------------------------------------------------------


def child_environment(**extra: str) -> dict[str, str]:
    """Return the environment of every child: this module importable and compiled once, no token."""
    dropped = ("SMITHERS_API_KEY", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PYTHONPATH": HERE, "PYTHONPYCACHEPREFIX": compiled_folder(), **extra}


@functools.lru_cache(maxsize=1)
def compiled_folder() -> str:
    """Return a folder for compiled modules that goes with this process."""
    given = os.environ.get("PYTHONPYCACHEPREFIX")
    if given:
        return given
    folder = tempfile.mkdtemp(prefix="smithers-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def end_process(process: subprocess.Popen[Any], patience: float = 8.0) -> None:
    """Terminate a process of ours, then kill it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


class Served:
    """A real `python -m smithers_serve up FILE --serve`, with the lines it says."""

    def __init__(self, folder: str, source: str, *extra: str, **environment: str) -> None:
        self.file = os.path.join(folder, "bench_flow.py")
        self.db = os.path.join(folder, "smithers.db")
        if not os.path.exists(self.file):
            with open(self.file, "w", encoding="utf-8") as out:
                out.write(source)
        argv = [sys.executable, "-m", "smithers_serve", "up", self.file, "--serve", "--db", self.db]
        ports = [] if "--port" in extra else ["--port", "0"]
        self.started_at = time.perf_counter()
        self.process = subprocess.Popen(
            [*argv, "--run-id", RUN, *ports, *extra],
            cwd=folder, env=child_environment(**environment),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self.process.pid
        self.lines: list[str] = []
        self.port = 0
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._said:
                found = re.search(r"listening on http://[^ ]*:(\d+)", line)
                self.port = int(found[1]) if found else self.port
                self.lines.append(line.rstrip("\n"))
                self._said.notify_all()
        with self._said:
            self.lines.append("")  # wakes who waits for a process that has died
            self._said.notify_all()

    def wait_for(self, ready: Callable[[Served], bool], seconds: float = 30.0) -> bool:
        """Wait for something about `lines` or `port`; False when it does not come."""
        with self._said:
            done = self._said.wait_for(
                lambda: ready(self) or self.process.poll() is not None, seconds
            )
        return done and ready(self)

    def wait_for_port(self) -> int:
        if not self.wait_for(lambda served: served.port > 0):
            raise RuntimeError("the server did not start: " + "\n".join(self.lines[-20:]))
        return self.port

    def wait_for_status(self, status: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while json.loads(ask(self.port, "GET", "/")[1])["status"] != status:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the run is not {status} after {seconds:g} s")
            time.sleep(0.02)

    def close(self) -> None:
        end_process(self.process)
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def served(source: str, *extra: str, **environment: str) -> Iterator[Served]:
    """Yield a served run in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        run = Served(folder, source, *extra, **environment)
        try:
            run.wait_for_port()
            yield run
        finally:
            run.close()


def ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    """Return (status, body) of one request on its own connection."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=30)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Child:
    """A process of this file that answers orders: one line of JSON in, one out."""

    def __init__(self, name: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SELF, name, *map(str, arguments)],
            env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self.process.pid

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a child process has died")
        return json.loads(line)

    def order(self, *order: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def ask(self, *order: object) -> Any:
        self.order(*order)
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            end_process(self.process)
        self.process.stdout.close()


@contextlib.contextmanager
def child(name: str, *arguments: object) -> Iterator[Child]:
    process = Child(name, *arguments)
    try:
        yield process
    finally:
        process.close()


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
    with child("_load", port, path, count, seconds, rounds) as load:
        answer = load.read()
    if answer["errors"]:
        raise RuntimeError(f"{answer['errors']} answers to {path} were not 200")
    figures: list[dict[str, float]] = answer["rounds"]
    return figures


# ---------------------------------------------------------------------------
# Streams: a server and a writer that take orders, and a listener on many streams
# ---------------------------------------------------------------------------


class Writer:
    """Commits events to a run and knows when each commit was done."""

    def __init__(self, path: str) -> None:
        self.db = ss.SmithersDb(path)
        self._stamps: dict[int, int] = {}
        self.db.subscribe(self._stamp)  # the first listener: right after the commit
        if self.db.get_run(RUN) is None:
            with self.db.transaction(RUN) as tx:
                tx.insert_run("bench", None, None, "bench", "{}", "{}")
                tx.append_event("RunStarted")

    def _stamp(self, tx: ss.Tx) -> None:
        now = time.monotonic_ns()
        if tx.events:
            self._stamps[tx.events[-1].seq] = now

    def emit(self, count: int, interval: float, per_commit: int = 1) -> dict[int, int]:
        """Commit events; return the last seq of every commit and when, in monotonic ns, it was."""
        self._stamps = {}
        due = time.perf_counter()
        for start in range(0, count, per_commit):
            with self.db.transaction(RUN) as tx:
                for number in range(start, min(start + per_commit, count)):
                    tx.append_event("NodeOutput", nodeId="task", iteration=0, attempt=0,
                                    text=f"line {number}", stream="stdout")  # fmt: skip
            due += interval
            time.sleep(max(0.0, due - time.perf_counter()))
        return self._stamps

    def end(self) -> bool:
        with self.db.transaction(RUN) as tx:
            ss.close_run(tx, "finished", None)
        return True


def obey(writer: Writer) -> int:
    """Carry out orders until standard input ends."""
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        tell(getattr(writer, name)(*arguments))
    return 0


def serve_command(path: str) -> int:
    """Serve a run without an engine; its events are made to order."""
    writer = Writer(path)
    sys.setswitchinterval(0.0005)  # as `up --serve` does
    server = ss.make_server(ss.create_serve_app(adapter=writer.db, run_id=RUN), LOOPBACK, 0)
    server.start()
    tell(server.server_port)
    return obey(writer)


def write_command(path: str) -> int:
    tell(True)
    return obey(Writer(path))


class Client:
    """One stream: what has come, and whether it came in order."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.tail = b""
        self.last = -1
        self.is_in_order = True
        self.has_ended = False
        self.is_open = False


class Listener:
    """Any number of event streams read by one thread."""

    BATCH = 200  # connections opened before their heads are awaited
    ID = re.compile(rb"\nid: (\d+)\n\n")

    def __init__(self, port: int, count: int, after: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self.clients: list[Client] = []
        self.arrivals: list[tuple[int, int]] = []  # (seq, ns), one per client and event
        self.is_stamping = True
        self.began = time.perf_counter()
        request = f"GET /events?afterSeq={after} HTTP/1.1\r\nHost: {LOOPBACK}\r\n\r\n".encode()
        while len(self.clients) < count:
            self._open(min(self.BATCH, count - len(self.clients)), request)

    def _open(self, count: int, request: bytes) -> None:
        fresh = []
        for _ in range(count):
            sock = socket.create_connection((LOOPBACK, self._port), 30)
            sock.send(request)
            sock.setblocking(False)
            client = Client(sock)
            fresh.append(client)
            self._selector.register(sock, selectors.EVENT_READ, client)
        self.clients += fresh
        self.pump(30, lambda: all(client.is_open for client in fresh))

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
                data = key.data.sock.recv(262144)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            self._take(key.data, data, time.monotonic_ns())

    def _take(self, client: Client, data: bytes, now: int) -> None:
        if not data:
            client.has_ended = client.tail.endswith(b"0\r\n\r\n")
            self.drop(client)
            return
        text = client.tail + data
        if not client.is_open:
            client.is_open = b"retry: 1000\n\n" in text
            if not text.startswith(b"HTTP/1.1 200 ") and len(text) > 13:
                raise RuntimeError(f"no stream: {text[:200]!r}")
        cut = text.rfind(b"\n\n") + 2 if b"\n\n" in text else 0
        client.tail = text[cut:]
        ids = [int(number) for number in self.ID.findall(text[:cut])]
        if ids:
            expected = range(client.last + 1, client.last + 1 + len(ids))
            client.is_in_order &= client.last < 0 or ids == list(expected)
            client.last = ids[-1]
            if self.is_stamping:
                self.arrivals.extend((seq, now) for seq in ids)

    def drop(self, client: Client) -> None:
        if client.sock.fileno() >= 0:
            self._selector.unregister(client.sock)
            client.sock.close()

    # Orders

    def wait(self, seq: int, seconds: float) -> dict[str, Any]:
        """Read until every stream has come to `seq`, and say when and how."""
        done = self.pump(seconds, lambda: all(client.last >= seq for client in self.clients))
        in_order = all(client.is_in_order for client in self.clients)
        return {"complete": done, "inOrder": in_order, "seconds": time.perf_counter() - self.began}

    def latency(self, stamps: dict[str, int]) -> dict[str, float]:
        """Return the time from commit to arrival, in ms, over all streams."""
        times = [(ns - stamps[str(seq)]) / 1e6 for seq, ns in self.arrivals if str(seq) in stamps]
        self.arrivals = []
        return {"count": len(times), "max": max(times, default=float("nan")),
                "p50": percentile(times, 0.5), "p99": percentile(times, 0.99)}  # fmt: skip

    def stamp(self, is_stamping: bool) -> bool:
        self.is_stamping = is_stamping
        return True

    def leave(self, count: int) -> int:
        """Drop this many streams without a word."""
        for client in self.clients[:count]:
            self.drop(client)
        del self.clients[:count]
        return count

    def ended(self, seconds: float) -> int:
        """Wait for the streams to end; return how many did so with a proper last chunk."""
        self.pump(seconds, lambda: all(client.sock.fileno() < 0 for client in self.clients))
        return sum(client.has_ended for client in self.clients)

    def obey(self) -> int:
        """Read streams and carry out orders."""
        os.set_blocking(0, False)
        self._selector.register(0, selectors.EVENT_READ, None)
        while True:
            self.read_once(1.0)
            orders = os.read(0, 1 << 24) if self._has_order() else None
            if orders == b"":
                return 0
            while orders and not orders.endswith(b"\n"):
                with contextlib.suppress(BlockingIOError):
                    orders += os.read(0, 1 << 24)
            for line in (orders or b"").splitlines():
                name, *arguments = json.loads(line)
                tell(getattr(self, name)(*arguments))

    @staticmethod
    def _has_order() -> bool:
        import select

        return bool(select.select([0], [], [], 0)[0])


def listen_command(port: str, count: str, after: str) -> int:
    ss.raise_descriptor_limit()
    listener = Listener(int(port), int(count), int(after))
    tell(len(listener.clients))
    return listener.obey()


@contextlib.contextmanager
def bench_server(prefill: int = 0) -> Iterator[tuple[Child, int, str]]:
    """Yield (server process, port, database) over a run that already has some events."""
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        path = os.path.join(folder, "smithers.db")
        if prefill:
            writer = Writer(path)
            writer.emit(prefill - 1, 0.0, 10_000)
            writer.db.close()
        with child("_serve", path) as server:
            yield server, server.read(), path


@contextlib.contextmanager
def listening(port: int, count: int, after: int = -1) -> Iterator[Child]:
    with child("_listen", port, count, after) as listener:
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


class Row(NamedTuple):
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


Bench = Callable[[Options], "list[Row]"]
BENCHES: dict[str, Bench] = {}


def bench(name: str) -> Callable[[Bench], Bench]:
    def register(measure: Bench) -> Bench:
        BENCHES[name] = measure
        return measure

    return register


def load_rows(
    name: str, port: int, path: str, options: Options, rate: float | None = 12_000
) -> list[Row]:
    figures = measure_load(port, path, options.rounds)
    return [
        Row(f"{name}, 64 connections", "/s", [f["rate"] for f in figures], rate, ">"),
        Row(f"{name}, p99", "ms", [f["p99"] for f in figures], 25),
    ]


def measure_route(path: str, options: Options, rate: float | None = 12_000) -> list[Row]:
    with served(GATE_FLOW) as run:
        run.wait_for_status("waiting-approval")
        return load_rows(f"GET {path}", run.port, path, options, rate)


@bench("status")
def bench_status(options: Options) -> list[Row]:
    return measure_route("/", options)


@bench("frames")
def bench_frames(options: Options) -> list[Row]:
    return measure_route("/frames", options)


@bench("metrics")
def bench_metrics(options: Options) -> list[Row]:
    return measure_route("/metrics", options)


@bench("health")
def bench_health(options: Options) -> list[Row]:
    return measure_route("/health", options, None)


def fill_nodes(path: str, nodes: int, events: int) -> None:
    """Make a parked run of many nodes, all finished but its gate."""
    writer = Writer(path)
    writer.db.close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("update _smithers_runs set runtime_owner_id = null")
        db.executemany(
            "insert into _smithers_nodes (run_id, node_id, iteration, state, last_attempt) "
            "values (?, ?, 0, 'finished', 0)",
            ((RUN, f"n{number}") for number in range(nodes)),
        )
        payload = json.dumps({"type": "NodePending", "runId": RUN, "nodeId": "n", "iteration": 0})
        db.executemany(
            "insert into _smithers_events (run_id, seq, type, payload_json) values (?, ?, ?, ?)",
            ((RUN, seq, "NodePending", payload) for seq in range(1, events)),
        )


@bench("status-100k")
def bench_status_100k(options: Options) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        fill_nodes(os.path.join(folder, "smithers.db"), 100_000, 2)
        run = Served(folder, GATE_FLOW, "--resume")
        try:
            run.wait_for_port()
            run.wait_for_status("waiting-approval")
            return load_rows("GET / of 100,000 nodes", run.port, "/", options)
        finally:
            run.close()


@bench("big")
def bench_big(options: Options) -> list[Row]:
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
    return [Row(f"open a file of {what}", "ms", opened, 50),
            Row(f"first GET / of {what}", "ms", answered, 50)]  # fmt: skip


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
    return subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


@bench("peers")
def bench_peers(options: Options) -> list[Row]:
    """The peers that are installed, beside the same measure of ours in the same minute."""
    rows = []
    if has_modules(options.peer, "uvicorn", "starlette"):
        theirs, ours = measure_beside_uvicorn(options)
        ratio = [mine / other for mine, other in zip(ours, theirs)]
        rows += [Row("GET /health, uvicorn+Starlette", "/s", theirs),
                 Row("GET /health, ours", "/s", ours),
                 Row("GET /health, ours to uvicorn+Starlette", "times", ratio, 1, ">")]  # fmt: skip
    if has_modules(options.peer, "dbos"):
        theirs = measure_dbos(options)
        ours = [run_steps("sequence", 200)["ms"] for _ in theirs]
        ratio = [other / mine for mine, other in zip(ours, theirs)]
        rows += [Row("a step, DBOS on sqlite", "ms", theirs), Row("a step, ours", "ms", ours),
                 Row("a step, DBOS to ours", "times", ratio, 1, ">")]  # fmt: skip
    return rows


def measure_beside_uvicorn(options: Options) -> tuple[list[float], list[float]]:
    """Return the rates of uvicorn and of ours, measured in turns."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        with open(os.path.join(folder, "peer_app.py"), "w", encoding="utf-8") as out:
            out.write(PEER_APP)
        process = subprocess.Popen(
            [options.peer, "-m", "uvicorn", "peer_app:app", "--port", str(port),
             "--log-level", "error", "--no-access-log"], cwd=folder,
        )  # fmt: skip
        try:
            wait_for_answer(port, "/health")
            with served(GATE_FLOW) as run:
                run.wait_for_status("waiting-approval")
                pairs = [(measure_load(port, "/health", 1)[0]["rate"],
                          measure_load(run.port, "/health", 1)[0]["rate"])
                         for _ in range(options.rounds)]  # fmt: skip
        finally:
            end_process(process)
    return [theirs for theirs, _ in pairs], [ours for _, ours in pairs]


def measure_dbos(options: Options) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        script = os.path.join(folder, "peer_steps.py")
        with open(script, "w", encoding="utf-8") as out:
            out.write(PEER_STEPS)
        argv = [options.peer, script, os.path.join(folder, "dbos.sqlite"), str(options.rounds)]
        done = subprocess.run(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=120, check=True)  # fmt: skip
        figures: list[float] = json.loads(done.stdout.splitlines()[-1])
        return figures


def wait_for_answer(port: int, path: str, seconds: float = 20.0) -> float:
    """Ask until there is a 200; return perf_counter of that moment."""
    request = f"GET {path} HTTP/1.1\r\nHost: {LOOPBACK}\r\nConnection: close\r\n\r\n".encode()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), 5) as sock:
            sock.sendall(request)
            if sock.recv(4096).startswith(b"HTTP/1.1 200 "):
                return time.perf_counter()
        time.sleep(0.002)
    raise RuntimeError(f"no answer to {path} within {seconds:g} s")


# Streams


@bench("live")
def bench_live(options: Options) -> list[Row]:
    rows = []
    for clients, target in ((1, 10), (1000, 50)):
        figures = [measure_live(clients, False) for _ in range(options.rounds)]
        rows += live_rows(f"live event, {clients:,} client{'s'[: clients - 1]}", figures, target)
    figures = [measure_live(1, True) for _ in range(options.rounds)]
    return rows + live_rows("live event of another process", figures, 100)


def live_rows(name: str, figures: list[dict[str, float]], target: float) -> list[Row]:
    return [Row(f"{name}, p50", "ms", [f["p50"] for f in figures]),
            Row(f"{name}, p99", "ms", [f["p99"] for f in figures], target)]  # fmt: skip


def measure_live(clients: int, elsewhere: bool) -> dict[str, float]:
    with bench_server() as (server, port, path), listening(port, clients) as listener:
        with child("_write", path) if elsewhere else contextlib.nullcontext(server) as writer:
            if elsewhere:
                writer.read()
            stamps = writer.ask("emit", 60, 0.03)
        check(listener.ask("wait", 60, 10.0), "live")
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
def bench_replay(options: Options) -> list[Row]:
    events = 100_000
    rates: dict[int, list[float]] = {1: [], 10: []}
    with bench_server(prefill=events) as (server, port, _):
        for _ in range(options.rounds):
            for clients, figures in rates.items():
                with listening(port, clients) as listener:
                    seconds = check(listener.ask("wait", events - 1, 60.0), "replay")
                figures.append(events * clients / seconds)
    return [Row(f"replay of 100,000 events, {clients} at once", "/s", figures, 100_000, ">")
            for clients, figures in rates.items()]  # fmt: skip


@bench("streams")
def bench_streams(options: Options) -> list[Row]:
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
            server.ask("end")
            properly = listener.ask("ended", 30.0)
        after = settle(server.pid, before)
    return [
        Row("5,000 idle streams, threads", "", [during.threads], 64),
        Row("5,000 idle streams, memory", "MiB", [during.rss], 150),
        Row("5,000 idle streams, share of a core", "%", [idle], 5),
        Row("one event at all of 5,000 streams", "ms", reach, 250),
        Row("200 events at all, once and in order: streams", "", [count], count, ">"),
        Row("streams that ended properly, of 2,500", "", [properly], count - count // 2, ">"),
        Row("threads left behind", "", [after.threads - before.threads], 1),
        Row("descriptors left behind", "", [after.descriptors - before.descriptors], 8),
        Row("memory left behind", "MiB", [after.rss - before.rss], 20),
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
def bench_slow_reader(options: Options) -> list[Row]:
    """200 streams that read beside one that never does, over 100,000 events."""
    events = 100_000
    with bench_server() as (server, port, _), listening(port, 200) as listener:
        listener.ask("stamp", False)
        with socket.create_connection((LOOPBACK, port)) as lazy:
            lazy.sendall(f"GET /events HTTP/1.1\r\nHost: {LOOPBACK}\r\n\r\n".encode())
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
        Row("one reads nothing: memory over 100,000 events", "MiB", [sizes[2] - sizes[0]], 40),
        Row("one reads nothing: of that, over the last 50,000", "MiB", [sizes[2] - sizes[1]], 4),
        Row("one reads nothing: deliveries to 200 others", "/s", [200 * events / took]),
        Row("one reads nothing: live p99 of 200 others", "ms", [latency["p99"]], 50),
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
def bench_churn(options: Options) -> list[Row]:
    """1,000 clients come and go for a minute; each must see every event once."""

    async def meet(port: int, server: Child) -> tuple[list[Comer], int]:
        comers = [Comer(port, seed) for seed in range(1000)]
        tasks = [asyncio.ensure_future(comer.follow()) for comer in comers]
        loop = asyncio.get_running_loop()
        stamps = await loop.run_in_executor(None, server.ask, "emit", 1200, 0.05)
        await loop.run_in_executor(None, server.ask, "end")
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
        return comers, max(map(int, stamps)) + 2  # and the two events of the end

    with bench_server() as (server, port, _):
        comers, newest = asyncio.run(meet(port, server))
    missed = sum(newest - comer.last for comer in comers)
    return [
        Row("1,000 clients drop and come back: visits", "", [sum(c.visits for c in comers)]),
        Row("events they missed or got twice", "", [missed + sum(c.wrong for c in comers)], 0),
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
    with child("_steps", kind, count) as process:
        figure: dict[str, float] = process.read()
        return figure


@bench("steps")
def bench_steps(options: Options) -> list[Row]:
    plan = (("sequence", 200, 0.5), ("sequence", 1000, 0.5), ("parallel", 1000, 0.3),
            ("loop", 1000, 0.5))  # fmt: skip
    rows = []
    for kind, count, target in plan:
        figures = [run_steps(kind, count)["ms"] for _ in range(options.rounds)]
        rows.append(Row(f"a step, {count:,} in a {kind}", "ms", figures, target))
    fsyncs = [fsync_ms() for _ in range(max(3, options.rounds))]
    return [*rows, Row("one fsync of 4 KiB here; a step in a row holds one", "ms", fsyncs)]


@bench("flat")
def bench_flat(options: Options) -> list[Row]:
    """What a task of 10,000 costs, against a task of 100."""
    rows = []
    for kind in ("sequence", "parallel", "loop"):
        few = [run_steps(kind, 100) for _ in range(max(3, options.rounds))]
        many = [run_steps(kind, 10_000) for _ in range(max(1, options.rounds // 2))]
        for key, what in (("ms", "time"), ("bytes", "bytes")):
            base = statistics.median(f[key] for f in few)
            ratios = [f[key] / base for f in many]
            rows.append(Row(f"{what} a task, 10,000 to 100, {kind}", "times", ratios, 1.5))
        rows.append(Row(f"a step, 10,000 in a {kind}", "ms", [f["ms"] for f in many]))
    return rows


# Start, size and idling


@bench("start")
def bench_start(options: Options) -> list[Row]:
    times = [measure_start() for _ in range(2 * options.rounds + 1)]
    return [Row("start to first answer", "ms", times[1:], 250)]


def measure_start() -> float:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        run = Served(folder, GATE_FLOW, "--port", str(port))
        try:
            return 1000 * (wait_for_answer(port, "/") - run.started_at)
        finally:
            run.close()


@bench("import")
def bench_import(options: Options) -> list[Row]:
    code = (
        "import time; began = time.perf_counter(); import smithers_serve; "
        "print(1000 * (time.perf_counter() - began))"
    )
    argv = [sys.executable, "-c", code]
    times = [
        float(subprocess.run(argv, env=child_environment(), stdout=subprocess.PIPE).stdout)
        for _ in range(2 * options.rounds + 1)
    ]
    return [Row("import", "ms", times[1:], 100)]


@bench("idle")
def bench_idle(options: Options) -> list[Row]:
    with served(GATE_FLOW) as run:
        run.wait_for_status("waiting-approval")
        time.sleep(0.5)
        memory = vitals(run.pid).rss
        shares = [cpu_share(run.pid, 5.0 / options.rounds + 0.5) for _ in range(options.rounds)]
        return [Row("memory, parked at a gate", "MiB", [memory], 30),
                Row("share of a core, parked at a gate", "%", shares, 1)]  # fmt: skip


@bench("busy")
def bench_busy(options: Options) -> list[Row]:
    """The status while a Python task in the same process computes."""
    rows = []
    for count in (8, 64):
        with served(BUSY_FLOW) as run:
            run.wait_for(lambda served: any("spin started" in line for line in served.lines))
            figures = measure_load(run.port, "/", options.rounds, count)
        name = f"GET / while a task computes, {count} connections"
        rows += [Row(f"{name}, p99", "ms", [f["p99"] for f in figures], 100),
                 Row(name, "/s", [f["rate"] for f in figures])]  # fmt: skip
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


def show_row(row: Row) -> str:
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
    rows: list[Row] = []
    for name in arguments.names or BENCHES:
        rows += measure_and_show(name, options, not arguments.json)
    if arguments.json:
        print(json.dumps({"machine": facts, "rows": [row.to_json() for row in rows]}, indent=1))
    return 0 if all(row.is_reached is not False for row in rows) else 1


def measure_and_show(name: str, options: Options, is_shown: bool) -> list[Row]:
    began = time.monotonic()
    try:
        rows = BENCHES[name](options)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        rows = [Row(f"{name}: {type(error).__name__}: {error}"[:200], "", [float("nan")], 0)]
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
        self.seen: list[tuple[int, str]] = []
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
            with contextlib.suppress(OSError, http.client.HTTPException, ss.SmithersError):
                step()

    def _follow(self) -> None:
        if not self.port or self.has_ended:
            return
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=5)
        headers = {"Last-Event-ID": str(self.seen[-1][0])} if self.seen else {}
        try:
            connection.request("GET", "/events", headers=headers)
            response = connection.getresponse()
            self.reconnects += 1
            self.has_ended = response.status == 204
            payload = ""
            for line in iter(response.readline, b""):
                if line.startswith(b"data: "):
                    payload = line[6:-1].decode("utf-8")
                elif line.startswith(b"id: "):
                    self._take(int(line[4:]), payload)
        finally:
            connection.close()

    def _take(self, seq: int, payload: str) -> None:
        self.seen.append((seq, payload))
        event = json.loads(payload)
        gate = (event.get("nodeId"), event.get("iteration"))
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
                body = json.dumps({"iteration": iteration, "decidedBy": "watcher"})
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

    def __init__(self, log: list[tuple[int, str]]) -> None:
        self.status = ""
        self.nodes: dict[tuple[str, int], str] = {}
        self.attempts: dict[tuple[str, int, int], str] = {}
        self.gates: dict[tuple[str, int], str] = {}
        self.frames: list[tuple[int, str]] = []
        for _, payload in log:
            self._fold(json.loads(payload))

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


def inspect(path: str, effects: str, seen: list[tuple[int, str]]) -> list[str]:
    """Return what is wrong with a run's file, its side effects and what a client saw."""
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as db:
        db.execute("begin")
        read = db.execute
        sound = read("pragma integrity_check").fetchone()[0]
        log = read("select seq, payload_json from _smithers_events order by seq").fetchall()
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


def has_ended(run: Served) -> bool:
    return any("Server still running" in line for line in run.lines)


class Crash:
    """One workflow run, killed at random moments until it finishes."""

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
        run = Served(self.folder, CRASH_FLOW, *resume, CRASH_EFFECTS=self.effects)
        try:
            if self._run_until_moment(run, may_kill):
                run.process.send_signal(signal.SIGKILL)
                run.process.wait()
                self.kills += 1
                seen = list(self.watcher.seen)
                self.wrong += inspect(self.path, self.effects, seen) if self._has_run() else []
                return False
            self._check_end(run)
            return True
        finally:
            run.close()
            self.watcher.port = 0

    def _has_run(self) -> bool:
        if not os.path.exists(self.path):
            return False
        try:
            with contextlib.closing(sqlite3.connect(self.path)) as db:
                return bool(db.execute("select count(*) from _smithers_runs").fetchone()[0])
        except sqlite3.OperationalError:  # killed before the tables were there
            return False

    def _run_until_moment(self, run: Served, may_kill: bool) -> bool:
        """Wait for a moment to kill in; False when the run has finished before."""
        if may_kill and self.chance.random() < 0.4:
            self.moments["while starting"] += 1
            time.sleep(self.chance.uniform(0, 0.35))
            return True
        run.wait_for_port()
        self.watcher.port = run.port
        lines = self.chance.randint(2, 30) if may_kill else 10**9
        run.wait_for(lambda served: len(served.lines) >= lines or has_ended(served), 60)
        if not may_kill or has_ended(run):
            return False
        self.moments["after a line"] += 1
        time.sleep(self.chance.choice((0.0, self.chance.uniform(0, 0.02))))
        return True

    def _check_end(self, run: Served) -> None:
        if not run.wait_for(has_ended, 60):
            self.wrong.append("a life ended without a finished run: " + " / ".join(run.lines[-8:]))
            return
        deadline = time.monotonic() + 10
        while not self.watcher.has_ended and time.monotonic() < deadline:
            time.sleep(0.01)
        self.wrong += inspect(self.path, self.effects, list(self.watcher.seen))
        with contextlib.closing(ss.SmithersDb(self.path)) as db:
            log = [(event.seq, event.payload_json) for event in db.list_events(RUN)]
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

    def __init__(self, run: Served, seed: int) -> None:
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
            status = ask(self.run.port, "GET", "/health")[0]
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
        with socket.create_connection((LOOPBACK, self.run.port), 5) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
            print("\n".join(run.lines[-100:]))
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
