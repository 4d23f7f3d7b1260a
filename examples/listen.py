"""Text while somebody speaks: sound from a microphone to `resonance serve`, texts to the screen.

    arecord -q -f S16_LE -r 16000 -c 1 -t raw | python examples/listen.py --patient anna          # Linux
    ffmpeg -f avfoundation -i :0 -ar 16000 -ac 1 -f s16le - | python examples/listen.py           # macOS

What comes on standard input is sound: 16 bits a sample, one channel, `--rate` samples a second. The token is taken from the
environment variable TOKEN. A line is written over while the sentence goes on; what is final stays.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys

import websockets

BLOCK = 3200  # bytes: a tenth of a second at 16 kHz


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="ws://127.0.0.1:8000/listen", help="wss:// where the service has TLS")
    parser.add_argument("--patient", help="whose adapter listens; left out, the token's")
    parser.add_argument("--language", help="such as en; left out, the adapter's")
    parser.add_argument("--rate", type=int, default=16000, help="samples a second")
    given = parser.parse_args()

    token = os.environ.get("TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with websockets.connect(given.address, additional_headers=headers) as socket:
        start = {"type": "start", "format": "pcm16", "sample_rate": given.rate}
        wishes = {"patient_id": given.patient, "language": given.language}
        await socket.send(json.dumps(start | {name: value for name, value in wishes.items() if value}))
        sending = asyncio.create_task(send_sound(socket))
        async for line in socket:
            message = json.loads(line)
            match message["type"]:
                case "partial":
                    print(f"\r\033[K{message['text']} …", end="", flush=True)
                case "final":
                    print(f"\r\033[K{message['text']}", flush=True)
                case "error":
                    sending.cancel()
                    sys.exit(f"{message['error']['message']} {message['error']['hint']}")
        await sending


async def send_sound(socket: websockets.ClientConnection) -> None:
    while block := await asyncio.to_thread(sys.stdin.buffer.read1, BLOCK):
        await socket.send(block)
    await socket.send(json.dumps({"type": "end"}))


if __name__ == "__main__":
    asyncio.run(main())
