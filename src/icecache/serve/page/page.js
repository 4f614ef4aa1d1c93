"use strict";

const at = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
let model = "";
let messages = [];
let text = null;
let running = null;

function headers() {
  const key = at("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function begin() {
  const answer = await fetch("/v1/models", { headers: headers() });
  document.querySelector(".key").hidden = answer.status !== 401 && !at("key").value;
  if (answer.ok) {
    model = (await answer.json()).data[0].id;
    at("model").textContent = model;
  }
}

function say(role, content) {
  const line = document.createElement("li");
  line.className = role;
  line.textContent = content;
  at("messages").append(line);
  line.scrollIntoView({ block: "end" });
  return line;
}

async function take(file) {
  text = await file.text();
  messages = [];
  at("messages").replaceChildren();
  at("document").textContent = `${file.name}: ${number.format(text.length)} letters`;
}

function bytes(count) {
  return count < 1 << 20 ? `${(count / 1024).toFixed(0)} KiB` : `${(count / (1 << 20)).toFixed(1)} MiB`;
}

function show(live) {
  at("context").textContent = number.format(live.context_tokens);
  at("cached").textContent = number.format(live.cached_tokens);
  at("progress").value = Math.min(1, live.context_tokens / live.prompt_tokens);
  if (live.attended_tokens !== null && live.phase === "decode") {
    at("attended").textContent = `${number.format(live.attended_tokens)} tokens`;
  }
  at("resident").textContent = bytes(live.resident_bytes);
  if (live.mass_captured !== null) at("mass").textContent = `${(100 * live.mass_captured).toFixed(1)} %`;
  if (live.seconds_per_token !== null) at("tpot").textContent = `${(1000 * live.seconds_per_token).toFixed(0)} ms`;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function contentOf(question) {
  return messages.length || text === null
    ? question
    : `Read the following text.\n\n${text.trim()}\n\nAnswer this question: ${question}`;
}

async function ask(question) {
  const asked = { role: "user", content: contentOf(question) };
  say("user", question);
  const line = say("assistant", "");
  line.classList.add("busy");
  running = new AbortController();
  const begun = performance.now();
  const budget = parseInt(at("budget").value, 10);
  const body = { model, messages: [...messages, asked], stream: true, temperature: 0, live: true };
  if (budget) body.budget = budget;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    let isFirst = true;
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.icecache) show(event.icecache);
      const piece = event.choices[0]?.delta.content;
      if (piece) {
        if (isFirst) at("ttft").textContent = `${((performance.now() - begun) / 1000).toFixed(2)} s`;
        isFirst = false;
        line.textContent += piece;
        line.scrollIntoView({ block: "end" });
      }
    }
    messages.push(asked, { role: "assistant", content: line.textContent });
  } catch (error) {
    if (error.name !== "AbortError") {
      line.classList.add("error");
      line.textContent += error.message;
    }
  } finally {
    line.classList.remove("busy");
    running = null;
  }
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || running) return;
  at("question").value = "";
  at("send").hidden = true;
  at("stop").hidden = false;
  if (!model) await begin();
  await ask(question);
  at("send").hidden = false;
  at("stop").hidden = true;
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("again").addEventListener("click", () => {
  running?.abort();
  messages = [];
  at("messages").replaceChildren();
});
at("key").addEventListener("change", begin);
at("file").addEventListener("change", () => at("file").files[0] && take(at("file").files[0]));
at("drop").addEventListener("click", () => at("file").click());
at("drop").addEventListener("keydown", (event) => event.key === "Enter" && at("file").click());
for (const name of ["dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}
begin();
