"""Writes the golden frames: NUMBER_NAME.bin is a frame, NUMBER_NAME.json describes its contents.

Run it after an intended change of a message, and check the difference before you commit it:

    python tests/protocol/golden/generate.py

With --keep it writes earlier/VERSION.json instead: the frames of this version, which later minor versions must read.
"""

import json
import struct
import sys
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshd.numerics import NumericsId
from meshd.protocol.cluster_key import ClusterKey, peer_id
from meshd.protocol.codec import encode
from meshd.protocol.framing import frame_head
from meshd.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    CheckReach,
    Close,
    Closed,
    CopyExpected,
    DialAttempt,
    Drain,
    Drained,
    EndSession,
    Error,
    ExpectCopy,
    Failed,
    FetchHeader,
    FetchManifest,
    FetchProfile,
    FetchProgress,
    FetchSession,
    FetchStory,
    FetchTrace,
    FetchWeights,
    FindSession,
    GiveOwnerKey,
    Goodbye,
    HandedOver,
    HandOver,
    HeaderData,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Journal,
    JournalDrop,
    Journaled,
    JournalTokens,
    KvAccepted,
    KvBlocks,
    KvOffer,
    KvStored,
    ManifestData,
    Message,
    Mirror,
    Mirrored,
    Move,
    Moved,
    MqttDevices,
    Open,
    Opened,
    OwnerKeyTaken,
    PeerEvents,
    PeerStatus,
    Place,
    Placed,
    Probe,
    ProbeAck,
    ProfileData,
    ProgressData,
    ReachChecked,
    Received,
    Renew,
    Resume,
    Rotation,
    RunningStep,
    SessionData,
    SessionEnded,
    SessionFound,
    StageProgress,
    Step,
    StepKind,
    Steps,
    StoryData,
    Tokens,
    TraceData,
    Unplace,
    Unplaced,
    WatchEvents,
    WeightData,
)
from meshd.protocol.owner import OwnerKey
from meshd.protocol.trust import RotationChain, sign_rotation
from meshd.types import (
    AttentionShard,
    Capability,
    DeviceStatus,
    Holding,
    LayerRange,
    LinkStats,
    ModelCard,
    ModelId,
    ModelSpec,
    MqttDevice,
    PeerId,
    Plan,
    PlanId,
    Profile,
    Rates,
    SamplingParams,
    SessionId,
    StagePlan,
    Status,
    TokenLogprobs,
)

ALICE, BOB = PeerId("a" * 52), PeerId("b" * 52)
SESSION, OTHER_SESSION = SessionId("0123456789abcdef" * 2), SessionId("f0e1d2c3b4a59687" * 2)
RUNNING = RunningStep(session=SESSION, epoch=2, stage=1, step=5, tokens=1, running_s=0.25, predicted_s=0.125)
MODEL = ModelId("fedcba9876543210" * 2)
SPEC = ModelSpec(
    architecture="llama",
    layers=2,
    hidden=4,
    heads=2,
    kv_heads=1,
    head_dim=2,
    ffn=8,
    vocab=16,
    context_length=64,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tied_head=True,
)
CARD = ModelCard(
    id=MODEL,
    name="tiny:2l",
    ref="file:/models/tiny.gguf",
    quantisation="Q4_1",
    spec=SPEC,
    layer_bytes=(120, 120),
    embedding_bytes=40,
    head_bytes=48,
    layer_parameters=(192, 192),
    head_parameters=64,
    end_of_sequence=(2,),
    created=1_700_000_000,
    layer_weights={"F32": (0, 16), "Q4_1": (192, 176)},
    head_weights={"F32": 64},
)
RATES = Rates(
    decode_bytes_s=1e10,
    prefill_flops_s=5e10,
    memory_bytes_s=2e10,
    attention_bytes_s=8e9,
    disk_bytes_s=1e9,
    layer_overhead_s=2e-5,
)
NUMERICS = NumericsId("onnxruntime/int8/512/0123456789abcdef")
CAPABILITY = Capability(
    backend="onnxruntime",
    numerics=NUMERICS,
    processor="x86_64",
    threads=4,
    memory_total_bytes=8 << 30,
    memory_free_bytes=6 << 30,
    rates=RATES,
    weight_bits={"F32": 32.0, "Q4_1": 8.125},
)
PLAN = Plan(
    id=PlanId("p1"),
    model=MODEL,
    stages=(
        StagePlan(peer=ALICE, layers=LayerRange(0, 1), mirror=BOB),
        StagePlan(
            peer=BOB,
            layers=LayerRange(1, 2),
            attention=(AttentionShard(peer=ALICE, layers=LayerRange(1, 2), kv_heads=(0, 1), tokens=(0, 32)),),
        ),
    ),
    prefill_chunk_tokens=16,
    context=64,
    predicted_ttft_s=0.25,
    predicted_tpot_s=0.0625,
    numerics=(NUMERICS, NumericsId("torch/f32/512/fedcba9876543210/varies")),
)
PROFILE = Profile(capability=CAPABILITY, models=(CARD,), api="127.0.0.1:6374")
STATUS = Status(
    revision=3,
    profile="00112233445566778899aabbccddeeff",
    memory_free_bytes=5 << 30,
    holdings=(Holding(model=MODEL, layers=LayerRange(0, 1), state="active", weight_bytes=120, kv_tokens_total=64),),
    links={BOB: LinkStats(rtt_s=0.0005, bandwidth_bytes_s=1.25e8, hop_s=0.00025)},
    neighbours={BOB: "192.168.1.7:6375"},
    sessions=2,
    device=DeviceStatus(load=0.5, temperature_c=48.0, battery=0.75, on_mains=False),
)
SAMPLES: tuple[tuple[Message, bytes], ...] = (
    (
        Hello(
            version=PROTOCOL_VERSION,
            features=("f32",),
            software="meshd/0.1.0",
            peer=ALICE,
            name="küche",
            incarnation=7,
            link=0x0123456789ABCDEF,
            lane=1,
            max_header=65536,
            max_payload=16777216,
            port=6375,
            history=0x0123456789ABCDEE,
            lost=0x0123456789ABCDEE,
            received=(1200, 34),
        ),
        b"",
    ),
    (Error(request=9, code="does_not_fit", message="no room", hint="free memory", session=SESSION), b""),
    (Heartbeat(sequence=1, sent_ns=123_456_789_012, received=(1234, 56)), b""),
    (HeartbeatAck(sequence=1, sent_ns=123_456_789_012, clock_ns=987_654_321_098), b""),
    (Goodbye(reason="this peer stops"), b""),
    (Probe(request=3), bytes(range(16))),
    (ProbeAck(request=3), b""),
    (Received(received=(1298, 57)), b""),
    (FetchHeader(request=4, model=MODEL), b""),
    (HeaderData(request=4, card=CARD), b"GGUF\x03\x00\x00\x00"),
    (PeerStatus(status=STATUS), b""),
    (FetchProfile(request=11), b""),
    (ProfileData(request=11), msgspec.msgpack.encode(PROFILE)),
    (
        Place(request=5, model=MODEL, ref=CARD.ref, layers=LayerRange(0, 1), kv_tokens=64, deadline_ms=60_000, numerics=NUMERICS),
        b"",
    ),
    (Placed(request=5, layers=LayerRange(0, 1), kv_tokens=64), b""),
    (Unplace(request=6, model=MODEL), b""),
    (Unplaced(request=6, freed_bytes=120), b""),
    (
        Open(
            request=8,
            session=SESSION,
            epoch=2,
            plan=PLAN,
            stage=1,
            coordinator=ALICE,
            prompt_tokens=5,
            max_tokens=8,
            sampling=SamplingParams(temperature=0.5, seed=42, logit_bias={3: -1.5}, logprobs=2),
            deadline_ms=30000,
            lease_ms=15_000,
            credit=8,
            answered=1,
            resume=True,
        ),
        b"",
    ),
    (Opened(request=8, session=SESSION, epoch=2, blocks=2, held=5, mirrored=True, kept_from=1, kept_to=5), b""),
    (
        Steps(
            steps=(
                Step(
                    session=SESSION,
                    epoch=1,
                    stage=1,
                    seq=3,
                    start=5,
                    tokens=1,
                    kind=StepKind.DECODE,
                    sample=1,
                    committed=6,
                    size=16,
                ),
                Step(
                    session=OTHER_SESSION,
                    epoch=2,
                    stage=1,
                    seq=7,
                    start=9,
                    tokens=2,
                    kind=StepKind.VERIFY,
                    sample=2,
                    committed=10,
                    size=32,
                    ids=(11, 3),
                ),
            )
        ),
        b"\x00\x00\x80\x3f\x00\x00\x00\x40\x00\x00\x40\x40\x00\x00\x80\xc0" * 3,
    ),
    (Ack(session=SESSION, epoch=1, stage=1, next_seq=3, credit=7), b""),
    (
        Tokens(
            session=SESSION,
            epoch=1,
            index=4,
            tokens=(3, 11),
            logprobs=(TokenLogprobs(-0.5, ((3, -0.5),)), TokenLogprobs(-0.25, ((11, -0.25), (3, -1.75)))),
            finish="stop",
        ),
        b"",
    ),
    (Renew(session=SESSION, epoch=1, lease_ms=15_000), b""),
    (Failed(session=SESSION, epoch=1, step=3, stage=1, code="out_of_memory", message="no block is free", blame=BOB), b""),
    (Close(session=SESSION, epoch=1, reason="done"), b""),
    (Closed(session=SESSION, epoch=1, freed_blocks=2), b""),
    (Resume(session=SESSION, epoch=2, stage=1, start=4, send_from=5), b""),
    (HandOver(request=20, session=SESSION, to=BOB), b""),
    (HandedOver(request=20, known=True), b""),
    (
        ExpectCopy(
            request=21,
            session=SESSION,
            epoch=2,
            source=BOB,
            model=MODEL,
            layers=LayerRange(1, 2),
            tokens=13,
            lease_ms=10_000,
            predecessors=(BOB,),
        ),
        b"",
    ),
    (CopyExpected(request=21, session=SESSION, epoch=2), b""),
    (Mirror(session=SESSION, epoch=2, stage=1, target=ALICE, eager=True), b""),
    (Mirrored(session=SESSION, epoch=2, stage=1, target=ALICE, held=32, filled=40), b""),
    (
        KvOffer(
            request=9,
            session=SESSION,
            epoch=2,
            layers=LayerRange(1, 2),
            valid=4,
        ),
        b"",
    ),
    (KvAccepted(request=9, held=4), b""),
    (
        KvBlocks(session=SESSION, epoch=2, layers=LayerRange(1, 2), position=4, tokens=1),
        b"\x00\x00\x80\x3f\x00\x00\x00\x40\x00\x00\x40\x40\x00\x00\x80\xc0",
    ),
    (KvStored(session=SESSION, epoch=2, layers=LayerRange(1, 2), held=5), b""),
    (FetchProgress(request=10, session=SESSION, epoch=2), b""),
    (ProgressData(request=10, stages=(StageProgress(0, 6, 5, 0.0), StageProgress(1, 5, 5, 0.25)), running=RUNNING), b""),
    (Journal(request=11, session=SESSION, epoch=2), b"\x80"),
    (Journaled(request=11, session=SESSION), b""),
    (JournalTokens(session=SESSION, epoch=2, index=1, tokens=((11, TokenLogprobs(-0.25)), (3, None)), finish="length"), b""),
    (JournalDrop(session=SESSION, epoch=2), b""),
    (FindSession(request=12, session=SESSION, nonce="01" * 16), b""),
    (SessionFound(request=12, coordinates=False, keeps=True, epoch=2, tokens=3, proof="02" * 32), b""),
    (FetchSession(request=13, session=SESSION, secret="00" * 16, take=True), b""),
    (SessionData(request=13, session=SESSION, epoch=2), b"\x80"),
    (EndSession(request=14, session=SESSION, forget=True), b""),
    (SessionEnded(request=14, known=True), b""),
    (FetchStory(request=15, session=SESSION), b""),
    (StoryData(request=15, now=12.5), b'[{"at": 11.5, "what": "opened"}]'),
    (Move(request=16, session=SESSION, target=BOB, source=ALICE), b""),
    (Moved(request=16, pause_s=0.03125, plan=PLAN), b""),
    (Rotation(secret=True), bytes(range(32))),
    (GiveOwnerKey(request=20), bytes(range(64, 96))),
    (OwnerKeyTaken(request=20), b""),
    (WatchEvents(lease_ms=15_000), b""),
    (PeerEvents(lost=2), b'{"at": 11.5, "type": "notice", "message": "hello", "hint": ""}'),
    (CheckReach(request=22, nonce="01" * 16), b""),
    (
        ReachChecked(
            request=22,
            attempts=(DialAttempt(address="192.168.1.7:6375"), DialAttempt(address="10.0.0.7:6375", why="no answer in time")),
            multicast="silent",
            wall=1_700_000_000.5,
        ),
        b"",
    ),
    (FetchTrace(request=22, session=SESSION), b""),
    (TraceData(request=22, records=1, dropped=3), struct.pack("<IIIHBx4d", 2, 5, 1, 1, 1, 10.25, 10.5, 10.75, 11.0) + b"[]"),
    (MqttDevices(devices=(MqttDevice(serial="0f" * 16, name="door", check="00c0ffee", added=1.5, revoked=2.5),)), b""),
    (Drain(request=17, deadline_ms=60_000), b""),
    (Drained(request=17, sessions_left=0), b""),
    (FetchManifest(request=18, model=MODEL), b""),
    (ManifestData(request=18, card=CARD, sha256="00" * 32), b"\x92\x90\xc0"),
    (FetchWeights(request=19, model=MODEL, offset=4096, length=4), b""),
    (WeightData(request=19, offset=4096), b"\x01\x02\x03\x04"),
)


def _identity_vector() -> dict[str, str]:
    owner = OwnerKey.from_seed(bytes(range(64, 96)))
    key = ClusterKey(bytes(range(32)), owner.hash, 1)
    peer_seed = bytes(range(32, 64))
    public = Ed25519PrivateKey.from_private_bytes(peer_seed).public_key()
    record = sign_rotation(owner, generation=1, authority=key.issuer.public, peers=[peer_id(public)], at=1_780_000_000)
    return {
        "cluster_key": key.secret.hex(),
        "generation": "1",
        "owner_seed": owner.seed.hex(),
        "owner_public": owner.public.hex(),
        "owner_hash": owner.hash.hex(),
        "join_code": key.code,
        "authority_seed": key.authority.private_bytes_raw().hex(),
        "authority_public": key.authority.public_key().public_bytes_raw().hex(),
        "return_seed": key.return_issuer.private.private_bytes_raw().hex(),
        "fingerprint": key.fingerprint,
        "authority_certificate": key.certificate.public_bytes(Encoding.DER).hex(),
        "peer_seed": peer_seed.hex(),
        "peer_public": public.public_bytes_raw().hex(),
        "peer_id": peer_id(public),
        "peer_certificate": key.certify(public).public_bytes(Encoding.DER).hex(),
        "rotation": RotationChain(owner.hash, (record,)).encode().hex(),
        "rotation_hash": record.hash.hex(),
    }


def main() -> None:
    """Write all files again and delete stale ones."""
    folder = Path(__file__).parent
    (folder / "identity.json").write_text(json.dumps(_identity_vector(), indent=1) + "\n")
    for stale in [*folder.glob("*.bin"), *folder.glob("[0-9]*.json")]:
        stale.unlink()
    for message, payload in SAMPLES:
        header = encode(message)
        stem = f"{message.number:02}_{type(message).__name__.lower()}"
        (folder / f"{stem}.bin").write_bytes(frame_head(header, len(payload)) + payload)
        described = {
            "number": message.number,
            "name": type(message).__name__,
            "header_bytes": len(header),
            "payload_hex": payload.hex(),
            "body": msgspec.to_builtins(message, str_keys=True),
        }
        (folder / f"{stem}.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")


def keep() -> None:
    """Write the present frames to `earlier/VERSION.json`, which later versions must read."""
    folder = Path(__file__).parent
    lines = []
    for message, payload in sorted(SAMPLES, key=lambda sample: sample[0].number):
        header = encode(message)
        described = {
            "number": message.number,
            "name": type(message).__name__,
            "frame_hex": (frame_head(header, len(payload)) + payload).hex(),
            "body": msgspec.to_builtins(message, str_keys=True),
            "payload_hex": payload.hex(),
        }
        lines.append(json.dumps(described, ensure_ascii=False))
    version = ".".join(map(str, PROTOCOL_VERSION))
    (folder / "earlier").mkdir(exist_ok=True)
    (folder / "earlier" / f"{version}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--keep"]:
        keep()
    else:
        main()
