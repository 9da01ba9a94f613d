"""The coordinator's half of the echo app: sends bytes to every site and times the rounds."""

import json
import os
import time

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from common import flower_fast

app = ServerApp()


def ask(node: int, data: bytes, op: str, number: int) -> Message:
    content = RecordDict(
        {
            "payload": ArrayRecord({"bytes": Array("uint8", (len(data),), "raw.bytes", data)}),
            "ask": ConfigRecord({"op": op, "victim": os.environ.get("ECHO_VICTIM", "")}),
        }
    )
    return Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(number), ttl=120.0)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write a line for each."""
    config = context.run_config
    warnings = [] if os.environ["ECHO_RUNTIME"] == "stock" else flower_fast.apply(role="server")
    with open(os.environ["ECHO_OUT"], "a", encoding="utf-8") as out:
        while len(nodes := sorted(grid.get_node_ids())) < int(config["sites"]):
            time.sleep(0.1)
        for number in range(int(config["rounds"])):
            data = os.urandom(int(config["size"]))
            op = str(config["op"]) if number == 0 else "echo"
            start = time.monotonic()
            waiting = set(grid.push_messages([ask(node, data, op, number) for node in nodes]))
            line = {"round": number, "same": 0, "errors": [], "cpu": [], "maxrss": [], "torch": 0}
            while waiting and time.monotonic() - start < 100:
                for reply in grid.pull_messages(list(waiting)):
                    waiting.discard(reply.metadata.reply_to_message_id)
                    if reply.has_error():
                        line["errors"].append([reply.error.code, reply.error.reason])
                        continue
                    line["same"] += reply.content["payload"]["bytes"].data == data
                    line["cpu"].append(reply.content["used"]["cpu"])
                    line["maxrss"].append(reply.content["used"]["maxrss"])
                    line["torch"] += reply.content["who"]["torch"]
                time.sleep(0.02)
            line |= {"seconds": time.monotonic() - start, "missing": len(waiting), "warnings": warnings}
            out.write(json.dumps(line) + "\n")
            out.flush()
            time.sleep(float(config["idle"]))
