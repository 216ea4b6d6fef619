// Refreshes the figures in place, and talks to /v1/chat/completions. Text is only ever set as text.
"use strict";

const EVERY_MS = 3000;
const find = (id) => document.getElementById(id);
const all = (name) => document.querySelectorAll(`[data-${name}]`);
const shown = {};
let timer = 0;

function headers() {
  const key = sessionStorage.getItem("tokenmill-key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function askForKey(why) {
  find("key-form").hidden = false;
  find("updated").textContent = why;
}

function showRows(body, rows) {
  const made = rows.map((row) => {
    const line = document.createElement("tr");
    for (const [text, kind] of row) {
      const cell = document.createElement("td");
      cell.textContent = text;
      cell.className = kind;
      line.append(cell);
    }
    return line;
  });
  body.replaceChildren(...made);
}

function show(view) {
  for (const each of all("text")) {
    const text = view.texts[each.dataset.text];
    if (text === undefined) continue;
    if (each.textContent !== text) each.textContent = text;
    if (each.dataset.kind) each.className = `chip ${view.texts[each.dataset.kind]}`;
    if (each.classList.contains("trouble")) each.hidden = !text;
  }
  for (const each of all("path")) each.setAttribute("d", view.paths[each.dataset.path] || "");
  for (const each of all("table")) {
    const name = each.dataset.table;
    const now = JSON.stringify(view.tables[name]);
    if (shown[name] === now) continue;
    shown[name] = now;
    showRows(each, view.tables[name]);
    document.querySelector(`[data-empty="${name}"]`).hidden = view.tables[name].length > 0;
  }
  find("updated").textContent = `as of ${new Date().toISOString().slice(11, 19)} UTC`;
}

async function refresh() {
  clearTimeout(timer);
  if (!document.hidden && (document.body.dataset.open === "yes" || sessionStorage.getItem("tokenmill-key"))) {
    try {
      const price = encodeURIComponent(find("price").value);
      const answer = await fetch(`/dashboard/data.json?price=${price}`, { headers: headers(), cache: "no-store" });
      if (answer.ok) show(await answer.json());
      else if (answer.status === 401 || answer.status === 403) askForKey(await reason(answer));
      else find("updated").textContent = `the server answers ${answer.status}`;
    } catch {
      find("updated").textContent = "the server does not answer";
    }
  }
  clearTimeout(timer);
  timer = setTimeout(refresh, EVERY_MS);
}

async function reason(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `the server answers ${answer.status}`;
  }
}

async function loadModels() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (!answer.ok) return;
  const names = (await answer.json()).data.map((each) => each.id);
  find("model").replaceChildren(...names.map((name) => new Option(name)));
}

const talk = [];
let running = null;

function say(role, text) {
  const line = document.createElement("p");
  line.className = role;
  line.textContent = text;
  find("talk").append(line);
  find("talk").scrollTop = find("talk").scrollHeight;
  return line;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function stream(line, abort) {
  const begun = performance.now();
  let first = 0;
  let usage = null;
  const answer = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    signal: abort.signal,
    body: JSON.stringify({
      model: find("model").value,
      messages: talk,
      max_tokens: Number(find("most").value) || 256,
      temperature: Number(find("heat").value),
      service_tier: { standard: "default", fast: "priority", batch: "flex" }[find("tier").value],
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!answer.ok) {
    if (answer.status === 401 || answer.status === 403) find("key-form").hidden = false;
    throw new Error(await reason(answer));
  }
  for await (const event of events(answer.body)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage || usage;
    const text = event.choices?.[0]?.delta?.content;
    if (!text) continue;
    first = first || performance.now();
    line.textContent += text;
    find("talk").scrollTop = find("talk").scrollHeight;
  }
  const number = usage ? usage.completion_tokens : 0;
  const rate = number > 1 && first ? `, ${((number - 1) / Math.max(1, performance.now() - first) * 1000).toFixed(1)} tokens/s` : "";
  const wait = first ? `, the first after ${(first - begun).toFixed(0)} ms` : "";
  find("said").textContent = `${usage ? usage.prompt_tokens : "?"} tokens in, ${number} out${wait}${rate}`;
}

async function send(event) {
  event.preventDefault();
  const text = find("prompt").value.trim();
  if (!text || running) return;
  running = new AbortController();
  find("send").disabled = true;
  find("stop").disabled = false;
  find("said").textContent = "waiting for the first token";
  find("prompt").value = "";
  talk.push({ role: "user", content: text });
  say("user", text);
  const line = say("assistant", "");
  try {
    await stream(line, running);
  } catch (error) {
    find("said").textContent = error.name === "AbortError" ? "stopped" : "";
    if (error.name !== "AbortError") say("error", error.message);
  }
  if (line.textContent) talk.push({ role: "assistant", content: line.textContent });
  else line.remove();
  running = null;
  find("send").disabled = false;
  find("stop").disabled = true;
  refresh();
}

find("play").addEventListener("submit", send);
find("stop").addEventListener("click", () => running?.abort());
find("clear").addEventListener("click", () => {
  running?.abort();
  talk.length = 0;
  find("talk").replaceChildren();
  find("said").textContent = "";
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("play").requestSubmit();
});
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("tokenmill-key", find("key").value.trim());
  find("key").value = "";
  refresh();
  loadModels();
});
find("price").addEventListener("change", refresh);
document.addEventListener("visibilitychange", () => document.hidden || refresh());
if (sessionStorage.getItem("tokenmill-key")) loadModels();
refresh();
