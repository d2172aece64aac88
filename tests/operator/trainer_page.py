"""What the pods of fake nodes say of their training, which goes on by a step a second: all of 127.1.0.0/16, one port."""

import socket
import time

from aiohttp import web

from trainers.contract import DEFAULT_METRICS_PORT

BEGUN = time.monotonic()
PAGE = """alignment_trainer_step{{rank="0"}} {step}
alignment_trainer_total_steps{{rank="0"}} 100000
alignment_trainer_loss{{rank="0"}} 1.5
alignment_trainer_tokens_per_second{{rank="0"}} 10000
"""


async def answer(_: web.Request) -> web.Response:
    return web.Response(text=PAGE.format(step=int(time.monotonic() - BEGUN) + 1))


if __name__ == "__main__":
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    # Another test's trainer may have the port for a while.
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while True:
            try:
                listening.bind(("0.0.0.0", DEFAULT_METRICS_PORT))
                break
            except OSError:
                time.sleep(0.5)
        web.run_app(app, sock=listening, print=lambda *_: None, access_log=None)
