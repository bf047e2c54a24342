"""An OpenAI-compatible endpoint with a fixed latency, for bench_gen.py: python latency_server.py PORT_FILE LATENCY LOG_FILE

One asyncio process that spends as little CPU as it can, because it shares the machine with the client that is measured.
On SIGTERM it writes {"answers", "seconds"} (first request received to last answer sent) to LOG_FILE.
"""
import asyncio
import json
import signal
import sys
import time
from pathlib import Path

TEXT = "It is wrong to keep a field of one kind, because the many feed each other and the one starves alone. " * 10
BODY = json.dumps({"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT.strip()}, "finish_reason": "stop"}],
                   "usage": {"prompt_tokens": 400, "completion_tokens": 200, "total_tokens": 600}, "created": 0, "model": "m"}).encode()
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
port_file, latency, log_file = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
answers, first, last = 0, 0.0, 0.0


class Connection(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.buffer = transport, b""

    def data_received(self, data):
        global first
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) >= length:
            self.buffer = body[length:]
            first = first or time.time()
            asyncio.get_running_loop().call_later(latency, self.answer)

    def answer(self):
        global answers, last
        self.transport.write(REPLY)
        answers, last = answers + 1, time.time()


async def main():
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    port_file.write_text(str(server.sockets[0].getsockname()[1]))
    await stop.wait()
    log_file.write_text(json.dumps({"answers": answers, "seconds": last - first}))


asyncio.run(main())
