import json
import shutil

import pytest
import yaml
from searched import FakeWorkers, Time, no_work, real_workers
from seen import DIGITS, seen

from lightning_automl.auto.architecture_arm import challenger, config_of, search_architecture
from lightning_automl.auto.arms import ARMS
from lightning_automl.auto.arms import config_of as config_of_arm
from lightning_automl.models import load_genotype
from lightning_automl.results.run import Run, open_data
from lightning_automl.rundir import DiskFullError, UserError
from lightning_automl.search.study import StudyFailed

PLANNED = {"name": "pcdarts", "title": "searched cells (PC-DARTS)", "epochs": 7, "run_seconds": 10}


def plan_of(epochs=2):
    return {
        "metric": "val_balanced_accuracy",
        "architecture_search": {"epochs": epochs, "arm": PLANNED},
        "stages": [{"name": "architecture_search", "seconds": 60}, {"name": "final", "seconds": 100}],
    }


@pytest.fixture(scope="module")
def workers(_server):
    return real_workers(_server)


@pytest.fixture(scope="module")
def finished(workers, tmp_path_factory):
    """Two epochs of the digits, and the arm that trains what was found."""
    directory = tmp_path_factory.mktemp("strategy")
    path = search_architecture(workers, directory, DIGITS, plan_of(), Time())
    assert path == directory / "architecture_search/genotype.json"
    config = config_of_arm(ARMS["pcdarts"], DIGITS, epochs=7, metric="val_accuracy", seed=0)
    payload = {"do": "check", "file": str(directory / "check.yaml"), "configs": [config], "built": []}
    found = workers.do("the look at an arm", payload, directory / "output.txt")
    (directory / "arms").mkdir()
    (directory / "arms/pcdarts.yaml").write_text(yaml.safe_dump(found["resolved"][0]))
    (directory / "policies").mkdir()
    (directory / "policies/none.json").write_text('{"policy": "Identity"}')
    return directory


@pytest.fixture
def directory(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "strategy")


class Resolving(FakeWorkers):
    """Resolve configs in a process, and fail whatever is to be trained."""

    def __init__(self, workers, error):
        super().__init__(error)
        self.workers = workers

    def do(self, what, payload, output, **others):
        return self.workers.do(what, payload, output, **others)


def test_the_search_leaves_a_genotype_with_few_skips(finished):
    genotype = load_genotype(finished / "architecture_search/genotype.json")
    assert max(genotype.skips("normal"), genotype.skips("reduce")) <= 2
    assert (finished / "architecture_search/genotype.svg").exists()
    record = json.loads((finished / "architecture_search/architecture.json").read_text())
    assert len(record["epochs"]) == 2


def test_no_image_of_the_comparison_is_in_the_search(finished):
    run = Run.read(finished / "architecture_search")
    arguments = run.config["data"]["init_args"]
    assert (arguments["fold"], arguments["folds"], arguments["without_folds"]) == (0, 5, [3, 4])
    assert (arguments["arch_fraction"], run.config["test_after_fit"]) == (0.5, False)
    assert run.summary["test_opened"] == 0
    rows = open_data(run).split_rows
    searched = {*rows["train"].tolist(), *rows["val"].tolist()}
    assert len(searched) == pytest.approx(3 / 5 * 1430, abs=15)
    assert not searched & set(rows["test"].tolist())
    counts = run.data["streams"]
    assert sum(counts["train"]) + sum(counts["arch"]) == len(rows["train"])


def test_the_alphas_rest_for_a_while_and_skips_are_limited():
    config = config_of(DIGITS, epochs=20, metric="val_accuracy", seed=3)
    task = config["model"]["init_args"]
    assert (task["warmup_epochs"], task["model"]["init_args"]["max_skips"]) == (6, 2)
    assert task["model"]["init_args"]["relaxation"] == {"class_path": "PartialChannels", "init_args": {"k": 4}}
    assert (config["seed_everything"], config["trainer"]["max_epochs"]) == (3, 20)


def test_what_is_done_is_not_done_again(directory):
    before = (directory / "architecture_search/genotype.json").read_text()
    assert search_architecture(no_work(), directory, DIGITS, plan_of(), Time()).read_text() == before


def test_a_killed_search_goes_on(workers, directory, tmp_path):
    place = directory / "architecture_search"
    (place / "summary.json").unlink()  # as if killed before its end
    own = Resolving(workers, StudyFailed("out of memory"))
    search_architecture(own, directory, DIGITS, plan_of(), Time())
    assert own.jobs == ["the architecture search"]
    assert (place / "checkpoints/last.ckpt").exists()
    assert not (directory / "superseded").exists()


def test_a_longer_search_is_another_one(workers, directory):
    own = Resolving(workers, StudyFailed("out of memory"))
    assert search_architecture(own, directory, DIGITS, plan_of(epochs=3), Time()) is None
    assert (directory / "superseded/architecture_search-1/genotype.json").exists()


@pytest.mark.parametrize("error", [StudyFailed("out of memory"), UserError("no such network")])
def test_a_search_that_fails_is_a_sentence_and_is_not_tried_again(workers, tmp_path, error):
    clock = Time()
    assert search_architecture(Resolving(workers, error), tmp_path, DIGITS, plan_of(), clock) is None
    assert clock.cuts == {"architecture_search": f"The architecture search failed after 0 of 2 epochs: {error}."}
    assert search_architecture(no_work(), tmp_path, DIGITS, plan_of(), clock) is None


def test_a_full_disk_ends_it(workers, tmp_path):
    with pytest.raises(DiskFullError):
        search_architecture(Resolving(workers, DiskFullError(28, "full")), tmp_path, DIGITS, plan_of(), Time())


@pytest.mark.parametrize(("warmup", "taken"), [(1, True), (2, False)])
def test_when_time_is_over_the_newest_genotype_is_taken_if_the_alphas_have_moved(workers, directory, warmup, taken):
    place = directory / "architecture_search"
    (place / "summary.json").unlink()
    config = yaml.safe_load((place / "config.yaml").read_text())
    config["model"]["init_args"]["warmup_epochs"] = warmup
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    clock = Time()
    clock.cuts["architecture_search"] = "The architecture search was ended by the budget after 2 of 9 epochs."
    path = search_architecture(no_work(), directory, DIGITS, plan_of(epochs=9), clock)
    assert path == (place / "genotype.json" if taken else None)


def test_the_cut_is_told(workers, tmp_path):
    clock = Time(left=100.0)  # which the final stage needs
    assert search_architecture(workers, tmp_path, DIGITS, plan_of(), clock) is None
    assert clock.cuts == {"architecture_search": "The architecture search was ended by the budget after 0 of 2 epochs."}


def test_nothing_is_searched_without_a_plan_or_with_a_single_search_fold(tmp_path):
    assert search_architecture(no_work(), tmp_path, DIGITS, {"architecture_search": None}, Time()) is None
    few = seen(train=(3, 3), val=(1, 1), folds=2)
    assert search_architecture(no_work(), tmp_path, few, plan_of(), Time()) is None
    assert not list(tmp_path.iterdir())


def test_the_challenger_is_the_arm_with_the_genotype_in_its_config(workers, directory):
    path = directory / "architecture_search/genotype.json"
    candidate = challenger(directory, plan_of(), path)
    network = candidate.config["model"]["init_args"]["model"]["init_args"]
    assert network["genotype"] == json.loads(path.read_text())
    assert (candidate.arm, candidate.policy, candidate.default) == ("pcdarts", "none", False)
    assert candidate.config["trainer"]["max_epochs"] == 7
    assert challenger(directory, plan_of(), path).key == candidate.key
    # it is as it would come back from a run's config
    payload = {"do": "check", "file": str(directory / "check.yaml"), "configs": [dict(candidate.config)], "built": []}
    found = workers.do("the look", payload, directory / "output.txt")
    again = found["resolved"][0]["model"]["init_args"]["model"]["init_args"]
    assert again["genotype"] == network["genotype"]
    other = json.loads(path.read_text())
    other["normal"] = list(reversed(other["normal"]))
    path.write_text(json.dumps(other))
    assert challenger(directory, plan_of(), path).key != candidate.key
