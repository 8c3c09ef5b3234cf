"""Parse what-if peers, which do not exist yet: `+name ram=32GiB bw=60GB/s link=1Gbps rtt=0.3ms`.

`ram` and `bw` (weights read per second while decoding) are required. `link` and `rtt` default to 1 Gbit/s and 0.5 ms. `flops=`
(prefill, FLOP/s) and `power=` (W) are optional. All other rates are taken from the measured peer whose decode bandwidth is closest
to `bw`. Except for the disk's, they are scaled by the ratio of the two bandwidths. The profile is marked as hypothetical.
"""

import re
from collections.abc import Sequence

import msgspec

from meshd.errors import InvalidRequest
from meshd.planner.network import Network
from meshd.planner.profile import PeerProfile
from meshd.types import LinkStats, PeerId, Rates

DEFAULT_LINK_BYTES_S = 125_000_000.0
DEFAULT_RTT_S = 0.0005

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SIZES = {prefix + "B": scale for prefix, scale in _DECIMAL.items()} | {
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "TiB": 2.0**40,
}
_UNITS: dict[str, tuple[dict[str, float], str]] = {
    "ram": (_SIZES, "32GiB"),
    "bw": ({size + "/s": scale for size, scale in _SIZES.items()}, "60GB/s"),
    "link": ({f"{prefix}bps": scale / 8 for prefix, scale in _DECIMAL.items()}, "1Gbps"),
    "rtt": ({"us": 1e-6, "ms": 1e-3, "s": 1.0}, "0.3ms"),
    "flops": ({prefix + "FLOPS": scale for prefix, scale in _DECIMAL.items()}, "500GFLOPS"),
    "power": ({"W": 1.0, "mW": 1e-3}, "15W"),
}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z/]*)")
_EXAMPLE = "+name ram=32GiB bw=60GB/s link=1Gbps rtt=0.3ms"


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """A what-if peer, and its links in both directions with every peer of the cluster."""

    profile: PeerProfile
    links: dict[tuple[PeerId, PeerId], LinkStats]


def parse_what_if(text: str, present: Sequence[PeerProfile]) -> WhatIf:
    """Parse a what-if peer, and link it in both directions with every peer in `present`. Raises: InvalidRequest."""
    name, *settings = text.split() or [""]
    if not name.startswith("+") or len(name) < 2:
        raise _wrong(f"{text!r} does not begin with +name")
    values = _values(settings)
    missing = [key for key in ("ram", "bw") if key not in values]
    if missing:
        raise _wrong(f"{name} needs {' and '.join(missing)}")
    if any(profile.name == name[1:] for profile in present):
        raise _wrong(f"the cluster already has a peer called {name[1:]!r}")
    profile = _profile(name[1:], values, present)
    stats = LinkStats(rtt_s=values.get("rtt", DEFAULT_RTT_S), bandwidth_bytes_s=values.get("link", DEFAULT_LINK_BYTES_S))
    pairs = [(profile.id, other.id) for other in present] + [(other.id, profile.id) for other in present]
    return WhatIf(profile=profile, links=dict.fromkeys(pairs, stats))


def with_what_if(
    texts: Sequence[str], profiles: Sequence[PeerProfile], network: Network
) -> tuple[tuple[PeerProfile, ...], Network]:
    """Add what-if peers to a cluster. Returns: (all profiles, the network with their links). Raises: InvalidRequest."""
    cluster = tuple(profiles)
    for text in texts:
        added = parse_what_if(text, cluster)
        cluster, network = (*cluster, added.profile), network.with_links(added.links)
    return cluster, network


def _profile(name: str, values: dict[str, float], present: Sequence[PeerProfile]) -> PeerProfile:
    measured = [profile for profile in present if profile.measured and not profile.hypothetical]
    if not measured:
        raise InvalidRequest(
            "no peer has measured rates yet, and a what-if peer is scaled from a measured one",
            param="what_if",
            hint="run `meshd bench` first",
        )
    like = min(measured, key=lambda profile: abs(profile.rates.decode_bytes_s - values["bw"]))
    scale = values["bw"] / like.rates.decode_bytes_s
    return PeerProfile(
        id=PeerId(f"what-if:{name}"),
        name=name,
        rates=_scaled(like.rates, scale, values.get("flops")),
        memory_free_bytes=int(values["ram"]),
        numerics=like.numerics,
        power_w=values.get("power"),
        weight_bits=like.weight_bits,
        hypothetical=True,
    )


def _scaled(rates: Rates, scale: float, flops: float | None) -> Rates:
    return Rates(
        decode_bytes_s=rates.decode_bytes_s * scale,
        prefill_flops_s=flops or rates.prefill_flops_s * scale,
        memory_bytes_s=rates.memory_bytes_s * scale,
        attention_bytes_s=rates.attention_bytes_s * scale,
        disk_bytes_s=rates.disk_bytes_s,
        layer_overhead_s=rates.layer_overhead_s / scale,
    )


def _values(settings: list[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in _UNITS:
            raise _wrong(f"{setting!r} is not one of {', '.join(f'{known}=...' for known in _UNITS)}")
        if key in values:
            raise _wrong(f"{key} is given twice")
        values[key] = _quantity(key, text)
    return values


def _quantity(key: str, text: str) -> float:
    units, example = _UNITS[key]
    match = _NUMBER.fullmatch(text)
    if match is None or match[2] not in units:
        raise _wrong(f"{key}={text!r} is not a quantity like {key}={example}")
    value = float(match[1]) * units[match[2]]
    if value <= 0 and key != "rtt":
        raise _wrong(f"{key}={text} must be more than 0")
    return value


def _wrong(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="what_if", hint=f"write for example {_EXAMPLE!r}")
