"""gen.py against the official openai client: same endpoint, same threads, same work.

    python tests/bench_gen.py           # or: make bench WHAT=gen

Prints answers a second ÷ the ideal of a finite run (ceil(n / workers) rounds of the latency), client CPU a request
(start-up taken off), peak memory at 1,000 and 20,000 rows, and the start-up time on 100,000 finished rows.
"""
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LATENCY = 0.25  # seconds
ROUNDS = 40     # requests a thread

# The same requests by the openai package, in a thread pool, each row written at once as gen.py does.
PEER = '''
import json, sys, threading
from concurrent.futures import ThreadPoolExecutor
from openai import OpenAI
sys.path.insert(0, {root!r})
import gen
prompts, personas, creeds = gen.read_kind("gramenist")
systems = gen.system_texts(personas, creeds)
client, lock, out = OpenAI(base_url={url!r}, api_key="none"), threading.Lock(), open({out!r}, "w")

def ask(row):
    messages = gen.request_messages(row, systems)
    reply = client.chat.completions.create(model="m", messages=messages, temperature=0.85, max_tokens=600)
    answer = {{"role": "assistant", "content": reply.choices[0].message.content}}
    line = json.dumps({{"messages": [messages[-1], answer], **row}}) + "\\n"
    with lock:
        out.write(line)
        out.flush()

with ThreadPoolExecutor({workers}) as pool:
    list(pool.map(ask, gen.plan_rows("gramenist", prompts, personas, creeds, {n}, 0)))
'''


def run(command: list) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MB) of a Python process."""
    start = time.time()
    process = subprocess.Popen([sys.executable, *map(str, command)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, process.returncode, usage = os.wait4(process.pid, 0)
    if process.returncode:
        sys.exit(f"bench_gen.py: {error.decode()[-800:]}")
    return time.time() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


class Server:
    """latency_server.py in a process of its own."""

    def __init__(self, folder: Path, latency: float):
        port_file, self.log = folder / "port", folder / "log"
        for path in (port_file, self.log):
            path.unlink(missing_ok=True)
        script = ROOT / "tests" / "latency_server.py"
        self.process = subprocess.Popen([sys.executable, script, port_file, str(latency), self.log])
        while not port_file.exists() or not port_file.read_text():
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{port_file.read_text()}/v1"

    def stop(self) -> dict:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        return json.loads(self.log.read_text())


def ours(url: str, out: Path, n: int, workers: int) -> list:
    return [ROOT / "gen.py", "gramenist", "--n", n, "--model", "m", "--base-url", url,
            "--workers", workers, "--out", out]


def measure(folder: Path, client: str, workers: int) -> tuple[float, float]:
    """(answers a second ÷ ideal, CPU ms a request)"""
    n, out = ROUNDS * workers, folder / f"{client}-{workers}.jsonl"
    for path in folder.glob(f"{out.stem}*"):
        path.unlink()
    server = Server(folder, LATENCY)
    command = idle = ours(server.url, out, n, workers)  # the second time all rows are there: what starting costs
    if client == "openai":
        settings = {"root": str(ROOT), "url": server.url, "out": str(out), "workers": workers}
        command = ["-c", PEER.format(n=n, **settings)]
        idle = ["-c", PEER.format(n=0, **settings)]
    _, busy_cpu, _ = run(command)
    _, idle_cpu, _ = run(idle)
    seen = server.stop()

    # Rows that the guard or its plan leaves out are not asked, so the ideal counts what was answered.
    ideal_seconds = math.ceil(seen["answers"] / workers) * LATENCY
    return ideal_seconds / seen["seconds"], (busy_cpu - idle_cpu) / seen["answers"] * 1000


def compare(folder: Path) -> None:
    print(f"{'threads':>8}{'client':>10}{'of the ideal rate':>20}{'CPU ms a request':>19}"
          f"   (latency {LATENCY * 1000:.0f} ms, {ROUNDS} rounds, medians of 3)")
    for workers in (64, 128):
        results = {"gen.py": [], "openai": []}
        for _ in range(3):  # taking turns, so that a slow minute of the machine hits both
            for client in results:
                results[client].append(measure(folder, client, workers))
        for client, pairs in results.items():
            rate = statistics.median(pair[0] for pair in pairs)
            cpu = statistics.median(pair[1] for pair in pairs)
            print(f"{workers:8}{client:>10}{rate:20.3f}{cpu:19.2f}", flush=True)


def large_jobs(folder: Path) -> None:
    server, out = Server(folder, 0.0), folder / "big.jsonl"
    _, _, small = run(ours(server.url, folder / "small.jsonl", 1_000, 64))
    _, _, large = run(ours(server.url, out, 20_000, 64))
    print(f"peak memory: {small:.0f} MB for 1,000 rows, {large:.0f} MB for 20,000 rows", flush=True)

    run(ours(server.url, out, 100_000, 64))
    seconds, _, peak = run(ours(server.url, out, 100_000, 64))
    server.stop()
    print(f"start-up on 100,000 finished rows ({out.stat().st_size / 1e6:.0f} MB): {seconds:.1f} s, {peak:.0f} MB")


def main() -> None:
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard_limit))
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name))
        large_jobs(Path(name))


if __name__ == "__main__":
    main()
