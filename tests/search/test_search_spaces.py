import copy
import itertools
import random

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy import stats

from lightning_automl.rundir import UserError
from lightning_automl.search.spaces import Space, differences

OPTIMIZER = "model.init_args.optimizer"
NETWORK = "model.init_args.model.init_args"
#: A space with everything in it: classes, shared paths, conditions on conditions, lists, structured choices.
WHOLE = f"""
lr_adamw: {{log_float: [1e-4, 1e-1], path: {OPTIMIZER}.init_args.lr, when: {{optimizer: AdamW}}}}
lr_sgd: {{log_float: [1e-3, 1], path: {OPTIMIZER}.init_args.lr, when: {{optimizer: torch.optim.SGD}}}}
nesterov: {{choice: [true, false], path: {OPTIMIZER}.init_args.nesterov, when: {{optimizer: torch.optim.SGD}}}}
momentum: {{float: [0, 0.9, 0.3], path: {OPTIMIZER}.init_args.momentum, when: {{nesterov: true}}}}
optimizer: {{choice: [AdamW, torch.optim.SGD, torch.optim.RMSprop], path: {OPTIMIZER}.class_path}}
{NETWORK}.filters.0: {{int: [32, 256, 32]}}
{NETWORK}.filters.1: {{log_int: [8, 512]}}
pools: {{choice: [[max, none], [avg, avg], null], path: {NETWORK}.pools}}
data.init_args.batch_size: {{choice: [32, 64]}}
"""
CONFIG = {
    "model": {
        "class_path": "ClassificationTask",
        "init_args": {
            "model": {"class_path": "TunableCNN", "init_args": {"filters": [64, 128], "pools": ["max", "none"]}},
            "optimizer": {
                "class_path": "torch.optim.adamw.AdamW",
                "init_args": {"lr": 0.003, "weight_decay": 0.01, "fused": True},
            },
        },
    },
    "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 64}},
    "trainer": {"max_epochs": 60},
}


def whole():
    return Space.parse(yaml.safe_load(WHOLE))


def one(**entry):
    return Space.parse({"x": entry})


def at(config, path):
    for key in path.split("."):
        config = config[int(key)] if isinstance(config, list) else config[key]
    return config


def suggestions(space, count, sampler=None):
    """Values of ``count`` trials."""
    study = optuna.create_study(sampler=sampler or optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        trial = study.ask()
        yield space.suggest(trial)
        study.tell(trial, 0.0)


@pytest.fixture(autouse=True)
def silence():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize(
    ("entry", "distribution"),
    [
        ("int: [2, 6]", IntDistribution(2, 6)),
        ("int: [32, 256, 32]", IntDistribution(32, 256, step=32)),
        ("int: {low: 1, high: 9}", IntDistribution(1, 9)),
        ("int: {low: 1, high: 9, step: 4}", IntDistribution(1, 9, step=4)),
        ("int: {low: 1, high: 9, log: true}", IntDistribution(1, 9, log=True)),
        ("int: [1e1, 1e3]", IntDistribution(10, 1000)),
        ("log_int: [8, 512]", IntDistribution(8, 512, log=True)),
        ("log_int: {low: 8, high: 512}", IntDistribution(8, 512, log=True)),
        ("float: [0, 0.5]", FloatDistribution(0.0, 0.5)),
        ("float: [0, 0.5, 0.1]", FloatDistribution(0.0, 0.5, step=0.1)),
        ("float: {low: 0.1, high: 0.5, log: true}", FloatDistribution(0.1, 0.5, log=True)),
        ("float: {low: 0, high: 1, step: 0.25, log: false}", FloatDistribution(0.0, 1.0, step=0.25)),
        ("log_float: [1e-4, 1e-1]", FloatDistribution(1e-4, 1e-1, log=True)),
        ("log_float: [1.0e-4, 0.1]", FloatDistribution(1e-4, 1e-1, log=True)),
        ("choice: [max, avg]", CategoricalDistribution(("max", "avg"))),
        ("choice: [null, true, 2, 0.5, a]", CategoricalDistribution((None, True, 2, 0.5, "a"))),
        ("choice: [[1, 2], {b: 1, a: é}]", CategoricalDistribution(("[1, 2]", '{"a": "é", "b": 1}'))),
        ("choice: [1e-4, 1e-3]", CategoricalDistribution((1e-4, 1e-3))),
        (
            "{class_path: optuna.distributions.FloatDistribution, init_args: {low: 1e-3, high: 0.5, log: true}}",
            FloatDistribution(1e-3, 0.5, log=True),
        ),
        (
            "{class_path: IntDistribution, init_args: {low: 1, high: 7, step: 2}}",
            IntDistribution(1, 7, step=2),
        ),
        (
            "{class_path: optuna.distributions.CategoricalDistribution, init_args: {choices: [a, [b]]}}",
            CategoricalDistribution(("a", '["b"]')),
        ),
    ],
)
def test_each_form_gives_its_distribution(entry, distribution):
    space = one(**yaml.safe_load(entry))
    assert space.distributions() == {"x": distribution}
    assert space.parameters["x"].path == "x"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("{}", "the space is empty"),
        ("", "the space is empty"),
        ("x: 3", "x is 3 in the space; give a mapping"),
        ("x: {}", "x has no range; give exactly one"),
        ("x: {path: a.b}", "x has no range; give exactly one"),
        ("x: {int: [1, 2], float: [1, 2]}", "x has int and float; give exactly one"),
        ("x: {flot: [1, 2]}", "unknown key 'flot'; did you mean 'float'? known: int, float"),
        ("x: {int: [1, 2], whne: {}}", "unknown key 'whne'; did you mean 'when'?"),
        ("x: {int: [1, 2], path: a..b}", "the path is 'a..b'; give a dotted path"),
        ("x: {int: [1, 2], path: 3}", "the path is 3; give a dotted path"),
        ("x: {int: 3}", "x: int is 3; give [low, high] or [low, high, step]"),
        ("x: {float: [1, 2, 1, 1]}", "give [low, high] or [low, high, step]"),
        ("x: {log_float: [1, 2, 1]}", "x: log_float is [1, 2, 1]; give [low, high]"),
        ("x: {int: {low: 1}}", "x has no high; give it"),
        ("x: {int: {}}", "x has no low and no high; give both"),
        ("x: {int: {low: 1, hihg: 2}}", "unknown argument 'hihg'; did you mean 'high'?"),
        ("x: {int: [6, 2]}", "x: low is 6 and high 2; give a low that is not above high"),
        ("x: {float: [0.5, 0.1]}", "x: low is 0.5 and high 0.1"),
        ("x: {log_float: [0, 1]}", "low is 0.0 on a logarithmic scale; give more than 0"),
        ("x: {float: {low: -1, high: 1, log: true}}", "low is -1.0 on a logarithmic scale"),
        ("x: {log_int: [0, 8]}", "low is 0 on a logarithmic scale; give 1 or more"),
        ("x: {float: {low: 1, high: 2, step: 0.5, log: true}}", "a step of 0.5 on a logarithmic scale"),
        ("x: {log_int: {low: 1, high: 9, step: 2}}", "a step of 2 on a logarithmic scale"),
        ("x: {int: [1, 9, 0]}", "step is 0; give more than 0"),
        ("x: {float: [1, 9, -1]}", "step is -1.0; give more than 0"),
        ("x: {int: [32, 250, 32]}", "steps of 32 from 32 do not meet 250; give 224 or 256 as high"),
        ("x: {float: [0, 1, 0.3]}", "steps of 0.3 from 0.0 do not meet 1.0; give 0.9 or 1.2 as high"),
        ("x: {int: [1.5, 3]}", "low is 1.5, but int is for whole numbers"),
        ("x: {int: [1, true]}", "high is True; give a whole number"),
        ("x: {float: [a, 1]}", "low is 'a'; give a number"),
        ("x: {float: [0, .inf]}", "high is inf; give a number"),
        ("x: {float: [.nan, 1]}", "low is nan; give a number"),
        ("x: {float: {low: 1, high: 2, log: maybe}}", "log is 'maybe'; give true or leave it out"),
        ("x: {log_float: {low: 1, high: 2, log: false}}", "log is False in a log_ form"),
        ("x: {choice: []}", "x: the choice is []; give a list of one value or more"),
        ("x: {choice: max}", "x: the choice is 'max'; give a list of one value or more"),
        ("x: {choice: [a, b, a]}", 'the choice "a" equals an earlier one, "a"'),
        ("x: {choice: [1, true]}", "the choice true equals an earlier one, 1"),
        ("x: {choice: [[1, 2], '[1, 2]']}", "equals an earlier one"),
        ("x: {choice: [.nan]}", "the choice nan cannot be kept"),
        ("x: {choice: [2020-01-01]}", "cannot be kept"),
        ("x: {int: [1, 2], init_args: {}}", "init_args beside int"),
        (
            "x: {class_path: optuna.distributions.UniformDistribution, init_args: {low: 1, high: 2}}",
            "unknown distribution 'optuna.distributions.UniformDistribution'; "
            "did you mean 'optuna.distributions.IntDistribution'?",
        ),
        ("x: {class_path: [1], init_args: {}}", "unknown distribution '[1]'"),
        ("x: {class_path: FloatDistribution}", "has init_args None; give them as a mapping"),
        ("x: {class_path: FloatDistribution, init_args: {low: 1}}", "x has no high"),
        ("x: {class_path: CategoricalDistribution, init_args: {choice: [1]}}", "did you mean 'choices'?"),
        ("x: {class_path: CategoricalDistribution, init_args: {}}", "x has no choices; give it"),
        ("x: {int: [1, 2], when: y}", "when is 'y'; give a mapping"),
        (
            "{x: {int: [1, 2], when: {optimiser: a}}, optimizer: {choice: [a]}}",
            "when has an unknown parameter 'optimiser'; did you mean 'optimizer'?",
        ),
        ("{x: {int: [1, 2], when: {y: []}}, y: {choice: [a]}}", "when has no value for y"),
        (
            "{x: {int: [1, 2], when: {y: [a, c]}}, y: {choice: [a, b]}}",
            'x could not exist: in its when, y is \'c\', but it takes "a", "b"',
        ),
        (
            "{x: {int: [1, 2], when: {y: 9}}, y: {int: [1, 5, 2]}}",
            "y is 9, but it takes whole numbers from 1 to 5 in steps of 2",
        ),
        ("x: {int: [1, 2], when: {x: 1}}", "go round in a circle: x -> x"),
        (
            "{x: {int: [1, 2], when: {y: 1}}, y: {int: [1, 2], when: {z: 1}}, z: {int: [1, 2], when: {y: 2}}}",
            "go round in a circle: y -> z -> y",
        ),
        ("value: {int: [1, 2]}", "called 'value', as a column of trials.csv is; give it another name and path:"),
        ("value_val_loss: {int: [1, 2]}", "as a column of trials.csv is"),
    ],
)
def test_a_wrong_entry_gets_one_sentence(entries, words):
    with pytest.raises(UserError) as caught:
        Space.parse(yaml.safe_load(entries))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_conditional_names_are_absent_and_conditions_come_first():
    space = whole()
    order = list(space.parameters)
    assert order.index("optimizer") < min(order.index(name) for name in ("lr_adamw", "lr_sgd", "nesterov"))
    assert order.index("nesterov") < order.index("momentum")
    seen = set()
    for values in suggestions(space, 60):
        optimizer = values["optimizer"]
        seen.add((optimizer, values.get("nesterov")))
        assert ("lr_adamw" in values) == (optimizer == "AdamW")
        assert ("lr_sgd" in values) == ("nesterov" in values) == (optimizer == "torch.optim.SGD")
        assert ("momentum" in values) == values.get("nesterov", False)
    assert len(seen) == 4


def test_a_condition_may_name_several_values_several_parents_and_structured_ones():
    space = Space.parse(
        yaml.safe_load("""
        n: {int: [1, 3]}
        pools: {choice: [[max], [avg], null]}
        several: {int: [0, 1], when: {n: [1, 3]}}
        both: {int: [0, 1], when: {n: 2, pools: [max]}}
        either: {int: [0, 1], when: {pools: [[max], null]}}
        """)
    )
    seen = set()
    for values in suggestions(space, 60):
        n, pools = values["n"], values["pools"]
        seen.add((n, pools))
        assert ("several" in values) == (n in (1, 3))
        assert ("both" in values) == ((n, pools) == (2, '["max"]'))
        assert ("either" in values) == (pools != '["avg"]')
    assert len(seen) == 9


@pytest.mark.parametrize("form", ["log_float: [1e-4, 1e-1]", "log_int: [1000, 1000000]"])
def test_log_parameters_are_log_uniform(form):
    space = one(**yaml.safe_load(form))
    low, high = space.distributions()["x"].low, space.distributions()["x"].high
    values = [each["x"] for each in suggestions(space, 300)]
    assert stats.kstest(values, stats.loguniform(low, high).cdf).pvalue > 0.05
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue < 1e-6


def test_values_are_plain_numbers_also_where_others_are_enqueued():
    space = Space.parse({"x": {"float": [0, 5]}, "n": {"int": [0, 5]}, "c": {"choice": [1, 2]}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial({"x": 3, "n": 2.0, "c": 2.0})
    values = space.suggest(study.ask())
    assert [(values[name], type(values[name])) for name in "xnc"] == [(3.0, float), (2, int), (2, int)]
    for sampler in (optuna.samplers.TPESampler(seed=0), optuna.samplers.NSGAIISampler(seed=0)):
        for values in suggestions(space, 12, sampler):
            assert [type(values[name]) for name in "xnc"] == [float, int, int]


def test_values_land_at_their_paths_and_the_config_stays_as_it_was():
    space, config = whole(), copy.deepcopy(CONFIG)
    values = {
        "optimizer": "AdamW",
        "lr_adamw": 0.05,
        f"{NETWORK}.filters.0": 96,
        f"{NETWORK}.filters.1": 9,
        "pools": '["avg", "avg"]',
        "data.init_args.batch_size": 32,
    }
    applied = space.apply(config, values)
    assert config == CONFIG
    assert at(applied, NETWORK) == {"filters": [96, 9], "pools": ["avg", "avg"]}
    assert at(applied, "data.init_args.batch_size") == 32
    # the same class by the last part of its name: arguments and the full name stay
    assert at(applied, OPTIMIZER) == {
        "class_path": "torch.optim.adamw.AdamW",
        "init_args": {"lr": 0.05, "weight_decay": 0.01, "fused": True},
    }
    assert applied["trainer"] == CONFIG["trainer"]
    at(applied, NETWORK)["pools"].append("x")
    assert at(space.apply(config, values), NETWORK)["pools"] == ["avg", "avg"]


def test_another_class_starts_from_its_own_defaults():
    space = whole()
    config = copy.deepcopy(CONFIG)
    at(config, OPTIMIZER)["dict_kwargs"] = {"foreach": True}
    applied = space.apply(config, {"optimizer": "torch.optim.RMSprop"})
    assert at(applied, OPTIMIZER) == {"class_path": "torch.optim.RMSprop"}
    applied = space.apply(config, {"lr_sgd": 0.5, "nesterov": False, "optimizer": "torch.optim.SGD"})
    assert at(applied, OPTIMIZER) == {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "nesterov": False}}


def test_a_class_that_no_choice_names_is_another_class():
    config = copy.deepcopy(CONFIG)
    at(config, OPTIMIZER)["class_path"] = "torch.optim.adam.Adam"
    space = whole()
    assert "optimizer" not in space.values_in(config)
    assert at(space.apply(config, {"optimizer": "AdamW"}), OPTIMIZER) == {"class_path": "AdamW"}


def test_names_of_classes_are_compared_as_a_whole_where_the_last_parts_are_the_same():
    space = Space.parse({"model.class_path": {"choice": ["a.Net", "b.Net"]}})
    config = {"model": {"class_path": "a.Net", "init_args": {"width": 3}}}
    assert space.values_in(config) == {"model.class_path": "a.Net"}
    assert space.apply(config, {"model.class_path": "a.Net"}) == config
    assert space.apply(config, {"model.class_path": "b.Net"}) == {"model": {"class_path": "b.Net"}}
    assert space.values_in({"model": {"class_path": "c.Net"}}) == {}


def test_true_is_not_one():
    assert one(choice=[True, False]).values_in({"x": 1}) == one(choice=[0, 1]).values_in({"x": True}) == {}
    assert one(int=[0, 1]).values_in({"x": True}) == one(float=[0, 1]).values_in({"x": False}) == {}
    assert one(choice=[True, False]).values_in({"x": True}) == {"x": True}


def test_only_paths_that_end_in_class_path_are_names_of_classes():
    space = Space.parse({"file": {"choice": ["a.npz", "b.csv"]}})
    assert space.values_in({"file": "c.npz"}) == {}


def test_what_is_above_a_path_is_made():
    space = Space.parse({f"a.b.{index}.c": {"int": [0, 99]} for index in range(11)} | {"d.e": {"choice": [None]}})
    values = {f"a.b.{index}.c": index for index in range(11)} | {"d.e": None}
    made = {"a": {"b": [{"c": index} for index in range(11)]}, "d": {"e": None}}
    assert space.apply({}, values) == made
    assert space.apply({"a": None, "d": None}, dict(reversed(values.items()))) == made


def test_list_elements_are_changed_and_appended_and_gaps_are_refused():
    space = Space.parse({f"net.filters.{index}": {"int": [1, 9]} for index in range(4)})
    config = {"net": {"filters": [7, 8]}}
    assert space.apply(config, {"net.filters.1": 1})["net"]["filters"] == [7, 1]
    assert space.apply(config, {"net.filters.3": 4, "net.filters.2": 3})["net"]["filters"] == [7, 8, 3, 4]
    with pytest.raises(UserError, match=r"net\.filters\.3 would leave a gap, since net\.filters has 2 elements"):
        space.apply(config, {"net.filters.3": 4})


@pytest.mark.parametrize(
    ("path", "config", "words"),
    [
        ("a.0", {"a": 3}, "a.0 needs a list at a, but the run has 3 there"),
        ("a.b.c", {"a": {"b": "AdamW"}}, "a.b.c needs a mapping at a.b, but the run has 'AdamW' there"),
        ("a.b", {"a": [1]}, r"a.b needs a mapping at a, but the run has \[1\] there"),
    ],
)
def test_a_path_through_a_value_is_refused(path, config, words):
    space = Space.parse({path: {"int": [0, 1]}})
    with pytest.raises(UserError, match=words):
        space.apply(config, {path: 1})
    assert space.values_in(config) == {}


def test_a_choice_of_a_whole_object_may_be_refined_below():
    entries = {
        "net.depth.value": {"int": [1, 9]},
        "net": {"choice": [{"class_path": "A", "depth": {"value": 0}}, {"class_path": "B"}]},
    }
    space = Space.parse(entries)
    values = space.encode({"net": {"class_path": "A", "depth": {"value": 0}}, "net.depth.value": 5})
    assert space.apply({}, values) == {"net": {"class_path": "A", "depth": {"value": 5}}}
    assert space.parameters["net"].choices[0] == {"class_path": "A", "depth": {"value": 0}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimiser": "AdamW"}, "unknown parameter 'optimiser'; did you mean 'optimizer'?"),
        ({"optimizer": "Adam"}, "optimizer is 'Adam', but it takes \"AdamW\""),
        ({f"{NETWORK}.filters.0": 33}, "is 33, but it takes whole numbers from 32 to 256 in steps of 32"),
        ({f"{NETWORK}.filters.1": 9.5}, "is 9.5, but it takes whole numbers from 8 to 512;"),
        ({f"{NETWORK}.filters.1": True}, "is True, but it takes whole numbers"),
        ({"data.init_args.batch_size": "32"}, "is '32', but it takes 32, 64"),
        ({"optimizer": "AdamW", "lr_adamw": 0.5}, "lr_adamw is 0.5, but it takes numbers from 0.0001 to 0.1;"),
        ({"optimizer": "AdamW", "lr_sgd": 0.5}, "lr_sgd is 0.5, but it exists only when"),
        ({"lr_sgd": 0.5}, "lr_sgd is 0.5, but it exists only when"),
        ({"optimizer": "AdamW", "lr_adamw": 0.05, "lr_sgd": 0.5}, "lr_sgd is 0.5, but it exists only when"),
    ],
)
def test_values_that_the_space_does_not_have_are_refused(values, words):
    with pytest.raises(UserError) as caught:
        whole().apply(CONFIG, values)
    assert words in str(caught.value)


SHARED = """
c: {choice: [a, b, d]}
e: {int: [1, 9], when: {c: a}}
one: {int: [1, 2], path: p.q, when: %s}
two: {int: [3, 4], path: p.q, when: %s}
"""


@pytest.mark.parametrize(
    ("first", "second", "excluded"),
    [
        ("{c: a}", "{c: b}", True),
        ("{c: [a, b]}", "{c: d}", True),
        ("{e: 1}", "{c: b}", True),  # e exists only with a
        ("{e: 1}", "{e: [2, 3], c: a}", True),
        ("{e: [1, 2]}", "{e: [2, 3]}", False),
        ("{c: [a, b]}", "{c: [b, d]}", False),
        ("{e: 1}", "{c: a}", False),
        ("null", "{c: a}", False),
        ("null", "null", False),
    ],
)
def test_two_parameters_share_a_path_only_when_their_conditions_exclude_each_other(first, second, excluded):
    entries = yaml.safe_load(SHARED % (first, second))
    if not excluded:
        with pytest.raises(UserError, match=r"one and two could both set p\.q in one trial"):
            Space.parse(entries)
        return
    space, seen = Space.parse(entries), set()
    for values in suggestions(space, 300):
        assert not {"one", "two"} <= values.keys()
        seen |= values.keys()
    assert {"one", "two"} <= seen


def test_the_values_of_a_config_are_found():
    assert whole().values_in(CONFIG) == {
        "optimizer": "AdamW",
        "lr_adamw": 0.003,
        f"{NETWORK}.filters.0": 64,
        f"{NETWORK}.filters.1": 128,
        "pools": '["max", "none"]',
        "data.init_args.batch_size": 64,
    }


def test_values_outside_or_missing_are_left_out_with_what_hangs_on_them():
    config = copy.deepcopy(CONFIG)
    at(config, NETWORK)["filters"] = [65]
    del at(config, NETWORK)["pools"]
    at(config, OPTIMIZER)["class_path"] = "SGD"
    at(config, OPTIMIZER)["init_args"] = {"lr": 5, "momentum": 0.6}
    # nesterov is not in the config, so that nobody knows whether momentum is a parameter; lr is above the range
    assert whole().values_in(config) == {"optimizer": "torch.optim.SGD", "data.init_args.batch_size": 64}
    assert whole().values_in({}) == {}


def test_an_enqueued_config_gives_its_values_back():
    space = whole()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(space.values_in(CONFIG))
    assert space.suggest(study.ask()) == space.values_in(CONFIG)


def drawn_config(generator):
    """A config whose values the space may know or not, or that has nothing at a path."""
    config = copy.deepcopy(CONFIG)
    optimizer, network = at(config, OPTIMIZER), at(config, NETWORK)
    optimizer["class_path"] = generator.choice(
        ["AdamW", "torch.optim.adamw.AdamW", "SGD", "torch.optim.sgd.SGD", "torch.optim.RMSprop", "Adam"]
    )
    optimizer["init_args"] = {
        "lr": generator.choice([0, 1, 0.5, 0.01, 0.0001]),
        "nesterov": generator.choice([True, False, 1, None]),
        "momentum": generator.choice([0, 0.3, 0.6, 0.6000000001, 0.5]),
    }
    network["filters"] = [generator.choice([32, 33, 64.0, 256]) for _ in range(generator.randrange(4))]
    network["pools"] = generator.choice([None, ["max", "none"], ["max"], ["avg", "avg"], "max"])
    for holder, key in ((optimizer, "init_args"), (network, "filters"), (network, "pools"), (config, "data")):
        if generator.random() < 0.1:
            del holder[key]
    return config


def test_a_config_with_its_own_values_is_itself():
    generator, space, seen = random.Random(0), whole(), set()
    for _ in range(500):
        config = drawn_config(generator)
        values = space.values_in(config)
        seen |= values.keys()
        assert space.apply(config, values) == config
    assert seen == space.parameters.keys()


def test_suggested_values_come_back_from_the_config_and_configs_are_clean_yaml():
    space = whole()
    for values in suggestions(space, 100):
        applied = space.apply(CONFIG, values)
        assert space.values_in(applied) == values
        assert yaml.safe_load(yaml.safe_dump(applied)) == applied
        assert space.apply(CONFIG, space.encode(values)) == applied


def test_values_as_written_are_encoded_once():
    space = whole()
    written = {"pools": ["avg", "avg"], "optimizer": "SGD", f"{NETWORK}.filters.0": 64.0}
    encoded = {"pools": '["avg", "avg"]', "optimizer": "torch.optim.SGD", f"{NETWORK}.filters.0": 64}
    assert space.encode(written) == space.encode(encoded) == encoded
    assert space.encode({"pools": None}) == {"pools": None}
    parameter = space.parameters["pools"]
    assert [parameter.decode(choice) for choice in parameter.distribution.choices] == list(parameter.choices)


def test_a_grid_has_all_values():
    space = Space.parse(
        yaml.safe_load("""
        n: {int: [2, 6, 2]}
        x: {float: [0, 0.3, 0.1]}
        fixed: {float: [0.5, 0.5]}
        k: {choice: [a, [1]]}
        """)
    )
    grid = space.grid()
    assert grid == {"n": [2, 4, 6], "x": [0.0, 0.1, 0.2, 0.3], "fixed": [0.5], "k": ["a", "[1]"]}
    study = optuna.create_study(sampler=optuna.samplers.GridSampler(grid, seed=0))
    study.optimize(lambda trial: space.suggest(trial)["n"], n_trials=100)
    points = {tuple(trial.params[name] for name in grid) for trial in study.trials}
    assert len(study.trials) == len(points) == 24
    assert points == set(itertools.product(*grid.values()))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("x: {float: [0, 1]}", "x takes numbers from 0.0 to 1.0, which are without end; give it a step"),
        ("{x: {int: [0, 1], when: {y: 1}}, y: {choice: [1, 2]}}", "x is conditional.*; use BruteForceSampler"),
    ],
)
def test_a_grid_without_end_or_with_conditions_is_refused(entries, words):
    with pytest.raises(UserError, match=words):
        Space.parse(yaml.safe_load(entries)).grid()


def test_a_description_goes_through_yaml_and_back():
    space = whole()
    described = yaml.safe_load(yaml.safe_dump(space.describe()))
    again = Space.parse(described)
    assert described == space.describe() == again.describe()
    assert again.distributions() == space.distributions()
    assert [again.parameters[name] for name in space.parameters] == list(space.parameters.values())
    assert differences(described, space.describe()) is None


def test_a_description_equals_what_a_study_keeps_of_it():
    space = Space.parse({"x": {"choice": [{1: (2, 3)}, {"a": 1}]}, "y": {"int": [1, 2], "when": {"x": {"a": 1}}}})
    study = optuna.create_study(storage="sqlite:///:memory:")
    study.set_user_attr("space", space.describe())
    assert study.user_attrs["space"] == space.describe()
    assert differences(study.user_attrs["space"], space.describe()) is None


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ("{x: {int: [1, 4]}, y: {choice: [a, b]}}", 'with {"int": {"high": 3, "low": 1}} for x, now it is'),
        ("{y: {choice: [a, b]}}", 'with {"int": {"high": 3, "low": 1}} for x, now it is nothing;'),
        ("{x: {int: [1, 3]}, y: {choice: [b, a]}}", 'for y, now it is {"choice": ["b", "a"]};'),
        ("{x: {int: [1, 3], path: z}, y: {choice: [a, b]}}", 'now it is {"int": {"high": 3, "low": 1}, "path": "z"}'),
        ("{x: {int: [1, 3], when: {y: a}}, y: {choice: [a, b]}}", '"when": {"y": ["a"]}'),
        ("{x: {int: [1, 3]}, y: {choice: [a, b]}, z: {int: [0, 1]}}", "with nothing for z, now it is"),
    ],
)
def test_the_first_difference_is_told_with_both_forms(now, words):
    before = Space.parse(yaml.safe_load("{x: {int: [1, 3]}, y: {choice: [a, b]}}")).describe()
    sentence = differences(before, Space.parse(yaml.safe_load(now)).describe())
    assert words in sentence
