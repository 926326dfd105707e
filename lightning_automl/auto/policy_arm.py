"""The searched augmentation policy: Fast AutoAugment by networks of the leader, on the search folds alone."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_automl.auto.candidates import SEARCHED, Candidate, policy_file
from lightning_automl.auto.clock import Clock
from lightning_automl.auto.facts import Facts
from lightning_automl.auto.shares import put_aside, seconds_for
from lightning_automl.results.policy_pictures import draw_pictures
from lightning_automl.rundir import UserError, differences, read_json, write_json, write_text
from lightning_automl.search.study import StudyFailed
from lightning_automl.studies.configs import shared_cache, with_policy
from lightning_automl.studies.workers import Workers

if TYPE_CHECKING:  # these bring torch
    from lightning_automl.search.fast_autoaugment import FastAutoAugmentSearch
    from lightning_automl.studies.policies import FoldSearches

log = logging.getLogger("lightning_automl")

#: Name of the stage in the plan, and of its directory.
STAGE = "policy_search"
#: Of so many policies of a round one is kept, and this many at most.
_KEPT_OF, _MOST_KEPT = 10, 10


def search_policy(
    workers: Workers,
    directory: Path,
    facts: Facts,
    plan: Mapping[str, Any],
    leader: Candidate,
    clock: Clock,
    *,
    seed: int = 0,
) -> Path | None:
    """Search a policy by density matching, with networks that are trained as the leader is, but without any policy.

    Everything is in ``policy_search/``, as a search of its own leaves it: ``policy_search.json`` (with a ``sentence``,
    and ``cut``), ``trials.csv``, ``searched_policy.json``, pictures. Networks are trained on the search folds but one
    and score policies on that one; the comparison folds are in no split. What is done is not done again. When its time
    is over, the best of what was scored until then is taken; that is noted as a cut, and later commands leave it so.

    Args:
        workers: Do the work.
        directory: Of the strategy.
        facts: What was seen of the data.
        plan: Says in ``policy_search`` how many ``folds``, ``trials`` of a round and ``rounds``, and when to end.
        leader: Whose network, optimizer and epochs are taken.
        clock: Knows how much time is left.
        seed: Of the trainings and of the sampler.

    Returns:
        The file of the policy; None if none is planned, or none was found, which is no error.

    Raises:
        DiskFullError: If there is no space left.
    """
    wanted, searched = plan[STAGE], len(facts.search_folds)
    if wanted is None:
        return None
    if searched < 2:
        log.warning("no policy is searched: of %d search fold none is left to train on", searched)
        return None
    from lightning_automl.studies.policies import FoldSearches

    place = directory / STAGE
    method = method_of(facts, wanted)
    base = shared_cache({**leader.without_policy, "seed_everything": seed}, directory)
    folds, trials = min(int(wanted["folds"]), searched), int(wanted["trials"])
    _settle(place, method, base, {"folds": folds, "trials": trials, "seed": seed})
    own = workers.within(seconds_for(STAGE, plan, clock))
    searches = FoldSearches(
        *(own, base, place, method),
        folds=folds,
        between=searched - folds,
        apart=len(facts.comparison_folds),
        trials=trials,
        seed=seed,
        sampler=None,
    )
    if STAGE not in clock.cuts:
        _run(searches, own, clock)
    return _leave(searches, place, clock.cuts.get(STAGE))


def challenger(directory: Path, leader: Candidate, policy: Path) -> Candidate:
    """The leader, trained with a searched policy.

    The policy gets a file of its own, named by what it holds: a longer search may replace ``policy``, and what was
    trained with the former one remains what it says.

    Args:
        directory: Of the strategy.
        leader: Of whom all else is taken.
        policy: What :func:`search_policy` has returned.
    """
    text = policy.read_text(encoding="utf-8")
    file = policy_file(directory, f"{SEARCHED}-{blake2b(text.encode(), digest_size=4).hexdigest()}")
    if not file.exists():
        write_text(file, text)
    return replace(leader, policy=SEARCHED, config=with_policy(leader.config, file), default=False)


def method_of(facts: Facts, wanted: Mapping[str, Any]) -> "FastAutoAugmentSearch":
    """Fast AutoAugment within the safe operations of the images.

    Args:
        facts: What was seen of the data.
        wanted: ``trials`` and ``rounds``.
    """
    from lightning_automl.search.fast_autoaugment import FastAutoAugmentSearch

    keep = min(_MOST_KEPT, max(1, int(wanted["trials"]) // _KEPT_OF))
    return FastAutoAugmentSearch(space=dict(facts.space), rounds=int(wanted["rounds"]), keep=keep)


def _settle(place: Path, method: "FastAutoAugmentSearch", base: Mapping[str, Any], numbers: Mapping[str, int]) -> None:
    """Write down what the search is; one by other networks, on other folds or of more trials is put aside."""
    spec = {"class_path": f"{type(method).__module__}.{type(method).__name__}", "init_args": method.arguments()}
    config = {"method": spec, **numbers, "run": dict(base)}
    path = place / "config.yaml"
    if path.exists():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = set(differences(before, config)) - {"trials", "method.init_args.keep"}
        if changed or before["trials"] > config["trials"]:
            log.info("the policy search is now another one; the former is in %s", put_aside(place))
    write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _run(searches: "FoldSearches", workers: Workers, clock: Clock) -> None:
    """Train and score; if that ends early, note why."""
    try:
        searches.run()
    except (UserError, StudyFailed) as error:
        done = sum(len(scored) for scored in searches.rounds().values())
        so_far = f"after {done} of {searches.evaluations} policies"
        if isinstance(error, StudyFailed) and workers.out_of_time:
            sentence = f"The policy search was ended by the budget {so_far}."
        else:
            sentence = f"The policy search failed {so_far}: {error}."
        log.warning("%s", sentence)
        clock.cut(STAGE, sentence)


def _leave(searches: "FoldSearches", place: Path, cut: str | None) -> Path | None:
    """Write what was found, with tables and pictures; give the file of the policy."""
    from lightning_automl.augment import save_policy

    path = place / "searched_policy.json"
    before = path.read_bytes() if path.exists() else b""
    count = 0
    try:
        policy = searches.policy()
    except UserError as error:
        path.unlink(missing_ok=True)
        sentence = f"No augmentation policy was found: {error}."
    else:
        count = len(policy)
        save_policy(policy, path)
        if path.read_bytes() != before:
            (place / "policy.png").unlink(missing_ok=True)
        sentence = f"Fast AutoAugment has found {count} sub-policies in the space {searches.method.space.name}."
    summaries = [read_json(searches.place(fold) / "summary.json") or {} for fold in range(searches.folds)]
    seconds = sum(float(each.get("seconds", 0.0)) for each in summaries)
    own = {
        "sub_policies": count,
        "seconds": {"folds": round(seconds, 3), "density": searches.density_seconds()},
        "cut": cut,
        "sentence": sentence,
    }
    searches.write_table()
    write_json(place / "policy_search.json", searches.record() | own)
    log.log(logging.INFO if count else logging.WARNING, "%s", sentence)
    if not count:
        return None
    _draw(place)
    return path


def _draw(place: Path) -> None:
    """Draw the policy unless that was done; to have no picture is no failure."""
    try:
        if not (place / "policy.png").exists():
            draw_pictures(place)
    except (UserError, ValueError) as error:
        log.warning("the policy was not drawn: %s", error)
