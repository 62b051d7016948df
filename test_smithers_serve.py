"""The specification of smithers_serve as tests: real sockets, real processes, real databases.

python3 -m unittest                      every test, nothing to install
python3 test_smithers_serve.py bench     measure (also: crash N, fuzz SECONDS)
"""

from __future__ import annotations

import argparse
import atexit
import concurrent.futures
import contextlib
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
import selectors
import shutil
import signal
import socket
import sqlite3
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import smithers_serve as ss
from smithers_serve import Approval, Ctx, Loop, Parallel, Sequence, SmithersDb, Task, Workflow

SELF = os.path.abspath(__file__)
HERE = os.path.dirname(SELF)
PATIENCE = 20.0  # seconds until a test gives up on an event; no test waits for time to pass

# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------


def one() -> int:
    return 1


def fail() -> None:
    raise ValueError("broken")


def wait_for_flag() -> str:
    ss.current_task().cancelled.wait(PATIENCE)
    return "stopped"


async def sleep_in_coroutine() -> None:
    import asyncio

    await asyncio.sleep(PATIENCE)


class DatabaseCase(unittest.TestCase):
    """A folder and a database per test, and short ways to run a workflow and look at it."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.path = os.path.join(self.folder, "smithers.db")
        self.db = SmithersDb(self.path)
        self.addCleanup(self.db.close)

    def run_tree(self, *children: Any, run_id: str = "run", **options: Any) -> ss.RunResult:
        return self.run_workflow(Workflow("test", *children), run_id=run_id, **options)

    def run_workflow(self, workflow: Any, run_id: str = "run", **options: Any) -> ss.RunResult:
        return ss.run_workflow(workflow, adapter=self.db, run_id=run_id, **options)

    def start(self, workflow: Any, run_id: str = "run", **options: Any) -> Background:
        background = Background(self.db, workflow, run_id, **options)
        self.addCleanup(background.stop)
        return background

    def states(self, run_id: str = "run") -> dict[str, str]:
        """Return the state of every node by `id` or `id#iteration`."""
        nodes = self.db.list_nodes(run_id)
        return {n.node_id + (f"#{n.iteration}" if n.iteration else ""): n.state for n in nodes}

    def events(self, *types: str, run_id: str = "run") -> list[dict[str, Any]]:
        """Return the payloads of the log, of these types only; the log must have no gap."""
        events = self.db.list_events(run_id)
        self.assertEqual([event.seq for event in events], list(range(len(events))))
        return [event.payload for event in events if not types or event.type in types]

    def order(self, *types: str, run_id: str = "run") -> list[tuple[str, str]]:
        return [(e["type"], e["nodeId"]) for e in self.events(*types, run_id=run_id)]

    def output(self, node_id: str, iteration: int | None = None, run_id: str = "run") -> Any:
        found = self.db.find_output(run_id, node_id, iteration)
        return None if found is None else json.loads(found)

    def error(self, node_id: str, run_id: str = "run") -> dict[str, Any]:
        return dict(json.loads(self.db.find_error(run_id, node_id, 0) or "{}"))

    def run_row(self, run_id: str = "run") -> ss.Run:
        run = self.db.get_run(run_id)
        assert run is not None
        return run


class Background:
    """An engine in a thread of the test, and a way to wait for an event of its log."""

    def __init__(self, db: SmithersDb, workflow: Any, run_id: str, **options: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self.abort = threading.Event()
        self._db, self._run_id = db, run_id
        self.result: ss.RunResult | None = None
        self.error: BaseException | None = None
        arguments = {"abort": self.abort, "on_event": self._take, **options}
        self.thread = threading.Thread(target=self._run, args=(workflow, arguments), daemon=True)
        self.thread.start()

    def _run(self, workflow: Any, arguments: dict[str, Any]) -> None:
        try:
            self.result = ss.run_workflow(
                workflow, adapter=self._db, run_id=self._run_id, **arguments
            )
        except ss.SmithersError as error:
            self.error = error
        with self._changed:
            self._changed.notify_all()

    def _take(self, event: ss.Event) -> None:
        with self._changed:
            self.seen.append(event.payload)
            self._changed.notify_all()

    def wait_for(self, type: str, node_id: str | None = None, **fields: Any) -> dict[str, Any]:
        """Return the first event of this type (and node, and fields) once it is committed."""
        wanted = {"type": type, **fields}
        if node_id is not None:
            wanted["nodeId"] = node_id

        def find() -> list[dict[str, Any]]:
            return [e for e in self.seen if all(e.get(k) == v for k, v in wanted.items())]

        with self._changed:
            if not self._changed.wait_for(find, PATIENCE):
                raise AssertionError(f"no event {wanted} in {self.seen}")
            return find()[0]

    def wait_for_end(self) -> ss.RunResult:
        self.thread.join(PATIENCE)
        assert self.result is not None, self.error
        return self.result

    def stop(self) -> None:
        self.abort.set()
        self.thread.join(PATIENCE)


# ---------------------------------------------------------------------------
# Authoring
# ---------------------------------------------------------------------------


class AuthoringTest(DatabaseCase):
    """A mistake in a workflow fails the run at render, with its code and the id it is about."""

    def refused(self, workflow: Any) -> tuple[str, str]:
        """Return (code, message) of a run that failed before anything started."""
        result = self.run_workflow(workflow, run_id=f"run-{os.urandom(4).hex()}")
        self.assertEqual(result.status, "failed")
        assert result.error is not None
        self.assertEqual(self.events("NodeStarted", run_id=result.run_id), [])
        self.assertEqual(json.loads(self.run_row(result.run_id).error_json or ""), result.error)
        return result.error["code"], result.error["message"]

    def test_each_mistake_has_its_code_and_names_the_id(self) -> None:
        mistakes: list[tuple[str, str, Callable[[], Any]]] = [
            ("DUPLICATE_ID", "'a'", lambda: (Task("a", one), Task("a", one))),
            ("DUPLICATE_ID", "'a'", lambda: (Task("a", one), Loop(id="a", until=True))),
            ("INVALID_ID", "'a b'", lambda: Task("a b", one)),
            ("INVALID_ID", "''", lambda: Task("", one)),
            ("INVALID_ID", "x" * 129, lambda: Approval("x" * 129)),
            ("UNKNOWN_DEPENDENCY", "'ghost'", lambda: Task("a", one, needs=["ghost"])),
            ("CYCLIC_DEPENDENCY", "'a'", lambda: Task("a", one, needs=["a"])),
            ("INVALID_ARGUMENT", "'a'", lambda: Task("a", one, retries=-1)),
            ("INVALID_ARGUMENT", "'a'", lambda: Task("a", one, retries=True)),
            ("INVALID_ARGUMENT", "'a'", lambda: Task("a", one, timeout=0)),
            ("INVALID_ARGUMENT", "'a'", lambda: Task("a", one, backoff="random")),
            ("INVALID_ARGUMENT", "'a'", lambda: Task("a", one, retry_delay=float("nan"))),
            ("INVALID_ARGUMENT", "'a'", lambda: Task("a", 5)),
            ("INVALID_ARGUMENT", "'a'", lambda: Task("a", [])),
            ("INVALID_ARGUMENT", "'a'", lambda: Task("a", {"x": {1, 2}})),
            ("INVALID_ARGUMENT", "'a'", lambda: Task("a", ["ls"], kwargs={"x": 1})),
            ("INVALID_ARGUMENT", "'a'", lambda: Task("a", one, needs="b")),
            ("INVALID_ARGUMENT", "'g'", lambda: Approval("g", on_deny="maybe")),
            ("INVALID_ARGUMENT", "'g'", lambda: Approval("g", on_timeout="maybe")),
            ("INVALID_ARGUMENT", "'l'", lambda: Loop(id="l", until=1)),  # type: ignore[arg-type]
            ("INVALID_ARGUMENT", "'l'", lambda: Loop(id="l", until=False, max_iterations=0)),
            ("INVALID_TREE", "False", lambda: False),
        ]
        for code, name, make in mistakes:
            with self.subTest(code=code, name=name):
                got = self.refused(lambda ctx, make=make: Workflow("w", make()))
                self.assertEqual(got[0], code, got)
                self.assertIn(name, got[1])

    def test_waiting_for_a_later_sibling_is_a_cycle(self) -> None:
        code, message = self.refused(Workflow("w", Task("a", one, needs=["b"]), Task("b", one)))
        self.assertEqual(code, "CYCLIC_DEPENDENCY")
        self.assertIn("'a'", message)

    def test_parallel_tasks_that_need_each_other_are_a_cycle(self) -> None:
        tasks = Task("a", one, needs=["b"]), Task("b", one, needs=["a"])
        self.assertEqual(self.refused(Workflow("w", Parallel(*tasks)))[0], "CYCLIC_DEPENDENCY")

    def test_a_render_that_raises_fails_the_run(self) -> None:
        code, message = self.refused(lambda ctx: Workflow("w", ctx.input["missing"]))
        self.assertEqual((code, "KeyError" in message), ("RENDER_FAILED", True))

    def test_a_render_must_return_a_workflow(self) -> None:
        self.assertEqual(self.refused(lambda ctx: [Task("a", one)])[0], "INVALID_TREE")

    def test_none_children_are_dropped(self) -> None:
        self.run_tree(None, Task("a", one), Parallel(None, *[Task(f"f{i}", one) for i in range(3)]))
        self.assertEqual(set(self.states()), {"a", "f0", "f1", "f2"})

    def test_needs_by_name_pass_the_output(self) -> None:
        def double(x: int, y: int) -> int:
            return x * y

        task = Task("b", double, kwargs={"y": 21}, needs={"x": "a"})
        self.run_tree(Parallel(task, Task("a", lambda: 2)))
        self.assertEqual(self.output("b"), 42)

    def test_a_task_knows_its_place(self) -> None:
        def tell() -> list[Any]:
            task = ss.current_task()
            return [task.run_id, task.node_id, task.iteration, task.attempt, task.idempotency_key]

        self.run_tree(Task("a", tell))
        self.assertEqual(self.output("a"), ["run", "a", 0, 0, "run:a:0"])

    def test_current_task_outside_of_a_task_is_an_error(self) -> None:
        self.assertRaises(RuntimeError, ss.current_task)

    def test_a_workflow_function_can_be_called_in_a_unit_test(self) -> None:
        def workflow(ctx: Ctx) -> Workflow:
            return Workflow("w", Task("a", one) if ctx.output("x") is None else None)

        self.assertEqual(len(workflow(Ctx("run", {})).children), 1)


# ---------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------


class ScheduleTest(DatabaseCase):
    """What runs when, and how often the workflow function is called."""

    def test_children_of_a_workflow_run_in_order(self) -> None:
        self.run_tree(Task("a", one), Sequence(Task("b", one), Task("c", one)), Task("d", one))
        expected = [(t, n) for n in "abcd" for t in ("NodeStarted", "NodeFinished")]
        self.assertEqual(self.order("NodeStarted", "NodeFinished"), expected)

    def test_parallel_tasks_are_in_flight_together(self) -> None:
        barrier = threading.Barrier(3, timeout=PATIENCE)
        tasks = [Task(f"t{i}", lambda: barrier.wait() >= 0) for i in range(3)]
        self.assertEqual(self.run_tree(Parallel(*tasks)).status, "finished")

    def test_max_concurrency_of_a_parallel_holds(self) -> None:
        lock, running, most = threading.Lock(), [0], [0]

        def work() -> None:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            threading.Event().wait(0.01)
            with lock:
                running[0] -= 1

        tasks = [Task(f"t{i}", work) for i in range(12)]
        self.run_tree(Parallel(*tasks, max_concurrency=2), max_concurrency=8)
        self.assertEqual(most[0], 2)

    def test_a_loop_runs_until_its_condition_holds(self) -> None:
        def workflow(ctx: Ctx) -> Workflow:
            done = (ctx.output("n") or 0) >= 2
            body = Task("n", lambda: ss.current_task().iteration)
            return Workflow("w", Loop(body, id="l", until=done, max_iterations=9), Task("z", one))

        self.run_workflow(workflow)
        self.assertEqual(set(self.states()), {"n", "n#1", "n#2", "z"})

    def test_a_loop_at_its_end_returns_its_last_iteration(self) -> None:
        self.run_tree(Loop(Task("a", one), id="l", until=False, max_iterations=3), Task("z", one))
        self.assertEqual(set(self.states()), {"a", "a#1", "a#2", "z"})

    def test_a_loop_may_fail_at_its_end(self) -> None:
        loop = Loop(Task("a", one), id="l", until=False, max_iterations=2, on_max="fail")
        result = self.run_tree(loop)
        assert result.error is not None
        self.assertEqual((result.status, result.error["code"]), ("failed", "LOOP_EXHAUSTED"))

    def test_an_inner_loop_carries_the_outer_iteration(self) -> None:
        inner = Loop(Task("b", one), id="inner", until=False, max_iterations=2)
        self.run_tree(Loop(inner, id="outer", until=False, max_iterations=2))
        self.assertEqual(
            set(self.states()), {"b@@outer=0", "b@@outer=0#1", "b@@outer=1", "b@@outer=1#1"}
        )

    def test_output_in_an_inner_loop_is_the_current_outer_one(self) -> None:
        seen = []

        def workflow(ctx: Ctx) -> Workflow:
            seen.append((ctx.iteration("outer"), ctx.output("b")))
            body = Task("b", lambda: ss.current_task().node_id)
            inner = Loop(body, id="inner", until=False, max_iterations=1)
            return Workflow("w", Loop(inner, id="outer", until=False, max_iterations=2))

        self.run_workflow(workflow)
        self.assertIn((1, None), seen)
        self.assertIn((1, "b@@outer=1"), seen)
        self.assertNotIn((1, "b@@outer=0"), seen)

    def test_a_skipped_task_lets_the_next_one_run(self) -> None:
        self.run_tree(Task("a", one, skip_if=True), Approval("g", skip_if=True), Task("b", one))
        self.assertEqual(self.states(), {"a": "skipped", "g": "skipped", "b": "finished"})

    def test_a_task_that_may_fail_lets_the_run_go_on(self) -> None:
        result = self.run_tree(Task("a", fail, continue_on_fail=True), Task("b", one))
        self.assertEqual((result.status, self.states()["a"]), ("finished", "failed"))

    def test_the_function_is_called_again_only_when_it_read_what_changed(self) -> None:
        calls = []

        def workflow(ctx: Ctx) -> Workflow:
            calls.append(ctx.output("b"))
            return Workflow("w", *[Task(i, one) for i in "abcd"])

        self.run_workflow(workflow)
        self.assertEqual(calls, [None, 1])

    def test_a_frame_is_stored_only_when_the_tree_differs(self) -> None:
        def workflow(ctx: Ctx) -> Workflow:
            more = ctx.output("b") is not None
            return Workflow("w", Task("a", one), Task("b", one), Task("c", one) if more else None)

        self.run_workflow(workflow)
        frames = self.db.list_frames("run", 10, -1)
        self.assertEqual([f.frame_no for f in frames], [1, 2])
        self.assertEqual(frames[1].mounted_task_ids_json, '["a::0","b::0","c::0"]')
        self.assertEqual(json.loads(frames[0].task_index_json)[1]["nodeId"], "b")
        for frame in frames:
            digest = hashlib.sha256(frame.xml_json.encode("utf-8")).hexdigest()
            self.assertEqual(frame.xml_hash, digest)
            self.assertEqual(json.loads(frame.xml_json)["tag"], "smithers:workflow")

    def test_a_frame_shows_an_approval_as_a_deciding_task(self) -> None:
        self.run_tree(Approval("g", skip_if=True))
        tree = json.loads(self.db.list_frames("run", 1)[0].xml_json)
        props = tree["children"][0]["props"]
        self.assertEqual(list(props), sorted(props))
        self.assertEqual((props["needsApproval"], props["approvalMode"]), ("true", "decision"))

    def test_endless_rendering_is_stopped_and_named(self) -> None:
        def workflow(ctx: Ctx) -> Workflow:
            count = next((i for i in range(500) if ctx.state(f"s{i}") is None), 500)
            return Workflow("w", *[Task(f"s{i}", one, skip_if=True) for i in range(count + 1)])

        result = self.run_workflow(workflow)
        assert result.error is not None
        self.assertEqual(result.error["code"], "RENDER_LOOP")
        self.assertRegex(result.error["message"], r"s\d+")

    def test_a_task_that_leaves_the_tree_is_cancelled(self) -> None:
        def workflow(ctx: Ctx) -> Workflow:
            slow = Task("slow", wait_for_flag) if ctx.output("a") is None else None
            return Workflow("w", Parallel(Task("a", one), slow))

        self.assertEqual(self.run_workflow(workflow).status, "finished")
        self.assertEqual(self.states()["slow"], "cancelled")

    def test_ten_thousand_skipped_tasks_need_no_deep_stack(self) -> None:
        tasks = [Task(f"t{i}", one, skip_if=True) for i in range(3000)]
        self.assertEqual(self.run_tree(*tasks).status, "finished")


# ---------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------


class RunningTest(DatabaseCase):
    """Attempts, failures, timeouts, cancel."""

    def test_the_log_begins_and_ends_with_the_run(self) -> None:
        self.run_tree(Task("a", one))
        types = [event["type"] for event in self.events()]
        self.assertEqual(types[:2], ["RunStarted", "RunStatusChanged"])
        self.assertEqual(types[-2:], ["RunStatusChanged", "RunFinished"])

    def test_event_keys_come_in_the_original_order(self) -> None:
        self.run_tree(Task("a", fail, continue_on_fail=True))
        (failed,) = self.events("NodeFailed")
        keys = ["type", "runId", "nodeId", "iteration", "attempt", "error", "timestampMs"]
        self.assertEqual(list(failed), keys)
        self.assertEqual(failed["error"], {"name": "ValueError", "message": "broken"})

    def test_a_failing_task_is_tried_as_often_as_allowed(self) -> None:
        self.run_tree(Task("a", fail, retries=2))
        attempts = [(a.attempt, a.state) for a in self.db.list_attempts("run")]
        self.assertEqual(attempts, [(0, "failed"), (1, "failed"), (2, "failed")])
        self.assertEqual([e["attempt"] for e in self.events("NodeRetrying")], [1, 2])

    def test_backoff_gives_the_delay_of_each_retry(self) -> None:
        def delays(backoff: str) -> list[float]:
            task = Task("a", one, retry_delay=2.0, backoff=backoff)
            return [task.retry_delay_after(n) for n in (1, 2, 3)]

        self.assertEqual(delays("fixed"), [2, 2, 2])
        self.assertEqual(delays("linear"), [2, 4, 6])
        self.assertEqual(delays("exponential"), [2, 4, 8])

    def test_after_a_failure_nothing_new_starts_and_the_rest_drains(self) -> None:
        release = threading.Event()

        def fail_then_release() -> None:
            raise ValueError("broken")

        tree = Parallel(
            Sequence(Task("bad", fail_then_release), Task("never", one)),
            Sequence(Task("slow", lambda: release.wait(PATIENCE)), Task("next", one)),
        )
        running = self.start(Workflow("w", tree))
        running.wait_for("NodeFailed", "bad")
        release.set()
        result = running.wait_for_end()
        assert result.error is not None
        self.assertEqual(result.error["message"], "Task(s) failed: bad")
        expected = {"bad": "failed", "never": "pending", "slow": "finished", "next": "pending"}
        self.assertEqual(self.states(), expected)

    def test_a_command_tells_its_lines_and_its_output(self) -> None:
        self.run_tree(Task("c", ["sh", "-c", "echo out; echo err >&2"]))
        lines = {(e["stream"], e["text"]) for e in self.events("NodeOutput")}
        self.assertEqual(lines, {("stdout", "out"), ("stderr", "err")})
        self.assertEqual(self.output("c"), {"exitCode": 0, "stdout": "out\n", "stderr": "err\n"})

    def test_a_command_with_another_exit_code_fails(self) -> None:
        self.run_tree(Task("c", ["sh", "-c", "echo why >&2; exit 3"]))
        error = self.error("c")
        self.assertEqual(error["code"], "COMMAND_FAILED")
        self.assertIn("exited with code 3: why", error["message"])

    def test_a_command_does_not_see_the_token(self) -> None:
        os.environ["SMITHERS_API_KEY"] = "sk-hidden"
        self.addCleanup(os.environ.pop, "SMITHERS_API_KEY", None)
        self.run_tree(Task("c", ["env"]))
        self.assertNotIn("sk-hidden", self.output("c")["stdout"])

    def test_a_missing_command_fails_without_a_path(self) -> None:
        self.run_tree(Task("c", ["/nowhere/at/all/tool"]))
        self.assertIn("No such file", self.error("c")["message"])
        self.assertNotIn("/nowhere", self.error("c")["message"])

    def test_an_output_that_is_not_json_fails_the_task(self) -> None:
        for value in ({1, 2}, float("nan"), "\ud800", object()):
            with self.subTest(value=repr(value)):
                run_id = f"run-{os.urandom(4).hex()}"
                self.run_tree(Task("a", lambda value=value: value), run_id=run_id)
                self.assertEqual(self.error("a", run_id)["code"], "OUTPUT_NOT_JSON")

    def test_an_output_over_a_mebibyte_fails_the_task(self) -> None:
        self.run_tree(Task("a", lambda: "x" * (1 << 20)))
        self.assertEqual(self.error("a")["code"], "OUTPUT_TOO_LARGE")

    def test_printing_without_end_fails_the_task(self) -> None:
        patch_constant(self, "MAX_LOG_BYTES", 100_000)
        self.run_tree(Task("c", ["sh", "-c", "while true; do echo " + "x" * 500 + "; done"]))
        self.assertEqual(self.error("c")["code"], "OUTPUT_LIMIT")

    def test_a_timeout_stops_commands_coroutines_and_functions(self) -> None:
        runs = {"cmd": ["sleep", "60"], "co": sleep_in_coroutine, "fn": wait_for_flag}
        tasks = [Task(id, run, timeout=0.1, continue_on_fail=True) for id, run in runs.items()]
        self.assertEqual(self.run_tree(Parallel(*tasks)).status, "finished")
        self.assertEqual({self.error(id)["code"] for id in runs}, {"TASK_TIMEOUT"})

    def test_work_that_ignores_its_timeout_is_never_tried_again(self) -> None:
        patch_constant(self, "STOP_GRACE_SECONDS", 0.1)
        release = threading.Event()
        self.addCleanup(release.set)
        self.run_tree(Task("a", lambda: release.wait(PATIENCE), timeout=0.05, retries=3))
        self.assertEqual(len(self.db.list_attempts("run")), 1)
        self.assertEqual(self.error("a")["code"], "TASK_TIMEOUT")

    def test_cancel_stops_commands_coroutines_and_functions(self) -> None:
        runs = {"cmd": ["sleep", "60"], "co": sleep_in_coroutine, "fn": wait_for_flag}
        running = self.start(Workflow("w", Parallel(*[Task(i, r) for i, r in runs.items()])))
        for id in runs:
            running.wait_for("NodeStarted", id)
        ss.cancel_run(self.db, "run")
        self.assertEqual(running.wait_for_end().status, "cancelled")
        self.assertEqual(set(self.states().values()), {"cancelled"})
        self.assertEqual({a.state for a in self.db.list_attempts("run")}, {"cancelled"})
        self.assertEqual(self.events()[-1]["type"], "RunCancelled")

    def test_a_late_result_after_cancel_is_dropped(self) -> None:
        patch_constant(self, "STOP_GRACE_SECONDS", 0.05)
        release = threading.Event()
        running = self.start(Workflow("w", Task("a", lambda: release.wait(PATIENCE))))
        running.wait_for("NodeStarted", "a")
        running.abort.set()
        self.assertEqual(running.wait_for_end().status, "cancelled")
        release.set()
        self.assertIsNone(self.output("a"))
        self.assertEqual(self.states(), {"a": "cancelled"})

    def test_an_error_text_with_abort_is_an_ordinary_failure(self) -> None:
        def aborts() -> None:
            raise RuntimeError("abort abort")

        self.run_tree(Task("a", aborts, retries=1))
        self.assertEqual(len(self.db.list_attempts("run")), 2)

    def test_gauges_are_zero_after_a_run(self) -> None:
        self.run_tree(Parallel(Task("a", one), Task("b", fail, continue_on_fail=True)))
        text = self.db.metrics.render()
        for name in ("runs_active", "nodes_active", "approval_pending", "scheduler_queue_depth"):
            self.assertIn(f"\nsmithers_{name} 0\n", text)


def patch_constant(case: unittest.TestCase, name: str, value: Any) -> None:
    """Set a constant of the module for the length of a test."""
    case.addCleanup(setattr, ss, name, getattr(ss, name))
    setattr(ss, name, value)


# ---------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------


class GateTest(DatabaseCase):
    """Approvals: asked for when reached, decided once, obeyed at once."""

    def decide(self, verdict: str, node_id: str = "g", **said: Any) -> None:
        ss.decide(self.db, "run", node_id, ss.Decision(verdict, **said))

    def parked(self, *children: Any, node_id: str = "g") -> Background:
        running = self.start(Workflow("w", *children))
        running.wait_for("NodeWaitingApproval", node_id)
        return running

    def test_a_gate_is_requested_only_when_it_is_reached(self) -> None:
        release = threading.Event()
        running = self.start(
            Workflow("w", Task("a", lambda: release.wait(PATIENCE)), Approval("g"))
        )
        running.wait_for("NodeStarted", "a")
        self.assertEqual(self.db.list_gates("run"), [])
        release.set()
        running.wait_for("ApprovalRequested", "g")

    def test_a_decision_wakes_the_run_in_the_same_process(self) -> None:
        running = self.parked(Approval("g", title="Ship?"), Task("z", one))
        running.wait_for("RunStatusChanged", status="waiting-approval")
        (asked,) = self.db.list_gates("run")
        self.decide("approved", note="go", decided_by="alice")
        self.assertEqual(running.wait_for_end().status, "finished")
        (gate,) = self.db.list_gates("run")
        self.assertEqual(gate.requested_at_ms, asked.requested_at_ms)
        output = self.output("g")
        self.assertEqual(list(output), ["approved", "note", "decidedBy", "decidedAtMs"])
        self.assertEqual((output["approved"], output["decidedBy"]), (True, "alice"))

    def test_each_way_to_take_a_denial(self) -> None:
        for on_deny, state, status in (
            ("fail", "failed", "failed"),
            ("continue", "finished", "finished"),
            ("skip", "skipped", "finished"),
        ):
            with self.subTest(on_deny=on_deny):
                run_id = f"run-{on_deny}"
                tree = Workflow("w", Approval("g", on_deny=on_deny))
                running = self.start(tree, run_id)
                running.wait_for("NodeWaitingApproval", "g")
                ss.decide(self.db, run_id, "g", ss.Decision("denied", note="no"))
                self.assertEqual(running.wait_for_end().status, status)
                self.assertEqual(self.states(run_id), {"g": state})
                if on_deny != "fail":
                    self.assertEqual(self.output("g", run_id=run_id)["approved"], False)

    def test_each_way_to_take_a_timeout(self) -> None:
        for on_timeout, status in (
            ("fail", "failed"),
            ("approve", "finished"),
            ("deny", "failed"),
        ):
            with self.subTest(on_timeout=on_timeout):
                gate = Approval("g", timeout=0.05, on_timeout=on_timeout)
                result = self.run_tree(gate, run_id=f"run-{on_timeout}")
                self.assertEqual(result.status, status)

    def test_a_task_that_needs_approval_runs_after_it(self) -> None:
        running = self.parked(Task("g", one, needs_approval=True))
        self.assertEqual(self.events("NodeStarted"), [])
        self.decide("approved")
        running.wait_for_end()
        self.assertEqual((self.states(), self.output("g")), ({"g": "finished"}, 1))

    def test_a_denied_task_is_failed_or_skipped(self) -> None:
        for on_deny, state in (("fail", "failed"), ("continue", "skipped"), ("skip", "skipped")):
            with self.subTest(on_deny=on_deny):
                run_id = f"run-{on_deny}"
                tree = Workflow("w", Task("g", one, needs_approval=True, on_deny=on_deny))
                running = self.start(tree, run_id)
                running.wait_for("NodeWaitingApproval", "g")
                ss.decide(self.db, run_id, "g", ss.Decision("denied"))
                running.wait_for_end()
                self.assertEqual(self.states(run_id), {"g": state})

    def test_the_same_decision_again_changes_nothing(self) -> None:
        running = self.parked(Approval("g"), Approval("h"))
        self.decide("approved", decided_by="alice")
        self.decide("approved", decided_by="bob")
        running.wait_for("NodeWaitingApproval", "h")
        self.assertEqual([e["decidedBy"] for e in self.events("ApprovalGranted")], ["alice"])

    def test_the_opposite_decision_is_refused(self) -> None:
        self.parked(Approval("g"), Approval("h"))
        self.decide("approved")
        self.assertRaises(ss.ApprovalNotPending, self.decide, "denied")

    def test_only_one_of_many_contrary_deciders_wins(self) -> None:
        running = self.parked(Approval("g", on_deny="continue"), Approval("h"))
        barrier = threading.Barrier(16)

        def contend(number: int) -> str:
            verdict = "approved" if number % 2 else "denied"
            barrier.wait(PATIENCE)
            try:
                self.decide(verdict)
            except ss.ApprovalNotPending:
                return "409"
            return verdict

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(contend, range(16)))
        running.wait_for("NodeWaitingApproval", "h")
        self.assertEqual(len(self.events("ApprovalGranted", "ApprovalDenied")), 1)
        self.assertEqual(answers.count("409"), 8)

    def test_unknown_and_undecidable_nodes_are_told_apart(self) -> None:
        self.parked(Task("a", one), Approval("g"))
        self.assertRaises(ss.NodeNotFound, self.decide, "approved", "ghost")
        self.assertRaises(ss.NodeNotFound, self.decide, "approved", "g", iteration=7)
        self.assertRaises(ss.ApprovalNotPending, self.decide, "approved", "a")
        self.assertEqual(set(self.states()), {"a", "g"})

    def test_a_failure_ends_the_run_also_at_an_open_gate(self) -> None:
        result = self.run_tree(Parallel(Approval("g"), Task("bad", fail)))
        self.assertEqual(result.status, "failed")
        self.assertEqual(self.states(), {"g": "cancelled", "bad": "failed"})
        self.assertEqual([gate.status for gate in self.db.list_gates("run")], ["cancelled"])

    def test_an_open_gate_does_not_hold_back_a_retry(self) -> None:
        tries: list[int] = []

        def second_time() -> int:
            tries.append(1)
            return 1 // (len(tries) - 1)

        running = self.start(
            Workflow("w", Parallel(Approval("g"), Task("a", second_time, retries=1)))
        )
        running.wait_for("NodeFinished", "a")
        self.assertEqual(self.states(), {"g": "waiting-approval", "a": "finished"})

    def test_cancel_closes_open_gates(self) -> None:
        running = self.parked(Approval("g"))
        ss.cancel_run(self.db, "run")
        self.assertEqual(running.wait_for_end().status, "cancelled")
        self.assertEqual(self.states(), {"g": "cancelled"})
        self.assertRaises(ss.ApprovalNotPending, self.decide, "approved")

    def test_without_parking_a_run_returns_at_its_gate(self) -> None:
        result = self.run_tree(Approval("g"), Task("z", one), park=False)
        self.assertEqual(result.status, "waiting-approval")
        self.decide("approved")
        again = self.run_tree(Approval("g"), Task("z", one), resume=True)
        self.assertEqual(again.status, "finished")


# ---------------------------------------------------------------------------
# Durability
# ---------------------------------------------------------------------------

CRASH_WORKFLOW = """
import os, time
from smithers_serve import Loop, Parallel, Task, Workflow, current_task

def work():
    task = current_task()
    with open("effects.txt", "a") as effects:
        effects.write(f"{task.node_id} {task.iteration} {task.attempt}\\n")

def workflow(ctx):
    return Workflow("crash", Task("a", work), Parallel(Task("b", work), Task("c", work)),
        Loop(Task("d", work), Task("e", work), id="l", until=False, max_iterations=2),
        Task("f", ["true"]), Task("g", work))
"""


class DurabilityTest(DatabaseCase):
    """What is committed stays, what finished never runs again, one run has one engine."""

    def check_run(self, path: str, run_id: str) -> None:
        """Assert that the rows of a run agree with its log and that nothing is missing."""
        with contextlib.closing(sqlite3.connect(path)) as raw:
            self.assertEqual(raw.execute("pragma integrity_check").fetchone()[0], "ok")
        with contextlib.closing(SmithersDb(path)) as db:
            events = db.list_events(run_id)
            self.assertEqual([e.seq for e in events], list(range(len(events))))
            told: dict[tuple[str, int], str] = {}
            words = {"NodePending": "pending", "NodeStarted": "in-progress"}
            words |= {"NodeFinished": "finished", "NodeCancelled": "cancelled"}
            for event in events:
                if event.type in words:
                    payload = event.payload
                    key = payload["nodeId"], payload["iteration"]
                    self.assertNotEqual(told.get(key), "finished", f"{key} went on after its end")
                    told[key] = words[event.type]
            rows = {(n.node_id, n.iteration): n.state for n in db.list_nodes(run_id)}
            interrupted = {key for key, state in told.items() if state == "cancelled"}
            for key in interrupted & rows.keys():
                told[key] = rows[key]
            self.assertEqual(rows, told)

    def crash_after(self, events: int, folder: str) -> None:
        """Run the crash workflow and kill it with SIGKILL right after a commit."""
        code = (
            "import os, signal, sys; sys.path.insert(0, '.'); import smithers_serve as s, flow\n"
            "def kill(event):\n"
            f"    if event.seq >= {events}: os.kill(os.getpid(), signal.SIGKILL)\n"
            "db = s.SmithersDb('crash.db')\n"
            "resume = db.get_run('r') is not None\n"
            "s.run_workflow(flow.workflow, adapter=db, run_id='r', resume=resume, on_event=kill)\n"
        )
        python(folder, "-c", code)

    def test_a_run_killed_after_any_commit_resumes_to_its_end(self) -> None:
        folder = prepare_folder(self, flow=CRASH_WORKFLOW)
        path = os.path.join(folder, "crash.db")
        for events in range(2, 60, 6):
            for leftover in ("crash.db", "crash.db-wal", "crash.db-shm", "effects.txt"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, leftover))
            with self.subTest(killed_after=events):
                self.crash_after(events, folder)
                self.check_run(path, "r")
                done = cli(folder, "up", "flow.py", "--db", "crash.db", "--resume", "-r", "r")
                self.assertEqual(done.returncode, 0, done.stderr)
                self.check_run(path, "r")
                with open(os.path.join(folder, "effects.txt"), encoding="utf-8") as file:
                    effects = [line.split()[:2] for line in file]
                twice = [e for e in effects if effects.count(e) > 1]
                self.assertLessEqual(len(set(map(tuple, twice))), 2, "finished work ran again")
                self.assertEqual(len(set(map(tuple, effects))), 8)

    def test_a_failed_run_tries_again_only_what_failed(self) -> None:
        calls: list[str] = []

        def flaky() -> int:
            calls.append("b")
            return 1 // (len(calls) - 2)

        tree = Workflow("w", Task("a", lambda: calls.append("a")), Task("b", flaky))
        self.assertEqual(self.run_workflow(tree).status, "failed")
        self.assertEqual(self.run_workflow(tree, resume=True).status, "finished")
        self.assertEqual(calls, ["a", "b", "b"])
        self.assertEqual([a.attempt for a in self.db.list_attempts("run")], [0, 0, 1])

    def test_a_cancelled_run_goes_on_where_it_was(self) -> None:
        flag = threading.Event()
        tree = Workflow("w", Task("a", one), Task("b", lambda: flag.is_set() or wait_for_flag()))
        running = self.start(tree)
        running.wait_for("NodeStarted", "b")
        running.abort.set()
        self.assertEqual(running.wait_for_end().status, "cancelled")
        flag.set()
        self.assertEqual(self.run_workflow(tree, resume=True).status, "finished")
        starts = [(e["nodeId"], e["attempt"]) for e in self.events("NodeStarted")]
        self.assertEqual(starts, [("a", 0), ("b", 0), ("b", 1)])

    def test_a_finished_run_is_left_alone(self) -> None:
        self.run_tree(Task("a", one))
        before = self.events()
        self.assertEqual(self.run_tree(Task("a", one), resume=True).status, "finished")
        self.assertEqual(self.events(), before)

    def test_a_run_that_exists_or_is_unknown_is_refused(self) -> None:
        self.run_tree(Task("a", one))
        self.assertRaises(ss.RunExists, self.run_tree, Task("a", one))
        with self.assertRaises(ss.RunNotFound):
            self.run_tree(Task("a", one), run_id="ghost", resume=True)

    def test_a_second_engine_is_refused_and_a_forced_one_fences_the_first(self) -> None:
        tree = Workflow("w", Approval("g"))
        first = self.start(tree)
        first.wait_for("NodeWaitingApproval", "g")
        with contextlib.closing(SmithersDb(self.path)) as other:
            with self.assertRaises(ss.RunOwned):
                ss.run_workflow(tree, adapter=other, run_id="run", resume=True)
            second = Background(other, tree, "run", resume=True, force=True)
            second.wait_for("RunStatusChanged", status="waiting-approval")
            first.thread.join(PATIENCE)
            self.assertIsInstance(first.error, ss.OwnerLost)
            ss.decide(self.db, "run", "g", ss.Decision("approved"))
            self.assertEqual(second.wait_for_end().status, "finished")
        self.assertEqual(len(self.events("RunFinished")), 1)

    def test_another_process_decides_and_cancels(self) -> None:
        running = self.start(Workflow("w", Approval("g"), Approval("h")))
        running.wait_for("NodeWaitingApproval", "g")
        decide = "s.decide(db, 'run', 'g', s.Decision('approved', decided_by='bob'))"
        for step, seen in ((decide, "h"), ("s.cancel_run(db, 'run')", None)):
            python(
                HERE, "-c", f"import smithers_serve as s; db = s.SmithersDb({self.path!r}); {step}"
            )
            if seen is not None:
                running.wait_for("NodeWaitingApproval", seen)
        self.assertEqual(running.wait_for_end().status, "cancelled")
        self.assertEqual([e["decidedBy"] for e in self.events("ApprovalGranted")], ["bob"])

    def test_a_run_whose_engine_died_is_cancelled_not_refused(self) -> None:
        folder = prepare_folder(self, flow=CRASH_WORKFLOW)
        self.crash_after(9, folder)
        with contextlib.closing(SmithersDb(os.path.join(folder, "crash.db"))) as db:
            ss.cancel_run(db, "r")
            run = db.get_run("r")
            assert run is not None
            self.assertEqual(run.status, "cancelled")
            self.assertRaises(ss.RunNotActive, ss.cancel_run, db, "r")
            open_states = {"in-progress", "waiting-approval"}
            self.assertFalse(open_states & {n.state for n in db.list_nodes("r")})

    def test_a_new_database_is_private(self) -> None:
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    def test_missing_columns_are_added_and_foreign_ones_kept(self) -> None:
        path = os.path.join(self.folder, "old.db")
        with contextlib.closing(sqlite3.connect(path)) as raw:
            columns = "run_id text, node_id text, iteration integer, state text, extra text"
            key = "primary key (run_id, node_id, iteration)"
            raw.execute(f"create table _smithers_nodes ({columns}, {key})")
            raw.execute("insert into _smithers_nodes values ('old', 'a', 0, 'finished', 'kept')")
            raw.commit()
        with contextlib.closing(SmithersDb(path)) as db:
            self.assertEqual(db.get_run_and_summary("old")[1], {"finished": 1})
            tree = Workflow("w", Task("a", one))
            self.assertEqual(ss.run_workflow(tree, adapter=db, run_id="new").status, "finished")
        with contextlib.closing(sqlite3.connect(path)) as raw:
            row = raw.execute("select extra from _smithers_nodes where run_id = 'old'").fetchone()
        self.assertEqual(row, ("kept",))

    def test_a_file_that_is_no_database_is_refused_unharmed(self) -> None:
        path = os.path.join(self.folder, "letter.txt")
        with open(path, "wb") as file:
            file.write(b"dear sirs, " * 100)
        self.assertRaises(ss.StorageError, SmithersDb, path)
        with open(path, "rb") as file:
            self.assertEqual(file.read(), b"dear sirs, " * 100)

    def test_without_shared_memory_the_database_works_all_the_same(self) -> None:
        path = os.path.join(self.folder, "network.db")
        os.mkdir(path + "-shm")  # sqlite cannot make its shared memory here
        with contextlib.closing(SmithersDb(path)) as db:
            tree = Workflow("w", Task("a", one))
            self.assertEqual(ss.run_workflow(tree, adapter=db, run_id="run").status, "finished")

    def test_the_engine_waits_for_another_writer(self) -> None:
        release = threading.Event()
        running = self.start(
            Workflow("w", Task("a", lambda: release.wait(PATIENCE)), Task("b", one))
        )
        running.wait_for("NodeStarted", "a")
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("begin immediate")
            release.set()
            app = ss.create_serve_app(adapter=self.db, run_id="run")
            self.addCleanup(app.close)
            self.assertEqual(app.request("GET", "/").json()["status"], "running")
            other.execute("rollback")
        self.assertEqual(running.wait_for_end().status, "finished")

    def test_a_full_disk_stops_the_engine_and_resume_goes_on(self) -> None:
        big = "def big(): return 'x' * 20000\n"
        flow = (
            "import resource, signal\nfrom smithers_serve import Task, Workflow\n" + big +
            "def workflow(ctx): return Workflow('w', *[Task(f't{i}', big) for i in range(40)])\n"
            "def full(ctx):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (400000, 400000))\n"
            "    return workflow(ctx)\n"
        )  # fmt: skip
        folder = prepare_folder(self, flow=flow)
        stopped = cli(folder, "up", "flow.py:full", "-r", "r")
        self.assertEqual(stopped.returncode, 1, stopped.stderr)
        self.assertRegex(stopped.stderr, r"\[smithers\] Engine stopped: cannot write the database")
        self.assertNotIn("Traceback", stopped.stderr)
        self.check_run(os.path.join(folder, "smithers.db"), "r")
        done = cli(folder, "up", "flow.py", "-r", "r", "--resume")
        self.assertEqual(json.loads(done.stdout)["summary"], {"finished": 40})


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.trap = lambda: second


def raise_unpicklable() -> None:
    raise Unpicklable("cannot travel", "x")


def tell_process() -> int:
    ss.current_task().log("from the worker")
    return os.getpid()


def leave() -> None:
    os._exit(3)


class ExecutorTest(DatabaseCase):
    """Function tasks may run in any concurrent.futures.Executor."""

    def processes(self) -> concurrent.futures.ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
        self.addCleanup(pool.shutdown)
        return pool

    def test_a_thread_pool_runs_tasks_that_see_their_flag(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            running = self.start(Workflow("w", Task("a", wait_for_flag)), executor=pool)
            running.wait_for("NodeStarted", "a")
            running.abort.set()
            self.assertEqual(running.wait_for_end().status, "cancelled")

    def test_a_process_pool_returns_outputs_lines_and_errors(self) -> None:
        bad = Task("bad", raise_unpicklable, continue_on_fail=True)
        self.run_tree(bad, Task("a", tell_process), executor=self.processes())
        self.assertNotEqual(self.output("a"), os.getpid())
        self.assertEqual([e["text"] for e in self.events("NodeOutput")], ["from the worker"])
        error = {"name": "Unpicklable", "message": "cannot travel"}
        self.assertEqual(self.error("bad"), error)

    def test_a_worker_that_dies_fails_its_attempt(self) -> None:
        result = self.run_tree(Task("a", leave), executor=self.processes())
        self.assertEqual(result.status, "failed")
        self.assertEqual(self.error("a")["code"], "EXECUTOR_FAILED")


# ---------------------------------------------------------------------------
# HTTP helpers
# ---------------------------------------------------------------------------


class Reply:
    """Status, headers and body of an answer."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def value(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str]:
        """Return (status, code) of an error in its envelope."""
        assert list(self.value) == ["error"], self.body
        assert list(self.value["error"]) == ["code", "message"], self.body
        assert self.headers["content-type"] == "application/json"
        return self.status, self.value["error"]["code"]


class ServerCase(DatabaseCase):
    """A real server on port 0, in front of a run."""

    def serve(self, run_id: str = "run", **options: Any) -> ss.ServeServer:
        hosts = options.pop("allowed_hosts", ())
        context = options.pop("ssl_context", None)
        app = ss.create_serve_app(adapter=self.db, run_id=run_id, **options)
        server = ss.make_server(app, "127.0.0.1", 0, allowed_hosts=hosts, ssl_context=context)
        self.addCleanup(app.close)
        self.addCleanup(server.stop)
        server.start()
        self.port = server.server_port
        return server

    def at_gate(self, **options: Any) -> Background:
        """Serve a run that waits at the gate `deploy`."""
        tree = Workflow("bugfix", Task("analyze", one), Approval("deploy"), Task("done", one))
        running = self.start(tree)
        running.wait_for("RunStatusChanged", status="waiting-approval")
        self.serve(**options)
        return running

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Send one request; header names are given with underscores."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, data, fields)
            response = connection.getresponse()
            lower = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, lower, response.read())

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        self.addCleanup(sock.close)
        return sock

    def raw(self, *parts: bytes) -> bytes:
        """Send bytes, part by part, and return everything until the server closes."""
        sock = self.connect()
        with contextlib.suppress(ConnectionError):
            for part in parts:
                sock.sendall(part)
        return read_all(sock)

    def follow(self, path: str = "/events", **headers: str) -> EventReader:
        return EventReader(self, path, headers)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while True:
            part = sock.recv(65536)
            if not part:
                break
            data += part
    return data


def statuses(data: bytes) -> list[int]:
    """Return the status of every answer in a byte stream."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", data)]


class EventReader:
    """Reads a stream as a client does."""

    def __init__(self, case: ServerCase, path: str, headers: dict[str, str]) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", case.port, timeout=PATIENCE)
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request("GET", path, headers=fields)
        self.response = self.connection.getresponse()
        case.addCleanup(self.connection.close)
        case.addCleanup(self.response.close)

    def blocks(self) -> Iterator[str]:
        """Yield the text between blank lines."""
        lines: list[str] = []
        for line in self.response:
            text = line.decode("utf-8").rstrip("\n")
            if text:
                lines.append(text)
            else:
                yield "\n".join(lines)
                lines = []

    def events(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (id, payload) of each event."""
        for block in self.blocks():
            fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
            if fields.get("event") == "smithers":
                yield int(fields["id"]), json.loads(fields["data"])

    def ids(self) -> list[int]:
        return [seq for seq, _ in self.events()]


# ---------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------


class StatusTest(ServerCase):
    """GET / and GET /health."""

    def test_status_has_the_specified_keys_in_order(self) -> None:
        self.at_gate()
        reply = self.ask("GET", "/")
        keys = ["runId", "workflowName", "status", "startedAtMs", "finishedAtMs", "summary"]
        self.assertEqual(list(reply.value), keys)
        self.assertEqual(reply.value["status"], "waiting-approval")
        summary = {"finished": 1, "pending": 1, "waiting-approval": 1}
        self.assertEqual(reply.value["summary"], summary)
        self.assertEqual(reply.headers["cache-control"], "no-store")
        self.assertEqual(reply.headers["x-content-type-options"], "nosniff")

    def test_status_of_an_unknown_run_is_not_found(self) -> None:
        self.serve("ghost")
        self.assertEqual(self.ask("GET", "/").error, (404, "RUN_NOT_FOUND"))

    def test_health_needs_no_token_and_no_run(self) -> None:
        self.serve("ghost", auth_token="sk-secret")
        reply = self.ask("GET", "/health")
        self.assertEqual((reply.status, reply.body), (200, b'{"ok":true}'))

    def test_unknown_routes_and_methods_are_not_found(self) -> None:
        self.serve()
        for method, path, allow in (
            ("GET", "/nope", None),
            ("GET", "/health/", None),
            ("POST", "/", "GET, HEAD"),
            ("GET", "/approve/x", "POST"),
            ("DELETE", "/cancel", "POST"),
            ("POST", "/approve/a/b", None),
            ("POST", "/approve/", None),
        ):
            with self.subTest(method=method, path=path):
                reply = self.ask(method, path)
                self.assertEqual(reply.error, (404, "NOT_FOUND"))
                self.assertEqual(reply.headers.get("allow"), allow)

    def test_head_has_the_headers_of_get_and_no_body(self) -> None:
        self.at_gate()
        for path in ("/", "/health", "/frames", "/events"):
            with self.subTest(path=path):
                head = self.ask("HEAD", path)
                self.assertEqual((head.status, head.body), (200, b""))
                if path != "/events":
                    length = self.ask("GET", path).headers["content-length"]
                    self.assertEqual(head.headers["content-length"], length)


class FramesTest(ServerCase):
    """GET /frames."""

    def setUp(self) -> None:
        super().setUp()
        self.run_tree(Loop(Task("a", one), id="l", until=False, max_iterations=5))
        self.serve()

    def numbers(self, query: str) -> list[int]:
        return [frame["frameNo"] for frame in self.ask("GET", f"/frames{query}").value]

    def test_frames_are_rows_in_camel_case(self) -> None:
        (frame,) = self.ask("GET", "/frames?limit=1").value
        keys = "runId frameNo createdAtMs xmlJson xmlHash mountedTaskIdsJson taskIndexJson note"
        self.assertEqual(list(frame), keys.split())

    def test_without_a_start_the_newest_come_first(self) -> None:
        self.assertEqual(self.numbers("?limit=2"), [5, 4])
        self.assertEqual(self.numbers(""), [5, 4, 3, 2, 1])

    def test_paging_forward_loses_no_frame(self) -> None:
        self.assertEqual(self.numbers("?limit=2&afterFrameNo=0"), [1, 2])
        self.assertEqual(self.numbers("?limit=2&afterFrameNo=2"), [3, 4])
        self.assertEqual(self.numbers("?limit=2&afterFrameNo=4"), [5])

    def test_bad_query_values_are_refused_with_a_reason(self) -> None:
        for query in (
            "limit=0", "limit=-1", "limit=x", "limit=", "limit=1.5", "limit=%C2%B2", "limit=1_0",
            "limit=+1", "limit=99999999999999999999", "afterFrameNo=x", "limit=1&limit=2",
            "afterFrameNo=-2", "limit=%zz",
        ):  # fmt: skip
            with self.subTest(query=query):
                self.assertEqual(
                    self.ask("GET", f"/frames?{query}").error, (400, "INVALID_REQUEST")
                )


class DecisionTest(ServerCase):
    """POST /approve/:nodeId and POST /deny/:nodeId."""

    def test_approve_lets_the_run_finish(self) -> None:
        running = self.at_gate()
        reply = self.ask("POST", "/approve/deploy", {"note": "Ship it", "decidedBy": "alice"})
        self.assertEqual((reply.status, reply.value), (200, {"runId": "run"}))
        self.assertEqual(running.wait_for_end().status, "finished")
        (granted,) = self.events("ApprovalGranted")
        self.assertEqual((granted["note"], granted["decidedBy"]), ("Ship it", "alice"))

    def test_deny_fails_the_run(self) -> None:
        running = self.at_gate()
        self.assertEqual(self.ask("POST", "/deny/deploy", {"iteration": 0}).status, 200)
        self.assertEqual(running.wait_for_end().status, "failed")
        self.assertEqual(self.ask("POST", "/deny/deploy").status, 200)
        self.assertEqual(self.ask("POST", "/approve/deploy").error, (409, "APPROVAL_NOT_PENDING"))

    def test_a_refused_decision_changes_nothing(self) -> None:
        self.at_gate()
        before = self.events()
        text = "INVALID_REQUEST"
        for path, body, error in (
            ("/approve/ghost", None, (404, "NODE_NOT_FOUND")),
            ("/approve/deploy%2Fx", None, (404, "NODE_NOT_FOUND")),
            ("/approve/%64eploy%2500", None, (404, "NODE_NOT_FOUND")),
            ("/approve/%ff", None, (400, text)),
            ("/approve/%zz", None, (400, text)),
            ("/approve/analyze", None, (409, "APPROVAL_NOT_PENDING")),
            ("/approve/deploy", {"iteration": 1}, (404, "NODE_NOT_FOUND")),
            ("/approve/deploy", {"iteration": "0"}, (400, text)),
            ("/approve/deploy", {"iteration": True}, (400, text)),
            ("/approve/deploy", {"iteration": -1}, (400, text)),
            ("/approve/deploy", {"iteration": 2**63}, (400, text)),
            ("/approve/deploy", {"note": 5}, (400, text)),
            ("/approve/deploy", {"decidedBy": ["a"]}, (400, text)),
            ("/approve/deploy", {"note": "x" * 10_001}, (400, text)),
            ("/approve/deploy", b"null", (400, text)),
            ("/approve/deploy", b"[]", (400, text)),
            ("/approve/deploy", b"{", (400, text)),
            ("/approve/deploy", b'{"note":NaN}', (400, text)),
            ("/approve/deploy", b'{"note":"\\ud800"}', (400, text)),
            ("/approve/deploy", b'{"note":"a","note":"b"}', (400, text)),
            ("/approve/deploy", b"\xef\xbb\xbf{}", (400, text)),
            ("/approve/deploy", '{"note":"a"}'.encode("utf-16"), (400, text)),
            ("/approve/deploy", b"[" * 100_000, (400, text)),
            ("/approve/deploy", b'{"iteration":' + b"9" * 5000 + b"}", (400, text)),
            ("/approve/deploy", b"x" * (1 << 20) + b"x", (413, "PAYLOAD_TOO_LARGE")),
        ):
            with self.subTest(path=path, body=str(body)[:40]):
                self.assertEqual(self.ask("POST", path, body).error, error)
        self.assertEqual(self.events(), before)
        self.assertEqual([gate.status for gate in self.db.list_gates("run")], ["requested"])

    def test_control_characters_are_kept_as_data(self) -> None:
        running = self.at_gate()
        note = "line\r\nevent: fake\n\n\x1b[31m\x00"
        self.assertEqual(self.ask("POST", "/approve/deploy", {"note": note}).status, 200)
        running.wait_for_end()
        self.assertEqual(self.output("deploy")["note"], note)
        events = list(self.follow().events())
        self.assertEqual([e["note"] for _, e in events if "note" in e], [note])

    def test_an_empty_body_and_null_fields_are_fine(self) -> None:
        self.at_gate()
        body = {"iteration": None, "note": None, "decidedBy": None, "other": 1}
        self.assertEqual(self.ask("POST", "/approve/deploy", body).status, 200)
        self.assertEqual(self.ask("POST", "/approve/deploy").status, 200)


class CancelTest(ServerCase):
    """POST /cancel."""

    def test_cancel_ends_the_run_once(self) -> None:
        running = self.at_gate()
        reply = self.ask("POST", "/cancel")
        self.assertEqual((reply.status, reply.value), (200, {"runId": "run"}))
        self.assertEqual(running.wait_for_end().status, "cancelled")
        self.assertEqual(self.ask("POST", "/cancel").error, (409, "RUN_NOT_ACTIVE"))

    def test_cancel_of_an_unknown_run_is_not_found(self) -> None:
        self.serve("ghost")
        self.assertEqual(self.ask("POST", "/cancel").error, (404, "RUN_NOT_FOUND"))


class AuthTest(ServerCase):
    """Who may ask."""

    def test_every_route_but_health_wants_the_token(self) -> None:
        self.at_gate(auth_token="sk-secret")
        for method, path in (
            ("GET", "/"), ("GET", "/events"), ("GET", "/frames"), ("GET", "/metrics"),
            ("POST", "/approve/deploy"), ("POST", "/cancel"), ("GET", "/nope"), ("PUT", "/"),
        ):  # fmt: skip
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"x_smithers_key": "sk-secre"}):
                with self.subTest(path=path, headers=headers):
                    reply = self.ask(method, path, **headers)
                    self.assertEqual(reply.error, (401, "UNAUTHORIZED"))
                    self.assertNotIn(b"sk-secret", reply.body)

    def test_both_headers_carry_the_token(self) -> None:
        self.at_gate(auth_token="sk-secret")
        for headers in (
            {"Authorization": "Bearer sk-secret"},
            {"Authorization": "bEARER sk-secret"},
            {"x_smithers_key": "sk-secret"},
        ):
            with self.subTest(headers=headers):
                self.assertEqual(self.ask("GET", "/", **headers).status, 200)

    def test_a_token_that_is_not_ascii_is_only_wrong(self) -> None:
        self.at_gate(auth_token="sk-secret")
        request = (
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nx-smithers-key: \xc3\xa9\r\n\r\n"
        )
        self.assertEqual(statuses(self.raw(request)), [401])

    def test_a_page_of_another_origin_may_not_post(self) -> None:
        self.at_gate(auth_token="sk-secret")
        token = {"x_smithers_key": "sk-secret"}
        own = f"http://127.0.0.1:{self.port}"
        for headers, status in (
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "http://127.0.0.1:1"}, 403),
            ({"Sec_Fetch_Site": "cross-site"}, 403),
            ({"Origin": own, "Sec_Fetch_Site": "same-origin"}, 200),
        ):
            with self.subTest(headers=headers):
                reply = self.ask("POST", "/approve/deploy", **headers, **token)
                self.assertEqual(reply.status, status)

    def test_a_foreign_host_is_refused_on_loopback_without_token(self) -> None:
        self.at_gate(allowed_hosts=["ops.example"])
        for host, status in (
            ("evil.example", 403), ("localhost:1", 200), ("127.0.0.1", 200),
            ("ops.example:80", 200),
        ):  # fmt: skip
            with self.subTest(host=host):
                self.assertEqual(self.ask("GET", "/", Host=host).status, status)

    def test_an_unusable_token_is_refused_at_the_start(self) -> None:
        for token in ("", "two words", "line\n", "\u00e9"):
            with self.subTest(token=token), self.assertRaises(ValueError):
                ss.create_serve_app(adapter=self.db, run_id="run", auth_token=token)


# ---------------------------------------------------------------------------
# Event stream
# ---------------------------------------------------------------------------


class StreamTest(ServerCase):
    """GET /events."""

    def test_the_bytes_of_a_finished_stream(self) -> None:
        self.run_tree(Task("a", one))
        self.serve()
        request = b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        head, _, body = self.raw(request).partition(b"\r\n\r\n")
        for line in (b"Content-Type: text/event-stream", b"Cache-Control: no-cache",
                     b"X-Accel-Buffering: no", b"Transfer-Encoding: chunked"):  # fmt: skip
            self.assertIn(line, head.split(b"\r\n"))
        text = "retry: 1000\n\n" + "".join(
            f"event: smithers\ndata: {e.payload_json}\nid: {e.seq}\n\n"
            for e in self.db.list_events("run")
        )
        self.assertEqual(unchunk(body).decode("utf-8"), text)

    def test_http_1_0_gets_no_chunks(self) -> None:
        self.run_tree(Task("a", one))
        self.serve()
        head, _, body = self.raw(b"GET /events HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
        self.assertNotIn(b"chunked", head)
        self.assertTrue(body.startswith(b"retry: 1000\n\nevent: smithers\n"))

    def test_a_stream_follows_the_run_and_ends_with_it(self) -> None:
        running = self.at_gate()
        reader = self.follow()
        events = reader.events()
        while next(events)[1]["type"] != "NodeWaitingApproval":
            pass
        self.ask("POST", "/approve/deploy")
        rest = list(events)
        self.assertEqual(rest[-1][1]["type"], "RunFinished")
        self.assertEqual(rest[-1][0], len(self.events()) - 1)
        running.wait_for_end()

    def test_after_seq_skips_events_already_seen(self) -> None:
        self.run_tree(Task("a", one))
        last = len(self.events()) - 1
        self.serve()
        self.assertEqual(self.follow("/events?afterSeq=2").ids(), list(range(3, last + 1)))
        self.assertEqual(self.follow(f"/events?afterSeq={last + 5}").ids(), [])

    def test_last_event_id_beats_after_seq(self) -> None:
        self.run_tree(Task("a", one))
        self.serve()
        last = len(self.events()) - 1
        reader = self.follow("/events?afterSeq=0", Last_Event_ID=str(last - 1))
        self.assertEqual(reader.ids(), [last])

    def test_a_reconnect_after_the_end_is_told_to_stop(self) -> None:
        self.run_tree(Task("a", one))
        self.serve()
        last = str(len(self.events()) - 1)
        reply = self.ask("GET", "/events", Last_Event_ID=last)
        self.assertEqual((reply.status, reply.body), (204, b""))

    def test_a_bad_start_is_refused(self) -> None:
        self.at_gate()
        for query in ("afterSeq=x", "afterSeq=-2", "afterSeq=1e3", "afterSeq=9223372036854775808"):
            with self.subTest(query=query):
                self.assertEqual(
                    self.ask("GET", f"/events?{query}").error, (400, "INVALID_REQUEST")
                )
        error = self.ask("GET", "/events", Last_Event_ID="abc").error
        self.assertEqual(error, (400, "INVALID_REQUEST"))

    def test_a_stream_may_open_before_its_run(self) -> None:
        self.serve()
        events = self.follow().events()
        self.run_tree(Task("a", one))
        self.assertEqual([e["type"] for _, e in events][-1], "RunFinished")

    def test_a_silent_stream_is_kept_alive(self) -> None:
        patch_constant(self, "KEEP_ALIVE_SECONDS", 0.1)
        self.at_gate()
        blocks = self.follow("/events?afterSeq=1000").blocks()
        self.assertEqual([next(blocks) for _ in range(3)][1:], [": keep-alive"] * 2)

    def test_a_commit_of_another_process_arrives(self) -> None:
        self.at_gate()
        events = self.follow("/events?afterSeq=1000").events()
        del events
        reader = self.follow()
        code = f"import smithers_serve as s; db = s.SmithersDb({self.path!r})\n"
        python(HERE, "-c", code + "s.decide(db, 'run', 'deploy', s.Decision('approved'))")
        self.assertIn("ApprovalGranted", [e["type"] for _, e in reader.events()])

    def test_streams_cost_no_threads(self) -> None:
        self.at_gate()
        first = self.follow()
        next(first.events())
        before = threading.active_count()
        readers = [self.follow() for _ in range(20)]
        for reader in readers:
            next(reader.events())
        self.assertLessEqual(threading.active_count(), before + 1)

    def test_a_client_that_vanishes_is_forgotten(self) -> None:
        server = self.serve()
        run = self.start(Workflow("w", Approval("g")))
        run.wait_for("NodeWaitingApproval", "g")
        readers = [self.follow() for _ in range(5)]
        for reader in readers:
            next(reader.events())
        for reader in readers:
            linger = (1).to_bytes(4, sys.byteorder) + bytes(4)
            sock = reader.response.fp.raw._sock  # type: ignore[union-attr]
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            reader.response.close()
            reader.connection.close()
        deadline = time.monotonic() + PATIENCE
        while server.app.metrics.streams_active.value and time.monotonic() < deadline:
            self.ask("GET", "/health")
        self.assertEqual(server.app.metrics.streams_active.value, 0)

    def test_a_reader_that_never_reads_delays_nobody(self) -> None:
        def shout() -> None:
            for _ in range(3000):
                ss.current_task().log("x" * 1000)

        self.serve()
        deaf = self.connect()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        reader = self.follow()
        self.run_tree(Task("a", shout))
        self.assertEqual(reader.ids(), list(range(len(self.events()))))

    def test_many_readers_get_every_event_once_in_order(self) -> None:
        self.serve()
        readers = [self.follow() for _ in range(30)]
        self.run_tree(*[Task(f"t{i}", one) for i in range(40)])
        expected = list(range(len(self.events())))
        for reader in readers:
            self.assertEqual(reader.ids(), expected)

    def test_past_the_limit_a_stream_is_refused(self) -> None:
        self.at_gate()
        first = self.follow()
        next(first.events())
        patch_constant(self, "MAX_STREAMS", 1)
        reply = self.ask("GET", "/events")
        self.assertEqual(
            (reply.error, "retry-after" in reply.headers), ((503, "UNAVAILABLE"), True)
        )
        self.assertEqual(self.ask("GET", "/").status, 200)

    def test_a_server_that_stops_ends_its_streams_properly(self) -> None:
        tree = Workflow("w", Approval("g"))
        self.start(tree).wait_for("NodeWaitingApproval", "g")
        server = self.serve()
        sock = self.connect()
        sock.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        data = b""
        while b"NodeWaitingApproval" not in data:
            data += sock.recv(65536)
        stopper = threading.Thread(target=server.streams.stop, args=(PATIENCE,))
        stopper.start()
        data += read_all(sock)
        stopper.join(PATIENCE)
        self.assertTrue(data.endswith(b"\r\n0\r\n\r\n"))


def unchunk(data: bytes) -> bytes:
    """Return the body of a chunked message that is complete."""
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            assert data == b"\r\n", data
            return body
        body, data = body + data[:length], data[length:]
        assert data[:2] == b"\r\n"
        data = data[2:]


# ---------------------------------------------------------------------------
# Requests: what is refused, and how
# ---------------------------------------------------------------------------

HOST = b"Host: 127.0.0.1\r\n"
GET = b"GET /health HTTP/1.1\r\n" + HOST
POST = b"POST /approve/ghost HTTP/1.1\r\n" + HOST
CLOSE = b"Connection: close\r\n\r\n"

# Every request with the statuses it must get; after a refusal the connection is closed.
RAW_REQUESTS: list[tuple[bytes, list[int]]] = [
    (GET + CLOSE, [200]),
    (b"GET /health HTTP/1.0\r\n\r\n", [200]),
    (b"GET http://127.0.0.1/health HTTP/1.1\r\n" + HOST + CLOSE, [200]),
    (b"GET /health?x=%zz HTTP/1.1\r\n" + HOST + CLOSE, [200]),
    (GET + b"\r\n" + GET + CLOSE, [200, 200]),
    (GET + b"Content-Length: 3\r\n\r\nabc" + GET + CLOSE, [200, 200]),
    (POST + b"Content-Length: 2\r\n\r\n{}" + GET + CLOSE, [404, 200]),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1;x=y\r\n}\r\n0\r\n\r\n" + GET + CLOSE,
     [404, 200]),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nTrailer: x\r\n\r\n" + GET + CLOSE, [404, 200]),
    (POST + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", [404]),
    (b"get /health HTTP/1.1\r\n" + HOST + CLOSE, [404]),
    (b"BREW /health HTTP/1.1\r\n" + HOST + CLOSE, [404]),
    (b"OPTIONS * HTTP/1.1\r\n" + HOST + CLOSE, [404]),
    (b"GET /health HTTP/1.1\r\n\r\n", [400]),
    (b"GET /health HTTP/1.1\r\n" + HOST + HOST + b"\r\n", [400]),
    (b"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n", [400]),
    (b"GET /health HTTP/1.1\nHost: 127.0.0.1\n\n", [400]),
    (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\n\r\n", [400]),
    (GET + b"X: a\r\n folded\r\n\r\n", [400]),
    (GET + b"X : a\r\n\r\n", [400]),
    (GET + b": a\r\n\r\n", [400]),
    (GET + b"X\r\n\r\n", [400]),
    (GET + b"X: a\rb\r\n\r\n", [400]),
    (GET + b"X: a\0b\r\n\r\n", [400]),
    (b"\r\n" + GET + b"\r\n", [400]),
    (b"GET  /health HTTP/1.1\r\n" + HOST + b"\r\n", [400]),
    (b"GET /health\r\n\r\n", [400]),
    (b"GET /hea lth HTTP/1.1\r\n" + HOST + b"\r\n", [400]),
    (b"GET health HTTP/1.1\r\n" + HOST + b"\r\n", [400]),
    (b"GET //[ HTTP/1.1\r\n" + HOST + CLOSE, [404]),
    (b"GET /health#x HTTP/1.1\r\n" + HOST + b"\r\n", [400]),
    (b"GET http://other/health HTTP/1.1\r\n" + HOST + b"\r\n", [400]),
    (b"GET /health HTTP/1.2\r\n" + HOST + b"\r\n", [505]),
    (b"GET /health HTTP/2.0\r\n" + HOST + b"\r\n", [505]),
    (b"GET /health HTTP/1.1x\r\n" + HOST + b"\r\n", [400]),
    (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", [400]),
    (POST + b"Content-Length: 2, 2\r\n\r\n{}", [400]),
    (POST + b"Content-Length: +2\r\n\r\n{}", [400]),
    (POST + b"Content-Length: \xb2\r\n\r\n{}", [400]),
    (POST + b"Content-Length: 0x2\r\n\r\n{}", [400]),
    (POST + b"Content-Length: 1_0\r\n\r\n{}", [400]),
    (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", [400]),
    (POST + b"Content-Length: 1048577\r\n\r\n", [413]),
    (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
    (POST + b"Transfer-Encoding: gzip\r\n\r\n", [501]),
    (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n", [501]),
    (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", [400]),
    (b"POST /cancel HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", [400]),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", [400]),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n1\na\n0\n\n", [400]),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n", [400]),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n100001\r\n", [413]),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nbad trailer\r\n\r\n", [400]),
    (POST + b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\n{}", [400]),
    (GET + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n", [400]),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", [414]),
    (GET + b"X: y\r\n" * 101 + b"\r\n", [431]),
    (GET + b"X: " + b"y" * 33_000 + b"\r\n\r\n", [431]),
]  # fmt: skip


class RequestTest(ServerCase):
    """Whatever two parsers could read differently is refused, and the connection closed."""

    def setUp(self) -> None:
        super().setUp()
        self.run_tree(Task("a", one))
        self.serve()

    def final_statuses(self, *parts: bytes) -> list[int]:
        return [status for status in statuses(self.raw(*parts)) if status != 100]

    def test_each_raw_request_sent_whole(self) -> None:
        for request, expected in RAW_REQUESTS:
            with self.subTest(request=request[:80]):
                self.assertEqual(self.final_statuses(request), expected)

    def test_each_raw_request_split_in_two(self) -> None:
        generator = random.Random(7)
        for request, expected in RAW_REQUESTS:
            for cut in sorted(generator.sample(range(1, len(request)), 4)):
                with self.subTest(request=request[:80], cut=cut):
                    self.assertEqual(self.final_statuses(request[:cut], request[cut:]), expected)

    def test_each_raw_request_byte_by_byte(self) -> None:
        for request, expected in RAW_REQUESTS:
            if len(request) < 400:
                with self.subTest(request=request[:80]):
                    parts = [request[i : i + 1] for i in range(len(request))]
                    self.assertEqual(self.final_statuses(*parts), expected)

    def test_every_refusal_is_in_the_envelope(self) -> None:
        for request, expected in RAW_REQUESTS:
            if expected[-1] >= 400:
                with self.subTest(request=request[:80]):
                    body = self.raw(request).rpartition(b"\r\n\r\n")[2]
                    self.assertEqual(list(json.loads(body)["error"]), ["code", "message"])

    def test_expect_is_answered_before_the_body(self) -> None:
        sock = self.connect()
        sock.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        self.assertEqual(sock.recv(100), b"HTTP/1.1 100 Continue\r\n\r\n")
        sock.sendall(b"{}")
        self.assertEqual(statuses(sock.recv(1000)), [404])

    def test_a_refused_body_never_becomes_a_request(self) -> None:
        body = GET + b"\r\n"
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        foreign = b"POST /cancel HTTP/1.1\r\n" + HOST + b"Origin: http://evil\r\n" + length
        self.assertEqual(statuses(self.raw(foreign + body)), [403])

    def test_a_head_that_does_not_end_in_time_is_answered(self) -> None:
        patch_constant(self, "HEAD_SECONDS", 0.1)
        self.assertEqual(statuses(self.raw(b"GET / HTTP/1.1\r\nHost: x\r\n")), [408])

    def test_a_body_that_does_not_end_in_time_is_answered(self) -> None:
        patch_constant(self, "BODY_SECONDS", 0.1)
        self.assertEqual(statuses(self.raw(POST + b"Content-Length: 5\r\n\r\n{")), [408])

    def test_an_idle_connection_is_closed_silently(self) -> None:
        patch_constant(self, "IDLE_SECONDS", 0.1)
        self.assertEqual(self.raw(), b"")

    def test_the_longest_idle_connection_makes_room(self) -> None:
        patch_constant(self, "MAX_CONNECTIONS", 3)
        idle = [self.connect() for _ in range(3)]
        for sock in idle:
            sock.sendall(GET + b"\r\n")
            self.assertEqual(statuses(sock.recv(1000)), [200])
        self.assertEqual(self.ask("GET", "/health").status, 200)
        self.assertEqual(read_all(idle[0]), b"")

    def test_an_internal_error_tells_nothing(self) -> None:
        def explode(app: Any, request: Any) -> Any:
            raise RuntimeError("secret of /etc/passwd")

        route = ss.ROUTES[1]
        with contextlib.ExitStack() as stack:
            shape = ss._ROUTES_BY_SHAPE["", 1]
            stack.callback(shape.__setitem__, 0, shape[0])
            shape[0] = route._replace(handler=explode)
            reply = self.ask("GET", "/")
        self.assertEqual(reply.error, (500, "SERVER_ERROR"))
        self.assertNotIn(b"secret", reply.body)


class TlsTest(ServerCase):
    """The same over TLS."""

    def setUp(self) -> None:
        super().setUp()
        if shutil.which("openssl") is None:
            self.skipTest("no openssl to make a certificate with")
        import ssl

        self.certificate = os.path.join(self.folder, "cert.pem")
        key = os.path.join(self.folder, "key.pem")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
             "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
             "-keyout", key, "-out", self.certificate],
            check=True, capture_output=True,
        )  # fmt: skip
        context = ss.make_ssl_context(self.certificate, key)
        self.client = ssl.create_default_context(cafile=self.certificate)
        self.run_tree(Task("a", one))
        self.serve(ssl_context=context)

    def fetch(self, path: str) -> bytes:
        url = f"https://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(url, context=self.client, timeout=PATIENCE) as answer:
            return bytes(answer.read())

    def test_answers_and_streams_travel_over_tls(self) -> None:
        self.assertEqual(self.fetch("/health"), b'{"ok":true}')
        self.assertIn(b"RunFinished", self.fetch("/events"))

    def test_a_handshake_that_never_ends_blocks_nobody(self) -> None:
        silent = self.connect()
        self.assertEqual(self.fetch("/health"), b'{"ok":true}')
        silent.close()


# ---------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------


class MetricsTest(ServerCase):
    """GET /metrics."""

    FAMILIES = [
        "runs_total",
        "runs_finished_total",
        "runs_failed_total",
        "runs_cancelled_total",
        "runs_resumed_total",
        "nodes_started",
        "nodes_finished",
        "nodes_failed",
        "node_retries_total",
        "errors_total",
        "events_emitted_total",
        "approvals_requested",
        "approvals_granted",
        "approvals_denied",
        "db_retries",
        "http_requests",
        "runs_active",
        "nodes_active",
        "approval_pending",
        "scheduler_queue_depth",
        "scheduler_concurrency_utilization",
        "process_uptime_seconds",
        "process_memory_rss_bytes",
        "event_streams_active",
        "run_duration_ms",
        "node_duration_ms",
        "attempt_duration_ms",
        "approval_wait_duration_ms",
        "scheduler_wait_duration_ms",
        "db_query_ms",
        "http_request_duration_ms",
    ]

    def test_every_family_is_there_from_the_start(self) -> None:
        text = ss.Metrics().render()
        self.assertEqual(set(re.findall(r"# TYPE smithers_(\w+) ", text)), set(self.FAMILIES))
        self.assertEqual(set(re.findall(r"# HELP smithers_(\w+) ", text)), set(self.FAMILIES))
        self.assertIn("\nsmithers_runs_total 0\n", text)

    def test_the_text_of_a_histogram(self) -> None:
        histogram = ss.Histogram("h", 'a="b"', threading.Lock(), (1.0, 2.5))
        for value in (0.5, 1.0, 2.0, 9.0):
            histogram.observe(value)
        self.assertEqual(
            histogram.render_locked(),
            'h_bucket{a="b",le="1"} 2\nh_bucket{a="b",le="2.5"} 3\nh_bucket{a="b",le="+Inf"} 4\n'
            'h_sum{a="b"} 12.5\nh_count{a="b"} 4\n',
        )

    def test_label_values_are_escaped(self) -> None:
        self.assertEqual(ss._label_text(("a",), ('q"\\\n',)), r'a="q\"\\\n"')

    def test_a_request_counts_under_its_pattern_never_its_path(self) -> None:
        self.at_gate()
        self.ask("POST", "/approve/secret-node")
        self.ask("GET", "/secret-path")
        text = self.ask("GET", "/metrics").body.decode()
        labels = 'method="POST",route="/approve/:nodeId",status_code="404",status_class="4xx"'
        self.assertIn(f"smithers_http_requests{{{labels}}} 1\n", text)
        self.assertIn('method="GET",route="unmatched",status_code="404"', text)
        self.assertNotIn("secret", text)

    def test_an_open_gate_is_pending_until_it_is_decided(self) -> None:
        running = self.at_gate()
        self.assertIn(b"\nsmithers_approval_pending 1\n", self.ask("GET", "/metrics").body)
        self.ask("POST", "/approve/deploy")
        running.wait_for_end()
        text = self.ask("GET", "/metrics").body
        self.assertIn(b"\nsmithers_approval_pending 0\n", text)
        self.assertIn(b"\nsmithers_approvals_granted 1\n", text)

    def test_switched_off_metrics_are_not_found(self) -> None:
        self.serve(metrics=False)
        self.assertEqual(self.ask("GET", "/metrics").error, (404, "NOT_FOUND"))


# ---------------------------------------------------------------------------
# Mounts
# ---------------------------------------------------------------------------


class MountTest(ServerCase):
    """The app without its own server."""

    def app(self, **options: Any) -> ss.ServeApp:
        app = ss.create_serve_app(adapter=self.db, run_id="run", **options)
        self.addCleanup(app.close)
        return app

    def test_the_app_answers_without_a_socket(self) -> None:
        running = self.start(Workflow("w", Approval("ship")))
        running.wait_for("NodeWaitingApproval", "ship")
        app = self.app(auth_token="sk-secret")
        token = {"Authorization": "Bearer sk-secret"}
        self.assertEqual(app.request("GET", "/").status, 401)
        answer = app.request("POST", "/approve/ship", json={"note": "x"}, headers=token)
        self.assertEqual((answer.status, answer.json()), (200, {"runId": "run"}))
        running.wait_for_end()
        self.assertIn(b"RunFinished", app.request("GET", "/events", headers=token).body)

    def test_the_app_is_valid_wsgi_at_a_prefix(self) -> None:
        from wsgiref.simple_server import WSGIRequestHandler, make_server
        from wsgiref.util import shift_path_info
        from wsgiref.validate import validator

        class Quiet(WSGIRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.run_tree(Task("a", one))
        checked = validator(self.app())

        def site(environ: Any, start_response: Any) -> Any:
            shift_path_info(environ)
            return checked(environ, start_response)

        with make_server("127.0.0.1", 0, site, handler_class=Quiet) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self.port = server.server_port
            self.assertEqual(self.ask("GET", "/prefix/").value["status"], "finished")
            self.assertEqual(self.ask("POST", "/prefix/cancel").error, (409, "RUN_NOT_ACTIVE"))
            self.assertIn(b"RunFinished", self.ask("GET", "/prefix/events").body)
            server.shutdown()


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------


def clean_environment(**extra: str) -> dict[str, str]:
    names = ("SMITHERS_API_KEY",)
    return {**{k: v for k, v in os.environ.items() if k not in names}, **extra}


def python(folder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter of this test in a folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def cli(folder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "smithers_serve", *arguments)


def prepare_folder(case: unittest.TestCase, **files: str) -> str:
    """Return a folder with the module and these Python files in it."""
    folder = tempfile.TemporaryDirectory()
    case.addCleanup(folder.cleanup)
    shutil.copy(os.path.join(HERE, "smithers_serve.py"), folder.name)
    for name, text in files.items():
        with open(os.path.join(folder.name, f"{name}.py"), "w", encoding="utf-8") as file:
            file.write(text)
    return folder.name


FLOW = """
import smithers_serve
from smithers_serve import Approval, Task, Workflow, current_task

def one():
    print("printed by a task")
    return 1

def wait():
    current_task().cancelled.wait(30)

def ignore():
    import time
    time.sleep(30)

def workflow(ctx):
    assert isinstance(Task("x", one), smithers_serve.Task)
    return Workflow("bugfix", Task("analyze", one), Approval("deploy"), Task("done", one))

def other(ctx):
    return Workflow("other", Task("a", one, kwargs={}), Task("b", {"ref": ctx.input.get("ref")}))

def bad(ctx):
    return Workflow("bad", Task("a", ["false"]))

def slow(ctx):
    return Workflow("slow", Task("a", wait))

def deaf(ctx):
    return Workflow("deaf", Task("a", ignore))
"""


class ServedProcess:
    """A served run in a process of its own; lines of its stderr can be waited for."""

    def __init__(self, case: unittest.TestCase, folder: str, *arguments: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "smithers_serve", *arguments],
            cwd=folder,
            env=clean_environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        case.addCleanup(self._clean_up)
        self.lines: list[str] = []

    def _clean_up(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the match of the first further line that has the pattern."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            match = re.search(pattern, line)
            if match is not None:
                return match
        raise AssertionError(f"no line with {pattern!r} in {self.lines}")

    def end(self) -> tuple[int, str]:
        """Return the exit code and stdout."""
        out, err = self.process.communicate(timeout=PATIENCE)
        self.lines.append(err)
        return self.process.returncode, out


class CommandLineTest(unittest.TestCase):
    """python -m smithers_serve."""

    def setUp(self) -> None:
        self.folder = prepare_folder(self, flow=FLOW)

    def served(self, *arguments: str, **env: str) -> tuple[ServedProcess, str]:
        served = ServedProcess(self, self.folder, *arguments, "--serve", "--port", "0", **env)
        return served, served.wait_for(r"HTTP server listening on (http://[0-9.]+:\d+)")[1]

    def fetch(
        self, url: str, method: str = "GET", data: bytes | None = None, token: str = ""
    ) -> Any:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.read()

    def test_the_example_of_the_specification(self) -> None:
        served, url = self.served("up", "flow.py", "--auth-token", "sk-secret")
        served.wait_for("deploy waits for approval")
        self.assertEqual(self.fetch(f"{url}/health"), b'{"ok":true}')
        status = json.loads(self.fetch(f"{url}/", token="sk-secret"))
        self.assertEqual(status["workflowName"], "bugfix")
        body = b'{"note": "Ship it", "decidedBy": "alice"}'
        self.fetch(f"{url}/approve/deploy", "POST", body, "sk-secret")
        self.assertIn(b"RunFinished", self.fetch(f"{url}/events", token="sk-secret"))
        served.wait_for("Workflow finished. Server still running — press Ctrl\\+C to stop.")
        served.process.send_signal(signal.SIGINT)
        code, out = served.end()
        self.assertEqual((code, json.loads(out)["status"]), (0, "finished"))

    def test_exit_codes_without_a_server(self) -> None:
        for spec, code, status in (
            ("flow.py:other", 0, "finished"),
            ("flow.py:bad", 1, "failed"),
            ("flow.py", 3, "waiting-approval"),
        ):
            with self.subTest(spec=spec):
                done = cli(self.folder, "up", spec)
                self.assertEqual(done.returncode, code, done.stderr)
                self.assertEqual(json.loads(done.stdout)["status"], status)

    def test_input_comes_from_text_file_or_pipe(self) -> None:
        with open(os.path.join(self.folder, "in.json"), "w", encoding="utf-8") as file:
            file.write('{"ref": "v1"}')
        for text in ('{"ref": "v1"}', "@in.json"):
            run_id = f"r{len(text)}"
            cli(self.folder, "up", "flow.py:other", "-i", text, "-r", run_id)
            with contextlib.closing(SmithersDb(os.path.join(self.folder, "smithers.db"))) as db:
                self.assertEqual(db.find_output(run_id, "b", 0), '{"ref":"v1"}')

    def test_each_mistake_is_one_line_and_leaves_nothing(self) -> None:
        with open(os.path.join(self.folder, "broken.py"), "w", encoding="utf-8") as file:
            file.write("x = 1\nraise ValueError('no')\n")
        with open(os.path.join(self.folder, "junk.db"), "w", encoding="utf-8") as file:
            file.write("junk " * 1000)
        taken = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(taken.close)
        port = str(taken.getsockname()[1])
        before = sorted(os.listdir(self.folder))
        for arguments, said in (
            (["nope.py"], "no workflow file nope.py"),
            (["broken.py"], "line 2: ValueError: no"),
            (["flow.py:ghost"], "no object called 'ghost'"),
            (["flow.py:FLOW"], "no object called"),
            (["flow.py", "-i", "{"], "--input is not JSON"),
            (["flow.py", "-i", "@gone.json"], "cannot read gone.json"),
            (["flow.py", "-r", "a b"], "run id"),
            (["flow.py", "--resume"], "--resume needs --run-id"),
            (["flow.py", "--resume", "-r", "x"], "no database"),
            (["flow.py", "--force"], "--force goes with --resume"),
            (["flow.py", "--db", "junk.db"], "not a database"),
            (["flow.py", "--db", "gone/x.db"], "No such file"),
            (["flow.py", "--serve", "--port", port], "cannot listen"),
            (["flow.py", "--serve", "--auth-token", ""], "auth token"),
            (["flow.py", "--port", "http"], "expected a port"),
            (["flow.py", "--metrics", "maybe"], "true or false"),
            (["flow.py", "--serve", "--certfile", "gone.pem"], "for TLS"),
        ):
            with self.subTest(arguments=arguments):
                done = cli(self.folder, "up", *arguments)
                self.assertEqual((done.returncode, done.stdout), (4, ""), done.stderr)
                self.assertIn(said, done.stderr)
                self.assertNotIn("Traceback", done.stderr)
                present = [
                    name for name in sorted(os.listdir(self.folder)) if name != "__pycache__"
                ]
                self.assertEqual(present, [name for name in before if name != "__pycache__"])

    def test_known_and_unknown_runs_are_told_apart(self) -> None:
        cli(self.folder, "up", "flow.py:other", "-r", "known")
        again = cli(self.folder, "up", "flow.py:other", "-r", "known")
        ghost = cli(self.folder, "up", "flow.py:other", "-r", "ghost", "--resume")
        self.assertEqual((again.returncode, ghost.returncode), (4, 4))
        self.assertIn("exists already", again.stderr)
        self.assertIn("there is no run ghost", ghost.stderr)

    def test_an_interrupted_run_is_cancelled_and_resumes(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(signal=number):
                run_id = f"r{int(number)}"
                served, _ = self.served("up", "flow.py:slow", "-r", run_id)
                served.wait_for("a started")
                served.process.send_signal(number)
                code, out = served.end()
                self.assertEqual((code, json.loads(out)["status"]), (2, "cancelled"))
                resumed = cli(self.folder, "up", "flow.py:other", "-r", run_id, "--resume")
                self.assertEqual(resumed.returncode, 0, resumed.stderr)

    def test_a_second_signal_leaves_at_once(self) -> None:
        served, _ = self.served("up", "flow.py:deaf")
        served.wait_for("a started")
        served.process.send_signal(signal.SIGINT)
        served.wait_for("Stopping")
        while served.process.poll() is None:
            served.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                served.process.wait(0.15)
        self.assertEqual(served.process.returncode, 2)

    def test_metrics_can_be_switched_off(self) -> None:
        for flags in (["--metrics", "false"], ["--no-metrics"]):
            served, url = self.served("up", "flow.py", *flags, "--db", f"m{len(flags)}.db")
            with self.assertRaises(urllib.error.HTTPError) as caught:
                self.fetch(f"{url}/metrics")
            caught.exception.close()
            self.assertEqual(caught.exception.code, 404)
            served.process.send_signal(signal.SIGTERM)
            served.end()

    def test_a_detached_run_serves_and_hides_its_token(self) -> None:
        done = cli(self.folder, "up", "flow.py", "--serve", "--port", "0", "-d", "-r", "d",
                   "--auth-token", "sk-secret")  # fmt: skip
        facts = json.loads(done.stdout)
        try:
            self.assertEqual(list(facts), ["runId", "pid", "logFile", "url"])
            status = json.loads(self.fetch(f"{facts['url']}/", token="sk-secret"))
            self.assertEqual(status["runId"], "d")
            if os.path.exists("/proc/self/cmdline"):
                with open(f"/proc/{facts['pid']}/cmdline", "rb") as line:
                    self.assertNotIn(b"sk-secret", line.read())
            os.kill(facts["pid"], signal.SIGHUP)
            self.assertEqual(self.fetch(f"{facts['url']}/health"), b'{"ok":true}')
        finally:
            os.kill(facts["pid"], signal.SIGTERM)

    def test_a_detached_run_that_dies_shows_why(self) -> None:
        done = cli(self.folder, "up", "nope.py", "-d")
        self.assertEqual(done.returncode, 1)
        self.assertIn("no workflow file nope.py", done.stderr)

    def test_the_demo_finishes_after_its_own_curl_line(self) -> None:
        served = ServedProcess(self, self.folder, "demo", "--port", "0")
        url = served.wait_for(r"Approve it: curl -X POST (http://\S+/approve/ship)$")[1]
        self.assertEqual(json.loads(self.fetch(url, "POST")), {"runId": "demo"})
        served.wait_for("Workflow finished")
        served.process.send_signal(signal.SIGINT)
        self.assertEqual(served.end()[0], 0)

    def test_the_module_imports_without_heavy_parts(self) -> None:
        code = (
            "import smithers_serve, sys; print([m for m in ('asyncio','ssl') if m in sys.modules])"
        )
        done = python(self.folder, "-c", "import http.client, sys; print('ssl' in sys.modules)")
        found = python(self.folder, "-c", code).stdout
        self.assertNotIn("asyncio", found)
        self.assertEqual("ssl" in found, done.stdout == "True\n")


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
# Processes: a served run, helpers that take orders, and what the system says of them
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


class Helper:
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
            raise RuntimeError("a helper process has died")
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
def helper(name: str, *arguments: object) -> Iterator[Helper]:
    process = Helper(name, *arguments)
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
    with helper("_load", port, path, count, seconds, rounds) as load:
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
def serving(prefill: int = 0) -> Iterator[tuple[Helper, int, str]]:
    """Yield (server helper, port, database) over a run that already has some events."""
    with tempfile.TemporaryDirectory(prefix="smithers-bench-") as folder:
        path = os.path.join(folder, "smithers.db")
        if prefill:
            writer = Writer(path)
            writer.emit(prefill - 1, 0.0, 10_000)
            writer.db.close()
        with helper("_serve", path) as server:
            yield server, server.read(), path


@contextlib.contextmanager
def listening(port: int, count: int, after: int = -1) -> Iterator[Helper]:
    with helper("_listen", port, count, after) as listener:
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
    with serving() as (server, port, path), listening(port, clients) as listener:
        with helper("_write", path) if elsewhere else contextlib.nullcontext(server) as writer:
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
    with serving(prefill=events) as (server, port, _):
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
    with serving() as (server, port, _):
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


def measure_reach(server: Helper, listener: Helper) -> float:
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
    with serving() as (server, port, _), listening(port, 200) as listener:
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
    with helper("_steps", kind, count) as process:
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
    return rows


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
    b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"not\r\n12;x=y\r\ne\": \"no, thanks\"}\r\n"
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
    with served(FUZZ_FLOW) as run:
        run.wait_for_status("waiting-approval")
        fuzz = Fuzz(run, arguments.seed)
        fuzz.throw(min(1.0, arguments.seconds / 4))  # what a warm server holds is no leak
        time.sleep(3.0)
        before = vitals(run.pid)
        fuzz.seed += 1
        fuzz.throw(arguments.seconds * 0.75)
        ask(run.port, "POST", "/cancel")
        fuzz.seed += 1
        fuzz.throw(arguments.seconds * 0.25)  # at a run that has ended
        after = settle(run.pid, before, 15.0)
        if run.process.poll() is not None:
            fuzz.wrong.append(f"the server has ended with {run.process.returncode}")
        if after.threads > before.threads + 1 or after.descriptors > before.descriptors + 4:
            fuzz.wrong.append(f"leaked: {before} became {after}")
        fuzz.wrong += [line for line in run.lines if "Traceback" in line or "ERROR" in line][:5]
    counts = ", ".join(f"{key}: {count:,}" for key, count in sorted(fuzz.statuses.items()))
    print(f"{fuzz.requests:,} connections, seed {arguments.seed}; {counts}")
    print(f"threads {before.threads} -> {after.threads}, descriptors {before.descriptors} -> "
          f"{after.descriptors}, memory {before.rss:.1f} -> {after.rss:.1f} MiB")  # fmt: skip
    print("\n".join(f"VIOLATION {text}" for text in fuzz.wrong[:20]) or "no violation")
    return 1 if fuzz.wrong else 0


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------

HELPERS: dict[str, Callable[..., int]] = {
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
    if argv and argv[0] in HELPERS:
        return HELPERS[argv[0]](*argv[1:])
    arguments = make_arguments().parse_args(argv)
    return int(arguments.run(arguments))


def setUpModule() -> None:
    logging.disable(logging.CRITICAL)  # failures that a test asks for are not news


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in (*HELPERS, "bench", "crash", "fuzz"):
        raise SystemExit(main(sys.argv[1:]))
    unittest.main()
