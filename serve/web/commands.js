// What was done, as commands that do it again: for the shell, for Python, and for `arlon`.

import { kindOf } from "./api.js";
import { $, h } from "./dom.js";

const KEPT = "arlon.requests";
const KEPT_COUNT = 50; // videos and drafts
const AUTHORIZED = '-H "Authorization: Bearer $ARLON_API_KEY"';

const json = JSON.stringify;
const server = () => new URL(".", document.baseURI).href.replace(/\/$/, "");
const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
const kept = () => JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");

/** Remembers, in this tab, a request that made `id` or changed it: {path, body, image: a file's name}. */
export function remember(id, made, first = true) {
  const { input_reference: picture, ...body } = made.body; // the picture itself would fill what a tab may keep
  const before = first ? [] : (kept().find(([known]) => known === id)?.[1] ?? []);
  const all = kept().filter(([known]) => known !== id);
  all.push([id, [...before, { ...made, body, image: picture && made.image }]]);
  sessionStorage.setItem(KEPT, json(all.slice(-KEPT_COUNT)));
}

/** The requests that made `object`: as they were, or, where another tab made it, as the object tells it. */
function requestsOf(object) {
  const known = kept().find(([id]) => id === object.id)?.[1];
  const seeded = ({ body, ...made }) =>
    ["videos", "drafts"].includes(made.path) && !body.draft ? { ...made, body: { ...body, seed: object.seed } } : { ...made, body };
  if (known) return { requests: known.map(seeded), guessed: false };
  const guess = (path, body) => ({ requests: [{ path, body }], guessed: true });
  if (object.draft_id) return guess("videos", { draft: object.draft_id });
  const parts = object.segments.map(({ prompt, cut }) => (cut ? { prompt, cut } : { prompt }));
  const same = parts.every(({ prompt, cut }) => prompt === parts[0].prompt && !cut);
  const text = same ? { prompt: parts[0].prompt, num_segments: parts.length } : { segments: parts };
  return guess(kindOf(object.id), { ...text, seed: object.seed, ...(object.baseline && { baseline: true }) });
}

// ---- curl

function curl(requests, id) {
  const watched = quoted(`${server()}/v1/${kindOf(id)}/${id}/stream`);
  return [...requests.map(posted), `# what came of it can be watched from the first segment on\ncurl -s ${AUTHORIZED} ${watched} -o video.mp4`].join("\n\n");
}

function posted({ path, body, image }) {
  const begin = `curl -s ${quoted(`${server()}/v1/${path}`)} \\\n  ${AUTHORIZED} \\\n  -H 'Content-Type: application/json' \\\n  -d `;
  if (!image) return begin + quoted(json(body));
  const [before, behind] = json({ ...body, input_reference: { image_url: `data:${typeOf(image)};base64,PICTURE` } }).split("PICTURE");
  return `{ printf %s ${quoted(before)}; base64 < ${quoted(image)} | tr -d '\\n'; printf %s ${quoted(behind)}; } |\n${begin}@-`;
}

const typeOf = (name) => `image/${{ jpg: "jpeg", jpeg: "jpeg", webp: "webp" }[name.split(".").at(-1).toLowerCase()] ?? "png"}`;

// ---- Python, with OpenAI's client

/** JSON is Python, but for these three words; text is left alone. */
const python = (value) =>
  json(value).replace(/"(?:[^"\\]|\\.)*"|\b(?:true|false|null)\b/g, (word) => ({ true: "True", false: "False", null: "None" })[word] ?? word);

function openai(requests, id) {
  const calls = requests.map(called);
  const video = kindOf(id) === "videos";
  const plain = calls.every((text) => !text.includes("cast_to"));
  return `${calls.some((text) => text.includes("base64.")) ? "import base64\n" : ""}import os

from openai import OpenAI
${plain ? "" : "from openai.types import Video\n"}
client = OpenAI(base_url=${json(`${server()}/v1`)}, api_key=os.environ.get("ARLON_API_KEY", "none"))
${calls.join("\n")}
${video ? 'client.videos.poll(video.id)\nclient.videos.download_content(video.id).write_to_file("video.mp4")' : "print(video.id, video.status)"}`;
}

function called({ path, body, image }) {
  if (path === "videos" && body.prompt !== undefined) {
    const { prompt, ...rest } = body;
    const file = image ? `    input_reference=open(${json(image)}, "rb"),\n` : "";
    const extra = Object.keys(rest).length ? `    extra_body=${python(rest)},\n` : "";
    return `video = client.videos.create(\n    prompt=${json(prompt)},\n${file}${extra})`;
  }
  if (path.endsWith("/remix")) return `video = client.videos.remix(${json(path.split("/")[1])}, prompt=${json(body.prompt)})`;
  // what is not in OpenAI's API: storyboards, drafts and what is made of them
  if (!image) return `video = client.post(${json(`/${path}`)}, body=${python(body)}, cast_to=Video)`;
  const picture = `picture = base64.b64encode(open(${json(image)}, "rb").read()).decode()\n`;
  const reference = `{"image_url": "data:${typeOf(image)};base64," + picture}`;
  return `${picture}video = client.post(${json(`/${path}`)}, body=${python(body).slice(0, -1)}, "input_reference": ${reference}}, cast_to=Video)`;
}

// ---- arlon

const FLAGS = {
  seed: "--seed", num_segments: "--segments", seconds: "--seconds", transition_latents: "--transition",
  num_inference_steps: "--steps", guidance_scale: "--guidance-scale", token_guidance_scale: "--token-guidance-scale",
  negative_prompt: "--negative-prompt",
};

function arlon(requests, id) {
  const commands = requests.map(({ path, body, image }, index) => {
    const flags = Object.entries(FLAGS).flatMap(([name, flag]) => (body[name] === undefined ? [] : [`${flag} ${quoted(body[name])}`]));
    const last = index === requests.length - 1;
    const output = kindOf(id) === "drafts" ? "draft.mp4" : "video.mp4";
    return [...asked(path, body, image), ...flags, last ? `--output ${output}` : "--wait"].join(" \\\n  ");
  });
  return [`export ARLON_URL=${quoted(server())}`, ...commands, `# to watch this one\narlon watch ${id}`].join("\n\n");
}

function asked(path, body, image) {
  const [kind, id, action, index] = path.split("/");
  const prompt = body.prompt === undefined ? [] : [`--prompt ${quoted(body.prompt)}`];
  if (action === "segments") return [`arlon draft reroll ${id} ${index}`, ...prompt, ...(body.following === "replan" ? ["--replan"] : [])];
  if (action === "remix") return [`arlon remix ${id}`, ...prompt];
  if (id === "extensions") return [`arlon extend ${body.video.id}`, ...prompt];
  if (body.draft) return [`arlon render ${body.draft}`];
  const timed = ({ prompt: text, seconds }) => `--prompt ${quoted(text)}${seconds === undefined ? "" : ` --seconds ${seconds}`}`;
  return [
    "arlon submit",
    ...(body.segments?.map(timed) ?? prompt),
    ...(body.segments ?? []).flatMap((part, number) => (part.cut ? [`--cut ${number + 1}`] : [])),
    ...(image ? [`--image ${quoted(image)}`] : []),
    ...(body.baseline ? ["--baseline"] : []),
    ...(kind === "drafts" ? ["--draft"] : []),
  ];
}

// ---- the dialog

const WRITERS = { curl, python: openai, arlon };

/** `current()` is what is open. */
export function startCommands(current) {
  const dialog = $("copy");
  let as = "curl";
  const draw = () => {
    const object = current();
    const { requests, guessed } = requestsOf(object);
    $("copy-code").textContent = WRITERS[as](requests, object.id);
    $("copy-note").textContent = guessed
      ? "Made elsewhere: settings that were not the defaults are not known here, so they are not in it."
      : "With the same seed, the same video again. Where the server wants a key, it is read from ARLON_API_KEY.";
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
