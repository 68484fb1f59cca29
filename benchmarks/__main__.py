"""``python -m benchmarks NAME [--out FILE]`` runs a benchmark, prints its table and writes its JSON and figures."""

import argparse
import importlib
import pathlib

from benchmarks.timing import finish

NAMES = ("training", "curvature", "per_example", "compile", "sharpness_sgd", "derived_rate", "bracket", "scaling")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--out", type=pathlib.Path, help="the JSON file (default: benchmark-NAME.json)")
    parser.add_argument("--quick", action="store_true", help="derived_rate: three small workloads, one seed")
    arguments = parser.parse_args()
    options = {"quick": True} if arguments.quick else {}
    benchmark = importlib.import_module(f"benchmarks.{arguments.name}")
    rows, panels = benchmark.run(**options), getattr(benchmark, "panels", tuple)()
    finish(rows, arguments.out or pathlib.Path(f"benchmark-{arguments.name}.json"), panels)


if __name__ == "__main__":
    main()
