"""Section about what ``export --compress`` has made of a network."""

from collections.abc import Mapping
from typing import Any

from lightning_automl.results.evidence import Evidence
from lightning_automl.results.page import Folded, Section, Table, Text
from lightning_automl.results.sections.wording import counted, number, percent
from lightning_automl.rundir import read_json

_NAMES = {"before": "as trained", "after": "compressed", "finetuned": "compressed and fine-tuned"}


def compression(evidence: Evidence) -> Section | None:
    """What the newest compressed file costs in accuracy on the validation split, and what it saves."""
    record = read_json(evidence.run.directory / "compression.json")
    if record is None:
        return None
    rows = []
    for name, accuracy in record["accuracy"].items():
        size = "before" if name == "before" else "after"
        lost = record["lost"].get(name)
        rows.append(
            [
                _NAMES[name] + (" (exported)" if name == record["exported"] else ""),
                percent(accuracy),
                "" if lost is None else f"{_points(-lost[0])} ({_points(-lost[2])} to {_points(-lost[1])})",
                number(record["loss"][name]),
                f"{record['parameters'][size]:,}",
                f"{record['flops'][size] / 1e6:,.1f} million",
            ]
        )
    head = ["network", "accuracy", "change in points (95 % interval)", "loss", "parameters", "operations an image"]
    layers = [
        [
            layer["name"],
            " x ".join(map(str, layer["shape"])),
            f"{layer['rank']} of {layer['full_rank']}" if layer["rank"] else "unchanged",
            percent(layer["energy"]),
            f"{layer['parameters'][0]:,} to {layer['parameters'][1]:,}" if layer["rank"] else layer["reason"],
        ]
        for layer in record["layers"]
    ]
    table = Table(["layer", "weight", "rank", "energy kept", "parameters"], layers)
    done = sum(layer["rank"] is not None for layer in record["layers"])
    text = f"{counted(done, 'layer')} of {len(layers)} factorised, {_asked(record['asked'])}; in {record['file']}."
    return Section("Compression by low rank", [Table(head, rows), Text(_judged(record)), Folded(text, table)])


def _points(difference: float) -> str:
    return f"{100 * difference + 0.0:+.1f}"


def _asked(asked: Mapping[str, Any]) -> str:
    if asked["flops"] is not None:
        choice = f"within {percent(asked['flops'])} of the operations"
    else:
        choice = f"keeping {percent(asked['energy'])} of the energy of each"
    return f"{choice}, in the {asked['form']} form"


def _judged(record: Mapping[str, Any]) -> str:
    text = f"All are judged on the {counted(record['images'], 'validation image')}; the test split was not opened."
    if record["exported"] == "finetuned":
        text += " Fine-tuning was kept because of these same images, which flatters it a little."
    elif "finetuned" in record["accuracy"]:
        text += " Fine-tuning did not help on these images, and the file has the weights from before it."
    return text
