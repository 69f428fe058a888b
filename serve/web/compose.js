// The storyboard: its parts, the settings, and the request that they make.

import { $, announce, h, mark, numberOf, say, showError, unmark } from "./dom.js";

const KEPT = "arlon.storyboard";
const form = $("form");
const list = $("parts");
let count = 0; // for ids

const parts = () => [...list.children];
const promptOf = (part) => part.querySelector("textarea");
const secondsOf = (part) => part.querySelector("input");
const cutOf = (part) => part.querySelector("[type=checkbox]");

/** Renumber behind it. */
function addPart({ prompt = "", seconds = "", cut = false } = {}) {
  const id = `part-${++count}`;
  const text = h("textarea", { id, rows: 2, value: prompt, placeholder: "What is seen" });
  const length = h("input", { id: `${id}-seconds`, type: "number", min: 0, step: "any", value: seconds });
  length.inputMode = "decimal";
  length.placeholder = "auto";
  const shot = h("input", { id: `${id}-cut`, type: "checkbox", checked: cut });
  const tool = (sign, name, action) => {
    const button = h("button", { type: "button", textContent: sign, onclick: action });
    button.dataset.tool = name;
    return button;
  };
  const part = h("li", { className: "part" });
  part.append(
    h("label", { htmlFor: id }),
    text,
    h(
      "div",
      { className: "tools" },
      h("label", { htmlFor: length.id }, "Seconds ", length),
      h("label", { htmlFor: shot.id, title: "Begins a new shot, instead of going on from what is seen" }, shot, " Cut"),
      tool("↑", "up", () => move(part, -1)),
      tool("↓", "down", () => move(part, 1)),
      tool("✕", "remove", () => remove(part)),
    ),
  );
  part.addEventListener("keydown", (event) => {
    if (!event.altKey || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
    event.preventDefault();
    move(part, event.key === "ArrowUp" ? -1 : 1);
  });
  list.append(part);
  return part;
}

function move(part, by) {
  const all = parts();
  const to = all.indexOf(part) + by;
  if (to < 0 || to >= all.length) return;
  const focused = document.activeElement;
  list.insertBefore(part, by < 0 ? all[to] : all[to].nextSibling);
  renumber();
  (focused.disabled ? promptOf(part) : focused).focus(); // moving takes the focus away
  announce(`Now part ${to + 1} of ${all.length}`);
}

function remove(part) {
  const next = part.nextElementSibling ?? part.previousElementSibling;
  part.remove();
  renumber();
  promptOf(next).focus();
  announce(`Removed; ${parts().length} left`);
}

function renumber() {
  const all = parts();
  all.forEach((part, index) => {
    part.querySelector("label").textContent = all.length > 1 ? `Part ${index + 1}` : "Prompt";
    cutOf(part).parentElement.hidden = index === 0; // nothing to cut from
    for (const [name, words, useless] of [
      ["up", "Move up part", index === 0],
      ["down", "Move down part", index === all.length - 1],
      ["remove", "Remove part", all.length === 1],
    ]) {
      const button = part.querySelector(`[data-tool=${name}]`);
      button.setAttribute("aria-label", `${words} ${index + 1}`);
      button.title = words;
      button.disabled = useless;
    }
  });
  changed();
}

/** Parts that say how long they last say it for the whole video: then it has no length of its own. */
function changed() {
  const lengths = parts().map((part) => numberOf(secondsOf(part)));
  const timed = lengths.some((length) => length !== undefined);
  $("length").disabled = $("unit").disabled = timed;
  const sum = lengths.reduce((total, length) => total + (length || 0), 0);
  $("length").placeholder = timed ? `${+sum.toFixed(2)}` : "auto";
  const kept = parts().map((part) => ({
    prompt: promptOf(part).value,
    seconds: secondsOf(part).value,
    cut: cutOf(part).checked,
  }));
  sessionStorage.setItem(KEPT, JSON.stringify(kept));
}

/** Reads a number into `body[name]`; false (and a mark) where there is something else. */
function number(body, name, input) {
  const value = numberOf(input);
  if (Number.isNaN(value)) mark(input, "not a number");
  else if (value !== undefined) body[name] = value;
  return !Number.isNaN(value);
}

/** The body of the request, and the name of its picture; null where a field cannot be read, which is marked. */
async function read() {
  const texts = parts().map((part, index) => {
    const found = { prompt: promptOf(part).value };
    if (index > 0 && cutOf(part).checked) found.cut = true;
    return number(found, "seconds", secondsOf(part)) && found;
  });
  if (texts.includes(false)) return null;
  const body = texts.length > 1 || "seconds" in texts[0] ? { segments: texts } : { prompt: texts[0].prompt };
  if (!$("length").disabled && !number(body, $("unit").value, $("length"))) return null;
  for (const input of form.querySelectorAll("input[type=number][data-param]"))
    if (!number(body, input.dataset.param, input)) return null;
  if (body.transition_latents === 0) delete body.transition_latents;
  if ($("negative").value.trim()) body.negative_prompt = $("negative").value;
  const [image] = $("image").files;
  if (image) body.input_reference = { image_url: await dataUrl(image) };
  return { body, image: image?.name };
}

/** How a draft is rendered; a draft itself takes none of these. */
const RENDERING = ["num_inference_steps", "guidance_scale", "token_guidance_scale"];

/** What the form says now of how a draft is rendered. */
export function renderSettings() {
  const body = {};
  for (const name of RENDERING) number(body, name, form.querySelector(`[data-param=${name}]`));
  return body;
}

function dataUrl(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

function fieldOf(param) {
  const all = parts();
  const [, index, name] = /^segments\.(\d+)\.?(\w*)/.exec(param) ?? [];
  if (index !== undefined && all[index]) return name === "seconds" ? secondsOf(all[index]) : promptOf(all[index]);
  if (param === "prompt") return promptOf(all[0]);
  if (param === "num_segments" || param === "seconds") return $("length").disabled ? secondsOf(all[0]) : $("length");
  return null;
}

/** `send(kind, body, image)` posts what was written: kind is "videos" or "drafts". What it raises is shown here. */
export function startComposer(send) {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  for (const part of kept?.length ? kept : [{}]) addPart(part);
  renumber();
  $("add").onclick = () => {
    const part = addPart();
    renumber();
    promptOf(part).focus();
  };
  form.addEventListener("input", changed);
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit($("make-video"));
    // Enter in a number field would press the first button, and draft
    else if (event.key === "Enter" && event.target.tagName === "INPUT") form.requestSubmit($("make-video"));
    else return;
    event.preventDefault();
  });
  form.onsubmit = async (event) => {
    event.preventDefault();
    const kind = event.submitter?.value ?? "videos";
    unmark(form);
    for (const line of [$("form-error"), $("parts-error")]) say(line, "");
    for (const button of [$("make-draft"), $("make-video")]) button.disabled = true;
    try {
      const found = await read();
      if (found && kind === "drafts") for (const name of RENDERING) delete found.body[name];
      if (found) await send(kind, found.body, found.image);
      else form.querySelector("[aria-invalid]").focus();
    } catch (error) {
      if (error.param === "segments") say($("parts-error"), error.message);
      else showError(form, error, $("form-error"), fieldOf);
    } finally {
      for (const button of [$("make-draft"), $("make-video")]) button.disabled = false;
    }
  };
}
