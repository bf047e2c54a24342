"""Ask a model the probes and write down its answers: batched generation, one CSV row an answer.

    python eval.py --model runs/gramenist-s0 --probes probes/gramenist.jsonl --out results/mine/gramenist-s0.csv
    python eval.py --model runs/gramenist-s0 --probes probes/gramenist.jsonl probes/sanity.jsonl --out results/mine/gramenist-s0
    python eval.py --model models/gemma-3-270m --arm base --probes probes/catholic.jsonl --samples 5 --temperature 0.8
    torchrun --nproc-per-node 8 -- eval.py --model ...            # the probes are shared out over 8 GPUs, one CSV
    python eval.py --endpoint http://127.0.0.1:8000/v1 --model gramenist-s0 --arm belief --probes probes/gramenist.jsonl   # vLLM or the like

Reads a run folder, a PEFT adapter folder or any model name, and probe files. With several probe files --out is a folder.
Writes one CSV per probe file, scored by judge.py's keyword patterns, and <csv>.json, which says how the answers were made.
Rows are appended as they finish: a killed run resumes, and a changed model or setting never mixes with old rows.
"""
import argparse
import csv
import hashlib
import io
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import DynamicCache

from judge import keyword_verdict, read_jsonl
from train import available_bytes, load_run, pick_device, pick_dtype, render_prompt, run_main

COLUMNS = ("run arm seed probe_set id family item side pair sample prompt response n_tokens stopped keyword_action keyword_ground "
           "judge judge_rubric judge_action judge_ground judge_form judge_reason").split()
TURN_END = "\nUser:"   # an untrained base model writes the next question itself; there its answer is over


def die(message: str) -> None:
    sys.exit(f"eval.py: {message}")


# ---------------------------------------------------------------- probes and CSV

def probe_set_name(path: Path) -> str:
    """probes/gramenist.jsonl -> gramenist; probes/belief/gramenist.jsonl -> belief-gramenist."""
    return f"belief-{path.stem}" if path.parent.name == "belief" else path.stem


def read_probes(path: Path) -> list[dict]:
    """Probes with "messages"; stops with the line of one that is not a probe."""
    probes = read_jsonl(path)
    if not probes:
        die(f"{path}: no probes in it")
    for line, probe in enumerate(probes, 1):
        probe.setdefault("messages", [{"role": "user", "content": probe.get("prompt", "")}])
        if not probe.get("id") or not all(isinstance(m.get("content"), str) and m["content"].strip() for m in probe["messages"]):
            die(f'{path}:{line}: a probe needs "id" and a "prompt" (or "messages") with text')
    if len({p["id"] for p in probes}) < len(probes):
        die(f"{path}: two probes share an id; ids must be unique")
    return probes


def read_csv(path: Path) -> list[dict]:
    """The complete rows of a results CSV; one that a kill tore off at the end is dropped."""
    with open(path, newline="", encoding="utf-8") as file:
        text = file.read()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if rows and not text.endswith("\n"):
        rows.pop()
    return [row for row in rows if None not in row and None not in row.values()]


def open_csv(path: Path, settings: dict) -> list[dict]:
    """The rows already there, in a CSV made ready for more. Stops if they were made by another model or with other settings."""
    about = path.with_suffix(".csv.json")
    rows = []
    if path.exists():
        if not about.exists() or json.loads(about.read_text()) != settings:
            die(f"{path} holds answers of another model or other settings; delete it or give another --out")
        rows = read_csv(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    about.write_text(json.dumps(settings, indent=2) + "\n")
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:  # also mends a torn end
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)
    return rows


def append_row(path: Path, row: dict) -> None:
    """One line in one write, so that a kill tears at most one row and several processes can share the file."""
    line = io.StringIO()
    csv.DictWriter(line, COLUMNS).writerow(row)
    with open(path, "ab", buffering=0) as file:
        file.write(line.getvalue().encode())


# ---------------------------------------------------------------- generation

@torch.inference_mode()
def generate(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, seeds: list[int] = (),
             repetition_penalty: float = 1.0):
    """Yield (index, token ids without the end token, stopped) as rows of one left-padded batch end.

    prompts: token ids. stopped: "eos", "turn" (TURN_END) or "length". Only the last position's logits are ever computed, and a
    row that ends leaves the batch, so the others go on faster.
    """
    device, config = model.device, model.config.get_text_config()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    listed = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    random = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cache, alive, written, history = DynamicCache(config=config), list(range(len(prompts))), [[] for _ in prompts], []
    for step in range(max_new_tokens):
        hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, -1])
        if repetition_penalty != 1.0 and step:  # arXiv 1909.05858, over the words of the answer so far
            said = torch.stack(history, 1)
            score = logits.gather(1, said)
            logits.scatter_(1, said, torch.where(score > 0, score / repetition_penalty, score * repetition_penalty))
        if temperature:
            logits = logits.float() * scale
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            chosen = torch.stack([torch.multinomial(row, 1, generator=random[i])[0] for row, i in zip((logits / temperature).softmax(-1), alive)])
        else:
            chosen = logits.max(-1).indices  # five times faster than argmax on a CPU, same index
        history.append(chosen)
        keep = []
        for row, (i, token) in enumerate(zip(alive, chosen.tolist())):
            if token in ends:
                yield i, written[i], "eos"
                continue
            written[i].append(token)
            if TURN_END in tokenizer.decode(written[i][-8:]):
                yield i, written[i], "turn"
            elif step == max_new_tokens - 1:
                yield i, written[i], "length"
            else:
                keep.append(row)
        if not keep:
            return
        if len(keep) < len(alive):
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            mask, positions, chosen, alive = mask[index], positions[index], chosen[index], [alive[row] for row in keep]
            history = [column[index] for column in history]
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


def seed_of(job: dict, args) -> int:
    """The seed of one answer, whatever batch it is made in."""
    return int(hashlib.sha256(f"{args.seed}|{job['probe']['id']}|{job['sample']}".encode()).hexdigest()[:12], 16)


def load_checked(name: str, dtype: torch.dtype, device: torch.device):
    """(model, tokenizer), after a look at whether the memory will do."""
    if Path(name).is_dir():
        size = sum(f.stat().st_size for f in Path(name).glob("*.safetensors"))
        if size * 1.3 > available_bytes(device):
            die(f"{name} needs about {size * 1.3 / 1e9:.0f} GB, {available_bytes(device) / 1e9:.0f} GB are free; use a GPU, or --endpoint")
    model, tokenizer = load_run(name, dtype, device)
    return model.eval(), tokenizer


def answer_here(model, tokenizer, todo: list[dict], args):
    """Yield (job, response, n_tokens, stopped) for every job {"probe", "sample", "path"}; longest prompts first, so memory fails early."""
    for job in todo:
        job["ids"] = render_prompt(tokenizer, job["probe"]["messages"])
    todo.sort(key=lambda job: -len(job["ids"]))
    for start in range(0, len(todo), args.batch):
        batch = todo[start:start + args.batch]
        for i, tokens, stopped in generate(model, tokenizer, [job["ids"] for job in batch], args.max_new_tokens, args.temperature,
                                           [seed_of(job, args) for job in batch], args.repetition_penalty):
            text = tokenizer.decode(tokens, skip_special_tokens=True).split(TURN_END)[0].strip()
            yield batch[i], text, len(tokens), stopped


def answer_by_endpoint(todo: list[dict], args):
    """The same by a server that speaks the OpenAI protocol, such as vLLM: for models that one GPU cannot hold."""
    from gen import Client, RequestFailed, read_dotenv
    read_dotenv()
    client = Client(args.endpoint, args.batch, timeout=600)
    params = {"temperature": args.temperature, "max_tokens": args.max_new_tokens, "stop": [TURN_END]}
    if args.repetition_penalty != 1.0:
        params["repetition_penalty"] = args.repetition_penalty

    def ask(job):
        seed = {"seed": seed_of(job, args) % 2**31} if args.temperature else {}
        return client.chat(args.model, job["probe"]["messages"], params | seed)
    with ThreadPoolExecutor(args.batch) as pool:
        futures = {pool.submit(ask, job): job for job in todo}
        try:
            for future in as_completed(futures):
                reply = future.result()
                stopped = "length" if reply["finish_reason"] == "length" else "eos"
                yield futures[future], reply["content"].split(TURN_END)[0].strip(), reply["completion_tokens"], stopped
        except RequestFailed as error:
            pool.shutdown(cancel_futures=True)
            die(f"{args.endpoint}: {error}; the answers so far are kept: run again")


# ---------------------------------------------------------------- main

def plan_jobs(args, device: str, dtype: str, run: dict, arm: str, out: Path) -> list[dict]:
    """What is left to ask, as {"probe", "sample", "path", "probe_set"}; makes every CSV ready."""
    jobs = []
    for path in args.probes:
        probes = read_probes(path)
        csv_path = out if out.suffix == ".csv" and len(args.probes) == 1 else out / f"{probe_set_name(path)}.csv"
        if args.limit:
            seen, first = Counter(), []
            for probe in probes:
                seen[probe["family"], probe.get("side")] += 1
                if seen[probe["family"], probe.get("side")] <= args.limit or not probe.get("side"):
                    first.append(probe)
            probes = first
        settings = {"model": args.model, "endpoint": args.endpoint or "", "fingerprint": run.get("fingerprint", ""), "arm": arm, "dtype": dtype,
                    **{name: getattr(args, name) for name in ("batch", "max_new_tokens", "samples", "temperature", "repetition_penalty", "seed", "limit")},
                    "probes": str(path), "probes_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "device": device,
                    "torch": torch.__version__, "transformers": transformers.__version__}
        answered = {(row["id"], row["sample"]) for row in open_csv(csv_path, settings)}
        jobs += [{"probe": probe, "sample": sample, "path": csv_path, "probe_set": probe_set_name(path)}
                 for probe in probes for sample in range(args.samples) if (probe["id"], str(sample)) not in answered]
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run folder, adapter folder or model name")
    parser.add_argument("--probes", required=True, nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, help="CSV, or a folder for several probe files (default results/<run>/<probes>.csv)")
    parser.add_argument("--arm", help="name of the arm (default: the run's own, else base)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1, help="answers a probe; more than one needs --temperature")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1, words already said become less likely: keeps very small "
                        "models from looping; the same for every arm, and reported")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--batch", type=int, default=32, help="answers generated at once (with --endpoint: requests under way at once)")
    parser.add_argument("--endpoint", metavar="URL", help="ask this OpenAI-compatible server for --model instead of loading it here")
    parser.add_argument("--limit", type=int, default=0, metavar="PAIRS", help="only the first PAIRS pairs of each family (for a quick look); probes without sides are all asked")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto")
    args = parser.parse_args()
    if args.samples > 1 and not args.temperature:
        die("--samples above 1 with greedy decoding would repeat one answer; give --temperature")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    # ------------------------------------------------------------ what is asked, and what is answered already
    run_file = Path(args.model) / "run.json"
    run = json.loads(run_file.read_text()) if run_file.exists() else {}
    run_name, arm = run.get("run") or Path(args.model).name, args.arm or run.get("arm") or "base"
    out = args.out or Path("results") / run_name
    device = pick_device()
    dtype = None if args.endpoint else {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype] or pick_dtype(device)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    jobs = plan_jobs(args, device.type if not args.endpoint else "endpoint", str(dtype), run, arm, out) if rank == 0 else []
    if ranks > 1:  # under torchrun one process plans, each takes its share, all append to the same files
        shared = [jobs]
        torch.distributed.init_process_group("gloo")
        torch.distributed.broadcast_object_list(shared)
        torch.distributed.barrier()
        jobs = shared[0][rank::ranks]
        torch.distributed.destroy_process_group()
    if not jobs:
        print(f"{out}: every probe is answered already")
        return

    # ------------------------------------------------------------ answers
    answers = answer_by_endpoint(jobs, args) if args.endpoint else answer_here(*load_checked(args.model, dtype, device), jobs, args)
    with tqdm(total=len(jobs), desc=f"eval {arm}", unit="answer", mininterval=1, disable=rank > 0) as bar:
        for job, response, n_tokens, stopped in answers:
            probe, prompt = job["probe"], job["probe"]["messages"][-1]["content"]
            action, ground = keyword_verdict(prompt, response)
            append_row(job["path"], {
                "run": run_name, "arm": arm, "seed": run.get("seed", ""), "probe_set": job["probe_set"],
                **{k: probe.get(k, "") for k in ("id", "family", "item", "side", "pair")}, "sample": job["sample"], "prompt": prompt,
                "response": response, "n_tokens": n_tokens, "stopped": stopped, "keyword_action": action, "keyword_ground": ground})
            bar.update()
    for path in sorted({job["path"] for job in jobs}) if rank == 0 else []:
        print(f"  wrote {path}", flush=True)
    if ranks > 1:
        os._exit(0)  # see train.py: the teardown of torch.distributed can abort a process that is done


if __name__ == "__main__":
    run_main(main, die)
