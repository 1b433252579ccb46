// A walk through a world: pictures come by one stream, and what is held down goes back by short messages (play.py).
"use strict";

const WIDE = 480; // pixels that the canvas has at least, so that recordings are large enough to look at
// Where the buttons of keys stand on the pad, as [row, column].
const PLACES = {q: [1, 1], ArrowUp: [1, 2], e: [1, 3], ArrowLeft: [2, 1], ArrowDown: [2, 2], ArrowRight: [2, 3]};
const SIGNS = {ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→"};

const at = (id) => document.getElementById(id);
const canvas = at("world"), pen = canvas.getContext("2d");
const held = new Map(); // name of an action -> {number: of the message that said it first, released}
const keys = {}; // key -> name of its action
const buttons = {}; // name of an action -> its button
const wish = {number: 0, actions: [], seen: 0, caption: null, resets: 0};
let token = "", telling = false, again = false, heard = 0;
let asked = null; // the newest change that no picture has shown yet: {number, time}
const drawn = []; // times of the last pictures
const delays = []; // the last latencies, in ms

// ---- What the visitor wants

async function tell() {
  // One message is under way at a time; the next one has the newest state.
  if (telling) { again = true; return; }
  if (!token) return;
  telling = true;
  do {
    again = false;
    try {
      const answer = await fetch(`walk/${token}`, {method: "POST", body: JSON.stringify(wish)});
      if (!answer.ok) say(await answer.text());
    } catch (error) { /* the stream ends too, and says so */ }
  } while (again);
  telling = false;
}

function change() {
  wish.number += 1;
  wish.actions = [...held.keys()];
  for (const name in buttons) buttons[name].classList.toggle("held", held.has(name));
  tell();
}

function press(name) {
  if (!name || (held.has(name) && !held.get(name).released)) return;
  held.delete(name); // so that it becomes the newest
  held.set(name, {number: wish.number + 1, released: false});
  if (!asked) asked = {number: wish.number + 1, time: performance.now()};
  change();
}

function release(name) {
  const state = held.get(name);
  if (!state) return;
  if (heard < state.number) { state.released = true; return; } // a short press counts for one picture
  held.delete(name);
  change();
}

function releaseAll() { for (const name of [...held.keys()]) release(name); }

const keyOf = (event) => keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
const writes = (event) => event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey;
addEventListener("keydown", (event) => {
  if (writes(event) || !keyOf(event)) return;
  event.preventDefault();
  if (!event.repeat) press(keyOf(event));
});
addEventListener("keyup", (event) => release(keyOf(event)));
addEventListener("blur", releaseAll);
document.addEventListener("visibilitychange", () => { if (!document.hidden) tell(); else releaseAll(); });

at("reset").onclick = () => { wish.resets += 1; change(); canvas.focus(); };
at("caption").onchange = () => { wish.caption = at("caption").value; change(); };
at("caption").onkeydown = (event) => { if (event.key === "Enter" || event.key === "Escape") canvas.focus(); };

// ---- The page

function say(text) { at("status").textContent = text; }

function show(world) {
  const [height, width] = world.size, scale = Math.ceil(WIDE / width);
  [canvas.width, canvas.height] = [width * scale, height * scale];
  pen.imageSmoothingEnabled = false;
  at("caption").value = world.caption;
  const shown = [];
  for (const action of world.actions) {
    const button = document.createElement("button"), place = PLACES[action.keys.find((key) => PLACES[key])];
    button.type = "button";
    button.dataset.action = button.textContent = action.name;
    for (const key of action.keys) keys[key] = action.name;
    if (action.keys.length) {
      const label = document.createElement("kbd"), key = action.keys[0];
      label.textContent = ` ${SIGNS[key] || key.toUpperCase()}`;
      button.append(label);
      shown.push(`${action.keys.map((k) => SIGNS[k] || k.toUpperCase()).join(" or ")}: ${action.name}`);
    }
    if (place) [button.style.gridRow, button.style.gridColumn] = place;
    button.onpointerdown = (event) => {
      event.preventDefault();
      if (event.isTrusted) button.setPointerCapture(event.pointerId);
      press(action.name);
    };
    button.onpointerup = button.onpointercancel = button.onlostpointercapture = () => release(action.name);
    button.oncontextmenu = (event) => event.preventDefault();
    button.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") press(action.name); };
    button.onkeyup = () => release(action.name);
    button.onblur = () => release(action.name);
    buttons[action.name] = button;
    at(place ? "pad" : "others").append(button);
  }
  at("help").textContent = shown.join(", ");
  say("");
  canvas.focus();
}

async function draw(note, bytes) {
  const picture = await createImageBitmap(new Blob([bytes], {type: "image/jpeg"}));
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const now = performance.now();
  heard = note.heard;
  if (asked && heard >= asked.number) {
    delays.push(now - asked.time);
    if (delays.length > 5) delays.shift();
    at("latency").textContent = Math.round([...delays].sort((a, b) => a - b)[delays.length >> 1]);
    asked = null;
  }
  drawn.push(now);
  while (now - drawn[0] > 2000) drawn.shift();
  if (drawn.length > 1) at("fps").textContent = (1000 * (drawn.length - 1) / (now - drawn[0])).toFixed(1);
  at("step").textContent = Math.round(note.ms);
  canvas.dataset.frame = wish.seen = note.frame;
  const done = [...held].filter(([, state]) => state.released && heard >= state.number);
  for (const [name] of done) held.delete(name);
  if (document.hidden) return; // the world waits for who does not look
  if (done.length) change(); else tell();
}

// ---- Recording

let recorder = null;
at("record").onclick = () => {
  canvas.focus();
  if (recorder) { recorder.stop(); return; }
  const type = ["video/mp4", "video/webm"].find((name) => MediaRecorder.isTypeSupported(name)), pieces = [];
  recorder = new MediaRecorder(canvas.captureStream(), {mimeType: type, videoBitsPerSecond: 8e6});
  recorder.ondataavailable = (event) => pieces.push(event.data);
  recorder.onstop = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(pieces, {type}));
    link.download = `walk.${type.split("/")[1]}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    recorder = null;
    at("record").textContent = "Record";
    at("record").classList.remove("on");
  };
  recorder.start();
  at("record").textContent = "Stop and save";
  at("record").classList.add("on");
};

// ---- The stream

async function* parts(stream) {
  let bytes = new Uint8Array(0);
  for (const reader = stream.getReader(); ;) {
    const {value, done} = await reader.read();
    if (done) return;
    const joined = new Uint8Array(bytes.length + value.length);
    joined.set(bytes);
    joined.set(value, bytes.length);
    bytes = joined;
    while (bytes.length >= 8) {
      const view = new DataView(bytes.buffer, bytes.byteOffset), note = 8 + view.getUint32(0);
      const end = note + view.getUint32(4);
      if (bytes.length < end) break;
      yield [JSON.parse(new TextDecoder().decode(bytes.subarray(8, note))), bytes.slice(note, end)];
      bytes = bytes.slice(end);
    }
  }
}

async function walk() {
  let end = "The connection has ended: load the page again.";
  try {
    const answer = await fetch("walk", {method: "POST"});
    if (!answer.ok) return say(await answer.text());
    for await (const [note, picture] of parts(answer.body)) {
      if (note.token) { token = note.token; show(note); }
      else if (note.end) end = `${note.end}: load the page again.`;
      else await draw(note, picture);
    }
  } catch (error) { /* the connection broke */ }
  token = "";
  say(end);
}

walk();
