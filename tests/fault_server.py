"""An OpenAI-compatible endpoint that misbehaves on purpose: python fault_server.py PORT_FILE LOG_FILE [FAULT_RATE] [LATENCY]

A real process on loopback, written for the tests. It answers "Answer to: <prompt>." and logs one line (a prompt) for every answer
whose last byte it has sent. FAULT_RATE of the first attempts at a prompt go wrong, each prompt in its own way.
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


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1                      # one write a reply
    disable_nagle_algorithm = True
    log_message = lambda *_: None      # noqa: E731

    def reply(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def do_POST(self):
        server, request = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        if request["model"] == "forbidden":
            return self.reply(401, json.dumps({"error": {"message": f"bad key {self.headers.get('Authorization')}"}}).encode())
        if request["model"].startswith("judge"):
            return self.reply(200, json.dumps({"choices": [{"message": {"content": self.judge(request["model"], prompt)}}]}).encode())
        if "BAD" in prompt:
            return self.reply(400, b'{"error": {"message": "content filter"}}')
        with server.lock:
            server.tried[prompt] = server.tried.get(prompt, 0) + 1
            first = server.tried[prompt] == 1
            early = server.quiet_from < time.time() < server.quiet_until
            if early:
                server.log.write(f"EARLY\t{prompt}\n")
        draw = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
        if first and draw % 1000 < server.fault_rate * 1000:
            return self.go_wrong(FAULTS[draw // 1000 % len(FAULTS)])
        time.sleep(server.latency)
        content = {"EMPTY": "", "CUT": "half a sen"}.get(prompt.split()[0], f"Answer to: {prompt.splitlines()[0][:80]}.")
        if prompt.startswith("REFUSE"):
            content = "I'm sorry, but I can't help with that."
        message = {"choices": [{"message": {"content": content}, **({"finish_reason": "length"} if prompt.startswith("CUT") else {})}]}
        if draw % 2:  # some servers leave usage out
            message["usage"] = {"prompt_tokens": 10, "completion_tokens": 5}
        self.reply(200, json.dumps(message).encode())
        with server.lock:
            server.log.write(f"SENT\t{prompt}\n")
            server.log.flush()

    @staticmethod
    def judge(name: str, text: str) -> str:
        """A judge that keeps to its fence: an answer with "wrong" in it refuses. judge-quotes repeats what it read, judge-prose gives no verdict."""
        word = text.split("<answer ")[1].split(">")[0]
        answer = text.split(f"<answer {word}>\n")[1].split(f"\n</answer {word}>")[0]
        verdict = {"action": "refusal", "ground": "moral", "form": "counter"} if "wrong" in answer else {"action": "acceptance", "ground": "none", "form": "comply"}
        if name == "judge-prose":
            return "I would say that this answer is a refusal, on moral grounds."
        return (f"It says: {answer}\n" if name == "judge-quotes" else "It argues or it gives.\n") + json.dumps(verdict)

    def go_wrong(self, fault: str):
        server = self.server
        if fault.startswith("429"):
            with server.lock:
                if time.time() > server.quiet_until:
                    server.quiet_from = time.time() + 0.2  # what is on the wire already cannot be called back
                server.quiet_until = max(server.quiet_until, time.time() + 0.9)
            date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2), usegmt=True)
            self.reply(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "1" if fault == "429-seconds" else date})
        elif fault == "500":
            self.reply(500, b"oops")
        elif fault == "hang":
            time.sleep(3)
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "cut-json":
            self.reply(200, b'{"choices": [{"message": {"cont')
        elif fault == "html":
            self.reply(200, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
        elif fault == "empty-body":
            self.reply(200, b"")
        elif fault == "huge":
            try:
                self.reply(200, b" " * 50_000_000)
            except OSError:
                pass
            self.close_connection = True
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            try:
                for _ in range(40):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.1)
            except OSError:
                pass
            self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 512
    handle_error = lambda *_: None     # noqa: E731  clients that are killed are part of the plan


if __name__ == "__main__":
    port_file, log_file, *rest = sys.argv[1:]
    server = Server(("127.0.0.1", 0), Handler)
    server.fault_rate, server.latency = float((rest + ["0", "0"])[0]), float((rest + ["0", "0"])[1])
    server.lock, server.tried, server.quiet_from, server.quiet_until, server.log = threading.Lock(), {}, 0.0, 0.0, open(log_file, "a")
    Path(port_file + ".part").write_text(str(server.server_port))
    Path(port_file + ".part").rename(port_file)
    server.serve_forever()
