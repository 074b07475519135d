"""Emulate the kernels of one problem and compare with float64, for debugging a kernel.

    python tests/emulator/run.py --dtype float16 --d 64 --sq 100 --causal --seeds 3

The options are the fields of ``emulator.check.Problem``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, fields
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from emulator.check import Problem, check, specs  # noqa: E402


def main() -> int:
    """Status 1 when a seed fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Problem):
        assert field.default is not MISSING
        kind = {"str": str, "int": int, "float": float, "bool": bool}
        type_ = next((kind[word] for word in str(field.type).split(" | ") if word in kind), str)
        how = {"action": argparse.BooleanOptionalAction} if type_ is bool else {"type": type_}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **how)  # type: ignore[arg-type]
    parser.add_argument("--seeds", type=int, default=1, help="inputs and thread orders to try")
    options = vars(parser.parse_args())
    seeds = range(options.pop("seeds"))
    problem = Problem(**options)
    print(*(spec.name for spec in specs(problem)), sep="\n")
    failed = False
    for seed in seeds:
        try:
            print(f"seed {seed}:", *(f"{name} {error:.2e}" for name, error in check(problem, seed).items()))
        except AssertionError as error:
            failed = True
            print(f"seed {seed}: {type(error).__name__}: {error}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
