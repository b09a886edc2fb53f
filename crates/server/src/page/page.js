// The page of `tally serve`: a conversation by /v1/chat/completions, and the load by /load. Text from the model becomes text
// nodes and elements made here, never markup.
"use strict";

const at = (id) => document.getElementById(id);
const make = (name, props = {}, ...children) => {
  const element = Object.assign(document.createElement(name), props);
  element.append(...children);
  return element;
};

// Markdown: as much of it as models write. Source: CommonMark, without HTML, references and lazy continuation.

const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|__([^_]+)__|(?<![\w*])\*([^*\s][^*]*)\*|~~([^~]+)~~|\[([^\]]+)\]\(([^)\s]+)\)/g;

function inline(text, into) {
  let done = 0;
  for (const found of text.matchAll(INLINE)) {
    into.append(text.slice(done, found.index));
    done = found.index + found[0].length;
    const [whole, code, strong, strong2, em, del, label, url] = found;
    if (code !== undefined) into.append(make("code", { textContent: code }));
    else if (strong ?? strong2) into.append(inline(strong ?? strong2, make("strong")));
    else if (em) into.append(inline(em, make("em")));
    else if (del) into.append(inline(del, make("del")));
    else if (/^https?:/i.test(url)) into.append(make("a", { href: url, textContent: label, rel: "noopener noreferrer", target: "_blank" }));
    else into.append(whole);
  }
  into.append(text.slice(done));
  return into;
}

function codeBlock(lines, language) {
  const text = lines.join("\n");
  const copy = make("button", { type: "button", textContent: "Copy" });
  copy.onclick = async () => {
    await navigator.clipboard?.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1200);
  };
  const code = make("code", { textContent: text });
  if (language) code.dataset.language = language;
  return make("div", { className: "block" }, make("pre", {}, code), copy);
}

const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function list(lines, into) {
  const item = /^(\s*)([-*+]|\d+[.)])\s+(.*)$/;
  const stack = [];
  for (const line of lines) {
    const found = line.match(item);
    if (!found) {
      stack.at(-1)?.last.append(" ");
      inline(line.trim(), stack.at(-1)?.last ?? into);
      continue;
    }
    const depth = found[1].length;
    while (stack.length && stack.at(-1).depth > depth) stack.pop();
    if (!stack.length || stack.at(-1).depth < depth) {
      const element = make(/\d/.test(found[2]) ? "ol" : "ul");
      if (/\d/.test(found[2])) element.start = parseInt(found[2], 10);
      (stack.at(-1)?.last ?? into).append(element);
      stack.push({ depth, element });
    }
    const top = stack.at(-1);
    top.last = inline(found[3], make("li"));
    top.element.append(top.last);
  }
}

function markdown(text) {
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  const is = {
    fence: /^\s*(```+|~~~+)\s*([\w+#.-]*)/, heading: /^(#{1,6})\s+(.*)$/, quote: /^>\s?(.*)$/,
    item: /^\s*([-*+]|\d+[.)])\s+/, rule: /^\s*([-*_])(\s*\1){2,}\s*$/, blank: /^\s*$/, divider: /^\s*\|?[\s:|-]*-[\s:|-]*$/,
  };
  let i = 0;
  const take = (holds) => {
    const taken = [];
    while (i < lines.length && holds(lines[i])) taken.push(lines[i++]);
    return taken;
  };
  while (i < lines.length) {
    const line = lines[i];
    const fence = line.match(is.fence);
    const heading = line.match(is.heading);
    if (fence) {
      i += 1;
      const body = take((next) => !next.trim().startsWith(fence[1]));
      i += 1;
      out.append(codeBlock(body, fence[2]));
    } else if (is.blank.test(line)) {
      i += 1;
    } else if (heading) {
      i += 1;
      out.append(inline(heading[2], make(`h${Math.min(6, heading[1].length + 2)}`)));
    } else if (is.rule.test(line)) {
      i += 1;
      out.append(make("hr"));
    } else if (is.quote.test(line)) {
      const body = take((next) => is.quote.test(next)).map((next) => next.match(is.quote)[1]);
      out.append(make("blockquote", {}, markdown(body.join("\n"))));
    } else if (is.item.test(line)) {
      list(take((next) => is.item.test(next) || (/^\s+\S/.test(next) && !is.fence.test(next))), out);
    } else if (line.includes("|") && is.divider.test(lines[i + 1] ?? "") && (lines[i + 1] ?? "").includes("|")) {
      const head = make("tr", {}, ...cells(line).map((cell) => inline(cell, make("th"))));
      i += 2;
      const rows = take((next) => next.includes("|")).map((row) => make("tr", {}, ...cells(row).map((cell) => inline(cell, make("td")))));
      out.append(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
    } else {
      const body = take((next) => !is.blank.test(next) && ![is.fence, is.heading, is.quote, is.item].some((kind) => kind.test(next)));
      const paragraph = make("p");
      body.forEach((part, n) => {
        if (n > 0) paragraph.append(make("br"));
        inline(part, paragraph);
      });
      out.append(paragraph);
    }
  }
  return out;
}

// Settings, kept by the browser; the key for as long as the page is open only.

const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed"];
const stored = JSON.parse(localStorage.getItem("tally") ?? "{}");
for (const name of FIELDS) {
  at(name).value = stored[name] ?? "";
  at(name).oninput = () => {
    stored[name] = at(name).value;
    localStorage.setItem("tally", JSON.stringify(stored));
  };
}
const headers = () => {
  const key = at("key").value;
  return key ? { authorization: `Bearer ${key}` } : {};
};

// The conversation.

const turns = [];
let running = null;

function render(turn, isLast) {
  const text = make("div", { className: "text" });
  const element = make("article", { className: `turn ${turn.role}` });
  if (turn.role === "user") {
    text.textContent = turn.content;
    element.append(text);
    return element;
  }
  if (turn.reasoning) {
    const thought = make("details", { className: "thought", open: !turn.content }, make("summary", { textContent: "Thought" }), turn.reasoning);
    element.append(thought);
  }
  text.append(markdown(turn.content));
  text.classList.toggle("waiting", turn.live === true);
  element.append(text);
  if (turn.error) element.append(make("p", { className: "error", textContent: turn.error }));
  if (!turn.live) {
    const about = make("div", { className: "about" });
    if (isLast) {
      const again = make("button", { type: "button", textContent: "Again", title: "Ask once more" });
      again.onclick = () => regenerate();
      about.append(again);
    }
    about.append(turn.about ?? "");
    element.append(about);
  }
  return element;
}

function draw(from = 0) {
  const log = at("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  at("empty").hidden = turns.length > 0;
  const drawn = [...log.querySelectorAll(".turn")];
  drawn.slice(from).forEach((element) => element.remove());
  turns.slice(from).forEach((turn, n) => log.append(render(turn, from + n === turns.length - 1)));
  if (atEnd) log.scrollTop = log.scrollHeight;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const data = held.slice(0, end).split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      held = held.slice(end + 2);
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function request() {
  const messages = turns.filter((turn) => !turn.live).map(({ role, content }) => ({ role, content }));
  if (at("system").value.trim()) messages.unshift({ role: "system", content: at("system").value });
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  for (const name of FIELDS.slice(1)) {
    if (at(name).value !== "") body[name] = Number(at(name).value);
  }
  return body;
}

const why = { length: "stopped at the limit", stop: "", tool_calls: "called a tool" };

async function answer() {
  const body = request();
  const turn = { role: "assistant", content: "", reasoning: "", live: true };
  turns.push(turn);
  draw(turns.length - 1);
  running = new AbortController();
  at("send").hidden = true;
  at("stop").hidden = false;
  const start = performance.now();
  let [usage, seed, finish, drawn] = [null, null, null, 0];
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      turn.content += choice?.delta?.content ?? "";
      turn.reasoning += choice?.delta?.reasoning_content ?? "";
      finish = choice?.finish_reason ?? finish;
      [usage, seed] = [event.usage ?? usage, event.seed ?? seed];
      if (performance.now() - drawn > 40) {
        draw(turns.length - 1);
        drawn = performance.now();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") finish = "stopped";
    else turn.error = error.message;
  }
  const seconds = (performance.now() - start) / 1000;
  const parts = [why[finish] ?? finish];
  if (usage) {
    parts.push(`${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(1)} a second`);
    if (usage.prompt_tokens_details.cached_tokens) parts.push(`${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} from the cache`);
  }
  if (seed !== null) parts.push(`seed ${seed}`);
  turn.about = parts.filter(Boolean).join(" · ");
  turn.live = false;
  running = null;
  at("send").hidden = false;
  at("stop").hidden = true;
  draw(turns.length - 1);
  at("prompt").focus();
}

function say(text) {
  if (running || !text.trim()) return;
  turns.push({ role: "user", content: text });
  draw();
  answer();
}

function regenerate() {
  if (running || turns.at(-1)?.role !== "assistant") return;
  turns.pop();
  draw(turns.length);
  answer();
}

function grow() {
  const prompt = at("prompt");
  prompt.rows = Math.min(12, prompt.value.split("\n").length);
  at("send").disabled = !prompt.value.trim();
}

at("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = at("prompt").value;
  if (running) return;
  at("prompt").value = "";
  grow();
  say(text);
};
at("prompt").oninput = grow;
at("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
};
at("stop").onclick = () => running?.abort();
at("new").onclick = () => {
  running?.abort();
  turns.length = 0;
  draw();
};
for (const name of ["load", "settings"]) {
  at(`show-${name}`).onclick = () => {
    at(name).hidden = !at(name).hidden;
    at(`show-${name}`).setAttribute("aria-expanded", String(!at(name).hidden));
  };
}
for (const text of ["fn main() {", "What does Vec::push do?", "impl Iterator for Counter {"]) {
  const button = make("button", { type: "button", textContent: text });
  button.onclick = () => say(text);
  at("examples").append(make("li", {}, button));
}

// The load, a look a second.

const rates = Array(120).fill(0);
const count = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

function drawLoad(load) {
  const hits = load.prompt_tokens ? `${Math.round((100 * load.cached_tokens) / load.prompt_tokens)}%` : "–";
  const rows = [
    ["Running", `${load.running} of ${load.most_running}`], ["Waiting", `${load.waiting} of ${load.most_waiting}`],
    ["Prompt from the cache", hits], ["Prompt tokens a second", count.format(Math.round(load.prompt_tokens_per_second))],
    ["Tokens generated", count.format(load.generated_tokens)],
  ];
  const troubles = [["Put back", load.preemptions], ["Numeric faults", load.numeric_faults], ["Engine failures", load.engine_failures], ["Verify mismatches", load.verify_mismatches]];
  rows.push(...troubles.filter(([, n]) => n > 0).map(([name, n]) => [name, count.format(n), name !== "Put back"]));
  at("figures").replaceChildren(...rows.flatMap(([name, value, bad]) => [make("dt", { textContent: name }), make("dd", { textContent: value, className: bad ? "bad" : "" })]));
  rates.push(load.tokens_per_second);
  rates.shift();
  at("rate").textContent = load.tokens_per_second.toFixed(1);
  const top = Math.max(10, ...rates);
  const line = rates.map((rate, x) => `${x === 0 ? "M" : "L"}${x} ${(35 - (33 * rate) / top).toFixed(1)}`).join("");
  const path = (kind, d) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", "path");
    element.setAttribute("class", kind);
    element.setAttribute("d", d);
    return element;
  };
  at("rate-line").replaceChildren(path("area", `${line}L119 36L0 36Z`), path("line", line));
  const used = load.kv_blocks - load.kv_blocks_available - load.kv_blocks_quarantined;
  at("memory").textContent = load.kv_blocks ? `${used} of ${load.kv_blocks} blocks` : "";
  at("used").style.width = `${(100 * used) / (load.kv_blocks || 1)}%`;
  at("kept").style.width = `${(100 * load.kv_blocks_idle) / (load.kv_blocks || 1)}%`;
}

async function look() {
  const state = at("state");
  try {
    const response = await fetch("load", { headers: headers() });
    const load = await response.json();
    if (!response.ok) throw new Error(response.status === 401 ? "key needed" : load.error.message);
    state.textContent = load.status;
    state.className = `pill ${load.status === "ok" ? "ok" : "bad"}`;
    drawLoad(load);
    if (!at("model").textContent) {
      const models = await (await fetch("v1/models", { headers: headers() })).json();
      at("model").textContent = models.data[0].id;
    }
  } catch (error) {
    state.textContent = error instanceof TypeError ? "no connection" : error.message;
    state.className = "pill bad";
  }
  if (!document.hidden) document.body.dataset.ready = "true";
  setTimeout(look, document.hidden ? 5000 : 1000);
}

grow();
look();
