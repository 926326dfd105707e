"""Facts as the look at some data gives them, for tests of what follows from them."""

from dataclasses import replace

from lightning_automl.augment.spaces import SPACES
from lightning_automl.auto.facts import Facts


def seen(
    train=(122,) * 10,
    val=(21,) * 10,
    test=(36,) * 10,
    *,
    data=None,
    size=8,
    channels=1,
    modality="natural",
    folds=None,
    **others,
):
    """Facts of images that are each a unit of its own; the digits when nothing is given."""
    units = [sum(both) for both in zip(train, val, strict=True)]
    folds = folds or min(5, *units)
    apart = 2 if folds == 5 else 1
    space = SPACES[modality]
    facts = Facts(
        data=data or {"class_path": "DigitsDataModule", "init_args": {}},
        images=sum((*train, *val, *test)),
        counts={"train": list(train), "val": list(val), "test": list(test)},
        class_names=[str(label) for label in range(len(train))],
        channels=channels,
        image_size=[size, size],
        sizes={which: [size, size] for which in ("smallest", "median", "largest")},
        units=units,
        unit="image",
        groups=None,
        official_splits=[],
        imbalance=max(train) / min(train),
        folds=folds,
        search_folds=list(range(folds - apart)),
        comparison_folds=list(range(folds - apart, folds)),
        broken=[],
        exact_duplicates=[],
        exact_duplicate_count=0,
        near_duplicates=[],
        near_duplicate_count=0,
        modality=modality,
        space=space.to_dict(),
        flips=space.allows("horizontal_flip"),
        deep=False,
        notes=[],
        digest="0" * 32,
    )
    return replace(facts, **others)


#: Two classes, as the two sets of MedMNIST that the benchmarks use have them.
BREAST = seen((147, 399), (21, 57), (42, 114), size=28)
PNEUMONIA = seen((1214, 3494), (135, 389), (234, 390), size=28, modality="radiograph")
DIGITS = seen()
