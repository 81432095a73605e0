"""An asyncio server that talks to a child through pipes, watched by a pidfd, with a timer and a signal handler."""

import asyncio
import json
import secrets
import signal
import sys

import relume

CHILD = """
import sys
lines = []
for line in sys.stdin:
    lines.append(line.strip())
    print(lines[0], len(lines), flush=True)
"""


async def main():
    token = secrets.token_hex(16)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    sleeper = await asyncio.create_subprocess_exec("sleep", "1000000")
    exited = asyncio.create_task(sleeper.wait())
    ticks = signals = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.02)
            ticks += 1

    def signalled():
        nonlocal signals
        signals += 1

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, signalled)
    ticking = asyncio.create_task(tick())

    async def ask(line):
        child.stdin.write(line.encode() + b"\n")
        return (await child.stdout.readline()).decode().split()

    assert await ask(token) == [token, "1"]
    print(await asyncio.to_thread(relume.checkpoint))

    async def serve(reader, writer):
        path = (await reader.readline()).split()[1].decode()
        while (await reader.readline()).strip():
            pass
        if path == "/kill":
            sleeper.kill()
            await exited
        if path == "/signal":
            signal.raise_signal(signal.SIGUSR1)
            await asyncio.sleep(0.05)
        answer = {"child": await ask(path), "ticks": ticks, "signals": signals, "exit": sleeper.returncode}
        body = json.dumps(answer).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "0.0.0.0", 8000)
    await asyncio.gather(server.serve_forever(), ticking)


asyncio.run(main())
