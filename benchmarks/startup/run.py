"""Wall seconds until the command has answered, beside those of Python's imports."""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import results

FOLDER = Path(__file__).parent
REPEATS = 7
COLUMNS = ["command", "seconds", "lowest", "highest", "share_of_import_lightning"]
REFERENCE = 'python -c "import lightning"'
SCRIPT = str(Path(sys.executable).with_name("lightning-automl"))

#: What is run, and the exit status that it is to have.
COMMANDS: dict[str, tuple[list[str], int]] = {
    "lightning-automl --help": ([SCRIPT, "--help"], 0),
    "lightning-automl nonsense": ([SCRIPT, "nonsense"], 2),
    "python -c pass": ([sys.executable, "-c", "pass"], 0),
    'python -c "import torch"': ([sys.executable, "-c", "import torch"], 0),
    REFERENCE: ([sys.executable, "-c", "import lightning"], 0),
    "lightning-automl fit --help": ([SCRIPT, "fit", "--help"], 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds; seven repeats are made in any case")
    parser.add_argument("--table", action="store_true", help="print the table of all results and run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        seconds = measure(arguments.budget)
        reference = statistics.median(seconds[REFERENCE])
        rows = [
            {
                "command": command,
                "seconds": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
                "share_of_import_lightning": statistics.median(values) / reference,
                "repeats": len(values),
                "seconds_of_repeats": [round(value, 4) for value in values],
            }
            for command, values in seconds.items()
        ]
        print(results.write(FOLDER, "commands", rows, budget_seconds=arguments.budget))
    print(results.table(FOLDER, COLUMNS))


def measure(budget: float) -> dict[str, list[float]]:
    """Run all commands in turn, ``REPEATS`` rounds at least, until the budget is used."""
    start = time.perf_counter()
    for command in COMMANDS:
        run(command)  # files are in the page cache, and compiled
    seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
    longest = 0.0
    while len(seconds[REFERENCE]) < REPEATS or time.perf_counter() - start + longest < budget:
        begin = time.perf_counter()
        for command, values in seconds.items():
            values.append(run(command))
        longest = max(longest, time.perf_counter() - begin)
    return seconds


def run(command: str) -> float:
    """Run a command and return its wall seconds.

    Raises:
        RuntimeError: If its exit status is not the expected one.
    """
    arguments, status = COMMANDS[command]
    begin = time.perf_counter()
    result = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if result.returncode != status:
        raise RuntimeError(f"{command} exited with {result.returncode}, not {status}:\n{result.stderr[-3000:]}")
    return seconds


if __name__ == "__main__":
    main()
