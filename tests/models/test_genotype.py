import itertools
import json
from collections import Counter, namedtuple
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

from lightning_automl.models.derivation import cell_edges, strongest
from lightning_automl.models.genotype import PUBLISHED, Genotype, load_genotype, random_genotype, space_size
from lightning_automl.models.ops import DARTS_OPERATIONS, NASBENCH201_OPERATIONS
from lightning_automl.rundir import UserError

# As they stand in genotypes.py of https://github.com/quark0/darts and https://github.com/yuhuixu1993/PC-DARTS.
AUTHORS = {
    "darts_v1": "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), "
    "('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], normal_concat=[2, 3, 4, 5], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])",
    "darts_v2": "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])",
    "pc_darts_cifar": "Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), "
    "('dil_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), ('dil_conv_3x3', 1)], "
    "normal_concat=range(2, 6), reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), "
    "('sep_conv_5x5', 2), ('sep_conv_3x3', 0), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], "
    "reduce_concat=range(2, 6))",
    "pc_darts_imagenet": "Genotype(normal=[('skip_connect', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 0), "
    "('skip_connect', 1), ('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('dil_conv_5x5', 4)], "
    "normal_concat=range(2, 6), reduce=[('sep_conv_3x3', 0), ('skip_connect', 1), ('dil_conv_5x5', 2), "
    "('max_pool_3x3', 1), ('sep_conv_3x3', 2), ('sep_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 3)], "
    "reduce_concat=range(2, 6))",
}
NASBENCH201 = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|none~1|nor_conv_1x1~2|"
SMALL = Genotype(
    normal=[[("skip_connect", 0), ("skip_connect", 1)], [("sep_conv_3x3", 2), ("skip_connect", 0)]],
    normal_concat=[2, 3],
    operations=["none", "skip_connect", "sep_conv_3x3"],
)


def cells(inputs, sizes, operations):
    """Every cell with so many edges a node, counted out."""
    nodes = [
        [
            tuple(zip(names, sources, strict=True))
            for sources in itertools.combinations(range(number), size)
            for names in itertools.product(operations, repeat=size)
        ]
        for number, size in enumerate(sizes, inputs)
    ]
    return list(itertools.product(*nodes))


# Forms


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_genotypes_are_those_of_the_authors(name):
    found = load_genotype(name)
    assert found == load_genotype(AUTHORS[name])
    assert found.digest() == load_genotype(AUTHORS[name]).digest()
    for kind in ("normal", "reduce"):
        assert [len(node) for node in found.nodes(kind)] == [2, 2, 2, 2]
    assert found.normal_concat == found.reduce_concat == (2, 3, 4, 5)


def test_published_genotypes_differ():
    assert len({genotype.digest() for genotype in PUBLISHED.values()}) == len(PUBLISHED)


@pytest.mark.parametrize(
    "genotype",
    [*PUBLISHED.values(), SMALL, load_genotype(NASBENCH201), *(random_genotype(SMALL, seed) for seed in range(3))],
    ids=str,
)
def test_it_comes_back_from_json_as_it_was(genotype, tmp_path):
    path = tmp_path / "run" / "genotype.json"
    genotype.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["genotype.json"]
    for source in (path, str(path), path.parent, str(path.parent), json.loads(path.read_text()), genotype):
        found = load_genotype(source)
        assert found == genotype
        assert hash(found) == hash(genotype)
        assert found.digest() == genotype.digest()


def test_the_file_says_what_it_is(tmp_path):
    SMALL.save(tmp_path / "genotype.json")
    assert json.loads((tmp_path / "genotype.json").read_text()) == {
        "version": 1,
        "normal": [[["skip_connect", 0], ["skip_connect", 1]], [["sep_conv_3x3", 2], ["skip_connect", 0]]],
        "normal_concat": [2, 3],
        "reduce": [],
        "reduce_concat": [],
        "inputs": 2,
        "operations": ["none", "skip_connect", "sep_conv_3x3"],
    }


def test_the_authors_flat_cells_have_two_edges_a_node():
    expected = PUBLISHED["darts_v2"].to_dict()
    flat = {kind: [edge for node in expected[kind] for edge in node] for kind in ("normal", "reduce")}
    flat |= {key: expected[key] for key in ("normal_concat", "reduce_concat")}
    assert load_genotype(flat) == PUBLISHED["darts_v2"]
    assert load_genotype(namedtuple("Genotype", flat)(**flat)) == PUBLISHED["darts_v2"]


def test_operations_beyond_those_of_darts_are_added_to_what_could_have_been_chosen():
    found = load_genotype({"normal": [["sep_conv_7x7", 0], ["conv_7x1_1x7", 1]], "normal_concat": [2]})
    assert found.operations == (*DARTS_OPERATIONS, "sep_conv_7x7", "conv_7x1_1x7")


def test_the_notation_of_nas_bench_201():
    found = load_genotype(NASBENCH201)
    assert found == Genotype(
        normal=(
            (("nor_conv_3x3", 0),),
            (("none", 0), ("skip_connect", 1)),
            (("avg_pool_3x3", 0), ("none", 1), ("nor_conv_1x1", 2)),
        ),
        normal_concat=(3,),
        inputs=1,
        operations=NASBENCH201_OPERATIONS,
    )
    assert str(found) == (
        "normal: 1 = nor_conv_3x3(0), 2 = none(0) + skip_connect(1), "
        "3 = avg_pool_3x3(0) + none(1) + nor_conv_1x1(2), out 3"
    )


def test_it_is_printed_as_a_line_a_cell():
    first, second = str(PUBLISHED["darts_v2"]).split("\n")
    assert first == (
        "normal: 2 = sep_conv_3x3(0) + sep_conv_3x3(1), 3 = sep_conv_3x3(0) + sep_conv_3x3(1), "
        "4 = sep_conv_3x3(1) + skip_connect(0), 5 = skip_connect(0) + dil_conv_3x3(2), out 2 3 4 5"
    )
    assert second.startswith("reduce: 2 = max_pool_3x3(0) + max_pool_3x3(1), 3 = skip_connect(2)")


def test_skips_are_counted_by_kind():
    assert [PUBLISHED["darts_v2"].skips(kind) for kind in ("normal", "reduce")] == [2, 3]
    assert [SMALL.skips(kind) for kind in ("normal", "reduce")] == [3, 0]


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        SMALL.inputs = 1


# Digest


def test_the_digest_is_that_of_the_architecture():
    given = SMALL.to_dict()
    swapped = given | {"normal": [given["normal"][0], given["normal"][1][::-1]]}
    other = given | {"normal": [given["normal"][0], [["sep_conv_3x3", 1], ["skip_connect", 0]]]}
    for same in (swapped, given | {"operations": DARTS_OPERATIONS}):
        assert load_genotype(same) != SMALL
        assert load_genotype(same).digest() == SMALL.digest()
    for different in (other, given | {"normal_concat": [3]}, given | {"reduce": given["normal"], "reduce_concat": [2]}):
        assert load_genotype(different).digest() != SMALL.digest()


def test_the_digest_stays_the_same_in_later_releases():
    assert PUBLISHED["darts_v2"].digest() == "83c8da4c51de5411"


# Mistakes

WHOLE = {"normal": [[["sep_conv_3x3", 0], ["skip_connect", 1]]], "normal_concat": [2]}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"normal": [[["sep_conv_3x", 0]]]}, "unknown operation 'sep_conv_3x'; did you mean sep_conv_3x3"),
        ({"normal": [[["skip_connect", 2]]]}, "node 2 of the normal cell has the source 2; .* from 0 to 1"),
        ({"normal": [[["skip_connect", -1]]]}, "the source -1"),
        ({"normal": [[["skip_connect", True]]]}, "the source True"),
        ({"normal": [[["skip_connect", "0"]]]}, "the source '0'"),
        ({"normal": [[["skip_connect", 0], ["none", 0]]]}, "node 2 .* has two edges from one source"),
        ({"normal": [[["skip_connect", 0, 1]]]}, "has the edge .* an edge is an operation and its source"),
        ({"normal": [[["skip_connect"], 0]]}, r"has the edge \['skip_connect'\]"),
        ({"normal": [["skip_connect"]]}, "a flat list of 1 edges"),
        ({"normal": [[[["skip_connect"], 0]]]}, r"unknown operation \['skip_connect'\]"),
        ({"normal": [7]}, "a node of a genotype is 7; give a list"),
        ({"normal": [[["skip_connect", 0]], []], "operations": ["skip_connect"]}, "node 3 .* has no edge"),
        ({"normal": []}, "normal of a genotype is empty"),
        ({"normal": "sep_conv_3x3"}, "normal of a genotype is 'sep_conv_3x3'; give a list"),
        ({"normal": 3}, "normal of a genotype is 3; give a list"),
        ({"normal": [["skip_connect", 0]] * 3}, "a flat list of 3 edges; .* an even number"),
        ({"reduce": [[["skip_connect", 5]]], "reduce_concat": [2]}, "node 2 of the reduce cell has the source 5"),
        ({"normal_concat": [3]}, "normal_concat of a genotype has 3; .* from 2 to 2"),
        ({"normal_concat": [1]}, "normal_concat of a genotype has 1"),
        ({"normal_concat": [2, 2]}, "give each node once"),
        ({"normal_concat": []}, "normal_concat of a genotype is empty"),
        ({"normal_concat": 2}, "normal_concat of a genotype is 2; give a list"),
        ({"reduce_concat": [2]}, "reduce_concat of a genotype has 2; .* no such cell"),
        ({"inputs": 0}, "inputs of a genotype is 0"),
        ({"inputs": "2"}, "inputs of a genotype is '2'"),
        ({"operations": ["sep_conv_3x3"]}, "node 2 .* 'skip_connect', which is not among the operations sep_conv_3x3"),
        ({"operations": ["mine"]}, "unknown operation 'mine'"),
        ({"operations": "none"}, "operations of a genotype is 'none'; give a list"),
        ({"version": 2}, "has the version 2, and this release reads version 1"),
        ({"normal_conat": [2]}, "unknown key 'normal_conat'; did you mean normal_concat"),
    ],
)
def test_what_is_no_genotype_is_refused_with_the_place(changes, told, tmp_path):
    load_genotype(WHOLE)
    with pytest.raises(UserError, match=told):
        load_genotype(WHOLE | changes)
    path = tmp_path / "found.json"
    path.write_text(json.dumps(WHOLE | changes))
    with pytest.raises(UserError, match=told) as caught:
        load_genotype(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", WHOLE)
def test_a_missing_part_is_named(missing):
    with pytest.raises(UserError, match=f"a genotype lacks {missing};"):
        load_genotype({key: value for key, value in WHOLE.items() if key != missing})


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("dart_v2", "no genotype is called 'dart_v2' and there is no such file; did you mean darts_v2"),
        ("", "has no genotype.json; give the run directory of an architecture search"),
        ("x" * 5000, "no genotype is called"),
        ("a\0b", "no genotype is called"),
        (3, "3 is no genotype; give a genotype.json"),
        (None, "None is no genotype"),
        ("|nor_conv_3x3~0|+|none|", "'none' is not an operation and its source"),
        ("|nor_conv_3x3~0|+||", "'' is not an operation and its source"),
        ("|nor_conv_3x3~1|", "has the source 1"),
        ("|nor_conv~0|", "unknown operation 'nor_conv'"),
        ("Genotype(normal=[('skip_connect', 0)", "beginning with .* cannot be read"),
        ("Genotype(normal=open('x'), normal_concat=[2])", "beginning with .* cannot be read"),
        ("Genotype(normal_concat=range(2, 6))", "a genotype lacks normal"),
    ],
)
def test_a_source_that_does_not_exist_is_refused_with_what_there_is(source, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told) as caught:
        load_genotype(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b'"darts_v2"', b"3"])
def test_a_file_that_is_no_genotype_is_refused_by_its_name(content, tmp_path):
    (tmp_path / "genotype.json").write_bytes(content)
    for source in (tmp_path, tmp_path / "genotype.json"):
        with pytest.raises(UserError, match=r"genotype\.json (cannot be read as JSON|is no genotype)"):
            load_genotype(source)


# Random genotypes


def test_a_cell_of_darts_is_one_of_1037664180():
    assert space_size(PUBLISHED["darts_v2"]) == space_size(PUBLISHED["pc_darts_cifar"], "reduce") == 1_037_664_180
    assert space_size(load_genotype(NASBENCH201)) == 5**6  # Dong and Yang 2020: 15,625


@pytest.mark.parametrize(
    ("inputs", "sizes", "operations"),
    [
        (2, (2, 2), ("none", "skip_connect", "sep_conv_3x3")),
        (2, (2, 2), ("skip_connect", "sep_conv_3x3", "dil_conv_3x3")),
        (2, (1, 3), ("skip_connect", "none")),
        (2, (2,), DARTS_OPERATIONS),
        (1, (1, 2), ("none", "skip_connect", "nor_conv_1x1")),
        (1, (1, 1), ("none", "skip_connect", "nor_conv_1x1")),
    ],
)
def test_the_size_of_a_space_is_what_counting_its_cells_gives(inputs, sizes, operations):
    keeps_none = inputs == 1 and sizes == (1, 2)
    counted = cells(inputs, sizes, [name for name in operations if keeps_none or name != "none"])
    like = Genotype(normal=counted[0], normal_concat=[inputs], inputs=inputs, operations=operations)
    assert space_size(like) == len(counted) == len(set(counted))
    concat = {"normal_concat": [inputs], "inputs": inputs, "operations": operations}
    assert len({Genotype(normal=cell, **concat).digest() for cell in counted}) == len(counted)
    drawn = {random_genotype(like, seed).normal for seed in range(200)}
    assert drawn <= set(counted)


def test_every_cell_that_can_be_derived_is_in_the_counted_space_and_every_counted_one_can_be():
    edges, operations = cell_edges(2, 2), SMALL.operations
    counted = {tuple(frozenset(node) for node in cell) for cell in cells(2, (2, 2), operations[1:])}
    generator = torch.Generator().manual_seed(0)
    derived = set()
    for _ in range(2000):
        cell = strongest(torch.randn(5, 3, generator=generator).softmax(1), edges, operations)
        derived.add(tuple(frozenset(node) for node in cell))
    assert derived == counted


@pytest.mark.parametrize("like", [SMALL, load_genotype("|none~0|+|none~0|none~1|")], ids=str)
def test_random_genotypes_are_uniform_over_their_space(like):
    draws = 20 * space_size(like)
    counts = Counter(random_genotype(like, seed).normal for seed in range(draws))
    assert len(counts) == space_size(like)
    assert chisquare(list(counts.values())).pvalue > 0.01


def test_each_kind_of_cell_is_drawn_with_its_own_numbers_of_edges():
    like = replace(SMALL, reduce=(SMALL.normal[0][:1], SMALL.normal[1], SMALL.normal[1]), reduce_concat=(3, 4))
    for seed in range(20):
        drawn = random_genotype(like, seed)
        assert [len(node) for node in drawn.reduce] == [1, 2, 2]
        assert drawn.reduce_concat == (3, 4)


def test_both_cells_are_drawn_and_independently():
    like = replace(SMALL, reduce=SMALL.normal, reduce_concat=(2, 3))
    pairs = [random_genotype(like, seed) for seed in range(500)]
    equal = sum(pair.normal == pair.reduce for pair in pairs)
    assert 0 < equal < 4 * 500 / space_size(like)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_random_genotype_is_of_the_same_space_and_reproducible(name):
    like = PUBLISHED[name]
    drawn = [random_genotype(like, seed) for seed in range(50)]
    assert drawn == [random_genotype(like, seed) for seed in range(50)]
    assert len({genotype.digest() for genotype in drawn}) == 50
    for genotype in drawn:
        assert (genotype.normal_concat, genotype.inputs) == (like.normal_concat, like.inputs)
        assert genotype.operations == like.operations
        for kind in ("normal", "reduce"):
            assert [len(node) for node in genotype.nodes(kind)] == [len(node) for node in like.nodes(kind)]
            assert all(name != "none" for node in genotype.nodes(kind) for name, _ in node)


def test_what_a_seed_gives_stays_the_same_on_every_platform():
    assert str(random_genotype(PUBLISHED["darts_v2"], 7)).split("\n") == [
        "normal: 2 = sep_conv_5x5(0) + max_pool_3x3(1), 3 = max_pool_3x3(0) + sep_conv_3x3(1), "
        "4 = max_pool_3x3(0) + max_pool_3x3(2), 5 = max_pool_3x3(2) + avg_pool_3x3(4), out 2 3 4 5",
        "reduce: 2 = sep_conv_5x5(0) + skip_connect(1), 3 = dil_conv_5x5(0) + skip_connect(2), "
        "4 = skip_connect(0) + dil_conv_3x3(1), 5 = sep_conv_5x5(0) + skip_connect(3), out 2 3 4 5",
    ]


def test_a_random_genotype_of_a_random_one_is_that_of_the_first():
    assert random_genotype(random_genotype(SMALL, 1), 2) == random_genotype(SMALL, 2)


def test_a_negative_seed_and_a_space_of_nothing_are_refused():
    with pytest.raises(UserError, match="the seed of a random genotype is -1"):
        random_genotype(SMALL, -1)
    like = Genotype(normal=[[("none", 0)]], normal_concat=[2], operations=["none"])
    with pytest.raises(UserError, match="no space to draw from"):
        random_genotype(like, 0)
