"""What a person should read about the data, one sentence each."""

from collections.abc import Sequence

from lightning_automl.auto.facts import Facts

#: With fewer images or groups of a class in the test split nothing conclusive can be said about it.
CONCLUSIVE = 10
#: With fewer images or groups of a class outside the test split every choice is uncertain.
FEW = 20
#: Largest class to smallest from which on accuracy alone misleads.
IMBALANCED = 2.0

_SHOWN = 3


def notes_of(facts: Facts, tested: Sequence[int], *, compared: bool = True, ignored: Sequence[str] = ()) -> list[str]:
    """The sentences of ``facts.notes``.

    Args:
        facts: All else.
        tested: Images, or groups, ``(classes,)`` of each class of the test split.
        compared: Whether nearly equal images were looked for.
        ignored: Arguments of a data module that are not followed.
    """
    sentences = [_splits(facts), _broken(facts), _groups(facts), _few(facts), _imbalance(facts), _tested(facts, tested)]
    sentences += [_exact(facts), _near(facts, compared)]
    if facts.deep:
        sentences.append(
            "The images have more than 8 bits; they are windowed to 8 by the 0.5 and 99.5 percentile of the train "
            "split."
        )
    if ignored:
        sentences.append(f"{_listed(ignored)} of the data module {_verb(ignored)} not followed: every arm has its own.")
    return [sentence for sentence in sentences if sentence]


def _splits(facts: Facts) -> str:
    if not facts.official_splits:
        return ""
    cut = [split for split in ("val", "test") if split not in facts.official_splits]
    brought = [split for split in facts.official_splits if split != "train" or not cut]
    if not brought or brought == ["train"]:
        return ""
    kept = f"The {_listed(brought)} split{'s' * (len(brought) > 1)} that the data bring {_verb(brought)} kept"
    return kept + (f"; {_listed(cut)} {_verb(cut)} cut off from train." if cut else ".")


def _broken(facts: Facts) -> str:
    if not facts.broken:
        return ""
    shown = "; ".join(f"{file} ({reason})" for file, reason in facts.broken[:_SHOWN])
    more = f"; and {len(facts.broken) - _SHOWN} more" if len(facts.broken) > _SHOWN else ""
    files = (
        "1 file that cannot be read is"
        if len(facts.broken) == 1
        else f"{len(facts.broken)} files that cannot be read are"
    )
    return f"{files} left out: {shown}{more}."


def _groups(facts: Facts) -> str:
    if facts.groups is None:
        return (
            "No groups were given: intervals assume independent images. If several are of one patient or thing, say "
            "so in the column group of labels.csv, or in the _groups of an .npz."
        )
    if facts.groups == facts.images:
        return "Every image is a group of its own: intervals assume independent images."
    return f"The {facts.images} images are of {facts.groups} groups; no group is in two splits or folds."


def _few(facts: Facts) -> str:
    if (least := min(facts.units)) >= FEW:
        return ""
    name = facts.class_names[facts.units.index(least)]
    return (
        f"Class {name!r} has only {_count(least, facts.unit)} outside the test split: what is chosen on so few is "
        "uncertain."
    )


def _imbalance(facts: Facts) -> str:
    if facts.imbalance < IMBALANCED:
        return ""
    train = facts.counts["train"]
    large, small = (facts.class_names[train.index(choose(train))] for choose in (max, min))
    return (
        f"Class {large!r} has {facts.imbalance:.1f} times as many train images as {small!r}: accuracy alone says "
        "little about the rare one."
    )


def _tested(facts: Facts, tested: Sequence[int]) -> str:
    rare = [number for number, count in enumerate(tested) if count < CONCLUSIVE]
    if not rare:
        return ""
    told = [f"{facts.class_names[number]!r} ({_count(tested[number], facts.unit)})" for number in rare[:_SHOWN]]
    told += [f"{len(rare) - _SHOWN} more"] * (len(rare) > _SHOWN)
    return (
        f"The test split has fewer than {CONCLUSIVE} {facts.unit}s of {_listed(told)}: what it says about "
        f"{'this class' if len(rare) == 1 else 'these classes'} is not conclusive."
    )


def _exact(facts: Facts) -> str:
    number = facts.exact_duplicate_count
    if not number:
        return ""
    equal = _images(number, "equals", "equal")
    return f"{equal} one of another split{_pairs(facts.exact_duplicates)}: {_consequence(facts)}"


def _near(facts: Facts, compared: bool) -> str:
    if not compared:
        return "There are too many images to look for nearly equal ones in different splits."
    number = facts.near_duplicate_count
    if not number:
        return ""
    looks = _images(number, "looks nearly like", "look nearly like")
    return f"{looks} one of another split{_pairs(facts.near_duplicates)}: {_consequence(facts)}"


def _consequence(facts: Facts) -> str:
    told = "the results will look better than they are"
    return f"{told}." if facts.official_splits else f"{told}; with one group for both they would stay together."


def _images(number: int, one: str, many: str) -> str:
    return f"1 image of val or test {one}" if number == 1 else f"{number} images of val or test {many}"


def _pairs(pairs: Sequence[Sequence[str]]) -> str:
    return " (" + "; ".join(" and ".join(pair) for pair in pairs[:_SHOWN]) + ", …" * (len(pairs) > _SHOWN) + ")"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"


def _verb(things: Sequence[str]) -> str:
    return "is" if len(things) == 1 else "are"


def _listed(things: Sequence[str]) -> str:
    return " and ".join([", ".join(things[:-1]), things[-1]] if things[1:] else things)
