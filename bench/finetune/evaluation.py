"""A trained classifier's scores: GLUE's metrics, by scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Array = NDArray[np.float64]

# Each takes labels and the head's outputs, (examples, labels).
METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": lambda labels, outputs: float(accuracy_score(labels, outputs.argmax(1))),
    "f1": lambda labels, outputs: float(f1_score(labels, outputs.argmax(1))),
    "matthews": lambda labels, outputs: float(matthews_corrcoef(labels, outputs.argmax(1))),
    "pearson": lambda labels, outputs: float(pearsonr(labels, outputs[:, 0]).statistic),
    "spearman": lambda labels, outputs: float(spearmanr(labels, outputs[:, 0]).statistic),
}


def score_predictions(metrics: tuple[str, ...], labels: Array, outputs: Array) -> dict[str, float]:
    """Each metric; NaN where the outputs are not finite, as after a run that diverged.

    >>> score_predictions(("accuracy",), np.array([0, 1]), np.array([[2.0, 1.0], [0.0, 3.0]]))
    {'accuracy': 1.0}
    """
    if not np.isfinite(outputs).all():
        return dict.fromkeys(metrics, float("nan"))
    return {metric: METRICS[metric](labels, outputs) for metric in metrics}


def outcomes(labels: Array, outputs: Array) -> list[float]:
    """One number an example, from which its score and its loss follow without its label; to three decimals.

    Two classes: the right class's logit minus the other's; above 0 it is right, and its loss is log(1 + exp(−number)).
    A regression: output minus label.

    >>> outcomes(np.array([0, 1]), np.array([[2.0, 1.0], [3.0, 0.0]])), outcomes(np.array([1.5]), np.array([[1.25]]))
    ([1.0, -3.0], [-0.25])
    """
    margins = outputs[:, -1] - labels if outputs.shape[1] == 1 else (outputs[:, 1] - outputs[:, 0]) * (2 * labels - 1)
    return [round(float(value), 3) for value in margins]
