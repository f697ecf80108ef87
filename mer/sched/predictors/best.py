"""Scores of predictors, and the choice of the better one for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from mer.errors import ConfigError
from mer.sched.predict import Prediction, Predictor, distance

_SPAN: Final = 64  # events over which the skill in a layer is averaged


@attrs.frozen(kw_only=True)
class PredictionScore:
    """Score of predictions; only events that something had been asked about count."""

    predicted: int  # experts
    right: int  # those of them that were used
    used: int  # experts of these events

    @property
    def precision(self) -> float:
        """Share of the predicted experts that were used; 0 without any."""
        return self.right / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the used experts that were predicted; 0 without any."""
        return self.right / self.used if self.used else 0.0


class ScoredPredictor:
    """A predictor whose predictions are held against what comes.

    Its skill in a layer is by how much its probabilities p lower the squared error against predicting nothing, on
    average per event: 2 p - p**2 for an expert that is used, -p**2 for another. It grows with recall, with precision,
    and with the honesty of the probabilities: who claims more than comes true loses (Brier 1950).
    """

    def __init__(self, predictor: Predictor, n_layers: int) -> None:
        self.predictor = predictor
        self.name = predictor.name
        self._n_layers = n_layers
        self._last: int | None = None
        self._skills = [0.0] * n_layers
        self._scored = [0] * n_layers
        self._pending: dict[int, list[Prediction]] = {}  # {layer: latest prediction of its next visit}
        self._predicted, self._right, self._used = [0] * n_layers, [0] * n_layers, [0] * n_layers

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """See `Predictor`."""
        if self._last is not None and layer != (self._last + 1) % self._n_layers:
            self._pending.clear()  # the pass that they were made in has ended early
        self._last = layer
        predictions = self._pending.pop(layer, None)
        if predictions is not None:
            used = set(experts)
            skill, right = 0.0, 0
            for (_, expert), probability in predictions:
                skill -= probability * probability
                if expert in used:
                    skill += 2.0 * probability
                    right += 1
            self._scored[layer] += 1
            self._skills[layer] += (skill - self._skills[layer]) / min(_SPAN, self._scored[layer])
            self._predicted[layer] += len(predictions)
            self._right[layer] += right
            self._used[layer] += len(experts)
        self.predictor.observe(layer, experts)

    def predict(self, layer: int) -> list[Prediction]:
        """See `Predictor`; the last answer before a layer's event is the one that counts."""
        predictions = self.predictor.predict(layer)
        if distance(layer, self._last, self._n_layers):
            self._pending[layer] = predictions
        return predictions

    def skill(self, layer: int) -> float:
        """Return the skill in a layer over its last events, 0 at first."""
        return self._skills[layer]

    def score(self, layer: int | None = None) -> PredictionScore:
        """Return the score in a layer, or in all of them."""
        of = slice(None) if layer is None else slice(layer, layer + 1)
        return PredictionScore(predicted=sum(self._predicted[of]), right=sum(self._right[of]), used=sum(self._used[of]))


class BestPredictor:
    """Predicts what the predictor says that has been the best in the layer; all of them learn all the time.

    Args:
        predictors: in order of preference among equals.
        n_layers: L.

    Raises:
        ConfigError: there are none.
    """

    name = "best"

    def __init__(self, predictors: Sequence[Predictor], n_layers: int) -> None:
        if not predictors:
            raise ConfigError("the best of no predictors cannot be chosen; give at least one")
        self.predictors = tuple(ScoredPredictor(predictor, n_layers) for predictor in predictors)

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """See `Predictor`."""
        for predictor in self.predictors:
            predictor.observe(layer, experts)

    def predict(self, layer: int) -> list[Prediction]:
        """See `Predictor`; of those that predict anything, the one with the highest skill in the layer is heard."""
        answers = [(predictor.skill(layer), predictor.predict(layer)) for predictor in self.predictors]
        return max(answers, key=lambda answer: (bool(answer[1]), answer[0]))[1]

    def choice(self, layer: int) -> str:
        """Return the name of the predictor with the highest skill in a layer."""
        return max(self.predictors, key=lambda predictor: predictor.skill(layer)).name
