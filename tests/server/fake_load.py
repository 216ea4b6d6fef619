"""Calls of many kinds at a server, for demonstrations of the dashboard and its tests.

    python -m tests.server.fake_load http://127.0.0.1:8000 --model support --seconds 60 --rate 4

Streams of all tiers and lengths, some that their client gives up, some that are refused.
"""

import argparse
import contextlib
import http.client
import json
import random
import threading
import time
from typing import Any
from urllib.parse import urlsplit

TIERS = ("default", "default", "default", "priority", "flex")


def call(url: str, body: dict[str, Any], *, give_up: bool = False, key: str = "") -> int:
    """One call; its status. With `give_up` the client leaves after the first piece."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        answer.read(64 if give_up else None)
        return answer.status


def random_call(url: str, model: str, dice: random.Random) -> None:
    """A call of a random kind."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "a question " * dice.randint(1, 24)}],
        "max_tokens": dice.choice((8, 16, 32, 64, 128)),
        "service_tier": dice.choice(TIERS),
        "seed": dice.randrange(1 << 30),
        "stream": True,
    }
    kind = dice.random()
    if kind < 0.02:
        body["service_tier"] = "gold"
    elif kind < 0.03:
        body["model"] = "none-of-that-name"
    with contextlib.suppress(OSError, http.client.HTTPException):
        call(url, body, give_up=0.03 < kind < 0.07)


def run(url: str, model: str, seconds: float, rate: float, seed: int = 0) -> None:
    """Calls at random times, `rate` a second on average, for so long; waits for their ends."""
    dice = random.Random(seed)
    threads = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        own = random.Random(dice.random())
        thread = threading.Thread(target=random_call, args=(url, model, own), daemon=True)
        thread.start()
        threads.append(thread)
        time.sleep(dice.expovariate(rate))
    for thread in threads:
        thread.join()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", default="mock")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=4.0)
    args = parser.parse_args()
    run(args.url.rstrip("/"), args.model, args.seconds, args.rate)


if __name__ == "__main__":
    main()
