"""Log lines: their formats, and the limit of what one source may write."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.errors import StorageError
from meshd.logs import OLD_FILES, LineLimit, LogFormat, TextFormatter, configure_logging, reopen_file


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("meshd")
    before = (list(root.handlers), root.level, ours.level)
    yield
    for handler in set(root.handlers) - set(before[0]):
        handler.close()
    root.handlers[:], root.level, ours.level = before


def log_lines(log_format: LogFormat, level: str = "info") -> list[str]:
    stream = io.StringIO()
    configure_logging(level, log_format)
    configure_logging(level, log_format, stream=stream)
    logger = logging.getLogger("meshd.agents.links.links")
    logger.debug("not at this level")
    logger.info("link up", extra={"peer": "abc", "rtt_ms": 1.5, "name_of_peer": 'a "b"\nc'})
    logging.getLogger("some.library").info("of no interest")
    try:
        raise ValueError("torn\nframe")
    except ValueError:
        logger.exception("link failed: %s", "torn")
    return stream.getvalue().splitlines()


@pytest.mark.usefixtures("restored_logging")
def test_text_logs_are_one_line_of_key_and_value_per_event() -> None:
    up, failed = log_lines("text")
    assert up.endswith(r'level=info logger=meshd.agents.links.links event="link up" peer=abc rtt_ms=1.5 name_of_peer="a \"b\"\nc"')
    assert up.startswith("time=20")
    assert r'event="link failed: torn" trace="Traceback' in failed


@pytest.mark.usefixtures("restored_logging")
def test_json_logs_are_one_object_per_event() -> None:
    up, failed = map(json.loads, log_lines("json"))
    assert (up["event"], up["peer"], up["rtt_ms"], up["name_of_peer"]) == ("link up", "abc", 1.5, 'a "b"\nc')
    assert failed["trace"].endswith("ValueError: torn\nframe")


@pytest.mark.usefixtures("restored_logging")
def test_debug_shows_libraries_too() -> None:
    events = [json.loads(line)["event"] for line in log_lines("json", "debug")]
    assert events == ["not at this level", "link up", "of no interest", "link failed: torn"]


@pytest.mark.usefixtures("restored_logging")
def test_a_line_for_the_journal_has_its_priority_and_no_time() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream, journal=True)
    logging.getLogger("meshd").warning("a peer\nis %s", "gone", extra={"peer": "abc"})
    logging.getLogger("meshd").info("fine")
    assert stream.getvalue().splitlines() == [
        r'<4>level=warning logger=meshd event="a peer\nis gone" peer=abc',
        "<6>level=info logger=meshd event=fine",
    ]


@pytest.mark.usefixtures("restored_logging")
def test_a_file_is_bounded_with_its_predecessors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshd.logs.FILE_BYTES", 2000)
    path = tmp_path / "logs" / "meshd.log"
    configure_logging("debug", file=path)
    for number in range(1000):
        logging.getLogger("meshd").debug("line %d of many", number)
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["meshd.log", *(f"meshd.log.{number}" for number in range(1, OLD_FILES + 1))]
    assert all(file.stat().st_size <= 2000 for file in files)
    assert "line 999 of many" in path.read_text()


@pytest.mark.usefixtures("restored_logging")
def test_a_file_that_another_program_has_renamed_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "meshd.log"
    configure_logging(file=path)
    logging.getLogger("meshd").info("before")
    path.rename(tmp_path / "old")
    reopen_file()
    logging.getLogger("meshd").info("after")
    assert "before" in (tmp_path / "old").read_text()
    assert "after" in path.read_text()


@pytest.mark.usefixtures("restored_logging")
def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "meshd.log"
    path.symlink_to("/dev/full")  # every write fails with ENOSPC
    configure_logging(file=path)
    for number in range(3):
        logging.getLogger("meshd").info("lost %d", number)
    path.unlink()  # there is room again
    reopen_file()
    logging.getLogger("meshd").info("kept")
    assert capsys.readouterr().err == ""
    assert path.read_text().rstrip().endswith("event=kept lost=3")


def test_a_file_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="--log-file"):
        configure_logging(file=tmp_path)


def test_an_unknown_level_is_an_error() -> None:
    with pytest.raises(ValueError, match="loud"):
        configure_logging("loud")


def event(message: str, number: int, at: float, level: int = logging.ERROR) -> logging.LogRecord:
    record = logging.LogRecord("meshd.agents", level, __file__, 1, message, (number,), None)
    record.created = at
    return record


def test_a_source_that_logs_too_much_is_limited_and_the_next_line_counts_what_was_dropped() -> None:
    limit = LineLimit()
    passed = [number for number in range(1000) if limit.filter(event("the advert of %s is wrong", number, 100.0 + number * 0.001))]
    assert passed == list(range(20))
    later = event("the advert of %s is wrong", 1, 111.0)
    assert limit.filter(later)
    assert vars(later)["dropped"] == 980
    assert "dropped=980" in TextFormatter().format(later)
    quiet = event("the advert of %s is wrong", 1, 122.0)
    assert limit.filter(quiet)
    assert "dropped" not in vars(quiet)


def test_one_source_does_not_silence_another() -> None:
    limit = LineLimit()
    for number in range(100):
        limit.filter(event("the advert of %s is wrong", number, 100.0))
    assert limit.filter(event("the link with %s is down", 1, 100.0))


def test_debug_lines_are_not_limited_and_sources_are_bounded() -> None:
    limit = LineLimit()
    assert all(limit.filter(event("step %s", number, 100.0, logging.DEBUG)) for number in range(100))
    for number in range(3000):
        limit.filter(event(f"message {number} %s", number, 100.0))
    assert len(limit._sources) <= 1024
