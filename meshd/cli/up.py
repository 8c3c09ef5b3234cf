"""`meshd up`: run this device's daemon in the foreground."""

import asyncio
import contextlib
import faulthandler
import gc
import os
import signal
import sys
import threading
from argparse import Namespace
from dataclasses import replace
from logging import getLogger
from typing import TYPE_CHECKING, Literal

from meshd import __version__
from meshd.cli.support.arguments import Parser, add_quant, add_settings, settings_of
from meshd.cli.support.interrupt import end_process
from meshd.cli.support.joining import join_cluster
from meshd.cli.support.progress import Measuring
from meshd.cli.support.secret_arguments import JOIN, given, start_anew, without_secrets
from meshd.cli.support.service_manager import VARIABLES, ServiceManager
from meshd.config import Config, logs_to_journal, require_guarded_api, take_from_environment
from meshd.display import duration, flops, rate, short_id, size
from meshd.errors import MeshdError
from meshd.models.store.catalogue import one_spelling, quantised
from meshd.settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from meshd.daemon.daemon import DaemonInfo

EXAMPLE = (
    "meshd up                        (on the first device)\n"
    "  meshd up --join 7-amber-lion    (on each other device, with the code that `meshd invite` prints on a first one)\n"
    "  meshd up --key CODE             (the same, with the join code of `meshd key show`)"
)

log = getLogger(__name__)

_CLOSE_S = 1.0
"""Longest time between the goodbye to the cluster and the end of the process."""


def add_arguments(parser: Parser) -> None:
    add_settings(parser, (setting.name for setting in SETTINGS))
    add_quant(parser)
    parser.add_argument(
        f"--{JOIN}",
        metavar="CODE",
        help="join the cluster of the device where `meshd invite` printed this code; CODE@HOST:PORT where multicast does not pass; "
        "`-` reads it from standard input",
    )
    parser.add_argument(
        "--stop-with-stdin",
        action="store_true",
        help="stop when standard input ends; for parent processes, whose end then stops the daemon",
    )


def run(args: Namespace) -> int:
    config = _read(args)
    if config.key:
        config = replace(config, key=given(config.key, "join code"))
    require_guarded_api(config)
    if args.join is not None:
        inviter = join_cluster(given(args.join, "invite code"), config)
        config = replace(config, peers=(*config.peers, inviter))
    _hide_secrets(config, [f"--peer={peer}" for peer in dict.fromkeys(config.peers)] if args.join is not None else [])
    from meshd.logs import configure_logging

    faulthandler.enable()  # a watchdog that ends a stuck daemon with SIGABRT gets the stacks of its threads
    log_format: Literal["text", "json"] = "json" if config.log_format == "json" else "text"
    configure_logging(config.log_level, log_format, file=config.log_file, journal=logs_to_journal())
    manager = ServiceManager.of(take_from_environment(*VARIABLES))
    with _ending_within(_CLOSE_S) as leave, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        status = runner.run(_serve(config, manager, lambda: _read(args), stop_with_stdin=args.stop_with_stdin))
        leave(status)
    return status


def _read(args: Namespace) -> Config:
    """Read the settings. Raises: ConfigError."""
    config = settings_of(args).config()
    return replace(config, models=tuple(quantised(one_spelling(model), args.quant) for model in config.models))


@contextlib.contextmanager
def _ending_within(seconds: float) -> "Iterator[Callable[[int], None]]":
    """Yield a function that is to be called when the daemon has left its cluster: `seconds` later the process ends in any case.

    The loop waits for its threads when it is closed, and a thread may be in a read that nothing can interrupt.
    """
    timers: list[threading.Timer] = []

    def leave(status: int) -> None:
        timer = threading.Timer(seconds, end_process, (status,))
        timer.daemon = True
        timer.start()
        timers.append(timer)

    try:
        yield leave
    finally:
        for timer in timers:
            timer.cancel()


def _hide_secrets(config: Config, more: "Sequence[str]" = ()) -> None:
    """Start anew without the keys among the arguments, where `ps` would show them as long as the daemon runs. Add arguments `more`.

    The join code is stored in the state folder, where a later start finds it. The API key and the URL of the MQTT broker, which may
    have a password, move into the environment, which only this user can read.
    """
    words = without_secrets(sys.orig_argv)
    if words == sys.orig_argv:
        return
    from meshd.protocol.identity import choose_cluster_key
    from meshd.state import StateFolder, lock_state

    folder = StateFolder.open(config.state)
    with lock_state(config.state):
        choose_cluster_key(folder, config.key, os.urandom)
    if config.api_key is not None:
        os.environ["MESHD_API_KEY"] = config.api_key
    if config.mqtt is not None:
        os.environ["MESHD_MQTT"] = config.mqtt.with_password
    start_anew([*words, *more])


def _loop_factory() -> "Callable[[], asyncio.AbstractEventLoop] | None":
    """Return uvloop's factory of event loops; None, for asyncio's own loop, if uvloop is not installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _leave_out_of_collections() -> None:
    """Exclude all present objects from garbage collections: to go through those of the libraries stops the process for 0.1 s."""
    gc.freeze()


async def _serve(config: Config, manager: ServiceManager, read: "Callable[[], Config]", *, stop_with_stdin: bool) -> int:
    from meshd.daemon.daemon import run_daemon

    # A daemon of a service manager, or with a log of its own, has no terminal that could hang up.
    stopping = _Stopping(reloads=bool(manager.address) or config.log_file is not None)
    measuring = Measuring()

    def ready(info: "DaemonInfo") -> None:
        _leave_out_of_collections()
        stopping.can_wait = True
        manager.ready(_status(info))
        stopping.reload = lambda: _reload(info, manager)
        _print_ready(info)

    def waiting(text: str) -> None:
        manager.stopping(text)
        _print_waiting(text)

    def stopped() -> None:
        manager.stopping("leaving the cluster")

    stopping.on_stop = stopped
    watched = asyncio.ensure_future(manager.watch())
    daemon = asyncio.ensure_future(
        run_daemon(
            config, stop=stopping.asked, on_ready=ready, on_progress=measuring, on_waiting=waiting, read_config=lambda: read()
        )
    )
    stopping.watch(daemon, stdin=stop_with_stdin)
    manager.status("measuring this device")
    try:
        await daemon
    except asyncio.CancelledError:
        if not stopping.asked.is_set():
            raise
    finally:
        watched.cancel()
        measuring.close()
    return 0


def _reload(info: "DaemonInfo", manager: ServiceManager) -> None:
    """Read the settings again, and open the log's file anew."""
    from meshd.logs import reopen_file

    manager.reloading()
    reopen_file()
    try:
        if info.reload is not None:
            info.reload()
    except MeshdError as error:
        log.error("the settings stay as they are: %s", error)
    finally:  # else systemd would wait for the end of the reload
        manager.ready(_status(info))


def _status(info: "DaemonInfo") -> str:
    return f"up as {info.name}, API {info.api}, links {info.link}"


class _Stopping:
    """Stops the daemon: the first signal shuts it down in order, the second one ends the process at once.

    With `reloads`, SIGHUP reads the settings again; otherwise it stops too: the terminal has been closed.
    """

    def __init__(self, *, reloads: bool = False) -> None:
        self.asked = asyncio.Event()
        self.reload: Callable[[], None] = lambda: None
        """Called at SIGHUP. Set once the daemon has started."""
        self.on_stop: Callable[[], None] = lambda: None
        """Called when the daemon is asked to stop."""
        self._reloads = reloads
        self.can_wait = False
        """Whether the daemon has started and waits for `asked`. During the start, a signal cancels the daemon's task instead."""

    def watch(self, daemon: "asyncio.Future[None]", *, stdin: bool) -> None:
        """Watch for signals and, with `stdin`, for the end of standard input, which comes if the parent process is killed."""
        loop = asyncio.get_running_loop()
        if self._reloads:
            loop.add_signal_handler(signal.SIGHUP, lambda: self.reload())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and self._reloads:
                continue
            if signal.getsignal(number) is not signal.SIG_IGN:  # SIG_IGN: set by nohup, or by a shell for a background job
                loop.add_signal_handler(number, self._stop, daemon, 128 + number)
        if stdin:
            threading.Thread(target=self._watch_stdin, args=(loop, daemon), name="stdin", daemon=True).start()

    def _watch_stdin(self, loop: asyncio.AbstractEventLoop, daemon: "asyncio.Future[None]") -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(self._stop, daemon, 1)

    def _stop(self, daemon: "asyncio.Future[None]", status: int) -> None:
        if self.asked.is_set():
            end_process(status)
        self.asked.set()
        self.on_stop()
        if not self.can_wait:
            daemon.cancel()


def _print_waiting(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader of standard output may have gone
        print(f"meshd: {text}; a second signal exits at once", flush=True)


def _print_ready(info: "DaemonInfo") -> None:
    capability, rates = info.probe.capability, info.probe.capability.rates
    how = "as measured before" if info.probe.cached else f"measured in {duration(info.probe.elapsed_s)}"
    lines = [
        f"meshd {__version__}: {info.name} ({short_id(info.peer)}) is up, in cluster {info.cluster}",
        f"  API     {info.api}/v1",
        f"  links   {info.link}",
        f"  device  {capability.backend} x{capability.threads}: decode {rate(rates.decode_bytes_s)}, "
        f"prefill {flops(rates.prefill_flops_s)}, {size(capability.memory_free_bytes)} free ({how})",
    ]
    # Without a terminal, the output is kept in a log, where the code must not be.
    joining = f"meshd up --key {info.join_code}" if info.new_cluster and sys.stdout.isatty() else "see `meshd invite`"
    with contextlib.suppress(OSError):  # a full disk, or a reader that has gone
        print("\n".join([*lines, f"  on the next device: {joining}"]), flush=True)
