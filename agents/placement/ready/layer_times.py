"""What the check of loaded layers measured, kept on disk, so that the same layers are ready sooner when they are loaded again."""

from logging import getLogger

import msgspec

from meshd.agents.placement.resident import ResidentLayers
from meshd.errors import StorageError
from meshd.numerics import NumericsId
from meshd.state import Folder
from meshd.types import LayerRange, ModelId

log = getLogger(__name__)

FORMAT = 1
"""Version of what is measured, and of how. Increase it when either changes."""
FILE = "layers.json"
_MAX_RECORDS = 64
"""Maximum number of records in the file, the newest of all daemons that share it."""


class LayersKey(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the times of layers on this device."""

    format: int = FORMAT
    model: ModelId
    layers: LayerRange
    numerics: NumericsId
    """The backend, its libraries and the processor."""
    threads: int


class LayerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The measured times of resident layers. `ResidentLayers` says what each means."""

    layer_decode_s: float
    layer_prefill_s: float
    head_s: float | None = None
    attention_token_s: float | None = None
    attention_pair_s: float | None = None

    @classmethod
    def of(cls, resident: ResidentLayers) -> "LayerTimes":
        """Return the times of layers that were just measured."""
        assert resident.layer_decode_s is not None
        assert resident.layer_prefill_s is not None
        return cls(**{name: getattr(resident, name) for name in cls.__struct_fields__})

    def decode_s(self, position: int, layers: int) -> float:
        """Return the seconds of a decode step at a position, without the head."""
        return layers * (self.layer_decode_s + position * (self.attention_token_s or 0.0))

    def apply(self, resident: ResidentLayers) -> None:
        """Set the times of layers."""
        for name in self.__struct_fields__:
            setattr(resident, name, getattr(self, name))


class _Record(msgspec.Struct, frozen=True):
    key: LayersKey
    times: LayerTimes


class LayerTimesFile:
    """The measured times of this device's layers. What can't be read or written is measured again."""

    def __init__(self, folder: Folder) -> None:
        """`folder` may be shared by the daemons of a device."""
        self._folder = folder

    def find(self, key: LayersKey) -> LayerTimes | None:
        """Return what was measured of these layers; None for nothing."""
        return next((record.times for record in self._read() if record.key == key), None)

    def save(self, key: LayersKey, times: LayerTimes) -> None:
        """Keep what was measured. A record that another daemon writes at the same moment may be lost."""
        others = [record for record in self._read() if record.key != key]
        content = msgspec.json.encode([_Record(key, times), *others][:_MAX_RECORDS])
        try:
            self._folder.write(FILE, msgspec.json.format(content))
        except StorageError as error:
            log.warning("the measured times of layers were not kept: %s", error)

    def _read(self) -> list[_Record]:
        try:
            return msgspec.json.decode(self._folder.read(FILE) or b"[]", type=list[_Record])
        except (StorageError, msgspec.DecodeError):
            return []
