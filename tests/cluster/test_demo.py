"""`meshd demo`: three daemons find one another, share the layers, answer, and end with the demo."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

PROMPT = "What is 2+2? Explain it to a child, with apples."


def demo(cache: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "meshd", "demo", "--cache", str(cache), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_demo_answers_over_three_daemons_survives_a_loss_and_leaves_nothing_behind(shared_cache: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with demo(shared_cache, "--prompt", PROMPT) as process:
        out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    assert len(re.findall(r"\w+ found \w+ \(", out)) == 6
    assert "(mdns" in out
    held = re.findall(r"(\w+) holds layers (\d+)-(\d+)", out)
    assert {name for name, _, _ in held} == {"ash", "birch", "cedar"}
    assert [int(start) for _, start, _ in held] == [0, *(int(end) for _, _, end in held[:-1])]
    assert held[-1][2] == "30"
    _, first, second = out.split(f">>> {PROMPT}")
    assert "apple" in first.split("[")[0]
    assert "[cedar killed]" in second
    assert "the same answer as before, word for word" in second
    assert "tokens/s" in out
    assert set(psutil.Process().children(recursive=True)) <= before


def test_kept_daemons_end_when_the_demo_is_killed(shared_cache: Path) -> None:
    with demo(shared_cache, "--keep") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "meshd run" in line:
                break
        children = psutil.Process(process.pid).children()
        assert len([child for child in children if child.status() != psutil.STATUS_ZOMBIE]) == 2, (
            "the demo must have killed one of three"
        )
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


def test_ctrl_c_ends_the_demo_and_its_daemons(shared_cache: Path) -> None:
    with demo(shared_cache) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "is up" in line:
                break
        children = psutil.Process(process.pid).children()
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert time.monotonic() - asked < 10
    assert not any(child.is_running() for child in children)
