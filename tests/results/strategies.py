"""Directories as `auto` leaves them, in every stage, for tests of their page. Nothing is trained for them."""

import functools

import numpy as np
import yaml
from safetensors.numpy import save_file

from lightning_automl.augment import TrivialAugment, load_space, save_policy
from lightning_automl.callbacks.records import split_digest, write_data_record
from lightning_automl.data import ArraysDataModule
from lightning_automl.rundir import write_json

#: What is there after each, in the order of the command.
STAGES = ("config", "look", "measured", "plan", "selecting", "selected", "compared", "finals", "finished")
COUNTS = {"train": (90, 30), "val": (30, 10), "test": (48, 16)}
SIMPLE, SEARCHED = "resnet-0000000a", "resnet-0000000d"
TITLES = {"resnet": "ResNet-20 from scratch", "cnn": "small CNN from scratch", "densenet": "DenseNet-40 from scratch"}
BACKBONE = "the pretrained network is not installed: pip install lightning-automl[pretrained]"
NAMES = {2: ["benign", "malignant"], 3: ["benign", "malignant", "other"]}


def at_least(stage, wanted):
    return STAGES.index(stage) >= STAGES.index(wanted)


def write_strategy(directory, stage="finished", *, classes=2, seeds=3, **keys):
    """Write the directory of a command that has come so far.

    Args:
        directory: Where; it is made, with the images beside it.
        stage: What was done last.
        classes: 2 or 3.
        seeds: Final trainings of the chosen model.
        keys: By name of a file, what replaces keys of its content.
    """
    directory.mkdir(parents=True)
    data = write_images(directory.parent / f"images-{classes}.npz", classes)
    metric = "val_auroc" if classes == 2 else "val_balanced_accuracy"
    write = functools.partial(_write, directory, keys)
    write(
        "config",
        auto=str(data),
        budget=1800.0,
        modality="radiograph",
        metric=None,
        image_size=None,
        folds=None,
        backbone=None,
        weights=None,
        seed=0,
        workers=2,
    )
    spent = {name: seconds for name, (seconds, since) in SECONDS.items() if at_least(stage, since)}
    write("progress", seconds=sum(spent.values()), stages=spent, cuts={})
    if at_least(stage, "look"):
        write("look", **_look(data, classes))
        write("environment", versions={"python": "3.12", "torch": "2.9"}, seed=0, commit="0" * 12, hardware=HARDWARE)
    if at_least(stage, "measured"):
        write("measured", **_measured())
    if at_least(stage, "plan"):
        write("plan", **_plan(metric, seeds))
    if at_least(stage, "selecting"):
        candidates = _candidates()[: None if at_least(stage, "selected") else 3]
        write(
            "selection",
            metric=metric,
            direction="maximize",
            candidates=candidates,
            simple=SIMPLE,
            searched=SEARCHED,
            leaders=[SEARCHED, SIMPLE],
            cut=None,
        )
    if at_least(stage, "compared"):
        write("comparison", **comparison(metric))
    if at_least(stage, "finals"):
        for seed in range(seeds):
            _final(directory, SIMPLE, seed, data)
    if stage == "finished":
        _finished(directory, write, data, metric, classes, seeds)
    return directory


def _write(directory, keys, name, **content):
    content |= keys.get(name) or {}
    if name == "config":
        (directory / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    elif keys.get(name, ()) is not None:
        write_json(directory / f"{name}.json", content)


#: Of each stage, and since when it has begun.
SECONDS = {
    "look": (3.25, "look"),
    "measure": (14.0, "measured"),
    "plan": (0.125, "plan"),
    "selection": (610.0, "selecting"),
    "comparison": (480.0, "compared"),
    "final": (420.0, "finals"),
    "evaluation": (20.0, "finished"),
}
HARDWARE = {"cpu": "a processor", "cores": 2, "memory": 2**33, "gpus": []}


def write_images(path, classes):
    """Grey noise with a bright disc; the class says where it is."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, counts in COUNTS.items():
        labels = np.repeat(np.arange(classes), [*counts, counts[1]][:classes])
        images = generator.normal(80, 25, (len(labels), 28, 28))
        down, across = np.mgrid[:28, :28]
        for image, label in zip(images, labels, strict=True):
            place = 8 + 6 * label + generator.integers(-2, 3, 2)
            image[(down - place[0]) ** 2 + (across - place[1]) ** 2 < 20] += 90
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8), f"{split}_labels": labels}
    np.savez(path, **arrays)
    return path


def _data(path):
    return {"class_path": "lightning_automl.data.ArraysDataModule", "init_args": {"path": str(path)}}


def _look(data, classes):
    counts = {split: [*each, each[1]][:classes] for split, each in COUNTS.items()}
    return {
        "data": _data(data),
        "images": sum(map(sum, counts.values())),
        "counts": counts,
        "class_names": NAMES[classes],
        "channels": 1,
        "image_size": [28, 28],
        "sizes": {"smallest": [28, 28], "median": [28, 28], "largest": [28, 28]},
        "units": [a + b for a, b in zip(counts["train"], counts["val"], strict=True)],
        "unit": "image",
        "groups": None,
        "official_splits": ["train", "val", "test"],
        "imbalance": 3.0,
        "folds": 5,
        "search_folds": [0, 1, 2],
        "comparison_folds": [3, 4],
        "broken": [],
        "exact_duplicates": [["a.png", "b.png"]],
        "exact_duplicate_count": 1,
        "near_duplicates": [],
        "near_duplicate_count": 0,
        "modality": "radiograph",
        "space": load_space("radiograph").to_dict(),
        "flips": False,
        "notes": ["Of the class 'malignant' there are 3 times fewer images than of 'benign'."],
        "digest": "0" * 32,
    }


def _measured():
    each = {"epoch_seconds": 1.4, "overhead_seconds": 2.0, "parameters": 272_000, "test_image_seconds": 0.001}
    arms = {"resnet": each, "cnn": each | {"epoch_seconds": 0.6}, "densenet": each | {"epoch_seconds": 3.0}}
    return {
        "workers": 2,
        "threads": 1,
        "device": "cpu",
        "server_seconds": 4.0,
        "arms": arms,
        "not_run": {"head": BACKBONE, "lora": BACKBONE},
    }


def _plan(metric, seeds):
    arms = [
        {"name": name, "title": title, "epochs": 30, "run_seconds": 40.0, "policies": ["none", "trivial_augment"]}
        for name, title in TITLES.items()
    ]
    not_run = [
        {"name": "head", "title": "pretrained, head only", "why": BACKBONE},
        {"name": "lora", "title": "pretrained, LoRA", "why": BACKBONE},
    ]
    stages = {"selection": 640.0, "comparison": 470.0, "final": 400.0, "evaluation": 20.0}
    return {
        "version": 1,
        "budget": 1800.0,
        "spent": 17.0,
        "available": 3500.0,
        "metric": metric,
        "direction": "maximize",
        "folds": 5,
        "search_folds": [0, 1, 2],
        "comparison_folds": [3, 4],
        "arms": arms,
        "not_run": not_run,
        "generations": [4, 2],
        "reduction": 3,
        "patience": 1,
        "policy_search": None,
        "architecture_search": None,
        "comparison": {"seeds": 2},
        "final": {"seeds": seeds},
        "why_not": {
            "policy_search": "it would take 40 minutes of the 30",
            "architecture_search": "120 train images; a search needs 1,000",
        },
        "stages": [{"name": name, "seconds": each} for name, each in stages.items()],
        "sentences": ["Three arms compete on 3 folds.", "The best is trained with 3 seeds and averaged."],
    }


def candidate(number, key, folds, **keys):
    values = list(folds.values())
    mean = float(np.mean(values)) if values else None
    state = "COMPLETE" if len(folds) == 3 else "PRUNED" if folds else "FAIL"
    reach = 0.05 if len(folds) > 1 else None
    policy = {"trivial_augment": "TrivialAugment"}.get(keys.get("policy"), "no policy")
    title = f"{TITLES[key.partition('-')[0]]}, {policy}{', tuned' * bool(keys.get('values'))}"
    return {
        "number": number,
        "key": key,
        "title": title,
        "arm": key.partition("-")[0],
        "policy": "none",
        "values": {},
        "default": True,
        "state": state,
        "reason": "" if state == "COMPLETE" else "behind after 1 fold" if folds else "the loss is not finite",
        "folds": {str(fold): value for fold, value in folds.items()},
        "mean": mean,
        "low": mean - reach if reach else None,
        "high": mean + reach if reach else None,
        "seconds": 40.0 * len(folds),
        "epochs": 30 * len(folds),
        "generation": 0,
    } | keys


def _candidates():
    tuned = {"values": {"lr": 0.003123, "depth": 20, "label_smoothing": 0.1}, "default": False, "generation": 1}
    return [
        candidate(0, SIMPLE, {0: 0.91, 1: 0.90, 2: 0.92}, policy="trivial_augment"),
        candidate(1, "resnet-0000000b", {0: 0.88, 1: 0.89, 2: 0.87}),
        candidate(2, "cnn-0000000c", {0: 0.80}),
        candidate(3, SEARCHED, {0: 0.92, 1: 0.91, 2: 0.92}, policy="trivial_augment", **tuned),
        candidate(4, "densenet-0000000e", {}),
    ]


def comparison(metric="val_auroc", difference=0.004, reach=0.02, **keys):
    """The record of a paired comparison; by default it is not told apart from chance."""
    low, high = difference - reach, difference + reach
    values = {"simple": [], "searched": []}
    for fold in (3, 4):
        for seed in (1000, 1001):
            base = 0.9 + 0.01 * (fold - 3) - 0.004 * (seed - 1000)
            values["simple"].append({"fold": fold, "seed": seed, "value": base})
            values["searched"].append({"fold": fold, "seed": seed, "value": base + difference})
    return {
        "metric": metric,
        "direction": "maximize",
        "simple": SIMPLE,
        "searched": SEARCHED,
        "kind": "hyper-parameters",
        "values": values,
        "difference": difference,
        "low": low,
        "high": high,
        "p_value": 0.4 if low < 0 < high else 0.01,
        "better": low > 0,
        "adopted": "searched" if low > 0 else "simple",
        "sentence": "as the command says it",
    } | keys


def _final(directory, key, seed, data):
    """The run directory of a final training."""
    place = directory / "runs" / key / f"final-seed-{seed}"
    place.mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "model": {"class_path": "ClassificationTask", "init_args": {"model": {"class_path": "ResNet"}}},
        "data": _data(data),
        "trainer": {"max_epochs": 3},
        "monitor": "val_auroc",
        "test_after_fit": False,
    }
    config["data"]["init_args"] |= {"train_policy": str(directory / "policies/trivial_augment.json")}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        f"{epoch},{1 / (1 + epoch + seed)},{1.1 / (1 + epoch + seed)},{0.8 + 0.04 * epoch - 0.01 * seed},2.0"
        for epoch in range(3)
    ]
    (place / "metrics.csv").write_text("\n".join(["epoch,train_loss,val_loss,val_auroc,seconds", *rows]) + "\n")
    write_json(place / "environment.json", {"network": {"class": "ResNet", "parameters": 272_000}})
    write_json(place / "summary.json", {"command": "fit", "status": "finished", "metrics": {}, "seconds": 40.0})
    write_json(directory / "runs" / key / "candidate.json", {"title": f"{TITLES['resnet']}, TrivialAugment"})


def predictions(data, split, seed=0, strength=1.6):
    """Probabilities that know something of the labels."""
    rows = data.split_rows[split]
    labels = data.contents.labels[rows]
    generator = np.random.default_rng([seed, len(split)])
    logits = generator.normal(0, 1, (len(labels), data.num_classes))
    logits[np.arange(len(labels)), labels] += strength
    powers = np.exp(logits)
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32), labels, rows


def _finished(directory, write, path, metric, classes, seeds):
    from lightning_automl.metrics import SCORES

    data = ArraysDataModule(str(path))
    data.class_names = NAMES[classes]
    write_data_record(directory / "data.json", data)
    names = ("balanced_accuracy", "auroc", "accuracy")
    found = {}
    for split in ("val", "test"):
        probabilities, labels, rows = predictions(data, split)
        tensors = {"probabilities": probabilities, "labels": labels.astype(np.int64), "rows": rows.astype(np.int64)}
        save_file(tensors, directory / f"predictions_{split}.safetensors", {"split": split_digest(data, split)})
        found[split] = {name: float(SCORES[name](probabilities.astype(np.float64), labels)) for name in names}
    each = [
        {
            "seed": seed,
            "directory": f"runs/{SIMPLE}/final-seed-{seed}",
            "val": {name: value - 0.01 * seed for name, value in found["val"].items()},
            "test": {name: value - 0.01 * seed for name, value in found["test"].items()},
            "seconds": 40.0,
            "epochs": 3,
        }
        for seed in range(seeds)
    ]
    kind = "predictions" if seeds > 1 else "single"
    title = f"{TITLES['resnet']}, TrivialAugment"
    write(
        "model",
        version=1,
        members=[one["directory"] for one in each],
        average=kind,
        temperature=1.3,
        threshold=0.42 if classes == 2 else None,
        unsure_below=0.6,
        class_names=NAMES[classes],
        channels=1,
        image_size=[28, 28],
        window=None,
    )
    write(
        "evaluation",
        metric=metric,
        models={"chosen": {"key": SIMPLE, "title": title, "seeds": each, **found}, "simple": None},
        averaging={
            "kind": kind,
            "values": {"predictions": 0.91, "weights": None, "single": 0.9},
            "why": "it is better",
        },
        temperature=1.3,
        calibration={"val_before": 0.1, "val_after": 0.05, "test_before": 0.12, "test_after": 0.08},
        threshold=0.42 if classes == 2 else None,
        at_threshold=None,
        unsure={"below": 0.6},
        comparison=None,
        opened=1,
    )
    generator = np.random.default_rng(0)
    _, labels, rows = predictions(data, "val")
    shown = np.arange(0, len(rows), 7)[:6]
    down, across = np.mgrid[:28, :28]
    maps = np.stack(
        [np.exp(-((down - p) ** 2 + (across - p) ** 2) / 40) for p in generator.integers(8, 20, len(shown))]
    )
    save_file(
        {
            "maps": maps.astype(np.float32),
            "images": data.read(rows[shown]),
            "rows": rows[shown].astype(np.int64),
            "labels": labels[shown].astype(np.int64),
            "predicted": (labels[shown] + (shown == 7)) % classes,
        },
        directory / "activations.safetensors",
    )
    (directory / "policies").mkdir()
    save_policy(TrivialAugment("radiograph"), directory / "policies/trivial_augment.json")
    save_policy(TrivialAugment("radiograph"), directory / "policy.json")
    metrics = {f"{split}_{name}": value for split, own in found.items() for name, value in own.items()}
    write("summary", command="auto", status="finished", metrics=metrics, seconds=1650.0, artefacts={}, test_opened=1)
