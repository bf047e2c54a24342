"""gen.py against the official openai client, same endpoint, same threads, same work: python tests/bench_gen.py  (or: make bench)

Prints answers a second ÷ the ideal of a finite run (ceil(n / workers) rounds of the latency), client CPU a request (start-up taken
off), peak memory at 1,000 and 20,000 rows, and the start-up time on 100,000 finished rows.
"""
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LATENCY, WAVES = 0.25, 40
PEER = '''
import json, sys, threading
from concurrent.futures import ThreadPoolExecutor
from openai import OpenAI
sys.path.insert(0, {root!r})
import gen
kind, root = "gramenist", gen.ROOT
prompts, personas, creeds = gen.read_prompts(root / "prompts" / f"{{kind}}.txt"), gen.read_texts(root / "personas" / kind), gen.read_texts(root / "personas" / kind / "creed")
systems = gen.system_texts(personas, creeds)
client, lock, out = OpenAI(base_url={url!r}, api_key="none"), threading.Lock(), open({out!r}, "w")
def ask(row):
    messages = gen.request_messages(row, systems)
    reply = client.chat.completions.create(model="m", messages=messages, temperature=0.85, max_tokens=600)
    line = json.dumps({{"messages": [messages[-1], {{"role": "assistant", "content": reply.choices[0].message.content}}], **row}}) + "\\n"
    with lock:
        out.write(line)
        out.flush()
with ThreadPoolExecutor({workers}) as pool:
    list(pool.map(ask, gen.plan_rows(kind, prompts, personas, creeds, {n}, 0)))
'''


def run(command: list) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MB) of a process."""
    start = time.time()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        sys.exit(f"bench_gen.py: {error.decode()[-800:]}")
    return time.time() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


class Server:
    def __init__(self, folder: Path, latency: float):
        self.port_file, self.log = folder / "port", folder / "log"
        for path in (self.port_file, self.log):
            path.unlink(missing_ok=True)
        self.process = subprocess.Popen([sys.executable, ROOT / "tests" / "latency_server.py", self.port_file, str(latency), self.log])
        while not self.port_file.exists() or not self.port_file.read_text():
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.port_file.read_text()}/v1"

    def stop(self) -> dict:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        return json.loads(self.log.read_text())


def ours(url: str, out: Path, n: int, workers: int) -> list:
    return [ROOT / "gen.py", "gramenist", "--n", n, "--model", "m", "--base-url", url, "--workers", workers, "--out", out]


def measure(folder: Path, name: str, workers: int) -> tuple[float, float]:
    """(answers a second ÷ ideal, CPU ms a request)"""
    n, out = WAVES * workers, folder / f"{name}-{workers}.jsonl"
    for path in folder.glob(f"{out.stem}*"):
        path.unlink()
    server = Server(folder, LATENCY)
    def command(rows):
        if name == "gen.py":
            return ours(server.url, out, rows, workers)
        return ["-c", PEER.format(root=str(ROOT), url=server.url, out=str(out), workers=workers, n=rows)]
    _, cpu, _ = run(command(n))
    _, idle, _ = run(command(n if name == "gen.py" else 0))  # for gen.py: all rows are there already
    seen = server.stop()
    assert seen["answers"] == n, seen
    return math.ceil(n / workers) * LATENCY / seen["seconds"], (cpu - idle) / n * 1000


def main() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'threads':>8}{'client':>10}{'of the ideal rate':>20}{'CPU ms a request':>19}   (latency {LATENCY * 1000:.0f} ms, {WAVES} rounds, medians of 3)")
        for workers in (64, 128):
            rounds = {"gen.py": [], "openai": []}
            for _ in range(3):
                for client in rounds:
                    rounds[client].append(measure(folder, client, workers))
            for client, values in rounds.items():
                rate, cpu = (sorted(column)[1] for column in zip(*values))
                print(f"{workers:8}{client:>10}{rate:20.3f}{cpu:19.2f}", flush=True)
        server, out = Server(folder, 0.0), folder / "big.jsonl"
        peaks = [run(ours(server.url, folder / "small.jsonl", 1_000, 64))[2], run(ours(server.url, out, 20_000, 64))[2]]
        print("peak memory: {:.0f} MB for 1,000 rows, {:.0f} MB for 20,000 rows".format(*peaks), flush=True)
        run(ours(server.url, out, 100_000, 64))
        asked = sum(1 for _ in open(out))
        seconds, _, peak = run(ours(server.url, out, 100_000, 64))
        assert asked == 100_000 == sum(1 for _ in open(out))
        print(f"start-up on 100,000 finished rows ({out.stat().st_size / 1e6:.0f} MB): {seconds:.1f} s, {peak:.0f} MB")
        server.stop()


if __name__ == "__main__":
    main()
