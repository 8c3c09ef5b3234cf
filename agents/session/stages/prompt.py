"""Sends the known tokens of an epoch to the first stage, in steps of a bounded size, as far as the stage has room."""

from dataclasses import dataclass, field
from logging import getLogger

import numpy as np
import numpy.typing as npt

from meshd.agents.links.backlog import Backlog
from meshd.agents.links.links import Links
from meshd.protocol.messages import STEP_WINDOW, Step, StepKind, Steps
from meshd.types import PeerId, SessionId

log = getLogger(__name__)

PART_TOKENS = 1 << 16
"""Tokens of one step: 256 KiB, so that a prompt does not keep the bulk lane of others. Nearly every prompt is one step."""
_NO_IDS = np.empty(0, np.int32)


@dataclass(slots=True)
class PromptSender:
    """Sends one answer's prompts. A new epoch's prompt takes the place of an older one."""

    session: SessionId
    links: Links
    _backlog: Backlog = field(init=False)
    _epoch: int = 0
    """The epoch whose prompt is wanted. 0: none."""
    _peer: PeerId = field(init=False)
    _ids: npt.NDArray[np.int32] = field(default_factory=lambda: _NO_IDS)
    _start: int = 0
    """Position of the first token that has not been sent."""
    _seq: int = 0
    _credit: int = STEP_WINDOW

    def __post_init__(self) -> None:
        self._backlog = Backlog(self.links)

    def send(self, epoch: int, peer: PeerId, ids: npt.NDArray[np.int32], start: int) -> None:
        """Send the known `ids` from position `start` on to the first stage's peer."""
        self._epoch, self._peer, self._ids = epoch, peer, ids
        self._start, self._seq, self._credit = start, 0, STEP_WINDOW
        self._continue()

    def acknowledged(self, epoch: int, credit: int) -> None:
        """Go on sending, because the first stage takes steps before number `credit`."""
        if epoch and epoch == self._epoch:
            self._credit = credit
            self._continue()

    def forget(self, epoch: int) -> None:
        """Drop what has not been sent of a prompt of this epoch or an older one."""
        if self._epoch <= epoch:
            self._epoch, self._ids = 0, _NO_IDS

    def _continue(self) -> None:
        while self._start < len(self._ids) and self._seq < self._credit:
            self._send_part(self._epoch, self._ids[self._start : self._start + PART_TOKENS])

    def _send_part(self, epoch: int, part: npt.NDArray[np.int32]) -> None:
        peer, end = self._peer, self._start + len(part)
        step = Step(
            session=self.session,
            epoch=epoch,
            stage=0,
            seq=self._seq,
            start=self._start,
            tokens=len(part),
            kind=StepKind.PREFILL,
            sample=int(end == len(self._ids)),
            committed=end,
            size=part.nbytes,
        )
        self._start, self._seq = end, self._seq + 1
        self._backlog.send(
            peer,
            Steps(steps=(step,)),
            part.data.cast("B"),
            wanted=lambda: self._epoch == epoch,
            failed=lambda error: log.debug("the prompt was not sent to %.8s: %s", peer, error),
        )
