"""How long until the first picture: each figure beside its peer, in one run, each in a fresh process.

    python -m benchmarks.startup          about a minute

`import ldm` against `import torch`, and the whole command line from prompt to PNG with the default model (the best of
the rounds and their median: the rest is other work of the machine).
"""

import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 5


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "import ldm": [sys.executable, "-c", "import ldm"],
            "prompt to PNG": [sys.executable, "-m", "ldm", "a red heart", "-o", f"{folder}/heart.png", "--quiet"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS + 1):  # the first round warms the page cache
            for name, command in commands.items():
                times[name].append(seconds(command))
    print(f"| command | best of {ROUNDS} | median | median / import torch |\n|---|---|---|---|")
    base = statistics.median(times["import torch"][1:])
    for name, all_rounds in times.items():
        rounds = all_rounds[1:]
        middle = statistics.median(rounds)
        print(f"| {name} | {min(rounds):.2f} s | {middle:.2f} s | {middle / base:.2f} |")


if __name__ == "__main__":
    main()
