// Texts of tuples reach the page as textContent and as values of fields only, never as markup.
"use strict";

const NAMES = {
  src_caption: "Source caption",
  instruction: "Instruction",
  tgt_caption: "Target caption",
  reverse_instruction: "Reverse instruction",
};
const STATUSES = ["open", "kept", "fixed", "discarded"];
const PAUSE = 250; // ms after the last key until an edit is sent
const RETRY = 1000; // ms
const REFUSED = [413, 422]; // answers to a write that would come again, and must not hold up the others
const GONE = [404, 410]; // the tuple is no longer the server's

const page = crypto.randomUUID?.() ?? String(Math.random()); // randomUUID is only there on loopback and https
let count = 0; // of this page's writes: the server takes them in this order, however they arrive
let items = []; // of the index: {status, type, edited}
let read = new Map(); // index -> what the server said last
let drafts = new Map(); // index -> {status, texts} that are not on disk yet
let held = new Set(); // indices of drafts that the server does not take as they are; they wait for a change or a reload
let sending = null; // index
let timer = null;
let unreachable = false; // the server, or its disk
let shown = null; // index that was asked for last
let drawn = null; // index whose texts stand in the fields: nobody decides on what is not there yet
let filter = { status: "all", type: "all" };
let side = false;
let decisions = []; // of this page: {index, status} before each
let conflicts = []; // {index, mine, text}: states of this page that another window's have overtaken

const $ = (id) => document.getElementById(id);

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// ---- filters and order

const matches = (index) =>
  (filter.status === "all" || items[index].status === filter.status) && (filter.type === "all" || items[index].type === filter.type);

function following(index, step) {
  for (let i = index + step; i >= 0 && i < items.length; i += step) if (matches(i)) return i;
  return null;
}

const ahead = (index) => following(index, 1) ?? following(-1, 1);

// ---- saving: one write at a time, the newest state of a tuple

function now(index) {
  const { status, texts } = { ...read.get(index), ...drafts.get(index) };
  return { status: status === "fixed" ? "kept" : status, texts: { ...texts } };
}

function put(index, change, pause = 0) {
  const state = { ...now(index), ...change };
  if (state.status === "kept" && Object.values(state.texts).some((text) => !text.trim())) state.status = "open";
  drafts.set(index, state);
  held.delete(index);
  note(index, state);
  clearTimeout(timer);
  timer = setTimeout(send, pause);
  showSaved();
}

// The index as it will be, so that counts and filters do not wait for the disk.
function note(index, { status, texts }) {
  const { original } = read.get(index);
  const edited = Object.keys(NAMES).some((name) => texts[name].trim() !== original[name]);
  items[index] = { ...items[index], status: status === "kept" && edited ? "fixed" : status, edited };
}

function request(index) {
  count += 1;
  const body = JSON.stringify({ ...drafts.get(index), key: read.get(index).key, revision: read.get(index).revision, page, count });
  return { method: "POST", headers: { "Content-Type": "application/json" }, body };
}

async function send() {
  clearTimeout(timer);
  const next = [...drafts].find(([index]) => !held.has(index));
  if (sending !== null || !next) return;
  const [index, sent] = next;
  sending = index;
  let again = 0;
  try {
    const answer = await fetch(`api/tuples/${index}`, request(index));
    if (answer.ok || answer.status === 409) {
      read.set(index, await answer.json());
      if (drafts.get(index) === sent) drafts.delete(index);
      if (answer.status === 409) collide(index, sent);
      else if (!drafts.has(index)) settle(index);
    } else if (REFUSED.includes(answer.status)) refuse(index, sent, await answer.text());
    else if (GONE.includes(answer.status)) {
      if (drafts.get(index) === sent) held.add(index);
      say(`Tuple ${index + 1} is not saved: ${await answer.text()}`);
    } else {
      say(`Not saved: ${await answer.text()}`);
      again = RETRY;
    }
  } catch {
    again = RETRY; // the server is not there; what is here waits
  }
  sending = null;
  unreachable = again > 0;
  showSaved();
  refresh();
  if (drafts.size > held.size) timer = setTimeout(send, again);
}

function refuse(index, sent, reason) {
  say(`Tuple ${index + 1} was not taken: ${reason}`);
  if (drafts.get(index) !== sent) return; // a newer state is on its way
  // What was typed stays, as a draft of an open tuple; only the decision was refused.
  if (sent.status === "kept") put(index, { status: "open" });
  else held.add(index);
  // Not away from a text that is being typed in: its next letters would be keys that decide on the other tuple.
  if (shown !== index && document.activeElement?.tagName !== "TEXTAREA") show(index);
}

function settle(index) {
  const { status, edit_type, edited } = read.get(index);
  items[index] = { status, type: edit_type, edited };
}

function collide(index, sent) {
  const mine = drafts.get(index) ?? sent; // typed on while the answer was on its way
  drafts.delete(index);
  held.delete(index);
  settle(index);
  const theirs = read.get(index);
  const differing = Object.keys(NAMES).filter((name) => mine.texts[name].trim() !== theirs.texts[name]);
  // Ours after all, written just before a server was killed that could not say so.
  if (!differing.length && mine.status === now(index).status) return;
  const texts = differing.map((name) => `\n${NAMES[name]}: ${mine.texts[name]}`).join("");
  const text = `Tuple ${index + 1} was changed in another window meanwhile; its newer state is shown. Yours (${mine.status}) is not saved:${texts}`;
  conflicts.push({ index, mine, text });
  showConflict();
  if (shown === index) show(index);
}

// In a box that no notice writes into: what was typed is nowhere else, so each stays until it is answered.
function showConflict() {
  $("conflict").hidden = conflicts.length === 0;
  if (!conflicts.length) return;
  const others = conflicts.length - 1;
  $("conflict").firstElementChild.textContent = conflicts[0].text + (others ? `\n(${others} more after this one)` : "");
}

function answerConflict(useMine) {
  const { index, mine } = conflicts.shift();
  showConflict();
  if (!useMine) return;
  put(index, mine);
  show(index);
}

// Each unsaved tuple on its way out: these requests outlive the page.
function flush() {
  for (const index of drafts.keys()) fetch(`api/tuples/${index}`, { ...request(index), keepalive: true }).catch(() => {});
}

function showSaved() {
  const lines = drafts.size;
  const trying = unreachable ? `Not saved (${lines}): trying again …` : "Saving …";
  const numbers = [...held].map((index) => index + 1).join(", ");
  $("saved").textContent = lines === 0 ? "Saved" : lines > held.size ? trying : `Not saved (${lines}): tuple ${numbers}`;
  $("saved").classList.toggle("unsaved", lines > 0 && (unreachable || held.size > 0));
}

function say(text) {
  $("notice").firstElementChild.textContent = text;
  $("notice").hidden = !text;
}

// ---- decisions

function decide(status) {
  if (shown === null || shown !== drawn) return;
  const index = shown;
  const state = now(index);
  const empty = Object.keys(NAMES).filter((name) => !state.texts[name].trim());
  if (status === "kept" && empty.length) return say(`Empty: ${empty.map((name) => NAMES[name]).join(", ")}. Fill it in, or discard.`);
  const problem = Object.values(read.get(index).media).find((file) => file.problem);
  if (status === "kept" && problem) return say(`Not kept: ${problem.problem}`);
  say("");
  decisions.push({ index, status: state.status });
  put(index, { status });
  const target = status === "open" ? index : ahead(index);
  show(target === null ? index : target);
}

function undo() {
  const last = decisions.pop();
  if (!last) return;
  put(last.index, { status: last.status });
  show(last.index);
}

function reset() {
  if (shown === null || shown !== drawn) return;
  put(shown, { texts: { ...read.get(shown).original } });
  show(shown);
}

function fix() {
  if (shown !== drawn) return;
  const field = $("fields").querySelector(".instruction textarea");
  field?.focus();
  field?.setSelectionRange(field.value.length, field.value.length);
}

// ---- drawing

async function fetchTuple(index) {
  if (!read.has(index)) {
    const answer = await fetch(`api/tuples/${index}`);
    if (!answer.ok) throw new Error(await answer.text());
    read.set(index, await answer.json());
  }
  return read.get(index);
}

let turn = 0;
async function show(index) {
  const mine = ++turn;
  shown = index;
  writeAddress();
  if (index !== null) {
    try {
      await fetchTuple(index);
    } catch (error) {
      if (mine !== turn) return;
      say(`Tuple ${index + 1} cannot be read: the server does not answer. Trying again …`);
      setTimeout(() => mine === turn && show(index), RETRY);
      return;
    }
  }
  if (mine !== turn) return; // another one was asked for meanwhile
  if ($("notice").textContent.includes("cannot be read")) say("");
  drawCurrent();
  refresh();
  await drawNeighbours(mine);
  const next = shown === null ? null : ahead(shown);
  if (mine === turn && next !== null) fetchTuple(next).catch(() => {}); // so that it is here at once
}

function drawCurrent() {
  // Drawn anew under who types in it: the next letters would be keys that decide.
  const typed = drawn === shown ? $("fields").querySelector("textarea:focus")?.name : undefined;
  $("current").hidden = shown === null;
  $("nothing").hidden = shown !== null;
  drawn = shown;
  if (shown === null) return;
  const tuple = read.get(shown);
  $("media").replaceChildren(...Object.entries(tuple.media).map(([role, file]) => figure(shown, role, file, true)));
  $("fields").replaceChildren(...Object.keys(NAMES).map(field));
  if (typed) $("fields").querySelector(`textarea[name="${typed}"]`).focus();
}

function figure(index, role, file, playing) {
  const box = make("figure");
  const problem = (text) => make("p", "problem", text);
  if (file.problem) box.append(problem(file.problem));
  else {
    const media = make(file.kind === "clip" ? "video" : "img");
    if (file.kind === "clip") Object.assign(media, { controls: playing, loop: true, muted: true, autoplay: true, playsInline: true });
    else media.alt = role;
    media.addEventListener("error", () => media.replaceWith(problem(`This browser cannot show ${file.name}.`)));
    media.src = `media/${index}/${role}`;
    box.append(media);
  }
  box.append(make("figcaption", "", Object.keys(read.get(index).media).length > 1 ? `${role}: ${file.name}` : file.name));
  return box;
}

function field(name) {
  const label = make("label", `field ${name}`);
  label.append(make("span", "", NAMES[name]));
  const area = make("textarea");
  area.name = name;
  area.rows = 2;
  area.spellcheck = true;
  area.value = now(shown).texts[name];
  const index = shown;
  area.addEventListener("input", () => {
    put(index, { texts: { ...now(index).texts, [name]: area.value } }, PAUSE);
    refresh();
  });
  label.append(area, make("p", "was"));
  return label;
}

function refresh() {
  const counts = Object.fromEntries(["all", ...STATUSES].map((name) => [name, 0]));
  const types = new Map();
  for (const { status, type } of items) {
    types.set(type, (types.get(type) ?? 0) + 1);
    if (filter.type !== "all" && type !== filter.type) continue;
    counts.all += 1;
    counts[status] += 1;
  }
  for (const button of $("statuses").children) {
    button.lastChild.textContent = counts[button.dataset.status];
    button.setAttribute("aria-pressed", String(filter.status === button.dataset.status));
  }
  drawTypes(types);
  $("progress").value = counts.all ? (counts.all - counts.open) / counts.all : 0;
  $("undo").disabled = decisions.length === 0;
  for (const name of ["keep", "fix", "discard", "reset", "reopen", "back", "forward"]) $(name).disabled = shown === null;
  if (shown === null) return void ($("position").textContent = "0 of 0");
  let place = 0;
  let all = 0;
  for (let i = 0; i < items.length; i += 1) {
    if (!matches(i)) continue;
    all += 1;
    if (i <= shown) place += 1;
  }
  $("position").textContent = matches(shown) ? `${place} of ${all}` : `– of ${all}`;
  if (shown === drawn) drawFacts();
}

function drawFacts() {
  const { status, type, edited } = items[shown];
  const { line, id, original } = read.get(shown);
  const facts = [make("span", `badge ${status}`, status === "open" && edited ? "open, edited" : status)];
  if (type) facts.push(make("span", "tag", type.replaceAll("_", " ")));
  facts.push(make("span", "", `line ${line}`));
  if (id) facts.push(make("span", "", id));
  $("facts").replaceChildren(...facts);
  for (const label of $("fields").children) {
    const area = label.querySelector("textarea");
    const text = area.value.trim();
    label.classList.toggle("edited", text !== original[area.name]);
    label.classList.toggle("empty", !text);
    label.lastChild.textContent = text === original[area.name] ? "" : `was: ${original[area.name] || "(empty)"}`;
  }
  $("keep").firstElementChild.textContent = edited ? "Keep, fixed" : "Keep";
}

function drawTypes(types) {
  const select = $("type");
  const wanted = [["all", `all (${items.length})`], ...[...types].sort().map(([type, n]) => [type, `${type.replaceAll("_", " ") || "(none)"} (${n})`])];
  if (select.length !== wanted.length) select.replaceChildren(...wanted.map(([value, text]) => new Option(text, value)));
  select.value = filter.type;
}

async function drawNeighbours(mine) {
  $("main").classList.toggle("side", side);
  $("side").setAttribute("aria-pressed", String(side));
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    const index = side && shown !== null ? following(shown, step) : null;
    $(id).hidden = !side;
    $(id).dataset.index = index ?? "";
    if (index === null) {
      $(id).replaceChildren(make("p", "head", step < 0 ? "Nothing before" : "Nothing after"));
      continue;
    }
    await fetchTuple(index).catch(() => null);
    if (mine !== turn || !read.has(index)) return;
    drawNeighbour($(id), index, step);
  }
}

function drawNeighbour(box, index, step) {
  const { media, line } = read.get(index);
  const { texts } = now(index);
  const head = make("div", "head");
  const { status, type } = items[index];
  head.append(make("span", "", step < 0 ? "Previous" : "Next"), make("span", `badge ${status}`, status), make("span", "", `line ${line}`));
  if (type) head.append(make("span", "tag", type.replaceAll("_", " ")));
  const list = make("dl");
  for (const [name, title] of Object.entries(NAMES)) list.append(make("dt", "", title), make("dd", "", texts[name]));
  box.replaceChildren(head, ...Object.entries(media).map(([role, file]) => figure(index, role, file, false)), list);
}

// ---- the address holds the place, so that a reload comes back to it

function writeAddress() {
  const parts = new URLSearchParams({ status: filter.status, type: filter.type });
  if (shown !== null) parts.set("tuple", shown + 1);
  if (side) parts.set("side", "1");
  history.replaceState(null, "", `#${parts}`);
}

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const status = parts.get("status") ?? "all";
  const type = parts.get("type") ?? "all";
  filter.status = STATUSES.includes(status) ? status : "all";
  filter.type = items.some((item) => item.type === type) ? type : "all";
  side = parts.get("side") === "1";
  const index = Number(parts.get("tuple")) - 1;
  if (Number.isInteger(index) && index >= 0 && index < items.length) return index;
  const firstOpen = items.findIndex((item, i) => item.status === "open" && matches(i));
  return firstOpen >= 0 ? firstOpen : ahead(-1);
}

function changeFilter(change) {
  Object.assign(filter, change);
  show(shown !== null && matches(shown) ? shown : ahead(shown ?? -1));
}

function go(step) {
  const index = following(shown ?? -1, step);
  if (index !== null) show(index);
}

function toggleSide() {
  side = !side;
  show(shown);
}

// ---- keys and buttons

const KEYS = {
  k: () => decide("kept"),
  d: () => decide("discarded"),
  o: () => decide("open"),
  f: fix,
  u: undo,
  r: reset,
  s: toggleSide,
  ArrowLeft: () => go(-1),
  ArrowRight: () => go(1),
  " ": () => {
    const clip = $("media").querySelector("video");
    if (clip) clip.paused ? clip.play() : clip.pause();
  },
};

function onKey(event) {
  if (event.isComposing) return;
  const typing = event.target.matches("textarea, select, input");
  if (typing && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    event.target.blur();
    return decide("kept");
  }
  if (typing && event.key === "Escape") return event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat && !event.key.startsWith("Arrow")) return;
  if (event.key === " " && event.target.matches("button, video")) return; // theirs
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  if (event.target.matches("video")) event.target.blur(); // arrows would move the clip too
  act();
}

function wire() {
  const actions = { keep: "k", discard: "d", reopen: "o", fix: "f", undo: "u", reset: "r", side: "s", back: "ArrowLeft", forward: "ArrowRight" };
  for (const [id, key] of Object.entries(actions))
    $(id).addEventListener("click", (event) => {
      event.currentTarget.blur(); // else Space would press it again
      KEYS[key]();
    });
  for (const status of ["all", ...STATUSES]) {
    const button = make("button", "", status[0].toUpperCase() + status.slice(1));
    button.type = "button";
    button.dataset.status = status;
    button.append(make("b"));
    button.addEventListener("click", () => {
      button.blur();
      changeFilter({ status });
    });
    $("statuses").append(button);
  }
  $("type").addEventListener("change", (event) => {
    event.target.blur();
    changeFilter({ type: event.target.value });
  });
  for (const id of ["previous", "next"]) $(id).addEventListener("click", () => $(id).dataset.index && show(Number($(id).dataset.index)));
  $("hide-notice").addEventListener("click", () => say(""));
  for (const [id, mine] of [["use-mine", true], ["use-theirs", false]])
    $(id).addEventListener("click", (event) => {
      event.currentTarget.blur(); // else Space would answer the next one unread
      answerConflict(mine);
    });
  document.addEventListener("keydown", onKey);
  window.addEventListener("pagehide", flush);
  document.addEventListener("visibilitychange", () => document.visibilityState === "hidden" && flush());
  window.addEventListener("beforeunload", (event) => {
    if (conflicts.length || held.size || drafts.size && unreachable) event.preventDefault(); // only then could closing lose something
  });
}

async function start() {
  const answer = await fetch("api/index");
  const index = await answer.json();
  items = index.items.map(([status, type, edited]) => ({ status, type, edited }));
  $("name").textContent = index.name;
  $("name").title = `decisions: ${index.journal}`;
  document.title = `Review ${index.name}`;
  wire();
  showSaved();
  await show(readAddress());
}

start().catch(() => say("The server does not answer. Reload this page when it is there again."));
