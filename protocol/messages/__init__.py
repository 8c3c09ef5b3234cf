"""The messages of the link protocol, by subject. `protocol/SPEC.md` specifies them for other languages.

A message is a frozen struct with a type number. Its fields are the frame's msgpack header; tensors and file contents are the
frame's raw payload. Type numbers are never reused. A reader skips fields that it does not know. A field that an older writer does
not send has a default. A message with an unknown type number is answered with ERROR, and the link stays up.

The messages of one session:

    coordinator --OPEN--> every stage's peer            --OPENED--> coordinator
    coordinator --STEPS--> first stage                  (token ids: all known tokens, once)
    stage i --STEPS--> stage i+1                        (hidden states of one or several sessions)
    stage i+1 --ACK--> stage i                          (steps that have begun, and how many more may be sent)
    first stage --ACK--> coordinator                    (the same, for the prompt)
    last stage --TOKENS--> first stage and coordinator
    coordinator --ACK--> first and last stage           (tokens that arrived, and the limit of decoding ahead of the client)
    coordinator --RENEW--> every stage's peer           (the lease)
    any stage --FAILED--> coordinator
    coordinator --CLOSE--> every stage's peer           --CLOSED--> coordinator

A later epoch (after a loss, or to move a stage) reuses existing KV:

    coordinator --OPEN(resume)--> every stage's peer    --OPENED(held, outputs kept)--> coordinator
    coordinator --RESUME(start, send_from)--> every stage's peer
    coordinator --STEPS--> first stage                  (the known tokens from the first stage's start)
    stage i --STEPS--> stage i+1                        (kept outputs from send_from to start, then as computed)

A copy of a stage's KV on another peer (as a mirror, or to prepare a move):

    coordinator --EXPECT_COPY(source)--> target         --COPY_EXPECTED--> coordinator
    coordinator --MIRROR(target)--> stage's peer
    stage's peer --KV_OFFER--> target                   --KV_ACCEPTED(held)--> stage's peer
    stage's peer --KV_BLOCKS--> target                  --KV_STORED(held)--> stage's peer
    stage's peer --MIRRORED(held, filled)--> coordinator

A rotation of the cluster key (SPEC.md, section 12):

    peer with the new key --ROTATION(secret)--> every linked peer that stays    --ROTATION--> all its linked peers
    owner's device --GIVE_OWNER_KEY--> another device   --OWNER_KEY_TAKEN--> owner's device
"""

from meshd.protocol.messages.admin import (
    MAX_ATTEMPTS,
    CheckReach,
    DialAttempt,
    EndSession,
    FetchStory,
    FetchTrace,
    Move,
    Moved,
    PeerEvents,
    ReachChecked,
    SessionEnded,
    StoryData,
    TraceData,
    WatchEvents,
)
from meshd.protocol.messages.base import FEATURES, PROTOCOL_VERSION, REGISTRY, Lane, Message, Reply, Request, SessionMessage
from meshd.protocol.messages.copies import CopyExpected, ExpectCopy, KvAccepted, KvBlocks, KvOffer, KvStored, Mirror, Mirrored
from meshd.protocol.messages.journal import (
    FetchSession,
    FindSession,
    Journal,
    JournalDrop,
    Journaled,
    JournalTokens,
    SessionData,
    SessionFound,
)
from meshd.protocol.messages.link import Error, Goodbye, Heartbeat, HeartbeatAck, Hello, Probe, ProbeAck, Received
from meshd.protocol.messages.membership import FetchHeader, FetchProfile, HeaderData, MqttDevices, PeerStatus, ProfileData
from meshd.protocol.messages.placement import Drain, Drained, Place, Placed, Unplace, Unplaced
from meshd.protocol.messages.session import (
    Close,
    Closed,
    Failed,
    FetchProgress,
    HandedOver,
    HandOver,
    Open,
    Opened,
    ProgressData,
    Renew,
    Resume,
    RunningStep,
    StageProgress,
)
from meshd.protocol.messages.steps import STEP_WINDOW, Ack, Step, StepKind, Steps, Tokens, TokensFinish
from meshd.protocol.messages.trust import GiveOwnerKey, OwnerKeyTaken, Rotation
from meshd.protocol.messages.weights import FetchManifest, FetchWeights, ManifestData, WeightData

__all__ = [
    "FEATURES",
    "MAX_ATTEMPTS",
    "PROTOCOL_VERSION",
    "REGISTRY",
    "STEP_WINDOW",
    "Ack",
    "CheckReach",
    "Close",
    "Closed",
    "CopyExpected",
    "DialAttempt",
    "Drain",
    "Drained",
    "EndSession",
    "Error",
    "ExpectCopy",
    "Failed",
    "FetchHeader",
    "FetchManifest",
    "FetchProfile",
    "FetchProgress",
    "FetchSession",
    "FetchStory",
    "FetchTrace",
    "FetchWeights",
    "FindSession",
    "GiveOwnerKey",
    "Goodbye",
    "HandOver",
    "HandedOver",
    "HeaderData",
    "Heartbeat",
    "HeartbeatAck",
    "Hello",
    "Journal",
    "JournalDrop",
    "JournalTokens",
    "Journaled",
    "KvAccepted",
    "KvBlocks",
    "KvOffer",
    "KvStored",
    "Lane",
    "ManifestData",
    "Message",
    "Mirror",
    "Mirrored",
    "Move",
    "Moved",
    "MqttDevices",
    "Open",
    "Opened",
    "OwnerKeyTaken",
    "PeerEvents",
    "PeerStatus",
    "Place",
    "Placed",
    "Probe",
    "ProbeAck",
    "ProfileData",
    "ProgressData",
    "ReachChecked",
    "Received",
    "Renew",
    "Reply",
    "Request",
    "Resume",
    "Rotation",
    "RunningStep",
    "SessionData",
    "SessionEnded",
    "SessionFound",
    "SessionMessage",
    "StageProgress",
    "Step",
    "StepKind",
    "Steps",
    "StoryData",
    "Tokens",
    "TokensFinish",
    "TraceData",
    "Unplace",
    "Unplaced",
    "WatchEvents",
    "WeightData",
]
