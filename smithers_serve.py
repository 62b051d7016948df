"""Durable workflows in one sqlite file, with an HTTP server beside the run.

Write a workflow as a Python function, then run and serve it:

    python -m smithers_serve up workflow.py --serve

Every state change is one sqlite transaction, committed with its events before anybody is told;
after a crash `--resume` goes on from the last commit and finished tasks never run again.
The HTTP surface is the "serve mode" of Smithers: status, server-sent events, rendered frames,
approval gates, cancel and Prometheus metrics. Licence: MIT.

The file reads from top to bottom; nothing is used before it is defined.

    Errors, JSON         one class per wire code; one compact form for rows, events and answers
    Elements, Frames     what a workflow function returns; how a tree is stored and served
    Records              rows as they cross a section
    Metrics              a table of families, and their text form
    Schema, Statements   the tables; `Reads` and `Tx`: all SQL on rows
    Database             `SmithersDb`: the file, its lock, transactions, snapshots
    Schedule, Progress   `Plan`, a tree laid out, and how far a run has come in it: both pure
    Tasks                how one attempt runs: function, coroutine, command, executor
    Control              who owns a run, decisions, cancel: from any process with the file
    Attempts, Steps      what is in flight; what is written when something happens
    Engine               claims a run and drives it
    Rehearsal            the same engine in memory: no tasks, no people, a clock that jumps
    HTTP, Event stream   a request's bytes read strictly; a run's log as SSE bytes
    Views                what people ask of a run
    Page                 one document that asks the routes: its style
    Script, Drawing      its script: what it knows and asks for; what it shows
    Document             the document whole, with its Content-Security-Policy
    Routes               the table of routes, tokens, the app of one run
    Conversation         the protocol of one connection, without a socket
    Network, Server      the thread that owns every socket; the socket that listens
    Command line, Up     flags, and what they name; the process of one run
    Workers, Many runs   the processes that drive runs, and who starts them; the app of all runs
    Operator's commands  what is told and done from a terminal; the table of commands

Threads. The engine's drives one run and is the only one to change what is known of it; heartbeat
writes once a second; each task has one while it runs. The network thread owns every socket; four
workers make answers that read, one makes those that write; one accepts, the main thread waits for
signals. They meet in queues: the engine's mailbox, the network's inbox, the workers' queues. The
server of many runs has a supervisor and no engine: each run's is in a process of its own.

Locks, each explained where it is made: the adapter's for one write transaction, the Watch's for one
statement, a task's for its stop; the Metrics', for sums, is the only one taken inside another.

A request: `Network._serve` reads bytes, `Conversation.converse` makes a head of them, `ServeApp`
admits it, a route's function answers: at once if it blocks nobody, else in a worker.
An attempt: `Progress` says start, `Steps` writes it, after the commit `Attempts` launches it; its
thread posts lines and its end, `Progress` says what follows, `Steps` writes that.
An event: `Tx.append_event`, the commit, then `on_event` here, and by `Streams` to every client
whose cursor is before it; other processes find the commit by `PRAGMA data_version`.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import codecs
import collections
import contextlib
import contextvars
import dataclasses
import difflib
import errno
import functools
import graphlib
import hashlib
import heapq
import hmac
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import secrets
import selectors
import shlex
import signal
import socket
import sqlite3
import stat
import struct
import sys
import threading
import time
import types
import unicodedata
import urllib.parse
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Literal,
    NamedTuple,
    TextIO,
    TypeVar,
    Union,
    cast,
    get_args,
)

if TYPE_CHECKING:
    import datetime
    import ssl
    import subprocess
    from concurrent.futures import Executor, Future

# Whatever runs this file (`-m`, a worker of multiprocessing or of MPI), there is one module, known
# by its own name: a workflow file imports this one, and what is pickled here is found by workers.
_run_as = __name__
if _run_as in ("__main__", "__mp_main__", "__worker__"):
    __name__ = "smithers_serve"
    sys.modules.setdefault(__name__, sys.modules[_run_as])

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Approval",
    "AuthoringError",
    "Ctx",
    "CurrentTask",
    "Event",
    "Fail",
    "Loop",
    "NodeState",
    "OwnerLost",
    "Parallel",
    "Pause",
    "Rehearsal",
    "RunExists",
    "RunNotFound",
    "RunOwned",
    "RunResult",
    "RunStatus",
    "Sequence",
    "ServeApp",
    "ServeError",
    "ServeServer",
    "ServerApp",
    "SmithersDb",
    "SmithersError",
    "StorageError",
    "Task",
    "Workflow",
    "create_serve_app",
    "create_server_app",
    "current_task",
    "fake_task",
    "main",
    "make_server",
    "rehearse",
    "run_workflow",
    "start_server",
]

logger = logging.getLogger("smithers_serve")

# What one value may weigh (bytes of UTF-8), so that no row, event or buffer grows without bound.
MAX_OUTPUT_BYTES = 1 << 20
MAX_LOG_BYTES = 32 << 20  # printed by one attempt: far above a chatty build, far below a disk
MAX_LOG_LINE = 8 << 10  # a longer line becomes several NodeOutput events
MAX_MESSAGE_CHARS = 4 << 10
MAX_NOTE_CHARS = 10_000
MAX_NAME_CHARS = 200  # of who decides, and of an id that is told back
COMMAND_TAIL_BYTES = 64 << 10

HEARTBEAT_SECONDS = 1.0
HEARTBEAT_STALE_SECONDS = 5.0  # without a move of it, an owner that cannot be seen is dead
WATCH_SECONDS = 0.05  # how often other processes' commits are looked for: half of 100 ms
STOP_GRACE_SECONDS = 10.0  # a function that ignores its flag is abandoned after this
KILL_AFTER_SECONDS = 5.0  # a command that ignores SIGTERM is killed after this
SUSPEND_SECONDS = 5.0  # both of the above when the engine is stopped
HURRY_SECONDS = 2.0  # both of the above when the process is told to leave: gone within 5 s
LOCK_PATIENCE_SECONDS = 60.0  # how long the engine waits for another process's write lock
HTTP_LOCK_PATIENCE_SECONDS = 30.0
MAX_RENDERS_WITHOUT_PROGRESS = 100
MAX_EVENTS_AT_ONCE = 1000  # of one transaction: then others have their turn at the file
MAX_TREE_DEPTH = 100
MAX_JSON_DEPTH = 500  # of a request's body or a run's input
MAX_RETRY_DELAY_SECONDS = 86400.0
INT64_MAX = (1 << 63) - 1

ACTIVE_STATUSES = ("queued", "running", "waiting-approval")
TERMINAL_STATUSES = ("finished", "failed", "cancelled", "continued")  # the last: the original's
TERMINAL_STATES = ("finished", "failed", "cancelled", "skipped")
NODE_STATES = ("pending", "waiting-approval", "in-progress", *TERMINAL_STATES)
GATE_STATUSES = ("requested", "approved", "denied", "cancelled", "all")


def start_thread(name: str, target: Callable[..., None], *args: Any) -> threading.Thread:
    """Return a started daemon thread; every thread starts here, so none outlives main."""
    thread = threading.Thread(target=target, args=args, name=f"smithers-{name}", daemon=True)
    thread.start()
    return thread


Key = tuple[str, int]  # how a node is named: (node id, iteration)


def now_ms() -> int:
    """Return milliseconds since the epoch: the one clock behind every `_at_ms`."""
    return time.time_ns() // 1_000_000


# ---------------------------------------------------------------------------
# Errors: one base, one class per wire code
# ---------------------------------------------------------------------------


class SmithersError(Exception):
    """Any error of this file: `code` for programs, the message for people."""

    code = "SERVER_ERROR"

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or type(self).code

    def to_json(self) -> dict[str, str]:
        return {"name": type(self).__name__, "message": str(self), "code": self.code}


class AuthoringError(SmithersError):
    """A mistake in a workflow, found at render before anything runs; the message names the id."""

    code = "INVALID_ARGUMENT"


class TaskFailed(SmithersError):
    """Why an attempt or a gate failed, when it was not the task's own exception."""

    code = "TASK_FAILED"


class StorageError(SmithersError):
    """The database cannot be opened, read or written. What was committed before stands."""

    code = "STORAGE_ERROR"


class DatabaseGone(StorageError):
    """The file is not the one that was opened: it was removed, or another one took its place."""


class OwnerLost(SmithersError):
    """Another engine owns the run now; this one must stop and write nothing more."""

    code = "OWNER_LOST"


class ServeError(SmithersError):
    """An error that HTTP can answer with: `status` and `code` are what goes on the wire."""

    status = 500
    headers: tuple[tuple[str, str], ...] = ()


class InvalidRequest(ServeError):
    status, code = 400, "INVALID_REQUEST"


class NotJson(InvalidRequest):
    """The body cannot be read. The original's two servers have two codes for it: see App."""


class Unauthorized(ServeError):
    status, code = 401, "UNAUTHORIZED"
    headers = (("WWW-Authenticate", "Bearer"),)


class Forbidden(ServeError):
    status, code = 403, "FORBIDDEN"


class NotFound(ServeError):
    status, code = 404, "NOT_FOUND"


class MethodMismatch(NotFound):
    """The path exists, the method does not: 404 as the original answers, with an Allow header."""

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.headers = (("Allow", allow),)


class RunNotFound(ServeError):
    status, code = 404, "RUN_NOT_FOUND"


class NodeNotFound(ServeError):
    status, code = 404, "NODE_NOT_FOUND"


class RequestTimeout(ServeError):
    status, code = 408, "REQUEST_TIMEOUT"


class RunNotActive(ServeError):
    status, code = 409, "RUN_NOT_ACTIVE"


class RunExists(ServeError):
    status, code = 409, "RUN_EXISTS"


class RunOwned(ServeError):
    status, code = 409, "RUN_OWNED"


class RunActive(ServeError):
    status, code = 409, "RUN_ACTIVE"


class ApprovalNotPending(ServeError):
    status, code = 409, "APPROVAL_NOT_PENDING"


class GateChanged(ServeError):
    status, code = 409, "GATE_CHANGED"


class PayloadTooLarge(ServeError):
    status, code = 413, "PAYLOAD_TOO_LARGE"


class UriTooLong(ServeError):
    status, code = 414, "URI_TOO_LONG"


class HeadersTooLarge(ServeError):
    status, code = 431, "HEADERS_TOO_LARGE"


class NotImplementedHere(ServeError):
    status, code = 501, "NOT_IMPLEMENTED"


class Unavailable(ServeError):
    status, code = 503, "UNAVAILABLE"
    headers = (("Retry-After", "5"),)


class VersionNotSupported(ServeError):
    status, code = 505, "HTTP_VERSION_NOT_SUPPORTED"


def scrub_paths(text: str) -> str:
    """Return `text` without the folders of this machine that an error message tends to carry."""
    return _private_prefixes().sub("", text)


@functools.lru_cache(maxsize=1)
def _private_prefixes() -> re.Pattern[str]:
    """Match a folder whose name says something about the machine, where a path begins."""
    folders = {os.path.expanduser("~"), sys.prefix, sys.base_prefix, *sys.path}
    with contextlib.suppress(OSError):  # the working folder may have been removed
        folders.add(os.getcwd())
    named = {os.path.normpath(folder) for folder in folders if os.path.isabs(folder)} - {os.sep}
    longest_first = sorted((re.escape(folder + os.sep) for folder in named), key=len, reverse=True)
    # Not within a longer path or a URL: a folder /app must not eat the middle of http://host/app/.
    return re.compile(r"(?<![\w.~/-])(?:" + "|".join(longest_first) + ")")


def describe_error(error: BaseException) -> dict[str, str]:
    """Return `{"name","message","code"?}` for a client: no traceback, no folder of this machine."""
    if isinstance(error, SmithersError):
        described = error.to_json()
    else:
        described = {"name": type(error).__name__, "message": _message_of(error)}
    described["message"] = printable(scrub_paths(described["message"])[:MAX_MESSAGE_CHARS])
    return described


def _message_of(error: BaseException) -> str:
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)) and error.strerror:
        return f"{error.strerror}: {os.path.basename(os.fsdecode(error.filename))!r}"
    try:
        message = str(error)
    except BaseException:  # user code: an error that cannot even say what it is
        return "(no message)"
    # Errors that only hold others say nothing by themselves: an asyncio TaskGroup's, for one.
    is_group = type(error).__name__.endswith("ExceptionGroup")  # Python 3.9 and 3.10 have none
    inner = getattr(error, "exceptions", ()) if is_group else ()
    if isinstance(inner, tuple) and inner:
        message += ": " + "; ".join(map(_named_message_of, inner[:MAX_INNER_ERRORS]))
    if error.__cause__ is not None:
        message += f" (caused by {_named_message_of(error.__cause__)})"
    return message


MAX_INNER_ERRORS = 10


def _named_message_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {_message_of(error)[:MAX_MESSAGE_CHARS]}"


def printable(text: str) -> str:
    """Return `text` with lone surrogates replaced, so that it can always be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def short(value: object) -> str:
    """Return what a value looks like, cut where an error message would drown in it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def log_safe(text: object) -> str:
    """Return `text` for one log line: control characters are escaped, so none can be forged."""
    if str(text).isprintable():
        return str(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


# ---------------------------------------------------------------------------
# JSON: one compact form, for rows, events and answers
# ---------------------------------------------------------------------------


def _encode_extra(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


_compact = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_encode_extra
)


def to_json(value: Any) -> str:
    """Return compact JSON (dataclasses through asdict).

    Raises TypeError or ValueError for what JSON cannot hold.
    """
    return _compact.encode(value)


def to_flat_json(value: Mapping[str, Any]) -> str:
    """Return what `to_json` does, of an object whose keys are plain words: three times as fast."""
    parts = []
    for name, item in value.items():
        if item.__class__ is str:
            text = _quote(item)
        else:
            text = str(item) if item.__class__ is int else to_json(item)
        parts.append(f'"{name}":{text}')
    return "{" + ",".join(parts) + "}"


_quote = json.encoder.encode_basestring


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether arrays and objects are nested deeper than this; without recursion."""
    level = [value]
    for _ in range(levels + 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return False
        level = [x for c in containers for x in (c.values() if isinstance(c, dict) else c)]
    return True


_strict = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys
)


def parse_json(data: bytes | str) -> Any:
    """Return the value of strict JSON.

    Raises ValueError for everything two parsers could read differently.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        value = _strict.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    # Where the interpreter gives up differs from version to version: at 1,000 or at 100,000 levels.
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise ValueError("nested too deeply")
    # json.loads builds lone surrogates from \ud800; they could never be written again.
    if "\\u" in text:
        to_json(value).encode("utf-8")
    return value


# ---------------------------------------------------------------------------
# Elements: what a workflow function returns
# ---------------------------------------------------------------------------

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Backoff = Literal["fixed", "linear", "exponential"]
OnDeny = Literal["fail", "continue", "skip"]
OnTimeout = Literal["fail", "approve", "deny"]
OnMax = Literal["return-last", "fail"]
RunStatus = Literal[
    "queued", "running", "waiting-approval", "finished", "failed", "cancelled", "continued"
]
NodeState = Literal[
    "pending", "waiting-approval", "in-progress", "finished", "failed", "cancelled", "skipped"
]
# What may stand below an element: one, None for nothing, or a list of them (a fan-out).
Child = Union["Element", None, "list[Any]", "tuple[Any, ...]"]
# What a task does: a function or coroutine function, an argv, or its output.
Runnable = Union[Callable[..., Any], "list[str]", "tuple[str, ...]", "dict[str, Any]"]


def check_id(value: object, what: str) -> str:
    """Return `value` when it is a valid id. Raises AuthoringError INVALID_ID."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise AuthoringError(
            f"{what} id {value!r}: expected 1-128 characters of [A-Za-z0-9._:-]", "INVALID_ID"
        )
    return value


def _check_number(owner: str, name: str, value: Any, minimum: float, whole: bool = False) -> None:
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < minimum:
        kind = "a whole number" if whole else "a number"
        raise AuthoringError(
            f"{owner}: {name} must be {kind} of at least {minimum:g}, got {short(value)}"
        )


def _check_choice(owner: str, name: str, value: object, kind: Any) -> None:
    choices = get_args(kind)
    if value not in choices:
        raise AuthoringError(
            f"{owner}: {name} must be one of {', '.join(choices)}, got {short(value)}"
        )


def _check_flags(owner: str, **flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise AuthoringError(f"{owner}: {name} must be True or False, got {short(value)}")


def _check_text(owner: str, **texts: object) -> None:
    for name, value in texts.items():
        if value is not None and (not isinstance(value, str) or printable(value) != value):
            raise AuthoringError(f"{owner}: {name} must be text, got {short(value)}")


def _iterable(owner: str, name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise AuthoringError(f"{owner}: {name} must be a list, got {short(value)}")
    return tuple(value)


def _keywords(owner: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise AuthoringError(
            f"{owner}: kwargs must be a dict with names as keys, got {short(value)}"
        )
    return dict(value)


def _needs_of(
    owner: str, needs: Mapping[str, str] | Iterable[str]
) -> tuple[tuple[str | None, str], ...]:
    """Return `needs` as (parameter or None, task id) pairs."""
    if isinstance(needs, str):
        raise AuthoringError(
            f"{owner}: needs must be a list of ids or a dict, got the text {needs!r}"
        )
    if isinstance(needs, Mapping):
        pairs: list[tuple[str | None, str]] = [
            (parameter, target) for parameter, target in needs.items()
        ]
    else:
        pairs = [(None, target) for target in _iterable(owner, "needs", needs)]
    for parameter, target in pairs:
        check_id(target, f"{owner}: needs")
        if parameter is not None and not (isinstance(parameter, str) and parameter.isidentifier()):
            raise AuthoringError(f"{owner}: needs key {parameter!r} is not a parameter name")
    return tuple(pairs)


def _approvers_of(owner: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = _iterable(owner, "approvers", value)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise AuthoringError(f"{owner}: approvers must be names or roles, got {short(value)}")
    return names


def _children_of(owner: str, children: tuple[Any, ...]) -> tuple[Element, ...]:
    """Return the children in order: None dropped, a list (a fan-out) taken in place."""
    kept: list[Element] = []
    for child in children:
        if isinstance(child, (list, tuple)):
            kept.extend(_children_of(owner, tuple(child)))
        elif isinstance(child, Element) and not isinstance(child, Workflow):
            kept.append(child)
        elif child is not None:
            raise AuthoringError(
                f"{owner}: a child must be an element or None, got {short(child)}", "INVALID_TREE"
            )
    return tuple(kept)


@dataclasses.dataclass(frozen=True, init=False)
class Element:
    """Anything that may stand in a tree."""

    tag = "smithers:element"

    def _fill(self, **values: Any) -> None:
        """Set the fields of a frozen instance once, from its own constructor."""
        self.__dict__.update(values)

    def props(self) -> dict[str, str]:
        """Return what a frame shows of this element: all strings."""
        return {}


@dataclasses.dataclass(frozen=True, init=False)
class Container(Element):
    """An element with children."""

    children: tuple[Element, ...]


@dataclasses.dataclass(frozen=True, init=False)
class Workflow(Container):
    """The root: `name` and children that run in order."""

    name: str
    tag = "smithers:workflow"

    def __init__(self, name: str, *children: Child) -> None:
        if not isinstance(name, str) or not 1 <= len(name) <= 200:
            raise AuthoringError(
                f"Workflow name must be text of 1 to 200 characters, got {short(name)}"
            )
        _check_text("Workflow", name=name)
        self._fill(name=name, children=_children_of(f"Workflow {name!r}", children))

    def props(self) -> dict[str, str]:
        return {"name": self.name}


@dataclasses.dataclass(frozen=True, init=False)
class Sequence(Container):
    """Children in order."""

    tag = "smithers:sequence"

    def __init__(self, *children: Child) -> None:
        self._fill(children=_children_of("Sequence", children))


@dataclasses.dataclass(frozen=True, init=False)
class Parallel(Container):
    """Children together; at most `max_concurrency` of the tasks below it run at once."""

    max_concurrency: int | None
    tag = "smithers:parallel"

    def __init__(self, *children: Child, max_concurrency: int | None = None) -> None:
        if max_concurrency is not None:
            _check_number("Parallel", "max_concurrency", max_concurrency, 1, whole=True)
        self._fill(children=_children_of("Parallel", children), max_concurrency=max_concurrency)

    def props(self) -> dict[str, str]:
        return {} if self.max_concurrency is None else {"maxConcurrency": str(self.max_concurrency)}


@dataclasses.dataclass(frozen=True, init=False)
class Loop(Container):
    """Children in order, again and again, until `until` is true.

    It is looked at before each iteration, also the first.

    After `max_iterations` the loop ends (`on_max="return-last"`) or fails the run (`"fail"`).
    """

    id: str
    until: bool
    max_iterations: int
    on_max: OnMax
    tag = "smithers:ralph"

    def __init__(
        self,
        *children: Child,
        id: str,
        until: bool,
        max_iterations: int = 5,
        on_max: OnMax = "return-last",
    ) -> None:
        owner = f"Loop {check_id(id, 'Loop')!r}"
        _check_flags(owner, until=until)
        _check_number(owner, "max_iterations", max_iterations, 1, whole=True)
        _check_choice(owner, "on_max", on_max, OnMax)
        kept = _children_of(owner, children)
        self._fill(children=kept, id=id, until=until, max_iterations=max_iterations, on_max=on_max)

    def props(self) -> dict[str, str]:
        return {
            "id": self.id,
            "maxIterations": str(self.max_iterations),
            "onMaxReached": self.on_max,
            "until": _text_of(self.until),
        }


@dataclasses.dataclass(frozen=True, init=False)
class Fail(Container):
    """The run fails with this message when its turn has come: after a rollback, for one.

    What is in flight ends first, as at any failure.
    """

    message: str
    tag = "smithers:fail"

    def __init__(self, message: str) -> None:
        _check_text("Fail", message=message)
        if not message:
            raise AuthoringError("Fail: say why the run fails")
        self._fill(message=message, children=())

    def props(self) -> dict[str, str]:
        return {"message": self.message}


def _text_of(value: object) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


@dataclasses.dataclass(frozen=True, init=False)
class Leaf(Element):
    """A node of the run: a Task or an Approval."""

    id: str
    needs: tuple[tuple[str | None, str], ...]
    label: str | None
    on_deny: OnDeny
    skip_if: bool
    continue_on_fail: bool
    approvers: tuple[str, ...] | None
    tag = "smithers:task"
    kind: ClassVar[str] = "task"

    @property
    def asks_first(self) -> bool:
        """True when a person decides before this node goes on."""
        raise NotImplementedError

    def request(self) -> dict[str, Any]:
        """Return what is kept of its gate for whoever decides."""
        return {
            "title": self.label,
            "summary": None,
            "metadata": None,
            "onDeny": self.on_deny,
            "needs": [target for _, target in self.needs],
            "approvers": None if self.approvers is None else list(self.approvers),
        }


@dataclasses.dataclass(frozen=True, init=False)
class Task(Leaf):
    """A node that does something: `run` is a function, an argv list (no shell) or a JSON object.

    Times in seconds.
    """

    run: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    retries: int
    retry_delay: float
    backoff: Backoff
    timeout: float | None
    needs_approval: bool

    def __init__(
        self,
        id: str,
        run: Runnable,
        *,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        needs: Mapping[str, str] | Iterable[str] = (),
        label: str | None = None,
        retries: int = 0,
        retry_delay: float = 0.0,
        backoff: Backoff = "fixed",
        timeout: float | None = None,
        needs_approval: bool = False,
        approvers: Iterable[str] | None = None,
        on_deny: OnDeny = "fail",
        skip_if: bool = False,
        continue_on_fail: bool = False,
    ) -> None:
        owner = f"Task {check_id(id, 'Task')!r}"
        _check_number(owner, "retries", retries, 0, whole=True)
        _check_number(owner, "retry_delay", retry_delay, 0)
        _check_choice(owner, "backoff", backoff, Backoff)
        _check_choice(owner, "on_deny", on_deny, OnDeny)
        if timeout is not None:
            _check_number(owner, "timeout", timeout, 0.001)
        _check_flags(
            owner, needs_approval=needs_approval, skip_if=skip_if, continue_on_fail=continue_on_fail
        )
        _check_text(owner, label=label)
        self._fill(
            id=id,
            run=_runnable(owner, run),
            args=_iterable(owner, "args", args),
            kwargs=_keywords(owner, kwargs),
            needs=_needs_of(owner, needs),
            label=label,
            retries=retries,
            retry_delay=retry_delay,
            backoff=backoff,
            timeout=timeout,
            needs_approval=needs_approval,
            approvers=_approvers_of(owner, approvers),
            on_deny=on_deny,
            skip_if=skip_if,
            continue_on_fail=continue_on_fail,
        )
        self._check_arguments(owner)

    def _check_arguments(self, owner: str) -> None:
        named = [parameter for parameter, _ in self.needs if parameter is not None]
        if not callable(self.run) and (self.args or self.kwargs or named):
            raise AuthoringError(
                f"{owner}: args, kwargs and needs by keyword are for functions only"
            )
        twice = sorted(set(named) & set(self.kwargs))
        if twice:
            raise AuthoringError(f"{owner}: {', '.join(twice)} given in both kwargs and needs")

    @property
    def asks_first(self) -> bool:
        return self.needs_approval

    def retry_delay_after(self, failures: int) -> float:
        """Return the seconds to wait after this many failed attempts."""
        factor = {
            "fixed": 1.0,
            "linear": float(failures),
            "exponential": 2.0 ** min(failures - 1, 40),
        }
        return min(self.retry_delay * factor[self.backoff], MAX_RETRY_DELAY_SECONDS)

    def props(self) -> dict[str, str]:
        shown: dict[str, Any] = {
            "id": self.id,
            "label": self.label,
            "dependsOn": ",".join(target for _, target in self.needs) or None,
            "retries": self.retries or None,
            "timeoutMs": None if self.timeout is None else round(self.timeout * 1000),
            "needsApproval": self.needs_approval or None,
            "skipIf": self.skip_if or None,
            "continueOnFail": self.continue_on_fail or None,
        }
        return {name: _text_of(value) for name, value in shown.items() if value is not None}


def _checked_json(owner: str, what: str, value: Any) -> None:
    """Refuse what could not be stored. Raises AuthoringError."""
    try:
        size = len(to_json(value).encode("utf-8"))
    except (TypeError, ValueError, RecursionError) as error:
        raise AuthoringError(f"{owner}: {what} must be JSON: {printable(str(error))}") from error
    if size > MAX_OUTPUT_BYTES:
        raise AuthoringError(f"{owner}: {what} has over {MAX_OUTPUT_BYTES} bytes of JSON")


def _runnable(owner: str, run: Any) -> Any:
    """Return `run` in the form that is kept: a callable, a tuple of arguments, or a JSON object."""
    if callable(run):
        return run
    if isinstance(run, (list, tuple)) and run and all(isinstance(part, str) for part in run):
        if any("\0" in part for part in run):
            raise AuthoringError(f"{owner}: a command's arguments cannot hold a NUL character")
        return tuple(run)
    if isinstance(run, dict):
        _checked_json(owner, "a static output", run)
        return run
    raise AuthoringError(
        f"{owner}: run must be a function, a non-empty list of text or a JSON object,"
        f" got {short(run)}"
    )


@dataclasses.dataclass(frozen=True, init=False)
class Approval(Leaf):
    """A gate: the run goes on from here when somebody has decided.

    `timeout` in seconds from the request.
    """

    title: str | None
    summary: str | None
    metadata: Mapping[str, Any] | None
    timeout: float | None
    on_timeout: OnTimeout
    kind = "approval"

    def __init__(
        self,
        id: str,
        *,
        title: str | None = None,
        summary: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        needs: Mapping[str, str] | Iterable[str] = (),
        approvers: Iterable[str] | None = None,
        on_deny: OnDeny = "fail",
        timeout: float | None = None,
        on_timeout: OnTimeout = "fail",
        skip_if: bool = False,
    ) -> None:
        owner = f"Approval {check_id(id, 'Approval')!r}"
        _check_text(owner, title=title, summary=summary)
        _check_choice(owner, "on_deny", on_deny, OnDeny)
        _check_choice(owner, "on_timeout", on_timeout, OnTimeout)
        if timeout is not None:
            _check_number(owner, "timeout", timeout, 0.001)
        _check_flags(owner, skip_if=skip_if)
        _checked_json(owner, "metadata", metadata)
        self._fill(
            id=id,
            title=title,
            summary=summary,
            metadata=metadata,
            needs=_needs_of(owner, needs),
            approvers=_approvers_of(owner, approvers),
            label=title,
            on_deny=on_deny,
            timeout=timeout,
            on_timeout=on_timeout,
            skip_if=skip_if,
            continue_on_fail=False,
        )

    @property
    def asks_first(self) -> bool:
        return True

    def request(self) -> dict[str, Any]:
        return {
            **super().request(),
            "summary": self.summary,
            "metadata": self.metadata,
            "timeoutMs": None if self.timeout is None else round(self.timeout * 1000),
            "onTimeout": self.on_timeout,
        }

    def props(self) -> dict[str, str]:
        shown: dict[str, Any] = {
            "id": self.id,
            "label": self.title,
            "dependsOn": ",".join(target for _, target in self.needs) or None,
            "needsApproval": True,
            "approvalMode": "decision",
            "onDeny": self.on_deny,
            "skipIf": self.skip_if or None,
            "timeoutMs": None if self.timeout is None else round(self.timeout * 1000),
        }
        return {name: _text_of(value) for name, value in shown.items() if value is not None}


@dataclasses.dataclass(frozen=True, init=False)
class Pause(Approval):
    """The run goes on from here after so many seconds, or at a time; nobody decides it.

    `until` is a datetime with a time zone, or seconds since the epoch. Its deadline is stored when
    its turn comes, where a gate's is, and holds through restarts. Its output is that of a gate.
    """

    until: float | None
    kind = "pause"

    def __init__(
        self,
        id: str,
        *,
        seconds: float | None = None,
        until: datetime.datetime | float | None = None,
        needs: Mapping[str, str] | Iterable[str] = (),
        skip_if: bool = False,
    ) -> None:
        owner = f"Pause {check_id(id, 'Pause')!r}"
        if (seconds is None) == (until is None):
            raise AuthoringError(f"{owner}: give either seconds or until")
        if until is not None and not isinstance(until, (int, float)):
            if getattr(until, "tzinfo", None) is None:
                raise AuthoringError(f"{owner}: until needs a time zone, got {short(until)}")
            until = until.timestamp()
        for name, value in (("seconds", seconds), ("until", until)):
            if value is not None:
                _check_number(owner, name, value, 0)
        super().__init__(id, needs=needs, on_timeout="approve", skip_if=skip_if)
        self._fill(timeout=seconds, until=until)

    def request(self) -> dict[str, Any]:
        until_ms = None if self.until is None else round(1000 * self.until)
        return {**super().request(), "pause": True, "untilMs": until_ms}

    def props(self) -> dict[str, str]:
        until = {} if self.until is None else {"until": f"{self.until:.3f}"}
        props = {**super().props(), "approvalMode": "pause", **until}
        return {
            name: text for name, text in props.items() if name not in ("needsApproval", "onDeny")
        }


class CtxSource:
    """Where a Ctx reads from.

    This one knows what it is given, so a workflow function can be called in a unit test. Outputs
    are named by id, or by (id, iteration); a node with an output has finished, one with an error
    has failed, unless `states` says otherwise.
    """

    def __init__(
        self,
        outputs: Mapping[Any, Any] | None = None,
        states: Mapping[str, NodeState] | None = None,
        errors: Mapping[str, dict[str, Any] | BaseException] | None = None,
        iterations: Mapping[str, int] | None = None,
    ) -> None:
        plain = ((key, -1) if isinstance(key, str) else key for key in outputs or ())
        self._outputs = dict(zip(plain, (outputs or {}).values()))
        self._errors = dict(errors or {})
        self._iterations = dict(iterations or {})
        ended = {id: "finished" for id, _ in self._outputs}
        self._states = {**ended, **dict.fromkeys(self._errors, "failed"), **(states or {})}

    def find_output(self, id: str, iteration: int | None) -> str | None:
        """Return an output as JSON text, or None when there is none."""
        found = {number: output for (name, number), output in self._outputs.items() if name == id}
        if iteration is None:
            iteration = max(found, default=-1)
        output = found.get(iteration, found.get(-1))
        return None if output is None else to_json(output)

    def find_state(self, id: str) -> str | None:
        return self._states.get(id)

    def find_error(self, id: str) -> dict[str, Any] | None:
        error = self._errors.get(id)
        return describe_error(error) if isinstance(error, BaseException) else error

    def find_iteration(self, loop_id: str) -> int:
        return self._iterations.get(loop_id, 0)


class Ctx:
    """What a workflow function may read: the input and what the run has produced so far.

    Every read is remembered; the function is called again only when something that it read changed.
    A test makes one of outputs, states, errors and iterations: see CtxSource.
    """

    def __init__(
        self,
        run_id: str,
        input: dict[str, Any] | None = None,
        *,
        outputs: Mapping[Any, Any] | None = None,
        states: Mapping[str, NodeState] | None = None,
        errors: Mapping[str, dict[str, Any] | BaseException] | None = None,
        iterations: Mapping[str, int] | None = None,
        source: CtxSource | None = None,
    ) -> None:
        self.run_id = run_id
        self.input: dict[str, Any] = {} if input is None else input
        self.reads: set[tuple[str, str]] = set()
        self._source = source or CtxSource(outputs, states, errors, iterations)

    def output(self, id: str, default: Any = None, iteration: int | None = None) -> Any:
        """Return the output of node `id` (its newest iteration if none is given), or `default`."""
        self.reads.add(("output", id))
        found = self._source.find_output(id, iteration)
        return default if found is None else json.loads(found)

    def state(self, id: str) -> NodeState | None:
        """Return the state of node `id` in its current iteration, None when never rendered."""
        self.reads.add(("state", id))
        return cast("NodeState | None", self._source.find_state(id))

    def error(self, id: str) -> dict[str, Any] | None:
        """Return `{"name","message","code"?}` of node `id` when it has failed, else None."""
        self.reads.add(("error", id))
        return self._source.find_error(id)

    def iteration(self, loop_id: str) -> int:
        """Return the current iteration of a loop, from 0."""
        self.reads.add(("iteration", loop_id))
        return self._source.find_iteration(loop_id)


# ---------------------------------------------------------------------------
# Frames: a rendered tree as the JSON that is stored and served
# ---------------------------------------------------------------------------


def xml_of(element: Element) -> dict[str, Any]:
    """Return the element as `{"kind","tag","props","children"}`, props sorted, all strings."""
    props = element.props()
    node: dict[str, Any] = {
        "kind": "element",
        "tag": element.tag,
        "props": {key: props[key] for key in sorted(props)},
    }
    node["children"] = (
        [xml_of(child) for child in element.children] if isinstance(element, Container) else []
    )
    return node


def mounted_names(text: str) -> list[str]:
    """Return the name of every node in document order, from a frame's mounted ids."""
    return list(json.loads(text or "[]"))


def name_of(key: Key) -> str:
    return f"{key[0]}::{key[1]}"


def key_of(name: str) -> Key:
    node_id, _, iteration = name.rpartition("::")
    return node_id, int(iteration)


@functools.lru_cache(maxsize=4)
def parse_tree(xml_json: str) -> dict[str, Any]:
    return dict(json.loads(xml_json)) if xml_json else {}


def walk_tree(element: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield an element and everything below it, in document order."""
    stack = [element]
    while stack:
        found = stack.pop()
        if found.get("tag"):  # another program's tree may hold text too
            yield found
        stack.extend(reversed(found.get("children") or ()))


# ---------------------------------------------------------------------------
# Records: rows as they cross a section, and their JSON form
# ---------------------------------------------------------------------------


class Run(NamedTuple):
    """One row of `_smithers_runs`, the columns we use."""

    run_id: str
    workflow_name: str
    workflow_path: str | None
    workflow_hash: str | None
    status: str
    created_at_ms: int
    started_at_ms: int | None
    finished_at_ms: int | None
    heartbeat_at_ms: int | None
    runtime_owner_id: str | None
    cancel_requested_at_ms: int | None
    error_json: str | None
    config_json: str | None

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL_STATUSES

    @property
    def config(self) -> dict[str, Any]:
        """What is kept of how it is run: `maxConcurrency`, `cancel` (by, reason), and the like."""
        found = json.loads(self.config_json) if self.config_json else {}
        return found if isinstance(found, dict) else {}

    def to_json(self, summary: Mapping[str, int]) -> dict[str, Any]:
        return {
            "runId": self.run_id,
            "workflowName": self.workflow_name,
            "status": self.status,
            "startedAtMs": self.started_at_ms,
            "finishedAtMs": self.finished_at_ms,
            "summary": dict(summary),
        }


class Node(NamedTuple):
    node_id: str
    iteration: int
    state: str
    last_attempt: int | None
    updated_at_ms: int
    label: str | None
    kind: str | None  # of the element: task, approval, pause; None: of another program

    @property
    def key(self) -> Key:
        return self.node_id, self.iteration


class Attempt(NamedTuple):
    node_id: str
    iteration: int
    attempt: int
    state: str
    started_at_ms: int
    finished_at_ms: int | None
    error_json: str | None
    meta_json: str | None

    @property
    def key(self) -> Key:
        return self.node_id, self.iteration

    @property
    def meta(self) -> dict[str, Any]:
        """What is kept beside its result.

        `group`: process group and start time of its command; `crashed`: its process died under it;
        `dueAtMs`: when the retry after it is due; `traceback`; `forgiven`: it does not count;
        `stop`: why an executor's task was told to stop.
        """
        found = json.loads(self.meta_json) if self.meta_json else {}
        return found if isinstance(found, dict) else {}


class Frame(NamedTuple):
    run_id: str
    frame_no: int
    created_at_ms: int
    xml_json: str
    xml_hash: str
    mounted_task_ids_json: str
    task_index_json: str
    note: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "runId": self.run_id,
            "frameNo": self.frame_no,
            "createdAtMs": self.created_at_ms,
            "xmlJson": self.xml_json,
            "xmlHash": self.xml_hash,
            "mountedTaskIdsJson": self.mounted_task_ids_json,
            "taskIndexJson": self.task_index_json,
            "note": self.note,
        }


@functools.lru_cache(maxsize=256)
def _request_of(request_json: str | None) -> Mapping[str, Any]:
    return dict(json.loads(request_json)) if request_json else {}


class Gate(NamedTuple):
    """One row of `_smithers_approvals`."""

    node_id: str
    iteration: int
    status: str
    requested_at_ms: int | None
    decided_at_ms: int | None
    note: str | None
    decided_by: str | None
    request_json: str | None

    @property
    def key(self) -> Key:
        return self.node_id, self.iteration

    @property
    def request(self) -> Mapping[str, Any]:
        return _request_of(self.request_json)

    @property
    def is_pause(self) -> bool:
        """True when nobody decides it: it ends by its deadline."""
        # Few are, and to parse what each of 2,000 gates asks takes its time.
        return '"pause"' in (self.request_json or "") and self.request.get("pause") is True

    @property
    def deadline_at_ms(self) -> int | None:
        request = self.request
        until, timeout = request.get("untilMs"), request.get("timeoutMs")
        if until is not None or timeout is None or self.requested_at_ms is None:
            return None if until is None else int(until)
        return int(self.requested_at_ms + timeout)

    def to_output(self) -> dict[str, Any]:
        return {
            "approved": self.status == "approved",
            "note": self.note,
            "decidedBy": self.decided_by,
            "decidedAtMs": self.decided_at_ms,
        }


class Event(NamedTuple):
    seq: int
    timestamp_ms: int
    type: str
    payload_json: str

    @property
    def payload(self) -> dict[str, Any]:
        return dict(json.loads(self.payload_json))


class Decision(NamedTuple):
    """What a person said about a gate; `iteration` None means the one that waits."""

    verdict: str  # "approved" or "denied"
    iteration: int | None = None
    note: str | None = None
    decided_by: str | None = None
    requested_at_ms: int | None = None  # of the gate that was seen
    by_source: str | None = None  # `token` or `claimed`: how it is known who decided


class Identity(NamedTuple):
    """Who asks: the name and role of a token, or nobody in particular."""

    name: str | None
    role: str  # `viewer`, `approver` or `operator`, each with the rights of those before it
    is_proven: bool = False


# ---------------------------------------------------------------------------
# Metrics: counters, gauges, histograms and the text format 0.0.4
# ---------------------------------------------------------------------------

# The original's bounds in milliseconds: 100 ms to 205 s for work, 1 ms to 2 s for queries and
# requests.
DURATION_BOUNDS = tuple(100.0 * 2**k for k in range(12))
FAST_BOUNDS = tuple(1.0 * 2**k for k in range(12))


def format_number(value: float) -> str:
    """Return a sample value: whole numbers without a fraction."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _label_text(names: Seq[str], values: Seq[str]) -> str:
    escaped = (v.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"") for v in values)
    return ",".join(f'{name}="{value}"' for name, value in zip(names, escaped))


class Sample:
    """One counter or gauge value. `text` is what the last scrape rendered, None after a change."""

    def __init__(self, name: str, labels: str) -> None:
        self._head = f"{name}{{{labels}}} " if labels else f"{name} "
        self.value: float = 0
        self.text: str | None = None

    def add(self, amount: float) -> None:
        self.value += amount
        self.text = None

    def set(self, value: float) -> None:
        if value != self.value:
            self.value = value
            self.text = None

    def render(self) -> str:
        if self.text is None:
            self.text = f"{self._head}{format_number(self.value)}\n"
        return self.text


class Histogram:
    """Observations counted per bucket, in milliseconds."""

    def __init__(self, name: str, labels: str, bounds: tuple[float, ...]) -> None:
        comma = "," if labels else ""
        marks = [*map(format_number, bounds), "+Inf"]
        self._heads = [f'{name}_bucket{{{labels}{comma}le="{mark}"}} ' for mark in marks]
        suffix = f"{{{labels}}} " if labels else " "
        self._sum_head, self._count_head = f"{name}_sum{suffix}", f"{name}_count{suffix}"
        self._bounds = bounds
        self._counts = [0] * len(marks)
        self._sum = 0.0
        self.text: str | None = None

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value
        self.text = None

    def values(self) -> list[float]:
        return [*self._counts, self._sum]

    def add(self, changes: Iterator[float]) -> None:
        """Add to each bucket, then to the sum."""
        self._counts = [count + int(change) for count, change in zip(self._counts, changes)]
        self._sum += next(changes)
        self.text = None

    def render(self) -> str:
        if self.text is None:
            totals = list(itertools.accumulate(self._counts))
            lines = [f"{head}{total}\n" for head, total in zip(self._heads, totals)]
            lines.append(f"{self._sum_head}{format_number(round(self._sum, 3))}\n")
            lines.append(f"{self._count_head}{totals[-1]}\n")
            self.text = "".join(lines)
        return self.text


class Family:
    """All samples of one name. Without label names there is one sample, present from the start.

    Samples and families have no lock: only Metrics touches them, under its own.
    """

    def __init__(
        self, header: str, make: Callable[[str], Any], labels: tuple[str, ...] = ()
    ) -> None:
        self.header = header
        self._make = make
        self._labels = labels
        self.children: dict[tuple[str, ...], Any] = {}
        if not labels:
            self.children[()] = make("")

    def child(self, *values: str) -> Any:
        child = self.children.get(values)
        if child is None:
            child = self.children[values] = self._make(_label_text(self._labels, values))
        return child


# What is counted, as the original names it: a row a family. Bounds in milliseconds.
COUNTERS = {
    "smithers_runs_total": "Runs started or resumed here.",
    "smithers_runs_finished_total": "Runs that finished.",
    "smithers_runs_failed_total": "Runs that failed.",
    "smithers_runs_cancelled_total": "Runs that were cancelled.",
    "smithers_runs_resumed_total": "Runs that were resumed.",
    "smithers_nodes_started": "Attempts started.",
    "smithers_nodes_finished": "Nodes finished.",
    "smithers_nodes_failed": "Nodes failed for good.",
    "smithers_node_retries_total": "Retries scheduled.",
    "smithers_errors_total": "Failed attempts, failed runs and internal errors.",
    "smithers_events_emitted_total": "Events committed by this process.",
    "smithers_approvals_requested": "Approval gates opened.",
    "smithers_approvals_granted": "Approval gates approved.",
    "smithers_approvals_denied": "Approval gates denied.",
    "smithers_db_retries": "Waits for another writer that ran into the timeout.",
}
GAUGES = {
    "smithers_runs_active": "Runs that engines of this process drive now.",
    "smithers_nodes_active": "Attempts in progress now.",
    "smithers_approval_pending": "Gates that wait for a decision now.",
    "smithers_scheduler_queue_depth": "Tasks that are ready and wait for a place.",
    "smithers_scheduler_concurrency_utilization": "Used share of the concurrency limit, 0 to 1.",
    "smithers_event_streams_active": "Event streams open now.",
    "smithers_process_uptime_seconds": "Seconds since the metrics began.",
    "smithers_process_memory_rss_bytes": "Resident memory of the process in bytes.",
}
HISTOGRAMS = {
    "smithers_run_duration_ms": ("Run duration in ms.", DURATION_BOUNDS),
    "smithers_node_duration_ms": ("Node duration in ms.", DURATION_BOUNDS),
    "smithers_attempt_duration_ms": ("Attempt duration in ms.", DURATION_BOUNDS),
    "smithers_approval_wait_duration_ms": ("Request to decision in ms.", DURATION_BOUNDS),
    "smithers_scheduler_wait_duration_ms": ("Ready to started in ms.", DURATION_BOUNDS),
    "smithers_db_query_ms": ("Transaction and query time in ms.", FAST_BOUNDS),
}
# What the engines of several processes add up to; the rest is read at a scrape.
SHARED_GAUGES = (
    "smithers_runs_active",
    "smithers_nodes_active",
    "smithers_scheduler_queue_depth",
    "smithers_scheduler_concurrency_utilization",
)
HTTP_LABELS = ("method", "route", "status_code", "status_class")


class Metrics:
    """Every metric of one database's engines and servers.

    One lock guards all values, so that a scrape is one consistent snapshot. Held for arithmetic and
    string building only; no other lock is taken inside it. All methods may be called from any
    thread.
    """

    MAX_UNCOUNTED = 1000  # answered requests not yet counted

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._families: dict[str, Family] = {}
        self._plain: dict[str, Any] = {}  # the one child of each family without labels
        self._readings: dict[str, list[Callable[[], float]]] = {}
        self._before_scrape: list[Callable[[], None]] = []
        self._started = time.monotonic()
        self._rss = (float("-inf"), 0.0)
        self._answered: collections.deque[tuple[str, str, int, float]] = collections.deque()
        self._http_counts: dict[tuple[str, str, int], tuple[Sample, Histogram]] = {}
        for name, help in COUNTERS.items():
            self._add(name, "counter", help)
        for name, help in GAUGES.items():
            self._add(name, "gauge", help)
        for name, (help, bounds) in HISTOGRAMS.items():
            self._add(name, "histogram", help, bounds)
        self._http_requests = self._add(
            "smithers_http_requests", "counter", "HTTP requests answered.", None, HTTP_LABELS
        )
        self._http_duration = self._add(
            "smithers_http_request_duration_ms",
            "histogram",
            "HTTP request duration in ms.",
            FAST_BOUNDS,
            HTTP_LABELS,
        )
        self.read_at_scrape(
            "smithers_process_uptime_seconds", lambda: round(time.monotonic() - self._started, 3)
        )
        self.read_at_scrape("smithers_process_memory_rss_bytes", self._read_rss)

    def _add(
        self,
        name: str,
        kind: str,
        help: str,
        bounds: tuple[float, ...] | None = None,
        labels: tuple[str, ...] = (),
    ) -> Family:
        def make(text: str) -> Sample | Histogram:
            return Sample(name, text) if bounds is None else Histogram(name, text, bounds)

        header = f"# HELP {name} {help}\n# TYPE {name} {kind}\n"
        family = self._families[name] = Family(header, make, labels)
        if not labels:
            self._plain[name] = family.child()
        return family

    def add_families(self, kind: str, helps: Mapping[str, str]) -> None:
        """Have more counters, or gauges, than every server has."""
        with self._lock:
            for name, help in helps.items():
                if name not in self._families:
                    self._add(name, kind, help)

    def inc(self, name: str, amount: float = 1) -> None:
        """Add to a counter or a gauge. Gauges are added to, so that several runs can share one."""
        with self._lock:
            self._plain[name].add(amount)

    def observe(self, name: str, ms: float) -> None:
        with self._lock:
            self._plain[name].observe(ms)

    def read_at_scrape(self, name: str, read: Callable[[], float]) -> None:
        """Have `read` called at every scrape, outside the lock; a gauge is the sum of its reads."""
        self._readings.setdefault(name, []).append(read)

    def stop_reading(self, name: str, read: Callable[[], float]) -> None:
        # A new list: a scrape may be going through the old one.
        self._readings[name] = [other for other in self._readings[name] if other != read]

    def read_before_scrape(self, read: Callable[[], None]) -> None:
        """Have `read` take in, before every scrape, what others have counted."""
        self._before_scrape.append(read)

    def observe_request(self, method: str, route: str, status: int, ms: float) -> None:
        """Note an answered request. Without the lock: those who answer would queue for it."""
        self._answered.append((method, route, status, ms))
        if len(self._answered) > self.MAX_UNCOUNTED:
            with self._lock:
                self._count_requests_locked()

    def _count_requests_locked(self) -> None:
        with contextlib.suppress(IndexError):  # all are counted
            while True:
                method, route, status, ms = self._answered.popleft()
                counts = self._http_counts.get((method, route, status))
                if counts is None:
                    labels = (method, route, str(status), f"{status // 100}xx")
                    counts = self._http_requests.child(*labels), self._http_duration.child(*labels)
                    self._http_counts[method, route, status] = counts
                counts[0].add(1)
                counts[1].observe(ms)

    # Shares: what another process has counted for this one

    def share(self) -> bytes:
        """Return what was counted and measured here, without requests, in a form of one length."""
        with self._lock:
            values = [self._plain[name].value for name in (*COUNTERS, *SHARED_GAUGES)]
            for name in HISTOGRAMS:
                values += self._plain[name].values()
        return struct.pack(f"{len(values)}d", *values)

    def take_share(self, new: bytes, before: bytes, is_last: bool) -> None:
        """Add what has changed between two shares of a process, b"" is one that has nothing.

        Its share of the gauges ends with the last.
        """
        size = max(len(new), len(before))
        if size == 0:  # it has died before it counted anything
            return
        now, then = (list(struct.unpack(f"{size // 8}d", x or bytes(size))) for x in (new, before))
        if is_last:
            now[len(COUNTERS) : len(COUNTERS) + len(SHARED_GAUGES)] = [0.0] * len(SHARED_GAUGES)
        changes = iter([a - b for a, b in zip(now, then)])
        with self._lock:
            for name, change in zip((*COUNTERS, *SHARED_GAUGES), changes):
                self._plain[name].add(change)
            for name in HISTOGRAMS:
                self._plain[name].add(changes)

    def _read_rss(self) -> float:
        """Return resident memory in bytes, read from the system at most once a second."""
        at, value = self._rss
        if time.monotonic() - at >= 1.0:
            value = _resident_bytes()
            self._rss = (time.monotonic(), value)
        return value

    def render(self) -> str:
        """Return all families as Prometheus text.

        Source: Prometheus text exposition format 0.0.4.
        """
        for take in self._before_scrape:
            take()
        readings = [(name, sum([read() for read in x])) for name, x in self._readings.items()]
        parts: list[str] = []
        with self._lock:
            for name, value in readings:
                self._plain[name].set(value)
            self._count_requests_locked()
            for family in self._families.values():
                parts.append(family.header)
                for child in family.children.values():
                    parts.append(child.text or child.render())
        return "".join(parts)


def _resident_bytes() -> float:
    try:
        with open("/proc/self/statm", "rb") as statm:
            return float(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    except OSError:  # no /proc: macOS and the BSDs tell the peak instead
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)
    except ImportError:
        return 0.0


# ---------------------------------------------------------------------------
# Schema: the tables, the original's and ours
# ---------------------------------------------------------------------------

# The original's tables and columns; what is ours alone comes last. Pastes into the sqlite shell.
SCHEMA = """
create table if not exists _smithers_runs (
  run_id text primary key,
  workflow_name text not null default '',
  workflow_path text,
  workflow_hash text,
  status text not null default 'running',
  created_at_ms integer not null default 0,
  started_at_ms integer,
  finished_at_ms integer,
  heartbeat_at_ms integer,
  runtime_owner_id text,
  cancel_requested_at_ms integer,
  hijack_requested_at_ms integer,
  hijack_target text,
  vcs_type text,
  vcs_root text,
  vcs_revision text,
  error_json text,
  config_json text
);
create table if not exists _smithers_nodes (
  run_id text not null,
  node_id text not null,
  iteration integer not null default 0,
  state text not null default 'pending',
  last_attempt integer,
  updated_at_ms integer not null default 0,
  output_table text not null default '',
  label text,
  kind text,
  primary key (run_id, node_id, iteration)
) without rowid;
create table if not exists _smithers_attempts (
  run_id text not null,
  node_id text not null,
  iteration integer not null default 0,
  attempt integer not null,
  state text not null default 'in-progress',
  started_at_ms integer not null default 0,
  finished_at_ms integer,
  error_json text,
  jj_pointer text,
  response_text text,
  jj_cwd text,
  cached integer not null default 0,
  meta_json text,
  primary key (run_id, node_id, iteration, attempt)
) without rowid;
create table if not exists _smithers_frames (
  run_id text not null,
  frame_no integer not null,
  created_at_ms integer not null default 0,
  xml_json text not null default '',
  xml_hash text not null default '',
  mounted_task_ids_json text,
  task_index_json text,
  note text,
  primary key (run_id, frame_no)
);
create table if not exists _smithers_approvals (
  run_id text not null,
  node_id text not null,
  iteration integer not null default 0,
  status text not null default 'requested',
  requested_at_ms integer,
  decided_at_ms integer,
  note text,
  decided_by text,
  request_json text,
  primary key (run_id, node_id, iteration)
) without rowid;
create table if not exists _smithers_events (
  run_id text not null,
  seq integer not null,
  timestamp_ms integer not null default 0,
  type text not null default '',
  payload_json text not null default '{}',
  primary key (run_id, seq)
) without rowid;
create table if not exists _smithers_ralph (
  run_id text not null,
  ralph_id text not null,
  iteration integer not null default 0,
  done integer not null default 0,
  updated_at_ms integer not null default 0,
  primary key (run_id, ralph_id)
) without rowid;
create table if not exists input (
  run_id text primary key,
  payload text
);
create table if not exists _smithers_outputs (
  run_id text not null,
  node_id text not null,
  iteration integer not null default 0,
  output_json text not null default 'null',
  primary key (run_id, node_id, iteration)
) without rowid;
create table if not exists _smithers_summary (
  run_id text not null,
  state text not null,
  nodes integer not null default 0,
  primary key (run_id, state)
) without rowid;
create table if not exists _smithers_woken (
  run_id text primary key
) without rowid;
create index if not exists _smithers_runs_newest on _smithers_runs (created_at_ms, run_id);
create index if not exists _smithers_runs_by_status
  on _smithers_runs (status, created_at_ms, run_id);
create index if not exists _smithers_gates_open
  on _smithers_approvals (requested_at_ms, run_id) where status = 'requested';
"""

# Kept by triggers, whoever writes: how many nodes of a run are in each state, so that GET / never
# counts rows; and the runs with a decision that no engine has taken up, so that nobody has to look
# through all that wait. No `insert or ignore`: inside another program's upsert it is an error.
TRIGGERS = """
CREATE TRIGGER _smithers_nodes_added after insert on _smithers_nodes begin
  insert into _smithers_summary (run_id, state, nodes) values (new.run_id, new.state, 1)
    on conflict (run_id, state) do update set nodes = nodes + 1;
end;
CREATE TRIGGER _smithers_nodes_moved after update of state on _smithers_nodes
when old.state <> new.state begin
  update _smithers_summary set nodes = nodes - 1 where run_id = old.run_id and state = old.state;
  insert into _smithers_summary (run_id, state, nodes) values (new.run_id, new.state, 1)
    on conflict (run_id, state) do update set nodes = nodes + 1;
end;
CREATE TRIGGER _smithers_nodes_dropped after delete on _smithers_nodes begin
  update _smithers_summary set nodes = nodes - 1 where run_id = old.run_id and state = old.state;
end;
CREATE TRIGGER _smithers_gates_decided after update of status on _smithers_approvals
when new.status in ('approved', 'denied') begin
  insert into _smithers_woken (run_id) select new.run_id
    where not exists (select 1 from _smithers_woken where run_id = new.run_id);
end;
"""


# ---------------------------------------------------------------------------
# Statements: every SQL statement that reads or writes rows
# ---------------------------------------------------------------------------

Row = TypeVar("Row", Run, Node, Attempt, Frame, Gate, Event)
TABLES: dict[Any, str] = {
    Run: "_smithers_runs",
    Node: "_smithers_nodes",
    Attempt: "_smithers_attempts",
    Frame: "_smithers_frames",
    Gate: "_smithers_approvals",
    Event: "_smithers_events",
}
# How a statement begins whose rows are records.
SELECT = {kind: f"select {', '.join(kind._fields)} from {name} " for kind, name in TABLES.items()}
OF_NODE = "where run_id = ? and node_id = ? and iteration = ? "


def _is_busy(error: sqlite3.Error) -> bool:
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def _marks(values: Iterable[object]) -> str:
    """Return a question mark for each, as in `in (?, ?)`."""
    return ", ".join("?" for _ in values)


class Reads:
    """Every statement that reads, over whatever `rows` reads from.

    A transaction and a snapshot are one state of the file; the adapter itself is a snapshot a call.
    """

    MAX_FRAMES_BYTES = 8 << 20  # of one reading: the tree of 10,000 tasks has 2 MiB

    def rows(self, sql: str, parameters: Any = ()) -> Any:
        """Return an iterator over the rows, which can be closed."""
        raise NotImplementedError

    def all(self, sql: str, parameters: Any = ()) -> list[Any]:
        return list(self.rows(sql, parameters))

    def one(self, sql: str, parameters: Any = ()) -> Any:
        """Return the first row, or None."""
        # Closed here: left to itself, it would swallow a Ctrl+C that comes meanwhile.
        with contextlib.closing(self.rows(sql, parameters)) as rows:
            return next(rows, None)

    def records(self, kind: type[Row], which: str, parameters: Any) -> list[Row]:
        """Return the rows of a record's table that the rest of the statement says."""
        return list(map(kind._make, self.rows(SELECT[kind] + which, parameters)))

    def record(self, kind: type[Row], which: str, parameters: Any) -> Row | None:
        row = self.one(SELECT[kind] + which, parameters)
        return None if row is None else kind._make(row)

    def get_run(self, run_id: str) -> Run | None:
        return self.record(Run, "where run_id = ?", (run_id,))

    def existing_run(self, run_id: str) -> Run:
        run = self.get_run(run_id)
        if run is None:
            raise RunNotFound(f"there is no run {log_safe(run_id)[:MAX_NAME_CHARS]}")
        return run

    def list_runs(self, statuses: Seq[str]) -> list[Run]:
        """Return the runs with one of these statuses, newest first."""
        which = f"where status in ({_marks(statuses)}) order by created_at_ms desc, run_id"
        return self.records(Run, which, tuple(statuses))

    def list_run_rows(self, limit: int, status: str | None) -> list[tuple[Any, ...]]:
        """Return all columns of the newest runs, in the order of the schema."""
        return self.all(
            f"""select {", ".join(column[0] for column in _wanted_columns()["_smithers_runs"])}
                from _smithers_runs where {"1" if status is None else "status = :status"}
                order by created_at_ms desc, run_id desc limit :limit""",
            {"status": status, "limit": limit},
        )

    def list_woken(self) -> list[str]:
        """Return the runs with a decision, or a request to go on, that no engine has taken up."""
        return [run_id for (run_id,) in self.all("select run_id from _smithers_woken")]

    def list_open_gates(self) -> Iterator[tuple[str, Gate]]:
        """Yield the open gates and pauses of all runs, with their run, oldest first."""
        rows = self.rows(
            f"""select run_id, {", ".join(Gate._fields)} from _smithers_approvals
                where status = 'requested' order by requested_at_ms, run_id"""
        )
        for run_id, *row in rows:
            yield run_id, Gate(*row)

    def count_runs(self, status: str) -> int:
        return int(self.one("select count(*) from _smithers_runs where status = ?", (status,))[0])

    def count_all_open_gates(self) -> int:
        row = self.one("select sum(nodes) from _smithers_summary where state = 'waiting-approval'")
        return int(row[0] or 0)

    def look_at_log(self, run_id: str) -> tuple[str | None, int]:
        """Return the status of a run, None without one, and the seq of its newest event or -1."""
        row = self.one(
            """select (select status from _smithers_runs where run_id = :run_id),
                 (select max(seq) from _smithers_events where run_id = :run_id)""",
            {"run_id": run_id},
        )
        return row[0], -1 if row[1] is None else row[1]

    def get_summary(self, run_id: str) -> dict[str, int]:
        """Return how many nodes of the run are in each state."""
        return dict(
            self.all(
                """select state, nodes from _smithers_summary
                   where run_id = ? and nodes > 0 order by state""",
                (run_id,),
            )
        )

    def get_input(self, run_id: str) -> str | None:
        """Return the run's input as JSON text."""
        row = self.one("select payload from input where run_id = ?", (run_id,))
        return None if row is None else row[0]

    def list_nodes(self, run_id: str) -> list[Node]:
        return self.records(Node, "where run_id = ? order by node_id, iteration", (run_id,))

    def list_oldest_runs(self, status: str, limit: int) -> list[Run]:
        which = "where status = ? order by created_at_ms, run_id limit ?"
        return self.records(Run, which, (status, limit))

    def newest_runs(self, limit: int) -> list[Run]:
        """Return so many runs, newest first; all when the limit is negative."""
        return self.records(Run, "order by created_at_ms desc, run_id desc limit ?", (limit,))

    def find_runs(self, prefix: str) -> list[Run]:
        """Return the runs whose id begins so, at most 10."""
        which = "where run_id >= ? and run_id < ? order by run_id limit 10"
        return self.records(Run, which, (prefix, prefix + chr(0x10FFFF)))

    def get_node(self, run_id: str, key: Key) -> Node | None:
        return self.record(Node, OF_NODE, (run_id, *key))

    def find_newest_node(self, run_id: str, id: str) -> Node | None:
        """Return the newest iteration of a node; `id` may leave out the loops around it."""
        # Two ranges of the key: with "or" sqlite would go through all nodes of the run.
        which = f"""where run_id = :run_id and node_id = :id
            union all {SELECT[Node]}
            where run_id = :run_id and node_id >= :id || '@@' and node_id < :id || '@A'
            order by updated_at_ms desc, iteration desc limit 1"""
        return self.record(Node, which, {"run_id": run_id, "id": id})

    def list_keys(self, run_id: str, state: str | None = None) -> list[Key]:
        return self.all(
            """select node_id, iteration from _smithers_nodes
               where run_id = :run_id and (:state is null or state = :state) order by 1, 2""",
            {"run_id": run_id, "state": state},
        )

    def find_names(
        self, run_id: str, state: str | None = None, other: str | None = None
    ) -> set[str]:
        """Return the names of the nodes in a state, or not in the other one.

        Joined by sqlite: 30,000 rows would take twice the time.
        """
        (text,) = self.one(
            """select group_concat(node_id || case iteration
                   when 0 then '::0' else '::' || iteration end, '\x1f') from _smithers_nodes
               where run_id = :run_id and (:state is null or state = :state)
                 and (:other is null or state <> :other)""",
            {"run_id": run_id, "state": state, "other": other},
        )
        return set(text.split("\x1f")) if text else set()  # which stands in no id

    def list_attempts_of(self, run_id: str, key: Key) -> list[Attempt]:
        return self.records(Attempt, OF_NODE + "order by attempt", (run_id, *key))

    def of_frame(self, run_id: str, make: Callable[[Reads, str], Any]) -> Any:
        """Return what `make` makes of the run's newest frame."""
        return make(self, run_id)

    def get_tree(self, run_id: str) -> str:
        """Return the newest frame's tree as JSON text, "" without one."""
        return str(self.of_frame(run_id, Reads._frame_texts)[0] or "")

    def get_mounted(self, run_id: str) -> str:
        """Return the newest frame's mounted ids as JSON text, "" without one."""
        return str(self.of_frame(run_id, Reads._frame_texts)[1] or "")

    def _frame_texts(self, run_id: str) -> tuple[Any, Any]:
        # Both at once: to the second, sqlite goes through all pages of the first.
        row = self.one(
            """select xml_json, mounted_task_ids_json from _smithers_frames
               where run_id = ? order by frame_no desc limit 1""",
            (run_id,),
        )
        return row or ("", "")

    def list_iterations(self, run_id: str, node_id: str) -> list[int]:
        rows = self.rows(
            "select iteration from _smithers_nodes where run_id = ? and node_id = ? order by 1",
            (run_id, node_id),
        )
        return [iteration for (iteration,) in rows]

    def list_open_nodes(self, run_id: str) -> list[Node]:
        """Return what is in progress or waits for a decision."""
        which = "where run_id = ? and state in ('in-progress', 'waiting-approval')"
        return self.records(Node, which, (run_id,))

    def list_busy_nodes(self, run_id: str) -> list[Node]:
        """Return what is open or has failed, and what is pending but has been tried."""
        which = """where run_id = ? and (state in ('in-progress', 'waiting-approval', 'failed')
            or state = 'pending' and last_attempt is not null)"""
        return self.records(Node, which, (run_id,))

    def list_attempts(self, run_id: str, open_nodes_only: bool = False) -> list[Attempt]:
        """Return the attempts in order; or leave out those of ended nodes without a gate."""
        rows = self.rows(
            f"""select {", ".join(f"a.{name}" for name in Attempt._fields)}
               from _smithers_nodes n join _smithers_attempts a on a.run_id = n.run_id
                 and a.node_id = n.node_id and a.iteration = n.iteration
               where n.run_id = ? and (? or n.state not in ('finished', 'skipped')
                 or n.state = 'finished' and exists (select 1 from _smithers_approvals g
                   where g.run_id = n.run_id and g.node_id = n.node_id
                     and g.iteration = n.iteration))
               order by a.node_id, a.iteration, a.attempt""",
            (run_id, not open_nodes_only),
        )
        return [Attempt(*row) for row in rows]

    def list_gates(self, run_id: str, status: str | None = None) -> list[Gate]:
        which = """where run_id = :run_id and (:status is null or status = :status)
            order by node_id, iteration"""
        return self.records(Gate, which, {"run_id": run_id, "status": status})

    def count_open_gates(self, run_id: str) -> int:
        which = "where run_id = ? and status = 'requested'"
        return int(self.one(f"select count(*) from _smithers_approvals {which}", (run_id,))[0])

    def list_gates_of(self, run_id: str, node_id: str) -> list[Gate]:
        """Return the gates of one node in all its iterations, newest first."""
        which = "where run_id = ? and node_id = ? order by iteration desc"
        return self.records(Gate, which, (run_id, node_id))

    def get_gate(self, run_id: str, key: Key) -> Gate | None:
        return self.record(Gate, OF_NODE, (run_id, *key))

    def list_loops(self, run_id: str) -> dict[str, tuple[int, bool]]:
        """Return (iteration, done) of every loop."""
        rows = self.rows(
            "select ralph_id, iteration, done from _smithers_ralph where run_id = ?", (run_id,)
        )
        return {ralph_id: (iteration, bool(done)) for ralph_id, iteration, done in rows}

    def find_output(self, run_id: str, node_id: str, iteration: int | None) -> str | None:
        """Return an output as JSON text: of this iteration, or of the newest one.

        None when there is none.
        """
        row = self.one(
            """select output_json from _smithers_outputs
               where run_id = :run_id and node_id = :node_id
                 and iteration = coalesce(:iteration, (
                   select max(iteration) from _smithers_outputs
                   where run_id = :run_id and node_id = :node_id))""",
            {"run_id": run_id, "node_id": node_id, "iteration": iteration},
        )
        return None if row is None else row[0]

    def list_output_ids(self, run_id: str) -> list[str]:
        rows = self.rows(
            "select distinct node_id from _smithers_outputs where run_id = ? order by 1", (run_id,)
        )
        return [node_id for (node_id,) in rows]

    def find_error(self, run_id: str, key: Key) -> str | None:
        """Return the error of the node's last failed attempt as JSON text."""
        attempt = self.record(Attempt, OF_NODE + "order by attempt desc limit 1", (run_id, *key))
        return None if attempt is None else attempt.error_json

    def list_frames(
        self, run_id: str, limit: int, after_frame_no: int | None = None
    ) -> list[Frame]:
        """Return the newest frames, newest first; or the first after a number, oldest first.

        Fewer than `limit` when they are large: the first one, and what fits into 8 MiB with it.
        """
        order = "desc" if after_frame_no is None else "asc"
        rows = self.rows(
            SELECT[Frame] + f"where run_id = ? and frame_no > ? order by frame_no {order} limit ?",
            (run_id, -1 if after_frame_no is None else after_frame_no, limit),
        )
        frames: list[Frame] = []
        size = 0
        for frame in map(Frame._make, rows):
            size += len(frame.xml_json) + len(frame.mounted_task_ids_json or "")
            size += len(frame.task_index_json or "")
            if frames and size > self.MAX_FRAMES_BYTES:
                break
            frames.append(frame)
        return frames

    def list_events(
        self,
        run_id: str,
        after_seq: int = -1,
        limit: int = -1,
        node_id: str | None = None,
        newest: int | None = None,
    ) -> list[Event]:
        """Return events with seq > after_seq, of one node if it is given, oldest first.

        The first `limit` of them (all when -1), or the last `newest`.
        """
        named = "" if node_id is None else f',"nodeId":{to_json(node_id)},"iteration":'
        which = f"""where run_id = ? and seq > ? and instr(payload_json, ?)
            order by seq {"asc" if newest is None else "desc"} limit ?"""
        events = self.records(Event, which, (run_id, after_seq, named, newest or limit))
        return events if newest is None else events[::-1]

    def list_outputs(
        self,
        run_id: str,
        key: Key | None = None,
        node_id: str | None = None,
        after_seq: int = -1,
        up_to_seq: int = INT64_MAX,
        newest: int | None = None,
        limit: int = -1,
    ) -> list[Event]:
        """Return NodeOutput events, of one node if it is given, oldest first.

        The first `limit` of them, or the last `newest`. Events begin alike: so sqlite finds them.
        """
        start: dict[str, Any] = {"type": "NodeOutput", "runId": run_id}
        if key is not None:
            start.update(nodeId=key[0], iteration=key[1])
        elif node_id is not None:
            start.update(nodeId=node_id)
        begin = to_json(start)[:-1] + ","
        which = f"""where run_id = ? and seq > ? and seq <= ? and type = 'NodeOutput'
              and payload_json >= ? and payload_json < ?
            order by seq {"asc" if newest is None else "desc"} limit ?"""
        bounds = (run_id, after_seq, up_to_seq, begin, begin + chr(0x10FFFF), newest or limit)
        events = self.records(Event, which, bounds)
        return events if newest is None else events[::-1]

    def newest_outputs(self, run_id: str, keys: Iterable[Key], after_seq: int) -> dict[Key, Event]:
        """Return the newest NodeOutput after a seq of each of these nodes, if there is one.

        In one way back through the log: it is begun anew where only nodes that are found go on.
        """
        start = {"type": "NodeOutput", "runId": run_id}
        wanted = {key: to_json({**start, "nodeId": key[0], "iteration": key[1]}) for key in keys}
        found: dict[Key, Event] = {}
        before, limit = INT64_MAX, 64
        while wanted:
            events = self.records(
                Event,
                f"""where run_id = ? and seq > ? and seq < ? and type = 'NodeOutput'
                      and substr(payload_json, 1, instr(payload_json, ',"attempt":')) in
                        ({_marks(wanted)})
                    order by seq desc limit ?""",
                (run_id, after_seq, before, *(b[:-1] + "," for b in wanted.values()), limit),
            )
            for event in events:
                found.setdefault((event.payload["nodeId"], event.payload["iteration"]), event)
                before = event.seq
            if len(events) < limit:
                break
            wanted = {key: begin for key, begin in wanted.items() if key not in found}
        return found

    def list_events_of(self, run_id: str, types: Seq[str]) -> list[Event]:
        """Return the events of these types, oldest first."""
        which = f"where run_id = ? and type in ({_marks(types)}) order by seq"
        return self.records(Event, which, (run_id, *types))

    def first_seq_since(self, run_id: str, at_ms: int) -> int:
        """Return the seq of the first event from a time on, by halving: the log is in order."""
        low, high = 0, self.get_newest_seq(run_id) + 1
        while low < high:
            middle = (low + high) // 2
            row = self.one(
                "select timestamp_ms from _smithers_events where run_id = ? and seq = ?",
                (run_id, middle),
            )
            low, high = (middle + 1, high) if row and row[0] < at_ms else (low, middle)
        return low

    def list_payloads(self, run_id: str, after_seq: int, up_to_seq: int) -> list[tuple[int, str]]:
        """Return (seq, payload) of the events in (after_seq, up_to_seq], oldest first."""
        return self.all(
            """select seq, payload_json from _smithers_events
               where run_id = ? and seq > ? and seq <= ? order by seq""",
            (run_id, after_seq, up_to_seq),
        )

    def get_newest_seq(self, run_id: str) -> int:
        """Return the seq of the newest event, -1 without events."""
        newest = self.one("select max(seq) from _smithers_events where run_id = ?", (run_id,))[0]
        return -1 if newest is None else int(newest)


class Snapshot(Reads):
    """One consistent state of the file."""

    MAX_KEPT = 6  # three of a run: its frame's texts, its names, its outline

    def __init__(self, connection: sqlite3.Connection, kept: dict[Any, Any]) -> None:
        self.rows = connection.execute  # type: ignore[method-assign,assignment]
        self._kept = kept

    def of_frame(self, run_id: str, make: Callable[[Reads, str], Any]) -> Any:
        """Return it from what is kept of the last answers: 60,000 nodes are a tree of 6 MiB."""
        frame = self.one(
            """select frame_no, created_at_ms from _smithers_frames
               where run_id = ? order by frame_no desc limit 1""",
            (run_id,),
        )
        key = (run_id, make, frame)
        made = self._kept.get(key)
        if made is None:
            made = make(self, run_id)
            if len(self._kept) >= self.MAX_KEPT:
                self._kept.clear()
            self._kept[key] = made
        return made


class Tx(Reads):
    """An open write transaction on one run.

    Events appended here are numbered on from the run's log. A node is named by its key, (node id,
    iteration).
    """

    def __init__(self, connection: sqlite3.Connection, run_id: str) -> None:
        self.rows = connection.execute  # type: ignore[method-assign,assignment]
        self.run_id = run_id
        self.now_ms = now_ms()
        self.events: list[Event] = []
        self.is_control = False  # set by decisions and cancel requests: the engine must look
        self._next_seq: int | None = None

    def run(self, sql: str, parameters: Any) -> int:
        """Carry out a statement and return how many rows it has changed."""
        cursor: Any = self.rows(sql, parameters)
        return int(cursor.rowcount)

    # Events

    @property
    def next_seq(self) -> int:
        """The seq that the next event gets."""
        if self._next_seq is None:
            self._next_seq = self.get_newest_seq(self.run_id) + 1
        return self._next_seq

    def append_event(self, type: str, key: Key | None = None, **fields: Any) -> None:
        """Append one event: `type, runId`, the node, the fields in this order, `timestampMs`."""
        node = {} if key is None else {"nodeId": key[0], "iteration": key[1]}
        payload = to_flat_json(
            {"type": type, "runId": self.run_id, **node, **fields, "timestampMs": self.now_ms}
        )
        event = Event(self.next_seq, self.now_ms, type, payload)
        self.run(
            """insert into _smithers_events (run_id, seq, timestamp_ms, type, payload_json)
               values (?, ?, ?, ?, ?)""",
            (self.run_id, *event),
        )
        self._next_seq = event.seq + 1
        self.events.append(event)

    # Runs

    def insert_run(
        self,
        name: str,
        path: str | None,
        hash: str | None,
        owner: str | None,
        input: str,
        config: str,
    ) -> None:
        """Insert the run: running, or queued without an owner. Raises RunExists."""
        try:
            self.run(
                """insert into _smithers_runs
                     (run_id, workflow_name, workflow_path, workflow_hash, status,
                     created_at_ms, started_at_ms, heartbeat_at_ms, runtime_owner_id, config_json)
                   values (:run_id, :name, :path, :hash, :status,
                     :now_ms, :started, :started, :owner, :config)""",
                {
                    "status": "queued" if owner is None else "running",
                    "started": None if owner is None else self.now_ms,
                    "run_id": self.run_id,
                    "name": name,
                    "path": path,
                    "hash": hash,
                    "now_ms": self.now_ms,
                    "owner": owner,
                    "config": config,
                },
            )
        except sqlite3.IntegrityError as error:
            raise RunExists(
                f"run {self.run_id} exists already; use --resume to go on with it"
            ) from error
        self.run(
            "insert or replace into input (run_id, payload) values (?, ?)", (self.run_id, input)
        )

    def claim_run(self, seen: Run, owner: str, forget_end: bool) -> bool:
        """Make `owner` the owner of a run that is as `seen`; False when somebody was faster.

        `forget_end` takes back how the run has ended, and a request to cancel it.
        """
        self.forget_wake()
        return (
            self.run(
                """update _smithers_runs set runtime_owner_id = :owner, heartbeat_at_ms = :now_ms,
                     status = 'running', started_at_ms = coalesce(started_at_ms, :now_ms),
                     finished_at_ms = case when :forget then null else finished_at_ms end,
                     error_json = case when :forget then null else error_json end,
                     cancel_requested_at_ms =
                       case when :forget then null else cancel_requested_at_ms end
                   where run_id = :run_id and runtime_owner_id is :seen_owner
                     and heartbeat_at_ms is :seen_heartbeat and status = :seen_status""",
                {
                    "owner": owner,
                    "now_ms": self.now_ms,
                    "forget": forget_end,
                    "run_id": self.run_id,
                    "seen_owner": seen.runtime_owner_id,
                    "seen_heartbeat": seen.heartbeat_at_ms,
                    "seen_status": seen.status,
                },
            )
            == 1
        )

    def get_control(self, owner: str) -> tuple[str, bool]:
        """Return the run's status and whether a cancel was requested.

        Raises OwnerLost when `owner` does not own the run.
        """
        row = self.one(
            """select status, cancel_requested_at_ms, runtime_owner_id,
                 (select max(seq) from _smithers_events where run_id = r.run_id)
               from _smithers_runs r where run_id = ?""",
            (self.run_id,),
        )
        if row is None or row[2] != owner:
            raise OwnerLost(f"run {self.run_id} was taken over by another process")
        self._next_seq = 0 if row[3] is None else row[3] + 1
        return row[0], row[1] is not None

    def update_heartbeat(self, owner: str) -> bool:
        """Prove that `owner` lives; False when it does not own the run any more."""
        return (
            self.run(
                """update _smithers_runs set heartbeat_at_ms = ?
                   where run_id = ? and runtime_owner_id = ?""",
                (self.now_ms, self.run_id, owner),
            )
            == 1
        )

    def update_run_source(self, path: str | None, hash: str | None) -> None:
        self.run(
            """update _smithers_runs set workflow_path = coalesce(?, workflow_path),
                 workflow_hash = coalesce(?, workflow_hash) where run_id = ?""",
            (path, hash, self.run_id),
        )

    def update_config(self, **facts: Any) -> None:
        """Add to what is kept of how the run is run."""
        config = self.existing_run(self.run_id).config
        self.run(
            "update _smithers_runs set config_json = ? where run_id = ?",
            (to_json({**config, **facts}), self.run_id),
        )

    def note_history(self, what: str) -> None:
        """Keep what no event tells: that an engine has left the run, or taken it up."""
        known = self.existing_run(self.run_id).config.get("history", [])
        self.update_config(history=[*known[-99:], {"timestampMs": self.now_ms, "what": what}])

    def delete_run(self) -> None:
        """Remove everything of the run."""
        for table in _wanted_columns():
            self.run(f"delete from {table} where run_id = ?", (self.run_id,))

    def update_run_name(self, name: str) -> None:
        self.run(
            "update _smithers_runs set workflow_name = ? where run_id = ?", (name, self.run_id)
        )

    def update_run_status(self, status: str) -> None:
        self.run("update _smithers_runs set status = ? where run_id = ?", (status, self.run_id))

    def wake(self) -> None:
        """Have a server start a worker for the run, now or when there is one."""
        self.is_control = True
        self.run("insert or replace into _smithers_woken (run_id) values (?)", (self.run_id,))

    def forget_wake(self) -> None:
        self.run("delete from _smithers_woken where run_id = ?", (self.run_id,))

    def release_run(self) -> None:
        """Leave the run without an owner, and without a heartbeat that somebody would watch."""
        self.forget_wake()
        self.run(
            """update _smithers_runs set runtime_owner_id = null, heartbeat_at_ms = null
               where run_id = ?""",
            (self.run_id,),
        )

    def end_run(self, status: str, error_json: str | None) -> None:
        """Give the run its terminal status and no owner."""
        self.run(
            """update _smithers_runs
               set status = :status, finished_at_ms = :now_ms, error_json = :error,
                 runtime_owner_id = null where run_id = :run_id""",
            {"status": status, "now_ms": self.now_ms, "error": error_json, "run_id": self.run_id},
        )

    def request_cancel(
        self, by: str | None = None, reason: str | None = None, by_source: str | None = None
    ) -> None:
        """Have the run cancelled; the first request says who and why."""
        self.is_control = True
        run = self.get_run(self.run_id)
        if run is not None and run.cancel_requested_at_ms is None:
            said = {"by": by, "reason": reason, "bySource": by_source if by else None}
            cancel = {name: text for name, text in said.items() if text is not None}
            self.run(
                """update _smithers_runs set cancel_requested_at_ms = ?, config_json = ?
                   where run_id = ?""",
                (self.now_ms, to_json({**run.config, "cancel": cancel}), self.run_id),
            )

    # Nodes and attempts

    def insert_node(self, key: Key, label: str | None, kind: str) -> None:
        self.run(
            """insert into _smithers_nodes
                 (run_id, node_id, iteration, state, updated_at_ms, label, kind)
               values (?, ?, ?, 'pending', ?, ?, ?)""",
            (self.run_id, *key, self.now_ms, label, kind),
        )

    def update_kind(self, key: Key, kind: str) -> None:
        self.run(
            """update _smithers_nodes set kind = ?
               where run_id = ? and node_id = ? and iteration = ?""",
            (kind, self.run_id, *key),
        )

    def update_node(self, key: Key, state: str, last_attempt: int | None) -> None:
        self.run(
            """update _smithers_nodes set state = ?, last_attempt = ?, updated_at_ms = ?
               where run_id = ? and node_id = ? and iteration = ?""",
            (state, last_attempt, self.now_ms, self.run_id, *key),
        )

    def update_label(self, key: Key, label: str) -> None:
        self.run(
            """update _smithers_nodes set label = ?
               where run_id = ? and node_id = ? and iteration = ?""",
            (label, self.run_id, *key),
        )

    def insert_attempt(self, key: Key, attempt: int) -> None:
        self.run(
            """insert into _smithers_attempts
                 (run_id, node_id, iteration, attempt, state, started_at_ms)
               values (?, ?, ?, ?, 'in-progress', ?)""",
            (self.run_id, *key, attempt, self.now_ms),
        )

    def end_attempt(self, key: Key, attempt: int, state: str, error: str | None = None) -> None:
        self.run(
            """update _smithers_attempts set state = ?, finished_at_ms = ?, error_json = ?
               where run_id = ? and node_id = ? and iteration = ? and attempt = ?""",
            (state, self.now_ms, error, self.run_id, *key, attempt),
        )

    def note_attempt(self, key: Key, attempt: int, **facts: Any) -> None:
        """Add to what is kept of an attempt beside its result: see `Attempt.meta`."""
        row = self.one(
            """select meta_json from _smithers_attempts
               where run_id = ? and node_id = ? and iteration = ? and attempt = ?""",
            (self.run_id, *key, attempt),
        )
        known = json.loads(row[0]) if row and row[0] else {}
        self.run(
            """update _smithers_attempts set meta_json = ?
               where run_id = ? and node_id = ? and iteration = ? and attempt = ?""",
            (to_json({**known, **facts}), self.run_id, *key, attempt),
        )

    def put_output(self, key: Key, output_json: str) -> None:
        self.run(
            """insert or replace into _smithers_outputs (run_id, node_id, iteration, output_json)
               values (?, ?, ?, ?)""",
            (self.run_id, *key, output_json),
        )

    def forget_past(self, key: Key) -> None:
        """Have the earlier failures, decision and output of a node count no more."""
        for attempt in self.list_attempts_of(self.run_id, key):
            self.note_attempt(key, attempt.attempt, forgiven=True)
        if self.get_gate(self.run_id, key) is not None:
            self.close_gate(key)
        self.run(
            "delete from _smithers_outputs where run_id = ? and node_id = ? and iteration = ?",
            (self.run_id, *key),
        )

    def put_loop(self, ralph_id: str, iteration: int, done: bool) -> None:
        self.run(
            """insert or replace into _smithers_ralph
                 (run_id, ralph_id, iteration, done, updated_at_ms)
               values (?, ?, ?, ?, ?)""",
            (self.run_id, ralph_id, iteration, int(done), self.now_ms),
        )

    def delete_loop(self, ralph_id: str) -> None:
        self.run(
            "delete from _smithers_ralph where run_id = ? and ralph_id = ?", (self.run_id, ralph_id)
        )

    def insert_frame(self, xml_json: str, xml_hash: str, mounted: str, index: str) -> int:
        """Insert the next frame and return its number, from 1."""
        newest = self.one(
            "select max(frame_no) from _smithers_frames where run_id = ?", (self.run_id,)
        )
        frame_no = int(newest[0] or 0) + 1
        self.run(
            """insert into _smithers_frames (run_id, frame_no, created_at_ms, xml_json, xml_hash,
                 mounted_task_ids_json, task_index_json) values (?, ?, ?, ?, ?, ?, ?)""",
            (self.run_id, frame_no, self.now_ms, xml_json, xml_hash, mounted, index),
        )
        return frame_no

    # Gates

    def open_gate(self, key: Key, request_json: str) -> None:
        """Request a decision; each request of a gate has a time of its own, by which it is told."""
        before = self.get_gate(self.run_id, key)
        asked_at_ms = (before and before.requested_at_ms) or 0
        self.run(
            """insert or replace into _smithers_approvals
                 (run_id, node_id, iteration, status, requested_at_ms, request_json)
               values (?, ?, ?, 'requested', ?, ?)""",
            (self.run_id, *key, max(self.now_ms, asked_at_ms + 1), request_json),
        )

    def update_request(self, key: Key, request_json: str) -> None:
        self.run(
            """update _smithers_approvals set request_json = ?
               where run_id = ? and node_id = ? and iteration = ?""",
            (request_json, self.run_id, *key),
        )

    def close_gate(self, key: Key) -> None:
        """Mark a gate that nobody will decide any more; one that was decided is asked again."""
        self.run(
            """update _smithers_approvals set status = 'cancelled', decided_at_ms = ?
               where run_id = ? and node_id = ? and iteration = ?""",
            (self.now_ms, self.run_id, *key),
        )

    def close_gates(self) -> None:
        """Mark what is still open at the end of the run: the pauses, whose nodes are pending."""
        self.run(
            """update _smithers_approvals set status = 'cancelled', decided_at_ms = ?
               where run_id = ? and status = 'requested'""",
            (self.now_ms, self.run_id),
        )

    def decide_gate(self, gate: Gate, decision: Decision) -> bool:
        """Store a decision and take the node out of waiting; False when the gate was not open."""
        self.is_control = True
        won = self.run(
            """update _smithers_approvals
               set status = ?, decided_at_ms = ?, note = ?, decided_by = ?
               where run_id = ? and node_id = ? and iteration = ? and status = 'requested'""",
            (
                decision.verdict,
                self.now_ms,
                decision.note,
                decision.decided_by,
                self.run_id,
                *gate.key,
            ),
        )
        self.run(
            """update _smithers_nodes set state = 'pending', updated_at_ms = ?
               where run_id = ? and node_id = ? and iteration = ?
                 and state = 'waiting-approval'""",
            (self.now_ms, self.run_id, *gate.key),
        )
        return won == 1


# ---------------------------------------------------------------------------
# Database: the file, its locks and its transactions
# ---------------------------------------------------------------------------


class Watch:
    """Tells whether anybody, in any process, has committed to the database.

    Source: PRAGMA data_version, which changes when another connection commits; this one never
    writes. All methods may be called from any thread.
    """

    def __init__(self, connection: sqlite3.Connection, check_file: Callable[[], None]) -> None:
        # Guards the connection. Held for one statement; no other lock is taken inside it.
        self._lock = threading.Lock()
        self._connection = connection
        self._check_file = check_file
        self._seen = -1

    def version(self) -> int:
        """Return a number that changes with every commit.

        Raises Unavailable while a rollback journal locks readers out, StorageError otherwise.
        """
        self._check_file()
        try:
            with self._lock:
                return int(self._connection.execute("pragma data_version").fetchone()[0])
        except sqlite3.OperationalError as error:
            if _is_busy(error):
                raise Unavailable("the database is locked by another process") from error
            self._check_file()
            raise StorageError(f"cannot read the database: {error}") from error

    def changed(self) -> bool:
        """Return True when there was a commit since the last call that returned True."""
        try:
            version = self.version()
        except Unavailable:
            return False  # look later
        if version == self._seen:
            return False
        self._seen = version
        return True

    def close(self) -> None:
        with self._lock:
            self._connection.close()


class SmithersDb(Reads):
    """The one sqlite file behind runs: durable, and shared by any number of processes.

    With `create=False` a file that is not there is an error. A file that another program made is
    read as it is, and gets our tables only before the first write. Raises StorageError when the
    file cannot be used. All methods may be called from any thread.
    """

    MAX_IDLE_READERS = 4  # descriptors kept open for reading between requests
    CHECK_SECONDS = 0.05  # how long a look at the file counts
    BUSY_SECONDS = 1.0  # how long sqlite itself waits for a lock, before we look at the deadline

    def __init__(self, path: str | os.PathLike[str] = "smithers.db", create: bool = True) -> None:
        name = os.fspath(path)
        if name in ("", ":memory:") or name.startswith("file:"):
            raise StorageError(f"a run is kept in a file: expected its path, got {short(name)}")
        self.path = os.path.realpath(name)
        self.metrics = Metrics()
        # Guards _writer. Held for one transaction, which runs no user code and writes to no socket.
        self._write_lock = threading.Lock()
        self._readers: collections.deque[sqlite3.Connection] = collections.deque()
        self._kept: dict[Any, Any] = {}  # by snapshots, of frames; each use of it is atomic
        self._listeners: list[Callable[[Tx], None]] = []
        self._closed = False
        try:
            self._create_private_file(create)
            self._file = os.stat(self.path)
            self._checked_until = 0.0
            self._is_writable = create  # else not before the first write
            self._writer = self._connect()
            try:
                self._wait_for_lock(functools.partial(self._open, create))
            except BaseException:
                self._writer.close()
                raise
        except (sqlite3.Error, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"cannot use {self.path} as a database: {reason}") from error

    def __enter__(self) -> SmithersDb:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Opening

    def _create_private_file(self, create: bool) -> None:
        """Create a new file as 0600: it will hold inputs and outputs.

        Sqlite copies the mode to its side files.
        """
        if not create and not os.path.exists(self.path):
            raise StorageError(f"there is no database {self.path}")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))

    def _connect(self) -> sqlite3.Connection:
        # Read-only, sqlite does not even tidy the log of an engine that was killed.
        how = "rw" if self._is_writable else "ro"
        connection = sqlite3.connect(
            f"file:{urllib.parse.quote(self.path)}?mode={how}",
            uri=True,
            timeout=self.BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=128,
        )
        connection.execute("pragma foreign_keys = on")
        return connection

    def _open(self, create: bool) -> None:
        """Learn what the file holds; prepare a new one, and one that old triggers of ours harm."""
        schema = self._read_schema()
        self._is_ours = "_smithers_outputs" in schema
        self._is_prepared = False
        self._use_mode(self._writer.execute("pragma journal_mode").fetchone()[0])
        if create and (not schema or self._has_old_triggers(schema)):
            self._prepare()
        else:
            self._is_prepared = create and self._is_ours and not any(self._lacks(schema))
            if self._is_prepared:
                self._choose_mode()
            self._adapt_readers(schema)

    def _read_schema(self) -> dict[str, str]:
        """Return the statement behind each table and trigger of the file."""
        return dict(
            self._writer.execute(
                "select name, sql from sqlite_master where type in ('table', 'trigger')"
            )
        )

    @staticmethod
    def _has_old_triggers(schema: dict[str, str]) -> bool:
        wanted = {_name_of(sql): sql for sql in _statements(TRIGGERS)}
        return any(name in schema and schema[name] != sql for name, sql in wanted.items())

    def _lacks(self, schema: dict[str, str]) -> Iterator[str]:
        """Yield what is missing in a file that our engine is to write to."""
        yield from (_name_of(sql) for sql in _statements(TRIGGERS) if sql not in schema.values())
        for table, columns in _wanted_columns().items():
            present = self._columns_of(table, schema)
            yield from (f"{table}.{column[0]}" for column in columns if column[0] not in present)

    def _columns_of(self, table: str, schema: dict[str, str]) -> set[str]:
        if schema.get(table) == _wanted_schema()[table]:
            return {column[0] for column in _wanted_columns()[table]}
        return {row[1] for row in self._writer.execute(f"pragma main.table_info({table})")}

    def _prepare(self) -> None:
        """Bring the file to the form that our engine writes, once, before the first write."""
        if not self._is_writable:
            self._is_writable = True
            self._writer.close()
            self._writer = self._connect()
            self._use_mode(self._writer.execute("pragma journal_mode").fetchone()[0])
        self._choose_mode()
        self._begin(LOCK_PATIENCE_SECONDS)
        try:
            schema = self._read_schema()
            if any(self._lacks(schema)):
                self._write_schema(schema)
            self._insist("commit", LOCK_PATIENCE_SECONDS)
        except BaseException:
            self._writer.execute("rollback")
            raise
        self._is_ours = self._is_prepared = True
        self._adapt_readers(self._read_schema())

    def _write_schema(self, schema: dict[str, str]) -> None:
        for table, columns in _wanted_columns().items():
            present = self._columns_of(table, schema)
            for name, kind, default in columns if present else ():
                if name not in present:
                    suffix = "" if default is None else f" default {default}"
                    self._writer.execute(f"alter table {table} add column {name} {kind}{suffix}")
        for statement in _statements(SCHEMA):
            self._writer.execute(statement)
        for statement in _statements(TRIGGERS):
            self._writer.execute(f"drop trigger if exists {_name_of(statement)}")
            self._writer.execute(statement)
        self._writer.execute("delete from _smithers_summary")
        self._writer.execute(
            """insert into _smithers_summary (run_id, state, nodes)
               select run_id, state, count(*) from _smithers_nodes group by run_id, state"""
        )

    def _choose_mode(self) -> None:
        """Try the write-ahead log in a new file; leave it where it does not work any more.

        Never in a file that is in use without it: for a moment that would be in a mode in which the
        others cannot write.
        """
        mode = self._writer.execute("pragma journal_mode").fetchone()[0]
        if not self._read_schema() or mode == "wal" and not self._can_write():
            mode = self._use_wal()
        self._use_mode(mode)

    def _use_wal(self) -> str:
        """Switch to the write-ahead log, or back where it cannot work (no shared memory)."""
        mode = self._writer.execute("pragma journal_mode = wal").fetchone()[0]
        if mode == "wal" and not self._can_write():
            self._writer.close()
            self._writer = self._connect()
            # With the file for itself, sqlite needs no shared memory to leave the log.
            self._writer.execute("pragma locking_mode = exclusive")
            mode = self._writer.execute("pragma journal_mode = delete").fetchone()[0]
            self._writer.execute("pragma locking_mode = normal")
            self._writer.execute("select 1 from sqlite_master limit 1").fetchone()
        if mode != "wal":
            logger.warning(
                "no write-ahead log possible here (journal mode %s): readers may wait for writers",
                mode,
            )
        return str(mode)

    def _use_mode(self, mode: str) -> None:
        """Have every commit on disk before it is told, in this journal mode."""
        self.readers_never_wait = mode == "wal"
        # Without the log a commit is the removal of a file: its folder has to be synced as well.
        self._writer.execute(f"pragma synchronous = {'full' if mode == 'wal' else 'extra'}")
        # A log that begins anew after 200 pages, not 1,000: a sync is faster (0.2 for 0.3 ms) where
        # the file need not grow, and a short run gets there too.
        self._writer.execute("pragma wal_autocheckpoint = 200")
        # What a reader has kept from beginning anew is given back when it has left.
        self._writer.execute("pragma journal_size_limit = 4194304")

    def _can_write(self) -> bool:
        """Return whether a write can begin, now or after another process's."""
        error = self._try_to_write()
        return error is None or _is_busy(error)

    def is_locked(self) -> bool:
        """Return whether another process holds the write lock now."""
        with self._write_lock:
            error = self._try_to_write()
        return error is not None and _is_busy(error)

    def _try_to_write(self) -> sqlite3.OperationalError | None:
        """Return why a write cannot begin at once, if so."""
        self._writer.execute("pragma busy_timeout = 0")
        try:
            self._writer.execute("begin immediate")
            self._writer.execute("rollback")
            return None
        except sqlite3.OperationalError as error:
            return error
        finally:
            self._writer.execute(f"pragma busy_timeout = {self.BUSY_SECONDS * 1000:.0f}")

    def _adapt_readers(self, schema: dict[str, str]) -> None:
        """Have readers find what they ask for in a file of another program, or of another version.

        Temporary views and tables are the connection's own: the file stays as it is.
        """
        self._adaptation = ["pragma temp_store = memory"]
        for table, columns in _wanted_columns().items():
            present = self._columns_of(table, schema)
            missing = [
                f"{'null' if default is None else default} as {name}"
                for name, _, default in columns
                if name not in present
            ]
            # Deltas of later versions are no trees: who reads frames gets the whole ones.
            where = " where encoding is not 'delta'" if "encoding" in present else ""
            if table == "_smithers_summary" and not present:
                select = """select run_id, state, count(*) as nodes
                    from main._smithers_nodes group by run_id, state"""
            elif not present:
                select = "select " + ", ".join(missing) + " where 0"
            elif missing or where:
                select = "select " + ", ".join(["*", *missing]) + f" from main.{table}{where}"
            else:
                continue
            self._adaptation.append(f"create temp view {table} as {select}")
        while self._readers:
            self._readers.pop().close()

    def give_space_back(self) -> None:
        """Have the file no larger than what it holds. Raises Unavailable when others use it."""
        with self._write_lock:
            try:
                self._writer.execute("vacuum")
            except sqlite3.OperationalError as error:
                raise Unavailable(f"the space is not given back now: {error}") from error

    def close(self) -> None:
        """Close every connection of this adapter."""
        self._closed = True
        with self._write_lock:
            self._writer.close()
        while self._readers:
            self._readers.pop().close()

    # Transactions

    def _wait_for_lock(self, call: Callable[[], Any]) -> Any:
        """Return what `call` returns, once no other process holds a lock that it needs.

        sqlite itself does not wait where it would read or change the journal mode.
        """
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            try:
                return call()
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise
                threading.Event().wait(0.01)

    def _begin(self, patience: float, give_up: Callable[[], bool] = bool) -> None:
        self._insist("begin immediate", patience, give_up)

    def _insist(self, statement: str, patience: float, give_up: Callable[[], bool] = bool) -> None:
        """Carry out a statement once no other process is in its way.

        A commit waits as well: for readers, where there is no log.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                self._writer.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise
                self.metrics.inc("smithers_db_retries")
                if time.monotonic() >= deadline or give_up():
                    raise Unavailable("the database is locked by another process") from error

    def check_file(self) -> None:
        """Raise DatabaseGone when the file is not the one that was opened."""
        if time.monotonic() < self._checked_until:
            return
        self._checked_until = time.monotonic() + self.CHECK_SECONDS
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        if found is None or not os.path.samestat(found, self._file):
            self._checked_until = 0.0
            raise DatabaseGone(
                f"the database {self.path} was removed or replaced while it was in use"
            )

    @contextlib.contextmanager
    def transaction(
        self,
        run_id: str,
        patience: float = LOCK_PATIENCE_SECONDS,
        give_up: Callable[[], bool] = bool,
    ) -> Iterator[Tx]:
        """Yield a write transaction; commit at the end or roll back, then tell the listeners.

        Raises Unavailable when another process holds the write lock for `patience` seconds or until
        `give_up` returns True, StorageError when sqlite fails or the file has gone.
        """
        started = time.perf_counter()
        if not self._write_lock.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
            raise Unavailable("the database is locked")
        try:
            if not self._is_prepared:
                self._wait_for_lock(self._prepare)
            self._begin(patience, give_up)
            tx = Tx(self._writer, run_id)
            try:
                self._checked_until = 0.0
                self.check_file()
                yield tx
                self._insist("commit", patience, give_up)
            except BaseException:
                # sqlite may have rolled back itself (disk full, I/O error)
                if self._writer.in_transaction:
                    self._writer.execute("rollback")
                raise
        except sqlite3.Error as error:
            raise StorageError(f"cannot write the database: {error}") from error
        finally:
            self._write_lock.release()
        self.metrics.observe("smithers_db_query_ms", (time.perf_counter() - started) * 1000)
        if tx.events:
            self.metrics.inc("smithers_events_emitted_total", len(tx.events))
        for listener in tuple(self._listeners):
            listener(tx)

    def subscribe(self, listener: Callable[[Tx], None]) -> None:
        """Have `listener` called after every commit of this process, in the committing thread.

        It must not block.
        """
        self._listeners.append(listener)

    def unsubscribe(self, listener: Callable[[Tx], None]) -> None:
        self._listeners.remove(listener)

    def watch(self) -> Watch:
        """Return a new Watch on this file; the caller closes it."""
        try:
            return Watch(self._connect(), self.check_file)
        except sqlite3.Error as error:
            raise StorageError(f"cannot read the database: {error}") from error

    # Reading

    def _take_reader(self) -> sqlite3.Connection:
        try:
            return self._readers.pop()
        except IndexError:
            connection = self._connect()
            for statement in self._adaptation:
                connection.execute(statement)
            return connection

    @contextlib.contextmanager
    def snapshot(self, is_patient: bool = False) -> Iterator[Reads]:
        """Yield reads of one consistent state. Connections are pooled, not kept per thread.

        Where there is no log a writer locks readers out: then raises Unavailable after a second, or
        a minute when patient.
        """
        connection: sqlite3.Connection | None = None
        adaptation = self._adaptation
        try:
            connection = self._take_reader()
            connection.execute("begin")
            if is_patient and not self.readers_never_wait:
                look = functools.partial(connection.execute, "select 1 from sqlite_master limit 1")
                self._wait_for_lock(lambda: look().fetchone())
            try:
                yield Snapshot(connection, self._kept)
            finally:
                connection.execute("commit")
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
                connection = None
            self._checked_until = 0.0
            self.check_file()
            if _is_busy(error):
                raise Unavailable("the database is locked by another process") from error
            raise StorageError(f"cannot read the database: {error}") from error
        finally:
            if connection is not None:
                is_stale = self._closed or adaptation is not self._adaptation
                if is_stale or len(self._readers) >= self.MAX_IDLE_READERS:
                    connection.close()
                else:
                    self._readers.append(connection)

    def rows(self, sql: str, parameters: Any = ()) -> Iterator[Any]:
        with self.snapshot() as reads:
            yield from reads.rows(sql, parameters)


class PatientReads(Reads):
    """Reads of one who does not go away when a writer locks readers out: an engine's."""

    def __init__(self, db: SmithersDb) -> None:
        self.snapshot = functools.partial(db.snapshot, is_patient=True)

    def rows(self, sql: str, parameters: Any = ()) -> Iterator[Any]:
        with self.snapshot() as reads:
            yield from reads.rows(sql, parameters)


def check_adapter(value: object) -> None:
    """Raise AuthoringError for what is no database, such as a path."""
    if not isinstance(value, SmithersDb):
        raise AuthoringError(
            f"adapter must be a SmithersDb, got {short(value)}: SmithersDb(path) opens a file"
        )


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script as sqlite keeps them.

    `executescript` would commit the open transaction.
    """
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending.strip().rstrip(";")
            pending = ""


def _name_of(statement: str) -> str:
    return statement.split()[2]


@functools.lru_cache(maxsize=1)
def _wanted_schema() -> dict[str, str]:
    """Return the statement behind each of our tables, as sqlite keeps it."""
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        model.executescript(SCHEMA)
        return dict(model.execute("select name, sql from sqlite_master where type = 'table'"))


@functools.lru_cache(maxsize=1)
def _wanted_columns() -> dict[str, list[tuple[str, str, Any]]]:
    """Return name, type and default of every column of our schema, by table."""
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        model.executescript(SCHEMA)
        return {
            table: [
                (row[1], row[2], row[4]) for row in model.execute(f"pragma table_info({table})")
            ]
            for table in _wanted_schema()
        }


# ---------------------------------------------------------------------------
# Schedule: a rendered tree -> what may run next; no clock, no thread, no database
# ---------------------------------------------------------------------------


def plain_id(node_id: str) -> str:
    """Return a node's id as it is written in the workflow, without the loops around it."""
    return node_id.partition("@@")[0]


class Group:
    """The tasks below one Parallel with a limit: how many run, and who waits for a place."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0
        self.waiting: collections.deque[Key] = collections.deque()


class Slot:
    """One element at its place in the mounted tree."""

    __slots__ = ("element", "parent", "loops", "is_active", "is_done", "waiters")

    def __init__(
        self, element: Element, parent: Branch | None, loops: tuple[LoopSlot, ...]
    ) -> None:
        self.element = element
        self.parent = parent
        self.loops = loops  # the loops around it, outermost first
        self.is_active = False
        self.is_done = False
        self.waiters: list[LeafSlot] = []


class Branch(Slot):
    """A container.

    `cursor` is the running child of a sequence, or the children of a Parallel that have ended.
    """

    __slots__ = ("children", "cursor")

    def __init__(
        self, element: Element, parent: Branch | None, loops: tuple[LoopSlot, ...]
    ) -> None:
        super().__init__(element, parent, loops)
        self.children: list[Slot] = []
        self.cursor = 0


class LoopSlot(Branch):
    """A loop at one iteration.

    `key` names it in storage: the id and the iterations of the loops around it.
    """

    __slots__ = ("key", "iteration", "has_begun", "loop", "groups")

    def __init__(
        self, loop: Loop, parent: Branch, loops: tuple[LoopSlot, ...], groups: tuple[Group, ...]
    ) -> None:
        super().__init__(loop, parent, loops)
        self.loop = loop
        self.groups = groups
        self.key = loop.id + scope_of(loops)
        self.iteration = 0
        self.has_begun = False


class LeafSlot(Slot):
    """A node. `key` is (node_id, iteration)."""

    __slots__ = ("leaf", "key", "needs_left", "groups", "targets")

    def __init__(
        self, leaf: Leaf, parent: Branch, loops: tuple[LoopSlot, ...], groups: tuple[Group, ...]
    ) -> None:
        super().__init__(leaf, parent, loops)
        self.leaf = leaf
        self.groups = groups
        # The innermost loop gives the iteration, the loops around it go into the id, as the
        # original writes it.
        self.key = (leaf.id + scope_of(loops[:-1]), loops[-1].iteration if loops else 0)
        self.needs_left = 0
        # What it needs: parameter, id, and whether the newest iteration is meant.
        self.targets: list[tuple[str | None, str, bool]] = []

    @property
    def has_turn(self) -> bool:
        return self.is_active and self.needs_left == 0 and not self.is_done


def scope_of(loops: tuple[LoopSlot, ...]) -> str:
    """Return `@@outer=1,middle=0`, or nothing outside of loops."""
    return "@@" + ",".join(f"{loop.loop.id}={loop.iteration}" for loop in loops) if loops else ""


class Plan:
    """A mounted tree: `reached` are the nodes whose turn has come, `due` the loops to decide.

    `failure` is the message of a Fail whose turn has come.

    `loops` gives (iteration, done) of every loop that has begun, by key. Raises AuthoringError for
    duplicate ids and for unknown or cyclic needs.
    """

    def __init__(self, workflow: Workflow, loops: Mapping[str, tuple[int, bool]]) -> None:
        self.reached: collections.deque[LeafSlot] = collections.deque()
        self.due: collections.deque[LoopSlot] = collections.deque()
        self.failure: str | None = None
        self.slots: dict[Key, LeafSlot] = {}
        self.by_id: dict[str, LeafSlot] = {}
        self.loop_by_id: dict[str, LoopSlot] = {}
        self._loops = loops
        self._work: collections.deque[tuple[Slot, bool]] = collections.deque()
        self.name = workflow.name
        self.root = Branch(workflow, None, ())
        self._mount_children(self.root, (), (), 0)
        leaves = list(self.leaves())
        for slot in leaves:
            self._link(slot)
        if any(slot.targets for slot in leaves):
            self._refuse_cycles()

    # Mounting

    def _mount_children(
        self, branch: Branch, loops: tuple[LoopSlot, ...], groups: tuple[Group, ...], depth: int
    ) -> None:
        if depth > MAX_TREE_DEPTH:
            raise AuthoringError(
                f"the tree is nested more than {MAX_TREE_DEPTH} levels deep", "INVALID_TREE"
            )
        assert isinstance(branch.element, Container)
        for child in branch.element.children:
            if isinstance(child, Leaf):
                branch.children.append(self._mount_leaf(child, branch, loops, groups))
            elif isinstance(child, Loop):
                branch.children.append(self._mount_loop(child, branch, loops, groups, depth))
            else:
                inner = groups
                if isinstance(child, Parallel) and child.max_concurrency is not None:
                    inner = (*groups, Group(child.max_concurrency))
                nested = Branch(child, branch, loops)
                self._mount_children(nested, loops, inner, depth + 1)
                branch.children.append(nested)

    def _mount_leaf(
        self, leaf: Leaf, parent: Branch, loops: tuple[LoopSlot, ...], groups: tuple[Group, ...]
    ) -> LeafSlot:
        self._refuse_twice(leaf.id)
        slot = self.by_id[leaf.id] = LeafSlot(leaf, parent, loops, groups)
        self.slots[slot.key] = slot
        return slot

    def _mount_loop(
        self,
        loop: Loop,
        parent: Branch,
        loops: tuple[LoopSlot, ...],
        groups: tuple[Group, ...],
        depth: int,
    ) -> LoopSlot:
        self._refuse_twice(loop.id)
        slot = self.loop_by_id[loop.id] = LoopSlot(loop, parent, loops, groups)
        slot.has_begun = slot.key in self._loops
        slot.iteration, slot.is_done = self._loops.get(slot.key, (0, False))
        self._mount_children(slot, (*loops, slot), groups, depth + 1)
        return slot

    def _refuse_twice(self, id: str) -> None:
        if id in self.by_id or id in self.loop_by_id:
            raise AuthoringError(f"the id {id!r} is used twice", "DUPLICATE_ID")

    def _link(self, slot: LeafSlot) -> None:
        """Count what the node still has to wait for besides its turn."""
        for parameter, id in slot.leaf.needs:
            target = self.by_id.get(id)
            if target is None:
                raise AuthoringError(
                    f"{slot.leaf.id!r} needs {id!r}, which is not in the tree", "UNKNOWN_DEPENDENCY"
                )
            awaited = self._awaited(target, slot)
            slot.targets.append((parameter, id, awaited is not target))
            if not awaited.is_done:
                awaited.waiters.append(slot)
                slot.needs_left += 1

    @staticmethod
    def _awaited(target: LeafSlot, slot: LeafSlot) -> Slot:
        """Return what to wait for.

        The node itself, or the outermost loop around it that `slot` is not in.
        """
        return next((loop for loop in target.loops if loop not in slot.loops), target)

    def _order(self) -> dict[Any, list[Any]]:
        """Return by start and end of each slot what comes directly before it."""
        before: dict[Any, list[Any]] = {}
        pending: list[Slot] = [self.root]
        while pending:
            slot = pending.pop()
            start, end = (slot, "start"), (slot, "end")
            before.setdefault(start, [])
            before[end] = [start]
            if isinstance(slot, Branch):
                self._order_children(slot, before)
                pending.extend(slot.children)
        for leaf in self.leaves():
            before[(leaf, "end")].extend(
                (self._awaited(self.by_id[id], leaf), "end") for _, id, _ in leaf.targets
            )
        return before

    def _refuse_cycles(self) -> None:
        """Check needs together with the order of the tree.

        Waiting for a later sibling is a cycle too.
        """
        try:
            graphlib.TopologicalSorter(self._order()).prepare()
        except graphlib.CycleError as error:
            # the cycle is listed against the direction of waiting, its first entry again at the end
            slots = [slot for slot, _ in reversed(error.args[1][1:])]
            ids = list(dict.fromkeys(slot.leaf.id for slot in slots if isinstance(slot, LeafSlot)))
            message = f"needs form a cycle through {', '.join(map(repr, ids))}"
            if self._have_needs_an_order():
                message += "; by the order of the tree: what comes later cannot be waited for"
            raise AuthoringError(message, "CYCLIC_DEPENDENCY") from None

    def _have_needs_an_order(self) -> bool:
        needs = {id: {target for _, target, _ in s.targets} for id, s in self.by_id.items()}
        try:
            graphlib.TopologicalSorter(needs).prepare()
        except graphlib.CycleError:
            return False
        return True

    def followers(self, slot: LeafSlot) -> tuple[set[str], list[LoopSlot]]:
        """Return the ids of the nodes that come after one, and the loops that end after it."""
        after: dict[Any, list[Any]] = {}
        for later, earlier in self._order().items():
            for one in earlier:
                after.setdefault(one, []).append(later)
        found: set[Any] = set()
        pending = [(slot, "end")]
        while pending:
            for later in after.get(pending.pop(), ()):
                if later not in found:
                    found.add(later)
                    pending.append(later)
        ids = {s.leaf.id for s, _ in found if isinstance(s, LeafSlot)} - {slot.leaf.id}
        return ids, [s for s, which in found if isinstance(s, LoopSlot) and which == "end"]

    def sources_of(self, slot: LeafSlot) -> list[tuple[str, str, int | None]]:
        """Return (parameter, node id, iteration or None for the newest) of each output it gets.

        To be asked when an attempt starts: the loops around it may have moved on since the render.
        """
        return [
            (parameter, self.by_id[id].key[0], None if newest else self.by_id[id].key[1])
            for parameter, id, newest in slot.targets
            if parameter is not None
        ]

    @staticmethod
    def _order_children(branch: Branch, before: dict[Any, list[Any]]) -> None:
        previous: tuple[Slot, str] = (branch, "start")
        for child in branch.children:
            before.setdefault((child, "start"), []).append(previous)
            if isinstance(branch.element, Parallel):
                before[(branch, "end")].append((child, "end"))
            else:
                previous = (child, "end")
        before[(branch, "end")].append(previous)

    def leaves(self, branch: Branch | None = None) -> Iterator[LeafSlot]:
        """Yield the nodes in document order."""
        stack: list[Slot] = [branch or self.root]
        while stack:
            slot = stack.pop()
            if isinstance(slot, LeafSlot):
                yield slot
            elif isinstance(slot, Branch):
                stack.extend(reversed(slot.children))

    # Moving on

    def start(self) -> None:
        """Give the root its turn."""
        self._work.append((self.root, False))
        self._run()

    def complete(self, slot: Slot) -> None:
        """Note that a node or loop has ended; what follows it is reached."""
        self._work.append((slot, True))
        self._run()

    def begin_loop(self, slot: LoopSlot, iteration: int) -> list[LeafSlot]:
        """Begin an iteration and return its nodes."""
        if slot.has_begun:
            self._remount(slot, iteration)
        slot.has_begun = True
        slot.cursor = 0
        self._enter_body(slot)
        self._run()
        return list(self.leaves(slot))

    def _remount(self, slot: LoopSlot, iteration: int) -> None:
        for old in self.below(slot):
            if isinstance(old, LeafSlot):
                del self.by_id[old.leaf.id]
                del self.slots[old.key]
            elif isinstance(old, LoopSlot):
                del self.loop_by_id[old.loop.id]
        slot.children = []
        slot.iteration = iteration
        self._mount_children(slot, (*slot.loops, slot), slot.groups, len(slot.loops))
        for leaf in self.leaves(slot):
            self._link(leaf)

    @staticmethod
    def below(branch: Branch) -> Iterator[Slot]:
        """Yield everything below a branch."""
        stack = list(branch.children)
        while stack:
            slot = stack.pop()
            yield slot
            if isinstance(slot, Branch):
                stack.extend(slot.children)

    def _run(self) -> None:
        """Carry turns and endings through the tree.

        A queue, not recursion: thousands may be skipped in a row.
        """
        while self._work:
            slot, ended = self._work.popleft()
            if ended:
                self._leave(slot)
            else:
                self._enter(slot)

    def _enter(self, slot: Slot) -> None:
        slot.is_active = True
        if slot.is_done:  # a loop of an earlier life, or a node that ended before its turn came
            self._count_in_parent(slot)
        elif isinstance(slot, LeafSlot):
            if slot.needs_left == 0:
                self.reached.append(slot)
        elif isinstance(slot, LoopSlot):
            if slot.has_begun:
                self._enter_body(slot)
            else:
                self.due.append(slot)
        elif isinstance(slot.element, Fail):
            self.failure = slot.element.message
        elif isinstance(slot, Branch) and slot.children:
            first = slot.children if isinstance(slot.element, Parallel) else slot.children[:1]
            # At the front, so that what can start starts in document order.
            self._work.extendleft((child, False) for child in reversed(first))
        else:
            self._work.append((slot, True))

    def _enter_body(self, slot: LoopSlot) -> None:
        if slot.children:
            self._work.appendleft((slot.children[0], False))
        else:
            self.due.append(slot)

    def _leave(self, slot: Slot) -> None:
        if slot.is_done:
            return
        slot.is_done = True
        for waiter in slot.waiters:
            waiter.needs_left -= 1
            if waiter.needs_left == 0 and waiter.is_active:
                self.reached.append(waiter)
        if slot.is_active:
            self._count_in_parent(slot)

    def _count_in_parent(self, slot: Slot) -> None:
        """Give the next sibling its turn, or end the parent with its last child."""
        parent = slot.parent
        if parent is None:
            return
        parent.cursor += 1
        if parent.cursor == len(parent.children):
            if isinstance(parent, LoopSlot):
                self.due.append(parent)
            else:
                self._work.append((parent, True))
        elif not isinstance(parent.element, Parallel):
            self._work.append((parent.children[parent.cursor], False))


# ---------------------------------------------------------------------------
# Progress: how far a run has come in today's tree; as pure
# ---------------------------------------------------------------------------

# Where a node stands: exactly one of these. What its row says (its state) follows.
PENDING = "pending"  # its turn has not come, or has not been looked at since the last render
READY = "ready"  # waits for the run's next free place
BLOCKED = "blocked"  # waits for a place in a full Parallel
RUNNING = "running"  # an attempt is in flight, also one that was told to stop
RETRYING = "retrying"  # its turn has come, its next attempt is due later
AT_GATE = "at gate"  # its gate has been requested
ENDED = "ended"

MAX_CRASHES = 3  # lives, or pools of workers, that one node may bring down


class Record:
    """What is known of one node, beside its place in the tree."""

    __slots__ = (
        "phase",
        "state",
        "last_attempt",
        "failures",
        "crashes",
        "due_at_ms",
        "gate",
        "asked",
        "kind",
        "ready_at_ms",
        "started_at_ms",
    )

    def __init__(self, state: str = "pending", last_attempt: int | None = None) -> None:
        self.phase = ENDED if state in ("finished", "failed", "skipped") else PENDING
        self.state = state
        self.last_attempt = last_attempt
        self.failures = 0
        self.crashes = 0  # in a row; a suspect until it ends
        self.due_at_ms = 0  # its next attempt begins no earlier
        self.gate: str | None = None  # what the row of its gate says
        self.asked: dict[str, Any] | None = None  # at its open gate
        self.kind: str | None = None  # its leaf's, when it was last more than skipped
        self.ready_at_ms = 0
        self.started_at_ms: int | None = None

    def is_other(self, slot: LeafSlot | None) -> bool:
        """True when this is the record of a gate and today's node is a task, or the reverse."""
        # Where its rows do not tell, what was denied stays so.
        return slot is not None and self.kind is not None and self.kind != slot.leaf.kind

    def ask(self, leaf: Leaf) -> bool:
        """Note what an open gate asks today, of whom and for how long; True when that is news."""
        before, self.asked = self.asked, leaf.request()
        return before != self.asked


def endless_rendering(before: Plan, now: Plan) -> AuthoringError:
    changed = sorted(now.by_id.keys() ^ before.by_id.keys())[:10]
    what = f"; what changes: {', '.join(changed)}" if changed else ""
    return AuthoringError(
        f"{MAX_RENDERS_WITHOUT_PROGRESS} renders in a row, and nothing ran{what}", "RENDER_LOOP"
    )


class Effect(NamedTuple):
    """Something that the engine is to do, now and in this order."""

    kind: str
    key: Key
    detail: Any = None


class Progress:
    """How far a run has come: today's tree, and a record for each of its nodes.

    Told what was rendered, has ended, was decided or is due, it answers with effects. A key is all
    that is held of a node: its place is looked up in today's tree when needed, so that nothing
    starts at a place that is no longer its own.
    """

    def __init__(self, max_concurrency: int) -> None:
        self.max_concurrency = max_concurrency
        self.plan: Plan | None = None
        self.records: dict[Key, Record] = {}
        self.loops: dict[str, tuple[int, bool]] = {}
        self.failed: list[str] = []  # ids of the nodes that fail the run
        self.fatal: dict[str, str] | None = None  # the error that fails it without a node
        self.is_stopping = False  # cancelled or suspended: nothing new starts
        self.is_stale = True  # something that the last render has read has changed
        self._reads: set[tuple[str, str]] = set()
        self._changes: set[tuple[str, str]] | None = None  # since a render has begun
        self._idle_renders = 0  # in a row, with nothing done in between
        self._ready: collections.deque[Key] = collections.deque()
        self._suspects: list[Key] = []  # ready, and waiting for each other
        self._suspects_running = 0
        self._forgotten: set[str] = set()  # ids of nodes in iterations that are over
        self._counts: collections.Counter[str] = collections.Counter()

    @property
    def is_halting(self) -> bool:
        """True when nothing new may start: the run only waits for what is in flight."""
        return self.is_stopping or self.fatal is not None or bool(self.failed)

    @property
    def running(self) -> int:
        return self._counts[RUNNING]

    @property
    def queued(self) -> int:
        return self._counts[READY] + self._counts[BLOCKED]

    @property
    def open_gates(self) -> int:
        return self._counts[AT_GATE]

    def standing(self) -> str:
        """Return `stale`, `busy`, `ended`, `waiting` (for decisions only) or `stuck`, an error."""
        if self.is_halting:
            return "busy" if self.running else "ended"
        if self.is_stale or self.plan is None:
            return "stale"
        if self.running or self.queued or self._counts[RETRYING]:
            return "busy"
        if self.plan.root.is_done:
            return "ended"
        return "waiting" if self.open_gates else "stuck"

    # What an earlier life has left

    def recall(self, key: Key, record: Record) -> None:
        self.records[key] = record
        self._counts[record.phase] += 1

    # Moves of a record

    def _move(self, record: Record, phase: str, state: str, id: str) -> None:
        """Give a record its next phase and state; a render that has read the state is due again."""
        self._counts[record.phase] -= 1
        self._counts[phase] += 1
        record.phase = phase
        if record.state != state:
            record.state = state
            self._changed("state", id)

    def _changed(self, kind: str, id: str) -> None:
        if (kind, id) in self._reads:
            self.is_stale = True
        if self._changes is not None:
            self._changes.add((kind, id))

    def _slot(self, key: Key) -> LeafSlot | None:
        return self.plan.slots.get(key) if self.plan is not None else None

    # A new tree

    def begin_render(self) -> None:
        """Note what changes while the workflow function is called: it may have read it before."""
        self._changes = set()

    def refuse_endless_rendering(self, plan: Plan) -> None:
        """Raise AuthoringError RENDER_LOOP when trees follow each other and nothing runs."""
        self._idle_renders += 1
        if self._idle_renders > MAX_RENDERS_WITHOUT_PROGRESS and self.plan is not None:
            raise endless_rendering(self.plan, plan)

    def rendered(self, plan: Plan, reads: set[tuple[str, str]]) -> Iterator[Effect]:
        """Make a rendered tree today's; yield what begins and what ends with it.

        The caller carries each effect out before it asks for the next.
        """
        is_first = self.plan is None
        self.plan, self._reads = plan, reads
        self.is_stale = not reads.isdisjoint(self._changes or ())
        self._changes = None
        self._ready.clear()
        self._suspects.clear()
        if is_first:
            self._forget(key for key in list(self.records) if self._is_over(plan, key))
        yield from self._adopt(list(plan.leaves()))
        yield Effect("frame", ("", 0))
        for key, record in list(self.records.items()):
            yield from self._fit(key, record, plan.slots.get(key))
        plan.start()

    def _adopt(self, slots: Seq[LeafSlot]) -> Iterator[Effect]:
        """Have a record for each slot, and those that run hold their places."""
        for slot in slots:
            if slot.key not in self.records and slot.leaf.id in self._forgotten:
                yield Effect("recall", slot.key)  # its row may say what it was
            record = self.records.get(slot.key)
            if record is None:
                record = Record()
                record.kind = slot.leaf.kind
                self.recall(slot.key, record)
                yield Effect("insert", slot.key)
            elif record.phase == RUNNING:
                for group in slot.groups:
                    group.active += 1

    def _fit(self, key: Key, record: Record, slot: LeafSlot | None) -> list[Effect]:
        """Bring a record in line with what today's tree has under its key."""
        id = plain_id(key[0])
        kind = record.kind if slot is None else slot.leaf.kind
        is_skipped = record.state == "skipped" and slot is not None and slot.leaf.skip_if
        is_other = not is_skipped and record.is_other(slot)
        if not is_skipped:
            record.kind = kind
        if record.phase in (READY, BLOCKED, RETRYING):
            self._move(record, PENDING, record.state, id)  # its turn is looked at again
        elif record.phase == RUNNING and (slot is None or kind != "task"):
            effects = [Effect("stop", key, "no longer in the tree")]
            return effects + (self._renew(key, record) if is_other else [])
        elif record.phase == AT_GATE:
            if slot is not None and not is_other and slot.leaf.asks_first and not slot.leaf.skip_if:
                return [Effect("await", key)] if record.ask(slot.leaf) else []
            record.gate = "cancelled"
            self._move(record, PENDING, "cancelled", id)
            closing = Effect("close", key, "no longer in the tree")
            return [closing, *(self._renew(key, record) if is_other else ())]
        return self._renew(key, record) if is_other else []

    def _renew(self, key: Key, record: Record) -> list[Effect]:
        """Forget how a node went under whose id there is a gate for a task now, or the reverse.

        The end of one is not the other's, nor is a decision.
        """
        effects = [Effect("renew", key)]
        record.failures = record.due_at_ms = 0
        record.gate = record.gate and "cancelled"
        if record.phase == ENDED:
            self._move(record, PENDING, "pending", plain_id(key[0]))
            effects.append(Effect("repeat", key))
        return effects

    def _leave(self, slot: LeafSlot) -> list[Effect]:
        """Let go of a node whose loop has gone on, perhaps without waiting for it."""
        record = self.records[slot.key]
        if record.phase == ENDED:
            self._forget([slot.key])
            return []
        if record.phase == RUNNING:
            self._give_places_back(slot)
        return self._fit(slot.key, record, None)

    def _is_over(self, plan: Plan, key: Key) -> bool:
        """True for a node of an iteration that is over, when its loop has gone on."""
        is_left = plain_id(key[0]) in plan.by_id and key not in plan.slots
        return is_left and self.records[key].phase == ENDED

    def _forget(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._counts[self.records.pop(key).phase] -= 1
            self._forgotten.add(plain_id(key[0]))

    # Going on

    def advance(self, now_ms: int, has_room: Callable[[], bool] = lambda: True) -> Iterator[Effect]:
        """Yield what is to be done, until a render is due or nothing is left to do now.

        The caller carries each effect out before it asks for the next. Ends early, at a point from
        where another call goes on, when there is no room for more.
        """
        plan = self.plan
        while plan is not None and not self.is_stale and not self.is_halting and has_room():
            if plan.failure is not None:
                self.fatal = describe_error(TaskFailed(plan.failure, "WORKFLOW_FAILED"))
            elif plan.reached:
                slot = plan.reached.popleft()
                if plan.slots.get(slot.key) is slot:  # not of an iteration that is over
                    yield from self._reach(slot, now_ms)
            elif plan.due:
                yield from self._decide_loop(plan, plan.due.popleft())
            else:
                key = self._next_to_start()
                if key is None:
                    return
                yield self._start(key)

    def _reach(self, slot: LeafSlot, now_ms: int) -> Iterator[Effect]:
        """Look at a node whose turn has come, in whatever phase it is."""
        record, leaf, key = self.records[slot.key], slot.leaf, slot.key
        if record.phase == ENDED:
            if record.state == "failed" and record.gate == "denied" and leaf.on_deny != "fail":
                yield self._deny(slot)  # another program's word; what follows is the author's
            else:
                self._end(slot, record.state)
            return
        if record.phase != PENDING:
            return  # what it does or waits for says later how it goes on
        if record.state not in ("pending", "waiting-approval"):
            self._move(record, PENDING, "pending", leaf.id)
            yield Effect("repeat", key)
        if leaf.skip_if:
            yield self._conclude(slot, "skipped", "skip")
        elif not leaf.asks_first or record.gate == "approved" and leaf.kind == "task":
            yield from self._enqueue(slot, record, now_ms)
        elif record.gate == "approved":
            yield self._conclude(slot, "finished", "pass")
        elif record.gate == "denied":
            yield self._deny(slot)
        else:
            is_open = record.gate == "requested"
            record.gate = "requested"
            record.ask(leaf)
            self._idle_renders = 0
            state = "pending" if leaf.kind == "pause" else "waiting-approval"
            self._move(record, AT_GATE, state, leaf.id)
            yield Effect("await" if is_open else "open", key)

    def _deny(self, slot: LeafSlot) -> Effect:
        leaf = slot.leaf
        if leaf.on_deny == "fail":
            return self._conclude(slot, "failed", "deny")
        if leaf.on_deny == "continue" and isinstance(leaf, Approval):
            return self._conclude(slot, "finished", "pass")
        self._changed("output", leaf.id)
        return self._conclude(slot, "skipped", "skip", "with its decision")

    def _conclude(self, slot: LeafSlot, state: str, effect: str, detail: Any = None) -> Effect:
        """Bring a node to its end."""
        record = self.records[slot.key]
        self._move(record, ENDED, state, slot.leaf.id)
        record.crashes = 0
        if state == "finished":
            self._changed("output", slot.leaf.id)
        elif state == "failed":
            self._changed("error", slot.leaf.id)
        self._end(slot, state)
        return Effect(effect, slot.key, detail)

    def _end(self, slot: LeafSlot, state: str) -> None:
        """Let what follows a node that has ended have its turn, or the run fail."""
        assert self.plan is not None
        if state == "failed" and not slot.leaf.continue_on_fail:
            self.failed.append(slot.key[0])
        else:
            self.plan.complete(slot)

    def _enqueue(self, slot: LeafSlot, record: Record, now_ms: int) -> Iterator[Effect]:
        if record.crashes >= MAX_CRASHES:
            yield self._conclude(slot, "failed", "crash")
        elif record.due_at_ms > now_ms:
            self._move(record, RETRYING, record.state, slot.leaf.id)
            yield Effect("delay", slot.key, record.due_at_ms)
        else:
            self._make_ready(slot.key, record, now_ms)

    def _make_ready(self, key: Key, record: Record, now_ms: int) -> None:
        record.ready_at_ms = now_ms
        self._move(record, READY, record.state, key[0])
        self._ready.append(key)

    def _decide_loop(self, plan: Plan, slot: LoopSlot) -> Iterator[Effect]:
        """Begin a loop, its next iteration, or end it.

        `until` comes from a render that has seen all of it.
        """
        loop = slot.loop
        number = slot.iteration + 1 if slot.has_begun else 0
        if loop.until or number >= loop.max_iterations:
            if not loop.until and loop.on_max == "fail":
                message = f"loop {slot.key!r} did not reach its end in {number} iterations"
                self.fatal = describe_error(TaskFailed(message, "LOOP_EXHAUSTED"))
                return
            self.loops[slot.key] = (slot.iteration, True)
            plan.complete(slot)
            yield Effect("loop", (slot.key, slot.iteration), True)
            return
        self.loops[slot.key] = (number, False)
        yield Effect("loop", (slot.key, number), False)
        if not slot.has_begun:
            plan.begin_loop(slot, number)
            return
        self._idle_renders = 0
        self._changed("iteration", loop.id)
        left: list[LeafSlot] = []
        for below in plan.below(slot):
            if isinstance(below, LeafSlot):
                for kind in ("output", "state", "error"):
                    self._changed(kind, below.leaf.id)
                left.append(below)
            elif isinstance(below, LoopSlot):
                self._changed("iteration", below.loop.id)
                self.loops.pop(below.key, None)
        begun = plan.begin_loop(slot, number)
        for leaf in left:
            yield from self._leave(leaf)
        yield from self._adopt(begun)
        for leaf in begun:
            yield from self._fit(leaf.key, self.records[leaf.key], leaf)
        if not self.is_stale:
            yield Effect("frame", ("", 0))

    # Places

    def _next_to_start(self) -> Key | None:
        """Return a ready node that has a place, None when none is ready or no place is free.

        Those that were in flight when a life ended start after the others and one at a time, the
        least suspect first: so one that brings its process down does not take the rest with it.
        """
        while self.running < self.max_concurrency:
            if self._ready:
                key = self._ready.popleft()
                if self.records[key].phase == READY and self.records[key].crashes:
                    self._suspects.append(key)
                    self._pass_on(key)  # what it was woken for, others can use
                    continue
            elif self._suspects and not self._suspects_running:
                key = min(self._suspects, key=lambda suspect: self.records[suspect].crashes)
                self._suspects.remove(key)
            else:
                return None
            if self.records[key].phase == READY and self._has_place(key):
                return key
        return None

    def _has_place(self, key: Key) -> bool:
        """Return whether each Parallel around a node has a place; else it waits at a full one."""
        slot = self._slot(key)
        assert slot is not None
        full = next((group for group in slot.groups if group.active >= group.limit), None)
        if full is None:
            return True
        full.waiting.append(key)
        self._move(self.records[key], BLOCKED, "pending", slot.leaf.id)
        self._pass_on(key)
        return False

    def _pass_on(self, key: Key) -> None:
        """Wake others for the places that a node was woken for, and cannot take."""
        slot = self._slot(key)
        for group in slot.groups if slot is not None else ():
            if group.active < group.limit:
                self._wake(group)

    def _give_places_back(self, slot: LeafSlot) -> None:
        for group in slot.groups:
            group.active -= 1
            self._wake(group)

    def _wake(self, group: Group) -> None:
        while group.waiting:
            key = group.waiting.popleft()
            record = self.records.get(key)
            if record is not None and record.phase == BLOCKED:
                self._move(record, READY, "pending", key[0])
                self._ready.appendleft(key)
                return

    def _start(self, key: Key) -> Effect:
        slot, record = self._slot(key), self.records[key]
        assert slot is not None
        record.last_attempt = 0 if record.last_attempt is None else record.last_attempt + 1
        self._idle_renders = 0
        self._suspects_running += bool(record.crashes)
        for group in slot.groups:
            group.active += 1
        self._move(record, RUNNING, "in-progress", slot.leaf.id)
        return Effect("start", key, record.last_attempt)

    # What happens meanwhile

    def attempt_ended(self, key: Key, result: str, now_ms: int) -> str:
        """Book the end of the attempt in flight; return what became of the node.

        `result` is `finished`, `failed`, `unfixable` (failed, and would again), `interrupted` or
        `crashed`. The answer is `finished`, `retrying`, `failed` or `cancelled`: it may run again.
        """
        record, slot = self.records[key], self._slot(key)
        self._idle_renders = 0
        self._suspects_running -= bool(record.crashes)
        if slot is not None:
            self._give_places_back(slot)
        if result == "crashed":
            record.crashes += 1
        if slot is None or not isinstance(slot.leaf, Task) or result in ("interrupted", "crashed"):
            self._move(record, PENDING, "cancelled", key[0] if slot is None else slot.leaf.id)
            self._look_again(slot)
            return "cancelled"
        if result == "finished":
            self._conclude(slot, "finished", "")
            return "finished"
        record.failures += 1
        is_last = record.failures > slot.leaf.retries or bool(self.failed) or self.fatal is not None
        if result == "unfixable" or is_last:
            self._conclude(slot, "failed", "")
            return "failed"
        record.due_at_ms = now_ms + round(1000 * slot.leaf.retry_delay_after(record.failures))
        self._move(record, PENDING, "pending", slot.leaf.id)
        self._look_again(slot)
        return "retrying"

    def _look_again(self, slot: LeafSlot | None) -> None:
        """Have a node looked at once more, if it is its turn in today's tree."""
        if slot is not None and self.plan is not None and slot.has_turn:
            self.plan.reached.append(slot)

    def retry_is_due(self, key: Key, now_ms: int) -> None:
        record = self.records.get(key)
        if record is not None and record.phase == RETRYING:
            self._make_ready(key, record, now_ms)

    def gate_decided(self, key: Key, status: str) -> None:
        """Note a decision, also on a gate whose turn is not, or not yet, in today's tree."""
        record, slot = self.records.get(key), self._slot(key)
        if record is None:
            return
        record.gate = status
        self._idle_renders = 0
        if record.state == "waiting-approval" or record.phase == AT_GATE:
            self._move(record, PENDING, "pending", plain_id(key[0]))
            self._look_again(slot)

    def gate_expired(self, key: Key) -> None:
        """Fail a node at whose gate nobody has decided in time."""
        slot, record = self._slot(key), self.records[key]
        assert slot is not None and record.phase == AT_GATE
        record.gate = "cancelled"
        self._conclude(slot, "failed", "")


# ---------------------------------------------------------------------------
# Tasks: how one attempt runs
# ---------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came of an attempt: an output, or an error with its traceback."""

    output_json: str | None
    error: dict[str, str] | None = None
    traceback: str | None = None


class Lines:
    """Text as it comes in, cut into lines; one that is longer than 8 KiB is cut there."""

    def __init__(self) -> None:
        self._partial = ""

    def feed(self, text: str) -> list[str]:
        """Return the lines that `text` completes."""
        *lines, self._partial = (self._partial + text).split("\n")
        whole = [line[:-1] if line.endswith("\r") else line for line in lines]
        parts = [part for line in whole for part in self._cut(line)]
        if len(self._partial) > MAX_LOG_LINE + 1:  # the last may be half of an end of line
            *more, self._partial = self._cut(self._partial)
            parts += more
        return parts

    def rest(self) -> list[str]:
        partial, self._partial = self._partial, ""
        return self._cut(partial) if partial else []

    @staticmethod
    def _cut(line: str) -> list[str]:
        return [line[at : at + MAX_LOG_LINE] for at in range(0, max(len(line), 1), MAX_LOG_LINE)]


class StopFlag(threading.Event):
    """Set when a task should stop. `was_seen` tells whether the task has looked since."""

    was_seen = False

    def is_set(self) -> bool:
        found = super().is_set()
        self.was_seen = self.was_seen or found
        return found

    def wait(self, timeout: float | None = None) -> bool:
        found = super().wait(timeout)
        self.was_seen = self.was_seen or found
        return found

    @property
    def is_up(self) -> bool:
        """Whether it is set, for the engine: not a look of the task's."""
        return super().is_set()


class CurrentTask:
    """What a running task knows of itself; `current_task()` returns it.

    `idempotency_key` is the same for every attempt of a node. `cancelled` is set when the task
    should stop. The task's own thread calls `log`, `emit` and `printed`, the engine's `stop`.
    """

    def __init__(self, run_id: str, node_id: str, iteration: int, attempt: int) -> None:
        self.run_id = run_id
        self.node_id = node_id
        self.iteration = iteration
        self.attempt = attempt
        self.idempotency_key = f"{run_id}:{node_id}:{iteration}"
        self.engine = ""  # the owner id of the engine that started it
        self.cancelled = StopFlag()
        self.kill_after = KILL_AFTER_SECONDS
        self._logged = 0
        self._printed: dict[str, Lines] = {}
        # Guards _on_stop, so that a stop that comes while the task begins or ends is neither lost
        # nor late.
        self._lock = threading.Lock()
        self._on_stop: Callable[[], None] | None = None

    def log(self, text: str) -> None:
        """Add a NodeOutput event per line.

        Raises TaskFailed OUTPUT_LIMIT past 32 MiB in one attempt.
        """
        lines = Lines()
        self.emit(lines.feed(str(text)) + lines.rest() or [""], "stdout")

    def emit(self, lines: Iterable[str], stream: str) -> None:
        for line in lines:
            line = printable(line)
            self._logged += len(line.encode()) + 1
            if self._logged > MAX_LOG_BYTES:
                raise TaskFailed(f"printed more than {MAX_LOG_BYTES >> 20} MiB", "OUTPUT_LIMIT")
            self._send(line, stream)

    def printed(self, text: str, stream: str) -> None:
        """Take what a function writes to sys.stdout or sys.stderr."""
        self.emit(self._printed.setdefault(stream, Lines()).feed(text), stream)

    def end_lines(self) -> None:
        """Emit what was printed without an end of line."""
        for stream, lines in self._printed.items():
            self.emit(lines.rest(), stream)

    def note_group(self, group: int) -> None:
        """Keep the process group of a command where who resumes the run finds it."""

    def _send(self, text: str, stream: str) -> None:
        """Where a line goes. Outside of an engine: nowhere."""

    def stop(self) -> None:
        """Set the flag and call what the task has registered to be stopped with."""
        with self._lock:
            self.cancelled.set()
            if self._on_stop is not None:
                self._on_stop()

    @contextlib.contextmanager
    def stopped_by(self, on_stop: Callable[[], None]) -> Iterator[None]:
        """Have `on_stop` called at a stop while the block runs.

        At once when the stop has come already.
        """
        with self._lock:
            self._on_stop = on_stop
            if self.cancelled.is_up:
                on_stop()
        try:
            yield
        finally:
            with self._lock:
                self._on_stop = None


class RecordedTask(CurrentTask):
    """A task that keeps its lines, as (text, stream): in another process, or in a test."""

    def __init__(self, run_id: str, node_id: str, iteration: int, attempt: int) -> None:
        super().__init__(run_id, node_id, iteration, attempt)
        self.said: list[tuple[str, str]] = []

    @property
    def lines(self) -> list[str]:
        """The lines so far, of both streams."""
        return [text for text, _ in self.said]

    def _send(self, text: str, stream: str) -> None:
        self.said.append((text, stream))


_current: contextvars.ContextVar[CurrentTask] = contextvars.ContextVar("smithers_current_task")


def current_task() -> CurrentTask:
    """Return the task that runs in this context. Raises RuntimeError outside of a task."""
    task = _current.get(None)
    if task is None:
        raise RuntimeError("current_task() works only inside a running task")
    return task


class TaskStream(io.TextIOBase):
    """Stands in for sys.stdout or sys.stderr: what a task prints is its output too.

    A stream that nobody reads any more, or a full disk behind it, is no failure of the task.
    """

    def __init__(self, real: TextIO | None, stream: str, echo: bool) -> None:
        self.real = real
        self._stream = stream
        self._echo = echo  # also here, when a task prints

    def write(self, text: str) -> int:
        task = _current.get(None)
        if task is not None:
            task.printed(text, self._stream)
        with contextlib.suppress(OSError, ValueError):
            if self.real is not None and (task is None or self._echo):
                self.real.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self.real is not None:
                self.real.flush()

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.real, "encoding", "utf-8")

    def fileno(self) -> int:
        return self.real.fileno() if self.real is not None else super().fileno()

    def isatty(self) -> bool:
        return self.real is not None and self.real.isatty()


# Guards _capturers, the engines and workers that want to hear what tasks print.
_capture_lock = threading.Lock()
_capturers = 0


@contextlib.contextmanager
def captured_prints(echo: bool) -> Iterator[None]:
    """Have what tasks print heard while the block runs; blocks may overlap in several threads.

    With `echo` it is also written where it would have gone.
    """
    global _capturers
    with _capture_lock:
        _capturers += 1
        if _capturers == 1:
            sys.stdout = TaskStream(sys.stdout, "stdout", echo)
            sys.stderr = TaskStream(sys.stderr, "stderr", echo)
    try:
        yield
    finally:
        with _capture_lock:
            _capturers -= 1
            if _capturers == 0:
                for name in ("stdout", "stderr"):
                    stream = getattr(sys, name)
                    if isinstance(stream, TaskStream):  # else somebody has put their own there
                        setattr(sys, name, stream.real)


def encode_output(value: Any) -> str:
    """Return a task's output as JSON text.

    Raises TaskFailed when JSON cannot hold it or it is over 1 MiB.
    """
    try:
        text = to_json(value)
        size = len(text.encode("utf-8"))
        parse_json(text)  # finds keys that are one in JSON, such as 1 and "1"
    except (TypeError, ValueError, RecursionError) as error:
        raise TaskFailed(f"the output is not JSON: {error}", "OUTPUT_NOT_JSON") from error
    if size > MAX_OUTPUT_BYTES:
        raise TaskFailed(
            f"the output has {size} bytes of JSON, at most {MAX_OUTPUT_BYTES} are kept",
            "OUTPUT_TOO_LARGE",
        )
    return text


@contextlib.contextmanager
def fake_task(
    node_id: str = "task", *, run_id: str = "run", iteration: int = 0, attempt: int = 0
) -> Iterator[RecordedTask]:
    """Have `current_task()` work in the block, for a test of what a task does.

    What is logged or printed there is in the task's `lines` afterwards; `cancelled.set()` and
    `stop()` say that it should stop, the latter also to a coroutine.
    """
    task = RecordedTask(run_id, node_id, iteration, attempt)
    token = _current.set(task)
    try:
        with captured_prints(echo=True):
            yield task
    finally:
        task.end_lines()
        _current.reset(token)


# The work is done and would be done again: a retry cannot help.
UNFIXABLE = ("OUTPUT_NOT_JSON", "OUTPUT_TOO_LARGE", "OUTPUT_LIMIT")


def call_function(
    task: CurrentTask, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return what a function or coroutine function returns, run under `task`."""
    token = _current.set(task)
    try:
        value = run(*args, **kwargs)
        return _await(task, value) if isinstance(value, types.CoroutineType) else value
    finally:
        try:
            task.end_lines()
        finally:
            _current.reset(token)


def _await(task: CurrentTask, coroutine: types.CoroutineType[Any, Any, Any]) -> Any:
    import asyncio  # 40 ms: only for those who use it

    async def supervise() -> Any:
        loop = asyncio.get_running_loop()
        future = asyncio.ensure_future(coroutine)

        def cancel() -> None:
            loop.call_soon_threadsafe(future.cancel)

        with task.stopped_by(cancel):
            return await future

    return asyncio.run(supervise())


class _Pipe:
    """One output of a command: its lines as they come, and its last 64 KiB."""

    def __init__(self, file: Any, stream: str) -> None:
        self.file = file
        self.stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._lines = Lines()
        self._kept = bytearray()
        self._size = 0
        os.set_blocking(file.fileno(), False)

    def read(self, task: CurrentTask) -> int | None:
        """Emit the lines of what is there; return its size, 0 at the end, None for nothing."""
        try:
            data = os.read(self.file.fileno(), 65536)
        except BlockingIOError:
            return None
        self._size += len(data)
        self._kept += data
        if len(self._kept) > 2 * COMMAND_TAIL_BYTES:
            del self._kept[:-COMMAND_TAIL_BYTES]
        task.emit(self._lines.feed(self._decode(data)), self.stream)
        return len(data)

    def finish(self, task: CurrentTask) -> None:
        """Emit what is left after the command's end.

        What it has written is in the pipe when its end is seen. Who holds the pipe open may write
        on: that is no more of the command's than a pipe can have held.
        """
        left = MAX_PIPE_BYTES
        while left > 0:
            size = self.read(task)
            if not size:
                break
            left -= size
        task.emit(self._lines.feed(self._decode(b"", True)) + self._lines.rest(), self.stream)

    @property
    def dropped(self) -> int:
        """The number of bytes that `text` leaves out."""
        return max(0, self._size - COMMAND_TAIL_BYTES)

    def text(self) -> str:
        kept = bytes(self._kept[-COMMAND_TAIL_BYTES:])
        if self.dropped:  # not from the middle of a character
            kept = kept.lstrip(bytes(range(0x80, 0xC0)))
        return kept.decode("utf-8", "replace")


MAX_PIPE_BYTES = 1 << 20  # what Linux lets a pipe hold at most (pipe-max-size), usually 64 KiB
_live_groups: set[int] = set()  # process groups of running commands; add and discard are atomic


def kill_live_commands() -> None:
    """Kill what is left of every command, for a process that is about to leave."""
    for group in tuple(_live_groups):
        _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    # It may be gone already, or its leader a zombie (macOS).
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def run_command(task: CurrentTask, argv: Seq[str]) -> dict[str, Any]:
    """Run a command in its own process group and return `{"exitCode","stdout","stderr"}`.

    Where more than 64 KiB were printed, `truncated` says how many bytes `stdout` or `stderr` leave
    out. Raises TaskFailed COMMAND_FAILED for a non-zero exit code.
    """
    import subprocess

    hidden = "SMITHERS_API_KEY"  # the server's token is no business of a task
    environment = {name: value for name, value in os.environ.items() if name != hidden}
    environment.update(
        SMITHERS_RUN_ID=task.run_id,
        SMITHERS_NODE_ID=task.node_id,
        SMITHERS_ITERATION=str(task.iteration),
        SMITHERS_ATTEMPT=str(task.attempt),
        SMITHERS_IDEMPOTENCY_KEY=task.idempotency_key,
        SMITHERS_ENGINE=task.engine,
    )
    with subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        bufsize=0,
    ) as process:
        _live_groups.add(process.pid)
        try:
            with task.stopped_by(functools.partial(_signal_group, process.pid, signal.SIGTERM)):
                task.note_group(process.pid)
                pipes = (_Pipe(process.stdout, "stdout"), _Pipe(process.stderr, "stderr"))
                _follow(task, process, pipes)
        except BaseException:
            _signal_group(process.pid, signal.SIGKILL)
            raise
        finally:
            _live_groups.discard(process.pid)
    code = process.returncode
    stdout, stderr = pipes[0].text(), pipes[1].text()
    if code != 0:
        last = (stderr.strip() or stdout.strip()).rpartition("\n")[2][:500]
        how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
        raise TaskFailed(
            f"{os.path.basename(argv[0])} {how}" + (f": {last}" if last else ""), "COMMAND_FAILED"
        )
    output: dict[str, Any] = {"exitCode": code, "stdout": stdout, "stderr": stderr}
    truncated = {pipe.stream: pipe.dropped for pipe in pipes if pipe.dropped}
    return {**output, "truncated": truncated} if truncated else output


def _follow(task: CurrentTask, process: subprocess.Popen[bytes], pipes: Seq[_Pipe]) -> None:
    """Emit a command's lines until it has exited and what it wrote is read.

    Escalate a stop to SIGKILL.
    """
    kill_at: float | None = None
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe.file, selectors.EVENT_READ, pipe)
        while process.poll() is None:
            if selector.get_map():
                for key, _ in selector.select(0.1):
                    if key.data.read(task) == 0:
                        selector.unregister(key.fileobj)
            else:  # it has closed its pipes; it may still be running
                _wait_a_little(process)
            if task.cancelled.is_up:
                kill_at = kill_at or time.monotonic() + task.kill_after
                if time.monotonic() >= kill_at:
                    _signal_group(process.pid, signal.SIGKILL)
    for pipe in pipes:
        pipe.finish(task)


def _wait_a_little(process: subprocess.Popen[bytes]) -> None:
    import subprocess

    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.1)


# By token: lets an executor in this process find its live attempt.
_attempts_here: dict[str, CurrentTask] = {}


class RemoteResult(NamedTuple):
    """What comes back from an executor's worker: a plain tuple of plain values."""

    outcome: tuple[Any, ...]
    lines: list[tuple[str, str]] = []
    has_seen_flag: bool = False


def call_in_executor(
    token: str,
    engine: str,
    path: str,
    submitted_at: float,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run_id: str,
    node_id: str,
    iteration: int,
    attempt: int,
) -> tuple[Any, ...]:
    """Run one attempt in an executor's worker and return a RemoteResult.

    A user exception never has to be pickled; what it said comes back as text, its lines with it.
    """
    never_ran = tuple(RemoteResult(tuple(Outcome(None))))
    here = _attempts_here.get(token)
    if here is not None:
        is_over = here.cancelled.is_up
        return never_ran if is_over else (tuple(_outcome_alone(here, run, args, kwargs)),)
    _leave_with(engine)
    task = RecordedTask(run_id, node_id, iteration, attempt)
    ended = threading.Event()
    if process_of(engine)[0] == _host():  # else neither the file nor the engine can be looked at
        if time.time() - submitted_at > REMOTE_POLL_SECONDS:  # it has waited for a worker
            with contextlib.suppress(SmithersError), SmithersDb(path, create=False) as db:
                if _must_stop(db, task, engine):
                    return never_ran
        start_thread("stop-watch", _stop_when_told, task, path, engine, ended)
    try:
        with captured_prints(echo=True):
            outcome = _outcome_alone(task, run, args, kwargs)
    finally:
        ended.set()
    return tuple(RemoteResult(tuple(outcome), task.said, task.cancelled.was_seen))


REMOTE_POLL_SECONDS = 0.25  # how late a task in another process sees that it should stop


def _must_stop(db: SmithersDb, task: CurrentTask, engine: str) -> bool:
    """Return whether the row of an attempt says that it should stop, or its engine has died."""
    rows = db.list_attempts_of(task.run_id, (task.node_id, task.iteration))
    row = next((row for row in rows if row.attempt == task.attempt), None)
    is_over = row is None or row.state != "in-progress" or "stop" in row.meta
    return is_over or not process_is_alive(engine)


def _stop_when_told(task: CurrentTask, path: str, engine: str, ended: threading.Event) -> None:
    """Stop a task in another process when it must; look until it has ended."""
    if ended.wait(REMOTE_POLL_SECONDS):
        return
    with contextlib.suppress(SmithersError), SmithersDb(path, create=False) as db:
        while not ended.is_set():
            with contextlib.suppress(Unavailable):  # locked: look again
                if _must_stop(db, task, engine):
                    task.stop()
                    return
            ended.wait(REMOTE_POLL_SECONDS)


def _outcome_alone(
    task: CurrentTask, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Outcome:
    """Call a task in a context of its own: a worker's thread has had others before."""
    call = functools.partial(call_function, task, run, args, kwargs)
    return contextvars.Context().run(outcome_of, call, task)


@functools.lru_cache(maxsize=1)
def _leave_with(engine: str) -> None:
    """Have a worker of a process pool end with the process that has started it.

    Left alone, it would finish an old attempt beside the next engine's new one.
    """
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid == process_of(engine)[1]:
        start_thread("parent-watch", _end_after, engine)  # else it has a life of its own


def _end_after(engine: str) -> None:
    while process_is_alive(engine):
        time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def _end_forked_worker_after(engine: str) -> None:
    """Watch the parent of a forked child, if a pool made it: it may never get a call."""
    time.sleep(ORPHAN_SECONDS)  # until multiprocessing has said whose it is
    module = sys.modules.get("multiprocessing.process")
    if module is not None and module.parent_process() is not None:
        _end_after(engine)


ORPHAN_SECONDS = 0.1  # how late a pool's worker notices that its engine has gone


def leave(code: int) -> None:
    """End the process now, with what it has said so far."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def outcome_of(call: Callable[[], Any], task: CurrentTask) -> Outcome:
    """Call a task and return what came of it.

    Whatever it raises is its failure, with the traceback in the log.
    """
    pid = os.getpid()
    try:
        outcome = Outcome(encode_output(call()))
    except BaseException as error:
        # The outermost call of user code: SystemExit and CancelledError are failures too.
        traceback = None if isinstance(error, TaskFailed) else traceback_of(error)
        if traceback is not None and not task.cancelled.is_up:
            logger.warning("task %s failed\n%s", task.node_id, traceback)
        outcome = Outcome(None, describe_error(error), traceback)
    if os.getpid() != pid:  # a child that the task has forked has come back to here
        # Without a flush: a thread that the child does not have may hold a stream's lock for ever.
        os._exit(0 if outcome.error is None else 1)
    return outcome


def traceback_of(error: BaseException) -> str:
    """Return the traceback from the user's first line on, at most its last 8 KiB."""
    import traceback

    entries = found = error.__traceback__
    while found is not None:  # of a coroutine, asyncio's frames come between ours and the user's
        code = found.tb_frame.f_code
        found = found.tb_next
        if code.co_filename == __file__ and code.co_name in CALLERS_OF_USER_CODE:
            entries = found
    try:
        text = "".join(
            traceback.format_exception(type(error), error, entries or error.__traceback__)
        )
    except Exception:  # user code: an error that cannot even say what it is
        text = f"{type(error).__name__}: (no message)"
    return printable(text[-MAX_TRACEBACK_CHARS:].rstrip())


CALLERS_OF_USER_CODE = ("call_function", "supervise", "render", "run_command")
MAX_TRACEBACK_CHARS = 8 << 10


class TaskThreads:
    """Daemon threads that run one call each at a time; a new one starts only when none is idle.

    Every call has a context of its own, and a thread that a call has visibly changed is not used
    again. `submit` and `close` are the engine's thread's.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()  # guards _idle and _started
        self._idle = 0
        self._started = 0

    def submit(self, call: Callable[..., None], *args: Any) -> None:
        """Have a call made. Raises RuntimeError when the system has no thread left."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                start_thread(f"task-{self._started + 1}", self._work)
                self._started += 1
        self._calls.put((call, args))

    def _work(self) -> None:
        fresh = self._traits()
        while True:
            item = self._calls.get()
            if item is None:
                return
            call, args = item
            contextvars.Context().run(call, *args)
            with self._lock:
                if self._traits() != fresh:
                    self._started -= 1
                    return
                self._idle += 1

    @staticmethod
    def _traits() -> tuple[Any, ...]:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ()) if os.name != "nt" else None
        return mask, sys.gettrace(), sys.getprofile(), threading.current_thread().name

    def close(self) -> None:
        """Let every thread leave after its call."""
        with self._lock:
            started = self._started
        for _ in range(started):
            self._calls.put(None)


# ---------------------------------------------------------------------------
# Control: ownership, decisions and cancel, from any process with the file
# ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _host() -> str:
    """Return this machine, its boot and its process-id namespace: where to look a process up."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # no /proc: then the name has to do
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            parts.append(file.read().strip()[:8])
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _stat_of(pid: int) -> tuple[str, int, str] | None:
    """Return state, process group and start time of a process, None when there is none.

    Source: proc(5), /proc/[pid]/stat.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[2]), fields[19].decode()


def _started(pid: int) -> str:
    stat = _stat_of(pid)
    return "" if stat is None else stat[2]


# The engines that live in this process, by owner id; add and discard are atomic.
_engines_here: set[str] = set()


def new_owner_id() -> str:
    return owner_id_of(os.getpid())


def owner_id_of(pid: int) -> str:
    return f"{_host()}|{pid}|{_started(pid)}|{secrets.token_hex(8)}"


def process_of(owner: str) -> tuple[str, int, str]:
    """Return host, process id (0 when it is none of ours) and start time of an owner."""
    host, _, rest = owner.rpartition("|")[0].rpartition("|")[0].rpartition("|")
    return host, int(rest) if rest.isdecimal() else 0, owner.split("|")[-2:][0]


def process_is_alive(owner: str) -> bool:
    """Return whether the process of an owner on this host lives, as the kernel says."""
    _, pid, started = process_of(owner)
    if started:
        stat = _stat_of(pid)
        return stat is not None and stat[0] not in "ZX" and stat[2] == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


Life = Literal["alive", "dead", "unseen"]


def owner_life(run: Run) -> Life:
    """Return whether the engine of a run lives; `unseen` when only its heartbeat can tell."""
    owner = run.runtime_owner_id
    if owner is None:
        # Another program may keep no owner; ours leaves no heartbeat without one.
        return "unseen" if run.heartbeat_at_ms is not None and run.status == "running" else "dead"
    host, pid, _ = process_of(owner)
    if host != _host() or pid == 0 or os.name == "nt":
        return "unseen"
    if pid == os.getpid():
        return "alive" if owner in _engines_here else "dead"
    return "alive" if process_is_alive(owner) else "dead"


def watch_owner(db: SmithersDb, run_id: str, seconds: float = HEARTBEAT_STALE_SECONDS) -> Life:
    """Return whether the engine of a run lives, after watching its heartbeat if that must tell.

    Only this observer's own clock counts: an owner whose heartbeat does not move for so long is
    dead, whatever time it bears. A look counts when a heart could have beaten before it: not while
    somebody holds the write lock, nor for the time that this process itself has stood still.
    Raises Unavailable when the lock is never free.
    """
    first = db.get_run(run_id)
    looks = 0
    patience = LOCK_PATIENCE_SECONDS / WATCH_SECONDS
    pause = threading.Event()
    while first is not None:
        life = owner_life(first)
        if life != "unseen":
            return life
        if looks * WATCH_SECONDS >= seconds:
            return "dead"
        pause.wait(WATCH_SECONDS)
        if db.is_locked():
            patience -= 1
            if patience <= 0:
                raise Unavailable("the database is locked by another process")
        else:
            looks += 1
        run = db.get_run(run_id)
        if run is not None and run.is_terminal:
            return "dead"
        if run is None or run.heartbeat_at_ms != first.heartbeat_at_ms:
            return "alive"
        first = run
    return "dead"


def end_leftovers(run: Run, attempts: Iterable[Attempt]) -> None:
    """End what is left of the commands of attempts that were in progress when their engine died.

    They are found by the process group in the attempt's row and, on Linux, by the environment that
    every command has got: a command that had just been started is not in its row yet.
    Source: proc(5).
    """
    owner = run.runtime_owner_id or ""
    if process_of(owner)[0] != _host():
        return  # another machine, or another boot of this one
    wanted = [attempt for attempt in attempts if attempt.state == "in-progress"]
    groups: set[int] = set()  # that are known to be theirs
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + LEFTOVER_SECONDS
        told: set[int] = set()
        while True:
            left = _leftovers(owner, wanted, groups) if wanted else set()
            if not left:
                return
            for pid in left - told:
                logger.warning("ending process %d, left by the last engine of %s", pid, run.run_id)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            told |= left
            if time.monotonic() >= deadline:
                break
            threading.Event().wait(WATCH_SECONDS)


LEFTOVER_SECONDS = 2.0


def bury_orphans() -> None:
    """As the first process of a container, bury what commands have left: nobody else does.

    A child of our own is in our session or leads one; what is in another's is nobody's to wait for.
    """
    if os.getpid() != 1:
        return
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        # It may have gone, or be a child of somebody else.
        with contextlib.suppress(OSError):
            if os.getsid(pid) not in (os.getsid(0), pid):
                os.waitpid(pid, os.WNOHANG)


def _leftovers(owner: str, attempts: Iterable[Attempt], groups: set[int]) -> set[int]:
    """Return the processes that still live of these attempts' commands; add their groups.

    A group is theirs when its leader is the recorded one, or one in it bears the engine's mark.
    """
    recorded = {
        group: started for group, started in (a.meta.get("group", (0, "")) for a in attempts)
    }
    if not os.path.isdir("/proc/self"):
        alive = set()
        for group in recorded:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, 0)
                alive.add(-group)
        return alive - {0}
    group_of = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        stat = _stat_of(int(name))
        if stat is None or stat[0] in "ZX" or int(name) == os.getpid():
            continue
        group_of[int(name)] = stat[1]
        if recorded.get(int(name)) == stat[2] or _bears_mark(name, owner):
            groups.add(stat[1])
    return {pid for pid, group in group_of.items() if group in groups}


def _bears_mark(name: str, owner: str) -> bool:
    try:
        with open(f"/proc/{name}/environ", "rb") as file:
            return f"SMITHERS_ENGINE={owner}".encode() in file.read().split(b"\0")
    except OSError:
        return False


def check_said(name: str, text: str | None) -> None:
    """Raise InvalidRequest for words, or for a name, that are not kept."""
    limit = MAX_NAME_CHARS if name == "decidedBy" else MAX_NOTE_CHARS
    if text is not None and (len(text) > limit or printable(text) != text):
        raise InvalidRequest(f"{name} must be valid Unicode of at most {limit} characters")


def decide(
    db: SmithersDb, run_id: str, node_id: str, decision: Decision, who: Identity | None = None
) -> None:
    """Approve or deny a gate; the same decision again changes nothing.

    Raises Forbidden when `who` is not one of the gate's approvers, RunNotFound, NodeNotFound,
    InvalidRequest when it is not said which of several gates is meant, GateChanged when it is not
    the one that was seen, RunNotActive when the run has ended, or ApprovalNotPending when the node
    does not wait or was decided otherwise.
    """
    check_said("note", decision.note)
    check_said("decidedBy", decision.decided_by)
    with db.transaction(run_id, HTTP_LOCK_PATIENCE_SECONDS) as tx:
        run = tx.existing_run(run_id)
        gate = _find_gate(tx, node_id, decision)
        if (
            decision.requested_at_ms is not None
            and decision.requested_at_ms != gate.requested_at_ms
        ):
            raise GateChanged(
                f"node {node_id!r} was asked again at {gate.requested_at_ms},"
                f" after what was decided about ({decision.requested_at_ms})"
            )
        if gate.is_pause:
            raise ApprovalNotPending(f"node {node_id!r} is a pause: it ends by itself")
        _check_approver(gate, who)
        if gate.status == decision.verdict:
            return
        if gate.status != "requested":
            by = f" by {gate.decided_by}" if gate.decided_by else ""
            raise ApprovalNotPending(
                f"node {node_id!r} does not wait for a decision: it was {gate.status}{by}"
            )
        if run.is_terminal:
            raise RunNotActive(f"run {run_id} is {run.status} already")
        record_decision(db.metrics, tx, gate, decision)


def _check_approver(gate: Gate, who: Identity | None) -> None:
    approvers = gate.request.get("approvers")
    if approvers and who is not None and not {who.name, who.role} & set(approvers):
        name = who.name or "nobody in particular"
        raise Forbidden(f"this gate is decided by {', '.join(approvers)}, not by {name}")


def _find_gate(tx: Tx, node_id: str, decision: Decision) -> Gate:
    """Return the gate that a decision is about.

    Without an iteration a node must have been asked in one only: a decision that is repeated, or
    comes late, would otherwise be taken for the next one's.
    """
    gates = tx.list_gates_of(tx.run_id, node_id)
    if decision.iteration is not None:
        gates = [gate for gate in gates if gate.iteration == decision.iteration]
    if len(gates) == 1:
        return gates[0]
    if gates:
        asked = ", ".join(str(gate.iteration) for gate in reversed(gates[:20]))
        raise InvalidRequest(
            f"node {node_id!r} was asked in several iterations: say which (iteration: {asked})"
        )
    iterations = tx.list_iterations(tx.run_id, node_id)
    if decision.iteration is not None and decision.iteration not in iterations:
        raise NodeNotFound(f"there is no node {node_id!r} in iteration {decision.iteration}")
    if not iterations:
        raise NodeNotFound(f"there is no node {node_id!r}")
    raise ApprovalNotPending(f"node {node_id!r} does not wait for a decision")


def record_decision(metrics: Metrics, tx: Tx, gate: Gate, decision: Decision) -> None:
    """Store a decision on an open gate, with its event."""
    if not tx.decide_gate(gate, decision):
        raise ApprovalNotPending(f"node {gate.node_id!r} does not wait for a decision")
    granted = decision.verdict == "approved"
    said = {
        "note": decision.note,
        "decidedBy": decision.decided_by,
        "bySource": decision.by_source if decision.decided_by else None,
    }
    tx.append_event(
        "ApprovalGranted" if granted else "ApprovalDenied",
        gate.key,
        **{key: value for key, value in said.items() if value is not None},
    )
    metrics.inc("smithers_approvals_granted" if granted else "smithers_approvals_denied")
    waited = max(0, tx.now_ms - (gate.requested_at_ms or tx.now_ms))
    metrics.observe("smithers_approval_wait_duration_ms", waited)


def check_can_retry(reads: Reads, run: Run, retry: bool | Iterable[str]) -> None:
    """Raise RunActive for a run that has not ended, NodeNotFound for a node that it has not."""
    if not run.is_terminal:
        raise RunActive(f"run {run.run_id} is {run.status}: what has ended can be retried")
    if retry is True and run.status == "finished":
        raise InvalidRequest(f"run {run.run_id} has finished: say which nodes are to be retried")
    for node_id in () if isinstance(retry, bool) else retry:
        if reads.find_newest_node(run.run_id, node_id) is None:
            raise NodeNotFound(f"there is no node {log_safe(node_id)[:200]!r} in this run")


def request_retry(db: SmithersDb, run_id: str, retry: bool | list[str]) -> None:
    """Have a server give nodes of a run that has ended a fresh try, now or when there is one."""
    with db.transaction(run_id, HTTP_LOCK_PATIENCE_SECONDS) as tx:
        run = tx.existing_run(run_id)
        check_can_retry(tx, run, retry)
        tx.update_config(retry=retry)
        tx.wake()


def lock_path(folder: str) -> str:
    """Return the file that a server keeps locked while it drives the runs with logs in a folder."""
    return os.path.join(folder, "server.lock")


def try_lock(file: int) -> bool:
    """Lock a file for as long as this process has it open; False when somebody else does."""
    try:
        import fcntl
    except ImportError:  # Windows: nobody is kept out
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def is_attended(run: Run) -> bool:
    """Return whether a living server goes on with a run, also while no process drives it."""
    log_file = run.config.get("logFile") if run.config.get("server") else None
    try:
        file = os.open(lock_path(os.path.dirname(log_file or "")), os.O_RDWR)
    except OSError:
        return False
    try:
        return not try_lock(file)
    finally:
        os.close(file)


def cancel_run(
    db: SmithersDb,
    run_id: str,
    by: str | None = None,
    reason: str | None = None,
    by_source: str | None = None,
) -> None:
    """Ask the run's engine to cancel it; without a living engine cancel it here.

    Returns when the request is on disk: a run whose engine dies before it has obeyed is cancelled
    when it is resumed. Raises RunNotFound, or RunNotActive when the run has ended.
    """
    check_said("reason", reason)
    check_said("decidedBy", by)
    with db.transaction(run_id, HTTP_LOCK_PATIENCE_SECONDS) as tx:
        run = tx.existing_run(run_id)
        if run.is_terminal:
            raise RunNotActive(f"run {run_id} is {run.status} already")
        tx.request_cancel(by, reason, by_source)
        life = owner_life(run)
        if life == "dead":
            _cancel_here(db, tx)
    if life == "unseen" and watch_owner(db, run_id) == "dead":
        with db.transaction(run_id, HTTP_LOCK_PATIENCE_SECONDS) as tx:
            now = tx.get_run(run_id)
            if now is not None and not now.is_terminal and _same_owner(now, run):
                _cancel_here(db, tx)


def _same_owner(run: Run, other: Run) -> bool:
    return run.runtime_owner_id == other.runtime_owner_id


def _cancel_here(db: SmithersDb, tx: Tx) -> None:
    run_close(tx, "cancelled", None)
    db.metrics.inc("smithers_runs_cancelled_total")


CLOSING_REASONS = {
    "finished": "no longer in the tree",
    "failed": "the run failed",
    "cancelled": "the run was cancelled",
}


def run_close(tx: Tx, status: str, error: Mapping[str, Any] | None) -> None:
    """End the run: what is open is cancelled, the row gets its status, the last event says so."""
    for node in tx.list_open_nodes(tx.run_id):
        node_close(tx, node, CLOSING_REASONS[status])
    tx.close_gates()
    tx.end_run(status, None if error is None else to_json(error))
    tx.append_event("RunStatusChanged", status=status)
    if status == "failed":
        tx.append_event("RunFailed", error=error)
    elif status == "finished":
        tx.append_event("RunFinished")
    else:
        tx.append_event("RunCancelled", **tx.existing_run(tx.run_id).config.get("cancel", {}))


def run_close_after(tx: Tx, status: str) -> None:
    """Close what is open of a run whose end another program has written."""
    for node in tx.list_open_nodes(tx.run_id):
        node_close(tx, node, f"the run was {status} by another program")
    tx.close_gates()
    told = {event.type for event in tx.list_events(tx.run_id, tx.next_seq - 3)}
    if status == "cancelled" and "RunCancelled" not in told:
        tx.append_event("RunCancelled")
    tx.release_run()


def node_close(tx: Tx, node: Node, reason: str) -> None:
    """Cancel one open node: its running attempt, or its gate."""
    fields: dict[str, Any] = {}
    if node.state == "in-progress" and node.last_attempt is not None:
        tx.end_attempt(node.key, node.last_attempt, "cancelled")
        fields["attempt"] = node.last_attempt
    else:
        tx.close_gate(node.key)
    tx.update_node(node.key, "cancelled", node.last_attempt)
    tx.append_event("NodeCancelled", node.key, **fields, reason=reason)


# ---------------------------------------------------------------------------
# Attempts: what is in flight
# ---------------------------------------------------------------------------

# Why an attempt was stopped that did nothing wrong.
SUSPENDED = "the engine was stopped"
INTERRUPTED = "the run was interrupted"
POOL_BROKE = "its pool of workers broke"
BROKEN_POOL_CODE = "WORKER_CRASHED"


class Running(CurrentTask):
    """An attempt in flight. `stopped_for` says why it was told to stop."""

    def __init__(
        self,
        attempts: Attempts,
        slot: LeafSlot,
        attempt: int,
        sources: list[tuple[str, str, int | None]],
    ) -> None:
        super().__init__(attempts.run_id, slot.key[0], slot.key[1], attempt)
        assert isinstance(slot.leaf, Task)
        self.key = slot.key
        self.task = slot.leaf  # as it was when the attempt began
        self.sources = sources
        self.started_at = time.monotonic()
        self.stopped_for: str | None = None
        self.token = ""  # by which an executor in this process finds it
        self.future: Future[Any] | None = None
        self.engine = attempts.owner
        self._attempts = attempts

    def _send(self, text: str, stream: str) -> None:
        self._attempts.accept_line(self, text, stream)

    def note_group(self, group: int) -> None:
        self._attempts.note_group(self, group)


class Attempts:
    """Starts attempts, hears them, stops them, and gives up those that do not stop.

    The engine's thread calls everything but `accept_line` and `note_group`, which the tasks call,
    and what begins with `_run` and `_take`, which their threads do. They all speak to the engine
    through `post`.
    """

    MAX_WAITING_LINES = 2000  # lines that tasks may be ahead of the log before they are held back

    def __init__(
        self,
        db: SmithersDb,
        run_id: str,
        owner: str,
        executor: Executor | Callable[[], Executor] | None,
        post: Callable[..., None],
    ) -> None:
        self.run_id = run_id
        self.in_flight: dict[Key, Running] = {}
        self.left_call_behind = False  # an executor still works on something that was given up
        self._db = db
        self.owner = owner
        self._pid = os.getpid()
        self._engine_thread = threading.get_ident()
        self._post = post
        self._make_executor = executor if executor and not hasattr(executor, "submit") else None
        self._executor: Any = None if self._make_executor else executor
        self._threads = TaskThreads()
        # Guards _waiting_lines. Held for arithmetic only.
        self._line_room = threading.Condition()
        self._waiting_lines = 0

    def begin(
        self, slot: LeafSlot, attempt: int, sources: list[tuple[str, str, int | None]]
    ) -> Running:
        """Note an attempt, in the transaction of its start; `launch` follows the commit."""
        running = self.in_flight[slot.key] = Running(self, slot, attempt, sources)
        return running

    def launch(self, running: Running) -> None:
        """Hand an attempt, whose start is committed, to a thread or to the executor."""
        self._engine_thread = threading.get_ident()
        if running.stopped_for is not None:
            self._post("done", running, Outcome(None))
        elif callable(running.task.run) and (self._make_executor or self._executor):
            self._submit(running)
        else:
            try:
                self._threads.submit(self._run, running)
            except RuntimeError as error:
                failure = TaskFailed(f"no thread could be started: {error}", "NO_THREAD")
                self._post("done", running, Outcome(None, describe_error(failure)))

    def _submit(self, running: Running) -> None:
        running.token = secrets.token_hex(8)
        _attempts_here[running.token] = running
        task = running.task
        try:
            if self._executor is None and self._make_executor is not None:
                self._executor = self._make_executor()
            running.future = self._executor.submit(
                call_in_executor, running.token, self.owner, self._db.path, time.time(), task.run,
                task.args, self._arguments_of(running), running.run_id, running.node_id,
                running.iteration, running.attempt,
            )  # fmt: skip
        except Exception as error:  # foreign code: a broken or closed pool refuses in its own ways
            self._take_failure(running, error)
            return
        running.future.add_done_callback(functools.partial(self._take_future, running))

    def _run(self, running: Running) -> None:
        """Run one attempt in a task thread and post what came of it, whatever happens."""
        lost = TaskFailed("the task ended and nothing of it could be told", "TASK_LOST")
        outcome = Outcome(None, {"name": "TaskFailed", "message": str(lost), "code": lost.code})
        try:
            outcome = outcome_of(functools.partial(self._call, running), running)
        finally:
            self._post("done", running, outcome)

    def _call(self, running: Running) -> Any:
        task = running.task
        if not callable(task.run):
            return run_command(running, task.run)
        return call_function(running, task.run, task.args, self._arguments_of(running))

    def _arguments_of(self, running: Running) -> dict[str, Any]:
        """Return the keyword arguments: those given, and the outputs of what the task needs."""
        arguments = dict(running.task.kwargs)
        for parameter, node_id, iteration in running.sources:
            found = self._db.find_output(self.run_id, node_id, iteration)
            arguments[parameter] = None if found is None else json.loads(found)
        return arguments

    def _take_future(self, running: Running, future: Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or error is not None:
            self._take_failure(running, error)
            return
        result = RemoteResult(*future.result())
        for text, stream in result.lines:
            self.accept_line(running, text, stream)
        running.cancelled.was_seen |= result.has_seen_flag
        self._post("done", running, Outcome(*result.outcome))

    def _take_failure(self, running: Running, error: BaseException | None) -> None:
        """Post that an executor has not run an attempt."""
        from concurrent.futures import BrokenExecutor

        reason = "the call was cancelled" if error is None else f"{type(error).__name__}: {error}"
        # Dask cancels what it has when its scheduler has gone: the pool is dead.
        is_broken = error is None or isinstance(error, BrokenExecutor)
        code = BROKEN_POOL_CODE if is_broken else "EXECUTOR_FAILED"
        failure = TaskFailed(f"the executor could not run the task: {reason}", code)
        self._post("done", running, Outcome(None, describe_error(failure)))

    def renew_pool(self) -> bool:
        """Have a pool that broke made anew at its next use; False when it was given ready-made."""
        if self._make_executor is not None and self._executor is not None:
            with contextlib.suppress(Exception):  # foreign code, and broken
                self._executor.shutdown(wait=False)
            self._executor = None
        return self._make_executor is not None

    # Lines

    def accept_line(self, running: Running, text: str, stream: str) -> None:
        """Take a line from a task; holds the task back while too many wait to be written."""
        if os.getpid() != self._pid:
            return  # a forked child: nobody here would write it
        # An executor that calls at once does so in the engine's thread: it cannot wait for itself.
        is_engine = threading.get_ident() == self._engine_thread
        with self._line_room:
            while self._waiting_lines >= self.MAX_WAITING_LINES and not is_engine:
                if running.cancelled.is_up and self.in_flight.get(running.key) is not running:
                    return
                self._line_room.wait(0.5)
            self._waiting_lines += 1
        self._post("line", running, text, stream)

    def line_taken(self) -> None:
        with self._line_room:
            self._waiting_lines -= 1
            if self._waiting_lines == self.MAX_WAITING_LINES - 1:
                self._line_room.notify_all()

    def note_group(self, running: Running, group: int) -> None:
        with self._db.transaction(self.run_id, math.inf, lambda: running.cancelled.is_up) as tx:
            tx.note_attempt(running.key, running.attempt, group=[group, _started(group)])

    # Stopping

    def is_live(self, running: Running) -> bool:
        return self.in_flight.get(running.key) is running

    def stop(self, running: Running, reason: str) -> bool:
        """Tell an attempt to stop; False when it was told before."""
        if running.stopped_for is not None:
            return False
        running.stopped_for = reason
        running.stop()
        if running.future is not None:
            from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

            # Others (Dask's, Ray's) say that a call is cancelled, and it runs on.
            if isinstance(self._executor, (ProcessPoolExecutor, ThreadPoolExecutor)):
                running.future.cancel()
        return True

    def release(self, running: Running) -> None:
        """Take an attempt out of flight: it has ended, or it is given up and its result dropped."""
        del self.in_flight[running.key]
        _attempts_here.pop(running.token, None)

    def give_up(self, running: Running) -> None:
        logger.warning("task %s ignores its cancelled flag; it is abandoned", running.node_id)
        self.left_call_behind |= running.future is not None

    def close(self) -> None:
        """Stop whatever still runs; its results go nowhere."""
        for running in list(self.in_flight.values()):
            running.stop()
            self.left_call_behind |= running.future is not None
            self.release(running)
        with self._line_room:
            self._waiting_lines = 0
            self._line_room.notify_all()
        self._threads.close()
        if self._make_executor is not None and self._executor is not None:
            closing = start_thread("pool-close", self._executor.shutdown)
            closing.join(0 if self.left_call_behind else HURRY_SECONDS)


class Deadlines:
    """When something is due, by kind and key, on one clock: set again, cancelled, listed."""

    def __init__(self) -> None:
        self.at: dict[tuple[str, Any], float] = {}
        self._heap: list[tuple[float, int, tuple[str, Any]]] = []
        self._tie = itertools.count()

    def set(self, kind: str, key: Any, at: float) -> None:
        self.at[kind, key] = at
        heapq.heappush(self._heap, (at, next(self._tie), (kind, key)))

    def cancel(self, kind: str, key: Any) -> None:
        self.at.pop((kind, key), None)
        if len(self._heap) > 2 * len(self.at) + 16:  # behind a later one they would pile up
            self._heap = [entry for entry in self._heap if self.at.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)

    def next(self) -> float:
        """Return the earliest, infinity when there is none."""
        while self._heap and self.at.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def take(self, now: float) -> Iterator[tuple[str, Any]]:
        """Yield what is due, and forget it."""
        while self.next() <= now:
            _, _, due = heapq.heappop(self._heap)
            del self.at[due]
            yield due


# ---------------------------------------------------------------------------
# Steps: what is written when something happens in a run
# ---------------------------------------------------------------------------


def _denial_error(gate: Gate) -> dict[str, str]:
    by = f" by {gate.decided_by}" if gate.decided_by else ""
    why = f": {gate.note}" if gate.note else ""
    return describe_error(TaskFailed(f"denied{by}{why}", "APPROVAL_DENIED"))


def _timeout_error(task: Task) -> dict[str, str]:
    assert task.timeout is not None
    return describe_error(TaskFailed(f"timed out after {task.timeout:g} s", "TASK_TIMEOUT"))


class Steps:
    """Writes what follows from each thing that happens in a run: rows, events, deadlines, metrics.

    `Progress` says what follows; a method for each kind of its effects writes it down, in the
    transaction that it is given. Used by the engine's thread.
    """

    def __init__(
        self,
        run_id: str,
        metrics: Metrics,
        progress: Progress,
        attempts: Attempts,
        max_concurrency: int,
    ) -> None:
        self.frame: tuple[str, str] | None = None  # the last one's tree and mounted ids
        self.xml = ("", "")  # the newest tree and its hash
        self.starting: list[Running] = []  # attempts to be launched after the commit
        # What must count while nothing runs is due by the wall clock; the rest is not.
        self.wall = Deadlines()  # retry and gate, in ms since the epoch
        self.grace = Deadlines()  # timeout and give-up, on the monotonic clock
        self._run_id = run_id
        self._metrics = metrics
        self._progress = progress
        self._attempts = attempts
        self._max_concurrency = max_concurrency
        self._counted: dict[str, float] = {}  # what this run has added to each gauge

    def fire(self, tx: Tx) -> None:
        """Do what is due."""
        for kind, key in self.wall.take(tx.now_ms):
            if kind == "retry":
                self._progress.retry_is_due(key, tx.now_ms)
            elif not self._progress.is_halting:
                self._gate_expire(tx, key)
        for kind, running in self.grace.take(time.monotonic()):
            if not self._attempts.is_live(running):
                continue
            if kind == "timeout":
                self._stop(tx, "timeout", running)
            else:
                self._attempts.give_up(running)
                self._attempt_book(tx, running, Outcome(None), is_given_up=True)

    def show_gauges(self, is_over: bool) -> None:
        """Add to each gauge what has changed of this run's share."""
        running = len(self._attempts.in_flight)
        shown = {
            "smithers_nodes_active": running,
            "smithers_scheduler_queue_depth": 0 if is_over else self._progress.queued,
            "smithers_scheduler_concurrency_utilization": running / self._max_concurrency,
        }
        for name, value in shown.items():
            if value != self._counted.get(name, 0):
                self._metrics.inc(name, value - self._counted.get(name, 0))
                self._counted[name] = value

    def carry_out(self, tx: Tx, effect: Effect) -> None:
        getattr(self, EFFECTS[effect.kind])(tx, effect.key, effect.detail)

    def _leaf(self, key: Key) -> Leaf:
        assert self._progress.plan is not None
        return self._progress.plan.slots[key].leaf

    # Nodes and loops

    def _node_move(self, tx: Tx, key: Key, event: str, **fields: Any) -> None:
        """Write where a node stands, with its event."""
        record = self._progress.records[key]
        tx.update_node(key, record.state, record.last_attempt)
        tx.append_event(event, key, **fields)

    def _node_insert(self, tx: Tx, key: Key, _: Any) -> None:
        leaf = self._leaf(key)
        tx.insert_node(key, leaf.label, leaf.kind)
        tx.append_event("NodePending", key)

    def _node_recall(self, tx: Tx, key: Key, _: Any) -> None:
        node = tx.get_node(self._run_id, key)
        if node is not None:
            attempts = tx.list_attempts_of(self._run_id, key)
            record = record_of(node, attempts, tx.get_gate(self._run_id, key))
            self._progress.recall(key, record)

    def _node_repeat(self, tx: Tx, key: Key, _: Any) -> None:
        self._node_move(tx, key, "NodePending")

    def _node_renew(self, tx: Tx, key: Key, _: Any) -> None:
        tx.forget_past(key)
        tx.update_kind(key, self._leaf(key).kind)

    def _node_skip(self, tx: Tx, key: Key, with_decision: Any) -> None:
        if with_decision:
            gate = tx.get_gate(self._run_id, key)
            assert gate is not None
            tx.put_output(key, to_json(gate.to_output()))
        self._node_move(tx, key, "NodeSkipped")

    def _node_finish(self, tx: Tx, key: Key, output_json: str, attempt: int) -> None:
        tx.put_output(key, output_json)
        self._node_move(tx, key, "NodeFinished", attempt=attempt)
        self._metrics.inc("smithers_nodes_finished")
        self._node_observe(tx, key)

    def _node_fail(self, tx: Tx, key: Key, error: Mapping[str, Any], attempt: int) -> None:
        self._node_move(tx, key, "NodeFailed", attempt=attempt, error=error)
        self._metrics.inc("smithers_nodes_failed")
        self._node_observe(tx, key)

    def _node_observe(self, tx: Tx, key: Key) -> None:
        started = self._progress.records[key].started_at_ms
        if started is not None:
            self._metrics.observe("smithers_node_duration_ms", max(0, tx.now_ms - started))

    def _node_delay(self, tx: Tx, key: Key, due_at_ms: int) -> None:
        self.wall.set("retry", key, due_at_ms)

    def _node_crash(self, tx: Tx, key: Key, _: Any) -> None:
        attempt = self._progress.records[key].last_attempt or 0
        message = f"each of its last {MAX_CRASHES} attempts ended with the process that ran it"
        error = describe_error(TaskFailed(message, "TASK_CRASHED"))
        tx.end_attempt(key, attempt, "cancelled", to_json(error))
        self._node_fail(tx, key, error, attempt)

    def _loop_put(self, tx: Tx, key: Key, is_done: bool) -> None:
        tx.put_loop(*key, is_done)

    def _frame_commit(self, tx: Tx, _: Key, __: Any) -> None:
        """Store the tree when it differs from the last frame."""
        assert self._progress.plan is not None
        keys = [slot.key for slot in self._progress.plan.leaves()]
        mounted = to_json([f"{node_id}::{iteration}" for node_id, iteration in keys])
        if self.frame == (self.xml[0], mounted):
            return
        self.frame = (self.xml[0], mounted)
        index = to_json(
            [{"nodeId": k[0], "ordinal": i, "iteration": k[1]} for i, k in enumerate(keys)]
        )
        frame_no = tx.insert_frame(*self.xml, mounted, index)
        tx.append_event("FrameCommitted", frameNo=frame_no, xmlHash=self.xml[1])

    # Attempts

    def _attempt_start(self, tx: Tx, key: Key, attempt: int) -> None:
        assert self._progress.plan is not None
        slot, record = self._progress.plan.slots[key], self._progress.records[key]
        waited = max(0, tx.now_ms - record.ready_at_ms)
        self._metrics.observe("smithers_scheduler_wait_duration_ms", waited)
        self._metrics.inc("smithers_nodes_started")
        record.started_at_ms = record.started_at_ms or tx.now_ms
        tx.insert_attempt(key, attempt)
        self._node_move(tx, key, "NodeStarted", attempt=attempt)
        assert isinstance(slot.leaf, Task)
        if isinstance(slot.leaf.run, dict):
            self._progress.attempt_ended(key, "finished", tx.now_ms)
            tx.end_attempt(key, attempt, "finished")
            self._metrics.observe("smithers_attempt_duration_ms", 0.0)
            self._node_finish(tx, key, to_json(slot.leaf.run), attempt)
            return
        running = self._attempts.begin(slot, attempt, self._progress.plan.sources_of(slot))
        self.starting.append(running)
        if slot.leaf.timeout is not None:
            self.grace.set("timeout", running, running.started_at + slot.leaf.timeout)

    def line_write(self, tx: Tx, running: Running, text: str, stream: str) -> None:
        self._attempts.line_taken()
        if self._attempts.is_live(running):
            tx.append_event(
                "NodeOutput", running.key, attempt=running.attempt, text=text, stream=stream
            )

    def attempt_done(self, tx: Tx, running: Running, outcome: Outcome) -> None:
        """Book the end of an attempt; the late result of one that was given up is dropped."""
        if self._attempts.is_live(running):
            self._attempt_book(tx, running, outcome, is_given_up=False)

    def _attempt_book(self, tx: Tx, running: Running, outcome: Outcome, is_given_up: bool) -> None:
        key, attempt = running.key, running.attempt
        self._attempts.release(running)
        for kind in ("timeout", "give up"):
            self.grace.cancel(kind, running)
        self._metrics.observe(
            "smithers_attempt_duration_ms", (time.monotonic() - running.started_at) * 1000
        )
        error = outcome.error
        code = (error or {}).get("code", "")
        if running.stopped_for == "timeout":
            error = _timeout_error(running.task)
            result = "unfixable" if is_given_up else "failed"  # never two attempts at once
        elif running.stopped_for == SUSPENDED and outcome.output_json is not None:
            # It has not heard that it should stop, and is done; or it has, and gave up.
            result = "interrupted" if running.cancelled.was_seen else "finished"
        elif running.stopped_for is not None:
            result = "interrupted"
        elif code == BROKEN_POOL_CODE and self._attempts.renew_pool():
            running.stopped_for, result = POOL_BROKE, "crashed"
        elif error is not None:
            result = "unfixable" if code in UNFIXABLE else "failed"
        else:
            result = "finished"
        became = self._progress.attempt_ended(key, result, tx.now_ms)
        if outcome.traceback is not None and became in ("failed", "retrying"):
            tx.note_attempt(key, attempt, traceback=outcome.traceback)
        if became == "finished":
            assert outcome.output_json is not None
            tx.end_attempt(key, attempt, "finished")
            self._node_finish(tx, key, outcome.output_json, attempt)
        elif became == "cancelled":
            reason = running.stopped_for or "no longer in the tree"
            tx.end_attempt(key, attempt, "cancelled")
            if result == "crashed":
                tx.note_attempt(key, attempt, crashed=True)
            self._node_move(tx, key, "NodeCancelled", attempt=attempt, reason=reason)
        else:
            assert error is not None
            tx.end_attempt(key, attempt, "failed", to_json(error))
            self._metrics.inc("smithers_errors_total")
            if became == "failed":
                self._node_fail(tx, key, error, attempt)
            else:
                self._attempt_retry(tx, key, attempt, error)

    def _attempt_retry(self, tx: Tx, key: Key, attempt: int, error: Mapping[str, Any]) -> None:
        due_at_ms = self._progress.records[key].due_at_ms
        tx.note_attempt(key, attempt, dueAtMs=due_at_ms)
        tx.append_event("NodeFailed", key, attempt=attempt, error=error)
        self._node_move(tx, key, "NodeRetrying", attempt=attempt + 1, dueAtMs=due_at_ms)
        self._metrics.inc("smithers_node_retries_total")

    # Stopping

    def _attempt_stop(self, tx: Tx, key: Key, reason: str) -> None:
        self._stop(tx, reason, self._attempts.in_flight[key])

    def _stop(self, tx: Tx, reason: str, *stopped: Running) -> None:
        """Tell attempts to stop; those that do not are given up."""
        for running in [one for one in stopped if self._attempts.stop(one, reason)]:
            self.grace.set("give up", running, time.monotonic() + STOP_GRACE_SECONDS)
            if running.future is not None:  # in another process it is its row that tells it
                tx.note_attempt(running.key, running.attempt, stop=reason)

    def stop_all(self, tx: Tx, reason: str) -> None:
        if not self._progress.is_stopping:
            self._progress.is_stopping = True
            self._stop(tx, reason, *self._attempts.in_flight.values())

    def shorten_grace(self, seconds: float) -> None:
        """Give what still runs only as long as a process may take to leave."""
        for running in self._attempts.in_flight.values():
            running.kill_after = seconds / 2
            self.grace.set("give up", running, time.monotonic() + seconds)

    # Gates

    def _gate_open(self, tx: Tx, key: Key, _: Any) -> None:
        leaf = self._leaf(key)
        tx.open_gate(key, to_json(leaf.request()))
        if isinstance(leaf, Pause):
            self._pause_tell(tx, key)
        else:
            tx.append_event("ApprovalRequested", key)
            self._node_move(tx, key, "NodeWaitingApproval")
            self._metrics.inc("smithers_approvals_requested")
        self._gate_time(tx, key)

    def _pause_tell(self, tx: Tx, key: Key) -> None:
        """Say when a pause ends as a line of its node: it waits for nobody."""
        gate = tx.get_gate(self._run_id, key)
        assert gate is not None and gate.deadline_at_ms is not None
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(gate.deadline_at_ms / 1000))
        tx.append_event("NodeOutput", key, attempt=0, text=f"pauses until {at}", stream="stdout")

    def _gate_await(self, tx: Tx, key: Key, _: Any) -> None:
        """Have an open gate ask what today's tree asks, and end when that says.

        Another question is another request: a decision on what was read before is refused.
        """
        gate = tx.get_gate(self._run_id, key)
        asked = {} if gate is None else gate.request
        today = json.loads(to_json(self._leaf(key).request()))
        if any(asked.get(name) != today.get(name) for name in ("title", "summary", "metadata")):
            tx.open_gate(key, to_json(today))
            tx.append_event("ApprovalRequested", key)
        elif asked != today:
            tx.update_request(key, to_json(today))
        self._gate_time(tx, key)

    def _gate_time(self, tx: Tx, key: Key) -> None:
        gate = tx.get_gate(self._run_id, key)
        if gate is not None and gate.deadline_at_ms is not None:
            self.wall.set("gate", key, gate.deadline_at_ms)
        else:
            self.wall.cancel("gate", key)

    def _gate_close(self, tx: Tx, key: Key, reason: str) -> None:
        self.wall.cancel("gate", key)
        tx.close_gate(key)
        self._node_move(tx, key, "NodeCancelled", reason=reason)

    def _gate_pass(self, tx: Tx, key: Key, _: Any) -> None:
        gate = tx.get_gate(self._run_id, key)
        assert gate is not None
        self._node_finish(tx, key, to_json(gate.to_output()), 0)

    def _gate_deny(self, tx: Tx, key: Key, _: Any) -> None:
        gate = tx.get_gate(self._run_id, key)
        assert gate is not None
        self._node_fail(tx, key, _denial_error(gate), 0)

    def decisions_collect(self, tx: Tx, from_seq: int) -> None:
        """Take up the decisions that others have added to the log, from this event on."""
        for event in tx.list_events(self._run_id, from_seq - 1):
            if event.type in ("ApprovalGranted", "ApprovalDenied"):
                payload = event.payload
                self._gate_look(tx, (payload["nodeId"], payload["iteration"]))

    def gates_count(self, tx: Tx) -> None:
        """Once a second, look for decisions of a program that adds no event."""
        if tx.count_open_gates(self._run_id) != self._progress.open_gates:
            waiting = self._progress.records.items()
            for key in [key for key, record in waiting if record.phase == AT_GATE]:
                self._gate_look(tx, key)

    def _gate_look(self, tx: Tx, key: Key) -> None:
        gate = tx.get_gate(self._run_id, key)
        if gate is not None and gate.status in ("approved", "denied"):
            self.wall.cancel("gate", key)
            self._progress.gate_decided(key, gate.status)

    def _gate_expire(self, tx: Tx, key: Key) -> None:
        if self._progress.records[key].phase != AT_GATE:
            return
        gate, leaf = tx.get_gate(self._run_id, key), self._leaf(key)
        if not isinstance(leaf, Approval) or gate is None:
            return
        if isinstance(leaf, Pause):
            tx.decide_gate(gate, Decision("approved"))
            self._gate_look(tx, key)
            return
        if leaf.timeout is None:
            return
        if gate.status != "requested":
            self._gate_look(tx, key)
            return
        note = f"nobody decided within {leaf.timeout:g} s"
        if leaf.on_timeout == "fail":
            self._progress.gate_expired(key)
            tx.close_gate(key)
            error = describe_error(TaskFailed(note, "APPROVAL_TIMEOUT"))
            self._node_fail(tx, key, error, 0)
            return
        verdict = "approved" if leaf.on_timeout == "approve" else "denied"
        record_decision(self._metrics, tx, gate, Decision(verdict, note=note))
        self._gate_look(tx, key)


# The method for each kind of effect.
EFFECTS = {
    "insert": "_node_insert",
    "recall": "_node_recall",
    "repeat": "_node_repeat",
    "renew": "_node_renew",
    "skip": "_node_skip",
    "delay": "_node_delay",
    "crash": "_node_crash",
    "start": "_attempt_start",
    "stop": "_attempt_stop",
    "open": "_gate_open",
    "await": "_gate_await",
    "close": "_gate_close",
    "pass": "_gate_pass",
    "deny": "_gate_deny",
    "loop": "_loop_put",
    "frame": "_frame_commit",
}


# ---------------------------------------------------------------------------
# Engine: drives one run, one transaction a step
# ---------------------------------------------------------------------------


class Outputs(Mapping[str, Any]):
    """The outputs of a run, by node id: read from the file when they are asked for."""

    def __init__(self, db: SmithersDb, run_id: str) -> None:
        self._db = db
        self._run_id = run_id

    def __getitem__(self, node_id: str) -> Any:
        found = self._db.find_output(self._run_id, node_id, None)
        if found is None:
            raise KeyError(node_id)
        return json.loads(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._db.list_output_ids(self._run_id))

    def __len__(self) -> int:
        return len(self._db.list_output_ids(self._run_id))


# Which gates an engine waits at when nothing else is left to do: any, those with a deadline, none.
Patience = Literal["all", "timed", "none"]


class RunResult(NamedTuple):
    """How a run stands when its engine leaves it.

    `error` is `{"name","message","code"?}` of a failed run. `running` or `waiting-approval` is the
    status of a run that was suspended, or that waits and was not to be waited for. `outputs` holds
    the output of each node by id (in a loop, of its newest iteration), read when it is asked for.
    """

    run_id: str
    status: RunStatus
    error: dict[str, Any] | None
    outputs: Mapping[str, Any]


def recall_records(reads: Reads, run_id: str, progress: Progress) -> dict[Key, str | None]:
    """Tell a run's progress what its rows say of nodes and loops; return the nodes' labels."""
    gates = {gate.key: gate for gate in reads.list_gates(run_id)}
    attempts: dict[Key, list[Attempt]] = {}
    for attempt in reads.list_attempts(run_id, open_nodes_only=True):
        attempts.setdefault(attempt.key, []).append(attempt)
    nodes = reads.list_nodes(run_id)
    for node in nodes:
        record = record_of(node, attempts.get(node.key, ()), gates.get(node.key))
        progress.recall(node.key, record)
    progress.loops = reads.list_loops(run_id)
    return {node.key: node.label for node in nodes}


def record_of(node: Node, attempts: Iterable[Attempt], gate: Gate | None) -> Record:
    """Return what the rows of a node say."""
    record = Record(node.state, node.last_attempt)
    record.gate = None if gate is None else gate.status
    record.kind = node.kind
    if node.kind is None and (node.last_attempt is not None or node.state == "finished"):
        record.kind = "approval" if node.last_attempt is None else "task"  # as far as rows can tell
    asked = "pending" if gate is not None and gate.is_pause else "waiting-approval"
    if record.gate == "requested" and record.state == asked:
        record.phase = AT_GATE
    for attempt in attempts:
        meta = attempt.meta
        if node.kind is None and node.state == "finished" and gate is not None:
            record.kind = "task" if attempt.state == "finished" else "approval"
        if not meta.get("forgiven"):
            record.failures += attempt.state == "failed"
            record.crashes = record.crashes + 1 if meta.get("crashed") else 0
            record.due_at_ms = meta.get("dueAtMs", 0)
    return record


def choose_to_retry(
    seen: Run, records: Mapping[Key, Record], plan: Plan | None, retry: bool | Iterable[str]
) -> tuple[set[Key], dict[LoopSlot, bool]]:
    """Return the failed nodes; or the named ones and, of the tree, what comes after them.

    Also the loops that are not over then, with True, or have not begun, with False. Raises
    InvalidRequest for a node that is not there.
    """
    if isinstance(retry, bool):
        failed = {key for key, record in records.items() if retry and record.state == "failed"}
        if seen.status != "failed" and plan is not None:  # a failure that may be is left alone
            slots = [plan.slots[key] for key in failed if key in plan.slots]
            failed = {slot.key for slot in slots if not slot.leaf.continue_on_fail}
        return failed, {}
    if plan is None:
        raise InvalidRequest("nodes can be retried only in a tree that renders")
    chosen: set[Key] = set()
    loops: dict[LoopSlot, bool] = {}
    for id in retry:
        slot = plan.by_id.get(id.partition("@@")[0])
        if slot is None or slot.key not in records:
            raise InvalidRequest(f"there is no node {id!r} to retry in the tree of this run")
        ids, loops_after = plan.followers(slot)
        chosen.add(slot.key)
        chosen.update(key for key in records if key[0].partition("@@")[0] in ids)
        for loop in loops_after:
            loops[loop] = loops.get(loop, False) or loop in slot.loops
    return chosen, loops


def reset_nodes(tx: Tx, records: Mapping[Key, Record], keys: set[Key]) -> None:
    """Give nodes a fresh try: their earlier failures, decisions and outputs do not count."""
    for key in sorted(keys):
        tx.forget_past(key)
        tx.update_node(key, "pending", records[key].last_attempt)
        tx.append_event("NodePending", key)


def reset_loops(tx: Tx, loops: Mapping[LoopSlot, bool]) -> None:
    """Have loops around a node go on, and loops after it begin anew."""
    for loop, is_around in loops.items():
        if is_around:
            tx.put_loop(loop.key, loop.iteration, False)
        else:
            tx.delete_loop(loop.key)


def warn_of_changed_file(seen: Run, workflow: Any) -> None:
    digest = _source_of(workflow)[1]
    if digest is not None and seen.workflow_hash not in (None, digest):
        logger.warning(
            "the workflow file has changed since run %s began; going on with the new one",
            seen.run_id,
        )


def how_claimed(seen: Run, force: bool) -> str:
    """Return what the run's history is to say of an engine that goes on with it."""
    if seen.is_terminal:
        return "retried"
    if force and owner_life(seen) == "alive":
        return "taken over"
    return "resumed" if force or seen.runtime_owner_id is None else "resumed after a crash"


def put_labels_back(tx: Tx, plan: Plan, labels: Mapping[Key, str | None]) -> None:
    """Mend the labels of an earlier life's rows that another program's decisions have wiped."""
    for key, label in labels.items():
        slot = plan.slots.get(key)
        if slot is not None and slot.leaf.label is not None and label is None:
            tx.update_label(key, slot.leaf.label)


def warn_of_narrow_run(plan: Plan, max_concurrency: int) -> None:
    widest = max((group.limit for slot in plan.leaves() for group in slot.groups), default=0)
    if widest > max_concurrency:
        logger.warning(
            "Parallel(max_concurrency=%d) is limited to %d: -c, or max_concurrency, raises it",
            widest,
            max_concurrency,
        )


class Renderer(CtxSource):
    """Calls the workflow function, and gives it what it reads: from memory and from the file."""

    def __init__(self, db: PatientReads, run_id: str, progress: Progress) -> None:
        self._db = db
        self._run_id = run_id
        self._progress = progress
        # Node id without loop scope -> with it, from the last frame of a resumed run.
        self.scopes: dict[str, str] = {}
        self.input_json = "{}"
        self.reads: set[tuple[str, str]] = set()  # of the last render
        self.xml = ("", "")  # the tree of the last render, and its hash

    def recall(self, reads: Reads) -> None:
        """Read what an earlier engine had rendered, and of what input."""
        self.input_json = reads.get_input(self._run_id) or "{}"
        mounted = map(key_of, mounted_names(reads.get_mounted(self._run_id)))
        self.scopes = {plain_id(node_id): node_id for node_id, _ in mounted}

    def find_output(self, id: str, iteration: int | None) -> str | None:
        return self._db.find_output(self._run_id, self._node_id_of(id), iteration)

    def find_state(self, id: str) -> str | None:
        key = self._key_of(id)
        return None if key is None else self._progress.records[key].state

    def find_error(self, id: str) -> dict[str, Any] | None:
        key = self._key_of(id)
        if key is None or self._progress.records[key].state != "failed":
            return None
        with self._db.snapshot() as reads:
            found = reads.find_error(self._run_id, key)
            if found is not None:
                return dict(json.loads(found))
            gate = reads.get_gate(self._run_id, key)
        return None if gate is None else _denial_error(gate)

    def find_iteration(self, loop_id: str) -> int:
        plan, loops = self._progress.plan, self._progress.loops
        slot = plan.loop_by_id.get(loop_id) if plan is not None else None
        if slot is not None:
            return slot.iteration
        keys = [key for key in loops if key.partition("@@")[0] == loop_id]
        newest = max(
            keys, key=lambda key: [int(n) for n in re.findall("=([0-9]+)", key)], default=None
        )
        return 0 if newest is None else loops[newest][0]

    def _key_of(self, id: str) -> Key | None:
        """Return the key behind an id as written, also before the first render of a resumed run."""
        plan = self._progress.plan
        slot = plan.by_id.get(id) if plan is not None else None
        if slot is not None:
            return slot.key
        node_id = self._node_id_of(id)
        return max((key for key in self._progress.records if key[0] == node_id), default=None)

    def _node_id_of(self, id: str) -> str:
        """Return the node id behind an id as written.

        In a nested loop it carries the outer iteration.
        """
        plan = self._progress.plan
        slot = plan.by_id.get(id) if plan is not None else None
        return slot.key[0] if slot is not None else self.scopes.get(id, id)

    def render(self, workflow: Workflow | Callable[[Ctx], Workflow]) -> Plan | None:
        """Call the workflow function and lay its tree out, outside of any transaction.

        A mistake in it becomes the run's failure, and None is returned.
        """
        progress = self._progress
        progress.begin_render()
        ctx = Ctx(self._run_id, json.loads(self.input_json), source=self)
        try:
            tree = workflow if isinstance(workflow, Workflow) else workflow(ctx)
            if not isinstance(tree, Workflow):
                raise AuthoringError(
                    f"a workflow function must return a Workflow, got {short(tree)}", "INVALID_TREE"
                )
            plan = Plan(tree, progress.loops)
            progress.refuse_endless_rendering(plan)
            xml = to_json(xml_of(tree))
        except (StorageError, Unavailable, KeyboardInterrupt):
            raise
        except AuthoringError as error:
            progress.fatal = describe_error(error)
            return None
        except BaseException as error:
            # User code: what it raises, also SystemExit, is the run's failure, never the engine's.
            logger.error("the workflow function failed\n%s", traceback_of(error))
            described = describe_error(error)
            message = f"the workflow function raised {described['name']}: {described['message']}"
            progress.fatal = describe_error(AuthoringError(message, "RENDER_FAILED"))
            return None
        self.reads = ctx.reads
        self.xml = (xml, hashlib.sha256(xml.encode("utf-8")).hexdigest())
        return plan


class Observer:
    """Gives `on_event` every event of a run's log in order, whoever has written it."""

    def __init__(self, db: Reads, run_id: str, on_event: Callable[[Event], None] | None) -> None:
        self.delivered = -1
        self._db = db
        self._run_id = run_id
        self._on_event = on_event

    def tell(self, tx: Tx) -> None:
        """Go on with what a transaction has committed, and what others had before it."""
        if self._on_event is None:
            return
        events = tx.events
        if not events or events[0].seq != self.delivered + 1:
            events = self._db.list_events(self._run_id, self.delivered)
        for event in events:
            self.delivered = event.seq
            try:
                self._on_event(event)
            except Exception:  # foreign code: an observer that fails must not cost the run
                logger.error("the observer of run %s failed", self._run_id, exc_info=True)


class Engine:
    """Drives one run from its claim to its end, in the thread that calls `run`.

    Everything that happens elsewhere (a task that ends, a line, a decision, another process's
    commit) comes in through one mailbox; what follows from it `Progress` says. Memory changes
    inside a transaction; when that fails the engine stops, so what it knows is never ahead of the
    file. Other threads call `cancel`, `suspend` and `post`, also in a signal handler.
    """

    ATTEMPTS: ClassVar[type[Attempts]] = Attempts

    def __init__(
        self,
        workflow: Workflow | Callable[[Ctx], Workflow],
        adapter: SmithersDb,
        run_id: str,
        *,
        input: Any = None,
        abort: threading.Event | None = None,
        max_concurrency: int = 4,
        executor: Executor | Callable[[], Executor] | None = None,
        on_event: Callable[[Event], None] | None = None,
        patience: Patience = "all",
        config: Mapping[str, Any] | None = None,
        echo_prints: bool = True,
    ) -> None:
        check_adapter(adapter)
        check_id(run_id, "run")
        _check_number("run_workflow", "max_concurrency", max_concurrency, 1, whole=True)
        if not isinstance(workflow, Workflow) and not callable(workflow):
            raise AuthoringError(
                f"a workflow is a function or a Workflow, got {short(workflow)}", "INVALID_TREE"
            )
        self.run_id = run_id
        self.result: RunResult | None = None
        self.abort = abort or threading.Event()
        self._workflow = workflow
        self._db = adapter
        self._metrics = adapter.metrics
        self._input_json = encode_input(input)
        self._config = {"maxConcurrency": max_concurrency, **(config or {})}
        self._max_concurrency = max_concurrency
        self._executor = executor
        self._observer = Observer(PatientReads(adapter), run_id, on_event)
        self._patience = patience
        self._echo_prints = echo_prints
        self._owner = new_owner_id()
        self._mailbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._stop_heartbeat = threading.Event()
        self._is_leaving = threading.Event()  # the process ends: whatever runs gets little time
        self._is_suspended = threading.Event()
        self._begin_empty()

    def _begin_empty(self) -> None:
        """Set what the engine knows of its run: nothing yet."""
        self._progress = Progress(self._max_concurrency)
        self._attempts = self.ATTEMPTS(
            self._db, self.run_id, self._owner, self._executor, self.post
        )
        self._steps = Steps(
            self.run_id, self._metrics, self._progress, self._attempts, self._max_concurrency
        )
        self._renderer = Renderer(PatientReads(self._db), self.run_id, self._progress)
        self._renderer.input_json = self._input_json
        self._status = "running"
        self._began = time.monotonic()
        self._labels: dict[Key, str | None] = {}  # of an earlier life's rows
        self._cancelling = False
        self._ended_elsewhere: str | None = None  # the status that another program has written
        self._is_hurrying = False
        self._next_seq = 0  # of this run's log, as this engine knows it

    # Life

    @property
    def left_call_behind(self) -> bool:
        return self._attempts.left_call_behind

    def open(
        self, resume: bool = False, force: bool = False, retry: bool | Iterable[str] = False
    ) -> bool:
        """Insert or claim the run; True when there is something to drive.

        With `resume` a run that has ended is only looked at, unless `retry` gives its failed nodes
        (True) or the named ones a fresh try; one that does not exist is begun. Raises RunExists,
        RunOwned, AuthoringError when the run is another workflow's, InvalidRequest for a node that
        cannot be retried.
        """
        # Before anything is written: whoever reads this owner's name finds it alive.
        _engines_here.add(self._owner)
        try:
            return self._open(resume, force, retry)
        except BaseException:
            _engines_here.discard(self._owner)
            raise

    def _open(self, resume: bool, force: bool, retry: bool | Iterable[str]) -> bool:
        run = self._db.get_run(self.run_id) if resume else None
        if run is None:
            self._insert()
            return True
        if retry is False:  # it may have been asked for, and nobody has come to do it
            retry = run.config.get("retry") or False
        if run.is_terminal and retry is False:
            self._leave(run.status, json.loads(run.error_json or "null"))
            return False
        if not force and watch_owner(self._db, self.run_id) == "alive":
            raise RunOwned(
                f"run {self.run_id} is driven by a living process; --force takes it over"
            )
        if run.status == "queued":
            self._begin(run)
        else:
            self._claim(run, force, retry)
        return True

    def run(self) -> RunResult:
        """Drive the opened run until it ends, is suspended, or waits for gates and is not to park.

        Raises OwnerLost after a takeover and StorageError when the database fails; nothing is
        written then.
        """
        self._metrics.inc("smithers_runs_total")
        self._metrics.inc("smithers_runs_active")
        self._watch = self._db.watch()
        self._db.subscribe(self._notice)
        start_thread("heartbeat", self._beat)
        try:
            with captured_prints(self._echo_prints):
                self._drive()
        finally:
            self._stop_heartbeat.set()
            _engines_here.discard(self._owner)
            self._db.unsubscribe(self._notice)
            self._watch.close()
            self._attempts.close()
            self._steps.show_gauges(is_over=True)
            self._metrics.inc("smithers_runs_active", -1)
        assert self.result is not None
        return self.result

    def cancel(self) -> None:
        """Cancel the run and wait only briefly for tasks: the process is about to leave."""
        self._is_leaving.set()
        self.abort.set()

    def suspend(self) -> None:
        """Leave the run as it is, for a later resume: the process is about to leave."""
        self._is_leaving.set()
        self._is_suspended.set()

    def post(self, kind: str, *details: Any) -> None:
        self._mailbox.put((kind, *details))

    def _insert(self) -> None:
        path, digest = _source_of(self._workflow)
        name = str(getattr(self._workflow, "name", getattr(self._workflow, "__name__", "workflow")))
        with self._db.transaction(self.run_id) as tx:
            tx.insert_run(name, path, digest, self._owner, self._input_json, to_json(self._config))
            tx.append_event("RunStarted")
            tx.append_event("RunStatusChanged", status="running")
        self._told(tx)

    def _begin(self, queued: Run) -> None:
        """Begin a run that was queued."""
        with self._db.transaction(self.run_id) as tx:
            self._claim_row(tx, queued, False)
            tx.append_event("RunStarted")
            tx.append_event("RunStatusChanged", status="running")
        self._told(tx)
        self._renderer.recall(self._db)

    def _claim_row(self, tx: Tx, seen: Run, retry: bool | Seq[str]) -> None:
        if not tx.claim_run(seen, self._owner, forget_end=seen.is_terminal):
            raise RunOwned(f"run {self.run_id} was claimed by another process")
        tx.update_run_source(*_source_of(self._workflow))
        tx.update_config(**self._config, retry=retry or None)

    def _claim(self, seen: Run, force: bool, retry: bool | Iterable[str]) -> None:
        """Make this engine the owner, and mend what the last one left half done."""
        retry = retry if isinstance(retry, bool) else list(retry)
        self._recall()
        plan = self._look_at_tree(seen, force)
        chosen, loops = choose_to_retry(seen, self._progress.records, plan, retry)
        with self._db.transaction(self.run_id) as tx:
            self._claim_row(tx, seen, retry)
            attempts = tx.list_attempts(self.run_id, open_nodes_only=True)
            self._next_seq = tx.next_seq
        end_leftovers(seen, attempts)
        warn_of_changed_file(seen, self._workflow)
        has_crashed = seen.runtime_owner_id is not None and not force
        with self._transaction() as tx:
            tx.note_history(how_claimed(seen, force))
            tx.append_event("RunStatusChanged", status="running")
            for node in tx.list_open_nodes(self.run_id):
                if node.state == "in-progress":
                    if has_crashed and node.last_attempt is not None:
                        tx.note_attempt(node.key, node.last_attempt, crashed=True)
                    node_close(tx, node, INTERRUPTED)
            reset_loops(tx, loops)
            reset_nodes(tx, self._progress.records, chosen)
            tx.update_config(retry=None)
        self._metrics.inc("smithers_runs_resumed_total")
        self._observer.delivered = tx.events[0].seq - 1
        self._told(tx)
        self._begin_empty()
        self._next_seq = tx.next_seq
        self._recall()

    def _look_at_tree(self, seen: Run, force: bool) -> Plan | None:
        """Render once before anything is claimed: another workflow's run is not gone on with."""
        plan = self._renderer.render(self._workflow)
        has_frame = self._steps.frame is not None
        if plan is not None and has_frame and plan.name != seen.workflow_name and not force:
            raise AuthoringError(
                f"run {self.run_id} is of workflow {seen.workflow_name!r}, not of {plan.name!r};"
                " --force goes on with it all the same",
                "WORKFLOW_MISMATCH",
            )
        return plan

    def _recall(self) -> None:
        """Read back what an earlier engine had committed, from one snapshot."""
        with self._db.snapshot() as reads:
            self._labels = recall_records(reads, self.run_id, self._progress)
            for frame in reads.list_frames(self.run_id, 1):
                self._steps.frame = (frame.xml_json, frame.mounted_task_ids_json)
            self._renderer.recall(reads)

    def _beat(self) -> None:
        """Prove once a second that this engine lives.

        Report when it does not own the run any more.
        """
        while not self._stop_heartbeat.wait(HEARTBEAT_SECONDS):
            bury_orphans()
            try:
                with self._db.transaction(self.run_id) as tx:
                    owned = tx.update_heartbeat(self._owner)
            except Unavailable:
                continue  # somebody holds the write lock: the engine waits for it as well
            except SmithersError as error:
                self.post("broken", error)
                return
            if not owned:
                self.post("control")
                return
            if self._progress.open_gates:
                self.post("count")

    # The loop

    def _notice(self, tx: Tx) -> None:
        if tx.is_control and tx.run_id == self.run_id:
            self.post("control")

    def _drive(self) -> None:
        self._step([])
        next_look = 0.0
        while self.result is None:
            messages = self._wait()
            now = time.monotonic()
            is_due = self._steps.wall.next() <= now_ms() or self._steps.grace.next() <= now
            told = (
                (self.abort, self._cancelling),
                (self._is_suspended, self._progress.is_stopping),
                (self._is_leaving, self._is_hurrying),
            )
            is_told = any(flag.is_set() and not is_heard for flag, is_heard in told)
            has_news = bool(messages) or is_due or is_told
            if not has_news and now >= next_look:
                next_look = now + WATCH_SECONDS
                has_news = self._watch.changed()
            if has_news:
                self._step(messages)

    def _wait(self) -> list[tuple[Any, ...]]:
        """Return all messages there are, after waiting for the first, a deadline or the next look.

        Never long: the wall clock may jump, and a deadline with it.
        """
        timeout = min(
            WATCH_SECONDS,
            self._steps.grace.next() - time.monotonic(),
            (self._steps.wall.next() - now_ms()) / 1000,
        )
        messages: list[tuple[Any, ...]] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._mailbox.get(timeout=max(0.0, timeout)))
            while len(messages) < 1000:
                messages.append(self._mailbox.get_nowait())
        return messages

    def _step(self, messages: list[tuple[Any, ...]]) -> None:
        """Carry the run as far as it goes now: one transaction, and one more after each render."""
        with self._transaction() as tx:
            for kind, *details in messages:
                if kind == "done":
                    self._steps.attempt_done(tx, *details)
                elif kind == "line":
                    self._steps.line_write(tx, *details)
                elif kind == "count":
                    self._steps.gates_count(tx)
                elif kind == "broken":
                    raise details[0]
            self._steps.fire(tx)
            self._advance(tx)
        self._after_commit(tx)
        while self._progress.is_stale and not self._progress.is_halting and self.result is None:
            plan = self._renderer.render(self._workflow)
            with self._transaction() as tx:
                if plan is not None and not self._progress.is_stopping:
                    self._mount(tx, plan)
                self._advance(tx)
            self._after_commit(tx)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Tx]:
        """A transaction of this run's owner: fenced, and aware of what others have asked for."""
        give_up = self._is_leaving.is_set
        with self._db.transaction(self.run_id, math.inf, give_up) as tx:
            status, is_cancelled = tx.get_control(self._owner)
            if status in TERMINAL_STATUSES:
                self._ended_elsewhere = status
            if status in TERMINAL_STATUSES or is_cancelled or self.abort.is_set():
                self._begin_to_cancel(tx, is_cancelled)
            elif self._is_suspended.is_set():
                self._steps.stop_all(tx, SUSPENDED)
            if self._is_leaving.is_set() and not self._is_hurrying:
                self._is_hurrying = True
                self._steps.shorten_grace(HURRY_SECONDS if self._cancelling else SUSPEND_SECONDS)
            if tx.next_seq != self._next_seq:
                self._steps.decisions_collect(tx, self._next_seq)
                self._next_seq = tx.next_seq
            yield tx

    def _begin_to_cancel(self, tx: Tx, is_requested: bool) -> None:
        if not self._cancelling:
            self._cancelling = True
            if not is_requested:  # what was acknowledged by a signal is not forgotten either
                tx.request_cancel()
            self._steps.stop_all(tx, "the run was cancelled")

    def _after_commit(self, tx: Tx) -> None:
        starting, self._steps.starting = self._steps.starting, []
        for running in starting:
            self._attempts.launch(running)
        self._steps.show_gauges(is_over=self.result is not None)
        self._told(tx)

    def _told(self, tx: Tx) -> None:
        self._next_seq = tx.next_seq
        self._observer.tell(tx)

    # Going on

    def _mount(self, tx: Tx, plan: Plan) -> None:
        """Make a rendered tree the one that runs, with its frame and its new nodes."""
        self._steps.xml = self._renderer.xml
        if self._progress.plan is None:
            tx.update_run_name(plan.name)
            put_labels_back(tx, plan, self._labels)
            warn_of_narrow_run(plan, self._max_concurrency)
        for effect in self._progress.rendered(plan, self._renderer.reads):
            self._steps.carry_out(tx, effect)

    def _advance(self, tx: Tx) -> None:
        """Do everything that needs no render, then see whether the run is at an end or parked.

        A loop whose outputs are given has all its turns here: not in one transaction.
        """
        limit = len(tx.events) + MAX_EVENTS_AT_ONCE

        def has_room() -> bool:
            return len(tx.events) < limit

        for effect in self._progress.advance(tx.now_ms, has_room):
            self._steps.carry_out(tx, effect)
        if has_room():
            self._settle(tx)
        else:
            self.post("more")

    def _settle(self, tx: Tx) -> None:
        """End the run, leave it, park it, or say that it runs."""
        standing = self._progress.standing()
        if standing == "ended":
            self._run_end(tx)
        elif standing == "stale" or self._progress.is_halting:
            return
        elif standing == "busy":
            self._show_status(tx, "running")
        elif standing == "waiting":
            self._show_status(tx, "waiting-approval")
            is_timed = any(kind == "gate" for kind, _ in self._steps.wall.at)
            if self._patience == "all" or self._patience == "timed" and is_timed:
                return
            if self._steps.wall.next() <= now_ms():  # what it was begun for: the next step fires it
                return
            if tx.count_open_gates(self.run_id) == self._progress.open_gates:
                self._run_leave(tx)
            else:  # a program that adds no event has just decided
                self.post("count")
        else:
            raise AssertionError("nothing is left to wait for and the tree is not done")

    def _show_status(self, tx: Tx, status: str) -> None:
        if self._status != status:
            self._status = status
            tx.update_run_status(status)
            tx.append_event("RunStatusChanged", status=status)

    def _leave(self, status: str, error: dict[str, Any] | None = None) -> None:
        outputs = Outputs(self._db, self.run_id)
        self.result = RunResult(self.run_id, cast(RunStatus, status), error, outputs)

    def _run_leave(self, tx: Tx) -> None:
        """Leave the run as it is, without an owner."""
        if self._is_suspended.is_set():
            tx.note_history("suspended")
        tx.release_run()
        self._leave(self._status)

    def _run_end(self, tx: Tx) -> None:
        progress = self._progress
        error: dict[str, Any] | None = None
        if self._ended_elsewhere is not None:
            run_close_after(tx, self._ended_elsewhere)
            self._leave(self._ended_elsewhere)
            return
        if self._cancelling:
            status = "cancelled"
        elif progress.fatal is not None or progress.failed:
            status = "failed"
            message = f"Task(s) failed: {', '.join(progress.failed)}"
            error = progress.fatal or describe_error(TaskFailed(message))
            self._metrics.inc("smithers_errors_total")
        elif progress.is_stopping:
            self._run_leave(tx)
            return
        else:
            status = "finished"
        run_close(tx, status, error)
        self._metrics.inc(f"smithers_runs_{status}_total")
        ms = (time.monotonic() - self._began) * 1000
        self._metrics.observe("smithers_run_duration_ms", ms)
        self._leave(status, error)


def encode_input(value: Any) -> str:
    """Return a run's input as JSON text. Raises AuthoringError for what it cannot be."""
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise AuthoringError(f"the input must be a JSON object, got {short(value)}")
    _checked_json("run_workflow", "input", value)
    return to_json(value)


def _source_of(workflow: Any) -> tuple[str | None, str | None]:
    """Return the path and the sha256 of the file that a workflow function comes from."""
    path = getattr(getattr(workflow, "__code__", None), "co_filename", None)
    if path is None or not os.path.isfile(path):
        return None, None
    with open(path, "rb") as source:
        return os.path.abspath(path), hashlib.sha256(source.read()).hexdigest()


def new_run_id() -> str:
    return f"run-{now_ms()}-{secrets.token_hex(3)}"


def run_workflow(
    workflow: Workflow | Callable[[Ctx], Workflow],
    *,
    adapter: SmithersDb,
    run_id: str | None = None,
    input: Any = None,
    resume: bool = False,
    retry: bool | Iterable[str] = False,
    force: bool = False,
    abort: threading.Event | None = None,
    max_concurrency: int = 4,
    executor: Executor | Callable[[], Executor] | None = None,
    on_event: Callable[[Event], None] | None = None,
    park: bool = True,
) -> RunResult:
    """Run a workflow to its end in this thread and return how it ended.

    The run waits at its gates; with `park=False` it returns `waiting-approval` instead when nothing
    else is left to do. Setting `abort` cancels it. `resume` goes on with a run that was interrupted
    or waits, and begins one that does not exist; one that has ended it only returns, unless `retry`
    gives its failed nodes (True) or the named ones a fresh try. `executor` is an Executor, or a
    function that makes one: then a pool that breaks is made anew. Raises RunExists or RunOwned
    before anything is written, OwnerLost after a takeover, StorageError when the database fails.
    """
    engine = Engine(
        workflow,
        adapter,
        run_id or new_run_id(),
        input=input,
        abort=abort,
        max_concurrency=max_concurrency,
        executor=executor,
        on_event=on_event,
        patience="all" if park else "timed",
    )
    if not engine.open(resume or retry is not False, force, retry):
        assert engine.result is not None
        return engine.result
    return engine.run()


# ---------------------------------------------------------------------------
# Rehearsal: the same engine in memory, without tasks and people, by a clock that jumps
# ---------------------------------------------------------------------------


class Rehearsal(NamedTuple):
    """How a rehearsed run went.

    `order` holds the id of each attempt and of each gate or pause, as they began; `states` the
    state of each node, in its newest iteration; `frames` the trees, `events` the log, both oldest
    first; `seconds` is how long it would have taken if tasks and people took no time.
    """

    status: RunStatus
    error: dict[str, Any] | None
    order: list[str]
    states: dict[str, str]
    outputs: dict[str, Any]
    frames: list[dict[str, Any]]
    events: list[Event]
    seconds: float


class RehearsalDb(SmithersDb):
    """The tables of one run in memory; what is written there bears the time of its own clock."""

    def __init__(self) -> None:
        self.path = ":memory:"
        self.metrics = Metrics()
        self.clock_ms = now_ms()
        self._writer = sqlite3.connect(":memory:", isolation_level=None)
        for statement in (*_statements(SCHEMA), *_statements(TRIGGERS)):
            self._writer.execute(statement)

    @contextlib.contextmanager
    def transaction(self, run_id: str, *_: Any) -> Iterator[Tx]:
        tx = Tx(self._writer, run_id)
        tx.now_ms = self.clock_ms
        yield tx

    @contextlib.contextmanager
    def snapshot(self, is_patient: bool = False) -> Iterator[Reads]:
        yield Snapshot(self._writer, {})

    def close(self) -> None:
        self._writer.close()


class Script(NamedTuple):
    """What a rehearsal goes by: each by node id, or by (id, iteration)."""

    outputs: Mapping[Any, Any]
    failures: Mapping[Any, Any]
    decisions: Mapping[Any, Any]


def said_of(given: Mapping[Any, Any], node_id: str, iteration: int) -> Any:
    id = plain_id(node_id)
    return given.get((id, iteration), given.get(id))


class RehearsedAttempts(Attempts):
    """Attempts that are launched only to be told how they end."""

    def launch(self, running: Running) -> None:
        self._post("launched", running)


class Rehearser(Engine):
    """Drives a run whose tasks end, and whose gates are decided, as it is told."""

    ATTEMPTS = RehearsedAttempts

    def rehearse(self, db: RehearsalDb, script: Script) -> str:
        """Drive the run until nothing more would happen by itself; return its status."""
        self.open()
        _engines_here.discard(self._owner)
        self._step([])
        while self.result is None:
            self._steps.grace.at.clear()  # nothing that runs takes time
            if not self._mailbox.empty():
                _, running = self._mailbox.get()
                self._step([("done", running, self._outcome(running, script))])
            elif self._decide_next(db, script.decisions):
                self._step([])
            elif self._steps.wall.next() < math.inf:
                db.clock_ms = max(db.clock_ms, math.ceil(self._steps.wall.next()))
                self._step([])
            else:
                return self._status
        return self.result.status

    @staticmethod
    def _outcome(running: Running, script: Script) -> Outcome:
        key = running.node_id, running.iteration
        failures = said_of(script.failures, *key) or ()
        if isinstance(failures, BaseException):
            return Outcome(None, describe_error(failures))
        if running.attempt < len(failures):
            return Outcome(None, describe_error(failures[running.attempt]))
        return Outcome(encode_output(said_of(script.outputs, *key)))

    def _decide_next(self, db: RehearsalDb, decisions: Mapping[Any, Any]) -> bool:
        for gate in db.list_gates(self.run_id, "requested"):
            said = said_of(decisions, *gate.key)
            if said is not None and not gate.is_pause:
                said = {"approved": said} if isinstance(said, bool) else said
                verdict = "approved" if said["approved"] else "denied"
                note, by = said.get("note"), said.get("decidedBy")
                decide(db, self.run_id, gate.node_id, Decision(verdict, gate.iteration, note, by))
                return True
        return False


def rehearse(
    workflow: Workflow | Callable[[Ctx], Workflow],
    input: dict[str, Any] | None = None,
    *,
    outputs: Mapping[Any, Any] | None = None,
    failures: Mapping[Any, BaseException | Seq[BaseException]] | None = None,
    decisions: Mapping[Any, bool | dict[str, Any]] | None = None,
    max_concurrency: int = 4,
) -> Rehearsal:
    """Run a workflow in memory, without its tasks, people and time, and return how it went.

    No task is called: it ends with its output in `outputs` (None when there is none), or fails with
    its error in `failures`, each time, or with one of a list in each of its first attempts. A gate
    is decided as `decisions` say: True, False, or an output of a gate; without a word of it, its
    time runs out, or the run is left `waiting-approval`. Each is named by id, or by (id, iteration)
    in a loop. Retries, deadlines and pauses take no time: the clock jumps to the next.
    """
    with contextlib.closing(RehearsalDb()) as db:
        began, run_id = db.clock_ms, "rehearsal"
        engine = Rehearser(workflow, db, run_id, input=input, max_concurrency=max_concurrency)
        status = engine.rehearse(db, Script(outputs or {}, failures or {}, decisions or {}))
        events = db.list_events(run_id)
        starts = ("NodeStarted", "ApprovalRequested", "NodeOutput")  # only pauses print something
        return Rehearsal(
            cast(RunStatus, status),
            None if engine.result is None else engine.result.error,
            [plain_id(event.payload["nodeId"]) for event in events if event.type in starts],
            {node.node_id: node.state for node in db.list_nodes(run_id)},
            dict(Outputs(db, run_id)),
            [parse_tree(frame.xml_json) for frame in db.list_frames(run_id, -1, 0)],
            events,
            (db.clock_ms - began) / 1000,
        )


# ---------------------------------------------------------------------------
# HTTP: requests, answers and the strict reading of both
# ---------------------------------------------------------------------------

# Bounds of a request, with their precedents: 8 KiB lines (nginx, Apache), 100 fields (Apache), and
# far more body than a note on an approval needs.
MAX_REQUEST_LINE = 8 << 10
MAX_HEAD_BYTES = 32 << 10
MAX_HEADER_COUNT = 100
MAX_BODY_BYTES = 1 << 20
MAX_FRAMES = 1000  # frames of one answer, of at most 8 MiB
LIGHT_BYTES = 64 << 10  # a body up to this is made and sent in well under a millisecond

# Source: RFC 9110 section 5.6.2 (token) and 5.5 (field values), RFC 9112 section 3 (request line).
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_FIELD_LINE = re.compile(rb"(" + _TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
_ABSOLUTE = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE)
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(?::[0-9]{0,5})?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t\x20-\x7e\x80-\xff]*)?")
# Fields that a second occurrence would make ambiguous.
_SINGLE_FIELDS = frozenset(
    "host content-length transfer-encoding authorization x-smithers-key origin sec-fetch-site"
    " last-event-id expect content-type".split()
)


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a request, checked.

    `segments` is the decoded path, None when it cannot be decoded.
    """

    method: str
    segments: tuple[str, ...] | None
    query: str
    headers: Mapping[str, str]
    is_http10: bool = False
    keep_alive: bool = True
    content_length: int = 0
    chunked: bool = False
    expects_continue: bool = False

    @property
    def has_body(self) -> bool:
        return self.chunked or self.content_length > 0


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer. `stream` replaces the body when events follow."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    stream: StreamStart | None = None


class StreamStart(NamedTuple):
    """Where an event stream begins: after this seq of a run's log."""

    view: RunView
    after_seq: int


def parse_head(data: bytes) -> Head:
    """Return the head of a request from its bytes, up to and without the empty line.

    Raises a ServeError for whatever two parsers could read differently, and past the bounds.
    Source: RFC 9112, the strict reading.
    """
    request_line, *lines = data.split(b"\r\n")
    if len(request_line) > MAX_REQUEST_LINE:
        raise UriTooLong(f"the request line has over {MAX_REQUEST_LINE} bytes")
    match = _REQUEST_LINE.fullmatch(request_line)
    if match is None:
        raise InvalidRequest("the request line is malformed")
    method, target, major, minor = (part.decode("ascii") for part in match.groups())
    if major != "1" or minor not in "01":
        raise VersionNotSupported(f"HTTP/{major}.{minor} is not spoken here, use HTTP/1.1")
    is_http10 = minor == "0"
    headers = _parse_fields(lines)
    segments, query = _parse_target(target, headers, is_http10)
    chunked, length = _parse_framing(headers, is_http10)
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    expects = headers.get("expect", "").lower()
    if expects and expects != "100-continue" and not is_http10:
        raise InvalidRequest("the only expectation known here is 100-continue")
    return Head(
        method=method,
        segments=segments,
        query=query,
        headers=headers,
        is_http10=is_http10,
        keep_alive="keep-alive" in options if is_http10 else "close" not in options,
        content_length=length,
        chunked=chunked,
        expects_continue=bool(expects) and not is_http10,
    )


# The clients of a server send the same few heads again and again; a checked one need not be checked
# twice.
MAX_CACHED_HEAD = 2 << 10
_parse_head_cached = functools.lru_cache(maxsize=256)(parse_head)


def _parse_fields(lines: list[bytes]) -> dict[str, str]:
    if len(lines) > MAX_HEADER_COUNT:
        raise HeadersTooLarge(f"over {MAX_HEADER_COUNT} header fields")
    headers: dict[str, str] = {}
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        if match is None:
            raise InvalidRequest("a header line is malformed")
        name = match[1].decode("ascii").lower()
        value = match[2].decode("latin-1").strip(" \t")
        if name in headers:
            if name in _SINGLE_FIELDS:
                raise InvalidRequest(f"the header {name} appears twice")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def _parse_target(
    target: str, headers: Mapping[str, str], is_http10: bool
) -> tuple[tuple[str, ...] | None, str]:
    """Return the decoded path segments and the query of an origin-form or absolute-form target."""
    host = headers.get("host")
    if host is None and not is_http10:
        raise InvalidRequest("the header host is missing")
    if host is not None and not _HOST.fullmatch(host):
        raise InvalidRequest("the header host is malformed")
    if "#" in target:
        raise InvalidRequest("the request target has a fragment")
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:
        authority, target = absolute[1], absolute[2] or "/"
        if host is not None and authority.lower() != host.lower():
            raise InvalidRequest("the request target and the header host differ")
        if target.startswith("?"):
            target = "/" + target
    path, _, query = target.partition("?")
    if path == "*":
        return None, query
    if not path.startswith("/"):
        raise InvalidRequest("the request target is not a path")
    return tuple(decode_segment(part) for part in path[1:].split("/")), query


def decode_segment(text: str) -> str:
    """Return percent-decoded text, decoded once.

    Raises InvalidRequest when that is not possible.
    """
    if "%" not in text:
        return text
    if _BAD_ESCAPE.search(text):
        raise InvalidRequest("the path has a malformed percent escape")
    try:
        return urllib.parse.unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("the path is not UTF-8") from error


def _parse_framing(headers: Mapping[str, str], is_http10: bool) -> tuple[bool, int]:
    """Return (chunked, content length).

    Source: RFC 9112 section 6; where it allows a choice, the refusal.
    """
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or is_http10:
            raise InvalidRequest("transfer-encoding does not go with content-length or HTTP/1.0")
        if coding.lower() != "chunked":
            raise NotImplementedHere("the only transfer-encoding known here is chunked")
        return True, 0
    if length is None:
        return False, 0
    if not (length.isascii() and length.isdigit()) or len(length) > 19:
        raise InvalidRequest("the header content-length is not a number")
    if int(length) > MAX_BODY_BYTES:
        raise PayloadTooLarge(f"the body may have {MAX_BODY_BYTES} bytes, not {length}")
    return False, int(length)


def parse_query(query: str) -> dict[str, str]:
    """Return the parameters of a query string, decoded.

    Raises InvalidRequest for malformed or repeated ones.
    """
    parameters: dict[str, str] = {}
    for part in query.split("&"):
        if part:
            name, _, value = part.replace("+", " ").partition("=")
            name, value = decode_segment(name), decode_segment(value)
            if name in parameters:
                raise InvalidRequest(f"the query parameter {name[:50]!r} appears twice")
            parameters[name] = value
    return parameters


def integer_in(name: str, text: str, low: int, high: int = INT64_MAX) -> int:
    """Return a decimal integer in bounds. Raises InvalidRequest with the name and the bounds."""
    if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
        raise InvalidRequest(
            f"{name} must be a whole number from {low} to {high}, got {text[:40]!r}"
        )
    return int(text)


JSON_HEADERS = (
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
)


def json_response(
    value: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()
) -> Response:
    return Response(status, to_json(value).encode("utf-8"), JSON_HEADERS + headers)


def error_response(error: ServeError) -> Response:
    """Return the envelope of an error: the one place where errors become answers."""
    message = printable(scrub_paths(str(error)))
    return json_response(
        {"error": {"code": error.code, "message": message}}, error.status, error.headers
    )


@functools.lru_cache(maxsize=256)
def _head_lines(status: int, headers: tuple[tuple[str, str], ...]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{lines}".encode("latin-1")


_date_line: tuple[int, bytes] = (0, b"")


def _date() -> bytes:
    """Return the Date line, made once a second. Source: RFC 9110 section 6.6.1."""
    global _date_line
    second = int(time.time())
    if _date_line[0] != second:
        days = "Mon Tue Wed Thu Fri Sat Sun".split()
        months = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
        at = time.gmtime(second)
        day = f"{days[at.tm_wday]}, {at.tm_mday:02} {months[at.tm_mon - 1]} {at.tm_year}"
        text = f"{day} {time.strftime('%H:%M:%S', at)}"
        _date_line = (second, f"Date: {text} GMT\r\n".encode("ascii"))
    return _date_line[1]


def render_response(response: Response, is_head: bool, keep_alive: bool, is_http10: bool) -> bytes:
    """Return the bytes of an answer that is not a stream."""
    parts = [_head_lines(response.status, response.headers), _date()]
    if response.status != 204:
        parts.append(b"Content-Length: %d\r\n" % len(response.body))
    if not keep_alive:
        parts.append(b"Connection: close\r\n")
    elif is_http10:
        parts.append(b"Connection: keep-alive\r\n")
    parts.append(b"\r\n")
    if not is_head:
        parts.append(response.body)
    return b"".join(parts)


def render_stream_head(response: Response, is_http10: bool) -> bytes:
    chunked = b"" if is_http10 else b"Transfer-Encoding: chunked\r\n"
    head = _head_lines(response.status, response.headers)
    return head + _date() + chunked + b"Connection: close\r\n\r\n"


# ---------------------------------------------------------------------------
# Event stream: a run's log as SSE bytes
# ---------------------------------------------------------------------------

RETRY_LINE = b"retry: 1000\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 10.0
UNWRITABLE_SECONDS = 60.0  # a socket that takes nothing for so long is dropped; it may come back
MAX_STREAMS = 10_000
LAST_CHUNK = b"0\r\n\r\n"


def encode_event(seq: int, payload: str) -> bytes:
    """Return one event as SSE text. Source: WHATWG HTML, server-sent events."""
    # Not ours: compact JSON has none. A newline would forge an event.
    if "\n" in payload or "\r" in payload:
        payload = to_json(json.loads(payload))
    return f"event: smithers\ndata: {payload}\nid: {seq}\n\n".encode()


def chunk(data: bytes) -> bytes:
    """Return `data` as one HTTP chunk; never empty, for an empty chunk ends the body.

    Source: RFC 9112 section 7.1.
    """
    assert data
    return b"%x\r\n%b\r\n" % (len(data), data)


def encode_chunk(seq: int, payload: str) -> bytes:
    return chunk(encode_event(seq, payload))


class Block:
    """Consecutive events of a log, encoded once for everybody who reads them in this form."""

    __slots__ = ("seqs", "ends", "data")

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self.ends: list[int] = []  # where in `data` each event ends
        self.data = b""

    def extend(self, rows: list[tuple[int, str]], encode: Callable[[int, str], bytes]) -> None:
        parts = [encode(seq, payload) for seq, payload in rows]
        ends = itertools.accumulate(map(len, parts), initial=len(self.data))
        next(ends)  # of what was there before
        self.ends += ends
        self.seqs += [seq for seq, _ in rows]
        self.data = b"".join([self.data, *parts])

    def after(self, seq: int, size: int) -> tuple[bytes, int] | None:
        """Return whole events with a greater seq, and the seq of the last one.

        At most `size` bytes of them, but at least one event; None when there is none.
        """
        first = bisect.bisect_right(self.seqs, seq)
        if first == len(self.seqs):
            return None
        start = self.ends[first - 1] if first else 0
        last = max(first, bisect.bisect_right(self.ends, start + size) - 1)
        return self.data[start : self.ends[last]], self.seqs[last]


class EventLog:
    """A run's events, encoded: recent ones in memory, older ones read when asked for.

    Used by one thread at a time.
    """

    BLOCK_EVENTS = 256
    # What one read returns: at most this or one event is what a stopped client can hold on to.
    PIECE_BYTES = 16 << 10

    def __init__(self, adapter: SmithersDb, run_id: str, max_bytes: int = 4 << 20) -> None:
        self._adapter = adapter
        self._run_id = run_id
        self._max_bytes = max_bytes  # of encoded events that are kept
        self.newest = -1
        self.has_ended = False
        self._blocks: collections.OrderedDict[tuple[bool, int], Block] = collections.OrderedDict()
        self._cached_bytes = 0
        # The last thing read: what a thousand clients at the same place ask for in a row.
        self._last: tuple[int, bool, bytes, int] = (-1, False, b"", -1)

    def refresh(self, reads: Reads) -> bool:
        """Look at the run; True when there are new events or it has ended."""
        before = (self.has_ended, self.newest)
        status, self.newest = reads.look_at_log(self._run_id)
        self.has_ended = status in TERMINAL_STATUSES
        self._last = (-1, False, b"", -1)
        return before != (self.has_ended, self.newest)

    def read(self, after_seq: int, is_chunked: bool = False) -> tuple[bytes, int]:
        """Return some encoded events after a seq, and the seq reached; b"" when there are none.

        With `is_chunked` every event is an HTTP chunk.
        """
        cursor, form, data, reached = self._last
        if cursor == after_seq and form == is_chunked and data:
            return data, reached
        cursor = after_seq
        while cursor < self.newest:
            number = (cursor + 1) // self.BLOCK_EVENTS
            up_to = min((number + 1) * self.BLOCK_EVENTS - 1, self.newest)
            found = self._block(number, up_to, is_chunked).after(cursor, self.PIECE_BYTES)
            if found is not None:
                self._last = (after_seq, is_chunked, *found)
                return found
            cursor = up_to  # a foreign log may have gaps as long as a block
        return b"", cursor

    def _block(self, number: int, up_to: int, is_chunked: bool) -> Block:
        """Return a block that holds everything up to a seq."""
        key = (is_chunked, number)
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = Block()
        else:
            self._blocks.move_to_end(key)
        known = block.seqs[-1] if block.seqs else number * self.BLOCK_EVENTS - 1
        if known < up_to:
            size = len(block.data)
            with self._adapter.snapshot() as reads:
                rows = reads.list_payloads(self._run_id, known, up_to)
            block.extend(rows, encode_chunk if is_chunked else encode_event)
            self._cached_bytes += len(block.data) - size
            while self._cached_bytes > self._max_bytes and len(self._blocks) > 1:
                self._cached_bytes -= len(self._blocks.popitem(last=False)[1].data)
        return block


def follow_events(adapter: SmithersDb, run_id: str, after_seq: int) -> Iterator[bytes]:
    """Yield the stream's bytes until the run ends.

    For WSGI, where a stream holds its own thread.
    """
    log = EventLog(adapter, run_id)
    watch = adapter.watch()
    committed = threading.Event()

    def notice(tx: Tx) -> None:
        committed.set()

    adapter.subscribe(notice)
    adapter.metrics.inc("smithers_event_streams_active")
    try:
        yield RETRY_LINE
        spoke_at = time.monotonic()
        log.refresh(adapter)
        while True:
            data, after_seq = log.read(after_seq)
            if data:
                yield data
                spoke_at = time.monotonic()
                continue
            if log.has_ended and after_seq >= log.newest:
                return
            if committed.wait(WATCH_SECONDS) or watch.changed():
                committed.clear()
                log.refresh(adapter)
            if time.monotonic() - spoke_at >= KEEP_ALIVE_SECONDS:
                yield KEEP_ALIVE
                spoke_at = time.monotonic()
    finally:
        adapter.metrics.inc("smithers_event_streams_active", -1)
        adapter.unsubscribe(notice)
        watch.close()


# ---------------------------------------------------------------------------
# Views: what people ask of a run, as JSON; only reading
# ---------------------------------------------------------------------------

MAX_PAGE = 1000
MAX_SCANNED_EVENTS = 100_000  # looked through for a node's lines, newest first: some 20 ms
RECENT_EVENTS = 20_000  # looked through for the last line of all that runs: some 15 ms
MAX_EVIDENCE = 50  # nodes
MAX_BLOCKED = 200  # of each kind that /why tells, but for gates
MAX_WITH_EVIDENCE = 20  # gates of a list; one that is asked for alone has it always
EVIDENCE_BYTES = 4 << 10
SOON_MS = 30_000  # without a heartbeat for so long an engine is said to be stale


def list_nodes_json(
    reads: Reads, run_id: str, state: str | None, after: Key | None, limit: int
) -> list[dict[str, Any]]:
    """Return nodes in document order of the newest frame, then those that have left the tree."""
    mounted = reads.of_frame(run_id, _names_of)
    start, left_after = 0, ("", -1)
    if after is not None:
        try:
            start = mounted.index(name_of(after)) + 1
        except ValueError:  # it has left the tree
            start, left_after = len(mounted), after
    names: Iterable[str] = itertools.islice(mounted, start, None)
    if state is not None:
        names = filter(reads.find_names(run_id, state).__contains__, names)
    keys = itertools.chain(
        map(key_of, names), _left_keys(reads, run_id, mounted, state, left_after)
    )
    nodes = (reads.get_node(run_id, key) for key in keys)
    page = itertools.islice((node for node in nodes if node is not None), limit)
    return [node_json(node, reads.list_attempts_of(run_id, node.key)) for node in page]


def _names_of(reads: Reads, run_id: str) -> list[str]:
    return mounted_names(reads.get_mounted(run_id))


def _left_keys(
    reads: Reads, run_id: str, mounted: list[str], state: str | None, after: Key
) -> Iterator[Key]:
    """Yield the nodes that have left the tree, in order of their keys."""
    if sum(reads.get_summary(run_id).values()) > len(mounted):
        left = sorted(map(key_of, reads.find_names(run_id, state).difference(mounted)))
        yield from itertools.dropwhile(after.__ge__, left)


def node_json(node: Node, attempts: Seq[Attempt]) -> dict[str, Any]:
    started = attempts[0].started_at_ms if attempts else None
    is_over = node.state in TERMINAL_STATES
    finished = (
        (attempts[-1].finished_at_ms if attempts else node.updated_at_ms) if is_over else None
    )
    duration = None if started is None or finished is None else max(0, finished - started)
    errors = [attempt.error_json for attempt in attempts if attempt.error_json]
    return {
        "nodeId": node.node_id,
        "iteration": node.iteration,
        "label": node.label,
        "state": node.state,
        "attempts": len(attempts),
        "startedAtMs": started,
        "finishedAtMs": finished,
        "durationMs": duration,
        "error": json.loads(errors[-1]) if errors and node.state != "finished" else None,
    }


def node_detail_json(
    reads: Reads, run: Run, node_id: str, iteration: int | None, with_traceback: bool = False
) -> dict[str, Any]:
    """Return one node with its attempts, output, gate, needs and last lines.

    Without an iteration the newest one. Raises NodeNotFound.
    """
    iterations = reads.list_iterations(run.run_id, node_id)
    if not iterations or iteration is not None and iteration not in iterations:
        at = "" if iteration is None else f" in iteration {iteration}"
        raise NodeNotFound(f"there is no node {node_id!r}{at}")
    key = (node_id, iterations[-1] if iteration is None else iteration)
    node, attempts = reads.get_node(run.run_id, key), reads.list_attempts_of(run.run_id, key)
    assert node is not None
    output = reads.find_output(run.run_id, *key)
    gate = reads.get_gate(run.run_id, key)
    shown = []
    for attempt in attempts:
        one = {
            "attempt": attempt.attempt,
            "state": attempt.state,
            "startedAtMs": attempt.started_at_ms,
            "finishedAtMs": attempt.finished_at_ms,
            "error": json.loads(attempt.error_json) if attempt.error_json else None,
        }
        if with_traceback:
            one["traceback"] = attempt.meta.get("traceback")
        shown.append(one)
    log = last_lines(reads, run.run_id, key, 100)
    return {
        **node_json(node, attempts),
        "attempts": shown,
        "output": None if output is None else json.loads(output),
        "gate": None if gate is None or gate.is_pause else gate_json(reads, run, gate, node.label),
        "needs": needs_of(reads.get_tree(run.run_id), node_id),
        "log": log,
    }


def has_ended(nodes: range, unended: Seq[int]) -> bool:
    """Return whether none of these nodes is one of the others, which are in order."""
    at = bisect.bisect_left(unended, nodes.start)
    return at == len(unended) or unended[at] >= nodes.stop


class Stretch(NamedTuple):
    """Nodes that follow each other in one element. Nodes have numbers, in document order."""

    first: int
    stop: int
    piece: int  # of the text, that of the first one
    is_parallel: bool
    before: range  # the nodes of the part directly before it: before each of its own in a Parallel
    loops: tuple[str, ...]  # the loops around it


_TREE_TEXT = re.compile(r'\{"kind":"text","text":"(?:[^"\\]|\\.)*"\},?')


class Outline:
    """Where the nodes of a stored tree stand, read from its text.

    Parsed, 60,000 nodes are 300,000 objects; here only what opens or closes a container is looked
    at. Quotes within a value are escaped, so what is looked for is never part of one.
    """

    _ELEMENT = '{"kind":"element","tag":"'
    _LEAF = Task.tag + '",'
    _LEAF_END = ',"children":[]},'  # and another element follows it in the same one
    _MAX_LOOKS = 1000

    def __init__(self, xml_json: str) -> None:
        self._text = xml_json
        self._pieces = pieces = xml_json.split(self._ELEMENT)[1:]
        self._stretches: list[Stretch] = []
        self._containers: set[str] = set()  # the ids of those that have one
        self._found, self._looks = (0, -1), 0  # where the last node stood that was looked for
        leaf, end = self._LEAF, self._LEAF_END
        edges = [n for n, p in enumerate(pieces) if not p.endswith(end) or not p.startswith(leaf)]
        # Of the open element: what is before its next child, the loops, its first node.
        is_parallel, before, first = False, range(0), 0
        loops: tuple[str, ...] = ()
        outer: list[tuple[bool, range, tuple[str, ...], int]] = []
        count = seen = 0  # nodes and pieces
        for edge in edges:
            piece = pieces[edge]
            if '"kind":"text"' in piece:  # another program's
                piece = _TREE_TEXT.sub("", piece)
            is_leaf = piece.startswith(leaf)
            stop = count + edge + is_leaf - seen
            if count < stop:
                self._stretches.append(Stretch(count, stop, seen, is_parallel, before, loops))
                if not is_parallel:
                    before = range(stop - 1, stop)
            count, seen = stop, edge + 1
            if not is_leaf:
                outer.append((is_parallel, before, loops, first))
                is_parallel, first = piece.startswith(Parallel.tag + '"'), count
                if '"id":"' in piece:
                    self._containers.add(_id_in(piece))
                if piece.startswith(Loop.tag + '"'):
                    loops = (*loops, _id_in(piece))
                if piece.endswith("["):
                    continue  # its first child is next
            ends = piece.count("]}", piece.rfind(',"children":[')) - is_leaf
            while ends > 0 and outer:
                below, ends = range(first, count), ends - 1
                is_parallel, before, loops, first = outer.pop()
                if not is_parallel:
                    before = below
        self.count = count
        self._firsts = [stretch.first for stretch in self._stretches]

    @functools.cached_property
    def numbers(self) -> Mapping[str, int]:
        """The number of each node by its id."""
        ids = re.findall('"id":"([^"]*)', self._text)
        if self._containers:
            ids = [id for id in ids if id not in self._containers]
        return dict(zip(ids, range(len(ids))))

    def number_of(self, id: str) -> int | None:
        """Return the number of a node by its id, None when it is not in the tree.

        A few that come in order are looked for in the text, from where the last one was found.
        """
        self._looks += 1
        if self._looks > self._MAX_LOOKS:
            return self.numbers.get(id)
        begin, number = self._found
        at = self._text.find(f'"id":"{id}"', begin)
        if at < 0:
            begin, number, self._looks = 0, -1, self._looks + 100  # from the beginning
            at = self._text.find(f'"id":"{id}"')
        if at < 0 or id in self._containers:
            return None
        number += self._text.count(self._ELEMENT + self._LEAF, begin, at)
        self._found = at, number
        return number

    def names(self, mounted: list[str]) -> list[str]:
        """Return the mounted ids, one for each node."""
        if len(mounted) == self.count:
            return mounted
        by_id = {plain_id(key_of(name)[0]): name for name in mounted}  # another program's
        return [by_id.get(id, "") for id in self.numbers]

    def _stretch_of(self, number: int) -> Stretch:
        return self._stretches[bisect.bisect_right(self._firsts, number) - 1]

    def _piece_of(self, number: int) -> str:
        stretch = self._stretch_of(number)
        return self._pieces[stretch.piece + number - stretch.first]

    def id(self, number: int) -> str:
        return _id_in(self._piece_of(number))

    def props(self, number: int) -> Mapping[str, str]:
        text = self._piece_of(number).partition('"props":')[2].rpartition(',"children":[')[0]
        return dict(json.loads(text))

    def goes_on_if_failed(self, number: int) -> bool:
        return '"continueOnFail":"true"' in self._piece_of(number)

    def loops(self, number: int) -> tuple[str, ...]:
        return self._stretch_of(number).loops

    def before(self, number: int) -> range:
        """Return the nodes of the part of the tree that comes directly before a node."""
        stretch = self._stretch_of(number)
        is_first = stretch.is_parallel or number == stretch.first
        return stretch.before if is_first else range(number - 1, number)

    def ids_before(self, node_id: str, most: int = 0) -> list[str]:
        """Return the ids of those nodes: the last so many, if it says how many."""
        number = self.number_of(plain_id(node_id))
        return [] if number is None else list(map(self.id, self.before(number)[-most:]))

    def reached(self, unended: Seq[int]) -> Iterator[int]:
        """Yield those of these nodes, given in order, that have none of them directly before."""
        stop = 0
        for stretch in self._stretches:
            start, stop = stop, bisect.bisect_left(unended, stretch.stop, stop)
            if start == stop:
                continue
            if stretch.is_parallel:
                if has_ended(stretch.before, unended):
                    yield from unended[start:stop]
                continue
            previous = -2 if has_ended(stretch.before, unended) else stretch.first - 1
            for number in unended[start:stop]:
                if number > previous + 1:
                    yield number
                previous = number


def _outline_of(reads: Reads, run_id: str) -> Outline:
    return Outline(reads.get_tree(run_id))


def _id_in(piece: str) -> str:
    return piece.partition('"id":"')[2].partition('"')[0]


def props_of(xml_json: str, node_id: str) -> Mapping[str, str]:
    """Return the props of a node of a stored tree, none when it is not there.

    Found in its text: to parse the tree of 60,000 nodes would take some 100 ms.
    """
    at = xml_json.find('"id":' + to_json(plain_id(node_id)))
    if at < 0:
        return {}
    begin = xml_json.rindex('"props":', 0, at) + len('"props":')
    return dict(json.JSONDecoder().raw_decode(xml_json, begin)[0])


def needs_of(xml_json: str, node_id: str) -> list[str]:
    return [id for id in props_of(xml_json, node_id).get("dependsOn", "").split(",") if id]


def attempt_span(reads: Reads, run_id: str, attempt: Attempt) -> tuple[int, int, bool]:
    """Return the seqs of a log between which an attempt's events stand.

    And whether that is sure: where the clock has stepped back, the log is not in order of time.
    """
    first = reads.first_seq_since(run_id, attempt.started_at_ms)
    end = attempt.finished_at_ms
    last = reads.get_newest_seq(run_id) if end is None else reads.first_seq_since(run_id, end + 1)
    event = next(iter(reads.list_events(run_id, first - 1, 1)), None)
    return first, last, event is not None and event.timestamp_ms == attempt.started_at_ms


def last_lines(
    reads: Reads, run_id: str, key: Key, count: int, look: int = MAX_SCANNED_EVENTS
) -> list[dict[str, Any]]:
    """Return the last so many lines of a node, oldest first, from so many events looked through."""
    events: list[Event] = []
    left, are_sure, later = look, True, INT64_MAX
    for attempt in reversed(reads.list_attempts_of(run_id, key)):
        first, last, is_sure = attempt_span(reads, run_id, attempt)
        last = min(last, later - 1)  # two may share a millisecond
        later = first = max(first, last - left)
        left, are_sure = left - max(0, last - first), are_sure and is_sure
        wanted = count - len(events)
        events[:0] = reads.list_outputs(run_id, key, None, first - 1, last, newest=wanted)
        if left <= 0 or len(events) == count:
            break
    if not events and not are_sure:
        newest = reads.get_newest_seq(run_id)
        events = reads.list_outputs(run_id, key, None, newest - look, newest=count)
    lines = [(event.payload, event.timestamp_ms) for event in events]
    names = ("attempt", "stream", "text")
    return [{**{n: line.get(n) for n in names}, "timestampMs": at} for line, at in lines]


def lines_of(reads: Reads, run_id: str, keys: Seq[Key], after_seq: int) -> list[Event]:
    """Return all NodeOutput events of these nodes after a seq, in order of the log."""
    found: dict[int, Event] = {}
    for key in keys:
        for attempt in reads.list_attempts_of(run_id, key):
            first, last, is_sure = attempt_span(reads, run_id, attempt)
            if not is_sure:  # nor is it for others, then: once through the whole log
                every = reads.list_outputs(run_id, None, None, after_seq)
                wanted = set(keys)
                return [e for e in every if (e.payload["nodeId"], e.payload["iteration"]) in wanted]
            events = reads.list_outputs(run_id, key, None, max(after_seq, first - 1), last)
            found.update((event.seq, event) for event in events)
    return [found[seq] for seq in sorted(found)]


def gate_json(
    reads: Reads,
    run: Run,
    gate: Gate,
    label: str | None,
    look: int = MAX_SCANNED_EVENTS,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a gate as whoever decides should see it, with what led to it unless `look` is 0.

    `known` is for what was found of the nodes before: many gates may stand on the same ones.
    """
    request = gate.request
    asked = gate.requested_at_ms
    shown = {
        "runId": run.run_id,
        "nodeId": gate.node_id,
        "iteration": gate.iteration,
        "workflowName": run.workflow_name,
        "runStatus": run.status,
        "label": label,
        "requestTitle": request.get("title") or label,
        "requestSummary": request.get("summary"),
        "metadata": request.get("metadata"),
        "requestedAtMs": asked,
        "waitingMs": None if asked is None else (gate.decided_at_ms or now_ms()) - asked,
        "deadlineAtMs": gate.deadline_at_ms,
        "onDeny": request.get("onDeny"),
        "onTimeout": request.get("onTimeout"),
        "approvers": request.get("approvers"),
        "status": gate.status,
        "note": gate.note,
        "decidedBy": gate.decided_by,
        "decidedAtMs": gate.decided_at_ms,
    }
    if look:
        known = {} if known is None else known
        ids = _evidence_ids(reads, run.run_id, gate)
        for id in ids:
            if id not in known:
                known[id] = evidence_json(reads, run.run_id, id, look)
        shown["evidence"] = [known[id] for id in ids if known[id] is not None]
    return shown


def _evidence_ids(reads: Reads, run_id: str, gate: Gate) -> list[str]:
    """Return what a gate needs, or what ran before it."""
    ids = gate.request.get("needs")
    if "needs" not in gate.request:  # a gate of the original's
        ids = needs_of(reads.get_tree(run_id), gate.node_id)
    return list(ids or reads.of_frame(run_id, _outline_of).ids_before(gate.node_id, MAX_EVIDENCE))


def evidence_json(reads: Reads, run_id: str, id: str, look: int) -> dict[str, Any] | None:
    """Return the state, output and last lines of a node in its newest iteration."""
    node = reads.find_newest_node(run_id, id)
    if node is None:
        return None
    output = reads.find_output(run_id, *node.key)
    cut = (output or "").encode()[:EVIDENCE_BYTES].decode("utf-8", "ignore")
    is_long = output is not None and cut != output
    detail = node_json(node, reads.list_attempts_of(run_id, node.key))
    return {
        "nodeId": node.node_id,
        "iteration": node.iteration,
        "state": node.state,
        "error": detail["error"],
        "output": cut if is_long else _loaded(output),
        "isCut": is_long,
        "log": last_lines(reads, run_id, node.key, 20, look),
    }


def _loaded(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def approvals_json(
    reads: Reads,
    run: Run,
    status: str | None,
    after: tuple[int, Key] = (-1, ("", 0)),
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Return the gates of a run with this status (all when None), oldest request first.

    Those after this time of request and key, so many of them.
    """

    def place(gate: Gate) -> tuple[int, Key]:
        return gate.requested_at_ms or 0, gate.key

    gates = [gate for gate in reads.list_gates(run.run_id, status) if not gate.is_pause]
    gates = sorted((gate for gate in gates if place(gate) > after), key=place)[:limit]
    # What led to it counts for whoever has still to decide.
    count = sum(gate.status == "requested" for gate in gates)
    look = MAX_SCANNED_EVENTS // max(1, min(count, MAX_WITH_EVIDENCE))
    shown: list[dict[str, Any]] = []
    known: dict[str, Any] = {}
    for gate in gates:
        node = reads.get_node(run.run_id, gate.key)
        label = None if node is None else node.label
        is_looked_at = gate.status == "requested" and len(shown) < MAX_WITH_EVIDENCE
        shown.append(gate_json(reads, run, gate, label, look if is_looked_at else 0, known))
    return shown


def run_state(run: Run) -> str:
    """Return the later original's `runState`: what stands behind the status."""
    ended = {"finished": "succeeded", "continued": "succeeded"}
    if run.is_terminal or run.status == "queued":
        return ended.get(run.status, run.status)
    life = owner_life(run)
    is_silent = now_ms() - (run.heartbeat_at_ms or 0) > SOON_MS
    if life == "dead":
        return run.status if run.status == "waiting-approval" else "orphaned"
    return "stale" if life == "unseen" and is_silent else run.status


def blocked_item(kind: str, node: Node | None, since_ms: int | None, detail: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "nodeId": None if node is None else node.node_id,
        "iteration": None if node is None else node.iteration,
        "sinceMs": since_ms,
        "detail": detail,
    }


def why_json(reads: Reads, run: Run) -> dict[str, Any]:
    """Return why a run stands where it stands: its state, and everything that it waits for."""
    error = json.loads(run.error_json) if run.error_json else None
    state = run_state(run)
    blocked: list[dict[str, Any]] = []
    if not run.is_terminal:
        is_parked = run.status == "waiting-approval" and is_attended(run)
        is_driven = owner_life(run) != "dead" or is_parked
        nodes = reads.list_busy_nodes(run.run_id)
        gates = reads.list_gates(run.run_id, "requested")
        blocked += _why_owner(run, state, is_driven)
        blocked += _why_gates(reads, run, gates, {node.key: node for node in nodes})
        blocked += _why_tasks(reads, run, nodes)
        blocked += _why_pending(reads, run, nodes, gates, is_driven)
    return {"state": state, "blocked": blocked, "error": error}


def _why_owner(run: Run, state: str, is_driven: bool) -> Iterator[dict[str, Any]]:
    if run.status == "queued":
        detail, since = "waits until a worker is free", run.created_at_ms
        yield blocked_item("owner", None, since, detail)
    elif not is_driven:
        detail = "no engine drives the run: resume it"
        yield blocked_item("owner", None, run.heartbeat_at_ms, detail)
    elif state == "stale":
        detail = "its engine gives no sign of life"
        yield blocked_item("owner", None, run.heartbeat_at_ms, detail)


def _why_gates(
    reads: Reads, run: Run, gates: Seq[Gate], nodes: Mapping[Key, Node]
) -> Iterator[dict[str, Any]]:
    for gate in gates:
        node = nodes.get(gate.key) or reads.get_node(run.run_id, gate.key)
        since, due = gate.requested_at_ms, gate.deadline_at_ms
        if gate.is_pause:
            yield blocked_item("pause", node, since, f"goes on {due_text(due or 0)}")
            continue
        title = gate.request.get("title") or (None if node is None else node.label)
        yield blocked_item("approval", node, since, title or "waits for a decision")
        if due is not None:
            then, left = gate.request.get("onTimeout"), duration_text(due - now_ms())
            yield blocked_item("timeout", node, since, f"without a decision: {then} in {left}")


def _why_tasks(reads: Reads, run: Run, nodes: Iterable[Node]) -> Iterator[dict[str, Any]]:
    running = [node for node in nodes if node.state == "in-progress"][:MAX_BLOCKED]
    seen_from = reads.get_newest_seq(run.run_id) - RECENT_EVENTS
    spoken = reads.newest_outputs(run.run_id, [node.key for node in running], seen_from)
    for node in running:
        event = spoken.get(node.key)
        nothing = "no line yet" if seen_from < 0 else "no line of late"
        said = nothing if event is None else f"last line: {event.payload['text']}"
        yield blocked_item("task", node, node.updated_at_ms, said)


def _why_pending(
    reads: Reads, run: Run, nodes: Seq[Node], gates: Iterable[Gate], is_driven: bool
) -> Iterator[dict[str, Any]]:
    """Yield what waits for its next attempt; then what waits for a place, or for other nodes."""
    if not reads.get_summary(run.run_id).get("pending"):
        return
    tried = {name_of(node.key): node for node in nodes if node.state == "pending"}
    if not is_driven and not tried:
        return
    tree = reads.of_frame(run.run_id, _outline_of)
    told_of = {name_of(node.key) for node in nodes}
    for name, node in itertools.islice(tried.items(), MAX_BLOCKED):
        last = reads.list_attempts_of(run.run_id, node.key)[-1:]
        due_ms = last[0].meta.get("dueAtMs") if last else None
        if due_ms is None:
            told_of.remove(name)  # it was interrupted, and is queued like any other
            continue
        number = tree.number_of(plain_id(node.node_id))
        options = {} if number is None else tree.props(number)
        said = f"its {attempt_text(last[0].attempt + 1, options)} is due {due_text(due_ms)}"
        yield blocked_item("retry", node, last[0].finished_at_ms, said)
    failed = (tree.number_of(plain_id(n.node_id)) for n in nodes if n.state == "failed")
    if not is_driven or not all(n is None or tree.goes_on_if_failed(n) for n in failed):
        return
    told_of.update(name_of(gate.key) for gate in gates)
    names = tree.names(reads.of_frame(run.run_id, _names_of))
    unended = _unended_numbers(reads, run.run_id, names, nodes)
    queued = _queued_nodes(reads, run.run_id, tree, names, unended, told_of)
    for node, needed in itertools.islice(queued, MAX_BLOCKED):
        kind = "dependency" if needed else "concurrency"
        said = f"waits for {needed}" if needed else "ready, and waits for a free place"
        yield blocked_item(kind, node, node.updated_at_ms, said)


def _unended_numbers(
    reads: Reads, run_id: str, names: Iterable[str], busy: Iterable[Node]
) -> list[int]:
    """Return the numbers of the nodes that are open or pending, in order."""
    are_open = {name_of(node.key) for node in busy if node.state != "failed"}
    counts = reads.get_summary(run_id)
    if 2 * counts.get("pending", 0) < sum(counts.values()):
        unended = reads.find_names(run_id, "pending")
        unended.update(are_open)
        return [n for n, name in enumerate(names) if name in unended]
    ended = reads.find_names(run_id, other="pending")  # they are fewer
    ended -= are_open
    return [n for n, name in enumerate(names) if name and name not in ended]


def _queued_nodes(
    reads: Reads,
    run_id: str,
    tree: Outline,
    names: Seq[str],
    unended: list[int],
    told_of: set[str],
) -> Iterator[tuple[Node, str]]:
    """Yield the nodes whose turn has come, but for those told of, with what else they wait for."""
    loops = {plain_id(id) for id, (_, done) in reads.list_loops(run_id).items() if not done}

    def must_end(id: str, around: tuple[str, ...]) -> bool:
        """Return whether a node, or a loop around it that is none of these, goes on."""
        number = tree.number_of(id)
        return number is not None and (
            not has_ended(range(number, number + 1), unended)
            or any(loop in loops and loop not in around for loop in tree.loops(number))
        )

    for number in tree.reached(unended):
        name = names[number]
        node = None if name in told_of else reads.get_node(run_id, key_of(name))
        if node is not None and node.state == "pending":
            needs, around = tree.props(number).get("dependsOn"), tree.loops(number)
            needed = [id for id in needs.split(",") if must_end(id, around)] if needs else ()
            yield node, ", ".join(needed)


def attempt_text(attempt: int, props: Mapping[str, str]) -> str:
    """Return `2nd attempt of 3`; without the total where it would mislead.

    Attempts that were interrupted have numbers too, but do not count.
    """
    most = 1 + int(props.get("retries", 0))
    return f"{ordinal(attempt + 1)} attempt" + (f" of {most}" if attempt < most else "")


def ordinal(number: int) -> str:
    ends = {1: "st", 2: "nd", 3: "rd"}
    is_teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if is_teen else ends.get(number % 10, 'th')}"


def due_text(at_ms: int) -> str:
    text = duration_text(at_ms - now_ms())
    return text if text == "now" else f"in {text}"


def duration_text(ms: float) -> str:
    """Return a duration as people say it: `3 min`, `2 h`; `now` when it is over, or nearly."""
    seconds = ms / 1000
    for limit, divisor, unit in (
        (0.5, 1, ""),
        (90, 1, "s"),
        (5400, 60, "min"),
        (129600, 3600, "h"),
    ):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}" if unit else "now"
    return f"{seconds / 86400:.0f} days"


# ---------------------------------------------------------------------------
# Page: what a browser shows, and how it looks
# ---------------------------------------------------------------------------

# One document that holds no data: whoever may load it learns nothing. It runs in browsers of 2021,
# asks only the routes below, by relative addresses, and never turns text into markup.
PAGE_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --ink: #18202c; --quiet: #525d6e; --line: #dbe0e8;
  --edge: #7a8698; --accent: #1f51bd; --yes: #1b6e40;
  --waiting: #854700; --running: #1c4bb0; --finished: #17653a; --failed: #ad231c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141b; --card: #181e28; --ink: #e8ecf3; --quiet: #a5b0c0; --line: #2b3442;
    --accent: #93b5ff; --waiting: #ffc875; --running: #a3c1ff; --finished: #85dba0;
    --failed: #ffa49b;
  }
}
* { box-sizing: border-box; overflow-wrap: anywhere; unicode-bidi: isolate; }
[hidden] { display: none !important; }
html { scroll-padding: 7rem 0 2rem; overflow-y: scroll; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, p, pre { margin: 0; }
h1 { font-size: 1.5rem; line-height: 1.3; } h2 { font-size: 1.05rem; }
h1:focus { outline: none; }
a { color: var(--accent); }
.mono, pre, .log { font-family: ui-monospace, monospace; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: .4rem; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.quiet { color: var(--quiet); }
.mono, pre, .log, .small, .more, .phase, .pill { font-size: .875rem; }
.text { white-space: pre-wrap; }

header { position: sticky; top: 0; z-index: 3; background: var(--card);
  border-bottom: 1px solid var(--line); }
#top, main { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
.bar { display: flex; align-items: center; gap: .75rem; padding: .75rem 0 .25rem; }
.bar strong, .what > span { display: block; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.phase { margin-left: auto; flex: none; color: var(--quiet); }
.phase::before { content: "● "; } .phase.live::before { color: var(--finished); }
.phase.offline { color: var(--failed); font-weight: 600; }
nav { display: flex; gap: 1.25rem; min-height: 2.75rem; }
nav a, .back, .tick { display: flex; align-items: center; gap: .4rem; min-height: 2.75rem; }
nav a { min-width: 2.75rem; color: var(--quiet); text-decoration: none;
  border-bottom: 2px solid transparent; }
nav a[aria-current] { color: var(--ink); font-weight: 600; border-color: var(--accent); }
.pill { flex: none; justify-self: start; padding: 0 .6rem; border: 1px solid; border-radius: 1rem;
  font-weight: 600; color: var(--quiet); }

main { padding-bottom: 4rem; }
#notice > *, #main > * { margin-top: 1.5rem; }
#main > p:first-child { margin: .5rem 0 -1.25rem; }
.stack > * + *, .card > * + *, .item > * + *, .notice > * + *,
dialog > * + * { margin-top: .75rem; }
.stack:empty, [role=status]:empty { margin: 0 !important; }
.card, .notice, dialog { border: 1px solid var(--line); border-radius: .75rem; padding: 1.25rem;
  background: var(--card); }
.item + .item { padding-top: 1rem; border-top: 1px solid var(--line); }
.notice { border-color: currentColor; }
.waiting { color: var(--waiting); } .running { color: var(--running); }
.finished { color: var(--finished); } .failed, .bad { color: var(--failed); }
.split, .facts, .chips, .answers { display: flex; flex-wrap: wrap; gap: .5rem 1rem;
  align-items: center; }
.split > :first-child { flex: 1 1 14rem; min-width: 0; }
.split > input { flex: 0 1 16rem; margin: 0; }
.meter { height: .375rem; border-radius: 1rem; background: var(--line); overflow: hidden; }
.meter span { display: block; height: 100%; min-width: 3px; background: currentColor; }
.gate { border-left: .3rem solid var(--waiting); } .gate > * { margin: 0; }
.fail { border-left: .3rem solid var(--failed); }

button, .button { display: inline-flex; align-items: center; justify-content: center; gap: .4rem;
  min-height: 2.75rem; padding: .5rem 1.1rem; border: 1px solid var(--edge); border-radius: .5rem;
  font: inherit; font-weight: 600; color: var(--ink); background: var(--card); cursor: pointer;
  text-decoration: none; }
button:hover, .button:hover, .node:hover { background: var(--page); }
button[disabled] { opacity: .55; cursor: not-allowed; }
button.yes { color: #fff; background: var(--yes); border-color: var(--yes); }
button.no { color: var(--failed); border-color: currentColor; }
.chips button { border-radius: 2rem; padding: .25rem .9rem; font-weight: 500; }
.chips [aria-pressed=true] { color: var(--accent); border-color: var(--accent);
  box-shadow: inset 0 0 0 1px var(--accent); }
.answers { justify-content: space-between; gap: 1.5rem; }
label { display: block; font-weight: 600; } label .quiet { font-weight: 400; }
input, textarea { display: block; width: 100%; min-height: 2.75rem; margin-top: .3rem;
  padding: .55rem .75rem; border: 1px solid var(--edge); border-radius: .5rem; font: inherit;
  font-weight: 400; color: inherit; background: var(--page); }
textarea { min-height: 5.5rem; }
.tick input { width: 1.25rem; min-height: 1.25rem; margin: 0; }

.list, .lines { position: relative; }
.list > div { position: absolute; width: 100%; height: 3.75rem;
  border-top: 1px solid var(--line); }
.node { display: grid; grid-template-columns: 6.5rem 1fr 6.5rem; gap: 0 1rem; align-items: center;
  height: 100%; padding: 0 .5rem; color: inherit; text-decoration: none; }
.took { justify-self: end; } .what { min-width: 0; }
.more { line-height: 1.25; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { padding: .5rem .75rem .5rem 0; text-align: left; vertical-align: top;
  border-top: 1px solid var(--line); }
th { width: 30%; font-weight: 400; color: var(--quiet); }
pre, .log { border-radius: .5rem; background: var(--page); border: 1px solid var(--line);
  color: var(--ink); overflow: auto; }
pre { padding: .75rem 1rem; max-height: 22rem; white-space: pre-wrap; }
.log { height: calc(100vh - 16rem); min-height: 16rem; }
.lines > div { position: absolute; min-width: 100%; padding: 0 1rem; line-height: 1.5rem;
  white-space: pre; }
.log time, .log a { margin-right: 1rem; color: var(--quiet); }
dialog { width: 32rem; max-width: calc(100% - 2rem); color: inherit; }
dialog::backdrop { background: #0009; }
@media (max-width: 40rem) {
  #top, main { padding-left: .75rem; padding-right: .75rem; }
  .card { padding: 1rem; }
  .answers { flex-direction: column-reverse; align-items: stretch; }
  .gate .button, .split > input { flex: 1 1 100%; }
  .list > div { height: 5.5rem; }
  .node { grid-template-columns: auto 1fr; align-content: center; gap: .3rem 1rem; padding: 0; }
  .what { grid-column: 1 / 3; grid-row: 1; }
  .log time { display: none; }
}
"""


# ---------------------------------------------------------------------------
# Script: what the page asks for, keeps and sends
# ---------------------------------------------------------------------------

SCRIPT_OF_STATE = r"""
"use strict";
// A run's routes are beside this page, or for an address "#/runs/ID/..." at "./v1/runs/ID".
let runPath = "";
const isServer = document.documentElement.className === "server";  // of many runs
const encode = encodeURIComponent;
const link = (...parts) => "#/" + runPath + parts.map(encode).join("/");

const KINDS = {  // of statuses and states that are shown like another one
  "in-progress": "running", "waiting-approval": "waiting", requested: "waiting",
  continued: "finished", approved: "finished", denied: "failed",
};
const OVER = ["failed", "finished", "skipped", "cancelled"];
const ENDED = OVER.concat("continued");

// What is known of the run, or of all: `order` is the tree's, `gates` those that wait.
let state, allRuns = null;
function forget() {
  state = { run: null, why: null, nodes: new Map(), order: [], gates: new Map(), lines: [],
    first: -1, last: -1, isWhole: false, version: 0, clock: 0 };
}
forget();
let phase = "loading";  // live, offline, ended, paused, missing, locked or refused
let trouble = "", said = ["", ""];  // why it is offline; what came of the last deed
let skew = 0;  // how far the server's clock is ahead of this one's
let view = null;
const notes = new Map();  // what somebody has begun to write, by gate: never lost
const now = () => Date.now() + skew;
const isLocked = () => phase === "locked" || phase === "refused";
const isOver = () => state.run !== null && ENDED.includes(state.run.status);
const hasNoEngine = () => state.why !== null && !isOver() && state.run.status !== "queued" &&
  state.why.blocked.some((item) => item.kind === "owner");
const keyOf = (node) => node.nodeId + "::" + node.iteration;

function kept(name, value) {  // for this tab only
  const key = `smithers.${name}@${location.pathname}`;
  try {
    if (value !== undefined) sessionStorage.setItem(key, value);
    return sessionStorage.getItem(key) || "";
  } catch (error) { return value || ""; }  // it is forbidden here
}
let token = kept("token"), myName = kept("name");

// --- Elements. Text becomes text nodes: nothing here ever parses markup.
function el(spec, ...parts) {
  const [tag, ...classes] = spec.split("."), node = document.createElement(tag);
  node.className = classes.join(" ");
  for (const part of parts.flat(9)) {
    if (!part && part !== 0) continue;
    if (part.constructor !== Object) { node.append(part); continue; }
    for (const [name, value] of Object.entries(part)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") node.style.cssText = value;
      else if (value || value === 0) node.setAttribute(name, value === true ? "" : value);
    }
  }
  return node;
}
const byId = (id) => document.getElementById(id);

// Make the children of `old` like `fresh`, changing only what differs: focus, selection, scrolling
// and half-made clicks survive. Listeners stay the old ones.
function morph(old, fresh) {
  const keyed = new Map(Array.from(old.children, (child) => [child.dataset.key, child]));
  let at = old.firstChild;
  for (const want of fresh) {
    const { key } = want.dataset || {}, have = key === undefined ? at : keyed.get(key);
    if (!have || have.nodeName !== want.nodeName || (have.dataset || {}).key !== key) {
      old.insertBefore(want, at);
      continue;
    }
    if (have === at) at = at.nextSibling;
    else old.insertBefore(have, at);
    if (want.data !== have.data) have.data = want.data;
    if (want.nodeType === 3) continue;
    for (const { name } of Array.from(have.attributes)) {
      if (!want.hasAttribute(name)) have.removeAttribute(name);
    }
    for (const { name, value } of want.attributes) {
      if (have.getAttribute(name) === value) continue;
      if (name === "style") have.style.cssText = value;
      else have.setAttribute(name, value);
    }
    if (want.type === "checkbox") have.checked = want.checked;
    morph(have, Array.from(want.childNodes));
  }
  for (let next; at; at = next) {
    next = at.nextSibling;
    at.remove();
  }
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);
const kindOf = (name) => KINDS[name] || name;
const wordOf = (name) => capital(/approved|denied/.test(name) ? name : kindOf(name));
const pill = (name) => el("span", { class: "pill " + kindOf(name) }, wordOf(name));
const nameOf = (node) => node.nodeId + (node.iteration ? " · turn " + (node.iteration + 1) : "");
const hrefOf = (node) => link("node", node.nodeId, node.iteration);
const button = (text, kind, onclick, more) =>
  el("button", { type: "button", class: kind, onclick }, more, text);
const card = (title, ...parts) => el("section.card", el("h2", title), parts);
const nameField = () => el("input", { value: myName, autocomplete: "name", maxlength: 200,
  oninput: (event) => { myName = kept("name", event.target.value); } });
function noteField(key) {
  const field = el("textarea", { maxlength: 10000,
    oninput: (event) => notes.set(key, event.target.value) });
  field.value = notes.get(key) || "";
  return field;
}
const pre = (text) => el("pre", { tabindex: 0 }, text);
const heading = (text) => el("h1", { tabindex: -1 }, text);
const quiet = (...parts) => el("p.quiet", parts);
const lead = (title, ...parts) => el("section.card", heading(title), parts);
const told = () => el("p", { role: "status", class: said[1] && "notice " + said[0] }, said[1]);
const jsonText = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));
const problem = (error) => error && el("p.bad.text", jsonText(error.message));
const plain = (text) => text.replace(/\x1b\[[0-9;?]*[A-Za-z]/g, "").replace(/\t/g, "    ");
const many = (count, noun, rest = "") => count + " " + noun + (count === 1 ? "" : "s") + rest;
const waitingText = (count) =>
  count === 1 ? "1 decision is waiting" : many(count, "decision", " are waiting");
const clock = (at) => new Date(at).toLocaleTimeString([], { hour12: false });
const ago = (at, most) => (now() - at < 2000 ? "just now" : span(now() - at, most) + " ago");
function span(ms, most = 2) {
  if (ms < 1000) return Math.max(0, Math.round(ms)) + " ms";
  let rest = Math.floor(ms / 1000);
  const parts = [[86400, " d"], [3600, " h"], [60, " min"], [1, " s"]].map(([size, unit]) => {
    const count = Math.floor(rest / size);
    rest %= size;
    return count + unit;
  });
  const isSome = (part) => part[0] !== "0", first = parts.findIndex(isSome);
  return parts.slice(first, first + most).filter(isSome).join(" ");
}

// --- Questions
async function send(path, options) {
  const headers = { ...options.headers }, used = token;
  if (token) headers.Authorization = "Bearer " + token;
  const url = "./" + (runPath ? ("v1/" + runPath + path).replace(/\/$/, "") : path);
  const response = await fetch(url, { cache: "no-store", ...options, headers });
  const served = Date.parse(response.headers.get("Date"));
  if (Math.abs(served - now()) > 2000) skew = served - Date.now();
  if (response.ok) return response;
  let answer = {};
  try { answer = (await response.json()).error || {}; } catch (error) { /* a proxy's own page */ }
  if (response.status === 401 && used === token) {  // not the answer to an older one
    phase = token ? "refused" : "locked";
    hangUp();
    dirty();
  }
  const message = answer.message || "the server answered " + response.status;
  throw Object.assign(new Error(message), { status: response.status });
}
const read = async (path) => (await send(path, {})).json();

const REFUSALS = { 403: "You may not do this", 404: "This is no longer there",
  409: "Nothing was changed", 413: "The text is too long", 414: "The address is too long",
  431: "The browser sends too much with it, such as cookies" };
function tellFailure(error, what) {
  if (error.status === undefined) return what + " may have arrived or not: the " +
    "connection was lost. It shows here once the server is back.";
  return `${REFUSALS[error.status] || "It did not work"}: ${error.message}.`;
}

// Do what was asked twice, and tell what came of it.
async function act(path, body, what, done) {
  said = ["", "Sending…"];
  dirty();
  try {
    await send(path, { method: "POST", body: JSON.stringify(body) });
    said = ["finished", done()];
  } catch (error) { said = ["failed", tellFailure(error, what) +
    (body.note ? " Your note is kept." : "")]; }
  if (view.reload) view.reload();
  dirty();
}

// Return a function that has `work` done once, a little later, however often it is called; the
// longer it takes, the more seldom.
function soon(ms, work) {
  let timer = 0, took = 0, last = Promise.resolve();
  const go = async () => {
    const began = Date.now();
    timer = 0;
    await work(state);
    took = Date.now() - began;
  };
  return () => {  // what fails is asked for again after the next connection
    if (!timer) timer = setTimeout(() => { last = last.then(go).catch(() => 0); },
      Math.max(ms, 5 * took));
  };
}

// --- The state, from snapshots and events. What an event says of a node stays when a snapshot
// that was asked for before comes after it.
const MOVES = {
  NodePending: "pending", NodeStarted: "in-progress", NodeFinished: "finished",
  NodeFailed: "failed", NodeCancelled: "cancelled", NodeSkipped: "skipped",
  NodeRetrying: "pending", NodeWaitingApproval: "waiting-approval",
};
function apply(event) {
  const { type, nodeId, iteration, timestampMs } = event, key = keyOf(event), move = MOVES[type];
  if (type === "RunStatusChanged") state.run.status = event.status;
  if (isOver()) state.run.finishedAtMs = state.run.finishedAtMs || timestampMs;
  if (/Granted|Denied/.test(type) || OVER.includes(move)) state.gates.delete(key);
  if (/Approval/.test(type)) refreshGates();
  if (move === undefined) return;
  let node = state.nodes.get(key);
  if (node === undefined) {
    state.nodes.set(key, node = { nodeId, iteration });
    loadNodes();
  }
  node.touched = ++state.clock;
  node.state = move;
  if (event.error) node.error = event.error;
  if (move === "in-progress") {
    node.attempts = event.attempt + 1;
    node.startedAtMs = node.startedAtMs || timestampMs;
    node.finishedAtMs = node.error = null;
  } else if (OVER.includes(move)) node.finishedAtMs = timestampMs;
}

// Read all nodes in the order of the tree, after a reconnect or when an event named a new one.
const loadNodes = soon(0, async (mine) => {
  const order = [], control = stream;
  try {
    for (let from = "", isMore = true; isMore;) {
      const asked = mine.clock, page = await read("nodes?limit=1000" + from);
      if (mine !== state) return;
      for (const shown of page) {
        const key = keyOf(shown), node = mine.nodes.get(key) || { touched: 0 };
        mine.nodes.set(key, Object.assign(node, shown, node.touched > asked && { ...node }));
        order.push(key);
      }
      isMore = page.length === 1000;
      from = "&after=" + encode(order[order.length - 1]);
      if (!mine.isWhole) mine.order = order;
      changed();
    }
    mine.order = order;
    mine.isWhole = true;
  } catch (error) { if (control) control.abort(); }  // and dial again
});

async function readGates(status) {
  const all = [];
  for (let from = "", last = true; last;) {
    const page = await read("approvals?status=" + status + from);
    all.push(...page);
    last = page[999];  // of a whole page
    from = last && `&after=${last.requestedAtMs}::${encode(keyOf(last))}`;
  }
  return all;
}
const refreshGates = soon(200, async (mine) => {
  mine.gates = new Map((await readGates("requested")).map((gate) => [keyOf(gate), gate]));
  changed();
});

const refreshWhy = soon(0, async (mine) => {
  mine.why = await read("why");
  dirty();
});

// --- The stream: at most one, none in a hidden tab; after a break it goes on where it was.
let stream = null, tries = 0, redial = 0, eagerUntil = 0;
function hangUp() {
  clearTimeout(redial);
  if (stream) stream.abort();
  stream = null;
}
async function connect() {
  clearTimeout(redial);
  if (stream || document.hidden || isLocked()) return;
  const control = stream = new AbortController();
  let pause = 0, watch = 0;
  const alive = () => {  // the server is silent for 10 s at most
    clearTimeout(watch);
    watch = setTimeout(() => control.abort(), 25000);
  };
  alive();
  try {
    if (runPath || !isServer) await followRun(control, alive);
    else pause = await readRuns(control);
  } catch (error) {
    if (stream === control) {
      phase = error.status === 404 ? "missing" : "offline";
      trouble = error.status && tellFailure(error);
    }
  }
  clearTimeout(watch);
  if (stream !== control) return;
  stream = null;
  if (isLocked() || document.hidden) return;
  if (isOver() && phase !== "missing" && (phase === "ended" || state.isWhole)) {
    phase = "ended";  // somebody may retry it
    pause = state.isWhole && Date.now() > eagerUntil ? 15000 : 500;
  } else if (!pause) {
    if (phase !== "missing") phase = "offline";
    pause = Math.min(15000, 500 * 2 ** tries++) * (0.75 + Math.random() / 2);
  }
  redial = setTimeout(connect, pause);
  if (state.run) refreshWhy();
  dirty();
}
async function followRun(control, alive) {
  const run = await read(""), old = state.run;
  if (stream !== control || state.isRead && old.finishedAtMs === run.finishedAtMs) return;
  if (old && (old.runId !== run.runId || old.startedAtMs !== run.startedAtMs)) forget();
  state.run = run;
  const isFirst = state.last < 0;
  changed();
  const response = await send(isFirst ? "events?last=500" : "events", {
    headers: isFirst ? {} : { "Last-Event-ID": state.last }, signal: control.signal });
  if (stream !== control) return;
  tries = 0;
  phase = isOver() ? "ended" : "live";
  loadNodes();
  refreshWhy();
  refreshGates();
  if (view.reload) view.reload();
  changed();
  if (response.status !== 204) await follow(response, alive, takeEvent);
  state.isRead = isOver();
  if (isOver()) phase = "ended";
}

// Give each event of a stream to `take`, until it says true or the stream ends.
async function follow(response, alive, take) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  for (let text = ""; ;) {
    const piece = await reader.read();
    if (piece.done) return;
    alive();
    const blocks = (text + decoder.decode(piece.value, { stream: true })).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const found = /^event: smithers\ndata: (.*)\nid: (\d+)$/.exec(block);
      if (found && take(Number(found[2]), JSON.parse(found[1]))) return;
    }
  }
}
function takeEvent(seq, event) {
  if (seq <= state.last) return;
  if (state.first < 0) state.first = seq;
  state.last = seq;
  apply(event);
  const line = lineOf(seq, event);
  if (line) state.lines.push(line);
  if (state.lines.length > 24000) {  // older ones can be asked for
    state.lines.splice(0, 4000);
    state.first = state.lines[0].seq;
  }
  if (view.onEvent) view.onEvent(event);
  changed();
}
async function loadOlder() {
  const mine = state, end = mine.first, from = Math.max(-1, end - 1001), older = [];
  const control = new AbortController();
  const response = await send("events?afterSeq=" + from, { signal: control.signal });
  await follow(response, () => 0, (seq, event) => {
    const line = seq < end && lineOf(seq, event);
    if (line) older.push(line);
    return seq >= end - 1;
  });
  control.abort();
  if (mine.first !== end) return;
  mine.lines = older.concat(mine.lines);
  mine.first = from + 1;
  changed();
}

const UNTOLD = /^(FrameCommitted|RunStatusChanged|NodePending|ApprovalRequested)$/;
function lineOf(seq, event) {
  const { nodeId, iteration, timestampMs: at, type, error } = event;
  const line = { seq, nodeId, iteration, at };
  if (type === "NodeOutput")
    return { ...line, text: plain(event.text), isBad: event.stream === "stderr" };
  if (UNTOLD.test(type)) return null;
  const by = event.decidedBy || event.by;
  const why = error ? error.message : event.note || event.reason;
  const word = type.replace(/^(Node|Approval|Run)/, "").replace(/\B[A-Z]/g, " $&").toLowerCase();
  const text = [!nodeId && "The run", word, by && "by " + by, why && "· " + why].filter(Boolean);
  return { ...line, text: text.join(" ").replace(/\s+/g, " "), isWord: true, isBad: error };
}

// --- All runs of a server: asked for now and then, without a stream. Where somebody must decide
// comes first, then what has failed within a day or is silent, what is under way, what has ended.
async function readRuns(control) {
  const began = Date.now(), found = await read("v1/runs?limit=1000");
  const { approvals } = await read("v1/approvals?limit=1000");
  if (stream !== control) return 0;
  const runs = new Map(found.map((run) => [run.runId, { ...run, gates: [] }]));
  for (const gate of approvals) {
    if (!runs.has(gate.runId)) runs.set(gate.runId,  // older than the newest thousand
      { ...gate, status: gate.runStatus, createdAtMs: gate.requestedAtMs, gates: [] });
    runs.get(gate.runId).gates.push(gate);
  }
  for (const run of runs.values()) {
    const isWaiting = run.gates.length > 0;
    run.isSilent = run.status === "running" && now() - (run.heartbeatAtMs || now()) > 60000;
    const isBad = run.isSilent || run.status === "failed" && now() - run.finishedAtMs < 86400000;
    run.shown = isWaiting ? "waiting-approval" : run.status;
    run.rank = isWaiting ? 0 : isBad ? 1 : ENDED.includes(run.status) ? 3 : 2;
  }
  state.order = Array.from(runs.values()).sort((one, other) => one.rank - other.rank);
  state.gates = new Map(approvals.map((gate) => [gate.runId + "/" + keyOf(gate), gate]));
  state.isWhole = true;
  [allRuns, phase, tries] = [state, "live", 0];
  changed();
  return Math.max(3000, 20 * (Date.now() - began));
}
function describeRun(run) {
  const [gate, ...rest] = run.gates;
  let error = run.isSilent && "No sign of life";
  try { error = JSON.parse(run.errorJson).message; } catch (notJson) { /* none, or not ours */ }
  return { key: run.runId, title: run.workflowName, id: run.runId, state: run.shown,
    href: "#/runs/" + encode(run.runId), isBad: !gate && error,
    more: gate ? (gate.requestTitle || gate.nodeId) + (rest.length ? ` and ${rest.length} more`
      : "") : error, took: ago(run.createdAtMs, 1) };
}
const listOfRuns = makeList("run", (run) => run.shown, describeRun);
const runsView = { name: "all runs", draw() {
  const waiting = state.gates.size, total = state.order.length;
  const active = state.order.filter((run) => /running|queued/.test(run.shown)).length;
  if (!total) return [lead(state.isWhole ? "No runs yet" : "Loading…",
    state.isWhole && quiet("POST v1/runs starts one. It shows here at once."))];
  return [lead(waiting ? waitingText(waiting) : active
    ? many(active, "run", " under way") : "Nothing waits for you",
  quiet(total < 1000 ? many(total, "run") : "The newest 1000 runs, and all that wait")),
  listOfRuns(state.order)];
} };
"""


# ---------------------------------------------------------------------------
# Drawing: what the page shows of it
# ---------------------------------------------------------------------------

SCRIPT_OF_VIEWS = r"""
// A view says what should be there, and the document is made like it.
let isDirty = false, drawTimer = 0;
function dirty() {
  if (!isDirty) requestAnimationFrame(draw);
  isDirty = true;
}
function changed() {  // by events, which may be many
  state.version++;
  if (!drawTimer) drawTimer = setTimeout(() => { drawTimer = 0; dirty(); }, 100);
}
function draw() {
  isDirty = false;
  if ((view.name === "token") !== isLocked()) { openView(); return; }
  const run = state.run, waiting = state.gates.size;
  document.title = (waiting ? `(${waiting}) ` : "") +
    (run ? run.workflowName + " · " + wordOf(run.status) : "Smithers");
  morph(byId("top"), drawTop(run, waiting));
  morph(byId("notice"), drawNotice());
  morph(byId("main"), view.draw().flat(9).filter(Boolean));
  if (view.drawn) view.drawn();
  tellGates();
}
function drawTop(run, waiting) {
  const isOne = runPath || !isServer;
  const tab = (name, href, isHome) => el("a", { href, "aria-current": name === view.name &&
    "page" }, capital(name), isHome && waiting > 0 && el("span.pill.waiting", waiting,
    el("span.hidden", " waiting")));
  return [
    el("div.bar", el("strong", run ? run.workflowName : "Smithers"), run && pill(run.status),
      el("span", { class: "phase " + phase }, capital(phase))),
    el("nav", { "aria-label": "Views", hidden: isLocked() },
      isServer && tab("all runs", "#/", !isOne), isOne && [tab("run", link(""), true),
        tab("log", link("log")), tab("timeline", link("timeline"))]),
  ];
}
function drawNotice() {
  if (isLocked()) return [];
  if (phase === "offline") return [el("p.notice.bad", (trouble || "The server does not answer.") +
    " This is what was last known; decisions are off until it is back.")];
  if (!hasNoEngine()) return [];
  const { runId } = state.run;
  return [el("div.notice.waiting", el("p", (state.why.state === "stale"
    ? "The engine of this run gives no sign of life." : "No engine drives this run.") +
    " A decision is kept, and counts when somebody resumes the run. Beside its database, this " +
    "prints the line that does:"),
  pre("python3 -m smithers_serve status " + (/^[\w.:-]+$/.test(runId) ? runId : "")))];
}
let toldCount = 0;
function tellGates() {  // to a screen reader: when more wait, politely; never log lines
  const count = state.gates.size;
  if (count > toldCount) byId("news").textContent = waitingText(count);
  toldCount = count;
}

// Return a long list's style, and the rows of it that are in sight or nearly so.
function rowsInSight(id, total, height, row) {
  const box = byId(id), above = box ? -box.getBoundingClientRect().top : 0, rows = [];
  const one = box && box.firstElementChild && box.firstElementChild.offsetHeight || height;
  const end = Math.min(total, Math.ceil((above + window.innerHeight) / one) + 8);
  for (let at = Math.max(0, Math.min(total - 1, Math.floor(above / one) - 8)); at < end; at++)
    rows.push(row(at, `transform: translateY(${at * one}px)`));
  return { style: `height: ${total * one}px`, rows, height: one };
}

// Return what draws a long list, with a search and its counts as filters; `describe` says what the
// row of an item shows.
const SHOWN = ["waiting-approval", "running", "in-progress", "queued", "pending"].concat(ENDED);
function countBy(items, stateOf) {
  const found = {};
  for (const item of items) found[stateOf(item)] = (found[stateOf(item)] || 0) + 1;
  return found;
}
function makeList(noun, stateOf, describe) {
  let filter = "", wanted = "", made = "", items = [], found = {};
  const chip = (name, count) => el("button", { type: "button", "data-key": name,
    "aria-pressed": String(name === filter), onclick() { filter = name; dirty(); } },
  name ? wordOf(name) : "All", el("span.quiet", count));
  function row(at, style) {
    const { key, href, state: name, title, id, more, isBad, bar, took } = describe(items[at]);
    return el("div", { role: "listitem", "data-key": key, style, "aria-setsize": items.length,
      "aria-posinset": at + 1 }, el("a.node", { href }, pill(name), el("span.what",
      el("span.name", title && title + " ", el("span.mono", id)), bar
        ? el("span.meter", el("span", { class: kindOf(name), style: bar }))
        : el("span", { class: "more " + (isBad ? "bad" : "quiet") }, more)),
    el("span.took.quiet.small", took)));
  }
  return (all) => {
    const want = [filter, wanted, state.version, all.length].join();
    if (want !== made) {
      found = countBy(all, stateOf);
      items = !filter && !wanted ? all : all.filter((item) => {
        const { title, id, more } = wanted && describe(item);
        return (!filter || stateOf(item) === filter) && (!wanted ||
          [title, id, more].join(" ").toLowerCase().includes(wanted));
      });
    }
    made = want;
    const { style, rows } = rowsInSight("list", items.length, 60, row), find = "Find a " + noun;
    return el("section.card", el("div.split", el("h2", capital(noun) + "s"),
      el("input", { type: "search", "aria-label": find, placeholder: find, value: wanted,
        oninput(event) { wanted = event.target.value.toLowerCase(); dirty(); } })),
    el("div.chips", { role: "group", "aria-label": "Show only" }, chip("", all.length),
      SHOWN.filter((name) => found[name] || name === filter)
        .map((name) => chip(name, found[name] || 0))),
    items.length ? el("div.list", { id: "list", role: "list", "aria-label": capital(noun) + "s",
      style }, rows)
      : quiet(!state.isWhole ? "Loading…" : all.length ? `No ${noun} matches.` : "None yet."));
  };
}

// --- The run
const stateOfNode = (key) => state.nodes.get(key).state;
function describeNode(key) {
  const node = state.nodes.get(key), gate = state.gates.get(key), { label, error } = node;
  const from = gate ? gate.requestedAtMs : node.startedAtMs;
  const to = node.state === "in-progress" || gate ? now() : node.finishedAtMs;
  return { key, id: nameOf(node), href: hrefOf(node), state: node.state, isBad: error,
    more: error ? jsonText(error.message).split("\n")[0] : [label !== node.nodeId && label,
      node.attempts > 1 && node.attempts + " attempts"].filter(Boolean).join(" · "),
    took: from && to ? span(to - from) : "" };
}
function askToRetry(nodes, name) {
  openDialog(`Retry ${name}?`, [el("p", "What has failed or was cancelled gets a " +
    "fresh try. What is finished stays.")], "Leave it", "Yes, retry " + name, "yes", async () => {
    await act("retry", { nodes }, "The retry", () => "The run goes on.");
    eagerUntil = Date.now() + 30000;
    connect();
  });
}
const HEADLINES = { cancelled: "The run was cancelled", failed: "The run has failed",
  queued: "The run waits for its turn" };
function runView() {
  const list = makeList("step", stateOfNode, describeNode);
  function headline() {
    const waiting = state.gates.size, ended = isOver() && "The run has finished";
    return HEADLINES[state.run.status] || ended || waiting && waitingText(waiting) ||
      (hasNoEngine() ? "The run stands still" : "The run is under way");
  }
  function askToCancel() {
    const why = noteField(runPath);
    openDialog("Cancel this run?", [el("p", "What runs is stopped, what waits is closed, " +
      "nothing new begins."), el("label", "Your name", nameField()), el("label", "Why", why)],
    "Keep it running", "Yes, cancel the run", "no", () => act("cancel",
      { decidedBy: myName.trim() || null, reason: why.value.trim() || null },
      "The cancel", () => "The run is being cancelled."));
  }
  function gateCard(gate) {
    const title = gate.requestTitle || nameOf(gate);
    return el("div.card.gate.split", el("div", el("h2", title), el("p.quiet.small", el("span.mono",
      nameOf(gate)), " · asked " + ago(gate.requestedAtMs) + (gate.deadlineAtMs ? " · " +
      dueText(gate) : ""))), el("a.button", { href: hrefOf(gate),
      "aria-label": "Review: " + title }, "Review"));
  }
  function attention() {
    const error = isOver() && state.why && state.why.error;
    const failed = state.order.map((key) => state.nodes.get(key))
      .filter((node) => node.state === "failed");
    const more = (count) => count > 0 && quiet(`and ${count} more, in the list of steps`);
    return [Array.from(state.gates.values()).slice(0, 50).map(gateCard),
      more(state.gates.size - 50),
      error && el("div.card.fail", el("h2", "Why it failed"), problem(error)),
      failed.slice(0, 5).map((node) => el("div.card.fail", el("div.facts", pill("failed"),
        el("a.mono", { href: hrefOf(node) }, nameOf(node))), problem(node.error))),
      more(failed.length - 5)];
  }
  return { name: "run", draw() {
    const run = state.run;
    if (!run) return [el("section.card", el("div.split", el("div",  // as below: focus stays
      heading(phase === "missing" ? "There is no such run here" : "Loading…"))))];
    const found = state.isWhole ? countBy(state.order, stateOfNode) : run.summary;
    const sum = (names) => names.reduce((total, name) => total + (found[name] || 0), 0);
    const total = sum(Object.keys(found)), done = sum(OVER);
    const took = span((isOver() ? run.finishedAtMs : now()) - run.startedAtMs);
    return [
      el("section.card", el("div.split", el("div", heading(headline()),
        quiet(done + " of " + many(total, "step", " done") + (run.startedAtMs
          ? (isOver() ? " · took " : " · for ") + took : "") + " · ",
        el("span.mono", run.runId))),
      !isOver() && button("Cancel run…", "", askToCancel, { "data-key": "cancel",
        disabled: phase !== "live" }),
      /failed|cancelled/.test(run.status) && button("Retry run…", "",
        () => askToRetry(undefined, "the run"), { "data-key": "retry" })),
      el("div.meter", { "aria-hidden": "true" },
        el("span.running", { style: `width: ${100 * done / (total || 1)}%` })),
      told()),
      el("div.stack", attention()), list(state.order),
    ];
  } };
}

// --- A node, which may be a gate
const TIMED = { approve: "it is approved", deny: "it is denied" };
const dueText = (gate) => (now() >= gate.deadlineAtMs ? "its time is up"
  : (TIMED[gate.onTimeout] || "it fails") + " in " + span(gate.deadlineAtMs - now()));
const DENIED = {
  continue: "The run goes on, and later steps are told that it was denied.",
  skip: "This step is skipped, and the run goes on.",
  fail: "This step fails, and the run with it, unless the workflow provides for that.",
};
const denyText = (gate) => DENIED[gate.onDeny] || DENIED.fail;
function nodeView(nodeId, iteration) {
  const me = { nodeId, iteration }, key = runPath + keyOf(me);
  let detail = null, earlier = [], missing = "";
  const reload = soon(100, async () => {
    try {
      detail = await read(`nodes/${encode(nodeId)}?iteration=${iteration}`);
      if (detail.gate && iteration > 0) earlier = (await readGates("all"))
        .filter((gate) => gate.nodeId === nodeId && gate.iteration < iteration);
    } catch (error) { missing = error.status && tellFailure(error); }
    dirty();
  });
  const lines = (found) => found.length ? pre(found.map((line) => plain(line.text)).join("\n"))
    : quiet("Nothing.");
  function decided(gate) {
    const isKnown = /approved|denied/.test(gate.status);
    const by = gate.decidedBy ? " by " + gate.decidedBy : "";
    const at = gate.decidedAtMs ? ", " + new Date(gate.decidedAtMs).toLocaleString() : "";
    return el("div", { class: "notice " + (isKnown ? kindOf(gate.status) : "") },
      el("p", (isKnown ? wordOf(gate.status) + by : "No longer asked") + at),
      gate.note && el("p.text", gate.note));
  }
  const item = (one, name, ...more) =>
    el("div.item", el("div.facts", pill(one.state), name), problem(one.error), more);
  const evidence = (found) => item(found, el("a.mono", { href: hrefOf(found) }, nameOf(found)),
    found.output !== null && [el("p.quiet.small", found.isCut ? "Output, cut" : "Output"),
      pre(jsonText(found.output))],
    found.log.length > 0 && [el("p.quiet.small", "Last lines"), lines(found.log)]);
  const attempt = (one) => item(one, ["Attempt " + (one.attempt + 1), el("span.quiet.small",
    clock(one.startedAtMs) + (one.finishedAtMs ? " · " + span(one.finishedAtMs -
    one.startedAtMs) : ""))]);
  function ask(verb) {
    const words = verb + " " + nodeId, isYes = verb === "approve";
    const note = (notes.get(key) || "").trim(), by = myName.trim();
    openDialog(capital(words) + "?", [el("p", detail.gate.requestTitle || nodeId),
      el("p", isYes ? "The run goes on." : denyText(detail.gate)),
      el("p.quiet.text", (by ? "As " + by : "Without a name") +
        (note ? ", with the note: " + note : ", without a note"))],
    "Go back", "Yes, " + words, isYes ? "yes" : "no", () => act(
      verb + "/" + encode(nodeId), { iteration, note: note || null,
        decidedBy: by || null, requestedAtMs: detail.gate.requestedAtMs }, "Your decision", () => {
        notes.delete(key);
        return (isYes ? "Approved." : "Denied.") +
          (hasNoEngine() ? " It counts when somebody resumes the run." : "");
      }));
  }
  function decision(gate) {
    const isOff = phase !== "live" || isOver();
    const answer = (word, kind) => button(word + " " + nodeId, kind,
      () => ask(word.toLowerCase()), { disabled: isOff });
    return el("section.card", { "data-key": "decision" }, el("h2", "Your decision"),
      el("p", el("strong", "Approve: "), "The run goes on."),
      el("p", el("strong", "Deny: "), denyText(gate)),
      gate.approvers && el("p", `May be decided by ${gate.approvers.join(", ")}.`),
      el("label", "Your name ", el("span.quiet", "(shown with the decision)"), nameField()),
      el("label", "Note ", el("span.quiet", "(optional)"), noteField(key)),
      isOff && el("p.quiet", { "data-key": "off" }, "Decisions are off " + (isOver()
        ? "after the end." : "until the connection is back. Your note stays.")),
      el("div.answers", answer("Deny", "no"), answer("Approve", "yes")));
  }
  function gateCards(gate, isOpen) {
    const facts = Object.entries(gate.metadata || {}), note = notes.get(key);
    return [
      facts.length > 0 && card("Details", el("table", el("tbody", facts.map(([name, value]) =>
        el("tr", el("th", { scope: "row" }, name), el("td.text", jsonText(value))))))),
      card("What led here", gate.evidence.length ? gate.evidence.map(evidence)
        : quiet("Nothing ran before this.")),
      earlier.length > 0 && card("Earlier decisions", earlier.map((one) => el("div.item",
        el("p.quiet.small", "Turn " + (one.iteration + 1)), decided(one)))),
      isOpen && decision(gate),
      !isOpen && note && card("Your note was not sent", pre(note)),
    ];
  }
  reload();
  return { name: "node", reload, draw() {
    const gate = detail && detail.gate, back = el("p", el("a.back", { href: link("") }, "← Run"));
    const title = jsonText(gate && gate.requestTitle || nodeId);
    if (!detail) return [back, lead(title, quiet(missing || "Loading…"))];
    const isOpen = gate && gate.status === "requested" && !OVER.includes(detail.state);
    const { label, attempts, needs, output, log } = detail;
    return [back,
      el("section.card", el("div.facts", pill(isOpen ? "requested" : detail.state),
        title !== nodeId && el("span.mono", nodeId), iteration > 0 && "turn " + (iteration + 1)),
      heading(title), label && label !== title && quiet(label),
      gate && gate.requestSummary && el("p.text", jsonText(gate.requestSummary)),
      isOpen && quiet("Asked " + ago(gate.requestedAtMs) + (gate.deadlineAtMs
        ? ". Without an answer " + dueText(gate) : "") + "."),
      gate && !isOpen && decided(gate),
      isOver() && detail.state === "failed" && button("Retry this step…", "",
        () => askToRetry([nodeId], nodeId), { "data-key": "retry" })),
      gate && gateCards(gate, isOpen), told(),
      (!gate || attempts.length > 0) && [
        card("Attempts", attempts.length ? attempts.map(attempt) : quiet("It has not run yet."),
          needs.length > 0 && quiet("Needs " + needs.join(", "))),
        output !== null && card("Output", pre(jsonText(output))),
        card("What it printed", lines(log))],
    ];
  }, onEvent(event) {
    if (event.nodeId !== nodeId || event.iteration !== iteration) return;
    if (event.type !== "NodeOutput") reload();
    else if (detail) detail.log = detail.log.concat({ text: event.text }).slice(-200);
  } };
}

// --- The log
function logView() {
  let follows = true, top = 0, first = null;
  const more = () => { follows = false; loadOlder().catch(() => 0); };  // the notice tells
  function scrolled({ target }) {  // who scrolls up wants to read
    const below = target.scrollHeight - target.clientHeight - target.scrollTop;
    if (target.scrollTop < top - 2 && below > 30) follows = false;
    top = target.scrollTop;
    dirty();
  }
  function row(at, style) {
    const line = state.lines[at];
    return el("div", { style, "data-key": line.seq }, el("time", clock(line.at)),
      line.nodeId !== undefined && el("a", { href: hrefOf(line) }, nameOf(line)),
      el("span", { class: line.isBad ? "bad" : line.isWord && "running" }, line.text));
  }
  return { name: "log", draw() {
    const lines = state.lines, panel = byId("log");
    // What was in sight stays there when lines come in above it.
    const moved = first === null ? 0 : lines.indexOf(first);
    first = lines[0] || null;
    const { style, rows, height } = rowsInSight("lines", lines.length, 24, row);
    if (moved > 0 && panel) {
      byId("lines").style.cssText = style;
      panel.scrollTop += moved * height;
      return this.draw();
    }
    return [el("section.card", el("div.split",
      el("div", heading("Log"), quiet(many(lines.length, "line") +
        (state.first > 0 ? ", and older ones" : ""))),
      state.first > 0 && button("Older lines", "", more,
        { "data-key": "older", disabled: phase === "offline" }),
      el("label.tick", { "data-key": "follow" }, el("input", { type: "checkbox", checked: follows,
        onchange: (event) => { follows = event.target.checked; dirty(); } }), "Follow")),
    lines.length === 0 && quiet("Nothing has been printed yet."),
    el("div.log", { id: "log", tabindex: 0, role: "region", "aria-label": "Log lines",
      hidden: !lines.length, onscroll: scrolled }, el("div.lines", { id: "lines", style }, rows))),
    ];
  }, drawn() {
    const panel = byId("log"), end = panel.scrollHeight - panel.clientHeight;
    if (follows && panel.scrollTop < end - 1) {
      panel.scrollTop = end;
      dirty();
    }
  } };
}

// --- The timeline: when each step began, oldest first, and how long it took
function timelineView() {
  const asked = new Map();
  let bars = [], made = -1, begin = 0, end = 0;
  const reload = soon(300, async () => {
    for (const gate of await readGates("all")) asked.set(keyOf(gate), gate);
    made = -1;
    dirty();
  });
  function gather() {
    if (made === state.version) return;
    [made, bars] = [state.version, []];
    for (const [key, node] of state.nodes) {
      const gate = asked.get(key) || state.gates.get(key);
      const from = node.startedAtMs || gate && gate.requestedAtMs;
      const to = node.finishedAtMs || !node.startedAtMs && gate && gate.decidedAtMs;
      if (from) bars.push({ key, from, to });
    }
    bars.sort((one, other) => one.from - other.from);
  }
  const list = makeList("step", (bar) => stateOfNode(bar.key), ({ key, from, to }) => {
    const share = (ms) => Math.min(98, Math.max(0, 100 * ms / Math.max(1, end - begin)));
    return { ...describeNode(key), took: span((to || end) - from),
      bar: `margin-left: ${share(from - begin)}%; width: ${share((to || end) - from)}%` };
  });
  reload();
  return { name: "timeline", reload, draw() {
    gather();
    if (!state.run || !bars.length)
      return [lead("Timeline", quiet("Nothing has run yet."))];
    begin = Math.min(state.run.startedAtMs || Infinity, bars[0].from);
    end = isOver() ? state.run.finishedAtMs : now();
    return [lead("Timeline", quiet(`From ${clock(begin)} to ${
      isOver() ? clock(end) : "now"}: ${span(end - begin)}`)), list(bars)];
  }, onEvent(event) { if (event.type.startsWith("Approval")) reload(); } };
}

// --- The token
function tokenView() {
  const wrong = phase === "refused" && "That token was refused. Try another one.";
  token = kept("token", "");
  phase = "locked";
  function unlock() {
    const text = byId("token").value.trim();
    token = kept("token", /^[!-~]+$/.test(text) ? text : "?");
    phase = "loading";
    openView();
  }
  return { name: "token", draw: () => [lead("A token is needed",
    quiet("The server asks for one. It is kept in this tab only, never in an address."),
    el("label", "Token", el("input", { type: "password", id: "token", autocomplete: "off",
      onkeydown: (event) => { if (event.key === "Enter") unlock(); } })),
    el("p", { role: "status", class: wrong && "notice bad" }, wrong),
    button("Unlock", "yes", unlock))] };
}

// --- A dialog: the browser keeps the keyboard in it, and gives the focus back.
function openDialog(title, parts, back, go, kind, agreed) {
  const box = el("dialog", { "aria-label": title, onclose: () => box.remove() },
    el("h2", title), parts, el("div.answers", button(back, "", () => box.close()),
      button(go, kind, () => { box.close(); agreed(); })));
  if (!box.showModal) return confirm(title) && agreed();
  document.body.append(box);
  box.showModal();
}

// --- Addresses
const places = new Map();  // how far each was scrolled, for Back
let here = null;
function openView(event) {
  for (const box of document.querySelectorAll("dialog")) box.close();
  let parts = [""];
  try {
    parts = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  } catch (error) { /* no address of ours */ }
  const oldPath = runPath;
  runPath = "";
  if (parts[0] === "runs" && parts[1]) {
    runPath = `runs/${encode(parts[1])}/`;
    parts = parts.slice(2);
  }
  if (oldPath !== runPath) {
    hangUp();
    forget();
    if (!runPath && allRuns) state = allRuns;
    toldCount = state.gates.size;
    phase = "loading";
  }
  if (event) said = ["", ""];
  if (here !== null) places.set(here, window.scrollY);
  here = location.hash;
  view = isLocked() ? tokenView() : isServer && !runPath ? runsView
    : parts[0] === "node" ? nodeView(parts[1], Number(parts[2]) || 0)
      : parts[0] === "log" ? logView() : parts[0] === "timeline" ? timelineView() : runView();
  byId("main").textContent = "";
  draw();
  if (event) document.querySelector("h1").focus();
  window.scrollTo(0, places.get(here) || 0);
  dirty();
  connect();
}

history.scrollRestoration = "manual";
addEventListener("hashchange", openView);
addEventListener("resize", dirty);
addEventListener("scroll", dirty, { passive: true });
addEventListener("online", connect);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) connect();
  else {
    hangUp();
    if (phase === "live" || phase === "offline") phase = "paused";
  }
});
setInterval(() => { if (!document.hidden) dirty(); }, 1000);
setInterval(() => { if (phase === "live" && state.run && !document.hidden) refreshWhy(); }, 15000);
openView();
"""


# ---------------------------------------------------------------------------
# Document: the page as it is served
# ---------------------------------------------------------------------------

PAGE_SCRIPT = SCRIPT_OF_STATE + SCRIPT_OF_VIEWS
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Smithers</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>{PAGE_STYLE}</style>
</head>
<body>
<div id="page">
<header><div id="top"></div></header>
<main>
<div id="notice" role="status"></div>
<div id="main"><noscript>This page needs JavaScript.</noscript></div>
</main>
</div>
<p id="news" class="hidden" aria-live="polite"></p>
<script>{PAGE_SCRIPT}</script>
</body>
</html>
"""


def csp_hash(text: str) -> str:
    """Return the source expression that allows just this inline text. Source: CSP Level 3."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


PAGE_HEADERS = (
    ("Content-Type", "text/html; charset=utf-8"),
    (
        "Content-Security-Policy",
        f"default-src 'none'; script-src {csp_hash(PAGE_SCRIPT)}; style-src {csp_hash(PAGE_STYLE)};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'",
    ),
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)
PAGE_RESPONSE = Response(200, PAGE.encode("utf-8"), PAGE_HEADERS)
SERVER_PAGE = PAGE.replace('<html lang="en">', '<html lang="en" class="server">')
SERVER_PAGE_RESPONSE = Response(200, SERVER_PAGE.encode("utf-8"), PAGE_HEADERS)


def get_page(app: App, request: Request) -> Response:
    return SERVER_PAGE_RESPONSE if app.has_many_runs else PAGE_RESPONSE


# ---------------------------------------------------------------------------
# Routes: one short function per route, one table, one app
# ---------------------------------------------------------------------------


class Answers:
    """Answers that are kept until the next commit by anybody. May be used from any thread."""

    MAX_ANSWERS = 16

    def __init__(self, watch: Watch, max_bytes: int) -> None:
        self._watch = watch
        self._max_bytes = max_bytes
        self._answers: dict[tuple[Any, ...], tuple[int, Response]] = {}

    def cached(self, key: tuple[Any, ...], read: Callable[[], Response]) -> Response:
        """Return the answer for `key`, read again only after a commit by anybody."""
        version = self._watch.version()
        found = self._answers.get(key)
        if found is not None and found[0] == version:
            return found[1]
        response = read()
        # A new dict each time: other threads may be reading the old one.
        kept = {k: answer for k, answer in self._answers.items() if answer[0] == version}
        size = len(response.body) + sum(len(answer[1].body) for answer in kept.values())
        if size > self._max_bytes or len(kept) >= self.MAX_ANSWERS:
            kept = {}
        kept[key] = (version, response)
        self._answers = kept
        return response


class RunView(Answers):
    """One run as it is shown: its answers until the next commit, and its log for who follows it.

    The log is the network thread's; the rest may be used from any.
    """

    MAX_LIGHT_QUERIES = 16

    def __init__(self, adapter: SmithersDb, watch: Watch, run_id: str, max_bytes: int) -> None:
        super().__init__(watch, max_bytes)
        self.adapter = adapter
        self.run_id = run_id
        self.log = EventLog(adapter, run_id, max_bytes // 4)
        self.streams: set[Any] = set()  # the connections that follow it
        self._pending = 0
        self._light_queries: set[str] = set()  # for frames, as their last answers were

    def status(self) -> Response:
        return self.cached(("status",), self._read_status)

    def _read_status(self) -> Response:
        with self.adapter.snapshot() as reads:
            run, summary = reads.existing_run(self.run_id), reads.get_summary(self.run_id)
        self._pending = summary.get("waiting-approval", 0)
        return json_response(run.to_json(summary))

    def frames(self, query: str) -> Response:
        parameters = parse_query(query)
        limit = min(integer_in("limit", parameters.get("limit", "50"), 1), MAX_FRAMES)
        after = parameters.get("afterFrameNo")
        after_no = None if after is None else integer_in("afterFrameNo", after, -1)
        response = self.cached(
            ("frames", limit, after_no), lambda: self._read_frames(limit, after_no)
        )
        self._weigh_frames(query, response)
        return response

    def _read_frames(self, limit: int, after: int | None) -> Response:
        with self.adapter.snapshot() as reads:
            frames = reads.list_frames(self.run_id, limit, after)
            if not frames:
                reads.existing_run(self.run_id)
        return json_response([frame.to_json() for frame in frames])

    def _weigh_frames(self, query: str, response: Response) -> None:
        """Remember whether a query's answer is light: then the next one is too, or nearly so."""
        if len(response.body) > LIGHT_BYTES:
            self._light_queries.discard(query)
        elif query not in self._light_queries:
            if len(self._light_queries) >= self.MAX_LIGHT_QUERIES:
                self._light_queries.clear()
            self._light_queries.add(query)

    def is_light(self, query: str) -> bool:
        return query in self._light_queries

    def count_pending(self) -> float:
        """Return how many gates of this run wait, from the same cached reading as GET /."""
        with contextlib.suppress(RunNotFound):
            self.status()
        return self._pending


ANYBODY = Identity(None, "operator")  # where no token is asked for


class Request(NamedTuple):
    """What a route function gets: the run it is about, the head, the body, what the path names."""

    named: RunView | None  # the run that the path names
    head: Head
    body: bytes
    parameters: Mapping[str, str]
    who: Identity

    @property
    def view(self) -> RunView:
        assert self.named is not None, "a route of a run"
        return self.named

    def query(self, *known: str) -> dict[str, str]:
        """Return the parameters of the query. Raises InvalidRequest for one that is not known."""
        found = parse_query(self.head.query)
        for name in found:
            if name not in known:
                raise InvalidRequest(f"there is no parameter {log_safe(name)[:50]!r} here")
        return found


class Route(NamedTuple):
    method: str
    pattern: str
    handler: Callable[[Any, Request], Response]
    public: bool = False
    is_quick: bool = False  # answered from memory or by one short read: blocks nobody
    needs: str = "viewer"  # the least role


def get_health(app: App, request: Request) -> Response:
    return HEALTHY


HEALTHY = json_response({"ok": True})


def get_status(app: App, request: Request) -> Response:
    return request.view.status()


def get_frames(app: App, request: Request) -> Response:
    return request.view.frames(request.head.query)


def get_events(app: App, request: Request) -> Response:
    query = parse_query(request.head.query)
    after = integer_in("afterSeq", query.get("afterSeq", "-1"), -1)
    last_id = request.head.headers.get("last-event-id")
    if last_id:  # empty is what some clients send before their first event
        after = integer_in("Last-Event-ID", last_id, -1)
        with app.adapter.snapshot() as reads:
            run = reads.get_run(request.view.run_id)
            newest = reads.get_newest_seq(request.view.run_id)
        if after > newest:
            after = -1  # of another run's log: it begins anew
        elif run is not None and run.is_terminal and newest <= after:
            # Tells an EventSource to stop.
            return Response(204, headers=(("Cache-Control", "no-store"),))
    elif "last" in query:  # the newest so many, and what follows
        with app.adapter.snapshot() as reads:
            newest = reads.get_newest_seq(request.view.run_id)
        after = max(after, newest - integer_in("last", query["last"], 0))
    app.check_stream_room()
    headers = (
        ("Content-Type", "text/event-stream"),
        ("Cache-Control", "no-cache"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Accel-Buffering", "no"),
    )
    return Response(200, headers=headers, stream=StreamStart(request.view, after))


def _read_run(request: Request, read: Callable[[Reads, Run], Any]) -> Response:
    """Return what `read` makes of one snapshot of the run. Raises RunNotFound."""
    with request.view.adapter.snapshot() as reads:
        return json_response(read(reads, reads.existing_run(request.view.run_id)))


def get_nodes(app: App, request: Request) -> Response:
    query = request.query("state", "after", "limit")
    limit = min(integer_in("limit", query.get("limit", "100"), 1), MAX_PAGE)
    after: Key | None = None
    if "after" in query:
        node_id, _, iteration = query["after"].rpartition("::")
        after = (node_id, integer_in("after", iteration, 0))
    state = query.get("state")
    if state is not None and state not in NODE_STATES:
        raise InvalidRequest(f"state must be one of {', '.join(NODE_STATES)}, got {short(state)}")
    return _read_run(
        request, lambda reads, run: list_nodes_json(reads, run.run_id, state, after, limit)
    )


def get_node(app: App, request: Request) -> Response:
    query = request.query("iteration")
    number = integer_in("iteration", query["iteration"], 0) if "iteration" in query else None
    node_id = request.parameters["nodeId"]
    return _read_run(request, lambda reads, run: node_detail_json(reads, run, node_id, number))


def get_approvals(app: App, request: Request) -> Response:
    query = request.query("status", "after", "limit")
    status = query.get("status", "requested")
    if status not in GATE_STATUSES:
        known = ", ".join(GATE_STATUSES)
        raise InvalidRequest(f"status must be one of {known}, got {short(status)}")
    wanted = None if status == "all" else status
    limit = min(integer_in("limit", query.get("limit", str(MAX_PAGE)), 1), MAX_PAGE)
    asked_at, _, key = query.get("after", "").partition("::")
    node_id, _, iteration = key.rpartition("::")
    after = (-1, ("", 0))
    if "after" in query:
        after = (integer_in("after", asked_at, 0), (node_id, integer_in("after", iteration, 0)))
    return _read_run(request, lambda reads, run: approvals_json(reads, run, wanted, after, limit))


def get_why(app: App, request: Request) -> Response:
    request.query()
    return _read_run(request, why_json)


def post_approve(app: App, request: Request) -> Response:
    return app.decide("approved", request)


def post_deny(app: App, request: Request) -> Response:
    return app.decide("denied", request)


def post_cancel(app: App, request: Request) -> Response:
    said = parse_said(request.body, ("decidedBy", "reason"))
    by = _speaker(request.who, said.get("decidedBy"))
    source = "token" if request.who.is_proven else None
    cancel_run(app.adapter, request.view.run_id, by, said.get("reason"), source)
    app.note_cancel()
    return json_response({"runId": request.view.run_id})


def post_retry(app: App, request: Request) -> Response:
    """Give the failed nodes of a run that has ended, or the named ones, a fresh try."""
    said = parse_object(request.body)
    nodes = said.get("nodes")
    if [name for name in said if name != "nodes"] or not (
        nodes is None or isinstance(nodes, list) and all(isinstance(id, str) for id in nodes)
    ):
        raise InvalidRequest('expected {"nodes": [id, ...]}, or nothing for all that have failed')
    app.retry(request.view.run_id, nodes or True)
    return json_response({"runId": request.view.run_id})


def get_metrics(app: App, request: Request) -> Response:
    if not app.metrics_enabled:
        raise NotFound("metrics are switched off")
    headers = (
        ("Content-Type", "text/plain; version=0.0.4; charset=utf-8"),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
    )
    return Response(200, app.metrics.render().encode("utf-8"), headers)


APP_ROUTES = (
    Route("GET", "/health", get_health, public=True, is_quick=True),
    Route("GET", "/metrics", get_metrics, is_quick=True),
    Route("GET", "/ui", get_page, public=True, is_quick=True),
)
RUN_ROUTES = (
    Route("GET", "/", get_status, is_quick=True),
    Route("GET", "/events", get_events, is_quick=True),
    Route("GET", "/frames", get_frames),
    Route("GET", "/nodes", get_nodes),
    Route("GET", "/nodes/:nodeId", get_node),
    Route("GET", "/approvals", get_approvals),
    Route("GET", "/why", get_why),
    Route("POST", "/approve/:nodeId", post_approve, needs="approver"),
    Route("POST", "/nodes/:nodeId/approve", post_approve, needs="approver"),
    Route("POST", "/deny/:nodeId", post_deny, needs="approver"),
    Route("POST", "/nodes/:nodeId/deny", post_deny, needs="approver"),
    Route("POST", "/cancel", post_cancel, needs="operator"),
    Route("POST", "/retry", post_retry, needs="operator"),
)
ROLES = ("viewer", "approver", "operator")  # each with the rights of those before it
UNMATCHED = "unmatched"  # the metric label of every request without a route: never a raw path


class Match(NamedTuple):
    route: Route
    parameters: Mapping[str, str]
    who: Identity = Identity(None, "viewer")


class Router:
    """Finds the routes of a path: those without parameters by look-up, the others by comparison."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._plain: dict[tuple[str, ...], list[Match]] = {}
        self._by_length: dict[int, list[tuple[tuple[str, ...], Route]]] = {}
        for route in routes:
            parts = tuple(route.pattern[1:].split("/"))
            if any(part.startswith(":") for part in parts):
                self._by_length.setdefault(len(parts), []).append((parts, route))
            else:
                self._plain.setdefault(parts, []).append(Match(route, {}))

    def find(self, segments: tuple[str, ...] | None) -> list[Match]:
        """Return the routes of a path, whatever their method."""
        if segments is None:
            return []
        found = self._plain.get(segments)
        if found is not None:
            return found
        return [
            Match(route, {p[1:]: s for p, s in zip(parts, segments) if p.startswith(":")})
            for parts, route in self._by_length.get(len(segments), ())
            if all(s if p.startswith(":") else p == s for p, s in zip(parts, segments))
        ]


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object that a body holds, {} for none. Raises InvalidRequest."""
    if not body:
        return {}
    try:
        value = parse_json(body)
    except ValueError as error:
        message = f"the body is not JSON: {log_safe(error)[:200]}"
        raise NotJson(message) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def parse_said(body: bytes, texts: Seq[str], numbers: Seq[str] = ()) -> dict[str, Any]:
    """Return what a request body says, by these keys.

    Raises InvalidRequest for whatever it should not hold: a misspelt key would be said in vain.
    """
    value = parse_object(body)
    unknown = [name for name in value if name not in (*texts, *numbers)]
    if unknown:
        known = ", ".join((*numbers, *texts))
        raise InvalidRequest(f"there is no field {log_safe(unknown[0])[:50]!r} here, only {known}")
    for name in numbers:
        number = value.get(name)
        is_whole = isinstance(number, int) and not isinstance(number, bool)
        if number is not None and not (is_whole and 0 <= number <= INT64_MAX):
            raise InvalidRequest(f"{name} must be a whole number of at least 0")
    for name in texts:
        if not isinstance(value.get(name, ""), (str, type(None))):
            raise InvalidRequest(f"{name} must be text")
        check_said(name, value.get(name))
    return value


def _decision_of(verdict: str, body: bytes, who: Identity) -> Decision:
    said = parse_said(body, ("note", "decidedBy"), ("iteration", "requestedAtMs"))
    return Decision(
        verdict,
        said.get("iteration"),
        said.get("note"),
        _speaker(who, said.get("decidedBy")),
        said.get("requestedAtMs"),
        "token" if who.is_proven else None,
    )


def _speaker(who: Identity, claimed: str | None) -> str | None:
    """Return who it was: the name of the token. Raises Forbidden for another one."""
    if who.name is not None and claimed not in (None, who.name):
        raise Forbidden(
            f"this token is {who.name}'s, it does not speak for {log_safe(claimed)[:80]}"
        )
    return who.name or claimed


class Tokens:
    """The named tokens of a file, a line each: `name role token`. Read again when it changes.

    A file that others may read, or that says something else, lets nobody in.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._known: list[tuple[bytes, Identity]] = []
        self.read()
        self._followed: tuple[int, ...] | None = self._seen

    def _look(self) -> tuple[int, ...]:
        found = os.stat(self._path)
        return found.st_mode, found.st_mtime_ns, found.st_ino, found.st_size

    def has_changed(self) -> bool:
        """Return whether the file is another one than when this was last asked."""
        before, self._followed = self._followed, None
        with contextlib.suppress(OSError):
            self._followed = self._look()
        return self._followed != before

    def read(self) -> None:
        """Read the file if it has changed. Raises ValueError for what it should not be."""
        seen = self._look()
        if seen == self._seen:
            return
        self._known = []
        if seen[0] & 0o077 and os.name != "nt":
            raise ValueError(f"{self._path} can be read by others: chmod 600 it")
        with open(self._path, encoding="utf-8-sig") as file:
            lines = [line.split() for line in file if line.strip() and line[0] != "#"]
        known: list[tuple[bytes, Identity]] = []
        for number, words in enumerate(lines, 1):
            if len(words) != 3 or words[1] not in ROLES:
                raise ValueError(
                    f"{self._path}: entry {number} is not `name role token`, with a role of "
                    + ", ".join(ROLES)
                )
            token = _checked_token(words[2]).encode("ascii")
            if token in (other for other, _ in known):
                raise ValueError(f"{self._path}: entry {number} has the token of an earlier one")
            known.append((token, Identity(words[0], words[1], is_proven=True)))
        self._known, self._seen = known, seen

    def find(self, given: bytes) -> Identity | None:
        try:
            self.read()
        except (OSError, ValueError) as error:
            logger.error("nobody is let in: %s", error)
            self._known, self._seen = [], None
        found = None
        for token, identity in self._known:  # all of them: how long it takes says nothing
            if hmac.compare_digest(given, token):
                found = identity
        return found


class Answer:
    """What `app.request` returns: `status`, `headers`, `body`, `json()`.

    For an event stream `chunks` yields as events come, and `body` waits for the end.
    """

    def __init__(self, status: int, headers: dict[str, str], chunks: Iterator[bytes]) -> None:
        self.status = status
        self.headers = headers
        self.chunks = chunks
        self._body: bytes | None = None

    @property
    def body(self) -> bytes:
        if self._body is None:
            self._body = b"".join(self.chunks)
        return self._body

    def json(self) -> Any:
        return json.loads(self.body)


class App:
    """An HTTP surface on a database: a WSGI callable, `request` without a socket, and the core
    behind make_server.
    """

    NOT_JSON_CODE = "INVALID_REQUEST"
    has_many_runs = False

    def __init__(
        self,
        adapter: SmithersDb,
        routes: Iterable[Route],
        auth_token: str | None,
        metrics: bool,
        tokens: str | os.PathLike[str] | None,
    ) -> None:
        token = auth_token if auth_token is not None else os.environ.get("SMITHERS_API_KEY")
        self._token = None if token is None else _checked_token(token).encode("ascii")
        self._tokens = None if tokens is None else Tokens(os.fspath(tokens))
        self.adapter = adapter
        self.metrics = adapter.metrics
        self.metrics_enabled = metrics
        # Host names that may be asked for; None means any. make_server narrows it on a loopback
        # bind without token.
        self.allowed_hosts: frozenset[str] | None = None
        self.trusted_hosts: frozenset[str] = frozenset()
        self.check_stream_room: Callable[[], None] = lambda: None
        self.max_body_bytes = MAX_BODY_BYTES
        self._router = Router(routes)
        self._watch = adapter.watch()
        self.metrics.read_at_scrape("smithers_approval_pending", self._count_pending)

    @property
    def has_token(self) -> bool:
        return self._token is not None or self._tokens is not None

    def close(self) -> None:
        self.metrics.stop_reading("smithers_approval_pending", self._count_pending)
        self._watch.close()

    def note_cancel(self) -> None:
        """Have an engine of this process hear of a cancel at once."""

    def retry(self, run_id: str, retry: bool | list[str]) -> None:
        """Go on with a run that has ended. Raises RunNotActive where nobody would."""
        raise NotImplementedError

    def view_of(self, parameters: Mapping[str, str]) -> RunView | None:
        """Return the run that a path is about. Raises NotFound."""
        raise NotImplementedError

    def _count_pending(self) -> float:
        raise NotImplementedError

    # The core: head and body in, answer out

    def admit(self, head: Head) -> Match:
        """Return the route of a request that may go on.

        Raises before a body is read: 401, 403 or 404.
        """
        method = "GET" if head.method == "HEAD" else head.method
        matches = self._router.find(head.segments)
        match = next((match for match in matches if match.route.method == method), None)
        if match is None or match.route.handler is not get_health:  # a probe may use any name
            self._refuse_foreign_host(head.headers)
        if match is not None and match.route.public:
            return match
        who = self.identify(head.headers)
        if who is None:
            raise Unauthorized(
                "a valid token is required: Authorization: Bearer <token>, or x-smithers-key"
            )
        if method not in ("GET", "OPTIONS"):
            self._refuse_foreign_page(head.headers)
        if match is None and matches:
            methods = {match.route.method for match in matches}
            allow = sorted(methods | ({"HEAD"} if "GET" in methods else set()))
            raise MethodMismatch(f"{method[:20]} is not possible here", ", ".join(allow))
        if match is None:
            raise NotFound("there is no such route")
        if ROLES.index(who.role) < ROLES.index(match.route.needs):
            raise Forbidden(
                f"this needs the role {match.route.needs}, and {who.name} is {who.role}"
            )
        return Match(match.route, match.parameters, who)

    def is_quick(self, match: Match, head: Head) -> bool:
        """Return whether a request can be answered in the thread that all clients share."""
        route = match.route
        is_light = route.handler is get_frames and self._is_light(match, head.query)
        # Without a write-ahead log a reader may have to wait for a writer.
        can_read = self.adapter.readers_never_wait
        return route.public or can_read and (route.is_quick or is_light)

    def _is_light(self, match: Match, query: str) -> bool:
        try:
            view = self.view_of(match.parameters)
        except ServeError:
            return True
        return view is not None and view.is_light(query)

    def respond(self, match: Match, head: Head, body: bytes) -> Response:
        """Return the route's answer.

        Every failure is answered in the envelope, the unexpected ones are logged.
        """
        try:
            if len(body) > self.max_body_bytes:
                raise PayloadTooLarge(f"the body may have {self.max_body_bytes} bytes")
            view = self.view_of(match.parameters)
            request = Request(view, head, body, match.parameters, match.who)
            return match.route.handler(self, request)
        except ServeError as error:
            if isinstance(error, NotJson):
                error.code = self.NOT_JSON_CODE
            return error_response(error)
        except DatabaseGone as error:
            return error_response(Unavailable(str(error)))
        except Exception:  # the outermost call of a request
            logger.error("%s failed", match.route.pattern, exc_info=True)
            self.metrics.inc("smithers_errors_total")
            return error_response(ServeError("the server failed to answer; its log says why"))

    def handle(self, head: Head, read_body: Callable[[], bytes]) -> Response:
        """Answer one request; the body is read only when the request may go on."""
        started = time.perf_counter()
        label = UNMATCHED
        try:
            match = self.admit(head)
            label = match.route.pattern
            response = self.respond(match, head, read_body())
        except ServeError as error:
            response = error_response(error)
        self.observe(head.method, label, response.status, started)
        return response

    def observe(self, method: str, label: str, status: int, started: float) -> None:
        known = (
            method
            if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
            else "OTHER"
        )
        self.metrics.observe_request(known, label, status, (time.perf_counter() - started) * 1000)

    def has_new_tokens(self) -> bool:
        """Return whether the file of tokens has changed since this was last asked."""
        return self._tokens is not None and self._tokens.has_changed()

    def identify(self, headers: Mapping[str, str]) -> Identity | None:
        """Return whose request this is, None when it bears no valid token and needs one."""
        if not self.has_token:
            return ANYBODY
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip(" ")] if scheme.lower() == "bearer" else []
        given.append(headers.get("x-smithers-key", ""))
        found: Identity | None = None
        for text in given:
            data = text.encode("latin-1", "replace")
            if self._token is not None and hmac.compare_digest(data, self._token):
                found = found or Identity(None, "operator")
            if self._tokens is not None:
                found = self._tokens.find(data) or found
        return found

    def _refuse_foreign_host(self, headers: Mapping[str, str]) -> None:
        """Refuse a name that only a page's own DNS could have made point here."""
        host = headers.get("host")  # every browser sends one; an HTTP/1.0 probe need not
        if self.allowed_hosts is None or host is None:
            return
        if _host_name(host) not in self.allowed_hosts:
            raise Forbidden("this host name is not served here; --allowed-host adds one")

    def _refuse_foreign_page(self, headers: Mapping[str, str]) -> None:
        """Refuse what a page of another site makes a browser send, also with the right token."""
        origin = headers.get("origin")
        if headers.get("sec-fetch-site", "").lower() == "cross-site":
            raise Forbidden("a page of another site may not do this")
        if origin is not None:
            authority = origin.lower().partition("://")[2]
            if not authority or (
                authority != headers.get("host", "").lower()
                and _host_name(authority) not in self.trusted_hosts
            ):
                raise Forbidden("a page of another origin may not do this")

    def decide(self, verdict: str, request: Request) -> Response:
        decision = _decision_of(verdict, request.body, request.who)
        node_id = request.parameters["nodeId"]
        decide(self.adapter, request.view.run_id, node_id, decision, request.who)
        return json_response({"runId": request.view.run_id})

    # Without a socket, and under another web framework

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Answer:
        """Answer a request without a socket."""
        data = to_json(json).encode("utf-8") if json is not None else body
        fields = {name.lower(): value for name, value in (headers or {}).items()}
        try:
            segments, query = _parse_target(path, {"host": "app", **fields}, is_http10=False)
            head = Head(method.upper(), segments, query, fields, content_length=len(data))
            response = self.handle(head, lambda: data)
        except ServeError as error:
            response = error_response(error)
        return Answer(
            response.status,
            dict(self._plain_headers(response)),
            self._chunks(method.upper(), response),
        )

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer as a WSGI application; a stream occupies the calling thread until it ends.

        Source: PEP 3333.
        """
        method = environ["REQUEST_METHOD"]
        try:
            response = self.handle(_head_of(environ), lambda: _wsgi_body(environ))
        except ServeError as error:
            response = error_response(error)
        reason = HTTPStatus(response.status).phrase
        start_response(f"{response.status} {reason}", self._plain_headers(response))
        return self._chunks(method, response)

    @staticmethod
    def _plain_headers(response: Response) -> list[tuple[str, str]]:
        headers = list(response.headers)
        if response.stream is None and response.status != 204:
            headers.append(("Content-Length", str(len(response.body))))
        return headers

    def _chunks(self, method: str, response: Response) -> Iterator[bytes]:
        if method == "HEAD":
            return iter(())
        if response.stream is None:
            return iter((response.body,))
        return follow_events(self.adapter, response.stream.view.run_id, response.stream.after_seq)


class ServeApp(App):
    """The HTTP surface of one run."""

    def __init__(
        self,
        adapter: SmithersDb,
        run_id: str,
        abort: threading.Event,
        auth_token: str | None,
        metrics: bool,
        tokens: str | os.PathLike[str] | None,
    ) -> None:
        self.run_id = run_id
        self.abort = abort
        self.go_on: Callable[[], None] | None = None  # has an engine take up what was asked for
        super().__init__(adapter, APP_ROUTES + RUN_ROUTES, auth_token, metrics, tokens)
        self._view = RunView(adapter, self._watch, run_id, 16 << 20)

    def note_cancel(self) -> None:
        self.abort.set()

    def retry(self, run_id: str, retry: bool | list[str]) -> None:
        if self.go_on is None:
            raise RunNotActive("no engine here goes on with a run: retry it on the command line")
        request_retry(self.adapter, run_id, retry)
        self.go_on()

    def view_of(self, parameters: Mapping[str, str]) -> RunView:
        return self._view

    def _count_pending(self) -> float:
        return self._view.count_pending()


def _head_of(environ: Mapping[str, Any]) -> Head:
    """Return the head of a WSGI request.

    PATH_INFO is decoded already, so a segment is taken as it is.
    """
    headers = {
        name[5:].replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    try:
        path = environ.get("PATH_INFO", "").encode("latin-1").decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("the path is not UTF-8") from error
    length = environ.get("CONTENT_LENGTH") or "0"
    segments = tuple((path or "/")[1:].split("/"))
    return Head(
        environ["REQUEST_METHOD"],
        segments,
        environ.get("QUERY_STRING", ""),
        headers,
        content_length=integer_in("Content-Length", length, 0),
    )


def _wsgi_body(environ: Mapping[str, Any]) -> bytes:
    length = integer_in("Content-Length", environ.get("CONTENT_LENGTH") or "0", 0)
    if length > MAX_BODY_BYTES:
        raise PayloadTooLarge(f"the body may have {MAX_BODY_BYTES} bytes, not {length}")
    is_terminated = environ.get("wsgi.input_terminated")
    if "HTTP_TRANSFER_ENCODING" in environ and not is_terminated and length == 0:
        raise InvalidRequest("no chunked body gets through to here: send a content-length")
    if is_terminated:
        data: bytes = environ["wsgi.input"].read(MAX_BODY_BYTES + 1)
        if len(data) > MAX_BODY_BYTES:
            raise PayloadTooLarge(f"the body may have {MAX_BODY_BYTES} bytes")
        return data
    return bytes(environ["wsgi.input"].read(length)) if length else b""


def _checked_token(token: str) -> str:
    """Return a token that a header can carry. Raises ValueError otherwise."""
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError(
            "the auth token must be non-empty, of visible ASCII characters without spaces"
        )
    return token


def _host_name(authority: str) -> str:
    """Return the name in `name:port` or `[address]:port`, in lower case."""
    if authority.startswith("["):
        return authority.partition("]")[0].lower() + "]"
    return authority.partition(":")[0].lower()


def create_serve_app(
    *,
    adapter: SmithersDb,
    run_id: str,
    abort: threading.Event | None = None,
    workflow: Workflow | Callable[[Ctx], Workflow] | None = None,
    auth_token: str | None = None,
    metrics: bool = True,
    tokens: str | os.PathLike[str] | None = None,
) -> ServeApp:
    """Return the app that shows and steers one run; its engine may run here or elsewhere.

    `auth_token` falls back to the environment's SMITHERS_API_KEY; without either, nobody is asked
    for one, and an empty one is a mistake. `abort` is set by POST /cancel. `workflow` is accepted
    as in the original; the run's rows say all there is to show. `tokens` is a file of named tokens,
    `name role token` a line. Raises ValueError for a token that no header could carry, and for such
    a file that others can read.
    """
    check_adapter(adapter)
    return ServeApp(adapter, run_id, abort or threading.Event(), auth_token, metrics, tokens)


# ---------------------------------------------------------------------------
# Conversation: the protocol of one connection, read once and in order
# ---------------------------------------------------------------------------

HEAD_SECONDS = 10.0  # for a whole head, from its first byte
BODY_SECONDS = 30.0  # for a whole body
IDLE_SECONDS = 75.0  # between requests
LINGER_SECONDS = 2.0
MAX_LINGER_BYTES = MAX_BODY_BYTES
MAX_LARGE_REQUESTS = 2  # with a body of over 64 KiB, at once
_BARE_LF = re.compile(rb"(?<!\r)\n")
_CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_TRAILER = re.compile(rb"(?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*)?\r\n")


class Want(NamedTuple):
    """What a conversation waits for, when it is not bytes that it wants written."""

    what: str


# It goes on with what the client has sent, b"" at its end, None when the deadline has passed.
READ = Want("read")
# It goes on with True when few enough requests with a large body are under way, with False at its
# deadline; TURN_END says that its own is not any more.
TURN, TURN_END = Want("turn"), Want("turn end")
# Its next request has come already: the others have their turn first.
NEXT = Want("next")
# Its last answer is out: the client should read the end of it.
LAST = Want("last")


class Work(NamedTuple):
    """A call that may block; the conversation goes on with the Response that it returns."""

    call: Callable[[], Response]
    is_reading: bool


class Follow(NamedTuple):
    """The rest of the connection is the events of a run."""

    start: StreamStart
    is_chunked: bool


class Large(NamedTuple):
    """A large body to be written, which other clients may be reading as well."""

    body: bytes


Talk = Generator[Any, Any, Any]
OVER: Talk = (None for _ in "")  # what is left of one when its connection is a stream


class Conversation:
    """The protocol of one connection, without a socket: bytes in, bytes and wants out.

    `deadline` is when the client's turn ends; `waits_since` is set while the next move is the
    client's. Used by the network thread.
    """

    __slots__ = ("_app", "_buffer", "_server", "deadline", "has_turn", "waits_since")

    def __init__(self, app: App, server: Any) -> None:
        self._app = app
        self._server = server  # tells whether it `is_stopping`
        self._buffer = b""
        self.deadline = math.inf
        self.waits_since: float | None = None
        self.has_turn = False  # a large body of it is under way

    def await_client(self, seconds: float) -> None:
        self.waits_since = time.monotonic()
        self.deadline = self.waits_since + seconds

    def _work(self) -> None:
        self.waits_since = None
        self.deadline = math.inf

    def converse(self) -> Talk:
        """Answer requests until the connection is to be closed, or becomes a stream."""
        keep_alive = True
        while keep_alive:
            started = time.perf_counter()
            try:
                data = yield from self._read_head()
                if data is None:
                    return
                started = time.perf_counter()
                head = (
                    _parse_head_cached(data) if len(data) <= MAX_CACHED_HEAD else parse_head(data)
                )
            except ServeError as error:
                self._app.observe("", UNMATCHED, error.status, started)
                yield render_response(error_response(error), False, False, False)
                break
            self._work()
            label, has_read = UNMATCHED, not head.has_body
            try:
                match = self._app.admit(head)
                label = match.route.pattern
                if has_read and self._app.is_quick(match, head):
                    response = self._app.respond(match, head, b"")
                else:
                    response = yield from self._wait_for_answer(match, head)
                    has_read = True
            except ServeError as error:
                response = error_response(error)
            if self.has_turn:
                yield TURN_END
            self._app.observe(head.method, label, response.status, started)
            keep_alive = head.keep_alive and has_read and not self._server.is_stopping
            is_head = head.method == "HEAD"
            if response.stream is not None:
                yield render_stream_head(response, head.is_http10)
                if not is_head:
                    yield Follow(response.stream, not head.is_http10)
                break
            is_large = len(response.body) > LIGHT_BYTES and not is_head
            yield render_response(response, is_head or is_large, keep_alive, head.is_http10)
            if is_large:
                yield Large(response.body)
        yield from self._linger()

    def _wait_for_answer(self, match: Match, head: Head) -> Talk:
        """Return a worker's answer to the whole request. Raises a ServeError for its body."""
        body = (yield from self._read_body(head)) if head.has_body else b""
        call = functools.partial(self._app.respond, match, head, body)
        response = yield Work(call, head.method in ("GET", "HEAD"))
        return response

    def _linger(self) -> Talk:
        """Read on for a moment before closing.

        Closing on unread data would reset the connection and lose the answer.
        """
        yield LAST
        self.await_client(LINGER_SECONDS)
        left = MAX_LINGER_BYTES
        while left > 0:
            data = yield READ
            if not data:
                return
            left -= len(data)

    # Reading

    def _read_head(self) -> Talk:
        """Return the bytes of the next head, or None when the client has ended between requests."""
        self.await_client(HEAD_SECONDS if self._buffer else IDLE_SECONDS)
        if self._buffer:
            yield NEXT
        seen = 0
        while True:
            head = self._take_head(seen) if self._buffer else None
            if head is not None:
                return head
            if self._buffer and not seen:
                self.await_client(HEAD_SECONDS)
            seen = len(self._buffer)
            data = yield READ
            if not data:
                if data is None and self._buffer:
                    raise RequestTimeout("the head of the request did not arrive in time")
                return None
            self._buffer += data

    def _take_head(self, seen: int) -> bytes | None:
        """Take a complete head off the buffer, None without one; `seen` bytes hold no end."""
        buffer = self._buffer
        if len(buffer) > MAX_REQUEST_LINE and buffer.find(b"\r\n", 0, MAX_REQUEST_LINE + 2) < 0:
            raise UriTooLong(f"the request line has over {MAX_REQUEST_LINE} bytes")
        end = buffer.find(b"\r\n\r\n", max(0, seen - 3))
        if end > MAX_HEAD_BYTES or end < 0 and len(buffer) > MAX_HEAD_BYTES:
            raise HeadersTooLarge(f"the head has over {MAX_HEAD_BYTES} bytes")
        if end >= 0:
            self._buffer = buffer[end + 4 :]
            return buffer[:end]
        if _BARE_LF.search(buffer, max(0, seen - 1)):
            raise InvalidRequest("a line ends without a carriage return")
        return None

    def _read_body(self, head: Head) -> Talk:
        """Return the whole body.

        Raises a ServeError when it is malformed, too large or too slow.
        """
        if head.expects_continue and not self._buffer:
            yield b"HTTP/1.1 100 Continue\r\n\r\n"
        self.await_client(BODY_SECONDS)
        body = yield from (
            self._read_chunks() if head.chunked else self._read_bytes(head.content_length)
        )
        self._work()
        return body

    def _read_more(self) -> Talk:
        data = yield READ
        if data is None:
            raise RequestTimeout("the body of the request did not arrive in time")
        if not data:
            raise InvalidRequest("the body ends early")
        return data

    def _take_turn(self) -> Talk:
        """Wait until few enough requests with a large body are under way; until it is answered."""
        if not self.has_turn and not (yield TURN):
            raise Unavailable("too many requests with a large body at once")

    def _read_bytes(self, count: int) -> Talk:
        if count > LIGHT_BYTES:
            yield from self._take_turn()
        parts, missing = [self._buffer], count - len(self._buffer)
        while missing > 0:
            data = yield from self._read_more()
            parts.append(data)
            missing -= len(data)
        whole = b"".join(parts)
        self._buffer = whole[count:]
        return whole[:count]

    def _read_chunks(self) -> Talk:
        """Return a chunked body. Source: RFC 9112 section 7.1."""
        body = bytearray()
        at = 0  # a cursor: a body of one-byte chunks must not be copied for each
        while True:
            found, at = yield from self._find(_CHUNK_HEAD, at, "a chunk size")
            size = int(found[1], 16)
            if size == 0:
                break
            if len(body) + size > MAX_BODY_BYTES:
                raise PayloadTooLarge(f"the body may have {MAX_BODY_BYTES} bytes")
            if len(body) + size > LIGHT_BYTES:
                yield from self._take_turn()
            while len(self._buffer) < at + size + 2:
                data = yield from self._read_more()
                self._buffer, at = self._buffer[at:] + data, 0
            if self._buffer[at + size : at + size + 2] != b"\r\n":
                raise InvalidRequest("a chunk does not end where it should")
            body += self._buffer[at : at + size]
            at += size + 2
        for _ in range(MAX_HEADER_COUNT):
            found, at = yield from self._find(_TRAILER, at, "a trailer line")
            if found[0] == b"\r\n":
                self._buffer = self._buffer[at:]
                return bytes(body)
        raise HeadersTooLarge(f"over {MAX_HEADER_COUNT} trailer fields")

    def _find(self, pattern: re.Pattern[bytes], at: int, what: str) -> Talk:
        """Return the match of a whole line at the cursor, and where the next one begins."""
        while True:
            found = pattern.match(self._buffer, at)
            if found is not None:
                return found, found.end()
            is_whole = self._buffer.find(b"\n", at) >= 0
            if is_whole or len(self._buffer) - at > MAX_REQUEST_LINE:
                raise InvalidRequest(f"{what} is malformed")
            data = yield from self._read_more()
            self._buffer, at = self._buffer[at:] + data, 0


# ---------------------------------------------------------------------------
# Network: one thread that owns every socket and writes every byte
# ---------------------------------------------------------------------------

MAX_CONNECTIONS = 1000
WANTED_DESCRIPTORS = 16_384  # for all of these, all streams, and a database reader each
RESERVED_DESCRIPTORS = 64  # never for clients: the database, the log, the pipes of commands
LISTEN_BACKLOG = 1024  # http.server's 5 drops connections in a burst
MAX_READERS = 4  # threads that make answers; decisions and the like have one of their own
MAX_LARGE_BYTES = 64 << 20  # of large answers that wait for slow clients
# Of one client, before the others have their turn; no less than a TLS record holds, for what is
# left of one no socket tells.
READ_BYTES = 16 << 10
PIPELINE_SECONDS = 0.002  # for requests that came together, before sockets are looked at again
WRITE_BYTES = 256 << 10
SEND_BUFFER_BYTES = 256 << 10
UNSENT_BYTES = 64 << 10  # of these, what the network has no room for yet
WRITE_SECONDS = 60.0  # per 256 KiB: a reader slower than that is dropped
DRAIN_SECONDS = 2.0  # what requests in work get at a stop


class Workers:
    """Threads that make the answers which may block: some read, one decides.

    `submit` is called by the network thread; what they have made goes back through `post`.
    """

    def __init__(self, post: Callable[[Connection, Response], None]) -> None:
        self._post = post
        self._reads: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._writes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._queues = [self._reads] * MAX_READERS + [self._writes]
        for works in self._queues:
            start_thread("worker", self._work, works)

    def submit(self, connection: Connection, work: Work) -> None:
        (self._reads if work.is_reading else self._writes).put((connection, work, time.monotonic()))

    def _work(self, works: queue.SimpleQueue[Any]) -> None:
        while True:
            item = works.get()
            if item is None:
                return
            connection, work, since = item
            if time.monotonic() - since > HTTP_LOCK_PATIENCE_SECONDS:
                late = Unavailable("the database is locked by another process")
                self._post(connection, error_response(late))
            else:
                self._post(connection, work.call())  # answers every failure itself

    def stop(self) -> None:
        for works in self._queues:
            works.put(None)


class Connection:
    """A client's socket, what it has not taken yet, and what its conversation wants.

    As a stream it has a cursor into a run's log instead. Used by the network thread.
    """

    __slots__ = (
        "cursor",
        "events",
        "is_chunked",
        "is_ending",
        "is_half_closed",
        "is_lagging",
        "pending",
        "shared",
        "socket",
        "state",
        "taken",
        "talk",
        "view",
        "want",
    )

    def __init__(
        self, sock: socket.socket, state: Conversation, ssl_context: ssl.SSLContext | None
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Left alone the kernel keeps megabytes for a client that does not read.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self.socket = sock
        self.state = state
        self.talk = state.converse()
        self.want: Any = LAST  # nothing yet; None when it has been dropped
        if ssl_context is not None:
            self.socket = ssl_context.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )
            self.want = HANDSHAKE
            state.await_client(HEAD_SECONDS)
        self.events = 0
        self.pending: bytes | memoryview = b""
        self.taken = 0  # of what is pending, since its deadline was set
        self.shared: bytes | None = None  # the large body that is pending
        # As a stream
        self.view: RunView | None = None
        self.cursor = -1
        self.is_chunked = self.is_ending = self.is_half_closed = False
        self.is_lagging = False  # its socket would take more, and it waits for its turn to get it

    def receive(self) -> bytes | None:
        """Return what the client has sent, b"" at its end, None when there is nothing yet."""
        try:
            return self.socket.recv(READ_BYTES)
        except OSError as error:
            _nothing_yet(error)
            return None

    def flush(self) -> bool:
        """Write what is pending; True when the socket has taken all of it."""
        while self.pending:
            try:
                sent = self.socket.send(self.pending[:WRITE_BYTES])
            except OSError as error:
                _nothing_yet(error)
                return False
            self.pending = self.pending[sent:]
            self.taken += sent
        return True


def _nothing_yet(error: OSError) -> None:
    """Return for a socket that wants to be asked again; raise the error when it is a real one."""
    wants_again = ("SSLWantReadError", "SSLWantWriteError")
    is_blocked = isinstance(error, (BlockingIOError, InterruptedError))
    if not is_blocked and type(error).__name__ not in wants_again:
        raise error


class Waker:
    """Wakes a thread that waits in a selector; any number of wakes before it looks count as one."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._writer, self._reader = socket.socketpair()
        self._writer.setblocking(False)
        self._reader.setblocking(False)
        self._is_sent = False
        selector.register(self._reader, selectors.EVENT_READ, self)

    def wake(self) -> None:
        if not self._is_sent:
            self._is_sent = True
            with contextlib.suppress(OSError):  # full: it will wake anyway; closed: it has left
                self._writer.send(b"w")

    def clear(self) -> None:
        """Called by the woken thread, before it looks at what it was woken for."""
        # In this order: a wake between the two is not lost, for the look comes after both.
        self._reader.recv(4096)
        self._is_sent = False

    def close(self) -> None:
        self._writer.close()
        self._reader.close()


class Streams:
    """The connections that follow a run's events, each with a cursor into its log.

    New events go first to the streams that have everything else; those that read older ones share
    what time is left. `note_commit` and `check_room` may be called from any thread; the rest runs
    in the network thread.
    """

    SEND_SECONDS = 0.001  # how long events are sent before sockets are looked at again

    def __init__(
        self,
        app: App,
        listen: Callable[[Connection, int], None],
        drop: Callable[[Connection], None],
        max_streams: int,
    ) -> None:
        self.open: set[Connection] = set()
        self._adapter, self._metrics = app.adapter, app.metrics
        self._listen, self._drop = listen, drop
        self._max_streams = max_streams
        self._views: set[RunView] = set()  # that somebody follows
        self._fresh: collections.deque[Connection] = collections.deque()  # with news to get
        self._lagging: collections.deque[Connection] = collections.deque()
        # Runs with a commit that their log has not been looked at after.
        self._stale: collections.deque[str] = collections.deque()
        self._watch: Watch | None = None
        self._look_at = 0.0  # when the log may be read again, after it could not be
        self._sweep_at = 0.0  # when other processes' commits are looked for again

    def check_room(self) -> None:
        """Raise Unavailable when there are too many streams."""
        if len(self.open) >= self._max_streams:
            raise Unavailable(f"{self._max_streams} event streams are open already")

    def note_commit(self, tx: Tx) -> bool:
        """Have the log of a run looked at; False when nobody follows any."""
        if not self.open or not (tx.events or tx.is_control):
            return False
        self._stale.append(tx.run_id)
        return True

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def add(self, stream: Connection, follow: Follow, is_stopping: bool) -> None:
        """Have a connection, whose head is out, become a stream."""
        if is_stopping or len(self.open) >= self._max_streams:
            self._drop(stream)
            return
        self.open.add(stream)
        self._metrics.inc("smithers_event_streams_active")
        stream.talk.close()
        stream.talk = OVER
        stream.state.deadline = math.inf
        stream.view, stream.cursor = follow.start
        stream.is_chunked = follow.is_chunked
        stream.pending = chunk(RETRY_LINE) if stream.is_chunked else RETRY_LINE
        stream.view.streams.add(stream)
        self._views.add(stream.view)
        self._stale.append(stream.view.run_id)
        self._listen(stream, selectors.EVENT_READ)
        self._let_lag(stream)

    def discard(self, stream: Connection) -> None:
        if stream in self.open:
            self.open.discard(stream)
            self._metrics.inc("smithers_event_streams_active", -1)
            assert stream.view is not None
            stream.view.streams.discard(stream)
            if not stream.view.streams:
                self._views.discard(stream.view)

    def patience(self) -> float:
        """Return how long the thread may wait for sockets."""
        is_busy = (self._fresh or self._lagging) and time.monotonic() >= self._look_at
        return 0.0 if is_busy else WATCH_SECONDS

    def expire(self, stream: Connection) -> None:
        """Say that a silent stream lives; drop one that takes nothing."""
        if stream.events & selectors.EVENT_WRITE:
            self._drop(stream)
        else:
            word = chunk(KEEP_ALIVE) if stream.is_chunked else KEEP_ALIVE
            stream.pending = stream.pending or word
            self.pump(stream)

    def next_to_send(self) -> Iterator[Connection]:
        """Yield the streams that have something to get, for a short time."""
        if not self.open or time.monotonic() < self._look_at:
            return
        try:
            self._look_at_logs()
        except (SmithersError, sqlite3.Error, OSError):  # for every stream: they wait, and go on
            logger.error("event streams wait: the log cannot be read", exc_info=True)
            self._metrics.inc("smithers_errors_total")
            self._look_at = time.monotonic() + KEEP_ALIVE_SECONDS / 10
            return
        until = time.monotonic() + self.SEND_SECONDS
        while (self._fresh or self._lagging) and time.monotonic() < until:
            if self._fresh:
                stream = self._fresh.popleft()
            else:
                stream = self._lagging.popleft()
                stream.is_lagging = False
            if stream.want is not None:
                yield stream

    def _look_at_logs(self) -> None:
        """Have each log that has new events, from here or another process, known to its readers."""
        if self._watch is None:
            self._watch = self._adapter.watch()
        stale = set()
        while self._stale:
            stale.add(self._stale.popleft())
        now = time.monotonic()
        if now >= self._sweep_at:
            self._sweep_at = now + WATCH_SECONDS / 2
            if self._watch.changed():
                stale = {view.run_id for view in self._views}
        if not stale:
            return
        try:
            with self._adapter.snapshot() as reads:
                for view in [view for view in self._views if view.run_id in stale]:
                    if view.log.refresh(reads):
                        self._fresh.extend(
                            s for s in view.streams if not s.is_lagging and not s.pending
                        )
        except BaseException:
            self._stale.extend(stale)
            raise

    def serve(self, stream: Connection, events: int) -> None:
        if events & selectors.EVENT_READ:
            self._hear(stream)
        if events & selectors.EVENT_WRITE and stream.want is not None and self._flush(stream):
            self._let_lag(stream)

    def _hear(self, stream: Connection) -> None:
        """Take what a client says: nothing is expected but its end."""
        if stream.receive() != b"":
            return
        # The end of its sending may be all (half-closed) or the end of everything: a write or two
        # will tell.
        stream.is_half_closed = True
        self._listen(stream, stream.events & ~selectors.EVENT_READ)
        if not stream.events & selectors.EVENT_WRITE:
            stream.state.deadline = 0.0

    def _let_lag(self, stream: Connection) -> None:
        if not stream.is_lagging and not stream.events & selectors.EVENT_WRITE:
            stream.is_lagging = True
            self._lagging.append(stream)

    def pump(self, stream: Connection) -> None:
        """Send one stream what is pending and its next events, or its end."""
        try:
            if stream.pending and not self._flush(stream):
                return
            assert stream.view is not None
            log = stream.view.log
            if stream.is_ending:
                self._drop(stream)
                return
            if stream.cursor < log.newest:
                stream.pending, stream.cursor = log.read(stream.cursor, stream.is_chunked)
                if not self._flush(stream):
                    return
            if stream.cursor < log.newest:
                self._let_lag(stream)
            elif log.has_ended:
                self._end(stream)
        except OSError:  # the client has gone, which is normal
            self._drop(stream)
        except (StorageError, Unavailable):  # the database, so every stream: they wait
            self._let_lag(stream)
            self._look_at = time.monotonic() + KEEP_ALIVE_SECONDS / 10
            self._stale.append(stream.view.run_id if stream.view else "")

    def _end(self, stream: Connection) -> None:
        """Send the last chunk; close when the socket has taken it."""
        stream.is_ending = True
        stream.pending = LAST_CHUNK if stream.is_chunked else b""
        if self._flush(stream):
            self._drop(stream)

    def leave(self, stream: Connection) -> None:
        """End a stream now, properly if its socket allows that."""
        with contextlib.suppress(OSError):
            if self._flush(stream) and not stream.is_ending:
                self._end(stream)
        self._drop(stream)

    def _flush(self, stream: Connection) -> bool:
        """Write what is pending; True when the socket has taken it. Sets the next deadline."""
        before, was_blocked = len(stream.pending), stream.events & selectors.EVENT_WRITE
        is_empty = stream.flush()
        if before > len(stream.pending) or not (is_empty or was_blocked):
            soon = 0.5 if stream.state.deadline == 0.0 else KEEP_ALIVE_SECONDS
            seconds = soon if is_empty else UNWRITABLE_SECONDS
            stream.state.deadline = time.monotonic() + seconds
        reading = 0 if stream.is_half_closed else selectors.EVENT_READ
        self._listen(stream, reading | (0 if is_empty else selectors.EVENT_WRITE))
        return is_empty


HANDSHAKE = Want("handshake")


class Network:
    """Carries every conversation on as far as it goes, and keeps time.

    `admit`, `make_room`, `post` and `stop` may be called from any thread; the rest runs in the
    network thread.
    """

    TICK_SECONDS = 0.5

    def __init__(
        self,
        app: App,
        ssl_context: ssl.SSLContext | None,
        max_connections: int,
        max_streams: int,
    ) -> None:
        self.is_stopping = False
        self._is_stopped = False
        self._app = app
        self._ssl_context = ssl_context
        self._max_connections = max_connections
        self._connections: set[Connection] = set()  # without the streams
        self._streams = Streams(app, self._listen, self._drop, max_streams)
        self._later: collections.deque[Connection] = collections.deque()
        self._turns = MAX_LARGE_REQUESTS
        self._awaiting_turn: collections.deque[Connection] = collections.deque()
        self._inbox: collections.deque[tuple[Callable[..., Any], Any]] = collections.deque()
        self._selector = selectors.DefaultSelector()
        self._waker = Waker(self._selector)
        self.check_stream_room = self._streams.check_room
        self._end_at = math.inf
        self._workers = Workers(lambda *answer: self.post(self._answered, answer))
        app.adapter.subscribe(self._notice)
        self._thread = start_thread("network", self._run)

    # From other threads

    def post(self, call: Callable[[Any], Any], value: Any = None) -> None:
        """Have `call(value)` made in the network thread."""
        self._inbox.append((call, value))
        self._waker.wake()

    @property
    def has_streams(self) -> bool:
        return bool(self._streams.open)

    def admit(self, sock: socket.socket) -> None:
        self.post(self._admit, sock)

    def make_room(self) -> None:
        self.post(lambda _: self._make_room())

    def stop(self) -> None:
        """End the streams with a proper last chunk, let what is in work be answered, then close."""
        if not self._is_stopped:
            self._is_stopped = True
            self.post(self._begin_to_stop)
            self._thread.join(DRAIN_SECONDS + 3.0)
            self._workers.stop()
            self._app.adapter.unsubscribe(self._notice)

    def _notice(self, tx: Tx) -> None:
        if self._streams.note_commit(tx):
            self._waker.wake()

    def close_inherited(self) -> None:
        """Let go of the parent's sockets, in a forked child."""
        for connection in (*self._connections, *self._streams.open):
            socket.socket.close(connection.socket)
        self._waker.close()
        self._selector.close()

    # The loop

    def _run(self) -> None:
        tick_at = 0.0
        try:
            while time.monotonic() < self._end_at and not (
                self.is_stopping and not self._connections
            ):
                self._guarded(self._turn, None)
                now = time.monotonic()
                if now >= tick_at:
                    tick_at = now + self.TICK_SECONDS
                    self._guarded(self._tick, now)
        finally:
            for connection in (*self._connections, *self._streams.open):
                self._drop(connection)
            self._streams.close()
            self._selector.close()
            self._waker.close()

    def _guarded(self, work: Callable[..., object], value: Any, *more: Any) -> None:
        """Work; whatever goes wrong costs one connection at most, and never the thread."""
        try:
            work(value, *more)
        except Exception:  # the outermost call of the network thread, and for one connection
            logger.error("a connection failed", exc_info=True)
            self._app.metrics.inc("smithers_errors_total")
            if isinstance(value, Connection):
                self._drop(value)

    def _turn(self, nothing: None) -> None:
        """Do what is to be done now: sockets, the inbox, requests that were pipelined, streams."""
        for key, events in self._selector.select(self._patience()):
            if key.data is self._waker:
                self._waker.clear()
            elif key.data.want is NEXT:  # it has sent even more: that is for later
                self._listen(key.data, 0)
            elif key.data.want is not None:
                self._guarded(self._serve, key.data, events)
        for _ in range(len(self._inbox)):
            call, value = self._inbox.popleft()
            self._guarded(call, value)
        until = time.monotonic() + PIPELINE_SECONDS
        while self._later and time.monotonic() < until:
            waiting = self._later.popleft()
            if waiting.want is NEXT:
                self._guarded(self._go_on, waiting, None)
        for stream in self._streams.next_to_send():
            self._guarded(self._streams.pump, stream)

    def _patience(self) -> float:
        if self._later or self._inbox:
            return 0.0
        if self._streams.open:
            return self._streams.patience()
        return self.TICK_SECONDS if self._connections else 1.0

    # Conversations

    def _admit(self, sock: socket.socket) -> None:
        if len(self._connections) >= self._max_connections and not self._make_room():
            self._refuse(sock)
            return
        try:
            connection = Connection(sock, Conversation(self._app, self), self._ssl_context)
        except OSError:  # the client has left already
            close_socket(sock)
            return
        self._connections.add(connection)
        if connection.want is HANDSHAKE:
            self._listen(connection, selectors.EVENT_READ)
        else:
            self._go_on(connection, None)

    def _refuse(self, sock: socket.socket) -> None:
        error = Unavailable(f"{self._max_connections} connections are open already")
        self._app.observe("", UNMATCHED, error.status, time.perf_counter())
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            if self._ssl_context is None:  # before its handshake a TLS client understands nothing
                sock.send(render_response(error_response(error), False, False, False))
                sock.recv(65536)  # closing on an unread request would reset the connection
        close_socket(sock)

    def _serve(self, connection: Connection, events: int) -> None:
        """Go on with a connection whose socket is ready."""
        try:
            if connection.view is not None:
                self._streams.serve(connection, events)
            elif connection.want is READ:
                data = connection.receive()
                if data is not None:
                    self._go_on(connection, data)
            elif connection.want is HANDSHAKE:
                self._shake_hands(connection)
            elif connection.pending and self._flush(connection):
                self._go_on(connection, None)
        except OSError:  # the client has gone, which is normal
            self._drop(connection)

    def _shake_hands(self, connection: Connection) -> None:
        try:
            connection.socket.do_handshake()  # type: ignore[attr-defined]
        except OSError as error:
            _nothing_yet(error)
            is_writing = type(error).__name__ == "SSLWantWriteError"
            self._listen(connection, selectors.EVENT_WRITE if is_writing else selectors.EVENT_READ)
            return
        self._go_on(connection, None)

    def _answered(self, answer: tuple[Connection, Response]) -> None:
        """Go on with the answer that a worker has made, unless the client has gone meanwhile."""
        connection, response = answer
        if connection.want is not None:
            self._guarded(self._go_on, connection, response)

    def _go_on(self, connection: Connection, value: Any) -> None:
        """Give a conversation what it wants, until that is not there or others have their turn."""
        try:
            while True:
                want = connection.want = connection.talk.send(value)
                value = None  # what it goes on with, where nothing has to be waited for
                if want.__class__ is bytes:
                    connection.pending = want
                    if not self._flush(connection):
                        return
                elif want is READ:
                    self._listen(connection, selectors.EVENT_READ)
                    return
                elif want is NEXT:
                    self._later.append(connection)
                    return
                elif want is TURN:
                    value = self._take_turn(connection)
                    if not value:
                        return
                elif want is TURN_END:
                    self._give_turn_back(connection)
                elif want is LAST:
                    socket.socket.shutdown(connection.socket, socket.SHUT_WR)
                elif want.__class__ is Large:
                    if not self._write_large(connection, want.body):
                        return
                elif want.__class__ is Work:
                    self._listen(connection, 0)
                    self._workers.submit(connection, want)
                    return
                else:
                    self._connections.discard(connection)
                    self._streams.add(connection, want, self.is_stopping)
                    return
        except (StopIteration, OSError):  # it is over, or its client has gone, which is normal
            self._drop(connection)

    def _flush(self, connection: Connection) -> bool:
        """Write what is pending; True when the socket has taken it, else its deadline is set."""
        if connection.flush():
            connection.shared = None
            return True
        state = connection.state
        if not connection.events & selectors.EVENT_WRITE or connection.taken >= WRITE_BYTES:
            connection.taken = 0
            state.await_client(WRITE_SECONDS)
        self._listen(connection, selectors.EVENT_WRITE)
        return False

    def _write_large(self, connection: Connection, body: bytes) -> bool:
        """Write a body that may be shared with others; those who take it too slowly have to go."""
        connection.pending, connection.shared = memoryview(body), body
        if self._flush(connection):
            return True
        while True:
            readers = [c for c in self._connections if c.shared is not None]
            sizes = {id(c.shared): len(c.shared or b"") for c in readers}
            if sum(sizes.values()) <= MAX_LARGE_BYTES:
                return False
            self._drop(min(readers, key=lambda c: c.state.waits_since or math.inf))

    def _listen(self, connection: Connection, events: int) -> None:
        if events != connection.events:
            if not connection.events:
                self._selector.register(connection.socket, events, connection)
            elif events:
                self._selector.modify(connection.socket, events, connection)
            else:
                self._selector.unregister(connection.socket)
            connection.events = events

    def _drop(self, connection: Connection) -> None:
        if connection.want is None:
            return
        self._listen(connection, 0)
        connection.want = connection.shared = None
        connection.talk.close()
        self._give_turn_back(connection)
        self._connections.discard(connection)
        self._streams.discard(connection)
        close_socket(connection.socket)

    # Turns and room

    def _take_turn(self, connection: Connection) -> bool:
        if self._turns == 0:
            self._awaiting_turn.append(connection)
            self._listen(connection, 0)
            return False
        self._turns -= 1
        connection.state.has_turn = True
        return True

    def _give_turn_back(self, connection: Connection) -> None:
        if not connection.state.has_turn:
            return
        connection.state.has_turn = False
        self._turns += 1
        while self._awaiting_turn and self._turns:
            other = self._awaiting_turn.popleft()
            if other.want is TURN:
                self._take_turn(other)
                self._inbox.append((self._answered, (other, True)))

    def _make_room(self) -> bool:
        """End the connection that has waited longest for its client; False when there is none."""
        waiting = [c for c in self._connections if c.state.waits_since is not None]
        if not waiting:
            return False
        self._expire(min(waiting, key=lambda c: c.state.waits_since or 0.0))
        return True

    def _expire(self, connection: Connection) -> None:
        """End the client's turn: it hears why, or is dropped."""
        connection.state.deadline = math.inf
        connection.state.waits_since = None
        if connection.want is READ:
            self._guarded(self._go_on, connection, None)
        elif connection.want is TURN:
            self._guarded(self._go_on, connection, False)
        else:
            self._drop(connection)

    def _tick(self, now: float) -> None:
        for connection in [c for c in self._connections if c.state.deadline < now]:
            if connection.want is not NEXT:  # whose move is ours
                self._expire(connection)
        # Where tokens have changed, those who follow come again with theirs, if it still counts.
        for stream in list(self._streams.open) if self._app.has_new_tokens() else ():
            self._drop(stream)
        for stream in [s for s in self._streams.open if s.state.deadline < now]:
            self._guarded(self._streams.expire, stream)

    def _begin_to_stop(self, _: None) -> None:
        self.is_stopping = True
        self._end_at = time.monotonic() + DRAIN_SECONDS
        for stream in list(self._streams.open):
            self._guarded(self._streams.leave, stream)
        for connection in [c for c in self._connections if c.want in (READ, HANDSHAKE)]:
            self._expire(connection)


def close_socket(sock: socket.socket) -> None:
    """Close a socket so that the peer reads the end after everything that was sent."""
    if hasattr(sock, "unwrap"):  # TLS tells its end itself; nobody waits for the peer's answer
        with contextlib.suppress(OSError, ValueError):
            sock.setblocking(False)
            sock.unwrap()
    with contextlib.suppress(OSError):  # the peer may have left first
        socket.socket.shutdown(sock, socket.SHUT_WR)
    sock.close()


# ---------------------------------------------------------------------------
# Server: the listening socket
# ---------------------------------------------------------------------------


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files as far as all sockets need; return what it is then.

    Not to the hard limit: the commands of tasks inherit it, and some close every possible number.
    """
    try:
        import resource
    except ImportError:
        return WANTED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (WANTED_DESCRIPTORS, 10_240):  # the second is the most that macOS may allow
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= limit:
            return limit
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return limit
    return soft


class ServeServer(ThreadingHTTPServer):
    """Accepts connections for one app and gives them to its network thread.

    Raises OSError when the address cannot be bound. `attach` gives it its app before
    `serve_forever`.
    """

    request_queue_size = LISTEN_BACKLOG

    def __init__(self, host: str, port: int, ssl_context: ssl.SSLContext | None = None) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.ssl_context = ssl_context
        # So that whoever comes later is told so, and the database and the tasks still find some.
        descriptors = raise_descriptor_limit() - RESERVED_DESCRIPTORS
        self.max_connections = min(MAX_CONNECTIONS, max(4, descriptors // 4))
        self.max_streams = min(MAX_STREAMS, max(4, descriptors - 2 * self.max_connections))
        self._stopped = threading.Event()
        self._is_serving = False  # shutdown would wait for ever for a loop that was never begun
        # Only the network thread reads from sockets, so no handler class is given.
        super().__init__((host, port), None)  # type: ignore[arg-type]
        self.host = host
        _servers.add(self)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's name: it may hang without a DNS."""
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = (
            str(self.server_address[0]),
            int(self.server_address[1]),
        )

    def attach(self, app: App, allowed_hosts: Iterable[str] = ()) -> None:
        """Serve `app`.

        On a loopback bind without token only loopback names and `allowed_hosts` may be asked for.
        """
        self.app = app
        self.network = Network(app, self.ssl_context, self.max_connections, self.max_streams)
        app.check_stream_room = self.network.check_stream_room
        app.trusted_hosts = frozenset(_host_name(name) for name in allowed_hosts)
        if is_loopback(self.host) and not app.has_token:
            own = self.host if ":" not in self.host else f"[{self.host}]"
            app.allowed_hosts = (
                frozenset({"localhost", "127.0.0.1", "[::1]", own.lower()}) | app.trusted_hosts
            )

    @property
    def url(self) -> str:
        """An address that can be opened on this machine."""
        own = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = f"[{own}]" if ":" in own else own
        return f"{'http' if self.ssl_context is None else 'https'}://{host}:{self.server_port}"

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve in this thread until `stop`."""
        self._is_serving = True
        super().serve_forever(poll_interval)

    def start(self) -> None:
        """Serve in a thread of its own."""
        self._is_serving = True
        start_thread("server", self.serve_forever)

    def stop(self) -> None:
        """Stop accepting, end the streams with a proper last chunk, and let connections go."""
        self._stopped.set()
        if self._is_serving:
            self.shutdown()
        self.server_close()
        self.network.stop()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.network.make_room()
                self._stopped.wait(0.02)  # the connection would be offered again at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        self.network.admit(request)

    def close_inherited(self) -> None:
        """Let go of the parent's sockets, in a forked child."""
        self.socket.close()
        if hasattr(self, "network"):
            self.network.close_inherited()


_servers: weakref.WeakSet[ServeServer] = weakref.WeakSet()
_own_signals: set[int] = set()  # that this process handles; a forked child does not


def _begin_child() -> None:
    """Keep nothing of the engines, the server and the signals of the parent, in a forked child.

    It would hold the port and the clients' connections, and think that it drives their runs.
    """
    _attempts_here.clear()
    for engine in _engines_here:
        start_thread("parent-watch", _end_forked_worker_after, engine)
    _engines_here.clear()
    _live_groups.clear()
    for server in _servers:
        server.close_inherited()
    for number in _own_signals:
        signal.signal(number, signal.SIG_DFL)
    _unblock_signals()


_fork_masks: dict[int, Any] = {}  # by thread, while it forks


def _block_signals() -> None:
    """Hold signals back while a child is forked: it would lose them to the parent's handler."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _own_signals)
    _fork_masks[threading.get_ident()] = mask


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork_masks.pop(threading.get_ident()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_begin_child
    )


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def make_server(
    app: App,
    host: str = "127.0.0.1",
    port: int = 7331,
    *,
    ssl_context: ssl.SSLContext | None = None,
    allowed_hosts: Iterable[str] = (),
) -> ServeServer:
    """Return a bound server for `app`: `serve_forever()` in this thread, or `start()`; `stop()`
    ends it.

    Raises the limit of open files, to 16,384 at most. Raises OSError when the address cannot be
    bound.
    """
    server = ServeServer(host, port, ssl_context)
    server.attach(app, allowed_hosts)
    return server


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------

EXIT_CODES = {
    "finished": 0,
    "failed": 1,
    "cancelled": 2,
    "waiting-approval": 3,
    "running": 3,  # suspended
    "continued": 0,
}
EXIT_FAILURE = 1
EXIT_CANCELLED = 2
EXIT_SUSPENDED = 3
EXIT_USAGE = 4
EXIT_CONFLICT = 5
EXIT_INTERRUPTED, EXIT_LEFT = 128 + 2, 128 + 13  # as a shell tells of SIGINT and SIGPIPE
# Wrappers such as timeout(1) signal the process and its group: what comes so soon is one signal.
SAME_SIGNAL_SECONDS = 0.1
FAREWELL_SECONDS = 10.0  # for slow followers, when a server leaves after its run's end


class UsageError(SmithersError):
    """A mistake of the person at the keyboard: one clear line, exit code 4, nothing written."""

    code = "USAGE"


# Words that other tools have for our commands.
MEANT = {"list": "ps", "ls": "ps", "run": "up", "start": "up", "serve": "server", "log": "logs"}
MEANT.update(tail="logs", events="logs", reject="deny", kill="cancel", resume="up", why="status")


def pasted(*words: str) -> str:
    """Return the line that has this program do something, wherever it is pasted."""
    return shlex.join([sys.executable, os.path.abspath(__file__), *words])


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        unknown = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
        if unknown:
            names = [command.name for command in COMMANDS]
            close = difflib.get_close_matches(unknown[1], names, 1, 0.6)
            close = [MEANT[unknown[1]]] if unknown[1] in MEANT else close
            close = close or [name for name in names if name in unknown[1]][:1]
            meant = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names)}"
            message = f"no command {unknown[1]!r}{meant}"
        self.exit(
            EXIT_USAGE,
            f"[smithers] Error: {message}; help: {pasted(*self.prog.split()[1:])} --help\n",
        )


_has_time = False  # whether lines bear the time, as in the log of a detached run


def say(text: str) -> None:
    """Write one progress line to stderr; a run goes on when nobody reads it any more."""
    at = time.strftime("%Y-%m-%d %H:%M:%S ") if _has_time else ""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{at}[smithers] {text}\n")  # at once: print would write the end by itself
        sys.stderr.flush()


def print_result(out: TextIO, facts: Mapping[str, Any]) -> None:
    """Write the result to the real stdout, as JSON that any locale can print."""
    try:
        out.write(json.dumps(facts, separators=(",", ":")) + "\n")
        out.flush()
    except OSError as error:
        say(f"The result could not be written: {error.strerror}")


def parse_flag(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(
            f"expected true or false, got {text!r}: write --metrics=true, or put it after FILE"
        )
    return values[text.lower()]


def parse_port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {short(text)}")
    return int(text)


def parse_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 10000, got {short(text)}")
    return int(text)


def parse_seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected seconds, at least 0, got {short(text)}")


Flag = tuple[tuple[str, ...], dict[str, Any]]


def flag(*names: str, **options: Any) -> Flag:
    """Return a flag as `add_argument` takes it."""
    return names, options


SWITCH = "store_true"
SERVE_FLAGS = (
    flag("--host", default="127.0.0.1", help="bind address (default: 127.0.0.1)"),
    flag("--port", type=parse_port, default=7331, help="TCP port, 0 picks one (default: 7331)"),
    flag("--auth-token", help="bearer token (default: the environment's SMITHERS_API_KEY)"),
    flag("--auth-token-file", metavar="FILE", help="file that holds the bearer token"),
    flag("--tokens", metavar="FILE",
         help="file (0600) of named tokens, a line each: name role token; roles: viewer, approver,"
         " operator"),
    flag("--metrics", type=parse_flag, nargs="?", const=True, default=True,
         help="serve /metrics (default: true)"),
    flag("--no-metrics", dest="metrics", action="store_false", help="do not serve /metrics"),
    flag("--allowed-host", action="append", default=[], metavar="NAME",
         help="also answer to this host"),
    flag("--certfile", help="TLS certificate chain (PEM)"),
    flag("--keyfile", help="TLS private key (PEM; default: in the certificate file)"),
)  # fmt: skip
LINGER_FLAG = flag("--linger", type=parse_seconds, metavar="SECONDS",
                   help="how long to serve after the end (default: until stopped)")  # fmt: skip
NOTIFY_FLAG = flag(
    "--notify",
    metavar="ARGV",
    help="program to start when a gate opens or is about to expire, and at the end",
)
EXECUTOR_FLAG = flag(
    "--executor",
    metavar="MODULE:FACTORY",
    help="run functions in the Executor that FACTORY() returns",
)
DB_FLAG = flag("--db", default="smithers.db", help="the sqlite file (default: smithers.db)")
UP_FLAGS = (
    flag("workflow", metavar="FILE[:name]", help="the workflow file, and the object in it"),
    flag("--serve", action=SWITCH, help="serve the run over HTTP; stay after its end"),
    *SERVE_FLAGS,
    LINGER_FLAG,
    NOTIFY_FLAG,
    flag("-d", "--detach", action=SWITCH,
         help="run in the background; prints runId, pid, logFile, url"),
    flag("-r", "--run-id", help="the run's id (default: a new one)"),
    flag("-i", "--input", help="the run's input: a JSON object, @file or - (default: {})"),
    flag("--resume", action=SWITCH,
         help="go on with the run given by --run-id, or begin it; one that has ended is shown"),
    flag("--retry", action=SWITCH,
         help="with --resume: give the failed nodes of a run that has ended a fresh try"),
    flag("--force", action=SWITCH,
         help="with --resume: take over from a living process, or a workflow of another name"),
    flag("-c", "--max-concurrency", type=parse_count, default=4,
         help="tasks at once (default: 4)"),
    DB_FLAG,
    EXECUTOR_FLAG,
)  # fmt: skip


class Command(NamedTuple):
    name: str
    help: str
    flags: tuple[Flag, ...]
    run: Callable[[argparse.Namespace], int]
    example: str


def make_parser() -> Parser:
    parser = Parser(prog="smithers_serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.required = True
    for command in COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog=f"example: {pasted()} {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # an example stays on one line
        )
        for names_of_flag, options in command.flags:
            one.add_argument(*names_of_flag, **options)
        one.set_defaults(run=command.run)
    return parser


def parse_command_line(argv: Seq[str]) -> argparse.Namespace:
    """Return what the words say. Raises SystemExit, as argparse does, when it has told a mistake.

    It takes `[RUN] [NODE]` in one go only: those that come after a flag are added here.
    """
    parser = make_parser()
    for word in argv:
        if printable(word) != word:
            parser.error(f"{short(word)} is not valid Unicode")
    args, rest = parser.parse_known_args(argv)
    end = rest.index("--") if "--" in rest else len(rest)
    is_flag = [word.startswith("-") for word in rest[:end]]
    if rest and (any(is_flag) or not hasattr(args, "words")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words += rest[:end] + rest[end + 1 :]
    return args


def split_workflow(spec: str) -> tuple[str, str]:
    """Return file and name of `FILE[:name]`."""
    if os.path.isfile(spec) or ":" not in spec:
        return spec, "workflow"
    path, _, name = spec.rpartition(":")
    return path, name


def load_workflow(spec: str) -> Any:
    """Return the workflow that `FILE[:name]` names.

    Raises UsageError, with the line of the mistake.
    """
    import importlib.util

    path, name = split_workflow(spec)
    if not os.path.isfile(path):
        raise UsageError(f"there is no workflow file {os.path.abspath(path)}")
    path = os.path.realpath(path)  # its siblings are in the real folder
    sys.path.insert(0, os.path.dirname(path))
    stem = os.path.splitext(os.path.basename(path))[0]
    taken = stem in sys.modules or stem in getattr(sys, "stdlib_module_names", ())
    module_name = f"workflow_{stem}" if taken or not stem.isidentifier() else stem
    found = importlib.util.spec_from_file_location(module_name, path)
    if found is None or found.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module  # where pickle and dataclasses look for it
    try:
        found.loader.exec_module(module)
    except AuthoringError as error:
        raise _placed(error, path) from error
    except (Exception, SystemExit) as error:  # user code: what its import raises, in one line
        raise UsageError(
            f"cannot load {path}{_line_in(error, path)}: {type(error).__name__}: {error}"
        ) from error
    workflow = getattr(module, name, None)
    if workflow is None:
        raise UsageError(f"{path} has no object called {name!r}; `up FILE:name` picks another one")
    if not callable(workflow) and not isinstance(workflow, Workflow):
        raise UsageError(
            f"{name!r} in {path} is not a workflow function but a {type(workflow).__name__}"
        )
    return workflow


def render_once(workflow: Any, spec: str, value: Any) -> Workflow:
    """Return the tree that a new run would begin with.

    Raises AuthoringError for a mistake in it, UsageError for what the function raises.
    """
    path = os.path.realpath(split_workflow(spec)[0])
    try:
        tree = workflow if isinstance(workflow, Workflow) else workflow(Ctx("new", value))
        if not isinstance(tree, Workflow):
            raise UsageError(f"a workflow function must return a Workflow, got {short(tree)}")
        Plan(tree, {})
    except AuthoringError as error:
        raise _placed(error, path) from error
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # user code: what it raises, in one line
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"the workflow function raised{_line_in(error, path)}: {what}") from error
    return tree


def _placed(error: AuthoringError, path: str) -> AuthoringError:
    """Return a mistake in a tree with the line that it is in: the same wherever that is built."""
    where = f"{os.path.basename(path)}{_line_in(error, path)}"
    return AuthoringError(f"{where}: {error}", error.code)


def _line_in(error: BaseException, path: str) -> str:
    """Return `, line N` of the last frame in `path`."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else None
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == path:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return "" if line is None else f", line {line}"


class LogFormatter(logging.Formatter):
    """Writes nothing that a terminal would obey: a traceback may quote anybody."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(log_safe, super().format(record).split("\n")))


def share_import_path(folder: str) -> None:
    """Have this process, and the workers that it starts in whatever way, import the same files.

    Those of this file's folder, of the workflow's and of the working folder.
    """
    folders = [os.path.dirname(os.path.abspath(__file__)), os.path.realpath(folder), os.getcwd()]
    sys.path += [folder for folder in folders if folder not in sys.path]
    folders += filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folders))


def load_executor(spec: str, workflow: str) -> Callable[[], Any]:
    """Return a function that makes the Executor `MODULE:FACTORY` names; the first is made here.

    Its workers can import what the workflow's file can.
    """
    import importlib

    share_import_path(os.path.dirname(split_workflow(workflow)[0]))
    module_name, _, factory_name = spec.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        first = factory()
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--executor {spec}: expected MODULE:FACTORY: {error}") from error
    except Exception as error:  # foreign code: a cluster that is not there says so in its own way
        raise UsageError(f"--executor {spec}: {type(error).__name__}: {error}") from error
    if not callable(getattr(first, "submit", None)):
        raise UsageError(f"--executor {spec}: {type(first).__name__} is not an executor")
    made = [first]
    return lambda: made.pop() if made else factory()


def read_input(text: str | None) -> Any:
    """Return the run's input from `--input`: JSON, @file or - for standard input."""
    if text is None:
        return None
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            with open(text[1:], encoding="utf-8") as file:
                text = file.read()
        value = parse_json(text)
    except OSError as error:
        raise UsageError(f"--input: cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--input is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"--input must be a JSON object, got {text[:80]!r}")
    if len(to_json(value).encode()) > MAX_OUTPUT_BYTES:
        raise UsageError(f"--input has over {MAX_OUTPUT_BYTES} bytes of JSON")
    return value


def read_token(args: argparse.Namespace) -> str | None:
    """Return the token that is asked for: from the flag, the file or the environment."""
    token: str | None = args.auth_token
    if token is None and args.auth_token_file is not None:
        try:
            with open(args.auth_token_file, encoding="utf-8") as file:
                token = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--auth-token-file: cannot read {args.auth_token_file}: {error}"
            ) from error
    if token is None:
        token = os.environ.get("SMITHERS_API_KEY")
    if token is not None:
        try:
            _checked_token(token)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return token


def make_ssl_context(certfile: str | None, keyfile: str | None) -> ssl.SSLContext | None:
    if certfile is None:
        if keyfile is not None:
            raise UsageError("--keyfile needs --certfile")
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Work that a client could ask for without end. LibreSSL does not know the option.
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    try:
        context.load_cert_chain(certfile, keyfile)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"cannot use {certfile} for TLS: {error}") from error
    return context


def run_url(server_url: str, run_id: str) -> str:
    """Return where a server of many runs has the routes of one."""
    return f"{server_url}/v1/runs/{urllib.parse.quote(run_id, safe='')}"


def page_url(url: str | None, *place: str) -> str | None:
    """Return where the page is on which to see a run, or a place of it; None without a server."""
    if url is None:
        return None
    base, _, run = url.partition("/v1/runs/")
    parts = [*(("runs", run) if run else ()), *(urllib.parse.quote(p, safe="") for p in place)]
    return f"{base}/ui" + (f"#/{'/'.join(parts)}" if parts else "")


class Narrator:
    """Writes a line per node event, and for a gate the line that approves it."""

    WORDS = {
        "NodeStarted": "started",
        "NodeFinished": "finished",
        "NodeFailed": "failed",
        "NodeSkipped": "skipped",
        "NodeWaitingApproval": "waits for approval",
        "ApprovalGranted": "approved",
        "ApprovalDenied": "denied",
    }

    def __init__(
        self, args: argparse.Namespace, db: SmithersDb, url: str | None, has_token: bool
    ) -> None:
        self._args = args
        self._db = db
        self._url = url
        # Only a variable that is set where the line is pasted, as this process's own is.
        is_in_environment = has_token and "SMITHERS_API_KEY" in os.environ
        self._auth = ' -H "Authorization: Bearer $SMITHERS_API_KEY"' if has_token else ""
        self._can_curl = url is not None and (is_in_environment or not has_token)

    def __call__(self, event: Event) -> None:
        payload = event.payload
        if event.type == "NodeOutput":
            say(f"{payload['nodeId']} | {log_safe(payload['text'])}")
        elif event.type == "NodeRetrying":
            props: Mapping[str, str] = {}
            with contextlib.suppress(StorageError, Unavailable), self._db.snapshot() as reads:
                props = props_of(reads.get_tree(payload["runId"]), payload["nodeId"])
            which = attempt_text(payload["attempt"], props)
            due = due_text(payload["dueAtMs"])
            say(f"{self._name(payload, 0)} will be tried again {due}: {which}")
        elif event.type == "NodeCancelled":
            was_stopped = payload["reason"] in (SUSPENDED, INTERRUPTED, POOL_BROKE)
            what = "interrupted" if was_stopped else "cancelled"
            say(f"{self._name(payload)} {what}: {payload['reason']}")
        elif event.type in self.WORDS:
            say(f"{self._name(payload)} {self.WORDS[event.type]}{self._detail(payload)}")
        if event.type == "NodeWaitingApproval":
            say(f"Approve it: {self._approve_line(payload)}")

    def _approve_line(self, payload: Mapping[str, Any]) -> str:
        node_id, iteration = payload["nodeId"], payload["iteration"]
        if not self._can_curl:
            return decision_line(self._args, "approve", payload)
        node = urllib.parse.quote(node_id, safe="")
        data = f" -d '{{\"iteration\":{iteration}}}'" if iteration else ""
        return f"curl -X POST {self._url}/approve/{node}{self._auth}{data}"

    @staticmethod
    def _name(payload: dict[str, Any], again: int | None = None) -> str:
        again = payload.get("attempt") or 0 if again is None else again
        name = node_name(payload["nodeId"], payload["iteration"])
        return name + (f" ({ordinal(again + 1)} attempt)" if again else "")

    @staticmethod
    def _detail(payload: dict[str, Any]) -> str:
        if "error" in payload:
            return f": {log_safe(payload['error']['message'])}"
        by = f" by {log_safe(payload['decidedBy'])}" if "decidedBy" in payload else ""
        return by + (f": {log_safe(payload['note'])}" if "note" in payload else "")


class Notifier:
    """Starts a program when a gate opens or is about to expire, and when the run ends.

    It gets one JSON object on standard input. The run never waits for it: the engine's thread only
    puts events in; 10 s a try, three tries, then a line in the log.
    """

    TRIES, TRY_SECONDS = 3, 10.0
    SOON_SHARE = 0.2  # of a gate's time that is left when it is about to expire

    def __init__(self, argv: Seq[str], db: SmithersDb, run_id: str, url: str | None) -> None:
        self._argv, self._db, self._run_id, self._url = list(argv), db, run_id, url
        self._inbox: queue.SimpleQueue[tuple[str, Key | None] | None] = queue.SimpleQueue()
        self._expiring = Deadlines()
        self._process: Any = None  # the program, while it runs
        self._closed = threading.Event()  # nothing more is started
        for gate in db.list_gates(run_id, "requested"):  # those of an earlier life
            self._inbox.put(("gate-known", gate.key))
        self._thread = start_thread("notify", self._run)

    def __call__(self, event: Event) -> None:
        if event.type == "NodeWaitingApproval":
            payload = event.payload
            self._inbox.put(("gate-opened", (payload["nodeId"], payload["iteration"])))
        elif event.type in ("RunFinished", "RunFailed", "RunCancelled"):
            self._inbox.put(("run-ended", None))

    def close(self, seconds: float) -> None:
        """Have what has happened told, for so long at most."""
        self._inbox.put(None)
        self._thread.join(seconds)
        self._closed.set()
        process = self._process
        if process is not None:
            _signal_group(process.pid, signal.SIGKILL)
        self._thread.join(HURRY_SECONDS)

    def _run(self) -> None:
        while True:
            patience = min(60.0, max(0.0, (self._expiring.next() - now_ms()) / 1000))
            try:
                item = self._inbox.get(timeout=patience)
            except queue.Empty:
                self._tell_what_expires()
                continue
            if item is None:
                self._tell_what_expires()
                return
            self._guarded(*item)

    def _tell_what_expires(self) -> None:
        for kind, key in self._expiring.take(now_ms()):
            self._guarded(kind, key)

    def _guarded(self, kind: str, key: Key | None) -> None:
        try:
            self._tell(kind, key)
        except Exception:  # the outermost call of this thread
            logger.error("nobody was told of %s", kind, exc_info=True)

    def _tell(self, kind: str, key: Key | None) -> None:
        with self._db.snapshot() as reads:
            run = reads.get_run(self._run_id)
            gate = None if key is None else reads.get_gate(self._run_id, key)
        if run is None or key is not None and (gate is None or gate.status != "requested"):
            return
        if gate is not None and gate.is_pause:
            return
        facts: dict[str, Any] = {
            "event": kind,
            "runId": run.run_id,
            "workflowName": run.workflow_name,
            "status": run.status,
            "url": page_url(self._url),
        }
        if gate is not None:
            request = gate.request
            facts.update(nodeId=gate.node_id, iteration=gate.iteration)
            facts.update(title=request.get("title"), summary=request.get("summary"))
            deadline, timeout = gate.deadline_at_ms, request.get("timeoutMs")
            if deadline is not None and timeout is not None:
                facts["deadlineAtMs"] = deadline
                if kind != "gate-expiring" and deadline > now_ms():
                    self._expiring.set("gate-expiring", key, deadline - timeout * self.SOON_SHARE)
            if self._url is not None:
                facts["url"] = page_url(self._url, "node", gate.node_id, str(gate.iteration))
        if kind != "gate-known":
            self._start(to_json(facts).encode())

    def _start(self, data: bytes) -> None:
        import subprocess

        why = late = "there was no time left when the run's process ended"
        for _ in range(self.TRIES):
            if self._closed.is_set():
                why = late
                break
            try:
                process = self._process = subprocess.Popen(
                    self._argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
                try:
                    process.communicate(data, self.TRY_SECONDS)
                    why = f"it ended with {process.returncode}"
                except subprocess.TimeoutExpired:
                    why = f"it took over {self.TRY_SECONDS:g} s"
                    _signal_group(process.pid, signal.SIGKILL)
                    process.wait()
                self._process = None
                if process.returncode == 0:
                    return
            except OSError as error:
                why = error.strerror or str(error)
            self._closed.wait(0.2)
        logger.warning("--notify %s did not work: %s", self._argv[0], log_safe(why))


# ---------------------------------------------------------------------------
# Up: one run, and its server, in one process
# ---------------------------------------------------------------------------


def open_database(path: str) -> SmithersDb:
    try:
        return SmithersDb(path)
    except (StorageError, Unavailable) as error:
        raise UsageError(str(error)) from error


def check_up_arguments(args: argparse.Namespace) -> None:
    if args.resume and args.run_id is None:
        known = ""
        if os.path.exists(args.db):
            with open_database(args.db) as db:
                statuses = (*ACTIVE_STATUSES, "failed", "cancelled")
                known = ", ".join(run.run_id for run in db.list_runs(statuses)[:10])
        raise UsageError("--resume needs --run-id" + (f"; there are: {known}" if known else ""))
    for flag in ("force", "retry"):
        if getattr(args, flag) and not args.resume:
            raise UsageError(f"--{flag} goes with --resume")
    if args.run_id is not None:
        check_id(args.run_id, "run")


def check_seat_arguments(args: argparse.Namespace) -> None:
    """Refuse a file of tokens, and words for --notify, that cannot be used."""
    try:
        if args.tokens is not None:
            Tokens(args.tokens)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--tokens {args.tokens}: {reason}") from error
    try:
        if args.notify is not None and not shlex.split(args.notify):
            raise UsageError("--notify needs a program")
    except ValueError as error:
        raise UsageError(f"--notify {args.notify!r} cannot be split into words: {error}") from error


def check_input_kept(db: SmithersDb, run_id: str, value: Any) -> None:
    """Refuse an input that the run, begun with another one, would not look at."""
    kept = db.get_input(run_id)
    if value is not None and kept is not None and json.loads(kept) != value:
        raise UsageError(
            f"run {run_id} keeps the input it began with, which is another one: leave --input out"
        )


def run_up(args: argparse.Namespace) -> int:
    """Run a workflow, served or not, and return the exit code."""
    token = read_token(args)
    check_up_arguments(args)
    check_seat_arguments(args)
    fix_paths(args)
    if args.detach:
        return detach(args, token)
    with captured_prints(echo=False):  # a handler of logging that the file makes writes there too
        return run_here(args, load_workflow(args.workflow), token)


def run_here(
    args: argparse.Namespace,
    workflow: Any,
    token: str | None,
    patience: Patience = "timed",
    use: Callable[[SmithersDb], None] = lambda db: None,
) -> int:
    """Bind, open, claim, in that order, so that a mistake leaves nothing behind.

    Then drive the run. `use` is called with the database.
    """
    value = read_input(args.input)
    if not args.resume:
        check_first_tree(workflow, args, value)
    executor = load_executor(args.executor, args.workflow) if args.executor else None
    process = Process(args)
    server = bind_server(args) if args.serve else None
    db: SmithersDb | None = None
    try:
        db = open_database(args.db)
        use(db)
        run_id = args.run_id or new_run_id()
        url = where_served(args, run_id, server)
        if args.resume:
            check_input_kept(db, run_id, value)
        process.make_engine = functools.partial(
            Engine,
            workflow,
            db,
            run_id,
            input=value,
            max_concurrency=args.max_concurrency,
            executor=executor,
            on_event=process.take_event,
            patience="all" if server else patience,
            config=kept_facts(args, run_id, url),
            echo_prints=False,
        )
        engine = process.make_engine()
        process.listeners.append(Narrator(args, db, url, bool(token or args.tokens)))
        engine.open(args.resume, args.force, args.retry)
        say(f"Run {run_id} in {db.path}")
        warn_of_idle_flags(args)
        process.notify(db, run_id, url)
        if server is not None:
            app = ServeApp(db, run_id, engine.abort, token, args.metrics, args.tokens)
            process.attach(server, app)
    except BaseException:
        process.let_go(server, db)
        raise
    return process.run(engine, db, server)


def check_first_tree(workflow: Any, args: argparse.Namespace, value: Any) -> None:
    """Refuse a new run whose first tree has a mistake."""
    try:
        render_once(workflow, args.workflow, value)
    except UsageError as error:
        if not isinstance(error.__cause__, SystemExit):  # to leave so is the run's failure
            raise


def where_served(args: argparse.Namespace, run_id: str, server: ServeServer | None) -> str | None:
    """Return where a run has its routes: here, or at the server that has started this worker."""
    if server is not None:
        return server.url
    of_server = getattr(args, "server_url", None)
    return None if of_server is None else run_url(of_server, run_id)


def warn_of_idle_flags(args: argparse.Namespace) -> None:
    for names, options in () if args.serve else (*SERVE_FLAGS, LINGER_FLAG):
        name = options.get("dest", names[0][2:].replace("-", "_"))
        if getattr(args, name) != options.get("default") and "dest" not in options:
            say(f"WARNING: {names[0]} has no effect without --serve")


def kept_facts(args: argparse.Namespace, run_id: str, url: str | None) -> dict[str, Any]:
    """Return what is kept of a run so that it can be found, told and gone on with; no token."""
    if hasattr(args, "server_url"):  # a worker: its server knows the rest
        return {"pid": os.getpid()}
    hidden = ("auth_token", "out", "run", "input", "resume", "retry", "force", "detach", "command")
    options = {name: value for name, value in vars(args).items() if name not in hidden}
    options.update(run_id=run_id, auth_token=None, force=False)
    log_file = getattr(args, "log_file", None)
    return {"url": url, "pid": os.getpid(), "logFile": log_file, "options": options}


def bind_server(args: argparse.Namespace) -> ServeServer:
    context = make_ssl_context(args.certfile, args.keyfile)
    try:
        return ServeServer(args.host, args.port, context)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {args.host}:{args.port}: {reason}") from error


PATH_FLAGS = ("db", "auth_token_file", "tokens", "certfile", "keyfile")


def fix_paths(args: argparse.Namespace) -> None:
    """Make every path of the flags absolute, and keep the folder: a task may move, or remove it."""
    path, name = split_workflow(args.workflow)
    args.workflow = os.path.abspath(path) + ("" if name == "workflow" else f":{name}")
    for flag_name in PATH_FLAGS:
        value = getattr(args, flag_name)
        setattr(args, flag_name, None if value is None else os.path.abspath(value))
    args.folder = os.getcwd()


def resume_line(args: argparse.Namespace, run_id: str) -> str:
    """Return the whole command line that goes on with a run; the paths of `args` are fixed."""
    words = ["up", args.workflow, "--serve", "--resume"]
    words += [f"--run-id={run_id}"] if run_id.startswith("-") else ["--run-id", run_id]
    for names, options in UP_FLAGS:
        name = names[-1]
        value = getattr(args, options.get("dest", name.lstrip("-").replace("-", "_")), None)
        is_plain = name.startswith("--") and "action" not in options
        is_told = is_plain and name not in ("--run-id", "--input", "--auth-token")
        if is_told and value is not None and value != options.get("default"):
            words += [name, _text_of(value)]
    for host in args.allowed_host:
        words += ["--allowed-host", host]
    # Tasks may name files of the folder, and --executor a module there.
    go = f"cd {shlex.quote(args.folder)} && " if os.path.isdir(args.folder) else ""
    return f"{go}{pasted(*words)}"


class Process:
    """The process of one `up`.

    The engine in a thread, the server beside it, signals in the main thread. They are handled from
    the beginning on: one that comes before the engine runs is not lost.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        # A SimpleQueue, not an Event: its put is safe in a signal handler that interrupts its own
        # get.
        self._inbox: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._first_signal: tuple[float, int] | None = None
        is_worker = hasattr(args, "server_url")  # its server and a service manager may both tell it
        self._same_signal_seconds = math.inf if is_worker else SAME_SIGNAL_SECONDS
        self._error: SmithersError | None = None
        self._threads_before = set(threading.enumerate())
        self.make_engine: Callable[[], Engine]  # for this run, and once more when it is retried
        self.listeners: list[Callable[[Event], None]] = []
        self.notifier: Notifier | None = None
        self.app: ServeApp | None = None
        self._handlers: dict[int, Any] = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._take_signal)
                _own_signals.add(number)

    def take_event(self, event: Event) -> None:
        """Pass an event of the run on, in the engine's thread."""
        for listener in self.listeners:
            listener(event)

    def restore_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
            _own_signals.discard(number)

    def attach(self, server: ServeServer, app: ServeApp) -> None:
        self.app = app
        app.go_on = self.go_on
        server.attach(app, self._args.allowed_host)

    def notify(self, db: SmithersDb, run_id: str, url: str | None) -> None:
        if self._args.notify:
            self.notifier = Notifier(shlex.split(self._args.notify), db, run_id, url)
            self.listeners.append(self.notifier)

    def let_go(self, server: ServeServer | None, db: SmithersDb | None) -> None:
        """Leave nothing behind where nothing comes of it."""
        self.restore_signals()
        if server is not None:
            server.server_close()
        if db is not None:
            db.close()

    def run(self, engine: Engine, db: SmithersDb, server: ServeServer | None) -> int:
        """Drive the run and return the exit code."""
        self._engine, self._db, self._server = engine, db, server
        if server is not None:
            # A task that computes holds the server up for no longer than this at a time.
            sys.setswitchinterval(0.0005)
            server.start()
            self._say_where(server)
        announce_ready({"runId": engine.run_id, "url": server.url if server else None})
        start_thread("engine", self._drive)
        code = self._wait_for_end()
        if self.notifier is not None:
            self.notifier.close(HURRY_SECONDS if self._first_signal else Notifier.TRY_SECONDS)
        if server is not None:
            self._finish_streams(server)
            server.stop()
            server.app.close()
        kill_live_commands()
        if self._error is None:
            db.close()
        # The interpreter would wait for them: for calls that nobody wants any more.
        self._args.must_leave = engine.left_call_behind or self._has_foreign_threads()
        self.restore_signals()
        return code

    def _finish_streams(self, server: ServeServer) -> None:
        """Let those who follow a run that has ended have its last event, for some seconds."""
        until = time.monotonic() + FAREWELL_SECONDS
        while server.network.has_streams and time.monotonic() < until:
            if self._first_signal is not None or self._next_message(WATCH_SECONDS):
                return

    def _has_foreign_threads(self) -> bool:
        """Return whether something that a task has started may keep the process.

        Threads of concurrent.futures do, whatever kind of thread they are.
        """
        others = set(threading.enumerate()) - self._threads_before
        return not all(thread.name.startswith("smithers-") for thread in others)

    def _say_where(self, server: ServeServer) -> None:
        is_everywhere = self._args.host in ("0.0.0.0", "::", "")
        where = f", and on this machine's other addresses ({self._args.host})"
        say(f"HTTP server listening on {server.url}" + (where if is_everywhere else ""))
        say(f"Page: {page_url(server.url)}")
        if not is_loopback(server.host) and not server.app.has_token:
            say(
                "WARNING: anybody who reaches this port can approve gates and cancel the run:"
                " set --auth-token"
            )

    def _take_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = (now, number)
            self._inbox.put("cancel" if number == signal.SIGINT else "suspend")
        elif now - self._first_signal[0] > self._same_signal_seconds:
            kill_live_commands()
            is_cancel = self._first_signal[1] == signal.SIGINT
            os._exit(EXIT_CANCELLED if is_cancel else EXIT_SUSPENDED)

    def _drive(self) -> None:
        try:
            if self._engine.result is None:
                self._engine.run()
        except SmithersError as error:
            self._error = error
        except BaseException as error:  # the outermost call of the engine's thread
            logger.error("the engine failed", exc_info=True)
            self._error = SmithersError(f"the engine failed: {type(error).__name__}: {error}")
        finally:
            self._inbox.put("end")

    def _next_message(self, seconds: float = math.inf) -> str:
        """Wait for a signal or the end of the engine; return "" after so many seconds.

        Not in one go: a signal that comes just before the thread falls asleep is handled only when
        it wakes.
        """
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            try:
                return self._inbox.get(timeout=max(0.0, min(0.5, left)))
            except queue.Empty:
                if left <= 0:
                    return ""

    def go_on(self) -> None:
        """Have the run, which has ended, gone on with, as its row asks."""
        self._inbox.put("retry")

    def _wait_for_end(self) -> int:
        """Wait for the end of the run, then serve it until a signal, or as long as was asked for.

        Meanwhile it may be retried.
        """
        code = self._hear_engine()
        while self.app is not None and self._error is None and self._first_signal is None:
            linger = self._args.linger
            if self._next_message(math.inf if linger is None else linger) != "retry":
                break
            try:
                self._engine = self.make_engine()
                self._engine.open(resume=True)
            except SmithersError as error:  # somebody else was faster
                say(f"Not retried: {log_safe(error)}")
                continue
            self.app.abort = self._engine.abort
            start_thread("engine", self._drive)
            code = self._hear_engine()
        return code

    def _hear_engine(self) -> int:
        """Wait until the engine leaves the run, and tell how it stands."""
        signalled = False
        while (message := self._next_message()) != "end":
            if message == "cancel":
                say("Stopping: the run is being cancelled")
                self._engine.cancel()
            elif message == "suspend":
                say("Stopping: the run is being suspended")
                self._engine.suspend()
            signalled = signalled or message != "retry"  # that was asked for twice
        if self._error is not None:
            say(f"Engine stopped: {log_safe(self._error)}")
            return EXIT_FAILURE
        result = self._engine.result
        assert result is not None
        self._print_result(result)
        if result.status == "running" or result.status == "waiting-approval" and signalled:
            say(f"Suspended. Go on with: {self._go_on_line(result)}")
        elif self._server is not None and not signalled:
            linger = self._args.linger
            stays = "still running — press Ctrl+C to stop" if linger is None else ""
            say(f"Workflow {result.status}. Server {stays or f'ends in {linger:g} s'}.")
        elif result.status == "waiting-approval":
            say(f"The run waits for approval. Go on with: {self._go_on_line(result)}")
        return EXIT_CODES[result.status]

    def _go_on_line(self, result: RunResult) -> str:
        if getattr(self._args, "command", "up") == "demo":
            return "demo, anew"
        run = self._db.get_run(result.run_id)
        return resume_line(self._args, result.run_id) if run is None else _resume_hint(run)

    def _print_result(self, result: RunResult) -> None:
        shown: dict[str, Any] = {
            "runId": result.run_id,
            "status": result.status,
            "summary": self._db.get_summary(result.run_id),
        }
        if result.error is not None:
            shown["error"] = result.error
            is_served = self._server is not None and self._first_signal is None
            begin = "" if is_served else "Workflow failed: "  # that follows there
            say(begin + log_safe(result.error["message"]))
        print_result(self._args.out, shown)


READY_FD = "SMITHERS_READY_FD"


def announce_ready(facts: dict[str, Any]) -> None:
    """Tell the process that detached this one that it serves; it may have left."""
    descriptor = os.environ.pop(READY_FD, None)
    if descriptor is not None:
        with contextlib.suppress(OSError), os.fdopen(int(descriptor), "w") as pipe:
            pipe.write(to_json(facts) + "\n")


def open_log(path: str) -> Any:
    """Open a log for appending; a new one can be read by its owner only."""
    try:
        return os.fdopen(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "ab")
    except OSError as error:
        raise UsageError(f"cannot write the log {path}: {error.strerror}") from error


def check_can_begin(args: argparse.Namespace, run_id: str, value: Any) -> None:
    """Refuse, before anything is started or logged, what the detached process would refuse."""
    if not os.path.exists(args.db):
        return
    with open_database(args.db) as db:
        run = db.get_run(run_id)
        if run is not None and not args.resume:
            raise RunExists(f"run {run_id} exists already; use --resume to go on with it")
        if run is not None:
            check_input_kept(db, run_id, value)
            if not args.force and not run.is_terminal and watch_owner(db, run_id) == "alive":
                raise RunOwned(f"run {run_id} is driven by a living process; --force takes it over")


def argv_of(function: str) -> list[str]:
    """Return how to call a function of this module in a process of its own.

    Imported, not run as a script: so its compiled form is cached, which halves start and memory.
    """
    folder = os.path.dirname(os.path.abspath(__file__))
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); import smithers_serve; "
        f"sys.exit(smithers_serve.{function}())"
    )
    return [sys.executable, "-c", code]


def say_end_of_log(path: str, begins_at: int) -> None:
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(begins_at)
        say("The run did not start:\n" + "".join(collections.deque(file, maxlen=20)).rstrip())


def detach(args: argparse.Namespace, token: str | None) -> int:
    """Start the same run in a session of its own and wait until it serves or has died."""
    import subprocess

    if os.name == "nt":
        raise UsageError("--detach is not possible on Windows")
    args.run_id = run_id = args.run_id or new_run_id()
    value = read_input(args.input)
    check_can_begin(args, run_id, value)
    log_path = os.path.join(os.path.dirname(os.path.abspath(args.db)), f"smithers-{run_id}.log")
    reader, writer = os.pipe()
    environment = {**os.environ, READY_FD: str(writer)}
    if token is not None:
        environment["SMITHERS_API_KEY"] = token
    hidden = dict.fromkeys(("out", "run", "auth_token", "auth_token_file"))
    told = {"input": None if value is None else to_json(value), "log_file": log_path}
    options = {**vars(args), **hidden, **told, "detach": False}
    with open_log(log_path) as log:
        begins_at = log.tell()
        child = subprocess.Popen(
            # What it is told, it reads; the words are for whoever looks at the process list.
            [*argv_of("main_detached"), "up", args.workflow, "--run-id", run_id],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=(writer,),
            start_new_session=True,
        )
    os.close(writer)
    assert child.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
            stdin.write(to_json(options).encode("utf-8"))
        with os.fdopen(reader) as pipe:
            ready = pipe.readline()  # not to its end: what the child forks may hold it open
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        say(f"Interrupted before the run served; its log is {log_path}")
        return EXIT_CANCELLED
    if not ready:
        child.wait()
        say_end_of_log(log_path, begins_at)
        return EXIT_FAILURE
    facts = json.loads(ready)
    shown = {"runId": facts["runId"], "pid": child.pid, "logFile": log_path, "url": facts["url"]}
    shown["page"] = page_url(facts["url"])
    print_result(args.out, shown)
    return 0


def main_detached() -> int:
    """Run what the process that started this one has written to standard input."""
    global _has_time
    _has_time = True
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    args = argparse.Namespace(**json.loads(sys.stdin.read()))
    args.run = run_up
    return run_command_line(args)


# ---------------------------------------------------------------------------
# Workers: a process for each run that can go on, and who starts and watches them
# ---------------------------------------------------------------------------


class Order(NamedTuple):
    """What is asked for of a run: the workflow's file, where it is given, and how to run it."""

    workflow_path: str | None
    input_json: str
    max_concurrency: int | None
    run_id: str | None
    is_resume: bool


def parse_order(body: bytes, is_resume: bool) -> Order:
    """Return what a body asks for. Raises InvalidRequest in the original's order and words."""
    said = parse_object(body)
    path, input, config = said.get("workflowPath"), said.get("input"), said.get("config")
    if not (isinstance(path, str) and path) and not (is_resume and path is None):
        raise InvalidRequest("workflowPath must be a string")
    if "input" in said and not isinstance(input, dict):
        raise InvalidRequest("input must be a JSON object")
    if config is not None and not isinstance(config, dict):
        raise InvalidRequest("config must be a JSON object")
    limit = (config or {}).get("maxConcurrency")
    if limit is not None:
        try:
            number = math.nan if isinstance(limit, bool) else float(limit)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 < number < math.inf:
            raise InvalidRequest("config.maxConcurrency must be a positive number")
        limit = min(10_000, max(1, int(number)))
    try:
        input_json = encode_input(input)
        run_id = said.get("runId")
        if run_id is not None:
            check_id(run_id, "run")
    except AuthoringError as error:
        raise InvalidRequest(str(error)) from error
    return Order(path, input_json, limit, run_id, bool(said.get("resume")) or is_resume)


def is_below(root: str, real: str) -> bool:
    return real == root or real.startswith(os.path.join(root, ""))


def find_workflow(root: str, spec: str) -> str:
    """Return `FILE[:name]` with the file's real path. Raises InvalidRequest outside of the root."""
    path, name = split_workflow(os.path.join(root, spec))
    real = os.path.realpath(path) if "\0" not in path else ""
    if not is_below(root, real):
        raise InvalidRequest(
            "Workflow path must be within server root directory", "WORKFLOW_PATH_OUTSIDE_ROOT"
        )
    return real + ("" if name == "workflow" else f":{name}")


MAX_SOURCE_BYTES = 10 << 20


def check_workflow(root: str, spec: str) -> str:
    """Return the sha256 of a workflow file. Raises InvalidRequest with the line of a mistake.

    It is not run here: what its import does is its worker's.
    """
    path = split_workflow(spec)[0]
    shown = os.path.relpath(path, root)
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_SOURCE_BYTES:
            raise InvalidRequest(f"{shown} is not a workflow file", "WORKFLOW_INVALID")
        return _check_source(path, shown, found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise InvalidRequest(
            f"there is no workflow file {shown}: {error.strerror}", "WORKFLOW_INVALID"
        ) from error


@functools.lru_cache(maxsize=128)
def _check_source(path: str, shown: str, changed_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        source = file.read()
    try:
        compile(source, shown, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InvalidRequest(f"{shown}{line}: {what}", "WORKFLOW_INVALID") from error
    return hashlib.sha256(source).hexdigest()


class Worker:
    """A process that drives a run, as its server knows it; `owner` once it is known to run."""

    def __init__(self, forker: Forker | None, owner: str | None = None) -> None:
        self.forker = forker  # who tells of its end; None for one of an earlier server
        self.owner = owner
        self.share: bytes | None = b""  # of the metrics, as it was last taken; None at its end


def _suspend(worker: Worker) -> None:
    if worker.owner is not None and process_is_alive(worker.owner):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process_of(worker.owner)[1], signal.SIGTERM)


class Forker:
    """The server's hold on a process with one thread, that has imported this module and forks.

    So a worker costs milliseconds and shares its memory; its parent has no thread or lock that a
    fork could tear.
    """

    def __init__(self, report: Callable[[Forker, dict[str, Any] | None], None]) -> None:
        import subprocess

        self._process = subprocess.Popen(
            argv_of("main_forker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._report = report
        self.has_forked = False
        start_thread("forker", self._read)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.has_forked = True
                self._report(self, json.loads(line))
        self._process.wait()
        self._report(self, None)

    def start(self, options: Mapping[str, Any]) -> None:
        """Have a worker started. Raises OSError when the process has gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(to_json(options).encode() + b"\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """Let it go; its workers stay."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()


def main_forker() -> int:
    """Fork a worker for each line of standard input; a line on standard output tells of its start
    and of its end. Ends with the server, at the end of the input; the workers go on.
    """
    import asyncio  # noqa: F401  what workers need is imported once, for all of them
    import gc
    import importlib.util  # noqa: F401
    import select
    import subprocess  # noqa: F401

    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    defaults = vars(make_parser().parse_args(["up", "FILE"]))
    # So is what they would compute alike, and the code of a run is warm: 5 % of a worker's time.
    _host(), _wanted_columns(), rehearse(Workflow("warm", Task("task", {})))
    workers: dict[int, str] = {}
    pending = b""
    gc.collect()
    gc.freeze()
    while True:
        ready = select.select([0, wake], [], [])[0]
        if wake in ready:
            os.read(wake, 4096)
        while workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            run_id = workers.pop(pid)
            _tell_server({"runId": run_id, "pid": pid, "code": os.waitstatus_to_exitcode(status)})
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                return 0
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                options = {**defaults, **json.loads(line)}
                pid = os.fork()
                if pid == 0:
                    os.close(wake)
                    os.close(waker)
                    _work_and_leave(options)
                workers[pid] = options["run_id"]
                _tell_server({"runId": options["run_id"], "pid": pid})


def _tell_server(facts: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the server has gone: the end of the input follows
        os.write(1, to_json(facts).encode() + b"\n")


def _work_and_leave(options: dict[str, Any]) -> None:
    """Be a worker and end the process: nothing of its parent's is ever gone on with."""
    code = EXIT_FAILURE
    try:
        code = _work(options)
    except BaseException:  # the outermost call of the process
        logger.error("the worker failed", exc_info=True)
    finally:
        os._exit(code)


def _work(options: dict[str, Any]) -> int:
    """Be the worker of a run, in a forked process; return its exit code."""
    global _has_time
    _has_time = True
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()  # the server's terminal is not its
    log = os.open(options["log_file"], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(descriptor, number)
    try:
        return run_command_line(argparse.Namespace(**{**options, "run": run_worker}))
    finally:
        drain(sys.stderr, 2)


def run_worker(args: argparse.Namespace) -> int:
    """Drive a run until it has ended or only waits for people."""
    file = os.open(args.share_file, os.O_CREAT | os.O_WRONLY, 0o600)
    used: list[SmithersDb] = []

    def share_metrics(db: SmithersDb) -> None:
        used.append(db)
        db.subscribe(lambda tx: write_share())

    def write_share() -> None:
        for db in used:
            os.pwrite(file, db.metrics.share(), 0)

    os.chdir(args.folder)
    try:
        workflow = load_workflow(args.workflow)
    except UsageError as error:
        workflow = functools.partial(_refuse_workflow, str(error))
    code = run_here(args, workflow, None, "none", share_metrics)
    write_share()
    return code


def _refuse_workflow(message: str, ctx: Ctx) -> Workflow:
    raise AuthoringError(message, "WORKFLOW_INVALID")


class Supervisor:
    """Gives each run that can go on a process, and sees to those whose process has died.

    It knows of a run only while somebody drives it, or it has a deadline; the rest is in the file.
    Its thread alone changes what it knows. `facts` and what follows it may be called from any
    thread.
    """

    MAX_CRASHES = 3  # in a row without progress, and the run is begun again each time
    PAUSE_SECONDS = 10.0  # before a run is tried again whose database could not be written
    STOP_SECONDS = SUSPEND_SECONDS + 5.0

    def __init__(
        self, db: SmithersDb, root: str, max_runs: int, options: Mapping[str, Any]
    ) -> None:
        self.root = root
        self.url: str | None = None  # where the server is, once it is bound
        self._db = db
        self._max_runs = max_runs
        self._options = options
        self._folder = f"{db.path}.logs"
        self._lock_file = self._lock()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[str, Worker] = {}
        self._wanted: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._foreign: set[str] = set()  # runs that were woken, and are not this server's
        self._deadlines = Deadlines()  # of gates, and of another try, in ms since the epoch
        self._crashes: dict[str, tuple[int, int]] = {}  # how often, since so many nodes had ended
        self._forker: Forker | None = None
        self._is_stopping = False
        self._last_error = ""  # told once
        self._look_at = 0.0
        # Guards what was taken of each worker's metrics. Held to read a small file.
        self._share_lock = threading.Lock()
        self._watch = db.watch()
        db.subscribe(self._notice)
        self._thread = start_thread("supervisor", self._run)

    def _lock(self) -> int | None:
        """Keep other servers from starting the runs of this file. Raises RunOwned."""
        os.makedirs(self._folder, 0o700, exist_ok=True)
        file = os.open(lock_path(self._folder), os.O_CREAT | os.O_RDWR, 0o600)
        for _ in range(20):  # who asks whether there is a server holds it for an instant
            if try_lock(file):
                return file
            threading.Event().wait(WATCH_SECONDS)
        os.close(file)
        raise RunOwned(f"another server starts the runs of {self._db.path}")

    # From any thread

    def facts(self, run_id: str, spec: str, max_concurrency: int | None) -> dict[str, Any]:
        """Return what is kept of a run so that a server can drive it."""
        return {
            "server": True,
            "workflow": spec,
            "maxConcurrency": max_concurrency or 4,
            "rootDir": self.root,
            "logFile": self._path(run_id, "log"),
            "url": None if self.url is None else run_url(self.url, run_id),
        }

    def go_on(self, run_id: str, order: Order) -> Response:
        """Go on with a run that has not ended, and say if it runs already."""
        said = {"runId": run_id}
        run = self._db.existing_run(run_id)
        if run.is_terminal or run.status == "queued":  # its turn comes
            return json_response(said)
        if owner_life(run) == "alive":
            return json_response({**said, "status": "running"})
        self.adopt(run_id, order.workflow_path, order.max_concurrency)
        return json_response(said)

    def adopt(self, run_id: str, path: str | None, max_concurrency: int | None) -> None:
        """Have a run driven by this server, whoever has begun it, unless it has ended.

        Raises RunNotFound, and InvalidRequest when its file cannot be told or is another.
        """
        with self._db.transaction(run_id, HTTP_LOCK_PATIENCE_SECONDS) as tx:
            run = tx.existing_run(run_id)
            config = run.config  # of a server, or of `up`, or of another program
            begun = config.get("workflow") or config.get("options", {}).get("workflow")
            known = begun or run.workflow_path
            if path is None and known is None:
                raise InvalidRequest("workflowPath must be a string")
            spec = find_workflow(self.root, str(path or known))
            if path and known and os.path.exists(split_workflow(known)[0]) and spec != known:
                raise InvalidRequest(
                    f"run {run_id} is of another workflow file: leave workflowPath out",
                    "WORKFLOW_MISMATCH",
                )
            limit = max_concurrency or config.get("maxConcurrency")
            tx.update_config(**self.facts(run_id, spec, limit))
            tx.wake()
        self._inbox.put(lambda: self._take_in(run_id))

    def take_shares(self) -> None:
        """Take up what the workers have counted since the last time."""
        for run_id, worker in list(self._live.items()):
            self._take_share(run_id, worker)

    def count_live(self) -> float:
        return float(len(self._live))

    def stop(self) -> None:
        """Suspend all runs and wait until their processes have left; the next server goes on."""
        self._inbox.put(self._begin_to_stop)
        self._thread.join(self.STOP_SECONDS)
        self._db.unsubscribe(self._notice)
        self._watch.close()
        if self._forker is not None:
            self._forker.close()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _notice(self, tx: Tx) -> None:
        if tx.is_control:
            self._inbox.put(self._look)

    def _report(self, forker: Forker, facts: dict[str, Any] | None) -> None:
        if facts is None:
            self._inbox.put(lambda: self._forker_gone(forker))
        elif "code" in facts:
            self._inbox.put(lambda: self._ended(facts["runId"], facts["pid"], facts["code"]))
        else:
            self._inbox.put(lambda: self._started(facts["runId"], facts["pid"]))

    # The loop

    def _run(self) -> None:
        self._guarded(self._begin)
        tick_at = 0.0
        while not (self._is_stopping and not self._live):
            due_in = (self._deadlines.next() - now_ms()) / 1000
            left = max(0.0, min(tick_at - time.monotonic(), due_in))
            try:
                call = self._inbox.get(timeout=left) if left else self._tick
            except queue.Empty:
                continue
            self._guarded(call)
            if call == self._tick:
                tick_at = time.monotonic() + WATCH_SECONDS

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
            self._fill()
            self._last_error = ""
        except Exception as error:  # the outermost call of this thread
            if repr(error) != self._last_error:
                logger.error("the supervisor failed; it goes on", exc_info=True)
            self._last_error = repr(error)
            self._db.metrics.inc("smithers_errors_total")
            threading.Event().wait(WATCH_SECONDS)

    def _begin(self) -> None:
        """Find what an earlier server has left: what lives is left alone, the rest is taken up."""
        with contextlib.suppress(OSError):  # it is tried again when it is needed
            self._forker = Forker(self._report)  # now: it has imported when the first run comes
        woken = set(self._db.list_woken())
        for run in reversed(self._db.list_runs(("running", "waiting-approval"))):
            if not run.config.get("server"):
                continue
            if owner_life(run) == "alive":
                self._live[run.run_id] = Worker(None, run.runtime_owner_id)
            elif run.status == "running" or run.runtime_owner_id or run.run_id in woken:
                self._wanted[run.run_id] = None
        for run_id, gate in self._db.list_open_gates():
            self._note_deadline(run_id, gate)
        for name in os.listdir(self._folder):
            run_id, _, kind = name.rpartition(".")
            if kind == "metrics" and run_id not in self._live:
                os.unlink(os.path.join(self._folder, name))

    def _tick(self) -> None:
        if self._watch.changed():
            self._look()
        for kind, run_id in self._deadlines.take(now_ms()):
            if kind == "soon":
                start_thread("soon", functools.partial(self._tell_soon, run_id))
            else:
                self._wanted[run_id] = None
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + 0.5
            bury_orphans()
            for run_id, worker in list(self._live.items()):
                is_told_of = worker.forker is not None and worker.forker is self._forker
                if not is_told_of and worker.owner and not process_is_alive(worker.owner):
                    self._ended(run_id, 0, None)

    def _look(self) -> None:
        """Find the runs with a decision, or a request to go on, that no engine has taken up."""
        for run_id in self._db.list_woken():
            if run_id not in self._live and run_id not in self._foreign:
                self._wanted[run_id] = None

    def _take_in(self, run_id: str) -> None:
        """Look anew at a run that was another's, and has been woken since."""
        self._foreign.discard(run_id)
        self._look()

    def _fill(self) -> None:
        """Start what waits, as long as there is room: first what has begun, then what is queued."""
        while len(self._live) < self._max_runs and not self._is_stopping:
            if self._wanted:
                run_id = next(iter(self._wanted))
                run = self._db.get_run(run_id)
                del self._wanted[run_id]
                if run is not None and run_id not in self._live and self._can_go_on(run):
                    self._start(run)
                continue
            queued = self._db.list_oldest_runs("queued", self._max_runs + 1)
            ready = [run for run in queued if self._is_ready(run)]
            if not ready:
                return
            self._start(ready[0])

    def _is_ready(self, run: Run) -> bool:
        is_due = ("again", run.run_id) not in self._deadlines.at
        return is_due and run.run_id not in self._live and self._is_ours(run)

    def _is_ours(self, run: Run) -> bool:
        """True for a run that a server is to drive, whose file is below the root of this one."""
        config = run.config
        path = split_workflow(config["workflow"])[0] if config.get("server") else ""
        return bool(path) and is_below(self.root, os.path.realpath(path))

    def _can_go_on(self, run: Run) -> bool:
        if not self._is_ours(run):
            self._foreign.add(run.run_id)
            return False
        if owner_life(run) == "alive":  # it is looked at from now on
            self._live[run.run_id] = Worker(None, run.runtime_owner_id)
            return False
        return not run.is_terminal or bool(run.config.get("retry"))

    # Workers

    def _path(self, run_id: str, kind: str) -> str:
        return os.path.join(self._folder, f"{run_id}.{kind}")

    def _start(self, run: Run) -> None:
        config = run.config
        self._deadlines.cancel("gate", run.run_id)
        self._deadlines.cancel("soon", run.run_id)  # its process tells
        if self._forker is None:
            try:
                self._forker = Forker(self._report)
            except OSError:
                self._deadlines.set("again", run.run_id, now_ms() + self.PAUSE_SECONDS * 1000)
                raise
        options = {
            **self._options,
            "command": "worker",
            "workflow": config["workflow"],
            "run_id": run.run_id,
            "resume": True,
            "max_concurrency": config.get("maxConcurrency") or 4,
            "db": self._db.path,
            "folder": self.root,
            "log_file": self._path(run.run_id, "log"),
            "share_file": self._path(run.run_id, "metrics"),
            "server_url": self.url,
        }
        self._live[run.run_id] = Worker(self._forker)
        try:
            self._forker.start(options)
        except OSError:  # its end is told of, and the run is wanted again
            logger.warning("the process that starts workers has gone; another one follows")

    def _started(self, run_id: str, pid: int) -> None:
        worker = self._live.get(run_id)
        if worker is not None:
            worker.owner = owner_id_of(pid)
            self._db.metrics.inc("smithers_workers_started_total")
            if self._is_stopping:
                _suspend(worker)

    def _forker_gone(self, forker: Forker) -> None:
        """Start another one; the workers of the old one go on, and are looked at."""
        if self._forker is forker:
            self._forker = None
        for run_id, worker in list(self._live.items()):
            if worker.forker is forker and worker.owner is None:
                del self._live[run_id]
                pause = 0.0 if forker.has_forked else self.PAUSE_SECONDS  # it cannot even start
                self._deadlines.set("again", run_id, now_ms() + pause * 1000)

    def _ended(self, run_id: str, pid: int, code: int | None) -> None:
        """See to a run whose process has left; `code` is None where nobody has told."""
        worker = self._live.pop(run_id, None)
        if worker is not None:
            self._take_share(run_id, worker, is_last=True)
        try:
            self._see_to(run_id, pid, code)
        except (StorageError, Unavailable):
            self._deadlines.set("again", run_id, now_ms() + self.PAUSE_SECONDS * 1000)
            raise

    def _see_to(self, run_id: str, pid: int, code: int | None) -> None:
        run = self._db.get_run(run_id)
        if run is None or run.is_terminal:
            self._crashes.pop(run_id, None)
            self._want_if_woken(run_id)  # to be retried, while its process was leaving
        elif owner_life(run) == "alive":  # somebody was faster: it is looked at from now on
            self._live[run_id] = Worker(None, run.runtime_owner_id)
        elif self._has_left(run, pid, code):
            self._crashes.pop(run_id, None)
            for gate in self._db.list_gates(run_id, "requested"):
                self._note_deadline(run_id, gate)
            self._want_if_woken(run_id)
        elif self._has_refused(run, code):
            self._fail(run, f"its worker ended with {code} before it had begun")
        else:
            self._crashed(run, code)

    def _want_if_woken(self, run_id: str) -> None:
        if run_id in self._db.list_woken():
            self._wanted[run_id] = None

    @staticmethod
    def _has_left(run: Run, pid: int, code: int | None) -> bool:
        """Return whether a worker has left its run as it should: parked or suspended.

        Not one that has never claimed it: what its render did, it would do again.
        """
        is_free = run.runtime_owner_id is None and run.status != "queued"
        has_claimed = run.config.get("pid") == pid
        return is_free and (code is None or code == EXIT_SUSPENDED and has_claimed)

    @staticmethod
    def _has_refused(run: Run, code: int | None) -> bool:
        """Return whether a worker has left before it had claimed its run, and would again."""
        if run.status == "queued":
            return code is not None and code > EXIT_FAILURE
        return code == EXIT_USAGE and run.runtime_owner_id is None

    def _crashed(self, run: Run, code: int | None) -> None:
        """Begin a run again whose process has died, unless it dies again and again.

        At once; after a pause when the process says that its database failed.
        """
        summary = self._db.get_summary(run.run_id)
        ended = sum(count for state, count in summary.items() if state in TERMINAL_STATES)
        crashes, before = self._crashes.get(run.run_id, (0, ended))
        crashes = crashes + 1 if before == ended else 1
        self._crashes[run.run_id] = (crashes, ended)
        self._db.metrics.inc("smithers_workers_crashed_total")
        why = "was killed" if code is None else f"ended with {code}"
        logger.warning("the worker of run %s %s; crash %d in a row", run.run_id, why, crashes)
        if crashes <= self.MAX_CRASHES and code == EXIT_FAILURE:
            self._deadlines.set("again", run.run_id, now_ms() + self.PAUSE_SECONDS * 1000)
        elif crashes <= self.MAX_CRASHES:
            self._wanted[run.run_id] = None
            self._wanted.move_to_end(run.run_id, last=False)
        else:
            self._fail(run, f"its worker died {crashes} times without progress; the last one {why}")

    def _fail(self, run: Run, why: str) -> None:
        end_leftovers(run, self._db.list_attempts(run.run_id, open_nodes_only=True))
        with (
            contextlib.suppress(OSError),
            open(self._path(run.run_id, "log"), encoding="utf-8", errors="replace") as log,
        ):
            why += "; its log ends: " + "".join(collections.deque(log, maxlen=5)).strip()
        error = describe_error(TaskFailed(why, "WORKER_CRASHED"))
        with self._db.transaction(run.run_id) as tx:
            now = tx.get_run(run.run_id)
            if now is not None and not now.is_terminal and _same_owner(now, run):
                run_close(tx, "failed", error)
                self._db.metrics.inc("smithers_runs_failed_total")
        self._crashes.pop(run.run_id, None)

    def _note_deadline(self, run_id: str, gate: Gate) -> None:
        """Have a parked run looked at when its first gate is due; others' are ignored then."""
        at = gate.deadline_at_ms
        if at is None or run_id in self._live:
            return
        if at < self._deadlines.at.get(("gate", run_id), math.inf):
            self._deadlines.set("gate", run_id, at)
        soon = at - (gate.request.get("timeoutMs") or 0) * Notifier.SOON_SHARE
        if self._options.get("notify") and now_ms() < soon < at and not gate.is_pause:
            self._deadlines.set("soon", run_id, soon)

    def _tell_soon(self, run_id: str) -> None:
        """Tell of the gates of a parked run that are about to expire; takes its time."""
        url = None if self.url is None else run_url(self.url, run_id)
        notifier = Notifier(shlex.split(self._options["notify"]), self._db, run_id, url)
        notifier.close(Notifier.TRIES * Notifier.TRY_SECONDS)

    def _take_share(self, run_id: str, worker: Worker, is_last: bool = False) -> None:
        path = self._path(run_id, "metrics")
        with self._share_lock, contextlib.suppress(FileNotFoundError):
            if worker.share is None:
                return
            with open(path, "rb") as file:
                share = file.read()
            self._db.metrics.take_share(share, worker.share, is_last)
            worker.share = share
            if is_last:
                worker.share = None
                os.unlink(path)

    # Stopping

    def _begin_to_stop(self) -> None:
        self._is_stopping = True
        for worker in self._live.values():
            _suspend(worker)


# ---------------------------------------------------------------------------
# Many runs: one app for all runs of a database, /v1/runs
# ---------------------------------------------------------------------------


WORKER_COUNTERS = {
    "smithers_workers_started_total": "Processes started to drive a run.",
    "smithers_workers_crashed_total": "Processes that died while they drove a run.",
}
WORKER_GAUGES = {
    "smithers_runs_queued": "Runs that wait for a process.",
    "smithers_workers_active": "Processes that drive a run now.",
}


class ServerApp(App):
    """All runs of a database; with a root it starts workflow files below that folder.

    Its supervisor gives each run that can go on a process. `close` suspends what runs.
    """

    NOT_JSON_CODE = "INVALID_JSON"
    has_many_runs = True
    MAX_VIEWS = 64  # kept of runs that nobody follows

    def __init__(
        self,
        adapter: SmithersDb,
        root: str | None,
        auth_token: str | None,
        metrics: bool,
        tokens: str | os.PathLike[str] | None,
        max_runs: int | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(adapter, SERVER_ROUTES, auth_token, metrics, tokens)
        self.root = None if root is None else os.path.realpath(root)
        self.answers = Answers(self._watch, 16 << 20)
        self.metrics.add_families("counter", WORKER_COUNTERS)
        self.metrics.add_families("gauge", WORKER_GAUGES)
        self.metrics.read_at_scrape("smithers_runs_queued", self._count_queued)
        # Guards _views. Held for look-ups only.
        self._lock = threading.Lock()
        self._views: collections.OrderedDict[str, RunView] = collections.OrderedDict()
        self.supervisor: Supervisor | None = None
        if self.root is not None:
            if not os.path.isdir(self.root):
                raise ValueError(f"the root {self.root} is not a folder")
            self.supervisor = Supervisor(
                adapter, self.root, max_runs or default_max_runs(), options
            )
            self.metrics.read_before_scrape(self.supervisor.take_shares)
            self.metrics.read_at_scrape("smithers_workers_active", self.supervisor.count_live)

    def close(self) -> None:
        self.metrics.stop_reading("smithers_runs_queued", self._count_queued)
        if self.supervisor is not None:
            self.supervisor.stop()
        super().close()

    def retry(self, run_id: str, retry: bool | list[str]) -> None:
        self.may_start().adopt(run_id, None, None)
        request_retry(self.adapter, run_id, retry)

    def may_start(self) -> Supervisor:
        """Return who starts runs. Raises Forbidden where there is no root."""
        if self.supervisor is None:
            raise Forbidden("this server starts no workflows: it was given no root")
        return self.supervisor

    def view_of(self, parameters: Mapping[str, str]) -> RunView | None:
        run_id = parameters.get("runId")
        if run_id is None:
            return None
        with self._lock:
            view = self._views.get(run_id)
            if view is not None:
                self._views.move_to_end(run_id)
                return view
        if self.adapter.get_run(run_id) is None:
            raise NotFound(f"there is no run {log_safe(run_id)[:MAX_NAME_CHARS]}")
        view = RunView(self.adapter, self._watch, run_id, 1 << 20)
        with self._lock:
            view = self._views.setdefault(run_id, view)
            while len(self._views) > self.MAX_VIEWS:
                self._views.popitem(last=False)
        return view

    def forget_view(self, run_id: str) -> None:
        """Let go what was kept of an earlier run with this id, that was removed."""
        with self._lock:
            self._views.pop(run_id, None)

    def _count_pending(self) -> float:
        return float(self.adapter.count_all_open_gates())

    def _count_queued(self) -> float:
        return float(self.adapter.count_runs("queued"))


def default_max_runs() -> int:
    return max(8, 4 * (os.cpu_count() or 1))


def create_server_app(
    *,
    adapter: SmithersDb,
    root: str | os.PathLike[str] | None = None,
    auth_token: str | None = None,
    metrics: bool = True,
    max_runs: int | None = None,
    tokens: str | os.PathLike[str] | None = None,
) -> ServerApp:
    """Return the app that shows and steers every run of a database; `close` it at the end.

    With `root` it also starts workflow files below that folder, each run in a process of its own,
    at most `max_runs` at once (default: 4 a core, at least 8). Tokens are as in create_serve_app.
    Raises ValueError for a root that is no folder, and RunOwned when another server starts the
    runs of this database.
    """
    check_adapter(adapter)
    folder = None if root is None else os.fspath(root)
    return ServerApp(adapter, folder, auth_token, metrics, tokens, max_runs, {})


def start_server(
    *,
    port: int = 7331,
    db: str | os.PathLike[str] = "smithers.db",
    auth_token: str | None = None,
    root_dir: str | os.PathLike[str] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    host: str = "127.0.0.1",
    max_runs: int | None = None,
) -> ServeServer:
    """Start a multi-workflow server, with the original's options; `stop()` ends it.

    Its `app` has to be closed too: that suspends the runs. `max_body_bytes` may be 1 MiB at most.
    Raises OSError when the address cannot be bound.
    """
    if not 0 < max_body_bytes <= MAX_BODY_BYTES:
        raise ValueError(f"max_body_bytes must be from 1 to {MAX_BODY_BYTES}")
    adapter = SmithersDb(db)
    app = create_server_app(
        adapter=adapter, root=root_dir, auth_token=auth_token, max_runs=max_runs
    )
    app.max_body_bytes = max_body_bytes
    server = make_server(app, host, port)
    server.start()
    return server


# Routes


def get_runs(app: ServerApp, request: Request) -> Response:
    query = request.query("limit", "status")
    limit = min(integer_in("limit", query.get("limit", "50"), 1), MAX_PAGE)
    status = query.get("status") or None

    def read() -> Response:
        names = [camel_case(column[0]) for column in _wanted_columns()["_smithers_runs"]]
        shown = [dict(zip(names, row)) for row in app.adapter.list_run_rows(limit, status)]
        for row in shown:
            config = json.loads(row["configJson"] or "null")
            if isinstance(config, dict) and config.pop("options", None):  # `up`'s, with its paths
                row["configJson"] = to_json(config)
        return json_response(shown)

    return app.answers.cached(("runs", limit, status), read)


def camel_case(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(str.capitalize, rest))


def get_all_approvals(app: ServerApp, request: Request) -> Response:
    limit = min(integer_in("limit", request.query("limit").get("limit", "50"), 1), MAX_PAGE)

    def read() -> Response:
        shown = []
        with app.adapter.snapshot() as reads:
            gates = (found for found in reads.list_open_gates() if not found[1].is_pause)
            for run_id, gate in itertools.islice(gates, limit):
                run, node = reads.get_run(run_id), reads.get_node(run_id, gate.key)
                label = None if node is None else node.label
                if run is not None:
                    shown.append(gate_json(reads, run, gate, label, 0))
        return json_response({"approvals": shown})

    return app.answers.cached(("approvals", limit), read)


def post_runs(app: ServerApp, request: Request) -> Response:
    """Start a run, or with `resume` go on with one."""
    supervisor = app.may_start()
    order = parse_order(request.body, is_resume=False)
    spec = find_workflow(supervisor.root, order.workflow_path or "")
    if order.is_resume:
        if order.run_id is None:
            raise InvalidRequest("runId is required when resume is true", "RUN_ID_REQUIRED")
        return supervisor.go_on(order.run_id, order)
    run_id = order.run_id or new_run_id()
    digest = check_workflow(supervisor.root, spec)
    path, name = split_workflow(spec)
    with app.adapter.transaction(run_id, HTTP_LOCK_PATIENCE_SECONDS) as tx:
        try:
            config = to_json(supervisor.facts(run_id, spec, order.max_concurrency))
            tx.insert_run(name, path, digest, None, order.input_json, config)
        except RunExists:
            raise RunExists(f"there is a run {run_id} already", "RUN_ALREADY_EXISTS") from None
        tx.is_control = True
    app.forget_view(run_id)
    return json_response({"runId": run_id})


def post_resume(app: ServerApp, request: Request) -> Response:
    """Go on with a run that was suspended, is orphaned or waits; one that has ended is left."""
    supervisor = app.may_start()
    order = parse_order(request.body, is_resume=True)
    return supervisor.go_on(request.parameters["id"], order)


SERVER_ROUTES = (
    *APP_ROUTES,
    Route("GET", "/v1/runs", get_runs),
    Route("POST", "/v1/runs", post_runs, needs="operator"),
    Route("GET", "/v1/approvals", get_all_approvals),
    # Not a runId that must exist: the original says RUN_NOT_FOUND here, and NOT_FOUND elsewhere.
    Route("POST", "/v1/runs/:id/resume", post_resume, needs="operator"),
    *(
        route._replace(pattern="/v1/runs/:runId" + route.pattern.rstrip("/"))
        for route in RUN_ROUTES
    ),
)


# The command


class ServerProcess(Process):
    """The process of `server`: it serves until it is told to stop, then suspends the runs."""

    def serve(self, server: ServeServer, db: SmithersDb) -> int:
        self._server = server
        sys.setswitchinterval(0.0005)
        server.start()
        self._say_where(server)
        announce_ready({"url": server.url})
        self._next_message()
        say("Stopping: the runs are being suspended")
        server.stop()
        server.app.close()
        db.close()
        self.restore_signals()
        return 0


def run_server(args: argparse.Namespace) -> int:
    """Serve all runs of a database, and with a root start workflow files below it."""
    token = read_token(args)
    check_seat_arguments(args)
    for name in (*PATH_FLAGS, "root"):
        value = getattr(args, name)
        setattr(args, name, None if value is None else os.path.abspath(value))
    process = ServerProcess(args)
    server = bind_server(args)
    db: SmithersDb | None = None
    try:
        db = open_database(args.db)
        options = {"notify": args.notify, "executor": args.executor}
        try:
            app = ServerApp(db, args.root, token, args.metrics, args.tokens, args.max_runs, options)
        except (ValueError, RunOwned) as error:
            raise UsageError(str(error)) from error
        if app.supervisor is not None:
            app.supervisor.url = server.url
        server.attach(app, args.allowed_host)
        say(f"Runs of {db.path}" + (f", workflows below {app.root}" if app.root else ""))
    except BaseException:
        process.let_go(server, db)
        raise
    return process.serve(server, db)


SERVER_FLAGS = (
    *SERVE_FLAGS,
    DB_FLAG,
    flag("--root", metavar="DIR", help="start workflow files below this folder (default: none)"),
    flag("--max-runs", type=parse_count, metavar="N",
         help="runs at once, each in a process of its own; more are queued (default: 4 a core)"),
    NOTIFY_FLAG,
    EXECUTOR_FLAG,
)  # fmt: skip


# ---------------------------------------------------------------------------
# Operator's commands: they read and write the file, beside a living run or after it
# ---------------------------------------------------------------------------


def open_existing(args: argparse.Namespace) -> SmithersDb:
    """Open the database for a command that makes none. Raises UsageError with the whole path."""
    try:
        return SmithersDb(args.db, create=False)
    except StorageError as error:
        raise UsageError(f"{error}; --db names another one") from error


def find_run(reads: Reads, args: argparse.Namespace, text: str | None) -> Run:
    """Return the run whose id, or an unambiguous beginning of it, this is.

    Without one: the run that has not ended if there is just one, else the newest, which is only
    read: what changes a run must not be guessed.
    """
    where = os.path.abspath(args.db)
    if text is not None:
        run = reads.get_run(text)
        found = [run] if run is not None else reads.find_runs(text)
        if len(found) == 1:
            return found[0]
        newest = ", ".join(run.run_id for run in (found or reads.newest_runs(10))[:10])
        what = f"several runs begin with {text!r}" if found else f"there is no run {text!r}"
        raise UsageError(f"{what} in {where}" + (f"; there are: {newest}" if newest else ""))
    active = reads.list_runs(ACTIVE_STATUSES)
    if len(active) > 1 and args.command in CHANGING:
        known = ", ".join(run.run_id for run in active[:10])
        raise UsageError(f"{len(active)} runs have not ended: say which; there are: {known}")
    newest_runs = active if len(active) == 1 else reads.newest_runs(1)
    if not newest_runs:
        raise UsageError(f"there is no run yet in {where}")
    return newest_runs[0]


def find_run_and_node(reads: Reads, args: argparse.Namespace) -> tuple[Run, str | None]:
    """Return what `[RUN] [NODE]` means: a single word is a node if the run has it."""
    words = args.words
    if len(words) > 2:
        raise UsageError(f"expected [RUN] [NODE], got {short(' '.join(words))}")
    if len(words) == 2:
        return find_run(reads, args, words[0]), words[1]
    if not words:
        return find_run(reads, args, None), None
    with contextlib.suppress(UsageError):
        run = find_run(reads, args, None)
        if reads.find_newest_node(run.run_id, words[0]) is not None:
            return run, words[0]
    try:
        return find_run(reads, args, words[0]), None
    except UsageError as error:
        raise UsageError(f"{words[0]!r} is neither a node of the run nor a run: {error}") from error


CHANGING = ("approve", "deny", "stop", "cancel", "retry")


class Whole(str):
    """A line that is never cut: it is there to be pasted."""


def run_and_node(reads: Reads, args: argparse.Namespace) -> tuple[Run, str]:
    """Return what `[RUN] NODE` means."""
    if not 1 <= len(args.words) <= 2:
        raise UsageError(f"expected [RUN] NODE, got {short(' '.join(args.words))}")
    run = find_run(reads, args, args.words[0] if len(args.words) == 2 else None)
    return run, str(args.words[-1])


def tell(args: argparse.Namespace, value: Any, lines: Iterable[str], fit: bool = False) -> int:
    """Write a command's answer: JSON, or lines, which `fit` cuts to a terminal's width."""
    if args.json:
        args.out.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
        return 0
    size = terminal_size(args.out) if fit else None
    args.out.write("".join(line + "\n" for line in fitted(lines, size and size.columns)))
    return 0


def terminal_size(out: TextIO) -> os.terminal_size | None:
    """Return the size of the terminal that is written to, None when it is none."""
    if not out.isatty():
        return None
    with contextlib.suppress(OSError):
        size = os.get_terminal_size(out.fileno())
        if size.columns and size.lines:
            return size
    return os.terminal_size((80, 24))


def fitted(lines: Iterable[str], width: int | None) -> Iterator[str]:
    """Yield lines as a terminal may get them, cut to its width, if any; never a Whole one."""
    for line in lines:
        safe = log_safe(line)
        if width is not None and not isinstance(line, Whole):
            while cells(safe[:width]) > width:
                safe = safe[: min(len(safe), width) - 1]
            safe = safe[:width]
        yield safe.rstrip()


def cells(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    is_wide = [unicodedata.east_asian_width(c) in "WF" for c in text]
    return len(text) + sum(is_wide) - sum(unicodedata.combining(c) > 0 for c in text)


class Screen:
    """Lines at the end of a terminal that are drawn over in place: nothing flickers."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._size: os.terminal_size | None = None
        self._rows = 0

    def fits(self) -> bool:
        return self._size == terminal_size(self._out)

    def draw(self, lines: Iterable[str]) -> None:
        size = terminal_size(self._out)
        assert size is not None
        begin = f"\r\x1b[{self._rows}A" if self._rows else ""
        if self._size is not None and size != self._size:
            begin = "\x1b[H\x1b[2J"  # what stands there has been wrapped anew
        self._size, self._rows = size, 0
        text = ""
        for line in fitted(lines, size.columns):
            taken = cells(line)
            rows = max(1, math.ceil(taken / size.columns))
            if self._rows + rows >= size.lines - 1:
                text += "...\x1b[K\n"
                self._rows += 1
                break
            # At the margin, the cursor still stands on the last character.
            is_at_margin = taken > 0 and taken % size.columns == 0
            text += line + ("" if is_at_margin else "\x1b[K") + "\n"
            self._rows += rows
        self._out.write(begin + text + "\x1b[J")  # at once, and the rest of before is cleared


def ago(at_ms: int | None) -> str:
    return "-" if at_ms is None else duration_text(max(1000, now_ms() - at_ms))


def clock_text(at_ms: int | None) -> str:
    return (
        "-" if at_ms is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1000))
    )


def node_name(node_id: str, iteration: int) -> str:
    return node_id if not iteration else f"{node_id} iteration {iteration}"


def decision_line(args: argparse.Namespace, verb: str, gate: Mapping[str, Any]) -> str:
    """Return the command line that decides a gate and can be pasted anywhere."""
    words = [gate["runId"], gate["nodeId"]]
    flags = ["--iteration", str(gate["iteration"]), "--db", os.path.abspath(args.db)]
    # An id may begin like a flag.
    is_plain = not any(word.startswith("-") for word in words)
    line = [*words, *flags] if is_plain else [*flags, "--", *words]
    return pasted(verb, *line)


def run_row(reads: Reads, run: Run) -> dict[str, Any]:
    """Return what `ps` tells of a run."""
    summary = reads.get_summary(run.run_id)
    done = sum(count for state, count in summary.items() if state in TERMINAL_STATES)
    life = "dead" if run.is_terminal else owner_life(run)
    waits = summary.get("waiting-approval", 0)
    url = run.config.get("url") if life == "alive" or is_attended(run) else None
    return {
        "runId": run.run_id,
        "workflowName": run.workflow_name,
        "state": run_state(run),
        "done": done,
        "nodes": sum(summary.values()),
        "createdAtMs": run.created_at_ms,
        "finishedAtMs": run.finished_at_ms,
        "engine": process_of(run.runtime_owner_id or "")[1] if life == "alive" else None,
        "waitsFor": f"{waits} approval{'s' * (waits > 1)}" if waits else None,
        "url": url,
        "page": page_url(url),
        "logFile": run.config.get("logFile"),
    }


def run_ps(args: argparse.Namespace) -> int:
    with open_existing(args) as db, db.snapshot() as reads:
        runs = reads.newest_runs(-1) if args.all else reads.list_runs(ACTIVE_STATUSES)
        found = [run_row(reads, run) for run in runs]

    def lines() -> Iterator[str]:
        table = ["RUN,STATE,DONE,AGE,WAITS FOR,ENGINE,WORKFLOW,PAGE".split(",")]
        for row in found:
            shown = (
                row["runId"], row["state"], f"{row['done']}/{row['nodes']}",
                ago(row["createdAtMs"]), row["waitsFor"] or "-", row["engine"] or "none",
                row["workflowName"], row["page"] or "",
            )  # fmt: skip
            table.append([log_safe(text) for text in shown])
        widths = [max(map(cells, column)) for column in zip(*table)]
        for texts in table:
            yield "  ".join(t + " " * (width - cells(t)) for t, width in zip(texts, widths))
        if not found:
            yield "There is no run yet." if args.all else "No run has still to end; -a lists all."

    return tell(args, found, lines(), fit=True)


def status_json(reads: Reads, run: Run) -> dict[str, Any]:
    failed = list_nodes_json(reads, run.run_id, "failed", None, 20)
    return {
        **run_row(reads, run),
        "status": run.status,
        "why": why_json(reads, run),
        "resume": None if is_cared_for(run) else _resume_hint(run),
        "failed": failed,
        "summary": reads.get_summary(run.run_id),
    }


def status_lines(args: argparse.Namespace, shown: dict[str, Any]) -> Iterator[str]:
    """Yield what needs somebody first, then what runs, waits and has failed, then counts."""
    progress = f"{shown['done']}/{shown['nodes']}"
    yield f"{shown['runId']}  {shown['workflowName']}  {shown['state']}  {progress}"
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for item in shown["why"]["blocked"]:
        by_kind.setdefault(item["kind"], []).append(item)
    for item in by_kind.get("owner", ()):
        yield f"! {item['detail']}"
        if shown["resume"]:
            yield Whole(f"    {shown['resume']}")
    for item in by_kind.get("approval", ()):
        name = node_name(item["nodeId"], item["iteration"])
        title, since = item["detail"], ago(item["sinceMs"])
        yield f"! {name} waits for approval since {since}: {title}"
        gate = {**item, "runId": shown["runId"]}
        yield Whole(f"    {decision_line(args, 'approve', gate)}")
    words_of = {
        "timeout": "has a deadline",
        "task": "was running, since" if "owner" in by_kind else "runs since",
        "pause": "pauses",
        "retry": "is tried again",
        "concurrency": "is queued since",
        "dependency": "stands since",
    }
    for kind, word in words_of.items():
        items = by_kind.get(kind, [])
        for item in items[:20]:
            name = node_name(item["nodeId"], item["iteration"])
            since = "" if kind in ("pause", "retry", "timeout") else f" {ago(item['sinceMs'])}"
            yield f"  {name} {word}{since}: {item['detail']}"
        if len(items) > 20:
            number = "many" if len(items) >= MAX_BLOCKED else len(items) - 20
            yield f"  and {number} more ({kind})"
    for node in shown["failed"]:
        said = (node["error"] or {}).get("message", "")
        yield f"x {node_name(node['nodeId'], node['iteration'])} failed: {said}"
    if shown["why"]["error"] is not None:
        yield f"x {shown['why']['error']['message']}"
    yield "  " + ", ".join(f"{count} {state}" for state, count in shown["summary"].items())


def run_status(args: argparse.Namespace) -> int:
    can_draw = args.watch and not args.json and args.out.isatty()
    screen = Screen(args.out) if can_draw and os.environ.get("TERM") != "dumb" else None
    before: Any = None
    with open_existing(args) as db, contextlib.closing(db.watch()) as watch:
        while True:
            with db.snapshot() as reads:
                run = find_run(reads, args, args.run_id)
                shown = status_json(reads, run)
            args.run_id = run.run_id  # also when it has ended, and another one goes on
            if screen is not None:
                screen.draw(status_lines(args, shown))
            elif before is None or shown["why"] != before["why"]:
                tell(args, shown, status_lines(args, shown), fit=True)
            if not args.watch or run.is_terminal:
                break
            before, until = shown, time.monotonic() + 1.0  # ages go on without a commit
            threading.Event().wait(0.2)
            while not watch.changed() and time.monotonic() < until:
                if screen is not None and not screen.fits():
                    break
                threading.Event().wait(WATCH_SECONDS)
    return EXIT_CODES.get(run.status, 3) if args.exit_status else 0


def show_lines(shown: Mapping[str, Any]) -> Iterator[str]:
    """Yield a node as people read it."""
    yield f"{node_name(shown['nodeId'], shown['iteration'])}: {shown['state']}"
    for attempt in shown["attempts"]:
        yield (
            f"  {ordinal(attempt['attempt'] + 1)} attempt {attempt['state']}:"
            f" {clock_text(attempt['startedAtMs'])} to {clock_text(attempt['finishedAtMs'])}"
        )
        if attempt["error"] is not None:
            yield f"    {attempt['error']['name']}: {attempt['error']['message']}"
        for line in (attempt.get("traceback") or "").splitlines():
            yield f"    {line}"
    if shown["needs"]:
        yield "  needs " + ", ".join(shown["needs"])
    if shown["output"] is not None:
        text = to_json(shown["output"])
        is_cut = " ... (`output` prints all of it)" if len(text) > EVIDENCE_BYTES else ""
        yield f"  output: {text[:EVIDENCE_BYTES]}{is_cut}"
    for line in shown["log"]:
        yield f"  | {line['text']}"


# What an answer does, in words.
ON_DENY = {
    "fail": "the node fails",
    "continue": "the run goes on, and what comes next knows it",
    "skip": "the node is skipped, and the run goes on",
}
ON_TIMEOUT = {"fail": "the node fails", "approve": "it is approved", "deny": "it is denied"}


def gate_lines(args: argparse.Namespace, gate: Mapping[str, Any]) -> Iterator[str]:
    """Yield a gate as whoever decides must know it."""
    yield f"{node_name(gate['nodeId'], gate['iteration'])}: {gate['requestTitle'] or ''}"
    if gate["requestSummary"]:
        yield f"  {gate['requestSummary']}"
    metadata = gate["metadata"]
    table = metadata if isinstance(metadata, dict) else {"metadata": metadata}
    for name, value in table.items() if metadata is not None else ():
        yield f"  {name}: {value if isinstance(value, str) else to_json(value)}"
    if gate["status"] != "requested":
        note = f": {gate['note']}" if gate["note"] else ""
        by = f" by {gate['decidedBy']}" if gate["decidedBy"] else ""
        yield f"  {gate['status']}{by} at {clock_text(gate['decidedAtMs'])}{note}"
        return
    for found in gate.get("evidence", ()):
        yield f"  {node_name(found['nodeId'], found['iteration'])} {found['state']}"
        if found["error"] is not None:
            yield f"    {found['error']['message']}"
        if found["output"] is not None:
            is_cut = " ... (`output` prints all of it)" if found["isCut"] else ""
            yield f"    output: {to_json(found['output'])}{is_cut}"
        for line in found["log"]:
            yield f"    | {line['text']}"
    yield f"  asked {ago(gate['requestedAtMs'])} ago"
    yield f"  yes: the run goes on; no: {ON_DENY.get(gate['onDeny'], ON_DENY['fail'])}"
    if gate["deadlineAtMs"] is not None:
        then = ON_TIMEOUT.get(gate["onTimeout"], ON_TIMEOUT["fail"])
        yield f"  without an answer {due_text(gate['deadlineAtMs'])}: {then}"
    if gate["approvers"]:
        yield "  may be decided by " + ", ".join(gate["approvers"])
    for verb in ("approve", "deny"):
        yield Whole(f"  {decision_line(args, verb, gate)}")


def run_show(args: argparse.Namespace) -> int:
    with open_existing(args) as db:
        with db.snapshot() as reads:
            shown, lines = shown_of(args, reads)
        # Not before: who reads slowly, in a pager, would keep the engine from tidying its log.
        return tell(args, shown, lines)


def shown_of(args: argparse.Namespace, reads: Reads) -> tuple[Any, Iterable[str]]:
    """Return what `show` shows: a node, the gates that wait, or how the run stands."""
    run, node_id = find_run_and_node(reads, args)
    if node_id is not None:
        detail = node_detail_json(reads, run, node_id, args.iteration, with_traceback=True)
        gate = detail["gate"]
        return detail, [*show_lines(detail), *(() if gate is None else gate_lines(args, gate))]
    gates = approvals_json(reads, run, "requested")
    if gates:
        return gates, (line for gate in gates for line in gate_lines(args, gate))
    status = status_json(reads, run)
    return status, ["Nothing waits for a decision.", *status_lines(args, status)]


def run_logs(args: argparse.Namespace) -> int:
    """Write what tasks printed, or with --events the log itself as NDJSON."""
    since = now_ms() - parse_duration(args.since) if args.since else None
    told: set[Key] = set()
    with open_existing(args) as db, contextlib.closing(db.watch()) as watch:
        with db.snapshot() as reads:
            run, node_id = find_run_and_node(reads, args)
            after = -1 if since is None else reads.first_seq_since(run.run_id, since) - 1
            if args.tail is not None and not args.failed:
                last = _read_log(reads, run.run_id, after, args, node_id, newest=args.tail)
                after = last[0].seq - 1 if last else reads.get_newest_seq(run.run_id)
        while True:
            run = db.get_run(run.run_id) or run
            if args.failed:
                _write_failed_logs(db, run.run_id, after, args, node_id, told)
            else:
                after = _write_logs(db, run.run_id, after, args, node_id)
            if not args.follow or run.is_terminal:
                return 0
            while not watch.changed():
                threading.Event().wait(WATCH_SECONDS)


def _read_log(
    reads: Reads,
    run_id: str,
    after: int,
    args: argparse.Namespace,
    node_id: str | None,
    **some: int,
) -> list[Event]:
    """Return `some` of the events that are asked for: the first `limit`, or the `newest`."""
    if args.events:
        return reads.list_events(run_id, after, node_id=node_id, **some)
    return reads.list_outputs(run_id, None, node_id, after, **some)


def _write_logs(
    db: SmithersDb, run_id: str, after: int, args: argparse.Namespace, node_id: str | None
) -> int:
    """Write the events after a seq that are asked for; return the seq reached."""
    newest = db.get_newest_seq(run_id)
    while True:
        events = _read_log(db, run_id, after, args, node_id, limit=1000)
        args.out.write("".join(log_line(args, event) for event in events))
        if not events:
            return max(after, newest)
        after = events[-1].seq


def _write_failed_logs(
    db: SmithersDb,
    run_id: str,
    after: int,
    args: argparse.Namespace,
    node_id: str | None,
    told: set[Key],
) -> None:
    """Write the lines of the nodes that have failed since the last call."""
    with db.snapshot() as reads:
        failed = [key for key in reads.list_keys(run_id, "failed") if key not in told]
        if node_id is not None:
            failed = [key for key in failed if key[0] == node_id]
        found = lines_of(reads, run_id, failed, after)
    told.update(failed)
    args.out.write("".join(log_line(args, event) for event in found[-(args.tail or 0) :]))


def log_line(args: argparse.Namespace, event: Event) -> str:
    if args.events or args.json:
        return event.payload_json + "\n"
    payload = event.payload
    at = time.strftime("%H:%M:%S", time.localtime(event.timestamp_ms / 1000))
    name = node_name(payload["nodeId"], payload["iteration"])
    return log_safe(f"{at} {name} | {payload['text']}") + "\n"


def parse_duration(text: str) -> int:
    """Return the milliseconds of `90s`, `10m`, `2h` or `30d`."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if not text[:-1].isdecimal() or text[-1:] not in units:
        raise UsageError(f"expected a duration such as 90s, 10m, 2h or 30d, got {short(text)}")
    return int(text[:-1]) * units[text[-1]] * 1000


HISTORY = {
    "RunStarted": "begun",
    "RunFinished": "finished",
    "RunFailed": "failed",
    "RunCancelled": "cancelled",
    "ApprovalRequested": "asked",
    "ApprovalGranted": "approved",
    "ApprovalDenied": "denied",
    "RunStatusChanged": "status",
}


def run_history(args: argparse.Namespace) -> int:
    with open_existing(args) as db, db.snapshot() as reads:
        run = find_run(reads, args, args.run_id)
        events = reads.list_events_of(run.run_id, tuple(HISTORY))
    found = []
    for event in events:
        payload = event.payload
        named = "nodeId iteration status decidedBy bySource by note reason error".split()
        said = {name: payload[name] for name in named if name in payload}
        found.append({"timestampMs": event.timestamp_ms, "what": HISTORY[event.type], **said})
    found += run.config.get("history", [])
    found.sort(key=lambda item: int(item["timestampMs"]))

    def lines() -> Iterator[str]:
        for item in found:
            node = node_name(item["nodeId"], item["iteration"]) + " " if "nodeId" in item else ""
            what = item.get("status") or item["what"]
            by = item.get("decidedBy") or item.get("by")
            why = item.get("note") or item.get("reason") or (item.get("error") or {}).get("message")
            yield (
                f"{clock_text(item['timestampMs'])}  {node}{what}"
                + (f" by {by}" if by else "")
                + (" (claimed)" if item.get("bySource") == "claimed" else "")
                + (f": {why}" if why else "")
            )

    return tell(args, found, lines())


def login_name() -> str | None:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user id without a name
        return None


def run_decision(args: argparse.Namespace) -> int:
    """Show a gate, ask on a terminal, and decide it."""
    verdict = "approved" if args.command == "approve" else "denied"
    with open_existing(args) as db:
        with db.snapshot() as reads:
            run, node_id = run_and_node(reads, args)
            asked = [
                gate
                for gate in reads.list_gates_of(run.run_id, node_id)
                if args.iteration in (None, gate.iteration)
            ]
            if not asked and not reads.count_open_gates(run.run_id):
                raise ApprovalNotPending(nothing_waits(reads, run))
            gates = [gate for gate in asked if gate.status == "requested"]
            seen = None
            if len(gates) == 1:
                node = reads.get_node(run.run_id, gates[0].key)
                seen = gate_json(reads, run, gates[0], None if node is None else node.label)
        if seen is not None and not args.json:
            tell(args, seen, gate_lines(args, seen))
        if not args.yes:
            _check_confirmed(f"{args.command} {node_id}?")
        decision = Decision(
            verdict,
            seen["iteration"] if seen else args.iteration,
            args.note,
            args.by or login_name(),
            seen["requestedAtMs"] if seen else None,
            by_source="claimed",
        )
        decide(db, run.run_id, node_id, decision, Identity(decision.decided_by, "", False))
        run = db.get_run(run.run_id) or run
        life = "alive" if run.is_terminal else watch_owner(db, run.run_id)
        goes_on = f"its engine goes on (pid {run.config.get('pid')})"
        if run.is_terminal:
            goes_on = f"the run is {run.status}"
        elif is_attended(run):
            goes_on = "its server goes on"
        elif life == "dead":
            goes_on = f"it counts when the run is resumed: {_resume_hint(run)}"
        value = {"runId": run.run_id, "nodeId": node_id, "status": verdict, "engine": life}
        return tell(args, value, [f"{node_id} {verdict}; {goes_on}"])


def nothing_waits(reads: Reads, run: Run) -> str:
    """Return that nobody has to decide, and what the run does instead."""
    why = why_json(reads, run)
    said = [f"it is {why['state']}"]
    for item in why["blocked"][:1]:
        said.append((f"{item['nodeId']}: " if item["nodeId"] else "") + item["detail"])
    return f"nothing waits for a decision in run {run.run_id}: {'; '.join(said)}"


def _check_confirmed(question: str) -> None:
    """Raise UsageError unless a person at a terminal says yes."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("not decided: without a terminal -y says that it is meant")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("not decided")


def is_cared_for(run: Run) -> bool:
    return run.is_terminal or owner_life(run) == "alive" or is_attended(run)


def _resume_hint(run: Run) -> str:
    if run.config.get("server"):
        words = ["server", "--root", run.config["rootDir"], "--db"]
        words.append(os.path.dirname(run.config["logFile"]).rpartition(".logs")[0])
        return pasted(*words)
    options = run.config.get("options")
    if not options:
        return f"up FILE --serve --resume --run-id {run.run_id}"
    return resume_line(argparse.Namespace(**options), run.run_id)


def run_stop(args: argparse.Namespace) -> int:
    """Suspend a run: tell its engine's process to stop, and wait until it has left."""
    with open_existing(args) as db:
        run = find_run(db, args, args.run_id)
        if run.is_terminal:
            raise RunNotActive(f"run {run.run_id} is {run.status} already")
        life = owner_life(run)
        if life == "unseen":
            raise RunOwned(f"run {run.run_id} is driven elsewhere: stop it there")
        if life == "alive":
            os.kill(process_of(run.runtime_owner_id or "")[1], signal.SIGTERM)
            while owner_life(run) == "alive":
                threading.Event().wait(WATCH_SECONDS)
                run = db.get_run(run.run_id) or run
        value = {"runId": run.run_id, "status": run.status}
        return tell(args, value, [f"Suspended. Go on with: {_resume_hint(run)}"])


def run_cancel(args: argparse.Namespace) -> int:
    with open_existing(args) as db:
        run = find_run(db, args, args.run_id)
        cancel_run(db, run.run_id, args.by or login_name(), args.note, "claimed")
        return tell(args, {"runId": run.run_id}, [f"Run {run.run_id} is being cancelled"])


def run_retry(args: argparse.Namespace) -> int:
    """Go on with a run that has ended, here and with the flags that it began with."""
    with open_existing(args) as db:
        run = find_run(db, args, args.words[0] if args.words else None)
        if run.config.get("server"):
            request_retry(db, run.run_id, args.words[1:] or True)
            said = "its server goes on" if is_attended(run) else f"go on with: {_resume_hint(run)}"
            return tell(args, {"runId": run.run_id}, [f"Run {run.run_id} is retried; {said}"])
        if run.is_terminal:
            check_can_retry(db, run, args.words[1:] or True)
    options = run.config.get("options")
    if not options:
        raise UsageError(
            f"run {run.run_id} was not begun by this program's `up`: use up FILE --resume --retry"
        )
    again = argparse.Namespace(**options)
    args.db = os.path.abspath(args.db)
    with contextlib.suppress(OSError):  # the folder that the run began in may have gone
        os.chdir(again.folder)
    again.out, again.db, again.run_id, again.input = args.out, args.db, run.run_id, None
    again.resume, again.retry, again.detach = True, args.words[1:] or True, False
    return run_up(again)


def run_wait(args: argparse.Namespace) -> int:
    """Wait until a run has ended, or for a gate, and exit by how it stands."""
    deadline = math.inf if args.timeout is None else time.monotonic() + args.timeout
    with open_existing(args) as db, contextlib.closing(db.watch()) as watch:
        while True:
            run = find_run(db, args, args.run_id)
            args.run_id = run.run_id
            asked = db.list_gates(run.run_id, "requested") if args.until == "gate" else ()
            if run.is_terminal or not all(gate.is_pause for gate in asked):
                break
            if time.monotonic() >= deadline:
                say(f"Run {run.run_id} is {run.status} after {args.timeout:g} s")
                return EXIT_CONFLICT
            while not watch.changed() and time.monotonic() < deadline:
                threading.Event().wait(WATCH_SECONDS)
    tell(args, {"runId": run.run_id, "status": run.status}, [f"{run.run_id} {run.status}"])
    return EXIT_CODES.get(run.status, 3)


def run_output(args: argparse.Namespace) -> int:
    with open_existing(args) as db, db.snapshot() as reads:
        run, node_id = run_and_node(reads, args)
        output = reads.find_output(run.run_id, node_id, args.iteration)
        if output is None:
            raise NodeNotFound(f"node {node_id!r} of run {run.run_id} has no output")
    args.out.write(output + "\n")
    return 0


def run_graph(args: argparse.Namespace) -> int:
    """Render a workflow without running anything: its tree, or Mermaid text."""
    workflow = load_workflow(args.workflow)
    tree = render_once(workflow, args.workflow, read_input(args.input))
    shown = xml_of(tree)
    return tell(args, shown, mermaid_lines(shown) if args.mermaid else tree_lines(shown, ""))


def tree_lines(element: Mapping[str, Any], indent: str) -> Iterator[str]:
    props = element["props"]
    name = props.get("id") or props.get("name") or ""
    rest = " ".join(f"{key}={value}" for key, value in props.items() if value != name)
    kind = element["tag"].partition(":")[2].replace("ralph", "loop")
    mode = props.get("approvalMode")
    kind = "pause" if mode == "pause" else "approval" if mode else kind
    yield " ".join(filter(None, (indent + kind, name, rest)))
    for child in element["children"]:
        yield from tree_lines(child, indent + "  ")


def mermaid_lines(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield the order of the nodes as a Mermaid flowchart."""
    yield "flowchart TD"
    outline = Outline(to_json(tree))
    leaves = [element for element in walk_tree(tree) if element["tag"] == Task.tag]
    number = {element["props"]["id"]: n for n, element in enumerate(leaves)}
    for id, n in number.items():
        is_gate = leaves[n]["props"].get("approvalMode")
        yield f"  n{n}" + (f'{{{{"{id}"}}}}' if is_gate else f'["{id}"]')
    for element in leaves:
        id = element["props"]["id"]
        needs = [need for need in element["props"].get("dependsOn", "").split(",") if need]
        for earlier in dict.fromkeys(needs + outline.ids_before(id)):
            yield f"  n{number[earlier]} --> n{number[id]}"


def run_gc(args: argparse.Namespace) -> int:
    """Remove runs that ended long ago, their logs too, and give the space back."""
    before = now_ms() - parse_duration(args.older_than)
    with open_existing(args) as db:
        ended = db.list_runs(TERMINAL_STATUSES)
        old = [run for run in ended if (run.finished_at_ms or run.created_at_ms) < before]
        for run in () if args.dry_run else old:
            with db.transaction(run.run_id) as tx:
                found = tx.get_run(run.run_id)
                if found is None or not found.is_terminal:
                    continue  # somebody has it retried
                tx.delete_run()
            log_file = run.config.get("logFile")
            with contextlib.suppress(OSError):
                if log_file:
                    os.unlink(log_file)
        if old and not args.dry_run:
            db.give_space_back()
    verb = "would be removed" if args.dry_run else "removed"
    return tell(args, [run.run_id for run in old], [f"{run.run_id} {verb}" for run in old])


# ---------------------------------------------------------------------------
# Commands: the table, and how one is run
# ---------------------------------------------------------------------------


def demo_workflow(ctx: Ctx) -> Workflow:
    """A small release: two checks together, a gate, an announcement."""
    return Workflow(
        "demo",
        Parallel(
            Task("test", [sys.executable, "-c", "print('12 tests passed')"]),
            Task("build", {"artifact": "demo-1.0.tar.gz"}),
        ),
        Approval("ship", title="Ship demo-1.0?"),
        Task("announce", demo_announce, needs={"decision": "ship"}),
    )


def demo_announce(decision: dict[str, Any]) -> str:
    by = decision["decidedBy"] or "somebody"
    current_task().log(f"demo-1.0 is out, approved by {by}")
    return "announced"


def run_demo(args: argparse.Namespace) -> int:
    """Run and serve the demo in a folder of its own."""
    import tempfile

    token = read_token(args)
    with tempfile.TemporaryDirectory(prefix="smithers-demo-") as folder:
        args.db = os.path.join(folder, "smithers.db")
        args.workflow = os.path.abspath(__file__) + ":demo_workflow"
        args.run_id, args.input, args.executor = "demo", None, None
        args.resume = args.force = args.retry = False
        args.linger = args.notify = None
        fix_paths(args)
        args.serve, args.max_concurrency = True, 4
        return run_here(args, demo_workflow, token)


WORDS_FLAG = flag("words", nargs="*", metavar="[RUN] [NODE]")
RUN_FLAG = flag("run_id", nargs="?", metavar="RUN", help="a run's id, or how it begins")
ITERATION_FLAG = flag("--iteration", type=int, help="of a node in a loop")
BY_FLAG = flag("--by", metavar="NAME", help="who decides (default: your login)")
READ_FLAGS = (DB_FLAG, flag("--json", action=SWITCH, help="print one JSON value"))
NODE_FLAGS = (WORDS_FLAG, *READ_FLAGS, ITERATION_FLAG)
DECISION_FLAGS = (
    WORDS_FLAG, *READ_FLAGS, ITERATION_FLAG, BY_FLAG,
    flag("-m", "--note", help="why"),
    flag("-y", "--yes", action=SWITCH, help="do not ask"),
)  # fmt: skip
COMMANDS = (
    Command("up", "Run a workflow file.", UP_FLAGS, run_up,
            "up workflow.py --serve --input '{\"ref\": \"v1\"}'"),
    Command("server", "Serve the runs of a database, and start others by POST /v1/runs.",
            SERVER_FLAGS, run_server, "server --root workflows"),
    Command("demo", "Run and serve a small workflow with a gate.", SERVE_FLAGS, run_demo, "demo"),
    Command("ps", "List the runs that have not ended.",
            (*READ_FLAGS, flag("-a", "--all", action=SWITCH, help="also those that have")), run_ps,
            "ps -a"),
    Command("status", "Tell what a run does, and what it waits for.",
            (RUN_FLAG, *READ_FLAGS, flag("--watch", action=SWITCH, help="follow it to its end"),
             flag("--exit-status", action=SWITCH, help="exit as `up` would: 0, 1, 2, 3")),
            run_status, "status --watch"),
    Command("show", "Show a node, or the gate that waits.", NODE_FLAGS, run_show, "show deploy"),
    Command("logs", "Print what tasks have printed.",
            (WORDS_FLAG, DB_FLAG,
             flag("--json", action=SWITCH, help="print one JSON value a line, as --events does"),
             flag("-f", "--follow", action=SWITCH, help="to the run's end"),
             flag("--since", metavar="10m", help="only what is younger"),
             flag("--tail", type=parse_count, metavar="N", help="only the last lines"),
             flag("--failed", action=SWITCH, help="only of failed nodes"),
             flag("--events", action=SWITCH, help="the log itself, an event a line")),
            run_logs, "logs build --tail 20"),
    Command("history", "Tell who decided what, and when.", (RUN_FLAG, *READ_FLAGS), run_history,
            "history"),
    Command("approve", "Approve a gate.", DECISION_FLAGS, run_decision,
            "approve deploy -m 'Ship it'"),
    Command("deny", "Deny a gate.", DECISION_FLAGS, run_decision, "deny deploy -m 'Not on Friday'"),
    Command("stop", "Suspend a run: its engine leaves, and it can be gone on with.",
            (RUN_FLAG, *READ_FLAGS), run_stop, "stop"),
    Command("cancel", "Cancel a run.",
            (RUN_FLAG, *READ_FLAGS, BY_FLAG, flag("-m", "--note", help="why")), run_cancel,
            "cancel -m 'wrong branch'"),
    Command("retry", "Go on with a run that has ended: its failed nodes, or these, run again.",
            (flag("words", nargs="*", metavar="[RUN] [NODE ...]"), *READ_FLAGS), run_retry,
            "retry run-1 build"),
    Command("wait", "Wait until a run has ended, or for a gate.",
            (RUN_FLAG, *READ_FLAGS,
             flag("--for", dest="until", choices=("end", "gate"), default="end", help="(end)"),
             flag("--timeout", type=parse_seconds, metavar="SECONDS",
                  help="exit with 5 after so long")),
            run_wait, "wait --for gate --timeout 600"),
    Command("output", "Print the output of a node as JSON.", NODE_FLAGS, run_output,
            "output build"),
    Command("graph", "Render a workflow without running it.",
            (flag("workflow", metavar="FILE[:name]", help="the workflow"), *READ_FLAGS,
             flag("--input", help="the input to render with"),
             flag("--mermaid", action=SWITCH, help="as a Mermaid flowchart")),
            run_graph, "graph workflow.py --mermaid"),
    Command("gc", "Remove runs that ended long ago, and give their space back.",
            (*READ_FLAGS,
             flag("--older-than", metavar="30d", required=True, help="since their end"),
             flag("--dry-run", action=SWITCH, help="only tell")),
            run_gc, "gc --older-than 30d --dry-run"),
)  # fmt: skip


class DescriptorWriter(io.TextIOBase):
    """Writes to a descriptor at once: nothing is left in a buffer that could fail later."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def write(self, text: str) -> int:
        data = text.encode("utf-8")
        while data:
            data = data[os.write(self._descriptor, data) :]
        return len(text)


def open_missing_streams() -> None:
    """Have standard streams that were closed go nowhere: no file of ours may take their numbers."""
    for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            setattr(
                sys, name, os.fdopen(descriptor, "r" if descriptor == 0 else "w", closefd=False)
            )


def drain(stream: Any, descriptor: int) -> None:
    """Empty a stream's buffer, into nothing when it cannot be written: exiting would fail on it."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            stream.flush()


@contextlib.contextmanager
def result_stream() -> Iterator[Any]:
    """Yield the real stdout, for the result alone.

    What tasks print meanwhile, and what the processes they start print, goes to stderr.
    """
    out = sys.stdout
    try:
        is_real = out.fileno() == 1
    except (OSError, ValueError, AttributeError):  # a caller of main has put something else there
        is_real = False
    if not is_real:
        with contextlib.redirect_stdout(sys.stderr):
            yield out
        return
    drain(out, 1)
    # By the line, in a buffer of its own: no progress line comes between a text and its end.
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(line_buffering=True)
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield DescriptorWriter(saved)
    finally:
        drain(out, 1)
        os.dup2(saved, 1)
        os.close(saved)


def run_command_line(args: argparse.Namespace) -> int:
    """Run a parsed command and return its exit code; every mistake is one line on stderr."""
    if not logger.handlers:  # the root's are the workflow file's to set
        at = "%(asctime)s " if _has_time else ""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LogFormatter(f"{at}[smithers] %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    with result_stream() as args.out:
        code = run_guarded(args)
        is_own_process = isinstance(args.out, DescriptorWriter)
    if getattr(args, "must_leave", False) and is_own_process:
        leave(code)
    return code


def run_guarded(args: argparse.Namespace) -> int:
    try:
        return int(args.run(args))
    except (ApprovalNotPending, GateChanged, RunActive, RunNotActive, Forbidden) as error:
        say(f"Error: {log_safe(error)}")
        return EXIT_CONFLICT
    except (AuthoringError, UsageError, StorageError, ServeError) as error:
        hint = "; the same line tries again" if isinstance(error, Unavailable) else ""
        say(f"Error: {log_safe(error)}{hint}")
        if isinstance(error, (StorageError, Unavailable)):
            return EXIT_FAILURE
        is_conflict = isinstance(error, RunOwned) and args.command != "up"
        return EXIT_CONFLICT if is_conflict else EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # who has read the answer has seen enough
        return EXIT_LEFT


def main(argv: Seq[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    open_missing_streams()
    try:
        args = parse_command_line(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    code = run_command_line(args)
    drain(sys.stderr, 2)
    return code


if _run_as == "__main__":
    raise SystemExit(main())
