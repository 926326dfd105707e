"""Section about the adapter of a run: what it is, what it costs, and how large it is beside what it adapts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_automl.results.evidence import Evidence
from lightning_automl.results.page import Folded, Notes, Section, Table, Text, pictures
from lightning_automl.results.sections.wording import counted, percent, value_text
from lightning_automl.rundir import read_json

#: Names of methods by the type in their files.
METHODS = {"LORA": "LoRA", "IMAGE_LORA": "LoRA", "CONV_ADAPTER": "Conv-Adapter"}
_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "scale", "rank_pattern", "alpha_pattern")
_CONV_ADAPTER = (
    *("scheme", "kernel_size", "compression", "activation", "scale", "scale_per", "scale_init", "init"),
    *("norm", "norm_at"),
)
#: What was chosen, by method; of others everything is shown.
_SETTINGS = {"LoRA": _LORA, "Conv-Adapter": _CONV_ADAPTER}
#: What is told elsewhere on the page, or is no choice of anybody.
_LEFT_OUT = {
    *("peft_type", "target_modules", "modules_to_save", "auto_mapping", "base_model_name_or_path", "inference_mode"),
    *("peft_version", "revision", "task_type"),
}
#: Tables with more rows are folded.
_ROWS = 12


def adapters(evidence: Evidence) -> Section | None:
    """What is adapted by how many parameters, and whether adapters and their blocks are of comparable size."""
    directory = evidence.run.directory
    config = read_json(directory / "adapter" / "adapter_config.json")
    given = ((evidence.run.config.get("model") or {}).get("init_args") or {}).get("adapter")
    recorded = read_json(directory / "adapter_statistics.json")
    if config is None and recorded is None and not given:
        return None
    blocks: list[Any] = [Table(["", ""], _facts(evidence, config, given))]
    if recorded is None or not recorded["epochs"]:
        if config is not None:
            text = "How large the adapters are beside their blocks was not recorded: AdapterStatistics would do so."
            blocks.append(Text(text))
        return Section("Adapters", blocks)
    from lightning_automl.plots import adapter_outputs

    blocks.append(Text(_sizes(recorded["epochs"])))
    if recorded["warnings"]:
        blocks.append(Notes(recorded["warnings"]))
    table = _layers(recorded["epochs"])
    name = f"The {len(table.rows)} adapted layers"
    blocks += [pictures(adapters=adapter_outputs(recorded["epochs"]))]
    blocks += [table if len(table.rows) <= _ROWS else Folded(name, table)]
    return Section("Adapters", blocks)


def _facts(evidence: Evidence, config: Mapping[str, Any] | None, given: Any) -> list[list[Any]]:
    rows: list[list[Any]] = []
    if config is not None:
        kind = str(config.get("peft_type"))
        method = METHODS.get(kind, kind)
        rows += [["method", method], ["settings", _settings(config, _SETTINGS.get(method))]]
        targets = config.get("target_modules")
        if isinstance(targets, Sequence) and not isinstance(targets, str):
            rows.append(["adapted", f"{counted(len(targets), 'layer')}, from {targets[0]} to {targets[-1]}"])
        elif targets:
            rows.append(["adapted", str(targets)])
        if config.get("modules_to_save"):
            rows.append(["trained and saved in full", ", ".join(config["modules_to_save"])])
    elif isinstance(given, Mapping):
        rows.append(["method", str(given.get("class_path", "")).rpartition(".")[2]])
        rows.append(["settings", _settings(given.get("init_args") or {}, None)])
    network = evidence.run.environment.get("network", {})
    if network.get("trained_parameters"):
        share = f"{network['trained_parameters']:,} of {network['parameters']:,} ({percent(network['trained_share'])})"
        rows.append(["parameters that are trained", share])
    folder = evidence.run.directory / "adapter"
    if config is not None:
        size = sum(path.stat().st_size for path in folder.iterdir())
        rows.append(["files of the best epoch", f"adapter/, {size / 1e6:.2f} MB"])
        rows.append(["for the base network with digest", _base_digest(folder / "adapter_model.safetensors")])
    return rows


def _settings(config: Mapping[str, Any], names: Sequence[str] | None) -> str:
    chosen = {name: config.get(name) for name in names or config if name not in _LEFT_OUT}
    return ", ".join(f"{name} {value_text(value)}" for name, value in chosen.items() if value)


def _base_digest(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return str((file.metadata() or {}).get("base_digest", "unknown"))


def _sizes(epochs: Sequence[Mapping[str, Any]]) -> str:
    first, last = epochs[0], epochs[-1]
    known = {each["layer"]: each["ratio"] for each in last["layers"] if _is_finite(each["ratio"])}
    if not known:
        return f"After epoch {last['epoch'] + 1} the outputs of blocks or adapters are not finite."
    smallest, largest = min(known, key=lambda name: known[name]), max(known, key=lambda name: known[name])
    text = (
        f"After epoch {last['epoch'] + 1} the standard deviation of what an adapter adds is between "
        f"{known[smallest]:.2g} ({smallest}) and {known[largest]:.2g} ({largest}) times that of its "
        "block's output"
    )
    before = [each["ratio"] for each in first["layers"] if _is_finite(each["ratio"])]
    if len(epochs) > 1 and before:
        text += f"; after epoch {first['epoch'] + 1} it was between {min(before):.2g} and {max(before):.2g} times"
    return f"{text}."


def _layers(epochs: Sequence[Mapping[str, Any]]) -> Table:
    first = {each["layer"]: each for each in epochs[0]["layers"]}
    head = ["layer", "kind", f"ratio, epoch {epochs[-1]['epoch'] + 1}"]
    if len(epochs) > 1:
        head.append(f"ratio, epoch {epochs[0]['epoch'] + 1}")
    head += ["scale", "zeros of the block", "skewness of block", "of adapter", "gradient norm"]
    rows = []
    for layer in epochs[-1]["layers"]:
        row = [layer["layer"], layer["kind"], _shown(layer["ratio"])]
        if len(epochs) > 1:
            row.append(_shown(first.get(layer["layer"], {}).get("ratio")))
        block, adapter = layer["block"], layer["adapter"]
        row += [_shown(layer["scale"]), percent(block["zero_fraction"]), _shown(block["skewness"])]
        rows.append([*row, _shown(adapter["skewness"]), _shown(layer["gradient_norm"])])
    return Table(head, rows)


def _shown(value: float | None) -> str:
    return f"{value:.3g}" if _is_finite(value) else ""


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
