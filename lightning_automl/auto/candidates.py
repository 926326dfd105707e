"""A candidate: an arm with values of its space and a policy. It is named by what it is, not by when it was made."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from lightning_automl.rundir import CHANGEABLE, UserError
from lightning_automl.search.spaces import Space
from lightning_automl.studies.configs import with_policy

SEARCHED = "searched"

#: What to call a policy, by the name of its file in ``policies/``.
POLICIES = {"none": "no policy", "trivial_augment": "TrivialAugment", SEARCHED: "searched policy"}

#: What tells runs of a candidate apart, and what may change while one goes on.
_NOT_ITS_OWN = ("seed_everything", *sorted(CHANGEABLE))
_NOT_ITS_OWN += tuple(f"data.init_args.{name}" for name in ("fold", "folds", "without_folds", "cache"))
_POLICY = "data.init_args.train_policy"


@dataclass(frozen=True)
class Candidate:
    """What may be trained, on any fold and with any seed.

    Args:
        arm: Name of the arm.
        values: Of the arm's space, by name; empty for the defaults.
        policy: ``none``, ``trivial_augment`` or ``searched``.
        config: Resolved ``fit`` config without fold and seed; its policy is a file.
        default: Whether nothing of it was searched.
        arm_title: What to call the arm.
    """

    arm: str
    values: Mapping[str, Any]
    policy: str
    config: Mapping[str, Any]
    default: bool
    arm_title: str = ""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The config without what differs between its runs, and with the policy itself for its file.

        So it does not hang on where the directory is, which may be moved and in which files are named by their paths.

        Raises:
            UserError: If the policy file is missing or damaged.
        """
        own = copy.deepcopy(dict(self.config))
        for path in _NOT_ITS_OWN:
            _remove(own, path.split("."))
        arguments = (own.get("data") or {}).get("init_args") or {}
        policy = arguments.get("train_policy")
        if isinstance(policy, str) and policy.endswith(".json"):
            arguments["train_policy"] = _content(Path(policy))
        identity: dict[str, Any] = json.loads(_text(own))
        return identity

    @cached_property
    def key(self) -> str:
        """Name of its directory: ``resnet-1a2b3c4d``, the same in every process and on every machine."""
        return f"{self.arm}-{blake2b(_text(self.identity).encode(), digest_size=4).hexdigest()}"

    @property
    def title(self) -> str:
        """``ResNet-20 from scratch, TrivialAugment``, and ``tuned`` when values of it were searched."""
        words = [
            self.arm_title or self.arm,
            POLICIES.get(self.policy, self.policy),
            *(["tuned"] if self.values else []),
        ]
        return ", ".join(words)

    @property
    def without_policy(self) -> dict[str, Any]:
        """Its config with no policy at all, as a search for one starts from."""
        config = copy.deepcopy(dict(self.config))
        _remove(config, _POLICY.split("."))
        return config

    def to_dict(self) -> dict[str, Any]:
        """What ``candidate.json`` in its directory says, for all who read there."""
        return {
            "key": self.key,
            "title": self.title,
            "arm": self.arm,
            "policy": self.policy,
            "values": dict(self.values),
            "default": self.default,
            "identity": self.identity,
        }


def candidate_of(
    directory: Path,
    planned: Mapping[str, Any],
    policy: str,
    values: Mapping[str, Any] | None = None,
    space: Space | None = None,
) -> Candidate:
    """A candidate of an arm whose resolved config is ``arms/ARM.yaml``.

    Args:
        directory: Of the strategy.
        planned: The arm's entry of ``plan.json``: ``name``, ``title`` and ``epochs``.
        policy: Name of a file in ``policies/``, without ``.json``.
        values: Of the arm's space; none for its defaults.
        space: The arm's space; needed with values.

    Raises:
        UserError: If the arm has no config, or the space does not contain the values.
    """
    path = directory / "arms" / f"{planned['name']}.yaml"
    if not path.is_file():
        raise UserError(f"there is no {path}, which measuring writes; start anew in another directory")
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    if values:
        assert space is not None
        config = space.apply(config, values)
    config["trainer"]["max_epochs"] = planned["epochs"]
    config = with_policy(config, policy_file(directory, policy))
    return Candidate(planned["name"], dict(values or {}), policy, config, not values, planned.get("title", ""))


def policy_file(directory: Path, policy: str) -> Path:
    """Where a policy is, by its name."""
    return directory / "policies" / f"{policy}.json"


def write_simple_policies(directory: Path, space: Mapping[str, Any]) -> None:
    """Write the policies that need no search, each within the images' safe operations.

    That no policy is one too lets the base augmentation of a data module obey the space.

    Args:
        directory: Of the strategy.
        space: As :meth:`~lightning_automl.augment.OperationSpace.to_dict` gives it.
    """
    from lightning_automl.augment import save_policy
    from lightning_automl.studies.acceptance import SIMPLE

    for name, (policy, _) in SIMPLE.items():
        save_policy(policy(dict(space)), policy_file(directory, name))


def _remove(config: dict[str, Any], keys: list[str]) -> None:
    for key in keys[:-1]:
        below = config.get(key)
        if not isinstance(below, dict):
            return
        config = below
    config.pop(keys[-1], None)


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the policy file {path} cannot be read ({error}); restore it") from error


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True)
