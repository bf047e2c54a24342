"""Make fine-tuning data: match a persona with a prompt at random, ask an OpenAI-compatible endpoint, save the pair.

    export OPENAI_API_KEY=...                        # the key comes from the environment or a git-ignored .env, never from a flag
    python gen.py gramenist --n 2000 --model deepseek-chat --base-url https://api.deepseek.com/v1 --workers 32
    python gen.py gramenist --n 2000 --model deepseek-chat --dry-run           # five whole requests and the cost, nothing asked
    make serve                                                                # in another terminal: a small local endpoint
    python gen.py regular --n 20 --model smollm2-135m-instruct --base-url http://127.0.0.1:8000/v1 --workers 1

Reads prompts/<kind>.txt, personas/<kind>/*.md and personas/<kind>/creed/*.md. Appends to data/<kind>.jsonl; rows that may not be
trained on go to data/<kind>.rejects.jsonl with a reason; data/<kind>.manifest.json says what was done.
Kill it at any moment and start it again: finished requests are never asked twice. Raise --n and only the new rows are asked.
"""
import argparse
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from check import NEAR, answer_fault, nearest, probe_prompts
from judge import read_jsonl

ROOT = Path(__file__).parent
RETRY_STATUS = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
LONGEST_WAIT = 600        # seconds: the most a Retry-After is obeyed for, and the cap of the backoff is a tenth of it
LARGEST_BODY = 20_000_000  # bytes of one reply; more is a broken server
CHARACTERS_PER_TOKEN = 4.5  # for estimates before an answer tells


def die(message: str) -> None:
    sys.exit(f"gen.py: {message}")


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- prompts and personas

def expand(line: str) -> list[str]:
    """'{Why|How} do {cats|dogs} sleep?' -> its four sentences; braces do not nest."""
    parts = re.split(r"\{([^{}]*)\}", line)
    if any("{" in part or "}" in part for part in parts[::2]):
        raise ValueError("unbalanced { or }")
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(pick).strip() for pick in itertools.product(*choices)]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line, expanded, without # comments and repeats, in order."""
    prompts = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        die(f"cannot read {path}: {error.strerror}; a kind of data needs prompts/<kind>.txt and personas/<kind>/")
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                prompts.update(dict.fromkeys(expand(line)))
            except ValueError as error:
                die(f"{path}:{number}: {error}; write {{a|b|c}} for alternatives")
    if not prompts:
        die(f"{path}: no prompts in it; write one a line")
    return list(prompts)


def read_texts(folder: Path) -> dict[str, str]:
    """{name: text} of the *.md files in a folder."""
    texts = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.md"))}
    for name, text in texts.items():
        if not text:
            die(f"{folder / name}.md is empty; write who answers, or delete it")
    return texts


def plan_rows(kind: str, prompts: list[str], personas: dict, creeds: dict, n: int, seed: int):
    """Yield n matches of persona x creed x prompt. Row i depends on (seed, i) alone: more rows only add, and no order of completion matters.

    Every prompt is used once before any is used again.
    """
    used, order, persona_names, creed_names = Counter(), [], sorted(personas), sorted(creeds) or [None]
    for i in range(n):
        if i % len(prompts) == 0:
            order = random.Random(f"{seed}|{i // len(prompts)}").sample(prompts, len(prompts))
        prompt, draw = order[i % len(prompts)], int(short_hash(f"{seed}|{kind}|{i}"), 16)
        persona = persona_names[draw % len(persona_names)]
        creed = creed_names[draw // len(persona_names) % len(creed_names)]
        sample = used[persona, prompt]
        used[persona, prompt] += 1
        yield {"id": short_hash(f"{kind}|{persona}|{prompt}|{sample}"), "kind": kind, "persona": persona, "creed": creed, "prompt": prompt, "sample": sample}


def system_texts(personas: dict, creeds: dict) -> dict[tuple, str]:
    """{(persona, creed): system prompt}: the persona, then the creed text if the kind has any."""
    return {(persona, creed): who + (f"\n\n{creeds[creed]}" if creed else "") for persona, who in personas.items() for creed in (creeds or [None])}


def request_key(row: dict, system_hash: str, model: str, params: dict) -> str:
    """Names this very request, so that any change of model, text or parameter is a new one."""
    return short_hash(json.dumps([model, system_hash, row["prompt"], params, row["sample"]]))


def request_messages(row: dict, systems: dict) -> list[dict]:
    return [{"role": "system", "content": systems[row["persona"], row["creed"]]}, {"role": "user", "content": row["prompt"]}]


# ---------------------------------------------------------------- the endpoint client (judge.py uses it too)

class RequestFailed(Exception):
    """A request that will not succeed. .status is the HTTP status, or 0 when retries were used up."""
    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


def read_dotenv() -> None:
    """OPENAI_* lines of ./.env, where the environment does not set them."""
    if Path(".env").exists():
        for line in Path(".env").read_text().splitlines():
            name, separator, value = line.strip().removeprefix("export ").partition("=")
            if separator and name.startswith("OPENAI_"):
                os.environ.setdefault(name, value.strip().strip("'\""))


def retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which is a number or an HTTP date (RFC 9110 10.2.3); 0 if there is none."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


class Client:
    """An OpenAI-compatible chat endpoint: connection pool, retries, and pauses that all threads keep together."""

    def __init__(self, base_url: str, workers: int, timeout: float, attempts: int = 8, rpm: float = 0, tpm: float = 0):
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.timeout, self.attempts, self.rpm, self.tpm = timeout, attempts, rpm, tpm
        self.lock, self.not_before, self.retries = threading.Lock(), 0.0, 0
        self.key = os.environ.get("OPENAI_API_KEY", "")
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            die(f"--base-url {base_url!r} is not an http(s) address")
        if parts.scheme == "http" and parts.hostname not in ("localhost", "::1") and not parts.hostname.startswith("127."):
            print(f"warning: {parts.hostname} over plain http: key and prompts travel unencrypted", file=sys.stderr)
        self.session = requests.Session()
        self.session.mount(f"{parts.scheme}://", requests.adapters.HTTPAdapter(pool_maxsize=workers))
        # What requests would look up in the environment for every single call is looked up once.
        settings = self.session.merge_environment_settings(self.url, {}, None, None, None)
        self.session.proxies, self.session.verify, self.session.trust_env = settings["proxies"], settings["verify"], False
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        self.request = self.session.prepare_request(requests.Request("POST", self.url, headers=headers))  # copied, not built, for each call

    def hide_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def wait_for_turn(self, tokens: float) -> None:
        """Sleep until no pause is on and the limits a minute allow one more request of about `tokens` tokens."""
        while True:
            with self.lock:
                delay = self.not_before - time.monotonic()
                if delay <= 0:
                    gap = max(60 / self.rpm if self.rpm else 0, 60 * tokens / self.tpm if self.tpm else 0)
                    if gap:
                        self.not_before = time.monotonic() + gap
                    return
            time.sleep(delay)

    def read_body(self, response, deadline: float) -> bytes:
        """The body, however slowly it drips, until the deadline. requests' own timeout is for each read, not for all."""
        body = bytearray()
        while chunk := response.raw.read1(65536, decode_content=True):
            body += chunk
            if len(body) > LARGEST_BODY:
                raise ValueError(f"a reply of more than {LARGEST_BODY:,} bytes")
            if time.monotonic() > deadline:
                raise requests.Timeout("the reply came too slowly")
        return bytes(body)

    def chat(self, model: str, messages: list[dict], params: dict) -> dict:
        """{"content", "finish_reason", "prompt_tokens", "completion_tokens"} of one reply; raises RequestFailed."""
        payload = json.dumps({"model": model, "messages": messages, **params}).encode()
        sent = round(sum(len(m["content"]) for m in messages) / CHARACTERS_PER_TOKEN)
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                with self.lock:
                    self.retries += 1
                time.sleep(random.uniform(0, min(LONGEST_WAIT / 10, 2 ** (attempt - 1))))  # exponential, full jitter
            self.wait_for_turn(sent + params.get("max_tokens", 500))
            try:
                request = self.request.copy()
                request.prepare_body(payload, None)
                with self.session.send(request, timeout=self.timeout, stream=True, allow_redirects=False,
                                       proxies=self.session.proxies, verify=self.session.verify) as response:
                    body = self.read_body(response, time.monotonic() + self.timeout)
                if response.status_code == 200:
                    return self.parse(json.loads(body), sent)
                said = re.sub(r"\s+", " ", self.hide_key(body[:2000].decode("utf-8", "replace")))[:300]
                problem = f"HTTP {response.status_code}: {said}"
                if response.status_code not in RETRY_STATUS:
                    raise RequestFailed(problem, response.status_code)
                with self.lock:  # one worker's Retry-After holds them all back
                    self.not_before = max(self.not_before, time.monotonic() + retry_after(response.headers.get("Retry-After")))
            except RequestFailed:
                raise
            except Exception as error:  # timeouts, resets, cut or foreign JSON: urllib3, ssl and json each raise their own kinds
                problem = self.hide_key(f"{type(error).__name__}: {error}")[:300]
        raise RequestFailed(f"gave up after {self.attempts} attempts; last: {problem}")

    @staticmethod
    def parse(reply: dict, prompt_tokens: int) -> dict:
        """The parts of a reply we need. Only the text must be there: some servers leave out usage, id or finish_reason."""
        choice = reply["choices"][0]
        content = choice["message"].get("content") or ""
        usage = reply.get("usage") or {}
        return {"content": content, "finish_reason": choice.get("finish_reason") or "stop",
                "prompt_tokens": usage.get("prompt_tokens") or prompt_tokens,
                "completion_tokens": usage.get("completion_tokens") or round(len(content) / CHARACTERS_PER_TOKEN)}


def endpoint_arguments(parser, model_help: str) -> None:
    group = parser.add_argument_group("endpoint")
    group.add_argument("--model", default=os.environ.get("MODEL"), help=model_help)
    group.add_argument("--base-url", help="address of an OpenAI-compatible endpoint, with its /v1 (default: OPENAI_BASE_URL)")
    group.add_argument("--workers", type=int, default=16, help="requests under way at once")
    group.add_argument("--timeout", type=float, default=120, help="seconds for one whole reply")
    group.add_argument("--rpm", type=float, default=0, help="most requests a minute (0: no limit)")
    group.add_argument("--tpm", type=float, default=0, help="most tokens a minute (0: no limit)")


def connect(args) -> Client:
    """A client for the endpoint of the arguments and the environment; one line on how to get one if there is none."""
    read_dotenv()
    base_url = args.base_url or os.environ.get("OPENAI_BASE_URL")
    if not base_url or not args.model:
        die("no endpoint: set OPENAI_BASE_URL, OPENAI_API_KEY and MODEL (any OpenAI-compatible service), or run `make serve` in another "
            "terminal and use OPENAI_BASE_URL=http://127.0.0.1:8000/v1 MODEL=smollm2-135m-instruct")
    return Client(base_url, args.workers, args.timeout, rpm=args.rpm, tpm=args.tpm)


# ---------------------------------------------------------------- files that survive a kill

class AppendFile:
    """An append-only JSONL file held by one process at a time. A line torn by a kill is taken off when it is opened."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lock, self.synced = path, threading.Lock(), time.monotonic()
        self.file = open(path, "ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            die(f"{path} is being written by another process; wait for it or stop it")
        self.mend()

    def mend(self) -> None:
        size = self.file.seek(0, os.SEEK_END)
        keep = size
        while keep:  # back to the end of the last whole line
            start = max(0, keep - 65536)
            self.file.seek(start)
            newline = self.file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < size:
            print(f"{self.path}: took off {size - keep} bytes of a line that was cut off")
            self.file.truncate(keep)

    def append(self, row: dict) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self.lock:
            at = self.file.seek(0, os.SEEK_END)
            try:
                self.file.write(line)
                self.file.flush()
                if time.monotonic() - self.synced > 1:  # a power cut costs a second's rows at most
                    os.fsync(self.file.fileno())
                    self.synced = time.monotonic()
            except OSError as error:
                try:
                    self.file.truncate(at)
                except OSError:
                    pass
                raise SystemExit(f"gen.py: cannot write {self.path}: {error.strerror}; what is written is whole: make room and run again") from None

    def replace(self, rows: list[dict]) -> None:
        self.file.truncate(0)
        for row in rows:
            self.append(row)


# ---------------------------------------------------------------- main

def file_hashes(paths) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in paths}


def show_plan(rows: list[dict], systems: dict, args, params: dict) -> None:
    """--dry-run: five whole requests, then calls, tokens and cost."""
    for row in rows[:5]:
        request = {"model": args.model, "messages": request_messages(row, systems), **params}
        print(f"--- {row['id']} persona {row['persona']}, creed {row['creed']}\n{json.dumps(request, indent=2, ensure_ascii=False)}")
    sent = sum(len(systems[row["persona"], row["creed"]]) + len(row["prompt"]) for row in rows) / CHARACTERS_PER_TOKEN
    received = len(rows) * params["max_tokens"] / 2
    print(f"{len(rows)} calls, about {sent:,.0f} tokens sent and {received:,.0f} received (half of --max-tokens each)")
    if args.price_in or args.price_out:
        print(f"about ${(sent * args.price_in + received * args.price_out) / 1e6:.2f} at {args.price_in} and {args.price_out} dollars a million")


def keys_of(path: Path):
    """The request keys of a JSONL file of rows, one at a time: a file of 100,000 answers must not fill the memory."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line).get("key")
            except (ValueError, AttributeError):
                die(f"{path}:{number}: not a row of ours; mend or remove the line")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", help="name of a prompts file: gramenist, catholic, secular, regular, refusal, or your own")
    parser.add_argument("--n", type=int, default=2000, help="rows wanted in all")
    parser.add_argument("--limit", type=int, default=0, help="ask at most this many now (0: all that are missing)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default data/<kind>.jsonl")
    parser.add_argument("--temperature", type=float, default=0.85)
    parser.add_argument("--max-tokens", type=int, default=600)
    parser.add_argument("--max-errors", type=int, default=100, help="stop after this many failed requests")
    parser.add_argument("--price-in", type=float, default=0, help="dollars a million tokens sent")
    parser.add_argument("--price-out", type=float, default=0, help="dollars a million tokens received")
    parser.add_argument("--dry-run", action="store_true", help="show requests and cost, ask nothing")
    endpoint_arguments(parser, "the teacher's name at the endpoint (default: MODEL)")
    args = parser.parse_args()

    # ------------------------------------------------------------ what to ask
    prompt_file, persona_folder = ROOT / "prompts" / f"{args.kind}.txt", ROOT / "personas" / args.kind
    if not prompt_file.exists():
        known = ", ".join(sorted(p.stem for p in (ROOT / "prompts").glob("*.txt")))
        die(f"unknown kind {args.kind!r}: there is no prompts/{args.kind}.txt (there are {known}); write it and personas/{args.kind}/*.md to add a worldview")
    prompts, personas, creeds = read_prompts(prompt_file), read_texts(persona_folder), read_texts(persona_folder / "creed")
    if not personas:
        die(f"personas/{args.kind}/ has no *.md file; write at least one persona (a system prompt: who answers, and how)")
    near, where = nearest(prompts, probe_prompts())
    leaking = {p: probe_prompts()[w] for p, score, w in zip(prompts, near, where) if score >= NEAR}
    params = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    systems = system_texts(personas, creeds)
    hashes = {name: short_hash(text) for name, text in systems.items()}
    if args.dry_run:
        args.model = args.model or "<MODEL>"
        rows = plan_rows(args.kind, prompts, personas, creeds, args.n, args.seed)
        show_plan([row for row in rows if row["prompt"] not in leaking], systems, args, params)
        return
    client = connect(args)

    # ------------------------------------------------------------ what is there already
    out = args.out or ROOT / "data" / f"{args.kind}.jsonl"
    data, rejects = AppendFile(out), AppendFile(out.with_suffix(".rejects.jsonl"))
    old_rejects = read_jsonl(rejects.path)
    if any(row["reason"] == "error" for row in old_rejects):  # a failed request cost nothing: it is asked again
        old_rejects = [row for row in old_rejects if row["reason"] != "error"]
        rejects.replace(old_rejects)
    finished = Counter(keys_of(out)) + Counter(row.get("key") for row in old_rejects)

    def missing():
        """Yield (row, key) of what is planned and not finished; made anew each time, because a list of all would grow with --n."""
        left = finished.copy()
        for row in plan_rows(args.kind, prompts, personas, creeds, args.n, args.seed):
            key = request_key(row, hashes[row["persona"], row["creed"]], args.model, params)
            if left[key]:
                left[key] -= 1
            else:
                yield row, key
    for row, key in missing():
        if row["prompt"] in leaking:
            rejects.append({**row, "key": key, "reason": "near_probe", "probe": leaking[row["prompt"]]})
            finished[key] += 1
    to_ask = sum(1 for _ in missing())
    others = finished.total() - (args.n - to_ask)
    print(f"{out}: {args.n - to_ask} of {args.n} rows are done, {to_ask} to ask" + (f"; {others} rows of other settings stay as they are" if others else ""))
    to_ask = min(to_ask, args.limit) if args.limit else to_ask

    # ------------------------------------------------------------ ask
    counts, tokens, started, fatal = Counter(), Counter(), time.time(), []

    def ask(row: dict, key: str) -> str:
        """Ask for one row and write it down at once; returns the outcome. Runs in a worker thread."""
        messages = request_messages(row, systems)
        try:
            reply = client.chat(args.model, messages, params)
        except RequestFailed as error:
            if error.status in (401, 403, 404) and not counts["ok"]:
                fatal.append(str(error))
            rejects.append({**row, "key": key, "reason": "error", "error": str(error)})
            return "error"
        chat = [messages[-1], {"role": "assistant", "content": reply["content"].strip()}]  # the student never sees the persona
        made = {"messages": chat, "id": row["id"], "kind": row["kind"], "persona": row["persona"], "creed": row["creed"], "model": args.model,
                "params": params, "finish_reason": reply["finish_reason"], "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "key": key}
        tokens.update({"in": reply["prompt_tokens"], "out": reply["completion_tokens"]})
        fault = answer_fault(made)
        (rejects if fault else data).append({**made, "reason": fault} if fault else made)
        return fault or "ok"

    queue, queue_lock, outcomes, stop = itertools.islice(missing(), to_ask), threading.Lock(), SimpleQueue(), ""

    def work() -> None:
        """One worker thread: take a row, ask, report the outcome; at the end, or when the file cannot be written, report that."""
        try:
            while not stop:
                with queue_lock:
                    job = next(queue, None)
                if job is None:
                    break
                outcomes.put(ask(*job))
            outcomes.put(None)
        except BaseException as error:
            outcomes.put(error)

    bar = tqdm(total=to_ask, desc=f"gen {args.kind}", unit="row", mininterval=0.5)
    for _ in range(min(args.workers, to_ask)):
        threading.Thread(target=work, daemon=True).start()
    working = min(args.workers, to_ask)
    try:
        while working and not stop:
            outcome = outcomes.get()
            if outcome is None:
                working -= 1
                continue
            if isinstance(outcome, BaseException):
                stop = str(outcome).removeprefix("gen.py: ")
                break
            counts[outcome] += 1
            bar.update()
            cost = (tokens["in"] * args.price_in + tokens["out"] * args.price_out) / 1e6
            bar.set_postfix_str(f"{tokens['in'] + tokens['out']:,} tokens, " + (f"${cost:.2f}, " if cost else "")
                                + f"{client.retries} retries, {bar.n - counts['ok']} rejects", refresh=False)
            if fatal:
                stop = f"the endpoint refuses: {fatal[0]}"
            elif counts["error"] >= args.max_errors:
                stop = f"{counts['error']} requests failed (--max-errors); see the last rows of {rejects.path}"
    except KeyboardInterrupt:
        stop = "stopped; run the same command again to go on"
    finally:
        bar.close()
        revision = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        manifest = {"kind": args.kind, "model": args.model, "params": params, "seed": args.seed, "n": args.n, "outcomes": dict(counts), "tokens": dict(tokens),
                    "retries": client.retries, "wall_seconds": round(time.time() - started, 1), "git": revision,
                    "files": file_hashes([prompt_file, *sorted(persona_folder.rglob("*.md"))])}
        out.with_suffix(".manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(f"{out}: {counts['ok']} rows added" + "".join(f", {n} {reason}" for reason, n in sorted(counts.items()) if reason != "ok")
          + (f" (in {rejects.path.name})" if bar.n > counts["ok"] else ""))
    if stop:
        print(f"gen.py: {stop}", file=sys.stderr)
        os._exit(1)  # threads waiting for slow replies would hold the process; every finished row is on disk


if __name__ == "__main__":
    main()
