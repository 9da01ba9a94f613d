"""The site's half of the echo app: sends back what came, or breaks on demand."""

import os
import resource
import signal
import sys
import time

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Echo; "kill" ends hard, "sleep" takes its time."""
    op = str(message.content["ask"]["op"])
    victim = message.content["ask"]["victim"] in ("", context.node_config["site"])
    if op == "kill" and victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if op == "sleep" and victim:
        time.sleep(60)
    data = message.content["payload"]["bytes"].data
    used = resource.getrusage(resource.RUSAGE_SELF)
    site = str(context.node_config["site"])
    reply = RecordDict(
        {
            "payload": ArrayRecord({"bytes": Array("uint8", (len(data),), "raw.bytes", data)}),
            "used": MetricRecord({"cpu": used.ru_utime + used.ru_stime, "maxrss": used.ru_maxrss / 1024}),
            "who": MetricRecord({"torch": int("torch" in sys.modules), "oak": int(site == "oak")}),
        }
    )
    return Message(reply, reply_to=message)
