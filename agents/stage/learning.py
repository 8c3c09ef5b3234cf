"""Compares the steps that this peer computes with their predictions, so that later predictions are right.

The prediction of a step is that of the planner for this peer without corrections, so that its ratio to the measured time is the
correction.
"""

from dataclasses import dataclass, field

from meshd.agents.placement.resident import ResidentLayers
from meshd.agents.stage.session import Step
from meshd.clock import Clock
from meshd.planner.model import cost
from meshd.planner.model.learn import Phase, StepLearner
from meshd.planner.profile import PeerProfile, context_class, prefill_class
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

    def observe(self, resident: ResidentLayers, layers: LayerRange, step: Step, compute_s: float, whole_s: float) -> float:
        """Add one step of `layers`.

        `compute_s`: time of its computation. `whole_s`: time from its submission to the compute thread until its output was sent.

        Returns: the predicted time of its computation, with the corrections learned before.
        """
        now = self.clock.monotonic()
        predicted_s = self._predicted_s(resident, layers, step)
        phase: Phase = "prefill" if step.prefill else "decode"
        if step.prefill:
            place = prefill_class(step.position, is_whole=step.position == 0 and step.sample)
        else:
            place = context_class(step.position)
            self._learner.observe_overhead(whole_s - compute_s, now)
        corrected_s = predicted_s * self._learner.factor(phase, place, now)
        self._learner.observe(phase, place, compute_s, predicted_s, now)
        return corrected_s

    def _predicted_s(self, resident: ResidentLayers, layers: LayerRange, step: Step) -> float:
        """Predict the compute time of a step by the formulas of the planner, without corrections."""
        card = resident.card
        profile = PeerProfile(id=self.me, name="", rates=self.rates, memory_free_bytes=0, holdings=(resident.holding(),))
        head_s = cost.head_s(profile, card) if step.sample and layers.end == card.spec.layers else 0.0
        run = slice(layers.start, layers.end)
        if step.prefill:
            return float(cost.layer_prefill_s(profile, card, step.tokens, step.position)[run].sum()) + head_s
        attention_s = cost.attention_decode_s(profile, step.position, card.kv_bytes_per_token_layer())
        return float(cost.layer_decode_s(profile, card)[run].sum()) + len(layers) * attention_s + head_s
