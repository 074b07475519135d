"""The table of environment variables is complete and its readers refuse nonsense."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cosattn import env
from cosattn.errors import ArgumentError

PACKAGE = Path(env.__file__).parent
NAME = re.compile(r"COSATTN_[A-Z_]*[A-Z]")


def test_every_variable_in_the_code_is_in_the_table() -> None:
    used = {name for path in PACKAGE.rglob("*.py") for name in NAME.findall(path.read_text())}
    assert used == set(env.VARIABLES)


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("TRUE", True), ("0", False), ("off", False), ("", False)]
)
def test_flag(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("COSATTN_DISABLE_JIT", value)
    assert env.flag("COSATTN_DISABLE_JIT") is expected


def test_flag_refuses_a_value_that_is_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSATTN_DISABLE_JIT", "maybe")
    with pytest.raises(ArgumentError, match="COSATTN_DISABLE_JIT='maybe' is not a switch"):
        env.flag("COSATTN_DISABLE_JIT")


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_number_refuses(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("COSATTN_JOBS", value)
    with pytest.raises(ArgumentError, match="COSATTN_JOBS"):
        env.number("COSATTN_JOBS")


def test_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSATTN_JOBS", "12")
    assert env.number("COSATTN_JOBS") == 12
    monkeypatch.setenv("COSATTN_JOBS", "")
    assert env.number("COSATTN_JOBS") is None


def test_unknown_names_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSATTN_CACHEDIR", "x")
    assert "COSATTN_CACHEDIR" in env.unknown()
    assert "COSATTN_CACHE_DIR" not in env.unknown()


def test_a_variable_outside_the_table_can_not_be_read() -> None:
    with pytest.raises(KeyError):
        env.text("COSATTN_TYPO")
