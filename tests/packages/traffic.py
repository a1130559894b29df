"""Clients for an upgrade, run in the box's network: `traffic.py PORT PREFIX`. Works until its standard input ends, then prints
one JSON object: what each client was told is safe, and what went wrong meanwhile.

- paho clients of both versions, QoS 1, a window of 20 messages: they reconnect and send again by themselves.
- `mosquitto_pub -q 1` one message a process, one after the other: exit code 0 is the acknowledgement.
- a prober that does nothing but connect, each 2 ms: it would see the shortest moment in which the port is closed.
"""

import collections
import errno
import json
import socket
import subprocess
import sys
import threading
import time

import paho.mqtt.client as paho

PORT, PREFIX = int(sys.argv[1]), sys.argv[2]
ended = threading.Event()
refused = []
resets = []


def paho_client(name, version, report):
    acked = report[name] = []
    by_mid, came = {}, collections.deque()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name, protocol=version)
    client.reconnect_delay_set(1, 1)
    client.on_publish = lambda _c, _u, mid, code, _p: code.is_failure or came.append(mid)
    client.on_disconnect = lambda *_: resets.append(name)
    client.on_connect_fail = lambda *_: refused.append(name)
    client.connect("127.0.0.1", PORT, 30)
    client.loop_start()

    def settle():
        # Here and not in the callback, which may come before `publish` has said which number the message got.
        while came:
            acked.append(by_mid.pop(came.popleft()))

    n = 0
    while not ended.is_set():
        settle()
        if len(by_mid) < 20:
            by_mid[client.publish(f"{PREFIX}/{name}", str(n), qos=1).mid] = n
            n += 1
        time.sleep(0.002)
    until = time.monotonic() + 30
    while by_mid and time.monotonic() < until:
        settle()
        time.sleep(0.02)
    report[name + " open"] = len(by_mid)
    client.disconnect()
    client.loop_stop()


def one_shots(name, report):
    acked = report[name] = []
    n = 0
    while not ended.is_set():
        command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(PORT), "-q", "1", "-t", f"{PREFIX}/{name}", "-m", str(n)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode == 0:
            acked.append(n)
        elif "refused" in done.stderr.lower():
            refused.append(f"{name}: {done.stderr.strip()}")
        else:
            resets.append(name)
        n += 1


def prober(report):
    probes = slow = 0
    while not ended.is_set():
        probe = socket.socket()
        probe.settimeout(10)
        try:
            began = time.monotonic()
            probe.connect(("127.0.0.1", PORT))
            slow = max(slow, time.monotonic() - began)
            probes += 1
        except OSError as error:
            (refused if error.errno == errno.ECONNREFUSED else resets).append(f"prober: {error}")
        finally:
            probe.close()
        time.sleep(0.002)
    report["probes"] = probes
    report["slowest connect ms"] = round(slow * 1000, 1)


report = {}
threads = [threading.Thread(target=prober, args=(report,))]
for i, version in enumerate([paho.MQTTv311, paho.MQTTv5] * 2):
    threads.append(threading.Thread(target=paho_client, args=(f"paho-{i}", version, report)))
for i in range(2):
    threads.append(threading.Thread(target=one_shots, args=(f"mosquitto-pub-{i}", report)))
for thread in threads:
    thread.start()
print("started", flush=True)
sys.stdin.read()
ended.set()
for thread in threads:
    thread.join()
print(json.dumps({**report, "refused": refused, "resets": len(resets)}))
