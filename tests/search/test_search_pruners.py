from itertools import pairwise

import optuna
import pytest
from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner, ThresholdPruner
from optuna.samplers import TPESampler
from optuna.study import StudyDirection

from lightning_automl.rundir import UserError
from lightning_automl.search.pruners import check_pruner, hyperband_sentence, rungs
from lightning_automl.search.samplers import PopulationSampler


def test_the_table_of_hyperband_for_81_epochs():
    assert rungs(81, 3) == [
        [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        [(34, 3), (11, 9), (3, 27), (1, 81)],
        [(15, 9), (5, 27), (1, 81)],
        [(8, 27), (2, 81)],
        [(5, 81)],
    ]


@pytest.mark.parametrize("eta", range(2, 6))
@pytest.mark.parametrize("epochs", [1, 2, 7, 16, 50, 100, 243, 625])
def test_a_bracket_keeps_one_of_eta_and_never_trains_longer_than_asked_for(epochs, eta):
    table = rungs(epochs, eta)
    assert eta ** (len(table) - 1) <= epochs < eta ** len(table)
    assert [len(bracket) for bracket in table] == list(range(len(table), 0, -1))
    for bracket in table:
        assert bracket[-1][1] == epochs
        for (many, short), (few, long) in pairwise(bracket):
            assert few == many // eta >= 1
            assert short == long // eta >= 1


@pytest.mark.parametrize(("epochs", "eta"), [(0, 3), (81, 1)])
def test_a_table_without_epochs_or_halving_is_refused(epochs, eta):
    with pytest.raises(UserError, match=f"{epochs} epochs and a reduction factor of {eta}; give at least 1 and"):
        rungs(epochs, eta)


def brackets(pruner):
    """How many brackets the installed Optuna makes, with the first report."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(pruner=pruner)
    trial = study.ask()
    trial.report(0.0, 1)
    trial.should_prune()
    optuna.logging.set_verbosity(level)
    return len(pruner._pruners)


POWERS = [(eta, power) for eta in range(2, 6) for power in range(1, 18) if eta**power <= 10**5]


@pytest.mark.parametrize(("eta", "power"), POWERS)
@pytest.mark.parametrize("smallest", [1, 3])
def test_the_sentence_about_hyperband_agrees_with_the_brackets_of_optuna(eta, power, smallest):
    largest = smallest * eta**power
    pruner = HyperbandPruner(smallest, largest, eta)
    sentence = hyperband_sentence(pruner)
    assert (sentence is None) == (brackets(pruner) == power + 1)
    if sentence is not None:
        assert f"makes {brackets(HyperbandPruner(smallest, largest, eta))} brackets" in sentence
        assert sentence.endswith(f"give max_resource {largest + 1}")
        assert brackets(HyperbandPruner(smallest, largest + 1, eta)) == power + 1
    assert brackets(HyperbandPruner(smallest, largest - 1, eta)) == power
    assert hyperband_sentence(HyperbandPruner(smallest, largest - 1, eta)) is None


def test_243_epochs_at_3_make_5_brackets_instead_of_6():
    assert hyperband_sentence(HyperbandPruner(1, 243, 3)) == (
        "HyperbandPruner makes 5 brackets of max_resource 243 with reduction_factor 3, not 6, "
        "as it rounds a logarithm; give max_resource 244"
    )
    assert hyperband_sentence(HyperbandPruner(1, 244, 3)) is None


@pytest.mark.parametrize(
    "pruner", [MedianPruner(), HyperbandPruner(), HyperbandPruner(4, 2, 3), HyperbandPruner(1, 9, 1)]
)
def test_nothing_is_told_of_what_is_no_hyperband_or_not_known_yet(pruner):
    assert hyperband_sentence(pruner) is None


@pytest.mark.parametrize("directions", [["minimize", "maximize"], [StudyDirection.MINIMIZE] * 3])
def test_a_pruner_is_refused_with_several_objectives(directions):
    sentence = f"compares one value and the study has {len(directions)} objectives; give optuna.pruners.NopPruner"
    with pytest.raises(UserError, match=f"MedianPruner {sentence}"):
        check_pruner(MedianPruner(), directions)
    check_pruner(NopPruner(), directions)
    check_pruner(MedianPruner(), directions[:1])


def test_a_pruner_is_refused_with_population_based_training():
    with pytest.raises(UserError, match="ThresholdPruner would stop segments of population based training"):
        check_pruner(ThresholdPruner(lower=0.0), ["minimize"], PopulationSampler(total=4))
    check_pruner(NopPruner(), ["minimize"], PopulationSampler(total=4))
    check_pruner(MedianPruner(), ["minimize"], TPESampler())
