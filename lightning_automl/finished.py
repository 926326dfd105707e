"""The commands on what a run has left: report, export, classify. Lightning is imported only by those that need it."""

import argparse
from collections.abc import Callable
from pathlib import Path

from lightning_automl.mistakes import PlainParser
from lightning_automl.process import exit_status, messages, see_working_directory
from lightning_automl.results import classify, export, report
from lightning_automl.results.export import SUFFIXES


def _report(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], object]:
    parser.description = "Write report.html: one page that needs no network, about a run or a search, finished or not."
    parser.add_argument("dir", type=Path, help="directory of a run, of a search or of auto")
    return lambda given: report(given.dir)


def _export(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], object]:
    parser.description = "Write the network of the best epoch, normalisation included, after checking its outputs."
    parser.add_argument("dir", type=Path, help="directory of a run or of auto")
    parser.add_argument("--format", choices=list(SUFFIXES), default="onnx", help="default: onnx; torch is torch.export")
    parser.add_argument("--out", type=Path, help="the file; DIR/model.<suffix> by default")
    parser.add_argument(
        "--compress",
        metavar="energy=SHARE",
        help="make the network smaller by low rank and report its validation accuracy before and after; also "
        "flops=SHARE, form=spatial, finetune=EPOCHS and lr=RATE, with commas between",
    )
    return lambda given: export(given.dir, given.format, given.out, compress=given.compress)


def _classify(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], object]:
    parser.description = (
        "Write label and class probabilities of new images as CSV; a model of auto says where it is unsure."
    )
    parser.add_argument("source", type=Path, metavar="dir", help="directory of a run or of auto, or an .onnx file")
    parser.add_argument("images", type=Path, nargs="+", help="folders, images, or lists of files (.txt, .csv)")
    parser.add_argument("--out", type=Path, help="the CSV file; DIR/classified.csv by default")
    return lambda given: classify(given.source, given.images, given.out)


_COMMANDS = {"report": _report, "export": _export, "classify": _classify}


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status: 0 done, 1 it failed, 2 a mistake in what was given."""
    command, *rest = arguments
    parser = PlainParser(f"lightning-automl {command}", allow_abbrev=False)
    carry_out = _COMMANDS[command](parser)
    see_working_directory()

    def act() -> None:
        with messages():
            carry_out(parser.parse_args(rest))

    return exit_status(act)
