"""Whether the chosen model is right as often as it says, before and after the temperature."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.results.evidence import split_name
from lightning_automl.results.page import Section, Text, pictures
from lightning_automl.results.sections.wording import percent
from lightning_automl.results.strategy import StrategyRecord, finite


def calibration(record: StrategyRecord) -> Section | None:
    """Reliability with the temperature that is part of the model, and without."""
    evidence = record.evidence
    if evidence is None or evidence.judged is None:
        return None
    from lightning_automl.metrics import expected_calibration_error, reliability
    from lightning_automl.plots import reliability_diagram

    judged, split = evidence.judged, evidence.split
    temperature = finite(record.model.get("temperature") or record.evaluation.get("temperature"))
    table = reliability(judged.probabilities, judged.labels)
    after = expected_calibration_error(table)
    if not temperature > 0:
        text = f"On average its confidence is {percent(after)} off on {split_name(split)} (ECE, 15 bins)."
        return Section(
            f"Calibration ({split_name(split)})", [pictures(reliability=reliability_diagram(table)), Text(text)]
        )
    raw = reliability(without_temperature(judged.probabilities, temperature), judged.labels)
    before = expected_calibration_error(raw)
    drawn = pictures(reliability_before=reliability_diagram(raw), reliability=reliability_diagram(table))
    blocks: list[Any] = [replace(drawn, captions=["without the temperature", "with it, as the model is used"])]
    text = (
        f"The averaged logits are divided by the temperature {temperature:.2f}, fitted on validation, which changes no "
        f"answer. On {split_name(split)} its confidence was on average {percent(before)} off before, and is "
        f"{percent(after)} off after (ECE, 15 bins)."
    )
    if after > before:
        text += " On this split that is no improvement: few images, or validation is unlike it."
    return Section(f"Calibration ({split_name(split)})", [*blocks, Text(text)])


def without_temperature(probabilities: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """What the probabilities ``(images, classes)`` were before their logits were divided by the temperature."""
    logits = np.log(np.maximum(probabilities, 1e-38)) * temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))
