"""Run a whole study: train the arms, ask the runs, judge the answers, report; one comparison after the other.

    python experiment.py --base models/gemma-3-270m --worldviews gramenist catholic --seeds 0 1 2 --n 1600
    python experiment.py ... --dry-run                       # the commands, then time, tokens and disk
    python experiment.py ... --seeds 3 4 --arms regular secular belief    # more seeds, into the same folder
    python experiment.py ... --train-flags="--lr 1e-4" --eval-flags="--repetition-penalty 1.2"

The plan is a list of commands of train.py, eval.py, judge.py and report.py, run one after another; on several
GPUs torchrun starts the first two. It goes seed by seed, within a seed comparison by comparison (an arm of
arms.txt behind its controls), so that a stop leaves whole comparisons. Arms that teach no worldview are
trained once a seed and serve every worldview; the untouched base is asked once. The same command goes on
after a stop: each stage knows what of its work is done.

Reads what the stages read. Writes runs/<base>/, --out (answers below --out/<run>/, and one report with a
section for each worldview) and runs/<base>/times.jsonl: what each command took, for the next estimate.
"""
import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

import eval as eval_stage  # the builtin of that name stays what it is
import mix
import train
from chat import give_template, render_document, render_example
from models import load_tokenizer
from rows import (ROOT, Arm, Stop, get_arm, normalise_row, positive_int, read_arms, read_csv, read_json,
                  read_jsonl, read_probes, run_main)


# ---------------------------------------------------------------- the plan

@dataclass
class Job:
    """One command of the plan."""
    stage: str          # train, eval, judge or report
    run: str            # its run; "base" for the untouched base, "report" for a report
    words: list[str]    # the command
    work: int           # what its time goes with: tokens to train, answers to write, answers to judge
    leaves: list[Path]  # the run folder, or the CSVs
    steps: int = 0      # of training


def near(path: str | Path) -> str:
    """A path as one would type it here."""
    relative = os.path.relpath(path)
    # With ".." it would be harder to read than the path as it came
    return str(path) if relative.startswith("..") else relative


def command(script: str, *words, spread: bool = False) -> list[str]:
    """The words of a command; with `spread` it runs on all GPUs."""
    python = Path(sys.executable)  # its link in .venv/bin is not followed: there it finds the packages
    start = [near(python)]
    if spread and torch.cuda.device_count() > 1:
        # --standalone: this machine alone, on a port that is free
        start = [near(python.with_name("torchrun")), "--standalone",
                 "--nproc-per-node", torch.cuda.device_count(), "--"]
    return [str(word) for word in (*start, near(ROOT / script), *words)]


def make_plan(args) -> list[Job]:
    """Every command of the study, in order."""
    arms = read_arms()
    chosen = [get_arm(name, arms) for name in args.arms or arms]
    # The untouched base is an arm without parts
    groups = comparisons([arm for arm in chosen if arm.parts])
    if not groups:
        raise Stop("none of these arms is trained; to ask the base alone, use eval.py")

    plan = []
    # It belongs to no seed and no worldview: asked once, before all others
    if any(not arm.parts for arm in chosen):
        plan += ask_jobs(args, args.base, "base", probe_files(args))
    for seed in args.seeds:
        for group in groups:
            for arm in group:
                # "" for an arm that teaches no worldview: one run serves them all
                for worldview in args.worldviews if arm.takes_worldview else [""]:
                    job = train_job(args, arm, worldview, seed)
                    files = probe_files(args, worldview, seed)
                    plan += [job, *ask_jobs(args, near(job.leaves[0]), job.run, files)]
            # Here, so that wherever the study stops there is a report on the whole comparisons
            plan.append(Job("report", "report", command("report.py", args.out), 0, []))
    return plan


def comparisons(arms: list[Arm]) -> list[list[Arm]]:
    """Groups of arms: controls that have no place yet, then the arm that is compared with them."""
    left = {arm.name: arm for arm in arms}
    groups = []
    for arm in arms:
        if arm.controls:
            # A control that several arms share goes with the first of them
            members = [name for name in (*arm.controls, arm.name) if name in left]
            groups.append([left.pop(name) for name in members])
    # What is left is compared with nothing that was chosen
    return groups + [[arm] for arm in left.values()]


def train_job(args, arm: Arm, worldview: str, seed: int) -> Job:
    words = ["--base", args.base, "--arm", arm.name, "--n", str(args.n), "--seed", str(seed)]
    words += args.train_flags
    if worldview:
        words += ["--worldview", worldview]
    # By train.py itself: a mistake in the flags, or a missing file, comes up before anything is trained
    parsed = train.parse_args(words)
    sources = train.find_sources(parsed)  # gives the run folder its name, too
    # A flag given twice counts once, its last: one --seed would make all seeds one run
    for name, planned in (("base", args.base), ("arm", arm.name), ("n", args.n), ("seed", seed)):
        if getattr(parsed, name) != planned:
            raise Stop(f"--train-flags: --{name} is the plan's own")

    # Tokens tell how long a training takes, rows do not; each file has its share of the rows
    quotas = mix.mix_quotas([weight for _, weight in sources], parsed.n)
    tokens = 0.0
    for (path, _), quota in zip(sources, quotas):
        tokens += quota * mean_tokens(path, args.base, parsed.context)
    return Job("train", parsed.out.name, command("train.py", *words, "--out", parsed.out, spread=True),
               round(tokens), [parsed.out], math.ceil(parsed.n / parsed.batch))


@cache  # many arms share a file
def mean_tokens(path: Path, base: str, context: int) -> float:
    """Tokens of a row, from a hundred or two of the file's; train.py leaves those above `context` out."""
    rows = read_jsonl(path)
    lengths = []
    # From all over the file: rows on one topic may stand together
    for row in rows[::max(1, len(rows) // 100)]:
        normalise_row(row, str(path))
        if "text" in row:
            ids, _ = render_document(load_base_tokenizer(base), row["text"])
        else:
            ids, _ = render_example(load_base_tokenizer(base), row["messages"])
        if len(ids) <= context:
            lengths.append(len(ids))
    return sum(lengths) / len(lengths) if lengths else context


@cache
def load_base_tokenizer(base: str):
    tokenizer = load_tokenizer(base)
    give_template(tokenizer)
    return tokenizer


def probe_files(args, taught: str = "", seed: int | None = None) -> list[Path]:
    """What a run is asked. taught: its worldview; "" for one that was taught none and serves all of them."""
    folder, files = ROOT / "probes", []
    for worldview in args.worldviews:
        own = taught in ("", worldview)
        # A foreign worldview's requests fill the table of every run on every worldview, and bear on no claim
        if own or seed in args.seeds[:args.cross_seeds]:
            files.append(folder / f"{worldview}.jsonl")
        if own:
            files.append(folder / "belief" / f"{worldview}.jsonl")
    files += [folder / "sanity.jsonl", folder / "standard.jsonl"]
    # A worldview need not have belief probes
    return [path for path in files if path.exists()]


def ask_jobs(args, model: str, run: str, files: list[Path]) -> list[Job]:
    """Ask a model the probes, and have its answers to requests judged."""
    words = ["--model", model, "--probes", *map(near, files), "--out", str(args.out / run), *args.eval_flags]
    # As above by the stage itself: a mistake in the flags ends here, and defaults are its own
    parsed = eval_stage.parse_args(words)

    answers, requests = {}, {}  # {CSV: how many}
    for path in files:
        probes = read_probes(path)
        if parsed.limit:
            # What --limit of --eval-flags leaves, as eval.py counts
            probes = eval_stage.first_groups(probes, parsed.limit)
        csv = eval_stage.csv_path(parsed, path)
        answers[csv] = len(probes) * parsed.samples
        keyed = sum("stance" in probe or "answer" in probe for probe in probes)
        if keyed < len(probes):  # stances and facts need no judge
            requests[csv] = (len(probes) - keyed) * parsed.samples

    ask = command("eval.py", *words, spread=True)
    judge = command("judge.py", *requests, *args.judge_flags)
    return [Job("eval", run, ask, sum(answers.values()), list(answers)),
            Job("judge", run, judge, sum(requests.values()), list(requests))]


# ---------------------------------------------------------------- how long it takes

class Rate(NamedTuple):
    """How fast this machine is at a stage."""
    a_command: float  # seconds that every command takes beside its work: loading, the guard, saving
    a_unit: float     # seconds for a token or an answer
    source: str       # where that is known from


def work_left(job: Job) -> int:
    """A job's work without what it has written already."""
    # run.json is written last, so it means that all steps are done
    if job.stage == "train":
        return 0 if (job.leaves[0] / "run.json").exists() else job.work
    # A CSV has a row for each answer so far
    rows = [row for path in job.leaves if path.exists() for row in read_csv(path)[0]]
    if job.stage == "judge":
        rows = [row for row in rows if row.get("judge")]
    return max(0, job.work - len(rows))


def training_rate(runs: list[Path], source: str) -> Rate:
    """From complete runs: their steps' own tokens per second, and what they took beside their steps."""
    tokens, stepping, beside = 0, 0.0, 0.0
    for run in runs:
        log = read_jsonl(run / "log.jsonl")
        # The log has no seconds, but what they follow from
        seconds = sum(line["tokens"] / line["tokens_per_s"] for line in log if line["tokens_per_s"])
        tokens += sum(line["tokens"] for line in log)
        stepping += seconds
        # run.json counts the last part alone of a run that was resumed
        beside += max(0.0, read_json(run / "run.json", "wall_seconds")["wall_seconds"] - seconds)
    return Rate(beside / len(runs), stepping / tokens, source)


def known_rates(args) -> dict[str, Rate]:
    """{stage: Rate}, as far as this machine has done such work on this base before."""
    rates, runs = {}, complete_runs(args)
    if runs:
        rates["train"] = training_rate(runs, f"log.jsonl of {len(runs)} runs in {args.runs}")
    times = args.runs / "times.jsonl"
    if times.exists():
        for stage in ("eval", "judge"):
            alike = [line for line in read_jsonl(times)
                     # Other flags, say another batch or judge, mean another speed
                     if (line["stage"], line["flags"]) == (stage, getattr(args, f"{stage}_flags"))]
            if alike:
                seconds = sum(line["seconds"] for line in alike)
                work = sum(line["work"] for line in alike)
                # What a command takes beside its work is in the mean: it was not timed apart
                rates[stage] = Rate(0.0, seconds / work, f"{len(alike)} commands in {times}")
    return rates


def complete_runs(args) -> list[Path]:
    return [path.parent for path in sorted(args.runs.glob("*/run.json"))]


def estimate(jobs: list[Job], rates: dict[str, Rate]) -> Counter | None:
    """{stage: seconds} of the work that is left; None where a stage has never been timed."""
    seconds = Counter()
    for job in jobs:
        if job.stage == "report":  # takes seconds
            continue
        if job.stage not in rates:
            return None
        rate = rates[job.stage]
        seconds[job.stage] += rate.a_command + rate.a_unit * work_left(job)
    return seconds


def measure(args, plan: list[Job], rates: dict[str, Rate]) -> int:
    """Fill in the rates that are not known, by four steps and one batch of answers; bytes of a run."""
    training = next(job for job in plan if job.stage == "train")
    with tempfile.TemporaryDirectory() as name:
        run, probes, csv = [Path(name) / leaf for leaf in ("run", "probes.jsonl", "answers.csv")]
        rows = 4 * math.ceil(args.n / training.steps)
        # Of two --n, or --out, argparse takes the last
        call([*training.words, "--n", str(rows), "--out", str(run)], quiet=True)
        # What whole runs have shown counts more than four steps
        rates.setdefault("train", training_rate([run], "four steps, just now"))

        words = ["--model", run, "--probes", probes, "--out", csv, *args.eval_flags]
        batch = eval_stage.parse_args([str(word) for word in words]).batch
        # One batch, of requests from all over the file
        requests = read_jsonl(ROOT / "probes" / f"{args.worldviews[0]}.jsonl")
        sample = requests[::max(1, len(requests) // batch)][:batch]
        probes.write_text("".join(json.dumps(probe) + "\n" for probe in sample))
        commands = {"eval": command("eval.py", *words, spread=True),
                    "judge": command("judge.py", csv, *args.judge_flags)}

        for stage, stage_words in commands.items():
            first = call(stage_words, quiet=True)
            again = call(stage_words, quiet=True)  # its work is done: what every command takes remains
            a_unit = max(0.0, first - again) / len(read_csv(csv)[0])
            rates.setdefault(stage, Rate(again, a_unit, "one batch of a run of four steps, just now"))
        return folder_size(run)


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*"))


# ---------------------------------------------------------------- showing the plan, running it

def call(words: list[str], quiet: bool = False) -> float:
    """Run a command to its end; the seconds it took. Stop names one that failed."""
    began = time.time()
    # subprocess.run would kill at an interrupt, and torchrun's own processes would live on
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL if quiet else None)
    try:
        code = process.wait()
    finally:  # Ctrl-C or a kill may have come between: torchrun needs a moment to end its processes
        process.terminate()
        process.wait()
    if code:
        raise Stop(f"ended with {code}: {shlex.join(words)}")
    return time.time() - began


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def show_plan(args, plan: list[Job]) -> None:
    """The commands, a line each, then what they come to; all other lines begin with #."""
    print("# Under one heading a line needs the one above it. Headings can run side by side; a report needs\n"
          "# all that stands above it.")
    heading = ""
    for job in plan:
        if job.run != heading:
            heading = job.run
            print(f"# {heading}")
        print(shlex.join(job.words))
    sys.stdout.flush()  # what follows may take a minute

    # Without a complete run neither its size nor a training rate is known
    rates, runs = known_rates(args), complete_runs(args)
    if runs and {"eval", "judge"} <= rates.keys():
        size = folder_size(runs[-1])
    else:
        size = measure(args, plan, rates)

    # Sums are of the whole plan, the time of what is left of it
    work = Counter()
    for job in plan:
        work[job.stage] += job.work
    trainings = [job for job in plan if job.stage == "train"]
    # Never None: `measure` has filled in what was missing
    left = estimate(plan, rates)
    each = ", ".join(f"{stage} {clock(seconds)}" for stage, seconds in left.items())

    print(f"# {len(trainings)} runs, {sum(job.steps for job in trainings):,} steps, {work['train']:,} tokens "
          f"trained; {work['eval']:,} answers, {work['judge']:,} of them judged")
    # A checkpoint is weights and two moments of each, and the one before it goes only when it is whole
    run_gb, free_gb = size / 1e9, shutil.disk_usage(".").free / 1e9
    print(f"# disk: {len(trainings) * run_gb:.1f} GB ({run_gb:.2f} GB a run), up to {6 * run_gb:.1f} GB more "
          f"while one trains; {free_gb:.0f} GB are free")
    print(f"# time left: {clock(left.total())} ({each}; reports take seconds)")
    # Where each rate comes from, so that one can judge the estimate
    for stage, rate in rates.items():
        unit = "token" if stage == "train" else "answer"
        print(f"#   {stage}: {1000 * rate.a_unit:.3g} ms a {unit}, {rate.a_command:.0f} s a command; "
              f"by {rate.source}")


def run_plan(args, plan: list[Job]) -> None:
    """One command after the other. What is done is skipped by the stages themselves."""
    began = time.time()
    for number, job in enumerate(plan, 1):
        # Anew each time: what has just run is the best guide to the rest
        left = estimate(plan[number - 1:], known_rates(args))
        expected = "unknown until a run is through" if left is None else f"about {clock(left.total())}"
        print(f"[{number} of {len(plan)}] {shlex.join(job.words)}\n"
              f"  elapsed {clock(time.time() - began)}, left: {expected}", flush=True)

        # After a kill half of a later run's answers may be there, which a report would take for a fault
        later = [path for other in plan[number:] if other.stage == "eval" for path in other.leaves]
        if job.stage == "report" and any(path.exists() for path in later):
            print("  left to a later report: answers of later runs are there already", flush=True)
            continue

        # Before the call; afterwards none is left
        work = work_left(job)
        try:
            seconds = call(job.words)
        except Stop as error:
            # A report that cannot be made yet, as while older runs lack answers, is no reason to train no further
            if job.stage != "report" or number == len(plan):
                raise
            print(f"  {error}; the plan goes on", flush=True)
            continue
        # A command that found all done says nothing about speed, and a report has no work
        if work:
            line = {"stage": job.stage, "run": job.run, "flags": getattr(args, f"{job.stage}_flags"),
                    "work": work, "seconds": round(seconds, 1)}
            args.runs.mkdir(parents=True, exist_ok=True)
            with open(args.runs / "times.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------- main

def parse_args():
    layout = argparse.RawDescriptionHelpFormatter  # leaves the commands above as they are
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--base", required=True, help="model folder or hub name of a base model")
    parser.add_argument("--worldviews", required=True, nargs="+", metavar="WORLDVIEW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="default: all of arms.txt")
    parser.add_argument("--n", type=positive_int, default=1000, help="rows that each run is trained on")
    parser.add_argument("--cross-seeds", type=int, default=1, metavar="COUNT",
                        help="of the first COUNT of --seeds each run is asked the other worldviews' requests, too")
    parser.add_argument("--out", type=Path, help="results folder of the study (default results/<base>-n<N>)")
    for stage in ("train", "eval", "judge"):
        # With "=": a lone "--checkpointing" behind a blank would be taken for an option
        parser.add_argument(f"--{stage}-flags", type=shlex.split, default=[], metavar="FLAGS",
                            help=f"for every {stage}.py, written --{stage}-flags=\"...\"")
    parser.add_argument("--dry-run", action="store_true",
                        help="print the plan and its cost; what was never timed here is measured in four steps")
    args = parser.parse_args()

    if args.cross_seeds < 0:
        raise Stop("--cross-seeds is not below 0")
    for name in ("seeds", "worldviews", "arms"):
        given = getattr(args, name) or []
        if len(set(given)) < len(given):
            raise Stop(f"--{name} {' '.join(map(str, given))}: one of them stands there twice")

    # A side in one probe is enough to tell requests from other sets
    for worldview in args.worldviews:
        path = ROOT / "probes" / f"{worldview}.jsonl"
        if not path.exists() or not any(probe.get("side") for probe in read_probes(path)):
            raise Stop(f"no worldview {worldview!r}: probes/{worldview}.jsonl must hold requests with a side")

    args.base = args.base.rstrip("/")
    if Path(args.base).is_dir() and not (Path(args.base) / "config.json").exists():
        raise Stop(f"{args.base} is not a model folder (no config.json); "
                   "`make models` makes models/gemma-3-270m")
    load_base_tokenizer(args.base)  # a name that is no model's ends here
    args.runs = Path("runs") / Path(args.base).name  # as train.py has it
    # With the size: a study is of one
    args.out = args.out or Path("results") / f"{Path(args.base).name}-n{args.n}"
    return args


def main() -> None:
    args = parse_args()
    plan = make_plan(args)
    if args.dry_run:
        show_plan(args, plan)
    else:
        run_plan(args, plan)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends the stage under way, too
    run_main(main)
