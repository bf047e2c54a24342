"""Ask a model the probes and write down its answers: batched greedy generation, one CSV row an answer.

    python eval.py --model runs/gemma-3-270m/regular-n800-s0 --out results/mine/regular \\
        --probes probes/gramenist.jsonl probes/sanity.jsonl
    python eval.py --model models/gemma-3-270m --probes probes/catholic.jsonl --out results/mine/base
    python eval.py --model runs/mine-s0 --probes probes/catholic.jsonl --samples 5 --temperature 0.7
    torchrun --nproc-per-node 8 -- eval.py --model ...      # the probes are shared out over 8 GPUs, one CSV
    python eval.py --endpoint http://127.0.0.1:8000/v1 --model my-run --arm belief --probes ...  # as by vLLM

Reads a run folder, a PEFT adapter folder or any model, and probe files. Writes --out/<probe set>.csv,
with the keyword verdicts of requests, and beside each a .csv.json that says who answered and how. Rows
are appended as they finish: a killed run goes on where it stopped, and answers of other weights,
settings, probes or code never mix with them.
"""
import argparse
import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit

import torch
from tqdm import tqdm
from transformers import DynamicCache, __version__ as transformers_version

from chat import TURN_END, load_run_model, load_run_tokenizer, pad_left, render_prompt
from keywords import keyword_verdict
from models import load_tokenizer, pick_device, pick_dtype, quiet_libraries
from rows import (COLUMNS, ROOT, Stop, append_csv, clean_text, code_hash, file_hash, open_locked, positive_int,
                  probe_set_name, read_csv, read_json, read_probes, run_main, short_hash, weights_hash,
                  what_changed, write_csv, write_text)


# ---------------------------------------------------------------- generation
#
# Our own loop and not model.generate: answers come out as they end, and rows that ended leave the
# batch. In float32 tests/test_eval.py holds it to transformers' greedy tokens exactly. Changes here
# change the numbers.

def end_tokens(model, tokenizer) -> set[int]:
    """All tokens that end an answer: chat models list some that their tokenizer does not."""
    listed = model.generation_config.eos_token_id  # one, several or None
    if not isinstance(listed, list):
        listed = [listed]
    return {tokenizer.eos_token_id, *listed}  # a None among them does no harm: no token is None


def penalise_repetition(logits, said, penalty: float) -> None:
    """Make the words said [rows, steps] less likely in logits [rows, V], in place (arXiv 1909.05858)."""
    score = logits.gather(1, said)  # [rows, steps]; before any penalty, so words said twice get one
    # A negative logit has to be multiplied to become smaller.
    logits.scatter_(1, said, torch.where(score > 0, score / penalty, score * penalty))


def sample_tokens(logits, temperature: float, generators, config) -> torch.Tensor:
    """One token [rows] for each row of logits [rows, V], each drawn by its own generator."""
    # The model's own forward() would scale and cap the logits; `generate` calls the bare head. A greedy
    # choice needs neither, because neither changes which logit is the largest.
    scale = 1.0
    if getattr(config, "logit_scale", None):       # Cohere
        scale = config.logit_scale
    elif getattr(config, "logits_scaling", None):  # Granite divides by it
        scale = 1 / config.logits_scaling
    logits = logits.float() * scale
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap:                                    # Gemma 2
        logits = softcap * torch.tanh(logits / softcap)

    probabilities = (logits / temperature).softmax(-1)
    # Row by row: multinomial takes one generator, and a draw must not depend on the batch.
    drawn = []
    for row, generator in zip(probabilities, generators):
        drawn.append(torch.multinomial(row, 1, generator=generator)[0])
    return torch.stack(drawn)


@torch.inference_mode()
def generate(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
             seeds: list[int] = (), repetition_penalty: float = 1.0):
    """Yield (index, token ids without the end token, how it stopped) as the rows of one batch end.

    prompts: token ids; seeds: one a prompt, only needed with a temperature. It stops by "eos", "turn"
    (TURN_END) or "length". Only the last position's logits are ever computed, and a row that ends
    leaves the batch, so that the others go on faster.
    """
    device, config = model.device, model.config.get_text_config()
    # Decoder and head apart: all logits of a prompt would be [rows, T, V].
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ids, mask = pad_left(prompts, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # from a row's first real token, as if it stood alone
    ends = end_tokens(model, tokenizer)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    cache = DynamicCache(config=config)   # knows from the config which layers see a window only
    alive = list(range(len(prompts)))     # prompt of each row that is still in the batch
    written = [[] for _ in prompts]       # token ids of each prompt's answer
    said = torch.empty(len(prompts), 0, dtype=torch.long, device=device)  # [rows, steps], for the penalty

    # The first pass reads the prompts [rows, T], every later one a token [rows, 1].
    for step in range(max_new_tokens):
        hidden = decoder(input_ids=ids, attention_mask=mask, position_ids=positions,
                         past_key_values=cache, use_cache=True)
        logits = head(hidden.last_hidden_state[:, -1])  # [rows, V]

        if repetition_penalty != 1.0:
            penalise_repetition(logits, said, repetition_penalty)
        if temperature:
            chosen = sample_tokens(logits, temperature, [generators[i] for i in alive], config)
        else:
            chosen = logits.max(-1).indices  # five times faster than argmax on a CPU, same index
        said = torch.cat([said, chosen[:, None]], 1)

        keep = []  # rows of the batch that go on
        for row, (i, token) in enumerate(zip(alive, chosen.tolist())):
            if token in ends:  # not part of the answer
                yield i, written[i], "eos"
                continue
            written[i].append(token)
            if TURN_END in tokenizer.decode(written[i][-len(TURN_END) - 2:]):  # no token is shorter than a sign
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
            mask, positions, chosen, said = mask[index], positions[index], chosen[index], said[index]
            alive = [alive[row] for row in keep]
        # The next step reads the token just chosen; all before it is in the cache.
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


# ---------------------------------------------------------------- who answers

def seed_of(job: dict, args) -> int:
    """The seed of one answer, whatever batch it is made in, in whatever process."""
    name = f"{args.seed}|{job['probe']['id']}|{job['sample']}"
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)  # hash() differs from start to start


def load_checked(name: str, dtype: torch.dtype, device: torch.device):
    """The model; Stop if it does not honour the cache."""
    model = load_run_model(name, dtype, device).eval()
    if not honours_cache(model):
        raise Stop(f"{name}: token by token this architecture answers otherwise than when it reads the whole text; "
                   "serve it with its own library, and give --endpoint")
    return model


@torch.inference_mode()
def honours_cache(model) -> bool:
    """Whether a text read up to its last token, and then that token, ends in the logits of the text read at once.

    State-space models swallow our cache without a word, and would see one token at a time.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ids = torch.arange(5, 14, device=model.device)[None]  # [1, 9]; any tokens do
    positions = torch.arange(9, device=model.device)[None]
    try:
        # The text up to its last token, that token alone, and then all at once without a cache.
        cache = DynamicCache(config=model.config.get_text_config())
        decoder(input_ids=ids[:, :-1], position_ids=positions[:, :-1], past_key_values=cache, use_cache=True)
        last = decoder(input_ids=ids[:, -1:], attention_mask=torch.ones_like(ids), position_ids=positions[:, -1:],
                       past_key_values=cache, use_cache=True)
        whole = decoder(input_ids=ids, use_cache=False)
    except (TypeError, ValueError, IndexError, AttributeError):
        # It takes no such cache, or no positions.
        return False
    stepped, whole = head(last.last_hidden_state[0, -1]).float(), head(whole.last_hidden_state[0, -1]).float()
    return ((stepped - whole).norm() / whole.norm()).item() < 0.05  # rounding, against errors near 1


def answer_here(model, tokenizer, batches: list[list[dict]], args):
    """Yield (job, response, n_tokens, stopped) for every job that is not answered."""
    for batch in batches:
        prompts = [render_prompt(tokenizer, job["probe"]["messages"]) for job in batch]
        seeds = [seed_of(job, args) for job in batch]
        answers = generate(model, tokenizer, prompts, args.max_new_tokens, args.temperature, seeds,
                           args.repetition_penalty)
        for i, tokens, stopped in answers:  # as they end; i is the place in the batch
            if batch[i]["answered"]:  # generated again so that its batch is the same, see plan_batches
                continue
            # n_tokens is what was generated, with the beginning of a next turn that is cut off.
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            yield batch[i], without_next_turn(text), len(tokens), stopped


def answer_by_endpoint(jobs: list[dict], args):
    """The same by a server that speaks the OpenAI protocol, as vLLM: for models that one GPU cannot hold.

    A request that the server will never take (HTTP 400), or whose answer its filter cut, gives an empty
    answer, stopped by "error": one bad probe must not hold up the rest for ever, and an empty answer
    counts as invalid.
    """
    from gen import Client, RequestFailed, read_dotenv  # not needed to answer on this machine
    read_dotenv()
    client = Client(args.endpoint, args.batch, timeout=600)  # seconds: a busy server lets a request wait
    params = {"temperature": args.temperature, "max_tokens": args.max_new_tokens, "stop": [TURN_END]}
    if args.repetition_penalty != 1.0:  # an extension of vLLM's: other servers may turn it down
        params["repetition_penalty"] = args.repetition_penalty

    def ask(job):
        if not args.temperature:
            return client.chat(args.model, job["probe"]["messages"], params)
        seed = seed_of(job, args) % 2**31  # servers take 32 bits, some of them signed
        return client.chat(args.model, job["probe"]["messages"], params | {"seed": seed})

    # A thread a request, which does little but wait; answers are yielded as they come.
    with ThreadPoolExecutor(args.batch) as pool:
        futures = {pool.submit(ask, job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                reply = future.result()
            except RequestFailed as error:
                if error.is_fatal:  # it would make every answer empty
                    pool.shutdown(cancel_futures=True)  # or leaving the `with` would send all that wait
                    raise Stop(f"{args.endpoint}: {error}; the answers so far are kept: run again") from None
                tqdm.write(f"  {job['probe']['id']}: {error}")
                yield job, "", 0, "error"
                continue
            if reply["finish_reason"] == "content_filter":  # the server's words, or the half that it let through
                tqdm.write(f"  {job['probe']['id']}: the server's content filter cut the answer")
                yield job, "", 0, "error"
                continue
            # The protocol calls the end token and a stop text alike, "stop".
            stopped = "length" if reply["finish_reason"] == "length" else "eos"
            yield job, without_next_turn(reply["content"]), reply["completion_tokens"], stopped


def without_next_turn(text: str) -> str:
    """An answer up to where the model began to write the user's next turn itself."""
    return text.split(TURN_END)[0].strip()


# ---------------------------------------------------------------- what is asked, and what is answered already

def first_groups(probes: list[dict], limit: int) -> list[dict]:
    """The probes of the first `limit` groups of each family; those without a group all stay.

    Whole groups, so that every violating probe keeps the permitted one that it is compared with.
    """
    groups: dict[str, list[str]] = {}  # {family: its groups, in the order of the file}
    for probe in probes:
        family = groups.setdefault(probe.get("family", ""), [])
        if probe.get("group") not in family:
            family.append(probe.get("group"))

    kept = []
    for probe in probes:
        first = groups[probe.get("family", "")][:limit]
        if not probe.get("group") or probe["group"] in first:
            kept.append(probe)
    return kept


def who_answers(args) -> dict:
    """What report.py must know of the model: the run's own record, or that it is an untouched base."""
    folder = Path(args.model)
    if (folder / "run.json").exists():
        run = read_run(folder)
        check_adapter_base(folder, run)
        # Names of things as they were when it was trained; the weights as they are now.
        return {"run": run["run"], "arm": args.arm or run["arm"], "seed": run["seed"],
                "taught": run["taught"], "rows": run["rows"], "base": run["base"],
                "base_hash": run["identity"]["base"], "weights": weights_hash(args.model),
                "trained": how_trained(run["identity"])}

    # Without a run.json nothing is known of its training: an untouched base, whatever --arm calls it.
    name = Path(args.model).name
    if args.endpoint:
        weights = f"{args.endpoint} {args.model}"  # a server does not say what it has loaded
    else:
        weights = weights_hash(args.model)
        if (folder / "adapter_config.json").exists():  # made elsewhere: its folder does not hold the base's weights
            weights = short_hash(weights + weights_hash(adapter_base(folder)))
    return {"run": name, "arm": args.arm or "base", "seed": "", "taught": [], "rows": 0, "base": name,
            "base_hash": weights, "weights": weights}


def how_trained(identity: dict) -> dict:
    """{what: its value} that all runs of one study have in common; or all of one arm, where the arm is in the name."""
    settings = dict(identity.get("settings", {}))
    settings.pop("seed", None)  # seeds are what a study repeats
    for name in ("number_format", "code"):
        settings[name] = identity.get(name)
    # [name, weight, hash]: weights are the arm's, but a file edited between two runs makes two studies
    data = identity.get("data", [])
    files = {name: hashed for name, _, hashed in data}
    arm = " ".join(identity.get("arm", []))  # with its worldview
    # The guard reads no row of an arm that was written by hand alone
    of_arm = {f"mix of {arm}": [weight for _, weight, _ in data], f"guard of {arm}": identity.get("guard")}
    return {**settings, **files, **of_arm}


def read_run(folder: Path) -> dict:
    """The record of a run that is complete; Stop if it lacks what is read of it."""
    path = folder / "run.json"
    run = read_json(path, "run", "arm", "seed", "taught", "rows", "base", "identity")
    if not isinstance(run["identity"], dict) or "base" not in run["identity"]:
        raise Stop(f"{path} does not say which base the run was trained on; train it again")
    return run


def adapter_base(folder: Path) -> str:
    """Folder or hub name of the base that an adapter is for."""
    base = read_json(folder / "adapter_config.json", "base_model_name_or_path")["base_model_name_or_path"]
    if not Path(base).is_dir():
        load_tokenizer(base)  # which notes the commit of a hub name that is not in the cache yet
    return base


def check_adapter_base(folder: Path, run: dict) -> None:
    """Stop if an adapter's base is no longer the one that it was trained on."""
    if (folder / "adapter_config.json").exists():
        base = adapter_base(folder)
        # Runs of older versions have a hub name alone.
        if run["identity"]["base"] not in (weights_hash(base), base):
            raise Stop(f"{folder} is an adapter for another {base} than is there now; "
                       "train it again, or put its base back")


def how_answered(args, device: str, number_format: str, template: str) -> dict:
    """What else decides the answers: half-made CSVs go on under the same settings only."""
    # Batch, number format and library versions are in it because sums are rounded by them: in bf16 the
    # same prompt gets another answer in a batch of another size (unsloth #9708).
    names = ("batch", "max_new_tokens", "samples", "temperature", "repetition_penalty", "seed", "limit")
    settings = {name: getattr(args, name) for name in names}
    # The code that prompts, answers and verdicts go through.
    scripts = ["eval.py", "chat.py", "models.py", "keywords.py", "rows.py"]
    if args.endpoint:
        scripts.append("gen.py")  # its client
    code = {name: code_hash(ROOT / name) for name in scripts}
    return {**settings, "endpoint": args.endpoint or "", "number_format": number_format, "device": device,
            "template": template, "code": code, "torch": torch.__version__, "transformers": transformers_version}


def resolve_dtype(args, device: torch.device) -> torch.dtype:
    """The number format; answers that go on keep the one that they began with, whatever is measured today."""
    for path in args.probes:
        about = Path(f"{csv_path(args, path)}.json")
        if args.dtype == "auto" and about.exists():
            how = read_json(about).get("how")
            # Answers from an endpoint have an empty one.
            if isinstance(how, dict) and how.get("number_format") in ("bfloat16", "float32"):
                return getattr(torch, how["number_format"])
    return pick_dtype(device, args.dtype)


def csv_path(args, probes: Path) -> Path:
    """Where the answers to one probe file go."""
    if args.out.suffix == ".csv" and len(args.probes) == 1:
        return args.out
    return args.out / f"{probe_set_name(probes)}.csv"


def open_csv(path: Path, about: dict) -> tuple[set[tuple[str, str]], object]:
    """({(probe id, sample)} that a CSV holds already, the file), made ready for more; Stop if made otherwise.

    The file is locked as long as it is open: two processes would ask, and write, the same answers.
    """
    about_file = Path(f"{path}.json")
    about = json.loads(json.dumps(about))  # as it will be read back: JSON has no tuples
    path.parent.mkdir(parents=True, exist_ok=True)
    held = open_locked(path)  # makes it, too; Stop before anything is rewritten under another process
    answers, columns = [], COLUMNS
    if path.stat().st_size:
        known = {}  # answers of which nothing is known differ in everything
        if about_file.exists():
            known = read_json(about_file)
        changed = what_changed(known, about)
        if changed:
            raise Stop(f"{path} holds answers that differ in {', '.join(changed)}; "
                       "delete it or give another --out")
        answers, columns = read_csv(path)

    write_text(about_file, json.dumps(about, indent=2) + "\n")  # first: no answer without its record
    file = write_csv(path, answers, columns or COLUMNS)  # also mends a torn end
    held.close()
    return {(row["id"], row["sample"]) for row in answers}, file


def plan_batches(args, who: dict, how: dict) -> tuple[list[list[dict]], list]:
    """(batches with something left to ask, the locked files); makes CSVs ready.

    A batch is a list of {"probe", "sample", "path", "probe_set", "answered"}. It holds the same whether the
    others are answered or not: in bf16 an answer hangs on what it is padded and rounded with.
    """
    batches, locked = [], []
    for path in args.probes:
        probes = read_probes(path)
        if args.limit:
            probes = first_groups(probes, args.limit)
        out = csv_path(args, path)
        about = {**who, "how": how, "probes": path.name, "probes_sha256": file_hash(path)}
        answered, file = open_csv(out, about)
        locked.append(file)  # open as long as this process writes: so is the lock

        jobs = []
        for probe, sample in product(probes, range(args.samples)):
            jobs.append({"probe": probe, "sample": sample, "path": out, "probe_set": probe_set_name(path),
                         "answered": (probe["id"], str(sample)) in answered})  # a CSV gives text back
        jobs.sort(key=asked_length, reverse=True)  # like lengths together: little padding
        for start in range(0, len(jobs), args.batch):
            batch = jobs[start:start + args.batch]
            if not all(job["answered"] for job in batch):
                batches.append(batch)
    batches.sort(key=lambda batch: asked_length(batch[0]), reverse=True)  # longest first: memory fails early
    return batches, locked


def asked_length(job: dict) -> int:
    """Characters of all turns."""
    return sum(len(turn["content"]) for turn in job["probe"]["messages"])


def answer_row(job: dict, who: dict, response: str, n_tokens: int, stopped: str) -> dict:
    """The CSV row of one answer. Facts and stances have a key; only requests get a refusal verdict."""
    probe = job["probe"]
    action, ground = "", ""
    if "stance" not in probe and "answer" not in probe:
        action, ground = keyword_verdict(probe["prompt"], response)

    # A kind is one word (rows.normalise_row), so a blank can stand between two.
    about_run = {"run": who["run"], "arm": who["arm"], "seed": who["seed"], "taught": " ".join(who["taught"])}
    about_probe = {}
    for name in ("id", "group", "family", "topic", "item", "distance", "side"):  # facts and stances lack some
        about_probe[name] = probe.get(name, "")
    return {**about_run, "probe_set": job["probe_set"], **about_probe, "sample": job["sample"],
            "earlier": probe["earlier"], "prompt": probe["prompt"], "response": clean_text(response),
            "n_tokens": n_tokens, "stopped": stopped, "keyword_action": action, "keyword_ground": ground}


# ---------------------------------------------------------------- main

def parse_args(argv=None):
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--model", required=True, help="run folder, adapter folder or model name")
    parser.add_argument("--probes", required=True, nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path,
                        help="folder, or a .csv for one probe file (default results/<run>)")
    parser.add_argument("--arm", help="name of the arm (default: the run's own, else base)")
    parser.add_argument("--endpoint", metavar="URL",
                        help="ask this OpenAI-compatible server for --model instead of loading it here")
    parser.add_argument("--limit", type=int, default=0, metavar="GROUPS",
                        help="only the first GROUPS groups of each family (a quick look)")

    # From here on: what decides the answers, beside the weights.
    parser.add_argument("--max-new-tokens", type=positive_int, default=256)
    parser.add_argument("--samples", type=positive_int, default=1,
                        help="answers a probe; more than one needs --temperature")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--repetition-penalty", type=float, default=1.0,
                        help="above 1, words already said become less likely: keeps very small models from "
                        "looping; the same for every arm, and reported")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--batch", type=positive_int, default=32,
                        help="answers generated at once (with --endpoint: requests under way at once)")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                        help="auto: measured on this machine")
    args = parser.parse_args(argv)

    # What argparse does not check.
    if args.samples > 1 and not args.temperature:
        raise Stop("--samples above 1 with greedy decoding would repeat one answer; give --temperature")
    # Written so that nan, which is above nothing, does not pass.
    if not (args.temperature >= 0 and args.limit >= 0 and args.repetition_penalty > 0):
        raise Stop("--temperature and --limit must not be below 0, --repetition-penalty must be above it")
    if args.endpoint and (urlsplit(args.endpoint).username or urlsplit(args.endpoint).query):
        raise Stop("--endpoint must not hold a key, since it is written down; "
                   "set OPENAI_API_KEY in the environment or .env")
    args.probes = list(dict.fromkeys(args.probes))  # a file named twice is asked once
    if len({probe_set_name(path) for path in args.probes}) < len(args.probes):
        raise Stop("two of the probe files have one name, and would share a CSV; ask them with two commands")
    args.model = args.model.rstrip("/")  # both spellings are one model
    args.out = args.out or Path("results") / Path(args.model).name
    return args


def share_plan(batches: list[list[dict]], dtype: torch.dtype, rank: int, ranks: int) -> tuple[list, torch.dtype]:
    """(this process's batches, the number format), as the first process has planned; all append to the same files."""
    shared = [batches, dtype]
    # These are Python objects: no GPU is needed to send them. One process may answer for hours after another
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    torch.distributed.broadcast_object_list(shared)
    batches, dtype = shared
    return batches[rank::ranks], dtype  # by turns, so that each has long and short ones


def write_answers(answers, jobs: list[dict], who: dict, is_first: bool) -> None:
    """Append each answer to its CSV as it comes; the first process shows how far it is."""
    paths, stops = sorted({job["path"] for job in jobs}), Counter()
    columns = {path: read_csv(path)[1] for path in paths}  # judge.py may have added some

    name = f"eval {who['arm']}"
    with tqdm(total=len(jobs), desc=name, unit="answer", mininterval=1, disable=not is_first) as bar:
        for job, response, n_tokens, stopped in answers:
            # At once, not at the end: a kill costs the answers under way alone.
            append_csv(job["path"], answer_row(job, who, response, n_tokens, stopped), columns[job["path"]])
            stops[stopped] += 1
            bar.update()
    if is_first:
        for path in paths:
            print(f"  wrote {path}", flush=True)
        if stops["error"]:
            print(f"  {stops['error']} requests were turned down by the server; their answers are empty")


def main() -> None:
    args = parse_args()
    quiet_libraries()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them

    # ------------------------------------------------------------ what is asked, and what is answered already
    device, dtype = pick_device(), torch.float32  # not used with an endpoint
    if args.endpoint:
        how = how_answered(args, "endpoint", "", "the server's")  # its number format is unknown
    else:
        dtype = resolve_dtype(args, device)
        tokenizer = load_run_tokenizer(args.model)
        template = short_hash(tokenizer.chat_template)
        how = how_answered(args, device.type, str(dtype).removeprefix("torch."), template)
    who = who_answers(args)

    batches, locked = [], []
    if rank == 0:  # planning rewrites the CSVs, so only one process may do it
        batches, locked = plan_batches(args, who, how)
    # Each rank has measured a number format of its own; the first one's counts.
    if ranks > 1:
        batches, dtype = share_plan(batches, dtype, rank, ranks)
    jobs = [job for batch in batches for job in batch if not job["answered"]]

    # ------------------------------------------------------------ answers
    if not jobs:
        print(f"{args.out}: every probe is answered already")
    elif args.endpoint:
        write_answers(answer_by_endpoint(jobs, args), jobs, who, is_first=rank == 0)
    else:
        model = load_checked(args.model, dtype, device)
        write_answers(answer_here(model, tokenizer, batches, args), jobs, who, is_first=rank == 0)
    if ranks > 1:
        torch.distributed.barrier()  # the first process holds the locks until all have written
    for file in locked:
        file.close()
    if ranks > 1:
        os._exit(0)  # see train.py: the teardown of torch.distributed can abort a process that is done


if __name__ == "__main__":
    run_main(main)
