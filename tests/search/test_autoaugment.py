from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage

from lightning_automl.search.autoaugment import AutoAugmentSearch
from lightning_automl.search.policies import Scored, best_of, merged
from lightning_automl.search.study import open_study, search


def test_children_are_tried_and_the_best_five_merged():
    """A child's accuracy stands here for the number of its steps that rotate."""
    method = AutoAugmentSearch("natural", ["rotate", "invert", "contrast"])
    policies = method.policies()
    space = policies.as_space()
    study, _ = open_study("aa", InMemoryStorage(), [method.direction], RandomSampler(seed=0), None, space=space)

    def accuracy(candidate):
        policy = policies.policy(candidate.values)
        return sum(step.operation == "rotate" for steps in policy.sub_policies for step in steps) / 10

    search(study, space, accuracy, trials=20)
    scored = [Scored(trial.number, trial.params, trial.value) for trial in study.get_trials()]
    best = best_of(scored, method.keep, method.direction)
    assert [each.value for each in best] == sorted((each.value for each in scored), reverse=True)[:5]
    found = merged(policies, best)
    assert 20 <= len(found) <= 25
    done = (
        tuple(step for step in steps if step.probability)  # what is never done is not kept
        for each in best
        for steps in policies.policy(each.values).sub_policies
    )
    assert set(found.sub_policies) == set(done) - {()}
    levels = {step.probability * 10 for steps in found.sub_policies for step in steps}
    assert all(abs(level - round(level)) < 1e-9 for level in levels)
