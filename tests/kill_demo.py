"""Kill `make demo` twenty times at random moments; its CSVs must end up the same as those of an unbroken run.

    python tests/kill_demo.py [--kills 20] [--seed 0]     # about a quarter of an hour on two cores

A small demo in two copies of this checkout: one runs through, the other is killed (SIGKILL, the whole process
group) and started again until it ends. Prints for each CSV whether every byte is the same. In float32 they are;
in bf16 the sums of a step may round otherwise after a resume, and the count of answers that differ is printed.
"""
import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ["make", "demo", "N=24", "TRAIN_FLAGS=--lora 8 --lr 1e-3 --batch 4 --save-every 2",
           "EVAL_FLAGS=--max-new-tokens 24 --batch 4 --limit 6 --repetition-penalty 1.2"]


def copy_checkout(folder: Path) -> None:
    """The tracked files and those new to git, with this checkout's environment and models."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in (".venv", "models"):
        (folder / name).symlink_to(ROOT / name)


def kill_after(folder: Path, seconds: float) -> bool:
    """Start the demo and kill it; False if it had ended by then."""
    process = subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def read_rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch, "whole"), Path(scratch, "broken")
        for folder in (whole, broken):
            copy_checkout(folder)
        start = time.time()
        subprocess.run(COMMAND, cwd=whole, check=True, stdout=subprocess.DEVNULL)
        took = time.time() - start
        print(f"unbroken: {took:.0f} s", flush=True)

        kills = 0
        while kills < args.kills:
            # Half of the unbroken time spread over all kills, and the start-up that each must get through
            seconds = rng.uniform(0, 2) * (8 + took / 2 / args.kills)
            if not kill_after(broken, seconds):
                break
            kills += 1
            done = len(list((broken / "results").rglob("*.csv"))) if (broken / "results").exists() else 0
            print(f"kill {kills} after {seconds:.1f} s, {done} CSVs begun", flush=True)
        subprocess.run(COMMAND, cwd=broken, check=True, stdout=subprocess.DEVNULL)

        worst = 0
        for path in sorted((whole / "results").rglob("*.csv")):
            name = path.relative_to(whole)
            same = path.read_bytes() == (broken / name).read_bytes()
            rows, others = read_rows(path), read_rows(broken / name)
            differ = sum(row != other for row, other in zip(rows, others)) + abs(len(rows) - len(others))
            worst = max(worst, differ)
            print(f"{name}: {'same' if same else f'{differ} of {len(rows)} rows differ'}")
        print(f"{kills} kills, {'every CSV the same' if not worst else f'up to {worst} rows differ'}")
        sys.exit(bool(worst))


if __name__ == "__main__":
    main()
