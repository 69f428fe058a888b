// What is open: one video or draft, its segments, and what can be done with it.

import { call, kindOf, mediaUrl, passIsOver, pathOf, watch } from "./api.js";
import { $, announce, brief, clock, h, numberOf, say, show, showError, unmark } from "./dom.js";
import { Player } from "./player.js";

const STATES = ["queued", "planned", "rendering", "rendered", "completed"];
const WORDS = { queued: "waiting", planned: "planned", rendering: "rendering", rendered: "rendered", completed: "ready" };

const player = new Player($("video"));
let open = null; // {id, object, stop, seen, queue, step, selected, since, streamed}
let drawing = null; // the frame that will be drawn
let tell = () => {};

export const opened = () => open?.id ?? null;
export const openedObject = () => open?.object ?? null;
const active = (object) => ["queued", "in_progress"].includes(object.status);
const isDraft = () => kindOf(open.id) === "drafts";

/** `changed(object)` is called whenever the open one has another status. */
export function startStage(changed) {
  tell = changed;
  setInterval(drawElapsed, 500);
  $("reroll-close").onclick = () => select(null);
  $("reroll").onsubmit = reroll;
  $("reroll").addEventListener("keydown", (event) => {
    if (event.key === "Escape") select(null);
  });
}

export function closeStage() {
  open?.stop.abort();
  open = null;
  player.clear();
  show($("stage-body"), false);
  show($("stage-empty"), true);
  $("stage-title").textContent = "Nothing is open";
}

/**
 * Opens a video or draft; `object`, where it is known already, saves a request, and of the events only those behind
 * `seen.id` are told. Raises ApiError.
 */
export async function openStage(id, object = null, seen = {}) {
  object ??= await call("GET", pathOf(id));
  open?.stop.abort();
  open = { id, object, stop: new AbortController(), seen, queue: null, step: null, selected: null, since: null };
  player.clear();
  select(null);
  say($("stage-error"), "");
  show($("stage-empty"), false);
  show($("stage-body"), true);
  const [width, height] = object.size.split("x");
  $("video").style.aspectRatio = `${width} / ${height}`;
  draw();
  follow(open);
}

/** Shows what there is, and goes on with it until it is finished. */
async function follow(what) {
  if (!active(what.object)) return showFile(what);
  stream(what);
  const told = (type, data) => what === open && heard(type, data);
  try {
    await watch(what.id, told, { signal: what.stop.signal, seen: what.seen });
  } catch (error) {
    if (what === open && error.status !== 404) say($("stage-error"), error.message);
  }
  if (what !== open || what.stop.signal.aborted) return;
  await refresh(what);
  // the player has all of it where the stream came to its end; else the file takes its place
  if (what === open && what.object.status === "completed" && !((await what.streamed) && !isDraft())) showFile(what);
}

function stream(what) {
  what.streamed = player.stream(what.id, Number(what.object.seconds));
}

async function refresh(what) {
  try {
    const object = await call("GET", pathOf(what.id));
    if (what !== open) return;
    const before = what.object.status;
    what.object = object;
    draw();
    if (before !== object.status) changedStatus();
  } catch (error) {
    if (what === open && error.status === 404) gone();
  }
}

function changedStatus() {
  announce(statusText());
  tell(open.object);
}

async function showFile(what) {
  if (what.object.status !== "completed") return;
  try {
    await player.file(what.id);
  } catch (error) {
    if (what === open) say($("stage-error"), error.message);
  }
}

function gone() {
  open.object.status = "failed";
  open.object.error = { message: "it was deleted" };
  draw();
  tell(open.object);
}

/** One event. Those that repeat what is known already change nothing: a client hears all of them from the first on. */
function heard(type, data) {
  const { object } = open;
  const segment = object.segments[data.index];
  const reach = (status) => {
    if (segment && STATES.indexOf(segment.status) < STATES.indexOf(status)) segment.status = status;
  };
  if (type === "queue") open.queue = data.position;
  else if (type === "in_progress") began();
  else if (type === "segment.planned") reach("planned");
  else if (type === "segment.step") {
    reach("rendering");
    if (open.step?.index !== data.index) reveal(data.index);
    open.step = data;
  } else if (type === "segment.rendered") reach("rendered");
  else if (type === "segment.completed") {
    if (segment?.status !== "completed") announce(`Segment ${data.index + 1} of ${object.segments.length} is ready`);
    reach("completed");
    object.progress = Math.max(object.progress, data.progress ?? 0);
  } else if (type === "restarted") stream(open); // by another bundle: nothing of what is shown is part of it
  else if (type === "segment.reset") {
    if (segment) segment.status = "queued";
    began();
  } else if (type === "deleted") return gone();
  drawSoon();
}

/** Draws once a frame, however many events come: who opens a long video is told hundreds at once. */
function drawSoon() {
  if (drawing !== null) return;
  drawing = requestAnimationFrame(() => {
    drawing = null;
    if (open) draw();
  });
}

/** Brings a segment's chip into sight where there are more than fit; the page itself stays where it is. */
function reveal(index) {
  const chip = $("chips").children[index];
  if (chip && !$("chips").contains(document.activeElement)) $("chips").scrollTop = chip.offsetTop - chip.offsetHeight;
}

function began() {
  if (open.object.status !== "queued") return;
  open.object.status = "in_progress";
  open.since = Date.now();
  changedStatus();
}

function stepShare(index) {
  const { step } = open;
  return step?.index === index ? step.step / step.steps : 0;
}

/** How much of a segment is done, in percent: what the server says too, and its steps. */
function done(segment) {
  if (isDraft()) return { queued: 0, planned: 50 }[segment.status] ?? 100;
  const share = { queued: 0, planned: 10, rendering: 10, rendered: 90, completed: 100 }[segment.status];
  return segment.status === "rendering" ? share + 80 * stepShare(segment.index) : share;
}

function statusText() {
  const { object } = open;
  const count = object.segments.length;
  if (object.status === "queued") {
    if (open.queue === null) return "Waiting";
    return open.queue ? `Waiting: ${open.queue} before it` : "Waiting: next in line";
  }
  if (object.status === "failed") return `Failed: ${object.error?.message ?? "no reason given"}`;
  if (object.status === "completed") {
    const took = object.completed_at - object.started_at;
    return `Ready: ${+Number(object.seconds).toFixed(2)} s of video${took >= 0 ? `, made in ${clock(took)}` : ""}`;
  }
  const at = object.segments.find((segment) => segment.status === "rendering");
  if (at && open.step?.index === at.index)
    return `Segment ${at.index + 1} of ${count}, step ${open.step.step} of ${open.step.steps}`;
  const ready = object.segments.filter((segment) => segment.status === "completed").length;
  return `${isDraft() ? "Planning" : "Rendering"}: ${ready} of ${count} segments ready`;
}

function draw() {
  const { object } = open;
  const words = isDraft() ? "Draft: " : "";
  $("stage-title").textContent = words + brief(object.prompt.replaceAll("\n", " / "));
  $("status-text").textContent = statusText();
  const mean = object.segments.reduce((sum, segment) => sum + done(segment), 0) / object.segments.length;
  $("progress").value = object.status === "completed" ? 100 : Math.min(99, Math.max(mean, isDraft() ? 0 : object.progress));
  drawElapsed();
  drawChips();
  const ready = object.status === "completed";
  show($("render"), isDraft());
  $("render").disabled = !ready;
  for (const name of ["extend", "remix"]) show($(name), !isDraft());
  $("extend").disabled = !ready;
  show($("download"), ready);
  if (ready) offer($("download"), object.id);
  $("delete").textContent = active(object) ? "Stop and delete" : "Delete";
}

function drawElapsed() {
  if (!open) return;
  const { object } = open;
  const since = open.since ?? (object.started_at ?? object.created_at) * 1000;
  $("elapsed").textContent = active(object) ? clock((Date.now() - since) / 1000) : "";
}

function drawChips() {
  const { segments } = open.object;
  const list = $("chips");
  while (list.children.length > segments.length) list.lastChild.remove();
  while (list.children.length < segments.length) {
    const index = list.children.length;
    const chip = h("button", { type: "button", className: "chip", onclick: () => pick(index) });
    chip.append(h("b", { textContent: `${index + 1}` }), h("span"));
    list.append(h("li", {}, chip));
  }
  segments.forEach((segment, index) => {
    const chip = list.children[index].firstChild;
    const { step } = open;
    const stepping = segment.status === "rendering" && step?.index === index;
    const words = stepping ? `step ${step.step}/${step.steps}` : WORDS[segment.status];
    const selected = open.selected === index;
    const now = JSON.stringify([words, segment.status, done(segment), segment.prompt, segment.cut, isDraft(), selected]);
    if (chip.drawn === now) return;
    chip.drawn = now;
    chip.dataset.status = segment.status;
    chip.style.setProperty("--done", done(segment));
    chip.lastChild.textContent = words;
    chip.title = segment.prompt;
    chip.classList.toggle("cut", segment.cut);
    chip.setAttribute("aria-label", `Segment ${index + 1}${segment.cut ? ", a new shot" : ""}, ${words}: ${brief(segment.prompt)}`);
    if (isDraft()) chip.setAttribute("aria-pressed", String(selected));
    else chip.removeAttribute("aria-pressed");
  });
}

/** To where the segment begins in the video; a draft's can be planned anew. */
function pick(index) {
  const { object } = open;
  const frames = object.segments.map((segment) => segment.frames);
  const before = frames.slice(0, index).reduce((sum, count) => sum + count, 0);
  const total = frames.reduce((sum, count) => sum + count, 0);
  const video = $("video");
  const begin = (Number(object.seconds) * before) / total;
  for (let range = 0; range < video.buffered.length; range++)
    if (begin < video.buffered.end(range)) video.currentTime = begin + 0.001;
  if (isDraft()) select(index);
}

function select(index) {
  const before = open?.selected;
  if (open) open.selected = index;
  show($("reroll"), index !== null);
  if (index === null) {
    if (before != null) $("chips").children[before]?.firstChild.focus();
  } else {
    const segment = open.object.segments[index];
    $("reroll-title").textContent = `Plan segment ${index + 1} anew`;
    $("reroll-prompt").value = segment.prompt;
    $("reroll-seed").value = "";
    $("reroll-seed").placeholder = segment.seed === undefined ? "random" : `random (now ${segment.seed})`;
    unmark($("reroll"));
    say($("reroll-error"), "");
    $("reroll-prompt").focus();
  }
  if (open) drawChips();
}

async function reroll(event) {
  event.preventDefault();
  const form = $("reroll");
  const what = open;
  const index = what.selected;
  unmark(form);
  say($("reroll-error"), "");
  const body = { following: $("following").value };
  const seed = numberOf($("reroll-seed"));
  if (seed !== undefined) body.seed = seed;
  if ($("reroll-prompt").value !== what.object.segments[index].prompt) body.prompt = $("reroll-prompt").value;
  try {
    const path = pathOf(what.id, `/segments/${index}/reroll`);
    const object = await call("POST", path, body);
    tell(object, { path, body });
    if (what !== open) return;
    await openStage(what.id, object, { id: what.seen.id }); // what was told before is not told again
    announce(`Segment ${index + 1} is planned anew`);
    $("chips").children[index].firstChild.focus();
  } catch (error) {
    showError(form, error, $("reroll-error"));
  }
}

/** Makes `link` fetch the mp4: as a file of that name, also where a key is needed. */
export function offer(link, id) {
  link.href = "#";
  link.download = `${id}.mp4`;
  link.onclick = async (event) => {
    event.preventDefault();
    try {
      const address = () => mediaUrl(pathOf(id, "/content"));
      let url = await address();
      if (await passIsOver(url)) url = await address();
      h("a", { href: url, download: `${id}.mp4` }).click();
    } catch (error) {
      say($("stage-error"), error.message);
    }
  };
}
