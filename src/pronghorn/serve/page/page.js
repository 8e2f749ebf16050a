// The playground: OpenAI's API by fetch, a text with its tokens, and nothing from elsewhere.
// The server's policy allows no inline style: what is set here is set on `element.style`, which it does allow.

const $ = (id) => document.getElementById(id);
const form = $("form");
const field = form.elements;
const NUMBERS = ["max_tokens", "temperature", "top_p", "min_p", "top_k", "seed"];
const ALTERNATIVES = 5; // as many as OpenAI's completions give

let turns = []; // of the conversation: {role, content}
let last = null; // the last run: what was asked, and its answer
let running = null; // the AbortController of the run that goes on

// ---------------------------------------------------------------------------------------------------- the server

async function request(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if (field.key.value) headers.authorization = `Bearer ${field.key.value}`;
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error(`the server does not answer (${error.message})`);
  });
  if (response.ok) return response;
  if (response.status === 401) $("settings").open = true;
  const text = await response.text();
  throw new Error(messageOf(text) ?? `${response.status} ${response.statusText}: ${text.slice(0, 200)}`);
}

function messageOf(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return null;
  }
}

/** The JSON values of a stream of server-sent events, to its [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** The tokens of a chunk's choice, in either of the API's forms: {name, text, logprob, top: [{name, logprob}]}. */
function tokensOf({ logprobs }) {
  if (!logprobs) return [];
  if (logprobs.content) {
    const token = ({ token: name, logprob }) => ({ name, logprob });
    return logprobs.content.map((t) => ({ ...token(t), text: textOf(t.bytes), top: t.top_logprobs.map(token) }));
  }
  return logprobs.tokens.map((name, i) => ({
    name,
    text: name,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i])
      .map(([name, logprob]) => ({ name, logprob }))
      .sort((a, b) => b.logprob - a.logprob), // names that are numbers come first otherwise
  }));
}

/** What a token spells by itself: nothing, if it is special or holds a part of a character. */
function textOf(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes ?? []));
  } catch {
    return "";
  }
}

// --------------------------------------------------------------------------------------------- a text and its tokens

/** An answer on its way: the text that the server sends, and tokens laid over it as far as they spell it. */
class Answer {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.rest = ""; // text that no token has been laid over
    this.waiting = []; // tokens whose text has not come: half a character, or what may become a stop string
    this.count = 0;
  }

  add(text, tokens) {
    this.text += text;
    this.rest += text;
    this.waiting.push(...tokens);
    this.count += tokens.length;
    this.lay(false);
  }

  end() {
    this.lay(true);
  }

  lay(final) {
    while (this.waiting.length) {
      const [token] = this.waiting;
      const spelled = this.count === this.waiting.length ? [token.text, token.text.trimStart()] : [token.text];
      const match = spelled.find((text) => text && this.rest.startsWith(text));
      if (match) {
        this.put(1, match.length);
        continue;
      }
      if (!final && spelled.some((text) => text.startsWith(this.rest))) return;
      // Not spelled so: several tokens of one character, or a special one. Go on where a later one fits.
      const fits = this.waiting.findIndex(({ text }, i) => i > 0 && text && this.rest.includes(text));
      if (fits < 0 && !final) return;
      const n = fits < 0 ? this.waiting.length : fits;
      this.put(n, fits < 0 ? this.rest.length : this.rest.indexOf(this.waiting[fits].text));
    }
    if (this.rest) this.put(0, this.rest.length);
  }

  put(nTokens, length) {
    const text = this.rest.slice(0, length);
    this.rest = this.rest.slice(length);
    if (!nTokens) return this.element.append(text);
    const tokens = this.waiting.splice(0, nTokens);
    const logprob = tokens.reduce((sum, token) => sum + token.logprob, 0);
    const space = text.trim() ? text.length - text.trimStart().length : 0; // is not shaded: it may hang at a line's end
    const mark = element("mark", !text ? "end" : text.includes("\n") ? "line" : "", text.slice(space));
    const span = element("span", "token", text.slice(0, space), mark);
    span.tokens = tokens;
    span.tabIndex = this.element.querySelector(".token") ? -1 : 0;
    span.style.setProperty("--surprise", (1 - Math.exp(logprob)).toFixed(3));
    this.element.append(span);
  }
}

function element(name, className, ...children) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
}

const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return `${p >= 99.95 ? 100 : p >= 0.1 ? p.toFixed(1) : p.toPrecision(1)} %`;
}

function showPopover(span) {
  const popover = $("popover");
  const rows = [];
  if (span.tokens.length > 1) rows.push(element("p", "note", `${span.tokens.length} tokens together:`));
  for (const token of span.tokens) {
    const others = span.tokens.length > 1 ? [] : token.top;
    const found = others.findIndex(({ name }) => name === token.name);
    for (const one of found < 0 ? [...others, token] : others) {
      const bar = element("i", "");
      bar.style.width = `${100 * Math.exp(one.logprob)}%`;
      const told = [bar, element("code", "", visible(one.name)), element("span", "", percent(one.logprob))];
      const chosen = one.name === token.name;
      if (chosen) told.push(element("b", "spoken", "chosen"));
      rows.push(element("div", chosen ? "row chosen" : "row", ...told));
    }
  }
  popover.replaceChildren(...rows, element("p", "note", "before temperature and filters"));
  popover.hidden = false;
  document.querySelector("[aria-describedby]")?.removeAttribute("aria-describedby");
  span.setAttribute("aria-describedby", "popover");
  const at = span.querySelector("mark").getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = popover;
  const below = at.bottom + 6;
  const left = Math.max(8, Math.min(at.left - 12, innerWidth - width - 8));
  popover.style.left = `${left}px`;
  popover.style.top = `${below + height + 8 > innerHeight ? Math.max(8, at.top - height - 6) : below}px`;
}

const hidePopover = () => ($("popover").hidden = true);

/** The token that an arrow key leads to. */
function neighbour(span, key) {
  const all = [...span.parentElement.querySelectorAll(".token")];
  const index = all.indexOf(span);
  const end = { ArrowLeft: all[index - 1], ArrowRight: all[index + 1], Home: all[0], End: all.at(-1) };
  if (key in end) return end[key];
  const middle = (one) => one.offsetLeft + one.offsetWidth / 2;
  const above = key === "ArrowUp";
  const tops = all.map((one) => one.offsetTop).filter((top) => (above ? top < span.offsetTop : top > span.offsetTop));
  const line = all.filter((one) => one.offsetTop === (above ? Math.max(...tops) : Math.min(...tops)));
  const far = (one) => Math.abs(middle(one) - middle(span));
  return line.reduce((best, one) => (best && far(best) <= far(one) ? best : one), null);
}

$("turns").addEventListener("keydown", (event) => {
  if (!/^(Arrow(Left|Right|Up|Down)|Home|End)$/.test(event.key) || !event.target.tokens) return;
  event.preventDefault();
  const next = neighbour(event.target, event.key);
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
const tokenAt = (node) => node?.closest?.(".token");
const showAt = (event) => (tokenAt(event.target) ? showPopover(tokenAt(event.target)) : hidePopover());
$("turns").addEventListener("focusin", showAt);
$("turns").addEventListener("pointerover", showAt);
$("turns").addEventListener("focusout", hidePopover);
$("turns").addEventListener("pointerleave", hidePopover);
let pinned = true; // the end of the text stays in view, until someone scrolls up
let bottom = 0; // how far down we scrolled
$("sheet").addEventListener("scroll", ({ target: { scrollTop, scrollHeight, clientHeight } }) => {
  hidePopover();
  pinned = scrollTop > Math.min(bottom, scrollHeight - clientHeight) - 40;
});

// ------------------------------------------------------------------------------------------------------ one run

const mode = () => field.mode.value;

/** What the form asks for: the body of a request, without what makes it a stream. */
function asked() {
  const body = { model: field.model.value };
  for (const name of NUMBERS) if (field[name].value !== "") body[name] = Number(field[name].value);
  const stop = field.stop.value.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop.map((text) => text.replaceAll("\\n", "\n"));
  body.seed ??= Math.floor(Math.random() * 2 ** 31); // ours, so that a text that was stopped can be shared too
  if (mode() === "completion") return { ...body, prompt: field.prompt.value };
  const system = field.system.value.trim() ? [{ role: "system", content: field.system.value }] : [];
  return { ...body, messages: [...system, ...turns.map(({ role, content }) => ({ role, content }))] };
}

function addTurn(role, content) {
  const turn = element("article", `turn ${role}`);
  turn.setAttribute("aria-label", role === "user" ? "You" : "Answer; arrow keys move from token to token");
  if (content) turn.append(content);
  $("turns").append(turn);
  return turn;
}

async function run() {
  if (running) return;
  const invalid = [...field].find((input) => input.willValidate && !input.checkValidity());
  if (invalid) {
    $("settings").open = true;
    invalid.reportValidity();
    return;
  }
  notice("");
  hidePopover();
  const chat = mode() === "chat";
  const before = { turns: [...turns], shown: [...$("turns").children], text: field.prompt.value, last };
  if (!chat) $("turns").replaceChildren();
  else if (before.text.trim()) {
    turns.push({ role: "user", content: before.text });
    addTurn("user", before.text);
    field.prompt.value = "";
  } else if (turns.at(-1)?.role === "assistant") {
    turns.pop(); // nothing new was said: the answer is made again
    $("turns").lastElementChild.remove();
  } else if (!turns.length) return field.prompt.focus();
  changed();
  const body = asked();
  const answer = new Answer(addTurn("assistant"));
  last = { mode: mode(), body, answer, started: performance.now() };
  running = new AbortController();
  working(true);
  let error = null;
  try {
    await follow(last, running.signal);
  } catch (caught) {
    error = caught;
  }
  if (last?.answer !== answer) return; // the page was cleared
  answer.end();
  if (error && !answer.count) {
    turns = before.turns;
    last = before.last;
    field.prompt.value = before.text;
    $("turns").replaceChildren(...before.shown);
    changed();
  } else if (chat) turns.push({ role: "assistant", content: answer.text });
  $("status").textContent = `${error?.name === "AbortError" ? "stopped after " : ""}${answer.count} tokens`;
  if (error && error.name !== "AbortError") notice(error.message);
  running = null;
  working(false);
}

/** Reads an answer to its end, and tells how it goes. */
async function follow(run, signal) {
  const chat = run.mode === "chat";
  const form = chat ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES };
  const body = { ...run.body, ...form, stream: true, stream_options: { include_usage: true } };
  const path = chat ? "v1/chat/completions" : "v1/completions";
  const response = await request(path, { method: "POST", body: JSON.stringify(body), signal });
  let frame = 0; // what is shown follows once a frame: tokens may come faster, and each look at the layout costs one
  const show = () => {
    frame = 0;
    figures(run);
    if (pinned) $("sheet").scrollTop = $("sheet").scrollHeight;
    bottom = $("sheet").scrollTop;
  };
  pinned = true;
  try {
    for await (const event of events(response)) {
      const [choice] = event.choices;
      if (choice) {
        const tokens = tokensOf(choice);
        run.answer.add((chat ? choice.delta.content : choice.text) ?? "", tokens);
        if (tokens.length) run.latest = performance.now();
        if (tokens.length && !run.first) [run.first, run.early] = [run.latest, run.answer.count];
      }
      if (choice?.finish_reason) run.ended = choice.finish_reason;
      if (event.system_fingerprint) run.fingerprint = event.system_fingerprint;
      if (event.timings) run.timings = event.timings;
      frame ||= requestAnimationFrame(show);
    }
  } finally {
    cancelAnimationFrame(frame);
    show();
  }
  if (expected && run.fingerprint !== expected) {
    notice("the link was made with another build or model than this server's: the text may differ");
  }
}

/** What is measured: here while the answer comes, and by the server at its end. */
function figures({ body, answer, started, first, latest, early, ended, timings = {} }) {
  const ttft = timings.ttft_s ?? (first && (first - started) / 1000);
  const speed = timings.decode_tok_s ?? (latest > first && ((answer.count - early) / (latest - first)) * 1000);
  $("figures").hidden = false;
  $("ttft").textContent = ttft ? `${(1000 * ttft).toFixed(0)} ms` : "–";
  $("speed").textContent = speed ? speed.toFixed(speed < 100 ? 1 : 0) : "–";
  $("count").textContent = answer.count;
  $("ended").textContent = ended === "length" ? "tokens (limit)" : "tokens";
  const right = timings.draft_accepted / timings.draft_proposed; // NaN where there are no drafts
  $("drafts").parentElement.hidden = !(right >= 0);
  $("drafts").textContent = right >= 0 ? `${Math.round(100 * right)} %` : "–";
  $("used-seed").textContent = body.seed;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function working(on) {
  const focused = document.activeElement;
  $("run").hidden = on;
  $("halt").hidden = !on;
  $("turns").ariaBusy = on;
  if (focused === $("run") && on) $("halt").focus();
  if (focused === $("halt") && !on) $("run").focus();
  $("copy").disabled = $("share").disabled = on || !last;
}

// ---------------------------------------------------------------------------------------------------------- links

let expected = null; // the build and model that the link's text was made with

/** The address of a run: all in the fragment, which browsers do not send. */
function link({ mode, body, fingerprint }) {
  const { messages, ...rest } = body;
  const values = { mode, ...rest, ...(messages && { messages: JSON.stringify(messages) }), fingerprint };
  if (body.stop) values.stop = body.stop.map((text) => text.replaceAll("\n", "\\n")).join("\n");
  const known = Object.entries(values).filter(([, value]) => value !== undefined);
  return `${location.href.split("#")[0]}#${new URLSearchParams(known)}`;
}

function openLink() {
  if (location.hash.length < 2) return;
  const values = new URLSearchParams(location.hash.slice(1));
  try {
    const messages = JSON.parse(values.get("messages") ?? "[]");
    for (const { role, content } of messages) if (typeof role + typeof content !== "stringstring") throw new Error();
    clear();
    field.mode.value = values.get("mode") === "chat" ? "chat" : "completion";
    field.system.value = messages[0]?.role === "system" ? messages.shift().content : "";
    field.prompt.value = values.get("prompt") ?? messages.pop()?.content ?? "";
    for (const message of messages) {
      turns.push(message);
      addTurn(message.role, message.content);
    }
  } catch {
    return notice("the link is broken: its messages are no list of role and content");
  }
  for (const name of [...NUMBERS, "stop"]) field[name].value = values.get(name) ?? "";
  const model = values.get("model");
  if (model) field.model.value = model;
  if (model && field.model.value !== model) {
    field.model.selectedIndex = 0;
    notice(`the link's model ${model} is not served here`);
  }
  expected = values.get("fingerprint");
  changed();
}

async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = button === $("share") ? "See the address" : "Not allowed"; // no clipboard without https
  }
  setTimeout(() => (button.textContent = label), 1500);
}

$("copy").addEventListener("click", () => copy(last.answer.text, $("copy")));
$("share").addEventListener("click", () => {
  history.replaceState(null, "", link(last));
  copy(location.href, $("share"));
});

// ---------------------------------------------------------------------------------------------------------- the form

function clear() {
  running?.abort();
  running = null;
  turns = [];
  last = expected = null;
  $("turns").replaceChildren();
  $("figures").hidden = true;
  notice("");
  hidePopover();
  working(false);
}

/** A text area as high as its text. */
function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

/** Puts on the page what follows from the form. */
function changed() {
  const chat = mode() === "chat";
  form.dataset.mode = mode();
  if ($("sheet").lastElementChild.contains(field.prompt) !== chat) {
    $("sheet").append($("sheet").firstElementChild); // a prompt comes before its text, and after a conversation
  }
  field.prompt.placeholder = chat ? "Say something." : "Write the beginning; the model goes on from there.";
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("run").firstElementChild.textContent = chat ? "Send" : "Run";
  $("echo").textContent = chat ? "" : field.prompt.value; // keeps the prompt's place: the answer goes on there
  form.classList.toggle("shaded", field.shade.checked);
  for (const range of document.querySelectorAll("[data-of]")) range.value = field[range.dataset.of].value;
  for (const area of document.querySelectorAll("textarea")) fit(area);
}

for (const range of document.querySelectorAll("[data-of]")) {
  range.tabIndex = -1; // the number beside it is for the keyboard
  range.ariaHidden = true;
}
form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
form.addEventListener("input", ({ target }) => {
  if (target.dataset.of) field[target.dataset.of].value = target.value;
  if (target.name === "mode") clear();
  if (target.name === "key") sessionStorage.setItem("api-key", target.value);
  changed();
});
field.key.addEventListener("change", models);
field.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.ctrlKey || mode() !== "chat") return;
  event.preventDefault();
  run();
});
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault(); // of a button that has the focus
    run();
  }
  if (event.key === "Escape") {
    hidePopover();
    running?.abort();
  }
});
$("halt").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  clear();
  field.prompt.value = "";
  changed();
  field.prompt.focus();
});

const THEMES = { system: "◐", light: "○", dark: "●" };
function theme(name) {
  localStorage.theme = document.documentElement.dataset.theme = name;
  $("theme").textContent = THEMES[name];
  $("theme").title = $("theme").ariaLabel = `Theme: ${name}`;
}
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme(names[(names.indexOf(localStorage.theme) + 1) % names.length]);
});
theme(localStorage.theme in THEMES ? localStorage.theme : "system");

const wide = matchMedia("(min-width: 56rem)");
const unfold = () => ($("settings").open = wide.matches);
wide.addEventListener("change", unfold);
unfold();

async function models() {
  try {
    const { data } = await (await request("v1/models")).json();
    const chosen = field.model.value;
    field.model.replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
    const ready = (await fetch("health")).ok; // there may be more to come
    notice(ready ? "" : "models are being loaded");
    if (ready) return;
  } catch (error) {
    return notice(error.message);
  }
  await new Promise((resolve) => setTimeout(resolve, 500));
  await models();
}

field.key.value = sessionStorage.getItem("api-key") ?? "";
changed();
await models();
openLink();
addEventListener("hashchange", openLink);
