"""The command ``lightning-automl``: answers ``--help`` and a wrong sub-command before anything heavy is imported."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from lightning_automl import __version__

#: Every sub-command with the module that runs it and what it does.
COMMANDS = {
    "auto": ("auto_command", "from a folder of labelled images to a model and an honest report, within a time"),
    "fit": ("cli", "train a network from a YAML file, validate it each epoch and test it once at the end"),
    "validate": ("cli", "evaluate a run's best checkpoint on the validation split"),
    "test": ("cli", "evaluate a run's best checkpoint on the test split"),
    "predict": ("cli", "write the class probabilities of a run's best checkpoint to predictions.csv"),
    "search": (
        "searching",
        "vary a fit config and leave the best, or search for an augmentation policy",
    ),
    "report": ("finished", "write one HTML page about a run or a search, finished or not"),
    "export": ("finished", "write a run's network as ONNX, torch.export or safetensors, and check its outputs"),
    "classify": ("finished", "label new images with a run or an exported ONNX file"),
}

USAGE = """usage: lightning-automl COMMAND [--config FILE.yaml] [--dir DIR] [--dotted.key value ...]
       lightning-automl auto DATA [--budget 30m] [--modality natural] [--dir DIR]
       lightning-automl report|export|classify DIR ...

AutoML for image classification with PyTorch Lightning.

commands:
{commands}

A run leaves what it made in --dir (by default a new runs/NAME-N), and goes on with it when given again.
`lightning-automl COMMAND --help` lists the keys of a command.

examples:
  lightning-automl auto path/to/images --budget 30m --modality radiograph --dir runs/xray
  lightning-automl fit --config configs/baseline/digits_cnn.yaml --dir runs/digits
  lightning-automl fit --config configs/baseline/digits_cnn.yaml --model.init_args.optimizer.init_args.lr 0.01
  lightning-automl test --dir runs/digits
  lightning-automl search --config configs/hpo/digits_cnn.yaml --dir runs/hpo --workers 2
  lightning-automl report runs/digits
  lightning-automl export runs/digits --format onnx
  lightning-automl classify runs/digits new_images --out labels.csv"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0 done, 1 the run failed, 2 a mistake in what was given."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
        print(USAGE.format(commands=commands))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"lightning-automl {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        near = get_close_matches(arguments[0], COMMANDS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(f"unknown command {arguments[0]!r}; {hint}known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = import_module(f"lightning_automl.{COMMANDS[arguments[0]][0]}")
    status: int = module.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
