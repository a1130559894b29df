// mqtt.js against one listener: `node mqttjs.js URL VERSION [CA CERT KEY]`. Prints "ok" where every message came back.
const fs = require("fs");
const mqtt = require(process.env.MQTTJS || "mqtt");

const [url, version, ca, cert, key] = process.argv.slice(2);
const options = { protocolVersion: Number(version), connectTimeout: 8000, reconnectPeriod: 0, clientId: "js-" + process.pid };
if (ca) options.ca = fs.readFileSync(ca);
if (cert) Object.assign(options, { cert: fs.readFileSync(cert), key: fs.readFileSync(key) });

const payloads = ["small", Buffer.alloc(300000, "x").toString(), "last"];
const got = [];
const client = mqtt.connect(url, options);
const fail = (why) => { console.error(String(why && why.message || why)); process.exit(1); };
setTimeout(() => fail(`got ${got.length} of ${payloads.length} in time`), 20000).unref();
client.on("error", fail);
client.on("close", () => { if (got.length < payloads.length) fail("closed"); });
client.on("message", (topic, payload) => {
  got.push(payload.toString());
  if (got.length === payloads.length) {
    if (got.sort().join() !== payloads.sort().join()) fail("other payloads than were sent");
    client.end(false, () => { console.log("ok"); process.exit(0); });
  }
});
client.on("connect", () => client.subscribe("js/#", { qos: 2 }, (error, granted) => {
  if (error || granted[0].qos !== 2) fail(error || "not granted");
  payloads.forEach((payload, i) => client.publish("js/" + i, payload, { qos: i }));
}));
