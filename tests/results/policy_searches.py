"""Directories as a policy search leaves them, for tests of its page and its pictures."""

import json
import shutil

import numpy as np
import yaml

from lightning_automl.augment import Identity, Policy, TrivialAugment, load_space, save_policy
from lightning_automl.rundir import write_json

RUN = {
    "model": {"class_path": "ClassificationTask"},
    "data": {"class_path": "DigitsDataModule", "init_args": {"base_augment": "crop"}},
    "trainer": {"max_epochs": 4},
}
#: What most of these policies are made of.
FAVOURED = ("rotate", "contrast", "sharpness", "cutout")


def sub_policies(generator, operations, count=5, length=2):
    """Drawn as a search would."""
    chosen = [*operations, *[name for name in FAVOURED if name in operations] * 4]
    return [
        [
            {
                "operation": str(generator.choice(chosen)),
                "probability": round(float(generator.random()), 4),
                "magnitude": round(float(generator.random()) ** 2, 4),
            }
            for _ in range(length)
        ]
        for _ in range(count)
    ]


def acceptance(differences=(0.004, -0.006), reach=0.012, direction="maximize", metric="val_accuracy", seeds=3):
    """The record of a comparison: differences of the searched policy from no policy and from TrivialAugment."""
    generator = np.random.default_rng(1)
    sign = 1 if direction == "maximize" else -1
    base = 0.95 if direction == "maximize" else 0.2
    means = {"none": base - differences[0], "trivial_augment": base - differences[1], "searched": base}
    arms = {}
    for name, mean in means.items():
        noise = generator.normal(0, 0.008, (2, seeds))
        noise -= noise.mean()
        values = [
            {"fold": fold, "seed": seed, "value": mean + 0.005 * (2 * fold - 1) + float(noise[fold, seed])}
            for fold in range(2)
            for seed in range(seeds)
        ]
        arms[name] = {"values": values, "mean": mean, "low": mean - 0.008, "high": mean + 0.008}
    comparisons = [
        {
            "against": name,
            "difference": difference,
            "low": difference - reach,
            "high": difference + reach,
            "p_value": 0.2,
            "better": sign * difference - reach > 0,
        }
        for name, difference in zip(("none", "trivial_augment"), differences, strict=True)
    ]
    adopted = "searched" if all(each["better"] for each in comparisons) else "trivial_augment"
    if adopted != "searched" and sign * means["none"] >= sign * means["trivial_augment"]:
        adopted = "none"
    return {
        "metric": metric,
        "direction": direction,
        "arms": arms,
        "comparisons": comparisons,
        "adopted": adopted,
        "sentence": "as the search says it",
    }


def write_search(
    directory,
    *,
    space="natural",
    found=None,
    folds=5,
    rounds=2,
    trials=40,
    keep=5,
    method="FastAutoAugmentSearch",
    run=None,
    policy=None,
    seed=0,
    **keys,
):
    """Write a finished search.

    Args:
        directory: Where; it is made.
        space: That was searched.
        found: The comparison; None: `acceptance()`; "": none was made.
        run: Directory of a run that becomes that of the first fold.
        policy: Given, it is what the search has found.
        keys: Replace those of the record.
    """
    found = acceptance() if found is None else found or None
    generator = np.random.default_rng(seed)
    operations = load_space(space).searched()
    directory.mkdir(parents=True)
    arguments = {"space": space, "operations": None, "rounds": rounds, "keep": keep, "sub_policies": 5, "length": 2}
    arguments |= {"reduce": "mean", "objective": "loss"}
    config = {"run": RUN, "method": {"class_path": method, "init_args": arguments}, "folds": folds, "trials": trials}
    config |= {"acceptance": found and {"folds": 2, "seeds": 3}, "workers": 2, "seed": 0}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    clean = [0.15 + 0.01 * fold for fold in range(folds)]
    kept = []
    (directory / "density").mkdir()
    for fold in range(folds):
        for number in range(rounds):
            values = clean[fold] + 0.02 + generator.gamma(1.5, 0.25, trials) * np.linspace(1.5, 0.6, trials)
            lines = [
                {"number": trial, "values": {}, "value": float(value), "seconds": 0.1, "reason": ""}
                for trial, value in enumerate(values)
            ]
            lines[3] |= {"value": None, "reason": "the value is nan"}
            header = {"version": 1, "policies": {"operations": operations}, "identity": {"fold": fold}}
            text = "".join(f"{json.dumps(line)}\n" for line in (header, *lines))
            (directory / "density" / f"fold-{fold}-round-{number}.jsonl").write_text(text)
            best = sorted((line for line in lines if line["value"] is not None), key=lambda line: line["value"])[:keep]
            kept += [
                {"fold": fold, "round": number, "number": line["number"], "value": line["value"]}
                | {"sub_policies": sub_policies(generator, operations)}
                for line in best
            ]
    searched = policy or Policy([steps for each in kept for steps in each["sub_policies"]], space=space)
    adopted = "searched" if found is None else found["adopted"]
    arms = {"searched": searched, "none": Identity(space), "trivial_augment": TrivialAugment(space)}
    save_policy(searched, directory / "searched_policy.json")
    save_policy(arms[adopted], directory / "policy.json")
    record = {
        "version": 1,
        "method": f"lightning_automl.search.{method}",
        "arguments": arguments,
        "space": load_space(space).to_dict(),
        "folds": folds,
        "trials": trials,
        "evaluations": folds * rounds * trials,
        "kept": kept,
        "identity_values": clean,
        "sub_policies": len(getattr(searched, "sub_policies", ())),
        "seconds": {"folds": 75.0, "density": 48.0, "acceptance": 190.0},
        "epochs": {"folds": folds * 4, "acceptance": 18 * 4},
        "acceptance": found,
    }
    write_json(directory / "policy_search.json", record | keys)
    write_json(directory / "summary.json", {"command": "search", "status": "finished", "seconds": 320.0})
    versions = {"versions": {"python": "3.12", "torch": "2.9"}, "seed": 0, "commit": "0" * 12}
    write_json(directory / "environment.json", versions)
    (directory / "best.yaml").write_text(yaml.safe_dump(RUN))
    (directory / "folds").mkdir()
    if run is not None:
        shutil.copytree(run, directory / "folds/0")
    return directory


def cut_off(directory, scored=7):
    """Make a search one that was ended while it scored policies of its first fold."""
    for name in ("policy_search.json", "summary.json", "policy.json", "searched_policy.json", "best.yaml"):
        (directory / name).unlink()
    for path in sorted((directory / "density").glob("*.jsonl"))[1:]:
        path.unlink()
    path = directory / "density/fold-0-round-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: scored + 1]) + lines[scored + 1][:12])
    return directory
