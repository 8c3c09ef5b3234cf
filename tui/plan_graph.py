"""Draws a plan's DAG in text: its stages, and what each edge between them carries and takes, predicted beside measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from meshd.bounds import printable
from meshd.display import ABSENT, duration, size
from meshd.tui.cluster import ClusterState
from meshd.tui.rows import Row

_LEAST_WIDTH, _MOST_WIDTH = 44, 72
_EDGE = 8
"""Column of the edges, from the left side of the boxes."""


@dataclass(frozen=True, slots=True)
class StageBox:
    """One stage: a contiguous run of layers on one peer."""

    peer: str
    layers: str
    predicted_s: float | None
    measured_s: float | None = None
    steps_s: float | None = None
    memory: str = ""


@dataclass(frozen=True, slots=True)
class HopEdge:
    """The edge from one stage to the next one, or from the last one back to the first."""

    target: str
    predicted_bytes: float | None
    predicted_s: float | None
    measured_bytes: float | None = None
    link_s: float | None = None
    """Time of such a message by the link's present figures."""
    local: bool = False


@dataclass(frozen=True, slots=True)
class PlanGraph:
    """All of one plan."""

    title: str
    stages: Sequence[StageBox]
    hops: Sequence[HopEdge]
    """One for each stage; the last one returns the token."""
    totals: Sequence[tuple[str, float | None, float | None]] = ()
    """Name, predicted and measured seconds."""
    notes: Sequence[str] = ()


def of_session(cluster: ClusterState, plan: Row) -> PlanGraph:
    """Collect what is known of a running session's plan."""
    session = plan["session"]
    times = [cluster.steps.of(session, number, stage["peer"]) for number, stage in enumerate(plan["stages"])]
    stages = [
        StageBox(
            peer=stage["name"],
            layers=stage["layers"],
            predicted_s=stage["predicted_s"],
            measured_s=known.step_s if known else None,
            steps_s=known.steps_s if known else None,
        )
        for stage, known in zip(plan["stages"], times, strict=True)
    ]
    hops = [
        HopEdge(
            target=hop["target_name"],
            predicted_bytes=hop["bytes_per_token"],
            predicted_s=hop["predicted_s"],
            measured_bytes=known.sent_bytes if known and known.sent_bytes else None,
            link_s=_link_s(cluster, hop),
            local=hop["source"] == hop["target"],
        )
        for hop, known in zip(plan["hops"], times, strict=True)
    ]
    return PlanGraph(
        title=f"session {session[:8]}, {cluster.model_name(plan['model'])}, epoch {plan['epoch']}, context {plan['context']}",
        stages=stages,
        hops=hops,
        totals=_totals(plan, stages),
    )


def of_model(document: Mapping[str, Any]) -> PlanGraph:
    """Convert the answer of `POST /mesh/v1/plan`: what would be placed where."""
    memory = {row["peer"]: f"{size(row['used_bytes'])} of {size(row['capacity_bytes'])}" for row in document["memory"]}
    stages = [
        StageBox(peer=row["name"], layers=row["layers"], predicted_s=row["decode_s"], memory=memory.get(row["peer"], ""))
        for row in document["stages"]
    ]
    hops = [
        HopEdge(
            target=hop["target_name"],
            predicted_bytes=hop["bytes_per_token"],
            predicted_s=hop["decode_s"],
            local=hop["source"] == hop["target"],
        )
        for hop in document["hops"]
    ]
    predicted = document["predicted"]
    return PlanGraph(
        title=f"{document['model']}, context {document['context']}: what a new placement would be",
        stages=stages,
        hops=hops,
        totals=(("time to first token", predicted["ttft_s"], None), ("time per token", predicted["tpot_s"], None)),
        notes=tuple(document["text"][1:]),
    )


def _link_s(cluster: ClusterState, hop: Mapping[str, Any]) -> float | None:
    """Time of one token's message by the present figures of its link, or of the opposite direction."""
    link = cluster.link(hop["source"], hop["target"]) or cluster.link(hop["target"], hop["source"])
    if link is None or not link["bandwidth_bytes_s"]:
        return None
    return float((link["hop_s"] or link["rtt_s"] / 2) + (hop["bytes_per_token"] or 0) / link["bandwidth_bytes_s"])


def _totals(plan: Row, stages: Sequence[StageBox]) -> list[tuple[str, float | None, float | None]]:
    predicted_tpot, measured_tpot = plan["predicted_tpot_s"] or None, plan["measured_tpot_s"] or None
    predicted = _sum([stage.predicted_s for stage in stages])
    measured = _sum([stage.measured_s for stage in stages])
    return [
        ("time to first token", plan["predicted_ttft_s"] or None, plan["measured_ttft_s"]),
        ("time per token", predicted_tpot, measured_tpot),
        ("  on the stages", predicted, measured),
        ("  hops, queues, rest", _rest(predicted_tpot, predicted), _rest(measured_tpot, measured)),
    ]


def _sum(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None


def _rest(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else max(0.0, whole - part)


def draw(graph: PlanGraph, width: int, *, accent: str, strong: str) -> Text:
    """Draw a plan, `width` columns wide if that is enough. `accent` and `strong` are styles, for edges and for names."""
    inner = max(_LEAST_WIDTH, min(_MOST_WIDTH, width)) - 2
    drawn = Text(printable(graph.title) + "\n\n")
    for number, (stage, hop) in enumerate(zip(graph.stages, graph.hops, strict=True)):
        first, last = number == 0, number == len(graph.stages) - 1
        drawn.append_text(_box(stage, inner, first=first, last=last, accent=accent, strong=strong))
        drawn.append_text(_edge(hop, last=last, accent=accent))
    if graph.totals:
        drawn.append(f"\n{'times of one token':22}{'predicted':>12}{'measured':>12}\n", "dim")
        for name, predicted, measured in graph.totals:
            drawn.append(f"{name:22}{duration(predicted):>12}{duration(measured):>12}{_ratio(predicted, measured):>9}\n")
    for note in graph.notes:
        drawn.append(f"\n{printable(note)}")
    return drawn


def _box(stage: StageBox, inner: int, *, first: bool, last: bool, accent: str, strong: str) -> Text:
    what = " + ".join(part for part in ("embed" if first else "", f"layers {stage.layers}", "head" if last else "") if part)
    lines = [
        Text.assemble((printable(stage.peer), strong), f"  {what}"),
        Text(f"predicted {duration(stage.predicted_s)}, measured {duration(stage.measured_s)}"),
    ]
    if stage.steps_s is not None:
        lines.append(Text(f"{stage.steps_s:.1f} steps/s"))
    if stage.memory:
        lines[1] = Text(f"predicted {duration(stage.predicted_s)}")
        lines.append(Text(f"memory {stage.memory}"))
    box = Text("┌" + "─" * inner + "┐\n", accent)
    for line in lines:
        line.truncate(inner - 2, overflow="ellipsis", pad=True)
        box.append_text(Text.assemble(("│ ", accent), line, (" │\n", accent)))
    return box.append("└" + "─" * _EDGE + "┬" + "─" * (inner - _EDGE - 1) + "┘\n", accent)


def _edge(hop: HopEdge, *, last: bool, accent: str) -> Text:
    """Draw an edge, with its bytes and its times beside the line."""
    if hop.local:
        shown = "the token stays on this peer" if last else "on the same peer"
    else:
        measured = hop.measured_bytes
        carried = f"{_bytes(hop.predicted_bytes)}/token" + (f", sent {_bytes(measured)}" if measured is not None else "")
        times = f"predicted {duration(hop.predicted_s)}" + (f", link now {duration(hop.link_s)}" if hop.link_s is not None else "")
        shown = f"{carried}\n{times}"
    if last and not hop.local:
        shown = f"token back to {printable(hop.target)}\n{shown}"
    indent = " " * (_EDGE + 1)
    edge = Text()
    for line in shown.split("\n"):
        edge.append(f"{indent}│ ", accent).append(f"{line}\n", "")
    return edge.append(f"{indent}{'╵' if last else '▼'}\n", accent)


def _bytes(count: float | None) -> str:
    return ABSENT if count is None else f"{count:.0f} B" if count < 1e4 else size(count)


def _ratio(predicted: float | None, measured: float | None) -> str:
    return f"{100 * (measured / predicted - 1):+.0f} %" if predicted and measured else ""
