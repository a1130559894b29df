"""A long outage costs nothing: 100,000 messages queued with the upstream down, kill -9, upstream back: all arrive, in order, and
the gateway stays small throughout."""

import subprocess
import time

import pytest

from rawmqtt import PUBACK, Raw, publish
from support import Mosquitto, eventually, mqtt_uplink

COUNT, TOPICS, SIZE = 100_000, 10, 256
RSS_MAX_KB = 40_000


@pytest.mark.timeout(240)
@pytest.mark.parametrize("version", ["3.1.1", "5"])
def test_a_backlog_of_100_000_arrives_in_order_after_a_kill(gateway, tmp_path, _started, version):
    # The recorder is mosquitto_sub: paho would be the slowest part. More in flight than mosquitto's usual 20.
    upstream = Mosquitto(tmp_path / "upstream", "max_inflight_messages 1000\n")
    _started.append(upstream)
    upstream.start()
    received = tmp_path / "received.txt"
    with open(received, "wb") as out:
        sub = subprocess.Popen(
            ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(upstream.port), "-V", "5", "-i", "recorder", "-c", "-x", "3600"]
            + ["-q", "1", "-t", "plants/#", "-t", "ready", "-F", "%t %p"],
            stdout=out,
        )
    try:
        # mosquitto_sub writes block-wise into a file: subscribed shows at the broker.
        eventually(lambda: (upstream.folder / "mosquitto.log").read_text().count("as recorder"), 10, "mosquitto_sub is there")
        with Raw(upstream.port, 5).open("probe") as probe:
            eventually(lambda: probe.publish_acked("ready", "") == 0, 10, "mosquitto_sub has subscribed")
        upstream.stop()

        made = gateway(mqtt_uplink(upstream.port, version=version, extra="window = 1000"))
        pad = b" " + b"x" * (SIZE - 8)
        began = time.monotonic()
        with Raw(made.port).open("filler") as filler:
            for first in range(0, COUNT, 1000):
                data = [publish(4, f"b/{n % TOPICS}", b"%d%s" % (n, pad), 1, n - first + 1) for n in range(first, first + 1000)]
                filler.send(b"".join(data))
                for _ in data:
                    filler.expect(PUBACK)
        filled_s = time.monotonic() - began
        peak_filling = made.memory_kb("VmHWM")
        made.kill9()
        made.start()
        assert made.part("uplink", "cloud")["health"] != "good"
        upstream.start()

        def arrived_bytes():
            return received.stat().st_size

        eventually(lambda: arrived_bytes() > 0, 90, "the first arrive", 0.002)
        first_at = time.monotonic()
        # The last block stays in mosquitto_sub's buffer until it ends.
        most = 0.98 * COUNT * (len("plants/line-4/b/0 ") + SIZE - 3)
        eventually(lambda: arrived_bytes() >= most, 120, lambda: f"{COUNT} arrive: {made.status()}", 0.005)
        drained_s = time.monotonic() - first_at
        eventually(lambda: acknowledged_all(made), 60, "every acknowledgement is there", 0.1)
        peak_draining = made.memory_kb("VmHWM")
    finally:
        # In order, so that it writes what it holds.
        upstream.stop()
        sub.terminate()
        sub.wait(20)
    per_topic = {}
    for line in received.read_bytes().splitlines():
        topic, _, payload = line.partition(b" ")
        if topic.startswith(b"plants/line-4/b/"):
            per_topic.setdefault(topic, []).append(int(payload.split(b" ")[0]))
    firsts = {topic: list(dict.fromkeys(numbers)) for topic, numbers in per_topic.items()}
    arrived = sum(len(f) for f in firsts.values())
    duplicates = sum(len(n) for n in per_topic.values()) - arrived
    print(
        f"MQTT {version}: filled at {COUNT / filled_s:.0f}/s, drained at {0.98 * COUNT / drained_s:.0f}/s, {duplicates} "
        f"duplicates, peak {peak_filling} kB filling, {peak_draining} kB draining"
    )
    assert arrived == COUNT
    for t in range(TOPICS):
        assert firsts[b"plants/line-4/b/%d" % t] == list(range(t, COUNT, TOPICS)), f"order on topic {t}"
    assert max(peak_filling, peak_draining) < RSS_MAX_KB


def acknowledged_all(made):
    return made.part("uplink", "cloud")["counters"].get("acknowledged", 0) >= COUNT

