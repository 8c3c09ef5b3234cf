"""Compares the steps that this peer computes with their predictions, so that later predictions are right.

The prediction of a step is that of the planner for this peer without corrections, so that its ratio to the measured time is the
correction. A pass with several steps is predicted as the longest of them and what the others add.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from meshd.agents.placement.resident import ResidentLayers
from meshd.agents.stage.flow.events import StageStep
from meshd.clock import Clock
from meshd.planner.model import cost
from meshd.planner.model.learn import Phase, StepLearner
from meshd.planner.profile import PREFILL_CHUNK_TOKENS, PeerProfile, context_class, prefill_class
from meshd.protocol.messages import StepKind
from meshd.types import LayerRange, LearnedRates, PeerId, Rates


@dataclass(slots=True)
class StepLearning:
    """Learns from the steps of all stages on this peer."""

    me: PeerId
    rates: Rates
    """As the device probe measured them. They count where layers have no measured times of their own."""
    clock: Clock
    _learner: StepLearner = field(default_factory=StepLearner)

    def learned(self) -> LearnedRates:
        """Returns: what this peer advertises at present."""
        return self._learner.learned(self.clock.monotonic())

    def observe(
        self, resident: ResidentLayers, layers: LayerRange, steps: Sequence[StageStep], compute_s: float, whole_s: float
    ) -> float:
        """Add one pass with steps of `layers`.

        A pass reads the weights once, for the step that alone would take longest. The factor of such a step is learned from passes
        with one step. What its other steps add has a factor of its own: it depends on the processor's arithmetic.

        `compute_s`: time of its computation. `whole_s`: time from its submission to the compute thread until its outputs were sent.

        Returns: the predicted time of its computation, with the corrections learned before.
        """
        now = self.clock.monotonic()
        longest = max(steps, key=lambda step: self._corrected_s(resident, layers, step, now))
        longest_s = self._corrected_s(resident, layers, longest, now)
        others_s = sum(self._further_s(resident, layers, step) for step in steps if step is not longest)
        if not longest.prefill:  # a verify step has further rows of its own
            others_s += self._further_s(resident, layers, longest) * (1 - 1 / longest.tokens)
        if others_s:
            corrected_s = longest_s + others_s * self._learner.rows_factor(now)
            self._learner.observe_rows(compute_s - longest_s, others_s, now)
            return corrected_s
        if not longest.prefill:
            self._learner.observe_overhead(whole_s - compute_s, now)
        self._learner.observe(*_class_of(longest), compute_s, self._predicted_s(resident, layers, longest), now)
        return longest_s

    def pass_s(self, resident: ResidentLayers, layers: LayerRange, decodes: int, position: int) -> float:
        """Predict the seconds of a pass with `decodes` decode steps, at least 1, all at `position`."""
        now, step = self.clock.monotonic(), StageStep(position, 1, StepKind.DECODE, sample=1)
        further_s = self._further_s(resident, layers, step) * self._learner.rows_factor(now)
        return self._corrected_s(resident, layers, step, now) + (decodes - 1) * further_s

    def prompt_s(self, resident: ResidentLayers, layers: LayerRange, start: int) -> tuple[float, float]:
        """Predict the seconds that a chunk at position `start` adds to a pass: to read the KV before it, and for each token."""
        factor = self._learner.rows_factor(self.clock.monotonic())
        chunk = StageStep(start, PREFILL_CHUNK_TOKENS, StepKind.PREFILL)
        read_s = self._read_s(resident, layers, start)
        return factor * read_s, factor * (self._further_s(resident, layers, chunk) - read_s) / chunk.tokens

    def _corrected_s(self, resident: ResidentLayers, layers: LayerRange, step: StageStep, now: float) -> float:
        """Predict the compute time of a step that is alone in its pass, with the corrections learned before."""
        return self._predicted_s(resident, layers, step) * self._learner.factor(*_class_of(step), now)

    def _further_s(self, resident: ResidentLayers, layers: LayerRange, step: StageStep) -> float:
        """Predict, without corrections, what a step adds to a pass that reads the weights anyway: its arithmetic and attention."""
        card, profile = resident.card, self._profile(resident)
        run = slice(layers.start, layers.end)
        head_s = 2 * step.sample * card.head_parameters / self.rates.prefill_flops_s if layers.end == card.spec.layers else 0.0
        if step.prefill:
            chunk_s = float(cost.layer_prefill_s(profile, card, step.tokens, step.start)[run].sum())
            return chunk_s + self._read_s(resident, layers, step.start) + head_s
        # A row costs what it costs in a chunk of the usual length, where the time of the weights is shared by all of the rows.
        token_s = float(cost.layer_prefill_s(profile, card, PREFILL_CHUNK_TOKENS, 0)[run].sum()) / PREFILL_CHUNK_TOKENS
        return step.tokens * (token_s + self._read_s(resident, layers, step.start)) + head_s

    def _read_s(self, resident: ResidentLayers, layers: LayerRange, positions: int) -> float:
        """Predict, without corrections, the attention of one token: the time to read the KV. A short chunk reads it, too."""
        token_layer_bytes = resident.card.kv_bytes_per_token_layer()
        return len(layers) * cost.attention_decode_s(self._profile(resident), positions, token_layer_bytes)

    def _profile(self, resident: ResidentLayers) -> PeerProfile:
        return PeerProfile(id=self.me, name="", rates=self.rates, memory_free_bytes=0, holdings=(resident.holding(),))

    def _predicted_s(self, resident: ResidentLayers, layers: LayerRange, step: StageStep) -> float:
        """Predict the compute time of a step by the formulas of the planner, without corrections."""
        card, profile = resident.card, self._profile(resident)
        head_s = cost.head_s(profile, card) if step.sample and layers.end == card.spec.layers else 0.0
        run = slice(layers.start, layers.end)
        if step.prefill:
            return float(cost.layer_prefill_s(profile, card, step.tokens, step.start)[run].sum()) + head_s
        return float(cost.layer_decode_s(profile, card)[run].sum()) + self._read_s(resident, layers, step.start) + head_s


def _class_of(step: StageStep) -> tuple[Phase, int]:
    """Return the class of steps for which a factor is learned."""
    if step.prefill:
        return "prefill", prefill_class(step.start, is_whole=step.start == 0 and bool(step.sample))
    return "decode", context_class(step.start)
