"""All routes of the HTTP API, with their handlers, request types and response types."""

from dataclasses import dataclass
from typing import Any

import msgspec

from meshd.agents.cluster_service import CheckStep, DoctorRequest, InviteStep, PlacementStep, PlaceRequest, PlanRequest
from meshd.api import cluster_key, health, mesh
from meshd.api.http.reply import Rows
from meshd.api.mesh import Handler
from meshd.api.openai import models
from meshd.api.openai.chat import handler as chat
from meshd.api.openai.chat.schemas import ChatCompletion, ChatCompletionChunk, ChatRequest
from meshd.api.openai.completions import handler as completions
from meshd.api.openai.completions.schemas import Completion, CompletionRequest
from meshd.api.openai.responses import handler as responses
from meshd.api.openai.responses.request import ResponseRequest
from meshd.api.openai.responses.schemas import AnyStreamEvent, Deleted, Response
from meshd.models.store.progress import PullProgress


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    `takes`, `query`, `gives` and `streams` are types: of the request's JSON body, of its query string, of the response's JSON body,
    and of the data of a streamed event. A tuple lists alternatives. None: the route has no such part.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    takes: type[msgspec.Struct] | None = None
    gives: Any = None
    streams: Any = None
    query: type[msgspec.Struct] | None = None


ROUTES = (
    Route("POST", "/v1/chat/completions", chat.create, "Answer a chat", ChatRequest, ChatCompletion, ChatCompletionChunk),
    Route("POST", "/v1/completions", completions.create, "Continue a prompt", CompletionRequest, Completion, Completion),
    Route("POST", "/v1/responses", responses.create, "Answer, also in the background", ResponseRequest, Response, AnyStreamEvent),
    Route(
        "GET",
        "/v1/responses/{id}",
        responses.retrieve,
        "Read an answer by its id: its current state, or its stream from any event. Waits for a running chat or completion",
        gives=(Response, ChatCompletion, Completion),
        streams=(AnyStreamEvent, ChatCompletionChunk, Completion),
        query=responses.RetrieveQuery,
    ),
    Route("DELETE", "/v1/responses/{id}", responses.delete, "Cancel an answer and delete its record", gives=Deleted),
    Route("POST", "/v1/responses/{id}/cancel", responses.cancel, "Cancel an answer in the background", gives=Response),
    Route("GET", "/v1/models", models.listing, "The models that a request would be answered with", gives=models.ModelList),
    Route("GET", "/v1/models/{id:.+}", models.one, "One of these models", gives=models.Model),
    Route("GET", "/health", health.health, "Whether the daemon is alive", gives=health.Health),
    Route("GET", "/ready", health.ready, "Whether it can answer now", gives=health.Readiness),
    Route("GET", "/metrics", health.metrics, "Metrics in Prometheus' text format"),
    Route("GET", "/mesh/v1/self", mesh.identity, "This peer", gives=dict[str, Any]),
    Route("GET", "/mesh/v1/peers", mesh.rows(lambda m: m.peers()), "The cluster's peers", gives=Rows),
    Route(
        "GET",
        "/mesh/v1/links",
        mesh.rows(lambda m: m.links()),
        "Links that live peers have measured, one row for each direction",
        gives=Rows,
    ),
    Route("GET", "/mesh/v1/models", mesh.models, "The models that this mesh knows", gives=Rows),
    Route("GET", "/mesh/v1/catalogue", mesh.catalogue, "The models that can be pulled by a short name", gives=Rows),
    Route("GET", "/mesh/v1/plans", mesh.rows(lambda m: m.plans()), "The plans in use", gives=Rows),
    Route("GET", "/mesh/v1/sessions", mesh.rows(lambda m: m.sessions()), "The running sessions", gives=Rows),
    Route(
        "GET",
        "/mesh/v1/events",
        mesh.events,
        "The rows of all listings, then events as they happen",
        streams=dict[str, Any],
        query=mesh.EventsQuery,
    ),
    Route("POST", "/mesh/v1/plan", mesh.plan, "Which peers would compute which layers, and why", PlanRequest, dict[str, Any]),
    Route("POST", "/mesh/v1/place", mesh.place, "Put a model's layers on peers", PlaceRequest, streams=PlacementStep),
    Route("POST", "/mesh/v1/unplace", mesh.unplace, "Free a model's layers on every peer", mesh.UnplaceRequest, mesh.Unplaced),
    Route("POST", "/mesh/v1/pull", mesh.pull, "Fetch a model to this peer's disk", mesh.PullRequest, streams=PullProgress),
    Route("DELETE", "/mesh/v1/models/{id:.+}", mesh.remove_model, "Remove a model from this peer's disk", gives=mesh.RemovedModel),
    Route("DELETE", "/mesh/v1/sessions/{id}", mesh.cancel, "Cancel a session", gives=mesh.CancelledSession),
    Route("GET", "/mesh/v1/sessions/{id}/story", mesh.story, "A session's events, collected from all peers", gives=Rows),
    Route(
        "GET",
        "/mesh/v1/sessions/{id}/trace",
        mesh.trace,
        "When each peer computed a session's steps, in Chrome's trace format",
        gives=dict[str, Any],
    ),
    Route("POST", "/mesh/v1/drain", mesh.drain, "Move running sessions away from a peer", mesh.DrainRequest, mesh.Drained),
    Route("POST", "/mesh/v1/migrate", mesh.migrate, "Move a session to another peer", mesh.MigrateRequest, mesh.Migrated),
    Route("POST", "/mesh/v1/invites", mesh.invite, "Invite a device by a short code", mesh.InviteRequest, streams=InviteStep),
    Route("GET", "/mesh/v1/invites", mesh.invites, "The open invite", gives=Rows),
    Route("DELETE", "/mesh/v1/invites", mesh.close_invites, "Close the open invite", gives=mesh.ClosedInvites),
    Route("POST", "/mesh/v1/reload", mesh.reload, "Read the settings again", gives=mesh.ReloadedSettings),
    Route("POST", "/mesh/v1/doctor", mesh.doctor, "Look for faults, and say how to mend them", DoctorRequest, streams=CheckStep),
    Route("GET", "/mesh/v1/key", cluster_key.show, "The cluster's key, without it, and the known peers", gives=dict[str, Any]),
    Route(
        "POST",
        "/mesh/v1/key",
        cluster_key.rotate,
        "Replace the cluster's key, and exclude the peers that the owner's rotation does not list",
        cluster_key.RotateRequest,
        dict[str, Any],
    ),
    Route(
        "POST",
        "/mesh/v1/key/owner",
        cluster_key.give_owner_key,
        "Copy the owner key, which the request contains, to another peer",
        cluster_key.OwnerRequest,
        cluster_key.OwnerGiven,
    ),
    Route("POST", "/mesh/v1/links/probe", mesh.probe_links, "Measure this peer's links", gives=Rows),
)
