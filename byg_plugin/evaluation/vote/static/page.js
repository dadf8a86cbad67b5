"use strict";

const at = id => document.getElementById(id);
const roles = ["reference", "left", "right"];
const names = {reference: "The reference", left: "A", right: "B"};
let rater = "", token = "", pairs = [], shown = 0, busy = false;
let turn = 0; // counts what was gone to: pictures of an earlier pair may come late
let slow = null; // timer
let open = false; // whether all three pictures are there: nobody votes on what was not shown

function say(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

const named = address => `${address}?${new URLSearchParams({rater})}`;

async function ask(address, body) {
  const options = body ? {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)} : {};
  const answer = await fetch(address, options);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

function nextOpen(from) {
  const order = [...pairs.keys()].map(step => (from + step) % pairs.length);
  return order.find(index => !pairs[index].voted);
}

async function start(event) {
  event.preventDefault();
  try {
    rater = at("rater").value.trim();
    ({token, pairs} = await ask(named("/api/pairs")));
  } catch (error) {
    return say(error.message);
  }
  at("start").hidden = true;
  go(nextOpen(0));
}

function setOpen(value) {
  open = value;
  for (const side of ["left", "right"]) at(`vote-${side}`).disabled = !value;
}

function go(index) {
  const mine = ++turn;
  setOpen(false);
  say("");
  clearTimeout(slow);
  at("vote").hidden = index === undefined;
  at("end").hidden = index !== undefined;
  for (const role of roles) at(role).replaceChildren();
  if (index === undefined) return;
  shown = index;
  const pair = pairs[index];
  at("progress").textContent = `${index + 1} of ${pairs.length}, ${pairs.filter(one => one.voted).length} voted on`;
  at("instruction").textContent = pair.instruction;
  document.querySelector(".kind").textContent = pair.kind === "clip" ? "video" : "image";
  at("play").hidden = pair.kind !== "clip";
  for (const side of ["left", "right"]) at(`vote-${side}`).setAttribute("aria-pressed", pair.voted === side);
  slow = setTimeout(() => say(pair.kind === "clip" ? "Still loading the clips: Play may help." : "Still loading the pictures."), 5000);
  Promise.all(roles.map(role => draw(pair.kind, role))).then(() => {
    if (mine !== turn) return;
    clearTimeout(slow);
    say("");
    setOpen(true);
    play();
  }, error => mine === turn && say(error.message));
}

// Done when the picture, or enough of the clip to play it, is there.
function draw(kind, role) {
  const clip = kind === "clip";
  const picture = document.createElement(clip ? "video" : "img");
  if (clip) Object.assign(picture, {muted: true, preload: "auto", playsInline: true});
  else picture.alt = role;
  const drawn = new Promise((resolve, reject) => {
    picture.addEventListener(clip ? "canplaythrough" : "load", resolve, {once: true});
    picture.addEventListener("error", () => reject(new Error(problem(role, picture))), {once: true});
  });
  picture.src = named(`/media/${shown}/${role}`);
  if (clip) picture.load(); // preload is a hint that some browsers do not take
  at(role).append(picture);
  return drawn;
}

function problem(role, picture) {
  const what = picture.error ? `This browser does not play these clips: ${picture.error.message}` : `${names[role]} cannot be shown`;
  return `${what}. This pair cannot be voted on now: reload, or skip it.`;
}

const films = () => [...document.querySelectorAll("#pictures video")];

// The results follow the reference: one frame's drift is corrected, and the first to end starts all again.
function play() {
  const clips = films();
  for (const clip of clips) {
    clip.onended = () => { for (const one of films()) { one.currentTime = 0; one.play(); } };
    clip.play();
  }
}

function keepInStep() {
  const [reference, ...results] = films();
  if (reference && !reference.paused && !reference.seeking) {
    for (const clip of results) if (!clip.seeking && Math.abs(clip.currentTime - reference.currentTime) > 0.08) clip.currentTime = reference.currentTime;
  }
  requestAnimationFrame(keepInStep);
}

function toggle() {
  const clips = films();
  if (clips.some(clip => !clip.paused)) for (const clip of clips) clip.pause();
  else for (const clip of clips) clip.play();
}

async function vote(side) {
  if (busy || !open) return;
  busy = true;
  const mine = turn;
  try {
    const pair = pairs[shown];
    await ask(named(`/api/pairs/${shown}`), {token, side});
    pair.voted = side;
    if (mine === turn) go(nextOpen(shown)); // else the rater has gone elsewhere meanwhile
  } catch (error) {
    say(`Not saved: ${error.message}`);
  } finally {
    busy = false;
  }
}

const buttons = {
  "vote-left": () => vote("left"),
  "vote-right": () => vote("right"),
  back: () => go((shown + pairs.length - 1) % pairs.length),
  skip: () => go(nextOpen(shown + 1) ?? (shown + 1) % pairs.length),
  again: () => go(0),
  pause: () => { go(undefined); at("end").hidden = true; at("start").hidden = false; },
  play: toggle,
};
at("start").addEventListener("submit", start);
for (const [id, act] of Object.entries(buttons))
  at(id).addEventListener("click", event => {
    event.currentTarget.blur(); // else Space and Enter would press it again, on the next pair
    act();
  });
document.addEventListener("keydown", event => {
  if (at("vote").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = {ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), " ": toggle};
  if (!keys[event.key] || (event.key === " " && at("play").hidden)) return;
  event.preventDefault();
  keys[event.key]();
});
requestAnimationFrame(keepInStep);
