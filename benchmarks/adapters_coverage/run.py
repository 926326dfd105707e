"""On how many families of networks do adapters work: inject, train a step, merge, save and load, beside plain peft."""

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.adapters_coverage import checks
from benchmarks.adapters_coverage.families import FAMILIES

FOLDER = Path(__file__).parent
COLUMNS = ["network", "pixels", "parameters", *checks.METHODS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=900.0, help="seconds, after which no further network is begun")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for a network")
    parser.add_argument("--threads", type=int, default=2, help="for torch's operations")
    parser.add_argument("--only", nargs="+", default=FAMILIES, metavar="FAMILY", help="such as timm/resnet10t")
    parser.add_argument(
        "--add", type=Path, nargs="+", default=[], help="earlier results: rows of other networks are kept"
    )
    parser.add_argument("--table", action="store_true", help="print the table of all results and run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        rows = measure(arguments.only, arguments.budget, arguments.limit, arguments.threads)
        earlier = [row for path in arguments.add for row in json.loads(path.read_text())["rows"]]
        rows = list({row["network"]: row for row in (*earlier, *rows)}.values())
        facts = {"rank": checks.RANK, "tolerance": checks.TOLERANCE, "summary": summary(rows)}
        facts |= {"budget_seconds": arguments.budget, "threads": arguments.threads}
        config = "families" if len(rows) >= len(FAMILIES) // 2 else "some"
        print(results.write(FOLDER, config, rows, **facts))
        print(summary(rows))
    print(results.table(FOLDER, COLUMNS))


def measure(families: Sequence[str], budget: float, limit: float, threads: int) -> list[dict[str, Any]]:
    """Check all methods on the networks, each in a process of its own; those not begun in the budget are left out."""
    import timm  # noqa: F401 - imported once for all processes
    import torchvision  # noqa: F401

    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for family in families:
        if time.perf_counter() - start > budget:
            print(f"budget used; {len(families) - len(rows)} networks not begun", flush=True)
            break
        begin = time.perf_counter()
        answer = apart(checks.check, (family,), limit, threads)
        row = {"network": family, **answer.pop("network", {})}
        row |= {method: answer[method]["verdict"] for method in checks.METHODS}
        rows.append({**row, "seconds": round(time.perf_counter() - begin, 1), "details": answer})
        print(f"{len(rows)} {family}", *(f"{m}: {row[m]}" for m in checks.METHODS), sep=" | ", flush=True)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many networks passed, failed, and are not for the method."""
    counts = {}
    for method in checks.METHODS:
        verdicts = [row[method] for row in rows]
        passed = verdicts.count("passed")
        inapplicable = sum(verdict.startswith("not applicable") for verdict in verdicts)
        counts[method] = {
            "passed": passed,
            "not_applicable": inapplicable,
            "failed": len(verdicts) - passed - inapplicable,
        }
    return counts


def apart(function: Any, arguments: tuple[Any, ...], limit: float, threads: int) -> dict[str, Any]:
    """Call a function in a forked process, which is ended after ``limit`` seconds."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments, threads))
    process.start()
    theirs.close()
    answer = _none(f"no answer in {limit:.0f} s")
    if ours.poll(limit):
        try:
            answer = ours.recv()
        except EOFError:
            answer = _none("the process died")
    process.kill()
    process.join()
    return answer


def _none(reason: str) -> dict[str, Any]:
    return {method: {"verdict": reason} for method in checks.METHODS}


def _answer(connection: Connection, function: Any, arguments: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    connection.send(function(*arguments))
    connection.close()


if __name__ == "__main__":
    main()
