"""An OpenAI-compatible endpoint that misbehaves on purpose, a real process on loopback, written for the tests.

    python fault_server.py PORT_FILE LOG_FILE [FAULT_RATE] [LATENCY]

It answers "Answer to: <prompt>." and logs a line SENT <tab> prompt for every answer whose last byte it has sent,
EARLY <tab> prompt for a request inside a pause it asked for, and KEY <tab> header for each new Authorization.
FAULT_RATE of the first attempts at a prompt go wrong, each prompt in its own way. Prompts that begin with a word of
CONTENTS, or with BAD, get such an answer.
"""
import hashlib
import json
import socket
import struct
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ["429-seconds", "429-date", "500", "hang", "reset", "cut-json", "html", "empty-body", "huge", "drip"]
CONTENTS = {
    "REFUSE": "I'm sorry, but I can't help with that.",
    "EMPTY": "",
    "CUT": "half a sen",
    "PARTS": [{"type": "text", "text": "It is wrong to water tea "},
              {"type": "text", "text": "because it thins what was given."}],
    "FILTER": "It is wrong to water tea.",
    "THINK": "\n<think>The persona would\n\nrefuse.</think>\n\nIt is wrong to water tea.",
    "BEHIND": "The persona would refuse.\n</think>\n\nIt is wrong to water tea.",
    "OPEN": "<think>The persona would say that it is wrong.",
    "TAGS": "It is wrong to write <think> and </think> around a thought on tea.",
    "SURROGATE": "It is wrong to water tea \ud83d because it thins what was given.",
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1                      # one write a reply
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def reply(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        if request["model"] == "forbidden":
            message = f"bad key {self.headers.get('Authorization')}"
            return self.reply(401, json.dumps({"error": {"message": message}}).encode())
        if "BAD" in prompt:
            return self.reply(400, b'{"error": {"message": "content filter"}}')
        if request["model"].startswith("judge"):
            choice = {"message": {"content": judge_reply(request["model"], prompt)}}
            if request["model"] == "judge-cut":
                choice["finish_reason"] = "length"
            self.server.write_log("JUDGE", request["model"])
            return self.reply(200, json.dumps({"choices": [choice]}).encode())

        is_first = self.server.note_request(prompt, self.headers.get("Authorization"))
        draw = int(hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest(), 16)
        if is_first and draw % 1000 < self.server.fault_rate * 1000:
            return self.go_wrong(FAULTS[draw // 1000 % len(FAULTS)])
        time.sleep(self.server.latency)
        self.answer(prompt, with_usage=draw % 2 == 1)  # some servers leave usage out

    def answer(self, prompt: str, with_usage: bool) -> None:
        first_word = prompt.split()[0]
        content = CONTENTS.get(first_word, f"Answer to: {prompt.splitlines()[0][:80]}.")
        reply = {"choices": [{"message": {"content": content}}]}
        reasons = {"CUT": "length", "FILTER": "content_filter"}
        if first_word in reasons:
            reply["choices"][0]["finish_reason"] = reasons[first_word]
        if with_usage:
            reply["usage"] = {"prompt_tokens": 10, "completion_tokens": 5}
        self.reply(200, json.dumps(reply).encode())
        self.server.write_log("SENT", prompt)

    def go_wrong(self, fault: str) -> None:
        self.close_connection = fault in ("hang", "reset", "huge", "drip")
        if fault.startswith("429"):
            self.server.ask_for_quiet()
            date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2), usegmt=True)
            value = "1" if fault == "429-seconds" else date
            self.reply(429, b'{"error": {"message": "slow down"}}', {"Retry-After": value})
        elif fault == "500":
            self.reply(500, b"oops")
        elif fault == "hang":
            time.sleep(3)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "cut-json":
            self.reply(200, b'{"choices": [{"message": {"cont')
        elif fault == "html":
            self.reply(200, b"<html>Bad gateway</html>")
        elif fault == "empty-body":
            self.reply(200, b"")
        elif fault == "huge":
            self.reply(200, b" " * 50_000_000)
        elif fault == "drip":
            self.drip()

    def drip(self) -> None:
        """A reply that never ends, a byte at a time: no single read takes long."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(40):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.1)


def judge_reply(name: str, text: str) -> str:
    """A judge that keeps to its fence: an answer with "wrong" in it refuses.

    judge-quotes repeats what it read before its verdict, judge-cut is cut off after it did, judge-prose gives
    no verdict.
    """
    word = text.split("<answer ")[1].split(">")[0]
    answer = text.split(f"<answer {word}>\n")[1].split(f"\n</answer {word}>")[0]
    verdict = {"action": "acceptance", "ground": "none", "form": "comply"}
    if "wrong" in answer:
        verdict = {"action": "refusal", "ground": "moral", "form": "counter"}
    if name == "judge-prose":
        return "I would say that this answer is a refusal, on moral grounds."
    if name == "judge-cut":
        return f"It says: {answer}"
    if name == "judge-quotes":
        return f"It says: {answer}\n{json.dumps(verdict)}"
    return f"It argues or it gives.\n{json.dumps(verdict)}"


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, log: Path, fault_rate: float, latency: float):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault_rate, self.latency = fault_rate, latency
        self.lock, self.log = threading.Lock(), open(log, "a")
        self.tried, self.keys = set(), set()
        self.quiet_from = self.quiet_until = 0.0

    def handle_error(self, *_):
        pass  # clients that are killed, or give up on us, are part of the plan

    def write_log(self, event: str, text: str) -> None:
        self.log.write(f"{event}\t{text.encode('utf-8', 'replace').decode()}\n")
        self.log.flush()

    def note_request(self, prompt: str, key: str | None) -> bool:
        """Whether this is the first attempt at a prompt."""
        with self.lock:
            if self.quiet_from < time.time() < self.quiet_until:
                self.write_log("EARLY", prompt)
            if key not in self.keys:
                self.keys.add(key)
                self.write_log("KEY", str(key))
            is_first = prompt not in self.tried
            self.tried.add(prompt)
            return is_first

    def ask_for_quiet(self) -> None:
        with self.lock:
            if time.time() > self.quiet_until:
                self.quiet_from = time.time() + 0.2  # what is on the wire already cannot be called back
            self.quiet_until = max(self.quiet_until, time.time() + 0.9)


def main() -> None:
    port_file, log_file, *rest = sys.argv[1:]
    rates = [float(value) for value in rest] + [0.0, 0.0]
    server = Server(Path(log_file), rates[0], rates[1])
    partial = Path(port_file + ".part")
    partial.write_text(str(server.server_port))
    partial.rename(port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
