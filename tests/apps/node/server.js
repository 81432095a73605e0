// An HTTP server, a timer, and a worker thread. fetch() ends with a TypeError in a copy.
const { randomBytes } = require("node:crypto");
const http = require("node:http");
const { Worker } = require("node:worker_threads");

const token = randomBytes(16).toString("hex");
let ticks = 0;
setInterval(() => ticks++, 20);
const worker = new Worker(
  "let n = 0; require('node:worker_threads').parentPort.on('message', (m) => " +
    "require('node:worker_threads').parentPort.postMessage([m, ++n]))",
  { eval: true },
);
const ask = (m) =>
  new Promise((done) => {
    worker.once("message", done);
    worker.postMessage(m);
  });

async function main() {
  await ask("warm");
  try {
    const answer = await fetch("http://169.254.169.253:8234/checkpoint", { method: "POST" });
    console.log(await answer.text());
  } catch (error) {
    console.log(`fetch: ${error.name}: ${error.cause?.code}`);
  }
  http
    .createServer(async (request, response) => {
      const [, count] = await ask(request.url);
      response.end(JSON.stringify({ token, ticks, count }));
    })
    .listen(8000, "0.0.0.0");
}
main();
