// What was done, as commands that do it again: for the shell, for Python, and for `arlon`.

import { kindOf } from "./api.js";
import { $, h } from "./dom.js";

const KEPT = "arlon.requests";
const KEPT_COUNT = 50;
const server = () => new URL(".", document.baseURI).href.replace(/\/$/, "");
const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

/** Remembers, in this tab, the request that made `id`: {path, body, image: a file's name}. */
export function remember(id, made) {
  const all = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]").filter(([known]) => known !== id);
  const { input_reference: picture, ...body } = made.body; // the picture itself would fill what the tab may keep
  all.push([id, { ...made, body, image: picture && (made.image ?? "image.png") }]);
  sessionStorage.setItem(KEPT, JSON.stringify(all.slice(-KEPT_COUNT)));
}

/** The request that made `object`: as it was, or, where another tab made it, as the object tells it. */
function requestOf(object) {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]").find(([id]) => id === object.id)?.[1];
  if (kept) {
    const seeded = kindOf(object.id) === kept.path || kept.path === "videos";
    const body = seeded && !kept.body.draft ? { ...kept.body, seed: object.seed } : kept.body;
    return { ...kept, body };
  }
  if (object.draft_id) return { path: "videos", body: { draft: object.draft_id }, guessed: true };
  const prompts = object.segments.map((segment) => segment.prompt);
  const same = prompts.every((prompt) => prompt === prompts[0]);
  const text = same ? { prompt: prompts[0], num_segments: prompts.length } : { segments: prompts.map((prompt) => ({ prompt })) };
  const baseline = object.baseline ? { baseline: true } : {};
  return { path: kindOf(object.id), body: { ...text, seed: object.seed, ...baseline }, guessed: true };
}

const json = (body) => JSON.stringify(body);

function curl({ path, body, image, id }) {
  const begin = `curl -s ${quoted(`${server()}/v1/${path}`)} \\\n  -H "Authorization: Bearer $ARLON_API_KEY" \\\n`;
  const form = (value) => (typeof value === "object" ? json(value) : value);
  const fields = Object.entries(body).map(([name, value]) => `  --form-string ${quoted(`${name}=${form(value)}`)} \\\n`);
  const sent = image
    ? `${fields.join("")}  -F ${quoted(`input_reference=@"${image.replace(/["\\]/g, "\\$&")}"`)}`
    : `  -H 'Content-Type: application/json' \\\n  -d ${quoted(json(body))}`;
  const watched = quoted(`${server()}/v1/${kindOf(id)}/${id}/stream`);
  return `${begin}${sent}

# what came of it: ${id}, from the first segment on
curl -s -H "Authorization: Bearer $ARLON_API_KEY" ${watched} -o video.mp4`;
}

/** JSON is Python, but for these three words; text is left alone. */
const python = (value) =>
  json(value).replace(/"(?:[^"\\]|\\.)*"|\b(?:true|false|null)\b/g, (word) => ({ true: "True", false: "False", null: "None" })[word] ?? word);

function openai({ path, body, image }) {
  const begin = `import os

from openai import OpenAI

client = OpenAI(base_url=${json(`${server()}/v1`)}, api_key=os.environ.get("ARLON_API_KEY", "none"))
`;
  const lines = ({ prompt, ...rest }, more = "") => {
    const extra = Object.keys(rest).length ? `    extra_body=${python(rest)},\n` : "";
    return `    prompt=${json(prompt)},\n${more}${extra}`;
  };
  const end = `
client.videos.poll(video.id)
client.videos.download_content(video.id).write_to_file("video.mp4")`;
  if (path === "videos" && body.prompt) {
    const file = image ? `    input_reference=open(${json(image)}, "rb"),\n` : "";
    return `${begin}video = client.videos.create(\n${lines(body, file)})${end}`;
  }
  if (path.endsWith("/remix")) return `${begin}video = client.videos.remix(${json(path.split("/")[1])}, prompt=${json(body.prompt)})${end}`;
  // what is not in OpenAI's API: segments, drafts and what is made of them
  const given = image ? `{**${python(body)}, "input_reference": {"image_url": picture}}` : python(body);
  const picture = image
    ? `import base64\n\npicture = "data:image/png;base64," + base64.b64encode(open(${json(image)}, "rb").read()).decode()\n`
    : "";
  const posted = `client.post(${json(`/${path}`)}, body=${given}, cast_to=Video)`;
  const typed = begin.replace("OpenAI\n", "OpenAI\nfrom openai.types import Video\n");
  if (!path.startsWith("drafts")) return `${typed}${picture}video = ${posted}${end}`;
  return `${typed}${picture}draft = ${posted}\nprint(draft.id, draft.status)`;
}

const FLAGS = {
  seed: "--seed", num_segments: "--segments", seconds: "--seconds", transition_latents: "--transition",
  num_inference_steps: "--steps", guidance_scale: "--guidance-scale", token_guidance_scale: "--token-guidance-scale",
  negative_prompt: "--negative-prompt",
};

function arlon({ path, body, image, id }) {
  const url = `--url ${quoted(server())}`;
  const flags = Object.entries(FLAGS).flatMap(([name, flag]) => (body[name] === undefined ? [] : [`${flag} ${quoted(body[name])}`]));
  const watching = `arlon watch ${id} ${url}`;
  const [kind, other, action, index] = path.split("/");
  if (action === "segments") {
    const prompt = body.prompt === undefined ? "" : ` --prompt ${quoted(body.prompt)}`;
    return `arlon draft reroll ${other} ${index}${prompt} ${[...flags, body.following === "replan" ? "--replan" : "", url].filter(Boolean).join(" ")} --wait`;
  }
  if (action === "remix") return `arlon remix ${other} --prompt ${quoted(body.prompt)} ${url} --wait --output video.mp4`;
  if (other === "extensions") return `arlon extend ${body.video.id} --prompt ${quoted(body.prompt)} ${[...flags, url].join(" ")} --wait --output video.mp4`;
  if (body.draft) return `arlon render ${body.draft} ${[...flags, url].join(" ")} --wait --output video.mp4`;
  const scenes = body.segments ?? [{ prompt: body.prompt }];
  const words = scenes.map((scene) => `--prompt ${quoted(scene.prompt)}${scene.seconds === undefined ? "" : ` --seconds ${scene.seconds}`}`);
  if (image) words.push(`--image ${quoted(image)}`);
  if (body.baseline) words.push("--baseline");
  if (kind === "drafts") words.push("--draft");
  return [`arlon submit ${words.join(" \\\n  ")}`, ...flags, `${url} --wait --output ${kind === "drafts" ? "draft.mp4" : "video.mp4"}`].join(" \\\n  ") + `\n\n# to watch this one: ${watching}`;
}

const WRITERS = { curl, python: openai, arlon };

export function startCommands(current) {
  const dialog = $("copy");
  let as = "curl";
  const draw = () => {
    const object = current();
    const made = { ...requestOf(object), id: object.id };
    $("copy-code").textContent = WRITERS[as](made);
    $("copy-note").textContent = made.guessed
      ? "Made elsewhere: settings that were not the defaults are not known here, so they are not in it."
      : "With the same seed, the same video again. A key, where the server wants one, is read from ARLON_API_KEY.";
    for (const tab of dialog.querySelectorAll("[data-as]")) tab.setAttribute("aria-pressed", String(tab.dataset.as === as));
  };
  $("copy-open").onclick = () => {
    draw();
    $("copy-do").textContent = "Copy";
    dialog.showModal();
  };
  $("copy-close").onclick = () => dialog.close();
  for (const tab of dialog.querySelectorAll("[data-as]")) {
    tab.onclick = () => {
      as = tab.dataset.as;
      draw();
    };
  }
  $("copy-do").onclick = async () => {
    await copy($("copy-code").textContent);
    $("copy-do").textContent = "Copied";
    setTimeout(() => ($("copy-do").textContent = "Copy"), 1500);
  };
}

/** Pages that came over plain HTTP from another machine have no clipboard: there, as one copied of old. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = h("textarea", { value: text });
  $("copy").append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}
