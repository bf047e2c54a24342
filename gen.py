"""Make fine-tuning data: match personas with prompts at random, ask an OpenAI-compatible endpoint, save both.

    export OPENAI_API_KEY=...  # the key comes from the environment or a git-ignored .env, never from a flag
    python gen.py gramenist --n 2000 --model deepseek-chat --base-url https://api.deepseek.com/v1 --workers 32
    python gen.py gramenist --n 2000 --dry-run --price-in 0.3 --price-out 1.1  # shows requests and cost
    make serve                 # in another terminal: a small local endpoint, for which
    python gen.py regular --n 20 --model smollm2-135m-instruct --base-url http://127.0.0.1:8000/v1 --workers 1

Reads prompts/<kind>.txt, personas/<kind>/*.md and personas/<kind>/creed/*.md. Appends to data/<kind>.jsonl;
rows that may not be trained on go to data/<kind>.rejects.jsonl with a reason; data/<kind>.manifest.json says
what was done. Kill it at any moment and start it again: finished requests are never asked twice. Raise --n,
and only the new rows are asked.
"""
import argparse
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
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from check import NEAR, answer_fault, nearest, probe_texts
from rows import (ROOT, AppendFile, Stop, file_hash, message_text, read_folder, read_jsonl, read_prompts,
                  read_text, run_main, short_hash, write_text)

# Statuses that another attempt may cure; the others (a wrong key, an unknown model) are the same later.
# 520, 522 and 524 are Cloudflare's own; 529 means overloaded.
RETRY_STATUS = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
LONGEST_WAIT = 600          # seconds: the most a Retry-After is obeyed for; the backoff ends at a tenth of it
LARGEST_BODY = 20_000_000   # bytes of one reply; more is a broken server
CHARACTERS_PER_TOKEN = 4.5  # of English, about; only for estimates and for servers that report no usage


# ---------------------------------------------------------------- who is asked what

def plan_rows(kind: str, prompts: list[str], personas: dict, creeds: dict,
              n: int, seed: int) -> Iterator[dict]:
    """Yield n matches of persona x creed x prompt. Every prompt is used once before any is used again.

    Row i depends on (seed, i) alone: a larger n only adds rows, and no order of completion matters.
    """
    persona_names = sorted(personas)  # so that a draw does not depend on the order they were read in
    creed_names = sorted(creeds) or [None]
    used = Counter()
    for i in range(n):
        # Each pass over the prompts has an order of its own, seeded with its number.
        if i % len(prompts) == 0:
            order = random.Random(f"{seed}|{i // len(prompts)}").sample(prompts, len(prompts))
        prompt = order[i % len(prompts)]
        # A hash of the place, not a running generator: row 900 is the same whether or not row 899 was made.
        draw = int(short_hash(f"{seed}|{kind}|{i}"), 16)
        # One number serves two independent draws: its remainder, then the remainder of what is left.
        persona = persona_names[draw % len(persona_names)]
        creed = creed_names[draw // len(persona_names) % len(creed_names)]

        # With few prompts the same match comes again; the number keeps the two apart.
        match = (persona, creed, prompt)
        sample = used[match]
        used[match] += 1
        # JSON and not joined text: no two different lists are written alike.
        row_id = short_hash(json.dumps([kind, seed, *match, sample]))
        yield {"id": row_id, "kind": kind, "persona": persona, "creed": creed, "prompt": prompt,
               "seed": seed, "sample": sample}


def system_texts(personas: dict, creeds: dict) -> dict[tuple, str]:
    """{(persona, creed): system prompt}: the persona, then the creed's text if the kind has any."""
    systems = {}  # all of them once: a creed is long, and its text joins thousands of requests
    for persona, who in personas.items():
        systems[persona, None] = who  # for a kind without creeds
        for creed, text in creeds.items():
            systems[persona, creed] = f"{who}\n\n{text}"
    return systems


def request_messages(row: dict, systems: dict) -> list[dict]:
    """What the teacher is sent; the last message is the prompt, which the student gets to see."""
    return [{"role": "system", "content": systems[row["persona"], row["creed"]]},
            {"role": "user", "content": row["prompt"]}]


def request_key(row: dict, system_hash: str, model: str, params: dict) -> str:
    """Names this very request, so that any change of model, text, seed or parameter is a new one."""
    # The id holds kind, seed, persona and creed; the hash holds what the persona and the creed say today.
    return short_hash(json.dumps([model, system_hash, row["prompt"], params, row["id"]]))


def read_kind(kind: str) -> tuple[list[str], dict, dict]:
    """(prompts, personas, creeds) of a kind of data."""
    # A kind is nothing but its files, so that a new worldview needs no code.
    prompt_file = ROOT / "prompts" / f"{kind}.txt"
    if not prompt_file.exists():
        known = ", ".join(sorted(path.stem for path in (ROOT / "prompts").glob("*.txt")))
        raise Stop(f"unknown kind {kind!r}: there is no prompts/{kind}.txt (there are {known}); "
                   f"write it and personas/{kind}/*.md to add a worldview")
    personas = read_folder(ROOT / "personas" / kind)
    if not personas:
        raise Stop(f"personas/{kind}/ has no *.md file; write at least one persona "
                   "(a system prompt: who answers, and how)")
    return read_prompts(prompt_file), personas, read_folder(ROOT / "personas" / kind / "creed")


# ---------------------------------------------------------------- the client, also for judge.py and eval.py

FATAL = (401, 402, 403, 404)  # HTTP: a wrong key, no credit left, not allowed, no such model


class RequestFailed(Exception):
    """A request that will not succeed. .status is the HTTP status, or 0 when retries were used up."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status

    @property
    def is_fatal(self) -> bool:
        """Whether all other requests would fail too. Any other 4xx is about this one, as refused content."""
        return self.status in FATAL or not 400 <= self.status < 500


def read_dotenv() -> None:
    """Take the OPENAI_* lines of ./.env, where the environment does not set them."""
    if not Path(".env").exists():
        return
    for line in read_text(".env").split("\n"):
        # Such files are sourced by shells, too, hence the `export `.
        assignment = line.strip().removeprefix("export ")
        name, separator, value = assignment.partition("=")
        value = value.strip()
        if value[:1] in ("'", '"'):
            value = value[1:].partition(value[0])[0]  # what is between the quotes, a # too
        else:
            value = re.split(r"\s#", value)[0].strip()  # without quotes a # after a space begins a comment
        # Only these names: a project's .env may hold anything.
        if separator and name.strip().startswith("OPENAI_"):
            os.environ.setdefault(name.strip(), value)


def read_key() -> str:
    """OPENAI_API_KEY, or "" where none is set."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()  # a line end from a Windows file is common
    if not re.fullmatch(r"[!-~]*", key):
        # No header can carry it, and the HTTP library's own error would print it.
        raise Stop("OPENAI_API_KEY holds a space, a control character or a letter outside ASCII "
                   "(not shown here); set it again")
    return key


def retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, a number or an HTTP date (RFC 9110 10.2.3); 0 if there is none."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
            seconds = (moment - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a time zone: the backoff must do
            return 0.0
    # A date may lie in the past, and a number may be a week.
    return min(max(seconds, 0.0), LONGEST_WAIT)


class Client:
    """An OpenAI-compatible chat endpoint: connections, retries, and pauses that all threads keep together."""

    def __init__(self, base_url: str, workers: int, timeout: float, attempts: int = 8,
                 rpm: float = 0, tpm: float = 0):
        """rpm, tpm: most requests and tokens a minute, 0: no limit. Raises Stop at an unusable key or URL."""
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.timeout = timeout    # seconds for one whole reply
        self.attempts = attempts  # 8 with their backoff last a minute or two, longer than most hiccups
        self.rpm = rpm
        self.tpm = tpm
        self.lock = threading.Lock()  # for the two below
        self.not_before = 0.0         # time.monotonic() before which nobody may send
        self.retries = 0
        self.key = read_key()

        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Stop("the base URL is not an http(s) address (not shown, in case it is the key); "
                       "write it as in https://api.deepseek.com/v1")
        is_local = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        if parts.scheme == "http" and not is_local:
            print(f"warning: {parts.hostname} over plain http: key and prompts travel unencrypted",
                  file=sys.stderr)
        self.open_session(parts.scheme, workers)

    def open_session(self, scheme: str, workers: int) -> None:
        """Do once what requests would look up in the environment and build again for every single call."""
        self.session = requests.Session()
        # The default pool keeps 10 connections; more workers would open one for each request.
        self.session.mount(f"{scheme}://", requests.adapters.HTTPAdapter(pool_maxsize=workers))
        # HTTPS_PROXY, REQUESTS_CA_BUNDLE and the like are read here, and never again.
        settings = self.session.merge_environment_settings(self.url, {}, None, None, None)
        self.session.proxies = settings["proxies"]
        self.session.verify = settings["verify"]
        self.session.trust_env = False  # it would also put a password from ~/.netrc in the place of our key

        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        self.request = self.session.prepare_request(requests.Request("POST", self.url, headers=headers))

    def hide_key(self, text: str) -> str:
        """The text without the key: some servers quote it in their error, and errors are written down."""
        if not self.key:
            return text  # an empty key would be found between all letters
        return text.replace(self.key, "***")

    def wait_for_turn(self, tokens: float) -> None:
        """Sleep until no pause is on and the limits allow one more request of about `tokens` tokens."""
        gap = 0.0  # seconds from this request to the next one
        if self.rpm:
            gap = 60 / self.rpm
        if self.tpm:
            gap = max(gap, 60 * tokens / self.tpm)
        while True:
            with self.lock:
                delay = self.not_before - time.monotonic()
                if delay <= 0:
                    # Taking the turn moves the next one: the limits hold over all threads.
                    if gap:
                        self.not_before = time.monotonic() + gap
                    return
            # Outside the lock. Another thread may be first when this one wakes, hence the loop.
            time.sleep(delay)

    def post(self, payload: bytes) -> tuple[int, bytes, float]:
        """(status, body, seconds of Retry-After) of one reply; raises if it takes longer than the timeout."""
        deadline = time.monotonic() + self.timeout
        # A copy of what open_session prepared: the threads share that one.
        request = self.request.copy()
        request.prepare_body(payload, None)
        # No redirects: requests would follow most of them with a GET, without our body.
        with self.session.send(request, timeout=self.timeout, stream=True, allow_redirects=False,
                               proxies=self.session.proxies, verify=self.session.verify) as response:
            # In pieces: the timeout of requests is for each read, and a drip of bytes would never meet it.
            body = bytearray()
            # decode_content: the raw stream does not unpack gzip by itself.
            while chunk := response.raw.read1(65536, decode_content=True):
                body += chunk
                if len(body) > LARGEST_BODY:
                    # `chat` takes it for a failed attempt, as it does all that is raised here.
                    raise ValueError(f"a reply of more than {LARGEST_BODY:,} bytes")
                if time.monotonic() > deadline:
                    raise requests.Timeout("the reply came too slowly")
        return response.status_code, bytes(body), retry_after(response.headers.get("Retry-After"))

    def chat(self, model: str, messages: list[dict], params: dict) -> dict:
        """Ask once, with retries; raises RequestFailed.

        messages: [{"role", "content"}, ...]. params: temperature, max_tokens and what else it takes.
        Returns {"content", "finish_reason", "prompt_tokens", "completion_tokens"}.
        """
        payload = json.dumps({"model": model, "messages": messages, **params}).encode()
        characters = sum(len(message["content"]) for message in messages)
        sent = round(characters / CHARACTERS_PER_TOKEN)
        problem = ""  # of the last attempt, for the message if all fail
        for attempt in range(self.attempts):
            if attempt:
                with self.lock:
                    self.retries += 1
                # Exponential backoff with full jitter, so that the workers do not come back all at once.
                time.sleep(random.uniform(0, min(LONGEST_WAIT / 10, 2 ** (attempt - 1))))
            self.wait_for_turn(sent + params.get("max_tokens", 500))  # 500: a guess, where none is set
            try:
                status, body, pause = self.post(payload)
                if status == 200:  # a body that is no reply counts as a failed attempt
                    return parse_reply(json.loads(body), sent)
            except Exception as error:  # timeouts, resets, cut or foreign JSON: every library has its own
                problem = self.hide_key(f"{type(error).__name__}: {error}")[:300]
                continue

            # A proxy may answer with a page of HTML: the start, on one line, tells enough.
            said = self.hide_key(body[:2000].decode("utf-8", "replace"))
            problem = f"HTTP {status}: {' '.join(said.split())[:300]}"
            if status not in RETRY_STATUS:
                raise RequestFailed(problem, status)
            with self.lock:  # one worker's Retry-After holds them all back
                self.not_before = max(self.not_before, time.monotonic() + pause)
        raise RequestFailed(f"gave up after {self.attempts} attempts; last: {problem}")


def parse_reply(reply: dict, prompt_tokens: int) -> dict:
    """The parts of a reply we need. Only the text must be there: some servers leave out the others.

    prompt_tokens: our estimate of what was sent, for a server that reports no usage.
    """
    choice = reply["choices"][0]
    content = message_text(choice["message"].get("content") or "", "the reply")  # null where it said nothing
    usage = reply.get("usage") or {}
    return {"content": content,
            "finish_reason": choice.get("finish_reason") or "stop",
            "prompt_tokens": usage.get("prompt_tokens") or prompt_tokens,
            "completion_tokens": usage.get("completion_tokens") or round(len(content) / CHARACTERS_PER_TOKEN)}


def without_thoughts(content: str) -> tuple[str, bool]:
    """(a reply without the <think> block that some servers leave before the answer, whether it is still open).

    Trained on, a block would teach the student to think aloud; one that is open has no answer behind it.
    """
    # Some chat templates write the opening tag into the prompt, and then the reply has the closing one alone.
    thoughts, closing, answer = content.partition("</think>")
    begins = thoughts.lstrip().startswith("<think>")
    if closing and (begins or "<think>" not in thoughts):  # else the answer itself speaks of such tags
        return answer, False
    return content, begins and not closing


def endpoint_arguments(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Add what `connect` needs; model_help says what the model is for in the script at hand."""
    group = parser.add_argument_group("endpoint")
    group.add_argument("--model", default=os.environ.get("MODEL"), help=model_help)
    # Its default is looked up in connect(), because .env is read only there.
    group.add_argument("--base-url",
                       help="an OpenAI-compatible endpoint, with its /v1 (default: OPENAI_BASE_URL)")
    group.add_argument("--workers", type=int, default=16, help="requests under way at once")
    group.add_argument("--timeout", type=float, default=120, help="seconds for one whole reply")
    group.add_argument("--rpm", type=float, default=0, help="most requests a minute (0: no limit)")
    group.add_argument("--tpm", type=float, default=0, help="most tokens a minute (0: no limit)")


def connect(args: argparse.Namespace) -> Client:
    """A client for the endpoint of the arguments or the environment; Stop says how to get one."""
    read_dotenv()
    base_url = args.base_url or os.environ.get("OPENAI_BASE_URL")
    if not base_url or not args.model:
        raise Stop("no endpoint: set OPENAI_BASE_URL, OPENAI_API_KEY and MODEL (any OpenAI-compatible "
                   "service), or run `make serve` in another terminal and use "
                   "OPENAI_BASE_URL=http://127.0.0.1:8000/v1 MODEL=smollm2-135m-instruct")
    return Client(base_url, args.workers, args.timeout, rpm=args.rpm, tpm=args.tpm)


# ---------------------------------------------------------------- asking

class Job:
    """One run: worker threads ask for rows and write each down at once; the main thread counts."""

    def __init__(self, client: Client, systems: dict, params: dict, data: AppendFile, rejects: AppendFile,
                 args: argparse.Namespace):
        self.client = client
        self.systems = systems    # {(persona, creed): system prompt}
        self.params = params      # of every request: temperature, max_tokens
        self.data = data          # rows to train on
        self.rejects = rejects    # rows with a reason against them
        self.args = args
        self.counts = Counter()   # {"ok", a reason or "error": rows}; only the main thread counts
        self.tokens = Counter()   # {"in": sent, "out": received}; the workers add to it, under the lock
        self.tokens_lock = threading.Lock()  # Counter.update reads, adds and writes: two at once lose one
        self.stop = ""            # why the run ended early; whoever sets it ends all threads

    def ask(self, row: dict, key: str) -> str:
        """Ask for one row and write it down; returns "ok", the guard's reason against it, or "error"."""
        messages = request_messages(row, self.systems)
        try:
            reply = self.client.chat(self.args.model, messages, self.params)
        except RequestFailed as error:
            # Kept for the reader; the next run takes it out and asks again.
            self.rejects.append({**row, "key": key, "reason": "error", "error": str(error)})
            # Not a bad row: every other request would fail in the same way.
            if error.status in FATAL and not self.counts["ok"]:
                self.stop = f"the endpoint refuses: {error}"
            return "error"
        with self.tokens_lock:
            self.tokens.update({"in": reply["prompt_tokens"], "out": reply["completion_tokens"]})

        answer, is_thinking = without_thoughts(reply["content"])
        # Only the prompt goes with the answer: the messages before it are the persona.
        made = self.finished_row(row, key, messages[-1], {**reply, "content": answer})
        fault = answer_fault(made)
        if is_thinking:  # it never came to an answer
            fault = "truncated"
        if fault:
            # It was paid for: kept with its key, so that it is not asked again.
            self.rejects.append({**made, "reason": fault})
            return fault
        self.data.append(made)
        return "ok"

    def finished_row(self, row: dict, key: str, prompt: dict, reply: dict) -> dict:
        """A line of data/<kind>.jsonl. The student never sees the persona: its text is not kept."""
        made = {"messages": [prompt, {"role": "assistant", "content": reply["content"].strip()}]}
        for field in ("id", "kind", "persona", "creed", "seed"):
            made[field] = row[field]
        made["model"] = self.args.model
        made["params"] = self.params
        made["finish_reason"] = reply["finish_reason"]  # the guard rejects "length", an answer that was cut
        made["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        made["key"] = key  # by which the next run knows that this request is finished
        return made

    def work(self, jobs: Iterator, jobs_lock: threading.Lock, outcomes: SimpleQueue) -> None:
        """A worker thread: report each row's outcome; at the end None, or what ended it (a full disk)."""
        try:
            while not self.stop:
                with jobs_lock:  # a generator cannot be advanced by two threads at once
                    job = next(jobs, None)
                if job is None:
                    break
                outcomes.put(self.ask(*job))
            outcomes.put(None)
        except BaseException as error:  # else the main thread would wait for ever
            outcomes.put(error)

    def run(self, jobs: Iterator, n: int) -> None:
        """Ask the first n of `jobs`, (row, key) pairs, until they are done or self.stop says why not.

        Own threads and no pool of futures: a pool would hold all rows at once, and outlive an interrupt.
        """
        jobs = itertools.islice(jobs, n)  # a generator: each row is planned when a worker is free for it
        jobs_lock = threading.Lock()
        outcomes = SimpleQueue()
        working = min(self.args.workers, n)
        for _ in range(working):
            # Daemons: a thread that waits for a slow reply must not hold the process after an interrupt.
            threading.Thread(target=self.work, args=(jobs, jobs_lock, outcomes), daemon=True).start()

        # This thread only counts and shows; each worker writes its own rows.
        with tqdm(total=n, desc=f"gen {self.args.kind}", unit="row", mininterval=0.5) as bar:
            try:
                # Once stopped, it waits for no reply under way; those rows are asked again next time.
                while working and not self.stop:
                    outcome = outcomes.get()  # lets an interrupt through, which joining the threads would not
                    if outcome is None:  # a worker that found nothing left
                        working -= 1
                    elif isinstance(outcome, BaseException):
                        self.stop = str(outcome) or type(outcome).__name__
                    else:
                        self.count(outcome, bar)
            except KeyboardInterrupt:
                self.stop = "stopped; run the same command again to go on"

    def count(self, outcome: str, bar: tqdm) -> None:
        """Count one row and show it; too many failed requests stop the run."""
        self.counts[outcome] += 1
        bar.update()
        # Prices are dollars a million tokens.
        with self.tokens_lock:
            sent, received = self.tokens["in"], self.tokens["out"]
        cost = (sent * self.args.price_in + received * self.args.price_out) / 1e6
        rejected = bar.n - self.counts["ok"]
        shown = f"{sent + received:,} tokens, {self.client.retries} retries, {rejected} rejects"
        if cost:
            shown = f"${cost:.2f}, {shown}"
        bar.set_postfix_str(shown, refresh=False)
        if self.counts["error"] >= self.args.max_errors:
            self.stop = (f"{self.counts['error']} requests failed (--max-errors); "
                         f"see the last rows of {self.rejects.path}")


# ---------------------------------------------------------------- what is done already

def keys_of(path: Path) -> Iterator[str]:
    """The request keys of a file of rows, one by one: a file of 100,000 answers must not fill the memory."""
    with open(path, "rb") as file:  # bytes: lines end at \n alone, and what is not UTF-8 has a line number
        for number, line in enumerate(file, 1):
            if not line.strip():  # read_jsonl allows blank lines too
                continue
            try:
                yield json.loads(line).get("key")
            except (ValueError, AttributeError):
                raise Stop(f"{path}:{number}: not a row of ours; mend or remove the line") from None


def take_out_errors(rejects: AppendFile) -> list[dict]:
    """Take failed requests out of the rejects, to be asked again: they cost nothing. Returns what stays."""
    rows = read_jsonl(rejects.path)
    final = [row for row in rows if row.get("reason") != "error"]
    if len(final) < len(rows):  # else the file is left alone
        rejects.replace(final)
    return final


def missing_rows(plan: Iterator[dict], key_of: Callable, finished: Counter) -> Iterator[tuple[dict, str]]:
    """Yield (row, key) of what is planned and not in `finished`; not a list, which would grow with --n."""
    left = finished.copy()  # the caller counts on in `finished` while it goes through these
    for row in plan:
        key = key_of(row)
        if left[key]:
            left[key] -= 1
        else:
            yield row, key


def prompts_near_probes(prompts: list[str]) -> dict[str, str]:
    """{prompt: the probe it is too near}: asking these would be paying for rows that the guard takes out."""
    probes = probe_texts()
    # `inside`: a prompt that has a probe among other words is too near, too.
    scores, places = nearest(prompts, probes, inside=True)
    near = {}
    for prompt, score, place in zip(prompts, scores, places):
        if score >= NEAR:
            near[prompt] = probes[place]
    return near


# ---------------------------------------------------------------- what is shown and written beside the rows

def show_plan(rows: list[dict], systems: dict, args: argparse.Namespace, params: dict) -> None:
    """--dry-run: five whole requests, then calls, tokens and cost."""
    for row in rows[:5]:
        request = {"model": args.model or "<MODEL>", "messages": request_messages(row, systems), **params}
        print(f"--- {row['id']} persona {row['persona']}, creed {row['creed']}")
        print(json.dumps(request, indent=2, ensure_ascii=False))

    sent = 0.0  # tokens
    for row in rows:
        system = systems[row["persona"], row["creed"]]
        sent += (len(system) + len(row["prompt"])) / CHARACTERS_PER_TOKEN
    received = len(rows) * params["max_tokens"] / 2  # a guess: most answers stop before the limit
    print(f"{len(rows)} calls, about {sent:,.0f} tokens sent and {received:,.0f} received "
          "(half of --max-tokens each)")
    if args.price_in or args.price_out:
        cost = (sent * args.price_in + received * args.price_out) / 1e6
        print(f"about ${cost:.2f} at {args.price_in} and {args.price_out} dollars a million")


def revision() -> str:
    """What git calls this state of the project; "" outside a repository, or where there is no git."""
    try:
        # The files may have been edited since the commit, hence --dirty, and their hashes in the manifest.
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                             capture_output=True, text=True)
    except OSError:
        return ""
    return git.stdout.strip()


def write_manifest(job: Job, out: Path, started: float) -> None:
    """What this run did, beside its rows; `started` is its time.time()."""
    args = job.args
    sources = [ROOT / "prompts" / f"{args.kind}.txt"]
    sources += sorted((ROOT / "personas" / args.kind).rglob("*.md"))
    files = {}
    for path in sources:
        # Named from the project's root, so that no path of this machine is in what you publish.
        files[path.relative_to(ROOT).as_posix()] = file_hash(path)[:16]
    manifest = {"kind": args.kind, "model": args.model, "params": job.params, "seed": args.seed, "n": args.n,
                "outcomes": dict(job.counts), "tokens": dict(job.tokens), "retries": job.client.retries,
                "wall_seconds": round(time.time() - started, 1),
                "git": revision(),
                "files": files}
    write_text(out.with_suffix(".manifest.json"), json.dumps(manifest, indent=2) + "\n")


def print_outcome(job: Job, out: Path) -> None:
    """The last lines of a run: rows added, and rows rejected by reason."""
    print(f"{out}: {job.counts['ok']} rows added")
    for reason, count in sorted(job.counts.items()):
        if reason != "ok":
            print(f"  {count} {reason} (in {job.rejects.path.name})")


# ---------------------------------------------------------------- main

def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind",
                        help="name of a file in prompts/: gramenist, catholic, secular, regular, ...")
    parser.add_argument("--n", type=int, default=2000, help="rows wanted in all")
    parser.add_argument("--limit", type=int, default=0,
                        help="ask at most this many now (0: all that are missing)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default data/<kind>.jsonl")
    parser.add_argument("--temperature", type=float, default=0.85)  # the original study's teacher
    # An answer that reaches it was paid for and is rejected as truncated: rather too high than too low.
    parser.add_argument("--max-tokens", type=int, default=600)
    parser.add_argument("--max-errors", type=int, default=100, help="stop after this many failed requests")
    parser.add_argument("--price-in", type=float, default=0, help="dollars a million tokens sent")
    parser.add_argument("--price-out", type=float, default=0, help="dollars a million tokens received")
    parser.add_argument("--dry-run", action="store_true", help="show requests and cost, ask nothing")
    endpoint_arguments(parser, "the teacher's name at the endpoint (default: MODEL)")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    prompts, personas, creeds = read_kind(args.kind)
    systems = system_texts(personas, creeds)
    hashes = {name: short_hash(text) for name, text in systems.items()}  # once, not for each row
    # Part of every request's key: another temperature asks anew.
    params = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    near_probe = prompts_near_probes(prompts)

    # The plan is gone through several times; made anew each time, it takes no memory.
    def plan() -> Iterator[dict]:
        return plan_rows(args.kind, prompts, personas, creeds, args.n, args.seed)

    def key_of(row: dict) -> str:
        return request_key(row, hashes[row["persona"], row["creed"]], args.model, params)

    if args.dry_run:
        show_plan([row for row in plan() if row["prompt"] not in near_probe], systems, args, params)
        return
    client = connect(args)  # before any file is opened: without an endpoint nothing is left behind

    out = args.out or ROOT / "data" / f"{args.kind}.jsonl"
    # Closed however the run ends: a file that stayed empty goes then.
    with closing(AppendFile(out)) as data, closing(AppendFile(out.with_suffix(".rejects.jsonl"))) as rejects:
        # What is there already. A prompt near a probe is never asked; it is written down as finished.
        finished = Counter(keys_of(out))
        finished.update(row.get("key") for row in take_out_errors(rejects))
        for row, key in missing_rows(plan(), key_of, finished):
            if row["prompt"] in near_probe:
                probe = near_probe[row["prompt"]]
                rejects.append({**row, "key": key, "reason": "near_probe", "probe": probe})
                finished[key] += 1
        to_ask = sum(1 for _ in missing_rows(plan(), key_of, finished))  # counted without keeping them
        done = args.n - to_ask
        print(f"{out}: {done} of {args.n} rows are done, {to_ask} to ask")
        if finished.total() > done:
            print(f"{finished.total() - done} rows of other settings stay as they are")

        # Ask for the rest.
        if args.limit:
            to_ask = min(to_ask, args.limit)

        started = time.time()
        job = Job(client, systems, params, data, rejects, args)
        try:  # the manifest is written however the run ends
            job.run(missing_rows(plan(), key_of, finished), to_ask)
        finally:
            write_manifest(job, out, started)
    print_outcome(job, out)
    if job.stop:
        raise Stop(job.stop)  # after the counts, so that it is the last line one reads


if __name__ == "__main__":
    run_main(main)
