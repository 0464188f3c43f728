"""Ours beside diffusers, torch.compile, OpenVINO and stable-diffusion.cpp, on SD 1.5 at full size, in one run.

    python -m benchmarks                        # hours on two cores; 16 GB of memory, 13 of disk for temporary files
    python -m benchmarks --stages unet,decode --rounds 5 --save results
    python -m benchmarks --size tiny            # every line of it on tiny nets, some minutes: its figures mean nothing

The weights are random, which does not change the time. Ours and each peer that is installed take turns on the same
weights and inputs, each in a process of its own while nothing else computes; imports, loading and whole pictures are
measured in fresh processes. Figures are medians of the rounds. The ratio is that of the faster of diffusers' two memory
formats to ours: above 1, ours is faster, or smaller.

A fast net that is wrong is worth nothing. The exit status is 1 where ours differs from diffusers' float32 by more than
rounding (1e-4 of the largest value, 2 of 255 in a picture), or in bfloat16 by more than diffusers' bfloat16 does, the
memory format that differs more (in the root of the mean square).

OpenVINO comes with the extra `benchmarks`. stable-diffusion.cpp (`pip install stable-diffusion-cpp-python`) is compiled
when it is installed, with CMake and a C++ compiler; it makes whole pictures only, from other noise, so these are not
compared.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import machine, model, report
from benchmarks.stages import DTYPES, STAGES, Stages, alone

QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=model.SIDES, default="full", help="of the nets (default: full)")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=STAGES, help=f"of {','.join(STAGES)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--compile", action="store_true", help="torch.compile with freezing, too: needs a C++ compiler")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write results.json and results.md there")
    a = parser.parse_args(arguments)
    if unknown := set(a.stages) - set(STAGES):
        parser.error(f"--stages {','.join(unknown)}: use {','.join(STAGES)}")
    if a.rounds < 1:
        parser.error(f"--rounds {a.rounds}: at least 1")
    return a


def main(arguments: list[str] | None = None) -> int:
    a = parse(arguments)
    os.environ.update(QUIET)
    full, said = a.size == "full", []

    def say(text: str) -> None:
        print(text, flush=True)
        said.append(text)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        alone(model.synthesise, folder, a.size)
        stages, rows, targets = Stages(folder, a.size, a.rounds, a.compile), [], report.TARGETS if full else {}
        about, limits = machine.about(), {dtype: alone(machine.limits, dtype) for dtype in DTYPES}
        say(f"SD 1.5, {a.size} size, medians of {a.rounds}\n\n{report.header(stages.peers())}")
        for row in (row for stage in a.stages for row in stages.rows(stage)):
            rows.append(row)
            say(report.line(row, stages.peers(), targets.get((row.stage, row.dtype))))
        evaluation, case = stages.unet_case(2, stages.side)
        gigaflop = alone(model.gigaflop, folder, case)
    shares = {row.dtype: report.shares(row, limits, gigaflop) for row in rows if row.stage == evaluation}
    say(f"\nThe machine's largest rates, and what a UNet evaluation of {gigaflop:,.1f} GFLOP reaches of them:\n")
    say(report.limits_table(limits, shares, full))
    for what, seconds in stages.once.items():
        say(f"\n{what}: {seconds:.1f} s")
    for what, why in stages.absent.items():
        say(f"\n{what}: {why}")
    say("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    if a.save is not None:
        a.save.mkdir(parents=True, exist_ok=True)
        (a.save / "results.md").write_text("\n".join(said) + "\n")
        results = {"size": a.size, "machine": about, "limits": limits, "gigaflop": gigaflop, "shares": shares}
        results |= {"rows": [report.row_json(row, targets.get((row.stage, row.dtype))) for row in rows]}
        results |= {"once": stages.once, "absent": stages.absent}
        (a.save / "results.json").write_text(json.dumps(results, indent=1))
    return 0 if all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
