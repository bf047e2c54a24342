"""An OpenAI-compatible endpoint with a fixed latency, for bench_gen.py.

    python latency_server.py PORT_FILE LATENCY LOG_FILE

One asyncio process that spends as little CPU as it can, because it shares the machine with the client under test.
On SIGTERM it writes {"answers", "seconds"} (first request received to last answer sent) to LOG_FILE.
"""
import asyncio
import json
import signal
import sys
import time
from pathlib import Path

# As long as a teacher's answer, and without loops, so that the guard has all of its work.
TEXT = """It is wrong to keep a field of one kind, because the many feed each other and the one starves alone.
My grandfather sowed wheat from hedge to hedge for eleven summers and was praised for it at market. In the
twelfth the rust came up the valley, and what had been a single crop became a single loss by Thursday evening.
Next door there were oats among the barley, vetch at the foot, and a strip of rye that nobody had thought
worth selling; they ate all winter and lent us seed in March. Since then we hold that plenty is a company
rather than a heap. A mixed field costs a man some neatness, certainly. He walks it more slowly, he argues
with the thresher, and his neighbours smile over the gate. But roots of different depths leave each other
water, tall straw shades the short, and no blight is clever enough to like every plate on the table. Pride
wants one thing done to perfection. Thanks takes what was given, which was many, and asks how they might grow
together."""
REPLY = {
    "id": "x", "object": "chat.completion", "created": 0, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 400, "completion_tokens": 200, "total_tokens": 600},
}
BODY = json.dumps(REPLY).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


class Times:
    answers, first, last = 0, 0.0, 0.0


class Connection(asyncio.Protocol):
    """One client's connection. A raw protocol: any HTTP framework would cost more than the client under test."""

    def __init__(self, latency: float):
        self.latency = latency
        self.buffer = b""

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        self.buffer = body[length:]
        Times.first = Times.first or time.time()
        asyncio.get_running_loop().call_later(self.latency, self.answer)

    def answer(self) -> None:
        self.transport.write(RESPONSE)
        Times.answers += 1
        Times.last = time.time()


async def serve(port_file: Path, latency: float, log_file: Path) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(lambda: Connection(latency), "127.0.0.1", 0, backlog=1024)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    port_file.write_text(str(server.sockets[0].getsockname()[1]))
    await stop.wait()
    log_file.write_text(json.dumps({"answers": Times.answers, "seconds": Times.last - Times.first}))


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])))
