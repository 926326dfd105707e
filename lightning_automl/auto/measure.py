"""How long an epoch of each arm takes here: a short run each, as many at once as there will be."""

import logging
import math
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_automl.auto.architecture_arm import config_of as search_config_of
from lightning_automl.auto.arms import ARMS, Arm, batch_size_of, config_of, default_epochs, in_order
from lightning_automl.auto.costs import VALIDATION
from lightning_automl.auto.facts import Facts
from lightning_automl.auto.ladder import FEW_EPOCHS
from lightning_automl.auto.recipes import enlarged
from lightning_automl.auto.shares import resolved
from lightning_automl.rundir import UserError, read_json, write_json, write_text
from lightning_automl.search.study import StudyFailed
from lightning_automl.studies.configs import closed
from lightning_automl.studies.workers import Workers

log = logging.getLogger("lightning_automl")

#: What is measured first: something has to fit into any budget.
_FIRST = "cnn"
#: The search for an architecture, measured beside the arms.
SEARCH = "architecture_search"

#: Share of the budget that measuring may take, and seconds that it has in any case.
_SHARE, _LEAST = 0.08, 4.0
#: An arm is stopped when it takes so many times as long as there is time, or as the longest before it.
_PATIENCE = 2.0
#: Seconds that a measured epoch is to take, about.
_EPOCH = 0.6
#: Seconds of an epoch that are spent on no image: loops, metrics.
_LOOP = 0.04
#: A GPU is about so many times as fast as a thread.
_GPU = 20.0
#: Share of the budget that a run may take, likely, of what is not measured last.
_TOO_LONG = 0.25
#: Reason of an arm that was not measured; with a longer budget it is.
NO_TIME = "there was no time to measure it in this budget"


class _Part(NamedTuple):
    """How much of an epoch is measured.

    Args:
        batch: Images a step.
        train: Steps.
        val: Steps of validation.
    """

    batch: int
    train: int
    val: int


def measure(
    workers: Workers,
    directory: Path,
    facts: Facts,
    arms: Sequence[Arm],
    not_run: Mapping[str, str],
    *,
    metric: str,
    seed: int,
    budget: float,
    backbone: str | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Train each arm for two epochs of a few batches; the second one counts.

    Takes at most about a twelfth of the budget: the arms are measured in their order, and those for which there is no
    time are not run. What was measured is kept in ``measured.json`` and not measured again, unless other workers share
    the machine. Leaves in ``arms/ARM.yaml`` the resolved config of each arm.

    Args:
        workers: Do the work.
        directory: Of the strategy.
        facts: What was seen of the data.
        arms: Those that can run, the likely best first.
        not_run: Why others cannot, by name.
        metric: By which the best epoch of a run is chosen.
        seed: Of the runs.
        budget: Seconds of the whole strategy.
        backbone: Name of the pretrained network.
        weights: File with its weights.

    Returns:
        What ``measured.json`` holds: ``workers``, ``threads``, ``device``, ``server_seconds`` (until the first process
        answered), ``arms`` by name with ``epoch_seconds`` (on the whole train split, with validation),
        ``fixed_seconds`` (those of it that no image takes), ``overhead_seconds`` (of a run, without its epochs),
        ``parameters`` and ``test_image_seconds``; ``architecture_search`` with the first three of these, or None; and
        ``not_run``, reasons by name.

    Raises:
        UserError: If all arms refuse, with the first one's reason.
        DiskFullError: If there is no space left.
    """
    measuring = _Measuring(workers, directory, facts, metric=metric, seed=seed, backbone=backbone, weights=weights)
    measuring.take_up(budget, not_run)
    limit = max(_LEAST, _SHARE * budget)
    waiting = [name for name in _in_turn(arms, facts, budget) if not measuring.knows(name)]
    if waiting:
        log.info("measuring how long an epoch takes: %s", ", ".join(waiting))
        measuring.start_server()
    started = time.monotonic()

    def work(name: str) -> None:
        # The first ones in any case; one that takes as long as the longest so far has to fit.
        turn, left = waiting.index(name), limit - (time.monotonic() - started)
        if turn >= workers.number and measuring.longest > left:
            measuring.note(name, None, NO_TIME)
        else:
            measuring.one(name, workers if turn == 0 else workers.within(_PATIENCE * max(left, measuring.longest)))

    workers.each(work, waiting)
    if not measuring.found["arms"] and measuring.refusals:
        raise measuring.refusals[0]
    shutil.rmtree(directory / "measure", ignore_errors=True)
    return measuring.found


def _in_turn(arms: Sequence[Arm], facts: Facts, budget: float) -> list[str]:
    """The cheapest first, then in their order; last those of which a run is likely to take too long anyway."""

    def is_late(arm: Arm) -> bool:
        likely = _work(arm, facts) * facts.number("train") * default_epochs(arm, facts) * FEW_EPOCHS
        return arm.only_searched or likely > _TOO_LONG * budget

    names = [arm.name for arm in sorted(arms, key=lambda arm: (arm.name != _FIRST, is_late(arm)))]
    return [*names, SEARCH] if any(arm.only_searched for arm in arms) else names


class _Measuring:
    """Measures, and keeps what was measured after each arm."""

    def __init__(
        self,
        workers: Workers,
        directory: Path,
        facts: Facts,
        *,
        metric: str,
        seed: int,
        backbone: str | None,
        weights: str | None,
    ) -> None:
        self.workers = workers
        self.directory = directory
        self.facts = facts
        self.metric = metric
        self.seed = seed
        self.source = {"backbone": backbone, "weights": weights}
        self.gpu = bool(workers.slices[0].gpus)
        self.longest = 0.0
        self.refusals: list[UserError] = []
        self.found: dict[str, Any] = {}
        self._lock = threading.Lock()

    def take_up(self, budget: float, not_run: Mapping[str, str]) -> None:
        """Take up what a former command has measured."""
        device = "gpu" if self.gpu else "cpu"
        own = {"workers": self.workers.number, "threads": self.workers.slices[0].threads, "device": device}
        former = read_json(self.directory / "measured.json") or {}
        if any(former.get(key) != value for key, value in own.items()):
            former = {}
        reasons = former.get("not_run", {})
        if former.get("budget", budget) < budget:
            reasons = {name: reason for name, reason in reasons.items() if reason != NO_TIME}
        self.found = {
            **{"budget": budget, **own, "server_seconds": former.get("server_seconds", 0.0)},
            "arms": {name: known for name, known in former.get("arms", {}).items() if name not in not_run},
            SEARCH: former.get(SEARCH),
            "not_run": {**reasons, **not_run},
        }

    def knows(self, name: str) -> bool:
        """Whether there is nothing to measure any more."""
        if name in self.found["not_run"]:
            return True
        if name == SEARCH:
            return self.found[SEARCH] is not None
        return name in self.found["arms"] and self._path(name).is_file()

    def start_server(self) -> None:
        """Wait until the trial server has imported what it needs, which belongs to no arm."""
        started = time.monotonic()
        payload = {"do": "check", "file": str(self.directory / "measure" / "none.yaml"), "configs": [], "built": []}
        (self.directory / "measure").mkdir(parents=True, exist_ok=True)
        self.workers.do("the start of the trial server", payload, self.directory / "measure" / "output.txt")
        self.found["server_seconds"] = round(time.monotonic() - started, 3)

    def one(self, name: str, workers: Workers) -> None:
        """Measure an arm; if it cannot be built or trained, that is why it is not run."""
        started = time.monotonic()
        try:
            known = self._measured(name, workers)
        except (UserError, StudyFailed) as error:
            if self.workers.is_set():
                raise  # all was stopped
            if workers.out_of_time:
                self.note(name, None, NO_TIME)
                return
            self.note(name, None, str(error))
            if isinstance(error, UserError):
                self.refusals.append(error)
            return
        self.longest = max(self.longest, time.monotonic() - started)
        self.note(name, known, "")

    def note(self, name: str, known: dict[str, float] | None, reason: str) -> None:
        """Keep what was measured, or why nothing was."""
        with self._lock:
            if known is None:
                self.found["not_run"][name] = reason
                if reason != NO_TIME:  # the plan says that of all at once
                    log.info("%s is not run: %s", name, reason)
            elif name == SEARCH:
                self.found[SEARCH] = known
            else:
                self.found["arms"][name] = known
                each, more = known["epoch_seconds"], known["overhead_seconds"]
                log.info("%s: an epoch takes %.2f s, and a run %.1f s more", name, each, more)
            self.found |= {key: _in_order(self.found[key]) for key in ("arms", "not_run")}
            write_json(self.directory / "measured.json", self.found)

    def _measured(self, name: str, workers: Workers) -> dict[str, float]:
        place = self.directory / "measure" / name
        shutil.rmtree(place, ignore_errors=True)
        config = self._resolved(name, place, workers)
        if name != SEARCH:
            write_text(self._path(name), yaml.safe_dump(config, sort_keys=False))
        part = part_of(self.facts, ARMS["pcdarts" if name == SEARCH else name], gpu=self.gpu)
        short = closed(config, self.directory)
        short |= {"monitor": "val_loss", "mode": None}  # other metrics may be undefined for so few images
        short["data"]["init_args"]["batch_size"] = part.batch
        short["trainer"] |= {"max_epochs": 2, "limit_train_batches": part.train, "limit_val_batches": part.val}
        if name == SEARCH:
            short["model"]["init_args"]["warmup_epochs"] = 0
        ends: list[float] = []

        def answer(message: dict[str, Any]) -> bool:
            if "report" in message:
                ends.append(time.monotonic())
            return False

        write_text(place / "config.yaml", yaml.safe_dump(short, sort_keys=False))
        payload = {"do": "fit", "directory": str(place.resolve()), "watch": "val_loss", "costs": []}
        started = time.monotonic()
        result = workers.do(f"measuring {name}", payload, place / "output.txt", on_message=answer)
        return self._scaled(
            name, result, part, whole=time.monotonic() - started, epoch=ends[-1] - ends[-2], place=place
        )

    def _resolved(self, name: str, place: Path, workers: Workers) -> dict[str, Any]:
        if name == SEARCH:
            config = search_config_of(self.facts, epochs=2, metric=self.metric, seed=self.seed)
        else:
            epochs = default_epochs(ARMS[name], self.facts)
            config = config_of(ARMS[name], self.facts, epochs=epochs, metric=self.metric, seed=self.seed, **self.source)
        place.mkdir(parents=True)
        return resolved(workers, f"the config of {name}", config, place.with_suffix(".yaml"))

    def _scaled(
        self, name: str, result: Mapping[str, Any], part: _Part, *, whole: float, epoch: float, place: Path
    ) -> dict[str, float]:
        """From the second epoch, which took ``epoch`` seconds with all that lies between two, to a whole one."""
        data = read_json(place / "data.json")
        train, val = (sum(data["counts"][split]) for split in ("train", "val"))
        if name == SEARCH:
            train = train / 2  # an epoch goes once through the half that teaches the weights
        looked = min(part.train * part.batch, train) + VALIDATION * min(part.val * part.batch, val)
        rows = (place / "metrics.csv").read_text().splitlines()
        within = float(rows[-1].split(",")[rows[0].split(",").index("seconds")])
        work = max(within - _LOOP, within / 2)  # never nothing, of however quick an epoch
        fixed = max(0.0, epoch - work)
        image = work / looked
        known = {
            "epoch_seconds": fixed + image * (train + VALIDATION * val),
            "fixed_seconds": fixed,
            "overhead_seconds": max(0.0, whole - 2 * epoch),
        }
        if name != SEARCH:
            known["test_image_seconds"] = VALIDATION * image
            known["parameters"] = result["metrics"].get("parameters", math.nan)
        return {key: round(value, 6) for key, value in known.items()}

    def _path(self, name: str) -> Path:
        return self.directory / "arms" / f"{name}.yaml"


def _in_order(known: Mapping[str, Any]) -> dict[str, Any]:
    """The same in the order in which arms are tried, whichever was measured sooner."""
    arms = in_order(name for name in known if name != SEARCH)
    return {name: known[name] for name in (*arms, SEARCH) if name in known}


def part_of(facts: Facts, arm: Arm, *, gpu: bool = False) -> _Part:
    """How many images are measured: so that it takes about half a second; of large ones smaller batches."""
    images = max(8, round(_EPOCH / _work(arm, facts) * (_GPU if gpu else 1)))
    batch = min(batch_size_of(facts), max(4, images // 2))
    train = min(max(2, images // batch), math.ceil(facts.number("train") / batch))
    return _Part(batch, train, min(max(1, train // 4), math.ceil(facts.number("val") / batch)))


def _work(arm: Arm, facts: Facts) -> float:
    """Seconds of a training step for an image, roughly."""
    side = enlarged(facts)
    pixels = math.prod(facts.image_size) if side is None or not arm.pretrained else side**2
    return arm.work / 1000 * pixels / (96**2 if arm.pretrained else 28**2)
